"""Model, optimizers, averaging, calibration, and what torch.compile does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tools import config, hidden, load_weights, mlp_grids, model_for, runtime, t
from torch.nn.attention import SDPBackend, sdpa_kernel


def tokens(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and target ids (rows, 32), the same every time."""
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randint(0, 320, (rows, 32), generator=generator) for _ in range(2))


def trainer_for(rank: int = 0, world_size: int = 1, **changes: Any) -> t.Trainer:
    """A trainer of a tiny model whose parts all matter, without fake quantization."""
    cfg = config(**changes)
    return t.Trainer(model_for(cfg, qat=False), t.Data(cfg, runtime()), cfg, runtime(rank, world_size))


def attention_by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """What FlashAttention 3 computes: (B, T, H, D), grouped heads, causal."""
    assert causal and q.dtype == k.dtype == v.dtype
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.size(-1) ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize(("environ", "count"), [({"RECIPE": "pr314"}, 27_878_489), ({}, 33_645_677)])
def test_parameter_count_of_the_full_size_model(environ: dict[str, str], count: int) -> None:
    """The literal design's, and the submitted run's: an MLP 4x instead of 3x, and 20 weights of value mixes."""
    with torch.device("meta"):
        model = t.GPT(t.load_config(environ)[0], torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == count
    assert f"{33_645_677:,} parameters" in str(t.__doc__)


def test_causality() -> None:
    """A changed token changes no earlier loss, and does change later ones."""
    model, (ids, targets) = model_for(config()), tokens()
    changed = ids.clone()
    changed[:, 20] = (ids[:, 20] + 1) % 320
    a, b = model(ids, targets), model(changed, targets)
    assert a.shape == (2, 32) and torch.equal(a[:, :20], b[:, :20])
    assert (a[:, 20:] != b[:, 20:]).all()


def test_losses_are_those_of_the_soft_capped_logits() -> None:
    """-log softmax of 30 * tanh(h E^T / 30), in nats, for each position; shorter sequences have the same losses."""
    model, (ids, targets) = model_for(config()), tokens()
    with torch.no_grad():
        model.embed.weight.mul_(20)  # so that the cap matters
    logits = F.linear(hidden(model, ids), model.embed.weight).double()
    assert logits.abs().max() > 30
    expected = -torch.log_softmax(30 * torch.tanh(logits / 30), -1).gather(2, targets.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(model(ids, targets).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids[:, :9], targets[:, :9]), model(ids, targets)[:, :9], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_every_part_matters(layers: int) -> None:
    """Each parameter has a gradient: U-Net skips, gates, bigram, gains."""
    model = model_for(config(num_layers=layers))
    model(*tokens(4)).mean().backward()
    for name, p in model.named_parameters():
        assert p.numel() == 0 or (p.grad is not None and p.grad.abs().sum() > 0), name


def test_skips_pair_the_blocks_in_reverse() -> None:
    """With 5 blocks the inputs of blocks 2 and 3 get the outputs of blocks 1 and 0, the last one gets none."""
    model, (ids, _) = model_for(config(num_layers=5)), tokens()
    inputs, outputs = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.register_forward_hook(lambda *a: outputs.append(a[2][0]))
    model(ids, ids)
    for i, partner in ((1, None), (2, 1), (3, 0), (4, None)):
        skip = 0 if partner is None else model.skip_scale[i - 2] * outputs[partner]
        torch.testing.assert_close(inputs[i], outputs[i - 1] + skip)


def test_value_residual_and_exclusive_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks after the first attend to their own values times one weight plus the first block's times another; what
    XSA blocks hand on has no part along the position's own (mixed) value."""
    cfg, seen, raw, out = config(num_layers=4, xsa_layers=2), list[torch.Tensor](), list[torch.Tensor](), []
    model, (ids, _) = model_for(cfg), tokens()
    attend, kv_heads, groups = F.scaled_dot_product_attention, cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads

    def note(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: bool) -> torch.Tensor:
        """Remember the values, as (B, T, KV, head_dim)."""
        seen.append(v.transpose(1, 2))
        return attend(q, k, v, **options)

    monkeypatch.setattr(t.F, "scaled_dot_product_attention", note)
    for i, block in enumerate(model.blocks):
        if i:
            block.attn.value_mix.data = torch.tensor([0.3 + i, 0.7 - i])
        block.attn.v_proj.register_forward_hook(lambda *a: raw.append(a[2].view(2, 32, kv_heads, -1)))
        block.attn.out_proj.register_forward_pre_hook(lambda _, args: out.append(args[0]))
    model(ids, ids)
    assert torch.equal(seen[0], raw[0])
    for i in range(1, 4):
        torch.testing.assert_close(seen[i], (0.3 + i) * raw[i] + (0.7 - i) * raw[0])
    for i in range(4):
        heads = out[i].view(2, 32, kv_heads, groups, -1)
        along = (heads * F.normalize(seen[i], dim=-1).unsqueeze(3)).sum(-1).abs().max()
        assert (along < 1e-5) == (i >= 2), (i, along)


def test_value_residual_off_is_a_mix_of_nothing() -> None:
    """VALUE_RESIDUAL=0 has no mixes, and the losses of mixes (1, 0)."""
    plain, mixed = (model_for(config(value_residual=on, num_layers=3)) for on in (0, 1))
    state = plain.state_dict()
    names = mixed.state_dict().keys() - state.keys()
    assert names == {f"blocks.{i}.attn.value_mix" for i in (1, 2)}
    load_weights(mixed, state | dict.fromkeys(names, torch.tensor([1.0, 0.0])), {})
    plain.refresh({})
    ids, targets = tokens()
    assert torch.equal(plain(ids, targets), mixed(ids, targets))


@pytest.mark.parametrize("rope_dims", [0, 2, 4, 5, 8, 16])
def test_rope_on_a_part_of_each_head(rope_dims: int) -> None:
    """Pairs of the first dimensions turn by position times a frequency, those behind stay; 0 and more than a head has
    (8 here) mean all of it."""
    rotary = t.GPT(config(rope_dims=rope_dims), torch.float32).rotary
    x = torch.randn(2, 32, 4, 8)
    pairs = (rope_dims if 0 < rope_dims < 8 else 8) // 2
    turned = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs])
    angles = torch.arange(32.0).outer(10000 ** (-torch.arange(pairs) / pairs)).unsqueeze(1)
    turned = turned * torch.polar(torch.ones(()), -angles)
    expected = torch.cat((turned.real, turned.imag, x[..., 2 * pairs :]), dim=-1)
    torch.testing.assert_close(t.apply_rotary(x, rotary), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ln_scale", [False, True])
def test_norms_are_scaled_by_depth(ln_scale: bool) -> None:
    """Attention and MLP of layer i read an RMS of 1 / sqrt(i + 1), or of 1."""
    model, (ids, targets) = model_for(config(ln_scale=ln_scale, num_layers=4)), tokens()
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        block.mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, targets)
    for i, x in enumerate(seen):
        expected = (i // 2 + 1) ** -0.5 if ln_scale else 1.0
        torch.testing.assert_close(x.square().mean(dim=-1).sqrt(), torch.full((2, 32), expected), atol=1e-3, rtol=0)


def test_weight_decay_by_kind() -> None:
    """WEIGHT_DECAY for matrices and embeddings, SCALAR_WEIGHT_DECAY for gains, scales, gates and mixes."""
    trainer = trainer_for(weight_decay=0.3, scalar_weight_decay=0.1, matrix_lr=0.2, scalar_lr=0.5, tied_embed_lr=0.4)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.flat_grad.zero_()
    for optimizer in trainer.optimizers.values():
        optimizer.step()
    for name, p in trainer.model.named_parameters():
        kept = 1 - {"small": 0.5 * 0.1, "embed": 0.4 * 0.3}.get(t.category(name), 0.2 * 0.3)
        kept = 1 - 0.4 * 0.3 if name == "bigram.embed.weight" else kept
        torch.testing.assert_close(p.detach(), kept * before[name], atol=1e-6, rtol=1e-5)


def test_bigram_buckets() -> None:
    """The hash of the design, in int32, and the last bucket at position 0."""
    module = model_for(config(bigram_vocab_size=10240)).bigram
    ids = torch.tensor([[5, 1000, 319]])
    expected = [10239, (36313 * 1000 ^ 27191 * 5) % 10239, (36313 * 319 ^ 27191 * 1000) % 10239]
    seen: list[torch.Tensor] = []
    module.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert module(ids, torch.bfloat16).dtype == torch.bfloat16 and seen[0].tolist() == [expected]


def test_initial_weights() -> None:
    """Orthogonal layers, zero residual outputs, a zero bigram table with a projection that is not zero."""
    model = t.GPT(config(), torch.float32)
    model.init_weights()
    block = model.blocks[0]
    q = block.attn.q_proj.weight
    torch.testing.assert_close(q @ q.T, torch.eye(32), atol=1e-5, rtol=0)
    assert not block.attn.out_proj.weight.any() and not block.mlp.down_proj.weight.any()
    assert not model.bigram.embed.weight.any()
    torch.testing.assert_close(torch.linalg.matrix_norm(model.bigram.out_proj.weight, 2), torch.tensor(6**-0.5))
    assert block.attn.q_gain.tolist() == [5.0] * 4 and model.bigram.scale.item() == pytest.approx(0.05)
    assert block.mix.tolist() == [[1.0] * 32, [0.0] * 32] and not model.smear_gate.any()
    assert torch.equal(block.mlp.up_proj.rounded, block.mlp.up_proj.weight)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_kernels_agree(backend: SDPBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernels, and a stand-in of FlashAttention 3 in the layout that it needs: losses and gradients are
    those of the definition."""
    monkeypatch.setattr(t, "flash_attn_func", attention_by_definition)
    cfg, (ids, targets) = config(), tokens()
    losses, grads = [], []
    for flash3 in (False, True):
        model = t.GPT(cfg, torch.float32, flash3)
        load_weights(model, model_for(cfg).state_dict(), {})
        with sdpa_kernel(backend):
            losses.append(model(ids, targets))
            losses[-1].mean().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


def test_compiled_training_follows_qat_without_a_recompile() -> None:
    """Full graphs of forward and backward; switching QAT on changes their output, not their graph."""
    cfg, (ids, targets) = config(num_layers=2), tokens()
    model = model_for(cfg)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")  # Inductor would take a minute
    model.refresh({})
    compiled(ids, targets).mean().backward()
    grads = []
    for plan in ({}, mlp_grids(cfg)):
        model.refresh(plan)
        model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=True):
            loss = compiled(ids, targets)
            loss.mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        eager = model(ids, targets)
        eager.mean().backward()
        torch.testing.assert_close(loss, eager, atol=1e-5, rtol=1e-5)
        for a, p in zip(grads[-1], model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_compiled_forward_under_qat_is_that_of_the_stored_weights() -> None:
    """Bit for bit, by Inductor, which may drop a rounding that it sees."""
    cfg, (ids, targets) = config(num_layers=1, mlp_prune_frac=0), tokens()
    model = model_for(cfg, qat=False)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch._inductor.config.patch(compile_threads=2):
        off = compiled(ids, targets)
    model.refresh(mlp_grids(cfg))
    with torch._dynamo.config.patch(error_on_recompile=True):
        trained = compiled(ids, targets)
        torch.testing.assert_close(trained, model(ids, targets), atol=1e-5, rtol=1e-5)
        state = model.state_dict()
        stored = t.quantize({name: state[name] for name in mlp_grids(cfg)}, mlp_grids(cfg), cfg)
        load_weights(model, state | {name: tensor.dequantize() for name, tensor in stored.items()}, {})
        assert torch.equal(compiled(ids, targets), trained) and not torch.equal(trained, off)


def test_refresh_changes_the_forward() -> None:
    """Quantization on and off differ; off is the master weight; without an argument the grids stay as they are."""
    cfg, (ids, targets) = config(), tokens()
    model = model_for(cfg)
    on = model(ids, targets)
    model.refresh()
    assert torch.equal(model(ids, targets), on)
    model.refresh({})
    off = model(ids, targets)
    assert not torch.equal(on, off) and torch.equal(off, model_for(cfg, qat=False)(ids, targets))
    model.refresh()
    assert torch.equal(model(ids, targets), off)
    load_weights(model, model.state_dict(), mlp_grids(cfg))
    assert torch.equal(model(ids, targets), on)


def test_bf16_forward_stays_close_and_in_bf16() -> None:
    """The residual stream is bf16, the loss fp32, and the master weights and their gradients stay fp32."""
    cfg, (ids, targets) = config(), tokens()
    exact = model_for(cfg, qat=False)
    model = t.GPT(cfg, torch.bfloat16)
    load_weights(model, exact.state_dict(), {})
    assert hidden(model, ids).dtype == torch.bfloat16
    nll = model(ids, targets)
    assert nll.dtype == torch.float32 and abs(nll.mean() - exact(ids, targets).mean()) < 0.02
    nll.mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_a_parameter_without_an_optimizer_is_found() -> None:
    """It would never be trained."""
    cfg = config()
    model = model_for(cfg)
    t.make_optimizers(model, cfg, runtime())
    model.other_embed = torch.nn.Embedding(2, 3)
    with pytest.raises(AssertionError, match="exactly one optimizer"):
        t.make_optimizers(model, cfg, runtime())


def test_optimizers_own_everything_once() -> None:
    """Matrices by Muon, embeddings and small ones by AdamW; gradients are views of one buffer and stay so."""
    trainer = trainer_for()
    named = dict(trainer.model.named_parameters())
    adamw, muon = trainer.optimizers["adamw"], trainer.optimizers["muon"]
    owned = {id(p) for p in muon.param_groups[0]["params"]}
    assert {name for name, p in named.items() if id(p) in owned} == {n for n in named if n.endswith("_proj.weight")}
    assert {id(p) for p in adamw.param_groups[0]["params"]} == {
        id(named["embed.weight"]),
        id(named["bigram.embed.weight"]),
    }
    for step in range(2):
        before = [p.detach().clone() for p in named.values()]
        loss, norm = trainer.train_step(1.0)
        trainer.step = step + 1
        assert 5 < loss < 7 and norm > 0 and trainer.flat_grad.norm() > 0
        assert all(not torch.equal(a, p) for a, p in zip(before, named.values(), strict=True))
    position = trainer.flat_grad.data_ptr()
    for p in named.values():
        assert p.grad is not None and p.grad.shape == p.shape and p.grad.data_ptr() == position
        position += 4 * p.numel()
    assert trainer.flat_grad.numel() == sum(p.numel() for p in named.values())


@pytest.mark.parametrize("grad_clip_norm", [0.01, 100.0, 0.0])
def test_gradient_clipping(grad_clip_norm: float) -> None:
    """The gradient that reaches the optimizers has the limit's norm, if its own is larger; 0 is no limit. The norm
    before is returned."""
    trainer = trainer_for(grad_clip_norm=grad_clip_norm)
    seen: list[float] = []
    trainer.optimizers["adamw"].register_step_pre_hook(lambda *_: seen.append(float(trainer.flat_grad.norm())))
    norm = trainer.train_step(1.0)[1]
    assert norm > 0.1 and seen == [pytest.approx(min(grad_clip_norm or norm, norm), rel=1e-3)]


def test_micro_batches_add_up() -> None:
    """However the batch is cut and shared out over ranks, loss and gradient are those of the whole."""
    found = []
    for ranks, micro in ((1, 256), (1, 64), (2, 32)):
        loss, grad = 0.0, torch.zeros(())
        for rank in range(ranks):
            trainer = trainer_for(rank, ranks, micro_batch_tokens=micro, grad_clip_norm=0)
            grads: list[torch.Tensor] = []
            hook = trainer.optimizers["adamw"].register_step_pre_hook
            hook(lambda *_, grads=grads, trainer=trainer: grads.append(trainer.flat_grad.clone()))
            loss += trainer.train_step(1.0)[0]
            grad = grad + grads[0]
        found.append((loss, grad))
    for loss, grad in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(grad, found[0][1], atol=1e-6, rtol=1e-4)


def test_muon_stacks_equal_one_by_one() -> None:
    """Batched orthogonalisation gives each matrix what it gets alone; singular values end up near 1."""
    torch.manual_seed(0)
    stack = torch.randn(5, 16, 48)
    batched = t.newton_schulz(stack, 5, torch.float32)
    for matrix, done in zip(stack, batched, strict=True):
        alone = t.newton_schulz(matrix.unsqueeze(0), 5, torch.float32)[0]
        turned = t.newton_schulz(matrix.T.unsqueeze(0), 5, torch.float32)[0]
        torch.testing.assert_close(alone, done, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(turned, done.T, atol=1e-5, rtol=1e-4)
    singular = torch.linalg.svdvals(batched)
    assert singular.min() > 0.5 and singular.max() < 1.4


@pytest.mark.parametrize("equal_rows", [False, True])
def test_muon_update_formula(equal_rows: bool) -> None:
    """Nesterov momentum, decay and scale as the design states them, against a plain computation over two steps."""
    cfg = config(weight_decay=0.1, matrix_lr=0.5, muon_eq=equal_rows)
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(48, 16))
    expected, momentum = p.detach().clone(), torch.zeros(48, 16)
    muon = t.Muon([p], cfg, runtime())
    muon.param_groups[0]["momentum"] = 0.9
    for _ in range(2):
        g = torch.randn(48, 16)
        p.grad = g.clone()
        muon.step()
        momentum = 0.9 * momentum + g
        nesterov = g + 0.9 * momentum
        nesterov = nesterov / nesterov.norm(dim=1, keepdim=True) if equal_rows else nesterov
        update = t.newton_schulz(nesterov.unsqueeze(0), 5, torch.float32)[0] * 3**0.5
        expected = expected * (1 - 0.5 * 0.1) - 0.5 * update
        torch.testing.assert_close(p.detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_matrices(world_size: int) -> None:
    """Each orthogonalises its own ones; the sum of what they hand in is the update of one rank alone."""
    cfg = config()
    parts: list[torch.Tensor] = []
    for rank, ranks in [(0, 1), *((rank, world_size) for rank in range(world_size))]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(8, 6)) for _ in range(3)]
        for p in params:
            p.grad = torch.randn(8, 6)
        rt = runtime(rank, ranks)
        rt.all_reduce = lambda update: parts.append(update.clone())  # type: ignore
        t.Muon(params, cfg, rt).step()
    torch.testing.assert_close(sum(parts[1:]), parts[0])
    worked = torch.stack([part.flatten(1).any(dim=1) for part in parts[1:]])
    assert worked.sum(dim=0).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("step", "lr_scale", "expected"),
    [
        (0, 1.0, 0.9),
        (5, 1.0, 0.94),
        (10, 1.0, 0.98),
        (500, 1.0, 0.98),
        (500, 0.5, 0.89),
        (500, 0.0, 0.8),
        (0, 0.0, 0.8),
    ],
)
def test_momentum_rises_and_falls(step: int, lr_scale: float, expected: float) -> None:
    """Over the warm-up steps, then with the learning rate; the optimizer gets it."""
    changes = {"muon_momentum_warmup_start": 0.9, "muon_momentum": 0.98, "muon_momentum_end": 0.8}
    assert t.muon_momentum_at(step, lr_scale, config(**changes)) == pytest.approx(expected)
    if lr_scale == 0.5:
        trainer = trainer_for(**changes)
        trainer.step = step
        trainer.train_step(lr_scale)
        assert trainer.optimizers["muon"].param_groups[0]["momentum"] == pytest.approx(expected)
        assert trainer.optimizers["muon"].param_groups[0]["lr"] == pytest.approx(0.014)
    assert t.muon_momentum_at(0, 1.0, config(muon_momentum_warmup_steps=0)) == 0.99


def test_weight_average() -> None:
    """What a run averages: the fp32 mean of the snapshots of the master weights."""
    trainer = trainer_for()
    snapshots = []
    for _ in range(3):
        trainer.swa.update_parameters(trainer.model)
        snapshots.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(torch.randn_like(p))
    averaged = dict(trainer.swa.module.named_parameters())
    assert averaged.keys() == snapshots[0].keys()
    for name, mean in averaged.items():
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, torch.stack([s[name] for s in snapshots]).mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sequence_order", ["spread", "file"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_calibration_reads_what_the_order_reaches_last(sequence_order: str, ranks: int) -> None:
    """The order that training reads in, whichever. Ranks share the batches without overlap."""
    trainers = [
        trainer_for(rank, ranks, calibration_tokens=6500, sequence_order=sequence_order) for rank in range(ranks)
    ]
    data = trainers[0].data
    assert data.num_windows > 250
    parts = [trainer.calibration_batches for trainer in trainers]
    assert all(tokens.shape[0] * 32 <= t.CALIBRATION_BATCH for part in parts for tokens in part)
    got = torch.cat([tokens for part in parts for tokens in part])
    numbers = range(data.num_windows - 6500 // 32, data.num_windows)
    expected = [data.train.read(n * data.stride % data.num_windows * 32, 33).tolist() for n in numbers]
    assert sorted(got.tolist()) == sorted(expected)
    first = data.train_sequences(range(data.num_windows - len(expected))).tolist()
    assert not {tuple(sequence) for sequence in first} & {tuple(sequence) for sequence in expected}


def test_calibration_costs() -> None:
    """Mean squared gradients of each row of all matrices over the calibration batches, and nothing else changes."""
    trainer = trainer_for(calibration_tokens=4096)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.calibrate()
    matrices = {n: p for n, p in trainer.model.named_parameters() if t.category(n) != "small"}
    assert trainer.costs.keys() == matrices.keys() and all(p.dim() == 2 for p in matrices.values())
    expected = {name: torch.zeros(len(p)) for name, p in matrices.items()}
    assert len(trainer.calibration_batches) == 2
    for batch in trainer.calibration_batches:
        loss = trainer.model(batch[:, :-1], batch[:, 1:]).mean()
        for name, grad in zip(matrices, torch.autograd.grad(loss, list(matrices.values())), strict=True):
            expected[name] += grad.square().mean(dim=1)
    for name, cost in trainer.costs.items():
        torch.testing.assert_close(cost, expected[name], atol=1e-12, rtol=1e-3)
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_training_step() -> None:
    """One compiled bf16 step on a GPU."""
    cfg = config(compute_dtype="bfloat16", model_dim=128)
    model = t.GPT(cfg, torch.bfloat16)
    load_weights(model, model_for(cfg).state_dict(), mlp_grids(cfg))
    model.cuda()
    ids = torch.randint(0, 320, (8, 32), device="cuda")
    loss = torch.compile(model, fullgraph=True, dynamic=False)(ids, ids).mean()
    loss.backward()
    assert torch.isfinite(loss)
