"""A pretend accelerator, to find without a GPU what would fail on one: tensors or generators on the wrong device.

    with pretend.device():
        stage1_baseline.main(["--device", pretend.NAME, "--budget", "smoke"])

Its tensors are CPU tensors with a mark. Every call of torch from Python passes through `Mode`, which does four things:
    `x.device` is the pretend device if x has the mark.
    A result has the mark if an argument has it. `x.to(...)`, `x.cpu()` and `device=...` choose otherwise.
    A call fails if it would fail on a real accelerator: tensors of both devices meet, a generator belongs to the other
    device, a tensor of the device becomes a NumPy array, or a tensor of the device has float64 (as on mps).
    A saved tensor has no mark, since checkpoints are loaded onto the CPU.
What torch does inside one call is not seen, and so neither is the backward pass.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NAME = "privateuseone"  # torch keeps this name for devices that it does not know
CPU, DEVICE = torch.device("cpu"), torch.device(NAME)
TO_NUMPY = (Tensor.numpy, Tensor.__array__)
TRANSFERS = (Tensor.to, Tensor.copy_, Tensor.data.__set__, torch._has_compatible_shallow_copy_type)


class Generator(torch.Generator):
    """A generator that remembers for which device it was made. It draws the numbers of a CPU generator."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.made_for = torch.device(device)
        return made

    device = property(lambda self: self.made_for)


def leaves(x):
    """The values in nested lists, tuples and dictionaries."""
    if isinstance(x, (list, tuple, dict)):
        return [leaf for item in (x.values() if isinstance(x, dict) else x) for leaf in leaves(item)]
    return [x]


def on_device(x):
    return getattr(x, "on_pretend_device", False)


def set_mark(x, mark):
    x.on_pretend_device = mark


def chosen_device(func, args, kwargs):
    """The device that a call names, or None. Returns it with the arguments, in which the CPU takes its place."""
    device = CPU if func is Tensor.cpu else kwargs.get("device")
    if func is Tensor.to:
        device = next((x for x in args[1:] if isinstance(x, (str, torch.device))), device)
    device = None if device is None else torch.device(device)
    if device == DEVICE:
        args = [CPU if isinstance(x, (str, torch.device)) else x for x in args]
        kwargs = kwargs | ({"device": CPU} if "device" in kwargs else {})
    return device, args, kwargs


def check_arguments(func, args, tensors, generators, to_device):
    """Raise the error of a real accelerator if the call mixes devices."""
    if any((generator.device == DEVICE) != to_device for generator in generators):
        raise RuntimeError(f"{func.__name__}: the generator belongs to another device than the result")
    if func in TRANSFERS or not any(map(on_device, tensors)):
        return
    if func in TO_NUMPY:
        raise TypeError(f"{func.__name__}: can't convert a tensor of {DEVICE} to numpy")
    index_may_differ = func in (Tensor.__getitem__, Tensor.__setitem__) and on_device(args[0])
    must_agree = leaves([args[0], *args[2:]]) if index_may_differ else tensors
    if any(isinstance(x, Tensor) and not on_device(x) and x.dim() > 0 for x in must_agree):
        raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device")


class Mode(TorchFunctionMode):
    """See the top of this file. Inside __torch_function__ the mode is off, so that all tensors are plain there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.device.__get__ and on_device(args[0]):
            return DEVICE
        if func == Tensor.is_cpu.__get__:
            return not on_device(args[0])
        if func is Tensor.__iter__:  # an iterator's tensors would have no mark
            with self:
                return iter(args[0].unbind())
        if func is Tensor.__reduce_ex__:  # the mark would be saved
            return func(args[0].detach(), *args[1:])
        device, args, kwargs = chosen_device(func, args, kwargs or {})
        inputs = leaves((args, kwargs))
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        to_device = any(map(on_device, tensors)) if device is None else device == DEVICE
        check_arguments(func, args, tensors, [x for x in inputs if isinstance(x, torch.Generator)], to_device)
        result = func(*args, **kwargs)
        if func == Tensor.data.__set__:
            set_mark(args[0], on_device(args[1]))
        if isinstance(result, Tensor) and any(result is x for x in tensors):  # in place, or there was nothing to do
            if device is None or on_device(result) == to_device:
                return result
            result = result.clone()
        for x in leaves(result) if to_device else ():
            if isinstance(x, Tensor):
                set_mark(x, True)
                if x.dtype == torch.float64:
                    raise TypeError(f"{func.__name__}: the device has no float64")
        return result


@contextlib.contextmanager
def device():
    """Within this context the device NAME exists."""
    module = SimpleNamespace(get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],  # torch.autocast
                             _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None)  # torch.manual_seed
    with pytest.MonkeyPatch.context() as patch, Mode():
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, NAME, module, raising=False)
        yield DEVICE
