"""The label stage: contexts, evidence, labels and scores of one dictionary in one folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from saekit.activations import StoreView
from saekit.config import Config
from saekit.errors import DataError
from saekit.labelling.chat import ChatClient, LLMConfig
from saekit.labelling.collect import ContextConfig, collect_contexts, sae_fingerprint, view_fingerprint
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
from saekit.labelling.lexical import LEXICAL, LexicalLabeler
from saekit.labelling.llm import estimate_requests, explain_and_judge, least_explained
from saekit.labelling.records import Label, Score
from saekit.labelling.scoring.detection import Judge
from saekit.labelling.scoring.rule import HeldOut, RuleScoringConfig, score_rules
from saekit.labelling.store import LABELS_NAME, SCORES_NAME, RecordFile
from saekit.labelling.vocabulary import Vocabulary
from saekit.manifest import begin_stage, finish_stage
from saekit.models import LanguageModel, find_unembedding
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE

__all__ = ["CONTEXTS_FOLDER", "LabelConfig", "label_features"]

CONTEXTS_FOLDER = "contexts"
LABELS_PER_WRITE = 256


class LabelConfig(Config):
    """What to label, with which evidence, by whom, and how to score it."""

    labelers: tuple[Literal["lexical", "llm"], ...] = ("lexical",)
    """`lexical` needs nothing; `llm` needs the table `llm`."""
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
    seed: int = 0
    """Of the features drawn by `max_features`."""

    @model_validator(mode="after")
    def _llm_is_named(self) -> Self:
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


def label_features(
    sae: SAE,
    train: StoreView,
    *,
    test: StoreView,
    lm: LanguageModel,
    out: str | Path,
    config: LabelConfig | None = None,
    client: ChatClient | None = None,
    progress: Progress = NO_PROGRESS,
) -> Path:
    """Labels and scores a dictionary's features; run again after a stop, it goes on where it was.

    Args:
        sae: the dictionary; `hook_point` is needed for `token_change`.
        train: documents that labels may be made from.
        test: documents that labels are scored on; shares none with `train`.
        lm: the model whose activations the views hold.
        out: folder for contexts/, effects-*.safetensors, labels.jsonl, scores.jsonl, ledger.sqlite and the manifest.
        config: None: defaults.
        client: talks to the labelling model; None: the one that `config.llm` describes.
        progress: told of every part.

    Returns:
        `out`.

    Raises:
        ConfigError: `out` was written with another config or other inputs.
        DataError: the views share a document, or are of another width than the dictionary.
        LabelerError: the server cannot be used, or a cap is reached; what was paid for is kept.
    """
    config = config or LabelConfig()
    out = Path(out)
    shared = np.intersect1d(train.documents, test.documents)
    if len(shared):
        raise DataError(
            f"labels: document {int(shared[0])} is in the training and in the held-out view, needs views that share none"
        )
    inputs = {
        "cache": train.store.sha256,
        "sae": sae_fingerprint(sae),
        "train": view_fingerprint(train),
        "test": view_fingerprint(test),
    }
    if begin_stage(out, "label", config.identity(), inputs) == "complete":
        return out
    contexts = collect_contexts(sae, train, config=config.contexts, out=out / CONTEXTS_FOLDER, progress=progress)
    stage = _Stage(
        sae=sae,
        train=train,
        test=test,
        lm=lm,
        out=out,
        config=config,
        contexts=contexts,
        vocabulary=Vocabulary(lm.tokenizer),
        features=_chosen_features(sae.cfg.d_sae, config),
        labels=RecordFile(out / LABELS_NAME, Label),
        scores=RecordFile(out / SCORES_NAME, Score),
        progress=progress,
    )
    counts = stage.run(client)
    finish_stage(out, counts)
    return out


def _chosen_features(num_features: int, config: LabelConfig) -> list[int]:
    if config.max_features is None or config.max_features >= num_features:
        return list(range(num_features))
    drawn = np.random.default_rng(config.seed).permutation(num_features)[: config.max_features]
    return sorted(int(feature) for feature in drawn)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stage:
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
        """Does what is not done yet and returns the manifest's counts."""
        counts: dict[str, object] = {"features": len(self.features)}
        projected = self._projected()
        lexical = LexicalLabeler(self.train.store, self.contexts, self.vocabulary)
        changed = self._changed(lexical)
        if "lexical" in self.config.labelers:
            self._label_lexically(lexical, projected, changed)
        held_out = HeldOut(
            self.sae, self.test, self.vocabulary, config=self.config.rule_scoring, progress=self.progress
        )
        if "llm" in self.config.labelers:
            counts["llm"] = self._ask(lexical, held_out, (changed, projected), client)
        counts["rule_scores"] = self._score_rules(held_out)
        counts["labels"] = self._counted_labels()
        return counts

    def _projected(self) -> TokenEffects | None:
        if not self.config.vocab_projection:
            return None
        path = effects_path(self.out, "vocabproj")
        if not path.exists():
            effects = vocab_projection(
                self.sae,
                find_unembedding(self.lm),
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

    def _label_lexically(
        self, lexical: LexicalLabeler, projected: TokenEffects | None, changed: TokenEffects | None
    ) -> None:
        done = {label.feature for label in self.labels.records if label.labeler == LEXICAL}
        left = [feature for feature in self.features if feature not in done]
        with self.progress.task("lexical labels", len(self.features), "labels", done=len(done)) as task:
            for start in range(0, len(left), LABELS_PER_WRITE):
                chunk = left[start : start + LABELS_PER_WRITE]
                self.labels.extend(lexical.label(feature, effects_of(feature, changed, projected)) for feature in chunk)
                task.advance(len(chunk))

    def _ask(
        self,
        lexical: LexicalLabeler,
        held_out: HeldOut,
        effects: tuple[TokenEffects | None, ...],
        client: ChatClient | None,
    ) -> dict[str, object]:
        config = self.config.llm
        assert config is not None, "checked by LabelConfig"
        firing = {f: float(lexical.confidence[f]) for f in self.features if self.contexts.firing_count[f] > 0}
        asked = least_explained(firing, num=config.max_features)
        explainer = Explainer(ExampleReader(self.train.store, self.vocabulary), self.contexts, config)
        judge = Judge(held_out, config) if config.num_judged else None

        def effects_on(feature: int) -> TokenEffects | None:
            return effects_of(feature, *effects)

        estimate = estimate_requests(explainer, judge, effects=effects_on, features=asked, config=config)
        self.progress.say(f"labelling model {config.model!r}: {estimate}")
        ledger = Ledger(self.out / LEDGER_NAME)
        try:
            recorded = RecordedClient(client if client is not None else _openai_client(config), ledger, config)
            explain_and_judge(
                recorded,
                explainer,
                judge,
                effects=effects_on,
                features=asked,
                config=config,
                files=(self.labels, self.scores),
                progress=self.progress,
            )
            input_tokens, output_tokens = ledger.num_tokens
            return {
                "model": config.model,
                "features": len(asked),
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


def _openai_client(config: LLMConfig) -> ChatClient:
    # Here and not above: the extra it needs is only asked for by those who use it.
    from saekit.labelling.client import OpenAIChat

    return OpenAIChat(config)


def effects_of(feature: int, *sources: TokenEffects | None) -> TokenEffects | None:
    """Returns the first of several effects that has measured a feature."""
    return next((effects for effects in sources if effects is not None and effects.promoted(feature)), None)
