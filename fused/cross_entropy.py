"""Cross-entropy over class indices and distillation, each in one pass that leaves the gradient behind.

    ce   = (1 − s) · w[t] · (−log p[t]) + s / V · Σ_v w[v] · (−log p[v])          p = softmax(logits)
    loss = (1 − α) · ce + α · T² · KL(softmax(teacher / T) ‖ softmax(logits / T))

logits [N, V, d...], target int64 [N, d...]. The forward keeps the gradient, in the logits' dtype, instead of
the logits and their log-softmax; the backward only scales it. Under autocast the loss is float32, as stock's,
without a float32 copy of the logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnets.fused import dispatch
from fastnets.fused.batch_norm import in_transform

REDUCTIONS = ("none", "mean", "sum")

# wide: the loss is float32 whatever the logits are (autocast).
_SCHEMA = (
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? teacher, int ignore_index, str reduction, "
    "float label_smoothing, float alpha, float temperature, bool wide, str backend)"
)

# --- the implementations ------------------------------------------------------------------------------------


def choose(logits: Tensor, teacher: Tensor | None, backend: str) -> str:
    """The implementation that serves a call: see ``dispatch.triton_or_reference``."""
    return dispatch.triton_or_reference(logits, backend, teacher, refuses="takes no logits of", what="logits")


def _stock(logits, target, weight, teacher, ignore_index, reduction, smoothing, alpha, temperature) -> Tensor:
    """The composition that defines the op, in the logits' dtype."""
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    if teacher is None:
        return loss
    log_p = F.log_softmax(logits / temperature, 1)
    log_q = F.log_softmax(teacher.to(logits.dtype) / temperature, 1)
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    kl = kl if reduction == "none" else kl.mean() if reduction == "mean" else kl.sum()
    return alpha * temperature**2 * kl + (1 - alpha) * loss


def _reference_gradient(
    logits, target, weight, teacher, ignore_index, reduction, smoothing, alpha, temperature
):  # fmt: skip
    """(gradient of the summed loss for the logits, what it is to be divided by), as the kernels keep them."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    x, V = logits.to(wide), logits.shape[1]
    counts = target != ignore_index
    safe = torch.where(counts, target, 0)
    of_class = x.new_ones(V) if weight is None else weight.to(wide)
    of_target = torch.where(counts, of_class[safe], 0)
    total = of_target.sum()
    divisor = x.new_ones(())
    if reduction == "mean":
        divisor = torch.where(total == 0, 1, total)
        # As stock: no weight at all is NaN for the rows that count, and zero for the ignored ones.
        of_target = torch.where(counts & (total == 0), torch.nan, of_target)
    p = torch.softmax(x, 1)
    hit = torch.zeros_like(p).scatter_(1, safe.unsqueeze(1), 1.0)
    gradient = (of_target * (1 - smoothing)).unsqueeze(1) * (p - hit)
    if smoothing != 0:
        by_class = of_class.view(1, -1, *[1] * (x.dim() - 2))
        soft = torch.where(counts, smoothing / V, 0.0).to(wide).unsqueeze(1)
        gradient = gradient + soft * (p * of_class.sum() - by_class)
    if teacher is not None:
        difference = torch.softmax(x / temperature, 1) - torch.softmax(teacher.to(wide) / temperature, 1)
        share = divisor / max(target.numel(), 1) if reduction == "mean" else 1.0
        gradient = (1 - alpha) * gradient + alpha * temperature * share * difference
    return gradient.to(logits.dtype), divisor.reshape(1)


def _raise_for_targets(target: Tensor, valid: Tensor, classes: int, ignore_index: int) -> None:
    """Stock's error for targets that are no class: IndexError on the CPU, a device assertion on CUDA."""
    if target.is_meta or target.numel() == 0:
        return
    if target.is_cuda:
        torch._assert_async(valid, "cross_entropy: a target is out of bounds")
    elif not valid:
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
        raise IndexError(f"Target {int(wrong[0])} is out of bounds.")


def _launch(
    logits, target, weight, teacher, ignore_index, reduction, smoothing, alpha, temperature, wide, keep
):
    from fastnets.kernels.cross_entropy import cross_entropy as launch

    result = launch(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=smoothing,
        teacher=teacher,
        alpha=alpha,
        temperature=temperature,
        keep_gradient=keep,
        loss_dtype=torch.float32 if wide else logits.dtype,
    )
    _raise_for_targets(target, result.valid, logits.shape[1], ignore_index)
    return result


