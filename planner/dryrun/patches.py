"""What is changed process-wide while a session traces, and put back whatever happens."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

active = threading.local()
"""``active.session``: the session that traces in this thread; other threads see none and run as ever."""
_lock = threading.RLock()


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Route ``Module.__call__`` through the active session, as ``torch.fx`` does, and let autocast accept ``meta``."""
    with _lock:
        module_call, autocast_init = nn.Module.__call__, torch.autocast.__init__
        attention = nn.functional.scaled_dot_product_attention

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            session = getattr(active, "session", None)
            if session is None:
                return module_call(module, *args, **kwargs)
            return session.enter_module(module, module_call, args, kwargs)

        def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
            if device_type == "meta":
                autocast_init(self, "cpu", enabled=False)
            else:
                autocast_init(self, device_type, *args, **kwargs)

        def whole_attention(*args: Any, **kwargs: Any) -> Any:
            # Python functions of torch.nn.functional (multi-head attention) call it where no function mode can see it.
            session = getattr(active, "session", None)
            return attention(*args, **kwargs) if session is None else session.functions.attention(attention, args, kwargs)

        nn.Module.__call__, torch.autocast.__init__ = call, init
        nn.functional.scaled_dot_product_attention = whole_attention
        try:
            with _uncompiled():
                yield
        finally:
            nn.Module.__call__, torch.autocast.__init__ = module_call, autocast_init
            nn.functional.scaled_dot_product_attention = attention


def _uncompiled() -> Any:
    """Compiled functions, such as ``flex_attention``'s own, run as they are written. Nothing to do where no compiler is loaded."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep the cyclic garbage collector out: it would walk the whole model again and again, and end lifetimes at random."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave every random state as it was, and say nothing that a real run will say again."""
    from diffusers.utils import logging

    python, numpy_state, verbosity = random.getstate(), np.random.get_state(), logging.get_verbosity()
    logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            random.setstate(python)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """Run plain torch: nothing in the block is recorded."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield
