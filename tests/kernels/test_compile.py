"""Every Triton kernel compiled for real GPUs, without one: registers, spills, shared memory and tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

_SCRIPT = Path(__file__).parent / "compile_triton.py"
_KERNELS = Path(__file__).parents[2] / "kernels"

# Bytes of shared memory that one program may take.
SHARED_LIMITS = {100: 232_448, 90: 232_448, 80: 166_912}

# Everything for sm_90; for the others, every product kernel, and the kernels that came nearest to their limits.
_PRODUCTS = ["topk_product-bf16-32", "top2_product-bf16", "threshold_product-bf16", "bound_product-int8"]
CASES = {
    100: [*_PRODUCTS, "bound_product-fp8"],
    90: [],
    80: [
        *_PRODUCTS,
        "topk_select-256-65536",
        "threshold_fill",
        "gather_dot-fp32",
        "adam-8192",
    ],
}


@pytest.fixture(scope="module", params=SHARED_LIMITS, ids=lambda capability: f"sm_{capability}")
def compiled(request: pytest.FixtureRequest) -> tuple[int, dict[str, dict[str, Any]]]:
    """Compute capability, and what each kernel's machine code uses, by name of the case."""
    capability = int(request.param)
    cache = request.config.cache
    assert cache is not None
    environment = {**os.environ, "PYTHONPATH": str(_KERNELS), "TRITON_CACHE_DIR": str(cache.mkdir("triton"))}
    # The process of the tests interprets kernels; compiling needs one that does not.
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(_SCRIPT), str(capability), *CASES[capability]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return capability, {result["case"]: result for result in results}


def test_kernels_compile_without_spills_and_within_shared_memory(compiled: Any) -> None:
    capability, results = compiled
    assert set(CASES[capability]) <= set(results)
    assert len(results) >= 5
    spilled = {name: r for name, r in results.items() if r["stack_bytes"] or r["spills"]}
    assert not spilled
    assert not {name: r for name, r in results.items() if r["shared_bytes"] > SHARED_LIMITS[capability]}


def test_products_of_8_and_16_bit_operands_use_the_matrix_units(compiled: Any) -> None:
    _, results = compiled
    products = {name: r for name, r in results.items() if r["is_product"]}
    assert set(_PRODUCTS) <= set(products)
    assert not {name: r for name, r in products.items() if not r["matrix_units"]}


def test_no_kernel_adds_atomically(compiled: Any) -> None:
    _, results = compiled
    assert not {name: r for name, r in results.items() if r["atomics"]}


def test_offsets_of_rows_and_entries_are_of_64_bits(compiled: Any) -> None:
    """N * k, N * d_in, N * d_sae and d_sae * d_in may each be past 2^31; N, d_in and d_sae may not."""
    _, results = compiled
    assert not {name: r for name, r in results.items() if r["narrow_products"]}


@pytest.mark.parametrize(("width", "num_found"), [("i32", 1), ("i64", 0)])
def test_an_offset_that_wraps_is_seen(width: str, num_found: int) -> None:
    from tests.kernels.compile_triton import narrow_products

    ttir = f"""
      %c128_i32 = arith.constant 128 : i32
      %0 = tt.get_program_id x : i32
      %1 = arith.muli %0, %c128_i32 : i32
      %2 = tt.splat %F : {width} -> tensor<128x1x{width}>
      %3 = arith.muli %rows, %2 : tensor<128x1x{width}>
      %4 = tt.addptr %base, %3 : tensor<128x1x!tt.ptr<f32>>, tensor<128x1x{width}>
    """
    assert len(narrow_products(ttir)) == num_found
