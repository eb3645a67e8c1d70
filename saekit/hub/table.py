"""The one table of formats: how each is recognised, from names and headers only, and who reads it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from saekit.errors import FormatError
from saekit.hub.formats import (
    circuit_tracer,
    crosscoders,
    dictionary_learning,
    gemma_scope,
    openmoss,
    openmoss_layers,
    openmoss_lorsa,
    plain,
    saelens,
    sparsify,
    temporal,
)
from saekit.hub.release import Release
from saekit.hub.strict import printable
from saekit.sae.base import SAE

__all__ = ["FORMATS", "Format", "recognise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One row: a family's test and its reader."""

    is_match: Callable[[Release], bool]
    """Whether a release is of this format; reads no weights."""
    read: Callable[[Release], SAE]
    """Returns the dictionary."""


# In order: the first that matches wins, so formats that say what they are stand before those known by shapes alone.
FORMATS: Mapping[str, Format] = {
    "gemma_scope": Format(is_match=gemma_scope.is_gemma_scope, read=gemma_scope.read_gemma_scope),
    "gemma_scope_2_layers": Format(
        is_match=gemma_scope.is_gemma_scope_2_layers, read=gemma_scope.read_gemma_scope_2_layers
    ),
    "gemma_scope_2": Format(is_match=gemma_scope.is_gemma_scope_2, read=gemma_scope.read_gemma_scope_2),
    "saelens_temporal": Format(is_match=temporal.is_saelens_temporal, read=temporal.read_saelens_temporal),
    "temporal": Format(is_match=temporal.is_temporal, read=temporal.read_temporal),
    "saelens": Format(is_match=saelens.is_saelens, read=saelens.read_saelens),
    "dunefsky": Format(is_match=plain.is_dunefsky, read=plain.read_dunefsky),
    "sparsify": Format(is_match=sparsify.is_sparsify, read=sparsify.read_sparsify),
    "dictionary_learning": Format(
        is_match=dictionary_learning.is_dictionary_learning, read=dictionary_learning.read_dictionary_learning
    ),
    "llama_scope": Format(is_match=openmoss.is_llama_scope, read=openmoss.read_llama_scope),
    "llama_scope_r1": Format(is_match=openmoss.is_llama_scope_r1, read=openmoss.read_llama_scope_r1),
    "llamascopium_layers": Format(
        is_match=openmoss_layers.is_llamascopium_layers, read=openmoss_layers.read_llamascopium_layers
    ),
    "llamascopium": Format(is_match=openmoss.is_llamascopium, read=openmoss.read_llamascopium),
    "lorsa": Format(is_match=openmoss_lorsa.is_lorsa, read=openmoss_lorsa.read_lorsa),
    "openai": Format(is_match=plain.is_openai, read=plain.read_openai),
    "goodfire": Format(is_match=plain.is_goodfire, read=plain.read_goodfire),
    "finetuning_crosscoder": Format(
        is_match=crosscoders.is_finetuning_crosscoder, read=crosscoders.read_finetuning_crosscoder
    ),
    "model_diff_crosscoder": Format(
        is_match=crosscoders.is_model_diff_crosscoder, read=crosscoders.read_model_diff_crosscoder
    ),
    "deepseek": Format(is_match=plain.is_deepseek, read=plain.read_deepseek),
    "qwen_scope": Format(is_match=plain.is_qwen_scope, read=plain.read_qwen_scope),
    "connor": Format(is_match=plain.is_connor, read=plain.read_connor),
    "apollo": Format(is_match=plain.is_apollo, read=plain.read_apollo),
    "transcoder_set": Format(is_match=circuit_tracer.is_transcoder_set, read=circuit_tracer.read_transcoder_set),
    "cross_layer": Format(is_match=circuit_tracer.is_cross_layer, read=circuit_tracer.read_cross_layer),
}
"""Name -> test and reader of every foreign format."""


def recognise(release: Release, forced: str | None = None) -> str:
    """Returns the name of a release's format.

    Args:
        forced: the format that the caller asked for; only its name is checked.

    Raises:
        FormatError: no format matches, or the forced one is not known.
    """
    if forced is not None:
        if forced not in FORMATS:
            raise FormatError(f"{release.ref!r}: format {forced!r}, needs one of {', '.join(FORMATS)}")
        return forced
    for name, entry in FORMATS.items():
        if entry.is_match(release):
            return name
    tensors = printable((f"{name} {list(header.shape)}" for name, header in release.weights.headers.items()), 8)
    raise FormatError(
        f"{release.ref!r}: no known format has {tensors or 'no tensors'}, needs one of {', '.join(FORMATS)}; say format="
    )
