"""Figures of a training in accelerate's trackers too: one run an SAE, which a training that is gone on with goes on with."""

import contextlib
import json
import math
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saekit.errors import ConfigError, MissingDependencyError
from saekit.manifest import write_json
from saekit.progress import Progress
from saekit.training.config import TrainConfig
from saekit.training.layout import Layout
from saekit.training.metrics import read_metrics

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

__all__ = ["TRACKERS_NAME", "RunTrackers", "check_single_runs", "check_trackers", "open_trackers"]

TRACKERS_NAME = "trackers.json"
"""In the SAE's folder: which run of each tracker belongs to it, and how many rows of figures that has been given."""
ONE_AT_A_TIME = frozenset({"clearml", "mlflow", "swanlab"})
"""Trackers that have one open run in a process, whichever object is asked."""
CONFIG_AT_START = frozenset({"trackio", "wandb"})
"""Trackers that are given the config when a run begins: later they look for the only run of the process."""


class _Run(NamedTuple):
    """One tracker's run."""

    tracker: "GeneralTracker"
    num_known: int
    """Rows that it was given before."""


def check_trackers(names: Iterable[str]) -> None:
    """Checks that accelerate knows the trackers and that their packages are installed.

    Raises:
        ConfigError: a name that accelerate does not know.
        MissingDependencyError: a package is not installed.
    """
    names = list(names)
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"training: found tracker {name!r}, needs one of {known}")
        is_builtin = name in {str(known.value) for known in LoggerType}
        if is_builtin and name not in {str(found.value) for found in get_available_trackers()}:
            raise MissingDependencyError(
                f"training: tracker {name!r}, needs the package {name}; pip install {name}, or leave it out of trackers"
            )


def check_single_runs(configs: Iterable[TrainConfig]) -> None:
    """Checks that trainings of one process at the same time have no tracker that takes one run at a time.

    Raises:
        ConfigError: they have.
    """
    configs = list(configs)
    found = sorted({name for config in configs for name in config.trackers} & ONE_AT_A_TIME)
    if found and len(configs) > 1:
        raise ConfigError(
            f"training: tracker {found[0]!r} has one run at a time, found {len(configs)} SAEs on one read; train them one after"
            " another, or leave it out of trackers"
        )


def open_trackers(
    out: Path,
    config: TrainConfig,
    layout: Layout,
    stack: contextlib.ExitStack,
    *,
    values: Mapping[str, object],
    progress: Progress,
) -> "RunTrackers | None":
    """Returns the trackers of a training, begun or gone on with; None on processes that do not write the SAE's folder.

    Args:
        out: folder of the SAE.
        config: of the training.
        layout: who trains it.
        stack: ends the runs with the training, however that ends.
        values: what a new run says that it is of.
        progress: is told of a tracker that fails.

    Raises:
        ConfigError: on every process, where a tracker cannot be started.
    """
    if not config.trackers:
        return None
    trackers: RunTrackers | None = None
    problem: str | None = None
    if layout.is_main_process:
        trackers = RunTrackers(out, config, progress=progress)
        stack.callback(trackers.close)
        try:
            trackers.start(values)
        except ConfigError as error:
            problem = str(error)
    problem = layout.told(problem)
    if problem is not None:
        raise ConfigError(problem)
    return trackers


