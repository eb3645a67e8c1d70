"""Import directions: kernels <- saekit <- pipelines, room by room inside saekit, and third parties only where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("kernels/saekit_kernels", "saekit", "pipelines/saekit_pipelines")
    for path in (ROOT / folder).rglob("*.py")
)
FLOOR = {"saekit_kernels": 1, "saekit": 2, "saekit_pipelines": 3}
FOUNDATION = {"saekit.config", "saekit.errors", "saekit.manifest", "saekit.progress"}
# Room -> rooms it may import. What is missing here may not be imported at all.
ROOMS: dict[str, set[str]] = {
    "models": set(),
    "sae": set(),
    "activations": {"models"},
    "training": {"models", "sae", "activations"},
    "hub": {"sae"},
    "splice": {"models", "sae"},
    "labelling": {"models", "activations", "sae"},
    "evaluation": {"models", "activations", "sae"},
    "report": {"labelling", "evaluation", "activations"},
}
# Third party -> the only places that may import it.
ONLY_IN = {
    "zarr": "saekit/activations/",
    "obstore": "saekit/activations/providers.py",
    "accelerate": "saekit/training/",
    "bitsandbytes": "saekit/training/low_bit.py",
    "openai": "saekit/labelling/client.py",
    "transformers": "saekit/models/",
    "datasets": "saekit/models/",
    "jinja2": "saekit/report/",
    "typer": "pipelines/",
    "rich": "pipelines/",
}


def _name(path: Path) -> str:
    relative = path.relative_to(ROOT)
    parts = relative.with_suffix("").parts
    parts = parts[1:] if parts[0] in {"kernels", "pipelines"} else parts
    return ".".join(parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _violations(name: str, imported: set[str], place: str) -> list[str]:
    top = name.split(".")[0]
    wrong = [other for other in imported if FLOOR.get(other.split(".")[0], 0) > FLOOR[top]]
    wrong += [
        other
        for other in imported
        for party, home in ONLY_IN.items()
        if other.split(".")[0] == party and not place.startswith(home)
    ]
    wrong += [other for other in imported if other.split(".")[0] == "triton" and not place.endswith("_triton.py")]
    parts = name.split(".")
    if top == "saekit" and len(parts) > 1 and parts[1] in ROOMS:
        allowed = ROOMS[parts[1]] | {parts[1]}
        rooms = {
            other.split(".")[1] for other in imported if other.startswith("saekit.") and other.split(".")[1] in ROOMS
        }
        wrong += [f"saekit.{room}" for room in sorted(rooms - allowed)]
    if name in FOUNDATION:
        wrong += [
            other
            for other in imported
            if other.startswith("saekit.") and not any(other.startswith(base) for base in FOUNDATION)
        ]
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_run_one_way(path: Path) -> None:
    assert _violations(_name(path), _imports(path), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    ("name", "imported", "place"),
    [
        ("saekit_kernels.encode", "saekit.errors", "kernels/saekit_kernels/encode.py"),
        ("saekit.sae.base", "saekit_pipelines.cli", "saekit/sae/base.py"),
        ("saekit.sae.base", "saekit.training.trainer", "saekit/sae/base.py"),
        ("saekit.activations.store", "saekit.sae.base", "saekit/activations/store.py"),
        ("saekit.labelling.contexts", "saekit.training.trainer", "saekit/labelling/contexts.py"),
        ("saekit.sae.base", "zarr", "saekit/sae/base.py"),
        ("saekit_kernels.encode", "triton", "kernels/saekit_kernels/encode.py"),
        ("saekit.config", "saekit.sae.base", "saekit/config.py"),
    ],
)
def test_violations_are_noticed(name: str, imported: str, place: str) -> None:
    assert _violations(name, {imported}, place)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_every_room_has_a_known_name(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "saekit" and len(parts) > 2:
        assert parts[1] in ROOMS, f"{parts[1]!r} is not a room; a new room needs a new job and a line in ROOMS"
    assert path.stem not in {"utils", "helpers", "common", "misc"}
