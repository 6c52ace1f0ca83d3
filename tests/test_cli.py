"""The command line: help without torch, misspellings, errors without traces, verbs that read run directories."""

import io
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from shoal.cli import asked as verb
from shoal.cli import doctor, main, runs
from shoal.errors import ConfigError, ResourceError, RunError
from shoal.run import Run
from shoal.train.config import PretrainConfig

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "tyro", "rich", "numpy", "transformers", "matplotlib"}


@dataclass(frozen=True)
class Eval:
    every: int = 10


@dataclass(frozen=True)
class Config:
    """Stands for PretrainConfig: the verb only layers, it knows no field but those a resume may change."""

    lr: float = 0.1
    minutes: float | None = None
    steps: int | None = 1000
    eval: Eval = Eval()


def shoal(*argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command."""
    words = [sys.executable, "-m", "shoal.cli.main", *argv]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_help_imports_nothing_heavy(monkeypatch, capsys):
    listing = "import sys; sys.argv[1:] = ['--help']; from shoal.cli.main import main; main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listing], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert "shoal.errors" in modules and not modules & HEAVY
    assert all(verb in done.stdout for verb in main.VERBS)


def test_every_verb_exists():
    missing = [m for m, _ in main.VERBS.values() if not (ROOT / "shoal" / "cli" / f"{m}.py").exists()]
    assert not missing


def test_an_unknown_verb_names_the_nearest():
    code, _, err = shoal("pretrian")
    assert code == 2 and "did you mean pretrain?" in err and "Traceback" not in err


def test_a_users_error_has_no_trace_and_its_own_exit_code(monkeypatch, capsys):
    def full(argv):
        raise ResourceError("12 GiB needed", "8 GiB", "take a smaller model")

    monkeypatch.setattr(doctor, "main", full)
    assert main.run_verb("doctor", []) == 3
    assert capsys.readouterr().err == "shoal doctor: 12 GiB needed\n  expected: 8 GiB\n  fix: take a smaller model\n"


def test_interrupting_is_not_a_crash(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", interrupted)
    assert main.run_verb("doctor", []) == 130
    assert capsys.readouterr().err == "shoal doctor: interrupted\n"


def test_our_own_faults_keep_their_trace(monkeypatch):
    monkeypatch.setattr(doctor, "main", lambda argv: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main.run_verb("doctor", [])


CUT = """
import mmap, sys
from shoal.cli import main

def cut(verb, rest):
    with open(rest[0], "w+b") as f:
        f.truncate(8192)
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        f.truncate(0)
        mapped[0]

main.run_verb = cut
main.main()
"""


def test_a_process_that_the_system_ends_says_where_it_was(tmp_path):
    command = [sys.executable, "-c", CUT, "serve", str(tmp_path / "weights")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGBUS and "Bus error" in ended.stderr and "in cut" in ended.stderr


def test_pretrain_tells_its_own_flags_from_the_configs():
    words = "mini -c a.toml --optim.lr 3e-4 --compile --shift -1 --resume k3f9 -c b.toml --out x --a.b=c --dry-run"
    asked = verb.parse(words.split())
    assert asked == verb.Asked(
        "mini",
        ["a.toml", "b.toml"],
        ["--optim.lr", "3e-4", "--compile", "--shift", "-1", "--a.b=c"],
        "k3f9",
        "x",
        True,
        False,
    )
    assert verb.parse(["--resume", "--print-config"]) == verb.Asked(resume="", print_config=True)
    with pytest.raises(ConfigError, match="--out at the end"):
        verb.parse(["mini", "--out"])


def test_one_budget_takes_the_place_of_the_other():
    assert verb.parse(["mini", "--minutes", "3"]).flags == ["--minutes", "3", "--steps=none"]
    assert verb.parse(["mini", "--steps=3"]).flags == ["--steps=3", "--minutes=none"]
    assert verb.parse(["mini", "--steps=3", "--minutes", "1"]).flags == ["--steps=3", "--minutes", "1"]
    three = verb.parse(["sft", "--minutes", "3"], ("epochs", "minutes", "steps")).flags
    assert three == ["--minutes", "3", "--epochs=none", "--steps=none"]


def test_an_unknown_recipe_names_the_nearest(monkeypatch):
    monkeypatch.setattr(verb, "recipe_names", lambda kind: ["quickstart", "traditional"])
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        verb.recipe("quikstart", Config)


def test_verbs_know_their_own_recipes():
    assert {"quickstart", "tiny", "traditional"} <= set(verb.recipe_names(PretrainConfig))
    assert verb.recipe_names(Config) == []


@pytest.fixture
def two_runs(tmp_path, monkeypatch) -> tuple[Run, Run]:
    monkeypatch.chdir(tmp_path)
    made = [Run.create("mini", f"runs/{name}", Config(lr), {"lr": "flag"}, ["shoal"]) for name, lr in PAIRS]
    for i, run in enumerate(made):
        run.log(1, {"train/loss": 5.0, "train/tokens": 100})
        run.log(2, {"train/loss": 4.25 - i, "eval/bits_per_byte": 1.5})
        run.status(created=f"2026-11-2{i}")
    return made[0], made[1]


PAIRS = [("first", 0.1), ("second", 0.2)]


def test_runs_are_listed_newest_first_with_their_last_values(two_runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert runs.main(["ls"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["run", "second", "first"]
    assert lines[1][1:6] == ["created", "2", "100", "3.25", "1.5"]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_a_list_of_runs_has_whole_names_and_the_columns_that_fit(two_runs, width):
    long = Run.create("mini", "runs/2026-11-22_quickstart_k3f9", Config(), {}, ["shoal"])
    made = [long, *two_runs]
    console = Console(width=width, force_terminal=True, color_system=None, record=True, file=io.StringIO())
    runs.listed(made, console)
    lines = console.export_text().rstrip().splitlines()
    assert [line.split()[0] for line in lines] == ["run", *(run.id for run in made)] and "…" not in "".join(lines)
    assert width < 45 or max(len(line.rstrip()) for line in lines) <= width
    assert ("mfu" in lines[0]) == (width >= 100) and ("loss" in lines[0]) == (width >= 60)


def test_comparison_shows_what_differs_and_nothing_else(two_runs, capsys):
    assert runs.main(["compare", "first", "second"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["lr"] == ["0.1", "0.2"] and rows["train/loss"] == ["4.25", "3.25"]
    assert "minutes" not in rows


def test_comparison_of_reinforcement_shows_what_was_solved(two_runs, capsys):
    two_runs[0].log(3, {"rl/accuracy": 0.625})
    two_runs[1].status(pass_at_1=0.875)
    assert runs.main(["compare", "first", "second"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["rl/accuracy"][1:] == ["0.625", "-"] and lines["held-out"][-2:] == ["-", "0.875"]
    assert "speed/mfu" not in lines


def test_show_and_unknown_runs(two_runs, capsys):
    assert runs.main(["show", "latest"]) == 0
    assert "second" in capsys.readouterr().out
    with pytest.raises(RunError, match="did you mean first"):
        runs.main(["show", "frist"])


def test_a_resumed_run_keeps_its_settings(two_runs):
    first, second = two_runs
    assert verb.resumed(verb.parse(["mini", "--resume"]), Config).id == second.id
    assert verb.resumed(verb.parse(["--resume", "first"]), Config).id == first.id
    with pytest.raises(RunError, match="no run of other"):
        verb.resumed(verb.parse(["other", "--resume"]), Config)
    config, origins = verb.reconfigured(first, verb.parse("--resume --minutes 3 --eval.every 5".split()), Config)
    assert config == Config(0.1, 3.0, None, Eval(5))
    assert origins == {"lr": "flag", "minutes": "flag", "steps": "flag", "eval.every": "flag"}
    with pytest.raises(ConfigError, match="lr differ from what first was started with"):
        verb.reconfigured(first, verb.parse("--resume --lr 1".split()), Config)


@pytest.mark.slow
def test_doctor_measures_this_machine():
    code, out, _ = shoal("doctor", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["threads"] >= 1
    assert facts["gemm_bf16_gflops"] > 1 and facts["gemm_fp32_gflops"] > 1 and facts["read_gb_per_s"] > 0.1


def test_doctor_says_what_is_missing_and_how_to_get_it():
    versions = dict.fromkeys(doctor.PACKAGES, "1") | {"transformers": None, "triton": None}
    good = {"gpu": None, "compiler": "c++", "threads": 2, "cores": 2, "memory_free_gib": 8, "disk_free_gib": 8}
    (only,) = doctor.advice(good | {"versions": versions})
    assert "transformers is missing" in only and "pip install 'shoal-lm[interop]'" in only
    assert len(doctor.advice(good | {"versions": versions, "threads": 1, "memory_free_gib": 1, "gpu": {}})) == 3
    assert any("triton" in line for line in doctor.advice(good | {"versions": versions, "gpu": {"name": "H200"}}))
