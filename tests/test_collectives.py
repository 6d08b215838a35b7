"""Collectives among ranks: the sums, their bits, and what was sent."""

import asyncio

import numpy as np
import pytest
from links_in_memory import linked

from taskgpt.collectives import PeerLost, spread
from taskgpt.collectives.ring import all_gather, deal, deal_to, from_bf16, reduce_scatter, to_bf16


def arrays_of(rank: int, dtype=np.float32) -> list[np.ndarray]:
    random = np.random.default_rng(rank)
    return [random.standard_normal(size).astype(dtype) for size in (1000, 3, 1, 777)]


def on_all(peers, collective):
    """Run a collective on all ranks at once."""

    async def run():
        return await asyncio.gather(*(collective(links) for links in peers))

    return asyncio.run_coroutine_threadsafe(run(), peers[0].loop).result(60)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("as_bf16", [False, True])
def test_all_ranks_end_with_the_bits_of_the_same_sum(count, as_bf16):
    """Of float32 near to the exact one; of bfloat16 on the wire as near as its 8 bits allow; and 2 (N - 1) / N of it is sent."""
    held = [arrays_of(rank) for rank in range(count)]
    exact = [sum(each[n].astype(np.float64) for each in held) for n in range(4)]
    with linked(count) as peers:

        async def collective(links):
            chunks = deal(held[links.rank], count)
            await reduce_scatter(links, chunks, ("t",), as_bf16)
            await all_gather(links, chunks, ("u",), as_bf16)

        on_all(peers, collective)
        sent = sum(links.sent_bytes for links in peers)
    assert sent == 2 * (count - 1) * 1781 * (2 if as_bf16 else 4)
    for each in held[1:]:
        assert all((mine == first).all() for mine, first in zip(each, held[0], strict=True))
    for mine, wanted in zip(held[0], exact, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=count * (1 / 128 if as_bf16 and count > 1 else 1e-6), atol=0.05 if as_bf16 else 1e-6)


def test_owners_have_the_whole_sum_of_their_arrays():
    held = [arrays_of(rank) for rank in range(3)]
    exact = [sum(each[n].astype(np.float64) for each in held) for n in range(4)]
    owners = [2, 0, 0, 1]
    with linked(3) as peers:
        on_all(peers, lambda links: reduce_scatter(links, deal_to(held[links.rank], owners, 3), ("t",)))
        for n, owner in enumerate(owners):
            np.testing.assert_allclose(held[owner][n], exact[n], rtol=1e-5, atol=1e-6)
        on_all(peers, lambda links: all_gather(links, deal_to(held[links.rank], owners, 3), ("u",)))
    assert all((each[n] == held[0][n]).all() for each in held for n in range(4))


def test_spread_gives_all_the_arrays_of_one():
    held = [[array.reshape(-1, 1) for array in arrays_of(rank)] for rank in range(4)]
    with linked(4) as peers:
        on_all(peers, lambda links: spread(links, held[links.rank], 2, ("t",)))
    assert all((each[n] == arrays_of(2)[n].reshape(-1, 1)).all() for each in held for n in range(4))


def test_deal_is_even():
    sizes = [[sum(part.size for part in chunk) for chunk in deal([np.zeros(5), np.zeros(0), np.zeros(9)], count)] for count in (1, 3, 20)]
    assert sizes[0] == [14] and sizes[1] == [4, 5, 5] and sum(sizes[2]) == 14 and max(sizes[2]) == 1


def test_bfloat16_rounds_to_nearest_even():
    """Checked against float64, on ties, numbers that become infinite, infinity and NaN."""
    bits = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x80000000], np.uint32)
    assert [hex(each) for each in to_bf16(bits.view(np.float32))] == ["0x3f80", "0x3f82", "0x3f80", "0x3f81", "0x7f80", "0x7f80", "0x8000"]
    numbers = np.array([np.nan, 1.5], np.float32)
    back = np.empty(2, np.float32)
    from_bf16(back, to_bf16(numbers))
    assert np.isnan(back[0]) and back[1] == 1.5


def test_who_waits_for_a_lost_peer_is_told():
    with linked(2) as peers:
        waiting = asyncio.run_coroutine_threadsafe(reduce_scatter(peers[0], deal(arrays_of(0), 2), ("t",)), peers[0].loop)
        peers[1].fail("rank 1 is gone")
        with pytest.raises(PeerLost, match="rank 1 is gone"):
            waiting.result(60)
