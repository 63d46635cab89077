"""Which form of the layer imitates softmax attention best: one alignment run per arm, on the layers that a window alone cannot imitate.

    python eval/layer_arms.py --teacher ../shared/teacher --data ../shared/data

trains, for every arm, its own q and o projections and states on the teacher's inputs of a few layers, and measures the
error of their outputs on held-out text. Writes eval/results/distillation-layers.json. Cheap: it finds what is worth a whole
distillation (eval/distillation.py). Interrupted runs go on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from planting import plant_recall
from reporting import made_once, rows_table, write_results
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dsla_hf.core.attention import half_life_to_logit
from dsla_hf.training.text import PackedTokens, read_texts
from dsla_kernels import log_decays

LAYERS = (5, 9, 11, 12, 13, 15)  # where the alignment error of a 64-token window stays above 10 %
LENGTH, BATCH, STEPS, WARMUP = 2048, 8, 300, 20


@dataclass(frozen=True)
class Arm:
    """What a layer is. The defaults are those of `DSLAConfig` at the time of the experiment, gates' learning rate apart."""

    window: str = "blocks"  # "blocks": own block and the one before; or a number: a sliding window of so many tokens
    block: int = 64
    lag: int = 0  # of the states behind a sliding window, in blocks; 0: they end with the block before, decayed to the token
    sinks: int = 0  # first tokens that the window always sees
    states: int = 2  # 0: none
    wide: bool = False  # keys and queries of twice the size (one state of the bytes of two)
    half_lives: tuple[tuple[float, float], ...] = ((16.0, 16.0), (16.0, 16.0))  # per state: of the fastest and the slowest channel
    gates: str = "value"  # what they read: value, key (not rotated), hidden
    gate_rank: int = 16
    gate_rate: float = 20.0  # learning rate of everything but projections and maps, relative to theirs
    rotated: bool = True  # the states hold rotated keys
    key_map: bool = False  # learned map per KV head and state on keys
    own_query: bool = False  # the states are read by a query projection of their own
    query_map: bool = False  # learned map per query head and state on queries
    features: str = "none"  # of keys and queries: none, softmax, relu
    write: str = "all"  # what scales a write: all (1), gate (sigmoid of the value), channel (the same by channel), tied (1 - decay)
    mix: str = "head"  # head; token: a function of the query; channel: by rotary pair
    norm: str = "rms"  # of the state output: rms, none, or sum (divided by the sum of weights, needs features)
    join: str = "alpha"  # alpha: shared denominator; gate: sigmoid of the query, added
    trained: tuple[str, ...] = ("q", "o")
    lora: int = 0  # rank of the update of the trained projections; 0: full


SPREAD = ((64.0, 4096.0), (8.0, 256.0))
OURS: dict[str, Any] = {"sinks": 4, "half_lives": SPREAD}
LAGGING: dict[str, Any] = {**OURS, "window": "128", "lag": 2}
MAPS: dict[str, Any] = {**OURS, "key_map": True, "query_map": True}

