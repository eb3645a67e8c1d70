"""A judge that obeys the description it is given to the letter, and lies about each item with a set probability.

Descriptions are patterns, `words: PATTERN`, so that what an honest judge says is known; without a pattern it tosses a coin.
"""

import json
import random
import re

PATTERNS = {"river": "[Rr]iver|lake", "quasar": "quasar", "digit": "[0-9]"}
"""Planted feature -> the whole truth about it."""
_MORE = "bank|mill|town|road|hill|tree|big|small|red|green|blue|gray|song|music|run|walk"
BROAD = {"river": f"[Rr]iver|lake|{_MORE}", "digit": f"[0-9]|{_MORE}"}
NARROW = {"river": "River", "digit": "[12]"}
UNRELATED = "piano|sleep|gray"


def describe(pattern: str) -> str:
    """Returns the label that stands for a pattern."""
    return f"words: {pattern}"


class NoisyOracle:
    """Responds to every scorer.

    Args:
        flip: probability with which each verdict is turned around; a named intruder is replaced by another place.
        truth: the pattern by which it looks for intruders, for which it gets no description.
    """

    def __init__(self, flip: float, *, truth: str = "", seed: int = 0) -> None:
        self._flip = flip
        self._truth = truth
        self._random = random.Random(seed)

    def __call__(self, body: dict[str, object], _: int) -> str:
        user = str(body["messages"][1]["content"])  # type: ignore[index]
        if user.startswith("Group 1"):
            return json.dumps({"answers": [self._intruder(group) for group in user.split("\n\n")]})
        described, _, listed = user.partition("\n\nPieces:\n")
        found = re.search("words: (.*)", described)
        return json.dumps(
            {
                "answers": [
                    {"id": int(number), "active": self._verdict(found[1] if found else None, text)}
                    for number, text in re.findall(r"^(\d+)\. (.*)$", listed, flags=re.MULTILINE)
                ]
            }
        )

    def _verdict(self, pattern: str | None, text: str) -> bool:
        if pattern is None:
            return self._random.random() < 0.5
        marked = re.findall("\u00ab(.*?)\u00bb", text)
        word = _word(pattern)
        says = (
            all(re.fullmatch(rf"(?:\W*{word})+\W*", span) for span in marked) if marked else bool(re.search(word, text))
        )
        return says ^ (self._random.random() < self._flip)

    def _intruder(self, group: str) -> dict[str, object]:
        number, *lines = group.splitlines()
        lacking = [line[1] for line in lines if not re.search(_word(self._truth), line[4:])]
        said = lacking[0] if len(lacking) == 1 else "a"
        if self._random.random() < self._flip:
            said = self._random.choice([letter for letter in "abcde" if letter != said])
        return {"id": int(number.split()[1]), "intruder": said}


def _word(pattern: str) -> str:
    """Whole words, but digits wherever they stand."""
    return rf"(?:\b|(?<=\d))(?:{pattern})(?:\b|(?=\d))"
