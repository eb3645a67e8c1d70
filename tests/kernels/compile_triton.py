"""Compiles every Triton kernel for a GPU that is not there and prints what the machine code uses, one JSON object a line.

Run as a script, in a process where Triton does not interpret: python compile_triton.py CAPABILITY [CASE ...]
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from saekit_kernels import _candidates_triton as scoring
from saekit_kernels import _decode_triton as decoding
from saekit_kernels import _encode_triton as encoding
from saekit_kernels import _fused_triton as fused
from saekit_kernels import _optim_triton as optim
from saekit_kernels import _product_triton as products
from saekit_kernels import _threshold_triton as thresholds
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_ALIGNED = [["tt.divisibility", 16]]


# Instructions of the matrix units: mma of 16-bit and 8-bit operands, wgmma of the same and of 8-bit floats, tcgen05, which has
# no integers, for which there is mma.
MATRIX_UNITS = {80: "[HI]MMA", 90: "[HIQ]GMMA", 100: "(UTC[A-Z]MMA|IMMA)"}


class Case(NamedTuple):
    """One kernel with its argument types (pointers aligned, as torch allocates) and constants."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    is_product: bool = False
    needs_capability: int = 80


def cases() -> Iterator[Case]:
    """The kernels at the configurations that the launchers choose for the larger shapes of the bench table."""
    sizes = dict.fromkeys(("N", "F", "D", "num_groups", "num_words"), "i32")
    for dtype, tile in (("bf16", products.HALF_TILE), ("fp32", products.FLOAT_TILE)):
        operands = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "bias_ptr": "*fp32", "z_ptr": "*fp32"}
        blocks = {"BLOCK_N": tile.block_n, "BLOCK_F": tile.block_f, "BLOCK_D": tile.block_d, "UPCAST": False}
        launch = (tile.num_warps, tile.num_stages, dtype != "fp32")
        group_sizes = (8, 32) if dtype == "bf16" else (32,)
        for size in group_sizes:
            types = operands | sizes | {"group_key_ptr": "*i32"}
            constants = blocks | {"GROUP_SIZE": size}
            yield Case(f"topk_product-{dtype}-{size}", encoding.topk_product_fwd_kernel, types, constants, *launch)
        types = operands | sizes | {"key_ptr": "*i32", "lane_ptr": "*i16"}
        yield Case(f"top2_product-{dtype}", fused.top2_product_fwd_kernel, types, blocks, *launch)
        if dtype == "fp32":
            continue
        types = operands | sizes | {"bound_ptr": "*fp32", "bits_ptr": "*i32"}
        yield Case(f"threshold_product-{dtype}", thresholds.threshold_product_fwd_kernel, types, blocks, *launch)
    yield from _candidate_cases(sizes)
    yield from _selection_cases(sizes)
    yield from _sparse_cases()
    yield from _optim_cases()


def _candidate_cases(sizes: dict[str, str]) -> Iterator[Case]:
    names = (
        "bias_ptr",
        "x_scale_ptr",
        "x_size_ptr",
        "x_margin_ptr",
        "weight_scale_ptr",
        "weight_rest_ptr",
        "weight_norm_ptr",
    )
    types = dict.fromkeys((*names, "z_ptr", "scale_ptr", "norm_ptr", "rest_ptr"), "*fp32") | sizes
    types |= {"group_key_ptr": "*i32", "row_ptr": "*bf16", "left_out_ptr": "*i8", "up": "fp32", "floor": "fp32"}
    tile = scoring.BYTE_TILE
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_F": tile.block_f, "BLOCK_D": tile.block_d, "GROUP_SIZE": 8}
    block, num_warps = optim.launch(4096)
    for kind, code, needs in (("int8", "i8", 80), ("fp8", "fp8e4nv", 89)):
        codes = types | dict.fromkeys(("x_ptr", "weight_ptr", "code_ptr"), f"*{code}")
        constants = blocks | {"IS_INTEGER": kind == "int8", "UPCAST": False}
        launch = (tile.num_warps, tile.num_stages, True, needs)
        yield Case(f"bound_product-{kind}", scoring.bound_product_fwd_kernel, codes, constants, *launch)
        constants = {"LARGEST": 127.0, "IS_INTEGER": kind == "int8", "BLOCK": block}
        yield Case(f"quantize-{kind}", scoring.quantize_fwd_kernel, codes, constants, num_warps, needs_capability=needs)


