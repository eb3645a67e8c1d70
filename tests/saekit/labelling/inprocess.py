"""A labelling model in the test's own process, for tests of what is asked and made of answers and not of how it is sent."""

import json
from collections.abc import Sequence

from saekit.labelling.chat import ChatReply, ChatRequest, Desk
from saekit.labelling.textreading import read_reading
from tests.saekit.labelling.stub import Fault, Responder


class InProcess:
    """Answers as a `StubServer` with the same responder would, and keeps the bodies that it would have got."""

    def __init__(self, respond: Responder) -> None:
        self.respond = respond
        self.requests: list[dict[str, object]] = []

    async def answer(self, requests: Sequence[ChatRequest], desk: Desk) -> None:
        for request in requests:
            options: dict[str, object] = {"echo": True, "logprobs": len(request.choices)}
            messages = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
            body = {"prompt": request.user, **options} if request.reads else {"messages": messages}
            desk.sending(request)
            self.requests.append(body)
            reply = _reply(self.respond(body, len(self.requests) - 1), request, options)
            if reply is None:
                desk.failed(request, "no usable completion")
            else:
                desk.answered(request, reply)

    async def close(self) -> None:
        """Holds nothing."""


def _reply(answer: object, request: ChatRequest, options: dict[str, object]) -> ChatReply | None:
    if isinstance(answer, Fault):
        return None
    if request.reads:
        return read_reading(json.loads(json.dumps(answer)), request, options)
    assert isinstance(answer, str), "whole completions are a server's"
    return ChatReply(text=answer, finish_reason="stop", input_tokens=100, output_tokens=10)
