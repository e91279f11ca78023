"""A pipeline in diffusers layout, read as JSON only: ``model_index.json`` and each component's configs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.errors import ProfileError, UnsupportedPipeline

CONFIG_FILES = (
    "config.json",
    "scheduler_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What a component's folder may say about it; everything else in there stays unread."""

Reader = Callable[[str], "dict[str, Any] | None"]
"""Relative path to JSON object, None when absent."""

_NAME = re.compile(r"[A-Za-z_]\w{0,127}", re.ASCII)
_VOLATILE = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
"""Keys that differ between copies of one model and change nothing about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One entry of ``model_index.json``. ``files`` are the JSON files of its folder that exist."""

    name: str
    library: str
    class_name: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def first(self, *names: str) -> dict[str, Any] | None:
        """The first of the named files that exists."""
        return next((self.files[name] for name in names if name in self.files), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the JSON says of a pipeline: its class, its components, its other constructor arguments."""

    where: str
    class_name: str
    components: tuple[Component, ...]
    arguments: dict[str, Any]
    absent: tuple[str, ...] = ()
    """Components that the index names as null."""
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 over class and configs, the same for every copy of the model."""
        content = {
            "class": self.class_name,
            "arguments": self.arguments,
            "absent": sorted(self.absent),
            "components": {c.name: [c.library, c.class_name, c.files] for c in self.components},
        }
        return digest_of(content)


def digest_of(content: object) -> str:
    """sha256 of the canonical JSON of ``content`` without the keys that vary between copies."""
    text = json.dumps(_stable(content), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _stable(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _stable(item) for key, item in value.items() if key not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    return value


def read_layout(read: Reader, where: str, code: Callable[[str], bool] = lambda path: False) -> Layout:
    """The layout behind ``read``. ``code(path)`` tells whether a Python file is there.

    Raises:
        UnsupportedPipeline: no ``model_index.json``, a class that is not diffusers' own, or custom code.
        ProfileError: broken JSON.
    """
    index = read("model_index.json")
    if index is None:
        raise UnsupportedPipeline(
            f"{where}: no model_index.json. A diffusers pipeline folder is wanted (save_pretrained writes one); "
            "single-file checkpoints and lone components cannot be planned."
        )
    class_name = _pipeline_class(index, where)
    components, arguments, absent = [], {}, []
    for key, value in index.items():
        if key.startswith("_"):
            continue
        if not _is_component(value):
            arguments[key] = value
        elif value[0] is None or value[1] is None:
            absent.append(key)
        else:
            components.append(_component(key, value, read, where, code))
    notes = ("the folder holds pipeline.py; it was not read",) if code("pipeline.py") else ()
    return Layout(
        where=where,
        class_name=class_name,
        components=tuple(components),
        arguments=arguments,
        absent=tuple(absent),
        notes=notes,
    )


def _is_component(value: object) -> bool:
    """``[library, class]`` or ``[null, null]``; other lists are plain constructor arguments."""
    return isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value)


def _pipeline_class(index: dict[str, Any], where: str) -> str:
    name = index.get("_class_name")
    if isinstance(name, list):
        raise UnsupportedPipeline(f"{where}: model_index.json names custom code ({name}); remote code is never run.")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UnsupportedPipeline(f"{where}: model_index.json has no usable _class_name (found {name!r}).")
    if name in diffusers_names():
        return name
    if name.startswith(("Flax", "Onnx")):
        raise UnsupportedPipeline(f"{where}: {name} is no PyTorch pipeline; only PyTorch pipelines can be planned.")
    if name.endswith(("ModularPipeline", "Blocks")):
        raise UnsupportedPipeline(f"{where}: {name} is a modular pipeline; only DiffusionPipeline can be planned.")
    raise UnsupportedPipeline(
        f"{where}: {name} is not a class of the installed diffusers; upgrade diffusers if it is newer. "
        "Custom pipelines are refused: remote code is never run."
    )


@lru_cache(maxsize=1)
def diffusers_names() -> frozenset[str]:
    """Names that ``diffusers/__init__.py`` exports, read as text: importing diffusers takes seconds."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        raise ProfileError("diffusers is not installed; install diffusers to plan its pipelines.")
    text = Path(spec.origin).read_text(encoding="utf-8")
    return frozenset(re.findall(r"\"(\w+)\"", text))


@lru_cache(maxsize=1)
def pipeline_modules() -> dict[str, str]:
    """Packages of diffusers' own pipelines, which an index may name as a component's library, to their import path."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        return {}
    top = Path(spec.origin).parent / "pipelines"
    old = {p.parent.name: f"diffusers.pipelines.deprecated.{p.parent.name}" for p in top.glob("deprecated/*/__init__.py")}
    return old | {p.parent.name: f"diffusers.pipelines.{p.parent.name}" for p in top.glob("*/__init__.py")}


def _component(name: str, value: list[str], read: Reader, where: str, code: Callable[[str], bool]) -> Component:
    library, class_name = value
    at = f"{where}: model_index.json: {name}"
    for text in (name, class_name):
        if not _NAME.fullmatch(text):
            raise ProfileError(f"{at}: {text!r} is not a plain name.")
    if library not in ("diffusers", "transformers") and library not in pipeline_modules():
        what = "custom code" if code(f"{name}/{library}.py") else f"library {library!r}"
        raise UnsupportedPipeline(
            f"{at} comes from {what}; only diffusers and transformers components are built, remote code is never run."
        )
    files = {}
    for file in CONFIG_FILES:
        found = read(f"{name}/{file}")
        if found is not None:
            files[file] = found
    if "auto_map" in files.get("config.json", {}) and library in ("diffusers", "transformers"):
        raise UnsupportedPipeline(f"{at}: {name}/config.json asks for custom code (auto_map); remote code is never run.")
    return Component(name=name, library=library, class_name=class_name, files=files)
