"""A server under a mixed load whose every answer is checked, and which must be as it was when the load is gone.

    python eval/serving_load.py
    python eval/serving_load.py --seconds 60 --clients 4
    python eval/serving_load.py --seconds 180 --draft-level 4 --draft-tokens 3 --shared-words 30
    python eval/serving_load.py --page

A small random model with an adapter, on a CPU, behind the server of `dsla serve`; clients in a process of their own send greedy, sampled
and constrained requests, calls of tools, log-probabilities and pinned levels, and a tenth of them leaves in mid-stream
(`eval/load_clients.py`). All the while the level rises and falls at random, as a policy asks for. Then, with the history of levels that
each answer reports:

- greedy texts are those of `generate`, sampled ones those of `GraphDecoder` with their seed, those of clients that left begin so;
- constrained answers and arguments of calls follow their schema; log-probabilities are those of a forward pass, within 1e-4;
- every answer has status 200 and an end, all blocks are free, no request is left, open files are as before but for a few that
  the process opened for itself, and memory is as after a tenth of the time.

A text that parts where two tokens are nearer than 1e-4 counts as a near tie. The history of one whose level rose while its prompt was being
read does not say after which token: it is undetermined, unless it is the text of the new level. What was found goes to
eval/results/serving-load.json, with drafts to serving-load-drafts.json; it ends with 1 if anything is wrong. `--page` measures nothing: it
fills docs/measured/serving_load.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import torch
from load_clients import CANCELLED_MARK, GREEDY, KINDS, SCHEMA, Outcome, run_clients
from peft import get_peft_model
from reporting import RESULTS, fill_page, rows_table, write_results
from serving import served
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsla_hf import DSLAConfig
from dsla_hf.inference.graph import GraphDecoder
from dsla_hf.inference.recorder import PlainRecording
from dsla_hf.levels.policies import Stats
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.request import Request
from dsla_hf.serving.http.api import ApiOptions, build_app

PAGE = Path(__file__).parent.parent / "docs" / "measured" / "serving_load.md"
COLUMNS = ["kind", "requests", "left", "equal", "near_ties", "undetermined", "valid", "wrong"]
NEAR = 1e-4  # of logits between two tokens, and of log-probabilities
CHUNK = 256  # prompt tokens of a step: more than ordinary prompts of all clients have, less than long ones
LEVEL_SECONDS = (0.3, 3.0)  # between two levels that are asked for
LAYERS = 4
PLAIN, DRAFTED = "serving-load", "serving-load-drafts"  # result files, and places in the page
WARM_SECONDS, SETTLE_SECONDS = 2.0, 30.0  # of requests before the load; that connections and texts have to end
FILES_MORE = 4  # that libraries may open at any time; what clients leave behind would be a file for each
CHAT = (
    "{% for tool in tools or [] %}<tool_call> for {{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


# --- what is served -----------------------------------------------------------------------------------------------------------


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """Every ASCII character is a token, so that a text says what its tokens were."""
    characters = [*(chr(256 + byte) for byte in range(33)), *(chr(byte) for byte in range(33, 127))]  # as byte-level vocabularies have them
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<tool_call>", "</tool_call>")], special_tokens=True)
    tokenizer.chat_template = CHAT
    return tokenizer


def small_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Random weights, and an adapter away from its start: texts of different levels differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=LAYERS,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
    )
    plan = DSLAConfig(task_type="CAUSAL_LM", window_size=8, conversion_order=[2, 0, 3, 1])
    model = get_peft_model(LlamaForCausalLM(config), plan).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "dsla_" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class Wandering:
    """A policy that asks for another level at random times."""

    def __init__(self, highest: int, seed: int):
        self.highest, self.draws, self.level = highest, random.Random(seed), 0
        self._until = 0.0

    def __call__(self, stats: Stats) -> int:
        if time.monotonic() >= self._until:
            self.level, self._until = self.draws.randint(0, self.highest), time.monotonic() + self.draws.uniform(*LEVEL_SECONDS)
        return self.level


def resident_mib() -> float:
    """Memory of this process, as Linux counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- what must have come ----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Of a kind of requests. left: whose clients went away. equal: texts that are those of the library. valid: answers that follow their
    schema, or log-probabilities that are those of the model."""

    kind: str
    requests: int = 0
    left: int = 0
    equal: int = 0
    near_ties: int = 0
    undetermined: int = 0
    valid: int = 0
    wrong: int = 0


class Checker:
    """Compares answers with what the library gives at the same history of levels."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, left: dict[str, Request]):
        self.model, self.tokenizer, self.left = model, tokenizer, left
        self.rows = {kind: Row(kind) for kind in KINDS}
        self.faults: list[str] = []

    def add(self, outcome: Outcome) -> None:
        row = self.rows[outcome.kind]
        row.requests += 1
        row.left += outcome.left
        try:
            self._check(outcome, row)
        except (ValueError, jsonschema.ValidationError) as error:
            row.wrong += 1
            self.faults.append(f"{outcome.kind} {outcome.number}: {str(error).splitlines()[0]}")

    def _check(self, outcome: Outcome, row: Row) -> None:
        if outcome.status != 200 or outcome.error is not None:
            raise ValueError(f"status {outcome.status}, {outcome.error}")
        if outcome.left:
            if outcome.kind not in ("constrained", "tools"):
                self._compare(outcome, row)
            return
        if outcome.finish is None or not outcome.levels:
            raise ValueError("it has no end, or no history of levels")
        if outcome.kind == "constrained":
            jsonschema.validate(json.loads(outcome.text), SCHEMA)
            row.valid += 1
        elif outcome.kind == "tools":
            if outcome.finish != "tool_calls" or len(outcome.calls) != 1:
                raise ValueError(f"{len(outcome.calls)} calls, and the end {outcome.finish}")
            jsonschema.validate(json.loads(outcome.calls[0]), SCHEMA)
            row.valid += 1
        else:
            self._compare(outcome, row)
            if outcome.logprobs is not None:
                self._check_logprobs(outcome, row)

    def _compare(self, outcome: Outcome, row: Row) -> None:
        prompt = self.tokenizer(outcome.body["prompt"])["input_ids"]
        levels = [(at, level) for at, level in outcome.levels]
        wanted = outcome.body["max_tokens"]
        if outcome.left:
            request = self.left[outcome.body["prompt"]]
            levels, wanted = request.levels, len(request.tokens)
            if not self.tokenizer.decode(request.tokens, skip_special_tokens=True).startswith(outcome.text):
                raise ValueError("what was heard is not how the text began")
            if wanted == 0:
                row.undetermined += 1
                return
        early = [level for at, level in levels[1:] if at <= len(prompt)]
        history = [(len(prompt), early[-1]) if early else levels[0], *((at, level) for at, level in levels[1:] if at > len(prompt))]
        ids = self._reference(prompt, wanted, history, outcome)
        eos = self.tokenizer.eos_token_id
        ends = eos in ids and not outcome.body.get("ignore_eos", False)
        text = self.tokenizer.decode(ids[: ids.index(eos)] if ends else ids, skip_special_tokens=True)
        heard = self.tokenizer.decode(request.tokens, skip_special_tokens=True) if outcome.left else outcome.text
        if heard == text and (outcome.left or outcome.finish == ("stop" if ends else "length")):
            row.equal += 1
            return
        if early:
            row.undetermined += 1
            return
        parts = f"with the levels {levels} it parts from the library's text, {text!r}: {heard!r}"
        if outcome.kind in GREEDY:
            gap = self._gap(prompt, ids, heard, history)
            if gap < NEAR:
                row.near_ties += 1
                return
            parts += f", where the logits of the likeliest two are {gap:.2g} apart"
        raise ValueError(parts)

    def _policy(self, history: list[tuple[int, int]]) -> Callable[[Stats], int]:
        (_, first), *raises = history
        return lambda stats: max([first, *(level for at, level in raises if stats.tokens >= at)])

    def _reference(self, prompt: list[int], tokens: int, history: list[tuple[int, int]], outcome: Outcome) -> list[int]:
        """Tokens that the library gives, the one that ends a text included."""
        body = outcome.body
        self.model.set_level(history[0][1])
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"max_new_tokens": tokens, "attention_mask": torch.ones_like(ids), "level_policy": self._policy(history)}
        if body.get("ignore_eos"):
            options["eos_token_id"] = None
        if outcome.kind in GREEDY:
            out = self._generated(ids, do_sample=False, **options)
        else:
            sampling = {"temperature": body["temperature"], "top_k": body.get("top_k", 0), "top_p": body.get("top_p", 1.0)}
            decoder = GraphDecoder(self.model, record=PlainRecording)
            out = decoder.generate(ids, do_sample=True, seed=body["seed"], **sampling, **options)
        return out[0, len(prompt) :].tolist()

    @torch.no_grad()
    def _generated(self, ids: Tensor, **options: Any) -> Any:
        return self.model.generate(input_ids=ids, pad_token_id=self.tokenizer.pad_token_id, **options)

    def _gap(self, prompt: list[int], ids: list[int], heard: str, history: list[tuple[int, int]]) -> float:
        """How far apart the two likeliest tokens are where a text parts from what it should be."""
        texts = [self.tokenizer.decode(ids[: at + 1], skip_special_tokens=True) for at in range(len(ids))]
        place = next((at for at, text in enumerate(texts) if not heard.startswith(text)), len(ids) - 1)
        self.model.set_level(history[0][1])
        whole = torch.tensor([prompt])
        out = self._generated(
            whole,
            attention_mask=torch.ones_like(whole),
            do_sample=False,
            max_new_tokens=place + 1,
            level_policy=self._policy(history),
            return_dict_in_generate=True,
            output_logits=True,
        )
        first, second = out.logits[place][0].float().topk(2).values.tolist()
        return first - second

    @torch.no_grad()
    def _check_logprobs(self, outcome: Outcome, row: Row) -> None:
        assert outcome.logprobs is not None
        told, tops = outcome.logprobs["token_logprobs"], outcome.logprobs["top_logprobs"]
        if not all(one <= 1e-6 and abs(max(top.values()) - one) < NEAR for one, top in zip(told, tops, strict=True)):
            raise ValueError("a log-probability is not that of the likeliest token")
        if len(outcome.levels) == 1 and told:
            prompt = self.tokenizer(outcome.body["prompt"])["input_ids"]
            self.model.set_level(outcome.levels[0][1])
            ids = self._reference(prompt, len(told), [tuple(outcome.levels[0])], outcome)  # type: ignore[list-item]
            self.model.set_level(outcome.levels[0][1])
            logits = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            expected = logits.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
            if max(abs(one - other) for one, other in zip(told, expected, strict=True)) > NEAR:
                raise ValueError("log-probabilities are not those of a forward pass")
        row.valid += 1


