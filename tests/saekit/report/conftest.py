"""A small real store, and SAE, label and evaluation folders written by hand in the formats of their rooms."""

import base64
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from saekit.activations import CacheConfig, cache_activations
from saekit.evaluation.definitions import METRICS, definitions
from saekit.evaluation.record import Evaluation, EvaluationRow, FeatureMeasures, Figure, Histogram, write_evaluation
from saekit.labelling.evidence.effects import TokenEffects, effects_path
from saekit.manifest import begin_stage, finish_stage, manifest_sha256, write_json
from saekit.report import ReportRun, build_report

HOOK_POINT = "model.layers.1"
CONTEXT_LEN = 48
TEXTS = [
    "The river runs through the old town and the mill still turns.\nBelow it, nothing moves; the water is slow.",
    "In 1969 two men walked on the moon; the third one waited above, and nobody asked him what he saw.",
    "Caf\u00e9 \u4f60\u597d\u4e16\u754c \U0001f40d na\u00efve \u05e9\u05dc\u05d5\u05dd \u202eevil\u202c \u00a0end",
    "A violin has four strings, a guitar has six, and a harp has forty-seven.\tTabs\tcount too.",
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> & so on.",
    "Rain fell on the town for nine days, and then the river rose over the mill and the mill stood still.",
]
ADJECTIVES = ("old", "bright", "slow", "northern", "financial", "medieval", "lunar", "verbal")
NOUNS = ("rivers", "numbers in lists", "names of cities", "past-tense verbs", "quotations", "music terms", "dates")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[[str], Path]) -> Path:
    """A cache of a tiny model over six odd documents."""
    folder = tmp_path_factory.mktemp("report-store")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    config = CacheConfig.parse(
        {
            "model": {"name": str(tiny_model_dir("llama"))},
            "text": {"kind": "files", "paths": [str(texts)]},
            "tokens": {"context_len": CONTEXT_LEN},
            "hook_points": [HOOK_POINT],
            "num_tokens": 4000,
        }
    )
    cache_activations(config, folder / "cache")
    return folder / "cache"


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Callable[[str], Path]) -> object:
    """The tokenizer of the store's model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir("llama"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a synthetic run has."""

    num_features: int = 150
    num_dead: int = 10
    with_labels: bool = True
    with_scores: bool = True
    with_effects: bool = True
    with_evaluation: bool = True
    labelers: tuple[str, ...] = ("lexical",)
    hostile: bool = False


WriteRun = Callable[..., ReportRun]


@pytest.fixture(scope="session")
def write_run(tmp_path_factory: pytest.TempPathFactory, store: Path) -> WriteRun:
    """A function: name, **parts -> a run whose folders were written by hand."""

    def write(name: str = "topk", **parts: object) -> ReportRun:
        return write_run_into(tmp_path_factory.mktemp("run"), store, name, Parts(**parts))  # type: ignore[arg-type]

    return write


def write_run_into(folder: Path, store: Path, name: str, parts: Parts) -> ReportRun:
    """Writes train, label and evaluate folders that speak of the store at `store`."""
    from saekit.activations import ActivationStore

    rng = np.random.default_rng(len(name) + parts.num_features)
    opened = ActivationStore.open(store)
    _write_sae(folder / "sae", parts, opened.sha256)
    if parts.with_labels:
        _write_labels(folder / "labels", parts, opened, rng)
    if parts.with_evaluation:
        _write_evaluation(folder / "evaluation", parts, rng)
    return ReportRun(
        name=name,
        sae=folder / "sae",
        labels=folder / "labels" if parts.with_labels else None,
        evaluation=folder / "evaluation" if parts.with_evaluation else None,
    )


