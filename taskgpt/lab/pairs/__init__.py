"""Pairs: two programs on one machine, one after the other or at once, measured in turns.

words.py       how the command line names a program of a pair
works.py       what such a program does: training steps, or one of a few small programs
partner.py     its process: it prepares, waits for go, works, and says its time and the hash of its result
ways.py        the ways to run a pair, and for how long each of the two has cores in a share
contest.py     pairs in all ways, round after round
pair_report.py tables, a picture and a page of that
"""
