"""From a model argument to a pipeline on ``meta``: live, folder, hub, bundled, and everything that is refused."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ProfileError, UnsupportedPipeline
from planner.models import hub, resolve
from planner.models.headers import read_header, read_stored
from planner.models.jsonfile import parse_json, read_json
from planner.models.layout import Component, digest_of
from planner.models.standins import StandInTokenizer, count_words, make_standin

UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "sample_size": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [32], "sample_size": 8}
CLIP = {
    "model_type": "clip_text_model",
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write(root: Path, name: str, value: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Stable Diffusion in diffusers layout, without weights."""
    root = tmp_path / "tiny"
    write(root, "model_index.json", INDEX)
    write(root, "unet/config.json", UNET)
    write(root, "vae/config.json", VAE)
    write(root, "text_encoder/config.json", CLIP)
    write(root, "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler", "steps_offset": 1})
    return root


def edit(root: Path, name: str, **changes: object) -> None:
    path = root / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def modules(pipeline: Any) -> dict[str, Any]:
    return {key: part for key, part in pipeline.components.items() if hasattr(part, "named_parameters")}


# --- building -------------------------------------------------------------------------------------------------------


def test_a_folder_builds_the_pipeline_that_wrote_it(tmp_path: Path, folder: Path) -> None:
    """Reference: diffusers itself, saving its own tiny models and counting their parameters."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae = UNet2DConditionModel.from_config(UNET), AutoencoderKL.from_config(VAE)
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    source = resolve(folder)
    built = source.build()
    assert type(built).__name__ == "StableDiffusionPipeline"
    assert source.kind == "folder"
    for name, real in (("unet", unet), ("vae", vae)):
        part = getattr(built, name)
        assert {k: v.shape for k, v in part.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert all(p.device.type == "meta" for part in modules(built).values() for p in part.parameters())
    assert built.scheduler.config.steps_offset == 1


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_weights_have_the_dtype_asked_for(folder: Path, dtype: str) -> None:
    import torch

    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    built = resolve(folder).build(dtype)
    assert {p.dtype for part in modules(built).values() for p in part.parameters()} == {wanted}


def test_modules_that_loading_keeps_in_fp32_are_kept(tmp_path: Path) -> None:
    """T5 keeps ``wo`` for fp16 only; Wan keeps its time embedder, tables and norms in either half type."""
    import torch

    from planner.models.meta import build_component

    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    text = Component(name="t", library="transformers", class_name="T5EncoderModel", files={"config.json": t5})
    half = build_component(text, "fp16", "")
    kept = [name for name, p in half.named_parameters() if p.dtype == torch.float32]
    assert len(kept) == 2
    assert all(".wo." in name for name in kept)
    assert {p.dtype for p in build_component(text, "bf16", "").parameters()} == {torch.bfloat16}
    wan = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "text_dim": 16}
    video = Component(name="w", library="diffusers", class_name="WanTransformer3DModel", files={"config.json": wan})
    model = build_component(video, "bf16", "")
    kept = [name for name, p in model.named_parameters() if p.dtype == torch.float32]
    assert any("time_embedder" in name for name in kept)
    assert any("scale_shift_table" in name for name in kept)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


def test_building_leaves_the_process_as_it_was(folder: Path) -> None:
    import torch

    torch.manual_seed(7)
    state, default, init = torch.get_rng_state(), torch.get_default_dtype(), torch.nn.Linear.__init__
    resolve(folder).build("fp16")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() == default
    assert torch.nn.Linear.__init__ is init
    assert torch.zeros(3).device.type == "cpu"


def test_small_tables_keep_their_values(folder: Path) -> None:
    """CLIP's position ids are read as values by masks; a table of ``meta`` zeros would not do."""
    ids = dict(resolve(folder).build().text_encoder.named_buffers())
    (name,) = [key for key in ids if key.endswith("position_ids")]
    assert ids[name].flatten()[:4].tolist() == [0, 1, 2, 3]


def test_big_sine_tables_are_not_computed() -> None:
    from planner.models.meta import build_component

    config = {"num_layers": 1, "num_attention_heads": 24, "attention_head_dim": 64, "pos_embed_max_size": 192}
    part = Component(name="t", library="diffusers", class_name="SD3Transformer2DModel", files={"config.json": config})
    table = build_component(part, "fp16", "").pos_embed.pos_embed
    assert table.device.type == "meta"
    assert table.shape == (1, 192 * 192, 1536)


