"""Layer norm's and RMS norm's kernels against stock PyTorch, in every lane."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastnets.kernels.device import assume_device
from fastnets.kernels.launch import observe_launches
from fastnets.kernels.layer_norm import layer_norm
from fastnets.kernels.layer_norm_backward import layer_norm_backward
from fastnets.kernels.row_tiles import row_tiles
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.lanes import LANES, STRICT_LANES

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
EPS = 1e-5


def ours(lane, x, dy, weight, bias, residual=None, after=None, ds=None, dims=1, centred=True, dtype=None):
    """Everything that comes out: y, sum, dx, dweight, dbias."""
    x, dy, weight, bias, residual, after, ds = map(lane.put, (x, dy, weight, bias, residual, after, ds))
    wanted = (True, weight is not None, bias is not None)
    with lane:
        y, total, mean, rstd = layer_norm(
            x, dims, weight, bias, residual, after, eps=EPS, centred=centred, dtype=dtype, keep=True
        )
        source = x if total is None else total
        dx, sums = layer_norm_backward(dy, source, dims, mean, rstd, weight, ds, wanted=wanted)
    result = {"y": y, "dx": dx}
    if residual is not None:
        result["sum"] = total
    if weight is not None:
        result["dweight"] = sums[0]
    if bias is not None:
        result["dbias"] = sums[-1]
    for name in ("y", "dx"):
        assert result[name].is_contiguous()
    return result


def stock(dtype, x, dy, weight, bias, residual=None, after=None, ds=None, dims=1, centred=True):
    """The same by PyTorch's autograd; vectors stay in fp32 where x is of 16 bits."""
    wide = torch.promote_types(dtype, FULL)
    s = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    leaves = [s.detach().clone().requires_grad_()]
    leaves += [None if v is None else v.detach().to(wide).clone().requires_grad_() for v in (weight, bias)]
    row = x.shape[x.dim() - dims :]
    s, w, b = leaves
    if centred:
        y = F.layer_norm(s, row, w, b, EPS)
    elif w is None or w.dtype == s.dtype:
        y = F.rms_norm(s, row, w, EPS)
    else:  # what stock does, without its warning
        y = F.rms_norm(s.to(wide), row, w, EPS).to(dtype)
    (y * 1).backward(dy.to(dtype))
    dx = s.grad if ds is None else s.grad + ds.to(dtype)
    result = {"y": (y if after is None else y + after.to(dtype)).detach(), "dx": dx, "sum": s.detach()}
    return result | {"dweight": None if w is None else w.grad, "dbias": None if b is None else b.grad}


def check(lane, x, dy, *, affine=True, **options):
    row = x.shape[x.dim() - options.get("dims", 1) :]
    weight = torch.rand(row) + 0.5 if affine else None
    bias = torch.randn(row) if affine and options.get("centred", True) else None
    result = ours(lane, x, dy, weight, bias, **options)
    options.pop("dtype", None)
    reference = stock(torch.float64, x, dy, weight, bias, **options)
    same = stock(x.dtype, x, dy, weight, bias, **options)
    if "sum" in result:
        assert_exact(same["sum"], result["sum"])
        # What is normalised is the rounded sum.
        rest = {k: v for k, v in options.items() if k != "residual"}
        reference = stock(torch.float64, same["sum"], dy, weight, bias, **rest)
    for name, value in result.items():
        if name == "sum":
            continue
        # Sums over rows are of fp32, where stock's on the CPU are of float64.
        ratio = {"y": 2.0, "dx": 3.0}.get(name, 5.0)
        assert_close_to(reference[name], same[name].to(value.dtype), value, ratio)
    return result


def case(columns, rows=5, dtype=FULL, mean=0.0, deviation=1.0):
    x = (mean + deviation * torch.randn(rows, columns)).to(dtype)
    return x, torch.randn(rows, columns).to(dtype)


@pytest.mark.parametrize(
    "columns, rows, dtype",
    [
        (24, 70, HALF),
        (768, 5, BF16),
        *[pytest.param(c, 3, FULL, marks=pytest.mark.slow) for c in (1, 17, 999)],
    ],
)
@pytest.mark.parametrize("centred", [True, False])
def test_widths(lane, columns, rows, dtype, centred):
    check(lane, *case(columns, rows, dtype), centred=centred)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("columns", [1, 7, 64, 1025, 2048, 8200, 16411, 65536])
