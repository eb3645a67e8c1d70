"""Defects of whole trainings that other trainers shipped, each put in here to see that a named check turns red."""

import contextlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from saekit.errors import FormatError
from saekit.sae import (
    SAE,
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    build_sae,
    load_sae_folder,
)
from saekit.training import TrainConfig, Trainer
from saekit.training import loop as loop_module
from saekit.training import micro as micro_module
from saekit.training import run as run_module
from saekit.training import state as state_module
from saekit.training import trainer as trainer_module
from saekit.training.average import WeightAverage
from saekit.training.dead import DeadFeatures
from saekit.training.objective import BatchTopKObjective, Objective, StepResult
from saekit.training.penalty import JumpReLUObjective
from saekit.training.run import TrainRun
from saekit.training.schedule_free import ScheduleFreeSignum
from saekit.training.start import estimate_normalization, read_sample

Check = Callable[[ModuleType, Path], None]
Patch = Callable[[pytest.MonkeyPatch], None]
SHAPE: dict[str, object] = {"d_in": 16, "d_sae": 40}
TOPK = TopKConfig.parse(SHAPE | {"k": 3})
BATCHTOPK = BatchTopKConfig.parse(SHAPE | {"k": 3})
JUMPRELU = JumpReLUConfig.parse(SHAPE | {"target_l0": 3})
GATED = GatedConfig.parse(SHAPE | {"target_l0": 3})
RELU = ReLUConfig.parse(SHAPE | {"target_l0": 3})


def make_run(planted: ModuleType, cfg: SAEConfig, *, scale: float = 1.0, **changes: object) -> TrainRun:

    values: dict[str, object] = {"num_tokens": 200 * 96, "batch_size": 96, "lr": 3e-3, "dead_after_tokens": 192}
    source = planted.PlantedSource(batch_size=96, scale=scale)
    normalization = estimate_normalization(read_sample(source, 2048))
    sae = build_sae(cfg, seed=3)
    if "threshold" in dict(sae.named_parameters()):
        sae.get_parameter("threshold").data.fill_(1.0)
    elif cfg in (RELU, GATED):
        sae.b_enc.data.fill_(-1.0)
    config = TrainConfig.parse(values | changes)
    return TrainRun(sae, source, config, normalization=normalization)


# The checks.


def check_saved_weights_are_the_averaged_ones(planted: ModuleType, folder: Path) -> None:
    """A schedule-free run goes on at y after a resume, is saved at x, and the rows of both are unit."""
    run = make_run(planted, TOPK, optimizer="signum", lr=1e-2)
    for _ in range(4):
        run.train_step()
    state, live = run.state_dict(), run.sae.W_dec.detach().clone()
    optimizer = run.optimizer
    assert isinstance(optimizer, ScheduleFreeSignum)
    average = optimizer.averages()["W_dec"].clone()
    assert (average - live).abs().max() > 1e-4
    other = make_run(planted, TOPK, optimizer="signum", lr=1e-2)
    other.load_state_dict(state)
    assert torch.equal(other.sae.W_dec, live)
    run.average.take()
    torch.testing.assert_close(run.sae.W_dec.detach(), average, atol=1e-6, rtol=0)
    run.sae.save(folder)
    norms = load_sae_folder(folder).W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(40), atol=1e-6, rtol=0)


def check_dead_tokens_are_global(planted: ModuleType, folder: Path) -> None:
    """A feature is dead after so many tokens of all processes, in how many parts ever they are taken."""
    for parts in (None, 7, 50):
        run = make_run(planted, TOPK, dead_after_tokens=480, micro_batch_size=parts)
        run.sae.b_enc.data[7] = -1e6
        steps = 0
        while run.train_step().dead_fraction == 0.0:
            steps += 1
            assert steps < 10
        assert (steps + 1) * 96 == 480, parts
        fired = set(range(40)) - set(run.dead.mask.nonzero().flatten().tolist())
        assert 7 not in fired


def check_schedule_ends_with_the_training(planted: ModuleType, folder: Path) -> None:
    """The learning rate reaches its end in the last step, accumulated or not."""
    for parts in (None, 24):
        run = make_run(planted, TOPK, num_tokens=96 * 20, micro_batch_size=parts, decay_fraction=0.5)
        rates = [run.train_step().lr for _ in range(20)]
        assert max(rates) == pytest.approx(3e-3)
        assert rates[-1] == pytest.approx(3e-4)


