"""The page of scripts/bench_scaling: what it reckons from measured steps, bytes and rates."""

import pytest

from saekit.training.hardware import find_hardware
from scripts import make_plan_table
from scripts.bench_scaling_cases import ALONE, CASES
from scripts.bench_scaling_table import Machine, Steps, page

SHAPE = {"num_tokens": 2048, "d_in": 576, "d_sae": 4608, "k": 32}
NUMBERS = 4608 * (2 * 576 + 1) + 576


def machine(count: int) -> Machine:
    found = Machine()
    # The second process is the slower one in everything.
    fast = {"flops": 80e9 / count, "memory": 20e9 / count, "operator_seconds": 4e-6} | (
        {"link": 1e9} if count > 1 else {}
    )
    slow = {key: value * (2 if key.endswith("seconds") else 0.5) for key, value in fast.items()}
    for _ in range(3):
        found.add([fast, slow][:count])
    return found


def steps(name: str) -> Steps:
    found = Steps()
    for wall in (0.3, 0.1, 0.2):
        answer = {"cpu_seconds": 0.1, "loopback_bytes": 2e6, "sent": {"gradients": 1_500_000, "figures": 999}}
        found.add([answer | {"seconds": wall / (1 + (rank > 0))} for rank in range(CASES[name].processes)])
    return found


def test_page_holds_medians_ratios_and_the_models_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    machines = {count: machine(count) for count in (1, 2, 4)}
    text = page([(SHAPE, {name: steps(name) for name in CASES}, machines)], rounds=3, before=("abc", 0.5))
    written = tmp_path_factory.mktemp("page") / "scaling.md"
    written.write_text(text, encoding="utf-8")
    monkeypatch.setattr(make_plan_table, "SCALING", written)
    rows = dict(zip(CASES, make_plan_table.scaling_rows(), strict=True))
    assert {row.measured_ms for row in rows.values()} == {200.0}
    assert rows["data2"].sent_mb == 1.5
    assert rows["data2"].model_mb == pytest.approx(4 * NUMBERS / 1e6, abs=0.06)
    assert rows[ALONE].model_mb == 0
    # A machine of half the rates takes twice as long, but for launches.
    assert rows["layers2"].predicted_ms == pytest.approx(4 * rows[ALONE].predicted_ms, rel=0.02)
    (line,) = (line for line in text.splitlines() if line.startswith("| layers | 4 |"))
    # Four SAEs in the time of one: four times the tokens.
    assert "| 200 (100 - 300) | 400 | 40,960 | 4.00 | 0 | 0 |" in line


def test_rates_are_those_of_the_slowest_process() -> None:
    hardware = machine(2).hardware(2)
    assert hardware.fp32_tflops == pytest.approx(0.02)
    assert hardware.launch_us == pytest.approx(8)
    assert hardware.network_rate(2) == pytest.approx(0.5e9)
    assert machine(1).hardware(1).link_gb_s == find_hardware("cpu").link_gb_s


def test_predictions_for_large_machines_name_what_binds() -> None:
    lines = page([], rounds=1, before=("abc", 0.0)).splitlines()
    rows = [
        line.split(" | ") for line in lines if "H200" not in line and line.startswith(("| GPT", "| Gemma", "| Llama"))
    ]
    assert [int(row[1]) for row in rows] == [8, 64, 512] * 3
    assert {row[5].split(",")[0] for row in rows} <= {"compute", "memory", "network", "reader", "launches", "host bus"}
    for eight, most in zip(rows[::3], rows[2::3], strict=True):
        assert float(most[4]) > float(eight[4]) > 1
