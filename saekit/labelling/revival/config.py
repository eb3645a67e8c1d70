"""Which silent features are tried, and on how many sentences."""

from typing import Literal

from pydantic import Field

from saekit.config import Config

__all__ = ["ProbeSource", "ReviveConfig"]

ProbeSource = Literal["templates", "corpus", "llm"]


class ReviveConfig(Config):
    """How features are tried that the corpus does not make fire."""

    features: tuple[int, ...] | None = None
    """Exactly these; None: those that fire on no more than `max_firings` training tokens."""
    max_firings: int = Field(default=2, ge=0)
    """Training tokens on which a feature that is tried may fire; fewer than three show no pattern."""
    max_features: int | None = Field(default=200, ge=1)
    """Try so many of them, drawn at random; None: all."""
    sources: tuple[ProbeSource, ...] | None = Field(default=None, min_length=1)
    """Where sentences come from. `templates`: fixed sentences around the tokens that the feature promotes; `corpus`: pieces of
    the training documents with such a token; `llm`: sentences that the labelling model writes from a label of the output side.
    None: the first two, and `llm` where there is a labelling model."""
    num_tokens: int = Field(default=8, ge=1)
    """Promoted tokens of a feature that sentences are built from."""
    num_templates: int = Field(default=8, ge=1)
    """Sentences from templates for each feature; there are eight templates."""
    num_corpus: int = Field(default=8, ge=1)
    """Pieces of the corpus for each feature."""
    num_written: int = Field(default=10, ge=1)
    """Sentences that the labelling model is asked for."""
    probe_tokens: int = Field(default=32, ge=8)
    """The most tokens of a sentence; each stands in a row of its own."""
    num_controls: int = Field(default=200, ge=1)
    """Random pieces of the training documents, as long as the sentences, on which every feature is tried as well."""
    seed: int = Field(default=0, ge=0)
    """Of everything that is drawn."""
