"""Going on from a layer: bit for bit the full forward, without the layers before."""

import pytest
import torch
from torch import Tensor

from saekit.errors import HookPointError
from saekit.models import LanguageModel, add, can_run_from, capture, later_layers, logits, replace, run_from
from tests.saekit.models.conftest import layer_path


@pytest.mark.parametrize("number", [0, 1, 2])
def test_run_from_a_clean_state_gives_the_clean_logits(lm: LanguageModel, tokens: Tensor, number: int) -> None:
    point = layer_path(lm, number)
    hidden = capture(lm, tokens, [point])[point]
    assert can_run_from(lm, point)
    assert torch.equal(run_from(lm, point, hidden, tokens), logits(lm, tokens))
    assert torch.equal(logits(lm, tokens), run_from(lm, point, hidden, tokens))


def test_run_from_equals_replace_in_a_full_forward(lm: LanguageModel, tokens: Tensor) -> None:
    point = layer_path(lm, 1)
    mask = torch.ones_like(tokens)
    mask[1, 11:] = 0
    hidden = torch.randn(3, 17, lm.d_model, dtype=torch.float64)
    with replace(lm, point, lambda _: hidden):
        expected = logits(lm, tokens, attention_mask=mask)
    assert torch.equal(run_from(lm, point, hidden, tokens, attention_mask=mask), expected)


def test_run_from_leaves_out_the_layers_before_and_puts_them_back(lm: LanguageModel, tokens: Tensor) -> None:
    point = layer_path(lm, 1)
    hidden = capture(lm, tokens, [point])[point]
    assert can_run_from(lm, point)
    ran: list[int] = []
    handles = [
        next(lm.model.get_submodule(layer_path(lm, number)).children()).register_forward_hook(
            lambda *_, number=number: ran.append(number)
        )
        for number in range(3)
    ]
    try:
        run_from(lm, point, hidden, tokens)
        assert ran == [2]
        logits(lm, tokens)
        assert ran == [2, 0, 1, 2]
    finally:
        for handle in handles:
            handle.remove()
    assert all("forward" not in vars(lm.model.get_submodule(layer_path(lm, number))) for number in range(3))


@pytest.mark.parametrize("point", ["model.layers.1:input", "model.layers.1.mlp", "model.norm", "model.embed_tokens"])
def test_run_from_elsewhere_computes_the_full_forward(llama: LanguageModel, tokens: Tensor, point: str) -> None:
    hidden = capture(llama, tokens, [point])[point]
    assert not can_run_from(llama, point)
    assert torch.equal(run_from(llama, point, hidden, tokens), logits(llama, tokens))
    with replace(llama, point, lambda states: states * 2):
        expected = logits(llama, tokens)
    assert torch.equal(run_from(llama, point, hidden * 2, tokens), expected)


@pytest.mark.parametrize("point", ["model.layers.1", "model.layers.1.mlp"])
def test_run_from_lets_enclosing_blocks_act_on_the_given_states(
    llama: LanguageModel, tokens: Tensor, point: str
) -> None:
    hidden, vector = torch.randn(3, 17, 32), torch.randn(32)
    with add(llama, point, vector):
        steered = run_from(llama, point, hidden, tokens)
    assert torch.equal(steered, run_from(llama, point, hidden + vector, tokens))


def test_run_from_falls_back_where_layers_pass_something_else_on(llama: LanguageModel, tokens: Tensor) -> None:
    """A layer that reads what an earlier layer left elsewhere cannot be run without it."""
    first, last = llama.model.get_submodule("model.layers.0"), llama.model.get_submodule("model.layers.2")
    left: list[Tensor] = []
    handles = [
        first.mlp.register_forward_hook(lambda _, __, output: left.append(output)),
        last.mlp.register_forward_hook(lambda _, __, output: output + (left.pop() if left else 0)),
    ]
    from saekit.models.run_from import _proven

    known = _proven.pop(llama.model, None)
    try:
        hidden = capture(llama, tokens, ["model.layers.1"])["model.layers.1"]
        left.clear()
        assert not can_run_from(llama, "model.layers.1")
        assert torch.equal(run_from(llama, "model.layers.1", hidden, tokens), logits(llama, tokens))
    finally:
        for handle in handles:
            handle.remove()
        _proven.pop(llama.model, None)
        if known is not None:
            _proven[llama.model] = known


def test_run_from_refuses_another_shape_and_puts_everything_back(llama: LanguageModel, tokens: Tensor) -> None:
    expected = logits(llama, tokens)
    for point in ("model.layers.1", "model.layers.1.mlp"):
        with pytest.raises(HookPointError, match=r"\[3, 16, 32\], needs \[3, 17, 32\]"):
            run_from(llama, point, torch.zeros(3, 16, 32), tokens)
    with pytest.raises(HookPointError, match="did you mean"):
        run_from(llama, "model.layers.7", torch.zeros(3, 17, 32), tokens)
    assert torch.equal(logits(llama, tokens), expected)


def test_gradient_reaches_the_hidden_states_and_no_weight(lm: LanguageModel, tokens: Tensor) -> None:
    point = layer_path(lm, 1)
    hidden = capture(lm, tokens, [point])[point].requires_grad_()
    found = run_from(lm, point, hidden, tokens, has_graph=True)
    assert torch.equal(found.detach(), logits(lm, tokens))
    found.square().mean().backward()
    with replace(lm, point, lambda _: other):
        other = hidden.detach().clone().requires_grad_()
        logits(lm, tokens, has_graph=True).square().mean().backward()
    assert hidden.grad is not None
    assert other.grad is not None
    assert hidden.grad.any()
    torch.testing.assert_close(hidden.grad, other.grad)
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert not run_from(lm, point, hidden, tokens).requires_grad


def test_later_layers_are_those_behind_the_hook_point(lm: LanguageModel) -> None:
    first, second, third = (layer_path(lm, number) for number in range(3))
    assert later_layers(lm, second) == [third]
    assert later_layers(lm, third) == []
    assert later_layers(lm, f"{first}.mlp") == [first, second, third]
    assert later_layers(lm, f"{second}:input") == [second, third]
    with pytest.raises(HookPointError, match=r"hook point 'lm_head': in no decoder layer of"):
        later_layers(lm, "lm_head")
