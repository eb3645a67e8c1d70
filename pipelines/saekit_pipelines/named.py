"""Progress of one SAE among several."""

from contextlib import AbstractContextManager

from saekit.progress import Progress, Task

__all__ = ["NamedProgress"]


class NamedProgress:
    """Puts an SAE's name before the tasks of a stage that several SAEs pass through."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> AbstractContextManager[Task]:
        """Shows a task under the SAE's name."""
        return self._progress.task(f"{self._name}: {name}", total, unit, done=done)

    def say(self, message: str) -> None:
        """Says one fact under the SAE's name."""
        self._progress.say(f"{self._name}: {message}")
