"""The command line: thin commands over `stages`; one line and exit code 2 for everything a user can mend."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saekit_pipelines import hub_commands, plan_command, score_command
from saekit_pipelines.guard import EXIT_USER_ERROR
from saekit_pipelines.guard import guarded as _guarded
from saekit_pipelines.options import RecipePath, RingSize, SaeName, first_process_progress, with_budget, with_ring
from saekit_pipelines.revive_command import revive

if TYPE_CHECKING:
    from saekit.evaluation import EvaluationTable

__all__ = ["app", "main"]

app = typer.Typer(
    name="saekit",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Sparse dictionaries of language models: cache activations, train SAEs, label, evaluate and browse their features.\n\n"
    "A stage reads one recipe and works in the recipe's folder. Run a command again to resume it; a finished stage is skipped.\n\n"
    "[dim]Example:[/dim]  saekit run pipelines/recipes/gpt2_resid8_topk.toml out=runs/try cache.num_tokens=1_000_000",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the recipe, e.g. [cyan]train.topk.sae.k=64[/cyan].",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and what it costs, then stop.")]
Together = Annotated[
    bool,
    typer.Option(
        "--together", help="Train SAEs that read the same tokens in the same order on one read; same bits, more memory."
    ),
]
LabelDryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Gather the evidence, then print the requests, tokens and cost that the labelling model would take; ask nothing.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        metavar="USD",
        help="Stop before the labelling model costs more than this, all runs of the folder and requests on their way included.",
        show_default=False,
    ),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Ask the labelling model anew about features whose labels failed.")
]


@app.command(epilog="Example:  saekit run pipelines/recipes/gpt2_resid8_topk.toml --dry-run")
@_guarded
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    together: Together = False,
    ring: RingSize = None,
) -> None:
    """Run every stage of a recipe: cache, train, label, evaluate, report."""
    from saekit_pipelines.stages import Pipeline

    pipeline = Pipeline.load(recipe, with_ring(overrides, ring), progress=first_process_progress())
    if dry_run:
        _print_plan(pipeline.plan())
        return
    index = pipeline.run(together=together)
    _print_metrics("held-out documents", pipeline.summary())
    typer.echo(f"report: {index}")


plan_command.register(app)


@app.command(epilog="Example:  saekit cache RECIPE.toml cache.num_tokens=10_000_000 --dry-run")
@_guarded
def cache(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Stream the model's activations to disk, or with storage.url=s3://bucket/folder to an object store."""
    from saekit_pipelines.stages import Pipeline

    pipeline = Pipeline.load(recipe, overrides or [], progress=first_process_progress())
    if dry_run:
        _print_plan(pipeline.plan(only="cache"))
        return
    pipeline.cache()


@app.command(epilog="Example:  accelerate launch -m saekit_pipelines train RECIPE.toml --sae topk")
@_guarded
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    sae: SaeName = None,
    together: Together = False,
    ring: RingSize = None,
) -> None:
    """Train the recipe's SAEs on the cached activations, or on those of a ring."""
    from saekit_pipelines.stages import Pipeline

    pipeline = Pipeline.load(recipe, with_ring(overrides, ring), progress=first_process_progress())
    pipeline.train(sae, together=together)


@app.command(epilog="Example:  saekit label RECIPE.toml --sae topk label.max_features=500 --budget 2")
@_guarded
def label(
    recipe: RecipePath,
    overrides: Overrides = None,
    sae: SaeName = None,
    dry_run: LabelDryRun = False,
    budget: Budget = None,
    retry_failed: RetryFailed = False,
) -> None:
    """Describe every feature, from what makes it fire and from what it promotes, and score the descriptions."""
    from saekit_pipelines.stages import Pipeline

    pipeline = Pipeline.load(recipe, with_budget(overrides, budget), progress=first_process_progress())
    if dry_run:
        _print_plan(pipeline.label_estimates(sae))
        return
    pipeline.label(sae, retry_failed=retry_failed)


score_command.register(app)
app.command(epilog="Example:  saekit revive RECIPE.toml --sae topk revive.max_features=50 --budget 1")(revive)


@app.command(
    name="compare-labels",
    epilog="Example:  saekit compare-labels runs/a/label/topk runs/b/label/topk --labeler llm:gpt-4.1-mini",
)
@_guarded
def compare_labels(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A folder of labels, e.g. runs/a/label/topk.", show_default=False)
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, or the same one.", show_default=False)],
    labeler: Annotated[
        str | None,
        typer.Option(
            "--labeler", metavar="NAME", help="Whose labels of A; else all that both have.", show_default=False
        ),
    ] = None,
    other: Annotated[
        str | None,
        typer.Option("--other", metavar="NAME", help="Whose labels of B; else the same as of A.", show_default=False),
    ] = None,
) -> None:
    """Compare two sets of labels, feature by feature and text by text, with interval and McNemar's test."""
    from saekit.labelling import compare_labels as compare

    for comparison in compare(a, b, labeler=labeler, other=other):
        typer.echo(str(comparison))


