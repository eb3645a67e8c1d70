"""A causal language model of the hub's family, ready to be read: loaded, frozen, in eval mode, with its identity."""

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from pydantic import Field
from torch import nn

from saekit.config import Config
from saekit.errors import MissingDependencyError, ModelError, ResourceError
from saekit.models.identity import model_fingerprint, tokenizer_fingerprint
from saekit.models.quiet import first_line, quiet
from saekit.models.randomised import RandomWeights, randomise_weights
from saekit.models.tokens import Tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["LanguageModel", "ModelConfig", "load_model", "load_tokenizer", "read_model_config", "save_converted"]


class ModelConfig(Config):
    """Which language model, and how it is held in memory."""

    name: str = Field(min_length=1)
    """Hub id, local folder in the hub's layout, or local `.gguf` file (dequantised while it is loaded)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights and of the forward. CPUs without bfloat16 instructions are fastest in float32."""
    device: str = "auto"
    """`auto` takes CUDA where there is a device and the CPU elsewhere; else a torch device such as `cuda:1`."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; None: the model's own."""
    random_weights: RandomWeights | None = None
    """For controls: normal noise in place of every parameter, or of all but the embeddings, with the mean and deviation of each tensor."""
    random_seed: int | None = Field(default=None, ge=0)
    """Of that noise; None: 0."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may be run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A frozen causal LM with its tokenizer."""

    model: nn.Module
    """The transformers `PreTrainedModel`: eval mode, no parameter requires a gradient."""
    tokenizer: Tokenizer
    """The transformers tokenizer."""
    name: str
    """As the user wrote it."""
    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Number of decoder layers."""
    vocab_size: int
    """Rows of the unembedding; may exceed the tokenizer's length."""
    context_len: int | None
    """Longest sequence the model was made for; None where its config names none."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def text_config(self) -> "PretrainedConfig":
        """The decoder's config; of a multimodal model, the language part's."""
        return _text_config(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of weights and config, 64 hex digits; the same in every process and on every device.

        See `identity.model_fingerprint` for what it covers.
        """
        return model_fingerprint(self.model)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Identity of the tokenizer, 64 hex digits: its rules, vocabulary, special ids, and what it makes of a probe."""
        return tokenizer_fingerprint(self.tokenizer)


def load_model(config: ModelConfig | str) -> LanguageModel:
    """Returns the model that `config` names (a plain string: its name, all else by default).

    Raises:
        ModelError: no such path or hub id, not a causal LM, weights missing from its files, no tokenizer, unknown device.
        MissingDependencyError: a `.gguf` file without the extra `gguf`.
    """
    if isinstance(config, str):
        config = ModelConfig.parse({"name": config}, where="model")
    where = f"model {config.name!r}"
    device = _device(config.device, where)
    source = _source(config, where)
    model = _load_weights(source, config, where).to(device)
    if config.random_weights is not None:
        randomise_weights(model, config.random_weights, seed=config.random_seed or 0)
    tokenizer = _load_tokenizer(source, config, where)
    text_config = _text_config(model)
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        name=config.name,
        d_model=int(text_config.hidden_size),
        num_layers=int(text_config.num_hidden_layers),
        vocab_size=int(text_config.vocab_size),
        context_len=getattr(text_config, "max_position_embeddings", None),
    )


def read_model_config(config: ModelConfig) -> "PretrainedConfig":
    """Returns the transformers config of a model, without its weights.

    Raises:
        ModelError: no such path or hub id, or a config that cannot be read.
    """
    from transformers import AutoConfig

    where = f"model {config.name!r}"
    source = _source(config, where)
    try:
        with quiet(progress_bars=False):
            found = AutoConfig.from_pretrained(source.name, **source.arguments(config))
    except (OSError, ValueError, KeyError) as error:
        if not source.is_local:
            raise _unreachable(where, error) from error
        raise ModelError(f"{where}: config cannot be read: {first_line(error)}") from error
    return cast("PretrainedConfig", found)


def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer of a hub id or a local folder, without its model.

    Raises:
        ModelError: there is none.
    """
    source = _Source(name, None, is_local=Path(name).is_dir())
    return _load_tokenizer(source, ModelConfig.parse({"name": name}), f"tokenizer {name!r}")


