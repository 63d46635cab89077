"""Which form of a state comes nearest to a checkpoint's attention, beside a window of equal bytes? Layer by layer, by alignment alone.

    python eval/state_forms.py MODEL TEXT                          # eval/results/state-forms.json, a table
    python eval/state_forms.py MODEL TEXT --layers 2,9 --forms "window 512" "relu"
    python eval/state_forms.py page                                # docs/measured/state-forms.md, from the result

Each form takes the place of one layer's softmax, on the original's own inputs: query and output projections and what is the form's own are
trained on the error of the layer's output, as a share of its energy, which is then measured on rows that were not trained on. Scores of all
pairs of tokens are written out, so this says what a form can do and nothing of speed. Forms that are measured are not measured again.

Forms, with the window that leaves all of them the same bytes (a state of K x V numbers in bf16 takes what K / 2 tokens of a window take):

- `window W`: a softmax window and four sinks, nothing else.
- `null`: a window beside which what lies outside has weight and a value of 0, by the number of its tokens; takes no bytes.
- `mean`: the mean of all values outside, weighed in the same way; takes what half a token takes.
- `relu`, `exp`, `softmax`: sums of positive features of keys, and one denominator with the window (LoLCATs, arXiv 2410.10254; exp and
  softmax features as in Hedgehog, arXiv 2402.04347). `decay`: a gate per token, from its value; `two`: two of them, mixed. A number: how
  many features there are, where not as many as channels.
- `layer`: `DualStateAttention`, the library's layer, whose start is matched; `one`: its history state alone.

`gate`: the weight of the states, or of the output where there is no window, also depends on what the layer reads at the token; `gate of q`:
on the head's rotated query. `pairs`: features see the lengths of rotary pairs, which no rotation changes; `slow`: of the faster half, and
the slower half as it is. `unrotated`: features of keys and queries before their rotation. `pure` has no window.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reporting import RESULTS, rows_table, write_results
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, apply_rotary_pos_emb

from dsla_hf import DualStateAttention
from dsla_hf.core.files import write_whole
from dsla_hf.core.plots import figure, save
from dsla_hf.core.progress import bar, say
from dsla_hf.core.tables import markdown_table
from dsla_hf.models.loading import device, load_model, load_tokenizer
from dsla_hf.training.text import read_texts

DOCS = Path(__file__).parents[1] / "docs"
NAME = "state-forms"
EQUAL = "window 512"  # has the bytes of all forms with a window
SINKS = 4
APART = 4  # rows that are measured on
WARM_UP = 10  # steps
SMALLEST = 1e-9
CLOSED = -2.0  # logit that weights of states start from
LIMIT = 12.0  # of what is exponentiated


@dataclass(frozen=True)
class Form:
    """window: tokens, 0 for none. features: of keys and queries, or None. decays: gates per token. layer: states of the library's layer.
    size: number of features, as many as channels when 0. pairs: share of the rotary pairs, the fastest, of which features see the length
    alone."""

    window: int
    features: str | None = None
    decays: int = 0
    gate: bool = False
    gate_of_q: bool = False
    pairs: float = 0.0
    null: bool = False
    rotated: bool = True
    layer: int = 0
    size: int = 0


FORMS = {
    "window 512": Form(512),
    "window 480": Form(480),
    "null": Form(512, null=True),
    "null, gate": Form(512, null=True, gate=True),
    "mean": Form(510, "mean", size=1),
    "mean, gate": Form(510, "mean", size=1, gate=True),
    "relu, 16, gate": Form(504, "relu", size=16, gate=True),
    "relu": Form(480, "relu"),
    "exp": Form(480, "exp"),
    "softmax": Form(480, "softmax"),
    "relu, gate": Form(480, "relu", gate=True),
    "relu, decay": Form(480, "relu", decays=1),
    "relu, decay, gate": Form(480, "relu", decays=1, gate=True),
    "relu, decay, gate of q": Form(480, "relu", decays=1, gate_of_q=True),
    "relu, 32, decay, gate of q": Form(496, "relu", size=32, decays=1, gate_of_q=True),
    "relu, 16, decay, gate of q": Form(504, "relu", size=16, decays=1, gate_of_q=True),
    "relu, 16, decay": Form(504, "relu", size=16, decays=1),
    "relu, 16, decay, gate": Form(504, "relu", size=16, decays=1, gate=True),
    "pairs, decay": Form(480, "relu", decays=1, pairs=1.0),
    "pairs, slow, decay": Form(480, "relu", decays=1, pairs=0.5),
    "relu, unrotated, decay": Form(480, "relu", decays=1, rotated=False),
    "relu, unrotated, gate": Form(480, "relu", gate=True, rotated=False),
    "layer, one": Form(480, layer=1),
    "layer, two": Form(448, layer=2),
    "pure, layer": Form(0, layer=2),
    "pure, relu, two": Form(0, "relu", decays=2),
    "pure, relu, two, gate": Form(0, "relu", decays=2, gate=True),
    "pure, exp, two, gate": Form(0, "exp", decays=2, gate=True),
}


@dataclass
class Layer:
    """What a layer of the original reads and gives, for all rows: `hidden` `[N, T, hidden]`, rotated and unrotated `k`, `v`
    `[N, T, Hkv, D]`, `output` `[N, T, hidden]`; cos and sin `[1, T, D]`; its projections."""

    hidden: Tensor
    k: Tensor
    unrotated: Tensor
    v: Tensor
    output: Tensor
    rotation: tuple[Tensor, Tensor]
    q_proj: Tensor
    o_proj: Tensor


def read_rows(model: str, text: str, tokens: int, count: int) -> Tensor:
    """`[count, tokens]`, from the beginning of the text.

    Raises:
        ValueError: if there is too little of it.
    """
    tokenizer, ids = load_tokenizer(model), []
    for document in read_texts(text):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens * count:
            return torch.tensor(ids[: tokens * count]).view(count, tokens)
    raise ValueError(f"{text} has {len(ids):,} tokens, and {count} rows of {tokens} need {tokens * count:,}: give more text, or --rows")


@torch.no_grad()
def record(model: Any, rows: Tensor, indices: Sequence[int]) -> dict[int, Layer]:
    """What these layers of the original read and give."""
    parts: dict[int, list[tuple[Tensor, ...]]] = {index: [] for index in indices}
    rotation: list[tuple[Tensor, Tensor]] = []

    def keep(index: int) -> Any:
        def hook(attention: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            hidden, turn = kwargs["hidden_states"], kwargs["position_embeddings"]
            shape = (*hidden.shape[:-1], -1, attention.head_dim)
            k, v = attention.k_proj(hidden).view(shape), attention.v_proj(hidden).view(shape)
            parts[index].append((hidden, apply_rotary_pos_emb(k, k, *turn, unsqueeze_dim=2)[1], k, v, output[0]))
            rotation[:] = [turn]

        return hook

    attentions = {index: model.model.layers[index].self_attn for index in indices}
    hooks = [attention.register_forward_hook(keep(index), with_kwargs=True) for index, attention in attentions.items()]
    for row in rows.split(1):
        model(input_ids=row, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    weights = {index: (attention.q_proj.weight.clone(), attention.o_proj.weight.clone()) for index, attention in attentions.items()}
    return {
        index: Layer(*(torch.cat(part) for part in zip(*found, strict=True)), rotation[0], *weights[index])
        for index, found in parts.items()
    }


class Student(nn.Module):
    """A form in the place of one layer's softmax."""

    def __init__(self, form: Form, layer: Layer):
        super().__init__()
        self.form, self.layer = form, layer
        self.head_dim, self.kv_heads = layer.k.shape[-1], layer.k.shape[2]
        self.heads = layer.q_proj.shape[0] // self.head_dim
        self.q_proj, self.o_proj = nn.Parameter(layer.q_proj.clone()), nn.Parameter(layer.o_proj.clone())
        own = nn.ParameterDict()
        if form.layer:
            self._make_layer()
        elif form.null or form.features:
            own["bias"], own["gain"] = torch.full((self.heads,), CLOSED), torch.ones(self.heads)
        if form.gate:
            own["gate"] = torch.zeros(self.heads, layer.hidden.shape[-1])
        if form.gate_of_q:
            own["gate_of_q"] = torch.zeros(self.heads, self.head_dim)
        if form.features:
            small = torch.eye(self.head_dim, form.size or self.head_dim) * self.head_dim**-0.25
            own["of_q"], own["of_k"] = small.repeat(self.heads, 1, 1), small.repeat(self.kv_heads, 1, 1)
        for number in range(form.decays):  # half-lives of about 100 tokens and of 5
            own[f"decay_bias{number}"] = torch.full((self.kv_heads,), (5.0, 2.0)[number])
            own[f"decay{number}"] = torch.zeros(self.kv_heads, self.head_dim)
        if form.decays == 2:
            own["mix"] = torch.zeros(self.heads)
        self.own = own.to(layer.k.device)

    def _make_layer(self) -> None:
        core = DualStateAttention(self.heads, self.kv_heads, self.head_dim, window_size=self.form.window)
        self.core = core.to(self.layer.k.device)
        with torch.no_grad():
            if self.form.layer == 1:
                core.mix_logits.copy_(torch.tensor([30.0, -30.0]).expand_as(core.mix_logits))
                core.mix_logits.requires_grad_(False)
            if self.form.window:
                core.state_bias.fill_(-6.0)
            norm = self.layer.output.square().mean().sqrt() / self.layer.o_proj.square().sum(1).mean().sqrt()
            core.norm_weight.fill_(norm)

    def gates(self) -> list[nn.Parameter]:
        return [weight for name, weight in self.named_parameters() if not name.endswith("_proj") and weight.requires_grad]

    def forward(self, rows: Tensor) -> Tensor:
        """`[B, T, hidden]` of rows `[B]` of the layer's record."""
        layer, form = self.layer, self.form
        hidden, k, v = layer.hidden[rows], layer.k[rows], layer.v[rows]
        unrotated = F.linear(hidden, self.q_proj).unflatten(-1, (self.heads, self.head_dim))
        q = apply_rotary_pos_emb(unrotated, unrotated, *layer.rotation, unsqueeze_dim=2)[0]
        if form.layer:
            return F.linear(self.core(q, k, v)[0].flatten(2), self.o_proj)
        t = torch.arange(q.shape[1], device=q.device)
        causal = t[:, None] >= t
        inside = causal & ((t[:, None] - t < form.window) | (t < SINKS)) if form.window else torch.zeros_like(causal)
        outside = causal & ~inside
        more = F.linear(hidden, self.own["gate"]) if form.gate else 0.0
        if form.gate_of_q:
            more = torch.einsum("bthd,hd->bth", q, self.own["gate_of_q"])
        own_k = k if form.rotated else layer.unrotated[rows]
        of_q, own_k = (lengths_of_pairs(x, form.pairs) for x in (q if form.rotated else unrotated, own_k))
        o, log_sum = self._softmax(q, k, v, inside) if form.window else (None, None)
        if form.null:
            count = outside.sum(-1)
            logit = self.own["bias"] + self.own["gain"] * count.clamp(min=1).log()[:, None] + more
            return F.linear((o * (1 - (logit - log_sum).sigmoid() * (count > 0)[:, None])[..., None]).flatten(2), self.o_proj)
        if form.features:
            read, log_mass = self._read(of_q, own_k, v, outside)
            if o is None:
                o = read * (self.own["gain"] * 2 + more).sigmoid()[..., None]
            else:
                alpha = (self.own["gain"] * log_mass + self.own["bias"] + more - log_sum).sigmoid() * outside.any(-1)[:, None]
                o = torch.lerp(o, read, alpha[..., None])
        return F.linear(o.flatten(2), self.o_proj)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to what is seen `[B, T, Hq, D]`, and the logarithm of its denominator `[B, T, Hq]`."""
        scores = torch.einsum("bthgd,bshd->bhgts", self._grouped(q), k) * self.head_dim**-0.5
        scores = scores.masked_fill(~seen, -1e30)
        log_sum = scores.logsumexp(-1)
        o = torch.einsum("bhgts,bshd->bthgd", (scores - log_sum[..., None]).exp(), v)
        return o.flatten(2, 3), log_sum.permute(0, 3, 1, 2).flatten(2)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of what is seen, by features, and the logarithm of its mass."""
        features = {"relu": lambda x: x.relu() + 1e-4, "exp": lambda x: x.clamp(-LIMIT, LIMIT).exp()}
        features["mean"] = lambda x: torch.ones_like(x)
        features["softmax"] = lambda x: torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
        of = features[self.form.features or ""]
        of_q, of_k = of(torch.einsum("bthd,hde->bthe", q, self.own["of_q"])), of(torch.einsum("bthd,hde->bthe", k, self.own["of_k"]))
        weights = torch.einsum("bthge,bshe->bhgts", self._grouped(of_q), of_k)
        if self.form.decays:
            weights = weights * self._kept(v)
        weights = weights * seen
        mass = weights.sum(-1).clamp(min=SMALLEST)
        read = torch.einsum("bhgts,bshd->bthgd", weights / mass[..., None], v)
        return read.flatten(2, 3), mass.log().permute(0, 3, 1, 2).flatten(2)

    def _kept(self, v: Tensor) -> Tensor:
        """What is left at a token of one before it `[B, Hkv, 1 or Hq / Hkv, T, T]`."""
        n = v * (v.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        causal = torch.ones(v.shape[1], v.shape[1], dtype=torch.bool, device=v.device).tril()
        kept = []
        for number in range(self.form.decays):
            logits = torch.einsum("bthd,hd->bth", n, self.own[f"decay{number}"]) + self.own[f"decay_bias{number}"]
            total = F.logsigmoid(logits).cumsum(1).transpose(1, 2)
            kept.append((total[..., :, None] - total[..., None, :]).masked_fill(~causal, -1e30).exp()[:, :, None])
        if len(kept) == 1:
            return kept[0]
        return torch.lerp(*kept, self.own["mix"].sigmoid().view(1, self.kv_heads, -1, 1, 1))

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.kv_heads, -1))


