"""Low-rank sparse attention: an attention layer rebuilt from many heads of width 1, each of them a feature."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from saekit.errors import ConfigError
from saekit.sae.activation import JumpReLU, ReLU, TopK, activate
from saekit.sae.base import SAEConfig, SAEOutput
from saekit.sae.sequence import SequenceSAE
from saekit.sae.site import Site
from saekit.sae.sparse import dense_to_rows

__all__ = ["LorsaConfig", "LorsaDictionary"]


class LorsaConfig(SAEConfig):
    """What a low-rank sparse attention computes, apart from its numbers."""

    kind: Literal["lorsa"] = "lorsa"
    """Architecture."""
    d_out: int = Field(ge=1)
    """Width of the reconstruction."""
    apply_b_dec_to_input: Literal[False] = False
    """Always false: b_dec belongs to the attention's output."""
    num_heads: int = Field(ge=1)
    """Groups of features; those of one attend alike."""
    d_head: int = Field(ge=1)
    """Width of a group's queries and keys."""
    score_divisor: float = Field(gt=0)
    """Divides the product of query and key."""
    rotary_positions: int = Field(default=0, ge=0)
    """Positions that the rotation tables have; 0: queries and keys are not rotated."""
    rotary_width: int = Field(default=0, ge=0)
    """How much of a query and key is rotated, from its start."""
    rotates_neighbors: bool = True
    """Whether coordinates 2 i and 2 i + 1 are rotated together, or i and i + rotary_width / 2."""
    head_norm_eps: float | None = None
    """Each query and key is divided by `sqrt(mean of squares + eps)` and multiplied by its gain; None: not."""
    activation: TopK | JumpReLU | ReLU = Field(discriminator="kind")
    """The nonlinearity."""
    site: Site | None = None
    """Where the input is read; None when the release does not say."""
    site_out: Site | None = None
    """Where the reconstruction belongs."""


