"""Tuning: which tilings are tried, how races are decided, that the end is never worse than the beginning, and what is left behind."""

import argparse
import itertools
import json
import re
import tomllib
from pathlib import Path

import platformdirs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgpt.config import available, load_graph, load_scheduler
from taskgpt.errors import UserError
from taskgpt.gpt2.shape import Batch, Model, Tiles
from taskgpt.lab.contests.cells import Cell
from taskgpt.lab.contests.turns import CellFailed
from taskgpt.lab.named import make_config
from taskgpt.lab.report import Report
from taskgpt.lab.tuning import tuned
from taskgpt.lab.tuning.races import FASTER, MARGIN, SLOWER, Search, Track, final_verdict, verdict
from taskgpt.lab.tuning.tilings import KEYS, Forecast, Space
from taskgpt.products import BLAS, OWN_FP32
from taskgpt.products.instruction_sets import AVX512
from taskgpt.programs import tune as program
from taskgpt.programs.tune import main as tune
from taskgpt.train import main as train

UNSEEN = "gpt2-124m:batch.batch_size=2,batch.seq_len=96,model.layers=6,model.heads=6,model.channels=384"
GRAPHS = Path(__file__).parent.parent / "graphs"
START = Cell("gpt2-124m", (), "native", (), 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    return tmp_path / "cache" / "tiles"


# Which tilings are tried ----------------------------------------------------------------------------------------------------------------


@st.composite
def spaces(draw) -> Space:
    heads = draw(st.integers(1, 16))
    model = Model(2, heads, heads * draw(st.sampled_from([16, 64, 80])), draw(st.integers(1, 60000)), 1024)
    sizes = [draw(st.integers(1, 3000)) for _ in KEYS]
    batch = Batch(draw(st.integers(1, 8)), draw(st.integers(1, 1024)))
    return Space(model, batch, Tiles(*sizes), draw(st.integers(1, 128)), 2.0 ** draw(st.integers(16, 24)), 2.0 ** draw(st.integers(18, 28)))


@given(spaces())
@settings(max_examples=100, deadline=None)
def test_a_ladder_cuts_and_has_the_shipped_size(space):
    """Sizes ascend, all but the last cut what they are for, and no two leave it whole; heads divide, or are as shipped."""
    R, C, Vp = space.batch.rows, space.model.channels, space.model.padded_vocabulary
    extents = {"rows": R, "columns": 4 * C, "vocabulary": Vp, "pointwise_rows": R}
    for key, sizes in space.ladders().items():
        shipped = getattr(space.shipped, key)
        assert shipped in sizes
        assert sizes == sorted(set(sizes))
        if key in extents:
            assert all(size < extents[key] for size in sizes[:-1])
            assert sizes[-1] >= extents[key]
        else:
            assert all(space.model.heads % size == 0 for size in sizes if size != shipped)


def test_sizes_are_multiples_of_what_products_compute_at_a_time(monkeypatch):
    """Of our own: rows of whole register tiles, columns of whole vectors, from three of them on. Of BLAS: multiples of 16."""
    monkeypatch.setattr("taskgpt.products.ways.of_this_machine", lambda: AVX512)
    config = make_config("gpt2-124m:batch.seq_len=72")
    own, blas = Space.here(config, 2), Space.here(make_config("gpt2-124m:options.products=blas,batch.seq_len=72"), 2)
    assert (own.way, blas.way) == (OWN_FP32, BLAS)
    assert own.ladders()["rows"] == [40, 48, 72, 96, 144, 256, 288]
    assert blas.ladders()["rows"] == [32, 48, 80, 96, 144, 256, 288]
    assert own.ladders()["columns"] == [48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 3072]
    assert blas.ladders()["columns"] == own.ladders()["columns"][1:]


@given(spaces())
@settings(max_examples=50, deadline=None)
def test_neighbours_are_one_rung_away_and_lines_one_key(space):
    """In one key; and back again, where the way back makes sense."""
    ladders = space.ladders()
    for other in space.neighbours(space.shipped):
        [key] = [key for key in KEYS if getattr(other, key) != getattr(space.shipped, key)]
        assert abs(ladders[key].index(getattr(other, key)) - ladders[key].index(getattr(space.shipped, key))) == 1
        assert other in space.along(space.shipped, key)
        assert not space.makes_sense(space.shipped) or space.shipped in space.neighbours(other)


@pytest.mark.parametrize("workers", [1, 2, 16, 112])
def test_what_makes_sense_gives_every_worker_a_task_and_fits_into_its_cache(workers):
    """By hand, for GPT-2 124M with 256 rows: 3072 outputs of the widest layer; the operands of a product in 2 MiB."""
    config = load_graph("gpt2-124m")
    space = Space(config.model, config.batch, config.tiles, workers, l2_bytes=1 << 20, l3_bytes=2 << 20)
    tilings = [Tiles(rows, columns, 64, 4, 256) for rows, columns in itertools.product(*map(space.ladders().get, ("rows", "columns")))]
    sensible = [tiles for tiles in tilings if space.makes_sense(tiles)]
    assert sensible
    for tiles in sensible:
        assert -(-256 // tiles.rows) * -(-3072 // tiles.columns) >= workers
        assert 4 * (tiles.rows * 768 + tiles.columns * 768 + tiles.rows * tiles.columns) <= 2 << 20
    assert not space.makes_sense(Tiles(256, 768, 64, 4, 256))


def test_small_tiles_are_for_many_workers():
    """What fits into a quarter of L2 is cut further only where workers would have nothing to do."""
    config = load_graph("gpt2-124m")
    few, many = (Space(config.model, config.batch, config.tiles, workers, l2_bytes=1 << 21) for workers in (2, 64))
    small = Tiles(32, 64, 64, 4, 1024)
    assert many.makes_sense(small)
    assert not few.makes_sense(small)


def test_every_shipped_tiling_makes_sense_on_two_workers():
    """The rules do not rule out what was found by hand."""
    for name in available("graphs"):
        config = load_graph(name)
        if config.options.kernels == "fused":
            assert Space(config.model, config.batch, config.tiles, 2).makes_sense(config.tiles), name


def test_a_forecast_needs_no_run_of_what_it_is_for():
    """A time for every tiling whose kernels the shipped one has; the same when asked again."""
    forecast = Forecast("tiny:model.layers=1,tiles.vocabulary=384")
    start = Cell("tiny:model.layers=1,tiles.vocabulary=384", (), "native", (), 1)
    finer = Cell(start.graph, (("rows", "32"),), "native", (("policy", "newest_first"),), 1)
    assert forecast(finer) > 0
    assert forecast(finer) == forecast(finer) != forecast(start)
    assert forecast(Cell(start.graph, (("vocabulary", "128"),), "native", (), 1)) is None  # adds to a sum, with a kernel of its own


# How races are decided ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([], None),
        ([1.2], SLOWER),
        ([1.05], None),
        ([1.05, 1.001], SLOWER),
        ([0.5, 0.5], None),
        ([0.86, 1.69], SLOWER),
        ([0.98, 0.97, 0.98], FASTER),
        ([0.995, 0.994, 0.993, 0.992], None),
        ([0.9, 0.98, 1.1, 1.2], None),
        ([1.2, 0.9, 0.9, 0.9, 0.9], FASTER),
    ],
)
def test_a_verdict(ratios, expected):
    """Slower: in all of two rounds, or by far in the middle. Faster: by more than the margin, in three rounds of four."""
    assert verdict(ratios) == expected


