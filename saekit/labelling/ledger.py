"""Every answer that was paid for, in one SQLite file: a stopped run repeats no recorded request and no cap is overrun."""

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from saekit.errors import LabelerError, ResourceError, StoreError
from saekit.labelling.chat import ChatClient, ChatReply, ChatRequest, LLMConfig

__all__ = ["LEDGER_NAME", "Ledger", "RecordedClient", "SpentError"]

LEDGER_NAME = "ledger.sqlite"

_SCHEMA = """
create table if not exists answers (
    key text primary key, purpose text not null, text text not null, finish_reason text not null,
    input_tokens integer not null, output_tokens integer not null, is_estimated integer not null, at text not null
);
create table if not exists sent (id integer primary key check (id = 1), requests integer not null);
insert or ignore into sent values (1, 0);
"""


class SpentError(LabelerError):
    """A cap of the config is reached; raised before the request that would pass it."""


class Ledger:
    """Answers by request key, and how many requests were sent."""

    def __init__(self, path: str | Path) -> None:
        """Opens or creates the file.

        Raises:
            StoreError: the file is no ledger.
        """
        self._path = Path(path)
        # No write-ahead log: it corrupts on network file systems, and one commit per answer is slow enough anyway.
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise StoreError(f"{str(path)!r}: no ledger of answers ({error}); move it away to pay anew") from error

    def _execute(self, command: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(command, values)
        except sqlite3.Error as error:
            raise ResourceError(
                f"{str(self._path)!r}: the ledger of answers cannot be used: {error}; answers recorded so far are kept"
            ) from error

    def find(self, key: str) -> ChatReply | None:
        """Returns the recorded answer to a request."""
        row = self._execute(
            "select text, finish_reason, input_tokens, output_tokens, is_estimated from answers where key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        text, finish_reason, input_tokens, output_tokens, is_estimated = row
        return ChatReply(
            text=text,
            finish_reason=finish_reason,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            is_estimated=bool(is_estimated),
        )

    def record(self, key: str, reply: ChatReply, *, purpose: str) -> None:
        """Writes an answer; it is on disk when this returns."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        values = (reply.text, reply.finish_reason, reply.input_tokens, reply.output_tokens, int(reply.is_estimated), at)
        self._execute("insert or replace into answers values (?, ?, ?, ?, ?, ?, ?, ?)", (key, purpose, *values))

    def count_sent(self) -> None:
        """Counts one more HTTP request."""
        self._execute("update sent set requests = requests + 1")

    @property
    def num_sent(self) -> int:
        """HTTP requests sent so far, by all runs."""
        return int(self._execute("select requests from sent").fetchone()[0])

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Input and output tokens of all recorded answers."""
        row = self._execute("select sum(input_tokens), sum(output_tokens) from answers").fetchone()
        return int(row[0] or 0), int(row[1] or 0)

    @property
    def num_answers(self) -> int:
        """Recorded answers."""
        return int(self._execute("select count(*) from answers").fetchone()[0])

    def close(self) -> None:
        """Closes the file."""
        self._db.close()


class RecordedClient:
    """Asks the ledger first, then the caps, then the server."""

    def __init__(self, client: ChatClient, ledger: Ledger, config: LLMConfig) -> None:
        self.ledger = ledger
        self._client = client
        self._config = config
        self._in_flight = [0, 0]

    async def complete(self, request: ChatRequest, *, purpose: str) -> ChatReply:
        """Returns the answer from the ledger or the server; a new one is recorded before it is returned.

        Raises:
            SpentError: a cap leaves no room for it.
            LabelerError: see `ChatClient.complete`.
        """
        key = request.key()
        known = self.ledger.find(key)
        if known is not None:
            return known
        most = (request.estimated_input_tokens(), request.max_output_tokens)
        self._check_tokens(most)
        with self._reserved(most):
            reply = await self._client.complete(request, on_send=self._sending())
            self.ledger.record(key, reply, purpose=purpose)
        return reply

    async def close(self) -> None:
        """Lets go of the server's connections; the ledger stays open."""
        await self._client.close()

    @contextlib.contextmanager
    def _reserved(self, most: tuple[int, int]) -> Iterator[None]:
        self._in_flight[0] += most[0]
        self._in_flight[1] += most[1]
        try:
            yield
        finally:
            self._in_flight[0] -= most[0]
            self._in_flight[1] -= most[1]

    def _sending(self) -> Callable[[], None]:
        def send() -> None:
            cap = self._config.max_requests
            if cap is not None and self.ledger.num_sent >= cap:
                raise SpentError(
                    f"labelling model: {cap} requests sent, max_requests allows no more; raise it to go on"
                )
            self.ledger.count_sent()

        return send

    def _check_tokens(self, most: tuple[int, int]) -> None:
        spent = self.ledger.num_tokens
        after_input, after_output = (spent[i] + self._in_flight[i] + most[i] for i in range(2))
        cap = self._config.max_tokens
        if cap is not None and after_input + after_output > cap:
            raise SpentError(
                f"labelling model: {sum(spent)} tokens spent, the next request could pass max_tokens {cap}; "
                "raise it to go on"
            )
        cost = self._config.cost(after_input, after_output)
        if self._config.max_cost is not None and cost is not None and cost > self._config.max_cost:
            raise SpentError(
                f"labelling model: {self._config.cost(*spent):.4f} spent, the next request could pass max_cost "
                f"{self._config.max_cost}; raise it to go on"
            )
