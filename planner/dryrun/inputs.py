"""The arguments of one pipeline call: the user's own, the workload's sizes, and stand-ins for what neither gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from planner.batching import batch_argument_of, samples_in
from planner.errors import UnsupportedPipeline, UsageError
from planner.types import Workload

PROMPT = "a photograph of an astronaut riding a horse"
_SIZES = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
_IMAGES = ("image", "mask_image", "control_image", "init_image", "source_image", "conditioning_image", "original_image", "input_image",
           "image_reference", "reference_image", "last_image", "video", "adapter_image", "depth_map", "image_pair", "control_mask",
           "control_video", "conditioning_frames")  # fmt: skip
"""Arguments that a call may need though their default is None."""
_VIDEO_FRAMES = 17
"""Of a stand-in video where the call does not say: 4 and 8 frames a latent, and one, as video autoencoders want them."""


def call_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Parameters of the pipeline's ``__call__``."""
    return inspect.signature(type(pipe).__call__).parameters


def batch_argument(pipe: Any) -> str | None:
    """The call argument that multiplies the batch, if there is one."""
    return batch_argument_of(call_parameters(pipe))


def batch_of(pipe: Any, inputs: Mapping[str, Any]) -> int:
    """Samples that these arguments ask for: prompts (or labels, embeddings, pictures) times images per prompt."""
    argument = batch_argument(pipe)
    return (samples_in(inputs) or 1) * (int(inputs.get(argument) or 1) if argument else 1)


def complete_workload(pipe: Any, workload: Workload, inputs: Mapping[str, Any]) -> Workload:
    """The workload with what the user's own arguments say. Raises UsageError where both speak and disagree."""
    found: dict[str, Any] = {}
    for name in _SIZES:
        asked, given = getattr(workload, name), inputs.get(name)
        if asked is not None and isinstance(given, int | float) and asked != given:
            raise UsageError(f"{name}: the workload says {asked}, inputs say {given}; give it once.")
        if asked is None and isinstance(given, int | float) and not isinstance(given, bool):
            found[name] = given
    return workload.model_copy(update=found | {"batch_size": _batch(pipe, workload.batch_size, inputs)})


def _batch(pipe: Any, asked: int, inputs: Mapping[str, Any]) -> int:
    given = batch_of(pipe, inputs)
    argument = batch_argument(pipe)
    if asked in (1, given):
        return given
    if argument is None and given == 1 and {"prompt", "class_labels"} & set(call_parameters(pipe)):
        return asked
    if argument is not None and inputs.get(argument) is None and asked % given == 0:
        return asked
    what = f"the inputs ask for {given}" if given > 1 else f"{type(pipe).__name__} has no argument that makes more than one"
    raise UsageError(f"batch_size {asked} cannot be had: {what}. Pass a list of prompts of that length, or leave batch_size out.")


_NEEDED: dict[tuple[type, frozenset[str]], tuple[bool, bool]] = {}
"""What calls of a class turned out to need besides the arguments that say what to make: a prompt, pictures. Known after a dry run."""


def _asked(pipe: Any, inputs: Mapping[str, Any]) -> tuple[type, frozenset[str]]:
    return type(pipe), frozenset(name for name, value in inputs.items() if _says_what(name, value))


def remember_needs(pipe: Any, inputs: Mapping[str, Any], with_prompt: bool, with_images: bool) -> None:
    """Later calls with arguments of these names get the same stand-ins: a plan is checked with the call that was traced."""
    _NEEDED[_asked(pipe, inputs)] = with_prompt, with_images


def speaks(inputs: Mapping[str, Any]) -> bool:
    """Whether the arguments say what to make: a prompt, a picture, embeddings, latents; not only how."""
    return any(_says_what(name, value) for name, value in inputs.items())


def _says_what(name: str, value: Any) -> bool:
    if name.startswith("negative"):
        return False
    if isinstance(value, list | tuple):
        return any(_says_what(name, item) for item in value)
    if isinstance(value, str):
        return "prompt" in name
    return isinstance(value, Mapping) or hasattr(value, "shape") or hasattr(value, "getpixel")


