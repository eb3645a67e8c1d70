"""Defects that other trainers shipped, each put in here to see that a named check turns red; and the checks themselves."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from saekit.sae import (
    SAE,
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    MatryoshkaTopKConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    build_sae,
    load_sae_folder,
)
from saekit.training import TrainConfig
from saekit.training import micro as micro_module
from saekit.training import nested as nested_module
from saekit.training import objective as objective_module
from saekit.training import run as run_module
from saekit.training.average import WeightAverage
from saekit.training.build import build_objective
from saekit.training.dead import DeadFeatures
from saekit.training.objective import BatchTopKObjective, Code, Objective, StepResult
from saekit.training.penalty import GatedObjective, JumpReLUObjective
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
EVERY: dict[str, SAEConfig] = {
    "topk": TOPK,
    "batchtopk": BATCHTOPK,
    "jumprelu": JUMPRELU,
    "relu": RELU,
    "gated": GATED,
    "matryoshka_topk": MatryoshkaTopKConfig.parse(SHAPE | {"k": 3}),
    "matryoshka_batchtopk": MatryoshkaBatchTopKConfig.parse(SHAPE | {"k": 3}),
}


def alone(value: Tensor) -> Tensor:
    return value


def make_run(planted: ModuleType, cfg: SAEConfig, *, scale: float = 1.0, **changes: object) -> TrainRun:
    from accelerate import Accelerator

    values: dict[str, object] = {"num_tokens": 200 * 96, "batch_size": 96, "lr": 3e-3, "dead_after_tokens": 192}
    source = planted.PlantedSource(batch_size=96, scale=scale)
    normalization = estimate_normalization(read_sample(source, 2048), alone)
    sae = build_sae(cfg, seed=3)
    if "threshold" in dict(sae.named_parameters()):
        sae.get_parameter("threshold").data.fill_(1.0)
    elif cfg in (RELU, GATED):
        sae.b_enc.data.fill_(-1.0)
    config = TrainConfig.parse(values | changes)
    return TrainRun(sae, source, config, normalization=normalization, accelerator=Accelerator(cpu=True))


def float64_objective(cfg: SAEConfig) -> Objective:
    generator = torch.Generator().manual_seed(4)
    sae = build_sae(cfg).double()
    for name, parameter in sae.named_parameters():
        drawn = 0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data.copy_(0.1 + drawn.abs() if name == "threshold" else drawn)
    return build_objective(sae, TrainConfig(num_tokens=1000), total_variance=5.0, sum_over_processes=alone)


def batch() -> Tensor:
    return torch.randn(11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# The checks.


def check_auxk_moves_dead_features_alone(planted: ModuleType, folder: Path) -> None:
    """AuxK adds a gradient to the dead features' encoder and decoder, and exactly none to anything else."""
    dead = torch.tensor([1, 4, 5, 9])
    live = torch.ones(40, dtype=torch.bool)
    live[dead] = False
    for cfg in EVERY.values():
        gradients: list[Mapping[str, Tensor]] = []
        for indices in (dead, dead[:0]):
            objective = float64_objective(cfg)
            objective(batch(), indices, 0.1).loss.backward()
            found = {name: p.grad for name, p in objective.trained_parameters().items()}
            gradients.append({name: grad for name, grad in found.items() if grad is not None})
        with_auxk, without = gradients
        for name, gradient in with_auxk.items():
            rows, others = (gradient.T, without[name].T) if name == "W_enc" else (gradient, without[name])
            if name in {"W_enc", "b_enc", "W_dec"}:
                assert torch.equal(rows[live], others[live]), (cfg.kind, name)
                assert (rows[dead] - others[dead]).abs().max() > 1e-7, (cfg.kind, name)
            else:
                assert torch.equal(rows, others), (cfg.kind, name)


def check_auxk_is_weighed_once(planted: ModuleType, folder: Path) -> None:
    """The loss is the reconstruction's and 1/32 of AuxK's."""
    objective = float64_objective(TOPK)
    result = objective(batch(), torch.tensor([1, 4, 5, 9]))
    assert float(result.auxiliary) > 0.5
    torch.testing.assert_close(result.loss.detach(), result.fvu + result.auxiliary / 32)


