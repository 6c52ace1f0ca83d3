"""What a server takes from strangers before it says no. One record, so that tests can make each of them small."""

import resource
from dataclasses import dataclass

SPARE_FILES = 64  # descriptors that aren't connections: weights, ledger, journal, logs


@dataclass(frozen=True)
class Limits:
    body_bytes: int = 4 * 2**20
    file_bytes: int = 32 * 2**20
    bytes_per_token: int = 32  # text above context × this is refused before it is tokenised
    inline_bytes: int = 16 * 1024  # larger bodies are parsed and tokenised beside the event loop
    header_bytes: int = 32 * 1024
    headers: int = 100
    head_seconds: float = 10.0  # to send a request's head
    body_seconds: float = 10.0  # to send its body, and a second more for each 64 KiB
    idle_seconds: int = 5  # between requests of one connection
    connections: int = 1000
    queue: int = 256  # requests that wait for the engine
    keep_alive_seconds: float = 10.0
    queue_seconds: float = 1.0  # between two words on one's place in the queue
    stall_seconds: float = 30.0  # a reader that takes nothing for so long is gone
    buffered_deltas: int = 4096  # of one stream whose reader is slow
    cancel_seconds: float = 5.0  # for the engine to confirm
    stuck_seconds: float = 600.0  # of a step, more than the slowest honest one; reading experts counts as getting on
    drain_seconds: float = 30.0
    completion_tokens: int = 4096  # where max_tokens is left out
    thinking_tokens: int = 32768  # the same, thinking included
    replay_bytes: int = 16 * 2**20  # answers kept for idempotency keys
    replay_seconds: float = 24 * 3600.0
    stored_bytes: int = 2**30  # files of one tenant
    live_batches: int = 16  # of one tenant
    lease_seconds: float = 30.0  # a server that is silent for so long has lost its batches to others

    def connections_allowed(self) -> int:
        """Never so many that the process runs out of file descriptors."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return max(8, min(self.connections, soft - SPARE_FILES))
