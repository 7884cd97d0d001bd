"""A rewritten network in use: arguments, hooks, weights that change, copies, compilers."""

import copy
import inspect
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.fused import dispatch
from fastnets.fused.swap import Rewritten
from tests.fused.networks import (
    Classifier,
    Residual,
    assert_same_answers,
    graphs,
    images,
    kinds,
    rewritten,
    settled,
)


@pytest.fixture
def stock():
    return settled(Classifier())


@pytest.fixture
def fast(stock):
    return fastnets.optimize(stock)


X = (2, 3, 12, 12)

# --- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"backend": "tritn"}, ValueError, "did you mean 'triton'"),
        ({"mode": "infrence"}, ValueError, "did you mean 'inference'"),
        ({"select": "guess"}, ValueError, "heuristic"),
        ({"select": "measure"}, ValueError, "needs example_inputs"),
        ({"dtype": torch.int8}, TypeError, "floating-point"),
        ({"dtype": "bf16"}, TypeError, "torch.bfloat16"),
        ({"filter_fn": 3}, TypeError, "filter_fn"),
    ],
)
def test_arguments_that_make_no_sense(stock, arguments, error, message):
    before = [type(m) for m in stock.modules()]
    for inplace in (False, True):
        with pytest.raises(error, match=message):
            fastnets.optimize(stock, inplace=inplace, **arguments)
    assert [type(m) for m in stock.modules()] == before


@pytest.mark.parametrize("model", [None, "resnet50", torch.zeros(3), nn.Linear])
def test_something_that_is_no_module(model):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastnets.optimize(model)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastnets.restore(model)


def test_copies_by_default(stock):
    before = [(type(m), dict(m.__dict__)) for m in stock.modules()]
    fast = fastnets.optimize(stock)
    assert fast is not stock
    assert [(type(m), dict(m.__dict__)) for m in stock.modules()] == before
    assert not any(p is q for p, q in zip(stock.parameters(), fast.parameters()))


def test_in_place(stock):
    parameters = list(stock.parameters())
    twin = copy.deepcopy(stock)
    assert fastnets.optimize(stock, inplace=True) is stock
    assert all(p is q for p, q in zip(parameters, stock.parameters()))
    assert_same_answers(twin, stock, images(*X))


def test_idempotent(stock, fast):
    again = fastnets.optimize(fast)
    assert graphs(again) == graphs(fast)
    assert kinds(again) == kinds(fast)
    assert_same_answers(stock, again, images(*X))
    assert fastnets.optimize(fast, backend="reference") is not fast
    assert "'reference'" in graphs(fastnets.optimize(fast, backend="reference"))


def test_filter_fn(stock):
    asked = []

    def outside_layer1(module, name):
        asked.append((type(module), name))
        return not name.startswith("layer1.0")

    fast = fastnets.optimize(stock, filter_fn=outside_layer1)
    assert {t for t, _ in asked} == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    assert (nn.Conv2d, "layer1.0.conv1") in asked
    rows = {row.path: row for row in fastnets.explain(fast).rows}
    assert not rows["layer1.0.conv1"].fused
    assert "filter_fn" in rows["layer1.0.conv1"].reason
    assert rows["layer1.1.conv1"].fused
    assert_same_answers(stock, fast, images(*X))
    assert kinds(pickle.loads(pickle.dumps(fast))) == kinds(fast)


