"""Texts that the subject model writes while a feature is turned up or down, once for each feature, and kept.

Source: Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions", section 3.2. There
texts are written anew for every description; here all labels are judged on the same ones.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.config import Config
from saekit.errors import ConfigError, DataError
from saekit.labelling.evidence.clamp import Reconstruction
from saekit.labelling.evidence.steering import SteeredContexts, chosen_features
from saekit.labelling.generated.config import SteeredConfig
from saekit.labelling.generated.strength import Strengths, clamped_strengths, matched_strengths
from saekit.labelling.store import RecordFile
from saekit.labelling.tokencode import opening, token_ids
from saekit.models import LanguageModel, replace, special_token_ids
from saekit.models.sampling import continuations
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE
from saekit.sae.batch import token_code

__all__ = ["CLEAN", "STEERED_NAME", "SteeredTexts", "Steerer", "steered_texts"]

STEERED_NAME = "steered.jsonl"
CLEAN = -1
"""Stands as feature of the texts that are written with none turned."""
FAR_OFF = 2.0
"""A KL is missed where it is off by more than this factor."""


class SteeredTexts(Config):
    """One feature's set of texts, or the reason why there is none."""

    feature: int
    """Index of the feature in the dictionary; `CLEAN`: of none."""
    setup: str | None = None
    """Hash of how texts are written and strengths matched. Texts of another one are not used."""
    texts: tuple[str, ...] = ()
    """Prompt and what was written after it: for each prompt, each strength and each sample, the last fastest."""
    strengths: tuple[float, ...] = ()
    """Factor of the decoder row, or the activation that was set, one for each of `kl_targets`."""
    kl: tuple[float, ...] = ()
    """KL(clean || steered) at each, nats."""
    status: Literal["done", "failed"] = "done"
    reason: str | None = None
    """Why it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turned:
    """The features of one batch of rows."""

    features: Tensor
    """int64 [B]."""
    rows: Tensor
    """What one unit of each writes, float32 [B, D]."""
    values: Tensor
    """Strengths, float32 [B]."""


class Steerer:
    """Writes texts.

    Args:
        contexts: tokens [B, T] on which strengths are matched, see `steering_contexts`; None for
            `match = "clamp"`, which does so on the prompts.
        start: first guess of each feature's strength, float32 [F].

    Raises:
        ConfigError: the dictionary does not say its hook point, or has several and `match` is `clamp`.
        DataError: the tokenizer makes nothing of a prompt.
    """

    def __init__(
        self,
        lm: LanguageModel,
        sae: SAE,
        config: SteeredConfig,
        *,
        contexts: Tensor | None,
        start: NDArray[np.float32],
        seed: int = 0,
    ) -> None:
        if sae.hook_point_out is None or sae.hook_point is None:
            raise ConfigError(
                "steered texts: the dictionary names no hook point, needs one to steer at; set sae.hook_point"
            )
        self._lm, self._sae, self.config, self._seed = lm, sae, config, seed
        self._start = torch.from_numpy(start)
        self._hook_point, self._hook_point_out = sae.hook_point, sae.hook_point_out
        self._prompts = [torch.tensor([self._ids(prompt)]) for prompt in config.prompts]
        drawn = config.model_dump(mode="json", exclude={"num_sets", "num_trials", "batch_rows"})
        values = [drawn, seed, None if contexts is None else contexts.tolist()]
        self.setup = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
        """See `SteeredTexts.setup`; dictionary and model are those of the folder."""
        self._contexts: SteeredContexts | None = None
        self._reconstructions: list[Reconstruction] = []
        if config.match == "clamp":
            self._reconstructions = [Reconstruction(lm, sae, ids, where="steered texts") for ids in self._prompts]
        else:
            assert contexts is not None, "kl needs texts to match strengths on"
            self._contexts = SteeredContexts(lm, sae, contexts, where="steered texts")

    def write_clean(self) -> SteeredTexts:
        """Returns as many texts as a feature has, written from the same prompts with no feature turned."""
        (texts,) = self._written([self._sae.cfg.d_sae], None)
        return SteeredTexts(feature=CLEAN, setup=self.setup, texts=texts)

    def write(self, features: Sequence[int]) -> list[SteeredTexts]:
        """Returns the sets of some features, all of whose texts are written at once."""
        chosen = torch.from_numpy(chosen_features(self._sae, features, where="steered texts"))
        rows = self._sae.written_rows(chosen.to(self._sae.W_dec.device)).detach().float().to(self._lm.device)
        strengths = self._strengths(chosen, rows)
        reasons = [self._problem(row) for row in strengths.kl.tolist()]
        good = torch.tensor([place for place, reason in enumerate(reasons) if reason is None], dtype=torch.int64)
        texts: list[tuple[str, ...]] = []
        if len(good):
            each = len(self.config.kl_targets) * self.config.num_samples
            turned = _Turned(
                features=chosen[good].repeat_interleave(each),
                rows=rows[good.to(rows.device)].repeat_interleave(each, dim=0),
                values=strengths.values[good].cpu().repeat_interleave(self.config.num_samples, dim=1).flatten(),
            )
            texts = self._written(chosen[good].tolist(), turned)
        of_good = iter(texts)
        return [
            SteeredTexts(
                feature=feature,
                setup=self.setup,
                texts=next(of_good) if reason is None else (),
                strengths=tuple(values),
                kl=tuple(kl),
                status="done" if reason is None else "failed",
                reason=reason,
            )
            for feature, values, kl, reason in zip(
                chosen.tolist(), strengths.values.tolist(), strengths.kl.tolist(), reasons, strict=True
            )
        ]

    def _strengths(self, features: Tensor, rows: Tensor) -> Strengths:
        targets = self.config.kl_targets
        if self._contexts is None:
            return clamped_strengths(self._reconstructions, features, targets)
        return matched_strengths(self._contexts, rows, self._start[features].to(rows), targets)

    def _problem(self, reached: Sequence[float]) -> str | None:
        """Returns why a feature cannot be compared with others; published clamps are taken as they are."""
        if self.config.match == "clamp":
            return None
        for target, kl in zip(self.config.kl_targets, reached, strict=True):
            if not abs(target) / FAR_OFF <= kl <= abs(target) * FAR_OFF:
                return f"no strength moves the model by {abs(target):g} nats, the nearest by {kl:.3g}"
        return None

    def _written(self, features: Sequence[int], turned: _Turned | None) -> list[tuple[str, ...]]:
        """Returns the texts of each feature; None: nothing is turned."""
        config = self.config
        each = len(config.kl_targets) * config.num_samples
        by_prompt: list[list[str]] = []
        for number, ids in enumerate(self._prompts):
            draws = [
                np.random.default_rng((self._seed, feature, number)).random((each, config.num_tokens))
                for feature in features
            ]
            tokens = ids.repeat(len(features) * each, 1)
            with contextlib.nullcontext() if turned is None else self._steered(turned):
                written = continuations(
                    self._lm, tokens, torch.from_numpy(np.concatenate(draws)), temperature=config.temperature
                )
            by_prompt.append([self._text(ids[0].tolist(), row, number) for row in written.tolist()])
        return [
            tuple(text for texts in by_prompt for text in texts[place * each : (place + 1) * each])
            for place in range(len(features))
        ]

    @contextlib.contextmanager
    def _steered(self, turned: _Turned) -> Iterator[None]:
        """Inside the block, every row of a forward has its feature turned where the dictionary writes; the error stays."""
        own: list[Tensor] = []

        def see(hidden: Tensor) -> Tensor:
            x = hidden.reshape(-1, hidden.shape[-1]).to(self._sae.W_enc.device, self._sae.W_enc.dtype)
            acts, indices = (part.reshape(*hidden.shape[:2], -1) for part in token_code(self._sae, x))
            own[:] = [(acts * (indices == turned.features.to(indices.device)[:, None, None])).sum(-1).float()]
            return hidden

        def push(hidden: Tensor) -> Tensor:
            change = turned.values.to(hidden.device)[:, None]
            if own:
                # The published clamp is set at the first position too.
                change = change - own[0].to(hidden.device)
            else:
                change = change.repeat(1, hidden.shape[1])
                # The attention sink of the first forward; later ones see one position each.
                change[:, : int(hidden.shape[1] > 1)] = 0
            return hidden.float() + change[:, :, None] * turned.rows.to(hidden.device)[:, None]

        with contextlib.ExitStack() as stack:
            if self.config.match == "clamp":
                stack.enter_context(replace(self._lm, self._hook_point, see))
            stack.enter_context(replace(self._lm, self._hook_point_out, push))
            yield

    def _ids(self, prompt: str) -> list[int]:
        ids = token_ids(self._lm.tokenizer, prompt)
        if not ids:
            raise DataError(f"steered texts: the tokenizer gives prompt {prompt!r} no tokens, needs at least one")
        return [*opening(self._lm.tokenizer), *ids]

    def _text(self, prompt: list[int], written: list[int], number: int) -> str:
        """Returns prompt and continuation up to the end of the text, as one line."""
        special = special_token_ids(self._lm.tokenizer)
        end = next((place for place, token in enumerate(written) if token in special), len(written))
        # Decoded behind the prompt, as pieces of some tokenizers lose their leading space alone.
        own = prompt[len(opening(self._lm.tokenizer)) :]
        decode = self._lm.tokenizer.decode
        before = decode(own, clean_up_tokenization_spaces=False)
        whole = decode([*own, *written[:end]], clean_up_tokenization_spaces=False)
        return " ".join((self.config.prompts[number] + whole[len(before) :]).split())


def steered_texts(
    steerer: Steerer,
    features: Sequence[int],
    *,
    out: Path,
    with_clean: bool = False,
    progress: Progress = NO_PROGRESS,
) -> dict[int, SteeredTexts]:
    """Returns each feature's set; those that are in the folder are not written again.

    Args:
        out: folder of `steered.jsonl`.
        with_clean: texts written with no feature turned too, under `CLEAN`.
    """
    file = RecordFile(out / STEERED_NAME, SteeredTexts)
    known = {record.feature for record in file.records if record.setup == steerer.setup}
    config = steerer.config
    at_once = max(1, config.batch_rows // (len(config.kl_targets) * config.num_samples))
    left = [feature for feature in features if feature not in known]
    with progress.task("steered texts", len(features), "features", done=len(features) - len(left)) as task:
        for start in range(0, len(left), at_once):
            chunk = left[start : start + at_once]
            file.extend(steerer.write(chunk))
            task.advance(len(chunk))
    if with_clean and CLEAN not in known:
        file.extend([steerer.write_clean()])
    wanted = {*features, *([CLEAN] if with_clean else [])}
    return {r.feature: r for r in file.records if r.feature in wanted and r.setup == steerer.setup}
