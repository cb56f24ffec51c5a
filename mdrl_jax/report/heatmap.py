"""The score matrix as a picture: stage by domain, score and standard error in every cell."""

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mdrl_jax.records import write_bytes
from mdrl_jax.report.matrix import Matrix, trained_domain

DPI = 150
CELL_PIXELS = 172, 72
MARGIN_PIXELS = 480, 232
# Perceptually uniform and near the same to colour-blind readers.
COLOURS = "cividis"
ABSENT = (0.92, 0.92, 0.92)


def save_matrix(path: str | Path, matrix: Matrix) -> None:
    """Writes the heat map of `matrix` to `path` as PNG, whole or not at all."""
    write_bytes(path, png(matrix))


def size_pixels(matrix: Matrix) -> tuple[int, int]:
    """(width, height) of the picture."""
    columns, rows = len(matrix.domains), len(matrix.stages)
    return (
        MARGIN_PIXELS[0] + CELL_PIXELS[0] * columns,
        MARGIN_PIXELS[1] + CELL_PIXELS[1] * rows,
    )


def png(matrix: Matrix) -> bytes:
    """The PNG bytes of the heat map.

    Colour is the score in points between the lowest and the highest of the matrix. A frame marks
    the domain that a stage trained. A cell that was not evaluated is grey with a dash.
    """
    width, height = size_pixels(matrix)
    # Half a pixel more, since matplotlib truncates inches × dpi.
    figsize = (width + 0.5) / DPI, (height + 0.5) / DPI
    figure = Figure(figsize=figsize, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scores = np.ma.masked_invalid(matrix.score_SD)
    colours = colormaps[COLOURS].with_extremes(bad=ABSENT)
    norm = Normalize(*_limits(matrix))
    picture = axes.imshow(scores, cmap=colours, norm=norm, aspect="auto")
    for (s, d), score in np.ndenumerate(matrix.score_SD):
        colour = colours(norm(score)) if np.isfinite(score) else ABSENT
        text = cell_text(score, float(matrix.stderr_SD[s, d]))
        axes.text(d, s, text, ha="center", va="center", fontsize=9, color=legible_on(colour[:3]))
    for s, d in framed_cells(matrix):
        # White under black shows on the dark and on the bright end of the map.
        for width, colour in ((4.5, "white"), (2.0, "black")):
            frame = Rectangle((d - 0.47, s - 0.44), 0.94, 0.88, fill=False, lw=width, ec=colour)
            axes.add_patch(frame)
    axes.set_xticks(range(len(matrix.domains)), matrix.domains)
    axes.set_yticks(range(len(matrix.stages)), matrix.stages)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("domain tested")
    axes.set_ylabel("after stage")
    axes.set_title("score ± standard error; framed: the domain trained", fontsize=9)
    figure.colorbar(picture, ax=axes, label="score, points")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def framed_cells(matrix: Matrix) -> list[tuple[int, int]]:
    """(row, column) of the domain that each stage trained; a rollback or placebo trains none."""
    trained = [s for s in range(len(matrix.stages)) if not _untrained(matrix.stages[s])]
    named = [(s, trained_domain(matrix.stages[s], matrix.domains)) for s in trained]
    return [(s, matrix.domains.index(d)) for s, d in named if d is not None]


def cell_text(score: float, stderr: float) -> str:
    """`66.5 ± 1.2`; a dash where not evaluated, and no error where one prompt gives none."""
    if not np.isfinite(score):
        return "–"
    return f"{score:.1f} ± {stderr:.1f}" if np.isfinite(stderr) else f"{score:.1f}"


def legible_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever has the higher WCAG contrast on the sRGB `colour` in [0, 1]."""
    luminance = relative_luminance(colour)
    return "black" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "white"


def relative_luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance of an sRGB colour in [0, 1] (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def _untrained(stage: str) -> bool:
    return stage.startswith(("rollback-", "placebo-"))


def _limits(matrix: Matrix) -> tuple[float, float]:
    finite = matrix.score_SD[np.isfinite(matrix.score_SD)]
    if finite.size == 0:
        return 0.0, 100.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)
