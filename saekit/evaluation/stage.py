"""The evaluate stage: one SAE and its null rows, measured on held-out documents."""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from saekit.activations import NORMAL, StoreView
from saekit.config import Config
from saekit.errors import ConfigError
from saekit.evaluation.bootstrap import Sums
from saekit.evaluation.decoder import decoder_neighbors
from saekit.evaluation.definitions import definitions
from saekit.evaluation.model_loss import model_loss_sums
from saekit.evaluation.nulls import (
    fit_sample,
    mean_candidate,
    measured_l0,
    pca_candidate,
    random_candidate,
    sae_candidate,
)
from saekit.evaluation.reconstruction import Candidate, ReconstructionSums, mean_activation, reconstruction_sums
from saekit.evaluation.record import Evaluation, FeatureMeasures, read_evaluation, write_evaluation
from saekit.evaluation.selection import Selection
from saekit.evaluation.table import MeasuredRow, cosine_histogram, density_histogram, reference_losses
from saekit.manifest import begin_stage, finish_stage, locked
from saekit.models import LanguageModel
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE, Transcoder

__all__ = ["EvaluationConfig", "evaluate", "sae_fingerprint"]

# Below this, percentile intervals of a ratio cover its true value clearly less often than they say.
_FEW_DOCUMENTS = 20


class EvaluationConfig(Config):
    """How much is measured."""

    num_tokens: int = Field(default=65_536, ge=1)
    """Held-out tokens of the reconstruction figures; all of the view's if it has fewer."""
    num_loss_tokens: int = Field(default=8_192, ge=0)
    """Positions of the CE and KL figures, out of the same rows; 0 leaves these figures out."""
    nulls: tuple[Literal["pca", "random"], ...] = ("pca", "random")
    """Null rows beside the mean vector, which is always there."""
    pca_components: int | None = Field(default=None, ge=1)
    """Components of the PCA row; None: as many as the SAE has active features."""
    num_fit_tokens: int = Field(default=32_768, ge=1)
    """Training tokens on which the null rows are fitted."""
    batch_tokens: int = Field(default=4_096, ge=1)
    """Tokens that the rows encode at once."""
    batch_sequences: int = Field(default=8, ge=1)
    """Token rows of one forward of the language model."""
    num_bootstrap: int = Field(default=1_000, ge=0)
    """Resamples of documents behind each interval; 0: no intervals."""
    seed: int = Field(default=0, ge=0)
    """Of the choice of rows, the random dictionary and the resamples."""


@torch.no_grad()
def evaluate(
    sae: SAE,
    view: StoreView,
    *,
    lm: LanguageModel | None = None,
    config: EvaluationConfig | None = None,
    out: str | Path | None = None,
    train: StoreView | None = None,
    progress: Progress = NO_PROGRESS,
) -> Evaluation:
    """Measures an SAE and its null rows on held-out tokens.

    Args:
        view: held-out tokens, such as the second half of `store.split()`.
        lm: the model that wrote the store; None leaves CE and KL out.
        out: folder for the artifact; None keeps the result in memory. A finished folder of the same config and inputs is
            read instead.
        train: where the null rows are fitted; None: ordinary tokens of the store's other documents.

    Raises:
        ConfigError: a transcoder, the SAE's width is not the store's, `train` shares documents with `view`, or `out` holds something else.
        StoreError: `lm` is not the model that wrote the store.
        DataError: the view has no tokens.
        NonFiniteError: the SAE answers NaN or Inf.
    """
    config = config or EvaluationConfig()
    train = _checked_train(sae, view, train)
    if lm is not None:
        view.store.check_model(lm)
    folder = None if out is None else Path(out)
    if folder is not None:
        state = begin_stage(folder, "evaluate", config, _inputs(sae, view, train, lm))
        if state == "complete":
            return read_evaluation(folder)
    if sae.hook_point not in {None, view.store.hook_point}:
        progress.say(f"the SAE was made for {sae.hook_point!r}, it is evaluated at {view.store.hook_point!r}")
    was_training = sae.training
    with contextlib.nullcontext() if folder is None else locked(folder):
        try:
            evaluation = _measure(sae.eval(), view, train, lm, config, progress)
        finally:
            sae.train(was_training)
        if folder is not None:
            write_evaluation(folder, evaluation)
            counts = ("num_tokens", "num_documents", "num_loss_tokens", "num_massive")
            finish_stage(folder, {name: getattr(evaluation, name) for name in counts})
    return evaluation


def _checked_train(sae: SAE, view: StoreView, train: StoreView | None) -> StoreView:
    store = view.store
    if isinstance(sae, Transcoder):
        raise ConfigError("evaluate: found a transcoder, needs an SAE that reconstructs what it reads")
    if sae.d_in != store.d_in:
        raise ConfigError(
            f"evaluate: the SAE has d_in {sae.d_in}, {store.hook_point!r} of cache {str(store.path)!r} has width"
            f" {store.d_in}; evaluate it where it was trained"
        )
    is_own = ~np.isin(store.documents(), view.documents)
    if train is None:
        return StoreView(store, is_own & (store.kinds() == NORMAL))
    if train.d_in != store.d_in:
        raise ConfigError(f"evaluate: training tokens of width {train.d_in}, needs the test tokens' {store.d_in}")
    shared = np.intersect1d(view.store.document_keys()[view.documents], train.store.document_keys()[train.documents])
    if len(shared):
        raise ConfigError(
            f"evaluate: {len(shared)} documents are in both the training and the test view, needs views of different"
            " documents; take both from one store.split()"
        )
    return train


