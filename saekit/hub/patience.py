"""What is asked of the hub: again where that helps, and one line that says what is wrong where it does not."""

import difflib
import logging
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from saekit.errors import FormatError

__all__ = ["TRIES", "close_names", "first_line", "patiently", "refusal", "wait_seconds"]

log = logging.getLogger(__name__)

TRIES = 5
"""Attempts at one request, and at a download without a new byte."""
_MAX_WAIT_SECONDS = 300.0

_T = TypeVar("_T")


def patiently(ask: Callable[[], _T]) -> _T:
    """Returns what `ask` returns; asks again after too many requests, a server's failure or a lost connection."""
    for attempt in range(TRIES):
        try:
            return ask()
        except Exception as error:
            seconds = wait_seconds(error, attempt)
            if seconds is None or attempt == TRIES - 1:
                raise
            log.warning("the hub: %s; again in %.0f s", first_line(error), seconds)
            time.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


def wait_seconds(error: Exception, attempt: int) -> float | None:
    """Returns how long to wait before asking again, None where it is of no use.

    Args:
        error: what the hub's client raised.
        attempt: from 0; each wait is twice the one before, but where the server says how long.
    """
    from huggingface_hub.errors import HfHubHTTPError

    seconds = min(2.0**attempt, 30.0)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status not in {408, 429} and status < 500:
            return None
        asked = error.response.headers.get("Retry-After", "")
        seconds = float(asked) if asked.isdigit() else seconds
        return seconds if seconds <= _MAX_WAIT_SECONDS else None
    # Which HTTP library raises here, httpx or its successor, changes with the version of huggingface_hub.
    return seconds if type(error).__module__.startswith("httpx") else None


def refusal(error: Exception, repo: str, revision: str | None = None) -> FormatError | None:
    """Returns the hub's answer as one line, None where it gave none: it is down, or cannot be reached."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return FormatError(
            f"sae {repo!r}: gated, needs an account that its owner lets in;"
            f" ask for access at https://huggingface.co/{repo}, then 'hf auth login' or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        from saekit.hub.registry import known_repos

        near = close_names(repo, known_repos())
        hint = f"; did you mean {near}?" if near else ""
        return FormatError(
            f"sae {repo!r}: no such folder here, and no such repository on the hub that you may read, needs one of them"
            f"{hint}; log in with 'hf auth login' if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return FormatError(f"sae '{repo}@{revision}': no such revision, needs {_revisions(repo)}")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in {401, 403}:
        return FormatError(
            f"sae {repo!r}: the hub says {error.response.status_code}, needs a token that may do this;"
            " log in again with 'hf auth login' or set HF_TOKEN"
        )
    return None


def close_names(name: str, known: Iterable[str]) -> str:
    """Returns the known names that are most like a wrong one, quoted; "" where none is."""
    listed = list(known)
    lowered = {entry.lower(): entry for entry in listed}
    found = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.7)
    return ", ".join(repr(lowered[entry]) for entry in found)


def first_line(error: Exception) -> str:
    """Returns what an error says, its first line only."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _revisions(repo: str) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo)
    except Exception:
        # Only to make the message better.
        return "a branch, a tag or a commit"
    names = [ref.name for ref in [*refs.branches, *refs.tags]]
    return f"one of {', '.join(names[:8])}, or a commit" if names else "a commit"
