"""No op has an array of all tokens by all features in memory, forward or backward: peaks as the allocator saw them."""

from collections.abc import Callable
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import _batch, _candidates, _dense
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the allocator that is watched is the CPU's")

NUM_TOKENS, D_IN, D_SAE, K = 48, 8, 500, 2
DENSE_BYTES = 4 * NUM_TOKENS * D_SAE


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that were allocated at once beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch, small_chunks: None) -> None:
    """Parts that are small beside this test's arrays, as they are beside those of a training."""
    monkeypatch.setattr(_batch, "SAMPLE_TOKENS", 2)
    monkeypatch.setattr(_candidates, "CANDIDATES_PER_ENTRY", 3)
    monkeypatch.setattr(_dense, "BLOCK_ROWS", 4)


def encode_threshold(problem: Any, backend: Any) -> Tensor:
    threshold = torch.full((len(problem.b_enc),), 2.5, device=problem.x.device)
    code = sk.encode_threshold(problem.x, problem.W_enc_rows.T, problem.b_enc, threshold, backend=backend)
    return sk.decode(code.pre_acts, code.indices, problem.W_dec, problem.b_dec, offsets=code.offsets, backend=backend)


def encode_batch_topk(problem: Any, backend: Any) -> Tensor:
    code = sk.encode_batch_topk(problem.x, problem.W_enc_rows.T, problem.b_enc, K, backend=backend)
    return sk.decode(code.values, code.indices, problem.W_dec, problem.b_dec, offsets=code.offsets, backend=backend)


def encode_topk(problem: Any, backend: Any, candidates: Any = None) -> Tensor:
    code = sk.encode_topk(problem.x, problem.W_enc_rows.T, problem.b_enc, K, candidates=candidates, backend=backend)
    return sk.decode(code.values, code.indices, problem.W_dec, problem.b_dec, backend=backend)


def encode_fused(problem: Any, backend: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAEKIT_KERNELS_ENCODER", "fused")
        return encode_topk(problem, backend)


def auxk(problem: Any, backend: Any) -> Tensor:
    return sk.auxk(problem.x, problem.W_enc_rows.T, problem.b_enc, problem.W_dec, K, backend=backend)


OPS: dict[str, Callable[[Any, Any], Tensor]] = {
    "topk": encode_topk,
    "topk-int8": lambda problem, backend: encode_topk(problem, backend, "int8"),
    "topk-fp8": lambda problem, backend: encode_topk(problem, backend, "fp8"),
    "batch-topk": encode_batch_topk,
    "threshold": encode_threshold,
    "auxk": auxk,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cpu", "compiled"], indirect=True)
def test_no_op_makes_an_array_of_all_tokens_by_all_features(backend: Any, op: str, make_problem: Any) -> None:
    problem = make_problem(NUM_TOKENS, D_IN, D_SAE).to(torch.float32)
    OPS[op](problem, backend)
    assert peak_bytes(lambda: OPS[op](problem, backend).square().sum().backward()) < 0.75 * DENSE_BYTES


@pytest.mark.parametrize("op", OPS)
def test_reference_makes_one(op: str, make_problem: Any) -> None:
    """What is watched for is seen where it is."""
    problem = make_problem(NUM_TOKENS, D_IN, D_SAE).to(torch.float32)
    assert peak_bytes(lambda: OPS[op](problem, "reference").square().sum().backward()) > DENSE_BYTES / 2


# The profiler sees every step of the interpreter, so that in Triton single arrays are looked at, of fewer tokens.
@pytest.mark.parametrize("op", ["topk", "topk-fused", "topk-int8", "threshold"])
def test_no_array_in_triton_is_of_all_tokens_by_all_features(
    device: str, op: str, make_problem: Any, operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from saekit_kernels import _product_triton

    monkeypatch.setattr(_product_triton, "_CHUNK_ROWS_STEP", 2)
    num_tokens, d_sae = 7, 96
    problem = make_problem(num_tokens, 2, d_sae).to(torch.float32, device)
    with operators() as seen:
        (OPS | {"topk-fused": encode_fused})[op](problem, "triton").square().sum().backward()
    assert seen.num_bytes < 4 * num_tokens * d_sae / 2


@pytest.mark.parametrize("backend", ["cpu", "compiled", "triton"], indirect=True)
def test_auxk_of_many_features_a_token_is_dense_in_blocks_alone(
    backend: Any, device: str, make_problem: Any, operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens, d_sae, k = 12, 100, 20
    if backend == "triton":
        from saekit_kernels import _decode_triton

        monkeypatch.setattr(_decode_triton, "MIN_DENSITY", 0.01)
    problem = make_problem(num_tokens, 4, d_sae).to(torch.float32, device)
    with operators() as seen:
        sk.auxk(problem.x, problem.W_enc_rows.T, problem.b_enc, problem.W_dec, k, backend=backend).sum().backward()
    assert seen.num_bytes < 4 * num_tokens * d_sae / 2
