"""A pretraining job from end to end: look at the machine, prepare the text, plan, train, score, sample, report.

Every recipe goes through here; `shoal pretrain` and `shoal quickstart` only read flags. What each stage found is left
in the run directory (plan.json, evals/, samples/, receipt.json), from which the report is made.
"""

import gzip
import json
import lzma
import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch

from shoal import runtime
from shoal.data.corpus import Corpus, Split
from shoal.engine.engine import LocalEngine
from shoal.engine.gather import silent
from shoal.engine.request import Request, Sampling
from shoal.errors import DataError
from shoal.model.attend import Packed
from shoal.ops import dispatch as ops
from shoal.plan import cost, flops, hardware, memory
from shoal.recipes import _machine, _plan
from shoal.recipes._machine import Here
from shoal.recipes._teller import Teller
from shoal.report import page
from shoal.run import Run, read_json, replace_text
from shoal.train.balance import loads
from shoal.train.config import PretrainConfig
from shoal.train.loop import Economy, steps_left
from shoal.train.loss import Score
from shoal.train.pretrain import held_out_score, pretrain, training_loader
from shoal.train.step import TrainState

PROMPTS = ("def", "class", "import os\n\n\ndef read_lines(path):\n")
MAX_TOKENS, TEMPERATURE, TOP_P = 160, 0.6, 0.95  # of samples
XZ_BYTES = 64 << 20  # of held-out text are compressed for comparison


def run_job(
    config: PretrainConfig,
    run: Run,
    teller: Teller,
    resume: bool = False,
    here: Here | None = None,
    verb: str = "pretrain",
) -> int:
    """0 when the run is complete, 130 when it was asked to stop and left a checkpoint.

    The caller holds the run's lock. `here` is this machine where it was looked at already; `verb` goes on with it.
    """
    here = here or place(config, run, resume)
    teller.say(f"machine  {here.setup.description}; {ops.describe()}")
    note_place(run, here, resume, teller)
    if not resume:
        require_memory(config, here)
    corpus = _plan.corpus_of(config, teller)
    teller.say(f"text     {described(corpus)}")
    require_same_text(run, corpus)
    config, plan = planned(config, run, corpus, here, resume, teller)
    run.status(state="training")
    try:
        economy = economy_of(config, here.machine)
        steps, device = plan["steps"], here.setup.device
        state = pretrain(config, run, corpus, economy, steps, device, resume, teller.show, teller.say)
    except BaseException as error:
        run.status(state="failed", error=str(error) or type(error).__name__)
        raise
    if steps_left(state):
        run.status(state="stopped", step=state.counters.step)
        teller.say(f"stopped at step {state.counters.step}; continue with: shoal {verb} --resume {typed(run)}")
        return 130
    finish(config, run, corpus, state, here.machine, teller)
    return 0


def dry_run(config: PretrainConfig, origins: Mapping[str, str], teller: Teller, here: Here | None = None) -> None:
    """Say what a run would take, from a few real steps, and leave nothing behind but the prepared text."""
    here = here or _machine.look(config.threads, config.seed)
    require_memory(config, here)
    corpus = _plan.corpus_of(config, teller)
    teller.say(f"text     {described(corpus)}")
    _, plan = plan_here(config, origins, corpus, here, teller)
    for reason in plan["why"]:
        teller.say(f"because  {reason}")


def require_memory(config: PretrainConfig, here: Here) -> None:
    """Raises ResourceError for a step that doesn't fit, before any text is prepared for it."""
    memory.check(config.model, _plan.memory_step(config, here.setup.device), here.machine.memory_bytes)


def typed(run: Run) -> str:
    """The run as a user in this directory would type it, wherever it lies."""
    return shlex.quote(page.shown(run.path))


def place(config: PretrainConfig, run: Run, resume: bool) -> Here:
    """A resumed run keeps its threads and, so that its figures stay comparable, the peaks measured at its start."""
    setup = runtime.setup(config.threads or run.env().get("threads"), config.seed)
    known = run.env().get("machine") if resume else None
    return Here(setup, hardware.Machine(**known) if known else _machine.measured(setup))


