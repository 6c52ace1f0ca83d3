"""A plan fills the minutes it is given, and no more."""

from dataclasses import replace

import pytest

from shoal.errors import ResourceError
from shoal.model.presets import PRESETS
from shoal.plan import hardware, memory, size
from shoal.plan.memory import Step

CONFIG = PRESETS["mini"]
MACHINE = hardware.cpu("two threads", 8e11, 2e11, 2e10, 8 << 30, threads=2)
MEASURED = size.Measured(CONFIG, context=512, micro_tokens=4096, micro_seconds=0.4, update_seconds=0.05)


def planned(minutes=10.0, scores=0.0, accumulation=1):
    account = size.plan(MEASURED, MACHINE, minutes, Step(4096), scores, accumulation).account
    assert account.steps is not None
    return account


@pytest.mark.parametrize("minutes, scores", [(1, 0), (10, 30), (600, 60)])
@pytest.mark.parametrize("accumulation", [1, 16])
def test_the_plan_fills_the_time_but_for_less_than_a_step(minutes, scores, accumulation):
    p = planned(minutes, scores, accumulation)
    assert 0 <= minutes * 60 - p.seconds < MEASURED.step_seconds(accumulation)
    assert p.tokens == p.steps * accumulation * 4096


def test_batches_grow_with_the_budget_but_never_starve_it_of_steps():
    micro_batches = {m: size.accumulate(MEASURED, 60 * m) for m in (1, 10, 100, 1000, 10000)}
    sizes = list(micro_batches.values())
    assert sizes == sorted(sizes) and sizes[0] == 1 < sizes[-1]
    assert all((planned(m, accumulation=micro_batches[m]).steps or 0) >= size.FEWEST_STEPS for m in (10, 100, 1000))


def test_time_for_too_few_steps_is_refused_with_the_minutes_that_would_do():
    with pytest.raises(ResourceError) as e:
        planned(0.5, scores=28)  # 2 s for steps of 0.45 s
    assert "at least 0.51 minutes" in e.value.fix
    assert planned(0.51, scores=28).steps == size.LEAST_STEPS


def test_a_model_too_big_for_memory_is_refused_before_time_is_asked():
    with pytest.raises(ResourceError, match="needs about"):
        size.plan(MEASURED, replace(MACHINE, memory_bytes=1 << 20), 10, Step(4096), 0, 1)


def test_more_time_buys_a_larger_model_and_little_memory_a_smaller_one():
    models = {str(n): replace(CONFIG, n_layers=n) for n in (2, 4, 8, 16, 32)}

    def chosen(minutes, machine=MACHINE):
        return int(size.largest(models, MEASURED, machine, minutes, Step(4096), wanted=2.0))

    sizes = [chosen(m) for m in (0.1, 1, 10, 100, 1000)]
    assert sizes == sorted(sizes) and sizes[0] == 2 and sizes[-1] == 32
    room = int(memory.of_training(models["8"], Step(4096)).total * memory.OVERHEAD) + 1
    assert chosen(1000, replace(MACHINE, memory_bytes=room)) == 8
