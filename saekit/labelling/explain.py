"""The labeler that asks a language model: evidence of one feature in, one structured answer out."""

import math
from collections.abc import Sequence

from pydantic import JsonValue

from saekit.labelling.answers import UnusableAnswerError, parse_object, prompt_template
from saekit.labelling.chat import ChatReply, ChatRequest, LLMConfig, RequestFailedError
from saekit.labelling.contexts import Context, FeatureContexts
from saekit.labelling.evidence.effects import TokenEffects
from saekit.labelling.examples import Example, ExampleReader
from saekit.labelling.ledger import RecordedClient
from saekit.labelling.records import Label

__all__ = ["EXPLAIN_PROMPT", "Explainer", "llm_labeler"]

EXPLAIN_PROMPT = "explain_v1"
MARK_ABOVE = 0.3
"""Tokens are marked above this share of the example's own peak, so that weak examples show marks too.

Source: delphi's explainer (Paulo et al. 2024, arXiv 2410.13928) uses the same share.
"""
LABEL_CHARACTERS = 120

_SCHEMA: dict[str, JsonValue] = {
    "type": "object",
    "properties": {
        "label": {"type": "string"},
        "fires_on": {"type": "string"},
        "promotes": {"type": "string"},
        "suppresses": {"type": "string"},
        "confidence": {"type": "number"},
    },
    "required": ["label", "fires_on", "promotes", "suppresses", "confidence"],
    "additionalProperties": False,
}


def llm_labeler(config: LLMConfig) -> str:
    """Returns the labeler's name as it stands in labels and scores."""
    return f"llm:{config.model}"


