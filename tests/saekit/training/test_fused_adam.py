"""FusedAdam has the surface of torch's optimizers, and its state resumes bit for bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saekit.training.fused_adam import FusedAdam


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    W_dec = nn.functional.normalize(torch.randn(9, 5, generator=generator), dim=1)
    return {
        "W_enc": nn.Parameter(torch.randn(9, 5, generator=generator).T),
        "b_enc": nn.Parameter(torch.zeros(9)),
        "W_dec": nn.Parameter(W_dec),
    }


def make_optimizer(parameters: dict[str, nn.Parameter], **options: Any) -> FusedAdam:
    groups = [{"params": [parameter], "name": name} for name, parameter in parameters.items()]
    return FusedAdam(groups, lr=0.01, unit_rows={"W_dec"}, **options)


def set_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def values(parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters.values()]


def test_state_goes_on_bit_for_bit() -> None:
    whole, stopped = make_parameters(), make_parameters()
    optimizer = make_optimizer(whole)
    first = make_optimizer(stopped)
    for seed in range(3):
        for parameters, each in ((whole, optimizer), (stopped, first)):
            set_gradients(parameters, seed)
            each.step()
    resumed = make_optimizer(stopped)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(3, 6):
        for parameters, each in ((whole, optimizer), (stopped, resumed)):
            set_gradients(parameters, seed)
            each.step()
    assert all(torch.equal(one, other) for one, other in zip(values(whole), values(stopped), strict=True))


def test_state_of_torchs_adam_is_taken_over() -> None:
    """A checkpoint that was written with it goes on."""
    mine, other = make_parameters(), make_parameters()
    groups = [{"params": [parameter], "name": name} for name, parameter in other.items()]
    adam, fused = torch.optim.Adam(groups, lr=0.01), make_optimizer(mine)
    for seed in range(2):
        set_gradients(other, seed)
        adam.step()
    for parameter, trained in zip(mine.values(), other.values(), strict=True):
        parameter.data.copy_(trained.data)
    fused.load_state_dict(copy.deepcopy(adam.state_dict()))
    for parameters, each in ((mine, fused), (other, adam)):
        set_gradients(parameters, 7)
        each.step()
    for name in ("W_enc", "b_enc"):
        torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-7)


def test_rows_stay_unit_and_layouts_stay() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    strides = {name: parameter.stride() for name, parameter in parameters.items()}
    for seed in range(5):
        set_gradients(parameters, seed)
        optimizer.step()
    torch.testing.assert_close(parameters["W_dec"].detach().norm(dim=1), torch.ones(9))
    assert {name: parameter.stride() for name, parameter in parameters.items()} == strides
    moments = optimizer.state[parameters["W_enc"]]
    assert moments["exp_avg"].stride() == parameters["W_enc"].stride()


def test_norm_is_that_of_all_projected_gradients_and_scaling_halves_them() -> None:
    parameters, halved = make_parameters(), make_parameters()
    optimizer, other = make_optimizer(parameters), make_optimizer(halved)
    set_gradients(parameters, 1)
    W_dec, grad = parameters["W_dec"].detach(), parameters["W_dec"].grad
    assert grad is not None
    rest = grad - (grad * W_dec).sum(1, keepdim=True) * W_dec
    others = [parameters[name].grad for name in ("W_enc", "b_enc")]
    squares = [gradient.double().square().sum() for gradient in (rest, *others) if gradient is not None]
    assert float(optimizer.gradient_norm()) == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-6)
    set_gradients(halved, 1)
    for parameter in halved.values():
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)
    optimizer.gradient_scale = 0.5
    optimizer.step()
    other.step()
    for one, two in zip(values(parameters), values(halved), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_parameters_without_a_gradient_stay_and_a_closure_is_called() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    before = values(parameters)
    parameters["b_enc"].grad = torch.ones(9)
    assert optimizer.step(lambda: 3.0) == 3.0
    after = values(parameters)
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [True, False, True]
