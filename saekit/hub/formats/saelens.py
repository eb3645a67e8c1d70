"""SAELens, versions 1 to 6: `cfg.json` and `sae_weights.safetensors`, or one pickle of both in version 1 and before."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.canonical import Canonical
from saekit.hub.release import Release
from saekit.sae.activation import Activation, Gated, JumpReLU, ReLU, TanhReLU, TopK
from saekit.sae.base import SAE
from saekit.sae.hook_names import hf_site, tl_site
from saekit.sae.site import Site

__all__ = ["is_saelens", "read_saelens", "saelens_sites"]

log = logging.getLogger(__name__)

ARCHITECTURES = (
    "standard",
    "gated",
    "jumprelu",
    "topk",
    "abstopk",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    "temporal",
)
_CENTERED_REPOS = ("jbloom/GPT2-Small-SAEs", "jbloom/GPT2-Small-Feature-Splitting")
_NORMS: Mapping[str, str] = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spec:
    """The config of any generation, read."""

    config: Mapping[str, object]
    is_flat: bool
    """Versions 1 to 5."""
    architecture: str
    nonlinearity: str

    @property
    def is_transcoder(self) -> bool:
        return self.architecture.endswith("transcoder")

    @property
    def decides(self) -> str:
        """`jumprelu`, `gated`, `topk`, `abstopk` or what the config calls its activation function."""
        base = self.architecture.removesuffix("transcoder").removesuffix("_").removesuffix("skip").removesuffix("_")
        return base if base in {"jumprelu", "gated", "topk", "abstopk"} else self.nonlinearity


def is_saelens(release: Release) -> bool:
    """Whether these are a SAELens dictionary's files."""
    weights = release.weights
    if not weights.has("W_dec", "b_dec") or "b_dec_out" in weights or any("attn_layers" in n for n in weights.headers):
        return False
    config = _raw_config(release)
    return bool({"d_sae", "architecture"} & config.keys()) and bool(
        {"hook_point", "hook_name", "metadata", "architecture", "activation_fn_str"} & config.keys()
    )


def read_saelens(release: Release) -> SAE:
    """Returns a SAELens dictionary of any version and architecture.

    Raises:
        FormatError: an architecture, activation or normalisation that is not known, or weights that do not fit the config.
    """
    spec = _spec(release)
    weights = release.weights
    d_in, d_sae = weights.shape("W_enc", 2)
    d_out = weights.shape("W_dec", 2)[1]
    for key, found in (("d_in", d_in), ("d_sae", d_sae), ("d_out", d_out)):
        release.check(key, found, config=spec.config)
    canonical = Canonical(
        W_enc=weights.take("W_enc", d_in, d_sae),
        b_enc=weights.take("b_gate" if spec.decides == "gated" else "b_enc", d_sae),
        W_dec=weights.take("W_dec", d_sae, d_out),
        b_dec=weights.take("b_dec", d_out),
    )
    if spec.decides == "gated":
        canonical.extra |= {name: weights.take(name, d_sae) for name in ("b_mag", "r_mag")}
    if spec.decides == "jumprelu":
        canonical.extra["threshold"] = _threshold(release, d_sae)
    activation = _activation(release, spec)
    if _subtracts_b_dec(release, spec):
        canonical.subtract_from_input(canonical.b_dec)
    _scale_decoder(release, spec, canonical)
    units = "pre-activations of the file"
    if release.flag("rescale_acts_by_decoder_norm", False, config=spec.config):
        canonical.scale_features(canonical.decoder_norms())
        units += ", times the decoder norm"
    skip = weights.take_if("W_skip", d_out, d_in)
    if (skip is not None) != ("skip" in spec.architecture):
        raise FormatError(
            f"{release.ref!r}: architecture {spec.architecture!r} and W_skip disagree, needs both or neither"
        )
    if skip is not None:
        canonical.extra["W_skip"] = skip.T
    weights.finish()
    site, site_out = saelens_sites(release, spec.config)
    return canonical.build(activation, units=units, site=site, site_out=site_out, norm=_norm(release, spec))


