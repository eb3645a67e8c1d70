"""Scores labels that are there already, also those of other programs, by other scorers or another judge; explains nothing."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from saekit.activations import StoreView
from saekit.errors import ConfigError
from saekit.labelling.chat import ChatClient
from saekit.labelling.collect import sae_fingerprint
from saekit.labelling.estimate import LLMEstimate
from saekit.labelling.foreign import read_foreign_labels
from saekit.labelling.labelconfig import LabelConfig
from saekit.labelling.records import Label
from saekit.labelling.scorestage import ScoreStage
from saekit.labelling.scoring.embedding import Embed
from saekit.labelling.store import LABELS_NAME, RecordFile
from saekit.manifest import begin_stage, finish_stage, locked, read_manifest
from saekit.models import LanguageModel
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE

__all__ = ["estimate_scores", "score_labels"]


def score_labels(
    sae: SAE,
    test: StoreView,
    *,
    lm: LanguageModel,
    out: str | Path,
    config: LabelConfig,
    labels: str | Path | None = None,
    labelers: Sequence[str] | None = None,
    client: ChatClient | None = None,
    embed: Embed | None = None,
    retry_failed: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Path:
    """Scores labels; scores of the same judge on the same texts are there already and cost nothing.

    Args:
        sae: the dictionary that is labelled.
        test: documents that no labeler has seen. Those behind labels of other programs are not known.
        lm: the model whose activations the view holds.
        out: the folder of a label run of this dictionary, or a new one for labels of another program.
        config: judge and scorers are those of `config.llm`, `config.embedding` and `config.rule_scoring`.
        labels: a file of labels of another program, see `read_foreign_labels`; they are taken into `out`.
        labelers: whose labels are scored; None: all but the lexical one, which is where there is no other or with `llm.judge_lexical`.
        client, embed: see `label_features`.
        retry_failed: labels that the judge gave no usable answer about are judged anew; the cost stays counted.
        progress: told of every part.

    Returns:
        `out`: with scores.jsonl, controls.jsonl, label_report.json and labels.parquet brought up to date.

    Raises:
        ConfigError: no judge in `config`, no such labels, or `out` is of another dictionary or other documents.
        LabelerError: the judge cannot be used, or a cap is reached; what was paid for is kept.
    """
    out = Path(out)
    found = _found(sae, out, labels, progress)
    _check_asked(config, found, labelers, embed)
    _claim(sae, test, lm, out)
    with locked(out):
        scoring = ScoreStage.open(sae, test, lm=lm, out=out, config=config, labelers=labelers, progress=progress)
        scoring.take_in(found)
        if retry_failed:
            scoring.forget_unanswered()
        scoring.run(client, embed)
        manifest = read_manifest(out)
        if manifest is not None and manifest.stage == "score":
            finish_stage(out, {"labels": len(scoring.labels.records), "scores": len(scoring.scores.records)})
    return out


def estimate_scores(
    sae: SAE,
    test: StoreView,
    *,
    lm: LanguageModel,
    out: str | Path,
    config: LabelConfig,
    labels: str | Path | None = None,
    labelers: Sequence[str] | None = None,
    progress: Progress = NO_PROGRESS,
) -> LLMEstimate:
    """Returns what `score_labels` would ask of judge and embedding; sends nothing.

    Steered texts that scorers ask about are written to `out` on the way and are there for the run itself; nothing else is.

    Raises:
        ConfigError: as `score_labels`.
    """
    out = Path(out)
    found = _found(sae, out, labels, progress)
    _check_asked(config, found, labelers, None)
    _check_folder(sae, test, lm, out)
    is_steered = config.llm is not None and {"output", "intervention"} & set(config.llm.scorers)
    with locked(out) if is_steered else contextlib.nullcontext():
        return ScoreStage.open(sae, test, lm=lm, out=out, config=config, labelers=labelers, progress=progress).estimate(
            found
        )


def _found(sae: SAE, out: Path, labels: str | Path | None, progress: Progress) -> list[Label]:
    """Returns the labels of the folder, those of the file in place of older ones of their labelers."""
    known = RecordFile(out / LABELS_NAME, Label).records
    given = [] if labels is None else read_foreign_labels(labels, num_features=sae.cfg.d_sae, progress=progress)
    keys = {(label.feature, label.labeler) for label in given}
    return [*(label for label in known if (label.feature, label.labeler) not in keys), *given]


def _check_asked(
    config: LabelConfig, labels: Sequence[Label], labelers: Sequence[str] | None, embed: Embed | None
) -> None:
    if config.llm is None and config.embedding is None:
        raise ConfigError("score: no judge, needs a table [label.llm] with a model, or [label.embedding]")
    if embed is not None and config.embedding is None:
        raise ConfigError("score: found a callable `embed` and no config.embedding, needs one with the model's name")
    there = sorted({label.labeler for label in labels if label.status == "done"})
    if not there:
        raise ConfigError("score: no labels, needs a folder that 'saekit label' has written, or a file of labels")
    missing = [name for name in labelers or () if name not in there]
    if missing:
        raise ConfigError(f"score: no labels of {missing[0]!r}, there are those of {', '.join(there)}")


def _inputs(sae: SAE, test: StoreView, lm: LanguageModel) -> dict[str, str]:
    return {
        "cache": test.store.sha256,
        "sae": sae_fingerprint(sae),
        "model": lm.fingerprint,
        "test": test.fingerprint,
    }


def _check_folder(sae: SAE, test: StoreView, lm: LanguageModel, out: Path) -> dict[str, str]:
    test.store.check_model(lm)
    given, manifest = _inputs(sae, test, lm), read_manifest(out)
    if manifest is not None:
        changed = [name for name, value in given.items() if manifest.inputs.get(name) != value]
        if changed or manifest.stage not in {"label", "score"}:
            found = (
                f"holds stage {manifest.stage!r}" if not changed else f"was written with another {', '.join(changed)}"
            )
            raise ConfigError(
                f"{str(out)!r}: {found}, needs the folder of labels of this dictionary and these documents"
            )
    return given


def _claim(sae: SAE, test: StoreView, lm: LanguageModel, out: Path) -> None:
    given = _check_folder(sae, test, lm, out)
    if read_manifest(out) is None:
        begin_stage(out, "score", {}, given)
