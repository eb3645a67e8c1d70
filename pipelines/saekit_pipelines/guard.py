"""How a command ends: one line and exit code 2 for what a user can mend, and what Ctrl-C leaves."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer

from saekit.errors import SaekitError

__all__ = ["EXIT_INTERRUPTED", "EXIT_USER_ERROR", "guarded"]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """What a user can mend is one line and exit code 2; Ctrl-C says that nothing is lost."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except SaekitError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_USER_ERROR) from error
        except KeyboardInterrupt as interrupt:
            typer.echo("interrupted: what is done is kept; run the same command again to resume", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from interrupt

    return run
