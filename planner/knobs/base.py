"""What a knob is. Adding an optimization means adding one file beside this one and naming it in ``__init__``.

A knob owns: the values it can take here, where they are refused and why, what they change physically, how they are
applied through diffusers' own API, and how they are undone exactly. Only ``apply`` may import torch or diffusers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from planner.facts import PipelineFacts
from planner.knobs.words import as_flag
from planner.recipe import Recipe
from planner.types import Device, KnobValue, Quality, Settings, Workload

Undo = Callable[[], None]
QUALITY_ORDER: tuple[Quality, ...] = ("exact", "lossless", "lossy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """All that a knob may look at when it decides: facts, never live modules."""

    facts: PipelineFacts
    device: Device
    workload: Workload
    quality: Quality = "lossless"
    usable: Mapping[str, str | None] = field(default_factory=dict)
    """Optional backend (``xformers``, ``torchao``, ``flash`` …) to None when usable, else the reason why it is not.
    A backend that is not listed is unknown and is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """``values`` of this knob cannot be used with ``other_values`` of ``other``."""

    values: frozenset[KnobValue]
    other: str
    other_values: frozenset[KnobValue]
    verdict: Literal["fails", "pointless", "wrong", "untested"]
    reason: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a knob is applied: the live pipeline and the torch device it will run on."""

    pipe: Any
    device: Any
    facts: PipelineFacts
    settings: Settings
    started: list[Undo] = field(default_factory=list)
    """Ways back of every change, registered before it begins: an interruption at any point finds them here."""


class Knob(ABC):
    """One optimization. Instances are stateless; ``Knob`` subclasses are registered in ``planner.knobs.KNOBS``."""

    name: ClassVar[str]
    stage: ClassVar[int]
    """Place in the apply order (ascending); undo runs in exact reverse."""
    credited: ClassVar[bool] = True
    """Whether the cost model knows a gain of it, in time or memory. Others lose to their default: used when the user fixes them."""
    conflicts: ClassVar[tuple[Conflict, ...]] = ()
    conditional: ClassVar[tuple[Conflict, ...]] = ()
    """What ``clash`` may answer with; where values are free text, words that describe them."""

    def order(self, settings: Settings) -> int:
        """Place in the apply order under these settings; ``stage`` unless another knob's value moves it."""
        return self.stage

    @abstractmethod
    def values(self, context: Context) -> tuple[KnobValue, ...]:
        """Values worth trying here, the default (pipeline left as it is) first. Never empty."""

    def quality(self, value: KnobValue, context: Context) -> Quality:
        """Least quality level at which ``value`` may be chosen."""
        return "exact"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        """Why this value cannot be used here whatever the other knobs say, or None. Covers user-fixed values too."""
        return None

    def check(self, value: KnobValue) -> KnobValue:
        """The value in canonical form, whatever the pipeline. Raises UsageError when the word can never be meant."""
        return value

    def settle(self, value: KnobValue, settings: Settings, context: Context) -> KnobValue:
        """The value that has the same effect and is simplest, given the others: a tile size without tiling is none."""
        return value

    def clash(self, value: KnobValue, settings: Settings, context: Context) -> Conflict | None:
        """A conflict that fixed value lists cannot express, or None."""
        return None

    @abstractmethod
    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        """The recipe with this value's physical effect."""

    @abstractmethod
    def apply(self, site: Site, value: KnobValue) -> Undo:
        """Put the value in force on the live pipeline; the result undoes it exactly. Raises ApplyError."""

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        """Plain diffusers statements that do the same to a variable ``pipe``."""
        return ()

    def statements(self, value: KnobValue, settings: Settings, context: Context) -> tuple[str, ...]:
        """``to_python`` where the other settings matter, too."""
        return self.to_python(value, context)


class Switch(Knob):
    """A knob that is on or off; off leaves the pipeline as it is unless the knob says otherwise."""

    def check(self, value: KnobValue) -> KnobValue:
        return as_flag(self.name, value)

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        return (False,) if self.refuse(True, context) else (False, True)
