"""Resampling: silent features fire afterwards and nothing is left of their past; the defects of others turn the check red."""

import importlib.util
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from saekit.sae import BatchTopKConfig, GatedConfig, JumpReLUConfig, ReLUConfig, SAEConfig, TopKConfig, build_sae
from saekit.training import ResampleConfig, TrainConfig
from saekit.training import resample as resample_module
from saekit.training import run as run_module
from saekit.training.average import WeightAverage
from saekit.training.features import PER_FEATURE, by_feature
from saekit.training.resample import draw_inputs, is_due, largest
from saekit.training.run import TrainRun
from saekit.training.schedule_free import ScheduleFreeSignum
from saekit.training.start import estimate_normalization, read_sample

SHAPE: dict[str, object] = {"d_in": 16, "d_sae": 40}
CONFIGS: dict[str, SAEConfig] = {
    "topk": TopKConfig.parse(SHAPE | {"k": 3}),
    "batchtopk": BatchTopKConfig.parse(SHAPE | {"k": 3}),
    "jumprelu": JumpReLUConfig.parse(SHAPE | {"target_l0": 3}),
    "relu": ReLUConfig.parse(SHAPE | {"target_l0": 3}),
    "gated": GatedConfig.parse(SHAPE | {"target_l0": 3}),
}
RESAMPLE = {"every_tokens": 4 * 96, "silent_tokens": 3 * 96, "sample_tokens": 10 * 96, "encoder_norm": 1.0}
SILENT = [1, 7, 30]
OPTIMIZERS = [
    "adam",
    pytest.param(
        "adamw8bit",
        marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra lowbit"),
    ),
    "muon",
    "signum",
]


def make_run(planted: ModuleType, kind: str = "topk", **changes: object) -> TrainRun:

    values: dict[str, object] = {"num_tokens": 200 * 96, "batch_size": 96, "lr": 1e-3, "resample": RESAMPLE}
    config = TrainConfig.parse(values | changes)
    source = planted.PlantedSource(batch_size=96)
    normalization = estimate_normalization(read_sample(source, 2048))
    sae = build_sae(CONFIGS[kind], seed=3)
    if "threshold" in dict(sae.named_parameters()):
        sae.get_parameter("threshold").data.fill_(0.3)
    return TrainRun(sae, source, config, normalization=normalization)


def check_resampling(run: TrainRun) -> None:
    """After the fourth step the silent features are inputs, active on them, and no state of theirs is left."""
    assert run.train_step().resampled == 0
    # They have moments from the first step, in which they could fire.
    assert all(by_feature("W_enc", run.parameters["W_enc"].grad)[SILENT].any(1))  # type: ignore[arg-type]  # there is one
    run.sae.b_enc.data[SILENT] = -1e6
    if isinstance(run.optimizer, ScheduleFreeSignum):
        for value in run.optimizer.state[run.sae.b_enc].values():
            value[SILENT] = -1e6
    for _ in range(2):
        assert run.train_step().resampled == 0
    copies: dict[str, Tensor] = {}
    draw_features = resample_module.renew_features

    def note(*args: object, **options: object) -> None:
        copies.update({name: value.detach().clone() for name, value in run.parameters.items()})
        draw_features(*args, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample_module, "renew_features", note)
        figures = run.train_step()
    assert figures.resampled >= len(SILENT)
    changed = (by_feature("W_enc", run.parameters["W_enc"].data) != copies["W_enc"].T).any(1)
    assert changed[SILENT].all()
    assert int(changed.sum()) == figures.resampled

    for name, value in run.parameters.items():
        if name not in PER_FEATURE:
            assert torch.equal(value, copies[name]), name
            continue
        assert torch.equal(by_feature(name, value)[~changed], by_feature(name, copies[name])[~changed]), name
    W_enc, W_dec = run.parameters["W_enc"].data.T, run.parameters["W_dec"].data
    assert not run.parameters["b_enc"][SILENT].any()
    torch.testing.assert_close(W_enc[SILENT].norm(dim=1), W_enc[~changed].norm(dim=1).mean().expand(3))
    if run.objective.has_projected_decoder:
        torch.testing.assert_close(W_dec[SILENT].norm(dim=1), torch.ones(3))

    x = run.normalization.apply(read_sample(run.source, 10 * 96))
    directions = torch.nn.functional.normalize(run.sae.encoder_input(x), dim=1)
    cosines = torch.nn.functional.normalize(W_dec[SILENT], dim=1) @ directions.T
    torch.testing.assert_close(cosines.max(1).values, torch.ones(3))
    acts = run.sae.encode(x[cosines.argmax(1)])
    assert (acts[torch.arange(3), torch.tensor(SILENT)] > 0).all()

    assert not run.dead.silent_tokens[SILENT].any()
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in run.optimizer.state[parameter].items():
                if group["name"] in PER_FEATURE and isinstance(value, Tensor) and value.shape == parameter.shape:
                    rows = by_feature(group["name"], value)
                    weights = by_feature(group["name"], parameter.data)[SILENT]
                    expected = weights if isinstance(run.optimizer, ScheduleFreeSignum) else torch.zeros_like(weights)
                    assert torch.equal(rows[SILENT], expected), (group["name"], key)
                    assert rows[~changed].any(), (group["name"], key)
    for name, value in run.average.state_dict()["ema"].items():  # type: ignore[attr-defined]
        if name in PER_FEATURE:
            rows, weights = by_feature(name, value)[SILENT], by_feature(name, run.parameters[name].data)[SILENT]
            assert torch.equal(rows, weights), name
    run.train_step()
    assert not run.dead.silent_tokens[SILENT].all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_silent_features_fire_after_resampling_and_their_past_is_gone(planted: ModuleType, kind: str) -> None:
    check_resampling(make_run(planted, kind, ema_decay=0.9))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_of_every_optimizer_is_reset(planted: ModuleType, optimizer: str) -> None:
    check_resampling(make_run(planted, optimizer=optimizer, micro_batch_size=40))


