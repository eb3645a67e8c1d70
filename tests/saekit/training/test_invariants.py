"""What must not depend on how training is set up: the scale of the data, the order of the features, the file that is written."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from saekit.sae import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    build_sae,
    load_sae_folder,
)
from saekit.training import TrainConfig, Trainer
from saekit.training.run import TrainRun
from saekit.training.sparsity import calibration_shift, init_thresholds
from saekit.training.start import estimate_normalization, fit_start, read_sample

SHAPE: dict[str, object] = {"d_in": 16, "d_sae": 40}
CONFIGS: dict[str, SAEConfig] = {
    "topk": TopKConfig.parse(SHAPE | {"k": 3}),
    "batchtopk": BatchTopKConfig.parse(SHAPE | {"k": 3}),
    "matryoshka": MatryoshkaBatchTopKConfig.parse(SHAPE | {"k": 3}),
    "jumprelu": JumpReLUConfig.parse(SHAPE | {"target_l0": 3}),
    "relu": ReLUConfig.parse(SHAPE | {"target_l0": 3}),
    "gated": GatedConfig.parse(SHAPE | {"target_l0": 3}),
}
# Matryoshka features are ordered on purpose.
UNORDERED = [kind for kind in CONFIGS if kind != "matryoshka"]
CONFIG = TrainConfig(num_tokens=20 * 256, batch_size=256, lr=3e-3, dead_after_tokens=1024)


def make_run(planted: ModuleType, kind: str, *, scale: float = 1.0, order: Tensor | None = None) -> TrainRun:
    """A run with the start that a training makes; features are put in another order before it."""

    source = planted.PlantedSource(batch_size=256, scale=scale)
    sample = read_sample(source, 4096)
    normalization = estimate_normalization(sample)
    sae = build_sae(CONFIGS[kind], seed=3)
    fit_start(sae, normalization.apply(sample), CONFIG.sparsity)
    if order is not None:
        for name, parameter in sae.named_parameters():
            if name == "W_enc":
                parameter.data = parameter.data.T[order].T
            elif name != "b_dec" and len(parameter) == 40:
                parameter.data = parameter.data[order]
    return TrainRun(sae, source, CONFIG, normalization=normalization)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in {"topk", "jumprelu"}])
def test_fvu_curve_does_not_depend_on_the_scale_of_the_activations(planted: ModuleType, kind: str) -> None:
    curves = []
    for scale in (1.0, 1024.0, 0.001):
        run = make_run(planted, kind, scale=scale)
        curves.append([run.train_step().fvu for _ in range(15)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[2] == pytest.approx(curves[0], rel=3e-3)


@pytest.mark.parametrize("kind", UNORDERED)
def test_features_in_another_order_train_alike(planted: ModuleType, kind: str) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(6))
    run, other = make_run(planted, kind), make_run(planted, kind, order=order)
    for _ in range(10):
        one, two = run.train_step(), other.train_step()
        assert two.loss == pytest.approx(one.loss, rel=1e-3)
    torch.testing.assert_close(other.dead.silent_tokens, run.dead.silent_tokens[order])
    torch.testing.assert_close(other.sae.W_dec.detach(), run.sae.W_dec.detach()[order], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(other.sae.W_enc.detach(), run.sae.W_enc.detach()[:, order], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "option"),
    [(kind, "plain") for kind in CONFIGS]
    + [(kind, option) for kind in ("batchtopk", "relu") for option in ("ema", "signum", "muon")],
)
def test_saved_file_has_unit_rows_and_gives_the_same_outputs(
    planted: ModuleType, kind: str, option: str, tmp_path: Path
) -> None:
    options: dict[str, dict[str, object]] = {
        "plain": {},
        "ema": {"ema_decay": 0.9},
        "signum": {"optimizer": "signum"},
        "muon": {"optimizer": "muon"},
    }
    source = planted.PlantedSource(scale=30.0)
    config = TrainConfig.parse({"num_tokens": 10 * 256, "batch_size": 256} | options[option])
    sae = Trainer(build_sae(CONFIGS[kind]), source, config).fit(tmp_path)
    loaded = load_sae_folder(tmp_path)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(40), atol=1e-6, rtol=0)
    x = source.batch(1_000_000)
    assert torch.equal(loaded(x).x_hat, sae(x).x_hat)
    # Ten steps do not bring a JumpReLU SAE's thresholds within reach of their calibration.
    if kind != "jumprelu":
        assert float((loaded.encode(x) > 0).sum(1).double().mean()) == pytest.approx(3.0, rel=0.4)


@pytest.mark.parametrize("kind", ["relu", "gated"])
@pytest.mark.parametrize(("target", "num_steps"), [(6.0, 250)])
def test_target_l0_is_met_on_held_out_tokens(
    planted: ModuleType, kind: str, target: float, num_steps: int, tmp_path: Path
) -> None:
    source = planted.PlantedSource(d_in=24, num_features=96, firing=0.06)
    view = planted.PlantedView(source, num_batches=40)
    cfg = type(CONFIGS[kind]).parse({"d_in": 24, "d_sae": 192, "target_l0": target})
    config = TrainConfig(num_tokens=256 * num_steps, batch_size=256)
    sae = Trainer(build_sae(cfg), source, config, test=view).fit(tmp_path)
    assert float((sae.encode(view.x) > 0).sum(1).double().mean()) == pytest.approx(target, rel=0.05)
    assert float(str(sae.source["l0_before_calibration"])) == pytest.approx(target, rel=0.2)


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_calibration_by_a_shift_is_exact_on_its_tokens(kind: str) -> None:
    sae = build_sae(type(CONFIGS[kind]).parse({"d_in": 12, "d_sae": 1500, "target_l0": 20}))
    assert sae.cfg.kind in {"relu", "gated"}
    x = torch.randn(2000, 12, generator=torch.Generator().manual_seed(1))
    init_thresholds(sae, torch.randn(4000, 12, generator=torch.Generator().manual_seed(2)), 20.0 / sae.d_sae)  # type: ignore[arg-type]  # one of the two kinds
    sae.b_enc.data.add_(0.05)
    if kind == "gated":
        # Magnitudes that are 0 whatever the gate does must not be counted.
        sae.get_parameter("b_mag").data[:300] = -100.0
    sae.b_enc.data.add_(calibration_shift(sae, x.split(512), 20.0))  # type: ignore[arg-type]  # one of the two kinds
    assert float((sae.encode(x) > 0).sum(1).double().mean()) == pytest.approx(20.0, abs=0.01)


@pytest.mark.parametrize(("target", "sign"), [(1.0, -1.0), (1000.0, 1.0)])
def test_calibration_by_a_shift_does_not_reach_far(target: float, sign: float) -> None:
    sae = build_sae(ReLUConfig.parse({"d_in": 12, "d_sae": 1500, "target_l0": 20}))
    x = torch.randn(2000, 12, generator=torch.Generator().manual_seed(1))
    init_thresholds(sae, x, 20.0 / sae.d_sae)  # type: ignore[arg-type]  # a ReLU SAE
    z = sae.pre_acts(x[:512]).detach()
    shift = calibration_shift(sae, x.split(512), target)  # type: ignore[arg-type]  # a ReLU SAE
    assert shift == pytest.approx(sign * 0.25 * float(z[z > 0].mean()))


@pytest.mark.parametrize("kind", ["matryoshka", "relu", "gated"])
def test_given_weights_are_where_training_goes_on_from(planted: ModuleType, kind: str, tmp_path: Path) -> None:
    source = planted.PlantedSource(scale=20.0)
    config = TrainConfig(num_tokens=256 * 80, batch_size=256)
    sae = Trainer(build_sae(CONFIGS[kind]), source, config).fit(tmp_path / "first")
    x = source.batch(1_000_000)
    before = float((x - sae(x).x_hat).square().mean().detach())
    # Several steps, since a threshold of one batch of so few tokens is noise.
    config = TrainConfig(num_tokens=256 * 8, batch_size=256, init="given", lr=1e-8)
    more = Trainer(sae, planted.PlantedSource(scale=20.0), config).fit(tmp_path / "second")
    assert float((x - more(x).x_hat).square().mean().detach()) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("kind", ["matryoshka", "relu", "gated"])
def test_default_config_runs(planted: ModuleType, kind: str, tmp_path: Path) -> None:
    source = planted.PlantedSource(batch_size=4096)
    sae = Trainer(build_sae(CONFIGS[kind]), source, TrainConfig(num_tokens=12_288)).fit(tmp_path)
    assert all(bool(torch.isfinite(value).all()) for value in sae.state_dict().values())
