"""Writes what the documentation takes from the program: outputs of commands, the table of knobs, the reference.

`make docs` runs it; tests/test_docs.py checks that nothing it would write is out of date. A fenced block marked `console`
holds commands (after `$ `) and their output; only the commands are written by hand. A command that ends in `# not run`
depends on the machine it runs on, and its output stays as it is.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(?<=```console\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
WRITTEN_ELSEWHERE = ("accuracy.md",)


def run(command: str, cache: str) -> str:
    """Output of a command as a reader would see it piped: no colour, 100 columns, nothing from the network."""
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PLANNER_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1",
                                "COLUMNS": "100", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    errors = "" if done.returncode == 0 else done.stderr
    return done.stdout + errors


def with_outputs(text: str, cache: str) -> str:
    """A page with the output of every command in its console blocks written anew."""

    def answer(block: re.Match[str]) -> str:
        return "".join(_session(block.group(0), cache))

    return BLOCK.sub(answer, text)


def _session(block: str, cache: str) -> Iterator[str]:
    keep = False
    for line in block.splitlines(keepends=True):
        if line.startswith("$ "):
            command = line[2:].strip()
            keep = command.endswith("# not run")
            yield line
            if not keep:
                yield run(command, cache)
        elif keep:
            yield line


# -- pages made from the code ------------------------------------------------------------------------------------------


def constraints() -> str:
    """Every pair of knob values that exclude each other, with reason and source."""
    from planner.knobs import KNOBS

    lines = [
        "# What cannot be combined",
        "",
        "Made from the knobs themselves by `docs/generate.py`. *fails*: raises or breaks; *pointless*: runs, and one cancels the other;",
        "*wrong*: runs, and the output suffers; *untested*: nobody has tried it, so the planner does not choose it. Further rules depend",
        "on the pipeline and the device; `planner explain -v` prints those that mattered.",
        "",
        "| knob | with | verdict | why | source |",
        "|---|---|---|---|---|",
    ]
    for knob in KNOBS:
        for conflict in (*knob.conflicts, *knob.conditional):
            here, there = _values(knob.name, conflict.values), _values(conflict.other, conflict.other_values)
            lines.append(f"| {here} | {there} | {conflict.verdict} | {_cell(conflict.reason)} | {_cell(conflict.source)} |")
    lines += ["", "## The knobs, in the order in which they are applied", "", "| knob | what it does |", "|---|---|"]
    lines += [f"| `{knob.name}` | {_cell(inspect.getdoc(type(knob)) or '')} |" for knob in KNOBS]
    return "\n".join(lines) + "\n"


def _values(name: str, values: frozenset[object]) -> str:
    return f"`{name}`: " + ", ".join(sorted(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in values))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def api() -> str:
    """Signatures and docstrings of the public names."""
    import planner

    lines = ["# Reference", "", "Made from the code by `docs/generate.py`. Everything here is importable from `planner`.", ""]
    for name in planner.__all__:
        if name.startswith("__"):
            continue
        value = getattr(planner, name)
        is_model = inspect.isclass(value) and hasattr(value, "model_fields")
        lines += [f"## `{name}`", ""]
        if callable(value) and not inspect.isclass(value):
            lines += ["```python", _signature(name, value), "```", ""]
        lines += [inspect.getdoc(value) or "", ""]
        if is_model:
            lines += [*_fields(value), ""]
    return "\n".join(lines).rstrip() + "\n"


def _signature(name: str, value: object) -> str:
    parameters = list(inspect.signature(value).parameters.values())  # type: ignore[arg-type]
    shown, star = [], False
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and not star:
            shown, star = [*shown, "*"], True
        prefix = {one.VAR_KEYWORD: "**", one.VAR_POSITIONAL: "*"}.get(one.kind, "")
        default = "" if one.default is one.empty else f"={one.default!r}"
        shown.append(f"{prefix}{one.name}{default}")
    return f"{name}({', '.join(shown)})"


def _fields(model: type) -> list[str]:
    """Fields with their types, then the methods that have a docstring."""
    lines = ["| field | type |", "|---|---|"]
    for name, field in model.model_fields.items():  # type: ignore[attr-defined]
        lines.append(f"| `{field.alias or name}` | `{_type_name(field.annotation)}` |")
    for name, method in vars(model).items():
        if name.startswith("_") or not (inspect.isfunction(method) or isinstance(method, classmethod | property)):
            continue
        function = method.__func__ if isinstance(method, classmethod) else method
        if (doc := inspect.getdoc(function)) and not name.startswith("model_"):
            lines += ["", f"**`.{name}`** {' '.join(doc.split())}"]
    return lines


def _type_name(kind: object) -> str:
    plain = inspect.isclass(kind) and not getattr(kind, "__args__", ())
    text = kind.__name__ if plain else str(kind)  # type: ignore[attr-defined]
    return _cell(re.sub(r"\b(planner\.types|planner\.plan|typing)\.", "", text))


GENERATED = {"constraints.md": constraints, "api.md": api}


def pages(cache: str) -> Iterator[tuple[Path, str]]:
    """Every page with what it should say."""
    for name, make in GENERATED.items():
        yield ROOT / "docs" / name, make()
    for path in PAGES:
        if path.name not in GENERATED and path.name not in WRITTEN_ELSEWHERE:
            yield path, with_outputs(path.read_text(encoding="utf-8"), cache)


def main() -> int:
    """Write what is out of date."""
    with tempfile.TemporaryDirectory() as cache:
        for path, text in pages(cache):
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")
                print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
