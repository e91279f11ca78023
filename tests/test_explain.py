"""Explanations: text, page, figure, comparison of plans. Plans are made by hand (tests/golden/cases.py)."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import UsageError
from planner.explain import charts, diff, words
from planner.explain import html as report
from planner.explain.compare import Cell, render_csv, render_html, render_text, to_data
from planner.explain.layout import paragraph, table
from planner.explain.text import UNSURE, most_important, phase_table, render, render_estimate
from planner.plan import Plan
from planner.types import Rejection
from planner.units import GIB

from .golden.cases import CARD, CASES, alternative, crowded, estimate, offloaded, phase, untouched
from .golden.files import assert_golden

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("verbose", [False, True])
def test_text_is_as_agreed(name: str, verbose: bool) -> None:
    assert_golden(f"{name}{'-verbose' if verbose else ''}.txt", render(CASES[name](), verbose))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [60, 75, 76, 80, 91, 92, 100, 160])
@pytest.mark.parametrize("verbose", [False, True])
def test_text_keeps_to_the_width(name: str, width: int, verbose: bool) -> None:
    assert max(len(line) for line in render(CASES[name](), verbose, width).splitlines()) <= width


@pytest.mark.parametrize("name", CASES)
def test_text_is_plain_and_ends_in_one_newline(name: str) -> None:
    text = render(CASES[name](), True)
    assert "\x1b" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert all(line == line.rstrip() for line in text.splitlines())


def test_text_says_what_the_plan_needs_and_why_others_lost() -> None:
    text = offloaded().explain()
    assert "offload=model vae_slicing=true" in text
    assert "9.20 GiB (8.74 to 9.66)" in text
    assert "commonest variant" in text
    assert re.search(r"4\.00 GiB +240 s +2\.1 times as long, 5\.20 GiB less +offload=sequential", text)
    assert "short by 1.70 GiB in vae.decode" in text
    assert "2304 combinations, by exact prices of 61 parts of them" in text
    assert text.rstrip().splitlines()[-1].startswith("warning")


def test_alternatives_alike_are_one_line_and_gains_not_taken_are_explained() -> None:
    """Three of 9.30 GiB and 110 s, 2 % shorter than the plan's 112 s: one line, and why a shorter time is not taken."""
    settings = [{"offload": "model", "compile": word} for word in ("default", "regional", "max-autotune")]
    plan = offloaded().model_copy(update={"alternatives": tuple(alternative(each, 9.3, 110.0) for each in settings)})
    line = r"9\.30 GiB +110 s +2 % shorter, 102\.4 MiB more +compile=default vae_slicing=false, and 2\s+like it"
    assert re.search(line, plan.explain())
    assert UNSURE in plan.explain()
    assert "compile=max-autotune vae_slicing=false" in plan.explain(verbose=True)
    assert UNSURE not in offloaded().explain()


@pytest.mark.parametrize(
    ("kind", "reason", "label"),
    [
        ("time", "1.16 times as slow (3.00 s)", "slower"),
        ("dominated", "1.16 times as slow (3.00 s), no less memory", "slower"),
        ("time", "its gain is within the model's uncertainty", "no gain"),
        ("dominated", "no faster, and one change more", "no gain"),
        ("rule", "not installed", "ruled out"),
    ],
)
def test_only_what_is_slower_is_called_so(kind: str, reason: str, label: str) -> None:
    assert words.rejection_label(Rejection(settings={"offload": "model"}, kind=kind, reason=reason, count=1)) == label


def test_measured_stands_beside_predicted() -> None:
    assert "peak 1.00 GiB (predicted 1.10 GiB, +10 %)" in untouched().explain()


def test_a_split_batch_says_how_to_run_it() -> None:
    assert "plan.run(pipe, ...): the batch is made in 3 calls" in crowded().explain()


def test_many_phases_are_cut_to_those_that_matter() -> None:
    """Twelve phases of rising peak and time: the last eight stay, the first four are summed: 0.1 + 0.6 + 1.1 + 1.6 s."""
    phases = crowded().predicted.phases
    assert most_important(phases) == list(phases[4:])
    assert "and 4 more: 3.40 s, peak 1.30 GiB at most" in crowded().explain()
    assert len(phase_table(crowded().predicted, 100, verbose=True)) == 13


