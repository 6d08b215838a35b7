"""Configurations: whatever a person writes into a file or behind `--set` is taken, or its mistake told in one line."""

import dataclasses
import errno
import os
import re
from pathlib import Path

import pytest

from taskgpt import config as config_module
from taskgpt.cluster.settings import schedule
from taskgpt.config import available, find_file, load_graph, load_scheduler, parse_settings
from taskgpt.errors import UserError, shorten
from taskgpt.files import as_written, fill, read_bytes, read_text
from taskgpt.gpt2.program import training_graph
from taskgpt.lab.named import make, make_config, named_config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiles = 3", r"x\.toml: tiles: wanted a table, got 3; begin it with a line \[tiles\]"),
        ('model = "x"', "model: wanted a table, got 'x'"),
        ("[[tiles]]", r"tiles: wanted a table, got \[\{\}\]"),
        ("rows = 3", "unknown table 'rows'"),
        ("[tile]", "unknown table 'tile'; did you mean 'tiles'"),
        ("[tiles]\nrow = 3", "model.layers: missing"),
        ("tiles", r"x\.toml: not a TOML file"),
    ],
)
def test_a_wrong_graph_file_is_told(tmp_path, text, message):
    """With a change on top or without."""
    (tmp_path / "x.toml").write_text(text)
    for overrides in ({}, {"tiles.rows": 8}):
        with pytest.raises(UserError, match=message):
            load_graph(str(tmp_path / "x.toml"), overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheduler = 3", r"x\.toml: scheduler: wanted the name of a scheduler, got 3; write it in quotes"),
        ('scheduler = "loop"', "unknown scheduler 'loop'; did you mean 'loops'"),
        ('scheduler = "loops"\nworker = 1', r"x\.toml: worker: unknown key; did you mean 'workers'"),
        ('scheduler = "loops"\n[workers]', "workers: wanted int, got {}"),
    ],
)
def test_a_wrong_scheduler_file_is_told(tmp_path, text, message):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_scheduler(str(tmp_path / "x.toml"))


@pytest.mark.parametrize("load", [load_graph, load_scheduler])
def test_a_file_that_cannot_be_read_is_told(tmp_path, load, monkeypatch):
    """Missing, a folder, another encoding, without permission."""
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes("# é".encode("latin-1"))
    for name, reason in {"none": "no such file", "folder": "cannot read: Is a directory", "latin": "not a TOML file"}.items():
        with pytest.raises(UserError, match=rf"{name}\.toml: {reason}"):
            load(str(tmp_path / f"{name}.toml"))
    with pytest.raises(UserError, match=r"unknown (graph|scheduler) 'xxxxxxxx"):
        load("x" * 300)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("taskgpt.files.os.open", refuse)
    with pytest.raises(UserError, match=r"latin\.toml: cannot read: Permission denied; choose"):
        load(str(tmp_path / "latin.toml"))


def test_a_checkpoint_does_not_replace_a_norm():
    """A graph file with another norm than the checkpoint's is refused, not trained as the checkpoint's."""
    model = load_graph("gpt2-124m").model
    assert load_graph("tiny", model=model).model == model
    with pytest.raises(UserError, match=r"tiny\.toml: model\.norm: the checkpoint's model has rmsnorm, got layernorm"):
        load_graph("tiny", model=dataclasses.replace(model, norm="rmsnorm"))


@pytest.mark.parametrize("load", [load_graph, load_scheduler])
def test_a_file_that_never_ends_is_not_read(tmp_path, load):
    """Neither a pipe that nobody writes into, nor a device, nor a link to one."""
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    for name, reason in {"pipe": "Is a pipe", "zero": "Is a device"}.items():
        with pytest.raises(UserError, match=rf"{name}\.toml: cannot read: {reason}"):
            load(str(tmp_path / f"{name}.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is empty"),
        (b" \r\n", "it is empty"),
        (b"a = " + b"[" * 900, "nested too deeply"),
        (b"a = " + b"[" * 100_000, "more than 65,536 bytes"),
        (b"a = " + b"[" * 2_000, "line 1 has 2,004 characters, wanted at most 1,000"),
        (b"a.b." * 10_000 + b"c = 1", "line 1 has 40,005 characters"),
        (b"[tiles]\nrows = 1\nrows = 2", "Cannot overwrite a value"),
        (b"\xff\xfe[\0", "can't decode byte 0xff"),
        (b"\0", "Invalid statement"),
    ],
)
@pytest.mark.parametrize("load", [load_graph, load_scheduler])
def test_a_file_that_is_no_toml_is_told_in_a_short_line(tmp_path, load, text, message):
    """Whatever is in it: in no time, in a line that names the file."""
    (tmp_path / "x.toml").write_bytes(text)
    with pytest.raises(UserError, match=re.escape(message)) as told:
        load(str(tmp_path / "x.toml"))
    assert str(tmp_path / "x.toml") in str(told.value)
    assert len(str(told.value)) < 400 and "\n" not in str(told.value)


