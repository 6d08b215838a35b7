"""Pairs of programs: how they are named, what they compute, the four ways to run them, and what is told of that."""

import json
import multiprocessing
import os
import re
import shlex
import signal

import numpy as np
import pytest
from pages import PAGES, commands

import taskgpt
from taskgpt.lab.pairs import contest
from taskgpt.lab.pairs.ways import WAYS, Pair, PairFailed, Turn, cores_for_pairs
from taskgpt.lab.pairs.words import Word
from taskgpt.lab.pairs.works import Products, Stream, work_of
from taskgpt.programs.compare import main
from taskgpt.schedulers.cores import usable_cores
from taskgpt.sharing.seen import shares

needs_two_cores = pytest.mark.skipif(usable_cores() < 2, reason="nothing to share on one core")
SMALL = "cholesky:n=100,tile=32", "heat:n=70,block=32,sweeps=3", "chain:n=10,tasks=5", "stream:n=1000,piece=300", "products:n=50,tile=20"


@pytest.mark.parametrize(
    ("said", "program", "scheduler", "times"),
    [
        ("chain", "chain", "native", None),
        ("cholesky:tile=64,times=20,n=256", "cholesky:tile=64,n=256", "native", 20),
        ("tiny:times=3@loops-llmc", "tiny", "loops-llmc", 3),
        ("tiny:model.layers=1@native:policy=newest_first", "tiny:model.layers=1", "native:policy=newest_first", None),
    ],
)
def test_words_name_a_program_and_a_scheduler(said, program, scheduler, times):
    word = Word.of(said)
    assert (word.program, word.scheduler, word.times) == (program, scheduler, times)
    assert word.bytes_needed > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "chian", "chain"], "'chian' is no program and no graph; did you mean 'chain'?"),
        (["--pairs", "tiny@nativ", "chain"], "unknown scheduler 'nativ'"),
        (["--pairs", "tiny@local-cluster", "chain"], "scheduler local-cluster cannot share cores"),
        (["--pairs", "tiny@native:share=node", "chain"], "share=node: pairs share and do not share by turns"),
        (["--pairs", "chain:times=0", "chain"], "times: wanted a number from 1 to 1,000,000"),
        (["--pairs", "chain:size=4", "chain"], "size: unknown key"),
        (["--pairs", "products:n=60000", "chain"], "GiB"),
        (["--pairs", "chain", "chain", "--rounds", "0"], "--rounds: wanted at least 1"),
        (["--pairs", "chain", "chain", "--seconds", "long"], "--seconds long: wanted a time"),
        (["--pairs", "chain", "chain", "--weights", "3"], "--weights 3: wanted two numbers"),
        (["--pairs", "chain", "chain", "--tiles", "rows=64"], "--tiles: not with --pairs"),
        (["--weights", "3:1"], "--weights: only with --pairs"),
    ],
)
def test_mistakes_are_named(words, message, tmp_path, capsys):
    """In one line, before anything is measured."""
    assert main([*words, "--output", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_words_of_the_documentation_are_right():
    """Its commands run in no other test."""
    found = [shlex.split(command) for page in PAGES for command in commands(page) if "--pairs" in command]
    assert found
    for words in found:
        for at in (number for number, word in enumerate(words) if word == "--pairs"):
            assert all(map(Word.of, words[at + 1 : at + 3]))


@pytest.mark.parametrize("said", SMALL, ids=lambda said: said.partition(":")[0])
def test_a_program_has_the_same_result_whenever_it_begins(said, each):
    """Under every scheduler, whatever ran before; that of cholesky, heat and products however often it runs."""
    work = Word.of(said).work()
    hashes = []
    for times in (1, 1, 3):
        work.begin()
        for _ in each.run_each([*work.graphs] * times):
            pass
        hashes.append(work.sha256())
    assert hashes[0] == hashes[1] == FIRST_HASHES.setdefault(said, hashes[0])
    assert hashes[1] == hashes[2] or said.startswith(("chain", "stream"))


FIRST_HASHES: dict[str, str] = {}  # of whatever scheduler comes first


def test_training_begins_with_fresh_parameters():
    """And moments: the same step twice is not two steps."""
    work = Word.of("tiny:model.layers=1").work()
    with taskgpt.scheduler("sequential") as scheduler:
        hashes = []
        for begins in (True, True, False):
            if begins:
                work.begin()
            scheduler.run(work.graphs[0])
            hashes.append(work.sha256())
    assert hashes[0] == hashes[1] != hashes[2]


def test_products_are_numpys_and_streams_stay():
    """So that a program can run for as long as one likes: no number of STREAM grows."""
    draw = np.random.default_rng(0)
    wanted = {Products(50, 20): draw.random((50, 50)) @ draw.random((50, 50)), Stream(1000, 300): np.linspace(1, 2, 1000)}
    with taskgpt.scheduler("sequential") as scheduler:
        for program, result in wanted.items():
            work = work_of(program)
            work.begin()
            for _ in range(200):
                scheduler.run(work.graphs[0])
            np.testing.assert_allclose(work.results[0].array, result, rtol=1e-12)


# Turns ----------------------------------------------------------------------------------------------------------------------------------


@needs_two_cores
def test_a_pair_has_the_same_bits_in_every_way():
    """Two processes: prepared once, calibrated, run in all ways, then for a while in a share. One that dies is named; nothing is left."""
    words = [Word.of("chain:tasks=3,n=10,sweeps=1"), Word.of("products:n=50,tile=20,times=2@loops")]
    with Pair(words, cores_for_pairs()[:2]) as pair:
        assert pair.is_exact
        times = pair.calibrate(0.001)
        assert times[0] >= 1 and times[1] == 2
        turns = [pair.turn(way, times) for way in WAYS]
        core_s = pair.core_seconds((3, 1), 0.05)
        os.kill(pair._partners[1].pid, signal.SIGKILL)
        with pytest.raises(PairFailed, match=r"products.*@loops: its process died of SIGKILL"):
            pair.turn("shared", times)
    assert [turn.way for turn in turns] == list(WAYS)
    assert {tuple(turn.sha256) for turn in turns} == {tuple(turns[0].sha256)}
    assert turns[0].makespan_s == sum(turns[0].ends_s)
    assert all(turn.makespan_s == max(turn.ends_s) > 0 for turn in turns[1:])
    assert [turn.core_s is None for turn in turns] == [True, True, True, False]
    assert min(core_s) > 0
    assert not [each for each in shares() if each["share"].startswith("pairs-")]
    assert not multiprocessing.active_children()


# Told -----------------------------------------------------------------------------------------------------------------------------------

SECONDS = {"exclusive": 4.0, "oversubscribed": 3.0, "split": 2.5, "shared": 2.0}


class Told(Pair):
    """A pair that takes what SECONDS says, without processes. `wrong`: in which way a program computes something else; `fails`: there."""

    wrong = fails = ""

    def __enter__(self):
        self.is_exact = True
        return self

    def __exit__(self, *exception):
        pass

    def calibrate(self, seconds):
        return [7, 1]

    def turn(self, way, times):
        if way == self.fails:
            raise PairFailed("chain: its process died of SIGKILL")
        ends_s, hashes = [SECONDS[way], 1.0], ["1" * 64, ("3" if way == self.wrong else "2") * 64]
        return Turn(way, SECONDS[way], ends_s, hashes, *([[2.0, 1.0], [30, 10]] if way == "shared" else []))

    def core_seconds(self, weights, seconds):
        return [2.8, 1.0]


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(contest, "Pair", Told)
    monkeypatch.setattr(contest, "cores_for_pairs", lambda: [0, 1])
    return monkeypatch


def test_a_comparison_is_told(told, tmp_path, capsys):
    """In tables, as JSON and as a page; measured once and no second time into the same folder."""
    argv = ["--pairs", "chain", "heat:n=70", "--rounds", "6", "--output", str(tmp_path)]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "bits       the same in every way" in said
    assert re.search(r"chain \+ +7, 1 +split +0.800 +0.800 +0.800 +0.800-0.800 +20 +yes", said)
    found = json.loads((tmp_path / "pairs.json").read_text())
    assert [row["median_s"] for row in found["makespans"]] == list(SECONDS.values())
    assert [row["x_shared"] for row in found["makespans"]] == [2 / 4, 2 / 3, 2 / 2.5, 1]
    (pair,) = found["pairs"]
    assert (pair["best"], pair["ratio"], pair["interval"], pair["same_bits"]) == ("split", 0.8, [0.8, 0.8], "yes")
    (turns,) = found["turns"]
    assert turns["times"] == [7, 1] and len(turns["turns"]) == 24
    assert found["settings"]["pairs"] == [["chain", "heat:n=70"]] and "graphs" not in found["settings"]
    page = (tmp_path / "pairs.html").read_text()
    assert page.endswith("</html>\n") and page.count("<svg") == 1 and "DIFFERENT" not in page
    assert main(argv) == 2
    assert "holds pairs that were measured; choose another folder" in capsys.readouterr().err


def test_few_rounds_tell_no_interval(told, tmp_path):
    """And each round begins with the next way."""
    assert main(["--pairs", "chain", "heat:n=70", "--rounds", "2", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "pairs.json").read_text())
    assert found["pairs"][0]["interval"] is None
    assert [turn["way"] for turn in found["turns"][0]["turns"]] == [*WAYS, *WAYS[1:], WAYS[0]]


def test_different_bits_are_an_error(told, tmp_path, capsys):
    """Named, with the ways that computed them."""
    told.setattr(Told, "wrong", "split")
    assert main(["--pairs", "chain", "heat:n=70", "--rounds", "1", "--output", str(tmp_path)]) == 1
    line = "DIFFERENT BITS of heat:n=70: 22222222 exclusive, oversubscribed, shared; 33333333 split"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "pairs.html").read_text()


def test_a_pair_that_fails_does_not_take_the_others_along(told, tmp_path, capsys):
    """What it measured before is told."""
    told.setattr(Told, "fails", "shared")
    assert main(["--pairs", "chain", "heat:n=70", "--rounds", "1", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "failed     chain + heat:n=70: chain: its process died of SIGKILL" in said.err
    assert "bits       nothing was measured" in said.out
    assert json.loads((tmp_path / "pairs.json").read_text())["turns"][0]["failed"]


def test_weights_are_told(told, tmp_path, capsys):
    """The ratio of the time of cores, and how far it is off."""
    argv = ["--pairs", "products", "products", "--weights", "3:1", "--rounds", "2", "--output", str(tmp_path)]
    assert main(argv) == 0
    assert re.search(r"3:1 +2.80 +1.00 +2.800 +2.800 +2.800 +3.000 +-6.7%", capsys.readouterr().out)
    (row,) = json.loads((tmp_path / "pairs.json").read_text())["fairness"]
    assert row["core_s"] == [[2.8, 1.0]] * 2


def test_ctrl_c_leaves_whole_rounds(told, tmp_path, capsys):
    """The round that was cut short is not told."""
    turn = Told.turn
    left = iter(range(6))

    def interrupted(self, way, times):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return turn(self, way, times)

    told.setattr(Told, "turn", interrupted)
    assert main(["--pairs", "chain", "heat:n=70", "--output", str(tmp_path)]) == 130
    assert "holds the rounds that were whole" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "pairs.json").read_text())["turns"][0]["turns"]) == 4
