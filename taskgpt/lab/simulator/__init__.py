"""The simulator: schedulers with workers that one does not have.

machine_file.py   a machine of sockets and cores, from machines/
task_costs.py     how long each task takes, and what it moves through memory
events.py         a clock, on which workers take tasks and finish them
simulated.py      schedulers on that clock, with the native scheduler's own queues
core_ways.py      how programs beside each other come to cores: their own, time slices, leases by the compiled protocol of sharing/
together.py       programs beside each other, on one clock
stepped.py        the native scheduler's compiled functions, a step at a time
contention.py     them on cores that send each other cache lines
scaling.py        a step of many ranks, which exchange gradients; scaling_picture.py draws it
validation.py     predicted beside measured
"""
