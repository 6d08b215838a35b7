"""The page /taskgpt in Dask's dashboard, in Bokeh: loss, speed, efficiency, kernels, waiting tasks, samples. Needs bokeh.

Of a program that is no training it shows its runs: their time and efficiency, kernels and waiting tasks. Of a training on a cluster, whose
tasks are elsewhere, it shows a table of ranks in place of these. Of a run that shares its cores, also which program holds which.
"""

import statistics
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from bokeh.document import Document
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, Div, FactorRange, GlobalInlineStyleSheet, HoverTool, NumeralTickFormatter
from bokeh.plotting import figure
from distributed.dashboard.components.scheduler import env

from taskgpt import palette
from taskgpt.lab import layout, theme
from taskgpt.lab.dashboard.cores import seen_now
from taskgpt.lab.dashboard.live import Live, Rank
from taskgpt.progress import minutes

PERIOD_MS = 1000  # between two looks
KEPT = 20_000  # steps that a page holds
BARS = 14  # kernels shown
SAMPLES = 3  # the last ones
NARROWEST = 400  # pixels of a plot: a narrower window has one a row
_INK = "#717A84"  # of axes and titles, which cannot know whether the page is light or dark: WCAG's contrast is 4.3 on both
_STYLE = (
    theme.CSS
    + """
html { background: var(--back); }
.navbar ul, .dropdown-content { background: var(--panel) !important; }
.navbar li a { color: var(--text) !important; }
.navbar img { box-sizing: content-box; }
"""
)


def fill(document: Document, live: Live, extra: dict[str, Any]) -> Callable[[], None]:
    """Make the page for one viewer, and keep it up to date while the viewer looks; return what does that."""
    columns = ("step", "loss", "speed", "efficiency") if live.trains else ("step", "graph", "ms", "efficiency")
    steps = ColumnDataSource({name: [] for name in columns})
    validations = ColumnDataSource({name: [] for name in ("step", "loss")})
    kernels = ColumnDataSource({name: [] for name in ("kernel", "ms", "colour")})
    ready = ColumnDataSource({name: [] for name in ("ms", "tasks")})
    top = Div(
        sizing_mode="stretch_width", styles={"font-size": "120%", "margin": "4px 12px"}, stylesheets=[GlobalInlineStyleSheet(css=_STYLE)]
    )
    table = {"margin": "4px 12px", "overflow-x": "auto", "padding-bottom": "10px"}  # for the bar that scrolls
    ranks = Div(sizing_mode="stretch_width", styles=table, stylesheets=[theme.CSS], visible=live.ranks is not None)
    cores = Div(sizing_mode="stretch_width", styles=table, stylesheets=[theme.CSS], visible=bool(live.share))
    samples = Div(sizing_mode="stretch_width", styles={"margin": "4px 12px"})

    def over_steps(title: str, name: str, unit: str, colour: str):
        found = _plot(title, kind, unit)
        found.line("step", name, source=steps, color=colour, line_width=2)
        of = [] if live.trains else [("graph", "@graph")]
        found.add_tools(HoverTool(tooltips=[(kind, "@step"), *of, (title, f"@{name}{{0.000}}")], mode="vline"))
        return found

    kind = "step" if live.trains else "run"
    if live.trains:
        loss = over_steps("loss", "loss", "train; dots: validation", palette.BLUE)
        loss.scatter("step", "loss", source=validations, color=palette.ORANGE, size=8)
        speed = over_steps("speed", "speed", "tokens a second", palette.BLUE)
        speed.yaxis.formatter = NumeralTickFormatter(format="0,0")
        first = [loss, speed]
    else:
        first = [over_steps("time", "ms", "ms to the end of its last task", palette.BLUE)]
    first[-1].y_range.start = 0
    efficiency = over_steps("parallel efficiency", "efficiency", "time in tasks / all workers' time", palette.VIOLET)
    efficiency.y_range.start, efficiency.y_range.end = 0, 1.02
    names = FactorRange()
    bars = _plot(f"time by kernel, last {kind}", "ms of all workers", "", y_range=names)
    bars.hbar(y="kernel", right="ms", source=kernels, height=0.8, color="colour")
    bars.x_range.start = 0
    bars.add_tools(HoverTool(tooltips=[("@kernel", "@ms{0.0} ms")]))
    depth = _plot(f"tasks that are ready and wait, the {kind} before", "ms", "tasks")
    depth.step("ms", "tasks", source=ready, color=palette.ORANGE, mode="after", line_width=1.5)
    depth.y_range.start = 0
    seen = {"steps": 0, "validations": 0}

    def update() -> None:
        new: list[tuple] = (live.steps if live.trains else live.runs)[seen["steps"] :]
        if marks := live.validations[seen["validations"] :]:
            validations.stream(dict(zip(("step", "loss"), map(list, zip(*marks, strict=True)), strict=True)))
            seen["validations"] += len(marks)
        top.text, samples.text = head(live), _samples(live)
        if live.ranks is not None:
            ranks.text = layout.to_html(rank_table(live.ranks))
        if live.share:
            cores.text = seen_now(live.share)
        if not new:
            return
        steps.stream(dict(zip(columns, map(list, zip(*new, strict=True)), strict=True)), KEPT)
        seen["steps"] += len(new)
        run = live.last_step if live.trains else live.last_run
        shown = list(run.kernel_ms)[:BARS][::-1]
        names.factors = shown
        colour = palette.of_kernels(shown)
        kernels.data = {"kernel": shown, "ms": [run.kernel_ms[name] for name in shown], "colour": [colour[name] for name in shown]}
        ready.data = {"ms": run.ready_at_ms, "tasks": run.ready}

    update()
    document.add_periodic_callback(update, PERIOD_MS)
    of_tasks = [efficiency, bars, depth] if live.ranks is None else []
    plots = row(*first, *of_tasks, sizing_mode="stretch_width", styles={"flex-wrap": "wrap"})
    document.add_root(column(top, plots, ranks, cores, samples, sizing_mode="stretch_width"))
    document.title = "taskgpt"
    document.template = env.get_template("simple.html")
    document.template_variables.update(extra)
    return update


