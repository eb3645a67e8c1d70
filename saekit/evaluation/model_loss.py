"""What the language model loses when it reads reconstructions: cross-entropy and KL beside zero and mean ablation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saekit.errors import ModelError, NonFiniteError
from saekit.evaluation.bootstrap import Float64Array, Statistic, Sums
from saekit.evaluation.reconstruction import Candidate, Reconstruction
from saekit.evaluation.selection import LossRows
from saekit.models import (
    LanguageModel,
    Unembedding,
    can_run_from,
    capture,
    find_unembedding,
    parse_hook_point,
    replace,
    run_from,
)
from saekit.progress import NO_PROGRESS, Progress

__all__ = ["LOSS_METRICS", "REFERENCE", "model_loss_sums"]

# Logits of one block of positions [p, V] in float32, of which about four live at once. Measured on one core with V = 49,152,
# D = 576, a row of the table: 1.07 ms a position at 32 MB, 1.22 at 64 MB (memory traffic), 1.35 at 8 MB (thin products).
_BLOCK_BYTES = 32 * 2**20


def _recovered(lost: Float64Array, available: Float64Array) -> Float64Array:
    """`lost / available`, NaN where the ablation costs nothing: there is nothing to recover then."""
    return np.where(available > 0, lost / np.where(available > 0, available, 1.0), np.nan)


LOSS_METRICS: Mapping[str, Statistic] = MappingProxyType(
    {
        "ce": lambda s: s["ce"] / s["positions"],
        "delta_ce": lambda s: (s["ce"] - s["ce_clean"]) / s["positions"],
        "ce_recovered_zero": lambda s: _recovered(s["ce_zero"] - s["ce"], s["ce_zero"] - s["ce_clean"]),
        "ce_recovered_mean": lambda s: _recovered(s["ce_mean"] - s["ce"], s["ce_mean"] - s["ce_clean"]),
        "kl": lambda s: s["kl"] / s["positions"],
        "kl_recovered_zero": lambda s: _recovered(s["kl_zero"] - s["kl"], s["kl_zero"]),
        "kl_recovered_mean": lambda s: _recovered(s["kl_mean"] - s["kl"], s["kl_mean"]),
    }
)
"""Metric -> ratio of sums over positions."""

REFERENCE = ("ce_clean", "ce_zero", "ce_mean", "kl_zero", "kl_mean")
"""Sums that all rows of the table share."""


class _Loss(NamedTuple):
    """Per-position losses `[P]` float64."""

    ce: Tensor
    kl: Tensor


def model_loss_sums(
    lm: LanguageModel,
    hook_point: str,
    rows: LossRows,
    candidates: Sequence[Candidate],
    *,
    batch_sequences: int,
    device: torch.device,
    reads: Sequence[str] = (),
    progress: Progress = NO_PROGRESS,
) -> dict[str, Sums]:
    """Returns every candidate's per-document sums: positions, ce, kl and those of `REFERENCE`, each `[num_documents]`.

    Args:
        hook_point: where activations are replaced, at `rows.is_replaced` only.
        candidates: the rows of the table; one of them is named `mean`.
        batch_sequences: token rows a forward.
        device: where the candidates' weights are.
        reads: hook points whose activations, side by side and of the clean forward, the candidates are given; none: those of
            `hook_point`.

    Raises:
        NonFiniteError: the model's loss is NaN or Inf under a candidate.
    """
    variants = [_clean(), _zero(), *candidates]
    num_documents = int(rows.documents[rows.is_counted].max()) + 1
    totals = {v.name: torch.zeros(2, num_documents, dtype=torch.float64) for v in variants}
    forward = _PatchedForward.of(lm, hook_point, tuple(reads) or (hook_point,))
    with progress.task("model loss", int(rows.is_counted.sum()), "tokens") as task:
        for start in range(0, len(rows.tokens), batch_sequences):
            part = slice(start, start + batch_sequences)
            if not rows.is_counted[part].any():
                continue
            numbers = torch.from_numpy(rows.documents[part][rows.is_counted[part]])
            for variant, loss in _batch_losses(forward, rows, part, variants, device).items():
                figures = torch.stack(loss).cpu()
                if not bool(torch.isfinite(figures).all()):
                    raise NonFiniteError(
                        f"evaluate: the model's loss under {variant!r} is NaN or Inf, needs finite logits"
                    )
                totals[variant].index_add_(1, numbers, figures)
            task.advance(len(numbers))
    positions = np.bincount(rows.documents[rows.is_counted], minlength=num_documents).astype(np.float64)
    ce = {name: total[0].numpy() for name, total in totals.items()}
    kl = {name: total[1].numpy() for name, total in totals.items()}
    shared = {
        "positions": positions,
        "ce_clean": ce["clean"],
        "ce_zero": ce["zero"],
        "ce_mean": ce["mean"],
        "kl_zero": kl["zero"],
        "kl_mean": kl["mean"],
    }
    return {c.name: shared | {"ce": ce[c.name], "kl": kl[c.name]} for c in candidates}


def _clean() -> Candidate:
    return Candidate(name="clean", title="nothing replaced", reconstruct=Reconstruction)


def _zero() -> Candidate:
    # One column, for a hook point of any width.
    return Candidate(name="zero", title="zero ablation", reconstruct=lambda x: Reconstruction(x.new_zeros(len(x), 1)))


@torch.no_grad()
def _batch_losses(
    forward: "_PatchedForward", rows: LossRows, part: slice, variants: Sequence[Candidate], device: torch.device
) -> dict[str, _Loss]:
    tokens = torch.from_numpy(rows.tokens[part].astype(np.int64))
    padding = rows.is_padding[part]
    attention_mask = torch.from_numpy((~padding).astype(np.int64)) if padding.any() else None
    batch = _Batch(tokens, attention_mask)
    hidden, read = forward.hidden(batch)
    is_counted = torch.from_numpy(rows.is_counted[part]).to(hidden.device)
    is_replaced = torch.from_numpy(rows.is_replaced[part]).to(hidden.device)
    x = read[is_replaced].to(device=device, dtype=torch.float32)
    states: dict[str, Tensor] = {}
    for variant in variants:
        patched = hidden
        if variant.name != "clean":
            patched = hidden.clone()
            patched[is_replaced] = variant.reconstruct(x).x_hat.to(patched)
        states[variant.name] = forward.states(batch, patched)[is_counted]
    # Shifted by one: position t predicts token t + 1; the last position of a row is never counted.
    targets = tokens.roll(-1, dims=1).to(hidden.device)[is_counted]
    block = max(1, _BLOCK_BYTES // (4 * forward.lm.vocab_size))
    blocks = [
        _losses(forward, {name: state[at : at + block] for name, state in states.items()}, targets[at : at + block])
        for at in range(0, len(targets), block)
    ]
    return {
        name: _Loss(torch.cat([b[name].ce for b in blocks]), torch.cat([b[name].kl for b in blocks])) for name in states
    }


def _losses(forward: "_PatchedForward", states: Mapping[str, Tensor], targets: Tensor) -> dict[str, _Loss]:
    """Cross-entropy of the targets, and KL from the clean distribution, of one block of positions."""
    clean = forward.logits(states["clean"])  # [p, V]
    clean_lse = clean.logsumexp(dim=-1)
    probabilities = (clean - clean_lse[:, None]).exp_()
    losses = {}
    for name, state in states.items():
        logits = clean if name == "clean" else forward.logits(state)
        lse = logits.logsumexp(dim=-1)
        ce = lse - logits.gather(1, targets[:, None])[:, 0]
        # KL = E_clean[clean - patched] + log Z_patched - log Z_clean. Never negative but for rounding, which is cut off.
        kl = torch.einsum("pv,pv->p", probabilities, clean - logits) + (lse - clean_lse)
        losses[name] = _Loss(ce.cpu().double(), kl.clamp_min(0.0).cpu().double())
    return losses


class _Batch(NamedTuple):
    tokens: Tensor
    """`[B, T]` int64."""
    attention_mask: Tensor | None


class _AtFinalNormError(BaseException):
    """Ends a forward in front of the final norm; not an `Exception`, so that no model's own handler takes it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass(frozen=True, slots=True, eq=False)
