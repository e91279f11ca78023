"""The command line: parse, call, print. Results go to stdout, progress and warnings to stderr.

Exit codes: 0 done, 1 nothing fits, 2 usage, 3 machine or data fault. Only typer is imported before a command runs.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from planner import cli_options as option
from planner.errors import EXIT_FAULT, EXIT_OK, EXIT_USAGE, NoFeasiblePlan, PlannerError, UsageError

if TYPE_CHECKING:
    from planner.explain.compare import Spread

app = typer.Typer(
    name="planner",
    help="Find the fastest way to run a diffusers pipeline that fits your memory, and say why.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_RARELY = (50_000, 20, 20)
"""A command is short and imports much: the collector's usual pace was a fifth of a cold ``explain`` (7.0 s to 5.8 s of CPU time)."""
MOST_WORKERS = 8
"""Processes that a comparison uses at most: each that has to trace a model holds about 1 GiB of libraries."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code. One clear line per error; a traceback only with ``--debug``."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in given
    collected = gc.get_threshold()
    gc.set_threshold(*_RARELY)
    try:
        code = _guarded([word for word in given if word != "--debug"], debug)
    finally:
        gc.set_threshold(*collected)
    sys.exit(code)


def program() -> NoReturn:
    """:func:`main` as a process of its own: taking torch's half a million objects apart would add a second to a cold ``explain``."""
    code: object = EXIT_FAULT
    try:
        main()
    except SystemExit as left:
        code = left.code
    atexit._run_exitfuncs()  # what libraries registered: temporary files, workers, logs
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else EXIT_OK if code is None else EXIT_FAULT)


def _guarded(arguments: list[str], debug: bool) -> int:
    try:
        _quiet_libraries()
        result = app(args=arguments, prog_name="planner", standalone_mode=False)
        sys.stdout.flush()
        return int(result or EXIT_OK)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # `planner explain … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        return _fail(*_described(error))


