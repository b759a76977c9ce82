from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """The user's kernel cache is neither read nor written."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ANYFLASH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
