"""Crosscoders and multi-layer SAEs in training: dense float64 autograd, figures by site, planted features, a real cache."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.activations import CacheConfig, JoinedStore, StoreView, cache_activations
from saekit.activations.store import ActivationStore
from saekit.errors import ConfigError
from saekit.hub import load_sae
from saekit.manifest import read_manifest
from saekit.models import load_model
from saekit.progress import NO_PROGRESS
from saekit.sae import (
    BatchTopKCrosscoderConfig,
    Crosscoder,
    MLSAEConfig,
    ReLUCrosscoderConfig,
    SitesConfig,
    SitesSAE,
    TopKCrosscoderConfig,
    build_sae,
)
from saekit.training import TrainConfig, Trainer, read_metrics
from saekit.training.build import build_objective
from saekit.training.heldout import evaluate_heldout
from saekit.training.objective import Objective
from saekit.training.optim import build_optimizer
from saekit.training.penalty import ReLUObjective
from saekit.training.run import StepFigures, TrainRun
from saekit.training.start import normalization_of

S, D, F, K, VARIANCE, COEFFICIENT = 3, 4, 13, 3, 5.0, 0.3
DEAD = torch.tensor([1, 4, 5, 9])
SHAPE: dict[str, object] = {"d_in": D, "num_sites": S, "d_sae": F}
CONFIGS: dict[str, SitesConfig] = {
    "topk": TopKCrosscoderConfig.parse(SHAPE | {"k": K}),
    "batchtopk": BatchTopKCrosscoderConfig.parse(SHAPE | {"k": K}),
    "relu": ReLUCrosscoderConfig.parse(SHAPE | {"target_l0": 3}),
    "mlsae": MLSAEConfig.parse(SHAPE | {"k": K}),
}


def make(kind: str) -> tuple[Objective, dict[str, Tensor]]:
    sae = build_sae(CONFIGS[kind]).double()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in sae.named_parameters():
        if not name.startswith("site_"):
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    config = TrainConfig(num_tokens=1000, k_aux=2)
    objective = build_objective(sae, config, total_variance=VARIANCE)
    copies = {n: p.detach().clone().requires_grad_() for n, p in objective.trained_parameters().items()}
    return objective, copies


def batch(num_tokens: int = 11) -> Tensor:
    return torch.randn(num_tokens, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def dense_auxk(p: dict[str, Tensor], encoder_input: Tensor, error: Tensor) -> Tensor:
    residual, is_dead = error.detach(), torch.zeros(F, dtype=torch.bool)
    is_dead[DEAD] = True
    z = (encoder_input.detach() @ p["W_enc"] + p["b_enc"]).masked_fill(~is_dead, -torch.inf)
    places = z.topk(2, dim=1).indices
    acts = torch.zeros_like(z).scatter(1, places, z.gather(1, places).relu())
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    return (residual - acts @ p["W_dec"]).square().sum(1).mean() / variance / 32


def dense_loss(kind: str, p: dict[str, Tensor], x: Tensor, dead: Tensor) -> Tensor:
    """The loss with every site written out and every [N, d_sae] array made."""
    if kind == "mlsae":
        rows = x.reshape(-1, D)
        encoder_input = rows - p["b_dec"]
        z = encoder_input @ p["W_enc"] + p["b_enc"]
        acts = z.relu() * torch.zeros_like(z).scatter(1, z.topk(K, dim=1).indices, 1.0)
        error = rows - acts @ p["W_dec"] - p["b_dec"]
        return error.square().sum() / (len(rows) * VARIANCE) + (
            dense_auxk(p, encoder_input, error) if len(dead) else 0.0
        )
    W_enc, W_dec, b_dec = p["W_enc"].reshape(S, D, F), p["W_dec"].reshape(F, S, D), p["b_dec"].reshape(S, D)
    z = sum(x[:, s] @ W_enc[s] for s in range(S)) + p["b_enc"]
    if kind == "topk":
        acts = z.relu() * torch.zeros_like(z).scatter(1, z.topk(K, dim=1).indices, 1.0)
    elif kind == "batchtopk":
        smallest = z.relu().flatten().topk(K * len(x)).values[-1]
        acts = z * ((z >= smallest) & (z > 0))
    else:
        acts = z.relu()
    errors = [x[:, s] - acts @ W_dec[:, s] - b_dec[s] for s in range(S)]
    loss = sum(error.square().sum(1).mean() for error in errors) / VARIANCE
    if kind == "relu":
        loss = loss + COEFFICIENT * (acts * sum(W_dec[:, s].norm(dim=1) for s in range(S))).sum(1).mean()
    return loss + (dense_auxk(p, x.flatten(1), torch.cat(errors, dim=1)) if len(dead) else 0.0)


@pytest.mark.parametrize("dead", [DEAD, DEAD[:0]], ids=["dead", "none-dead"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_step_equals_dense_autograd(kind: str, dead: Tensor) -> None:
    objective, p = make(kind)
    x = batch()
    result = objective(x.flatten(1), dead, COEFFICIENT)
    expected = dense_loss(kind, p, x, dead)
    torch.testing.assert_close(result.loss, expected)
    (3.0 * result.loss).backward()
    (3.0 * expected).backward()
    for name, parameter in objective.trained_parameters().items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, p[name].grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_decoders_are_kept_at_size_one_but_for_the_l1_penalty(kind: str) -> None:
    objective, _ = make(kind)
    before = objective.sae.W_dec.detach().clone()
    objective.settle()
    assert objective.has_projected_decoder == (kind == "mlsae")
    if kind == "relu":
        assert torch.equal(objective.sae.W_dec, before)
        objective.finish()
    torch.testing.assert_close(objective.sae.decoder_norms(), torch.ones(F, dtype=torch.float64))


def test_first_coefficient_is_a_usual_activations_slope_at_sites_of_equal_parts() -> None:
    objective, _ = make("relu")
    objective.sae.reset_parameters(0)
    assert isinstance(objective, ReLUObjective)
    # Unit size over three equal sites writes a row of norm 1 / sqrt(3).
    assert objective.natural_coefficient() == pytest.approx(1 / math.sqrt(S * objective.wanted_l0(0.0) * VARIANCE))


@pytest.mark.parametrize("is_per_site", [True, False])
def test_normalisation_of_each_site_or_of_all(is_per_site: bool) -> None:
    x = batch(400) * torch.tensor([[0.1], [1.0], [30.0]]) + torch.tensor([[1.0], [0.0], [-7.0]])
    values = SHAPE | {"k": K, "is_normalized_per_site": is_per_site}
    sae = build_sae(MLSAEConfig.parse(values))
    normal = normalization_of(x.flatten(1), sae)
    made = normal.apply(x.flatten(1)).reshape(-1, S, D)
    if is_per_site:
        torch.testing.assert_close(made.mean(0), torch.zeros(S, D, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(made.norm(dim=2).mean(0), torch.full((S,), math.sqrt(D), dtype=torch.float64))
        assert normal.total_variance == pytest.approx(float(made.square().sum(2).mean()))
        crosscoder = build_sae(CONFIGS["topk"])
        assert normalization_of(x.flatten(1), crosscoder).total_variance == pytest.approx(S * normal.total_variance)
    else:
        torch.testing.assert_close(made.mean((0, 1)), torch.zeros(D, dtype=torch.float64), atol=1e-9, rtol=0)
        assert float(made.norm(dim=2).mean()) == pytest.approx(math.sqrt(D))
        factor = (made[0, 0, 0] - made[1, 0, 0]) / (x[0, 0, 0] - x[1, 0, 0])
        torch.testing.assert_close(made[:, 2] - made[:, 0], (x[:, 2] - x[:, 0]) * factor)


@pytest.mark.parametrize("kind", CONFIGS)
def test_held_out_figures_are_those_of_each_site(kind: str) -> None:
    objective, _ = make(kind)
    sae, x = objective.sae, batch(70) * torch.tensor([[1.0], [1.0], [9.0]])
    if kind == "batchtopk":
        sae.get_parameter("threshold").data.fill_(0.5)
    found = evaluate_heldout(sae, x.flatten(1), batch_size=16)
    x_hat = sae(x).x_hat.detach()
    fvu = (x - x_hat).square().sum((0, 2)) / (x - x.mean(0)).square().sum((0, 2))
    assert found.fvu_by_site == pytest.approx(fvu.tolist())
    assert found.fvu == pytest.approx(float(fvu.mean()))
    active = sae.encode(x) > 0
    assert found.l0 == pytest.approx(float(active.sum(-1).double().mean()))
    assert len(found.l0_by_site) == (S if kind == "mlsae" else 0)
    assert found.dead_fraction == pytest.approx(float((~active.reshape(-1, F).any(0)).double().mean()))
    assert ("l0_by_site" in found.figures()) == (kind == "mlsae")


class SharedSource:
    """Features of a known dictionary, written at three sites by different weights; some features live at one of them."""

    def __init__(self, planted: ModuleType, batch_size: int = 256) -> None:
        self.inner = planted.PlantedSource(d_in=16, num_features=24, firing=0.06, batch_size=batch_size)
        self.d_in = 3 * 16

    def rows(self, x: Tensor) -> Tensor:
        return torch.cat([x, 7.0 * x.flip(1), 0.1 * x.roll(3, dims=1)], dim=1)

    def next_batch(self) -> Tensor:
        return self.rows(self.inner.next_batch())

    def batch(self, number: int) -> Tensor:
        return self.rows(self.inner.batch(number))

    def state_dict(self) -> dict[str, object]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.inner.load_state_dict(state)


RECOVERED: dict[str, SitesConfig] = {
    "topk": TopKCrosscoderConfig(d_in=16, num_sites=3, d_sae=48, k=2),
    "relu": ReLUCrosscoderConfig(d_in=16, num_sites=3, d_sae=48, target_l0=2),
}


@pytest.mark.parametrize("kind", RECOVERED)
def test_planted_features_are_recovered_at_every_site(planted: ModuleType, kind: str, tmp_path: Path) -> None:
    source = SharedSource(planted)
    view = planted.PlantedView(source, num_batches=4)
    config = TrainConfig(num_tokens=180 * 256, batch_size=256, lr=6e-3, dead_after_tokens=5000)
    sae = Trainer(build_sae(RECOVERED[kind]), source, config, test=view).fit(tmp_path)
    assert isinstance(sae, Crosscoder)
    counts = read_manifest(tmp_path).counts  # type: ignore[union-attr]  # it was just written
    by_site = counts["fvu_by_site"]
    assert isinstance(by_site, list)
    # An L1 penalty shrinks.
    assert max(by_site) < (0.5 if kind == "relu" else 0.35)
    scale = counts["normalization_scale"]
    assert isinstance(scale, list)
    np.testing.assert_allclose(sae.site_scale.detach().numpy(), scale, rtol=1e-6)
    directions = source.inner.directions
    rows = sae.W_dec.detach().reshape(48, 3, 16)
    for site, moved in enumerate((directions, directions.flip(1), directions.roll(3, dims=1))):
        assert planted.mean_max_cosine(rows[:, site], moved) > 0.8, site
    # Written alike in units of each site, whatever the sites' sizes are.
    used = sae.encode(view.x).sum(0) > 0
    shares = sae.site_shares()[used]
    assert float((shares - 1 / 3).abs().mean()) < 0.1


HOOK_POINTS = ["model.layers.0", "model.layers.1", "model.layers.2"]


@pytest.fixture(scope="module")
def store(
    tiny_model_dir: Callable[[str], Path], documents_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> JoinedStore:
    config = CacheConfig.parse(
        {
            "model": {"name": str(tiny_model_dir("llama"))},
            "text": {"kind": "files", "paths": [str(documents_file)]},
            "tokens": {"context_len": 16},
            "hook_points": [*HOOK_POINTS, "model.layers.1.mlp.gate_proj"],
            "num_tokens": 640,
            "dtype": "float32",
        }
    )
    out = tmp_path_factory.mktemp("joined")
    cache_activations(config, out, lm=load_model(config.model))
    return JoinedStore([ActivationStore.open(out, name) for name in HOOK_POINTS])


@pytest.mark.parametrize("kind", ["batchtopk", "mlsae"])
def test_dictionary_of_a_cache_knows_its_hook_points(store: JoinedStore, kind: str, tmp_path: Path) -> None:
    train, test = store.split(0.3)
    cfg = type(CONFIGS[kind]).parse({"d_in": 32, "num_sites": 3, "d_sae": 64, "k": 6})
    said: list[str] = []

    class Heard:
        task = staticmethod(NO_PROGRESS.task)
        say = staticmethod(said.append)

    config = TrainConfig(num_tokens=6400, batch_size=64, lr=3e-3)
    sae = Trainer(build_sae(cfg), train, config, test=test).fit(tmp_path, progress=Heard())
    loaded = load_sae(tmp_path)
    assert isinstance(loaded, SitesSAE)
    assert loaded.hook_points == tuple(HOOK_POINTS)
    x = test.read(test.indices)
    assert torch.equal(loaded(x).x_hat, sae(x).x_hat)
    wide, made = x.double().reshape(-1, 3, 32), sae(x).x_hat.detach().double().reshape(-1, 3, 32)
    fvu = (wide - made).square().sum((0, 2)) / (wide - wide.mean(0)).square().sum((0, 2))
    row = [row for row in read_metrics(tmp_path) if row["split"] == "test"][-1]
    assert row["fvu_by_site"] == pytest.approx(fvu.tolist(), rel=0.02)
    assert float(fvu.max()) < 0.6
    assert any(message.startswith(f"FVU on held-out tokens: {HOOK_POINTS[0]} 0.") for message in said)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.config["hook_point"] == ",".join(HOOK_POINTS)
    # The same call again is a finished one; the same folder for other hook points is refused.
    other = StoreView(JoinedStore(store.stores[::-1]), train.mask, origin=train.origin)
    with pytest.raises(ConfigError, match="hook_point"):
        Trainer(build_sae(cfg), other, config).fit(tmp_path)


def test_stopped_training_goes_on_bit_for_bit(
    store: JoinedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = store.split(0.3)
    cfg = ReLUCrosscoderConfig(d_in=32, num_sites=3, d_sae=64, target_l0=4)
    config = TrainConfig(
        num_tokens=40 * 64, batch_size=64, lr=3e-3, checkpoint_every_tokens=9 * 64, dead_after_tokens=256
    )
    Trainer(build_sae(cfg), train, config, test=test).fit(tmp_path / "whole")
    step = TrainRun.train_step

    def fails_late(self: TrainRun, *, stop_asked: bool = False) -> StepFigures:
        if self.step == 23:
            raise RuntimeError("power is gone")
        return step(self, stop_asked=stop_asked)

    with monkeypatch.context() as patch:
        patch.setattr(TrainRun, "train_step", fails_late)
        with pytest.raises(RuntimeError, match="power is gone"):
            Trainer(build_sae(cfg), train, config, test=test).fit(tmp_path / "parts")
    Trainer(build_sae(cfg), train, config, test=test).fit(tmp_path / "parts")
    whole, parts = ((tmp_path / name / "sae.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_hook_points_of_other_widths_or_number_are_refused(store: JoinedStore) -> None:
    narrow = ActivationStore.open(store.path, "model.layers.1.mlp.gate_proj")
    config = TrainConfig(num_tokens=640, batch_size=64)
    sae = build_sae(TopKCrosscoderConfig(d_in=48, num_sites=2, d_sae=64, k=3))
    # 32 + 64 is 2 * 48.
    view = JoinedStore([store.stores[0], narrow]).split(0.3)[0]
    with pytest.raises(ConfigError, match=r"hook points .*: widths \[32, 64\], needs 2 of 48") as caught:
        Trainer(sae, view, config)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"activations are 96 wide, needs the SAE's num_sites \* d_in = 64"):
        Trainer(build_sae(MLSAEConfig(d_in=32, num_sites=2, d_sae=64, k=3)), store.split(0.3)[0], config)


def test_schedule_free_steps_keep_each_decoder_of_a_crosscoder_at_size_one() -> None:
    objective, _ = make("topk")
    optimizer = build_optimizer(
        {"W_dec": objective.sae.W_dec},
        TrainConfig(num_tokens=1000, optimizer="signum"),
        lr=0.1,
        has_unit_rows=objective.has_projected_decoder,
        num_sites=S,
    )
    for number in range(3):
        objective.sae.W_dec.grad = objective.sae.W_dec.detach().roll(number, 0)
        optimizer.step()
    for rows in (objective.sae.W_dec, *optimizer.state[objective.sae.W_dec].values()):
        sizes = rows.detach().view(F, S, D).norm(dim=2).sum(1)
        torch.testing.assert_close(sizes, torch.ones_like(sizes))
