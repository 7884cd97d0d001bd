"""Around the step: autocast, loss scaling, clipping, accumulation, checkpointing, compilation, bad input.

Each is done to a stock network and to its optimized copy. On the CPU "auto" leaves the layers' own code in
place and "reference" runs the fused ops' own gradients; the kernels behind them have their own tests.

Inputs are such that no activation stands so close to ReLU's kink that rounding decides its side.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastnets
from tests.accuracy import assert_close_to
from tests.fused.networks import Classifier, Residual, images

WAYS = [("auto", "auto"), ("reference", "auto"), ("reference", "less")]


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(way))
def way(request) -> dict[str, str]:
    backend, save = request.param
    return {"backend": backend, "save": save}


def pair(way: dict[str, str], make=Classifier) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = make().train()
    return stock, fastnets.optimize(stock, **way)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float(), torch.arange(len(x)) % 10)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(stock: nn.Module, fast: nn.Module, exact: nn.Module | None = None) -> None:
    """Against a float64 run by the error ratio; without one, close in the norm and of the same dtypes.

    Some gradients are nothing but rounding (of a bias in front of a batch norm): those are compared with the
    largest.
    """
    largest = max(g.norm() for g in gradients(stock).values() if g is not None)
    for name, theirs in gradients(stock).items():
        ours = gradients(fast)[name]
        assert (ours is None) == (theirs is None), name
        if ours is None:
            continue
        assert ours.dtype == theirs.dtype, name
        if exact is not None:
            assert_close_to(gradients(exact)[name], theirs, ours, ratio=3)
        else:
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5 * largest, name


def assert_same_buffers(stock: nn.Module, fast: nn.Module) -> None:
    for (name, theirs), ours in zip(stock.named_buffers(), fast.buffers()):
        assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5), name


# --- AMP
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_stocks_dtypes(way, dtype):
    class Seen(nn.Module):
        """Returns what stands between the layers; the residual comes in float32 first, in 16 bits then."""

        def __init__(self):
            super().__init__()
            self.first, self.second = Residual(), Residual(shortcut=True)

        def forward(self, x):
            y = self.first(x)
            return y, self.second(y), self.second(y.to(x.dtype)).sum()

    stock, fast = pair(way, Seen)
    results = []
    for model in (stock, fast):
        x = images(4, 8, 8, 8).requires_grad_()
        with torch.autocast("cpu", dtype):
            seen = model(x)
        sum(y.float().square().mean() for y in seen[:2]).backward()
        results.append([*seen, x.grad])
    assert [y.dtype for y in results[1]] == [y.dtype for y in results[0]]
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in fast.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gradients(way, dtype):
    stock, fast = pair(way)
    exact = copy.deepcopy(stock).double()
    for model in (stock, fast):
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, images(8, 3, 12, 12))
        loss.backward()
    F.cross_entropy(exact(images(8, 3, 12, 12).double()), torch.arange(8) % 10).backward()
    assert_same_gradients(stock, fast, exact)
    for name, buffer in fast.named_buffers():
        assert buffer.dtype == stock.get_buffer(name).dtype
        assert torch.allclose(buffer, stock.get_buffer(name), rtol=2e-2, atol=2e-2), name


def test_autocast_within_which_the_backward_runs(way):
    stock, fast = pair(way)
    for model in (stock, fast):
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(model, images(8, 3, 12, 12)).backward()
    exact = copy.deepcopy(stock).double()
    exact.zero_grad()
    F.cross_entropy(exact(images(8, 3, 12, 12).double()), torch.arange(8) % 10).backward()
    assert_same_gradients(stock, fast, exact)


def test_loss_scaling_skips_overflowing_steps_as_stock_does(way):
    trails = []
    for model in pair(way):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2, backoff_factor=2.0**-14)
        trail = []
        for step in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, images(8, 3, 12, 12, seed=step))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = [p.clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
            trail.append((scaler.get_scale(), moved, bool(torch.isfinite(norm))))
            losses = loss.item()
        trails.append((trail, losses))
    (stock, stock_loss), (fast, fast_loss) = trails
    assert fast == stock
    moved = [moved for _, moved, _ in fast]
    assert not moved[0]  # 2^40 overflows float16
    assert moved[-1]
    assert fast_loss == pytest.approx(stock_loss, rel=2e-2)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_arrives_where_stocks_does(way, value):
    stock, fast = pair(way, lambda: Residual(shortcut=True))
    for model in (stock, fast):
        x = images(2, 8, 6, 6).requires_grad_()
        y = model(x)
        grad = torch.ones_like(y)
        grad[1, 2, 3, 3] = value
        y.backward(grad)
        model.of_input = x.grad
    for name, theirs in [*gradients(stock).items(), ("input", stock.of_input)]:
        ours = fast.of_input if name == "input" else gradients(fast)[name]
        assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs)), name


# --- how steps are put together
# ----------------------------------------------------------------------------------------------


def test_clipping(way):
    norms = []
    for model in (models := pair(way)):
        loss_of(model, images(8, 3, 12, 12, seed=1)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
    assert norms[1] == pytest.approx(norms[0].item(), rel=1e-3)
    assert_same_gradients(*models)


def test_accumulation(way):
    stock, fast = pair(way)
    for model in (stock, fast):
        for part in range(3):
            (loss_of(model, images(4, 3, 12, 12, seed=part)) / 3).backward()
    assert_same_gradients(stock, fast)
    assert_same_buffers(stock, fast)


def test_two_forwards_before_one_backward(way):
    """As siamese networks do; the running statistics change in between."""
    stock, fast = pair(way)
    for model in (stock, fast):
        first, second = (model(images(4, 3, 12, 12, seed=seed)) for seed in (0, 1))
        (first * second).sum().backward()
    assert_same_gradients(stock, fast)
    assert_same_buffers(stock, fast)


def test_a_graph_kept_for_a_second_backward(way):
    stock, fast = pair(way)
    for model in (stock, fast):
        loss = loss_of(model, images(4, 3, 12, 12))
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(stock, fast)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(way, reentrant):
    stock, fast = pair(way)
    for model in (stock, fast):
        x = model.stem(images(4, 3, 12, 12))
        for block in model.layer1:
            x = checkpoint(block, x, use_reentrant=reentrant)
        F.cross_entropy(model.fc(model.pool(x).flatten(1)), torch.arange(4)).backward()
    assert_same_gradients(stock, fast)
    assert_same_buffers(stock, fast)  # checkpointed blocks update theirs twice, as stock's do


def test_parts_that_learn_nothing(way):
    """Fine-tuning: only what asks for a gradient gets one."""
    stock, fast = pair(way)
    for model in (stock, fast):
        model.stem.requires_grad_(False)
        model.layer1[0].bn1.requires_grad_(False)
        model.layer1[1].conv2.requires_grad_(False)
        model.layer1[1].bn2.eval()
        loss_of(model, images(4, 3, 12, 12)).backward()
    assert_same_gradients(stock, fast)
    assert_same_buffers(stock, fast)
    assert gradients(fast)["stem.0.weight"] is None


def test_training_mode_without_gradients_updates_statistics(way):
    stock, fast = pair(way)
    for model in (stock, fast):
        with torch.no_grad():
            model(images(4, 3, 12, 12))
    assert_same_buffers(stock, fast)
    assert int(fast.stem[1].num_batches_tracked) == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_after_20_steps(way, momentum):
    def make():
        model = Classifier()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        return model

    stock, fast = pair(way, make)
    with torch.no_grad():
        for step in range(20):
            for model in (stock, fast):
                model(3 * images(4, 3, 12, 12, seed=step) + step)
    assert_same_buffers(stock, fast)
    stock.eval(), fast.eval()
    torch.testing.assert_close(fast(images(2, 3, 12, 12)), stock(images(2, 3, 12, 12)), rtol=1e-3, atol=1e-3)


# --- transforms
# ----------------------------------------------------------------------------------------------


def test_functional_call(way):
    stock, fast = pair(way)
    other = {name: p.detach() * 0.9 + 0.01 for name, p in stock.named_parameters()}
    found = []
    for model in (stock, fast):
        given = {name: value.clone().requires_grad_() for name, value in other.items()}
        y = torch.func.functional_call(model, given, (images(4, 3, 12, 12),))
        found.append(torch.autograd.grad(F.cross_entropy(y, torch.arange(4)), list(given.values())))
    for theirs, ours in zip(*found):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6
    assert all(p.grad is None for p in fast.parameters())


def test_func_grad(way):
    stock, fast = pair(way)
    for model in (stock, fast):
        model.eval()  # functorch refuses the running statistics' update, of stock's batch norm as well

    def gradient_of(model):
        def loss(parameters):
            y = torch.func.functional_call(model, parameters, (images(4, 3, 12, 12),))
            return F.cross_entropy(y, torch.arange(4))

        return torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})

    theirs, ours = gradient_of(stock), gradient_of(fast)
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-6, name


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps(way, compiler):
    stock, fast = pair(way)
    torch.compiler.reset()
    compiled = torch.compile(fast, backend=compiler, fullgraph=True)
    for step in range(2):
        loss_of(stock, images(4, 3, 12, 12, seed=step)).backward()
        loss_of(compiled, images(4, 3, 12, 12, seed=step)).backward()
    assert_same_gradients(stock, fast)
    assert_same_buffers(stock, fast)


def test_gradients_of_gradients_work_or_say_no(way):
    """A penalty on the gradient, as for Lipschitz bounds."""
    stock, fast = pair(way, Residual)

    def step(model):
        x = images(2, 8, 6, 6).requires_grad_()
        loss = model(x).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.square().sum()).backward()

    step(stock)
    if way["backend"] == "auto":  # stock's own layers
        step(fast)
        assert_same_gradients(stock, fast)
        return
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        step(fast)


# --- bad input
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["conv1.weight", "bn1.weight", "conv2.weight", "bn2.weight"])
def test_a_parameter_written_between_forward_and_backward_raises(way, path):
    for model in pair(way, Residual):
        loss = model(images(2, 8, 6, 6).requires_grad_()).square().sum()
        with torch.no_grad():
            model.get_parameter(path).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("path", ["bn1.bias", "bn2.bias"])
def test_a_bias_written_in_between_raises_or_changes_nothing(way, path):
    """Stock needs it for no gradient; a fused op that does must not use the new one."""
    stock, fast = pair(way, Residual)
    raised = None
    for model in (stock, fast):
        loss = model(images(2, 8, 6, 6)).square().sum()
        with torch.no_grad():
            model.get_parameter(path).add_(5)
        try:
            loss.backward()
        except RuntimeError as error:
            raised = model, str(error)
    if raised is None:
        assert_same_gradients(stock, fast)
    else:
        assert raised[0] is fast
        assert "modified by an inplace operation" in raised[1]


def test_an_output_written_in_place_raises_or_is_stocks(way):
    """``y += 1`` behind a ReLU: stock's ReLU needs its result, and says that it was written to."""
    messages = []
    for model in pair(way, Residual):
        y = model(images(2, 8, 6, 6))
        y += 1
        try:
            y.sum().backward()
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
    stock, fast = messages
    assert "modified by an inplace operation" in stock
    assert fast == "" or "modified by an inplace operation" in fast


