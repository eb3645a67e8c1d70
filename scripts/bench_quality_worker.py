"""Trains SAEs with one library for scripts/bench_quality, driven over pipes; runs in that library's environment.

    python bench_quality_worker.py LIBRARY

Answers each job on its input, one line of JSON, with one line of JSON: seconds of training, and FVU and L0 that the library's
own encode and decode give on test tokens. The trained SAE is in the job's folder, in the library's own format. Step counts in a
library's recipe (warm-up, decay, windows of dead features) are for trainings a hundred times as long: they are given as the same
parts of a short one.
"""

import importlib
import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Array = npt.NDArray[np.generic]
Code = tuple[Tensor, Tensor]
"""Activations [N, F], or [N, hook points, F], and reconstruction of what is to be reconstructed."""

GROUP_FRACTIONS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
WARMUP, DECAY_FROM, SPARSITY_WARMUP, DEAD_AFTER = 0.05, 0.8, 0.05, 1 / 30
NORM_BATCHES = 16
GATE_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Job:
    """One SAE to train."""

    arch: str
    """Architecture."""
    seed: int
    """Of the first weights."""
    data: str
    """Folder with train.npy and test.npy, the former in the order of training."""
    d_sae: int
    """Features."""
    k: int
    """Wanted L0."""
    batch: int
    """Tokens a step."""
    steps: int
    """Steps."""
    out: str
    """Folder for the SAE."""
    lr: float | None
    """Learning rate; None = the library's own."""
    coefficient: float | None
    """Weight of the sparsity penalty where there is no target L0 to give; None = the library's own."""
    sites: int = 1
    """Hook points side by side in a row of the data: of a transcoder what it reads, then what it predicts."""
    site: int | None = None
    """The only one of them that is read and reconstructed; None = all."""

    def part(self, fraction: float) -> int:
        """Steps of a part of the training, at least one."""
        return max(1, round(self.steps * fraction))

    @property
    def is_transcoder(self) -> bool:
        """Whether the second half of a row is predicted from the first."""
        return self.arch.endswith("transcoder")


def sites_of(rows: Tensor, *, sites: int, site: int | None, is_transcoder: bool) -> tuple[Tensor, Tensor]:
    """Returns what is read [N, ...] and what is to be reconstructed [N, hook points, D] of rows [N, sites * D] of the data."""
    split = rows.reshape(len(rows), sites, -1)
    if is_transcoder:
        return split[:, 0].contiguous(), split[:, 1:]
    if site is not None:
        return split[:, site].contiguous(), split[:, site : site + 1]
    return rows, split


class Tokens:
    """Training batches, from the first one on each time they are asked for."""

    def __init__(self, job: Job) -> None:
        self.array: Array = np.load(Path(job.data) / "train.npy", mmap_mode="r")
        self.job = job
        width = int(self.array.shape[1]) // job.sites
        self.columns = slice(None) if job.site is None else slice(job.site * width, (job.site + 1) * width)
        self.d_in = int(self.array[:1, self.columns].shape[1])

    def rows(self, numbers: "slice | Array") -> Tensor:
        """A copy of some tokens [N, d_in] in float32."""
        return torch.from_numpy(np.array(self.array[numbers][:, self.columns], dtype=np.float32))

    def batch(self, number: int) -> Tensor:
        """A copy of one batch [N, d_in] in float32."""
        return self.rows(slice(number * self.job.batch, (number + 1) * self.job.batch))

    def __iter__(self) -> Iterator[Tensor]:
        return (self.batch(number) for number in range(self.job.steps))


