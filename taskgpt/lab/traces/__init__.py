"""Traces: a run as data, written and read.

trace.py        which task ran when, on which worker; traced_graph.py: what the tasks were; trace_file.py: how that lies in trace.npz
process.py      which process recorded it, on which machine
network.py      several processes: whose workers are whose, and what ranks of a program exchanged; ranks.py: one trace of what each recorded
formats.py      the formats that a trace is written in, a file each: perfetto.py, paraver.py (and paraver_views.py), ovni.py, table.py.
                A new one is a file and a line
rules.py        what their checkers raise; ovni_check.py: ovni's
idle.py         why a worker was idle
efficiency.py   POP's efficiencies, the longest path; comparison.py: several traces beside each other
node.py         what several programs made of a machine's cores
timeline.py     a still picture; page.py: a page (page.html) to zoom
"""