def lengths_of_pairs(x: Tensor, share: float) -> Tensor:
    """Queries or keys `[..., D]`, with the lengths of so many of their rotary pairs, from the fastest on, in place of both channels (the
    second is 0)."""
    count = round(share * (x.shape[-1] // 2))
    if not count:
        return x
    a, b = x.chunk(2, -1)
    lengths = (a[..., :count].square() + b[..., :count].square() + SMALLEST).sqrt()
    return torch.cat([lengths, a[..., count:], torch.zeros_like(lengths), b[..., count:]], -1)


def align(form: Form, layer: Layer, steps: int, batch: int, rate: float, gate_factor: float, seed: int) -> tuple[float, float]:
    """Error on rows kept apart, as a share of the layer's energy, before and after training."""
    torch.manual_seed(seed)
    student = Student(form, layer)
    groups = [{"params": [student.q_proj, student.o_proj], "lr": rate}, {"params": student.gates(), "lr": rate * gate_factor}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0, betas=(0.9, 0.95))
    warm = lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm)

    def error(rows: Tensor) -> Tensor:
        return (student(rows) - layer.output[rows]).square().sum() / layer.output[rows].square().sum()

    @torch.no_grad()
    def apart() -> float:
        rows = torch.arange(len(layer.hidden) - APART, len(layer.hidden), device=layer.k.device)
        return sum(error(row).item() for row in rows.split(1)) / APART

    before, generator = apart(), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randperm(len(layer.hidden) - APART, generator=generator)[:batch].to(layer.k.device)
        optimizer.zero_grad()
        error(rows).backward()
        optimizer.step()
        schedule.step()
    return before, apart()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a Llama checkpoint and its tokenizer")
    parser.add_argument("text", help=".txt or .jsonl, also .xz")
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")], help="default: six, spread over the model")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM", help="default: all")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2, help="rows of a step")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of projections; of pure forms three times it")
    parser.add_argument("--gate-factor", type=float, default=10.0, help="times it, of what is the form's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of state-forms.json")
    options = parser.parse_args(arguments)
    if options.rows < APART + options.batch:
        parser.error(f"--rows {options.rows} must be {APART + options.batch} or more: {APART} are measured on")
    return options


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["page"]:
        return page(arguments[1:])
    options, start = parse_arguments(arguments), time.perf_counter()
    torch.set_float32_matmul_precision("high")
    model = load_model(options.model, "float32").to(device()).eval()
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(f"{options.model} is a {type(model).__name__}: this reads the attention of Llama models alone")
    count = model.config.num_hidden_layers
    layers = options.layers or sorted({round((place + 0.5) * count / 6) % count for place in range(6)})
    rows = read_rows(options.model, options.text, options.tokens, options.rows).to(device())
    recorded = record(model, rows, layers)
    del model
    setup = {name: getattr(options, name) for name in ("tokens", "batch", "steps", "learning_rate", "gate_factor", "seed")}
    setup |= {"model": Path(options.model).name, "texts": options.rows}
    measured = known(options.results / f"{NAME}.json", setup, layers)
    for name in bar([name for name in options.forms if name not in {row["form"] for row in measured}], desc="forms"):
        form = FORMS[name]
        rate = options.learning_rate * (1 if form.window else 3)
        for index in layers:
            before, after = align(form, recorded[index], options.steps, options.batch, rate, options.gate_factor, options.seed)
            measured.append({"form": name, "window": form.window, "layer": index, "error_before": before, "error": after})
        write_results(NAME, measured, folder=options.results, **setup)
        errors = " ".join(f"{row['layer']}: {row['error']:.4f}" for row in measured if row["form"] == name)
        say(f"{name}: {errors} ({time.perf_counter() - start:.0f} s)")
    print(rows_table(by_form(measured), ["form", "window", *(str(index) for index in layers)]))


