"""Which labelling model to ask, how, and what it may cost."""

from typing import Literal

from pydantic import Field, model_validator

from saekit.config import Config
from saekit.labelling.generated.config import InputTestConfig, SteeredConfig
from saekit.labelling.prices import Prices, known_prices

__all__ = ["BatchConfig", "ExplainerKind", "LLMConfig", "LLMScorer"]

ExplainerKind = Literal["input", "vocabproj", "tokenchange", "raw", "concat"]
LLMScorer = Literal["detection", "fuzzing", "simulation", "surprisal", "intruder", "input", "output", "intervention"]


class BatchConfig(Config):
    """OpenAI's Batch API: half the price, answers within a day."""

    poll_seconds: float = Field(default=60.0, ge=0)
    """Between two looks at a batch."""
    max_requests: int = Field(default=50_000, ge=1)
    """In one batch; more make several. 50,000 is OpenAI's own limit."""
    max_bytes: int = Field(default=190_000_000, ge=1)
    """Of one batch's file; OpenAI takes 200 MB."""


class LLMConfig(Config):
    """A labelling model, how to ask it, and what it may cost."""

    model: str
    """Name of the model as the server knows it; for `backend = "local"` a hub id or a folder."""
    backend: Literal["server", "batch", "local"] = "server"
    """`server`: any OpenAI-compatible one, request by request; `batch`: OpenAI's Batch API; `local`: a transformers model in
    this process."""
    base_url: str | None = None
    """Address up to `/v1`; None: OpenAI's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a server with a `base_url` may need none."""
    explainers: tuple[ExplainerKind, ...] = Field(default=("raw",), min_length=1)
    """What an explanation is made from. `input`: contexts; `vocabproj`, `tokenchange`: tokens on the output side; `raw`: all of
    them in one question; `concat`: the descriptions of the first three, joined."""
    num_candidates: int = Field(default=1, ge=1)
    """Labels that each explainer is asked for; the one that `selection_scorer` likes best is kept."""
    candidate_temperature: float = Field(default=0.8, ge=0)
    """Of all candidates but the first, which has `temperature`; each has a seed of its own, where the server takes one."""
    num_counter_examples: int = Field(default=5, ge=0)
    """With several candidates: texts shown to the explainer on which the most similar features fire and this one is silent."""
    selection_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    """With several candidates: share of the training documents that explainers do not read, to choose among candidates on."""
    selection_scorer: Literal["detection", "fuzzing"] = "detection"
    """What chooses."""
    num_selection: int = Field(default=10, ge=1)
    """Texts on which the feature fires that it sees, beside as many on which it does not."""
    style: Literal["saekit", "paper_output_centric"] = "saekit"
    """How evidence is shown and what is asked. `paper_output_centric`: as published by Gur-Arieh et al. 2025 (all top contexts with
    activations from 0 to 10, token lists without signs, one free sentence); see `LabelConfig.preset`."""
    max_features: int | None = Field(default=200, ge=1)
    """Explain so many of the labelled features that fire, those whose token rules explain least first; None: all."""
    num_top: int = Field(default=10, ge=1)
    """Strongest contexts shown to the explainer."""
    num_sample: int = Field(default=10, ge=0)
    """Contexts over the whole range of activations shown to the explainer."""
    num_effects: int = Field(default=15, ge=0)
    """Promoted and suppressed tokens shown to the explainer."""
    num_judged: int = Field(default=10, ge=0)
    """Held-out texts on which the feature fires that the judge sees, beside as many on which it does not; 0: no judging."""
    scorers: tuple[LLMScorer, ...] = ("detection",)
    """What the judge is asked: `detection`: in which texts is the feature active; `fuzzing`: is it active on the marked tokens;
    `simulation`: how strongly is it active on each token; `intruder`: which of five texts does not belong, without a label.
    `surprisal` asks nothing: the model reads texts after the label and without it, for which a server has to give logprobs of
    prompts. About generated texts: `input`: it writes sentences that should activate the feature and others; `output`: which set
    of steered texts is the feature's; `intervention`: the same of single texts."""
    near_share: float = Field(default=0.5, ge=0)
    """Near negatives in `detection` and `fuzzing`, texts on which sibling features fire, for each text on which the feature does;
    reported apart from the random ones. 0: none."""
    num_simulated: int = Field(default=5, ge=1)
    """Held-out texts on which the feature fires whose tokens are simulated, beside as many on which it does not."""
    simulation_form: Literal["written", "all_at_once"] = "written"
    """`written`: the judge writes one number for each token, taken as its expectation where logprobs come with it; `all_at_once`: it
    reads a text with a placeholder after each token, and the expectation is taken there (Bills et al. 2023), for which a server
    has to give logprobs of prompts."""
    intervention_form: Literal["gain", "choice"] = "gain"
    """`gain`: how much likelier does the judge find the label after steered texts than after clean ones (Paulo et al. 2024)? It only
    reads, for which a server has to give logprobs of prompts; where it gives none, and with `choice`, it is asked which text of a
    pair is the feature's. An estimate counts the form that is named here."""
    steered: SteeredConfig = SteeredConfig()
    """The texts for `output` and `intervention`."""
    input_test: InputTestConfig = InputTestConfig()
    """The sentences for `input`."""
    num_controlled: int = Field(default=20, ge=0)
    """Features whose texts each scorer also judges by three labels that know nothing: none, random words, another feature's."""
    judge_lexical: bool = False
    """Whether the judge also scores the lexical labels of the explained features."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the answers; left out where the server refuses it."""
    seed: int = Field(default=0, ge=0)
    """Of the shown and judged contexts, and of a local model's sampling."""
    max_output_tokens: int = Field(default=600, ge=16)
    """Length of one answer; an answer that was cut off is asked again with twice as many."""
    attempts: int = Field(default=2, ge=1)
    """Times that a feature is asked about before it counts as failed."""
    concurrency: int = Field(default=32, ge=1)
    """Most requests in flight; fewer where the server limits its rate."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """For one request, from sending it to the last byte of its answer."""
    max_retries: int = Field(default=6, ge=0)
    """Repeats of one request after server or connection errors; waiting for a rate limit does not count."""
    give_up_after: int = Field(default=20, ge=1)
    """So many requests lost to server or connection errors, with no answer between them, end the run."""
    wait_seconds: float = Field(default=1.0, ge=0)
    """First pause before a repeat, doubled each time, where the server names none."""
    max_wait_seconds: float = Field(default=60.0, ge=0)
    """Longest pause; a server that asks for a longer one is obeyed up to ten times this."""
    batch: BatchConfig = BatchConfig()
    """For `backend = "batch"`."""
    local_batch: int = Field(default=8, ge=1)
    """Questions that a local model answers at once, at temperature 0."""
    tokenizer: str | None = None
    """Hub id or folder of the labelling model's tokenizer, for an estimate to the token; None: the subject model's is used."""
    max_requests: int | None = Field(default=None, ge=1)
    """Hard cap on requests sent for this folder, repeats and former runs included."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Hard cap on input and output tokens for this folder, counting the most that requests in flight may take."""
    max_cost: float | None = Field(default=None, gt=0)
    """Hard cap on dollars for this folder, counted in the same way; `--budget` on the command line."""
    price_input: float | None = Field(default=None, ge=0)
    """Dollars per million input tokens; None: from the package's table, which knows OpenAI's models."""
    price_cached_input: float | None = Field(default=None, ge=0)
    """Dollars per million input tokens that the server kept from earlier requests; None: `price_input`."""
    price_output: float | None = Field(default=None, ge=0)
    """Dollars per million output tokens."""

    @model_validator(mode="after")
    def _is_priced(self) -> "LLMConfig":
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output go together")
        if self.max_cost is not None and self.prices is None:
            raise ValueError(
                "max_cost needs price_input and price_output, per million tokens: "
                f"the price table has no model {self.model!r} at {self.base_url or 'OpenAI'}"
            )
        return self

    @property
    def prices(self) -> Prices | None:
        """The recipe's prices, else the table's; None where neither has any. The Batch API's discount is in them."""
        if self.price_input is not None and self.price_output is not None:
            cached = self.price_input if self.price_cached_input is None else self.price_cached_input
            return Prices(input=self.price_input, output=self.price_output, cached_input=cached)
        if self.backend == "local":
            return None
        known = known_prices(self.model, self.base_url)
        if known is None or self.backend != "batch":
            return known
        share = known.batch_factor
        return Prices(input=known.input * share, output=known.output * share, cached_input=known.cached_input * share)

    def cost(self, input_tokens: float, output_tokens: float, *, cached_tokens: float = 0.0) -> float | None:
        """Returns what so many tokens cost in dollars; None without prices."""
        prices = self.prices
        return None if prices is None else prices.cost(input_tokens, output_tokens, cached_tokens=cached_tokens)
