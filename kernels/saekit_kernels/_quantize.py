"""Rows in eight bits, with a proven bound on what that loses.

A row r is kept as scale * codes + d. For a token x = s q + e and a feature w = t p + d, Cauchy and Schwarz give

    |<x, w> - s t <q, p>| <= ||s q|| ||d|| + ||e|| ||w||

and the sum of two products of one number a token with one a feature is all that a bound on every entry costs. The norms are
rounded up, and a margin for the rounding of float32 sums is added, so that the bound also holds for entries as they are computed.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["int8", "fp8"]

DTYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# Codes of the largest element of a row.
LARGEST: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0}
# Rows from this norm on, or not finite, are not scored: products of two below it stay far from overflow.
MAX_NORM = 1e15
TINY = torch.finfo(torch.float32).tiny


class Quantized(NamedTuple):
    """Rows [R, D] in eight bits; norms are upper bounds. A row that is not scored has zeros.

    codes: [R, D] int8 or float8_e4m3fn.
    scale: [R]; row = scale * codes + rest.
    norm: [R] of the row.
    rest: [R] norm of what the codes leave over.
    is_left_out: [R] bool, the rows that are not scored.
    """

    codes: Tensor
    scale: Tensor
    norm: Tensor
    rest: Tensor
    is_left_out: Tensor


def quantize(rows: Tensor, kind: Kind) -> Quantized:
    """Rows [R, D] of float32 or float64 in eight bits, each with its own scale."""
    d_in = rows.shape[1]
    largest = rows.abs().amax(1, keepdim=True)
    # Relative to the largest element, so that no square over- or underflows.
    relative = rows / torch.where(largest > 0, largest, 1.0)
    scaled = relative * LARGEST[kind]
    codes = (scaled.round() if kind == "int8" else scaled).nan_to_num(0.0).to(DTYPES[kind])
    left = relative - codes.to(rows.dtype) / LARGEST[kind]
    up = round_up(d_in)
    floor = TINY * d_in**0.5
    norm = largest[:, 0] * torch.linalg.vector_norm(relative, dim=1) * up + floor
    rest = largest[:, 0] * torch.linalg.vector_norm(left, dim=1) * up + norm * 2.0**-22
    is_left_out = ~(norm < MAX_NORM)
    scale, norm, rest = (torch.where(is_left_out, 0.0, value) for value in (largest[:, 0] / LARGEST[kind], norm, rest))
    return Quantized(codes, scale, norm, rest, is_left_out)


def round_up(d_in: int) -> float:
    """A factor above the rounding of the norm of d_in elements in float32."""
    return 1.0 + (d_in + 8) * 2.0**-23


def token_margin(tokens: Quantized, kind: Kind) -> Tensor:
    """[N] what a token adds to a bound for each unit of a feature's norm: its own rest, and the rounding of the sums.

    Two float32 sums of D products, the score's and either of those that it is compared with, differ by at most D 2^-24 of the
    norms' product each. Tensor cores add products of 8-bit floats with some 14 bits, 32 products at a time.

    Source: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2 (accumulation of FP8 products on Hopper).
    """
    d_in = tokens.codes.shape[1]
    rounding = (4 * d_in + 16) * 2.0**-24
    if kind == "fp8":
        rounding += (d_in / 32 + 2) * 2.0**-12
    return tokens.rest + rounding * tokens.norm


def feature_bias(bias: Tensor, features: Quantized) -> Tensor:
    """[F] the bias rounded up; +inf for features that are not scored, so that they are always candidates."""
    raised = bias + bias.abs() * 2.0**-20
    return torch.where(features.is_left_out | raised.isnan(), torch.inf, raised)
