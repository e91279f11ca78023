"""A model on the Hugging Face Hub: its JSON and safetensors headers, nothing else, through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from planner.errors import ProfileError
from planner.models.bundled import nearest_names
from planner.models.headers import Stored
from planner.models.layout import CONFIG_FILES, Component

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PATTERNS = ("model_index.json", *(f"*/{name}" for name in CONFIG_FILES))
_WEIGHTS = ("diffusion_pytorch_model", "model")


def fetch_json(hub_id: str) -> Path:
    """A local folder with the repository's JSON configs; weights and code stay on the hub.

    ``HF_HOME``, ``HF_HUB_OFFLINE``, tokens and endpoints are huggingface_hub's own business.

    Raises:
        ProfileError: offline and not cached, no such repository, or no access to it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_PATTERNS)))
    except Exception as error:
        raise ProfileError(_explain(hub_id, error)) from error


def _explain(hub_id: str, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    near = nearest_names(hub_id)
    bundled = f"Nearest bundled profiles: {', '.join(near)}." if near else "`planner profiles` lists what is bundled."
    if isinstance(error, hub.GatedRepoError):
        return f"{hub_id}: gated on the hub; accept its terms there and log in (`hf auth login`). {bundled}"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"{hub_id}: no such model on the hub, or it is private and this login may not see it. {bundled}"
    if constants.HF_HUB_OFFLINE:
        return f"{hub_id}: offline (HF_HUB_OFFLINE is set) and not in the local cache. {bundled}"
    if isinstance(error, hub.LocalEntryNotFoundError | OSError):
        return f"{hub_id}: the hub cannot be reached (offline?) and the model is not in the local cache. {bundled}"
    return f"{hub_id}: could not be read from the hub ({type(error).__name__}: {error}). {bundled}"


def fetch_stored(hub_id: str, components: tuple[Component, ...]) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Stored tensors by component from remote headers, and notes on what could not be read.

    A header costs two small range requests; nothing here is needed for a plan, so a failure is a note.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return {}, ("offline: component sizes were not checked against safetensors headers",)
    api, stored = HfApi(), {}
    try:
        files = set(api.list_repo_files(hub_id))
        for component in components:
            names = _weight_files(component.name, files)
            if names:
                stored[component.name] = Stored(_remote_tensors(api, hub_id, names))
    except Exception as error:
        return stored, (f"component sizes were not checked against safetensors headers ({type(error).__name__})",)
    return stored, ()


def _weight_files(component: str, files: set[str]) -> list[str]:
    """The single file or all shards without a variant suffix; empty when there are none."""
    for stem in _WEIGHTS:
        if f"{component}/{stem}.safetensors" in files:
            return [f"{component}/{stem}.safetensors"]
        shard = re.compile(rf"{re.escape(component)}/{stem}-\d{{5}}-of-\d{{5}}\.safetensors")
        shards = sorted(name for name in files if shard.fullmatch(name))
        if shards:
            return shards
    return []


def _remote_tensors(api: object, hub_id: str, names: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors = {}
    for name in names:
        metadata = api.parse_safetensors_file_metadata(hub_id, name)  # type: ignore[attr-defined]
        for key, info in metadata.tensors.items():
            tensors[key] = (str(info.dtype), tuple(int(size) for size in info.shape))
    return tensors
