"""Features whose truth is known on both sides, in a tiny real model: rules over tokens in, sums of unembedding rows out."""

import numpy as np
import pytest
import torch

from saekit.activations import ActivationStore, CacheConfig, cache_activations
from saekit.errors import ConfigError, StoreError
from saekit.labelling import (
    FeatureContexts,
    LabelConfig,
    SideScores,
    SteeredContexts,
    TokenChangeConfig,
    TokenEffects,
    clamped_token_change,
    effects_path,
    input_scores,
    label_features,
    match_kl,
    output_scores,
    read_labels,
    token_change,
    vocab_projection,
)
from saekit.labelling.evidence.sidescores import PROMPT
from saekit.models import LanguageModel, add, capture, find_unembedding, load_model, logits, replace
from saekit.sae import (
    JumpReLUConfig,
    JumpReLUSAE,
    TopKConfig,
    TopKCrosscoder,
    TopKCrosscoderConfig,
    TopKSAE,
    Transcoder,
    TranscoderConfig,
)

NUM = 24
"""Planted features; number NUM + i is number i with the sign of its decoder row flipped."""
HOOK = "model.layers.2"


@pytest.fixture(scope="module")
def lm(tiny_model_dir) -> LanguageModel:
    """A tiny model with logits as far apart as a trained one's; as it is made, no push moves its predictions by 0.02 nats."""
    lm = load_model(str(tiny_model_dir("llama")))
    with torch.no_grad():
        find_unembedding(lm).weight.mul_(20)
    return lm


@pytest.fixture(scope="module")
def planted(lm: LanguageModel) -> np.ndarray:
    """The pairs of tokens with the most similar unembedding rows, none twice [NUM, 2].

    As synonyms are in a trained model: of 384 random rows of width 32, some third one is often nearer to the sum of two others.
    """
    weight = find_unembedding(lm).weight.detach().float()
    rows = torch.nn.functional.normalize(weight - weight.mean(dim=0), dim=1)
    first, second = np.triu_indices(len(rows), k=1)
    order = np.argsort(-(rows @ rows.T).numpy()[first, second], kind="stable")
    pairs: list[tuple[int, int]] = []
    for a, b in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if not {a, b} & {token for pair in pairs for token in pair}:
            pairs.append((a, b))
    return np.array(pairs[:NUM])


