"""On-policy distillation: the student writes, the teacher judges every token of it, and the student is corrected.

    a step    prompts ─engine on the student's own weights─▶ samples ─teacher, one forward─▶ KL(student ‖ teacher)
              ─▶ one update ─▶ engine.forget()

A student that learns only its teacher's samples never sees what follows its own mistakes; here it does (arXiv
2306.13649). Against reinforcement learning, each token has a whole distribution for its reward.

The engine shares the trainer's weights, which change in place; what it computed from the old ones is forgotten before
it writes again. Prompts and draws are functions of the counters, and a `deterministic` engine gives each request the
same numbers whoever runs beside it: a resumed run ends bit-equal.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from shoal.data.chat import Chat, Message
from shoal.data.draws import mix, permuted
from shoal.data.loader import Batch
from shoal.data.tokenizer import Tokenizer
from shoal.engine.engine import LocalEngine
from shoal.engine.gather import Result, silent
from shoal.engine.request import Request, Sampling
from shoal.errors import DataError, ModelError
from shoal.model.attend import Packed
from shoal.model.transformer import Transformer
from shoal.post.config import DistillConfig
from shoal.post.packing import Packer, Samples
from shoal.post.reverse_kl import reverse_kl
from shoal.post.selection import Prompt
from shoal.post.sft import tune
from shoal.run import Run
from shoal.train.step import TrainState


@dataclass(frozen=True)
class TeacherKL:
    """The main loss of a step: how far the student is from this teacher, a mean over the tokens it wrote."""

    teacher: Transformer

    def __call__(self, batch: Batch, h_TD: Tensor, weight_VD: Tensor, n_targets: int) -> Tensor:
        with torch.no_grad():
            embedded_TE = self.teacher.embed(batch.tokens_T)
            teacher_h_TE, _ = self.teacher.body(embedded_TE, batch.positions_T, Packed(batch.lengths))
        head_VE = self.teacher.head.weight.detach()
        return reverse_kl(h_TD, weight_VD, teacher_h_TE, head_VE, batch.targets_T >= 0, 1 / n_targets)


def distill_on_policy(
    config: DistillConfig,
    run: Run,
    student: Transformer,
    teacher: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    resume: bool = False,
    show: Callable[[Mapping[str, float]], None] = lambda metrics: None,
    say: Callable[[str], None] = lambda words: None,
) -> TrainState:
    """Teach `student`, in place. Both must read one vocabulary (`distill.require_one_vocabulary`)."""
    assert config.epochs is None, "on-policy samples have no epochs"
    state = TrainState(config.training(student.config, config.steps), str(student.embed.weight.device), student)
    T, spare = config.batch.context * config.batch.samples, student.config.vocab_size - tokenizer.vocab_size
    byte_lengths = np.pad(tokenizer.byte_lengths(), (0, spare))  # a model may write tokens that spell nothing
    with (
        closing(Chat(tokenizer)) as chat,
        closing(LocalEngine(state.model, deterministic=config.deterministic)) as engine,
    ):
        stops = chat.marks.ends | ({chat.marks.answer_end} if chat.marks.answer_end is not None else set())
        longest = min(config.batch.context + 1, engine.context)  # the last token of a sample is no input
        asked = questions(prompts, chat, longest - 1, say)

        def batches() -> tuple[list[Batch], dict[str, float]]:
            began = perf_counter()
            engine.forget()
            written = requests(asked, config, stops, state.counters.samples, longest)
            results = engine.generate(written)
            samples = samples_of(written, results)
            packer, found, start = Packer(samples, byte_lengths, T, config.seed), [], 0
            while start < len(samples):
                found.append(packer.batch(start))
                start += len(found[-1].ids)
            return found, {
                "rollout/tokens": samples.n_said / len(samples),
                "rollout/ended": sum(r.finish == "stop" for r in results) / len(results),
                "time/rollout": perf_counter() - began,
            }

        tune(state, run, tokenizer, batches, TeacherKL(teacher), resume, show, say)
    return state


def questions(prompts: Sequence[Prompt], chat: Chat, most: int, say: Callable[[str], None]) -> list[list[int]]:
    """What the student is given, where that leaves room for an answer."""
    every = [chat.prompt((Message("user", prompt.text),)) for prompt in prompts]
    found = [tokens for tokens in every if len(tokens) <= most]
    if not found:
        raise DataError(f"no prompt of at most {most:,} tokens", "at least one", "raise batch.context")
    long = f"; {len(every) - len(found):,} too long and left out" if len(found) < len(every) else ""
    say(f"prompts  {len(found):,}{long}")
    return found


def requests(
    asked: Sequence[list[int]], config: DistillConfig, stops: frozenset[int], start: int, longest: int
) -> list[Request]:
    """Those of one step, `start` being the global number of its first sample: `samples` of each of `group` prompts.

    `longest` is the most tokens of a prompt and what is said to it.
    """
    found = []
    for index in range(start, start + config.group * config.samples):
        epoch, i = divmod(index // config.samples, len(asked))
        tokens = tuple(asked[permuted(i, len(asked), mix(config.seed, epoch, 1))])
        room = min(config.sampling.max_tokens, longest - len(tokens))
        sampling = Sampling(temperature=1.0, seed=mix(config.seed, index, 2) >> 1)
        found.append(Request(tokens, room, silent, sampling, stops))
    return found


def samples_of(written: Sequence[Request], results: Sequence[Result]) -> Samples:
    """What the student wrote, all of it to be judged. Raises ModelError."""
    if error := next((r.error for r in results if r.error), None):
        raise ModelError(f"the student: {error}", "finite numbers", "lower optim.lr, then --resume")
    rows = [[*request.tokens, *(token.id for token in r.tokens)] for request, r in zip(written, results, strict=True)]
    tokens_N = np.concatenate([np.array(row, np.int32) for row in rows])
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Samples(tokens_N, starts, np.array([len(request.tokens) for request in written]))