def train_saekit(job: Job) -> Callable[[Tensor], Code]:
    """`Trainer.fit` with every default; the batch is the job's."""
    from pydantic import TypeAdapter

    from saekit.sae import AnySAEConfig, SAEConfig, build_sae
    from saekit.training import TrainConfig, Trainer

    class Source:
        def __init__(self) -> None:
            self.tokens, self.number = Tokens(job), 0
            self.d_in = self.tokens.d_in

        def next_batch(self) -> Tensor:
            self.number += 1
            return self.tokens.batch((self.number - 1) % job.steps)

        def state_dict(self) -> dict[str, object]:
            return {"number": self.number}

        def load_state_dict(self, state: dict[str, object]) -> None:
            number = state["number"]
            assert isinstance(number, int)
            self.number = number

    source = Source()
    sparsity = {"target_l0": float(job.k)} if job.arch in {"jumprelu", "gated", "relu"} else {"k": job.k}
    shape: dict[str, object] = {"kind": job.arch, "d_in": source.d_in}
    if job.is_transcoder:
        d_in = source.d_in // 2
        shape = {"kind": "transcoder", "d_in": d_in, "d_out": d_in, "has_skip": job.arch == "skip_transcoder"}
    elif job.sites > 1 and job.site is None:
        shape |= {"d_in": source.d_in // job.sites, "num_sites": job.sites}
    adapter: TypeAdapter[SAEConfig] = TypeAdapter(AnySAEConfig)
    sae = build_sae(adapter.validate_python({**shape, "d_sae": job.d_sae, **sparsity}))
    config = TrainConfig(num_tokens=job.steps * job.batch, batch_size=job.batch, seed=job.seed, lr=job.lr)
    sae = Trainer(sae, source, config).fit(job.out)
    return lambda x: (sae.encode(x), sae(x).x_hat)


def train_sae_lens(job: Job) -> Callable[[Tensor], Code]:
    """`SAETrainer.fit` with the recipe of its tutorials: constant rate that falls over the last fifth, penalties warmed up."""
    saes, config = importlib.import_module("sae_lens.saes"), importlib.import_module("sae_lens.config")
    trainer = importlib.import_module("sae_lens.training.sae_trainer")
    tokens, warm = Tokens(job), job.part(SPARSITY_WARMUP)
    ends = [round(part * job.d_sae) for part in itertools.accumulate(GROUP_FRACTIONS)]
    weight = 1.0 if job.coefficient is None else job.coefficient
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "topk": ("TopK", {"k": job.k}),
        "batchtopk": ("BatchTopK", {"k": float(job.k)}),
        "matryoshka_batchtopk": ("MatryoshkaBatchTopK", {"k": float(job.k), "matryoshka_widths": ends}),
        "jumprelu": (
            "JumpReLU",
            # Anthropic's recipe: with the step loss of its defaults L0 stops falling at several times the wanted one.
            {
                "jumprelu_sparsity_loss_mode": "tanh",
                "jumprelu_bandwidth": 2.0,
                "jumprelu_init_threshold": 0.1,
                "jumprelu_ste_to_input": True,
                "pre_act_loss_coefficient": 3e-6,
                "l0_coefficient": weight,
                "l0_warm_up_steps": job.steps,
            },
        ),
        "gated": ("Gated", {"l1_coefficient": weight, "l1_warm_up_steps": warm}),
        "relu": ("Standard", {"l1_coefficient": weight, "l1_warm_up_steps": warm}),
    }
    name, options = kinds[job.arch]
    torch.manual_seed(job.seed)
    sizes = {"d_in": tokens.d_in, "d_sae": job.d_sae, "normalize_activations": "expected_average_only_in"}
    sae = getattr(saes, f"{name}TrainingSAE")(getattr(saes, f"{name}TrainingSAEConfig")(**sizes, **options))
    rates = {} if job.lr is None else {"lr": job.lr}
    settings = config.SAETrainerConfig(
        total_training_samples=job.steps * job.batch,
        train_batch_size_samples=job.batch,
        lr_decay_steps=job.steps - job.part(DECAY_FROM),
        dead_feature_window=job.part(DEAD_AFTER),
        n_batches_for_norm_estimate=min(NORM_BATCHES, job.steps),
        lr_end=(3e-4 if job.lr is None else job.lr) / 10,
        **rates,
    )
    first = itertools.islice(iter(tokens), settings.n_batches_for_norm_estimate)
    trainer.SAETrainer(settings, sae, itertools.chain(first, tokens)).fit().save_inference_model(job.out)
    loaded = importlib.import_module("sae_lens").SAE.load_from_disk(job.out, device="cpu")

    def code(x: Tensor) -> Code:
        acts = loaded.encode(x)
        return acts.to_dense() if acts.is_sparse else acts, loaded.decode(acts)

    return code


def train_dictionary_learning(job: Job) -> Callable[[Tensor], Code]:
    """`trainSAE` with normalised activations and the recipe of its demo: warm-up, fall over the last fifth."""
    training, trainers = (importlib.import_module(f"dictionary_learning.{name}") for name in ("training", "trainers"))
    tokens = Tokens(job)
    penalty = {} if job.coefficient is None else {"l1_penalty": job.coefficient}
    sparsity = {"sparsity_warmup_steps": job.part(SPARSITY_WARMUP)}
    # The threshold is a running mean of a thousand steps that begins after a thousand: of two fiftieths of a short training.
    threshold = {"threshold_start_step": job.part(0.5), "threshold_beta": 1 - 1 / max(2, job.part(0.04))}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "topk": ("top_k.TopKTrainer", {"k": job.k, **threshold}),
        "batchtopk": ("batch_top_k.BatchTopKTrainer", {"k": job.k, **threshold}),
        "matryoshka_batchtopk": (
            "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer",
            {"k": job.k, "group_fractions": GROUP_FRACTIONS, **threshold},
        ),
        "jumprelu": ("jumprelu.JumpReluTrainer", {"target_l0": float(job.k), **sparsity}),
        "gated": ("gdm.GatedSAETrainer", penalty | sparsity),
        "relu": ("standard.StandardTrainerAprilUpdate", penalty | sparsity),
    }
    path, options = kinds[job.arch]
    module, _, name = path.partition(".")
    cls = getattr(importlib.import_module(f"{trainers.__name__}.{module}"), name)

    def make(**settings: Any) -> Any:
        # Not every trainer seeds its own first weights.
        torch.manual_seed(job.seed)
        made = cls(**settings)
        if hasattr(made, "dead_feature_threshold"):
            made.dead_feature_threshold = job.part(DEAD_AFTER) * job.batch
        return made

    settings = {
        "trainer": make,
        "steps": job.steps,
        "activation_dim": tokens.d_in,
        "dict_size": job.d_sae,
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
        "seed": job.seed,
        "warmup_steps": job.part(WARMUP),
        "decay_start": job.part(DECAY_FROM),
        **options,
        **({} if job.lr is None else {"lr": job.lr}),
    }
    training.trainSAE(tokens, [settings], steps=job.steps, save_dir=job.out, normalize_activations=True, device="cpu")
    folder = str(Path(job.out) / "trainer_0")
    loaded, _ = importlib.import_module("dictionary_learning.utils").load_dictionary(folder, "cpu")

    def code(x: Tensor) -> Code:
        acts = loaded.encode(x)
        return acts, loaded.decode(acts)

    return code


