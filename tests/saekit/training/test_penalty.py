"""Loss and gradients of penalised SAEs against dense autograd in float64, and the L0 that their training ends at."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.sae import GatedConfig, GatedSAE, JumpReLUConfig, ReLUConfig, ReLUSAE, SAEConfig, build_sae
from saekit.training import SparsityConfig, TrainConfig, Trainer
from saekit.training.build import build_objective
from saekit.training.penalty import JumpReLUObjective, PenalizedObjective, ReLUObjective

D_IN, D_SAE, VARIANCE, BANDWIDTH, COEFFICIENT, TARGET = 7, 13, 5.0, 0.6, 0.3, 4.0
DEAD = torch.tensor([1, 4, 5, 9])
SHAPE: dict[str, object] = {"d_in": D_IN, "d_sae": D_SAE, "target_l0": TARGET}


def make(cfg: SAEConfig, *, dead_loss: str = "auxk") -> tuple[PenalizedObjective, dict[str, Tensor]]:
    """An objective with random weights, and copies of its parameters for a dense formula of one's own."""
    generator = torch.Generator().manual_seed(4)
    sae = build_sae(cfg).double()
    for name, parameter in sae.named_parameters():
        drawn = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data.copy_(0.1 + drawn.abs() if name == "threshold" else 0.5 * drawn)
    sparsity = {"dead_loss": dead_loss, "pre_act_coefficient": 0.02, "start_factor": 1.0}
    config = TrainConfig(num_tokens=1000, k_aux=2, sparsity=SparsityConfig.parse(sparsity))
    objective = build_objective(sae, config, total_variance=VARIANCE)
    assert isinstance(objective, PenalizedObjective)
    copies = {
        name: parameter.detach().clone().requires_grad_() for name, parameter in objective.trained_parameters().items()
    }
    return objective, copies


def batch(num_tokens: int = 11) -> Tensor:
    return torch.randn(num_tokens, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def dense_auxk(p: dict[str, Tensor], x: Tensor, error: Tensor) -> Tensor:
    residual, is_dead = error.detach(), torch.zeros(D_SAE, dtype=torch.bool)
    is_dead[DEAD] = True
    z = ((x - p["b_dec"]).detach() @ p["W_enc"] + p["b_enc"]).masked_fill(~is_dead, -torch.inf)
    places = z.topk(2, dim=1).indices
    acts = torch.zeros_like(z).scatter(1, places, z.gather(1, places).relu())
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    return (residual - acts @ p["W_dec"]).square().sum(1).mean() / variance / 32


def assert_same_step(
    objective: PenalizedObjective, copies: dict[str, Tensor], x: Tensor, dead: Tensor, expected: Tensor
) -> None:
    result = objective(x, dead, COEFFICIENT)
    torch.testing.assert_close(result.loss, expected)
    (3.0 * result.loss).backward()
    (3.0 * expected).backward()
    for name, parameter in objective.trained_parameters().items():
        found, wanted = parameter.grad, copies[name].grad
        assert found is not None, name
        wanted = torch.zeros_like(found) if wanted is None else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=f"gradient of {name}")


@pytest.mark.parametrize("dead", [DEAD, DEAD[:0]], ids=["dead", "none-dead"])
@pytest.mark.parametrize("is_norm_weighted", [True, False], ids=["norm-weighted", "plain"])
@pytest.mark.parametrize(("p_end", "progress"), [(1.0, 0.9), (0.4, 0.1), (0.4, 0.6), (0.4, 1.0)])
def test_relu_step_equals_dense_autograd(is_norm_weighted: bool, p_end: float, progress: float, dead: Tensor) -> None:
    objective, p = make(ReLUConfig.parse(SHAPE | {"p_end": p_end, "is_norm_weighted": is_norm_weighted}))
    assert isinstance(objective, ReLUObjective)
    objective.progress = progress
    objective.penalty_ratio.fill_(1.0 if p_end == 1.0 else 1.7)
    x = batch()
    acts = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    error = x - acts @ p["W_dec"] - p["b_dec"]
    weighted = acts * p["W_dec"].norm(dim=1) if is_norm_weighted else acts
    exponent = {0.9: 1.0, 0.1: 1.0, 0.6: 0.7, 1.0: 0.4}[progress]
    positive = weighted[weighted > 0]
    size = positive if exponent == 1.0 else (positive + 0.01) ** exponent - 0.01**exponent
    ratio = 1.0 if p_end == 1.0 else 1.7
    expected = error.square().sum(1).mean() / VARIANCE + COEFFICIENT * ratio * size.sum() / len(x)
    if len(dead):
        expected = expected + dense_auxk(p, x, error)
    assert_same_step(objective, p, x, dead, expected)


