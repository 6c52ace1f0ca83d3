"""transformers is the oracle: the same log-probabilities in fp32 from the same folder, in both directions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from bench.parity import ARCHITECTURES, LIMIT, both_ways, our_log_probs, random_config
from bench.peers.transformers_model import log_probs, open_folder, random_peer, randomise
from shoal.model import hf
from shoal.model.attend import Packed
from shoal.model.config import YarnConfig
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("seed", [0, 1])
def test_log_probabilities_agree_both_ways(tmp_path, architecture, seed):
    assert max(both_ways(random_config(architecture, seed), seed, 150, tmp_path)) < LIMIT


SIGMOID = random_config("deepseek_v3", 0).moe
assert SIGMOID
ODD = {  # combinations that only our own recipes make
    "latent and dense, with a module": {"architecture": "deepseek_v3", "moe": None, "n_mtp": 1},
    "no shared expert": {"architecture": "deepseek_v3", "moe": replace(SIGMOID, n_shared_experts=0)},
    "grouped experts with a module": {"architecture": "glm4_moe", "n_mtp": 1},
    "dense with two modules": {"architecture": "llama", "n_mtp": 2},
    "tied latent": {"architecture": "deepseek_v3", "tie_embeddings": True, "n_mtp": 1},
}


@pytest.mark.parametrize("what", ODD)
def test_transformers_opens_our_own_combinations(tmp_path, what):
    change = dict(ODD[what])
    config = replace(random_config(change.pop("architecture"), 0), **change)
    model = Transformer(config).init_weights(0)
    randomise(model, torch.Generator().manual_seed(0), config.tie_embeddings)
    hf.save(model, tmp_path)
    assert hf.load_config(tmp_path) == config
    tokens_T = torch.arange(150) % config.vocab_size
    assert (our_log_probs(model, tokens_T) - log_probs(open_folder(tmp_path), tokens_T)).abs().max() < LIMIT
    assert hf.load(tmp_path, torch.float32).config == config


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(2, 10))
def test_log_probabilities_agree_both_ways_widely(tmp_path, architecture, seed):
    assert max(both_ways(random_config(architecture, seed), seed, 500, tmp_path)) < LIMIT


@pytest.mark.parametrize("change", [{"rope_theta": 2e4}, {"norm_eps": 1e-3}, {"rope_scaling": None}])
def test_the_limit_would_notice(tmp_path, change):
    """A slip in any of these moves the log-probabilities by more than the limit."""
    config = random_config("deepseek_v3", 0)
    peer = random_peer(config, 0)
    peer.save_pretrained(tmp_path)
    model = hf.load(tmp_path, torch.float32)
    tokens_T = torch.arange(150) % config.vocab_size
    other = Transformer(replace(config, **change))
    other.load_state_dict(model.state_dict())
    assert (our_log_probs(model, tokens_T) - log_probs(peer, tokens_T)).abs().max() < LIMIT
    assert (our_log_probs(other, tokens_T) - log_probs(peer, tokens_T)).abs().max() > 3 * LIMIT


def test_what_transformers_writes_is_read_without_our_config(tmp_path):
    config = random_config("deepseek_v3", 4)
    random_peer(config, 0).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_theta" not in written
    assert replace(hf.load_config(tmp_path), init_std=0) == replace(config, init_std=0)


@torch.no_grad()
def test_the_multi_token_module_agrees(tmp_path: Path):
    """transformers finds V3's module by the published layer number, so this model is as deep as V3 and very thin."""
    from transformers.modeling_layers import MtpModel

    tiny = PRESETS["tiny"]
    assert tiny.moe
    moe = replace(tiny.moe, n_dense_layers=60, moe_dim=8)
    config = replace(tiny, n_layers=61, dim=32, hidden_dim=16, moe=moe, rope_scaling=YarnConfig(factor=4, original=32))
    model = Transformer(config).init_weights(0)
    randomise(model, torch.Generator().manual_seed(0), tied=False)
    hf.save(model, tmp_path)
    peer = open_folder(tmp_path)
    module = MtpModel.from_pretrained(peer).eval()
    T = 100
    hidden_TD, positions_T = torch.randn(T, config.dim), torch.arange(T)
    embed_TD = model.embed(torch.randint(config.vocab_size, (T,)))
    ours, _ = model.mtp[0](hidden_TD, embed_TD, positions_T, Packed([T]))
    theirs = module.forward_layer(0, hidden_TD[None], positions_T[None], None, inputs_embeds=embed_TD[None])[0]
    assert (ours - theirs).abs().max() < 1e-4
    assert ours.abs().max() > 0.1
