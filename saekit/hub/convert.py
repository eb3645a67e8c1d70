"""From a reference to a folder in another library's format."""

from pathlib import Path

from saekit.hub.discover import dictionaries
from saekit.hub.export import save_sae
from saekit.hub.export_circuit_tracer import check_set
from saekit.hub.place import locate
from saekit.hub.resolve import load_sae

__all__ = ["convert_sae"]


def convert_sae(source: str | Path, folder: str | Path, *, format: str, revision: str | None = None) -> None:
    """Writes the dictionary that `source` names into a folder in a library's format.

    circuit-tracer keeps one transcoder for each layer in a folder: for it, `source` may hold many, which are read one by one.

    Args:
        source, revision: as in `load_sae`.
        folder: where to write.
        format: as in `save_sae`.

    Raises:
        FormatError: `source` names nothing that can be read, or several dictionaries for a format that has one in a folder.
        ConfigError: the format is not known, or cannot express this dictionary.
        ResourceError: the folder cannot be written.
    """
    place = locate(source, revision)
    found = dictionaries(place.names)
    if format != "circuit-tracer" or len(found) < 2:
        save_sae(load_sae(source, revision=revision), folder, format=format)
        return
    for name in found:
        save_sae(load_sae(place.name_of(name), revision=revision), folder, format=format)
    check_set(Path(folder))
