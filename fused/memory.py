"""Fresh memory on the CPU: why it is slow, and two ways around it.

glibc maps every block above 32 MiB afresh, and a fresh page costs a fault and 4 KiB of zeros: in MobileNetV2
with eight images that is a third of the time.

``in_chunks`` makes the forward of a whole optimized network split its batch where a feature map would grow
past that; the blocks then come from the heap, already mapped. A batch is split only where that cannot
be seen: in inference, when every operation of the first forward was seen to treat each sample alone, all
code in between is PyTorch's own or was captured, and no hook would see a part.

``retain_memory`` tells glibc never to give pages back. It changes the whole process, so it is for the user
to call.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastnets.fused.batch_norm import has_hooks, is_unobserved_inference

_MAPPED = 32 << 20  # glibc maps larger blocks afresh: DEFAULT_MMAP_THRESHOLD_MAX
_BYTES = 26 << 20  # of the largest feature map of a part: fewer and larger parts keep the cores busy
_SAMPLEWISE = frozenset(
    [
        *("mkldnn::_convolution_pointwise", "aten::convolution", "aten::mkldnn_convolution", "aten::conv2d"),
        *("fastnets::conv_bn_act_inference", "fastnets::bn_add_act_inference"),
        "fastnets::linear_act_inference",
        *("aten::relu", "aten::relu_", "aten::hardtanh", "aten::hardtanh_", "aten::leaky_relu", "aten::silu"),
        *("aten::silu_", "aten::hardswish", "aten::hardswish_", "aten::hardsigmoid", "aten::hardsigmoid_"),
        *("aten::sigmoid", "aten::sigmoid_", "aten::tanh", "aten::tanh_", "aten::gelu", "aten::clone"),
        *("aten::contiguous", "aten::_to_copy", "aten::detach", "aten::max_pool2d_with_indices"),
        *("aten::avg_pool2d", "aten::_adaptive_avg_pool2d", "aten::adaptive_avg_pool2d"),
        "aten::native_layer_norm",
    ]
)
_SAMPLEWISE_PAIRS = frozenset(["aten::add", "aten::add_", "aten::mul", "aten::mul_"])
_ALONG_A_DIMENSION = {"aten::mean": 1, "aten::cat": 1, "aten::_softmax": 1}
_RESHAPES = frozenset(["aten::view", "aten::_unsafe_view", "aten::squeeze", "aten::unsqueeze"])
_PARAMETER_VIEWS = _RESHAPES | {"aten::t", "aten::permute", "aten::transpose"}


class _Witness(TorchDispatchMode):
    """Watches one forward: does every operation keep the samples apart, and how large does a sample get?"""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.samplewise = True
        self.bytes_per_sample = 0
        self.parameters: set[int] = set()  # addresses of those that views were seen of

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler to keep it away from a mode: two seconds and 70 MiB."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _PARAMETER_VIEWS and self._is_parameter(args[0]):
            self.parameters.add(args[0].untyped_storage().data_ptr())
            return result
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.samplewise = self.samplewise and self._keeps_samples_apart(name, args, outputs)
        self.bytes_per_sample = max([self.bytes_per_sample, *(t.nbytes // self.batch for t in outputs)])
        return result

    def _keeps_samples_apart(self, name: str, args: tuple, outputs: list[Tensor]) -> bool:
        """Results must be rows in the order of the samples: all rows of the first, then of the second."""
        tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        if not all(self._has_rows_of_samples(t) for t in outputs):
            return False
        if name == "aten::addmm":  # bias, samples, weights
            return self._has_rows_of_samples(args[1]) and args[1].size(0) == outputs[0].size(0)
        if name in _SAMPLEWISE_PAIRS:
            return any(t.shape == outputs[0].shape for t in tensors) and all(
                self._aligns(t, outputs[0]) for t in tensors
            )
        if not tensors or not self._has_rows_of_samples(tensors[0]):
            return False
        if name in _SAMPLEWISE or name in _RESHAPES:
            return True
        if name == "aten::as_strided_":  # pooling to one pixel rewrites the strides of the sizes of one
            return args[2][0] * self.batch == tensors[0].numel()
        if name in ("aten::transpose", "aten::permute"):
            kept = args[1] if name == "aten::permute" else [0, *args[1:]]
            return kept[0] == 0 and all(d % tensors[0].dim() != 0 for d in kept[1:])
        if name in _ALONG_A_DIMENSION:
            dimensions = args[_ALONG_A_DIMENSION[name]] if len(args) > 1 else 0
            dimensions = dimensions if isinstance(dimensions, (list, tuple)) else [dimensions]
            return bool(dimensions) and all(d % tensors[0].dim() != 0 for d in dimensions)
        if name == "aten::native_batch_norm":
            return not args[5]
        return name == "aten::_native_batch_norm_legit_no_training"

    def _has_rows_of_samples(self, t: Tensor) -> bool:
        return t.dim() > 0 and t.size(0) % self.batch == 0 and not self._is_parameter(t)

    def _is_parameter(self, t: Tensor) -> bool:
        return isinstance(t, nn.Parameter) or t.untyped_storage().data_ptr() in self.parameters

    def _aligns(self, t: Tensor, result: Tensor) -> bool:
        """Whether an operand meets each row of the result in the same way, or only the row of its own."""
        if t.dim() == 0 or t.shape == result.shape:
            return True
        if self._is_parameter(t):  # along the other dimensions alone
            return t.dim() < result.dim() or t.size(0) == 1
        return t.dim() == result.dim() and t.size(0) == result.size(0)


def in_chunks(forward: Callable, knows: Callable[[type], bool]) -> Callable:
    """``forward(self, x)`` of a whole network, which splits large batches as the top of this file says.

    knows: whether the code of a module class is known not to look at the batch.
    """
    per_chunk: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()

    @functools.wraps(forward)
    def chunked(self, *args, **kwargs):
        if kwargs or len(args) != 1 or not _may_split(self, args[0]):
            return forward(self, *args, **kwargs)
        (x,) = args
        sizes = per_chunk.setdefault(self, {})
        last = sizes.get((x.shape[1:], x.dtype), 0)
        if last and last * len(x) <= _MAPPED:  # fits, and which modules there are need not be asked
            return forward(self, x)
        modules = list(self.modules())
        key = (x.shape[1:], x.dtype, *map(type, modules))
        size = sizes.get(key)
        if size is None:
            if not all(map(knows, key[2:])) or any(m.training for m in modules):
                return forward(self, x)
            with _Witness(len(x)) as witness:
                y = forward(self, x)
            samplewise = witness.samplewise and isinstance(y, Tensor) and y.dim() > 0 and len(y) == len(x)
            sizes[key] = sizes[key[:2]] = witness.bytes_per_sample if samplewise else 0
            return y
        total = size * len(x)
        if total <= _MAPPED or any(m.training or has_hooks(m) for m in modules[1:]):
            return forward(self, x)
        parts = min(len(x), -(-total // _BYTES))
        return torch.cat([forward(self, part) for part in x.chunk(parts)])

    return chunked


def _may_split(module: nn.Module, x: object) -> bool:
    batch = type(x) is Tensor and x.dim() == 4 and x.size(0) > 1
    return batch and not module.training and is_unobserved_inference(x)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def retain_memory() -> None:
    """Keep freed memory mapped, for all of this process and from now on: freed feature maps are used again.

    The process then holds on to its peak. With another allocator than glibc's there is nothing to set, and
    this raises ``RuntimeError``. What the environment can do instead, before Python starts:
    ``THP_MEM_ALLOC_ENABLE=1``.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        raise RuntimeError(
            "fastnets.retain_memory() sets glibc's malloc, and this process runs on another libc"
        )
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
        if libc.mallopt(parameter, value) != 1:
            raise RuntimeError(
                f"glibc's mallopt({parameter}, {value}) failed; its allocator has been replaced"
            )
