"""How many requests may be in flight: more while answers come, half of it when the server says that it is too much.

Source: additive increase, multiplicative decrease (Chiu and Jain 1989); doubling until the first refusal is TCP's slow start.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping

__all__ = ["Pace", "duration_seconds"]

START = 8
_PART = re.compile(r"([\d.]+)(ms|h|m|s)")
_UNIT_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Pace:
    """Lets requests go as fast as a server takes them; one for all tasks of an event loop.

    Attributes:
        limit: requests that may be in flight now.
        in_flight: requests that are.
    """

    def __init__(self, most: int, *, max_hold_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """At most `most` in flight; a server that asks for a longer pause than `max_hold_seconds` gets that much."""
        self.limit = float(min(START, most))
        self.in_flight = 0
        self._most = most
        self._max_hold = max_hold_seconds
        self._clock = clock
        self._is_probing = True
        self._epoch = 0
        self._hold_until = 0.0
        self._left: dict[str, tuple[float, float]] = {}
        self._waiting: list[asyncio.Future[None]] = []

    @contextlib.asynccontextmanager
    async def slot(self, tokens: int) -> AsyncIterator[int]:
        """Waits until a request of so many tokens may go; yields what `congested` wants to know about it."""
        while (delay := self.delay(tokens)) is None or delay > 0:
            await self._change(delay)
        self.in_flight += 1
        for what, need in (("requests", 1), ("tokens", tokens)):
            if what in self._left:
                left, until = self._left[what]
                self._left[what] = (left - need, until)
        try:
            yield self._epoch
        finally:
            self.in_flight -= 1
            self._wake()

    def delay(self, tokens: int) -> float | None:
        """Returns the seconds that a request has to wait; 0: none, None: until another one ends."""
        now = self._clock()
        until = [self._hold_until]
        for what, need in (("requests", 1), ("tokens", tokens)):
            left, reset = self._left.get(what, (float("inf"), 0.0))
            if reset <= now:
                self._left.pop(what, None)
            elif left < need:
                until.append(reset)
        if max(until) > now:
            return max(until) - now
        return 0.0 if self.in_flight < int(self.limit) else None

    def answered(self) -> None:
        """A request was answered: room for more."""
        self.limit = min(self._most, self.limit + (1.0 if self._is_probing else 1.0 / self.limit))
        self._wake()

    def congested(self, sent_in: int, wait_seconds: float | None) -> None:
        """The server has too much: halves the limit, once for all requests that were in flight together, and holds."""
        if sent_in == self._epoch:
            self._epoch += 1
            self._is_probing = False
            self.limit = max(1.0, self.limit / 2)
        if wait_seconds is not None:
            self._hold_until = max(self._hold_until, self._clock() + min(wait_seconds, self._max_hold))

    def told(self, headers: Mapping[str, str]) -> None:
        """Reads `x-ratelimit-remaining-*` and `x-ratelimit-reset-*`: what is left until when.

        Source: OpenAI's rate limit guide, "Rate limits in headers".
        """
        for what in ("requests", "tokens"):
            left = _number(headers.get(f"x-ratelimit-remaining-{what}"))
            reset = duration_seconds(headers.get(f"x-ratelimit-reset-{what}"))
            if left is not None and reset is not None:
                self._left[what] = (left, self._clock() + min(reset, self._max_hold))

    async def _change(self, seconds: float | None) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(future, seconds)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def duration_seconds(text: str | None) -> float | None:
    """Returns a duration such as `20ms`, `1.5s`, `6m0s` or plain seconds; None for anything else."""
    if not text:
        return None
    plain = _number(text)
    if plain is not None:
        return max(0.0, plain)
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)
