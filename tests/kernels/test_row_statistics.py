"""Statistics of rows, where they come from, and linear layers that normalise by them what they load."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels.launch import UnsupportedConfig, observe_launches
from fastnets.kernels.linear import linear_act
from fastnets.kernels.linear_configs import fp32_products
from fastnets.kernels.row_statistics import Norm, row_statistics, width_of_parts
from tests.accuracy import assert_close_to, assert_exact, integers

FULL, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FULL, HALF, BFLOAT)
EPS = 1e-6


@pytest.fixture(autouse=True)
def exact_fp32():
    with fp32_products("ieee"):
        yield


def normalised(x, weight, bias, centred=True):
    if centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def of_parts(x, width):
    """The statistics of parts of rows, in float64."""
    parts = [part.double() for part in x.flatten(0, -2).split(width, 1)]
    moments = [(p.mean(1), p.var(1, correction=0) * p.shape[1]) for p in parts]
    return torch.stack([torch.stack(pair, 1) for pair in moments], 1)


def agree(statistics, exact):
    mean, squares = statistics.cpu().double().unbind(2)
    torch.testing.assert_close(mean, exact[..., 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares, exact[..., 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 48), (9, 100)], ids=str)
def test_row_statistics(lane, shape, dtype):
    x = torch.randn(shape).to(dtype)
    with lane:
        found = row_statistics(lane.put(x))
    assert found.shape == (x[..., 0].numel(), 1, 2)
    agree(found, of_parts(x, shape[-1]))


def test_rows_are_read_where_they_lie(lane):
    x = torch.randn(4, 3, 40).transpose(0, 1)
    with lane:
        found = row_statistics(lane.put(x))
    agree(found, of_parts(x, 40))


def test_a_mean_of_many_deviations_costs_no_digits(lane):
    x = torch.randn(6, 64) + 1e5
    with lane:
        found = row_statistics(lane.put(x))
    squares = found.cpu()[:, 0, 1].double()
    torch.testing.assert_close(squares, of_parts(x, 64)[:, 0, 1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("columns, parts, width", [(768, 6, 128), (768, 1, 1024), (83, 3, 32), (7, 1, 8)])
def test_the_number_of_parts_tells_their_width(columns, parts, width):
    assert width_of_parts(columns, parts) == width


CASES = {
    "one part": (FULL, (37, 48), 40, {}),
    "half": (HALF, (65, 96), 72, {"activation": "gelu"}),
    "bfloat": (BFLOAT, (2, 19, 64), 48, {"activation": "silu"}),
    "odd sizes": (HALF, (21, 37), 29, {}),
    "odd sizes, fp32": (FULL, (5, 33), 17, {"activation": "gelu"}),
    "no affine": (BFLOAT, (20, 40), 24, {"affine": 0}),
    "weight alone": (FULL, (20, 40), 24, {"affine": 1}),
    "RMS": (HALF, (20, 48), 24, {"centred": False, "affine": 1}),
    "columns": (HALF, (24, 32), 16, {"layout": "columns"}),
    "transposed": (FULL, (4, 6, 32), 16, {"layout": "transposed"}),
    "one row": (HALF, (1, 64), 24, {}),
    "split": (FULL, (16, 512), 32, {}),
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_norm_at_the_head(lane, name, parts):
    """parts: statistics of one pass over x, or of as many parts of its rows, as a product gives them."""
    dtype, shape, N, options = CASES[name]
    K, centred = shape[-1], options.get("centred", True)
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    if options.get("layout") == "columns":
        x = x.t().contiguous().t()
    if options.get("layout") == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    vectors = [torch.randn(K).to(dtype) for _ in range(2)]
    affine = [v if i < options.get("affine", 2) else None for i, v in enumerate(vectors)]
    weight, bias = (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)
    residual = torch.randn(*shape[:-1], N).to(dtype)
    activation = options.get("activation", "none")

    def stock(kind):
        cast = [None if t is None else t.to(kind) for t in (x, *affine, weight, bias, residual)]
        z = F.linear(normalised(*cast[:3], centred), *cast[3:5])
        return (F.gelu(z) if activation == "gelu" else F.silu(z) if activation == "silu" else z) + cast[5]

    statistics = None
    if parts > 1:
        statistics = of_parts(x, width_of_parts(K, parts)).float()
    with lane:
        affine_put = [None if v is None else lane.put(v) for v in affine]
        statistics = None if statistics is None else lane.put(statistics.contiguous())
        y = linear_act(
            lane.put(x), lane.put(weight), lane.put(bias), residual=lane.put(residual), activation=activation,
            norm=Norm(*affine_put, EPS, centred, statistics),
        )  # fmt: skip
    assert y.is_contiguous()
    assert_close_to(stock(torch.float64), stock(dtype), y.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", [(33, 48, 40), (70, 32, 83), (16, 512, 48)])
def test_a_product_gives_the_statistics_of_its_rows(lane, M, K, N, dtype):
    x, weight = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)
    residual = (torch.randn(M, N) + 4).to(dtype)
    with lane:
        put = lane.put(x), lane.put(weight), None, None, lane.put(residual)
        y, statistics = linear_act(*put, keep_statistics=True)
        plain = linear_act(*put)
    assert_exact(plain.cpu(), y.cpu())
    agree(statistics, of_parts(y.cpu(), width_of_parts(N, statistics.shape[1])))


@pytest.mark.parametrize("dtype", [FULL, BFLOAT], ids=str)
def test_a_large_mean_is_as_accurate_as_stock(lane, dtype):
    """From the product that makes the rows to the one that reads them, over parts."""
    x, weight = torch.randn(24, 32).to(dtype), (torch.randn(200, 32) / 6).to(dtype)
    residual = (torch.randn(24, 200) + 300).to(dtype)
    vectors = [torch.randn(200).to(dtype) for _ in range(2)]
    reader = (torch.randn(40, 200) / 14).to(dtype)
    with lane:
        y, statistics = linear_act(lane.put(x), lane.put(weight), residual=lane.put(residual),
                                   keep_statistics=True)  # fmt: skip
        assert statistics.shape[1] > 1
        affine = [lane.put(v) for v in vectors]
        z = linear_act(y, lane.put(reader), norm=Norm(*affine, EPS, statistics=statistics))
    y = y.cpu()
    exact = F.linear(normalised(y.double(), *(v.double() for v in vectors)), reader.double())
    assert_close_to(exact, F.linear(normalised(y, *vectors), reader), z.cpu())


def test_exact_on_integers(lane):
    """Rows of mean 0 and variance 1: nothing is rounded."""
    x = integers(20, 48).sign()
    x[x == 0] = 1
    x[:, 24:] = -x[:, :24]
    weight = integers(24, 48)
    with lane:
        y = linear_act(lane.put(x), lane.put(weight), norm=Norm(None, None, 0.0))
    assert_exact(F.linear(x, weight), y.cpu())


def test_x_is_read_by_the_product_alone_where_statistics_are_there():
    x, weight = (torch.empty(size, device="meta") for size in ((64, 768), (256, 768)))
    launches = []
    with observe_launches(launches.append):
        y, found = linear_act(x, weight, norm=Norm(None, None, EPS), keep_statistics=True)
        linear_act(y, weight[:, :256], norm=Norm(None, None, EPS, statistics=found))
    assert [one.name for one in launches if one.name != "linear_finish_kernel"] == [
        "row_statistics_kernel", "linear_kernel", "linear_kernel",
    ]  # fmt: skip


def test_what_does_not_fit_is_refused():
    x, weight = torch.empty(8, 48, device="meta"), torch.empty(16, 48, device="meta")
    with pytest.raises(ValueError, match=r"norm's weight has shape \[47\]"):
        linear_act(x, weight, norm=Norm(torch.empty(47, device="meta"), None, EPS))
    wrong = torch.empty(8, 1, device="meta")
    with pytest.raises(ValueError, match="statistics are"):
        linear_act(x, weight, norm=Norm(None, None, EPS, statistics=wrong))
    with pytest.raises(ValueError, match="no pre-activation"):
        linear_act(x, weight, norm=Norm(None, None, EPS), keep_pre_activation=True)
    with pytest.raises(UnsupportedConfig, match="16384"):
        row_statistics(torch.empty(4, 20000, device="meta"))
