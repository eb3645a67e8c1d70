"""The quickstart's last step: overrides in the right order, the child's cost, its exit code, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from saekit_pipelines.recipe import load_recipe

from scripts import run_quickstart
from scripts.prepare_quickstart import Prepared
from scripts.run_quickstart import RECIPE, ROOT, SHORT, main, overrides_for, remember

PYTHON = sys.executable
PREPARED = Prepared(model=Path("/m o/del"), text=Path("/t/ext.jsonl"), download_seconds=1.0, convert_seconds=2.0)


@pytest.mark.parametrize("short", [False, True])
def test_overrides_fit_the_recipe_and_the_users_come_last(short: bool) -> None:
    recipe = load_recipe(ROOT / RECIPE, overrides_for(PREPARED, ["cache.num_tokens=4_096", "out=a b"], short=short))
    assert recipe.cache.model.name == "/m o/del"
    assert recipe.cache.text.model_dump()["paths"] == ("/t/ext.jsonl",)
    assert recipe.cache.num_tokens == 4096
    assert recipe.out == "a b"


def test_short_changes_only_what_the_recipe_has_and_makes_it_smaller() -> None:
    whole = load_recipe(ROOT / RECIPE)
    short = load_recipe(ROOT / RECIPE, SHORT)
    assert short.out != whole.out
    assert short.cache.num_tokens * 10 < whole.cache.num_tokens
    assert set(short.train) == set(whole.train)
    for name, run in short.train.items():
        assert run.training.num_tokens * 10 < whole.train[name].training.num_tokens


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An executable in place of Python; the test writes what it does."""
    path = tmp_path / "child"
    path.touch(mode=0o755)
    monkeypatch.setattr(run_quickstart.sys, "executable", str(path))
    return path


def in_a_small_process(child: Path, code: str) -> subprocess.Popen[str]:
    """Runs code with `child` in place of Python: a child's peak memory is at least its parent's, and pytest is large."""
    prelude = f"import sys; from scripts import run_quickstart as run; sys.executable = {str(child)!r}; "
    return subprocess.Popen(
        [PYTHON, "-c", prelude + code], cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True
    )


def test_run_pipeline_tells_code_time_and_memory_of_the_child(child: Path, tmp_path: Path) -> None:
    child.write_text(
        f"#!{PYTHON}\nimport sys, time\ntime.sleep(0.2)\nblock = b'x' * 200_000_000\n"
        f"open({str(tmp_path / 'arguments')!r}, 'w').write(' '.join(sys.argv[1:]))\nsys.exit(3)\n"
    )
    shown, _ = in_a_small_process(child, "print(*run.run_pipeline(['a=b c']))").communicate(timeout=60)
    code, seconds, peak = map(float, shown.split())
    assert code == 3
    assert 0.2 < seconds < 30
    assert 200e6 < peak < 300e6
    assert (tmp_path / "arguments").read_text() == f"-m saekit_pipelines run {RECIPE} a=b c"


def test_the_measuring_process_stays_small() -> None:
    code = "import sys, scripts.run_quickstart; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_run_pipeline_waits_for_an_interrupted_child(number: signal.Signals, to_group: bool, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    child = tmp_path / "child"
    child.write_text(
        f"#!{PYTHON}\nimport pathlib, sys, time\nmarks = pathlib.Path({str(marks)!r})\n"
        "try:\n    (marks / 'started').touch()\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.3)\n    (marks / 'finished').touch()\n    sys.exit(130)\n"
    )
    child.chmod(0o755)
    process = in_a_small_process(child, "sys.exit(run.run_pipeline([])[0])")
    deadline = time.monotonic() + 60
    while not (marks / "started").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    if to_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert (marks / "finished").exists()


def test_remember_appends_and_forgets_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "run" / "timings.json"
    for number in range(run_quickstart.MAX_CALLS + 2):
        remember(path, {"number": number})
    kept = json.loads(path.read_text())
    assert [call["number"] for call in kept["calls"]] == list(range(2, run_quickstart.MAX_CALLS + 2))
    assert kept["machine"]["cores"] == os.cpu_count()
    path.write_text("[")
    remember(path, {"number": 99})
    assert [call["number"] for call in json.loads(path.read_text())["calls"]] == [99]


def test_main_says_where_the_report_is_and_keeps_the_figures(
    child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child.write_text("#!/bin/sh\nexit 0\n")
    monkeypatch.setattr(run_quickstart, "prepare", lambda home, progress: PREPARED)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert main(["--install-seconds", "61", f"out={out}", "--short"]) == 0
    shown = capsys.readouterr().out
    assert f"file://{out}/report/index.html" in shown
    assert "installation 1 min 01 s, download 1.0 s, conversion 2.0 s; pipeline" in shown
    (call,) = json.loads((out / "timings.json").read_text())["calls"]
    assert call["short"] is True
    assert call["overrides"] == [f"out={out}"]
    assert call["install_seconds"] == 61


def test_main_passes_on_a_failure_and_keeps_nothing(
    child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child.write_text("#!/bin/sh\nexit 2\n")
    monkeypatch.setattr(run_quickstart, "prepare", lambda home, progress: PREPARED)
    monkeypatch.chdir(tmp_path)
    assert main([f"out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_main_refuses_a_wrong_override_before_it_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_quickstart, "prepare", lambda home, progress: pytest.fail("downloaded"))
    monkeypatch.chdir(tmp_path)
    assert main(["name.x=1"]) == 2
    assert capsys.readouterr().err.startswith("error: override 'name.x=1': ")
