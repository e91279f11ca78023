"""All knobs in apply order, and the questions that the search, the command line and plan files ask about them."""

from __future__ import annotations

from planner.errors import UsageError
from planner.knobs.attention import Attention
from planner.knobs.base import Conflict, Context, Knob, Site, Undo
from planner.knobs.batch_split import BatchSplit
from planner.knobs.cache import Cache
from planner.knobs.channels_last import ChannelsLast
from planner.knobs.chunked_forward import ChunkedForward
from planner.knobs.compile import Compile
from planner.knobs.dtype import Dtype
from planner.knobs.fuse_qkv import FuseQkv
from planner.knobs.offload import Offload, OffloadBlocks, OffloadDisk, OffloadStream
from planner.knobs.offload_keep import OffloadKeep
from planner.knobs.precision import CudnnBenchmark, Tf32
from planner.knobs.quantization import Quantization
from planner.knobs.scheduler import Scheduler, Steps
from planner.knobs.vae import VaeSlicing, VaeTile, VaeTiling
from planner.knobs.words import nearest
from planner.types import KnobValue, Settings

_ALL: tuple[Knob, ...] = (
    Tf32(),
    CudnnBenchmark(),
    Scheduler(),
    Steps(),
    BatchSplit(),
    Dtype(),
    FuseQkv(),
    Quantization(),
    ChannelsLast(),
    ChunkedForward(),
    Attention(),
    Compile(),
    Offload(),
    OffloadStream(),
    OffloadBlocks(),
    OffloadDisk(),
    OffloadKeep(),
    Cache(),
    VaeSlicing(),
    VaeTiling(),
    VaeTile(),
)
KNOBS: tuple[Knob, ...] = tuple(sorted(_ALL, key=lambda each: each.stage))
_BY_NAME = {each.name: each for each in KNOBS}
Violation = tuple[str, KnobValue, str, str]
"""Knob, its value, the reason, and where that is known from."""

__all__ = [
    "KNOBS",
    "Conflict",
    "Context",
    "Knob",
    "Site",
    "Undo",
    "Violation",
    "conflict_between",
    "defaults",
    "knob",
    "normalize",
    "parse_setting",
    "parse_settings",
    "to_python",
    "violations",
]


def knob(name: str) -> Knob:
    """The knob of that name. Raises UsageError with the nearest names when there is none."""
    if name not in _BY_NAME:
        raise UsageError(f"no knob is called {name!r}; {nearest(name, _BY_NAME)}.")
    return _BY_NAME[name]


def parse_setting(text: str) -> tuple[str, KnobValue]:
    """``"offload=model"`` or ``"vae.dtype=fp32"`` as name and value, checked. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals or not value.strip():
        raise UsageError(f"{text!r}: write KNOB=VALUE, such as offload=model.")
    plain, spelled = _of_component(name.strip(), value.strip())
    checked = knob(plain).check(spelled)
    return name.strip(), checked if plain == name.strip() else value.strip()


def parse_settings(settings: Settings) -> dict[str, KnobValue]:
    """Settings from a caller or a file: known knobs, values in canonical form. Raises UsageError.

    ``component.knob`` is read as part of the knob's own value: ``vae.dtype: fp32`` beside ``dtype: bf16`` is
    ``dtype: bf16,vae=fp32``.
    """
    found: dict[str, KnobValue] = {}
    for given, value in settings.items():
        if "." not in given:
            found[given] = knob(given).check(value)
    for given, value in settings.items():
        if "." in given:
            name, part = _of_component(given, value)
            before = found.get(name, "none")
            found[name] = knob(name).check(part if before == "none" else f"{before},{part}")
    return found


BY_COMPONENT = ("dtype", "quantization")
"""Knobs whose value may differ from component to component."""


def _of_component(name: str, value: KnobValue) -> tuple[str, KnobValue]:
    """``vae.dtype`` and ``fp32`` as ``dtype`` and ``vae=fp32``; a plain name as it is. Raises UsageError."""
    component, dot, plain = name.rpartition(".")
    if not dot:
        return name, value
    if plain not in BY_COMPONENT:
        known = knob(plain).name
        raise UsageError(f"{known} cannot be set for {component} alone; {' and '.join(BY_COMPONENT)} can.")
    return plain, f"{component}={value}"


def defaults(context: Context) -> dict[str, KnobValue]:
    """Every knob at the value that leaves the pipeline as it is."""
    return {each.name: each.values(context)[0] for each in KNOBS}


def normalize(settings: Settings, context: Context) -> dict[str, KnobValue]:
    """Every knob named, values in canonical form, options without effect at their defaults.

    Raises:
        UsageError: an unknown knob, or a value that no pipeline could take.
    """
    full = defaults(context) | parse_settings(settings)
    return {each.name: each.settle(full[each.name], full, context) for each in KNOBS}


def violations(settings: Settings, context: Context) -> list[Violation]:
    """Why these settings cannot be used here: refusals and conflicts of normalized settings. Empty: they can."""
    full = normalize(settings, context)
    found: list[Violation] = []
    for each in KNOBS:
        value = full[each.name]
        refusal = each.refuse(value, context)
        if refusal is not None:
            found.append((each.name, value, refusal, f"{each.name} knob"))
        conflict = each.clash(value, full, context)
        if conflict is not None:
            found.append(_described(each.name, value, conflict, full))
        for fixed in each.conflicts:
            if value in fixed.values and full.get(fixed.other) in fixed.other_values:
                found.append(_described(each.name, value, fixed, full))
    return found


def to_python(settings: Settings, context: Context) -> tuple[str, ...]:
    """Plain diffusers statements, in apply order, that do the same to a variable ``pipe``."""
    full = normalize(settings, context)
    ordered = sorted(KNOBS, key=lambda each: each.order(full))
    return tuple(line for each in ordered for line in each.statements(full[each.name], full, context))


def conflict_between(name: str, value: KnobValue, other: str, other_value: KnobValue) -> Conflict | None:
    """The fixed conflict between two values, whichever knob declares it, or None."""
    for here, its, there, theirs in ((name, value, other, other_value), (other, other_value, name, value)):
        for fixed in knob(here).conflicts:
            if fixed.other == there and its in fixed.values and theirs in fixed.other_values:
                return fixed
    return None


def _described(name: str, value: KnobValue, conflict: Conflict, full: Settings) -> Violation:
    reason = f"with {conflict.other}={full[conflict.other]}: {conflict.reason} ({conflict.verdict})"
    return name, value, reason, conflict.source
