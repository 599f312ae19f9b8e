"""Model, optimizers, averaging, and what torch.compile does with them."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from tools import config, hidden, model_for, runtime, t


def test_parameter_count_of_the_full_size_model() -> None:
    """The literal design's, and the submitted run's: 20 weights of value mixes more."""
    for recipe, count in (("pr314", 27_878_489), ("", 27_878_509)):
        with torch.device("meta"):
            model = t.GPT(t.load_config({"RECIPE": recipe})[0], {}, torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == count


def test_causality() -> None:
    """A changed token changes no earlier logit, and does change later ones."""
    cfg = config()
    model, ids = model_for(cfg), torch.randint(0, 320, (2, 32))
    changed = ids.clone()
    changed[:, 20] = (ids[:, 20] + 1) % 320
    a, b = (model.logits(hidden(model, x)) for x in (ids, changed))
    assert torch.equal(a[:, :20], b[:, :20])
    assert (a[:, 20:] != b[:, 20:]).any(dim=-1).all()


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_span_equals_the_full_forward(layers: int) -> None:
    """The last block on the scored span alone gives the same losses."""
    model = model_for(config(num_layers=layers))
    ids, targets = torch.randint(0, 320, (2, 32)), torch.randint(0, 320, (2, 32))
    full = model.nll(ids, targets)
    for span in (1, 8, 31):
        torch.testing.assert_close(model.nll(ids, targets[:, -span:]), full[:, -span:], atol=1e-5, rtol=1e-5)


def test_every_part_matters() -> None:
    """Each parameter has a gradient: U-Net skips, gates, bigram, gains."""
    for tied in (True, False):
        model = model_for(config(num_layers=5, tie_embeddings=tied))
        model.loss(torch.randint(0, 320, (4, 32)), torch.randint(0, 320, (4, 32))).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("span", [32, 8])
def test_value_residual_and_exclusive_attention(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks after the first attend to their own values times one weight plus the first block's times another; what
    XSA blocks hand on has no part along the position's own (mixed) value."""
    cfg, seen, raw, out = config(num_layers=4, xsa_layers=2), list[torch.Tensor](), list[torch.Tensor](), []
    model, ids = model_for(cfg), torch.randint(0, 320, (2, 32))
    attend, kv_heads, groups = t.attend, cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads

    def note(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, kernel: str) -> torch.Tensor:
        """Remember the values."""
        seen.append(v)
        return attend(q, k, v, window, kernel)

    monkeypatch.setattr(t, "attend", note)
    for i, block in enumerate(model.blocks):
        if i:
            block.attn.value_mix.data = torch.tensor([0.3 + i, 0.7 - i])
        block.attn.v_proj.register_forward_hook(lambda *a: raw.append(a[2].view(2, 32, kv_heads, -1)))
        block.attn.out_proj.register_forward_pre_hook(lambda _, args: out.append(args[0]))
    hidden(model, ids, span)
    assert torch.equal(seen[0], raw[0])
    for i in range(1, 4):
        torch.testing.assert_close(seen[i], (0.3 + i) * raw[i] + (0.7 - i) * raw[0])
    for i in range(4):
        length = out[i].size(1)
        heads = out[i].view(2, length, kv_heads, groups, -1)
        along = (heads * F.normalize(seen[i][:, -length:], dim=-1).unsqueeze(3)).sum(-1).abs().max()
        assert (along < 1e-5) == (i >= 2), (i, along)


def test_value_residual_off_is_a_mix_of_nothing() -> None:
    """VALUE_RESIDUAL=0 has no mixes, and the losses of mixes (1, 0)."""
    plain, mixed = (model_for(config(value_residual=on, num_layers=3)) for on in (0, 1))
    state = plain.state_dict()
    names = mixed.state_dict().keys() - state.keys()
    assert names == {f"blocks.{i}.attn.value_mix" for i in (1, 2)}
    mixed.load_state_dict(state | dict.fromkeys(names, torch.tensor([1.0, 0.0])))
    for model in (plain, mixed):
        model.refresh(False)
    ids = torch.randint(0, 320, (2, 32))
    assert torch.equal(plain.nll(ids, ids), mixed.nll(ids, ids))


def test_bigram_buckets() -> None:
    """The hash of the design, in int32, and the last bucket at position 0."""
    module = model_for(config(bigram_vocab_size=10240)).bigram
    ids = torch.tensor([[5, 1000, 319]])
    expected = [10239, (36313 * 1000 ^ 27191 * 5) % 10239, (36313 * 319 ^ 27191 * 1000) % 10239]
    assert module.bucket(ids).tolist() == [expected]


