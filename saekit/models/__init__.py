"""A causal language model: loaded, read and changed at any module, its unembedding, and the token rows it reads."""

from saekit.models.hooks import HookPoint, ablate, add, capture, logits, parse_hook_point, replace, resolve
from saekit.models.load import LanguageModel, ModelConfig, load_model, load_tokenizer, save_converted
from saekit.models.run_from import can_run_from, later_layers, run_from
from saekit.models.texts import Document, FileTextConfig, HubTextConfig, TextConfig, iter_documents, text_fingerprint
from saekit.models.tokens import (
    TokenConfig,
    TokenCounts,
    Tokenizer,
    TokenRow,
    adds_bos,
    check_context_len,
    iter_token_rows,
    special_token_ids,
)
from saekit.models.unembedding import Unembedding, find_unembedding

__all__ = [
    "Document",
    "FileTextConfig",
    "HookPoint",
    "HubTextConfig",
    "LanguageModel",
    "ModelConfig",
    "TextConfig",
    "TokenConfig",
    "TokenCounts",
    "TokenRow",
    "Tokenizer",
    "Unembedding",
    "ablate",
    "add",
    "adds_bos",
    "can_run_from",
    "capture",
    "check_context_len",
    "find_unembedding",
    "iter_documents",
    "iter_token_rows",
    "later_layers",
    "load_model",
    "load_tokenizer",
    "logits",
    "parse_hook_point",
    "replace",
    "resolve",
    "run_from",
    "save_converted",
    "special_token_ids",
    "text_fingerprint",
]
