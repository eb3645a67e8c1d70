"""The scorers that ask about generated texts, for one dictionary; writes the texts that they need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saekit.activations import StoreView
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.evidence.tokenchange import TokenChangeConfig, steering_contexts, steering_strengths
from saekit.labelling.generated.inputtest import InputTester, SentenceReader
from saekit.labelling.generated.intervention import InterventionJudge
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
    contexts: FeatureContexts
    held_out: HeldOut
    train: StoreView
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
        config = questions.config
        makers: dict[LLMScorer, Callable[[], TrialScorer]] = {"input": lambda: self._input(config)}
        if {"output", "intervention"} & set(config.scorers) and config.num_judged and questions.judged:
            sets = self._sets(questions.features, config, change or TokenChangeConfig(), progress)
            pool = SetPool(sets, seed=config.seed)
            makers |= {
                "output": lambda: OutputJudge(pool, config),
                "intervention": lambda: InterventionJudge(pool, config),
            }
        return TrialQuestions(
            scorers=[makers[name]() for name in dict.fromkeys(config.scorers) if name in makers and config.num_judged],
            controls=questions.controls,
            features=questions.features,
            judged=questions.judged,
            config=config,
        )

    def _sets(
        self, features: Sequence[int], config: LLMConfig, change: TokenChangeConfig, progress: Progress
    ) -> Mapping[int, SteeredTexts]:
        live = np.flatnonzero(self.contexts.firing_count > 0)
        spare = np.random.default_rng(config.seed).permutation(np.setdiff1d(live, features)).tolist()
        wanted = [*features, *spare[: max(0, MIN_POOL - len(features))]]
        steerer = Steerer(
            self.lm,
            self.sae,
            config.steered,
            contexts=steering_contexts(self.train, config=change) if config.steered.match == "kl" else None,
            start=steering_strengths(self.contexts, strength=1.0),
            seed=config.seed,
        )
        return steered_texts(steerer, wanted, out=self.out, progress=progress)

    def _input(self, config: LLMConfig) -> InputTester:
        is_published = config.style == "paper_output_centric"

        def threshold(feature: int) -> float:
            acts = self.held_out.activations(feature)
            # As published, any activation counts.
            return 0.0 if is_published or not len(acts) else float(np.quantile(acts, config.input_test.quantile))

        return InputTester(SentenceReader(self.lm, self.sae, counts_opening=is_published), threshold, config)
