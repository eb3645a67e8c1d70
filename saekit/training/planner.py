"""Before a training begins: its memory by part, its speed on named hardware, what binds, and how to launch it."""

from collections.abc import Sequence
from dataclasses import dataclass

from saekit.errors import ConfigError
from saekit.sae.base import SAEConfig
from saekit.training.config import TrainConfig
from saekit.training.costs import READER_BYTES, LanguageModelCost, StepCost, StoreSize, step_cost
from saekit.training.hardware import Hardware
from saekit.training.memory import FLOAT_BYTES, memory_parts, staged_bytes, tokens_at_a_time
from saekit.training.options import latents_problem
from saekit.training.shape import SAEShape, shape_of
from saekit.training.start import SAMPLE_TOKENS

__all__ = ["Memory", "TrainingPlan", "memory_of", "plan_training", "together_seconds"]

WORTH_IT = 1.1
"""More processes are recommended only where they are faster by this much than fewer."""
CHUNK_BYTES = 256 * 2**20
"""Pre-activations that exist at a time on a GPU; on a CPU those of `CHUNK_ROWS` tokens (kernels/README.md, limits)."""
CHUNK_ROWS = 1024
LOGIT_COPIES = 4
"""Logits that an end-to-end step holds at a time: both predictions in float32, their log-probabilities and a gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one process."""

    parts: dict[str, int]
    """On the device while training, by what they are for; the weights are float32 and their own master copy."""
    start: int
    """On the device beside the weights while the first sample is measured, before there are gradients and moments."""
    reader: int
    """In the host's memory: windows of the store and two batches."""
    staged: int
    """In the host's memory from the first checkpoint on: the copy of this process's part that is written beside the steps."""
    given: int
    """In the host's memory: the whole SAE as it is passed in, on every process, and a second one until the first step."""

    @property
    def device(self) -> int:
        """The most that the device holds."""
        return max(sum(self.parts.values()), self.parts["weights"] + self.start)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """One SAE, planned."""

    shape: SAEShape
    """Its sizes."""
    config: TrainConfig
    """Its training."""
    memory: Memory
    """Of each process in the recommended layout."""
    memory_alone: Memory
    """Of a single process."""
    step: StepCost
    """In the recommended layout."""
    layouts: tuple[StepCost, ...]
    """Every number of data-parallel processes that was compared."""
    spread: tuple[StepCost, ...]
    """The layouts that spread features over processes of a node, where the SAE's training can be."""
    fits: bool
    """Whether the device holds it."""
    why: str
    """Of the layout, one sentence."""

    @property
    def hours(self) -> float:
        """Of all steps; without starting, evaluations and checkpoints."""
        return self.config.num_steps * self.step.seconds / 3600


