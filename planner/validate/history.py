"""What earlier releases did otherwise, where a published number shows it. The planner itself follows the installed ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from planner.dryrun.trace import CallTrace, Ints, Kind
from planner.facts import ComponentFacts, Leaf
from planner.units import MIB
from planner.validate.case import Case

_BEFORE_CACHE_PASSING = re.compile(r"0\.(?:2\d|30|31)\b|2024")
_WHOLE_MODELS = re.compile(r"2024|\b2\.[0-5]\b|\b0\.(?:2\d|30|31)\b")
LONG_LIVED = 8
"""Operations that a storage must outlive the module call that made it, to count as kept for the next chunk."""


def cogvideox_kept_one_cache(case: Case) -> bool:
    """Until diffusers 0.32 CogVideoX's VAE kept each convolution's last frames in the module; since, in a dictionary that is
    passed from chunk to chunk, so that the old one and the new one live side by side (PR #9781)."""
    return case.pipeline_class.startswith("CogVideoX") and bool(_BEFORE_CACHE_PASSING.search(case.diffusers_version or ""))


def layers_reached(case: Case) -> Callable[[ComponentFacts], ComponentFacts] | None:
    """How a row's library saw the modules that the class keeps in fp32 (T5's ``wo``), where the planner's schemes see them otherwise.

    Through 2024 scripts handed a whole loaded model to torchao or quanto, which reached every linear layer. Since, models are
    quantized while loading (diffusers 0.32, ``TorchAoConfig``, ``QuantoConfig``), and transformers passes those modules by.
    """
    if case.quantization_library not in ("torchao", "quanto"):
        return None
    if _WHOLE_MODELS.search(f"{case.source} {case.torch_version} {case.diffusers_version}"):
        reached = case.quantization_library == "torchao" and case.settings.get("dtype") != "fp16"
        return with_all_layers if reached else None
    return with_kept_layers if case.quantization_library == "quanto" else None


def with_all_layers(component: ComponentFacts) -> ComponentFacts:
    """No module is passed by. Facts read in fp16 count kept modules at 4 bytes, which the row's dtype does not."""
    halved = component.dtype == "fp16" and component.keep_in_fp32
    leaves = tuple(_halved(leaf) if halved and _is_kept(component, leaf) else leaf for leaf in component.leaves)
    saved = sum(leaf.bytes for leaf in component.leaves) - sum(leaf.bytes for leaf in leaves)
    changed = {"keep_in_fp32": (), "leaves": leaves, "weight_bytes": component.weight_bytes - saved}
    return component.model_copy(update=changed)


def _is_kept(component: ComponentFacts, leaf: Leaf) -> bool:
    return bool(set(component.keep_in_fp32) & set(leaf.path.split(".")))


def _halved(leaf: Leaf) -> Leaf:
    return leaf.model_copy(update={"bytes": leaf.bytes // 2, "linear_weight_bytes": leaf.linear_weight_bytes // 2})


def with_kept_layers(component: ComponentFacts) -> ComponentFacts:
    """Modules that the class keeps in fp32 have no weight that may be quantized."""
    leaves = tuple(leaf.model_copy(update={"linear_weight_bytes": 0}) if _is_kept(component, leaf) else leaf
                   for leaf in component.leaves)  # fmt: skip
    return component.model_copy(update={"leaves": leaves})


def with_one_cache(call: CallTrace) -> CallTrace:
    """The call with each kept slice freed when the same module makes the next one, not when the whole chunk is done.

    The same change gave the scale of a spatial norm a name, which keeps it until the norm returns.
    """
    spans = call.spans.copy()
    for uids in _kept_slices(call).values():
        for first, second in pairwise(uids):
            spans[first, 1] = min(spans[first, 1], spans[second, 0])
    for uid, end in _scales(call):
        spans[uid, 1] = min(spans[uid, 1], end)
    saved = np.zeros(len(call) + 1, dtype=np.int64)
    np.add.at(saved, spans[:, 1], spans[:, 2])
    np.subtract.at(saved, call.spans[:, 1], spans[:, 2])
    return replace(call, columns={**call.columns, "live_bytes": call.live_bytes - np.cumsum(saved)[:-1]}, spans=spans)


def _kept_slices(call: CallTrace) -> dict[int, list[int]]:
    """Copies that outlive their module's call by far, by module, in the order they were made."""
    found: dict[int, list[int]] = {}
    for uid, (start, end, size) in enumerate(call.spans.tolist()):
        if start < len(call) and call.kind[start] == Kind.COPY and size >= MIB // 64 and _leaves(call.module, start, end):
            found.setdefault(int(call.module[start]), []).append(uid)
    return {key: uids for key, uids in found.items() if len(uids) > 1}


def _scales(call: CallTrace) -> Iterator[tuple[int, int]]:
    """Storages that a spatial norm multiplies with, and the operation after that product."""
    paths = {path: number for number, path in enumerate(call.modules)}
    for uid, (start, _, _) in enumerate(call.spans.tolist()):
        path = call.modules[call.module[start]] if start < len(call) else ""
        if path.endswith(".conv_y.conv"):
            norm = paths.get(path.removesuffix(".conv_y.conv"), -1)
            products = np.flatnonzero((call.module[start:] == norm) & (call.kind[start:] == Kind.POINTWISE))
            if len(products):
                yield uid, start + int(products[0]) + 1


def _leaves(module: Ints, start: int, end: int) -> bool:
    return end - start > LONG_LIVED and bool((module[start + 1 : end] != module[start]).sum() > LONG_LIVED)
