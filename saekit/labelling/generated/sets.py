"""Whose sets of steered texts stand beside a feature's own, and in what order: nothing but what they say tells them apart.

In a trial every feature of the pool stands in as many sets of others as any other one, so that a rule that looks at no label
(the first, the longest, the most repetitive set) is right by chance.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from saekit.labelling.chat import Answer
from saekit.labelling.generated.texts import CLEAN, SteeredTexts
from saekit.labelling.records import Label

__all__ = ["SetPool", "described_for_output", "fingerprint"]


class SetPool:
    """The sets of all features that have one.

    Args:
        sets: feature -> its texts, or why there are none.
        seed: of the draws.
    """

    def __init__(self, sets: Mapping[int, SteeredTexts], *, seed: int) -> None:
        self._sets = sets
        self._seed = seed
        self._pool = sorted(feature for feature, own in sets.items() if own.status == "done" and feature != CLEAN)
        self._orders: dict[int, list[int]] = {}

    @property
    def features(self) -> list[int]:
        """Those that have a set, ascending."""
        return list(self._pool)

    @property
    def clean(self) -> tuple[str, ...]:
        """Texts written with no feature turned; none where they were not asked for."""
        return self._sets[CLEAN].texts if CLEAN in self._sets else ()

    def problem(self, feature: int, num_sets: int) -> str | None:
        """Returns why a feature cannot be judged; None: it can."""
        own = self._sets.get(feature)
        if own is None or own.status == "failed":
            return "no steered texts" if own is None else own.reason
        if len(self._pool) < num_sets:
            return f"steered texts of {len(self._pool)} features, needs {num_sets}"
        return None

    def why_unjudged(
        self, feature: int, num_sets: int, answers: Sequence[Answer], *, otherwise: str = "no usable answer"
    ) -> str:
        """Returns why answers gave no score: the texts' reason, that of the first answer with one, or `otherwise`."""
        lost = next((answer.reason for answer in answers if answer.reason), otherwise)
        return self.problem(feature, num_sets) or lost

    def texts(self, feature: int) -> tuple[str, ...]:
        """Returns a feature's set."""
        return self._sets[feature].texts

    def others(self, feature: int, trial: int, num: int) -> list[int]:
        """Returns the `num` features whose sets stand beside a feature's in a trial."""
        if trial not in self._orders:
            self._orders[trial] = np.random.default_rng((self._seed, trial)).permutation(self._pool).tolist()
        order = self._orders[trial]
        place = order.index(feature)
        return [order[(place + step) % len(order)] for step in range(1, num + 1)]

    def place(self, feature: int, trial: int, num_sets: int) -> int:
        """Returns where the feature's own set stands: at every place in turn, the first drawn at random."""
        return (int(np.random.default_rng((self._seed, feature)).integers(num_sets)) + trial) % num_sets


def described_for_output(label: Label, *, is_published: bool) -> str:
    """Returns what a judge reads of a label: all sides of it; as published, the description alone."""
    if is_published:
        return label.description or label.label or "(none)"
    lines = [label.label] if label.label else []
    for title, side in (
        ("Active on", label.fires_on),
        ("Makes more likely", label.promotes),
        ("Makes less likely", label.suppresses),
    ):
        lines += [f"{title}: {side}"] if side and side != label.label else []
    return "\n".join(lines) or "(none)"


def fingerprint(texts: Sequence[str]) -> int:
    """Returns a number that stands for what was shown, to pair judgements of the same."""
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:6], "big")
