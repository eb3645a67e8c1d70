"""The layouts that scripts/bench_scaling measures."""

from typing import NamedTuple

__all__ = ["ALONE", "CASES", "SHAPES", "Case"]


class Case(NamedTuple):
    """How processes share the work."""

    layout: str
    """In words."""
    processes: int
    """All of them."""
    data: int
    """Of them, those that share a batch."""
    latents: int
    """Of them, those that share the features."""

    @property
    def num_saes(self) -> int:
        """SAEs that are trained at a time, each on whole batches."""
        return self.processes // (self.data * self.latents)


ALONE = "one"
"""The case that others are held against."""
CASES = {
    ALONE: Case("one process", 1, 1, 1),
    "data2": Case("data", 2, 2, 1),
    "latents2": Case("latents", 2, 1, 2),
    "layers2": Case("layers", 2, 1, 1),
    "data4": Case("data", 4, 4, 1),
    "latents4": Case("latents", 4, 1, 4),
    "mesh4": Case("mesh 2 x 2", 4, 2, 2),
    "layers4": Case("layers", 4, 1, 1),
}
SHAPES = {
    f"{d_in}x{d_sae}x{num_tokens}": {"num_tokens": num_tokens, "d_in": d_in, "d_sae": d_sae, "k": 32}
    for d_in, d_sae, num_tokens in ((576, 4608, 2048), (576, 4608, 8192), (64, 512, 256))
}
