"""Forwards of token rows, brought to the host in the stored dtype and checked there."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saekit.activations.codec import CODECS, AnyArray
from saekit.activations.rows import TokenTable
from saekit.errors import NonFiniteError, StoreError
from saekit.models.hooks import capture
from saekit.models.load import LanguageModel

__all__ = ["BatchCapture", "CapturedBatch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedBatch:
    """Some rows at every hook point."""

    rows: npt.NDArray[np.int64]
    """`[B]` consecutive row ids."""
    stored: dict[str, AnyArray]
    """Hook point -> `[B, T, width]` in the stored form."""
    widths: dict[str, int]
    """Hook point -> width of an activation."""
    norm: dict[str, npt.NDArray[np.float32]]
    """Hook point -> `[B, T]` norm of what is stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _InFlight:
    """A batch whose copies to the host may still be under way."""

    rows: npt.NDArray[np.int64]
    hidden: dict[str, Tensor]
    stored: dict[str, Tensor]
    norm: dict[str, Tensor]
    peak: dict[str, Tensor]
    copied: torch.cuda.Event | None


class BatchCapture:
    """Runs a model over token rows."""

    def __init__(self, lm: LanguageModel, hook_points: Sequence[str], dtype: str, *, shard: int = 0) -> None:
        """Runs nothing yet.

        Args:
            dtype: stored dtype.
            shard: named in errors.
        """
        self._lm = lm
        self._hook_points = tuple(hook_points)
        self._codec = CODECS[dtype]
        self._shard = shard

    def batches(self, table: TokenTable, rows: npt.NDArray[np.int64], batch_size: int) -> Iterator[CapturedBatch]:
        """Yields the rows in order.

        On a device, a batch is copied while the forward of the next one is being queued.

        Args:
            rows: consecutive row ids.
            batch_size: rows a forward.

        Raises:
            NonFiniteError: NaN or Inf in the activations.
            StoreError: a value beyond the stored dtype.
        """
        waiting: _InFlight | None = None
        for first in range(0, len(rows), batch_size):
            following = self._start(table, rows[first : first + batch_size])
            if waiting is not None:
                yield self._finish(waiting)
            waiting = following
        if waiting is not None:
            yield self._finish(waiting)

    def _start(self, table: TokenTable, rows: npt.NDArray[np.int64]) -> _InFlight:
        tokens = torch.from_numpy(table.tokens[rows]).to(torch.int64)
        padding = table.documents[rows] < 0
        mask = torch.from_numpy(~padding).to(torch.int64) if padding.any() else None
        hidden = capture(self._lm, tokens, self._hook_points, attention_mask=mask)
        stored, norm, peak = {}, {}, {}
        for name, values in hidden.items():
            coded = self._codec.encode(values)
            norm[name] = _to_host(torch.linalg.vector_norm(self._codec.decode(coded), dim=-1, dtype=torch.float32))
            stored[name] = _to_host(coded)
            if self._codec.name == "float16":
                peak[name] = _to_host(values.abs().amax(dim=-1).to(torch.float32))
        copied = None
        if any(values.is_cuda for values in hidden.values()):
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch 2
            copied.record()
        return _InFlight(rows=rows, hidden=hidden, stored=stored, norm=norm, peak=peak, copied=copied)

    def _finish(self, batch: _InFlight) -> CapturedBatch:
        if batch.copied is not None:
            batch.copied.synchronize()
        for name, norm in batch.norm.items():
            # A norm is finite only where every component of it is.
            bad = ~torch.isfinite(norm)
            if name in batch.peak:
                bad |= batch.peak[name] > torch.finfo(torch.float16).max
            if bad.any():
                self._refuse(batch, name, bad)
        return CapturedBatch(
            rows=batch.rows,
            stored={name: self._codec.to_array(values) for name, values in batch.stored.items()},
            widths={name: values.shape[-1] for name, values in batch.hidden.items()},
            norm={name: values.numpy() for name, values in batch.norm.items()},
        )

    def _refuse(self, batch: _InFlight, name: str, bad: Tensor) -> None:
        limit = torch.finfo(self._codec.tensor).max if self._codec.tensor.is_floating_point else math.inf
        for row, position in bad.nonzero().tolist():
            values = batch.hidden[name][row, position].to("cpu", torch.float64)
            where = f"hook point {name!r}: shard {self._shard}, row {int(batch.rows[row])}, position {position}"
            if not torch.isfinite(values).all():
                found = "NaN" if values.isnan().any() else "Inf"
                raise NonFiniteError(
                    f"{where}: {found}, needs finite activations; check the model's weights, or load it in a wider dtype"
                )
            worst = float(values[values.abs().argmax()])
            if abs(worst) > limit:
                wider = "bfloat16" if self._codec.name == "float16" else "float32"
                raise StoreError(
                    f"{where}: {worst:,.0f}, {self._codec.name} holds up to {limit:,.0f}; set dtype = {wider!r} and use another"
                    " output folder"
                )


def _to_host(values: Tensor) -> Tensor:
    # From a CUDA device this copies into pinned memory without waiting; elsewhere it must wait, or costs nothing.
    return values.to("cpu", non_blocking=values.is_cuda)
