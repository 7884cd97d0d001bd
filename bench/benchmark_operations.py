"""The layers as a pytest-benchmark suite: ``make bench``, ``make bench ARGS="--benchmark-compare"``.

pytest-benchmark keeps and compares the runs; for interleaved implementations and ceilings see
``fastnets bench-op``. FASTNETS_BENCH_DTYPE (float32) and FASTNETS_BENCH_BATCH (8; 32 on CUDA) choose the
work.
"""

import os

import pytest
import torch

from fastnets.bench.layers import implementations, work_of
from fastnets.bench.operations import OPERATIONS, Inputs
from fastnets.bench.verify import verify_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = getattr(torch, os.environ.get("FASTNETS_BENCH_DTYPE", "float32"))
BATCH = int(os.environ.get("FASTNETS_BENCH_BATCH", "32" if DEVICE == "cuda" else "8"))


@pytest.mark.parametrize("backend", implementations(DEVICE))
@pytest.mark.parametrize("name", OPERATIONS)
def test_forward(benchmark, name, backend):
    operation = OPERATIONS[name]
    judged = verify_op(operation, backend, DTYPE, DEVICE)
    assert judged.passed, f"not timed: {judged}"
    call = operation.make(Inputs(DEVICE, DTYPE), BATCH)
    moved, flops = work_of(call, training=False)
    benchmark.group = name
    benchmark.extra_info.update(bytes=moved, flops=flops, device=DEVICE, dtype=str(DTYPE), batch=BATCH)

    def run():
        call.run(backend)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        benchmark.pedantic(run, warmup_rounds=3, rounds=20, iterations=1)
