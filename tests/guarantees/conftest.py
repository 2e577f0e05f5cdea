"""A rig per test: nothing that one test breaks reaches another."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from guarantees.rig import Rig


@pytest.fixture
def fronts() -> int:
    """Of each worker; ``rig.both_forms`` has others."""
    return 0


@pytest.fixture
def rig(tmp_path: Path, fronts: int) -> Iterator[Rig]:
    rig = Rig(tmp_path, fronts=fronts)
    try:
        yield rig
        assert rig.keys_without_ttl() == []
    finally:
        rig.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.guarantee)
            if item.get_closest_marker("timeout") is None:  # outages take long on a busy machine
                item.add_marker(pytest.mark.timeout(300))
