"""Traces on disk, by content: one compressed numpy archive per entry, with its header as JSON inside. No torch, no pickle.

What is read is not trusted: a file that is too large, broken or of another make is reported, ignored and written anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from planner.files import replacing

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

SCHEMA = "planner.trace/1"
MAX_FILE_BYTES = 64 << 20
MAX_ARRAY_BYTES = 512 << 20
MAX_FILES = 512
"""Oldest entries go above this: at some 200 kB each, about 100 MB."""
STALE_SECONDS = 3600.0
"""What is still half written after this long was left by a process that was killed."""
_HEADER = "header"
_MEMBERS = frozenset({_HEADER, "integers", "flops", "spans", "events"})
_BROKEN = (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error,
           struct.error)  # fmt: skip


def cache_directory() -> Path:
    """``$PLANNER_CACHE_DIR/traces``, else the user's cache directory as the platform has it."""
    root = os.environ.get("PLANNER_CACHE_DIR")
    if root:
        return Path(root).expanduser() / "traces"
    import platformdirs

    return Path(platformdirs.user_cache_dir("diffusers-planner")) / "traces"


def entry_key(content: Mapping[str, Any]) -> str:
    """sha256 of a JSON-able description and of everything that decides what a dry run of it gives."""
    text = json.dumps([SCHEMA, versions(), _own_code(), content], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def versions() -> tuple[tuple[str, str], ...]:
    """Versions of the libraries whose code a dry run executes, from their metadata: nothing is imported."""
    found = []
    for name in ("torch", "diffusers", "transformers"):
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append((name, "absent"))
    return tuple(found)


@lru_cache(maxsize=1)
def _own_code() -> str:
    """Digest of the code that builds and traces: a corrected planner does not read what a faulty one wrote."""
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *(here.parent / "models").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load(key: str, parse: Callable[[dict[str, Any], Mapping[str, NDArray[Any]]], Value]) -> Value | None:
    """The entry's value, or None when there is none that can be used."""
    path = cache_directory() / f"{key}.npz"
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
            return parse(*_read(file, key))
    except FileNotFoundError:
        return None
    except _BROKEN as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.warning("cached trace %s is not used and will be made again: %s", path, reason)
        return None


def _read(file: Any, key: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) != len(names) or not set(names) <= _MEMBERS:
            raise ValueError("it holds other arrays than a trace has")
        if sum(member.file_size for member in members) > MAX_ARRAY_BYTES:
            raise ValueError(f"its arrays are larger than {MAX_ARRAY_BYTES} bytes")
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    text = arrays.pop(_HEADER)
    if text.dtype != np.uint8 or text.ndim != 1:
        raise ValueError("its header is no text")
    header = json.loads(text.tobytes())
    if not isinstance(header, dict) or header.pop("schema", None) != SCHEMA or header.pop("key", None) != key:
        raise ValueError(f"its header is not of schema {SCHEMA} and of this entry")
    return header, arrays


def save(key: str, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an entry in one step. A directory that cannot be written is reported once per call and done without."""
    directory = cache_directory()
    text = json.dumps({**header, "schema": SCHEMA, "key": key}).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / f"{key}.npz") as file:
            np.savez_compressed(file, allow_pickle=False, **{_HEADER: np.frombuffer(text, dtype=np.uint8)}, **arrays)
        _prune(directory)
    except OSError as error:
        logger.warning("traces are not kept: %s cannot be written (%s)", directory, error)


def _prune(directory: Path) -> None:
    for left in directory.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()
    entries = sorted(_ages(directory))
    for _, path in entries[: max(len(entries) - MAX_FILES, 0)]:
        path.unlink(missing_ok=True)


def _ages(directory: Path) -> Iterator[tuple[float, Path]]:
    for entry in os.scandir(directory):
        if entry.name.endswith(".npz"):
            yield entry.stat().st_mtime, Path(entry.path)
