"""Labels that know nothing of a feature: what they score is what a score has to be compared with."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from saekit.labelling.records import Label
from saekit.labelling.scoring.rule import HeldOut

__all__ = ["CONTROLS", "NO_LABEL", "ControlName", "Controls", "control_labeler"]

ControlName = Literal["empty", "random", "shuffled"]
CONTROLS: tuple[ControlName, ...] = get_args(ControlName)
"""`empty`: no description; `random`: words drawn from held-out text; `shuffled`: the label of another feature."""
NO_LABEL = "control:no label"
"""Stands as labeler in scores of the feature itself."""
NUM_WORDS = 5
MIN_LETTERS = 3


def control_labeler(name: ControlName) -> str:
    """Returns what stands as labeler in a control's scores."""
    return f"control:{name}"


class Controls:
    """Makes the labels; the same in every process."""

    def __init__(self, held_out: HeldOut, *, seed: int) -> None:
        table, seen = held_out.table, np.unique(held_out.table.ids[held_out.in_view])
        texts = {table.vocabulary.text(token).strip().casefold() for token in seen.tolist()}
        self._words = sorted(text for text in texts if len(text) >= MIN_LETTERS and text.isalpha())
        self._seed = seed

    def drawn(self, features: Sequence[int], num: int) -> list[int]:
        """Returns the features that are controlled."""
        order = np.random.default_rng(self._seed).permutation(len(features))[:num]
        return sorted(features[int(place)] for place in order)

    def labels(self, feature: int, known: Sequence[Label]) -> list[Label]:
        """Returns the controls of a feature: the empty label, random words, and the label of another feature.

        Args:
            known: labels of one labeler; without one of another feature there is no shuffled one.
        """
        generator = np.random.default_rng((self._seed, feature))
        made = [Label(feature=feature, labeler=control_labeler("empty"))]
        if self._words:
            words = generator.choice(self._words, size=min(NUM_WORDS, len(self._words)), replace=False)
            made.append(Label(feature=feature, labeler=control_labeler("random"), label=", ".join(words.tolist())))
        others = sorted((label for label in known if label.feature != feature), key=lambda label: label.feature)
        if others:
            other = others[int(generator.integers(len(others)))]
            made.append(other.model_copy(update={"feature": feature, "labeler": control_labeler("shuffled")}))
        return made