@pytest.mark.parametrize("change", [lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n")])
def test_files_of_other_systems_are_read(tmp_path, change):
    """A byte order mark, and line ends with a carriage return."""
    (tmp_path / "tiny.toml").write_bytes(change(find_file("graphs", "tiny").read_bytes()))
    assert load_graph(str(tmp_path / "tiny.toml")) == load_graph("tiny")


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("tcp://10.0.0.1:8786", ""),
        ("TLS://x:1", "tls://x:1"),
        ("localhost:8786", "tcp://localhost:8786"),
        ("[::1]:8786", "tcp://[::1]:8786"),
    ],
)
def test_an_address_is_a_cluster(name, address):
    """With the defaults of cluster.toml, and what --set changes of them."""
    found = load_scheduler(name, {"ranks": 2}, may_be_cluster=True)
    assert (found.name, found.scheduler, found.settings.address, found.settings.ranks) == ("cluster", "cluster", address or name, 2)
    assert dataclasses.replace(found.settings, address="", ranks=0) == load_scheduler("cluster", may_be_cluster=True).settings


@pytest.mark.parametrize("name", ["tcp://10.0.0.1:8786", "h:1", "cluster", "cluster-ssh"])
def test_a_cluster_is_for_training_alone(name):
    """Said at once, wherever a scheduler is named."""
    for load in (load_scheduler, lambda name: named_config(name, 2), config_module.scheduler):
        with pytest.raises(
            UserError, match=f"scheduler {name}: on a cluster runs `taskgpt train` alone; choose a scheduler of this machine"
        ):
            load(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": "tcp://h"}, "address: wanted PROTOCOL://HOST:PORT, for example tcp://10.0.0.1:8786, got 'tcp://h'"),
        ({"address": "h:99999"}, "got 'h:99999'"),
        ({"address": "tcp://user@h:1"}, "got 'tcp://user@h:1'"),
        ({"address": "http://h:1"}, "address: wanted one of tcp, tls, ucx, ucxx, got http://"),
        ({"address": "h:1", "start": "local"}, 'address and start: wanted one of them, got 2; set the others to ""'),
        ({"start": "k8s"}, "start: wanted one of '', 'local', 'ssh', 'slurm', 'pbs', 'mpi', got 'k8s'"),
        ({"start": "ssh"}, 'hosts: start = "ssh" needs hosts, got none'),
        ({"start": "local", "queue": "x"}, 'queue: is for start = "slurm" or "pbs", got start = "local"; leave it out'),
        ({"start": "local", "cores": 2}, "cores: is for start ="),
        ({"tls_ca_file": "ca.pem"}, "tls_ca_file: tls_ca_file, tls_cert and tls_key go together, got tls_ca_file alone; name all three"),
        ({"generations": "0x2 17"}, "generations: wanted STEPxRANKS, for example 0x2 17x1, got '17'"),
        ({"generations": "1x2"}, "generations: the first one begins at step 0, got step 1"),
        ({"generations": "0x2 5x1 5x2"}, "generations: wanted steps that rise, got 5 after 5"),
        ({"generations": "0x0"}, "got '0x0'"),
        ({"wire": "fp16"}, "wire: wanted one of 'fp32', 'bf16', got 'fp16'"),
        ({"timeout_s": 0}, "timeout_s: wanted at least 1, got 0"),
        ({"password": "x"}, "password: unknown key"),
    ],
)
def test_a_cluster_that_cannot_be_meant_is_refused(changes, message):
    """One line, with the file, the key and what to do."""
    with pytest.raises(UserError, match=f"^cluster.toml: .*{re.escape(message)}"):
        load_scheduler("cluster", changes, may_be_cluster=True)


def test_generations_are_steps_and_ranks():
    """Of each generation its first step, and how many ranks it has."""
    assert schedule("0x2  17x1 20x2") == [(0, 2), (17, 1), (20, 2)]
    assert schedule("") == []


def test_values_are_what_toml_says_or_words():
    """A change gives one value: TOML behind it, say a second key, makes it a word, which is refused where a number is wanted."""
    words = ["tiles.rows=3", "a=1.5", "b=true", "c=static", "d='x y'", "e=", "f=x=y", "g=08:00:00"]
    assert parse_settings(words) == (
        {"tiles.rows": 3},
        {"a": 1.5, "b": True, "c": "static", "d": "x y", "e": "", "f": "x=y", "g": "08:00:00"},
    )
    graph, _ = parse_settings(["tiles.rows=3\nx=4"])
    with pytest.raises(UserError, match=r"tiles\.rows: wanted int, got '3\\nx=4'"):
        load_graph("tiny", graph)


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [("rows=128", "tiles.rows"), ("batch_size=2", "batch.batch_size"), ("worker=2", "workers"), ("chunk=2", "chunks")],
)
def test_a_graphs_key_without_its_table_is_recognized(word, suggestion):
    """A change without a dot goes to the scheduler, which knows it not; the suggestion comes from both files."""
    _, overrides = parse_settings([word])
    with pytest.raises(UserError, match=rf"loops\.toml: .*: unknown key; did you mean '{suggestion}'\?"):
        load_scheduler("loops", overrides)


