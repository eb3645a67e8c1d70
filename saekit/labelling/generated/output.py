"""Can a judge who reads only the label tell the texts written while its feature was turned from those of other features?

Source: Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions", section 3.2.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import JsonValue

from saekit.labelling.answers import UnusableAnswerError, parse_object, prompt_template, whole_number
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.generated.sets import SetPool, described_for_output, fingerprint
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score, ScorerName
from saekit.labelling.scoring.verdicts import wilson

__all__ = ["OutputJudge"]

PROMPT = "output_test_v1"
PAPER_PROMPT = "paper_output_test_v1"
_NUMBER: dict[str, JsonValue] = {"type": "integer"}
_SCHEMA: dict[str, JsonValue] = {
    "type": "object",
    "properties": {"set": _NUMBER},
    "required": ["set"],
    "additionalProperties": False,
}
_PAPER_SCHEMA: dict[str, JsonValue] = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "set": _NUMBER},
    "required": ["reason", "set"],
    "additionalProperties": False,
}
_PAPER_ANSWER = (
    '{"reason": "Several texts of this set turn to rivers, bridges and valleys, as the description says, and the other '
    'two speak of something else.", "set": 2}'
)


class OutputJudge:
    """Which set of texts fits the label? Chance is 1 in `num_sets`."""

    name: ClassVar[ScorerName] = "output"
    needs_reading: ClassVar[bool] = False

    def __init__(self, pool: SetPool, config: LLMConfig) -> None:
        self._pool = pool
        self._config = config
        self._is_published = config.style == "paper_output_centric"
        self.prompt = PAPER_PROMPT if self._is_published else PROMPT
        self._system = prompt_template(self.prompt)

    def num_trials(self, feature: int) -> int:
        """See `TrialScorer.num_trials`."""
        steered = self._config.steered
        return steered.num_trials if self._pool.problem(feature, steered.num_sets) is None else 0

    def others(self, feature: int) -> set[int]:
        """See `TrialScorer.others`."""
        num = self._config.steered.num_sets - 1
        return {f for trial in range(self.num_trials(feature)) for f in self._pool.others(feature, trial, num)}

    def request(self, label: Label, trial: int, *, attempt: int = 0) -> ChatRequest:
        """See `TrialScorer.request`."""
        described = described_for_output(label, is_published=self._is_published)
        return ChatRequest(
            model=self._config.model,
            system=self._system,
            user=f"Description: {described}\n\n{self._shown(label.feature, trial)}",
            schema_name="output_test",
            schema=_PAPER_SCHEMA if self._is_published else _SCHEMA,
            temperature=self._config.temperature,
            max_output_tokens=self._config.max_output_tokens * (2 if attempt else 1),
            attempt=attempt,
            purpose=f"score:{self.name}",
            feature=label.feature,
            usual_answer=_PAPER_ANSWER if self._is_published else '{"set": 2}',
        )

    def is_usable(self, label: Label, answer: Answer) -> bool:
        """See `TrialScorer.is_usable`."""
        return self._chosen(answer) is not None

    def score(self, label: Label, answers: Sequence[Answer]) -> Score:
        """See `TrialScorer.score`."""
        num_sets = self._config.steered.num_sets
        chosen = [self._chosen(answer) for answer in answers]
        right = tuple(number == self._pool.place(label.feature, trial, num_sets) for trial, number in enumerate(chosen))
        is_judged = any(number is not None for number in chosen)
        low, high = wilson(sum(right), len(right)) if is_judged else (None, None)
        reason = None if is_judged else self._pool.why_unjudged(label.feature, num_sets, answers)
        return Score(
            feature=label.feature,
            labeler=label.labeler,
            scorer=self.name,
            judge=self._config.model,
            prompt_version=self.prompt,
            accuracy=sum(right) / len(right) if is_judged else None,
            base_rate=1 / num_sets,
            num_positive=len(answers),
            num_unparsed=sum(number is None for number in chosen),
            low=low,
            high=high,
            pieces=tuple(fingerprint([self._shown(label.feature, trial)]) for trial in range(len(answers))),
            right=right if is_judged else (),
            reason=reason,
        )

    def _shown(self, feature: int, trial: int) -> str:
        num_sets = self._config.steered.num_sets
        order = self._pool.others(feature, trial, num_sets - 1)
        order.insert(self._pool.place(feature, trial, num_sets), feature)
        return "\n\n".join(
            f"Set {number}\n" + "\n".join(f"- {text}" for text in self._pool.texts(one))
            for number, one in enumerate(order, start=1)
        )

    def _chosen(self, answer: Answer) -> int | None:
        """Returns the place of the set that an answer names, from 0; None where it names none of them."""
        if answer.reply is None:
            return None
        try:
            said = whole_number(parse_object(answer.reply.text, needs="set")["set"])
        except UnusableAnswerError:
            return None
        return said - 1 if said is not None and 1 <= said <= self._config.steered.num_sets else None
