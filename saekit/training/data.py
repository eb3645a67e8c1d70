"""Whether activations are those that an SAE reads."""

from saekit.activations.joined import JoinedStore
from saekit.activations.view import StoreView
from saekit.errors import ConfigError
from saekit.sae.base import SAE
from saekit.sae.batch import batch_width
from saekit.sae.sites import SitesSAE
from saekit.sae.transcoder import Transcoder

__all__ = ["check_data"]


def check_data(sae: SAE, data: object, d_in: int, *, what: str) -> None:
    """Checks that batches of `data` are as wide as those that `sae` is trained on, at each of its hook points.

    Args:
        sae: what is trained.
        data: a view of a store, or a source of one's own.
        d_in: width of its activations.
        what: they are for.

    Raises:
        ConfigError: they are not.
    """
    if d_in != batch_width(sae):
        raise ConfigError(
            f"{what} data: activations are {d_in} wide, needs the SAE's {_width_name(sae)} = {batch_width(sae)}"
        )
    if isinstance(sae, SitesSAE) and isinstance(data, StoreView) and isinstance(data.store, JoinedStore):
        widths = [each.d_in for each in data.store.stores]
        if widths != [sae.d_in] * sae.num_sites:
            raise ConfigError(
                f"hook points {data.store.hook_point}: widths {widths}, needs {sae.num_sites} of {sae.d_in}"
            )


def _width_name(sae: SAE) -> str:
    if isinstance(sae, SitesSAE):
        return "num_sites * d_in"
    return "d_in + d_out" if isinstance(sae, Transcoder) else "d_in"
