"""What differs from one OpenAI-compatible server to the next: options it refuses, and what its errors mean."""

import datetime
import email.utils
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from saekit.labelling.answers import whole_number
from saekit.labelling.chat import BYTES_PER_TOKEN, ChatReply, ChatRequest
from saekit.labelling.logprobs import of_answer
from saekit.labelling.pace import duration_seconds

__all__ = ["Complaint", "Dialect", "charged_tokens", "first_choice", "read_completion", "retry_after"]

FORMATS = ("none", "json_object", "json_schema")
MOST_ALTERNATIVES, FEWER_ALTERNATIVES = 20, 5
"""Alternatives of each token that OpenAI and vLLM give at most, and that older servers do."""
Verdict = Literal["rate", "later", "never", "stop"]
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "exceeded your current quota")
_TOO_LONG = ("context_length_exceeded", "context length", "context window", "maximum context", "too many tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Complaint:
    """An error that a server answered with."""

    status: int
    message: str
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """What it means: `rate`: slower; `later`: the same again may do; `never`: not this request; `stop`: none at all."""
        if self.status in {401, 402, 404} or (self.status == 403 and not self._says("moderation", "flagged")):
            return "stop"
        if self.status == 429:
            return "stop" if self.is_out_of_money else "rate"
        return "later" if self.status in {408, 409, 425} or self.status >= 500 else "never"

    @property
    def is_out_of_money(self) -> bool:
        """Whether the account cannot pay."""
        return self.status == 402 or self._says(*_NO_MONEY)

    @property
    def is_too_long(self) -> bool:
        """Whether the prompt is longer than the model reads."""
        return self._says(*_TOO_LONG)

    def _says(self, *parts: str) -> bool:
        text = f"{self.code} {self.message}".lower()
        return any(part in text for part in parts)

    def __str__(self) -> str:
        said = " ".join(self.message.removeprefix(f"Error code: {self.status} - ").split())[:200]
        return f"{self.status} {said}".rstrip()


class Dialect:
    """Learns from refusals which options a server takes; one for all requests to it."""

    def __init__(self) -> None:
        self.format = len(FORMATS) - 1
        self.is_proven = False
        self._token_key = "max_tokens"
        self._sends_temperature = True
        self._num_alternatives = MOST_ALTERNATIVES
        self._is_logprobs_told = False
        self._sends_seed = True

    def options(self, request: ChatRequest, answer_format: int) -> dict[str, object]:
        """Returns the options of a request beside model and messages."""
        options: dict[str, object] = {self._token_key: request.max_output_tokens}
        if self._sends_temperature:
            options["temperature"] = request.temperature
        if request.choices and self._num_alternatives:
            options |= {"logprobs": True, "top_logprobs": self._num_alternatives}
        if self._sends_seed and request.seed is not None:
            options["seed"] = request.seed
        if FORMATS[answer_format] == "json_schema":
            schema = {"name": request.schema_name, "strict": True, "schema": dict(request.schema)}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif FORMATS[answer_format] == "json_object":
            options["response_format"] = {"type": "json_object"}
        return options

    def is_settled(self, answer_format: int) -> bool:
        """Returns whether the server has answered in this format, or there is no plainer one."""
        return answer_format == 0 or (self.is_proven and answer_format == self.format)

    def accepted(self, answer_format: int) -> str | None:
        """An answer came in this format; returns what to tell the user where that is news."""
        is_news = answer_format < self.format
        if is_news or not self.is_proven:
            self.format, self.is_proven = answer_format, True
        taken = FORMATS[answer_format].replace("none", "plain text")
        return f"the server takes no {FORMATS[-1]}, so answers come as {taken}" if is_news else None

    def missing_logprobs(self, request: ChatRequest, reply: ChatReply) -> str | None:
        """Returns what to tell the user where logprobs were wanted and did not come, the first time."""
        if self._is_logprobs_told or reply.logprobs or not request.choices or not reply.text:
            return None
        self._is_logprobs_told = True
        return "no logprobs came with an answer; values are taken as they are written where that is so"

    def adapted(self, complaint: Complaint, answer_format: int, *, sent: Mapping[str, object]) -> int | None:
        """Returns the format to go on with after a refusal; None where nothing is left to change.

        Args:
            sent: the options that were refused; others may have been learnt since.
        """
        says = f"{complaint.code} {complaint.message}".lower()
        is_refused = complaint.status in {400, 415, 422} and not complaint.is_too_long
        if is_refused and "max_completion_tokens" in says and "max_tokens" in sent:
            self._token_key = "max_completion_tokens"
            return answer_format
        if is_refused and "temperature" in says and "temperature" in sent:
            self._sends_temperature = False
            return answer_format
        if "logprobs" in says and "logprobs" in sent and (is_refused or complaint.status == 403):
            # Some give fewer alternatives than OpenAI, some models none.
            has_less = "top_logprobs" in says and sent["top_logprobs"] == MOST_ALTERNATIVES
            self._num_alternatives = FEWER_ALTERNATIVES if has_less else 0
            return answer_format
        if is_refused and "seed" in says and "seed" in sent:
            self._sends_seed = False
            return answer_format
        is_proven = self.is_proven and answer_format == self.format
        speaks_of_it = any(word in says for word in ("response_format", "json", "schema", "format"))
        is_odd = complaint.status >= 500 and not self.is_settled(answer_format)
        if answer_format > 0 and ((is_refused and (speaks_of_it or not is_proven)) or is_odd):
            return answer_format - 1
        return None


def read_completion(
    body: Mapping[str, JsonValue], *, most_input: int, choices: Collection[str] = ()
) -> ChatReply | None:
    """Returns what a chat completion says; None where there is no choice in it.

    Args:
        choices: see `ChatRequest.choices`.
        most_input: input tokens to assume where it does not say what was charged.
    """
    choice = first_choice(body)
    if choice is None:
        return None
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    content, refusal = message.get("content"), message.get("refusal")
    text = content if isinstance(content, str) else ""
    charged = charged_tokens(body)
    guessed = most_input, int(len(text.encode()) / BYTES_PER_TOKEN) + 1
    usage = body.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = whole_number(details.get("cached_tokens")) if isinstance(details, dict) else None
    input_tokens, output_tokens = charged or guessed
    return ChatReply(
        text=text,
        finish_reason=str(choice.get("finish_reason")),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=min(cached or 0, input_tokens),
        is_estimated=charged is None,
        refusal=refusal if isinstance(refusal, str) else "",
        logprobs=of_answer(choice, choices) if choices else (),
    )


def first_choice(body: Mapping[str, JsonValue]) -> Mapping[str, JsonValue] | None:
    """Returns a completion's first choice; None where there is none."""
    listed = body.get("choices")
    choice = listed[0] if isinstance(listed, list) and listed else None
    return choice if isinstance(choice, dict) else None


def charged_tokens(body: Mapping[str, JsonValue]) -> tuple[int, int] | None:
    """Returns the input and output tokens that a completion was charged; None where it does not say."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    tokens = [whole_number(usage.get(key)) for key in ("prompt_tokens", "completion_tokens")]
    return (tokens[0], tokens[1]) if tokens[0] is not None and tokens[1] is not None else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that a server asks to wait: `retry-after-ms`, or `Retry-After` as a number or an HTTP date."""
    milliseconds = duration_seconds(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=datetime.UTC)
    return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())
