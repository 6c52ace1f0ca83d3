"""The thread that writes the ledger, so that no request ever waits for a database.

Rows that are due are written in one transaction, at most every 50 ms; then the journal learns that they stand. When the
database can't be written (a full disk, a lost connection) the clerk keeps the rows, tries again each second, and is
`closed`: the server takes no new requests until it works again. Nothing is served for free, and nothing billed is lost,
because the journal still holds it.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from shoal.server import journal
from shoal.server.auth import Keys
from shoal.server.ledger import Ledger, UsageRow, reason

GATHER_SECONDS = 0.05
REFRESH_SECONDS = 1.0

log = logging.getLogger("shoal.server")


class Clerk:
    """`done` is called on the event loop with rows that stand in the ledger now."""

    def __init__(self, ledger: Ledger, keys: Keys, post: Callable[..., object], done: Callable[[list[UsageRow]], None]):
        self.ledger, self.keys, self.post, self.done = ledger, keys, post, done
        self.due: queue.Queue[UsageRow | None] = queue.Queue()
        self.closed: str | None = None  # why nothing can be written
        self.thread = threading.Thread(target=self.run, name="shoal-clerk", daemon=True)

    def start(self) -> None:
        self.keys.replace(self.ledger.all_keys())
        self.thread.start()

    def settle(self, row: UsageRow) -> None:
        self.due.put(row)

    def stop(self) -> None:
        """Write what is due, once, and end."""
        self.due.put(None)
        self.thread.join(timeout=10)

    def run(self) -> None:
        rows: list[UsageRow] = []
        ending = False
        while not ending:
            ending = self.gather(rows)
            try:
                self.ledger.settle(rows)
                if rows:
                    self.post(self.done, list(rows))
                    rows.clear()
                self.post(self.keys.replace, self.ledger.all_keys())
                self.open_again()
            except SQLAlchemyError as e:
                self.close(reason(e))
            except RuntimeError:  # the event loop has ended; the journal keeps what it wasn't told
                return

    def gather(self, rows: list[UsageRow]) -> bool:
        """Wait for rows, but not longer than a refresh of the keys can wait. Whether this is the end."""
        try:
            first = self.due.get(timeout=REFRESH_SECONDS)
        except queue.Empty:
            return False
        if first is None:
            return True
        rows.append(first)
        time.sleep(GATHER_SECONDS)
        while True:
            try:
                row = self.due.get_nowait()
            except queue.Empty:
                return False
            if row is None:
                return True
            rows.append(row)

    def close(self, why: str) -> None:
        if self.closed is None:
            log.error("the ledger can't be written, no new requests: %s", why)
        self.closed = why

    def open_again(self) -> None:
        if self.closed is not None:
            log.warning("the ledger can be written again")
        self.closed = None


def recover(ledger: Ledger, folder: Path) -> int:
    """Settle what killed servers left open. Returns how many requests that were."""
    n = 0
    for path, file in journal.orphans(folder):
        n += ledger.settle([recovered(one) for one in journal.read(file.read())])
        path.unlink()
    return n


def recovered(left: journal.Left) -> UsageRow:
    counts = left.counts
    return UsageRow(**left.row, **counts._asdict(), reasoning=0, finish="killed")
