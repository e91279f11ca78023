"""The command line as outside checks see it: output, exit codes, one line per error."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import planner
from planner import cli
from planner.errors import HardwareError, NoFeasiblePlan, UsageError
from planner.plan import Plan
from planner.units import parse_bytes

from .golden.cases import alternative, estimate, offloaded, untouched

COMMANDS = ("explain", "estimate", "compare", "diff", "calibrate", "validate", "check", "doctor", "profiles")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def planned(monkeypatch: pytest.MonkeyPatch, answer: Any) -> dict[str, Any]:
    """Put ``answer`` in the place of planning; what was asked is recorded in the result."""
    asked: dict[str, Any] = {}

    def explain(model: str, gpu: str | None = None, **request: Any) -> Any:
        asked.update(model=model, gpu=gpu, **request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(importlib.import_module("planner.autoplan"), "explain", explain)
    return asked


# -- start and help ---------------------------------------------------------------------------------------------------


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh process has after running ``code``."""
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "diffusers", "transformers", "numpy", "scipy", "pydantic", "rich", "matplotlib", "networkx", "huggingface_hub"}


TYPERS_OWN = {"pydantic"}
"""typer reads a command's options with pydantic where it is installed."""


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import planner", set()),
        ("from planner import cli", set()),
        ("from planner import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass", set()),
        ("from planner import cli\ntry: cli.main(['explain', '--help'])\nexcept SystemExit: pass", TYPERS_OWN),
        ("from planner import cli\ntry: cli.main(['explain'])\nexcept SystemExit: pass", TYPERS_OWN),
    ],
    ids=["import", "cli", "help", "command help", "usage error"],
)
def test_start_loads_nothing_heavy(code: str, allowed: set[str]) -> None:
    assert loaded_after(code) & HEAVY <= allowed


@pytest.mark.parametrize(
    "code",
    ["from planner import Plan, Workload, Estimate", "from planner import cli\ncli._settings(['offload=model'])"],
    ids=["types", "settings"],
)
def test_types_and_settings_need_no_torch(code: str) -> None:
    assert loaded_after(code) & {"torch", "diffusers", "transformers"} == set()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert [name for name in COMMANDS if not re.search(rf"^  {name} ", out, re.MULTILINE)] == []
    assert run(capsys)[1] == out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Usage: planner" in out


def test_explain_has_the_agreed_options(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "explain", "--help")[1]
    for option in ("--gpu", "--memory", "--host-memory", "--batch-size", "--height", "--width", "--frames", "--steps", "--guidance",
                   "--quality", "--objective", "--calls", "--fix", "--json", "--html", "--python", "-v"):  # fmt: skip
        assert re.search(rf"(^|\s){re.escape(option)}[ ,]", out), option


def test_version_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"planner {planner.__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", "planner", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"planner {planner.__version__}\n"


