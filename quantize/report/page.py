"""report.html of a release: the report as one page without scripts or outside files, in light and dark."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from f2gguf.evals.drift import percent
from f2gguf.quantize.report.picture import can_draw, draw
from f2gguf.quantize.report.report import Report
from f2gguf.quantize.report.sections import PICTURE, Block, Bullets, Details, Heading, Paragraph, Picture, sections
from f2gguf.quantize.report.tables import Table
from f2gguf.runtime.files import format_bound

_STYLE = """
:root { color-scheme: light dark }
:root { --text: #1d2327; --back: #fff; --soft: #5a646d; --line: #d5dade; --good: #00684a; --bad: #b3370a }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8eb; --back: #14181b; --soft: #a3adb5; --line: #363e45; --good: #4ecb9f; --bad: #ff9b70 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 68rem; margin: 0 auto; padding: 1rem 1rem 4rem }
h1 { margin: 1rem 0 0; font-size: 1.7rem; overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem }
h3 { margin: 1rem 0 .25rem; font-size: 1rem }
p, li { max-width: 46rem; overflow-wrap: anywhere }
.soft, figcaption, caption { color: var(--soft) }
.headline { font-size: 1.25rem; font-weight: 600 }
.holds { color: var(--good) }
.over { color: var(--bad) }
td.over { font-weight: 600 }
.verdicts, .columns { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)) }
.verdicts { list-style: none; padding: 0 }
.verdicts li { border: 1px solid var(--line); border-left: 6px solid; border-radius: 6px; padding: .6rem .9rem }
.verdicts b, .verdicts strong { display: block }
.verdicts strong { font-size: 1.5rem }
.verdicts span { color: var(--text) }
.scroll { overflow: auto; max-height: 34rem; margin-bottom: 1.5rem }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--good); outline-offset: 2px }
.figure { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; max-height: none }
.figure svg { display: block; width: 100%; min-width: 50rem; height: auto }
figure { margin: 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .4rem; white-space: nowrap }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; vertical-align: top; white-space: nowrap }
th, td { border-bottom: 1px solid var(--line) }
thead th { position: sticky; top: 0; background: var(--back) }
tbody th { font-weight: 500 }
th:first-child, .facts td { text-align: left }
.facts td { white-space: normal; overflow-wrap: anywhere; min-width: 14rem }
""".strip()


def report_html(report: Report) -> str:
    """The page, the same for the same report; without matplotlib it says which extra draws the picture."""
    body = "\n".join([*_verdicts(report), *_html(report, sections(report))])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(report.model)}: measured drift</title>
<style>
{_STYLE}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _verdicts(report: Report) -> Iterator[str]:
    """What holds and what does not, before anything else."""
    n_holding = sum(verdict.holds for verdict in report.variants.values())
    kind = "holds" if n_holding == len(report.variants) else "over"
    bound = format_bound(report.max_drift)
    yield f"<h1>{escape(report.model)}</h1>"
    yield f'<p class="headline {kind}">{n_holding} of {len(report.variants)} variants hold the bound of {bound}.</p>'
    yield '<ul class="verdicts">'
    for name, verdict in report.variants.items():
        kind, sign = ("holds", "✓") if verdict.holds else ("over", "✗")
        yield (
            f'<li class="{kind}"><b>{sign} {escape(name)}, {escape(verdict.label)}</b> '
            f"<strong>{percent(verdict.mean)}</strong> "
            f"<span>mean drift; its 95% interval ends at {percent(verdict.upper)}</span></li>"
        )
    yield "</ul>"


def _html(report: Report, blocks: Iterable[Block]) -> Iterator[str]:
    for block in blocks:
        match block:
            case Heading(text):
                yield f"<h2>{escape(text)}</h2>"
            case Paragraph(text, is_warning):
                yield f'<p class="{"over" if is_warning else "soft"}">{escape(text)}</p>'
            case Picture():
                yield _picture(report)
            case Table():
                yield _table(block)
            case Bullets(title, lines):
                heading = f"<h3>{escape(title)}</h3>" if title else ""
                yield f"{heading}<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
            case Details(summary, inner):
                yield f"<details><summary>{escape(summary)}</summary>"
                yield from _html(report, inner)
                yield "</details>"


def _picture(report: Report) -> str:
    if not can_draw(report):
        return "<p>Not drawn: matplotlib is not installed. Run: <code>pip install 'f2gguf[plots]'</code></p>"
    drawn = io.BytesIO()
    draw(report, drawn, file_format="svg")
    svg = drawn.getvalue().decode()
    words = f"{PICTURE}; the tables say the same"
    picture = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{words}"', 1).strip()
    return (
        '<figure><div class="scroll figure" tabindex="0" role="group" aria-label="Picture, which scrolls sideways">'
        f"{picture}</div><figcaption>{words}.</figcaption></figure>"
    )


def _table(table: Table) -> str:
    """A table that scrolls by itself and by the keyboard; the first cell of a row is its header."""
    has_header = any(table.header)
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    top = f"<thead><tr>{head}</tr></thead>" if has_header else ""
    body = "\n".join(f"<tr>{''.join(_cells(row))}</tr>" for row in table.rows)
    caption = escape(table.caption)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{caption}">'
        f'<table class="{"figures" if has_header else "facts"}"><caption>{caption}</caption>{top}\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cells(row: Sequence[str]) -> Iterator[str]:
    yield f'<th scope="row">{escape(row[0])}</th>'
    for cell in row[1:]:
        kind = ' class="over"' if "OVER" in cell else ""
        yield f"<td{kind}>{escape(cell)}</td>"
