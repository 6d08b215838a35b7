"""Benchmarks.

steps.py        training steps of graphs under schedulers, in turns
decode.py       a generated token, against streaming the weights
patterns.py     Task Bench's patterns, and spawned_patterns.py, as programs
task_bench.py   Task Bench's graphs: what a task costs, and how short tasks may be
programs.py     whole programs (task_programs.py) against the same tasks in C with OpenMP (openmp.py, openmp.c)
recording.py    what recording a graph costs
peers.py        PyTorch (peer_torch.py) and JAX (peer_jax.py) on the same model, in processes of their own (peer_process.py,
                peer_setups.py)
"""
