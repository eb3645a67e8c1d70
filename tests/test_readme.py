"""The README's code runs as written, on a tiny model in place of GPT-2 and a local file in place of the hub's dataset."""

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saekit_pipelines.cli import app
from saekit_pipelines.recipe import load_recipe
from safetensors.torch import load_file, save_file
from typer.core import TyperGroup
from typer.main import get_command

from saekit.models import load_model
from tests.saekit.hub.hub_server import HubServer

ROOT = Path(__file__).parents[1]
RELEASED = ROOT / "tests" / "fixtures" / "dictionaries" / "gemmascope_res"
GPT2_SAE = "jbloom/GPT2-Small-SAEs-Reformatted:blocks.8.hook_resid_pre"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture(scope="session")
def gpt2_sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a folder as that release has, of the tiny GPT-2's width: read before its last layer, with centred weights."""
    folder = tmp_path_factory.mktemp("released") / "blocks.2.hook_resid_pre"
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (32, 64), "b_enc": (64,), "W_dec": (64, 32), "b_dec": (32,)}
    folder.mkdir()
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        folder / "sae_weights.safetensors",
    )
    config = {"hook_point": "blocks.2.hook_resid_pre", "model_name": "gpt2-small", "d_in": 32, "d_sae": 64}
    (folder / "cfg.json").write_text(json.dumps(config | {"prepend_bos": True}), encoding="utf-8")
    return folder


def test_features_of_a_sentence_take_six_lines(
    hub: HubServer, tiny_model_dir: Callable[[str], Path], gpt2_sae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (block for block in blocks("python") if "sk.capture(lm, " in block)
    assert len([line for line in block.splitlines() if line.strip()]) == 6
    repo, _, folder = GPT2_SAE.partition(":")
    hub.add(repo, {f"{folder}/{path.name}": path.read_bytes() for path in gpt2_sae.iterdir()})
    hub.add("openai-community/gpt2", tiny_model_dir("gpt2"))
    exec(compile(block, "README.md", "exec"), {})
    assert hub.asked(r"GET /storage/")
    printed = capsys.readouterr().out.splitlines()
    # By hand: the residual stream before block 2 less its mean, behind a BOS token.
    lm = load_model(str(tiny_model_dir("gpt2")))
    ids = [lm.tokenizer.bos_token_id, *lm.tokenizer("The river rose and the mill still turns.")["input_ids"]]
    hidden = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, 1:]
    weights = load_file(gpt2_sae / "sae_weights.safetensors")
    x = hidden - hidden.mean(dim=-1, keepdim=True) - weights["b_dec"]
    acts = torch.relu(x @ weights["W_enc"] + weights["b_enc"]).amax(dim=0)
    expected = [(int(f), float(acts[f])) for f in acts.argsort(descending=True)[:5]]
    assert [re.fullmatch(r"feature (\d+): ([\d.]+)", line) is not None for line in printed] == [True] * 5
    for line, (feature, value) in zip(printed, expected, strict=True):
        assert line.startswith(f"feature {feature}: ")
        assert float(line.split(": ")[1]) == pytest.approx(value, abs=0.006)


@pytest.mark.slow
def test_python_code_runs(
    tiny_model_dir: Callable[[str], Path],
    many_documents_file: Path,
    gpt2_sae: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_ins = {
        '"openai-community/gpt2"': repr(str(tiny_model_dir("gpt2"))),
        '{"kind": "huggingface", "name": "monology/pile-uncopyrighted"}': repr(
            {"kind": "files", "paths": [str(many_documents_file)]}
        ),
        "num_tokens=50_000_000": 'num_tokens=8192, tokens={"context_len": 32}',
        "num_tokens=200_000_000": "num_tokens=8192, batch_size=256",
        "transformer.h.8": "transformer.h.1",
        "transformer.h.10": "transformer.h.2",
        "d_sae=24_576, k=32": "d_sae=64, k=4",
        "test_fraction=0.01": "test_fraction=0.2",
        "W_dec[123]": "W_dec[12]",
        "google/gemma-scope-2b-pt-res:layer_20/width_16k/average_l0_71": str(RELEASED),
        GPT2_SAE: str(gpt2_sae),
    }
    code = "\n".join(blocks("python"))
    for written, stand_in in stand_ins.items():
        assert written in code, f"{written!r} is not in the README any more"
        code = code.replace(written, stand_in)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "runs/gpt2-h8/labels/labels.jsonl").stat().st_size > 0
    assert (tmp_path / "runs/gpt2-h8/evaluation/evaluation.json").is_file()
    assert not names["steered"].equal(names["without"])  # type: ignore[attr-defined]  # tensors


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_are_there(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = command
    if program == "saekit" and arguments[0] == "run":
        load_recipe(arguments[1], arguments[2:])
        return
    if program == "saekit":
        group = get_command(app)
        assert isinstance(group, TyperGroup)
        group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
        return
    assert program.startswith("scripts/")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    assert program in done.stdout


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_into_the_repository_lead_somewhere(target: str) -> None:
    if not target.startswith("https://"):
        assert (ROOT / target).exists(), target
