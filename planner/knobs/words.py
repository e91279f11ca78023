"""Reading knob values as users write them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from planner.errors import UsageError
from planner.types import KnobValue

_TRUE, _FALSE = frozenset({"true", "yes", "on", "1"}), frozenset({"false", "no", "off", "0"})


def as_flag(name: str, value: KnobValue) -> bool:
    """True or false. Raises UsageError otherwise."""
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise UsageError(f"{name}={value}: wanted true or false.")


def as_count(name: str, value: KnobValue, least: int = 1) -> int:
    """A whole number of at least ``least``. Raises UsageError otherwise."""
    try:
        number = int(value) if not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or number < least:
        raise UsageError(f"{name}={value}: wanted a whole number of at least {least}.")
    return number


def as_word(name: str, value: KnobValue, words: Iterable[str]) -> str:
    """One of ``words``. Raises UsageError with the nearest ones otherwise."""
    known = list(words)
    if isinstance(value, str) and value in known:
        return value
    raise UsageError(f"{name}={value}: no such value; {nearest(str(value), known)}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean a, b`` or the whole list when nothing is near."""
    known = list(known)
    close = get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}" if close else f"known are {', '.join(known)}"
