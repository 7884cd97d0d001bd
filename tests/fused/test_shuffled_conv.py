"""A convolution shuffled with the channels that pass by it as one op, and the call of rewritten networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.bench.traffic import count
from fastnets.fused import dispatch
from fastnets.fused.activation import ACTIVATIONS
from fastnets.fused.shuffled_conv import conv_channel_shuffle
from fastnets.models.shufflenet import ShuffleNetV2, ShuffleUnit
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.fused.networks import assert_same_answers, graphs, images, kinds, settled

OPS = ("conv_channel_shuffle", "conv_channel_shuffle_inference")
GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)


def arguments(C=40, K=24, *, R=1, bn=True, dtype=torch.float32, layout="slice"):
    """Of the op, by name; what passes is half of a wider channels-last tensor, or contiguous."""
    tensors = {"x": torch.randn(2, C, 6, 5), "weight": torch.randn(K, C, R, R) / (C**0.5 * R)}
    if bn:
        tensors |= {"running_mean": torch.randn(K), "running_var": torch.rand(K) + 0.5}
        tensors |= {"bn_weight": torch.randn(K), "bn_bias": torch.randn(K)}
    else:
        tensors["bias"] = torch.randn(K)
    result = {name: t.to(dtype) for name, t in tensors.items()}
    result["x"] = result["x"].to(memory_format=torch.channels_last)
    whole = torch.randn(2, 2 * K, 6, 5).to(dtype).to(memory_format=torch.channels_last)
    result["passed"] = whole[:, :K] if layout == "slice" else whole[:, :K].contiguous()
    return result


def put(lane, tensors):
    """The operands in the lane, what passes still in its place."""
    given = {name: lane.put(t) for name, t in tensors.items()}
    K = tensors["passed"].shape[1]
    if not tensors["passed"].is_contiguous():
        both = lane.put(torch.cat((tensors["passed"],) * 2, 1))
        given["passed"] = both[:, K:]
    return given


def stock(tensors, activation="relu", dtype=None):
    t = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    y = F.conv2d(t["x"], t["weight"], t.get("bias"), padding=t["weight"].shape[-1] // 2)
    if "running_mean" in t:
        y = F.batch_norm(y, t["running_mean"], t["running_var"], t["bn_weight"], t["bn_bias"])
    y = ACTIVATIONS[activation].forward(y, 0.01)
    return F.channel_shuffle(torch.cat((t["passed"], y), 1), 2)


@pytest.mark.parametrize(
    "options, activation, dtype",
    [
        ({}, "relu", torch.float32),
        ({"bn": False, "K": 19}, "silu", torch.float16),
        ({"C": 32, "R": 3}, "none", torch.bfloat16),
        ({"layout": "contiguous"}, "relu", torch.float16),  # copied first
        ({"C": 8, "R": 3}, "relu", torch.float32),  # another kernel's convolution, then the shuffle
    ],
)
def test_as_accurate_as_stock(lane, options, activation, dtype):
    padding = (options.get("R", 1) // 2,) * 2
    tensors = arguments(**options, dtype=dtype)
    with lane, torch.no_grad():
        y = conv_channel_shuffle(
            **put(lane, tensors), padding=padding, activation=activation, backend="triton"
        )
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y[:, ::2].cpu(), tensors["passed"])
    assert_close_to(stock(tensors, activation, torch.float64), stock(tensors, activation), y.cpu())


@pytest.mark.parametrize("backend", ["library", "reference"])
def test_other_backends_run_one_after_the_other(backend):
    tensors = arguments()
    with torch.no_grad():
        y = conv_channel_shuffle(**tensors, activation="relu", backend=backend)
    assert_close_to(stock(tensors, dtype=torch.float64), stock(tensors), y)


def test_exact_on_integers(lane):
    tensors = {"x": integers(2, 32, 4, 3), "weight": integers(16, 32, 1, 1), "passed": integers(2, 16, 4, 3)}
    tensors["passed"] = tensors["passed"].to(memory_format=torch.channels_last)
    with lane, torch.no_grad():
        y = conv_channel_shuffle(**{name: lane.put(t) for name, t in tensors.items()}, backend="triton")
    assert_exact(stock(tensors, "none"), y.cpu())


@pytest.mark.parametrize("name", OPS)
def test_op_is_registered_as_pytorch_asks(name):
    t = arguments(C=5, K=3)
    if name == OPS[0]:
        t["x"].requires_grad_()
    tensors = (t["x"], t["weight"], None, *(t[n] for n in ("running_mean", "running_var")))
    tensors += (t["bn_weight"], t["bn_bias"], t["passed"])
    options = (*GEOMETRY, 1e-5, "relu", 0.01, "auto")
    torch.library.opcheck(getattr(torch.ops.fastnets, name).default, (*tensors, *options))


def test_gradient_is_that_of_the_parts():
    tensors = arguments(C=4, K=3, dtype=torch.float64)
    fixed = ("running_mean", "running_var")
    leaves = {name: t.clone().requires_grad_(name not in fixed) for name, t in tensors.items()}
    assert torch.autograd.gradcheck(
        lambda *t: conv_channel_shuffle(**dict(zip(leaves, t)), activation="silu"),
        list(leaves.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"passed": torch.randn(2, 25, 6, 5)}, ValueError, r"passed is \(2, 25, 6, 5\) .* \(2, 24, 6, 5\)"),
        ({"passed": torch.randn(2, 24, 6, 5).half()}, ValueError, "passed is .* torch.float16"),
        ({"passed": torch.empty(2, 24, 6, 5, device="meta")}, ValueError, "passed is on meta, x on cpu"),
        ({"running_mean": torch.randn(7)}, ValueError, r"running_mean has shape \(7,\)"),
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        conv_channel_shuffle(**{**arguments(), **change})


class Reshaping(ShuffleUnit):
    """Shuffles by itself, as torchvision's does; how sizes are asked for varies."""

    def __init__(self, *sizes, how="size"):
        super().__init__(*sizes)
        self.how = how

    def forward(self, x):
        passed, filtered = x.chunk(2, dim=1) if self.splits else (self.branch1(x), x)
        x = torch.cat((passed, self.branch2(filtered)), dim=1)
        if self.how == "shape":
            N, C, H, W = x.shape
            return x.reshape(N, 2, C // 2, H, W).transpose(1, 2).reshape(N, C, H, W)
        if self.how == "one by one":
            N, H, W = x.size(0), x.size(2), x.size(3)
            return x.view(N, 2, -1, H, W).transpose(2, 1).contiguous().view(N, -1, H, W)
        N, C, H, W = x.size()
        x = x.view(N, 2, C // 2, H, W)
        x = torch.transpose(x, 1, 2).contiguous()
        return x.view(N, C, H, W)


def reshaping(how):
    return lambda *sizes: Reshaping(*sizes, how=how)


UNITS = {
    "module": ShuffleUnit,
    **{how: reshaping(how) for how in ("size", "one by one", "shape")},
}


def network(unit, C=32):
    return settled(nn.Sequential(unit(C // 2, C, 2), unit(C, C, 1), unit(C, C, 1)))


@pytest.mark.parametrize("name", UNITS)
def test_a_network_runs_and_reports_it(name):
    stock = network(UNITS[name])
    fast = fastnets.optimize(stock)
    assert graphs(fast).count("call_conv_channel_shuffle(") == 3
    assert "torch.cat(" not in graphs(fast)
    assert kinds(fast).count("conv+bn+relu+shuffle") == 3
    assert fastnets.explain(fast, images(2, 16, 6, 6)).coverage == 1
    with dispatch.backend("triton"):
        rows = fastnets.explain(fast).rows
    assert [r.implementation for r in rows if r.kind.endswith("+shuffle")] == ["triton"] * 3
    assert_same_answers(stock, fast, images(2, 16, 7, 6))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(images(2, 16, 6, 6)).dtype == stock(images(2, 16, 6, 6)).dtype
    gradients = []
    for model in (stock.train(), fast.train()):
        x = images(2, 16, 6, 6).requires_grad_()
        model(x).square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("name", ["module", "size"])
def test_a_network_runs_it_by_triton(lane, name):
    stock = network(UNITS[name])
    fast = fastnets.optimize(copy.deepcopy(stock).to(lane.device))
    x = images(2, 16, 7, 6)
    with lane, dispatch.backend("triton"), torch.no_grad():
        for _ in range(3):  # repeated from a recording
            y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())


@pytest.mark.parametrize("name", UNITS)
def test_nothing_is_copied_and_hooks_are_honoured(name):
    fast = fastnets.optimize(network(UNITS[name], 64).to("meta"))
    x = torch.empty(8, 32, 28, 28, device="meta").to(memory_format=torch.channels_last)
    with dispatch.backend("triton"):
        counted = count(fast, x)
        assert all(op.startswith("triton.") for op in counted.by_op)
        assert counted.launches == 5 + 3 + 3
        seen = []
        layers = [fast[1].branch2[5], fast[1].shuffle] if name == "module" else [fast[1].branch2[5]]
        for layer in layers:
            handle = layer.register_forward_hook(lambda *a: seen.append(1))
            assert count(fast, x).launches > counted.launches
            assert seen
            handle.remove()
            seen.clear()
        assert count(fast, x).launches == counted.launches


class Other(ShuffleUnit):
    """Not that shuffle: of other groups, halves, or read by others."""

    def __init__(self, *sizes, what):
        super().__init__(*sizes)
        self.what = what
        self.by_four = nn.ChannelShuffle(4)

    def forward(self, x):
        passed, filtered = x.chunk(2, dim=1)
        y = self.branch2(filtered)
        if self.what == "read again":
            x = torch.cat((passed, y), 1)
            return self.shuffle(x) + x
        if self.what == "four groups":
            return self.by_four(torch.cat((passed, y), 1))
        if self.what == "conv first":
            return self.shuffle(torch.cat((y, passed), 1))
        if self.what == "twice":
            return self.shuffle(torch.cat((y, y), 1))
        if self.what == "wider":
            return self.shuffle(torch.cat((x, y[:, :8], y), 1))
        if self.what == "unequal":
            return self.shuffle(torch.cat((x, y), 1))
        x = torch.cat((passed, y), 1)
        N, C, H, W = x.size()
        if self.what == "other sizes":
            return x.view(N, 2, C // 2, W, H).transpose(1, 2).contiguous().view(N, C, H, W)
        if self.what == "other axes":
            return x.view(N, 2, C // 2, H, W).transpose(1, 3).contiguous().view(N, C, H, W)
        assert self.what == "channels read"
        return x.view(N, 2, C // 2, H, W).transpose(1, 2).contiguous().view(N, C, H, W) * C


@pytest.mark.parametrize(
    "what",
    [
        "read again",
        "four groups",
        "conv first",
        "twice",
        "wider",
        "other sizes",
        "other axes",
        "channels read",
    ],
)
def test_what_is_no_such_shuffle_stays(what):
    stock = settled(Other(32, 32, 1, what=what))
    fast = fastnets.optimize(stock)
    assert "call_conv_channel_shuffle" not in graphs(fast)
    assert_same_answers(stock, fast, images(2, 32, 4, 6))


def test_unequal_halves_run_one_after_the_other(lane):
    stock = settled(Other(32, 32, 1, what="unequal"))
    fast = fastnets.optimize(copy.deepcopy(stock).to(lane.device))
    assert "call_conv_channel_shuffle" in graphs(fast)  # what passes is known when it runs
    x = images(2, 32, 4, 6)
    with lane, dispatch.backend("triton"), torch.no_grad():
        y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())


def test_groups_set_later_are_followed():
    stock = network(ShuffleUnit)
    fast = fastnets.optimize(copy.deepcopy(stock))
    for model in (stock, fast):
        model[1].shuffle.groups = 4
    assert_same_answers(stock, fast, images(2, 16, 6, 6))


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_shufflenet_runs_three_launches_a_unit(lane):
    stock = settled(ShuffleNetV2((24, 48, 64, 96, 128), 10))
    fast = fastnets.optimize(copy.deepcopy(stock).to(lane.device))
    x = images(1, 3, 64, 64)
    with lane, dispatch.backend("triton"), torch.no_grad():
        y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())


def test_counted_traffic_of_shufflenet():
    fast = fastnets.optimize(fastnets.create_model("shufflenet_v2_x1_0", fused=False).eval().to("meta"))
    x = torch.empty(8, 3, 224, 224, device="meta")
    with dispatch.backend("triton"), torch.no_grad():
        counted = count(fast, x)
    assert counted.launches <= 60
    assert "aten.cat" not in counted.by_op
    assert "triton.conv_kernel" in counted.by_op
