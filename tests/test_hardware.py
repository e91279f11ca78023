"""Detection: NVML answers of several driver generations, MIG, CUDA_VISIBLE_DEVICES, control groups, backends, doctor."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from planner.errors import HardwareError
from planner.hardware.assumed import device_from_nvml
from planner.hardware.backends import usable_backends, version_numbers
from planner.hardware.detect import detect_device, detect_devices, torch_without_cuda, visible_devices
from planner.hardware.doctor import doctor_report
from planner.hardware.host import CpuInfo, assumed_cpu_flops_per_second, cgroup_limits, cpu_device, cpu_info, host_memory
from planner.hardware.nvml import read_nvml
from planner.types import Device
from planner.units import GIB, MIB

ROOT = Path(__file__).resolve().parent.parent


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(f"NVML error {value}")
        self.value = value


class FakeNvml:
    """A recorded machine. Each GPU is a dict of answers; an int in place of an answer raises that error code."""

    NVMLError = NVMLError

    def __init__(self, gpus=(), *, init=None, driver="570.172.08", memory_v2=True, as_bytes=False, without=()):
        self.gpus, self.init, self.driver, self.memory_v2 = list(gpus), init, driver, memory_v2
        self.as_bytes, self.without, self.open = as_bytes, without, 0

    def __getattribute__(self, name):
        if name.startswith("nvml") and name in object.__getattribute__(self, "without"):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def _say(self, text):
        return text.encode() if self.as_bytes else text

    def _get(self, handle, key, missing=3):
        answer = handle.get(key, NVMLError(missing))
        if isinstance(answer, NVMLError):
            raise answer
        return answer

    def nvmlInit(self):
        if self.init is not None:
            raise NVMLError(self.init)
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return self._say(self.driver)

    def nvmlSystemGetCudaDriverVersion(self):
        return 12080

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.gpus[index]

    def nvmlDeviceGetName(self, handle):
        return self._say(self._get(handle, "name"))

    def nvmlDeviceGetUUID(self, handle):
        return self._say(self._get(handle, "uuid"))

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        if version is not None and not self.memory_v2:
            raise NVMLError(13)
        total, used, reserved = self._get(handle, "memory")
        if version is None:
            return SimpleNamespace(total=total, used=used + reserved, free=total - used - reserved)
        return SimpleNamespace(total=total, used=used, reserved=reserved, free=total - used - reserved)

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self._get(handle, "capability")

    def nvmlDeviceGetNumGpuCores(self, handle):
        return self._get(handle, "cores")

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return self._get(handle, "clocks")[{1: 0, 2: 1}[kind]]

    def nvmlDeviceGetMemoryBusWidth(self, handle):
        return self._get(handle, "bus")

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle):
        return self._get(handle, "pcie")[0]

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle):
        return self._get(handle, "pcie")[1]

    def nvmlDeviceGetPowerManagementLimit(self, handle):
        return self._get(handle, "power")

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._get(handle, "processes")]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._get(handle, "graphics")]

    def nvmlDeviceGetMigMode(self, handle):
        return self._get(handle, "mig_mode")

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, slot):
        instances = handle.get("mig", [])
        if slot >= len(instances):
            raise NVMLError(6)
        return instances[slot]

    def nvmlDeviceGetAttributes(self, handle):
        return SimpleNamespace(multiprocessorCount=self._get(handle, "sms"))


RTX_4090 = {
    "name": "NVIDIA GeForce RTX 4090",
    "uuid": "GPU-11111111-2222-3333-4444-555555555555",
    "memory": (24564 * MIB, 1000 * MIB, 400 * MIB),
    "capability": (8, 9),
    "cores": 16384,
    "clocks": (3105, 10501),
    "bus": 384,
    "pcie": (4, 16),
    "power": 450000,
    "processes": [],
    "graphics": [],
    "mig_mode": NVMLError(3),
}
RTX_3060 = {
    **RTX_4090,
    "name": "NVIDIA GeForce RTX 3060",
    "uuid": "GPU-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
    "memory": (12288 * MIB, 0, 300 * MIB),
    "capability": (8, 6),
    "pcie": (4, 4),
}
MIG_3G = {
    "name": "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
    "uuid": "MIG-77777777-0000-0000-0000-000000000001",
    "memory": (20 * GIB, 0, 0),
    "sms": 42,
    "processes": [],
}
A100_MIG = {
    **RTX_4090,
    "name": "NVIDIA A100-SXM4-40GB",
    "uuid": "GPU-99999999-0000-0000-0000-000000000000",
    "memory": (40 * GIB, 0, 0),
    "capability": (8, 0),
    "mig_mode": (1, 1),
    "mig": [MIG_3G],
}


def fake_torch(*, available=True, cuda="12.8", devices=(), current=0, reserved=0, allocated=0):
    """As much of torch as detection asks for; a device is (properties, free, total)."""
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: len(devices),
            current_device=lambda: current,
            get_device_properties=lambda index: devices[index][0],
            mem_get_info=lambda index: devices[index][1:],
            memory_reserved=lambda index: reserved,
            memory_allocated=lambda index: allocated,
        ),
    )


def torch_properties(gpu, sms=128, **more):
    major, minor = gpu["capability"]
    return SimpleNamespace(
        name=gpu["name"],
        uuid=gpu["uuid"].removeprefix("GPU-"),
        major=major,
        minor=minor,
        multi_processor_count=sms,
        total_memory=gpu["memory"][0] - 450 * MIB,
        **more,
    )


@pytest.fixture(autouse=True)
def _torch_has_cuda(monkeypatch):
    """The machine under test decides, not the torch that runs the tests."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("planner.hardware.detect.torch_without_cuda", lambda torch=None: None)


