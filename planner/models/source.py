"""What a model argument means, and how it becomes a pipeline with its weights on ``meta``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from planner.errors import ProfileError
from planner.models import bundled, headers, hub, live
from planner.models.jsonfile import read_json, safe_path
from planner.models.layout import Layout, read_layout

Kind = Literal["live", "folder", "hub", "bundled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that was recognised. ``digest`` is by content: equal digests build equal pipelines."""

    kind: Kind
    name: str
    digest: str
    pipeline_class: str
    dtype: str | None
    """``fp32 fp16 bf16`` it is published or stored in; None when nothing says so, or for a live pipeline."""
    notes: tuple[str, ...] = ()
    layout: Layout | None = None
    profile: bundled.ModelProfile | None = None
    stored: dict[str, headers.Stored] = field(default_factory=dict)
    pipeline: Any = None

    def build(self, dtype: str | None = None) -> Any:
        """The pipeline: the live object itself, or diffusers' own class with all weights on ``meta``.

        ``dtype`` defaults to :attr:`dtype`, else fp32, as from_pretrained does. A live pipeline is never cast.

        Raises:
            UnsupportedPipeline: a component class that diffusers and transformers do not have.
            ProfileError: a config that does not build, or weights that do not fit it.
        """
        if self.layout is None:
            return self.pipeline
        from planner.models.meta import build_pipeline

        return build_pipeline(self.layout, dtype or self.dtype or "fp32", self.stored)


def resolve(model: object) -> ModelSource:
    """Recognise a live pipeline, a folder in diffusers layout, a hub id or a bundled profile's name.

    Torch is not imported. A name that is bundled wins over the hub; a :class:`pathlib.Path` is always a folder.

    Raises:
        UnsupportedPipeline: an object or folder that is no pipeline.
        ProfileError: an unknown name (with the nearest ones), an unreachable hub, a broken file.
    """
    if isinstance(model, Path):
        return _from_folder(model)
    if not isinstance(model, str):
        return _from_live(model)
    if "\0" in model or len(model) > 4096 or not model.strip():
        raise ProfileError(f"{model[:80]!r} is not a model name.")
    looks_like_path = model.startswith((".", "/", "~")) or "\\" in model or re.match(r"[A-Za-z]:", model)
    if looks_like_path:
        return _from_folder(Path(os.path.expanduser(model)))  # leaves a user that it does not know alone
    profile = bundled.find_profile(model)
    if profile is not None and not (Path(model) / "model_index.json").is_file():
        return _from_profile(profile)
    if Path(model).is_dir():
        return _from_folder(Path(model))
    if hub.HUB_ID.fullmatch(model):
        return _from_hub(model)
    near = bundled.nearest_names(model)
    hint = f"Nearest bundled names: {', '.join(near)}." if near else "`planner profiles` lists the bundled names."
    raise ProfileError(f"unknown model {model!r}: no folder, no hub id (owner/name) and no bundled profile. {hint}")


def _from_live(model: object) -> ModelSource:
    live.check_live(model)
    name = getattr(model, "name_or_path", None) or type(model).__name__
    return ModelSource(
        kind="live",
        name=str(name),
        digest=live.live_digest(model),
        pipeline_class=type(model).__name__,
        dtype=None,
        pipeline=model,
    )


def _from_profile(profile: bundled.ModelProfile) -> ModelSource:
    layout = bundled.bundled_layout(profile.name)
    return ModelSource(
        kind="bundled",
        name=profile.name,
        digest=layout.digest,
        pipeline_class=layout.class_name,
        dtype=profile.dtype,
        notes=profile.notes,
        layout=layout,
        profile=profile,
    )


def _from_folder(path: Path) -> ModelSource:
    if not path.is_dir():
        near = bundled.nearest_names(path.name)
        hint = f" Nearest bundled names: {', '.join(near)}." if near else ""
        raise ProfileError(f"{path}: no such folder.{hint}")
    layout = folder_layout(path)
    stored = {}
    for component in layout.components:
        if (found := headers.read_stored(path, component.name)) is not None:
            stored[component.name] = found
    return ModelSource(
        kind="folder",
        name=path.resolve().name,
        digest=layout.digest,
        pipeline_class=layout.class_name,
        dtype=stored_dtype(stored),
        notes=layout.notes,
        layout=layout,
        stored=stored,
    )


def _from_hub(hub_id: str) -> ModelSource:
    layout = folder_layout(hub.fetch_json(hub_id))
    stored, notes = hub.fetch_stored(hub_id, layout.components)
    return ModelSource(
        kind="hub",
        name=hub_id,
        digest=layout.digest,
        pipeline_class=layout.class_name,
        dtype=stored_dtype(stored),
        notes=(*layout.notes, *notes),
        layout=replace(layout, where=hub_id),
        stored=stored,
    )


def folder_layout(path: Path) -> Layout:
    """The layout of a local folder: JSON files only. Raises as :func:`read_layout` does."""
    return read_layout(
        lambda relative: read_json(path, relative),
        str(path),
        lambda relative: safe_path(path, relative) is not None,
    )


def stored_dtype(stored: dict[str, headers.Stored]) -> str | None:
    """The dtype of the largest component's files; None without files or with packed weights."""
    if not stored:
        return None
    return max(stored.values(), key=lambda component: component.elements).dtype
