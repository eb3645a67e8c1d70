"""One loader in a process of its own, for `bench_loading`: loads a folder once and says what it took, as one line of JSON."""

import hashlib
import importlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any


def memory() -> dict[str, int]:
    """Returns bytes by the names of /proc/self/status: VmRSS, VmHWM (its peak), RssAnon and RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon", "RssFile")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def load(name: str, folder: Path) -> Any:
    """Returns what a loader returns; its module is imported already."""
    match name:
        case "saekit":
            from saekit.hub import load_sae

            return load_sae(folder)
        case "sae-lens":
            return importlib.import_module("sae_lens").SAE.load_from_disk(str(folder), device="cpu")
        case "read":
            buffer = bytearray(2**24)
            with (folder / "sae_weights.safetensors").open("rb") as file:
                while file.readinto(buffer):
                    pass
        case "sha256":
            with (folder / "sae_weights.safetensors").open("rb") as file:
                hashlib.file_digest(file, "sha256")
    return None


def version(name: str) -> str:
    """Imports what a loader needs and returns its version."""
    import torch

    torch.set_num_threads(1)
    if name == "saekit":
        import saekit.hub.resolve

        # Operators of torch that are used at first are loaded outside of the measurement.
        torch.ones(2, 2).T.contiguous().double().aminmax()
        return saekit.__version__
    if name == "sae-lens":
        return str(importlib.import_module("sae_lens").__version__)
    return torch.__version__


def main() -> None:
    """Measures one load."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    found = version(name)
    highest, done = [memory()["RssAnon"]], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], memory()["RssAnon"])

    before = memory()
    # 5 resets the peak that the kernel keeps.
    Path("/proc/self/clear_refs").write_text("5")
    threading.Thread(target=watch, daemon=True).start()
    started, cpu_started = time.perf_counter(), time.process_time()
    sae = load(name, folder)
    loaded = time.perf_counter() - started
    # A loader that maps the file has read nothing yet; whoever uses the dictionary waits for that too.
    for parameter in [] if sae is None else sae.parameters():
        parameter.detach().sum()
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    done.set()
    result = 0 if sae is None else sum(p.numel() * p.element_size() for p in sae.parameters())
    report = {
        "version": found,
        "loaded": loaded,
        "wall": wall,
        "cpu": cpu,
        "result": result,
        "peak": memory()["VmHWM"] - before["VmRSS"],
        "peak_anonymous": highest[0] - before["RssAnon"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
