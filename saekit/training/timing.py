"""How long a step's parts take, without waiting for the device: on a GPU by events that are read when a row is written."""

import resource
import time

import torch

from saekit.training.config import TrainConfig
from saekit.training.costs import step_flops
from saekit.training.hardware import find_by_device_name
from saekit.training.shape import SAEShape

__all__ = ["StepTimer", "memory_peak", "peak_flops", "utilisation"]

READ = "read"
"""Part in which the host waits, so that its own clock is right on any device."""


class StepTimer:
    """Adds up what the parts of steps take: `begin` a step, then `mark` the end of each part."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._at = 0.0
        self._event: torch.cuda.Event | None = None
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """Notes the start of a step."""
        self._at, self._event = time.perf_counter(), self._now()

    def mark(self, part: str) -> None:
        """Notes the end of a part."""
        at, event = time.perf_counter(), self._now()
        if part == READ or event is None or self._event is None:
            self.add(part, at - self._at)
        else:
            self._open.append((part, self._event, event))
        self._at, self._event = at, event

    def add(self, part: str, seconds: float) -> None:
        """Adds time that was taken elsewhere, on the host's clock."""
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Returns the seconds by part since the last call; what a GPU has not done yet is left for the next one."""
        left = []
        for part, start, end in self._open:
            if end.query():  # type: ignore[no-untyped-call]  # torch's own
                self.add(part, start.elapsed_time(end) * 1e-3)
            else:
                left.append((part, start, end))
        self._open = left
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _now(self) -> torch.cuda.Event | None:
        if not self._is_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
        event.record()
        return event


def peak_flops(device: torch.device) -> float | None:
    """Returns the published rate of float32 products of a GPU, operations a second; None where it is not known."""
    found = find_by_device_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if found is None else found.fp32_tflops * 1e12


def utilisation(shape: SAEShape, config: TrainConfig, *, seconds: float, num_processes: int, peak: float) -> float:
    """Returns the part of the devices' published rate that the model's own operations make use of (MFU).

    Args:
        shape: of the SAE.
        config: of the training.
        seconds: of a step.
        num_processes: devices.
        peak: operations a second of one.
    """
    return step_flops(shape, config) / (seconds * num_processes * peak)


def memory_peak(device: torch.device) -> int:
    """Returns the most bytes that tensors took on a GPU, or the process on a CPU, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
