"""Near negatives: whose peaks they are, that the feature is silent there, and which siblings count."""

import numpy as np
import pytest
import torch

from saekit.errors import ConfigError
from saekit.labelling import near_negatives, sibling_features
from saekit.sae import TopKConfig, TopKSAE


def test_siblings_are_the_nearest_decoder_rows_and_never_the_feature_itself() -> None:
    sae = TopKSAE(TopKConfig(d_in=2, d_sae=4, k=1))
    angles = torch.tensor([0.0, 0.1, 0.5, 2.0])
    with torch.no_grad():
        sae.W_dec.copy_(3 * torch.stack([angles.cos(), angles.sin()], dim=1))
    assert sibling_features(sae, [2, 0], num=2).tolist() == [[1, 0], [1, 2]]
    assert sibling_features(sae, [], num=2).shape == (0, 2)
    with pytest.raises(ConfigError, match="4 of each feature, the dictionary has 4"):
        sibling_features(sae, [0], num=4)


def test_near_negatives_are_siblings_peaks_in_rows_where_the_feature_is_silent(world, bench) -> None:
    contexts = bench().contexts
    features = [world.feature("new_york"), world.feature("quasar"), world.feature("dead"), world.feature("dense")]
    found = near_negatives(world.sae, world.train, contexts, features, num=5, num_siblings=9)
    acts = np.where(world.train.mask[..., None], world.acts.reshape(*world.train.mask.shape, -1), 0)
    fires_in_row = (acts > 0).any(axis=1)
    for feature in features:
        peaks = {
            (context.row, context.position)
            for sibling in sibling_features(world.sae, [feature], num=9)[0].tolist()
            for context in contexts.feature(sibling)
        }
        assert all((context.row, context.position) in peaks for context in found[feature])
        assert not any(fires_in_row[context.row, feature] for context in found[feature])
        assert len({context.row for context in found[feature]}) == len(found[feature])
    # The first fires in most rows, the last in all.
    assert [len(found[feature]) for feature in features[1:]] == [5, 5, 0]
    assert found[features[0]]
