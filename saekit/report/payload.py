"""Data files of the site: JavaScript that hands one value to a registered function, so that `file://` pages can load it.

A page opened from disk may not fetch; it may add script tags. Numbers travel as base64 of little-endian arrays, which is a
third of the size of JSON and is read without parsing.
"""

import base64
import json
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
    """Writes a file that calls `saekit.receive(name, value)`; returns its size in bytes.

    Texts are untrusted: `<` is escaped, so that the file stays harmless even if its content lands inside a page, and lone
    surrogates, which no UTF-8 file can hold, become U+FFFD.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    script = f"saekit.receive({json.dumps(name)},{text});\n"
    data = script.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return len(data)
