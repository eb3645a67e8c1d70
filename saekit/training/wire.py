"""Bytes that a process of a layout sends in a step, by formulas: what `Traffic` counts while training."""

from saekit.training.config import TrainConfig
from saekit.training.memory import FLOAT_BYTES
from saekit.training.selection import CANDIDATES_FACTOR
from saekit.training.shape import SAEShape

__all__ = ["step_bytes"]


def step_bytes(shape: SAEShape, config: TrainConfig, *, data: int, latents: int, active: float) -> dict[str, float]:
    """Returns what the largest process sends in a step, by what for; figures and selections are left out as small.

    AuxK, where features are dead, adds a reconstruction and its candidates; tokens that have to be decided again add theirs.

    Args:
        shape: of the whole SAE.
        config: its training.
        data: processes that share a batch.
        latents: processes that share the features.
        active: features that a sample uses.

    Source: rings as in Patarasuk and Yuan 2009; what is sent for features over processes follows Gao et al. 2024, section 3.
    """
    samples = config.batch_size / data * shape.samples
    summed = 2 * (latents - 1) / latents * FLOAT_BYTES
    found: dict[str, float] = {}
    if data > 1:
        found["gradients"] = 2 * (data - 1) / data * FLOAT_BYTES * shape.share(latents)
    if latents > 1:
        # The gates of a Gated SAE reconstruct as well.
        sums = shape.groups + (shape.kind == "gated")
        found["reconstructions"] = summed * samples * shape.width_out * sums
        found["biases"] = summed * shape.width_out if shape.subtracts_b_dec else 0.0
        if not shape.is_penalized and not shape.kind.endswith("batchtopk"):
            k = round(active)
            found["candidates"] = (latents - 1) * FLOAT_BYTES * samples * min(k, -(-CANDIDATES_FACTOR * k // latents))
    return found
