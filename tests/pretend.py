"""A pretend accelerator, to find without a GPU what would fail on one: tensors or generators on the wrong device.

    with pretend.device():
        stage1_baseline.main(["--device", pretend.NAME, "--budget", "smoke"])

Its tensors are CPU tensors with a mark. Every call of torch from Python passes through `Mode`. A result has the mark if
an argument has it; `x.to(...)`, `x.cpu()` and `device=...` choose otherwise. A call fails if it would fail on a real
accelerator. A saved tensor has no mark. What torch does inside one call, such as the backward pass, is not seen.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves  # the values in nested lists, tuples and dictionaries

NAME = "privateuseone"  # torch keeps this name for devices that it does not know
CPU, DEVICE = torch.device("cpu"), torch.device(NAME)
TRANSFERS = (Tensor.to, Tensor.copy_, Tensor.data.__set__, torch._has_compatible_shallow_copy_type)


class Generator(torch.Generator):
    """A CPU generator that remembers for which device it was made."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.made_for = torch.device(device)
        return made

    device = property(lambda self: self.made_for)


def marked(x):
    return getattr(x, "on_pretend_device", False)


class Mode(TorchFunctionMode):
    """See the top of this file. Inside __torch_function__ the mode is off, so that all tensors are plain there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == Tensor.device.__get__ and marked(args[0]):
            return DEVICE
        if func is Tensor.__iter__:  # an iterator's tensors would have no mark
            with self:
                return iter(args[0].unbind())
        if func is Tensor.__reduce_ex__:  # the mark would be saved
            return func(args[0].detach(), *args[1:])

        # The device that the call names, if any; the CPU takes its place.
        named = [x for x in (*(args[1:] if func is Tensor.to else ()), kwargs.get("device"))
                 if isinstance(x, (str, torch.device))]
        named = CPU if func is Tensor.cpu else torch.device(named[0]) if named else None
        if named == DEVICE:
            args = [CPU if isinstance(x, (str, torch.device)) else x for x in args]
            kwargs = kwargs | ({"device": CPU} if "device" in kwargs else {})

        inputs = tree_leaves((args, kwargs))
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        there = named == DEVICE if named else any(map(marked, tensors))  # whether the result is on the device
        if any((x.device == DEVICE) != there for x in inputs if isinstance(x, torch.Generator)):
            raise RuntimeError(f"{func.__name__}: the generator belongs to another device than the result")
        if any(map(marked, tensors)) and func not in TRANSFERS:
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError(f"can't convert a tensor of {DEVICE} to numpy")
            if not all(marked(x) or x.dim() == 0 for x in tensors):
                raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device")

        result = func(*args, **kwargs)
        if func == Tensor.data.__set__:
            args[0].on_pretend_device = marked(args[1])
        if isinstance(result, Tensor) and any(result is x for x in tensors):  # in place, or there was nothing to do
            if named is None or marked(result) == there:
                return result
            result = result.clone()
        for x in tree_leaves(result) if there else ():
            if isinstance(x, Tensor):
                x.on_pretend_device = True
                if x.dtype == torch.float64:
                    raise TypeError(f"{func.__name__}: the device has no float64")  # as on mps
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
