"""Does a model expect a label more after the texts written under its feature than after clean ones? It only reads.

For each prompt, strength and sample the label is read once after the steered text and once after one that was written from the same
prompt with no feature turned. The gain is what steering adds to the label's log-probability, in nats; both means are over texts, so
a label's length and what is likely about it anyway stand on both sides. Per pair, the label is right where the steered text makes it
likelier.

Source: intervention scoring of Paulo et al. 2024 (arXiv 2410.13928): mean surprisal of the explanation after clean texts less that
after steered ones. There an explainer writes the explanation from the tokens that steering raises, and the best of five counts; here
every label is scored, on all texts of its feature.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from saekit.labelling.answers import prompt_template
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.generated.intervention import InterventionJudge
from saekit.labelling.generated.sets import SetPool, described_for_output, fingerprint
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score, ScorerName
from saekit.labelling.scoring.surprisal import text_logprob
from saekit.labelling.scoring.verdicts import wilson

__all__ = ["InterventionReader"]

MARK = "\n\nDescription:\n"
"""What stands between text and label."""


class InterventionReader:
    """How much likelier do steered texts make the label? A label that says nothing of them gains 0 nats."""

    name: ClassVar[ScorerName] = "intervention"
    needs_reading: ClassVar[bool] = True

    def __init__(self, pool: SetPool, config: LLMConfig) -> None:
        self._pool = pool
        self._config = config
        self.prompt = "intervention_gain_v1"
        self._template = prompt_template(self.prompt).strip()

    def in_writing(self) -> InterventionJudge:
        """Returns what asks the same of a judge that does not say how likely a text's tokens are."""
        return InterventionJudge(self._pool, self._config)

    def num_trials(self, feature: int) -> int:
        """See `TrialScorer.num_trials`: the steered texts, then the clean ones."""
        return 2 * self._config.steered.set_size if self._pool.problem(feature, 1) is None else 0

    def others(self, feature: int) -> set[int]:
        """See `TrialScorer.others`."""
        return set()

    def request(self, label: Label, trial: int, *, attempt: int = 0) -> ChatRequest:
        """See `TrialScorer.request`; a text that could not be read is not read again."""
        text = (*self._pool.texts(label.feature), *self._pool.clean)[trial]
        says = " ".join(described_for_output(label, is_published=False).split())
        whole = f"{self._template.replace('{text}', text)}\n{says}"
        return ChatRequest.reading(self._config.model, whole, purpose=f"score:{self.name}", feature=label.feature)

    def is_usable(self, label: Label, answer: Answer) -> bool:
        """See `TrialScorer.is_usable`."""
        return True

    def score(self, label: Label, answers: Sequence[Answer]) -> Score:
        """See `TrialScorer.score`; the interval takes pairs as independent."""
        num = len(answers) // 2
        found = [None if a.reply is None else text_logprob(a.reply, mark=MARK) for a in answers]
        sides = list(zip(found[:num], found[num:], strict=True))
        gains = [None if steered is None or clean is None else steered - clean for steered, clean in sides]
        known = [gain for gain in gains if gain is not None]
        right = tuple(gain is not None and gain > 0 for gain in gains) if known else ()
        low, high = wilson(sum(right), num) if known else (None, None)
        reason = (
            None if known else self._pool.why_unjudged(label.feature, 1, answers, otherwise="no logprobs of the label")
        )
        own = self._pool.texts(label.feature) if num else ()
        return Score(
            feature=label.feature,
            labeler=label.labeler,
            scorer=self.name,
            judge=self._config.model,
            prompt_version=self.prompt,
            accuracy=sum(right) / num if known else None,
            base_rate=0.5,
            gain=float(np.mean(known)) if known else None,
            num_positive=num,
            num_unparsed=num - len(known),
            low=low,
            high=high,
            pieces=tuple(fingerprint(pair) for pair in zip(own, self._pool.clean, strict=False)),
            right=right,
            reason=reason,
        )
