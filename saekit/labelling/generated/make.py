"""The scorers that ask about generated texts, for one dictionary; writes the texts that they need."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saekit.labelling.evidence.tokenchange import TokenChangeConfig, start_strengths, steering_contexts
from saekit.labelling.generated.inputtest import InputTester, SentenceReader
from saekit.labelling.generated.intervention import InterventionJudge
from saekit.labelling.generated.interventiongain import InterventionReader
from saekit.labelling.generated.output import OutputJudge
from saekit.labelling.generated.sets import SetPool
from saekit.labelling.generated.texts import SteeredTexts, Steerer, steered_texts
from saekit.labelling.generated.trials import TrialQuestions, TrialScorer
from saekit.labelling.llm import Questions
from saekit.labelling.llmconfig import LLMConfig, LLMScorer
from saekit.labelling.scoring.rule import HeldOut
from saekit.models import LanguageModel
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE

__all__ = ["GeneratedTests"]

MIN_POOL = 20
"""Features with steered texts, so that a set has company that is new in every trial; others are drawn if too few are judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedTests:
    """What the scorers read beside labels."""

    lm: LanguageModel
    sae: SAE
    held_out: HeldOut
    """Where strengths are matched, so that scores rest on the same documents with and without the labellers' own."""
    out: Path

    def questions(
        self, questions: Questions, change: TokenChangeConfig | None, *, progress: Progress = NO_PROGRESS
    ) -> TrialQuestions:
        """Returns what is asked about the labels of other questions; the texts are written where they are not there yet.

        Args:
            change: says on what texts strengths are matched; None: as it is by default.

        Raises:
            ConfigError: the dictionary cannot be steered.
        """
        config, pool = questions.config, SetPool({}, seed=questions.config.seed)
        makers: dict[LLMScorer, Callable[[], TrialScorer]] = {"input": lambda: self._input(config)}
        if {"output", "intervention"} & set(config.scorers) and config.num_judged and questions.judged:
            pool = SetPool(
                self._sets(questions.features, config, change or TokenChangeConfig(), progress), seed=config.seed
            )
            makers |= {
                "output": lambda: OutputJudge(pool, config),
                "intervention": lambda: (
                    InterventionReader(pool, config) if _reads(config) else InterventionJudge(pool, config)
                ),
            }
        return TrialQuestions(
            scorers=[makers[name]() for name in dict.fromkeys(config.scorers) if name in makers and config.num_judged],
            controls=questions.controls,
            features=questions.features,
            judged=questions.judged,
            config=config,
            setup=self._setup(config, pool),
        )

    def _setup(self, config: LLMConfig, pool: SetPool) -> str:
        asked = config.steered.model_dump(mode="json", exclude={"batch_rows"}), config.input_test.to_dict()
        values = [self.held_out.fingerprint, *asked, pool.features, config.seed, config.temperature]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def _sets(
        self, features: Sequence[int], config: LLMConfig, change: TokenChangeConfig, progress: Progress
    ) -> Mapping[int, SteeredTexts]:
        largest = self.held_out.largest()
        live = np.flatnonzero(largest > 0)
        spare = np.random.default_rng(config.seed).permutation(np.setdiff1d(live, features)).tolist()
        wanted = [*features, *spare[: max(0, MIN_POOL - len(features))]]
        steerer = Steerer(
            self.lm,
            self.sae,
            config.steered,
            contexts=steering_contexts(self.held_out.view, config=change) if config.steered.match == "kl" else None,
            start=start_strengths(largest),
            seed=config.seed,
        )
        with_clean = "intervention" in config.scorers and _reads(config)
        return steered_texts(steerer, wanted, out=self.out, with_clean=with_clean, progress=progress)

    def _input(self, config: LLMConfig) -> InputTester:
        is_published = config.style == "paper_output_centric"

        def threshold(feature: int) -> float:
            acts = self.held_out.activations(feature)
            # As published, any activation counts.
            return 0.0 if is_published or not len(acts) else float(np.quantile(acts, config.input_test.quantile))

        return InputTester(SentenceReader(self.lm, self.sae, counts_opening=is_published), threshold, config)


def _reads(config: LLMConfig) -> bool:
    return config.intervention_form == "gain"