def call_arguments(
    pipe: Any, workload: Workload, inputs: Mapping[str, Any], with_images: bool | None = None, with_prompt: bool | None = None
) -> dict[str, Any]:
    """Arguments for one call of ``pipe``.

    ``with_images`` also fills image arguments that have a default of None; ``with_prompt`` gives a prompt even where the
    arguments say what to make without one. None: as an earlier dry run found that such a call needs.

    Raises:
        UsageError: the workload has a size that this pipeline's call does not take.
        UnsupportedPipeline: a required argument that no stand-in is known for.
    """
    parameters = call_parameters(pipe)
    arguments = dict(inputs)
    needs = _NEEDED.get(_asked(pipe, inputs), (not speaks(inputs), False))
    with_prompt, with_images = (need if given is None else given for given, need in zip((with_prompt, with_images), needs, strict=True))
    for name in _SIZES:
        value = getattr(workload, name)
        if value is not None and name not in arguments:
            if name not in parameters:
                if name in ("height", "width"):
                    continue  # the size then comes from the image that the call gets
                raise UsageError(f"{type(pipe).__name__} takes no {name}; leave it out.")
            arguments[name] = value
    _add_prompt(pipe, parameters, workload, arguments, with_prompt)
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if name in arguments or name == "self":
            continue
        if (name in _IMAGES and with_images) or (required and name.rpartition("_")[2] in ("image", "video", "frames")):
            arguments[name] = _picture(pipe, name, workload)
        elif required and name.endswith("_prompt"):
            arguments[name] = PROMPT
        elif required and name == "class_labels":
            arguments[name] = [0] * workload.batch_size
        elif required:
            raise UnsupportedPipeline(f"{type(pipe).__name__} needs {name!r} and no stand-in for it is known; pass inputs={{'{name}': …}}.")
    return arguments


def _add_prompt(pipe: Any, parameters: Mapping[str, Any], workload: Workload, arguments: dict[str, Any], wanted: bool | None) -> None:
    argument = batch_argument(pipe)
    given = batch_of(pipe, arguments)
    has_prompt = any(name.startswith("prompt") for name in arguments) or ("image_embeds" in arguments and "prompt" not in parameters)
    required = "prompt" in parameters and parameters["prompt"].default is inspect.Parameter.empty
    if "prompt" in parameters and not has_prompt and (wanted or required):
        arguments["prompt"] = PROMPT if argument or workload.batch_size == 1 else [PROMPT] * workload.batch_size
        given = batch_of(pipe, arguments)
    if argument and given != workload.batch_size and workload.batch_size % max(given, 1) == 0:
        arguments[argument] = workload.batch_size // given * int(arguments.get(argument) or 1)
    elif not argument and given != workload.batch_size and isinstance(arguments.get("prompt"), str):
        arguments["prompt"] = [arguments["prompt"]] * workload.batch_size


def _picture(pipe: Any, name: str, workload: Workload) -> Any:
    from PIL import Image

    width, height = picture_size(pipe, workload)
    mode = "L" if "mask" in name else "RGB"
    picture = Image.new(mode, (width, height), 255 if mode == "L" else (127, 127, 127))
    parameters = call_parameters(pipe)
    if name.endswith(("video", "frames")):
        usual = parameters["num_frames"].default if "num_frames" in parameters else None
        return [picture] * (workload.num_frames or (usual if isinstance(usual, int) and name != "video" else _VIDEO_FRAMES))
    nets = getattr(getattr(pipe, "controlnet", None), "nets", ())
    return [picture] * len(nets) if nets and name == ("control_image" if "control_image" in parameters else "image") else picture


def picture_size(pipe: Any, workload: Workload) -> tuple[int, int]:
    side = _default_side(pipe)
    return workload.width or side[0], workload.height or side[1]


def _default_side(pipe: Any) -> tuple[int, int]:
    parameters = call_parameters(pipe)
    defaults = [parameters[name].default if name in parameters else None for name in ("width", "height")]
    width, height = defaults
    if isinstance(width, int) and isinstance(height, int):
        return width, height
    sample = getattr(pipe, "default_sample_size", None)
    if sample is None:
        denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        sample = getattr(getattr(denoiser, "config", None), "sample_size", None)
    factor = getattr(pipe, "vae_scale_factor", 8)
    if not isinstance(sample, int) or not isinstance(factor, int):
        return 512, 512
    upscales = "Upscale" in type(pipe).__name__
    return (sample, sample) if upscales else (sample * factor, sample * factor)
