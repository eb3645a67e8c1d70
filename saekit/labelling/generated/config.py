"""How texts are steered, and what is asked about them and about sentences that the labelling model writes."""

from typing import Literal, Self

from pydantic import Field, model_validator

from saekit.config import Config

__all__ = ["InputTestConfig", "SteeredConfig"]


class SteeredConfig(Config):
    """Texts that the subject model writes while a feature is turned, once for each feature, and how they are judged."""

    prompts: tuple[str, ...] = Field(default=("The explanation is simple:", "I think", "We"), min_length=1)
    """What is written on from. Source: Gur-Arieh et al. 2025, section 3.2."""
    kl_targets: tuple[float, ...] = Field(default=(0.25, 0.5), min_length=1)
    """Nats by which the next-token distribution moves, one strength for each; negative: the feature is turned down."""
    match: Literal["kl", "clamp"] = "kl"
    """How a strength is found and applied. `kl`: the decoder row is added, the KL is that on the texts of `token_change`, averaged
    over positions; `clamp`: the activation is set, the KL is that on the prompts in the reconstruction, as published."""
    num_samples: int = Field(default=2, ge=1)
    """Texts for each prompt and strength; all of them are a feature's set."""
    num_tokens: int = Field(default=25, ge=1)
    """Tokens written in each text."""
    temperature: float = Field(default=0.75, ge=0)
    """Of the subject model."""
    num_sets: int = Field(default=3, ge=2)
    """Sets that a judge chooses from: the feature's own, and others'."""
    num_trials: int = Field(default=4, ge=1)
    """Times that a label is judged, each time beside other sets in another order."""
    batch_rows: int = Field(default=96, ge=1)
    """Texts written at once; memory and speed only."""

    @model_validator(mode="after")
    def _moves(self) -> Self:
        if not all(self.kl_targets):
            raise ValueError(f"kl_targets {list(self.kl_targets)}: needs numbers other than 0")
        return self

    @property
    def set_size(self) -> int:
        """Texts of a feature."""
        return len(self.prompts) * len(self.kl_targets) * self.num_samples


class InputTestConfig(Config):
    """Sentences written from a label, and what counts as activating."""

    num_sentences: int = Field(default=10, ge=1)
    """Sentences that should activate the feature, beside as many that should not."""
    quantile: float = Field(default=0.5, ge=0, lt=1)
    """A sentence activates the feature where one of its tokens does so as strongly as this quantile of the feature's firings on
    held-out documents; what is weaker counts as silent."""
