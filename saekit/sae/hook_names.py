"""Hook names of every library -> module path and side in the Hugging Face model, by the model's architecture."""

import re
from collections.abc import Mapping
from typing import Literal, get_args

from saekit.sae.site import Site

__all__ = ["Family", "hf_site", "model_family", "module_site", "tl_name", "tl_site"]

Family = Literal["llama", "gemma1", "gemma2", "gemma3", "gemma3_multimodal", "gpt2", "neox"]
"""Layouts of language models; `llama` is also Mistral's and Qwen's."""

_FAMILIES: tuple[tuple[str, Family], ...] = (
    (r"llama|mistral|qwen", "llama"),
    (r"gpt2|gpt-2", "gpt2"),
    (r"pythia|neox", "neox"),
)
_LAYERS: Mapping[Family, str] = {
    "llama": "model.layers",
    "gemma1": "model.layers",
    "gemma2": "model.layers",
    "gemma3": "model.layers",
    "gemma3_multimodal": "model.language_model.layers",
    "gpt2": "transformer.h",
    "neox": "gpt_neox.layers",
}
_EMBEDDING: Mapping[Family, str] = {
    "llama": "model.embed_tokens",
    "gpt2": "transformer.wte",
    "neox": "gpt_neox.embed_in",
}
_LLAMA = {
    "hook_resid_pre": ":input",
    "hook_resid_mid": "post_attention_layernorm:input",
    "hook_resid_post": "",
    "attn.hook_z": "self_attn.o_proj:input",
    "hook_attn_out": "self_attn",
    "ln1.hook_normalized": "input_layernorm without_gain",
    "ln2.hook_normalized": "post_attention_layernorm without_gain",
    "mlp.hook_in": "mlp:input",
    "mlp.hook_post": "mlp.down_proj:input",
    "hook_mlp_out": "mlp",
    "mlp.hook_out": "mlp",
}
_GEMMA1 = _LLAMA | {
    "ln1.hook_normalized": "input_layernorm without_gain_plus_one",
    "ln2.hook_normalized": "post_attention_layernorm without_gain_plus_one",
}
# The norms after attention and MLP belong to what the library calls their outputs. Its bridge's `mlp.hook_out` does not
# say on which side of that norm it is, so it is left out.
_GEMMA2 = {
    "hook_resid_pre": ":input",
    "hook_resid_mid": "pre_feedforward_layernorm:input",
    "hook_resid_post": "",
    "attn.hook_z": "self_attn.o_proj:input",
    "hook_attn_out": "post_attention_layernorm",
    "ln1.hook_normalized": "input_layernorm without_gain_plus_one",
    "ln2.hook_normalized": "pre_feedforward_layernorm without_gain_plus_one",
    "mlp.hook_in": "pre_feedforward_layernorm",
    "mlp.hook_post": "mlp.down_proj:input",
    "hook_mlp_out": "post_feedforward_layernorm",
}
_GPT2 = {
    "hook_resid_pre": ":input",
    "hook_resid_mid": "ln_2:input",
    "hook_resid_post": "",
    "attn.hook_z": "attn.c_proj:input",
    "hook_attn_out": "attn",
    "ln1.hook_normalized": "ln_1 without_gain",
    "ln2.hook_normalized": "ln_2 without_gain",
    "mlp.hook_in": "mlp:input",
    "mlp.hook_post": "mlp.act",
    "hook_mlp_out": "mlp",
    "mlp.hook_out": "mlp",
}
# Attention and MLP run side by side: there is no residual stream between them.
_NEOX = {
    "hook_resid_pre": ":input",
    "hook_resid_post": "",
    "attn.hook_z": "attention.dense:input",
    "hook_attn_out": "attention",
    "ln1.hook_normalized": "input_layernorm without_gain",
    "ln2.hook_normalized": "post_attention_layernorm without_gain",
    "mlp.hook_in": "mlp:input",
    "mlp.hook_post": "mlp.act",
    "hook_mlp_out": "mlp",
    "mlp.hook_out": "mlp",
}
_TABLES: Mapping[Family, Mapping[str, str]] = {
    "llama": _LLAMA,
    "gemma1": _GEMMA1,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "gemma3_multimodal": _GEMMA2,
    "gpt2": _GPT2,
    "neox": _NEOX,
}
# On a plain HookedTransformer this is the residual stream before the norm, whatever its name suggests.
_SYNONYMS = {"hook_mlp_in": "hook_resid_mid"}


def model_family(model: str | None) -> Family | None:
    """Returns the layout of the model that a name stands for; None where the name does not tell.

    Args:
        model: e.g. `gemma-2-2b`, `google/gemma-3-4b-pt`, `gpt2-small`, or a path that holds such a name.
    """
    if model is None:
        return None
    text = model.lower()
    gemma = re.search(r"gemma[-_]?(?:scope[-_]?)?(?:v?(\d))?[-_]?(\d+m|\d+b)?", text)
    if gemma:
        return _gemma_family(text, gemma)
    for pattern, family in _FAMILIES:
        if re.search(pattern, text):
            return family
    return None


