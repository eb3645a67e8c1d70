"""One implementation of a TopK training step, driven over pipes by scripts/bench_training; runs in that implementation's environment.

    python bench_training_worker.py NAME SHAPE_JSON

Answers each line `step` on its input with one line of JSON: seconds and CPU seconds of one training step, the most
memory that the process had, and on `fvu` the FVU now. All implementations see the same tokens, in the same order, in float32.
"""

import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

NUM_BATCHES = 4
LEARNING_RATE = 3e-4


class Implementation(Protocol):
    """Something that trains."""

    def step(self, x: Tensor) -> float:
        """One whole training step on x [N, D]; returns the FVU before it where that is free, else NaN."""

    def fvu(self, x: Tensor) -> float:
        """FVU of x now."""


def batches(shape: dict[str, int]) -> list[Tensor]:
    """Tokens [N, D] with a few strong directions and a mean, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    d_in = shape["d_in"]
    mixing = torch.randn(d_in, d_in, generator=generator) * torch.linspace(2, 0.1, d_in)[:, None] / d_in**0.5
    mean = torch.randn(d_in, generator=generator) * 0.5
    return [torch.randn(shape["num_tokens"], d_in, generator=generator) @ mixing + mean for _ in range(NUM_BATCHES)]


def fvu_of(x: Tensor, x_hat: Tensor) -> float:
    """Squared error over the variance around the batch's mean."""
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


class Saekit:
    """TrainRun.train_step, whole: normalisation, loss, gradients, exact norm and clipping, Adam, unit rows, dead counters."""

    def __init__(self, shape: dict[str, int], data: list[Tensor]) -> None:
        from bench.run import TOLERANCE, largest_error
        from bench.shapes import TEST_SHAPES

        from saekit.sae import Normalization, TopKConfig, TopKSAE
        from saekit.training import TrainConfig
        from saekit.training.run import TrainRun
        from saekit.training.start import estimate_normalization

        for case in TEST_SHAPES:
            error = largest_error(case, "cpu")
            assert error <= TOLERANCE, f"{case.name}: error {error:.1e}, needs at most {TOLERANCE:.0e}"
        num_tokens = shape["num_tokens"]
        normalization: Normalization = estimate_normalization(data[0])
        sae = TopKSAE(TopKConfig(d_in=shape["d_in"], d_sae=shape["d_sae"], k=shape["k"]))
        config = TrainConfig(num_tokens=10_000 * num_tokens, batch_size=num_tokens, lr=LEARNING_RATE, warmup_fraction=0)
        self.next: Tensor = data[0]
        self.run = TrainRun(sae, self, config, normalization=normalization)  # type: ignore[arg-type]  # all that a step asks of a source

    def next_batch(self) -> Tensor:
        return self.next

    def step(self, x: Tensor) -> float:
        self.next = x
        return self.run.train_step().fvu

    def fvu(self, x: Tensor) -> float:
        with torch.no_grad():
            scaled = self.run.normalization.apply(x)
            return fvu_of(scaled, self.run.sae(scaled).x_hat)


class Matmul:
    """The encoder's matrix product alone, which no exact encoder can do without."""

    def __init__(self, shape: dict[str, int], data: list[Tensor]) -> None:
        self.weight = torch.randn(shape["d_sae"], shape["d_in"])
        # As the kernels do it: the product of at most 1024 rows at a time, into the same memory.
        self.z = torch.empty(min(1024, shape["num_tokens"]), shape["d_sae"])

    def step(self, x: Tensor) -> float:
        for part in torch.split(x, len(self.z)):
            torch.mm(part, self.weight.T, out=self.z[: len(part)])
        return float("nan")

    def fvu(self, x: Tensor) -> float:
        return float("nan")


