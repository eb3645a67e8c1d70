"""What is done with the weights after the last step: averages, constraints, calibration, folding."""

import torch
from torch import Tensor

from saekit.sae.batchtopk import BatchTopKSAE
from saekit.sae.gated import GatedSAE
from saekit.sae.jumprelu import JumpReLUSAE
from saekit.sae.relu import ReLUSAE
from saekit.training.heldout import evaluate_heldout, heldout_figures
from saekit.training.run import TrainRun
from saekit.training.sparsity import calibration_factor, calibration_shift, init_shared_threshold
from saekit.training.start import SAMPLE_TOKENS, read_sample

__all__ = ["finish_weights"]


def finish_weights(run: TrainRun, held_out: Tensor | None) -> dict[str, object]:
    """Turns the trained weights into those of an SAE of raw activations; returns the figures worth keeping with it.

    Args:
        run: after its last step.
        held_out: raw held-out activations; None = no figures of them.
    """
    facts: dict[str, object] = {"normalization_scale": run.normalization.scale}
    run.average.take()
    run.objective.finish()
    if isinstance(run.sae, JumpReLUSAE | ReLUSAE | GatedSAE):
        if held_out is not None:
            found = evaluate_heldout(run.sae, held_out, run.normalization, layout=run.layout, cfg=run.cfg)
            facts["l0_before_calibration"] = found.l0
        facts |= _calibrate(run, run.sae)
    elif isinstance(run.sae, BatchTopKSAE) and run.average.is_on:
        # The threshold followed the weights that were trained, and the averaged ones keep other entries.
        init_shared_threshold(run.sae, _sample(run), run.layout, run.cfg)
    run.normalization.fold(run.sae)
    if held_out is not None:
        facts |= heldout_figures(run.sae, held_out, layout=run.layout, cfg=run.cfg)
    return facts


def _calibrate(run: TrainRun, sae: JumpReLUSAE | ReLUSAE | GatedSAE) -> dict[str, object]:
    """Moves what pre-activations are compared with, by one number for all features, to the target L0 on training tokens."""
    assert sae.cfg.target_l0 is not None
    batches, latents = torch.split(_sample(run), 2048), run.layout.latents
    if isinstance(sae, JumpReLUSAE):
        factor = calibration_factor(sae, batches, sae.cfg.target_l0, latents=latents)
        sae.scale_thresholds(factor)
        return {"threshold_factor": factor}
    shift = calibration_shift(sae, batches, sae.cfg.target_l0, latents=latents)
    sae.b_enc.data.add_(shift)
    return {"bias_shift": shift}


def _sample(run: TrainRun) -> Tensor:
    """Returns normalised training tokens of all processes [n, d_in]."""
    return run.normalization.apply(read_sample(run.source, SAMPLE_TOKENS, run.layout))
