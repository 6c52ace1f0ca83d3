"""`shoal chat` as a user has it: what goes to the model and to the screen, through commands, Ctrl-C and pipes."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from shoal.cli import chat
from shoal.cli.screen import Terminal
from shoal.data.tokenizer import Tokenizer
from shoal.errors import ConfigError, ModelError, RequestError
from shoal.model import hf
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer

TEXT = "def add(a, b):\n    return a + b  # größer 漢字 🙂\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = Tokenizer.train([TEXT], 400)
    model = Transformer(replace(PRESETS["tiny"], vocab_size=512, max_positions=512, init_std=0.2)).init_weights(0)
    hf.save(model, path, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    tokenizer.save(path)
    return path


def chatted(monkeypatch, capsys, folder, lines, *flags) -> tuple[list[dict], str]:
    """A conversation of these lines: its messages, and what the user was told beside the answers."""
    told, waiting = [], iter(lines)

    def read() -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    class Kept(chat.Talk):
        def __init__(self, *given):
            super().__init__(*given)
            self.screen.read = read
            told.append(self)

    monkeypatch.setattr(chat, "Talk", Kept)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert chat.main([str(folder), "--dtype", "float32", "--seed", "1", *flags]) == 0
    return told[0].messages, capsys.readouterr().err


def test_a_conversation_keeps_its_turns_and_finds_its_prefix_again(monkeypatch, capsys, folder):
    long = "a question " * 12
    messages, told = chatted(monkeypatch, capsys, folder, [long, "and \\", "more"], "--max-tokens", "6")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "and \nmore"
    figures = re.findall(r"(\d+) in \((\d+) cached\) · (\d+) out \((\d+) thinking\) · first token", told)
    assert [f[1] for f in figures] == ["0", "64"] and all(f[2] == "6" for f in figures)
    assert told.count("cut at 6 tokens: --max-tokens") == 2


def test_commands(monkeypatch, capsys, folder, tmp_path):
    kept = tmp_path / "kept.json"
    lines = [
        "/help",
        "/system",
        "/system Be brief.",
        "/system",
        "x",
        "/retry",
        f"/save {kept}",
        f"/save {kept}",
        "/reset",
        "/retry",
    ]
    messages, told = chatted(
        monkeypatch, capsys, folder, [*lines, "/etc", "  /etc", ""], "--max-tokens", "3", "--no-thinking"
    )
    assert "/save FILE" in told and "no system prompt" in told and "\nBe brief.\n" in told
    saved = json.loads(kept.read_text())
    assert saved["system"] == "Be brief." and saved["messages"][0]["content"] == "x"
    assert len(saved["messages"]) == 2, "an answer that was asked for again stands in the place of the first"
    assert "File exists" in told and "a question before it" in told and "one of our commands" in told
    assert messages[0]["content"] == "/etc"


def test_a_retry_draws_anew_and_a_seed_says_what(monkeypatch, capsys, folder):
    flags = ["--max-tokens", "20", "--temperature", "2", "--top-p", "1", "--no-thinking"]
    once, _ = chatted(monkeypatch, capsys, folder, ["x"], *flags)
    again, _ = chatted(monkeypatch, capsys, folder, ["x"], *flags)
    retried, _ = chatted(monkeypatch, capsys, folder, ["x", "/retry"], *flags)
    assert once == again != retried


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(monkeypatch, capsys, folder):
    class Struck(chat.Talk):
        def answer(self, asked):
            self.screen.figures = strike
            return super().answer(asked)

    def strike(words: str) -> None:
        if "9 tokens" in words:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "Talk", Struck)
    before = signal.getsignal(signal.SIGINT)
    messages, told = chatted(monkeypatch, capsys, folder, ["x", KeyboardInterrupt(), "y"], "--temperature", "0")
    assert told.count("stopped; /retry") == 2 and "Ctrl-D ends" in told
    assert [m["content"] for m in messages if m["role"] == "user"] == ["x", "y"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_context_is_said_and_the_chat_goes_on(monkeypatch, capsys, folder):
    flags = ["--context", "128", "--no-thinking", "--temperature", "2"]
    messages, told = chatted(monkeypatch, capsys, folder, ["many words " * 50, "x"], *flags)
    assert "expected: less than 128, the context" in told and "/reset" in told
    assert [m["content"] for m in messages if m["role"] == "user"] == ["x"]


def test_a_pipe_asks_once_and_gets_plain_text(monkeypatch, capsys, folder):
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    flags = [str(folder), "--dtype", "float32", "--no-thinking", "--max-tokens", "8", "--seed", "1"]
    assert chat.main(flags) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n") and "\x1b" not in out and "8 out (0 thinking)" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("  \n"))
    with pytest.raises(ConfigError, match="standard input"):
        chat.main(flags)
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 2000))
    with pytest.raises(RequestError, match="512"):
        chat.main(flags)


def test_a_model_that_cannot_chat(monkeypatch, folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in folder.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    spec = json.loads((base / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        if token["content"] == "<answer>":
            spec["model"]["vocab"]["<other>"] = spec["model"]["vocab"].pop("<answer>", token["id"])
            token["content"] = "<other>"
    (base / "tokenizer.json").write_text(json.dumps(spec))
    (base / "tokenizer_config.json").unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO("x"))
    with pytest.raises(ModelError, match="shoal generate"):
        chat.main([str(base)])
    for flags in (["--thinking-budget", "0"], ["--max-tokens", "0"], ["--seed", "-1"]):
        with pytest.raises(ConfigError):
            chat.main([str(folder), *flags])


def test_a_terminal_wraps_dims_thinking_and_is_safe_from_escapes():
    out = io.StringIO()
    screen = Terminal(Console(file=out, force_terminal=True, width=20, color_system="standard", highlight=False))
    screen.begin()
    for piece in ("let me ", "think\n", "of it"):
        screen.add(piece, True)
        screen.figures("2 tokens")
    screen.add("\nThe answer is rather ", False)
    screen.add("long\x1b[2J [bold]漢字", False)
    screen.figures("9 tokens")
    screen.end("that was it")
    lines = seen(out.getvalue(), 20)
    assert lines == ["let me think", "of it", "", "The answer is rather", " long\ufffd[2J [bold]漢字", "that was it"]
    assert "\x1b[2mlet me think" in out.getvalue() and "\x1b[2mThe" not in out.getvalue()


def test_a_paragraph_taller_than_the_terminal_is_printed_in_parts():
    out = io.StringIO()
    screen = Terminal(Console(file=out, force_terminal=True, width=20, height=8, highlight=False))
    screen.begin()
    for i in range(60):
        screen.add(f"{i:04} ", False)
    screen.end("")
    words = " ".join(seen(out.getvalue(), 20)).split()
    assert words == [f"{i:04}" for i in range(60)]
    screen.begin()
    for _ in range(300):
        screen.add("x", False)
    screen.end("")
    assert "".join(seen(out.getvalue(), 20)).count("x") == 300


def seen(written: str, width: int) -> list[str]:
    """The lines that stay on a terminal: a cursor that goes up, clears, and writes."""
    lines, at, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[\d;?]*[A-Za-z])|([^\x1b]+)", written):
        if code.endswith("A"):
            at -= int(code[2:-1] or 1)
        elif code == "\x1b[2K":
            lines[at] = ""
        for char in text:
            if char == "\r":
                column = 0
            elif char == "\n":
                at, column = at + 1, 0
                lines += [""] * (at + 1 - len(lines))
            else:
                if column + cell_len(char) > width:
                    at, column = at + 1, 0
                    lines += [""] * (at + 1 - len(lines))
                lines[at], column = lines[at] + char, column + cell_len(char)
    return "\n".join(line.rstrip() for line in lines).rstrip().split("\n")


@pytest.mark.slow
def test_in_a_real_terminal(folder):
    """Asked, stopped with Ctrl-C, asked again, ended with Ctrl-D."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "shoal.cli.main", "chat", str(folder), "--temperature", "0"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""

    def until(says: bytes, seconds: float = 60) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while says not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 65536)
        seen = seen.partition(says)[2]

    try:
        until("› ".encode())
        os.write(ours, b"hello\n")
        until(b"tokens/s")
        process.send_signal(signal.SIGINT)
        until(b"stopped;")
        until("› ".encode())
        os.write(ours, b"/system\n")
        until(b"no system prompt")
        until("› ".encode())
        os.write(ours, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(ours)