# --- NVML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [(9, "driver is not loaded"), (12, "no NVIDIA driver"), (18, "reboot"), (4, "no permission"), (999, "NVML error 999")],
)
def test_an_nvml_that_does_not_start_is_a_hardware_error_with_its_reason(code, words):
    with pytest.raises(HardwareError, match=words):
        read_nvml(FakeNvml(init=code))


def test_missing_pynvml_is_a_hardware_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(HardwareError, match="pip install nvidia-ml-py"):
        read_nvml()


def test_a_current_driver_tells_its_own_share_of_memory_apart():
    library = FakeNvml([RTX_4090])
    report = read_nvml(library)
    (gpu,) = report.devices
    assert (gpu.total_bytes, gpu.used_bytes, gpu.driver_reserved_bytes) == (24564 * MIB, 1000 * MIB, 400 * MIB)
    assert gpu.free_bytes == 23164 * MIB
    assert (report.driver_version, report.cuda_driver_version) == ("570.172.08", "12.8")
    assert gpu.power_limit_watts == 450
    assert library.open == 0


def test_an_old_driver_without_memory_v2_and_an_old_pynvml_with_bytes():
    report = read_nvml(FakeNvml([RTX_4090], memory_v2=False, as_bytes=True, driver="418.87.00"))
    (gpu,) = report.devices
    assert gpu.name == "NVIDIA GeForce RTX 4090"
    assert report.driver_version == "418.87.00"
    assert gpu.driver_reserved_bytes is None
    assert gpu.used_bytes == 1400 * MIB


def test_what_a_driver_does_not_support_is_none():
    poor = {key: RTX_4090[key] for key in ("name", "uuid", "memory")}
    functions = ("nvmlDeviceGetNumGpuCores", "nvmlDeviceGetMemoryBusWidth", "nvmlDeviceGetMigMode")
    (gpu,) = read_nvml(FakeNvml([poor], without=functions)).devices
    assert (gpu.compute_capability, gpu.cuda_cores, gpu.memory_bus_bits, gpu.pcie_lanes) == (None,) * 4
    assert gpu.processes is None
    assert not gpu.mig_enabled


def test_a_gpu_that_fell_off_the_bus_does_not_hide_the_others():
    lost = {**RTX_4090, "memory": NVMLError(15)}
    library = FakeNvml([lost, RTX_3060])
    report = read_nvml(library)
    assert [gpu.name for gpu in report.devices] == ["NVIDIA GeForce RTX 3060"]
    assert report.problems == ("GPU 0 does not answer: NVML error 15",)
    assert library.open == 0


def test_a_driver_without_memory_figures_is_a_problem_not_a_crash():
    report = read_nvml(FakeNvml([{**RTX_4090, "memory": NVMLError(3)}]))
    assert report.problems == ("GPU 0 does not answer: its driver does not report memory",)


