"""Linear layers with their epilogue, and the products of their gradients, against stock in every lane."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastnets.fused.activation import ACTIVATIONS
from fastnets.kernels.device import DEVICES, assume_device, device_for_capability
from fastnets.kernels.launch import Config, UnsupportedConfig, observe_launches
from fastnets.kernels.linear import finish_linear, linear_act, matrix_product, representative_calls
from fastnets.kernels.linear_configs import choose_config, configs, fp32_products
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.lanes import STRICT_LANES

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32
DTYPES = (FULL, HALF, BFLOAT)


@pytest.fixture(autouse=True)
def exact_fp32():
    with fp32_products("ieee"):
        yield


@dataclasses.dataclass
class Case:
    """x [..., K] and weight [N, K], how they lie, and the epilogue."""

    x: tuple = (37, 48)
    N: int = 40
    activation: str = "none"
    bias: bool = True
    scale: bool = False
    residual: str = ""  # "", "plain", "rows" (repeats), "wide" (fp32), "transposed", "expanded"
    layout: str = "rows"  # of x: "rows", "columns", "sliced", "misaligned", "stepped", "transposed" (3-D)
    weight_layout: str = "rows"


def laid_out(size, layout, draw):
    """A tensor of that size that lies as the name says."""
    if layout == "columns":
        return draw(size[1], size[0]).t()
    if layout == "sliced":
        return draw(*size[:-1], size[-1] + 24)[..., 8 : 8 + size[-1]]
    if layout == "misaligned":
        return draw(*size[:-1], size[-1] + 3)[..., 1 : 1 + size[-1]]
    if layout == "stepped":
        return draw(*size[:-1], 2 * size[-1])[..., ::2]
    if layout == "transposed":
        return draw(size[1], size[0], *size[2:]).transpose(0, 1)
    return draw(*size)


def operands(case, dtype, draw=torch.randn):
    K, N = case.x[-1], case.N
    scale = K**-0.5 if draw is torch.randn else 1.0
    rows = (case.x[-2], N) if case.residual == "rows" else (*case.x[:-1], N)
    residual = draw(*rows) if case.residual else None
    if case.residual == "transposed":
        residual = draw(N, *case.x[:-1]).movedim(0, -1)
    if case.residual == "expanded":
        residual = draw(N).expand(*case.x[:-1], N)
    if residual is not None and case.residual != "wide":
        residual = cast(residual, dtype)
    return (
        cast(laid_out(case.x, case.layout, draw), dtype),
        cast(laid_out((N, K), case.weight_layout, lambda *s: draw(*s) * scale), dtype),
        draw(N).to(dtype) if case.bias else None,
        draw(N).to(dtype) if case.scale else None,
        residual,
    )


def cast(tensor, dtype):
    """The tensor as dtype with its strides, where ``to`` would make it dense."""
    storage = torch.empty(0).set_(tensor.untyped_storage()).to(dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def stock(x, weight, bias, scale, residual, activation):
    y = ACTIVATIONS[activation].forward(F.linear(x, weight, bias), 0.01)
    if scale is not None:
        y = scale * y
    return y if residual is None else residual + y


def doubles(tensors):
    return [None if t is None else t.double() for t in tensors]


def run(lane, tensors, case, **options):
    with lane:
        return linear_act(*map(lane.put, tensors), activation=case.activation, **options)


def check(lane, case, dtype, **options):
    tensors = operands(case, dtype)
    if case.residual == "wide":
        options["dtype"] = FULL
    y = run(lane, tensors, case, **options)
    assert y.is_contiguous()
    assert_close_to(stock(*doubles(tensors), case.activation), stock(*tensors, case.activation), y)


CORE = {
    "gelu": Case((65, 96), 72, "gelu"),
    "whole": Case((40, 64), 48, "silu", scale=True, residual="plain"),
    "one row": Case((1, 300), 70, "relu", residual="plain"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CORE)
def test_core(lane, name, dtype):
    check(lane, CORE[name], dtype)


SHAPES = {
    "1-D": (FULL, Case((45,), 19, "tanh")),
    "3-D": (HALF, Case((2, 9, 40), 24, "gelu_tanh", residual="plain")),
    "4-D": (BFLOAT, Case((2, 3, 4, 24), 40, "sigmoid", scale=True)),
    "odd": (HALF, Case((21, 37), 29, "hardswish", residual="plain")),
    "odd, fp32": (FULL, Case((5, 33), 17, "relu6", residual="plain")),
    "one column": (HALF, Case((33, 64), 1)),
    "K = 1": (FULL, Case((18, 1), 20)),
    "four rows": (FULL, Case((4, 130), 33, "gelu", scale=True, residual="plain")),
    "three rows, no bias": (FULL, Case((3, 200), 12, bias=False)),
    "columns": (HALF, Case((40, 48), 32, layout="columns", weight_layout="columns")),
    "odd columns": (BFLOAT, Case((21, 37), 29, layout="columns", weight_layout="columns")),
    "columns, fp32": (FULL, Case((24, 20), 28, layout="columns", weight_layout="columns")),
    "sliced": (HALF, Case((2, 11, 40), 24, layout="sliced", weight_layout="sliced")),
    "misaligned": (BFLOAT, Case((21, 40), 24, layout="misaligned", weight_layout="misaligned")),
    "stepped": (FULL, Case((9, 24), 16, layout="stepped", weight_layout="stepped")),
    "transposed": (HALF, Case((3, 5, 32), 16, layout="transposed", residual="transposed")),
    "expanded residual": (HALF, Case((2, 7, 32), 24, residual="expanded")),
    "residual repeats": (BFLOAT, Case((3, 7, 40), 24, residual="rows")),
    "fp32 residual": (HALF, Case((20, 32), 24, residual="wide", scale=True)),
    "leaky_relu": (HALF, Case((20, 32), 24, "leaky_relu")),
    "hardsigmoid": (FULL, Case((20, 32), 24, "hardsigmoid")),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_layouts(lane, name):
    dtype, case = SHAPES[name]
    check(lane, case, dtype)


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(lane, dtype):
    case = Case((35, 60), 40, "relu", scale=True, residual="plain")
    tensors = operands(case, dtype, lambda *size: integers(*size, low=-1, high=1))
    assert_exact(stock(*doubles(tensors), "relu"), run(lane, tensors, case))


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("split", [2, 4])
def test_split_columns(lane, split):
    config = Config(
        BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, GROUP_M=8, SPLIT_K=split, HALVES=False, num_warps=4, num_stages=2
    )
    check(lane, Case((9, 300), 40, "gelu", residual="plain"), HALF, config=config)


def test_the_pre_activation_is_kept(lane):
    case = Case((20, 64), 48, "gelu", residual="plain")
    tensors = operands(case, BFLOAT)
    y, z = run(lane, tensors, case, keep_pre_activation=True)
    assert_close_to(stock(*doubles(tensors), "gelu"), stock(*tensors, "gelu"), y)
    assert_close_to(F.linear(*doubles(tensors[:3])), F.linear(*tensors[:3]), z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_layer_before(lane, dtype):
    dz, weight, u = (
        torch.randn(37, 40).to(dtype),
        (torch.randn(40, 24) / 6).to(dtype),
        torch.randn(37, 24).to(dtype),
    )
    with lane:
        dx, sums = matrix_product(
            lane.put(dz),
            lane.put(weight).t(),
            pre_activation=lane.put(u),
            activation="gelu",
            column_sums=True,
        )
        plain, none = matrix_product(lane.put(dz), lane.put(weight).t())
    assert none is None
    gradient = lambda t, w, v: torch.ops.aten.gelu_backward(t @ w, v)  # noqa: E731
    exact, rough = gradient(dz.double(), weight.double(), u.double()), gradient(dz, weight, u)
    assert_close_to(exact, rough, dx)
    assert_close_to(exact.sum(0), rough.sum(0), sums.sum(0).to(dtype), ratio=3)
    assert_close_to(dz.double() @ weight.double(), dz @ weight, plain)


def test_gradient_of_the_weight(lane):
    dz, x = torch.randn(37, 40).half(), torch.randn(37, 24).half()
    with lane:
        dweight, _ = matrix_product(lane.put(dz).t(), lane.put(x).t(), dtype=FULL)
    assert dweight.dtype == FULL
    assert_close_to(dz.double().t() @ x.double(), dz.float().t() @ x.float(), dweight, ratio=4)


@pytest.mark.parametrize("in_place", [False, True])
def test_epilogue_of_a_vendors_product(lane, in_place):
    z, bias, scale = torch.randn(2, 9, 600).half(), torch.randn(600).half(), torch.randn(600)
    residual = torch.randn(2, 9, 600).half()
    product = lane.put(z.clone())
    with lane:
        y = finish_linear(
            product, lane.put(bias), lane.put(scale), lane.put(residual), activation="gelu", in_place=in_place
        )
    composed = lambda z, b, s, r: r + s.to(z.dtype) * F.gelu(z + b)  # noqa: E731
    assert_close_to(composed(*doubles((z, bias, scale, residual))), composed(z, bias, scale, residual), y)
    assert (y.data_ptr() == product.data_ptr()) == in_place


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("name", ["whole", "one row"])
def test_strictly(lane, name):
    check(lane, CORE[name], HALF)


@pytest.mark.lanes("sm_80", "gpu")
def test_the_same_bits_each_time(lane):
    case = Case((9, 200), 40, "gelu", residual="plain")
    tensors = operands(case, HALF)
    assert torch.equal(run(lane, tensors, case), run(lane, tensors, case))


def test_nan_and_infinities_come_through(lane):
    x = torch.zeros(3, 16)
    x[0, 3], x[1, 4] = torch.nan, torch.inf
    weight = torch.eye(16)[:8].contiguous()
    with lane:
        y = linear_act(lane.put(x), lane.put(weight), activation="relu").cpu()
    assert y[0].isnan().all()  # NaN times zero
    torch.testing.assert_close(y, torch.relu(F.linear(x, weight)), equal_nan=True)


@pytest.mark.lanes("interpreter", "gpu")
def test_nothing_to_do(lane):
    with lane:
        w = torch.ones(4, 3, device=lane.device)
        assert linear_act(torch.empty(0, 3, device=lane.device), w).shape == (0, 4)
        assert linear_act(torch.empty(2, 0, 3, device=lane.device), w).shape == (2, 0, 4)
        assert linear_act(torch.empty(2, 3, device=lane.device), w[:0]).shape == (2, 0)
        bias = torch.arange(4.0, device=lane.device)
        y = linear_act(torch.empty(2, 0, device=lane.device), w[:, :0], bias)
    assert_exact(torch.arange(4.0).expand(2, 4), y)


@pytest.mark.parametrize("name", DEVICES)
def test_every_shape_finds_a_config_that_ships(name):
    device = DEVICES[name]
    shipped = configs(device)
    for M in (1, 4, 8, 32, 197, 1576, 50432):
        for N, K in ((1000, 4096), (3072, 768), (768, 3072), (64, 64)):
            for size, precision in ((2, "ieee"), (4, "ieee"), (4, "tf32")):
                for flags in ((True, False), (False, True), (False, False)):
                    assert choose_config(M, N, K, size, precision, device, *flags) in shipped


def test_small_batches_stream_the_weights_over_the_whole_device():
    device = device_for_capability(90)
    for M in (8, 16, 32):
        config = choose_config(M, 4096, 9216, 2, "ieee", device)
        programs = -(-M // config.BLOCK_M) * (4096 // config.BLOCK_N) * config.SPLIT_K
        assert config.BLOCK_M <= 32, (M, config)
        assert programs >= 0.9 * device.multiprocessors, (M, config)


def test_one_read_and_one_write():
    x, w, r = (torch.empty(s, dtype=HALF, device="meta") for s in ((1576, 3072), (768, 3072), (1576, 768)))
    seen = []
    with observe_launches(seen.append), assume_device("h100"):
        linear_act(x, w, None, None, r, activation="gelu")
    (launch,) = seen
    assert launch.bytes_read == 2 * (x.numel() + w.numel() + r.numel())
    assert launch.bytes_written == 2 * r.numel()
    assert launch.flops == 2 * 1576 * 768 * 3072


def test_representative_calls_pair_with_their_own_configs():
    with assume_device("a100"):
        calls = {call.name: call for call in representative_calls()}
        with pytest.raises(UnsupportedConfig, match="is not one of"):
            calls["one row"].thunk(choose_config(1576, 768, 768, 2, "ieee", DEVICES["a100"]))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(2, 5)}, ValueError, "expected .*K. and"),
        ({"x": torch.ones(2, 3, dtype=torch.float64)}, TypeError, "float64"),
        ({"weight": torch.ones(4, 3).half()}, TypeError, "for both"),
        ({"bias": torch.ones(3)}, ValueError, "bias has shape"),
        ({"layer_scale": torch.ones(3)}, ValueError, "layer_scale has shape"),
        ({"residual": torch.ones(4, 4)}, ValueError, "divisor"),
        ({"activation": "swoosh"}, ValueError, "unknown activation"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        linear_act(**{"x": torch.ones(2, 3), "weight": torch.ones(4, 3), **change})
