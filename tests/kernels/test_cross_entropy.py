"""Cross-entropy, distillation and their gradients against stock PyTorch, in every lane."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels import cross_entropy_tile
from fastnets.kernels.cross_entropy import configs, cross_entropy
from fastnets.kernels.cross_entropy_gradient import scale_gradient
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to, assert_exact
from tests.lanes import STRICT_LANES

slow = pytest.mark.slow
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def stock_loss(x, target, weight=None, *, teacher=None, alpha=0.0, temperature=1.0, **options):
    """The definition, by stock functions."""
    weight = None if weight is None else weight.to(x.dtype)
    loss = F.cross_entropy(x, target, weight, **options)
    if teacher is None:
        return loss
    log_p = F.log_softmax(x / temperature, 1)
    log_q = F.log_softmax(teacher.to(x.dtype) / temperature, 1)
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    kl = {"none": lambda t: t, "sum": torch.sum, "mean": torch.mean}[options.get("reduction", "mean")](kl)
    return alpha * temperature**2 * kl + (1 - alpha) * loss


def stock_both(x, target, weight, dloss, **options):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = stock_loss(x, target, weight, **options)
    loss.backward(dloss.to(loss.dtype))
    return loss.detach(), x.grad


def ours_both(lane, x, target, weight, dloss, config=None, **options):
    x, target, weight, dloss = map(lane.put, (x, target, weight, dloss))
    if options.get("teacher") is not None:
        options = {**options, "teacher": lane.put(options["teacher"])}
    with lane:
        result = cross_entropy(x, target, weight, keep_gradient=True, config=config, **options)
        dx = scale_gradient(result.gradient, dloss.to(result.loss.dtype), result.divisor, config=config)
    assert bool(result.valid)
    return result.loss, dx


def check(lane, x, target, weight=None, dloss=None, config=None, **options):
    if dloss is None:
        dloss = torch.tensor(1.7)
        if options.get("reduction") == "none":
            dloss = torch.randn(target.shape)
    reference = stock_both(x.double(), target, weight, dloss, **options)
    stock = stock_both(x, target, weight, dloss, **options)
    loss, dx = ours_both(lane, x, target, weight, dloss, config, **options)
    assert_loss(reference[0], stock[0], loss)
    assert_close_to(reference[1], stock[1], dx, ratio=3.0)


def assert_loss(reference64, stock, ours):
    """The error ratio; a single number by its rounding too, which stock may have missed by luck."""
    if reference64.dim():
        assert_close_to(reference64, stock, ours)
        return
    assert ours.dtype == stock.dtype
    allowed = 2 * abs(stock.double() - reference64) + 2 * torch.finfo(stock.dtype).eps * abs(reference64)
    assert abs(ours.cpu().double() - reference64) <= allowed, (ours, reference64, stock)


def rows(shape, dtype=torch.float32, scale=3.0):
    x = (torch.randn(shape) * scale).to(dtype)
    return x, torch.randint(shape[1], (shape[0], *shape[2:]))


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(d, marks=slow) for d in DTYPES[1:])])
@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=slow), "none"])
def test_reductions(lane, reduction, dtype):
    x, target = rows((9, 13), dtype)
    target[2] = -100
    weight = torch.rand(13)
    weight[3] = 0.0
    check(lane, x, target, weight, reduction=reduction, label_smoothing=0.1)
    check(lane, x, target, reduction=reduction)


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize(
    "shape", [(5, 1), (3, 1000), pytest.param((2, 9000), marks=slow), (2, 5, 7), (2, 40, 3, 5)], ids=str
)
def test_shapes(lane, shape):
    x, target = rows(shape, torch.bfloat16)
    check(lane, x, target, label_smoothing=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(d, marks=slow) for d in DTYPES[:2])])
@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=slow), "none"])
def test_distillation(lane, reduction, dtype):
    x, target = rows((6, 40), dtype)
    teacher = (torch.randn(6, 40) * 4).to(dtype)
    target[1] = 7
    options = {"teacher": teacher, "alpha": 0.7, "temperature": 4.0, "reduction": reduction}
    check(lane, x, target, torch.rand(40), ignore_index=7, label_smoothing=0.1, **options)


def test_rows_longer_than_a_tile(lane):
    x, target = rows((16, 150))
    target[1] = -100
    for options in (
        {},
        {"label_smoothing": 0.3},
        {"teacher": torch.randn(16, 150), "alpha": 0.4, "temperature": 2.0},
    ):
        check(lane, x, target, torch.rand(150), config=cross_entropy_tile._config(16, 32), **options)
    with lane:
        loss = cross_entropy(lane.put(x), lane.put(target), config=cross_entropy_tile._config(16, 32)).loss
    assert_loss(F.cross_entropy(x.double(), target), F.cross_entropy(x, target), loss)


LAYOUTS = {
    "transposed": lambda: torch.randn(12, 6).t(),
    "sliced": lambda: torch.randn(6, 30)[:, 2:26:2],
    "expanded rows": lambda: torch.randn(1, 12).expand(6, 12),
    "expanded classes": lambda: torch.randn(6, 1).expand(6, 12),
    "channels-last": lambda: torch.randn(6, 3, 2, 12).permute(0, 3, 1, 2),
    "pixels with gaps": lambda: torch.randn(6, 12, 6, 4)[:, :, ::2, ::2],
}


@pytest.mark.lanes("sm_90", "gpu")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(lane, layout):
    x = LAYOUTS[layout]()
    target = torch.randint(12, (6, *x.shape[2:]))
    # One gradient for all rows, as behind a sum.
    check(lane, x, target, dloss=torch.tensor(0.3).expand(target.shape), reduction="none")


@pytest.mark.parametrize("offset", [1e4, pytest.param(-1e4, marks=slow)])
def test_a_large_offset_costs_no_accuracy(lane, offset):
    x, target = rows((4, 50), scale=1.0)
    check(lane, x + offset, target, label_smoothing=0.5, config=cross_entropy_tile._config(4, 32))
    check(lane, x + offset, target, teacher=x - offset, alpha=0.5, temperature=0.5)


def special_rows():
    nan, inf = math.nan, math.inf
    x = torch.randn(9, 40)
    x[0, 3] = nan
    x[1, 35] = nan
    x[2, 3] = inf
    x[3, :34] = -inf
    x[4] = -inf
    x[5, 39] = -inf
    x[6] = nan
    x[7, 2] = nan  # and ignored
    return x, torch.tensor([3, 3, 3, 36, 0, 39, 0, -100, 1])


@pytest.mark.parametrize("classes", [64, 16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_nan_and_infinity_as_stock(lane, classes, label_smoothing):
    x, target = special_rows()
    dloss = torch.ones(9)
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    ours = ours_both(lane, x, target, None, dloss, cross_entropy_tile._config(4, classes), **options)
    for mine, theirs in zip(ours, stock_both(x, target, None, dloss, **options)):
        torch.testing.assert_close(mine.cpu(), theirs, equal_nan=True)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_no_weight_at_all_as_stock(lane, label_smoothing):
    x, target = rows((3, 5))
    zeros = torch.zeros(5)
    one = torch.tensor(1.0)
    for t, weight in ((torch.full((3,), -100), None), (target, zeros), (torch.tensor([1, -100, 2]), zeros)):
        ours = ours_both(lane, x, t, weight, one, label_smoothing=label_smoothing)
        for mine, theirs in zip(ours, stock_both(x, t, weight, one, label_smoothing=label_smoothing)):
            torch.testing.assert_close(mine.cpu(), theirs, equal_nan=True)


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize("wrong", [5, -1, 2**40])
def test_targets_out_of_range_are_told(lane, wrong):
    x, target = rows((2000, 5))
    target[1999] = wrong
    with lane:
        result = cross_entropy(lane.put(x), lane.put(target), lane.put(torch.rand(5)))
    assert not bool(result.valid)
    target[1999] = -100
    with lane:
        assert bool(cross_entropy(lane.put(x), lane.put(target)).valid)


@pytest.mark.lanes("sm_90", "gpu")
def test_the_mean_of_many_rows(lane):
    x, target = rows((3000, 4))
    check(lane, x, target, torch.rand(4))


@slow
def test_every_config(lane):
    x, target = rows((5, 70), torch.float16)
    for config in configs(DEVICES["h100"]):
        check(lane, x, target, teacher=x.flip(0), alpha=0.3, temperature=2.0, config=config)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    # Triton's layout conversion behind a sum has several warps write the same value to shared memory.
    lane = lane.but(shared_races=None)
    x, target = rows((5, 70), torch.float16)
    check(lane, x, target, torch.rand(70), label_smoothing=0.1)
    check(
        lane,
        x,
        target,
        teacher=x.flip(0),
        alpha=0.3,
        temperature=2.0,
        config=cross_entropy_tile._config(4, 32),
    )


def test_bits_are_the_same_in_every_run(lane):
    x, target = rows((70, 9))
    first, second = (ours_both(lane, x, target, None, torch.tensor(1.0)) for _ in range(2))
    assert_exact(first[0], second[0])
    assert_exact(first[1], second[1])


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_rows(lane, reduction):
    x, target = lane.put(torch.randn(0, 5)), lane.put(torch.zeros(0, dtype=torch.int64))
    with lane:
        result = cross_entropy(x, target, reduction=reduction, keep_gradient=True)
        dx = scale_gradient(result.gradient, result.loss, result.divisor)
    torch.testing.assert_close(result.loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
    assert dx.shape == x.shape


def test_logits_are_read_once_and_the_gradient_written_once():
    x = torch.empty(256, 1000, dtype=torch.bfloat16, device="meta")
    target = torch.empty(256, dtype=torch.int64, device="meta")
    seen = []
    with observe_launches(seen.append), assume_device("h100"):
        cross_entropy(x, target, keep_gradient=True)
    weights, main, total = seen
    assert [launch.name for launch in seen] == ["target_weight_kernel", "cross_entropy_kernel", "sum_kernel"]
    size = x.numel() * 2
    assert 0 <= main.bytes_read - size < 256 * 8 + 64
    assert 0 <= main.bytes_written - size < 256 * 4 + 64
    assert main.constexprs["ONE_BLOCK"]
    assert weights.bytes_read == 256 * 8
    assert total.bytes_written == 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": torch.ones(3)}, ValueError, "expected .N, V"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, ValueError, r"target is \(2,\), expected \(3,\)"),
        ({"target": torch.zeros(3)}, TypeError, "class indices"),
        ({"weight": torch.ones(4)}, ValueError, "not one for each of 5 classes"),
        ({"teacher": torch.ones(3, 4)}, ValueError, "teacher is"),
        ({"reduction": "avg"}, ValueError, "reduction='avg'"),
        ({"logits": torch.ones(3, 5, dtype=torch.float64)}, TypeError, "float64"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": torch.ones(3, 5), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        cross_entropy(**{**arguments, **change})
