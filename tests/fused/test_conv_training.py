"""Training steps by the fused ops: gradients and statistics against float64, what is saved, bad input."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import fastnets
from fastnets.fused import batch_norm_training as norms
from fastnets.fused import conv_training
from fastnets.fused.activation import ACTIVATIONS
from fastnets.fused.batch_norm_training import Normalization, Pending
from tests.accuracy import assert_close_to

LAST = torch.channels_last


class Bottleneck(nn.Module):
    """ResNet's block: a value with two readers, pending batch norms, a residual through a convolution."""

    def __init__(self, planes=8, stride=2):
        super().__init__()
        wide = 2 * planes
        self.conv1 = nn.Conv2d(wide, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(wide, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: depthwise, ReLU6, a linear end."""

    def __init__(self, channels=8):
        super().__init__()
        hidden = 4 * channels
        self.conv = nn.Sequential(
            *(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)),
            *(nn.ReLU6(inplace=True), nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        )

    def forward(self, x):
        return x + self.conv(x)


class DenseLayer(nn.Module):
    """DenseNet's layer: batch norm and activation before the convolution; SiLU to have a curved one."""

    def __init__(self, channels=16, growth=8):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1)
        self.norm2 = nn.BatchNorm2d(2 * growth, momentum=None)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1)
        self.act = nn.SiLU()

    def forward(self, x):
        y = self.conv1(self.act(self.norm1(x)))
        return torch.cat([x, self.conv2(self.act(self.norm2(y)))], 1)


BLOCKS = {
    "bottleneck": (lambda: nn.Sequential(Bottleneck(stride=2), Bottleneck(stride=1)), 16),
    "inverted residual": (lambda: nn.Sequential(InvertedResidual()), 8),
    "dense layer": (lambda: nn.Sequential(DenseLayer()), 16),
    "grouped, no affine": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1, groups=2), nn.BatchNorm2d(16, affine=False), nn.Hardswish(),
            nn.Conv2d(16, 12, 3, stride=2, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(12, track_running_stats=False), nn.LeakyReLU(0.1), nn.Conv2d(12, 4, 1), nn.Tanh(),
        ),
        8,
    ),
}  # fmt: skip


def network(name, seed=0):
    torch.manual_seed(seed)
    make, channels = BLOCKS[name]
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model, torch.randn(3, channels, 7, 9)


