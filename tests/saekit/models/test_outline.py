"""A model's sizes from its config alone, against the model itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from saekit.errors import HookPointError, ModelError
from saekit.models import ModelConfig, capture, load_model
from saekit.models.outline import outline_model

POINTS = {
    "llama": [
        "model.layers.1",
        "model.layers.0.mlp:input",
        "model.layers.1.mlp.down_proj:input",
        "model.layers.1.self_attn",
    ],
    "gpt2": ["transformer.h.1", "transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj:input", "transformer.h.1.ln_2"],
}


@pytest.mark.parametrize("family", sorted(POINTS))
def test_outline_is_that_of_the_model(tiny_model_dir: Callable[[str], Path], family: str) -> None:
    name, points = str(tiny_model_dir(family)), POINTS[family]
    outline, lm = outline_model(ModelConfig(name=name), points), load_model(name)
    hidden = capture(lm, torch.zeros(1, 4, dtype=torch.long), points)
    assert outline.widths == {point: values.shape[-1] for point, values in hidden.items()}
    assert outline.num_parameters == sum(parameter.numel() for parameter in lm.model.parameters())
    assert outline.num_bytes == 4 * outline.num_parameters
    matrices = {n: m for n, m in lm.model.named_modules() if not isinstance(m, nn.Embedding)}
    entries = {n: sum(p.numel() for p in m.parameters(recurse=False) if p.ndim > 1) for n, m in matrices.items()}
    behind = sum(count for n, count in entries.items() if ".2." in n or "lm_head" in n)
    assert outline.flops_after == 2 * behind
    assert outline.flops_before == 2 * (sum(entries.values()) - behind)
    assert outline.attention_before == 2 * 32 * 2


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("gpt2", 124_439_808), ("google/gemma-2-2b", 2_614_341_888), ("meta-llama/Meta-Llama-3-8B", 8_030_261_248)],
)
def test_table_has_the_shapes_of_the_releases(name: str, num_parameters: int) -> None:
    assert outline_model(ModelConfig(name=name), []).num_parameters == num_parameters


def test_weights_in_half_precision_take_half() -> None:
    assert outline_model(ModelConfig(name="gpt2", dtype="bfloat16"), []).num_bytes == 2 * 124_439_808


def test_what_the_config_does_not_say_is_asked_for() -> None:
    with pytest.raises(ModelError, match=r"'transformer.h.1.mlp.act': its width is not in the model's config, needs"):
        outline_model(ModelConfig(name="gpt2"), ["transformer.h.1.mlp.act"])
    with pytest.raises(HookPointError, match="has no such module"):
        outline_model(ModelConfig(name="gpt2"), ["transformer.h.12"])
    with pytest.raises(ModelError, match="no such folder"):
        outline_model(ModelConfig(name="./nowhere"), [])
