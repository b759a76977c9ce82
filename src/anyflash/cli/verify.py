"""`anyflash verify`: the contract, on the backends of this machine."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from anyflash.contract.backends import present
from anyflash.contract.cases import Case
from anyflash.contract.generate import generated, parse, repro
from anyflash.contract.run import Report, run
from anyflash.contract.table import table
from anyflash.core.errors import AnyflashError, InvalidCall

SHOWN = 20


def command(
    backend: Annotated[
        str | None, typer.Option("--backend", help="One backend; without it, every one that works here.")
    ] = None,
    cases: Annotated[
        int, typer.Option("--cases", min=0, help="How many generated cases to run beside the table.")
    ] = 100,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the generated cases.")] = 0,
    only: Annotated[
        str, typer.Option("--only", metavar="TEXT", help="Cases of the table whose name contains this.")
    ] = "",
    one: Annotated[
        str | None,
        typer.Option("--repro", metavar="CASE", help="One case, as an earlier run named it."),
    ] = None,
) -> None:
    """Run the contract: every case of the table, and generated ones, on the backends of this machine.

    Each runs forward and backward in clean memory, where results are judged by the error of plain attention
    in the same dtype, and twice in poisoned memory, where they must be the same bits. Exits with status 1 if
    anything fails, and prints how to repeat it.
    """
    names = _backends(backend)
    if one is not None:
        chosen: Sequence[Case] = [parse(one)]
    else:
        chosen = [case for case in table() if only in case.id] + list(generated(cases, seed))
    console = Console()
    started = time.perf_counter()
    reports = _run(names, chosen, console)
    _show(names, reports, console)
    console.print(f"{len(reports)} runs in {time.perf_counter() - started:.0f} s", highlight=False)
    if one is not None:
        console.print(str(chosen[0]), markup=False, highlight=False)
    if any(report.failures for report in reports):
        raise typer.Exit(1)


def _backends(backend: str | None) -> list[str]:
    names = present()
    if backend is None:
        return names
    if backend not in names:
        raise InvalidCall("--backend", repr(backend), f"one that works here: {', '.join(names)}")
    return [backend]


def _run(names: Sequence[str], chosen: Sequence[Case], console: Console) -> list[Report]:
    reports: list[Report] = []
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        for name in names:
            task = bar.add_task(name, total=len(chosen))
            for case in chosen:
                reports.append(attempt(case, name))
                bar.advance(task)
    return reports


def attempt(case: Case, backend: str) -> Report:
    """The report of a case; an error of the backend is its failure, and the others still run."""
    try:
        return run(case, backend)
    except (AnyflashError, ArithmeticError, LookupError, TypeError, ValueError, AssertionError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
        return Report(case, backend, [f"{type(error).__name__}: {error} ({where})"])


def _show(names: Sequence[str], reports: Sequence[Report], console: Console) -> None:
    summary = Table(
        "backend", "passed", "failed", "declined", "greatest error over its bound", box=box.SIMPLE_HEAD
    )
    for name in names:
        own = [report for report in reports if report.backend == name]
        failed = sum(bool(report.failures) for report in own)
        declined = sum(bool(report.declined) for report in own)
        closest = max(own, key=lambda report: report.ratio, default=None)
        ratio = "" if closest is None else f"{closest.ratio:.2f}  {closest.case.id}"
        passed = len(own) - failed - declined
        summary.add_row(name, str(passed), f"[red]{failed}[/]" if failed else "0", str(declined), ratio)
    console.print(summary)
    wrong = [report for report in reports if report.failures]
    for report in wrong[:SHOWN]:
        console.print(f"[red]{report.backend} {report.case.id}[/]", highlight=False)
        for said in report.failures:
            console.print(f"  {said}", markup=False, highlight=False)
        command = f"python -m anyflash verify --backend {report.backend} --repro '{repro(report.case)}'"
        console.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)
    if len(wrong) > SHOWN:
        console.print(f"and {len(wrong) - SHOWN} more")
