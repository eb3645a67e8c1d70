"""Where a dictionary is measured: the hook points that it reconstructs, and what of them stands in the rows it is given."""

from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.activations import JoinedStore, PairedStore, StoreView
from saekit.errors import ConfigError
from saekit.evaluation.nulls import (
    linear_candidate,
    mean_candidate,
    measured_l0,
    pca_candidate,
    random_candidate,
    sae_candidate,
)
from saekit.evaluation.reconstruction import WHOLE, Candidate, Reconstruction
from saekit.sae import MLSAE, SAE, Crosscoder, SitesSAE

__all__ = ["Place", "check_rows", "find_places"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Place:
    """One pass over the tokens: a dictionary, its rows, and the hook points in them that it reconstructs."""

    sae: SAE
    view: StoreView
    """Whose rows the candidates are given."""
    train: StoreView
    """The same rows of training documents."""
    hook_points: tuple[str, ...]
    """What is reconstructed."""
    parts: tuple[slice, ...] = (WHOLE,)
    """Its columns in a row, for each hook point."""
    reads: tuple[str, ...] = ()
    """Hook points of a row, where it holds others than the one that is reconstructed."""

    @property
    def has_model_loss(self) -> bool:
        """Whether the language model can read the reconstruction in place of the hook point."""
        return len(self.parts) == 1

    def candidate(self) -> Candidate:
        """Returns the dictionary as a row of the table."""
        sae = self.sae
        if not sae.is_transcoder:
            return sae_candidate(sae)

        def predict(rows: Tensor) -> Reconstruction:
            return Reconstruction(*sae(rows[:, : sae.d_in]))

        return Candidate(name="sae", title="transcoder", reconstruct=predict, num_features=sae.d_sae)

    def mean_row(self, mean: Tensor) -> Candidate:
        """Returns the row of the mean vector, given the mean of whole rows."""
        return mean_candidate(torch.cat([mean[part] for part in self.parts]))

    def null_rows(
        self, names: tuple[str, ...], x: Tensor, *, num_components: int | None, batch_tokens: int, seed: int
    ) -> list[Candidate]:
        """Returns the fitted null rows that have a meaning here.

        Args:
            names: `pca`, `random` or both.
            x: training rows [n, width].
            num_components: of PCA; None: as many as the dictionary has active features.
            batch_tokens: rows encoded at once.
            seed: of the random dictionary.
        """
        sae = self.sae
        if sae.is_transcoder:
            return [linear_candidate(x, sae.d_in)]
        l0 = measured_l0(sae, x, batch_tokens=batch_tokens)
        components = num_components or max(1, round(l0))
        nulls = []
        if "pca" in names:
            nulls.append(_pca_of_parts([pca_candidate(x[:, part], components) for part in self.parts], self.parts))
        if "random" in names and not isinstance(sae, SitesSAE):
            nulls.append(random_candidate(sae, x, l0=l0, seed=seed))
        return nulls


def _pca_of_parts(fitted: list[Candidate], parts: tuple[slice, ...]) -> Candidate:
    if len(parts) == 1:
        return fitted[0]

    def reconstruct(rows: Tensor) -> Reconstruction:
        made = [pca.reconstruct(rows[:, part]).x_hat for pca, part in zip(fitted, parts, strict=True)]
        return Reconstruction(torch.cat(made, dim=1))

    first = fitted[0]
    return Candidate(name=first.name, title=first.title, reconstruct=reconstruct, constant_l0=first.constant_l0)


def find_places(sae: SAE, view: StoreView, train: StoreView) -> list[Place]:
    """Returns where the dictionary is measured; views that `check_rows` takes.

    A transcoder is measured where it predicts, a crosscoder at all its hook points in one pass, a multi-layer SAE at each by
    itself, as the SAE that it is there.
    """
    store = view.store
    if sae.is_transcoder and isinstance(store, PairedStore):
        reads = (store.inputs.hook_point, store.targets.hook_point)
        part = slice(sae.d_in, None)
        return [Place(sae=sae, view=view, train=train, hook_points=reads[1:], parts=(part,), reads=reads)]
    if not isinstance(store, JoinedStore):
        return [Place(sae=sae, view=view, train=train, hook_points=(store.hook_point,))]
    names = tuple(each.hook_point for each in store.stores)
    if isinstance(sae, Crosscoder):
        width = sae.d_in
        parts = tuple(slice(site * width, (site + 1) * width) for site in range(sae.num_sites))
        return [Place(sae=sae, view=view, train=train, hook_points=names, parts=parts, reads=names)]
    assert isinstance(sae, MLSAE), "check_rows refuses others"
    assert isinstance(train.store, JoinedStore), "check_rows refuses others"
    return [
        Place(
            sae=sae.at(site),
            view=StoreView(own, view.mask),
            train=StoreView(theirs, train.mask),
            hook_points=(own.hook_point,),
        )
        for site, (own, theirs) in enumerate(zip(store.stores, train.store.stores, strict=True))
    ]


def check_rows(sae: SAE, view: StoreView) -> None:
    """Checks that the view's rows are those of the dictionary's architecture.

    Raises:
        ConfigError: they are not, or of other widths.
    """
    store = view.store
    where = f"{store.hook_point!r} of cache {str(store.path)!r}"
    if sae.is_transcoder:
        widths = (store.inputs.d_in, store.targets.d_in) if isinstance(store, PairedStore) else None
        if widths != (sae.d_in, sae.d_out):
            found = f"activations {store.d_in} wide" if widths is None else f"pairs {widths[0]} and {widths[1]} wide"
            raise ConfigError(
                f"evaluate: {where} gives {found}, a transcoder needs pairs {sae.d_in} and {sae.d_out} wide, of a PairedStore"
            )
    elif isinstance(sae, SitesSAE):
        widths_found = [each.d_in for each in store.stores] if isinstance(store, JoinedStore) else [store.d_in]
        if widths_found != [sae.d_in] * sae.num_sites or isinstance(store, PairedStore):
            raise ConfigError(
                f"evaluate: {where} gives widths {widths_found}, a {type(sae).__name__} needs {sae.num_sites} hook points"
                f" {sae.d_in} wide, of a JoinedStore"
            )
    elif isinstance(store, JoinedStore) or sae.d_in != store.d_in:
        raise ConfigError(
            f"evaluate: the SAE has d_in {sae.d_in}, {where} has width {store.d_in}; evaluate it where it was trained"
        )
