"""What the convolution kernels compile to, counted in the machine code: no GPU needed, no time claimed."""

import pytest
import torch
import triton
import triton.language as tl

from fastnets.bench.static import inspect_call
from fastnets.kernels import conv_tensor_map
from fastnets.kernels.conv import conv_bn_act
from fastnets.kernels.conv_configs import table_configs
from fastnets.kernels.device import device_for_capability
from fastnets.kernels.launch import Config, launch
from tests.kernels.conv_cases import Case, operands


@triton.jit
def plain_matmul(
    a, b, c, M, N, K, a_m, b_k, c_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The yardstick: C = A·B of row-major matrices, K a multiple of BLOCK_K, no mask in the loop."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (GROUP_M * columns)
    height = tl.minimum(rows - band * GROUP_M, GROUP_M)
    row = band * GROUP_M + tl.program_id(0) % (GROUP_M * columns) % height
    column = tl.program_id(0) % (GROUP_M * columns) // height
    m = (row * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    n = (column * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    k = tl.arange(0, BLOCK_K)
    a_pointers = a + m[:, None] * a_m + k[None, :]
    b_pointers = b + k[:, None] * b_k + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(a_pointers), tl.load(b_pointers), acc)
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K * b_k
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(c + m[:, None] * c_m + n[None, :], acc.to(c.dtype.element_ty), mask=inside)


def matmul(config):
    a, b, c = (torch.empty(1024, 1024, dtype=torch.float16, device="meta") for _ in range(3))
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}
    plain = Config(**tile, num_warps=config.num_warps, num_stages=config.num_stages)
    launch(plain_matmul, (64,), a, b, c, 1024, 1024, 1024, 1024, 1024, 1024, config=plain, writes=(c,))


def convolution(case, dtype=torch.float16, launcher=conv_bn_act):
    tensors = {name: t.to("meta") for name, t in operands(case, dtype).items()}

    def thunk(config=None):
        launcher(**tensors, **case.geometry, activation=case.activation, config=config)

    return thunk


def large_tiles(capability):
    listed = table_configs("taps", "16-bit", device_for_capability(capability))
    return [pytest.param(capability, c, id=f"sm_{capability}-{c.BLOCK_K}-warps{c.num_warps}")
            for c in listed if (c.BLOCK_M, c.BLOCK_N) == (128, 128)]  # fmt: skip


LAYER = Case(N=1, C=64, H=14, W=14, K=128, padding=(1, 1), residual="last")


@pytest.mark.parametrize("capability, config", [*large_tiles(80), *large_tiles(90)])
def test_3x3_loop_is_as_lean_as_a_matmul(capability, config):
    (conv,) = inspect_call(convolution(LAYER), config, capability)
    (plain,) = inspect_call(matmul, config, capability)
    assert conv.error is None, conv.error
    assert conv.code.spills == 0
    loop = conv.code.loop
    # As many products per pass as the matmul has, from asynchronous copies of 16 bytes.
    assert loop.matrix == plain.code.loop.matrix > 0
    assert conv.code.matrix_ops == ({"HGMMA"} if capability == 90 else {"HMMA"})
    assert set(loop.async_copies) == {128}
    assert loop.async_copies[128] == plain.code.loop.async_copies[128]
    assert not loop.global_loads
    ratio = loop.instructions / plain.code.loop.instructions
    assert ratio <= 1.6, (
        f"{loop.instructions} instructions against {plain.code.loop.instructions}: {ratio:.2f}"
    )


@pytest.mark.parametrize("capability, config", [large_tiles(80)[0], large_tiles(90)[0]])
def test_1x1_loop_is_a_matmul(capability, config):
    case = Case(N=1, C=256, H=14, W=14, K=128, R=1, S=1, residual="last")
    (conv,) = inspect_call(convolution(case), config, capability)
    (plain,) = inspect_call(matmul, config, capability)
    assert conv.code.spills == 0
    assert conv.code.loop.instructions <= 1.15 * plain.code.loop.instructions


@pytest.mark.parametrize("capability", [80, 90])
def test_odd_multiples_of_8_channels_still_load_16_bytes(capability):
    for case in (
        Case(N=1, C=72, H=14, W=14, K=24, padding=(1, 1)),
        Case(N=1, C=24, H=14, W=14, padding=(1, 1)),
    ):
        conv = inspect_call(convolution(case), None, capability)[0]
        assert set(conv.code.loop.async_copies) == {128}
        assert conv.code.spills == 0


def test_tensor_maps_become_bulk_copies():
    case = Case(N=1, C=64, H=16, W=16, K=128, padding=(1, 1), residual="last")
    (conv,) = inspect_call(convolution(case, launcher=conv_tensor_map.conv_bn_act), None, 90)
    assert conv.code.spills == 0
    assert conv.code.bulk_copies >= 2
    assert "HGMMA" in conv.code.matrix_ops
    assert conv.code.loop.matrix > 0
    assert not conv.code.loop.async_copies
    (pointers,) = inspect_call(convolution(case), large_tiles(90)[0].values[1], 90)
    assert conv.code.loop.instructions < pointers.code.loop.instructions
