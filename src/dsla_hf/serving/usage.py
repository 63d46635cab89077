"""What `dsla serve` says: how to use the server, and what it serves with which sizes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from .engine.engine import Engine

ANYWHERE = ("0.0.0.0", "::", "")  # hosts that are all addresses of a machine
GIB = 2**30


def address_of(host: str, port: int) -> str:
    """Where a server that listens there is reached from its own machine."""
    host = "127.0.0.1" if host in ANYWHERE else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def how_to_use(address: str, name: str, *, chats: bool, key: bool) -> str:
    """Lines to copy, for curl and for the Python package openai.

    Args:
        address: without /v1. name: of the model. chats: it has a chat template. key: an API key is asked for; it is never shown.
    """
    asked: dict[str, object] = {"messages": [{"role": "user", "content": "Hello"}]} if chats else {"prompt": "The answer is"}
    route, call = ("chat/completions", "chat.completions") if chats else ("completions", "completions")
    body = json.dumps({"model": name, **asked, "max_tokens": 20})
    arguments = ", ".join(f"{argument}={value!r}" for argument, value in {"model": name, **asked, "max_tokens": 20}.items())
    authorization = ' -H "Authorization: Bearer $DSLA_API_KEY"' if key else ""
    return f"""{name} is served at {address}/v1; {address} shows how it fares

curl {address}/v1/{route} -H 'Content-Type: application/json'{authorization} -d {shlex.quote(body)}

import os, openai
client = openai.OpenAI(base_url="{address}/v1", api_key={'os.environ["DSLA_API_KEY"]' if key else '"none"'})
print(client.{call}.create({arguments}).choices[0].{"message.content" if chats else "text"})
"""


def what_is_served(engine: Engine, name: str, *, chats: bool, key: bool, traces: Sequence[str] = ()) -> str:
    """Model, levels, sizes and memory of an engine, a line each; traces: exporters of them."""
    levels, options, control, pool = engine.levels, engine.options, engine.control, engine.memory.pool
    weights = sum(x.numel() * x.element_size() for x in levels.causal_lm.parameters())
    units = "KV heads" if levels.unit == "head" else "layers"
    policy = type(control.policy).__name__ if not hasattr(control.policy, "__name__") else control.policy.__name__
    room = pool.num_blocks * engine.bytes_per_block

    def at_once(level: int) -> str:
        texts = min(pool.num_blocks // max(engine.memory.blocks_for(engine.max_tokens - 1, level), 1), options.slots)
        return f"{texts} of that length at level {level}"

    by = "by lookup" if options.draft_level is None else f"at level {options.draft_level}"
    steps = dict.fromkeys((levels.lowest, control.highest))
    each = ", ".join(f"{engine.bytes_per_token(level):,} bytes a token at level {level}" for level in steps)
    drafts = f"{by}, {options.draft_tokens or 'as many as pay'} tokens a call, while {options.draft_rows} texts at most run"
    rows = {
        "model": f"{name}: {type(levels.causal_lm).__name__}, {levels.num_layers} layers, {levels.dtype}, {weights / GIB:,.2f} GiB",
        "device": str(levels.device) + (f", one of {engine.processes.size} that share the model" if engine.processes.size > 1 else ""),
        "levels": f"{levels.lowest} to {control.highest} of {levels.num_units} {units}, now {control.level}, by {policy}",
        "texts": f"{options.slots} at a time, of {engine.max_tokens:,} tokens at most; {options.max_waiting} may wait",
        **({} if engine.drafts is None else {"drafts": drafts}),
        "keys and values": f"{pool.num_blocks:,} blocks of {options.block_size} tokens, {room / GIB:,.2f} GiB: "
        + ", ".join(map(at_once, steps))
        + f"; {engine.kv_dtype}, {each}",
        "prefixes": prefixes_of(engine),
        "chats": "with the tokenizer's template" if chats else "refused: the tokenizer has no chat template",
        "API key": "asked for" if key else "none",
        **({"traces": f"by {', '.join(traces)}"} if traces else {}),
    }
    return "\n".join(f"{what:<17}{how}" for what, how in rows.items())


def prefixes_of(engine: Engine) -> str:
    """What texts that begin alike share, in words."""
    if not engine.reuses:
        return "every prompt is read whole"
    snapshots, highest = engine.reuse.snapshots, engine.control.highest
    if not highest:
        return "blocks are shared"
    if not snapshots.budget:
        return "blocks are shared at level 0; above it every prompt is read whole"
    count = snapshots.budget // engine.memory.snapshot_bytes(highest)
    folded = ", also of lower levels" if engine.options.lower_prefixes else ""
    return f"blocks are shared; {snapshots.budget / GIB:,.3f} GiB for snapshots of states, {count} at level {highest}{folded}"
