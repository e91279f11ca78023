"""Documentation is executed: every command's output, every generated page, every link and every piece of Python in it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import planner
from tests.zoo import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = loaded(ROOT / "docs" / "generate.py")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One cache of traces for all commands, empty at first."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if "```console" in path.read_text(encoding="utf-8")], ids=lambda path: path.name)
def test_commands_print_what_the_page_says(path: Path, cache: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert GENERATE.with_outputs(text, cache) == text, f"{path.name} is out of date; run: make docs"


@pytest.mark.parametrize("name", sorted(GENERATE.GENERATED))
def test_generated_pages_are_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == GENERATE.GENERATED[name](), "out of date; run: make docs"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_in_pages_is_python_and_uses_what_exists(path: Path) -> None:
    for language, code in FENCE.findall(path.read_text(encoding="utf-8")):
        if language != "python" or path.name == "api.md":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "planner":
                assert [alias.name for alias in node.names if not hasattr(planner, alias.name)] == []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "plan":
                assert hasattr(planner.Plan, node.attr) or node.attr in planner.Plan.model_fields, f"plan.{node.attr}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name}: {target}"


@pytest.mark.slow
def test_example_of_a_desktop_runs(cache: str) -> None:
    """Two batch sizes at least, each with its time and its plan."""
    out = GENERATE.run("python examples/desktop_8gb.py stable-diffusion-v1-5 'RTX 4060'", cache)
    assert re.search(r"^   1 images: [\d.]+ s each, peak [\d.]+ GiB", out, re.MULTILINE), out
    assert "   4 images:" in out


@pytest.mark.slow
def test_cells_of_the_notebook_run(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANNER_CACHE_DIR", cache)
    names: dict[str, object] = {}
    for cell in json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert isinstance(names["plan"], planner.Plan)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small pipeline in a folder, as a user's model would be."""
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["sd15"].build().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_example_of_a_script_runs(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert loaded(ROOT / "examples" / "script.py").main(model, "a prompt", 2) == 0
    assert "measured   peak" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image-0.png", "image-1.png", "plan.json"]
    assert planner.Plan.from_json("plan.json").workload.batch_size == 2


@pytest.mark.slow
def test_example_of_a_batch_server_runs(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three requests to batches of at most two: every one is answered, and the last batch is padded."""
    monkeypatch.chdir(tmp_path)
    server = loaded(ROOT / "examples" / "batch_server.py")
    monkeypatch.setattr(server, "LARGEST_BATCH", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nthree\n"))
    assert server.main(model) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image-0.png", "image-1.png", "image-2.png"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_import_what_exists(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "planner":
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_first_screen_of_the_readme() -> None:
    """What it is for, the two commands and the explanation come before everything else."""
    first = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:60]
    assert "make demo" in "\n".join(first[:20])
    assert "make test" in "\n".join(first[:20])
    assert any("planner explain stable-diffusion-xl" in line for line in first)
    assert any("Nothing has been measured on a GPU" in line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines())


def test_makefile_and_continuous_integration_run_what_the_readme_says() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = 'planner explain stable-diffusion-xl --gpu "RTX 3060" --batch-size 8'
    assert re.search(rf"^demo:.*\n(\t.*\n)*\t@\$\(BIN\)/{wanted}", makefile, re.MULTILINE)
    assert re.search(r"^test: lint types pytest$", makefile, re.MULTILINE)
    runner = ROOT / ".ci" / "run"
    assert "make test" in runner.read_text(encoding="utf-8")
    assert runner.stat().st_mode & 0o111


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == planner.__version__
    assert f"## {planner.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_contributing_is_three_short_paragraphs_on_additions() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^\*\*A (\w+)\*\*", text, re.MULTILINE) == ["knob", "GPU", "model"]
