import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from saekit.errors import ConfigError, FormatError, ResourceError, SaekitError, StoreError
from saekit.manifest import read_manifest
from saekit.progress import NO_PROGRESS, Task
from saekit.report import ReportConfig, ReportRun, build_report
from saekit.report.writer import _slugs

Build = Callable[..., Path]


class Told:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> AbstractContextManager[Task]:
        return NO_PROGRESS.task(name, total, unit, done=done)

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def build(tmp_path: Path, store: Path, tokenizer: Any) -> Build:
    """A function that builds into tmp_path/report."""

    def call(runs: list[ReportRun], **changes: Any) -> Path:
        values = {"title": "T", "store": store, "tokenizer": tokenizer, "runs": runs} | changes
        return build_report(values.pop("out", tmp_path / "report"), **values)

    return call


def _copy(run: ReportRun, folder: Path) -> ReportRun:
    """A copy whose folders a test may break."""
    for name in ("sae", "labels", "evaluation"):
        source = getattr(run, name)
        if source is not None:
            shutil.copytree(source, folder / name)
    return ReportRun(
        name=run.name,
        sae=folder / "sae",
        labels=folder / "labels" if run.labels else None,
        evaluation=folder / "evaluation" if run.evaluation else None,
    )


def test_build_report_writes_a_site_and_a_manifest(build: Build, report: Any) -> None:
    told = Told()
    index = build(list(report.runs), progress=told)
    folder = index.parent
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (manifest.stage, manifest.status) == ("report", "complete")
    assert set(manifest.inputs) == {
        "cache", "train/topk", "label/topk", "evaluate/topk", "train/jumprelu", "label/jumprelu",
        "evaluate/jumprelu", "train/bare",
    }  # fmt: skip
    # The manifest holds the count and is not counted.
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert manifest.counts["features"] == 240
    assert manifest.counts["files"] == len(files)
    assert manifest.counts["bytes"] == sum(path.stat().st_size for path in files)
    assert "240 features" in told.said[-1]
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_the_page_names_no_address_outside_its_folder(report: Any) -> None:
    for path in (report.folder / "index.html", *(report.folder / "assets").iterdir()):
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "fetch(" not in text
        assert "innerHTML" not in text


def test_the_title_is_escaped(report: Any) -> None:
    page = (report.folder / "index.html").read_text(encoding="utf-8")
    assert "A &lt;b&gt;report&lt;/b&gt;" in page
    assert "<b>" not in page


def test_a_second_build_of_the_same_inputs_does_nothing(build: Build, write_run: Any) -> None:
    runs = [write_run(num_features=5)]
    index = build(runs)
    before = {path: path.stat().st_mtime_ns for path in index.parent.rglob("*")}
    told = Told()
    assert build(runs, progress=told) == index
    assert {path: path.stat().st_mtime_ns for path in index.parent.rglob("*")} == before
    assert "nothing to do" in told.said[-1]


@pytest.mark.parametrize("change", ["title", "config", "label", "broken page", "half built"])
def test_a_build_of_something_else_replaces_the_report(
    build: Build, write_run: Any, tmp_path: Path, change: str
) -> None:
    run = _copy(write_run(num_features=5), tmp_path / "run")
    folder = build([run]).parent
    (folder / "data" / "topk" / "stale.js").touch()
    changes: dict[str, Any] = {}
    if change == "title":
        changes = {"title": "Another"}
    elif change == "config":
        changes = {"config": ReportConfig(num_top=2)}
    elif change == "label":
        manifest = json.loads((tmp_path / "run" / "labels" / "manifest.json").read_text())
        manifest["counts"] = {"labels": 7}
        (tmp_path / "run" / "labels" / "manifest.json").write_text(json.dumps(manifest))
    elif change == "broken page":
        (folder / "index.html").unlink()
    else:
        manifest = json.loads((folder / "manifest.json").read_text()) | {"status": "running"}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    told = Told()
    build([run], progress=told, **changes)
    assert "nothing to do" not in told.said[-1]
    assert not (folder / "data" / "topk" / "stale.js").exists()
    assert (folder / "index.html").is_file()


