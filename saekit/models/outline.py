"""What a model will cost to run, from its config alone: no weights are loaded."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from saekit.errors import ModelError
from saekit.models.hooks import parse_hook_point, resolve
from saekit.models.load import LanguageModel, ModelConfig, read_model_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ModelOutline", "outline_model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOutline:
    """Sizes of a model and of the part of it that runs up to some hook points."""

    num_parameters: int
    """Of the whole model; tied ones once."""
    num_bytes: int
    """Of its weights as they are held in memory."""
    vocab_size: int
    """Width of its predictions."""
    widths: dict[str, int]
    """Hook point -> width of the activations there."""
    flops_before: float
    """Of one forward up to the last hook point's block, for each token; without attention's products of tokens."""
    flops_after: float
    """Of the rest of the forward, with the unembedding."""
    attention_before: float
    """Operations of attention's products up to there, for each token and each token of its row."""


def outline_model(config: ModelConfig, hook_points: Sequence[str]) -> ModelOutline:
    """Returns the sizes of a model: one in a local folder, one of the package's table `outlines.toml`, or one of the hub.

    A multiplication and an addition for each weight of a matrix; blocks that hold a hook point are counted whole. Attention:
    two products of 2 * d_model operations for each pair of tokens, half of the pairs being masked.

    Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1.

    Raises:
        ModelError: no such model, or not of a causal LM's class.
        HookPointError: a hook point that the model does not have.
    """
    from transformers import AutoModelForCausalLM

    hf_config = _known_config(config) or read_model_config(config)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # transformers has it untyped
                hf_config, trust_remote_code=config.trust_remote_code
            )
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"model {config.name!r}: cannot be outlined: {str(error).splitlines()[0]}") from error
    text = hf_config.get_text_config()
    d_model, layers = int(text.hidden_size), int(text.num_hidden_layers)
    # Nothing runs, so no tokenizer is needed.
    lm = LanguageModel(
        model=model,
        tokenizer=None,  # type: ignore[arg-type]
        name=config.name,
        d_model=d_model,
        num_layers=layers,
        vocab_size=int(text.vocab_size),
        context_len=None,
    )
    widths = {hook_point: _width(lm, hook_point) for hook_point in hook_points}
    last = max((_block(hook_point, layers) for hook_point in hook_points), default=layers - 1)
    by_block: dict[int, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Embedding):
            entries = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
            by_block[_block(name, layers)] = by_block.get(_block(name, layers), 0) + entries
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelOutline(
        num_parameters=num_parameters,
        num_bytes=num_parameters * getattr(torch, config.dtype).itemsize,
        vocab_size=lm.vocab_size,
        widths=widths,
        flops_before=2.0 * sum(entries for block, entries in by_block.items() if block <= last),
        flops_after=2.0 * sum(entries for block, entries in by_block.items() if block > last),
        attention_before=2.0 * d_model * (min(last, layers - 1) + 1),
    )


def _block(path: str, layers: int) -> int:
    """Returns the number of the block that a module path lies in; one past the last for what stands behind them."""
    found = re.search(r"\.(\d+)(?:[.:]|$)", path)
    return int(found.group(1)) if found else layers


def _width(lm: LanguageModel, hook_point: str) -> int:
    """Returns how wide activations are there: as a projection's own shape says, elsewhere as the residual stream."""
    module = resolve(lm, hook_point)
    is_input = parse_hook_point(hook_point).side == "input"
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.in_features if is_input else module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):
        return int(weight.shape[0 if is_input else 1])
    if next(module.parameters(), None) is None:
        raise ModelError(
            f"hook point {hook_point!r}: its width is not in the model's config, needs sae.d_in in the recipe"
        )
    return lm.d_model


def _known_config(config: ModelConfig) -> "PretrainedConfig | None":
    from transformers import AutoConfig

    if Path(config.name).expanduser().exists():
        return None
    text = (resources.files("saekit.models") / "outlines.toml").read_text(encoding="utf-8")
    for known in tomllib.loads(text).values():
        if config.name in known["names"]:
            values = dict(known["config"])
            found: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
            return found
    return None
