"""Runs distillations one after the other, as one of several processes: the script that tests give to `accelerate launch`.

    accelerate launch --config_file CONFIG tests/support/processes.py JOBS.json

Each process imports everything once and forks for each job of the list, so that a job takes a second or two. A job: `options` of
`dsla distill`; `processes` that take part (default: all); `port` where they meet; `kill_at`, a path at whose appearance they are
killed; `copy`, two folders, and `remove`, paths, what is done before; `printed`, a file to which what is printed is added;
`environment`, what another config tells in place of CONFIG. FSDP is used on the CPU, which accelerate would not do by itself.
"""

import gc
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed import fsdp  # noqa: F401, as the next
from transformers import AutoModelForCausalLM

from dsla_cli import main
from dsla_hf.cli import distill as distill_job  # noqa: F401, imported before the forks
from dsla_hf.evaluation import short_answers

# The same code in less time.
short_answers.ANSWER_TOKENS, short_answers.SAMPLE_TOKENS, short_answers.QUESTIONS = 4, 2, short_answers.QUESTIONS[:2]


def run(job, processes):
    """In a forked process: take part in this job."""
    if job.get("environment"):
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[name]
        os.environ.update(job["environment"])
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # each job has a meeting point of its own
    os.environ.update({"MASTER_PORT": str(job["port"]), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)})
    if processes == 1:
        for name in ("ACCELERATE_USE_FSDP", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    device = ["--use_cpu"]
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        device = []
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    status = main(["distill", *job["options"], *device])
    print(AcceleratorState().distributed_type)
    return status


def supervise(job, rank):
    """Run a job in a forked process; kill it when the job says so."""
    processes = job.get("processes", int(os.environ["WORLD_SIZE"]))
    if rank >= processes:
        return
    if rank == 0:  # the others wait for it where they meet
        if "copy" in job:
            shutil.copytree(*job["copy"])
        for path in map(Path, job.get("remove", ())):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(job["printed"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), sys.stdout.fileno())
        status = run(job, processes)
        sys.stdout.flush()
        os._exit(status)
    kill_at = job.get("kill_at")
    ended, status = os.waitpid(child, os.WNOHANG if kill_at else 0)
    while not ended:
        if Path(kill_at).exists():
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if status and not (kill_at and os.waitstatus_to_exitcode(status) == -signal.SIGKILL):
        sys.exit(f"job {job} ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    AutoModelForCausalLM.from_pretrained(jobs[0]["options"][jobs[0]["options"].index("--model") + 1])  # what is computed once a process
    gc.collect()
    gc.freeze()  # as tests/conftest.py
    for each in jobs:
        supervise(each, int(os.environ["RANK"]))
