"""An engine whose model is cut over two processes writes what one process writes, through raises, shared prefixes, ends and constraints.
The file is also the script that the two processes run:

torchrun --nproc-per-node 2 tests/serving/test_engine_shared.py FOLDER
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from engine_texts import Ear, options, prompts
from peft import PeftModel
from server import byte_tokenizer
from transformers import AutoModelForCausalLM

from dsla_hf.inference.sampling import Sampling
from dsla_hf.serving.command import EXIT_CODE, ServeOptions, load_app
from dsla_hf.serving.engine.engine import Engine
from dsla_hf.serving.engine.plan import ROOM, OneProcess, SharedProcesses
from dsla_hf.serving.shared import processes_asked

SUPPORT = Path(__file__).parents[1] / "support"
LEVELS = {0: 0, 16: 1, 28: 3, 60: 0}  # that are asked for from a step on
INHERITED = ("ACCELERATE_", "MASTER_", "TORCH", "TRITON_", "RANK", "WORLD_SIZE", "LOCAL_RANK")


class Odd:
    """Allows odd tokens alone, and breaks at the fifth."""

    def __init__(self, breaks):
        self.breaks, self.count = breaks, 0

    def mask(self):
        return torch.full((4,), -0x55555556, dtype=torch.int32)

    def accept(self, token):
        assert token % 2 == 1
        self.count += 1
        if self.breaks and self.count == 5:
            raise RuntimeError("broken")


def written(folder, processes):
    """What a scenario writes: of each text its tokens, how it ended, and its history of levels. None in a process that follows."""
    cut = {"tp_plan": "auto"} if processes.size > 1 else {}
    base = AutoModelForCausalLM.from_pretrained(folder / "base", **cut)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    steps = [0]
    # Two processes may not read their own clocks: one's is ahead of the other's.
    clock = [0.0 if processes.first else 1e6]

    def policy(stats):
        return LEVELS[max(step for step in LEVELS if step <= steps[0])]

    sizes = options(slots=4, snapshot_bytes=2**18, prompt_share=0.5, prompt_patience=5.0)
    engine = Engine(model, policy, sizes, eos_tokens={96}, clock=lambda: clock[0], processes=processes)
    if not processes.first:
        engine.follow()
        return None
    texts = prompts(10, longest=60)
    shared = prompts(1, 30, 30, seed=5)[0]
    wanted = [(prompt, 4 + 5 * n % 23, {}) for n, prompt in enumerate(texts)]
    wanted[2:2] = [(shared + texts[0], 12, {}), (shared + texts[1], 12, {"stop_strings": True})]
    wanted += [(shared + texts[number], 9, {}) for number in (2, 8, 9)]
    wanted += [(list(range(2, 90)) * 2, 6, {}), (texts[3], 20, {"level": 2})]
    wanted += [(texts[4], 15, {"sampling": Sampling(temperature=1.0, seed=7, top_p=0.9)})]
    wanted += [(texts[5], 12, {"constraint": Odd(False)}), (texts[6], 12, {"constraint": Odd(True)})]
    wanted += [(texts[7], 8, {"sampling": Sampling(temperature=0.0, logprobs=2, prompt_logprobs=1)})]
    ears = []
    while len(ears) < len(wanted) or engine.busy:
        if len(ears) < len(wanted) and steps[0] % 3 == 0:
            prompt, tokens, more = wanted[len(ears)]
            ear = Ear()
            more = {"sampling": Sampling(temperature=0.0), **more}
            ear.request = engine.submit(prompt, tokens, ear, **more)
            ears.append(ear)
        if steps[0] == 20:
            engine.cancel(ears[3].request)
        engine.step()
        steps[0], clock[0] = steps[0] + 1, clock[0] + 0.5
        assert steps[0] < 1000
    found = [[ear.tokens, ear.finish, repr(ear.error) if ear.error else None, ear.request.levels, ear.request.reused] for ear in ears]
    figures = engine.snapshot()
    engine.stop()
    return {"texts": found, "hits": figures["prefix_texts"], "finished": figures["finished"], "block": engine.bytes_per_block}


def refusals(folder, processes):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto").eval()
    said = []
    for more in ({}, {"record": lambda *_: None, "processes": processes}, {"options": options(draft_lookup=True), "processes": processes}):
        try:
            Engine(base, 0, more.pop("options", options()), **more)
        except ValueError as error:
            said.append(str(error))
    return said


# --- tests ------------------------------------------------------------------------------------------------------


def environment():
    own = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    paths = [str(SUPPORT), *filter(None, [own.get("PYTHONPATH")])]  # pytest has it on its path, a script has not
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture
def saved(tmp_path, tiny_model, adapter_model):
    base = tiny_model("llama", vocab_size=98)  # 5.17 asks for a vocabulary that can be divided
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer(98).save_pretrained(tmp_path / "base")
    adapter_model(base).save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_two_processes_write_what_one_writes(saved):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(saved)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    expected = json.loads(json.dumps(written(saved, OneProcess())))
    found = json.loads((saved / "found.json").read_text())
    assert 2 * found.pop("block") == expected.pop("block"), "each process has half of the heads"
    assert found == expected
    texts = expected["texts"]
    assert any(levels[-1][1] > levels[0][1] for *_, levels, _ in texts), "none was raised in mid-text"
    assert any(reused for *_, reused in texts) and expected["hits"]["blocks"] and expected["hits"]["snapshot"]
    assert {finish for _, finish, *_ in texts} >= {"length", "cancelled"} and sum(error is not None for _, _, error, *_ in texts) == 1
    said = json.loads((saved / "said.json").read_text())
    assert "the model is cut over processes, and processes has 1" in said[0]
    assert "record is not for tensor parallelism" in said[1] and "drafts are not for tensor parallelism" in said[2]
    with pytest.raises(ValueError, match="whole in this process, and processes has 2"):
        Engine(AutoModelForCausalLM.from_pretrained(saved / "base"), 0, options(), processes=Two())


class Two(OneProcess):
    size = 2


def test_how_many_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [processes_asked(asked) for asked in (None, 1, 4)] == [1, 1, 4]
    with pytest.raises(ValueError, match="1 or more processes, got 0"):
        processes_asked(0)
    with pytest.raises(ValueError, match="is for `dsla serve`"):
        load_app(ServeOptions("model", tensor_parallel=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [processes_asked(asked) for asked in (None, 2)] == [2, 2]
    with pytest.raises(ValueError, match="tensor_parallel 3 and the 2 processes that torchrun has started"):
        processes_asked(3)


def served_by_two(saved, log):
    """`dsla serve --tensor-parallel 2`, when it serves: the process and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dsla_cli", "serve", str(saved / "base"), "--adapter", str(saved / "adapter")]
    command += ["--port", str(port), "--tensor-parallel", "2", "--kv-gib", "0.01", "--max-tokens", "256", "--policy", "50%", "--name", "m"]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=file)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return process, url
        except httpx.HTTPError:
            time.sleep(0.2)


