"""Training's batch norm against stock PyTorch, in every lane: statistics, normalising pass, backward."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels import batch_norm_backward, batch_norm_training
from fastnets.kernels.activation import ACTIVATIONS
from fastnets.kernels.batch_norm_training import (
    Statistics,
    bn_backward_input,
    bn_backward_sums,
    channel_statistics,
    finalize_statistics,
    merge_statistics,
    normalize_add_act,
)
from fastnets.kernels.channel_tiles import pass_configs, reduction_configs
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import UnsupportedConfig, observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.test_batch_norm import LAYOUTS, STOCK_ACTIVATIONS, cast
from tests.lanes import STRICT_LANES

MOMENTUM, EPS = 0.1, 1e-5
HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
slow = pytest.mark.slow


def ours(lane, x, dy, weight, bias, residual, activation, count_on_device=False):
    """A training step of the four launchers: everything that stock's has, by the same names."""
    x, dy, weight, bias, residual = (lane.put(t) for t in (x, dy, weight, bias, residual))
    channels = x.shape[1]
    running_mean = torch.ones(channels, device=x.device)
    running_var = torch.ones(channels, device=x.device)
    count = x.numel() / channels
    options = {"activation": activation, "negative_slope": 0.1}
    if count_on_device:
        count = torch.tensor(count, device=x.device)
    with lane:
        statistics = channel_statistics(x)
        mean, rstd = finalize_statistics(statistics, running_mean, running_var, momentum=MOMENTUM, eps=EPS)
        y = normalize_add_act(x, mean, rstd, weight, bias, residual, **options)
        keep = residual is not None
        dv, sums = bn_backward_sums(dy, x, mean, rstd, weight, bias, residual, keep=keep, **options)
        assert (dv is None) != keep
        if keep:
            dx = bn_backward_input(dv, x, mean, rstd, weight, bias, sums, count)
        else:
            dx = bn_backward_input(dy, x, mean, rstd, weight, bias, sums, count, **options)
    for tensor in (y, dx, dv):
        assert tensor is None or tensor.stride() == torch.empty_like(x).stride()
    return {
        "y": y,
        "x": dx,
        "residual": dv,
        "weight": None if weight is None else sums[1],
        "bias": None if bias is None else sums[0],
        "running_mean": running_mean,
        "running_var": running_var,
    }


def stock(x, dy, weight, bias, residual, activation, dtype):
    """The same by PyTorch's autograd; vectors stay in fp32 where x is of 16 bits, as under autocast."""
    vector_dtype = torch.promote_types(dtype, FULL)
    leaves = {"x": x.to(dtype), "residual": None if residual is None else residual.to(dtype)}
    leaves |= {n: None if v is None else v.to(vector_dtype) for n, v in (("weight", weight), ("bias", bias))}
    leaves = {n: None if v is None else v.detach().clone().requires_grad_() for n, v in leaves.items()}
    running_mean = torch.ones(x.shape[1], dtype=vector_dtype, device=x.device)
    running_var = torch.ones(x.shape[1], dtype=vector_dtype, device=x.device)
    u = F.batch_norm(
        leaves["x"], running_mean, running_var, leaves["weight"], leaves["bias"], True, MOMENTUM, EPS
    )
    y = STOCK_ACTIVATIONS[activation](u if residual is None else u + leaves["residual"])
    y.backward(dy.to(dtype))
    gradients = {name: None if leaf is None else leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), **gradients, "running_mean": running_mean, "running_var": running_var}


def check_step(lane, x, dy, residual=None, activation="relu", affine=True, slack=1, **options):
    weight, bias = (torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1])) if affine else (None, None)
    result = ours(lane, x, dy, weight, bias, residual, activation, **options)
    reference = stock(x, dy, weight, bias, residual, activation, torch.float64)
    same = stock(x, dy, weight, bias, residual, activation, x.dtype)
    for name, value in result.items():
        assert (value is None) == (reference[name] is None), name
        if value is not None:
            forward = name in ("y", "running_mean", "running_var")
            assert_close_to(reference[name], same[name], value, slack * (2 if forward else 3))