def _described(error: Exception) -> tuple[str, int]:
    if isinstance(error, PlannerError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
        return f"{error.format_message().rstrip('.')}. `planner --help` shows the commands and options.", EXIT_USAGE
    if type(error).__name__ == "Abort":
        return "interrupted", 130
    kind = type(error).__name__
    return f"{kind}: {error}; this is a fault of the planner's, please report it with the output of --debug.", EXIT_FAULT


def _fail(message: str, code: int) -> int:
    print(f"planner: {' '.join(message.split())}", file=sys.stderr)
    return code


def _quiet_libraries() -> None:
    """Libraries below keep their own remarks to themselves unless the user asks for them; ours go to stderr as one line."""
    import logging

    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours = logging.getLogger("planner")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("planner: %(message)s"))
        ours.addHandler(handler)
        ours.propagate = False


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    if version:
        from planner import __version__

        print(f"planner {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


# -- planning ---------------------------------------------------------------------------------------------------------


@app.command("explain")
def explain_command(
    model: option.Model,
    gpu: option.Gpus = None,
    memory: option.Memory = None,
    host_memory: option.HostMemory = None,
    batch_size: option.BatchSize = 1,
    height: option.Height = None,
    width: option.Width = None,
    frames: option.Frames = None,
    steps: option.Steps = None,
    guidance: option.Guidance = None,
    quality: option.Quality = "lossless",
    objective: option.Objective = "latency",
    calls: option.Calls = None,
    fix: option.Fix = None,
    as_json: option.Json = False,
    html: option.Html = None,
    python: option.Python = False,
    verbose: option.Verbose = False,
) -> None:
    """The chosen plan, phase by phase, and why.

    Its estimate, what binds, the nearest alternatives, what was rejected and why.
    """
    from planner import cli_output as output

    request = {
        "memory": memory, "host_memory": host_memory, "quality": quality, "objective": objective, "calls": calls,
        "fix": _settings(fix), **_workload(batch_size, height, width, frames, steps, guidance),
    }  # fmt: skip
    cards = gpu or []
    if len(cards) > 1:
        _compare([model], cards, [request.pop("batch_size")], request, as_json, None, html)
        return
    plan = _plan(model, cards[0] if cards else None, request, as_json)
    if html is not None:
        from planner.explain.html import page

        output.write_file(html, page(plan))
    if as_json:
        output.emit(plan.to_json())
    elif python:
        output.emit(plan.to_python())
    else:
        from planner.explain.text import render

        output.emit(render(plan, verbose, output.terminal_width()))


def _plan(model: str, gpu: str | None, request: dict[str, Any], as_json: bool) -> Any:
    """The plan; what lacks when nothing fits goes to stdout, too, where JSON was asked for."""
    from planner.autoplan import explain
    from planner.cli_output import progress

    try:
        with progress() as say:
            say(f"planning {model}")
            return explain(model, gpu, **request)
    except NoFeasiblePlan as error:
        if as_json:
            from planner.cli_output import emit_json

            leanest = error.leanest.model_dump(mode="json") if error.leanest is not None else None
            missing = {"message": str(error), "leanest": leanest, "shortfall_bytes": error.shortfall_bytes}
            emit_json({"schema": "planner.nothing-fits/1", **missing})
        raise


@app.command("estimate")
def estimate_command(
    model: option.Model,
    settings: option.Set = None,
    gpu: option.Gpu = None,
    memory: option.Memory = None,
    host_memory: option.HostMemory = None,
    batch_size: option.BatchSize = 1,
    height: option.Height = None,
    width: option.Width = None,
    frames: option.Frames = None,
    steps: option.Steps = None,
    guidance: option.Guidance = None,
    as_json: option.Json = False,
    verbose: option.Verbose = False,
) -> None:
    """The estimate of one given combination.

    planner estimate MODEL --set KNOB=VALUE --set KNOB=VALUE ...
    """
    from planner import cli_output as output
    from planner.autoplan import estimate
    from planner.explain.text import render_estimate
    from planner.explain.words import settings_text
    from planner.targets import target_for
    from planner.units import parse_bytes

    chosen = _settings(settings)
    sizes = _workload(batch_size, height, width, frames, steps, guidance)
    host = parse_bytes(host_memory, "host memory") if host_memory is not None else None
    device = target_for(gpu, memory, host)
    result = estimate(model, gpu, chosen, memory=memory, **sizes)
    if as_json:
        named = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps, "guidance_scale": guidance}
        output.emit_json({
            "schema": "planner.estimate/1", "model": model, "device": device.model_dump(mode="json"), "settings": chosen,
            "workload": {"batch_size": batch_size, **named}, "predicted": result.model_dump(mode="json"),
            "alternatives": [], "rejected": [], "warnings": [],
        })  # fmt: skip
    else:
        line = settings_text(chosen, "as the pipeline is")
        output.emit(render_estimate(model, device, line, result, verbose, output.terminal_width()))


@app.command("compare")
def compare_command(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL...", help="Models; default: all bundled ones.")] = None,
    gpu: option.Gpus = None,
    batch_size: Annotated[list[int] | None, typer.Option("--batch-size", help="Images per call; may be repeated.")] = None,
    memory: option.Memory = None,
    host_memory: option.HostMemory = None,
    height: option.Height = None,
    width: option.Width = None,
    frames: option.Frames = None,
    steps: option.Steps = None,
    guidance: option.Guidance = None,
    quality: option.Quality = "lossless",
    objective: option.Objective = "latency",
    calls: option.Calls = None,
    fix: option.Fix = None,
    as_json: option.Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="The same as CSV.")] = False,
    html: option.Html = None,
) -> None:
    """What runs where: models x GPUs x batches.

    How fast, and with which plan. Without models: all bundled ones; without --gpu: all known ones.
    """
    request = {
        "memory": memory, "host_memory": host_memory, "quality": quality, "objective": objective, "calls": calls,
        "fix": _settings(fix), **_workload(1, height, width, frames, steps, guidance),
    }  # fmt: skip
    request.pop("batch_size")
    _compare(models, gpu, batch_size or [1], request, as_json, csv, html)


def _compare(models: list[str] | None, gpus: list[str] | None, batches: list[int], request: dict[str, Any], as_json: bool,
             csv: bool | None, html: Path | None) -> None:  # fmt: skip
    from planner import cli_output as output
    from planner.explain import compare

    with output.progress() as say, _workers(len(models) if models else MOST_WORKERS) as spread:
        rows = compare.compare(models, gpus, batches, say=say, spread=spread, **request)
    if html is not None:
        output.write_file(html, compare.render_html(rows))
    if as_json:
        output.emit_json(compare.to_data(rows))
    else:
        output.emit(compare.render_csv(rows) if csv else compare.render_text(rows, output.terminal_width()))


