"""The evaluate stage: one SAE and its null rows, measured on held-out documents."""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

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
from saekit.evaluation.nulls import fit_sample
from saekit.evaluation.places import Place, check_rows, find_places
from saekit.evaluation.reconstruction import Candidate, ReconstructionSums, mean_activation, part_sums
from saekit.evaluation.record import Evaluation, FeatureMeasures, read_evaluation, write_evaluation
from saekit.evaluation.selection import LossRows, Selection
from saekit.evaluation.table import MeasuredRow, SiteSums, cosine_histogram, density_histogram, reference_losses
from saekit.manifest import begin_stage, finish_stage, locked
from saekit.models import LanguageModel
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE, Crosscoder
from saekit.sae.identity import sae_sha256

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
    """Null rows beside the mean vector, which is always there. A transcoder has `linear` in their place, as they reconstruct what
    they read; a crosscoder has no random one."""
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
        view: held-out tokens, such as the second half of `store.split()`: of a `PairedStore` for a transcoder, of a `JoinedStore`
            for a crosscoder or a multi-layer SAE.
        lm: the model that wrote the store; None leaves CE and KL out.
        out: folder for the artifact; None keeps the result in memory. A finished folder of the same config and inputs is
            read instead.
        train: where the null rows are fitted; None: ordinary tokens of the store's other documents.

    Raises:
        ConfigError: the SAE's width is not the store's, `train` shares documents with `view`, or `out` holds something else.
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
    check_rows(sae, view)
    is_own = ~np.isin(store.documents(), view.documents)
    if train is None:
        return StoreView(store, is_own & (store.kinds() == NORMAL))
    if train.d_in != store.d_in:
        raise ConfigError(f"evaluate: training tokens of width {train.d_in}, needs the test tokens' {store.d_in}")
    check_rows(sae, train)
    shared = np.intersect1d(view.store.document_keys()[view.documents], train.store.document_keys()[train.documents])
    if len(shared):
        raise ConfigError(
            f"evaluate: {len(shared)} documents are in both the training and the test view, needs views of different"
            " documents; take both from one store.split()"
        )
    return train


def sae_fingerprint(sae: SAE) -> str:
    """Returns the identity of a dictionary: the hash of its config and weights, as an evaluation's manifest names it."""
    return sae_sha256(sae, sae.cfg.model_dump_json())


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
    rows = selection.loss_rows(config.num_loss_tokens)
    measured_places = [
        _measure_place(place, selection, rows, lm, config, progress) for place in find_places(sae, view, train)
    ]
    candidates = measured_places[0].candidates
    sites = {c.name: [site for place in measured_places for site in place.sites[c.name]] for c in candidates}
    firings = {
        c.name: np.sum([place.sites[c.name][0].ordinary.firings for place in measured_places], axis=0)
        for c in candidates
    }
    measured = [
        MeasuredRow.of(c, sites[c.name], firings=firings[c.name], num_bootstrap=config.num_bootstrap, seed=config.seed)
        for c in candidates
    ]
    # Each place reads every token once: where there are several, a feature has as many occasions to fire.
    num_samples = num_tokens * len(measured_places)
    features = _features(sae, firings["sae"], num_samples, progress)
    has_loss = sites["sae"][0].loss is not None
    return Evaluation(
        hook_point=",".join(site.hook_point for site in sites["sae"]),
        rows=tuple(row.row(measured[0]) for row in measured),
        reference=reference_losses(sites["sae"]),
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_loss_tokens=int(rows.is_counted.sum()) if has_loss else 0,
        num_massive=len(selection.massive),
        num_bootstrap=config.num_bootstrap,
        density=density_histogram(firings["sae"], num_samples),
        decoder_cosine=cosine_histogram(features.decoder_max_cosine),
        definitions=definitions(),
        features=features,
    )


class _MeasuredPlace(NamedTuple):
    """The rows of the table at one place, and what was summed for each at its hook points."""

    candidates: list[Candidate]
    sites: dict[str, list[SiteSums]]


def _measure_place(
    place: Place,
    selection: Selection,
    rows: LossRows,
    lm: LanguageModel | None,
    config: EvaluationConfig,
    progress: Progress,
) -> _MeasuredPlace:
    device = place.sae.W_dec.device
    mean = mean_activation(place.view.read, selection.flat, batch_tokens=config.batch_tokens)
    candidates = [place.candidate(), place.mean_row(mean), *_fitted_nulls(place, config, progress)]
    ordinary, massive = _reconstructions(place, selection, candidates, mean, config, progress)
    loss: dict[str, Sums] = {}
    if lm is not None and rows.is_counted.any():
        if place.has_model_loss:
            loss = model_loss_sums(
                lm,
                place.hook_points[0],
                rows,
                candidates,
                batch_sequences=config.batch_sequences,
                device=device,
                reads=place.reads,
                progress=progress,
            )
        else:
            progress.say("CE and KL are left out: a crosscoder reads hook points behind those that it would replace")
    sites = {
        c.name: [
            SiteSums(name, ordinary[at][c.name], massive[at][c.name].sums if massive else None, loss.get(c.name))
            for at, name in enumerate(place.hook_points)
        ]
        for c in candidates
    }
    return _MeasuredPlace(candidates, sites)


def _reconstructions(
    place: Place,
    selection: Selection,
    candidates: Sequence[Candidate],
    mean: Tensor,
    config: EvaluationConfig,
    progress: Progress,
) -> tuple[list[dict[str, ReconstructionSums]], list[dict[str, ReconstructionSums]]]:
    """Returns the sums at each hook point over ordinary tokens and over massive ones; the latter are empty where there are none."""

    def sums(flat: npt.NDArray[np.int64], progress: Progress) -> list[dict[str, ReconstructionSums]]:
        return part_sums(
            candidates,
            place.view.read,
            flat,
            parts=place.parts,
            documents=selection.documents_of(flat),
            mean=mean,
            batch_tokens=config.batch_tokens,
            device=place.sae.W_dec.device,
            progress=progress,
        )

    return sums(selection.flat, progress), sums(selection.massive, NO_PROGRESS) if len(selection.massive) else []


def _fitted_nulls(place: Place, config: EvaluationConfig, progress: Progress) -> list[Candidate]:
    if not config.nulls:
        return []
    train = place.train
    if train.num_tokens == 0:
        progress.say(f"no training tokens to fit the null rows {', '.join(config.nulls)} on: they are left out")
        return []
    x = fit_sample(train.read, train.indices, num_tokens=config.num_fit_tokens, seed=config.seed)
    made = place.null_rows(
        config.nulls,
        x.to(place.sae.W_dec.device),
        num_components=config.pca_components,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
    )
    left_out = [name for name in config.nulls if name not in {null.name for null in made}]
    if left_out:
        progress.say(f"null rows left out, without meaning for a {type(place.sae).__name__}: {', '.join(left_out)}")
    return made


def _features(sae: SAE, firings: npt.NDArray[np.int64], num_samples: int, progress: Progress) -> FeatureMeasures:
    rows = sae.normalized_decoder() if isinstance(sae, Crosscoder) else sae.W_dec
    neighbors = decoder_neighbors(rows, progress=progress)
    return FeatureMeasures(
        density=(firings / num_samples).astype(np.float32),
        decoder_max_cosine=neighbors.cosines[:, 0].numpy(),
        neighbor_indices=neighbors.indices.numpy(),
        neighbor_cosines=neighbors.cosines.numpy(),
    )
