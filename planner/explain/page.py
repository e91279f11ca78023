"""The shell of every page: one self-contained document, its colours for light and dark, and the search box of tables."""

from __future__ import annotations

from html import escape as _escape

CSS = """
.planner{--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--ground:#ffffff;--panel:#f6f8fa;--weights:#4477aa;--activations:#ee8866;
--workspace:#aa3377;--other:#999933;--budget:#c4161c;--chosen:#117733;--compute:#4477aa;--memory:#ee8866;--transfer:#aa3377;
--launch:#777777;color:var(--ink);background:var(--ground);font:15px/1.45 system-ui,sans-serif;max-width:1120px;margin:0 auto;padding:16px;
box-sizing:border-box}
@media (prefers-color-scheme:dark){.planner{--ink:#e6edf3;--soft:#9da7b1;--line:#3d444d;--ground:#0d1117;--panel:#161b22;
--weights:#77aadd;--activations:#ffaa88;--workspace:#e377b5;--other:#cccc66;--budget:#ff7b72;--chosen:#56d364;--compute:#77aadd;
--memory:#ffaa88;--transfer:#e377b5;--launch:#a0a0a0}}
.planner *{box-sizing:border-box}
.planner h1{font-size:1.35em;margin:0 0 4px;overflow-wrap:anywhere}
.planner h2{font-size:1.05em;margin:0 0 8px}
.planner p{margin:4px 0}
.planner .soft{color:var(--soft)}
.planner .plan{font:600 1.05em/1.5 ui-monospace,monospace;overflow-wrap:anywhere}
.planner .warning{border-left:4px solid var(--activations);padding-left:8px}
.planner .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:8px;margin:12px 0}
.planner .tile{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:8px 10px}
.planner .tile b{display:block;font-size:1.25em}
.planner .grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:12px}
.planner section{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:12px;margin:0 0 12px;min-width:0}
.planner svg{width:100%;height:auto;display:block}
.planner svg text{fill:var(--ink);font:14px system-ui,sans-serif;paint-order:stroke;stroke:var(--panel);stroke-width:3px}
.planner svg text.soft{fill:var(--soft)}
.planner .scroll{overflow-x:auto;max-height:70vh}
.planner table{border-collapse:collapse;width:100%;font-size:.9em}
.planner th,.planner td{text-align:left;padding:3px 10px 3px 0;border-bottom:1px solid var(--line);vertical-align:top}
.planner td.n,.planner th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
@media (min-width:700px){.planner td.w{white-space:nowrap}}
.planner tr.lost{color:var(--soft)}
.planner input{width:100%;padding:6px 8px;margin:0 0 8px;border:1px solid var(--line);border-radius:6px;background:var(--ground);
color:var(--ink);font:inherit}
.planner .caption{font-size:.85em}
.planner .key{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.85em;color:var(--soft);margin-top:6px}
.planner .key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
""".strip()
SHELL_CSS = """:root{color-scheme:light dark}body{margin:0;background:#ffffff}
@media (prefers-color-scheme:dark){body{background:#0d1117}}"""
_FILTER = (
    "for(const r of this.closest('section').querySelectorAll('tbody tr'))"
    "r.hidden=!r.textContent.toLowerCase().includes(this.value.toLowerCase())"
)
SEARCH = f'<input type="search" aria-label="search" placeholder="search" oninput="{_FILTER}">'
"""A box that hides the rows of its section's tables that do not contain what is typed."""


def escape(text: object) -> str:
    """Text as HTML, safe in elements and in quoted attributes."""
    return _escape(str(text), quote=True)


def scoped(body: str) -> str:
    """``body`` with its own colours, to be put into somebody else's page."""
    return f'<style>{CSS}</style><div class="planner">{body}</div>'


def document(title: str, body: str) -> str:
    """A whole page: no script, no font, no picture comes from elsewhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{SHELL_CSS}</style></head><body>{scoped(body)}</body></html>\n"
    )


def table(head: tuple[str, ...], rows: list[tuple[object, ...]], numbers: frozenset[int] = frozenset(),
          names: frozenset[int] = frozenset(), faded: frozenset[int] = frozenset()) -> str:  # fmt: skip
    """A table; columns in ``numbers`` flush right, those in ``names`` unbroken, rows in ``faded`` soft. Scrolls sideways on phones."""
    kinds = dict.fromkeys(numbers, " class=n") | dict.fromkeys(names, " class=w")

    def line(cells: tuple[object, ...], tag: str, kind: str = "") -> str:
        inner = (f"<{tag}{kinds.get(place, '')}>{escape(cell)}</{tag}>" for place, cell in enumerate(cells))
        return f"<tr{kind}>{''.join(inner)}</tr>"

    body = "".join(line(row, "td", " class=lost" if place in faded else "") for place, row in enumerate(rows))
    return f'<div class="scroll"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def key(entries: dict[str, str]) -> str:
    """A legend: names to colour variables."""
    inner = "".join(f'<span><i style="background:var(--{colour})"></i>{escape(name)}</span>' for name, colour in entries.items())
    return f'<div class="key">{inner}</div>'
