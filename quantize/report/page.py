"""drift.json as one page to look at: no outside file, no script, light and dark, made of the report alone."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from f2gguf.evals.drift import label, percent
from f2gguf.quantize.report.picture import can_draw, draw
from f2gguf.quantize.report.tables import (
    STOCK_NOTE,
    Table,
    conversion_sentence,
    dims_table,
    files_table,
    groups_table,
    over_lines,
    recipe_lines,
    worst_texts,
)
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


def report_html(report: dict[str, Any]) -> str:
    """The page, the same for the same report; without matplotlib it says which extra draws the figure."""
    measured = _measured(report) if report["variants"] else []
    body = "\n".join([*_verdict(report), *measured, *_provenance(report)])
    title = escape(f"{report['model']}: measured drift")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
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


def _verdict(report: dict[str, Any]) -> Iterator[str]:
    """What holds and what does not, before anything else."""
    variants, bound = report["variants"], format_bound(report["max_drift"])
    n_holding = sum(verdict["holds"] for verdict in variants.values())
    kind = "holds" if n_holding == len(variants) else "over"
    yield f"<h1>{escape(report['model'])}</h1>"
    yield f'<p class="headline {kind}">{n_holding} of {len(variants)} variants hold the bound of {bound}.</p>'
    yield '<ul class="verdicts">'
    for name, verdict in variants.items():
        kind, sign = ("holds", "✓") if verdict["holds"] else ("over", "✗")
        yield (
            f'<li class="{kind}"><b>{sign} {escape(name)}, {escape(label(verdict))}</b> '
            f"<strong>{percent(verdict['mean'])}</strong> "
            f"<span>mean drift; its 95% interval ends at {percent(verdict['upper'])}</span></li>"
        )
    yield "</ul>"
    yield from (f'<p class="over">{escape(line)}.</p>' for line in over_lines(report))
    yield (
        f'<p class="soft">Drift is 1 - cosine to the F16 file\'s vector, over {report["texts"]["n"]} texts '
        f"({escape(', '.join(report['texts']['languages']))}). The bound holds when the upper end of the mean's 95% "
        f"interval, and the mean of every language and kind of text, are under {bound}.</p>"
    )


def _measured(report: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Files</h2>"
    yield _table("Size and drift of every file", files_table(report))
    if report.get("stock"):
        yield f'<p class="soft">{escape(STOCK_NOTE)}</p>'
    yield from _figure(report)
    yield from _recipes(report)
    yield "<h2>Where it drifts</h2>"
    yield _table("Mean drift by language, the worst first", groups_table(report, "language"))
    yield _table("Mean drift by kind of text", groups_table(report, "kind"))
    yield _table("Mean drift by Matryoshka dimension", dims_table(report))
    yield "<h2>The worst texts</h2>"
    yield '<div class="columns">'
    for name, verdict in report["variants"].items():
        yield _table(f"Of {name}", worst_texts(report, verdict))
    yield "</div>"


def _figure(report: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Picture</h2>"
    if not can_draw(report):
        yield "<p>Not drawn: matplotlib is not installed. Run: <code>pip install 'f2gguf[plots]'</code></p>"
        return
    drawn = io.BytesIO()
    draw(report, drawn, file_format="svg")
    svg = drawn.getvalue().decode()
    words = "Drift of every text, size against drift, and mean drift by dimension and language; the tables say the same"
    yield '<figure><div class="scroll figure" tabindex="0" role="group" aria-label="Picture, which scrolls sideways">'
    yield svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{words}"', 1).strip()
    yield f"</div><figcaption>{words}.</figcaption></figure>"


def _recipes(report: dict[str, Any]) -> Iterator[str]:
    recipes = recipe_lines(report)
    if not recipes:
        return
    yield "<h2>How they were made</h2>"
    for name, lines in recipes.items():
        recipe = report["variants"][name]["recipe"]
        yield f"<h3>{escape(name)}: {escape(recipe['kind'])}</h3>"
        yield f"<ul>{_items(lines)}</ul>"
        details = [f"{tensor}: {kind}" for tensor, kind in recipe.get("types", {}).items()]
        details += [
            f"{place}: exponents {a} of activations, {w} of weights"
            for place, (a, w) in recipe.get("exponents", {}).items()
        ]
        if details:
            yield "<details><summary>Every tensor whose type differs, and the exponents of every re-scaling"
            yield f"</summary><ul>{_items(details)}</ul></details>"


def _provenance(report: dict[str, Any]) -> Iterator[str]:
    source, texts = report["source"], report["texts"]
    facts = {
        "source": source["repo"] or report["model"],
        "revision": source["revision"] or "none",
        "checkpoint's SHA-256": source["sha256"],
        "parameters": f"{source['n_parameters']:,}",
        "conversion": conversion_sentence(report),
        "evaluation texts": f"{texts['n']} of {texts['n_conversion']}, SHA-256 {texts['sha256']}",
    }
    for name, verdict in report["variants"].items():
        recipe = verdict.get("recipe", {})
        if "calibration_sha256" in recipe:
            facts[f"{name}'s calibration"] = f"{recipe['n_calibration_texts']} texts, {recipe['calibration_sha256']}"
        if "imatrix_sha256" in recipe:
            facts[f"{name}'s importance matrix"] = recipe["imatrix_sha256"]
    facts["made with"] = ", ".join(f"{name} {number}" for name, number in report["made_with"].items())
    facts |= {file["file"]: f"SHA-256 {file['sha256']}" for file in report["files"].values()}
    yield "<h2>Where it comes from</h2>"
    yield _table("Source, texts, versions and checksums", (("", ""), [list(fact) for fact in facts.items()]), "facts")


def _table(caption: str, table: Table, kind: str = "figures") -> str:
    """A table that scrolls by itself and by the keyboard; the first cell of a row is its header."""
    header, rows = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    body = "\n".join(f"<tr>{''.join(_cells(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption>{top}\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _cells(row: Sequence[str]) -> Iterator[str]:
    yield f'<th scope="row">{escape(row[0])}</th>'
    for cell in row[1:]:
        kind = ' class="over"' if "OVER" in cell else ""
        yield f"<td{kind}>{escape(cell)}</td>"


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)
