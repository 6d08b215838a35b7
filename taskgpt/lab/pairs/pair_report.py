"""Pairs told: tables, and one HTML page with a picture."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from taskgpt import palette
from taskgpt.lab.contests.compare_report import STYLE as PAGE_STYLE
from taskgpt.lab.drawing import INK, STYLE, WIDTH, to_svg
from taskgpt.lab.layout import Table, to_html
from taskgpt.lab.pairs.ways import WAYS, Turn
from taskgpt.lab.report import interval_words, median_interval, quartiles
from taskgpt.lab.theme import html_page

COLOURS = {"exclusive": palette.GREY, "oversubscribed": palette.ORANGE, "split": palette.VIOLET, "shared": palette.BLUE}
WAY_COLUMNS = {
    "pair": ("pair", ""),
    "way": ("way", ""),
    "makespan s": ("median_s", ".3f"),
    "q1": ("q1_s", ".3f"),
    "q3": ("q3_s", ".3f"),
    "first s": ("first_s", ".3f"),
    "second s": ("second_s", ".3f"),
    "shared / it": ("x_shared", ".3f"),
}
PAIR_COLUMNS = {
    "pair": ("pair", ""),
    "runs in a turn": ("times", ""),
    "best other": ("best", ""),
    "shared / best": ("ratio", ".3f"),
    "q1": ("q1", ".3f"),
    "q3": ("q3", ".3f"),
    "95 %": ("interval_words", ""),
    "offers/s": ("offers_per_s", ".0f"),
    "same bits": ("same_bits", ""),
}
FAIRNESS_COLUMNS = {
    "pair": ("pair", ""),
    "weights": ("weights", ""),
    "first, core s": ("first_s", ".2f"),
    "second, core s": ("second_s", ".2f"),
    "ratio": ("ratio", ".3f"),
    "q1": ("q1", ".3f"),
    "q3": ("q3", ".3f"),
    "wanted": ("wanted", ".3f"),
    "off": ("off", "+.1%"),
}
LEAST_S = 1e-6  # of cores: who had none had so much
DETAILS = ("first s", "second s")  # what only --wide shows


@dataclass
class Measured:
    """A pair's name and programs, how often each ran in a turn, and its turns, round after round. `failed`: why it was given up."""

    pair: str
    programs: list[str]
    times: list[int] = field(default_factory=list)
    is_exact: bool = True
    turns: list[Turn] = field(default_factory=list)
    failed: str = ""

    def of(self, way: str) -> list[Turn]:
        return [turn for turn in self.turns if turn.way == way]

    @property
    def different_bits(self) -> list[str]:
        """A line on each program whose result was not the same in all turns, though it should be."""
        lines = []
        for number, program in enumerate(self.programs):
            groups: dict[str, list[str]] = {}
            for turn in self.turns:
                groups.setdefault(turn.sha256[number], []).append(turn.way)
            if self.is_exact and len(groups) > 1:
                told = "; ".join(f"{sha256[:8]} {', '.join(dict.fromkeys(ways))}" for sha256, ways in groups.items())
                lines.append(f"{self.pair}: DIFFERENT BITS of {program}: {told}")
        return lines


def way_rows(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return a row for each pair and way: median and quartiles of makespans, medians of each program's end, ratio of makespans' medians."""
    rows = []
    for each in found:
        shared = statistics.median(turn.makespan_s for turn in each.of("shared"))
        for way in WAYS:
            turns = each.of(way)
            q1, median, q3 = quartiles(turn.makespan_s for turn in turns)
            first_s, second_s = (statistics.median(turn.ends_s[number] for turn in turns) for number in range(2))
            row = {"pair": each.pair, "way": way, "median_s": median, "q1_s": q1, "q3_s": q3, "first_s": first_s, "second_s": second_s}
            rows.append(row | {"x_shared": shared / median})
    return rows


def pair_rows(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return a row for each pair: the way of the least median beside `shared`, and the ratios of makespans to it, of each round one."""
    rows = []
    for each in found:
        medians = {way: statistics.median(turn.makespan_s for turn in each.of(way)) for way in WAYS if way != "shared"}
        best, shared = min(medians, key=medians.__getitem__), each.of("shared")
        ratios = [turn.makespan_s / other.makespan_s for turn, other in zip(shared, each.of(best), strict=True)]
        q1, ratio, q3 = quartiles(ratios)
        interval = median_interval(ratios)
        row = {"pair": each.pair, "times": ", ".join(map(str, each.times)), "best": best, "ratio": ratio, "q1": q1, "q3": q3}
        row |= {"interval": interval, "interval_words": interval_words(interval, ".3f"), "offers_per_s": _offers_per_s(shared)}
        rows.append(row | {"same_bits": "NO" if each.different_bits else "yes" if each.is_exact else "need not be"})
    return rows


def _offers_per_s(shared: Sequence[Turn]) -> float:
    return statistics.median(sum(turn.offers or ()) / turn.makespan_s for turn in shared)


def fairness_row(pair: str, weights: Sequence[int], rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return medians of the time of cores that each program had in its rounds, and of their ratio beside that of the weights."""
    q1, ratio, q3 = quartiles(first / max(second, LEAST_S) for first, second in rounds)
    first_s, second_s = (statistics.median(each[number] for each in rounds) for number in range(2))
    wanted = weights[0] / weights[1]
    row = {"pair": pair, "weights": ":".join(map(str, weights)), "first_s": first_s, "second_s": second_s, "ratio": ratio}
    return row | {"q1": q1, "q3": q3, "wanted": wanted, "off": ratio / wanted - 1, "core_s": [list(each) for each in rounds]}


def bars(rows: Sequence[dict[str, Any]]) -> str:
    """Draw the median makespan of each pair in each way, a line from the first quartile to the third; of each pair the longest is 1."""
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 1.25 * len(pairs)), layout="constrained")
        axes = figure.subplots()
        for at, pair in enumerate(pairs):
            mine = [row for row in rows if row["pair"] == pair]
            longest = max(row["median_s"] for row in mine)
            for row, down in zip(mine, (-0.3, -0.1, 0.1, 0.3), strict=True):
                label = row["way"] if at == 0 else None
                axes.barh(at + down, row["median_s"] / longest, height=0.18, color=COLOURS[row["way"]], label=label)
                axes.plot([row["q1_s"] / longest, row["q3_s"] / longest], [at + down] * 2, color=INK, linewidth=1.2)
                place = max(row["median_s"], row["q3_s"]) / longest, at + down
                axes.annotate(f"{row['median_s']:.3g} s", place, (5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(pairs)), [pair.replace(" + ", "\n+ ") for pair in pairs])
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.set_xlabel("makespan, of the pair's longest")
        figure.legend(loc="outside upper right", ncols=4)
        return to_svg(figure)


def page(rows: Sequence[dict[str, Any]], tables: Sequence[Table], wrong: Sequence[str]) -> str:
    """Return the page: what differs and should not, the tables with the picture below the first. Nothing in it comes from elsewhere."""
    caption = "Medians; the thin line goes from the first quartile to the third. Shorter is better."
    lines = "".join(f'<p class="wrong">{escape(line)}</p>' for line in wrong)
    picture = f'<figure><h2>Makespans</h2><figcaption>{caption}</figcaption><div class="scroll">{bars(rows)}</div></figure>'
    first, *others = (f'<div class="scroll">{to_html(table)}</div>' for table in tables)
    body = f"<h1>Pairs of programs, four ways to share the cores</h1>\n{lines}{first}{picture}{''.join(others)}"
    return html_page("taskgpt compare --pairs", PAGE_STYLE, body)
