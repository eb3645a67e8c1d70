"""The parts of the label stage, each done once and kept."""

import functools
import operator
from dataclasses import dataclass
from pathlib import Path

from saekit.activations import StoreView
from saekit.labelling.asking import LabellingModel
from saekit.labelling.candidates import choose_among
from saekit.labelling.chat import ChatClient
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.embed import EmbeddingQuestions, server_config
from saekit.labelling.estimate import LLMEstimate, estimate_requests, token_counter
from saekit.labelling.evidence.gathering import EffectsGathering
from saekit.labelling.evidence.sidescores import SIDE_SCORES_NAME, SideScores
from saekit.labelling.evidence.wording import EffectsOf
from saekit.labelling.examples import ExampleReader
from saekit.labelling.explain import Explainer, llm_labeler
from saekit.labelling.generated.make import GeneratedTests
from saekit.labelling.generated.trials import TrialQuestions
from saekit.labelling.labelconfig import LabelConfig
from saekit.labelling.ledger import LEDGER_NAME, Ledger
from saekit.labelling.lexical import LexicalLabeler
from saekit.labelling.llm import Questions, explain_and_judge, least_explained, stand_in
from saekit.labelling.paper import PaperExplainer
from saekit.labelling.records import LEXICAL, Label, Score
from saekit.labelling.runreport import (
    LABEL_REPORT_NAME,
    LabelerReport,
    counted_labels,
    ledger_figures,
    report_labeler,
    write_report,
)
from saekit.labelling.scoring.controls import Controls
from saekit.labelling.scoring.embedding import Embed, EmbeddingConfig, EmbeddingScorer
from saekit.labelling.scoring.pieces import PieceTable
from saekit.labelling.scoring.rule import HeldOut, score_rules
from saekit.labelling.scoring.scorers import make_scorers, scoring_setup, siblings_of
from saekit.labelling.scoring.summary import summarise_scores, summary_lines
from saekit.labelling.store import RecordFile
from saekit.labelling.table import LABEL_TABLE_NAME, write_label_table
from saekit.labelling.vocabulary import Vocabulary
from saekit.models import LanguageModel, load_tokenizer
from saekit.progress import Progress
from saekit.sae import SAE

__all__ = ["LabelStage"]