def test_other_processes_are_counted_once_and_without_this_one():
    processes = [(os.getpid(), 500 * MIB), (4242, 3000 * MIB)]
    gpu = {**RTX_4090, "processes": processes, "graphics": [(4242, 3000 * MIB), (77, 200 * MIB)]}
    device = detect_device(library=FakeNvml([gpu]), environ={})
    assert "2 other processes hold 3200 MiB" in device.note
    assert detect_device(library=FakeNvml([RTX_4090]), environ={}).note is None


def test_process_memory_that_windows_does_not_tell():
    gpu = {**RTX_4090, "processes": [(4242, None)]}
    assert "1 other process holds memory the driver does not itemize" in detect_device(library=FakeNvml([gpu])).note


# --- devices --------------------------------------------------------------------------------------------------------


def test_a_known_card_takes_its_profile_and_its_slot():
    device = detect_device(library=FakeNvml([RTX_3060]), environ={})
    assert device.name == "NVIDIA GeForce RTX 3060"
    assert device.basis == "datasheet"
    assert device.bandwidth_bytes_per_second == 360e9
    assert device.free_bytes == 11988 * MIB
    assert device.host_free_bytes > 0
    # It sits in four lanes of generation 4: 4 x 16 GT/s / 8 x 128/130.
    assert device.link_bytes_per_second == pytest.approx(7.877e9, rel=1e-3)


def test_an_unknown_card_is_assumed_from_what_nvml_tells():
    gpu = {**RTX_4090, "name": "NVIDIA Graphics Device"}
    device = detect_device(library=FakeNvml([gpu]), environ={})
    assert device.basis == "assumed"
    assert device.sm_count == 128
    assert device.architecture == "Ada Lovelace"
    assert device.bandwidth_bytes_per_second == pytest.approx(10501e6 * 2 * 384 / 8)
    assert device.flops_per_second["fp16"] == pytest.approx(128 * 3105e6 * 512)
    assert "no profile has this name" in device.note


@pytest.mark.parametrize("missing", ["cores", "bus", "clocks", "capability"])
def test_an_unknown_card_that_tells_too_little_is_refused_with_the_way_out(missing):
    gpu = {**RTX_4090, "name": "NVIDIA Graphics Device", missing: NVMLError(3)}
    with pytest.raises(HardwareError, match=r"NVIDIA Graphics Device .*--gpu"):
        detect_device(library=FakeNvml([gpu]), environ={})


def test_a_mig_instance_is_its_share_of_the_gpu():
    device = detect_device(library=FakeNvml([A100_MIG]), environ={})
    assert device.name == "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    assert device.total_bytes == 20 * GIB
    assert device.sm_count == 42
    assert device.flops_per_second["bf16"] == pytest.approx(312e12 * 42 / 108)
    assert device.bandwidth_bytes_per_second == pytest.approx(1555e9 / 2)
    assert device.basis == "assumed"


def test_a_mig_instance_of_an_unknown_gpu_is_refused():
    parent = {**A100_MIG, "name": "NVIDIA Unheard-Of"}
    with pytest.raises(HardwareError, match="MIG instance of NVIDIA Unheard-Of"):
        device_from_nvml(read_nvml(FakeNvml([parent])).devices[0].mig[0])


# --- CUDA_VISIBLE_DEVICES -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ["RTX 4090", "RTX 3060", "3g.20gb"]),
        ("1", ["RTX 3060"]),
        ("1,0", ["RTX 3060", "RTX 4090"]),
        (" 1 , 0 ", ["RTX 3060", "RTX 4090"]),
        ("", []),
        ("-1", []),
        ("0,9,1", ["RTX 4090"]),
        ("GPU-aaaa", ["RTX 3060"]),
        ("GPU-11111111-2222-3333-4444-555555555555,1", ["RTX 4090", "RTX 3060"]),
        ("GPU-", []),
        ("GPU-feed", []),
        ("MIG-77777777-0000-0000-0000-000000000001", ["3g.20gb"]),
        ("2", ["3g.20gb"]),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices(value, names):
    report = read_nvml(FakeNvml([RTX_4090, RTX_3060, A100_MIG]))
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    seen = visible_devices(report, environ)
    assert len(seen) == len(names)
    assert all(gpu.name.endswith(name) for gpu, name in zip(seen, names, strict=True))


