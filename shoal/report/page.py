"""One offline page that shows what a run did: `write(run)` makes report.html and report.md from a run directory.

Read are config.toml, config.origin.json, command.txt, env.json, status.json, metrics.jsonl (see run.py), and these,
all optional, fields too; numbers are plain JSON numbers:

    samples/rollouts.jsonl  what reinforcement learnt from (`dialogues.py`), beside its metrics (`reinforcement.py`)
    samples/NAME.json   {prompt, text, step, temperature, top_p, seed, tokens}       `text` is the continuation alone
    evals/NAME.json     {name, metric, value, better: "lower" | "higher", step, measured_on, yardsticks: {name: value}}
    evals/held_out.json the same with metric "bits_per_byte": the verdict; yardsticks are compressors on the same text
    evals/NAME.json     besides these {budgets: [{budget, rows: [{task, level, items, accuracy, interval, k: [1, 2, 4],
                        pass_at_k, cons_at_k, thinking_tokens}]}]}, rows[0] being the whole
    evals/expert_load.json  {layers: [number of each layer], load: [[share of an even load, per expert], per layer]}
    plan.json           plan.cost.Account's fields as predicted, and why: [sentences], machine: {name, …}
    receipt.json        plan.cost.Account's fields as they turned out, and next_command

What is missing of a pretraining run is shown as not measured, what is damaged is named. Whatever a model wrote is text
and nothing else: every value is escaped, the page runs no script and its content policy would not let it, and nothing
is fetched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2

from shoal.model.config import MLAConfig, ModelConfig
from shoal.model.counts import count_parameters
from shoal.plan import cost, memory
from shoal.report import curves, plots, reasoning, reinforcement, words
from shoal.report.dialogues import Dialogue, ends
from shoal.report.facts import Facts, flat, items, number, numbers, read
from shoal.run import replace_text

SPARKLINES = (
    "train/loss", "eval/bits_per_byte", "speed/tokens_per_second", "moe/load_max_over_mean", "rl/accuracy", "rl/reward",
    "rl/length", "rl/entropy", "rl/teaching", "gap/k3",
)  # fmt: skip
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: bool(name and name.endswith(".html")),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.ChainableUndefined,
)
TEMPLATES.filters |= {"line": words.line, "block": words.block}


def write(run: Path | str, name: str = "report") -> Path:
    """Write report.html and report.md, or others by name, into the run and return the path of the page. RunError where
    there is no run."""
    folder = Path(run)
    view = look(read(folder), shown(folder), ends(folder))
    for suffix, template in (("html", "template.html"), ("md", "template.md.jinja")):
        replace_text(folder / f"{name}.{suffix}", TEMPLATES.get_template(template).render(view))
    return folder / f"{name}.html"


def shown(folder: Path) -> str:
    """The path as a user in the current directory would type it."""
    resolved = folder.resolve()
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(folder)


def look(facts: Facts, path: str, answers: Sequence[Dialogue] = ()) -> dict[str, Any]:
    """Everything the templates print, in words and geometry. `answers` are some that the run learnt from."""
    solved, rl, stage = reasoning.evaluations(facts), reinforcement.reinforced(facts), bool(words.of_stage(facts))
    tiles = reinforcement.tiles(facts) if rl else words.tiles(facts)
    return {
        "facts": facts,
        "verdict": reinforcement.verdict(facts) if rl else words.verdict(facts),
        "state": facts.status.get("state"),
        "tiles": [tile for tile in tiles if not stage or tile[1] != words.MISSING],
        "pretrained": not rl and not stage,  # then a part that is missing is a gap, and shown as one
        "bars": yardsticks(facts),
        "school": school(facts.model),
        "charts": reinforcement.charts(facts) if rl else [chart for make in curves.ALL if (chart := make(facts))],
        "reinforced": {"levels": reinforcement.levels(facts), "talks": reinforcement.talks(answers)} if rl else None,
        "sparklines": list(sparklines(facts)),
        "heat": heat(facts.evals.get("expert_load", {})),
        "samples": [words.clipped(s) for s in facts.samples],
        "evals": [e for name, e in facts.by_step() if name not in ("held_out", "expert_load") and "metric" in e],
        "solved": {"charts": reasoning.charts(solved), "tables": list(reasoning.tables(solved))},
        "receipt": list(receipt(facts)),
        "why": items(facts.plan, "why"),
        "model": list(model_rows(facts.model)) if facts.model else [],
        "chosen": [
            (k, v, facts.origins[k]) for k, v in flat(facts.config) if facts.origins.get(k, "default") != "default"
        ],
        "env": list(flat(facts.env)),
        "next_command": words.text(facts.receipt.get("next_command")) or next_command(path, rl, stage),
        "words": words,
    }


def next_command(path: str, reinforced: bool, stage: bool) -> str:
    if reinforced:
        return f"shoal samples {path}"
    return f"shoal chat {path}" if stage else f'shoal generate {path} --prompt "def main("'


def yardsticks(facts: Facts) -> list[dict[str, Any]]:
    """Bits per byte of this model and of ordinary compressors on the same text, the best last."""
    value = facts.bits_per_byte()
    if value is None:
        return []
    rows = [(name, y, False) for name, y in facts.yardsticks().items()] + [("this model", value, True)]
    most = max(y for _, y, _ in rows)
    return [
        {"name": name, "value": y, "width": plots.clamp(100 * y / most, 0, 100) if most else 0, "ours": ours}
        for name, y, ours in sorted(rows, key=lambda row: -row[1])
    ]


def school(model: ModelConfig | None) -> list[dict[str, Any]]:
    """The routed experts of a layer as fish on a sunflower's spiral, the ones a token meets lit."""
    if model is None:
        return []
    n, lit = (model.moe.n_routed_experts, model.moe.n_activated) if model.moe else (1, 1)
    return [plots.fish(i, n) | {"lit": i * lit % n < lit} for i in range(n)]


