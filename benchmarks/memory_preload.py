"""Everything that the children of memory.py need."""

import contextlib

import memory  # noqa: F401 - imported to be there
import peers

peers.set_environment()
for peer in peers.PEERS:
    with contextlib.suppress(peers.PeerUnavailableError):
        peers.load(peer)
