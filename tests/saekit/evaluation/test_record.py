"""The evaluation record: round trip, undefined figures, tables, broken folders."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from saekit.errors import FormatError, StoreError
from saekit.evaluation.definitions import METRICS, definitions
from saekit.evaluation.record import (
    EVALUATION_NAME,
    FEATURES_NAME,
    Evaluation,
    EvaluationRow,
    FeatureMeasures,
    Figure,
    Histogram,
    read_evaluation,
    summary_table,
    write_evaluation,
)
from saekit.manifest import begin_stage, finish_stage


def _figures(**values: Figure) -> dict[str, Figure]:
    return {name: values.get(name, Figure()) for name in METRICS}


@pytest.fixture
def evaluation() -> Evaluation:
    rng = np.random.default_rng(0)
    return Evaluation(
        hook_point="model.layers.1",
        rows=(
            EvaluationRow(
                name="sae",
                title="SAE",
                metrics=_figures(fvu=Figure.of(0.25, 0.2, 0.3), l0=Figure.of(8), dead_fraction=Figure.of(0.125)),
            ),
            EvaluationRow(
                name="mean",
                title="mean vector",
                metrics=_figures(fvu=Figure.of(1.0, 1.0, 1.0)),
                difference={"fvu": Figure.of(-0.75, -0.8, -0.7)},
            ),
        ),
        reference={"ce_clean": None},
        num_tokens=1234,
        num_documents=5,
        num_loss_tokens=0,
        num_massive=2,
        num_bootstrap=100,
        density=Histogram(edges=(-2.0, -1.0, 0.0), counts=(3, 4)),
        decoder_cosine=Histogram(edges=(0.0, 1.0), counts=(8,)),
        definitions=definitions(),
        features=FeatureMeasures(
            density=rng.random(8).astype(np.float32),
            decoder_max_cosine=rng.random(8).astype(np.float32),
            neighbor_indices=np.arange(64, dtype=np.int32).reshape(8, 8),
            neighbor_cosines=rng.random((8, 8)).astype(np.float32),
        ),
    )


@pytest.fixture
def folder(evaluation: Evaluation, tmp_path: Path) -> Path:
    begin_stage(tmp_path, "evaluate", {})
    write_evaluation(tmp_path, evaluation)
    finish_stage(tmp_path, {})
    return tmp_path


def test_read_evaluation_returns_what_was_written(evaluation: Evaluation, folder: Path) -> None:
    found = read_evaluation(folder)
    assert found.to_dict() == evaluation.to_dict()
    assert found.features is not None
    assert evaluation.features is not None
    for name in ("density", "decoder_max_cosine", "neighbor_indices", "neighbor_cosines"):
        np.testing.assert_array_equal(getattr(found.features, name), getattr(evaluation.features, name))
    assert (found.fvu, found.l0, found.dead_fraction) == (0.25, 8.0, 0.125)


def test_evaluation_json_has_null_for_the_undefined(folder: Path) -> None:
    text = (folder / EVALUATION_NAME).read_text()
    assert "NaN" not in text
    assert json.loads(text)["rows"][0]["metrics"]["kl"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figure_of_turns_non_finite_into_none(value: float) -> None:
    assert Figure.of(value, value, 1.0) == Figure(value=None, low=None, high=1.0)


def test_row_raises_when_absent(evaluation: Evaluation) -> None:
    with pytest.raises(KeyError, match="pca"):
        evaluation.row("pca")


def test_table_has_a_line_a_metric_that_some_row_has(evaluation: Evaluation) -> None:
    table = evaluation.table()
    assert table.header == ["metric", "SAE", "mean vector"]
    assert table.rows == [
        ["FVU", "0.2500 [0.2000, 0.3000]", "1.0000 [1.0000, 1.0000]"],
        ["L0", "8.00", "-"],
        ["dead features", "0.1250", "-"],
    ]


def test_summary_table_has_every_sae_and_its_nulls(evaluation: Evaluation) -> None:
    table = summary_table({"topk": evaluation, "jumprelu": evaluation})
    assert table.header[:4] == ["dictionary", "FVU", "L0", "dead features"]
    assert [row[:4] for row in table.rows] == [
        ["topk", "0.2500", "8.00", "0.1250"],
        ["topk: mean vector", "1.0000", "-", "-"],
        ["jumprelu", "0.2500", "8.00", "0.1250"],
        ["jumprelu: mean vector", "1.0000", "-", "-"],
    ]


def test_to_markdown_is_a_table_with_its_facts(evaluation: Evaluation) -> None:
    lines = evaluation.to_markdown().splitlines()
    assert lines[0] == "| metric | SAE | mean vector |"
    assert lines[1] == "| --- | ---: | ---: |"
    assert {line.count("|") for line in lines[:5]} == {4}
    assert "1,234 held-out tokens of 5 documents at `model.layers.1`" in lines[-1]


def test_definitions_has_one_line_for_every_metric() -> None:
    found = definitions()
    assert set(METRICS) < set(found)
    assert all(text and "\n" not in text for text in found.values())


def test_read_evaluation_raises_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        read_evaluation(tmp_path)


def test_read_evaluation_raises_when_unfinished(tmp_path: Path) -> None:
    begin_stage(tmp_path, "evaluate", {})
    with pytest.raises(StoreError, match="has not finished"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize("name", [EVALUATION_NAME, FEATURES_NAME])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b'{"rows": NaN}'])
def test_read_evaluation_raises_when_a_file_is_broken(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(FormatError, match="not a readable evaluation") as caught:
        read_evaluation(folder)
    assert "\n" not in str(caught.value)
