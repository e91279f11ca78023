"""The commands that measure: `planner check`, `calibrate` and `validate`. Imported only when one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner import cli_output as output
from planner.errors import CalibrationError, UsageError, VerificationError
from planner.explain.layout import paragraph, table
from planner.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.plan import Plan
    from planner.types import Measurement

_INDENT = 11
_METRICS = ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "host_bytes", "latency_seconds", "step_seconds")
_NAMES = ("peak allocated", "peak reserved", "on the device", "host RAM", "a call", "a step")


def check(file: Path, folder: Path | None, random_weights: bool, as_json: bool) -> None:
    """`planner check`: apply a plan to a real pipeline, run it, print predicted beside measured.

    Raises:
        UsageError: no pipeline was named, or the plan is for another device.
        VerificationError: the plan ran and did not hold.
    """
    from planner import verify
    from planner.plan import Plan
    from planner.reference import reference_output

    plan = Plan.from_json(file)
    _require_device(plan)
    pipe = _pipeline(plan, folder, random_weights)
    with output.progress() as say:
        say("running the pipeline as it is, for comparison")
        reference = reference_output(plan, pipe, {})
        say("running it under the plan")
        with plan.apply(pipe):
            result = verify.check(plan, pipe, {}, reference)
    rows = comparison(plan, result.measurement)
    if as_json:
        output.emit_json({"schema": "planner.check/1", "plan": str(file), "failures": list(result.failures), "metrics": rows,
                          "measured": result.measurement.model_dump(mode="json")})  # fmt: skip
    else:
        output.emit(render_check(plan, rows, result.measurement.note))
    if result.failures:
        raise VerificationError(f"the plan did not hold: {'; '.join(result.failures)}. Plan again on this machine: planner.autoplan(pipe).")


def comparison(plan: Plan, seen: Measurement) -> list[dict[str, Any]]:
    """Each measured counter beside its prediction; ``error`` is predicted over measured, less one."""
    rows = []
    for name in _METRICS:
        measured, predicted = getattr(seen, name), getattr(plan.predicted, name)
        if measured is None or predicted is None:
            continue
        low, high = getattr(plan.predicted, f"{name}_low"), getattr(plan.predicted, f"{name}_high")
        error = predicted / measured - 1 if measured else None
        rows.append({"metric": name, "predicted": predicted, "low": low, "high": high, "measured": measured, "error": error,
                     "inside": low <= measured <= high})  # fmt: skip
    return rows


def render_check(plan: Plan, rows: list[dict[str, Any]], note: str | None) -> str:
    """The comparison as text."""
    from planner.explain.words import plan_line

    width = output.terminal_width() or 100
    lines = [*paragraph("model", f"{plan.model} ({plan.pipeline_class}) on {plan.device.name}", width, _INDENT)]
    lines += [*paragraph("plan", plan_line(plan), width, _INDENT), ""]
    cells = [("", "predicted", "measured", "error", "in the interval")]
    for row in rows:
        show = format_seconds if row["metric"].endswith("_seconds") else format_bytes
        error = "" if row["error"] is None else f"{row['error'] * 100:+.0f} %"
        name = _NAMES[_METRICS.index(row["metric"])]
        cells.append((name, show(row["predicted"]), show(row["measured"]), error, "yes" if row["inside"] else "no"))
    return "\n".join([*lines, *table(cells, width), *(["", note] if note else [])]) + "\n"


def _require_device(plan: Plan) -> None:
    from planner.hardware.detect import detect_device

    if plan.device.kind not in ("cpu", "cuda"):
        raise UsageError(f"the plan is for {plan.device.name} ({plan.device.kind}), which cannot be run on from here.")
    here = detect_device(plan.device.kind)
    if here.name != plan.device.name:
        output.remark(f"the plan is for {plan.device.name}, this is {here.name}: its times are not comparable.")


def _pipeline(plan: Plan, folder: Path | None, random_weights: bool) -> Any:
    """The real pipeline: a local folder's, or the plan's model built here with random weights."""
    if folder is not None and random_weights:
        raise UsageError("--model and --random-weights exclude each other; give one.")
    if folder is not None:
        return _loaded(plan, folder)
    if not random_weights:
        raise UsageError(
            f"a pipeline is needed to check the plan on: --model FOLDER with {plan.model} in diffusers layout, or --random-weights "
            "to build it here (memory and time are those of the real weights; the pictures mean nothing)."
        )
    return _random(plan)


def _loaded(plan: Plan, folder: Path) -> Any:
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"{folder}: no model_index.json; give a pipeline's folder in diffusers layout.")
    import diffusers
    import torch

    name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(str(plan.baseline.get("dtype")))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=getattr(torch, name) if name else None)
    if type(pipe).__name__ != plan.pipeline_class:
        raise UsageError(f"{folder} holds a {type(pipe).__name__}, the plan is for {plan.pipeline_class}.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _random(plan: Plan) -> Any:
    """The plan's model from its configs, every weight drawn anew. Raises UsageError where it would not fit into host RAM."""
    from planner.hardware.host import host_memory
    from planner.models import resolve

    source = resolve(plan.model)
    if source.digest != plan.digest:
        raise UsageError(f"{plan.model} is not what it was when the plan was made; plan again, then check the new plan.")
    pipe = source.build(dtype=str(plan.baseline["dtype"]) if "dtype" in plan.baseline else None)
    needed, free = _meta_bytes(pipe), host_memory().free_bytes
    if needed > 0.8 * free:
        raise UsageError(f"{plan.model} has {format_bytes(needed)} of weights, but only {format_bytes(free)} of host RAM are free.")
    fill_meta(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _modules(pipe: Any) -> list[Any]:
    import torch

    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def _meta_bytes(pipe: Any) -> int:
    found = {id(tensor): tensor.nbytes for part in _modules(pipe) for tensor in (*part.parameters(), *part.buffers()) if tensor.is_meta}
    return sum(found.values())


def fill_meta(pipe: Any) -> None:
    """Give every weight on ``meta`` a value that keeps activations finite: matrices random, scales one, biases zero.

    Tied weights stay tied. A safety checker's thresholds become one, which no picture exceeds.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(0)
    made: dict[int, Any] = {}
    for part in _modules(pipe):
        part.eval()
        for module in part.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None and tensor.is_meta:
                        if id(tensor) not in made:
                            made[id(tensor)] = _filled(name, tensor, generator)
                        store[name] = made[id(tensor)]


def _filled(name: str, tensor: Any, generator: Any) -> Any:
    import torch

    drawn = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if drawn.is_floating_point() and drawn.ndim > 1:
        drawn.normal_(0.0, 0.5 / max(tensor[0].numel(), 1) ** 0.5, generator=generator)
    elif drawn.is_floating_point() and not name.endswith("bias"):
        drawn.fill_(1.0)
    return torch.nn.Parameter(drawn, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else drawn


# -- calibrate and validate -------------------------------------------------------------------------------------------


def calibrate(quick: bool, show: bool, export: Path | None, imported: Path | None, device: str | None, as_json: bool) -> None:
    """`planner calibrate`: probe, or show, export or import what is stored for the device that is here.

    Raises:
        UsageError: two of the actions at once.
        HardwareError: the device cannot be probed.
        CalibrationError: a file that is no calibration, or of another device.
    """
    from planner.calibrate import Store, calibrate, device_key
    from planner.hardware.detect import detect_device

    if sum((show, export is not None, imported is not None, quick)) > 1:
        raise UsageError("--quick, --show, --export and --import exclude each other; give one.")
    here, store = detect_device(device), Store()
    key = device_key(here)
    if export is not None:
        store.export(key, export)
        output.remark(f"wrote {export}")
    elif imported is not None:
        store.import_(imported, key)
        output.remark(f"stored what {imported} holds")
    elif not show:
        with output.progress() as say:
            calibrate(here, quick, say, store=store)
    contents = store.load(key)
    if show and not (contents.runs or contents.samples):
        raise CalibrationError(f"nothing is stored for {here.name} with this driver and torch; run: planner calibrate")
    if as_json:
        output.emit_json({"schema": "planner.calibration-summary/1", **_stored(contents, here.name), "file": str(store.path(key))})
    else:
        output.emit(render_stored(_stored(contents, here.name)))


def _stored(contents: Any, name: str) -> dict[str, Any]:
    runs = [
        {"id": run.id, "date": run.date, "complete": run.complete, "operations": len(run.samples), "unstable": list(run.unstable())}
        for run in contents.runs
    ]
    return {"device": name, "runs": runs, "operations": len(contents.samples), "observations": len(contents.observations)}


def render_stored(stored: dict[str, Any]) -> str:
    """What is stored for one device, as text; unstable measurements as warnings."""
    width = output.terminal_width() or 100
    lines = paragraph("device", stored["device"], width, _INDENT)
    kept = f"{stored['operations']} operations timed for pipelines, {stored['observations']} checked runs"
    lines += paragraph("stored", f"{len(stored['runs'])} probe runs, {kept}", width, _INDENT)
    rows = [("run", "date", "operations", "")]
    rows += [(run["id"], run["date"], str(run["operations"]), "" if run["complete"] else "interrupted") for run in stored["runs"]]
    if len(rows) > 1:
        lines += ["", *table(rows, width, left=(0, 1, 3))]
    unstable = stored["runs"][-1]["unstable"] if stored["runs"] else []
    if unstable:
        names = f"{len(unstable)} measurements of the last run scatter too much, among them {unstable[0]}"
        lines += ["", *paragraph("warning", f"{names}; close other programs, then run: planner calibrate", width, _INDENT)]
    return "\n".join(lines) + "\n"


def validate(file: Path, out: Path | None, plot: Path | None) -> None:
    """`planner validate`: predict every row of a table and print error statistics."""
    from planner.validate import render_text, run
    from planner.validate.predict import predictor

    with output.progress() as say:
        say(f"predicting the rows of {file.name}")
        report = run(file, predictor(), out=out, plot_path=plot)
    output.emit(render_text(report))
