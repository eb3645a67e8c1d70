"""A labelling model in this process: any causal LM through transformers; for questions it needs a chat template."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor

from saekit.errors import ModelError
from saekit.labelling.chat import ChatReply, ChatRequest, Desk, SpentError
from saekit.labelling.dialect import MOST_ALTERNATIVES
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.logprobs import TokenLogprob, pooled
from saekit.labelling.vocabulary import Vocabulary
from saekit.models import LanguageModel, load_model, logits

__all__ = ["LocalChat"]


class _Generator(Protocol):
    """What is used of a transformers model beside its forward."""

    def generate(self, input_ids: Tensor, **options: object) -> Tensor:
        """Prompts [B, T] -> prompts with what was written after them [B, T + n]."""


class _ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer beside encoding."""

    chat_template: str | None

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: object) -> str:
        """The conversation as the model was trained to read it."""


class LocalChat:
    """A `ChatClient` that runs a model of transformers; greedy at temperature 0, else sampled with the request's own seed."""

    def __init__(self, config: LLMConfig, *, lm: LanguageModel | None = None, chats: bool = True) -> None:
        """Loads the model.

        Args:
            lm: a model that is loaded already; None: the one that `config.model` names.
            chats: whether it will be asked questions, and not just given texts to read.

        Raises:
            ModelError: it cannot be loaded, or has no chat template.
        """
        self._config = config
        self._lm = lm if lm is not None else load_model(config.model)
        self._tokenizer = cast(_ChatTokenizer, self._lm.tokenizer)
        if chats and not getattr(self._tokenizer, "chat_template", None):
            raise ModelError(
                f"labelling model {config.model!r}: no chat template, needs a model that was trained to chat"
            )

    async def answer(self, requests: Sequence[ChatRequest], desk: Desk) -> None:
        """See `ChatClient.answer`."""
        # Of one length together, as padding is computed for nothing; sampled ones alone, as each has a seed of its own.
        prompts = {
            request.key(): self._text(request) if request.reads else self._prompt(request) for request in requests
        }
        order = sorted(requests, key=lambda request: (request.reads, len(prompts[request.key()]), request.key()))
        while order:
            is_alone = order[0].temperature > 0 or order[0].reads
            together = [request for request in order[: self._config.local_batch] if request.reads == order[0].reads]
            chunk = _sendable(together[:1] if is_alone else together, desk)
            order = order[len(chunk) :]
            for request, reply in zip(chunk, self._replies(chunk, [prompts[r.key()] for r in chunk]), strict=True):
                if reply is None:
                    desk.unanswered(request, (0, 0))
                    desk.failed(request, f"labelling model {self._config.model!r}: question longer than its context")
                else:
                    desk.answered(request, reply)

    async def close(self) -> None:
        """See `ChatClient.close`."""

    def _prompt(self, request: ChatRequest) -> list[int]:
        conversation = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        try:
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            # Templates are programs of their authors; those without a system role say so in their own ways.
            joined = [{"role": "user", "content": f"{request.system}\n\n{request.user}"}]
            if type(error).__name__ != "TemplateError":
                raise
            text = self._tokenizer.apply_chat_template(joined, tokenize=False, add_generation_prompt=True)
        return self._ids(text, has_specials=False)

    def _text(self, request: ChatRequest) -> list[int]:
        return self._ids(request.user, has_specials=True)

    def _ids(self, text: str, *, has_specials: bool) -> list[int]:
        ids = self._lm.tokenizer(text, add_special_tokens=has_specials)["input_ids"]
        return [int(str(token)) for token in ids]

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._lm.tokenizer)

    def _logprobs(self, ids: Sequence[int], request: ChatRequest, *, start: int) -> tuple[TokenLogprob, ...]:
        """Returns how likely the tokens from `start` on are, each after those before it."""
        known = torch.log_softmax(logits(self._lm, torch.tensor([list(ids)], device=self._lm.device))[0], dim=-1)
        top = known.topk(min(MOST_ALTERNATIVES, known.shape[1]), dim=-1) if request.choices else None
        text = self._vocabulary.text
        found = []
        for place in range(start, len(ids)):
            listed: Iterable[tuple[int, float]] = ()
            if top is not None and place:
                listed = zip(top.indices[place - 1].tolist(), top.values[place - 1].tolist(), strict=True)
            found.append(
                TokenLogprob(
                    text=text(ids[place]),
                    logprob=round(float(known[place - 1, ids[place]]), 5) if place else None,
                    choices=pooled(((text(token), value) for token, value in listed), request.choices),
                )
            )
        return tuple(found)

    def _replies(self, requests: Sequence[ChatRequest], prompts: Sequence[list[int]]) -> list[ChatReply | None]:
        """Returns an answer for each question; None for one that leaves no room for it."""
        room = self._lm.context_len or 1 << 30
        fits = [len(p) + r.max_output_tokens * (not r.reads) <= room for r, p in zip(requests, prompts, strict=True)]
        if requests[0].reads:
            (request,), (prompt,) = requests, prompts
            read = self._logprobs(prompt, request, start=0) if fits[0] else ()
            num = len(prompt)
            reply = ChatReply(text="", finish_reason="read", input_tokens=num, output_tokens=0, logprobs=read)
            return [reply if fits[0] else None]
        chosen = [i for i, fit in enumerate(fits) if fit]
        written = self._written([requests[i] for i in chosen], [prompts[i] for i in chosen]) if chosen else []
        replies: list[ChatReply | None] = [None] * len(requests)
        for i, ids in zip(chosen, written, strict=True):
            is_whole = len(ids) < requests[i].max_output_tokens
            replies[i] = ChatReply(
                text=self._lm.tokenizer.decode(ids, skip_special_tokens=True),
                finish_reason="stop" if is_whole else "length",
                input_tokens=len(prompts[i]),
                output_tokens=len(ids),
                logprobs=self._logprobs([*prompts[i], *ids], requests[i], start=len(prompts[i]))
                if requests[i].choices
                else (),
            )
        return replies

    def _written(self, requests: Sequence[ChatRequest], prompts: Sequence[list[int]]) -> list[list[int]]:
        tokenizer = self._lm.tokenizer
        stops = _end_tokens(self._lm)
        padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), padding, device=self._lm.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device=ids.device)
            mask[row, width - len(prompt) :] = 1
        longest = max(request.max_output_tokens for request in requests)
        temperature = requests[0].temperature
        sampling: dict[str, object] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        seed = hashlib.sha256(f"{self._config.seed} {requests[0].key()}".encode()).digest()
        devices = [ids.device] if ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(int.from_bytes(seed[:4], "big"))
            out = cast(_Generator, self._lm.model).generate(
                ids, attention_mask=mask, max_new_tokens=longest, pad_token_id=padding, **sampling
            )
        return [
            _until(row[width:].tolist(), stops)[: request.max_output_tokens]
            for row, request in zip(out, requests, strict=True)
        ]


def _sendable(requests: Sequence[ChatRequest], desk: Desk) -> list[ChatRequest]:
    """Returns as many of the requests, at least one, as the caps allow."""
    chunk: list[ChatRequest] = []
    for request in requests:
        try:
            desk.sending(request)
        except SpentError as error:
            if not (chunk and error.may_fit_later):
                raise
            break
        chunk.append(request)
    return chunk


def _end_tokens(lm: LanguageModel) -> set[int]:
    """Returns the ids that end an answer: the tokenizer's, and those that the model was trained to end a turn with."""
    named = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {token for token in (*listed, lm.tokenizer.eos_token_id) if token is not None}


def _until(ids: list[int], stops: set[int]) -> list[int]:
    """Returns the tokens up to and with the first that ends the answer."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]
