"""Micro-batches, averaged weights, schedules and optimizers: they change what they say and resume exactly."""

import io
import math
from types import ModuleType

import pytest
import torch
from torch import nn

from saekit.errors import ConfigError
from saekit.sae import (
    BatchTopKConfig,
    BatchTopKCrosscoderConfig,
    BatchTopKSAE,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    MLSAEConfig,
    ReLUConfig,
    ReLUCrosscoderConfig,
    SAEConfig,
    TopKConfig,
    build_sae,
)
from saekit.training import SparsityConfig, TrainConfig
from saekit.training.muon import Muon, orthogonalize
from saekit.training.run import TrainRun
from saekit.training.schedule import annealed_k, default_lr, lr_factor
from saekit.training.schedule_free import ScheduleFreeSignum
from saekit.training.start import normalization_of, read_sample

SHAPE: dict[str, object] = {"d_in": 16, "d_sae": 40}
# The two halves of what the planted source gives stand for two hook points.
SITES: dict[str, object] = {"d_in": 8, "num_sites": 2, "d_sae": 40}
CONFIGS: dict[str, SAEConfig] = {
    "topk": TopKConfig.parse(SHAPE | {"k": 3}),
    "batchtopk": BatchTopKConfig.parse(SHAPE | {"k": 3}),
    "matryoshka": MatryoshkaBatchTopKConfig.parse(SHAPE | {"k": 3}),
    "jumprelu": JumpReLUConfig.parse(SHAPE | {"target_l0": 3, "sparsity": "quadratic"}),
    "relu": ReLUConfig.parse(SHAPE | {"target_l0": 3, "p_end": 0.5, "p_start_fraction": 0.0}),
    "gated": GatedConfig.parse(SHAPE | {"target_l0": 3}),
    "crosscoder": BatchTopKCrosscoderConfig.parse(SITES | {"k": 3}),
    "crosscoder-relu": ReLUCrosscoderConfig.parse(SITES | {"target_l0": 3}),
    "mlsae": MLSAEConfig.parse(SITES | {"k": 3}),
}


def make_run(planted: ModuleType, cfg: SAEConfig, **changes: object) -> TrainRun:

    values: dict[str, object] = {"num_tokens": 200 * 96, "batch_size": 96, "lr": 3e-3, "dead_after_tokens": 192}
    config = TrainConfig.parse(values | changes)
    source = planted.PlantedSource(batch_size=96)
    sae = build_sae(cfg, seed=3)
    normalization = normalization_of(read_sample(source, 2048), sae)
    if "threshold" in dict(sae.named_parameters()):
        sae.get_parameter("threshold").data.fill_(1.0)
    else:
        sae.b_enc.data.fill_(-1.0)
    # Some features are silent, so that AuxK has work to do.
    sae.b_enc.data[:8] -= 3.5 if isinstance(cfg, ReLUConfig | ReLUCrosscoderConfig | GatedConfig) else 1.5
    return TrainRun(sae, source, config, normalization=normalization)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [13, 95])
