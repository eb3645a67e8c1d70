"""Reading and changing what flows through a model, by module path, with plain forward hooks."""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saekit.errors import HookPointError, ModelError
from saekit.models.load import LanguageModel

__all__ = ["HookPoint", "ablate", "add", "capture", "logits", "parse_hook_point", "replace", "resolve"]

_Found = tuple[int | str, Tensor]


@dataclass(frozen=True)
class HookPoint:
    """A place in a model: what goes into or comes out of one of its modules."""

    path: str
    """As in `model.named_modules()`, e.g. `model.layers.14`."""
    side: Literal["output", "input"] = "output"
    """Which side of the module."""

    def __str__(self) -> str:
        return self.path if self.side == "output" else f"{self.path}:input"


def parse_hook_point(text: str) -> HookPoint:
    """Returns the hook point that `<module path>`, `<module path>:output` or `<module path>:input` names.

    Raises:
        HookPointError: no path, or a side that is neither.
    """
    path, separator, side = text.strip().partition(":")
    if not path:
        raise HookPointError(f"hook point {text!r}: no module path, needs e.g. 'model.layers.14'")
    if separator and side not in ("input", "output"):
        raise HookPointError(f"hook point {text!r}: side {side!r}, needs 'input' or 'output'")
    return HookPoint(path, "input" if side == "input" else "output")


def resolve(lm: LanguageModel, hook_point: str) -> nn.Module:
    """Returns the module that a hook point names.

    Raises:
        HookPointError: the model has no such module; the nearest names are given.
    """
    point = parse_hook_point(hook_point)
    modules: dict[str, nn.Module] = dict(lm.model.named_modules(remove_duplicate=False))
    if point.path in modules:
        return modules[point.path]
    near = difflib.get_close_matches(point.path, [name for name in modules if name], n=3, cutoff=0.3)
    children = ", ".join(name for name, _ in lm.model.named_children())
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"top level: {children}"
    raise HookPointError(f"hook point {hook_point!r}: {lm.name!r} has no such module; {hint}")


def capture(
    lm: LanguageModel,
    tokens: Tensor,
    hook_points: Sequence[str],
    *,
    attention_mask: Tensor | None = None,
    stop_early: bool = True,
) -> dict[str, Tensor]:
    """Returns the hidden states at each hook point, of one forward without gradients.

    The values are those of a full forward, bit for bit; a module that runs more than once gives its first run. Inside
    `replace`, `add` or `ablate`, the changed values are returned.

    Args:
        tokens: `[B, T]` integers.
        hook_points: any number of `<module path>` or `<module path>:input`; the keys of the result.
        attention_mask: `[B, T]`, 1 for tokens and 0 for padding; None: no padding.
        stop_early: end the forward right after the last hook point that it reaches.

    Returns:
        One `[B, T, D]` tensor each, in the model's dtype and on its device.

    Raises:
        HookPointError: no such module, one that does not run in this forward, or no `[B, T, D]` floats there.
        ModelError: token ids outside the vocabulary, or more positions than the model has.
    """
    wanted = {name: (parse_hook_point(name), resolve(lm, name)) for name in hook_points}
    found: dict[str, Tensor] = {}
    size = tokens.shape[:2]

    def keep(name: str, values: "_Values") -> None:
        if name in found:
            return
        _, hidden = _hidden(values, name, size=size)
        is_last = stop_early and len(found) + 1 == len(wanted)
        # A later layer may write into the tensor in place; after the last one there is no later layer.
        found[name] = hidden.detach() if is_last else hidden.detach().clone()
        if is_last:
            raise _StopForward

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, (point, module) in wanted.items():
            stack.enter_context(_removed(_observe(module, point, partial(keep, name))))
        if wanted:
            with contextlib.suppress(_StopForward):
                _forward(lm, tokens, attention_mask)
    absent = [name for name in wanted if name not in found]
    if absent:
        raise HookPointError(
            f"hook point {absent[0]!r}: the module did not run in the forward, needs one that the model calls"
        )
    return {name: found[name] for name in wanted}


