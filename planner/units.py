"""Bytes, seconds and counts: parsed, formatted and converted here and nowhere else."""

from __future__ import annotations

import re

from planner.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: int | str, what: str = "memory") -> int:
    """Bytes from ``8589934592``, ``"8GiB"`` or ``"8GB"``.

    Case matters: ``gb`` reads as gigabits in some tools, so it is refused rather than guessed.

    Raises:
        UsageError: not a size, an unknown unit, or not above zero.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise UsageError(f'{what}: {text!r} is not a size; give bytes or a text such as "8GiB".')
    if isinstance(text, int):
        value = text
    else:
        match = _SIZE.fullmatch(text)
        unit = match.group(2) if match else None
        if match is None or (unit and unit not in _BYTES):
            raise UsageError(f'{what}: {text!r} is not a size; write a number and a unit, such as "8GiB" or "12GB".')
        value = int(float(match.group(1)) * _BYTES[unit or "B"])
    if value <= 0:
        raise UsageError(f"{what}: {text!r} is not above zero.")
    return value


def format_bytes(value: float | None) -> str:
    """``"10.47 GiB"``; binary units, three or four significant figures; ``"?"`` when unknown."""
    if value is None:
        return "?"
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(value) >= size * (0.1 if unit == "GiB" else 1):
            return f"{value / size:.2f} {unit}" if unit == "GiB" else f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def format_seconds(value: float | None) -> str:
    """``"3.21 s"``, ``"48 ms"``, ``"12 min 5 s"``; ``"?"`` when unknown."""
    if value is None:
        return "?"
    if value >= 600:
        return f"{int(value // 60)} min {int(value % 60)} s"
    if value >= 100:
        return f"{value:.0f} s"
    if value >= 1:
        return f"{value:.2f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} µs"


def format_count(value: float, unit: str) -> str:
    """``"108.2 TFLOP"``: a decimal prefix and at most four figures."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"