def sae_fingerprint(sae: SAE) -> str:
    """Returns the identity of a dictionary: the hash of its config and weights, as an evaluation's manifest names it."""
    weights = hashlib.sha256(sae.cfg.model_dump_json().encode())
    for name, value in sorted(sae.state_dict().items()):
        weights.update(name.encode())
        weights.update(np.ascontiguousarray(value.detach().float().cpu().numpy()).data)
    return weights.hexdigest()


def _inputs(sae: SAE, view: StoreView, train: StoreView, lm: LanguageModel | None) -> dict[str, str]:
    inputs = {
        "cache": view.store.sha256,
        "sae": sae_fingerprint(sae),
        "test tokens": hashlib.sha256(view.indices.data).hexdigest(),
        "training tokens": hashlib.sha256(train.store.sha256.encode() + train.indices.tobytes()).hexdigest(),
    }
    return inputs if lm is None else inputs | {"model": lm.fingerprint}


def _measure(
    sae: SAE,
    view: StoreView,
    train: StoreView,
    lm: LanguageModel | None,
    config: EvaluationConfig,
    progress: Progress,
) -> Evaluation:
    selection = Selection.draw(view, num_tokens=config.num_tokens, seed=config.seed)
    num_tokens, num_documents = len(selection.flat), len(np.unique(selection.documents_of(selection.flat)))
    if num_documents < _FEW_DOCUMENTS and config.num_bootstrap:
        progress.say(
            f"{num_documents} held-out documents: intervals from fewer than {_FEW_DOCUMENTS} are too narrow to rely on"
        )
    mean = mean_activation(view.read, selection.flat, batch_tokens=config.batch_tokens)
    candidates = [sae_candidate(sae), mean_candidate(mean), *_fitted_nulls(sae, train, config, progress)]
    ordinary, massive = _reconstructions(selection, candidates, mean, config, sae.W_dec.device, progress)
    loss: dict[str, Sums] = {}
    rows = selection.loss_rows(config.num_loss_tokens)
    if lm is not None and rows.is_counted.any():
        loss = model_loss_sums(
            lm,
            view.store.hook_point,
            rows,
            candidates,
            batch_sequences=config.batch_sequences,
            device=sae.W_dec.device,
            progress=progress,
        )
    measured = [
        MeasuredRow.of(
            c,
            ordinary[c.name],
            massive=massive[c.name].sums if massive else None,
            loss=loss.get(c.name),
            num_bootstrap=config.num_bootstrap,
            seed=config.seed,
        )
        for c in candidates
    ]
    features = _features(sae, ordinary["sae"].firings, num_tokens, progress)
    return Evaluation(
        hook_point=view.store.hook_point,
        rows=tuple(row.row(measured[0]) for row in measured),
        reference=reference_losses(loss.get("sae")),
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_loss_tokens=int(rows.is_counted.sum()) if loss else 0,
        num_massive=len(selection.massive),
        num_bootstrap=config.num_bootstrap,
        density=density_histogram(ordinary["sae"].firings, num_tokens),
        decoder_cosine=cosine_histogram(features.decoder_max_cosine),
        definitions=definitions(),
        features=features,
    )


def _reconstructions(
    selection: Selection,
    candidates: Sequence[Candidate],
    mean: Tensor,
    config: EvaluationConfig,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, ReconstructionSums], dict[str, ReconstructionSums]]:
    """Returns the sums over ordinary tokens and over massive ones; the latter are empty where there are none."""

    def sums(flat: npt.NDArray[np.int64], progress: Progress) -> dict[str, ReconstructionSums]:
        return reconstruction_sums(
            candidates,
            selection.view.read,
            flat,
            documents=selection.documents_of(flat),
            mean=mean,
            batch_tokens=config.batch_tokens,
            device=device,
            progress=progress,
        )

    return sums(selection.flat, progress), sums(selection.massive, NO_PROGRESS) if len(selection.massive) else {}


def _fitted_nulls(sae: SAE, train: StoreView, config: EvaluationConfig, progress: Progress) -> list[Candidate]:
    if not config.nulls:
        return []
    if train.num_tokens == 0:
        progress.say(f"no training tokens to fit the null rows {', '.join(config.nulls)} on: they are left out")
        return []
    x = fit_sample(train.read, train.indices, num_tokens=config.num_fit_tokens, seed=config.seed).to(sae.W_dec.device)
    l0 = measured_l0(sae, x, batch_tokens=config.batch_tokens)
    nulls = []
    if "pca" in config.nulls:
        nulls.append(pca_candidate(x, config.pca_components or max(1, round(l0))))
    if "random" in config.nulls:
        nulls.append(random_candidate(sae, x, l0=l0, seed=config.seed))
    return nulls


def _features(sae: SAE, firings: npt.NDArray[np.int64], num_tokens: int, progress: Progress) -> FeatureMeasures:
    neighbors = decoder_neighbors(sae.W_dec, progress=progress)
    return FeatureMeasures(
        density=(firings / num_tokens).astype(np.float32),
        decoder_max_cosine=neighbors.cosines[:, 0].numpy(),
        neighbor_indices=neighbors.indices.numpy(),
        neighbor_cosines=neighbors.cosines.numpy(),
    )
