"""Tests on several processes: cases that every rank of a ``torchrun`` job runs.

A case is a function without arguments that asserts; modules of cases list them in tuples. Each runs on every
rank, with ``torch.distributed`` (gloo) set up. Starting processes costs more than the cases do: one job, and
one test, serves many.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = timedelta(seconds=60)  # of a collective that somebody does not join

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch.distributed has no gloo here"
)


def torchrun(processes: int, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``words`` under torchrun with that many processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=900)


def cases_in(*places: str) -> list[Callable[[], None]]:
    """The cases of tuples such as ``"tests.fused.synchronize_cases:CASES"``."""
    found = []
    for module, name in (place.split(":") for place in places):
        found += getattr(importlib.import_module(module), name)
    return found


def assert_all_pass(processes: int, folder: Path, *places: str, **environment: str) -> None:
    """Run the cases on so many ranks; fails with the traceback of each case on each rank that failed."""
    done = torchrun(processes, "-m", "tests.ranks", str(folder), *places, **environment)
    expected = [case.__name__ for case in cases_in(*places)]
    outcomes = {int(file.stem): torch.load(file) for file in sorted(folder.glob("*.pt"))}
    failures = [
        f"{case} on rank {rank}:\n{text}"
        for rank, outcome in outcomes.items()
        for case, text in outcome.items()
        if text is not None
    ]
    assert not failures, "\n".join(failures)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {rank: list(outcome) for rank, outcome in outcomes.items()} == dict.fromkeys(
        range(processes), expected
    )


def _run(folder: str, *places: str) -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    outcome: dict[str, str | None] = {}
    for case in cases_in(*places):
        torch.manual_seed(0)
        try:
            case()
            outcome[case.__name__] = None
        except Exception:
            outcome[case.__name__] = traceback.format_exc()
        # At once: another rank may wait for this one in vain, and then neither comes to the end.
        torch.save(outcome, f"{folder}/{dist.get_rank()}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _run(*sys.argv[1:])
