"""`saekit score`: scores labels that are there already, by other scorers, another judge, or of another program."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saekit_pipelines.guard import guarded
from saekit_pipelines.named import NamedProgress
from saekit_pipelines.options import RecipePath, SaeName, first_process_progress, with_budget

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    example = "saekit score RECIPE.toml label.llm.model=gpt-4.1 'label.llm.scorers=[\"simulation\"]' --dry-run"
    app.command(name="score", epilog=f"Example:  {escape(example)}")(guarded(score))


def score(
    recipe: RecipePath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Changes to the recipe; judge and scorers are [cyan]label.llm[/cyan]'s.",
            show_default=False,
        ),
    ] = None,
    sae: SaeName = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="JSONL",
            help="Labels of another program: lines with 'feature' and 'label'; needs --sae where the recipe has several.",
            show_default=False,
        ),
    ] = None,
    labeler: Annotated[
        list[str] | None,
        typer.Option(
            "--labeler", metavar="NAME", help="Only labels of this name; may be repeated.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the requests, tokens and cost that the judge would take; ask nothing."),
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            metavar="USD",
            help="Stop before labels and scores cost more than this, all runs of the folder included.",
            show_default=False,
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Judge anew what got no usable answer.")] = False,
) -> None:
    """Score labels that are there already, by other scorers or another judge, or labels of another program."""
    from saekit.errors import ConfigError
    from saekit.labelling import estimate_scores, score_labels
    from saekit_pipelines.stages import Pipeline

    progress = first_process_progress()
    pipeline = Pipeline.load(recipe, with_budget(overrides, budget), progress=progress)
    names = pipeline.names(sae)
    if labels is not None and len(names) > 1:
        raise ConfigError(f"score: --labels and SAEs {', '.join(names)}, needs --sae to say which one they are of")
    table = Table(box=None, show_header=False, pad_edge=False)
    for name in names:
        own, (_, test), folder = pipeline.sae(name), pipeline.views(name), pipeline.stage_folder("label", name)
        told, config = NamedProgress(progress, name), pipeline.recipe.label
        if dry_run:
            estimate = estimate_scores(
                own, test, lm=pipeline.lm, out=folder, config=config, labels=labels, labelers=labeler, progress=told
            )
            table.add_row(f"[bold]score {escape(name)}", escape(str(estimate)))
            continue
        score_labels(
            own,
            test,
            lm=pipeline.lm,
            out=folder,
            config=config,
            labels=labels,
            labelers=labeler,
            retry_failed=retry_failed,
            progress=told,
        )
        typer.echo(f"score {name}: {folder}")
    if dry_run:
        Console().print(table)
