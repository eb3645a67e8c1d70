"""AdamW with moments of a byte: close to AdamW, exact on resume, and one line where its package is absent."""

import importlib.util
import io
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from saekit.errors import ConfigError, MissingDependencyError
from saekit.sae import TopKConfig, build_sae
from saekit.training import TrainConfig, Trainer, read_metrics
from saekit.training import loop as loop_module
from saekit.training.low_bit import LowBitAdamW

with_package = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra lowbit")
CFG = TopKConfig(d_in=16, d_sae=320, k=2)
CONFIG = TrainConfig(
    num_tokens=40 * 64, batch_size=64, lr=3e-3, optimizer="adamw8bit", checkpoint_every_tokens=9 * 64, weight_decay=0.01
)


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "W_enc": nn.Parameter(torch.randn(320, 16, generator=generator).T),
        "b_enc": nn.Parameter(torch.zeros(320)),
    }


def set_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def make_optimizer(parameters: dict[str, nn.Parameter]) -> LowBitAdamW:
    groups = [{"params": [parameter], "name": name} for name, parameter in parameters.items()]
    return LowBitAdamW(groups, lr=0.01, weight_decay=0.1)


@with_package
def test_steps_are_nearly_those_of_adamw_and_memory_stays_by_feature() -> None:
    mine, exact = make_parameters(), make_parameters()
    optimizer = make_optimizer(mine)
    adamw = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.ndim == 2 else 0.0} for p in exact.values()], lr=0.01
    )
    for seed in range(10):
        for parameters in (mine, exact):
            set_gradients(parameters, seed)
        optimizer.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = 0.01 * (seed + 1)
        optimizer.step()
        adamw.step()
    assert mine["W_enc"].T.is_contiguous()
    moved, off = (exact["W_enc"] - other.detach() for other in (make_parameters()["W_enc"], mine["W_enc"]))
    assert float((off.norm() / moved.norm()).detach()) < 0.05
    torch.testing.assert_close(mine["b_enc"], exact["b_enc"], atol=1e-5, rtol=1e-4)
    kept = torch.utils._pytree.tree_leaves(optimizer.state_dict()["state"])
    assert sum(value.dtype == torch.uint8 for value in kept if isinstance(value, torch.Tensor)) == 2


@with_package
def test_state_goes_on_bit_for_bit() -> None:
    whole, stopped = make_parameters(), make_parameters()
    optimizer, first = make_optimizer(whole), make_optimizer(stopped)
    for seed in range(3):
        for parameters, each in ((whole, optimizer), (stopped, first)):
            set_gradients(parameters, seed)
            each.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = make_optimizer(stopped)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(3, 6):
        for parameters, each in ((whole, optimizer), (stopped, resumed)):
            set_gradients(parameters, seed)
            each.step()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@with_package
def test_stopped_training_ends_at_the_same_bytes(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = loop_module.TrainingLoop.save

    def save_then_fail(self: loop_module.TrainingLoop) -> None:
        save(self)
        if self.run.step == 18:
            raise RuntimeError("power cut")

    Trainer(build_sae(CFG), planted.PlantedSource(batch_size=64), CONFIG).fit(tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(loop_module.TrainingLoop, "save", save_then_fail)
        Trainer(build_sae(CFG), planted.PlantedSource(batch_size=64), CONFIG).fit(tmp_path / "cut")
    Trainer(build_sae(CFG), planted.PlantedSource(batch_size=64), CONFIG).fit(tmp_path / "cut")
    one, other = ((tmp_path / name / "sae.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other
    fvu = [row["fvu"] for row in read_metrics(tmp_path / "whole")]
    assert float(str(fvu[-1])) < 0.9 * float(str(fvu[0]))


def test_absent_package_is_one_line_before_anything_is_written(
    planted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    with pytest.raises(
        MissingDependencyError, match=r"needs the package bitsandbytes; pip install 'saekit\[lowbit\]'"
    ) as caught:
        Trainer(build_sae(CFG), planted.PlantedSource(batch_size=64), CONFIG)
    assert "\n" not in str(caught.value)


def test_weight_decay_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="weight_decay with optimizer 'adam', needs 'adamw8bit'"):
        TrainConfig.parse({"num_tokens": 10, "weight_decay": 0.1})