ARMS: dict[str, Arm] = {
    # without states
    "window 64-127": Arm(states=0),
    "window 64-127, 4 sinks": Arm(states=0, sinks=4),
    "window 64, 4 sinks": Arm(states=0, window="64", sinks=4),
    "window 192": Arm(states=0, window="192"),
    "window 192, 4 sinks": Arm(states=0, window="192", sinks=4),
    "window 256, 4 sinks": Arm(states=0, window="256", sinks=4),
    # the layer as it was; then with sinks and half-lives spread over the channels
    "default": Arm(gate_rate=1),
    "gate rate 20": Arm(),
    "4 sinks": Arm(sinks=4),
    "ours": Arm(**OURS),
    "1 sink": Arm(**{**OURS, "sinks": 1}),
    "16 sinks": Arm(**{**OURS, "sinks": 16}),
    "no sinks": Arm(**{**OURS, "sinks": 0}),
    "gate rate 1": Arm(**OURS, gate_rate=1),
    "gate rate 60": Arm(**OURS, gate_rate=60),
    "one state": Arm(sinks=4, states=1, half_lives=((8.0, 4096.0),)),
    "one state, twice as wide": Arm(sinks=4, states=1, wide=True, half_lives=((8.0, 4096.0),)),
    "equal half-lives": Arm(sinks=4, half_lives=((8.0, 4096.0), (8.0, 4096.0))),
    "gate rank 64": Arm(**OURS, gate_rank=64),
    "gates from key": Arm(**OURS, gates="key"),
    "gates from hidden": Arm(**OURS, gates="hidden"),
    "not rotated": Arm(**OURS, rotated=False),
    "query map": Arm(**OURS, query_map=True),
    "query map, not rotated": Arm(**OURS, query_map=True, rotated=False),
    "maps, not rotated": Arm(**MAPS, rotated=False),
    "write gate": Arm(**OURS, write="gate"),
    "write tied": Arm(**OURS, write="tied"),
    "mix by token": Arm(**OURS, mix="token"),
    "added by a gate": Arm(**OURS, join="gate"),
    "overlapping, window 64": Arm(**OURS, window="64"),
    "softmax features": Arm(**MAPS, features="softmax"),
    "softmax features, not rotated": Arm(**MAPS, features="softmax", rotated=False),
    "softmax features, not rotated, sum": Arm(**MAPS, features="softmax", rotated=False, norm="sum"),
    "softmax features, not rotated, write gate": Arm(**MAPS, features="softmax", rotated=False, write="gate"),
    "relu features, not rotated": Arm(**MAPS, features="relu", rotated=False),
    # what looked promising, together
    "mix by channel": Arm(**OURS, mix="channel"),
    "mix by channel, write gate": Arm(**OURS, mix="channel", write="gate"),
    "mix by channel, write gate, one state": Arm(sinks=4, states=1, half_lives=((8.0, 4096.0),), mix="channel", write="gate"),
    "write by channel": Arm(**OURS, write="channel"),
    "own query": Arm(**OURS, own_query=True),
    "own query, write gate": Arm(**OURS, own_query=True, write="gate"),
    "relu features, rotated": Arm(**MAPS, features="relu"),
    "relu features, no maps": Arm(**OURS, features="relu", rotated=False),
    "relu features, not rotated, write gate": Arm(**MAPS, features="relu", rotated=False, write="gate"),
    "relu features, not rotated, sum": Arm(**MAPS, features="relu", rotated=False, norm="sum"),
    "no norm": Arm(**OURS, norm="none"),
    # a sliding window over the 128 tokens that the ring holds anyway; the states, block-wise, lag behind and overlap with it
    "window 128, 4 sinks": Arm(states=0, window="128", sinks=4),
    "lagging": Arm(**LAGGING),
    "lagging, write gate": Arm(**LAGGING, write="gate"),
    "lagging, write gate shared": Arm(**LAGGING, write="shared"),
    "lagging, write gate, 16 sinks": Arm(**{**LAGGING, "sinks": 16}, write="gate"),
    "lagging, write gate, no sinks": Arm(**{**LAGGING, "sinks": 0}, write="gate"),
    "lagging, write gate, one state": Arm(**{**LAGGING, "half_lives": ((8.0, 4096.0),)}, states=1, write="gate"),
    "lagging, write gate, equal half-lives": Arm(**{**LAGGING, "half_lives": ((8.0, 4096.0),) * 2}, write="gate"),
    "lagging, write gate, half-lives 16": Arm(**{**LAGGING, "half_lives": ((16.0, 16.0),) * 2}, write="gate"),
    "lagging, write gate, mix by channel": Arm(**LAGGING, write="gate", mix="channel"),
    # other window sizes
    "window 96-191, 4 sinks": Arm(states=0, sinks=4, block=96),
    "window 128-255, 4 sinks": Arm(states=0, sinks=4, block=128),
    "ours, window 32-63": Arm(**OURS, block=32),
    "ours, window 128-255": Arm(**OURS, block=128),
    "mix by channel, write gate, window 128-255": Arm(**OURS, mix="channel", write="gate", block=128),
    "k and v trained": Arm(**OURS, trained=("q", "k", "v", "o")),
    "LoRA 16 on q and o": Arm(**OURS, lora=16),
}


