"""Predicted against true activations, token by token: correlation with its interval, and the variance that is explained.

Shapes: n tokens, B bootstrap draws.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["calibrated_r2", "pearson", "pearson_interval"]

NUM_BOOTSTRAP = 200


def pearson(predicted: NDArray[np.float64], true: NDArray[np.float64], weight: NDArray[np.float64]) -> float | None:
    """Returns the correlation over weighted tokens [n]; None where one side is constant, as it is not defined there."""
    has_weight = weight > 0
    if not has_weight.any() or np.ptp(predicted[has_weight]) == 0 or np.ptp(true[has_weight]) == 0:
        return None
    share = weight / weight.sum()
    x, y = predicted - share @ predicted, true - share @ true
    return float(share @ (x * y) / np.sqrt((share @ (x * x)) * (share @ (y * y))))


def pearson_interval(
    predicted: NDArray[np.float64], true: NDArray[np.float64], documents: NDArray[np.int64], *, seed: int
) -> tuple[float | None, float | None]:
    """Returns the 95 % interval of the correlation over resampled documents; draws without one are left out."""
    known, which = np.unique(documents, return_inverse=True)
    x, y = predicted - predicted.mean(), true - true.mean()
    moments = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y])
    sums = np.stack([np.bincount(which, moment, minlength=len(known)) for moment in moments], axis=1)  # [documents, 6]
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(known), np.full(len(known), 1 / len(known)), size=NUM_BOOTSTRAP) @ sums  # [B, 6]
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (drawn[:, 1:] / drawn[:, :1]).T
    var_x, var_y = mean_xx - mean_x**2, mean_yy - mean_y**2
    # Rounding leaves some 1e-16 of the variance where there is none.
    is_defined = (var_x > 1e-9 * mean_xx) & (var_y > 1e-9 * mean_yy)
    if not is_defined.any():
        return None, None
    r = (mean_xy - mean_x * mean_y)[is_defined] / np.sqrt(var_x[is_defined] * var_y[is_defined])
    low, high = np.quantile(r, (0.025, 0.975))
    return float(low), float(high)


def calibrated_r2(predicted: NDArray[np.float64], true: NDArray[np.float64], half: NDArray[np.bool_]) -> float | None:
    """Returns the share of variance that predictions explain after a straight line through the other half's tokens.

    The mean of the other half is what they have to beat, so constant predictions explain 0; misleading ones less. None where
    the true activations are the same everywhere.

    Args:
        half: in which half each token is [n].
    """
    missed = total = 0.0
    for fit, test in ((half, ~half), (~half, half)):
        if not fit.any() or not test.any():
            return None
        x, y = predicted[fit] - predicted[fit].mean(), true[fit] - true[fit].mean()
        slope = float(x @ y / (x @ x)) if np.ptp(predicted[fit]) > 0 else 0.0
        line = true[fit].mean() + slope * (predicted[test] - predicted[fit].mean())
        missed += float(((true[test] - line) ** 2).sum())
        total += float(((true[test] - true[fit].mean()) ** 2).sum())
    return 1 - missed / total if total > 0 else None
