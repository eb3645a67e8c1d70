"""The parts of the label stage, each done once and kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from saekit.activations import StoreView
from saekit.config import Config
from saekit.labelling.chat import ChatClient, LLMConfig
from saekit.labelling.collect import ContextConfig
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.evidence.effects import TokenEffects, effects_path
from saekit.labelling.evidence.tokenchange import (
    TokenChangeConfig,
    steering_contexts,
    steering_strengths,
    token_change,
)
from saekit.labelling.evidence.vocabproj import vocab_projection
from saekit.labelling.examples import ExampleReader
from saekit.labelling.explain import Explainer
from saekit.labelling.ledger import LEDGER_NAME, Ledger, RecordedClient
from saekit.labelling.lexical import LexicalLabeler
from saekit.labelling.llm import EffectsOf, LLMEstimate, Questions, explain_and_judge, least_explained
from saekit.labelling.records import LEXICAL, Label, Score
from saekit.labelling.scoring.detection import Judge
from saekit.labelling.scoring.rule import HeldOut, RuleScoringConfig, score_rules
from saekit.labelling.store import RecordFile
from saekit.labelling.vocabulary import Vocabulary
from saekit.models import LanguageModel, find_unembedding
from saekit.progress import Progress
from saekit.sae import SAE

__all__ = ["LabelConfig", "LabelStage"]

LABELS_PER_WRITE = 256


class LabelConfig(Config):
    """What to label, with which evidence, by whom, and how to score it."""

    labelers: tuple[Literal["lexical", "llm"], ...] = ("lexical",)
    """`lexical` needs nothing; `llm` needs the table `llm`, and is added where that table is given and labelers are not."""
    max_features: int | None = Field(default=None, ge=1)
    """Label so many features, drawn at random; None: all."""
    contexts: ContextConfig = ContextConfig()
    """Of the pass over the training documents."""
    vocab_projection: bool = True
    """Whether decoder rows are read through the unembedding."""
    num_effect_tokens: int = Field(default=20, ge=1)
    """Promoted and suppressed tokens kept by the vocabulary projection."""
    token_change: TokenChangeConfig | None = TokenChangeConfig()
    """Steering; None: none."""
    rule_scoring: RuleScoringConfig = RuleScoringConfig()
    """How label rules are checked on held-out documents."""
    llm: LLMConfig | None = None
    """The explaining and judging language model; None: none."""
    seed: int = Field(default=0, ge=0)
    """Of the features drawn by `max_features`."""

    @model_validator(mode="after")
    def _llm_is_named(self) -> Self:
        if self.llm is not None and "labelers" not in self.model_fields_set:
            # Past the freeze, as the model is not out in the world yet.
            object.__setattr__(self, "labelers", ("lexical", "llm"))
        if self.llm is not None and "llm" not in self.labelers:
            raise ValueError(f"table [llm] with labelers {list(self.labelers)}: add 'llm' to them, or leave [llm] out")
        if "llm" in self.labelers and self.llm is None:
            raise ValueError("labeler 'llm' needs a table [llm] with a model")
        if not self.labelers:
            raise ValueError("needs at least one labeler")
        return self

    def identity(self) -> dict[str, object]:
        """Returns what the result depends on: the config without caps, addresses and sizes of batches."""
        values = self.to_dict()
        for table, keys in _OPERATIONAL.items():
            inner = values.get(table)
            if isinstance(inner, dict):
                values[table] = {key: value for key, value in inner.items() if key not in keys}
        return values


_OPERATIONAL = {
    "contexts": {"batch_tokens"},
    "token_change": {"batch_features"},
    "llm": {
        "api_key_env",
        "base_url",
        "concurrency",
        "max_cost",
        "max_requests",
        "max_retries",
        "max_tokens",
        "max_wait_seconds",
        "price_input",
        "price_output",
        "timeout_seconds",
    },
}
"""Keys that a resumed run may change: what they are does not show in the labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelStage:
    """Everything the parts of one labelling run share."""

    sae: SAE
    train: StoreView
    test: StoreView
    lm: LanguageModel
    out: Path
    config: LabelConfig
    contexts: FeatureContexts
    vocabulary: Vocabulary
    features: list[int]
    labels: RecordFile[Label]
    scores: RecordFile[Score]
    progress: Progress

    def run(self, client: ChatClient | None) -> dict[str, object]:
        """Does what is not done yet and returns the manifest's counts.

        Args:
            client: needed where `llm` is among the labelers.
        """
        counts: dict[str, object] = {"features": len(self.features)}
        lexical, effects = self._evidence()
        if "lexical" in self.config.labelers:
            self._label_lexically(lexical, effects)
        held_out = self._held_out()
        if "llm" in self.config.labelers:
            assert client is not None, "label_features makes one"
            counts["llm"] = self._ask(self._questions(lexical, held_out, effects), client)
        counts["rule_scores"] = self._score_rules(held_out)
        counts["labels"] = self._counted_labels()
        return counts

    def estimate(self) -> LLMEstimate:
        """Returns what the labelling model would be asked; sends nothing."""
        lexical, effects = self._evidence()
        return self._questions(lexical, self._held_out(), effects).estimate()

    def _evidence(self) -> tuple[LexicalLabeler, EffectsOf]:
        projected = self._projected()
        lexical = LexicalLabeler(self.train.store, self.contexts, self.vocabulary)
        changed = self._changed(lexical)

        def effects(feature: int) -> TokenEffects | None:
            """Steering where it was paid for, the projection elsewhere."""
            sources = (changed, projected)
            return next((found for found in sources if found is not None and found.promoted(feature)), None)

        return lexical, effects

    def _held_out(self) -> HeldOut:
        return HeldOut(self.sae, self.test, self.vocabulary, config=self.config.rule_scoring, progress=self.progress)

    def _projected(self) -> TokenEffects | None:
        if not self.config.vocab_projection:
            return None
        path = effects_path(self.out, "vocabproj")
        if not path.exists():
            unembedding = find_unembedding(self.lm)
            width = unembedding.weight.shape[1]
            if self.sae.d_out != width:
                self.progress.say(
                    f"no vocabulary projection: decoder rows are {self.sae.d_out} wide, the residual stream is {width}"
                )
                return None
            effects = vocab_projection(
                self.sae,
                unembedding,
                features=self.features,
                num=self.config.num_effect_tokens,
                progress=self.progress,
            )
            effects.save(path)
        return TokenEffects.open(path)

    def _changed(self, lexical: LexicalLabeler) -> TokenEffects | None:
        asked = self.config.token_change
        if asked is None:
            return None
        path = effects_path(self.out, "tokenchange")
        if not path.exists():
            steered = asked.features if asked.features is not None else self._clearest(lexical, asked.num_features)
            effects = token_change(
                self.lm,
                self.sae,
                features=steered,
                strengths=steering_strengths(self.contexts, strength=asked.strength),
                tokens=steering_contexts(self.train, config=asked),
                config=asked,
                progress=self.progress,
            )
            effects.save(path)
        return TokenEffects.open(path)

    def _clearest(self, lexical: LexicalLabeler, num: int) -> list[int]:
        """Returns the `num` labelled features whose rules predict training firings best."""
        order = np.argsort(-lexical.confidence[self.features], kind="stable")[:num]
        return sorted(self.features[int(place)] for place in order)

    def _label_lexically(self, lexical: LexicalLabeler, effects: EffectsOf) -> None:
        done = {label.feature for label in self.labels.records if label.labeler == LEXICAL}
        left = [feature for feature in self.features if feature not in done]
        with self.progress.task("lexical labels", len(self.features), "labels", done=len(done)) as task:
            for start in range(0, len(left), LABELS_PER_WRITE):
                chunk = left[start : start + LABELS_PER_WRITE]
                self.labels.extend(lexical.label(feature, effects(feature)) for feature in chunk)
                task.advance(len(chunk))

    def _questions(self, lexical: LexicalLabeler, held_out: HeldOut, effects: EffectsOf) -> Questions:
        config = self.config.llm
        assert config is not None, "checked by LabelConfig"
        firing = {f: float(lexical.confidence[f]) for f in self.features if self.contexts.firing_count[f] > 0}
        return Questions(
            explainer=Explainer(ExampleReader(self.train.store, self.vocabulary), self.contexts, config),
            judge=Judge(held_out, config) if config.num_judged else None,
            effects=effects,
            features=least_explained(firing, num=config.max_features),
            config=config,
        )

    def _ask(self, questions: Questions, client: ChatClient) -> dict[str, object]:
        config = questions.config
        self.progress.say(f"labelling model {config.model!r}: {questions.estimate()}")
        ledger = Ledger(self.out / LEDGER_NAME)
        try:
            explain_and_judge(
                RecordedClient(client, ledger, config),
                questions,
                labels=self.labels,
                scores=self.scores,
                progress=self.progress,
            )
            input_tokens, output_tokens = ledger.num_tokens
            return {
                "model": config.model,
                "features": len(questions.features),
                "requests_sent": ledger.num_sent,
                "answers": ledger.num_answers,
                "input_tokens": input_tokens,
                "output_tokens": output_tokens,
                "cost": config.cost(input_tokens, output_tokens),
            }
        finally:
            ledger.close()

    def _score_rules(self, held_out: HeldOut) -> dict[str, object]:
        result = score_rules(held_out, self.labels.records, config=self.config.rule_scoring, progress=self.progress)
        done = {(score.feature, score.labeler) for score in self.scores.records if score.scorer == "rule"}
        self.scores.extend(score for score in result.scores if (score.feature, score.labeler) not in done)
        return dict(result.controls)

    def _counted_labels(self) -> dict[str, object]:
        counts: dict[str, object] = {}
        for labeler in sorted({label.labeler for label in self.labels.records}):
            own = [label for label in self.labels.records if label.labeler == labeler]
            counts[labeler] = {
                "done": sum(label.status == "done" for label in own),
                "failed": sum(label.status == "failed" for label in own),
            }
        return counts
