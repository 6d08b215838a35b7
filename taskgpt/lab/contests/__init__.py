"""Contests: who is faster, measured in turns.

cells.py            what is compared: scheduler x tiles x workers x settings
baselines.py        what is no schedule of tasks: whole tensors in NumPy
served.py           an object in a process of its own, which may die
turns.py            runs cells in turns, in such a process
results.py          what was measured, in a file
compare_report.py   tables and a page of that; figures.py: its figures
"""
