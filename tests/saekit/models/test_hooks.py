"""Hooks: what is captured equals a full forward, what is changed is changed exactly, and nothing stays behind."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from saekit.errors import HookPointError, ModelError
from saekit.models import LanguageModel, ablate, add, capture, load_model, logits, parse_hook_point, replace, resolve
from tests.saekit.models.conftest import layer_path


def _full(lm: LanguageModel, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.no_grad():
        out = lm.model(tokens, output_hidden_states=True)
    return out.logits, out.hidden_states


@pytest.mark.parametrize(
    ("text", "path", "side"),
    [
        ("model.layers.1", "model.layers.1", "output"),
        ("model.layers.1:output", "model.layers.1", "output"),
        ("model.layers.1.self_attn.o_proj:input", "model.layers.1.self_attn.o_proj", "input"),
    ],
)
def test_parse_hook_point_reads_path_and_side(text: str, path: str, side: str) -> None:
    point = parse_hook_point(text)
    assert (point.path, point.side) == (path, side)
    assert parse_hook_point(str(point)) == point


@pytest.mark.parametrize("text", ["", ":input", "model.layers.1:inptu", "model.layers.1:"])
def test_parse_hook_point_refuses(text: str) -> None:
    with pytest.raises(HookPointError, match="needs"):
        parse_hook_point(text)


def test_resolve_suggests_the_nearest_names(llama: LanguageModel) -> None:
    with pytest.raises(HookPointError, match=r"no such module; did you mean 'model\.layers\.2'"):
        resolve(llama, "model.layer.2")
    with pytest.raises(HookPointError, match="top level: model, lm_head"):
        resolve(llama, "????")


def test_capture_equals_the_hidden_states_of_a_full_forward(lm: LanguageModel, tokens: Tensor) -> None:
    _, hidden_states = _full(lm, tokens)
    points = [layer_path(lm, 0), layer_path(lm, 1), f"{layer_path(lm, 0)}:input", f"{layer_path(lm, 2)}:input"]
    found = capture(lm, tokens, points)
    assert list(found) == points
    for point, expected in zip(points, (hidden_states[i] for i in (1, 2, 0, 2)), strict=True):
        assert torch.equal(found[point], expected)
        assert not found[point].requires_grad


def test_capture_of_many_points_equals_capture_of_each_alone_and_late(lm: LanguageModel, tokens: Tensor) -> None:
    """Every childless module that sees the residual stream or part of it, whatever the order asked for."""
    points = []
    for name, module in lm.model.named_modules():
        # GPT-2's Conv1D flattens its input inside, so it is seen as [B, T, D] like any linear map.
        if name.startswith(layer_path(lm, 1) + ".") and isinstance(module, nn.Linear | nn.LayerNorm | Conv1D):
            points += [name, f"{name}:input"]
    assert len(points) >= 12
    together = capture(lm, tokens, points[::-1])
    for point in points:
        assert torch.equal(together[point], capture(lm, tokens, [point], stop_early=False)[point]), point


def test_capture_stops_right_after_the_last_point_in_the_order_of_execution(lm: LanguageModel, tokens: Tensor) -> None:
    finished: list[int] = []
    handles = [
        lm.model.get_submodule(layer_path(lm, number)).register_forward_hook(
            lambda *_, number=number: finished.append(number)
        )
        for number in range(3)
    ]
    cases = [
        ([layer_path(lm, 1), layer_path(lm, 0)], True, [0, 1]),
        ([f"{layer_path(lm, 1)}:input"], True, [0]),
        ([layer_path(lm, 0)], False, [0, 1, 2]),
    ]
    try:
        for points, stop_early, expected in cases:
            finished.clear()
            capture(lm, tokens, points, stop_early=stop_early)
            assert finished == expected
    finally:
        for handle in handles:
            handle.remove()


def test_capture_leaves_out_padding_by_the_mask(lm: LanguageModel, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, 9:] = 0
    point = layer_path(lm, 1)
    short = capture(lm, tokens[:1, :9], [point])[point]
    masked = capture(lm, tokens, [point], attention_mask=mask)[point]
    torch.testing.assert_close(masked[:1, :9], short, atol=1e-5, rtol=1e-5)


def test_capture_reads_a_part_that_is_called_by_keyword(llama: LanguageModel, tokens: Tensor) -> None:
    found = capture(llama, tokens, ["model.layers.1.self_attn:input", "model.layers.1.input_layernorm"])
    assert torch.equal(found["model.layers.1.self_attn:input"], found["model.layers.1.input_layernorm"])


def test_capture_finds_the_hidden_states_among_other_keywords(llama: LanguageModel, tokens: Tensor) -> None:
    point = "model.layers.1.self_attn:input"
    expected = capture(llama, tokens, [point])[point]
    reorder = llama.model.get_submodule("model.layers.1.self_attn").register_forward_pre_hook(
        lambda _, args, kwargs: (args, {"extra": torch.zeros(1, 2, 3), **kwargs}), with_kwargs=True
    )
    try:
        assert torch.equal(capture(llama, tokens, [point])[point], expected)
    finally:
        reorder.remove()


def test_capture_of_a_module_that_runs_twice_gives_its_first_run(
    tiny_model_dir: Callable[[str], Path], tokens: Tensor
) -> None:
    lm = load_model(str(tiny_model_dir("llama")))
    layers = lm.model.get_submodule("model.layers")
    expected = capture(lm, tokens, ["model.layers.1"])["model.layers.1"]
    layers[2] = layers[1]
    for stop_early in (True, False):
        found = capture(lm, tokens, ["model.layers.1", "model.layers.2", "model.norm"], stop_early=stop_early)
        assert torch.equal(found["model.layers.1"], expected)
        assert torch.equal(found["model.layers.2"], expected)


def test_capture_keeps_values_that_a_later_module_overwrites(llama: LanguageModel, tokens: Tensor) -> None:
    points = ["model.layers.0", "model.layers.1"]
    expected = capture(llama, tokens, points)["model.layers.0"]
    vandal = llama.model.get_submodule("model.layers.1").register_forward_pre_hook(
        lambda _, args: (args[0].zero_(), *args[1:])
    )
    try:
        found = capture(llama, tokens, points)
    finally:
        vandal.remove()
    assert torch.equal(found["model.layers.0"], expected)


def test_capture_of_nothing_runs_nothing(llama: LanguageModel, tokens: Tensor) -> None:
    assert capture(llama, tokens, []) == {}


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("model.layers.9", "no such module; did you mean"),
        ("model.embed_tokens:input", r"found torch.int64 of shape \[3, 17\], needs floats"),
        ("model.rotary_emb", r"needs floats of shape \[3, 17, D\]"),
        ("model", "found BaseModelOutputWithPast, needs a tensor"),
        ("model.layers", "did not run in the forward"),
    ],
)
def test_capture_refuses_a_point_without_hidden_states(
    llama: LanguageModel, tokens: Tensor, point: str, message: str
) -> None:
    with pytest.raises(HookPointError, match=message):
        capture(llama, tokens, [point])
    assert torch.equal(logits(llama, tokens), _full(llama, tokens)[0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([[1, 384]]), "id 384, .* has ids 0 to 383"),
        (torch.tensor([[-1, 3]]), "id -1"),
        (torch.zeros(1, 65, dtype=torch.int64), "65 positions, .* has a context of 64"),
        (torch.zeros(7, dtype=torch.int64), "needs integers of shape"),
        (torch.zeros(1, 7), "needs integers of shape"),
    ],
    ids=["beyond-vocabulary", "negative", "too-long", "one-dimension", "floats"],
)
def test_forwards_refuse_tokens(llama: LanguageModel, bad: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        capture(llama, bad, ["model.layers.0"])


def test_logits_equal_the_models_own(lm: LanguageModel, tokens: Tensor) -> None:
    expected, _ = _full(lm, tokens)
    assert torch.equal(logits(lm, tokens), expected)
    assert torch.equal(logits(lm, tokens.int()), expected)


def test_replace_with_the_same_changes_nothing(lm: LanguageModel, tokens: Tensor) -> None:
    with replace(lm, layer_path(lm, 1), lambda hidden: hidden):
        assert torch.equal(logits(lm, tokens), _full(lm, tokens)[0])


def test_replace_moves_the_states_of_one_prompt_into_another(lm: LanguageModel, tokens: Tensor) -> None:
    """After the last layer nothing mixes positions, so the logits must be those of the donor, exactly."""
    donor = tokens.flip(0)
    point = layer_path(lm, 2)
    states = capture(lm, donor, [point])[point]
    with replace(lm, point, lambda _: states):
        assert torch.equal(logits(lm, tokens), logits(lm, donor))


@pytest.mark.parametrize("side", ["", ":input"])
def test_add_shifts_the_states_by_the_vector(lm: LanguageModel, tokens: Tensor, side: str) -> None:
    point = layer_path(lm, 1) + side
    vector = torch.randn(lm.d_model)
    clean = capture(lm, tokens, [point])[point]
    with add(lm, point, vector, scale=2.5):
        steered = capture(lm, tokens, [point])[point]
    assert torch.equal(steered, clean + 2.5 * vector)
    assert torch.equal(capture(lm, tokens, [point])[point], clean)


def test_add_takes_the_same_way_as_the_next_layers_input(lm: LanguageModel, tokens: Tensor) -> None:
    vector = torch.randn(lm.d_model)
    with add(lm, layer_path(lm, 0), vector):
        by_output = logits(lm, tokens)
    with add(lm, f"{layer_path(lm, 1)}:input", vector):
        assert torch.equal(logits(lm, tokens), by_output)
    assert not torch.equal(by_output, logits(lm, tokens))


def test_ablate_by_zero_and_by_a_mean(lm: LanguageModel, tokens: Tensor) -> None:
    point = layer_path(lm, 1)
    mean = torch.randn(lm.d_model)
    with ablate(lm, point):
        assert not capture(lm, tokens, [point])[point].any()
    with ablate(lm, point, mean):
        assert torch.equal(capture(lm, tokens, [point])[point], mean.expand(3, 17, -1))


@pytest.mark.parametrize("point", ["model.layers.1", "model.layers.1:input"])
def test_nested_blocks_apply_from_the_outermost_in(llama: LanguageModel, tokens: Tensor, point: str) -> None:
    vector = torch.randn(llama.d_model)
    clean = capture(llama, tokens, [point])[point]
    with add(llama, point, vector), replace(llama, point, lambda hidden: hidden * 3):
        assert torch.equal(capture(llama, tokens, [point])[point], (clean + vector) * 3)
    with add(llama, point, vector), replace(llama, point, lambda hidden: hidden * 3, first=True):
        assert torch.equal(capture(llama, tokens, [point])[point], clean * 3 + vector)
    with ablate(llama, "model.layers.0"), add(llama, point, vector):
        assert not capture(llama, tokens, ["model.layers.0"])["model.layers.0"].any()


def test_replace_works_on_a_keyword_argument(llama: LanguageModel, tokens: Tensor) -> None:
    with ablate(llama, "model.layers.1.input_layernorm"):
        expected = logits(llama, tokens)
    with ablate(llama, "model.layers.1.self_attn:input"):
        assert torch.equal(logits(llama, tokens), expected)


@pytest.mark.parametrize("kind", [tuple, list], ids=["tuple", "list"])
def test_replace_keeps_the_structure_of_a_tuple(llama: LanguageModel, tokens: Tensor, kind: type) -> None:
    """Attention returns its output and its weights; every other member must come through untouched."""
    seen: list[object] = []
    attention = llama.model.get_submodule("model.layers.1.self_attn")
    marker = object()
    to_kind = attention.register_forward_hook(lambda _, __, output: kind([None, *output, marker]))
    with replace(llama, "model.layers.1.self_attn", lambda hidden: hidden * 2):
        back = attention.register_forward_hook(lambda _, __, output: (seen.append(output), tuple(output[1:3]))[1])
        try:
            logits(llama, tokens)
        finally:
            to_kind.remove()
            back.remove()
    (output,) = seen
    assert type(output) is kind
    assert output[0] is None
    assert isinstance(output[1], Tensor)
    assert output[3] is marker


def test_replace_casts_to_the_models_dtype_and_lets_gradients_through(llama: LanguageModel, tokens: Tensor) -> None:
    vector = torch.zeros(llama.d_model, dtype=torch.float64, requires_grad=True)
    with replace(llama, "model.layers.1", lambda hidden: hidden + vector):
        llama.model(tokens).logits.float().square().sum().backward()
    assert vector.grad is not None
    assert vector.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (lambda lm: replace(lm, "model.layers.1", lambda hidden: hidden[:, 1:]), r"\[3, 16, 32\], needs \[3, 17, 32\]"),
        (lambda lm: add(lm, "model.layers.1", torch.zeros(31)), r"vector of shape \[31\], needs one that broadcasts"),
        (lambda lm: add(lm, "model.layers.1", torch.zeros(2, 3, 17, 32)), "needs one that broadcasts"),
        (lambda lm: ablate(lm, "model.layers.1", torch.zeros(5, 1, 32)), "needs one that broadcasts"),
        (lambda lm: ablate(lm, "model.layers.1", "mean"), "ablation 'mean', needs 'zero' or a tensor"),
        (lambda lm: ablate(lm, "model.layerz.1"), "did you mean"),
    ],
    ids=["replace-shape", "add-width", "add-rank", "ablate-batch", "ablate-word", "no-such-module"],
)
def test_interventions_refuse_what_does_not_fit_and_leave_no_hook(
    llama: LanguageModel, tokens: Tensor, block: object, message: str
) -> None:
    clean = _full(llama, tokens)[0]
    with pytest.raises(HookPointError, match=message), block(llama):  # type: ignore[operator]
        logits(llama, tokens)
    assert torch.equal(logits(llama, tokens), clean)


@pytest.mark.parametrize("where", ["block", "function", "forward", "interrupt"])
def test_hooks_are_gone_after_an_error(lm: LanguageModel, tokens: Tensor, where: str) -> None:
    clean = _full(lm, tokens)[0]

    def fail(hidden: Tensor) -> Tensor:
        raise KeyboardInterrupt if where == "interrupt" else ArithmeticError

    fn = fail if where in ("function", "interrupt") else (lambda hidden: hidden * 2)
    with (
        contextlib.suppress(ArithmeticError, KeyboardInterrupt, ModelError),
        add(lm, layer_path(lm, 0), torch.ones(lm.d_model)),
        replace(lm, layer_path(lm, 1), fn),
    ):
        if where == "block":
            raise ArithmeticError
        capture(lm, tokens if where != "forward" else tokens + 10_000, [layer_path(lm, 2)])
    assert torch.equal(logits(lm, tokens), clean)
