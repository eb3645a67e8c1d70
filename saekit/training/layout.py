"""Which part of a training a process holds: a slice of each batch, a slice of the features, or SAEs of its own."""

import functools
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from saekit.errors import ConfigError
from saekit.training.axis import Axis, Traffic
from saekit.training.config import LayoutName, MeshConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Layout", "features_of", "mesh_of", "side_group"]

T = TypeVar("T")


def mesh_of(layout: LayoutName | MeshConfig, num_processes: int) -> MeshConfig:
    """Returns how many processes share the tokens and how many share the features; with `layers` each has all of both.

    Raises:
        ConfigError: a mesh of another number of processes.
    """
    if isinstance(layout, MeshConfig):
        if layout.data * layout.latents != num_processes:
            raise ConfigError(
                f"training: layout data {layout.data} x latents {layout.latents}, needs"
                f" {layout.data * layout.latents} processes, there are {num_processes}"
            )
        return layout
    if layout == "latents":
        return MeshConfig(latents=num_processes)
    return MeshConfig(data=num_processes if layout == "data" else 1)


def features_of(d_sae: int, rank: int, size: int) -> slice:
    """Returns the features that the `rank`-th of `size` processes holds; the first ones hold one more where they are not even.

    Raises:
        ConfigError: there are fewer features than processes.
    """
    if d_sae < size:
        raise ConfigError(
            f"training: layout latents over {size} processes, needs at least as many features as d_sae {d_sae}"
        )
    share, rest = divmod(d_sae, size)
    start = rank * share + min(rank, rest)
    return slice(start, start + share + (rank < rest))


class Layout:
    """A process's place among those that train one SAE, and all that they do together.

    Processes stand in a mesh of `data` rows by `latents` columns. Those of a row see the same tokens and hold different features,
    those of a column hold the same features and see different tokens.

    Attributes:
        device: where the process computes.
        data: processes with the same features as this one.
        latents: processes with the same tokens as this one.
        everyone: all of them, a row after the other.
        traffic: what this process has sent.
    """

    def __init__(
        self, device: torch.device, mesh: DeviceMesh | None = None, everyone: dist.ProcessGroup | None = None
    ) -> None:
        """Takes a mesh with the axes `data` and `latents`; None = this process alone."""
        self.device = device
        self.traffic = Traffic()

        # An axis of one process sends nothing, so it needs no group.
        groups = [mesh.get_group(axis) if mesh is not None and mesh.size(axis) > 1 else None for axis in (0, 1)]
        self.data, self.latents = (Axis(group, self.traffic) for group in groups)
        self.everyone = Axis(everyone, self.traffic)

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> "Layout":
        """Returns the layout of a process that trains by itself, whatever others do."""
        return cls(torch.device(device))

    @classmethod
    def of(cls, accelerator: "Accelerator", layout: LayoutName | MeshConfig) -> "Layout":
        """Returns the layout of this process among all that were launched.

        Raises:
            ConfigError: a mesh of another number of processes.
        """
        mesh = mesh_of(layout, accelerator.num_processes)
        if mesh.data * mesh.latents == 1:
            return cls.alone(accelerator.device)
        world = dist.group.WORLD
        assert world is not None
        return cls(accelerator.device, _device_mesh(world, accelerator.device.type, mesh), world)

    @property
    def num_processes(self) -> int:
        """Processes that train the SAE."""
        return self.everyone.size

    @property
    def process_index(self) -> int:
        """Place of this process among them."""
        return self.everyone.rank

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the SAE's folder."""
        return self.process_index == 0

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold features of the same SAE."""
        return self.latents.size > 1

    def features(self, d_sae: int) -> slice:
        """Returns which of all features this process holds."""
        return features_of(d_sae, self.latents.rank, self.latents.size)

    def wait_for_everyone(self) -> None:
        """Waits until all processes have come here."""
        if self.num_processes > 1:
            dist.barrier(group=self.everyone.group)

    def told(self, value: T) -> T:
        """Returns the main process's value."""
        values: list[T] = [value]
        if self.num_processes > 1:
            dist.broadcast_object_list(values, src=0, group=self.everyone.group)
        return values[0]


@functools.cache
def side_group(world: dist.ProcessGroup, purpose: str, patience: timedelta) -> dist.ProcessGroup:
    """Returns a further group of all processes on the host, the same one for a purpose: groups stay until the processes end.

    Args:
        world: of all processes, each of which calls this.
        purpose: of the group.
        patience: how long a process waits there for another.
    """
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=patience)
    return group


@functools.cache
def _device_mesh(world: dist.ProcessGroup, device: str, mesh: MeshConfig) -> DeviceMesh:
    """Returns one mesh for all trainings of a shape: every mesh makes groups, which stay until the processes end."""
    return init_device_mesh(device, (mesh.data, mesh.latents), mesh_dim_names=("data", "latents"))
