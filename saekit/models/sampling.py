"""Text that a model writes on, token by token, while hooks of `replace` and `add` are at work in it."""

import inspect
from collections.abc import Generator

import torch
from torch import Tensor

from saekit.models.load import LanguageModel

__all__ = ["continuations"]


def continuations(lm: LanguageModel, tokens: Tensor, uniforms: Tensor, *, temperature: float) -> Tensor:
    """Returns the tokens that the model writes after each row, each drawn by a number of its own, int64 [B, n].

    A row's tokens depend on its own row of `uniforms` alone, and on the model's logits, whose last bits may differ with the number
    of rows. After the first forward hooks see one position at a time, where the model has a cache of keys and values.

    Args:
        tokens: the rows so far, [B, T], without padding.
        uniforms: numbers in [0, 1), float64 [B, n]; each picks where it falls in the distribution's cumulated sum.
        temperature: divides the logits; 0: the likeliest token, whatever `uniforms` says.
    """
    ids = tokens.to(device=lm.device, dtype=torch.int64)
    steps = uniforms.to(lm.device).T
    written: list[Tensor] = []
    with torch.no_grad():
        next_logits = _stepping(lm, ids)
        logits = next(next_logits)
        for number, draws in enumerate(steps):
            written.append(_drawn(logits, draws, temperature))
            if number + 1 < len(steps):
                logits = next_logits.send(written[-1])
    return torch.stack(written, dim=1)


def _stepping(lm: LanguageModel, ids: Tensor) -> Generator[Tensor, Tensor, None]:
    """Yields the logits after the last token [B, V]; is sent the tokens that come next."""
    # Renamed in transformers 5.24; the old name goes in 5.40.
    name = "cache" if "cache" in inspect.signature(lm.model.forward).parameters else "past_key_values"
    output = lm.model(input_ids=ids, use_cache=True, return_dict=True)
    while True:
        token = (yield output.logits[:, -1])[:, None]
        ids = torch.cat([ids, token], dim=1)
        cache = getattr(output, name, None)
        known: dict[str, object] = {"input_ids": ids} if cache is None else {"input_ids": token, name: cache}
        output = lm.model(**known, use_cache=True, return_dict=True)


def _drawn(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulated = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    picked = torch.searchsorted(cumulated, (draws * cumulated[:, -1])[:, None].contiguous(), right=True)[:, 0]
    return picked.clamp_max(logits.shape[-1] - 1)