class ArmAttention(nn.Module):
    """One attention layer of an arm, on full rows of text: projections, window, states."""

    def __init__(self, arm: Arm, base: Any):
        super().__init__()
        self.arm = arm
        config = base.config
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, base.head_dim
        self.scale = self.size**-0.5
        for name in "qkvo":
            projection = copy.deepcopy(getattr(base, f"{name}_proj")).float()
            projection.requires_grad_(name in arm.trained and not arm.lora)
            setattr(self, name, projection)
            if arm.lora and name in arm.trained:
                down = nn.Parameter(torch.randn(arm.lora, projection.in_features) * projection.in_features**-0.5)
                setattr(self, f"lora_{name}", nn.ParameterList([down, nn.Parameter(torch.zeros(projection.out_features, arm.lora))]))
        if not arm.states:
            return
        heads, kv_heads, states, size = self.heads, self.kv_heads, arm.states, self.size
        features = size * (2 if arm.wide else 1)
        self.paired = arm.rotated and arm.features == "none" and not arm.wide
        decays = size // 2 if self.paired else features
        source = config.hidden_size if arm.gates == "hidden" else size
        self.gate_down = nn.Parameter(torch.randn(kv_heads, source, arm.gate_rank) * source**-0.5)
        self.gate_up = nn.Parameter(torch.randn(kv_heads, arm.gate_rank, states * decays) * 0.02)
        bias = torch.empty(kv_heads, states, decays)
        for i, (fast, slow) in enumerate(arm.half_lives):
            lives = [fast * (slow / fast) ** (c / (decays - 1)) for c in range(decays)]
            bias[:, i] = torch.tensor([half_life_to_logit(life) for life in lives])
        self.gate_bias = nn.Parameter(bias)
        self.mix_logits = nn.Parameter(torch.zeros(heads, states))
        if arm.mix == "channel":
            self.mix_channels = nn.Parameter(torch.ones(heads, states, decays))
        if arm.own_query:
            self.own_q = copy.deepcopy(base.q_proj).float().requires_grad_()
        if arm.mix == "token":
            self.mix_map = nn.Parameter(torch.zeros(heads, size, states))
        self.norm_weight = nn.Parameter(torch.ones(heads, size))
        self.state_gain = nn.Parameter(torch.ones(heads))
        self.state_bias = nn.Parameter(torch.zeros(heads) if arm.join == "alpha" else torch.full((heads,), -3.0))
        if arm.join == "gate":
            self.join_map = nn.Parameter(torch.zeros(heads, size))
        eye = torch.eye(size)
        if arm.wide:
            eye = torch.cat([eye, eye], 1)
        if arm.key_map or arm.wide:
            self.key_map = nn.Parameter(eye.repeat(kv_heads, states, 1, 1) + 0.02 * torch.randn(kv_heads, states, size, features))
        if arm.query_map or arm.wide:
            self.query_map = nn.Parameter(eye.repeat(heads, states, 1, 1) + 0.02 * torch.randn(heads, states, size, features))
        writes = {"gate": states, "shared": 1, "channel": states * decays}.get(arm.write, 0)
        if writes:
            self.write_map = nn.Parameter(torch.zeros(kv_heads, size, writes))
            self.write_bias = nn.Parameter(torch.zeros(kv_heads, writes))

    def groups(self, rate: float) -> list[dict]:
        slow = ("q.", "k.", "v.", "o.", "lora_", "key_map", "query_map", "own_q")
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in named if name.startswith(slow)], "lr": rate},
            {"params": [p for name, p in named if not name.startswith(slow)], "lr": rate * self.arm.gate_rate},
        ]

    def project(self, name: str, x: Tensor) -> Tensor:
        y = getattr(self, name)(x)
        if self.arm.lora and name in self.arm.trained:
            down, up = getattr(self, f"lora_{name}")
            y = y + x @ down.T @ up.T
        return y

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden.float()
        q_plain, k_plain, v = (self.project(n, hidden).unflatten(-1, (-1, self.size)) for n in "qkv")
        q, k = apply_rotary_pos_emb(q_plain, k_plain, cos.float(), sin.float(), unsqueeze_dim=2)
        o = self.attend(hidden, q, k, v, q_plain, k_plain, cos.float(), sin.float())
        return self.project("o", o.flatten(2))

    def attend(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, q_plain: Tensor, k_plain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        arm = self.arm
        tokens = q.shape[1]
        q_b, k_b, v_b = (in_blocks(x, arm.block) for x in (q, k, v))
        blocks = q_b.shape[1]
        q_b = q_b.unflatten(3, (self.kv_heads, -1)) * self.scale  # [B, N, C, Hkv, R, K]
        o, lse = self.window(q_b, k_b, v_b)
        if arm.states:
            o_state, rms = self.read_states(hidden, q, k, v, q_plain, k_plain, cos, sin)
            heads = (self.kv_heads, -1)
            gain, bias = (p.unflatten(0, heads) for p in (self.state_gain, self.state_bias))
            if arm.join == "alpha":
                alpha = torch.sigmoid(gain * rms.log() + bias - lse)[..., None]
                later = torch.arange(blocks, device=q.device)[:, None, None, None, None] > 1
                o = o + torch.where(later, alpha, 0) * (o_state - o)
            else:
                gate = torch.sigmoid(torch.einsum("bnchrk,hrk->bnchr", q_b, self.join_map.unflatten(0, heads)) + bias)
                o = o + gate[..., None] * o_state
        return o.flatten(1, 2)[:, :tokens].flatten(2, 3)

    def window(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        arm, blocks, device = self.arm, q.shape[1], q.device
        back = 1 if arm.window == "blocks" else math.ceil((int(arm.window) - 1) / self.arm.block)
        k_w, v_w = (torch.cat([F.pad(x, (0, 0) * 3 + (i, 0))[:, :blocks] for i in range(back, -1, -1)], 2) for x in (k, v))
        query = torch.arange(self.arm.block, device=device)[:, None] + back * self.arm.block
        key = torch.arange((back + 1) * self.arm.block, device=device)
        first = (
            torch.arange(blocks, device=device)[:, None, None] * self.arm.block - back * self.arm.block
        )  # token of the first key of each block
        visible = (key <= query) & (first + key >= 0)
        if arm.window != "blocks":
            visible &= key > query - int(arm.window)
        if arm.sinks:
            k_w, v_w = (torch.cat([x[:, :1, : arm.sinks].expand(-1, blocks, -1, -1, -1), w], 2) for x, w in ((k, k_w), (v, v_w)))
            sink = torch.arange(arm.sinks, device=device)
            earliest = 0 if arm.window == "blocks" else query - int(arm.window) + 1  # the sliding window sees tokens from here on
            visible = torch.cat([(sink < first + earliest).expand(blocks, self.arm.block, -1), visible], -1)
        scores = torch.einsum("bnchrk,bndhk->bnhrcd", q, k_w).masked_fill(~visible[:, None, None], float("-inf"))
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        return torch.einsum("bnhrcd,bndhv->bnchrv", weights, v_w), lse.permute(0, 1, 4, 2, 3)

    def read_states(self, hidden, q, k, v, q_plain, k_plain, cos, sin) -> tuple[Tensor, Tensor]:
        arm = self.arm
        if arm.own_query:
            q, _ = apply_rotary_pos_emb(self.own_q(hidden).unflatten(-1, (-1, self.size)), k, cos, sin, unsqueeze_dim=2)
        if not arm.rotated:
            q, k = q_plain, k_plain
        q = q.unflatten(2, (self.kv_heads, -1)) * self.scale
        states = arm.states
        sink = torch.arange(q.shape[1], device=q.device) < arm.sinks  # the window sees these: nothing is counted twice
        mix_logits = self.mix_logits.unflatten(0, (self.kv_heads, -1))
        if arm.mix == "token":
            mix_logits = mix_logits + torch.einsum("bthrk,hrki->bthri", q, self.mix_map.unflatten(0, (self.kv_heads, -1)))
        mix = mix_logits.softmax(-1)
        if arm.query_map or arm.wide:
            q_i = torch.einsum("bthrk,hrikf->bthrif", q, self.query_map.unflatten(0, (self.kv_heads, -1)))
        else:
            q_i = q[..., None, :].expand(-1, -1, -1, -1, states, -1)
        if arm.key_map or arm.wide:
            k_i = torch.einsum("bthk,hikf->bthif", k, self.key_map)
        else:
            k_i = k[:, :, :, None].expand(-1, -1, -1, states, -1)
        if arm.features == "softmax":
            q_i, k_i = (q_i / self.scale).softmax(-1), k_i.softmax(-1)
        elif arm.features == "relu":
            q_i, k_i = (q_i / self.scale).relu(), k_i.relu()
        q_i = q_i * mix[..., None]
        if arm.mix == "channel":
            channels = self.mix_channels.unflatten(0, (self.kv_heads, -1))
            q_i = q_i * (torch.cat([channels, channels], -1) if self.paired else channels)

        source = {"value": v, "key": k_plain, "hidden": None}[arm.gates]
        if source is None:
            normed = F.rms_norm(hidden, hidden.shape[-1:])
            logits = torch.einsum("btv,hvr,hrg->bthg", normed, self.gate_down, self.gate_up)
        else:
            normed = F.rms_norm(source, source.shape[-1:])
            logits = torch.einsum("bthg,hgd->bthd", torch.einsum("bthv,hvr->bthr", normed, self.gate_down), self.gate_up)
        log_decay = log_decays(logits.unflatten(-1, (states, -1)) + self.gate_bias, k_i.shape[-1])
        if arm.write in ("gate", "shared", "channel"):
            write = torch.einsum("bthv,hvi->bthi", F.rms_norm(v, v.shape[-1:]), self.write_map) + self.write_bias
            write = write.sigmoid().unflatten(-1, (1 if arm.write == "shared" else states, -1))
            k_i = k_i * (torch.cat([write, write], -1) if arm.write == "channel" and self.paired else write)
        elif arm.write == "tied":
            k_i = k_i * -torch.expm1(log_decay)
        if arm.norm == "sum":
            v = F.pad(v, (0, 1), value=1.0)
        v = v.masked_fill(sink[:, None, None], 0)

        k_b, v_b, decay, q_b = (in_blocks(x, arm.block) for x in (k_i, v, log_decay, q_i))
        blocks = q_b.shape[1]
        cumulative = decay.cumsum(2)
        total = cumulative[:, :, -1]
        added = torch.einsum("bnchik,bnchv->bnhikv", k_b * (total[:, :, None] - cumulative).exp(), v_b)
        at_boundaries = scan(total.exp()[..., None], added)  # [B, N, ...]: entry n holds blocks 0 to n
        before = F.pad(at_boundaries, (0, 0) * 4 + (2, 0))[:, :blocks]
        if arm.window == "blocks" or arm.lag == 2:  # the states end two blocks back: where a block-wise window begins
            o = torch.einsum("bnchrik,bnhikv->bnchrv", q_b, before)
        else:  # overlapping: everything up to the block before
            before = F.pad(at_boundaries, (0, 0) * 4 + (1, 0))[:, :blocks]
            o = torch.einsum("bnchrik,bnhikv->bnchrv", q_b * cumulative.exp()[:, :, :, :, None], before)
        if arm.norm == "sum":
            o, weight = o[..., :-1], o[..., -1].clamp_min(1e-6)
            return o / weight[..., None], weight
        rms = (o.square().mean(-1) + 1e-6).sqrt()
        if arm.norm == "none":
            return o, rms
        return o / rms[..., None] * self.norm_weight.unflatten(0, (self.kv_heads, -1)), rms


def in_blocks(x: Tensor, size: int) -> Tensor:
    """`[B, T, ...]` to `[B, N, size, ...]`, zeros at the end."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % size)).unflatten(1, (-1, size))


def scan(decay: Tensor, added: Tensor) -> Tensor:
    """S_n = decay_n S_{n-1} + added_n along dim 1, by recursive doubling."""
    step = 1
    while step < added.shape[1]:
        added = torch.cat([added[:, :step], added[:, step:] + decay[:, step:] * added[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    return added


class Capture:
    """What goes into and comes out of the teacher's attention layers."""

    def __init__(self, model: Any, layers: tuple[int, ...]):
        self.model, self.seen = model, {}
        for index in layers:
            model.model.layers[index].self_attn.register_forward_hook(self.hook(index), with_kwargs=True)

    def hook(self, index: int) -> Any:
        def keep(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.seen[index] = (hidden, *kwargs["position_embeddings"], output[0])

        return keep

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]:
        self.model.model(input_ids=ids, use_cache=False)
        return self.seen


def run_arm(arm: Arm, teacher: Capture, train: Tensor, held_out: dict[str, tuple[Tensor, Tensor | None]], seed: int, rate: float) -> dict:
    device = train.device
    torch.manual_seed(seed)
    students = nn.ModuleDict({str(i): ArmAttention(arm, teacher.model.model.layers[i].self_attn) for i in LAYERS}).to(device)
    groups = [group for s in students.values() for group in s.groups(rate) if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    )
    forward = torch.compile(ArmAttention.forward, dynamic=False) if device.type == "cuda" else ArmAttention.forward
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    for step in range(STEPS):
        rows = order[(step * BATCH) % len(train) :][:BATCH]
        seen, loss = teacher(train[rows]), 0.0
        for i in LAYERS:
            hidden, cos, sin, target = seen[i]
            error = forward(students[str(i)], hidden, cos, sin) - target.float()
            loss = loss + error.square().sum() / target.float().square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {"training_seconds": round(seconds, 1)}
    with torch.no_grad():
        for name, (blocks, mask) in held_out.items():
            errors, energies = torch.zeros(len(LAYERS)), torch.zeros(len(LAYERS))
            for first in range(0, len(blocks), BATCH):
                seen = teacher(blocks[first : first + BATCH])
                keep = 1.0 if mask is None else mask[first : first + BATCH]
                for j, i in enumerate(LAYERS):
                    hidden, cos, sin, target = seen[i]
                    error = ArmAttention.forward(students[str(i)], hidden, cos, sin) - target.float()
                    errors[j] += (error.square().sum(-1) * keep).sum().cpu()
                    energies[j] += (target.float().square().sum(-1) * keep).sum().cpu()
            result[name] = (errors / energies).mean().item()
            result[f"{name}_by_layer"] = {str(i): e for i, e in zip(LAYERS, (errors / energies).tolist(), strict=True)}
    if arm.states:
        gates = {i: students[str(i)] for i in LAYERS}
        result["learned_half_lives"] = {
            str(i): (-math.log(2) / log_decays(s.gate_bias, s.gate_bias.shape[-1]).float()).log().mean((0, 2)).exp().tolist()
            for i, s in gates.items()
        }
    return result


def load_data(args: argparse.Namespace, tokenizer: Any, device: torch.device) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor | None]]]:

    def make() -> tuple[Tensor, dict[str, Tensor]]:
        texts = list(read_texts(args.data / "distill.txt.xz"))
        random.Random(0).shuffle(texts)
        train = PackedTokens.from_texts(texts, tokenizer, LENGTH, max_tokens=STEPS * BATCH * LENGTH).blocks
        train = plant_recall(train, tokenizer, 0.1, 0)
        kinds = {}
        for name in ("novels", "code"):
            kinds[name] = PackedTokens.from_texts(read_texts(args.data / f"{name}_val.jsonl.xz"), tokenizer, LENGTH, 400 * LENGTH).blocks
            kinds[name] = kinds[name][:: max(1, len(kinds[name]) // 32)][:32]
        plain = kinds["novels"]
        kinds["recall"] = plant_recall(plain, tokenizer, 1.0, 1)
        return train, kinds

    train, kinds = made_once(args.output / "data.pt", make)
    held_out: dict[str, tuple[Tensor, Tensor | None]] = {name: (x.to(device), None) for name, x in kinds.items()}
    # Only the positions that predict the answer, which begins 8 tokens before the end.
    mask = torch.zeros(kinds["recall"].shape, device=device)
    mask[:, -9:-4] = 1
    held_out["recall"] = (held_out["recall"][0], mask)
    return train.to(device), held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="Llama checkpoint to imitate (16 layers)")
    parser.add_argument("--data", type=Path, required=True, help="folder with distill.txt.xz and the held-out texts")
    parser.add_argument("--output", type=Path, default=Path("runs/layers"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--parallel", type=int, default=1, help="arms to run at the same time on the device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--share", help=argparse.SUPPRESS)  # i/n: the arms of one process
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    args.output.mkdir(parents=True, exist_ok=True)

    def file(name: str) -> Path:
        return args.output / f"{name.replace(', ', '-').replace(' ', '-')}-{args.seed}.json"

    if args.share:
        index, count = map(int, args.share.split("/"))
        model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).to(device).eval()
        train, held_out = load_data(args, tokenizer, device)
        teacher = Capture(model, LAYERS)
        for name in args.arms[index::count]:
            if not file(name).exists():
                torch._dynamo.reset()
                row = run_arm(ARMS[name], teacher, train, held_out, args.seed, args.learning_rate)
                file(name).write_text(json.dumps({"arm": name, "seed": args.seed, **row, **asdict(ARMS[name])}))
                print(
                    f"{name}: novels {row['novels']:.4f} code {row['code']:.4f} recall {row['recall']:.4f} {row['training_seconds']} s",
                    flush=True,
                )
        return
    load_data(args, tokenizer, torch.device("cpu"))
    workers = [subprocess.Popen([sys.executable, *sys.argv, "--share", f"{i}/{args.parallel}"]) for i in range(args.parallel)]
    failed = [worker.wait() for worker in workers]
    if any(failed):
        raise SystemExit("an arm failed; its error is above. Run the same command again to go on")
    rows = [json.loads(file(name).read_text()) for name in args.arms]
    write_results("distillation-layers", rows)
    print(rows_table(rows, ["arm", "novels", "code", "recall", "training_seconds"]))


if __name__ == "__main__":
    main()
