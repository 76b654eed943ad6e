"""
What only a GPU can show: half precision, kernels of attention, peak memory, where the host waits, engines on the GPU.

Each test runs at a small size on the CPU, with all others, and once more on a GPU, where `make test-gpu` finds one. No
part of the package corresponds to this folder, since such tests go through all of it.
"""

import pytest
import torch

from .models import SIZES


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def size(device):
    return SIZES[device.type]
