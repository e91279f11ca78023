"""Where results go: text and JSON to stdout, pages to files, remarks to stderr. Colour only on a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planner.errors import UsageError
from planner.files import write_text
from planner.progress import Progress, silent

_LABEL = re.compile(r"^(?! )([a-z][a-z ]{1,9}?)(?=  |$)")


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None when it is piped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def emit(text: str) -> None:
    """Print a result to stdout, as it is when piped, with emphasis on a terminal that wants colour."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        _emit_coloured(text)
    else:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")


def _emit_coloured(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in text.splitlines():
        styled = Text(line)
        if label := _LABEL.match(line):
            styled.stylize("bold yellow" if label.group(1) == "warning" else "bold cyan", 0, label.end())
        console.print(styled)


def emit_json(content: Any) -> None:
    """Print data as JSON: sorted keys, same bytes for the same data."""
    sys.stdout.write(json_text(content))


def json_text(content: Any) -> str:
    """Data as JSON text, sorted keys, ending in a newline."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def remark(line: str) -> None:
    """One line on stderr."""
    print(f"planner: {line}", file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """A line on stderr that shows what is going on, while it is a terminal; nothing otherwise."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def write_file(path: Path, text: str) -> None:
    """Write a file a user asked for and say so. Raises UsageError when it cannot be written."""
    try:
        write_text(path, text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error}); choose another path.") from error
    remark(f"wrote {path}")
