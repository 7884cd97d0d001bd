"""Which GPU a launch is planned for."""

import pytest
import torch

from fastnets.kernels.device import DEVICES, Device, assume_device, current_device, device_for_capability
from tests.lanes import LANES, ptxsim_unavailable

needs_emulator = pytest.mark.skipif(bool(ptxsim_unavailable()), reason=str(ptxsim_unavailable()))
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there and answers first")


def test_the_table_is_complete():
    assert set(DEVICES) == {
        "t4", "a10", "a100", "rtx3090", "rtx4090", "l40s", "h100", "h200", "b200", "rtx5090",
    }  # fmt: skip
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.shared_memory_per_block <= device.shared_memory_per_multiprocessor
        assert 20 <= device.multiprocessors <= 200
        assert 300 <= device.dram_bandwidth <= 8000
        assert device.fp32_tflops < device.tensor_tflops


def test_a_capability_stands_for_a_device():
    assert device_for_capability(90).name == "h100"
    assert device_for_capability(103).name == "b200"
    assert device_for_capability(87).name == "a10"
    with pytest.raises(ValueError, match="70 is not supported"):
        device_for_capability(70)


@no_gpu
def test_assumed_devices_nest():
    meta = torch.empty(1, device="meta")
    assert current_device(meta).name == "a100"
    with assume_device("h100") as h100:
        assert current_device(meta) is h100
        with assume_device(75):
            assert current_device().name == "t4"
        assert current_device(torch.ones(1)) is h100
    assert current_device().name == "a100"
    with pytest.raises(ValueError, match=r"unknown device 'h1000' \(known: a10, a100, b200"):
        assume_device("h1000").__enter__()


@needs_emulator
def test_an_emulated_device_answers_and_is_forgotten():
    x = torch.ones(1)
    for name, capability, shared in (("sm_80", 80, 166912), ("sm_90", 90, 232448), ("sm_80", 80, 166912)):
        with LANES[name]:
            device = current_device(x)
            assert current_device(x) is device
        assert device.capability == capability
        assert device.shared_memory_per_block == shared
        assert device.multiprocessors == (108 if capability == 80 else 132)


@needs_emulator
def test_fewer_multiprocessors_are_taken_as_slower():
    with LANES["sm_90"].but(num_sms=66):
        device = current_device(torch.ones(1))
    assert device.multiprocessors == 66
    assert device.dram_bandwidth == DEVICES["h100"].dram_bandwidth / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_real_device_answers():
    x = torch.ones(1, device="cuda")
    properties = torch.cuda.get_device_properties(0)
    with assume_device("t4"):
        device = current_device(x)
    assert device.multiprocessors == properties.multi_processor_count
    assert device is current_device(x)


def test_occupancy():
    a100: Device = DEVICES["a100"]
    assert a100.blocks_resident(num_warps=4) == 16
    assert a100.blocks_resident(num_warps=4, registers_per_thread=128) == 4
    assert a100.blocks_resident(num_warps=4, registers_per_thread=129) == 3
    assert a100.blocks_resident(num_warps=4, shared_bytes=80 * 1024) == 2
    assert a100.blocks_resident(num_warps=4, shared_bytes=164 * 1024) == 0
    assert a100.blocks_resident(num_warps=32, registers_per_thread=64) == 1