def logits(
    lm: LanguageModel, tokens: Tensor, *, attention_mask: Tensor | None = None, has_graph: bool = False
) -> Tensor:
    """Returns the model's next-token logits, `[B, T, V]` float32.

    Args:
        tokens: `[B, T]` integers.
        attention_mask: `[B, T]`, 1 for tokens and 0 for padding; None: no padding.
        has_graph: keep the graph to what `replace` puts in, for gradients; the model's own weights get none.

    Raises:
        ModelError: token ids outside the vocabulary, or more positions than the model has.
    """
    with torch.set_grad_enabled(has_graph and torch.is_grad_enabled()):
        return _forward(lm, tokens, attention_mask).float()


@contextlib.contextmanager
def replace(
    lm: LanguageModel, hook_point: str, fn: Callable[[Tensor], Tensor], *, first: bool = False
) -> Iterator[None]:
    """Inside the block, the hidden states at `hook_point` are `fn` of what they were.

    Nested blocks at one place apply from the outermost to the innermost. The hook is gone after the block, also after an
    error in it.

    Args:
        fn: `[B, T, D]` -> `[B, T, D]`; another float dtype is cast to the model's. Gradients flow through it.
        first: apply this one before those of the enclosing blocks.

    Raises:
        HookPointError: no such module, no `[B, T, D]` floats there, or a result of another shape.
    """
    point, module = parse_hook_point(hook_point), resolve(lm, hook_point)

    def change(values: "_Values") -> "_Values":
        key, hidden = _hidden(values, hook_point)
        changed = fn(hidden)
        if changed.shape != hidden.shape:
            raise HookPointError(
                f"hook point {hook_point!r}: replacement of shape {list(changed.shape)}, needs {list(hidden.shape)}"
            )
        return _with(values, key, changed.to(hidden.dtype))

    with _removed(_rewrite(module, point, change, first=first)):
        yield


@contextlib.contextmanager
def add(lm: LanguageModel, hook_point: str, vector: Tensor, *, scale: float = 1.0) -> Iterator[None]:
    """Inside the block, `scale * vector` is added to the hidden states at `hook_point` (steering).

    Args:
        vector: `[D]`, or anything that broadcasts to `[B, T, D]`.

    Raises:
        HookPointError: as `replace`.
    """

    def steer(hidden: Tensor) -> Tensor:
        offset = scale * vector.to(device=hidden.device, dtype=torch.float32)
        _check_broadcast(offset, hidden, hook_point)
        return hidden + offset.to(hidden.dtype)

    with replace(lm, hook_point, steer):
        yield


@contextlib.contextmanager
def ablate(lm: LanguageModel, hook_point: str, value: Literal["zero"] | Tensor = "zero") -> Iterator[None]:
    """Inside the block, the hidden states at `hook_point` are zero, or `value` at every position.

    Args:
        value: `zero`, or a tensor that broadcasts to `[B, T, D]`, such as the mean `[D]`.

    Raises:
        HookPointError: as `replace`.
    """

    def knock_out(hidden: Tensor) -> Tensor:
        if isinstance(value, str):
            return torch.zeros_like(hidden)
        _check_broadcast(value, hidden, hook_point)
        return value.to(hidden).expand_as(hidden).clone()

    if isinstance(value, str) and value != "zero":
        raise HookPointError(f"hook point {hook_point!r}: ablation {value!r}, needs 'zero' or a tensor")
    with replace(lm, hook_point, knock_out):
        yield


class _StopForward(BaseException):
    """Ends a forward from inside a hook; never leaves this module.

    Not an `Exception`, so that a model's own `except Exception` lets it pass.
    """


@dataclass(frozen=True)
class _Values:
    """What a module was given, or what it returned."""

    positional: tuple[object, ...]
    keywords: Mapping[str, object]
    kind: Literal["arguments", "tensor", "sequence", "other"]


