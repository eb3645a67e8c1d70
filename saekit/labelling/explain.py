"""The labelers that ask a language model: evidence of one feature in, one structured answer out."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import JsonValue

from saekit.labelling.answers import UnusableAnswerError, parse_object, plain_text, prompt_template, share, whole_number
from saekit.labelling.chat import Answer, ChatReply, ChatRequest
from saekit.labelling.contexts import Context, FeatureContexts
from saekit.labelling.evidence.effects import TokenEffects
from saekit.labelling.evidence.wording import EffectsOf, EvidenceText
from saekit.labelling.examples import Example, ExampleReader
from saekit.labelling.llmconfig import ExplainerKind, LLMConfig
from saekit.labelling.records import Label

__all__ = ["PROMPTS", "Explainer", "joined_label", "llm_labeler"]

PROMPTS: dict[ExplainerKind, str] = {
    "input": "explain_v2",
    "raw": "explain_v2",
    "vocabproj": "explain_output_v1",
    "tokenchange": "explain_output_v1",
}
"""Prompt file of each kind that asks; its name stands in the labels."""
AGAIN_PROMPT = "again_v1"
CONTRAST_PROMPT = "contrast_v1"
LABEL_CHARACTERS = 120
MAX_EXAMPLES = 5

_SCHEMA: dict[str, JsonValue] = {
    "type": "object",
    "properties": {
        "label": {"type": "string"},
        "fires_on": {"type": "string"},
        "promotes": {"type": "string"},
        "suppresses": {"type": "string"},
        "description": {"type": "string"},
        "confidence": {"type": "number"},
        "examples": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["label", "fires_on", "promotes", "suppresses", "description", "confidence", "examples"],
    "additionalProperties": False,
}
USUAL_ANSWER = (
    '{"label": "names of rivers and lakes in Europe", "fires_on": "Words for rivers, lakes and other inland waters, mostly in '
    'names of places.", "promotes": "names of rivers, valleys and towns", "suppresses": "words of the sea", "description": "The '
    "feature is active on words for inland waters, most of all in the names of rivers, and weakly on bridges and valleys. It "
    'makes the names of towns by a river more likely.", "confidence": 0.85, "examples": [1, 2, 4, 12]}'
)
"""Of the usual length, for estimates."""


def llm_labeler(config: LLMConfig, kind: ExplainerKind = "raw") -> str:
    """Returns the labeler's name as it stands in labels and scores: `llm:<model>`, with `:<kind>` for all but `raw`."""
    return f"llm:{config.model}" if kind == "raw" else f"llm:{config.model}:{kind}"


