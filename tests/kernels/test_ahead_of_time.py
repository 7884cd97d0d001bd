"""The ahead-of-time lane: a seeded sample of what ships compiles everywhere, fits and does not spill.

The whole matrix is `make aot`.
"""

import json

import pytest
import torch
import triton
import triton.language as tl

from fastnets.bench import static
from fastnets.bench.sass import read_cubin
from fastnets.kernels import batch_norm, depthwise
from fastnets.kernels.launch import Config, launch


@pytest.mark.parametrize("capability", static.ARCHITECTURES)
def test_a_sample_of_what_ships(capability):
    chosen = static.sample(static.cases(architectures=[capability]), 5, seed=capability)
    assert len({case.module for case in chosen}) >= 2
    for case in chosen:
        for facts in static.inspect_case(case):
            where = f"{facts.module}: {facts.name}, {facts.config}, sm_{capability}"
            assert facts.error is None, f"{where}: {facts.error}"
            assert facts.fits, f"{where}: {facts.shared_bytes} bytes of shared memory of {facts.shared_limit}"
            assert facts.code.spills == 0, f"{where}: {facts.code.spills} spills"


def call_of(module, name):
    return next(call for call in module.representative_calls() if call.name == name)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_epilogue_pass_moves_sixteen_bytes_at_a_time(capability):
    (facts,) = static.inspect_call(
        call_of(batch_norm, "channels-last fp16, add, relu").thunk, capability=capability
    )
    assert facts.good
    assert set(facts.code.global_loads) == {128}
    assert set(facts.code.global_stores) == {128}
    # 4096 elements of 8 a thread, read twice, and four channel vectors of 8 floats.
    assert facts.code.global_loads[128] == 2 * 4 + 4 * 2
    assert facts.code.registers <= 80


@pytest.mark.parametrize("capability", [80, 90])
def test_depthwise_reuses_input_rows(capability):
    (facts,) = static.inspect_call(
        call_of(depthwise, "3x3 fp16").thunk, depthwise._config(64, 4), capability=capability
    )
    assert facts.good
    loop = facts.code.loop
    # One filter column: 6 input rows for 4 output rows of 8 channels, 3 taps a channel each.
    assert loop.global_loads[128] == 6
    assert loop.mix["FFMA"] == 3 * 4 * 8
    assert set(facts.code.global_stores) == {128}
    assert facts.code.registers <= 128
    assert not facts.code.matrix_ops


def test_depthwise_reads_packed_weights_as_vectors():
    def thunk(config):
        x = torch.empty(32, 56, 56, 64, dtype=torch.float16, device="meta").permute(0, 3, 1, 2)
        weight = torch.empty(3, 3, 1, 64, dtype=torch.float16, device="meta").permute(3, 2, 0, 1)
        depthwise.depthwise_conv_bn_act(x, weight, padding=(1, 1), config=config)

    (facts,) = static.inspect_call(thunk, depthwise._config(64, 4), capability=80)
    assert facts.good
    # A filter column: 6 input rows and 3 taps, nothing narrower.
    assert facts.code.loop.global_loads == {128: 9}


@pytest.mark.parametrize("capability", [80, 90])
def test_the_tallest_unrolled_filter_does_not_spill(capability):
    for name in ("7x7 bf16", "7x7 stride 2 fp32 gelu"):
        (facts,) = static.inspect_call(
            call_of(depthwise, name).thunk, depthwise._config(64, 4), capability=capability
        )
        assert facts.good, facts


@triton.jit
def _matmul(a, b, c, K, N: tl.constexpr, BLOCK: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, 64)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, K, 64):
        x = tl.load(a + m[:, None] * N + k[None, :])
        y = tl.load(b + k[:, None] * N + n[None, :])
        total = tl.dot(x, y, total)
        a += 64
        b += 64 * N
    tl.store(c + m[:, None] * N + n[None, :], total)


@triton.jit
def _many_registers(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    total = value
    for k in range(100):
        total = total * value + k
    tl.store(y + i, total + value)


@triton.jit
def _broken(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK + 1)))


def matmul(config):
    a = torch.empty(256, 256, dtype=torch.float16, device="meta")
    launch(
        _matmul, (1,), a, a, torch.empty_like(a, dtype=torch.float32), 256, config=config, writes=(a,), N=256
    )


def copying(kernel):
    def thunk(config):
        x = torch.empty(65536, device="meta")
        launch(kernel, (1,), x, torch.empty_like(x), config=config, reads=(x,), writes=(x,))

    return thunk


@pytest.mark.parametrize("capability, instruction", [(80, "HMMA"), (90, "HGMMA")])
def test_the_loop_of_a_matmul_is_found(capability, instruction):
    (facts,) = static.inspect_call(matmul, Config(BLOCK=64, num_stages=3), capability)
    assert facts.code.matrix_ops == {instruction}
    assert facts.code.loop.matrix == facts.code.loop.mix[instruction] > 0
    assert facts.code.loop.instructions < facts.code.instructions
    assert set(facts.code.async_copies) == {128}
    assert facts.shared_bytes >= 2 * 2 * 64 * 64 * 2


def test_triton_has_no_matrix_units_before_sm_80():
    (facts,) = static.inspect_call(matmul, Config(BLOCK=32, num_stages=2), 75)
    assert not facts.code.matrix_ops
    assert facts.code.loop.share("FFMA", "HFMA2") > facts.code.loop.instructions / 2


def test_spills_are_seen():
    (facts,) = static.inspect_call(copying(_many_registers), Config(BLOCK=16384, num_warps=1), 80)
    assert facts.error is None
    assert facts.code.spills > 0
    assert facts.code.stack > 0
    assert not facts.good


def test_too_much_shared_memory_is_seen():
    (facts,) = static.inspect_call(matmul, Config(BLOCK=256, num_warps=8, num_stages=4), 86)
    assert facts.shared_bytes > facts.shared_limit == 99 * 1024
    assert not facts.good


def test_a_kernel_that_does_not_compile_is_a_fact():
    (facts,) = static.inspect_call(copying(_broken), Config(BLOCK=64), 80)
    assert facts.error is not None
    assert not facts.good


def test_garbage_is_refused():
    with pytest.raises(RuntimeError, match="nvdisasm failed"):
        read_cubin(b"not a cubin")


def test_specialisation_is_that_of_the_launch():
    def thunk(config):
        # The pointer cannot be told to be aligned: accesses must be narrow.
        x = torch.empty(4097, dtype=torch.float16, device="meta")
        batch_norm.bn_add_act(x[: 4096 - 7].view(1, 1, 4089), config=config)

    (odd,) = static.inspect_call(thunk, capability=80)
    assert set(odd.code.global_loads) == {16}


def test_command_line(tmp_path, capsys):
    path = tmp_path / "facts.json"
    arguments = [
        "--kernel",
        "batch_norm",
        "--arch",
        "90",
        "--sample",
        "2",
        "--jobs",
        "1",
        "--json",
        str(path),
    ]
    assert static.main(arguments) == 0
    assert "bn_add_act_kernel" in capsys.readouterr().out
    (first, second) = json.loads(path.read_text())
    assert first["capability"] == second["capability"] == 90
    assert first["code"]["spills"] == 0
    assert first["code"]["registers"] > 0
    with pytest.raises(SystemExit):
        static.main(["--kernel", "nonsense"])
    assert "no kernels in nonsense" in capsys.readouterr().err
