"""Fixtures' folders, copied and changed in one place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"

Changed = Callable[..., Path]


@pytest.fixture
def changed(tmp_path: Path) -> Changed:
    """A function: fixture, config keys to set (None: to drop), tensors to set (None: to drop) -> a changed copy's folder."""

    def change(
        name: str, config: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None
    ) -> Path:
        folder = tmp_path / name
        shutil.copytree(FIXTURES / name, folder)
        for path in folder.rglob("*.json"):
            if config and path.name in {"cfg.json", "config.json", "hyperparams.json"}:
                values = json.loads(path.read_text(encoding="utf-8"))
                path.write_text(json.dumps(_merged(values, config)), encoding="utf-8")
        for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.pt")]:
            if not tensors:
                continue
            is_pickle = path.suffix == ".pt"
            stored = torch.load(path, weights_only=True) if is_pickle else load_file(path)
            stored = _merged(stored, tensors)
            if is_pickle:
                torch.save(stored, path)
            else:
                save_file({key: value.contiguous() for key, value in stored.items()}, path)
        return folder

    return change


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**old, **new}.items() if value is not None}
