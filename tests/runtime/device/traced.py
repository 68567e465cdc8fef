"""Operations of a step, under what a CUDA graph allows: shapes that no value changes, and no word to the host."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HOST = ("_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "unique", "_unique2", "bincount", "equal",
        "resize_", "repeat_interleave.Tensor", "item", "is_nonzero", "histc")  # fmt: skip
"""What waits for a value or allocates by one; ``repeat_interleave`` with counts in a tensor."""


class GraphRules(TorchDispatchMode):
    """Refuses what a captured step may not do; ``seen`` has every operation with the shapes of what it gave."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in HOST or f"{name}.{func._overloadname}" in HOST:
            raise AssertionError(f"{func} asks the host")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8), f"{func} by a mask"
        out = func(*args, **(kwargs or {}))
        devices = {each.device.type for each in flat([args, kwargs or {}, out]) if each.dim()}
        assert len(devices) <= 1, f"{func} copies between {' and '.join(sorted(devices))}"
        self.seen.append((str(func), [tuple(each.shape) for each in flat(out)]))
        return out


def flat(value):
    """Tensors in what an operation took or gave."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in flat(each)] if isinstance(value, (list, tuple)) else []