class Explainer:
    """Asks for one label per feature."""

    def __init__(self, reader: ExampleReader, contexts: FeatureContexts, config: LLMConfig) -> None:
        self._reader = reader
        self._contexts = contexts
        self._config = config
        self._system = prompt_template(EXPLAIN_PROMPT)

    def request(self, feature: int, effects: TokenEffects | None, *, attempt: int = 0) -> ChatRequest:
        """Returns the question about a feature, the same in every process."""
        config = self._config
        return ChatRequest(
            model=config.model,
            system=self._system,
            user=self._evidence(feature, effects),
            schema_name="feature_label",
            schema=_SCHEMA,
            temperature=config.temperature,
            max_output_tokens=config.max_output_tokens * (2 if attempt else 1),
            attempt=attempt,
        )

    async def label(self, client: RecordedClient, feature: int, effects: TokenEffects | None) -> Label:
        """Returns the feature's label, or a failed one that says why.

        Raises:
            LabelerError: no request can be answered, or a cap is reached.
        """
        reason = ""
        for attempt in range(self._config.attempts):
            try:
                reply = await client.complete(
                    self.request(feature, effects, attempt=attempt), purpose=f"explain {feature}"
                )
                return self._read(feature, reply)
            except UnusableAnswerError as error:
                reason = str(error)
            except RequestFailedError as error:
                reason = str(error)
                break
        return Label(
            feature=feature,
            labeler=llm_labeler(self._config),
            prompt_version=EXPLAIN_PROMPT,
            model=self._config.model,
            status="failed",
            reason=reason,
        )

    def documents_shown(self, feature: int) -> set[int]:
        """Returns the documents that the explainer reads for a feature."""
        top, sample = self._shown(feature)
        return {example.document for example in (*top, *sample)}

    def _shown(self, feature: int) -> tuple[list[Example], list[Example]]:
        """Returns the strongest examples and those over the whole range, strong to weak, no document twice."""
        seen: set[int] = set()

        def fresh(contexts: Sequence[Context], limit: int) -> list[Example]:
            chosen: list[Example] = []
            for context in contexts:
                document = self._reader.document(context)
                if len(chosen) < limit and document not in seen:
                    seen.add(document)
                    chosen.append(self._reader.of_context(context, max_act=float(self._contexts.max_act[feature])))
            return chosen

        top = fresh(self._contexts.feature(feature), self._config.num_top)
        sample = self._contexts.sample(feature)
        # One of each stratum in turn: a feature with many weak firings still shows its strong ones.
        by_turn = sorted(range(len(sample)), key=lambda i: (_turn(sample, i), -sample[i].act))
        spread = fresh([sample[i] for i in by_turn], self._config.num_sample)
        return top, sorted(spread, key=lambda example: -example.acts[example.peak])

    def _evidence(self, feature: int, effects: TokenEffects | None) -> str:
        top, spread = self._shown(feature)
        largest = float(self._contexts.max_act[feature]) or 1.0
        lines = ["Strongest texts:"]
        lines += [f"{number}. {self._marked(example)}" for number, example in enumerate(top, start=1)]
        if spread:
            lines.append("\nTexts over the whole range:")
            lines += [
                f"{number}. [{round(10 * example.acts[example.peak] / largest)}] {self._marked(example)}"
                for number, example in enumerate(spread, start=1)
            ]
        if effects is not None:
            show = self._reader.vocabulary.show
            promoted = [show(token) for token, _ in effects.promoted(feature)[: self._config.num_effects]]
            suppressed = [show(token) for token, _ in effects.suppressed(feature)[: self._config.num_effects]]
            lines.append(f"\nMakes more likely, strongest first: {', '.join(promoted)}")
            lines.append(f"Makes less likely, strongest first: {', '.join(suppressed)}")
        return "\n".join(lines)

    def _marked(self, example: Example) -> str:
        """Returns the example as one line, neighbouring active tokens in one pair of marks."""
        bar = MARK_ABOVE * example.acts[example.peak]
        parts: list[str] = []
        is_open = False
        for token, act in zip(example.tokens, example.acts, strict=True):
            # The marks are the explainer's only sign of activity, so the text's own are made plain.
            text = (
                self._reader.vocabulary.text(token).replace("\u00ab", "<").replace("\u00bb", ">").replace("\n", "\\n")
            )
            bare = text.lstrip(" ")
            is_active = act > bar
            if is_active != is_open:
                parts.append(text[: len(text) - len(bare)] + "\u00ab" + bare if is_active else "\u00bb" + text)
            else:
                parts.append(text)
            is_open = is_active
        return "".join(parts).strip() + ("\u00bb" if is_open else "")

    def _read(self, feature: int, reply: ChatReply) -> Label:
        try:
            values = parse_object(reply.text, needs="label")
        except UnusableAnswerError as error:
            cut = reply.finish_reason == "length"
            raise UnusableAnswerError("answer cut off at its longest" if cut else str(error)) from error
        label = " ".join(_text(values["label"]).split())[:LABEL_CHARACTERS]
        if not label:
            raise UnusableAnswerError("empty label")
        fires_on, promotes, suppresses = (_text(values.get(key)) for key in ("fires_on", "promotes", "suppresses"))
        parts = [fires_on or label]
        parts += [f"Makes more likely: {promotes}"] if promotes else []
        parts += [f"Makes less likely: {suppresses}"] if suppresses else []
        return Label(
            feature=feature,
            labeler=llm_labeler(self._config),
            label=label,
            description=" ".join(part.rstrip(".") + "." for part in parts),
            fires_on=fires_on,
            promotes=promotes,
            suppresses=suppresses,
            confidence=_share(values.get("confidence")),
            prompt_version=EXPLAIN_PROMPT,
            model=self._config.model,
        )


def _turn(sample: Sequence[Context], place: int) -> int:
    """Returns how many of the same stratum come before a context."""
    return sum(context.stratum == sample[place].stratum for context in sample[:place])


def _text(value: JsonValue) -> str:
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return value.strip() if isinstance(value, str) else ""


def _share(value: JsonValue) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        return None
    return min(max(number, 0.0), 1.0) if math.isfinite(number) else None
