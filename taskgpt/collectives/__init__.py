"""Messages and collectives among ranks: processes that run the same graph, each on its part of the data.

links.py         messages between ranks, whatever carries them
ring.py          collectives on a ring: what is sent, and in which order it is added
noted.py         links that note each message
communicator.py  buckets of tiles, exchanged when all are handed in
kernels.py       tasks that hand a tile in, and wait for no more than an event
owners.py        owner computes: the share of a tiled program that each rank has, and the tiles that cross
partial.py       tensors of which a rank has a part
"""

from taskgpt.collectives.communicator import GATHER, MOVE, REDUCE, REDUCE_OWN, SPREAD, Communicator, Transfer
from taskgpt.collectives.links import Links, PeerLost, Tag
from taskgpt.collectives.noted import Noted, NotedLinks
from taskgpt.collectives.ring import spread

__all__ = [
    "GATHER",
    "MOVE",
    "REDUCE",
    "REDUCE_OWN",
    "SPREAD",
    "Communicator",
    "Links",
    "Noted",
    "NotedLinks",
    "PeerLost",
    "Tag",
    "Transfer",
    "spread",
]
