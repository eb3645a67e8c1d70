"""dictionary_learning: `trainer_<i>/config.json` and `ae.pt`, every dictionary class."""

import re
from collections.abc import Mapping

from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.canonical import Canonical
from saekit.hub.release import Release
from saekit.sae.activation import Activation, Gated, JumpReLU, ReLU, TopK
from saekit.sae.base import SAE
from saekit.sae.hook_names import tl_site
from saekit.sae.site import Site

__all__ = ["is_dictionary_learning", "read_dictionary_learning"]

_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)
# Tensor -> the one class that has it.
_TELLING = {"bias": "AutoEncoder", "gate_bias": "GatedAutoEncoder"}


def is_dictionary_learning(release: Release) -> bool:
    """Whether these are a dictionary_learning run's files."""
    return _class(release) is not None


def read_dictionary_learning(release: Release, *, unit_decoder: bool = True) -> SAE:
    """Returns a dictionary of any of its classes.

    Args:
        unit_decoder: for AutoEncoder, activations times the decoder norms, which its own loader makes them by default;
            False takes the file literally. The reconstruction is the same.

    Raises:
        FormatError: a class that is not known, or weights that do not fit the config.
    """
    name = _class(release)
    units = "pre-activations of the file"
    activation: Activation = ReLU()
    unused: tuple[str, ...] = ("group_sizes",)
    match name:
        case "AutoEncoder":
            canonical = _linear(release, bias="bias")
            canonical.subtract_from_input(canonical.b_dec)
            if unit_decoder:
                canonical.scale_features(canonical.decoder_norms())
                units = "pre-activations of the file times the decoder norm"
        case "AutoEncoderNew":
            canonical = _linear(release, bias="decoder.bias")
        case "GatedAutoEncoder":
            canonical, activation = _gated(release), Gated()
        case "JumpReluAutoEncoder":
            canonical, activation = _stored_as_used(release), JumpReLU()
            canonical.extra["threshold"] = release.weights.take("threshold", len(canonical.b_enc))
        case "AutoEncoderTopK":
            canonical = _linear(release, bias="b_dec")
            canonical.subtract_from_input(canonical.b_dec)
            activation = TopK(k=_k(release))
            # Its threshold is for another rule, and infinite once a token of training had fewer than k positive entries.
            unused = (*unused, "threshold")
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            is_nested = name == "MatryoshkaBatchTopKSAE"
            canonical = _stored_as_used(release) if is_nested else _linear(release, bias="b_dec")
            canonical.subtract_from_input(canonical.b_dec)
            activation = JumpReLU()
            _k(release)
            threshold = release.weights.scalar("threshold")
            canonical.extra["threshold"] = canonical.b_enc.new_full((len(canonical.b_enc),), threshold)
        case _:
            raise FormatError(f"{release.ref!r}: config: dict_class is {name!r}, needs one of {', '.join(_CLASSES)}")
    release.weights.finish(*unused)
    release.check("activation_dim", canonical.W_enc.shape[0], config=_trainer(release))
    release.check("dict_size", canonical.W_enc.shape[1], config=_trainer(release))
    return canonical.build(activation, units=units, site=_site(release))


def _class(release: Release) -> object:
    """Returns the config's class; before it named one, the class that alone has such tensors."""
    named = _trainer(release).get("dict_class")
    if named is not None or not re.fullmatch(r"ae(_\d+)?\.pt", release.name):
        return named
    return next((name for tensor, name in _TELLING.items() if release.weights.has("encoder.weight", tensor)), None)


def _trainer(release: Release) -> Mapping[str, object]:
    trainer = release.configs.get("config.json", {}).get("trainer")
    return trainer if isinstance(trainer, dict) else {}


def _linear(release: Release, *, bias: str) -> Canonical:
    weights = release.weights
    d_sae, d_in = weights.shape("encoder.weight", 2)
    return Canonical(
        W_enc=weights.matrix("encoder.weight", d_sae, d_in).T,
        b_enc=weights.take("encoder.bias", d_sae),
        W_dec=weights.matrix("decoder.weight", d_in, d_sae).T,
        b_dec=weights.take(bias, d_in),
    )


def _stored_as_used(release: Release) -> Canonical:
    weights = release.weights
    d_in, d_sae = weights.shape("W_enc", 2)
    return Canonical(
        W_enc=weights.matrix("W_enc", d_in, d_sae),
        b_enc=weights.take("b_enc", d_sae),
        W_dec=weights.matrix("W_dec", d_sae, d_in),
        b_dec=weights.take("b_dec", d_in),
    )


def _gated(release: Release) -> Canonical:
    weights = release.weights
    d_sae, d_in = weights.shape("encoder.weight", 2)
    extra: dict[str, Tensor] = {
        "b_mag": weights.take("mag_bias", d_sae),
        "r_mag": weights.take("r_mag", d_sae),
    }
    canonical = Canonical(
        W_enc=weights.matrix("encoder.weight", d_sae, d_in).T,
        b_enc=weights.take("gate_bias", d_sae),
        W_dec=weights.matrix("decoder.weight", d_in, d_sae).T,
        b_dec=weights.take("decoder_bias", d_in),
        extra=extra,
    )
    canonical.subtract_from_input(canonical.b_dec)
    return canonical


def _k(release: Release) -> int:
    k, asked = int(release.weights.scalar("k")), _trainer(release).get("k")
    if asked is not None and asked != k:
        raise FormatError(f"{release.ref!r}: config: k is {asked!r}, the weights need {k}")
    return k


def _site(release: Release) -> Site | None:
    trainer = _trainer(release)
    model = trainer.get("lm_name")
    name = trainer.get("submodule_name")
    found = re.search(r"resid_post_layer_(\d+)", name if isinstance(name, str) else release.ref)
    if found is None or not isinstance(model, str):
        return None
    return tl_site(f"blocks.{found.group(1)}.hook_resid_post", model)
