"""Fixtures that many rooms' tests share: tiny random models of every common family, and a few documents."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.saekit.hub.hub_server import HubServer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before triton is imported. Where there is a device the same tests run on it, compiled.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DOCUMENTS = [
    "The river runs through the old town and the mill still turns.",
    "In 1969 two men walked on the moon; the third one waited above.",
    "A violin has four strings, a guitar has six, and a harp has forty-seven.",
    "Rain fell on the town for nine days, and then the river rose.",
    "She wrote the proof on the back of an envelope and lost the envelope.",
    "The moon is not made of cheese, said the teacher, and drew a circle.",
] * 4


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two test workers on two cores: more threads only fight, and sums stay in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps process-wide singletons; a test must not inherit another one's."""
    yield
    import sys

    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """24 short English documents (6 different ones)."""
    return list(DOCUMENTS)


@pytest.fixture(scope="session")
def documents_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as a .jsonl file with the column `text`."""
    path = tmp_path_factory.mktemp("texts") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def many_documents_file(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """120 different short documents as a .jsonl file with the column `text`."""
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    lines = [json.dumps({"text": f"{documents[i % 6]} {documents[(i * 5 + 1) % 6]} Number {i}."}) for i in range(120)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _tokenizer_files(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    wrapped.save_pretrained(folder)
    return len(wrapped)


def _tiny_config(family: str, vocab_size: int) -> object:
    import transformers as tf

    shared = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1}
    llama_like = shared | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if family == "llama":
        return tf.LlamaConfig(**llama_like, tie_word_embeddings=False)
    if family == "qwen2":
        return tf.Qwen2Config(**llama_like, tie_word_embeddings=True)
    if family == "gemma2":
        return tf.Gemma2Config(**llama_like, head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
    if family == "gemma3":
        return tf.Gemma3TextConfig(**llama_like, head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
    if family == "gpt2":
        return tf.GPT2Config(**shared, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    if family == "neox":
        return tf.GPTNeoXConfig(
            **shared,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    raise ValueError(f"no tiny model of family {family!r}")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: family (llama, gpt2, neox, gemma2, gemma3, qwen2) -> folder of a random causal LM in the hub's layout.

    Hidden width 32, 3 layers, context 64, byte-level BPE tokenizer with <bos>=0 and <eos>=1.
    """
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            from transformers import AutoModelForCausalLM

            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            vocab_size = _tokenizer_files(folder)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_tiny_config(family, vocab_size))
            model.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Iterator[HubServer]":
    """A local server that huggingface_hub takes for the hub, without a login; its caches are empty folders."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from tests.saekit.hub.hub_server import HubServer

    server = HubServer()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache" / "hub"),
        "HF_ASSETS_CACHE": str(tmp_path / "cache" / "assets"),
        "HF_TOKEN_PATH": str(tmp_path / "cache" / "token"),
        # Its own protocol for storage, which no local server speaks; it then uses the older one.
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    close_session()
    yield server
    close_session()
    server.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been slept, and no sleep."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited
