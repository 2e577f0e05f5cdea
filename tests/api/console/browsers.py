"""The browser that tests drive: the system's Chromium."""

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def chromium() -> str:
    """Its program. Without one the test fails: what it shows would be shown by nothing else."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found is not None, "no Chromium on PATH: .ci/programs installs it"
    return found
