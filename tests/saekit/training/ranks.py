"""Trainings by several processes of one machine, which are forked from a server that has imported everything."""

import multiprocessing
import os
import signal
import socket
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch
from torch import Tensor

from saekit.errors import NonFiniteError, ResourceError
from saekit.sae import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    MatryoshkaTopKConfig,
    MLSAEConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    TopKCrosscoderConfig,
    TranscoderConfig,
    build_sae,
)
from saekit.training import TrainConfig, Trainer, finish, train_together, trainer
from tests.saekit.training.planted import PlantedSource, PlantedView

BATCH = 64
STEPS = 9
"""The last batch is one of the short ones."""
SAMPLE_TOKENS = 512
"""The start and the end are measured on a few tokens."""
D_SAE = 31
"""Not even over two, three or four processes."""
TRAINING = {
    "num_tokens": STEPS * BATCH,
    "batch_size": BATCH,
    "lr": 1e-3,
    "dead_after_tokens": 3 * BATCH,
    "k_aux": 2,
    "log_every_tokens": BATCH,
    "eval_every_tokens": 4 * BATCH,
    "checkpoint_every_tokens": 4 * BATCH,
}
SHAPE = {"d_in": 12, "d_sae": D_SAE}
SAES: dict[str, SAEConfig] = {
    "topk": TopKConfig(**SHAPE, k=3),
    "topk_wide": TopKConfig(d_in=12, d_sae=D_SAE, k=17, apply_b_dec_to_input=False),
    "batchtopk": BatchTopKConfig(**SHAPE, k=3),
    "jumprelu": JumpReLUConfig(**SHAPE, target_l0=3),
    "quadratic": JumpReLUConfig(**SHAPE, target_l0=3, sparsity="quadratic", ste_to_input=True),
    "tanh": JumpReLUConfig(**SHAPE, target_l0=3, sparsity="tanh"),
    "relu": ReLUConfig(**SHAPE, target_l0=3, p_end=0.5),
    "gated": GatedConfig(**SHAPE, target_l0=3),
    "matryoshka_topk": MatryoshkaTopKConfig(**SHAPE, k=3),
    "matryoshka_batchtopk": MatryoshkaBatchTopKConfig(**SHAPE, k=3),
    "transcoder": TranscoderConfig(d_in=8, d_out=4, d_sae=D_SAE, k=3),
    "skip": TranscoderConfig(d_in=8, d_out=4, d_sae=D_SAE, k=3, has_skip=True),
    "crosscoder": TopKCrosscoderConfig(d_in=6, num_sites=2, d_sae=D_SAE, k=3),
    "mlsae": MLSAEConfig(d_in=6, num_sites=2, d_sae=D_SAE, k=3),
    "resampled": TopKConfig(**SHAPE, k=1),
    "signum": TopKConfig(**SHAPE, k=3),
    "muon": TopKConfig(**SHAPE, k=3),
}
OPTIONS: dict[str, dict[str, object]] = {
    "topk": {"ema_decay": 0.9},
    "tanh": {"sparsity": {"dead_loss": "pre_act"}},
    "batchtopk": {"ema_decay": 0.9},
    "matryoshka_batchtopk": {"micro_batch_size": 24},
    "resampled": {
        "resample": {
            "every_tokens": 4 * BATCH,
            "silent_tokens": 2 * BATCH,
            "sample_tokens": 4 * BATCH,
            "encoder_norm": 1.0,
        }
    },
    "signum": {"optimizer": "signum"},
    "muon": {"optimizer": "muon"},
}
EVERYWHERE = tuple(kind for kind in SAES if kind not in {"crosscoder", "mlsae", "resampled", "muon"})
"""Kinds whose features can be spread over processes."""
IS_WHOLE = os.environ.get("SAEKIT_ALL_LAYOUTS") == "1"
"""Whether four processes train every kind in every layout, which takes a minute more, or those that differ."""
MESH = EVERYWHERE if IS_WHOLE else ("topk", "batchtopk", "jumprelu", "matryoshka_batchtopk", "skip")
DATA4 = tuple(SAES) if IS_WHOLE else ("batchtopk", "gated")
LATENTS4 = EVERYWHERE if IS_WHOLE else ("topk", "batchtopk", "gated", "transcoder")