def _gemma_family(text: str, found: re.Match[str]) -> Family | None:
    generation, size = found.group(1), found.group(2)
    if "scope" in found.group(0):
        # Gemma Scope 2 is of Gemma 3, and the first one, without a number of its own, of Gemma 2.
        second = re.search(r"gemma-scope-2-(270m|\d+b)", text)
        generation, size = ("3", second.group(1)) if second else ("2", size)
    match generation:
        case "3":
            return "gemma3" if size in {"270m", "1b"} else "gemma3_multimodal"
        case "2":
            # `gemma-2b` is the first generation's model of two billion parameters.
            return "gemma1" if re.search(r"gemma-2b", text) and not re.search(r"gemma-2-|scope", text) else "gemma2"
        case None | "7":
            return "gemma1" if size in {"2b", "7b"} or "gemma-7b" in text else None
        case _:
            return None


def tl_site(name: str | None, model: str | None, *, centered: bool = False) -> Site | None:
    """Returns the site that a TransformerLens hook name means; None where name or model do not tell it.

    Args:
        name: e.g. `blocks.5.hook_resid_pre` or `hook_embed`.
        model: the model's name.
        centered: the dictionary was trained on a model with centred writing weights.
    """
    family = model_family(model)
    if name is None or family is None:
        return None
    if name == "hook_embed":
        if family.startswith("gemma"):
            # Whether Gemma's embedding module multiplies by sqrt(width) itself depends on transformers' version.
            return Site(path=f"{_LAYERS[family]}.0", side="input")
        return Site(path=_EMBEDDING[family])
    return _built(name, family, centered=centered)


def _built(name: str, family: Family, *, centered: bool) -> Site | None:
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if found is None:
        return None
    place = _TABLES[family].get(_SYNONYMS.get(found.group(2), found.group(2)))
    if place is None:
        return None
    tail, _, transform = place.partition(" ")
    module, _, side = tail.partition(":")
    path = ".".join(part for part in (_LAYERS[family], found.group(1), module) if part)
    if centered and re.fullmatch(r"hook_(resid_(pre|mid|post)|mlp_out|attn_out|mlp_in)", found.group(2)):
        transform = "centered"
    return Site.model_validate({"path": path, "side": side or "output", "transform": transform or "none"})


def tl_name(site: Site) -> str | None:
    """Returns the TransformerLens hook name of a site, where one and only one layout's names fit its path."""
    fitting: set[str] = set()
    for family, layers in _LAYERS.items():
        found = re.match(re.escape(layers) + r"\.(\d+)(?:\.|$)", site.path)
        if found is None:
            continue
        for place in _TABLES[family]:
            name = f"blocks.{found.group(1)}.{place}"
            if any(_built(name, family, centered=centered) == site for centered in (False, True)):
                fitting.add(name)
    # The bridge's names of the MLP's ends are synonyms of older ones.
    fitting = {name for name in fitting if not name.endswith("mlp.hook_out")}
    return fitting.pop() if len(fitting) == 1 else None


def hf_site(name: str | None, model: str | None = None) -> Site | None:
    """Returns the site of a module path that ends in `.input` or `.output`, e.g. `model.layers.13.output`."""
    if name is None:
        return None
    path, _, side = name.rpartition(".")
    if side not in {"input", "output"}:
        path, side = name, "output"
    if model_family(model) == "gemma3_multimodal" and path.startswith("model.layers."):
        path = path.replace("model.layers.", "model.language_model.layers.", 1)
    return Site.model_validate({"path": path, "side": side})


def module_site(name: str, model: str | None, *, side: Literal["input", "output"] = "output") -> Site | None:
    """Returns the site of a module path relative to the model without its head, as sparsify names them.

    Args:
        name: e.g. `layers.5.mlp`, `h.5.attn`, `embed_tokens`, or with underscore `layer_5`.
        model: the model's name; a path that several architectures have stays relative where it does not tell.
        side: which side of the module.
    """
    name = re.sub(r"^(model|transformer|gpt_neox)\.", "", name)
    name = re.sub(r"^layer_(\d+)", r"layers.\1", name)
    family = model_family(model)
    known: Mapping[str, str] = {"embed_tokens": "model.", "embed_in": "gpt_neox.", "wte": "transformer."}
    if name.startswith("h."):
        prefix: str | None = "transformer."
    elif re.match(r"layers\.\d+\.attention\b", name):
        prefix = "gpt_neox."
    elif re.match(r"layers\.\d+", name):
        # A model that nothing names has its own prefix, which is found when the model is there.
        prefix = None if family == "gpt2" else "" if family is None else _LAYERS[family].removesuffix("layers")
    else:
        prefix = known.get(name)
    if prefix is None:
        return None
    return Site(path=prefix + name, side=side)


assert set(_TABLES) == set(_LAYERS) == set(get_args(Family))
