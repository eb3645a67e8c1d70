"""Do sentences that are written from a label activate its feature, more than sentences that have nothing to do with it?

Source: Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions", section 3.1.
"""

import json
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from saekit.labelling.answers import UnusableAnswerError, parse_object, prompt_template
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.generated.sets import fingerprint
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score, ScorerName
from saekit.labelling.scoring.detection import described
from saekit.labelling.scoring.graded import graded_precision
from saekit.labelling.tokencode import code_of_tokens, opening, token_ids
from saekit.models import LanguageModel
from saekit.sae import SAE

__all__ = ["InputTester", "SentenceReader"]

PROMPT = "input_test_v1"
PAPER_PROMPT = "paper_input_test_v1"
NUM_BOOTSTRAP = 200
MAX_TOKENS = 128
"""Of one sentence that are read."""
_LIST: dict[str, JsonValue] = {"type": "array", "items": {"type": "string"}}
_SCHEMA: dict[str, JsonValue] = {
    "type": "object",
    "properties": {"activating": _LIST, "neutral": _LIST},
    "required": ["activating", "neutral"],
    "additionalProperties": False,
}
_USUAL_SENTENCE = "The old bridge over the river was closed for repairs until spring."
Threshold = Callable[[int], float]
"""Feature -> the activation from which on a token counts."""


class SentenceReader:
    """Runs subject model and dictionary on sentences.

    Args:
        counts_opening: whether the token before the text counts too, as published.
    """

    def __init__(self, lm: LanguageModel, sae: SAE, *, counts_opening: bool = False) -> None:
        self._lm, self._sae = lm, sae
        self._first = 0 if counts_opening else len(opening(lm.tokenizer))

    def largest(self, sentences: Sequence[str], feature: int) -> NDArray[np.float64]:
        """Returns a feature's largest activation in each sentence, 0 where it is silent [n]."""
        before = opening(self._lm.tokenizer)
        room = min(MAX_TOKENS, self._lm.context_len or MAX_TOKENS)
        rows = [[*before, *token_ids(self._lm.tokenizer, sentence)][:room] for sentence in sentences]
        longest = max(len(row) for row in rows)
        # What stands behind a sentence does not reach back to it, so any token does for padding.
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        acts, indices = code_of_tokens(self._lm, self._sae, tokens)
        own = (acts * (indices == feature)).sum(-1).cpu().double().numpy()  # [n, T]
        return np.array([own[n, self._first : len(row)].max(initial=0.0) for n, row in enumerate(rows)])


class InputTester:
    """One question about each label: sentences that should activate its feature, and others."""

    name: ClassVar[ScorerName] = "input"
    needs_reading: ClassVar[bool] = False

    def __init__(self, reader: SentenceReader, threshold: Threshold, config: LLMConfig) -> None:
        self._reader = reader
        self._threshold = threshold
        self._config = config
        self._is_published = config.style == "paper_output_centric"
        self.prompt = PAPER_PROMPT if self._is_published else PROMPT
        self._system = prompt_template(self.prompt)

    def num_trials(self, feature: int) -> int:
        """See `TrialScorer.num_trials`."""
        return 1

    def others(self, feature: int) -> set[int]:
        """See `TrialScorer.others`."""
        return set()

    def request(self, label: Label, trial: int, *, attempt: int = 0) -> ChatRequest:
        """See `TrialScorer.request`."""
        num = self._config.input_test.num_sentences
        text = (label.description or label.label or "(none)") if self._is_published else described(label)
        usual = [_USUAL_SENTENCE] * num
        return ChatRequest(
            model=self._config.model,
            system=self._system,
            user=f"Description: {text}\n\nWrite {num} sentences of each kind.",
            schema_name="input_test",
            schema=_SCHEMA,
            temperature=self._config.temperature,
            max_output_tokens=max(self._config.max_output_tokens, 100 + 80 * num) * (2 if attempt else 1),
            attempt=attempt,
            purpose=f"score:{self.name}",
            feature=label.feature,
            usual_answer=json.dumps({"activating": usual, "neutral": usual}),
        )

    def is_usable(self, label: Label, answer: Answer) -> bool:
        """See `TrialScorer.is_usable`."""
        return self._sentences(answer) is not None

    def score(self, label: Label, answers: Sequence[Answer]) -> Score:
        """See `TrialScorer.score`; `accuracy` is the published rule, 1 or 0: larger activations, on average, where they should be."""
        (answer,) = answers
        num, sentences = self._config.input_test.num_sentences, self._sentences(answer)
        score = Score(
            feature=label.feature,
            labeler=label.labeler,
            scorer=self.name,
            judge=self._config.model,
            prompt_version=self.prompt,
            base_rate=0.5,
            num_positive=num,
            num_negative=num,
        )
        if sentences is None:
            reason = answer.reason or "no usable answer"
            return score.model_copy(update={"num_unparsed": 2 * num, "reason": reason})
        should = np.arange(2 * num) < num
        largest = self._reader.largest([*sentences[0], *sentences[1]], label.feature)
        does = largest >= max(self._threshold(label.feature), np.finfo(np.float64).tiny)
        graded = np.where(does, largest, 0.0)
        hits = int((should & does).sum())
        low, high = self._interval(graded, num)
        return score.model_copy(
            update={
                "accuracy": float(largest[should].mean() > largest[~should].mean()),
                "f1": 2 * hits / (num + int(does.sum())),
                "precision": hits / int(does.sum()) if does.any() else None,
                "recall": hits / num,
                "balanced_accuracy": float((should == does).mean()),
                "auprc": graded_precision(graded, should, 0.5),
                "low": low,
                "high": high,
                "pieces": tuple(fingerprint([sentence]) for part in sentences for sentence in part),
                "right": tuple((should == does).tolist()),
            }
        )

    def _interval(self, graded: NDArray[np.float64], num: int) -> tuple[float, float]:
        """Returns the 95 % interval of average precision over resampled sentences of each kind."""
        generator = np.random.default_rng(self._config.seed)
        drawn = generator.integers(num, size=(NUM_BOOTSTRAP, 2, num)) + np.array([0, num])[:, None]
        should = np.arange(2 * num) < num
        found = [graded_precision(graded[places.reshape(-1)], should, 0.5) for places in drawn]
        low, high = np.quantile(found, (0.025, 0.975))
        return float(low), float(high)

    def _sentences(self, answer: Answer) -> tuple[list[str], list[str]] | None:
        """Returns sentences of both kinds; None where there are too few, or one is under both."""
        if answer.reply is None:
            return None
        try:
            values = parse_object(answer.reply.text, needs="activating")
        except UnusableAnswerError:
            return None
        num = self._config.input_test.num_sentences
        kinds: list[list[str]] = []
        for key in ("activating", "neutral"):
            listed = values.get(key)
            lines = (
                [line for item in listed if isinstance(item, str) and (line := item.strip())]
                if isinstance(listed, list)
                else []
            )
            kinds.append(lines[:num])
        return (kinds[0], kinds[1]) if len(kinds[0]) == len(kinds[1]) == num else None