class _PatchedForward:
    """Forwards of one model with chosen hidden states at a hook point, ended where the vocabulary begins.

    `states` are residual streams before the final norm, from which logits are made a few positions at a time: all logits of
    8 x 1,024 tokens over a vocabulary of 256k would take 8 GB. Where no final norm can be told, or the hook point lies
    behind it, they are the logits themselves.
    """

    lm: LanguageModel
    hook_point: str
    reads: tuple[str, ...]
    unembedding: Unembedding | None

    @classmethod
    def of(cls, lm: LanguageModel, hook_point: str, reads: tuple[str, ...]) -> "_PatchedForward":
        # Asked here, because the first answer for a model takes forwards that must run to their end.
        can_run_from(lm, hook_point)
        try:
            unembedding = find_unembedding(lm)
        except ModelError:
            return cls(lm, hook_point, reads, None)
        point = parse_hook_point(hook_point)
        module = lm.model.get_submodule(point.path)
        is_behind = module is unembedding.head or (module is unembedding.norm and point.side == "output")
        return cls(lm, hook_point, reads, None if is_behind else unembedding)

    def hidden(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Returns the true hidden states at the hook point `[B, T, D]`, and those that are read, side by side."""
        names = list(dict.fromkeys([self.hook_point, *self.reads]))
        found = capture(self.lm, batch.tokens, names, attention_mask=batch.attention_mask)
        read = [found[name] for name in self.reads]
        return found[self.hook_point], read[0] if len(read) == 1 else torch.cat(read, dim=-1)

    def states(self, batch: _Batch, hidden: Tensor) -> Tensor:
        """Returns what `logits` reads, `[B, T, ...]`, if the hidden states at the hook point are `hidden`."""
        if self.unembedding is None:
            return run_from(self.lm, self.hook_point, hidden, batch.tokens, attention_mask=batch.attention_mask)

        def end(final: Tensor) -> Tensor:
            raise _AtFinalNormError(final)

        try:
            with replace(self.lm, f"{self.unembedding.norm_path}:input", end):
                run_from(self.lm, self.hook_point, hidden, batch.tokens, attention_mask=batch.attention_mask)
        except _AtFinalNormError as reached:
            return reached.hidden
        raise ModelError(f"evaluate: {self.unembedding.norm_path!r} did not run in a forward, needs the final norm")

    def logits(self, states: Tensor) -> Tensor:
        """Returns next-token logits `[p, V]` float32 of chosen positions' states."""
        return states if self.unembedding is None else self.unembedding.logits(states)
