"""Numbers as a person reads them, and the sentences a report opens with."""

import re

from shoal.model.config import MLAConfig, ModelConfig
from shoal.model.counts import count_parameters
from shoal.report.facts import Facts, number

LONGEST = 6000  # characters of a sample
MISSING, UNPREDICTED = "not measured", "not predicted"

ACCOUNT = {
    "tokens": "tokens read",
    "seconds": "training time",
    "flops": "FLOPs",
    "tokens_per_second": "tokens a second",
    "mfu": "MFU, of the measured product peak",
    "energy_kwh_estimate": "energy, an estimate",
    "usd": "cost",
    "steps": "steps",
    "peak_memory_bytes": "peak memory",
    "bits_per_byte": "held-out bits per byte",
}


def count(n: float) -> str:
    """4.21M, 107M, 37.0B: three significant digits."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.{3 - len(str(int(n / size)))}f}{suffix}"
    return f"{n:g}"


def short(n: float) -> str:
    """4.2M, 10K: two significant digits, for ticks."""
    digits = count(float(f"{n:.2g}"))
    return re.sub(r"\.?0+(?=[A-Z]|$)", "", digits) if "." in digits else digits


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def money(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 1 else f"{100 * usd:.2g} ¢"


def exponent(n: float) -> str:
    mantissa, power = f"{n:.2e}".split("e")
    return f"{mantissa} × 10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def amount(field: str, value: float) -> str:
    """A field of plan.cost.Account with its unit."""
    if field == "energy_kwh_estimate":
        return f"{1000 * value:.1f} Wh" if value < 1 else f"{value:,.1f} kWh"
    form = {
        "tokens": count,
        "seconds": duration,
        "flops": exponent,
        "tokens_per_second": "{:,.0f}".format,
        "mfu": "{:.1%}".format,
        "usd": money,
        "steps": "{:,.0f}".format,
        "peak_memory_bytes": lambda n: f"{n / 2**30:.2f} GiB",
        "bits_per_byte": "{:.3f}".format,
    }
    return form[field](value)


def score(metric: object, value: object) -> str:
    """An evaluation's value: shares in percent, anything else with its metric behind it."""
    n = number(value)
    if n is None:
        return MISSING
    return share(n) if metric in ("share", "accuracy") else f"{n:.4g} {metric}".replace("_", " ")


def share(value: float) -> str:
    return f"{value:.1%}"


def change(before: float | None, after: float | None) -> str:
    """ "+1.5%", with a real minus; nothing where either is missing."""
    if not before or after is None:
        return ""
    percent = 100 * (after / before - 1)
    return "0%" if abs(percent) < 0.05 else f"{percent:+.1f}%".replace("-", "−")


def kind(m: ModelConfig) -> str:
    """ "a mixture-of-experts model with latent attention and multi-token prediction"."""
    parts = ["latent attention"] if isinstance(m.attention, MLAConfig) else ["grouped-query attention"]
    parts += ["multi-token prediction"] if m.n_mtp else []
    return ("a mixture-of-experts model" if m.moe else "a dense model") + " with " + " and ".join(parts)


def verdict(f: Facts) -> list[str]:
    """What was trained, how well it came out, and whether the plan was kept: one sentence in parts.

    The first part is the headline, the others follow it; a part whose numbers are missing says so.
    """
    what = "A language model"
    if f.model:
        n = count_parameters(f.model)
        what = f"A {count(n.total)}-parameter language model"
    value = f.bits_per_byte()
    if told := of_stage(f):
        head = told
    elif value is None:
        head = f"{what} whose quality on held-out text was not measured"
    else:
        head = f"{what} that needs {value:.3f} bits per byte of text it never saw{against(f, value)}"
    return [head, *filter(None, (trained(f), kept(f)))]


def of_stage(f: Facts) -> str:
    """The headline of fine-tuning, of distillation, and of rejection sampling; "" of pretraining."""
    kind, kept = text(f.status.get("recipe")), number(f.evals.get("kept", {}).get("value"))
    if kind == "samples" and kept is not None:
        return f"Of a model's answers {share(kept)} were right, readable, and not said before"
    losses = f.series.get("train/loss", [])
    learnt = {"sft": "A model that learned its lessons", "distill": "A student that learned from its teacher"}.get(kind)
    if learnt and len(losses) > 1:
        return f"{learnt}: from {losses[0][1]:.2f} to {losses[-1][1]:.2f} nats a token"
    return ""


def against(f: Facts, value: float) -> str:
    """ "…, 35% less than xz -9e": the strongest of the yardsticks."""
    known = f.yardsticks()
    if not known:
        return ""
    name = min(known, key=known.__getitem__)
    change = value / known[name] - 1
    return f", {abs(change):.0%} {'less' if change < 0 else 'more'} than {name}"


def trained(f: Facts) -> str:
    if f.status.get("recipe") == "samples":
        return ""  # nothing was
    seconds = number(f.receipt.get("seconds")) or f.last("time/seconds")
    tokens = number(f.receipt.get("tokens")) or f.last("train/tokens")
    text = f"It is {kind(f.model)}, trained" if f.model else "It was trained"
    text += f" on {count(tokens)} tokens" if tokens else ""
    text += f" in {duration(seconds)}" if seconds else ""
    return f"{text}." if tokens or seconds else ""


def kept(f: Facts) -> str:
    planned, took = number(f.plan.get("seconds")), number(f.receipt.get("seconds"))
    if not planned or not took:
        return "How long it would take was not predicted." if took else ""
    change = took / planned - 1
    if abs(change) < 0.005:
        return f"The predicted {duration(planned)} were kept."
    return f"It took {abs(change):.0%} {'longer' if change > 0 else 'less'} than the {duration(planned)} predicted."


def tiles(f: Facts) -> list[tuple[str, str, str]]:
    """(label, figure, note) of the four numbers one looks for first."""
    seconds = number(f.receipt.get("seconds")) or f.last("time/seconds")
    tokens = number(f.receipt.get("tokens")) or f.last("train/tokens")
    rate = number(f.receipt.get("tokens_per_second")) or f.last("speed/tokens_per_second")
    usd = number(f.receipt.get("usd"))
    usd = usd if usd is not None else f.last("cost/usd")
    mfu = number(f.receipt.get("mfu")) or f.last("speed/mfu")
    value = f.bits_per_byte()
    planned = number(f.plan.get("seconds"))
    return [
        (
            "held-out text",
            f"{value:.3f}" if value is not None else MISSING,
            "bits per byte" if value is not None else "",
        ),
        ("training time", duration(seconds) if seconds else MISSING, f"{duration(planned)} planned" if planned else ""),
        ("tokens read", count(tokens) if tokens else MISSING, f"{rate:,.0f} a second" if rate else ""),
        ("cost", money(usd) if usd is not None else MISSING, f"{mfu:.0%} of the machine's peak" if mfu else ""),
    ]


def text(value: object) -> str:
    return value if isinstance(value, str) else ""


def clipped(sample: dict) -> dict:
    """A sample whose text is no longer than a page wants to show; what is cut off is counted."""
    written = text(sample.get("text"))
    more = f"\n… {len(written) - LONGEST:,} characters more" if len(written) > LONGEST else ""
    return sample | {"prompt": text(sample.get("prompt")), "text": written[:LONGEST] + more}


def line(text: object) -> str:
    """Foreign text as one line of Markdown: nothing in it opens a table cell, a tag or a link."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def block(text: object) -> str:
    """Foreign text as a Markdown code block, fenced by more backticks than it holds."""
    longest = max((len(run) for run in re.findall(r"`+", str(text))), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
