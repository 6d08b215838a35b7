"""Clusters that are started by SSH and by mpiexec, on this machine, where there are sshd, asyncssh, MPI and dask-mpi.

`python -m tests.real_clusters` has SLURM too, whose jobs take minutes.
"""

import pytest
import real_clusters


@pytest.mark.parametrize("part", [real_clusters.ssh, real_clusters.mpi])
def test_a_cluster_on_real_parts(part, tmp_path, monkeypatch):
    """It starts, its workers are members of a run, nothing of it is left; what hinders it is told in one message."""
    monkeypatch.chdir(tmp_path)
    try:
        assert part(tmp_path)
    except real_clusters.Missing as missing:
        pytest.skip(str(missing))
