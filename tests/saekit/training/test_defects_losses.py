"""Defects of losses that other trainers shipped, each put in here to see that a named check turns red; and the checks."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from saekit.sae import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    MatryoshkaTopKConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    build_sae,
)
from saekit.training import TrainConfig
from saekit.training import nested as nested_module
from saekit.training import objective as objective_module
from saekit.training import selection as selection_module
from saekit.training.build import build_objective
from saekit.training.objective import Code, Objective
from saekit.training.penalty import GatedObjective

Check = Callable[[], None]
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


def float64_objective(cfg: SAEConfig) -> Objective:
    generator = torch.Generator().manual_seed(4)
    sae = build_sae(cfg).double()
    for name, parameter in sae.named_parameters():
        drawn = 0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data.copy_(0.1 + drawn.abs() if name == "threshold" else drawn)
    return build_objective(sae, TrainConfig(num_tokens=1000), total_variance=5.0)


def batch() -> Tensor:
    return torch.randn(11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# The checks.


def check_auxk_moves_dead_features_alone() -> None:
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


def check_auxk_is_weighed_once() -> None:
    """The loss is the reconstruction's and 1/32 of AuxK's."""
    objective = float64_objective(TOPK)
    result = objective(batch(), torch.tensor([1, 4, 5, 9]))
    assert float(result.auxiliary) > 0.5
    torch.testing.assert_close(result.loss.detach(), result.fvu + result.auxiliary / 32)


def check_clipped_entries_move_nothing() -> None:
    """Entries that relu set to 0 pass no gradient to the encoder, k or not."""
    for cfg in (TOPK, BATCHTOPK, EVERY["matryoshka_topk"]):
        objective = float64_objective(cfg)
        objective.sae.b_enc.data.fill_(-100.0)
        objective(batch(), torch.empty(0, dtype=torch.int64)).loss.backward()
        for parameter in (objective.sae.W_enc, objective.sae.b_enc):
            assert parameter.grad is None or not parameter.grad.any(), cfg.kind


def check_prefixes_are_weighed_once() -> None:
    """The nested loss is the weighted mean of its prefixes', so that AuxK weighs the same with any number of groups."""
    for groups in (1, 2, 4):
        cfg = MatryoshkaTopKConfig.parse(SHAPE | {"k": 3, "group_fractions": [1 / groups] * groups})
        objective = float64_objective(cfg)
        objective.sae.W_dec.data.zero_()
        result = objective(batch(), torch.empty(0, dtype=torch.int64))
        torch.testing.assert_close(result.loss.detach(), result.fvu)


def check_frozen_decoder() -> None:
    """The gates' own reconstruction does not train the decoder."""
    objective = float64_objective(GATED)
    objective.sae.get_parameter("b_mag").data.fill_(-100.0)
    objective(batch(), torch.empty(0, dtype=torch.int64), 0.1).loss.backward()
    assert objective.sae.W_dec.grad is not None
    assert not objective.sae.W_dec.grad.any()


CHECKS: list[Check] = [
    check_auxk_moves_dead_features_alone,
    check_auxk_is_weighed_once,
    check_clipped_entries_move_nothing,
    check_prefixes_are_weighed_once,
    check_frozen_decoder,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_check_is_green_as_the_code_stands(check: Check) -> None:
    check()


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

    patch.setattr(selection_module, "encode_topk", wrong)


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


DEFECTS: list[tuple[Patch, Check]] = [
    (_auxk_without_encoder, check_auxk_moves_dead_features_alone),
    (_auxk_of_the_error_itself, check_auxk_moves_dead_features_alone),
    (_auxk_never_added, check_auxk_moves_dead_features_alone),
    (_auxk_weighed_twice, check_auxk_is_weighed_once),
    (_gradient_through_relu_zeros, check_clipped_entries_move_nothing),
    (_prefixes_averaged_twice, check_prefixes_are_weighed_once),
    (_gates_train_the_decoder, check_frozen_decoder),
]


@pytest.mark.parametrize(("defect", "check"), DEFECTS, ids=[defect.__name__.strip("_") for defect, _ in DEFECTS])
def test_defect_turns_its_check_red(defect: Patch, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        check()
