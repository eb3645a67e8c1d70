"""The rest of a forward, from a decoder layer's output on: what steering and loss recovery pay for, and no more."""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from saekit.errors import HookPointError
from saekit.models.hooks import logits, parse_hook_point, replace, resolve
from saekit.models.load import LanguageModel

__all__ = ["can_run_from", "later_layers", "run_from"]

_PROBE_SHAPE = (2, 8)

# Per model and hook point: whether layers before it can be left out.
_proven: "weakref.WeakKeyDictionary[nn.Module, dict[str, bool]]" = weakref.WeakKeyDictionary()


def run_from(
    lm: LanguageModel,
    hook_point: str,
    hidden: Tensor,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    has_graph: bool = False,
) -> Tensor:
    """Returns the logits that the model gives if the hidden states at `hook_point` are `hidden`.

    Where the hook point is a decoder layer's output, the layers up to it are not computed, and the result is bit for bit
    that of the full forward (proven on a short random input at the first call for a model and hook point). Anywhere else
    the full forward is computed and the hidden states are replaced. Hooks of `replace`, `add` and `ablate` apply to
    `hidden` as to any value at their place.

    Args:
        hidden: `[B, T, D]` floats.
        tokens: `[B, T]` the tokens that `hidden` belongs to; they set masks and positions.
        attention_mask: `[B, T]`, 1 for tokens and 0 for padding; None: no padding.
        has_graph: keep the graph to `hidden`, for gradients; the model's own weights get none.

    Returns:
        `[B, T, V]` float32.

    Raises:
        HookPointError: no such module, or `hidden` of another shape than is found there.
        ModelError: token ids outside the vocabulary, or more positions than the model has.
    """
    hidden = hidden.to(device=lm.device, dtype=lm.dtype)
    if can_run_from(lm, hook_point):
        width = (*tokens.shape, lm.d_model)
        if hidden.shape != width:
            raise HookPointError(
                f"hook point {hook_point!r}: hidden states of shape {list(hidden.shape)}, needs {list(width)}"
            )
        with _skipped(lm, hook_point, hidden):
            return logits(lm, tokens, attention_mask=attention_mask, has_graph=has_graph)
    with replace(lm, hook_point, lambda _: hidden, first=True):
        return logits(lm, tokens, attention_mask=attention_mask, has_graph=has_graph)


def can_run_from(lm: LanguageModel, hook_point: str) -> bool:
    """Returns whether `run_from` leaves out the layers before `hook_point`; a tiny forward tells at the first call.

    Raises:
        HookPointError: no such module.
    """
    known = _proven.setdefault(lm.model, {})
    if hook_point not in known:
        known[hook_point] = _layers(lm, hook_point) is not None and _is_exact(lm, hook_point)
    return known[hook_point]


def later_layers(lm: LanguageModel, hook_point: str) -> list[str]:
    """Returns the hook points of the decoder layers' outputs behind `hook_point`, its own layer's where that is inside it.

    Raises:
        HookPointError: the hook point is in no decoder layer.
    """
    point = parse_hook_point(hook_point)
    parts = point.path.split(".")
    for end in range(1, len(parts)):
        parent = lm.model.get_submodule(".".join(parts[:end]))
        if isinstance(parent, nn.ModuleList) and len(parent) == lm.num_layers:
            is_output = end + 1 == len(parts) and point.side == "output"
            first = int(parts[end]) + is_output
            return [f"{'.'.join(parts[:end])}.{number}" for number in range(first, lm.num_layers)]
    raise HookPointError(
        f"hook point {hook_point!r}: in no decoder layer of {lm.name!r}, needs one with layers behind it"
    )


def _layers(lm: LanguageModel, hook_point: str) -> list[nn.Module] | None:
    """Returns the decoder layers up to and including the hooked one; None where the hook point is no layer's output."""
    point = parse_hook_point(hook_point)
    layer = resolve(lm, hook_point)
    parent_path, _, number = point.path.rpartition(".")
    parent = lm.model.get_submodule(parent_path)
    if point.side == "input" or not isinstance(parent, nn.ModuleList) or len(parent) != lm.num_layers:
        return None
    assert parent[int(number)] is layer
    return list(parent[: int(number) + 1])


def _is_exact(lm: LanguageModel, hook_point: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(lm.vocab_size, _PROBE_SHAPE, generator=generator)
    hidden = torch.randn(*_PROBE_SHAPE, lm.d_model, generator=generator).to(device=lm.device, dtype=lm.dtype)
    returned: list[object] = []
    with replace(lm, hook_point, lambda _: hidden, first=True):
        handle = resolve(lm, hook_point).register_forward_hook(lambda _, __, output: returned.append(output))
        try:
            full = logits(lm, tokens)
        finally:
            handle.remove()
    if not isinstance(returned[0], Tensor):
        # A tuple carries more than the hidden states, and what more cannot be made up.
        return False
    with _skipped(lm, hook_point, hidden):
        return torch.equal(full, logits(lm, tokens))


@contextlib.contextmanager
def _skipped(lm: LanguageModel, hook_point: str, hidden: Tensor) -> Iterator[None]:
    """Inside the block, the hooked layer and those before it return `hidden` without computing anything."""
    layers = _layers(lm, hook_point)
    assert layers is not None

    def forward(*_: object, **__: object) -> Tensor:
        return hidden

    # Wrappers such as accelerate's put a forward of their own on the instance; it goes back as it was.
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is not None:
                layer.forward = own
            else:
                vars(layer).pop("forward", None)
