"""The page /taskgpt in Dask's dashboard, in Bokeh: loss, speed, efficiency, kernels, waiting tasks. Needs the extra `dashboard`."""

from html import escape
from typing import Any

from bokeh.document import Document
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, Div, FactorRange, HoverTool
from bokeh.plotting import figure
from distributed.dashboard.components.scheduler import env

from taskgpt import palette
from taskgpt.lab.dashboard.live import Live

PERIOD_MS = 1000  # between two looks
KEPT = 20_000  # steps that a page holds
BARS = 14  # kernels shown


def fill(document: Document, live: Live, extra: dict[str, Any]) -> None:
    """Make the page for one viewer, and keep it up to date while the viewer looks."""
    steps = ColumnDataSource({name: [] for name in ("step", "loss", "speed", "efficiency")})
    validations = ColumnDataSource({name: [] for name in ("step", "loss")})
    kernels = ColumnDataSource({name: [] for name in ("kernel", "ms", "colour")})
    ready = ColumnDataSource({name: [] for name in ("ms", "tasks")})
    head = Div(sizing_mode="stretch_width", styles={"font-size": "120%", "margin": "4px 12px"})

    def plot(title: str, x: str, y: str, **options: Any):
        found = figure(
            title=title, x_axis_label=x, y_axis_label=y, height=260, sizing_mode="stretch_width", toolbar_location=None, **options
        )
        return found

    def over_steps(title: str, name: str, unit: str, colour: str):
        found = plot(title, "step", unit)
        found.line("step", name, source=steps, color=colour, line_width=2)
        found.add_tools(HoverTool(tooltips=[("step", "@step"), (title, f"@{name}{{0.000}}")], mode="vline"))
        return found

    loss = over_steps("loss", "loss", "train; dots: validation", palette.BLUE)
    loss.scatter("step", "loss", source=validations, color=palette.ORANGE, size=8)
    speed = over_steps("speed", "speed", "tokens a second", palette.VIOLET)
    speed.y_range.start = 0
    efficiency = over_steps("parallel efficiency", "efficiency", "time in tasks / all workers' time", palette.PINK)
    efficiency.y_range.start, efficiency.y_range.end = 0, 1.02
    names = FactorRange()
    bars = plot("time by kernel, last step", "ms of all workers", "", y_range=names)
    bars.hbar(y="kernel", right="ms", source=kernels, height=0.8, color="colour")
    bars.x_range.start = 0
    bars.add_tools(HoverTool(tooltips=[("@kernel", "@ms{0.0} ms")]))
    depth = plot("tasks that are ready and wait, the step before", "ms", "tasks")
    depth.step("ms", "tasks", source=ready, color=palette.ORANGE, mode="after", line_width=1.5)
    depth.y_range.start = 0
    seen = {"steps": 0, "validations": 0}

    def update() -> None:
        new = live.steps[seen["steps"] :]
        if marks := live.validations[seen["validations"] :]:
            validations.stream(dict(zip(("step", "loss"), map(list, zip(*marks, strict=True)), strict=True)))
            seen["validations"] += len(marks)
        if not new:
            return
        steps.stream(dict(zip(("step", "loss", "speed", "efficiency"), map(list, zip(*new, strict=True)), strict=True)), KEPT)
        seen["steps"] += len(new)
        run = live.last_step
        shown = list(run.kernel_ms)[:BARS][::-1]
        names.factors = shown
        colour = palette.of_kernels(shown)
        kernels.data = {"kernel": shown, "ms": [run.kernel_ms[name] for name in shown], "colour": [colour[name] for name in shown]}
        ready.data = {"ms": run.ready_at_ms, "tasks": run.ready}
        step, last_loss, tokens, share = new[-1]
        now = f"step {step}: loss {last_loss:.4f}, {tokens:,.0f} tok/s, parallel efficiency {share:.3f} on {live.workers} workers"
        head.text = f"<b>{escape(live.title)}</b><br>{escape(now)}"

    head.text = f"<b>{escape(live.title)}</b><br>waiting for the first step"
    update()
    document.add_periodic_callback(update, PERIOD_MS)
    document.add_root(
        column(
            head,
            row(loss, speed, sizing_mode="stretch_width"),
            row(efficiency, bars, sizing_mode="stretch_width"),
            depth,
            sizing_mode="stretch_width",
        )
    )
    document.title = "taskgpt"
    document.template = env.get_template("simple.html")
    document.template_variables.update(extra)
