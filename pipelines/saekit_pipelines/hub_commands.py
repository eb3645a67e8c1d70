"""Commands about released dictionaries: find, look at, download, publish."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saekit_pipelines.console import make_progress
from saekit_pipelines.guard import guarded

if TYPE_CHECKING:
    from saekit.hub import DictionaryInfo

__all__ = ["PANEL", "Revision", "register"]

PANEL = "Dictionaries"
"""Where the help lists commands that need no recipe."""

Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="[cyan]owner/repo:sub/path[/cyan] on the hub, a name that [cyan]saekit ls[/cyan] lists, or a local folder or file.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.", show_default=False)
]
"""The option of every command that takes a place on the hub."""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command, example in (
        (list_, "saekit ls --model gemma-2-2b --site resid_post --width 16k"),
        (info, "saekit info gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"),
        (pull, "saekit pull google/gemma-scope-2b-pt-res --pattern 'layer_12/width_16k/*' --to scope"),
        (push, "saekit push runs/mine/train/topk me/my-sae --also saelens --dry-run"),
    ):
        name = command.__name__.rstrip("_").replace("list", "ls")
        app.command(name=name, epilog=f"Example:  {example}", rich_help_panel=PANEL)(guarded(command))


def list_(
    ref: Annotated[
        str | None,
        typer.Argument(metavar="REF", help="A release or folder whose dictionaries the hub lists.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Part of the model's name: gemma-2-2b.", show_default=False)] = None,
    family: Annotated[
        str | None, typer.Option(help="Part of the family's or release's name.", show_default=False)
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="resid_pre, resid_post, mlp_out, attn_out, mlp, ...", show_default=False)
    ] = None,
    width: Annotated[str | None, typer.Option(help="Features: 16k or 16384.", show_default=False)] = None,
    l0: Annotated[str | None, typer.Option("--l0", help="As in the names: 50, small.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(help="Rows to show; 0: all.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List the known releases, the dictionaries in them that fit, or what a repository holds.

    Every name can be given to [cyan]saekit info[/cyan], [cyan]saekit pull[/cyan] and [cyan]load_sae[/cyan]. A name with
    a pattern behind it is a folder: [cyan]saekit ls NAME[/cyan] asks the hub what is in it.
    """
    from saekit.errors import ConfigError
    from saekit.hub import known_entries

    filters = {"model": model, "family": family, "site": site, "width": width, "l0": l0}
    if ref is not None:
        if any(value is not None for value in filters.values()):
            raise ConfigError(f"ls: {ref!r} and a filter, needs one of them")
        rows = _listed(ref)
        columns: tuple[str, ...] = ("name", "MB")
    elif any(value is not None for value in filters.values()):
        rows = [entry.to_dict() for entry in known_entries(**filters)]
        columns = ("name", "below", "model", "kind", "site", "layer", "width", "l0")
        if not rows:
            raise ConfigError("ls: no known dictionary fits, needs fewer filters; 'saekit ls' shows the releases")
    else:
        rows = _releases()
        columns = ("release", "family", "model", "kind", "site", "entries")
    shown = rows if limit == 0 or as_json else rows[:limit]
    if as_json:
        typer.echo(json.dumps(shown, indent=1))
        return
    _print_rows(columns, shown)
    if len(shown) < len(rows):
        typer.echo(f"{len(rows) - len(shown):,} more; --limit 0 shows all, filters show fewer", err=True)


def info(ref: Ref, revision: Revision = None, as_json: AsJson = False) -> None:
    """Say what a dictionary is: shapes, hook point, architecture, size, licence. No weights are downloaded."""
    from saekit.hub import dictionary_info

    found = dictionary_info(ref, revision=revision)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in _facts(found):
        table.add_row(f"[bold]{escape(key)}", escape(value))
    _console().print(table)


def pull(
    ref: Ref,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Copy the files there too; they load from there.", show_default=False),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="Which dictionaries of a folder of several.", show_default=False)
    ] = None,
    revision: Revision = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", help="What the weights file must hash to.", show_default=False)
    ] = None,
) -> None:
    """Download a dictionary into the hub's cache: only the files it needs, resumed where a download was cut.

    Prints where it is. With HF_HUB_OFFLINE=1 only the cache is asked. Gated repositories need [cyan]hf auth login[/cyan].
    """
    from saekit.hub import pull as pull_

    typer.echo(pull_(ref, to=to, pattern=pattern, revision=revision, sha256=sha256, progress=make_progress()))