def test_initial_weights() -> None:
    """Orthogonal layers, zero residual outputs, a zero bigram table with a projection that is not zero."""
    cfg = config()
    model = t.GPT(cfg, {}, torch.float32)
    model.init_weights(cfg)
    block = model.blocks[0]
    q = block.attn.q_proj.weight
    torch.testing.assert_close(q @ q.T, torch.eye(32), atol=1e-5, rtol=0)
    assert (
        not block.attn.out_proj.weight.any()
        and not block.mlp.down_proj.weight.any()
        and not model.bigram.embed.weight.any()
    )
    torch.testing.assert_close(torch.linalg.matrix_norm(model.bigram.out_proj.weight, 2), torch.tensor(6**-0.5))
    assert block.attn.q_gain.tolist() == [1.5] * 4 and model.bigram.scale.item() == pytest.approx(0.05)


def test_flash3_kernel_gets_the_layout_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of FlashAttention 3 (B, T, H, D; grouped heads; bottom-right causal) the losses are the same."""

    def flash_attn_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window_size: tuple[int, int]
    ) -> torch.Tensor:
        assert window_size == (-1, -1)
        groups = q.size(2) // k.size(2)
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if causal else None).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    model, ids, targets = model_for(config()), torch.randint(0, 320, (2, 32)), torch.randint(0, 320, (2, 8))
    losses = {}
    for kernel in ("chunks", "sdpa", "flash3"):
        for block in model.blocks:
            block.attn.kernel = kernel
        losses[kernel] = model.nll(ids, targets)
    torch.testing.assert_close(losses["flash3"], losses["chunks"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["sdpa"], losses["chunks"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("span", "length", "window"), [(600, 600, 600), (64, 600, 600), (300, 600, 300), (5, 9, 4)])
def test_attention_kernels_agree(span: int, length: int, window: int) -> None:
    """Chunked products, PyTorch's kernel and the definition: outputs, gradients, groups, bands, short spans."""
    q = torch.randn(2, span, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, length, 2, 8, requires_grad=True) for _ in range(2))
    full_k, full_v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, full_k) / 8**0.5
    distance = torch.arange(length - span, length)[:, None] - torch.arange(length)[None]
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    outs = [torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), full_v)]
    outs += [t.attend(q, k, v, window, kernel) for kernel in ("chunks", "sdpa")]
    weight = torch.randn_like(outs[0])
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True) for out in outs]
    for out, grad in zip(outs[1:], grads[1:], strict=True):
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=1e-4)
        for mine, expected in zip(grad, grads[0], strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


def test_compiled_training_and_evaluation_follow_qat_without_a_recompile() -> None:
    """Full graphs of forward, backward and evaluation; switching QAT on changes their output, not their graph."""
    cfg = config(num_layers=2)
    model, ids, targets = model_for(cfg), torch.randint(0, 320, (2, 32)), torch.randint(0, 320, (2, 32))
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False)
    nll = torch.compile(model.nll, fullgraph=True, dynamic=False)
    model.refresh(False)
    loss(ids, targets).backward()
    with torch.no_grad():
        nll(ids, targets[:, -8:])
    grads = {}
    for quantize in (False, True):
        model.refresh(quantize)
        model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = loss(ids, targets)
            compiled.backward()
            with torch.no_grad():
                span = nll(ids, targets[:, -8:])
        grads[quantize] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        eager = model.loss(ids, targets)
        eager.backward()
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(span, model.nll(ids, targets[:, -8:]), atol=1e-5, rtol=1e-5)
        for a, p in zip(grads[quantize], model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(grads[False], grads[True], strict=True))


def test_refresh_changes_the_forward() -> None:
    """Quantization on and off differ; off is the master weight."""
    model, ids, targets = model_for(config()), torch.randint(0, 320, (2, 32)), torch.randint(0, 320, (2, 32))
    on = model.nll(ids, targets)
    model.refresh(False)
    off = model.nll(ids, targets)
    assert not torch.equal(on, off) and torch.equal(off, model_for(config(), qat=False).nll(ids, targets))


def test_bf16_forward_stays_close_and_in_bf16() -> None:
    """The residual stream is bf16, the loss fp32."""
    cfg = config()
    model, ids, targets = model_for(cfg, qat=False), torch.randint(0, 320, (2, 32)), torch.randint(0, 320, (2, 32))
    exact = model.loss(ids, targets)
    model.dtype = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert hidden(model, ids).dtype == torch.bfloat16
        loss = model.loss(ids, targets)
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.02


def test_ownership() -> None:
    """A parameter that nobody optimizes, or two do, is an error that names it."""
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([a], lr=1.0)
    with pytest.raises(ValueError, match=r"exactly one optimizer.*'b': 0"):
        t.check_ownership({"a": a, "b": b}, [sgd])
    with pytest.raises(ValueError, match=r"'a': 2"):
        t.check_ownership({"a": a}, [sgd, torch.optim.SGD([a], lr=1.0)])
    t.check_ownership({"a": a}, [sgd])


