"""Explanations as published by Gur-Arieh et al.: the same evidence in the same amounts, one free sentence for an answer.

Source: Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions", section 2 and the
released notebook. The wording of the prompts is ours, as are their worked examples, three in each as there; the answer is a JSON
object, so that it can be told from talk. Where the notebook lets hash order decide the order of tokens, they stand in order here.
"""

import json
import math
from typing import ClassVar

from pydantic import JsonValue

from saekit.labelling.evidence.effects import TokenEffects
from saekit.labelling.examples import Example
from saekit.labelling.explain import Explainer
from saekit.labelling.llmconfig import ExplainerKind

__all__ = ["PAPER_PROMPTS", "PaperExplainer"]

PAPER_PROMPTS: dict[ExplainerKind, str] = {
    "input": "paper_maxact_v1",
    "vocabproj": "paper_vocabproj_v1",
    "tokenchange": "paper_tokenchange_v1",
    "raw": "paper_raw_v1",
}
FEW_ACTIVE = 0.2
"""Below this share of active tokens a text's active ones are listed again by themselves."""
_CHANGES = ("tokenchange", "tokenchange_down")


class PaperExplainer(Explainer):
    """`input` is the paper's MaxAct, `raw` its Ensemble Raw (All); the description is the answer, the label its beginning."""

    prompts = PAPER_PROMPTS
    schema: ClassVar[dict[str, JsonValue]] = {
        "type": "object",
        "properties": {"description": {"type": "string"}},
        "required": ["description"],
        "additionalProperties": False,
    }
    needs = "description"
    usual_answer = '{"description": "Names of rivers and lakes, and words for what is found along them."}'

    def _is_shown(self, effects: TokenEffects) -> bool:
        return (
            self.kind == "raw" or effects.kind == self.kind or (self.kind == "tokenchange" and effects.kind in _CHANGES)
        )

    def _shown(self, feature: int) -> list[Example]:
        """Returns all top contexts."""
        max_act = float(self._contexts.max_act[feature])
        return [self._reader.of_context(context, max_act=max_act) for context in self._contexts.feature(feature)]

    def _lines(self, feature: int) -> list[str]:
        lines: list[str] = []
        if self.kind in {"input", "raw"}:
            for number, example in enumerate(self._shown(feature), start=1):
                lines += self._text(number, example)
        found = self._effects_shown(feature)
        lists = {
            "by its weights": [effects for effects in found if effects.kind == "vocabproj"],
            "by turning it": [effects for effects in found if effects.kind in _CHANGES],
        }
        for way, effects_of_way in lists.items():
            if effects_of_way:
                name = f"Tokens {way}" if self.kind == "raw" else "Tokens"
                lines.append(f"{name}: {self._tokens(feature, effects_of_way)}")
        return lines

    def _text(self, number: int, example: Example) -> list[str]:
        text = self._reader.vocabulary.text
        largest = max(example.acts)
        levels = [math.floor(10 * max(act, 0.0) / largest) if largest > 0 else 0 for act in example.acts]
        lines = [f"{_line(text(token))}\t{level}" for token, level in zip(example.tokens, levels, strict=True)]
        active = [line for line, level in zip(lines, levels, strict=True) if level > 0]
        again = [f"Text {number}, active tokens only", *active] if len(active) < FEW_ACTIVE * len(lines) else []
        return [f"Text {number}", *lines, *again]

    def _tokens(self, feature: int, found: list[TokenEffects]) -> str:
        """Returns promoted, then suppressed tokens of each measurement as one list without signs, none twice."""
        ids = [token for effects in found for token, _ in (*effects.promoted(feature), *effects.suppressed(feature))]
        texts = [self._reader.vocabulary.text(token) for token in ids]
        return json.dumps(list(dict.fromkeys(texts)), ensure_ascii=False)


def _line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\t", "\\t")
