"""Crosscoders for comparing models: Kissane's replication, and science-of-finetuning's dictionary_learning."""

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.release import Release
from saekit.sae.activation import Activation, JumpReLU, ReLU
from saekit.sae.base import SAE
from saekit.sae.hook_names import tl_site
from saekit.sae.multilayer import MultiLayerConfig, MultiLayerDictionary
from saekit.sae.site import Site

__all__ = [
    "is_finetuning_crosscoder",
    "is_model_diff_crosscoder",
    "read_finetuning_crosscoder",
    "read_model_diff_crosscoder",
]

_RECORDS = ("code_normalization_id", "activation_global_scale", "activation_mean", "activation_std", "target_rms", "k")


def is_model_diff_crosscoder(release: Release) -> bool:
    """Whether these are the files of Kissane's replication."""
    headers = release.weights.headers
    return release.weights.has("W_enc", "b_enc", "W_dec", "b_dec") and len(headers["W_dec"].shape) == 3


def read_model_diff_crosscoder(release: Release) -> SAE:
    """Returns a crosscoder of Kissane's replication; the layer axis is that of the models, in the order of training.

    Raises:
        FormatError: config and weights disagree.
    """
    weights = release.weights
    num, d_in, d_sae = weights.shape("W_enc", 3)
    release.check("d_in", d_in)
    release.check("dict_size", d_sae)
    tensors = {
        "W_enc": weights.take("W_enc", num, d_in, d_sae),
        "b_enc": weights.take("b_enc", d_sae)[None],
        "decoders.0": weights.take("W_dec", d_sae, num, d_in),
        "b_dec": weights.take("b_dec", num, d_in),
    }
    weights.finish()
    hook, model = release.config.get("hook_point"), release.config.get("model_name")
    site = tl_site(hook, model) if isinstance(hook, str) and isinstance(model, str) else None
    return _shared(tensors, ReLU(), None if site is None else (site,) * num)


def is_finetuning_crosscoder(release: Release) -> bool:
    """Whether these are the files of science-of-finetuning."""
    headers = release.weights.headers
    return release.weights.has("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias") and (
        len(headers["encoder.weight"].shape) == 3
    )


def read_finetuning_crosscoder(release: Release) -> SAE:
    """Returns a crosscoder of science-of-finetuning, relu or with the one threshold of batch top-k.

    Batch top-k keeps an activation where it exceeds the threshold after multiplication by its decoder norms' sum.

    Raises:
        FormatError: an input normalisation, which the files do not define.
    """
    weights = release.weights
    num, d_in, d_sae = weights.shape("encoder.weight", 3)
    release.check("activation_dim", d_in)
    release.check("dict_size", d_sae)
    release.check("num_layers", num)
    _check_no_normalisation(release)
    decoder = weights.take("decoder.weight", num, d_sae, d_in)
    tensors = {
        "W_enc": weights.take("encoder.weight", num, d_in, d_sae),
        "b_enc": weights.take("encoder.bias", d_sae)[None],
        "decoders.0": decoder.transpose(0, 1),
        "b_dec": weights.take("decoder.bias", num, d_in),
    }
    activation: Activation = ReLU()
    if "threshold" in weights:
        activation = JumpReLU()
        norms = torch.linalg.vector_norm(decoder, dim=2).sum(dim=0)
        tensors["threshold"] = (weights.scalar("threshold") / norms)[None]
        if not bool(torch.isfinite(tensors["threshold"]).all()):
            raise FormatError(f"{weights.where}: a decoder row is zero, needs a norm to compare with the threshold")
    elif "k" in weights:
        raise FormatError(f"{weights.where}: has k and no threshold, needs one; batch top-k depends on the batch")
    weights.finish(*_RECORDS)
    return _shared(tensors, activation, None)


def _check_no_normalisation(release: Release) -> None:
    weights = release.weights
    for name in ("activation_mean", "activation_std"):
        if name in weights and not weights.is_all_nan(name):
            raise FormatError(f"{weights.where}: {name} is set, needs NaN (off); its use is not defined in the files")
    if release.config.get("target_rms") is not None:
        raise FormatError(f"{release.ref!r}: config: target_rms is {release.config['target_rms']!r}, needs null")
    if "activation_global_scale" in weights:
        scale = weights.take("activation_global_scale", *weights.headers["activation_global_scale"].shape)
        if not bool((scale == 1).all()):
            raise FormatError(f"{weights.where}: activation_global_scale is not 1, needs 1 (off)")


def _shared(tensors: dict[str, Tensor], activation: Activation, sites: tuple[Site, ...] | None) -> SAE:
    num, d_in, d_sae = tensors["W_enc"].shape
    cfg = MultiLayerConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_in,
        num_layers_in=num,
        num_layers_out=num,
        encoder="sum",
        targets=((0, num),),
        activation=activation,
        sites=sites,
    )
    return MultiLayerDictionary(cfg, tensors, source={"units": "pre-activations of the file"})
