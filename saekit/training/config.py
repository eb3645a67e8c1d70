"""How an SAE is trained, apart from what it is."""

import math
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from saekit.config import Config

__all__ = ["EndToEndConfig", "LayoutName", "MeshConfig", "ResampleConfig", "SparsityConfig", "TrainConfig"]

LayoutName = Literal["data", "latents", "layers"]


class ResampleConfig(Config):
    """When silent features are drawn anew from inputs that are reconstructed badly."""

    every_tokens: int | None = Field(default=None, gt=0)
    """Tokens between two resamplings; None = an eighth of num_tokens."""
    until_fraction: float = Field(default=0.5, gt=0, le=1)
    """Part of training after which there is none any more: a new feature needs time."""
    silent_tokens: int | None = Field(default=None, gt=0)
    """A feature that was silent for so many tokens is drawn anew; None = half of the distance between two resamplings."""
    sample_tokens: int | None = Field(default=None, gt=0)
    """Tokens among which inputs are drawn, each with a probability that is proportional to its squared loss; None = a tenth of
    num_tokens, at most 819,200."""
    encoder_norm: float = Field(default=0.2, gt=0)
    """Norm of a new feature's encoder row in multiples of the mean norm of the live ones'; the default is made for ReLU, where
    features do not compete for k places."""


class MeshConfig(Config):
    """Processes in rows and columns: each row takes a part of every batch, each column a part of the features."""

    data: int = Field(default=1, ge=1)
    """Parts of a batch."""
    latents: int = Field(default=1, ge=1)
    """Parts of the features."""


class EndToEndConfig(Config):
    """Training on what the language model makes of reconstructions, in place of or beside the reconstructions themselves."""

    kind: Literal["e2e", "e2e_downstream", "kl_finetune"]
    """`e2e`: the model's loss alone; `e2e_downstream`: and how well the later layers' outputs are those without the SAE;
    `kl_finetune`: and the reconstruction, for the last few percent of the tokens of an SAE that is trained already."""
    kl_weight: float | None = Field(default=None, ge=0)
    """Weight of the KL divergence, in nats a token, from the model's predictions to those with the SAE; None = 1, and for
    `kl_finetune` what makes it as large as the reconstruction's term was in the step before."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy of the next tokens, in nats a token."""
    downstream_weight: float = Field(default=1.0, gt=0)
    """Weight of the later layers' mean fraction of variance unexplained; `e2e_downstream` only."""

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if self.kl_weight == 0 and self.ce_weight == 0:
            raise ValueError("kl_weight and ce_weight are 0, needs one of them")
        if self.downstream_weight != 1.0 and self.kind != "e2e_downstream":
            raise ValueError(f"downstream_weight with kind {self.kind!r}, needs 'e2e_downstream'")
        return self


