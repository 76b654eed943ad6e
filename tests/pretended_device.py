"""
Notes where the host waits for its device, on a GPU and on a pretended accelerator on the CPU. Not a test module.

On a GPU torch says so. On the pretended accelerator every tensor is taken to be on the device, except what is made
without a device, or comes from `.cpu()`, and what is computed from such tensors alone. The device is named `cpu:0` and
the host `cpu`, which are the same place for torch. So an operation that would stop on an accelerator, since some of
its tensors are on the host, stops here too.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import TrainingArguments

DEVICE, HOST = torch.device("cpu:0"), torch.device("cpu")
PACKAGE = "rlhf_bayes"
aten = torch.ops.aten

# operations whose result's size or value the host must know
_READ = {
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_FACTORIES = {
    torch.tensor, torch.as_tensor, torch.from_numpy, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange,
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.linspace, torch.eye,
}  # fmt: skip
_FROM_DATA = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
# files that stand between a wait and the code that is to blame
_BETWEEN = ("pretended_device.py", "contextlib.py", "warnings.py", "_py_warnings.py")
_OF_TORCH = "called a synchronizing CUDA operation"
_READ_BY_PYTHON = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__contains__}


class Waits:
    """Where the host waited: (package, line of code) -> how often."""

    def __init__(self):
        self.places: Counter[tuple[str, str]] = Counter()

    def note(self, what: str) -> None:
        self.places[_caller(what)] += 1

    @property
    def own(self) -> dict[str, int]:
        """Those of this package."""
        return {line: count for (package, line), count in self.places.items() if package == PACKAGE}


def _caller(what: str) -> tuple[str, str]:
    """The package and the line that made the host wait: those of the innermost frame outside of torch."""
    frame = sys._getframe(1)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        if "torch" not in parts and parts[-1] not in _BETWEEN:
            place = f"{'/'.join(parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}: {what}"
            inner = parts[parts.index("site-packages") + 1] if "site-packages" in parts else ""
            return inner or (PACKAGE if PACKAGE in parts else "tests"), place
        frame = frame.f_back
    return "torch", what


class _Operations(TorchDispatchMode):
    """Follows which tensors are on the host, and notes operations that read from the device."""

    def __init__(self, waits: Waits, on_host: WeakTensorKeyDictionary):
        super().__init__()
        self.waits, self.on_host = waits, on_host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # empty ones may have been made on the host before the count began
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.numel() > 0]
        hosts = [self.on_host.get(x) for x in tensors]
        if True in hosts:  # scalars that torch has made of Python's numbers belong anywhere
            hosts = [x.dim() == 0 if host is None else host for x, host in zip(tensors, hosts, strict=True)]
        packet = func.overloadpacket
        result = func(*args, **kwargs)
        on_host = bool(hosts) and all(hosts)
        if tensors:
            self.on_host.update({x: on_host for x in tree_leaves(result) if isinstance(x, Tensor)})
        if on_host:
            return result
        repeats = packet is aten.repeat_interleave and kwargs.get("output_size") is None
        if packet in _READ or repeats:
            self.waits.note(str(packet))
        elif packet in _INDEXED:
            self._note_indices(packet, args)
        elif any(hosts):
            self._check_mixed(packet, tensors, hosts)
        return result

    def _note_indices(self, packet: Any, args: tuple) -> None:
        indices = [x for x in args[1] if x is not None]
        fills = packet is not aten.index and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not fills:
            self.waits.note(f"{packet} by a mask")
        if any(self.on_host.get(x) for x in indices):
            self.waits.note(f"{packet} by indices on the host")

    def _check_mixed(self, packet: Any, tensors: list[Tensor], hosts: list[bool]) -> None:
        if packet is aten.copy_:
            self.waits.note("copy_ between host and device")
        elif any(host and x.dim() > 0 for x, host in zip(tensors, hosts, strict=True)) and "foreach" not in str(
            packet
        ):
            raise RuntimeError(f"{packet} has tensors on the host and on the device, at {_caller('')[1]}")


class _Calls(TorchFunctionMode):
    """Gives tensors their pretended device, and notes what moves data between host and device."""

    def __init__(self, waits: Waits, on_host: WeakTensorKeyDictionary):
        super().__init__()
        self.waits, self.on_host = waits, on_host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return HOST if self.on_host.get(args[0]) else DEVICE
        if func is Tensor.cpu:
            return self._moved(args[0], args[0], HOST, False)
        if func is Tensor.to:
            device = self._device_of(args[1:], kwargs)
            result = func(*args, **kwargs)
            return result if device is None else self._moved(args[0], result, device, kwargs.get("non_blocking"))
        if func in _READ_BY_PYTHON and not self.on_host.get(args[0]):
            self.waits.note(func.__name__)
            with uncounted():
                return func(*args, **kwargs)
        if func is Tensor.__getitem__ and isinstance(args[1], list) and not self.on_host.get(args[0]):
            self.waits.note("index by a list")
        result = func(*args, **kwargs)
        if func in _FACTORIES or func is Tensor.new_tensor:
            self._made(func, result, args, kwargs)
        return result

    def _device_of(self, args: tuple, kwargs: dict) -> torch.device | None:
        for x in (*args, kwargs.get("device"), kwargs.get("other")):
            if isinstance(x, Tensor):
                return HOST if self.on_host.get(x) else DEVICE
            if isinstance(x, str | torch.device):
                return torch.device(x)
        return None

    def _moved(self, source: Tensor, result: Tensor, device: torch.device, non_blocking: Any) -> Tensor:
        to_host = device == HOST
        if bool(self.on_host.get(source)) != to_host:
            if to_host or not non_blocking:
                self.waits.note("to the host" if to_host else "to the device")
            result = result.clone()  # the same place for torch, but two for us
        self.on_host[result] = to_host
        return result

    def _made(self, func: Any, result: Tensor, args: tuple, kwargs: dict) -> None:
        given = kwargs.get("device")
        if func is Tensor.new_tensor and given is None:
            on_host = bool(self.on_host.get(args[0]))
        elif func is torch.as_tensor and isinstance(args[0], Tensor) and given is None:
            return
        else:
            on_host = given is None or torch.device(given) == HOST
        self.on_host[result] = on_host
        if func in _FROM_DATA and not on_host:
            self.waits.note(f"{func.__name__} of data on the host")


@contextmanager
def pretended_device() -> Iterator[None]:
    """A context in which accelerate puts its tensors on the pretended device. Make trainers in it."""
    with pytest.MonkeyPatch.context() as patch:
        # accelerate's state is made anew with each trainer's arguments
        for state in (PartialState, AcceleratorState):
            patch.setattr(state, "device", property(lambda self: DEVICE, lambda self, device: None), raising=False)
        patch.setattr(TrainingArguments, "device", property(lambda self: self._setup_devices and DEVICE))
        yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()


@contextmanager
def uncounted() -> Iterator[None]:
    """A context in which nothing is counted, and torch is as fast as ever. What is made in it is on the device."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


@contextmanager
def counted_waits(*host: Tensor) -> Iterator[Waits]:
    """A context that yields the count of waits. Tensors that exist at its start are on the device, but for `host`."""
    waits, on_host = Waits(), WeakTensorKeyDictionary(dict.fromkeys(host, True))
    with _Operations(waits, on_host), _Calls(waits, on_host):
        yield waits


@contextmanager
def waits_of_gpu() -> Iterator[Waits]:
    """A context that yields the count of the waits of which torch warns, on a GPU."""
    waits = Waits()

    def heard(message: Warning | str, *_: Any) -> None:
        if _OF_TORCH in str(message):
            waits.note("warning of torch")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = heard
        with sync_debug_mode("warn"):
            yield waits


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """A context in which torch says where the host waits for a GPU: "default" (it does not), "warn" or "error"."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
