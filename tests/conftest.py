"""Lanes as a fixture (see ``tests/lanes.py``), and the same random numbers in every run."""

import os

# Inductor's cache on disk does not know our ops' schemas: a graph of yesterday's would be run.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# What was measured on this machine before must not decide what a test runs; this folder is never made.
os.environ["FASTNETS_CACHE_DIR"] = os.path.join(os.path.dirname(__file__), "no-measurements")

import pytest
import torch

from tests.lanes import DEFAULT_LANES, LANES


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "lanes(*names): the lanes this test runs in, instead of the default ones"
    )


def pytest_generate_tests(metafunc):
    if "lane" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("lanes")
    names = marker.args if marker else DEFAULT_LANES
    params = [pytest.param(name, marks=[pytest.mark.gpu] if name == "gpu" else []) for name in names]
    metafunc.parametrize("lane", params, indirect=True)


@pytest.fixture
def lane(request):
    lane = LANES[request.param]
    reason = lane.unavailable()
    if reason:
        pytest.skip(f"lane {lane.name}: {reason}")
    return lane


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_fp32():
    """Products of fp32 convolutions are of fp32, ours and stock's; TF32 has tests of its own, which ask for
    it."""
    # PyTorch's own test helpers, once imported, forbid the whole process to set such flags.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
