"""The op of a convolution that pools its own result: LeNet-5 in three launches, VGG's maps never unpooled."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.bench.traffic import compare, count
from fastnets.fused import conv_act_pool, dispatch, onednn
from fastnets.kernels.device import assume_device
from fastnets.models import create_model
from tests.accuracy import assert_close_to
from tests.fused.networks import assert_same_answers, graphs, images, kinds, settled

NAMES = ("running_mean", "running_var", "bn_weight", "bn_bias")


def operands(bn=True, dtype=torch.float32):
    t = {"x": torch.randn(2, 3, 7, 6), "weight": torch.randn(5, 3, 3, 3), "bias": torch.randn(5)}
    if bn:
        t |= {name: torch.rand(5) + 0.5 for name in NAMES}
    return {name: tensor.to(dtype) for name, tensor in t.items()}


@pytest.mark.parametrize("name", ["conv_act_pool", "conv_act_pool_inference"])
def test_op_is_registered_as_pytorch_asks(name):
    t = operands()
    if name == "conv_act_pool":
        t["weight"].requires_grad_()
    op = getattr(torch.ops.fastnets, name).default
    options = ((1, 1), (1, 1), (1, 1), 1e-5, "relu", 0.01, True, (2, 2), "auto")
    torch.library.opcheck(op, (*t.values(), *options))


@pytest.mark.parametrize("maximum", [True, False])
def test_gradient_is_that_of_the_parts(maximum):
    t = operands(dtype=torch.float64)
    leaves = {name: v.clone().requires_grad_("running" not in name) for name, v in t.items()}
    assert torch.autograd.gradcheck(
        lambda *values: conv_act_pool(**dict(zip(leaves, values)), activation="silu", maximum=maximum),
        list(leaves.values()),
        fast_mode=True,
    )


def test_reference_is_stock():
    t = operands(bn=False)
    with torch.no_grad():
        y = conv_act_pool(**t, activation="relu", backend="reference")
    expected = F.max_pool2d(F.conv2d(*t.values()).relu(), 2)
    torch.testing.assert_close(y, expected, check_stride=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": (3, 3)}, "windows of 3×3 over 3 channels; served are at most 4 pixels"),
        ({"x": torch.randn(2, 32, 7, 6), "weight": torch.randn(5, 32, 3, 3), "window": (1, 3)}, "are 2 or 4"),
        ({"weight": torch.randn(65, 3, 3, 3), "bias": None, **dict.fromkeys(NAMES)}, "3 channels to 65"),
        ({"x": torch.randn(2, 3, 3, 3)}, "does not fit 1×1"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
        ({"bias": torch.randn(4)}, r"bias has shape \(4,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        conv_act_pool(**{**operands(), **change})


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("name", ["lenet5", "lenet5_relu"])
def test_lenet(lane, name):
    stock = create_model(name).eval()
    fast = fastnets.optimize(copy.deepcopy(stock).to(lane.device))
    x = images(3, 1, 28, 28)
    switch = torch.backends.cudnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    try:
        with lane, dispatch.backend("triton"), torch.no_grad():
            y = fast(lane.put(x))
    finally:
        switch.fp32_precision = before
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())


@pytest.mark.parametrize("batch", [1, 32, 8192])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_lenet_takes_three_launches(batch, backend):
    stock = create_model("lenet5").to("meta").eval()
    with dispatch.assume_device_type("cuda"), dispatch.backend(backend):
        found = compare(stock, fastnets.optimize(stock), torch.empty(batch, 1, 28, 28, device="meta"))
    assert found.stock.launches == 11
    assert found.fast.launches == 3
    assert batch == 1 or found.ratio < 0.25


def test_reports_cpu_hooks_and_training():
    stock = create_model("lenet5_relu").eval()
    fast = fastnets.optimize(stock)
    assert kinds(fast) == ["conv+relu+pool", "conv+relu+pool", "linear+relu+linear+relu+linear"]
    assert_same_answers(stock, fast, images(3, 1, 28, 28))
    grads = []
    for model in (stock, fast):
        model.train()(images(3, 1, 28, 28)).square().sum().backward()
        grads.append(model.conv1.weight.grad)
    torch.testing.assert_close(*grads)
    seen = []
    fast.eval().pool1.register_forward_hook(lambda *a: seen.append(1))
    meta = copy.deepcopy(fast).to("meta")
    with torch.no_grad():
        fast(images(1, 1, 28, 28))
    assert seen == [1]
    with dispatch.assume_device_type("cuda"):
        assert count(meta, torch.empty(4, 1, 28, 28, device="meta")).launches > 3


@pytest.mark.parametrize(
    "conv, pool",
    [
        (nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2)),
        (nn.Conv2d(3, 8, 3), nn.MaxPool2d(2, ceil_mode=True)),
        (nn.Conv2d(3, 8, 3), nn.MaxPool2d(2, padding=1)),
        (nn.Conv2d(3, 8, 3), nn.MaxPool2d(2, return_indices=True)),
        (nn.Conv2d(3, 8, 3), nn.AvgPool2d(2, divisor_override=3)),
        (nn.Conv2d(40, 8, 3), nn.MaxPool2d(3)),
        (nn.Conv2d(40, 8, 3), nn.MaxPool2d(3, 2)),
        (nn.Conv2d(40, 8, 3), nn.MaxPool2d((1, 3))),
        (nn.Conv2d(40, 8, 3), nn.MaxPool2d(2, ceil_mode=True)),
        (nn.Conv2d(40, 8, 3), nn.MaxPool2d(2, dilation=2)),
        (nn.Conv2d(40, 8, 3), nn.AvgPool2d(2, padding=1)),
        (nn.Conv2d(40, 8, 3, groups=2), nn.MaxPool2d(2)),
        (nn.Conv2d(40, 8, 3, padding="same"), nn.MaxPool2d(2)),
        (nn.Conv2d(3, 80, 3), nn.MaxPool2d(2)),
        (nn.Conv2d(3, 8, 3, padding_mode="reflect", padding=1), nn.MaxPool2d(2)),
        (nn.Conv2d(4, 8, 3, groups=2), nn.MaxPool2d(2)),
    ],
)
def test_other_layers_stay_apart(conv, pool):
    fast = fastnets.optimize(settled(nn.Sequential(conv, nn.ReLU(), pool)))
    assert "call_conv_act_pool" not in graphs(fast)


@pytest.mark.parametrize("size, stride", [((2,), None), ([2], (2,)), (2, ()), ((2, 2), [2, 2])])
def test_sizes_are_read_as_pytorch_reads_them(size, stride):
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(size, stride), nn.LocalResponseNorm(3))
    stock = settled(nn.Sequential(*layers, nn.MaxPool2d(size, stride)))
    fast = fastnets.optimize(stock)
    assert kinds(fast) == ["conv+relu+pool", "response norm+pool"]
    assert_same_answers(stock, fast, images(2, 3, 14, 14))
    with dispatch.assume_device_type("cuda"):
        ops = count(copy.deepcopy(fast).to("meta"), torch.empty(4, 3, 14, 14, device="meta")).by_op
    assert {"triton.conv_pool_kernel", "triton.response_norm_pool_kernel"} <= set(ops)


@pytest.mark.parametrize("name", ["lenet5", "lenet5_relu"])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_small_networks_on_the_cpu_are_stocks_functions(name, batch):
    stock = create_model(name).eval()
    fast, x = fastnets.optimize(stock), images(batch, 1, 28, 28)
    assert_same_answers(stock, fast, x)
    assert_same_answers(stock, fast, x.to(memory_format=torch.channels_last))
    with torch.no_grad():
        kept = x.clone()
        fast(x)
        assert torch.equal(x, kept)
        for model in (stock, fast):
            model.conv1.weight.data.mul_(3)
            model.pool1.ceil_mode = True
            model.conv2.padding = (1, 1)
            model.fc1 = torch.nn.Linear(576, 120)
        fast.fc1.load_state_dict(stock.fc1.state_dict())
    assert_same_answers(stock, fast, x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fast(x).dtype == torch.bfloat16


@pytest.mark.parametrize("layer", ["conv1", "act1", "pool2", "flatten", "fc2", "act4"])
def test_hooks_inside_small_networks_fire(layer):
    fast = fastnets.optimize(create_model("lenet5").eval())
    seen = []
    fast.get_submodule(layer).register_forward_hook(lambda *a: seen.append(a[0]))
    with torch.no_grad():
        fast(images(2, 1, 28, 28))
    assert seen == [fast.get_submodule(layer)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), ((2, 1), (0, 1))])
def test_one_tiny_image_is_unrolled(stride, padding, bias):
    conv = nn.Conv2d(3, 5, (5, 3), stride, padding, bias=bias)
    stock = nn.Sequential(conv, nn.Tanh(), nn.AvgPool2d(2)).eval()
    fast = fastnets.optimize(stock)
    x = images(1, 3, 14, 13)
    assert onednn.is_tiny(x, conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert_same_answers(stock, fast, x)
    other_layout = x.to(memory_format=torch.channels_last)
    assert not onednn.is_tiny(other_layout, conv.weight, conv.stride, conv.padding, conv.dilation, 1)
    assert_same_answers(stock, fast, other_layout)
    for wrong in (images(1, 3, 4 - 2 * conv.padding[0], 14), images(1, 4, 14, 13)):
        with torch.no_grad(), pytest.raises(RuntimeError) as theirs:
            stock(wrong)
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) as ours:
            fast(wrong)
        assert str(theirs.value) == str(ours.value) or "channels" in str(ours.value)


class VGGLike(nn.Sequential):
    """Convolutions of VGG's kind and their poolings, as its ``features``: sides need not be even."""

    def __init__(self, batch_norm: bool, channels=(32, 40), pool=None):
        layers: list[nn.Module] = []
        C = 3
        for K in (32, *channels):
            layers += [
                nn.Conv2d(C, K, 3, padding=1),
                nn.BatchNorm2d(K) if batch_norm else None,
                nn.ReLU(True),
            ]
            if C > 3:
                layers.append(pool or nn.MaxPool2d(2, 2))
            C = K
        super().__init__(*(layer for layer in layers if layer is not None))


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_many_channels(lane, batch_norm, dtype):
    stock = settled(VGGLike(batch_norm)).to(dtype)
    fast = fastnets.optimize(copy.deepcopy(stock).to(lane.device))
    x = images(1, 3, 7, 9).to(dtype)
    switch = torch.backends.cudnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    try:
        with lane, dispatch.backend("triton"), torch.no_grad():
            y = fast(lane.put(x))
    finally:
        switch.fp32_precision = before
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())