def memory_of(
    shape: SAEShape,
    config: TrainConfig,
    hardware: Hardware,
    *,
    store: StoreSize,
    num_processes: int = 1,
    latents: int = 1,
    lm: LanguageModelCost | None = None,
) -> Memory:
    """Returns what each of `num_processes` processes holds, of which `latents` share the features."""
    data = num_processes // latents
    tokens = tokens_at_a_time(config, data)
    row = shape.samples * max(shape.width_in, shape.width_out)
    parts = memory_parts(shape.share(latents), -(-shape.num_held // latents), row, config, tokens=tokens)
    features = -(-shape.d_sae // latents)
    whole = FLOAT_BYTES * tokens * shape.samples * features
    chunk = CHUNK_BYTES if hardware.host_rate else FLOAT_BYTES * CHUNK_ROWS * features
    parts["pre-activations"] = min(whole, chunk)
    if lm is not None:
        parts["language model"] = lm.num_bytes + LOGIT_COPIES * FLOAT_BYTES * tokens * lm.vocab_size
    batch = FLOAT_BYTES * (config.batch_size // data) * shape.batch_width
    # The sample in float32, and centred in float64; every process measures all of it.
    sample = (FLOAT_BYTES + 8) * max(SAMPLE_TOKENS, config.batch_size) * shape.batch_width
    held = min(int(READER_BYTES), store.num_tokens * store.token_bytes) // data if lm is None else 0
    return Memory(
        parts=parts,
        start=sample,
        reader=held + 2 * batch,
        staged=staged_bytes(shape, config, num_processes=num_processes, latents=latents),
        given=2 * FLOAT_BYTES * (shape.num_trained + shape.num_held),
    )


def plan_training(
    cfg: SAEConfig,
    config: TrainConfig,
    hardware: Hardware,
    *,
    store: StoreSize,
    num_nodes: int = 1,
    lm: LanguageModelCost | None = None,
) -> TrainingPlan:
    """Returns memory, speed and layout of a training on up to `num_nodes` nodes.

    The layouts are those that there are for one SAE: one process, data-parallel processes, one a device, that share each batch
    evenly, and meshes in which processes of a node share the features.

    Args:
        cfg: the SAE, with known widths.
        config: its training.
        hardware: device and node.
        store: what it is trained on.
        num_nodes: how many nodes there are.
        lm: for an end-to-end objective, the model.

    Raises:
        ConfigError: a width or the target L0 is not known, or there is less than one node.
    """
    if num_nodes < 1:
        raise ConfigError(f"plan: found {num_nodes} nodes, needs at least one")
    shape = shape_of(cfg)
    layouts = [
        step_cost(shape, config, hardware, store=store, num_processes=number, lm=lm)
        for number in _process_counts(config, hardware, num_nodes, lm)
    ]
    spread = [
        step_cost(shape, config, hardware, store=store, num_processes=number, latents=latents)
        for number, latents in _meshes(cfg, config, hardware, num_nodes)
    ]
    every = sorted([*layouts, *spread], key=lambda step: (step.num_processes, step.latents))
    memories = {
        (step.num_processes, step.latents): memory_of(
            shape, config, hardware, store=store, num_processes=step.num_processes, latents=step.latents, lm=lm
        )
        for step in every
    }

    def memory_with(step: StepCost) -> Memory:
        return memories[step.num_processes, step.latents]

    # Where none fits, the one that needs least is shown.
    fitting = [step for step in every if memory_with(step).device <= hardware.memory_gb * 1e9]
    possible = fitting or [min(every, key=lambda step: memory_with(step).device)]
    fastest = min(possible, key=lambda step: step.seconds)
    chosen = next(step for step in possible if step.seconds <= fastest.seconds * WORTH_IT)
    memory = memory_with(chosen)
    return TrainingPlan(
        shape=shape,
        config=config,
        memory=memory,
        memory_alone=memories[1, 1],
        step=chosen,
        layouts=tuple(layouts),
        spread=tuple(spread),
        fits=bool(fitting),
        why=_why(chosen, layouts, memories[1, 1], hardware) if fitting else _why_not(memory, hardware),
    )


def together_seconds(plans: Sequence[TrainingPlan]) -> float:
    """Returns the time of SAEs that one process trains on one read: the reads of the longest, the devices' work of all."""
    steps = [plan.layouts[0] for plan in plans]
    work = sum(step.device_seconds for step in steps)
    launched = sum(step.seconds_of("launches") for step in steps)
    read = max(part.seconds for step in steps for part in step.beside if part.limit != "launches")
    return max(plan.config.num_steps for plan in plans) * max(work, launched, read)


def _process_counts(config: TrainConfig, hardware: Hardware, num_nodes: int, lm: LanguageModelCost | None) -> list[int]:
    """Returns powers of two within a node, and whole nodes, that divide the batch; a CPU trains in one process."""
    if not hardware.host_rate:
        return [1]
    shared = config.batch_size if lm is None else config.batch_size // lm.context_len
    within = _doublings(hardware.gpus_per_node)
    nodes = [hardware.gpus_per_node * number for number in range(1, num_nodes + 1)]
    return [number for number in sorted({*within, *nodes}) if number == 1 or shared % number == 0]


def _meshes(cfg: SAEConfig, config: TrainConfig, hardware: Hardware, num_nodes: int) -> list[tuple[int, int]]:
    """Returns (processes, those of them that share the features) of the meshes: features within a node, tokens over rows."""
    if not hardware.host_rate or latents_problem(cfg, config) is not None:
        return []
    most, nodes = hardware.gpus_per_node, range(2, num_nodes + 1)
    numbers = [*_doublings(most)[1:], *(most * number for number in nodes)]
    return [
        (number, latents)
        for number in numbers
        for latents in _doublings(min(most, number, cfg.d_sae))[1:]
        if number % latents == 0 and config.batch_size % (number // latents) == 0
    ]


def _doublings(most: int) -> list[int]:
    numbers = [1]
    while numbers[-1] * 2 <= most:
        numbers.append(numbers[-1] * 2)
    return numbers


def _why(chosen: StepCost, layouts: Sequence[StepCost], memory_alone: Memory, hardware: Hardware) -> str:
    alone, most = layouts[0], layouts[-1]
    if chosen.latents > 1:
        rows = chosen.num_processes // chosen.latents
        shares = f"features over {chosen.latents} processes" + (
            f", tokens over {rows} rows of them" if rows > 1 else ""
        )
        needs = memory_alone.device
        if needs > hardware.memory_gb * 1e9:
            return f"{shares}: one device would need {needs / 1e9:,.1f} GB and has {hardware.memory_gb:,.0f}"
        best = min(layouts, key=lambda step: step.seconds)
        return (
            f"{shares}: {alone.seconds / chosen.seconds:.1f} times as fast as one process,"
            f" {best.seconds / chosen.seconds:.1f} times as fast as {best.num_processes} that share tokens alone,"
            f" bound by {_named(best)}"
        )
    if len(layouts) == 1:
        return "one process: there is one device, or the batch cannot be shared evenly by more"
    faster = alone.seconds / chosen.seconds
    says = (
        "one process"
        if chosen is alone
        else f"data-parallel over {chosen.num_processes} processes: {faster:.1f} times as fast as one"
    )
    if chosen is most:
        return says
    gain = chosen.seconds / min(step.seconds for step in layouts)
    return (
        f"{says}; more processes would gain {max(0.0, gain - 1):.0%}, as {most.num_processes} are bound by"
        f" {_named(most)}"
    )


def _named(step: StepCost) -> str:
    part = step.seconds_of(step.limit) / step.seconds
    return f"{step.limit} ({min(part, 1.0):.0%} of the step)"


def _why_not(memory: Memory, hardware: Hardware) -> str:
    return (
        f"does not fit: needs {memory.device / 1e9:,.1f} GB on each device, {hardware.name} has {hardware.memory_gb:,.0f} GB;"
        " more nodes, or a lower d_sae or micro_batch_size, would help"
    )
