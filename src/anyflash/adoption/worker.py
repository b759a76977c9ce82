"""The process in which one row is measured: `python -m anyflash.adoption.worker MODULE NAME [--quick]`.

Writes one JSON object a line to standard output: {"doing", "part"} while it works, then {"record"} or
{"error"}. A process a row keeps one system's memory and thread pools out of another's figures, and a crash
within its row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback

from anyflash.adoption import memory
from anyflash.adoption.measure import measure
from anyflash.adoption.registry import defined_in


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("name")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    # What systems and their libraries print goes to stderr: stdout carries the records.
    records = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(line: dict[str, object]) -> None:
        records.write(json.dumps(line) + "\n")
        records.flush()

    (row,) = [r for r in defined_in(arguments.module) if r.name == arguments.name]
    try:
        record = measure(row, arguments.quick, lambda doing, part: write({"doing": doing, "part": part}))
    except Exception as error:  # noqa: BLE001 - whatever a system raises is this row's result
        traceback.print_exc()
        write({"error": f"{type(error).__name__}: {error}"})
        return 1
    record["memory_method"] = memory.method()
    write({"record": record})
    return 0


if __name__ == "__main__":
    sys.exit(main())
