"""The question that gets probe sentences from a labelling model."""

import json
from collections.abc import Sequence

from pydantic import JsonValue

from saekit.labelling.answers import UnusableAnswerError, parse_object, plain_text, prompt_template
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label

__all__ = ["PROMPT", "ProbeWriter"]

PROMPT = "probe_v1"
TOKENS_PER_SENTENCE = 40

_SCHEMA: dict[str, JsonValue] = {
    "type": "object",
    "properties": {"sentences": {"type": "array", "items": {"type": "string"}}},
    "required": ["sentences"],
    "additionalProperties": False,
}


class ProbeWriter:
    """Asks for sentences that fit a label of the output side."""

    def __init__(self, config: LLMConfig, *, num: int) -> None:
        self._config = config
        self._num = num
        self._system = prompt_template(PROMPT)

    def request(self, label: Label, promoted: Sequence[str], *, attempt: int = 0) -> ChatRequest:
        """Returns the question about one feature, the same in every process."""
        says = [label.label, label.description] if label.status == "done" else []
        lines = [f"Description: {'. '.join(says)}"] if says else []
        lines += [f"Tokens it makes likely: {', '.join(promoted)}", f"Write {self._num} sentences."]
        return ChatRequest(
            model=self._config.model,
            system=self._system,
            user="\n".join(lines),
            schema_name="probe_sentences",
            schema=_SCHEMA,
            temperature=self._config.temperature,
            max_output_tokens=max(self._config.max_output_tokens, TOKENS_PER_SENTENCE * self._num)
            * (2 if attempt else 1),
            attempt=attempt,
            purpose="probe",
            feature=label.feature,
            usual_answer=json.dumps({"sentences": ["They rowed across the river and slept by the lake."] * self._num}),
        )

    def sentences(self, answers: Sequence[Answer], *, is_last: bool) -> list[str] | None:
        """Returns the sentences in the last answer, none where there are none to be had; None: ask again."""
        reply = answers[-1].reply
        if reply is None:
            return []
        try:
            is_cut = reply.finish_reason == "length"
            said = parse_object(reply.text, needs="sentences", is_cut=is_cut and is_last)["sentences"]
        except UnusableAnswerError:
            return [] if is_last else None
        texts = [" ".join(plain_text(item).split()) for item in said] if isinstance(said, list) else []
        found = [text for text in dict.fromkeys(texts) if text][: self._num]
        return found if found or is_last else None
