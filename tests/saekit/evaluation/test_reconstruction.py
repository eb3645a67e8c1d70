"""Reconstruction figures against independent NumPy computations, and against the wrong definitions that are in use."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from saekit.errors import NonFiniteError
from saekit.evaluation.bootstrap import Resampled
from saekit.evaluation.nulls import mean_candidate, sae_candidate
from saekit.evaluation.reconstruction import (
    RECONSTRUCTION_METRICS,
    WHOLE,
    Candidate,
    Reconstruction,
    ReconstructionSums,
    mean_activation,
    part_sums,
)
from saekit.sae import TopKConfig, TopKSAE

Array = npt.NDArray[np.float64]


def _reader(x: Tensor) -> Callable[[npt.NDArray[np.int64]], Tensor]:
    return lambda flat: x[torch.from_numpy(flat)]


def _sums(x: Tensor, *candidates: Candidate, batch_tokens: int = 7, documents: npt.NDArray[np.int64] | None = None):
    flat = np.arange(len(x))
    mean = mean_activation(_reader(x), flat, batch_tokens=batch_tokens)
    (sums,) = part_sums(
        candidates,
        _reader(x),
        flat,
        parts=(WHOLE,),
        documents=np.zeros(len(x), dtype=np.int64) if documents is None else documents,
        mean=mean,
        batch_tokens=batch_tokens,
        device=torch.device("cpu"),
    )
    return sums


def _values(sums: ReconstructionSums) -> dict[str, float | None]:
    resampled = Resampled.of(sums.sums, 0, seed=0)
    return {name: resampled.figure(statistic).value for name, statistic in RECONSTRUCTION_METRICS.items()}


def _fixed(x_hat: Tensor, x: Tensor) -> Candidate:
    """A candidate that answers a given tensor, row by row, found by the input's own rows."""
    places = {row.numpy().tobytes(): i for i, row in enumerate(x)}
    return Candidate(
        name="fixed",
        title="fixed",
        reconstruct=lambda part: Reconstruction(x_hat[[places[row.numpy().tobytes()] for row in part]]),
    )


@pytest.fixture
def x() -> Tensor:
    """50 tokens of width 6 far from the origin, so that mean and scale both matter."""
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([9, 3, 1, 1, 1, 0.2]) + 4


@pytest.fixture
def x_hat(x: Tensor) -> Tensor:
    """A reconstruction with shrinkage, a constant offset and noise."""
    return 0.8 * x + 0.3 + 0.5 * torch.randn(50, 6, generator=torch.Generator().manual_seed(2))


def test_reconstruction_metrics_equal_their_formulas(x: Tensor, x_hat: Tensor) -> None:
    found = _values(_sums(x, _fixed(x_hat, x))["fixed"])
    a, b = x.double().numpy(), x_hat.double().numpy()
    norm = lambda v: np.sqrt((v**2).sum(1))  # noqa: E731
    expected = {
        "fvu": ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum(),
        "l0": 0.0,
        "cosine_similarity": ((a * b).sum(1) / (norm(a) * norm(b))).mean(),
        "norm_ratio": (norm(b) / norm(a)).mean(),
        "relative_reconstruction_bias": (b**2).sum() / (a * b).sum(),
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_mean_vector_has_fvu_of_exactly_one(x: Tensor) -> None:
    mean = mean_activation(_reader(x), np.arange(len(x)), batch_tokens=7)
    assert _values(_sums(x, mean_candidate(mean))["mean"])["fvu"] == 1.0


def test_identity_has_fvu_of_exactly_zero_and_no_bias(x: Tensor) -> None:
    identity = Candidate(name="identity", title="identity", reconstruct=Reconstruction)
    found = _values(_sums(x, identity)["identity"])
    assert found["fvu"] == 0.0
    assert found["relative_reconstruction_bias"] == 1.0
    assert found["cosine_similarity"] == pytest.approx(1.0, abs=1e-12)
    assert found["norm_ratio"] == 1.0


def test_identity_dictionary_has_fvu_of_zero() -> None:
    """W_dec = [I; -I] with k = d_in writes every vector exactly, with d_in active features a token."""
    sae = TopKSAE(TopKConfig(d_in=4, d_sae=8, k=4))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
        sae.W_enc.copy_(sae.W_dec.T)
    x = torch.randn(64, 4)
    sums = _sums(x, sae_candidate(sae))["sae"]
    found = _values(sums)
    assert found["fvu"] == pytest.approx(0, abs=1e-12)
    assert found["l0"] == 4.0
    expected = torch.cat([x > 0, x < 0], dim=1).sum(0)
    np.testing.assert_array_equal(sums.firings, expected.numpy())


WRONG_DEFINITIONS: dict[str, Callable[[Array, Array], float]] = {
    "variance of the residual": lambda a, b: (a - b).var(0).sum() / a.var(0).sum(),
    "mean of per-token ratios": lambda a, b: (((a - b) ** 2).sum(1) / ((a - a.mean(0)) ** 2).sum(1)).mean(),
    "square of the per-dimension second moment": lambda a, b: (
        ((a - b) ** 2).sum(1).mean() / ((a**2).sum(1).mean() - ((a**2).mean(0) ** 2).mean())
    ),
    "pooled scalar variance": lambda a, b: ((a - b) ** 2).mean() / a.var(),
    "mean of per-dimension ratios": lambda a, b: (((a - b) ** 2).sum(0) / ((a - a.mean(0)) ** 2).sum(0)).mean(),
    "second moment": lambda a, b: ((a - b) ** 2).sum() / (a**2).sum(),
    "mean of batches": lambda a, b: float(
        np.mean(
            [
                ((a[i : i + 10] - b[i : i + 10]) ** 2).sum() / ((a[i : i + 10] - a[i : i + 10].mean(0)) ** 2).sum()
                for i in range(0, len(a), 10)
            ]
        )
    ),
}


@pytest.mark.parametrize("name", WRONG_DEFINITIONS)
def test_fvu_is_none_of_the_other_definitions(x: Tensor, x_hat: Tensor, name: str) -> None:
    found = _values(_sums(x, _fixed(x_hat, x))["fixed"])["fvu"]
    wrong = WRONG_DEFINITIONS[name](x.double().numpy(), x_hat.double().numpy())
    assert abs(found - wrong) > 1e-3 * found


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_fvu_is_invariant_to_scale(x: Tensor, x_hat: Tensor, scale: float) -> None:
    plain = _values(_sums(x, _fixed(x_hat, x))["fixed"])
    scaled = _values(_sums(x * scale, _fixed(x_hat * scale, x * scale))["fixed"])
    assert scaled == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 3, 50, 1000])