def _forward(lm: LanguageModel, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    _check_tokens(lm, tokens)
    output = lm.model(
        input_ids=tokens.to(device=lm.device, dtype=torch.int64),
        attention_mask=None if attention_mask is None else attention_mask.to(lm.device),
        use_cache=False,
        return_dict=True,
    )
    result = output.logits
    assert isinstance(result, Tensor)
    return result


def _check_tokens(lm: LanguageModel, tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ModelError(f"tokens: {tokens.dtype} of shape {list(tokens.shape)}, needs integers of shape [B, T]")
    if lm.context_len is not None and tokens.shape[1] > lm.context_len:
        raise ModelError(f"tokens: {tokens.shape[1]} positions, {lm.name!r} has a context of {lm.context_len}")
    # On a device the check would wait for all queued work; tokens come from the host in every caller that matters.
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= lm.vocab_size:
            bad = low if low < 0 else high
            raise ModelError(f"tokens: id {bad}, {lm.name!r} has ids 0 to {lm.vocab_size - 1}")


def _observe(module: nn.Module, point: HookPoint, see: Callable[[_Values], None]) -> RemovableHandle:
    if point.side == "input":

        def before(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            see(_Values(args, kwargs, "arguments"))

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, __: tuple[object, ...], output: object) -> None:
        see(_output_values(output))

    return module.register_forward_hook(after)


def _rewrite(
    module: nn.Module, point: HookPoint, change: Callable[[_Values], _Values], *, first: bool
) -> RemovableHandle:
    if point.side == "input":

        def before(
            _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            changed = change(_Values(args, kwargs, "arguments"))
            return changed.positional, dict(changed.keywords)

        return module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)

    def after(_: nn.Module, __: tuple[object, ...], output: object) -> object:
        changed = change(_output_values(output))
        return _rebuilt(output, changed)

    return module.register_forward_hook(after, prepend=first)


def _output_values(output: object) -> _Values:
    if isinstance(output, Tensor):
        return _Values((output,), {}, "tensor")
    if isinstance(output, tuple | list):
        return _Values(tuple(output), {}, "sequence")
    return _Values((output,), {}, "other")


def _rebuilt(output: object, changed: _Values) -> object:
    if changed.kind == "tensor":
        return changed.positional[0]
    if isinstance(output, tuple) and hasattr(output, "_make"):
        return output._make(changed.positional)
    return type(output)(changed.positional)  # type: ignore[call-arg]  # a tuple or a list by now


def _with(values: _Values, key: int | str, hidden: Tensor) -> _Values:
    if isinstance(key, str):
        return _Values(values.positional, {**values.keywords, key: hidden}, values.kind)
    positional = (*values.positional[:key], hidden, *values.positional[key + 1 :])
    return _Values(positional, values.keywords, values.kind)


def _hidden(values: _Values, name: str, *, size: torch.Size | None = None) -> _Found:
    """Returns where the hidden states are among `values`, and the hidden states."""
    found: _Found | None = next(((i, v) for i, v in enumerate(values.positional) if isinstance(v, Tensor)), None)
    if found is None:
        # Decoder layers call their parts by keyword; position embeddings and masks may come before the hidden states.
        named = {key: value for key, value in values.keywords.items() if isinstance(value, Tensor)}
        key = "hidden_states" if "hidden_states" in named else next(iter(named), None)
        found = None if key is None else (key, named[key])
    if found is None:
        what = type(values.positional[0]).__name__ if values.positional else "nothing"
        raise HookPointError(f"hook point {name!r}: found {what}, needs a tensor of shape [B, T, D]")
    hidden = found[1]
    if hidden.ndim != 3 or not hidden.is_floating_point() or (size is not None and hidden.shape[:2] != size):
        shape = "[B, T, D]" if size is None else f"[{size[0]}, {size[1]}, D]"
        raise HookPointError(
            f"hook point {name!r}: found {hidden.dtype} of shape {list(hidden.shape)}, needs floats of shape {shape}"
        )
    return found


def _check_broadcast(vector: Tensor, hidden: Tensor, hook_point: str) -> None:
    missing = hidden.ndim - vector.ndim
    pairs = zip(vector.shape, hidden.shape[max(missing, 0) :], strict=False)
    if missing < 0 or any(own not in (1, size) for own, size in pairs):
        raise HookPointError(
            f"hook point {hook_point!r}: vector of shape {list(vector.shape)}, needs one that broadcasts to"
            f" {list(hidden.shape)}"
        )


@contextlib.contextmanager
def _removed(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
