"""What a training step costs: operations and bytes of each part by formulas, divided by the rates of the hardware.

docs/plan.md has the formulas with their sources, and what they predict beside what was measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from saekit.training.config import TrainConfig
from saekit.training.hardware import Hardware
from saekit.training.memory import FLOAT_BYTES, TOKEN_ARRAYS
from saekit.training.shape import SAEShape
from saekit.training.wire import step_bytes

__all__ = ["LanguageModelCost", "Limit", "Part", "StepCost", "StoreSize", "mean_active", "step_cost", "step_flops"]

Limit = Literal["compute", "memory", "network", "disk", "reader", "host bus", "launches"]

READER_BYTES = 4e9
"""What all processes together keep of the store in their memory: `ShuffledBatches.memory_bytes`."""

OPTIMIZER_TRAFFIC = {"adam": 34, "adamw8bit": 22, "muon": 36, "signum": 60}
"""Bytes read and written for each trained number. Adam's: 28 of the fused pass (weight, gradient and both moments read, three of
them written) and 6 of the gradient's norm, which reads gradients, and W_dec to project them."""
AVERAGE_TRAFFIC = 12
REDUCE_TRAFFIC = 8
"""Beside the ring itself: the sum is divided by the number of processes."""
MUON_ITERATIONS = 5
OPERATORS = {"batchtopk": 340, "jumprelu": 440, "gated": 440, "relu": 440}
"""Operators that a step launches, counted on tiny SAEs; the rest of the kinds `OPERATORS_ELSE`."""
OPERATORS_ELSE = 270
OPERATORS_A_GROUP = 65


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelCost:
    """The part of a language model that an end-to-end objective runs."""

    flops_per_token: float
    """Of one forward behind the hook point."""
    dtype: str
    """Of its weights."""
    num_bytes: int
    """Of all of its weights."""
    vocab_size: int
    """Width of its predictions."""
    context_len: int
    """Tokens of a row: an end-to-end objective reads whole rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSize:
    """The tokens of a store that an SAE is trained on."""

    num_tokens: int
    """Of the training documents."""
    token_bytes: int
    """Of one token as it is stored, at all hook points of the SAE."""

    @property
    def is_held(self) -> bool:
        """Whether the processes hold all of it in memory after the first epoch."""
        return self.num_tokens * self.token_bytes <= READER_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of a step."""

    name: str
    """What is done."""
    limit: Limit
    """What its time depends on."""
    seconds: float
    """How long it takes at sustained rates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """One step of one layout."""

    num_processes: int
    """All of them."""
    latents: int
    """Those that share the features of a row of tokens."""
    parts: tuple[Part, ...]
    """One after another, on the device."""
    beside: tuple[Part, ...]
    """Beside them: what reads the data and launches the operators."""
    tokens: int
    """Of the global batch."""

    @property
    def device_seconds(self) -> float:
        """Sum over the parts."""
        return math.fsum(part.seconds for part in self.parts)

    @property
    def seconds(self) -> float:
        """Of the step: the longest of the device's parts together and each that goes on beside them."""
        return max(self.device_seconds, *(part.seconds for part in self.beside))

    @property
    def tokens_per_second(self) -> float:
        """Of all processes together."""
        return self.tokens / self.seconds

    @property
    def limit(self) -> Limit:
        """What binds: where the device waits, what it waits for; else the resource that takes most of the device's time."""
        slowest = max(self.beside, key=lambda part: part.seconds)
        if slowest.seconds > self.device_seconds:
            return slowest.limit
        totals: dict[Limit, float] = {}
        for part in self.parts:
            totals[part.limit] = totals.get(part.limit, 0.0) + part.seconds
        return max(totals, key=lambda limit: totals[limit])

    def seconds_of(self, limit: Limit) -> float:
        """Returns the time of the parts with this limit."""
        return math.fsum(part.seconds for part in (*self.parts, *self.beside) if part.limit == limit)


