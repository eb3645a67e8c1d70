"""Planted dictionaries: exact rates, implication, exclusion and correlation of what fires, and the sum that activations are."""

import pytest
import torch

from saekit.errors import ConfigError
from saekit.evaluation.matching import match_features
from saekit.evaluation.planted import PlantedConfig, PlantedDictionary
from saekit.sae import TopKConfig, TopKSAE

SMALL = PlantedConfig(
    num_features=96, d_in=48, num_roots=4, num_children=3, depth=2, min_probability=0.01, orthogonal_steps=20
)


@pytest.fixture(scope="module")
def planted() -> PlantedDictionary:
    return PlantedDictionary(SMALL)


@pytest.fixture(scope="module")
def fires(planted: PlantedDictionary) -> torch.Tensor:
    return planted.sample(20_000, torch.Generator().manual_seed(1)).acts > 0


def test_features_fire_as_often_as_they_should(planted: PlantedDictionary, fires: torch.Tensor) -> None:
    p = planted.probabilities
    z = (fires.float().mean(0) - p) / (p * (1 - p) / len(fires)).sqrt()
    # The mean of |z| of a standard normal is 0.80.
    assert 0.5 < float(z.abs().mean()) < 1.1
    assert float(z.abs().max()) < 5


def test_children_fire_only_with_their_parent_and_one_at_a_time(
    planted: PlantedDictionary, fires: torch.Tensor
) -> None:
    for parent in planted.parents.unique().tolist():
        if parent < 0:
            continue
        children = fires[:, planted.parents == parent]
        assert children.any()
        assert not bool((children.any(1) & ~fires[:, parent]).any())
        assert int(children.sum(1).max()) == 1


def test_trees_have_every_generation(planted: PlantedDictionary) -> None:
    assert (planted.parents[:4] == -1).all()
    assert planted.parents[4:16].tolist() == [parent for parent in range(4) for _ in range(3)]
    assert planted.parents[16:52].tolist() == [parent for parent in range(4, 16) for _ in range(3)]
    assert (planted.parents[52:] == -1).all()


def test_children_together_leave_their_parent_alone_at_times(planted: PlantedDictionary) -> None:
    for parent in range(16):
        total = float(planted.probabilities[planted.parents == parent].sum())
        assert total <= 0.95 * float(planted.probabilities[parent]) + 1e-6


def test_free_features_are_correlated_as_the_common_causes_say() -> None:
    config = SMALL.model_copy(update={"num_roots": 0, "correlation_rank": 1, "correlation_scale": 0.5})
    strong = PlantedDictionary(config)
    fires = (strong.sample(20_000, torch.Generator().manual_seed(1)).acts > 0).double()
    independent = PlantedDictionary(config.model_copy(update={"correlation_rank": 0}))
    alone = (independent.sample(20_000, torch.Generator().manual_seed(1)).acts > 0).double()
    off = ~torch.eye(10, dtype=torch.bool)
    assert float(torch.corrcoef(fires[:, :10].T)[off].abs().mean()) > 0.05
    assert float(torch.corrcoef(alone[:, :10].T)[off].abs().mean()) < 0.02


def test_activations_are_the_bias_and_the_active_features(planted: PlantedDictionary) -> None:
    sample = planted.sample(64, torch.Generator().manual_seed(3))
    expected = planted.bias.double() + sum(
        sample.acts[:, feature, None].double() * planted.features[feature].double() for feature in range(96)
    )
    torch.testing.assert_close(sample.x.double(), expected, atol=1e-4, rtol=1e-5)
    assert float(planted.bias.norm()) == pytest.approx(0.5, abs=1e-5)
    active = sample.acts[sample.acts > 0]
    assert 3.5 < float(active.mean()) < 5.5


def test_features_are_unit_and_driven_apart(planted: PlantedDictionary) -> None:
    together = PlantedDictionary(SMALL.model_copy(update={"orthogonal_steps": 0}))
    identity = torch.eye(96)
    assert torch.allclose(planted.features.norm(dim=1), torch.ones(96), atol=1e-5)
    before, after = (d.features @ d.features.T - identity for d in (together, planted))
    assert float(after.square().sum()) < float(before.square().sum())


def test_features_are_not_the_first_weights_of_an_sae_with_the_same_seed(planted: PlantedDictionary) -> None:
    sae = TopKSAE(TopKConfig(d_in=48, d_sae=96, k=4), seed=SMALL.seed)
    assert float(match_features(sae.W_dec, planted.features).cosines.mean()) < 0.5


def test_same_seed_same_dictionary_and_same_stream() -> None:
    one, two = PlantedDictionary(SMALL), PlantedDictionary(SMALL)
    other = PlantedDictionary(SMALL.model_copy(update={"seed": 1}))
    first, second = (d.sample(8, torch.Generator().manual_seed(5)).x for d in (one, two))
    assert torch.equal(first, second)
    assert not torch.allclose(one.features, other.features)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_features": 10, "num_roots": 4}, "trees have 84 features, need at most num_features = 10"),
        ({"min_probability": 0.5}, "min_probability is 0.5, needs at most max_probability = 0.4"),
    ],
)
def test_config_that_does_not_fit_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlantedConfig.parse(values)
