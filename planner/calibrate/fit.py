"""From probe runs to coefficients of one device. Robust, and the same for the same runs in any order. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.calibrate.samples import Run, Sample
from planner.calibrate.signature import ITEM_BYTES, Operation, flops_of, parse_signature, weight_bytes
from planner.cost.coefficients import Coefficients
from planner.cost.kernels import compute_seconds, moving_seconds
from planner.dryrun.trace import DTYPE_CODES, CallTrace, Floats, Kind, columns_from_rows
from planner.recipe import Recipe
from planner.types import Device

_KIND = {"mm": Kind.MATMUL, "addmm": Kind.MATMUL, "bmm": Kind.MATMUL, "convolution": Kind.CONVOLUTION, "attention": Kind.ATTENTION,
         "add": Kind.POINTWISE, "copy_": Kind.COPY}  # fmt: skip
_SHARE_OF = {Kind.MATMUL: "matmul_share", Kind.CONVOLUTION: "convolution_share", Kind.ATTENTION: "attention_share"}
_SHARE_RANGE, _KERNEL_RANGE = (0.005, 1.5), (1e-8, 1e-2)
_ASSUMED_RATES = tuple(name for name in ("pointwise_per_flop",) if name in Coefficients.model_fields)
_SCALE = 0.1
"""Residuals (of the logarithm) beyond this count linearly, not squared: one in ten wild timings does not move the fit."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients and how well they explain the probes they come from."""

    coefficients: Coefficients
    samples: int
    median_residual: float
    """Median of abs(ln(predicted / measured))."""


def fit_coefficients(runs: Iterable[Run], device: Device, base: Coefficients) -> Fit:
    """Coefficients of ``device`` from its probe runs; what no probe tells stays as in ``base``, with its own source.

    Device time of a kernel is modelled as in :mod:`planner.cost.kernels`; its shares are found by least squares on the
    logarithm of time with a soft-L1 loss, host and link figures are medians. Runs with other threads than the newest are left out.

    Raises:
        CalibrationError: no run has a usable probe.
    """
    from planner.errors import CalibrationError

    chosen = _comparable(sorted(runs, key=lambda run: (run.date, run.id)))
    measured = _medians(chosen)
    if not measured and not any(run.rates for run in chosen):
        raise CalibrationError(f"no run of {device.name} has a usable probe; run planner calibrate without other load.")
    # Sums and copies of this very device were timed: no assumption about how fast it issues pointwise work is needed.
    changes: dict[str, float | None] = {name: None for name in _ASSUMED_RATES if measured}
    base = base.model_copy(update=changes)
    residuals = np.zeros(0)
    if measured:
        fitted_shares, residuals = _fit_kernels(measured, device, base)
        changes |= fitted_shares
    changes |= _host_figures(chosen, device, changes.get("kernel_seconds") or base.kernel_seconds)
    middle = float(np.median(np.abs(residuals))) if len(residuals) else 0.0
    told = f"measured: runs {', '.join(run.id for run in chosen)[:300]}; n = {len(measured)}"
    told = f"{told}; median residual {100 * math.expm1(middle):.1f} %"
    sources = base.sources | dict.fromkeys(changes, told)
    fitted = Coefficients.model_validate(
        base.model_dump() | changes | {"basis": "measured" if measured else base.basis, "sources": sources}
    )
    return Fit(fitted, len(measured), middle)


def _comparable(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.threads == runs[-1].threads]


def _medians(runs: Sequence[Run]) -> list[tuple[Operation, float]]:
    """Each operation once, with the median over runs; unstable samples count only where there is no stable one."""
    found: dict[str, list[Sample]] = {}
    for run in runs:
        for sample in run.samples:
            if sample.repetitions:
                found.setdefault(sample.signature, []).append(sample)
    out = []
    for text in sorted(found):
        stable = [sample for sample in found[text] if not sample.unstable] or found[text]
        try:
            operation = parse_signature(text)
        except ValueError:
            continue
        if operation.base in _KIND:
            out.append((operation, statistics.median(sample.seconds or 0.0 for sample in stable)))
    return out