def mean_active(shape: SAEShape, config: TrainConfig) -> float:
    """Returns the features that a sample uses, on average over the training.

    A target L0 is approached from `start_factor` times it, evenly in its logarithm; a k from `k_start_factor` times it, linearly.
    """
    sparsity = config.sparsity
    if shape.is_penalized:
        start, part = sparsity.start_factor, sparsity.ramp_fraction
        during = (start - 1) / math.log(start) if start > 1 else 1.0
    else:
        start, part = sparsity.k_start_factor, sparsity.k_anneal_fraction
        during = (1 + start) / 2
    return min(float(shape.d_sae), shape.active * (part * during + 1 - part))


def step_flops(shape: SAEShape, config: TrainConfig) -> float:
    """Returns the operations that a step of all processes together cannot do without, two for each multiplication.

    The encoder's product with every feature; and with the features that a sample uses: the reconstruction, the gradients of the
    values and of W_dec (b wide), and of W_enc (a wide).
    """
    samples = config.batch_size * shape.samples
    sparse = mean_active(shape, config) * (3 * shape.width_out + shape.width_in)
    return 2 * samples * (shape.width_in * shape.d_sae + sparse)


def step_cost(
    shape: SAEShape,
    config: TrainConfig,
    hardware: Hardware,
    *,
    store: StoreSize,
    num_processes: int = 1,
    latents: int = 1,
    lm: LanguageModelCost | None = None,
) -> StepCost:
    """Returns what a step costs each of `num_processes` processes.

    Of them `latents` share the features, and as many rows of them as there are share the batch.
    """
    data = num_processes // latents
    rows = config.batch_size / data
    parts = [
        *_forward_parts(shape, config, hardware, rows, latents),
        *_update_parts(shape, config, hardware, latents, is_reduced=data > 1),
        *_network_parts(shape, config, hardware, data, latents),
    ]
    if lm is not None:
        # The true predictions, those with the reconstruction, and the gradient at the hook point: frozen weights take none.
        seconds = 3 * rows * lm.flops_per_token / hardware.flops(lm.dtype)
        parts.append(Part(name="language model", limit="compute", seconds=seconds))
        # Rows are read where they are used, each process its own.
        parts.append(_reading(rows * store.token_bytes, hardware, num_processes))
    return StepCost(
        num_processes=num_processes,
        latents=latents,
        parts=tuple(parts),
        beside=(
            *(_reading_parts(shape, hardware, store, rows, num_processes) if lm is None else ()),
            _launches(shape, config, hardware, rows),
        ),
        tokens=config.batch_size,
    )


def _forward_parts(
    shape: SAEShape, config: TrainConfig, hardware: Hardware, rows: float, latents: int
) -> Sequence[Part]:
    samples, active, features = rows * shape.samples, mean_active(shape, config) / latents, shape.d_sae / latents
    if latents > 1 and not shape.is_penalized:
        # A token's places are as many as the fullest one has, about four deviations above the mean.
        active = min(active * latents, active + 4 * math.sqrt(active))
    in_memory = hardware.memory_rate
    product = 2 * samples * shape.width_in * features / hardware.flops("float32")
    operands = FLOAT_BYTES * shape.width_in * (samples + features) / in_memory
    # Pre-activations are written once and looked through once.
    selection = 2 * FLOAT_BYTES * samples * features
    # Rows of W_dec for the reconstruction and the values' gradients; errors and inputs for the weights' gradients.
    gathered = FLOAT_BYTES * samples * active * (3 * shape.width_out + shape.width_in)
    if shape.kind == "gated":
        gathered *= 1.5  # the gates reconstruct as well, with a frozen decoder
    row = shape.samples * max(shape.width_in, shape.width_out)
    arrays = FLOAT_BYTES * rows * row * (2 * TOKEN_ARRAYS + 3 * (shape.groups - 1))
    written = FLOAT_BYTES * shape.share(latents)
    parts = [
        Part(
            name="encoder product",
            limit="compute" if product >= operands else "memory",
            seconds=max(product, operands),
        ),
        Part(name="selection", limit="memory", seconds=selection / in_memory),
        Part(name="sparse products", limit="memory", seconds=(gathered + arrays + written) / in_memory),
    ]
    if hardware.host_rate:
        copied = FLOAT_BYTES * rows * shape.batch_width / hardware.host_rate
        parts.append(Part(name="copy to the device", limit="host bus", seconds=copied))
    return parts