def _write_sae(folder: Path, parts: Parts, store_sha256: str) -> None:
    begin_stage(folder, "train", {"num_tokens": 100_000}, {"cache": store_sha256})
    sae = {"kind": "topk", "d_in": 32, "d_sae": parts.num_features, "k": 8}
    cfg = {"format": "saekit", "format_version": 1, "sae": sae, "hook_point": HOOK_POINT, "source": {}}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    rows = []
    for step in range(1, 41):
        share = step / 40
        rows.append(
            {"split": "train", "tokens": step * 2500, "loss": 0.9 * (1 - share) ** 2 + 0.21, "fvu": 1.1 - share * 0.8}
        )
        rows[-1] |= {"l0": 8.0, "dead_fraction": 0.4 * (1 - share), "lr": 3e-4}
        if step % 8 == 0:
            rows.append(
                {
                    "split": "test",
                    "tokens": step * 2500,
                    "loss": 0.95 - 0.7 * share,
                    "fvu": 1.12 - share * 0.8,
                    "l0": 8.0,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finish_stage(folder, {"tokens": 100_000})


def _write_labels(folder: Path, parts: Parts, store: object, rng: np.random.Generator) -> None:
    from saekit.activations import ActivationStore

    assert isinstance(store, ActivationStore)
    begin_stage(folder, "label", {"labelers": list(parts.labelers)}, {"cache": store.sha256})
    begin_stage(folder / "contexts", "contexts", {"num_top": 20}, {"cache": store.sha256})
    save_file(contexts_arrays(parts, store, rng), folder / "contexts" / "contexts.safetensors")
    finish_stage(folder / "contexts", {"num_tokens": 200_000, "features": parts.num_features})
    if parts.with_effects:
        write_effects(folder, parts, rng)
    labels, scores = label_lines(parts, rng)
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labels), encoding="utf-8")
    if parts.with_scores:
        (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores), encoding="utf-8")
    if parts.with_scores:
        write_judged(folder, parts)
    finish_stage(folder, {"labels": len(labels)})