def known(path: Path, setup: dict[str, Any], layers: Sequence[int]) -> list[dict[str, Any]]:
    """Rows that a file has already.

    Raises:
        ValueError: if they were measured otherwise.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if changed := [name for name, value in setup.items() if found.get(name) != value]:
        raise ValueError(f"{path} was measured with another {', '.join(changed)}: name another folder with --results")
    if {row["layer"] for row in found["rows"]} - set(layers):
        raise ValueError(f"{path} has other layers than {list(layers)}: name another folder with --results")
    return found["rows"]


def by_form(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each form, with the error of each layer, their sum, and the sum of logarithms beside that of a window of equal bytes:
    `beside` is what a layer's error is multiplied by, in the geometric mean. Of forms without a window there is none."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["form"], {"form": row["form"], "window": row["window"]})[str(row["layer"])] = row["error"]
    layers = [str(layer) for layer in dict.fromkeys(row["layer"] for row in rows)]
    for row in found.values():
        row["sum"] = sum(row[layer] for layer in layers)
        if row["window"] and (beside := found.get(EQUAL)):
            row["beside"] = math.exp(sum(math.log(row[layer] / beside[layer]) for layer in layers) / len(layers))
    return list(found.values())


def page(arguments: list[str]) -> None:
    """Write the page of the result."""
    parser = argparse.ArgumentParser(description=page.__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    found = json.loads((options.results / f"{NAME}.json").read_text())
    rows = by_form(found["rows"])
    layers = [str(layer) for layer in dict.fromkeys(row["layer"] for row in found["rows"])]
    plot_forms(rows, options.docs / "images" / f"{NAME}.png")
    table = markdown_table(["form", "window", *layers, "sum", "beside"], [_shown(row, layers) for row in rows])
    text = PAGE.format(
        **{name: found[name] for name in ("command", "model", "device", "texts", "tokens", "steps")},
        apart=APART,
        table=table,
        whole=whole_model(options.results),
    )
    path = options.docs / "measured" / f"{NAME}.md"
    write_whole(path, text)
    say(f"wrote {path}")


def whole_model(results: Path) -> str:
    """A table of forms that `form_arms.py` trained in a whole model, beside the library's own layers of equal bytes, trained alike."""
    path = results / "form-arms.json"
    if not path.exists():
        return "(No form was trained in a whole model yet.)"
    forms = json.loads(path.read_text())["rows"]
    alike = ("kept", "align_steps", "steps", "learning_rate")
    known = json.loads((results / "heads-recipes.json").read_text())["rows"]
    known = [row for row in known if row.get("matched") and row.get("gate_factor") == 10.0]
    lines = []
    for row in forms:
        lines.append([f"{row['form']}, window {row['window']}", str(row["kept"]), *(f"{row[name]:.2f}" for name in ("wiki", "novels"))])
    for row in known:
        if any(all(row.get(name) == form[name] for name in alike) for form in forms):
            name = {"heads-window": "a window alone", "heads-one": "one state", "heads": "two states"}[row["arm"]]
            lines.append([f"{name}, window {row['window']}", str(row["kept"]), *(f"{row[text]:.2f}" for text in ("wiki", "novels"))])
    return markdown_table(["form", "KV heads kept of 90", "WikiText-2", "novels"], lines)


