"""Calls to OpenAI-compatible servers through the `openai` package, the only file that imports it; repeats nothing by itself."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import JsonValue

from saekit.errors import ConfigError, LabelerError, MissingDependencyError
from saekit.labelling.chat import ChatReply, ChatRequest
from saekit.labelling.dialect import Complaint, charged_tokens, read_completion
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.textreading import READS_NOTHING, read_reading
from saekit.labelling.vectors import read_embeddings

if TYPE_CHECKING:
    import openai
    from stamina import _core

__all__ = ["BatchState", "EmptyError", "LostError", "OpenAIClient", "RefusedError", "UnreachableError"]


class LostError(Exception):
    """No usable answer came, and the server may have charged for one: connection lost, or too slow."""


class EmptyError(LostError):
    """A success by its status, without a completion in it; `charged`: what it says that it took, None: nothing."""

    def __init__(self, message: str, charged: tuple[int, int] | None) -> None:
        super().__init__(message)
        self.charged = charged


class UnreachableError(Exception):
    """The request never left this machine."""


class RefusedError(Exception):
    """The server answered with an error.

    Attributes:
        sent: the options of a question that was refused.
        charged: tokens that it took all the same; None: nobody knows.
    """

    def __init__(self, complaint: Complaint, *, charged: tuple[int, int] | None = (0, 0)) -> None:
        super().__init__(str(complaint))
        self.complaint = complaint
        self.charged = charged
        self.sent: Mapping[str, object] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchState:
    """What the server says of a batch."""

    name: str
    status: str
    files: tuple[str, ...]
    """Its results: output and error file, as far as they are there."""
    errors: str
    """Why it was refused as a whole."""
    total: int
    done: int
    """Requests that are answered or failed."""


class OpenAIClient:
    """One server."""

    def __init__(self, config: LLMConfig) -> None:
        """Checks package and key; connects at the first call.

        Raises:
            MissingDependencyError: `openai` or `stamina` is not installed.
            ConfigError: no key in the environment, and no `base_url` of a server that may do without.
        """
        try:
            import openai
            import stamina
        except ImportError as error:
            raise MissingDependencyError(
                f"labeler 'llm': the package {error.name!r} is not installed; pip install 'saekit[llm]'"
            ) from error
        self._openai = openai
        self._retry_context = stamina.retry_context
        self._config = config
        key = os.environ.get(config.api_key_env)
        if not key and config.base_url is None:
            raise ConfigError(
                f"labeler 'llm': no key in the environment variable {config.api_key_env}, needs one; "
                "set it, or name a base_url that needs none"
            )
        self._key = key or "none"
        self._open: openai.AsyncOpenAI | None = None

    @property
    def where(self) -> str:
        """The server, for messages."""
        return f"labelling model {self._config.model!r} at {self._config.base_url or 'api.openai.com'}"

    async def close(self) -> None:
        """Lets go of connections; the next call opens new ones."""
        client, self._open = self._open, None
        if client is not None:
            await client.close()

    def tries(self, pause: Callable[[Exception], bool | float]) -> "AsyncIterator[_core.Attempt]":
        """Returns attempts, for as long as `pause` says of each error to go on, after its seconds or the usual pause."""
        config = self._config
        context = self._retry_context(
            on=pause,
            attempts=None,
            timeout=None,
            wait_initial=config.wait_seconds,
            wait_max=config.max_wait_seconds,
            wait_jitter=config.wait_seconds,
        )
        return aiter(context)

    async def chat(self, request: ChatRequest, options: Mapping[str, object]) -> tuple[ChatReply, Mapping[str, str]]:
        """Returns the answer to a question, and the response's headers.

        Raises:
            RefusedError, LostError, EmptyError, UnreachableError: there is none.
        """
        async with self._calling() as client:
            raw = await client.chat.completions.with_raw_response.create(
                model=request.model,
                messages=[{"role": "system", "content": request.system}, {"role": "user", "content": request.user}],
                # Which options are sent is learnt from the server, so they go past the package's own signature.
                extra_body=dict(options),
            )
        body = _body(raw.content)
        reply = read_completion(body, most_input=request.most_tokens()[0], choices=request.choices)
        if reply is None:
            raise EmptyError(f"no completion in {str(body)[:80]!r}", charged_tokens(body))
        return reply, raw.headers

    async def read(self, request: ChatRequest, options: Mapping[str, object]) -> tuple[ChatReply, Mapping[str, str]]:
        """Returns how likely the tokens of a text are, and the response's headers.

        Raises:
            RefusedError, LostError, EmptyError, UnreachableError: there is no answer, or none with logprobs.
        """
        async with self._calling() as client:
            raw = await client.completions.with_raw_response.create(
                model=request.model, prompt=request.user, extra_body=dict(options)
            )
        body = _body(raw.content)
        reply = read_reading(body, request, options)
        if reply is None:
            raise RefusedError(READS_NOTHING, charged=charged_tokens(body))
        return reply, raw.headers

    async def embed(self, request: ChatRequest) -> tuple[ChatReply, Mapping[str, str]]:
        """Returns the vectors of the lines of a question, as `pack_vectors` writes them, and the response's headers.

        Raises:
            RefusedError, EmptyError, LostError, UnreachableError: there are none.
        """
        texts = request.user.split("\n")
        async with self._calling() as client:
            raw = await client.embeddings.with_raw_response.create(
                model=request.model, input=texts, encoding_format="float"
            )
        body = _body(raw.content)
        reply = read_embeddings(body, len(texts), most_input=request.most_tokens()[0])
        if reply is None:
            raise EmptyError(f"no {len(texts)} vectors in {str(body)[:80]!r}", None)
        return reply, raw.headers

    async def upload(self, lines: bytes) -> str:
        """Uploads a batch's requests and returns the file's name."""
        async with self._calling() as client:
            return (await client.files.create(file=("requests.jsonl", lines), purpose="batch")).id

    async def create_batch(self, file: str, *, tag_key: str, tag: str) -> str:
        """Creates a batch and returns its name."""
        async with self._calling() as client:
            batch = await client.batches.create(
                input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h", metadata={tag_key: tag}
            )
        return batch.id

    async def batch_of_tag(self, tag_key: str, tag: str, *, among: int) -> str | None:
        """Returns the name of the batch with a tag, None where there is none among the account's newest."""
        async with self._calling() as client:
            seen = 0
            async for batch in client.batches.list(limit=100):
                if (batch.metadata or {}).get(tag_key) == tag:
                    return batch.id
                seen += 1
                if seen >= among:
                    break
        return None

    async def batch(self, name: str) -> BatchState:
        """Returns how a batch stands."""
        async with self._calling() as client:
            batch = await client.batches.retrieve(name)
        counts = batch.request_counts
        errors = (batch.errors.data if batch.errors else None) or []
        return BatchState(
            name=name,
            status=batch.status,
            files=tuple(file for file in (batch.output_file_id, batch.error_file_id) if file),
            errors="; ".join(f"{error.code}: {error.message}" for error in errors),
            total=counts.total if counts else 0,
            done=counts.completed + counts.failed if counts else 0,
        )

    async def content(self, file: str) -> bytes:
        """Returns a file's bytes."""
        async with self._calling() as client:
            return (await client.files.content(file)).content

    def stopped(self, complaint: Complaint) -> LabelerError:
        """Returns the error that ends a run after a complaint about every request."""
        said = f"{self.where}: {complaint}"
        if complaint.is_out_of_money:
            return LabelerError(f"{said}; the account has no credit left")
        if complaint.status in {401, 403}:
            return LabelerError(f"{said}; check the key in {self._config.api_key_env}")
        if complaint.status == 404:
            return LabelerError(f"{said}; check model and base_url")
        if complaint.status == 429:
            return LabelerError(f"{said}; rate limit without end; run again later to resume")
        return LabelerError(f"{said}; run again to resume")

    def unreachable(self, error: Exception) -> LabelerError:
        """Returns the error that ends a run where the server cannot be reached."""
        return LabelerError(f"{self.where}: no connection ({error}), needs a reachable server; run again to resume")

    @contextlib.asynccontextmanager
    async def _calling(self) -> "AsyncIterator[openai.AsyncOpenAI]":
        """The open client; errors inside the block become those of this file."""
        if self._open is None:
            self._open = self._openai.AsyncOpenAI(
                api_key=self._key,
                base_url=self._config.base_url,
                timeout=self._config.timeout_seconds,
                max_retries=0,
            )
        try:
            # The package's own timeout is for one read; a server that drips bytes would never reach it.
            async with asyncio.timeout(self._config.timeout_seconds):
                yield self._open
        except self._openai.APIStatusError as error:
            complaint = Complaint(
                status=error.status_code,
                message=str(error.message),
                code=str(getattr(error, "code", None) or ""),
                headers=error.response.headers,
            )
            raise RefusedError(complaint) from error
        except TimeoutError as error:
            raise LostError(f"no answer within {self._config.timeout_seconds:g} s") from error
        except self._openai.APIConnectionError as error:
            if type(error.__cause__).__name__ in {"ConnectError", "ConnectTimeout"}:
                raise UnreachableError(str(error)) from error
            raise LostError(f"connection lost ({error.__cause__ or error})") from error


def _body(content: bytes) -> dict[str, JsonValue]:
    """Returns the object of a success; empty where the body is another JSON value."""
    try:
        body: JsonValue = json.loads(content)
    except ValueError as error:
        raise EmptyError(f"body is no JSON: {error}", None) from error
    return body if isinstance(body, dict) else {}
