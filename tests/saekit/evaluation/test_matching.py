"""Matching by direction, and what it says of dictionaries whose recovery is known in closed form."""

import itertools

import numpy as np
import pytest
import torch

from saekit.errors import ConfigError
from saekit.evaluation.matching import assign, firing_f1, match_features, recovery


def directions(num: int, d_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, d_in, generator=torch.Generator().manual_seed(seed))


def firings(num_tokens: int, num: int, probability: float = 0.2, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_tokens, num, generator=torch.Generator().manual_seed(seed)) < probability


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (4, 6), (6, 4), (6, 6)])
@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_assign_is_the_best_of_all_matchings(shape: tuple[int, int], kind: str) -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(shape) - 0.5 if kind == "distinct" else rng.integers(0, 3, shape).astype(np.float64)
    rows, columns = assign(scores)
    wide = scores if shape[0] <= shape[1] else scores.T
    every = itertools.permutations(range(wide.shape[1]), wide.shape[0])
    best = max(sum(wide[row, column] for row, column in enumerate(chosen)) for chosen in every)
    assert scores[rows, columns].sum() == pytest.approx(best)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == min(shape)


def test_assign_beats_taking_the_largest_first() -> None:
    rows, columns = assign(np.array([[10.0, 9.0], [9.0, 0.0]]))
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {0: 1, 1: 0}


def test_assign_refuses_nan() -> None:
    with pytest.raises(ConfigError, match="scores with NaN or Inf"):
        assign(np.array([[np.nan]]))


def test_match_features_undoes_permutation_scale_and_sign() -> None:
    planted = directions(30, 8)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    signs = torch.where(torch.arange(30) % 2 == 0, 1.0, -1.0)
    found = match_features(planted[order] * signs[:, None] * torch.linspace(0.1, 9, 30)[:, None], planted)
    assert torch.equal(found.planted, order[found.features])
    torch.testing.assert_close(found.cosines, torch.ones(30, dtype=torch.float64))


def test_match_features_gives_no_planted_feature_twice() -> None:
    planted = torch.eye(4)
    found = match_features(torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0]]), planted)
    assert sorted(found.planted.tolist()) == [0, 1]


def test_match_features_refuses_another_width() -> None:
    with pytest.raises(ConfigError, match="features are 3 wide, needs the planted width 4"):
        match_features(torch.ones(2, 3), torch.ones(2, 4))


def test_firing_f1_in_closed_form() -> None:
    fires = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    planted = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert firing_f1(fires, planted).tolist() == pytest.approx([1.0, 2 / 3, 0.0, 0.0])


def test_recovery_of_the_planted_dictionary_itself_is_perfect() -> None:
    planted, fires = directions(20, 10), firings(200, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    found = recovery(
        -planted[order],
        fires[:, order],
        planted=planted,
        planted_fires=fires,
        probabilities=torch.full((20,), 0.2),
    )
    assert found == pytest.approx((1.0, 1.0, 1.0, 1.0))


def test_recovery_of_a_random_dictionary_is_near_chance() -> None:
    planted = torch.nn.functional.normalize(directions(128, 64), dim=1)
    found = recovery(
        directions(64, 64, seed=1),
        firings(2000, 64, 0.05, seed=2),
        planted=planted,
        planted_fires=firings(2000, 128, 0.05, seed=3),
        probabilities=torch.linspace(0.1, 0.01, 128),
    )
    # The largest of 128 absolute cosines in 64 dimensions is about 0.35; independent firing at rate p has F1 = p.
    assert 0.2 < found.mcc < 0.4
    assert found.f1 < 0.06
    assert found.recovered == 0


def test_f1_counts_frequent_features_without_a_partner_as_zero() -> None:
    planted, fires = torch.eye(4), firings(100, 4)
    rates = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # The second feature is a copy of the first: it is matched elsewhere, and what it would have been is missing.
    found = recovery(torch.eye(4)[[0, 3]], fires[:, [0, 3]], planted=planted, planted_fires=fires, probabilities=rates)
    assert found.mcc == 1.0
    assert found.f1 == pytest.approx(0.5)
    assert found.recovered == pytest.approx(0.5)


def test_uniqueness_counts_copies_once() -> None:
    planted, fires = torch.eye(4), firings(100, 4)
    found = recovery(
        torch.eye(4)[[0, 0, 0, 1]], fires, planted=planted, planted_fires=fires, probabilities=torch.full((4,), 0.2)
    )
    assert found.uniqueness == 0.5
    assert found.mcc == pytest.approx(0.5)
