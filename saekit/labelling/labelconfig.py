"""What to label, with which evidence, by whom, and how labels are scored."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from saekit.config import Config
from saekit.labelling.collector import ContextConfig
from saekit.labelling.evidence.tokenchange import TokenChangeConfig
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.scoring.embedding import EmbeddingConfig
from saekit.labelling.scoring.rule import RuleScoringConfig

__all__ = ["LabelConfig"]


class LabelConfig(Config):
    """What to label, with which evidence, by whom, and how to score it."""

    preset: Literal["paper_output_centric"] | None = None
    """Values that stand where the recipe gives none. `paper_output_centric`: those of Gur-Arieh et al. 2025 (arXiv 2501.08319): 50 + 50
    tokens of the vocabulary projection; token changes of 32 texts of 32 tokens, clamped to +10 and -10, 10 + 10 tokens of each;
    descriptions by MaxAct, VocabProj, TokenChange, Ensemble Raw and Ensemble Concat in the paper's form, of every feature; input test
    with 5 + 5 sentences, output test with 12 texts of 25 tokens at clamps of 0.25 and 0.5 nats up and down, one of three sets."""
    labelers: tuple[Literal["lexical", "llm"], ...] = ("lexical",)
    """`lexical` needs nothing; `llm` needs the table `llm`, and is added where that table is given and labelers are not."""
    max_features: int | None = Field(default=None, ge=1)
    """Label so many features, drawn at random; None: all."""
    contexts: ContextConfig = ContextConfig()
    """Of the pass over the training documents."""
    vocab_projection: bool = True
    """Whether decoder rows are read through the unembedding."""
    num_effect_tokens: int = Field(default=20, ge=1)
    """Promoted and suppressed tokens kept by the vocabulary projection."""
    token_change: TokenChangeConfig | None = TokenChangeConfig()
    """Steering; None: none."""
    rule_scoring: RuleScoringConfig = RuleScoringConfig()
    """How label rules are checked on held-out documents."""
    embedding: EmbeddingConfig | None = None
    """The sentence embedding that scores all labels; None: none."""
    llm: LLMConfig | None = None
    """The explaining and judging language model; None: none."""
    seed: int = Field(default=0, ge=0)
    """Of the features drawn by `max_features`."""

    @model_validator(mode="after")
    def _preset_fills_in(self) -> Self:
        for name, value in _missing(self, _PRESETS.get(self.preset, {})).items():
            # Past the freeze, as the model is not out in the world yet.
            object.__setattr__(self, name, value)
        return self

    @model_validator(mode="after")
    def _llm_is_named(self) -> Self:
        if self.llm is not None and "labelers" not in self.model_fields_set:
            # Past the freeze, as the model is not out in the world yet.
            object.__setattr__(self, "labelers", ("lexical", "llm"))
        if self.llm is not None and "llm" not in self.labelers:
            raise ValueError(f"table [llm] with labelers {list(self.labelers)}: add 'llm' to them, or leave [llm] out")
        if "llm" in self.labelers and self.llm is None:
            raise ValueError("labeler 'llm' needs a table [llm] with a model")
        if not self.labelers:
            raise ValueError("needs at least one labeler")
        return self

    def identity(self) -> dict[str, object]:
        """Returns what the result depends on: the config without caps, addresses and sizes of batches.

        Options of `llm` that the others leave without effect are not in it, so that folders written before there were such options
        are taken for what they are.
        """
        values = self.to_dict()
        idle = {} if self.llm is None else {"llm": _idle(self.llm)}
        for path, keys in [*_OPERATIONAL.items(), *idle.items()]:
            inner: object = values
            for table in path.split("."):
                inner = inner.get(table) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                for key in keys:
                    inner.pop(key, None)
        return values


def _idle(llm: LLMConfig) -> set[str]:
    """Returns the keys that change nothing beside the others' values."""
    asked = set(llm.scorers) if llm.num_judged else set()
    keys: set[str] = set()
    if llm.num_candidates == 1:
        keys |= {"num_candidates", "candidate_temperature", "num_counter_examples"}
        keys |= {"selection_fraction", "selection_scorer", "num_selection"}
        keys |= {"near_share"} if llm.near_share == 0 or not asked & {"detection", "fuzzing"} else set()
    keys |= set() if "simulation" in asked else {"num_simulated", "simulation_form"}
    keys |= set() if asked & {"output", "intervention"} else {"steered"}
    keys |= set() if "intervention" in asked else {"intervention_form"}
    keys |= set() if "input" in asked else {"input_test"}
    return keys


def _missing(config: Config, values: Mapping[str, object]) -> dict[str, object]:
    """Returns those of a preset's values that a config was not given; a table that is None stays so."""
    found: dict[str, object] = {}
    for name, value in values.items():
        own = getattr(config, name)
        if isinstance(own, Config) and isinstance(value, Mapping):
            found[name] = own.model_copy(update=_missing(own, value))
        elif not isinstance(value, Mapping) and name not in config.model_fields_set:
            found[name] = value
    return found


_PRESETS: dict[str | None, dict[str, object]] = {
    "paper_output_centric": {
        "num_effect_tokens": 50,
        "token_change": {"match": "clamp", "clamp": 10.0, "num_contexts": 32, "context_len": 32, "num_tokens": 10},
        "llm": {
            "style": "paper_output_centric",
            "explainers": ("input", "vocabproj", "tokenchange", "raw", "concat"),
            "max_features": None,
            "scorers": ("input", "output"),
            "steered": {
                "match": "clamp",
                "kl_targets": (0.25, 0.5, -0.25, -0.5),
                "num_samples": 1,
                "num_tokens": 25,
                "temperature": 0.75,
                "num_sets": 3,
                "num_trials": 1,
            },
            "input_test": {"num_sentences": 5},
        },
    }
}
"""Preset -> values, tables within."""

_OPERATIONAL = {
    "contexts": {"batch_tokens", "checkpoint_seconds"},
    "embedding": {"api_key_env", "base_url", "price_input"},
    "token_change": {"batch_features"},
    "llm.steered": {"batch_rows"},
    "llm": {
        "api_key_env",
        "backend",
        "base_url",
        "batch",
        "concurrency",
        "give_up_after",
        "local_batch",
        "max_cost",
        "max_requests",
        "max_retries",
        "max_tokens",
        "max_wait_seconds",
        "price_cached_input",
        "price_input",
        "price_output",
        "timeout_seconds",
        "tokenizer",
    },
}
"""Keys that a resumed run may change: what they are does not show in the labels."""
