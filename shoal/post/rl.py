"""Reinforcement learning with verifiable rewards: the loop, as it happens.

    collect groups → grade → advantages → update → tell the engine → now and then a checkpoint

The engine draws on the trainer's own tensors; after each update it forgets what it computed, and the next step checks
that its log-probabilities are the trainer's: a gap above `policy.most_gap` ends the run, because answers would then be
judged by weights that never wrote them. Prompts are training items of the tasks alone.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shoal.data.draws import mix
from shoal.data.tokenizer import Tokenizer
from shoal.engine import native
from shoal.engine.cache import bytes_per_token
from shoal.engine.engine import MAX_BATCH_TOKENS, LocalEngine
from shoal.engine.pages import UNIT, units
from shoal.errors import ConfigError, TrainingError
from shoal.model.transformer import Transformer
from shoal.post import grpo, judge, policy
from shoal.post.policy import Graded, Objective
from shoal.post.rewards import reward, well_formed
from shoal.post.rl_config import RLConfig
from shoal.post.rollout import Group, Rollouts
from shoal.run import Run
from shoal.tasks.curriculum import Curriculum
from shoal.tasks.grading import Graders
from shoal.tasks.task import Item, Task, draw, extract_answer
from shoal.train import loop
from shoal.train.checkpoint import Saver
from shoal.train.config import BatchConfig, LossConfig, PretrainConfig
from shoal.train.loop import Clock
from shoal.train.step import StepResult, TrainState, train_step
from shoal.train.stop import Stop

KEPT_GROUPS = 2  # of a step, written down token by token for `shoal samples`
PROMPT_TOKENS = 4096  # that the engine reads at a time: nobody waits for a first one
SAMPLES, JUDGED = "rollouts.jsonl", "judged.jsonl"


@dataclass
class Stage:
    """What the loop works with."""

    config: RLConfig
    run: Run
    state: TrainState
    rollouts: Rollouts
    curriculum: Curriculum
    graders: Graders
    taste: judge.Preference
    say: Callable[[str], None] = lambda words: None
    reference: Transformer | None = None
    iteration: int = 0
    scores: list[float | None] = field(default_factory=list)  # what the judge said of this step's answers


def reinforce(
    config: RLConfig,
    run: Run,
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    planned_steps: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    show: Callable[[Mapping[str, float]], None] = lambda metrics: None,
    say: Callable[[str], None] = lambda words: None,
) -> TrainState:
    """Train `model` until the budget is spent or somebody asks to stop (then `loop.steps_left` is above 0).

    Raises TrainingError where engine and trainer disagree, or too many updates in a row are skipped.
    """
    state = TrainState(train_config(config, model), device, model)
    if resume:
        loop.restore(state, run, say)
        loop.forget_evidence(run.samples / SAMPLES, state.counters.step)
    saver = Saver(run.checkpoints, loop.model_writer(model.config, tokenizer), config.checkpoint.keep)
    taste = judge.preference(config.judge, run.logs / JUDGED)
    with (
        Stop(say) as stop,
        closing(saver),
        closing(engine_for(config, state.model)) as engine,
        Graders() as graders,
        taste,
    ):
        stage = begun(config, run, state, engine, tokenizer, tasks, graders, taste, say)
        clock, saved, silent = loop.begin(state, planned_steps or 100), state.counters.step, False
        while loop.steps_left(state) and not stop.asked:
            metrics = iterate(stage, clock)
            silent = told_of_silence(metrics, config, silent, say)
            loop.replan(state, clock)
            run.log(state.counters.step, metrics)
            show({"step": state.counters.step, "total_steps": state.counters.total_steps, **metrics})
            if loop.save_due(state, clock, saved):
                saved = save(stage, saver, clock)
                loop.replan(state, clock)
            saver.check()
        if saved != state.counters.step:
            save(stage, saver, clock)
    return state


def told_of_silence(metrics: Mapping[str, float], config: RLConfig, silent: bool, say: Callable[[str], None]) -> bool:
    """Whether a judge scored nothing in this step; said when it begins, for the run goes on without preferences."""
    now = metrics.get("rl/unjudged") == 1
    if now and not silent:
        say(f"warning  the judge at {config.judge.url} scores nothing: answers are learnt from without preferences")
    return now


def train_config(config: RLConfig, model: Transformer) -> PretrainConfig:
    """The part of a stage that a training step reads."""
    p = config.policy
    if config.recompute and p.replay_routes:
        raise ConfigError("recompute with replayed routes", "one of the two", "set --policy.replay_routes false")
    mtp = p.mtp_weight if len(model.mtp) else 0.0
    loss = LossConfig(mtp, mtp, balance_alpha=p.balance_alpha, bias_speed=p.bias_speed, bias_until=1.0)
    return PretrainConfig(
        replace(model.config, max_positions=max(model.config.max_positions, policy.ROUND)),
        batch=BatchConfig(context=policy.ROUND, samples=1),
        optim=config.optim, schedule=config.schedule, loss=loss, checkpoint=config.checkpoint, safety=config.safety,
        steps=config.steps, minutes=config.minutes, dtype=config.dtype, recompute=config.recompute, seed=config.seed,
    )  # fmt: skip


def engine_for(config: RLConfig, model: Transformer) -> LocalEngine:
    """With room for every answer of a step at once. Where it costs little, no row's numbers depend on another's."""
    few = config.rollout.prompts * config.rollout.group <= MAX_BATCH_TOKENS and not config.rollout.slice
    at_once = PROMPT_TOKENS if few else MAX_BATCH_TOKENS  # as many answers may run at once, too
    return LocalEngine(model, cache_bytes(config, model), longest(config), at_once, deterministic=native.takes(model))


def cache_bytes(config: RLConfig, model: Transformer) -> int:
    """Of all answers of a step at once."""
    answers, dtype = config.rollout.prompts * config.rollout.group, model.embed.weight.dtype
    return answers * longest(config) * bytes_per_token(model.config, model.config.n_layers, dtype)


def longest(config: RLConfig) -> int:
    """Tokens of a prompt and its answer, in whole units of the cache."""
    return units(config.rollout.prompt_tokens + config.rollout.max_tokens) * UNIT


def largest(config: RLConfig, model: Transformer) -> PretrainConfig:
    """The training step of a stage, with the most tokens that go through the model at once."""
    r = config.rollout
    tokens = min(config.policy.micro_tokens, r.prompts * r.group * longest(config))
    batch = BatchConfig(context=policy.ROUND, samples=-(-tokens // policy.ROUND), accumulate=2)
    return replace(train_config(config, model), batch=batch)


def begun(
    config: RLConfig,
    run: Run,
    state: TrainState,
    engine: LocalEngine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    graders: Graders,
    taste: judge.Preference,
    say: Callable[[str], None] = lambda words: None,
) -> Stage:
    by_name = {task.name: task for task in tasks}
    curriculum = Curriculum(tasks, config.levels, even=not config.curriculum)
    seed = mix(config.seed, 0, 1)

    def item(index: int, task: str, level: int) -> Item:
        return draw([by_name[task]], seed, index, "train", [level])

    def next_item(index: int) -> Item:
        return item(index, *curriculum.choose(seed, index))

    rollouts = Rollouts(engine, tokenizer, config.rollout, seed, next_item, routes=config.policy.replay_routes)
    stage = Stage(config, run, state, rollouts, curriculum, graders, taste, say)
    if saved := state.counters.stage:
        stage.iteration = saved["iteration"]
        curriculum.load(saved["curriculum"])
        rollouts.load(saved["rollouts"], item)
    rollouts.synchronise(state.counters.updates)
    return stage


def iterate(stage: Stage, clock: Clock) -> dict[str, float]:
    """One step of reinforcement: answers, grades, updates. Its metrics."""
    state, began = stage.state, time.perf_counter()
    stage.scores = []
    if stage.rollouts.version != state.counters.updates:
        got = f"rollouts of version {stage.rollouts.version} for weights of version {state.counters.updates}"
        raise TrainingError(got, "the same", "call Rollouts.synchronise after every update")
    groups, rewards_SG, seen = collected(stage)
    fresh = [v == stage.rollouts.version for g in seen for s in g.samples for v in s.versions]
    drawn = time.perf_counter()
    results, objectives = update(stage, groups, rewards_SG)
    stage.iteration += 1
    stage.rollouts.synchronise(state.counters.updates)
    clock.stepped()
    for result, objective in zip(results, objectives, strict=True):
        if result.skipped:
            loop.keep_evidence(state, stage.run, objective.batches, result, stage.say)
    if results:
        loop.stop_after_too_many_skips(state, results[-1])
    metrics = measured(stage, seen, results, objectives) | {
        "rl/stale": 1 - sum(fresh) / max(1, len(fresh)),
        "time/rollout": drawn - began,
        "time/update": time.perf_counter() - drawn,
        "time/seconds": state.counters.seconds,
        "time/eta": loop.steps_left(state) * clock.seconds_per_step,
        "speed/samples_per_second": sum(len(g.samples) for g in seen) / clock.recent[-1],
    }
    write_samples(stage, groups, rewards_SG, objectives)
    return metrics


def collected(stage: Stage) -> tuple[list[Group], Tensor, list[Group]]:
    """Graded groups to learn from, their rewards [S, G], and all that were drawn for them."""
    c, variant = stage.config, grpo.VARIANTS[stage.config.policy.variant]
    groups: list[Group] = []
    seen: list[Group] = []
    for _ in range(1 + (c.rollout.refills if variant.refill and not c.rollout.slice else 0)):
        new = stage.rollouts.collect(c.rollout.prompts - len(groups))
        grade(stage, new, variant)
        seen += new
        groups += [g for g in new if not variant.refill or len({s.reward for s in g.samples}) > 1]
        if len(groups) == c.rollout.prompts:
            break
    rewards_SG = torch.tensor([[s.reward for s in g.samples] for g in groups]).reshape(len(groups), c.rollout.group)
    return groups, rewards_SG, seen


def grade(stage: Stage, groups: Sequence[Group], variant: grpo.Variant) -> None:
    """Outcome and reward of every answer; the curriculum hears how often each prompt was solved.

    Where a grader or a judge failed there is no evidence: the answer gets its group's mean, which teaches nothing.
    """
    c = stage.config
    for s in (s for g in groups for s in g.samples):
        s.text = stage.rollouts.completion(s)
    outcomes = iter(stage.graders.grade([(g.item, extract_answer(s.text)) for g in groups for s in g.samples]))
    for g, liked in zip(groups, preferred(stage, groups)):
        for s, preference in zip(g.samples, liked):
            s.outcome = next(outcomes)
            s.reward = reward(c.rewards, g.item.prompt, s.text, s.outcome) + c.rewards.preference * preference
            if variant.overlong:
                s.reward += grpo.overlong_penalty(len(s.tokens), c.rollout.max_tokens, variant.overlong)
        known = [s for s in g.samples if s.outcome != "failed"]
        for s in g.samples:
            if s.outcome == "failed":
                s.reward = sum(k.reward for k in known) / max(1, len(known))
        if known:
            right = sum(s.outcome == "right" for s in known)
            stage.curriculum.record(g.item.task, g.item.level, right / len(known))


def preferred(stage: Stage, groups: Sequence[Group]) -> list[list[float]]:
    """What the answers of each group are worth to the judge, where that counts."""
    if not stage.config.rewards.preference:
        return [[0.0] * len(g.samples) for g in groups]
    scores = stage.taste.scores([(g.item.prompt, s.text) for g in groups for s in g.samples])
    stage.scores += scores
    found = iter(scores)
    return [judge.shares([next(found) for _ in g.samples]) for g in groups]


def update(stage: Stage, groups: Sequence[Group], rewards_SG: Tensor) -> tuple[list[StepResult], list[Objective]]:
    """The updates of one step, on the answers whose groups teach something. None of them: no update."""
    c, state, p = stage.config, stage.state, stage.config.policy
    refer(stage)
    if not len(groups) or not bool(grpo.teaches(rewards_SG).any()):
        state.count_idle()
        return [], []
    answers = weighed(groups, rewards_SG, grpo.VARIANTS[p.variant], c.rollout.max_tokens)
    parts = [answers[k :: p.minibatches] for k in range(min(p.minibatches, len(answers)))]
    made = [list(policy.packed(part, stage.rollouts.version, p.micro_tokens)) for part in parts]
    references = [[policy.scored(stage.reference, r) if stage.reference else None for r in part] for part in made]
    several = len(made) > 1
    old = [[policy.scored(state.model, r, p.replay_routes) if several else None for r in part] for part in made]
    results, objectives = [], []
    for rollouts, its_old, its_references in zip(made, old, references):
        objective = Objective(p, rollouts, its_old, its_references)
        with policy.replayed(state.model, rollouts if p.replay_routes else []) as routers:
            results.append(train_step(state, [r.batch for r in rollouts], objective, objective.attend))
        objective.flips = sum(router.flips for router in routers)
        if not objectives:
            require_same_weights(p.most_gap, objective)
        objectives.append(objective)
    return results, objectives


def weighed(groups: Sequence[Group], rewards_SG: Tensor, variant: grpo.Variant, most: int) -> list[Graded]:
    """The answers that have an advantage. What their tokens count is reckoned over all answers of the step."""
    advantages_SG = grpo.advantages(rewards_SG, variant.by_std)
    samples = [(g.prompt, s) for g in groups for s in g.samples]
    lengths_S = torch.tensor([len(s.tokens) for _, s in samples])
    weights_S = grpo.answer_weights(lengths_S, variant.average, most)
    worth = zip(samples, advantages_SG.flatten().tolist(), weights_S.tolist())
    return [Graded(prompt, s, a, w) for (prompt, s), a, w in worth if a]


def refer(stage: Stage) -> None:
    """Keep or renew the reference that the policy is drawn to, where it is; a checkpoint has it."""
    p, state = stage.config.policy, stage.state
    if not p.kl_weight:
        return
    if not state.stage or stage.iteration % p.reference_steps == 0:
        state.stage = {name: t.clone() for name, t in state.model.state_dict().items()}
        stage.reference = None
    if stage.reference is None:
        stage.reference = Transformer(state.model.config).to(state.device).set_dtype(state.model.embed.weight.dtype)
        stage.reference.load_state_dict(state.stage)


def require_same_weights(most_gap: float, objective: Objective) -> None:
    gap = objective.gap()
    if gap and not gap.mean <= most_gap:
        raise TrainingError(
            f"engine and trainer differ by {gap.mean:.3g} nats a token on the same weights",
            f"at most {most_gap:g}",
            "the engine holds other weights: synchronise it, or build it on the trainer's model",
        )


def measured(
    stage: Stage,
    seen: Sequence[Group],
    results: Sequence[StepResult],
    objectives: Sequence[Objective],
) -> dict[str, float]:
    samples = [s for g in seen for s in g.samples]
    n, tokens = max(1, len(samples)), max(1, sum(len(s.tokens) for s in samples))
    metrics = {
        "rl/answers": len(samples),
        "rl/accuracy": sum(s.outcome == "right" for s in samples) / n,
        "rl/failed": sum(s.outcome == "failed" for s in samples) / n,
        "rl/reward": sum(s.reward for s in samples) / n,
        "rl/format": sum(well_formed(s.text) for s in samples) / n,
        "rl/length": tokens / n,
        "rl/unfinished": sum(s.finish == "length" for s in samples) / n,
        "rl/entropy": -sum(p for s in samples for p in s.logprobs) / tokens,
        "rl/teaching": sum(len({s.reward for s in g.samples}) > 1 for g in seen) / max(1, len(seen)),
    }
    if stage.scores:
        metrics["rl/unjudged"] = stage.scores.count(None) / len(stage.scores)
    metrics |= {f"solved/{task}/{level}": rate for task, level, rate in stage.curriculum.state()}
    if results:
        last = results[-1]
        metrics |= {"train/loss": last.loss, "train/grad_norm": last.grad_norm, "train/lr": last.lr}
        metrics["train/skipped"] = sum(result.skipped is not None for result in results)
        if last.mtp_loss is not None:
            metrics["train/mtp_loss"] = last.mtp_loss
        if last.loads_LE is not None:
            metrics["moe/load_max_over_mean"] = last.load_max_over_mean
        found = [surrogate for o in objectives for surrogate, _, _ in o.found]
        metrics["rl/clipped"] = sum(s.clipped for s in found) / len(found)
        metrics["rl/truncated"] = sum(s.truncated for s in found) / len(found)
        metrics["rl/kl"] = sum(s.kl for s in found) / len(found)
        if gap := objectives[0].gap():
            metrics |= {"gap/mean": gap.mean, "gap/max": gap.most, "gap/k3": gap.k3, "gap/flips": objectives[0].flips}
    return metrics


def write_samples(stage: Stage, groups: Sequence[Group], rewards_SG: Tensor, objectives: Sequence[Objective]) -> None:
    """The first groups of a step, token by token."""
    ratios = {seed: row for o in objectives for seed, row in o.ratios().items()}
    variant = grpo.VARIANTS[stage.config.policy.variant]
    advantages_SG = grpo.advantages(rewards_SG, variant.by_std).tolist() if len(groups) else []
    with open(stage.run.samples / SAMPLES, "a", encoding="utf-8") as file:
        for g, its in list(zip(groups, advantages_SG))[:KEPT_GROUPS]:
            for number, (s, advantage) in enumerate(zip(g.samples, its)):
                line = {
                    "step": stage.state.counters.step, "index": g.index, "sample": number, "task": g.item.task,
                    "level": g.item.level, "prompt": g.item.prompt, "expected": g.item.answer,
                    "text": s.text, "outcome": s.outcome, "reward": s.reward,
                    "advantage": advantage, "finish": s.finish, "versions": sorted(set(s.versions)),
                    "tokens": [stage.rollouts.tokenizer.decode([t], True) for t in s.tokens],
                    "logprobs": [round(p, 4) for p in s.logprobs],
                    "ratios": [round(x, 4) for x in ratios.get(s.seed, [])],
                }  # fmt: skip
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def save(stage: Stage, saver: Saver, clock: Clock) -> int:
    """The step that was saved."""
    c = stage.state.counters
    c.stage = {
        "iteration": stage.iteration,
        "curriculum": stage.curriculum.state(),
        "rollouts": stage.rollouts.state(),
    }
    loop.save(saver, stage.state, clock)
    return c.step
