"""What answers for the language model in scripts/bench_autointerp: the planted truth, or a rule that reads neither label nor text."""

import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from tests.saekit.labelling.stub import Fault, completion

__all__ = ["RULES", "Kind", "Oracle"]

Kind = Literal["explain", "judge"]
FAULT_AT = 5
"""Number of the request of its kind that fails."""


def texts_of(listed: str) -> list[str]:
    """Returns the numbered texts that a judge is shown, in any of the three forms."""
    return re.findall(r"^(?:Example )?\d+[.:] ?(.*)$", listed, flags=re.MULTILINE)


def marked_place(text: str) -> int:
    """Returns how many words stand before the first mark."""
    return len(re.split("<<|\u00ab", text)[0].split())


RULES: dict[str, Callable[[list[str]], list[bool]]] = {
    "always yes": lambda texts: [True] * len(texts),
    "always no": lambda texts: [False] * len(texts),
    "the first half": lambda texts: [2 * number < len(texts) for number in range(len(texts))],
    "longer than the middle one": lambda texts: [
        len(text) > sorted(map(len, texts))[len(texts) // 2] for text in texts
    ],
    "not marked at word 24": lambda texts: [
        "<<" not in text.replace("\u00ab", "<<") or marked_place(text) != 24 for text in texts
    ],
}
"""What reads neither label nor words, and says which texts are active."""


JUDGED = {"saekit": "Pieces:\n", "saebench": "Here are the examples:", "delphi": "Text examples:"}
"""By library: what stands before the texts that are to be judged, and in no request for an explanation."""


class Oracle:
    """Answers all three libraries: explains by the word that is marked most, judges by the word, or by a rule instead.

    Args:
        rule: of RULES; None: the truth.
        seconds: until an answer.
        fault: what is asked by the request that gets one HTTP 429; None: none does.
    """

    def __init__(self, rule: str | None = None, seconds: float = 0.0, fault: Kind | None = None) -> None:
        self._rule = RULES[rule] if rule else None
        self._seconds = seconds
        self._fault = fault
        self._numbers = itertools.count()

    def __call__(self, body: dict[str, Any], number: int) -> str | dict[str, object] | Fault:
        """Returns the answer, with the tokens that it cost: words and signs."""
        time.sleep(self._seconds)
        messages = [str(message["content"]) for message in body["messages"]]
        kind = "judge" if any(start in messages[-1] for start in JUDGED.values()) else "explain"
        if kind == self._fault and next(self._numbers) == FAULT_AT:
            return Fault(429, headers={"Retry-After": "1"})
        answer = self._answer(messages)
        whole = completion(answer)
        counts = [len(re.findall(r"\w+|[^\w\s]", text)) for text in ("\n".join(messages), answer)]
        whole["usage"] = {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
        return whole

    def _answer(self, messages: list[str]) -> str:
        user = messages[-1]
        for dialect, start in JUDGED.items():
            described, found, listed = user.partition(start)
            if found:
                return self._judge(dialect, described, texts_of(listed))
        marked = re.findall(r"(?:<<|\u00ab)(.*?)(?:>>|\u00bb)", user)
        word = Counter(part for text in marked for part in text.split()).most_common(1)[0][0]
        if "json" in messages[0].lower():
            return json.dumps(
                {"label": f"the word '{word}'", "fires_on": word, "promotes": "", "suppresses": "", "confidence": 1}
            )
        return f"[EXPLANATION]: activates on the word '{word}'"

    def _judge(self, dialect: str, described: str, texts: list[str]) -> str:
        if self._rule is not None:
            says = self._rule(texts)
        else:
            word = re.findall(r"the word '(\w+)'", described)[-1:] or ["nothing"]
            marks = [re.findall(r"(?:<<|\u00ab)(.*?)(?:>>|\u00bb)", text) for text in texts]
            says = [word[0] in " ".join(own or [text]).split() for own, text in zip(marks, texts, strict=True)]
        if dialect == "delphi":
            return json.dumps([int(one) for one in says])
        if dialect == "saebench":
            return ", ".join(str(number) for number, one in enumerate(says, 1) if one) or "None"
        return json.dumps({"answers": [{"id": number, "active": one} for number, one in enumerate(says, 1)]})
