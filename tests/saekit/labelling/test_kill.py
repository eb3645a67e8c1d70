"""kill -9 at random moments, then the same command: the same labels, and no recorded request a second time."""

import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from saekit.labelling import (
    BatchConfig,
    Label,
    LabelConfig,
    LabellingModel,
    Ledger,
    Score,
    label_features,
    read_labels,
    read_scores,
)
from saekit.labelling.batch import OpenAIBatch
from saekit.labelling.live import OpenAIChat
from saekit.labelling.llm import explain_and_judge
from saekit.manifest import read_manifest
from tests.saekit.labelling.batchstub import batch_serving
from tests.saekit.labelling.bench import FIRING, Bench, oracle
from tests.saekit.labelling.planted import WordTokenizer
from tests.saekit.labelling.stub import StubServer, serving

NUM_KILLS = int(os.environ.get("SAEKIT_KILLS", "4"))
"""Set it to 50 or more for a long run."""
CONCURRENCY = 4


class Runner:
    """A process that forks a run for every line it gets: it was forked before any server had a thread, and loads nothing anew."""

    def __init__(self, work: Callable[[str], None]) -> None:
        self._read, child_write = os.pipe()
        child_read, self._write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._write)
            _serve(work, child_read, child_write)
        os.close(child_read)

    def start(self, line: str) -> int:
        """Starts a run and returns its process id."""
        os.write(self._write, line.encode() + b"\n")
        return int(os.read(self._read, 100))

    def wait(self) -> int:
        """Waits for the run and returns how it ended."""
        return int(os.read(self._read, 100))

    def close(self) -> None:
        os.close(self._write)
        os.waitpid(self._pid, 0)
        os.close(self._read)


