"""Best of n: several labels of one feature, of which a scorer keeps the one that does best on documents of their own.

The documents are the training view's, and are taken out of everything that the explainer reads: what chooses among labels has
seen neither what they were made from nor the held-out documents that they are scored on in the end.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from saekit.activations import StoreView
from saekit.labelling.asking import LabellingModel, ask_in_rounds
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.contexts import Context, FeatureContexts
from saekit.labelling.explain import Explainer
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.negatives import near_negatives
from saekit.labelling.records import Label, Score
from saekit.labelling.scoring.detection import PieceScorer
from saekit.labelling.scoring.pieces import Piece
from saekit.labelling.scoring.rule import HeldOut, RuleScoringConfig
from saekit.labelling.scoring.scorers import make_scorers
from saekit.labelling.vocabulary import Vocabulary
from saekit.sae import SAE

__all__ = ["Selection", "choose_among", "explain_best", "split_selection"]

MAX_SIBLINGS = 8


def split_selection(view: StoreView, *, fraction: float, seed: int) -> tuple[StoreView, StoreView]:
    """Returns the part of a view that labels are made from, and the documents that the best of them is chosen on.

    The second gets at least one document, and leaves at least one.
    """
    documents = np.random.default_rng(seed).permutation(view.documents)
    chosen = documents[: min(max(1, round(fraction * len(documents))), max(1, len(documents) - 1))]
    is_chosen = np.isin(view.store.documents(), chosen)
    return StoreView(view.store, view.mask & ~is_chosen), StoreView(view.store, view.mask & is_chosen)


class Selection:
    """Scores candidates on the documents that are kept for it.

    Attributes:
        view: these documents.
        scorer: asks about them.
    """

    def __init__(self, sae: SAE, view: StoreView, vocabulary: Vocabulary, config: LLMConfig) -> None:
        """Encodes the documents once."""
        self.view = view
        held_out = HeldOut(sae, view, vocabulary, config=RuleScoringConfig(seed=config.seed))
        options = {"scorers": (config.selection_scorer,), "num_judged": config.num_selection}
        self.scorer: PieceScorer = make_scorers(held_out, config.model_copy(update=options))[0]

    def request(self, label: Label, pieces: Sequence[Piece], *, attempt: int = 0) -> ChatRequest:
        """Returns the question about one candidate."""
        (request,) = self.scorer.requests(label, pieces, attempt=attempt)
        return dataclasses.replace(request, purpose=f"select:{self.scorer.name}")


def choose_among(
    sae: SAE,
    view: StoreView,
    contexts: FeatureContexts,
    features: Sequence[int],
    *,
    vocabulary: Vocabulary,
    config: LLMConfig,
) -> tuple[FeatureContexts, dict[int, list[Context]], Selection | None]:
    """Returns the contexts that explainers may read, counter-examples for each feature, and what chooses among candidates.

    With one candidate these are all contexts, and nothing else. Else both are free of the documents that are kept for choosing;
    counter-examples are texts in which a feature's nearest siblings fire and it does not.

    Args:
        view: the training documents, which `contexts` were collected from.
    """
    if config.num_candidates == 1:
        return contexts, {}, None
    shown, kept = split_selection(view, fraction=config.selection_fraction, seed=config.seed)
    contexts = contexts.without(~shown.mask)
    num_siblings = min(MAX_SIBLINGS, sae.cfg.d_sae - 1)
    counter: dict[int, list[Context]] = {}
    if config.num_counter_examples and config.style == "saekit" and num_siblings:
        num = config.num_counter_examples
        counter = near_negatives(sae, shown, contexts, features, num=num, num_siblings=num_siblings)
    return contexts, counter, Selection(sae, kept, vocabulary, config)


@dataclasses.dataclass(slots=True)
class _Candidate:
    """One label of several, and what it took to choose among them."""

    label: Label
    replies: Sequence[Answer]
    score: Score | None = None

    @property
    def figure(self) -> float | None:
        """The scorer's average precision, or its F1 where it has none."""
        if self.score is None:
            return None
        return self.score.f1 if self.score.auprc is None else self.score.auprc


def explain_best(
    model: LabellingModel, explainer: Explainer, features: Sequence[int], selection: Selection
) -> dict[int, Label]:
    """Returns the best of `num_candidates` labels of each feature; among equals the first, whose temperature is the config's own.

    A feature that fires in too few of the selection's pieces keeps its first usable label. What a label took is that of all of
    its feature's candidates and of choosing among them.

    Raises:
        LabelerError: see `Ask.ask`; answers so far are in the ledger.
    """
    config = model.config
    jobs = [(feature, number) for feature in features for number in range(config.num_candidates)]
    made: dict[tuple[int, int], _Candidate] = {}

    def take(job: tuple[int, int], answers: Sequence[Answer], is_last: bool) -> bool:
        label = explainer.label(job[0], answers, is_last=is_last)
        if label is not None:
            made[job] = _Candidate(label, [])
        return label is not None

    ask_in_rounds(
        model,
        jobs,
        request=lambda job, attempt: explainer.request(job[0], attempt=attempt, candidate=job[1]),
        take=take,
        attempts=config.attempts,
    )
    _score(model, [made[job] for job in jobs if made[job].label.status == "done"], selection)
    return {
        feature: _chosen([made[feature, number] for number in range(config.num_candidates)], selection)
        for feature in features
    }


def _score(model: LabellingModel, candidates: Sequence[_Candidate], selection: Selection) -> None:
    pieces = {feature: selection.scorer.pieces(feature) for feature in {one.label.feature for one in candidates}}

    def take(one: _Candidate, answers: Sequence[Answer], is_last: bool) -> bool:
        one.score = selection.scorer.score(one.label, pieces[one.label.feature], answers, is_last=is_last)
        one.replies = list(answers)
        return one.score is not None

    ask_in_rounds(
        model,
        [one for one in candidates if pieces[one.label.feature]],
        request=lambda one, attempt: selection.request(one.label, pieces[one.label.feature], attempt=attempt),
        take=take,
        attempts=model.config.attempts,
    )


def _chosen(candidates: Sequence[_Candidate], selection: Selection) -> Label:
    usable = [one for one in candidates if one.label.status == "done"] or list(candidates)
    best = max(usable, key=lambda one: -1.0 if one.figure is None else one.figure)
    # Candidates that say the same are asked about once.
    replies = {answer.request.key(): answer.reply for one in candidates for answer in one.replies}
    took = [(one.label.input_tokens, one.label.output_tokens, one.label.cost) for one in candidates]
    took += [(reply.input_tokens, reply.output_tokens, reply.cost) for reply in replies.values() if reply is not None]
    costs = [cost for _, _, cost in took if cost is not None]
    return best.label.model_copy(
        update={
            "num_candidates": len(candidates),
            "selection_scorer": None if best.figure is None else selection.scorer.name,
            "selection_score": best.figure,
            "input_tokens": sum(tokens for tokens, _, _ in took),
            "output_tokens": sum(tokens for _, tokens, _ in took),
            "cost": sum(costs) if costs else None,
        }
    )
