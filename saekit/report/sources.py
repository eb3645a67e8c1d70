"""What the report reads: the folders of the other stages, each opened once and checked against each other."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saekit.errors import FormatError, StoreError
from saekit.evaluation import Evaluation, read_evaluation
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.evidence.effects import EffectKind, TokenEffects, effects_path
from saekit.labelling.records import Label, Score
from saekit.labelling.runreport import LABEL_REPORT_NAME
from saekit.labelling.store import read_controls, read_labels, read_scores
from saekit.manifest import Manifest, manifest_sha256, read_manifest

__all__ = ["ReportRun", "RunSource", "read_run", "run_inputs"]

EFFECT_KINDS: tuple[EffectKind, ...] = ("vocabproj", "tokenchange")
CONTEXTS_FOLDER = "contexts"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRun:
    """One dictionary of a report and the folders that speak of it."""

    name: str
    """Shown in the switcher and in links."""
    sae: Path
    """Folder of the trained SAE."""
    labels: Path | None = None
    """Folder of the label stage; None where nothing was labelled."""
    evaluation: Path | None = None
    """Folder of the evaluate stage; None where nothing was evaluated."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunSource:
    """Everything that is known of one dictionary."""

    name: str
    architecture: Mapping[str, object]
    """The SAE's own config: kind, d_in, d_sae, k, ..."""
    hook_point: str | None
    curves: list[dict[str, object]]
    """Rows of metrics.jsonl."""
    contexts: FeatureContexts | None
    effects: dict[EffectKind, TokenEffects]
    labels: dict[tuple[int, str], Label]
    """(feature, labeler) -> label."""
    scores: dict[tuple[int, str, str], Score]
    """(feature, labeler, scorer) -> score."""
    evaluation: Evaluation | None
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Stage -> manifest of its folder."""
    controls: list[Score] = field(default_factory=list)
    """Scores of what stood in labels' places."""
    outcome: Mapping[str, object] = field(default_factory=dict)
    """The label stage's own report; empty where it wrote none."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(str(self.architecture["d_sae"]))

    @property
    def labelers(self) -> list[str]:
        """Everyone who labelled: language models first, then by name."""
        names = {labeler for _, labeler in self.labels} | {labeler for _, labeler, _ in self.scores}
        return sorted(names, key=lambda name: (not name.startswith("llm:"), name))

    @property
    def density(self) -> NDArray[np.float64] | None:
        """Share of tokens on which each feature fires [F]: of the tokens scanned for contexts, else of the evaluated ones."""
        if self.contexts is not None:
            return self.contexts.density
        if self.evaluation is not None and self.evaluation.features is not None:
            return self.evaluation.features.density.astype(np.float64)
        return None


def run_inputs(run: ReportRun) -> dict[str, str]:
    """Returns the identity of each of the run's folders.

    Raises:
        StoreError: one of them is missing or unfinished.
    """
    folders = {"train": run.sae, "label": run.labels, "evaluate": run.evaluation}
    return {f"{stage}/{run.name}": manifest_sha256(folder) for stage, folder in folders.items() if folder is not None}


def read_run(run: ReportRun, *, store_sha256: str) -> RunSource:
    """Reads everything that is there of one run.

    Raises:
        StoreError: a folder is missing, unfinished, or made from another activation store.
        FormatError: a file does not hold what it should, or speaks of another number of features.
    """
    run_inputs(run)
    header = _read_json(run.sae / "cfg.json")
    architecture = header.get("sae")
    if not isinstance(architecture, dict) or not isinstance(architecture.get("d_sae"), int):
        raise FormatError(f"{str(run.sae / 'cfg.json')!r}: no sae.d_sae, needs a folder that training wrote")
    hook_point = header.get("hook_point")
    contexts_folder = None if run.labels is None else run.labels / CONTEXTS_FOLDER
    has_contexts = contexts_folder is not None and contexts_folder.is_dir()
    source = RunSource(
        name=run.name,
        architecture=architecture,
        hook_point=hook_point if isinstance(hook_point, str) else None,
        curves=_read_curves(run.sae / "metrics.jsonl"),
        contexts=FeatureContexts.open(contexts_folder) if contexts_folder is not None and has_contexts else None,
        effects={} if run.labels is None else _read_effects(run.labels),
        labels={} if run.labels is None else {(item.feature, item.labeler): item for item in read_labels(run.labels)},
        scores={}
        if run.labels is None
        else {(item.feature, item.labeler, item.scorer): item for item in read_scores(run.labels)},
        evaluation=None if run.evaluation is None else read_evaluation(run.evaluation),
        manifests=_read_manifests(run),
        controls=[] if run.labels is None else read_controls(run.labels),
        outcome=_read_outcome(run.labels),
    )
    _check_store(source, store_sha256)
    _check_sizes(source)
    return source


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{str(path)!r}: no such file, needs the folder of a trained SAE") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{str(path)!r}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{str(path)!r}: holds a {type(value).__name__}, needs a JSON object")
    return value


def _read_outcome(labels: Path | None) -> dict[str, object]:
    path = None if labels is None else labels / LABEL_REPORT_NAME
    return _read_json(path) if path is not None and path.is_file() else {}


def _read_curves(path: Path) -> list[dict[str, object]]:
    """Returns the rows of metrics.jsonl; none where there is no such file (a converted SAE was not trained here)."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{str(path)!r}: line {number} is not JSON, needs one object a line") from error
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_effects(folder: Path) -> dict[EffectKind, TokenEffects]:
    paths = {kind: effects_path(folder, kind) for kind in EFFECT_KINDS}
    return {kind: TokenEffects.open(path) for kind, path in paths.items() if path.is_file()}


def _read_manifests(run: ReportRun) -> dict[str, Manifest]:
    folders = {
        "train": run.sae,
        "contexts": None if run.labels is None else run.labels / CONTEXTS_FOLDER,
        "label": run.labels,
        "evaluate": run.evaluation,
    }
    found = {stage: read_manifest(folder) for stage, folder in folders.items() if folder is not None}
    return {stage: manifest for stage, manifest in found.items() if manifest is not None}


def _check_store(source: RunSource, store_sha256: str) -> None:
    for stage, manifest in source.manifests.items():
        made_from = manifest.inputs.get("cache")
        if made_from is not None and made_from != store_sha256:
            raise StoreError(
                f"run {source.name!r}: its {stage} folder was made from another activation store"
                f" ({made_from[:12]}), needs the store of this report ({store_sha256[:12]})"
            )


def _check_sizes(source: RunSource) -> None:
    sizes = {}
    if source.contexts is not None:
        sizes["contexts"] = source.contexts.num_features
    if source.evaluation is not None and source.evaluation.features is not None:
        sizes["evaluation"] = len(source.evaluation.features.density)
    for name, size in sizes.items():
        if size != source.d_sae:
            raise FormatError(
                f"run {source.name!r}: its {name} speak of {size} features, the SAE has {source.d_sae};"
                " give folders of one SAE"
            )
    spoken_of = [feature for feature, _ in source.labels] + [feature for feature, _, _ in source.scores]
    spoken_of += [score.feature for score in source.controls]
    spoken_of += [int(effects.features.max()) for effects in source.effects.values() if len(effects.features)]
    if spoken_of and max(spoken_of) >= source.d_sae:
        raise FormatError(
            f"run {source.name!r}: its labels speak of feature {max(spoken_of)}, the SAE has {source.d_sae};"
            " give folders of one SAE"
        )
