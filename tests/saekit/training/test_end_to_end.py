"""Training through the model: losses and gradients of a plain forward with hooks, masks, exact resume, and bad input."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.activations import ActivationStore, PairedStore
from saekit.errors import ConfigError, StoreError
from saekit.models import LanguageModel
from saekit.sae import (
    SAE,
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaTopKConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    TranscoderConfig,
    build_sae,
)
from saekit.sae.fold import Normalization
from saekit.training import EndToEndConfig, TrainConfig, Trainer, read_metrics
from saekit.training import end_to_end as end_to_end_module
from saekit.training import loop as loop_module
from saekit.training import trainer as trainer_module
from saekit.training.end_to_end import EndToEndRun
from saekit.training.rows import TokenRowBatches

WIDTH = 32
KINDS: dict[str, SAEConfig] = {
    "topk": TopKConfig(d_in=WIDTH, d_sae=48, k=5),
    "batchtopk": BatchTopKConfig(d_in=WIDTH, d_sae=48, k=5),
    "matryoshka": MatryoshkaTopKConfig(d_in=WIDTH, d_sae=48, k=5),
    "jumprelu": JumpReLUConfig(d_in=WIDTH, d_sae=48, target_l0=5),
    "relu": ReLUConfig(d_in=WIDTH, d_sae=48, target_l0=5),
    "gated": GatedConfig(d_in=WIDTH, d_sae=48, target_l0=5),
}


@pytest.fixture(autouse=True)
def _short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured before the first step is measured on one batch."""
    monkeypatch.setattr(end_to_end_module, "MEASURED_POSITIONS", 1)
    monkeypatch.setattr(trainer_module, "SAMPLE_TOKENS", 512)


def options(kind: str = "e2e", **changes: object) -> TrainConfig:
    values: dict[str, object] = {"num_tokens": 96 * 30, "batch_size": 96, "lr": 3e-3, "objective": {"kind": kind}}
    return TrainConfig.parse(values | changes)


def normalization() -> Normalization:
    return Normalization(mean=torch.full((WIDTH,), 0.1, dtype=torch.float64), scale=0.7, total_variance=20.0)


def make_run(
    store: ActivationStore, lm: LanguageModel, config: TrainConfig, cfg: SAEConfig | None = None, sae: SAE | None = None
) -> EndToEndRun:

    train, _ = store.split(0.3)
    source = TokenRowBatches(train, batch_size=config.batch_size, seed=config.seed)
    if sae is None:
        sae = build_sae(cfg or KINDS["topk"], seed=3)
        if "threshold" in dict(sae.named_parameters()):
            sae.get_parameter("threshold").data.fill_(0.5)
    return EndToEndRun(sae, source, config, normalization=normalization(), lm=lm)


