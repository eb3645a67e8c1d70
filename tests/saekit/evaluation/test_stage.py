"""The evaluate stage end to end on a tiny model: figures, nulls, artifacts, refusals, interruption."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.activations.store import ActivationStore
from saekit.activations.view import StoreView
from saekit.config import Config
from saekit.errors import ConfigError, NonFiniteError, SaekitError, StoreError
from saekit.evaluation import Evaluation, EvaluationConfig, evaluate, read_evaluation
from saekit.evaluation.definitions import METRICS
from saekit.manifest import read_manifest
from saekit.models import LanguageModel
from saekit.sae import SAE, JumpReLUConfig, JumpReLUSAE, TopKConfig, TopKSAE

Stores = Callable[..., ActivationStore]
Models = Callable[[str], LanguageModel]

CONFIG = EvaluationConfig(num_bootstrap=40, batch_tokens=64, num_fit_tokens=200)
LOSSES = {name for name in METRICS if name.startswith(("ce", "kl", "delta"))}


class _Spoken:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.done: dict[str, int] = {}

    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> "_SpokenTask":
        self.done[f"{name} of {total} {unit}"] = 0
        return _SpokenTask(self, f"{name} of {total} {unit}")

    def say(self, message: str) -> None:
        self.said.append(message)


class _SpokenTask:
    def __init__(self, progress: _Spoken, key: str) -> None:
        self._progress, self._key = progress, key

    def __enter__(self) -> "_SpokenTask":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, amount: int = 1, **_: float | str) -> None:
        self._progress.done[self._key] += amount


def identity_sae(d_in: int) -> SAE:
    """An SAE that writes every vector exactly: W_dec = [I; -I], k = d_in."""
    sae = TopKSAE(TopKConfig(d_in=d_in, d_sae=2 * d_in, k=d_in))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


@pytest.fixture(scope="module")
def evaluation(tiny_store: Stores, tiny_lm: Models) -> Evaluation:
    train, test = tiny_store().split(0.4)
    sae = TopKSAE(TopKConfig(d_in=32, d_sae=48, k=5), seed=1)
    return evaluate(sae, test, lm=tiny_lm("llama"), train=train, config=CONFIG)


def test_evaluate_equals_numpy_on_the_stored_activations(
    evaluation: Evaluation, tiny_store: Stores, tiny_sae: SAE
) -> None:
    store = tiny_store()
    _, test = store.split(0.4)
    x = test.read(test.indices).double().numpy()
    x_hat = tiny_sae(test.read(test.indices)).x_hat.detach().double().numpy()
    firings = (tiny_sae.encode(test.read(test.indices)) > 0).sum(0).numpy()
    variance = ((x - x.mean(0)) ** 2).sum()
    assert evaluation.num_tokens == test.num_tokens
    assert evaluation.fvu == pytest.approx(((x - x_hat) ** 2).sum() / variance, rel=1e-6)
    assert evaluation.l0 == 5.0
    assert evaluation.dead_fraction == pytest.approx((firings == 0).mean())
    assert evaluation.features is not None
    np.testing.assert_allclose(evaluation.features.density, firings / len(x), rtol=1e-6)
    massive = test.of_kind(3)
    m = massive.read(massive.indices).double().numpy()
    m_hat = tiny_sae(massive.read(massive.indices)).x_hat.detach().double().numpy()
    assert evaluation.num_massive == len(m) > 0
    assert evaluation.value("fvu_massive") == pytest.approx(
        ((m - m_hat) ** 2).sum() / ((m - x.mean(0)) ** 2).sum(), rel=1e-6
    )


def test_evaluate_has_every_metric_in_every_row(evaluation: Evaluation) -> None:
    assert [row.name for row in evaluation.rows] == ["sae", "mean", "pca", "random"]
    for row in evaluation.rows:
        assert set(row.metrics) == set(METRICS)
    undefined = {(row.name, name) for row in evaluation.rows for name, f in row.metrics.items() if f.value is None}
    # A random model's ablations may cost nothing; there is nothing to recover then.
    undefined = {(row, name) for row, name in undefined if "recovered" not in name}
    assert undefined == {("mean", "dead_fraction"), ("pca", "dead_fraction")}


def test_mean_row_reads_what_it_must(evaluation: Evaluation) -> None:
    assert evaluation.value("fvu", row="mean") == 1.0
    assert evaluation.value("fvu_massive", row="mean") == 1.0
    assert evaluation.value("l0", row="mean") == 0.0
    assert evaluation.value("ce_recovered_mean", row="mean") in {0.0, None}
    assert evaluation.value("kl_recovered_mean", row="mean") == 0.0
    assert evaluation.value("ce", row="mean") == evaluation.reference["ce_mean"]
    assert evaluation.value("kl", row="mean") == evaluation.reference["kl_mean"]


def test_pca_row_is_fitted_on_training_tokens(evaluation: Evaluation, tiny_store: Stores) -> None:
    train, test = tiny_store().split(0.4)
    fit, x = (view.read(view.indices).double().numpy() for view in (train, test))
    values, vectors = np.linalg.eigh(np.cov(fit.T))
    basis = vectors[:, np.argsort(-values)[:5]]
    centred = x - fit.mean(0)
    error = ((centred - centred @ basis @ basis.T) ** 2).sum()
    # 200 training tokens of about 300 are sampled, so the basis is close, not equal.
    assert evaluation.value("fvu", row="pca") == pytest.approx(error / ((x - x.mean(0)) ** 2).sum(), rel=0.1)
    assert evaluation.value("l0", row="pca") == 5.0


def test_intervals_hold_their_value_and_differences_are_paired(evaluation: Evaluation) -> None:
    for row in evaluation.rows:
        figure = row.metrics["fvu"]
        assert figure.low <= figure.value <= figure.high
        assert row.metrics["dead_fraction"].low is None
    assert evaluation.row("sae").difference == {}
    pca = evaluation.row("pca")
    assert pca.difference["fvu"].value == pytest.approx(evaluation.fvu - pca.metrics["fvu"].value)
    assert "dead_fraction" not in pca.difference


def test_histograms_hold_every_feature(evaluation: Evaluation) -> None:
    alive = 48 - round(evaluation.dead_fraction * 48)
    assert sum(evaluation.density.counts) == alive
    assert sum(evaluation.decoder_cosine.counts) == 48
    assert evaluation.density.edges[0] <= -math.log10(evaluation.num_tokens)
    assert evaluation.density.edges[-1] == 0.0
    for histogram in (evaluation.density, evaluation.decoder_cosine):
        assert len(histogram.edges) == len(histogram.counts) + 1


def test_identity_dictionary_loses_nothing(tiny_store: Stores, tiny_lm: Models) -> None:
    _, test = tiny_store("gpt2").split(0.4)
    found = evaluate(identity_sae(32), test, lm=tiny_lm("gpt2"), config=CONFIG)
    assert found.fvu == pytest.approx(0.0, abs=1e-10)
    assert found.value("fvu_massive") == pytest.approx(0.0, abs=1e-10)
    assert found.value("delta_ce") == pytest.approx(0.0, abs=1e-5)
    assert found.value("kl_recovered_zero") == pytest.approx(1.0, abs=1e-4)


def test_evaluate_does_not_depend_on_batch_sizes(
    evaluation: Evaluation, tiny_store: Stores, tiny_lm: Models, tiny_sae: SAE
) -> None:
    train, test = tiny_store().split(0.4)
    config = CONFIG.model_copy(update={"batch_tokens": 17, "batch_sequences": 3})
    found = evaluate(tiny_sae, test, lm=tiny_lm("llama"), train=train, config=config)
    for one, other in zip(found.rows, evaluation.rows, strict=True):
        for name in METRICS:
            value = other.metrics[name].value
            assert one.metrics[name].value == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5))


def test_evaluate_repeats_itself(evaluation: Evaluation, tiny_store: Stores, tiny_lm: Models, tiny_sae: SAE) -> None:
    train, test = tiny_store().split(0.4)
    found = evaluate(tiny_sae, test, lm=tiny_lm("llama"), train=train, config=CONFIG)
    assert found.to_dict() == evaluation.to_dict()


def test_evaluate_without_a_model_leaves_the_losses_out(tiny_store: Stores, tiny_sae: SAE) -> None:
    _, test = tiny_store().split(0.4)
    found = evaluate(tiny_sae, test, config=CONFIG)
    for row in found.rows:
        assert {name for name in LOSSES if row.metrics[name].value is None} == LOSSES
    assert set(found.reference.values()) == {None}
    assert found.num_loss_tokens == 0
    assert not any("CE" in line[0] for line in found.table().rows)


def test_evaluate_takes_jumprelu_and_restores_its_mode(tiny_store: Stores) -> None:
    train, test = tiny_store().split(0.4)
    sae = JumpReLUSAE(JumpReLUConfig(d_in=32, d_sae=48), seed=1).train()
    with torch.no_grad():
        sae.threshold.fill_(float(sae.pre_acts(train.read(train.indices)).quantile(0.9)))
    found = evaluate(sae, test, train=train, config=CONFIG)
    assert sae.training
    assert found.value("l0", row="random") == pytest.approx(found.l0, rel=0.25)
    assert found.value("l0", row="pca") == round(found.l0)


def test_null_rows_are_fitted_on_the_other_documents_by_default(
    evaluation: Evaluation, tiny_store: Stores, tiny_sae: SAE
) -> None:
    _, test = tiny_store().split(0.4)
    found = evaluate(tiny_sae, test, config=CONFIG)
    assert found.value("fvu", row="pca") == evaluation.value("fvu", row="pca")
    assert found.value("fvu", row="random") == evaluation.value("fvu", row="random")


def test_null_rows_are_left_out_with_a_word_when_there_is_nothing_to_fit_them_on(
    tiny_store: Stores, tiny_sae: SAE
) -> None:
    progress = _Spoken()
    found = evaluate(tiny_sae, tiny_store().view(), config=CONFIG, progress=progress)
    assert [row.name for row in found.rows] == ["sae", "mean"]
    assert any("pca, random" in message for message in progress.said)


def test_evaluate_says_when_documents_are_few_and_the_hook_point_is_another(tiny_store: Stores, tiny_sae: SAE) -> None:
    _, test = tiny_store().split(0.4)
    progress = _Spoken()
    tiny_sae.hook_point = "model.layers.7"
    evaluate(tiny_sae, test, config=CONFIG, progress=progress)
    assert any("intervals from fewer than 20 are too narrow" in message for message in progress.said)
    assert any("made for 'model.layers.7', it is evaluated at 'model.layers.1'" in m for m in progress.said)


def test_evaluate_reports_all_of_its_work(tiny_store: Stores, tiny_lm: Models, tiny_sae: SAE) -> None:
    train, test = tiny_store().split(0.4)
    progress = _Spoken()
    found = evaluate(tiny_sae, test, lm=tiny_lm("llama"), train=train, config=CONFIG, progress=progress)
    assert progress.done == {
        f"reconstruction of {found.num_tokens} tokens": found.num_tokens,
        f"model loss of {found.num_loss_tokens} tokens": found.num_loss_tokens,
        "decoder cosines of 48 features": 48,
    }


def test_evaluate_writes_a_stage_and_reads_it_the_next_time(
    tiny_store: Stores, tiny_sae: SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = tiny_store().split(0.4)
    first = evaluate(tiny_sae, test, train=train, config=CONFIG, out=tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert (manifest.stage, manifest.status) == ("evaluate", "complete")
    assert manifest.inputs["cache"] == tiny_store().sha256
    assert manifest.counts["num_tokens"] == first.num_tokens
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    assert read_evaluation(tmp_path).to_dict() == first.to_dict()
    monkeypatch.setattr("saekit.evaluation.stage._measure", None)
    assert evaluate(tiny_sae, test, train=train, config=CONFIG, out=tmp_path).to_dict() == first.to_dict()


@pytest.mark.parametrize("change", ["config", "weights", "split", "model"])
def test_evaluate_refuses_a_folder_of_something_else(
    tiny_store: Stores, tiny_lm: Models, tiny_sae: SAE, tmp_path: Path, change: str
) -> None:
    _, test = tiny_store().split(0.4)
    evaluate(tiny_sae, test, config=CONFIG, out=tmp_path)
    config, lm, message = (
        CONFIG,
        None,
        {"weights": "input sae", "split": "test tokens", "model": "input model"}.get(change),
    )
    if change == "config":
        config, message = CONFIG.model_copy(update={"seed": 5}), r"seed \(0 there, 5 asked\)"
    elif change == "weights":
        with torch.no_grad():
            tiny_sae.b_dec += 1e-3
    elif change == "split":
        _, test = tiny_store().split(0.4, seed=9)
    else:
        lm = tiny_lm("llama")
    with pytest.raises(ConfigError, match=message):
        evaluate(tiny_sae, test, lm=lm, config=config, out=tmp_path)


def _wrong_width(sae: SAE, test: StoreView, train: StoreView) -> dict[str, object]:
    return {"sae": TopKSAE(TopKConfig(d_in=16, d_sae=20, k=2))}


def _nan_weights(sae: SAE, test: StoreView, train: StoreView) -> dict[str, object]:
    with torch.no_grad():
        sae.b_dec[3] = torch.nan
    return {"sae": sae}


def _overlapping(sae: SAE, test: StoreView, train: StoreView) -> dict[str, object]:
    return {"train": train.store.view()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            _wrong_width,
            ConfigError,
            r"the SAE has d_in 16, 'model.layers.1' of cache .* has width 32; evaluate it where",
        ),
        (_nan_weights, NonFiniteError, "'SAE' reconstructs tokens as NaN or Inf"),
        (_overlapping, ConfigError, r"\d documents are in both the training and the test view"),
    ],
    ids=["width", "nan", "overlap"],
)
def test_evaluate_refuses_bad_input_in_one_line(
    tiny_store: Stores,
    tiny_sae: SAE,
    tmp_path: Path,
    change: Callable[[SAE, StoreView, StoreView], dict[str, object]],
    error: type[SaekitError],
    message: str,
) -> None:
    train, test = tiny_store().split(0.4)
    arguments = {"sae": tiny_sae, "view": test, "train": train, "config": CONFIG, "out": tmp_path / "out"}
    with pytest.raises(error, match=message) as caught:
        evaluate(**(arguments | change(tiny_sae, test, train)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_evaluate_refuses_another_model(tiny_store: Stores, tiny_lm: Models, tiny_sae: SAE, tmp_path: Path) -> None:
    _, test = tiny_store("llama").split(0.4)
    with pytest.raises(StoreError, match="fingerprint"):
        evaluate(tiny_sae, test, lm=tiny_lm("gpt2"), config=CONFIG, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [{"num_tokens": 0}, {"nulls": ["pls"]}, {"num_bootstraps": 3}, {"pca_components": 0}])
def test_evaluation_config_refuses_bad_values(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        EvaluationConfig.parse(bad)
    assert issubclass(EvaluationConfig, Config)


_SCRIPT = """
import contextlib, sys, time
from pathlib import Path
from saekit.activations.store import ActivationStore
from saekit.evaluation import EvaluationConfig, evaluate
from saekit.sae import load_sae_folder

class Stuck:
    def say(self, message): pass
    def advance(self, amount=1, **figures):
        print("working", flush=True)
        time.sleep(600)
    @contextlib.contextmanager
    def task(self, name, total, unit, done=0): yield self

_, test = ActivationStore.open(sys.argv[1]).split(0.4)
config = EvaluationConfig.model_validate_json(sys.argv[4])
evaluate(load_sae_folder(sys.argv[2]), test, config=config, out=sys.argv[3], progress=Stuck())
"""


def test_evaluate_goes_on_after_a_kill(tiny_store: Stores, tiny_sae: SAE, tmp_path: Path) -> None:
    store, out = tiny_store(), tmp_path / "out"
    tiny_sae.save(tmp_path / "sae")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, store.path, tmp_path / "sae", out, CONFIG.model_dump_json()],
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"working\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.status == "running"
    with pytest.raises(StoreError, match="has not finished"):
        read_evaluation(out)
    _, test = store.split(0.4)
    found = evaluate(tiny_sae, test, config=CONFIG, out=out)
    assert found.to_dict() == evaluate(tiny_sae, test, config=CONFIG).to_dict()
    assert json.loads((out / "evaluation.json").read_text())["num_tokens"] == test.num_tokens
