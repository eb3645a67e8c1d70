"""A language model that has learnt nothing: its own weights' places filled with noise, for controls.

Source: Heap et al. 2025 (Sparse autoencoders can interpret randomly initialized transformers), "re-randomized" models.
"""

import hashlib
from typing import Literal

import torch
from torch import nn

__all__ = ["RandomWeights", "randomise_weights"]

RandomWeights = Literal["all", "all_but_embeddings"]


def randomise_weights(model: nn.Module, what: RandomWeights, *, seed: int) -> None:
    """Replaces each parameter by normal noise of its own mean and standard deviation, in place; the same on every machine.

    So the scales at which the model works stay what training made them, and nothing else of it does. Entries that were all equal
    stay so.

    Args:
        what: `all_but_embeddings` keeps the input and output embedding, and with them what a token means by itself.
    """
    kept: set[int] = set()
    if what == "all_but_embeddings":
        for name in ("get_input_embeddings", "get_output_embeddings"):
            module = getattr(model, name, lambda: None)()
            kept |= {id(parameter) for parameter in module.parameters()} if isinstance(module, nn.Module) else set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in kept:
                continue
            key = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
            values = parameter.detach().float()
            noise = torch.randn(parameter.shape, generator=generator).to(values.device)
            parameter.copy_(values.mean() + noise * values.std(correction=0))