def test_a_gpu_in_mig_mode_without_instances_cannot_be_used():
    report = read_nvml(FakeNvml([{**A100_MIG, "mig": []}]))
    assert visible_devices(report, {}) == ()


def test_indices_count_among_the_visible():
    library, environ = FakeNvml([RTX_4090, RTX_3060]), {"CUDA_VISIBLE_DEVICES": "1"}
    assert detect_device("cuda:0", library=library, environ=environ).name == "NVIDIA GeForce RTX 3060"
    with pytest.raises(HardwareError, match="cuda:1 is not there; this process sees cuda:0 NVIDIA GeForce RTX 3060"):
        detect_device("cuda:1", library=library, environ=environ)


def test_hidden_gpus_leave_the_cpu_and_say_so():
    library, environ = FakeNvml([RTX_4090]), {"CUDA_VISIBLE_DEVICES": ""}
    device = detect_device(library=library, environ=environ)
    assert device.kind == "cpu"
    assert "CUDA_VISIBLE_DEVICES='' hides every GPU" in device.note
    with pytest.raises(HardwareError, match="hides every GPU"):
        detect_device("cuda", library=library, environ=environ)


def test_detect_devices_lists_the_good_ones_and_the_problems():
    odd = {**RTX_4090, "name": "NVIDIA Odd", "cores": NVMLError(3)}
    detected = detect_devices(FakeNvml([odd, RTX_3060]), {})
    assert [device.kind for device in detected.devices] == ["cuda", "cpu"]
    assert "NVIDIA Odd" in detected.problems[0]


# --- torch ----------------------------------------------------------------------------------------------------------


def test_torch_and_nvml_are_matched_by_uuid_not_by_number():
    # CUDA numbers the fastest first, NVML by PCI bus: cuda:0 is NVML's second GPU.
    torch = fake_torch(devices=[(torch_properties(RTX_4090), 20 * GIB, 23 * GIB)], reserved=3 * GIB, allocated=GIB)
    device = detect_device("cuda", library=FakeNvml([RTX_3060, RTX_4090]), torch=torch)
    assert device.name == "NVIDIA GeForce RTX 4090"
    assert device.total_bytes == 23 * GIB
    # Free now, and two GiB of cached blocks that torch can give back.
    assert device.free_bytes == 22 * GIB


def test_torch_alone_is_enough_for_a_known_card():
    torch = fake_torch(devices=[(torch_properties(RTX_4090), 20 * GIB, 23 * GIB)])
    device = detect_device(library=FakeNvml(init=12), torch=torch)
    assert (device.name, device.basis) == ("NVIDIA GeForce RTX 4090", "datasheet")


def test_torch_properties_stand_in_for_nvml_on_an_unknown_card():
    facts = {"clock_rate": 2_000_000, "memory_clock_rate": 10_000_000, "memory_bus_width": 256}
    properties = torch_properties({**RTX_4090, "name": "NVIDIA Odd"}, sms=100, **facts)
    device = detect_device(library=FakeNvml(init=12), torch=fake_torch(devices=[(properties, GIB, 8 * GIB)]))
    assert device.flops_per_second["fp32"] == pytest.approx(100 * 2e9 * 256)
    assert device.bandwidth_bytes_per_second == pytest.approx(640e9)


def test_an_index_torch_does_not_have():
    torch = fake_torch(devices=[(torch_properties(RTX_4090), 1, 2)])
    with pytest.raises(HardwareError, match="cuda:3 is not there; torch sees 1"):
        detect_device("cuda:3", library=FakeNvml([RTX_4090]), torch=torch)


def test_torch_without_cuda_beside_a_gpu(monkeypatch):
    monkeypatch.setattr("planner.hardware.detect.torch_without_cuda", torch_without_cuda)
    torch = fake_torch(available=False, cuda=None)
    device = detect_device(library=FakeNvml([RTX_4090]), torch=torch)
    assert device.kind == "cpu"
    assert "torch 2.13.0 is a build without CUDA" in device.note
    with pytest.raises(HardwareError, match=r"cuda:0 was asked for, but torch 2\.13\.0 is a build without CUDA"):
        detect_device("cuda:0", library=FakeNvml([RTX_4090]), torch=torch)


def test_torch_that_does_not_fit_the_driver():
    with pytest.raises(HardwareError, match="is_available"):
        detect_device("cuda", library=FakeNvml([RTX_4090]), torch=fake_torch(available=False))


