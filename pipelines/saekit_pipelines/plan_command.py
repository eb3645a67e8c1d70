"""`saekit plan`: what a recipe will need and take, before anything starts."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saekit_pipelines.guard import guarded
from saekit_pipelines.options import RingSize, with_ring

if TYPE_CHECKING:
    from saekit_pipelines.planning import RecipePlan, TrainStage

__all__ = ["register"]

NOTES = {
    "cache": "by one process",
    "label": "not predicted: a labelling server's own pace; saekit label --dry-run counts requests, tokens and dollars",
    "evaluate": "not predicted",
    "report": "not predicted",
}


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    example = "saekit plan pipelines/recipes/llama3_8b_resid15_batchtopk.toml --gpu h200 --nodes 2"
    app.command(name="plan", epilog=f"Example:  {example}")(guarded(plan))


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe to plan.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.", show_default=False)
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="h100, h200, a100, cpu, ...; this machine's if left out.", show_default=False),
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", help="Devices of a node.", show_default=False)
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes that there are.")] = 1,
    disk: Annotated[
        Path | None,
        typer.Option("--disk", metavar="DIR", help="On the disk where the cache will be.", show_default=False),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option("--width", help="Of the activations, where the model's config does not say.", show_default=False),
    ] = None,
    fp32_tflops: Annotated[float | None, typer.Option(help="In place of the table's.", show_default=False)] = None,
    bf16_tflops: Annotated[float | None, typer.Option(help="In place of the table's.", show_default=False)] = None,
    memory_gb: Annotated[float | None, typer.Option(help="In place of the table's.", show_default=False)] = None,
    memory_tb_s: Annotated[float | None, typer.Option(help="In place of the table's.", show_default=False)] = None,
    link_gb_s: Annotated[float | None, typer.Option(help="In place of the table's.", show_default=False)] = None,
    nic_gb_s: Annotated[float | None, typer.Option(help="In place of the table's.", show_default=False)] = None,
    disk_gb_s: Annotated[float | None, typer.Option(help="In place of the table's.", show_default=False)] = None,
    reader_gb_s: Annotated[float | None, typer.Option(help="In place of the table's.", show_default=False)] = None,
    ring: RingSize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict parameters, memory, disk, speed and hours on named hardware, and say which command to run."""
    from saekit.training.hardware import find_hardware
    from saekit_pipelines.planning import plan_recipe
    from saekit_pipelines.recipe import load_recipe

    changes = {
        "gpus_per_node": gpus_per_node,
        "fp32_tflops": fp32_tflops,
        "bf16_tflops": bf16_tflops,
        "memory_gb": memory_gb,
        "memory_tb_s": memory_tb_s,
        "link_gb_s": link_gb_s,
        "nic_gb_s": nic_gb_s,
        "disk_gb_s": disk_gb_s,
        "reader_gb_s": reader_gb_s,
    }
    hardware = find_hardware(gpu or _here(), changes)
    overrides = with_ring(overrides, ring)
    arguments = [str(recipe), *overrides]
    planned = plan_recipe(
        load_recipe(recipe, overrides), hardware, num_nodes=nodes, disk=disk, width=width, arguments=arguments
    )
    if as_json:
        typer.echo(json.dumps(_as_json(planned), indent=2))
    else:
        _print(planned)


def _here() -> str:
    """Returns the name of this machine's device in the table; a CPU where it is none of them."""
    import torch

    from saekit.training.hardware import known_hardware

    name = torch.cuda.get_device_name(0).lower().replace(" ", "") if torch.cuda.is_available() else ""
    return next((known for known in known_hardware() if known != "cpu" and known in name), "cpu")


def _kind_of_figures(planned: "RecipePlan") -> str:
    if planned.hardware.is_measured:
        return "predicted from rates measured elsewhere; this machine may be faster or slower"
    return "predicted, not measured"


def _print(planned: "RecipePlan") -> None:
    from saekit.activations.plan import duration_text, size_text

    console = Console()
    # A file has no width; a line in one piece can be copied.
    console = console if console.is_terminal else Console(width=200)
    hardware = planned.hardware
    machines = f"{planned.num_nodes} x {hardware.gpus_per_node} " if hardware.host_rate else ""
    console.print(f"[bold]{escape(machines + hardware.title)}[/bold]: speeds are {_kind_of_figures(planned)}")
    console.print(_stage_table(planned))
    console.print(_memory_table(planned))
    for group in planned.together:
        fits = "" if group.fits else ", does not fit"
        console.print(
            f"[bold]--together[/bold]  {escape(', '.join(group.names))} on one read, in one process:"
            f" {size_text(group.device_bytes)} on the device{fits}, {duration_text(group.hours * 3600)};"
            f" apart {duration_text(group.hours_alone * 3600)}",
            soft_wrap=True,
        )
    _print_facts(planned, console)


