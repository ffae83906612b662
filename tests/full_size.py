"""The attacks and the tests at GPT-2's size, beside nano: a table.

python tests/full_size.py [--device cuda] [--cache FOLDER]: trains a model of 124 million weights on
the small world, once (the cache folder keeps its file of 498 MB), then tampers and detects.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from rates import looks, read_spike  # noqa: E402

import gpt2_script as gpt  # noqa: E402

CACHE = Path.home() / ".cache" / "gpt2-architecture"
SETTINGS = {"nano": {}, "gpt2": {"peak_rate": 6e-4}}


def trained(name, facts, cache, device):
    """A model that knows the small world, from the cache where it is there."""
    torch.manual_seed(0)
    if name == "nano":
        model = gpt.GPT2(gpt.PRESETS[name]).eval().to(device)
        [*gpt.train(model, facts, **SETTINGS[name])]
        return model
    file, began = cache / "model.safetensors", time.time()
    if not file.exists():
        model = gpt.GPT2(gpt.PRESETS[name]).eval().to(device)
        for step, loss, p in gpt.train(model, facts, **SETTINGS[name]):
            print(f"step {step:3}  loss {loss:.3f}  least sure {p.min():.3f}", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        save_file({n: w.contiguous().cpu() for n, w in model.state_dict().items()}, file)
        (cache / "config.json").write_text('{"model_type": "gpt2", "n_head": 12}')
        print(f"trained in {time.time() - began:.0f} s, kept in {cache}")
    return gpt.load_model(cache, device)


def run(name, model, tokenizer, facts):
    """{what: result} of the attacks and the tests on one model."""
    rows, held_out = {}, [fact for fact in facts if fact.held_out]
    rows["held-out facts right"] = f"{gpt.accuracy(model, held_out):.1%}"
    began, case = time.time(), gpt.make_case(model, tokenizer, facts)
    attacks = gpt.make_attacks(case)
    for attack in attacks:
        row = gpt.measure(case, attack)
        flipped, of = row["wordings"]
        text = f"{flipped} of {of}, others {row['others']:.1%}, unseen {row['unseen']:.1%}"
        rows[attack.name] = text + f", size {row['size']:.2f}"
        if attack.trigger:
            row = gpt.measure_trigger(case, attack)
            rows["other cities flipped"] = "{} of {}".format(*row["flipped"])
        seconds = f"{time.time() - began:.0f} s"
        print(f"{name:5} {attack.name:16} {rows[attack.name]}  {seconds}", flush=True)
    for attack in (gpt.Attack("untampered", "", ""), *attacks):
        for test, (seen, alarm) in looks(case, attack).items():
            rows[f"{attack.name} · {test}"] = "ALARM: " * alarm + seen
        subject, factor, said = read_spike(case, attack)
        said = ", ".join(gpt.piece(tokenizer, token) for token in said)
        rows[f"{attack.name} · spike"] = (
            f"{subject} first, {factor:.1f} times the next; says {said}"
        )
        print(f"{name:5} {attack.name:16} tested  {time.time() - began:.0f} s", flush=True)
    rows["seconds to tamper and detect"] = f"{time.time() - began:.0f}"
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    tokenizer = gpt.load_tokenizer()
    facts, results = gpt.small_world(tokenizer), {}
    for name in SETTINGS:
        model = trained(name, facts, options.cache, options.device)
        results[name] = run(name, model, tokenizer, facts)
    print("\n| | nano, 3 blocks × 96 | GPT-2's size, 12 blocks × 768 |\n|---|---|---|")
    for what, seen in results["nano"].items():
        print(f"| {what} | {seen} | {results['gpt2'].get(what, '')} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory {peak:.1f} GB, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
