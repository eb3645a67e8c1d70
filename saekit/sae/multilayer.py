"""Released dictionaries over several layers at once: crosscoders and cross-layer transcoders."""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.sae.activation import Activation, BatchTopK, LayerTopK, TopK, activate
from saekit.sae.base import SAE, SAEConfig, SAEOutput
from saekit.sae.site import Site
from saekit.sae.sparse import dense_to_rows

__all__ = ["MultiLayerConfig", "MultiLayerDictionary"]


class MultiLayerConfig(SAEConfig):
    """What a multi-layer dictionary computes, apart from its numbers."""

    kind: Literal["multilayer"] = "multilayer"
    """Architecture."""
    d_in: int = Field(ge=1)
    """Width of each layer's input."""
    d_sae: int
    """Features of each source of features: of each layer, or of all layers together where they share them."""
    d_out: int = Field(ge=1)
    """Width of each layer's reconstruction."""
    apply_b_dec_to_input: Literal[False] = False
    """A bias that the release subtracts from its input is folded into b_enc."""
    num_layers_in: int = Field(ge=1)
    """Layers that are read."""
    num_layers_out: int = Field(ge=1)
    """Layers that are reconstructed."""
    encoder: Literal["own", "sum", "sum_per_layer"]
    """`own`: each layer's features read that layer. `sum`: one set of features reads all layers. `sum_per_layer`: the same
    pre-activations for every layer, but each layer has its thresholds and so its activations."""
    targets: tuple[tuple[int, int], ...]
    """For each source: the first layer that it writes to, and to how many from there on."""
    activation: Activation
    """The nonlinearity."""
    sites: tuple[Site, ...] | None = None
    """Where each layer's input is read; None when the release does not say."""
    sites_out: tuple[Site, ...] | None = None
    """Where each layer's reconstruction belongs; None: where the inputs are read."""

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        encoder: Literal["own", "sum", "sum_per_layer"],
        activation: Activation,
        sites: tuple[Site, ...] | None = None,
        sites_out: tuple[Site, ...] | None = None,
    ) -> Self:
        """Returns the config whose shapes these weights have.

        Decoders of `sum_per_layer` write to their own layer, all others to the last layers: as many as they have rows for.

        Args:
            tensors: the weights, named as in `MultiLayerDictionary`.
            encoder, activation, sites, sites_out: as the fields.
        """
        num_in, d_in, d_sae = tensors["W_enc"].shape
        num_out, d_out = tensors["b_dec"].shape
        reach = [tensors[f"decoders.{source}"].shape[1] for source in range(len(tensors["b_enc"]))]
        return cls(
            d_in=d_in,
            d_sae=d_sae,
            d_out=d_out,
            num_layers_in=num_in,
            num_layers_out=num_out,
            encoder=encoder,
            targets=tuple(
                (source if encoder == "sum_per_layer" else num_out - count, count) for source, count in enumerate(reach)
            ),
            activation=activation,
            sites=sites,
            sites_out=sites_out,
        )


