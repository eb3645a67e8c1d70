"""Dictionaries written so that other libraries read them; what a target cannot express is refused with the reason."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from saekit.errors import ConfigError
from saekit.hub.canonical import Canonical
from saekit.hub.export_circuit_tracer import write_cross_layer, write_layer
from saekit.hub.export_terms import inexpressible
from saekit.manifest import atomic_write, write_json
from saekit.sae.activation import Activation, Gated, GroupMax, JumpReLU, MatchingPursuit, ReLU, TopK
from saekit.sae.base import SAE
from saekit.sae.dictionary import Dictionary
from saekit.sae.gated import GatedSAE
from saekit.sae.hook_names import tl_name
from saekit.sae.multilayer import MultiLayerDictionary
from saekit.sae.peer_surface import model_name
from saekit.sae.relu import ReLUSAE
from saekit.sae.site import parse_site
from saekit.sae.sites import SitesSAE
from saekit.sae.threshold import ThresholdSAE
from saekit.sae.topk import TopKSAE
from saekit.sae.transcoder import Transcoder

__all__ = ["TARGETS", "as_dictionary", "save_sae"]

_FOLDED = {"W_enc", "b_enc", "W_dec", "b_dec"}


def as_dictionary(sae: SAE) -> Dictionary:
    """Returns the same function as a `Dictionary`, its weights copied.

    Raises:
        ConfigError: a dictionary of several layers or of whole sequences, or a class that is not known here.
    """
    if isinstance(sae, Dictionary):
        kept = {name: value.detach().float().cpu().clone() for name, value in sae.named_parameters()}
        return Dictionary(sae.cfg, kept, source=sae.source)
    activation: Activation
    extra: dict[str, Tensor] = {}
    refused = ConfigError(f"export: a {type(sae).__name__}, needs a dictionary of one site and one token")
    match sae:
        case SitesSAE():
            raise refused
        case TopKSAE():
            activation = TopK(k=sae.cfg.k)
            skip = sae.W_skip if isinstance(sae, Transcoder) else None
            if skip is not None:
                extra["W_skip"] = skip.detach().float().cpu().clone()
        case ReLUSAE():
            activation = ReLU()
        case GatedSAE():
            activation = Gated()
            extra |= {name: getattr(sae, name).detach().float().cpu().clone() for name in ("b_mag", "r_mag")}
        case ThresholdSAE():
            activation = JumpReLU()
            # Thresholds below 0 count as 0 in training, where relu makes the same of them.
            extra["threshold"] = sae.threshold.detach().float().cpu().clamp_min(0).expand(sae.d_sae).clone()
        case _:
            raise refused
    weights = {name: getattr(sae, name).detach().float().cpu().clone() for name in sorted(_FOLDED)}
    canonical = Canonical(**weights, extra=extra)
    if sae.cfg.apply_b_dec_to_input:
        canonical.subtract_from_input(canonical.b_dec)
    site = None if sae.hook_point is None else parse_site(sae.hook_point)
    target = sae.source.get("target_hook_point")
    site_out = parse_site(target) if isinstance(target, str) else None
    made = canonical.build(activation, units="pre-activations of raw input", site=site, site_out=site_out)
    made.source = {**sae.source, **made.source}
    return made


def save_sae(sae: SAE, folder: str | Path, *, format: str = "saekit") -> None:
    """Writes a dictionary into a folder in a library's format.

    circuit-tracer's sets of transcoders are written a layer at a time into one folder, layers 0 to the last without gaps.

    Args:
        format: `saekit`, or a key of `TARGETS`.

    Raises:
        ConfigError: the format is not known, or cannot express this dictionary; the message says what.
        ResourceError: the folder cannot be written.
    """
    if format == "saekit":
        sae.save(folder)
        return
    if format not in TARGETS:
        raise ConfigError(f"export: format {format!r}, needs saekit, {', '.join(TARGETS)}")
    if isinstance(sae, MultiLayerDictionary) and format == "circuit-tracer":
        write_cross_layer(sae, Path(folder))
        return
    TARGETS[format](as_dictionary(sae), Path(folder))


def _write_saelens(sae: Dictionary, folder: Path) -> None:
    activation, maps_elsewhere = sae.cfg.activation, sae.is_transcoder
    parts = _Parts(sae)
    parts.refuse("saelens", "W_glu", "score_scale")
    config: dict[str, object] = {"d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu"}
    tensors = parts.stored(_FOLDED)
    match activation:
        case ReLU():
            base = "standard"
        case JumpReLU() if activation.negative == "zero" or bool((parts["threshold"] >= 0).all()):
            base, tensors["threshold"] = "jumprelu", parts["threshold"]
        case TopK(by="value", negative="zero"):
            base, config["k"], config["rescale_acts_by_decoder_norm"] = "topk", activation.k, False
        case TopK(by="magnitude", negative="keep"):
            base, config["k"], config["rescale_acts_by_decoder_norm"] = "abstopk", activation.k, False
        case Gated():
            base = "gated"
            tensors |= {"b_gate": tensors.pop("b_enc"), "b_mag": parts["b_mag"], "r_mag": parts["r_mag"]}
        case MatchingPursuit():
            base = "matching_pursuit"
            tensors = parts.stored({"W_dec", "b_dec"})
            config |= activation.model_dump(exclude={"kind"})
        case _:
            raise inexpressible("saelens", f"activation {activation.to_dict()}")
    if maps_elsewhere:
        if base not in {"standard", "jumprelu"} or sae.cfg.norm != "none":
            raise inexpressible("saelens", f"a transcoder with {activation.kind} and norm {sae.cfg.norm!r}")
        skip = "skip_" if sae.W_skip is not None else ""
        base = f"{'jumprelu_' if base == 'jumprelu' else ''}{skip}transcoder"
        config["d_out"] = sae.d_out
        if sae.W_skip is not None:
            tensors["W_skip"] = parts["W_skip"].T
    norms = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}
    if sae.cfg.norm != "none" and not sae.cfg.undo_norm:
        raise inexpressible("saelens", "an input norm that is not undone")
    config |= {
        "architecture": base,
        # Matching pursuit has its one bias at both ends; elsewhere it is folded into b_enc.
        "apply_b_dec_to_input": isinstance(activation, MatchingPursuit),
        "normalize_activations": norms[sae.cfg.norm],
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, **_saelens_hooks(sae)},
    }
    _write(folder, "sae_weights.safetensors", tensors, "cfg.json", config)


def _write_sparsify(sae: Dictionary, folder: Path) -> None:
    activation, maps_elsewhere = sae.cfg.activation, sae.is_transcoder
    parts = _Parts(sae)
    parts.refuse("sparsify", "W_glu", "score_scale", norm=True)
    if not isinstance(activation, GroupMax) and not (
        isinstance(activation, TopK) and (activation.by, activation.negative) == ("value", "zero")
    ):
        # It reads `signed` from no config since September 2024, so that signed top-k would be computed wrongly there.
        raise inexpressible("sparsify", f"activation {activation.to_dict()}; it has top-k after relu, and groupmax")
    if sae.d_in != sae.d_out:
        raise inexpressible("sparsify", f"{sae.d_in} wide input and {sae.d_out} wide output")
    if not maps_elsewhere:
        parts.center()
    tensors = {
        "encoder.weight": parts["W_enc"].T,
        "encoder.bias": parts["b_enc"],
        "W_dec": parts["W_dec"],
        "b_dec": parts["b_dec"],
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = parts["W_skip"].T
    config = {
        "activation": activation.kind,
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": activation.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": maps_elsewhere,
        "d_in": sae.d_in,
    }
    _write(folder, "sae.safetensors", tensors, "cfg.json", config)


def _write_dictionary_learning(sae: Dictionary, folder: Path) -> None:
    activation = sae.cfg.activation
    parts = _Parts(sae)
    parts.refuse("dictionary_learning", "W_glu", "score_scale", "W_skip", norm=True)
    if sae.is_transcoder:
        raise inexpressible("dictionary_learning", "a transcoder")
    trainer: dict[str, object] = {"activation_dim": sae.d_in, "dict_size": sae.d_sae}
    match activation:
        case ReLU():
            name, tensors = "AutoEncoderNew", parts.linear(encoder_bias="encoder.bias", decoder_bias="decoder.bias")
        case JumpReLU() if activation.negative == "zero" or bool((parts["threshold"] >= 0).all()):
            name, tensors = "JumpReluAutoEncoder", parts.stored(_FOLDED | {"threshold"})
        case TopK(by="value", negative="zero"):
            parts.center()
            name, tensors = "AutoEncoderTopK", parts.linear(encoder_bias="encoder.bias", decoder_bias="b_dec")
            # -1 is what an untrained threshold is there; only inference by threshold, which nobody asks of it, reads it.
            tensors |= {"k": torch.tensor(activation.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
            trainer["k"] = activation.k
        case Gated():
            parts.center()
            name, tensors = "GatedAutoEncoder", parts.linear(encoder_bias="gate_bias", decoder_bias="decoder_bias")
            tensors |= {"mag_bias": parts["b_mag"], "r_mag": parts["r_mag"]}
        case _:
            raise inexpressible("dictionary_learning", f"activation {activation.to_dict()}")
    trainer["dict_class"] = name
    trainer |= _dictionary_learning_place(sae)
    with atomic_write(folder / "ae.pt") as file:
        torch.save({key: value.contiguous() for key, value in tensors.items()}, file)
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"d_submodule": sae.d_in, "io": "out"}})


TARGETS: Mapping[str, Callable[[Dictionary, Path], None]] = {
    "saelens": _write_saelens,
    "sparsify": _write_sparsify,
    "dictionary_learning": _write_dictionary_learning,
    "circuit-tracer": write_layer,
}
"""Name -> writer of every foreign format."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """A dictionary's weights by name, for writing."""

    sae: Dictionary

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = getattr(self.sae, name)
        return value.detach()

    def stored(self, names: set[str]) -> dict[str, Tensor]:
        """Returns weights under their own names."""
        return {name: self[name] for name in sorted(names)}

    def linear(self, *, encoder_bias: str, decoder_bias: str) -> dict[str, Tensor]:
        """Returns encoder [F, d_in] and decoder [d_out, F] as torch's linear layers hold them."""
        return {
            "encoder.weight": self["W_enc"].T,
            encoder_bias: self["b_enc"],
            "decoder.weight": self["W_dec"].T,
            decoder_bias: self["b_dec"],
        }

    def center(self) -> None:
        """Moves b_dec in front of the encoder, for a target that always subtracts it there."""
        names = [name for name in ("b_mag", "r_mag") if getattr(self.sae, name) is not None]
        canonical = Canonical(**self.stored(_FOLDED), extra=self.stored(set(names)))
        canonical.subtract_from_input(-canonical.b_dec)
        self.sae.b_enc.data = canonical.b_enc
        if self.sae.b_mag is not None:
            self.sae.b_mag.data = canonical.extra["b_mag"]

    def refuse(self, target: str, *names: str, norm: bool = False) -> None:
        """Checks that the dictionary has none of these weights, and no norm where `norm` says so."""
        found = [name for name in names if getattr(self.sae, name) is not None]
        if found:
            raise inexpressible(target, ", ".join(found))
        if norm and self.sae.cfg.norm != "none":
            raise inexpressible(target, f"norm {self.sae.cfg.norm!r}")