def check_parts_are_used(planted: ModuleType, folder: Path) -> None:
    """Micro-batches reach the loss, and their gradients add up to the batch's."""
    seen: list[int] = []
    run, whole = make_run(planted, TOPK, micro_batch_size=30), make_run(planted, TOPK)
    run.objective.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found, expected = run.train_step(), whole.train_step()
    assert seen == [30, 30, 30, 6]
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)


def check_thresholds_move_in_float32(planted: ModuleType, folder: Path) -> None:
    """Thresholds follow small steps, which bfloat16 would round away, and the inference threshold is that of training."""
    run = make_run(planted, JUMPRELU, sparsity={"threshold_lr": 1e-4})
    assert isinstance(run.objective, JumpReLUObjective)
    run.objective.log_threshold.data.fill_(0.1)
    run.train_step()
    before = run.sae.get_parameter("threshold").detach().clone()
    for _ in range(2):
        run.train_step()
    moved = run.sae.get_parameter("threshold").detach() - before
    assert run.sae.get_parameter("threshold").dtype == torch.float32
    assert float((moved != 0).double().mean()) > 0.9
    torch.testing.assert_close(run.sae.get_parameter("threshold").detach(), run.objective.log_threshold.detach().exp())


def check_threshold_gives_the_training_l0(planted: ModuleType, folder: Path) -> None:
    """The threshold of a BatchTopK SAE is the smallest entry that batches keep: inference uses k features a token too."""
    run = make_run(planted, BATCHTOPK, lr=1e-4)
    for _ in range(20):
        run.train_step()
    x = run.normalization.apply(torch.cat([run.source.next_batch() for _ in range(20)]))
    assert float((run.sae.encode(x) > 0).sum(1).double().mean()) == pytest.approx(3.0, rel=0.1)


def check_resume_does_no_step_twice(planted: ModuleType, folder: Path) -> None:
    """A run that was stopped goes on from its checkpoint: starting anew would end at the same bits and hide it."""
    steps: list[int] = []
    step, save = TrainRun.train_step, loop_module.TrainingLoop.save

    def note(self: TrainRun, **options: bool) -> object:
        steps.append(self.step)
        return step(self, **options)

    def save_then_fail(self: loop_module.TrainingLoop) -> None:
        save(self)
        raise RuntimeError("power cut")

    config = TrainConfig(num_tokens=96 * 6, batch_size=96, checkpoint_every_tokens=96 * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "SAMPLE_TOKENS", 512)
        patch.setattr(TrainRun, "train_step", note)
        with patch.context() as inner, pytest.raises(RuntimeError, match="power cut"):
            inner.setattr(loop_module.TrainingLoop, "save", save_then_fail)
            Trainer(build_sae(TOPK), planted.PlantedSource(batch_size=96), config).fit(folder)
        Trainer(build_sae(TOPK), planted.PlantedSource(batch_size=96), config).fit(folder)
    assert steps == [0, 1, 2, 3, 4, 5]