def test_micro_batches_change_no_figure_and_no_weight(planted: ModuleType, kind: str, size: int) -> None:
    whole = make_run(planted, CONFIGS[kind])
    parts = make_run(planted, CONFIGS[kind], micro_batch_size=size)
    saw_auxk = False
    for _ in range(6):
        one, other = whole.train_step(), parts.train_step()
        for name in ("loss", "fvu", "auxiliary", "l0", "gradient_norm", "dead_fraction"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=2e-3, abs=1e-5), name
        saw_auxk |= one.auxiliary > 0
        assert torch.equal(whole.dead.silent_tokens, parts.dead.silent_tokens)
    assert saw_auxk
    for name, parameter in whole.sae.named_parameters():
        torch.testing.assert_close(parts.sae.get_parameter(name), parameter, rtol=2e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("share", [1.0, 0.02], ids=["enough", "few-positive"])
def test_parts_of_a_batch_keep_the_entries_that_the_whole_keeps(planted: ModuleType, share: float) -> None:
    run = make_run(planted, CONFIGS["batchtopk"])
    run.sae.b_enc.data.fill_(0.0 if share == 1.0 else -4.0)
    x = run.normalization.apply(run.source.next_batch())
    # One part is much louder than the others, and takes nearly all that is kept.
    x[:20] *= 5.0
    expected = run.objective.encode(run.sae.encoder_input(x)).values.sort().values
    smallest = run.objective.get_buffer("smallest_kept").clone()
    parts = x.split(20)
    run.objective.prepare(parts, torch.empty(0, dtype=torch.int64))
    found = torch.cat([run.objective.encode(run.sae.encoder_input(part)).values for part in parts]).sort().values
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(run.objective.get_buffer("smallest_kept"), smallest)


def test_micro_batches_need_less_memory_at_once(planted: ModuleType) -> None:
    largest = []
    for size in (None, 64):
        cfg = TopKConfig(d_in=16, d_sae=1024, k=3)
        run = make_run(planted, cfg, batch_size=512, micro_batch_size=size)
        run.source = planted.PlantedSource(batch_size=512)
        run.train_step()
        with torch.profiler.profile(profile_memory=True) as profile:
            run.train_step()
        largest.append(max(event.self_cpu_memory_usage for event in profile.events()))
    # Pre-activations of 512 tokens against those of 64, or a weight's own array.
    assert largest[0] >= 512 * 1024 * 4
    assert largest[1] <= largest[0] / 4


def resumed(planted: ModuleType, run: TrainRun, cfg: SAEConfig, **changes: object) -> TrainRun:
    """A new run in the state of `run`, through a file as a checkpoint would."""
    file = io.BytesIO()
    torch.save({"run": run.state_dict(), "source": run.source.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = make_run(planted, cfg, **changes)
    other.load_state_dict(state["run"])
    other.source.load_state_dict(state["source"])
    return other


OPTIONS: dict[str, dict[str, object]] = {
    "adam-ema": {"ema_decay": 0.9},
    "muon": {"optimizer": "muon", "decay": "cosine"},
    "signum": {"optimizer": "signum", "lr": 1e-3},
    "k-anneal": {"sparsity": {"k_start_factor": 4.0, "k_anneal_fraction": 0.08}},
    "micro": {"micro_batch_size": 40},
    "resample": {"resample": {"every_tokens": 384, "silent_tokens": 192, "sample_tokens": 960}, "ema_decay": 0.9},
}


def check_resume(planted: ModuleType, kind: str, changes: dict[str, object]) -> None:
    run = make_run(planted, CONFIGS[kind], **changes)
    for _ in range(6):
        run.train_step()
    other = resumed(planted, run, CONFIGS[kind], **changes)
    for _ in range(6):
        assert other.train_step() == run.train_step()
    for each in (run, other):
        each.average.take()
        each.objective.finish()
    assert run.sae.state_dict().keys() == other.sae.state_dict().keys()
    for name, value in run.sae.state_dict().items():
        assert torch.equal(other.sae.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["batchtopk", "relu", "gated", "jumprelu"])
@pytest.mark.parametrize("option", OPTIONS)
def test_resumed_run_goes_on_bit_for_bit(planted: ModuleType, kind: str, option: str) -> None:
    check_resume(planted, kind, OPTIONS[option])


@pytest.mark.parametrize("kind", ["crosscoder", "crosscoder-relu", "mlsae"])
@pytest.mark.parametrize("option", ["adam-ema", "signum"])
def test_resumed_run_of_several_hook_points_goes_on_bit_for_bit(planted: ModuleType, kind: str, option: str) -> None:
    check_resume(planted, kind, OPTIONS[option])


def test_average_is_that_of_the_weights_and_gives_them_back(planted: ModuleType) -> None:
    run = make_run(planted, CONFIGS["jumprelu"], ema_decay=0.8)
    expected = {name: p.detach().clone() for name, p in run.parameters.items()}
    for step in range(5):
        run.train_step()
        decay = min(0.8, (2 + step) / (11 + step))
        expected = {n: decay * expected[n] + (1 - decay) * p.detach() for n, p in run.parameters.items()}
    before = {name: value.clone() for name, value in run.objective.state_dict().items()}
    with run.average.taken():
        torch.testing.assert_close(run.sae.b_enc.detach(), expected["b_enc"])
        torch.testing.assert_close(run.sae.get_parameter("threshold").detach(), expected["log_threshold"].exp())
        torch.testing.assert_close(
            run.sae.W_dec.detach(), nn.functional.normalize(expected["W_dec"], dim=1), rtol=1e-5, atol=1e-6
        )
    for name, value in run.objective.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_without_an_average_the_weights_are_what_is_saved(planted: ModuleType) -> None:
    run = make_run(planted, CONFIGS["topk"])
    run.train_step()
    before = {name: value.clone() for name, value in run.sae.state_dict().items()}
    run.average.take()
    assert not run.average.is_on
    assert all(torch.equal(value, before[name]) for name, value in run.sae.state_dict().items())


def test_schedule_free_steps_are_those_of_the_paper() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = ScheduleFreeSignum([{"params": [parameter], "name": "b"}], lr=0.1, momentum=0.9)
    z = x = y = parameter.detach().clone()
    squares = 0.0
    for lr, gradient in [(0.05, [3.0, -1.0]), (0.1, [-2.0, 0.0]), (0.1, [0.1, 5.0])]:
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        squares += lr**2
        z = z - lr * parameter.grad.sign()
        x = x + lr**2 / squares * (z - x)
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(parameter.detach(), y)
        torch.testing.assert_close(optimizer.averages()["b"], x)


def test_schedule_free_rows_are_unit_in_every_sequence() -> None:
    W_dec = nn.Parameter(nn.functional.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1))
    optimizer = ScheduleFreeSignum([{"params": [W_dec], "name": "W_dec", "has_unit_rows": True}], lr=0.05)
    for step in range(4):
        W_dec.grad = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        for rows in (W_dec.detach(), optimizer.averages()["W_dec"], optimizer.state[W_dec]["z"]):
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("optimizer", ["adam", "muon", "signum"])
def test_free_decoder_rows_are_free_whatever_the_optimizer(planted: ModuleType, optimizer: str) -> None:
    run = make_run(planted, CONFIGS["relu"], optimizer=optimizer, lr=1e-2)
    for _ in range(5):
        run.train_step()
    assert float((run.sae.W_dec.norm(dim=1) - 1).abs().max().detach()) > 1e-3


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (5, 5)], ids=str)
def test_muon_sets_singular_values_to_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 30
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalize(matrix)
    singular = torch.diagonal(left.T @ made @ right.T)
    large = values > 0.1 * values.max()
    assert float(singular[large].min()) > 0.6
    assert float(singular[large].max()) < 1.3
    off = left.T @ made @ right.T - torch.diag(singular)
    assert off.abs().max() < 1e-10


