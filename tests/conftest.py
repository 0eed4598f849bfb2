"""What several test files share."""

from pathlib import Path

import pytest
from hypothesis import settings

from emulation import Builds

# The same examples in every run; nothing is kept from one to the next.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=False)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """Programs with emulated kernels, kept in pytest's cache."""
    cache = getattr(request.config, "cache", None)
    return Builds(Path(cache.mkdir("emulation")) if cache else tmp_path_factory.mktemp("emulation"))
