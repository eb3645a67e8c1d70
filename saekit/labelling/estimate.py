"""What a labelling run would ask and cost, before anything is sent."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saekit.labelling.chat import ChatReply, ChatRequest
from saekit.labelling.ledger import Ledger
from saekit.labelling.llmconfig import LLMConfig
from saekit.models import Tokenizer

__all__ = ["LLMEstimate", "estimate_requests", "token_counter"]

_TOKENS_PER_CHAT = 11
"""Marks of turns and roles around a system and a user message, in OpenAI's and most open models' formats."""
ENOUGH_ANSWERS = 5
"""Answers of a kind from which their own mean is the better guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LLMEstimate:
    """What a run would ask for if every first answer is usable; nothing is sent to find out."""

    num_requests: int
    num_answered: int
    """Further requests that the ledger answers already."""
    input_tokens: int
    output_tokens: int
    most_output_tokens: int
    """If every answer were as long as allowed."""
    cost: float | None
    """In dollars; None without prices."""
    most_cost: float | None

    def __add__(self, other: "LLMEstimate") -> "LLMEstimate":
        """Returns what both would take; a cost is known only if both are."""

        def total(one: float | None, two: float | None) -> float | None:
            return None if one is None or two is None else one + two

        return LLMEstimate(
            num_requests=self.num_requests + other.num_requests,
            num_answered=self.num_answered + other.num_answered,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            most_output_tokens=self.most_output_tokens + other.most_output_tokens,
            cost=total(self.cost, other.cost),
            most_cost=total(self.most_cost, other.most_cost),
        )

    def __str__(self) -> str:
        known = f" ({self.num_answered:,} more are answered already)" if self.num_answered else ""
        cost = "no price known" if self.cost is None else f"about ${self.cost:.4f}, at most ${self.most_cost:.4f}"
        return (
            f"{self.num_requests:,} requests{known}, about {self.input_tokens:,} input and {self.output_tokens:,} output "
            f"tokens (at most {self.most_output_tokens:,}): {cost}"
        )


def token_counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """Returns a function that counts a text's tokens; texts seen before, as the fixed part of prompts, cost nothing."""
    known: dict[str, int] = {}

    def count(text: str) -> int:
        if text not in known:
            known[text] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return known[text]

    return count


def estimate_requests(
    requests: Sequence[ChatRequest], config: LLMConfig, *, count: Callable[[str], int], ledger: Ledger | None = None
) -> LLMEstimate:
    """Returns what requests would take.

    Equal requests are sent, and counted, once. Where the ledger has answers of the same kind, their own sizes correct the count: another tokenizer, what a server adds to
    a prompt, how long answers really are.

    Args:
        count: tokens of a text, see `token_counter`.
        ledger: None: nothing was asked before.
    """
    known: dict[str, list[tuple[int, ChatReply]]] = defaultdict(list)
    left: list[tuple[ChatRequest, int]] = []
    unlike = {request.key(): request for request in requests}
    for key, request in unlike.items():
        size = count(request.system) + count(request.user) + _TOKENS_PER_CHAT
        found = ledger.find(key) if ledger is not None else None
        if found is None:
            left.append((request, size))
        elif isinstance(found, ChatReply):
            known[request.purpose].append((size, found))
    factors = {
        purpose: sum(reply.input_tokens for _, reply in pairs) / sum(size for size, _ in pairs)
        for purpose, pairs in known.items()
        if len(pairs) >= ENOUGH_ANSWERS
    }
    input_tokens = sum(size * factors.get(request.purpose, 1.0) for request, size in left)
    output_tokens = sum(_answer_tokens(request, count, ledger) for request, _ in left)
    most = sum(request.max_output_tokens for request, _ in left)
    return LLMEstimate(
        num_requests=len(left),
        num_answered=len(unlike) - len(left),
        input_tokens=round(input_tokens),
        output_tokens=round(output_tokens),
        most_output_tokens=most,
        cost=config.cost(input_tokens, output_tokens),
        most_cost=config.cost(input_tokens, most),
    )


def _answer_tokens(request: ChatRequest, count: Callable[[str], int], ledger: Ledger | None) -> float:
    num, _, mean = ledger.mean_tokens(request.purpose) if ledger is not None else (0, 0.0, 0.0)
    return mean if num >= ENOUGH_ANSWERS else count(request.usual_answer)
