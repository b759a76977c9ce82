"""`python -m anyflash`: the same as the `anyflash` command."""

from __future__ import annotations

from anyflash.cli.main import main

main()
