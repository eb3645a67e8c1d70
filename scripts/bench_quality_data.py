"""The tokens of scripts/bench_quality, written once so that every library reads the same ones in the same order."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from saekit.activations import ActivationStore, JoinedStore
from saekit.evaluation.planted import PlantedConfig, PlantedDictionary
from saekit.manifest import write_json

__all__ = ["PLANTED", "PLANTED_TUNING", "Shape", "prepare_planted", "prepare_real"]

PLANTED = PlantedConfig(num_features=512, d_in=128, num_roots=16, num_children=4, depth=2, min_probability=4e-3)
"""Half the size of the reference set, so that a run takes seconds."""
PLANTED_TUNING = PLANTED.model_copy(update={"seed": 1886151022})
"""Another dictionary of the same kind, on which peers are tuned."""
TEST_FRACTION = 0.15
SAMPLE_TOKENS = 4096


class Shape(NamedTuple):
    """Sizes of one part of the benchmark."""

    d_sae: int
    k: int
    batch: int
    steps: int
    test_tokens: int


def prepare_real(
    folder: Path, store: Path, shape: Shape, *, hook_points: Sequence[str] = (), test_fraction: float = TEST_FRACTION
) -> None:
    """Writes the ordinary tokens of a store: train.npy [steps * batch, d_in] over as many newly shuffled rounds as needed, and
    test.npy with documents.npy of the held-out documents, in order; of several hook points side by side."""
    facts: dict[str, object] = {"store": str(store.resolve()), **shape._asdict(), "d_sae": 0, "k": 0}
    if hook_points:
        facts |= {"hook_points": list(hook_points), "test_fraction": test_fraction}
    if _is_there(folder, facts):
        return
    opened = [ActivationStore.open(store, name) for name in hook_points or (None,)]
    joined = opened[0] if len(opened) == 1 else JoinedStore(opened)
    train, test = joined.split(test_fraction=test_fraction)
    rng = np.random.default_rng(0)
    wanted = shape.steps * shape.batch
    rounds = [rng.permutation(train.indices) for _ in range(-(-wanted // train.num_tokens))]
    order = np.concatenate(rounds)[:wanted]
    array = _open(folder / "train.npy", wanted, train.d_in, np.float16)
    for start in range(0, wanted, SAMPLE_TOKENS):
        array[start : start + SAMPLE_TOKENS] = train.read(order[start : start + SAMPLE_TOKENS]).numpy()
    array.flush()
    # Evenly over the held-out documents, whole runs of tokens at a time.
    kept = test.indices[np.linspace(0, test.num_tokens - 1, min(shape.test_tokens, test.num_tokens)).astype(np.int64)]
    np.save(folder / "test.npy", test.read(kept).numpy())
    documents = test.store.documents().reshape(-1)[kept]
    np.save(folder / "documents.npy", np.unique(documents, return_inverse=True)[1])
    write_json(folder / "facts.json", facts)


def prepare_planted(folder: Path, shape: Shape, config: PlantedConfig) -> None:
    """Writes tokens of a planted dictionary: train.npy, test.npy and truth.pt, each stream with a seed of its own."""
    facts = {"planted": config.to_dict(), **shape._asdict(), "d_sae": 0, "k": 0}
    if _is_there(folder, facts):
        return
    planted = PlantedDictionary(config)
    wanted = shape.steps * shape.batch
    array = _open(folder / "train.npy", wanted, config.d_in, np.float32)
    generator = torch.Generator().manual_seed(1)
    for start in range(0, wanted, SAMPLE_TOKENS):
        size = min(SAMPLE_TOKENS, wanted - start)
        array[start : start + size] = planted.sample(size, generator).x.numpy()
    array.flush()
    sample = planted.sample(shape.test_tokens, torch.Generator().manual_seed(2))
    np.save(folder / "test.npy", sample.x.numpy())
    # Tokens are independent draws, but intervals still resample groups of them.
    np.save(folder / "documents.npy", np.arange(shape.test_tokens) * 64 // shape.test_tokens)
    truth = {"features": planted.features, "probabilities": planted.probabilities, "fires": sample.acts > 0}
    torch.save(truth, folder / "truth.pt")
    write_json(folder / "facts.json", facts)


def _is_there(folder: Path, facts: dict[str, object]) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "facts.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != json.loads(json.dumps(facts)):
        raise SystemExit(f"{folder}: has other tokens, needs {facts}; use another --work, or remove the folder")
    return True


def _open(path: Path, num_rows: int, width: int, dtype: type[np.floating]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(num_rows, width))