def _print_facts(planned: "RecipePlan", console: Console) -> None:
    from saekit.activations.plan import size_text

    cache = planned.cache
    if cache.upload_to is not None:
        to = f"{size_text(cache.size.size_bytes)} to upload to {cache.upload_to}"
        console.print(f"[bold]storage[/bold]  {escape(to)}", soft_wrap=True)
    else:
        lacks = "" if planned.fits_disk else " [red]does not fit[/red]"
        console.print(f"[bold]disk[/bold]  {size_text(planned.disk_bytes)}, {size_text(cache.free_bytes)} free{lacks}")
    if planned.ring is not None:
        console.print(f"[bold]ring[/bold]  {planned.ring}", highlight=False, soft_wrap=True)
    layouts: dict[str, list[str]] = {}
    for stage in planned.train:
        layouts.setdefault(stage.plan.why, []).append(stage.name)
    for why, names in layouts.items():
        console.print(f"[bold]layout[/bold]  {escape(', '.join(names))}: {escape(why)}", soft_wrap=True)
    console.print("[bold]commands[/bold]")
    for command in planned.commands:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _stage_table(planned: "RecipePlan") -> Table:
    from saekit.activations.plan import duration_text

    table = Table(box=None, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for column in ("parameters", "processes", "tokens", "tokens/s", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("limit")
    cache = planned.cache
    time = "finished" if cache.is_finished else duration_text(cache.hours * 3600)
    table.add_row("cache", "", "1", f"{cache.size.num_tokens:,}", f"{cache.tokens_per_second:,.0f}", time, cache.limit)
    for stage in planned.train:
        plan = stage.plan
        step = plan.step
        table.add_row(
            escape(f"train {stage.name}"),
            f"{plan.shape.num_trained:,}",
            str(step.num_processes) if step.latents == 1 else f"{step.num_processes // step.latents} x {step.latents}",
            f"{plan.config.num_tokens:,}",
            f"{step.tokens_per_second:,.0f}",
            "finished" if stage.is_finished else duration_text(stage.hours * 3600),
            f"{step.limit}: {_split(stage)}",
        )
    for name in ("label", "evaluate", "report"):
        table.add_row(name, "", "", "", "", "", NOTES[name])
    return table


def _split(stage: "TrainStage") -> str:
    """Returns the milliseconds of the parts of a step, the largest first."""
    step = stage.plan.step
    parts = sorted((*step.parts, *step.beside), key=lambda part: -part.seconds)
    return ", ".join(f"{part.name} {part.seconds * 1e3:.3g} ms" for part in parts[:4])


def _memory_table(planned: "RecipePlan") -> Table:
    """Returns the bytes of one process by part, a row an SAE."""
    from saekit.activations.plan import size_text

    table = Table(box=None, pad_edge=False)
    table.add_column("memory of a process", no_wrap=True)
    parts = list(dict.fromkeys(p for stage in planned.train for p, size in stage.plan.memory.parts.items() if size))
    for column in (*parts, "on the device", "it has", "reader, host", "checkpoint, host", "SAE given, host"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in planned.train:
        memory = stage.plan.memory
        sizes = [memory.parts.get(part, 0) for part in parts]
        whole = [memory.device, int(planned.hardware.memory_gb * 1e9), memory.reader, memory.staged, memory.given]
        table.add_row(escape(stage.name), *map(size_text, [*sizes, *whole]))
    return table


def _as_json(planned: "RecipePlan") -> dict[str, object]:
    cache = planned.cache
    return {
        "hardware": planned.hardware.to_dict(),
        "figures": _kind_of_figures(planned),
        "num_nodes": planned.num_nodes,
        "is_possible": planned.is_possible,
        "hours": planned.hours,
        "commands": list(planned.commands),
        "together": [dataclasses.asdict(group) for group in planned.together],
        "cache": {
            **cache.size._asdict(),
            "free_bytes": cache.free_bytes,
            "upload_to": cache.upload_to,
            "model_bytes": cache.model_bytes,
            "tokens_per_second": cache.tokens_per_second,
            "limit": cache.limit,
            "hours": cache.hours,
            "is_finished": cache.is_finished,
        },
        "ring": None if planned.ring is None else planned.ring.to_json(),
        "train": {stage.name: _stage_json(stage) for stage in planned.train},
        "not_predicted": ["label", "evaluate", "report"],
    }


def _stage_json(stage: "TrainStage") -> dict[str, object]:
    plan = stage.plan
    return {
        "kind": plan.shape.kind,
        "num_trained": plan.shape.num_trained,
        "num_parameters": plan.shape.num_trained + plan.shape.num_held,
        "num_processes": plan.step.num_processes,
        "latents": plan.step.latents,
        "memory_bytes": {
            **plan.memory.parts,
            "device": plan.memory.device,
            "reader": plan.memory.reader,
            "staged": plan.memory.staged,
            "given": plan.memory.given,
        },
        "fits": plan.fits,
        "why": plan.why,
        "tokens_per_second": plan.step.tokens_per_second,
        "step_seconds": plan.step.seconds,
        "limit": plan.step.limit,
        "parts": [dataclasses.asdict(part) for part in (*plan.step.parts, *plan.step.beside)],
        "layouts": {step.num_processes: step.tokens_per_second for step in plan.layouts},
        "spread": [
            {"num_processes": step.num_processes, "latents": step.latents, "tokens_per_second": step.tokens_per_second}
            for step in plan.spread
        ],
        "hours": stage.hours,
        "is_finished": stage.is_finished,
    }
