"""Matryoshka and transcoder objectives against dense autograd in float64, and recovery of a planted dictionary."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.sae import (
    MatryoshkaBatchTopKConfig,
    MatryoshkaTopKConfig,
    SAEConfig,
    Transcoder,
    TranscoderConfig,
    build_sae,
    load_sae_folder,
)
from saekit.training import TrainConfig, Trainer
from saekit.training.build import build_objective
from saekit.training.nested import group_codes
from saekit.training.objective import Code, Objective

D_IN, D_OUT, D_SAE, VARIANCE = 7, 5, 13, 5.0
DEAD = torch.tensor([1, 4, 5, 9])
GROUPS: dict[str, object] = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "k": 3,
    "group_fractions": [0.2, 0.3, 0.5],
    "group_weights": [2.0, 1.0, 1.0],
}
PREFIXES = [(3, 0.5), (6, 0.25), (13, 0.25)]


def make(cfg: SAEConfig) -> tuple[Objective, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    sae = build_sae(cfg).double()
    for parameter in sae.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    config = TrainConfig(num_tokens=1000, k_aux=2)
    objective = build_objective(sae, config, total_variance=VARIANCE)
    copies = {n: p.detach().clone().requires_grad_() for n, p in objective.trained_parameters().items()}
    return objective, copies


def batch(width: int = D_IN) -> Tensor:
    return torch.randn(11, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def dense_auxk(p: dict[str, Tensor], encoder_input: Tensor, error: Tensor) -> Tensor:
    residual, is_dead = error.detach(), torch.zeros(D_SAE, dtype=torch.bool)
    is_dead[DEAD] = True
    z = (encoder_input.detach() @ p["W_enc"] + p["b_enc"]).masked_fill(~is_dead, -torch.inf)
    places = z.topk(2, dim=1).indices
    acts = torch.zeros_like(z).scatter(1, places, z.gather(1, places).relu())
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    return (residual - acts @ p["W_dec"]).square().sum(1).mean() / variance / 32


def assert_same_gradients(objective: Objective, copies: dict[str, Tensor]) -> None:
    for name, parameter in objective.trained_parameters().items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, copies[name].grad, rtol=1e-9, atol=1e-12, msg=f"gradient of {name}")


@pytest.mark.parametrize("dead", [DEAD, DEAD[:0]], ids=["dead", "none-dead"])
@pytest.mark.parametrize("cls", [MatryoshkaTopKConfig, MatryoshkaBatchTopKConfig], ids=["topk", "batchtopk"])
def test_matryoshka_step_equals_dense_autograd(
    cls: type[MatryoshkaTopKConfig | MatryoshkaBatchTopKConfig], dead: Tensor
) -> None:
    objective, p = make(cls.parse(GROUPS))
    x = batch()
    z = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    if cls is MatryoshkaTopKConfig:
        kept = torch.zeros_like(z).scatter(1, z.topk(3, dim=1).indices, 1.0)
    else:
        kept = torch.zeros_like(z).flatten().scatter(0, z.flatten().topk(3 * len(x)).indices, 1.0).view_as(z)
    acts = z.relu() * kept
    errors = {end: x - acts[:, :end] @ p["W_dec"][:end] - p["b_dec"] for end, _ in PREFIXES}
    expected = sum((w * errors[end].square().sum(1).mean() / VARIANCE for end, w in PREFIXES), torch.zeros(()))
    if len(dead):
        expected = expected + dense_auxk(p, x - p["b_dec"], errors[D_SAE])
    result = objective(x, dead)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.fvu, errors[D_SAE].detach().square().sum(1).mean() / VARIANCE)
    assert int(result.num_active) == int((acts > 0).sum())
    (3.0 * result.loss).backward()
    (3.0 * expected).backward()
    assert_same_gradients(objective, p)


@pytest.mark.parametrize("is_csr", [True, False], ids=["rows", "pairs"])
def test_groups_hold_each_entry_once(is_csr: bool) -> None:
    values = torch.tensor([[3.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    indices = torch.tensor([[4, 0, 2], [1, 0, 0]])
    code = Code(values, indices)
    if is_csr:
        code = Code(values[values > 0], indices[values > 0], torch.tensor([0, 3, 4]))
    first, second, none = group_codes(code, [0, 2, 5, 5])
    assert (first.values.tolist(), first.indices.tolist()) == ([2.0, 5.0], [0, 1])
    assert (second.values.tolist(), second.indices.tolist()) == ([3.0, 1.0], [4, 2])
    assert first.offsets is not None
    assert second.offsets is not None
    assert first.offsets.tolist() == [0, 1, 2]
    assert second.offsets.tolist() == [0, 2, 2]
    assert not len(none.values)
    # Those of other processes come before the first, and behind the last.
    (part,) = group_codes(code, [2, 4])
    assert (part.values.tolist(), part.indices.tolist()) == ([1.0], [2])


@pytest.mark.parametrize("dead", [DEAD, DEAD[:0]], ids=["dead", "none-dead"])
@pytest.mark.parametrize("has_skip", [True, False], ids=["skip", "no-skip"])
def test_transcoder_step_equals_dense_autograd(has_skip: bool, dead: Tensor) -> None:
    cfg = TranscoderConfig(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=3, has_skip=has_skip)
    objective, p = make(cfg)
    pairs = batch(D_IN + D_OUT)
    x, y = pairs[:, :D_IN], pairs[:, D_IN:]
    z = x @ p["W_enc"] + p["b_enc"]
    acts = z.relu() * torch.zeros_like(z).scatter(1, z.topk(3, dim=1).indices, 1.0)
    error = y - acts @ p["W_dec"] - p["b_dec"] - (x @ p["W_skip"] if has_skip else 0.0)
    expected = error.square().sum(1).mean() / VARIANCE
    if len(dead):
        expected = expected + dense_auxk(p, x, error)
    result = objective(pairs, dead)
    torch.testing.assert_close(result.loss, expected)
    (3.0 * result.loss).backward()
    (3.0 * expected).backward()
    assert_same_gradients(objective, p)


@pytest.mark.parametrize("cls", [MatryoshkaTopKConfig, MatryoshkaBatchTopKConfig], ids=["topk", "batchtopk"])
def test_matryoshka_recovers_and_its_prefixes_get_better(
    planted: ModuleType, cls: type[MatryoshkaTopKConfig | MatryoshkaBatchTopKConfig], tmp_path: Path
) -> None:
    source = planted.PlantedSource()
    view = planted.PlantedView(source)
    cfg = cls.parse({"d_in": 16, "d_sae": 32, "k": 2})
    sae = Trainer(build_sae(cfg), source, TrainConfig(num_tokens=256 * 200, batch_size=256), test=view).fit(tmp_path)
    assert planted.mean_max_cosine(sae.W_dec, source.directions) > 0.85
    assert float(str(sae.source["l0"])) == pytest.approx(2.0, rel=0.1)
    acts = sae.encode(view.x)
    fvus = []
    for end, _ in cls.parse({"d_in": 16, "d_sae": 32, "k": 2}).prefixes():
        error = view.x - acts[:, :end] @ sae.W_dec[:end] - sae.b_dec
        fvus.append(float((error.square().sum() / (view.x - view.x.mean(0)).square().sum()).detach()))
    assert fvus == sorted(fvus, reverse=True)
    assert fvus[1] < 0.9
    assert fvus[-1] < 0.3


class _PairSource:
    """Inputs with a planted dictionary, and targets that a linear map and a few of its features make."""

    def __init__(self, planted: ModuleType, *, linear: float) -> None:
        self.inner = planted.PlantedSource()
        self.d_in = 16 + 6
        generator = torch.Generator().manual_seed(8)
        self.map = linear * torch.randn(16, 6, generator=generator)
        self.out = torch.randn(24, 6, generator=generator)

    def pairs(self, x: Tensor) -> Tensor:
        codes = (x @ self.inner.directions.T - 2.0 * self.inner.directions.sum(1) - 0.9).relu()
        return torch.cat([x, codes @ self.out + x @ self.map], dim=1)

    def next_batch(self) -> Tensor:
        return self.pairs(self.inner.next_batch())

    def state_dict(self) -> dict[str, object]:
        state: dict[str, object] = self.inner.state_dict()
        return state

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.inner.load_state_dict(state)


@pytest.mark.parametrize("has_skip", [True, False], ids=["skip", "no-skip"])
def test_transcoder_learns_what_depends_on_its_input(planted: ModuleType, has_skip: bool, tmp_path: Path) -> None:
    source = _PairSource(planted, linear=0.3 if has_skip else 0.0)
    cfg = TranscoderConfig(d_in=16, d_out=6, d_sae=32, k=4, has_skip=has_skip)
    sae = Trainer(build_sae(cfg), source, TrainConfig(num_tokens=256 * 200, batch_size=256)).fit(tmp_path)
    pairs = source.pairs(source.inner.batch(1_000_000))
    x, y = pairs[:, :16], pairs[:, 16:]
    loaded = load_sae_folder(tmp_path)
    assert isinstance(loaded, Transcoder)
    y_hat = loaded(x).x_hat
    assert torch.equal(y_hat, sae(x).x_hat)
    assert float(((y - y_hat).square().sum() / (y - y.mean(0)).square().sum()).detach()) < 0.25
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(32), atol=1e-6, rtol=0)


def test_pairs_of_another_width_are_refused(planted: ModuleType) -> None:
    cfg = TranscoderConfig(d_in=16, d_out=7, d_sae=32, k=4)
    with pytest.raises(ConfigError, match=r"activations are 22 wide, needs the SAE's d_in \+ d_out = 23"):
        Trainer(build_sae(cfg), _PairSource(planted, linear=1.0), TrainConfig(num_tokens=100))