class Tokens(PlantedSource):
    """Every third batch is short, and is not shared evenly."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(d_in=12, batch_size=BATCH)
        self.place = rank, world_size

    def batch(self, number: int) -> Tensor:
        x = super().batch(number)
        return x[:50] if number % 3 == 2 else x

    def next_batch(self) -> Tensor:
        rank, world_size = self.place
        x = super().next_batch()
        # 34 and 16 of 50 where two share them.
        ends = [
            round(len(x) * (part / world_size) ** (1.0 if len(x) == BATCH else 0.55)) for part in range(world_size + 1)
        ]
        return x[ends[rank] : ends[rank + 1]].contiguous()


def make_trainer(kind: str, layout: object = "data", *, rank: int = 0, world_size: int = 1) -> Trainer:
    source = Tokens(rank, world_size)
    config = TrainConfig.parse(TRAINING | OPTIONS.get(kind, {}) | {"layout": layout})
    return Trainer(build_sae(SAES[kind]), source, config, test=PlantedView(source, num_batches=3))


def train(out: Path, layout: str | dict[str, int], kinds: tuple[str, ...], place: tuple[int, int]) -> None:
    """Trains each kind into a folder of its own; `place` is the rank among those that share the tokens, and their number."""
    for kind in kinds:
        make_trainer(kind, layout, rank=place[0], world_size=place[1]).fit(out / kind)


def train_in_turns(out: Path, kind: str, *turns: tuple[object, tuple[int, int]]) -> None:
    """The same with a layout and a place for each third of the steps, all but the last ended by Ctrl-C."""
    for number, (layout, place) in enumerate(turns):
        made = make_trainer(kind, layout, rank=place[0], world_size=place[1])
        is_last = number == len(turns) - 1
        if not is_last:
            made.train.kill_at, made.train.signal = 3 * (number + 1), signal.SIGINT  # type: ignore[union-attr]
            # At first, the start reads 9 batches and comes back.
            made.train.armed_after = 0 if number else 9  # type: ignore[union-attr]
        try:
            made.fit(out)
        except (KeyboardInterrupt, ResourceError):
            assert not is_last
        else:
            assert is_last


def train_until_one_is_killed(out: Path, rank: int) -> None:
    """The second of two processes is killed in its ninth and last step, when the checkpoint of the eighth has been begun."""
    made = make_trainer("topk", rank=rank, world_size=2)
    if rank == 1:
        made.train.kill_at, made.train.armed_after = 8, 9  # type: ignore[union-attr]
    try:
        made.fit(out)
    except ResourceError as error:
        (out / "lost").write_text(str(error))
        raise


def train_layers(out: Path) -> None:
    """Three SAEs on two processes, and once more with one that meets NaN."""
    kinds = ("topk", "jumprelu", "gated")
    train_together({out / kind: make_trainer(kind, "layers") for kind in kinds})
    broken = {out / "broken" / kind: make_trainer(kind, "layers") for kind in kinds}
    broken[out / "broken" / "gated"].train.nan_at = 3  # type: ignore[union-attr]
    try:
        train_together(broken)
    except NonFiniteError as error:
        (out / f"error_{os.environ['RANK']}").write_text(str(error))
    make_trainer("topk", "layers").fit(out / "single")


def two(out: Path, rank: int) -> None:
    """All that two processes do."""
    train(out / "data", "data", tuple(SAES), (rank, 2))
    train(out / "latents", "latents", EVERYWHERE, (0, 1))
    whole, half = (0, 1), (rank, 2)
    train_in_turns(out / "same", "jumprelu", ("latents", whole), ("latents", whole))
    # The one process of `layers` has everything.
    train_in_turns(out / "turns" / "topk", "topk", ("latents", whole), ("layers", whole), ("latents", whole))
    for kind in ("jumprelu", "batchtopk"):
        train_in_turns(out / "turns" / kind, kind, ("data", half), ("latents", whole), ("data", half))
    train_layers(out / "layers")
    train_until_one_is_killed(out / "killed", rank)


def four(out: Path, rank: int) -> None:
    """All that four processes do."""
    train(out / "mesh", {"data": 2, "latents": 2}, MESH, (rank // 2, 2))
    train(out / "data4", "data", DATA4, (rank, 4))
    train(out / "latents4", "latents", LATENTS4, (0, 1))
    mesh = {"data": 2, "latents": 2}, (rank // 2, 2)
    train_in_turns(out / "turns" / "matryoshka_topk", "matryoshka_topk", mesh, ("latents", (0, 1)), mesh)


def forks() -> ForkServerContext:
    """Forks of one process, the same for all tests, that has imported everything and has not run any of it yet."""
    context = multiprocessing.get_context("forkserver")
    # Optimizers import `torch._dynamo` late.
    context.set_forkserver_preload(
        [
            "tests.saekit.training.ring_fleet",
            "tests.saekit.training.fleet",
            "accelerate",
            "torch.distributed.checkpoint",
            "torch._dynamo",
            "transformers.models.llama.modeling_llama",
        ]
    )
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def join(rank: int, world_size: int, port: int) -> None:
    """Makes this process one of several."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def _run(rank: int, world_size: int, port: int, out: Path) -> None:
    join(rank, world_size, port)
    trainer.SAMPLE_TOKENS = finish.SAMPLE_TOKENS = SAMPLE_TOKENS
    {2: two, 4: four}[world_size](out, rank)
    torch.distributed.destroy_process_group()


def start(world_size: int, out: Path) -> list[ForkServerProcess]:
    """Starts `two` or `four`; they end by themselves."""
    context, port = forks(), free_port()
    processes = [context.Process(target=_run, args=(rank, world_size, port, out)) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes
