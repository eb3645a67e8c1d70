"""TokenChange as published: the feature's activation clamped up and down inside the dictionary's reconstruction.

Source: Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions", section 2 and the
released notebook: both the clean and the clamped forward run on the reconstruction, without the dictionary's error; every
position is clamped, the first included; changes are averaged over contexts and positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.labelling.evidence.effects import TokenEffects
from saekit.labelling.evidence.steering import SteeredContexts, chosen_features
from saekit.labelling.evidence.tokenchange import TokenChangeConfig
from saekit.models import LanguageModel, capture
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE, SitesSAE

__all__ = ["Reconstruction", "clamped_token_change"]


class Reconstruction:
    """Contexts in which the dictionary's reconstruction stands where it writes, without its error.

    Attributes:
        contexts: the same with the model's own hidden states.
        x_hat: the reconstruction, float32 [B, T, D].
    """

    def __init__(self, lm: LanguageModel, sae: SAE, tokens: Tensor, *, where: str = "token change") -> None:
        """Runs the clean forward.

        Raises:
            ConfigError: the dictionary does not say its hook point, or has several.
        """
        if isinstance(sae, SitesSAE):
            raise ConfigError(
                f"{where}: a {sae.cfg.kind} reads several hook points, match = 'clamp' needs one; use match = 'kl'"
            )
        self.contexts = SteeredContexts(lm, sae, tokens, where=where)
        assert sae.hook_point is not None, "a dictionary that says where it writes says where it reads"
        read = capture(lm, tokens, [sae.hook_point])[sae.hook_point]
        with torch.no_grad():
            self._code = sae(read.reshape(-1, read.shape[-1]).to(sae.W_enc.device, sae.W_enc.dtype))
        self._sae = sae
        self.x_hat = self._code.x_hat.float().reshape(*read.shape[:2], -1).to(self.contexts.clean.device)

    def clamped(self, features: Tensor, values: Tensor) -> Tensor:
        """Returns the reconstruction with the activation of `features` [n] set to `values` [n] everywhere, [n, B, T, D]."""
        rows = self._sae.written_rows(features.to(self._sae.W_dec.device)).detach().float().to(self.x_hat.device)
        code = self._code
        own = (code.top_acts * (code.top_indices == features.to(code.top_indices.device)[:, None, None])).sum(-1)
        acts = own.float().reshape(len(features), *self.x_hat.shape[:2], 1).to(self.x_hat.device)  # [n, B, T, 1]
        clamped: Tensor = self.x_hat + (values.to(acts)[:, None, None, None] - acts) * rows[:, None, None]
        return clamped


def clamped_token_change(
    lm: LanguageModel,
    sae: SAE,
    *,
    features: Sequence[int],
    tokens: Tensor,
    config: TokenChangeConfig,
    progress: Progress = NO_PROGRESS,
) -> tuple[TokenEffects, TokenEffects]:
    """Returns the tokens whose logits change most with each feature clamped to `config.clamp`, and to its negative.

    Args:
        features: which to clamp, one at a time.
        tokens: contexts [B, T].

    Returns:
        Effects of kind `tokenchange` and of kind `tokenchange_down`.

    Raises:
        ConfigError: the dictionary does not say its hook point, has several, or lacks one of the features.
    """
    chosen = torch.from_numpy(chosen_features(sae, features))
    reconstruction = Reconstruction(lm, sae, tokens)
    contexts = reconstruction.contexts
    parts: dict[int, list[TokenEffects]] = {1: [], -1: []}
    with torch.no_grad(), progress.task("token change", 2 * len(chosen), "clamps") as task:
        before = _mean_normed(contexts, reconstruction.x_hat[None])
        for chunk in torch.split(chosen, config.batch_features):
            for sign in (1, -1):
                values = torch.full((len(chunk),), sign * config.clamp)
                clamped = reconstruction.clamped(chunk, values)
                change = contexts.logit_change(_mean_normed(contexts, clamped) - before)
                parts[sign].append(
                    TokenEffects.from_logits(
                        "tokenchange" if sign > 0 else "tokenchange_down",
                        chunk.numpy(),
                        change,
                        num=config.num_tokens,
                        strength=values.numpy(),
                    )
                )
                task.advance(len(chunk))
    up, down = parts[1], parts[-1]
    return (
        TokenEffects.join(up) if up else TokenEffects.empty("tokenchange"),
        TokenEffects.join(down) if down else TokenEffects.empty("tokenchange_down"),
    )


def _mean_normed(contexts: SteeredContexts, hidden: Tensor) -> Tensor:
    """Returns the normed last hidden states averaged over all positions, [n, D]."""
    normed: Tensor = contexts.unembedding.norm(contexts.last_hidden(hidden))
    return normed.float().mean(dim=(1, 2))
