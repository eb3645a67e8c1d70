"""docs/plan.md: its tables are what the model and the benchmark say now, and the model is as near as the page says."""

from scripts.make_plan_table import PAGE, ROWS, comparisons, page_text


def test_tables_are_up_to_date() -> None:
    remedy = "run .venv/bin/python -m scripts.make_plan_table"
    assert PAGE.read_text(encoding="utf-8") == page_text(), remedy


def test_predictions_are_within_the_factors_that_the_page_states() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "within a factor of 1.4" in page
    assert "up to 2.2 times as long" in page
    most = dict(zip(ROWS, (1.4, 1.4, 2.2), strict=True))
    rows = list(comparisons())
    assert len(rows) == 18
    for row in rows:
        assert 1 / 1.4 <= row.ratio <= most[row.what], row
