"""A model folder as training leaves it."""

from pathlib import Path

import pytest
import torch

from shoal.model import hf
from tests.post.talks import model, tokenizer


@pytest.fixture
def folder(tmp_path) -> Path:
    t = tokenizer()
    hf.save(model().set_dtype(torch.bfloat16), tmp_path / "model", bos_id=t.bos_id, eos_id=t.eos_id)
    t.save(tmp_path / "model")
    return tmp_path / "model"