def _update_parts(
    shape: SAEShape, config: TrainConfig, hardware: Hardware, latents: int, *, is_reduced: bool
) -> Sequence[Part]:
    traffic = OPTIMIZER_TRAFFIC[config.optimizer] + (AVERAGE_TRAFFIC if config.ema_decay is not None else 0)
    traffic += REDUCE_TRAFFIC if is_reduced else 0
    parts = [Part(name="optimizer", limit="memory", seconds=traffic * shape.share(latents) / hardware.memory_rate)]
    if config.optimizer == "muon":
        # Each iteration: a Gram matrix of the short side, its square, and their product with the matrix.
        small = [min(width, shape.d_sae) for width in (shape.width_in, shape.width_out)]
        large = [max(width, shape.d_sae) for width in (shape.width_in, shape.width_out)]
        flops = sum(MUON_ITERATIONS * (4 * s * s * w + 2 * s**3) for s, w in zip(small, large, strict=True))
        parts.append(Part(name="orthogonalisation", limit="compute", seconds=flops / hardware.flops("float32")))
    return parts


def _network_parts(shape: SAEShape, config: TrainConfig, hardware: Hardware, data: int, latents: int) -> Sequence[Part]:
    sent = step_bytes(shape, config, data=data, latents=latents, active=mean_active(shape, config))
    parts = []
    if data > 1:
        # And which features fired, a byte each.
        moved = sent.pop("gradients") + 2 * (data - 1) / data * shape.d_sae / latents
        # Each column of a mesh has a ring of its own, and they share a node's network cards.
        rate = hardware.network_rate(data * latents, rings=latents)
        parts.append(Part(name="gradients over the network", limit="network", seconds=moved / rate))
    if latents > 1:
        seconds = sum(sent.values()) / hardware.network_rate(latents)
        parts.append(Part(name="features over the network", limit="network", seconds=seconds))
    return parts


def _reading_parts(
    shape: SAEShape, hardware: Hardware, store: StoreSize, rows: float, num_processes: int
) -> Sequence[Part]:
    mixed = rows * (store.token_bytes + FLOAT_BYTES * shape.batch_width)
    # A store that is not held is read in windows, each process its own lanes of them.
    windows = 0.0 if store.is_held else rows * store.token_bytes
    return (
        _reading(windows, hardware, num_processes),
        Part(name="mixing", limit="reader", seconds=mixed / (hardware.mixer_gb_s * 1e9)),
    )


def _reading(num_bytes: float, hardware: Hardware, num_processes: int) -> Part:
    # The processes of a node share its disk.
    sharing = min(num_processes, hardware.gpus_per_node)
    gathered = num_bytes / (hardware.reader_gb_s * 1e9)
    loaded = sharing * num_bytes / (hardware.disk_gb_s * 1e9)
    # The threads that read wait for the disk themselves.
    return Part(name="reading", limit="disk" if loaded > gathered else "reader", seconds=gathered + loaded)


def _launches(shape: SAEShape, config: TrainConfig, hardware: Hardware, rows: float) -> Part:
    kind = shape.kind.rpartition("_")[2]
    operators = OPERATORS.get(kind, OPERATORS_ELSE) + OPERATORS_A_GROUP * (shape.groups - 1)
    num_parts = math.ceil(rows / (config.micro_batch_size or rows))
    return Part(name="launches", limit="launches", seconds=num_parts * operators * hardware.launch_us * 1e-6)