def test_disabled_by_the_environment(stock, monkeypatch):
    """FASTNETS_DISABLE=1: the stock network, whatever is asked for; everything else goes on working."""
    program = "from fastnets.fused import dispatch; print(dispatch.DISABLED)"
    for value, expected in (("1", "True"), ("0", "False"), ("", "False")):
        environment = {**os.environ, "FASTNETS_DISABLE": value}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert result.stdout.strip() == expected, result.stderr
    fast = fastnets.optimize(stock)
    monkeypatch.setattr(dispatch, "DISABLED", True)
    x = images(2, 3, 32, 32)
    copied = fastnets.optimize(stock, x, strict=True, cuda_graphs=True, select="measure", backend="triton")
    assert copied is not stock
    assert not rewritten(copied)
    assert torch.equal(copied(x), stock(x))
    assert [p.stride() for p in copied.parameters()] == [p.stride() for p in stock.parameters()]
    assert "FASTNETS_DISABLE" in str(fastnets.explain(copied))
    assert next(fastnets.optimize(stock, dtype=torch.bfloat16).parameters()).dtype is torch.bfloat16
    assert not rewritten(fastnets.optimize(fast))  # one that was optimized before is given back its classes
    assert fastnets.optimize(stock, inplace=True) is stock
    assert fastnets.check(stock, copied, x).ok
    assert fastnets.restore(copied) is copied
    assert not rewritten(fastnets.create_model("lenet5"))
    y = fastnets.attention(*torch.randn(3, 1, 2, 4, 8))
    assert y.shape == (1, 2, 4, 8)
    with pytest.raises(ValueError, match="backend="):
        fastnets.optimize(stock, backend="tritton")


def test_strict(stock):
    fastnets.optimize(stock, strict=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    net = Net()
    with pytest.raises(ValueError, match=r"conv: .*control flow"):
        fastnets.optimize(net, strict=True, inplace=True)
    assert type(net) is Net


def test_dtype(stock):
    fast = fastnets.optimize(stock, dtype=torch.bfloat16)
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    assert stock.fc.weight.dtype == torch.float32
    assert fast.stem[1].num_batches_tracked.dtype == torch.int64
    assert_same_answers(copy.deepcopy(stock).bfloat16(), fast, images(*X).bfloat16())


@pytest.mark.parametrize("mode", ["auto", "inference", "training"])
def test_modes(stock, mode):
    fast = fastnets.optimize(stock, mode=mode)
    assert_same_answers(stock, fast, images(*X))
    stock.train()
    fast.train()
    torch.testing.assert_close(fast(images(*X)), stock(images(*X)), rtol=1e-4, atol=1e-4)


def test_a_network_without_layers_to_fuse():
    stock = nn.Sequential(nn.Flatten(), nn.Softmax(1))
    fast = fastnets.optimize(stock)
    assert not any(isinstance(m, Rewritten) for m in fast.modules())
    assert_same_answers(stock, fast, images(2, 3, 2, 2))
    conv = nn.Conv2d(3, 4, 3)
    assert type(fastnets.optimize(conv)) is nn.Conv2d


def test_batch_and_image_size_are_free(stock, fast):
    for shape in ((1, 3, 8, 8), (5, 3, 17, 9), (2, 3, 32, 12)):
        assert_same_answers(stock, fast, images(*shape))


# --- the tree stays -----------------------------------------------------------------------------------------


def test_types_names_and_signatures(stock, fast):
    assert isinstance(fast, Classifier)
    assert isinstance(fast.layer1[0], Residual)
    assert list(fast.state_dict()) == list(stock.state_dict())
    for (name, s), f in zip(stock.named_modules(), fast.modules()):
        assert isinstance(f, type(s)), name
        assert type(f).__name__ == type(s).__name__
        assert type(f).__qualname__ == type(s).__qualname__
        assert type(f).__module__ == type(s).__module__
        assert list(f.__dict__) == list(s.__dict__)
        assert inspect.signature(f.forward) == inspect.signature(s.forward)
    assert repr(fast) == repr(stock)
    assert fast.extra_repr() == stock.extra_repr()


def test_blocks_alike_share_their_class():
    fast = fastnets.optimize(nn.Sequential(Residual(), Residual(), Residual(shortcut=True)).eval())
    assert type(fast[0]) is type(fast[1])
    assert type(fast[0]) is not type(fast[2])


def test_registry_of_subclasses_sees_no_generated_class():
    registry = []

    class Base(nn.Module):
        def __init_subclass__(cls, **options):
            registry.append(cls)

    class Net(Base):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return F.relu(self.conv(x))

    fast = fastnets.optimize(Net())
    assert isinstance(fast, Rewritten)
    assert registry == [Net]


# --- copies and pickles -------------------------------------------------------------------------------------


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle protocol 0": lambda m: pickle.loads(pickle.dumps(m, 0)),
    "torch.save": _saved,
    "deepcopy of a pickle": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(m))),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_stay_fused(stock, fast, how):
    with torch.no_grad():
        fast(images(*X))  # packed weights must not get in the way
    twin = COPIES[how](fast)
    assert kinds(twin) == kinds(fast)
    assert [isinstance(m, Rewritten) for m in twin.modules()] == [
        isinstance(m, Rewritten) for m in fast.modules()
    ]
    assert [list(m.__dict__) for m in twin.modules()] == [list(m.__dict__) for m in fast.modules()]
    assert_same_answers(stock, twin, images(*X))


