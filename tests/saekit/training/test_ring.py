"""SAEs trained on a ring: what is killed goes on to the same bits, on any number of processes, within the disk that was given."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saekit.activations import ActivationStore, CacheConfig, RingView, cache_activations
from saekit.activations.ring import Ring
from saekit.activations.segment import read_ledger
from saekit.errors import ConfigError
from saekit.models import LanguageModel, load_model
from saekit.sae import TopKConfig, build_sae, load_sae_folder
from saekit.training import TrainConfig, Trainer, check_ring, ringed, train_together
from saekit.training import finish as finish_module
from saekit.training import trainer as trainer_module
from saekit.training.layout import Layout
from saekit.training.loop import TrainingLoop
from tests.saekit.activations.rings import NoFillers, ThreadFillers, make_ring, size_of
from tests.saekit.training import ring_fleet
from tests.saekit.training.ranks import forks, free_port
from tests.saekit.training.ring_fleet import BATCH, HOOKS, PLACES, STEPS, run_filling, run_training, trainers

KILLS = 3


@pytest.fixture(scope="module")
def kept(tiny_model_dir: object, many_documents_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 800 tokens at two hook points; the text has about five times as many."""
    config = CacheConfig.parse(
        {
            "model": {"name": str(tiny_model_dir("llama"))},  # type: ignore[operator]
            "text": {"kind": "files", "paths": [str(many_documents_file)]},
            "tokens": {"context_len": 16},
            "hook_points": list(HOOKS),
            "num_tokens": 800,
            "shard_tokens": 512,
        }
    )
    return cache_activations(config, tmp_path_factory.mktemp("kept") / "cache").path


@pytest.fixture(scope="module")
def own_lm(kept: Path) -> LanguageModel:
    return load_model(ActivationStore.open(kept, HOOKS[0]).model_name)


@pytest.fixture(scope="module", autouse=True)
def _small_samples() -> Iterator[None]:
    """The start and the end are measured on a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer_module, finish_module):
            patch.setattr(module, "SAMPLE_TOKENS", 512)
        yield


class Threads:
    """Fills the rings of this process's trainings by threads."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.fillers: list[ThreadFillers] = []

    def keeper(self, ring: Ring) -> ThreadFillers:
        ring.folder.mkdir(parents=True, exist_ok=True)
        self.fillers.append(ThreadFillers(ring, self.lm))
        return self.fillers[-1]


