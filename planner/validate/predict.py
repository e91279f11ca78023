"""The planner's own answer to a table's row: dry run, recipe, estimate. A dry run imports torch; a cached one does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from planner.calibrate import Mode, calibration_for
from planner.cost.coefficients import Coefficients, default_coefficients
from planner.cost.estimate import estimate_of
from planner.cost.model import Cost, CostModel
from planner.cost.reserved import replayed
from planner.dryrun.provider import Traces
from planner.errors import HardwareError, UnsupportedPipeline
from planner.hardware.profiles import GpuProfile, device_from_profile, find_gpu, load_gpus
from planner.knobs import knob
from planner.knobs.base import Context
from planner.models import ModelSource, resolve
from planner.models.layout import Component
from planner.recipe import Recipe
from planner.targets import DRIVER_SHARE
from planner.types import Device, KnobValue, Workload
from planner.units import MIB
from planner.validate.case import Case, Prediction
from planner.validate.counters import value_from_estimate
from planner.validate.part import Part, part_of
from planner.validate.report import Predict

_NEAR = 0.07
"""Cards are named by nominal size; the profile's is what the driver reports, a few per cent less."""
_SCHEMES = {
    ("bitsandbytes", "int8dq"): "llm_int8",
    ("quanto", "int8wo"): "quanto_int8",
    ("quanto", "fp8wo"): "quanto_fp8",
    ("quanto", "int4wo"): "quanto_int4",
}
"""(library, scheme as the table's words give it) to the scheme of the cost model, where they differ."""

OLD_CONTEXT_BYTES, OLD_CONTEXT_BYTES_PER_SM = 700 * MIB, 15 * MIB // 2
"""CUDA 11 with cuDNN 8, whose kernels are all loaded, and stacks per multiprocessor. Fitted on what NVML showed above torch's
segments in the ONNX Runtime table at batch 1: 0.96 GiB on a T4 (40 SMs), 1.16 on an RTX 3060 (28), 1.5 on an A100 (108)."""
OLD_NHWC_SHARE = 0.65
"""What torch 2.0 reached of the rate of ``channels_last`` convolutions on an A100: in diffusers' torch 2.0 table the nightly build of
that month was 1.13 to 1.22 times as fast from batch 4 on, on an A100 alone; in NCHW 2.0 was as fast (the page's older table)."""
_SCHEMES_2024 = {"int8dq": "int8dq_2024", "int4wo": "int4wo_2024"}
"""Schemes whose kernels were others with torch 2.5 and older: torchao made int8 products of few rows on the host, and
compilers left its int4 kernel alone."""


def predictor(*, calibrate: Mode = "never") -> Predict:
    """A function that predicts rows. ``calibrate``: "never" uses shipped coefficients, else those stored for the device.

    Rows are predicted for the card they name, at its full size less the CUDA context.
    """
    return Predictor(calibrate).predict


