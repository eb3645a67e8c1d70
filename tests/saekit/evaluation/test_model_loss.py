"""Model loss against manual forwards with the model's own logits, and the values it must take by construction."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.errors import ModelError, NonFiniteError
from saekit.evaluation import model_loss
from saekit.evaluation.bootstrap import Resampled, Sums
from saekit.evaluation.model_loss import LOSS_METRICS, model_loss_sums
from saekit.evaluation.nulls import mean_candidate, sae_candidate
from saekit.evaluation.reconstruction import Candidate, Reconstruction
from saekit.evaluation.selection import LossRows
from saekit.models import LanguageModel, capture
from saekit.sae import SAE

CPU = torch.device("cpu")
HOOK_POINTS = {"llama": "model.layers.1", "gpt2": "transformer.h.1", "gemma2": "model.layers.1"}


def _rows(lm: LanguageModel, *, num_rows: int = 5, context_len: int = 12, padded: bool = False) -> LossRows:
    """Random tokens of three documents; a seventh of the positions is kept, some rows end in padding."""
    rng = np.random.default_rng(0)
    shape = (num_rows, context_len)
    is_padding = np.zeros(shape, dtype=bool)
    if padded:
        is_padding[1::2, -4:] = True
    is_replaced = (rng.random(shape) > 1 / 7) & ~is_padding
    is_counted = is_replaced & (rng.random(shape) > 0.3)
    is_counted[:, -1] = False
    is_counted[:, :-1] &= ~is_padding[:, 1:]
    return LossRows(
        tokens=rng.integers(2, lm.vocab_size, shape).astype(np.int32),
        is_replaced=is_replaced,
        is_counted=is_counted,
        is_padding=is_padding,
        documents=np.where(is_counted, rng.integers(0, 3, shape), 0),
    )


@torch.no_grad()
def _greedy(lm: LanguageModel, rows: LossRows) -> LossRows:
    """Rows that the model itself goes on with, so that knocking it out can only cost."""
    tokens = torch.from_numpy(rows.tokens).long()[:, :1]
    for _ in range(rows.tokens.shape[1] - 1):
        tokens = torch.cat([tokens, lm.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return replace(rows, tokens=tokens.numpy().astype(np.int32))


def _candidates(sae: SAE, lm: LanguageModel, rows: LossRows, hook_point: str) -> list[Candidate]:
    hidden = capture(lm, torch.from_numpy(rows.tokens).long(), [hook_point])[hook_point]
    mean = hidden[torch.from_numpy(rows.is_replaced)].double().mean(0)
    identity = Candidate(name="identity", title="identity", reconstruct=Reconstruction)
    return [sae_candidate(sae), mean_candidate(mean), identity]


def _measured(lm: LanguageModel, rows: LossRows, candidates: list[Candidate], hook_point: str, **options: int):
    return model_loss_sums(
        lm, hook_point, rows, candidates, batch_sequences=options.get("batch_sequences", 2), device=CPU
    )


def _values(sums: Sums) -> dict[str, float | None]:
    resampled = Resampled.of(sums, 0, seed=0)
    return {name: resampled.figure(statistic).value for name, statistic in LOSS_METRICS.items()}


@torch.no_grad()
def _manual_logits(
    lm: LanguageModel, rows: LossRows, hook_point: str, change: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Full logits of one forward of the whole set of rows, with a plain torch hook."""

    def hook(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        hidden = (output if isinstance(output, Tensor) else output[0]).clone()
        where = torch.from_numpy(rows.is_replaced)
        for row in range(len(hidden)):
            for position in torch.nonzero(where[row])[:, 0]:
                hidden[row, position] = change(hidden[row, position][None])[0]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handles = [] if change is None else [lm.model.get_submodule(hook_point).register_forward_hook(hook)]
    mask = torch.from_numpy(~rows.is_padding).long()
    logits = lm.model(torch.from_numpy(rows.tokens).long(), attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    return logits.double()


def _manual_sums(
    lm: LanguageModel, rows: LossRows, hook_point: str, change: Callable[[Tensor], Tensor] | None
) -> tuple[list[float], list[float]]:
    clean = _manual_logits(lm, rows, hook_point, None).log_softmax(-1)
    patched = _manual_logits(lm, rows, hook_point, change).log_softmax(-1)
    ce, kl = [0.0] * 3, [0.0] * 3
    for row, position in zip(*np.nonzero(rows.is_counted), strict=True):
        document = rows.documents[row, position]
        ce[document] -= float(patched[row, position, rows.tokens[row, position + 1]])
        kl[document] += float((clean[row, position].exp() * (clean - patched)[row, position]).sum())
    return ce, kl


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_model_loss_sums_equal_a_manual_forward(
    tiny_lm: Callable[[str], LanguageModel], tiny_sae: SAE, family: str, padded: bool
) -> None:
    lm = tiny_lm(family)
    hook_point = HOOK_POINTS[family]
    rows = _rows(lm, padded=padded)
    candidates = _candidates(tiny_sae, lm, rows, hook_point)
    found = _measured(lm, rows, candidates, hook_point)
    for candidate in candidates:
        ce, kl = _manual_sums(lm, rows, hook_point, lambda x, c=candidate: c.reconstruct(x).x_hat.float())
        np.testing.assert_allclose(found[candidate.name]["ce"], ce, rtol=1e-4)
        np.testing.assert_allclose(found[candidate.name]["kl"], kl, rtol=1e-3, atol=1e-4)
    clean_ce, _ = _manual_sums(lm, rows, hook_point, None)
    zero_ce, zero_kl = _manual_sums(lm, rows, hook_point, torch.zeros_like)
    np.testing.assert_allclose(found["sae"]["ce_clean"], clean_ce, rtol=1e-4)
    np.testing.assert_allclose(found["sae"]["ce_zero"], zero_ce, rtol=1e-4)
    np.testing.assert_allclose(found["sae"]["kl_zero"], zero_kl, rtol=1e-3)
    np.testing.assert_array_equal(found["sae"]["ce_mean"], found["mean"]["ce"])
    assert found["sae"]["positions"].sum() == rows.is_counted.sum()
    assert sum(zero_kl) > 1.0, "the ablation must matter for this test to mean something"


def test_identity_loses_nothing_and_mean_recovers_nothing(
    tiny_lm: Callable[[str], LanguageModel], tiny_sae: SAE
) -> None:
    lm = tiny_lm("llama")
    rows = _greedy(lm, _rows(lm))
    found = _measured(lm, rows, _candidates(tiny_sae, lm, rows, "model.layers.1"), "model.layers.1")
    identity, mean = _values(found["identity"]), _values(found["mean"])
    assert identity["delta_ce"] == 0.0
    assert identity["kl"] == pytest.approx(0.0, abs=1e-6)
    assert [identity[f"{m}_recovered_{a}"] for m in ("ce", "kl") for a in ("zero", "mean")] == pytest.approx([1.0] * 4)
    assert mean["ce_recovered_mean"] == 0.0
    assert mean["kl_recovered_mean"] == 0.0


def test_loss_metrics_equal_their_formulas() -> None:
    one = {
        "positions": 10,
        "ce_clean": 30,
        "ce_zero": 90,
        "ce_mean": 60,
        "kl_zero": 50,
        "kl_mean": 25,
        "ce": 36,
        "kl": 5,
    }
    found = _values({name: np.array([value / 4, value * 3 / 4]) for name, value in one.items()})
    assert found == pytest.approx(
        {
            "ce": 3.6,
            "delta_ce": 0.6,
            "ce_recovered_zero": 54 / 60,
            "ce_recovered_mean": 24 / 30,
            "kl": 0.5,
            "kl_recovered_zero": 0.9,
            "kl_recovered_mean": 0.8,
        }
    )


def test_recovered_is_none_when_the_ablation_costs_nothing() -> None:
    one = {"positions": 10, "ce_clean": 30, "ce_zero": 30, "ce_mean": 29, "kl_zero": 0, "kl_mean": 0, "ce": 36, "kl": 5}
    found = _values({name: np.array([float(value)]) for name, value in one.items()})
    for name in ("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean"):
        assert found[name] is None


@pytest.mark.parametrize("batch_sequences", [1, 3, 100])
@pytest.mark.parametrize("block_bytes", [1, 2**26], ids=["a position", "all positions"])
def test_model_loss_sums_do_not_depend_on_batches_or_blocks(
    tiny_lm: Callable[[str], LanguageModel],
    tiny_sae: SAE,
    monkeypatch: pytest.MonkeyPatch,
    batch_sequences: int,
    block_bytes: int,
) -> None:
    lm = tiny_lm("llama")
    rows = _rows(lm)
    candidates = _candidates(tiny_sae, lm, rows, "model.layers.1")
    one = _measured(lm, rows, candidates, "model.layers.1")["sae"]
    monkeypatch.setattr(model_loss, "_BLOCK_BYTES", block_bytes)
    other = _measured(lm, rows, candidates, "model.layers.1", batch_sequences=batch_sequences)["sae"]
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-4)


@pytest.mark.parametrize("hook_point", ["model.layers.1.mlp", "model.layers.2:input", "model.layers.2"])
def test_model_loss_sums_take_any_hook_point(
    tiny_lm: Callable[[str], LanguageModel], tiny_sae: SAE, hook_point: str
) -> None:
    lm = tiny_lm("llama")
    rows = _rows(lm)
    found = _measured(lm, rows, _candidates(tiny_sae, lm, rows, hook_point), hook_point)
    # The input of layer 2 is the output of layer 1.
    manual_at = "model.layers.1" if hook_point.endswith(":input") else hook_point
    ce, kl = _manual_sums(lm, rows, manual_at, lambda x: tiny_sae(x).x_hat)
    np.testing.assert_allclose(found["sae"]["ce"], ce, rtol=1e-4)
    np.testing.assert_allclose(found["sae"]["kl"], kl, rtol=1e-3)


def test_model_loss_sums_see_a_hook_point_behind_the_final_norm(
    tiny_lm: Callable[[str], LanguageModel], tiny_sae: SAE
) -> None:
    lm = tiny_lm("llama")
    rows = _rows(lm)
    found = _measured(lm, rows, _candidates(tiny_sae, lm, rows, "model.norm"), "model.norm")
    ce, _ = _manual_sums(lm, rows, "model.norm", lambda x: tiny_sae(x).x_hat)
    np.testing.assert_allclose(found["sae"]["ce"], ce, rtol=1e-4)


def test_model_loss_sums_need_no_unembedding(
    tiny_lm: Callable[[str], LanguageModel], tiny_sae: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("gpt2")
    rows = _rows(lm)
    candidates = _candidates(tiny_sae, lm, rows, "transformer.h.1")
    expected = _measured(lm, rows, candidates, "transformer.h.1")["sae"]

    def refuse(_lm: LanguageModel) -> None:
        raise ModelError("unembedding: unknown family")

    monkeypatch.setattr(model_loss, "find_unembedding", refuse)
    found = _measured(lm, rows, candidates, "transformer.h.1")["sae"]
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


def test_kl_is_never_negative(tiny_lm: Callable[[str], LanguageModel]) -> None:
    """Changes at the edge of float32 give differences of both signs; the KL of each document is still at least 0."""
    lm = tiny_lm("llama")
    rows = _rows(lm)
    mean = mean_candidate(torch.zeros(32, dtype=torch.float64))
    nearly = Candidate(name="nearly", title="nearly", reconstruct=lambda x: Reconstruction(x * (1 + 1e-6)))
    found = _measured(lm, rows, [mean, nearly], "model.layers.1")["nearly"]
    assert (found["kl"] >= 0).all()
    assert found["kl"].sum() < 1e-3


def test_model_loss_leaves_no_hook_behind(tiny_lm: Callable[[str], LanguageModel], tiny_sae: SAE) -> None:
    lm = tiny_lm("llama")
    rows = _rows(lm)
    _measured(lm, rows, _candidates(tiny_sae, lm, rows, "model.layers.1"), "model.layers.1")
    for module in lm.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_model_loss_sums_raise_when_the_loss_is_not_finite(tiny_lm: Callable[[str], LanguageModel]) -> None:
    lm = tiny_lm("llama")
    mean = mean_candidate(torch.full((32,), torch.nan, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="loss under 'mean' is NaN or Inf"):
        _measured(lm, _rows(lm), [mean], "model.layers.1")
