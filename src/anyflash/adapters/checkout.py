"""Systems that exist only as source: a folder that the environment names, and how to import from it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Checkout:
    """The source of one system.

    package     what messages call it
    variable    the environment variable that names the folder: ANYFLASH_SRC_OPENFOLD
    repository  where it comes from
    revision    the commit that ours was tested with
    """

    package: str
    variable: str
    repository: str
    revision: str

    @property
    def how_to_install(self) -> str:
        folder = self.repository.rstrip("/").rsplit("/", 1)[-1]
        return (
            f"git clone {self.repository} && git -C {folder} checkout {self.revision} "
            f"&& export {self.variable}=$PWD/{folder}"
        )

    def folder(self) -> Path | None:
        """The folder, or None if the variable is not set. Raises NotADirectoryError if it names none."""
        named = os.environ.get(self.variable)
        if not named:
            return None
        folder = Path(named)
        if not folder.is_dir():
            raise NotADirectoryError(
                f"{self.variable} is {named!r}, which is no folder; {self.how_to_install}"
            )
        return folder.resolve()

    def installed(self) -> str | None:
        """The commit of the checkout, "source" if it carries none, None without a checkout."""
        folder = self.folder()
        if folder is None:
            return None
        head = folder / ".git" / "HEAD"
        if not head.is_file():
            return "source"
        named = head.read_text(encoding="ascii").strip().removeprefix("ref: ")
        at = folder / ".git" / named
        return (at.read_text(encoding="ascii").strip() if at.is_file() else named)[: len(self.revision)]

    @contextmanager
    def importable(self, *bare: str, stubs: tuple[str, ...] = (), under: str = "") -> Iterator[Path]:
        """Within: modules are imported from the checkout before anything installed; gives its folder.

        bare   packages whose own `__init__` is not run, as it wants what their modules do not
        stubs  modules that are imported but not called: empty ones take their place
        under  the folder within the checkout that holds the packages

        Afterwards every module that came from the checkout is forgotten, and those replaced are back. Raises
        FileNotFoundError without a checkout.
        """
        root = self.folder()
        if root is None:
            raise FileNotFoundError(
                f"{self.variable} names no checkout of {self.package}: {self.how_to_install}"
            )
        root = root / under
        before = dict(sys.modules)
        packages = {name.partition(".")[0] for name in bare}
        # An installed package of the same name would lend its modules.
        installed = {n: m for n, m in before.items() if n.partition(".")[0] in packages}
        for name in installed:
            del sys.modules[name]
        for name in bare:
            package = ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")))]
            _put(name, package)
        for name in stubs:
            _put(name, ModuleType(name))
        sys.path.insert(0, str(root))
        try:
            yield root
        finally:
            placed = {*bare, *stubs}
            # Where a package without a file lies is worked out anew from the path, which holds the root yet.
            # One that was there before has only grown by a folder of its name.
            new = [(n, module) for n, module in list(sys.modules.items()) if before.get(n) is not module]
            came = [n for n, module in new if n in placed or _lies_in(module, root)]
            sys.path.remove(str(root))
            for name in came:
                del sys.modules[name]
            sys.modules.update(installed)
            for name in placed & before.keys():
                sys.modules[name] = before[name]


def _put(name: str, module: ModuleType) -> None:
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], own, module)


def _lies_in(module: ModuleType, root: Path) -> bool:
    file = getattr(module, "__file__", None)
    # Looked up past __getattr__: modules made on the fly answer to any name, with anything.
    places = getattr(module, "__dict__", {}).get("__path__", ()) if file is None else (file,)
    return any(Path(place).is_relative_to(root) for place in places)
