"""Generated texts: steered as they are said to be, the same on every run, and judged so that only what a label says can tell them apart."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from saekit.errors import ConfigError
from saekit.labelling import Label, LabelConfig, LLMConfig, RuleScoringConfig
from saekit.labelling.asking import LabellingModel
from saekit.labelling.compare import compare_scores
from saekit.labelling.evidence.clamp import Reconstruction
from saekit.labelling.generated.config import SteeredConfig
from saekit.labelling.generated.inputtest import InputTester, SentenceReader
from saekit.labelling.generated.intervention import InterventionJudge
from saekit.labelling.generated.interventiongain import InterventionReader
from saekit.labelling.generated.output import OutputJudge
from saekit.labelling.generated.sets import SetPool
from saekit.labelling.generated.strength import clamped_strengths
from saekit.labelling.generated.texts import CLEAN, SteeredTexts, Steerer, steered_texts
from saekit.labelling.generated.trials import TrialQuestions, TrialScorer
from saekit.labelling.ledger import Ledger
from saekit.labelling.records import Score
from saekit.labelling.scoring.controls import Controls
from saekit.labelling.scoring.rule import HeldOut
from saekit.labelling.scoring.summary import summarise_scores
from saekit.labelling.store import RecordFile
from saekit.labelling.tokencode import opening, token_ids
from saekit.labelling.vocabulary import Vocabulary
from saekit.models import LanguageModel, find_unembedding, load_model, logits, replace
from saekit.sae import JumpReLUConfig, JumpReLUSAE, TopKConfig, TopKSAE, Transcoder, TranscoderConfig
from tests.saekit.labelling.inprocess import InProcess
from tests.saekit.labelling.planted import WordTokenizer, World
from tests.saekit.labelling.stub import Fault

HOOK = "model.layers.2"
NUM = 6
"""Planted features; NUM + i is i with the sign of its decoder row flipped."""
FIRST = 40
"""Token that the first of them writes: capitals, each of which a text gives back when it is read."""
CONFIG = SteeredConfig(prompts=("I think", "We"), kl_targets=(1.0,), num_samples=2, num_tokens=8, batch_rows=4)
STANDARD_ERRORS = 4


@pytest.fixture(scope="module")
def lm(tiny_model_dir) -> LanguageModel:
    """A tiny model with logits as far apart as a trained one's."""
    lm = load_model(str(tiny_model_dir("llama")))
    with torch.no_grad():
        find_unembedding(lm).weight.mul_(20)
    return lm


@pytest.fixture(scope="module")
def sae(lm: LanguageModel) -> TopKSAE:
    """Feature i writes the unembedding row of token FIRST + i."""
    sae = TopKSAE(TopKConfig(d_in=lm.d_model, d_sae=2 * NUM, k=4), hook_point=HOOK, seed=3)
    weight = find_unembedding(lm).weight.detach().float()
    rows = torch.nn.functional.normalize(weight[FIRST : FIRST + NUM] - weight.mean(dim=0), dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([rows, -rows]))
    return sae