def test_a_deepcopy_is_independent(stock, fast):
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        twin.stem[0].weight.mul_(2)
    assert_same_answers(stock, fast, images(*X))
    with torch.no_grad():
        assert not torch.allclose(twin(images(*X)), fast(images(*X)))


# --- weights that change ------------------------------------------------------------------------------------


def _both(stock, fast, change):
    """Run once, so that weights are packed, apply ``change`` to both, and compare."""
    with torch.no_grad():
        fast(images(*X))
    for model in (stock, fast):
        change(model)
    assert_same_answers(stock, fast, images(*X))


def test_load_state_dict(stock, fast):
    other = settled(Classifier(), seed=7).state_dict()
    _both(stock, fast, lambda m: m.load_state_dict(other))


def test_load_state_dict_assign(stock, fast):
    other = settled(Classifier(), seed=7).state_dict()
    _both(stock, fast, lambda m: m.load_state_dict({k: v.clone() for k, v in other.items()}, assign=True))


def test_load_into_one_block(stock, fast):
    other = settled(Residual(), seed=7).state_dict()
    _both(stock, fast, lambda m: m.layer1[0].load_state_dict(other))


def test_in_place_writes(stock, fast):
    def change(model):
        with torch.no_grad():
            model.layer1[0].conv1.weight.mul_(1.5)
            model.stem[1].running_mean.add_(0.3)
            model.stem[1].bias.sub_(0.1)

    _both(stock, fast, change)


def test_data_write_and_refresh(stock, fast):
    def change(model):
        model.layer1[0].conv1.weight.data.mul_(1.5)
        model.stem[1].running_var.data.mul_(2)
        fastnets.refresh(model)

    _both(stock, fast, change)


def test_a_new_parameter(stock, fast):
    weight = images(8, 3, 3, 3)

    def change(model):
        model.stem[0].weight = nn.Parameter(weight.clone())

    _both(stock, fast, change)


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_step_takes_effect_at_once(stock, fast, fused):
    """Evaluation, a step in training mode, evaluation: the second one must see the new weights."""

    def change(model):
        # Not Adam, whose first step has the gradient's sign alone: rounding decides it where that is near 0.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
        model.train()
        model(images(*X, seed=1)).square().sum().backward()
        optimizer.step()
        model.eval()

    with torch.no_grad():
        before = fast(images(*X))
        fast(images(*X))
    for model in (stock, fast):
        change(model)
    with torch.no_grad():
        after, expected = fast(images(*X)), stock(images(*X))
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, expected, rtol=2e-3, atol=2e-3)


def test_optimizer_step_without_changing_mode(stock, fast):
    """Fine-tuning with frozen statistics: the network stays in evaluation mode throughout."""

    def change(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        for _ in range(2):
            optimizer.zero_grad()
            model(images(*X, seed=1)).square().sum().backward()
            optimizer.step()

    with torch.no_grad():
        fast(images(*X))
    for model in (stock, fast):
        change(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(images(*X)), stock(images(*X)), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversions(stock, fast, dtype):
    with torch.no_grad():
        fast(images(*X))
    if dtype == torch.float64:  # where stock itself is the reference
        with torch.no_grad():
            torch.testing.assert_close(
                fast.double()(images(*X).double()), stock.double()(images(*X).double())
            )
        return
    assert_same_answers(stock.to(dtype), fast.to(dtype), images(*X).to(dtype))


def test_half_and_back(stock, fast):
    assert_same_answers(stock.half().float(), fast.half().float(), images(*X))


def test_channels_last_model():
    stock = settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Residual(shortcut=True)))
    fast = fastnets.optimize(stock)
    last = torch.channels_last
    for model in (stock, fast):
        model.to(memory_format=last)
    assert_same_answers(stock, fast, images(*X).to(memory_format=last))


