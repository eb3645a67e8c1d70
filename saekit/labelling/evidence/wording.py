"""Evidence of one feature as a labelling model reads it: numbered texts with marks, and tokens in order."""

from collections.abc import Callable, Sequence

from saekit.labelling.contexts import Context, FeatureContexts
from saekit.labelling.evidence.effects import TokenEffects
from saekit.labelling.examples import Example, ExampleReader
from saekit.labelling.llmconfig import LLMConfig

__all__ = ["EffectsOf", "EvidenceText"]

EffectsOf = Callable[[int], Sequence[TokenEffects]]
"""Feature -> the token effects that were measured for it, steering before the projection."""
MARK_ABOVE = 0.3
"""Tokens are marked above this share of the example's own peak, so that weak examples show marks too.

Source: delphi's explainer (Paulo et al. 2024, arXiv 2410.13928) uses the same share.
"""
_SIDES = {
    "vocabproj": ("By its output weights, makes more likely", "By its output weights, makes less likely"),
    "tokenchange": ("Turned up in the model, makes more likely", "Turned up in the model, makes less likely"),
    "tokenchange_down": ("Turned down in the model, makes more likely", "Turned down in the model, makes less likely"),
}


class EvidenceText:
    """Words for contexts and token effects, the same in every process."""

    def __init__(self, reader: ExampleReader, contexts: FeatureContexts, config: LLMConfig) -> None:
        self._reader = reader
        self._contexts = contexts
        self._config = config

    def shown(self, feature: int) -> tuple[list[Example], list[Example]]:
        """Returns the strongest examples and those over the whole range, strong to weak, no document twice."""
        seen: set[int] = set()

        def fresh(contexts: Sequence[Context], limit: int) -> list[Example]:
            chosen: list[Example] = []
            for context in contexts:
                document = self._reader.document(context)
                if len(chosen) < limit and document not in seen:
                    seen.add(document)
                    chosen.append(self._reader.of_context(context, max_act=float(self._contexts.max_act[feature])))
            return chosen

        top = fresh(self._contexts.feature(feature), self._config.num_top)
        sample = self._contexts.sample(feature)
        # One of each stratum in turn: a feature with many weak firings still shows its strong ones.
        by_turn = sorted(range(len(sample)), key=lambda i: (_turn(sample, i), -sample[i].act))
        spread = fresh([sample[i] for i in by_turn], self._config.num_sample)
        return top, sorted(spread, key=lambda example: -example.acts[example.peak])

    def texts(self, feature: int) -> list[str]:
        """Returns the lines that show a feature's contexts, numbered through both lists; none where it never fires."""
        top, spread = self.shown(feature)
        largest = float(self._contexts.max_act[feature]) or 1.0
        lines = ["Strongest texts:"] if top else []
        lines += [f"{number}. {self._marked(example)}" for number, example in enumerate(top, start=1)]
        if spread:
            lines.append("\nTexts over the whole range:")
            lines += [
                f"{number}. [{round(10 * example.acts[example.peak] / largest)}] {self._marked(example)}"
                for number, example in enumerate(spread, start=len(top) + 1)
            ]
        return lines

    def tokens(self, feature: int, effects: TokenEffects) -> list[str]:
        """Returns the lines that show what a feature makes likely and unlikely."""
        show = self._reader.vocabulary.show
        more, less = _SIDES[effects.kind]
        promoted = [show(token) for token, _ in effects.promoted(feature)[: self._config.num_effects]]
        suppressed = [show(token) for token, _ in effects.suppressed(feature)[: self._config.num_effects]]
        return [f"{more}: {', '.join(promoted)}", f"{less}: {', '.join(suppressed)}"]

    def _marked(self, example: Example) -> str:
        """Returns the example as one line, neighbouring active tokens in one pair of marks."""
        bar = MARK_ABOVE * example.acts[example.peak]
        parts: list[str] = []
        is_open = False
        for token, act in zip(example.tokens, example.acts, strict=True):
            # The marks are the explainer's only sign of activity, so the text's own are made plain.
            text = (
                self._reader.vocabulary.text(token).replace("\u00ab", "<").replace("\u00bb", ">").replace("\n", "\\n")
            )
            bare = text.lstrip(" ")
            is_active = act > bar
            if is_active != is_open:
                parts.append(text[: len(text) - len(bare)] + "\u00ab" + bare if is_active else "\u00bb" + text)
            else:
                parts.append(text)
            is_open = is_active
        return "".join(parts).strip() + ("\u00bb" if is_open else "")


def _turn(sample: Sequence[Context], place: int) -> int:
    """Returns how many of the same stratum come before a context."""
    return sum(context.stratum == sample[place].stratum for context in sample[:place])
