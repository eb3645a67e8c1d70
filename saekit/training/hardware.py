"""What a device and its node can do, from the package's table `hardware.toml`."""

import functools
import os
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from pydantic import Field

from saekit.config import Config
from saekit.errors import ConfigError

__all__ = ["Hardware", "find_by_device_name", "find_hardware", "known_hardware"]

MEASURED = "cpu"
"""The one device of the table whose rates were measured and not published: they are taken as they are."""


class Hardware(Config):
    """One kind of device, the nodes that it stands in, and which part of its published rates can be counted on."""

    name: str
    """As in `saekit plan --gpu`."""
    title: str
    """In words."""
    source: str
    """Where the rates come from."""
    device_names: tuple[str, ...] = ()
    """What CUDA calls it."""
    fp32_tflops: float = Field(gt=0)
    """Dense products of float32 without TF32, 10^12 operations a second."""
    bf16_tflops: float = Field(gt=0)
    """Dense products of bfloat16."""
    memory_tb_s: float = Field(gt=0)
    """Of the device's memory, 10^12 bytes a second."""
    memory_gb: float = Field(gt=0)
    """Of the device, 10^9 bytes."""
    link_gb_s: float = Field(gt=0)
    """Between devices of a node, one direction."""
    nic_gb_s: float = Field(gt=0)
    """Of a device's share of the network between nodes, one direction."""
    host_gb_s: float = Field(ge=0)
    """From the host's memory to the device; 0 = it is the same memory."""
    gpus_per_node: int = Field(ge=1)
    """Devices in a node."""
    disk_gb_s: float = Field(gt=0)
    """Reading the store, for each node."""
    reader_gb_s: float = Field(gt=0)
    """Stored activations that the reading thread of one process gathers from files in the page cache."""
    mixer_gb_s: float = Field(gt=0)
    """What the mixing thread of one process reads and writes."""
    launch_us: float = Field(ge=0)
    """Until an operator is launched, microseconds."""
    sustained: dict[str, float]
    """Part of `fp32`, `bf16`, `memory`, `link`, `nic` and `host` that can be counted on."""

    @property
    def is_measured(self) -> bool:
        """Whether rates are those of a machine that was measured."""
        return self.name == MEASURED

    def flops(self, dtype: str) -> float:
        """Returns sustained operations a second of products in `dtype`; float16 counts as bfloat16."""
        key, rate = ("fp32", self.fp32_tflops) if dtype == "float32" else ("bf16", self.bf16_tflops)
        return rate * 1e12 * self.sustained[key]

    @property
    def memory_rate(self) -> float:
        """Sustained bytes a second of the device's memory."""
        return self.memory_tb_s * 1e12 * self.sustained["memory"]

    @property
    def host_rate(self) -> float:
        """Sustained bytes a second from host to device; 0 = nothing is copied."""
        return self.host_gb_s * 1e9 * self.sustained["host"]

    def network_rate(self, num_processes: int, *, rings: int = 1) -> float:
        """Returns sustained bytes a second of a ring over the first `num_processes` devices, nodes filled one by one.

        Between nodes the rings use the network cards of all devices of a node, and no ring is faster than a node's inside.

        Args:
            num_processes: devices of all rings.
            rings: that go on at the same time, each over its own devices.
        """
        inside = self.link_gb_s * self.sustained["link"]
        across = self.nic_gb_s * self.sustained["nic"] * self.gpus_per_node / rings
        return 1e9 * (inside if num_processes <= self.gpus_per_node else min(inside, across))


def known_hardware() -> tuple[str, ...]:
    """Returns the names of the table."""
    return tuple(_table()["devices"])


def find_hardware(name: str, changes: Mapping[str, float | int | None] | None = None) -> Hardware:
    """Returns a device of the table.

    Args:
        name: one of `known_hardware()`, in any case.
        changes: fields to replace; None = as in the table.

    Raises:
        ConfigError: no such device, or a change that is no rate.
    """
    table = _table()
    row = table["devices"].get(name.lower())
    if row is None:
        raise ConfigError(
            f"plan: found gpu {name!r}, needs one of {', '.join(known_hardware())}; for another, name the nearest and"
            " override its figures by flags"
        )
    values: dict[str, object] = {"name": name.lower(), "sustained": table["sustained"], **table["host"], **row}
    if name.lower() == MEASURED:
        values |= {
            "sustained": dict.fromkeys(table["sustained"], 1.0),
            "memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        }
    values |= {key: value for key, value in (changes or {}).items() if value is not None}
    return Hardware.parse(values, where=f"plan: hardware {name!r}")


def find_by_device_name(device_name: str) -> Hardware | None:
    """Returns the device of the table that calls itself so, e.g. `NVIDIA H100 80GB HBM3`; None where it is not there."""
    for name, row in _table()["devices"].items():
        if device_name in row.get("device_names", ()):
            return find_hardware(name)
    return None


@functools.cache
def _table() -> dict[str, Any]:
    text = (resources.files("saekit.training") / "hardware.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
