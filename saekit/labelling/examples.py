"""Contexts as pieces of text: tokens around a peak, cut at the borders of its document."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.contexts import Context, FeatureContexts
from saekit.labelling.tokenrows import TokenRows
from saekit.labelling.vocabulary import Vocabulary

__all__ = ["Example", "ExampleReader"]

EXCERPT_BEFORE = 12
EXCERPT_AFTER = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """Consecutive tokens of one document, with one feature's activations on them."""

    tokens: tuple[int, ...]
    acts: tuple[float, ...]
    """Activations, 0 where silent or outside the training documents."""
    peak: int
    """Index of the peak in `tokens`."""
    document: int
    flat: int
    """Store index (row * T + position) of the peak."""


class ExampleReader:
    """Turns places of the store into examples.

    Never shows a token of another document: in a packed row the neighbour may be held out.
    """

    def __init__(self, store: TokenRows, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.context_len = store.context_len
        self._tokens: NDArray[np.int32] = store.tokens()
        self._documents: NDArray[np.int32] = store.documents()

    def document(self, context: Context) -> int:
        """Returns the document that a context lies in."""
        return int(self._documents[context.row, context.position])

    def of_context(self, context: Context, *, max_act: float) -> Example:
        """Returns a feature's context as an example; `max_act` scales its window back to activations."""
        width = len(context.window)
        acts = context.window.astype(np.float32) * (max_act / 255)
        return self.around(context.row, context.position, before=width // 2, after=width - 1 - width // 2, acts=acts)

    def around(
        self, row: int, position: int, *, before: int, after: int, acts: NDArray[np.float32] | None = None
    ) -> Example:
        """Returns up to `before` + 1 + `after` tokens around a place; `acts` [before + 1 + after] or silence."""
        document = int(self._documents[row, position])
        low, high = max(0, position - before), min(self.context_len, position + after + 1)
        same = self._documents[row, low:high] == document
        breaks_before = np.flatnonzero(~same[: position - low])
        breaks_after = np.flatnonzero(~same[position - low :])
        start = low + (int(breaks_before[-1]) + 1 if len(breaks_before) else 0)
        stop = position + int(breaks_after[0]) if len(breaks_after) else high
        offset = start - (position - before)
        values = np.zeros(stop - start) if acts is None else acts[offset : offset + stop - start]
        return Example(
            tokens=tuple(self._tokens[row, start:stop].tolist()),
            acts=tuple(np.asarray(values, dtype=np.float64).tolist()),
            peak=position - start,
            document=document,
            flat=row * self.context_len + position,
        )

    def excerpt(self, example: Example) -> str:
        """Returns one line of text around the peak, the peak between guillemets."""
        start = max(0, example.peak - EXCERPT_BEFORE)
        stop = min(len(example.tokens), example.peak + EXCERPT_AFTER + 1)
        peak = self.vocabulary.text(example.tokens[example.peak])
        bare = peak.lstrip(" ")
        space = peak[: len(peak) - len(bare)]
        before = self.vocabulary.join(example.tokens[start : example.peak])
        after = self.vocabulary.join(example.tokens[example.peak + 1 : stop])
        text = f"{before}{space}\u00ab{bare}\u00bb{after}"
        return " ".join(text.split())

    def word_at(self, example: Example) -> tuple[str, bool]:
        """Returns the whole word that the peak token belongs to, as far as the example shows it, and whether it begins it."""
        text = self.vocabulary.text
        tokens, first = example.tokens, example.peak
        word = text(tokens[first])
        while first > 0 and word[:1].isalpha() and (before := text(tokens[first - 1]))[-1:].isalpha():
            first, word = first - 1, before + word
        last = example.peak
        while last + 1 < len(tokens) and word[-1:].isalpha() and (after := text(tokens[last + 1]))[:1].isalpha():
            last, word = last + 1, word + after
        return word.strip(), first == example.peak


def feature_examples(reader: ExampleReader, contexts: FeatureContexts, feature: int) -> list[Example]:
    """Returns a feature's contexts, top ones first, then the sample from strong to weak, each document once."""
    chosen: dict[int, Example] = {}
    for context in [*contexts.feature(feature), *reversed(contexts.sample(feature))]:
        document = reader.document(context)
        if document not in chosen:
            chosen[document] = reader.of_context(context, max_act=float(contexts.max_act[feature]))
    return list(chosen.values())
