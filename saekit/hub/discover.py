"""From a listing of file names to the dictionaries among them, before any file is opened or downloaded."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

__all__ = ["config_names", "dictionaries", "unreadable"]

# What the formats call their configs; other JSON files beside them are records of something else.
_CONFIG = re.compile(
    r"(cfg|config|hyperparams|activation_scaler|.+_cfg)\.json|(conf|config|final_config|wandb-config|wanb-config)\.ya?ml"
)
# A folder that holds one of these is a dictionary.
_FOLDER_FILES = {
    "sae_weights.safetensors",
    "activation_whitening.safetensors",
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "ae.pt",
    "cc_weights.pt",
    "latest_ckpt.safetensors",
    "model.safetensors",
}
# A folder that holds several of these, one a layer, is one dictionary.
_LAYER_FILES = re.compile(
    r"params_layer_\d+\.safetensors|W_(enc|dec)_\d+\.safetensors|W_dec_norm\.safetensors|factors\.safetensors"
)
_SUFFIXES = {".safetensors", ".npz", ".pt", ".pth"}
# What trainers write beside their weights.
_OTHER = re.compile(r"sparsity|optimizer|scheduler|trainer_state|activations_store|activation_scaler|training_args")


def dictionaries(names: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """Returns the dictionaries among file names: name -> its weights files.

    A dictionary is named by its folder, `""` for the top one, or by its file where one file holds it.

    Args:
        names: paths with `/`, relative to one folder.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        folder = "" if str(path.parent) == "." else str(path.parent)
        # A listing from elsewhere may name places outside its folder.
        if path.suffix not in _SUFFIXES or path.is_absolute() or any(part.startswith(".") for part in path.parts):
            continue
        if path.name in _FOLDER_FILES or _LAYER_FILES.fullmatch(path.name):
            found.setdefault(folder, []).append(name)
        elif path.name == "final.safetensors" and path.parent.name == "checkpoints":
            above = str(path.parent.parent)
            found.setdefault("" if above == "." else above, []).append(name)
        elif not _OTHER.search(path.name):
            found.setdefault(name, []).append(name)
    return {name: tuple(files) for name, files in found.items()}


def unreadable(names: Iterable[str]) -> str | None:
    """Returns what is known to hold dictionaries among file names and is not read, and why; None where nothing is."""
    for name in names:
        for part in PurePosixPath(name).parts:
            if part.endswith(".dcp"):
                return f"{part!r} is a checkpoint of torch.distributed, which is a pickle; save it as safetensors"
            if part.endswith((".pkl", ".pkl.gz", ".pickle")):
                return f"{part!r} is a raw pickle, which runs what it names; convert it where it cannot do harm"
    return None


def config_names(names: Iterable[str], files: Iterable[str]) -> list[str]:
    """Returns the config files among `names` that lie beside the weights `files`, or above their `checkpoints` folder."""
    folders = {PurePosixPath(file).parent for file in files}
    folders |= {folder.parent for folder in folders if folder.name == "checkpoints"}
    return sorted(
        name for name in names if _CONFIG.fullmatch(PurePosixPath(name).name) and PurePosixPath(name).parent in folders
    )