def sparklines(facts: Facts) -> Iterator[tuple[str, str, float, float]]:
    for name in SPARKLINES:
        if points := facts.series.get(name):
            yield name, plots.sparkline(points), points[0][1], points[-1][1]


def heat(load: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of expert shares, 1.0 being a fair one; a row that isn't numbers is left out."""
    rows = [(name, numbers(row)) for name, row in zip(items(load, "layers"), items(load, "load"))]
    return [{"name": n, "cells": [plots.heat_cell(x) for x in row], "peak": max(row)} for n, row in rows if row]


def receipt(facts: Facts) -> Iterator[tuple[str, str, str, str]]:
    """(what, predicted, actual, actual against predicted) for every figure that either side knows."""
    for field in fields(cost.Account):
        before, after = (number(side.get(field.name)) for side in (facts.plan, facts.receipt))
        if before is None and after is None:
            continue
        yield (
            words.ACCOUNT[field.name],
            words.UNPREDICTED if before is None else words.amount(field.name, before),
            words.MISSING if after is None else words.amount(field.name, after),
            words.change(before, after),
        )


def model_rows(m: ModelConfig) -> Iterator[tuple[str, str]]:
    """The model in a table: size, parts, and what serving it keeps of a token."""
    counts, a = count_parameters(m), m.attention
    yield "parameters", f"{words.count(counts.total)}, of which {words.count(counts.active)} active a token"
    if m.n_mtp:
        yield "multi-token modules", f"{m.n_mtp}, {words.count(counts.mtp_total)} parameters more"
    yield "layers × width", f"{m.n_layers} × {m.dim}"
    if isinstance(a, MLAConfig):
        yield "attention", f"latent (MLA), {a.n_heads} heads, latent of {a.kv_lora_rank} + {a.qk_rope_head_dim} rotary"
    else:
        yield "attention", f"grouped-query, {a.n_heads} heads on {a.n_kv_heads} of {a.head_dim}"
    if m.moe:
        e = m.moe
        yield "experts a layer", f"{e.n_routed_experts} routed of width {e.moe_dim}, {e.n_activated} chosen"
        yield "shared experts", f"{e.n_shared_experts}, seen by every token"
        yield "dense layers", f"{m.moe.n_dense_layers} of width {m.hidden_dim}"
    else:
        yield "feed-forward", f"dense, width {m.hidden_dim}"
    yield "vocabulary", f"{m.vocab_size:,}" + (", embeddings tied" if m.tie_embeddings else "")
    yield "cache", cache_words(m)


def cache_words(m: ModelConfig) -> str:
    ours, whole = memory.cache_bytes_per_token(m), memory.grouped_cache_bytes_per_token(m, 1)
    quarter = memory.grouped_cache_bytes_per_token(m, 4)
    text = f"{ours:,} bytes a token in bf16"
    if isinstance(m.attention, MLAConfig):
        text += f"; grouped-query with a quarter of the heads {quarter:,}"
    return text + f"; every head kept {whole:,} ({whole / ours:.1f}×)"