@pytest.fixture(scope="module")
def contexts() -> torch.Tensor:
    return torch.randint(2, 380, (2, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def steer(lm, sae, contexts) -> Callable[..., Steerer]:
    start = np.ones(2 * NUM, dtype=np.float32)
    return lambda config=CONFIG, sae=sae: Steerer(lm, sae, config, contexts=contexts, start=start)


@pytest.fixture(scope="module")
def sets(steer) -> dict[int, SteeredTexts]:
    return {record.feature: record for record in steer().write(range(2 * NUM))}


def _raised(lm: LanguageModel, sae: TopKSAE, record: SteeredTexts) -> float:
    """How much likelier the planted token is, by the strength of a record."""
    token = FIRST + record.feature % NUM
    ids = torch.tensor([[0, *range(5, 12)]])
    clean = torch.log_softmax(logits(lm, ids), dim=-1)[0, 1:, token]
    push = record.strengths[0] * sae.W_dec[record.feature].detach()
    with replace(lm, HOOK, lambda hidden: hidden + push):
        return float((torch.log_softmax(logits(lm, ids), dim=-1)[0, 1:, token] - clean).mean())


def test_features_are_turned_equally_far_and_twins_the_other_way(lm, sae, sets) -> None:
    for record in sets.values():
        assert record.status == "done"
        assert record.kl[0] == pytest.approx(1.0, rel=0.101)
        assert len(record.texts) == CONFIG.set_size
        assert len(set(record.texts)) > 1
        assert [text.startswith(("I think", "We")) for text in record.texts] == [True] * 4
    for feature in range(NUM):
        assert _raised(lm, sae, sets[feature]) > 1 > -1 > _raised(lm, sae, sets[NUM + feature])


def test_a_feature_s_texts_do_not_depend_on_others_or_on_the_run(steer, sets) -> None:
    assert steer().write([4]) == [sets[4]]
    assert [record.feature for record in steer().write([7, 1, 3])] == [1, 3, 7]
    assert steer().write([7, 1, 3])[2].texts == sets[7].texts


def test_what_was_written_is_not_written_again_after_a_kill(steer, tmp_path, sets) -> None:
    features, steerer = list(range(2 * NUM)), steer()
    asked: list[list[int]] = []
    write = steerer.write

    def killed(chunk: list[int]) -> list[SteeredTexts]:
        asked.append(list(chunk))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return write(chunk)

    steerer.write = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        steered_texts(steerer, features, out=tmp_path)
    with (tmp_path / "steered.jsonl").open("a") as file:
        file.write('{"feature": 4, "texts": ["half a li')
    found = steered_texts(steerer, features, out=tmp_path)
    assert found == sets
    done = [feature for number, chunk in enumerate(asked) if number != 2 for feature in chunk]
    assert sorted(done) == features
    steered_texts(steerer, features, out=tmp_path)
    assert sum(map(len, asked)) == 2 * NUM + len(asked[2])


def test_a_feature_that_cannot_move_the_model_fails_with_its_reason(sae, steer) -> None:
    still = TopKSAE(sae.cfg, hook_point=HOOK)
    with torch.no_grad():
        still.W_dec.copy_(sae.W_dec)
        still.W_dec[1] = 0
    good, bad = steer(sae=still).write([0, 1])
    assert (good.status, bad.status, bad.texts) == ("done", "failed", ())
    assert "no strength moves the model by 1 nats" in str(bad.reason)
    pool = SetPool({0: good, 1: bad}, seed=0)
    assert pool.problem(1, 2) == bad.reason
    assert pool.problem(0, 2) == "steered texts of 1 features, needs 2"
    assert pool.problem(5, 2) == "no steered texts"


def test_published_clamp_is_the_published_one(lm, sae) -> None:
    """Whole clamps by halving on the reconstruction; texts with the error, every position clamped."""
    config = SteeredConfig(
        prompts=("I think",), kl_targets=(0.25, -0.5), num_samples=1, num_tokens=5, match="clamp", temperature=0
    )
    ids = torch.tensor([[*opening(lm.tokenizer), *token_ids(lm.tokenizer, "I think")]])
    steerer = Steerer(lm, sae, config, contexts=None, start=np.ones(2 * NUM, dtype=np.float32))
    (record,) = steerer.write([2])
    found = clamped_strengths([Reconstruction(lm, sae, ids)], torch.tensor([2]), config.kl_targets)
    assert record.strengths == tuple(found.values[0].tolist())

    def clamped(hidden: torch.Tensor, value: float) -> torch.Tensor:
        acts = sae.encode(hidden.float()).detach()[..., 2:3]
        return hidden + (value - acts) * sae.W_dec[2].detach()

    def reconstructed(hidden: torch.Tensor, value: float | None) -> torch.Tensor:
        acts = sae.encode(hidden.float()).detach().clone()
        if value is not None:
            acts[..., 2] = value
        return sae.decode(acts)

    def log_probs(value: float | None) -> torch.Tensor:
        with replace(lm, HOOK, lambda hidden: reconstructed(hidden, value)):
            return torch.log_softmax(logits(lm, ids)[0], dim=-1)

    clean = log_probs(None)
    for target, value, kl, text in zip(config.kl_targets, record.strengths, record.kl, record.texts, strict=True):
        assert value == int(value)
        assert 1 <= value * np.sign(target) <= 1000
        around = [float((clean.exp() * (clean - log_probs(value + step))).sum(-1).mean()) for step in (-1, 0, 1)]
        assert around[1] == pytest.approx(kl, rel=1e-3, abs=1e-5)
        # Whole clamps can be too far apart to meet a target.
        is_between = min(around) < abs(target) and max(around) > abs(target) + 0.1
        assert abs(target) <= kl <= abs(target) + 0.1 or abs(value) == 1 or is_between
        written = ids
        for _ in range(config.num_tokens):
            with replace(lm, HOOK, lambda hidden, value=value: clamped(hidden, value)):
                written = torch.cat([written, logits(lm, written)[:, -1:].argmax(dim=-1)], dim=1)
        continued = lm.tokenizer.decode(written[0, 1:].tolist(), clean_up_tokenization_spaces=False)
        assert text == " ".join(continued.split())


@pytest.fixture(scope="module")
def held_out(world: World) -> HeldOut:
    return HeldOut(world.sae, world.test, Vocabulary(WordTokenizer()), config=RuleScoringConfig())


# What a label says of feature f in the following is the word `w<f>`, which its texts carry.


def _pool(num: int, *, seed: int = 0) -> SetPool:
    """Sets whose texts carry their feature's word, and differ in length and repetition as they please."""
    generator = random.Random(seed)
    made = {}
    for feature in range(num):
        words = [generator.choice(["the", "a", "of", "and", "to"]) for _ in range(generator.randint(3, 30))]
        texts = tuple(f"{' '.join(words)} w{feature} {n}" for n in range(SteeredConfig().set_size))
        made[feature] = SteeredTexts(feature=feature, texts=texts)
    return SetPool(made, seed=seed)


def _score(
    scorer: TrialScorer, held_out: HeldOut, folder, judge: InProcess, labels: list[Label], *, num_controlled: int = 0
) -> tuple[list[Score], list[Score], Ledger]:
    config = LLMConfig(model="stub", num_controlled=num_controlled, attempts=1)
    questions = TrialQuestions(
        scorers=[scorer],
        controls=Controls(held_out, seed=0),
        features=sorted({label.feature for label in labels}),
        judged=["llm:stub"],
        config=config,
    )
    scores, controls = RecordFile(folder / "scores.jsonl", Score), RecordFile(folder / "controls.jsonl", Score)
    ledger = Ledger(":memory:")
    model = LabellingModel(judge, ledger, config)
    questions.score(model, labels, scores=scores, controls=controls)
    return scores.records, controls.records, ledger


def _labels(num: int) -> list[Label]:
    return [Label(feature=f, labeler="llm:stub", label="x", promotes=f"w{f}") for f in range(num)]


def _user(body: dict[str, object]) -> str:
    return str(body["messages"][1]["content"])  # type: ignore[index]


class WordJudge:
    """Finds the described word in sets or pairs, names a wrong one with probability `flip`, and guesses where it is nowhere."""

    def __init__(self, flip: float) -> None:
        self.flip, self.random = flip, random.Random(1)

    def __call__(self, body: dict[str, object], _: int) -> str:
        described, _, shown = _user(body).partition("\n\n")
        word = re.search(r"w\d+", described)
        if shown.startswith("Set 1"):
            return json.dumps({"set": 1 + self._pick(word, re.split(r"\n\n", shown))})
        pairs = re.findall(r"^\d+\n\(a\) (.*)\n\(b\) (.*)$", shown, flags=re.MULTILINE)
        return json.dumps(
            {"answers": [{"id": n + 1, "text": "ab"[self._pick(word, list(pair))]} for n, pair in enumerate(pairs)]}
        )

    def _pick(self, word: re.Match[str] | None, texts: list[str]) -> int:
        own = [n for n, text in enumerate(texts) if word and re.search(rf"\b{word[0]}\b", text)]
        if not own:
            return self.random.randrange(len(texts))
        wrong = self.random.choice([n for n in range(len(texts)) if n != own[0]])
        return wrong if self.random.random() < self.flip else own[0]


SCORERS = {"output": (OutputJudge, 3), "intervention": (InterventionJudge, 2)}


@pytest.mark.parametrize("flip", [0.0, 0.2, None], ids=["honest", "noisy", "tossing"])
@pytest.mark.parametrize("name", SCORERS)
def test_noisy_judge_scores_its_closed_form(held_out, tmp_path, name: str, flip: float | None) -> None:
    make, options = SCORERS[name]
    chance = 1 / options
    flip = 1 - chance if flip is None else flip
    scorer = make(_pool(24), LLMConfig(model="stub"))
    judge = InProcess(WordJudge(flip))
    scores, controls, ledger = _score(scorer, held_out, tmp_path, judge, _labels(24), num_controlled=24)
    assert len(scores) == 24
    right = [verdict for score in scores for verdict in score.right]
    assert _is_binomial(sum(right), len(right), 1 - flip)
    for score in scores:
        assert (score.scorer, score.judge, score.base_rate, score.reason) == (name, "stub", chance, None)
        assert score.accuracy == np.mean(score.right)
        assert score.low - 1e-9 <= score.accuracy <= score.high + 1e-9
    assert ledger.num_sent == len(judge.requests) == 4 * (len(scores) + len(controls))
    by_control = Counter(score.labeler for score in controls)
    assert by_control == {f"control:{kind}": 24 for kind in ("empty", "random", "shuffled")}
    for kind in by_control:
        right = [verdict for score in controls if score.labeler == kind for verdict in score.right]
        assert _is_binomial(sum(right), len(right), chance)


def _is_binomial(right: int, trials: int, share: float) -> bool:
    return abs(right - trials * share) <= STANDARD_ERRORS * np.sqrt(trials * share * (1 - share)) + 1e-9


@pytest.mark.parametrize(
    "rule",
    [
        lambda sets: 0,
        lambda sets: 2,
        lambda sets: int(np.argmax([len(text) for text in sets])),
        lambda sets: int(np.argmin([len(text) for text in sets])),
        lambda sets: int(np.argmin([len(set(text.split())) / len(text.split()) for text in sets])),
    ],
    ids=["first", "last", "longest", "shortest", "most repetitive"],
)
def test_a_judge_that_reads_no_label_is_right_by_chance(rule: Callable[[list[str]], int]) -> None:
    num, trials = 60, 0
    scorer = OutputJudge(_pool(num), LLMConfig(model="stub", steered=SteeredConfig(num_trials=6)))
    right = 0
    for label in _labels(num):
        for trial in range(6):
            shown = scorer.request(label, trial).user.partition("\n\n")[2].split("\n\n")
            own = next(n for n, text in enumerate(shown) if re.search(rf"\bw{label.feature}\b", text))
            right, trials = right + (rule(shown) == own), trials + 1
    assert _is_binomial(right, trials, 1 / 3)


def test_every_set_is_as_often_right_as_wrong_would_have_it() -> None:
    pool = _pool(30)
    for trial in range(4):
        others = Counter(other for feature in range(30) for other in pool.others(feature, trial, 2))
        assert set(others.values()) == {2}
        assert all(len({feature, *pool.others(feature, trial, 2)}) == 3 for feature in range(30))
    for feature in range(30):
        assert {pool.place(feature, trial, 3) for trial in range(3)} == {0, 1, 2}
    judge = InterventionJudge(pool, LLMConfig(model="stub"))
    assert all(sum(judge._places(feature, 0)) == SteeredConfig().set_size // 2 for feature in range(30))


def test_all_labels_of_a_feature_are_judged_on_the_same_sets() -> None:
    for make, _ in SCORERS.values():
        scorer = make(_pool(8), LLMConfig(model="stub"))
        one, two = (Label(feature=3, labeler=name, label=name) for name in ("a", "b"))
        shown = [scorer.request(label, 1).user.partition("\n\n")[2] for label in (one, two)]
        assert shown[0] == shown[1]
        answers: list = []
        assert scorer.score(one, answers).pieces == scorer.score(two, answers).pieces


def test_two_labels_are_compared_on_the_trials_that_both_were_judged_in(held_out, tmp_path) -> None:
    scorer = OutputJudge(_pool(12), LLMConfig(model="stub"))
    scores = []
    for name, flip in (("a", 0.0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        judge = InProcess(WordJudge(flip))
        scores.append(_score(scorer, held_out, tmp_path / name, judge, _labels(12))[0])
    (found,) = compare_scores(*scores)
    assert (found.scorer, found.num_features, found.f1_a, found.num_pieces) == ("output", 12, 1.0, 48)
    assert found.difference == pytest.approx(found.f1_b - 1)
    assert (found.only_a, found.only_b) == (48 - sum(sum(score.right) for score in scores[1]), 0)


def test_unusable_answers_count_as_wrong_and_have_a_reason(held_out, tmp_path) -> None:
    scorer = OutputJudge(_pool(4), LLMConfig(model="stub"))
    judge = InProcess(lambda _, number: '{"set": 9}' if number else "no idea")
    scores, _, _ = _score(scorer, held_out, tmp_path, judge, _labels(4)[:1])
    assert [(s.accuracy, s.num_unparsed, s.right, s.reason) for s in scores] == [(None, 4, (), "no usable answer")]


# Judges of texts that the model really wrote.

PLAINLY = CONFIG.model_copy(update={"kl_targets": (3.0,), "num_trials": 3})


class CountingJudge:
    """Names the set in which the described token stands most often."""

    def __init__(self, lm: LanguageModel) -> None:
        self.tokenizer = lm.tokenizer

    def __call__(self, body: dict[str, object], _: int) -> str:
        described, _, shown = _user(body).partition("\n\n")
        token = int(described.split("token ")[1])
        counts = [token_ids(self.tokenizer, text.partition("\n")[2]).count(token) for text in shown.split("\n\n")]
        return json.dumps({"set": 1 + int(np.argmax(counts))})


def _planted_labels() -> list[Label]:
    """The truth about each feature, and about each twin what is true of the other one."""
    return [
        Label(feature=f, labeler="llm:stub", label="planted", promotes=f"token {FIRST + f % NUM}")
        for f in range(2 * NUM)
    ]


def _counted(lm: LanguageModel, pool: SetPool, held_out: HeldOut, folder, config: SteeredConfig) -> NDArray:
    scorer = OutputJudge(pool, LLMConfig(model="stub", steered=config))
    scores, _, _ = _score(scorer, held_out, folder, InProcess(CountingJudge(lm)), _planted_labels())
    assert all(score.num_unparsed == 0 for score in scores)
    return np.array([score.accuracy for score in sorted(scores, key=lambda score: score.feature)])


def test_true_labels_win_on_really_steered_texts_and_flipped_twins_do_not(lm, steer, held_out, tmp_path) -> None:
    written = {record.feature: record for record in steer(PLAINLY).write(range(2 * NUM))}
    found = _counted(lm, SetPool(written, seed=0), held_out, tmp_path, PLAINLY)
    # Of 18 trials of a judge that tosses, so many are right once in 10,000 times.
    assert found[:NUM].mean() > 0.75
    # What a twin makes unlikely is to be had in others' sets alone.
    assert found[NUM:].mean() < 0.5


def test_a_transcoder_s_texts_are_steered_where_it_writes(lm, contexts, held_out, tmp_path) -> None:
    weight = find_unembedding(lm).weight.detach().float()
    rows = torch.nn.functional.normalize(weight[FIRST : FIRST + NUM] - weight.mean(dim=0), dim=1)
    cfg = TranscoderConfig(d_in=lm.d_model, d_out=lm.d_model, d_sae=2 * NUM, k=4)
    coder = Transcoder(cfg, hook_point="model.layers.0", source={"target_hook_point": HOOK})
    with torch.no_grad():
        coder.W_dec.copy_(torch.cat([rows, -rows]))
    start = np.ones(2 * NUM, dtype=np.float32)
    records = Steerer(lm, coder, PLAINLY, contexts=contexts, start=start).write(range(2 * NUM))
    assert _raised(lm, coder, records[0]) > 1
    found = _counted(lm, SetPool({r.feature: r for r in records}, seed=0), held_out, tmp_path, PLAINLY)
    assert found[:NUM].mean() > 0.75


class Reading:
    """Finds a description likelier after texts with its word, and the other way round with probability `flip`."""

    def __init__(self, flip: float = 0.0) -> None:
        self.flip, self.random = flip, random.Random(1)

    def __call__(self, body: dict[str, object], _: int) -> object:
        if "prompt" not in body:
            return WordJudge(self.flip)(body, 0)
        prompt = str(body["prompt"])
        text, _, described = prompt.rpartition("\n\nDescription:\n")
        word = re.search(r"w\d+", described)
        fits = bool(word) and (bool(re.search(rf"\b{word[0]}\b", text)) ^ (self.random.random() < self.flip))
        tokens = re.findall(r"\s+|\S+", prompt)
        numbers = [None, *[-1.0 if fits else -2.0 for _ in tokens[1:]]]
        logprobs = {"tokens": tokens, "token_logprobs": numbers, "top_logprobs": [None, *({} for _ in tokens[1:])]}
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1}
        return {"choices": [{"text": prompt, "finish_reason": "length", "logprobs": logprobs}], "usage": usage}


def _clean_pool(num: int) -> SetPool:
    """The sets of `_pool`, and clean texts of no feature's word."""
    pool, plain = _pool(num), SteeredConfig().set_size
    made = {feature: SteeredTexts(feature=feature, texts=pool.texts(feature)) for feature in range(num)}
    return SetPool(
        {**made, CLEAN: SteeredTexts(feature=CLEAN, texts=tuple(f"the of and {n}" for n in range(plain)))}, seed=0
    )


@pytest.mark.parametrize("flip", [0.0, 0.3], ids=["honest", "noisy"])
def test_noisy_reader_of_labels_gains_its_closed_form(held_out, tmp_path, flip: float) -> None:
    scorer, judge = InterventionReader(_clean_pool(10), LLMConfig(model="stub")), InProcess(Reading(flip))
    scores, controls, ledger = _score(scorer, held_out, tmp_path, judge, _labels(10), num_controlled=2)
    # Each text once for each label, however many features share it, and the one by which it was seen that the judge reads.
    assert ledger.num_sent == len(judge.requests) == len({str(body["prompt"]) for body in judge.requests})
    assert sum(str(body["prompt"]).endswith(": w3") for body in judge.requests) >= 2 * SteeredConfig().set_size
    right = [verdict for score in scores for verdict in score.right]
    # Likelier after the steered text and not after the clean one.
    assert _is_binomial(sum(right), len(right), (1 - flip) ** 2)
    # Nats: one for each token of the label, spaces among them.
    tokens = len(re.findall(r"\s+|\S+", "x Makes more likely: w1"))
    mean = float(np.mean([score.gain for score in scores]))
    assert mean == pytest.approx(tokens * (1 - 2 * flip), abs=1e-9 if flip == 0 else 2.2)
    assert {(s.scorer, s.prompt_version, s.base_rate) for s in scores} == {
        ("intervention", "intervention_gain_v1", 0.5)
    }
    empty = [score for score in controls if score.labeler in {"control:empty", "control:random"}]
    assert {(score.gain, score.accuracy) for score in empty} == {(0.0, 0.0)}
    (summary, *_) = summarise_scores(scores, controls)
    assert summary["gain"] == pytest.approx(mean)
    assert compare_scores(scores, scores)[0].num_pieces == len(right)


def test_judge_that_reads_nothing_is_given_the_choice(held_out, tmp_path) -> None:
    judge = InProcess(lambda body, n: Fault(404) if "prompt" in body else WordJudge(0.0)(body, n))
    scorer = InterventionReader(_clean_pool(6), LLMConfig(model="stub"))
    scores, _, _ = _score(scorer, held_out, tmp_path, judge, _labels(6))
    assert {(s.prompt_version, s.accuracy, s.gain, s.reason) for s in scores} == {("intervention_v1", 1.0, None, None)}


def test_clean_texts_are_written_once_with_no_feature_turned(lm, sae, steer, tmp_path) -> None:
    found = steered_texts(steer(), [1], out=tmp_path, with_clean=True)
    assert len(found[CLEAN].texts) == CONFIG.set_size
    (again,) = (steered_texts(steer(), [1], out=tmp_path, with_clean=True)[CLEAN],)
    assert again == found[CLEAN]
    assert SetPool(found, seed=0).features == [1]
    still = TopKSAE(sae.cfg, hook_point=HOOK)
    with torch.no_grad():
        still.W_dec.zero_()
    assert steer(sae=still).write_clean().texts == found[CLEAN].texts
    other = steer(CONFIG.model_copy(update={"num_tokens": 3}))
    assert steered_texts(other, [1], out=tmp_path)[1].texts != found[1].texts


# The input side: features that fire on one token each.


@pytest.fixture(scope="module")
def reading(lm: LanguageModel) -> tuple[JumpReLUSAE, list[str]]:
    """A dictionary over embeddings whose feature i fires on one token alone, and those tokens' texts."""
    place = "model.embed_tokens"
    words = [" the", " and", " of"]
    ids = [lm.tokenizer(f"a{word}", add_special_tokens=False)["input_ids"][1:] for word in words]
    assert all(len(own) == 1 for own in ids), "words of the tiny tokenizer"
    rows = torch.nn.functional.normalize(lm.model.get_submodule(place).weight.detach().float(), dim=1)
    sae = JumpReLUSAE(JumpReLUConfig(d_in=lm.d_model, d_sae=len(words), target_l0=1), hook_point=place)
    weight = lm.model.get_submodule(place).weight.detach().float()
    with torch.no_grad():
        for feature, (token,) in enumerate(ids):
            sae.W_enc[:, feature] = rows[token]
            scores = weight @ rows[token]
            low, high = float(scores[token]), float(scores[torch.arange(len(scores)) != token].max())
            assert low > high
            sae.threshold[feature] = (low + high) / 2
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae, words


class Writer:
    """Writes the described word into sentences that should activate, and none of the known words into others."""

    def __init__(self, words: list[str], *, flip: float = 0.0) -> None:
        self.words, self.flip, self.random = words, flip, random.Random(2)

    def __call__(self, body: dict[str, object], _: int) -> str:
        found = re.search(r"word (\w+)", _user(body))
        own = f" {found[1]}" if found else ""
        plain = lambda n: f"b{n}"  # noqa: E731
        kinds = {
            kind: [
                plain(n) + (own if (kind == "activating") != (self.random.random() < self.flip) else "")
                for n in range(10)
            ]
            for kind in ("activating", "neutral")
        }
        return json.dumps(kinds)


def test_sentences_of_the_true_label_activate_and_of_others_do_not(lm, reading, held_out, tmp_path) -> None:
    sae, words = reading
    tester = InputTester(SentenceReader(lm, sae), lambda _: 0.0, LLMConfig(model="stub"))
    true = [Label(feature=f, labeler="llm:stub", label=f"word{word}") for f, word in enumerate(words)]
    judge = InProcess(Writer(words))
    scores, controls, ledger = _score(tester, held_out, tmp_path, judge, true, num_controlled=3)
    assert [(s.accuracy, s.f1, s.auprc, s.recall, s.base_rate) for s in scores] == [(1.0, 1.0, 1.0, 1.0, 0.5)] * 3
    assert {s.labeler for s in controls} == {"control:empty", "control:random", "control:shuffled"}
    assert {(s.accuracy, s.f1, s.auprc, s.reason) for s in controls} == {(0.0, 0.0, 0.5, None)}
    assert ledger.num_sent == len(judge.requests)
    assert all(len(s.right) == len(s.pieces) == 20 for s in scores)


def test_noisy_writer_scores_its_closed_form_and_weak_firings_count_as_none(lm, reading, held_out, tmp_path) -> None:
    sae, words = reading
    labels = [Label(feature=f, labeler="llm:stub", label=f"word{word}") for f, word in enumerate(words)]
    tester = InputTester(SentenceReader(lm, sae), lambda _: 0.0, LLMConfig(model="stub"))
    judge = InProcess(Writer(words, flip=0.3))
    scores, _, _ = _score(tester, held_out, tmp_path, judge, labels)
    right = [verdict for score in scores for verdict in score.right]
    assert _is_binomial(sum(right), len(right), 0.7)
    assert all(score.low - 1e-9 <= score.auprc <= score.high + 1e-9 for score in scores)
    (tmp_path / "b").mkdir()
    high = InputTester(SentenceReader(lm, sae), lambda _: 1e6, LLMConfig(model="stub"))
    judge = InProcess(Writer(words))
    scores, _, _ = _score(high, held_out, tmp_path / "b", judge, labels)
    assert {(score.accuracy, score.recall, score.auprc) for score in scores} == {(1.0, 0.0, 0.5)}


def test_too_few_sentences_are_asked_for_again_and_then_fail(lm, reading) -> None:
    tester = InputTester(SentenceReader(lm, reading[0]), lambda _: 0.0, LLMConfig(model="stub"))
    from saekit.labelling import Answer, ChatReply

    label = Label(feature=0, labeler="x", label="y")
    text = json.dumps({"activating": ["a"] * 10, "neutral": ["b"] * 9})
    reply = ChatReply(text=text, finish_reason="stop", input_tokens=1, output_tokens=1)
    answer = Answer(request=tester.request(label, 0), reply=reply)
    assert not tester.is_usable(label, answer)
    score = tester.score(label, [answer])
    assert (score.accuracy, score.auprc, score.num_unparsed, score.reason) == (None, None, 20, "no usable answer")


def test_the_preset_has_the_published_numbers() -> None:
    config = LabelConfig.parse({"preset": "paper_output_centric", "llm": {"model": "m", "steered": {"num_trials": 5}}})
    assert config.llm is not None
    steered = config.llm.steered
    assert config.llm.scorers == ("input", "output")
    assert steered.prompts == ("The explanation is simple:", "I think", "We")
    assert (steered.match, steered.kl_targets, steered.set_size) == ("clamp", (0.25, 0.5, -0.25, -0.5), 12)
    assert (steered.num_tokens, steered.temperature, steered.num_sets) == (25, 0.75, 3)
    assert (steered.num_trials, config.llm.input_test.num_sentences) == (5, 5)
    assert LabelConfig.parse(config.to_dict()) == config
    assert "batch_rows" not in str(config.identity())
    published = OutputJudge(_pool(5), config.llm)
    label = Label(feature=0, labeler="x", label="short", description="the whole description", promotes="p")
    asked = published.request(label, 0)
    assert asked.user.startswith("Description: the whole description\n\nSet 1\n")
    assert list(asked.schema["required"]) == ["reason", "set"]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs numbers other than 0"):
        SteeredConfig.parse({"kl_targets": [0.0]})
