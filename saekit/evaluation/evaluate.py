"""The evaluate stage: one SAE and its null rows, measured on held-out documents."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from saekit.activations.rows import NORMAL
from saekit.activations.view import StoreView
from saekit.config import Config
from saekit.errors import ConfigError
from saekit.evaluation.bootstrap import Resampled, Statistic, Sums
from saekit.evaluation.decoder import decoder_neighbors
from saekit.evaluation.definitions import METRICS, definitions
from saekit.evaluation.model_loss import LOSS_METRICS, REFERENCE, model_loss_sums
from saekit.evaluation.nulls import (
    fit_sample,
    mean_candidate,
    measured_l0,
    pca_candidate,
    random_candidate,
    sae_candidate,
)
from saekit.evaluation.reconstruction import (
    RECONSTRUCTION_METRICS,
    Candidate,
    ReconstructionSums,
    mean_activation,
    reconstruction_sums,
)
from saekit.evaluation.record import (
    Evaluation,
    EvaluationRow,
    FeatureMeasures,
    Figure,
    Histogram,
    read_evaluation,
    write_evaluation,
)
from saekit.evaluation.selection import Selection
from saekit.manifest import begin_stage, finish_stage
from saekit.models import LanguageModel
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE

__all__ = ["EvaluationConfig", "evaluate"]


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
    evaluation = _measure(sae, view, train, lm, config, progress)
    if folder is not None:
        write_evaluation(folder, evaluation)
        counts = ("num_tokens", "num_documents", "num_loss_tokens", "num_massive")
        finish_stage(folder, {name: getattr(evaluation, name) for name in counts})
    return evaluation


def _checked_train(sae: SAE, view: StoreView, train: StoreView | None) -> StoreView:
    store = view.store
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


def _inputs(sae: SAE, view: StoreView, train: StoreView, lm: LanguageModel | None) -> dict[str, str]:
    weights = hashlib.sha256(sae.cfg.model_dump_json().encode())
    for name, value in sorted(sae.state_dict().items()):
        weights.update(name.encode())
        weights.update(np.ascontiguousarray(value.detach().float().cpu().numpy()).data)
    inputs = {
        "cache": view.store.sha256,
        "sae": weights.hexdigest(),
        "test tokens": hashlib.sha256(view.indices.data).hexdigest(),
        "training tokens": hashlib.sha256(train.store.sha256.encode() + train.indices.tobytes()).hexdigest(),
    }
    return inputs if lm is None else inputs | {"model": lm.fingerprint}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Measured:
    """The sums of one row of the table."""

    candidate: Candidate
    reconstruction: ReconstructionSums
    massive: Sums | None
    loss: Sums | None

    def parts(self) -> list[tuple[Sums, Mapping[str, Statistic]]]:
        """Returns each table of per-document sums with the ratios that are taken of it."""
        parts: list[tuple[Sums, Mapping[str, Statistic]]] = [(self.reconstruction.sums, RECONSTRUCTION_METRICS)]
        if self.massive is not None:
            parts.append((self.massive, {"fvu_massive": RECONSTRUCTION_METRICS["fvu"]}))
        if self.loss is not None:
            parts.append((self.loss, LOSS_METRICS))
        return parts

    def figures(self, config: EvaluationConfig) -> dict[str, Figure]:
        """Returns every metric; those without sums are None."""
        figures = {name: Figure() for name in METRICS}
        for sums, metrics in self.parts():
            resampled = Resampled.of(sums, config.num_bootstrap, seed=config.seed)
            figures |= {name: resampled.figure(statistic) for name, statistic in metrics.items()}
        if self.candidate.num_features:
            figures["dead_fraction"] = Figure.of(float((self.reconstruction.firings == 0).mean()))
        return figures

    def difference(self, sae: "_Measured", config: EvaluationConfig) -> dict[str, Figure]:
        """Returns the SAE's metrics minus this row's."""
        figures: dict[str, Figure] = {}
        for (theirs, metrics), (mine, _) in zip(sae.parts(), self.parts(), strict=True):
            one = Resampled.of(theirs, config.num_bootstrap, seed=config.seed)
            other = Resampled.of(mine, config.num_bootstrap, seed=config.seed)
            figures |= {name: one.difference(other, statistic) for name, statistic in metrics.items()}
        return figures


def _measure(
    sae: SAE,
    view: StoreView,
    train: StoreView,
    lm: LanguageModel | None,
    config: EvaluationConfig,
    progress: Progress,
) -> Evaluation:
    selection = Selection.draw(view, num_tokens=config.num_tokens, seed=config.seed)
    mean = mean_activation(view.read, selection.flat, batch_tokens=config.batch_tokens)
    candidates = [sae_candidate(sae), mean_candidate(mean), *_fitted_nulls(sae, train, config, progress)]
    measured = _measured(selection, candidates, mean, lm, config, sae.W_dec.device, progress)
    features = _features(sae, measured[0].reconstruction.firings, len(selection.flat), progress)
    loss = measured[0].loss
    return Evaluation(
        hook_point=view.store.hook_point,
        rows=tuple(_row(row, measured[0], config) for row in measured),
        reference=_reference(loss),
        num_tokens=len(selection.flat),
        num_documents=len(measured[0].reconstruction.sums["tokens"]),
        num_loss_tokens=0 if loss is None else int(loss["positions"].sum()),
        num_massive=len(selection.massive),
        num_bootstrap=config.num_bootstrap,
        density=_density_histogram(features.density, len(selection.flat)),
        decoder_cosine=_histogram(features.decoder_max_cosine, np.linspace(-1.0, 1.0, 41)),
        definitions=definitions(),
        features=features,
    )


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


def _measured(
    selection: Selection,
    candidates: Sequence[Candidate],
    mean: torch.Tensor,
    lm: LanguageModel | None,
    config: EvaluationConfig,
    device: torch.device,
    progress: Progress,
) -> list[_Measured]:
    def sums(flat: npt.NDArray[np.int64]) -> dict[str, ReconstructionSums]:
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

    ordinary = sums(selection.flat)
    massive = sums(selection.massive) if len(selection.massive) else {}
    loss: dict[str, Sums] = {}
    rows = selection.loss_rows(config.num_loss_tokens)
    if lm is not None and rows.is_counted.any():
        loss = model_loss_sums(
            lm,
            selection.view.store.hook_point,
            rows,
            candidates,
            batch_sequences=config.batch_sequences,
            device=device,
            progress=progress,
        )
    return [
        _Measured(
            candidate=c,
            reconstruction=ordinary[c.name],
            massive=massive[c.name].sums if c.name in massive else None,
            loss=loss.get(c.name),
        )
        for c in candidates
    ]


def _row(row: _Measured, sae: _Measured, config: EvaluationConfig) -> EvaluationRow:
    return EvaluationRow(
        name=row.candidate.name,
        title=row.candidate.title,
        metrics=row.figures(config),
        difference={} if row is sae else row.difference(sae, config),
    )


def _reference(loss: Sums | None) -> dict[str, float | None]:
    if loss is None:
        return dict.fromkeys(REFERENCE)
    return {name: float(loss[name].sum() / loss["positions"].sum()) for name in REFERENCE}


def _features(sae: SAE, firings: npt.NDArray[np.int64], num_tokens: int, progress: Progress) -> FeatureMeasures:
    neighbors = decoder_neighbors(sae.W_dec, progress=progress)
    return FeatureMeasures(
        density=(firings / num_tokens).astype(np.float32),
        decoder_max_cosine=neighbors.cosines[:, 0].numpy(),
        neighbor_indices=neighbors.indices.numpy(),
        neighbor_cosines=neighbors.cosines.numpy(),
    )


def _density_histogram(density: npt.NDArray[np.float32], num_tokens: int) -> Histogram:
    # Quarter decades, from the least density that this many tokens can show.
    lowest = np.floor(-4 * np.log10(num_tokens)) / 4
    edges = np.arange(lowest, 0.125, 0.25)
    return _histogram(np.log10(density[density > 0]), edges if len(edges) > 1 else np.array([-0.25, 0.0]))


def _histogram(values: npt.NDArray[np.float32], edges: npt.NDArray[np.float64]) -> Histogram:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))
