"""`anyflash adoption`: real systems on real input, with their own attention and with ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from anyflash.adoption import machine, markdown, record, registry, run, units
from anyflash.adoption.row import Row


def command(
    only: Annotated[str | None, typer.Option(help="only the rows whose system or name contains this")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="smaller workloads, fewer repeats")] = False,
    out: Annotated[Path, typer.Option(help="where adoption.json and adoption.html go")] = Path("."),
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="also write a Markdown report, with charts beside it"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="keep what adoption.json in --out holds, but for failed rows and --only"
        ),
    ] = False,
    again: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE.json", help="show an earlier run; measure nothing"),
    ] = None,
) -> None:
    """Run real systems with their own attention and with anyflash; write adoption.json and adoption.html."""
    console = Console()
    if again is None:
        try:
            rows = registry.rows(only)
        except KeyError as error:
            raise typer.BadParameter(error.args[0], param_hint="--only") from error
        kept = out / "adoption.json"
        earlier = record.read(kept) if resume and kept.exists() else None
        if earlier is not None and only is None:
            done = {r["name"] for r in earlier["rows"] if r["status"] == "ok"}
            rows = [row for row in rows if row.name not in done]
        where = machine.describe()
        order = [row.name for row in registry.rows()]

        def whole(measured: list[dict[str, Any]]) -> dict[str, Any]:
            made = record.report(measured, quick, where)
            return made if earlier is None else record.merged(earlier, made, order)

        found = whole(_measure(console, rows, quick, lambda measured: record.write(whole(measured), out)))
    else:
        found = record.read(again)
    data, html = record.write(found, out)
    _print(console, found)
    if report is not None:
        written = markdown.write(found, report)
        console.print("\nwrote " + ", ".join(map(str, written)), highlight=False)
    console.print(f"\nwrote {data} and {html}: open the latter in a browser", highlight=False)
    if any(r["status"] == "failed" for r in found["rows"]):
        raise typer.Exit(1)


def _measure(
    console: Console, rows: list[Row], quick: bool, keep: Callable[[list[dict[str, Any]]], object]
) -> list[dict[str, Any]]:
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[doing]}"),
    )
    with Progress(*columns, console=console) as bar:
        tasks = {r.name: bar.add_task(r.name, total=1.0, start=False, doing="") for r in rows}

        def progress(row: Row, doing: str, part: float) -> None:
            task = tasks[row.name]
            bar.start_task(task) if not bar.tasks[task].started else None
            bar.update(task, completed=part, doing=doing)

        return run.run(rows, quick, progress, keep)


def _print(console: Console, found: dict[str, Any]) -> None:
    rows = found["rows"]
    measured = [r for r in rows if r["status"] == "ok"]
    if measured:
        table = Table(box=None, header_style="bold", padding=(0, 1))
        table.add_column("system, workload")
        for name in ("eager", "best own", "anyflash", "faster", "differs"):
            table.add_column(name, justify="right", no_wrap=True)
        for r in measured:
            table.add_row(*_cells(r), end_section=True)
        console.print(table)
        console.print(
            "[dim]time and peak memory of a step; speed-up over eager and over its best own; greatest "
            "difference from eager, of outputs and of gradients"
        )
    for r in rows:
        if r["status"] == "failed":
            console.print(f"[red]failed[/] {r['system']}, {r['title']}: {r['why']}", highlight=False)
        elif r["status"] == "absent":
            how = "; ".join(r["how_to_install"])
            console.print(f"[yellow]absent[/] {r['system']}, {r['title']}: {how}", highlight=False)


def _cells(row: dict[str, Any]) -> list[str]:
    of = {v["role"]: v for v in row["variants"]}
    cells = [f"{row['system']}\n[dim]{row['title']}[/]"]
    cells += [
        f"{units.seconds(of[role]['median'])}\n[dim]{units.size(of[role]['peak_bytes'])}[/]"
        for role in ("eager", "best", "ours")
    ]
    gains = [row["speedup"][role] for role in ("eager", "best")]
    cells.append("\n".join(f"[{'green' if g >= 1 else 'red'}]{units.factor(g)}[/]" for g in gains))
    cells.append("\n".join(f"{a['difference']:.1e}" for a in row["agreement"]))
    return cells