def test_every_width(lane, columns, centred):
    x, dy = case(columns, 3 if columns < 10_000 else 2)
    check(lane, x, dy, centred=centred, residual=torch.randn(x.shape), ds=torch.randn(x.shape))


@pytest.mark.lanes("sm_90", "gpu")
@pytest.mark.parametrize("centred", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_that_do_not_fit(lane, centred):
    x, dy = case(16400, 2)
    check(lane, x, dy, centred=centred, residual=torch.randn(x.shape), ds=torch.randn(x.shape))


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize(
    "columns, mean, deviation", [(384, 1e4, 1e-2), (384, -1e4, 1e-2), (20000, 1e4, 1e-2)]
)
def test_large_mean_and_small_variance(lane, columns, mean, deviation):
    check(lane, *case(columns, 4, mean=mean, deviation=deviation), affine=False)


def test_one_huge_value_among_small_ones(lane):
    """The first value of a row, or any other one, is no shift that could be relied on."""
    x, dy = case(192, 6)
    x[:, 0], x[1, 7] = 1e6, -3e5
    check(lane, x, dy)


@pytest.mark.parametrize("dtype", [BF16, pytest.param(HALF, marks=pytest.mark.slow)])
@pytest.mark.parametrize("centred", [True, False])
def test_residual_before(lane, dtype, centred):
    x, dy = case(96, 20, dtype)
    others = {"residual": torch.randn(x.shape).to(dtype), "ds": torch.randn(x.shape).to(dtype)}
    check(lane, x, dy, centred=centred, **others)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_residual_after(lane):
    x, dy = case(96, 20, HALF)
    check(lane, x, dy, after=torch.randn(x.shape).half(), affine=False)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_dtypes_may_differ(lane):
    """A residual stream in float32 and a branch in bfloat16, as autocast has them; y as asked for."""
    x, dy = case(96, 20, BF16)
    residual, ds = torch.randn(x.shape), torch.randn(x.shape)
    weight, bias = torch.rand(96).half(), torch.randn(96).bfloat16()
    result = ours(lane, x, dy.float(), weight, bias, residual, ds=ds, dtype=BF16)
    assert (result["y"].dtype, result["sum"].dtype, result["dx"].dtype) == (BF16, FULL, FULL)
    assert_exact(x + residual, result["sum"])
    options = {"ds": ds}
    reference = stock(torch.float64, x + residual, dy, weight, bias, **options)
    same = stock(FULL, x + residual, dy, weight, bias, **options)
    for name in ("y", "dx", "dweight", "dbias"):
        assert_close_to(reference[name], same[name].to(result[name].dtype), result[name], 5.0)


def strided(kind, columns, dtype):
    """[2, 3, 4, columns] whose rows lie in another order, further apart, or nowhere in a run."""
    t = torch.randn(2, 3, 4, columns).to(dtype)
    return {
        "contiguous": lambda: t,
        "transposed": lambda: torch.randn(4, 3, 2, columns).to(dtype).transpose(0, 2),
        "batch second": lambda: torch.randn(3, 2, 4, columns).to(dtype).transpose(0, 1),
        "sliced": lambda: torch.randn(2, 3, 4, 2 * columns).to(dtype)[..., columns:],
        "misaligned": lambda: torch.randn(2, 3, 4, columns + 1).to(dtype)[..., 1:],
        "padded": lambda: torch.randn(2, 3, 4, columns + 3).to(dtype)[..., :columns],
        "expanded": lambda: torch.randn(3, 1, columns).to(dtype).expand(2, 3, 4, columns),
        "every second column": lambda: torch.randn(2, 3, 4, 2 * columns).to(dtype)[..., ::2],
        "one number": lambda: torch.randn(1).to(dtype).expand(2, 3, 4, columns),
    }[kind]()


LAYOUTS = ["transposed", "batch second", "sliced", "misaligned", "padded", "expanded", "every second column"]


@pytest.mark.lanes("interpreter", "gpu")
@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_any_strides(lane, data):
    layout = st.sampled_from(["contiguous", *LAYOUTS])
    columns = data.draw(st.sampled_from([8, 13, 64]))
    dtype = data.draw(st.sampled_from([FULL, HALF, BF16]))
    x, residual = (strided(data.draw(layout), columns, dtype) for _ in range(2))
    dy, ds = (strided(data.draw(st.sampled_from([*LAYOUTS, "one number"])), columns, dtype) for _ in range(2))
    with_residual = data.draw(st.booleans())
    centred = data.draw(st.booleans())
    check(lane, x, dy, centred=centred, **({"residual": residual, "ds": ds} if with_residual else {}))


@pytest.mark.lanes("sm_80", "sm_90", "gpu")
@pytest.mark.parametrize("layout", ["transposed", "misaligned"])
def test_strides_compiled(lane, layout):
    x = strided(layout, 48, HALF)
    check(lane, x, strided("expanded", 48, HALF), residual=strided("batch second", 48, HALF))


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("shape, dims", [((4, 5, 6), 2), ((4, 5, 6), 3), ((7,), 1), ((2, 3, 1, 1), 2)])
def test_rows_of_several_dims(lane, shape, dims):
    check(lane, torch.randn(shape), torch.randn(shape), dims=dims)


@pytest.mark.parametrize("centred", [True, False])
def test_integers_are_exact(lane, centred):
    """Rows of ±a have mean 0 and deviation a: x̂ is ±1 whatever a, and eps is 0."""
    a = torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat(5)[:, None]
    x = (integers(20, 32, low=0, high=1) * 2 - 1).sort(1).values
    x = torch.cat([x, -x], 1) * a
    weight, bias = integers(64), integers(64) if centred else None
    dy = integers(20, 64)
    with lane:
        put = [lane.put(t) for t in (x, weight, bias, dy)]
        y, _, mean, rstd = layer_norm(put[0], 1, put[1], put[2], eps=0.0, centred=centred, keep=True)
        wanted = (True, True, centred)
        dx, sums = layer_norm_backward(put[3], put[0], 1, mean, rstd, put[1], wanted=wanted)
    normalized = x / a
    assert_exact(normalized * weight + (0 if bias is None else bias), y)
    assert_exact(1 / a[:, 0], rstd)
    assert_exact((dy * normalized).sum(0), sums[0])
    if centred:
        assert_exact(dy.sum(0), sums[1])
    g = dy * weight
    expected = g - normalized * (g * normalized).mean(1, keepdim=True)
    expected = expected - g.mean(1, keepdim=True) if centred else expected
    assert_exact(expected / a, dx)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("columns", [320, pytest.param(20000, marks=pytest.mark.slow)])
def test_repeats_are_the_same_bits(lane, columns):
    x, dy = case(columns, 40)
    weight, bias = torch.rand(columns), torch.randn(columns)
    first, second = (ours(lane, x, dy, weight, bias) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.lanes("interpreter", "gpu")
def test_nan_and_infinity_stay_in_their_rows(lane):
    x, dy = case(50, 6)
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    result = ours(lane, x, dy, None, None)
    for name in ("y", "dx"):
        value = result[name].cpu()
        assert value[1].isnan().all()
        assert value[2].isnan().all()
        assert value[[0, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (False, False, True)])
def test_only_what_is_wanted(lane, wanted):
    x, dy = case(40, 9)
    weight, bias = torch.rand(40), torch.randn(40)
    full = ours(lane, x, dy, weight, bias)
    with lane:
        put = [lane.put(t) for t in (x, dy, weight)]
        _, _, mean, rstd = layer_norm(put[0], 1, eps=EPS, keep=True)
        seen = []
        with observe_launches(seen.append):
            dx, sums = layer_norm_backward(put[1], put[0], 1, mean, rstd, put[2], wanted=wanted)
    assert (dx is None) != wanted[0]
    assert len(seen) == (2 if wanted[1] or wanted[2] else 1)
    if wanted[0]:
        assert_exact(full["dx"], dx)
    if wanted[1]:
        assert_exact(full["dweight"], sums[0])
    if wanted[2]:
        assert_exact(full["dbias"], sums[-1])


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("columns", [200, *(pytest.param(n, marks=pytest.mark.slow) for n in (3000, 16400))])
def test_strictly(lane, columns):
    # The forward alone, then both: where a sum over rows is brought into another layout, several threads
    # write the same bytes to shared memory, which Triton lets them.
    x, dy = case(columns, 3, HALF)
    with lane:
        layer_norm(lane.put(x), 1, residual=lane.put(x), eps=EPS, keep=True)
    lane = lane.but(shared_races=None)
    check(lane, x, dy, residual=torch.randn(x.shape).half(), ds=torch.randn(x.shape).half())


def traffic(function):
    seen = []
    with observe_launches(seen.append), assume_device("h100"):
        function()
    return seen


def test_each_tensor_is_moved_once():
    """Beside the vectors and the statistics: one read and one write; two and two with the sum; backward two
    reads and one write, and partial sums that are a tenth of that."""
    x, vector = torch.empty(32, 197, 768, dtype=HALF, device="meta"), torch.empty(768, device="meta")
    size, vectors = 2 * x.numel(), 2 * 4 * 768
    (plain,) = traffic(lambda: layer_norm(x, 1, vector, vector, eps=EPS))
    (added,) = traffic(lambda: layer_norm(x, 1, vector, vector, x, eps=EPS))
    assert (plain.bytes_read, plain.bytes_written) == (size + vectors, size)
    assert (added.bytes_read, added.bytes_written) == (2 * size + vectors, 2 * size)
    statistics = torch.empty(32 * 197, device="meta")
    gradients = traffic(lambda: layer_norm_backward(x, x, 1, statistics, statistics, vector))
    assert gradients[0].bytes_read == 2 * size + 2 * 4 * statistics.numel() + vectors // 2
    partial = gradients[0].bytes_written - size
    assert sum(g.bytes for g in gradients) - 3 * size < 0.3 * size + 2 * partial
    assert partial < 0.35 * size


def test_channels_last_images_are_rows_without_a_copy():
    x = torch.empty(2, 96, 7, 7, device="meta").to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    (seen,) = traffic(lambda: layer_norm(x, 1, eps=EPS))
    assert seen.reads[0] is x
    # Rows of transposed sequences, too.
    x = torch.empty(197, 8, 96, device="meta").transpose(0, 1)
    (seen,) = traffic(lambda: layer_norm(x, 1, eps=EPS))
    assert seen.reads[0] is x


def test_rows_share_programs_where_they_are_narrow():
    (narrow,) = traffic(lambda: layer_norm(torch.empty(100_000, 64, device="meta"), 1, eps=EPS))
    assert narrow.grid == (100_000 // 32,)
    (few,) = traffic(lambda: layer_norm(torch.empty(197, 192, device="meta"), 1, eps=EPS))
    assert few.grid == (197,)


def test_offsets_past_two_to_the_31():
    assert not row_tiles((2**20, 1024), 1, ((1024, 1),), 2).constexprs["WIDE"]
    assert row_tiles((2**21, 1024), 1, ((1024, 1),), 2).constexprs["WIDE"]
    assert row_tiles((2, 64), 1, ((2**31, 1),), 2).constexprs["WIDE"]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(shape):
    with LANES["interpreter"]:
        x = torch.empty(shape)
        y, total, mean, rstd = layer_norm(x, 1, None, None, x, eps=EPS, keep=True)
        dx, sums = layer_norm_backward(x, x, 1, mean, rstd)
    assert y.shape == total.shape == dx.shape == shape
    assert_exact(torch.zeros(2, shape[1]), sums)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(3, 4, dtype=torch.float64)}, TypeError, "x is torch.float64"),
        ({"dims": 3}, ValueError, "a row cannot be the last 3 of 2 dims"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \(5,\), expected \(4,\)"),
        ({"residual": torch.ones(4)}, ValueError, "residual has shape"),
        ({"after": torch.ones(3, 4).long()}, TypeError, "after is torch.int64"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**{"x": torch.ones(3, 4), "dims": 1, "eps": EPS, **change})
