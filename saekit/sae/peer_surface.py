"""The attributes by which other libraries' evaluations know an SAE: SAEBench takes our dictionaries as they are."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from saekit.config import Config
from saekit.sae.hook_names import tl_name
from saekit.sae.site import Site, parse_site

__all__ = ["PeerConfig", "PeerSurface", "model_name", "recorded"]

_T = TypeVar("_T")

# What SAEBench 0.6 and the libraries it calls read of a config, with the values that hold for all of ours: folded inputs need
# no normalisation, heads are concatenated, and every position counts.
_DEFAULTS: Mapping[str, object] = {
    "model_name": None,
    "hook_name": None,
    "hook_layer": None,
    "hook_head_index": None,
    "context_size": None,
    "prepend_bos": True,
    "architecture": "",
    "activation_fn_str": "",
    "activation_fn_kwargs": {},
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "dtype": "float32",
    "device": "cpu",
    "model_from_pretrained_kwargs": {},
    "dataset_path": "",
    "dataset_trust_remote_code": False,
    "seqpos_slice": (None,),
    "training_tokens": -1,
    "sae_lens_training_version": None,
    "neuronpedia_id": None,
}
# What they write on it as well.
_WRITTEN = frozenset({*_DEFAULTS, "architecture_str", "exclude_special_tokens", "metadata"})
# Releases whose files do not name their model.
_MODELS: tuple[tuple[str, str], ...] = (
    (r"gemma-scope-(2b|9b|27b)-pt", r"google/gemma-2-\1"),
    (r"gemma-scope-(2b|9b|27b)-it", r"google/gemma-2-\1-it"),
    (r"Llama3_1-8B-Base-", r"meta-llama/Llama-3.1-8B"),
)


class PeerConfig(Config):
    """A config that also answers to the names that other libraries have for what it does not fix: model, hook, dtype, device.

    Those names may be written, as SAEBench does; they are no fields: neither saved nor compared. The fields stay frozen.
    """

    # SAEBench's probing records a config by `dataclasses.asdict`.
    __dataclass_fields__: ClassVar[dict[str, Any]] = {
        field.name: field
        for field in dataclasses.fields(
            dataclasses.make_dataclass("PeerFields", [("d_in", int), ("d_sae", int), *((n, object) for n in _DEFAULTS)])
        )
    }

    @cached_property
    def _told(self) -> dict[str, object]:
        """What the dictionary that has this config, and other libraries, say under those names."""
        return {}

    def own_copy(self) -> Self:
        """Returns an equal config on which nothing was written yet."""
        copy = self.model_copy()
        copy.__dict__.pop("_told", None)
        return copy

    def tell(self, facts: Mapping[str, object]) -> None:
        """Sets what those names answer."""
        self._told.update(facts)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            if name in _WRITTEN:
                if name in self._told:
                    return self._told[name]
                if name in _DEFAULTS:
                    return _DEFAULTS[name]
            return super().__getattr__(name)

        def __setattr__(self, name: str, value: object) -> None:
            if name in _WRITTEN:
                self._told[name] = value
            else:
                super().__setattr__(name, value)


class PeerSurface(nn.Module):
    """What SAEBench asks of an SAE beside weights, encode and decode; `cfg` of its own answers to the names of other libraries."""

    W_dec: nn.Parameter
    b_dec: nn.Parameter
    hook_z_reshaping_mode = False
    """Heads are concatenated already where attention's z is read."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.b_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.b_dec.dtype

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Returns whether every decoder row has unit norm, to 1e-5, or 1e-2 in half precision."""
        tolerance = 1e-5 if self.dtype == torch.float32 else 1e-2
        return bool(((self.W_dec.float().norm(dim=1) - 1).abs() <= tolerance).all())

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Does nothing: nothing is reshaped."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Keeps a config of its own, which knows where the dictionary reads."""
        if name == "cfg" and isinstance(value, PeerConfig):
            value = value.own_copy()
        super().__setattr__(name, value)
        if name in {"cfg", "hook_point", "source"}:
            self._tell_cfg()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has it untyped
        self._tell_cfg()
        return self

    def _tell_cfg(self) -> None:
        cfg, source = self.__dict__.get("cfg"), self.__dict__.get("source")
        if not isinstance(cfg, PeerConfig) or not isinstance(source, dict):
            return
        facts: dict[str, object] = {"architecture": cfg.to_dict().get("kind", ""), **_place(cfg, self, source)}
        for name, keys in (
            ("context_size", ("context_size", "context_len", "ctx_len")),
            ("prepend_bos", ("prepend_bos",)),
        ):
            value = recorded(source, *keys, kind=int)
            if value is not None:
                facts[name] = value
        if "b_dec" in self._parameters:
            facts |= {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        cfg.tell(facts)


def model_name(source: Mapping[str, object]) -> str | None:
    """Returns the model that a dictionary's record names: its own, that of the peer's config, or that of its repository."""
    found = recorded(source, "model_name", "base_model", "lm_name", "model", "tlens_model_name", kind=str)
    if found is not None:
        return found
    ref = source.get("ref")
    for pattern, name in _MODELS:
        match = re.search(pattern, ref) if isinstance(ref, str) else None
        if match:
            return match.expand(name)
    return None


def recorded(source: Mapping[str, object], *keys: str, kind: type[_T]) -> _T | None:
    """Returns the first value of a kind that a record has under one of the keys, outer levels first."""
    for record in _levels(source):
        for key in keys:
            value = record.get(key)
            if isinstance(value, kind):
                return value
    return None


def _levels(source: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    records: list[Mapping[str, object]] = [source]
    while records:
        record = records.pop(0)
        yield record
        records += [value for key, value in record.items() if isinstance(value, dict) and key != "files"]


def _place(cfg: PeerConfig, sae: nn.Module, source: Mapping[str, object]) -> dict[str, object]:
    """Returns model and hook under other libraries' names; nothing of a hook that TransformerLens has no name for."""
    facts: dict[str, object] = {"model_name": model_name(source)}
    site, hook_point = getattr(cfg, "site", None), sae.__dict__.get("hook_point")
    if not isinstance(site, Site):
        if not isinstance(hook_point, str) or "," in hook_point:
            return facts
        site = parse_site(hook_point)
    name = tl_name(site)
    layer = re.match(r"blocks\.(\d+)\.", name or "")
    if name is not None and layer is not None:
        facts |= {"hook_name": name, "hook_layer": int(layer.group(1))}
    if site.transform == "centered":
        facts["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    return facts
