"""`shoal plan fit`: models by any of their names, machines by what people know of them."""

import json
import os

import pytest

from shoal.cli import plan
from shoal.errors import ConfigError, ModelError, ResourceError
from shoal.model.hf_config import to_hf_config
from shoal.model.presets import PRESETS

LAPTOP = ["--ram", "6GiB", "--disk", "1.5GB/s", "--ram-rate", "25GB/s", "--json"]


def asked(capsys, *argv: str) -> dict:
    assert plan.main(["fit", *argv, *LAPTOP]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_by_any_of_its_names_is_the_same(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(PRESETS["v2-lite-16b"], "bfloat16")))
    names = ["v2-lite-16b", "v2-lite", "deepseek-ai/DeepSeek-V2-Lite", str(tmp_path), str(tmp_path / "config.json")]
    found = [asked(capsys, name) for name in names]
    assert all(f == found[0] for f in found)
    assert found[0]["machine"] | {"ram_bytes": 6 * 2**30, "disk_rate": 1.5e9, "gpu_bytes": 0} == found[0]["machine"]
    assert found[0]["forms"]["int4"]["limit"] == "disk"


@pytest.mark.parametrize(
    ("published", "preset"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "r1-qwen-1.5b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "r1-llama-8b"),
        ("deepseek-ai/DeepSeek-V3-0324", "v3-671b"),
        ("deepseek-ai/DeepSeek-V3.1-Base", "v3-671b"),
        ("deepseek-ai/DeepSeek-R1-0528", "v3-671b"),
        ("deepseek-ai/DeepSeek-R1-Zero", "v3-671b"),
        ("deepseek-ai/DeepSeek-V2-Chat-0628", "v2-236b"),
        ("deepseek-ai/DeepSeek-V2.5-1210", "v2-236b"),
        ("DeepSeek-V2-Lite-Chat", "v2-lite-16b"),
    ],
)
def test_models_are_known_by_the_names_they_are_published_under(published, preset):
    assert plan.described(published) == (PRESETS[preset], None)


def test_a_run_is_known_as_other_verbs_know_it(capsys, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(PRESETS["v2-lite-16b"], "bfloat16")))
    monkeypatch.setattr(plan, "model_folder", {"latest": tmp_path}.__getitem__)
    assert asked(capsys, "latest") == asked(capsys, "v2-lite-16b")


def test_cards_by_name_or_by_size(capsys):
    by_name = asked(capsys, "v3-671b", "--gpu", "RTX 4090", "--weights", "int4")
    assert by_name["machine"]["gpu_bytes"] == 24e9 and "GPU" in by_name["forms"]["int4"]["places"]
    assert asked(capsys, "v3-671b", "--gpu", "rtx 4090")["machine"] == by_name["machine"]
    assert asked(capsys, "v3-671b", "--gpu", "24GiB")["machine"]["gpu_bytes"] == 24 * 2**30
    with pytest.raises(ConfigError, match="RTX 4090"):
        plan.main(["fit", "v3-671b", "--gpu", "RTX 9999"])


def test_a_model_in_the_cards_memory_needs_ram_for_its_process(capsys):
    assert plan.main(["fit", "tiny", "--gpu", "24GiB", "--ram", "100MiB", "--weights", "bf16"]) == 3
    assert "100MiB for the process 320MiB" in capsys.readouterr().out


def test_what_does_not_run_names_the_smallest_memory_that_works(capsys):
    assert plan.main(["fit", "r1-llama-70b", "--ram", "8GiB", "--weights", "int4", "--threads", "8"]) == 3
    assert "smallest RAM that works is 39.78" in capsys.readouterr().out.replace("\n", " ")


def test_the_disk_is_measured_on_what_is_stored_there(tmp_path, monkeypatch):
    synced, read = [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "SCRATCH_BYTES", 1 << 22)
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(plan, "disk_bytes_per_s", lambda path: read.append(path.read_bytes()) or 1e9)
    assert plan.measured_disk(None) == 1e9
    assert synced and len(read[0]) == 1 << 22 and len(set(read[0])) == 256
    assert not list(tmp_path.iterdir())


def test_a_machine_without_native_kernels_is_told(monkeypatch, capsys):
    monkeypatch.setattr(plan, "read_bytes_per_s", lambda: 25e9)
    flags = ["fit", "tiny", "--weights", "bf16", "--disk", "none", "--here"]
    for status, told in (("reference (this processor lacks avx512_bf16)", True), ("native kernels", False)):
        monkeypatch.setattr("shoal.ops.cpu.status", lambda status=status: status)
        assert plan.main(flags) == 0
        assert (status in capsys.readouterr().err) == told


def test_a_folder_that_takes_no_file_is_no_place_to_measure_the_disk(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ResourceError, match="--disk"):
        plan.measured_disk(None)


@pytest.mark.parametrize("argv", [["no-such-model"], ["v2"], ["."], ["/tmp"]])
def test_unknown_models_are_refused(argv):
    with pytest.raises(ModelError):
        plan.main(["fit", *argv, *LAPTOP])


@pytest.mark.parametrize(
    "flags",
    [
        ["--disk", "fast"],
        ["--disk", "floppy"],
        ["--gpu", "4090"],
        ["--ram", "8"],
        ["--disk", "0GB/s"],
        ["--gpu", "RTX"],
        ["--gpu", ""],
        ["--ram", "-1"],
        ["--ram", ""],
        ["--ram", "9" * 400],
        ["--ram-rate", "0GB/s"],
        ["--ram-rate", "0.1B/s"],
        ["--bus-rate", "0GB/s"],
        ["--bus-rate", ""],
        ["--context", "0"],
        ["--threads", "0"],
        ["--hit-rate", "2"],
    ],
)
def test_machines_that_make_no_sense_are_refused(flags):
    with pytest.raises(ConfigError):
        plan.main(["fit", "tiny", *flags])
