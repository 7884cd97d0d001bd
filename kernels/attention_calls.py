"""Calls of the attention kernels that stand for those of networks, on meta tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastnets.kernels.attention_problem import UNBOUNDED, Kind, Options, power_of_two
from fastnets.kernels.launch import Config, UnsupportedConfig

__all__ = ["AttentionCall", "attention_calls", "check_config"]


@dataclass(frozen=True)
class AttentionCall:
    """Self-attention of B sequences of N, q, k and v in one packed projection where heads are not grouped.

    bias: its shape; mask: the dtype of a [B, 1, N, N] one; sequences: packed ones.
    """

    dtype: torch.dtype
    D: int = 64
    B: int = 32
    H: int = 12
    N: int = 197
    M: int | None = None
    group: int = 1
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    softcap: float = 0.0
    dropout_p: float = 0.0
    bias: tuple[int, ...] | None = None
    mask: torch.dtype | None = None
    alibi: bool = False
    sequences: int = 0
    keep_lse: bool = False

    @property
    def block_d(self) -> int:
        return power_of_two(self.D)

    @property
    def kind(self) -> Kind:
        terms = bool(self.softcap or self.bias or self.mask or self.alibi)
        return Kind(self.dropout_p > 0, terms, self.group > 1, self.sequences > 0)

    def tensors(self) -> tuple:
        """(q, k, v, options, the other tensors by name)."""

        def empty(*shape, dtype=self.dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        if self.group == 1 and self.M is None:
            q, k, v = empty(self.B, self.N, 3, self.H, self.D).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = empty(self.B, self.M or self.N, self.H, self.D).transpose(1, 2)
            k, v = (empty(self.B, self.H // self.group, self.N, self.D) for _ in range(2))
        options = Options(
            self.D**-0.5, self.left, self.right, self.M is not None, self.softcap, self.dropout_p
        )
        cu = empty(self.sequences + 1, dtype=torch.int32)
        extra = {
            "bias": None if self.bias is None else empty(*self.bias),
            "mask": None if self.mask is None else empty(self.B, 1, self.N, self.N, dtype=self.mask),
            "slopes": empty(1, self.H, dtype=torch.float32) if self.alibi else None,
            "seed": empty(1, dtype=torch.int64) if self.dropout_p else None,
            "cu": (cu, cu) if self.sequences else None,
        }
        return q, k, v, options, extra

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(o, lse)."""
        M = self.M or self.N
        o = torch.empty(self.B, M, self.H, self.D, dtype=self.dtype, device="meta").transpose(1, 2)
        return o, torch.empty(self.B, self.H, M, device="meta")


def attention_calls() -> dict[str, AttentionCall]:
    """Calls that reach every head dim, dtype and compile-time branch."""
    half, bf16, single = torch.float16, torch.bfloat16, torch.float32
    return {
        "ViT-B bf16": AttentionCall(bf16),
        "ViT-B fp32": AttentionCall(single),
        "4096 causal fp16": AttentionCall(half, N=4096, B=2, right=0, keep_lse=True),
        "128 causal grouped bf16": AttentionCall(
            bf16, D=128, N=4096, B=1, H=32, group=4, right=0, keep_lse=True
        ),
        "128 grouped, ALiBi bf16": AttentionCall(
            bf16, D=128, N=4096, B=1, H=32, group=4, right=0, alibi=True, keep_lse=True
        ),
        "64 causal grouped bf16": AttentionCall(bf16, N=4096, B=1, H=32, group=8, right=0, keep_lse=True),
        "64 bf16, bool mask": AttentionCall(bf16, N=4096, B=1, mask=torch.bool, keep_lse=True),
        "64 bf16, bool mask, dropout": AttentionCall(
            bf16, N=1024, B=2, mask=torch.bool, dropout_p=0.1, keep_lse=True
        ),
        "64 bf16, packed": AttentionCall(bf16, B=1, N=8192, sequences=24, keep_lse=True),
        "128 bf16, packed": AttentionCall(bf16, D=128, B=1, N=8192, right=0, sequences=24, keep_lse=True),
        "64 grouped, dropout bf16": AttentionCall(
            bf16, N=1024, B=1, H=32, group=8, right=0, dropout_p=0.1, keep_lse=True
        ),
        "128 grouped, mask, dropout bf16": AttentionCall(
            bf16, D=128, N=1024, B=1, H=32, group=4, mask=torch.bool, dropout_p=0.1, keep_lse=True
        ),
        "32 causal grouped bf16": AttentionCall(
            bf16, D=32, N=1024, B=1, H=8, group=4, right=0, keep_lse=True
        ),
        "16 causal fp16": AttentionCall(half, D=16, N=1024, B=2, right=0, keep_lse=True),
        "128 fp32": AttentionCall(single, D=128, B=2),
        "32 bf16, Swin": AttentionCall(bf16, D=32, B=256, H=3, N=49, bias=(1, 3, 49, 49), mask=bf16),
        "16 fp16": AttentionCall(half, D=16),
        "16 fp32": AttentionCall(single, D=16),
        "80 fp16, ViT-H": AttentionCall(half, D=80, H=16, N=257),
        "72 fp32, bool mask": AttentionCall(single, D=72, H=16, B=2, mask=torch.bool),
        "256 bf16, window, softcap": AttentionCall(
            bf16, D=256, B=1, H=8, N=4096, left=1023, right=0, softcap=50.0
        ),
        "64 fp16, ALiBi, packed, dropout": AttentionCall(
            half, B=1, N=8192, right=0, alibi=True, sequences=24, dropout_p=0.1, keep_lse=True
        ),
        "64 fp32, pair bias": AttentionCall(single, B=1, H=8, N=128, bias=(1, 8, 128, 128)),
        "128 fp32, pair bias": AttentionCall(single, D=128, B=1, H=8, N=128, bias=(1, 8, 128, 128)),
        "64 bf16, bottom right": AttentionCall(bf16, M=40, right=0),
        "64 fp32, short": AttentionCall(single, N=49),
        "128 bf16, short": AttentionCall(bf16, D=128, N=49),
    }


def check_config(config: Config | None, suited: Sequence[Config]) -> None:
    """Raises ``UnsupportedConfig`` for a config that is never picked for such a call."""
    if config is not None and config not in suited:
        raise UnsupportedConfig(f"{config} is for other head dims or dtypes")
