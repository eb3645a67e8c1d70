"""The command line: help that teaches, one line and exit code 2 for what a user can mend, nothing half-written."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from saekit_pipelines.cli import app
from typer.testing import CliRunner, Result

from tests.saekit.labelling.bench import oracle
from tests.saekit.labelling.stub import serving

COMMANDS = [
    "run",
    "plan",
    "cache",
    "train",
    "label",
    "revive",
    "evaluate",
    "report",
    "status",
    "verify",
    "convert",
    "export",
    "compare-labels",
    "ls",
    "info",
    "pull",
    "push",
]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line_error(result: Result) -> str:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[[str], Path], many_documents_file: Path
) -> tuple[Path, Path]:
    """(recipe, run folder) of one finished run; copy it before changing it."""
    from tests.pipelines.conftest import RECIPE

    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "tiny.toml"
    recipe.write_text(
        RECIPE.format(out=folder / "run", model=tiny_model_dir("llama"), texts=many_documents_file), encoding="utf-8"
    )
    result = invoke("run", recipe)
    assert result.exit_code == 0, result.output
    return recipe, folder / "run"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output


def test_help_lists_every_command() -> None:
    assert all(command in invoke("--help").output for command in COMMANDS)


def test_module_runs_as_a_program_for_accelerate_launch() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "saekit_pipelines", "status", "/nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: '/nowhere': no such folder, needs the folder of a run\n"


def test_run_leaves_every_stage_finished(finished_run: tuple[Path, Path]) -> None:
    _, folder = finished_run
    result = invoke("status", folder)
    assert result.exit_code == 0
    assert result.output.count("finished") >= 8
    assert "unfinished" not in result.output
    assert (folder / "report" / "index.html").is_file()


def test_second_run_says_that_nothing_is_to_be_done_and_loads_no_model(
    finished_run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import saekit_pipelines.stages

    monkeypatch.setattr(saekit_pipelines.stages, "load_model", lambda _: pytest.fail("a model was loaded"))
    recipe, folder = finished_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = invoke("run", recipe)
    assert result.exit_code == 0
    assert "finished already, nothing to do" in result.output
    assert "random dictionary" in result.output, "the metrics are shown at the end of every run"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("cache", "cache.num_tokens=2048", "cache.num_tokens|num_tokens (4096 there, 2048 asked)"),
        ("train", "train.topk.sae.k=5", "k (4 there, 5 asked)"),
        ("label", "label.max_features=3", "max_features (None there, 3 asked)"),
        ("evaluate", "evaluate.num_bootstrap=60", "num_bootstrap (50 there, 60 asked)"),
    ],
)
def test_changed_config_is_refused_and_the_key_named(
    finished_run: tuple[Path, Path], command: str, override: str, message: str
) -> None:
    line = one_line_error(invoke(command, finished_run[0], override))
    assert any(part in line for part in message.split("|"))
    assert "use another folder or the old values" in line


def test_dry_run_writes_nothing(recipe_file: Path) -> None:
    result = invoke("run", recipe_file, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "caching 4,096 tokens" in " ".join(result.output.split())
    assert not (recipe_file.parent / "run").exists()


def _texts(tmp_path: Path, name: str, content: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return f'cache.text.paths=["{path}"]'


BAD_INPUT: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "model path does not exist": (lambda _: ["cache.model.name=/nowhere/model"], "/nowhere/model"),
    "model is no causal LM": (lambda p: [f"cache.model.name={_bert(p)}"], "causal"),
    "hook point does not exist": (lambda _: ['cache.hook_points=["model.layer.1"]'], "model.layers.1"),
    "empty dataset": (lambda p: [_texts(p, "empty.jsonl", b"")], "empty.jsonl"),
    "empty documents": (lambda p: [_texts(p, "blank.jsonl", b'{"text": ""}\n{"text": "  "}\n')], "empty"),
    "invalid UTF-8": (lambda p: [_texts(p, "latin.txt", b"caf\xe9 au lait")], "latin.txt"),
    "broken JSON": (lambda p: [_texts(p, "broken.jsonl", b'{"text": "a"}\n{"text": \n')], "broken.jsonl"),
    "column missing": (lambda _: ["cache.text.column=body"], "text"),
    "no such text": (lambda _: ['cache.text.paths=["/nowhere/*.jsonl"]'], "/nowhere/*.jsonl"),
    "context longer than the model's": (lambda _: ["cache.tokens.context_len=512"], "64"),
    "SAE of another width": (lambda _: ["train.topk.sae.d_in=33"], "33"),
    "out below a file": (lambda p: [f"out={_file(p)}/run"], "cannot be written"),
}


def _file(folder: Path) -> Path:
    path = folder / "a-file"
    path.write_text("")
    return path


def _bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    path = folder / "bert"
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=16)
    ).save_pretrained(path)
    return path


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing_behind(recipe_file: Path, tmp_path: Path, case: str) -> None:
    overrides, message = BAD_INPUT[case]
    line = one_line_error(invoke("run", recipe_file, *overrides(tmp_path)))
    assert message in line
    run = tmp_path / "run"
    assert not [path for path in run.rglob("*") if path.is_file()] if run.exists() else True


def test_full_disk_is_refused_before_anything_is_written(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import saekit.activations.plan

    monkeypatch.setattr(saekit.activations.plan, "free_bytes", lambda _: 1000)
    assert "free on that disk, needs" in one_line_error(invoke("run", recipe_file))
    assert not (recipe_file.parent / "run").exists()


def test_store_of_another_model_is_refused(
    finished_run: tuple[Path, Path], tiny_model_dir: Callable[[str], Path]
) -> None:
    line = one_line_error(invoke("cache", finished_run[0], f"cache.model.name={tiny_model_dir('qwen2')}"))
    assert "model.name" in line


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_store_is_named_by_verify(finished_run: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished_run[1] / "cache", cache)
    assert invoke("verify", cache).exit_code == 0
    largest = max((path for path in cache.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content[:-1] if damage == "truncated" else content)
    result = invoke("verify", cache)
    assert result.exit_code == 2
    assert "shard" in result.stdout
    assert "--repair" in result.stderr
    assert invoke("verify", cache, "--repair").exit_code == 2
    assert "not finished" in invoke("status", cache).output or "unfinished" in invoke("status", cache).output


def test_flipped_bit_is_no_training_data_and_is_mended(finished_run: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, folder = finished_run
    out = tmp_path / "run"
    shutil.copytree(folder / "cache", out / "cache")
    shard = max((out / "cache" / "hooks").rglob("*/c/*/*/*"), key=lambda path: path.stat().st_size)
    sound = shard.read_bytes()
    content = bytearray(sound)
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    line = one_line_error(invoke("train", recipe, f"out={out}", "--sae", "topk"))
    assert "has changed since it was written (crc32c differs)" in line
    assert "saekit verify --repair" in line
    invoke("verify", out / "cache", "--repair")
    assert invoke("cache", recipe, f"out={out}").exit_code == 0
    assert shard.read_bytes() == sound
    assert invoke("train", recipe, f"out={out}", "--sae", "topk").exit_code == 0


@pytest.mark.parametrize(
    ("command", "override", "key"),
    [
        ("train", "cache.num_tokens=8192", "num_tokens"),
        ("train", "split.seed=5", "split.seed"),
        ("label", "train.topk.sae.k=3", "sae.k"),
        ("evaluate", "train.topk.training.lr=0.5", "training.lr"),
        ("report", "cache.tokens.context_len=16", "tokens.context_len"),
    ],
)
def test_a_stage_alone_refuses_what_was_made_with_other_values(
    finished_run: tuple[Path, Path], command: str, override: str, key: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run[1].rglob("*") if path.name != ".lock"}
    assert key in one_line_error(invoke(command, finished_run[0], override))
    after = {path: path.stat().st_mtime_ns for path in finished_run[1].rglob("*") if path.name != ".lock"}
    assert after == before


def test_dry_run_names_a_changed_key(finished_run: tuple[Path, Path]) -> None:
    assert "num_tokens" in one_line_error(invoke("run", finished_run[0], "--dry-run", "cache.num_tokens=99999999"))


def test_unknown_sae_name_lists_those_there_are(recipe_file: Path) -> None:
    assert "the recipe has topk, jumprelu" in one_line_error(invoke("train", recipe_file, "--sae", "gated"))


def test_a_hook_point_outside_the_residual_stream_is_labelled_by_its_contexts(recipe_file: Path) -> None:
    result = invoke("run", recipe_file, 'cache.hook_points=["model.layers.1.mlp.gate_proj"]')
    assert result.exit_code == 0, result.output
    assert "no vocabulary projection: decoder rows are" in result.output
    assert (recipe_file.parent / "run" / "report" / "index.html").is_file()


def test_labels_by_a_model_keep_to_the_budget_resume_and_are_asked_again_where_they_failed(
    finished_run: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(finished_run[1], tmp_path / "run", ignore=shutil.ignore_patterns("label"))
    is_bad = True

    def moody(body: dict[str, object], number: int) -> str:
        return "no json" if is_bad and number < 2 else oracle(body, number)

    with serving(moody) as server:
        llm = f'label.llm={{model="m", base_url="{server.url}", price_input=1.0, price_output=2.0, max_features=5, attempts=1, num_judged=0}}'
        label = ["label", finished_run[0], f"out={tmp_path / 'run'}", llm, "--sae", "topk"]
        estimate = invoke(*label, "--dry-run")
        assert "5 requests" in estimate.output
        assert "about $0.0" in estimate.output
        assert server.requests == []
        assert "could pass max_cost 0.0001" in one_line_error(invoke(*label, "--budget", "0.0001"))
        assert server.requests == []
        done = invoke(*label, "--budget", "1")
        assert done.exit_code == 0, done.output
        assert "llm:m: 3 labelled, 2 failed (2: no JSON object with 'label' in 'no json')" in done.output
        assert "skipped (never fires)" in done.output or "skipped (its token rule" in done.output
        assert len(server.requests) == 5
        is_bad = False
        again = invoke(*label, "--retry-failed")
        assert "llm:m: 5 labelled" in again.output
        assert len(server.requests) == 7
        written = len(server.requests)
        revive = ["revive", *label[1:], "revive.features=[1,2,3]", "revive.num_controls=20"]
        assert "3 features" in invoke(*revive, "--dry-run").output
        assert "could pass max_cost 0.0001" in one_line_error(invoke(*revive, "--budget", "0.0001"))
        assert len(server.requests) == written
        woken = invoke(*revive)
        assert woken.exit_code == 0, woken.output
        assert re.search(r"topk: \d of 3 silent features wake up", woken.output)
        assert "k = 4 largest; bar: the k-th" in woken.output
        assert "revive/topk" in invoke("status", tmp_path / "run").output
    labels = tmp_path / "labels.json"
    assert (
        invoke(
            "export", finished_run[0], labels, f"out={tmp_path / 'run'}", llm, "--sae", "topk", "--to", "circuit-tracer"
        ).exit_code
        == 0
    )
    assert "1_" in next(iter(json.loads(labels.read_text())))


def test_compare_labels_prints_one_line_for_each_scorer(finished_run: tuple[Path, Path], tmp_path: Path) -> None:
    labels = finished_run[1] / "label" / "topk"
    assert "needs two labelers" in one_line_error(invoke("compare-labels", labels, labels))
    assert "no scores in it, needs a folder that 'saekit label' has written" in one_line_error(
        invoke("compare-labels", labels, tmp_path)
    )
    same = invoke("compare-labels", labels, labels, "--labeler", "lexical")
    assert same.exit_code == 0, same.output
    assert same.output.startswith("rule: lexical ")
    assert "difference +0.000 [+0.000, +0.000]" in same.output


def test_budget_without_a_labelling_model_is_refused(recipe_file: Path) -> None:
    assert "missing key 'label.llm.model'" in one_line_error(invoke("label", recipe_file, "--budget", "1"))


def test_export_names_what_it_needs(finished_run: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = finished_run
    assert "needs one of them; name it by --sae" in one_line_error(invoke("export", recipe, tmp_path))
    assert "the recipe has topk, jumprelu" in one_line_error(invoke("export", recipe, tmp_path, "--sae", "gated"))
    assert "give it by --as" in one_line_error(invoke("export", recipe, tmp_path, "--sae", "topk"))
    assert "needs neuronpedia or circuit-tracer" in one_line_error(
        invoke("export", recipe, tmp_path, "--sae", "topk", "--to", "csv")
    )


def test_export_writes_neuronpedias_folder(finished_run: tuple[Path, Path], tmp_path: Path) -> None:
    names = tmp_path / "names.toml"
    names.write_text(
        'model_id = "tiny"\nsource_id = "1-mine-res-64"\ncreator_id = "u"\ncreator_name = "Me"\nrelease = "r"\n'
        'model_name = "Tiny"\nnum_layers = 3\n'
    )
    result = invoke("export", finished_run[0], tmp_path / "np", "--sae", "topk", "--as", names)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "np" / "tiny" / "1-mine-res-64" / "explanations" / "batch-0.jsonl.gz").is_file()


def test_convert_writes_another_librarys_format_into_a_new_folder_only(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "fixtures" / "dictionaries" / "sparsify_topk"
    result = invoke("convert", source, tmp_path / "new", "--to", "saelens")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert "is not empty, needs a new folder" in one_line_error(invoke("convert", source, tmp_path / "new"))
    refused = invoke("convert", source, tmp_path / "other", "--revision", "v2")
    assert "revision 'v2' of a local folder" in one_line_error(refused)
    assert "cannot express" in one_line_error(
        invoke("convert", source.parent / "qwen_scope", tmp_path / "other", "--to", "sparsify")
    )