def test_sums_do_not_depend_on_batches_or_order(x: Tensor, x_hat: Tensor, batch_tokens: int) -> None:
    documents = np.arange(50) // 20
    one = _sums(x, _fixed(x_hat, x), documents=documents, batch_tokens=11)["fixed"]
    order = np.random.default_rng(0).permutation(50)
    other = _sums(x[order], _fixed(x_hat, x), documents=documents[order], batch_tokens=batch_tokens)["fixed"]
    for name in one.sums:
        np.testing.assert_allclose(other.sums[name], one.sums[name], rtol=1e-12)


def test_variance_is_exact_far_from_the_origin() -> None:
    """The textbook E x^2 - (E x)^2 in float32 would lose every digit here."""
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) + 4096.0
    x_hat = x + 0.5
    found = _values(_sums(x, Candidate(name="a", title="a", reconstruct=lambda p: Reconstruction(p + 0.5)))["a"])
    a = x.double().numpy()
    expected = ((x_hat.double().numpy() - a) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    assert found["fvu"] == pytest.approx(expected, rel=1e-10)
    assert mean_activation(_reader(x), np.arange(4000), batch_tokens=999).numpy() == pytest.approx(a.mean(0), rel=1e-14)


def test_sums_are_kept_by_document(x: Tensor, x_hat: Tensor) -> None:
    documents = np.repeat([0, 2, 1], [10, 15, 25])
    sums = _sums(x, _fixed(x_hat, x), documents=documents)["fixed"].sums
    error = ((x - x_hat).double() ** 2).sum(1).numpy()
    np.testing.assert_allclose(sums["error"], [error[documents == i].sum() for i in range(3)], rtol=1e-6)
    np.testing.assert_array_equal(sums["tokens"], [10, 25, 15])


def test_l0_and_firings_ignore_unused_places() -> None:
    """Unused places of a sparse code hold activation 0 at index 0: feature 0 did not fire."""
    acts, indices = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([[4, 0], [4, 2]])
    made = Reconstruction(torch.zeros(2, 3), acts, indices)
    candidate = Candidate(name="a", title="a", reconstruct=lambda x: made, num_features=5)
    sums = _sums(torch.ones(2, 3), candidate)["a"]
    np.testing.assert_array_equal(sums.firings, [0, 0, 1, 0, 2])
    assert sums.sums["active"].sum() == 3


def test_cosine_of_a_zero_reconstruction_is_zero() -> None:
    zero = Candidate(name="zero", title="zero", reconstruct=lambda x: Reconstruction(torch.zeros_like(x)))
    found = _values(_sums(torch.randn(5, 3), zero)["zero"])
    assert found["cosine_similarity"] == 0.0
    assert found["relative_reconstruction_bias"] is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sums_raise_when_not_finite(x: Tensor, bad: float) -> None:
    broken = Candidate(name="sae", title="SAE", reconstruct=lambda part: Reconstruction(torch.full_like(part, bad)))
    with pytest.raises(NonFiniteError, match="'SAE' reconstructs tokens as NaN or Inf, needs finite weights"):
        _sums(x, broken)
