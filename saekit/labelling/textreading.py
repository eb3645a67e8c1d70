"""How servers are asked what they make of a text that they only read: completions that echo it, or vLLM's `prompt_logprobs`."""

from collections.abc import Mapping

from pydantic import JsonValue

from saekit.labelling.asking import LabellingModel
from saekit.labelling.chat import ChatReply, ChatRequest
from saekit.labelling.dialect import MOST_ALTERNATIVES, Complaint, Dialect, charged_tokens, first_choice
from saekit.labelling.logprobs import of_prompt, of_prompt_echoed

__all__ = ["READS_NOTHING", "ReadingDialect", "probe_request", "read_reading", "why_unread"]

READINGS = ("prompt_logprobs", "echo")
"""The last one is tried first."""
READS_NOTHING = Complaint(status=422, message="no logprobs of the prompt in the completion")
"""In place of an answer from a server that passes over the option."""
_CANNOT = {400, 403, 404, 405, 415, 422, 500, 501}


class ReadingDialect(Dialect):
    """Learns from refusals how a server is asked for a text's logprobs."""

    def __init__(self) -> None:
        super().__init__()
        self.format = len(READINGS) - 1

    def options(self, request: ChatRequest, answer_format: int) -> dict[str, object]:
        """Returns the body of a completion beside the model."""
        num = self._num_alternatives if request.choices else 1
        options: dict[str, object] = {"prompt": request.user, "max_tokens": 1, "temperature": 0.0}
        if READINGS[answer_format] == "echo":
            return options | {"echo": True, "logprobs": num}
        return options | {"prompt_logprobs": num}

    def accepted(self, answer_format: int) -> str | None:
        """See `Dialect.accepted`; which way it is asked is no news to the user."""
        self.format, self.is_proven = answer_format, True
        return None

    def adapted(self, complaint: Complaint, answer_format: int, *, sent: Mapping[str, object]) -> int | None:
        """See `Dialect.adapted`."""
        is_refused = complaint.status in {400, 422}
        has_less = self._num_alternatives not in {0, 1} and MOST_ALTERNATIVES in sent.values()
        if is_refused and has_less and "logprobs" in complaint.message and complaint is not READS_NOTHING:
            self._num_alternatives = 5
            return answer_format
        if not self.is_proven and complaint.status in _CANNOT and not complaint.is_too_long and answer_format > 0:
            return answer_format - 1
        return None

    def is_settled(self, answer_format: int) -> bool:
        """See `Dialect.is_settled`; a server that fails at every text is not asked for long."""
        return self.is_proven

    def cannot(self, complaint: Complaint) -> bool:
        """Returns whether a complaint says that the server reads no texts, and not that it answers nobody."""
        return not self.is_proven and complaint.status in _CANNOT


def read_reading(body: Mapping[str, JsonValue], request: ChatRequest, sent: Mapping[str, object]) -> ChatReply | None:
    """Returns how likely a text's tokens are by a completion; None where it does not say.

    Args:
        sent: the options that the request was sent with.
    """
    choice, charged = first_choice(body) or {}, charged_tokens(body)
    if "echo" in sent:
        found = of_prompt_echoed(choice, request.choices, num_prompt=None if charged is None else charged[0])
    else:
        found = of_prompt(choice, request.choices)
    # The first token has no number anywhere.
    if len(found) < 2 or all(token.logprob is None for token in found):
        return None
    input_tokens, output_tokens = charged or (len(found), 1)
    return ChatReply(
        text="",
        finish_reason="read",
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        is_estimated=charged is None,
        logprobs=found,
    )


def probe_request(model: str) -> ChatRequest:
    """Returns a short text to read, by which it is seen whether a model's server reads any."""
    return ChatRequest.reading(model, "One, two, three, four, five.", purpose="probe:reading")


def why_unread(model: LabellingModel) -> str | None:
    """Asks once whether a model says how likely a text's tokens are; returns why it does not, None where it does.

    Raises:
        LabelerError: the model cannot be used, or a cap is reached.
    """
    probe = probe_request(model.config.model)
    (answer,) = model.ask([probe])
    if answer.reply is not None:
        return None
    # Another server of the same model may do better.
    model.ledger.retry(probe.purpose, probe.feature)
    return answer.reason