# One dtype each: the layouts of x, dy and residual differ, so that each tensor is read in its own way.
@pytest.mark.parametrize(
    "x, dy, residual, dtype",
    [
        ("channels_last", "channels_last", "channels_last", HALF),
        pytest.param("channels_last", "channels_last", None, BF16, marks=slow),
        ("contiguous", "contiguous", "contiguous", BF16),
        pytest.param("contiguous", "channels_last", None, FULL, marks=slow),
        ("channels_last", "contiguous", "every_second_pixel", FULL),
        pytest.param("channel_slice", "expanded_pixels", "expanded_batch", HALF, marks=slow),
        pytest.param("every_second_pixel", "expanded_batch", "misaligned", BF16, marks=slow),
        pytest.param("transposed", "batch_innermost", None, FULL, marks=slow),
        pytest.param("misaligned", "misaligned", "channel_slice", HALF, marks=slow),
        pytest.param("batch_innermost", "transposed", None, BF16, marks=slow),
    ],
)
def test_layouts(lane, x, dy, residual, dtype):
    x, dy, residual = (
        None if layout is None else cast(LAYOUTS[layout](3, 8, 5, 6), dtype) for layout in (x, dy, residual)
    )
    check_step(lane, x, dy, residual)


@pytest.mark.parametrize(
    "shape",
    [(33, 64), (3, 1, 3, 3)]
    + [pytest.param(s, marks=slow) for s in ((5, 3), (2, 7, 9), (2, 3, 4, 5, 6), (20, 70, 3, 3))],
    ids=str,
)
def test_shapes(lane, shape):
    # With a single channel all elements share the few roundings of its vectors.
    check_step(
        lane, torch.randn(shape), torch.randn(shape), activation="silu", slack=1 if shape[1] > 1 else 2
    )


@slow
def test_channels_last_3d(lane):
    x = torch.randn(2, 8, 3, 4, 5).to(memory_format=torch.channels_last_3d).half()
    check_step(lane, x, torch.randn_like(x), torch.randn(x.shape).half())


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(lane, activation):
    x = (torch.randn(6, 8, 4, 4) * 3).to(memory_format=torch.channels_last)
    # A GPU's reciprocal root is off by up to an ulp and a half, and the gradients are of eight numbers only.
    check_step(lane, x, torch.randn(x.shape), activation=activation, slack=2)


@slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_compiled(lane, activation):
    x = (torch.randn(6, 8, 4, 4) * 3).bfloat16()
    check_step(lane, x, torch.randn(x.shape).bfloat16(), activation=activation, affine=False)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_gradient_of_another_dtype_and_count_on_the_device(lane):
    x = torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last)
    check_step(lane, x, torch.randn_like(x), count_on_device=True)
    dy, mean, rstd = torch.randn_like(x).half(), torch.zeros(8), torch.ones(8)
    x, dy, mean, rstd = (lane.put(t) for t in (x, dy, mean, rstd))
    with lane:
        dv, sums = bn_backward_sums(dy, x, mean, rstd, activation="relu", keep=True)
        dx = bn_backward_input(dv, x, mean, rstd, None, None, sums, 144.0)
    assert (dv.dtype, dx.dtype) == (HALF, FULL)
    assert_exact(torch.where(x > 0, dy, 0.0), dv)


