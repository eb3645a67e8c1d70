"""Loading: real folders, what the model knows of itself, and every bad input in one line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saekit.errors import ConfigError, MissingDependencyError, ModelError, SaekitError
from saekit.models import LanguageModel, ModelConfig, load_model, logits, save_converted

KNOWN_LEN = 384


def test_load_model_gives_a_frozen_model_with_its_figures(lm: LanguageModel) -> None:
    assert (lm.d_model, lm.num_layers, lm.context_len) == (32, 3, 64)
    assert lm.vocab_size == lm.model.get_output_embeddings().weight.shape[0]
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert lm.dtype == torch.float32
    assert lm.device == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    assert lm.tokenizer.decode(lm.tokenizer("the river")["input_ids"]) == "the river"


def test_load_model_says_nothing(tiny_model_dir: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(tiny_model_dir("gpt2")))
    assert capfd.readouterr() == ("", "")


def test_load_model_leaves_the_progress_bars_of_transformers_as_they_were(
    tiny_model_dir: Callable[[str], Path],
) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load_model(str(tiny_model_dir("gpt2")))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_load_model_takes_dtype_and_another_tokenizer(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_dir("llama") / file, bare)
    lm = load_model(ModelConfig(name=str(bare), dtype="bfloat16", tokenizer=str(tiny_model_dir("gpt2"))))
    assert lm.dtype == torch.bfloat16
    assert lm.tokenizer.bos_token_id == 0


def test_fingerprint_holds_in_another_process_and_another_folder(
    llama: LanguageModel, tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(tiny_model_dir("llama"), copied)
    code = "import sys, saekit.models as m; lm = m.load_model(sys.argv[1]); print(lm.fingerprint, lm.tokenizer_fingerprint)"
    out = subprocess.run([sys.executable, "-c", code, str(copied)], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [llama.fingerprint, llama.tokenizer_fingerprint]


@pytest.mark.parametrize("place", [0, 1, 777, -1], ids=str)
def test_fingerprint_sees_a_single_changed_weight(tiny_model_dir: Callable[[str], Path], place: int) -> None:
    lm = load_model(str(tiny_model_dir("llama")))
    other = load_model(str(tiny_model_dir("llama")))
    weight = other.model.get_submodule("model.layers.1.mlp.down_proj").weight
    weight.view(-1)[place].mul_(1 + 2**-20)
    assert other.fingerprint != lm.fingerprint


def test_fingerprint_depends_on_dtype_and_on_the_config(
    llama: LanguageModel, tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    half = load_model(ModelConfig(name=str(tiny_model_dir("llama")), dtype="bfloat16"))
    changed = tmp_path / "changed"
    shutil.copytree(tiny_model_dir("llama"), changed)
    config = json.loads((changed / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (changed / "config.json").write_text(json.dumps(config))
    assert len({llama.fingerprint, half.fingerprint, load_model(str(changed)).fingerprint}) == 3


def test_tokenizer_fingerprint_ignores_past_calls_but_not_the_rules(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model_dir("llama"), folder)
    used, fresh = load_model(str(folder)), load_model(str(folder))
    used.tokenizer(["the river", "rose"], truncation=True, max_length=1)  # type: ignore[arg-type]
    assert used.tokenizer_fingerprint == fresh.tokenizer_fingerprint
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    assert load_model(str(folder)).tokenizer_fingerprint != fresh.tokenizer_fingerprint


def test_save_converted_writes_the_same_model(
    llama: LanguageModel, tmp_path: Path, tokens: torch.Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_converted(llama, tmp_path / "new" / "model")
    assert capfd.readouterr() == ("", "")
    again = load_model(str(folder))
    assert (again.fingerprint, again.tokenizer_fingerprint) == (llama.fingerprint, llama.tokenizer_fingerprint)
    assert torch.equal(logits(again, tokens), logits(llama, tokens))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    with pytest.raises(ModelError, match="exists already"):
        save_converted(llama, folder)


def _gguf(path: Path, lm: LanguageModel) -> None:
    """Writes the tiny Llama as GGUF, float32, with the query and key rows in that format's own order."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    config = lm.model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = lm.tokenizer.get_vocab()
    rules = json.loads(lm.tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges([" ".join(pair) for pair in rules["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for number in range(config.num_hidden_layers):
        names |= {f"model.layers.{number}.{ours}": f"blk.{number}.{theirs}" for ours, theirs in parts.items()}
    for name, weight in lm.model.state_dict().items():
        value = weight
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = value.shape[0] // config.head_dim
            value = value.view(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_load_model_reads_a_gguf_file_and_saves_it_as_a_plain_folder(
    llama: LanguageModel, tmp_path: Path, tokens: torch.Tensor
) -> None:
    path = tmp_path / "tiny.gguf"
    _gguf(path, llama)
    lm = load_model(str(path))
    assert torch.equal(logits(lm, tokens), logits(llama, tokens))
    assert lm.tokenizer("the moon rose")["input_ids"] == llama.tokenizer("the moon rose")["input_ids"]
    before = lm.fingerprint
    assert load_model(str(save_converted(lm, tmp_path / "plain"))).fingerprint == before


def test_load_model_names_the_extra_when_gguf_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'saekit\[gguf\]'"):
        load_model(str(tmp_path / "model.gguf"))


def _folder(kind: str, base: Path, llama: Path) -> str:
    """Makes a broken model folder of one kind."""
    import transformers as tf

    folder = base / kind
    small = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "encoder":
        config = tf.BertConfig(**small, intermediate_size=8)
        tf.BertForMaskedLM(config).save_pretrained(folder)
    elif kind == "headless":
        tf.LlamaModel(tf.LlamaConfig(**small, intermediate_size=8)).save_pretrained(folder)
    elif kind == "a-file":
        folder.write_text("hello")
    else:
        shutil.copytree(llama, folder)
        config_file, weights = folder / "config.json", folder / "model.safetensors"
        config = json.loads(config_file.read_text())
        if kind == "no-config":
            config_file.unlink()
        elif kind == "broken-config":
            config_file.write_text("{")
        elif kind == "unknown-type":
            config_file.write_text(json.dumps(config | {"model_type": "zzz"}))
        elif kind == "no-weights":
            weights.unlink()
        elif kind == "truncated-weights":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif kind == "missing-layer":
            config_file.write_text(json.dumps(config | {"num_hidden_layers": 4}))
        elif kind == "no-tokenizer":
            for file in folder.glob("token*"):
                file.unlink()
        elif kind == "broken-tokenizer":
            (folder / "tokenizer.json").write_text("{")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("encoder", "holds BertForMaskedLM, needs a causal language model"),
        ("headless", "holds LlamaModel, needs a causal language model"),
        ("a-file", "a file, needs a hub id, a model folder or a .gguf file"),
        ("no-config", "folder without config.json"),
        ("broken-config", "not a valid JSON"),
        ("unknown-type", "model type `zzz`"),
        ("no-weights", "no file named model.safetensors"),
        ("truncated-weights", "files cannot be read"),
        ("missing-layer", "weights missing from its files: model.layers.3"),
        ("no-tokenizer", "no tokenizer files in the folder; name another one by 'tokenizer'"),
        ("broken-tokenizer", "has no tokenizer that can be loaded"),
    ],
)
def test_load_model_refuses_a_folder(
    kind: str, message: str, tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    name = _folder(kind, tmp_path, tiny_model_dir("llama"))
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"name": "nobody/no-such-model"}, ModelError, "no such local folder, and no model of that name could be had"),
        ({"name": "/no/such/folder"}, ModelError, "no such folder"),
        ({"name": "./model.gguf"}, ModelError, "no such file"),
        ({"name": ""}, ConfigError, "name"),
        ({"name": "x", "dtype": "int8"}, ConfigError, "dtype"),
        ({"name": "x", "device": "toaster"}, ModelError, "device 'toaster' cannot be used"),
    ],
    ids=lambda value: str(value.get("name", value)) if isinstance(value, dict) else "",
)
def test_load_model_refuses_a_config(config: dict[str, str], error: type[SaekitError], message: str) -> None:
    with pytest.raises(error) as caught:
        load_model(ModelConfig.parse(config))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_importing_the_room_loads_neither_transformers_nor_datasets() -> None:
    code = "import sys, saekit.models; print([m for m in ('transformers', 'datasets', 'gguf', 'pyarrow') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
