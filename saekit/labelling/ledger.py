"""Every request and its answer, in one SQLite file: a stopped run repeats no recorded request and no cap is overrun."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from saekit.errors import ResourceError, StoreError
from saekit.labelling.chat import ChatReply, ChatRequest
from saekit.labelling.logprobs import dump_logprobs, load_logprobs

__all__ = ["LEDGER_NAME", "Ledger", "Tokens"]

LEDGER_NAME = "ledger.sqlite"

# A row of `requests` is `sent` (tokens: the most it may take), `answered` or `failed`.
_SCHEMA = """
create table if not exists requests (
    key text primary key, purpose text not null, feature integer not null, state text not null, batch text,
    text text not null default '', refusal text not null default '', finish_reason text not null default '',
    input_tokens integer not null, cached_tokens integer not null default 0, output_tokens integer not null,
    is_estimated integer not null default 0, cost real, reason text not null default '', at text not null,
    logprobs text not null default ''
);
create index if not exists by_state on requests (state);
create table if not exists batches (tag text primary key, id text, is_open integer not null, at text not null);
create table if not exists totals (
    id integer primary key check (id = 1), sent integer not null default 0,
    lost_requests integer not null default 0, lost_input integer not null default 0, lost_output integer not null default 0,
    wasted_requests integer not null default 0, wasted_input integer not null default 0,
    wasted_output integer not null default 0, wasted_cost real not null default 0
);
insert or ignore into totals (id) values (1);
"""
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "afs", "fuse")
_REPLY = "text, refusal, finish_reason, input_tokens, cached_tokens, output_tokens, is_estimated, cost, logprobs"


@dataclass(slots=True)
class Tokens:
    """A number of requests and what they took or may take."""

    requests: int = 0
    input: int = 0
    output: int = 0
    cost: float = 0.0
    """In dollars, of those whose price was known."""

    def add(self, input_tokens: int, output_tokens: int, cost: float | None = None, *, requests: int = 1) -> None:
        """Counts more; negative numbers take back."""
        self.requests += requests
        self.input += input_tokens
        self.output += output_tokens
        self.cost += cost or 0.0


class Ledger:
    """Requests by key.

    Attributes:
        num_sent: HTTP requests and batch lines sent so far, by all runs.
        answered: requests that are answered, and what they took.
        wasted: answers that were charged and held nothing.
        lost: requests that were cut off, by a kill or on the way: the most that may have been charged for them.
        open: requests that are on their way: the most that they may take.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens or creates the file; others may read it meanwhile.

        Raises:
            StoreError: the file is no ledger.
            ResourceError: it cannot be opened.
        """
        self._path = Path(path)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
            # The write-ahead log's index is shared memory, which network file systems do not share.
            self._db.execute(f"pragma journal_mode = {'delete' if _is_on_network(self._path) else 'wal'}")
            self._db.execute("pragma synchronous = full")
            self._db.executescript(_SCHEMA)
            self._add_new_columns()
            self._load()
        except sqlite3.OperationalError as error:
            raise ResourceError(f"{str(path)!r}: the ledger of answers cannot be opened: {error}") from error
        except sqlite3.Error as error:
            raise StoreError(f"{str(path)!r}: no ledger of answers ({error}); move it away to pay anew") from error

    def _add_new_columns(self) -> None:
        """Brings a file of an earlier version up to date."""
        columns = {row[1] for row in self._db.execute("pragma table_info(requests)")}
        if "logprobs" not in columns:
            self._db.execute("alter table requests add column logprobs text not null default ''")

    def _load(self) -> None:
        row = self._db.execute("select * from totals").fetchone()
        self.num_sent = int(row[1])
        self.lost = Tokens(*row[2:5])
        self.wasted = Tokens(*row[5:9])
        self.answered, self.open = (self._summed("state = ?", (state,)) for state in ("answered", "sent"))

    def _summed(self, where: str, values: tuple[object, ...]) -> Tokens:
        sums = "count(*), coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), coalesce(sum(cost), 0)"
        return Tokens(*self._execute(f"select {sums} from requests where {where}", values).fetchone())

    def _execute(self, command: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(command, values)
        except sqlite3.Error as error:
            raise ResourceError(
                f"{str(self._path)!r}: the ledger of answers cannot be used: {error}; answers recorded so far are kept"
            ) from error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Makes all that is written inside the block one write: all of it is on disk afterwards, or none."""
        self._execute("begin")
        try:
            yield
        except BaseException:
            self._execute("rollback")
            self._load()
            raise
        self._execute("commit")

    def find(self, key: str) -> ChatReply | str | None:
        """Returns the recorded answer to a request, or why it failed; None where it has not ended."""
        row = self._execute(f"select state, reason, {_REPLY} from requests where key = ?", (key,)).fetchone()
        if row is None or row[0] == "sent":
            return None
        return str(row[1]) if row[0] == "failed" else _reply(row[2:])

    def send(self, request: ChatRequest, most: tuple[int, int], *, batch: str | None = None) -> None:
        """Notes a request before it is sent, with the most tokens that it may take; `batch`: the tag of the batch it is in."""
        # A request that is not answered yet is worth no wait for the disk; a kill of the process loses it neither way.
        with self._alone(is_urgent=batch is not None):
            if batch is not None:
                self._execute("insert or ignore into batches values (?, null, 1, ?)", (batch, _now()))
            self._execute(
                "insert or replace into requests (key, purpose, feature, state, batch, input_tokens, output_tokens, at)"
                " values (?, ?, ?, 'sent', ?, ?, ?, ?)",
                (request.key(), request.purpose, request.feature, batch, *most, _now()),
            )
            self._execute("update totals set sent = sent + 1")
        self.num_sent += 1
        self.open.add(*most)

    def record(self, key: str, reply: ChatReply) -> None:
        """Writes the answer to a request that was sent; it is on disk when this returns."""
        most = self._most(key)
        self._execute(
            f"update requests set state = 'answered', at = ?, ({_REPLY}) = (?, ?, ?, ?, ?, ?, ?, ?, ?) where key = ?",
            (
                _now(),
                reply.text,
                reply.refusal,
                reply.finish_reason,
                reply.input_tokens,
                reply.cached_tokens,
                reply.output_tokens,
                int(reply.is_estimated),
                reply.cost,
                dump_logprobs(reply.logprobs),
                key,
            ),
        )
        self.open.add(-most[0], -most[1], requests=-1)
        self.answered.add(reply.input_tokens, reply.output_tokens, reply.cost)

    def drop(self, key: str, tokens: tuple[int, int] | None, *, cost: float | None = None) -> None:
        """Takes back a request that got no answer: `tokens` that were charged all the same, None: perhaps the most."""
        most = self._most(key)
        kind, counted = ("lost", most) if tokens is None else ("wasted", tokens)
        with self._alone():
            self._execute("delete from requests where key = ?", (key,))
            if any(counted):
                self._execute(
                    f"update totals set {kind}_requests = {kind}_requests + 1, {kind}_input = {kind}_input + ?,"
                    f" {kind}_output = {kind}_output + ?, wasted_cost = wasted_cost + ?",
                    (*counted, cost or 0.0),
                )
        self.open.add(-most[0], -most[1], requests=-1)
        if any(counted):
            (self.lost if tokens is None else self.wasted).add(*counted, cost)

    def fail(self, request: ChatRequest, reason: str) -> None:
        """Writes that a request will get no answer."""
        self._execute(
            "insert or replace into requests (key, purpose, feature, state, input_tokens, output_tokens, reason, at)"
            " values (?, ?, ?, 'failed', 0, 0, ?, ?)",
            (request.key(), request.purpose, request.feature, reason, _now()),
        )

    def count_interrupted(self) -> int:
        """Counts requests that a killed run had on their way as lost; returns how many. Those in batches are not lost."""
        keys = [row[0] for row in self._execute("select key from requests where state = 'sent' and batch is null")]
        for key in keys:
            self.drop(key, None)
        return len(keys)

    def retry(self, purpose: str, feature: int) -> None:
        """Makes the questions of one purpose about a feature new, so that they are asked again; their cost stays counted."""
        values = (purpose, feature)
        self._execute("delete from requests where state = 'failed' and purpose = ? and feature = ?", values)
        rows = self._execute(
            "select key from requests where state = 'answered' and purpose = ? and feature = ? and key not like '%#%'",
            values,
        ).fetchall()
        for (key,) in rows:
            self._execute("update requests set key = key || '#' || lower(hex(randomblob(4))) where key = ?", (key,))

    def cost_of_features(self) -> dict[int, float]:
        """Returns feature -> dollars of all that was asked about it; without prices nothing."""
        rows = self._execute("select feature, sum(cost) from requests where cost is not null group by feature")
        return {int(feature): float(cost) for feature, cost in rows}

    def mean_tokens(self, purpose: str) -> tuple[int, float, float]:
        """Returns the number of answers of one purpose and their mean input and output tokens."""
        found = self._summed("state = 'answered' and purpose = ?", (purpose,))
        return found.requests, found.input / max(1, found.requests), found.output / max(1, found.requests)

    def name_batch(self, tag: str, batch_id: str) -> None:
        """Notes the server's name of a batch."""
        self._execute("update batches set id = ? where tag = ?", (batch_id, tag))

    def open_batches(self) -> list[tuple[str, str | None]]:
        """Returns (tag, the server's name if it is known) of the batches that are not collected yet, oldest first."""
        return self._execute("select tag, id from batches where is_open = 1 order by rowid").fetchall()

    def keys_in(self, tag: str) -> set[str]:
        """Returns the requests of a batch that have not ended."""
        return {row[0] for row in self._execute("select key from requests where batch = ? and state = 'sent'", (tag,))}

    def close_batch(self, tag: str) -> None:
        """Ends a batch; requests of it that have not ended were never charged."""
        for key in self.keys_in(tag):
            self.drop(key, (0, 0))
        self._execute("update batches set is_open = 0 where tag = ?", (tag,))

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def _most(self, key: str) -> tuple[int, int]:
        row = self._execute("select input_tokens, output_tokens from requests where key = ?", (key,)).fetchone()
        return int(row[0]), int(row[1])

    @contextlib.contextmanager
    def _alone(self, *, is_urgent: bool = True) -> Iterator[None]:
        """One write of several commands, unless a larger one is open already; `is_urgent`: it waits for the disk."""
        if self._db.in_transaction:
            yield
            return
        if not is_urgent:
            self._execute("pragma synchronous = normal")
        with self.together():
            yield
        self._execute("pragma synchronous = full")


def _reply(row: tuple[str, str, str, int, int, int, int, float | None, str]) -> ChatReply:
    text, refusal, finish_reason, input_tokens, cached_tokens, output_tokens, is_estimated, cost, logprobs = row
    return ChatReply(
        text=text,
        finish_reason=finish_reason,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=cached_tokens,
        is_estimated=bool(is_estimated),
        refusal=refusal,
        cost=cost,
        logprobs=load_logprobs(logprobs),
    )


def _is_on_network(path: Path) -> bool:
    """Returns whether a file is on a network file system, as far as Linux tells."""
    try:
        device = path.resolve().parent.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    here = f"{os.major(device)}:{os.minor(device)}"
    kinds = {line.partition(" - ")[2].split(" ")[0] for line in mounts if line.split(" ")[2] == here}
    return any(kind.startswith(_NETWORK) for kind in kinds)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
