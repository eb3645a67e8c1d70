"""Ctrl-C as a request that a loop answers between two steps, when its state is whole."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

__all__ = ["StopRequest"]


class StopRequest:
    """While entered, the first Ctrl-C only sets `is_set`; a second one interrupts at once.

    Takes over the signal only where Python's own handler is in place and in the main thread; elsewhere Ctrl-C does what it
    did before.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._installed = False

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._installed = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
