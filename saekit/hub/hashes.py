"""What files hash to, against what the caller demands."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from saekit.errors import FormatError
from saekit.hub.place import shown
from saekit.manifest import file_sha256

__all__ = ["check_hashes", "hashed"]


@contextmanager
def hashed(
    ref: str, weights: Mapping[str, Path], configs: Mapping[str, Path], wanted: str | Mapping[str, str] | None
) -> Iterator[dict[str, str]]:
    """Hashes files in a thread of its own while they are read inside; the mapping is filled and checked at the end."""
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = {name: thread.submit(file_sha256, path) for name, path in {**configs, **weights}.items()}
        try:
            yield hashes
        finally:
            # Also after an error: that a file is not the one that was meant is the better reason for it.
            hashes |= {name: digest.result() for name, digest in pending.items()}
            check_hashes(
                ref, {name: hashes[name] for name in weights}, {name: hashes[name] for name in configs}, wanted
            )


def check_hashes(
    ref: str, weights: Mapping[str, str], configs: Mapping[str, str], wanted: str | Mapping[str, str] | None
) -> None:
    """Checks the hashes of files against what the caller demands.

    Args:
        weights, configs: file name -> sha256.
        wanted: as `sha256` of `load_sae`.

    Raises:
        FormatError: a file has another hash, or there is none for a weights file.
    """
    if wanted is None:
        return
    if isinstance(wanted, str):
        if len(weights) > 1:
            raise FormatError(
                f"sae {ref!r}: {len(weights)} weights files and one sha256, needs one for each: {shown(list(weights))}"
            )
        wanted = dict.fromkeys(weights, wanted)
    found = {**weights, **configs}
    for file, digest in wanted.items():
        if file not in found:
            raise FormatError(f"sae {ref!r}: a sha256 for {file!r}, needs one for {shown(list(found))}")
        if found[file] != digest.lower():
            raise FormatError(
                f"sae {ref!r}: {file} has sha256 {found[file]}, needs {digest}; it is not the file you mean"
            )
    missing = sorted(weights.keys() - wanted.keys())
    if missing:
        raise FormatError(f"sae {ref!r}: no sha256 for {shown(missing)}, needs one for each weights file")
