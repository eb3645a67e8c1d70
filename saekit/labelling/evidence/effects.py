"""Which tokens a feature makes more or less likely: one record for every way of finding out."""

from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from saekit.errors import StoreError
from saekit.manifest import atomic_write

__all__ = ["EffectKind", "TokenEffects", "effects_path"]

EffectKind = Literal["vocabproj", "tokenchange", "tokenchange_down"]
"""`vocabproj`: logits of the decoder row alone; `tokenchange`: mean change of the model's logits while the feature is turned up;
`tokenchange_down`: while its activation is clamped below zero, which only the paper's way does."""


class TokenEffects:
    """The m most promoted and m most suppressed tokens of n features, in order, with signed values.

    Attributes:
        kind: where the values come from; they are relative to their mean over the vocabulary.
        features: int64 [n], ascending.
        promoted_ids: int64 [n, m]; promoted_values: float32 [n, m], descending.
        suppressed_ids: int64 [n, m]; suppressed_values: float32 [n, m], ascending.
        strength: factor of the decoder row that was added, or the clamp, float32 [n]; NaN where nothing was steered.
        kl: how far that moved the next-token distribution, nats, float32 [n]; NaN where it was not measured.
    """

    def __init__(
        self,
        kind: EffectKind,
        features: NDArray[np.int64],
        *,
        promoted_ids: NDArray[np.int64],
        promoted_values: NDArray[np.float32],
        suppressed_ids: NDArray[np.int64],
        suppressed_values: NDArray[np.float32],
        strength: NDArray[np.float32] | None = None,
        kl: NDArray[np.float32] | None = None,
    ) -> None:
        self.kind = kind
        self.features = features
        self.promoted_ids = promoted_ids
        self.promoted_values = promoted_values
        self.suppressed_ids = suppressed_ids
        self.suppressed_values = suppressed_values
        self.strength = _or_unknown(strength, len(features))
        self.kl = _or_unknown(kl, len(features))
        self._slot = {int(feature): slot for slot, feature in enumerate(features)}

    @classmethod
    def from_logits(
        cls,
        kind: EffectKind,
        features: NDArray[np.int64],
        logits: Tensor,
        *,
        num: int,
        strength: NDArray[np.float32] | None = None,
        kl: NDArray[np.float32] | None = None,
    ) -> "TokenEffects":
        """Keeps the `num` largest and smallest of logits [n, V], after subtracting each row's mean."""
        relative = logits.float() - logits.float().mean(dim=-1, keepdim=True)
        num = min(num, relative.shape[-1])
        high, low = relative.topk(num, dim=-1), relative.topk(num, dim=-1, largest=False)
        return cls(
            kind,
            features,
            promoted_ids=high.indices.cpu().numpy(),
            promoted_values=high.values.cpu().numpy(),
            suppressed_ids=low.indices.cpu().numpy(),
            suppressed_values=low.values.cpu().numpy(),
            strength=strength,
            kl=kl,
        )

    @classmethod
    def empty(cls, kind: EffectKind) -> "TokenEffects":
        """Returns the effects of no feature."""
        ids, values = np.empty((0, 0), dtype=np.int64), np.empty((0, 0), dtype=np.float32)
        return cls(
            kind,
            np.empty(0, dtype=np.int64),
            promoted_ids=ids,
            promoted_values=values,
            suppressed_ids=ids,
            suppressed_values=values,
        )

    @classmethod
    def join(cls, parts: "list[TokenEffects]") -> "TokenEffects":
        """Returns the effects of several disjoint sets of features as one, in ascending order."""
        features = np.concatenate([part.features for part in parts])
        order = np.argsort(features)
        return cls(
            parts[0].kind,
            features[order],
            promoted_ids=np.concatenate([part.promoted_ids for part in parts])[order],
            promoted_values=np.concatenate([part.promoted_values for part in parts])[order],
            suppressed_ids=np.concatenate([part.suppressed_ids for part in parts])[order],
            suppressed_values=np.concatenate([part.suppressed_values for part in parts])[order],
            strength=np.concatenate([part.strength for part in parts])[order],
            kl=np.concatenate([part.kl for part in parts])[order],
        )

    def promoted(self, feature: int) -> list[tuple[int, float]]:
        """Returns (token id, value) of the promoted tokens, strongest first; empty for a feature that was not measured."""
        slot = self._slot.get(feature)
        if slot is None:
            return []
        return list(zip(self.promoted_ids[slot].tolist(), self.promoted_values[slot].tolist(), strict=True))

    def suppressed(self, feature: int) -> list[tuple[int, float]]:
        """Returns (token id, value) of the suppressed tokens, strongest first; empty for a feature that was not measured."""
        slot = self._slot.get(feature)
        if slot is None:
            return []
        return list(zip(self.suppressed_ids[slot].tolist(), self.suppressed_values[slot].tolist(), strict=True))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, atomically."""
        arrays = {
            "features": self.features,
            "promoted_ids": self.promoted_ids,
            "promoted_values": self.promoted_values,
            "suppressed_ids": self.suppressed_ids,
            "suppressed_values": self.suppressed_values,
            "strength": self.strength,
            "kl": self.kl,
        }
        with atomic_write(path) as file:
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            file.write(save(contiguous, metadata={"kind": self.kind}))

    @classmethod
    def open(cls, path: str | Path) -> "TokenEffects":
        """Reads what `save` wrote.

        Raises:
            StoreError: the file is missing or broken.
        """
        try:
            with safe_open(str(path), framework="np") as file:
                kind = (file.metadata() or {}).get("kind")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if kind not in get_args(EffectKind):
                raise StoreError(
                    f"{str(path)!r}: token effects of kind {kind!r}, needs one of {', '.join(get_args(EffectKind))}"
                )
            return cls(cast(EffectKind, kind), arrays.pop("features"), **arrays)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise StoreError(f"{str(path)!r}: cannot be read as token effects: {error}") from error


def effects_path(folder: str | Path, kind: EffectKind) -> Path:
    """Returns where a label folder keeps its effects of one kind."""
    return Path(folder) / f"effects-{kind}.safetensors"


def _or_unknown(values: NDArray[np.float32] | None, size: int) -> NDArray[np.float32]:
    return np.full(size, np.nan, dtype=np.float32) if values is None else values
