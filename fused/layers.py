"""Drop-in modules: a stock convolution, batch norm and activation with one fused forward.

Each takes its stock module's constructor arguments plus what it fuses, holds the stock modules as children
(``conv``, ``bn``, ``act``) and has ``from_stock``, which shares existing ones. They train, too: by the ops of
``conv_training`` and ``batch_norm_training`` on CUDA, by the stock modules on the CPU.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastnets.fused import dispatch, packing
from fastnets.fused.activation import recognise
from fastnets.fused.batch_norm import BATCH_NORMS, call_bn_add_act
from fastnets.fused.conv import call_conv_bn_act


def fusible_activation(act: nn.Module | None) -> tuple[str, float]:
    """``(name, negative_slope)`` of a stock activation module; another module raises ``ValueError``."""
    known = recognise(act)
    if known is None:
        raise ValueError(
            f"act={act!r} has no fused form; use a stock activation module (nn.ReLU, nn.SiLU, ...), or None "
            "and apply yours after the layer"
        )
    return known


class BNAct(nn.Module):
    """Batch norm, optional residual addition and activation: ``BNAct(64, act=nn.ReLU())(x, residual)``.

    Takes ``nn.BatchNorm2d``'s arguments, and ``act``, a stock activation module or None. Parameters are
    those of the two stock modules, ``bn`` and ``act``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        act: nn.Module | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._set(act, backend)

    def _set(self, act: nn.Module | None, backend: str) -> None:
        self.act = act
        self.backend = dispatch.validate_backend(backend)
        self.activation = fusible_activation(act)

    @classmethod
    def from_stock(cls, bn: nn.Module, act: nn.Module | None = None, *, backend: str = "auto") -> BNAct:
        """The fused module around existing stock modules, which it shares."""
        if type(bn) not in BATCH_NORMS:
            raise TypeError(f"BNAct.from_stock: bn is {type(bn).__name__}, expected a stock batch norm")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.bn = bn
        self._set(act, backend)
        return self.train(bn.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, C, ...], residual of x's shape or None -> a tensor like x."""
        return call_bn_add_act(self.bn, self.act, x, residual, *self.activation, self.backend)


class _ConvModule(nn.Module):
    """Base of the modules below: a stock ``conv``, perhaps a stock ``bn``, a stock ``act`` and the fused
    forward."""

    def __init__(self, conv: nn.Conv2d, bn: nn.Module | None, act: nn.Module | None, backend: str):
        super().__init__()
        self.conv = conv
        self.bn = bn
        self.act = act
        self.backend = dispatch.validate_backend(backend)
        self.activation = fusible_activation(act)

    @classmethod
    def _from(cls, conv: nn.Module, bn: nn.Module | None, act: nn.Module | None, backend: str):
        if type(conv) is not nn.Conv2d:
            raise TypeError(f"{cls.__name__}.from_stock: conv is {type(conv).__name__}, expected nn.Conv2d")
        if bn is not None and type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            raise TypeError(f"{cls.__name__}.from_stock: bn is {type(bn).__name__}, expected nn.BatchNorm2d")
        if bn is not None and bn.num_features != conv.out_channels:
            raise ValueError(
                f"{cls.__name__}.from_stock: bn has {bn.num_features} features, "
                f"conv {conv.out_channels} channels"
            )
        self = cls.__new__(cls)
        _ConvModule.__init__(self, conv, bn, act, backend)
        return self.train(conv.training)

    def train(self, mode: bool = True):
        packing.bump()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        packing.bump()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        packing.bump()
        return super()._load_from_state_dict(*args, **kwargs)


class ConvAct(_ConvModule):
    """``nn.Conv2d`` and an activation: its arguments, and ``act``, a stock activation module or None.

    x [N, C, H, W] -> [N, K, P, Q], channels-last. Parameters are those of ``conv``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        act: nn.Module | None = None,
        backend: str = "auto",
    ):
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        super().__init__(conv, None, act, backend)

    @classmethod
    def from_stock(cls, conv: nn.Conv2d, act: nn.Module | None = None, *, backend: str = "auto") -> ConvAct:
        """The fused module around existing stock modules, which it shares."""
        return cls._from(conv, None, act, backend)

    def forward(self, x: Tensor) -> Tensor:
        return call_conv_bn_act(self.conv, None, self.act, x, None, *self.activation, self.backend)


class ConvBNAct(_ConvModule):
    """``nn.Conv2d``, ``nn.BatchNorm2d`` and an activation.

    Takes ``nn.Conv2d``'s arguments (``bias`` is off unless asked for), BN's as ``eps``, ``momentum``,
    ``affine`` and ``track_running_stats``, and ``act``, a stock activation module or None. x [N, C, H, W]
    -> [N, K, P, Q], channels-last. Parameters are those of ``conv`` and ``bn``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act: nn.Module | None = None,
        backend: str = "auto",
    ):
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(conv, bn, act, backend)

    @classmethod
    def from_stock(
        cls, conv: nn.Conv2d, bn: nn.Module, act: nn.Module | None = None, *, backend: str = "auto"
    ):
        """The fused module around existing stock modules, which it shares."""
        return cls._from(conv, bn, act, backend)

    def forward(self, x: Tensor) -> Tensor:
        return call_conv_bn_act(self.conv, self.bn, self.act, x, None, *self.activation, self.backend)


class ConvBNAddAct(ConvBNAct):
    """``act(bn(conv(x)) + residual)``: ``ConvBNAct``'s arguments, and the residual as the call's second
    argument."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return call_conv_bn_act(self.conv, self.bn, self.act, x, residual, *self.activation, self.backend)