def test_a_failed_build_leaves_the_old_report_and_no_debris(build: Build, write_run: Any, tmp_path: Path) -> None:
    run = _copy(write_run(num_features=5), tmp_path / "run")
    folder = build([run]).parent
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    (run.labels / "effects-vocabproj.safetensors").write_bytes(b"no tensors")  # type: ignore[operator]
    with pytest.raises(StoreError):
        build([run], title="Another")
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "run"]


KILLED = """
import sys
from pathlib import Path
import saekit.report.writer as writer
from saekit.report import ReportRun, build_report
store, sae, labels, evaluation, out = map(Path, sys.argv[1:])
class Tokenizer:
    def __len__(self): return 400
    def convert_ids_to_tokens(self, ids): return ["x"] * len(ids)
    def decode(self, ids): return "x"
pages = writer._write_pages
def stop(folder, title):
    pages(folder, title)
    print("almost", flush=True)
    sys.stdin.read()
writer._write_pages = stop
build_report(out, title="Another", store=store, tokenizer=Tokenizer(),
             runs=[ReportRun(name="topk", sae=sae, labels=labels, evaluation=evaluation)])
"""


def test_a_killed_build_leaves_the_old_report_and_the_next_one_works(
    build: Build, write_run: Any, tmp_path: Path, store: Path
) -> None:
    run = write_run(num_features=5)
    folder = build([run]).parent
    before = (folder / "manifest.json").read_bytes()
    arguments = [str(path) for path in (store, run.sae, run.labels, run.evaluation, folder)]
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(root / name) for name in (".", "kernels"))}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "almost\n"
        child.send_signal(signal.SIGKILL)
    assert (folder / "manifest.json").read_bytes() == before
    assert (tmp_path / ".report.building").is_dir()
    build([run], title="Another")
    assert json.loads((folder / "manifest.json").read_text())["config"]["title"] == "Another"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("parts", [
    {"with_labels": False}, {"with_evaluation": False}, {"with_scores": False}, {"with_effects": False},
    {"num_dead": 5}, {"labelers": ()}, {"num_features": 1, "num_dead": 0}, {"num_features": 1, "num_dead": 1},
], ids=lambda parts: "-".join(f"{key}-{value}" for key, value in parts.items()))  # fmt: skip
def test_missing_parts_are_no_error(build: Build, write_run: Any, parts: dict[str, Any]) -> None:
    assert build([write_run(**({"num_features": 5} | parts))]).is_file()


def test_an_sae_that_was_not_trained_here_has_no_curves(build: Build, write_run: Any, tmp_path: Path) -> None:
    run = _copy(write_run(num_features=5), tmp_path / "run")
    (run.sae / "metrics.jsonl").unlink()
    assert build([run]).is_file()


def _break_cfg(run: ReportRun) -> None:
    (run.sae / "cfg.json").write_text("{")


def _drop_cfg(run: ReportRun) -> None:
    (run.sae / "cfg.json").unlink()


def _change_width(run: ReportRun) -> None:
    cfg = json.loads((run.sae / "cfg.json").read_text())
    cfg["sae"]["d_sae"] = 4
    (run.sae / "cfg.json").write_text(json.dumps(cfg))


def _no_width(run: ReportRun) -> None:
    (run.sae / "cfg.json").write_text('{"sae": {}}')


def _break_metrics(run: ReportRun) -> None:
    (run.sae / "metrics.jsonl").write_text('{"tokens": 1}\n{"tok')


def _foreign_store(run: ReportRun) -> None:
    assert run.labels is not None
    manifest = json.loads((run.labels / "contexts" / "manifest.json").read_text())
    manifest["inputs"]["cache"] = "0" * 64
    (run.labels / "contexts" / "manifest.json").write_text(json.dumps(manifest))


