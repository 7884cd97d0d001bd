"""How the tests judge a result: against float64, by how much worse than PyTorch in the same dtype it is.

``assert_close_to`` is the error-ratio test; ``integers`` makes inputs on which rounding has no say, for
exact tests.
"""

import torch

__all__ = ["assert_close_to", "assert_exact", "error_ratio", "integers"]


def integers(*shape, low=-3, high=3, dtype=torch.float32, generator=None) -> torch.Tensor:
    """Integers in [low, high] as floats.

    Sums of products of them are exact in fp32 below 2^24; a result below 2^11 or 2^8 survives the
    rounding to fp16 or bf16.
    """
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def error_ratio(reference64: torch.Tensor, stock: torch.Tensor, ours: torch.Tensor) -> float:
    """||ours - ref64|| over ||stock - ref64||, both lifted by the floor of ``assert_close_to``."""
    _, ours_error, stock_error, floor = _errors(reference64, stock, ours)
    return float(ours_error.norm() / (stock_error.norm() + floor))


def assert_close_to(
    reference64: torch.Tensor, stock: torch.Tensor, ours: torch.Tensor, ratio: float = 2.0
) -> None:
    """Asserts ||ours - ref64|| <= ratio * ||stock - ref64|| + floor, and the like for the worst element.

    reference64: stock PyTorch in float64; stock: stock PyTorch in the dtype of ours. The floor is the error
    of rounding the result once, eps / 4 of its norm. NaN and infinities must stand where the reference has
    them, or where stock has them (an overflow that float64 does not see). The worst element may be 2 * ratio
    times as wrong as stock's worst: a norm alone hides one wrong pixel among a million.
    """
    assert ours.dtype == stock.dtype, f"dtype {ours.dtype}, stock has {stock.dtype}"
    assert ours.shape == reference64.shape, f"shape {tuple(ours.shape)}, not {tuple(reference64.shape)}"
    assert reference64.dtype == torch.float64
    if ours.numel() == 0:
        return
    reference, ours_error, stock_error, floor = _errors(reference64, stock, ours)
    allowed = ratio * stock_error.norm() + floor
    assert ours_error.norm() <= allowed, (
        f"error {ours_error.norm():.3e}, allowed {allowed:.3e} (stock {stock_error.norm():.3e}, floor "
        f"{floor:.3e}, norm {reference.norm():.3e}); worst at {_worst(reference64, ours)}"
    )
    eps = torch.finfo(stock.dtype).eps
    worst = 2 * ratio * stock_error.abs().max() + eps * reference.abs().max()
    assert ours_error.abs().max() <= worst, (
        f"worst element off by {ours_error.abs().max():.3e}, allowed {worst:.3e}; "
        f"at {_worst(reference64, ours)}"
    )


def assert_exact(expected: torch.Tensor, ours: torch.Tensor) -> None:
    """Asserts equal shapes and values, bit for bit up to the sign of zero."""
    assert ours.shape == expected.shape, f"shape {tuple(ours.shape)}, not {tuple(expected.shape)}"
    wrong = (ours.double().cpu() != expected.double().cpu()).nonzero()
    assert len(wrong) == 0, f"{len(wrong)} of {ours.numel()} differ; {_worst(expected.double(), ours)}"


def _errors(reference64, stock, ours):
    reference = reference64.detach().cpu().flatten()
    ours64 = ours.detach().cpu().double().flatten()
    stock64 = stock.detach().cpu().double().flatten()
    special = ~torch.isfinite(reference) | ~torch.isfinite(stock64)
    expected = torch.where(torch.isfinite(stock64), reference, stock64)[special]
    same = (ours64[special] == expected) | (torch.isnan(ours64[special]) & torch.isnan(expected))
    assert same.all(), f"NaN or infinity: {ours64[special][~same][:4]}, expected {expected[~same][:4]}"
    plain = ~special
    unexpected = plain & ~torch.isfinite(ours64)
    where = [tuple(i) for i in unexpected.reshape(reference64.shape).nonzero()[:4].tolist()]
    assert not unexpected.any(), f"{int(unexpected.sum())} NaN or infinities, none expected: at {where}"
    reference = reference[plain]
    floor = torch.finfo(stock.dtype).eps / 4 * reference.norm()
    return reference, ours64[plain] - reference, stock64[plain] - reference, floor


def _worst(reference64, ours):
    difference = (ours.detach().double().cpu() - reference64.cpu()).abs().nan_to_num(torch.inf)
    flat = int(difference.flatten().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), difference.shape))
    return f"{index}: {ours[index].item():.6g}, expected {reference64[index].item():.6g}"
