"""A process of reinforcement, for test_kill.py to kill: python -m tests.post.killed RUN [resume]"""

import sys
import time
from pathlib import Path

import torch

from shoal.post import rl
from shoal.run import Run
from tests.post import test_rl
from tests.post.talks import model, tokenizer


def main() -> None:
    torch.set_num_threads(1)
    path, resume = Path(sys.argv[1]), "resume" in sys.argv
    rl.reward, rl.Rollouts = test_rl.letters, test_rl.Restless
    own = rl.iterate

    def slowly(stage, clock):  # so that a kill meets every part of a step
        metrics = own(stage, clock)
        time.sleep(0.02)
        return metrics

    rl.iterate = slowly
    run = Run.open(path) if resume else Run.create("r1_zero", path, test_rl.SLICED, {}, ["shoal"])
    print("begun", flush=True)
    rl.reinforce(test_rl.SLICED, run, model(5 if resume else 0), tokenizer(), test_rl.TASKS, resume=resume)


if __name__ == "__main__":
    main()
