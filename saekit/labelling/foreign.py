"""Labels of other programs: a `labels.jsonl` with at least `feature` and `label` in each line."""

import json
from pathlib import Path

from pydantic import JsonValue

from saekit.errors import ConfigError, ResourceError
from saekit.labelling.records import Label
from saekit.progress import NO_PROGRESS, Progress

__all__ = ["read_foreign_labels"]


def read_foreign_labels(
    path: str | Path, *, num_features: int, labeler: str | None = None, progress: Progress = NO_PROGRESS
) -> list[Label]:
    """Returns the labels of a file of JSON lines: `feature` (index) and `label` (text), and any other field of `Label`.

    Args:
        num_features: of the dictionary that they are about.
        labeler: stands where a line names none; None: `foreign:<name of the file>`.
        progress: told of fields that are passed over, as `Label` has none of their name.

    Raises:
        ConfigError: no label in it, a line that is none, a feature that the dictionary does not have, or two labels of one
            labeler for a feature.
        ResourceError: the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ResourceError(f"labels {str(path)!r}: cannot be read: {reason}") from error
    found: dict[tuple[int, str], Label] = {}
    unknown: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"labels {str(path)!r}: line {number}"
        values = _object(line, where)
        unknown |= values.keys() - Label.model_fields.keys()
        known = {key: value for key, value in values.items() if key in Label.model_fields}
        label = Label.parse({"labeler": labeler or f"foreign:{path.stem}", **known}, where=where)
        if not 0 <= label.feature < num_features:
            raise ConfigError(f"{where}: feature {label.feature}, the dictionary has 0 to {num_features - 1}")
        if (label.feature, label.labeler) in found:
            raise ConfigError(f"{where}: a second label of {label.labeler!r} for feature {label.feature}, needs one")
        found[label.feature, label.labeler] = label
    if not found:
        raise ConfigError(f"labels {str(path)!r}: no line in it, needs labels")
    if unknown:
        progress.say(f"labels {str(path)!r}: passed over {', '.join(sorted(unknown))}, which labels do not have")
    return list(found.values())


def _object(line: str, where: str) -> dict[str, JsonValue]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not {"feature", "label"} <= values.keys():
        raise ConfigError(f"{where}: {line[:60]!r}, needs a JSON object with 'feature' and 'label'")
    return values