def test_tied_weights_stay_tied() -> None:
    from planner.models.meta import build_component

    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 100}
    part = Component(name="t", library="transformers", class_name="T5EncoderModel", files={"config.json": t5})
    model = build_component(part, "bf16", "")
    assert model.shared.weight is model.encoder.embed_tokens.weight


# --- what is not torch ----------------------------------------------------------------------------------------------


def test_resolving_and_listing_need_neither_torch_nor_diffusers(folder: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom planner.models import list_profiles, resolve\n"
        f"assert resolve('sdxl').digest and list_profiles() and resolve(Path({str(folder)!r})).digest\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'imported'\n"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})


def test_the_digest_is_of_the_content(tmp_path: Path, folder: Path) -> None:
    import shutil

    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    before = resolve(folder).digest
    assert resolve(copy).digest == before
    edit(copy, "unet/config.json", _name_or_path="/home/someone/unet")
    assert resolve(copy).digest == before
    edit(copy, "unet/config.json", sample_size=16)
    assert resolve(copy).digest != before


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.lists(st.booleans(), max_size=3), max_size=5))
@settings(max_examples=40, deadline=None)
def test_the_digest_ignores_the_order_of_keys(content: dict[str, Any]) -> None:
    assert digest_of(content) == digest_of(dict(reversed(content.items())))


# --- refused --------------------------------------------------------------------------------------------------------


def test_a_folder_without_an_index_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedPipeline, match=r"no model_index\.json"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": ["pipeline", "MyPipeline"]}, "remote code is never run"),
        ({"_class_name": "MyOwnPipeline"}, "not a class of the installed diffusers"),
        ({"_class_name": "FlaxStableDiffusionPipeline"}, "no PyTorch pipeline"),
        ({"_class_name": None}, "no usable _class_name"),
        ({"_class_name": "os.system"}, "no usable _class_name"),
        ({"unet": ["my_unet", "MyUNet"]}, "remote code is never run"),
        ({"unet": ["os", "system"]}, "remote code is never run"),
    ],
)
def test_foreign_classes_are_refused(folder: Path, changes: dict[str, object], words: str) -> None:
    edit(folder, "model_index.json", **changes)
    with pytest.raises(UnsupportedPipeline, match=words):
        resolve(folder)


def test_custom_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass MyUNet: pass\n"
    write(folder, "unet/my_unet.py", code)
    write(folder, "pipeline.py", code)
    edit(folder, "model_index.json", unet=["my_unet", "MyUNet"])
    with pytest.raises(UnsupportedPipeline, match="custom code"):
        resolve(folder)
    edit(folder, "model_index.json", unet=["diffusers", "UNet2DConditionModel"])
    source = resolve(folder)
    source.build()
    assert any("pipeline.py" in note for note in source.notes)
    assert not marker.exists()


def test_auto_map_is_refused(folder: Path) -> None:
    edit(folder, "text_encoder/config.json", auto_map={"AutoModel": "modeling.Evil"})
    with pytest.raises(UnsupportedPipeline, match="auto_map"):
        resolve(folder)