def step(model, x, weights, dtype=None, lane=None):
    """(output, gradients by name, running statistics by name) of one forward and backward."""
    model, x = copy.deepcopy(model), x.clone()
    if dtype is not None:
        model, x, weights = model.to(dtype), x.to(dtype), weights.to(dtype)
    if lane is not None:
        model, x, weights = model.to(lane.device), x.to(lane.device), weights.to(lane.device)
    x.requires_grad_()
    y = model(x)
    (y * weights).sum().backward()
    gradients = {"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    return y.detach(), gradients, {n: b for n, b in model.named_buffers() if b.is_floating_point()}


def assert_same_step(exact, stock, ours):
    assert_close_to(exact[0], stock[0], ours[0])
    for name, gradient in ours[1].items():
        assert gradient.dtype == stock[1][name].dtype, name
        if exact[1][name].norm() < 1e-6 * gradient.numel() ** 0.5:
            # The bias before a batch norm has no gradient; what is left is rounding.
            scale = max(float(g.norm()) for g in exact[1].values())
            assert gradient.norm() <= 3 * stock[1][name].norm() + 1e-2 * scale, name
            continue
        assert_close_to(exact[1][name], stock[1][name], gradient, ratio=3)
    for name, buffer in ours[2].items():  # means of few values, whose own rounding is not stock's
        assert_close_to(exact[2][name], stock[2][name], buffer, ratio=5)


def weights_for(model, x):
    with torch.no_grad():
        return torch.randn_like(copy.deepcopy(model)(x))


@pytest.mark.parametrize("save", ["auto", "less"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_reference_equals_stock_in_float64(name, save):
    model, x = network(name)
    weights = weights_for(model, x)
    expected = step(model, x, weights, torch.float64)
    with fastnets.backend("reference"):
        ours = step(fastnets.optimize(model, save=save), x, weights, torch.float64)
    for a, b in zip((expected[0], *expected[1].values(), *expected[2].values()),
                    (ours[0], *ours[1].values(), *ours[2].values())):  # fmt: skip
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_reference_is_as_accurate_as_stock(name, dtype):
    model, x = network(name)
    model, x = model.to(dtype), x.to(dtype)
    weights = weights_for(model, x)
    with fastnets.backend("reference"):
        ours = step(fastnets.optimize(model), x, weights)
    assert_same_step(step(model, x, weights, torch.float64), step(model, x, weights), ours)


@pytest.mark.parametrize(
    "name, save",
    [
        ("inverted residual", "less"),
        pytest.param("bottleneck", "auto", marks=pytest.mark.slow),
        pytest.param("dense layer", "auto", marks=pytest.mark.slow),
        pytest.param("bottleneck", "less", marks=pytest.mark.slow),
        pytest.param("grouped, no affine", "less", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_train(lane, name, save):
    model, x = network(name)
    weights = weights_for(model, x)
    exact, stock = step(model, x, weights, torch.float64), step(model, x, weights)
    fast = fastnets.optimize(model, save=save, backend="triton")
    with lane:
        ours = step(fast, x, weights, lane=lane)
    assert_same_step(exact, stock, ours)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize(
    "name, dtype",
    [("dense layer", torch.float16), pytest.param("bottleneck", torch.bfloat16, marks=pytest.mark.slow)],
)
def test_the_kernels_train_in_half_precision(lane, name, dtype):
    model, x = network(name)
    model, x = model.to(dtype), x.to(dtype)
    weights = weights_for(model, x)
    exact, stock = step(model, x, weights, torch.float64), step(model, x, weights)
    with lane:
        ours = step(fastnets.optimize(model, save="less", backend="triton"), x, weights, lane=lane)
    assert_same_step(exact, stock, ours)


@pytest.mark.slow
@pytest.mark.lanes("sm_80", "gpu")
def test_steps_are_the_same_bit_for_bit(lane):
    model, x = network("bottleneck")
    weights = weights_for(model, x)
    fast = fastnets.optimize(model, backend="triton")
    with lane:
        first, second = (step(fast, x, weights, lane=lane) for _ in range(2))
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


@pytest.mark.parametrize("name", BLOCKS)
def test_frozen_statistics_while_the_network_trains(name):
    model, x = network(name)
    weights = weights_for(model, x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    expected = step(model, x, weights, torch.float64)
    with fastnets.backend("reference"):
        ours = step(fastnets.optimize(model), x, weights, torch.float64)
    for key, gradient in expected[1].items():
        torch.testing.assert_close(ours[1][key], gradient, rtol=1e-9, atol=1e-11)
    for key, buffer in expected[2].items():
        torch.testing.assert_close(ours[2][key], buffer, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_running_statistics_after_twenty_steps(backend):
    model, x = network("dense layer")
    fast, exact = fastnets.optimize(model, backend=backend), copy.deepcopy(model).double()
    for i in range(20):
        batch = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) + 0.1 * i
        for m in (model, fast):
            m(batch)
        exact(batch.double())
    for (name, e), s, f in zip(exact.named_buffers(), model.buffers(), fast.buffers()):
        if e.is_floating_point():
            assert_close_to(e, s, f)
        else:
            assert torch.equal(s, f), name


def geometry(case, dtype=torch.float64):
    """Arguments of the op for gradcheck: x or z, weight, bias, the pending norm's vectors."""
    torch.manual_seed(1)
    x = torch.randn(2, 4, 5, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 4, *case.get("filter", (1, 1)), dtype=dtype, requires_grad=True)
    bias = torch.randn(6, dtype=dtype, requires_grad=True)
    gamma, beta = (torch.randn(4, dtype=dtype, requires_grad=True) for _ in range(2))
    options = (case.get("stride", [1, 1]), case.get("padding", [0, 0]), [1, 1], 1)
    return x, weight, bias, gamma, beta, options


@pytest.mark.parametrize("save", conv_training.SAVES)
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize(
    "case",
    [{}, {"filter": (3, 3), "stride": [2, 2], "padding": [1, 1]}],
    ids=["pointwise", "3x3 strided"],
)
@pytest.mark.parametrize("activation", ["relu6", "silu"])
def test_gradcheck_of_a_pending_batch_norm_and_a_convolution(case, batch, activation, save):
    z, weight, bias, gamma, beta, options = geometry(case)
    frozen = torch.rand(2, 4, dtype=z.dtype) + 0.5

    def function(z, weight, bias, gamma, beta):
        mean, rstd = frozen
        if batch:
            mean, rstd = norms.batch_statistics(z.detach(), None, None, 0.0, 1e-5, False, "reference")
        norm = Normalization(mean, rstd, gamma, beta, None, batch, "")
        x = Pending(z, norm, activation, 0.0, "reference")
        running = (None, None, 0.0)
        return conv_training.convolve(
            x, weight, bias, running, options, 1e-5, "none", save, "reference"
        )[0]  # fmt: skip

    assert gradcheck(function, (z, weight, bias, gamma, beta))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_batch_norm_add_act(activation, batch, residual):
    torch.manual_seed(2)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    r = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) if residual else None
    gamma, beta = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    frozen = torch.rand(2, 2, dtype=torch.float64) + 0.5

    def function(x, gamma, beta, *r):
        mean, rstd = frozen
        if batch:
            mean, rstd = norms.batch_statistics(x.detach(), None, None, 0.0, 1e-5, False, "reference")
        norm = Normalization(mean, rstd, gamma, beta, None, batch, "")
        return norms.add_act(x, norm, r[0] if r else None, activation, 0.1, "reference")

    assert gradcheck(function, (x, gamma, beta, *([r] if residual else [])))


def forked(x, weight, bias, options):
    """(z, x for others) of the autograd function that lets x through."""
    results = conv_training._Conv.apply(
        True, None, x, weight, bias, *[None] * 7, *options, "none", 0.0, False, "", 0.0, 1e-5, "none", "auto",
        "reference",
    )  # fmt: skip
    return results[0], results[-1]


def test_a_forked_input_adds_the_other_gradients():
    x, weight, bias, *_, options = geometry({})

    def both(x, weight, bias):
        z, other = forked(x, weight, bias, options)
        return z, other.square()

    assert gradcheck(lambda *args: forked(*args, options)[0], (x, weight, bias))
    assert gradcheck(both, (x, weight, bias))


def test_a_forked_input_whose_convolution_is_not_used():
    x, weight, bias, *_, options = geometry({})
    forked(x, weight, bias, options)[1].sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_saving_less_saves_less():
    def saved(save):
        model, x = network("inverted residual")
        fast = fastnets.optimize(model, save=save)
        kept = {}

        def keep(t):
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with fastnets.backend("reference"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = fast(x)  # kept alive, or storages would be reused and counted once
        assert y.requires_grad
        return sum(kept.values())

    assert saved("less") < 0.7 * saved("auto")


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the ops that are called, ours and ATen's."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def blocks():
    """As in a ResNet: a stage of blocks, which the network around it calls."""
    return nn.Sequential(nn.Sequential(*(Bottleneck(stride=1) for _ in range(3)))).train()


def calls_of_a_step(model, x, then=lambda y: None):
    with fastnets.backend("reference"), Calls() as calls:
        y = model(x)
        then(y)
        y.sum().backward()
    return calls.names


def test_between_blocks_no_pass_takes_the_sums():
    torch.manual_seed(0)
    model, x = blocks(), torch.randn(2, 16, 5, 5, requires_grad=True)
    fast = fastnets.optimize(model, save="less")  # so that batch norms stay pending here, too
    names = calls_of_a_step(fast, x)
    # Only the last block's own batch norm has a gradient that came from elsewhere.
    assert names.count("fastnets::bn_backward_sums") == 1
    assert names.count("fastnets::conv_input_gradient") == 9
    model(x.detach()).sum().backward()
    for p, q in zip(model.parameters(), fast.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4)


def test_whoever_looks_between_blocks_sees_whole_gradients():
    torch.manual_seed(0)
    model, x = blocks().double(), torch.randn(2, 16, 5, 5, dtype=torch.float64)
    seen = {}
    for name, net in (("stock", copy.deepcopy(model)), ("fast", fastnets.optimize(model))):
        between = []
        net[0][1].register_forward_pre_hook(lambda _, inputs, kept=between: kept.append(inputs[0]))
        with fastnets.backend("reference"):
            y = net(x)
            (gradient,) = torch.autograd.grad(y.sum(), between)
        seen[name] = gradient
    torch.testing.assert_close(seen["fast"], seen["stock"], rtol=1e-9, atol=1e-11)


class Layer(nn.Module):
    """Convolution, batch norm, activation."""

    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act = act()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Padded(nn.Module):
    """x has a reader beside a convolution that pads in a way of its own."""

    def __init__(self, size, **options):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, size, **options), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.sigmoid(self.bn(self.conv(x))) * x


class Preactivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.conv.eval()

    def forward(self, x):
        return self.conv(torch.relu(self.bn(x)))


class Shift(nn.Module):
    """Writes to what it is given."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.linspace(-1, 1, 8).view(8, 1, 1))

    def forward(self, x):
        x += self.by
        return x


class Keeps(nn.Module):
    """A forward that is not captured, around a layer that is."""

    def __init__(self):
        super().__init__()
        self.layer, self.kept = Layer(), []

    def forward(self, x):
        self.kept.append(x)
        return self.layer(x)


class Checkpointed(Keeps):
    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


class Between(nn.Module):
    """A module between two layers that may leave parts of gradients to each other."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.last = Layer(nn.ReLU6), middle, Layer()

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Features(nn.Module):
    """Returns what it goes on to use."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return x, torch.relu(self.bn2(self.conv2(x)))


def of_parameters(net, x):
    return torch.autograd.grad(net(x).square().sum(), list(net.parameters()))


def of_what_is_kept(net, x):
    y = net(x).square().sum()
    return torch.autograd.grad(y, [t for m in net.modules() if isinstance(m, Keeps) for t in m.kept])


def of_features(net, x):
    features = net(x)
    return torch.autograd.grad(sum(y.square().sum() for y in features), features)


def of_a_hooked_output(net, x):
    seen = []

    def hook(module, inputs, y):
        y.register_hook(seen.append)

    net.middle.register_forward_hook(hook)
    net(x).square().sum().backward()
    return seen


@pytest.mark.parametrize(
    "make, gradients",
    [
        (lambda: Padded(4, padding="same"), of_parameters),
        (lambda: Padded(3, padding=1, padding_mode="reflect"), of_parameters),
        (Preactivation, of_parameters),
        (lambda: Between(Shift()), of_parameters),
        (lambda: Between(Checkpointed()), of_parameters),
        (lambda: Between(Keeps()), of_what_is_kept),
        (lambda: Between(nn.Sequential(Keeps())), of_what_is_kept),
        (lambda: Between(Layer()), of_a_hooked_output),
        (lambda: nn.Sequential(Features()), of_features),
    ],
    ids=["padded by a pixel", "padded by reflection", "a frozen reader", "written in place", "checkpointed",
         "kept", "kept, in a Sequential", "hooked", "returned"],
)  # fmt: skip
def test_networks_that_look_at_what_is_passed_on(make, gradients):
    torch.manual_seed(0)
    model = make().double()
    fast = fastnets.optimize(model)
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64).contiguous(memory_format=LAST)
    theirs = gradients(model, x)
    with fastnets.backend("reference"):
        ours = gradients(fast, x)
    assert len(ours) == len(theirs) > 0
    for found, expected in zip(ours, theirs):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_results_are_saved_as_tensors(tmp_path):
    fast = fastnets.optimize(Layer())
    with fastnets.backend("reference"):
        y = fast(torch.randn(2, 8, 7, 7).contiguous(memory_format=LAST))
    torch.save(y, tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), y)
    assert (tmp_path / "y.pt").stat().st_size < 2 * y.nbytes + 2048


def opcheck_cases():
    x, weight, bias, gamma, beta, options = geometry({})
    mean, rstd = torch.randn(4).double(), torch.rand(4).double() + 0.5
    running = torch.zeros(6).double(), torch.ones(6).double()
    ops = torch.ops.fastnets
    plain = (*[None] * 5, *running, *options, "none", 0.0, False, "", 0.1, 1e-5, "final", "auto", "reference")
    pending = (mean, rstd, gamma, beta, None, *running, *options, "relu", 0.0, True, "", 0.1, 1e-5, "merged",
               "less", "reference")  # fmt: skip
    dy = torch.randn(2, 6, 5, 5).double()
    vectors = (mean, rstd, gamma.detach(), beta.detach())
    z = x.detach()
    none = (None,) * 4
    return {
        "conv_training": (ops.conv_training, (x, weight, bias, *plain)),
        "conv_training, pending": (ops.conv_training, (x, weight, bias, *pending)),
        "conv_input_gradient": (
            ops.conv_input_gradient,
            (dy, weight.detach(), [2, 4, 5, 5], *options, z, z, None, *vectors, "relu", 0.0, "reference"),
        ),
        "conv_weight_gradient": (
            ops.conv_weight_gradient,
            (dy, z, [6, 4, 1, 1], torch.float64, *options, *none, "none", 0.0, "reference"),
        ),
        "batch_statistics": (
            ops.batch_statistics, (z, *[t[:4] for t in running], 0.1, 1e-5, False, "reference")
        ),
        "finalize_statistics": (
            ops.finalize_statistics,
            (torch.randn(2, 6).double(), torch.rand(2, 6).double(), torch.ones(2).double() * 5, *running, 0.1,
             1e-5, "reference"),
        ),
        "normalize_add_act": (ops.normalize_add_act, (z, *vectors, z, "relu", 0.0, True, "reference")),
        "bn_backward_sums": (
            ops.bn_backward_sums, (z, z, *vectors, None, None, "relu", 0.0, True, "reference")
        ),
        "bn_backward_input": (
            ops.bn_backward_input,
            (z, z, *vectors, torch.ones(2, 4).double(), None, "relu", 0.0, torch.float32, "reference"),
        ),
        "bn_add_act_training": (
            ops.bn_add_act_training,
            (x, x, mean, rstd, gamma, beta, None, True, "", "relu", 0.0, "reference"),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(opcheck_cases()))
def test_opcheck(name):
    op, arguments = opcheck_cases()[name]
    torch.library.opcheck(op, arguments)


def test_one_value_per_channel_raises_as_stock():
    for model, shape in (
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (1, 3, 3, 3)),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)), (1, 3, 1, 1)),
    ):
        fast = fastnets.optimize(model.train())
        for backend in ("auto", "reference"):
            with fastnets.backend(backend), pytest.raises(ValueError, match="more than 1 value per channel"):
                fast(torch.randn(shape))


@pytest.mark.parametrize("name", BLOCKS)
def test_double_backward_raises(name):
    """Also where the loss's own gradient is a constant, as in a gradient penalty beside another loss."""
    model, x = network(name)
    x.requires_grad_()
    with fastnets.backend("reference"):
        y = fastnets.optimize(model)(x).sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        (gradient.square().sum() + y).backward()


def test_a_weight_changed_before_the_backward_raises_as_stock():
    model, x = network("bottleneck")
    with fastnets.backend("reference"):
        fast = fastnets.optimize(model)
        y = fast(x).sum()
    with torch.no_grad():
        fast[0].conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_non_finite_gradients_pass_through():
    model, x = network("bottleneck")
    for value in (float("inf"), float("nan")):
        weights = torch.full_like(weights_for(model, x), value)
        expected = step(model, x, weights)
        with fastnets.backend("reference"):
            ours = step(fastnets.optimize(model), x, weights)
        for name, gradient in expected[1].items():
            assert torch.equal(gradient.isfinite(), ours[1][name].isfinite()), name


def test_expanded_and_strided_gradients():
    model, x = network("bottleneck")
    exact, fast = copy.deepcopy(model).double(), fastnets.optimize(model)
    for make in (
        lambda y: torch.ones((), dtype=y.dtype).expand_as(y),
        lambda y: torch.randn(*y.shape[:3], 1, generator=torch.Generator().manual_seed(0)).to(y).expand_as(y),
        lambda y: torch.ones(*y.shape[::-1], dtype=y.dtype).permute(3, 2, 1, 0),
    ):
        results = []
        for m, dtype in ((exact, torch.float64), (model, torch.float32), (fast, torch.float32)):
            m.zero_grad()
            inputs = x.clone().to(dtype).requires_grad_()
            with fastnets.backend("reference"):
                y = m(inputs)
            y.backward(make(y))
            results.append([inputs.grad, *(p.grad for p in m.parameters())])
        for e, s, f in zip(*results):
            assert_close_to(e, s, f, ratio=3)


def test_large_mean_and_small_variance():
    torch.manual_seed(0)
    x = 1e4 + 1e-2 * torch.randn(8, 4, 16, 16)
    bn = nn.BatchNorm2d(4).train()
    exact = copy.deepcopy(bn).double()
    fast = fastnets.optimize(nn.Sequential(copy.deepcopy(bn), nn.ReLU()))
    with fastnets.backend("reference"):
        assert_close_to(torch.relu(exact(x.double())), torch.relu(bn(x)), fast(x))
