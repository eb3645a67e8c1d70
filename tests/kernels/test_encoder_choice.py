"""The two top-k encoders in Triton give the same, and one of them is chosen."""

from typing import Any

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import reference
from saekit_kernels.backend import BackendError
from torch import Tensor

pytest.importorskip("triton")

from saekit_kernels import _encode_choice, _fused_triton


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PRE_ACTS = {
    "random": (lambda: randn(2, 200), 6),
    "ties": (lambda: randn(2, 300).mul(2).round(), 9),
    "all-equal": (lambda: torch.ones(2, 200), 5),
    "three-of-a-group": (lambda: torch.tensor([[0.0] * 64 + [5, 7, 6, 8, 4] + [0.0] * 251]), 4),
    "hidden-tie-before-a-kept-one": (lambda: torch.tensor([[2.0, 2, 2] + [0.0] * 61 + [2.0] + [0.0] * 255]), 3),
    "hidden-tie-after-the-last": (lambda: torch.tensor([[3.0, 2, 2, 2] + [0.0] * 60 + [2.0] * 3 + [0.0] * 253]), 2),
    "winners-in-one-group": (lambda: torch.cat([randn(2, 64), randn(2, 32, seed=1) + 50, randn(2, 224)], 1), 10),
    "last-group-of-one": (lambda: torch.cat([randn(2, 96), torch.full((2, 1), 9.0)], 1), 4),
    "nan-and-inf": (lambda: torch.tensor([[float("nan"), 1, float("inf"), float("nan")] + [-float("inf")] * 316]), 6),
    "one-kept": (lambda: randn(2, 33), 1),
    "all-negative": (lambda: -randn(2, 200).abs() - 1, 5),
}  # fmt: skip


@pytest.mark.parametrize("case", PRE_ACTS)
def test_fused_encoder_selects_what_a_stable_sort_does(device: str, case: str, poisoned_memory: None) -> None:
    make, k = PRE_ACTS[case]
    z = make().to(device)
    # Pre-activations that are exactly z: the tokens are unit vectors, and what is not finite comes with the bias.
    finite = z.nan_to_num(0.0, 0.0, 0.0) if len(z) == 1 else z
    bias = z[0] - finite[0] if len(z) == 1 else torch.zeros(z.shape[1], device=device)
    x = torch.eye(len(z), device=device)
    assert _fused_triton.is_possible(z.shape[1], k)
    found = _fused_triton.topk(x, finite.T.contiguous(), bias, k)
    expected = reference.topk(x, finite.T.contiguous(), bias, k)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].nan_to_num(-1), expected[0].nan_to_num(-1))


@pytest.mark.parametrize(
    "encoder,dtype",
    [("fused", torch.float32), ("fused", torch.bfloat16), ("two-kernel", torch.float32)],
    ids=["fused-float32", "fused-bfloat16", "two-kernel-float32"],
)
def test_forced_encoder_equals_float64(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    encoder: str,
    dtype: torch.dtype,
    make_problem: Any,
    assert_close: Any,
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS_ENCODER", encoder)
    truth = make_problem(3, 17, 131, dtype=dtype)
    mine = truth.to(dtype, device)
    code = sk.encode_topk(mine.x, mine.W_enc_rows.T, mine.b_enc, 5, backend="triton")
    z = truth.x @ truth.W_enc_rows.T + truth.b_enc
    assert_close(code.values, z.topk(5).values.relu(), 3e-6)
    assert_close(z.gather(1, code.indices.cpu()).relu(), code.values, 3e-6)


@pytest.mark.parametrize(
    "value,k,needs",
    [("fused", 4, "k <= d_sae / 32"), ("fastest", 1, "one of fused, two-kernel")],
    ids=["too-many-kept", "unknown"],
)
def test_encoder_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, k: int, needs: str) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS_ENCODER", value)
    with pytest.raises(BackendError, match=f"SAEKIT_KERNELS_ENCODER: '{value}' with d_sae 90 and k {k}, needs {needs}"):
        sk.encode_topk(torch.zeros(2, 3), torch.zeros(3, 90), torch.zeros(90), k, backend="triton")


def test_faster_encoder_is_timed_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def fake(name: str, milliseconds: float) -> None:
        monkeypatch.setitem(_encode_choice._TOPK, name, lambda *operands: timed.append(name) or milliseconds)  # type: ignore[misc]

    fake("two-kernel", 2.0)
    fake("fused", 1.0)
    monkeypatch.setattr(_encode_choice, "_milliseconds", lambda run: run())
    monkeypatch.setattr(_encode_choice, "_chosen", {})
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)

    class OnDevice(Tensor):
        device = torch.device("cuda")

    x, weight = randn(5, 3).as_subclass(OnDevice), randn(320, 3)
    assert [_encode_choice.encoder_for(x, weight, weight[:, 0], 4) for _ in range(2)] == ["fused", "fused"]
    assert sorted(timed) == ["fused", "two-kernel"]
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    assert _encode_choice.encoder_for(x, weight, weight[:, 0], 7) == "two-kernel"
    assert len(timed) == 2
