"""One module a command: its options, and `run`, which imports what does the work.

A module has `add_to(commands, name)`, `run(args)`, `kept(args)` (what is there after an interrupt, where the work does not say it itself)
and `GOES_ON` (whether the same command goes on where an interrupted one stopped).
"""

from . import bench, distill, env, evaluate, generate, merge, order, quickstart, replay, report, serve

COMMANDS = {
    "quickstart": quickstart,
    distill.NAME: distill,
    "order": order,
    "merge": merge,
    "generate": generate,
    "eval": evaluate,
    "bench": bench,
    "report": report,
    "serve": serve,
    "replay": replay,
    "env": env,
}

__all__ = ["COMMANDS", "distill"]