class MultiLayerDictionary(SAE):
    """A dictionary whose input and reconstruction have the layer as an axis of their own, the last but one.

    x is [..., L_in, d_in] and x_hat [..., L_out, d_out]. Feature activations are [..., L, d_sae], or [..., d_sae] where all
    layers share one set of features (`encoder = "sum"`).

        p[l] = x[l] @ W_enc[l] + b_enc[l]             each layer its own features
        p    = sum over l of x[l] @ W_enc[l] + b_enc  shared features
        x_hat[j] = sum over sources s that write to j of a[s] @ decoders[s][:, j - first] + b_dec[j] + x[j] @ W_skip[j]

    Attributes:
        cfg: shapes, who reads and writes what, nonlinearity and sites.
        W_enc: [L_in, d_in, d_sae].
        b_enc: [S, d_sae] for S sources of features.
        decoders: S tensors [d_sae, number of layers written to, d_out].
        b_dec: [L_out, d_out].
        W_skip: [L_in, d_in, d_out], or None.
        threshold, score_scale: [S, d_sae], or None.
        hook_point: the sites that are read, separated by commas; None when unknown.
        source: as in `Dictionary`.
    """

    cfg: MultiLayerConfig
    W_skip: nn.Parameter | None
    threshold: nn.Parameter | None
    score_scale: nn.Parameter | None

    def __init__(
        self, cfg: MultiLayerConfig, tensors: Mapping[str, Tensor], *, source: Mapping[str, object] | None = None
    ) -> None:
        """Makes a dictionary of these weights, which are kept, not copied.

        Args:
            tensors: name of an attribute -> its weights, the decoders as `decoders.0` and so on; those that may be None may
                be left out.

        Raises:
            ConfigError: a tensor is missing, has another shape than the config says, or does not belong.
        """
        nn.Module.__init__(self)
        self.cfg = cfg
        self.hook_point = None if cfg.sites is None else ",".join(str(site) for site in cfg.sites)
        self.source = dict(source or {})
        shapes = _shapes(cfg)
        _check(cfg, tensors, shapes)
        for name in shapes:
            if "." not in name:
                tensor = tensors.get(name)
                self.register_parameter(name, None if tensor is None else nn.Parameter(tensor.contiguous()))
        self.decoders = nn.ParameterList(tensors[f"decoders.{s}"].contiguous() for s in range(len(cfg.targets)))

    @property
    def d_out(self) -> int:
        """Width of each layer's reconstruction."""
        return self.cfg.d_out

    @property
    def hook_point_out(self) -> str | None:
        """The sites that are reconstructed, separated by commas."""
        sites = self.cfg.sites_out
        return self.hook_point if sites is None else ",".join(str(site) for site in sites)

    @property
    def num_sources(self) -> int:
        """Sets of features."""
        return len(self.cfg.targets)

    def encoder_input(self, x: Tensor) -> Tensor:
        """Returns x as [N, L_in, d_in] in the dictionary's dtype.

        Raises:
            ConfigError: `x` has other last axes.
        """
        needed = (self.cfg.num_layers_in, self.d_in)
        if tuple(x.shape[-2:]) != needed:
            raise ConfigError(
                f"multi-layer dictionary: x has shape {list(x.shape)}, needs [..., {needed[0]}, {needed[1]}] (layer, width)"
            )
        return x.reshape(-1, *needed).to(self.W_enc.dtype)

    def pre_acts(self, x: Tensor) -> Tensor:
        """Returns what the nonlinearity is given, [N, S, d_sae]."""
        flat = self.encoder_input(x)
        if self.cfg.encoder == "own":
            return torch.einsum("nld,ldf->nlf", flat, self.W_enc) + self.b_enc
        return (torch.einsum("nld,ldf->nf", flat, self.W_enc)[:, None] + self.b_enc).expand(
            len(flat), self.num_sources, self.d_sae
        )

    def encode(self, x: Tensor) -> Tensor:
        """Returns feature activations [..., L, d_sae], or [..., d_sae] where the layers share them, of x [..., L_in, d_in]."""
        acts = self._encode(x)
        layers = () if self.cfg.encoder == "sum" else (self.num_sources,)
        return acts.reshape(*x.shape[:-2], *layers, self.d_sae)

    def encode_layer(self, x: Tensor, layer: int) -> Tensor:
        """Returns one layer's feature activations [..., d_sae] of its input x [..., d_in], where layers have features of their own.

        Raises:
            ConfigError: the features read several layers, or are chosen among all of them.
        """
        if self.cfg.encoder != "own" or isinstance(self.cfg.activation, LayerTopK):
            raise ConfigError(
                "multi-layer dictionary: its features read or compete across layers, needs the input of all of them"
            )
        pre_acts = x.to(self.W_enc.dtype).reshape(-1, self.d_in) @ self.W_enc[layer] + self.b_enc[layer]
        threshold, scale = (None if part is None else part[layer] for part in (self.threshold, self.score_scale))
        acts = activate(self.cfg.activation, pre_acts, threshold=threshold, score_scale=scale)
        return acts.reshape(*x.shape[:-1], self.d_sae)

    def decode_layer(self, feature_acts: Mapping[int, Tensor], layer: int, x: Tensor | None = None) -> Tensor:
        """Returns the reconstruction [..., d_out] of one layer from the feature activations [..., d_sae] of its sources.

        Args:
            feature_acts: source -> what `encode_layer` returned; sources that do not write to the layer are ignored.
            layer: which one, 0 to num_layers_out - 1.
            x: [..., d_in], this layer's input. Without it the skip connection is left out.
        """
        x_hat = self.b_dec[layer]
        for source, acts in feature_acts.items():
            first, count = self.cfg.targets[source]
            if first <= layer < first + count:
                x_hat = x_hat + acts.to(self.b_dec.dtype) @ self.decoders[source][:, layer - first]
        if x is not None and self.W_skip is not None:
            x_hat = x_hat + x.to(self.W_skip.dtype) @ self.W_skip[layer]
        return x_hat

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (top_acts, top_indices), each [N, K], over the features of all sources: index `s * d_sae + feature`."""
        return dense_to_rows(self._encode(x).flatten(1))

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        """Returns the reconstruction [..., L_out, d_out] of what `encode` returned.

        Args:
            x: [..., L_in, d_in], the input they come from. Without it the skip connection is left out.
        """
        acts = feature_acts.to(self.b_dec.dtype)
        outer = acts.shape[:-1] if self.cfg.encoder == "sum" else acts.shape[:-2]
        flat = acts.reshape(-1, self.num_sources, self.d_sae)
        x_hat = self.b_dec.expand(len(flat), *self.b_dec.shape).clone()
        for source, (first, count) in enumerate(self.cfg.targets):
            part = torch.einsum("nf,ftd->ntd", flat[:, source], self.decoders[source])
            x_hat[:, first : first + count] += part
        if x is not None and self.W_skip is not None:
            x_hat = x_hat + torch.einsum("nld,lde->nle", self.encoder_input(x), self.W_skip)
        return x_hat.reshape(*outer, *self.b_dec.shape)

    def decode_sparse(self, top_acts: Tensor, top_indices: Tensor, x: Tensor | None = None) -> Tensor:
        """Returns the reconstruction [N, L_out, d_out] of top_acts [N, K] at top_indices [N, K]; `x` as in `decode`."""
        dense = top_acts.new_zeros(len(top_acts), self.num_sources * self.d_sae)
        dense = dense.scatter_add(1, top_indices, top_acts)
        layers = () if self.cfg.encoder == "sum" else (self.num_sources,)
        return self.decode(dense.reshape(len(top_acts), *layers, self.d_sae), x)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and reconstructs x [N, L_in, d_in]; x_hat is [N, L_out, d_out], skip connection included."""
        acts = self._encode(x)
        layers = () if self.cfg.encoder == "sum" else (self.num_sources,)
        return SAEOutput(self.decode(acts.reshape(len(acts), *layers, self.d_sae), x), *dense_to_rows(acts.flatten(1)))

    def scale_thresholds(self, factor: float) -> None:
        """Multiplies every threshold by `factor`; nothing where there are none."""
        if self.threshold is not None:
            with torch.no_grad():
                self.threshold.mul_(factor)

    def _encode(self, x: Tensor) -> Tensor:
        return activate(
            self.cfg.activation, self.pre_acts(x), threshold=self.threshold, score_scale=self.score_scale
        )  # [N, S, d_sae]