def check_clipped_entries_move_nothing(planted: ModuleType, folder: Path) -> None:
    """Entries that relu set to 0 pass no gradient to the encoder, k or not."""
    for cfg in (TOPK, BATCHTOPK, EVERY["matryoshka_topk"]):
        objective = float64_objective(cfg)
        objective.sae.b_enc.data.fill_(-100.0)
        objective(batch(), torch.empty(0, dtype=torch.int64)).loss.backward()
        for parameter in (objective.sae.W_enc, objective.sae.b_enc):
            assert parameter.grad is None or not parameter.grad.any(), cfg.kind


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


def check_prefixes_are_weighed_once(planted: ModuleType, folder: Path) -> None:
    """The nested loss is the weighted mean of its prefixes', so that AuxK weighs the same with any number of groups."""
    for groups in (1, 2, 4):
        cfg = MatryoshkaTopKConfig.parse(SHAPE | {"k": 3, "group_fractions": [1 / groups] * groups})
        objective = float64_objective(cfg)
        objective.sae.W_dec.data.zero_()
        result = objective(batch(), torch.empty(0, dtype=torch.int64))
        torch.testing.assert_close(result.loss.detach(), result.fvu)


def check_frozen_decoder(planted: ModuleType, folder: Path) -> None:
    """The gates' own reconstruction does not train the decoder."""
    objective = float64_objective(GATED)
    objective.sae.get_parameter("b_mag").data.fill_(-100.0)
    objective(batch(), torch.empty(0, dtype=torch.int64), 0.1).loss.backward()
    assert objective.sae.W_dec.grad is not None
    assert not objective.sae.W_dec.grad.any()


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


