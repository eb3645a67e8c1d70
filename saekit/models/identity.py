"""What makes a model or a tokenizer the same one: hashes that hold across processes, devices and folders."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from saekit.models.tokens import Tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["model_fingerprint", "tokenizer_fingerprint"]

# What a config says about where it came from rather than about the function it describes.
_BOOKKEEPING = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "use_cache",
    }
)
_NUM_SAMPLED = 1024
_PROBE_TEXT = "A river, 27 hills."


def model_fingerprint(model: nn.Module) -> str:
    """Returns the identity of a transformers model's weights and config, 64 hex digits.

    Covers the class, the config's non-default values (its origin, the library's version and cache settings left out) and,
    for every entry of the state dict in name order: name, shape, dtype, a 64-bit sum over all of its bytes and 1,024
    evenly spaced elements. Any single changed weight changes it, and so does the dtype.
    """
    digest = hashlib.sha256(_canonical([type(model).__name__, _config_values(model)]))
    # A tied head is the embedding under a second name.
    seen: dict[tuple[int, torch.Size], bytes] = {}
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen:
            seen[place] = _tensor_digest(tensor)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + seen[place])
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Returns the identity of a tokenizer, 64 hex digits: its rules, vocabulary, special ids, and what it makes of a probe."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: object
    if backend is not None:
        rules = json.loads(backend.to_str())
        assert isinstance(rules, dict)
        # State of the last call, not rules of the tokenizer.
        rules.pop("padding", None)
        rules.pop("truncation", None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    probe = tokenizer(_PROBE_TEXT)["input_ids"]
    return hashlib.sha256(_canonical([rules, special, probe])).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def _config_values(model: nn.Module) -> dict[str, object]:
    return _without_bookkeeping(cast("PretrainedConfig", model.config).to_diff_dict())


def _without_bookkeeping(values: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _without_bookkeeping(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in _BOOKKEEPING
    }


def _tensor_digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if flat.numel() == 0:
        return b""
    places = torch.linspace(0, flat.numel() - 1, min(_NUM_SAMPLED, flat.numel()), dtype=torch.float64).long()
    sample = flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    as_bytes = flat.contiguous().view(torch.uint8)
    whole = as_bytes.numel() // 8 * 8
    # Integer addition modulo 2^64 gives the same sum in every order, so on every device and thread count.
    if as_bytes.device.type == "cpu":
        # 20 times faster than torch's integer sum on a CPU (134M float32 parameters: 0.1 s).
        total = int(as_bytes[:whole].numpy().view(np.uint64).sum(dtype=np.uint64))
    else:
        aligned = as_bytes[:whole].clone() if as_bytes.storage_offset() % 8 else as_bytes[:whole]
        total = int(aligned.view(torch.int64).sum()) % 2**64
    return total.to_bytes(8, "little") + as_bytes[whole:].cpu().numpy().tobytes() + sample
