"""Crosscoders for comparing models: Kissane's replication, and science-of-finetuning's dictionary_learning."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.canonical import projected, threshold_over
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
_ALPHAS: Mapping[str, object] = {"code_normalization_alpha_sae": 1.0, "code_normalization_alpha_cc": 0.1}
_SCALE_EPS = 1e-8
# More layers than any model has, and few enough to allocate.
_MOST_LAYERS = 1000


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
    return _built(tensors, ReLU(), sites=None if site is None else (site,) * num)


def is_finetuning_crosscoder(release: Release) -> bool:
    """Whether these are the files of science-of-finetuning."""
    headers = release.weights.headers
    return release.weights.has("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias") and (
        len(headers["encoder.weight"].shape) == 3
    )


def read_finetuning_crosscoder(release: Release) -> SAE:
    """Returns a crosscoder of science-of-finetuning, relu or with the thresholds of batch top-k.

    Its inputs may be normalised by layer: `(x - mean) * scale`, undone as `y / (scale + 1e-8) + mean`. Batch top-k keeps an
    activation where it exceeds the threshold after multiplication by what `code_normalization` makes of its decoder norms;
    `DECOUPLED` has a threshold, and so activations, of each layer's own.

    Source: science-of-finetuning/dictionary_learning, `CrossCoder` and `BatchTopKCrossCoder`.

    Raises:
        FormatError: batch top-k without a threshold, a code or input normalisation that the files do not define, or weights
            that do not fit the config.
    """
    weights, config = release.weights, release.config
    num_read, d_in, d_sae = weights.shape("encoder.weight", 3)
    num_written = weights.shape("decoder.weight", 3)[0]
    release.check("activation_dim", d_in)
    release.check("dict_size", d_sae)
    release.check("num_decoder_layers", num_written)
    if config.get("latent_processor") is not None:
        raise FormatError(f"{release.ref!r}: config: latent_processor is set, needs null; it is code of the trainer's")
    b_enc = weights.take("encoder.bias", d_sae)[None]
    decoder = weights.take("decoder.weight", num_written, d_sae, d_in)
    tensors = {
        "W_enc": _placed(release, weights.take("encoder.weight", num_read, d_in, d_sae)),
        "b_enc": b_enc,
        "decoders.0": decoder.transpose(0, 1).contiguous(),
        "b_dec": weights.take("decoder.bias", num_written, d_in),
    }
    activation: Activation = ReLU()
    encoder: Literal["sum", "sum_per_layer"] = "sum"
    if "threshold" in weights:
        activation = JumpReLU()
        scores = _scores(release, decoder)
        shared = scores.shape[0] == 1
        threshold = torch.tensor([weights.scalar("threshold")]) if shared else weights.take("threshold", num_written)
        tensors["threshold"] = threshold_over(threshold[:, None], scores)
        if not shared:
            encoder = "sum_per_layer"
            tensors["b_enc"] = b_enc.expand(num_written, d_sae).clone()
            tensors |= {f"decoders.{layer}": rows[:, None].contiguous() for layer, rows in enumerate(decoder)}
    elif "k" in weights:
        raise FormatError(f"{weights.where}: has k and no threshold, needs one; batch top-k depends on the batch")
    _fold_normalisation(release, tensors)
    weights.finish(*_RECORDS)
    return _built(tensors, activation, encoder=encoder)


def _placed(release: Release, encoder: Tensor) -> Tensor:
    """The encoder over all layers: those that `encoder_layers` leaves out are not read."""
    chosen = release.config.get("encoder_layers")
    if chosen is None:
        release.check("num_layers", len(encoder))
        return encoder
    num, layers = release.get("num_layers", int), release.get("encoder_layers", list)
    fits = len(layers) == len(encoder) and all(layer in range(num) and layers.count(layer) == 1 for layer in layers)
    if num > _MOST_LAYERS or not fits:
        raise FormatError(f"{release.ref!r}: config: reads layers {layers} of {num}, the weights need {len(encoder)}")
    placed = encoder.new_zeros(num, *encoder.shape[1:])
    placed[layers] = encoder
    return placed


def _scores(release: Release, decoder: Tensor) -> Tensor:
    """What activations are multiplied by before the threshold, [1, F], or [L, F] where each layer decides for itself."""
    weights = release.weights
    norms: Tensor = torch.linalg.vector_norm(decoder, dim=2)  # [L, F]
    by_layers: Tensor = norms.sum(dim=0, keepdim=True)
    by_sae = norms.square().sum(dim=0, keepdim=True).sqrt()
    stored = "code_normalization_id" in weights
    match int(weights.scalar("code_normalization_id")) if stored else 1:
        case 1:
            return by_layers
        case 2:
            return by_sae
        case 3:
            alphas = {**_ALPHAS, **release.config}
            alpha_sae, alpha_layers = (
                release.get(f"code_normalization_alpha_{part}", float, config=alphas) for part in ("sae", "cc")
            )
            return alpha_sae * by_sae + alpha_layers * by_layers
        case 4:
            return torch.ones_like(norms[:1])
        case 5:
            return norms
        case other:
            raise FormatError(f"{weights.where}: code_normalization_id is {other}, needs 1 to 5")


def _fold_normalisation(release: Release, tensors: dict[str, Tensor]) -> None:
    weights = release.weights
    num, d_in, _ = tensors["W_enc"].shape
    num_written = len(tensors["b_dec"])
    # A NaN in either says that there is none; the scale beside them is then without meaning.
    if any(name not in weights or weights.has_nan(name) for name in ("activation_mean", "activation_std")):
        return
    if "activation_global_scale" not in weights:
        raise FormatError(f"{weights.where}: has activation_mean alone, needs activation_global_scale too")
    if num != num_written:
        raise FormatError(f"{weights.where}: normalises {num} layers and writes {num_written}, needs as many")
    if len(tensors["b_enc"]) != 1:
        raise FormatError(
            f"{weights.where}: a decoupled code of normalised inputs, needs either; its own code norms twice"
        )
    mean = weights.take("activation_mean", num, d_in).double()
    scale = weights.take("activation_global_scale", num).double()
    tensors["W_enc"].mul_(scale[:, None, None])
    shift = sum(projected(row, W_enc) for row, W_enc in zip(mean, tensors["W_enc"], strict=True))
    tensors["b_enc"] = (tensors["b_enc"].double() - shift).float()
    # Their inverse of the scale is not quite its inverse.
    tensors["decoders.0"].div_((scale + _SCALE_EPS)[:, None])
    tensors["b_dec"] = (tensors["b_dec"].double() / (scale + _SCALE_EPS)[:, None] + mean).float()


def _built(
    tensors: dict[str, Tensor],
    activation: Activation,
    *,
    encoder: Literal["sum", "sum_per_layer"] = "sum",
    sites: tuple[Site, ...] | None = None,
) -> SAE:
    cfg = MultiLayerConfig.of(tensors, encoder=encoder, activation=activation, sites=sites)
    return MultiLayerDictionary(cfg, tensors, source={"units": "pre-activations of the file"})
