"""A recipe's labels in the formats of other tools."""

import re
from pathlib import Path

from saekit.config import read_toml
from saekit.errors import ConfigError
from saekit.labelling import read_labels
from saekit.labelling.vocabulary import Vocabulary
from saekit.manifest import manifest_sha256, write_json
from saekit.report import NeuronpediaConfig, circuit_tracer_labels, export_neuronpedia
from saekit_pipelines.stages import Pipeline

__all__ = ["export_labels"]


def export_labels(pipeline: Pipeline, target: Path, *, sae: str | None, to: str, names: Path | None) -> Path:
    """Writes the labels of one SAE of a recipe and returns what was written.

    Args:
        target: folder for `neuronpedia`, JSON file for `circuit-tracer`.
        sae: may be left out where the recipe has only one.
        to: `neuronpedia` or `circuit-tracer`.
        names: TOML file with the fields of `NeuronpediaConfig`.

    Raises:
        ConfigError: an unknown format or SAE, or no names for Neuronpedia.
        StoreError: the label stage has not finished.
    """
    known = list(pipeline.recipe.train)
    if sae is None and len(known) > 1:
        raise ConfigError(f"export: the recipe has {', '.join(known)}, needs one of them; name it by --sae")
    name = sae or known[0]
    if name not in known:
        raise ConfigError(f"--sae {name!r}: the recipe has {', '.join(known)}")
    labels = pipeline.stage_folder("label", name)
    manifest_sha256(labels)
    if to == "circuit-tracer":
        hook_point = pipeline.recipe.hook_point(name)
        layer = re.search(r"\.(\d+)", hook_point)
        if layer is None:
            raise ConfigError(
                f"export: no layer in the hook point {hook_point!r}, needs one for circuit-tracer's nodes"
            )
        # A language model's words before token rules.
        found = sorted(read_labels(labels), key=lambda label: label.model is None)
        write_json(target, circuit_tracer_labels(found, layer=int(layer[1])))
        return target
    if to != "neuronpedia":
        raise ConfigError(f"export: found format {to!r}, needs neuronpedia or circuit-tracer")
    if names is None:
        raise ConfigError(
            "export: no names for Neuronpedia, needs a TOML file with model_id, source_id, ...; give it by --as"
        )
    config = NeuronpediaConfig.parse(read_toml(names), where=f"names {str(names)!r}")
    vocabulary = Vocabulary(pipeline.lm.tokenizer)
    return export_neuronpedia(labels, target, store=pipeline.store(name), vocabulary=vocabulary, config=config)