def test_the_last_race_is_judged_by_all_rounds():
    """One round of ten may go the other way, not two; nor may the gain be below the margin, or the rounds fewer than six."""
    assert final_verdict([0.97] * 9 + [1.5]) == FASTER
    assert final_verdict([0.97] * 8 + [1.01] * 2) is None
    assert final_verdict([0.995] * 10) is None
    assert final_verdict([0.5] * 6) == FASTER
    assert final_verdict([0.5] * 5) is None
    assert final_verdict([0.9, 0.9]) is None


class Bench:
    """A bench with a clock of its own: a turn takes so many seconds, and gives what `ms_of` says of a cell."""

    def __init__(self, ms_of, turn_s: float = 1.0):
        self.now, self.ms_of, self.turn_s, self.asked = 100.0, ms_of, turn_s, []

    def timed(self, cell: Cell, steps: int) -> float:
        self.now += self.turn_s
        self.asked.append(cell)
        return self.ms_of(cell)

    def find(self, forecast, budget_s: float, monkeypatch):
        monkeypatch.setattr(program, "Forecast", lambda word: forecast)
        track = Track(self.timed, lambda: self.now)
        space = Space.here(make_config("gpt2-124m"), 2)
        return program.find(START, space, self.now, budget_s, track, lambda line: None)


