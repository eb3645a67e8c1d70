"""The label stage's door: labels a dictionary, or says what that would cost."""

from pathlib import Path

import numpy as np

from saekit.activations import StoreView
from saekit.errors import ConfigError, DataError
from saekit.labelling.chat import ChatClient
from saekit.labelling.collect import collect_contexts, sae_fingerprint
from saekit.labelling.embed import server_config
from saekit.labelling.estimate import LLMEstimate
from saekit.labelling.labelconfig import LabelConfig
from saekit.labelling.ledger import LEDGER_NAME, Ledger
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score
from saekit.labelling.scoring.embedding import Embed, EmbeddingConfig
from saekit.labelling.stage import LabelStage
from saekit.labelling.store import CONTROLS_NAME, LABELS_NAME, SCORES_NAME, RecordFile, read_labels
from saekit.labelling.vocabulary import Vocabulary
from saekit.manifest import begin_stage, finish_stage, locked, reopen_stage
from saekit.models import LanguageModel
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE
from saekit.sae.batch import batch_width

__all__ = ["CONTEXTS_FOLDER", "estimate_labels", "label_features", "make_client", "make_embedder"]

CONTEXTS_FOLDER = "contexts"


def label_features(
    sae: SAE,
    train: StoreView,
    *,
    test: StoreView,
    lm: LanguageModel,
    out: str | Path,
    config: LabelConfig | None = None,
    client: ChatClient | None = None,
    embed: Embed | None = None,
    retry_failed: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Path:
    """Labels and scores a dictionary's features; run again after a stop, it goes on where it was.

    Args:
        sae: the dictionary; `hook_point_out` is needed for `token_change`. A transcoder's contexts are those of what it reads, the
            tokens that it promotes those of what it writes; several hook points write at the last of them.
        train: documents that labels may be made from.
        test: documents that labels are scored on; shares none with `train`.
        lm: the model whose activations the views hold.
        out: folder for contexts/, effects-*.safetensors, labels.jsonl and .parquet, scores.jsonl, controls.jsonl,
            label_report.json, ledger.sqlite and the manifest.
        config: None: defaults.
        client: talks to the labelling model; None: the one that `config.llm` describes.
        embed: sentence embedding of a list of texts [n, D], in place of a server's; `config.embedding` names it in the scores.
        retry_failed: features whose labels by a labelling model failed are asked about anew; their cost stays counted.
        progress: told of every part.

    Returns:
        `out`.

    Raises:
        ConfigError: `embed` without `config.embedding`, `out` was written with another config or other inputs, or the labelling model's key is
            missing.
        DataError: the views share a document, one is empty, or they are of another width than the dictionary.
        MissingDependencyError: the labelling model needs an extra that is not installed.
        LabelerError: the server cannot be used, or a cap is reached; what was paid for is kept.
    """
    config, out = config or LabelConfig(), Path(out)
    _check_views(sae, train, test)
    train.store.check_model(lm)
    if embed is not None and config.embedding is None:
        raise ConfigError("labels: found a callable `embed` and no config.embedding, needs one with the model's name")
    if client is None and "llm" in config.labelers and config.llm is not None:
        client = make_client(config.llm)
    embedder = None if embed is not None or config.embedding is None else make_embedder(config.embedding, config.llm)
    state = begin_stage(out, "label", config.identity(), _inputs(sae, train, test, lm))
    if state == "complete" and not (retry_failed and _failures(out)):
        return out
    with locked(out):
        if retry_failed:
            _forget_failures(out)
        stage = _stage(sae, train, test=test, lm=lm, out=out, config=config, progress=progress)
        counts = stage.run(client, embed=embed, embedder=embedder)
        finish_stage(out, counts)
    return out


def estimate_labels(
    sae: SAE,
    train: StoreView,
    *,
    test: StoreView,
    lm: LanguageModel,
    out: str | Path,
    config: LabelConfig,
    progress: Progress = NO_PROGRESS,
) -> LLMEstimate:
    """Returns the requests, tokens and cost that `label_features` would ask of labelling model and embedding; sends nothing.

    Contexts and token effects are gathered in `out` on the way and are there for the run itself.

    Raises:
        ConfigError: neither a labelling model nor an embedding in `config`, or `out` was written with another config or other inputs.
        DataError: as `label_features`.
    """
    out = Path(out)
    if config.llm is None and config.embedding is None:
        raise ConfigError("label estimate: no labelling model, needs labeler 'llm' and a table [llm]")
    _check_views(sae, train, test)
    train.store.check_model(lm)
    begin_stage(out, "label", config.identity(), _inputs(sae, train, test, lm))
    with locked(out):
        return _stage(sae, train, test=test, lm=lm, out=out, config=config, progress=progress).estimate()


def _check_views(sae: SAE, train: StoreView, test: StoreView) -> None:
    for name, view in (("training", train), ("held-out", test)):
        if view.num_tokens == 0:
            raise DataError(f"labels: the {name} view has no tokens, needs at least one")
        if view.d_in != batch_width(sae):
            rows = " (pairs of a PairedStore)" if sae.is_transcoder else ""
            raise DataError(
                f"labels: activations of the {name} view are {view.d_in} wide, the dictionary needs"
                f" {batch_width(sae)}{rows}"
            )
    shared = np.intersect1d(train.documents, test.documents)
    if len(shared):
        raise DataError(
            f"labels: document {int(shared[0])} is in the training and in the held-out view, needs views that share none"
        )


def _inputs(sae: SAE, train: StoreView, test: StoreView, lm: LanguageModel) -> dict[str, str]:
    return {
        "cache": train.store.sha256,
        "sae": sae_fingerprint(sae),
        "model": lm.fingerprint,
        "train": train.fingerprint,
        "test": test.fingerprint,
    }


def _stage(
    sae: SAE,
    train: StoreView,
    *,
    test: StoreView,
    lm: LanguageModel,
    out: Path,
    config: LabelConfig,
    progress: Progress,
) -> LabelStage:
    return LabelStage(
        sae=sae,
        train=train,
        test=test,
        lm=lm,
        out=out,
        config=config,
        contexts=collect_contexts(sae, train, config=config.contexts, out=out / CONTEXTS_FOLDER, progress=progress),
        vocabulary=Vocabulary(lm.tokenizer),
        features=_chosen_features(sae.cfg.d_sae, config),
        labels=RecordFile(out / LABELS_NAME, Label),
        scores=RecordFile(out / SCORES_NAME, Score),
        controls=RecordFile(out / CONTROLS_NAME, Score),
        progress=progress,
    )


def _chosen_features(num_features: int, config: LabelConfig) -> list[int]:
    if config.max_features is None or config.max_features >= num_features:
        return list(range(num_features))
    drawn = np.random.default_rng(config.seed).permutation(num_features)[: config.max_features]
    return sorted(int(feature) for feature in drawn)


def _failures(out: Path) -> list[Label]:
    """Returns the labels that a labelling model failed to give."""
    return [label for label in read_labels(out) if label.status == "failed" and label.evidence is not None]


def _forget_failures(out: Path) -> None:
    """Makes failed labels of labelling models, and what hangs on them, as if they had never been asked for."""
    failed = _failures(out)
    if not failed:
        return
    labels, scores = RecordFile(out / LABELS_NAME, Label), RecordFile(out / SCORES_NAME, Score)
    reopen_stage(out)
    features = {label.feature for label in failed}
    # A joined label rests on others, which may be there after this run.
    joined = [label for label in labels.records if label.evidence == "concat" and label.feature in features]
    keys = {(label.feature, label.labeler) for label in (*failed, *joined)}
    if (out / LEDGER_NAME).exists():
        ledger = Ledger(out / LEDGER_NAME)
        try:
            with ledger.together():
                for label in failed:
                    ledger.retry(f"explain:{label.evidence}", label.feature)
        finally:
            ledger.close()
    scores.remove(lambda score: (score.feature, score.labeler) in keys)
    labels.remove(lambda label: (label.feature, label.labeler) in keys)


def make_client(config: LLMConfig, *, chats: bool = True) -> ChatClient:
    """Returns what talks to the labelling model that a config describes.

    Args:
        chats: whether it will be asked questions, and not just given texts to read.

    Raises:
        ConfigError, MissingDependencyError, ModelError: it cannot be talked to.
    """
    # Here and not above: the extras that they need are only asked for by those who use them.
    if config.backend == "local":
        from saekit.labelling.local import LocalChat

        return LocalChat(config, chats=chats)
    if config.backend == "batch":
        from saekit.labelling.batch import OpenAIBatch

        return OpenAIBatch(config)
    from saekit.labelling.live import OpenAIChat

    return OpenAIChat(config)


def make_embedder(config: EmbeddingConfig, llm: LLMConfig | None) -> ChatClient:
    """Returns what asks a server for vectors."""
    from saekit.labelling.live import OpenAIEmbeddings

    return OpenAIEmbeddings(server_config(config, llm))
