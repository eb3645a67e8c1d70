"""The shell scripts: help, wrong arguments, and an installation that is done once."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    "scripts/quickstart",
    "scripts/test",
    "scripts/test_peers",
    "scripts/check",
    "scripts/bench_gpu",
    "scripts/launch_slurm.sh",
]


def shell(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_the_name_and_touches_nothing(script: str, tmp_path: Path) -> None:
    done = shell(str(ROOT / script), "--help", cwd=tmp_path, PYTHON="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(script)
    assert "#" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/check"])
def test_an_unknown_argument_is_one_line_and_exit_code_2(script: str) -> None:
    done = shell(script, "--fast")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: unknown argument '--fast', ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/_install.sh", ".ci/run"])
def test_scripts_are_clean_shell(script: str) -> None:
    assert shell("bash", "-n", script).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here")
    done = shell("shellcheck", "-x", "-P", ".", script)
    assert done.returncode == 0, done.stdout


# Stands in for .venv/bin/python: writes down what pip is asked to install, and remembers that torch is there afterwards.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  -VV) echo "Python 3.11.7 (fake)" ;;
  "-c import torch") test -e "$0.torch" ;;
  "-c import triton") exit 1 ;;
  *"pip --version"*) ;;
  *"pip install"*)
    shift 4
    echo "$*" >> "$0.log"
    if [[ -e $0.broken ]]; then echo "no such package" >&2; exit 1; fi
    touch "$0.torch"
    ;;
esac
"""


class Checkout:
    """A copy of what the installation reads, with a Python that only pretends."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "_install.sh", root / "scripts")
        (root / "pyproject.toml").write_text("[project]\n")
        self.python = root / ".venv" / "bin" / "python"
        self.python.parent.mkdir(parents=True)
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        (root / "bin").mkdir()

    def install(self, purpose: str, **environment: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
        """Returns what pip was asked for, and the finished call."""
        log = self.python.with_name("python.log")
        log.unlink(missing_ok=True)
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        command = f"set -euo pipefail; source scripts/_install.sh; ensure_installed {purpose}"
        done = shell("bash", "-c", command, cwd=self.root, **({"PATH": path, "SAEKIT_TORCH": ""} | environment))
        return (log.read_text().splitlines() if log.exists() else []), done


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout whose pip only writes down."""
    checkout = Checkout(tmp_path / "check out")
    # Whatever machine the test runs on, it has no NVIDIA GPU unless the test says so.
    (checkout.root / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (checkout.root / "bin" / "nvidia-smi").chmod(0o755)
    return checkout


def test_installation_is_done_once(checkout: Checkout) -> None:
    first, done = checkout.install("run")
    assert done.returncode == 0, done.stderr
    assert first == ["torch==2.13.0", f"--editable {checkout.root}[gguf,zarrs]"]
    assert checkout.install("run")[0] == []


def test_installation_for_tests_serves_the_quickstart_too(checkout: Checkout) -> None:
    packages, _ = checkout.install("dev")
    assert packages == ["torch==2.13.0", f"--editable {checkout.root}[dev]", "triton==3.7.1"]
    assert checkout.install("run")[0] == []


def test_installation_is_repeated_when_pyproject_changes(checkout: Checkout) -> None:
    checkout.install("run")
    (checkout.root / "pyproject.toml").write_text("[project]\n# more\n")
    assert checkout.install("run")[0] == [f"--editable {checkout.root}[gguf,zarrs]"]


def test_installation_with_a_gpu_leaves_the_choice_of_torch_to_pip(checkout: Checkout) -> None:
    (checkout.root / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA'\n")
    assert checkout.install("run")[0][0] == "torch>=2.6"


def test_installation_takes_the_torch_that_is_asked_for(checkout: Checkout) -> None:
    assert checkout.install("run", SAEKIT_TORCH="torch==2.9.1")[0][0] == "torch==2.9.1"


def test_installation_that_fails_says_so_and_is_tried_again(checkout: Checkout) -> None:
    broken = checkout.python.with_name("python.broken")
    broken.touch()
    _, done = checkout.install("run")
    assert done.returncode == 2
    assert "no such package" in done.stderr
    assert "scripts: pip install torch==2.13.0 failed, the log is " in done.stderr
    broken.unlink()
    packages, done = checkout.install("run")
    assert done.returncode == 0
    assert packages == ["torch==2.13.0", f"--editable {checkout.root}[gguf,zarrs]"]


def test_installation_needs_a_new_enough_python(checkout: Checkout) -> None:
    checkout.python.unlink()
    old = checkout.root / "bin" / "old-python"
    old.write_text("#!/bin/sh\n[ \"$1\" = -V ] && echo 'Python 3.9.1' && exit 0\nexit 1\n")
    old.chmod(0o755)
    _, done = checkout.install("run", PYTHON=str(old))
    assert done.returncode == 2
    assert done.stderr.endswith(
        "scripts: Python 3.9.1 found, needs Python >= 3.11; name one: PYTHON=/path/to/python3\n"
    )
    _, done = checkout.install("run", PYTHON="no-such-python")
    assert "scripts: no no-such-python, needs Python >= 3.11" in done.stderr
