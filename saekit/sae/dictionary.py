"""A released dictionary of one site: frozen weights in canonical form, an explicit activation, input and output of any width."""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field
from saekit_kernels import encode_threshold, encode_topk
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.sae.activation import Activation, BatchTopK, GroupMax, JumpReLU, MatchingPursuit, TopK, activate, pursue
from saekit.sae.base import SAE, SAEConfig, SAEOutput
from saekit.sae.site import Site
from saekit.sae.sparse import dense_to_rows, pad_rows

__all__ = ["Dictionary", "DictionaryConfig"]

NORM_EPS = 1e-5
_NORMED = "_saekit_normed"


class DictionaryConfig(SAEConfig):
    """What a released dictionary computes, apart from its numbers."""

    kind: Literal["dictionary"] = "dictionary"
    """Architecture."""
    d_out: int = Field(ge=1)
    """Width of the reconstruction; another site's than the input's for a transcoder."""
    apply_b_dec_to_input: Literal[False] = False
    """A bias that the release subtracts from its input is folded into b_enc."""
    activation: Activation
    """The nonlinearity."""
    norm: Literal["none", "layer_norm", "constant_norm"] = "none"
    """What each token goes through first: nothing, `(x - mean) / (std + 1e-5)` with the unbiased std, or
    `x * sqrt(d_in) / |x|`."""
    undo_norm: bool = True
    """Whether the reconstruction is brought back to the token's own mean and scale."""
    joins_heads: bool = False
    """Whether x may also be [..., heads, width of a head], as TransformerLens keeps what an attention's output
    projection reads; heads are then joined, and `forward` returns the reconstruction joined."""
    site: Site | None = None
    """Where the input is read; None when the release does not say."""
    site_out: Site | None = None
    """Where the reconstruction belongs; None: where the input is read."""


class _Normed(NamedTuple):
    """A normalised batch and what undoes it: `x_hat = y * scale + shift`."""

    u: Tensor
    scale: Tensor | None
    shift: Tensor | None