@contextmanager
def _workers(tasks: int) -> Iterator[Spread]:
    """``map``, over processes where there are several tasks and cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(tasks, cores, MOST_WORKERS)
    if count < 2:
        yield map
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(count, get_context("spawn"), _start_worker) as pool:
        yield pool.map


def _start_worker() -> None:
    """Ends without a word when the user interrupts; otherwise as the command itself."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.set_threshold(*_RARELY)
    _quiet_libraries()


@app.command("diff")
def diff_command(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A plan file.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another plan file.")],
    as_json: option.Json = False,
) -> None:
    """What differs between two plans.

    Their settings, and what the difference does to memory and time.
    """
    from planner import cli_output as output
    from planner.explain import diff
    from planner.plan import Plan

    found = diff.compare_plans(Plan.from_json(first), Plan.from_json(second))
    if as_json:
        output.emit_json(found.model_dump(mode="json", by_alias=True))
    else:
        output.emit(diff.render(found, output.terminal_width()))


# -- measuring --------------------------------------------------------------------------------------------------------


@app.command("calibrate")
def calibrate_command(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter probes.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Show what is stored for this device; probe nothing.")] = False,
    export: Annotated[Path | None, typer.Option("--export", metavar="FILE", help="Write what is stored to a file.")] = None,
    imported: Annotated[Path | None, typer.Option("--import", metavar="FILE", help="Store what --export wrote elsewhere.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cuda:1 or cpu; default: what is detected.")] = None,
    as_json: option.Json = False,
) -> None:
    """Probe this device and store the result."""
    from planner.cli_measure import calibrate

    calibrate(quick, show, export, imported, device, as_json)


@app.command("validate")
def validate_command(
    table: Annotated[Path, typer.Argument(metavar="CSV", help="A table of published measurements (calibration/published/).")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="One JSON line per row.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Predicted against measured (needs matplotlib).")] = None,
) -> None:
    """Predict a table of published numbers.

    Every row of a table in one of the two formats of calibration/published/; prints error statistics per metric and source.
    """
    from planner.cli_measure import validate

    validate(table, out, plot)


@app.command("check")
def check_command(
    file: option.PlanFile,
    model: Annotated[Path | None, typer.Option("--model", metavar="FOLDER", help="Pipeline folder in diffusers layout.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Build the plan's model here with random weights.")] = False,
    as_json: option.Json = False,
) -> None:
    """Run a plan here and compare.

    Applies it to a real pipeline on this machine, measures, and compares with its prediction.
    """
    from planner.cli_measure import check

    check(file, model, random_weights, as_json)


# -- this machine and the bundled data --------------------------------------------------------------------------------


@app.command("doctor")
def doctor_command(as_json: option.Json = False) -> None:
    """What was detected on this machine.

    Devices, memory, versions, which backends are usable and why the others are not.
    """
    from planner import cli_output as output
    from planner.explain import inventory
    from planner.hardware.doctor import doctor_report

    report = doctor_report()
    if as_json:
        output.emit_json({"schema": "planner.doctor/1", **report.model_dump(mode="json")})
    else:
        output.emit(inventory.render_doctor(report, output.terminal_width()))


@app.command("profiles")
def profiles_command(as_json: option.Json = False) -> None:
    """Bundled GPUs and models."""
    from planner import cli_output as output
    from planner.explain import inventory

    if as_json:
        output.emit_json(inventory.profiles_data())
    else:
        output.emit(inventory.render_profiles(output.terminal_width()))


# -- shared -----------------------------------------------------------------------------------------------------------


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    """``KNOB=VALUE`` pairs. Raises UsageError, also for a knob given twice with different values."""
    from planner.knobs import parse_setting, parse_settings

    chosen: dict[str, Any] = {}
    for name, value in map(parse_setting, pairs or ()):
        if chosen.setdefault(name, value) != value:
            raise UsageError(f"{name} is given twice, as {chosen[name]} and as {value}; give it once.")
    return parse_settings(chosen)


def _workload(batch_size: int, height: int | None, width: int | None, frames: int | None, steps: int | None,
              guidance: float | None) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments of a workload; what is None is left to the pipeline."""
    sizes = {"height": height, "width": width, "frames": frames, "steps": steps, "guidance": guidance}
    return {"batch_size": batch_size, **{name: value for name, value in sizes.items() if value is not None}}