CHECKS: list[Check] = [
    check_auxk_moves_dead_features_alone,
    check_auxk_is_weighed_once,
    check_clipped_entries_move_nothing,
    check_saved_weights_are_the_averaged_ones,
    check_dead_tokens_are_global,
    check_schedule_ends_with_the_training,
    check_parts_are_used,
    check_prefixes_are_weighed_once,
    check_frozen_decoder,
    check_thresholds_move_in_float32,
    check_threshold_gives_the_training_l0,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_check_is_green_as_the_code_stands(check: Check, planted: ModuleType, tmp_path: Path) -> None:
    check(planted, tmp_path)


# The defects.


def _auxk_without_encoder(patch: pytest.MonkeyPatch) -> None:
    right = objective_module.auxk_loss

    def wrong(inputs: Tensor, residual: Tensor, weights: tuple[Tensor, Tensor, Tensor], **kwargs: object) -> Tensor:
        W_enc, b_enc, W_dec = weights
        loss: Tensor = right(inputs, residual, (W_enc.detach(), b_enc.detach(), W_dec), **kwargs)  # type: ignore[arg-type]
        return loss

    patch.setattr(objective_module, "auxk_loss", wrong)


def _auxk_of_the_error_itself(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Objective, inputs: Tensor, error: Tensor, dead: Tensor, code: Code) -> tuple[Tensor, Tensor]:
        if not len(dead):
            return error.new_zeros(()), error.new_zeros(())
        acts = (inputs @ self.sae.W_enc[:, dead] + self.sae.b_enc[dead]).relu()
        loss = (error - acts @ self.sae.W_dec[dead]).square().sum() / len(error)
        return loss.detach(), loss / 32

    patch.setattr(Objective, "dead_loss", wrong)


def _auxk_never_added(patch: pytest.MonkeyPatch) -> None:
    right = Objective.dead_loss

    def wrong(self: Objective, inputs: Tensor, error: Tensor, dead: Tensor, code: Code) -> tuple[Tensor, Tensor]:
        loss, weighted = right(self, inputs, error, dead, code)
        return loss, weighted.detach()

    patch.setattr(Objective, "dead_loss", wrong)


def _auxk_weighed_twice(patch: pytest.MonkeyPatch) -> None:
    right = Objective.dead_loss

    def wrong(self: Objective, inputs: Tensor, error: Tensor, dead: Tensor, code: Code) -> tuple[Tensor, Tensor]:
        loss, weighted = right(self, inputs, error, dead, code)
        return loss, self.config.auxk_alpha * weighted

    patch.setattr(Objective, "dead_loss", wrong)


def _gradient_through_relu_zeros(patch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = torch.topk(x @ W_enc + b_enc, k, dim=1)
        return values + (values.relu() - values).detach(), indices

    patch.setattr(objective_module, "encode_topk", wrong)


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
    patch.setattr(Objective, "settle", lambda self: None)
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
        return right(objective, x, dead, coefficient, part_tokens=None)

    patch.setattr(run_module, "backward_in_parts", wrong)


def _accumulated_without_shares(patch: pytest.MonkeyPatch) -> None:
    def wrong(objective: Objective, x: Tensor, dead: Tensor, coefficient: float, *, part_tokens: int) -> StepResult:
        results = [objective(part, dead, coefficient) for part in torch.split(x, part_tokens or len(x))]
        for result in results:
            result.loss.backward()
        return results[-1]._replace(loss=results[-1].loss.detach())

    patch.setattr(run_module, "backward_in_parts", wrong)


def _prefixes_averaged_twice(patch: pytest.MonkeyPatch) -> None:
    right = nested_module._Nested.reconstruct

    def wrong(self: nested_module._Nested, inputs: Tensor, target: Tensor, code: Code) -> tuple[Tensor, ...]:
        total, fvu, error = right(self, inputs, target, code)
        return total / len(self.sae.cfg.prefixes()), fvu, error

    patch.setattr(nested_module._Nested, "reconstruct", wrong)


def _gates_train_the_decoder(patch: pytest.MonkeyPatch) -> None:
    right = GatedObjective.penalty

    def wrong(self: GatedObjective, inputs: Tensor, target: Tensor, code: Code, coefficient: float) -> Tensor | float:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Tensor, "detach", lambda tensor: tensor)
            return right(self, inputs, target, code, coefficient)

    patch.setattr(GatedObjective, "penalty", wrong)


def _thresholds_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    right = JumpReLUObjective.settle

    def wrong(self: JumpReLUObjective) -> None:
        self.log_threshold.data.copy_(self.log_threshold.data.bfloat16())
        right(self)

    patch.setattr(JumpReLUObjective, "settle", wrong)


def _threshold_not_tracked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BatchTopKObjective, "after_step", Objective.after_step)


DEFECTS: list[tuple[Patch, Check]] = [
    (_auxk_without_encoder, check_auxk_moves_dead_features_alone),
    (_auxk_of_the_error_itself, check_auxk_moves_dead_features_alone),
    (_auxk_never_added, check_auxk_moves_dead_features_alone),
    (_auxk_weighed_twice, check_auxk_is_weighed_once),
    (_gradient_through_relu_zeros, check_clipped_entries_move_nothing),
    (_optimizer_resumes_from_the_average, check_saved_weights_are_the_averaged_ones),
    (_trained_point_is_saved, check_saved_weights_are_the_averaged_ones),
    (_average_has_short_rows, check_saved_weights_are_the_averaged_ones),
    (_decoder_normalised_along_the_other_axis, check_saved_weights_are_the_averaged_ones),
    (_dead_tokens_of_one_part, check_dead_tokens_are_global),
    (_features_of_the_last_part_only, check_dead_tokens_are_global),
    (_schedule_counts_parts, check_schedule_ends_with_the_training),
    (_accumulation_never_read, check_parts_are_used),
    (_accumulated_without_shares, check_parts_are_used),
    (_prefixes_averaged_twice, check_prefixes_are_weighed_once),
    (_gates_train_the_decoder, check_frozen_decoder),
    (_thresholds_in_bfloat16, check_thresholds_move_in_float32),
    (_threshold_not_tracked, check_threshold_gives_the_training_l0),
]


@pytest.mark.parametrize(("defect", "check"), DEFECTS, ids=[defect.__name__.strip("_") for defect, _ in DEFECTS])
def test_defect_turns_its_check_red(
    defect: Patch, check: Check, planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        check(planted, tmp_path)