class Explainer:
    """Makes the questions about features of one kind, and labels of their answers.

    Attributes:
        prompts: prompt file of each kind that asks.
        schema: of an answer, with the key `needs`.
        usual_answer: for estimates.
    """

    prompts: ClassVar[Mapping[ExplainerKind, str]] = PROMPTS
    schema: ClassVar[dict[str, JsonValue]] = _SCHEMA
    needs: ClassVar[str] = "label"
    usual_answer: ClassVar[str] = USUAL_ANSWER

    def __init__(
        self,
        reader: ExampleReader,
        contexts: FeatureContexts,
        config: LLMConfig,
        *,
        kind: ExplainerKind = "raw",
        effects: EffectsOf = lambda _: (),
        counter: Mapping[int, Sequence[Context]] | None = None,
    ) -> None:
        """
        Args:
            counter: places at which a feature is silent, on the whole row, that are shown for contrast.
        """
        self.kind = kind
        self.labeler = llm_labeler(config, kind)
        self.purpose = f"explain:{kind}"
        self._config = config
        self._contexts = contexts
        self._reader = reader
        self._effects = effects
        self._evidence = EvidenceText(reader, contexts, config)
        self._counter = counter if counter is not None and kind in {"input", "raw"} else {}
        names = [self.prompts[kind], *([CONTRAST_PROMPT] if self._counter else [])]
        self._prompt_version = "+".join(names)
        self._system = "".join(prompt_template(name).rstrip("\n") for name in names) + "\n"
        self._again = prompt_template(AGAIN_PROMPT).rstrip()

    def has_evidence(self, feature: int) -> bool:
        """Returns whether there is anything of the kind to be asked about."""
        fires = self.kind in {"input", "raw"} and bool(self._contexts.firing_count[feature] > 0)
        return fires or bool(self._effects_shown(feature))

    def request(self, feature: int, *, attempt: int = 0, candidate: int = 0) -> ChatRequest:
        """Returns the question about a feature that has evidence, the same in every process.

        Args:
            candidate: all but number 0 are sampled.
        """
        config = self._config
        return ChatRequest(
            model=config.model,
            system=self._system,
            user="\n".join([*self._lines(feature), *self._contrast(feature)]) + (self._again if attempt else ""),
            schema_name="feature_label",
            schema=self.schema,
            temperature=config.candidate_temperature if candidate else config.temperature,
            max_output_tokens=config.max_output_tokens * (2 if attempt else 1),
            attempt=attempt + candidate * config.attempts,
            seed=config.seed + candidate if candidate else None,
            purpose=self.purpose,
            feature=feature,
            usual_answer=self.usual_answer,
        )

    def _effects_shown(self, feature: int) -> list[TokenEffects]:
        found = self._effects(feature) if self.kind != "input" else ()
        return [effects for effects in found if self._is_shown(effects)]

    def _is_shown(self, effects: TokenEffects) -> bool:
        return self.kind in {"raw", effects.kind}

    def _shown(self, feature: int) -> list[Example]:
        """Returns the texts that are read for a feature, in the order of their numbers."""
        top, spread = self._evidence.shown(feature)
        return [*top, *spread]

    def _lines(self, feature: int) -> list[str]:
        lines = self._evidence.texts(feature) if self.kind in {"input", "raw"} else []
        for effects in self._effects_shown(feature):
            lines += [*([""] if lines else []), *self._evidence.tokens(feature, effects)]
        return lines

    def _silent(self, feature: int) -> list[Example]:
        """Returns the texts for contrast."""
        return [self._reader.of_context(context, max_act=0.0) for context in self._counter.get(feature, ())]

    def _contrast(self, feature: int) -> list[str]:
        texts = [self._reader.vocabulary.join(example.tokens) for example in self._silent(feature)]
        lines = [f"- {' '.join(text.split())}" for text in texts]
        return ["\nTexts on which the feature is silent:", *lines] if lines else []

    def documents_shown(self, feature: int) -> set[int]:
        """Returns the documents that are read for a feature."""
        if self.kind not in {"input", "raw"}:
            return set()
        return {example.document for example in (*self._shown(feature), *self._silent(feature))}

    def label(self, feature: int, answers: Sequence[Answer], *, is_last: bool) -> Label | None:
        """Returns the label in the last of the answers about a feature.

        Args:
            answers: one for each attempt.
            is_last: there will be no other attempt.

        Returns:
            A failed label, with the reason, where the request failed or the last attempt cannot be used; None: ask again.
        """
        reply, reason = answers[-1].reply, answers[-1].reason
        values: Mapping[str, JsonValue] = {}
        if reply is not None:
            try:
                values = self._values(reply, may_be_cut=is_last)
            except UnusableAnswerError as error:
                if not is_last:
                    return None
                reason = str(error)
        return self._made(feature, values, reason, [answer.reply for answer in answers if answer.reply is not None])

    def _values(self, reply: ChatReply, *, may_be_cut: bool) -> dict[str, JsonValue]:
        is_cut = reply.finish_reason == "length"
        try:
            values = parse_object(reply.text, needs=self.needs, is_cut=is_cut and may_be_cut)
        except UnusableAnswerError as error:
            if reply.refusal:
                raise UnusableAnswerError(
                    f"the model would not answer: {' '.join(reply.refusal.split())[:200]}"
                ) from error
            raise UnusableAnswerError("answer cut off at its longest" if is_cut else str(error)) from error
        if not plain_text(values[self.needs]):
            raise UnusableAnswerError(f"empty {self.needs}")
        return values

    def _made(self, feature: int, values: Mapping[str, JsonValue], reason: str, replies: Sequence[ChatReply]) -> Label:
        costs = [reply.cost for reply in replies if reply.cost is not None]
        label = " ".join(plain_text(values.get(self.needs)).split())[:LABEL_CHARACTERS]
        fires_on, promotes, suppresses = (plain_text(values.get(key)) for key in ("fires_on", "promotes", "suppresses"))
        parts = [fires_on or label]
        parts += [f"Makes more likely: {promotes}"] if promotes else []
        parts += [f"Makes less likely: {suppresses}"] if suppresses else []
        composed = " ".join(part.rstrip(".") + "." for part in parts)
        return Label(
            feature=feature,
            labeler=self.labeler,
            label=label,
            description=(plain_text(values.get("description")) or composed) if values else "",
            fires_on=fires_on,
            promotes=promotes,
            suppresses=suppresses,
            confidence=share(values.get("confidence")),
            examples=self._examples(feature, values.get("examples")),
            evidence=self.kind,
            prompt_version=self._prompt_version,
            model=self._config.model,
            input_tokens=sum(reply.input_tokens for reply in replies),
            output_tokens=sum(reply.output_tokens for reply in replies),
            cost=sum(costs) if costs else None,
            status="done" if values else "failed",
            reason=None if values else reason,
        )

    def _examples(self, feature: int, said: JsonValue) -> tuple[int, ...]:
        """Returns the places in the store of the examples that an answer names by their numbers."""
        if self.kind not in {"input", "raw"} or not isinstance(said, list):
            return ()
        shown = self._shown(feature)
        numbers = dict.fromkeys(number for item in said if (number := whole_number(item)) is not None)
        return tuple(shown[number - 1].flat for number in numbers if 1 <= number <= len(shown))[:MAX_EXAMPLES]


