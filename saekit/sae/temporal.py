"""Temporal dictionaries: what attention over earlier tokens predicts is taken out before the rest is encoded."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from saekit.errors import ConfigError
from saekit.sae.activation import ReLU, TopK, activate
from saekit.sae.base import SAEConfig, SAEOutput
from saekit.sae.sequence import SequenceSAE
from saekit.sae.site import Site
from saekit.sae.sparse import dense_to_rows

__all__ = ["TemporalConfig", "TemporalDictionary"]

_PROJECTIONS = ("k_ctx", "q_target", "v_ctx", "c_proj")


class TemporalConfig(SAEConfig):
    """What a temporal dictionary computes, apart from its numbers."""

    kind: Literal["temporal"] = "temporal"
    """Architecture."""
    apply_b_dec_to_input: bool = True
    """Whether the encoder reads `s * x - b_dec` (True) or `s * x`."""
    num_heads: int = Field(ge=1)
    """Attention heads."""
    num_attention_layers: int = Field(ge=0)
    """Attention layers, one after the other."""
    d_bottleneck: int = Field(ge=1)
    """Width of keys and queries over all heads."""
    k: int | None = None
    """Features a token may use; None: all that are positive."""
    input_scale: float = 1.0
    """Multiplies the input; the reconstruction is divided by it."""
    site: Site | None = None
    """Where the input is read; None when the release does not say."""


class TemporalDictionary(SequenceSAE):
    """Novel codes of a token, given what attention over earlier tokens predicts of it.

    Takes whole sequences, see `SequenceSAE`. Feature activations are the novel codes; `decode` of them is the novel part,
    `forward` adds the predicted part.

        r = s * x - b_dec;  lam = 1 / (4 * d_in)
        each attention layer: z = relu(lam * r @ W_enc); h = relu(attention(z of earlier tokens, z));
            g = h @ W_dec; c = (g . r) / (|g| + 1e-6)^2; r -= c * g; predicted += c * h
        novel = act(lam * r @ W_enc);  x_hat = ((novel + predicted) @ W_dec + b_dec) / s

    Attributes:
        W_enc: [d_in, d_sae]; equal to W_dec.T where the release ties them.
        W_dec: [d_sae, d_in].
        b_dec: [d_in].
        attention: `<layer>_<projection>_<weight or bias>`.

    Source: Bhalla et al. 2025, temporal feature analysis; the definition that SAELens 6 computes.
    """

    cfg: TemporalConfig

    def __init__(
        self, cfg: TemporalConfig, tensors: Mapping[str, Tensor], *, source: Mapping[str, object] | None = None
    ) -> None:
        """Makes a dictionary of these weights: W_enc, W_dec, b_dec, and `attention.<layer>_<projection>_<part>`.

        Raises:
            ConfigError: a tensor is missing, has another shape than the config says, or does not belong.
        """
        nn.Module.__init__(self)
        self.cfg = cfg
        self.hook_point = None if cfg.site is None else str(cfg.site)
        self.source = dict(source or {})
        shapes = _shapes(cfg)
        if tensors.keys() != shapes.keys():
            raise ConfigError(f"temporal dictionary: tensors {sorted(tensors)}, needs {sorted(shapes)}")
        for name, shape in shapes.items():
            if list(tensors[name].shape) != shape:
                raise ConfigError(f"temporal dictionary: {name} is {list(tensors[name].shape)}, needs {shape}")
        self.W_enc = nn.Parameter(tensors["W_enc"].T.contiguous().T)
        self.W_dec = nn.Parameter(tensors["W_dec"].contiguous())
        self.b_dec = nn.Parameter(tensors["b_dec"].contiguous())
        self.attention = nn.ParameterDict(
            {
                name.removeprefix("attention."): nn.Parameter(tensors[name].contiguous())
                for name in shapes
                if "." in name
            }
        )

    def encoder_input(self, x: Tensor) -> Tensor:
        """Returns `s * x - b_dec` as [B, T, d_in]; raises as `sequences` does."""
        scaled = self.sequences(x) * self.cfg.input_scale
        return scaled - self.b_dec if self.cfg.apply_b_dec_to_input else scaled

    def pre_acts(self, x: Tensor) -> Tensor:
        """Returns what the nonlinearity of the novel codes is given, [B * T, d_sae]."""
        residual, _ = self._split(x)
        return (residual @ self.W_enc / (4 * self.d_in)).reshape(-1, self.d_sae)

    def feature_acts(self, x: Tensor) -> Tensor:
        """Returns the novel codes, dense [B * T, d_sae]."""
        return _novel(self.cfg, self.pre_acts(x))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Returns the part of the reconstruction that novel codes [..., d_sae] make, [..., d_in]; not the predicted part."""
        return (feature_acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec) / self.cfg.input_scale

    def decode_sparse(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Returns what `decode` does, [N, d_in], of top_acts [N, K] at top_indices [N, K]."""
        return super().decode_sparse(top_acts, top_indices).to(self.W_dec.dtype) / self.cfg.input_scale

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and reconstructs x [B, T, d_in] or [T, d_in]; x_hat has x's shape, novel and predicted part together."""
        residual, predicted = self._split(x)
        novel = _novel(self.cfg, (residual @ self.W_enc / (4 * self.d_in)).reshape(-1, self.d_sae))
        x_hat = self.decode(novel.reshape(predicted.shape) + predicted).reshape(x.shape)
        return SAEOutput(x_hat, *dense_to_rows(novel))

    def scale_thresholds(self, factor: float) -> None:
        """Does nothing: there are no thresholds."""

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what attention does not predict, [B, T, d_in], and the predicted codes, [B, T, d_sae]."""
        residual = self.encoder_input(x)
        predicted = residual.new_zeros(*residual.shape[:2], self.d_sae)
        for layer in range(self.cfg.num_attention_layers):
            z = torch.relu(residual / (4 * self.d_in) @ self.W_enc)
            hidden = torch.relu(self._attend(layer, z))
            guess = hidden @ self.W_dec
            length = guess.norm(dim=-1, keepdim=True) + 1e-6
            share = (guess * residual).sum(dim=-1, keepdim=True) / length.square()
            predicted = predicted + share * hidden
            residual = residual - share * guess
        return residual, predicted

    def _attend(self, layer: int, z: Tensor) -> Tensor:
        earlier = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], dim=1)
        key, value = self._project(layer, "k_ctx", earlier), self._project(layer, "v_ctx", earlier)
        query = self._project(layer, "q_target", z)
        query, key, value = (_by_head(part, self.cfg.num_heads) for part in (query, key, value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, T, d_sae]
        return self._project(layer, "c_proj", mixed)

    def _project(self, layer: int, name: str, z: Tensor) -> Tensor:
        return linear(z, self.attention[f"{layer}_{name}_weight"], self.attention[f"{layer}_{name}_bias"])


def _novel(cfg: TemporalConfig, pre_acts: Tensor) -> Tensor:
    return activate(ReLU() if cfg.k is None else TopK(k=cfg.k), pre_acts)


def _by_head(part: Tensor, num_heads: int) -> Tensor:
    return part.view(*part.shape[:2], num_heads, part.shape[2] // num_heads).transpose(
        1, 2
    )  # [B, H, T, width of a head]


def _shapes(cfg: TemporalConfig) -> dict[str, list[int]]:
    shapes = {"W_enc": [cfg.d_in, cfg.d_sae], "W_dec": [cfg.d_sae, cfg.d_in], "b_dec": [cfg.d_in]}
    for layer in range(cfg.num_attention_layers):
        for name in _PROJECTIONS:
            width = cfg.d_bottleneck if name in {"k_ctx", "q_target"} else cfg.d_sae
            shapes[f"attention.{layer}_{name}_weight"] = [width, cfg.d_sae]
            shapes[f"attention.{layer}_{name}_bias"] = [width]
    if cfg.d_bottleneck % cfg.num_heads or cfg.d_sae % cfg.num_heads:
        raise ConfigError(
            f"temporal dictionary: {cfg.num_heads} heads, needs a divisor of {cfg.d_bottleneck} and {cfg.d_sae}"
        )
    return shapes