def _far_label(run: ReportRun) -> None:
    assert run.labels is not None
    with (run.labels / "labels.jsonl").open("a") as file:
        file.write('{"feature": 77, "labeler": "lexical", "label": "x"}\n')


def _unfinished(run: ReportRun) -> None:
    manifest = json.loads((run.sae / "manifest.json").read_text()) | {"status": "running"}
    (run.sae / "manifest.json").write_text(json.dumps(manifest))


def _truncate_contexts(run: ReportRun) -> None:
    assert run.labels is not None
    path = run.labels / "contexts" / "contexts.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_break_cfg, FormatError, "cfg.json': cannot be read as JSON"),
        (_drop_cfg, FormatError, "cfg.json': no such file, needs the folder of a trained SAE"),
        (_no_width, FormatError, "no sae.d_sae, needs a folder that training wrote"),
        (_change_width, FormatError, "contexts speak of 5 features, the SAE has 4; give folders of one SAE"),
        (_break_metrics, FormatError, "line 2 is not JSON, needs one object a line"),
        (_foreign_store, StoreError, "its contexts folder was made from another activation store"),
        (_far_label, FormatError, "labels speak of feature 77, the SAE has 5; give folders of one SAE"),
        (_unfinished, StoreError, "the train stage has not finished; run it again to resume it"),
        (_truncate_contexts, StoreError, "contexts.safetensors': cannot be read"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_broken_inputs_are_one_line_and_leave_nothing(
    build: Build,
    write_run: Any,
    tmp_path: Path,
    spoil: Callable[[ReportRun], None],
    error: type[SaekitError],
    message: str,
) -> None:
    run = _copy(write_run(num_features=5, num_dead=0), tmp_path / "run")
    spoil(run)
    with pytest.raises(error) as raised:
        build([run])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_store_that_is_not_there_is_an_error(build: Build, write_run: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="needs the output folder of a finished stage"):
        build([write_run(num_features=5)], store=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "no runs, needs at least one"), (("a", "a"), "runs named 'a' more than once")],
    ids=["none", "twice"],
)
def test_runs_need_different_names(build: Build, write_run: Any, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build([write_run(name, num_features=5) for name in names])


@pytest.mark.parametrize("kind", ["foreign files", "another stage", "a file"])
def test_a_folder_of_something_else_is_never_replaced(build: Build, report: Any, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "report"
    if kind == "a file":
        out.write_text("mine")
    elif kind == "foreign files":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        shutil.copytree(report.runs[0].sae, out)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="needs a folder"):
        build(list(report.runs))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_a_resource_error(build: Build, write_run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        build([write_run(num_features=5)], out=tmp_path / "file" / "report")


def test_a_full_disk_is_a_resource_error(build: Build, write_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saekit.report.writer.write_payload", full)
    with pytest.raises(ResourceError, match="No space left on device") as raised:
        build([write_run(num_features=5)])
    assert isinstance(raised.value, SaekitError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["topk", "jumprelu"], ["topk", "jumprelu"]),
        (["a b", "a/b", "A b"], ["a-b", "a-b-2", "A-b-3"]),
        (["..", "\u4f60", "x"], ["run", "run-2", "x"]),
        (["../../etc"], ["etc"]),
    ],
    ids=["plain", "equal", "nothing-left", "path"],
)
def test_slugs_are_safe_and_different(names: list[str], expected: list[str]) -> None:
    assert _slugs(names) == expected


@pytest.mark.slow
def test_thousands_of_features_are_small_and_in_chunks(build: Build, write_run: Any) -> None:
    run = write_run("topk", num_features=2_000, num_dead=80, labelers=("lexical", "llm:judge-1"))
    folder = build([run]).parent
    assert (folder / "data" / "topk" / "index.js").stat().st_size < 0.4 * 2**20
    assert max(path.stat().st_size for path in (folder / "data" / "topk").glob("chunk-*.js")) < 2**20
    assert sum(1 for _ in (folder / "data" / "topk").glob("chunk-*.js")) == 32
