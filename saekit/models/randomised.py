"""A language model that has learnt nothing: its own weights' places filled with noise, for controls.

No re-initialisation: each parameter tensor gets independent normal noise of its own mean and (population) standard deviation, norms
and biases too. `all` does so to the embeddings as well, which leaves nothing of what a token means; `all_but_embeddings` keeps input
and output embedding. A tied embedding is one tensor, and so is randomised, or kept, once.

Source: the idea, and noise of equal mean and deviation for each parameter, are those of Heap et al. 2025 (arXiv 2501.17727; "re-randomized"
models, with and without embeddings). Read from a public copy of their code, which keeps the embeddings unless told otherwise, whereas
`controls.random_weights` of a recipe randomises all. Their controls of a model at step 0 and of random embeddings alone are not here,
and their figures were not reproduced.
"""

import hashlib
from typing import Literal

import torch
from torch import nn

__all__ = ["RandomWeights", "randomise_weights"]

RandomWeights = Literal["all", "all_but_embeddings"]


def randomise_weights(model: nn.Module, what: RandomWeights, *, seed: int) -> None:
    """Replaces each parameter by normal noise of its own mean and standard deviation, in place; the same on every machine.

    So each tensor's scale stays what training made it, and nothing else of it does. Entries that were all equal stay so; the scales of
    activations are not kept, as they rest on more than two moments.

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
