"""What a dictionary reads, captured from any model: its sites, sides and steps are looked up, not asked for."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from saekit.errors import ConfigError, ModelError
from saekit.models import LanguageModel
from saekit.models import capture as capture_hidden
from saekit.sae import SAE, MultiLayerDictionary, Site
from saekit.sae.places import sites_in
from saekit.splice.model import Located, as_language_model, locate

__all__ = ["capture", "read"]

Model = nn.Module | LanguageModel
"""A transformers model, or what `load_model` returns."""


@overload
def capture(
    model: Model | Sequence[Model], tokens: Tensor | str, what: SAE, *, attention_mask: Tensor | None = None
) -> Tensor: ...
@overload
def capture(
    model: Model | Sequence[Model], tokens: Tensor | str, what: Sequence[str], *, attention_mask: Tensor | None = None
) -> dict[str, Tensor]: ...
def capture(
    model: Model | Sequence[Model],
    tokens: Tensor | str,
    what: SAE | Sequence[str],
    *,
    attention_mask: Tensor | None = None,
) -> Tensor | dict[str, Tensor]:
    """Returns what a dictionary reads in the model, or the hidden states at hook points; one forward without gradients.

    For a dictionary, module and side, the step that its release implies (a norm without its gain, centred writing weights)
    and the model's own prefix of module paths are found from `what`; the result goes into `what.encode` as it is.

    The first position is returned like any other. Most releases were trained with a BOS token in front
    (`sae.source["prepend_bos"]`, where the release says) and many without its activation, whose norm can be a hundred times
    the others'; leave it out of averages by `x[:, 1:]`.

    Args:
        model: a transformers model or what `load_model` returns; for a crosscoder that compares models, one of each in the
            order of its layers.
        tokens: `[B, T]` token ids; or one text, for a model that has its tokenizer, with BOS where the release says so, and
            where it says nothing as the tokenizer does.
        what: a dictionary; or hook points, `<module path>` or `<module path>:input`.
        attention_mask: `[B, T]`, 1 for tokens and 0 for padding; None: no padding.

    Returns:
        `[B, T, d_in]`, or `[B, T, L, d_in]` for a dictionary of several layers, on its device; of hook points, a mapping from
        each to `[B, T, D]`. Values are the model's, bit for bit, in its dtype; float32 after a step.

    Raises:
        ConfigError: the dictionary does not say where it reads, or is of another width or number of models.
        HookPointError: the model has no such module, or no hidden states there.
        ModelError: not a transformers model, text without a tokenizer, or tokens that the model cannot take.
    """
    models = [as_language_model(one) for one in (model if isinstance(model, Sequence) else [model])]
    if not isinstance(what, SAE):
        if len(models) != 1:
            raise ConfigError(f"capture: {len(models)} models at hook points, needs one")
        return capture_hidden(models[0], _ids(models[0], tokens, None), what, attention_mask=attention_mask)
    sites = sites_in(what)
    if len(models) != num_models(what):
        raise ConfigError(
            f"capture: {len(models)} models for a dictionary of {num_models(what)}, needs one for each, in a list"
        )
    ids = _ids(models[0], tokens, what.source.get("prepend_bos"))
    found = [
        part
        for one, its_sites in zip(models, [sites] if len(models) == 1 else [(site,) for site in sites], strict=True)
        for part in _capture(one, ids, its_sites, attention_mask)
    ]
    for site, part in zip(sites, found, strict=True):
        if part.shape[-1] != what.d_in:
            raise ConfigError(
                f"capture: {models[0].name!r} has width {part.shape[-1]} at {str(site)!r}, the dictionary needs {what.d_in};"
                " is this the model that it was made for?"
            )
    device = what.b_dec.device
    if isinstance(what, MultiLayerDictionary) or len(sites) > 1:
        return torch.stack([part.to(device) for part in found], dim=-2)
    return found[0].to(device)


def num_models(sae: SAE) -> int:
    """Returns how many models the dictionary reads: more than one where its layers are one place in several."""
    if not isinstance(sae, MultiLayerDictionary) or sae.cfg.num_layers_in == 1:
        return 1
    return sae.cfg.num_layers_in if len(set(map(str, sites_in(sae)))) == 1 else 1


def read(place: Located, hidden: Tensor) -> Tensor:
    """Returns what a dictionary reads of the hidden states at its place; steps are computed in float32."""
    if place.site.transform == "none":
        return hidden
    return place.site.values(hidden.float(), place.module)


def _capture(lm: LanguageModel, ids: Tensor, sites: Sequence[Site], attention_mask: Tensor | None) -> list[Tensor]:
    places = [locate(lm, site) for site in sites]
    found = capture_hidden(lm, ids, [str(place.site) for place in places], attention_mask=attention_mask)
    return [read(place, found[str(place.site)]) for place in places]


def _ids(lm: LanguageModel, tokens: Tensor | str, prepend_bos: object) -> Tensor:
    if isinstance(tokens, Tensor):
        return tokens
    if prepend_bos is None:
        ids = lm.tokenizer(tokens)["input_ids"]
    else:
        ids = lm.tokenizer(tokens, add_special_tokens=False)["input_ids"]
        bos = lm.tokenizer.bos_token_id
        if prepend_bos and bos is None:
            raise ModelError(f"text: the dictionary needs a BOS token, {lm.name!r} has none; pass token ids")
        ids = [bos, *ids] if prepend_bos else ids
    return torch.tensor([ids])