def _shown(row: dict[str, Any], layers: Sequence[str]) -> list[str]:
    """A row in figures for people."""
    beside = f"{row['beside']:.2f}" if "beside" in row else ""
    return [row["form"], str(row["window"] or "none"), *(f"{row[layer]:.4f}" for layer in layers), f"{row['sum']:.3f}", beside]


def plot_forms(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the errors beside that of the window."""
    shown = [row for row in rows if "beside" in row]
    drawn, (axes,) = figure(size=(7, 0.3 * len(shown) + 1))
    axes.barh([row["form"] for row in shown], [row["beside"] for row in shown], color="tab:blue")
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("error of a layer's output beside that of a window of equal bytes (geometric mean)")
    save(drawn, path)


PAGE = """# Forms of a state, layer by layer

Made by `{command}`, whose result is `eval/results/state-forms.json`; {model}, {device}.

Each form takes the place of one layer's softmax, on the original's own inputs, and is trained for {steps} steps on the error of the layer's
output; the error, as a share of the output's energy, is measured on {apart} of {texts} texts of {tokens} tokens, which were not trained on.
Windows are shorter by what a form's states take, so that all forms have the same bytes. *beside*: what a layer's error is multiplied by
when the form takes the place of a window of equal bytes, in the geometric mean. Forms are described in `eval/state_forms.py`.

![errors beside a window of equal bytes](../images/state-forms.png)

{table}

## In a whole model

`eval/form_arms.py` trains such a form in all heads (60 steps of alignment and 300 of KL); perplexities, of `eval/results/form-arms.json`,
beside the library's layers of equal bytes, of `heads-recipes.json`; one seed. Little is left of what a form spares a layer that is trained
alone, and it is not the same for both texts: so the default stays a window alone.

{whole}
"""


if __name__ == "__main__":
    main()