def size(cell: Cell, key: str) -> int:
    return int(dict(cell.tiles).get(key, getattr(load_graph("gpt2-124m").tiles, key)))


def bowl(cell: Cell) -> float:
    """Fastest at rows 128, columns 512, with longest_path_first."""
    policy = 0 if dict(cell.settings).get("policy") == "longest_path_first" else 30
    return 500 + abs(size(cell, "rows") - 128) + abs(size(cell, "columns") - 512) + policy


@pytest.mark.parametrize("forecast", [bowl, lambda cell: None, lambda cell: 1e6 / bowl(cell)], ids=["right", "none", "wrong"])
def test_the_search_finds_the_best(forecast, monkeypatch):
    """With forecasts that are right, that are not there, and that are the wrong way round: races decide."""
    search, final = Bench(bowl).find(forecast, 100_000, monkeypatch)
    assert (size(search.champion, "rows"), size(search.champion, "columns")) == (128, 512)
    assert dict(search.champion.settings) == {"policy": "longest_path_first"}
    assert final.outcome == FASTER
    assert len(final.ms) == 10
    rows = search.rows()
    assert rows[-1]["against"] == "shipped"
    assert all(rows[int(row["against"]) - 1]["outcome"] == FASTER for row in rows if row["against"] != "shipped")


def test_what_is_as_fast_stays_as_it_was_shipped(monkeypatch):
    """A gain below the margin is none; without a winner there is no last race."""
    search, final = Bench(lambda cell: 500 if cell == START else 500 * (1 - 0.9 * MARGIN)).find(bowl, 100_000, monkeypatch)
    assert search.champion == START
    assert final is None
    assert "none" in program.gain_of(final)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_the_end_is_not_worse_than_the_beginning_and_the_budget_holds(data):
    """Whatever the noise: the winner won the last race by more than the margin, or is what was shipped; within a turn of the budget."""
    noise = data.draw(st.randoms(use_true_random=False))
    budget_s, turn_s = data.draw(st.floats(5, 1000)), data.draw(st.floats(0.01, 30))
    bench = Bench(lambda cell: bowl(cell) * noise.uniform(0.7, 1.4), turn_s)
    with pytest.MonkeyPatch.context() as patch:
        search, final = bench.find(bowl, budget_s, patch)
    if search.champion != START:
        assert final.challenger == search.champion
        assert final_verdict(final.ratios) == FASTER
        assert max(sorted(final.ratios)[:-1], default=2) < 1
    assert bench.now - 100 <= max(budget_s, 2 * turn_s) + turn_s
    assert all(len(race.ms) == len(race.champion_ms) for race in search.races)


def test_a_winner_that_does_not_win_again_is_dropped(monkeypatch):
    """Each was fast for the three rounds in which it became champion, and never again."""
    bench = Bench(lambda cell: 300 if cell != START and bench.asked.count(cell) <= 3 else 500)
    search, final = bench.find(bowl, 300, monkeypatch)
    assert final.challenger != START
    assert final.outcome != FASTER
    assert search.champion == START
    assert "kept" in program.gain_of(final)


@pytest.mark.parametrize(("budget_s", "missing"), [(2, "nothing was raced"), (40, r"had \d of the 6 rounds at least that tell")])
def test_what_there_was_no_time_for_is_not_known(budget_s, missing, monkeypatch):
    """Without a race, or with a winner that had fewer than six rounds against what is shipped: the start stays, and it is said."""
    search, final = Bench(bowl, 2.0).find(bowl, budget_s, monkeypatch)
    assert search.champion == START
    assert re.search(missing, program.not_decided(search, final))
    assert not program.not_decided(*Bench(bowl).find(bowl, 100_000, monkeypatch))