@pytest.fixture
def threads(own_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Threads:
    made = Threads(own_lm)
    monkeypatch.setattr(ringed, "RingKeeper", made.keeper)
    return made


@pytest.fixture(scope="module")
def whole(kept: Path, own_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both SAEs, trained without anything happening to them."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        made = Threads(own_lm)
        patch.setattr(ringed, "RingKeeper", made.keeper)
        train_together(trainers(kept, out))
    assert made.fillers[0].most_bytes <= ring_of(kept, out).config.disk
    return out


def ring_of(kept: Path, out: Path) -> Ring:
    return make_ring(kept, out / "ring", batch_size=BATCH, places=PLACES)


def weights(out: Path) -> list[bytes]:
    return [(out / str(number) / "sae.safetensors").read_bytes() for number in range(len(HOOKS))]


def test_saes_on_one_read_are_those_trained_alone(
    kept: Path, whole: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads = []
    read = ringed.SharedRing.at
    monkeypatch.setattr(ringed.SharedRing, "at", lambda self, *at: reads.append(at) or read(self, *at))
    (_, first), (_, second) = trainers(kept, tmp_path).items()
    first.fit(tmp_path / "0")
    second.fit(tmp_path / "1")
    assert weights(tmp_path) == weights(whole)
    # Every batch once, through several segments.
    assert reads[:STEPS] == list(dict.fromkeys(reads[:STEPS]))
    assert reads[STEPS - 1][0] >= 2
    assert len(read_ledger(ring_of(kept, whole)).segments) > 2


def test_stopped_trainings_go_on_each_from_its_own_segment(
    kept: Path, whole: Path, threads: Threads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = TrainingLoop.advance

    def stopping(self: TrainingLoop, *, stop_asked: bool = False) -> object:
        return advance(self, stop_asked=stop_asked or self.run.step == stops[0])

    monkeypatch.setattr(TrainingLoop, "advance", stopping)
    stops = [8]
    with pytest.raises(KeyboardInterrupt):
        train_together(trainers(kept, tmp_path))
    # The second one begins anew, with segments that are gone.
    for folder in sorted((tmp_path / "1" / "checkpoints").glob("*")):
        folder.rename(tmp_path / folder.name)
    stops = [12]
    with pytest.raises(KeyboardInterrupt):
        train_together(trainers(kept, tmp_path))
    stops = [-1]
    train_together(trainers(kept, tmp_path))
    assert weights(tmp_path) == weights(whole)
    assert [fillers.jobs[0].start for fillers in threads.fillers][:2] == [0, 0]
    assert threads.fillers[2].jobs[0].start > 0
    assert all(fillers.most_bytes <= fillers.ring.config.disk for fillers in threads.fillers)


class Fleet:
    """A training and the process that fills its ring, both of which may be killed."""

    def __init__(self, kept: Path, out: Path, number: int) -> None:
        self.pipe, self.started = out / f"pipe_{number}", out / f"started_{number}"
        os.mkfifo(self.pipe)
        names = (str(kept), str(out), str(self.pipe), str(self.started))
        self.training = forks().Process(target=run_training, args=names)
        self.filling = forks().Process(target=run_filling, args=(str(self.pipe),))
        self.training.start()
        self.filling.start()

    def measured(self, *folders: Path, seconds: float) -> int:
        """Returns the most bytes that folders had in some time, or till the training ends."""
        most, deadline = 0, time.monotonic() + seconds
        while self.training.is_alive() and time.monotonic() < deadline:
            most = max(most, size_of(*folders))
            time.sleep(0.01)
        return most

    def join(self) -> None:
        self.training.join(60)
        if not self.started.exists() and self.training.exitcode == -signal.SIGKILL:
            # It may never have opened the pipe, whose other end then waits for somebody.
            with contextlib.suppress(OSError):
                os.close(os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK))
        self.filling.join(60)
        assert not self.training.is_alive()
        assert not self.filling.is_alive()


def test_kills_of_either_process_at_any_instant_change_no_bit(kept: Path, whole: Path, tmp_path: Path) -> None:
    chance, ring = random.Random(5), ring_of(kept, tmp_path)
    most, said = 0, []
    for number in range(20):
        fleet = Fleet(kept, tmp_path, number)
        while fleet.training.is_alive() and not fleet.started.exists():
            most = max(most, fleet.measured(kept, ring.folder, seconds=0.02))
        most = max(most, fleet.measured(kept, ring.folder, seconds=chance.uniform(0, 0.2) if number < KILLS else 60))
        victim = fleet.filling if number % 2 else fleet.training
        if number < KILLS:
            victim.kill()
            most = max(most, fleet.measured(kept, ring.folder, seconds=30))
        fleet.join()
        # One that lost its training ends by itself, and says nothing.
        assert fleet.filling.exitcode in {0, -signal.SIGKILL}
        if fleet.training.exitcode == 0:
            break
        if fleet.training.exitcode == 3:
            said.append(fleet.started.with_suffix(".error").read_text())
    assert weights(tmp_path) == weights(whole)
    assert said
    assert all("the process that fills it was killed (signal 9); checkpoints and" in line for line in said)
    assert 0 < most <= ring.config.disk


def test_two_processes_train_as_one(kept: Path, whole: Path, tmp_path: Path) -> None:
    pipe, port = tmp_path / "pipe", free_port()
    os.mkfifo(pipe)
    processes = [forks().Process(target=run_filling, args=(str(pipe),))]
    names = [(str(kept), str(tmp_path), rank, 2, port, str(pipe)) for rank in range(2)]
    processes += [forks().Process(target=ring_fleet.run_rank, args=name) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for number in range(len(HOOKS)):
        found, single = (load_sae_folder(out / str(number)) for out in (tmp_path, whole))
        for name, value in found.named_parameters():
            torch.testing.assert_close(value, single.get_parameter(name), atol=2e-4, rtol=1e-3)


class Numbered:
    """Batches whose columns are their numbers."""

    segment = batch = 0

    def next_batch(self) -> torch.Tensor:
        self.batch += 1
        return torch.arange(8.0)[None]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ([slice(3, 8), slice(0, 3)], [3, 4, 5, 6, 7, 0, 1, 2]),
        ([slice(3, 8)], [3, 4, 5, 6, 7]),
        ([slice(0, 8)], [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=["target-before-input", "second", "all"],
)
def test_each_training_gets_its_hook_points_in_its_own_order(columns: list[slice], found: list[float]) -> None:
    shared = ringed.SharedRing(Numbered(), NoFillers(), ["a", "b"], [3, 5])  # type: ignore[arg-type]  # enough of one
    view = SimpleNamespace(d_in=len(found))
    config = TrainConfig(num_tokens=64, batch_size=64)
    tap = ringed.RingTap(shared, view, columns, config, Layout.alone())  # type: ignore[arg-type]  # enough of one
    assert tap.next_batch().tolist() == [found]
    assert tap.next_batch().tolist() == [found]
    assert shared.batches.batch == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 32}, r"b: batch_size 32, needs that of a, 64: a ring is read once"),
        ({"seed": 1}, r"b: seed 1, needs that of a, 0"),
        ({"layout": "layers"}, r"b: layout 'layers' on a ring, needs 'data'"),
        ({"objective": {"kind": "e2e"}}, r"b: objective 'e2e' reads whole rows again, needs a cache"),
    ],
    ids=["batch_size", "seed", "layout", "objective"],
)
def test_trainings_that_cannot_share_a_ring_are_refused(changes: dict[str, object], message: str) -> None:
    common: dict[str, object] = {"num_tokens": 640, "batch_size": 64}
    with pytest.raises(ConfigError, match=message):
        check_ring({"a": TrainConfig.parse(common), "b": TrainConfig.parse(common | changes)})


def test_batch_that_processes_cannot_share_is_refused_for_a_single_sae_too(kept: Path, tmp_path: Path) -> None:
    train, _ = ActivationStore.open(kept, HOOKS[0]).split(0.2)
    config = TrainConfig.parse({"num_tokens": 640, "batch_size": 64, "layout": "layers"})
    with pytest.raises(ConfigError, match=r"^training: layout 'layers' on a ring"):
        Trainer(build_sae(TopKConfig(d_in=32, d_sae=48, k=4)), RingView(train, ring_of(kept, tmp_path)), config)
