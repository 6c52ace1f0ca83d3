"""Where a chat's answers appear: live on a terminal, as plain text in a pipe.

On a terminal only the paragraph being written moves, with a line of figures under it; what stands above is printed once
and stays. A model's control characters are shown as what they are, and never reach the terminal.
"""

import sys
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

PROMPT = "› "
REFRESHES = 10  # a second


class Screen(Protocol):
    def read(self) -> str:
        """A line from the user. Raises EOFError at the end."""
        ...

    def begin(self) -> None: ...
    def add(self, text: str, thinking: bool) -> None: ...
    def figures(self, words: str) -> None:
        """How the answer is coming along."""
        ...

    def end(self, words: str) -> None:
        """The answer is over, and these are its figures; none where it failed."""
        ...

    def note(self, words: str) -> None:
        """Something that is no answer."""
        ...


def screen() -> Screen:
    return Terminal(Console(highlight=False)) if sys.stdout.isatty() else Plain()


class Terminal:
    def __init__(self, console: Console):
        self.console, self.live = console, Live(console=console)
        self.line, self.words, self.thinking = "", "", False

    def read(self) -> str:
        return input(PROMPT)

    def begin(self) -> None:
        self.line, self.words, self.thinking = "", "", False
        self.live = Live(console=self.console, refresh_per_second=REFRESHES, transient=True)
        self.live.start()

    def add(self, text: str, thinking: bool) -> None:
        if self.thinking and not thinking:
            self.print(self.line)
            self.line, text = "", "\n" + text.lstrip("\n")
        self.thinking = thinking
        *whole, self.line = (self.line + harmless(text)).expandtabs().split("\n")
        for line in whole:
            self.print(line)
        if cell_len(self.line) > self.console.width * (self.console.height - 4):  # a live part must fit the screen
            line, _, rest = self.line.rpartition(" ")
            self.print(line or self.line)
            self.line = rest if line else ""
        self.draw()

    def figures(self, words: str) -> None:
        self.words = words
        self.draw()

    def end(self, words: str) -> None:
        self.live.stop()
        if self.line:
            self.print(self.line)
        if words:
            self.console.print(Text(words + "\n", "dim italic"))

    def note(self, words: str) -> None:
        self.console.print(Text(harmless(words), "yellow"))

    def print(self, line: str) -> None:
        self.console.print(self.styled(line), soft_wrap=True)

    def draw(self) -> None:
        self.live.update(Group(*[self.styled(self.line)] * bool(self.line), Text(self.words, "dim italic")))

    def styled(self, line: str) -> Text:
        return Text(line, "dim" if self.thinking else "")


class Plain:
    """The answers alone go to standard output, without their thinking."""

    def read(self) -> str:
        print(PROMPT, end="", file=sys.stderr, flush=True)
        return input()

    def begin(self) -> None:
        pass

    def add(self, text: str, thinking: bool) -> None:
        if not thinking:
            print(text, end="", flush=True)

    def figures(self, words: str) -> None:
        pass

    def end(self, words: str) -> None:
        print(flush=True)
        self.note(words)

    def note(self, words: str) -> None:
        print(words, file=sys.stderr)


def harmless(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
