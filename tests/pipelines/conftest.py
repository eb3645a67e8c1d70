"""A whole recipe on a tiny random model, small enough to run in seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """
name = "tiny"
out = "{out}"

[cache]
hook_points = ["model.layers.1"]
num_tokens = 4096
shard_tokens = 1024
[cache.model]
name = "{model}"
[cache.text]
kind = "files"
paths = ["{texts}"]
[cache.tokens]
context_len = 32

[split]
test_fraction = 0.3

[train.topk.sae]
kind = "topk"
d_sae = 64
k = 4
[train.topk.training]
num_tokens = 4096
batch_size = 256

[train.jumprelu.sae]
kind = "jumprelu"
d_sae = 64
target_l0 = 4
[train.jumprelu.training]
num_tokens = 4096
batch_size = 256

[label.token_change]
num_features = 4

[evaluate]
num_tokens = 512
num_loss_tokens = 256
num_bootstrap = 50
"""


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model_dir: Callable[[str], Path], many_documents_file: Path) -> Path:
    """A recipe of every stage with two SAEs, writing to `tmp_path / "run"`."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        RECIPE.format(out=tmp_path / "run", model=tiny_model_dir("llama"), texts=many_documents_file), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def with_saes() -> Callable[[Path, str], Path]:
    """Puts other `[train]` tables in place of a recipe's own."""

    def put(recipe: Path, tables: str) -> Path:
        text = recipe.read_text(encoding="utf-8")
        start, end = text.index("[train.topk.sae]"), text.index("[label.token_change]")
        recipe.write_text(text[:start] + tables + text[end:], encoding="utf-8")
        return recipe

    return put
