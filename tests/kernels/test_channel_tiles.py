"""How tensors become tiles, on the host: every element once, at its own address, with its own channel."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnets.kernels.channel_tiles import (
    channel_tiles,
    memory_order,
    pass_config,
    pass_configs,
    reduction_config,
    reduction_configs,
)
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import Config, UnsupportedConfig


@st.composite
def layouts(draw, dims):
    """A way to lay out a shape: order of the dims in memory, steps and gaps, expanded dims."""
    order = draw(st.permutations(range(dims)))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=dims, max_size=dims))
    gaps = draw(st.lists(st.sampled_from([0, 0, 0, 3]), min_size=dims, max_size=dims))
    expanded = draw(st.lists(st.sampled_from([False] * 5 + [True]), min_size=dims, max_size=dims))
    return order, steps, gaps, expanded


def strides_of(shape, layout):
    order, steps, gaps, expanded = layout
    strides, at = [0] * len(shape), 1
    for d in order:
        strides[d] = 0 if expanded[d] else at * steps[d]
        if not expanded[d]:
            at = at * shape[d] * steps[d] + gaps[d] * at
    return tuple(strides)


def addresses(of, tensor):
    """{(address in the first tensor, address in this one): channel} by the formulas of ``step_offsets``."""
    n0, n1 = of.sizes[:2]
    found = {}
    for outer, inner, channel in itertools.product(range(of.outer), range(of.inner), range(of.channels)):
        indices = (outer % n0, outer // n0 % n1, outer // n0 // n1)
        if of.constexprs["OUTER_DIMS"] < 3:
            indices = (outer % n0, outer // n0, 0) if of.constexprs["OUTER_DIMS"] == 2 else (outer, 0, 0)
        both = []
        for i in (0, tensor):
            kind, unit = of.layouts[i]
            row = of.strides[i]
            start = sum(index * stride for index, stride in zip(indices, row[: of.constexprs["OUTER_DIMS"]]))
            if kind == "channel":
                both.append((start + inner * row[3]) * unit + channel)
            elif kind == "inner":
                both.append((start + channel * row[4]) * unit + inner)
            else:
                assert unit == 1
                both.append(start + inner * row[3] + channel * row[4])
        sample = outer // of.outer_per_sample
        assert tuple(both) not in found or 0 in of.strides[0]
        found[tuple(both)] = (sample if of.samples > 1 else 0, channel)
    return found


@settings(max_examples=150, deadline=None)
@given(data=st.data(), per_sample=st.booleans(), itemsize=st.sampled_from([2, 4]))
def test_every_element_is_visited_at_its_address(data, per_sample, itemsize):
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=2, max_size=5)))
    order = data.draw(st.permutations(range(len(shape))))
    dense = strides_of(shape, (order, [1] * len(shape), [0] * len(shape), [False] * len(shape)))
    other = strides_of(shape, data.draw(layouts(len(shape))))
    of = channel_tiles(shape, (dense, other), itemsize, per_sample)
    assert of.outer * of.inner * of.channels == math.prod(shape)
    expected = {}
    for index in itertools.product(*map(range, shape)):
        first, second = (sum(i * s for i, s in zip(index, strides)) for strides in (dense, other))
        expected[first, second] = (index[0] if of.samples > 1 else 0, index[1])
    assert addresses(of, 1) == expected
    for kind, unit in of.layouts:
        assert unit in (1, 2, 4, 8)
        assert unit * itemsize <= 16
        assert kind != "channel" or of.constexprs["CHANNEL_UNIT"] % unit == 0
        assert kind != "inner" or of.constexprs["INNER_UNIT"] % unit == 0


def plan(shape, memory_format=torch.contiguous_format, per_sample=False):
    x = torch.empty(shape, dtype=torch.float16, device="meta").to(memory_format=memory_format)
    return channel_tiles(tuple(shape), (memory_order(x), x.stride()), 2, per_sample), x


def test_the_usual_layouts_are_two_dims_and_read_in_vectors():
    last, _ = plan((32, 64, 56, 56), torch.channels_last)
    assert (last.outer, last.inner, last.channels) == (1, 32 * 56 * 56, 64)
    assert last.layouts == (("channel", 8), ("channel", 8))
    planes, _ = plan((32, 64, 56, 56))
    assert (planes.outer, planes.inner, planes.channels) == (32, 56 * 56, 64)
    assert planes.layouts == (("inner", 8), ("inner", 8))
    samples, _ = plan((32, 64, 56, 56), torch.channels_last, per_sample=True)
    assert (samples.samples, samples.outer, samples.inner) == (32, 32, 56 * 56)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(32, 64, 112, 112), (32, 256, 56, 56), (32, 2048, 7, 7), (8, 27, 14, 14)])
def test_reductions_fill_the_device_and_keep_partial_results_small(shape, memory_format):
    of, x = plan(shape, memory_format)
    with assume_device("h100"):
        config, splits, each = reduction_config(of, x)
        passing = pass_config(of, x)
    assert config in reduction_configs()
    assert passing in pass_configs()
    steps, blocks = of.steps(config), of.channel_tiles(config)
    # Every step has its program, every program a step.
    assert (splits - 1) * each < steps <= splits * each
    if steps * blocks >= 132:
        assert splits * blocks >= 100
    # 12 bytes for each channel of a part, beside x.
    assert splits * shape[1] * 12 <= 0.1 * x.numel() * 2 or splits * blocks <= 2 * 132
    # Tiles overhang little.
    volume = steps * config.BLOCK_INNER * blocks * config.BLOCK_CHANNELS
    assert volume < 1.6 * x.numel()


def test_a_config_of_another_kernel_is_refused():
    of, x = plan((2, 8, 4, 4))
    for pick, config in (
        (pass_config, reduction_configs()[0]),
        (reduction_config, pass_configs()[0]),
        (pass_config, Config(BLOCK=3)),
    ):
        with pytest.raises(UnsupportedConfig, match="is for another kernel"):
            pick(of, x, config)


def test_devices_differ_in_programs_only():
    of, x = plan((8, 64, 14, 14), torch.channels_last)
    chosen = []
    for device in DEVICES.values():
        with assume_device(device):
            chosen.append(reduction_config(of, x)[0])
    assert len(set(chosen)) == 1