def launched(model, *size, backend="triton", gpu="a100", dtype=torch.float16):
    """Names of the kernels and ops, in their order, on the GPU that is assumed."""
    x = torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)
    with dispatch.assume_device_type("cuda"), assume_device(gpu), dispatch.backend(backend):
        counted = count(copy.deepcopy(model).to("meta", dtype), x)
    return [record.op for record in counted.records]


class TestManyChannels:
    def test_pool_in_the_epilogue_where_that_pays(self):
        fast = fastnets.optimize(settled(VGGLike(True, (64, 64))))
        assert kinds(fast) == ["conv+bn+relu", "conv+bn+relu+pool", "conv+bn+relu+pool"]
        assert launched(fast, 32, 3, 112, 112)[1:] == ["triton.conv_kernel"] * 2
        # So few pixels take all that there is of the GPU only where columns are split.
        alone = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1), nn.MaxPool2d(2)).eval()
        alone = fastnets.optimize(alone.to(memory_format=torch.channels_last))
        assert kinds(alone) == ["conv+pool"]
        split = ["triton.conv_kernel", "triton.conv_reduce_kernel", "triton.pool_kernel"]
        assert launched(alone, 1, 512, 14, 14) == split

    def test_the_vendor_convolves_where_it_did(self):
        """On CUDA, unmeasured, a dense 3×3 convolution is the vendor's, and pooled after it."""
        fast = fastnets.optimize(settled(VGGLike(True)))
        ops = launched(fast, 32, 3, 112, 112, backend="auto")
        assert ops.count("aten.convolution") >= 2
        assert ops.count("triton.pool_kernel") == 2
        with dispatch.assume_device_type("cuda"):
            report = fastnets.explain(copy.deepcopy(fast).to("meta"))
        assert {r.implementation for r in report.rows if r.kind.endswith("pool")} == {"cudnn+epilogue"}

    def test_reported(self):
        fast = fastnets.optimize(settled(VGGLike(True)), backend="triton")
        rows = [row for row in fastnets.explain(fast).rows if row.kind == "conv+bn+relu+pool"]
        assert [row.implementation for row in rows] == ["triton"] * 2
        assert fastnets.explain(fast).coverage == 1

    @pytest.mark.parametrize("batch_norm", [True, False])
    def test_on_the_cpu_each_part_runs_as_before(self, batch_norm):
        """By oneDNN's fused call and stock's pooling, also where there is little to compute."""
        stock = settled(VGGLike(batch_norm, (32, 32)))
        fast, x = fastnets.optimize(stock), images(1, 3, 9, 10)
        assert_same_answers(stock, fast, x)
        rows = [row for row in fastnets.explain(fast).rows if row.kind.endswith("pool")]
        assert [row.implementation for row in rows] == ["onednn"] * 2

    def test_hooks_gradients_and_sizes_that_do_not_fit(self):
        stock = settled(VGGLike(False))
        fast = fastnets.optimize(stock, backend="triton")
        grads = []
        for model in (stock, fast):
            model.train()
            with dispatch.backend("reference"):
                model(images(2, 3, 8, 8)).square().sum().backward()
            grads.append(model[2].weight.grad)
        torch.testing.assert_close(*grads)
        seen = []
        fast.eval()[4].register_forward_hook(lambda module, inputs, y: seen.append(inputs[0]))
        assert "aten.max_pool2d_with_indices" in launched(fast, 8, 3, 56, 56)
        with torch.no_grad(), dispatch.backend("reference"):
            fast(images(1, 3, 8, 8))
        assert {tuple(x.shape) for x in seen} == {(8, 32, 56, 56), (1, 32, 8, 8)}
        small = fastnets.optimize(settled(VGGLike(False)))
        for model in (settled(VGGLike(False)), small):
            with torch.no_grad(), pytest.raises(RuntimeError, match="Output size is too small"):
                model(images(1, 3, 3, 3))


