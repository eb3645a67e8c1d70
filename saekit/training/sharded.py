"""An SAE whose features are spread over processes: its parts, what they make together, and how they become one again."""

import torch
from saekit_kernels import decode, encode_batch_topk
from torch import Tensor

from saekit.sae.base import SAE, SAEConfig, SAEOutput
from saekit.sae.batchtopk import BatchTopKSAE
from saekit.sae.rows import ActiveRows, RowSAE
from saekit.sae.transcoder import Transcoder
from saekit.training.features import by_feature, names_per_feature
from saekit.training.layout import Layout
from saekit.training.partial import total
from saekit.training.selection import batch_topk_over, topk_over

__all__ = ["forward_as_trained", "forward_over", "gather_sae", "shard_sae"]


@torch.no_grad()
def shard_sae(sae: SAE, layout: Layout) -> SAE:
    """Returns an SAE of this process's features alone, on its device; the whole SAE where no other process has any."""
    if not layout.is_sharded:
        return sae.to(layout.device)
    features = layout.features(sae.d_sae)
    # A copy, not a config of its own: k may be more than the features of one process.
    cfg = sae.cfg.model_copy(update={"d_sae": features.stop - features.start})
    part = type(sae)(cfg, hook_point=sae.hook_point, source=sae.source)
    for name, parameter in part.named_parameters():
        value = sae.get_parameter(name)
        if name in names_per_feature(sae):
            by_feature(name, parameter).copy_(by_feature(name, value)[features])
        else:
            parameter.copy_(value)
    return part.to(layout.device)


@torch.no_grad()
def gather_sae(part: SAE, cfg: SAEConfig, layout: Layout) -> SAE:
    """Returns the whole SAE on the CPU of the main process, of the parts that the processes of its row hold.

    One parameter after another, so that no process's device holds more than one of them whole. On other processes what is
    returned is the part.

    Args:
        part: of this process.
        cfg: of the whole.
        layout: who holds the others.
    """
    if not layout.is_sharded:
        return part
    whole = type(part)(cfg, hook_point=part.hook_point, source=part.source) if layout.is_main_process else part
    for name, parameter in part.named_parameters():
        value = by_feature(name, parameter.detach())
        if name in names_per_feature(part):
            value = torch.cat(list(layout.latents.gather_rows(value, "weights")))
        if layout.is_main_process:
            by_feature(name, whole.get_parameter(name)).copy_(value)
    return whole


def forward_over(layout: Layout, cfg: SAEConfig, sae: SAE, x: Tensor) -> SAEOutput:
    """Returns the reconstruction by all processes' features of x [N, d_in], with this process's entries alone.

    Args:
        layout: who holds the other features.
        cfg: of the whole SAE.
        sae: this process's part.
        x: the same on every process of the row.
    """
    if not layout.is_sharded:
        output: SAEOutput = sae(x)
        return output
    if isinstance(sae, RowSAE):
        return _of_rows(layout, sae, sae.active_rows(x))
    acts, indices = topk_over(layout.latents, sae.encoder_input(x), sae.W_enc, sae.b_enc, cfg.k)  # type: ignore[attr-defined]  # all but the SAEs of rows have one
    x_hat = total(layout.latents, decode(acts, indices, sae.W_dec)) + sae.b_dec
    return SAEOutput(x_hat + sae.skip(x) if isinstance(sae, Transcoder) else x_hat, acts, indices)


def forward_as_trained(layout: Layout, cfg: SAEConfig, sae: BatchTopKSAE, x: Tensor) -> SAEOutput:
    """Returns the reconstruction of x [N, d_in] with the N * k largest entries of the batch, see `forward_over`."""
    k = cfg.k  # type: ignore[attr-defined]  # that of a BatchTopK SAE
    inputs = sae.encoder_input(x)
    if not layout.is_sharded:
        return _of_rows(layout, sae, ActiveRows(*encode_batch_topk(inputs, sae.W_enc, sae.b_enc, k)))
    place = 0, layout.features(cfg.d_sae).start
    code = batch_topk_over(layout.latents, inputs, sae.W_enc, sae.b_enc, k * len(x), place=place)
    return _of_rows(layout, sae, ActiveRows(*code))


def _of_rows(layout: Layout, sae: SAE, rows: ActiveRows) -> SAEOutput:
    if layout.is_sharded:
        x_hat = total(layout.latents, decode(rows.acts, rows.indices, sae.W_dec, offsets=rows.offsets)) + sae.b_dec
    else:
        x_hat = decode(rows.acts, rows.indices, sae.W_dec, sae.b_dec, offsets=rows.offsets)
    return SAEOutput(x_hat, *rows.padded())
