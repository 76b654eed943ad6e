"""What a device can do, measured: bytes a second of a copy, operations a second of a product, and peaks of memory."""

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# large enough that no cache holds the copy, and that the product fills the device: (bytes, rows of the matrices)
_SIZES = {"cuda": (2**30, 8192), "cpu": (2**24, 128)}


@dataclass(frozen=True)
class Limits:
    """Bytes a second of a copy, read and written, and operations a second of a product of two matrices."""

    bandwidth: float
    flops: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> "Limits":
        """Those of a device, by a copy and by a product of matrices of a type."""
        size, rows = _SIZES[device.type]
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        left, right = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
        target, product = torch.empty_like(source), torch.empty_like(left)
        copying = seconds(device, lambda: target.copy_(source))
        multiplying = seconds(device, lambda: torch.matmul(left, right, out=product))
        return cls(2 * size / copying, 2 * rows**3 / multiplying)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, function: Callable[[], Any], repeats: int = 10) -> float:
    """The median of repeated calls, without the first ones, in which kernels are chosen."""
    spent = []
    for _ in range(repeats + 3):
        wait_for(device)
        since = time.perf_counter()
        function()
        wait_for(device)
        spent.append(time.perf_counter() - since)
    return statistics.median(spent[3:])


@dataclass
class Peak:
    """The most bytes that tensors took at once in a context, beyond what there was before."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """A context that yields the peak of the tensors on a device, which is known at its end."""
    peak = Peak()
    gc.collect()  # what is freed meanwhile would be taken from the peak
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with _LiveTensors() as live:
        yield peak
    peak.bytes = live.most


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, since a CPU has no such count. Every operation takes longer."""

    def __init__(self):
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
