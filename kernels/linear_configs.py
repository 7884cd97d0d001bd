"""Which kernel and which tile a linear layer runs with when nothing was measured.

The tiles are those of the table "linear" of ``conv_configs``, ranked by the same prediction from counts; what
is added is that no tile gets below the time its weights take to come from memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import torch

from fastnets.kernels.conv_configs import kernel_configs, products_of, seconds_of_tiles, table_configs
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, UnsupportedConfig, tiles

__all__ = [
    "STREAMED_ROWS",
    "check_pairing",
    "choose_config",
    "choose_stream_config",
    "configs",
    "finish_config",
    "fp32_products",
    "product_precision",
    "streams",
    "suits",
]

STREAMED_ROWS = 4  # the most rows that ``linear_stream_kernel`` takes

# BLOCK_N × BLOCK_K weights in flight, by element size: four vectors of 16 bytes a thread.
_STREAM = {
    2: tuple(Config(BLOCK_N=n, BLOCK_K=4096 // n, num_warps=4, num_stages=1) for n in (8, 4, 2)),
    4: tuple(Config(BLOCK_N=n, BLOCK_K=2048 // n, num_warps=4, num_stages=1) for n in (8, 4, 2)),
}
_FINISH = Config(BLOCK_M=4, BLOCK_N=512, num_warps=4, num_stages=1)
_FINISH_NARROW = Config(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=1)


@functools.lru_cache(maxsize=4096)
def choose_config(
    M: int,
    N: int,
    K: int,
    element_size: int,
    precision: str,
    device: Device,
    vectors: bool = True,
    crowded: bool = False,
) -> Config:
    """The config with the least predicted time for [M, K] @ [K, N]; a ranking, not a time to quote.

    precision: "ieee" or "tf32", of fp32 products. vectors, crowded: see ``suits``.
    """
    products = products_of(element_size, precision, device)

    def seconds(config: Config) -> float:
        BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K = (config[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
        if not suits(config, vectors, crowded):
            return math.inf
        count, blocks = tiles(M, BLOCK_M) * tiles(N, BLOCK_N), tiles(K, BLOCK_K)
        # Splitting is for grids that leave half the GPU idle; a share of fewer than 4 blocks fills no pipe.
        if SPLIT_K > 1 and (2 * count > device.multiprocessors or SPLIT_K > blocks // 4):
            return math.inf
        blocks = tiles(blocks, SPLIT_K)
        found = seconds_of_tiles(config, count * SPLIT_K, blocks, element_size, precision, device)
        # Below this no tile gets: the weights come from memory, whoever multiplies them.
        found = max(found, element_size * (N * K + M * K) / (1e9 * device.dram_bandwidth))
        if SPLIT_K > 1:
            found += 4e-6 + 2 * 4 * SPLIT_K * M * N / (1e9 * device.dram_bandwidth)
        return found

    return min(table_configs("linear", products, device), key=seconds)


def suits(config: Config, vectors: bool, crowded: bool) -> bool:
    """Whether a tile leaves registers for the addresses of a call.

    vectors: operands load several elements at a time, and not one by one, each from an address of its own.
    crowded: the epilogue keeps more beside the accumulator than y, or offsets take 64 bits.
    """
    threads = 32 * config.num_warps
    if not vectors and (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K > 32 * threads:
        return False
    return not crowded or config.BLOCK_M * config.BLOCK_N <= 64 * threads


def streams(M: int, element_size: int, precision: str, device: Device) -> bool:
    """Whether ``linear_stream_kernel`` serves M rows: one, or a few where there are no tensor cores to pad
    tiles of 16 rows for free."""
    return M == 1 or (M <= STREAMED_ROWS and products_of(element_size, precision, device) == "fma")


@functools.lru_cache(maxsize=4096)
def choose_stream_config(N: int, element_size: int, device: Device) -> Config:
    """The widest tile of columns that gives every multiprocessor four programs, else the narrowest."""
    table = _STREAM[element_size]
    return next((c for c in table if tiles(N, c.BLOCK_N) >= 4 * device.multiprocessors), table[-1])


def product_precision(x: torch.Tensor) -> str:
    """Of fp32 products: "ieee", or "tf32" where torch's switch for matrix products allows it."""
    if x.dtype != torch.float32 or not (x.is_cuda or x.is_meta):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@contextlib.contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Torch's switch for fp32 matrix products on CUDA set inside: "ieee" or "tf32"."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def finish_config(N: int) -> Config:
    """The tile of ``linear_finish_kernel``, which only moves memory."""
    return _FINISH if N >= _FINISH.BLOCK_N else _FINISH_NARROW


def configs(device: Device) -> list[Config]:
    """Every config that the heuristics of this file may pick on this device."""
    return [*kernel_configs("linear", device), *_STREAM[2], *_STREAM[4], _FINISH, _FINISH_NARROW]


def check_pairing(config: Config | None, dtype: torch.dtype, kernel: str) -> None:
    """Raises ``UnsupportedConfig`` for a config that no heuristic pairs with this kernel ("tile", "stream" or
    "finish") and dtype: for representative calls."""
    if config is None:
        return
    device = current_device()
    precision = product_precision(torch.empty(0, dtype=dtype, device="meta"))
    tables = {
        "tile": table_configs("linear", products_of(dtype.itemsize, precision, device), device),
        "stream": _STREAM[dtype.itemsize],
        "finish": (_FINISH, _FINISH_NARROW),
    }
    if config not in tables[kernel]:
        raise UnsupportedConfig(f"{config} is not one of kernel {kernel!r} for {dtype}")