def test_op_over_many_channels():
    t = {"x": torch.randn(2, 32, 7, 6), "weight": torch.randn(5, 32, 3, 3), "bias": torch.randn(5)}
    options = ((1, 1), (1, 1), (1, 1), 1e-5, "relu", 0.01, True, (2, 2), "auto")
    torch.library.opcheck(torch.ops.fastnets.conv_act_pool.default, (*t.values(), *[None] * 4, *options))
    with torch.no_grad():
        y = conv_act_pool(**t, padding=(1, 1))
        expected = F.max_pool2d(F.conv2d(*t.values(), padding=1).relu(), 2)
    torch.testing.assert_close(y, expected, check_stride=False, rtol=1e-4, atol=1e-4)
    wide = {name: v.double().requires_grad_() for name, v in t.items()}
    assert torch.autograd.gradcheck(
        lambda *values: conv_act_pool(**dict(zip(wide, values)), activation="silu", maximum=False),
        list(wide.values()),
        fast_mode=True,
    )


def test_op_leaves_a_dense_convolution_to_the_vendor_on_cuda():
    last = {"device": "meta", "memory_format": torch.channels_last}
    x, weight = torch.empty((8, 64, 56, 56), **last), torch.empty((32, 64, 3, 3), **last)
    bn = [torch.empty(32, device="meta") for _ in NAMES]
    ops = {}
    for backend in ("auto", "triton", "reference"):
        with dispatch.assume_device_type("cuda"), torch.no_grad():
            found = count(lambda x, backend: conv_act_pool(x, weight, None, *bn, backend=backend), x, backend)
        ops[backend] = [record.op for record in found.records]
    assert ops["auto"][0] == "aten.convolution"
    assert len(ops["auto"]) < len(ops["reference"])
    assert ops["triton"] == ["triton.conv_kernel"]


def test_a_compiler_sees_one_op():
    fast = fastnets.optimize(settled(VGGLike(True, (32,))), backend="triton")
    seen = []

    def keep(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return lambda *arguments: (torch.zeros(1, 32, 3, 3),)

    with torch.no_grad():
        torch.compile(fast, backend=keep, fullgraph=True)(images(1, 3, 6, 6))
    assert torch.ops.fastnets.conv_act_pool_inference.default in seen


def test_what_is_measured_is_the_convolution_and_the_pooling_each_for_itself():
    fast = fastnets.optimize(settled(VGGLike(True)), backend="triton")
    with dispatch.decisions():
        assert launched(fast, 8, 3, 56, 56).count("triton.pool_kernel") == 2
    assert "triton.pool_kernel" not in launched(fast, 8, 3, 56, 56)
