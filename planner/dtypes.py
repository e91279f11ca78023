"""What ``dtype`` says: one floating type for all components, another for single ones: ``bf16``, ``bf16,vae=fp32``, ``vae=fp32``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from planner.errors import UsageError
from planner.types import DTYPES


@dataclass(frozen=True, slots=True)
class Dtypes:
    """``base`` for every component that ``parts`` does not name; None leaves those as they are."""

    base: str | None
    parts: Mapping[str, str] = field(default_factory=dict)

    def of(self, component: str, now: str) -> str:
        """The dtype that a component gets which has ``now``."""
        return self.parts.get(component) or self.base or now

    @property
    def text(self) -> str:
        """The canonical spelling: what the base says already is left out, the rest sorted."""
        parts = [f"{name}={dtype}" for name, dtype in sorted(self.parts.items()) if dtype != self.base]
        return ",".join([self.base, *parts] if self.base else parts)


@lru_cache(maxsize=256)
def parse_dtypes(text: str) -> Dtypes:
    """Read ``DTYPE``, ``COMPONENT=DTYPE`` or both, separated by commas. Raises UsageError."""
    base: str | None = None
    parts: dict[str, str] = {}
    for item in text.split(","):
        name, equals, dtype = (word.strip() for word in item.partition("="))
        dtype = dtype if equals else name
        again = name in parts if equals else base is not None
        if dtype not in DTYPES or again or not name:
            raise UsageError(f"dtype={text}: write {', '.join(DTYPES)}, or COMPONENT=DTYPE, or both as in bf16,vae=fp32; each once.")
        if equals:
            parts[name] = dtype
        else:
            base = dtype
    return Dtypes(base, parts)