def test_the_installed_torch_is_judged_without_importing_it():
    code = (
        "import sys; from planner.hardware.detect import torch_without_cuda; said = torch_without_cuda();"
        "assert 'torch' not in sys.modules; import torch; print((said is None) == (torch.version.cuda is not None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("spec", ["mps", "xpu:0", "cuda:x", "gpu", ""])
def test_other_devices_are_refused(spec):
    with pytest.raises(HardwareError, match="is not supported"):
        detect_device(spec, library=FakeNvml([RTX_4090]))


def test_cpu_is_taken_when_asked_for_or_alone():
    assert detect_device("cpu", library=FakeNvml([RTX_4090])).kind == "cpu"
    alone = detect_device(library=FakeNvml(init=12))
    assert alone.kind == "cpu"
    with pytest.raises(HardwareError, match="no NVIDIA driver"):
        detect_device("cuda", library=FakeNvml(init=12))


# --- host -----------------------------------------------------------------------------------------------------------


def make_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
    "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "100\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n",
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
    "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GIB}\n",
    "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {GIB // 2}\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
}


def test_a_parent_group_limits_in_version_2(tmp_path):
    (limit,) = cgroup_limits(make_tree(tmp_path, V2))
    assert (limit.limit_bytes, limit.used_bytes) == (4 * GIB, 2 * GIB)


def test_version_1_and_its_word_for_no_limit(tmp_path):
    (limit,) = cgroup_limits(make_tree(tmp_path, V1))
    assert (limit.limit_bytes, limit.used_bytes) == (2 * GIB, GIB // 2)


def test_inside_a_container_the_mount_is_the_group(tmp_path):
    files = {
        "proc/self/cgroup": "0::/../../outside\n",
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/memory.current": "0\n",
        "outside/memory.max": "1\n",
        "outside/memory.current": "0\n",
    }
    (limit,) = cgroup_limits(make_tree(tmp_path, files))
    assert limit.limit_bytes == GIB


def test_no_control_groups_at_all(tmp_path):
    assert cgroup_limits(tmp_path) == ()


def test_free_memory_is_the_smaller_of_machine_and_group(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=50 * GIB))
    limited = host_memory(make_tree(tmp_path, V2))
    assert (limited.total_bytes, limited.free_bytes) == (4 * GIB, 2 * GIB)
    assert limited.limited_by.endswith("sys/fs/cgroup/a")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=GIB))
    busy = host_memory(tmp_path)
    assert (busy.free_bytes, busy.limited_by) == (GIB, None)


def test_use_above_the_limit_leaves_nothing_not_less(tmp_path):
    make_tree(tmp_path, {**V1, "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{9 * GIB}\n"})
    assert host_memory(tmp_path).free_bytes == 0


def test_the_cpu_is_named_and_its_peak_follows_from_its_vector_units(tmp_path):
    text = "processor\t: 0\nmodel name\t: Example CPU\ncpu MHz\t\t: 2500.000\nflags\t\t: sse2 avx avx2\n\nprocessor\t: 1\n"
    info = cpu_info(make_tree(tmp_path, {"proc/cpuinfo": text}))
    assert (info.name, info.clock_hz) == ("Example CPU", 2.5e9)
    assert assumed_cpu_flops_per_second(info) == info.cores * 2.5e9 * 32
    assert assumed_cpu_flops_per_second(CpuInfo(name="x", cores=2, clock_hz=1e9, flags=frozenset({"avx512f"}))) == 128e9
    assert assumed_cpu_flops_per_second(CpuInfo(name="x", cores=1)) == 2e9 * 8


def test_a_probed_cpu_is_measured_and_a_bare_one_assumed():
    measured = cpu_device(5e11, 4e10)
    assert (measured.basis, measured.bandwidth_bytes_per_second) == ("measured", 4e10)
    assert measured.flops_per_second["bf16"] == 5e11
    assumed = cpu_device()
    assert assumed.basis == "assumed"
    assert "assumed" in assumed.note
    assert 0 < assumed.free_bytes <= assumed.total_bytes


# --- backends and doctor --------------------------------------------------------------------------------------------


