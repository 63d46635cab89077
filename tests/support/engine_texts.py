"""What tests of the engine share: a small one's options, requests and whoever listens to them, and what `generate` alone gives."""

import random
import threading

import torch

from dsla_hf.serving.engine.engine import EngineOptions

SMALL = EngineOptions(
    slots=4, block_size=4, chunk=8, kv_bytes=2**20, max_tokens=256, prompt_share=1.0, hold=0.0, busy_hold=0.0, cool_down=0.0
)


class Ear:
    """Keeps what a request's listener hears."""

    def __init__(self):
        self.tokens, self.finish, self.error, self.done = [], None, None, threading.Event()

    def __call__(self, event):
        assert not self.done.is_set(), "nothing comes after the end"
        if event.token is not None:
            self.tokens.append(event.token)
        if event.finish or event.error:
            self.finish, self.error = event.finish, event.error
            self.done.set()


def options(**changes):
    return EngineOptions(**{**SMALL.__dict__, **changes})


def prompts(count, shortest=1, longest=40, seed=1):
    numbers = random.Random(seed)
    return [[numbers.randrange(2, 97) for _ in range(numbers.randint(shortest, longest))] for _ in range(count)]


def alone(model, prompt, tokens, level=None, **generate):
    if level is not None:
        model.set_level(level)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **generate)
    return out[0, len(prompt) :].tolist()


def run(engine, limit=2000):
    for _ in range(limit):
        if not engine.step() and not engine.busy:
            return
    raise AssertionError("the engine does not come to rest")


def ask(engine, wanted):
    ears = []
    for prompt, tokens in wanted:
        ear = Ear()
        ear.request = engine.submit(prompt, tokens, ear)
        ears.append(ear)
    return ears


def check_served(engine, model, prompts, tokens, level=None):
    """Each text of a server is that of `generate` alone."""
    ears = ask(engine, [(prompt, tokens) for prompt in prompts])
    run(engine)
    assert [ear.tokens for ear in ears] == [alone(model, prompt, tokens, level) for prompt in prompts]


def recorded(engine):
    """Recordings of steps by (level, rows, past), and of pieces by (level, size, place)."""
    every = engine.runner.recorder.recordings
    return tuple({key: value for key, value in every.items() if isinstance(key[2], str) == piece} for piece in (False, True))


def assert_empty(engine):
    assert engine.memory.pool.free_blocks == engine.memory.pool.num_blocks
    idle = [block for column in engine.memory.pool.prefixes._idle.values() for block in column.blocks]
    assert len(engine.memory.pool.prefixes._columns) == len(engine.memory.pool.prefixes._idle) and not engine.memory.pool._shared
    assert sorted(engine.memory.pool._free + idle) == list(range(1, engine.memory.pool.num_blocks + 1))
    assert engine.memory.pool.prefixes.idle_blocks == len(idle)
    assert not engine.memory.pool.tables.any() and not engine.scheduler.running and not engine.busy
    snapshots, kept = engine.reuse.snapshots, list(engine.reuse.snapshots._by_name.values())
    assert snapshots.used == sum(held_bytes(snapshot) for snapshot in kept) <= snapshots.budget
    assert sum(map(len, snapshots._behind.values())) == len(kept) and not engine.reuse._here


def held_bytes(snapshot):
    """Of the tensors of a snapshot, which have memory of their own."""
    tensors = [snapshot.keys, snapshot.values, *(x for state in snapshot.states for x in state)]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)
    return sum(x.nbytes for x in tensors)