# --- the load ---------------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="of load")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two requests of a client, on average")
    parser.add_argument("--slots", type=int, default=6, help="texts that run at a time")
    parser.add_argument("--draft-level", type=int, help="of `dsla serve`: tokens are guessed at this level")
    parser.add_argument("--draft-lookup", action="store_true", help="of `dsla serve`: what came before is guessed")
    parser.add_argument("--draft-tokens", type=int, help="of `dsla serve`: guesses in a call, whether they pay or not")
    parser.add_argument("--shared-words", type=int, default=0, help="that prompts begin with in common")
    parser.add_argument("--growth-mib", type=float, default=64.0, help="that the server's memory may have grown at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of serving-load.json")
    parser.add_argument("--page", action="store_true", help="measure nothing; fill docs/measured/serving_load.md from the rows")
    options = parser.parse_args(arguments)
    for name in ("seconds", "clients", "slots", "growth_mib"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(options, name)}")
    return options


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Or until the time is over."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)


def put_under_load(
    engine: Engine, url: str, options: argparse.Namespace, pool: ProcessPoolExecutor
) -> tuple[list[Outcome], dict[str, Any]]:
    """What came of the requests, and what was measured of this process meanwhile."""
    arguments = (list(engine.pinnable), 2 * CHUNK, options.shared_words)
    # Some first: what is opened once, by whatever, is no leak.
    first = pool.submit(run_clients, url, options.clients, WARM_SECONDS, 0.0, options.seed + 1, *arguments).result()
    wait_until(lambda: not engine.busy, SETTLE_SECONDS)
    time.sleep(1)  # the last connections close
    begin, memory, files = time.monotonic(), list[float](), open_files()
    future = pool.submit(run_clients, url, options.clients, options.seconds, options.pause, options.seed, *arguments)
    with tqdm(total=round(options.seconds), unit="s", desc="load", disable=None) as bar:
        while not future.done():
            time.sleep(0.2)
            bar.update(min(round(time.monotonic() - begin), bar.total) - bar.n)
            if not memory and time.monotonic() - begin >= options.seconds / 10:
                memory = [resident_mib()]
    outcomes = [Outcome(**one) for one in first + future.result()]
    wait_until(lambda: not engine.busy and open_files() <= files + FILES_MORE, SETTLE_SECONDS)
    gc.collect()
    return outcomes, {
        "stuck": len(engine.scheduler.running) + len(engine.scheduler.waiting),
        "blocks": engine.memory.pool.num_blocks,
        "free_blocks": engine.memory.pool.free_blocks,
        "health": httpx.get(f"{url}/health").status_code,
        "memory_mib": [*memory, resident_mib()],
        "open_files": [files, open_files()],
        "threads": threading.active_count(),
        "finished": dict(engine.finished),
        "failed_steps": engine.health.failed_steps,
        "level_changes": engine.control.count,
        "tokens_at_level": list(engine.tokens_at_level),
        "drafts": None if engine.drafts is None else engine.drafts.counts(),
        "prefixes": {"queries": engine.prefix_queries, "hits": engine.prefix_hits, **engine.reuse.snapshots.figures()},
    }