def test_estimate_that_does_not_fit_says_by_how_much() -> None:
    """12.9 GiB allocated is 13.545 reserved at 5 %: 2.345 more than 11.2."""
    text = render_estimate("some-model", CARD, "offload=none", estimate(12.9, 10.0, (phase("unet", 1, 10.0, 12.0, 0.9, 0.0),), fits=False))
    assert re.search(r"verdict +does not fit; needs 2\.3[45] GiB more than the budget", text)


@pytest.mark.parametrize(
    ("value", "reference", "said"),
    [(10, 10, "as long"), (11.2, 10, "12 % longer"), (9, 10, "10 % shorter"), (25, 10, "2.5 times as long"), (1, 0, "of unknown relation")],
)
def test_times_in_words(value: float, reference: float, said: str) -> None:
    assert words.times(value, reference) == said


@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=40), min_size=1, max_size=4), st.integers(40, 120))
def test_tables_align_and_paragraphs_keep_their_words(cells: list[str], width: int) -> None:
    rows = [tuple(cells), tuple(reversed(cells))]
    lines = table(rows, 1000)
    assert len(lines) == 2
    assert [line.split() for line in lines] == [" ".join(row).split() for row in rows]
    body = paragraph("label", " ".join(cells), width, 10)
    assert "".join("".join(body).split()) == "label" + "".join(" ".join(cells).split())


# -- page -------------------------------------------------------------------------------------------------------------