class SparsityConfig(Config):
    """How an SAE gets as sparse as it was asked to be: by a steered penalty where it has a target L0, else by its k."""

    start_factor: float = Field(default=2.0, ge=1)
    """L0 at the first step, in multiples of the target; thresholds start at the quantiles of the data that give it."""
    ramp_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Part of training in which the wanted L0 falls, evenly in its logarithm, from the start to the target."""
    threshold_lr: float = Field(default=2e-2, gt=0)
    """Learning rate of log-thresholds: the largest relative change of a threshold in one step."""
    integral_gain: float = Field(default=0.02, gt=0)
    """How far the coefficient's logarithm moves in a step per unit of log(L0 / wanted L0)."""
    proportional_gain: float = Field(default=2.0, ge=0)
    """How much the coefficient's logarithm answers the present log(L0 / wanted L0) at once."""
    dead_loss: Literal["auxk", "pre_act", "pre_act_all"] = "auxk"
    """How silent features of a JumpReLU SAE are brought back: AuxK, a pull of the dead ones' pre-activations towards their
    thresholds, or such a pull on all features wherever they are silent."""
    pre_act_coefficient: float = Field(default=3e-6, ge=0)
    """Weight of the `pre_act` and `pre_act_all` losses."""
    k_start_factor: float = Field(default=1.0, ge=1)
    """Features a token uses at the first step, in multiples of k; 1 = k throughout."""
    k_anneal_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Part of training in which the number of features a token uses falls, linearly, to k."""


class TrainConfig(Config):
    """How long, how fast and with which losses an SAE is trained. Counts of tokens are over all processes together."""

    num_tokens: int = Field(gt=0)
    """Tokens to train on; the data is repeated, newly shuffled, as often as needed."""
    batch_size: int = Field(default=4096, gt=0)
    """Tokens in one step, over all processes."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; None = by width and length of training, see `default_lr`."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first weights and of the order of the data."""
    init: Literal["tied", "given"] = "tied"
    """`tied` draws new directions from the seed; `given` goes on from the weights of the SAE that is passed in."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Part of training in which the learning rate rises from 0, at most 1,000 steps."""
    decay_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Part of training, at its end, in which the learning rate falls to 0."""
    decay: Literal["linear", "cosine", "constant"] | None = None
    """How it falls there; `constant` = not at all; None = linear, or constant for an optimizer that needs no schedule."""
    optimizer: Literal["adam", "adamw8bit", "muon", "signum"] = "adam"
    """`adam`; `adamw8bit`, the same with moments of one byte an entry (needs the extra `lowbit`); `muon`, orthogonalised
    momentum for the matrices; `signum`, schedule-free steps along the gradient's sign."""
    weight_decay: float | None = Field(default=None, gt=0)
    """Part of the learning rate by which `adamw8bit` shrinks matrices in a step, of which unit decoder rows see nothing; None =
    not at all."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Tokens that a process takes at a time; the gradients of a step add up over them, so that large batches need less memory.
    None = its whole share of the batch."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay in a step of the moving average of the weights, which then is what is evaluated and saved; None = no average."""
    betas: tuple[float, float] | None = None
    """Decay rates of Adam's moments; None = by length of training, see `adam_betas`."""
    clip_factor: float | None = Field(default=2.0, gt=1)
    """Largest norm of the whole gradient, in multiples of its running mean; None = no limit."""
    auxk_alpha: float = Field(default=1 / 32, ge=0)
    """Weight of the AuxK loss; 0 = off."""
    k_aux: int | None = Field(default=None, gt=0)
    """Dead features a token may use in the AuxK loss; None = the power of two nearest to d_in / 2."""
    dead_after_tokens: int | None = Field(default=None, gt=0)
    """A feature that was silent for so many tokens is dead; None = a thirtieth of num_tokens, at most 10 million."""
    log_every_tokens: int | None = Field(default=None, gt=0)
    """Tokens between two rows of training figures; None = a two-hundredth of num_tokens."""
    eval_every_tokens: int | None = Field(default=None, gt=0)
    """Tokens between two evaluations on held-out tokens; None = a tenth of num_tokens."""
    eval_tokens: int = Field(default=16_384, gt=0)
    """Held-out tokens of one evaluation while training."""
    checkpoint_every_tokens: int | None = Field(default=None, gt=0)
    """Tokens between two checkpoints; None = a fifth of num_tokens, at most 50 million."""
    sparsity: SparsityConfig = SparsityConfig()
    """Control of L0."""
    resample: ResampleConfig | None = None
    """Resampling of silent features; None = none, they are left to the loss."""
    layout: LayoutName | MeshConfig = "data"
    """How the processes of a launch share the work: `data`, each takes a part of every batch; `latents`, each holds a part of the
    features, with their share of gradients and optimizer; `layers`, each trains whole SAEs of its own; or a mesh of the first two,
    `{ data = 2, latents = 4 }`. The SAE is the same in all of them, to the order of sums."""
    objective: EndToEndConfig | None = None
    """A loss that goes through the language model; None = reconstruction. Whole token rows are read then, `batch_size` and
    `micro_batch_size` count all of their positions, and the SAE takes the place of the normal training tokens in them."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction + decay_fraction is {self.warmup_fraction + self.decay_fraction}, needs at most 1"
            )
        if self.ema_decay is not None and self.optimizer == "signum":
            raise ValueError("ema_decay with optimizer 'signum', needs one of them: signum keeps an average of its own")
        if self.weight_decay is not None and self.optimizer != "adamw8bit":
            raise ValueError(f"weight_decay with optimizer {self.optimizer!r}, needs 'adamw8bit'")
        if self.optimizer == "signum" and self.betas is not None:
            raise ValueError(
                "betas with optimizer 'signum', needs one that takes moments: 'adam', 'adamw8bit' or 'muon'"
            )
        return self

    @field_validator("betas")
    @classmethod
    def _betas_decay(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not all(0 <= beta < 1 for beta in value):
            raise ValueError("needs two numbers from 0 to below 1")
        return value

    @property
    def identity(self) -> dict[str, object]:
        """What the trained SAE depends on, as JSON values: everything but the layout."""
        return {key: value for key, value in self.to_dict().items() if key != "layout"}

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return math.ceil(self.num_tokens / self.batch_size)

    @property
    def adam_betas(self) -> tuple[float, float]:
        """`betas`, by default 0.9 and a second one that remembers a fifth of training, 20 steps at least and 1,000 at most.

        Gradients are largest at first. With 300 steps of 1,024 tokens on a planted dictionary, 0.999 in place of 0.98 remembered
        them to the end: FVU 0.154 in place of 0.143, and 0.73 in place of 0.79 of mean cosine with what was planted.
        """
        return self.betas or (0.9, 1 - 1 / min(1000.0, max(20.0, self.num_steps / 5)))

    def every_steps(self, tokens: int | None, *, parts: int, most: int | None = None) -> int:
        """Returns a distance in steps for one given in tokens, or for `num_tokens / parts` where none is given."""
        if tokens is None:
            tokens = self.num_tokens // parts
            tokens = tokens if most is None else min(tokens, most)
        return max(1, tokens // self.batch_size)
