"""RECIPE=pr314 trains and stores as the first edition (commit e735e01) did: these numbers are its."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tools import config, plan_for, runtime, t, write_shard

SETTINGS = {
    "recipe": "pr314", "train_seq_len": 32, "train_batch_tokens": 512, "iterations": 20, "warmdown_iters": 15,
    "rate_control": None, "swa_always": None, "qat_start_frac": None, "mlp_prune_frac": None, "prune_frac": None,
    "swa_every": 2, "model_dim": 64, "bigram_vocab_size": 2048,
}  # fmt: skip
LOSSES_WITHOUT_QAT = [
    6.3271942, 5.4928012, 5.0323768, 4.5871358, 4.5317941, 4.4199600, 4.3821239, 4.5149684, 4.4118247, 4.3677258,
    4.3245058, 4.3251548, 4.3341475, 4.3742294, 4.3385177, 4.3680825, 4.3533082, 4.3526568, 4.3378124, 4.2954125,
]  # fmt: skip
LOSSES_OF_QAT = [
    6.3376303, 5.5489473, 5.0835333, 4.6671672, 4.5798869, 4.4411364, 4.4010038, 4.5388107, 4.4285913, 4.3954935,
    4.3390141, 4.3265657, 4.3482556, 4.3867683, 4.3437343, 4.3823810, 4.3805604, 4.3630648, 4.3606796, 4.3127160,
]  # fmt: skip
STORED_SHA256 = "e29413156c64a556d0aef0c05d0a95ea2b84fc5b0d1da7f903ec675b96f1291d"


def fixed_weights(model: torch.nn.Module) -> None:
    """Weights that depend on nothing but the names and shapes of the parameters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if name.endswith("weight"):
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)


def fixed_tokens() -> np.ndarray:
    """20,000 token ids below 320 with some structure to learn."""
    rng = np.random.default_rng(1)
    return (rng.integers(0, 40, 20_000) * np.where(rng.random(20_000) < 0.5, 1, 7) + 4).astype(np.uint16)


def losses(folder: Path, qat: bool) -> list[float]:
    """Losses of 20 steps on the fixed tokens from the fixed weights."""
    frozen = {"matrix_lr": 0.0, "qat_start_frac": 0.0} if qat else {"qat_start_frac": 1.0}
    cfg = config(**(SETTINGS | frozen))
    write_shard(folder / "fineweb_train_000000.bin", fixed_tokens())
    data = t.Data.__new__(t.Data)
    assert cfg.sequence_order == "file"
    data.seq_len, data.stride = cfg.train_seq_len, 1
    data.train = t.TokenShards(str(folder / "*.bin"), cfg.vocab_size, 1)
    data.num_windows = (data.train.total - 1) // data.seq_len
    model = t.GPT(cfg, torch.float32)
    fixed_weights(model)
    model.refresh()
    trainer = t.Trainer(model, data, cfg, runtime())
    if qat:
        trainer.start_qat()
    found = []
    for step in range(cfg.iterations):
        found.append(trainer.train_step(t.lr_scale_at(step / cfg.iterations, cfg.iterations - step, cfg))[0])
        trainer.step += 1
    return found


@pytest.mark.parametrize("qat", [False, True])
def test_losses_of_20_steps(qat: bool, tmp_path: Path) -> None:
    """To 1e-5 relative in fp32. Under fake quantization with moving weights the last bit of a sum flips a code, and the
    first edition differs from itself at another micro-batch by 5e-4: there, Muon's learning rate is 0."""
    expected = LOSSES_OF_QAT if qat else LOSSES_WITHOUT_QAT
    assert losses(tmp_path, qat) == pytest.approx(expected, rel=1e-5)


def test_same_codes_and_scales() -> None:
    """From the same weights, after pruning; fp16 values, too."""
    cfg = config(**SETTINGS)
    model = t.GPT(cfg, torch.float32)
    fixed_weights(model)
    weights = model.state_dict()
    stored = t.quantize(weights, plan_for(cfg), cfg)
    digest = hashlib.sha256()
    for name in sorted(stored):
        for part in stored[name]:
            if part is not None:
                digest.update(part.numpy().tobytes())
    assert digest.hexdigest() == STORED_SHA256