def device_of(capability, kind="cuda"):
    return Device(
        name="Card",
        kind=kind,
        architecture="x",
        compute_capability=capability,
        total_bytes=GIB,
        flops_per_second={"fp32": 1.0},
        bandwidth_bytes_per_second=1.0,
        basis="assumed",
    )


ALL = {
    "torch": "2.13.0+cu130",
    "xformers": "0.0.33",
    "flash-attn": "2.8.0",
    "sageattention": "2.2.0",
    "torchao": "0.18.0",
    "triton": "3.6.0",
    "bitsandbytes": "0.49.0",
}


def backends(device, versions=ALL, pinned=None, system="Linux"):
    modules = {name.replace("-", "_") for name in versions}
    return usable_backends(
        device,
        installed=versions.get,
        importable=modules.__contains__,
        pinned_torch=(pinned or {}).get,
        system=system,
    )


def test_everything_works_on_a_recent_card():
    assert set(backends(device_of((8, 9))).values()) == {None}


def test_an_old_card_lacks_flash_and_sage_and_says_why():
    found = backends(device_of((7, 5)))
    assert found["flash_attn"] == found["sageattention"] == "needs compute capability 8.0; Card has 7.5"
    assert [name for name, reason in found.items() if reason is None] == ["xformers", "torchao", "triton", "bitsandbytes"]


def test_a_cpu_has_torchao_only():
    found = backends(device_of(None, "cpu"))
    assert [name for name, reason in found.items() if reason is None] == ["torchao"]
    assert found["xformers"] == "needs a CUDA device, not cpu"


def test_reasons_for_absent_old_foreign_and_stray_packages():
    device = device_of((9, 0))
    assert backends(device, {"torch": "2.13.0"})["flash_attn"] == "not installed (pip install flash-attn)"
    assert "2.5.9 is older than 2.6.3" in backends(device, {**ALL, "flash-attn": "2.5.9"})["flash_attn"]
    assert "built for torch 2.12.1, but torch 2.13.0+cu130" in backends(device, pinned={"xformers": "2.12.1"})["xformers"]
    assert backends(device, pinned={"xformers": "2.13.0"})["xformers"] is None
    assert "runs on Linux only" in backends(device, system="Windows")["triton"]
    stray = usable_backends(device, installed={"torch": "2.13.0"}.get, importable=lambda module: True, system="Linux")
    assert "version unknown" in stray["xformers"]


@pytest.mark.parametrize(("text", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("0.0.29.post1", (0, 0, 29)), ("dev", ())])
def test_version_numbers(text, numbers):
    assert version_numbers(text) == numbers


def test_doctor_on_a_machine_with_a_gpu():
    busy = {**RTX_4090, "processes": [(4242, GIB)]}
    report = doctor_report(FakeNvml([busy, RTX_3060]), {"CUDA_VISIBLE_DEVICES": "1"})
    assert [health.device.name for health in report.devices[:-1]] == ["NVIDIA GeForce RTX 3060"]
    assert [gpu.name for gpu in report.gpus.devices] == ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060"]
    assert report.gpus.devices[0].processes[0].used_bytes == GIB
    assert report.driver == "570.172.08"
    assert report.versions["diffusers"]
    assert set(report.devices[0].backends) == {
        "xformers",
        "flash_attn",
        "sageattention",
        "torchao",
        "triton",
        "bitsandbytes",
    }
    assert type(report).model_validate_json(report.model_dump_json()) == report


def test_doctor_without_a_driver_reports_and_does_not_fail():
    report = doctor_report(FakeNvml(init=12), {})
    assert [health.device.kind for health in report.devices] == ["cpu"]
    assert any("no NVIDIA driver" in problem for problem in report.problems)


def test_detection_imports_no_torch():
    code = "import sys; from planner.hardware.doctor import doctor_report; doctor_report(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


# --- data in the wheel ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wheel_carries_the_data_and_finds_it(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("planner", "profiles", "calibration", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for path in [*ROOT.glob("profiles/**/*.toml"), *ROOT.glob("calibration/published/*.csv")]:
        assert f"planner/_data/{path.relative_to(ROOT)}" in names
    assert not [name for name in names if "calibration/runs" in name]
    code = "from planner.hardware.profiles import find_gpu; import planner.resources as r; print(r.__file__, find_gpu('T4'))"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert str(tmp_path / "site") in done.stdout
    assert "Tesla T4" in done.stdout