def _body(logits, target, weight, teacher, *options):
    *options, wide, backend = options
    if choose(logits, teacher, backend) == "triton":
        return _launch(logits, target, weight, teacher, *options, wide, False).loss
    return _stock(logits.float() if wide else logits, target, weight, teacher, *options)


def _with_gradient_body(logits, target, weight, teacher, *options):
    *options, wide, backend = options
    if choose(logits, teacher, backend) == "triton":
        result = _launch(logits, target, weight, teacher, *options, wide, True)
        return result.loss, result.gradient, result.divisor
    loss = _stock(logits.float() if wide else logits, target, weight, teacher, *options)
    gradient, divisor = _reference_gradient(logits, target, weight, teacher, *options)
    return loss, _dense(gradient, logits), divisor


def _dense(gradient: Tensor, logits: Tensor) -> Tensor:
    """In the layout that the kernels write."""
    layout = _gradient_like(logits)
    return gradient if gradient.stride() == layout.stride() else layout.copy_(gradient)


def _gradient_like(logits: Tensor) -> Tensor:
    rows = logits if logits.dim() == 2 else logits.flatten(2)
    return torch.empty_like(rows).view(logits.shape)


def _fake(logits, target, weight, teacher, ignore_index, reduction, *options):
    dtype = torch.float32 if options[-2] else logits.dtype
    return logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)


def _with_gradient_fake(logits, *arguments):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return _fake(logits, *arguments), _gradient_like(logits), logits.new_empty(1, dtype=wide)


def _backward_body(dloss, gradient, divisor, backend):
    if choose(gradient, None, backend) == "triton":
        from fastnets.kernels.cross_entropy_gradient import scale_gradient as launch

        return launch(gradient, dloss, divisor)
    scale = dloss.to(divisor.dtype) / divisor.view([])
    scale = scale.unsqueeze(1) if scale.dim() else scale
    return _dense((gradient * scale).to(gradient.dtype), gradient)


def _backward_fake(dloss, gradient, divisor, backend):
    return _gradient_like(gradient)


# --- the ops ------------------------------------------------------------------------------------------------


def _autocast(logits, target, weight, teacher, *options):
    with torch.amp.autocast(logits.device.type, enabled=False):
        op = _differentiable if torch.is_grad_enabled() else _infer
        return op(logits, target, weight, teacher, *options[:-2], True, options[-1])


_infer = dispatch.register(f"cross_entropy_inference{_SCHEMA} -> Tensor", _body, _fake, autocast=_autocast)
_with_gradient = dispatch.register(
    f"cross_entropy_with_gradient{_SCHEMA} -> (Tensor, Tensor, Tensor)",
    _with_gradient_body,
    _with_gradient_fake,
)
_backward = dispatch.register(
    "cross_entropy_backward(Tensor dloss, Tensor gradient, Tensor divisor, str backend) -> Tensor",
    _backward_body,
    _backward_fake,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _with_gradient(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, gradient, divisor = output
        ctx.mark_non_differentiable(gradient, divisor)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, divisor)
        ctx.backend = inputs[-1]

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dloss, *_):
        dx = None if dloss is None else _backward(dloss, *ctx.saved_tensors, ctx.backend)
        return dx, *[None] * 10


def _autograd(logits, target, weight, teacher, *options):
    if torch.is_grad_enabled():
        for name, tensor in (("weight", weight), ("teacher", teacher)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"cross_entropy: no gradient for {name}; pass {name}.detach()")
        if logits.requires_grad:
            return _CrossEntropy.apply(logits, target, weight, teacher, *options)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(logits, target, weight, teacher, *options)


_differentiable = dispatch.register(
    f"cross_entropy{_SCHEMA} -> Tensor", _body, _fake, autograd=_autograd, autocast=_autocast
)

# --- functions ----------------------------------------------------------------------------------------------


