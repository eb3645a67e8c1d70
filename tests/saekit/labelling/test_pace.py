"""The pace: more while answers come, half when it is too much, no request before the time that a server names."""

import asyncio

import pytest

from saekit.labelling.pace import Pace, duration_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_limit_doubles_until_the_first_refusal_then_grows_by_one_a_round() -> None:
    pace = Pace(100, max_hold_seconds=10)
    assert pace.limit == 8
    for _ in range(8):
        pace.answered()
    assert pace.limit == 16
    pace.congested(0, None)
    assert pace.limit == 8
    for _ in range(8):
        pace.answered()
    assert 8.5 < pace.limit < 9.1


def test_limit_stays_between_one_and_the_most() -> None:
    pace = Pace(10, max_hold_seconds=10)
    for _ in range(50):
        pace.answered()
    assert pace.limit == 10
    for epoch in range(50):
        pace.congested(epoch, None)
    assert pace.limit == 1
    assert Pace(3, max_hold_seconds=10).limit == 3


def test_refusals_of_requests_that_were_out_together_halve_once() -> None:
    pace = Pace(100, max_hold_seconds=10)
    for _ in range(5):
        pace.congested(0, None)
    assert pace.limit == 4
    pace.congested(1, None)
    assert pace.limit == 2


def test_named_pause_holds_everybody_and_is_bounded() -> None:
    clock = Clock()
    pace = Pace(100, max_hold_seconds=10, clock=clock)
    pace.congested(0, 4.0)
    pace.congested(0, 1.0)
    assert pace.delay(1) == 4.0
    clock.now += 4.0
    assert pace.delay(1) == 0.0
    pace.congested(0, 1e9)
    assert pace.delay(1) == 10.0


@pytest.mark.parametrize(
    ("headers", "tokens", "delay"),
    [
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "3s"}, 1, 3.0),
        ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "3s"}, 1, 0.0),
        ({"x-ratelimit-remaining-tokens": "500", "x-ratelimit-reset-tokens": "6m0s"}, 501, 10.0),
        ({"x-ratelimit-remaining-tokens": "500", "x-ratelimit-reset-tokens": "200ms"}, 500, 0.0),
        ({"x-ratelimit-remaining-tokens": "many", "x-ratelimit-reset-tokens": "soon"}, 500, 0.0),
        ({"x-ratelimit-remaining-requests": "0"}, 1, 0.0),
    ],
    ids=["no requests", "one request", "too few tokens", "enough tokens", "nonsense", "no reset"],
)
def test_what_is_left_is_kept_to(headers: dict[str, str], tokens: int, delay: float) -> None:
    pace = Pace(100, max_hold_seconds=10, clock=Clock())
    pace.told(headers)
    assert pace.delay(tokens) == delay


def test_what_is_left_is_used_up_by_slots_and_forgotten_at_the_reset() -> None:
    clock = Clock()
    pace = Pace(100, max_hold_seconds=10, clock=clock)
    pace.told({"x-ratelimit-remaining-requests": "2", "x-ratelimit-reset-requests": "5"})

    async def two() -> None:
        for _ in range(2):
            async with pace.slot(1):
                pass

    asyncio.run(two())
    assert pace.delay(1) == 5.0
    clock.now += 5.0
    assert pace.delay(1) == 0.0


def test_no_more_than_the_limit_are_in_slots_at_once_and_all_get_one() -> None:
    pace = Pace(4, max_hold_seconds=10)
    most = done = 0

    async def one() -> None:
        nonlocal most, done
        async with pace.slot(1):
            most = max(most, pace.in_flight)
            await asyncio.sleep(0)
        done += 1

    async def many() -> None:
        await asyncio.gather(*(one() for _ in range(50)))

    asyncio.run(many())
    assert (most, done, pace.in_flight) == (4, 50, 0)


_DURATIONS = {"20ms": 0.02, "1.5s": 1.5, "6m0s": 360.0, "1h2m3s": 3723.0, "7": 7.0, "-1": 0.0}


@pytest.mark.parametrize(
    ("text", "seconds"), [*_DURATIONS.items(), ("", None), (None, None), ("soon", None), ("5 s", None), ("s", None)]
)
def test_durations_are_read(text: str | None, seconds: float | None) -> None:
    assert duration_seconds(text) == (None if seconds is None else pytest.approx(seconds))