class _Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def check_checkpoints_run_no_code(planted: ModuleType, folder: Path) -> None:
    """A checkpoint is data: objects in it are refused in one line, not made."""
    torch.save({"step": _Payload(folder / "was-run")}, folder / "run.pt")
    with contextlib.suppress(FormatError):
        state_module.load_checkpoint(folder, "run")
    torch.save({}, folder / "run.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(_Payload(folder / "was-run")))
    with pytest.raises(FormatError, match="needs the metadata of a checkpoint"):
        state_module.load_run(folder)
    assert not (folder / "was-run").exists()


CHECKS: list[Check] = [
    check_saved_weights_are_the_averaged_ones,
    check_dead_tokens_are_global,
    check_schedule_ends_with_the_training,
    check_parts_are_used,
    check_thresholds_move_in_float32,
    check_threshold_gives_the_training_l0,
    check_resume_does_no_step_twice,
    check_checkpoints_run_no_code,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_check_is_green_as_the_code_stands(check: Check, planted: ModuleType, tmp_path: Path) -> None:
    check(planted, tmp_path)


# The defects.


def _optimizer_resumes_from_the_average(patch: pytest.MonkeyPatch) -> None:
    right = TrainRun.load_state_dict

    def wrong(self: TrainRun, state: Mapping[str, object]) -> None:
        right(self, state)
        self.average.take()

    patch.setattr(TrainRun, "load_state_dict", wrong)


def _trained_point_is_saved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WeightAverage, "take", lambda self: None)


def _average_has_short_rows(patch: pytest.MonkeyPatch) -> None:
    right = ScheduleFreeSignum.averages
    patch.setattr(Objective, "settle", lambda self, **options: None)
    patch.setattr(
        ScheduleFreeSignum, "averages", lambda self: {name: 0.99 * value for name, value in right(self).items()}
    )


def _decoder_normalised_along_the_other_axis(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: SAE) -> None:
        self.W_dec.data = nn.functional.normalize(self.W_dec.data, dim=0)

    patch.setattr(SAE, "normalize_decoder", wrong)


def _dead_tokens_of_one_part(patch: pytest.MonkeyPatch) -> None:
    right = DeadFeatures.after
    patch.setattr(DeadFeatures, "after", lambda self, fired, num_tokens: right(self, fired, num_tokens // 4))


def _features_of_the_last_part_only(patch: pytest.MonkeyPatch) -> None:
    right = micro_module.backward_in_parts

    def wrong(objective: Objective, x: Tensor, dead: Tensor, coefficient: float, **kwargs: object) -> StepResult:
        result = right(objective, x, dead, coefficient, **kwargs)  # type: ignore[arg-type]
        return result._replace(fired=torch.zeros_like(result.fired) | (torch.arange(40) == 7))

    patch.setattr(run_module, "backward_in_parts", wrong)


def _schedule_counts_parts(patch: pytest.MonkeyPatch) -> None:
    right = run_module.lr_factor
    patch.setattr(run_module, "lr_factor", lambda step, config: right(step // 4, config))


def _accumulation_never_read(patch: pytest.MonkeyPatch) -> None:
    right = micro_module.backward_in_parts

    def wrong(objective: Objective, x: Tensor, dead: Tensor, coefficient: float, **kwargs: object) -> StepResult:
        return right(objective, x, dead, coefficient, **kwargs | {"part_tokens": None})  # type: ignore[arg-type]

    patch.setattr(run_module, "backward_in_parts", wrong)


def _accumulated_without_shares(patch: pytest.MonkeyPatch) -> None:
    def wrong(objective: Objective, x: Tensor, dead: Tensor, coefficient: float, **kwargs: object) -> StepResult:
        parts = torch.split(x, kwargs["part_tokens"] or len(x))  # type: ignore[arg-type]
        kwargs["before_last"]()  # type: ignore[operator]
        results = [objective(part, dead, coefficient) for part in parts]
        for result in results:
            result.loss.backward()
        return results[-1]._replace(loss=results[-1].loss.detach())

    patch.setattr(run_module, "backward_in_parts", wrong)


def _thresholds_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    right = JumpReLUObjective.settle

    def wrong(self: JumpReLUObjective, **options: bool) -> None:
        self.log_threshold.data.copy_(self.log_threshold.data.bfloat16())
        right(self, **options)

    patch.setattr(JumpReLUObjective, "settle", wrong)


def _threshold_not_tracked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BatchTopKObjective, "after_step", Objective.after_step)


def _checkpoint_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer_module, "latest_checkpoint", lambda out: None)


def _checkpoints_unpickled(patch: pytest.MonkeyPatch) -> None:
    right = torch.load
    patch.setattr(torch, "load", lambda path, **options: right(path, **(options | {"weights_only": False})))


DEFECTS: list[tuple[Patch, Check]] = [
    (_optimizer_resumes_from_the_average, check_saved_weights_are_the_averaged_ones),
    (_trained_point_is_saved, check_saved_weights_are_the_averaged_ones),
    (_average_has_short_rows, check_saved_weights_are_the_averaged_ones),
    (_decoder_normalised_along_the_other_axis, check_saved_weights_are_the_averaged_ones),
    (_dead_tokens_of_one_part, check_dead_tokens_are_global),
    (_features_of_the_last_part_only, check_dead_tokens_are_global),
    (_schedule_counts_parts, check_schedule_ends_with_the_training),
    (_accumulation_never_read, check_parts_are_used),
    (_accumulated_without_shares, check_parts_are_used),
    (_thresholds_in_bfloat16, check_thresholds_move_in_float32),
    (_threshold_not_tracked, check_threshold_gives_the_training_l0),
    (_checkpoint_ignored, check_resume_does_no_step_twice),
    (_checkpoints_unpickled, check_checkpoints_run_no_code),
]


@pytest.mark.parametrize(("defect", "check"), DEFECTS, ids=[defect.__name__.strip("_") for defect, _ in DEFECTS])
def test_defect_turns_its_check_red(
    defect: Patch, check: Check, planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        check(planted, tmp_path)
