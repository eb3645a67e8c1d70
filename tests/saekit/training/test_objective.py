"""Loss and gradients of one step against dense autograd in float64, with estimators written out by hand."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.sae import SAE, BatchTopKConfig, BatchTopKSAE, JumpReLUConfig, JumpReLUSAE, SAEConfig, TopKConfig, TopKSAE
from saekit.training import SparsityConfig, TrainConfig
from saekit.training.build import build_objective
from saekit.training.objective import BatchTopKObjective, Objective, default_k_aux
from saekit.training.penalty import JumpReLUObjective

D_IN, D_SAE, VARIANCE, BANDWIDTH, COEFFICIENT = 7, 13, 5.0, 0.6, 0.3
DEAD = torch.tensor([1, 4, 5, 9])


def make(
    kind: str, *, k: int = 3, sparsity: str = "step", dead_loss: str = "auxk", k_aux: int = 2
) -> tuple[Objective, dict[str, Tensor]]:
    """An objective with random weights, and copies of its parameters for a dense formula of one's own."""
    generator = torch.Generator().manual_seed(4)
    sae: SAE
    if kind == "topk":
        sae = TopKSAE(TopKConfig(d_in=D_IN, d_sae=D_SAE, k=k), dtype=torch.float64)
    else:
        cfg = JumpReLUConfig.parse(
            {"d_in": D_IN, "d_sae": D_SAE, "target_l0": 4, "bandwidth": BANDWIDTH, "sparsity": sparsity}
        )
        sae = JumpReLUSAE(cfg, dtype=torch.float64)
        sae.threshold.data = 0.1 + torch.rand(D_SAE, dtype=torch.float64, generator=generator)
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    config = TrainConfig(
        num_tokens=1000,
        k_aux=k_aux,
        sparsity=SparsityConfig.parse({"dead_loss": dead_loss, "pre_act_coefficient": 0.02}),
    )
    objective = build_objective(sae, config, total_variance=VARIANCE)
    copies = {
        name: parameter.detach().clone().requires_grad_() for name, parameter in objective.trained_parameters().items()
    }
    return objective, copies


