"""Modes of torch that count what makes the host and a device wait for each other."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostReads(TorchDispatchMode):
    """Counts the operations whose result, or its shape, the host needs."""

    KINDS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2")
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.KINDS
        return function(*args, **(kwargs or {}))


class Crossings(TorchDispatchMode):
    """Counts the operations whose tensors are on two devices."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        self.count += len({one.device.type for one in tensors}) > 1
        return result