def _serve(work: Callable[[str], None], read: int, write: int) -> None:
    with os.fdopen(read) as lines:
        for line in lines:
            run = os.fork()
            if run == 0:
                status = 1
                try:
                    work(line.strip())
                    status = 0
                finally:
                    os._exit(status)
            os.write(write, str(run).encode())
            _, status = os.waitpid(run, 0)
            os.write(write, str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


@contextmanager
def running(work: Callable[[str], None]) -> Iterator[Runner]:
    runner = Runner(work)
    try:
        yield runner
    finally:
        runner.close()


def slowly(body: dict[str, object], number: int) -> str:
    time.sleep(0.004)
    return oracle(body, number)


def recorded(folder: Path) -> set[str]:
    path = folder / "ledger.sqlite"
    if not path.exists():
        return set()
    db = sqlite3.connect(path)
    try:
        return {row[0] for row in db.execute("select key from requests where state = 'answered'")}
    except sqlite3.OperationalError:
        # Killed before the tables were made.
        return set()
    finally:
        db.close()


def records(folder: Path) -> tuple[list[Label], list[Score]]:
    by_name = lambda record: (record.feature, record.labeler)  # noqa: E731
    return sorted(read_labels(folder), key=by_name), sorted(read_scores(folder), key=by_name)


def _asked(server: StubServer, since: int) -> list[str]:
    return [str(body["messages"]) for body in server.requests[since:]]


def test_killed_runs_give_the_same_labels_and_repeat_no_recorded_request(world, contexts_folder, tmp_path) -> None:
    generator = random.Random(0)
    lab = Bench(world, tmp_path, contexts_folder, concurrency=CONCURRENCY)
    # Imports what every run would have to import.
    OpenAIChat(lab.config.model_copy(update={"base_url": "http://127.0.0.1:1/v1"}))

    def work(line: str) -> None:
        folder, url = line.split()
        server = StubServer.__new__(StubServer)
        server.url = url
        lab.move(Path(folder)).run(server, FIRING)

    kills = trial = 0
    with running(work) as runner, serving(slowly) as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        runner.start(f"{whole} {server.url}")
        assert runner.wait() == 0
        reference = records(whole)
        assert len(server.requests) == 2 * len(FIRING)
        while kills < NUM_KILLS:
            trial += 1
            folder = tmp_path / f"trial{trial}"
            folder.mkdir()
            first = len(server.requests)
            here = 0
            for _ in range(generator.randint(1, 4)):
                known = recorded(folder)
                before = len(server.requests)
                enough = before + generator.randint(1, 8)
                pid = runner.start(f"{folder} {server.url}")
                while len(server.requests) < enough and not _is_gone(pid):
                    time.sleep(generator.random() * 0.004)
                _kill(pid)
                runner.wait()
                here += 1
                assert known <= recorded(folder)
            num_known = len(recorded(folder))
            before = len(server.requests)
            runner.start(f"{folder} {server.url}")
            assert runner.wait() == 0
            assert records(folder) == reference
            assert len(server.requests) - before == 2 * len(FIRING) - num_known
            asked = _asked(server, first)
            # Only what was on its way at a kill is asked again.
            assert len(asked) - len(set(asked)) <= here * CONCURRENCY
            kills += here


def test_killed_label_stage_ends_as_if_it_had_not_been(world, tmp_path) -> None:
    llm = {"model": "stub", "concurrency": 2, "num_judged": 3, "judge_lexical": True}
    offline = {"vocab_projection": False, "token_change": None}
    lm = SimpleNamespace(fingerprint="1" * 64, tokenizer=WordTokenizer())

    def work(line: str) -> None:
        config = LabelConfig.parse({**offline, "llm": {**llm, "base_url": line}})
        label_features(world.sae, world.train, test=world.test, lm=lm, out=tmp_path, config=config)

    with running(work) as runner, serving(slowly) as server:
        # Once among the explanations, once among the judgements.
        for enough in (4, 18):
            pid = runner.start(server.url)
            while len(server.requests) < enough:
                assert not _is_gone(pid), "the run ended before it was killed"
                time.sleep(0.001)
            _kill(pid)
            runner.wait()
            assert read_manifest(tmp_path).status == "running"
        num_known = len(recorded(tmp_path))
        before = len(server.requests)
        runner.start(server.url)
        assert runner.wait() == 0
    assert num_known + len(server.requests) - before == 3 * len(FIRING)
    manifest = read_manifest(tmp_path)
    assert manifest.status == "complete"
    assert manifest.counts["llm"]["answers"] == 3 * len(FIRING)
    labels, scores = records(tmp_path)
    assert [(label.feature, label.labeler) for label in labels] == sorted(
        [(feature, "lexical") for feature in range(11)] + [(feature, "llm:stub") for feature in FIRING]
    )
    judged = [(score.feature, score.labeler) for score in scores if score.scorer == "detection"]
    assert judged == [(feature, labeler) for feature in FIRING for labeler in ("lexical", "llm:stub")]


def test_killed_batch_runs_wait_for_the_batch_that_is_there(world, contexts_folder, tmp_path) -> None:
    generator = random.Random(1)
    batch = BatchConfig(poll_seconds=0.002, max_requests=6)
    lab = Bench(world, tmp_path, contexts_folder, backend="batch", batch=batch)

    def work(line: str) -> None:
        folder, url = line.split()
        lab.move(Path(folder))
        config = lab.config.model_copy(update={"base_url": url})
        model = LabellingModel(OpenAIBatch(config), Ledger(lab.folder / "ledger.sqlite"), config)
        explain_and_judge(model, lab.questions(FIRING), labels=lab.labels, scores=lab.scores)

    with running(work) as runner, batch_serving(oracle) as server:
        server.polls = 6
        for _ in range(max(4, NUM_KILLS // 3)):
            pid = runner.start(f"{tmp_path} {server.url}")
            deadline = time.monotonic() + generator.random() * 0.3
            while time.monotonic() < deadline and not _is_gone(pid):
                time.sleep(0.002)
            _kill(pid)
            runner.wait()
        runner.start(f"{tmp_path} {server.url}")
        assert runner.wait() == 0
    assert len(server.charged) == len({str(body["messages"]) for body in server.requests}) == 2 * len(FIRING)
    labels, scores = records(tmp_path)
    assert [label.feature for label in labels] == [score.feature for score in scores] == FIRING


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        # It had come to its end.
        return


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
