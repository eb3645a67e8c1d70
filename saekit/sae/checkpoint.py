"""An SAE as a folder: `cfg.json` says what it is, `sae.safetensors` holds float32 weights for raw activations."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor

from saekit.errors import ConfigError, FormatError
from saekit.manifest import atomic_write, write_json
from saekit.sae.base import SAE, SAEConfig
from saekit.sae.batchtopk import BatchTopKConfig, BatchTopKSAE
from saekit.sae.crosscoder import (
    BatchTopKCrosscoder,
    BatchTopKCrosscoderConfig,
    CrosscoderConfig,
    ReLUCrosscoder,
    ReLUCrosscoderConfig,
    TopKCrosscoder,
    TopKCrosscoderConfig,
)
from saekit.sae.gated import GatedConfig, GatedSAE
from saekit.sae.jumprelu import JumpReLUConfig, JumpReLUSAE
from saekit.sae.matryoshka import (
    MatryoshkaBatchTopKConfig,
    MatryoshkaBatchTopKSAE,
    MatryoshkaTopKConfig,
    MatryoshkaTopKSAE,
)
from saekit.sae.mlsae import MLSAE, MLSAEConfig
from saekit.sae.relu import ReLUConfig, ReLUSAE
from saekit.sae.topk import TopKConfig, TopKSAE
from saekit.sae.transcoder import Transcoder, TranscoderConfig

__all__ = ["CFG_NAME", "WEIGHTS_NAME", "AnySAEConfig", "build_sae", "load_sae_folder", "save_sae"]

CFG_NAME = "cfg.json"
WEIGHTS_NAME = "sae.safetensors"
FORMAT_VERSION = 1

AnySAEConfig = Annotated[
    TopKConfig
    | BatchTopKConfig
    | JumpReLUConfig
    | MatryoshkaTopKConfig
    | MatryoshkaBatchTopKConfig
    | GatedConfig
    | ReLUConfig
    | TranscoderConfig
    | TopKCrosscoderConfig
    | BatchTopKCrosscoderConfig
    | ReLUCrosscoderConfig
    | MLSAEConfig,
    Field(discriminator="kind"),
]
"""The config of any architecture, told apart by `kind`."""

_CLASSES: dict[type[SAEConfig], type[SAE]] = {
    TopKConfig: TopKSAE,
    BatchTopKConfig: BatchTopKSAE,
    JumpReLUConfig: JumpReLUSAE,
    MatryoshkaTopKConfig: MatryoshkaTopKSAE,
    MatryoshkaBatchTopKConfig: MatryoshkaBatchTopKSAE,
    GatedConfig: GatedSAE,
    ReLUConfig: ReLUSAE,
    TranscoderConfig: Transcoder,
    TopKCrosscoderConfig: TopKCrosscoder,
    BatchTopKCrosscoderConfig: BatchTopKCrosscoder,
    ReLUCrosscoderConfig: ReLUCrosscoder,
    MLSAEConfig: MLSAE,
}


def build_sae(
    cfg: SAEConfig, *, seed: int = 0, hook_point: str | None = None, source: Mapping[str, object] | None = None
) -> SAE:
    """Returns a new SAE of the config's architecture.

    Raises:
        ConfigError: d_in is not known, or no class belongs to the config.
    """
    made = _CLASSES.get(type(cfg))
    if made is None:
        kinds = ", ".join(repr(known.model_fields["kind"].default) for known in _CLASSES)
        raise ConfigError(f"sae: config of kind {cfg.kind!r}, needs one of {kinds}")
    return made(cfg, seed=seed, hook_point=hook_point, source=source)


def save_sae(sae: SAE, folder: str | Path) -> None:
    """Writes the SAE into `folder`; an older one there is replaced file by file, the weights first.

    Raises:
        FormatError: a weight is NaN or Inf.
        ResourceError: the folder cannot be written.
    """
    folder = Path(folder)
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in sae.state_dict().items()}
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise FormatError(f"sae: {name} has NaN or Inf, needs finite weights")
    with atomic_write(folder / WEIGHTS_NAME) as file:
        file.write(save_safetensors(tensors, metadata={"format": "saekit"}))
    write_json(
        folder / CFG_NAME,
        {
            "format": "saekit",
            "format_version": FORMAT_VERSION,
            "sae": sae.cfg.to_dict(),
            "hook_point": sae.hook_point,
            "source": sae.source,
        },
    )


def load_sae_folder(path: str | Path, *, device: str | torch.device = "cpu") -> SAE:
    """Returns the SAE that `save_sae` wrote into a folder.

    Raises:
        FormatError: a file is missing, broken, of another format, or holds NaN or other shapes than its config says.
    """
    folder = Path(path)
    header = _read_header(folder / CFG_NAME)
    try:
        cfg: SAEConfig = TypeAdapter(AnySAEConfig).validate_python(header.get("sae"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["sae", *(str(part) for part in first["loc"])])
        raise FormatError(
            f"{str(folder / CFG_NAME)!r}: {key}: {first['msg']}, needs a config of this version"
        ) from error
    hook_point, source = header.get("hook_point"), header.get("source")
    tensors = _read_tensors(folder / WEIGHTS_NAME)
    # Before anything of the size that the config claims is made.
    encoder = tensors.get("W_enc")
    # A crosscoder's encoders of all hook points stand one below the other.
    width = cfg.d_in * cfg.num_sites if isinstance(cfg, CrosscoderConfig) else cfg.d_in
    if width and encoder is not None and list(encoder.shape) != [width, cfg.d_sae]:
        where = f"{str(folder / WEIGHTS_NAME)!r}"
        raise FormatError(f"{where}: W_enc is {list(encoder.shape)}, needs {[width, cfg.d_sae]}")
    try:
        sae = build_sae(
            cfg,
            hook_point=hook_point if isinstance(hook_point, str) else None,
            source=source if isinstance(source, dict) else None,
        )
    except ConfigError as error:
        raise FormatError(f"{str(folder / CFG_NAME)!r}: {error}") from error
    _check_tensors(folder / WEIGHTS_NAME, tensors, sae)
    with torch.no_grad():
        # copy_ keeps W_enc's memory as a transposed view, which assigning the file's own tensor would not.
        for name, parameter in sae.named_parameters():
            parameter.copy_(tensors[name])
    return sae.to(device).eval()


def _read_header(path: Path) -> dict[str, object]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{str(path.parent)!r}: no {CFG_NAME}, needs a folder that SAE.save wrote") from error
    except (OSError, RecursionError, ValueError) as error:
        raise FormatError(
            f"{str(path)!r}: cannot be read as JSON: {error}, needs the file that SAE.save wrote"
        ) from error
    if not isinstance(header, dict) or header.get("format") != "saekit":
        raise FormatError(f"{str(path)!r}: not a config of saekit, needs a folder that SAE.save wrote")
    if header.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{str(path)!r}: format_version {header.get('format_version')!r}, needs {FORMAT_VERSION}; update saekit"
        )
    return header


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise FormatError(f"{str(path.parent)!r}: no {WEIGHTS_NAME}, needs a folder that SAE.save wrote") from error
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{str(path)!r}: cannot be read: {error}, needs an unbroken safetensors file") from error
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], sae: SAE) -> None:
    needed = dict(sae.named_parameters())
    missing = sorted(needed.keys() - tensors.keys())
    if missing:
        raise FormatError(f"{str(path)!r}: has {sorted(tensors)}, needs also {', '.join(missing)}")
    for name, parameter in needed.items():
        found = tensors[name]
        if found.shape != parameter.shape:
            raise FormatError(f"{str(path)!r}: {name} is {list(found.shape)}, needs {list(parameter.shape)}")
        if not found.is_floating_point() or not bool(torch.isfinite(found).all()):
            raise FormatError(f"{str(path)!r}: {name} has NaN or Inf or is not floating point, needs finite weights")
