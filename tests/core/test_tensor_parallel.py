"""Tensor parallel: hybrids and adapters loaded by two processes write what one process writes, each with half of the heads; what
cannot work is refused. The file is also the script that the two processes run:

torchrun --nproc-per-node 2 tests/core/test_tensor_parallel.py FOLDER cpu|cuda
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from dsla_hf import DSLACacheLayer, GraphDecoder
from dsla_hf.core.head_sharding import HeadShardedAttention
from dsla_hf.core.tensor_parallel import asks_for_tensor_parallel
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.trainer import DSLATrainer

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = {"llama": {}, "llama-pure": {"window_size": 0}, "qwen3": {}, "olmo2": {}}  # options of their adapters
LEVELS = (0, 2, 4)
RAISED = 3  # the level after a raise in mid-text
RAN = {}  # folders by device


def load(folder, device, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).to(device).eval()


def texts_of(folder, device, options, wanted):
    """What hybrid and adapter in `folder` write: by name, tokens, logits and what lies in the cache, heads in dimension 1."""
    ids = torch.randint(2, 97, (2, 37), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    found = {}

    def write(name, model, **choices):
        settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        out = model.generate(input_ids=ids, attention_mask=mask, **settings, **choices)
        cached = []
        for layer in out.past_key_values.layers:
            if isinstance(layer, DSLACacheLayer):
                cached += [layer.state.recurrent, layer.state.window_k.transpose(1, 2), layer.state.window_v.transpose(1, 2)]
            else:
                cached += [layer.keys, layer.values]
        found[name] = {"tokens": out.sequences, "logits": torch.stack(out.logits), "cached": cached}
        found[name] = torch.utils._pytree.tree_map(lambda x: x.cpu(), found[name])

    write("hybrid", model := load(folder / "hybrid", device, **options))
    with torch.enable_grad():  # takes another way through the projections
        found["forward"] = {"logits": model(input_ids=ids, attention_mask=mask).logits.detach().cpu()}
    model.save_pretrained(folder / "saved")
    every = folder.name in ("llama", "olmo2")  # heads cut and whole: how weights come to them depends on nothing else
    if every:
        write("incomplete", load(folder / "incomplete", device, **options))
    for low_memory in (False, True) if every else (False,):
        base = load(folder / "base", device, **options)
        model = PeftModel.from_pretrained(base, folder / "adapter", low_cpu_mem_usage=low_memory).eval()
        for level in (0,) if low_memory else LEVELS if every else LEVELS[1:]:
            model.set_level(level)
            write(f"level {level} {low_memory}", model)
        write(f"raise {low_memory}", model, level_policy=lambda stats: wanted if stats.tokens >= 39 else 1)
    return found


# --- what the processes run -------------------------------------------------------------------------------------


def write_texts(folder, device, rank):
    # Processes that measure want different levels: the first one's counts.
    for case in CASES:
        found = texts_of(folder / case, device, {"tp_plan": "auto"}, RAISED if rank == 0 else 4)
        torch.save(found, folder / case / f"{rank}.pt")


def write_refusals(folder, device, rank):
    """What the refusals say, by name."""
    said = {}

    def refused(name, run):
        try:
            run()
            said[name] = "nothing"
        except (ValueError, NotImplementedError) as error:
            said[name] = str(error)

    cut = {"distributed_config": DistributedConfig(tp_size=2)}  # what replaces tp_plan="auto"
    model = PeftModel.from_pretrained(load(folder / "llama/base", device, **cut), folder / "llama/adapter").eval()
    hybrid = load(folder / "llama/hybrid", device, **cut)
    refused("merge", model.merge_and_unload)
    refused("save", lambda: model.save_pretrained(folder / "new"))
    refused("push", lambda: hybrid.push_to_hub("me/hybrid"))
    refused("train", lambda: DSLATrainer(model, DSLATrainingArguments(output_dir=str(folder / "out"), report_to="none")))
    said["graphs"] = GraphDecoder(model, record=lambda *_: None).obstacle()
    hybrid.model.layers[2].self_attn.dsla.num_kv_heads = 2  # as if a plan had left it whole
    refused("whole", lambda: hybrid(input_ids=torch.ones(1, 4, dtype=torch.long, device=device)))
    refused("hybrid of one head", lambda: load(folder / "one" / "hybrid", device, **cut))
    refused("adapter of one head", lambda: PeftModel.from_pretrained(load(folder / "one" / "base", device, **cut), folder / "one/adapter"))
    cores = [module for module in model.modules() if isinstance(module, HeadShardedAttention)]
    said["cores"] = [len(cores), {tuple(p.shape) != tuple(p.to_local().shape) for core in cores for p in core.parameters()} == {True}]
    (folder / f"{rank}.json").write_text(json.dumps(said))


# --- tests ------------------------------------------------------------------------------------------------------


def launch(folder, device):
    """Run this file on two processes."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_", "TORCH", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder), device],
        env={**inherited, **hidden, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]


