"""Bundled model profiles: folders of JSON in diffusers layout plus ``profile.json`` with what is known and from where."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from planner.errors import ProfileError
from planner.models.jsonfile import read_json
from planner.models.layout import Layout, Reader, read_layout
from planner.resources import data_path
from planner.types import Frozen

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Published(Frozen):
    """A published size that a count can be held against.

    ``tensor_bytes``: sum over tensors (``total_size`` of an index); ``file_bytes``: one weights file with its header;
    ``rounded_bytes``: the same to the nearest ``to``, as file listings show it; ``rounded``: parameters as prose
    gives them, to the nearest ``to``.
    """

    kind: Literal["tensor_bytes", "file_bytes", "rounded_bytes", "rounded"]
    value: Annotated[int, Field(gt=0)]
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    to: Annotated[int, Field(gt=0)] | None = None


class ParameterCount(Frozen):
    """Parameters of one component and the published number they agree with."""

    count: Annotated[int, Field(gt=0)]
    published: Published
    source: Annotated[str, Field(min_length=8)]


class ProfileFile(Frozen):
    """``profile.json``. Format history: 1, the first."""

    schema_version: Literal[1]
    name: str
    base: str | None = None
    """Profile whose component folders are used where this one has none."""
    hub_id: str
    aliases: tuple[str, ...] = ()
    dtype: Literal["fp32", "fp16", "bf16"]
    dtype_source: str
    parameters: dict[str, ParameterCount]
    uncounted: dict[str, str] = Field(default_factory=dict)
    """Components for which no published size was found, and why."""
    license: str
    gated: bool
    configs_source: str
    notes: tuple[str, ...] = ()


class ModelProfile(Frozen):
    """A model known without its weights."""

    name: str
    hub_id: str
    aliases: tuple[str, ...]
    pipeline_class: str
    dtype: Literal["fp32", "fp16", "bf16"]
    dtype_source: str
    components: dict[str, str]
    """Component name to class name."""
    parameters: dict[str, ParameterCount]
    uncounted: dict[str, str]
    license: str
    gated: bool
    configs_source: str
    notes: tuple[str, ...]
    folder: Path

    @property
    def parameter_count(self) -> int:
        """Parameters of all counted components together."""
        return sum(entry.count for entry in self.parameters.values())


def profiles_folder() -> Path:
    """Where the bundled profiles lie. Raises ProfileError when this installation has none."""
    return data_path("profiles", "models")


def list_profiles() -> tuple[ModelProfile, ...]:
    """All bundled profiles by name. Raises ProfileError when one is broken."""
    return tuple(load_profile(path.parent.name) for path in sorted(profiles_folder().glob("*/profile.json")))


@lru_cache(maxsize=256)
def load_profile(name: str) -> ModelProfile:
    """One bundled profile. Raises ProfileError when it is absent or broken."""
    file = _profile_file(name)
    layout = bundled_layout(name)
    return ModelProfile(
        **file.model_dump(exclude={"schema_version", "base"}),
        pipeline_class=layout.class_name,
        components={component.name: component.class_name for component in layout.components},
        folder=profiles_folder() / name,
    )


@lru_cache(maxsize=256)
def bundled_layout(name: str) -> Layout:
    """The layout of a bundled profile, with components taken from its base where it has none of its own."""
    return read_layout(_reader(name), f"profile {name}")


def find_profile(text: str) -> ModelProfile | None:
    """The profile with that name, hub id or alias; case, spaces and underscores do not matter."""
    name = _names().get(_key(text))
    return load_profile(name) if name else None


def nearest_names(text: str, count: int = 5) -> tuple[str, ...]:
    """Bundled names most like ``text``, best first, each profile once."""
    names = _names()
    close = difflib.get_close_matches(_key(text), names, n=4 * count, cutoff=0.4)
    tail = difflib.get_close_matches(_key(text).rsplit("/", 1)[-1], names, n=4 * count, cutoff=0.4)
    ranked = sorted({*close, *tail}, key=lambda name: (-difflib.SequenceMatcher(None, _key(text), name).ratio(), name))
    return tuple(dict.fromkeys(names[name] for name in ranked))[:count]


def _key(text: str) -> str:
    return re.sub(r"[\s_]+", "-", text.strip()).casefold()


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    """Every accepted name to its profile; a hub id means the profile without a base, when several share it.

    Raises:
        ProfileError: two profiles claim one name.
    """
    table: dict[str, str] = {}
    files = [_profile_file(path.parent.name) for path in sorted(profiles_folder().glob("*/profile.json"))]
    for file in files:
        for alias in (file.name, *file.aliases):
            if table.setdefault(_key(alias), file.name) != file.name:
                raise ProfileError(f"models/{file.name}/profile.json: {alias!r} already means {table[_key(alias)]}.")
    for file in sorted(files, key=lambda file: file.base is not None):
        table.setdefault(_key(file.hub_id), file.name)
    return table


def _profile_file(name: str) -> ProfileFile:
    where = f"models/{name}/profile.json"
    if not _NAME.fullmatch(name):
        raise ProfileError(f"{where}: {name!r} is not a profile name.")
    data = read_json(profiles_folder() / name, "profile.json")
    if data is None:
        raise ProfileError(f"{where}: no such profile.")
    try:
        file = ProfileFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ProfileError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    if file.name != name:
        raise ProfileError(f"{where}: name is {file.name!r}, the folder is {name!r}.")
    return file


def _reader(name: str) -> Reader:
    folders = tuple(_folders(name))

    def read(relative: str) -> dict[str, Any] | None:
        return next((found for folder in folders if (found := read_json(folder, relative)) is not None), None)

    return read


def _folders(name: str) -> Iterator[Path]:
    """The profile's own folder, then its bases'. Raises ProfileError on a circle."""
    seen: list[str] = []
    current: str | None = name
    while current is not None:
        if current in seen:
            raise ProfileError(f"models/{name}/profile.json: base goes in a circle ({' -> '.join([*seen, current])}).")
        seen.append(current)
        yield profiles_folder() / current
        current = _profile_file(current).base