LABELS_PER_WRITE = 256


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
    controls: RecordFile[Score]
    progress: Progress

    def run(
        self, client: ChatClient | None, *, embed: Embed | None = None, embedder: ChatClient | None = None
    ) -> dict[str, object]:
        """Does what is not done yet, writes table and report, and returns the manifest's counts.

        Args:
            client: needed where `llm` is among the labelers.
            embed: turns texts into vectors; one of `embed` and `embedder` is needed where the config has an embedding.
            embedder: asks a server for vectors.
        """
        counts: dict[str, object] = {"features": len(self.features)}
        lexical, effects = self._evidence()
        if "lexical" in self.config.labelers:
            self._label_lexically(lexical, effects)
        held_out = self._held_out()
        questions = self._questions(lexical, held_out, effects) if "llm" in self.config.labelers else None
        ledger = Ledger(self.out / LEDGER_NAME) if questions is not None or embedder is not None else None
        try:
            if questions is not None:
                assert client is not None, "label_features makes one"
                assert ledger is not None, "opened for the questions"
                self._ask(questions, client, ledger, generated=self._generated(questions, held_out))
            if self.config.embedding is not None:
                self._embed(self._embedding(held_out, self.config.embedding), ledger, embed=embed, embedder=embedder)
        finally:
            # Also of a run that stops here, so that it can be seen what is missing.
            self._write_outputs(questions, ledger)
            if ledger is not None:
                figures = self._figures(ledger)
                ledger.close()
        if ledger is not None:
            counts["llm"] = figures if questions is None else {"features": len(questions.features), **figures}
        counts["rule_scores"] = self._score_rules(held_out)
        counts["labels"] = counted_labels(self.labels.records)
        return counts

    def estimate(self) -> LLMEstimate:
        """Returns what labelling model and embedding would be asked; sends nothing."""
        lexical, effects = self._evidence()
        held_out = self._held_out()
        path = self.out / LEDGER_NAME
        ledger = Ledger(path) if path.exists() else None
        try:
            parts: list[LLMEstimate] = []
            questions = self._questions(lexical, held_out, effects) if self.config.llm is not None else None
            if questions is not None:
                parts.append(self._estimated(questions, ledger, generated=self._generated(questions, held_out)))
            if self.config.embedding is not None:
                config = server_config(self.config.embedding, self.config.llm)
                requests = self._embedding(held_out, self.config.embedding).requests(self._labels_to_come(questions))
                parts.append(estimate_requests(requests, config, count=token_counter(self.lm.tokenizer), ledger=ledger))
            return functools.reduce(operator.add, parts)
        finally:
            if ledger is not None:
                ledger.close()

    def _generated(self, questions: Questions, held_out: HeldOut) -> TrialQuestions:
        tests = GeneratedTests(lm=self.lm, sae=self.sae, held_out=held_out, out=self.out)
        return tests.questions(questions, self.config.token_change, progress=self.progress)

    def _estimated(self, questions: Questions, ledger: Ledger | None, *, generated: TrialQuestions) -> LLMEstimate:
        config = questions.config
        name = config.tokenizer or (config.model if config.backend == "local" else None)
        count = token_counter(self.lm.tokenizer if name is None else load_tokenizer(name))
        asked = [*questions.requests(self.labels.records), *generated.requests(self._labels_to_come(questions))]
        return estimate_requests(asked, config, count=count, ledger=ledger)

    def _labels_to_come(self, questions: Questions | None) -> list[Label]:
        """Returns the labels that there are, and stand-ins of the usual length for the others."""
        known = {(label.feature, label.labeler) for label in self.labels.records}
        asked = [(f, LEXICAL) for f in self.features] if "lexical" in self.config.labelers else []
        if questions is not None:
            asked += [(feature, labeler) for labeler in questions.labelers for feature in questions.features]
        return [*self.labels.records, *(stand_in(*key) for key in asked if key not in known)]

    def _figures(self, ledger: Ledger) -> dict[str, object]:
        """Returns what the ledger says, under the labelling model's name if there is one."""
        config = self.config.llm
        if config is None:
            assert self.config.embedding is not None, "there is a ledger because something asks"
            config = server_config(self.config.embedding, None)
        return ledger_figures(ledger, config)

    def _embedding(self, held_out: HeldOut, config: EmbeddingConfig) -> EmbeddingQuestions:
        return EmbeddingQuestions(
            scorer=EmbeddingScorer(PieceTable(held_out), config),
            controls=Controls(held_out, seed=config.seed),
            num_controlled=config.num_controlled,
        )

    def _embed(
        self,
        questions: EmbeddingQuestions,
        ledger: Ledger | None,
        *,
        embed: Embed | None,
        embedder: ChatClient | None,
    ) -> None:
        source: Embed | LabellingModel | None = embed
        if embedder is not None:
            assert self.config.embedding is not None, "it is what is asked for"
            assert ledger is not None, "opened for the embedder"
            config = server_config(self.config.embedding, self.config.llm)
            source = LabellingModel(embedder, ledger, config, progress=self.progress)
        assert source is not None, "label_features makes one"
        questions.score(source, self.labels.records, scores=self.scores, controls=self.controls, progress=self.progress)

    def _evidence(self) -> tuple[LexicalLabeler, EffectsOf]:
        lexical = LexicalLabeler(self.train.store, self.contexts, self.vocabulary)
        gathering = EffectsGathering(
            sae=self.sae,
            train=self.train,
            lm=self.lm,
            out=self.out,
            config=self.config,
            contexts=self.contexts,
            features=self.features,
            progress=self.progress,
        )
        return lexical, gathering.effects(lexical.confidence)

    def _held_out(self) -> HeldOut:
        return HeldOut(self.sae, self.test, self.vocabulary, config=self.config.rule_scoring, progress=self.progress)

    def _label_lexically(self, lexical: LexicalLabeler, effects: EffectsOf) -> None:
        done = {label.feature for label in self.labels.records if label.labeler == LEXICAL}
        left = [feature for feature in self.features if feature not in done]
        with self.progress.task("lexical labels", len(self.features), "labels", done=len(done)) as task:
            for start in range(0, len(left), LABELS_PER_WRITE):
                chunk = left[start : start + LABELS_PER_WRITE]
                self.labels.extend(lexical.label(feature, next(iter(effects(feature)), None)) for feature in chunk)
                task.advance(len(chunk))

    def _questions(self, lexical: LexicalLabeler, held_out: HeldOut, effects: EffectsOf) -> Questions:
        config = self.config.llm
        assert config is not None, "checked by LabelConfig"
        firing = {f: float(lexical.confidence[f]) for f in self.features if self.contexts.firing_count[f] > 0}
        features = least_explained(firing, num=config.max_features)
        contexts, counter, selection = choose_among(
            self.sae, self.train, self.contexts, features, vocabulary=self.vocabulary, config=config
        )
        reader = ExampleReader(self.train.store, self.vocabulary)
        explainer = PaperExplainer if config.style == "paper_output_centric" else Explainer
        return Questions(
            explainers=[
                explainer(reader, contexts, config, kind=kind, effects=effects, counter=counter)
                for kind in config.explainers
                if kind != "concat"
            ],
            scorers=make_scorers(held_out, config, siblings=siblings_of(self.sae, features, config)),
            controls=Controls(held_out, seed=config.seed),
            features=features,
            config=config,
            setup=scoring_setup(held_out, config),
            selection=selection,
        )

    def _ask(self, questions: Questions, client: ChatClient, ledger: Ledger, *, generated: TrialQuestions) -> None:
        config = questions.config
        estimate = self._estimated(questions, ledger, generated=generated)
        self.progress.say(f"labelling model {config.model!r}: {estimate}")
        model = LabellingModel(client, ledger, config, progress=self.progress)
        explain_and_judge(
            model,
            questions,
            labels=self.labels,
            scores=self.scores,
            controls=self.controls,
            progress=self.progress,
        )
        generated.score(model, self.labels.records, scores=self.scores, controls=self.controls, progress=self.progress)

    def _write_outputs(self, questions: Questions | None, ledger: Ledger | None) -> None:
        num_features = self.sae.cfg.d_sae
        reports: list[LabelerReport] = []
        labelers = [LEXICAL] if "lexical" in self.config.labelers else []
        for labeler in [*labelers, *(questions.labelers if questions is not None else [])]:
            skipped = self._skipped(questions if labeler != LEXICAL else None, labeler)
            reports.append(report_labeler(labeler, self.labels.records, num_features=num_features, skipped=skipped))
            self.progress.say(str(reports[-1]))
        llm = self._figures(ledger) if ledger is not None else None
        summary = summarise_scores(self.scores.records, self.controls.records)
        for line in summary_lines(summary):
            self.progress.say(line)
        write_report(self.out / LABEL_REPORT_NAME, reports, num_features=num_features, llm=llm, scores=summary)
        costs = ledger.cost_of_features() if ledger is not None else {}
        path = self.out / SIDE_SCORES_NAME
        sides = SideScores.open(path) if path.exists() else None
        write_label_table(self.out / LABEL_TABLE_NAME, self.labels.records, cost_of_features=costs, sides=sides)

    def _skipped(self, questions: Questions | None, labeler: str) -> dict[int, str]:
        """Returns feature -> why a labeler is not asked about it."""
        drawn = set(self.features)
        skipped = {f: "not drawn: max_features" for f in range(self.sae.cfg.d_sae) if f not in drawn}
        if questions is None:
            return skipped
        asked = set(questions.features)
        for feature in drawn - asked:
            fires = self.contexts.firing_count[feature] > 0
            skipped[feature] = "its token rule explains enough: llm.max_features" if fires else "never fires"
        for feature in asked:
            own = [e for e in questions.explainers if labeler in {e.labeler, llm_labeler(questions.config, "concat")}]
            if not any(explainer.has_evidence(feature) for explainer in own):
                skipped[feature] = "no evidence of this kind was gathered"
        return skipped

    def _score_rules(self, held_out: HeldOut) -> dict[str, object]:
        result = score_rules(held_out, self.labels.records, config=self.config.rule_scoring, progress=self.progress)
        done = {(score.feature, score.labeler) for score in self.scores.records if score.scorer == "rule"}
        self.scores.extend(score for score in result.scores if (score.feature, score.labeler) not in done)
        return dict(result.controls)
