"""The bundled GPU descriptions: sources, plausibility, names, and the device made from them."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import HardwareError, ProfileError
from planner.hardware.profiles import (
    device_from_profile,
    find_gpu,
    load_gpu_file,
    load_gpu_files,
    load_gpus,
    match_gpu,
    pcie_bytes_per_second,
)
from planner.resources import data_path
from planner.units import GIB, MIB

GPUS = load_gpus()
RATE_SOURCES = {
    "gp100": {"fp32": 128, "fp16": 256},
    "gv100": {"fp32": 128, "fp16": 1024},
    "tu-geforce": {"fp32": 128, "fp16": 512, "int8": 2048},
    "tu-pro": {"fp32": 128, "fp16": 1024, "int8": 2048},
    "ga10x-geforce": {"fp32": 256, "tf32": 256, "fp16": 512, "bf16": 512, "int8": 2048},
    "ga10x-pro": {"fp32": 256, "tf32": 512, "fp16": 1024, "bf16": 1024, "int8": 2048},
    "ad10x-geforce": {"fp32": 256, "tf32": 256, "fp16": 512, "bf16": 512, "fp8": 1024, "int8": 2048},
    "ad10x-pro": {"fp32": 256, "tf32": 512, "fp16": 1024, "bf16": 1024, "fp8": 2048, "int8": 2048},
    "gb20x-geforce": {"fp32": 256, "tf32": 256, "fp16": 512, "bf16": 512, "fp8": 1024, "int8": 2048},
    "gb20x-pro": {"fp32": 256, "tf32": 512, "fp16": 1024, "bf16": 1024, "fp8": 2048, "int8": 2048},
}


def by_name(name):
    return next(gpu for gpu in GPUS if gpu.name == name)


# Dense peaks as NVIDIA's whitepapers print them (with fp32 accumulation), in TFLOP/s.
PUBLISHED = [
    ("NVIDIA GeForce RTX 3090", "fp16", 71, 936),
    ("NVIDIA GeForce RTX 3080", "fp16", 59.5, 760),
    ("NVIDIA GeForce RTX 3070", "fp16", 40.6, 448),
    ("NVIDIA GeForce RTX 4090", "fp16", 165.2, 1008),
    ("NVIDIA GeForce RTX 4080", "fp16", 97.5, 716.8),
    ("NVIDIA GeForce RTX 5090", "fp16", 209.5, 1792),
    ("NVIDIA GeForce RTX 2080 Ti", "fp16", 53.8, 616),
    ("NVIDIA TITAN RTX", "fp16", 130.5, 672),
    ("NVIDIA RTX A6000", "fp16", 154.8, 768),
    ("NVIDIA RTX 6000 Ada Generation", "fp8", 728.5, 960),
    ("Tesla V100-SXM2-16GB", "fp16", 125, 900),
    ("Tesla T4", "fp16", 65, 320),
    ("NVIDIA A100-SXM4-80GB", "bf16", 312, 2039),
    ("NVIDIA A100-PCIE-40GB", "tf32", 156, 1555),
    ("NVIDIA H100 80GB HBM3", "bf16", 989.4, 3350),
    ("NVIDIA H100 PCIe", "fp8", 1513, 2000),
    ("NVIDIA H200", "bf16", 989.4, 4800),
]


@pytest.mark.parametrize(("name", "dtype", "tflops", "bandwidth"), PUBLISHED)
def test_peaks_are_those_of_the_whitepapers(name, dtype, tflops, bandwidth):
    gpu = by_name(name)
    assert gpu.tflops[dtype].value == pytest.approx(tflops, rel=0.005)
    assert gpu.bandwidth_gb_per_second.value == pytest.approx(bandwidth, rel=0.002)


def test_every_figure_names_a_source_and_every_source_is_used():
    for loaded in load_gpu_files():
        used = {figure.source for gpu in loaded.gpu for figure in gpu.figures().values()}
        assert used == set(loaded.sources)
        for source in loaded.sources.values():
            assert source.title
            assert source.url.startswith("https://")


def test_figures_cover_every_number_in_the_files():
    """No number escapes the rule above: each leaf table {value, source} of the raw TOML is among the figures."""
    for path in sorted(data_path("profiles", "gpus").glob("*.toml")):
        raw = tomllib.loads(path.read_text())
        for table, gpu in zip(raw["gpu"], load_gpu_file(path).gpu, strict=True):
            peaks = table.pop("tflops")
            tables = {key for key, value in table.items() if isinstance(value, dict)}
            assert {*tables, *(f"tflops.{key}" for key in peaks)} == set(gpu.figures())
            assert not [key for key, value in table.items() if isinstance(value, int | float)]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_derived_peaks_are_sm_count_times_clock_times_rate(gpu):
    for dtype, figure in gpu.tflops.items():
        rates = RATE_SOURCES.get(figure.source)
        if rates is not None:
            expected = gpu.sm_count.value * gpu.boost_mhz.value * rates[dtype] * 1e-6
            assert figure.value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_profiles_are_plausible(gpu):
    peaks, capability = {key: figure.value for key, figure in gpu.tflops.items()}, gpu.compute_capability.value
    assert peaks["fp16"] >= peaks["fp32"]
    assert ("bf16" in peaks) == ("tf32" in peaks) == (capability >= (8, 0))
    assert ("fp8" in peaks) == (capability >= (8, 9))
    if "bf16" in peaks:
        assert peaks["bf16"] == peaks["fp16"] > peaks["tf32"] * 1.5
    # A size in the name is the size sold, which ECC and the driver may shorten by up to a sixteenth.
    for word in gpu.name.replace("-", " ").split():
        if word.endswith("GB") and word[:-2].isdigit() and gpu.family != "GH200":
            assert 0.93 * int(word[:-2]) <= gpu.memory_mib.value / 1024 <= int(word[:-2])
    assert 100 < gpu.bandwidth_gb_per_second.value < 8000


def test_every_card_that_was_asked_for_is_there():
    wanted = """P100 V100 T4 A10 A10G A30 A40 A100 A800 H100 H200 H800 H20 GH200 L4 L20 L40 L40S B200
    RTX_2060 RTX_2060_SUPER RTX_2070 RTX_2070_SUPER RTX_2080 RTX_2080_SUPER RTX_2080_Ti TITAN_RTX GTX_1080 GTX_1080_Ti
    RTX_3050 RTX_3060 RTX_3060_Ti RTX_3070 RTX_3070_Ti RTX_3080 RTX_3080_Ti RTX_3090 RTX_3090_Ti
    RTX_4060 RTX_4060_Ti RTX_4070 RTX_4070_SUPER RTX_4070_Ti RTX_4070_Ti_SUPER RTX_4080 RTX_4080_SUPER RTX_4090
    RTX_5050 RTX_5060 RTX_5060_Ti RTX_5070 RTX_5070_Ti RTX_5080 RTX_5090
    RTX_3060_Laptop RTX_3080_Laptop RTX_4090_Laptop RTX_5090_Laptop
    RTX_A2000 RTX_A4000 RTX_A5000 RTX_A6000 RTX_4000_Ada RTX_5000_Ada RTX_6000_Ada RTX_PRO_6000"""
    families = {gpu.family for gpu in GPUS}
    assert {name.replace("_", " ") for name in wanted.split()} <= families
    for name in wanted.split():
        assert find_gpu(name.replace("_", " "))[0].family == name.replace("_", " ")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("geforce rtx 4090", "NVIDIA GeForce RTX 4090"),
        ("  RTX   4090 ", "NVIDIA GeForce RTX 4090"),
        ("l40s", "NVIDIA L40S"),
        ("l40", "NVIDIA L40"),
        ("T4", "Tesla T4"),
        ("RTX 3080 12GB", "NVIDIA GeForce RTX 3080 12GB"),
        ("A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB"),
        ("NVIDIA GH200 120GB", "NVIDIA GH200 480GB"),
        ("RTX 3060 Laptop", "NVIDIA GeForce RTX 3060 Laptop GPU"),
    ],
)
def test_exact_names_are_found_without_a_note(asked, found):
    gpu, note = find_gpu(asked)
    assert (gpu.name, note) == (found, None)


@pytest.mark.parametrize(
    ("asked", "found", "others"),
    [
        ("A100", "NVIDIA A100-SXM4-80GB", ["NVIDIA A100-PCIE-40GB", "NVIDIA A100-SXM4-40GB"]),
        ("RTX 3060", "NVIDIA GeForce RTX 3060", ["NVIDIA GeForce RTX 3060 8GB"]),
        ("NVIDIA GeForce RTX 3080", "NVIDIA GeForce RTX 3080", ["NVIDIA GeForce RTX 3080 12GB"]),
        ("h100", "NVIDIA H100 80GB HBM3", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL"]),
    ],
)
def test_a_family_means_its_commonest_variant_and_says_so(asked, found, others):
    gpu, note = find_gpu(asked)
    assert gpu.name == found
    assert note is not None
    assert all(name in note for name in [found, *others])


def test_every_family_of_several_has_one_commonest():
    for family in {gpu.family for gpu in GPUS}:
        assert find_gpu(family)[0].family == family


@pytest.mark.parametrize("asked", ["RTX 4091", "A1000", "RTX 40900", "NVIDIA", "", "RTX"])
def test_an_unknown_name_is_refused_and_never_taken_for_a_near_one(asked):
    with pytest.raises(HardwareError, match=r"not among the .* known ones"):
        find_gpu(asked)


def test_the_refusal_lists_the_nearest_names():
    with pytest.raises(HardwareError, match=r"Nearest: .*NVIDIA GeForce RTX 4090"):
        find_gpu("RTX 4091")
    with pytest.raises(HardwareError, match=r"Nearest: NVIDIA GeForce RTX 3060, "):
        find_gpu("3060")
    with pytest.raises(HardwareError, match="No name is near it"):
        find_gpu("Voodoo")


def test_spaces_do_not_matter():
    assert find_gpu("rtx3060")[0].name == find_gpu("RTX 3060")[0].name


@given(st.sampled_from(GPUS), st.sampled_from([str.upper, str.lower, str.title]), st.booleans())
def test_lookup_ignores_case_and_vendor_words(gpu, change, strip):
    name = gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ") if strip else gpu.name
    assert find_gpu(change(name))[0] == gpu


@given(st.sampled_from(GPUS), st.sampled_from("xqz7"))
def test_a_letter_too_many_is_never_the_same_card(gpu, letter):
    try:
        found, _ = find_gpu(gpu.name + letter)
    except HardwareError:
        return
    assert found != gpu


def test_detected_cards_of_one_name_are_told_apart_by_memory():
    name = "NVIDIA GeForce RTX 3080"
    assert match_gpu(name, 10240 * MIB).name == "NVIDIA GeForce RTX 3080"
    assert match_gpu(name, 12288 * MIB).name == "NVIDIA GeForce RTX 3080 12GB"
    assert match_gpu(name, 20 * GIB) is None
    assert match_gpu("NVIDIA GeForce RTX 3080 Ti", 12288 * MIB).name == "NVIDIA GeForce RTX 3080 Ti"
    # ECC off gives a T4 its full 16 GiB; an older driver reports a little less than 15.
    assert match_gpu("Tesla T4", 16 * GIB).name == match_gpu("Tesla T4", 15109 * MIB).name == "Tesla T4"


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_card_is_matched_by_what_nvml_reports(gpu):
    assert match_gpu(gpu.reported_name, gpu.total_bytes) == gpu


def test_the_device_has_base_units():
    device = device_from_profile(by_name("NVIDIA GeForce RTX 3060"), budget_bytes=8 * GIB, note="asked for as RTX 3060")
    assert device.total_bytes == 12 * GIB
    assert device.budget_bytes == 8 * GIB
    assert device.kind == "cuda"
    assert device.compute_capability == (8, 6)
    assert device.bandwidth_bytes_per_second == 360e9
    assert device.flops_per_second["fp16"] == pytest.approx(28 * 1777e6 * 512, rel=1e-3)
    assert "fp8" not in device.flops_per_second
    assert device.l2_bytes == 3 * MIB
    assert device.sm_count == 28
    assert device.basis == "datasheet"
    assert device.note == "asked for as RTX 3060"
    # 16 lanes x 16 GT/s / 8 bits x 128/130.
    assert device.link_bytes_per_second == pytest.approx(31.508e9, rel=1e-4)


def test_fractional_cache_and_other_links():
    assert device_from_profile(by_name("NVIDIA GeForce RTX 2080 Ti")).l2_bytes == 5632 * 1024
    assert device_from_profile(by_name("NVIDIA GH200 480GB")).link_bytes_per_second == 450e9
    assert pcie_bytes_per_second(3, 16) == pytest.approx(15.754e9, rel=1e-4)
    assert pcie_bytes_per_second(9, 16) is None


GOOD = """
schema_version = 1
[sources.page]
title = "A page"
url = "https://example.org"
[[gpu]]
name = "NVIDIA Test"
family = "Test"
architecture = "Test"
compute_capability = { value = [8, 0], source = "page" }
memory_mib = { value = 1024, source = "page" }
bandwidth_gb_per_second = { value = 100.0, source = "page" }
[gpu.tflops]
fp32 = { value = 1.0, source = "page" }
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('family = "Test"', 'family = "Test"\ncolour = "red"', r"bad\.toml: gpu\[0\]\.colour: Extra inputs"),
        ("value = 1024", "value = -1", r"gpu\[0\]\.memory_mib\.value: .*greater than 0"),
        ('value = 1.0, source = "page"', "value = 1.0", r"gpu\[0\]\.tflops\.fp32\.source: Field required"),
        ('value = 1.0, source = "page"', 'value = 1.0, source = "blog"', r"gpu\[0\]\.tflops\.fp32: source 'blog'"),
        ("fp32 =", "fp31 =", r"gpu\[0\]\.tflops\.fp31"),
        ("schema_version = 1", "schema_version = 2", "schema_version"),
        ("[[gpu]]", "[[gpu]", "cannot be read as TOML"),
    ],
)
def test_a_broken_file_is_refused_with_the_place(tmp_path, old, new, message):
    path = tmp_path / "bad.toml"
    path.write_text(GOOD)
    assert load_gpu_file(path).gpu[0].total_bytes == GIB
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ProfileError, match=message):
        load_gpu_file(path)


def test_two_cards_cannot_share_a_name(tmp_path):
    (tmp_path / "a.toml").write_text(GOOD)
    (tmp_path / "b.toml").write_text(GOOD.replace("NVIDIA Test", "Other").replace('"Test"', '"T"', 1) + "")
    assert len(load_gpu_files(tmp_path)) == 2
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.toml").write_text(GOOD)
    (tmp_path / "more" / "b.toml").write_text(GOOD.replace('name = "NVIDIA Test"', 'name = "X"\naliases = ["geforce test"]'))
    with pytest.raises(ProfileError, match="X: the name 'test' already means NVIDIA Test"):
        load_gpu_files(tmp_path / "more")


def test_a_huge_file_is_refused(tmp_path):
    path = tmp_path / "huge.toml"
    path.write_text(GOOD + "#" * (1 << 20))
    with pytest.raises(ProfileError, match="larger than"):
        load_gpu_file(path)


def test_missing_bundled_data_is_a_profile_error():
    with pytest.raises(ProfileError, match=r"profiles/nothing is missing.*Reinstall"):
        data_path("profiles", "nothing")