def test_one_value_per_channel_raises(way):
    messages = []
    for model in pair(way):
        with pytest.raises(ValueError) as caught:
            model(images(1, 3, 3, 3))
        messages.append(str(caught.value))
        model.eval()(images(1, 3, 3, 3))
    assert "Expected more than 1 value per channel when training" in messages[0]
    assert messages[1] == messages[0]


def test_one_value_per_channel_leaves_statistics_alone(way):
    _, fast = pair(way)
    before = {name: buffer.clone() for name, buffer in fast.named_buffers() if "stem" in name}
    with pytest.raises(ValueError):
        fast(images(1, 3, 3, 3))
    after = dict(fast.named_buffers())
    for name, value in before.items():
        if not name.endswith("num_batches_tracked"):  # which stock counts before it looks
            assert torch.equal(value, after[name])


def test_a_residual_that_does_not_fit_raises_as_stock_does(way):
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)) + x)

    messages = []
    for model in pair(way, Add):
        with pytest.raises(RuntimeError) as caught:
            model(images(2, 8, 6, 6))
        messages.append(str(caught.value))
    assert messages[1] == messages[0]


def test_an_empty_batch(way):
    class Convolutions(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8).eval())

    stock, fast = pair(way, Convolutions)
    for model in (stock, fast):
        model[3].eval()
        model(images(0, 3, 8, 8)).sum().backward()
    assert_same_gradients(stock, fast)
