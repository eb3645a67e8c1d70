"""What several commands take, and what they make of it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from saekit.progress import NO_PROGRESS, Progress
from saekit_pipelines.console import make_progress

__all__ = ["RecipePath", "RingSize", "SaeName", "first_process_progress", "with_budget", "with_ring"]

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe to run.", show_default=False)]
SaeName = Annotated[str | None, typer.Option("--sae", help="Only the SAE of this name, e.g. topk.", show_default=False)]

RingSize = Annotated[
    str | None,
    typer.Option(
        "--ring",
        metavar="SIZE",
        help="Make activations while training on them, cache and ring within SIZE of disk, e.g. [cyan]100GB[/cyan].",
        show_default=False,
    ),
]


def with_ring(overrides: Sequence[str] | None, size: str | None) -> list[str]:
    """Returns the changes to a recipe, with the disk of its ring as the last of them."""
    return [*(overrides or []), *([] if size is None else [f"ring.disk={size}"])]


def with_budget(overrides: Sequence[str] | None, budget: float | None) -> list[str]:
    """Returns the changes to a recipe, with the cap in dollars as the last of them."""
    return [*(overrides or []), *([] if budget is None else [f"label.llm.max_cost={budget}"])]


def first_process_progress() -> Progress:
    """Bars or lines of the first process; the others of a launch say nothing."""
    return make_progress() if os.environ.get("RANK", "0") == "0" else NO_PROGRESS
