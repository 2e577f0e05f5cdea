"""A fleet per test: nothing that one test breaks reaches another."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.scraping import Fleet
from guarantees.rig import Rig


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    rig = Rig(tmp_path / "rig")
    try:
        fleet = Fleet(rig, tmp_path)
        try:
            yield fleet
        finally:
            fleet.close()
    finally:
        rig.close()