def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="An SAE as saekit writes it: runs/mine/train/topk.", show_default=False),
    ],
    repo: Annotated[str, typer.Argument(metavar="owner/repo", help="Made where there is none.", show_default=False)],
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also", help="Put saelens, sparsify or dictionary_learning files beside it.", show_default=False
        ),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="Yours, e.g. apache-2.0.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="The language model's name on the hub, where the run names a local one.", show_default=False
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--evaluation", metavar="DIR", help="Whose figures the card shows; else the run's own.", show_default=False
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Only you see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and the files, and send nothing.")] = False,
) -> None:
    """Publish a dictionary with a card that says what it was trained on, how it measures and how to load it.

    The card is written from the run's manifests and evaluation; folders of this machine are left out of it.
    """
    from saekit.hub import plan_push
    from saekit.hub import push as push_

    metrics = _metrics(folder, evaluation)
    if dry_run:
        plan = plan_push(folder, repo, also=also or (), model=model, licence=licence, metrics=metrics)
        typer.echo(plan.card)
        typer.echo(f"to {plan.repo}:", err=True)
        for name, size in plan.files.items():
            typer.echo(f"{size:>14,}  {name}", err=True)
        return
    typer.echo(push_(folder, repo, also=also or (), model=model, licence=licence, metrics=metrics, private=private))


def _metrics(folder: Path, evaluation: Path | None) -> str | None:
    """Returns the table of an evaluation: the one that is named, or the run's own of just this dictionary."""
    from saekit.evaluation import read_evaluation, sae_fingerprint
    from saekit.hub import load_sae
    from saekit.manifest import read_manifest

    if evaluation is not None:
        return read_evaluation(evaluation).to_markdown()
    resolved = folder.resolve()
    near = resolved.parent.parent / "evaluate" / resolved.name
    manifest = read_manifest(near)
    if manifest is None or manifest.status != "complete":
        return None
    is_of_this = manifest.inputs.get("sae") == sae_fingerprint(load_sae(folder))
    return read_evaluation(near).to_markdown() if is_of_this else None


def _listed(ref: str) -> list[dict[str, object]]:
    from saekit.hub.discover import dictionaries
    from saekit.hub.outline import file_sizes
    from saekit.hub.place import locate

    place = locate(ref, None)
    rows: list[dict[str, object]] = []
    for name, files in dictionaries(place.names).items():
        sizes = file_sizes(place, list(files), place.folder)
        rows.append({"name": place.name_of(name), "MB": f"{sum(size for size, _ in sizes.values()) / 1e6:,.1f}"})
    return rows


def _releases() -> list[dict[str, object]]:
    from saekit.hub import known_entries

    rows: dict[str, dict[str, object]] = {}
    for entry in known_entries():
        name = entry.name.split("/")[0]
        row = rows.setdefault(
            name, {"release": name, "family": entry.family, "model": entry.model, "kind": "", "site": "", "entries": 0}
        )
        row["entries"] = int(str(row["entries"])) + 1
        for key, value in (("kind", entry.kind), ("site", entry.site)):
            held = [part for part in str(row[key]).split(", ") if part]
            row[key] = ", ".join(held if value in held else [*held, value])
    return list(rows.values())


def _facts(found: "DictionaryInfo") -> list[tuple[str, str]]:
    rows: list[tuple[str, object]] = [
        ("ref", found.ref),
        ("revision", found.revision),
        ("format", found.format),
        ("kind", found.kind),
        ("architecture", None if found.architecture is None else json.dumps(dict(found.architecture))),
        ("input -> features", f"{found.d_in:,} -> {found.d_sae:,}" if found.d_in and found.d_sae else None),
        ("layers", found.num_layers),
        ("hook point", _joined(found.hook_point)),
        ("predicts", _joined(found.hook_point_out)),
        ("after the step", found.transform),
        ("normalisation", found.normalisation),
        ("activations", found.units),
        ("model", found.model),
        ("licence", found.licence or "not said"),
        ("size", f"{found.num_bytes / 1e6:,.1f} MB in {len(found.files)} files"),
        *((f"  {name}", f"{size:,} bytes  {sha256 or ''}") for name, (size, sha256) in found.files.items()),
        *((f"  {name}", f"{dtype} {list(shape)}") for name, (dtype, shape) in list(found.tensors.items())[:24]),
        ("  ...", f"{len(found.tensors) - 24} more tensors" if len(found.tensors) > 24 else None),
    ]
    return [(key, str(value)) for key, value in rows if value is not None]


def _joined(point: str | list[str] | None) -> str | None:
    return ", ".join(point) if isinstance(point, list) else point


def _print_rows(columns: Sequence[str], rows: Sequence[dict[str, object]]) -> None:
    table = Table(box=None, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, no_wrap=position == 0, justify="right" if column in {"MB", "entries"} else "left")
    for row in rows:
        table.add_row(*(escape("" if row[column] is None else str(row[column])) for column in columns))
    _console().print(table)


def _console() -> Console:
    console = Console()
    # A file has no width; a name in one piece can be used.
    return console if console.is_terminal else Console(width=200)