def _shapes(cfg: MultiLayerConfig) -> dict[str, list[int]]:
    sources = [len(cfg.targets), cfg.d_sae]
    return {
        "W_enc": [cfg.num_layers_in, cfg.d_in, cfg.d_sae],
        "b_enc": sources,
        "b_dec": [cfg.num_layers_out, cfg.d_out],
        "W_skip": [cfg.num_layers_in, cfg.d_in, cfg.d_out],
        "threshold": sources,
        "score_scale": sources,
    } | {f"decoders.{source}": [cfg.d_sae, count, cfg.d_out] for source, (_, count) in enumerate(cfg.targets)}


def _check(cfg: MultiLayerConfig, tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> None:
    needed = {"own": cfg.num_layers_in, "sum": 1, "sum_per_layer": cfg.num_layers_out}[cfg.encoder]
    if len(cfg.targets) != needed:
        raise ConfigError(f"multi-layer dictionary: {len(cfg.targets)} sources of features, needs {needed}")
    if any(first < 0 or count < 1 or first + count > cfg.num_layers_out for first, count in cfg.targets):
        raise ConfigError(f"multi-layer dictionary: targets {cfg.targets}, needs layers 0 to {cfg.num_layers_out - 1}")
    if cfg.activation.kind in {"gated", "groupmax"}:
        raise ConfigError(
            f"multi-layer dictionary: activation {cfg.activation.kind!r}, needs one without gates or groups"
        )
    optional = {"W_skip", "score_scale"} | ({"threshold"} if cfg.activation.kind != "jumprelu" else set())
    most = cfg.d_sae * len(cfg.targets) if isinstance(cfg.activation, BatchTopK) else cfg.d_sae
    if isinstance(cfg.activation, TopK | LayerTopK | BatchTopK) and cfg.activation.k > most:
        raise ConfigError(f"multi-layer dictionary: k is {cfg.activation.k}, needs at most {most} to choose from")
    missing = [name for name in shapes if name not in tensors and name not in optional]
    foreign = sorted(tensors.keys() - shapes.keys())
    if missing or foreign:
        raise ConfigError(
            f"multi-layer dictionary: tensors {sorted(tensors)}, needs {sorted(shapes.keys() - optional)}"
        )
    if "W_skip" in tensors and cfg.num_layers_in != cfg.num_layers_out:
        raise ConfigError("multi-layer dictionary: a skip connection, needs as many layers out as in")
    for name, tensor in tensors.items():
        if list(tensor.shape) != shapes[name]:
            raise ConfigError(f"multi-layer dictionary: {name} is {list(tensor.shape)}, needs {shapes[name]}")
