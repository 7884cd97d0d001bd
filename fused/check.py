"""``check``: the fused network's answers against stock's, both judged by stock in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastnets.fused.optimize import arguments_of, restore

ALLOWED_RATIO = 2.0  # of stock's own error
CLEAR_MARGIN = 0.1  # between the two largest of stock's probabilities: top-1 must then be equal


@dataclass
class CheckReport:
    """What ``check`` found: printable, and true where all is well.

    Attributes:
        error_ratio: ‖fast − ref64‖ / ‖stock − ref64‖ over all floating-point outputs, the divisor not below
            what rounding the result once costs (in float64, where stock is its own reference, 16 eps).
        top1_agreement: share of the rows with a clear stock answer in which fast has the same largest
            logit; None where the outputs are not logits [N, classes]. 1.0 where no answer is clear.
        stock_error, fast_error: the two norms, relative to ‖ref64‖.
        problems: what is wrong, in words; empty where all is well.
    """

    error_ratio: float = 0.0
    top1_agreement: float | None = None
    stock_error: float = 0.0
    fast_error: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether fast may stand in for stock."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [
            f"{'ok' if self.ok else 'NOT OK'}: error ratio {self.error_ratio:.3g} "
            f"(allowed {ALLOWED_RATIO:g}); relative error "
            f"against float64: stock {self.stock_error:.2e}, fast {self.fast_error:.2e}"
        ]
        if self.top1_agreement is not None:
            lines.append(
                f"top-1 equal where stock's margin is above {CLEAR_MARGIN}: {self.top1_agreement:.1%}"
            )
        return "\n".join([*lines, *(f"problem: {p}" for p in self.problems)])


def check(stock: nn.Module, fast: nn.Module | Callable, example_inputs: object) -> CheckReport:
    """Run stock, fast and a float64 copy of stock on the same inputs, and compare.

    Args:
        stock: the network as it was. Where ``fast`` is a module of another dtype, stock is judged in that.
        fast: the network to judge, or any callable that takes the inputs and returns what stock returns.
        example_inputs: a tensor, or a tuple of positional arguments. They may hold nests of tensors.

    Networks in training mode are copied first, and draw the same random numbers. Outputs may be nests of
    tuples, lists and dicts. Raises ``TypeError`` where stock is not a module, fast cannot be called or there
    is no input; what stock raises passes unchanged.
    """
    if not isinstance(stock, nn.Module):
        raise TypeError(f"fastnets.check expects stock to be an nn.Module, got {type(stock).__name__}")
    if not callable(fast):
        raise TypeError(f"fastnets.check expects fast to be a module or callable, got {type(fast).__name__}")
    arguments = arguments_of(example_inputs)
    if arguments is None:
        raise TypeError("fastnets.check needs example_inputs: a tensor, or a tuple of positional arguments")
    dtype = _dtype_of(fast) if isinstance(fast, nn.Module) else None
    if dtype is None or dtype == _dtype_of(stock):
        judged = _untouched(stock)
    else:
        judged = copy.deepcopy(stock).to(dtype)
    reference = restore(copy.deepcopy(stock)).double()
    with torch.no_grad():
        stock_output = _run(judged, arguments, dtype)
        fast_output = _run(_untouched(fast) if isinstance(fast, nn.Module) else fast, arguments, dtype)
        exact = _run(reference, arguments, torch.float64)
    return compare_outputs(stock_output, fast_output, exact)


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _untouched(module: nn.Module) -> nn.Module:
    """The module, or a copy where running it would change its statistics."""
    return copy.deepcopy(module) if any(m.training for m in module.modules()) else module


def _run(network: Callable, arguments: tuple, dtype: torch.dtype | None) -> object:
    def convert(x):
        # Clones, because a network may write to its input.
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype, copy=True) if dtype is not None and x.is_floating_point() else x.clone()

    devices = {x.device for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x.is_cuda}
    plain = torch.autocast("cpu", enabled=False) if dtype == torch.float64 else contextlib.nullcontext()
    with torch.random.fork_rng(devices=devices), plain:
        torch.manual_seed(0)
        return network(*pytree.tree_map(convert, arguments))


def compare_outputs(stock: object, fast: object, exact: object) -> CheckReport:
    """Judge what fast returned, where stock returned ``stock`` and would have returned ``exact`` in float64.
    All three are tensors, or the same nest of tensors."""
    report = CheckReport()
    stock_leaves, stock_spec = pytree.tree_flatten(stock)
    fast_leaves, fast_spec = pytree.tree_flatten(fast)
    exact_leaves, _ = pytree.tree_flatten(exact)
    if fast_spec != stock_spec:
        report.problems.append(f"the outputs have another structure: {fast_spec}, not {stock_spec}")
        report.error_ratio = float("inf")
        return report
    squares = torch.zeros(3, dtype=torch.float64)  # of stock's error, fast's error, the reference
    floor = 0.0
    for index, (s, f, e) in enumerate(zip(stock_leaves, fast_leaves, exact_leaves)):
        where = f"output {index}" if len(stock_leaves) > 1 else "the output"
        if not isinstance(s, Tensor):
            if not isinstance(f, type(s)) or f != s:
                report.problems.append(f"{where} is {f!r}, stock's is {s!r}")
            continue
        if not isinstance(f, Tensor) or f.shape != s.shape or f.dtype != s.dtype:
            report.problems.append(f"{where} is {_describe(f)}, stock's is {_describe(s)}")
            continue
        if not s.is_floating_point():
            if not torch.equal(s, f):
                report.problems.append(f"{where} ({s.dtype}) differs from stock's")
            continue
        finite = torch.isfinite(s) & torch.isfinite(e)
        if not torch.equal(_special(s), _special(f)):
            report.problems.append(
                f"{where} has NaN or infinities where stock has none, or the other way round"
            )
            finite &= torch.isfinite(f)
        s64, f64, e64 = (t.detach().double()[finite].cpu() for t in (s, f, e))
        squares += torch.stack([(s64 - e64).square().sum(), (f64 - e64).square().sum(), e64.square().sum()])
        # Stock in float64 is its own reference; another order of its sums costs some roundings.
        floor = max(floor, torch.finfo(s.dtype).eps * (16 if s.dtype == torch.float64 else 1 / 4))
        if s.dim() == 2 and s.shape[1] > 1:
            _compare_top1(report, s, f, where)
    stock_error, fast_error, norm = squares.sqrt().tolist()
    if fast_error > 0:
        report.error_ratio = fast_error / max(stock_error, floor * norm, torch.finfo(torch.float64).tiny)
    if norm > 0:
        report.stock_error, report.fast_error = stock_error / norm, fast_error / norm
    if report.error_ratio > ALLOWED_RATIO:
        report.problems.append(f"fast is {report.error_ratio:.3g} times as far from float64 as stock")
    return report


def _special(x: Tensor) -> Tensor:
    """NaN and infinities by kind, everything else alike."""
    return torch.isnan(x).char() + 2 * torch.isposinf(x).char() + 4 * torch.isneginf(x).char()


def _describe(x: object) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(type(x).__name__)


def _compare_top1(report: CheckReport, stock: Tensor, fast: Tensor, where: str) -> None:
    top2 = torch.softmax(stock.double(), dim=1).topk(2, dim=1).values
    clear = (top2[:, 0] - top2[:, 1]) > CLEAR_MARGIN
    equal = (stock.argmax(1) == fast.argmax(1))[clear]
    share = float(equal.double().mean()) if len(equal) else 1.0
    report.top1_agreement = share if report.top1_agreement is None else min(share, report.top1_agreement)
    if share < 1:
        report.problems.append(
            f"{where}: top-1 differs from stock in {int((~equal).sum())} of {len(equal)} clear rows"
        )
