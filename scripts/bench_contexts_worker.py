"""One way to gather contexts, driven over pipes by scripts/bench_contexts; runs in that library's environment.

    python bench_contexts_worker.py NAME SHAPE_JSON

Answers `step` with seconds and CPU seconds of one batch and the process's memory after it, and `warm N` likewise of N batches.
All see the same codes, or the same activations and the same dictionary, in float32; a token has the k largest.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

CONTEXT_LEN = 256
ROWS_PER_DOCUMENT = 2


def memory() -> dict[str, float]:
    """Returns MiB in use now and the most ever, by Linux's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now_mib": found["VmRSS"], "peak_mib": found["VmHWM"]}


class Codes:
    """Codes of features whose firing rates are spread like a log-normal's, as those of trained dictionaries are."""

    def __init__(self, shape: dict[str, int]) -> None:
        self.shape = shape
        rates = np.random.default_rng(0).lognormal(0, 1.5, shape["d_sae"])
        self.cumulated = np.cumsum(rates / rates.sum())

    def batch(self, number: int) -> tuple[Any, Any, Any]:
        """Returns flat [n], acts [n, k] and indices [n, k]; a feature that was drawn twice has one of them."""
        generator = np.random.default_rng([1, number])
        num, k = self.shape["num_tokens"], self.shape["k"]
        indices = np.searchsorted(self.cumulated, generator.random((num, k))).clip(0, self.shape["d_sae"] - 1)
        indices.sort(axis=1)
        acts = generator.lognormal(0, 0.6, (num, k)).astype(np.float32)
        acts[:, 1:][indices[:, 1:] == indices[:, :-1]] = 0
        return np.arange(number * num, (number + 1) * num), acts, indices


def activations(shape: dict[str, int], number: int) -> torch.Tensor:
    """Returns x [n, d_in]."""
    return torch.randn(shape["num_tokens"], shape["d_in"], generator=torch.Generator().manual_seed(number))


def weights(shape: dict[str, int]) -> torch.Tensor:
    """Returns the encoder's rows [d_sae, d_in]."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape["d_sae"], shape["d_in"], generator=generator)
    return rows.div_(shape["d_in"] ** 0.5)


def saekit_collector(shape: dict[str, int]) -> Any:
    """Returns an empty collector for many rows."""
    from saekit.labelling.collector import ContextCollector, ContextConfig

    num_rows = shape["most_tokens"] // CONTEXT_LEN
    documents = np.arange(num_rows * CONTEXT_LEN, dtype=np.int32) // (CONTEXT_LEN * ROWS_PER_DOCUMENT)
    store = SimpleNamespace(context_len=CONTEXT_LEN, documents=lambda: documents)
    view: Any = SimpleNamespace(store=store)
    return ContextCollector(
        shape["d_sae"], view, ContextConfig(), scale=16.0, is_code_row=np.zeros(num_rows, dtype=bool)
    )


def saekit_given(shape: dict[str, int]) -> tuple[Callable[[int], Any], Callable[[Any], None]]:
    """The collector alone."""
    codes, collector = Codes(shape), saekit_collector(shape)
    return codes.batch, lambda batch: collector.add(*batch)


def saekit_whole(shape: dict[str, int]) -> tuple[Callable[[int], Any], Callable[[Any], None]]:
    """Encoder and collector, as in `collect_contexts`."""
    from saekit.sae import TopKConfig, TopKSAE

    sae = TopKSAE(TopKConfig(d_in=shape["d_in"], d_sae=shape["d_sae"], k=shape["k"]))
    with torch.no_grad():
        sae.W_enc.copy_(weights(shape).T)
    collector, flat = saekit_collector(shape), np.arange(shape["num_tokens"])

    def work(batch: tuple[int, torch.Tensor]) -> None:
        number, x = batch
        with torch.no_grad():
            acts, indices = sae.encode_sparse(x)
        collector.add(flat + number * len(flat), acts.numpy(), indices.numpy())

    return lambda number: (number, activations(shape, number)), work


def delphi_cache(shape: dict[str, int]) -> Callable[[int, torch.Tensor], None]:
    """Takes dense codes in as the body of the loop of delphi's LatentCache.run does: the cache, then the counts of firings."""
    from scripts.bench_delphi import without_vllm

    without_vllm()
    in_memory: Any = importlib.import_module("delphi.latents.cache").InMemoryCache

    rows = shape["dense_tokens"] // CONTEXT_LEN
    cache, firing = in_memory(None, batch_size=rows), [torch.zeros(shape["d_sae"], dtype=torch.int64)]

    def take(number: int, latents: torch.Tensor) -> None:
        cache.add(latents, torch.zeros(rows, CONTEXT_LEN, dtype=torch.int64), number, "layer")
        firing[0] += (latents.cpu() > 0).sum((0, 1))

    return take


