"""`saekit score`, and the same recipe on random weights, from the command line to the files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from saekit_pipelines.cli import app
from typer.testing import CliRunner

from saekit.labelling import read_labels, read_scores
from tests.saekit.labelling.bench import oracle
from tests.saekit.labelling.stub import serving

SAE = """
[train.topk.sae]
kind = "topk"
d_sae = 32
k = 4
[train.topk.training]
num_tokens = 2048
batch_size = 256

"""


def _said(result: Result) -> str:
    """Output without the line breaks of a narrow terminal."""
    return " ".join(result.output.split())


def test_labels_are_scored_beside_those_of_random_weights(
    recipe_file: Path, with_saes: Callable[[Path, str], Path]
) -> None:
    with_saes(recipe_file, SAE)
    run, runner = recipe_file.parent / "run", CliRunner()
    quick = [str(recipe_file), "label.token_change.num_contexts=2", "controls.random_weights=true"]
    planned = runner.invoke(app, ["run", *quick, "--dry-run"])
    assert "random weights: label topk" in _said(planned)
    done = runner.invoke(app, ["run", *quick])
    assert done.exit_code == 0, done.output
    assert "with random weights" in _said(done)
    rows = json.loads((run / "random_weights.json").read_text())["topk"]
    (rule,) = [row for row in rows if (row["scorer"], row["labeler"]) == ("rule", "lexical")]
    for side, folder in (("trained", run), ("random", run / "random_weights")):
        scores = [score.f1 for score in read_scores(folder / "label" / "topk") if score.f1 is not None]
        assert rule[side]["f1"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)
        assert len(read_labels(folder / "label" / "topk")) == 32
    models = [json.loads((folder / "cache" / "manifest.json").read_text()) for folder in (run, run / "random_weights")]
    assert [m["config"]["model"]["random_weights"] for m in models] == [None, "all"]
    with serving(oracle) as server:
        llm = f'label.llm={{model="stub", base_url="{server.url}", num_judged=2, num_controlled=0, near_share=0.0}}'
        command = ["score", str(recipe_file), llm, "--labeler", "lexical"]
        planned = runner.invoke(app, [*command, "--dry-run"])
        assert planned.exit_code == 0, planned.output
        assert server.requests == []
        scored = runner.invoke(app, command)
        assert scored.exit_code == 0, scored.output
        assert f"{len(server.requests)} requests" in _said(planned)
        assert runner.invoke(app, command).exit_code == 0
    found = [score for score in read_scores(run / "label" / "topk") if score.scorer == "detection"]
    assert len(found) == 32
    assert sum(bool(score.num_positive) for score in found) == len(server.requests) > 0
    nobody = runner.invoke(app, ["score", str(recipe_file)])
    assert nobody.exit_code == 2
    assert "no judge" in _said(nobody)
