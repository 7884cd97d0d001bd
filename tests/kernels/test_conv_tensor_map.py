"""Convolution by tensor maps against stock PyTorch, where its instructions can be emulated: sm_90."""

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastnets.kernels.conv_tensor_map import configs, conv_bn_act, pixel_box
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import observe_launches
from tests.kernels.conv_cases import Case, check, check_exact, operands, shape_of
from tests.lanes import LANES

HALF, BFLOAT = torch.float16, torch.bfloat16

SHAPES = {
    "3x3": (HALF, Case(padding=(1, 1), residual="last")),
    "odd C and K, dilation 2": (BFLOAT, Case(C=72, K=19, padding=(2, 2), dilation=(2, 2), activation="silu")),
    "1x1": (HALF, Case(C=128, R=1, S=1, bn=None, bias=True)),
    "1x1 images": (BFLOAT, Case(N=5, H=1, W=1, padding=(1, 1))),
    "padding above the filter": (HALF, Case(N=1, H=3, W=2, padding=(4, 5))),
    "7x1 and sliced": (HALF, Case(H=8, W=3, C=16, R=7, S=1, padding=(3, 0), residual="contiguous")),
}


@pytest.fixture(autouse=True)
def hopper():
    with assume_device("h100"):
        yield


def skip_where_unreadable(lane):
    if lane.name.startswith("sm_") and not hasattr(TensorDescriptor, "round_f32_to_tf32"):
        pytest.skip(f"lane {lane.name}: the emulator reads descriptors as Triton 3.8 makes them")


@pytest.fixture
def tma_lane(lane):
    skip_where_unreadable(lane)
    return lane


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(tma_lane, name):
    dtype, case = SHAPES[name]
    check(tma_lane, conv_bn_act, case, dtype)


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
def test_padding_is_zero_and_not_a_neighbour(tma_lane):
    # Images of a view whose surroundings are NaN: a box that read past the edges would show it.
    case = Case(N=2, C=16, H=5, W=5, K=16, padding=(2, 2), bn=None)
    tensors = operands(case, HALF)
    whole = torch.full((2, 9, 9, 16), float("nan"), dtype=HALF)
    view = whole[:, 2:7, 2:7].permute(0, 3, 1, 2)
    tensors["x"] = view.copy_(tensors["x"])
    with tma_lane:
        y = conv_bn_act(*(tma_lane.put(tensors[n]) for n in ("x", "weight")), padding=(2, 2))
    assert torch.isfinite(y).all()
    check_exact(tma_lane, conv_bn_act, case, HALF)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(configs(DEVICES["h100"]))))
def test_shipped_configs_compute_right(index):
    lane = LANES["sm_90"]
    if lane.unavailable():
        pytest.skip(lane.unavailable())
    skip_where_unreadable(lane)
    config = configs(DEVICES["h100"])[index]
    for C in (128, 136):
        case = Case(N=1, C=C, H=13, W=12, K=136, padding=(1, 1), bn=None, residual="last", activation="none")
        check_exact(lane, conv_bn_act, case, HALF, config=config)


@pytest.mark.parametrize(
    "N, P, Q, pixels, box",
    [
        (8, 56, 56, 128, (1, 8, 16)),
        (8, 7, 7, 64, (1, 8, 8)),
        (8, 1, 1, 64, (8, 1, 8)),
        (1, 4, 64, 128, (1, 4, 32)),
    ],
)
def test_boxes_cover_the_pixels(N, P, Q, pixels, box):
    chosen = pixel_box(shape_of(Case(N=N, H=P, W=Q, R=1, S=1)), pixels)
    assert chosen[0] * chosen[1] * chosen[2] == pixels

    def boxes(b):
        return -(-N // b[0]) * -(-P // b[1]) * -(-Q // b[2])

    assert boxes(chosen) <= boxes(box)


WRONG = {
    "strides": (Case(stride=(2, 2)), HALF, r"stride=\(2, 2\)"),
    "groups": (Case(C=64, K=40, groups=2), HALF, "one group"),
    "fp32": (Case(), torch.float32, "float32"),
    "layout": (Case(x="contiguous"), HALF, r"x \[2, 64, 7, 6\] with strides .* is not channels-last"),
    "alignment": (Case(C=20), HALF, "multiples of 16 bytes"),
    "weight layout": (Case(weight="contiguous"), HALF, "weight .* is not channels-last"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_it_cannot_do_is_refused_before_any_launch(name):
    case, dtype, message = WRONG[name]
    launches = []
    with observe_launches(launches.append), pytest.raises(ValueError, match=message + ".*use kernels.conv"):
        conv_bn_act(**operands(case, dtype), **case.geometry)
    assert not launches


def test_older_devices_are_refused():
    with assume_device("a100"), pytest.raises(ValueError, match="no tensor maps, they need sm_90"):
        conv_bn_act(**operands(Case(), HALF))
    assert configs(DEVICES["a100"]) == []
