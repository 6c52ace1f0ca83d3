"""`--memory`: what fits is divided, what doesn't is refused with what would do, and the ceiling holds from outside."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.cli import budget, plan
from shoal.data.tokenizer import Tokenizer
from shoal.engine import split
from shoal.engine.engine import LocalEngine
from shoal.errors import ResourceError
from shoal.model.config import MLAConfig, ModelConfig, MoEConfig
from shoal.plan.fit import PROCESS_BYTES, Form, rows_bytes
from shoal.plan.fit import weights as weights_of
from shoal.precision import convert, weights
from tests.engine import stored
from tests.engine.models import LATENT, ids, model, request

CONFIG = replace(LATENT, n_mtp=0)
# 0.69 GB in bf16, 0.63 of it experts; sizes that the native program takes
LARGE = ModelConfig(
    vocab_size=512,
    dim=512,
    n_layers=5,
    hidden_dim=1024,
    attention=MLAConfig(8, 64, 32, 32, 32),
    moe=MoEConfig(64, 1, 4, 800, n_dense_layers=1),
    max_positions=256,
    init_std=0.05,
)
MIB = 2**20


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> split.Parts:
    path = stored.write(tmp_path_factory.mktemp("a") / "m", CONFIG, "int8", stored.of(model(CONFIG)))
    return split.examine(path, torch.bfloat16)


def divided(parts: split.Parts, memory: int, cache: int | None = None, process: int = 100 * MIB):
    return budget.division(parts, memory, cache, None, process, "cpu")


def test_near_bytes_are_those_that_are_read(parts):
    far, o = split.load(split.examine(parts.stored.files.folder, torch.bfloat16), 1, direct=True)
    held = sum(t.nbytes for t in far.state_dict().values())
    held += sum(m.weight.nbytes for m in far.modules() if isinstance(m, weights.QuantisedLinear))
    assert parts.near_bytes == held
    o.store.close()


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_parts_weigh_what_plan_fit_says(tmp_path, form: Form):
    config = replace(LARGE, vocab_size=4096, n_layers=2, moe=MoEConfig(2, 1, 1, 128, n_dense_layers=1))
    path = stored.write(tmp_path / "bf16", config, "bf16", lambda piece: torch.ones(piece.shape))
    if form != "bf16":
        source, path = convert.Source(path), tmp_path / form
        convert.write(source, path, form, 32)
    found, planned = split.examine(path, torch.bfloat16), weights_of(config, form, 32)
    assert found.near_bytes == pytest.approx(planned.near, rel=0.01)
    assert found.embedding_bytes == planned.embedding and len(found.experts) == planned.n_experts
    assert found.slot_bytes == pytest.approx(planned.expert, abs=3 * 4096)


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8"])
def test_plan_fit_counts_a_folder_as_the_engine_divides_it(tmp_path, capsys, form):
    config = replace(LARGE, n_layers=2, moe=MoEConfig(16, 1, 4, 384, n_dense_layers=1), n_mtp=1, max_positions=4096)
    path = stored.write(tmp_path / "m", config, form, lambda piece: torch.ones(piece.shape))
    flags, memory, smallest = ["--threads", f"{torch.get_num_threads()}", "--context", "2048", "--json"], 1024 * MIB, []
    for fits in (True, False):
        assert plan.main(["fit", str(path), "--ram", f"{memory}B", *flags]) == 0
        f = json.loads(capsys.readouterr().out)["forms"][plan.STORED]
        cache = f["places"]["RAM"]["cache"]
        d, _, whole = budget.division(split.examine(path, torch.bfloat16), memory, cache, None, PROCESS_BYTES, "cpu")
        assert f["places"]["RAM"] == d.parts() and whole == ("disk" not in f["places"]) == fits
        smallest.append(memory := f["smallest"])
    assert smallest[0] == smallest[1]
    with pytest.raises(ResourceError):
        budget.division(split.examine(path, torch.bfloat16), memory - MIB, cache, None, PROCESS_BYTES, "cpu")


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ([], "shoal serve {} --memory 1024MiB --cache 1MiB"),
        (["--gpu", "24GiB"], "shoal serve {} --cache 1MiB"),
        (["--gpu", "1MiB"], "CUDA_VISIBLE_DEVICES= shoal serve {} --memory 1024MiB --cache 1MiB"),
    ],
)
def test_the_command_that_plan_fit_prints_is_of_what_it_planned(parts, capsys, gpu, expected):
    folder = parts.stored.files.folder
    assert plan.main(["fit", str(folder), "--ram", "1GiB", "--threads", "1", *gpu]) == 0
    assert f"run it so: {expected.format(folder)}\n" in capsys.readouterr().out


def test_a_budget_that_holds_all_of_it_holds_all_of_it(parts):
    d, _, whole = divided(parts, 1000 * MIB)
    assert whole and d.hit_rate == 1 and d.near == parts.near_bytes + parts.embedding_bytes


def test_a_module_that_may_draft_has_rows_of_its_own(parts):
    plain, _, _ = divided(parts, 1000 * MIB)
    d, _, whole = divided(parts._replace(module_bytes=MIB), 1000 * MIB)
    assert whole and d.near - plain.near == MIB and d.buffers - plain.buffers == rows_bytes(CONFIG)


def test_a_budget_too_small_is_refused_with_the_smallest_that_works(parts):
    with pytest.raises(ResourceError) as e:
        divided(parts, 64 * MIB)
    smallest = int(re.search(r"--memory (\d+)MiB", e.value.fix)[1]) * MIB  # type: ignore[index]
    d, cache, _ = divided(parts, smallest)
    assert d.slots >= 2 and d.total <= smallest and cache > 0
    with pytest.raises(ResourceError):
        divided(parts, smallest - 2 * MIB)


def test_the_smallest_budget_works_though_the_next_process_is_a_little_larger(parts, monkeypatch):
    folder, process = parts.stored.files.folder, [100 * MIB, 103 * MIB]
    monkeypatch.setattr(budget, "prepared", lambda *_: (folder, None, None, "cpu"))
    monkeypatch.setattr("shoal.runtime.resident_bytes", lambda: process[0])
    with pytest.raises(ResourceError) as e:
        budget.open_within("", "bfloat16", None, 64 * MIB)
    smallest = int(re.search(r"--memory (\d+)MiB", e.value.fix)[1]) * MIB  # type: ignore[index]
    process.pop(0)
    sized = budget.open_within("", "bfloat16", None, smallest)
    assert sized.cache_bytes
    LocalEngine(sized.opened.model).close()


def test_a_cache_that_was_asked_for_is_not_made_smaller(parts):
    d, cache, _ = divided(parts, 300 * MIB, cache=20 * MIB)
    assert cache == d.cache == 20 * MIB
    with pytest.raises(ResourceError, match="20MiB"):
        divided(parts, 110 * MIB, cache=20 * MIB)
    with pytest.raises(ResourceError, match="9 bytes for the cache"):
        divided(parts, 300 * MIB, cache=9)


def test_what_a_gpu_has_no_room_for_is_refused(parts, monkeypatch):
    def on_gpu(free: int):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**40))
        return budget.division(parts, 300 * MIB, 20 * MIB, None, 100 * MIB, "cuda")

    with pytest.raises(ResourceError, match="50MiB free on the GPU .* the cache 20MiB") as e:
        on_gpu(50 * MIB)
    assert "CUDA_VISIBLE_DEVICES=" in e.value.fix
    smallest = int(e.value.expected.removeprefix("at least ").removesuffix("MiB")) * MIB
    d, _, whole = on_gpu(smallest)
    assert not whole and d.slots == d.n_experts and d.near == d.cache == d.buffers == 0
    with pytest.raises(ResourceError, match="GPU"):
        on_gpu(smallest - 1)


def test_without_experts_all_of_a_model_is_on_the_gpu(parts, monkeypatch):
    asked = []
    monkeypatch.setattr(budget, "check_gpu", lambda **each: asked.append(each["near"]))
    dense = parts._replace(experts=[], module_bytes=MIB)
    _, _, whole = budget.division(dense, 300 * MIB, 20 * MIB, None, 100 * MIB, "cuda")
    assert whole and asked == [parts.near_bytes + parts.embedding_bytes + MIB]


def resident(pid: int) -> int:
    try:
        found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return 0
    return 1024 * sum(map(int, found))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what a process has is read from /proc")
def test_the_ceiling_holds_from_outside_and_tokens_are_those_of_the_resident_model(tmp_path):
    def drawn(piece):
        generator = torch.Generator().manual_seed(len(piece.name) + 977 * (piece.expert or 0) + len(piece.shape))
        return torch.randn(piece.shape, generator=generator) * piece.shape[-1] ** -0.5

    path = stored.write(tmp_path / "m", LARGE, "bf16", drawn)
    tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b\n" * 50], 400)
    tokenizer.save(path)
    text = "def add(a, b):\n    return" * 3
    memory = 340 * MIB
    assert sum(f.stat().st_size for f in path.glob("*.safetensors")) > memory
    words = ["generate", str(path), "--prompt", text, "--max-tokens", "24", "--temperature", "0", "--json"]
    command = [sys.executable, "-m", "shoal.cli.main", *words, "--memory", f"{memory // MIB}MiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        most = 0
        while process.poll() is None:
            most = max(most, resident(process.pid))
            time.sleep(0.003)
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "experts" in err and "disk" in err
    assert 200 * MIB < most <= memory, f"{most / MIB:.0f} MiB"
    tokens = ([tokenizer.bos_id] if tokenizer.bos_id is not None else []) + tokenizer.encode(text)
    engine = LocalEngine(weights.load(path))
    near = ids(engine.generate([request(tuple(tokens), 24)])[0])
    engine.close()
    found = json.loads(out)["tokens"]
    assert found == near[: len(found)]
