"""`saekit revive`: features that the corpus does not make fire, tried on sentences made from what they promote."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saekit.progress import Progress
from saekit_pipelines.console import make_progress
from saekit_pipelines.guard import guarded
from saekit_pipelines.named import NamedProgress
from saekit_pipelines.options import RecipePath, SaeName, with_budget

if TYPE_CHECKING:
    from saekit.labelling import Revival
    from saekit_pipelines.stages import Pipeline

__all__ = ["revive"]

SHOWN = 20
"""Features in the command line's table; all of them are in revivals.jsonl."""


@guarded
def revive(
    recipe: RecipePath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Changes to the recipe, e.g. [cyan]revive.max_features=50[/cyan].",
            show_default=False,
        ),
    ] = None,
    sae: SaeName = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print features, sentences, requests, tokens and cost; ask nothing."),
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            metavar="USD",
            help="Stop before the labelling model costs more than this, all runs of the folder included.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Try features that never fire on sentences made from what they promote, and relabel those that wake up."""
    from saekit_pipelines.stages import Pipeline

    pipeline = Pipeline.load(recipe, with_budget(overrides, budget), progress=make_progress())
    for name in pipeline.names(sae):
        _one(pipeline, name, is_dry=dry_run)


def _one(pipeline: "Pipeline", name: str, *, is_dry: bool) -> None:
    from saekit.labelling import estimate_revival, firing_rule, read_labels, revive_features

    dictionary, (train, _) = pipeline.sae(name), pipeline.views(name)
    out = pipeline.stage_folder("revive", name)
    config, label = pipeline.recipe.revive, pipeline.recipe.label
    labels = pipeline.stage_folder("label", name)
    progress: Progress = NamedProgress(pipeline.progress, name)
    if is_dry:
        estimate = estimate_revival(
            dictionary, train, lm=pipeline.lm, labels=labels, out=out, config=config, label=label, progress=progress
        )
        typer.echo(f"revive {name}: {estimate}")
        return
    found = revive_features(
        dictionary, train, lm=pipeline.lm, labels=labels, out=out, config=config, label=label, progress=progress
    )
    if not found:
        # What was said on the way is the whole result.
        return
    texts = {known.feature: known.label for known in read_labels(out) if known.status == "done"}
    _print(name, found, texts)
    typer.echo(f"{firing_rule(dictionary)}; all features: {out}")


def _print(name: str, found: Sequence["Revival"], labels: dict[int, str]) -> None:
    revived = sum(one.status == "revived" for one in found)
    controls, fired = sum(one.controls for one in found), sum(one.controls_fired for one in found)
    base = f"; of random sentences {fired / controls:.2%} fire" if controls else ""
    tried = sum(one.tried for one in found)
    share = f", on {sum(one.fired for one in found) / tried:.1%} of {tried:,} sentences{base}" if tried else ""
    typer.echo(f"{name}: {revived:,} of {len(found):,} silent features wake up{share}")
    table = Table(box=None, pad_edge=False)
    for header in ("feature", "fired", "random", "max"):
        table.add_column(header, justify="right")
    table.add_column("new label, or why not")
    order = sorted(found, key=lambda one: (-one.fired / max(1, one.tried), one.feature))
    for one in order[:SHOWN]:
        what = labels.get(one.feature) or one.reason or "no label"
        table.add_row(
            str(one.feature),
            f"{one.fired}/{one.tried}",
            f"{one.controls_fired}/{one.controls}",
            f"{one.max_act:.3g}" if one.fired else "",
            escape(what),
        )
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
    if len(order) > SHOWN:
        typer.echo(f"and {len(order) - SHOWN:,} more")