def _nothing(*args: object, **options: object) -> None: ...


def _moments_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resample_module, "clear_optimizer", _nothing)


def _averages_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WeightAverage, "restart", _nothing)


def _written_into_a_copy(patch: pytest.MonkeyPatch) -> None:
    right = resample_module.by_feature
    patch.setattr(resample_module, "by_feature", lambda name, value: right(name, value).clone())


def _counters_stay(patch: pytest.MonkeyPatch) -> None:
    right = run_module.resample_features

    def wrong(run: TrainRun) -> int:
        before = run.dead.silent_tokens.clone()
        count = right(run)
        run.dead.silent_tokens.copy_(before)
        return count

    patch.setattr(run_module, "resample_features", wrong)


def _biases_stay(patch: pytest.MonkeyPatch) -> None:
    right = resample_module.renew_features

    def wrong(objective: object, features: Tensor, draw: object, *, encoder_norm: float) -> None:
        sae = objective.sae  # type: ignore[attr-defined]
        before = sae.b_enc.data.clone()
        right(objective, features, draw, encoder_norm=encoder_norm)  # type: ignore[arg-type]
        sae.b_enc.data.copy_(before)

    patch.setattr(resample_module, "renew_features", wrong)


@pytest.mark.parametrize(
    "defect",
    [_moments_stay, _averages_stay, _written_into_a_copy, _counters_stay, _biases_stay],
    ids=lambda f: f.__name__,
)
def test_defect_of_resampling_would_be_seen(
    planted: ModuleType, defect: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        check_resampling(make_run(planted, ema_decay=0.9))


def test_inputs_are_drawn_by_their_squared_loss(planted: ModuleType) -> None:
    """Of a tenth of the tokens with three times the error, 81 times the squared loss, come nine in ten of the inputs."""
    run = make_run(planted)
    run.sae.W_enc.data.zero_()
    run.sae.b_enc.data.fill_(-1.0)
    run.sae.b_dec.data.zero_()

    class TwoSizes:
        d_in = 16
        position = 0

        def next_batch(self) -> Tensor:
            generator = torch.Generator().manual_seed(self.position)
            self.position += 1
            rows = torch.nn.functional.normalize(torch.randn(100, 16, generator=generator), dim=1)
            rows[:10] *= 3.0
            return rows / run.normalization.scale + run.normalization.mean.float()

        def state_dict(self) -> dict[str, object]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, object]) -> None:
            self.position = int(str(state["position"]))

    source = TwoSizes()
    keys, draw = draw_inputs(run.sae, source, run.normalization, 200, num_batches=200, seed=5)
    assert source.position == 0
    share = float((draw.inputs.norm(dim=1) > 2).double().mean())
    assert share == pytest.approx(0.1 * 81 / (0.1 * 81 + 0.9), abs=0.06)
    assert len(draw.inputs.unique(dim=0)) == 200
    assert (keys.diff() <= 0).all()


def test_the_draw_is_that_of_one_process_however_many_there_are(planted: ModuleType) -> None:
    run = make_run(planted)
    options = {"num_batches": 6, "seed": 9}
    keys, draw = draw_inputs(run.sae, planted.PlantedSource(batch_size=96), run.normalization, 12, **options)
    parts = [
        draw_inputs(
            run.sae,
            planted.PlantedSource(batch_size=96, rank=rank, world_size=2),
            run.normalization,
            12,
            shares=lambda count, rank=rank: (rank * count, 2 * count),
            **options,
        )
        for rank in (0, 1)
    ]
    joined = resample_module.Draw(*(torch.cat(pair) for pair in zip(*(part[1] for part in parts), strict=True)))
    found_keys, found = largest(torch.cat([part[0] for part in parts]), joined, 12)
    torch.testing.assert_close(found_keys, keys)
    torch.testing.assert_close(found.inputs, draw.inputs)


def test_fewer_inputs_than_silent_features_renew_some(planted: ModuleType) -> None:
    run = make_run(planted, resample=RESAMPLE | {"sample_tokens": 96})
    run.sae.b_enc.data.fill_(-1e6)
    run.source = planted.PlantedSource(batch_size=24)
    for _ in range(3):
        run.train_step()
    assert run.train_step().resampled == 24


def test_resampling_is_due_at_even_distances_in_the_first_part() -> None:
    config = TrainConfig(num_tokens=160_000, batch_size=1000, resample=ResampleConfig())
    assert [step for step in range(1, 161) if is_due(config, step)] == [20, 40, 60, 80]
    assert not any(is_due(TrainConfig(num_tokens=160_000, batch_size=1000), step) for step in range(1, 161))
