"""Any reference to an SAE -> the SAE. Today: folders that saekit wrote."""

from pathlib import Path

import torch

from saekit.errors import FormatError
from saekit.manifest import read_manifest
from saekit.sae.base import SAE
from saekit.sae.checkpoint import CFG_NAME, load_sae_folder

__all__ = ["load_sae"]


def load_sae(ref: str | Path, *, device: str | torch.device = "cpu") -> SAE:
    """Returns the SAE that `ref` names.

    Args:
        ref: the output folder of a training run, or any folder that `SAE.save` wrote.
        device: where to put the weights.

    Raises:
        FormatError: `ref` names nothing that can be read; the message says what was found there and what is supported.
    """
    folder = Path(ref)
    if (folder / CFG_NAME).is_file():
        return load_sae_folder(folder, device=device)
    if not folder.is_dir():
        raise FormatError(f"sae {str(ref)!r}: no such folder, needs the output folder of a training run")
    manifest = read_manifest(folder)
    if manifest is not None and manifest.stage == "train":
        raise FormatError(f"sae {str(ref)!r}: training has not finished; run it again to resume it")
    inner = sorted(path.parent for path in folder.glob(f"*/{CFG_NAME}"))
    if inner:
        names = ", ".join(repr(str(path)) for path in inner[:5])
        raise FormatError(f"sae {str(ref)!r}: holds {len(inner)} SAE folders, needs one; use {names}")
    raise FormatError(f"sae {str(ref)!r}: no {CFG_NAME}, needs the output folder of a training run")
