"""Reading: two CSV formats, recognised by their columns, every row checked.

A row keeps text where the format is text; :mod:`planner.validate.express` gives it meaning.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from planner.errors import ProfileError, UsageError
from planner.types import Frozen

MAX_FILE_BYTES = 16 << 20
MAX_ROWS = 100_000
MAX_FIELD_CHARACTERS = 20_000


def _blank_to_none(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _yes_no(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("", "unknown"):
        return None
    if text in ("true", "false"):
        return text == "true"
    raise ValueError("must be true, false, unknown or empty")


def _finite_above_or_at_zero(value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError("must be a finite number, not below zero")
    return value


# Upper limits are those of planner.types.Workload.
Batch = Annotated[Annotated[int, Field(ge=1, le=4096)] | None, BeforeValidator(_blank_to_none)]
Count = Annotated[Annotated[int, Field(ge=1, le=65536)] | None, BeforeValidator(_blank_to_none)]
Flag = Annotated[bool | None, BeforeValidator(_yes_no)]
Text = Annotated[str, AfterValidator(str.strip)]
Value = Annotated[float, AfterValidator(_finite_above_or_at_zero)]
Needed = Annotated[str, AfterValidator(str.strip), Field(min_length=1)]


class PublishedRow(Frozen):
    """A row of the ``published.csv`` format. Empty text and None: the source does not say."""

    number: int
    line: int
    id: Text = ""
    source: Text = ""
    pipeline_class: Needed
    model: Needed
    height: Count = None
    width: Count = None
    frames: Count = None
    steps: Count = None
    batch_size: Batch = None
    cfg: Flag = None
    dtype: Text = ""
    attention: Text = ""
    vae_slicing: Flag = None
    vae_tiling: Flag = None
    offload: Text = ""
    compile: Text = ""
    channels_last: Flag = None
    other: Text = ""
    gpu: Text = ""
    gpu_mem_gb: Annotated[Annotated[float, Field(gt=0, le=4096)] | None, BeforeValidator(_blank_to_none)] = None
    metric: Needed
    value: Value
    torch_version: Text = ""
    diffusers_version: Text = ""
    notes: Text = ""
    grade: Text = ""


class Torch2Row(Frozen):
    """A row of the ``torch2_table.csv`` format."""

    number: int
    line: int
    gpu: Needed
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    pipeline: Needed
    stage: Text = ""
    torch: Text = ""
    execution: Needed
    metric: Needed
    value: Value
    note: Text = ""


Row = PublishedRow | Torch2Row
Format = Literal["published", "torch2"]
_MODELS: dict[Format, type[PublishedRow] | type[Torch2Row]] = {"published": PublishedRow, "torch2": Torch2Row}
_INTERNAL = {"number", "line"}


def columns(form: Format) -> tuple[str, ...]:
    """Column names of a format, in its order."""
    return tuple(name for name in _MODELS[form].model_fields if name not in _INTERNAL)


def _needed(form: Format) -> set[str]:
    fields = _MODELS[form].model_fields
    return {name for name in columns(form) if fields[name].is_required()}


def detect_format(header: list[str], path: str) -> Format:
    """Which of the two formats has these columns. Raises UsageError naming the first column that fits neither."""
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{path}: line 1: column {twice[0]!r} appears twice; remove one.")
    forms: tuple[Format, ...] = ("published", "torch2")
    for form in forms:
        if _needed(form) <= set(names) <= set(columns(form)):
            return form
    likely: Format = "torch2" if "pipeline" in names else "published"
    missing = sorted(_needed(likely) - set(names))
    unknown = sorted(set(names) - set(columns(likely)))
    seen = f"column {missing[0]!r} is missing" if missing else f"column {unknown[0]!r} is unknown"
    raise UsageError(
        f"{path}: line 1: neither of the two table formats ({likely} is nearest: {seen}). "
        f"Wanted columns of calibration/published/: {', '.join(columns(likely))}."
    )


def _load(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes; tables above {MAX_FILE_BYTES} bytes are refused.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: byte {error.start} is not UTF-8; save the table as UTF-8 text.") from error
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"{path}: cannot be read ({why}); give the path of a CSV table.") from error


def _describe(error: ValidationError, record: dict[str, Any]) -> str:
    first = error.errors()[0]
    column = str(first["loc"][0]) if first["loc"] else "?"
    return f"column {column!r}: {record.get(column, '')!r}: {first['msg']}"


def _parse(form: Format, header: list[str], fields: list[str], number: int, line: int, path: Path) -> Row:
    if len(fields) != len(header):
        raise ProfileError(f"{path}: line {line}: {len(fields)} fields where the header has {len(header)} columns.")
    record: dict[str, Any] = dict(zip(header, fields, strict=True))
    try:
        return _MODELS[form].model_validate({**record, "number": number, "line": line})
    except ValidationError as error:
        raise ProfileError(f"{path}: line {line}, {_describe(error, record)}.") from error


def parse_table(text: str, path: Path) -> tuple[Row, ...]:
    """Rows of a table's text; ``path`` names it in messages. Raises UsageError, ProfileError."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        form = detect_format(header, str(path))
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                rows.append(_parse(form, header, fields, len(rows) + 1, line, path))
            if len(rows) > MAX_ROWS:
                raise UsageError(f"{path}: more than {MAX_ROWS} rows; split the table.")
            line = reader.line_num + 1
    except csv.Error as error:
        raise ProfileError(f"{path}: line {line}: not a CSV record ({error}).") from error
    if not rows:
        raise ProfileError(f"{path}: the table has a header and no rows.")
    return tuple(rows)


def read_table(path: str | Path) -> tuple[Row, ...]:
    """All rows of a table in either format.

    Raises:
        UsageError: no such file, too large, or not one of the two formats.
        ProfileError: a row is broken; the message has the line and the column.
    """
    where = Path(path)
    return parse_table(_load(where), where)