class Dictionary(SAE):
    """`x_hat = act(norm(x) @ W_enc + b_enc) @ W_dec + b_dec + x @ W_skip`, brought back by the inverse of the norm.

    Every scale, mean and input bias of the release is folded into the weights, so that the input is what the model has at
    `hook_point` (after `cfg.site.transform`). For inference: its losses and schedules are its maker's.

    Attributes:
        cfg: shapes, nonlinearity, normalisation and sites.
        W_enc: [d_in, d_sae], a transposed view of contiguous [d_sae, d_in] memory.
        b_enc: [d_sae]; for Gated the bias of the gate.
        W_dec: [d_sae, d_out], of the norms that the release has.
        b_dec: [d_out].
        W_skip: [d_in, d_out], or None.
        threshold: [d_sae], or None; JumpReLU.
        score_scale: [d_sae], or None: top-k compares `p * score_scale` and returns `p`.
        b_mag, r_mag: [d_sae], or None; Gated: `m = (u @ W_enc) * exp(r_mag) + b_mag`.
        W_glu, b_glu: [d_in, d_sae] and [d_sae], or None: pre-activations are multiplied by `sigmoid(u @ W_glu + b_glu)`.
        hook_point: module path whose output (or ":input") the dictionary reads; None when unknown.
        source: format, repo, revision, files with sha256, units of the activations, and the peer's metadata as it stands.
    """

    cfg: DictionaryConfig
    W_skip: nn.Parameter | None
    threshold: nn.Parameter | None
    score_scale: nn.Parameter | None
    b_mag: nn.Parameter | None
    r_mag: nn.Parameter | None
    W_glu: nn.Parameter | None
    b_glu: nn.Parameter | None

    def __init__(
        self, cfg: DictionaryConfig, tensors: Mapping[str, Tensor], *, source: Mapping[str, object] | None = None
    ) -> None:
        """Makes a dictionary of these weights, which are kept, not copied.

        Args:
            tensors: name of an attribute -> its weights; those that may be None may be left out.

        Raises:
            ConfigError: a tensor is missing, has another shape than the config says, or does not belong.
        """
        nn.Module.__init__(self)
        self.cfg = cfg
        self.hook_point = None if cfg.site is None else str(cfg.site)
        self.source = dict(source or {})
        shapes = _shapes(cfg)
        _check(cfg, tensors, shapes)
        for name in shapes:
            tensor = tensors.get(name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(_laid_out(name, tensor)))

    @property
    def is_transcoder(self) -> bool:
        """Whether it has a skip, another width out than in, or another site of its reconstruction."""
        return self.W_skip is not None or self.d_in != self.d_out or self.cfg.site_out not in {None, self.cfg.site}

    @property
    def hook_point_out(self) -> str | None:
        """The hook point of the reconstruction."""
        return self.hook_point if self.cfg.site_out is None else str(self.cfg.site_out)

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.cfg.d_out

    def encoder_input(self, x: Tensor) -> Tensor:
        """Returns what the encoder multiplies, `norm(x)`, as [N, d_in].

        Raises:
            ConfigError: `x` has another width than d_in.
        """
        return _normed(self, x).u

    def pre_acts(self, x: Tensor) -> Tensor:
        """Returns what the nonlinearity is given, dense [N, d_sae]; for Gated what the gate compares with 0."""
        u = self.encoder_input(x)
        return _pre_acts(self, u, u @ self.W_enc)

    def encode(self, x: Tensor) -> Tensor:
        """Returns dense feature activations [..., d_sae] of x [..., d_in]; negative ones only where the release has them."""
        outer = x.shape[:-1] if self._is_joined(x) else x.shape[:-2]
        normed = _normed(self, x)
        acts = self._dense_code(normed.u).reshape(*outer, self.d_sae)
        if self.cfg.norm != "none":
            # So that `decode` of this very tensor needs no `x`, as callers of other libraries' SAEs expect.
            acts.__dict__[_NORMED] = normed
        return acts

    def _dense_code(self, u: Tensor) -> Tensor:
        # In half precision a dense product is rounded before features are chosen, the kernels' after: only one can be right.
        code = self._rows(u) if u.dtype in {torch.float16, torch.bfloat16} else None
        if code is None:
            return self._encode(u)
        return u.new_zeros(len(u), self.d_sae).scatter_add(1, code[1], code[0])

    def _is_joined(self, x: Tensor) -> bool:
        """Whether the last axis is the input's width, not that of one of its heads."""
        return not (self.cfg.joins_heads and x.ndim > 1 and x.shape[-1] < self.d_in == x.shape[-2] * x.shape[-1])

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (top_acts [N, K], top_indices [N, K] int64), the largest magnitude first; places not used hold 0 and 0.

        K is the most features that any token uses.
        """
        u = self.encoder_input(x)
        return self._rows(u) or dense_to_rows(self._encode(u))

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        """Returns the reconstruction [..., d_out] of dense feature activations [..., d_sae].

        Args:
            x: [..., d_in], the input they come from. Without it the skip connection is left out.

        Raises:
            ConfigError: each token was normalised by its own statistics, `x` is not given, and this is not the tensor that
                `encode` returned.
        """
        y = feature_acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec
        normed = feature_acts.__dict__.get(_NORMED) if x is None else None
        if normed is not None:
            return _undone(self, y.reshape(-1, self.d_out), normed).reshape(y.shape)
        return _finished(self, y.reshape(-1, self.d_out), x).reshape(y.shape)

    def decode_sparse(self, top_acts: Tensor, top_indices: Tensor, x: Tensor | None = None) -> Tensor:
        """Returns the reconstruction [N, d_out] of top_acts [N, K] at top_indices [N, K]; `x` as in `decode`."""
        return _finished(self, super().decode_sparse(top_acts, top_indices).to(self.W_dec.dtype), x)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and reconstructs x [N, d_in], skip connection and normalisation included."""
        top_acts, top_indices = self.encode_sparse(x)
        return SAEOutput(self.decode_sparse(top_acts, top_indices, x), top_acts, top_indices)

    def scale_thresholds(self, factor: float) -> None:
        """Multiplies every threshold by `factor`; nothing where there are none."""
        if self.threshold is not None:
            with torch.no_grad():
                self.threshold.mul_(factor)

    def with_activation(self, activation: Activation, threshold: Tensor | None = None) -> Self:
        """Returns a dictionary of the same weights with another nonlinearity, e.g. the one that another library computes.

        Args:
            threshold: [d_sae] or [1] for JumpReLU; None keeps what is there.
        """
        kept = {name: value.detach() for name, value in self.named_parameters()}
        if activation.kind != "jumprelu":
            kept.pop("threshold", None)
        elif threshold is not None:
            kept["threshold"] = threshold.to(self.b_enc).expand(self.d_sae).clone()
        cfg = self.cfg.model_copy(update={"activation": activation})
        return type(self)(cfg, kept, source=self.source)

    def _rows(self, u: Tensor) -> tuple[Tensor, Tensor] | None:
        """What `encode_sparse` returns, where a kernel computes it."""
        if self.W_glu is not None or self.score_scale is not None:
            return None
        code = _encode_by_kernel(self, u)
        return None if code is None else (code[0].to(u.dtype), code[1])

    def _encode(self, u: Tensor) -> Tensor:
        if isinstance(self.cfg.activation, MatchingPursuit):
            return pursue(self.cfg.activation, u - self.b_dec, self.W_dec)
        z = u @ self.W_enc
        magnitude = None
        if self.r_mag is not None and self.b_mag is not None:
            magnitude = z * self.r_mag.exp() + self.b_mag
        return activate(
            self.cfg.activation,
            _pre_acts(self, u, z),
            threshold=self.threshold,
            score_scale=self.score_scale,
            magnitude=magnitude,
        )


