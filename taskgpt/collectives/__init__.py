"""Messages and collectives among ranks: processes that run the same graph, each on its part of the data.

links.py    messages between ranks, whatever carries them
"""

from taskgpt.collectives.links import Links, PeerLost

__all__ = ["Links", "PeerLost"]
