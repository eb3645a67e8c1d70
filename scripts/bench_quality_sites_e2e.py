"""The losses through the language model of scripts/bench_quality_sites: the last steps of one SAE's training under each of them."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from saekit import load_sae
from saekit.activations import ActivationStore
from saekit.evaluation import EvaluationConfig, evaluate
from saekit.models import load_model
from saekit.sae import TopKConfig, TopKSAE
from saekit.training import EndToEndConfig, TrainConfig, Trainer
from scripts.bench_quality_data import Shape
from scripts.bench_quality_runs import Results

__all__ = ["METRICS", "OBJECTIVES", "Ending", "e2e_lines", "run_e2e"]

OBJECTIVES = ("mse", "kl_finetune", "e2e", "e2e_downstream")
"""What the last steps minimise; `mse` goes on as before."""
METRICS = {"fvu": "FVU", "l0": "L0", "kl": "KL", "ce_recovered_zero": "CE recovered"}
NAME = "e2e"
"""Of the results."""


class Ending(NamedTuple):
    """The last steps of a training."""

    steps: int
    """How many of all."""
    lr: float
    """Peak learning rate, the same for every objective: the default of so few steps is made for first weights."""
    loss_tokens: int
    """Positions of the CE and KL figures."""


def run_e2e(
    folder: Path,
    store: Path,
    hook_point: str,
    shape: Shape,
    ending: Ending,
    results: Results,
    *,
    test_fraction: float,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Trains a TopK SAE but for its last steps, and these once under each objective; adds what is missing to the results.

    Args:
        folder: of the SAEs; those that are finished are not trained again.
        store: activations of the model.
        hook_point: whose.
        shape: sizes of the whole training.
        ending: of its last part.
        results: get a row for each objective.
        test_fraction: of the documents.
        seed: of weights and order.
        say: for progress.
    """
    missing = [kind for kind in OBJECTIVES if not results.find(data=NAME, arch=kind, seed=seed)]
    if not missing:
        return
    opened = ActivationStore.open(store, hook_point)
    train, test = opened.split(test_fraction=test_fraction)
    lm = load_model(opened.model_name)
    config = TopKConfig(d_in=opened.d_in, d_sae=shape.d_sae, k=shape.k)
    first = TrainConfig(num_tokens=(shape.steps - ending.steps) * shape.batch, batch_size=shape.batch, seed=seed)
    start = folder / f"start-{seed}"
    Trainer(TopKSAE(config), train, first).fit(start)
    for kind in missing:
        last = TrainConfig(
            num_tokens=ending.steps * shape.batch,
            batch_size=shape.batch,
            # Another order than that of the first steps.
            seed=seed + 1000,
            init="given",
            lr=ending.lr,
            objective=None if kind == "mse" else EndToEndConfig.parse({"kind": kind}, where="objective"),
        )
        sae = Trainer(load_sae(start), train, last, lm=lm).fit(folder / f"{kind}-{seed}")
        measured = EvaluationConfig(num_tokens=shape.test_tokens, num_loss_tokens=ending.loss_tokens, nulls=())
        own = evaluate(sae, test, lm=lm, config=measured, train=train).rows[0].metrics
        figures = {name: own[name].model_dump() for name in METRICS}
        version = importlib.metadata.version("torch")
        results.add(
            {"data": NAME, "library": "saekit", "arch": kind, "seed": seed, "version": version, "metrics": figures}
        )
        say(f"{NAME} {kind} seed {seed}: " + ", ".join(f"{name} {own[name].format()}" for name in METRICS))


def e2e_lines(results: Results, *, seeds: int) -> list[str]:
    """Returns the Markdown table of what each objective's SAE does to the model, with intervals over documents."""
    heads = ["last steps", "seed", *METRICS.values()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind in OBJECTIVES:
        for row in results.find(data=NAME, arch=kind):
            if row["seed"] < seeds:
                cells = [_cell(row["metrics"][name]) for name in METRICS]
                lines.append(f"| {kind} | {row['seed']} | {' | '.join(cells)} |")
    return lines


def _cell(figure: dict[str, Any]) -> str:
    if figure["low"] is None:
        return f"{figure['value']:.4f}"
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]"