def _selection_cases(sizes: dict[str, str]) -> Iterator[Case]:
    pointers = {
        "z_ptr": "*fp32",
        "group_key_ptr": "*i32",
        "scratch_ptr": "*i32",
        "value_ptr": "*fp32",
        "index_ptr": "*i64",
        "bits_ptr": "*i32",
        "offset_ptr": "*i64",
        "count_ptr": "*i64",
    }
    for k, num_features in ((64, 131072), (256, 65536)):
        constants, num_warps = encoding.selection_launch(num_features, k)
        name = f"topk_select-{k}-{num_features}"
        yield Case(name, encoding.topk_select_fwd_kernel, pointers | sizes, constants, num_warps)
        constants, num_warps = fused.selection_launch(num_features, k)
        types = pointers | sizes | {"key_ptr": "*i32", "lane_ptr": "*i16", "x_ptr": "*bf16", "weight_ptr": "*bf16"}
        types |= {"bias_ptr": "*fp32", "group_ptr": "*i32", "hidden_ptr": "*i32", "out_ptr": "*i64"}
        yield Case(f"top2_select-{k}-{num_features}", fused.top2_select_fwd_kernel, types, constants, num_warps)
    words = {"BLOCK_WORDS": 4096}
    yield Case("threshold_count", thresholds.threshold_count_fwd_kernel, pointers | sizes, words, 4)
    warps = thresholds.fill_warps(words["BLOCK_WORDS"])
    yield Case("threshold_fill", thresholds.threshold_fill_fwd_kernel, pointers | sizes, words, warps)


def _sparse_cases() -> Iterator[Case]:
    blocks = {"BLOCK_E": decoding.BLOCK_ENTRIES, "BLOCK_D": 256}
    split = {"MAX_ENTRIES": decoding.MAX_ENTRIES}
    counts = dict.fromkeys(
        ("order_ptr", "entry_row_ptr", "item_feature_ptr", "item_offset_ptr", "slot_offset_ptr", "hot_ptr"), "*i64"
    )
    for dtype in ("bf16", "fp32"):
        types = counts | {"value_ptr": "*fp32", "index_ptr": "*i64", "offset_ptr": "*i64", "partial_ptr": "*fp32"}
        types |= {"weight_ptr": f"*{dtype}", "row_ptr": f"*{dtype}", "bias_ptr": "*fp32", "out_ptr": f"*{dtype}"}
        types |= {"D": "i32", "F": "i32"}
        summed = blocks | {"HAS_BIAS": True}
        yield Case(f"gather_sum-{dtype}", decoding.gather_sum_fwd_kernel, types, summed, 4)
        yield Case(f"gather_dot-{dtype}", decoding.gather_dot_bwd_kernel, types, blocks, 4)
        yield Case(f"scatter_sum-{dtype}", decoding.scatter_sum_bwd_kernel, types, blocks | split, 4)
    combined = {"BLOCK_I": decoding.BLOCK_ENTRIES, "BLOCK_D": 256}
    yield Case("combine-fp32", decoding.combine_bwd_kernel, types, combined, 4)


def _optim_cases() -> Iterator[Case]:
    types = dict.fromkeys(("weight_ptr", "grad_ptr", "mean_ptr", "square_ptr", "scale_ptr", "out_ptr"), "*fp32")
    types |= {"shadow_ptr": "*bf16", "size": "i64", "length": "i32"}
    types |= dict.fromkeys(("step_size", "beta1", "beta2", "eps", "root_correction"), "fp32")
    for length in (768, 4096, optim.MAX_ROW):
        block, num_warps = optim.launch(length)
        constants = {"IS_UNIT_NORM": True, "HAS_SHADOW": True, "ARE_POINTERS": False, "BLOCK": block}
        yield Case(f"adam-{length}", optim.adam_kernel, types, constants, num_warps)
    constants = {"IS_UNIT_NORM": True, "BLOCK": block}
    yield Case(f"gradient_square-{length}", optim.gradient_square_kernel, types, constants, num_warps)


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    """Registers, stack, shared bytes and instruction counts of the kernel's machine code."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = {(names.index(name),): _ALIGNED for name in names if signature[name] != "constexpr"}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    # RED, and not REDUX: the latter is the sum over a warp.
    kinds = {"matrix_units": MATRIX_UNITS[capability], "spills": "(STL|LDL)", "atomics": "(ATOMG?|REDG?)\\b"}
    instructions = {kind: len(re.findall(rf"\b{name}", code)) for kind, name in kinds.items()}
    return {
        "case": case.name,
        "is_product": case.is_product,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "narrow_products": narrow_products(compiled.asm["ttir"]),
        **instructions,
    }


def narrow_products(ttir: str) -> list[str]:
    """Products of two numbers of 32 bits that are both known at run time only, a row number times a stride say.

    They wrap from 2^31 on. Products with a constant, a program's number times its block, are less than the padded number of rows
    or columns and may be of 32 bits.
    """
    constants = set(re.findall(r"(%[\w-]+) = arith\.constant", ttir))
    splats = re.findall(r"(%[\w-]+) = tt\.splat (%[\w-]+)", ttir)
    constants |= {made for made, value in splats if value in constants}
    found = re.findall(r"arith\.muli (%[\w-]+), (%[\w-]+) : (?:tensor<[\dx]*xi32>|i32)", ttir)
    return [f"{one} * {other}" for one, other in found if not {one, other} & constants]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile the named cases, or all, for the compute capability given."""
    capability, wanted = int(sys.argv[1]), sys.argv[2:]
    for case in cases():
        if case.needs_capability <= capability and (not wanted or case.name in wanted):
            print(json.dumps(compile_case(case, capability)), flush=True)  # noqa: T201 - read by the test


if __name__ == "__main__":
    main()
