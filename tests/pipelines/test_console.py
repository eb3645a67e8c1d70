"""Progress where there is no terminal: a line now and then, with everything of a labelling run in it."""

import io
from types import SimpleNamespace

from rich.console import Console
from saekit_pipelines import console

from saekit.labelling import LabellingModel, Ledger, LLMConfig
from saekit.labelling.live import OpenAIChat
from tests.saekit.labelling.stub import Fault, serving
from tests.saekit.labelling.test_ledger import request

NUM = 6


def test_labelling_takes_one_line_a_quarter_minute_with_all_its_figures(tmp_path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    out = io.StringIO()
    progress = console.ConsoleProgress(Console(file=out, width=200))
    with serving(lambda _, number: Fault(500) if number == 0 else "{}") as server:
        config = LLMConfig(
            model="stub", base_url=server.url, wait_seconds=0.001, price_input=1.0, price_output=1.0, concurrency=1
        )
        ledger = Ledger(tmp_path / "ledger.sqlite")
        model = LabellingModel(OpenAIChat(config), ledger, config)
        with progress.task("explanations", NUM, "features") as task:
            figures = model.figures(done=0, total=NUM)
            for number in range(NUM):
                model.ask([request(number)])
                now[0] += 4.0
                task.advance(1, **figures(number + 1))
        ledger.close()
    lines = out.getvalue().splitlines()
    # After 16 s, and at the end.
    assert [line.split(",")[0] for line in lines] == ["explanations: 4/6 features", "explanations: 6/6 features"]
    for part in ("left", "requests/s", "in flight 0", "unanswered 1", "tokens 440", "cost $0.0004 of about $0.0007"):
        assert part in lines[0]


def test_a_bar_stays_on_one_line_of_a_narrow_terminal() -> None:
    out = io.StringIO()
    progress = console.ConsoleProgress(Console(file=out, width=80, force_terminal=True, legacy_windows=False))
    with progress.task("explanations (raw)", 3, "features") as task:
        task.advance(
            1, **{"requests/s": 3.2, "in flight": "32", "tokens": "1,234,567", "cost": "$1.0000 of about $3.0000"}
        )
    assert max(frame.count("\n") for frame in out.getvalue().split("\x1b[2K")) <= 2