def batch(num_tokens: int = 11) -> Tensor:
    return torch.randn(num_tokens, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def dense_topk(p: dict[str, Tensor], x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Loss without AuxK and error, all [N, d_sae] arrays written out."""
    z = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    kept = torch.zeros_like(z).scatter(1, z.topk(k, dim=1).indices, 1.0)
    error = x - (z.relu() * kept) @ p["W_dec"] - p["b_dec"]
    return error.square().sum(1).mean() / VARIANCE, error


def dense_jumprelu(p: dict[str, Tensor], x: Tensor, sparsity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss without dead terms, error, and pre-activations; estimators as terms whose value is 0."""
    z = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    theta = p["log_threshold"].exp()
    near = ((z - theta).abs() < BANDWIDTH / 2).double()
    slope = -near * (theta - theta.detach()) / BANDWIDTH
    acts = z * (z > theta) + theta.detach() * slope
    error = x - acts @ p["W_dec"] - p["b_dec"]
    if sparsity == "step":
        penalty = ((z > theta) + slope).sum(1).mean()
    else:
        penalty = torch.tanh(4.0 * acts * p["W_dec"].norm(dim=1)).sum(1).mean()
    return error.square().sum(1).mean() / VARIANCE + COEFFICIENT * penalty, error, z


def dense_auxk(p: dict[str, Tensor], x: Tensor, error: Tensor, k_aux: int) -> Tensor:
    """AuxK by masking the whole dictionary; nothing but dead features' weights has a gradient."""
    residual, is_dead = error.detach(), torch.zeros(D_SAE, dtype=torch.bool)
    is_dead[DEAD] = True
    z = ((x - p["b_dec"]).detach() @ p["W_enc"] + p["b_enc"]).masked_fill(~is_dead, -torch.inf)
    places = z.topk(min(k_aux, len(DEAD)), dim=1).indices
    acts = torch.zeros_like(z).scatter(1, places, z.gather(1, places).relu())
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    return (residual - acts @ p["W_dec"]).square().sum(1).mean() / variance


def assert_same_gradients(objective: Objective, copies: dict[str, Tensor]) -> None:
    for name, parameter in objective.trained_parameters().items():
        expected = copies[name].grad
        found = parameter.grad
        assert found is not None, name
        torch.testing.assert_close(
            found,
            torch.zeros_like(found) if expected is None else expected,
            rtol=1e-9,
            atol=1e-12,
            msg=f"gradient of {name}",
        )


@pytest.mark.parametrize("dead", [DEAD, DEAD[:0]], ids=["dead", "none-dead"])
@pytest.mark.parametrize(
    ("k", "k_aux", "num_tokens"), [(3, 2, 11), (1, 1, 11), (D_SAE, 2, 11), (3, 50, 11), (3, 2, 1)], ids=str
)
def test_topk_step_equals_dense_autograd(k: int, k_aux: int, num_tokens: int, dead: Tensor) -> None:
    objective, p = make("topk", k=k, k_aux=k_aux)
    x = batch(num_tokens)
    result = objective(x, dead)
    expected, error = dense_topk(p, x, k)
    if len(dead) and num_tokens > 1:
        auxiliary = dense_auxk(p, x, error, k_aux)
        torch.testing.assert_close(result.auxiliary, auxiliary.detach())
        expected = expected + auxiliary / 32
    elif len(dead):
        # One token has no variance of its own to be measured by: only the reconstruction term is compared.
        expected, result = dense_topk(p, x, k)[0], objective(x, dead[:0])
    torch.testing.assert_close(result.loss, expected)
    (3.0 * result.loss).backward()
    (3.0 * expected).backward()
    assert_same_gradients(objective, p)


@pytest.mark.parametrize("dead", [DEAD, DEAD[:0]], ids=["dead", "none-dead"])
@pytest.mark.parametrize("sparsity", ["step", "tanh"])
@pytest.mark.parametrize("dead_loss", ["auxk", "pre_act"])
def test_jumprelu_step_equals_dense_autograd(sparsity: str, dead_loss: str, dead: Tensor) -> None:
    objective, p = make("jumprelu", sparsity=sparsity, dead_loss=dead_loss)
    x = batch()
    result = objective(x, dead, COEFFICIENT)
    expected, error, z = dense_jumprelu(p, x, sparsity)
    if len(dead) and dead_loss == "auxk":
        expected = expected + dense_auxk(p, x, error, 2) / 32
    elif len(dead):
        below = (p["log_threshold"].exp() - z).relu() * p["W_dec"].norm(dim=1)
        expected = expected + 0.02 * below[:, dead].sum(1).mean()
    torch.testing.assert_close(result.loss, expected)
    (3.0 * result.loss).backward()
    (3.0 * expected).backward()
    assert_same_gradients(objective, p)


def test_jumprelu_threshold_gradient_is_zero_outside_the_band_and_not_inside() -> None:
    objective, _ = make("jumprelu")
    assert isinstance(objective, JumpReLUObjective)
    x = batch()
    z = objective.sae.pre_acts(x)
    # Feature 0 far from all its pre-activations, feature 1 in the middle of them.
    objective.log_threshold.data[0] = (z[:, 0].max() + BANDWIDTH).log()
    objective.log_threshold.data[1] = z[:, 1].max().clamp_min(0.1).log()
    objective(x, DEAD[:0], COEFFICIENT).loss.backward()
    gradient = objective.log_threshold.grad
    assert gradient is not None
    assert gradient[0] == 0.0
    assert gradient[1] != 0.0


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_figures_of_a_step_are_counts_of_the_code(kind: str) -> None:
    objective, _ = make(kind)
    x = batch()
    result = objective(x, DEAD[:0], COEFFICIENT)
    objective.after_step()
    acts = objective.sae.encode(x) if kind == "jumprelu" else make(kind)[0].sae.encode(x)
    assert int(result.num_active) == int((acts > 0).sum())
    assert torch.equal(result.fired, (acts > 0).any(0))
    assert result.auxiliary == 0.0


def auxk_gradients(dead: Tensor) -> dict[str, Tensor]:
    """The gradient that the AuxK term adds to each parameter."""
    objective, _ = make("topk")
    gradients = []
    for indices in (dead, dead[:0]):
        objective.zero_grad()
        objective(batch(), indices).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in objective.trained_parameters().items() if p.grad is not None})
    return {name: gradients[0][name] - gradients[1][name] for name in gradients[0]}


def check_auxk_reaches_dead_and_only_dead() -> None:
    added = auxk_gradients(DEAD)
    live = torch.ones(D_SAE, dtype=torch.bool)
    live[DEAD] = False
    assert not added["W_enc"].T[live].any()
    assert not added["b_enc"][live].any()
    assert not added["W_dec"][live].any()
    assert not added["b_dec"].any()
    assert added["W_enc"].T[DEAD].abs().max() > 1e-6
    assert added["b_enc"][DEAD].abs().max() > 1e-6
    assert added["W_dec"][DEAD].abs().max() > 1e-6


def check_clipped_entries_pass_no_gradient() -> None:
    """All pre-activations are negative, so relu sets every selected entry to 0 and the encoder must not move."""
    objective, _ = make("topk")
    objective.sae.b_enc.data.fill_(-100.0)
    objective(batch(), DEAD[:0]).loss.backward()
    assert objective.sae.W_enc.grad is not None
    assert objective.sae.b_enc.grad is not None
    assert not objective.sae.W_enc.grad.any()
    assert not objective.sae.b_enc.grad.any()


def test_auxk_reaches_dead_features_encoder_and_no_live_feature() -> None:
    check_auxk_reaches_dead_and_only_dead()


def test_entries_clipped_by_relu_pass_no_gradient() -> None:
    check_clipped_entries_pass_no_gradient()


