"""What every sparse autoencoder shares: parameters, shapes, checks, dense and sparse views of the same code."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, field_validator
from saekit_kernels import decode
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.sae.peer_surface import PeerConfig, PeerSurface

__all__ = ["SAE", "SAEConfig", "SAEOutput"]


class SAEConfig(PeerConfig):
    """What fixes the shape and the nonlinearity of an SAE; subclasses add theirs and narrow `kind`."""

    kind: str
    """Architecture, as the subclass spells it."""
    d_in: int = Field(default=0, ge=0)
    """Width of the activations; 0 = not known yet (a recipe leaves it to the store it trains on)."""
    d_sae: int
    """Number of features."""
    apply_b_dec_to_input: bool = True
    """Whether the encoder reads `x - b_dec` (True) or `x`."""

    @field_validator("d_sae")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("needs a positive number of features")
        return value

    def with_d_in(self, d_in: int) -> Self:
        """Returns the config for activations of width `d_in`.

        Raises:
            ConfigError: the config already names another width.
        """
        return self._with_width("d_in", d_in, "the activations'")

    def _with_width(self, key: Literal["d_in", "d_out"], width: int, whose: str) -> Self:
        known = getattr(self, key)
        if known not in {0, width}:
            raise ConfigError(f"sae: {key} is {known}, needs {whose} width {width}; leave {key} out to take it")
        return type(self).parse(self.to_dict() | {key: width}, where="sae")


class SAEOutput(NamedTuple):
    """A reconstruction and the features that made it."""

    x_hat: Tensor
    """Reconstruction [N, d_in], in the SAE's dtype."""
    top_acts: Tensor
    """Feature activations [N, K], >= 0; 0 in places that are not used."""
    top_indices: Tensor
    """Which features [N, K] int64; 0 in places that are not used."""


class SAE(PeerSurface, ABC):
    """Base of the sparse autoencoders: `x_hat = act((x - b_dec) @ W_enc + b_enc) @ W_dec + b_dec`.

    Every method takes raw activations of the model: input normalisation used in training is folded into the weights.

    Attributes:
        cfg: shape and architecture.
        W_enc: [d_in, d_sae], a transposed view of contiguous [d_sae, d_in] memory, so that one feature's weights lie together.
        b_enc: [d_sae].
        W_dec: [d_sae, d_in], rows of unit norm.
        b_dec: [d_in].
        hook_point: module path whose output (or ":input") the SAE reads; None when unknown.
        source: where the weights come from (model, data, training figures), JSON values.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    has_unit_rows = True
    """Whether `normalize_decoder` gives decoder rows unit Euclidean norm, rather than another size."""

    def __init__(
        self,
        cfg: SAEConfig,
        *,
        seed: int = 0,
        hook_point: str | None = None,
        source: Mapping[str, object] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes an SAE with random unit decoder directions and the encoder tied to them.

        Raises:
            ConfigError: the config does not say d_in.
        """
        super().__init__()
        if cfg.d_in < 1:
            raise ConfigError(f"sae: d_in is {cfg.d_in}, needs the width of the activations; use cfg.with_d_in(width)")
        self.cfg = cfg
        self.hook_point = hook_point
        self.source: dict[str, object] = dict(source or {})
        width_in, width_out = self.widths
        self.W_enc = nn.Parameter(torch.empty(cfg.d_sae, width_in, dtype=dtype).T)
        self.b_enc = nn.Parameter(torch.empty(cfg.d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.empty(cfg.d_sae, width_out, dtype=dtype))
        self.b_dec = nn.Parameter(torch.empty(width_out, dtype=dtype))
        self.reset_parameters(seed)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.cfg.d_in

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed: d_in, but for transcoders."""
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.cfg.d_sae

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of what W_enc multiplies and of what W_dec makes: d_in and d_out, but for crosscoders."""
        return self.d_in, self.d_out

    @property
    def hook_point_out(self) -> str | None:
        """Where the features write: `hook_point`, but for transcoders and dictionaries of several sites."""
        return self.hook_point

    @property
    def is_transcoder(self) -> bool:
        """Whether `x_hat` is a prediction of other activations than those that are read."""
        return False

    def written_rows(self, features: Tensor) -> Tensor:
        """Returns what one unit of each of `features` [n] adds at `hook_point_out`, [n, d_out]."""
        return self.W_dec[features]

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Draws W_dec's directions from `seed`, ties the encoder to them and zeroes the biases."""
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(self.d_sae, self.d_in, generator=generator)
        # The same at every site of a crosscoder: the layers of a model share the basis of its residual stream.
        self.W_dec.copy_(directions.repeat(1, self.W_dec.shape[1] // self.d_in))
        self.normalize_decoder()
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.zero_()

    def decoder_norms(self) -> Tensor:
        """Returns the size of each decoder row, [d_sae]: its Euclidean norm, or for crosscoders the sum of those of its sites."""
        norms: Tensor = self.W_dec.norm(dim=1)
        return norms

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scales every decoder row to size 1; the features' activations are left as they are."""
        norms = self.decoder_norms()
        self.W_dec.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None])

    def encoder_input(self, x: Tensor) -> Tensor:
        """Returns what the encoder multiplies: `x`, less b_dec where the config says so, as [N, d_in] in the SAE's dtype.

        Raises:
            ConfigError: `x` has another width than d_in.
        """
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            where = f"sae of {self.hook_point!r}" if self.hook_point else "sae"
            raise ConfigError(f"{where}: x has shape {list(x.shape)}, needs [..., {self.d_in}]")
        flat = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
        return flat - self.b_dec if self.cfg.apply_b_dec_to_input else flat

    def pre_acts(self, x: Tensor) -> Tensor:
        """Returns the encoder's output before the nonlinearity, dense [N, d_sae]."""
        return self.encoder_input(x) @ self.W_enc + self.b_enc

    @abstractmethod
    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (top_acts [N, K] >= 0, top_indices [N, K] int64) of x [N, d_in]; places not used hold 0 and 0."""

    @abstractmethod
    def scale_thresholds(self, factor: float) -> None:
        """Multiplies whatever is compared with pre-activations by `factor`; nothing where the nonlinearity is scale-free."""

    @torch.no_grad()
    def shift_inputs(self, shift: Tensor) -> None:
        """Adds `shift` [d_sae] to what every feature reads, as if the encoder's input had moved by a constant."""
        self.b_enc.copy_(self.b_enc.double() + shift)

    def encode(self, x: Tensor) -> Tensor:
        """Returns dense feature activations [..., d_sae] of x [..., d_in]."""
        top_acts, top_indices = self.encode_sparse(x.reshape(-1, x.shape[-1]) if x.ndim else x)
        # Unused places point at feature 0 with activation 0, so they must add to it, not overwrite it.
        dense = top_acts.new_zeros(top_acts.shape[0], self.d_sae).scatter_add(1, top_indices, top_acts)
        return dense.reshape(*x.shape[:-1], self.d_sae)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Returns x_hat [..., d_in] of dense feature activations [..., d_sae]."""
        return feature_acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def decode_sparse(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Returns x_hat [N, d_in] of top_acts [N, K] at top_indices [N, K]."""
        return decode(top_acts.to(self.W_dec.dtype), top_indices, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and reconstructs x [N, d_in]."""
        top_acts, top_indices = self.encode_sparse(x)
        return SAEOutput(self.decode_sparse(top_acts, top_indices), top_acts, top_indices)

    def save(self, folder: str | Path) -> None:
        """Writes `cfg.json` and `sae.safetensors` (float32) into `folder`, each atomically."""
        from saekit.sae.checkpoint import save_sae

        save_sae(self, folder)
