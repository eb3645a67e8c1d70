"""How close reconstructions come: per-document sums in float64, from which every ratio and its interval follow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saekit.errors import NonFiniteError
from saekit.evaluation.bootstrap import Float64Array, Statistic
from saekit.progress import NO_PROGRESS, Progress

__all__ = [
    "RECONSTRUCTION_METRICS",
    "WHOLE",
    "Candidate",
    "Reconstruction",
    "ReconstructionSums",
    "TokenReader",
    "mean_activation",
    "part_sums",
]

WHOLE = slice(None)
"""All columns of a row."""

Int64Array = npt.NDArray[np.int64]

TokenReader = Callable[[Int64Array], Tensor]
"""Flat token positions, ascending -> rows of activations in any float dtype."""


class Reconstruction(NamedTuple):
    """What a candidate makes of rows of activations."""

    x_hat: Tensor
    """As wide as what is to be reconstructed: `[N, d_in]`, or the asked parts of a row side by side."""
    top_acts: Tensor | None = None
    """Active features' values `[N, K]`, 0 at unused places; None for candidates without features."""
    top_indices: Tensor | None = None
    """Their indices `[N, K]`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidate:
    """One row of the table before it is measured: the SAE or a null."""

    name: str
    """sae, mean, pca or random."""
    title: str
    """For people."""
    reconstruct: Callable[[Tensor], Reconstruction]
    """Rows of float32 raw activations -> reconstruction."""
    num_features: int = 0
    """Size of its dictionary; 0 where there is none that could be sparse or dead."""
    constant_l0: float = 0.0
    """Coefficients a token of a candidate without features."""


@dataclass(frozen=True, slots=True, eq=False)
class ReconstructionSums:
    """One candidate's sums, a row a document."""

    sums: dict[str, Float64Array]
    """tokens, variance, error, x_hat_squared, x_hat_dot_x, cosine, norm_ratio, active: each `[num_documents]`."""
    firings: Int64Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Tokens on which each feature fires `[num_features]`."""


RECONSTRUCTION_METRICS: Mapping[str, Statistic] = MappingProxyType(
    {
        "fvu": lambda s: s["error"] / s["variance"],
        "l0": lambda s: s["active"] / s["tokens"],
        "cosine_similarity": lambda s: s["cosine"] / s["tokens"],
        "norm_ratio": lambda s: s["norm_ratio"] / s["tokens"],
        "relative_reconstruction_bias": lambda s: s["x_hat_squared"] / s["x_hat_dot_x"],
    }
)
"""Metric -> ratio of the sums above. FVU is pooled: a quotient of sums, never a mean of per-token quotients."""


def mean_activation(read: TokenReader, flat: Int64Array, *, batch_tokens: int) -> Tensor:
    """Returns the mean over tokens in float64, `[d_in]`."""
    total: Tensor | None = None
    for start in range(0, len(flat), batch_tokens):
        part = read(flat[start : start + batch_tokens]).cpu().double().sum(dim=0)
        total = part if total is None else total + part
    assert total is not None, "a mean of no tokens"
    return total / len(flat)


@torch.no_grad()
def part_sums(
    candidates: Sequence[Candidate],
    read: TokenReader,
    flat: Int64Array,
    *,
    parts: Sequence[slice],
    documents: Int64Array,
    mean: Tensor,
    batch_tokens: int,
    device: torch.device,
    progress: Progress = NO_PROGRESS,
) -> list[dict[str, ReconstructionSums]]:
    """Returns, for each part of a row, every candidate's per-document sums there, from one pass over the tokens.

    Args:
        flat: positions of the tokens, `[N]` ascending.
        parts: columns of a row that are reconstructed apart from each other; candidates answer them side by side.
        documents: row of the sums that each token counts into, `[N]`, from 0.
        mean: what `variance` is taken around, as wide as a row, float64.

    Raises:
        NonFiniteError: a candidate answers NaN or Inf.
    """
    num_documents = int(documents.max()) + 1 if len(documents) else 0
    shape = (len(parts), len(_COLUMNS), num_documents)
    columns = {c.name: torch.zeros(shape, dtype=torch.float64) for c in candidates}
    firings = {c.name: torch.zeros(c.num_features, dtype=torch.int64) for c in candidates}
    with progress.task("reconstruction", len(flat), "tokens") as task:
        for start in range(0, len(flat), batch_tokens):
            chosen = slice(start, start + batch_tokens)
            x = read(flat[chosen]).to(device=device, dtype=torch.float32)
            rows = torch.from_numpy(documents[chosen])
            wide = _widened(x)
            targets = [wide[:, part] for part in parts]
            centred = (wide - mean.to(wide.device)).square()
            squares = [centred[:, part].sum(dim=-1) for part in parts]
            for candidate in candidates:
                made = candidate.reconstruct(x)
                active, fired = _active(candidate, made)
                answers = torch.split(made.x_hat, [target.shape[1] for target in targets], dim=-1)
                for place, (target, x_hat, square) in enumerate(zip(targets, answers, squares, strict=True)):
                    figures = _token_figures(target, x_hat, square, active)
                    if not bool(torch.isfinite(figures).all()):
                        raise NonFiniteError(
                            f"evaluate: {candidate.title!r} reconstructs tokens as NaN or Inf, needs finite weights"
                        )
                    columns[candidate.name][place].index_add_(1, rows, figures.cpu())
                firings[candidate.name] += fired.cpu()
            task.advance(len(rows))
    return [
        {
            c.name: ReconstructionSums(
                dict(zip(_COLUMNS, columns[c.name][place].numpy(), strict=True)), firings[c.name].numpy()
            )
            for c in candidates
        }
        for place in range(len(parts))
    ]


_COLUMNS = ("tokens", "variance", "error", "x_hat_squared", "x_hat_dot_x", "cosine", "norm_ratio", "active")


def _widened(x: Tensor) -> Tensor:
    """Float64, on the CPU where the device has none (MPS)."""
    return x.double() if x.device.type in {"cpu", "cuda"} else x.cpu().double()


def _active(candidate: Candidate, made: Reconstruction) -> tuple[Tensor, Tensor]:
    """Active features of each token `[N]`, and each feature's firings `[num_features]`."""
    if made.top_acts is None or made.top_indices is None:
        active = torch.full((len(made.x_hat),), candidate.constant_l0, dtype=torch.float64)
        return active, torch.zeros(candidate.num_features, dtype=torch.int64)
    is_active = made.top_acts > 0
    fired = torch.bincount(made.top_indices[is_active], minlength=candidate.num_features)
    return is_active.sum(dim=-1), fired


def _token_figures(x: Tensor, x_hat: Tensor, centred_squared: Tensor, active: Tensor) -> Tensor:
    """The sums' addends `[8, N]` float64."""
    x_hat = x_hat.to(x.device).double()
    x_norm = torch.linalg.vector_norm(x, dim=-1)
    x_hat_norm = torch.linalg.vector_norm(x_hat, dim=-1)
    dot = torch.linalg.vecdot(x_hat, x)
    # An activation of exactly 0 has no direction and no length to compare with: it adds 0 to both means.
    norms = x_norm * x_hat_norm
    cosine = torch.where(norms > 0, dot / norms, 0.0)
    norm_ratio = torch.where(x_norm > 0, x_hat_norm / x_norm, 0.0)
    error = (x - x_hat).square().sum(dim=-1)
    squares = [centred_squared, error, x_hat_norm.square(), dot, cosine, norm_ratio]
    return torch.stack([torch.ones_like(dot), *squares, active.to(dot)])