# -- kernels --------------------------------------------------------------------------------------------------------


def kernel_seconds(call: CallTrace, device: Device, coefficients: Coefficients, recipe: Recipe) -> Floats:
    """Device time per operation as :func:`planner.cost.kernels.call_time` sums it, without probes and fusion."""
    memory, serial = moving_seconds(call, device, coefficients, recipe)
    compute = compute_seconds(call, device, coefficients, recipe, None)
    return np.asarray(np.maximum(compute, memory) + serial + coefficients.kernel_seconds)


def _calls(measured: Sequence[tuple[Operation, float]]) -> list[tuple[CallTrace, Recipe, Floats]]:
    """Probes as the cost model sees operations: one call per memory format, with the logarithms of the seconds."""
    out = []
    for variant in ("", "channels_last"):
        chosen = [(operation, seconds) for operation, seconds in measured if operation.variant == variant]
        if chosen:
            call = call_of([operation for operation, _ in chosen])
            out.append((call, Recipe(channels_last=bool(variant)), np.log([seconds for _, seconds in chosen])))
    return out


def _fit_kernels(measured: Sequence[tuple[Operation, float]], device: Device, base: Coefficients) -> tuple[dict[str, float], Floats]:
    from scipy.optimize import least_squares

    kinds = {_KIND[operation.base] for operation, _ in measured}
    names = (*(share for kind, share in _SHARE_OF.items() if kind in kinds), "bandwidth_share", "kernel_seconds")
    calls = _calls(measured)

    def residuals(values: Floats) -> Floats:
        tried = base.model_copy(update=dict(zip(names, np.exp(values).tolist(), strict=True)))
        return np.concatenate([np.log(kernel_seconds(call, device, tried, recipe)) - seen for call, recipe, seen in calls])

    ranges = [_KERNEL_RANGE if name == "kernel_seconds" else _SHARE_RANGE for name in names]
    low, high = (np.log([limits[side] for limits in ranges]) for side in (0, 1))
    start = np.clip(np.log([max(getattr(base, name), 1e-9) for name in names]), low + 1e-6, high - 1e-6)
    solved = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=_SCALE, x_scale=1.0)
    values = dict(zip(names, np.exp(solved.x).tolist(), strict=True))
    return {name: float(f"{value:.4g}") for name, value in values.items()}, residuals(solved.x)


def call_of(operations: Sequence[Operation]) -> CallTrace:
    """The operations as if one component call had made them."""
    columns = {name: np.zeros(len(operations), dtype=empty.dtype) for name, empty in columns_from_rows([]).items()}
    for index, operation in enumerate(operations):
        row = _row(operation)
        for name in columns.keys() & row.keys():
            columns[name][index] = row[name]
        columns["shape"][index] = index
    return CallTrace("probe", "forward", columns, ("",), tuple(operation.text for operation in operations), 0, 0)


def _row(operation: Operation) -> dict[str, float]:
    """Columns of :class:`CallTrace`; what is not named here is zero."""
    kind, specs = _KIND[operation.base], operation.tensors()
    read = sum(spec.storage_bytes for spec in specs)
    write = _output_elements(operation) * ITEM_BYTES[operation.dtype]
    if operation.base == "copy_":
        read -= specs[0].storage_bytes
    named = {"kind": int(kind), "dtype": DTYPE_CODES[operation.dtype], "flops": flops_of(operation), "read_bytes": read,
             "write_bytes": write, "param_bytes": weight_bytes(operation), "fused_read_bytes": read, "fused_write_bytes": write,
             "fused_head": 1, "times": 1}  # fmt: skip
    return named | {f"d{place}": value for place, value in enumerate(_dims(operation, kind))}