@pytest.mark.parametrize("dead", [DEAD, DEAD[:0]], ids=["dead", "none-dead"])
def test_gated_step_equals_dense_autograd(dead: Tensor) -> None:
    objective, p = make(GatedConfig.parse(SHAPE))
    x = batch()
    inner = (x - p["b_dec"]) @ p["W_enc"]
    gate = inner + p["b_enc"]
    acts = (p["r_mag"].exp() * inner + p["b_mag"]).relu() * (gate > 0)
    error = x - acts @ p["W_dec"] - p["b_dec"]
    frozen = x - gate.relu() @ p["W_dec"].detach() - p["b_dec"].detach()
    expected = (error.square().sum(1).mean() + frozen.square().sum(1).mean()) / VARIANCE
    expected = expected + COEFFICIENT * gate.relu().sum(1).mean()
    if len(dead):
        expected = expected + dense_auxk(p, x, error)
    assert_same_step(objective, p, x, dead, expected)


def test_gated_auxiliary_term_leaves_the_decoder_alone() -> None:
    """With all magnitudes at 0 only the gates' terms are left, and their decoder is a constant."""
    objective, _ = make(GatedConfig.parse(SHAPE))
    assert isinstance(objective.sae, GatedSAE)
    objective.sae.b_mag.data.fill_(-100.0)
    objective(batch(), DEAD[:0], COEFFICIENT).loss.backward()
    assert objective.sae.W_dec.grad is not None
    assert objective.sae.W_enc.grad is not None
    assert not objective.sae.W_dec.grad.any()
    assert objective.sae.W_enc.grad.abs().max() > 1e-3


def dense_jumprelu(p: dict[str, Tensor], x: Tensor, cfg: JumpReLUConfig, natural: float) -> tuple[Tensor, ...]:
    """Loss without dead terms, error and pre-activations; estimators as terms whose value is 0."""
    z = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    theta = p["log_threshold"].exp()
    above = z if cfg.ste_to_input else z.detach()
    slope = (
        ((z - theta).abs() < BANDWIDTH / 2).double() * ((above - above.detach()) - (theta - theta.detach())) / BANDWIDTH
    )
    acts = z * (z > theta) + theta.detach() * slope
    error = x - acts @ p["W_dec"] - p["b_dec"]
    active = (z > theta) + slope
    if cfg.sparsity == "tanh":
        penalty = COEFFICIENT * torch.tanh(4.0 * acts * p["W_dec"].norm(dim=1)).sum(1).mean()
    else:
        penalty = COEFFICIENT * active.sum(1).mean()
    if cfg.sparsity == "quadratic":
        penalty = penalty + natural / 4 * (2 / TARGET) * (active.sum(1) - TARGET).square().mean()
    return error.square().sum(1).mean() / VARIANCE + penalty, error, z


@pytest.mark.parametrize("dead", [DEAD, DEAD[:0]], ids=["dead", "none-dead"])
@pytest.mark.parametrize("sparsity", ["step", "tanh", "quadratic"])
@pytest.mark.parametrize("ste_to_input", [True, False], ids=["ste-to-input", "ste-to-threshold"])
@pytest.mark.parametrize("dead_loss", ["auxk", "pre_act", "pre_act_all"])
def test_jumprelu_step_equals_dense_autograd(sparsity: str, ste_to_input: bool, dead_loss: str, dead: Tensor) -> None:
    values = {"bandwidth": BANDWIDTH, "sparsity": sparsity, "ste_to_input": ste_to_input}
    cfg = JumpReLUConfig.parse(SHAPE | values)
    objective, p = make(cfg, dead_loss=dead_loss)
    assert isinstance(objective, JumpReLUObjective)
    x = batch()
    natural = float(p["log_threshold"].detach().exp().square().mean()) / VARIANCE
    expected, error, z = dense_jumprelu(p, x, cfg, natural)
    below = (p["log_threshold"].exp() - z).relu() * p["W_dec"].norm(dim=1)
    if dead_loss == "pre_act_all":
        expected = expected + 0.02 * below.sum(1).mean()
    elif len(dead) and dead_loss == "pre_act":
        expected = expected + 0.02 * below[:, dead].sum(1).mean()
    elif len(dead):
        expected = expected + dense_auxk(p, x, error)
    assert_same_step(objective, p, x, dead, expected)


