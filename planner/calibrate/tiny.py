"""A model so small that only its Python, its modules and the launching of its operations cost time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.calibrate.rebuild import RandomTensors, Runnable, rebuild
from planner.calibrate.signature import parse_signature

_WIDTH, _SIDE, _BLOCKS = 32, 4, 3


class TinyModel:
    """Residual convolution blocks and transformer blocks of diffusers, the ones most denoisers are made of."""

    def __init__(self, device: torch.device) -> None:
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.resnets = [ResnetBlock2D(in_channels=_WIDTH, temb_channels=_WIDTH).to(device).eval() for _ in range(_BLOCKS)]
            self.transformers = [BasicTransformerBlock(_WIDTH, 2, _WIDTH // 2, cross_attention_dim=_WIDTH).to(device).eval()
                                 for _ in range(_BLOCKS)]  # fmt: skip
            self.image = torch.rand(1, _WIDTH, _SIDE, _SIDE, device=device)
            self.embedding = torch.rand(1, _WIDTH, device=device)
            self.text = torch.rand(1, 8, _WIDTH, device=device)

    def run(self) -> torch.Tensor:
        """One forward. The caller switches gradients off."""
        image = self.image
        for resnet, transformer in zip(self.resnets, self.transformers, strict=True):
            image = resnet(image, self.embedding)
            tokens = image.flatten(2).transpose(1, 2)
            tokens = transformer(tokens, encoder_hidden_states=self.text)
            image = tokens.transpose(1, 2).reshape(image.shape)
        return image

    def run_evicting(self, evict: Callable[[], Any]) -> int:
        """One forward with ``evict()`` before every module that has no children; how often that was."""
        count = 0

        def before(module: Any, args: Any) -> None:
            nonlocal count
            count += 1
            evict()

        leaves = [part for block in (*self.resnets, *self.transformers) for part in block.modules() if not any(part.children())]
        hooks = [part.register_forward_pre_hook(before) for part in leaves]
        try:
            self.run()
        finally:
            for hook in hooks:
                hook.remove()
        return count

    def operations(self) -> tuple[int, list[Runnable]]:
        """How many operations a forward has, as a trace counts them, and each of them alone."""
        with torch.no_grad(), _Listener() as seen:
            self.run()
        random = RandomTensors(self.image.device)
        return len(seen.texts), [rebuild(parse_signature(text), random) for text in seen.texts]


class _Listener(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
    """Writes down what a trace would: every operation that makes new values, none of the views."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from planner.dryrun.operations import ALLOCATE_ONLY, signature_text

        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        view = not func._schema.is_mutable and any(given.alias_info is not None for given in func._schema.returns)
        if name.startswith("_scaled_dot_product"):
            tensors = [json.loads(signature_text(name, (one,), {}))[1][0] for one in args[:3]]
            self.texts.append(json.dumps(["attention", [*tensors, None], {}]))
        elif not view and name not in (*ALLOCATE_ONLY, "_unsafe_view", "lift_fresh"):
            self.texts.append(signature_text(func, args, kwargs))
        return out
