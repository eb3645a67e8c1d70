"""Transcoders, crosscoders and multi-layer SAEs are measured where they write, each against figures made by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.activations import NORMAL, ActivationStore, CacheConfig, JoinedStore, PairedStore, StoreView
from saekit.activations.collect import cache_activations
from saekit.errors import ConfigError
from saekit.evaluation import EvaluationConfig, evaluate
from saekit.evaluation.nulls import linear_candidate
from saekit.evaluation.selection import Selection
from saekit.hub.export import as_dictionary
from saekit.models import LanguageModel, capture, logits, replace
from saekit.sae import (
    SAE,
    MLSAEConfig,
    Normalization,
    SiteNormalization,
    SitesSAE,
    TopKConfig,
    TopKCrosscoderConfig,
    Transcoder,
    TranscoderConfig,
    build_sae,
)

MLP = ("model.layers.1.mlp:input", "model.layers.1.mlp")
LAYERS = ("model.layers.0", "model.layers.1")
CONFIG = EvaluationConfig(num_loss_tokens=10_000, num_bootstrap=20, num_fit_tokens=200)


@pytest.fixture(scope="module")
def lm(tiny_lm: Callable[[str], LanguageModel]) -> LanguageModel:
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def folder(lm: LanguageModel, documents_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CacheConfig.parse(
        {
            "model": {"name": lm.name},
            "text": {"kind": "files", "paths": [str(documents_file)]},
            "tokens": {"context_len": 16},
            "hook_points": [*MLP, *LAYERS],
            "num_tokens": 600,
            "dtype": "float32",
            "massive_factor": 1.4,
        }
    )
    out = tmp_path_factory.mktemp("places")
    cache_activations(config, out, lm=lm)
    return out


@pytest.fixture(scope="module")
def pairs(folder: Path) -> PairedStore:
    return PairedStore(*(ActivationStore.open(folder, name) for name in MLP))


@pytest.fixture(scope="module")
def layers(folder: Path) -> JoinedStore:
    return JoinedStore([ActivationStore.open(folder, name) for name in LAYERS])


def random(sae: SAE) -> SAE:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if not name.startswith("site_"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture
def transcoder() -> Transcoder:
    sae = random(build_sae(TranscoderConfig(d_in=32, d_out=32, d_sae=40, k=3, has_skip=True)))
    assert isinstance(sae, Transcoder)
    return sae


def tokens_of(view: StoreView) -> Tensor:
    return view.read(view.indices)


def fvu_of(x: Tensor, x_hat: Tensor, dims: tuple[int, ...] = (0, 1)) -> Tensor:
    x, x_hat = x.double(), x_hat.detach().double()
    return (x - x_hat).square().sum(dims) / (x - x.mean(0)).square().sum(dims)


def test_transcoder_is_measured_against_its_target(
    transcoder: Transcoder, pairs: PairedStore, lm: LanguageModel
) -> None:
    train, test = pairs.split(0.4)
    found = evaluate(transcoder, test, lm=lm, config=CONFIG, train=train)
    rows = tokens_of(test)
    expected = fvu_of(rows[:, 32:], transcoder(rows[:, :32]).x_hat)
    assert found.hook_point == MLP[1]
    assert found.fvu == pytest.approx(float(expected), rel=1e-5)
    assert found.l0 == pytest.approx(float((transcoder.encode(rows[:, :32]) > 0).sum(1).float().mean()), rel=1e-5)
    massive = tokens_of(test.of_kind(3))
    assert len(massive)
    error = (massive[:, 32:] - transcoder(massive[:, :32]).x_hat.detach()).double().square().sum()
    centred = (massive[:, 32:] - rows[:, 32:].double().mean(0)).square().sum()
    assert found.value("fvu_massive") == pytest.approx(float(error / centred), rel=1e-5)
    assert [row.name for row in found.rows] == ["sae", "mean", "linear"]
    assert found.row().title == "transcoder"


def test_loss_of_a_transcoder_is_that_of_the_model_with_its_prediction_in_place_of_the_module(
    transcoder: Transcoder, pairs: PairedStore, lm: LanguageModel
) -> None:
    train, test = pairs.split(0.4)
    found = evaluate(transcoder, test, lm=lm, config=CONFIG, train=train)
    rows = Selection.draw(test, num_tokens=CONFIG.num_tokens, seed=CONFIG.seed).loss_rows(CONFIG.num_loss_tokens)
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    mask = None if not rows.is_padding.any() else torch.from_numpy((~rows.is_padding).astype(np.int64))
    is_replaced = torch.from_numpy(rows.is_replaced)[..., None]
    read = capture(lm, tokens, [MLP[0]], attention_mask=mask)[MLP[0]]
    # The formula by hand, skip included.
    z = (read @ transcoder.W_enc + transcoder.b_enc).detach()
    kept = torch.zeros_like(z).scatter(-1, z.topk(3, dim=-1).indices, 1.0) * z.relu()
    assert transcoder.W_skip is not None
    predicted = (kept @ transcoder.W_dec + transcoder.b_dec + read @ transcoder.W_skip).detach()
    with replace(lm, MLP[1], lambda hidden: torch.where(is_replaced, predicted, hidden)):
        patched = logits(lm, tokens, attention_mask=mask)
    with replace(lm, MLP[1], lambda hidden: torch.where(is_replaced, 0.0, hidden)):
        ablated = logits(lm, tokens, attention_mask=mask)
    is_counted = torch.from_numpy(rows.is_counted)
    targets = tokens.roll(-1, dims=1)[is_counted]

    def ce(values: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(values[is_counted].double(), targets))

    assert found.value("ce") == pytest.approx(ce(patched), rel=1e-5)
    assert found.reference["ce_zero"] == pytest.approx(ce(ablated), rel=1e-5)
    clean = found.reference["ce_clean"]
    assert clean is not None
    assert clean == pytest.approx(ce(logits(lm, tokens, attention_mask=mask)), rel=1e-5)
    assert found.value("delta_ce") == pytest.approx(ce(patched) - clean, rel=1e-3, abs=1e-6)


def test_released_transcoder_is_measured_as_one_of_ours(
    transcoder: Transcoder, pairs: PairedStore, lm: LanguageModel
) -> None:
    transcoder.hook_point, transcoder.source = MLP[0], {"target_hook_point": MLP[1]}
    train, test = pairs.split(0.4)
    released = as_dictionary(transcoder)
    assert released.is_transcoder
    assert released.hook_point_out == transcoder.hook_point_out == MLP[1]
    own, other = (evaluate(sae, test, lm=lm, config=CONFIG, train=train) for sae in (transcoder, released))
    for metric in ("fvu", "l0", "ce"):
        assert other.value(metric) == pytest.approx(own.value(metric), rel=1e-5)
    with pytest.raises(ConfigError, match="a transcoder needs pairs"):
        evaluate(released, StoreView(pairs.inputs, test.mask), config=CONFIG)


def test_linear_row_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 6, generator=generator) * 20 + 3
    y = torch.cat([x @ torch.randn(6, 3, generator=generator) + 5, torch.randn(300, 1, generator=generator)], dim=1)
    candidate = linear_candidate(torch.cat([x, y], dim=1), 6)
    made = candidate.reconstruct(torch.cat([x, torch.full_like(y, torch.nan)], dim=1)).x_hat
    design = torch.cat([x, torch.ones(300, 1)], dim=1).double()
    expected = design @ torch.linalg.lstsq(design, y.double()).solution
    torch.testing.assert_close(made, expected.float(), rtol=1e-3, atol=1e-3)
    assert (candidate.name, candidate.constant_l0) == ("linear", 6.0)


def sites_sae(kind: str, store: JoinedStore) -> SitesSAE:
    cfg = TopKCrosscoderConfig if kind == "crosscoder" else MLSAEConfig
    sae = random(build_sae(cfg(d_in=32, num_sites=2, d_sae=40, k=3), hook_point=store.hook_point))
    assert isinstance(sae, SitesSAE)
    sites = [Normalization(mean=torch.full((32,), 0.1 * s).double(), scale=2.0 + s, total_variance=1.0) for s in (0, 1)]
    SiteNormalization(sites=tuple(sites), total_variance=1.0).fold(sae)
    return sae


@pytest.mark.parametrize("kind", ["crosscoder", "mlsae"])
def test_several_hook_points_are_measured_one_by_one_and_on_average(
    kind: str, layers: JoinedStore, lm: LanguageModel
) -> None:
    sae = sites_sae(kind, layers)
    train, test = layers.split(0.4)
    found = evaluate(sae, test, lm=lm, config=CONFIG, train=train)
    rows = tokens_of(test)
    expected = fvu_of(rows.reshape(-1, 2, 32), sae(rows).x_hat.reshape(-1, 2, 32), (0, 2))
    assert found.hook_point == ",".join(LAYERS)
    assert [found.value(f"fvu@{name}") for name in LAYERS] == pytest.approx(expected.tolist(), rel=1e-5)
    assert found.fvu == pytest.approx(float(expected.mean()), rel=1e-5)
    figure = found.row().metrics["fvu"]
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < float(expected.mean()) < figure.high
    active = sae.encode(rows) > 0
    assert found.dead_fraction == pytest.approx(float((~active.reshape(-1, 40).any(0)).double().mean()))
    assert found.l0 == pytest.approx(float(active.sum(-1).double().mean()))
    assert (found.value("ce") is None) == (kind == "crosscoder")
    assert (found.num_loss_tokens == 0) == (kind == "crosscoder")
    for name in LAYERS:
        assert found.value(f"fvu@{name}", row="mean") == pytest.approx(1.0)
        pca = found.value(f"fvu@{name}", row="pca")
        difference = found.row("pca").difference[f"fvu@{name}"].value
        assert pca is not None
        assert difference == pytest.approx(expected.tolist()[LAYERS.index(name)] - pca, rel=1e-4)
    titles = [line[0] for line in found.table().rows]
    assert titles[:3] == ["FVU", "FVU at model.layers.0", "FVU at model.layers.1"]
    assert "`model.layers.0,model.layers.1`" in found.to_markdown()


def test_rows_of_another_architecture_are_refused_in_one_line(
    transcoder: Transcoder, pairs: PairedStore, layers: JoinedStore, folder: Path
) -> None:
    single = ActivationStore.open(folder, LAYERS[0])
    crosscoder = sites_sae("crosscoder", layers)
    plain = build_sae(TopKConfig(d_in=64, d_sae=70, k=3))
    for sae, store, message in [
        (transcoder, single, "a transcoder needs pairs 32 and 32 wide, of a PairedStore"),
        (transcoder, layers, "a transcoder needs pairs"),
        (crosscoder, single, r"gives widths \[32\], a TopKCrosscoder needs 2 hook points 32 wide, of a JoinedStore"),
        (crosscoder, pairs, "of a JoinedStore"),
        (plain, layers, "the SAE has d_in 64"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            evaluate(sae, store.view(kinds=[NORMAL]), config=CONFIG)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="a transcoder needs pairs"):
        evaluate(transcoder, pairs.split(0.4)[1], config=CONFIG, train=layers.split(0.4)[0])
