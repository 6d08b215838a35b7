"""Room 4: looks at runs, graphs and the machine.

machine.py     what this machine can do, measured: sgemm, memory bandwidth; disturbance.py what keeps it from that
pace.py        the times of steps that overlap
roofline.py    what a step needs at least: a graph's matrix products and its parameters' traffic, against that
steps.py       training steps of graphs under schedulers, in turns
task_bench.py  Task Bench's graphs: what a task costs, and how short tasks may be
peers.py       PyTorch (peer_torch.py) and JAX (peer_jax.py) on the same model, in processes of their own (peer_process.py, peer_setups.py)
named.py       graphs and schedulers as the command line names them
report.py      medians, intervals, JSON; layout.py: tables as text, Markdown, HTML
cells.py       what `taskgpt compare` compares; turns.py runs it, baselines.py has what is no schedule of tasks
results.py     what it measured, in a file; compare_report.py and figures.py tell it
simulated.py   schedulers with simulated workers: a clock (events.py), times (task_costs.py), and machines/
picture.py     a graph as SVG; graph_formats.py: as JSON, GraphML, DOT, a page
efficiency.py  what a trace says of time: efficiencies, idle time by cause, the longest path
page.py        traces as a page (page.html) with a timeline to zoom
trace.py       a run as data: which task ran when, on which worker
formats.py     the formats that a trace is written in: perfetto.py, paraver.py, ovni.py (and ovni_check.py)
rules.py       what their checkers raise
tilings.py     tile sizes worth a try, and their forecasts; races.py: what is faster, in turns; tuned.py: what tuning leaves
"""
