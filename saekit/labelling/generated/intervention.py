"""Does a label tell a judge what turning its feature does to a single text, in the form of a choice?

For each prompt and strength the judge sees a text written under the feature and one written under another feature from the same
prompt, and names the first; all pairs of a question have the same other feature, so that what either side's texts have in common
says no more of the one than of the other.

Source: intervention scoring of Paulo et al. 2024 (arXiv 2410.13928), for judges that do not say how likely they find a label; see
`InterventionReader` for the published form. There clean texts differ from steered ones in more than the label speaks of, which here
is the same on both sides.
"""

import json
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from saekit.labelling.answers import prompt_template
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.generated.sets import SetPool, described_for_output, fingerprint
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score, ScorerName
from saekit.labelling.scoring.detection import answers_schema
from saekit.labelling.scoring.verdicts import listed_answers, wilson

__all__ = ["InterventionJudge"]

PROMPT = "intervention_v1"
LETTERS = ("a", "b")


class InterventionJudge:
    """Which text of a pair was written under the feature? Chance is 1 in 2."""

    name: ClassVar[ScorerName] = "intervention"
    needs_reading: ClassVar[bool] = False

    def __init__(self, pool: SetPool, config: LLMConfig) -> None:
        self._pool = pool
        self._config = config
        self.prompt = PROMPT
        self._system = prompt_template(PROMPT)

    def num_trials(self, feature: int) -> int:
        """See `TrialScorer.num_trials`."""
        return self._config.steered.num_trials if self._pool.problem(feature, 2) is None else 0

    def others(self, feature: int) -> set[int]:
        """See `TrialScorer.others`."""
        return {self._other(feature, trial) for trial in range(self.num_trials(feature))}

    def request(self, label: Label, trial: int, *, attempt: int = 0) -> ChatRequest:
        """See `TrialScorer.request`."""
        described = described_for_output(label, is_published=False)
        num = self._config.steered.set_size
        return ChatRequest(
            model=self._config.model,
            system=self._system,
            user=f"Description: {described}\n\nPairs:\n{self._shown(label.feature, trial)}",
            schema_name="intervention",
            schema=answers_schema("text", {"type": "string", "enum": list(LETTERS)}),
            temperature=self._config.temperature,
            max_output_tokens=max(self._config.max_output_tokens, 40 + 20 * num) * (2 if attempt else 1),
            attempt=attempt,
            purpose=f"score:{self.name}",
            feature=label.feature,
            usual_answer=json.dumps({"answers": [{"id": n + 1, "text": "a"} for n in range(num)]}),
        )

    def is_usable(self, label: Label, answer: Answer) -> bool:
        """See `TrialScorer.is_usable`."""
        return len(self._named(answer)) == self._config.steered.set_size

    def score(self, label: Label, answers: Sequence[Answer]) -> Score:
        """See `TrialScorer.score`; the interval takes pairs as independent."""
        right: list[bool] = []
        num_unparsed = 0
        for trial, answer in enumerate(answers):
            places, named = self._places(label.feature, trial), self._named(answer)
            num_unparsed += len(places) - len(named)
            right += [named.get(number) == place for number, place in enumerate(places)]
        is_judged = num_unparsed < len(right)
        low, high = wilson(sum(right), len(right)) if is_judged else (None, None)
        reason = None if is_judged else self._pool.why_unjudged(label.feature, 2, answers)
        shown = [self._shown(label.feature, trial) for trial in range(len(answers))]
        return Score(
            feature=label.feature,
            labeler=label.labeler,
            scorer=self.name,
            judge=self._config.model,
            prompt_version=self.prompt,
            accuracy=sum(right) / len(right) if is_judged else None,
            base_rate=1 / len(LETTERS),
            num_positive=len(right),
            num_unparsed=num_unparsed,
            low=low,
            high=high,
            pieces=tuple(fingerprint([text, str(n)]) for text in shown for n in range(self._config.steered.set_size)),
            right=tuple(right) if is_judged else (),
            reason=reason,
        )

    def _other(self, feature: int, trial: int) -> int:
        return self._pool.others(feature, trial, 1)[0]

    def _places(self, feature: int, trial: int) -> list[int]:
        """Returns where the feature's own text stands in each pair: first in half of them, in random order."""
        num = self._config.steered.set_size
        generator = np.random.default_rng((self._config.seed, feature, trial))
        return [int(place) % 2 for place in generator.permutation(num)]

    def _shown(self, feature: int, trial: int) -> str:
        lines = []
        own, other = self._pool.texts(feature), self._pool.texts(self._other(feature, trial))
        for number, place in enumerate(self._places(feature, trial)):
            pair = (own[number], other[number])
            lines += [str(number + 1), f"(a) {pair[place]}", f"(b) {pair[1 - place]}"]
        return "\n".join(lines)

    def _named(self, answer: Answer) -> dict[int, int]:
        """Returns pair (from 0) -> place of the named text; pairs with none, or two different ones, are left out."""
        if answer.reply is None:
            return {}
        found: dict[int, int] = {}
        listed = listed_answers(answer.reply.text, self._config.steered.set_size, key="text")
        for pair, values in listed.items():
            letters = {str(value).strip(" ().").casefold() for value in values}
            if len(letters) == 1 and (letter := letters.pop()) in LETTERS:
                found[pair] = LETTERS.index(letter)
        return found
