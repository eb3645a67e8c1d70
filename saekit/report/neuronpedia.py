"""Labels, contexts and scores as the folder of gzipped JSON lines that Neuronpedia's importer reads.

Source: the importer and the database schema of hijohnnylin/neuronpedia (apps/webapp: lib/utils/s3 import, prisma/schema.prisma). It
takes its columns from the first line of a file, so all lines of one have the same keys; it passes over rows whose id is there
already, so ids are hashes of what they stand for; labelers and models are foreign keys, so their rows are written too.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path

from pydantic import Field, JsonValue

from saekit.activations import ActivationStore
from saekit.config import Config
from saekit.errors import ConfigError
from saekit.labelling import (
    CONTEXTS_FOLDER,
    FeatureContexts,
    Label,
    Score,
    TokenEffects,
    effects_path,
    read_labels,
    read_scores,
)
from saekit.labelling.examples import ExampleReader
from saekit.labelling.vocabulary import Vocabulary
from saekit.manifest import atomic_write

__all__ = ["NeuronpediaConfig", "export_neuronpedia"]

FEATURES_PER_FILE = 1024
_EPOCH = "2000-01-01T00:00:00.000Z"
Row = dict[str, JsonValue]


class NeuronpediaConfig(Config):
    """Names under which a dictionary stands on Neuronpedia."""

    model_id: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Model's id there, e.g. `gpt2-small`."""
    source_id: str = Field(pattern=r"^\d+-[A-Za-z0-9_-]+$")
    """Layer and name of the set, e.g. `8-mine-res-24k`."""
    creator_id: str = Field(min_length=1)
    """Id of the user who will own the rows."""
    creator_name: str = Field(min_length=1)
    """Shown as the author."""
    release: str = Field(min_length=1)
    """Name of the release that the set belongs to."""
    model_name: str = Field(min_length=1)
    """Shown for the model."""
    num_layers: int = Field(ge=1)
    """Of the model."""
    created_at: str = _EPOCH
    """ISO 8601 time in every row."""
    max_contexts: int = Field(default=20, ge=1)
    """Contexts of each feature, top ones first."""

    @property
    def set_name(self) -> str:
        """The set's name: the source's without its layer."""
        return self.source_id.partition("-")[2]


def export_neuronpedia(
    labels: str | Path, out: str | Path, *, store: ActivationStore, vocabulary: Vocabulary, config: NeuronpediaConfig
) -> Path:
    """Writes the folder `<out>/<model_id>/<source_id>` from a label folder and returns it.

    Args:
        labels: folder of the label stage.
        store: the token rows that its contexts point into.
        vocabulary: of the model's tokenizer.

    Raises:
        ConfigError: the folder holds no label.
        StoreError: its contexts or records cannot be read.
        ResourceError: the disk is full.
    """
    labels = Path(labels)
    found = [label for label in read_labels(labels) if label.status == "done"]
    if not found:
        raise ConfigError(f"{str(labels)!r}: no labels to export, needs the folder of a label run")
    folder = Path(out) / config.model_id / config.source_id
    contexts = FeatureContexts.open(labels / CONTEXTS_FOLDER)
    reader = ExampleReader(store, vocabulary)
    features = sorted({label.feature for label in found})
    ids = {(label.feature, label.labeler): _explanation_id(label, config) for label in found}
    scores = [s for s in read_scores(labels) if (s.feature, s.labeler) in ids and _value(s) is not None]
    _write_heads(folder, found, scores, config, num_features=contexts.num_features)
    effects = _effects(labels)
    _write_batches(folder / "features", (_feature_row(f, contexts, effects, vocabulary, config) for f in features))
    rows = (row for f in features for row in _activation_rows(f, contexts, reader, config))
    _write_batches(folder / "activations", rows)
    _write_batches(folder / "explanations", (_explanation_row(label, ids, config) for label in found))
    _write_batches(folder / "explanation_scores", (_score_row(score, ids, config) for score in scores))
    return folder


def _write_heads(
    folder: Path, labels: Sequence[Label], scores: Sequence[Score], config: NeuronpediaConfig, *, num_features: int
) -> None:
    owner: Row = {"creatorId": config.creator_id, "createdAt": config.created_at}
    named: Row = {"creatorName": config.creator_name}
    _write_lines(
        folder / "release.jsonl",
        [
            {
                "name": config.release,
                "description": config.release,
                "visibility": "UNLISTED",
                "urls": [],
                **owner,
                **named,
            }
        ],
    )
    model: Row = {
        "id": config.model_id,
        "displayName": config.model_name,
        "displayNameShort": config.model_name,
        "layers": config.num_layers,
        "neuronsPerLayer": num_features,
        "owner": config.creator_name,
        "visibility": "UNLISTED",
    }
    _write_lines(folder / "model.jsonl", [model | owner])
    source_set: Row = {
        "modelId": config.model_id,
        "name": config.set_name,
        "description": config.set_name,
        "releaseName": config.release,
        "visibility": "UNLISTED",
        "urls": [],
    }
    _write_lines(folder / "sourceset.jsonl", [source_set | owner | named])
    source: Row = {
        "id": config.source_id,
        "modelId": config.model_id,
        "setName": config.set_name,
        "visibility": "UNLISTED",
        "hasDashboards": True,
    }
    _write_lines(folder / "source.jsonl", [source | owner])
    kinds = sorted({_type_name(label) for label in labels})
    _write_lines(
        folder / "explanation_type.jsonl", [_named(kind, named | {"creatorId": config.creator_id}) for kind in kinds]
    )
    models = sorted({label.model for label in labels if label.model})
    _write_lines(folder / "explanation_model_type.jsonl", [_named(model_name, named) for model_name in models])
    score_kinds = sorted({_score_type(score) for score in scores})
    judges = sorted({_judge(score) for score in scores})
    _write_lines(
        folder / "explanation_score_type.jsonl",
        [_named(k, named | {"creatorId": config.creator_id}) for k in score_kinds],
    )
    _write_lines(folder / "explanation_score_model.jsonl", [_named(judge, named) for judge in judges])