def _normed(sae: Dictionary, x: Tensor) -> _Normed:
    if not sae._is_joined(x):
        x = x.flatten(-2)
    if x.ndim == 0 or x.shape[-1] != sae.d_in:
        where = f"dictionary of {sae.hook_point!r}" if sae.hook_point else "dictionary"
        raise ConfigError(f"{where}: x has shape {list(x.shape)}, needs [..., {sae.d_in}]")
    flat = x.reshape(-1, sae.d_in).to(sae.W_enc.dtype)
    match sae.cfg.norm:
        case "none":
            return _Normed(flat, None, None)
        case "layer_norm":
            mean = flat.mean(dim=1, keepdim=True)
            # Not `std`, which warns where there is no token.
            std = ((flat - mean).square().sum(dim=1, keepdim=True) / (sae.d_in - 1)).sqrt()
            return _Normed((flat - mean) / (std + NORM_EPS), std, mean)
        case "constant_norm":
            scale = flat.norm(dim=1, keepdim=True) / sae.d_in**0.5
            return _Normed(flat / scale, scale, None)


def _pre_acts(sae: Dictionary, u: Tensor, z: Tensor) -> Tensor:
    pre_acts = z + sae.b_enc
    if sae.W_glu is None or sae.b_glu is None:
        return pre_acts
    return pre_acts * torch.sigmoid(u @ sae.W_glu + sae.b_glu)


def _encode_by_kernel(sae: Dictionary, u: Tensor) -> tuple[Tensor, Tensor] | None:
    """The code without a dense [N, d_sae] array; None where no kernel computes this nonlinearity."""
    match sae.cfg.activation:
        case TopK(by="value") as top:
            values, indices = encode_topk(u, sae.W_enc, sae.b_enc, top.k)
            if top.negative == "keep" and not bool((values > 0).all()):
                return None
            return values, torch.where(values > 0, indices, 0)
        case JumpReLU() as jump:
            assert sae.threshold is not None
            threshold = sae.threshold if jump.negative == "keep" else sae.threshold.clamp_min(0)
            return pad_rows(*encode_threshold(u, sae.W_enc, sae.b_enc, threshold.detach()))
        case _:
            return None


def _finished(sae: Dictionary, y: Tensor, x: Tensor | None) -> Tensor:
    undone = sae.cfg.norm != "none" and sae.cfg.undo_norm
    if x is None:
        if undone:
            raise ConfigError(
                f"dictionary: normalises each token ({sae.cfg.norm}), needs the input to undo it; use decode(acts, x)"
            )
        return y
    y = _undone(sae, y, _normed(sae, x))
    if sae.W_skip is not None:
        y = y + x.reshape(-1, sae.d_in).to(sae.W_skip.dtype) @ sae.W_skip
    return y


def _undone(sae: Dictionary, y: Tensor, normed: _Normed) -> Tensor:
    if sae.cfg.undo_norm and normed.scale is not None:
        y = y * normed.scale
    if sae.cfg.undo_norm and normed.shift is not None:
        y = y + normed.shift
    return y


def _shapes(cfg: DictionaryConfig) -> dict[str, list[int]]:
    features = [cfg.d_sae]
    return {
        "W_enc": [cfg.d_in, cfg.d_sae],
        "b_enc": features,
        "W_dec": [cfg.d_sae, cfg.d_out],
        "b_dec": [cfg.d_out],
        "W_skip": [cfg.d_in, cfg.d_out],
        "threshold": features,
        "score_scale": features,
        "b_mag": features,
        "r_mag": features,
        "W_glu": [cfg.d_in, cfg.d_sae],
        "b_glu": features,
    }


def _check(cfg: DictionaryConfig, tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> None:
    needed = ["W_enc", "b_enc", "W_dec", "b_dec"]
    needed += {"jumprelu": ["threshold"], "gated": ["b_mag", "r_mag"]}.get(cfg.activation.kind, [])
    needed += ["W_glu", "b_glu"] if tensors.keys() & {"W_glu", "b_glu"} else []
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ConfigError(f"dictionary: no {', '.join(missing)}, needs it for {cfg.activation.kind!r}")
    foreign = sorted(tensors.keys() - shapes.keys())
    if foreign:
        raise ConfigError(f"dictionary: tensors {', '.join(foreign)}, needs only {', '.join(shapes)}")
    if isinstance(cfg.activation, TopK | BatchTopK | GroupMax) and cfg.activation.k > cfg.d_sae:
        raise ConfigError(f"dictionary: k is {cfg.activation.k}, needs at most d_sae = {cfg.d_sae}")
    if isinstance(cfg.activation, GroupMax) and cfg.d_sae % cfg.activation.k:
        raise ConfigError(f"dictionary: {cfg.d_sae} features in {cfg.activation.k} groups, needs groups of one size")
    if cfg.activation.kind == "layertopk":
        raise ConfigError("dictionary: 'layertopk' chooses among layers, needs a MultiLayerDictionary")
    for name, tensor in tensors.items():
        if list(tensor.shape) != shapes[name]:
            raise ConfigError(f"dictionary: {name} is {list(tensor.shape)}, needs {shapes[name]}")


def _laid_out(name: str, tensor: Tensor) -> Tensor:
    """Encoders in memory as [d_sae, d_in], which the kernels read fastest; everything else row by row."""
    return tensor.T.contiguous().T if name in {"W_enc", "W_glu"} else tensor.contiguous()