def _output_elements(operation: Operation) -> int:
    specs = [spec for spec in operation.tensors() if spec.shape]
    if operation.base == "addmm":
        return specs[1].shape[0] * specs[2].shape[-1]
    if operation.base in ("mm", "bmm"):
        return math.prod(specs[0].shape[:-1]) * specs[1].shape[-1]
    if operation.base == "convolution":
        return specs[0].shape[0] * specs[1].shape[0] * _out_spatial(operation)
    return math.prod(specs[0].shape)


def _out_spatial(operation: Operation) -> int:
    """Output elements per channel: (side + 2 pad - dilation (kernel - 1) - 1) / stride + 1 per dimension."""
    image, weight, _, stride, pad, dilation = operation.args[:6]
    sides = zip(image.shape[2:], weight.shape[2:], stride, pad, dilation, strict=True)
    return math.prod((side + 2 * p - d * (kernel - 1) - 1) // s + 1 for side, kernel, s, p, d in sides)


def _dims(operation: Operation, kind: Kind) -> tuple[int, ...]:
    """As ``CallTrace.dims`` describes, by kind."""
    specs = operation.tensors()
    if kind is Kind.MATMUL:
        left, right = specs[-2:]
        return (left.shape[0] if len(left.shape) == 3 else 1, left.shape[-2], right.shape[-1], left.shape[-1], 0, 0, 0, 0)
    if kind is Kind.CONVOLUTION:
        image, weight = specs[:2]
        groups = operation.args[8]
        return (image.shape[0], image.shape[1], _out_spatial(operation), weight.shape[0], math.prod(weight.shape[2:]), groups,
                math.prod(operation.args[3]), len(image.shape) - 2)  # fmt: skip
    if kind is Kind.ATTENTION:
        query, key, value = specs[:3]
        mask = specs[3].storage_bytes if len(specs) > 3 else 0
        return (query.shape[0], query.shape[1], query.shape[2], key.shape[2], query.shape[3], value.shape[3], mask, key.shape[1])
    return (0,) * 8


# -- host and link --------------------------------------------------------------------------------------------------


def _host_figures(runs: Sequence[Run], device: Device, kernel: float) -> dict[str, float]:
    """Medians of the host's and the link's rates. On a CPU the host's time per operation is part of the kernel's."""
    per_unit = rates_of(runs)
    out: dict[str, float] = {}
    if "picture" in per_unit:
        out["picture_bytes_per_second"] = 1 / per_unit["picture"]
    if device.kind == "cpu" and "python" in per_unit:
        out |= {"kernel_seconds": min(kernel + per_unit["python"], 1.0), "launch_seconds": 0.0}
    elif "launch" in per_unit and device.kind != "cpu":
        out["launch_seconds"] = min(per_unit["launch"], 1.0)
    for coefficient, prefix in (("link_share", "pinned"), ("pageable_share", "pageable")):
        both = [1 / per_unit[f"{prefix}_to_{end}"] for end in ("device", "host") if f"{prefix}_to_{end}" in per_unit]
        if both and device.link_bytes_per_second:
            share = statistics.harmonic_mean(both) / device.link_bytes_per_second
            out[coefficient] = min(max(share, _SHARE_RANGE[0]), _SHARE_RANGE[1])
    return {name: float(f"{value:.4g}") for name, value in out.items()}


def rates_of(runs: Iterable[Run]) -> dict[str, float]:
    """Rate name to the median over quiet runs of its seconds per unit; without a quiet run the least that any showed."""
    known = list(runs)
    quiet = [run for run in known if run.quiet]
    found: dict[str, list[float]] = {}
    for run in quiet or known:
        for rate in run.rates:
            found.setdefault(rate.name, []).append(rate.seconds_per_unit if quiet else rate.least_per_unit)
    return {name: statistics.median(values) if quiet else min(values) for name, values in found.items()}


__all__ = ["Fit", "call_of", "fit_coefficients", "kernel_seconds", "rates_of"]