def test_annealed_penalty_keeps_its_size() -> None:
    """The ratio measured in one step makes the next step's Lp penalty as large as L1 would be."""
    objective, _ = make(ReLUConfig.parse(SHAPE | {"p_end": 0.3}))
    assert isinstance(objective, ReLUObjective)
    objective.progress = 0.8
    x = batch()
    code = objective.encode(objective.sae.encoder_input(x))
    objective.penalty(x, x, code, 1.0)
    objective.after_step()
    norms = objective.sae.W_dec.norm(dim=1)[code.indices]
    first = (code.values * norms).sum() / len(x)
    torch.testing.assert_close(objective.penalty(x, x, code, 1.0), first)


def test_free_decoder_rows_are_unit_only_at_the_end() -> None:
    objective, _ = make(ReLUConfig.parse(SHAPE))
    x = batch()
    before = objective.sae(x).x_hat
    objective.after_step()
    assert not objective.has_projected_decoder
    assert objective.sae.W_dec.norm(dim=1).sub(1).abs().max() > 0.1
    objective.finish()
    torch.testing.assert_close(objective.sae(x).x_hat, before)
    torch.testing.assert_close(objective.sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))


RECIPES = [
    pytest.param(ReLUConfig(d_in=16, d_sae=32, target_l0=2), 0.95, 0.4, id="relu"),
    pytest.param(ReLUConfig(d_in=16, d_sae=32, target_l0=2, p_end=0.3), 0.95, 0.2, id="relu-p-annealing"),
    pytest.param(GatedConfig(d_in=16, d_sae=32, target_l0=2), 0.95, 0.15, id="gated"),
    pytest.param(JumpReLUConfig(d_in=16, d_sae=32, target_l0=2, sparsity="tanh"), 0.9, 0.2, id="jumprelu-tanh"),
    pytest.param(
        JumpReLUConfig(d_in=16, d_sae=32, target_l0=2, sparsity="quadratic"), 0.9, 0.3, id="jumprelu-quadratic"
    ),
]


@pytest.mark.parametrize(("cfg", "recovery", "fvu"), RECIPES)
def test_planted_dictionary_is_recovered_at_the_asked_l0(
    planted: ModuleType, cfg: SAEConfig, recovery: float, fvu: float, tmp_path: Path
) -> None:
    source = planted.PlantedSource()
    view = planted.PlantedView(source, num_batches=40)
    sae = Trainer(build_sae(cfg), source, TrainConfig(num_tokens=256 * 220, batch_size=256), test=view).fit(tmp_path)
    assert planted.mean_max_cosine(sae.W_dec, source.directions) > recovery
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-6, rtol=0)
    output = sae(view.x)
    assert float((output.top_acts > 0).sum() / len(view.x)) == pytest.approx(2.0, rel=0.05)
    assert float(str(sae.source["fvu"])) < fvu
    # Calibration trims what the controller reached; it does not do the controller's work.
    assert float(str(sae.source["l0_before_calibration"])) == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize("cfg", [ReLUConfig(d_in=16, d_sae=32), GatedConfig(d_in=16, d_sae=32)], ids=["relu", "gated"])
def test_penalised_sae_without_a_target_is_refused(planted: ModuleType, cfg: SAEConfig) -> None:
    with pytest.raises(ConfigError, match=r"no target_l0, needs one to train a (ReLU|Gated) SAE"):
        Trainer(build_sae(cfg), planted.PlantedSource(), TrainConfig(num_tokens=100))


def test_relu_sae_is_what_the_config_builds() -> None:
    assert isinstance(build_sae(ReLUConfig(d_in=4, d_sae=8)), ReLUSAE)
