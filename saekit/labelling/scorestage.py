"""The parts of scoring labels that are there: what is not known yet is asked, and table and report are brought up to date."""

import functools
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saekit.activations import StoreView
from saekit.labelling.asking import LabellingModel
from saekit.labelling.chat import ChatClient
from saekit.labelling.embed import EmbeddingQuestions, server_config
from saekit.labelling.estimate import LLMEstimate, estimate_requests, token_counter
from saekit.labelling.evidence.sidescores import SIDE_SCORES_NAME, SideScores
from saekit.labelling.generated.make import GeneratedTests
from saekit.labelling.generated.trials import TrialQuestions
from saekit.labelling.label import make_client, make_embedder
from saekit.labelling.labelconfig import LabelConfig
from saekit.labelling.ledger import LEDGER_NAME, Ledger
from saekit.labelling.llm import Questions, answerable, judge
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import LEXICAL, Label, Score
from saekit.labelling.runreport import LABEL_REPORT_NAME, ledger_figures, report_labeler
from saekit.labelling.scoring.controls import Controls
from saekit.labelling.scoring.embedding import Embed, EmbeddingScorer
from saekit.labelling.scoring.pieces import PieceTable
from saekit.labelling.scoring.rule import HeldOut, score_rules
from saekit.labelling.scoring.scorers import make_scorers, scoring_setup, siblings_of
from saekit.labelling.scoring.summary import summarise_scores, summary_lines
from saekit.labelling.store import CONTROLS_NAME, LABELS_NAME, SCORES_NAME, RecordFile
from saekit.labelling.table import LABEL_TABLE_NAME, write_label_table
from saekit.labelling.vocabulary import Vocabulary
from saekit.manifest import write_json
from saekit.models import LanguageModel, load_tokenizer
from saekit.progress import Progress
from saekit.sae import SAE

