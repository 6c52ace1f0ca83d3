"""`shoal chat MODEL`: a conversation in the terminal, on the engine in this process.

Ctrl-C stops an answer and keeps the chat, Ctrl-D ends it. Where standard input is no terminal it is one question; where
standard output is none, answers are plain text.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

from shoal.cli.budget import add_memory, open_sized
from shoal.cli.generate import check
from shoal.cli.main import INTERRUPTED
from shoal.cli.opened import DTYPES, MODEL_HELP, Opened, turns_of
from shoal.cli.screen import Screen, screen
from shoal.engine.request import Form
from shoal.errors import ConfigError, DataError, ModelError, RequestError, ShoalError

if TYPE_CHECKING:
    from shoal.engine.engine import LocalEngine
    from shoal.engine.output import Output
    from shoal.engine.request import Step, Usage
    from shoal.engine.turns import Turns

HELP = """\
/help           this
/reset          forget the conversation, keep the system prompt
/system [TEXT]  show the system prompt, or change it
/retry          answer the last question again
/save FILE      write the conversation as JSON
Ctrl-C stops an answer, Ctrl-D ends the chat. A line that ends in \\ goes on in the next one; a line that begins with
a space is no command."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal chat", description="Talk with a model. /help says what else it does.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument("--no-thinking", action="store_true", help="answer at once")
    parser.add_argument("--thinking-budget", type=int, metavar="N", help="close the thinking after N tokens")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer; default: what the context takes")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy; default 0.6")
    parser.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--top-k", type=int, default=0, help="0, the default, is all")
    parser.add_argument("--min-p", type=float, default=0.0, help="default 0")
    parser.add_argument("--seed", type=int, help="same seed and questions, same answers; default: other ones each time")
    parser.add_argument("--context", type=int, help="most tokens of the conversation; default: the model's")
    add_memory(parser)
    parser.add_argument("--speculate", type=int, default=0, metavar="N", help="draft N tokens ahead; default 0")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights; default bfloat16")
    parser.add_argument("--threads", type=int, help="default: one a core")
    args = parser.parse_args(argv)
    check(args)
    if args.thinking_budget is not None and args.thinking_budget < 1:
        raise ConfigError(f"--thinking-budget {args.thinking_budget}", "1 or more", "use --no-thinking for none")
    question = None if sys.stdin.isatty() else sys.stdin.read().strip()
    if question == "":
        raise ConfigError("nothing on standard input", "a question", "pipe one in, or call it from a terminal")
    opened, cache = open_sized(args, args.threads, args.context)
    if opened.tokenizer.chat_template is None:
        raise ModelError(f"{opened.folder} has no chat template", "a chat model", "use shoal generate to continue text")
    turns = turns_of(opened)
    from shoal.engine.engine import LocalEngine

    how = {"context": args.context, "speculate": args.speculate}
    engine = LocalEngine(opened.model, cache, **how, unchanged=opened.unchanged)
    try:
        talk = Talk(opened, engine, turns, args, screen())
        if question is None:
            return converse(talk)
        return INTERRUPTED if talk.ask([], question).finish == "cancelled" else 0
    finally:
        engine.close()
        turns.close()


@dataclass(frozen=True)
class Answer:
    content: str
    reasoning: str
    finish: str  # the engine's word
    usage: "Usage"
    thinking: int  # tokens of it
    first: float  # seconds until the first token
    per_second: float  # tokens, from then on

    def message(self) -> dict:
        return {"role": "assistant", "content": self.content, "reasoning_content": self.reasoning}

    def figures(self) -> str:
        """105 in (64 cached) · 500 out (380 thinking) · first token 0.21 s · 84 tokens/s"""
        u = self.usage
        tokens = f"{u.prompt:,} in ({u.cached:,} cached) · {u.completion:,} out ({self.thinking:,} thinking)"
        return f"{tokens} · first token {self.first:.2f} s · {self.per_second:.0f} tokens/s"


