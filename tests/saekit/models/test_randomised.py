"""Random weights: the scales of the trained ones, the same on every call, embeddings kept on demand."""

import torch

from saekit.config import changed_keys
from saekit.models import ModelConfig, load_model


def test_weights_are_noise_of_the_same_mean_and_deviation(tiny_model_dir) -> None:
    name = str(tiny_model_dir("gpt2"))
    trained = load_model(name)
    once, again, other = (
        load_model(ModelConfig(name=name, random_weights="all", random_seed=seed)) for seed in (0, 0, 1)
    )
    assert once.fingerprint == again.fingerprint
    assert len({trained.fingerprint, once.fingerprint, other.fingerprint}) == 3
    before = dict(trained.model.named_parameters())
    for key, noise in once.model.named_parameters():
        weight = before[key]
        if weight.numel() >= 1000:
            torch.testing.assert_close(noise.std(), weight.std(), rtol=0.15, atol=0)
            assert abs(torch.corrcoef(torch.stack([noise.flatten(), weight.flatten()]))[0, 1]) < 0.15
        # Gains of norms start as ones, and biases as zeros.
        assert (weight.std(correction=0) > 0) or torch.equal(noise, weight)
        assert not noise.requires_grad


def test_embeddings_are_kept_on_demand(tiny_model_dir) -> None:
    name = str(tiny_model_dir("llama"))
    trained = dict(load_model(name).model.named_parameters())
    kept = load_model(ModelConfig(name=name, random_weights="all_but_embeddings")).model
    same = {key for key, weight in kept.named_parameters() if weight.ndim > 1 and torch.equal(weight, trained[key])}
    embeddings = {key for key in trained if "embed_tokens" in key or "lm_head" in key}
    assert same == embeddings


def test_folders_of_before_the_options_are_of_the_same_model() -> None:
    now = ModelConfig(name="m").to_dict()
    before = {key: value for key, value in now.items() if not key.startswith("random_")}
    assert len(before) == len(now) - 2
    assert changed_keys(before, now) == {}
