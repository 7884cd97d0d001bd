"""Which input pixels each output pixel of a 2-D pooling sees: fixed windows and adaptive ones."""

import functools
from dataclasses import dataclass

import torch

__all__ = [
    "Windows",
    "adaptive_index_dtype",
    "adaptive_windows",
    "fixed_windows",
    "index_dtype",
    "is_channels_last",
]


@dataclass(frozen=True)
class Windows:
    """The windows of one pooling: [H, W] pixels in, one window for each of [P, Q] pixels out.

    R, S: elements of a window (of the largest, where they are adaptive). reach: how many windows can contain
    one input pixel, along each dimension.
    """

    H: int
    W: int
    P: int
    Q: int
    R: int
    S: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    adaptive: bool
    reach: tuple[int, int]

    @property
    def index_dtype(self) -> torch.dtype:
        """What holds every position in a window, and one more value for "no element"."""
        if self.adaptive:
            return adaptive_index_dtype((self.H, self.W), (self.P, self.Q))
        return index_dtype(self.R * self.S)

    @property
    def is_whole_plane(self) -> bool:
        return self.adaptive and self.P == self.Q == 1


def index_dtype(elements: int) -> torch.dtype:
    """What holds the positions in a window of so many elements, and one more value."""
    return torch.uint8 if elements <= 255 else torch.int32


def adaptive_index_dtype(size: tuple[int, int], output_size: tuple[int, int]) -> torch.dtype:
    """The same for adaptive windows, from a bound on their length that needs no search: sizes may be
    symbolic."""
    return index_dtype((size[0] // output_size[0] + 2) * (size[1] // output_size[1] + 2))


@functools.lru_cache(maxsize=4096)
def fixed_windows(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
) -> Windows:
    """Windows of ``F.max_pool2d`` and ``F.avg_pool2d`` over ``size`` = (H, W) pixels.

    Raises ``ValueError`` for what PyTorch refuses as well.
    """
    output = []
    for extent, k, s, pad, dilation_ in zip(size, kernel_size, stride, padding, dilation):
        if k < 1 or s < 1 or dilation_ < 1:
            raise ValueError(f"pooling: kernel_size={k}, stride={s}, dilation={dilation_} must be at least 1")
        span = (k - 1) * dilation_ + 1
        if pad < 0 or pad > span // 2:
            raise ValueError(f"pooling: padding={pad} must be between 0 and half of the window's span {span}")
        room = extent + 2 * pad - span
        count = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (count - 1) * s >= extent + pad:
            count -= 1  # the last window would begin in the padding
        if count < 1:
            raise ValueError(f"pooling: a window of {span} does not fit {extent} pixels padded by {pad}")
        output.append(count)
    reach = tuple(
        -(-((k - 1) * dilation_ + 1) // s) for k, s, dilation_ in zip(kernel_size, stride, dilation)
    )
    return Windows(*size, *output, *kernel_size, tuple(stride), tuple(padding), tuple(dilation), False, reach)


@functools.lru_cache(maxsize=4096)
def adaptive_windows(size: tuple[int, int], output_size: tuple[int, int]) -> Windows:
    """Windows of ``F.adaptive_avg_pool2d``: [p·H // P, ceil((p + 1)·H / P)) along each dimension."""
    longest, reach = [], []
    for extent, count in zip(size, output_size):
        if extent < 1 or count < 1:
            raise ValueError(f"pooling: {extent} pixels into {count} windows; both must be at least 1")
        longest.append(max(-(-(p + 1) * extent // count) - p * extent // count for p in range(count)))
        reach.append(max(-(-(h + 1) * count // extent) - h * count // extent for h in range(extent)))
    return Windows(*size, *output_size, *longest, (1, 1), (0, 0), (1, 1), True, tuple(reach))


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether what is made from x [N, C, H, W] is channels-last: where x is, or its channels lie closest."""
    if x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) < min(x.stride(2), x.stride(3))