@pytest.mark.parametrize("activation", ["relu6", pytest.param("relu", marks=slow)])
@pytest.mark.parametrize(
    "shape, memory_format",
    [
        ((2, 24, 5, 5), torch.channels_last),
        ((40, 8, 16, 16), torch.channels_last),
        ((3, 6, 4, 4), torch.contiguous_format),
        pytest.param((3, 5, 3, 3), torch.channels_last, marks=slow),
        ((3, 5, 3, 3), torch.contiguous_format),
    ],
    ids=["channels", "few channels", "pixels", "odd channels", "odd pixels"],
)
def test_mask_holds_the_derivative(lane, shape, memory_format, activation):
    dtype = HALF if shape[1] == 24 else FULL
    x = (torch.randn(shape) * 4).to(dtype).to(memory_format=memory_format)
    residual = torch.randn(shape).to(dtype)
    x[0, 0, 0, 0], x[0, 1, 0, 0], residual[0, :2, 0, 0] = 0.0, 6.0, 0.0
    channels = shape[1]
    weight, bias, mean, rstd = (f(channels) for f in (torch.ones, torch.zeros, torch.zeros, torch.ones))
    dy = torch.randn(shape).to(dtype)
    x, residual, dy, weight, bias, mean, rstd = (
        lane.put(t) for t in (x, residual, dy, weight, bias, mean, rstd)
    )
    with lane:
        y, mask = normalize_add_act(x, mean, rstd, weight, bias, residual, activation=activation, mask=True)
        dv, sums = bn_backward_sums(dy, x, mean, rstd, mask=mask, activation=activation, keep=True)
        again, same = bn_backward_sums(
            dy, x, mean, rstd, weight, bias, residual, activation=activation, keep=True
        )
    passing = (y > 0) & ((y < 6) | (activation == "relu"))
    in_memory = (
        passing.as_strided((passing.numel(),), (1,))
        if y.is_contiguous()
        else passing.permute(0, 2, 3, 1).flatten()
    )
    bits = torch.zeros(-(-y.numel() // 8) * 8, dtype=torch.int64)
    bits[: y.numel()] = in_memory.cpu()
    expected = (bits.view(-1, 8) * 2 ** torch.arange(8)).sum(1).to(torch.uint8)
    assert torch.equal(mask.cpu(), expected)
    assert_exact(torch.where(passing, dy, 0.0), dv)
    assert torch.equal(dv, again)
    torch.testing.assert_close(sums, same, rtol=1e-5, atol=1e-5)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_frozen_statistics(lane):
    x, dy = torch.randn(3, 8, 5, 5).bfloat16(), torch.randn(3, 8, 5, 5).bfloat16()
    mean, var = torch.randn(8), torch.rand(8) + 0.5
    weight, bias = torch.randn(8), torch.randn(8)
    arguments = [lane.put(t) for t in (dy, x, mean, (var + EPS).rsqrt(), weight, bias)]
    with lane:
        dx = bn_backward_input(*arguments, None, None, activation="silu", batch_statistics=False)
        _, sums = bn_backward_sums(*arguments, activation="silu", keep=False)
    results = []
    for dtype in (torch.float64, BF16):
        vector = torch.promote_types(dtype, FULL)
        leaves = [x.to(dtype), weight.to(vector), bias.to(vector)]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        F.silu(
            F.batch_norm(leaves[0], mean.to(vector), var.to(vector), *leaves[1:], False, 0.0, EPS)
        ).backward(dy.to(dtype))
        results.append([leaf.grad for leaf in leaves])
    for reference, same, value in zip(*results, (dx, sums[1], sums[0])):
        assert_close_to(reference, same, value, 3.0)


@slow
def test_sums_exact_on_integers_in_every_config(lane):
    shape = (2, 40, 9, 9)
    x, dy, residual = integers(*shape), integers(*shape), integers(*shape)
    mean, ones = integers(40), torch.ones(40)
    dv = torch.where(x - mean.view(1, -1, 1, 1) + residual > 0, dy, 0.0)
    expected = torch.stack([dv.sum((0, 2, 3)), (dv * (x - mean.view(1, -1, 1, 1))).sum((0, 2, 3))])
    expected_dx = dv - 2.0 - (x - mean.view(1, -1, 1, 1)) * 3.0
    mean, ones = lane.put(mean), lane.put(ones)
    chosen = reduction_configs(), pass_configs()
    if lane.name != "interpreter":
        # The compiled kernels of the others are what ahead-of-time compilation sees.
        chosen = chosen[0][::3], chosen[1][::5]
    for memory_format in (torch.channels_last, torch.contiguous_format):
        values = [lane.put(t.to(memory_format=memory_format)) for t in (dy, x, residual)]
        for config in chosen[0]:
            with lane:
                ours, sums = bn_backward_sums(
                    *values[:2], mean, ones, residual=values[2], activation="relu", keep=True, config=config
                )
                statistics = channel_statistics(values[1], config=config)
                merged = merge_statistics(statistics)
            assert_exact(dv.double(), ours)
            assert_exact(expected.double(), sums)
            assert statistics.count.sum() == 162
            torch.testing.assert_close(merged.mean[0].cpu(), x.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
        for config in chosen[1]:
            given = torch.tensor([[2.0], [3.0]]).expand(2, 40)
            with lane:
                dx = bn_backward_input(
                    lane.put(dv.to(memory_format=memory_format)), values[1], mean, ones, None, None,
                    lane.put(given), 1.0, config=config,
                )  # fmt: skip
            assert_exact(expected_dx.double(), dx)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("layout", ["channels_last", pytest.param("contiguous", marks=slow)])
def test_strictly(lane, layout):
    # Triton's layout conversion behind a sum has several warps write the same value to shared memory; other
    # conflicts are none.
    lane = lane.but(shared_races="record")
    x, dy = (cast(LAYOUTS[layout](1, 40, 9, 9), HALF) for _ in range(2))
    check_step(lane, x, dy, cast(LAYOUTS["contiguous"](1, 40, 9, 9), HALF))
    conflicts = {message for launch in lane.launches for message, *_ in launch.shared_races}
    assert all("write of bytes another warp wrote" in message for message in conflicts), conflicts


@pytest.mark.lanes("sm_90", "gpu")
def test_the_same_bits_in_whatever_order_programs_run(lane):
    x = lane.put(torch.randn(4, 24, 16, 16))
    dy = lane.put(torch.randn(4, 24, 16, 16))
    results = []
    for order in ("sequential", "shuffled", "reversed"):
        with lane.but(order=order):
            mean, rstd = finalize_statistics(channel_statistics(x), momentum=MOMENTUM, eps=EPS)
            _, sums = bn_backward_sums(dy, x, mean, rstd, activation="relu", keep=False)
        results.append(torch.cat([mean, rstd, sums.flatten()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_offsets_past_two_to_the_31(lane):
    if lane.name == "gpu" and torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GiB")
    # Pages that nobody touches cost nothing; the race detector would touch them.
    memory = torch.empty(2**31 + 4096, dtype=HALF, device=lane.device)
    x = memory.as_strided((2, 8, 4, 4), (2**31, 16, 4, 1))
    x.copy_(integers(2, 8, 4, 4))
    zeros, ones = lane.put(torch.zeros(8)), lane.put(torch.ones(8))
    with lane.but(races=None):
        statistics = merge_statistics(channel_statistics(x))
        _, sums = bn_backward_sums(x, x, zeros, ones, keep=False)
        dx = bn_backward_input(x, x, zeros, ones, None, None, None, None, batch_statistics=False)
    assert_exact(x.double().sum((0, 2, 3)), sums[0])
    assert_exact((x.double() ** 2).sum((0, 2, 3)), sums[1])
    torch.testing.assert_close(statistics.mean[0], x.float().mean((0, 2, 3)))
    assert_exact(x.double(), dx)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 0, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty(lane, shape):
    x, vector = torch.empty(shape), torch.ones(shape[1])
    with lane:
        statistics = channel_statistics(x)
        y, mask = normalize_add_act(x, vector, vector, activation="relu", mask=True)
        dv, sums = bn_backward_sums(x, x, vector, vector, keep=True)
        dx = bn_backward_input(x, x, vector, vector, None, None, sums, 1.0)
    assert (y.shape, dv.shape, dx.shape, mask.shape) == (shape, shape, shape, (0,))
    assert_exact(torch.zeros(2, shape[1]).double(), sums)
    assert_exact(torch.zeros(1).double(), statistics.count)
    assert_exact(torch.zeros(1, shape[1]).double(), statistics.mean)


def test_bytes_and_launches_of_a_training_step():
    """x is read once for each pass, dy twice, and what is partial stays under a twentieth."""
    shape = (32, 256, 56, 56)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = torch.empty(shape, dtype=BF16, device="meta").to(memory_format=memory_format)
        vector = torch.empty(256, device="meta")
        size = x.numel() * 2
        seen = []
        with observe_launches(seen.append), assume_device("h100"):
            statistics = channel_statistics(x)
            mean, rstd = finalize_statistics(statistics, vector, vector, momentum=0.1, eps=1e-5)
            _, mask = normalize_add_act(x, mean, rstd, vector, vector, x, activation="relu", mask=True)
            dv, sums = bn_backward_sums(x, x, mean, rstd, mask=mask, activation="relu", keep=True)
            bn_backward_input(dv, x, mean, rstd, vector, vector, sums, 100352.0)
        assert [launch.name for launch in seen] == [
            "channel_statistics_kernel",
            "merge_statistics_kernel",
            "bn_add_act_kernel",
            "bn_backward_sums_kernel",
            "sum_rows_kernel",
            "bn_backward_input_kernel",
        ]
        passes = [launch.bytes / size for launch in seen]
        assert passes == pytest.approx([1, 0, 3 + 1 / 16, 3 + 1 / 16, 0, 3], abs=0.05)
        for launch in (seen[0], seen[3]):
            assert 132 * 2 <= launch.grid[0] <= 132 * 16


V3, V4 = torch.ones(3), torch.ones(4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: channel_statistics(x.int()), TypeError, "x is torch.int32"),
        (lambda x: channel_statistics(x[0, 0]), ValueError, "1 dims, expected 2 to 5"),
        (lambda x: normalize_add_act(x, V4, V3), ValueError, r"mean has shape \(4,\), expected \(3,\)"),
        (lambda x: normalize_add_act(x, V3, V3, activation="silu", mask=True), ValueError, "'silu', whose"),
        (lambda x: normalize_add_act(x, V3, V3, residual=x[:1]), ValueError, "residual has shape"),
        (lambda x: bn_backward_sums(x[:1], x, V3, V3, keep=False), ValueError, "dy has shape"),
        (lambda x: bn_backward_sums(x.double(), x, V3, V3, keep=False), TypeError, "dy is torch.float64"),
        (
            lambda x: bn_backward_sums(x, x, V3, V3, mask=V3, activation="relu", keep=True),
            ValueError,
            r"mask is \(3,\) torch.float32, expected \(3,\) uint8",
        ),
        (
            lambda x: bn_backward_sums(x, x, V3, V3, mask=V3, activation="gelu", keep=True),
            ValueError,
            "mask does not hold the derivative of 'gelu'",
        ),
        (lambda x: bn_backward_input(x, x, V3, V3, V3, V3, None, 8.0), ValueError, "needs sums and count"),
        (lambda x: bn_backward_input(x, x, V3, V3, V3, V3, V3, 8.0), ValueError, r"sums is \(3,\)"),
        (
            lambda x: bn_backward_input(x, x, V3, V3, V3, V3, torch.ones(2, 3), V3),
            ValueError,
            r"count has shape \(3,\), expected one element",
        ),
        (
            lambda x: finalize_statistics(Statistics(x[0], x[0], V4[:1]), V3, V4, momentum=0.1, eps=0.1),
            ValueError,
            r"count \(1,\) must be",
        ),
        (
            lambda x: finalize_statistics(
                Statistics(torch.ones(1, 3), torch.ones(1, 3), V3[:1]), V3, V4, momentum=0.1, eps=0.1
            ),
            ValueError,
            r"running_var has shape \(4,\), expected \(3,\)",
        ),
        (
            lambda x: channel_statistics(x, config=batch_norm_training.configs(DEVICES["h100"])[7]),
            UnsupportedConfig,
            "for another kernel",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3, 4))


@pytest.mark.parametrize("module", [batch_norm_training, batch_norm_backward])
def test_every_representative_call_is_served_on_every_device(module):
    for device in DEVICES.values():
        shipped = module.configs(device)
        for call in module.representative_calls():
            seen = []
            with observe_launches(seen.append), assume_device(device):
                call.thunk(None)
            assert seen
            own = [
                launch for launch in seen if launch.name not in ("sum_rows_kernel", "pack_positive_kernel")
            ]
            assert all(launch.config.replace(maxnreg=None) in shipped for launch in own)
