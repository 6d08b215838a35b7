"""Same bits: one graph gives one parameters hash under every scheduler, number of workers, policy and coarsening."""

import json

import pytest

from taskgpt.products.instruction_sets import of_this_machine
from taskgpt.schedulers.native.policies import POLICIES
from taskgpt.train import main

CASES = [
    ("sequential", None, ()),
    *[("native", n, ()) for n in (1, 2, 3, 4)],
    *[("native", 1 + n, (f"policy={policy}", f"work_stealing={str(n % 2 == 0).lower()}")) for n, policy in enumerate(POLICIES)],
    ("native", 3, ("immediate_successor=false", "idle=idle")),
    *[("loops", n, ()) for n in (1, 2, 3)],
    ("loops-dynamic", 3, ()),
    ("loops-llmc", 2, ()),
    *[("threads", n, ()) for n in (1, 2, 3)],
    ("threads", 2, ("coarsen=0",)),
    ("threads", 3, ("coarsen=7",)),
    *[("local-cluster", n, ("coarsen=20",)) for n in (1, 3)],
    ("local-cluster", 2, ("coarsen=0",)),
    *[("local-cluster-processes", n, ("coarsen=20",)) for n in (1, 3)],
    ("local-cluster-processes", 2, ("coarsen=0",)),
    *[(scheduler, n, ("options.kernels=separate", "options.update=separate")) for scheduler, n in (("sequential", 1), ("loops-llmc", 2))],
    ("threads", 2, ("options.kernels=separate", "coarsen=0")),
    ("loops", 2, ("options.update=separate",)),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n".join(f"A line of text, number {n}, and then some." for n in range(400)))
    return path


def train(text, tmp_path, scheduler="sequential", workers=None, settings=(), flags=()) -> tuple[str, list[float]]:
    """Train tiny for 6 steps; return the parameters hash, the losses and the norms."""
    log = tmp_path / "log.jsonl"
    words = [
        "--graph",
        "tiny",
        "--data",
        str(text),
        "--steps",
        "6",
        "--val-every",
        "3",
        "--sample-every",
        "0",
        "--lr",
        "1e-3",
        "--log",
        str(log),
    ]
    words += ["--scheduler", scheduler, *(["--workers", str(workers)] if workers else [])]
    for setting in settings:
        words += ["--set", setting]
    assert main([*words, *flags]) == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [r[key] for r in records for key in ("train_loss", "norm", "val_loss") if key in r]
    return records[-1]["summary"]["parameters_sha256"], losses


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory):
    return train(text, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize(("scheduler", "workers", "settings"), CASES)
def test_the_scheduler_changes_no_bit(scheduler, workers, settings, text, tmp_path, reference):
    """Parameters hash, losses and norms equal those of program order; nor do options.kernels and options.update change any."""
    assert train(text, tmp_path, scheduler, workers, settings) == reference


EVERYTHING = [f"{key}={value}" for key, value in (("batch.accumulate", 3), ("options.clip_norm", 0.5), ("options.skip_norm_z", 4))]
SEVERAL = [("native", 2), ("native-longest-path", 3), ("loops", 2), ("loops-llmc", 2), ("threads", 3), ("local-cluster-processes", 2)]


@pytest.fixture(scope="module")
def with_everything(text, tmp_path_factory):
    return train(text, tmp_path_factory.mktemp("everything"), settings=EVERYTHING)


@pytest.mark.parametrize(("scheduler", "workers"), SEVERAL)
def test_nor_with_micro_batches_clipping_and_guard(scheduler, workers, text, tmp_path, with_everything, reference):
    """Parameters hash, losses and norms are those of program order, and others than without."""
    assert train(text, tmp_path, scheduler, workers, EVERYTHING) == with_everything
    assert with_everything[0] != reference[0]


def test_a_second_run_gives_the_same_bits(text, tmp_path, reference):
    """Nothing depends on the time, the process or the memory's address."""
    assert train(text, tmp_path) == reference


def test_check_changes_no_bit_and_finds_nothing(text, tmp_path, reference):
    """The declarations of all GPT-2 kernels are true: --check passes, with the same numbers."""
    assert train(text, tmp_path, "threads", 2, flags=["--check"]) == reference


@pytest.fixture(scope="module", params=["blas", "bf16"])
def another_way(request, text, tmp_path_factory):
    """Return (settings, what program order gives) of the ways to multiply that are not the default."""
    settings = ["options.products=blas"] if request.param == "blas" else ["options.precision=bf16"]
    return settings, train(text, tmp_path_factory.mktemp("way"), settings=settings)


@pytest.mark.parametrize(("scheduler", "workers"), [("native", 3), ("loops-llmc", 2), ("threads", 3), ("local-cluster-processes", 1)])
def test_nor_with_other_products(scheduler, workers, text, tmp_path, another_way, reference):
    """Each way to multiply has bits of its own, the same under every scheduler, and numbers near the others'."""
    settings, wanted = another_way
    assert train(text, tmp_path, scheduler, workers, settings) == wanted
    assert wanted[0] != reference[0]
    assert wanted[1] == pytest.approx(reference[1], abs=2e-2)


TILES = [
    ["tiles.rows=32", "tiles.vocabulary=64", "tiles.columns=48"],
    ["tiles.rows=19", "tiles.columns=33", "tiles.pointwise_rows=7", "tiles.heads=1", "tiles.vocabulary=100"],
    ["tiles.rows=100", "tiles.logits_rows=40", "options.update=separate"],
]


@pytest.mark.skipif(of_this_machine() is None, reason="BLAS multiplies here, and its bits depend on tiles")
@pytest.mark.parametrize("tiles", TILES, ids=["smaller", "that divide nothing", "logits in blocks"])
def test_nor_do_tiles(tiles, text, tmp_path, reference):
    """Parameters and losses are the same however tensors are cut; of the norm, which adds up tile by tile, the last digits differ."""
    digest, numbers = train(text, tmp_path, settings=tiles)
    assert digest == reference[0]
    assert numbers == pytest.approx(reference[1], abs=1e-5)
    assert len(set(numbers) - set(reference[1])) <= 6  # the norms


def test_seed_does_change_the_bits(text, tmp_path, reference):
    """The hash is no constant."""
    assert train(text, tmp_path, flags=["--seed", "1"])[0] != reference[0]


def test_with_blas_tiles_change_the_rounding(text, tmp_path):
    """BLAS adds in an order that depends on the shape."""
    whole, tiled = (train(text, tmp_path, settings=["options.products=blas", *more]) for more in ([], TILES[1]))
    assert whole[0] != tiled[0]
    assert tiled[1] == pytest.approx(whole[1], abs=1e-4)
