"""Room 4: looks at runs and at the machine they ran on.

machine.py  what this machine can do: sgemm and memory bandwidth, measured
    picture.py  a graph as SVG
"""
