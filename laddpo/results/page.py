"""Blocks of one self-contained HTML page: no script, no network, pictures as data URIs.

page.html holds a macro for each kind of block. Wide tables and pictures scroll within their own frame, so that the page
itself fits a phone.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from laddpo.errors import visible
from laddpo.results.figures import cell_colors
from laddpo.results.sweeps import SweepCell, SweepTable, number_text
from laddpo.results.tables import shortened


def _shown(value: Any) -> Any:
    """Text from anywhere with its control characters shown; it is escaped after this."""
    return value if isinstance(value, Markup) else visible(str(value))


def _macros() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shortened"] = shortened
    return environment.get_template("page.html").module


html = _macros()  # html.table(header, rows), html.section(title, block, ...): a block each


def picture(path: Path, description: str, caption: str = "") -> Markup:
    """A PNG inside the page, with a caption below."""
    data = base64.b64encode(path.read_bytes()).decode("ascii") if path.is_file() else ""
    return html.picture(data, description, caption)


def wide_picture(path: Path, description: str) -> Markup:
    """A picture that scrolls within its frame on a phone."""
    return html.wide(picture(path, description))


def heat_table(sweep: SweepTable) -> Markup:
    """A sweep over two keys as a table whose cells are brighter the better they are; all of the best are framed."""
    rows, columns = (sweep.values_of(key) for key in sweep.keys)
    cells = {cell.values: cell for cell in sweep.cells}

    def shown(cell: SweepCell | None) -> dict[str, Any]:
        if cell is None or cell.mean is None:
            return {"words": cell.state_text if cell else "", "colors": None, "is_best": False, "detail": ""}
        best, colors = cell in sweep.winners, cell_colors(sweep.share(cell))
        return {"words": number_text(cell.mean), "colors": colors, "is_best": best, "detail": cell.detail}

    lines = [(number_text(row), [shown(cells.get((row, column))) for column in columns]) for row in rows]
    down, across = (key.rsplit(".", 1)[-1] for key in sweep.keys)
    return html.heat(down, across, [number_text(column) for column in columns], lines)
