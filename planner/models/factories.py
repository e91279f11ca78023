"""Construction of modules without memory: big and random tensors on ``meta``, small computed ones real.

``torch.device("meta")`` alone would also take the values of masks, position tables and drop-path schedules, which
some models read back while they are built or run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from planner.errors import ProfileError

REAL_ELEMENTS = 1 << 16
"""Largest tensor that keeps values: 256 KiB in fp32, far below any weight that matters."""
MAX_TENSORS = 250_000
"""Tensors one component may create; the largest mixture-of-experts models have some 50,000."""


_QUERIES = frozenset({"__get__", "_set_grad_enabled", "dim", "size", "is_contiguous", "numel"})
"""What asks of a tensor or switches gradients: by far the most calls, none makes a tensor."""


@contextmanager
def hybrid_factories(max_elements: int) -> Iterator[None]:
    """Within: ``torch.empty``/``rand*`` make ``meta`` tensors, other tensors go there above REAL_ELEMENTS.

    Raises:
        ProfileError: more than ``max_elements`` elements or MAX_TENSORS tensors were asked for.
    """
    with _mode(max_elements):
        yield


def _mode(max_elements: int) -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    random = {torch.empty, torch.randn, torch.rand, torch.randint, torch.normal, torch.empty_strided}
    filled = {torch.zeros, torch.ones, torch.full}

    class Hybrid(TorchFunctionMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.tensors = self.elements = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func.__name__ in _QUERIES:
                return func(*args, **kwargs)
            if _is_filling(func):
                target = args[0] if args else kwargs.get("tensor")
                if isinstance(target, torch.Tensor) and target.device.type == "meta":
                    return target
            if func in random or func in filled:
                return self.create(func, args, dict(kwargs))
            if _is_large(args) or _is_large(kwargs.values()):
                return func(*_lift_all(args), **_lift_all(kwargs))
            try:
                return func(*args, **kwargs)
            except (RuntimeError, NotImplementedError, ValueError):
                if not _has_meta((args, kwargs)):
                    raise
                return func(*_lift_all(args), **_lift_all(kwargs))

        def create(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if kwargs.get("device") is not None:
                return func(*args, **kwargs)
            probe = func(*_lift_all(args), **{**_lift_all(kwargs), "device": "meta"})
            self.tensors += 1
            self.elements += probe.numel()
            if self.tensors > MAX_TENSORS or self.elements > max_elements:
                raise ProfileError(
                    f"building stopped at {self.tensors} tensors and {self.elements} elements; "
                    f"at most {MAX_TENSORS} and {max_elements} are built."
                )
            return probe if func in random or probe.numel() > REAL_ELEMENTS else func(*args, **kwargs)

    return Hybrid()


def _is_filling(func: Any) -> bool:
    """Writes values only, which a ``meta`` tensor does not have."""
    fills = ("uniform_", "normal_", "fill_", "zero_", "copy_")
    return func.__name__ in fills or getattr(func, "__module__", None) == "torch.nn.init"


def _map(value: Any, change: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(item, change) for item in value)
    return value


def _is_large(values: Any) -> bool:
    """Whether an operand is large or already on ``meta``, or a product of small ones would be large."""
    import torch

    product, large = 1, False
    for value in values:
        for item in value if type(value) in (list, tuple) else (value,):
            if isinstance(item, torch.Tensor):
                product *= max(1, item.numel())
                large = large or item.device.type == "meta" or item.numel() > REAL_ELEMENTS
    return large or product > REAL_ELEMENTS**2 // 256


def _lift_all(value: Any) -> Any:
    return _map(value, lambda t: t.to("meta"))


def _has_meta(value: Any) -> bool:
    found = False

    def look(tensor: Any) -> Any:
        nonlocal found
        found = found or tensor.device.type == "meta"
        return tensor

    _map(value, look)
    return found