def dense_terms(run: EndToEndRun, x_hat: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """KL, cross-entropy and later layers' FVU of the next rows by a full forward with a plain hook; moves the source back."""
    position = run.source.state_dict()
    rows = run.source.next_rows()
    run.source.load_state_dict(position)
    lm, scale, mean = run.model.lm, run.normalization.scale, run.normalization.mean.float()
    layers = lm.model.get_submodule("model.layers")
    outputs: dict[str, list[Tensor]] = {"true": [], "spliced": []}

    def forward(name: str, change: Callable[[Tensor], Tensor] | None) -> Tensor:
        handles = [layers[2].register_forward_hook(lambda _, __, out: outputs[name].append(out))]
        if change is not None:
            place = lm.model.get_submodule(run.model.hook_point)
            handles.append(place.register_forward_hook(lambda _, __, out: change(out)))
        try:
            found: Tensor = lm.model(
                input_ids=rows.tokens, attention_mask=(~rows.is_padding).long(), use_cache=False
            ).logits
        finally:
            for handle in handles:
                handle.remove()
        return found

    def splice(hidden: Tensor) -> Tensor:
        flat = hidden[rows.is_replaced]
        new = x_hat((flat - mean) * scale) / scale + mean
        return hidden.masked_scatter(rows.is_replaced[..., None], new)

    with torch.no_grad():
        true = forward("true", None)
    spliced = forward("spliced", splice)
    log_p, log_q = true.log_softmax(-1), spliced.log_softmax(-1)
    at = [(r, t) for r in range(len(rows.tokens)) for t in range(rows.tokens.shape[1]) if rows.is_counted[r, t]]
    kl = sum((log_p[r, t].exp() * (log_p[r, t] - log_q[r, t])).sum() for r, t in at) / len(at)
    ce = -sum(log_q[r, t, rows.tokens[r, t + 1]] for r, t in at) / len(at)
    error = (outputs["spliced"][0] - outputs["true"][0])[rows.is_replaced]
    return kl, ce, error.square().sum(1).mean()  # type: ignore[return-value]  # sums of tensors


@pytest.mark.parametrize("micro", [None, 48], ids=["whole", "parts"])
@pytest.mark.parametrize("cfg", [pytest.param(cfg, id=kind) for kind, cfg in KINDS.items() if kind != "matryoshka"])
def test_gradient_is_that_of_a_plain_forward_with_a_hook(
    padded: ActivationStore, lm: LanguageModel, cfg: SAEConfig, micro: int | None
) -> None:
    objective = {"kind": "e2e_downstream", "kl_weight": 1.5, "ce_weight": 0.25, "downstream_weight": 0.5}
    run = make_run(padded, lm, options(objective=objective, micro_batch_size=micro), cfg)
    nothing = torch.empty(0, dtype=torch.int64)

    def x_hat(x: Tensor) -> Tensor:
        # Every architecture's code as the objective selects it, dense from there on.
        code = run.objective.encode(run.sae.encoder_input(x))
        row = (
            torch.arange(len(x)).repeat_interleave(code.values.shape[1])
            if code.offsets is None
            else torch.arange(len(x)).repeat_interleave(code.offsets.diff())
        )
        flat = row * run.sae.d_sae + code.indices.flatten()
        dense = torch.zeros(len(x) * run.sae.d_sae).index_add(0, flat, code.values.flatten())
        return dense.view(len(x), -1) @ run.sae.W_dec + run.sae.b_dec

    kl, ce, later = dense_terms(run, x_hat)
    expected_loss = 1.5 * kl + 0.25 * ce + 0.5 * later / run._later_variances[0]
    expected = torch.autograd.grad(expected_loss, list(run.parameters.values()), allow_unused=True)
    # The penalties of an architecture are tested with it: with a coefficient of 0 only Gated's own term is left.
    found = run.add_gradients(nothing, 0.0)
    torch.testing.assert_close(found.terms["kl"].float(), kl.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.terms["ce"].float(), ce.detach(), rtol=1e-4, atol=1e-5)
    if isinstance(cfg, GatedConfig):
        return
    torch.testing.assert_close(found.result.loss.float(), expected_loss.detach().float(), rtol=1e-4, atol=1e-5)
    for (name, parameter), gradient in zip(run.parameters.items(), expected, strict=True):
        if gradient is not None and parameter.grad is not None:
            assert gradient.norm() > 1e-6, name
            torch.testing.assert_close(parameter.grad, gradient, rtol=2e-3, atol=1e-5, msg=name)
        else:
            assert gradient is None or not gradient.any(), name


def test_any_place_of_the_model_can_be_spliced(padded: ActivationStore, lm: LanguageModel) -> None:
    """An MLP's output has no layers before it that could be left out."""
    run = make_run(ActivationStore.open(padded.path, "model.layers.1.mlp"), lm, options())
    kl, _, _ = dense_terms(run, lambda x: run.sae(x).x_hat)
    expected = torch.autograd.grad(kl, [run.sae.W_enc, run.sae.W_dec])
    found = run.add_gradients(torch.empty(0, dtype=torch.int64), 0.0)
    torch.testing.assert_close(found.result.loss, kl.detach(), rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip((run.sae.W_enc, run.sae.W_dec), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-3, atol=1e-5)


def perfect_sae() -> SAE:
    """Two features for each axis, +e and -e: every token is reconstructed exactly."""
    sae = build_sae(TopKConfig(d_in=WIDTH, d_sae=2 * WIDTH, k=WIDTH))
    axes = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    with torch.no_grad():
        sae.W_dec.copy_(axes)
        sae.W_enc.copy_(axes.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def test_perfect_reconstruction_has_no_kl_and_no_gradient(padded: ActivationStore, lm: LanguageModel) -> None:
    run = make_run(padded, lm, options("e2e_downstream"), sae=perfect_sae())
    found = run.add_gradients(torch.empty(0, dtype=torch.int64), 0.0)
    assert float(found.result.fvu) < 1e-10
    assert abs(float(found.terms["kl"])) < 1e-6
    assert float(found.terms["downstream"]) < 1e-9
    for name, parameter in run.parameters.items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() < 1e-3, name
    other = make_run(padded, lm, options("e2e_downstream"))
    other.add_gradients(torch.empty(0, dtype=torch.int64), 0.0)
    assert other.sae.W_dec.grad is not None
    assert other.sae.W_dec.grad.abs().max() > 1e-2


def test_cross_entropy_is_the_models_own_where_nothing_is_changed(padded: ActivationStore, lm: LanguageModel) -> None:
    run = make_run(
        padded, lm, options(objective={"kind": "e2e", "kl_weight": 0.0, "ce_weight": 1.0}), sae=perfect_sae()
    )
    position = run.source.state_dict()
    rows = run.source.next_rows()
    run.source.load_state_dict(position)
    with torch.no_grad():
        logits = lm.model(input_ids=rows.tokens, attention_mask=(~rows.is_padding).long(), use_cache=False).logits
    next_tokens = rows.tokens.roll(-1, 1)[rows.is_counted]
    expected = torch.nn.functional.cross_entropy(logits[rows.is_counted], next_tokens)
    found = run.add_gradients(torch.empty(0, dtype=torch.int64), 0.0)
    assert float(found.result.loss) == pytest.approx(float(expected), rel=1e-4)


def test_special_and_padding_positions_keep_their_activations(padded: ActivationStore, lm: LanguageModel) -> None:
    run = make_run(padded, lm, options())
    rows = run.source.next_rows()
    x = torch.randn(int(rows.is_replaced.sum()), WIDTH)
    seen: list[Tensor] = []
    handle = lm.model.get_submodule("model.layers.2").register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        run.model.predict(rows, x)
    finally:
        handle.remove()
    torch.testing.assert_close(seen[0][rows.is_replaced], x)
    torch.testing.assert_close(seen[0][~rows.is_replaced], rows.hidden[~rows.is_replaced])


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_run_goes_on_bit_for_bit(padded: ActivationStore, lm: LanguageModel, kind: str) -> None:
    config = options("kl_finetune", micro_batch_size=48, dead_after_tokens=192)
    run, other = (make_run(padded, lm, config, KINDS[kind]) for _ in range(2))
    for _ in range(3):
        run.train_step()
    file = io.BytesIO()
    torch.save({"run": run.state_dict(), "source": run.source.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["run"])
    other.source.load_state_dict(state["source"])
    for _ in range(2):
        assert other.train_step() == run.train_step()
    for name, value in run.sae.state_dict().items():
        assert torch.equal(other.sae.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["e2e", "e2e_downstream", "kl_finetune"])
def test_training_lowers_the_kl_and_a_killed_one_ends_at_the_same_bytes(
    padded: ActivationStore, lm: LanguageModel, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = padded.split(0.3)
    config = options(kind, checkpoint_every_tokens=96 * 20, eval_tokens=128)

    def fit(out: Path) -> None:
        Trainer(build_sae(KINDS["topk"], seed=3), train, config, test=test, lm=lm).fit(out)

    fit(tmp_path / "whole")
    rows = [row for row in read_metrics(tmp_path / "whole") if row["split"] == "train"]
    first, last = (sum(float(str(row["kl"])) for row in part) for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first
    assert (float(str(rows[0]["downstream"])) > 0) == (kind == "e2e_downstream")
    save = loop_module.TrainingLoop.save

    def save_then_fail(self: loop_module.TrainingLoop) -> None:
        save(self)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(loop_module.TrainingLoop, "save", save_then_fail)
        fit(tmp_path / "cut")
    fit(tmp_path / "cut")
    one, other = ((tmp_path / name / "sae.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other


def test_weight_of_the_kl_makes_it_as_large_as_the_reconstruction(padded: ActivationStore, lm: LanguageModel) -> None:
    run = make_run(padded, lm, options("kl_finetune"))
    position = run.source.state_dict()
    found = run.add_gradients(torch.empty(0, dtype=torch.int64), 0.0)
    assert run.kl_weight * float(found.terms["kl"]) == pytest.approx(float(found.result.fvu), rel=1e-3)
    expected = run.kl_weight * float(found.terms["kl"]) + float(found.result.fvu)
    assert float(found.result.loss) == pytest.approx(expected, rel=1e-4)
    run.source.load_state_dict(position)
    for _ in range(2):
        figures = run.train_step()
        assert run.kl_weight == figures.fvu / figures.terms["kl"]
    for given, expected in (({"kind": "e2e"}, 1.0), ({"kind": "kl_finetune", "kl_weight": 0.3}, 0.3)):
        fixed = make_run(padded, lm, options(objective=given))
        fixed.train_step()
        assert fixed.kl_weight == expected


def test_gradients_of_two_processes_have_the_mean_of_one(
    padded: ActivationStore, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have different numbers of tokens: each process weighs its own by the tokens of both."""
    nothing = torch.empty(0, dtype=torch.int64)
    config = options(objective={"kind": "kl_finetune", "kl_weight": 1.0, "ce_weight": 0.5})
    whole, *shares = (make_run(padded, lm, config) for _ in range(3))
    rows = whole.source.next_rows()
    whole.source.load_state_dict(shares[0].source.state_dict())
    expected = whole.add_gradients(nothing, 0.0)
    counts = (float(rows.is_replaced.sum()) / 2, float(rows.is_counted.sum()) / 2)
    found = []
    for rank, run in enumerate(shares):
        run.source = TokenRowBatches(run.source.view, batch_size=96, seed=config.seed, rank=rank, world_size=2)
        monkeypatch.setattr(run, "_counts", lambda rows: counts)
        found.append(run.add_gradients(nothing, 0.0))
    assert len(found[0].raw) != len(found[1].raw)
    for name in ("kl", "ce"):
        torch.testing.assert_close((found[0].terms[name] + found[1].terms[name]) / 2, expected.terms[name])
    torch.testing.assert_close((found[0].result.loss + found[1].result.loss) / 2, expected.result.loss)
    for name, parameter in whole.parameters.items():
        mean = sum(run.parameters[name].grad for run in shares) / 2  # type: ignore[misc]  # there are some
        torch.testing.assert_close(mean, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_bad_input_is_one_line(
    padded: ActivationStore, lm: LanguageModel, store: ActivationStore, tmp_path: Path
) -> None:
    train, _ = padded.split(0.3)
    sae = build_sae(KINDS["topk"])
    pairs = PairedStore(padded, ActivationStore.open(padded.path, "model.layers.1.mlp"))
    transcoder = build_sae(TranscoderConfig(d_in=WIDTH, d_out=WIDTH, d_sae=48, k=4))

    class Stream:
        d_in = WIDTH

    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Trainer(sae, train, options()), "objective 'e2e': no language model, needs the one .* pass lm="),
        (lambda: Trainer(sae, Stream(), options(), lm=lm), "found a Stream, needs a view of a store"),  # type: ignore[arg-type]
        (lambda: Trainer(transcoder, pairs.split(0.3)[0], options(), lm=lm), "found a transcoder, needs an SAE"),
        (
            lambda: Trainer(sae, train, options(batch_size=100), lm=lm).fit(tmp_path),
            "batch_size 100, needs a multiple of 24",
        ),
        (
            lambda: options(objective={"kind": "e2e", "kl_weight": 0}),
            "kl_weight and ce_weight are 0, needs one of them",
        ),
        (lambda: options("end2end"), "objective.kind: found 'end2end'"),
        (
            lambda: make_run(padded, lm, options(micro_batch_size=10)),
            "micro_batch_size 10, needs at least one row of 24",
        ),
    ]
    for make, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="use the same model, revision and dtype"):
        Trainer(sae, store.split(0.3)[0], options(batch_size=64), lm=lm)
    assert EndToEndConfig(kind="e2e").kl_weight is None
