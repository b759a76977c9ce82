"""The results of `anyflash bench` in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from anyflash.bench.run import Report


def show(report: Report, console: Console) -> None:
    """One table a group of cells, then the goals, then what was refused."""
    from anyflash.bench import run, summary

    warning = summary.disturbed(report)
    if warning:
        console.print(f"[yellow]{warning}[/]", highlight=False)
    columns = summary.families(report)
    # One family says no more than the best peer does.
    columns = columns if len(columns) > 1 else []
    for group, records in summary.groups(report).items():
        table = _table(f"{group}: {summary.mean(records)}", *summary.HEADINGS, *columns)
        for record in records:
            row = summary.row(record)
            ratio = Text("") if row.ratio is None else _coloured(f"{row.ratio:.2f}", row.ratio >= 1)
            peers = (row.peers.get(column, "") for column in columns)
            table.add_row(row.name, row.ours, row.rate, row.share, row.best, ratio, row.interval, *peers)
        console.print(table)
    _goals(report, console)
    for record in run.refused(report):
        console.print(Text(f"{record['name']}: {record['status']}, {record['why']}", "red"))


def _goals(report: Report, console: Console) -> None:
    from anyflash.bench.goals import GOALS

    table = _table("Goals", "", "target", "found", "over")
    for goal in GOALS:
        found = goal.compute(report)
        if found is not None:
            value = _coloured(goal.show.format(found.value), goal.reached(found))
            table.add_row(
                goal.text, f"{goal.sense} {goal.show.format(goal.target)}", value, Text(found.over, "dim")
            )
    if table.row_count:
        console.print(table)


def _coloured(text: str, good: bool) -> Text:
    return Text(text, "green" if good else "red")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0)
    return table
