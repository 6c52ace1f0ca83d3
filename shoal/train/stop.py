"""How a run is asked to stop. The first SIGINT (Ctrl-C) or SIGTERM is a wish: the loop finishes its step, saves, and
leaves. The second is an order: the process dies of it at once, as if nobody had listened.

    with Stop(say=print) as stop:
        while step < steps and not stop.asked:
            …
"""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """`asked` is the name of the first signal, None until it comes. `say` tells the user that we heard."""

    def __init__(self, say: Callable[[str], object]):
        self.asked: str | None = None
        self.say = say

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self.hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            self.asked = signal.Signals(number).name
            self.say(f"{self.asked}: finishing this step, then saving. Once more to quit at once.")