class SaeLens:
    """SAETrainer._train_step of sae-lens with its defaults (clipping to 1 is hard-coded in it)."""

    def __init__(self, shape: dict[str, int], data: list[Tensor]) -> None:
        config, topk = importlib.import_module("sae_lens.config"), importlib.import_module("sae_lens.saes.topk_sae")
        trainer = importlib.import_module("sae_lens.training.sae_trainer")
        sizes = {"d_in": shape["d_in"], "d_sae": shape["d_sae"], "k": shape["k"]}
        self.sae: Any = topk.TopKTrainingSAE(topk.TopKTrainingSAEConfig(**sizes))
        num_tokens = shape["num_tokens"]
        settings = config.SAETrainerConfig(
            total_training_samples=10_000 * num_tokens,
            train_batch_size_samples=num_tokens,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE / 10,
        )
        self.trainer: Any = trainer.SAETrainer(settings, self.sae, iter(data))

    def step(self, x: Tensor) -> float:
        self.trainer._train_step(sae=self.sae, sae_in=x)
        self.trainer.n_training_steps += 1
        return float("nan")

    def fvu(self, x: Tensor) -> float:
        with torch.no_grad():
            return fvu_of(x, self.sae.decode(self.sae.encode(x)))


class DictionaryLearning:
    """TopKTrainer.update of dictionary-learning with its defaults: projection, clipping to 1, Adam, renormalisation."""

    def __init__(self, shape: dict[str, int], data: list[Tensor]) -> None:
        module = importlib.import_module("dictionary_learning.trainers.top_k")
        sizes = {"activation_dim": shape["d_in"], "dict_size": shape["d_sae"], "k": shape["k"]}
        options = {"layer": 0, "lm_name": "none", "device": "cpu", "lr": LEARNING_RATE, "warmup_steps": 1}
        self.trainer: Any = module.TopKTrainer(steps=10_000, **sizes, **options)
        self.trainer.ae.b_dec.data = data[0].mean(0)
        self.count = 0

    def step(self, x: Tensor) -> float:
        # Step 0 would look for the geometric median of the batch.
        self.count += 1
        self.trainer.update(self.count, x)
        return float("nan")

    def fvu(self, x: Tensor) -> float:
        with torch.no_grad():
            return fvu_of(x, self.trainer.ae(x))


class Sparsify:
    """SparseCoder of eai-sparsify as its Trainer drives it with optimizer "adam": no clipping."""

    def __init__(self, shape: dict[str, int], data: list[Tensor]) -> None:
        module = importlib.import_module("sparsify")
        config = module.SparseCoderConfig(num_latents=shape["d_sae"], k=shape["k"])
        self.sae: Any = module.SparseCoder(shape["d_in"], config, device="cpu", dtype=torch.float32)
        self.sae.b_dec.data = data[0].mean(0)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LEARNING_RATE)
        self.silent = torch.zeros(shape["d_sae"], dtype=torch.long)

    def step(self, x: Tensor) -> float:
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x)
        out.fvu.backward()
        fired = torch.zeros_like(self.silent, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        self.silent += len(x)
        self.silent[fired] = 0
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(out.fvu.detach())

    def fvu(self, x: Tensor) -> float:
        with torch.no_grad():
            return fvu_of(x, self.sae(x).sae_out)


IMPLEMENTATIONS: dict[str, tuple[Callable[[dict[str, int], list[Tensor]], Implementation], str]] = {
    "encoder matmul alone": (Matmul, "torch"),
    "saekit, compiled": (Saekit, "torch"),
    "saekit, torch operators": (Saekit, "torch"),
    "sae-lens": (SaeLens, "sae-lens"),
    "dictionary-learning": (DictionaryLearning, "dictionary-learning"),
    "eai-sparsify": (Sparsify, "eai-sparsify"),
}


def main() -> None:
    """Answers until its input ends."""
    name, shape = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    # What a library prints must not get between the answers.
    os.dup2(2, 1)
    torch.manual_seed(0)
    data = batches(shape)
    make, package = IMPLEMENTATIONS[name]
    implementation = make(shape, data)
    say(answers, {"version": importlib.metadata.version(package), "fvu": implementation.fvu(data[0])})
    for number, line in enumerate(sys.stdin):
        if line.strip() == "fvu":
            say(answers, {"fvu": implementation.fvu(data[0])})
            continue
        x = data[number % NUM_BATCHES]
        started, cpu_started = time.perf_counter(), time.process_time()
        implementation.step(x)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        say(answers, {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak_mib})


def say(answers: TextIO, answer: dict[str, Any]) -> None:
    """One line."""
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