__all__ = ["ScoreStage"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreStage:
    """Everything that the parts of one scoring run share."""

    sae: SAE
    lm: LanguageModel
    out: Path
    config: LabelConfig
    labelers: Sequence[str] | None
    held_out: HeldOut
    labels: RecordFile[Label]
    scores: RecordFile[Score]
    controls: RecordFile[Score]
    progress: Progress

    @classmethod
    def open(
        cls,
        sae: SAE,
        test: StoreView,
        *,
        lm: LanguageModel,
        out: Path,
        config: LabelConfig,
        labelers: Sequence[str] | None,
        progress: Progress,
    ) -> "ScoreStage":
        """Reads the folder and encodes the held-out documents."""
        vocabulary = Vocabulary(lm.tokenizer)
        return cls(
            sae=sae,
            lm=lm,
            out=out,
            config=config,
            labelers=labelers,
            held_out=HeldOut(sae, test, vocabulary, config=config.rule_scoring, progress=progress),
            labels=RecordFile(out / LABELS_NAME, Label),
            scores=RecordFile(out / SCORES_NAME, Score),
            controls=RecordFile(out / CONTROLS_NAME, Score),
            progress=progress,
        )

    def take_in(self, found: Sequence[Label]) -> None:
        """Makes the labels those of the folder; scores of labels that have changed go."""
        known = {(label.feature, label.labeler): label for label in self.labels.records}
        new = [label for label in found if known.get((label.feature, label.labeler)) != label]
        keys = {(label.feature, label.labeler) for label in new}
        if keys & known.keys():
            self.labels.remove(lambda label: (label.feature, label.labeler) in keys)
            self.scores.remove(lambda score: (score.feature, score.labeler) in keys)
        self.labels.extend(new)

    def forget_unanswered(self) -> None:
        """Makes scores without any usable answer as if they had never been asked for."""

        def is_lost(score: Score) -> bool:
            return score.num_unparsed > 0 and not score.right

        lost = {
            (score.scorer, score.feature) for f in (self.scores, self.controls) for score in f.records if is_lost(score)
        }
        if not lost or not (self.out / LEDGER_NAME).exists():
            return
        ledger = Ledger(self.out / LEDGER_NAME)
        try:
            with ledger.together():
                for scorer, feature in lost:
                    ledger.retry(f"score:{scorer}", feature)
        finally:
            ledger.close()
        for file in (self.scores, self.controls):
            file.remove(is_lost)

    def run(self, client: ChatClient | None, embed: Embed | None) -> None:
        """Asks what is not known yet, and brings table and report up to date, also where it has to stop."""
        ledger = Ledger(self.out / LEDGER_NAME)
        try:
            self._score_rules()
            if self.config.llm is not None:
                self._judge(self.config.llm, client, ledger)
            if self.config.embedding is not None:
                embedding = self._embedding()
                source: Embed | LabellingModel
                if embed is not None:
                    source = embed
                else:
                    config = server_config(self.config.embedding, self.config.llm)
                    embedder = make_embedder(self.config.embedding, self.config.llm)
                    source = LabellingModel(embedder, ledger, config, progress=self.progress)
                embedding.score(
                    source, self._chosen(), scores=self.scores, controls=self.controls, progress=self.progress
                )
        finally:
            self._write(ledger)
            ledger.close()

    def estimate(self, found: Sequence[Label]) -> LLMEstimate:
        """Returns what would be asked about these labels."""
        path = self.out / LEDGER_NAME
        ledger = Ledger(path) if path.exists() else None
        done, chosen = [*self.scores.records, *self.controls.records], self._chosen(found)
        parts: list[LLMEstimate] = []
        try:
            if self.config.llm is not None:
                config, questions = self.config.llm, self._questions(self.config.llm, chosen)
                name = config.tokenizer or (config.model if config.backend == "local" else None)
                count = token_counter(self.lm.tokenizer if name is None else load_tokenizer(name))
                generated = self._generated(questions).requests(chosen, done=done)
                requests = [*questions.judging(chosen, done=done), *generated]
                parts.append(estimate_requests(requests, config, count=count, ledger=ledger))
            if self.config.embedding is not None:
                config = server_config(self.config.embedding, self.config.llm)
                asked = self._embedding().requests(chosen, done)
                parts.append(estimate_requests(asked, config, count=token_counter(self.lm.tokenizer), ledger=ledger))
        finally:
            if ledger is not None:
                ledger.close()
        return functools.reduce(operator.add, parts)

    def _judge(self, config: LLMConfig, client: ChatClient | None, ledger: Ledger) -> None:
        chosen = self._chosen()
        questions = self._questions(config, chosen)
        generated = self._generated(questions)
        if client is None:
            reads = all(scorer.needs_reading for scorer in questions.scorers)
            reads = reads and all(scorer.needs_reading for scorer in generated.scorers)
            client = make_client(config, chats=not reads)
        model = LabellingModel(client, ledger, config, progress=self.progress)
        questions = answerable(model, questions, self.progress)
        names, judged = {scorer.name for scorer in questions.scorers}, set(questions.judged)

        def is_stale(score: Score) -> bool:
            is_asked = score.scorer in names and score.judge == config.model
            return (
                is_asked and score.setup != questions.setup and (score.labeler in judged or "control:" in score.labeler)
            )

        stale = sum(file.remove(old) for file in (self.scores, self.controls) for old in (is_stale, generated.is_stale))
        if stale:
            self.progress.say(f"{stale:,} scores of {config.model!r} on other texts are replaced")
        judge(model, questions, chosen, scores=self.scores, controls=self.controls, progress=self.progress)
        generated.score(model, chosen, scores=self.scores, controls=self.controls, progress=self.progress)

    def _names(self, labels: Sequence[Label]) -> list[str]:
        there = sorted({label.labeler for label in labels if label.status == "done"})
        if self.labelers is not None:
            return list(dict.fromkeys(self.labelers))
        judges_lexical = self.config.llm is not None and self.config.llm.judge_lexical
        return [name for name in there if name != LEXICAL or judges_lexical] or there

    def _chosen(self, found: Sequence[Label] | None = None) -> list[Label]:
        """Returns the labels that are scored: of all their features, or so many drawn at random as `llm.max_features` allows."""
        found = self.labels.records if found is None else found
        names = set(self._names(found))
        own = [label for label in found if label.labeler in names and label.status == "done"]
        features = sorted({label.feature for label in own})
        most = None if self.config.llm is None else self.config.llm.max_features
        if most is not None and most < len(features):
            self.progress.say(
                f"score: {most:,} of {len(features):,} labelled features, drawn at random: llm.max_features"
            )
            order = np.random.default_rng(self.config.seed).permutation(len(features))[:most]
            drawn = {features[int(place)] for place in order}
            own = [label for label in own if label.feature in drawn]
        return own

    def _questions(self, config: LLMConfig, chosen: Sequence[Label]) -> Questions:
        features = sorted({label.feature for label in chosen})
        return Questions(
            explainers=(),
            scorers=make_scorers(self.held_out, config, siblings=siblings_of(self.sae, features, config)),
            controls=Controls(self.held_out, seed=config.seed),
            features=features,
            config=config,
            setup=scoring_setup(self.held_out, config),
            scored=self._names(chosen),
        )

    def _generated(self, questions: Questions) -> TrialQuestions:
        tests = GeneratedTests(lm=self.lm, sae=self.sae, held_out=self.held_out, out=self.out)
        return tests.questions(questions, self.config.token_change, progress=self.progress)

    def _embedding(self) -> EmbeddingQuestions:
        config = self.config.embedding
        assert config is not None, "checked by the caller"
        return EmbeddingQuestions(
            scorer=EmbeddingScorer(PieceTable(self.held_out), config),
            controls=Controls(self.held_out, seed=config.seed),
            num_controlled=config.num_controlled,
        )

    def _score_rules(self) -> None:
        done = {(score.feature, score.labeler) for score in self.scores.records if score.scorer == "rule"}
        left = [label for label in self.labels.records if (label.feature, label.labeler) not in done and label.rule]
        if left:
            result = score_rules(self.held_out, left, config=self.config.rule_scoring, progress=self.progress)
            self.scores.extend(result.scores)

    def _write(self, ledger: Ledger) -> None:
        summary = summarise_scores(self.scores.records, self.controls.records)
        for line in summary_lines(summary):
            self.progress.say(line)
        path, num = self.out / LABEL_REPORT_NAME, self.sae.cfg.d_sae
        report: dict[str, Any] = {"features": num, "labelers": {}}
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
        for labeler in sorted({label.labeler for label in self.labels.records} - report["labelers"].keys()):
            there = {label.feature for label in self.labels.records if label.labeler == labeler}
            skipped = {feature: "no label was given" for feature in range(num) if feature not in there}
            entry = report_labeler(labeler, self.labels.records, num_features=num, skipped=skipped)
            report["labelers"][labeler] = entry.to_dict()
        config = self.config.llm
        if config is None:
            assert self.config.embedding is not None, "one of the two is there"
            config = server_config(self.config.embedding, None)
        write_json(path, {**report, "scores": summary, "llm": ledger_figures(ledger, config)})
        sides = self.out / SIDE_SCORES_NAME
        write_label_table(
            self.out / LABEL_TABLE_NAME,
            self.labels.records,
            cost_of_features=ledger.cost_of_features(),
            sides=SideScores.open(sides) if sides.exists() else None,
        )
