"""Best of n: the better candidate is kept, on documents that neither explainer nor final score sees, and all of it is counted."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from saekit.labelling import LabelConfig, Ledger, estimate_labels, label_features, read_labels, read_scores
from saekit.labelling.candidates import choose_among, split_selection
from saekit.labelling.dialect import Complaint, Dialect
from saekit.labelling.examples import ExampleReader
from saekit.labelling.explain import Explainer
from saekit.labelling.scoring.detection import Judge
from saekit.labelling.scoring.pieces import PieceTable
from saekit.labelling.vocabulary import Vocabulary
from tests.saekit.labelling.bench import FIRING, Bench
from tests.saekit.labelling.noisyoracle import BROAD, PATTERNS, UNRELATED, NoisyOracle, describe
from tests.saekit.labelling.planted import WordTokenizer, World
from tests.saekit.labelling.stub import StubServer, serving

LM = SimpleNamespace(fingerprint="1" * 64, tokenizer=WordTokenizer())
CONFIG = {"num_candidates": 3, "num_selection": 8, "num_counter_examples": 3, "selection_fraction": 0.3}


class Candidates:
    """Says something unrelated first, then the truth about the river, then too much; judges by what it is told."""

    def __init__(self) -> None:
        self.judge = NoisyOracle(0.0)

    def __call__(self, body: dict[str, object], number: int) -> str:
        if "Pieces:" in str(body["messages"][1]["content"]):  # type: ignore[index]
            return self.judge(body, number)
        pattern = {None: UNRELATED, 1: PATTERNS["river"], 2: BROAD["river"]}[body.get("seed")]
        says = describe(pattern)
        return json.dumps({"label": says, "fires_on": says, "promotes": "", "suppresses": "", "confidence": 0.5})


def _config(server: StubServer, **options: object) -> LabelConfig:
    llm = {"model": "stub", "base_url": server.url, "price_input": 1.0, "price_output": 2.0, "num_controlled": 0}
    values = {"llm": {**llm, **CONFIG, "explainers": ["input"], **options}}
    return LabelConfig.parse({"vocab_projection": False, "token_change": None, "labelers": ["llm"], **values})


def _label(world: World, out: Path, config: LabelConfig) -> Path:
    return label_features(world.sae, world.train, test=world.test, lm=LM, out=out, config=config)


def test_the_better_candidate_is_kept_and_everything_is_counted(world: World, tmp_path: Path) -> None:
    river = world.feature("river")
    with serving(Candidates()) as server:
        config = _config(server)
        estimate = estimate_labels(world.sae, world.train, test=world.test, lm=LM, out=tmp_path / "dry", config=config)
        _label(world, tmp_path / "run", config)
        num_requests = len(server.requests)
        assert estimate.num_requests == num_requests
        # The same again, the labels lost: all of it is in the ledger.
        moved = tmp_path / "run" / "labels.jsonl"
        lines = moved.read_text()
        manifest = tmp_path / "run" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"complete"', '"running"'))
        moved.unlink()
        _label(world, tmp_path / "run", config)
        assert len(server.requests) == num_requests
        assert moved.read_text() == lines
    labels = {label.feature: label for label in read_labels(tmp_path / "run")}
    best = labels[river]
    assert best.label == describe(PATTERNS["river"])
    assert (best.num_candidates, best.selection_scorer, best.selection_score) == (3, "detection", 1.0)
    assert best.prompt_version == "explain_v2+contrast_v1"
    # Three explanations, and three judgements of them, at 100 and 10 tokens each.
    assert (best.input_tokens, best.output_tokens) == (600, 60)
    assert best.cost == pytest.approx((600 * 1.0 + 60 * 2.0) / 1e6)
    scores = {score.feature: score for score in read_scores(tmp_path / "run") if score.scorer == "detection"}
    assert scores[river].f1 == 1.0
    ledger = Ledger(tmp_path / "run" / "ledger.sqlite")
    assert ledger.mean_tokens("explain:input")[0] == 3 * len(labels)
    assert ledger.mean_tokens("select:detection")[0] > 0
    ledger.close()
    temperatures = {
        request.get("seed"): request["temperature"]
        for request in server.requests
        if "Pieces:" not in str(request["messages"][1]["content"])  # type: ignore[index]
    }
    assert temperatures == {None: 0.0, 1: 0.8, 2: 0.8}


def test_no_document_is_in_two_of_prompt_selection_and_test(world: World, bench: Callable[..., Bench]) -> None:
    lab = bench(num_judged=40, **CONFIG)
    contexts, counter, selection = choose_among(
        world.sae, world.train, lab.contexts, FIRING, vocabulary=Vocabulary(WordTokenizer()), config=lab.config
    )
    assert selection is not None
    reader = ExampleReader(world.store, Vocabulary(WordTokenizer()))
    explainer = Explainer(reader, contexts, lab.config, kind="input", counter=counter)
    final = Judge(PieceTable(lab.held_out), lab.config)
    num_shown = num_chosen_on = 0
    for feature in FIRING:
        shown = explainer.documents_shown(feature)
        chosen_on = {piece.document for piece in selection.scorer.pieces(feature)}
        tested = {piece.document for piece in final.pieces(feature)}
        assert not shown & chosen_on
        assert not shown & tested
        assert not chosen_on & tested
        num_shown, num_chosen_on = num_shown + len(shown), num_chosen_on + len(chosen_on)
    assert min(num_shown, num_chosen_on) > 20


def test_counter_examples_are_texts_of_siblings_on_which_the_feature_is_silent(world: World, bench) -> None:
    lab = bench(**CONFIG)
    contexts, counter, _ = choose_among(
        world.sae, world.train, lab.contexts, FIRING, vocabulary=Vocabulary(WordTokenizer()), config=lab.config
    )
    for feature in FIRING:
        acts = world.acts.reshape(*world.store.tokens().shape, -1)[..., feature]
        documents = world.store.documents()
        for context in counter[feature]:
            is_read = documents[context.row] == documents[context.row, context.position]
            assert not acts[context.row][is_read].any()
    river = world.feature("river")
    explainer = Explainer(
        ExampleReader(world.store, Vocabulary(WordTokenizer())), contexts, lab.config, kind="input", counter=counter
    )
    shown, silent = explainer.request(river).user.split("Texts on which the feature is silent:")
    assert "\u00ab" in shown
    assert "river" not in silent
    assert len(silent.strip().splitlines()) == len(counter[river]) > 0


def test_a_split_keeps_documents_whole_and_both_sides_filled(world: World) -> None:
    shown, kept = split_selection(world.train, fraction=0.3, seed=1)  # type: ignore[arg-type]
    assert not np.intersect1d(shown.documents, kept.documents).size
    assert len(kept.documents) == round(0.3 * len(world.train.documents))
    assert ((shown.mask | kept.mask) == world.train.mask).all()


def test_a_server_that_refuses_seeds_gets_none(bench: Callable[..., Bench]) -> None:
    dialect, request = Dialect(), bench(**CONFIG).explainer.request(0, candidate=2)
    sent = dialect.options(request, 0)
    assert sent["seed"] == 2
    assert dialect.adapted(Complaint(status=400, message="unknown parameter: seed"), 0, sent=sent) == 0
    assert "seed" not in dialect.options(request, 0)