def test_a_search_without_races_leaves_nothing(tmp_path, capsys, monkeypatch, cache):
    """Exit code 1, the reason, no file and no memory; not `nothing tried was faster`."""
    monkeypatch.setattr(program, "find", lambda start, *_: (Search(start, None, None, None), None))
    assert tune(["--graph", "tiny", "--workers", "1", "--output", str(tmp_path / "out"), "--json", str(tmp_path / "t.json")]) == 1
    shown = capsys.readouterr().out
    assert "not known yet: nothing was raced; nothing is written or remembered, give more --budget" in shown
    assert "nothing tried was faster" not in shown
    assert not any((tmp_path / "out").iterdir())
    assert not cache.exists() or not any(cache.iterdir())
    assert json.loads((tmp_path / "t.json").read_text())["tried"] == []


def test_a_cell_that_fails_is_skipped_with_its_reason(monkeypatch):
    """The others go on; if what is shipped fails there is nothing to compare with."""

    def fails(cell):
        if size(cell, "rows") == 128:
            raise CellFailed("no room")
        return bowl(cell)

    search, _ = Bench(fails).find(bowl, 100_000, monkeypatch)
    skipped = [race for race in search.races if race.outcome == "skipped: no room"]
    assert skipped
    assert size(search.champion, "rows") != 128
    assert skipped[0].row(None)["ratio"] is None

    def nothing(cell):
        raise CellFailed("no room")

    with pytest.raises(UserError, match="gpt2-124m native, 2 workers: no room"):
        Bench(nothing).find(bowl, 100, monkeypatch)


def test_the_same_measurements_give_the_same_search(monkeypatch):
    """Turn for turn."""
    first, second = (Bench(bowl) for _ in range(2))
    for bench in (first, second):
        bench.find(bowl, 500, monkeypatch)
    assert first.asked == second.asked


def test_settings_are_changed_one_at_a_time_and_back():
    """Each as what it changes of native.toml."""
    others = program.other_settings(START)
    assert len(others) == 5
    assert all(len(other.settings) == 1 for other in others)
    assert START in program.other_settings(others[0])


# What is left behind --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", available("graphs"))
def test_a_graph_file_keeps_its_comments(name, tmp_path):
    """Other values in the same columns, and another first line; what is not changed stays letter for letter."""
    changes = {"model.layers": 7, "model.heads": 1, "tiles.rows": 12345, "model.padded_vocabulary": 60032, "options.commutative": True}
    text = tuned.graph_text(name, changes, "# Tuned.")
    (tmp_path / "x.toml").write_text(text)
    found, shipped = load_graph(str(tmp_path / "x.toml")), load_graph(name, changes)
    assert vars(found) | {"name": name} == vars(shipped)
    old = (GRAPHS / f"{name}.toml").read_text().splitlines()
    new = [line for line in text.splitlines() if not line.startswith("padded_vocabulary")]
    assert new[0] == "# Tuned."
    changed = [(a, b) for a, b in zip(old[1:], new[1:], strict=True) if a != b]
    assert len(changed) == 4
    for a, b in changed:
        assert b.partition(" ")[0] in {key.partition(".")[2] for key in changes}
        assert a.partition("#")[2] == b.partition("#")[2]
        assert a.find("#") == b.find("#")


@pytest.mark.parametrize("text", ["tiles = {rows = 3, columns = 3}", "tiles.rows = 3", '[tiles]\n"rows" = 3'])
def test_a_graph_file_in_another_layout_is_refused(text, tmp_path):
    """Rather than written wrongly."""
    rest = (GRAPHS / "tiny.toml").read_text()
    sizes = "columns = 64\npointwise_rows = 64\nheads = 2\nvocabulary = 128\n"
    kept = rest[: rest.index("[tiles]")] + rest[rest.index("[options]") :]
    if text.startswith("[tiles]"):
        kept += f"\n{text}\n{sizes}"
    else:
        kept = text.replace("columns = 3", sizes.strip().replace("\n", ", ")) + "\n" + kept
        kept = kept.replace("tiles.rows = 3\n", "".join(f"tiles.{line}\n" for line in ["rows = 3", *sizes.split("\n")[:-1]]))
    (tmp_path / "x.toml").write_text(kept)
    load_graph(str(tmp_path / "x.toml"))
    with pytest.raises(UserError, match=r"x\.toml: cannot put other values into this text"):
        tuned.graph_text(str(tmp_path / "x.toml"), {"tiles.rows": 64}, "#")