def children(process):
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == process.pid:
                found.append(int(folder.name))
        except (ValueError, OSError):  # no process, or one that has ended
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_the_flag_starts_both_and_they_end_together(saved, tmp_path, adapter_model):
    process, url = served_by_two(saved, tmp_path / "log")
    try:
        (other,) = children(process)
        body = {"model": "m", "prompt": "Hello, layer", "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "base"), saved / "adapter").eval()
        model.set_level(2)
        ids = byte_tokenizer(98)("Hello, layer", return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        text = byte_tokenizer(98).decode(out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answer["choices"][0]["text"] == text
        process.send_signal(signal.SIGTERM)
        # uvicorn ends with the signal that ended it.
        assert process.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM), (tmp_path / "log").read_text()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{other}").exists():
            assert time.monotonic() < deadline, "the other goes on"
            time.sleep(0.1)
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_process_that_is_lost_ends_the_server(saved, tmp_path):
    process, _ = served_by_two(saved, tmp_path / "log")
    try:
        os.kill(children(process)[0], signal.SIGKILL)
        assert process.wait(60) == EXIT_CODE
        assert "the engine has ended" in (tmp_path / "log").read_text()
    finally:
        process.kill()


def told_of_all_sizes(processes):
    """What comes of messages that fill a piece, and of longer ones."""
    sizes = [0, 1, ROOM - 100, ROOM, 5 * ROOM]
    return [len(processes.tell("x" * size if processes.first else None)) for size in sizes] == sizes


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    folder, both = Path(sys.argv[1]), SharedProcesses()
    assert told_of_all_sizes(both)
    assert both.least(3 if both.first else 5, 9 if both.first else 8) == (3, 8)
    found, said = written(folder, both), refusals(folder, both)
    if both.first:
        (folder / "found.json").write_text(json.dumps(found))
        (folder / "said.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()