def _plot(title: str, x: str, y: str, **options: Any):
    clear = dict.fromkeys(("background_fill_color", "border_fill_color", "outline_line_color"))
    found = figure(
        title=title,
        x_axis_label=x,
        y_axis_label=y,
        height=260,
        min_width=NARROWEST,
        sizing_mode="stretch_width",
        toolbar_location=None,
        **clear,
        **options,
    )
    found.title.text_color = _INK
    for part in ("axis_label_text", "major_label_text", "axis_line", "major_tick_line", "minor_tick_line"):
        setattr(found.axis, f"{part}_color", _INK)
    found.grid.grid_line_color, found.grid.grid_line_alpha = _INK, 0.25
    return found


def head(live: Live) -> str:
    """Return what runs, and how far it is."""
    now = live.end or f"waiting for the first {'step' if live.trains else 'run'}"
    if live.runs:
        number, graph, ms, share = live.runs[-1]
        now = (
            f"run {number}, {graph}: {ms:,.1f} ms, parallel efficiency {share:.3f} on {live.workers} workers{live.end and f'; {live.end}'}"
        )
    if live.steps:
        step, loss, tokens, share = live.steps[-1]
        left = live.end or (f"{minutes(live.left_s)} left" if live.left_s > 0 else "the last things")
        now = f"step {step + 1:,} of {live.total:,}, {left}: loss {loss:.4f}, {tokens:,.0f} tok/s, "
        now += f"parallel efficiency {share:.3f} on {live.workers} workers" if live.ranks is None else _on_ranks(live.ranks)
    return f"<b>{escape(live.title)}</b><br>{escape(now)}"


def _on_ranks(ranks: Sequence[Rank]) -> str:
    count = sum(not each.is_lost for each in ranks)
    shares = [each.wait_s / each.seconds for each in ranks if each.wait_s is not None and not each.is_lost]
    waited = f", {statistics.fmean(shares):.0%} of the last step waiting for the network" if shares else ""
    return f"on {count} rank{'s' * (count != 1)}{waited}"


def rank_table(ranks: Sequence[Rank]) -> layout.Table:
    """Return a row for each rank; of one that is lost, what it said last."""
    rows = []
    for each in ranks:
        waited = ["-", "-"] if each.wait_s is None else [f"{each.wait_s * 1e3:,.1f}", f"{each.wait_s / each.seconds:.0%}"]
        speed = f"{each.tokens / each.seconds:,.0f}" if each.seconds else "-"
        who = [str(each.number), each.address, each.machine, str(each.generation), "lost" if each.is_lost else "here"]
        rows.append([*who, f"{each.step:,}", speed, *waited])
    head = ["rank", "worker", "machine", "generation", "state", "steps done", "tok/s", "ms waiting for the network", "of the step"]
    return {"caption": "ranks", "head": head, "rows": rows}


def _samples(live: Live) -> str:
    wrap = "white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0 14px"
    found = [f'<b>sample after {step:,} steps</b><pre style="{wrap}">{escape(text)}</pre>' for step, text in live.samples[-SAMPLES:]]
    return "".join(found[::-1])