def test_a_scheduler_file_says_what_it_changes(tmp_path):
    """And loads."""
    text = tuned.scheduler_text((("policy", "newest_first"), ("work_stealing", "true")), 2, "# Tuned.")
    assert tomllib.loads(text) == {"scheduler": "native", "workers": 2, "policy": "newest_first", "work_stealing": True}
    (tmp_path / "native-tuned.toml").write_text(text)
    found = load_scheduler(str(tmp_path / "native-tuned.toml"))
    assert (found.scheduler, found.settings.policy, found.settings.workers) == ("native", "newest_first", 2)


def test_tiles_are_remembered_for_machine_shape_and_workers(monkeypatch, cache):
    """Another model, batch, option, number of workers or machine has its own; another name or tiling of the file has not."""
    config = make_config(UNSEEN)
    tiles = Tiles(96, 192, 32, 3, 1024)
    assert tuned.remember(config, 2, tiles, {}, "today").parent == cache
    assert tuned.remembered(config, 2, "") == tiles
    assert tuned.remembered(make_config(UNSEEN + ",tiles.rows=64"), 2, "") == tiles
    for other in ("batch.seq_len=64", "model.layers=7", "options.update=separate", "tiles.logits_rows=64"):
        with pytest.raises(UserError, match="run: taskgpt tune"):
            tuned.remembered(make_config(f"{UNSEEN},{other}"), 2, "taskgpt tune")
    with pytest.raises(UserError, match="was not tuned on this machine for 1 worker; run: taskgpt tune"):
        tuned.remembered(config, 1, "taskgpt tune")
    about = tuned.machine.describe()
    monkeypatch.setattr(tuned.machine, "describe", lambda: about | {"processor": "another"})
    with pytest.raises(UserError, match="was not tuned"):
        tuned.remembered(config, 2, "")


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"key": 1}', "\x00", '{"a":' * 9999, "rows", "more"])
def test_a_damaged_memory_is_told_apart(damage):
    """With the file, and what to run; whatever stands in it."""
    config = load_graph("tiny")
    path = tuned.remember(config, 2, config.tiles, {}, "today")
    saved = json.loads(path.read_text())
    if damage == "rows":
        saved["tiles"]["rows"] = 0
    elif damage == "more":
        saved["tiles"]["depth"] = 1
    path.write_text(json.dumps(saved) if damage in ("rows", "more") else damage)
    with pytest.raises(UserError, match=r"what was remembered is damaged: .*\.json: .*; delete it and run: taskgpt tune"):
        tuned.remembered(config, 2, "taskgpt tune")


def test_the_command_to_run_names_the_shape():
    """And its own graph, read from there, is the one that was asked for."""
    config = make_config(UNSEEN)
    command = tuned.tune_command("gpt2-124m", config, None)
    assert command.startswith("taskgpt tune --graph gpt2-124m:model.layers=6,")
    assert make_config(command.split()[-1]) == config
    assert tuned.tune_command("tiny", load_graph("tiny"), 1) == "taskgpt tune --graph tiny --workers 1"


# The program ----------------------------------------------------------------------------------------------------------------------------


def test_the_program_from_tuning_to_training(tmp_path, capsys, monkeypatch):
    """Files that train takes, a table and JSON; then `--tiles auto` takes the same tiles, and says what to run for another shape."""
    monkeypatch.setattr(program, "KEYS", ("rows", "heads"))  # of what there is to change a little: each takes three rounds and more
    monkeypatch.setattr(program, "SETTINGS", {"immediate_successor": ("true", "false")})
    out, text = tmp_path / "tuned", tmp_path / "text.txt"
    text.write_text("To be or not to be, that is the question. " * 100)
    argv = ["--graph", "tiny:model.layers=1", "--workers", "1", "--output", str(out), "--json", str(tmp_path / "t.json")]
    for budget in ("60s", "240s"):  # on a slow or busy machine seconds decide nothing, which is code 1
        code, shown = tune([*argv, "--budget", budget]), capsys.readouterr().out
        if code != 1:
            break
    assert code == 0
    assert all(f"\n{word}" in f"\n{shown}" for word in ("processor", "shipped", "tiles", "native", "gain", "wrote", "remembered"))
    assert sorted(path.name for path in out.iterdir()) == ["native-tuned.toml", "tiny-tuned.toml"]
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["forecasts"][0]["cell"] == "as shipped"
    assert all(len(row["ms"]) == row["rounds"] for row in record["tried"])
    first = (out / "tiny-tuned.toml").read_text().splitlines()[0]
    assert "Tuned 20" in first
    assert " with 1 worker: " in first
    steps = ["--data", str(text), "--steps", "1", "--val-every", "0", "--sample-every", "0"]
    assert train(["--graph", str(out / "tiny-tuned.toml"), "--scheduler", str(out / "native-tuned.toml"), *steps]) == 0
    from_files = capsys.readouterr().out
    auto = ["--graph", "tiny", "--set", "model.layers=1", "--workers", "1", "--tiles", "auto", *steps]
    assert train(auto) == 0
    remembered = capsys.readouterr().out

    def line(text: str, key: str) -> str:
        return next(line for line in text.splitlines() if line.startswith(key))

    assert line(remembered, "tiles") == line(from_files, "tiles") == line("\n".join(reversed(shown.splitlines())), "tiles")
    assert line(remembered, "parameters sha256") == line(from_files, "parameters sha256")
    assert train([*auto, "--set", "tiles.heads=4"]) == 0
    assert "heads 4," in line(capsys.readouterr().out, "tiles")
    assert train([*auto, "--batch-size", "2"]) == 2
    expected = "run: taskgpt tune --graph tiny:model.layers=1,batch.batch_size=2 --workers 1"
    assert capsys.readouterr().err.strip().endswith(expected)


@pytest.mark.parametrize("trouble", ["no_home", "file_in_place_of_the_cache"])
def test_files_are_left_where_the_cache_cannot_be_written(tmp_path, capsys, monkeypatch, trouble):
    """What minutes of tuning found is in the files, a line says why `--tiles auto` will not find it, and that is told, too."""
    if trouble == "no_home":
        monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: "~/.cache/taskgpt")  # as platformdirs had it before 4.14
        reason = "no cache folder: HOME is not set"
    else:
        (tmp_path / "cache").write_text("")
        reason = "cannot write: Not a directory"
    flags = argparse.Namespace(graph="tiny", output=str(tmp_path), workers=1, argv=[], json=None, wide=False)
    program.leave(flags, load_graph("tiny"), Cell("tiny", (), "native", (), 1), "none", Report(flags))
    assert {"tiny-tuned.toml", "native-tuned.toml"} <= {path.name for path in tmp_path.iterdir()}
    shown = capsys.readouterr().out
    assert re.search(f"^remembered nothing, so --tiles auto will not find it: .*{reason}", shown, re.M)
    assert train(["--graph", "tiny", "--workers", "1", "--tiles", "auto"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(tmp_path, capsys, monkeypatch):
    """In the middle of the search: exit code 130, one line, no file."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "find", interrupted)
    assert tune(["--graph", "tiny", "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "taskgpt tune: interrupted; nothing was written\n"
    assert not any((tmp_path / "out").iterdir())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers 0: wanted a number from 1 to 4,096"),
        (["--workers", "4000"], "--workers 4000: this machine has"),
        (["--graph", "gpt2-124"], "did you mean 'gpt2-124m'?"),
        (["--graph", "tiny:tile.rows=3"], "unknown key 'tile.rows'"),
        (["--graph", "tiny:policy=oldest_first"], "no key of a graph file"),
        (["--budget", "soon"], "--budget soon: wanted a time"),
        (["--budget", "0"], "--budget 0: wanted a time"),
        (["--output", str(Path(__file__) / "out")], "cannot write"),
    ],
)
def test_a_mistake_is_answered_in_one_line(flags, message, capsys):
    """Exit code 2, before anything is measured."""
    assert tune(["--graph", "tiny", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
