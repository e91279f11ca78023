"""Cutting one pipeline call into several: which arguments carry the batch, and how they are shared out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import UsageError

BATCH_ARGUMENTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "num_audios_per_prompt", "batch_size")
"""Call arguments that multiply the batch, under all the names that diffusers has for them."""


def share(inputs: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """``inputs`` of one call as inputs of ``parts`` equal calls.

    A count argument is divided where it divides; otherwise lists and tensors as long as the list of prompts are cut.

    Raises:
        UsageError: the batch does not divide.
    """
    if parts == 1:
        return [dict(inputs)]
    for name in BATCH_ARGUMENTS:
        count = inputs.get(name)
        if isinstance(count, int) and count >= parts and count % parts == 0:
            generators = inputs.get("generator")
            rest = _cut(inputs, count, parts, ("generator",)) if isinstance(generators, list) else [dict(inputs) for _ in range(parts)]
            return [piece | {name: count // parts} for piece in rest]
    length = _batch_length(inputs)
    if length is None:
        return [dict(inputs) for _ in range(parts)]
    if length % parts:
        raise UsageError(f"a batch of {length} does not split into {parts} equal calls; choose a divisor of {length}.")
    return _cut(inputs, length, parts, tuple(inputs))


def _batch_length(inputs: Mapping[str, Any]) -> int | None:
    prompt = inputs.get("prompt")
    if isinstance(prompt, list | tuple):
        return len(prompt)
    embeds = inputs.get("prompt_embeds")
    return int(embeds.shape[0]) if embeds is not None and getattr(embeds, "ndim", 0) > 0 else None


def _cut(inputs: Mapping[str, Any], length: int, parts: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    size = length // parts
    pieces = []
    for index in range(parts):
        window = slice(index * size, (index + 1) * size)
        pieces.append({name: value[window] if name in names and _spans(value, length) else value for name, value in inputs.items()})
    return pieces


def _spans(value: Any, length: int) -> bool:
    if isinstance(value, list | tuple):
        return len(value) == length
    return getattr(value, "ndim", 0) > 0 and hasattr(value, "shape") and value.shape[0] == length