def _named(name: str, more: Row) -> Row:
    return {"name": name, "displayName": name, "description": name, "featured": False, **more}


def _feature_row(
    feature: int,
    contexts: FeatureContexts,
    effects: TokenEffects | None,
    vocabulary: Vocabulary,
    config: NeuronpediaConfig,
) -> Row:
    promoted = effects.promoted(feature) if effects is not None else []
    suppressed = effects.suppressed(feature) if effects is not None else []
    edges = contexts.histogram_edges
    return {
        "modelId": config.model_id,
        "layer": config.source_id,
        "index": str(feature),
        "sourceSetName": config.set_name,
        "creatorId": config.creator_id,
        "createdAt": config.created_at,
        "maxActApprox": float(contexts.max_act[feature]),
        "frac_nonzero": float(contexts.density[feature]),
        "pos_str": [_plain(vocabulary.text(token)) for token, _ in promoted],
        "pos_values": [float(value) for _, value in promoted],
        "neg_str": [_plain(vocabulary.text(token)) for token, _ in suppressed],
        "neg_values": [float(value) for _, value in suppressed],
        "freq_hist_data_bar_heights": [float(count) for count in contexts.histogram[feature]],
        "freq_hist_data_bar_values": [float(low * high) ** 0.5 for low, high in pairwise(edges)],
    }


def _activation_rows(
    feature: int, contexts: FeatureContexts, reader: ExampleReader, config: NeuronpediaConfig
) -> Iterator[Row]:
    largest = float(contexts.max_act[feature])
    shown = [*contexts.feature(feature), *contexts.sample(feature)][: config.max_contexts]
    for number, context in enumerate(shown):
        example = reader.of_context(context, max_act=largest)
        values = [round(act, 4) for act in example.acts]
        yield {
            "id": _id(config.model_id, config.source_id, "activation", feature, number, example.flat),
            "modelId": config.model_id,
            "layer": config.source_id,
            "index": str(feature),
            "creatorId": config.creator_id,
            "createdAt": config.created_at,
            "tokens": [_plain(reader.vocabulary.text(token)) for token in example.tokens],
            "values": list(values),
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "dataIndex": str(example.flat),
            "qualifyingTokenIndex": example.peak,
        }


def _explanation_row(label: Label, ids: Mapping[tuple[int, str], str], config: NeuronpediaConfig) -> Row:
    return {
        "id": ids[label.feature, label.labeler],
        "modelId": config.model_id,
        "layer": config.source_id,
        "index": str(label.feature),
        "description": _plain(label.label),
        "authorId": config.creator_id,
        "typeName": _type_name(label),
        "explanationModelName": label.model,
        "notes": _plain(label.description),
        "createdAt": config.created_at,
    }


def _score_row(score: Score, ids: Mapping[tuple[int, str], str], config: NeuronpediaConfig) -> Row:
    explanation = ids[score.feature, score.labeler]
    return {
        "id": _id(explanation, score.scorer, json.dumps(score.to_dict(), sort_keys=True)),
        "value": _value(score),
        "explanationId": explanation,
        "explanationScoreTypeName": _score_type(score),
        "explanationScoreModelName": _judge(score),
        "initiatedByUserId": config.creator_id,
        "jsonDetails": json.dumps(score.to_dict(), sort_keys=True),
        "createdAt": config.created_at,
    }


def _type_name(label: Label) -> str:
    return f"saekit_{label.evidence or 'lexical'}"


def _score_type(score: Score) -> str:
    return f"saekit_{score.scorer}"


def _judge(score: Score) -> str:
    return score.judge or "saekit"


def _value(score: Score) -> float | None:
    return score.f1


def _explanation_id(label: Label, config: NeuronpediaConfig) -> str:
    return _id(config.model_id, config.source_id, label.feature, label.labeler, label.label, label.description)


def _id(*parts: object) -> str:
    """Returns 25 characters that begin with `c`, as the database's own ids do."""
    digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).digest()
    return "c" + base64.b32encode(digest).decode().lower()[:24]


def _plain(text: str) -> str:
    """PostgreSQL has no NUL in text."""
    return text.replace("\x00", " ")


def _effects(labels: Path) -> TokenEffects | None:
    path = effects_path(labels, "vocabproj")
    return TokenEffects.open(path) if path.exists() else None


def _write_batches(folder: Path, rows: Iterable[Row]) -> None:
    """Writes rows as `batch-<n>.jsonl.gz`; no file without rows, as the importer would look for columns in it."""
    remaining = iter(rows)
    number = 0
    while batch := list(islice(remaining, FEATURES_PER_FILE)):
        # Without a time in the header, equal rows give equal files.
        with (
            atomic_write(folder / f"batch-{number}.jsonl.gz") as file,
            gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed,
        ):
            packed.write(_lines(batch))
        number += 1


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    with atomic_write(path) as file:
        file.write(_lines(rows))


def _lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
