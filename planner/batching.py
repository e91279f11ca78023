"""Cutting one pipeline call into several: which arguments carry the batch, and how they are shared out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import gcd
from typing import Any

from planner.errors import UsageError

_COUNT = re.compile(r"num_[a-z]+_per_prompt")
"""Call arguments that multiply the batch, whatever is made: images, videos, waveforms, designs."""
_SAMPLES = ("prompt", "task_prompt", "prompt_embeds", "class_labels", "image_embeds", "image_embeddings", "image", "images", "video")
"""Arguments that say how many samples are asked for, the one that decides first."""
_NOT_SAMPLES = frozenset({
    "timesteps", "sigmas", "prior_timesteps", "decoder_timesteps", "original_size", "target_size", "crops_coords_top_left",
    "negative_original_size", "negative_target_size", "negative_crops_coords_top_left", "controlnet_conditioning_scale",
    "control_guidance_start", "control_guidance_end", "control_mode", "text_encoder_out_layers", "gligen_phrases", "gligen_boxes",
    "editing_prompt", "edit_guidance_scale", "callback_on_step_end_tensor_inputs", "token_indices", "pag_applied_layers",
})  # fmt: skip
"""Lists that hold something else than one entry per sample."""


def batch_argument_of(names: Iterable[str]) -> str | None:
    """The argument among ``names`` that multiplies the batch. Beside a prompt or image ``batch_size`` is how many run at once."""
    known = set(names)
    alone = "batch_size" in known and not {"prompt", "image"} & known
    return next((name for name in sorted(known) if _COUNT.fullmatch(name)), "batch_size" if alone else None)


def samples_in(inputs: Mapping[str, Any]) -> int | None:
    """Samples that the arguments list one by one (prompts, labels, embeddings, pictures); None where nothing says.

    ``batch_size`` does not multiply what is listed, it says how long the list is: then None.
    """
    if batch_argument_of(inputs) == "batch_size":
        return None
    for name in _SAMPLES:
        value: Any = inputs.get(name)
        if isinstance(value, str):
            return 1
        if isinstance(value, list | tuple) and name != "video":
            return len(value)
        if getattr(value, "ndim", 0) >= (5 if name == "video" else 4 if name.startswith("image") and "embed" not in name else 1):
            return int(value.shape[0])
    return None if any(inputs.get(name) is not None for name in _SAMPLES) else _rows(inputs)


def _rows(inputs: Mapping[str, Any]) -> int | None:
    """Rows that all tensors among the arguments have, where nothing tells better: prepared features of several samples."""
    rows = {int(value.shape[0]) for value in inputs.values() if getattr(value, "ndim", 0) > 1 and hasattr(value, "shape")}
    return rows.pop() if len(rows) == 1 else None


def share(inputs: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """``inputs`` of one call as inputs of ``parts`` equal calls whose outputs, one after the other, are in the call's own order.

    Lists and tensors with one entry per sample are cut; then a count argument is divided, where a call is left with one sample.
    Lists are copied, for some pipelines write into the prompts that they are given.

    Raises:
        UsageError: the batch does not divide that way, or an argument holds its rows where they cannot be cut.
    """
    inputs = own_lists(inputs)
    if parts == 1:
        return [inputs]
    argument = batch_argument_of(name for name, value in inputs.items() if value is not None)
    count = int(inputs[argument]) if argument else 1
    samples = samples_in(inputs) or 1
    cuts = gcd(samples, parts)
    rest = parts // cuts
    if count % rest or (rest > 1 and samples > cuts):
        batch = f"{samples} samples times {count}" if samples > 1 < count else f"{samples * count}"
        raise UsageError(f"a batch of {batch} does not split into {parts} equal calls; choose a divisor of {max(samples, count)}.")
    lengths = {samples, samples * count}
    unclear = sorted(name for name, value in inputs.items() if cuts > 1 and _holds_rows(name, value, lengths | {2 * samples * count}))
    if unclear:
        raise UsageError(f"a batch cannot be split where {unclear[0]!r} holds one row per sample inside a list or mapping.")
    pieces = _cut(inputs, cuts, lengths) if cuts > 1 else [dict(inputs)]
    if argument is None or rest == 1:
        return pieces
    names = None if argument == "batch_size" else ("generator", "latents")
    found = [small for piece in pieces for small in _cut(piece, rest, {count}, names)]
    return [piece | {argument: count // rest} for piece in found]


def own_lists(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with copies of all lists."""

    def own(value: Any) -> Any:
        return [own(item) for item in value] if type(value) is list else value

    return {name: own(value) for name, value in inputs.items()}


def longest_texts(inputs: Mapping[str, Any]) -> int:
    """Characters of the longest text in each argument, added up: a call pads its texts to the longest."""
    texts = ([value] if isinstance(value, str) else value for value in inputs.values() if isinstance(value, str | list | tuple))
    return sum(max((len(text) for text in found if isinstance(text, str)), default=0) for found in texts)


def _cut(inputs: Mapping[str, Any], parts: int, lengths: set[int], names: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    pieces: list[dict[str, Any]] = [dict(inputs) for _ in range(parts)]
    for name, value in inputs.items():
        length = _length(value)
        if length in lengths and length % parts == 0 and length > 1 and name not in _NOT_SAMPLES and (names is None or name in names):
            size = length // parts
            for index, piece in enumerate(pieces):
                piece[name] = value[index * size : (index + 1) * size]
    return pieces


def _holds_rows(name: str, value: Any, lengths: set[int]) -> bool:
    """Whether a container that is not itself cut has something inside with as many rows as there are samples (twice with guidance)."""
    if name in _NOT_SAMPLES or _length(value) in lengths or not isinstance(value, list | tuple | Mapping):
        return False
    return any(_length(item) in lengths for item in (value.values() if isinstance(value, Mapping) else value))


def _length(value: Any) -> int:
    if isinstance(value, list | tuple):
        return len(value)
    return int(value.shape[0]) if getattr(value, "ndim", 0) > 0 and hasattr(value, "shape") else 0