class _Checker(html.parser.HTMLParser):
    """Collects open tags and everything that would leave the file."""

    VOID = frozenset({"meta", "link", "input", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.handlers: set[str] = set()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and not (value or "").startswith(("data:", "#")):
                self.outside.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.handlers.add(f"{tag} {name}")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"


@pytest.mark.parametrize("name", CASES)
def test_page_is_well_formed_self_contained_and_escaped(name: str) -> None:
    text = report.page(CASES[name]())
    checker = _Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.outside == []
    assert checker.tags.isdisjoint({"img", "script", "b-injected"})
    assert checker.handlers <= {"input oninput"}
    assert not re.search(r"https?://|@import|url\(", text)


def test_page_escapes_what_comes_from_outside() -> None:
    text = report.page(crowded())
    assert "<img" not in text
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in text
    assert "&lt;/script&gt;&lt;b&gt;another&lt;/b&gt;" in text


def test_fragment_is_what_a_notebook_shows() -> None:
    assert offloaded()._repr_html_() == report.fragment(offloaded())
    assert "<html" not in report.fragment(offloaded())
    assert "Memory along the call" in report.fragment(offloaded())


def test_layers_add_up_to_the_peak() -> None:
    """1.0 + 0.5 + 0.25 GiB are named; of a peak of 2 GiB the remaining 0.25 are `other`."""
    one = phase("unet", 1, 1.0, 1.0, 0.5, 0.25).model_copy(update={"peak_allocated_bytes": 2 * GIB})
    assert charts.layers(one)["other"] == GIB // 4
    assert sum(charts.layers(one).values()) == one.peak_allocated_bytes


def shapes(picture: str, tag: str) -> list[dict[str, str]]:
    """Attributes of every element of one kind in an SVG."""
    return [dict(re.findall(r'([\w-]+)="([^"]*)"', inner)) for inner in re.findall(rf"<{tag} ([^>]*)>", picture)]


def test_timeline_has_the_plans_bytes_and_seconds() -> None:
    """Heights are as bytes: 9 layers of three phases, all on one scale with the budget; the key names the layers of the peak."""
    plan = offloaded()
    picture = charts.timeline(plan.predicted, plan.device.budget_bytes)
    drawn = [(float(one["height"]), one["fill"]) for one in shapes(picture, "rect")]
    wanted = [(size, f"var(--{name})") for each in plan.predicted.phases for name, size in charts.layers(each).items() if size]
    assert [fill for _, fill in drawn] == [fill for _, fill in wanted]
    floor = charts.HEIGHT - charts.BOTTOM
    budget = next(float(one["y1"]) for one in shapes(picture, "line") if one["stroke"] == "var(--budget)")
    scale = (floor - budget) / CARD.budget_bytes
    assert [height for height, _ in drawn] == pytest.approx([size * scale for size, _ in wanted], abs=0.11)
    for text in ("weights 0.20 GiB", "activations 7.00 GiB", "workspace 2.00 GiB", ">100 s<", ">unet<", "budget 11.20 GiB"):
        assert text in picture


def test_scatter_has_every_candidate_where_it_belongs() -> None:
    """Upwards as bytes, to the right as the logarithm of seconds; the chosen plan last, and in a colour of its own."""
    plan = offloaded()
    picture = charts.scatter(plan)
    dots = [(float(one["cx"]), float(one["cy"]), one["fill"]) for one in shapes(picture, "circle")]
    points = [(each.latency_seconds, each.peak_allocated_bytes) for each in plan.candidates]
    points += [(each.predicted.latency_seconds, each.predicted.peak_allocated_bytes) for each in plan.alternatives]
    points += [(each.latency_seconds, each.peak_allocated_bytes) for each in plan.frontier]
    points.append((plan.predicted.latency_seconds, plan.predicted.peak_allocated_bytes))
    assert len(dots) == len(points)
    (x1, y1, _), (x2, y2, _) = dots[0], dots[1]
    across, up = (x2 - x1) / math.log(150 / 109), (y2 - y1) / (points[1][1] - points[0][1])
    for (x, y, _), (seconds, size) in zip(dots, points, strict=True):
        assert x == pytest.approx(x1 + across * math.log(seconds / 109), abs=0.3)
        assert y == pytest.approx(y1 + up * (size - points[0][1]), abs=0.3)
    colours = ["budget", "launch", *["launch"] * 4, *["weights"] * 3, "chosen"]
    assert [fill for *_, fill in dots] == [f"var(--{colour})" for colour in colours]
    assert "attention=sliced</title>" in picture
    assert "offload=none: does not fit</title>" in picture


def test_frontier_is_a_staircase() -> None:
    """From 109 s and 12.9 GiB: nothing is gained before 112 s, there 9.2 GiB are enough, at 240 s 4.0."""
    wanted = [(109.0, 12.9), (112.0, 12.9), (112.0, 9.2), (240.0, 9.2), (240.0, 4.0)]
    assert [(seconds, round(size / GIB, 3)) for seconds, size in charts.staircase(offloaded())] == wanted


def test_time_bars_are_as_long_as_the_phases_take() -> None:
    """100, 11.5 and 0.05 s: the longest fills the width, the second is 11.5 % of it, the shortest is still seen."""
    widths = [float(one["width"]) for one in shapes(charts.time_bars(offloaded().predicted), "rect")]
    assert widths == pytest.approx([charts.WIDTH - 4, 0.115 * (charts.WIDTH - 4), 1], abs=0.1)
    assert "100 s, 90 %" in charts.time_bars(offloaded().predicted)
    assert "ms, under 1 %" in charts.time_bars(offloaded().predicted)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_columns_are_visible_and_fill_the_width(seconds: list[float]) -> None:
    shares = charts.visible_shares(seconds)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= min(charts.LEAST_SHARE, 1 / len(seconds)) / 2


PROBE = """<script>
const box = document.querySelector('input[type=search]');
const rows = box ? [...box.closest('section').querySelectorAll('tbody tr')] : [];
if (box) { box.value = 'SEQUENTIAL'; box.dispatchEvent(new Event('input')); }
const found = {wide: document.documentElement.scrollWidth - innerWidth, rows: rows.length,
  left: rows.filter(row => !row.hidden).map(row => row.textContent),
  ground: getComputedStyle(document.querySelector('.planner')).backgroundColor,
  ink: getComputedStyle(document.querySelector('.planner')).color,
  charts: [...document.querySelectorAll('svg')].map(one => Math.round(one.getBoundingClientRect().width))};
document.body.insertAdjacentHTML('beforeend', '<pre id="probe"></pre>');
document.getElementById('probe').textContent = 'PROBE' + JSON.stringify(found) + 'END';
</script>"""


def in_browser(page: str, folder: Path, *options: str) -> tuple[dict[str, object], str]:
    """What a headless Chromium makes of a page: the probe's answer, and its log."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    quiet = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--hide-scrollbars",
               f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", *options, "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, check=True)
    answer = re.search(r"PROBE(\{.*?\})END", done.stdout)
    assert answer is not None
    return json.loads(answer.group(1).replace("&quot;", '"').replace("&amp;", "&")), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
@pytest.mark.parametrize(
    ("options", "ground"),
    [
        (("--window-size=1200,900",), "rgb(255, 255, 255)"),
        (("--window-size=390,844",), "rgb(255, 255, 255)"),
        (("--window-size=1200,900", "--blink-settings=preferredColorScheme=0"), "rgb(13, 17, 23)"),
    ],
    ids=["wide", "phone", "dark"],
)
def test_page_in_a_browser(options: tuple[str, ...], ground: str, tmp_path: Path) -> None:
    found, log = in_browser(report.page(offloaded()), tmp_path, *options)
    assert "CONSOLE" not in log
    assert found["wide"] == 0, "the page is wider than the screen"
    assert found["rows"] == 3
    assert len(found["left"]) == 1  # type: ignore[arg-type]
    assert found["ground"] == ground
    assert found["ink"] != ground
    assert len(found["charts"]) == 3  # type: ignore[arg-type]
    assert min(found["charts"]) > 250  # type: ignore[type-var]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
@pytest.mark.parametrize("page", [report.page(crowded()), report.page(untouched()), render_html(())], ids=["crowded", "untouched", "table"])
def test_other_pages_on_a_phone(page: str, tmp_path: Path) -> None:
    found, log = in_browser(page, tmp_path, "--window-size=390,844")
    assert "CONSOLE" not in log
    assert found["wide"] == 0, "the page is wider than the screen"


# -- figure -----------------------------------------------------------------------------------------------------------


def test_figure_is_drawn_and_saved(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = offloaded().plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in figure.axes] == ["memory along the call", "memory against latency"]
    with pytest.raises(UsageError, match="cannot be written"):
        offloaded().plot(tmp_path / "nowhere" / "plan.png")


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'diffusers-planner\[plot\]'"):
        offloaded().plot()


# -- differences and comparisons --------------------------------------------------------------------------------------


def test_diff_names_what_changed_and_what_it_costs() -> None:
    first = offloaded()
    changes = {"settings": first.settings | {"offload": "sequential"}, "predicted": estimate(4.0, 240.0, first.predicted.phases)}
    second = first.model_copy(update=changes)
    found = diff.compare_plans(first, second)
    assert [(change.name, change.first, change.second) for change in found.settings] == [("offload", "model", "sequential")]
    assert found.about == ()
    text = diff.render(found)
    assert re.search(r"offload +model +sequential", text)
    assert re.search(r"peak allocated +9\.20 GiB +4\.00 GiB +-5\.20 GiB \(-57 %\)", text)
    assert re.search(r"a call +112 s +240 s +\+128 s \(\+114 %\)", text)


def test_diff_of_a_plan_with_itself_is_empty() -> None:
    found = diff.compare_plans(offloaded(), offloaded())
    assert (found.about, found.settings, found.predicted, found.phases) == ((), (), (), ())
    assert diff.render(found).endswith("no difference\n")


CELLS = (
    Cell(model="a", gpu="RTX 3060", batch_size=1, budget_bytes=GIB, settings={"offload": "model"}, peak_allocated_bytes=GIB // 2,
         latency_seconds=4.0, samples_per_second=0.25),
    Cell(model="<b>", gpu="RTX 3060", batch_size=1, shortfall_bytes=GIB, reason="nothing fits, short by 1.00 GiB"),
)  # fmt: skip


def test_comparison_in_every_form() -> None:
    text = render_text(CELLS)
    assert re.search(r"^a\n  GPU.*plan\n  RTX 3060 +1 +0\.50 GiB +4\.00 s +0\.25  offload=model\n\n<b>\n", text)
    assert "nothing fits, short by 1.00 GiB" in text
    lines = render_csv(CELLS).splitlines()
    assert lines[0].split(",") == [*(name for name in Cell.model_fields if name != "settings"), "plan"]
    assert lines[1] == f"a,RTX 3060,1,{GIB},{GIB // 2},4.0,0.25,,,offload=model"
    assert len(to_data(CELLS)["rows"]) == 2
    page = render_html(CELLS)
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert "&lt;b&gt;" in page


@pytest.mark.parametrize("width", [60, 75, 76, 100])
def test_plans_of_a_comparison_are_wrapped_not_cut(width: int) -> None:
    settings = {"offload": "group_block", "offload_stream": True, "channels_last": True, "vae_tiling": True, "compile": "regional"}
    text = render_text((CELLS[0].model_copy(update={"settings": settings}), CELLS[1]), width)
    assert max(map(len, text.splitlines())) <= width
    assert set(words.settings_text(settings).split()) <= set(text.split())


# -- plans as files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_explanations_survive_the_plan_file(name: str) -> None:
    plan = CASES[name]()
    again = Plan.from_json(plan.to_json())
    assert render(again, True) == render(plan, True)
    assert report.page(again) == report.page(plan)
