"""The parts of the revive stage, each done once and kept."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saekit.activations import (
    ActivationStore,
    CacheConfig,
    JoinedStore,
    PairedStore,
    StoreView,
    cache_activations,
)
from saekit.labelling.asking import LabellingModel, ask_in_rounds
from saekit.labelling.chat import Answer, ChatClient
from saekit.labelling.collect import collect_contexts
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.evidence.clamp import clamped_token_change
from saekit.labelling.evidence.effects import EffectKind, TokenEffects, effects_path
from saekit.labelling.evidence.tokenchange import TokenChangeConfig, steering_contexts, steering_strengths, token_change
from saekit.labelling.evidence.vocabproj import vocab_projection
from saekit.labelling.examples import ExampleReader
from saekit.labelling.explain import Explainer
from saekit.labelling.labelconfig import LabelConfig
from saekit.labelling.ledger import LEDGER_NAME, Ledger
from saekit.labelling.lexical import LexicalLabeler
from saekit.labelling.llm import explain_features, join_labels
from saekit.labelling.llmconfig import ExplainerKind, LLMConfig
from saekit.labelling.paper import PaperExplainer
from saekit.labelling.records import LEXICAL, Label
from saekit.labelling.revival.config import ProbeSource, ReviveConfig
from saekit.labelling.revival.firing import find_firings, try_features
from saekit.labelling.revival.merged import MergedContexts
from saekit.labelling.revival.probes import (
    CorpusPieces,
    Probe,
    fill_templates,
    read_probes,
    readable_tokens,
    write_probes,
)
from saekit.labelling.revival.record import Revival
from saekit.labelling.revival.writing import ProbeWriter
from saekit.labelling.runreport import ledger_figures
from saekit.labelling.store import RecordFile
from saekit.labelling.tokenrows import StackedRows, TokenRows
from saekit.labelling.vocabulary import Vocabulary
from saekit.models import LanguageModel, find_unembedding
from saekit.progress import Progress
from saekit.sae import SAE

__all__ = ["REVIVALS_NAME", "RevivalStage"]

PROBES_NAME = "probes.jsonl"
REVIVALS_NAME = "revivals.jsonl"
WOKEN = "Hardly fires on the corpus; its texts are sentences that were made to wake it."
"""Stands before the description of a rule, whose counts include those sentences."""


@dataclass(frozen=True, kw_only=True)
class RevivalStage:
    """Everything the parts of one run share."""

    sae: SAE
    train: StoreView
    lm: LanguageModel
    out: Path
    config: ReviveConfig
    label: LabelConfig
    contexts: FeatureContexts
    """On the training documents."""
    vocabulary: Vocabulary
    features: Sequence[int]
    labels: RecordFile[Label]
    progress: Progress

    def run(self, client: ChatClient | None) -> list[Revival]:
        """Does what is not done yet and returns what became of each feature.

        Args:
            client: needed where there is a labelling model.
        """
        if not self.features:
            self.progress.say(f"revive: every feature fires on more than {self.config.max_firings} training tokens")
            return []
        ledger = None if self.label.llm is None else Ledger(self.out / LEDGER_NAME)
        try:
            model = None
            if self.label.llm is not None and ledger is not None:
                assert client is not None, "revive_features makes one"
                model = LabellingModel(client, ledger, self.label.llm, progress=self.progress)
            probes = self._probes(model)
            view = self._probe_view(probes)
            firings = find_firings(self.sae, view, self.features, probes, progress=self.progress)
            found = try_features(
                self.features,
                probes,
                firings,
                promoted={feature: self.words(feature) for feature in self.features},
                firings_before={feature: int(self.contexts.firing_count[feature]) for feature in self.features},
            )
            self._relabel([one.feature for one in found if one.status == "revived"], view, model)
            found = [self._with_labels(one) for one in found]
            records = RecordFile(self.out / REVIVALS_NAME, Revival)
            records.remove(lambda _: True)
            records.extend(found)
        finally:
            if ledger is not None:
                ledger.close()
        return found

    def counts(self, found: Sequence[Revival]) -> dict[str, object]:
        """Returns the manifest's counts."""
        counts: dict[str, object] = {
            "features": len(found),
            **{status: sum(one.status == status for one in found) for status in ("revived", "silent", "no_probes")},
            "relabelled": sum(bool(one.relabelled) for one in found),
            "probes": sum(one.tried for one in found),
            "probes_fired": sum(one.fired for one in found),
            "control_rate": _share(found, "controls_fired", "controls"),
        }
        if self.label.llm is not None:
            ledger = Ledger(self.out / LEDGER_NAME)
            counts["llm"] = ledger_figures(ledger, self.label.llm)
            ledger.close()
        return counts

    @property
    def sources(self) -> tuple[ProbeSource, ...]:
        """Where sentences come from."""
        if self.config.sources is not None:
            return self.config.sources
        return ("templates", "corpus") if self.label.llm is None else ("templates", "corpus", "llm")

    @functools.cached_property
    def effects(self) -> list[TokenEffects]:
        """What the features promote, by their decoder rows and, where that says nothing or is asked about, by steering."""
        found: list[TokenEffects] = []
        asked: set[ExplainerKind] = set(self.label.llm.explainers) if self.label.llm is not None else set()
        is_projected = self.label.vocab_projection and self.sae.d_out == find_unembedding(self.lm).weight.shape[1]
        if self.label.token_change is not None and (not is_projected or asked & {"tokenchange", "concat"}):
            found += self._kept("tokenchange", self._steered)
        return found + (self._kept("vocabproj", self._projected) if is_projected else [])

    def output_explainer(self, config: LLMConfig) -> Explainer:
        """Returns what labels a feature by its output side alone."""
        kind: ExplainerKind = "vocabproj" if any(e.kind == "vocabproj" for e in self.effects) else "tokenchange"
        return self.explainer(config, kind, self.train.store, self.contexts)

    def explainer(
        self, config: LLMConfig, kind: ExplainerKind, rows: TokenRows, contexts: FeatureContexts
    ) -> Explainer:
        """Returns what labels a feature by evidence of one kind."""
        made = PaperExplainer if config.style == "paper_output_centric" else Explainer
        return made(ExampleReader(rows, self.vocabulary), contexts, config, kind=kind, effects=self._effects_of)

    def _effects_of(self, feature: int) -> list[TokenEffects]:
        return [effects for effects in self.effects if effects.promoted(feature)]

    def words(self, feature: int) -> list[str]:
        """Returns the promoted tokens that sentences are built from, as they stand in a text."""
        return [self.vocabulary.text(token) for token in self._tokens(feature)]

    def _tokens(self, feature: int) -> list[int]:
        # The projection first: it is of this very row, while steering also moves what any push would.
        return readable_tokens(self.effects[::-1], feature, self.vocabulary, num=self.config.num_tokens)

    def _kept(self, kind: EffectKind, measure: Callable[[], TokenEffects]) -> list[TokenEffects]:
        path = effects_path(self.out, kind)
        if not path.exists():
            measure().save(path)
        return [TokenEffects.open(path)]

    def _projected(self) -> TokenEffects:
        num = max(self.label.num_effect_tokens, self.config.num_tokens)
        unembedding = find_unembedding(self.lm)
        return vocab_projection(self.sae, unembedding, features=self.features, num=num, progress=self.progress)

    def _steered(self) -> TokenEffects:
        config = self.label.token_change or TokenChangeConfig()
        tokens = steering_contexts(self.train, config=config)
        if config.match == "clamp":
            up, _ = clamped_token_change(
                self.lm, self.sae, features=self.features, tokens=tokens, config=config, progress=self.progress
            )
            return up
        strengths = steering_strengths(self.contexts, strength=config.strength)
        return token_change(
            self.lm,
            self.sae,
            features=self.features,
            strengths=strengths,
            tokens=tokens,
            config=config,
            progress=self.progress,
        )

    def _probes(self, model: LabellingModel | None) -> list[Probe]:
        path = self.out / PROBES_NAME
        if not path.exists():
            probes = self.local_probes()
            if "llm" in self.sources:
                assert model is not None, "checked by revive_features"
                probes += self._written(model)
            write_probes(path, [*probes, *self._controls(probes)])
        return read_probes(path)

    def local_probes(self) -> list[Probe]:
        """Returns the sentences that no model is asked for."""
        tokens = {feature: own for feature in self.features if (own := self._tokens(feature))}
        probes: list[Probe] = []
        if "templates" in self.sources:
            for feature in tokens:
                probes += fill_templates(feature, self.words(feature), num=self.config.num_templates)
        if "corpus" in self.sources:
            pieces = CorpusPieces(self.train, self.vocabulary, self.config)
            probes += pieces.around(tokens, num=self.config.num_corpus)
        return probes

    def _controls(self, probes: Sequence[Probe]) -> list[Probe]:
        count = [len(self.lm.tokenizer(p.text, add_special_tokens=False)["input_ids"]) for p in probes] or [16]
        lengths = np.clip(count, 2, self.config.probe_tokens - 1).tolist()
        return CorpusPieces(self.train, self.vocabulary, self.config).random(lengths, num=self.config.num_controls)

    def _written(self, model: LabellingModel) -> list[Probe]:
        explainer = self.output_explainer(model.config)
        explain_features(model, explainer, self.features, self.labels, progress=self.progress)
        known = {label.feature: label for label in self.labels.records if label.labeler == explainer.labeler}
        writer = ProbeWriter(model.config, num=self.config.num_written)
        written: dict[int, list[str]] = {}
        asked = [feature for feature in self.features if feature in known and self.words(feature)]
        with self.progress.task("probe sentences", len(asked), "features") as task:

            def take(feature: int, answers: Sequence[Answer], is_last: bool) -> bool:
                sentences = writer.sentences(answers, is_last=is_last)
                if sentences is not None:
                    written[feature] = sentences
                    task.advance(1)
                return sentences is not None

            ask_in_rounds(
                model,
                asked,
                request=lambda feature, attempt: writer.request(known[feature], self.words(feature), attempt=attempt),
                take=take,
                attempts=model.config.attempts,
            )
        return [Probe(text=text, feature=f, source="llm") for f in sorted(written) for text in written[f]]

    def _probe_view(self, probes: Sequence[Probe]) -> StoreView:
        """Returns the sentences' activations at the dictionary's hook points, one sentence a row."""
        store, cached = self.train.store, self.train.store.config
        hook_points = (
            [part.hook_point for part in store.stores] if isinstance(store, JoinedStore) else [store.hook_point]
        )
        tokens = cached["tokens"]
        assert isinstance(tokens, Mapping), "a cache's config has the table"
        length = self.config.probe_tokens
        config = CacheConfig.parse(
            {
                "model": cached["model"],
                "text": {"kind": "files", "paths": [str((self.out / PROBES_NAME).resolve())]},
                "tokens": {
                    "context_len": length,
                    "packing": "per_document",
                    "bos": tokens["bos"],
                    "max_document_tokens": length - 1,
                },
                "hook_points": hook_points,
                "num_tokens": len(probes) * length,
                "dtype": cached["dtype"],
                "massive_factor": cached["massive_factor"],
            }
        )
        folder = self.out / "cache"
        cache_activations(config, folder, lm=self.lm, progress=self.progress)
        parts = [ActivationStore.open(folder, name) for name in hook_points]
        if isinstance(store, PairedStore):
            return PairedStore(*parts).view()
        return (JoinedStore(parts) if len(parts) > 1 else parts[0]).view()

    def _relabel(self, revived: Sequence[int], view: StoreView, model: LabellingModel | None) -> None:
        if not revived:
            return
        probed = collect_contexts(
            self.sae, view, config=self.label.contexts, out=self.out / "contexts", progress=self.progress
        )
        rows = StackedRows(self.train.store, view.store)
        chosen = np.asarray(revived, dtype=np.int64)
        merged = MergedContexts(self.out / "contexts", self.contexts, probed, rows, chosen)
        if "lexical" in self.label.labelers:
            lexical = LexicalLabeler(rows, merged, self.vocabulary)
            done = {label.feature for label in self.labels.records if label.labeler == LEXICAL}
            made = [lexical.label(f, next(iter(self._effects_of(f)), None)) for f in revived if f not in done]
            self.labels.extend(
                label.model_copy(update={"description": f"{WOKEN} {label.description}"}) for label in made
            )
        if model is None:
            return
        # No held-out document makes them fire, so there is nothing to choose among candidates by.
        config = model.config
        for kind in config.explainers:
            if kind != "concat":
                explainer = self.explainer(config, kind, rows, merged)
                explain_features(model, explainer, revived, self.labels, progress=self.progress)
        if "concat" in config.explainers:
            join_labels(revived, config, self.labels)

    def _with_labels(self, one: Revival) -> Revival:
        if one.status != "revived":
            return one
        own = [label for label in self.labels.records if label.feature == one.feature]
        failed = [f"{label.labeler}: {label.reason}" for label in own if label.status == "failed"]
        done = tuple(sorted(label.labeler for label in own if label.status == "done"))
        return one.model_copy(update={"relabelled": done, "reason": "; ".join(failed) or None})


def _share(found: Sequence[Revival], part: str, whole: str) -> float | None:
    total = sum(getattr(one, whole) for one in found)
    return sum(getattr(one, part) for one in found) / total if total else None
