"""A pretraining job from end to end: look at the machine, prepare the text, plan, train, score, sample, report.

Every recipe goes through here; `shoal pretrain` and `shoal quickstart` only read flags. What each stage found is left
in the run directory (plan.json, evals/, samples/, receipt.json), from which the report is made.
"""

import dataclasses
import gzip
import json
import lzma
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from shoal import runtime
from shoal.data.corpus import Corpus, Split, prepare
from shoal.model.attend import Packed
from shoal.model.counts import count_parameters
from shoal.model.sample import generate
from shoal.ops import dispatch as ops
from shoal.plan import cost, flops, hardware, memory, size
from shoal.report import page
from shoal.run import Run, replace_text
from shoal.runtime import Runtime
from shoal.tasks.arithmetic import GENERATORS
from shoal.train.balance import loads
from shoal.train.config import PretrainConfig
from shoal.train.pretrain import Economy, held_out_score, pretrain, steps_left, training_loader
from shoal.train.step import TrainState, train_step

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
PROMPTS = ("def ", "class ", "import os\n\n\ndef read_lines(path):\n")
SAMPLE = {"max_tokens": 160, "temperature": 0.6, "top_p": 0.95}
XZ_BYTES = 64 << 20  # of held-out text are compressed for comparison


@dataclasses.dataclass(frozen=True)
class Teller:
    """How a job speaks: `say` a sentence, `show` a line of metrics."""

    say: Callable[[str], None]
    show: Callable[[dict], None]


def run_job(config: PretrainConfig, run: Run, teller: Teller, resume: bool = False) -> int:
    """0 when the run is complete, 130 when it was asked to stop and left a checkpoint."""
    with run.lock():
        setup = runtime.setup(config.threads or run.env().get("threads"), config.seed)
        teller.say(f"machine  {setup.description}; {ops.describe()}")
        corpus = prepare(config.data, GENERATORS, say=lambda words: teller.say(f"text     {words}"))
        teller.say(f"text     {described(corpus)}")
        machine = run_machine(run, setup, resume)
        plan = plan_of(config, corpus, machine, setup.device, teller)
        write_json(run.path / "plan.json", plan)
        run.status(state="training")
        try:
            economy = economy_of(config, machine)
            state = pretrain(config, run, corpus, economy, setup.device, resume, teller.show, teller.say)
        except BaseException as error:
            run.status(state="failed", error=str(error) or type(error).__name__)
            raise
        if steps_left(state):
            run.status(state="stopped", step=state.counters.step)
            teller.say(f"stopped at step {state.counters.step}; continue with: shoal pretrain --resume {run.path.name}")
            return 130
        finish(config, run, corpus, state, machine, teller)
    return 0


def dry_run(config: PretrainConfig, teller: Teller) -> None:
    """Say what a run would take, from one real step, and leave nothing behind but the prepared text."""
    setup = runtime.setup(config.threads, config.seed)
    corpus = prepare(config.data, GENERATORS, say=lambda words: teller.say(f"text     {words}"))
    teller.say(f"text     {described(corpus)}")
    plan = plan_of(config, corpus, measured_machine(setup), setup.device, teller)
    for reason in plan["why"]:
        teller.say(f"because  {reason}")


def described(corpus: Corpus) -> str:
    t, v = corpus.train, corpus.val
    names = ", ".join(kind["source"] for kind in corpus.info["sources"])
    return (
        f"{names}: {t.n_documents:,} documents, {t.n_bytes / 2**20:.1f} MiB, {len(t.tokens):,} tokens "
        f"({t.n_bytes / len(t.tokens):.2f} bytes each); held out {v.n_documents:,}, {v.n_bytes / 2**20:.1f} MiB"
    )


def run_machine(run: Run, setup: Runtime, resume: bool) -> hardware.Machine:
    """The machine in numbers, measured at the start of a run and kept in env.json."""
    known = run.env().get("machine")
    if resume and known:
        return hardware.Machine(**known)
    machine = measured_machine(setup)
    run.write_env(threads=setup.threads, kernels=ops.describe(), machine=dataclasses.asdict(machine))
    return machine


def measured_machine(setup: Runtime) -> hardware.Machine:
    bf16, fp32 = (runtime.gemm_flops(dtype, setup.device, 0.6) for dtype in ("bfloat16", "float32"))
    read = runtime.read_bytes_per_s(setup.device, 0.4)
    if setup.device == "cpu":
        free = psutil.virtual_memory().available
        return hardware.cpu(runtime.cpu_model(), bf16, fp32, read, free, setup.threads)
    free, name = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    listed = next((g for key, g in hardware.GPUS.items() if key in name), None)
    price, watts = (listed.price_per_hour, listed.watts) if listed else (None, 350.0)
    return hardware.Machine(name, bf16, fp32, read, free, setup.threads, price, watts)


def economy_of(config: PretrainConfig, machine: hardware.Machine) -> Economy:
    per_token = flops.training(config.model, config.batch.context).total
    return Economy(per_token, machine.peak_flops(DTYPES[config.dtype]), machine.price_per_hour)


def memory_step(config: PretrainConfig) -> memory.Step:
    return memory.Step(
        tokens=config.batch.context * config.batch.samples,
        optimizer=config.optim.matrices,
        dtype=DTYPES[config.dtype],  # type: ignore[arg-type]
        accumulates=config.batch.accumulate > 1,
        recompute=config.recompute,
    )