def test_sequential_takes_one_worker():
    """So a sweep over schedulers may give each of them one worker; more are refused in words of their own."""
    assert load_scheduler("sequential", {"workers": 1}) == load_scheduler("sequential")
    for workers in (0, 3):
        with pytest.raises(UserError, match=f"sequential has one worker, got --workers {workers}; choose another scheduler"):
            load_scheduler("sequential", {"workers": workers})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers", 10**9, "tasks a step, wanted at most 1,000,000; choose larger tiles, a smaller model or batch"),
        ("tiles.rows", 2**31, "tiles.rows: wanted at most 2,147,483,647, got 2147483648"),
        ("batch.batch_size", 2**63, "batch.batch_size: wanted at most 2,147,483,647"),
        ("batch.batch_size", 2**31 - 1, "tasks a step"),
        ("model.vocabulary", 10**5000, "model.vocabulary: wanted at most 2,147,483,647, got a huge int"),
        ("model.channels", 2**31 - 4, "EiB of memory; choose a smaller model or batch"),
        ("model.padded_vocabulary", -1, "model.padded_vocabulary: wanted at least 0"),
        ("tiles.rows", float("nan"), "tiles.rows: wanted int, got nan"),
        ("tiles.rows", "x" * 10**6, "tiles.rows: wanted int, got 'xxx"),
        ("options.kernels", "\x1b[31m", r"options.kernels: wanted one of 'fused', 'separate', got '\x1b[31m'"),
    ],
    ids=lambda value: as_written(value)[:30],
)
def test_what_no_machine_can_run_is_refused(key, value, message):
    """Rather than recorded for hours, or overflowing; in a line of readable length."""
    with pytest.raises(UserError) as told:
        load_graph("tiny", {key: value})
    assert message in str(told.value)
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("name", [name for name in available("scheduler_configs") if not name.startswith("sequential")])
def test_no_scheduler_takes_more_workers_than_any_machine_has(name):
    """A thread for each of a thousand million would be a hang."""
    with pytest.raises(UserError, match=r"workers: wanted at most 4,096, got 1000000000"):
        load_scheduler(name, {"workers": 10**9}, may_be_cluster=True)


@pytest.mark.parametrize("name", ["tiny", "gpt2-124m", "gpt2-124m-llmc", "gpt2-124m:options.clip_norm=1"])
def test_the_number_of_tasks_is_known_before_they_are_recorded(name):
    """Nearly: what is refused is far beyond."""
    graph = training_graph(make(name))
    assert config_module._tasks(make_config(name)) == pytest.approx(len(graph.tasks), rel=0.4)


def test_every_file_that_comes_along_is_right():
    for name in available("graphs"):
        assert load_graph(name).name == name
    for name in available("scheduler_configs"):
        assert load_scheduler(name, may_be_cluster=True).name == name


def test_what_a_message_repeats_is_short_and_on_one_line():
    """However long the value is, and whatever it does to a terminal; its ends are what it is recognized by."""
    assert shorten(Path("runs/native")) == "runs/native"
    assert shorten("é" * 200) == "é" * 200
    assert shorten("a" * 5000 + "b" * 5000, most=20) == "aaaaaaa...bbbbbbbbbb"
    assert shorten("two\nlines\x1b[31m") == r"two\nlines\x1b[31m"
    assert max(len(shorten(c * n)) for c in ("\0", "\U000e0001", "a") for n in (20, 199, 200, 201, 400, 10**6)) == 200


def test_integers_have_64_bits_wherever_they_stand():
    """In lists, tuples and tables too."""

    @dataclasses.dataclass
    class Numbers:
        a: list[int] = dataclasses.field(default_factory=list)
        b: tuple[int, str] = (1, "")
        c: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    assert fill(Numbers, {"a": [2**63 - 1]}, "x: ").a == [2**63 - 1]
    for table, place in (({"a": [1, 2**63]}, "a[1]"), ({"b": [2**63, ""]}, "b[0]"), ({"c": {"d": [2**63]}}, "c.d[0]")):
        with pytest.raises(UserError, match=re.escape(f"x: {place}: wanted at most 9,223,372,036,854,775,807")):
            fill(Numbers, table, "x: ")


def test_what_cannot_be_read_leaves_nothing_open(tmp_path):
    """A folder, read again and again."""
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        with pytest.raises(UserError, match=r"Is a directory; choose a file$"):
            read_bytes(tmp_path, 100)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_long_path_is_repeated_in_short(tmp_path):
    folder = tmp_path / ("a" * 200) / ("b" * 200)
    folder.mkdir(parents=True)
    (folder / "empty").touch()
    (folder / "large").write_bytes(bytes(100_000))
    (folder / "latin").write_bytes(b"\xff")
    for name in ("none", "empty", "large", "latin", "."):
        with pytest.raises(UserError) as told:
            read_text(folder / name)
        assert len(str(told.value)) < 350