def _saelens_hooks(sae: Dictionary) -> dict[str, object]:
    hooks: dict[str, object] = {"model_name": model_name(sae.source)}
    if sae.cfg.site is not None and sae.cfg.site.transform == "centered":
        hooks["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    for key, site in (("hook_name", sae.cfg.site), ("hook_name_out", sae.cfg.site_out)):
        if site is not None:
            hooks[key] = tl_name(site)
            # A module path alone would lose the step that the hook name implies.
            hooks[f"hf_{key}"] = f"{site.path}.{site.side}" if site.transform == "none" else None
    return hooks


def _dictionary_learning_place(sae: Dictionary) -> dict[str, object]:
    """Returns layer and model as its trainers note them; nothing where its names have no place for the site."""
    site, model = sae.cfg.site, model_name(sae.source)
    name = None if site is None or site.transform != "none" else tl_name(site)
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", name or "")
    if found is None or model is None:
        return {}
    layer = int(found.group(1))
    return {"layer": layer, "lm_name": model, "submodule_name": f"resid_post_layer_{layer}"}


def _write(
    folder: Path, weights_name: str, tensors: Mapping[str, Tensor], config_name: str, config: Mapping[str, object]
) -> None:
    with atomic_write(folder / weights_name) as file:
        file.write(save_safetensors({name: value.contiguous() for name, value in tensors.items()}))
    write_json(folder / config_name, config)
