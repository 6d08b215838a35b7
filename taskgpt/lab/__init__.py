"""Room 4: looks at runs, graphs and the machine. Rooms of its own, from the foundation up:

machine.py        what this machine can do, measured: sgemm, memory bandwidth; disturbance.py: what keeps it from that
pace.py           the times of steps that overlap
layout.py         tables as text, Markdown, HTML; report.py: medians, intervals, JSON
theme.py          how pages look; charts.py: lines in them; drawing.py: how pictures look
graph_formats.py  a graph as JSON, GraphML, DOT, a page
traces/           a run as data: which task ran when; its formats, its analysis, its pictures
dashboard/        a run while it runs
curves/           `taskgpt plot`: losses and the rest of training runs, from their logs
run_page.py       a training run as a page
named.py          graphs and schedulers as the command line names them
roofline.py       what a step needs at least: a graph's matrix products and its parameters' traffic, against the machine
contests/         `taskgpt compare`: schedulers, tiles and policies in turns
benchmarks/       `taskgpt bench`: steps, the cost of a task, other libraries
pairs/            `taskgpt compare --pairs`: two programs at once
simulator/        `taskgpt simulate`: schedulers with simulated workers
tuning/           `taskgpt tune`: the fastest tiles and policy, found and remembered
"""
