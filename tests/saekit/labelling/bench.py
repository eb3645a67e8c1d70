"""Explainer and judge over the planted world, and an oracle that answers them."""

import json
import re
from pathlib import Path

from saekit.errors import LabelerError
from saekit.labelling import (
    ContextConfig,
    Label,
    LabellingModel,
    Ledger,
    LLMConfig,
    RuleScoringConfig,
    Score,
    collect_contexts,
)
from saekit.labelling.chat import ChatClient
from saekit.labelling.evidence.wording import EffectsOf
from saekit.labelling.examples import ExampleReader
from saekit.labelling.explain import Explainer
from saekit.labelling.live import OpenAIChat
from saekit.labelling.llm import Questions, explain_and_judge
from saekit.labelling.scoring.controls import Controls
from saekit.labelling.scoring.detection import Judge
from saekit.labelling.scoring.pieces import PieceTable
from saekit.labelling.scoring.rule import HeldOut
from saekit.labelling.scoring.scorers import make_scorers, scoring_setup, siblings_of
from saekit.labelling.store import RecordFile
from saekit.labelling.vocabulary import Vocabulary
from tests.saekit.labelling.inprocess import InProcess
from tests.saekit.labelling.planted import WordTokenizer, World
from tests.saekit.labelling.stub import StubServer

ANSWER = json.dumps(
    {"label": "rivers and lakes", "fires_on": "words for waters", "promotes": "", "suppresses": "", "confidence": 0.9}
)

FIRING = [feature for feature in range(11) if feature != 5]
"""All planted features but the dead one."""
JUDGED = [feature for feature in FIRING if feature != 8]
"""Those that are silent in some pieces of text, so that there is something to tell apart."""


class Bench:
    """One run, and the files it writes."""

    def __init__(
        self,
        world: World,
        folder: Path,
        contexts_folder: Path,
        *,
        effects: EffectsOf = lambda _: (),
        **options: object,
    ) -> None:
        self.config = LLMConfig.model_validate(
            {
                "model": "stub",
                "wait_seconds": 0.001,
                "max_wait_seconds": 0.01,
                "num_judged": 4,
                "num_controlled": 0,
                "near_share": 0.0,
                **options,
            }
        )
        vocabulary = Vocabulary(WordTokenizer())
        self.contexts = collect_contexts(world.sae, world.train, config=ContextConfig(), out=contexts_folder)
        self.held_out = HeldOut(world.sae, world.test, vocabulary, config=RuleScoringConfig())
        reader = ExampleReader(world.store, vocabulary)
        self.explainers = [
            Explainer(reader, self.contexts, self.config, kind=kind, effects=effects)
            for kind in self.config.explainers
            if kind != "concat"
        ]
        self.explainer = self.explainers[0]
        self.controls = Controls(self.held_out, seed=self.config.seed)
        self.scorers = make_scorers(
            self.held_out, self.config, siblings=siblings_of(world.sae, range(len(world.names)), self.config)
        )
        self.move(folder)

    def move(self, folder: Path) -> "Bench":
        """Goes on in another folder."""
        self.folder = folder
        self.labels = RecordFile(folder / "labels.jsonl", Label)
        self.scores = RecordFile(folder / "scores.jsonl", Score)
        self.control_scores = RecordFile(folder / "controls.jsonl", Score)
        return self

    @property
    def judge(self) -> Judge:
        """The one that detects."""
        return Judge(PieceTable(self.held_out), self.config)

    def questions(self, features: list[int]) -> Questions:
        return Questions(
            explainers=self.explainers,
            scorers=self.scorers,
            controls=self.controls,
            features=features,
            config=self.config,
            setup=scoring_setup(self.held_out, self.config),
        )

    def run(self, server: StubServer | InProcess, features: list[int]) -> Ledger:
        """Labels and judges; the ledger is open when it returns, and closed where it raises."""
        client: ChatClient
        if isinstance(server, InProcess):
            ledger, client = Ledger(":memory:"), server
        else:
            self.config = self.config.model_copy(update={"base_url": server.url})
            ledger, client = Ledger(self.folder / "ledger.sqlite"), OpenAIChat(self.config)
        model = LabellingModel(client, ledger, self.config)
        try:
            explain_and_judge(
                model,
                self.questions(features),
                labels=self.labels,
                scores=self.scores,
                controls=self.control_scores,
            )
        except LabelerError:
            ledger.close()
            raise
        return ledger


def oracle(body: dict[str, object], _: int) -> str:
    """Explains with a fixed label and judges a piece active if it has a river, River or lake."""
    user = str(body["messages"][1]["content"])  # type: ignore[index]
    if "Pieces:" not in user:
        return ANSWER
    pieces = re.findall(r"^(\d+)\. (.*)$", user.split("Pieces:")[1], flags=re.MULTILINE)
    answers = [{"id": int(n), "active": bool(re.search(r"\b([Rr]iver|lake)\b", text))} for n, text in pieces]
    return json.dumps({"answers": answers})
