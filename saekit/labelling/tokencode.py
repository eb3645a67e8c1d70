"""What a dictionary makes of tokens that are in no store: a prompt, or a sentence that somebody wrote."""

import torch
from torch import Tensor

from saekit.models import LanguageModel, Tokenizer, adds_bos, capture
from saekit.sae import SAE, SitesSAE
from saekit.sae.batch import token_code

__all__ = ["code_of_tokens", "opening", "token_ids"]


def code_of_tokens(lm: LanguageModel, sae: SAE, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (acts, indices), [B, T, K] each, of a forward over tokens [B, T]; what follows a token does not matter to it.

    Args:
        sae: says where it reads.
    """
    assert sae.hook_point is not None, "checked by the caller"
    reads = list(sae.hook_points) if isinstance(sae, SitesSAE) else [sae.hook_point]
    found = capture(lm, tokens, reads)
    x = torch.cat([found[name] for name in reads], dim=-1).flatten(0, 1)
    with torch.no_grad():
        acts, indices = token_code(sae, x.to(sae.W_enc.device, sae.W_enc.dtype))
    return acts.reshape(*tokens.shape, -1), indices.reshape(*tokens.shape, -1)


def opening(tokenizer: Tokenizer) -> list[int]:
    """Returns what stands before a text as before documents in a store: BOS where the tokenizer puts it, else EOS, else nothing.

    Models keep their attention sink at the first position, which so is no part of the text.
    """
    first = tokenizer.bos_token_id if adds_bos(tokenizer) else tokenizer.eos_token_id
    return [] if first is None else [first]


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the tokens of a text alone."""
    return [int(str(token)) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