@dataclass
class _Code:
    values: Tensor
    indices: Tensor

    def __iter__(self) -> object:
        return iter((self.values, self.indices))


def _mutant_auxk(change: str) -> Callable[..., Tensor]:
    from saekit.sae.losses import auxk_loss

    def mutant(
        encoder_input: Tensor, residual: Tensor, weights: tuple[Tensor, Tensor, Tensor], **kwargs: object
    ) -> Tensor:
        W_enc, b_enc, W_dec = weights
        if change == "no-encoder-gradient":
            weights = (W_enc.detach(), b_enc.detach(), W_dec)
        loss: Tensor = auxk_loss(encoder_input, residual, weights, **kwargs)  # type: ignore[arg-type]
        return loss

    return mutant


def _leaky_auxk(
    encoder_input: Tensor, residual: Tensor, weights: tuple[Tensor, Tensor, Tensor], **kwargs: object
) -> Tensor:
    W_enc, b_enc, W_dec = weights
    acts = (encoder_input @ W_enc.T + b_enc).relu()
    return (residual - acts @ W_dec).square().sum() / len(residual)


def _ungated_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> _Code:
    values, indices = torch.topk(x @ W_enc + b_enc, k, dim=1)
    return _Code(values + (values.relu() - values).detach(), indices)


@pytest.mark.parametrize(
    ("name", "mutant", "check"),
    [
        pytest.param(
            "auxk_loss",
            _mutant_auxk("no-encoder-gradient"),
            check_auxk_reaches_dead_and_only_dead,
            id="auxk-drops-encoder",
        ),
        pytest.param("auxk_loss", _leaky_auxk, check_auxk_reaches_dead_and_only_dead, id="auxk-residual-not-detached"),
        pytest.param(
            "encode_topk", _ungated_topk, check_clipped_entries_pass_no_gradient, id="gradient-through-relu-zero"
        ),
    ],
)
def test_known_defects_would_be_seen(
    name: str, mutant: object, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import saekit.training.objective as objective_module
    from saekit.training import selection

    module = objective_module if hasattr(objective_module, name) else selection

    if mutant is _leaky_auxk:
        # The objective hands over a residual without a graph; the defect is to hand over the error itself.
        monkeypatch.setattr(Objective, "dead_loss", _leaky_dead_loss)
    else:
        monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        check()


def _leaky_dead_loss(
    self: Objective, encoder_input: Tensor, error: Tensor, dead: Tensor, code: object
) -> tuple[Tensor, Tensor]:
    if not len(dead):
        return error.new_zeros(()), error.new_zeros(())
    sae = self.sae
    loss = _leaky_auxk(encoder_input, error, (sae.W_enc.T[dead], sae.b_enc[dead], sae.W_dec[dead]))
    return loss.detach(), loss / 32


@pytest.mark.parametrize(("d_in", "k_aux"), [(768, 512), (576, 256), (2, 1), (1, 1), (4096, 2048)])
def test_default_k_aux_is_the_power_of_two_nearest_to_half_the_width(d_in: int, k_aux: int) -> None:
    assert default_k_aux(d_in) == k_aux


def test_architectures_without_an_objective_are_refused() -> None:
    config = TrainConfig(num_tokens=10)
    jumprelu = JumpReLUSAE(JumpReLUConfig(d_in=4, d_sae=8))
    with pytest.raises(ConfigError, match="no target_l0, needs one to train"):
        build_objective(jumprelu, config, total_variance=1.0)

    class Other(TopKSAE):
        def __init__(self) -> None:
            super().__init__(TopKConfig(d_in=4, d_sae=8, k=2))

    class Foreign(SAE):
        def __init__(self) -> None:
            super().__init__(SAEConfig(kind="foreign", d_in=4, d_sae=8))

        def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.long()

        def scale_thresholds(self, factor: float) -> None:
            pass

    assert isinstance(build_objective(Other(), config, total_variance=1.0), Objective)
    with pytest.raises(ConfigError, match="Foreign cannot be trained"):
        build_objective(Foreign(), config, total_variance=1.0)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(160, 2 - 0.9**10), (800, 2 - 0.95**10), (4_000, 2 - 0.99**10), (400_000, 2 - 0.99**10)],
    ids=["a mean of no less than 10 steps", "of 20 steps", "of 100 steps", "of no more than 100"],
)
def test_batchtopk_threshold_forgets_within_a_fortieth_of_training(num_steps: int, expected: float) -> None:
    sae = BatchTopKSAE(BatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=3), dtype=torch.float64)
    config = TrainConfig(num_tokens=num_steps * 8, batch_size=8)
    objective = build_objective(sae, config, total_variance=VARIANCE)
    assert isinstance(objective, BatchTopKObjective)
    for smallest in [1.0] * 120 + [2.0] * 10:
        objective.smallest_kept.fill_(smallest)
        objective.after_step()
    assert float(sae.threshold) == pytest.approx(expected)