@app.command(epilog="Example:  saekit evaluate RECIPE.toml --sae jumprelu")
@_guarded
def evaluate(recipe: RecipePath, overrides: Overrides = None, sae: SaeName = None) -> None:
    """Measure FVU, L0, dead features, CE and KL recovered on held-out documents, beside null rows."""
    from saekit_pipelines.stages import Pipeline

    pipeline = Pipeline.load(recipe, overrides or [], progress=first_process_progress())
    pipeline.evaluate(sae)
    for name, table in pipeline.metric_tables(sae).items():
        _print_metrics(name, table)


@app.command(epilog="Example:  saekit report RECIPE.toml")
@_guarded
def report(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Build the static feature browser (opens from disk, no server)."""
    from saekit_pipelines.stages import Pipeline

    typer.echo(f"report: {Pipeline.load(recipe, overrides or [], progress=first_process_progress()).report()}")


@app.command(epilog="Example:  saekit export RECIPE.toml out/ --sae topk --to neuronpedia --as names.toml")
@_guarded
def export(
    recipe: RecipePath,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder or file to write.", show_default=False)],
    overrides: Overrides = None,
    sae: SaeName = None,
    to: Annotated[str, typer.Option("--to", help="neuronpedia or circuit-tracer.")] = "neuronpedia",
    names: Annotated[
        Path | None,
        typer.Option(
            "--as", metavar="TOML", help="Neuronpedia's names: model_id, source_id, creator_id, ...", show_default=False
        ),
    ] = None,
) -> None:
    """Write the labels for Neuronpedia's importer, or as the labels of a circuit-tracer graph."""
    from saekit_pipelines.exports import export_labels
    from saekit_pipelines.stages import Pipeline

    pipeline = Pipeline.load(recipe, overrides or [], progress=first_process_progress())
    typer.echo(f"{export_labels(pipeline, target, sae=sae, to=to, names=names)}: {to}")


@app.command(epilog="Example:  saekit status runs/quickstart")
@_guarded
def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.", show_default=False)],
) -> None:
    """Show which stages of a run are finished, running or missing."""
    from saekit_pipelines.status import stage_rows

    table = Table(box=None, pad_edge=False)
    for column in ("stage", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column("produced")
    table.add_column("finished", no_wrap=True)
    rows = stage_rows(folder)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)
    if any(status != "finished" for _, status, _, _ in rows):
        typer.echo("run the recipe again to resume what is unfinished and to do what is missing")


@app.command(epilog="Example:  saekit verify runs/quickstart/cache --repair")
@_guarded
def verify(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="A cache folder, or its s3://, gs:// or http(s):// URL.", show_default=False
        ),
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="Forget the broken parts; 'saekit cache' then makes exactly those anew.")
    ] = False,
) -> None:
    """Check every activation shard against its checksum."""
    from saekit_pipelines.status import verify_cache

    problems = verify_cache(folder, repair=repair)
    for problem in problems:
        typer.echo(problem)
    if problems:
        remedy = "run 'saekit cache'" if repair else "run this again with --repair, then 'saekit cache'"
        typer.echo(f"error: {folder}: {len(problems)} broken; {remedy} to make them anew", err=True)
        raise typer.Exit(EXIT_USER_ERROR)
    typer.echo(f"{folder}: every shard is as it was written")


@app.command(
    epilog="Example:  saekit convert EleutherAI/sae-llama-3-8b-32x:layers.10 mine --to saelens",
    rich_help_panel=hub_commands.PANEL,
)
@_guarded
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Any reference to a dictionary.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new folder.", show_default=False)],
    to: Annotated[
        str, typer.Option("--to", help="saekit, saelens, sparsify, dictionary_learning or circuit-tracer.")
    ] = "saekit",
    revision: hub_commands.Revision = None,
) -> None:
    """Write a dictionary in another library's format; for circuit-tracer, every layer of a set."""
    from saekit.errors import ConfigError
    from saekit.hub import convert_sae

    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ConfigError(f"convert: {str(target)!r} is not empty, needs a new folder")
    convert_sae(source, target, format=to, revision=revision)
    typer.echo(f"{target}: {to}")


hub_commands.register(app)


def _print_plan(rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in rows:
        table.add_row(f"[bold]{escape(key)}", escape(value))
    Console().print(table)


def _print_metrics(name: str, metrics: "EvaluationTable") -> None:
    table = Table(title=name, box=None, pad_edge=False)
    for column, header in enumerate(metrics.header):
        table.add_column(header, justify="right" if column else "left")
    for row in metrics.rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console()
    # A file has no width; figures with their intervals in one line are easier to read and to grep.
    Console(width=None if console.is_terminal else 140).print(table)


def main() -> None:
    """Entry point of `saekit`."""
    app()
