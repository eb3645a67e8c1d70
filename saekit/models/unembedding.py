"""The way from the last residual stream to logits: final norm, head, and what some families do to the logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saekit.errors import ModelError
from saekit.models.hooks import logits
from saekit.models.load import LanguageModel

__all__ = ["Unembedding", "find_unembedding"]

_PROBE_SHAPE = (2, 8)
# Sixteen thousand rows of float32 weights at a time keep a 256k vocabulary from being copied whole.
_CHUNK_ROWS = 16_384


@dataclass(frozen=True, kw_only=True, eq=False)
class Unembedding:
    """Final norm and language-model head of one model, found and proven by `find_unembedding`."""

    norm: nn.Module
    """The final norm, called as the model calls it."""
    norm_path: str
    """Its module path; `<norm_path>:input` is the hook point of the last residual stream."""
    head: nn.Module
    """The language-model head."""
    scale: float = 1.0
    """Factor on the head's output (Cohere, Granite)."""
    softcap: float | None = None
    """Logits are `softcap * tanh(logits / softcap)` (Gemma 2); None: as they are."""

    @property
    def weight(self) -> Tensor:
        """`[V, D]`, in the model's dtype."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the model's logits for the residual stream before the final norm, without gradients.

        Args:
            hidden: `[..., D]` floats.

        Returns:
            `[..., V]` float32.
        """
        with torch.no_grad():
            return self._finish(self.head(self.norm(hidden.to(self.weight)))).float()

    def project(self, directions: Tensor) -> Tensor:
        """Returns what each direction of the residual stream writes to the vocabulary, without gradients.

        The final norm is applied to the direction as to a hidden state (its offset, where a LayerNorm has one, included);
        bias, scale and softcap of the head are left out, as they are the same for all directions or keep the order.

        Args:
            directions: `[n, D]` floats; their lengths make no difference but for the norm's epsilon.

        Returns:
            `[n, V]` float32.

        Source:
            Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions",
            section 3 (VocabProj).
        """
        with torch.no_grad():
            normed = self.norm(directions.to(self.weight)).float()
            # bfloat16 products would tie thousands of tokens.
            return torch.cat([normed @ rows.float().T for rows in torch.split(self.weight, _CHUNK_ROWS)], dim=-1)

    def _finish(self, raw: Tensor) -> Tensor:
        scaled = raw * self.scale if self.scale != 1.0 else raw
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


def find_unembedding(lm: LanguageModel) -> Unembedding:
    """Returns the model's unembedding, proven to give the model's own logits on a short random input.

    No table of names: the final norm is the module that makes the tensor which the head is given.

    Raises:
        ModelError: the parts cannot be told or do not give the model's logits; the top of the module tree is shown.
    """
    head = lm.model.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel's method
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
        raise _refused(lm, "no language-model head with a weight")
    tokens = torch.randint(lm.vocab_size, _PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    trace = _Trace()
    handles = [
        module.register_forward_hook(trace.hook(name))
        for name, module in lm.model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        expected = logits(lm, tokens)
    finally:
        for handle in handles:
            handle.remove()
    head_name = next(name for name, module in lm.model.named_modules() if module is head)
    norm_path = trace.maker_of_input(head_name)
    if norm_path is None:
        raise _refused(lm, "no final norm right before its head")
    hidden = trace.inputs[norm_path]
    if hidden.shape != (*_PROBE_SHAPE, lm.d_model):
        raise _refused(lm, f"{norm_path!r} before its head takes {list(hidden.shape)}, not the residual stream")
    softcap = getattr(lm.text_config, "final_logit_softcapping", None)
    for scale in _scales(lm.text_config):
        found = Unembedding(
            norm=lm.model.get_submodule(norm_path), norm_path=norm_path, head=head, scale=scale, softcap=softcap
        )
        if torch.allclose(found.logits(hidden), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            return found
    raise _refused(lm, f"{norm_path!r} and {head_name!r} do not give its logits")


def _scales(config: object) -> list[float]:
    """Returns the factors on the logits that families state in their configs."""
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return [1.0, *([float(factor)] if factor else []), *([1 / float(divisor)] if divisor else [])]


class _Trace:
    """First tensor in and out of every childless module of one forward."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def keep(_: nn.Module, args: tuple[object, ...], output: object) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self.inputs[name], self._outputs[name] = args[0], output

        return keep

    def maker_of_input(self, name: str) -> str | None:
        """Returns the first module that put out the memory that `name` was given, which may be a slice of it."""
        if name not in self.inputs:
            return None
        memory = self.inputs[name].untyped_storage().data_ptr()
        return next((n for n, t in self._outputs.items() if t.untyped_storage().data_ptr() == memory), None)


def _refused(lm: LanguageModel, what: str) -> ModelError:
    tree = []
    for name, module in lm.model.named_children():
        inner = ", ".join(child for child, _ in module.named_children())
        tree.append(f"{name} ({inner})" if inner else name)
    return ModelError(
        f"unembedding of {lm.name!r}: {what}, needs final norm and head of a decoder; its modules: {'; '.join(tree)}"
    )