class LorsaDictionary(SequenceSAE):
    """Features that move between tokens: each has a value and an output direction, and attends as its group does.

        q, k = x @ W_query[h] + b_query[h], x @ W_key[h] + b_key[h], normed and rotated where the release does
        p[t] = sum over s <= t of softmax(q[t] . k[s] / score_divisor) * (x[s] @ W_enc + b_enc)
        a = act(p);  x_hat = a @ W_dec + b_dec

    Takes whole sequences, see `SequenceSAE`; feature f belongs to group `f // (d_sae / num_heads)`.

    Attributes:
        W_enc: [d_in, d_sae], values.
        W_dec: [d_sae, d_out], outputs.
        W_query, W_key: [num_heads, d_in, d_head].
        b_query, b_key: [num_heads, d_head].
        q_gain, k_gain: [num_heads, d_head], or None.
        rotary_cos, rotary_sin: [rotary_positions, rotary_width], or None.
        threshold, score_scale: [d_sae], or None; as in `Dictionary`.
        hook_point, hook_point_out, source: as in `Dictionary`.

    Source: He et al. 2025, "Towards understanding the nature of attention with low-rank sparse decomposition", section 3.
    """

    cfg: LorsaConfig
    W_query: nn.Parameter
    W_key: nn.Parameter
    b_query: nn.Parameter
    b_key: nn.Parameter
    q_gain: nn.Parameter | None
    k_gain: nn.Parameter | None
    rotary_cos: nn.Parameter | None
    rotary_sin: nn.Parameter | None
    threshold: nn.Parameter | None
    score_scale: nn.Parameter | None

    def __init__(
        self, cfg: LorsaConfig, tensors: Mapping[str, Tensor], *, source: Mapping[str, object] | None = None
    ) -> None:
        """Makes a dictionary of these weights, which are kept, not copied.

        Args:
            tensors: name of an attribute -> its weights; those that may be None are given where the config asks for them.

        Raises:
            ConfigError: a tensor is missing, has another shape than the config says, or does not belong.
        """
        nn.Module.__init__(self)
        self.cfg = cfg
        self.hook_point = None if cfg.site is None else str(cfg.site)
        self.source = dict(source or {})
        shapes, optional = _shapes(cfg), {"score_scale"}
        missing, foreign = shapes.keys() - optional - tensors.keys(), tensors.keys() - shapes.keys()
        if missing or foreign:
            raise ConfigError(f"lorsa dictionary: tensors {sorted(tensors)}, needs {sorted(shapes.keys() - optional)}")
        for name in _NAMES:
            tensor = tensors.get(name)
            if tensor is not None and list(tensor.shape) != shapes[name]:
                raise ConfigError(f"lorsa dictionary: {name} is {list(tensor.shape)}, needs {shapes[name]}")
            if name == "W_enc" and tensor is not None:
                tensor = tensor.T.contiguous().T
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    @property
    def hook_point_out(self) -> str | None:
        """The hook point of the reconstruction; None when unknown."""
        return None if self.cfg.site_out is None else str(self.cfg.site_out)

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.cfg.d_out

    def encoder_input(self, x: Tensor) -> Tensor:
        """Returns x as [B, T, d_in]; raises as `sequences` does."""
        return self.sequences(x)

    def pre_acts(self, x: Tensor) -> Tensor:
        """Returns what the nonlinearity is given, [B * T, d_sae].

        Raises:
            ConfigError: a sequence is longer than the rotation tables.
        """
        u = self.sequences(x)
        query = self._by_group(u, self.W_query, self.b_query, self.q_gain)
        key = self._by_group(u, self.W_key, self.b_key, self.k_gain)
        value = (
            (u @ self.W_enc + self.b_enc)
            .view(*u.shape[:2], self.cfg.num_heads, self.d_sae // self.cfg.num_heads)
            .transpose(1, 2)
        )
        scale = 1 / self.cfg.score_divisor
        moved = scaled_dot_product_attention(query, key, value, scale=scale, is_causal=True)  # [B, H, T, F / H]
        return moved.transpose(1, 2).reshape(-1, self.d_sae)

    def feature_acts(self, x: Tensor) -> Tensor:
        """Returns dense feature activations [B * T, d_sae]."""
        return activate(self.cfg.activation, self.pre_acts(x), threshold=self.threshold, score_scale=self.score_scale)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and reconstructs x [B, T, d_in] or [T, d_in]; x_hat has x's outer shape."""
        acts = self.feature_acts(x)
        return SAEOutput(self.decode(acts).reshape(*x.shape[:-1], self.d_out), *dense_to_rows(acts))

    def scale_thresholds(self, factor: float) -> None:
        """Multiplies every threshold by `factor`; nothing where there are none."""
        if self.threshold is not None:
            with torch.no_grad():
                self.threshold.mul_(factor)

    def _by_group(self, u: Tensor, weight: Tensor, bias: Tensor, gain: Tensor | None) -> Tensor:
        """Returns queries or keys [B, H, T, d_head]."""
        part = torch.einsum("btd,hde->bhte", u, weight) + bias[:, None]
        if self.cfg.head_norm_eps is not None and gain is not None:
            part = part * (part.square().mean(dim=-1, keepdim=True) + self.cfg.head_norm_eps).rsqrt() * gain[:, None]
        if self.rotary_cos is None or self.rotary_sin is None:
            return part
        length, width = part.shape[2], self.cfg.rotary_width
        if length > self.cfg.rotary_positions:
            raise ConfigError(f"lorsa dictionary: {length} tokens, needs at most {self.cfg.rotary_positions}")
        turned = part[..., :width]
        across = _across(turned, by_neighbors=self.cfg.rotates_neighbors)
        turned = turned * self.rotary_cos[:length] + across * self.rotary_sin[:length]
        return torch.cat([turned, part[..., width:]], dim=-1)


_NAMES = (
    *("W_enc", "b_enc", "W_dec", "b_dec", "W_query", "W_key", "b_query", "b_key"),
    *("q_gain", "k_gain", "rotary_cos", "rotary_sin", "threshold", "score_scale"),
)


def _across(x: Tensor, *, by_neighbors: bool) -> Tensor:
    """Each pair (a, b) of coordinates as (-b, a)."""
    if by_neighbors:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _shapes(cfg: LorsaConfig) -> dict[str, list[int]]:
    if cfg.d_sae % cfg.num_heads:
        raise ConfigError(f"lorsa dictionary: {cfg.num_heads} groups of {cfg.d_sae} features, needs groups of one size")
    if cfg.rotary_width % 2 or cfg.rotary_width > cfg.d_head:
        raise ConfigError(f"lorsa dictionary: rotates {cfg.rotary_width} of {cfg.d_head}, needs an even part of it")
    if isinstance(cfg.activation, TopK) and cfg.activation.k > cfg.d_sae:
        raise ConfigError(f"lorsa dictionary: k is {cfg.activation.k}, needs at most d_sae = {cfg.d_sae}")
    group = [cfg.num_heads, cfg.d_head]
    shapes = {
        "W_enc": [cfg.d_in, cfg.d_sae],
        "b_enc": [cfg.d_sae],
        "W_dec": [cfg.d_sae, cfg.d_out],
        "b_dec": [cfg.d_out],
        "W_query": [cfg.num_heads, cfg.d_in, cfg.d_head],
        "W_key": [cfg.num_heads, cfg.d_in, cfg.d_head],
        "b_query": group,
        "b_key": group,
        "score_scale": [cfg.d_sae],
    }
    if cfg.head_norm_eps is not None:
        shapes |= {"q_gain": group, "k_gain": group}
    if cfg.rotary_positions:
        table = [cfg.rotary_positions, cfg.rotary_width]
        shapes |= {"rotary_cos": table, "rotary_sin": table}
    if cfg.activation.kind == "jumprelu":
        shapes["threshold"] = [cfg.d_sae]
    return shapes
