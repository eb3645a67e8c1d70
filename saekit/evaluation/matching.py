"""How much of a known dictionary an SAE has found: one feature for one, by direction, and how alike the two fire."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saekit.errors import ConfigError

__all__ = ["Matching", "Recovery", "assign", "firing_f1", "match_features", "recovery"]

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


class Matching(NamedTuple):
    """The best one-to-one matching of an SAE's features with the planted ones."""

    features: Tensor
    """Of each matched pair the SAE's feature [M] int64, M the smaller of the two numbers."""
    planted: Tensor
    """And the planted one [M] int64."""
    cosines: Tensor
    """Absolute cosine of their directions [M] float64."""


class Recovery(NamedTuple):
    """How much of the planted dictionary was found."""

    mcc: float
    """Mean absolute cosine over the matched pairs; 1 = every direction is there."""
    f1: float
    """Mean over the d_sae most frequent planted features of the F1 of their firing; 0 for one without a partner."""
    uniqueness: float
    """Planted features that are nearest to some feature, per feature of the SAE; below 1 some share theirs."""
    recovered: float
    """Part of the d_sae most frequent planted features that some feature has with a cosine above 0.9."""


def assign(scores: Float64Array) -> tuple[Int64Array, Int64Array]:
    """Returns the rows and columns of the one-to-one matching with the largest sum of scores [R, C]; all of the fewer.

    Raises:
        ConfigError: a score is NaN or Inf.

    Source: Jonker and Volgenant 1987, shortest augmenting paths; here without the initial reduction, vectorised by row.
    """
    if not np.isfinite(scores).all():
        raise ConfigError("matching: scores with NaN or Inf, needs finite ones")
    if scores.shape[0] > scores.shape[1]:
        columns, rows = assign(scores.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    cost = -np.asarray(scores, dtype=np.float64)
    num_rows, num_columns = cost.shape
    row_price, column_price = np.zeros(num_rows), np.zeros(num_columns)
    column_of, row_of = np.full(num_rows, -1), np.full(num_columns, -1)
    for free in range(num_rows):
        distance, before = np.full(num_columns, np.inf), np.full(num_columns, -1)
        is_done = np.zeros(num_columns, dtype=np.bool_)
        row, reached, end = free, 0.0, -1
        while end < 0:
            through = reached + cost[row] - row_price[row] - column_price
            is_shorter = ~is_done & (through < distance)
            distance[is_shorter], before[is_shorter] = through[is_shorter], row
            column = int(np.argmin(np.where(is_done, np.inf, distance)))
            reached = float(distance[column])
            is_done[column] = True
            row = int(row_of[column])
            end = column if row < 0 else -1
        row_price[free] += reached
        inner = is_done.copy()
        inner[end] = False
        gain = reached - distance[inner]
        row_price[row_of[inner]] += gain
        column_price[inner] -= gain
        while end >= 0:
            row = int(before[end])
            row_of[end], column_of[row], end = row, end, int(column_of[row])
    return np.arange(num_rows), column_of


def match_features(W_dec: Tensor, planted: Tensor) -> Matching:
    """Returns the matching with the largest sum of absolute cosines.

    A direction counts as found whatever its sign: a planted feature is read off the opposite one as well. A row of zeros has
    cosine 0 with everything.

    Args:
        W_dec: decoder [d_sae, d_in].
        planted: directions [num_features, d_in].

    Raises:
        ConfigError: the widths differ, or a weight is NaN or Inf.
    """
    cosines = _absolute_cosines(W_dec, planted)
    rows, columns = assign(cosines.numpy())
    features, partners = torch.from_numpy(rows), torch.from_numpy(columns)
    return Matching(features, partners, cosines[features, partners])


def firing_f1(fires: Tensor, planted_fires: Tensor) -> Tensor:
    """Returns 2 TP / (2 TP + FP + FN) of pairs of columns, 0 where neither ever fires, [M] float64.

    Args:
        fires: whether each feature is active [N, M] bool.
        planted_fires: whether its partner is [N, M] bool.
    """
    both = (fires & planted_fires).sum(0).double()
    either = fires.sum(0).double() + planted_fires.sum(0).double()
    return torch.where(either > 0, 2 * both / either, 0.0)


def recovery(
    W_dec: Tensor, fires: Tensor, *, planted: Tensor, planted_fires: Tensor, probabilities: Tensor
) -> Recovery:
    """Returns how much of a planted dictionary an SAE has.

    Args:
        W_dec: decoder [d_sae, d_in].
        fires: whether its features are active [N, d_sae] bool, on tokens it was not trained on.
        planted: directions [num_features, d_in].
        planted_fires: whether the planted features are active on these tokens [N, num_features] bool.
        probabilities: how often they are [num_features].

    Raises:
        ConfigError: see `match_features`.
    """
    matching = match_features(W_dec, planted)
    cosines = _absolute_cosines(W_dec, planted)
    scores = torch.zeros(len(planted), dtype=torch.float64)
    scores[matching.planted] = firing_f1(fires[:, matching.features], planted_fires[:, matching.planted])
    frequent = probabilities.topk(min(len(W_dec), len(planted))).indices
    nearest = cosines.argmax(dim=1)
    return Recovery(
        mcc=float(matching.cosines.mean()),
        f1=float(scores[frequent].mean()),
        uniqueness=len(set(nearest.tolist())) / len(W_dec),
        recovered=float((cosines[:, frequent].max(dim=0).values > 0.9).double().mean()),
    )


def _absolute_cosines(W_dec: Tensor, planted: Tensor) -> Tensor:
    """[d_sae, num_features] float64."""
    if W_dec.shape[1] != planted.shape[1]:
        raise ConfigError(f"matching: features are {W_dec.shape[1]} wide, needs the planted width {planted.shape[1]}")
    unit = [torch.nn.functional.normalize(rows.detach().double().cpu(), dim=1, eps=1e-30) for rows in (W_dec, planted)]
    return (unit[0] @ unit[1].T).abs().clamp_max(1.0)
