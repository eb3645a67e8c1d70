"""What scripts/bench_quality measures of a trained SAE of any library: by our own evaluation, at exactly the wanted L0."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit import SAE, Dictionary, load_sae
from saekit.evaluation.matching import recovery
from saekit.sae import BatchTopKSAE, JumpReLUSAE
from scripts.bench_quality_worker import GATE_TOKENS, sites_of

__all__ = ["measure", "pooled"]

CALIBRATION_TOKENS = 8192
GATE = 2e-3
"""Largest relative difference of FVU and L0 between the library's own code and the SAE that we read from its files."""
BATCH = 1024
MAX_SHIFT = 1.0
"""Most that calibration moves a bias or the logarithm of a threshold; past it the SAE cannot have this L0."""


def measure(
    folder: Path,
    data: Path,
    own: dict[str, float],
    *,
    k: int,
    sites: int = 1,
    site: int | None = None,
    is_transcoder: bool = False,
) -> dict[str, Any]:
    """Returns the figures of the SAE in `folder`; FVU is the mean over hook points, of which several have their own beside it.

    Ends the program if the SAE that we read is not the one that the library has: its own FVU and L0 are `own`. `sites`,
    `site` and `is_transcoder` are those of the job.
    """
    sae = load_sae(folder)

    def parts(rows: Any) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(np.array(rows, dtype=np.float32))
        return sites_of(tokens, sites=sites, site=site, is_transcoder=is_transcoder)

    x, target = parts(np.load(data / "test.npy"))
    documents = torch.from_numpy(np.load(data / "documents.npy"))
    gate = _figures(sae, x[:GATE_TOKENS], target[:GATE_TOKENS], documents[:GATE_TOKENS])
    for name in ("fvu", "l0"):
        # A search may meet an SAE of which nothing is alive: both are 0 then.
        if not math.isclose(gate[name], own[name], rel_tol=GATE, abs_tol=1e-6):
            raise SystemExit(
                f"{folder}: {name} is {gate[name]:.6g} by us, {own[name]:.6g} by its library, needs the same"
            )
    figures = _figures(sae, x, target, documents)
    result = {"raw_fvu": figures["fvu"], "raw_l0": figures["l0"], "dead": figures["dead"]}
    train = np.load(data / "train.npy", mmap_mode="r")[-CALIBRATION_TOKENS:]
    _calibrate(sae, parts(train)[0], float(k))
    figures = _figures(sae, x, target, documents)
    result |= {"fvu": figures["fvu"], "l0": figures["l0"]} | pooled(figures["errors"], figures["variances"])
    truth_path = data / "truth.pt"
    if truth_path.exists():
        truth = torch.load(truth_path)
        fires = torch.cat([sae.encode(part) > 0 for part in torch.split(x, BATCH)])
        found = recovery(
            sae.W_dec,
            fires,
            planted=truth["features"],
            planted_fires=truth["fires"],
            probabilities=truth["probabilities"],
        )
        result |= found._asdict()
    return result


def pooled(errors: Tensor, variances: Tensor) -> dict[str, Any]:
    """Returns per-document sums whose ratio of totals is the mean over hook points of theirs, and of several those of each.

    Args:
        errors: per-document sums of squared error at each hook point, [S, documents].
        variances: the same of the squared distance from the mean.
    """
    # In units of the first one: what a late layer has more of is scale, not weight.
    weights = variances[0].sum() / variances.sum(1, keepdim=True) / len(variances)
    result: dict[str, Any] = {
        "errors": (errors * weights).sum(0).tolist(),
        "variances": (variances * weights).sum(0).tolist(),
    }
    if len(errors) > 1:
        totals = errors.sum(1) / variances.sum(1)
        result["sites"] = [
            {"fvu": float(fvu), "errors": error.tolist(), "variances": variance.tolist()}
            for fvu, error, variance in zip(totals, errors, variances, strict=True)
        ]
    return result


@torch.no_grad()
def _figures(sae: SAE, x: Tensor, target: Tensor, documents: Tensor) -> dict[str, Any]:
    """FVU around the mean of target [N, S, D] from x, L0 of a code, dead fraction, and per-document sums of squared error and
    variance [S, documents]."""
    wide = target.double()
    variance = (wide - wide.mean(0)).square().sum(2)
    errors, active, codes, fired = [], 0, 0, torch.zeros(sae.d_sae, dtype=torch.bool)
    for part, true in zip(torch.split(x, BATCH), torch.split(wide, BATCH), strict=True):
        x_hat, top_acts, top_indices = sae(part)
        errors.append((true - x_hat.reshape(true.shape).double()).square().sum(2))
        active += int((top_acts > 0).sum())
        codes += top_acts.numel() // top_acts.shape[-1]
        fired[top_indices[top_acts > 0]] = True
    error = torch.cat(errors)
    num = int(documents.max()) + 1
    sums = [
        torch.zeros(value.shape[1], num, dtype=torch.float64).index_add(1, documents, value.T)
        for value in (error, variance)
    ]
    return {
        "fvu": float((error.sum(0) / variance.sum(0)).mean()),
        "l0": active / codes,
        "dead": 1 - float(fired.double().mean()),
        "errors": sums[0],
        "variances": sums[1],
    }


@torch.no_grad()
def _calibrate(sae: SAE, x: Tensor, l0: float) -> None:
    """Moves what pre-activations are compared with, by one number for all features, to the wanted L0 on training tokens x.

    Thresholds by a factor; the bias of a ReLU or of a gate by a shift. A top-k SAE has its L0 by itself.
    """
    keep = round(l0 * len(x))
    z = torch.cat([sae.pre_acts(part) for part in torch.split(x, BATCH)])
    threshold = getattr(sae, "threshold", None)
    if isinstance(sae, JumpReLUSAE | BatchTopKSAE) or (isinstance(sae, Dictionary) and threshold is not None):
        assert isinstance(threshold, Tensor)
        ratio = (z.clamp_min(0) / threshold.clamp_min(1e-6)).flatten()
        cut = float(ratio.kthvalue(ratio.numel() - keep).values)
        threshold.clamp_(min=1e-6).mul_(min(max(cut, np.exp(-MAX_SHIFT)), np.exp(MAX_SHIFT)))
        return
    kind = sae.cfg.activation.kind if isinstance(sae, Dictionary) else sae.cfg.kind
    if kind in {"relu", "gated"}:
        if kind == "gated":
            z = z.masked_fill(_magnitudes(sae, z) <= 0, -torch.inf)
        cut = float(z.flatten().kthvalue(z.numel() - keep).values)
        limit = MAX_SHIFT * float(z[z > 0].mean())
        sae.b_enc.sub_(min(max(cut, -limit), limit))


def _magnitudes(sae: Any, z: Tensor) -> Tensor:
    """What a gated SAE gives where the gate is open [N, F]."""
    magnitudes: Tensor = (z - sae.b_enc) * sae.r_mag.exp() + sae.b_mag
    return magnitudes
