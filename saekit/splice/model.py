"""A model as the user has it, saekit's or plain Hugging Face, and the module in it that a site names."""

from dataclasses import dataclass
from typing import NoReturn, cast

from torch import nn

from saekit.errors import HookPointError, ModelError
from saekit.models import LanguageModel, Tokenizer, resolve
from saekit.sae import Site

__all__ = ["Located", "as_language_model", "locate"]

# Where models keep their decoder's parts: with a language head, without one, and inside multimodal ones.
_ROOTS = (
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.",
    "transformer.",
    "gpt_neox.",
    "",
)


@dataclass(frozen=True)
class Located:
    """A site in one model."""

    site: Site
    """With the path that this model has for it."""
    module: nn.Module
    """The module there."""


def as_language_model(model: nn.Module | LanguageModel) -> LanguageModel:
    """Returns saekit's view of a Hugging Face model; weights, mode and gradients are left as they are.

    Raises:
        ModelError: it is not a transformers model.
    """
    if isinstance(model, LanguageModel):
        return model
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    if not isinstance(model, nn.Module) or not callable(text_config):
        raise ModelError(f"model: a {type(model).__name__}, needs a transformers model or what load_model returns")
    text = text_config()
    return LanguageModel(
        model=model,
        tokenizer=cast("Tokenizer", _NoTokenizer()),
        name=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        d_model=int(text.hidden_size),
        num_layers=int(text.num_hidden_layers),
        vocab_size=int(text.vocab_size),
        context_len=getattr(text, "max_position_embeddings", None),
    )


def locate(lm: LanguageModel, site: Site) -> Located:
    """Returns where a site is in this model, which may keep its layers under another prefix than the release's model.

    Raises:
        HookPointError: the model has no such module.
    """
    modules: dict[str, nn.Module] = dict(lm.model.named_modules(remove_duplicate=False))
    for path in _candidates(site.path):
        if path in modules:
            return Located(site.model_copy(update={"path": path}), modules[path])
    # Wrappers, such as adapters' or compilers', put their own names before the model's.
    wrapped = [path for path in modules if path.endswith(f".{site.path}")]
    if len(wrapped) == 1:
        return Located(site.model_copy(update={"path": wrapped[0]}), modules[wrapped[0]])
    try:
        return Located(site, resolve(lm, str(site)))
    except HookPointError as error:
        raise HookPointError(f"{error}; is this the model that the dictionary was made for?") from error


def _candidates(path: str) -> list[str]:
    root = next(root for root in _ROOTS if path.startswith(root))
    tail = path.removeprefix(root)
    return [path, *(other + tail for other in _ROOTS if other != root)]


class _NoTokenizer:
    """Stands where a plain model has none."""

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise ModelError("model: text and no tokenizer, needs token ids, or a model from saekit.load_model")
