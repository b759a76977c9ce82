"""`anyflash bench`: our attention beside that of other packages, on a grid of cells."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from anyflash.cli import _bench_charts, _bench_table

if TYPE_CHECKING:
    from anyflash.bench.run import Report, Wanted

_PIPE_WIDTH = 200
_NEEDS = ("torch", "psutil")


def command(
    grid: Annotated[
        str, typer.Option(help="core: float32 beside torch's flash kernel. full: all of it.")
    ] = "core",
    only: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Cells whose name contains this regular expression.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of everybody; without it all cores.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, wider intervals.")] = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="Only peers whose name begins so; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of bench.json and the charts.")] = Path("build/bench"),
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Also write a Markdown report, with charts beside it."),
    ] = None,
    again: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE.json", help="Show an earlier run; measure nothing."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that left bench.json in --out.")
    ] = False,
    list_cells: Annotated[bool, typer.Option("--list", help="Name the cells; measure nothing.")] = False,
) -> None:
    """Time our attention and its peers, in turns, after checking that their results agree.

    Exits with status 1 if a result of ours was refused or a call of ours failed.
    """
    for package in _NEEDS:
        if importlib.util.find_spec(package) is None:
            typer.echo(f"anyflash bench needs {package}: pip install 'anyflash[bench]'", err=True)
            raise typer.Exit(1)
    from anyflash.bench import run

    wanted = run.Wanted(grid, only, tuple(peer or ()), threads, quick)
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    if list_cells:
        for cell in run.select(wanted):
            typer.echo(cell.name)
        return
    keep = out / "bench.json"
    if again is None:
        found = _measure(wanted, keep, run.read(keep) if resume and keep.exists() else None, console)
    else:
        found = run.read(again)
    _bench_table.show(found, console)
    written = [keep] if again is None else []
    written += _bench_charts.draw(found, out, "bench")
    if report is not None:
        written += write_report(found, report)
    console.print("written: " + ", ".join(map(str, written)), highlight=False)
    if run.refused(found):
        raise typer.Exit(1)


def write_report(found: Report, path: Path) -> list[Path]:
    """The Markdown report, and the charts that it shows."""
    from anyflash.bench.report import markdown

    path.parent.mkdir(parents=True, exist_ok=True)
    charts = _bench_charts.draw(found, path.parent, path.stem)
    path.write_text(markdown(found, [chart.name for chart in charts]), encoding="utf-8")
    return [path, *charts]


def _measure(wanted: Wanted, keep: Path, earlier: Report | None, console: Console) -> Report:
    from anyflash.bench import run

    cells = run.select(wanted)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=len(cells))

        def progress(number: int, cell: object, what: str, part: float) -> None:
            name = getattr(cell, "name", "")
            bar.update(task, completed=number + part, description=f"{name} [dim]{what}[/]")

        return run.run(wanted, progress, keep, earlier)
