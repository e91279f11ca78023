"""Damaged files of every format that is read from others: each gives a result or a ``PlannerError``, never anything else.

    python -m benchmarks.fuzz plan --seconds 600        # plan, gpu, model, weights, store or csv

With atheris installed the mutations follow coverage of this package; without it hypothesis draws them.
Memory is limited, so that what grows without bound is found; the bytes of a crash are printed in hexadecimal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_BYTES = 4 << 30
"""Address space above what is in use after the imports: far more than any of these files may cost."""
SLOW_SECONDS = 10.0
TOKEN = re.compile(r'"[^"\n]*"|-?\d[\d.e+-]*|\w+|[\[\]{}:,=\n]')
ODD = (
    "NaN", "Infinity", "inf", "nan", "1e999", "-1", "0", "0.5", "1e-320", "9" * 400, str(1 << 63), "null", "true", '""', "[]", "{}",
    "[" * 2000, "{" * 500, '"../../etc/passwd"', '"/etc/passwd"', '"\\u0000"', '"\\ud800"', '"' + "x" * 9000 + '"', ",,", "\n\n", "'",
    "\ufeff",
)  # fmt: skip
Target = Callable[[bytes], None]


def damaged(texts: list[str], data: bytes) -> str:
    """One of the texts, changed as the data say: three bytes each replace, double or delete a token; what is left goes in raw."""
    if not data:
        return texts[0]
    text = texts[data[0] % len(texts)]
    edits, raw = data[1:25], data[25:].decode("utf-8", "replace")
    for at in range(0, len(edits) - 2, 3):
        tokens = list(TOKEN.finditer(text))
        if not tokens:
            break
        found = tokens[(edits[at] << 8 | edits[at + 1]) % len(tokens)]
        kind = edits[at + 2]
        new = "" if kind < 20 else found[0] * 2 if kind < 40 else raw if kind < 60 else ODD[kind % len(ODD)]
        text = text[: found.start()] + new + text[found.end() :]
    return text


def plan(folder: Path) -> Target:
    from planner import Plan
    from tests.golden import cases

    seeds = [cases.untouched().to_json(), cases.offloaded().to_json()]

    def once(data: bytes) -> None:
        read = Plan.from_json("{" + damaged(seeds, data).lstrip().removeprefix("{"))
        assert Plan.from_json(read.to_json()).to_json() == read.to_json()
        assert read.explain(verbose=True).encode()  # half a surrogate pair cannot be printed
        assert read._repr_html_().encode()

    return once


def gpu(folder: Path) -> Target:
    from planner.hardware.profiles import device_from_profile, load_gpu_file

    seeds = [path.read_text() for path in sorted((ROOT / "profiles/gpus").glob("*.toml"))]
    file = folder / "gpu.toml"

    def once(data: bytes) -> None:
        file.write_text(damaged(seeds, data), "utf-8", "replace")
        for each in load_gpu_file(file).gpu:
            device_from_profile(each)

    return once


def model(folder: Path) -> Target:
    from planner.models import resolve

    source = ROOT / "profiles/models/stable-diffusion-v1-5"
    files = [path for path in sorted(source.rglob("*.json")) if path.name != "profile.json"]
    for path in files:
        (folder / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(source)).write_bytes(path.read_bytes())

    def once(data: bytes) -> None:
        original = files[data[0] % len(files) if data else 0]
        place = folder / original.relative_to(source)
        try:
            place.write_text(damaged([original.read_text()], data), "utf-8", "replace")
            resolve(folder)
        finally:
            place.write_bytes(original.read_bytes())

    return once


def weights(folder: Path) -> Target:
    from planner.models.headers import read_stored

    seeds = ['{"__metadata__": {"format": "pt"}, "w": {"dtype": "F16", "shape": [4, 8], "data_offsets": [0, 64]}, '
             '"b": {"dtype": "F32", "shape": [], "data_offsets": [64, 68]}}']  # fmt: skip
    index = ['{"metadata": {"total_size": 68}, "weight_map": {"w": "a-00001-of-00002.safetensors", "b": "model.safetensors"}}']
    (folder / "unet").mkdir(exist_ok=True)

    def once(data: bytes) -> None:
        header, kind = damaged(seeds, data).encode("utf-8", "replace"), data[-1] if data else 0
        length = {1: len(header) + 1, 2: 1 << 63, 3: 0, 4: 7}.get(kind, len(header))
        name = "a-00001-of-00002.safetensors" if kind % 2 else "diffusion_pytorch_model.safetensors"
        for old in (folder / "unet").iterdir():
            old.unlink()
        (folder / "unet" / name).write_bytes((struct.pack("<Q", length) + header + bytes(68))[: 200 if kind == 5 else None])
        (folder / "unet/model.safetensors.index.json").write_text(damaged(index, data[::-1]), "utf-8", "replace")
        found = read_stored(folder, "unet")
        if found is not None:
            assert found.elements >= 0
            assert found.dtype in (None, "fp32", "fp16", "bf16")

    return once


def store(folder: Path) -> Target:
    from planner.calibrate.learn import Observation
    from planner.calibrate.store import Contents, Store, parse_contents
    from tests.test_store import KEY, SAMPLE, run

    seen = Observation(pipeline="p", settings="s", date="2026-01-02T03:04:05+00:00", memory_ratio=1.1, time_ratio=0.9)
    contents = Contents(key=KEY, runs=(run(),), samples=(SAMPLE,), observations=(seen,))
    seeds = [contents.to_text()]
    here = Store(folder)

    def once(data: bytes) -> None:
        text = damaged(seeds, data).encode("utf-8", "replace")
        here.path(KEY).write_bytes(text)
        here.load(KEY)  # what cannot be trusted is moved aside
        read = parse_contents(text)
        assert parse_contents(read.to_text()) == read

    return once


def csv(folder: Path) -> Target:
    from planner.validate.rows import read_table

    seeds = ["".join(path.read_text().splitlines(keepends=True)[:6]) for path in sorted((ROOT / "calibration/published").glob("*.csv"))]
    file = folder / "table.csv"

    def once(data: bytes) -> None:
        file.write_text(damaged(seeds, data), "utf-8", "replace")
        read_table(file)

    return once


TARGETS = {"plan": plan, "gpu": gpu, "model": model, "weights": weights, "store": store, "csv": csv}


def guarded(once: Target, counts: list[int]) -> Target:
    """Errors of the package are answers; anything else, and anything slow, ends the run."""
    from planner.errors import PlannerError

    def run(data: bytes) -> None:
        counts[0] += 1
        start = time.monotonic()
        try:
            try:
                once(data)
            except PlannerError as error:
                str(error).encode()  # a person can be shown it
            if time.monotonic() - start > SLOW_SECONDS:
                raise TimeoutError(f"{time.monotonic() - start:.0f} s")
        except BaseException:
            print("crash:", data.hex(), file=sys.stderr)
            raise

    return run


def main() -> None:
    """Fuzz one format for some time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--crash", help="run these bytes only (hexadecimal)")
    asked = parser.parse_args()
    counts = [0]
    with_atheris = importlib.util.find_spec("atheris") is not None
    with tempfile.TemporaryDirectory() as folder:
        if with_atheris and asked.crash is None:
            import atheris

            with atheris.instrument_imports(include=["planner"]):
                once = guarded(TARGETS[asked.format](Path(folder)), counts)
                once(b"")  # what is imported on the way, too
        else:
            once = guarded(TARGETS[asked.format](Path(folder)), counts)
            once(b"")
        limit_memory()
        if asked.crash is not None:
            once(bytes.fromhex(asked.crash))
        elif with_atheris:
            atheris.Setup([sys.argv[0], f"-max_total_time={asked.seconds}", "-max_len=400", "-len_control=0", "-rss_limit_mb=6000"], once)
            atheris.Fuzz()
        else:
            by_hypothesis(once, asked.seconds)
        print(json.dumps({"format": asked.format, "inputs": counts[0]}))


def limit_memory() -> None:
    """More than this on top of what is mapped now raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def by_hypothesis(once: Target, seconds: int) -> None:
    """Batches of examples until the time is over."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    end = time.monotonic() + seconds
    batch = settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(st.binary(min_size=1, max_size=400))(once))  # fmt: skip
    while time.monotonic() < end:
        batch()


if __name__ == "__main__":
    main()
