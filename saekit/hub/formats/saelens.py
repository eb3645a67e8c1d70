"""SAELens, versions 1 to 6: `cfg.json` and `sae_weights.safetensors`, or one pickle of both in version 1 and before."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.canonical import Canonical
from saekit.hub.formats.saelens_registry import input_scale, is_centred, token_norm
from saekit.hub.release import Release
from saekit.sae.activation import Activation, Gated, JumpReLU, MatchingPursuit, ReLU, TanhReLU, TopK
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
    "batchtopk",
    "matryoshka_batchtopk",
    "matching_pursuit",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    "temporal",
)
# What the trainer keeps of an input whose covariance it makes the identity.
_WHITENING = ("mean", "matrix", "inverse_matrix")
_NORMS: Mapping[str, str] = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spec:
    """The config of any generation, read."""

    config: Mapping[str, object]
    architecture: str
    nonlinearity: str

    @property
    def is_transcoder(self) -> bool:
        return self.architecture.endswith("transcoder")

    @property
    def decides(self) -> str:
        """The architecture without its wiring, or what the config calls its activation function."""
        base = self.architecture.removesuffix("transcoder").removesuffix("_").removesuffix("skip").removesuffix("_")
        base = base.removeprefix("matryoshka_")
        return base if base in {"jumprelu", "gated", "topk", "abstopk", "batchtopk"} else self.nonlinearity


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

    A training checkpoint becomes what its final file would be: the scale or whitening kept beside it is folded in, and batch
    top-k compares with the running threshold.

    Raises:
        FormatError: an architecture, activation or normalisation that is not known, or weights that do not fit the config.
    """
    spec = _spec(release)
    if spec.architecture == "matching_pursuit":
        return _read_matching_pursuit(release, spec)
    weights = release.weights
    d_in, d_sae = weights.shape("W_enc", 2)
    d_out = weights.shape("W_dec", 2)[1]
    for key, found in (("d_in", d_in), ("d_sae", d_sae), ("d_out", d_out)):
        release.check(key, found, config=spec.config)
    canonical = Canonical(
        W_enc=weights.matrix("W_enc", d_in, d_sae),
        b_enc=weights.take("b_gate" if spec.decides == "gated" else "b_enc", d_sae),
        W_dec=weights.matrix("W_dec", d_sae, d_out),
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
    scale = _input_scale(release, spec)
    canonical.scale_input(scale)
    canonical.scale_output(1 / scale)
    units = "pre-activations of the file"
    rescales = release.flag("rescale_acts_by_decoder_norm", False, config=spec.config)
    if rescales:
        canonical.scale_features(canonical.decoder_norms())
        units += ", times the decoder norm"
    if spec.decides == "batchtopk":
        # It is compared with what the decoder norms, smaller by the scale now, have multiplied.
        threshold = weights.scalar("topk_threshold") / (scale if rescales else 1.0)
        canonical.extra["threshold"] = torch.full((d_sae,), threshold)
    skip = weights.take_if("W_skip", d_out, d_in)
    if (skip is not None) != ("skip" in spec.architecture):
        raise FormatError(
            f"{release.ref!r}: architecture {spec.architecture!r} and W_skip disagree, needs both or neither"
        )
    if skip is not None:
        canonical.extra["W_skip"] = skip.T
    if _asked_norm(release, spec) == "covariance_whitening":
        _whiten(release, canonical)
    weights.finish(*_WHITENING)
    return _placed(release, spec, canonical, activation, units)


def _read_matching_pursuit(release: Release, spec: _Spec) -> SAE:
    """Encoder and decoder are one; `b_dec` is of both ends or of neither."""
    config, weights = spec.config, release.weights
    d_sae, d_in = weights.shape("W_dec", 2)
    for key, found in (("d_in", d_in), ("d_sae", d_sae)):
        release.check(key, found, config=config)
    W_dec, b_dec = weights.take("W_dec", d_sae, d_in), weights.take("b_dec", d_in)
    weights.finish()
    if _asked_norm(release, spec) == "covariance_whitening":
        raise FormatError(f"{release.ref!r}: config: covariance_whitening, needs an encoder that is not the decoder")
    scale = _input_scale(release, spec)
    b_dec = b_dec / scale if _subtracts_b_dec(release, spec) else torch.zeros_like(b_dec)
    canonical = Canonical(W_enc=W_dec.T, b_enc=torch.zeros(d_sae), W_dec=W_dec, b_dec=b_dec)
    canonical.subtract_from_input(b_dec)
    steps = config.get("max_iterations")
    activation = MatchingPursuit(
        residual_threshold=max(release.get("residual_threshold", float, config=config) / scale, 0.0),
        max_iterations=d_in if steps is None else release.get("max_iterations", int, config=config),
        stop_on_duplicate_support=release.flag("stop_on_duplicate_support", True, config=config),
    )
    return _placed(release, spec, canonical, activation, "projections on the decoder rows")


def _placed(release: Release, spec: _Spec, canonical: Canonical, activation: Activation, units: str) -> SAE:
    site, site_out = saelens_sites(release, spec.config)
    asked = _asked_norm(release, spec)
    norm = {"norm": _NORMS[asked], "undo_norm": not spec.is_transcoder} if asked in _NORMS else {}
    joins_heads = spec.config.get("reshape_activations", _default_shape(spec.config)) == "hook_z"
    return canonical.build(
        activation, units=units, site=site, site_out=site_out, options=norm | {"joins_heads": joins_heads}
    )


def _default_shape(config: Mapping[str, object]) -> str:
    """Before version 6, the hook's name said that heads are joined."""
    hook = _text(config.get("hook_name")) or _text(config.get("hook_point")) or ""
    return "hook_z" if "hook_z" in hook else "none"


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
        or is_centred(release)
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
    architecture = config.get("architecture", "standard")
    if architecture not in ARCHITECTURES or architecture == "temporal":
        raise FormatError(f"{release.ref!r}: architecture {architecture!r}, needs one of {', '.join(ARCHITECTURES)}")
    nonlinearity = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    known = {"relu", "tanh-relu", "topk"}
    if nonlinearity not in known or (nonlinearity != "relu" and architecture not in {"standard", "topk"}):
        raise FormatError(
            f"{release.ref!r}: {architecture} with activation {nonlinearity!r}, needs relu, tanh-relu or topk"
        )
    return _Spec(config=config, architecture=str(architecture), nonlinearity=str(nonlinearity))


def _activation(release: Release, spec: _Spec) -> Activation:
    match spec.decides:
        case "gated":
            return Gated()
        case "jumprelu" | "batchtopk":
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
    canonical.W_dec = canonical.W_dec.float().mul_(factor[:, None])


def _asked_norm(release: Release, spec: _Spec) -> str:
    asked = spec.config.get("normalize_activations")
    asked = (
        {True: "expected_average_only_in", False: "none", None: "none"}[asked]
        if asked in (True, False, None)
        else asked
    )
    known = ("none", "expected_average_only_in", "covariance_whitening", *_NORMS)
    if asked not in known:
        raise FormatError(
            f"{release.ref!r}: config: normalize_activations is {asked!r}, needs one of {', '.join(known)}"
        )
    return token_norm(release) or str(asked)


def _input_scale(release: Release, spec: _Spec) -> float:
    """Returns what the input is multiplied by, and the reconstruction divided by; 1 where it is folded in already."""
    if _asked_norm(release, spec) != "expected_average_only_in":
        return 1.0
    kept = release.configs.get("activation_scaler.json", {})
    known = release.get("scaling_factor", float, config=kept) if kept.get("scaling_factor") is not None else None
    scale = known or input_scale(release)
    if scale is None:
        log.warning(
            "%s: normalize_activations is 'expected_average_only_in' and the files hold no scale;"
            " the weights are taken as they are",
            release.ref,
        )
        return 1.0
    if scale <= 0 or spec.is_transcoder:
        raise FormatError(f"{release.ref!r}: input scale {scale} of {spec.architecture!r}, needs one above 0 of an SAE")
    return scale


def _whiten(release: Release, canonical: Canonical) -> None:
    """Folds an input of `(x - mean) @ matrix`, undone by `y @ inverse_matrix + mean`."""
    weights, width = release.weights, len(canonical.b_dec)
    if not weights.has(*_WHITENING):
        raise FormatError(
            f"{release.ref!r}: config: covariance_whitening is not folded in, needs activation_whitening.safetensors"
        )
    mean = weights.take("mean", width)
    matrix, inverse = (weights.take(name, width, width).double() for name in _WHITENING[1:])
    canonical.W_enc = (matrix @ canonical.W_enc.double()).float()
    canonical.subtract_from_input(mean)
    canonical.W_dec = (canonical.W_dec.double() @ inverse).float()
    canonical.b_dec = (canonical.b_dec.double() @ inverse + mean.double()).float()
