"""What is installed: three packages, their data, nothing else; and importing them costs and changes nothing."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "saekit_kernels": "kernels/saekit_kernels",
    "saekit": "saekit",
    "saekit_pipelines": "pipelines/saekit_pipelines",
}
# Of these, none may be loaded by `import saekit`; each costs seconds or is an extra.
HEAVY = [
    "accelerate",
    "datasets",
    "gguf",
    "jinja2",
    "openai",
    "pyarrow",
    "torch",
    "transformers",
    "triton",
    "zarr",
    "zarrs",
]


def in_a_new_process(code: str, *, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from the working tree without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*command, "--wheel-dir", folder, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("saekit-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_file_of_a_package(package: str, wheel: zipfile.ZipFile) -> None:
    """Templates, prompts, scripts of the site and py.typed count as much as modules."""
    source = ROOT / PACKAGES[package]
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout: what belongs to the source is not known")
    expected = {f"{package}/{name}" for name in tracked.stdout.splitlines() if (source / name).is_file()}
    assert f"{package}/py.typed" in expected
    assert {name for name in wheel.namelist() if name.startswith(f"{package}/")} == expected


def test_wheel_names_its_licence_and_its_command(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    folder = metadata.rpartition("/")[0]
    assert "License-Expression: Apache-2.0" in wheel.read(metadata).decode()
    assert "Apache License" in wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert "saekit = saekit_pipelines.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_no_package_lies_where_it_would_hide_the_hubs_kernels() -> None:
    """transformers imports a package called `kernels`; a regular one of ours would be found first from the repository root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "pipelines" / "__init__.py").exists()


def test_transformers_imports_from_the_repository_root() -> None:
    code = "import sys; sys.path.insert(0, ''); from transformers import AutoModelForCausalLM as a; print(a.__name__)"
    assert in_a_new_process(code) == "AutoModelForCausalLM"


def test_import_saekit_loads_nothing_heavy_and_changes_nothing(tmp_path: Path) -> None:
    code = (
        "import json, logging, os, sys, warnings\n"
        "def state(): return [dict(os.environ), list(sys.path), list(warnings.filters), list(logging.root.handlers)]\n"
        "before = state(); import saekit; assert state() == before\n"
        "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
    )
    assert set(json.loads(in_a_new_process(code, cwd=tmp_path))).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("module", "light"),
    [
        ("saekit_kernels", ["triton", "transformers", "saekit"]),
        ("saekit.sae", ["zarr", "transformers", "accelerate", "openai"]),
        ("saekit.models", ["zarr", "transformers", "accelerate", "openai", "datasets"]),
        ("saekit.labelling", ["openai", "transformers", "accelerate", "datasets"]),
        ("saekit_pipelines.cli", ["torch", "transformers", "zarr", "accelerate", "openai"]),
    ],
)
def test_rooms_load_only_what_they_need(module: str, light: list[str]) -> None:
    loaded = json.loads(in_a_new_process(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"))
    assert set(loaded).isdisjoint(light)


def test_versions_agree() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert in_a_new_process("import saekit; print(saekit.__version__)") == version
    heads = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert heads[0] == version
