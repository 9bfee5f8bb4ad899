"""What all our pictures share: colours, axes, saving.

Figures are drawn on matplotlib's `Figure` objects directly: no pyplot, no backend choice, nothing global is touched.
Every series differs in line style, marker or hatch as well as in lightness, so a greyscale print reads the same.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from laddpo.errors import UserError
from laddpo.storage.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
PAGE_DPI = 165  # of pictures that a page shows in several widths
DARK, PALE, ACCENT, RULE = "#16324f", "#9fb6cc", "#d9822b", "#777777"


@contextlib.contextmanager
def only_a_picture(path: Path) -> Iterator[None]:
    """A picture is for people: one that cannot be drawn is a note, and the run that it shows is not lost.

    A file that cannot be written is still an error: what comes next could not be written either.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a broken font, a name that matplotlib reads as a formula: any kind
        reason = str(error).partition("\n")[0]
        print(f"note: {path}: was not drawn ({type(error).__name__}: {reason}). Its numbers are kept.", file=sys.stderr)


def drawn(draw: Callable[..., None]) -> Callable[..., None]:
    """A function that draws into its argument `path`, as `only_a_picture`."""
    signature = inspect.signature(draw)

    @functools.wraps(draw)
    def draw_or_say(*args, **kwargs) -> None:
        with only_a_picture(signature.bind(*args, **kwargs).arguments["path"]):
            draw(*args, **kwargs)

    return draw_or_say


def new_figure(width_inches: float, height_inches: float, title: str) -> Figure:
    from matplotlib.figure import Figure  # 0.2 s; nobody who draws nothing should wait for it

    figure = Figure(figsize=(width_inches, height_inches), dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=12, fontweight="bold")
    return figure


def save_png(figure: Figure, path: Path, dpi: int = DPI) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_bytes(path, buffer.getvalue())


def cell_colors(share: float) -> tuple[str, str]:
    """Colours of a heat map's cell and of the number on it: dark blue for 0, yellow for 1.

    Lightness rises all along cividis: the order survives a greyscale print and every kind of colour blindness.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    rgb = colormaps["cividis"](share)[:3]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return to_hex(rgb), "#000000" if luminance > 0.179 else "#ffffff"  # equal contrast with both (WCAG 2)


def say_nothing(axes: Axes, words: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, ha="center", va="center", color=RULE, transform=axes.transAxes)


def tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
