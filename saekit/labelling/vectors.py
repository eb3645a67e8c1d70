"""Embedding vectors as a server sends them and as the ledger keeps them."""

import base64
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from saekit.labelling.answers import whole_number
from saekit.labelling.chat import ChatReply

__all__ = ["pack_vectors", "read_embeddings", "unpack_vectors"]


def pack_vectors(vectors: NDArray[np.float32]) -> str:
    """Returns vectors [n, D] at unit length as text: half precision, which moves a cosine by less than 0.001."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return f"{len(unit)}:" + base64.b64encode(unit.astype("<f2").tobytes()).decode()


def unpack_vectors(text: str) -> NDArray[np.float32]:
    """Returns what `pack_vectors` wrote."""
    rows, _, data = text.partition(":")
    return np.frombuffer(base64.b64decode(data), dtype="<f2").reshape(int(rows), -1).astype(np.float32)


def read_embeddings(body: Mapping[str, JsonValue], num: int, *, most_input: int) -> ChatReply | None:
    """Returns the answer to a request for `num` embeddings, in any order; None where they are not all there.

    Args:
        most_input: tokens to assume where it does not say what was charged.
    """
    listed = body.get("data")
    found = {
        whole_number(item.get("index")): item.get("embedding")
        for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, dict)
    }
    try:
        vectors = np.array([found[number] for number in range(num)], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        return None
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        return None
    usage = body.get("usage")
    charged = whole_number(usage.get("prompt_tokens")) if isinstance(usage, dict) else None
    return ChatReply(
        text=pack_vectors(vectors),
        finish_reason="stop",
        input_tokens=most_input if charged is None else charged,
        output_tokens=0,
        is_estimated=charged is None,
    )