class RunTrackers:
    """What one SAE's training tells its trackers; one that fails later is left out, and the training goes on.

    A training that is gone on with does some steps again, to the same figures. Rows that a run has got already are not sent
    again: a row is known by its number in `metrics.jsonl`, which is the same each time.
    """

    def __init__(self, out: Path, config: TrainConfig, *, progress: Progress) -> None:
        """Starts nothing yet."""
        self._out, self._config, self._progress = out, config, progress
        self._runs: dict[str, _Run] = {}
        self._name = out.name if config.tracker_run is None else f"{config.tracker_run}/{out.name}"

    def start(self, values: Mapping[str, object]) -> None:
        """Begins a run of each tracker, or goes on with the one that the folder has.

        Raises:
            ConfigError: one cannot be started.
        """
        path = self._out / TRACKERS_NAME
        known: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        num_rows = len(read_metrics(self._out))
        flat = dict(_flat(values))
        for name in self._config.trackers:
            before = known.get(name)
            # What is on disk was sent before; what an earlier start cut off was sent as well.
            num_known = 0 if before is None else max(before["rows"], num_rows)
            identity = uuid.uuid4().hex if before is None else before["run"]
            try:
                tracker = self._started(name, identity, is_new=before is None, values=flat)
            # Whatever a service or its package does not like.
            except Exception as error:
                raise ConfigError(
                    f"training: tracker {name!r} cannot be started: {_line(error)}; set it up, or leave it out of trackers"
                ) from error
            self._runs[name] = _Run(tracker, num_known)
            known[name] = {"run": _identity(name, tracker) or identity, "rows": num_known}
        write_json(path, known)
        self._progress.say(f"{self._out}: figures also go to {', '.join(self._runs)}")

    def log(self, number: int, row: Mapping[str, object]) -> None:
        """Sends the row with this number, from 1, to the runs that have not got it."""
        values = {f"{row['split']}/{key}": value for key, value in _flat(row) if key not in {"split", "step"}}
        figures = {key: value for key, value in values.items() if _is_figure(value)}
        for name, run in list(self._runs.items()):
            if number > run.num_known:
                with self._leaving_out(name):
                    run.tracker.log(figures, step=row["step"])

    def close(self) -> None:
        """Ends the runs; nothing where that is done."""
        for name in list(self._runs):
            with self._leaving_out(name):
                self._runs[name].tracker.finish()
            self._runs.pop(name, None)

    def _started(
        self, name: str, identity: str | None, *, is_new: bool, values: Mapping[str, object]
    ) -> "GeneralTracker":
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        tracker: GeneralTracker = tracker_class(**self._arguments(name, identity, is_new=is_new))
        # The process that writes the folder asks, and with the layout `layers` that is not the launcher's first one.
        tracker.main_process_only = False
        if is_new and name in CONFIG_AT_START:
            tracker.init_kwargs["config"] = dict(values)
        tracker.start()
        if is_new and name == "tensorboard":
            # Its table of settings would be a second run beside the one of the figures.
            tracker.log({"config": "\n".join(f"    {key} = {value}" for key, value in values.items())}, step=0)
        elif is_new and name not in CONFIG_AT_START:
            if name == "comet_ml":
                tracker.tracker.set_name(self._name)
            tracker.store_init_configuration(dict(values))
        return tracker

    def _arguments(self, name: str, identity: str | None, *, is_new: bool) -> dict[str, Any]:
        """Returns what the tracker is made with; `identity` names its run, where runs can be named beforehand."""
        config, folder = self._config, str(self._out)
        project = config.tracker_project
        run = self._name
        known = None if is_new else identity
        if name == "tensorboard":
            # Files are called after the second in which they were begun, which two starts can share, and read in that order.
            return {"run_name": name, "logging_dir": folder, "filename_suffix": f".{time.time_ns():020d}"}
        if name == "wandb":
            options = {"id": identity, "resume": "allow", "reinit": "create_new", "dir": folder}
            return {"run_name": project, "name": run, **options}
        if name == "trackio":
            return {"run_name": project, "name": f"{run}-{str(identity)[:8]}", "resume": "allow"}
        if name == "comet_ml":
            return {"run_name": project, "experiment_key": identity}
        if name == "mlflow":
            return {"experiment_name": project, "run_name": run, "run_id": known}
        if name == "aim":
            return {"run_name": run, "logging_dir": folder, "experiment": project, "run_hash": known}
        if name == "clearml":
            return {"project_name": project, "task_name": run, "continue_last_task": known or False}
        if name == "dvclive":
            return {"dir": f"{folder}/{name}", "resume": not is_new}
        if name == "swanlab":
            return {"run_name": project, "experiment_name": run, "id": identity, "resume": "allow", "logdir": folder}
        return {"run_name": run} | ({"logging_dir": folder} if _wants_folder(name) else {})

    @contextlib.contextmanager
    def _leaving_out(self, name: str) -> Iterator[None]:
        """Inside the block, an error of a tracker ends its part in the training and nothing else."""
        try:
            yield
        except Exception as error:
            self._runs.pop(name, None)
            self._progress.say(
                f"{self._out}: tracker {name!r} failed and is left out from here on: {_line(error)};"
                " metrics.jsonl has every figure"
            )


def _wants_folder(name: str) -> bool:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return bool(LOGGER_TYPE_TO_CLASS[name].requires_logging_directory)


def _identity(name: str, tracker: "GeneralTracker") -> str | None:
    """Returns the name that a tracker gave its run, of those that give them themselves."""
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    if name == "aim":
        return str(tracker.tracker.hash)
    return str(tracker.tracker.id) if name == "clearml" else None


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the plain values of nested ones by their path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            yield from _flat({str(number): part for number, part in enumerate(value)}, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _is_figure(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
