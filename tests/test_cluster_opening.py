"""A cluster is opened by address, by scheduler file or for the run; what cannot be opened is one message that says what to do."""

import gc
import json
import logging
import os
import shlex
import socket
import subprocess
import threading
import warnings

import dask
import psutil
import pytest
from distributed import LocalCluster
from pages import ROOT, blocks

from taskgpt.cluster import opening
from taskgpt.cluster.opening import opened
from taskgpt.cluster.settings import Settings
from taskgpt.config import load_scheduler
from taskgpt.errors import UserError


def settings(**changes) -> Settings:
    return load_scheduler("cluster", changes, may_be_cluster=True).settings


QUIET = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}, "silence_logs": logging.CRITICAL}


@pytest.fixture(scope="module")
def there():
    """A cluster of one worker without TLS, in threads of this process."""
    with LocalCluster(n_workers=1, processes=False, protocol="tcp://", **QUIET) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Of two authorities, `ours` and `others`: settings with the files of a certificate, made as the how-to makes them."""
    lines = [line for block in blocks(ROOT / "docs" / "howto" / "cluster.md", "bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("openssl ")]
    assert len(commands) == 3
    found = {}
    for name in ("ours", "others"):
        folder = tmp_path_factory.mktemp(name)
        for line in commands:
            subprocess.run(shlex.split(line), cwd=folder, check=True, capture_output=True)
        found[name] = {f"tls_{key}": str(folder / file) for key, file in (("ca_file", "ca.pem"), ("cert", "me.pem"), ("key", "me.key"))}
    return found


@pytest.fixture(scope="module")
def encrypted(certificates):
    """A cluster of one worker with TLS, of the authority `ours`."""
    security = opening.security_of(settings(**certificates["ours"]))
    with LocalCluster(n_workers=1, processes=False, protocol="tls://", security=security, **QUIET) as cluster:
        yield cluster


def why(**changes) -> str:
    """Return the one line that says why there is no client."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a handshake that fails leaves its socket to the garbage collector
        with pytest.raises(UserError) as told, opened(settings(**changes), print):
            pass
        message = str(told.value)
        del told
        gc.collect()
    assert "\n" not in message and len(message) < 400
    return message


def test_by_address_and_by_scheduler_file(there, tmp_path):
    """The client is of that cluster, is not Dask's default, and is gone afterwards."""
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps(there.scheduler.identity()))
    for changes in (
        {"address": there.scheduler_address},
        {"address": there.scheduler_address.partition("://")[2]},
        {"scheduler_file": str(file)},
    ):
        with opened(settings(**changes), print) as client:
            assert client.submit(os.getpid, pure=False).result() == os.getpid()
            with pytest.raises(ValueError, match="No global client"):
                __import__("distributed").get_client()
        assert client.status == "closed"


def test_with_tls(encrypted, certificates, tmp_path):
    """By the settings' certificates; without them, with another authority's, or without TLS, nobody gets in, and each is told why."""
    address = encrypted.scheduler_address
    with opened(settings(address=address, **certificates["ours"]), print) as client:
        assert client.submit(os.getpid, pure=False).result() == os.getpid()
    assert "needs certificates, got none; set tls_ca_file" in why(address=address)
    assert "its certificate is not of the authority in tls_ca_file" in why(address=address, **certificates["others"])
    half = certificates["others"] | {"tls_ca_file": certificates["ours"]["tls_ca_file"]}
    assert "closes the connection at once; it may not know the authority of tls_cert" in why(address=address, **half)
    assert "if the cluster has TLS, take tls://" in why(address=address.replace("tls", "tcp"))
    mixed = certificates["ours"] | {"tls_key": certificates["others"]["tls_key"]}
    assert "no certificates and key in PEM that belong together" in why(address=address, **mixed)
    (tmp_path / "empty.pem").touch()
    assert "no certificates and key" in why(address=address, **certificates["ours"] | {"tls_ca_file": str(tmp_path / "empty.pem")})
    assert f"{tmp_path / 'none'}: no such file" in why(address=address, **certificates["ours"] | {"tls_key": str(tmp_path / "none")})


def test_tls_where_there_is_none(there, certificates):
    """Refused, whichever side wants it."""
    tls = there.scheduler_address.replace("tcp", "tls")
    assert "answers, but not with TLS; take tcp:// if the cluster has none" in why(address=tls, **certificates["ours"])
    assert "tls_ca_file is for tls://, got tcp://" in why(address=there.scheduler_address, **certificates["ours"])
    with dask.config.set({"distributed.comm.require-encryption": True}):
        assert "requires encryption, got tcp://; take tls://" in why(address=there.scheduler_address)


def test_nobody_there(there, monkeypatch):
    """No host, no port, a worker, something else that listens: one message each, within the time for it."""
    monkeypatch.setattr(opening, "CONNECT_S", 0.5)
    assert "no host of that name" in why(address="tcp://there.invalid:8786")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert f"cluster tcp://127.0.0.1:{port}: somebody listens there, but does not answer" in why(address=f"127.0.0.1:{port}")
    assert "nobody listens there; start one there with `dask scheduler`" in why(address=f"127.0.0.1:{port}")
    assert "wanted the address of Dask's scheduler, got that of a Worker" in why(address=there.workers[0].address)
    assert "which one? --scheduler tcp://HOST:8786" in why()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file: it is empty"),
        ("{", "not a JSON file"),
        ("[]", "no scheduler file: wanted the key address"),
        ('{"address": 3}', "no scheduler file: wanted the key address"),
        ('{"address": "http://h:1"}', "address: wanted one of tcp, tls, ucx, ucxx, got http://"),
        ('{"address": "tcp://h:1\\u001b[31m"}', "address: wanted PROTOCOL://HOST:PORT"),
    ],
)
def test_a_scheduler_file_that_is_none(tmp_path, text, message):
    """Said in one line that names it."""
    (tmp_path / "scheduler.json").write_text(text)
    found = why(scheduler_file=str(tmp_path / "scheduler.json"))
    assert message in found and str(tmp_path) in found


def test_a_scheduler_file_is_waited_for(there, tmp_path):
    """As long as wait_s says: a batch job may write it a little later."""
    file = tmp_path / "scheduler.json"
    assert "scheduler.json: no such file" in why(scheduler_file=str(file), wait_s=0.1)
    later = threading.Timer(0.5, lambda: os.replace(tmp_path / "new", file))
    (tmp_path / "new").write_text(json.dumps({"address": there.scheduler_address}))
    later.start()
    with opened(settings(scheduler_file=str(file)), print) as client:
        assert client.status == "running"
    later.join()


def test_a_cluster_of_processes_here(certificates, capsys):
    """Worker processes on 127.0.0.1 alone, with TLS if there are certificates; gone with the block."""
    with opened(settings(start="local", members=1, **certificates["ours"]), print) as client:
        found = client.scheduler_info()["workers"]
        pids = client.run(os.getpid)
        assert len(found) == 1 and os.getpid() not in pids.values()
        assert all(address.startswith("tls://127.0.0.1:") for address in [client.scheduler.address, *found])
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {each.laddr.ip for process in family for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
    assert not any(psutil.pid_exists(pid) for pid in pids.values())
    assert capsys.readouterr().out == "starting a cluster: 1 worker process on 127.0.0.1\n"
