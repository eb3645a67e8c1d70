"""Adam for a decoder with unit rows: projected gradient, one norm for all, one learning rate a group."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from saekit.training.axis import Axis
from saekit.training.config import TrainConfig
from saekit.training.fused_adam import FusedAdam, total_square
from saekit.training.low_bit import LowBitAdamW
from saekit.training.muon import Muon
from saekit.training.schedule_free import ScheduleFreeSignum

__all__ = ["GradientClip", "build_optimizer", "project_decoder_gradient", "set_learning_rates"]

CLIP_MEMORY_STEPS = 20


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    config: TrainConfig,
    *,
    lr: float,
    has_unit_rows: bool = True,
    num_sites: int | None = None,
) -> torch.optim.Optimizer:
    """Returns the optimizer over the named parameters; log-thresholds have a learning rate of their own.

    Args:
        has_unit_rows: whether W_dec's rows are kept at unit norm, and its gradient without the part along them.
        num_sites: parts of W_dec's rows whose norms are kept at a sum of 1, without that projection; None = they are not.
    """
    groups = [
        {
            "params": [parameter],
            "name": name,
            "peak_lr": config.sparsity.threshold_lr if name == "log_threshold" else lr,
        }
        for name, parameter in parameters.items()
    ]
    if config.optimizer == "muon":
        return Muon(groups, lr=lr, betas=config.adam_betas)
    if config.optimizer == "adamw8bit":
        return LowBitAdamW(groups, lr=lr, betas=config.adam_betas, weight_decay=config.weight_decay or 0.0)
    if config.optimizer == "signum":
        is_held = has_unit_rows or num_sites is not None
        kept = [
            group | {"has_unit_rows": is_held and group["name"] == "W_dec", "num_sites": num_sites or 1}
            for group in groups
        ]
        return ScheduleFreeSignum(kept, lr=lr)
    return FusedAdam(groups, lr=lr, betas=config.adam_betas, unit_rows={"W_dec"} if has_unit_rows else ())


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


@torch.no_grad()
def project_decoder_gradient(W_dec: nn.Parameter) -> None:
    """Removes from each row of W_dec's gradient the part along the row, which only the renormalisation would undo."""
    assert W_dec.grad is not None, "projection before backward"
    along = (W_dec.grad * W_dec).sum(1, keepdim=True)
    W_dec.grad.addcmul_(along, W_dec, value=-1)


class GradientClip:
    """Limits the norm of the whole gradient to a multiple of its running mean.

    A fixed limit does not work here: the usual norm is 0.02 at the end of training and 0.05 at its start (loss = FVU), and a
    single token of fifteen times the typical norm brings it to 0.8, which Adam's second moments remember for 1,000 steps.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.mean: float | None = None

    @torch.no_grad()
    def apply(self, parameters: Mapping[str, nn.Parameter], latents: Axis | None = None) -> Tensor:
        """Scales all gradients together where their norm is too large; returns the norm before, a scalar.

        Args:
            parameters: by name.
            latents: processes that hold the other features; None = nobody.
        """
        found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        gradients = list(found.values())
        if latents is None or latents.size == 1:
            norm: Tensor = torch.stack([gradient.norm() for gradient in gradients]).norm()
        else:
            norm = total_square({name: gradient.square().sum() for name, gradient in found.items()}, latents).sqrt()
        if self.factor is not None and self.mean is not None:
            scale = (self.factor * self.mean / (norm + torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale)
        return norm

    def scale(self, norm: Tensor) -> Tensor | float:
        """Returns what `apply` multiplies gradients of this norm by; a scalar beside it, which is not waited for."""
        if self.factor is None or self.mean is None:
            return 1.0
        return (self.factor * self.mean / norm).clamp(max=1.0)

    def update(self, norm: float) -> None:
        """Notes a step's norm before clipping."""
        if self.mean is None or self.factor is None:
            self.mean = norm
        else:
            self.mean += (min(norm, self.factor * self.mean) - self.mean) / CLIP_MEMORY_STEPS
