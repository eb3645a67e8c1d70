"""Data files of the site: JavaScript that hands one text to a registered function, so that `file://` pages can load it.

A page opened from disk may not fetch; it may add script tags. What it is handed is JSON, deflated, as base64. Inside of the
JSON, numbers travel as base64 of little-endian arrays, which JavaScript reads without parsing.
"""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["JSONValue", "finite", "pack", "write_payload"]

JSONValue = None | bool | int | float | str | list["JSONValue"] | dict[str, "JSONValue"]

_CODES = {
    np.dtype(np.uint8): "u1",
    np.dtype(np.uint16): "u2",
    np.dtype(np.uint32): "u4",
    np.dtype(np.int32): "i4",
    np.dtype(np.float32): "f4",
}


# 2,304 features of a real SAE, 18 MB as plain JSON: 10.4 MB and 0.9 s at level 1, 9.5 MB and 2.1 s at level 6.
_LEVEL = 1


def pack(array: NDArray[np.generic]) -> str:
    """Returns `<type code>:<base64>` of an array of a type that JavaScript has typed arrays for, in C order."""
    code = _CODES[array.dtype]
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return f"{code}:{base64.b64encode(data.tobytes()).decode('ascii')}"


def finite(value: object) -> float | None:
    """Returns a finite number, or None for everything else: JSON has no NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    return float(value) if np.isfinite(value) else None


def write_payload(path: Path, name: str, value: JSONValue) -> int:
    """Writes a file that calls `saekit.receive(name, base64 of deflated JSON)`; returns its size in bytes.

    Texts of labels and tokens are untrusted: as base64 they cannot be anything but data on their way to JSON.parse. Lone
    surrogates, which UTF-8 cannot hold, become U+FFFD.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
    packed = base64.b64encode(zlib.compress(data, _LEVEL)).decode("ascii")
    script = f'saekit.receive({json.dumps(name)},"{packed}");\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="ascii")
    return len(script)
