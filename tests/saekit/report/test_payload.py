import base64
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from saekit.report.payload import finite, pack, write_payload

Read = Callable[[Path], object]


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.array([0, 255], np.uint8), "u1"),
        (np.array([1, 65535], np.uint16), "u2"),
        (np.array([[1, 2], [3, 2**32 - 1]], np.uint32), "u4"),
        (np.array([-1, 7], np.int32), "i4"),
        (np.array([1.5, np.nan, -0.0], np.float32), "f4"),
        (np.arange(6, dtype=np.int32).reshape(2, 3).T, "i4"),
        (np.zeros(0, np.float32), "f4"),
    ],
    ids=["u1", "u2", "u4", "i4", "f4", "not-contiguous", "empty"],
)
def test_pack_keeps_values_in_c_order(array: np.ndarray, code: str) -> None:
    found_code, _, text = pack(array).partition(":")
    assert found_code == code
    found = np.frombuffer(base64.b64decode(text), dtype=f"<{code[0]}{code[1]}")
    np.testing.assert_array_equal(found, array.ravel())


def test_pack_refuses_what_javascript_has_no_array_for() -> None:
    with pytest.raises(KeyError):
        pack(np.zeros(2, np.int64))


@pytest.mark.parametrize(
    "text",
    [
        "</script><script>alert(1)</script>",
        "<!--",
        "a\u2028b\u2029c",
        'quote " and \\ backslash',
        "\x00\x1f",
        "\u4f60 \U0001f40d",
    ],
    ids=["script", "comment", "separators", "quotes", "control", "unicode"],
)
def test_write_payload_is_exact_and_nothing_but_base64(tmp_path: Path, text: str, read_payload: Read) -> None:
    path = tmp_path / "data" / "a" / "b.js"
    size = write_payload(path, "a/b", {text: [text, 1.5, None]})
    assert size == path.stat().st_size
    assert re.fullmatch(rb'saekit\.receive\("a/b","[A-Za-z0-9+/=]+"\);\n', path.read_bytes())
    assert read_payload(path) == {text: [text, 1.5, None]}


def test_write_payload_replaces_lone_surrogates(tmp_path: Path, read_payload: Read) -> None:
    write_payload(tmp_path / "data" / "x.js", "x", ["a\ud800b", "\ud83d\udc0d"])
    assert read_payload(tmp_path / "data" / "x.js") == ["a\ufffdb", "\U0001f40d"]


def test_write_payload_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_payload(tmp_path / "x.js", "x", math.nan)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.5, 1.5),
        (3, 3.0),
        (np.float32(2), 2.0),
        (math.nan, None),
        (math.inf, None),
        (None, None),
        ("1", None),
        (True, None),
    ],
)
def test_finite_keeps_only_finite_numbers(value: object, expected: float | None) -> None:
    assert finite(value) == expected