def note_place(run: Run, here: Here, resume: bool, teller: Teller) -> None:
    """Into env.json; a resumed run is told where it is not as it began, for then it is not bit-equal any more."""
    now = {"threads": here.setup.threads, "kernels": ops.describe(), "machine": asdict(here.machine)}
    began = run.env()
    for name in ("kernels", "threads"):
        if resume and name in began and began[name] != now[name]:
            teller.say(
                f"warning  this run began with {name} {began[name]!r} and goes on with {now[name]!r}: it will not end "
                "bit-equal to a run that was never stopped"
            )
    run.write_env(**{name: value for name, value in now.items() if name not in began})


def require_same_text(run: Run, corpus: Corpus) -> None:
    """A resumed run must read what it began with: a sample index means nothing in another text."""
    splits = {name: split["sha256"] for name, split in corpus.info["splits"].items()}
    now = splits | {"tokenizer": corpus.info["tokenizer_sha256"]}
    began = run.env().get("text", now)
    if changed := [name for name in now if began.get(name) != now[name]]:
        got = f"the text of {run.id} has changed since it began: {', '.join(changed)}"
        raise DataError(got, "the same files and tokenizer", "restore them, or start a new run")
    run.write_env(text=now)


def planned(
    config: PretrainConfig, run: Run, corpus: Corpus, here: Here, resume: bool, teller: Teller
) -> tuple[PretrainConfig, dict]:
    """The plan, kept in plan.json and by a resumed run, and the config it holds for."""
    path = run.path / "plan.json"
    if resume and path.exists():
        return config, read_json(path)
    fitted, plan = plan_here(config, run.origins(), corpus, here, teller)
    if fitted != config:
        run.write_config(fitted, run.origins() | {"eval.times": _plan.SIZED})
    write_json(path, plan)
    return fitted, plan


def plan_here(
    config: PretrainConfig, origins: Mapping[str, str], corpus: Corpus, here: Here, teller: Teller
) -> tuple[PretrainConfig, dict]:
    measured = _plan.timed_step(config, corpus, here.setup.device)
    fitted = _plan.affordable_scores(config, measured, origins)
    if fitted != config:
        teller.say(f"scores   {fitted.eval.times} times instead of {config.eval.times}, for lack of time")
    return fitted, _plan.plan_of(fitted, measured, here, teller)


def economy_of(config: PretrainConfig, machine: hardware.Machine) -> Economy:
    def flops_of(lengths: Sequence[int], mtp: bool) -> float:
        return flops.training(config.model, flops.mean_context(lengths), float(mtp)).total

    return Economy(flops_of, machine.peak_flops(config.dtype), machine.price_per_hour)


def described(corpus: Corpus) -> str:
    t, v = corpus.train, corpus.val
    names = ", ".join(kind["source"] for kind in corpus.info["sources"])
    return (
        f"{names}: {t.n_documents:,} documents, {t.n_bytes / 2**20:.1f} MiB, {len(t.tokens):,} tokens "
        f"({t.n_bytes / len(t.tokens):.2f} bytes each); held out {v.n_documents:,}, {v.n_bytes / 2**20:.1f} MiB"
    )


def finish(
    config: PretrainConfig, run: Run, corpus: Corpus, state: TrainState, machine: hardware.Machine, teller: Teller
) -> None:
    """Score, sample, write the receipt and the report, and name one thing to do next."""
    c = state.counters
    teller.say("scoring held-out text, sampling, writing the report")
    score = held_out_score(state.model, corpus.val, corpus, config, config.eval.final_tokens)
    final = {"eval/bits_per_byte": score.bits_per_byte, "time/seconds": c.seconds, "train/tokens": c.tokens}
    if score.mtp_accept is not None:
        final["eval/mtp_accept"] = score.mtp_accept
    run.log(c.step, final)
    write_evals(config, run, corpus, state, score)
    write_samples(run, corpus, state)
    next_command = f'shoal generate {typed(run)} --prompt "def main("'
    account = cost.account(
        config.model, _plan.mean_context(config, corpus), c.tokens, c.seconds, machine, config.dtype,
        mtp_share=config.loss.mtp_share, steps=c.step,
        peak_memory_bytes=int(run.series("memory/peak_gib")[1][-1] * 2**30), bits_per_byte=score.bits_per_byte,
    )  # fmt: skip
    write_json(run.path / "receipt.json", asdict(account) | {"next_command": next_command})
    run.status(state="done", step=c.step, bits_per_byte=score.bits_per_byte)
    path = page.write(run.path)
    teller.say(f"result   {score.bits_per_byte:.4f} bits per byte on held-out text after {c.seconds / 60:.1f} minutes")
    teller.say(f"report   {path}")
    teller.say(f"next     {next_command}")