class GivenOutput(nn.Module):
    """A module whose output for x is given: what is read and what is to be reconstructed, for a trainer that hooks modules."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y."""
        return y


class TableModel(nn.Module):
    """What sparsify's trainer asks of a model: looks tokens' activations up, so that it reads what all others read."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self.tokens = tokens
        self.table = GivenOutput()
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, of which there is none."""
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """Activations [B, T, d_in] of input_ids [B, T], the numbers of tokens."""
        rows = self.tokens.rows(input_ids.flatten().numpy()).view(*input_ids.shape, -1)
        x, y = rows.chunk(2, dim=-1) if self.tokens.job.is_transcoder else (rows, rows)
        found: Tensor = self.table(x, y)
        return found


def train_sparsify(job: Job) -> Callable[[Tensor], Code]:
    """`Trainer.fit` with its defaults: schedule-free signum, no AuxK."""
    sparsify = importlib.import_module("sparsify")
    trainer = importlib.import_module("sparsify.trainer")
    row = 32
    rows = [{"input_ids": ids} for ids in torch.arange(job.steps * job.batch).view(-1, row)]
    config = sparsify.TrainConfig(
        sparsify.SparseCoderConfig(
            num_latents=job.d_sae,
            k=job.k,
            transcode=job.is_transcoder,
            skip_connection=job.arch == "skip_transcoder",
        ),
        batch_size=job.batch // row,
        lr=job.lr,
        hookpoints=["table"],
        init_seeds=[job.seed],
        save_every=10 * job.steps,
        log_to_wandb=False,
        save_dir=job.out,
        run_name="sae",
    )
    trainer.Trainer(config, rows, TableModel(Tokens(job))).fit()
    loaded = sparsify.SparseCoder.load_from_disk(Path(job.out) / "sae" / "table")

    def code(x: Tensor) -> Code:
        out = loaded(x, x.new_zeros(len(x), loaded.W_dec.shape[1]))
        acts = torch.zeros(len(x), job.d_sae).scatter(1, out.latent_indices, out.latent_acts)
        return acts, out.sae_out

    return code


LIBRARIES: dict[str, tuple[Callable[[Job], Callable[[Tensor], Code]], str, str]] = {
    "saekit": (train_saekit, "torch", "."),
    "sae-lens": (train_sae_lens, "sae-lens", "."),
    "dictionary-learning": (train_dictionary_learning, "dictionary-learning", "trainer_0"),
    "eai-sparsify": (train_sparsify, "eai-sparsify", "sae/table"),
}
"""How each trains, the package whose version counts, and where in the job's folder its SAE is."""


@torch.no_grad()
def own_figures(code: Callable[[Tensor], Code], job: Job) -> dict[str, float]:
    """FVU around the mean and L0 of the first test tokens, by the library's own functions; FVU is the mean over hook points."""
    rows = torch.from_numpy(
        np.array(np.load(Path(job.data) / "test.npy", mmap_mode="r")[:GATE_TOKENS], dtype=np.float32)
    )
    x, target = sites_of(rows, sites=job.sites, site=job.site, is_transcoder=job.is_transcoder)
    acts, x_hat = code(x)
    wide = target.double()
    errors = (wide - x_hat.reshape(target.shape).double()).square().sum((0, 2))
    fvu = (errors / (wide - wide.mean(0)).square().sum((0, 2))).mean()
    return {"fvu": float(fvu), "l0": float((acts != 0).sum()) * acts.shape[-1] / acts.numel()}


def main() -> None:
    """Answers until its input ends."""
    train, package, place = LIBRARIES[sys.argv[1]]
    answers = os.fdopen(os.dup(1), "w")
    # What a library prints must not get between the answers.
    os.dup2(2, 1)
    say(answers, {"version": importlib.metadata.version(package)})
    for line in sys.stdin:
        job = Job(**json.loads(line))
        started = time.process_time()
        code = train(job)
        seconds = time.process_time() - started
        say(answers, {"seconds": seconds, "sae": str(Path(job.out) / place), **own_figures(code, job)})


def say(answers: TextIO, answer: dict[str, Any]) -> None:
    """One line."""
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
