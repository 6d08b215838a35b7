"""Curves of training runs, of one or of several over each other: `taskgpt plot`.

run_log.py     a run's log as numbers, thinned while it is read: of any length, damaged or still growing
panels.py      what there is to draw of several runs: a panel for losses, for norms, ...
terminal.py    panels as text; picture.py: as PNG and SVG; page.py: as a page
"""
