"""Labels scored by a sentence embedding: a callable with known truth and noise, and a server behind ledger and caps."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from saekit.errors import ConfigError, LabelerError
from saekit.labelling import (
    ChatRequest,
    EmbeddingConfig,
    Label,
    LabelConfig,
    LabellingModel,
    Ledger,
    LLMConfig,
    estimate_labels,
    label_features,
    read_controls,
    read_labels,
    read_scores,
)
from saekit.labelling.embed import server_config
from saekit.labelling.live import OpenAIEmbeddings
from saekit.labelling.scoring.embedding import EmbeddingScorer
from saekit.labelling.scoring.graded import best_bar, graded_precision
from saekit.labelling.scoring.pieces import PieceTable
from saekit.labelling.vectors import pack_vectors, read_embeddings, unpack_vectors
from saekit.manifest import read_manifest
from tests.saekit.labelling.planted import WORDS, WordTokenizer
from tests.saekit.labelling.stub import Fault, StubServer, serving

OFFLINE: dict[str, object] = {"vocab_projection": False, "token_change": None}
LM = SimpleNamespace(fingerprint="1" * 64, tokenizer=WordTokenizer())
KNOWN = [word.strip().casefold() for word in WORDS if word.strip().isalpha()]


def by_words(texts: list[str]) -> np.ndarray:
    """Which known words a text has."""
    return np.array(
        [[word in text.casefold().replace('"', " ").split() for word in KNOWN] for text in texts], np.float32
    )


@pytest.mark.parametrize("flip", [0.0, 0.2, 0.5])
def test_noisy_embedding_scores_its_closed_form(world, bench, flip: float) -> None:
    lab, right = bench(), []
    scorer = EmbeddingScorer(PieceTable(lab.held_out), EmbeddingConfig(model="e", num_pieces=60))
    for name in ("river", "after_new", "digit", "ania"):
        feature = world.feature(name)
        pieces = scorer.pieces(feature)
        flips = np.random.default_rng(feature).random(len(pieces)) < flip
        near = np.array([piece.is_active for piece in pieces]) ^ flips
        vectors = np.append(np.where(near[:, None], [[3.0, 0.0]], [[0.0, 2.0]]), [[1.0, 0.0]], axis=0)
        (score,) = scorer.scores([Label(feature=feature, labeler="x", label="y")], pieces, vectors)
        assert (score.scorer, score.judge, score.base_rate) == ("embedding", "e", 0.5)
        error = 4 * np.sqrt(flip * (1 - flip) / score.num_positive) + 1e-9
        assert score.auprc == pytest.approx((1 - flip) ** 2 + flip / 2, abs=2 * error)
        if flip == 0.5:
            assert score.auprc_natural == pytest.approx(score.natural_rate, abs=0.2)
        elif flip == 0.0:
            assert (score.f1, score.auprc_natural) == (1.0, 1.0)
        right += list(score.right)
    assert np.mean(right) == pytest.approx(1 - flip, abs=4 * np.sqrt(0.25 / len(right)) * (flip > 0) + 1e-9)


def test_graded_precision_is_what_counting_gives() -> None:
    graded, active = np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, False, True, False])
    assert graded_precision(graded, active, 0.5) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # Negatives nine times as many.
    assert graded_precision(graded, active, 0.1) == pytest.approx(0.5 + 0.5 * 0.1 / (0.1 + 0.9 * 0.5))
    assert graded_precision(np.zeros(4), active, 0.1) == pytest.approx(0.1)
    assert (best_bar(graded, active), best_bar(graded, ~active & active)) == (0.8, float("inf"))


def test_bar_is_not_chosen_on_the_texts_it_is_tried_on(world, bench) -> None:
    scorer = EmbeddingScorer(PieceTable(bench().held_out), EmbeddingConfig(model="e", num_pieces=40))
    feature = world.feature("noise")
    pieces = scorer.pieces(feature)
    balanced = []
    for seed in range(40):
        vectors = np.random.default_rng(seed).normal(size=(len(pieces) + 1, 8))
        (score,) = scorer.scores([Label(feature=feature, labeler="x", label="y")], pieces, vectors)
        balanced.append(score.balanced_accuracy)
    assert np.mean(balanced) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("bad", [np.ones((3, 2)), np.full((21, 2), np.nan), np.ones(21)], ids=["rows", "nan", "flat"])
def test_unusable_vectors_are_refused(world, bench, bad: np.ndarray) -> None:
    scorer = EmbeddingScorer(PieceTable(bench().held_out), EmbeddingConfig(model="e", num_pieces=10))
    with pytest.raises(LabelerError, match=r"embedding 'e': got an array of shape .*, needs 21 rows"):
        scorer.scores([Label(feature=0, labeler="x")], scorer.pieces(0), bad)


def test_callable_scores_every_label_and_controls_stand_beside(world, tmp_path) -> None:
    config = LabelConfig.parse({**OFFLINE, "embedding": {"model": "words", "num_pieces": 40}})
    label_features(world.sae, world.train, test=world.test, lm=LM, out=tmp_path, config=config, embed=by_words)
    scores = {world.names[s.feature]: s for s in read_scores(tmp_path) if s.scorer == "embedding"}
    assert set(scores) == set(world.names)
    assert scores["quasar"].auprc == 1.0
    assert scores["river"].auprc_natural > scores["river"].natural_rate + 0.1
    assert scores["dead"].f1 is None
    controls = read_controls(tmp_path)
    assert {score.labeler for score in controls} == {"control:empty", "control:random", "control:shuffled"}
    empty = [score for score in controls if score.labeler == "control:empty"]
    assert all(score.auprc_natural == pytest.approx(score.natural_rate) for score in empty)
    report = json.loads((tmp_path / "label_report.json").read_text())
    assert [(e["scorer"], e["labeler"]) for e in report["scores"]] == [
        ("embedding", name) for name in ("lexical", "control:empty", "control:random", "control:shuffled")
    ]
    with pytest.raises(ConfigError, match=r"no config\.embedding"):
        label_features(
            world.sae,
            world.train,
            test=world.test,
            lm=LM,
            out=tmp_path / "other",
            config=LabelConfig.parse(OFFLINE),
            embed=by_words,
        )


def embeddings(body: dict[str, object], number: int) -> dict[str, object] | Fault:
    """Answers as a server would, out of order, after a rate limit."""
    if number == 1:
        return Fault(429, headers={"Retry-After": "0"})
    texts = body["input"]
    rows = [{"index": n, "embedding": row.tolist()} for n, row in enumerate(by_words(texts))]  # type: ignore[arg-type]
    count = sum(len(LM.tokenizer(text)["input_ids"]) for text in texts)  # type: ignore[attr-defined]
    return {"data": rows[::-1], "usage": {"prompt_tokens": count, "total_tokens": count}}


def served(world, server: StubServer, out, **options: object) -> dict[str, object]:
    embedding = {"model": "text-embedding-3-small", "base_url": server.url, "price_input": 0.02, "num_controlled": 3}
    config = LabelConfig.parse({**OFFLINE, "embedding": {**embedding, **options}})
    return {"sae": world.sae, "train": world.train, "test": world.test, "lm": LM, "out": out, "config": config}


def test_server_is_paid_once_and_as_much_as_was_estimated(world, tmp_path) -> None:
    with serving(embeddings) as server:
        arguments = served(world, server, tmp_path)
        estimate = estimate_labels(**arguments)
        assert server.requests == []
        label_features(**arguments)
        asked = len(server.requests)
        label_features(**arguments)
        assert len(server.requests) == asked == estimate.num_requests + 1
        (tmp_path / "scores.jsonl").unlink()
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
        (tmp_path / "controls.jsonl").unlink()
        label_features(**arguments)
        assert len(server.requests) == asked
    figures = read_manifest(tmp_path).counts["llm"]
    assert figures["answers"] == estimate.num_requests == 9
    assert figures["cost"] == pytest.approx(estimate.cost, rel=0.1)
    scores = [score for score in read_scores(tmp_path) if score.scorer == "embedding"]
    assert len(scores) == len(read_labels(tmp_path)) == 11


def test_answer_without_vectors_is_asked_for_again() -> None:
    respond = lambda body, number: embeddings(body, 0) if number else {"data": []}  # noqa: E731
    with serving(respond) as server:
        config = LLMConfig(model="e", base_url=server.url, wait_seconds=0.001)
        request = ChatRequest(
            model="e",
            system="",
            user="the river\na lake",
            schema_name="",
            schema={},
            temperature=0.0,
            max_output_tokens=0,
        )
        ledger = Ledger(":memory:")
        (answer,) = LabellingModel(OpenAIEmbeddings(config), ledger, config).ask([request])
    assert unpack_vectors(answer.reply.text).shape == (2, len(KNOWN))
    assert [body["input"] for body in server.requests] == [["the river", "a lake"]] * 2
    assert (ledger.num_sent, ledger.answered.requests) == (2, 1)


def test_embedding_is_under_the_caps_of_the_labelling_model() -> None:
    llm = LLMConfig(model="gpt-4.1-mini", max_cost=1.0, max_requests=9)
    config = server_config(EmbeddingConfig(model="text-embedding-3-small"), llm)
    assert (config.max_cost, config.max_requests, config.prices.input, config.prices.output) == (1.0, 9, 0.02, 0.0)
    with pytest.raises(ConfigError, match="price table has no model 'e'"):
        server_config(EmbeddingConfig(model="e"), llm)


def test_vectors_outlive_the_ledger_and_bad_ones_are_no_answer() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.abs(unpack_vectors(pack_vectors(vectors)) - unit).max() < 1e-3
    good = {"data": [{"index": 1, "embedding": [0.0, 1.0]}, {"index": 0, "embedding": [2.0, 0.0]}]}
    reply = read_embeddings(good, 2, most_input=7)
    assert unpack_vectors(reply.text).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert (reply.input_tokens, reply.output_tokens, reply.is_estimated) == (7, 0, True)
    for bad in (
        {"data": good["data"][:1]},
        {"data": None},
        {"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}]},
        {"data": [{"index": 0, "embedding": "x"}, {"index": 1, "embedding": "y"}]},
    ):
        assert read_embeddings(bad, 2, most_input=7) is None