def write_judged(folder: Path, parts: Parts) -> None:
    """Writes controls of feature 0 and the label stage's report for the labelers that are models."""
    judged = {"scorer": "detection", "judge": "judge-1", "base_rate": 0.5, "natural_rate": 0.02, "num_positive": 10}
    controls = [
        {"feature": 0, "labeler": f"control:{name}", **judged, "f1": f1, "auprc": 0.5, "num_negative": 10}
        for name, f1 in (("empty", 0.0), ("random", 0.125), ("shuffled", 0.25))
        if any(labeler != "lexical" for labeler in parts.labelers)
    ]
    (folder / "controls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in controls), encoding="utf-8")
    alive = parts.num_features - parts.num_dead
    entry = {
        "labelled": alive - 1,
        "failed": 1,
        "skipped": parts.num_dead,
        "missing": 0,
        "failed_reasons": {"no answer in 3 tries": 1},
        "failed_features": {"5": "no answer in 3 tries"},
        "skipped_features": {"never fires": f"{alive}-{parts.num_features - 1}"},
    }
    llm = {"model": "judge-1", "requests_sent": 431, "answers": 430, "input_tokens": 260_000, "output_tokens": 31_000}
    llm |= {"interrupted_requests": 1, "interrupted_cost_at_most": 0.002, "cost": 0.1534, "cost_per_feature": 0.0011}
    write_json(
        folder / "label_report.json",
        {
            "features": parts.num_features,
            "labelers": dict.fromkeys(parts.labelers, entry),
            "llm": llm if controls else None,
            "scores": [],
        },
    )


def contexts_arrays(parts: Parts, store: object, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns contexts of features 0..F-1, the last `num_dead` of which never fire."""
    F, K, S, W = parts.num_features, 20, 24, 32
    rows, length = store.num_rows, store.context_len  # type: ignore[attr-defined]
    alive = np.arange(F) < F - parts.num_dead
    max_act = np.where(alive, rng.lognormal(1.5, 0.6, F), 0).astype(np.float32)
    edges = np.geomspace(0.01, 60, 17).astype(np.float32)
    # A few features fire in fewer documents than there are places.
    used = alive[:, None] & (np.arange(K) < np.where(np.arange(F) % 7 == 3, 5, K)[:, None])
    fraction = np.sort(rng.uniform(0.4, 1, (F, K)), axis=1)[:, ::-1]
    fraction[:, 0] = 1
    arrays = _some_contexts("top", used, fraction, max_act, W, rows, length, rng)
    order = np.sort(rng.uniform(0.01, 0.99, (F, S)), axis=1)
    sampled = _some_contexts("sample", np.broadcast_to(alive[:, None], (F, S)), order, max_act, W, rows, length, rng)
    sampled["sample_stratum"] = np.where(
        sampled["sample_row"] >= 0, np.clip(np.digitize(sampled["sample_act"], edges) - 1, 0, 15), -1
    ).astype(np.int32)
    firing = np.where(alive, 10 ** rng.uniform(0.5, 4.3, F), 0).astype(np.int64)
    histogram = (firing[:, None] * rng.dirichlet(np.ones(16), F)).astype(np.int32)
    statistics = {
        "firing_count": firing,
        "max_act": max_act,
        "mean_act": (max_act * 0.3).astype(np.float32),
        "histogram": histogram,
        "position_count": histogram[:, ::-1],
        "histogram_edges": edges,
    }
    return {name: np.ascontiguousarray(array) for name, array in (arrays | sampled | statistics).items()}


def _some_contexts(
    prefix: str,
    used: np.ndarray,
    fraction: np.ndarray,
    max_act: np.ndarray,
    W: int,
    rows: int,
    length: int,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    shape = used.shape
    position = np.where(used, rng.integers(0, length, shape), -1)
    window = rng.choice([0, 0, 0, 0, 0, 0, 30, 90], (*shape, W)).astype(np.uint8)
    window[..., W // 2] = np.round(fraction * 255)
    columns = position[..., None] - W // 2 + np.arange(W)
    window[(columns < 0) | (columns >= length) | ~used[..., None]] = 0
    return {
        f"{prefix}_row": np.where(used, rng.integers(0, rows, shape), -1).astype(np.int32),
        f"{prefix}_position": position.astype(np.int32),
        f"{prefix}_act": np.where(used, fraction * max_act[:, None], 0).astype(np.float32),
        f"{prefix}_window": window,
    }


def write_effects(folder: Path, parts: Parts, rng: np.random.Generator) -> None:
    """Writes VocabProj of all features and TokenChange of every other one."""
    for kind, step in (("vocabproj", 1), ("tokenchange", 2)):
        features = np.arange(0, parts.num_features, step)
        up = np.sort(rng.uniform(0.5, 6, (len(features), 20)).astype(np.float32), axis=1)[:, ::-1]
        TokenEffects(
            kind,  # type: ignore[arg-type]
            features,
            promoted_ids=rng.integers(0, 380, up.shape),
            promoted_values=up.copy(),
            suppressed_ids=rng.integers(0, 380, up.shape),
            suppressed_values=-up.copy(),
        ).save(effects_path(folder, kind))  # type: ignore[arg-type]


def label_lines(parts: Parts, rng: np.random.Generator) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Returns lines of labels.jsonl and scores.jsonl; feature 5 failed, dead features have no label."""
    labels: list[dict[str, object]] = []
    scores: list[dict[str, object]] = []
    for labeler in parts.labelers:
        for feature in range(parts.num_features - parts.num_dead):
            if feature == 5:
                labels.append({"feature": 5, "labeler": labeler, "status": "failed", "reason": "no answer in 3 tries"})
                continue
            text = f"{ADJECTIVES[feature % 8]} {NOUNS[feature % 7]} ({labeler.split(':')[0]} {feature})"
            if parts.hostile and feature == 0:
                text = "<script>window.hacked = 3</script><img src=x onerror='window.hacked=4'>"
            labels.append(
                {
                    "feature": feature,
                    "labeler": labeler,
                    "label": text,
                    "description": f"Fires on {text}, most strongly in the middle of a sentence.",
                    "fires_on": "words that name water",
                    "promotes": "what flows",
                    "rule_tokens": [feature % 300, (feature * 7) % 300],
                    "confidence": 0.5,
                }
            )
            f1 = float(rng.beta(3, 2))
            scorer = "rule" if labeler == "lexical" else "detection"
            scores.append(
                {
                    "feature": feature,
                    "labeler": labeler,
                    "scorer": scorer,
                    "judge": None if scorer == "rule" else "judge-1",
                    "f1": f1,
                    "low": f1 * 0.8,
                    "high": min(1, f1 * 1.1),
                }
                | {"auprc": f1 * 0.9, "precision": 0.8, "recall": 0.6, "balanced_accuracy": 0.79, "base_rate": 0.004}
                | {"num_positive": 40, "num_negative": 9960}
                | (
                    {}
                    if scorer == "rule"
                    else {"f1_natural": f1 * 0.5, "auprc_natural": f1 * 0.4, "natural_rate": 0.02}
                )
            )
    return labels, scores


def _write_evaluation(folder: Path, parts: Parts, rng: np.random.Generator) -> None:
    F = parts.num_features
    begin_stage(folder, "evaluate", {"num_bootstrap": 200})
    values = {
        "fvu": 0.31,
        "l0": 8.0,
        "dead_fraction": 0.02,
        "ce": 3.4,
        "delta_ce": 0.2,
        "ce_recovered_zero": 0.97,
        "kl": 0.21,
    }
    write_evaluation(
        folder,
        Evaluation(
            hook_point=HOOK_POINT,
            rows=tuple(
                EvaluationRow(name=name, title=title, metrics=_figures(values, factor))
                for name, title, factor in (
                    ("sae", "SAE", 1.0),
                    ("mean", "mean vector", 2.1),
                    ("pca", "PCA, 8 components", 1.4),
                    ("random", "random dictionary", 1.9),
                )
            ),
            reference={"ce_clean": 3.2, "ce_zero": 11.2, "ce_mean": 7.1, "kl_zero": 8.0, "kl_mean": None},
            num_tokens=20_000,
            num_documents=31,
            num_loss_tokens=9_000,
            num_massive=12,
            num_bootstrap=200,
            density=Histogram(edges=(-4.0, -3.0, -2.0), counts=(40, 90)),
            decoder_cosine=Histogram(edges=(0.0, 0.25, 0.5, 0.75, 1.0), counts=(70, 60, 15, 5)),
            definitions=definitions(),
            features=FeatureMeasures(
                density=rng.uniform(0, 0.01, F).astype(np.float32),
                decoder_max_cosine=rng.uniform(0, 1, F).astype(np.float32),
                neighbor_indices=((np.arange(F)[:, None] + np.arange(1, 9)) % F).astype(np.int32),
                neighbor_cosines=np.sort(rng.uniform(0, 1, (F, 8)).astype(np.float32), axis=1)[:, ::-1].copy(),
            ),
        ),
    )
    finish_stage(folder, {"tokens": 20_000})
    assert manifest_sha256(folder)


def _figures(values: dict[str, float], factor: float) -> dict[str, Figure]:
    return {
        name: Figure.of(values[name] * factor, values[name] * factor * 0.97, values[name] * factor * 1.03)
        if name in values
        else Figure()
        for name in METRICS
    }


def read_payload_file(path: Path) -> dict[str, object]:
    """Returns the value that a data file hands over, having checked under which name."""
    found = re.fullmatch(r'saekit\.receive\("([^"]+)","([A-Za-z0-9+/=]*)"\);\n', path.read_text(encoding="ascii"))
    assert found is not None
    assert path.as_posix().endswith(f"data/{found[1]}.js")
    return json.loads(zlib.decompress(base64.b64decode(found[2])))  # type: ignore[no-any-return]


def unpack_array(packed: str) -> np.ndarray:
    """Returns the numbers of a packed array, flat."""
    return np.frombuffer(base64.b64decode(packed[3:]), dtype=f"<{packed[0]}{packed[1]}")


@pytest.fixture(scope="session")
def read_payload() -> Callable[[Path], dict[str, object]]:
    """The function `read_payload_file`."""
    return read_payload_file


@pytest.fixture(scope="session")
def unpack() -> Callable[[str], np.ndarray]:
    """The function `unpack_array`."""
    return unpack_array


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A report on disk and what it was built from."""

    folder: Path
    runs: tuple[ReportRun, ...]
    store: Path


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory, store: Path, write_run: WriteRun, tokenizer: object) -> Built:
    """A report of three runs: two labelers and hostile texts; the default; nothing but the SAE."""
    runs = (
        write_run("topk", labelers=("lexical", "llm:judge-1"), hostile=True),
        write_run("jumprelu", num_features=70, num_dead=3),
        write_run("bare", num_features=20, with_labels=False, with_evaluation=False),
    )
    folder = tmp_path_factory.mktemp("site") / "report"
    build_report(folder, title="A <b>report</b>", store=store, runs=runs, tokenizer=tokenizer)  # type: ignore[arg-type]
    return Built(folder=folder, runs=runs, store=store)