@pytest.mark.parametrize(("typed", "offered"), [("planner exp", {"explain"}), ("planner explain --hei", {"--height"})])
def test_shells_complete_commands_and_options(typed: str, offered: set[str]) -> None:
    asked = {"_PLANNER_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    command = [sys.executable, "-c", "from planner.cli import program; program()"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == offered, done.stderr


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["explain"], 2, "Missing argument"),
        (["explain", "m", "--batch-size", "many"], 2, "--batch-size"),
        (["explain", "m", "--colour"], 2, "No such option"),
        (["explain", "m", "--fix", "offload"], 2, "write KNOB=VALUE"),
        (["explain", "m", "--fix", "ofload=model"], 2, "did you mean offload"),
        (["explain", "m", "--fix", "offload=modle"], 2, "did you mean model"),
        (["explain", "m", "--fix", "offload=model", "--fix", "offload=none"], 2, "offload is given twice"),
        (["diff", "nowhere.json", "nowhere.json"], 3, "nowhere.json: cannot be read"),
        (["check", "nowhere.json"], 3, "nowhere.json: cannot be read"),
        (["validate", "nowhere.csv"], 2, "nowhere.csv"),
        (["calibrate", "--quick", "--show"], 2, "exclude each other"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    got, out, err = run(capsys, *words)
    assert (got, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1
    assert err.startswith("planner: ")
    assert "Traceback" not in err


def test_a_fault_shows_its_traceback_only_with_debug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, ZeroDivisionError("over the top"))
    code, _, err = run(capsys, "explain", "m")
    assert (code, err.count("\n")) == (3, 1)
    assert "ZeroDivisionError: over the top" in err
    code, _, err = run(capsys, "explain", "m", "--debug")
    assert code == 3
    assert "Traceback" in err


def test_machine_faults_and_interruption_have_their_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, HardwareError("no such card"))
    assert run(capsys, "explain", "m")[0] == 3
    monkeypatch.setattr(cli, "app", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert run(capsys, "explain", "m")[::2] == (130, "planner: interrupted\n")


def test_nothing_fits_is_exit_code_one_and_data_with_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, NoFeasiblePlan("nothing fits", leanest=alternative({"offload": "sequential"}, 4.0, 240.0), shortfall_bytes=7))
    code, out, err = run(capsys, "explain", "m")
    assert (code, out, err) == (1, "", "planner: nothing fits\n")
    code, out, err = run(capsys, "explain", "m", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["shortfall_bytes"] == 7
    assert found["leanest"]["settings"]["offload"] == "sequential"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m planner profiles --json | head -c 100"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


# -- explain, in every form -------------------------------------------------------------------------------------------


def test_options_reach_the_planner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = planned(monkeypatch, offloaded())
    words = ("--gpu", "T4", "--memory", "8GiB", "--host-memory", "9GiB", "--batch-size", "3", "--height", "512", "--width", "768",
             "--frames", "9", "--steps", "20", "--guidance", "4.5", "--quality", "lossy", "--objective", "memory", "--calls", "7",
             "--fix", "offload=none", "--fix", "vae_tiling=yes")  # fmt: skip
    assert run(capsys, "explain", "sdxl", *words)[0] == 0
    assert asked == {
        "model": "sdxl", "gpu": "T4", "memory": "8GiB", "host_memory": "9GiB", "batch_size": 3, "height": 512, "width": 768, "frames": 9,
        "steps": 20, "guidance": 4.5, "quality": "lossy", "objective": "memory", "calls": 7,
        "fix": {"offload": "none", "vae_tiling": True},
    }  # fmt: skip


def test_text_json_and_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planned(monkeypatch, offloaded())
    code, out, err = run(capsys, "explain", "m")
    assert (code, out, err) == (0, offloaded().explain(), "")
    assert run(capsys, "explain", "m", "-v")[1] == offloaded().explain(verbose=True)
    code, out, err = run(capsys, "explain", "m", "--json")
    assert Plan.from_json(out) == offloaded()
    agreed = {"schema", "model", "device", "workload", "settings", "predicted", "alternatives", "rejected", "warnings"}
    assert agreed <= json.loads(out).keys()
    code, out, err = run(capsys, "explain", "m", "--html", str(tmp_path / "a.html"))
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")
    assert err == f"planner: wrote {tmp_path / 'a.html'}\n"
    assert run(capsys, "explain", "m", "--html", str(tmp_path / "no" / "a.html"))[0] == 2


def test_colour_only_on_a_terminal_that_wants_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from planner import cli_output

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    cli_output.emit(offloaded().explain())
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli_output.emit(offloaded().explain())
    coloured = capsys.readouterr().out
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == offloaded().explain()
    monkeypatch.setenv("NO_COLOR", "1")
    cli_output.emit(offloaded().explain())
    assert "\x1b" not in capsys.readouterr().out


def test_several_cards_are_compared(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, offloaded())
    code, out, _ = run(capsys, "explain", "stable-diffusion-xl", "--gpu", "T4", "--gpu", "A100")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["stable-diffusion-xl", "GPU", "Tesla", "A100-SXM4-80GB"]


def test_workers_keep_the_order_and_pass_errors_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    with cli._workers(3) as spread:
        assert getattr(spread, "__self__", None) is not None, "not a pool's"
        assert list(spread(str.upper, ["a", "b", "c"])) == ["A", "B", "C"]  # type: ignore[arg-type, list-item, comparison-overlap]
        with pytest.raises(UsageError, match="is not a size"):
            list(spread(partial(parse_bytes, what="budget"), ["12gb?"]))  # type: ignore[arg-type]
    with cli._workers(1) as spread:
        assert spread is map


# -- plan files -------------------------------------------------------------------------------------------------------


def test_diff_of_two_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    offloaded().to_json(first)
    offloaded().model_copy(update={"predicted": estimate(5.0, 100.0)}).to_json(second)
    code, out, _ = run(capsys, "diff", str(first), str(second))
    assert code == 0
    assert re.search(r"peak allocated +9\.20 GiB +5\.00 GiB", out)
    found = json.loads(run(capsys, "diff", str(first), str(second), "--json")[1])
    assert found["schema"] == "planner.diff/1"


def test_check_refuses_without_a_pipeline_or_a_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    untouched().to_json(path)
    code, _, err = run(capsys, "check", str(path))
    assert code == 2
    assert "--model FOLDER" in err
    assert run(capsys, "check", str(path), "--model", str(tmp_path))[0] == 2
    assert run(capsys, "check", str(path), "--model", str(tmp_path), "--random-weights")[0] == 2


@pytest.mark.slow
def test_check_applies_a_plan_to_a_real_pipeline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tests.zoo import FAMILIES

    pipe = FAMILIES["sd15"].build()
    pipe.save_pretrained(tmp_path / "model")
    inputs, fix = {"height": 32, "width": 32, "num_inference_steps": 2}, {"compile": "none", "attention": "sliced"}
    plan = planner.autoplan(pipe, batch_size=2, inputs=inputs, apply=False, calibrate="never", device="cpu", fix=fix,
                            memory_budget="2GiB")  # fmt: skip
    plan.to_json(tmp_path / "plan.json")
    code, out, err = run(capsys, "check", str(tmp_path / "plan.json"), "--model", str(tmp_path / "model"), "--json")
    found = json.loads(out)
    slower = [failure for failure in found["failures"] if failure.startswith("slower")]  # a tiny call on a busy machine may be
    assert found["failures"] == slower, err
    assert code == (3 if slower else 0)
    peak = next(row for row in found["metrics"] if row["metric"] == "peak_allocated_bytes")
    assert peak["measured"] > 0


# -- lists ------------------------------------------------------------------------------------------------------------


def test_profiles_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "profiles")
    assert code == 0
    assert "NVIDIA GeForce RTX 3060 " in out
    assert "stable-diffusion-xl " in out
    found = json.loads(run(capsys, "profiles", "--json")[1])
    assert {"NVIDIA GeForce RTX 3060"} <= {gpu["name"] for gpu in found["gpus"]}
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert re.search(r"^python +3\.", out, re.MULTILINE)
    assert json.loads(run(capsys, "doctor", "--json")[1])["schema"] == "planner.doctor/1"


def test_same_input_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (run(capsys, "profiles", "--json")[1] for _ in range(2))
    assert first == second
    keys = list(json.loads(first))
    assert keys == sorted(keys)
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