@dataclass(slots=True)
class Predictor:
    """Prices rows, with traces and cost models shared between them."""

    calibrate: Mode = "never"
    fitted: dict[str, Coefficients] = field(default_factory=dict)
    """Card name to coefficients that replace the shipped ones."""
    _traces: dict[str, Traces] = field(default_factory=dict)
    _models: dict[object, CostModel] = field(default_factory=dict)

    def predict(self, case: Case) -> Prediction:
        """Raises PlannerError: the row's model, card or settings are none that the planner knows."""
        model, recipe = self.priced(case)
        cost = model.cost(recipe)
        estimate = estimate_of(model, recipe, cost)
        fits = estimate.fits and runs_on_card(model, recipe, cost, case.calls)
        return value_from_estimate(case, estimate.model_copy(update={"fits": fits}), model.device)

    def priced(self, case: Case) -> tuple[CostModel, Recipe]:
        """The cost model that prices a row, and the row's recipe. Raises PlannerError as :meth:`predict` does."""
        device = card(case)
        model = self._model(case, device)
        return model, recipe_of(case, model.traces.facts, device)

    def _model(self, case: Case, device: Device) -> CostModel:
        traces = self._part(case)
        coefficients = then(case, device, self.fitted.get(device.name) or self._coefficients(device))
        seen = (id(traces.source), traces.absent, traces.alone, traces.change, traces.stored)
        key = (*seen, device.name, device.total_bytes, coefficients.context_bytes)
        if key not in self._models:
            self._models[key] = CostModel(traces, device, coefficients, traces.workload.batch_size)
        elif self._models[key].coefficients != coefficients:
            self._models[key].coefficients = coefficients
            self._models[key].forget()
        return self._models[key]

    def _part(self, case: Case) -> Part:
        workload, inputs = call_of(case)
        key = repr((case.model, sorted(case.replaced.items()), workload, sorted(inputs.items())))
        if key not in self._traces:
            source = with_replaced(resolve(case.model), case.replaced)
            self._traces[key] = Traces.of(source, workload, inputs, dtype=None)
        return part_of(case, self._traces[key])

    def _coefficients(self, device: Device) -> Coefficients:
        if self.calibrate == "never":
            return default_coefficients(device)
        return calibration_for(device, mode=self.calibrate).coefficients


def then(case: Case, device: Device, coefficients: Coefficients) -> Coefficients:
    """The coefficients with what was otherwise when the row was measured."""
    version = case.torch_version or ""
    changed: dict[str, float] = {}
    if re.match(r"1\.|2\.0", version):
        changed["context_bytes"] = OLD_CONTEXT_BYTES + OLD_CONTEXT_BYTES_PER_SM * (device.sm_count or 0)
    nhwc = any(value is True for name, value in case.settings.items() if name.endswith("channels_last"))
    if re.match(r"2\.0", version) and device.compute_capability == (8, 0) and nhwc:
        changed["convolution_share"] = coefficients.convolution_share * OLD_NHWC_SHARE
    return coefficients.model_copy(update=changed) if changed else coefficients


# -- the card ---------------------------------------------------------------------------------------------------------


def card(case: Case) -> Device:
    """The card a row names, in the variant whose memory it states. Raises HardwareError."""
    if case.gpu is None:
        raise HardwareError("the row names no card.")
    profile = _variant(case.gpu, case.gpu_memory_bytes)
    device = device_from_profile(profile)
    context = default_coefficients(device).context_bytes
    return device.model_copy(update={"budget_bytes": device.total_bytes - context})


def _variant(name: str, memory_bytes: int | None) -> GpuProfile:
    try:
        found, _ = find_gpu(name)
    except HardwareError:
        found, _ = find_gpu(name.replace("-", " ").split()[0])
    if memory_bytes is None or _is_size(found, memory_bytes):
        return found
    form = next((word for word in ("PCIE", "SXM") if word in name.upper()), "")
    same = [gpu for gpu in load_gpus() if gpu.family == found.family and _is_size(gpu, memory_bytes)]
    return next((gpu for gpu in same if form in gpu.name.upper()), same[0] if same else found)


def _is_size(profile: GpuProfile, memory_bytes: int) -> bool:
    return abs(profile.total_bytes / memory_bytes - 1) < _NEAR


def runs_on_card(model: CostModel, recipe: Recipe, cost: Cost, calls: int) -> bool:
    """Whether that many calls go through on the whole card: holes between blocks in use count, as they do for torch.

    A convolution's workspace counts as needed. Torch tries other algorithms where it cannot be had (aten cudnn/Conv_v8.cpp,
    ``try_configs``), yet the published out-of-memory rows of a T4 are those that lack just that.
    """
    device = model.device
    if device.kind != "cuda":
        return True
    limit = round(device.total_bytes * (1 - DRIVER_SHARE)) - model.coefficients.context_bytes
    return replayed(model, recipe, cost, limit, calls=calls).short_bytes == 0