def faults_of(found: dict[str, Any], growth: float, shared: bool = False) -> list[str]:
    """What is not as it was before the load, and what the load was to try and did not; shared: prompts began alike."""
    checks = {
        f"{found['stuck']} requests are left": found["stuck"] == 0,
        f"{found['free_blocks']} of {found['blocks']} blocks are free": found["free_blocks"] == found["blocks"],
        f"/health answers {found['health']}": found["health"] == 200,
        f"{found['failed_steps']} steps failed": found["failed_steps"] == 0,
        f"memory went from {found['memory_mib'][0]:.0f} to {found['memory_mib'][-1]:.0f} MiB": found["memory_mib"][-1]
        <= found["memory_mib"][0] + growth,
        f"open files went from {found['open_files'][0]} to {found['open_files'][-1]}": found["open_files"][-1]
        <= found["open_files"][0] + FILES_MORE,
        "the level did not change": found["level_changes"] > 1,
        "no guess was right": found["drafts"] is None or found["drafts"]["accepted"] > 0,
        "no text began with what another had read": not shared or found["prefixes"]["hits"] > 0,
    }
    return [what for what, holds in checks.items() if not holds]


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.page:
        fill_page(PAGE, {name: page_part(json.loads((options.results / f"{name}.json").read_text())) for name in (PLAIN, DRAFTED)})
        return 0
    tokenizer = ascii_tokenizer()
    model = small_model(tokenizer)
    sizes = {"slots": options.slots, "block_size": 16, "chunk": CHUNK, "kv_bytes": 2**22}
    moves = {"hold": 0.0, "busy_hold": 0.0, "cool_down": 0.0}
    drafts = {name: getattr(options, name) for name in ("draft_level", "draft_lookup", "draft_tokens")}
    engine = Engine(model, Wandering(LAYERS, options.seed), EngineOptions(**sizes, **moves, **drafts))
    left: dict[str, Request] = {}
    submit = engine.submit

    def kept(prompt: list[int], *given: Any, **more: Any) -> Request:
        request = submit(prompt, *given, **more)
        if (text := tokenizer.decode(prompt)).startswith(CANCELLED_MARK):  # whose clients do not hear their history of levels
            left[text] = request
        return request

    engine.submit = kept  # type: ignore[method-assign]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with served(build_app(engine, tokenizer, ApiOptions("load", tool_format="hermes"))) as url:
            outcomes, found = put_under_load(engine, url, options, pool)
    checker = Checker(model, tokenizer, left)
    for outcome in tqdm(outcomes, desc="comparing", unit="answer", disable=None):
        checker.add(outcome)
    faults = faults_of(found, options.growth_mib, options.shared_words > 0) + checker.faults
    times = sorted(outcome.seconds for outcome in outcomes if not outcome.left)
    extra = {
        "seconds": options.seconds,
        "clients": options.clients,
        "pause": options.pause,
        "slots": options.slots,
        "draft_level": options.draft_level,
        "draft_lookup": options.draft_lookup,
        "shared_words": options.shared_words,
        "statuses": dict(Counter(str(outcome.status) for outcome in outcomes)),
        "latency": {"median": times[len(times) // 2], "p99": times[int(0.99 * (len(times) - 1))], "longest": times[-1]},
        "growth_mib": options.growth_mib,
        **found,
        "faults": faults,
    }
    rows = [asdict(row) for row in checker.rows.values()]
    write_results(DRAFTED if engine.drafts is not None else PLAIN, rows, folder=options.results, **extra)
    print(rows_table(rows, COLUMNS))
    print("\n".join(faults) or "nothing is wrong")
    return int(bool(faults))


def page_part(result: dict[str, Any]) -> str:
    """What the page says of a run."""
    rows, memory, files = result["rows"], result["memory_mib"], result["open_files"]
    total = {name: sum(row[name] for row in rows) for name in COLUMNS[1:]}
    changes, latency = result["level_changes"], result["latency"]
    statuses = ", ".join(f"{count:,} × {status}" for status, count in result["statuses"].items())
    lines = [
        f"{result['seconds']:.0f} s, {result['clients']} clients, {result['slots']} slots, {total['requests']:,} requests "
        f"({total['left']:,} of them left in mid-stream), {sum(result['tokens_at_level']):,} tokens, {changes:,} changes of the level.",
        "",
        rows_table(rows, COLUMNS),
        "",
        f"- Answers by status: {statuses}. Median {latency['median']:.2f} s, P99 {latency['p99']:.2f} s, "
        f"longest {latency['longest']:.2f} s.",
        *([_shared(result)] if result.get("drafts") else []),
        f"- At the end {result['free_blocks']} of {result['blocks']} blocks are free, {result['stuck']} requests left, "
        f"{result['failed_steps']} steps failed, `/health` answers {result['health']}.",
        f"- Memory of the server's process: {memory[0]:.0f} MiB after a tenth of the time, {memory[-1]:.0f} MiB at the end (allowed: "
        f"{result['growth_mib']:.0f} MiB more); open files: {files[0]} before, {files[-1]} at the end.",
        "- " + ("Nothing is wrong." if not result["faults"] else "Wrong: " + "; ".join(result["faults"]) + "."),
    ]
    return "\n".join(lines)


def _shared(result: dict[str, Any]) -> str:
    """What drafts and prefixes came to."""
    drafts, prefixes = result["drafts"], result["prefixes"]
    guesses = "by prompt lookup" if result["draft_lookup"] else f"at level {result['draft_level']}"
    return (
        f"- Tokens guessed {guesses}: {drafts['drafted']:,} in {drafts['rounds']:,} calls, {drafts['accepted']:,} of them right. "
        f"Of {prefixes['queries']:,} prompt tokens {prefixes['hits']:,} were not read again; "
        f"{prefixes['taken']:,} snapshots of states were taken."
    )


if __name__ == "__main__":
    sys.exit(main())
