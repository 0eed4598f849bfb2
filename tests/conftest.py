"""What several test files share."""

from pathlib import Path

import pytest
from emulation import Builds


@pytest.fixture(scope="session")
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """Programs with emulated kernels, kept in pytest's cache."""
    cache = getattr(request.config, "cache", None)
    return Builds(Path(cache.mkdir("emulation")) if cache else tmp_path_factory.mktemp("emulation"))