def test_muon_moves_vectors_as_adam_does() -> None:
    first, second = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    muon = Muon([{"params": [first]}], lr=0.1)
    adam = torch.optim.Adam([second], lr=0.1)
    for step in range(5):
        gradient = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for parameter, optimizer in ((first, muon), (second, adam)):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(first.detach(), second.detach())


def test_muon_keeps_the_encoder_by_feature() -> None:
    W_enc = nn.Parameter(torch.randn(8, 3).T)
    W_enc.grad = torch.randn(8, 3).T
    Muon([{"params": [W_enc]}], lr=0.1).step()
    assert W_enc.T.is_contiguous()


@pytest.mark.parametrize(
    ("decay", "optimizer", "half"),
    [
        ("linear", "adam", 0.5),
        (None, "adam", 0.5),
        ("cosine", "adam", 0.5),
        ("constant", "adam", 1.0),
        (None, "signum", 1.0),
        ("linear", "signum", 0.5),
    ],
)
def test_learning_rate_falls_in_the_asked_shape(decay: str | None, optimizer: str, half: float) -> None:
    values = {"num_tokens": 1000, "batch_size": 10, "warmup_fraction": 0, "decay_fraction": 0.4}
    config = TrainConfig.parse(values | {"decay": decay, "optimizer": optimizer})
    factors = [lr_factor(step, config) for step in range(100)]
    assert factors[:61] == [1.0] * 61
    assert factors[80] == pytest.approx(half)
    quarter = {"linear": 0.75, "cosine": (1 + math.cos(math.pi / 4)) / 2, "constant": 1.0}
    assert factors[70] == pytest.approx(quarter[decay or ("constant" if half == 1.0 else "linear")])
    assert all(0 < factor <= 1 for factor in factors)


def test_k_falls_linearly_to_its_end() -> None:
    config = TrainConfig(num_tokens=1000, sparsity=SparsityConfig(k_start_factor=5.0, k_anneal_fraction=0.5))
    assert [annealed_k(4, 100, progress, config) for progress in (0.0, 0.25, 0.4999, 0.5, 1.0)] == [20, 12, 5, 4, 4]
    assert annealed_k(4, 10, 0.0, config) == 10
    assert annealed_k(4, 100, 0.0, TrainConfig(num_tokens=1000)) == 4


def test_annealed_k_is_what_a_step_uses(planted: ModuleType) -> None:
    sparsity = {"k_start_factor": 3.0, "k_anneal_fraction": 0.02}
    run = make_run(planted, CONFIGS["topk"], sparsity=sparsity, num_tokens=9600)
    run.sae.b_enc.data.fill_(5.0)
    l0 = [run.train_step().l0 for _ in range(4)]
    assert l0 == pytest.approx([9.0, 6.0, 3.0, 3.0])


def test_threshold_of_a_batchtopk_sae_follows_the_annealed_batches(planted: ModuleType) -> None:
    run = make_run(planted, CONFIGS["batchtopk"], sparsity={"k_start_factor": 3.0, "k_anneal_fraction": 0.1})
    for _ in range(150):
        run.train_step()
    assert isinstance(run.sae, BatchTopKSAE)
    x = run.normalization.apply(run.source.next_batch())
    assert float((run.sae.encode(x) > 0).sum(1).double().mean()) == pytest.approx(3.0, rel=0.25)


def test_default_rate_of_each_optimizer() -> None:
    assert default_lr(2**14, 10**6, "muon") == default_lr(2**14, 10**6)
    assert default_lr(2**14, 10**6, "signum") == pytest.approx(4e-5)


def test_two_averages_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="ema_decay with optimizer 'signum', needs one of them"):
        TrainConfig.parse({"num_tokens": 10, "optimizer": "signum", "ema_decay": 0.9})