def test_optimizers_own_everything_once() -> None:
    """Matrices by Muon, embeddings and small ones by AdamW; gradients are views of one buffer and stay so."""
    cfg = config(tie_embeddings=0)
    model = model_for(cfg)
    optimizers = t.Optimizers(model, cfg, runtime())
    owned = {id(p) for p in optimizers.muon.param_groups[0]["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in owned} == {
        n for n, _ in model.named_parameters() if n.endswith("_proj.weight")
    }
    for step in range(2):
        model.loss(torch.randint(0, 320, (2, 32)), torch.randint(0, 320, (2, 32))).backward()
        assert optimizers.grad.norm() > 0
        before = [p.detach().clone() for p in model.parameters()]
        loss, _, _, norm = optimizers.step(1.0, step).tolist()
        assert norm > 0 and loss == 0.0 and not optimizers.flat.any()
        assert all(not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    total = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    first = next(model.parameters()).grad
    assert total == optimizers.grad.numel() and first is not None and first.data_ptr() == optimizers.flat.data_ptr()


def test_muon_stacks_equal_one_by_one() -> None:
    """Batched orthogonalisation gives each matrix what it gets alone; singular values end up near 1."""
    torch.manual_seed(0)
    stack = torch.randn(5, 16, 48)
    batched = t.newton_schulz(stack, 5, torch.float32)
    for matrix, done in zip(stack, batched, strict=True):
        torch.testing.assert_close(
            t.newton_schulz(matrix.unsqueeze(0), 5, torch.float32)[0], done, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            t.newton_schulz(matrix.T.unsqueeze(0), 5, torch.float32)[0], done.T, atol=1e-5, rtol=1e-4
        )
    singular = torch.linalg.svdvals(batched)
    assert singular.min() > 0.5 and singular.max() < 1.4


@pytest.mark.parametrize("equal_rows", [False, True])
def test_muon_update_formula(equal_rows: bool) -> None:
    """Nesterov momentum, decay and scale as the design states them, against a plain computation."""
    cfg = config(weight_decay=0.1, matrix_lr=0.5, muon_eq=equal_rows)
    torch.manual_seed(0)
    p, g = torch.nn.Parameter(torch.randn(48, 16)), torch.randn(48, 16)
    start, p.grad = p.detach().clone(), g.clone()
    muon = t.Muon([p], cfg, runtime())
    muon.param_groups[0]["momentum"] = 0.9
    muon.step()
    nesterov = 1.9 * g
    nesterov = nesterov / nesterov.norm(dim=1, keepdim=True) if equal_rows else nesterov
    update = t.newton_schulz(nesterov.unsqueeze(0), 5, torch.float32)[0] * 3**0.5
    torch.testing.assert_close(p.detach(), start * (1 - 0.5 * 0.1) - 0.5 * update, atol=1e-4, rtol=1e-4)


def test_gradient_clipping() -> None:
    """The gradient that reaches the optimizers has the limit's norm at most."""
    cfg = config(grad_clip_norm=0.3)
    model = model_for(cfg)
    optimizers = t.Optimizers(model, cfg, runtime())
    seen: list[float] = []
    optimizers.muon.register_step_pre_hook(lambda *_: seen.append(float(optimizers.grad.norm())))
    optimizers.grad.normal_()
    norm = optimizers.step(1.0, 0)[3]
    assert norm > 10 and seen[0] == pytest.approx(0.3, rel=1e-3)


def test_weight_average() -> None:
    """What a run averages: the fp32 mean of the snapshots of the master weights."""
    cfg = config()
    trainer = t.Trainer(model_for(cfg), t.open_data(cfg, runtime()), cfg, runtime())
    snapshots = []
    for _ in range(3):
        trainer.swa.update_parameters(trainer.model)
        snapshots.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(torch.randn_like(p))
    for name, mean in t.weights_of(trainer.swa.module).items():
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, torch.stack([s[name] for s in snapshots]).mean(0), atol=1e-6, rtol=1e-5)


def test_calibration_tokens_are_spread_over_the_data() -> None:
    """Sequences at equal distances from the first token to near the last; ranks share them without overlap."""
    cfg = config(calibration_tokens=256)  # 8 sequences of 32
    trainer = t.Trainer(model_for(cfg), t.open_data(cfg, runtime()), cfg, runtime())
    apart = trainer.shards.total // 8
    want = torch.stack([torch.from_numpy(trainer.shards.read(i * trainer.shards.total // 8, 33)) for i in range(8)])
    assert apart > 33
    for ranks in (1, 2):
        parts = []
        for rank in range(ranks):
            trainer.rt = types.SimpleNamespace(rank=rank, world_size=ranks, device=torch.device("cpu"))  # type: ignore
            parts += list(trainer.calibration_batches())
        inputs, targets = (torch.cat(side) for side in zip(*parts, strict=True))
        assert torch.equal(inputs, want[:, :-1]) and torch.equal(targets, want[:, 1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_training_step() -> None:
    """One compiled bf16 step on a GPU."""
    cfg = config(compute_dtype="bfloat16", model_dim=128)
    model = model_for(cfg).cuda()
    model.dtype = torch.bfloat16
    ids = torch.randint(0, 320, (8, 32), device="cuda")
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False)(ids, ids)
    loss.backward()
    assert torch.isfinite(loss)