class Talk:
    """The conversation so far, and how it goes on."""

    def __init__(self, opened: Opened, engine: "LocalEngine", turns: "Turns", args: argparse.Namespace, screen: Screen):
        self.opened, self.engine, self.turns, self.args, self.screen = opened, engine, turns, args, screen
        self.form = Form(thinking=not args.no_thinking, thinking_budget=args.thinking_budget)
        self.system: str = args.system
        self.messages: list[dict] = []
        self.answers = 0

    def take(self, line: str) -> None:
        """A command or a question. Raises ShoalError, with the conversation as it was."""
        command, _, rest = line.partition(" ")
        match command, rest.strip():
            case "/help", "":
                self.screen.note(HELP)
            case "/reset", "":
                self.messages = []
                self.screen.note("a new conversation")
            case "/system", "":
                self.screen.note(self.system or "no system prompt")
            case "/system", text:
                self.system = text
            case "/retry", "":
                if not self.messages:
                    raise ConfigError("/retry", "a question before it", "ask one")
                self.ask(self.messages[:-2], self.messages[-2]["content"])
            case "/save", name if name:
                self.save(name)
            case _ if line.startswith("/"):
                raise ConfigError(line[:80], "one of our commands", "/help lists them; a space before it makes it text")
            case _ if line.strip():
                self.ask(self.messages, line.strip())

    def ask(self, before: list[dict], question: str) -> Answer:
        asked = [*before, {"role": "user", "content": question}]
        answer = self.answer(asked)
        self.messages = [*asked, answer.message()]
        return answer

    def answer(self, asked: list[dict]) -> Answer:
        from shoal.engine.request import Request, Sampling, Step

        args, system = self.args, [{"role": "system", "content": self.system}] if self.system else []
        prompt = self.turns.render(system + asked, self.form)
        room = self.engine.context - len(prompt)
        if room < 1:
            got = f"a conversation of {len(prompt):,} tokens"
            expected = f"less than {self.engine.context:,}, the context"
            raise RequestError(got, expected, "/reset begins a new one", "messages", "context_length_exceeded")
        seed = None if args.seed is None else args.seed + self.answers
        self.answers += 1
        sampling = Sampling(args.temperature, args.top_p, args.top_k, args.min_p, seed=seed)
        output, steps = self.turns.output(self.form, True, prompt), SimpleQueue[Step]()
        n = min(room, args.max_tokens or room)
        request = Request(tuple(prompt), n, steps.put, sampling, self.turns.stop_tokens, output.guide)
        with stopping(lambda: self.engine.cancel(request)):
            self.engine.submit(request)
            answer = follow(steps, output, self.screen)
        if answer.finish == "cancelled":
            self.screen.note("stopped; /retry answers again")
        elif answer.finish == "length":
            self.screen.note(
                f"cut at {n:,} tokens: " + ("the context is full; /reset" if n == room else "--max-tokens")
            )
        return answer

    def save(self, name: str) -> None:
        kept = {"model": str(self.opened.folder), "system": self.system, "messages": self.messages}
        try:
            with open(name, "x", encoding="utf-8") as file:
                json.dump(kept, file, ensure_ascii=False, indent=1)
        except OSError as e:
            raise DataError(f"{name}: {e.strerror}", "a new file that can be written", "choose another name") from None
        self.screen.note(f"wrote {name}")


def converse(talk: Talk) -> int:
    import readline  # noqa: F401  # input() edits lines and remembers them

    talk.screen.note(f"{talk.opened.folder} · context {talk.engine.context:,} tokens · /help")
    while True:
        try:
            talk.take(line_of(talk.screen))
        except ShoalError as e:
            talk.screen.note(str(e))
        except KeyboardInterrupt:
            talk.screen.note("\nCtrl-D ends the chat")
        except EOFError:
            print()
            return 0


def line_of(screen: Screen) -> str:
    line = screen.read()
    while line.endswith("\\"):
        line = line[:-1] + "\n" + screen.read()
    return line


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Meanwhile Ctrl-C means this."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def follow(steps: "SimpleQueue[Step]", output: "Output", screen: Screen) -> Answer:
    """Show an answer as it comes. Raises ModelError where the model fails."""
    said = {"content": "", "reasoning": ""}
    began, first, n, figures = time.perf_counter(), 0.0, 0, ""
    screen.begin()
    try:
        screen.figures("reading …")
        while True:
            step = steps.get()
            for delta in output.feed(step):
                said[delta.kind] += delta.text
                screen.add(delta.text, delta.kind == "reasoning")
            if step.finish == "error":
                raise ModelError(f"{step.error}", "finite numbers from the model", "check the weights")
            n, now = n + len(step.tokens), time.perf_counter()
            first = first or (now - began if n else 0.0)
            per_second = max(n - 1, 0) / max(now - began - first, 1e-9)
            if step.finish:
                answer = Answer(
                    **said,
                    finish=step.finish,
                    usage=step.usage,
                    thinking=output.reasoning_tokens,
                    first=first,
                    per_second=per_second,
                )
                figures = answer.figures()
                return answer
            screen.figures(f"{n:,} tokens · {per_second:.0f} tokens/s")
    finally:
        screen.end(figures)
