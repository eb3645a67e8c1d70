"""What every step keeps: unit decoder rows, projected gradients, schedules, counters, and the reduction over processes."""

import copy
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from saekit.errors import NonFiniteError
from saekit.sae import SAE, JumpReLUConfig, Normalization, TopKConfig, build_sae
from saekit.training import TrainConfig, optim
from saekit.training.axis import Axis
from saekit.training.dead import DeadFeatures, default_dead_after
from saekit.training.fused_adam import FusedAdam
from saekit.training.optim import GradientClip, build_optimizer, project_decoder_gradient
from saekit.training.run import TrainRun
from saekit.training.schedule import default_lr, lr_factor
from saekit.training.start import estimate_normalization, read_sample, scale_encoder

TOPK = TopKConfig(d_in=16, d_sae=40, k=3)
JUMPRELU = JumpReLUConfig(d_in=16, d_sae=40, target_l0=3, bandwidth=0.3)


def make_run(
    planted: ModuleType, cfg: TopKConfig | JumpReLUConfig, config: TrainConfig, *, scale: float = 1.0
) -> TrainRun:

    source = planted.PlantedSource(batch_size=config.batch_size, scale=scale)
    normalization = estimate_normalization(read_sample(source, 2048))
    sae = build_sae(cfg, seed=3)
    if cfg is JUMPRELU:
        sae.get_parameter("threshold").data.fill_(1.0)
    return TrainRun(sae, source, config, normalization=normalization)