def saelens_sites(release: Release, config: Mapping[str, object]) -> tuple[Site | None, Site | None]:
    """Returns where a SAELens config says that its dictionary reads and, for transcoders, writes."""
    metadata = config.get("metadata")
    values = {**config, **(metadata if isinstance(metadata, dict) else {})}
    if values.get("hook_head_index", values.get("hook_point_head_index")) is not None:
        return None, None
    model = _text(values.get("model_name"))
    kwargs = values.get("model_from_pretrained_kwargs")
    # Before version 2, SAELens loaded every model with centred writing weights.
    centered = (
        (isinstance(kwargs, dict) and kwargs.get("center_writing_weights") is True)
        or (release.repo or "").startswith(_CENTERED_REPOS)
        or ("hook_point" in values and "architecture" not in values)
    ) and "gpt2" in (model or "")
    name = _text(values.get("hook_name")) or _text(values.get("hook_point"))
    site = hf_site(_text(values.get("hf_hook_name")), model) or tl_site(name, model, centered=centered)
    out = hf_site(_text(values.get("hf_hook_name_out")), model) or tl_site(
        _text(values.get("hook_name_out")), model, centered=centered
    )
    return site, out


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _raw_config(release: Release) -> Mapping[str, object]:
    pickled = release.weights.values.get("cfg")
    if isinstance(pickled, dict):
        return pickled
    return release.configs.get("cfg.json", {})


def _spec(release: Release) -> _Spec:
    config = _raw_config(release)
    metadata = config.get("metadata")
    version = config.get("sae_lens_version") or (
        metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    )
    is_flat = not (isinstance(version, str) and re.match(r"\d+", version) and int(version.split(".")[0]) >= 6)
    architecture = config.get("architecture", "standard")
    if architecture not in ARCHITECTURES or architecture == "temporal":
        raise FormatError(f"{release.ref!r}: architecture {architecture!r}, needs one of {', '.join(ARCHITECTURES)}")
    nonlinearity = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    known = {"relu", "tanh-relu", "topk"}
    if nonlinearity not in known or (nonlinearity != "relu" and architecture not in {"standard", "topk"}):
        raise FormatError(
            f"{release.ref!r}: {architecture} with activation {nonlinearity!r}, needs relu, tanh-relu or topk"
        )
    return _Spec(config=config, is_flat=is_flat, architecture=str(architecture), nonlinearity=str(nonlinearity))


def _activation(release: Release, spec: _Spec) -> Activation:
    match spec.decides:
        case "gated":
            return Gated()
        case "jumprelu":
            return JumpReLU()
        case "tanh-relu":
            return TanhReLU()
        case "topk" | "abstopk" as kind:
            kwargs = spec.config.get("activation_fn_kwargs")
            nested = kwargs if isinstance(kwargs, dict) else {}
            k = release.get("k", int, config=nested if "k" in nested else spec.config)
            if kind == "abstopk":
                return TopK(k=k, by="magnitude", negative="keep")
            return TopK(k=k)
        case _:
            return ReLU()


def _threshold(release: Release, d_sae: int) -> Tensor:
    linear = release.weights.take_if("threshold", d_sae)
    if linear is not None:
        return linear
    return torch.exp(release.weights.take("log_threshold", d_sae))


def _subtracts_b_dec(release: Release, spec: _Spec) -> bool:
    subtracts = release.flag("apply_b_dec_to_input", not spec.is_transcoder, config=spec.config)
    if subtracts and spec.is_transcoder:
        raise FormatError(
            f"{release.ref!r}: config: apply_b_dec_to_input is true, needs false for {spec.architecture!r}"
        )
    return subtracts


def _scale_decoder(release: Release, spec: _Spec, canonical: Canonical) -> None:
    """Folds the factors of a finetuned decoder: `x_hat = (a * factor) @ W_dec + b_dec`."""
    weights = release.weights
    name = next((n for n in ("scaling_factor", "finetuning_scaling_factor") if n in weights), None)
    asked = spec.config.get("finetuning_scaling_factor")
    if name is None:
        if asked:
            raise FormatError(
                f"{release.ref!r}: config: finetuning_scaling_factor is true, needs a tensor scaling_factor"
            )
        return
    factor = weights.take(name, canonical.W_dec.shape[0])
    if asked is False and not bool((factor == 1).all()):
        raise FormatError(
            f"{release.ref!r}: config: finetuning_scaling_factor is false, {name} in the weights is not 1"
        )
    canonical.W_dec.mul_(factor[:, None])


def _norm(release: Release, spec: _Spec) -> Mapping[str, object] | None:
    asked = spec.config.get("normalize_activations", "none")
    if asked in _NORMS:
        return {"norm": _NORMS[str(asked)], "undo_norm": not spec.is_transcoder}
    if asked == "expected_average_only_in":
        # The scale is either folded into the weights already or known to SAELens' registry only.
        log.warning(
            "%s: normalize_activations is %r and the files hold no scale; the weights are taken as they are",
            release.ref,
            asked,
        )
        return None
    if asked in ("none", False, None, "covariance_whitening"):
        return None
    raise FormatError(
        f"{release.ref!r}: config: normalize_activations is {asked!r}, needs one of none, {', '.join(_NORMS)}"
    )
