"""What pictures share: matplotlib's style, and SVG whose ink is the colour of text around it."""

import io

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

INK = "#010203"  # stands for the page's own colour of text, light or dark: SVG's currentColor
WIDTH = 8.5  # of a picture, inches
MARKERS = "osD^vPX*"  # of lines: told apart without their colours
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def to_svg(figure: Figure) -> str:
    """Return the SVG element; its names do not meet those of others on the page, and it is the same every time."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "".join(word.get_text() for word in figure.findobj(Text))}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    whole = text.getvalue()
    return whole[whole.index("<svg") :].replace(INK, "currentColor")