def _rows(lm: LanguageModel, planted: np.ndarray) -> torch.Tensor:
    weight = find_unembedding(lm).weight.detach().float()
    rows = (weight[torch.from_numpy(planted)] - weight.mean(dim=0)).sum(dim=1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return torch.cat([rows, -rows])


@pytest.fixture(scope="module")
def sae(lm: LanguageModel, planted: np.ndarray) -> TopKSAE:
    sae = TopKSAE(TopKConfig(d_in=lm.d_model, d_sae=2 * NUM, k=4), hook_point=HOOK)
    with torch.no_grad():
        sae.W_dec.copy_(_rows(lm, planted))
    return sae


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(2, 380, (3, 10), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def changed(lm, sae, tokens):
    config = TokenChangeConfig(num_tokens=50, batch_features=16)
    return token_change(
        lm, sae, features=range(2 * NUM), strengths=np.ones(2 * NUM, dtype=np.float32), tokens=tokens, config=config
    )


def _recall(found: list[tuple[int, float]], wanted: np.ndarray) -> float:
    return float(np.isin(wanted, [token for token, _ in found]).mean())


def test_vocab_projection_recalls_the_planted_sets_and_the_twin_swaps_them(lm, sae, planted) -> None:
    effects = vocab_projection(sae, find_unembedding(lm), num=50)
    promoted = [_recall(effects.promoted(feature), planted[feature]) for feature in range(NUM)]
    suppressed = [_recall(effects.suppressed(NUM + feature), planted[feature]) for feature in range(NUM)]
    wrong_side = [_recall(effects.suppressed(feature), planted[feature]) for feature in range(NUM)]
    assert np.mean(promoted) >= 0.95
    assert np.mean(suppressed) >= 0.95
    assert np.mean(wrong_side) == 0


def test_token_change_ranks_a_planted_token_first_with_its_sign(changed, planted) -> None:
    for feature in range(NUM):
        (first, up), (last, down) = changed.promoted(feature)[0], changed.suppressed(NUM + feature)[0]
        assert first in planted[feature]
        assert last in planted[feature]
        assert up > 0 > down
    assert np.mean([_recall(changed.promoted(feature), planted[feature]) for feature in range(NUM)]) >= 0.95


def test_steering_raises_the_planted_probability_and_the_twin_lowers_it(lm, sae, tokens, changed, planted) -> None:
    clean = torch.softmax(logits(lm, tokens), dim=-1)[:, 1:]
    for feature in range(NUM):
        own = torch.from_numpy(planted[feature])
        moved = {}
        for slot in (feature, NUM + feature):
            vector = torch.zeros(1, tokens.shape[1], lm.d_model)
            vector[:, 1:] = float(changed.strength[slot]) * sae.W_dec[slot].detach()
            with add(lm, HOOK, vector):
                steered = torch.softmax(logits(lm, tokens), dim=-1)[:, 1:]
            moved[slot] = float((steered / clean)[..., own].mean())
        assert moved[feature] > 1.5 > 0.7 > moved[NUM + feature]


@pytest.mark.parametrize("target", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("start", [1e-3, 1.0, -40.0])
def test_strength_reaches_the_target_divergence_of_a_steered_forward(lm, sae, tokens, target, start) -> None:
    contexts = SteeredContexts(lm, sae, tokens)
    rows = sae.W_dec[:3].detach()
    push = match_kl(contexts, rows, torch.full((3,), start), target=target)
    clean = torch.log_softmax(logits(lm, tokens), dim=-1)
    for row, strength, reached in zip(rows, push.strengths.tolist(), push.kl.tolist(), strict=True):
        assert np.sign(strength) == np.sign(start)
        vector = torch.zeros(1, tokens.shape[1], lm.d_model)
        vector[:, 1:] = strength * row
        with add(lm, HOOK, vector):
            steered = torch.log_softmax(logits(lm, tokens), dim=-1)
        measured = float((clean.exp() * (clean - steered)).sum(-1)[:, 1:].mean())
        assert measured == pytest.approx(reached, rel=1e-3)
        assert measured == pytest.approx(target, rel=0.101)


def test_a_feature_that_cannot_move_the_model_is_told_by_its_divergence(lm, sae, tokens) -> None:
    still = TopKSAE(sae.cfg, hook_point=HOOK)
    with torch.no_grad():
        still.W_dec.copy_(sae.W_dec)
        still.W_dec[1] = 0
    strengths = np.ones(2 * NUM, dtype=np.float32)
    effects = token_change(lm, still, features=[0, 1], strengths=strengths, tokens=tokens, config=TokenChangeConfig())
    assert effects.kl[0] == pytest.approx(0.5, rel=0.101)
    assert effects.kl[1] == pytest.approx(0, abs=1e-6)
    assert np.isfinite(effects.promoted_values).all()


def _encoding_sae(lm: LanguageModel, planted: np.ndarray) -> TopKSAE:
    """Random encoders, so that the clamped feature has an activation of its own to take away."""
    sae = TopKSAE(TopKConfig(d_in=lm.d_model, d_sae=2 * NUM, k=8), hook_point=HOOK, seed=3)
    with torch.no_grad():
        sae.W_dec.copy_(_rows(lm, planted))
    return sae


def test_clamping_equals_the_published_steps(lm, planted, tokens) -> None:
    sae = _encoding_sae(lm, planted)
    config = TokenChangeConfig(match="clamp", num_tokens=10, batch_features=3)
    features = [0, 5, 7, 30]
    up, down = clamped_token_change(lm, sae, features=features, tokens=tokens, config=config)
    assert (up.kind, down.kind) == ("tokenchange", "tokenchange_down")
    acts = sae.encode(capture(lm, tokens, [HOOK])[HOOK].float()).detach()
    with replace(lm, HOOK, lambda _: sae.decode(acts)):
        clean = logits(lm, tokens)
    for slot, feature in enumerate(features):
        for effects, value in ((up, 10.0), (down, -10.0)):
            clamped = acts.clone()
            clamped[..., feature] = value
            with replace(lm, HOOK, lambda _, z=clamped: sae.decode(z)):
                change = (logits(lm, tokens) - clean).mean(dim=(0, 1))
            change = change - change.mean()
            np.testing.assert_allclose(effects.promoted_values[slot], change.topk(10).values, rtol=1e-3, atol=1e-4)
            lowest = change.topk(10, largest=False).values
            np.testing.assert_allclose(effects.suppressed_values[slot], lowest, rtol=1e-3, atol=1e-4)
            assert effects.strength[slot] == value


def test_clamping_several_hook_points_is_refused(lm, tokens) -> None:
    cfg = TopKCrosscoderConfig(d_in=lm.d_model, d_sae=8, k=2, num_sites=2)
    sae = TopKCrosscoder(cfg, hook_point="model.layers.1,model.layers.2")
    with pytest.raises(ConfigError, match="reads several hook points, match = 'clamp' needs one"):
        clamped_token_change(lm, sae, features=[0], tokens=tokens, config=TokenChangeConfig(match="clamp"))


def test_a_transcoder_is_steered_where_it_writes(lm, planted, tokens) -> None:
    cfg = TranscoderConfig(d_in=lm.d_model, d_out=lm.d_model, d_sae=2 * NUM, k=4)
    sae = Transcoder(cfg, hook_point="model.layers.0", source={"target_hook_point": HOOK})
    with torch.no_grad():
        sae.W_dec.copy_(_rows(lm, planted))
    strengths = np.ones(2 * NUM, dtype=np.float32)
    config = TokenChangeConfig(num_tokens=10)
    changed = token_change(lm, sae, features=range(NUM), strengths=strengths, tokens=tokens, config=config)
    clamped, _ = clamped_token_change(lm, sae, features=range(NUM), tokens=tokens, config=config)
    for feature in range(NUM):
        assert changed.promoted(feature)[0][0] in planted[feature]
        assert clamped.promoted(feature)[0][0] in planted[feature]


def test_output_score_follows_its_definition_and_beats_random_rows(lm, sae, planted) -> None:
    projected = vocab_projection(sae, find_unembedding(lm), num=20)
    scores = output_scores(lm, sae, projected, features=range(2 * NUM))
    ids = torch.tensor([lm.tokenizer(PROMPT)["input_ids"]])
    hidden = capture(lm, ids, [HOOK])[HOOK][0, -1:].float()
    push = torch.zeros(1, ids.shape[1], lm.d_model)
    push[:, -1] = 10 * float(sae.encode(hidden).detach().max()) * sae.W_dec[5].detach()
    with add(lm, HOOK, push):
        probability = torch.softmax(logits(lm, ids)[0, -1], dim=-1)
    order = probability.argsort(descending=True).tolist()
    lens = projected.promoted_ids[5].tolist()
    expected = (1 - min(order.index(token) for token in lens) / 384) * float(probability[lens].max())
    assert scores[5] == pytest.approx(expected, rel=1e-4)

    noise = TopKSAE(sae.cfg, hook_point=HOOK, seed=11)
    with torch.no_grad():
        noise.W_enc.copy_(sae.W_enc)
    of_noise = output_scores(lm, noise, vocab_projection(noise, find_unembedding(lm), num=20), features=range(2 * NUM))
    assert float((scores[:NUM, None] > of_noise[None]).mean()) >= 0.95


def test_input_score_is_the_share_of_peaks_on_promoted_tokens(lm, sae, planted) -> None:
    from types import SimpleNamespace

    projected = vocab_projection(sae, find_unembedding(lm), num=20)
    other = next(t for t in range(384) if t not in projected.promoted_ids[0])
    store_tokens = np.array([[planted[0, 0], other, planted[0, 1], other]], dtype=np.int32)
    rows, positions = np.full((2 * NUM, 4), -1), np.full((2 * NUM, 4), -1)
    rows[0, :3], positions[0, :3] = 0, [0, 1, 2]
    scores = input_scores(SimpleNamespace(top_row=rows, top_position=positions), store_tokens, projected)
    assert scores[0] == pytest.approx(2 / 3)
    assert np.isnan(scores[1:]).all()


def test_side_scores_survive_the_disk(tmp_path) -> None:
    scores = SideScores(
        np.array([2, 7]),
        input_score=np.array([0.5, np.nan], dtype=np.float32),
        output_score=np.array([np.nan, 0.25], dtype=np.float32),
    )
    scores.save(tmp_path / "s.safetensors")
    again = SideScores.open(tmp_path / "s.safetensors")
    assert again.of(2) == {"input_score": 0.5, "output_score": None}
    assert again.of(7) == {"input_score": None, "output_score": 0.25}
    assert again.of(3) == again.of(9) == {"input_score": None, "output_score": None}
    with pytest.raises(StoreError, match="cannot be read as input and output scores"):
        SideScores.open(tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def store(lm, documents_file, tmp_path_factory) -> ActivationStore:
    config = CacheConfig.parse(
        {
            "model": {"name": lm.name},
            "text": {"kind": "files", "paths": [str(documents_file)]},
            "tokens": {"context_len": 32},
            "hook_points": [HOOK],
            "num_tokens": 700,
        }
    )
    out = tmp_path_factory.mktemp("cache")
    cache_activations(config, out, lm=lm)
    return ActivationStore.open(out)


def _rule_sae(store: ActivationStore, lm: LanguageModel, triggers: list[int], planted: np.ndarray) -> JumpReLUSAE:
    """Feature i fires on every token `triggers[i]` and on nothing else, and writes the pair `planted[i]`."""
    sae = JumpReLUSAE(JumpReLUConfig(d_in=lm.d_model, d_sae=len(triggers), target_l0=1), hook_point=HOOK)
    x = store.read_rows(np.arange(store.num_rows)).float().reshape(-1, lm.d_model)
    ids = torch.from_numpy(np.array(store.tokens()).reshape(-1))
    with torch.no_grad():
        for feature, token in enumerate(triggers):
            direction = x[ids == token].mean(dim=0)
            scores = x @ direction
            low, high = float(scores[ids == token].min()), float(scores[ids != token].max())
            assert low > high, "the rule cannot be written in this model"
            sae.W_enc[:, feature] = direction
            sae.threshold[feature] = (low + high) / 2
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        sae.W_dec.copy_(_rows(lm, planted)[: len(triggers)])
    return sae


def test_labels_carry_what_a_feature_reads_and_what_it_writes(lm, store, planted, tmp_path) -> None:
    train, test = store.split(0.3)
    ids, counts = np.unique(np.array(store.tokens())[np.asarray(train.mask)], return_counts=True)
    usual = ids[np.argsort(-counts, kind="stable")]
    triggers = [int(token) for token in usual if token > 1 and len(lm.tokenizer.decode([int(token)]).strip()) > 1][:4]
    sae = _rule_sae(store, lm, triggers, planted)
    config = LabelConfig.parse({"num_effect_tokens": 50, "token_change": {"context_len": 8}})
    label_features(sae, train, test=test, lm=lm, out=tmp_path, config=config)
    contexts = FeatureContexts.open(tmp_path / "contexts")
    in_train = np.asarray(train.mask)
    labels = {label.feature: label for label in read_labels(tmp_path)}
    projected, changed = (TokenEffects.open(effects_path(tmp_path, kind)) for kind in ("vocabproj", "tokenchange"))
    tokens = np.array(store.tokens())
    for feature, token in enumerate(triggers):
        assert contexts.firing_count[feature] == int(((tokens == token) & in_train).sum())
        assert all(tokens[c.row, c.position] == token for c in contexts.feature(feature))
        assert token in labels[feature].rule_tokens
        assert _recall(projected.promoted(feature), planted[feature]) == 1
        assert changed.promoted(feature)[0][0] in planted[feature]
        assert labels[feature].promotes
        assert token not in planted[feature]


def test_published_preset_turns_features_up_and_down(lm, store, tmp_path) -> None:
    train, test = store.split(0.3)
    sae = TopKSAE(TopKConfig(d_in=store.d_in, d_sae=12, k=4), hook_point=HOOK)
    config = LabelConfig.parse({"preset": "paper_output_centric", "token_change": {"features": [2, 7]}})
    label_features(sae, train, test=test, lm=lm, out=tmp_path, config=config)
    up, down = (TokenEffects.open(effects_path(tmp_path, kind)) for kind in ("tokenchange", "tokenchange_down"))
    assert up.features.tolist() == down.features.tolist() == [2, 7]
    assert up.promoted_ids.shape == down.suppressed_ids.shape == (2, 10)
    assert (up.strength.tolist(), down.strength.tolist()) == ([10, 10], [-10, -10])
    assert TokenEffects.open(effects_path(tmp_path, "vocabproj")).promoted_ids.shape == (12, 50)
