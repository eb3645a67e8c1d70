"""OpenAI-compatible servers through the `openai` package, the only file that imports it."""

import datetime
import email.utils
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from saekit.errors import ConfigError, LabelerError, MissingDependencyError
from saekit.labelling.chat import CHARACTERS_PER_TOKEN, ChatReply, ChatRequest, LLMConfig, RequestFailedError

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletion

__all__ = ["OpenAIChat"]

_FORMATS = ("none", "json_object", "json_schema")
_MAX_RATE_LIMIT_WAITS = 200
_FIRST_TRIES = 2
"""Server errors borne before a plainer answer format is tried, on a server that has not answered in this format yet."""


class _EmptyAnswerError(Exception):
    """A success by its status, without a completion in it."""


class OpenAIChat:
    """A `ChatClient` for any server that speaks OpenAI's chat completions."""

    def __init__(self, config: LLMConfig) -> None:
        """Checks package and key; connects at the first request.

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
        self._config = config
        self._openai = openai
        self._retry_context = stamina.retry_context
        key = os.environ.get(config.api_key_env)
        if not key and config.base_url is None:
            raise ConfigError(
                f"labeler 'llm': no key in the environment variable {config.api_key_env}, needs one; "
                "set it, or name a base_url that needs none"
            )
        self._key = key or "none"
        self._client: openai.AsyncOpenAI | None = None
        self._format = len(_FORMATS) - 1
        self._is_format_proven = False
        self._token_key = "max_tokens"
        self._sends_temperature = True

    async def complete(self, request: ChatRequest, *, on_send: Callable[[], None]) -> ChatReply:
        """See `ChatClient.complete`."""
        answer_format = self._format
        while True:
            try:
                completion = await self._with_retries(request, answer_format, on_send)
            except self._openai.APIStatusError as error:
                adapted = self._adapted(error, answer_format)
                if adapted is None:
                    raise self._named(error) from error
                answer_format = adapted
                continue
            except (self._openai.APIConnectionError, _EmptyAnswerError) as error:
                raise self._named(error) from error
            if answer_format < self._format or not self._is_format_proven:
                self._format, self._is_format_proven = answer_format, True
            return _reply(request, completion)

    async def close(self) -> None:
        """See `ChatClient.close`."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _with_retries(
        self, request: ChatRequest, answer_format: int, on_send: Callable[[], None]
    ) -> "ChatCompletion":
        config = self._config
        failures = rate_limits = 0

        def pause(error: Exception) -> bool | float:
            nonlocal failures, rate_limits
            if isinstance(error, self._openai.RateLimitError):
                rate_limits += 1
                wanted = _retry_after(error.response.headers.get("retry-after"))
                if _is_out_of_quota(error) or rate_limits > _MAX_RATE_LIMIT_WAITS:
                    return False
            elif self._is_passing(error):
                failures += 1
                is_plain = answer_format == 0 or (self._is_format_proven and answer_format == self._format)
                if failures > (config.max_retries if is_plain else min(_FIRST_TRIES, config.max_retries)):
                    return False
                headers = error.response.headers if isinstance(error, self._openai.APIStatusError) else {}
                wanted = _retry_after(headers.get("retry-after"))
            else:
                return False
            return True if wanted is None else min(wanted, 10 * config.max_wait_seconds)

        async for attempt in self._retry_context(
            on=pause,
            attempts=None,
            timeout=None,
            wait_initial=config.wait_seconds,
            wait_max=config.max_wait_seconds,
            wait_jitter=config.wait_seconds,
        ):
            with attempt:
                on_send()
                return await self._send(request, answer_format)
        raise AssertionError("stamina ends with a result or an error")

    async def _send(self, request: ChatRequest, answer_format: int) -> "ChatCompletion":
        if self._client is None:
            self._client = self._openai.AsyncOpenAI(
                api_key=self._key,
                base_url=self._config.base_url,
                timeout=self._config.timeout_seconds,
                max_retries=0,
            )
        options: dict[str, object] = {self._token_key: request.max_output_tokens}
        if self._sends_temperature:
            options["temperature"] = request.temperature
        if _FORMATS[answer_format] == "json_schema":
            schema = {"name": request.schema_name, "strict": True, "schema": dict(request.schema)}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif _FORMATS[answer_format] == "json_object":
            options["response_format"] = {"type": "json_object"}
        try:
            completion = await self._client.chat.completions.create(
                model=request.model,
                messages=[{"role": "system", "content": request.system}, {"role": "user", "content": request.user}],
                # Which options are sent is learnt from the server, so they go past the package's own signature.
                extra_body=options,
            )
        except json.JSONDecodeError as error:
            raise _EmptyAnswerError(f"body is no JSON: {error}") from error
        # A proxy's HTML page with status 200 comes back as text, and some servers send errors without choices.
        if not getattr(completion, "choices", None):
            raise _EmptyAnswerError(f"no completion in {str(completion)[:80]!r}")
        return completion

    def _is_passing(self, error: Exception) -> bool:
        """Returns whether the same request may succeed later."""
        if isinstance(error, self._openai.APIStatusError):
            return error.status_code in {408, 409, 425} or error.status_code >= 500
        return isinstance(error, self._openai.APIConnectionError | _EmptyAnswerError)

    def _adapted(self, error: "openai.APIStatusError", answer_format: int) -> int | None:
        """Returns the answer format to go on with after a refusal, None where nothing is left to change."""
        says = str(error).lower()
        refused = error.status_code in {400, 415, 422}
        if refused and "max_completion_tokens" in says and self._token_key == "max_tokens":
            self._token_key = "max_completion_tokens"
            return answer_format
        if refused and "temperature" in says and self._sends_temperature:
            self._sends_temperature = False
            return answer_format
        is_new_format = not (self._is_format_proven and answer_format == self._format)
        if answer_format > 0 and (refused or (error.status_code >= 500 and is_new_format)):
            return answer_format - 1
        return None

    def _named(self, error: Exception) -> LabelerError:
        where = f"labelling model {self._config.model!r} at {self._config.base_url or 'api.openai.com'}"
        if not isinstance(error, self._openai.APIStatusError):
            if isinstance(error, self._openai.APIConnectionError):
                return LabelerError(f"{where}: no connection ({error}), needs a reachable server; run again to resume")
            return RequestFailedError(f"{where}: {error}")
        said = " ".join(str(error.message).removeprefix(f"Error code: {error.status_code} - ").split())[:200]
        if error.status_code in {401, 403}:
            return LabelerError(f"{where}: {error.status_code} {said}; check the key in {self._config.api_key_env}")
        if error.status_code == 402 or (error.status_code == 429 and _is_out_of_quota(error)):
            return LabelerError(f"{where}: {error.status_code} {said}; the account has no credit left")
        if error.status_code == 429:
            return LabelerError(f"{where}: rate limit without end: {said}; run again later to resume")
        if error.status_code == 404:
            return LabelerError(f"{where}: {error.status_code} {said}; check model and base_url")
        return RequestFailedError(f"{where}: {error.status_code} {said}")


def _is_out_of_quota(error: "openai.APIStatusError") -> bool:
    return getattr(error, "code", None) == "insufficient_quota"


def _retry_after(value: str | None) -> float | None:
    """Returns the seconds that a Retry-After header asks for: a number or an HTTP date; None without a usable one."""
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


def _reply(request: ChatRequest, completion: "ChatCompletion") -> ChatReply:
    choice = completion.choices[0]
    text = (choice.message.content if choice.message else None) or ""
    usage = completion.usage
    if usage is None:
        return ChatReply(
            text=text,
            finish_reason=str(choice.finish_reason),
            input_tokens=request.estimated_input_tokens(),
            output_tokens=int(len(text) / CHARACTERS_PER_TOKEN) + 1,
            is_estimated=True,
        )
    return ChatReply(
        text=text,
        finish_reason=str(choice.finish_reason),
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
    )