def test_train_and_eval(stock, fast):
    with torch.no_grad():
        fast(images(*X))
    for model in (stock, fast):
        model.train()
        for seed in range(3):
            model(images(*X, seed=seed))
        model.eval()
    for s, f in zip(stock.buffers(), fast.buffers()):
        torch.testing.assert_close(f, s)
    assert_same_answers(stock, fast, images(*X))


def test_frozen_batch_norm_in_a_training_network(stock, fast):
    for model in (stock, fast):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    x = images(*X)
    torch.testing.assert_close(fast(x), stock(x), rtol=1e-4, atol=1e-4)
    for model in (stock, fast):
        model(x).square().sum().backward()
    torch.testing.assert_close(fast.stem[0].weight.grad, stock.stem[0].weight.grad, rtol=1e-3, atol=1e-3)


# --- other machinery ----------------------------------------------------------------------------------------


def test_functional_call(stock, fast):
    other = settled(Classifier(), seed=7)
    x = images(*X)
    state = dict(other.state_dict())
    with torch.no_grad():
        fast(x)
        torch.testing.assert_close(
            torch.func.functional_call(fast, state, (x,)), other(x), rtol=1e-4, atol=1e-4
        )
    assert_same_answers(stock, fast, x)


def test_func_grad_and_vmap(stock, fast):
    x = images(*X)

    def loss(parameters, model, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    expected = torch.func.grad(loss)(dict(stock.named_parameters()), stock, x)
    got = torch.func.grad(loss)(dict(fast.named_parameters()), fast, x)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.vmap(fast)(x.unsqueeze(1)).squeeze(1), stock(x), rtol=1e-4, atol=1e-4
        )


def test_autocast(stock, fast):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        s, f = stock(images(*X)), fast(images(*X))
    assert f.dtype == s.dtype
    torch.testing.assert_close(f, s, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("training", [False, True])
def test_compile_without_graph_breaks(stock, fast, training):
    torch._dynamo.reset()
    stock.train(training)
    fast.train(training)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    y = compiled(images(*X))
    torch.testing.assert_close(y, stock(images(*X)), rtol=1e-3, atol=1e-3)
    y.sum().backward()
    assert fast.stem[0].weight.grad is not None
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(compiled(images(*X)), stock(images(*X)), rtol=1e-4, atol=1e-4)


def test_compile_sees_a_hook_that_comes_later(stock, fast):
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager")
    with torch.no_grad():
        compiled(images(*X))
        for model in (stock, fast):
            model.layer1[1].shortcut.register_forward_hook(lambda m, i, o: o * 3)
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(images(*X)), stock(images(*X)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export(stock, fast, strict):
    exported = torch.export.export(fast, (images(*X),), strict=strict)
    assert sorted(exported.state_dict) == sorted(stock.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(images(*X)), stock(images(*X)), rtol=1e-4, atol=1e-4)


def test_jit_trace(stock, fast):
    with torch.no_grad():
        traced = torch.jit.trace(fast, images(*X))
        torch.testing.assert_close(traced(images(*X)), stock(images(*X)), rtol=1e-4, atol=1e-4)


def test_optimize_under_inference_mode(stock):
    with torch.inference_mode():
        fast = fastnets.optimize(stock)
        y = fast(images(*X))
    assert not any(p.is_inference() for p in fast.parameters())
    with torch.no_grad():
        torch.testing.assert_close(y.clone(), stock(images(*X)), rtol=1e-4, atol=1e-4)


def test_data_parallel_style_replicas(stock, fast):
    replica = fast._replicate_for_data_parallel()
    assert type(replica) is type(fast)
    assert replica._is_replica
