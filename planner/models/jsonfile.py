"""JSON from folders nobody vouches for: size, depth and place are checked before a value is used."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import ProfileError

MAX_JSON_BYTES = 16 << 20
"""Largest real file of this kind is a few MB (a sharded index of a large text encoder)."""
MAX_DEPTH = 64
MAX_VALUES = 1_000_000

JSONObject = Mapping[str, Any]


def read_json(root: Path, relative: str) -> dict[str, Any] | None:
    """The JSON object at ``root/relative``; None when there is no such file.

    Raises:
        ProfileError: outside the folder, not a regular file, too large, too deep, not JSON or not an object.
    """
    path = safe_path(root, relative)
    if path is None:
        return None
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ProfileError(f"{root / relative}: not a regular file.")
    if status.st_size > MAX_JSON_BYTES:
        raise ProfileError(f"{root / relative}: {status.st_size} bytes; at most {MAX_JSON_BYTES} are read.")
    return parse_json(path.read_bytes(), str(root / relative))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes. Raises ProfileError naming ``where``."""
    try:
        value = json.loads(data.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is in no name, and cannot be shown
    except RecursionError as error:
        raise ProfileError(f"{where}: nested too deeply.") from error
    except ValueError as error:
        raise ProfileError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ProfileError(f"{where}: a JSON object is wanted, found {type(value).__name__}.")
    _check_shape(value, where)
    return value


def _check_shape(value: object, where: str) -> None:
    """Refuse more than MAX_DEPTH levels or MAX_VALUES values; iterative, so depth costs no stack."""
    level: list[object] = [value]
    seen = 0
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        seen += len(below)
        if seen > MAX_VALUES:
            raise ProfileError(f"{where}: more than {MAX_VALUES} values.")
        if not below:
            return
        level = below
    raise ProfileError(f"{where}: nested more than {MAX_DEPTH} levels deep.")


def safe_path(root: Path, relative: str) -> Path | None:
    """The real path of a file inside ``root``, or None when it is absent.

    A hub cache's snapshot links into the ``blobs`` folder beside it; that one way out is allowed.

    Raises:
        ProfileError: the name or a link leads out of the folder.
    """
    parts = relative.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise ProfileError(f"{relative!r}: not a plain path inside the model's folder.")
    path = root.joinpath(*parts)
    try:
        real, base = path.resolve(strict=True), root.resolve(strict=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        raise ProfileError(f"{path}: cannot be read ({error}).") from error
    if real.is_relative_to(base) or _is_hub_blob(real, base):
        return real
    raise ProfileError(f"{path}: a link that leaves the model's folder is not followed (it leads to {real}).")


def _is_hub_blob(real: Path, base: Path) -> bool:
    return base.parent.name == "snapshots" and real.is_relative_to(base.parent.parent / "blobs")
