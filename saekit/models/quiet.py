"""Transformers and the hub's client kept silent, and what remains of their errors."""

import contextlib
from collections.abc import Iterator

__all__ = ["first_line", "quiet"]


@contextlib.contextmanager
def quiet(*, progress_bars: bool) -> Iterator[None]:
    """Keeps transformers' notes and bars, and the hub client's, off the screen; settings are put back on exit."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    # Each file that cannot be reached is tried six times with a line for each; the error at the end says it once.
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the hub client has it untyped
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has it untyped
    if not progress_bars:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has it untyped
    try:
        yield
    finally:
        hub_logging.set_verbosity(hub_verbosity)
        logging.set_verbosity(verbosity)
        if had_bars and not progress_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has it untyped


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".:") if lines else type(error).__name__
