"""A server that simulates activations from a pattern, in writing or by logprobs, and reads texts; noisy and faulty on demand."""

import json
import math
import random
import re

from tests.saekit.labelling.noisyoracle import _word
from tests.saekit.labelling.stub import Fault

MARK = "\n\nText:\n"


class Simulating:
    """Responds to simulation and surprisal.

    Args:
        flip: probability with which each verdict on a token or a text is turned around; with `logprobs` the probability that is
            shown for the other number, and nothing is turned around.
        logprobs: None: none; `good`; or how they are wrong: `null`, `other`, `short`, `split` (a 10 is two tokens).
        reads: how it can be asked about texts that it reads: `echo`, `prompt_logprobs`, or None: a completion without either;
            an int: refused with that status.
    """

    def __init__(
        self, flip: float = 0.0, *, logprobs: str | None = None, reads: str | int | None = "echo", seed: int = 0
    ) -> None:
        self.flip, self.logprobs, self.reads = flip, logprobs, reads
        self._random = random.Random(seed)

    def __call__(self, body: dict[str, object], _: int) -> object:
        if "prompt" in body:
            return self._read(body)
        user = str(body["messages"][1]["content"])  # type: ignore[index]
        described, *_ = user.partition("\n\nPiece 1\n")
        tokens = re.findall(r"^(\d+) (.*)$", user, flags=re.MULTILINE)
        says = {number: self._fires(described, token) for number, token in tokens}
        shown = {n: 10 * (fires if self.logprobs else fires ^ self._flips()) for n, fires in says.items()}
        text = json.dumps(shown)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if self.logprobs and body.get("logprobs"):
            choice["logprobs"] = None if self.logprobs == "null" else {"content": self._listed(text)}
        return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}

    def _flips(self) -> bool:
        return self._random.random() < self.flip

    def _fires(self, described: str, token: str) -> bool:
        found = re.search(r"words: (\S+)", described)
        if found is None:
            return self._random.random() < 0.5
        return bool(re.fullmatch(rf"\W*{_word(found[1])}\W*", token))

    def _listed(self, text: str) -> list[dict[str, object]]:
        digits = r"10|\d+" if self.logprobs != "split" else r"\d"
        tokens = re.findall(rf"{digits}|\s|[^\s\d]+", text)
        if self.logprobs == "other":
            tokens = [f"{token}x" for token in tokens]
        listed = [self._entry(token, tokens[at - 1] if at else "") for at, token in enumerate(tokens)]
        return listed[: len(listed) // 2] if self.logprobs == "short" else listed

    def _entry(self, token: str, before: str) -> dict[str, object]:
        bare = token.removesuffix("x")
        if bare not in {"0", "1", "10"}:
            return {"token": token, "logprob": -0.1, "top_logprobs": []}
        if self.logprobs == "split" and before == "1":
            return {"token": token, "logprob": 0.0, "top_logprobs": [_one("0", 1.0)]}
        is_ten = bare != "0"
        ten = "1" if self.logprobs == "split" else "10"
        top = [_one(ten, 1 - self.flip if is_ten else self.flip), _one("0", self.flip if is_ten else 1 - self.flip)]
        return {"token": token, "logprob": -0.1, "top_logprobs": [one for one in top if one is not None]}

    def _read(self, body: dict[str, object]) -> object:
        if isinstance(self.reads, int):
            return Fault(self.reads)
        prompt = str(body["prompt"])
        tokens = re.findall(r"\?|\n+|[^\S\n]+|[^\s?]+|\s", prompt)
        choice: dict[str, object] = {"text": prompt, "finish_reason": "length"}
        numbers = self._numbers(prompt, tokens)
        if self.reads == "echo" and body.get("echo"):
            tops = [dict(top) for _, top in numbers]
            choice["logprobs"] = {
                "tokens": [*tokens, " end"],
                "token_logprobs": [None, *(number for number, _ in numbers[1:]), -1.0],
                "top_logprobs": [None, *tops[1:], {}],
            }
        elif self.reads == "prompt_logprobs" and body.get("prompt_logprobs"):
            choice["prompt_logprobs"] = [
                None,
                *(
                    {
                        "7": {"logprob": number, "decoded_token": token},
                        **{str(n): {"logprob": p, "decoded_token": t} for n, (t, p) in enumerate(top, start=90)},
                    }
                    for token, (number, top) in list(zip(tokens, numbers, strict=True))[1:]
                ),
            ]
        return {"choices": [choice], "usage": {"prompt_tokens": len(tokens), "completion_tokens": 1}}

    def _numbers(self, prompt: str, tokens: list[str]) -> list[tuple[float, list[tuple[str, float]]]]:
        """Returns for each token its logprob and the likeliest others."""
        if MARK in prompt:
            head, _, text = prompt.rpartition(MARK)
            found = re.search(r"words: (\S+)", head)
            fits = found is not None and bool(re.search(_word(found[1]), text)) ^ self._flips()
            return [(-1.0 if fits else -2.0, []) for _ in tokens]
        lines = re.findall(r'^(".*")\t\?', prompt, flags=re.MULTILINE)
        described = prompt.rpartition("Description:")[2].partition("\n")[0]
        fires = iter([self._fires(described, line) for line in lines])
        return [(-3.0, self._alternatives(next(fires)) if token == "?" else []) for token in tokens]

    def _alternatives(self, fires: bool) -> list[tuple[str, float]]:
        ten = 1 - self.flip if fires else self.flip
        listed = [_one("10", ten), _one("0\n", 1 - ten)]
        return [(str(one["token"]), float(one["logprob"])) for one in listed if one is not None]  # type: ignore[arg-type]


def _one(token: str, probability: float) -> dict[str, object] | None:
    return {"token": token, "logprob": math.log(probability)} if probability > 0 else None
