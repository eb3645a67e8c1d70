"""The table of devices: complete, overridable, and of known names only."""

import pytest

from saekit.errors import ConfigError
from saekit.training.hardware import find_hardware, known_hardware


@pytest.mark.parametrize("name", known_hardware())
def test_every_device_is_complete_and_says_where_its_rates_come_from(name: str) -> None:
    hardware = find_hardware(name)
    assert hardware.source
    assert hardware.memory_gb > 1
    assert hardware.is_measured == (hardware.host_gb_s == 0)


def test_unknown_device_is_one_line_that_lists_the_known() -> None:
    with pytest.raises(ConfigError) as raised:
        find_hardware("h1000")
    message = str(raised.value)
    assert message.startswith("plan: found gpu 'h1000', needs one of cpu, h100, h200, a100")
    assert "\n" not in message


def test_rates_can_be_replaced() -> None:
    assert find_hardware("H100", {"memory_gb": 94.0, "disk_gb_s": None}).memory_gb == 94.0
    with pytest.raises(ConfigError, match=r"memory_tb_s: found -1\.0"):
        find_hardware("h100", {"memory_tb_s": -1.0})


def test_sustained_rates_are_below_the_published_but_for_what_was_measured() -> None:
    h100, cpu = find_hardware("h100"), find_hardware("cpu")
    assert h100.flops("float32") == pytest.approx(0.8 * 67e12)
    assert h100.flops("bfloat16") == h100.flops("float16") == pytest.approx(0.6 * 989e12)
    assert cpu.flops("float32") == pytest.approx(0.12e12)


def test_rings_over_nodes_are_bound_by_the_slower_of_both_networks() -> None:
    h100 = find_hardware("h100")
    assert h100.network_rate(8) == pytest.approx(450e9)
    assert h100.network_rate(16) == pytest.approx(8 * 45e9)
    assert find_hardware("h100", {"nic_gb_s": 1000.0}).network_rate(16) == pytest.approx(450e9)