def save_converted(lm: LanguageModel, folder: str | Path) -> Path:
    """Writes model and tokenizer as a plain folder in the hub's layout, which appears only when it is complete.

    Loading it is some 40 times faster than dequantising a GGUF file anew.

    Raises:
        ModelError: `folder` exists already.
        ResourceError: it cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise ModelError(f"{str(folder)!r}: exists already, needs a new folder to write the model to")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            with quiet(progress_bars=False):
                lm.model.save_pretrained(temporary)  # type: ignore[operator]  # a PreTrainedModel
                lm.tokenizer.save_pretrained(str(temporary))
            # mkdtemp and safetensors leave files that only the owner can read.
            temporary.chmod(0o755)
            for file in temporary.iterdir():
                file.chmod(0o644)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ResourceError(f"{str(folder)!r}: cannot be written: {error.strerror or error}") from error
    return folder


@dataclass(frozen=True)
class _Source:
    """Arguments that name a model to transformers."""

    name: str
    gguf_file: str | None
    is_local: bool

    def arguments(self, config: ModelConfig) -> dict[str, object]:
        arguments: dict[str, object] = {"trust_remote_code": config.trust_remote_code}
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        if not self.is_local and config.revision is not None:
            arguments["revision"] = config.revision
        return arguments


def _text_config(model: nn.Module) -> "PretrainedConfig":
    # nn.Module's typing knows only tensors and modules as attributes.
    return cast("PretrainedConfig", model.config).get_text_config()


def _device(name: str, where: str) -> torch.device:
    if name == "auto":
        # Launchers of several processes give each a GPU of its node by this variable.
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"{where}: device {name!r} cannot be used: {first_line(error)}") from error
    return device


def _source(config: ModelConfig, where: str) -> _Source:
    path = Path(config.name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{where}: no such file, needs a local .gguf file")
        if importlib.util.find_spec("gguf") is None:
            raise MissingDependencyError(
                f"{where}: reading GGUF needs a package that is not installed; pip install 'saekit[gguf]'"
            )
        return _Source(str(path.parent), path.name, is_local=True)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{where}: folder without config.json, needs a model folder in the hub's layout")
        return _Source(str(path), None, is_local=True)
    if path.exists():
        raise ModelError(f"{where}: a file, needs a hub id, a model folder or a .gguf file")
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ModelError(f"{where}: no such folder, needs a hub id, a local model folder or a .gguf file")
    return _Source(config.name, None, is_local=False)


def _unreachable(where: str, error: Exception) -> ModelError:
    return ModelError(
        f"{where}: no such local folder, and no model of that name could be had from the hub"
        f" ({first_line(error)}); check the spelling and the network"
    )


def _check_causal(hf_config: "PretrainedConfig", config: ModelConfig, where: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.trust_remote_code and "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {}):
        return
    default = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    architectures = list(hf_config.architectures or ([default] if default else []))
    # Bert-like encoders have a causal class too, but their checkpoints are not trained for it and name another one.
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if default is None or not causal.intersection(architectures):
        found = ", ".join(architectures) or f"model type {hf_config.model_type!r}"
        raise ModelError(f"{where}: holds {found}, needs a causal language model such as LlamaForCausalLM")


def _load_weights(source: _Source, config: ModelConfig, where: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = source.arguments(config)
    try:
        with quiet(progress_bars=not source.is_local):
            hf_config = AutoConfig.from_pretrained(source.name, **arguments)
            _check_causal(hf_config, config, where)
            loaded: object = AutoModelForCausalLM.from_pretrained(
                source.name, dtype=getattr(torch, config.dtype), output_loading_info=True, **arguments
            )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if not source.is_local:
            raise _unreachable(where, error) from error
        raise ModelError(f"{where}: cannot be loaded: {first_line(error)}") from error
    except Exception as error:
        # safetensors and the GGUF reader raise types of their own for truncated or foreign files.
        raise ModelError(f"{where}: files cannot be read: {first_line(error)}") from error
    model, info = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers, and every figure that follows would be about noise.
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{where}: weights missing from its files: {shown}; needs a complete causal LM checkpoint")
    if source.gguf_file is not None:
        _forget_quantization(model)
    model.train(mode=False)
    model.requires_grad_(False)
    return model


def _forget_quantization(model: nn.Module) -> None:
    """The weights are plain numbers by now, but transformers 5.23 refuses to save them while the marks are there."""
    model.hf_quantizer = None  # type: ignore[assignment]  # a PreTrainedModel attribute, not a submodule
    model.is_quantized = False  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _load_tokenizer(source: _Source, config: ModelConfig, where: str) -> Tokenizer:
    from transformers import AutoTokenizer

    own = config.tokenizer is None
    name = source.name if own else str(config.tokenizer)
    arguments = source.arguments(config) if own else {"trust_remote_code": config.trust_remote_code}
    found = "has no tokenizer that can be loaded" if own else f"tokenizer {name!r} cannot be loaded"
    advice = "; name another one by 'tokenizer'" if own else ""
    if own and source.is_local and source.gguf_file is None and not _has_tokenizer_files(Path(name)):
        raise ModelError(f"{where}: no tokenizer files in the folder{advice}")
    try:
        with quiet(progress_bars=not source.is_local):
            tokenizer = cast("Tokenizer", AutoTokenizer.from_pretrained(name, **arguments))
    except Exception as error:
        # Missing and broken tokenizer files surface as anything from OSError to a bare Exception of the Rust library.
        raise ModelError(f"{where}: {found} ({first_line(error)}){advice}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers 5 makes an empty tokenizer of the right class for a folder that has none.
        raise ModelError(f"{where}: {found} (its vocabulary is empty){advice}")
    return tokenizer


def _has_tokenizer_files(folder: Path) -> bool:
    patterns = ("*token*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)
