"""A cluster that is started by SSH on this machine, where there are sshd and asyncssh. `python -m tests.real_clusters` has more."""

import pytest
import real_clusters

from taskgpt.cluster import checks
from taskgpt.cluster.opening import opened


def test_a_cluster_by_ssh(tmp_path):
    """Its workers listen on their host's address alone, and are members of a run; a key that the server does not know is told."""
    try:
        with real_clusters.sshd(tmp_path) as config:
            chosen = real_clusters.settings("cluster-ssh", hosts="127.0.0.1", ssh_config=str(config))
            with opened(chosen, print) as client:
                [member] = checks.ready(client, chosen, 1, print)
                assert member.name == "127.0.0.1-0" and not real_clusters.public_addresses({member.pid})
            stranger = tmp_path / "stranger"
            stranger.write_text(config.read_text().replace(f"{tmp_path}/me", f"{tmp_path}/host"))
            told = real_clusters.refusal(real_clusters.settings("cluster-ssh", hosts="127.0.0.1", ssh_config=str(stranger)))
    except real_clusters.Missing as missing:
        pytest.skip(str(missing))
    assert "did not start: PermissionDenied" in told and "does `ssh 127.0.0.1 true` work without a question" in told
