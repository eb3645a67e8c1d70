"""delphi in an environment of its own, and what of vLLM its modules name when they are imported."""

import subprocess
import sys
import types
from pathlib import Path

from scripts.bench_peers import TORCH

__all__ = ["DELPHI", "delphi_python", "without_vllm"]

DELPHI = "eai-delphi==0.1.3"
# All that it requires but vllm and bitsandbytes, which are builds for CUDA of gigabytes; its client of servers needs neither.
REQUIREMENTS = [
    *("datasets", "transformers<6", "orjson", "eai-sparsify==1.3.3", "safetensors", "simple_parsing", "jaxtyping"),
    *(
        "blobfile",
        "aiofiles",
        "sentence_transformers",
        "anyio>=4.8.0",
        "faiss-cpu",
        "asyncer",
        "beartype",
        "scikit-learn",
    ),
    *("tiktoken", "pandas", "plotly", "httpx"),
]


def delphi_python(environment: Path) -> Path:
    """Returns the Python of delphi's environment, which is made where it is missing."""
    python = environment / "bin" / "python"
    if not (environment / ".installed").exists():
        print(f"installing {DELPHI} into {environment.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", TORCH], check=True)
        subprocess.run([*pip, "install", TORCH, *REQUIREMENTS], check=True)
        subprocess.run([*pip, "install", "--no-deps", DELPHI], check=True)
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
        (environment / ".installed").touch()
    return python


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def without_vllm() -> None:
    """Lets delphi be imported: its module for models in process imports vllm at its top, and is not used."""
    for name in ("vllm", "vllm.inputs", "vllm.distributed", "vllm.distributed.parallel_state"):
        sys.modules[name] = _Empty(name)
