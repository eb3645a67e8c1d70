"""VocabProj and TokenChange on decoder rows made of unembedding rows of a tiny model: the planted tokens come out first."""

from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.errors import ConfigError, DataError, StoreError
from saekit.labelling import (
    TokenChangeConfig,
    TokenEffects,
    effects_path,
    steering_contexts,
    steering_strengths,
    token_change,
    vocab_projection,
)
from saekit.models import LanguageModel, add, find_unembedding, load_model, logits
from saekit.sae import TopKConfig, TopKSAE

PLANTED = [[5, 17, 40], [60, 61, 62], [100, 200, 300]]
FAMILIES = ["llama", "gpt2", "gemma2"]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request, tiny_model_dir) -> LanguageModel:
    """A tiny model in which the planted tokens of one set share a direction of the unembedding.

    Among 384 random rows of width 32 no sum of three would stand out by itself.
    """
    lm = load_model(str(tiny_model_dir(request.param)))
    weight = find_unembedding(lm).weight
    with torch.no_grad():
        for row, tokens in enumerate(PLANTED):
            weight[tokens, 4 * row] = 0.4
    return lm


def _planted_sae(lm: LanguageModel, hook_point: str | None) -> TopKSAE:
    """Rows 0..2 are sums of the planted tokens' unembedding rows, rows 3..5 their opposites."""
    weight = find_unembedding(lm).weight.float()
    sae = TopKSAE(TopKConfig(d_in=weight.shape[1], d_sae=6, k=2), hook_point=hook_point)
    with torch.no_grad():
        for row, tokens in enumerate(PLANTED):
            direction = (weight[tokens] - weight.mean(dim=0)).sum(dim=0)
            sae.W_dec[row] = direction / direction.norm()
            sae.W_dec[row + 3] = -sae.W_dec[row]
    return sae


def test_vocab_projection_returns_the_planted_tokens_and_the_sign_swaps_them(lm: LanguageModel) -> None:
    effects = vocab_projection(_planted_sae(lm, None), find_unembedding(lm), num=3)
    assert effects.features.tolist() == list(range(6))
    for row, tokens in enumerate(PLANTED):
        assert {token for token, _ in effects.promoted(row)} == set(tokens)
        assert {token for token, _ in effects.suppressed(row + 3)} == set(tokens)
        values = [value for _, value in effects.promoted(row)]
        assert values == sorted(values, reverse=True)
        assert values[0] > 0 > effects.suppressed(row)[0][1]


def test_vocab_projection_equals_the_formula(lm: LanguageModel) -> None:
    sae, unembedding = _planted_sae(lm, None), find_unembedding(lm)
    effects = vocab_projection(sae, unembedding, features=[4, 1], num=5)
    assert effects.features.tolist() == [1, 4]
    raw = unembedding.norm(sae.W_dec[[1, 4]].detach()) @ unembedding.weight.float().T
    relative = raw - raw.mean(dim=1, keepdim=True)
    expected = relative.sort(dim=1, descending=True)
    np.testing.assert_allclose(effects.promoted_values, expected.values[:, :5].detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(effects.promoted_ids[:, 0], expected.indices[:, 0])
    np.testing.assert_allclose(
        effects.suppressed_values, expected.values[:, -5:].flip(1).detach(), rtol=1e-4, atol=1e-5
    )


def test_vocab_projection_of_another_width_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"rows are 5 wide, the residual stream is 32; set vocab_projection = false"):
        vocab_projection(TopKSAE(TopKConfig(d_in=5, d_sae=6, k=2)), find_unembedding(lm))


HOOKS = {"llama": "model.layers.2", "gpt2": "transformer.h.2", "gemma2": "model.layers.2"}


def _hook(lm: LanguageModel) -> str:
    return next(hook for family, hook in HOOKS.items() if family in lm.name)


def test_token_change_ranks_the_planted_tokens_first(lm: LanguageModel) -> None:
    sae = _planted_sae(lm, _hook(lm))
    tokens = torch.randint(2, 300, (3, 10), generator=torch.Generator().manual_seed(0))
    effects = token_change(
        lm,
        sae,
        features=range(6),
        strengths=np.full(6, 40.0, dtype=np.float32),
        tokens=tokens,
        config=TokenChangeConfig(num_tokens=3, batch_features=4),
    )
    assert effects.kind == "tokenchange"
    for row, planted in enumerate(PLANTED):
        assert {token for token, _ in effects.promoted(row)} == set(planted)
        assert {token for token, _ in effects.suppressed(row + 3)} == set(planted)


def _uncapped(lm: LanguageModel, values: torch.Tensor) -> torch.Tensor:
    cap = find_unembedding(lm).softcap
    return values if cap is None else cap * torch.atanh(values / cap)


