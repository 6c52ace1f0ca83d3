"""shoal samples: what was asked for and nothing else, tokens as they were drawn, errors that say what there is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.cli import samples
from shoal.errors import ConfigError, RunError


def rollout(step: int, index: int, sample: int, **more) -> dict:
    right = sample % 2 == 0
    return {
        "step": step, "index": index, "sample": sample, "task": ("addition", "sorting")[index % 2], "level": 1,
        "prompt": f"What is {index}?", "expected": "7", "text": f"so {step}</think><answer>{sample}</answer>",
        "outcome": "right" if right else "wrong", "reward": float(right), "advantage": 0.5 if right else -0.5,
        "tokens": ["so", f" {step}", "</think>"], "logprobs": [-0.01, -3.2, 0.0], "ratios": [1.0, 1.2, 1.0],
    } | more  # fmt: skip


def attempt(item: int, budget: int | None) -> dict:
    return {
        "item": item, "sample": 0, "budget": budget, "seed": 1, "task": "sorting", "level": 2, "prompt": "Sort 2 1.",
        "thinking": "hm", "said": "</think><answer>1 2</answer>", "answer": "1 2", "outcome": "right", "tokens": 9,
        "thinking_tokens": 3,
    }  # fmt: skip


def write(path: Path, lines: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "config.toml").write_text("")
    kept = [rollout(step, 2 * step + i, s) for step in (1, 2) for i in range(2) for s in range(4)]
    write(tmp_path / "samples/rollouts.jsonl", kept)
    return tmp_path


def shown(capsys, *argv) -> str:
    assert samples.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def lines(capsys, *argv) -> list[dict]:
    return [json.loads(line) for line in shown(capsys, *argv, "--json", "--most", 0).splitlines()]


def test_the_last_step_is_shown_and_flags_choose(run, capsys):
    assert {line["step"] for line in lines(capsys, run)} == {2}
    assert {line["step"] for line in lines(capsys, run, "--step", 1)} == {1}
    assert {line["outcome"] for line in lines(capsys, run, "--wrong")} == {"wrong"}
    assert {line["task"] for line in lines(capsys, run, "--task", "sorting")} == {"sorting"}
    assert [line["sample"] for line in lines(capsys, run, "--index", 5, "--right")] == [0, 2]


def test_lines_pass_through_as_they_are(run, capsys):
    kept = (run / "samples/rollouts.jsonl").read_text().splitlines()
    assert shown(capsys, run, "--json", "--most", 0).splitlines() == kept[8:]


def test_an_answer_with_its_worth(run, capsys):
    text = shown(capsys, run, "--most", 2)
    assert "What is 4?" in text and "so 2\n</think><answer>1</answer>" in text and "advantage -0.50" in text
    assert text.count("What is 4?") == 1 and "2 of 8 answers" in text and "\x1b" not in text


def test_tokens_with_their_numbers(run, capsys):
    text = shown(capsys, run, "--tokens", "--most", 1)
    assert "-3.2000   1.2000   2\n" in text and text.count("</think>") == 1


def test_what_a_model_wrote_never_reaches_the_terminal_raw(run, capsys):
    write(run / "samples/rollouts.jsonl", [rollout(1, 0, 0, text="\x1b[2J</think>\x07", prompt="[bold]\x1b]0;x")])
    text = shown(capsys, run)
    assert "\x1b" not in text and "\x07" not in text and "[bold]" in text


def test_a_repeated_step_and_damaged_lines(run, capsys):
    write(
        run / "samples/rollouts.jsonl", [rollout(1, 0, 0), "{", "[]", rollout(1, 0, 0, outcome="failed"), '{"step": 1']
    )
    text = shown(capsys, run)
    assert text.count("What is 0?") == 1 and "failed" in text and "3 damaged lines" in text


def test_attempts_of_an_evaluation(run, capsys):
    write(run / "evals/after.jsonl", [attempt(0, 0), attempt(0, 64)])
    text = shown(capsys, run, "--eval", "after")
    assert "budget 64" in text and "hm\n</think><answer>1 2</answer>" in text and "2 of 2" in text
    assert "not kept" in shown(capsys, run, "--eval", "after", "--tokens")
    (run / "samples/rollouts.jsonl").unlink()
    assert "Sort 2 1." in shown(capsys, run)


def test_attempts_of_an_evaluation_outside_a_run(tmp_path, capsys):
    write(tmp_path / "out/humaneval.jsonl", [attempt(0, 0)])
    write(tmp_path / "out/tasks.jsonl", [attempt(0, 64)])
    assert "budget 0" in shown(capsys, tmp_path / "out")
    assert "budget 64" in shown(capsys, tmp_path / "out", "--eval", "tasks")


@pytest.mark.parametrize("asked", [["--step", "9"], ["--task", "chess"], ["--index", "0"], ["--most", "-1"]])
def test_what_is_not_there_is_said(run, asked):
    with pytest.raises(ConfigError, match="whose last step is 2|--most"):
        samples.main([str(run), *asked])


def test_a_run_without_answers(tmp_path, run):
    with pytest.raises(ConfigError, match="no evaluation 'before'"):
        samples.main([str(run), "--eval", "before"])
    (run / "samples/rollouts.jsonl").unlink()
    with pytest.raises(RunError, match="has kept no answers"):
        samples.main([str(run)])
    with pytest.raises(RunError):
        samples.main([str(tmp_path / "nowhere")])


def test_it_starts_without_torch(run):
    code = f"import sys; from shoal.cli import samples; samples.main([{str(run)!r}]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_of_a_run_with_stages_the_answers_are_its_models(run, capsys):
    write(run / "stages/6_r1/samples/rollouts.jsonl", [rollout(9, 0, 0)])
    (run / "stages/6_r1/config.toml").write_text("")
    (run / "pipeline.json").write_text(json.dumps({"stages": [], "model": "stages/6_r1"}))
    assert {line["step"] for line in lines(capsys, run)} == {9}
    assert {line["step"] for line in lines(capsys, run / "stages/6_r1")} == {9}