def save_all(folder, base, adapter_model, **config):
    """Base, adapter and hybrid in subfolders of `folder`."""
    base.save_pretrained(folder / "base")
    model = adapter_model(base, level=2, **config)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "hybrid")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return request.param


@pytest.fixture
def ran(device, tiny_model, adapter_model, tmp_path_factory):
    """The folder in which two processes have left what they found; they run once for all tests of a device."""
    if device in RAN:
        return RAN[device]
    top = tmp_path_factory.mktemp(device)
    for case, config in CASES.items():
        folder = top / case
        # 5.17 asks for a vocabulary that can be divided.
        save_all(folder, tiny_model(case.partition("-")[0], vocab_size=98), adapter_model, **config)
        # Weights that are missing in a file get their initial values, each process its part; these are not random.
        weights = load_file(folder / "hybrid/model.safetensors")
        weights = {name: value for name, value in weights.items() if not name.endswith(("dsla.gate_bias", "dsla.mix_logits"))}
        (folder / "incomplete").mkdir()
        (folder / "incomplete/config.json").write_bytes((folder / "hybrid/config.json").read_bytes())
        save_file(weights, folder / "incomplete/model.safetensors", metadata={"format": "pt"})
    save_all(top / "one", tiny_model("llama", vocab_size=98, num_key_value_heads=1), adapter_model)
    launch(top, device)
    RAN[device] = top
    return top


def test_whether_options_ask_for_it():
    for options in ({"tp_plan": "auto"}, {"tp_size": 2}):
        assert asks_for_tensor_parallel(options) and asks_for_tensor_parallel({"distributed_config": options})
    assert asks_for_tensor_parallel({"distributed_config": DistributedConfig(tp_size=2)})
    for config in (None, {}, {"fsdp_size": 2}, DistributedConfig(fsdp_size=2), DistributedConfig(tp_size=1)):
        assert not asks_for_tensor_parallel({"distributed_config": config, "tp_plan": None, "dtype": "auto"})


def test_two_processes_write_what_one_writes(ran, device):
    for case in CASES:
        folder = ran / case
        written, given = load_file(folder / "saved/model.safetensors"), load_file(folder / "hybrid/model.safetensors")
        head = written.pop("lm_head.weight")  # transformers writes it, although it is the embedding
        assert torch.equal(head, given["model.embed_tokens.weight"]), case
        assert written.keys() == given.keys() and all(torch.equal(written[name], given[name]) for name in given), case
        assert "distributed_config" not in json.loads((folder / "saved/config.json").read_text())
        expected = texts_of(folder, device, {}, RAISED)
        assert not torch.equal(expected["level 2 False"]["tokens"], expected["level 4 False"]["tokens"])  # levels can be told apart
        both = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
        # OLMo 2 norms all queries and keys as one, so its plan gathers them: every process attends with all heads.
        processes_per_head = 2 if case == "olmo2" else 1
        for name, one in expected.items():
            for found in both:
                torch.testing.assert_close(found[name]["logits"], one["logits"], rtol=1e-4, atol=1e-4, msg=lambda s, n=name: f"{n}: {s}")
                assert name == "forward" or torch.equal(found[name]["tokens"], one["tokens"]), (case, name)
            for i, whole in enumerate(one.get("cached", ())):
                parts = [found[name]["cached"][i] for found in both]
                assert {part.shape[1] for part in parts} == {processes_per_head}, (case, name)
                joined = torch.cat(parts, dim=1) if processes_per_head == 1 else parts[1]
                torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-4)


def test_what_cannot_work_is_refused_on_every_process(ran):
    for rank in (0, 1):
        said = json.loads((ran / f"{rank}.json").read_text())
        for name in ("hybrid of one head", "adapter of one head"):
            assert "1 key-value heads cannot be divided among 2 processes" in said[name]
        assert "save merge_and_unload() as a hybrid, and load that with tp_plan" in said["merge"]
        assert "copy the folder that it was loaded from" in said["save"]
        assert "upload the folder from one of them" in said["push"]
        assert "load the base without tp_plan" in said["train"]
        assert "tensor parallel" in said["graphs"]
        assert "'model.layers.*.self_attn.dsla': 'dsla_heads'" in said["whole"]
        assert said["cores"] == [4, True]
    assert not (ran / "new").exists() and not (ran / "out").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    where = f"cuda:{os.environ['LOCAL_RANK']}" if sys.argv[2] == "cuda" else "cpu"
    write_texts(Path(sys.argv[1]), where, rank)
    write_refusals(Path(sys.argv[1]), where, rank)