@pytest.mark.parametrize("match", ["kl", "max_act"])
def test_token_change_equals_a_steered_forward(lm: LanguageModel, match: str) -> None:
    hook = _hook(lm).replace(".2", ".0")
    sae = _planted_sae(lm, hook)
    tokens = torch.randint(2, 300, (2, 8), generator=torch.Generator().manual_seed(1))
    strengths = np.array([0, 3.0, 0, 0, 0, 0], dtype=np.float32)
    config = TokenChangeConfig(num_tokens=4, match=match, kl_target=0.2)
    effects = token_change(lm, sae, features=[1], strengths=strengths, tokens=tokens, config=config)
    vector = torch.zeros(1, 8, lm.d_model)
    vector[:, 1:] = float(effects.strength[0]) * sae.W_dec[1].detach()
    assert (effects.strength[0] == 3.0) == (match == "max_act")
    with add(lm, hook, vector):
        steered = logits(lm, tokens)
    change = (_uncapped(lm, steered) - _uncapped(lm, logits(lm, tokens)))[:, 1:].mean(dim=(0, 1))
    expected = (change - change.mean()).sort(descending=True)
    np.testing.assert_allclose(effects.promoted_values[0], expected.values[:4], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(effects.promoted_ids[0], expected.indices[:4])


def test_token_change_does_not_depend_on_the_batch(lm: LanguageModel) -> None:
    sae = _planted_sae(lm, _hook(lm))
    tokens = torch.randint(2, 300, (2, 6), generator=torch.Generator().manual_seed(2))
    options = {"features": [0, 2, 3], "strengths": np.ones(6, dtype=np.float32), "tokens": tokens}
    one, all_at_once = (
        token_change(lm, sae, config=TokenChangeConfig(batch_features=size, num_tokens=4), **options) for size in (1, 3)
    )
    np.testing.assert_allclose(one.promoted_values, all_at_once.promoted_values, atol=1e-5)
    assert one.features.tolist() == all_at_once.features.tolist() == [0, 2, 3]


def test_token_change_without_features_is_empty(lm: LanguageModel) -> None:
    effects = token_change(
        lm,
        _planted_sae(lm, _hook(lm)),
        features=[],
        strengths=np.ones(6, dtype=np.float32),
        tokens=torch.ones(1, 4, dtype=torch.int64),
        config=TokenChangeConfig(),
    )
    assert len(effects.features) == 0
    assert effects.promoted(0) == []


@pytest.mark.parametrize(
    ("hook", "features", "message"),
    [(None, [0], "names no hook point"), ("layer", [0, 9], "feature 9, the dictionary has features 0 to 5")],
)
def test_impossible_token_change_is_refused(lm: LanguageModel, hook, features, message: str) -> None:
    sae = _planted_sae(lm, hook and _hook(lm))
    with pytest.raises(ConfigError, match=message):
        token_change(
            lm,
            sae,
            features=features,
            strengths=np.ones(6, dtype=np.float32),
            tokens=torch.ones(1, 4, dtype=torch.int64),
            config=TokenChangeConfig(),
        )


def test_steering_contexts_are_row_beginnings_of_training_documents(world) -> None:
    config = TokenChangeConfig(num_contexts=3, context_len=7)
    tokens = steering_contexts(world.train, config=config)
    assert tokens.shape == (3, 7)
    beginnings = {tuple(row[:7].tolist()) for row in world.store.tokens()}
    assert all(tuple(row.tolist()) in beginnings for row in tokens)
    assert torch.equal(tokens, steering_contexts(world.train, config=config))


def test_steering_without_whole_rows_is_refused(world, monkeypatch) -> None:
    monkeypatch.setattr(world.store, "_kinds", np.ones_like(world.store.kinds()))
    with pytest.raises(DataError, match="no training row begins with"):
        steering_contexts(world.train, config=TokenChangeConfig())


def test_strength_is_the_largest_activation_and_the_median_for_silent_features() -> None:
    from types import SimpleNamespace

    contexts = SimpleNamespace(max_act=np.array([2.0, 0.0, 4.0, 6.0], dtype=np.float32))
    np.testing.assert_allclose(steering_strengths(contexts, strength=0.5), [1.0, 2.0, 2.0, 3.0])


def test_effects_survive_the_disk(tmp_path: Path) -> None:
    effects = TokenEffects.from_logits("vocabproj", np.array([3, 8]), torch.randn(2, 30), num=4)
    effects.save(effects_path(tmp_path, "vocabproj"))
    again = TokenEffects.open(tmp_path / "effects-vocabproj.safetensors")
    assert again.kind == "vocabproj"
    for name in ("features", "promoted_ids", "promoted_values", "suppressed_ids", "suppressed_values"):
        np.testing.assert_array_equal(getattr(again, name), getattr(effects, name))
    assert again.promoted(8) == effects.promoted(8)
    assert again.promoted(4) == []


@pytest.mark.parametrize("content", [None, b"nonsense", b""], ids=["missing", "nonsense", "empty"])
def test_broken_effects_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "effects-vocabproj.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match="cannot be read as token effects"):
        TokenEffects.open(path)
