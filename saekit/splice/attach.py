"""Dictionaries put into a running model by plain forward hooks: observed, in the place of activations, or beside their error."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.models import LanguageModel, replace
from saekit.sae import SAE, MultiLayerDictionary
from saekit.sae.places import sites_in, sites_out
from saekit.splice.attached import Attached, Edit, LayersAttached, SingleAttached
from saekit.splice.capture import Model, num_models, read
from saekit.splice.model import Located, as_language_model, locate

__all__ = ["Mode", "attach"]

Mode = Literal["replace", "replace_with_error", "observe"]
"""What becomes of the hidden states where the dictionary writes."""


@contextlib.contextmanager
def attach(model: Model, sae: SAE, mode: Mode = "replace", *, edit: Edit | None = None) -> Iterator[Attached]:
    """Inside the block, every forward of the model runs through the dictionary; the hooks are gone after it, errors included.

    - `observe`: the model is left as it is; feature activations are there to be read.
    - `replace`: the reconstruction takes the place of what is where the dictionary writes. A transcoder so stands in for an
      MLP, a cross-layer transcoder for every MLP.
    - `replace_with_error`: the same plus what the reconstruction misses, as a constant. Without `edit` the model's output stays
      what it was, bit for bit; with it, exactly the edit's effect is added. Gradients reach what comes before through the
      features only (Marks et al. 2024, arXiv 2403.19647, section 3.1).

    Gradients flow through encoder, edit and decoder. Blocks nest, at other places or at the same one, where the inner dictionary
    reads what the outer one wrote. The model may be called in any way, `generate` included; temporal dictionaries need whole
    sequences.

    Args:
        model: a transformers model or what `load_model` returns.
        sae: any dictionary that says where it reads, or was loaded with `hook_point`.
        edit: feature activations `[B, T, d_sae]` -> the same shape: scale, clamp or zero some, to steer or to ablate. For a
            dictionary whose layers have their own it is called with one layer's and the layer's number.

    Yields:
        The newest forward's feature activations.

    Raises:
        ConfigError: an unknown mode, an edit of what is only observed, or a dictionary that cannot write as the model runs.
        HookPointError: the model has no such module, or there a width that does not fit.
    """
    if mode not in ("replace", "replace_with_error", "observe"):
        raise ConfigError(f"attach: mode {mode!r}, needs 'replace', 'replace_with_error' or 'observe'")
    if edit is not None and mode == "observe":
        raise ConfigError(
            "attach: an edit in mode 'observe', needs 'replace' or 'replace_with_error' to have an effect"
        )
    if num_models(sae) > 1:
        raise ConfigError(f"attach: the dictionary compares {num_models(sae)} models, needs one that reads one model")
    lm, is_exact = as_language_model(model), mode == "replace_with_error"
    inputs = [locate(lm, site) for site in sites_in(sae)]
    outputs = [] if mode == "observe" else [locate(lm, site) for site in sites_out(sae)]
    attached: Attached
    if isinstance(sae, MultiLayerDictionary) or len(inputs) > 1:
        attached = LayersAttached(sae, edit, num_layers=len(inputs), writes=bool(outputs))
    else:
        attached = SingleAttached(sae, edit)
    device = sae.b_dec.device
    with contextlib.ExitStack() as stack:
        for layer, place in enumerate(inputs):
            stack.enter_context(_seen(lm, place, attached, layer, device))
        for layer, place in enumerate(outputs):
            write = partial(_write, attached, place, layer, is_exact=is_exact)
            stack.enter_context(replace(lm, str(place.site), write))
        yield attached


@contextlib.contextmanager
def _seen(lm: LanguageModel, place: Located, attached: Attached, layer: int, device: torch.device) -> Iterator[None]:
    def see(hidden: Tensor) -> Tensor:
        attached.see(layer, read(place, hidden).to(device))
        return hidden

    with replace(lm, str(place.site), see):
        yield


def _write(attached: Attached, place: Located, layer: int, hidden: Tensor, *, is_exact: bool) -> Tensor:
    x_hat, unedited = attached.write(layer)
    if x_hat.shape[-1] != hidden.shape[-1]:
        raise ConfigError(
            f"attach: the model has width {hidden.shape[-1]} at {str(place.site)!r}, the dictionary writes {x_hat.shape[-1]}"
        )
    written = place.site.merged(x_hat.to(hidden.device), hidden, place.module)
    if not is_exact:
        return written
    constant = written if unedited is None else place.site.merged(unedited.to(hidden.device), hidden, place.module)
    # Equal terms cancel to zero, so that what is not edited stays as it was to the last bit.
    return hidden.detach() + (written - constant.detach())
