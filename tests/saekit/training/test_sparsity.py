"""Steering L0: schedule, control, thresholds' start, last calibration."""

import math

import pytest
import torch

from saekit.sae import JumpReLUConfig, JumpReLUSAE
from saekit.training import SparsityConfig
from saekit.training.sparsity import L0Control, calibration_factor, init_thresholds, wanted_l0


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 64.0), (0.25, 32 * math.sqrt(2)), (0.5, 32.0), (0.8, 32.0), (1.0, 32.0)]
)
def test_wanted_l0_falls_geometrically_to_the_target_and_stays(progress: float, expected: float) -> None:
    config = SparsityConfig(start_factor=2.0, ramp_fraction=0.5)
    assert wanted_l0(progress, 32.0, config) == pytest.approx(expected)


def test_control_finds_the_coefficient_of_a_plant_with_delay() -> None:
    """L0 follows the coefficient slowly, as trained thresholds do; wherever the start is, it must end at the target."""
    for start in (1e-5, 1e-2, 10.0):
        control, l0 = L0Control(SparsityConfig(), start=start), 200.0
        for _ in range(1000):
            l0 += 0.05 * (32.0 * (0.01 / control.coefficient) ** 0.5 - l0)
            control.update(l0, 32.0)
        assert l0 == pytest.approx(32.0, rel=0.02), start


def test_control_goes_on_exactly_from_its_state() -> None:
    control, other = L0Control(SparsityConfig(), start=0.1), L0Control(SparsityConfig(), start=1.0)
    control.update(50.0, 32.0)
    other.load_state_dict(control.state_dict())
    for each in (control, other):
        each.update(40.0, 32.0)
    assert other.coefficient == control.coefficient


def test_control_survives_a_batch_without_any_active_feature() -> None:
    control = L0Control(SparsityConfig(), start=0.1)
    control.update(0.0, 32.0)
    assert 0 < control.coefficient < 0.1


def random_sae(d_sae: int = 1500) -> JumpReLUSAE:
    return JumpReLUSAE(JumpReLUConfig(d_in=12, d_sae=d_sae, target_l0=20))


def test_first_thresholds_give_the_wanted_l0_with_all_features_alike() -> None:
    sae, x = random_sae(), torch.randn(3000, 12)
    init_thresholds(sae, x, 30.0 / sae.d_sae)
    active = sae.encode(x) > 0
    assert float(active.sum(1).double().mean()) == pytest.approx(30.0, rel=0.03)
    assert active.sum(0).max() <= 61
    assert active.sum(0).min() >= 59


@pytest.mark.parametrize("true_factor", [0.93, 1.0, 1.12])
def test_calibration_is_exact_on_its_tokens(true_factor: float) -> None:
    sae, x = random_sae(), torch.randn(2000, 12)
    init_thresholds(sae, torch.randn(4000, 12), 20.0 / sae.d_sae)
    sae.scale_thresholds(1 / true_factor)
    factor = calibration_factor(sae, x.split(512), 20.0)
    sae.scale_thresholds(factor)
    assert float((sae.encode(x) > 0).sum(1).double().mean()) == pytest.approx(20.0, abs=0.01)
    assert factor == pytest.approx(true_factor, rel=0.05)


@pytest.mark.parametrize(("l0", "expected"), [(19.0, 1.25), (200.0, 1 / 1.25)])
def test_calibration_does_not_reach_far(l0: float, expected: float) -> None:
    """A run that missed its target by much is reported, not bent into shape."""
    sae, x = random_sae(), torch.randn(2000, 12)
    init_thresholds(sae, x, 20.0 / sae.d_sae)
    sae.scale_thresholds(0.5 if expected > 1 else 2.0)
    assert calibration_factor(sae, x.split(512), l0) == pytest.approx(expected)