def joined_label(feature: int, parts: Sequence[Label], config: LLMConfig) -> Label:
    """Returns the `concat` ensemble: the descriptions of other labels of a feature, joined; failed where none is done.

    Source: Gur-Arieh et al. 2025 (arXiv 2501.08319), "Ensemble Concat": no further question is asked.
    """
    done = [part for part in parts if part.status == "done"]
    by_kind = {part.evidence: part for part in done}
    output_side = [by_kind[kind] for kind in ("tokenchange", "vocabproj") if kind in by_kind]
    costs = [part.cost for part in parts if part.cost is not None]
    sides = {
        side: next((getattr(p, side) for p in output_side if getattr(p, side)), "")
        for side in ("promotes", "suppresses")
    }
    return Label(
        feature=feature,
        labeler=llm_labeler(config, "concat"),
        label=" / ".join(dict.fromkeys(part.label for part in done))[:LABEL_CHARACTERS],
        description="\n".join(part.description for part in done),
        fires_on=by_kind["input"].fires_on if "input" in by_kind else "",
        promotes=sides["promotes"],
        suppresses=sides["suppresses"],
        confidence=max((part.confidence for part in done if part.confidence is not None), default=None),
        examples=by_kind["input"].examples if "input" in by_kind else (),
        evidence="concat",
        prompt_version="+".join(sorted({str(part.prompt_version) for part in done})) or None,
        model=config.model,
        cost=sum(costs) if costs else None,
        input_tokens=sum(part.input_tokens for part in parts),
        output_tokens=sum(part.output_tokens for part in parts),
        status="done" if done else "failed",
        reason=None if done else "none of its parts is labelled",
    )
