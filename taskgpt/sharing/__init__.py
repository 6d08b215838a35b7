"""Processes of one user that share the cores of a machine, task by task, after nOS-V.

layout.py    the segment, memory that the processes have in common, and what each keeps to itself
leases.py    the protocol: who holds which core, who waits, who is next. Compiled, without a lock
segment.py   the segment as a file: made, opened and removed
liveness.py  whether a process still lives, and whether it is stopped
member.py    a process that takes part: it joins, watches over the others, and leaves
seen.py      who holds what, for people
"""
