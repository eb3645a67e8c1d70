"""The revive stage's door: tries features that the corpus does not make fire, or says what that would cost."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saekit.activations import StoreView
from saekit.errors import ConfigError
from saekit.labelling.chat import ChatClient
from saekit.labelling.collect import collect_contexts, sae_fingerprint
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.label import CONTEXTS_FOLDER, make_client
from saekit.labelling.labelconfig import LabelConfig
from saekit.labelling.records import Label
from saekit.labelling.revival.config import ReviveConfig
from saekit.labelling.revival.estimate import RevivalEstimate, estimate_questions
from saekit.labelling.revival.record import Revival
from saekit.labelling.revival.stage import REVIVALS_NAME, RevivalStage
from saekit.labelling.store import LABELS_NAME, RecordFile
from saekit.labelling.vocabulary import Vocabulary
from saekit.manifest import begin_stage, finish_stage, locked
from saekit.models import LanguageModel
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE

__all__ = ["estimate_revival", "read_revivals", "revive_features"]

LABEL_KEYS = ("contexts", "labelers", "llm", "num_effect_tokens", "token_change", "vocab_projection")
"""What of the labelling config shows in the result."""


def revive_features(
    sae: SAE,
    train: StoreView,
    *,
    lm: LanguageModel,
    labels: str | Path,
    out: str | Path,
    config: ReviveConfig | None = None,
    label: LabelConfig | None = None,
    client: ChatClient | None = None,
    progress: Progress = NO_PROGRESS,
) -> list[Revival]:
    """Tries features that hardly fire on the training documents on sentences made from what they promote; relabels those that fire.

    Run again after a stop, it goes on where it was; no answer is paid for twice.

    Args:
        sae: the dictionary; `hook_point_out` is needed where the output side is measured by steering.
        train: the documents on which the features are silent.
        lm: the model whose activations the view holds.
        labels: folder of the label stage, for its contexts; they are collected there where they are missing.
        out: folder for probes.jsonl, cache/, contexts/, revivals.jsonl, labels.jsonl and ledger.sqlite.
        config: None: defaults.
        label: who relabels, from which evidence, and the labelling model with its caps; None: defaults, without one.
        client: talks to the labelling model; None: the one that `label.llm` describes.
        progress: told of every part.

    Returns:
        One record for each feature that was tried, ascending.

    Raises:
        ConfigError: `llm` among the sources without a labelling model, a feature that the dictionary does not have, or `out` was
            written with another config or other inputs.
        DataError: the view is of another width than the dictionary.
        LabelerError: the server cannot be used, or a cap is reached; what was paid for is kept.
    """
    config, label, out = config or ReviveConfig(), label or LabelConfig(), Path(out)
    _check(sae, config, label)
    train.store.check_model(lm)
    if client is None and label.llm is not None:
        client = make_client(label.llm)
    if _begin(sae, train, lm, out, config, label) == "complete":
        return read_revivals(out)
    with locked(out):
        stage = _stage(sae, train, lm, Path(labels), out, config, label, progress)
        found = stage.run(client)
        finish_stage(out, stage.counts(found))
    return found


def estimate_revival(
    sae: SAE,
    train: StoreView,
    *,
    lm: LanguageModel,
    labels: str | Path,
    out: str | Path,
    config: ReviveConfig | None = None,
    label: LabelConfig | None = None,
    progress: Progress = NO_PROGRESS,
) -> RevivalEstimate:
    """Returns how many features and sentences `revive_features` would try, and what a labelling model would be asked; sends nothing.

    What the features promote is measured on the way and is there for the run itself.

    Raises:
        ConfigError, DataError: as `revive_features`.
    """
    config, label, out = config or ReviveConfig(), label or LabelConfig(), Path(out)
    _check(sae, config, label)
    train.store.check_model(lm)
    _begin(sae, train, lm, out, config, label)
    with locked(out):
        return estimate_questions(_stage(sae, train, lm, Path(labels), out, config, label, progress))


def read_revivals(folder: str | Path) -> list[Revival]:
    """Returns what a finished revive folder says of its features; none where it is not finished.

    Raises:
        StoreError: a line is no such record.
    """
    return RecordFile(Path(folder) / REVIVALS_NAME, Revival).records


def _check(sae: SAE, config: ReviveConfig, label: LabelConfig) -> None:
    if config.sources is not None and "llm" in config.sources and label.llm is None:
        raise ConfigError("revive.sources: found 'llm', needs a labelling model: a table [label.llm]")
    foreign = [feature for feature in config.features or () if not 0 <= feature < sae.cfg.d_sae]
    if foreign:
        raise ConfigError(f"revive.features: found {foreign[0]}, the dictionary has features 0 to {sae.cfg.d_sae - 1}")


def _begin(sae: SAE, train: StoreView, lm: LanguageModel, out: Path, config: ReviveConfig, label: LabelConfig) -> str:
    identity = label.identity()
    values = {"revive": config.to_dict(), "label": {key: identity[key] for key in LABEL_KEYS}}
    inputs = {
        "cache": train.store.sha256,
        "sae": sae_fingerprint(sae),
        "model": lm.fingerprint,
        "train": train.fingerprint,
    }
    return begin_stage(out, "revive", values, inputs)


def _stage(
    sae: SAE,
    train: StoreView,
    lm: LanguageModel,
    labels: Path,
    out: Path,
    config: ReviveConfig,
    label: LabelConfig,
    progress: Progress,
) -> RevivalStage:
    contexts = collect_contexts(sae, train, config=label.contexts, out=labels / CONTEXTS_FOLDER, progress=progress)
    return RevivalStage(
        sae=sae,
        train=train,
        lm=lm,
        out=out,
        config=config,
        label=label,
        contexts=contexts,
        vocabulary=Vocabulary(lm.tokenizer),
        features=_chosen(contexts, config),
        labels=RecordFile(out / LABELS_NAME, Label),
        progress=progress,
    )


def _chosen(contexts: FeatureContexts, config: ReviveConfig) -> Sequence[int]:
    if config.features is not None:
        return sorted(set(config.features))
    quiet = np.flatnonzero(contexts.firing_count <= config.max_firings)
    drawn = np.random.default_rng(config.seed).permutation(quiet)[: config.max_features]
    return sorted(drawn.tolist())