def write_evals(config: PretrainConfig, run: Run, corpus: Corpus, state: TrainState, score: Score) -> None:
    held_out = {
        "name": "held-out text", "metric": "bits_per_byte", "value": score.bits_per_byte, "better": "lower",
        "step": state.counters.step, "measured_on": f"{score.n_bytes:,} bytes of {corpus.val.n_documents:,} documents",
        "yardsticks": yardsticks(corpus),
    }  # fmt: skip
    write_json(run.evals / "held_out.json", held_out)
    if score.mtp_accept is not None:
        accept = {
            "name": "second token accepted", "metric": "share", "value": score.mtp_accept, "better": "higher",
            "step": state.counters.step, "measured_on": f"{score.drafted:,} held-out tokens, greedy",
        }  # fmt: skip
        write_json(run.evals / "mtp_accept.json", accept)
    if config.model.moe:
        write_json(run.evals / "expert_load.json", expert_load(config, corpus, state))


def yardsticks(corpus: Corpus) -> dict[str, float]:
    """Bits per byte of general compressors on the same held-out text."""
    text = val_text(corpus.val, corpus)[:XZ_BYTES]
    packed = {"gzip -9": gzip.compress(text, 9), "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * len(data) / len(text) for name, data in packed.items()}


def val_text(split: Split, corpus: Corpus) -> bytes:
    spans = pairwise(split.doc_starts.tolist())
    documents = (corpus.tokenizer.decode(split.tokens[a:b].tolist(), skip_special=True) for a, b in spans)
    return "".join(documents).encode()


@torch.no_grad()
def expert_load(config: PretrainConfig, corpus: Corpus, state: TrainState) -> dict:
    """Each expert's tokens as a share of an even load, on a training batch."""
    batch = training_loader(config, corpus).batch(state.counters.samples).to(state.device)
    _, routes = state.model.body(state.model.embed(batch.tokens_T), batch.positions_T, Packed(batch.lengths))
    share_LE = loads(routes).float()
    share_LE /= share_LE.mean(1, keepdim=True)
    layers = [i for i in range(config.model.n_layers) if config.model.is_moe(i)]
    return {"layers": layers, "load": share_LE.tolist()}


def write_samples(run: Run, corpus: Corpus, state: TrainState) -> None:
    """All prompts at once, by the engine, on the weights as they stand."""
    t = corpus.tokenizer
    before, stop = [] if t.bos_id is None else [t.bos_id], frozenset([] if t.eos_id is None else [t.eos_id])
    with closing(LocalEngine(state.model)) as engine:
        asked = []
        for number, prompt in enumerate(PROMPTS):
            tokens = (*before, *t.encode(prompt))
            most = min(MAX_TOKENS, engine.context - len(tokens))
            asked.append(Request(tokens, most, silent, Sampling(TEMPERATURE, TOP_P, seed=number), stop))
        answers = engine.generate(asked)
    for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        ids = [token.id for token in answer.tokens]
        sample = {
            "prompt": prompt, "text": t.decode(ids, True), "tokens": len(ids), "step": state.counters.step,
            "seed": number, "max_tokens": MAX_TOKENS, "temperature": TEMPERATURE, "top_p": TOP_P,
        }  # fmt: skip
        write_json(run.samples / f"{number}.json", sample)


def write_json(path: Path, value: dict) -> None:
    replace_text(path, json.dumps(value, indent=1) + "\n")
