"""Questions with nothing to reckon: what a function of Python's library does, in one sentence.

The answer shown is the first sentence of its docstring; the check asks for the form alone (one whole sentence that
doesn't stutter), as instruction-following checks do: what is true of a library can't be told by a rule. They are the
general data of R1's later stages, offline, and seen in pretraining by whoever read the library's source.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from sysconfig import get_paths

from shoal.tasks.task import Made, Task

MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "cmd", "code", "colorsys", "configparser", "contextlib", "copy",
    "csv", "dataclasses", "difflib", "enum", "fileinput", "fnmatch", "fractions", "functools", "getpass", "glob",
    "gzip", "heapq", "hmac", "imaplib", "inspect", "ipaddress", "keyword", "linecache", "locale", "mailbox", "nntplib",
    "numbers", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "platform", "poplib", "posixpath", "pprint",
    "profile", "queue", "quopri", "random", "reprlib", "sched", "secrets", "selectors", "shelve", "shlex", "shutil",
    "smtplib", "socket", "socketserver", "ssl", "stat", "statistics", "string", "subprocess", "symtable", "tarfile",
    "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "traceback", "types", "typing", "uuid",
    "warnings", "weakref", "webbrowser", "zipfile",
)  # fmt: skip
WORDS = range(3, 31)  # of a sentence
THOUGHT = "Nothing to reckon here; I say what I know."
SENTENCE = re.compile(r"[A-Z](?:[^.!?\n]|\.(?=\w))*\.")  # a full stop inside a name, as in os.path, ends none


def is_sentence(text: str) -> bool:
    """One sentence of English letters, from its capital to its full stop, in which no three words come twice."""
    words = text.lower().rstrip(".").split()
    runs = list(zip(words, words[1:], words[2:]))
    return bool(SENTENCE.fullmatch(text)) and text.isascii() and len(words) in WORDS and len(set(runs)) == len(runs)


@cache
def documented() -> tuple[tuple[str, str], ...]:
    """(name, first sentence of the docstring) of public functions and classes, in the order of the modules."""
    root = Path(get_paths()["stdlib"])
    found = {name: said for m in MODULES if (file := root / f"{m}.py").exists() for name, said in sentences(file)}
    return tuple(found.items())


def sentences(file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.parse(file.read_text("utf-8")).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        paragraph = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
        first = SENTENCE.match(f"{paragraph.rstrip('.:')}.")
        if first and is_sentence(first[0]):
            yield f"{file.stem}.{node.name}", first[0]


def library(rng: Random, level: int) -> Made:
    name, said = rng.choice(documented())
    return Made(f"What is {name} for? One sentence.", THOUGHT, said, name, is_sentence)


TASK = Task("library", (1,), library)
