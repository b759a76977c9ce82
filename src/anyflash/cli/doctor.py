"""`anyflash doctor`: what is here, what works, and why the rest does not."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anyflash.cli._machine import Facts, facts

GOOD, BAD, ABSENT = ("✓", "green"), ("✗", "red"), ("–", "dim")


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run each backend and adapter on a small problem.")
    ] = True,
) -> None:
    """Say what is here, which backends and adapters work, why others do not, and every setting.

    Exits with status 1 if something that should work here does not.
    """
    found = facts(check)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found, Console())
    if broken(found):
        raise typer.Exit(1)


def broken(found: Facts) -> list[str]:
    """Names of what should work and does not. What is merely absent is not broken."""
    rows = [row for kind in ("backends", "adapters") for row in found[kind]]
    names = [row["name"] for row in rows if row["broken"]]
    names += [row["name"] for row in found["settings"] if row["problem"]]
    return names + (["processor"] if found["processor"]["error"] else [])


def show(found: Facts, console: Console) -> None:
    """All of it as tables."""
    python, chip = found["python"], found["processor"]
    console.print(
        f"[bold]anyflash[/] {found['anyflash'] or '(not installed: run from its sources)'}, "
        f"{python['implementation']} {python['version']} on {python['platform']}"
    )
    console.print(
        f"{chip['machine']} ({chip['cpu']}), {chip['usable_cores']} of {chip['cores']} cores usable, "
        f"LLVM {chip['llvm']}\n",
        highlight=False,
    )
    for table in (
        _sets(chip),
        _backends(found["backends"]),
        _adapters(found["adapters"]),
        _frontends(found["frontends"]),
        _packages(found["packages"]),
        _settings(found["settings"]),
        _cache(found["cache"]),
    ):
        console.print(table)
    wrong = broken(found)
    if wrong:
        console.print(f"[red]Does not work and should:[/] {', '.join(wrong)}")


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=any(columns),
    )
    table.add_column("", width=1)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _row(table: Table, sign: tuple[str, str], *cells: Any) -> None:
    table.add_row(Text(*sign), *("" if cell is None else Text(str(cell)) for cell in cells))


def _sets(chip: Facts) -> Table:
    table = _table("CPU instruction sets", "", "")
    for name, why in chip["targets"].items():
        used = "used by the CPU kernels" if name == chip["chosen"] else "can be used: ANYFLASH_CPU=" + name
        _row(table, ABSENT if why else GOOD, name, why or used)
    if chip["error"]:
        _row(table, BAD, "ANYFLASH_CPU", chip["error"])
    return table


def _backends(rows: list[Facts]) -> Table:
    table = _table("Backends, in order of preference", "", "")
    for row in rows:
        state = "ran, and agrees with the definition" if row["ran"] else "present, not run"
        if row["rank"] is None:
            state += "; used only if named"
        _row(table, _sign(row), row["name"], row["problem"] or state)
    return table


def _adapters(rows: list[Facts]) -> Table:
    table = _table("Adapters", "name", "tested with", "here", "")
    for row in rows:
        state = row["problem"] or ("works" if row["tested"] else "works, outside the tested versions")
        _row(table, _sign(row), row["name"], row["target"], row["version"], state)
    return table


def _frontends(rows: list[Facts]) -> Table:
    table = _table("Frameworks", "", "")
    for row in rows:
        _row(table, GOOD if row["version"] else ABSENT, row["name"], row["version"] or "not installed")
    return table


def _packages(rows: list[Facts]) -> Table:
    table = _table("Packages", "name", "version", "for", "")
    for row in rows:
        missing = row["version"] is None
        _row(
            table, ABSENT if missing else GOOD, row["name"], row["version"] or "absent", row["for"],
            row["install"] if missing else None,
        )  # fmt: skip
    return table


def _settings(rows: list[Facts]) -> Table:
    table = _table("Settings", "environment variable", "value", "")
    for row in rows:
        value = "not set" if row["value"] is None else f"{row['value']}{'' if row['given'] else ' (default)'}"
        _row(table, BAD if row["problem"] else GOOD, row["name"], row["problem"] or value, row["meaning"])
    return table


def _cache(row: Facts) -> Table:
    table = _table("Compiled kernels on disk", "directory", "objects", "MiB", "")
    state = (
        "off (ANYFLASH_CACHE=0)" if not row["enabled"] else "writable" if row["writable"] else "not writable"
    )
    sign = GOOD if row["enabled"] and row["writable"] else ABSENT
    size = f"{row['bytes'] / 2**20:.1f}"
    _row(table, sign, row["directory"], row["objects"], size, row["problem"] or state)
    return table


def _sign(row: Facts) -> tuple[str, str]:
    if row["broken"]:
        return BAD
    return ABSENT if row["problem"] else GOOD