def delphi_given(shape: dict[str, int]) -> tuple[Callable[[int], Any], Callable[[Any], None]]:
    """delphi's cache alone; it wants codes as dense arrays, which are made outside of the clock."""
    codes, take, size = Codes(shape), delphi_cache(shape), shape["dense_tokens"]
    dense = torch.zeros(size, shape["d_sae"])

    def make(number: int) -> Any:
        _, acts, indices = codes.batch(number)
        return number, torch.from_numpy(acts), torch.from_numpy(indices)

    def work(batch: tuple[int, torch.Tensor, torch.Tensor]) -> None:
        number, acts, indices = batch
        outside = cpu_outside = 0.0
        for part, start in enumerate(range(0, len(acts), size)):
            started, cpu_started = time.perf_counter(), time.process_time()
            dense.zero_().scatter_(1, indices[start : start + size], acts[start : start + size])
            outside += time.perf_counter() - started
            cpu_outside += time.process_time() - cpu_started
            take(number * (len(acts) // size) + part, dense.view(-1, CONTEXT_LEN, shape["d_sae"]))
        work.outside = outside, cpu_outside  # type: ignore[attr-defined]

    return make, work


def delphi_whole(shape: dict[str, int]) -> tuple[Callable[[int], Any], Callable[[Any], None]]:
    """sparsify's encoder, the dense codes that delphi makes of it, its cache."""
    from scripts.bench_delphi import without_vllm

    without_vllm()
    dense_latents: Any = importlib.import_module("delphi.sparse_coders.load_sparsify").sae_dense_latents
    sparsify: Any = importlib.import_module("sparsify")
    sae = sparsify.SparseCoder(shape["d_in"], sparsify.SparseCoderConfig(num_latents=shape["d_sae"], k=shape["k"]))
    with torch.no_grad():
        sae.encoder.weight.copy_(weights(shape))
    take, size = delphi_cache(shape), shape["dense_tokens"]

    def work(batch: tuple[int, torch.Tensor]) -> None:
        number, x = batch
        for part, rows in enumerate(torch.split(x, size)):
            with torch.no_grad():
                latents = dense_latents(rows.view(-1, CONTEXT_LEN, shape["d_in"]), sae)
            take(number * (len(x) // size) + part, latents)

    return lambda number: (number, activations(shape, number)), work


def matmul(shape: dict[str, int]) -> tuple[Callable[[int], Any], Callable[[Any], None]]:
    """The encoder's product, a thousand tokens at a time."""
    encoder, out = weights(shape).T, torch.empty(1024, shape["d_sae"])

    def work(x: torch.Tensor) -> None:
        for rows in torch.split(x, 1024):
            torch.mm(rows, encoder, out=out[: len(rows)])

    return lambda number: activations(shape, number), work


def forward(shape: dict[str, int]) -> tuple[Callable[[int], Any], Callable[[Any], None]]:
    """The subject model's own forward over all layers, without the unembedding."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(os.environ["BENCH_MODEL"], dtype=torch.float32).eval()

    def work(tokens: torch.Tensor) -> None:
        with torch.inference_mode():
            for rows in torch.split(tokens, 4):
                model(rows, use_cache=False)

    def make(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        size = (shape["num_tokens"] // CONTEXT_LEN, CONTEXT_LEN)
        return torch.randint(model.config.vocab_size, size, generator=generator)

    return make, work


KINDS = {
    "saekit, given codes": (saekit_given, "saekit"),
    "saekit, encoder and collector": (saekit_whole, "saekit"),
    "delphi, given codes": (delphi_given, "eai-delphi"),
    "delphi, encoder and cache": (delphi_whole, "eai-delphi"),
    "encoder matmul alone": (matmul, "torch"),
    "forward of the subject model": (forward, "transformers"),
}


def main() -> None:
    """Serves until its input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    shape = json.loads(sys.argv[2])
    torch.set_num_threads(shape["threads"])
    make_kind, package = KINDS[sys.argv[1]]
    make, work = make_kind(shape)
    number = 0
    answers.write(json.dumps({"version": importlib.metadata.version(package)}) + "\n")
    for line in sys.stdin:
        count = int(line.split()[1]) if line.startswith("warm") else 1
        seconds = cpu_seconds = 0.0
        for _ in range(count):
            batch = make(number)
            started, cpu_started = time.perf_counter(), time.process_time()
            work(batch)
            outside, cpu_outside = getattr(work, "outside", (0.0, 0.0))
            seconds += time.perf_counter() - started - outside
            cpu_seconds += time.process_time() - cpu_started - cpu_outside
            number += 1
        answers.write(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, **memory()}) + "\n")


if __name__ == "__main__":
    main()