@pytest.mark.parametrize("name", ["../unet", "a/b", "..", "", "unet.py"])
def test_component_names_cannot_leave_the_folder(folder: Path, name: str) -> None:
    edit(folder, "model_index.json", **{name: ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(ProfileError, match="not a plain name"):
        resolve(folder)


def test_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "secret.json", UNET)
    (folder / "unet/config.json").unlink()
    (folder / "unet/config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ProfileError, match="leaves the model's folder"):
        resolve(folder)


def test_a_hub_cache_links_into_its_blobs(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    snapshot = cache / "snapshots" / "abc"
    folder.rename(snapshot)
    (snapshot / "unet/config.json").rename(cache / "blobs" / "1234")
    (snapshot / "unet/config.json").symlink_to("../../../blobs/1234")
    assert resolve(snapshot).build().unet.config.sample_size == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object is wanted"),
        ('{"a":' * 2000 + "1" + "}" * 2000, "deep"),
        ('{"a":' * 200_000, "deep|not valid"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_broken_json_is_a_profile_error(text: str, words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        parse_json(text.encode("utf-8", "surrogateescape"), "here")


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_parse_or_raise_profile_error(data: bytes) -> None:
    with contextlib.suppress(ProfileError):
        assert isinstance(parse_json(data, "here"), dict)


def test_oversized_json_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ProfileError, match="bytes; at most"):
        read_json(tmp_path, "big.json")


def test_a_pipe_in_place_of_a_file_does_not_hang(folder: Path) -> None:
    (folder / "unet/config.json").unlink()
    os.mkfifo(folder / "unet/config.json")
    with pytest.raises(ProfileError, match="not a regular file"):
        resolve(folder)


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("unet", {"layers_per_block": 10**6}),
        ("unet", {"transformer_layers_per_block": [1, 10**7]}),
        ("text_encoder", {"hidden_size": 2**45}),
        ("text_encoder", {"hidden_size": 2**21, "intermediate_size": 2**22}),
    ],
)
def test_configs_that_would_build_forever_are_refused(folder: Path, component: str, changes: dict[str, object]) -> None:
    edit(folder, f"{component}/config.json", **changes)
    with pytest.raises(ProfileError, match=component):
        resolve(folder).build()


def test_a_config_that_does_not_build_names_the_component(folder: Path) -> None:
    edit(folder, "unet/config.json", down_block_types=["NoSuchBlock", "DownBlock2D"])
    with pytest.raises(ProfileError, match=r"unet: UNet2DConditionModel cannot be built .*NoSuchBlock"):
        resolve(folder).build()


def test_a_missing_component_config_is_named(folder: Path) -> None:
    (folder / "vae/config.json").unlink()
    with pytest.raises(ProfileError, match=r"vae/config\.json is missing"):
        resolve(folder).build()


def test_a_class_the_library_lacks_is_named(folder: Path) -> None:
    edit(folder, "model_index.json", unet=["diffusers", "UNetOfTomorrow"])
    with pytest.raises(UnsupportedPipeline, match="UNetOfTomorrow"):
        resolve(folder).build()


# --- safetensors headers --------------------------------------------------------------------------------------------


def write_header(path: Path, tensors: dict[str, tuple[str, list[int]]], data: bool = True) -> None:
    """A safetensors file of holes: real header, sparse data."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2}
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        count = sizes[dtype]
        for size in shape:
            count *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + (offset if data else 0))


def unet_tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    unet = resolve(folder).build().unet
    return {name: ("F16", list(value.shape)) for name, value in unet.state_dict().items()}


def test_headers_of_the_right_weights_pass_and_tell_the_dtype(folder: Path) -> None:
    write_header(folder / "unet/diffusion_pytorch_model.safetensors", unet_tensors(folder))
    source = resolve(folder)
    assert source.dtype == "fp16"
    import torch

    assert source.build().unet.dtype == torch.float16


def test_headers_of_another_model_are_a_profile_error(folder: Path) -> None:
    tensors = unet_tensors(folder)
    tensors["conv_in.weight"] = ("F16", [64, 4, 3, 3])
    write_header(folder / "unet/diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(ProfileError, match=r"unet: conv_in\.weight is \[64, 4, 3, 3\].*\[32, 4, 3, 3\]"):
        resolve(folder).build()


def test_missing_weights_are_a_profile_error(folder: Path) -> None:
    write_header(folder / "unet/diffusion_pytorch_model.safetensors", {"conv_in.weight": ("F32", [32, 4, 3, 3])})
    with pytest.raises(ProfileError, match="weights are missing"):
        resolve(folder).build()


def test_shards_are_read_through_their_index(folder: Path) -> None:
    tensors = unet_tensors(folder)
    names = list(tensors)
    half = len(names) // 2
    for number, part in ((1, names[:half]), (2, names[half:])):
        file = folder / f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        write_header(file, {name: tensors[name] for name in part})
    weight_map = {n: f"diffusion_pytorch_model-0000{1 + (n in names[half:])}-of-00002.safetensors" for n in names}
    write(folder, "unet/diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})
    stored = read_stored(folder, "unet")
    assert stored is not None
    assert set(stored.tensors) == set(names)
    weight_map[names[0]] = "../../../etc/passwd"
    write(folder, "unet/diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(ProfileError, match="not a plain safetensors file name"):
        read_stored(folder, "unet")


def test_cut_or_lying_headers_are_profile_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"123")
    with pytest.raises(ProfileError, match="too short"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ProfileError, match="cut or broken"):
        read_header(path)
    write_header(path, {"w": ("F32", [10])}, data=False)
    with pytest.raises(ProfileError, match="does not fit"):
        read_header(path)


def test_only_headers_are_read_of_real_files(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert read_header(tmp_path / "model.safetensors") == {"a": ("F32", (3, 4)), "b": ("BF16", (5,))}


# --- names and the hub ----------------------------------------------------------------------------------------------


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ProfileError, match=r"unknown model 'sdxxl'.*stable-diffusion-xl"):
        resolve("sdxxl")


def test_a_path_that_is_not_there_is_no_hub_id() -> None:
    with pytest.raises(ProfileError, match="no such folder"):
        resolve("./flux.1-dev")


@pytest.mark.parametrize("text", ["", "   ", "a\0b", "x" * 5000])
def test_strings_that_name_nothing(text: str) -> None:
    with pytest.raises(ProfileError, match="not a model name"):
        resolve(text)


def test_a_hub_id_reads_json_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake hub is a folder; it records which patterns were asked for."""
    import huggingface_hub

    asked: list[list[str]] = []

    def snapshot(repo_id: str, allow_patterns: list[str], **_: object) -> str:
        assert repo_id == "someone/tiny"
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    source = resolve("someone/tiny")
    assert (source.kind, source.name, source.dtype) == ("hub", "someone/tiny", "fp16")
    assert source.stored["vae"].elements == 12
    assert all(pattern.endswith(".json") for pattern in asked[0])
    assert source.digest == resolve(folder).digest


class FakeApi:
    """Two safetensors files, of which only headers can be asked for."""

    def list_repo_files(self, repo_id: str) -> list[str]:
        return ["README.md", "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]

    def parse_safetensors_file_metadata(self, repo_id: str, filename: str) -> Any:
        from types import SimpleNamespace

        assert filename == "vae/diffusion_pytorch_model.safetensors"
        return SimpleNamespace(tensors={"w": SimpleNamespace(dtype="F16", shape=[3, 4])})


def test_offline_says_so_and_names_what_is_bundled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ProfileError, match=r"offline \(HF_HUB_OFFLINE is set\).*flux\.1-dev"):
        resolve("someone/FLUX.1-dev-tuned")


def test_a_gated_model_tells_how_to_get_access() -> None:
    from huggingface_hub.errors import GatedRepoError

    error = GatedRepoError.__new__(GatedRepoError)
    assert "accept its terms" in hub._explain("a/b", error)


# --- live -----------------------------------------------------------------------------------------------------------


def test_a_live_pipeline_is_itself_and_its_digest_sees_changes(folder: Path) -> None:
    pipeline = resolve(folder).build()
    source = resolve(pipeline)
    assert source.kind == "live"
    assert source.build() is pipeline
    before = source.digest
    assert resolve(pipeline).digest == before
    pipeline.vae.enable_tiling()
    tiled = resolve(pipeline).digest
    assert tiled != before
    pipeline.vae.disable_tiling()
    pipeline.unet.to(dtype=__import__("torch").float16)
    assert resolve(pipeline).digest not in (before, tiled)


@pytest.mark.parametrize(("value", "words"), [(3, "builtins.int is no diffusers pipeline"), (None, "NoneType")])
def test_other_objects_are_named(value: object, words: str) -> None:
    with pytest.raises(UnsupportedPipeline, match=words):
        resolve(value)


def test_a_component_and_a_modular_pipeline_are_named(folder: Path) -> None:
    from diffusers import ModularPipeline, StableDiffusionPipeline

    with pytest.raises(UnsupportedPipeline, match="single component"):
        resolve(resolve(folder).build().unet)
    with pytest.raises(UnsupportedPipeline, match="modular pipeline"):
        resolve(ModularPipeline.__new__(ModularPipeline))
    with pytest.raises(UnsupportedPipeline, match="is a class"):
        resolve(StableDiffusionPipeline)


# --- stand-ins ------------------------------------------------------------------------------------------------------


def tokenizer(class_name: str, **config: object) -> StandInTokenizer:
    files = {"tokenizer_config.json": config} if config else {}
    made = make_standin(Component(name="t", library="transformers", class_name=class_name, files=files))
    assert isinstance(made, StandInTokenizer) or type(made) is StandInTokenizer
    return made


def test_clip_pads_to_its_length_and_cuts_with_its_end_token() -> None:
    clip = tokenizer("CLIPTokenizer")
    out = clip(["a cat", "b " * 200], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert out.input_ids.shape == (2, 77)
    assert out.attention_mask.sum(dim=1).tolist() == [4, 77]
    assert out.input_ids[0].argmax() == 3
    assert out.input_ids[1, -1] == clip.eos_token_id
    longest = clip(["a cat", "b " * 200], padding="longest", return_tensors="pt")
    assert longest.input_ids.shape == (2, 202)


def test_one_text_without_tensors_is_one_row() -> None:
    t5 = tokenizer("T5TokenizerFast")
    assert len(t5("a cat")["input_ids"]) == 3
    assert len(t5(["a cat"])["input_ids"]) == 1
    assert t5("a cat", return_tensors="pt").input_ids.shape == (1, 3)
    assert t5.batch_decode(t5(["a cat"]).input_ids) == ["word word word"]


def test_padding_goes_to_the_side_the_tokenizer_says() -> None:
    left = tokenizer("LlamaTokenizer", padding_side="left")
    assert left(["a", "a b"], padding=True).attention_mask == [[0, 1, 1], [1, 1, 1]]
    again = left.pad({"input_ids": [[5], [5, 6]]}, padding=True, return_tensors="pt")
    assert again.attention_mask.tolist() == [[0, 1], [1, 1]]


@given(st.lists(st.text(max_size=40), min_size=1, max_size=4), st.integers(3, 60))
@settings(max_examples=40, deadline=None)
def test_padded_and_truncated_rows_are_exactly_max_length(texts: list[str], length: int) -> None:
    for name in ("CLIPTokenizer", "T5Tokenizer", "Qwen2Tokenizer", "BertTokenizer"):
        out = tokenizer(name)(texts, padding="max_length", truncation=True, max_length=length)
        assert {len(row) for row in out.input_ids} == {length}
        assert [sum(row) for row in out.attention_mask] == [min(length, len(tokenizer(name)([text]).input_ids[0])) for text in texts]


def test_chat_templates_give_text_or_ids() -> None:
    qwen = tokenizer("Qwen2Tokenizer")
    chat = [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}]
    text = qwen.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    options = {"return_dict": True, "return_tensors": "pt", "padding": "max_length", "max_length": 64, "truncation": True}
    assert qwen.apply_chat_template([chat, chat], **options).input_ids.shape == (2, 64)


def test_words_are_counted_like_qwen_image_counts_its_own_template() -> None:
    """diffusers drops the first 34 tokens, which it knows to be the template before the prompt."""
    import inspect

    from diffusers import QwenImagePipeline

    source = inspect.getsource(QwenImagePipeline.__init__)
    assert "prompt_template_encode_start_idx = 34" in source
    template = source.split("prompt_template_encode = ")[1].split("\n")[0].strip().strip('"')
    head = template.encode().decode("unicode_escape").split("{}")[0]
    assert abs(len(count_words(head)) - 34) <= 2


def test_a_stand_in_passes_for_the_class_it_stands_for() -> None:
    from transformers import RobertaTokenizer

    assert isinstance(tokenizer("RobertaTokenizer"), RobertaTokenizer)


def test_image_stand_ins_give_zeros_of_the_configured_size() -> None:
    files = {"preprocessor_config.json": {"crop_size": {"height": 32, "width": 48}}}
    images = make_standin(Component(name="f", library="transformers", class_name="CLIPImageProcessor", files=files))
    assert images([object(), object()], return_tensors="pt").pixel_values.shape == (2, 3, 32, 48)


def test_qwen_processor_expands_each_image_into_its_patches() -> None:
    """1024 × 1024 rounds to 1036 = 37 × 28, over the limit of 1280 × 28²; scaled down to 35 × 28: 70 patches a side."""
    from PIL import Image

    made = make_standin(Component(name="p", library="transformers", class_name="Qwen2VLProcessor"))
    text = "<|vision_start|><|image_pad|><|vision_end|>a cat"
    out = made(text=[text], images=[Image.new("RGB", (1024, 1024))], padding=True, return_tensors="pt")
    assert out.image_grid_thw.tolist() == [[1, 70, 70]]
    down = across = 70
    assert out.pixel_values.shape == (down * across, 1176)
    assert int((out.input_ids == made.image_token_id).sum()) == down * across // 4
