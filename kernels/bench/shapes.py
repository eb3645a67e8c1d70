"""The one table of shapes: what is measured, and what is tested."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One encode and decode: N tokens of width d_in, d_sae features, k of them kept per token."""

    name: str
    num_tokens: int
    d_in: int
    d_sae: int
    k: int


# SmolLM2-135M's width; the first is the quickstart's.
CPU_SHAPES = (
    Shape("cpu-small", 2048, 576, 4608, 32),
    Shape("cpu-large", 4096, 576, 18432, 32),
)

# GPT-2 small, Gemma 2 2B, Llama 3 8B and a wide dictionary of GPT-2 small.
GPU_SHAPES = (
    Shape("gpt2-24k", 8192, 768, 24576, 32),
    Shape("gemma2-2b-65k", 8192, 2304, 65536, 64),
    Shape("llama3-8b-131k", 8192, 4096, 131072, 64),
    Shape("gpt2-131k", 16384, 768, 131072, 32),
)

# Small enough for an interpreter, and awkward: nothing divides anything.
TEST_SHAPES = (
    Shape("odd", 9, 17, 43, 5),
    Shape("one-token", 1, 33, 38, 3),
    Shape("one-feature-kept", 5, 8, 40, 1),
    Shape("all-features-kept", 3, 5, 37, 37),
    Shape("one-column", 4, 1, 34, 2),
    Shape("one-feature", 4, 7, 1, 1),
)
