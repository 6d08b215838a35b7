"""A training run, from its first line to its last. `taskgpt train` puts these together.

start.py      how it begins: anew, or from a checkpoint
training.py   its loop: validation, samples, steps
saving.py     when checkpoints are made, and how
console.py    what a person sees of it, and what stops it
logs.py       its logs: JSON lines, CSV, TensorBoard's events
folder.py     its folder: what the run is, its checkpoints, its log
summary.py    its end in numbers
"""
