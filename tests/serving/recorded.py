"""What a CUDA graph is, on the CPU: operations that are recorded once and done again on the same memory."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__",
}  # fmt: skip


class Recorded(TorchDispatchMode):
    """Records what is done under it; ``replay`` does it again, with no Python of the recorded code.

    A number that was read by the host, a tensor that was made elsewhere, is what it was when it was recorded.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot wait for a number"
        out = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if writes or any(x.untyped_storage().data_ptr() not in given for x in tree_leaves(out)):  # else it is a view
            self.operations.append((func, args, kwargs, out))
        return out

    def replay(self):
        with torch.inference_mode():
            for func, args, kwargs, recorded in self.operations:
                for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and new is not old:
                        old.copy_(new)


class NothingIsRead(TorchFunctionMode):
    """The host reads no tensor but these."""

    def __init__(self, on_host):
        super().__init__()
        self.on_host = {x.untyped_storage().data_ptr() for x in on_host}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in HOST_READS and isinstance(args[0], torch.Tensor):
            known = args[0].untyped_storage().data_ptr() in self.on_host
            assert known, f"{func.__name__}() of a tensor on the device waits for it"
        return func(*args, **(kwargs or {}))
