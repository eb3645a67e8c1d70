"""One dictionary's state while it is attached: what it read in the newest forward, and what it puts in its place."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from saekit.errors import ConfigError, HookPointError
from saekit.sae import MLSAE, SAE, Dictionary, MultiLayerDictionary, TemporalDictionary, Transcoder
from saekit.sae.activation import LayerTopK
from saekit.sae.sparse import dense_to_rows

__all__ = ["Attached", "Edit", "LayersAttached", "SingleAttached"]

Edit = Callable[..., Tensor]
"""Feature activations -> changed ones of the same shape; of a dictionary of several layers with the layer's number."""

# Decoders that a mask was meant to hold at zero may keep rounding noise.
_NEGLIGIBLE = 1e-6


class Attached(ABC):
    """What a dictionary read in the newest forward of the model."""

    @property
    @abstractmethod
    def feature_acts(self) -> Tensor:
        """Feature activations after the edit, with gradient: `[B, T, d_sae]`, or `[B, T, L, d_sae]` where layers have their own.

        Raises:
            HookPointError: no forward has reached every place that is read.
        """

    def sparse(self) -> tuple[Tensor, Tensor]:
        """Returns `feature_acts` as (top_acts, top_indices), `[B, T, K]` or `[B, T, L, K]`; places not used hold 0 and 0."""
        acts = self.feature_acts
        top_acts, top_indices = dense_to_rows(acts.reshape(-1, acts.shape[-1]))
        shape = (*acts.shape[:-1], top_acts.shape[-1])
        return top_acts.reshape(shape), top_indices.reshape(shape)

    @abstractmethod
    def see(self, layer: int, x: Tensor) -> None:
        """Takes what the dictionary reads at one of its layers, `[B, T, d_in]`."""

    @abstractmethod
    def write(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Returns one layer's reconstruction `[B, T, d_out]` from edited features, and from those before the edit.

        The second is None where there is no edit: it is the same.
        """


class SingleAttached(Attached):
    """A dictionary that reads and writes at one place each."""

    def __init__(self, sae: SAE, edit: Edit | None) -> None:
        self._sae, self._edit = sae, edit
        self._x: Tensor | None = None
        self._raw: Tensor | None = None
        self._acts: Tensor | None = None

    @property
    def feature_acts(self) -> Tensor:
        """As the base says."""
        if self._acts is None:
            raise HookPointError("attach: nothing was read yet, needs a forward of the model first")
        return self._acts

    def see(self, layer: int, x: Tensor) -> None:
        """Encodes, and edits."""
        self._x, self._raw = x, self._sae.encode(x)
        # An edit may write in place; what it is compared with must stay.
        self._acts = self._raw if self._edit is None else _edited(self._raw, self._edit(self._raw.clone()))

    def write(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Decodes what was read since the last call.

        Raises:
            HookPointError: nothing was: the model reaches the output first.
        """
        if self._x is None or self._raw is None or self._acts is None:
            raise HookPointError(
                "attach: the model reached the output before the input, needs them the other way round"
            )
        x, raw = self._x, self._raw
        # So that a forward never decodes what another one read.
        self._x = self._raw = None
        x_hat = _decoded(self._sae, self._acts, raw, x)
        if self._edit is None:
            return x_hat, None
        with torch.no_grad():
            return x_hat, _decoded(self._sae, raw, raw, x)


class LayersAttached(Attached):
    """A dictionary of several layers; those whose features read one layer each can write as the model runs."""

    def __init__(self, sae: SAE, edit: Edit | None, *, num_layers: int, writes: bool) -> None:
        """Makes the state of one block.

        Raises:
            ConfigError: it is to write and needs layers that come after those it writes to.
        """
        self._sae, self._edit, self._num_layers = sae, edit, num_layers
        self._causal = sae if isinstance(sae, MultiLayerDictionary) and _has_own_features(sae) else None
        self._inputs: dict[int, Tensor] = {}
        self._raw: dict[int, Tensor] = {}
        self._acts: dict[int, Tensor] = {}
        self._sources = _sources(self._causal) if writes and self._causal is not None else []
        if writes and isinstance(sae, MLSAE):
            raise ConfigError(
                "attach: an MLSAE is one SAE at each of its hook points, needs mode 'observe', or sae.at(hook point) attached"
            )
        if writes and self._causal is None:
            raise ConfigError(
                "attach: its features read or compete across layers that come after those it writes to, needs mode 'observe'"
            )

    @property
    def feature_acts(self) -> Tensor:
        """As the base says."""
        if len(self._inputs) < self._num_layers:
            found = f"{len(self._inputs)} of {self._num_layers} places were read"
            raise HookPointError(f"attach: {found}, needs a forward of the model that reaches all of them")
        if self._causal is not None:
            return torch.stack([self._acts[layer] for layer in sorted(self._acts)], dim=-2)
        return self._sae.encode(torch.stack([self._inputs[layer] for layer in sorted(self._inputs)], dim=-2))

    def see(self, layer: int, x: Tensor) -> None:
        """Encodes one layer, and edits."""
        if layer in self._inputs:
            # A layer comes again: another forward has begun.
            for kept in (self._inputs, self._raw, self._acts):
                kept.clear()
        self._inputs[layer] = x
        if self._causal is not None:
            raw = self._causal.encode_layer(x, layer)
            self._raw[layer] = raw
            self._acts[layer] = raw if self._edit is None else _edited(raw, self._edit(raw.clone(), layer))

    def write(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Decodes into one layer from it and those before.

        Raises:
            HookPointError: the model reaches this output before an input that it depends on.
        """
        assert self._causal is not None
        missing = [source for source in self._sources[layer] if source not in self._acts]
        if missing:
            raise HookPointError(
                f"attach: the model reached output {layer} before input {missing[0]}, needs them the other way round"
            )
        x = self._inputs.get(layer)
        acts, raw = ({s: kept[s] for s in self._sources[layer]} for kept in (self._acts, self._raw))
        x_hat = self._causal.decode_layer(acts, layer, x)
        if self._edit is None:
            return x_hat, None
        with torch.no_grad():
            return x_hat, self._causal.decode_layer(raw, layer, x)


def _has_own_features(sae: MultiLayerDictionary) -> bool:
    return sae.cfg.encoder == "own" and not isinstance(sae.cfg.activation, LayerTopK)


def _edited(acts: Tensor, edited: Tensor) -> Tensor:
    if edited.shape != acts.shape:
        raise ConfigError(
            f"attach: edit returned {list(edited.shape)}, needs the shape it was given, {list(acts.shape)}"
        )
    return edited


def _decoded(sae: SAE, acts: Tensor, raw: Tensor, x: Tensor) -> Tensor:
    match sae:
        case Dictionary():
            return sae.decode(acts, x)
        case Transcoder():
            skip = sae.skip(x)
            return sae.decode(acts) + (skip if isinstance(skip, float) else skip.reshape(*x.shape[:-1], sae.d_out))
        case TemporalDictionary():
            # Attention's part is not in the features: it is the rest of the reconstruction.
            x_hat: Tensor = sae(x).x_hat
            return x_hat if acts is raw else x_hat + sae.decode(acts) - sae.decode(raw)
        case _:
            return sae.decode(acts)


def _sources(sae: MultiLayerDictionary) -> list[list[int]]:
    """Returns, for each layer written to, the layers whose features it takes; decoders back into earlier layers must be zero."""
    sources: list[list[int]] = [[] for _ in range(sae.cfg.num_layers_out)]
    for source, (first, count) in enumerate(sae.cfg.targets):
        decoder = sae.decoders[source].detach()
        largest = decoder.abs().amax()
        for layer in range(first, first + count):
            if layer >= source:
                sources[layer].append(source)
            elif bool(decoder[:, layer - first].abs().amax() > _NEGLIGIBLE * largest):
                raise ConfigError(
                    f"attach: features of layer {source} write back to layer {layer}, which the model has computed by then,"
                    " needs mode 'observe'"
                )
    return sources