def check_rows_stay_unit(planted: ModuleType, cfg: TopKConfig | JumpReLUConfig) -> None:
    run = make_run(planted, cfg, TrainConfig(num_tokens=5120, batch_size=256, lr=1e-2))
    for _ in range(20):
        run.train_step()
        torch.testing.assert_close(run.sae.W_dec.detach().norm(dim=1), torch.ones(40), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cfg", [TOPK, JUMPRELU], ids=["topk", "jumprelu"])
def test_decoder_rows_have_unit_norm_after_every_step(planted: ModuleType, cfg: TopKConfig | JumpReLUConfig) -> None:
    check_rows_stay_unit(planted, cfg)


def _along_the_other_axis(self: SAE) -> None:
    self.W_dec.data = nn.functional.normalize(self.W_dec.data, dim=0)


def _not_at_all(self: SAE) -> None:
    pass


@pytest.mark.parametrize("mutant", [_along_the_other_axis, _not_at_all])
def test_wrong_normalisation_would_be_seen(
    planted: ModuleType, mutant: Callable[[SAE], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SAE, "normalize_decoder", mutant)
    monkeypatch.setattr(
        optim, "FusedAdam", lambda *groups, **options: FusedAdam(*groups, **(options | {"unit_rows": ()}))
    )
    with pytest.raises(AssertionError):
        check_rows_stay_unit(planted, TOPK)


@pytest.mark.parametrize(("optimizer", "times"), [("adam", 0), ("signum", 0), ("muon", 1)])
def test_rows_are_made_unit_once_a_step(
    planted: ModuleType, optimizer: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.parse({"num_tokens": 960, "batch_size": 96, "optimizer": optimizer})
    run = make_run(planted, TOPK, config)
    normalize, calls = SAE.normalize_decoder, []

    def note(self: SAE) -> None:
        calls.append(1)
        normalize(self)

    monkeypatch.setattr(SAE, "normalize_decoder", note)
    run.train_step()
    assert len(calls) == times
    before = run.sae.W_dec.detach().clone()
    run.objective.settle()
    # A second pass would have moved rows by no more than a rounding.
    torch.testing.assert_close(run.sae.W_dec.detach(), before, atol=0.0, rtol=3e-7)


def test_projected_gradient_is_orthogonal_to_each_row_and_else_unchanged() -> None:
    W_dec = nn.Parameter(nn.functional.normalize(torch.randn(9, 5, dtype=torch.float64), dim=1))
    gradient = torch.randn(9, 5, dtype=torch.float64)
    W_dec.grad = gradient.clone()
    project_decoder_gradient(W_dec)
    assert (W_dec.grad * W_dec).sum(1).abs().max() < 1e-12
    removed = gradient - W_dec.grad
    torch.testing.assert_close(removed, (removed * W_dec).sum(1, keepdim=True) * W_dec.detach())


def test_step_is_clipped_to_the_whole_projected_norm(planted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused pass moves the weights as projection, clipping, Adam and renormalisation one after the other do."""
    run = make_run(planted, TOPK, TrainConfig(num_tokens=2560, batch_size=256))
    run.train_step()
    run.clip.mean = 1e-4
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    plain = {name: nn.Parameter(run.parameters[name].detach().clone()) for name in names}
    adam = torch.optim.Adam([{"params": [value], "name": name, "peak_lr": 1.0} for name, value in plain.items()])
    # A copy: loading shares the moments with the optimizer that they are of.
    adam.load_state_dict(
        copy.deepcopy(run.optimizer.state_dict()) | {"param_groups": adam.state_dict()["param_groups"]}
    )
    taken = run.optimizer.step

    def step() -> None:
        for group, other in zip(adam.param_groups, run.optimizer.param_groups, strict=True):
            group["lr"], group["betas"] = other["lr"], other["betas"]
        for name, value in plain.items():
            grad = run.parameters[name].grad
            assert grad is not None
            value.grad = grad.clone()
        project_decoder_gradient(plain["W_dec"])
        before = torch.stack([value.grad.norm() for value in plain.values() if value.grad is not None]).norm()
        norms.append(float(before))
        for value in plain.values():
            assert value.grad is not None
            value.grad.mul_(2.0 * 1e-4 / before)
        adam.step()
        plain["W_dec"].data = nn.functional.normalize(plain["W_dec"].data, dim=1)
        taken()

    norms: list[float] = []
    monkeypatch.setattr(run.optimizer, "step", step)
    figures = run.train_step()
    assert figures.gradient_norm == pytest.approx(norms[0], rel=1e-5)
    assert figures.gradient_norm > 2e-4
    for name, value in plain.items():
        torch.testing.assert_close(run.parameters[name].detach(), value.detach(), atol=1e-6, rtol=1e-5)


def test_clip_limits_the_whole_norm_to_a_multiple_of_the_usual_one() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2, 2))}

    def with_norm(norm: float) -> None:
        parameters["a"].grad = torch.tensor([0.6, 0.0, 0.0]) * norm
        parameters["b"].grad = torch.tensor([[0.0, 0.8], [0.0, 0.0]]) * norm

    def norm_now() -> float:
        return float(torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm())

    clip = GradientClip(2.0)
    with_norm(5.0)
    assert float(clip.apply(parameters)) == pytest.approx(5.0)
    assert norm_now() == pytest.approx(5.0)
    clip.update(5.0)
    with_norm(100.0)
    assert float(clip.apply(parameters)) == pytest.approx(100.0)
    assert norm_now() == pytest.approx(10.0)
    clip.update(100.0)
    assert clip.mean == pytest.approx(5.0 + (10.0 - 5.0) / 20)
    with_norm(1.0)
    clip.apply(parameters)
    assert norm_now() == pytest.approx(1.0)
    off = GradientClip(None)
    for norm in (1.0, 1000.0):
        with_norm(norm)
        off.apply(parameters)
        assert norm_now() == pytest.approx(norm)
        off.update(norm)


def test_fused_adam_on_a_transposed_view_equals_plain_adam() -> None:
    config = TrainConfig(num_tokens=10)
    values = torch.randn(6, 4)
    transposed, plain = nn.Parameter(values.clone().T), nn.Parameter(values.T.contiguous())
    fused = build_optimizer({"W_enc": transposed}, config, lr=0.1)
    other = torch.optim.Adam([plain], lr=0.1, betas=config.adam_betas)
    for step in range(5):
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        transposed.grad, plain.grad = gradient.T, gradient.T.contiguous()
        fused.step()
        other.step()
    assert not transposed.is_contiguous()
    torch.testing.assert_close(transposed.detach(), plain.detach())


def test_learning_rate_rises_stays_and_falls_to_its_ends() -> None:
    config = TrainConfig(num_tokens=100_000, batch_size=1000, warmup_fraction=0.1, decay_fraction=0.2)
    factors = [lr_factor(step, config) for step in range(config.num_steps)]
    assert config.num_steps == 100
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] == pytest.approx(10 / 11)
    assert factors[10:81] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 / 20)
    assert all(factor > 0 for factor in factors)


def test_warmup_is_at_most_a_thousand_steps() -> None:
    config = TrainConfig(num_tokens=10**9, batch_size=1000, warmup_fraction=0.1)
    assert lr_factor(998, config) < 1.0
    assert lr_factor(1000, config) == 1.0


def test_schedules_without_warmup_and_decay_are_flat() -> None:
    config = TrainConfig(num_tokens=1000, batch_size=100, warmup_fraction=0, decay_fraction=0)
    assert {lr_factor(step, config) for step in range(10)} == {1.0}


@pytest.mark.parametrize(
    ("d_sae", "num_steps", "expected"),
    [(2**14, 10**6, 2e-4), (2**14, 36_000, 2e-4), (2**14, 9_000, 4e-4), (2**14, 10, 1.2e-3), (2**12, 10**6, 4e-4)],
)
def test_default_learning_rate(d_sae: int, num_steps: int, expected: float) -> None:
    assert default_lr(d_sae, num_steps) == pytest.approx(expected)


class Alike(Axis):
    """An axis whose other processes do the same as this one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def sum(self, value: Tensor, purpose: str = "figures") -> Tensor:
        return value * self.size

    def any(self, flags: Tensor, purpose: str = "figures") -> Tensor:
        return flags


def check_dead_after_global_tokens(planted: ModuleType, processes: int) -> None:
    """A feature silent on every process is dead after dead_after_tokens of all processes together."""
    config = TrainConfig(num_tokens=5120, batch_size=256, dead_after_tokens=1024, lr=1e-9)
    run = make_run(planted, TOPK, config)
    run.layout.data = Alike(processes)
    run.sae.b_enc.data[7] = -1e6
    steps = 0
    while run.train_step().dead_fraction == 0.0:
        steps += 1
        assert steps < 10
    assert (steps + 1) * config.batch_size == 1024
    assert run.dead.mask.nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("processes", [1, 4])
def test_dead_features_are_counted_in_tokens_of_all_processes(planted: ModuleType, processes: int) -> None:
    check_dead_after_global_tokens(planted, processes)


def test_counting_tokens_of_one_process_would_be_seen(planted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = DeadFeatures.after
    monkeypatch.setattr(DeadFeatures, "after", lambda self, fired, num_tokens: right(self, fired, num_tokens // 4))
    with pytest.raises(AssertionError):
        check_dead_after_global_tokens(planted, 4)


def test_a_feature_that_fires_again_is_alive() -> None:
    dead = DeadFeatures(3, 100, torch.device("cpu"))
    never, second = torch.zeros(3, dtype=torch.bool), torch.tensor([False, True, False])
    dead.take(dead.after(never, 60)[0])
    dead.take(dead.after(second, 60)[0])
    assert dead.mask.tolist() == [True, False, True]
    dead.take(dead.after(second.logical_not(), 10)[0])
    assert dead.silent_tokens.tolist() == [0, 10, 0]


def test_dead_after_tokens_default_follows_the_length_of_training() -> None:
    assert default_dead_after(TrainConfig(num_tokens=10**9)) == 10_000_000
    assert default_dead_after(TrainConfig(num_tokens=10**6)) < 10**6 / 5
    assert default_dead_after(TrainConfig(num_tokens=10**6, dead_after_tokens=5)) == 5


def test_auxk_is_off_until_a_feature_is_dead_and_revives_it(planted: ModuleType) -> None:
    config = TrainConfig(num_tokens=40_960, batch_size=256, dead_after_tokens=512, lr=3e-3)
    run = make_run(planted, TOPK, config)
    first = run.train_step()
    assert first.auxiliary == 0.0
    assert first.loss == first.fvu
    run.sae.b_enc.data[:10] = -1.0
    figures = [run.train_step() for _ in range(150)]
    assert max(figure.dead_fraction for figure in figures) > 0.1
    assert any(figure.auxiliary > 0 for figure in figures)
    assert figures[-1].dead_fraction < 0.1


@pytest.mark.parametrize("cfg", [TOPK, JUMPRELU], ids=["topk", "jumprelu"])
def test_fvu_curve_does_not_depend_on_the_scale_of_the_activations(
    planted: ModuleType, cfg: TopKConfig | JumpReLUConfig
) -> None:
    config = TrainConfig(num_tokens=7680, batch_size=256)
    curves = []
    for scale in (1.0, 1024.0, 0.001):
        run = make_run(planted, cfg, config, scale=scale)
        curves.append([run.train_step().fvu for _ in range(30)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.parametrize("cfg", [TOPK, JUMPRELU], ids=["topk", "jumprelu"])
def test_nan_in_a_batch_names_the_step(planted: ModuleType, cfg: TopKConfig | JumpReLUConfig) -> None:
    run = make_run(planted, cfg, TrainConfig(num_tokens=2560, batch_size=256))
    run.source.nan_at = 2  # type: ignore[attr-defined]  # the planted source's own switch
    run.train_step()
    run.train_step()
    with pytest.raises(NonFiniteError, match=r"training step 3: 1 of 256 activations in the batch have NaN or Inf"):
        run.train_step()


def test_loss_that_diverges_names_the_step_and_the_remedy(planted: ModuleType) -> None:
    run = make_run(planted, TOPK, TrainConfig(num_tokens=2560, batch_size=256, lr=0.5))
    run.train_step()
    run.sae.W_enc.data[0, 0] = 1e30
    with pytest.raises(NonFiniteError, match=r"training step 2: the loss is not finite, .* lower lr \(now 0.5\)"):
        run.train_step()


def test_sample_is_read_without_moving_the_source(planted: ModuleType) -> None:
    source = planted.PlantedSource(batch_size=64)
    source.position = 5
    sample = read_sample(source, 100)
    assert sample.shape == (128, 16)
    assert torch.equal(source.next_batch(), sample[:64])


def test_normalisation_is_that_of_the_sample() -> None:
    x = 3.0 * torch.randn(500, 6) + 7.0
    found = estimate_normalization(x)
    centred = x.double() - x.double().mean(0)
    expected = Normalization.from_moments(
        x.double().mean(0),
        mean_norm_centred=float(centred.norm(dim=1).mean()),
        mean_square_centred=float(centred.square().sum(1).mean()),
    )
    torch.testing.assert_close(found.mean, expected.mean)
    assert found.scale == pytest.approx(expected.scale)
    assert found.total_variance == pytest.approx(expected.total_variance)
    x[3, 2] = float("inf")
    with pytest.raises(NonFiniteError, match="1 of the first 500 activations have NaN or Inf"):
        estimate_normalization(x)


@pytest.mark.parametrize("cfg", [TOPK, JUMPRELU], ids=["topk", "jumprelu"])
def test_scaled_encoder_reconstructs_with_the_best_multiple(cfg: TopKConfig | JumpReLUConfig) -> None:
    sae = build_sae(cfg, seed=1)
    if cfg is JUMPRELU:
        sae.get_parameter("threshold").data.fill_(0.8)
    x = 2.0 * torch.randn(3000, 16)
    before = sae(x).x_hat.detach()
    expected = float((before * x).sum() / before.square().sum())
    assert scale_encoder(sae, x) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(sae(x).x_hat.detach(), expected * before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("num_steps", "memory"), [(10, 20), (300, 60), (36_000, 1000)], ids=["no less", "a fifth", "no more"]
)
def test_second_moments_remember_a_fifth_of_training(num_steps: int, memory: float) -> None:
    config = TrainConfig(num_tokens=num_steps * 64, batch_size=64)
    assert config.adam_betas == (0.9, pytest.approx(1 - 1 / memory))
    assert TrainConfig(num_tokens=64, batch_size=64, betas=(0.5, 0.6)).adam_betas == (0.5, 0.6)
