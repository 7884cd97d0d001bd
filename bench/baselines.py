"""The ways to run one stock network that a benchmark sets side by side.

A variant takes the stock model (on its device, in its dtype, in eval mode or, where steps of training are to
be timed, in train mode) and returns what a user of that way would call, with the input laid out as that way
wants it. Each works on a copy; the stock model is never touched.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastnets.bench.networks import Inputs, arguments, first

Prepared = tuple[Callable[..., torch.Tensor], Inputs]


class Unavailable(RuntimeError):
    """This variant cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Variant:
    """One way to run a network. ``ours`` marks the variants whose failure fails the benchmark.

    What ``prepare`` returns is called with the inputs as positional arguments.
    """

    name: str
    description: str
    prepare: Callable[[nn.Module, Inputs], Prepared]
    ours: bool = False
    trains: bool = True  # whether gradients can flow through what ``prepare`` returns
    replays: bool = True  # whether it is timed replayed from a CUDA graph, too; False where it replays itself


def lay_out(model: nn.Module, x: Inputs) -> tuple[nn.Module, Inputs]:
    """Weights (in place) and input in channels-last memory format, where the input is images."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        return model, x
    return model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)


def _precision(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _eager(model: nn.Module, x: Inputs) -> Prepared:
    return copy.deepcopy(model) if model.training else model, x


def _channels_last(model: nn.Module, x: Inputs) -> Prepared:
    return lay_out(copy.deepcopy(model), x)


def _fold(model: nn.Module, x: Inputs) -> Prepared:
    from torch.fx.experimental.optimization import fuse

    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise Unavailable("the network has no batch norm")
    try:
        folded = fuse(model, inplace=False)
    except Exception as error:  # fx raises many kinds where it cannot trace a network
        raise Unavailable(f"torch.fx could not fold this network: {type(error).__name__}: {error}") from error
    return lay_out(folded, x)  # fuse() has copied


def _compile(model: nn.Module, x: Inputs, mode: str | None = None) -> Prepared:
    laid_out, x = lay_out(copy.deepcopy(model), x)
    torch.compiler.reset()  # graphs of the network before would count against the recompile limit
    if model.training:  # dropout as eager draws it, so that losses can be compared
        return torch.compile(laid_out, options={"fallback_random": True, **_options(mode)}), x
    if first(x).device.type == "cpu":
        return torch.compile(laid_out, options={"freezing": True}), x
    return torch.compile(laid_out, mode=mode), x


def _options(mode: str | None) -> dict[str, object]:
    """A mode of ``torch.compile`` as options; it does not take both."""
    return {} if mode is None else dict(torch._inductor.list_mode_options(mode))


def _compile_reduce_overhead(model: nn.Module, x: Inputs) -> Prepared:
    if first(x).device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    return _compile(model, x, mode="reduce-overhead")


def _compile_max_autotune(model: nn.Module, x: Inputs) -> Prepared:
    if first(x).device.type != "cuda":
        raise Unavailable("it searches among GPU kernels and needs a CUDA device")
    return _compile(model, x, mode="max-autotune-no-cudagraphs")


def _tensorrt(model: nn.Module, x: Inputs) -> Prepared:
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise Unavailable("torch_tensorrt is not installed")
    if first(x).device.type != "cuda":
        raise Unavailable("TensorRT needs a CUDA device")
    import torch_tensorrt

    compiled = torch_tensorrt.compile(
        copy.deepcopy(model), inputs=list(arguments(x)), enabled_precisions={_precision(model)}
    )
    return compiled, x


def _fastnets_measured(model: nn.Module, x: Inputs) -> Prepared:
    import fastnets

    laid_out, images = lay_out(copy.deepcopy(model), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where stock is kept, it is timed as stock
        return fastnets.optimize(laid_out, images, select="measure", inplace=True), images


def _fastnets(backend: str) -> Callable[[nn.Module, Inputs], Prepared]:
    def prepare(model: nn.Module, x: Inputs) -> Prepared:
        import fastnets

        if backend == "triton" and first(x).device.type != "cuda":
            raise Unavailable("Triton kernels run natively on a CUDA device only")
        return lay_out(
            fastnets.optimize(model, backend=backend, select="shipped"), x
        )  # optimize() has copied

    return prepare


def _onnxruntime(model: nn.Module, x: Inputs) -> Prepared:
    for package in ("onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")
    if first(x).device.type != "cpu" or _precision(model) != torch.float32:
        raise Unavailable("the ONNX Runtime baseline is set up for float32 on the CPU")
    import onnxruntime

    program = torch.onnx.export(model, arguments(x), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its idle threads would otherwise spin into the time of the variant that is next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_inputs()]

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        values = (t.numpy() for t in inputs)
        return torch.from_numpy(session.run(None, dict(zip(names, values, strict=True)))[0])

    return call, x


def _openvino(model: nn.Module, x: Inputs) -> Prepared:
    if importlib.util.find_spec("openvino") is None:
        raise Unavailable("openvino is not installed")
    if first(x).device.type != "cpu" or _precision(model) != torch.float32:
        raise Unavailable("the OpenVINO baseline is set up for float32 on the CPU")
    import openvino

    # the f32 hint: on newer processors OpenVINO would compute in bf16 by itself
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(openvino.convert_model(model, example_input=x), "CPU", settings)
    return lambda *inputs: torch.from_numpy(compiled([t.numpy() for t in inputs])[0]), x


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("eager", "the stock network as it is", _eager),
        Variant("channels-last", "stock, weights and input channels-last", _channels_last),
        Variant("folded", "batch norm folded by torch.fx, channels-last", _fold, trains=False),
        Variant("compile", "torch.compile, channels-last (frozen weights on CPU)", _compile),
        Variant("compile-max-autotune", "torch.compile, max-autotune, channels-last", _compile_max_autotune),
        Variant(
            "compile-graphs",
            "torch.compile with CUDA graphs, channels-last",
            _compile_reduce_overhead,
            replays=False,
        ),
        Variant("tensorrt", "TensorRT by torch_tensorrt", _tensorrt, trains=False),
        Variant("onnxruntime", "ONNX Runtime on the CPU", _onnxruntime, trains=False),
        Variant("openvino", "OpenVINO on the CPU, float32", _openvino, trains=False),
        Variant("fastnets", "fastnets.optimize, implementations by its heuristics", _fastnets("auto"), True),
        Variant("fastnets-measured", "fastnets, implementations by measurement", _fastnets_measured, True),
        Variant("fastnets-library", "fastnets, the vendor's fused calls only", _fastnets("library"), True),
        Variant("fastnets-triton", "fastnets, its Triton kernels only", _fastnets("triton"), True),
    )
}
"""Every variant by name, in the order a table shows them."""

BASELINE = "eager"


QUICK = (BASELINE, "channels-last", "folded", "onnxruntime", "openvino", "fastnets")  # of ``--quick``


def default_variants(device: torch.device | str, *, training: bool = False) -> list[str]:
    """The variants a benchmark runs unless told otherwise; what is not installed says so in its table."""
    on_gpu = torch.device(device).type == "cuda"
    names = [BASELINE, "channels-last", "folded", "compile"]
    if on_gpu:
        names += ["compile-max-autotune", "compile-graphs", "tensorrt", "fastnets", "fastnets-library"]
        names += ["fastnets-triton", "fastnets-measured"]
    else:
        names += ["onnxruntime", "openvino", "fastnets"]
        names += [] if training else ["fastnets-measured"]  # training on the CPU runs stock's layers
    return [name for name in names if VARIANTS[name].trains or not training]