def _is_plain(logits, target, weight, teacher=None) -> bool:
    """Whether this is a batch of floating logits and class indices that fits; the rest is stock's, with its
    own results (class probabilities, single samples) and errors."""
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor) or in_transform():
        return False
    weights = () if weight is None else (weight,)
    autocast = not logits.is_meta and torch.is_autocast_enabled(logits.device.type)
    return (
        logits.is_floating_point()
        and logits.dim() >= 2
        and logits.shape[1] > 0
        and target.dtype == torch.int64
        and tuple(target.shape) == (logits.shape[0], *logits.shape[2:])
        and target.device == logits.device
        and all(
            (w.dtype == logits.dtype or (autocast and w.is_floating_point()))
            and tuple(w.shape) == (logits.shape[1],)
            and w.device == logits.device
            and not w.requires_grad
            for w in weights
        )
    )


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """``F.cross_entropy``: its arguments, results and errors. Class indices are fused; class probabilities,
    single samples and, with ``backend="auto"``, the CPU run stock. Differentiable once, in the logits."""
    dispatch.validate_backend(backend)
    if (
        (isinstance(logits, Tensor) and dispatch.leaves_to_stock(logits, backend))
        or not _is_plain(logits, target, weight)
        or reduction not in REDUCTIONS
        or not 0.0 <= label_smoothing <= 1.0
    ):
        return F.cross_entropy(
            logits,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        logits, target, weight, None, ignore_index, reduction, label_smoothing, 0.0, 1.0, False, backend
    )


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 0.7,
    temperature: float = 4.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """α · T² · KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 − α) · cross_entropy(student, target).

    After Hinton, Vinyals and Dean, 2015. student, teacher: [N, V, d...], of any floating dtypes; target:
    [N, d...] int64, for which ``weight``, ``ignore_index`` and ``label_smoothing`` hold as in
    ``cross_entropy``. The divergence is summed over classes and averaged over all rows (for [N, V]: the
    "batchmean" of ``F.kl_div``), or reduced as ``reduction`` says. No gradient flows into the teacher.

    Raises:
        ValueError: shapes that do not fit, ``alpha`` outside [0, 1], ``temperature`` not positive.
    """
    dispatch.validate_backend(backend)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"distillation_loss: alpha={alpha} must be between 0 and 1")
    if not temperature > 0.0:
        raise ValueError(f"distillation_loss: temperature={temperature} must be positive")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"distillation_loss: label_smoothing={label_smoothing} must be between 0 and 1")
    if reduction not in REDUCTIONS:
        raise ValueError(f"distillation_loss: reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if teacher.shape != student.shape or not teacher.is_floating_point() or teacher.device != student.device:
        raise ValueError(
            f"distillation_loss: teacher is {tuple(teacher.shape)} {teacher.dtype} on {teacher.device}, "
            f"student {tuple(student.shape)} {student.dtype} on {student.device}; they must agree in shape "
            "and device"
        )
    if weight is not None:
        weight = weight.detach().to(student.dtype)
    options = (ignore_index, reduction, label_smoothing, alpha, temperature)
    teacher = teacher.detach()
    if in_transform():
        return _stock(student, target, weight, teacher, *options)
    if not _is_plain(student, target, weight):
        raise ValueError(
            f"distillation_loss: student is {tuple(student.shape)} {student.dtype}, target "
            f"{tuple(target.shape)} {target.dtype} on {target.device}; expected floating [N, V, d...] and "
            "int64 [N, d...] class indices, with a weight for each class"
        )
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(student, target, weight, teacher, *options, False, backend)


# --- modules ------------------------------------------------------------------------------------------------


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``nn.CrossEntropyLoss`` by the fused op: its arguments, and ``backend``."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average=None,
        ignore_index: int = -100,
        reduce=None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        backend: str = "auto",
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.backend = dispatch.validate_backend(backend)

    @classmethod
    def from_stock(cls, loss: nn.CrossEntropyLoss, *, backend: str = "auto") -> CrossEntropyLoss:
        """The fused module with the settings of a stock one, whose weight it shares."""
        if type(loss) is not nn.CrossEntropyLoss:
            raise TypeError(
                f"CrossEntropyLoss.from_stock: got {type(loss).__name__}, expected nn.CrossEntropyLoss"
            )
        options = {"reduction": loss.reduction, "label_smoothing": loss.label_smoothing, "backend": backend}
        return cls(loss.weight, ignore_index=loss.ignore_index, **options).train(loss.training)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input [N, V, d...], target int64 [N, d...] (or what else stock takes) -> the loss."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
        )


class DistillationLoss(nn.Module):
    """``distillation_loss`` as a module: ``DistillationLoss()(student, teacher, target)``."""

    def __init__(
        self,
        alpha: float = 0.7,
        temperature: float = 4.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        backend: str = "auto",
    ):
        super().__init__()
        self.register_buffer("weight", weight)
        self.alpha = alpha
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.backend = dispatch.validate_backend(backend)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """student, teacher [N, V, d...], target int64 [N, d...] -> the loss."""
        return distillation_loss(
            student,
            teacher,
            target,
            self.weight,
            alpha=self.alpha,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
        )
