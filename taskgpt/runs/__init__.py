"""A training run, from its first line to its last. `taskgpt train` puts these together.

training.py   its loop: validation, samples, steps
console.py    what a person sees of it, its log, and what stops it
summary.py    its end in numbers
"""
