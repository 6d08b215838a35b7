"""A Dask cluster that is already there, or that is started for a run: how it is opened and checked, and what runs on it.

settings.py       the keys of scheduler_configs/cluster.toml
opening.py        a client of a cluster: by address, by scheduler file, or of one that is started
starting.py       who starts one
checks.py         its workers: waited for, asked what they are, refused with reasons; which of them are members
facts.py          what a worker is, as it says itself
speeds.py         how fast its workers and the links between them are, for `taskgpt cluster check`
dask_links.py     messages between ranks, over Dask's own comms
mpi_links.py      the same over MPI, where mpiexec has started the workers
job.py            what the driver tells ranks, and they tell it
kept.py           what a worker keeps of a run between generations, and hands out
rank_training.py  the training loop in a rank
rank.py           what runs in a worker
membership.py     which workers a run may have as ranks, and what each has of it
offers.py         checkpoints that ranks offer, fetched and written
driver.py         a run through its generations
training.py       `taskgpt train` on a cluster
worker_logs.py    what workers log, for the driver
traces.py         one trace of all ranks
owned.py          any tiled program, each tile on the worker that is its home
"""