def plan_of(config: PretrainConfig, corpus: Corpus, machine: hardware.Machine, device: str, teller: Teller) -> dict:
    """Predicted account and why, from one real step of this very model. Raises ResourceError where it does not fit."""
    need = memory.check(config.model, memory_step(config), machine.memory_bytes)
    teller.say(f"memory   about {need.total * memory.OVERHEAD / 2**30:.1f} of {machine.memory_bytes / 2**30:.1f} GiB")
    seconds, update = timed_step(config, corpus, device)
    measured = size.Measured(config.model, config.batch.context, memory_step(config).tokens, seconds, update)
    if config.minutes is not None:
        reserve = reserve_seconds(config, seconds)
        batch = config.batch.tokens
        plan = size.plan(measured, machine, config.minutes, memory_step(config), reserve, batch)
        account, why = plan.account, plan.why
    else:
        assert config.steps is not None
        step_seconds = seconds * config.batch.accumulate + update
        account = cost.account(
            config.model, config.batch.context, config.steps * config.batch.tokens, config.steps * step_seconds,
            machine, DTYPES[config.dtype], steps=config.steps, peak_memory_bytes=int(need.total * memory.OVERHEAD),
        )  # fmt: skip
        why = (
            f"{config.steps:,} steps of {config.batch.tokens:,} tokens were asked for; one took {step_seconds:.2f} s",
        )
    counts = count_parameters(config.model)
    teller.say(
        f"plan     {counts.total / 1e6:.1f}M parameters, {counts.active / 1e6:.1f}M active; {account.steps:,} steps, "
        f"{account.tokens / 1e6:.1f}M tokens, {account.tokens_per_second:,.0f} a second"
    )
    return {**dataclasses.asdict(account), "why": list(why), "machine": dataclasses.asdict(machine)}


def timed_step(config: PretrainConfig, corpus: Corpus, device: str) -> tuple[float, float]:
    """Seconds of one micro-batch forward and backward, and of the update: a throw-away model, the third step counts."""
    one = dataclasses.replace(config.batch, accumulate=1)
    trial = dataclasses.replace(config, batch=one, steps=1000, minutes=None)
    loss = dataclasses.replace(config.loss, mtp_from=0.0) if config.loss.mtp_from < 0.5 else config.loss
    state = TrainState(dataclasses.replace(trial, loss=loss), device)
    loader = training_loader(trial, corpus)
    seconds = []
    for i in range(4):
        began = time.perf_counter()
        train_step(state, [loader.batch(i * one.samples)])
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    gradients = [torch.zeros_like(slot.weight) for slot in state.optimizer.slots]
    state.optimizer.step(gradients, 5, 0.0, 1.0)
    update = time.perf_counter() - began
    return max(min(seconds[1:]) - update, 1e-4), update


def reserve_seconds(config: PretrainConfig, micro_seconds: float) -> float:
    """What the scores under way will take: a forward pass is about a third of a step."""
    per_token = micro_seconds / 3 / memory_step(config).tokens
    return config.eval.times * config.eval.tokens * per_token


def finish(
    config: PretrainConfig, run: Run, corpus: Corpus, state: TrainState, machine: hardware.Machine, teller: Teller
) -> None:
    """Score, sample, write the receipt and the report, and name one thing to do next."""
    c = state.counters
    teller.say("scoring held-out text, sampling, writing the report")
    score = held_out_score(state.model, corpus.val, corpus, config, config.eval.final_tokens)
    final = {"eval/bits_per_byte": score.bits_per_byte, "time/seconds": c.seconds, "train/tokens": c.tokens}
    if score.mtp_accept is not None:
        final["train/mtp_accept"] = score.mtp_accept
    run.log(c.step, final)
    write_evals(config, run, corpus, state, score)
    write_samples(run, corpus, state)
    next_command = f'shoal generate {run.path.name} --prompt "def main("'
    account = cost.account(
        config.model, config.batch.context, c.tokens, c.seconds, machine, DTYPES[config.dtype], steps=c.step,
        peak_memory_bytes=int(run.series("memory/peak_gib")[1][-1] * 2**30), bits_per_byte=score.bits_per_byte,
    )  # fmt: skip
    write_json(run.path / "receipt.json", dataclasses.asdict(account) | {"next_command": next_command})
    run.status(state="done", step=c.step, bits_per_byte=score.bits_per_byte)
    path = page.write(run.path)
    teller.say(f"result   {score.bits_per_byte:.4f} bits per byte on held-out text after {c.seconds / 60:.1f} minutes")
    teller.say(f"report   {path}")
    teller.say(f"next     {next_command}")


def write_evals(config: PretrainConfig, run: Run, corpus: Corpus, state: TrainState, score) -> None:
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
    batch = training_loader(config, corpus).batch(state.counters.samples)
    _, routes = state.model.body(state.model.embed(batch.tokens_T), batch.positions_T, Packed(batch.lengths))
    share_LE = loads(routes).float()
    share_LE /= share_LE.mean(1, keepdim=True)
    layers = [i for i in range(config.model.n_layers) if config.model.is_moe(i)]
    return {"layers": layers, "load": share_LE.tolist()}


def write_samples(run: Run, corpus: Corpus, state: TrainState) -> None:
    for number, prompt in enumerate(PROMPTS):
        ids = corpus.tokenizer.encode(prompt)
        ids = ([corpus.tokenizer.bos_id] if corpus.tokenizer.bos_id is not None else []) + ids
        stop = [t for t in (corpus.tokenizer.eos_id,) if t is not None]
        text = corpus.tokenizer.decode(list(generate(state.model, ids, seed=number, stop=stop, **SAMPLE)), True)
        sample = {"prompt": prompt, "text": text, "step": state.counters.step, "seed": number, **SAMPLE}
        write_json(run.samples / f"{number}.json", sample)


def write_json(path: Path, value: dict) -> None:
    replace_text(path, json.dumps(value, indent=1) + "\n")
