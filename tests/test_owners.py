"""Owner computes: every rank keeps its share of a program, tiles cross as seldom as can be, and the bits are those of one rank."""

import re
import sys
import threading

import numpy as np
import owned_programs as programs
import pytest
from links_in_memory import linked
from pages import ROOT
from plain_schedulers import scheduler

from taskgpt.collectives import PeerLost
from taskgpt.collectives.owners import Exchange, block_cyclic, share_of
from taskgpt.collectives.partial import PartialArena
from taskgpt.tasks import Graph, TaskError, TensorSpec

sys.path.insert(0, str(ROOT))
from examples import cholesky_on_a_cluster as cholesky


def run(program, specs, ranks, window=32, name="native"):
    """Run a program on ranks that are threads; return for each its arena, its share, and how many bytes it sent."""
    found, errors = [None] * ranks, []
    with linked(ranks) as links:

        def be_rank(rank):
            arena = PartialArena(specs)
            share = share_of(program, arena, block_cyclic, rank, ranks)
            try:
                with Exchange(share, arena, links[rank], window) as exchange, scheduler(name, workers=1) as opened:
                    opened.run(exchange.graph)
                    found[rank] = arena, share, exchange.sent_bytes
            except TaskError as error:
                errors.append(error)
                links[rank].fail(str(error))

        threads = [threading.Thread(target=be_rank, args=[rank]) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return errors or found


def whole(found, specs, name):
    """Return a tensor, each cell from its home."""
    result = np.zeros(specs[name].shape, specs[name].dtype)
    for position in np.ndindex(found[0][0].tensors[name].grid):
        arena = found[block_cyclic(name, position, len(found))][0]
        tile = arena.tensors[name].cell(*position)
        result[tile.index] = tile.array
    return result


def matrix(found, specs):
    """Return the lower triangle of a factor as a plain matrix."""
    a = whole(found, specs, "a")
    return np.tril(a.transpose(0, 2, 1, 3).reshape(a.shape[0] * a.shape[2], -1))


def test_cholesky_is_lapacks_and_of_the_same_bits_on_any_number_of_ranks():
    """To 1e-10 of LAPACK; the tasks that check it by its formula say so, too."""
    specs = cholesky.specs(256, 32)
    factors = []
    for ranks, name in [(1, "native"), (2, "native"), (2, "sequential"), (3, "native")]:
        found = run(cholesky.program, specs, ranks, name=name)
        factors.append(matrix(found, specs))
        assert 0 < whole(found, specs, "error").max() < 1e-10
    np.testing.assert_allclose(factors[0], cholesky.Problem(256, 32).wanted(), rtol=0, atol=1e-10)
    assert len({factor.tobytes() for factor in factors}) == 1


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_version_crosses_once_to_each_rank_that_reads_it(ranks):
    """Counted here by hand, for Cholesky: a tile of the panel is read along its row and down the column of its index."""
    tiles, tile = 6, 16
    needed = set()
    for k in range(tiles):
        for i in range(k, tiles):
            row = [(i, j) for j in range(k + 1, i + 1)]
            column = [(m, i) for m in range(i + 1, tiles)]
            for reader in row + column:
                needed.add((i, k, block_cyclic("a", reader, ranks)))
    needed = {(i, k, rank) for i, k, rank in needed if rank != block_cyclic("a", (i, k), ranks)}
    found = run(cholesky.program, cholesky.specs(tiles * tile, tile), ranks)
    sent = sum(sent for _, _, sent in found)
    assert sent == sum(share.bound_bytes for _, share, _ in found) == len(needed) * tile * tile * 8


@pytest.mark.parametrize("window", [1, 32])
def test_what_came_from_others_is_given_back(window):
    """Whatever the window: with one tile at a time nothing waits for ever."""
    specs = cholesky.specs(256, 32)
    found = run(cholesky.program, specs, 2, window)
    for rank, (arena, _, _) in enumerate(found):
        here = [arena.a.cell(*p).array.any() for p in np.ndindex(arena.a.grid) if block_cyclic("a", p, 2) == rank and p[0] >= p[1]]
        others = [arena.a.cell(*p).array.any() for p in np.ndindex(arena.a.grid) if block_cyclic("a", p, 2) != rank]
        assert all(here)
        assert not any(others)


def test_halos_and_reductions():
    """Tiles that reach into others' cells, sums into one rank's tile: the bits of a graph on one machine."""
    specs = programs.heat_specs()
    arena, graph = PartialArena(specs), Graph()
    programs.heat(graph.spawn, arena)
    with scheduler("native", workers=2) as opened:
        opened.run(graph)
    for ranks in (1, 2, 3):
        found = run(programs.heat, specs, ranks)
        for name in specs:
            assert whole(found, specs, name).tobytes() == arena.tensors[name].array.tobytes()


def test_a_task_that_fails_ends_all_ranks():
    """Its own error there, and PeerLost with that elsewhere."""
    errors = run(programs.refused, programs.heat_specs(), 2)
    assert len(errors) == 2
    assert any(
        re.search(r"refuse inout\(x\[0:16, 16:32\]\), spawned in .*owned_programs.py.*: ValueError: not today", str(e)) for e in errors
    )
    assert any(isinstance(error.__cause__, PeerLost) and "not today" in str(error) for error in errors)


def test_mistakes():
    """What cannot be placed is refused when the program is recorded."""
    arena = PartialArena(programs.heat_specs())
    with pytest.raises(ValueError, match=r"number out\(x\[0:32, 0:32\]\) start=1: a task runs at the home .* got tiles of ranks 0, 1"):
        share_of(programs.two_homes, arena, block_cyclic, 0, 2)
    with pytest.raises(ValueError, match=r"home of cell \(0, 0\) of 'x': wanted a rank from 0 to 1, got 2"):
        share_of(programs.heat, arena, programs.nowhere, 0, 2)
    other = PartialArena({"z": TensorSpec((4, 4), (), np.dtype(np.float64))})
    with pytest.raises(ValueError, match="'out' wants a tile of a tensor that all ranks have, got one of 'z'"):
        share_of(lambda spawn, _: spawn(programs.number, other.z[:], 1), arena, block_cyclic, 0, 2)


def test_an_arena_takes_memory_where_it_is_written():
    """Addresses for 8 TiB are free; what is forgotten reads as zeros."""
    arena = PartialArena({"a": TensorSpec((1 << 20, 1024, 1024), (1, None, None), np.dtype(np.float64))})
    tile = arena.a.cell(77, 0, 0)
    tile.array[...] = 1
    arena.forget(tile)
    assert not tile.array.any()
    with pytest.raises(AttributeError, match="there is no tensor 'b'"):
        _ = arena.b
    with pytest.raises(MemoryError, match="tensor 'a': no room for"):
        PartialArena({"a": TensorSpec((1 << 50, 1024), (1, None))})
