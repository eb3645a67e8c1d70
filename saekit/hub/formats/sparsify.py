"""sparsify (EleutherAI): `<hook point>/cfg.json` and `sae.safetensors`, all generations since June 2024."""

import re
from pathlib import PurePosixPath

from saekit.errors import FormatError
from saekit.hub.canonical import Canonical
from saekit.hub.release import Release
from saekit.sae.activation import Activation, GroupMax, TopK
from saekit.sae.base import SAE
from saekit.sae.hook_names import module_site
from saekit.sae.site import Site

__all__ = ["is_sparsify", "read_sparsify"]


def is_sparsify(release: Release) -> bool:
    """Whether these are a sparsify dictionary's files."""
    config = release.configs.get("cfg.json", {})
    return release.weights.has("encoder.weight", "encoder.bias", "b_dec") and {"k", "expansion_factor"} <= config.keys()


def read_sparsify(release: Release) -> SAE:
    """Returns a sparsify SAE, transcoder or skip-transcoder.

    A file says that it is a transcoder by `transcode`. Those written before that key existed subtract b_dec from their
    input whatever they are: so they were trained. `multi_topk` concerns training only: encode and decode use k.

    Raises:
        FormatError: an activation that is not known, no decoder, or weights that do not fit the config.
    """
    config, weights = release.need("cfg.json"), release.weights
    d_sae, d_in = weights.shape("encoder.weight", 2)
    release.check("d_in", d_in, config=config)
    expansion = release.get("expansion_factor", float, config=config)
    needed = config.get("num_latents") or round(d_in * expansion)
    if needed != d_sae:
        raise FormatError(f"{release.ref!r}: config: num_latents is {needed!r}, the weights need {d_sae}")
    if "W_dec" not in weights:
        raise FormatError(f"{release.ref!r}: has no W_dec, needs a decoder; encoder-only files are not dictionaries")
    d_out = weights.shape("W_dec", 2)[1]
    is_transcoder = release.flag("transcode", False, config=config)
    canonical = Canonical(
        W_enc=weights.matrix("encoder.weight", d_sae, d_in).T,
        b_enc=weights.take("encoder.bias", d_sae),
        W_dec=weights.matrix("W_dec", d_sae, d_out),
        b_dec=weights.take("b_dec", d_out),
    )
    skip = weights.take_if("W_skip", d_out, d_in)
    asked = config.get("skip_connection")
    if asked is not None and bool(asked) != (skip is not None):
        raise FormatError(f"{release.ref!r}: config: skip_connection is {asked!r}, W_skip says otherwise")
    weights.finish()
    if skip is not None:
        canonical.extra["W_skip"] = skip.T
    if not is_transcoder:
        if d_in != d_out:
            raise FormatError(f"{release.ref!r}: reads {d_in} and writes {d_out}, needs 'transcode' in its config")
        canonical.subtract_from_input(canonical.b_dec)
    site, site_out = _sites(release, reads_input=is_transcoder or skip is not None)
    return canonical.build(_activation(release), units="pre-activations of the file", site=site, site_out=site_out)


def _activation(release: Release) -> Activation:
    config = release.need("cfg.json")
    k, kind = release.get("k", int, config=config), config.get("activation", "topk")
    signed = release.flag("signed", False, config=config)
    match kind:
        case "topk" if signed:
            return TopK(k=k, by="magnitude", negative="keep")
        case "topk":
            return TopK(k=k)
        case "groupmax" if not signed:
            return GroupMax(k=k)
        case _:
            raise FormatError(f"{release.ref!r}: config: activation is {kind!r}, needs 'topk' or 'groupmax'")


def _sites(release: Release, *, reads_input: bool) -> tuple[Site | None, Site | None]:
    parts = [part for part in re.split(r"[/:]", release.ref) if part]
    if len(parts) > 1 and re.fullmatch(r"seed_?\d+", parts[-1]):
        parts.pop()
    name, model = PurePosixPath(parts[-1]).name, "/".join(parts[-4:-1])
    out = module_site(name, model)
    if not reads_input:
        return out, None
    return module_site(name, model, side="input"), out
