"""One self-contained HTML page out of tables, pictures and examples: no script, no network, pictures as data URIs.

Blocks are strings of HTML made by the functions here; every text from outside is escaped. Wide tables and pictures
scroll within their own frame, so that the page itself fits a phone.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laddpo.errors import visible
from laddpo.results.sweeps import SweepTable, number_text
from laddpo.results.tables import shortened


def page(title: str, summary: str, blocks: Sequence[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # whatever a generated text holds, nothing is fetched or executed
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>{text(title)}</h1><p>{text(summary)}</p>\n" + "\n".join(blocks) + "\n</main></body></html>\n"
    )


def text(value: Any) -> str:
    """Text from anywhere as HTML, control characters shown."""
    return html.escape(visible(str(value)))


def section(title: str, *blocks: str) -> str:
    return f"<section><h2>{text(title)}</h2>" + "\n".join(block for block in blocks if block) + "</section>"


def folded(title: str, *blocks: str, is_open: bool = False) -> str:
    """A part that opens at a click, without a script."""
    inside = "\n".join(block for block in blocks if block)
    return f"<details{' open' if is_open else ''}><summary>{text(title)}</summary>{inside}</details>"


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None) -> str:
    """A table; the first column is a heading of its row, row `marked` is set off as the best."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "".join(
        f"<tr{' class=best' if number == marked else ''}>"
        + "".join(f'<th scope="row">{text(c)}</th>' if i == 0 else f"<td>{text(c)}</td>" for i, c in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="frame"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def heat_table(sweep: SweepTable) -> str:
    """A sweep over two keys as a table whose cells are greyer the better they are; all of the best are framed."""
    rows, columns = (sweep.values_of(key) for key in sweep.keys)
    cells = {cell.values: cell for cell in sweep.cells}
    known = [cell.mean for cell in sweep.cells if cell.mean is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    head = "".join(f'<th scope="col">{text(number_text(column))}</th>' for column in columns)
    lines = []
    for row in rows:
        line = f'<th scope="row">{text(number_text(row))}</th>'
        for column in columns:
            cell = cells.get((row, column))
            if cell is None or cell.mean is None:
                line += f"<td>{text(cell.state_text) if cell else ''}</td>"
                continue
            share = (cell.mean - low) / (high - low) if high > low else 0.4
            grey = round(240 - 170 * (share if sweep.is_higher_better else 1 - share))
            ink = "#fff" if grey < 140 else "#000"
            best = " class=best" if cell in sweep.winners else ""
            spread = f"<br><small>{text(cell.spread_text)}</small>" if cell.spread_text else ""
            style = f"background:rgb({grey},{grey},{grey});color:{ink}"
            line += f'<td{best} style="{style}">{text(number_text(cell.mean))}{spread}</td>'
        lines.append(f"<tr>{line}</tr>")
    down, across = (text(key.rsplit(".", 1)[-1]) for key in sweep.keys)
    head, body = f'<tr><th scope="col">{down} ↓<br>{across} →</th>{head}</tr>', "".join(lines)
    return f'<div class="frame"><table class="heat"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def picture(path: Path, description: str) -> str:
    """A PNG inside the page."""
    if not path.is_file():
        return paragraph(f"{description}: not drawn")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<figure><img alt="{text(description)}" src="data:image/png;base64,{data}"></figure>'


def wide_picture(path: Path, description: str) -> str:
    """A PNG that would be too small to read on a phone: it scrolls within its frame instead."""
    return f'<div class="frame wide">{picture(path, description)}</div>'


def gallery(pictures: Sequence[tuple[str, Path]]) -> str:
    """Pictures side by side, as many as the width has room for."""
    return '<div class="gallery">' + "".join(picture(path, title) for title, path in pictures) + "</div>"


def examples(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """Answers of base and tuned to the same prompts, side by side; one below the other on a phone."""
    blocks = []
    for before, after in pairs:
        answers = "".join(
            f"<div><b>{name} {'✓ right' if record['correct'] else '✗ wrong'}</b><pre>{text(shortened(record['text']))}"
            "</pre></div>"
            for name, record in (("base", before), ("tuned", after))
        )
        blocks.append(
            f'<div class="example"><pre class="prompt">{text(shortened(before["prompt"]))}</pre>'
            f'<p>gold: <code>{text(before["answer"])}</code></p><div class="pair">{answers}</div></div>'
        )
    return "".join(blocks)


STYLE = """
:root{color-scheme:light}
body{margin:0;background:#fff;color:#1a1a1a;font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.2;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:2px solid #16324f;overflow-wrap:anywhere}
.frame{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap}
th:first-child{text-align:left}
thead th{border-bottom:2px solid #555;vertical-align:bottom;white-space:normal}
tbody th{font-weight:normal;white-space:normal;min-width:5.5rem;overflow-wrap:anywhere}
tr.best th,tr.best td{font-weight:bold;background:#eee}
.heat td{min-width:4.5rem;text-align:center;border:1px solid #fff}
.heat td.best{outline:3px solid #d9822b;outline-offset:-3px;font-weight:bold;text-decoration:underline}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:.5rem}
figure{margin:0}
figure img{max-width:100%;height:auto;display:block}
.wide img{max-width:none}
details{margin:.75rem 0;border:1px solid #bbb;border-radius:4px;padding:.25rem .75rem}
summary{cursor:pointer;font-weight:bold;padding:.4rem 0;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.25rem 0;background:#f4f4f4;padding:.5rem;font-size:.85rem}
pre.prompt{background:#fff;border-left:4px solid #9fb6cc}
.example{margin:0 0 1.25rem}
.example p{margin:.25rem 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:.75rem}
"""
