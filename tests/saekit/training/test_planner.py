"""Counts against real trainings in closed form; speeds that move the way they must."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from saekit.activations import ActivationStore
from saekit.errors import ConfigError
from saekit.sae import AnySAEConfig, SAEConfig, TopKConfig, build_sae
from saekit.training import TrainConfig, Trainer
from saekit.training.arrays import stage_tensors
from saekit.training.build import build_objective
from saekit.training.costs import LanguageModelCost, StoreSize, mean_active, step_cost
from saekit.training.hardware import find_hardware
from saekit.training.layout import Layout
from saekit.training.memory import staged_bytes, training_bytes
from saekit.training.planner import TrainingPlan, memory_of, plan_training
from saekit.training.run import TrainRun
from saekit.training.shape import shape_of
from saekit.training.sharded_state import written_state
from saekit.training.start import estimate_normalization
from saekit.training.state import latest_checkpoint, load_run

# Odd widths, so that no two of them can stand for each other.
TINY: dict[str, Any] = {"d_in": 5, "d_sae": 32, "k": 3, "target_l0": 3.0, "num_sites": 2, "d_out": 7}
KINDS = [cfg.model_fields["kind"].default for cfg in get_args(get_args(AnySAEConfig)[0])]
CLASSES = dict(zip(KINDS, get_args(get_args(AnySAEConfig)[0]), strict=True))
WIDE = TopKConfig(d_in=2304, d_sae=65_536, k=64)
LARGE = StoreSize(num_tokens=10**9, token_bytes=2 * 2304)
SMALL = StoreSize(num_tokens=1000, token_bytes=2 * 2304)


def tiny(kind: str, **more: object) -> SAEConfig:
    cls = CLASSES[kind]
    values = {key: value for key, value in TINY.items() if key in cls.model_fields}
    cfg: SAEConfig = cls.parse(values | more)
    return cfg


def config(**values: object) -> TrainConfig:
    return TrainConfig.parse({"num_tokens": 10**9, "batch_size": 8192} | values)


def planned(cfg: SAEConfig = WIDE, *, gpu: str = "h100", num_nodes: int = 1, **values: object) -> TrainingPlan:
    return plan_training(cfg, config(**values), find_hardware(gpu), store=SMALL, num_nodes=num_nodes)


@pytest.mark.parametrize("kind", [*KINDS, "transcoder with a skip"])
def test_counts_are_those_of_the_real_sae(kind: str) -> None:
    cfg = tiny("transcoder", has_skip=True) if kind.endswith("skip") else tiny(kind)
    sae = build_sae(cfg)
    objective = build_objective(sae, config(), total_variance=1.0)
    trained = objective.trained_parameters()
    shape = shape_of(cfg)
    assert shape.num_trained == sum(parameter.numel() for parameter in trained.values())
    known = {id(parameter) for parameter in trained.values()}
    assert shape.num_held == sum(p.numel() for p in sae.parameters() if id(p) not in known)
    assert (shape.width_in, shape.width_out) == sae.widths


def tensors(state: object) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for value in values for tensor in tensors(value)]


@pytest.mark.parametrize(("optimizer", "tolerance"), [("adam", 0.0), ("signum", 0.0), ("muon", 0.03)])
def test_optimizer_and_average_are_as_large_as_in_a_checkpoint(
    store: ActivationStore, tmp_path: Path, optimizer: str, tolerance: float
) -> None:
    cfg = TopKConfig(d_in=store.d_in, d_sae=64, k=4)
    average = None if optimizer == "signum" else 0.9
    settings = config(
        num_tokens=512, batch_size=64, optimizer=optimizer, ema_decay=average, checkpoint_every_tokens=128
    )
    train, _ = store.split(test_fraction=0.2)
    Trainer(build_sae(cfg), train, settings).fit(tmp_path)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    run = load_run(checkpoint)["run"]
    # Numbers of steps are scalars.
    found = sum(t.numel() * t.element_size() for t in tensors(run["optimizer"]["state"]) if t.ndim)
    size = StoreSize(num_tokens=train.num_tokens, token_bytes=store.token_bytes)
    memory = memory_of(shape_of(cfg), settings, find_hardware("cpu"), store=size)
    assert memory.parts["optimizer"] == pytest.approx(found, rel=tolerance)
    assert memory.parts["average"] == sum(t.numel() * 4 for t in tensors(run["average"]["ema"]))
    weights = [run["objective"][f"sae.{name}"] for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    assert memory.parts["weights"] == sum(t.numel() * t.element_size() for t in weights)


@pytest.mark.parametrize("layout", [(1, 1), (3, 1), (1, 2), (2, 2)], ids=lambda layout: f"{layout[0]}x{layout[1]}")
@pytest.mark.parametrize(("kind", "average"), [("jumprelu", 0.9), ("topk", None)])
def test_copy_of_a_checkpoint_is_as_large_as_what_is_staged(
    planted: ModuleType, kind: str, average: float | None, layout: tuple[int, int]
) -> None:
    data, latents = layout
    settings = config(num_tokens=512, batch_size=64, ema_decay=average)
    cfg = tiny(kind, d_sae=48)
    place = Layout.alone()
    place.latents.size, place.data.size = latents, data
    part = build_sae(cfg.model_copy(update={"d_sae": 48 // latents}))
    source = planted.PlantedSource(d_in=5, batch_size=64)
    normalization = estimate_normalization(source.batch(0))
    run = TrainRun(part, source, settings, normalization=normalization)
    run.train_step()
    _, rows = stage_tensors(written_state(run.state_dict(), place, 48), rank=0, world_size=data * latents)
    # The normalisation's mean is no part of what grows with the SAE; biases and other short arrays are cut in whole rows.
    staged = sum(part.tensor.nbytes for name, part in rows.items() if not name.startswith("normalization"))
    size = staged_bytes(shape_of(cfg), settings, num_processes=data * latents, latents=latents)
    assert size == pytest.approx(staged, abs=16 * 5)


def test_memory_says_what_training_itself_says() -> None:
    cfg, settings = tiny("topk"), config(batch_size=64)
    parts = memory_of(shape_of(cfg), settings, find_hardware("cpu"), store=SMALL).parts
    del parts["pre-activations"]
    assert sum(parts.values()) == training_bytes(build_sae(cfg), settings)


def test_memory_of_a_step_by_hand() -> None:
    memory = planned(gpu="rtx4090").memory
    numbers = 65_536 * (2 * 2304 + 1) + 2304
    assert memory.parts["weights"] == memory.parts["gradients"] == 4 * numbers
    assert memory.parts["optimizer"] == 8 * numbers
    assert memory.parts["activations"] == 8 * 8192 * 2304 * 4
    assert memory.parts["pre-activations"] == 256 * 2**20
    assert memory.device == sum(memory.parts.values())
    assert memory.reader == 1000 * 2 * 2304 + 2 * 8192 * 2304 * 4
    assert memory.staged == 12 * numbers + 8 * 65_536
    assert memory.given == 8 * numbers
    small = planned(gpu="rtx4090", micro_batch_size=512, ema_decay=0.9).memory
    assert small.parts["activations"] == 8 * 512 * 2304 * 4
    assert small.parts["average"] == 4 * numbers


def test_small_sae_holds_most_while_its_data_are_measured() -> None:
    memory = planned(TopKConfig(d_in=2304, d_sae=64, k=4), gpu="rtx4090", micro_batch_size=256).memory
    assert memory.device == memory.parts["weights"] + 32_768 * 2304 * 12


def test_parts_of_a_step_by_hand() -> None:
    hardware = find_hardware("h200")
    parts = {p.name: p for p in step_cost(shape_of(WIDE), config(), hardware, store=SMALL, num_processes=8).parts}
    numbers, bytes_a_second = shape_of(WIDE).num_trained, 4.8e12 * 0.83
    assert parts["encoder product"].seconds == pytest.approx(2 * 1024 * 2304 * 65_536 / (67e12 * 0.8))
    assert parts["encoder product"].limit == "compute"
    assert parts["selection"].seconds == pytest.approx(8 * 1024 * 65_536 / bytes_a_second)
    assert parts["optimizer"].seconds == pytest.approx(42 * numbers / bytes_a_second)
    ring = 2 * 7 / 8 * (4 * numbers + 65_536)
    assert parts["gradients over the network"].seconds == pytest.approx(ring / 450e9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpu", ["cpu", "a100"])
def test_every_kind_is_planned(kind: str, gpu: str) -> None:
    plan = planned(tiny(kind), gpu=gpu)
    assert plan.fits
    assert plan.hours > 0


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"fp32_tflops": 10.0}, {"fp32_tflops": 40.0}),
        ({"memory_tb_s": 0.5}, {"memory_tb_s": 5.0}),
        ({"link_gb_s": 10.0}, {"link_gb_s": 400.0}),
        ({"host_gb_s": 5.0}, {"host_gb_s": 50.0}),
        ({"reader_gb_s": 0.1}, {"reader_gb_s": 1.0}),
        ({"disk_gb_s": 0.1}, {"disk_gb_s": 1.0}),
        ({"launch_us": 1000.0}, {"launch_us": 10.0}),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_faster_hardware_is_faster(slower: dict[str, float], faster: dict[str, float]) -> None:
    shape = shape_of(WIDE)
    # What reads is beside the device, and told only where the store is read at all.
    store = LARGE if slower.keys() & {"reader_gb_s", "disk_gb_s"} else SMALL
    slow, fast = (
        step_cost(shape, config(), find_hardware("h100", changes), store=store, num_processes=4)
        for changes in (slower, faster)
    )
    assert slow.seconds > fast.seconds


@pytest.mark.parametrize(
    "larger", [{"d_sae": 131_072}, {"k": 512}, {"d_in": 4608}], ids=lambda values: next(iter(values))
)
def test_larger_saes_take_longer_and_more(larger: dict[str, int]) -> None:
    small, large = planned(), planned(TopKConfig.parse(WIDE.to_dict() | larger))
    assert large.layouts[0].seconds > small.layouts[0].seconds
    assert large.memory.device >= small.memory.device


def test_more_processes_are_never_slower_on_the_device_and_take_less_memory() -> None:
    plan = planned(num_nodes=4, batch_size=65_536)
    assert [step.num_processes for step in plan.layouts] == [1, 2, 4, 8, 16, 32]
    within = [step.device_seconds for step in plan.layouts[:4]]
    assert within == sorted(within, reverse=True)
    shape, hardware = shape_of(WIDE), find_hardware("h100")
    held = [memory_of(shape, config(), hardware, store=SMALL, num_processes=n).device for n in (1, 2, 4, 8)]
    assert held == sorted(held, reverse=True)


def test_processes_read_their_own_parts_and_share_a_node_s_disk() -> None:
    hardware = find_hardware("h100", {"reader_gb_s": 2.0, "disk_gb_s": 4.0})
    for number, disks in ((1, 1), (8, 8), (16, 8)):
        step = step_cost(shape_of(WIDE), config(), hardware, store=LARGE, num_processes=number)
        reading = next(part for part in step.beside if part.name == "reading")
        own = 8192 / number * 2 * 2304
        assert reading.seconds == pytest.approx(own / 2e9 + disks * own / 4e9)
        memory = memory_of(shape_of(WIDE), config(), hardware, store=LARGE, num_processes=number)
        assert memory.reader == int(4e9) // number + 2 * (8192 // number) * 2304 * 4


def test_fewest_processes_are_taken_that_are_about_as_fast_as_any() -> None:
    hardware = find_hardware("h100", {"disk_gb_s": 0.05, "reader_gb_s": 50.0})
    bound = plan_training(WIDE, config(), hardware, store=LARGE)
    assert bound.step.num_processes == 1
    assert bound.step.limit == "disk"
    assert bound.why.startswith("one process; more processes would gain 0%, as 8 are bound by disk (")
    free = planned(batch_size=65_536)
    assert free.step.num_processes == 8
    assert free.why.startswith("data-parallel over 8 processes: ")


def test_only_counts_that_share_the_batch_are_compared() -> None:
    assert [step.num_processes for step in planned(batch_size=8190).layouts] == [1, 2]
    assert [step.num_processes for step in planned(gpu="cpu", batch_size=64).layouts] == [1]
    lm = LanguageModelCost(flops_per_token=1e9, dtype="bfloat16", num_bytes=10**9, vocab_size=1000, context_len=2048)
    plan = plan_training(WIDE, config(objective={"kind": "e2e"}), find_hardware("h100"), store=SMALL, lm=lm)
    assert [step.num_processes for step in plan.layouts] == [1, 2, 4]
    assert plan.memory.parts["language model"] > 10**9
    assert "language model" in {part.name for part in plan.step.parts}


def test_what_does_not_fit_says_what_it_needs() -> None:
    spread = planned(TopKConfig(d_in=4096, d_sae=1_048_576, k=64))
    assert spread.fits
    assert spread.step.latents > 1
    assert "one device would need" in spread.why
    plan = planned(TopKConfig(d_in=4096, d_sae=16_777_216, k=64))
    assert not plan.fits
    assert "does not fit: needs" in plan.why
    assert "h100 has 80 GB" in plan.why


def test_store_that_fits_memory_is_read_once() -> None:
    shape, hardware = shape_of(WIDE), find_hardware("h100")
    reading = {
        size.num_tokens: next(
            p.seconds for p in step_cost(shape, config(), hardware, store=size).beside if p.name == "reading"
        )
        for size in (SMALL, LARGE)
    }
    assert reading[SMALL.num_tokens] == 0
    a_byte = (1 / hardware.reader_gb_s + 1 / hardware.disk_gb_s) / 1e9
    assert reading[LARGE.num_tokens] == pytest.approx(8192 * 2 * 2304 * a_byte)


def test_annealed_sparsity_counts_on_average() -> None:
    jumprelu = shape_of(tiny("jumprelu"))
    # By numerical integration of the ramp that training follows.
    part = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    wanted = 3.0 * torch.where(part < 0.5, 2.0 ** (1 - part / 0.5), 1.0)
    assert mean_active(jumprelu, config()) == pytest.approx(float(wanted.mean()), rel=1e-4)
    topk = shape_of(tiny("topk"))
    assert mean_active(topk, config()) == 3.0
    assert mean_active(topk, config(sparsity={"k_start_factor": 3.0})) == pytest.approx(3.0 * (0.1 * 2 + 0.9))
    assert mean_active(replace(topk, active=32.0), config(sparsity={"k_start_factor": 3.0})) == 32.0


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (TopKConfig(d_sae=32, k=3), "'topk' with d_in 0"),
        (CLASSES["jumprelu"](d_in=4, d_sae=32), "no target_l0, needs one to train a 'jumprelu' SAE"),
        (CLASSES["mlsae"](d_in=4, d_sae=32, k=3), "num_sites 0"),
    ],
)
def test_what_is_not_known_is_named(cfg: SAEConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_of(cfg)


def test_no_node_is_refused() -> None:
    with pytest.raises(ConfigError, match="found 0 nodes, needs at least one"):
        planned(num_nodes=0)
