"""What labelling writes: one `Label` per feature and labeler, one `Score` per label and scorer."""

from typing import Literal

from pydantic import JsonValue

from saekit.config import Config

__all__ = ["LEXICAL", "Label", "Score", "ScorerName"]

LEXICAL = "lexical"
"""Name of the labeler that needs no language model."""
ScorerName = Literal[
    "rule",
    "detection",
    "fuzzing",
    "simulation",
    "surprisal",
    "intruder",
    "embedding",
    "input",
    "output",
    "intervention",
]


class Label(Config):
    """A feature's label by one labeler, or the reason why there is none."""

    feature: int
    """Index of the feature in the dictionary."""
    labeler: str
    """Who wrote it: `lexical`, `llm:<model>`, or `llm:<model>:<evidence>` where that is not `raw`."""
    label: str = ""
    """Short label for tables; empty where `status` is `failed`."""
    description: str = ""
    """Long text: what the feature fires on, with examples, and what it does to the next token."""
    fires_on: str = ""
    """The input side alone."""
    promotes: str = ""
    """Tokens or ideas that the feature makes more likely; empty where no evidence was gathered."""
    suppresses: str = ""
    """Tokens or ideas that the feature makes less likely; empty where no evidence was gathered."""
    rule_tokens: tuple[int, ...] = ()
    """Ids of the tokens that the label's own rule speaks of; may be empty."""
    rule: dict[str, JsonValue] | None = None
    """The label's machine-evaluable rule (a dumped `saekit.labelling.rules.Rule`); None where it has none."""
    confidence: float | None = None
    """In [0, 1]: for `lexical` the rule's F1 on the training documents, firings weighted by squared activation; for an LLM
    what it says of itself."""
    examples: tuple[int, ...] = ()
    """Store index (row * T + position) of the peaks of the contexts that an LLM says its label rests on."""
    evidence: str | None = None
    """What an LLM's label was made from: `input`, `vocabproj`, `tokenchange`, `raw` or `concat`."""
    prompt_version: str | None = None
    """Name of the prompt template, for an LLM."""
    model: str | None = None
    """Name of the labelling model as the server was asked for it, for an LLM."""
    input_tokens: int = 0
    """Of the requests behind it; for `concat` those of its parts."""
    output_tokens: int = 0
    """Of the answers behind it."""
    cost: float | None = None
    """Of the requests behind it, in dollars at the day's prices; None without prices."""
    num_candidates: int | None = None
    """Labels that it is the best of; None where there was one. Tokens and cost are those of all of them and of choosing."""
    selection_scorer: ScorerName | None = None
    """What chose it; None where there was nothing to choose on."""
    selection_score: float | None = None
    """The scorer's average precision on the documents that are kept for choosing, which no explainer reads and no score uses."""
    status: Literal["done", "failed"] = "done"
    """Every feature asked for ends in exactly one of the two."""
    reason: str | None = None
    """Why it failed."""


class Score(Config):
    """How well one label predicts when its feature fires, on documents that no labeler has seen."""

    feature: int
    """Index of the feature in the dictionary."""
    labeler: str
    """Whose label was scored; for a control what stood in its place."""
    scorer: ScorerName
    """`rule`: the label's token rule against every held-out token; `detection`: an LLM judges held-out pieces of text;
    `fuzzing`: an LLM judges marks in them; `simulation`: an LLM predicts every token's activation; `surprisal`: how much better
    an LLM expects a piece after the label; `embedding`: how near label and piece are; `intruder`: an LLM finds the silent piece
    among five, without a label; `input`: an LLM writes sentences from the label, and the feature fires on them or not; `output`: an
    LLM finds the feature's own set of steered texts; `intervention`: the same of single texts."""
    judge: str | None = None
    """Name of the judging or embedding model; None for `rule`."""
    prompt_version: str | None = None
    """Name of the judge's prompt."""
    setup: str | None = None
    """Hash of what else the score depends on: held-out documents, drawn texts, seed. Scores of another one are made anew."""
    f1: float | None = None
    """Harmonic mean of precision and recall; None where the feature never fires on the held-out set, or always."""
    auprc: float | None = None
    """Average precision, ties in one step; compare with `base_rate`."""
    precision: float | None = None
    """Share of predicted firings that are firings; None where nothing is predicted."""
    recall: float | None = None
    """Share of firings that are predicted."""
    balanced_accuracy: float | None = None
    """Mean of recall on positives and on negatives; chance is 0.5."""
    accuracy: float | None = None
    """`intruder`: share of groups whose intruder was found; `output`, `intervention`: share of trials or pairs whose own texts were
    found; compare with `base_rate`. `input`: 1 where sentences that should activate the feature do so more than others, else 0."""
    base_rate: float | None = None
    """Share of positives in the set: the average precision of a label that says nothing. For `intruder`, `output` and
    `intervention` chance."""
    natural_rate: float | None = None
    """Share of positives in held-out text as it comes: of pieces or, for `fuzzing`, of tokens. None for `rule`, whose set is that
    text."""
    f1_natural: float | None = None
    """`f1` with positives and negatives weighted to `natural_rate`."""
    auprc_natural: float | None = None
    """`auprc` with positives and negatives weighted to `natural_rate`; compare with that."""
    pearson: float | None = None
    """`simulation`: correlation of predicted and true activations over all tokens of the pieces together; None where all
    predictions are the same, as it is not defined there: `r2` says 0 then."""
    pearson_low: float | None = None
    """Lower end of its 95 % interval over resampled documents."""
    pearson_high: float | None = None
    """Upper end of it."""
    pearson_natural: float | None = None
    """`pearson` with active and silent pieces weighted to `natural_rate`."""
    r2: float | None = None
    """`simulation`: share of the activations' variance that predictions explain, after a straight line fitted on the other half of
    the pieces."""
    gain: float | None = None
    """`surprisal`: nats per token by which the label makes active pieces likelier, less the same of silent ones. `intervention` of a
    judge that gives logprobs: nats by which steered texts make the label likelier than clean ones."""
    num_near: int = 0
    """Near negatives beside the others: pieces in which sibling features fire and this one does not."""
    specificity_near: float | None = None
    """Share of them that is judged silent; Wilson's interval in `near_low` and `near_high`."""
    near_low: float | None = None
    near_high: float | None = None
    f1_near: float | None = None
    """`f1` against near negatives, as many of them as positives."""
    auprc_near: float | None = None
    """`auprc` against near negatives, as many of them as positives; compare with 0.5."""
    num_positive: int = 0
    """Tokens (`rule`) or pieces on which the feature fires; for `intruder`, `output` and `intervention` groups, trials
    and pairs; for `input` sentences that should activate it."""
    num_negative: int = 0
    """Tokens or pieces on which it does not."""
    num_unparsed: int = 0
    """Pieces for which the judge gave no usable answer; they count as wrong."""
    low: float | None = None
    """Lower end of the 95 % interval of `f1` over resampled documents; for `input` of `auprc` over resampled sentences;
    for `intruder`, `output` and `intervention` Wilson's of `accuracy`."""
    high: float | None = None
    """Upper end of it."""
    pieces: tuple[int, ...] = ()
    """Store index (row * T + position) of the first token of each judged piece or group, for pairing with other scores; of generated
    texts a hash of what was shown."""
    right: tuple[bool, ...] = ()
    """Whether each of them was judged rightly."""
    reason: str | None = None
    """Why generated texts gave no figures."""