# -- the model and the call -------------------------------------------------------------------------------------------


def call_of(case: Case) -> tuple[Workload, dict[str, Any]]:
    """Workload and call arguments. ``image_size`` is the input picture's; ``prompt_tokens`` is not modelled."""
    workload, inputs = case.workload, dict(case.inputs)
    side = inputs.pop("image_size", None)
    inputs.pop("prompt_tokens", None)
    if side is not None:
        workload = workload.model_copy(update={"height": int(side), "width": int(side)})
    return workload, inputs


def with_replaced(source: ModelSource, replaced: Mapping[str, str]) -> ModelSource:
    """The model with components exchanged for another checkpoint.

    Raises:
        UnsupportedPipeline: a checkpoint other than the fp16-fix and the tiny VAE.
    """
    if not replaced or source.layout is None:
        return source
    exchanged = tuple(_exchange(part, replaced.get(part.name)) for part in source.layout.components)
    layout = replace(source.layout, components=exchanged)
    return replace(source, layout=layout, digest=layout.digest)


def _exchange(part: Component, checkpoint: str | None) -> Component:
    if checkpoint is None:
        return part
    if "fp16-fix" in checkpoint:
        config = {**part.files["config.json"], "force_upcast": False}
        return replace(part, files={**part.files, "config.json": config})
    if "tiny" in checkpoint.lower() or "taesd" in checkpoint:
        # The class's defaults are madebyollin/taesd's configuration.
        return replace(part, class_name="AutoencoderTiny", files={"config.json": {"_class_name": "AutoencoderTiny"}})
    raise UnsupportedPipeline(f"{part.name} from {checkpoint}: no configuration of that checkpoint is known.")


# -- the settings -----------------------------------------------------------------------------------------------------


def recipe_of(case: Case, facts: Any, device: Device) -> Recipe:
    """What the row's settings mean physically. They were run, so no rule of the planner forbids them."""
    context = Context(facts=facts, device=device, workload=case.workload, quality="lossy")
    plain = {name: value for name, value in case.settings.items() if "." not in name}
    weights = quantized(str(plain.pop("quantization", "none")), case.quantization_library, case.torch_version)
    recipe = _shaped(Recipe(weights=weights, settled=case.second_run), plain, context)
    own: dict[str, dict[str, KnobValue]] = {}
    for name, value in case.settings.items():
        component, dot, setting = name.partition(".")
        if dot and any(part.name == component for part in facts.components):
            own.setdefault(component, {})[setting] = value
    denoisers = {part.name for role in ("denoiser", "controlnet") for part in facts.of_role(role)}
    only = {name: _own_recipe(recipe, settings, name in denoisers, context) for name, settings in own.items()}
    return recipe.but(only=only)


def _own_recipe(recipe: Recipe, settings: Mapping[str, KnobValue], denoises: bool, context: Context) -> Recipe:
    base = recipe if denoises else recipe.but(fusion="none", cuda_graphs=False, autotuned=False)
    return _shaped(base, settings, context)


def _shaped(recipe: Recipe, settings: Mapping[str, KnobValue], context: Context) -> Recipe:
    for name, value in settings.items():
        each = knob(name)
        value = each.check(value)
        recipe = recipe.but(offload=value) if name == "offload" else each.shape(recipe, value, context)
    return recipe


def quantized(text: str, library: str | None, torch_version: str | None = None) -> dict[str, str]:
    """Component to the cost model's scheme: ``nf4``, ``llm_int8``, ``gguf_q8_0`` … are published but not the planner's own."""
    pairs = (item.partition("=") for item in text.split(",") if "=" in item)
    renamed = {name: _SCHEMES.get((library or "", scheme), scheme) for name, _, scheme in pairs}
    if library in ("torchao", None) and re.search(r"2024|\b2\.[0-5]\b", torch_version or ""):
        renamed = {name: _SCHEMES_2024.get(scheme, scheme) for name, scheme in renamed.items()}
    return renamed
