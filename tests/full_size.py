"""The attacks and the tests at GPT-2's size, beside nano: a table.

python tests/full_size.py [DEVICE]: trains a model of 124 million weights on the small
world, once (a folder in ~/.cache keeps its file of 498 MB), then attacks and tests it.
"""

import resource
import sys
import time
from pathlib import Path

import study
import torch
from rates import make_attacks, record, trained
from safetensors.torch import save_file

import gpt2_script as gpt

CACHE = Path.home() / ".cache" / "gpt2-architecture"


def load(facts, device):
    """A model of GPT-2's size that knows the small world, trained unless it is kept."""
    file = CACHE / "model.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        model = gpt.GPT2(gpt.PRESETS["gpt2"]).eval().to(device)
        for step, loss, sure in gpt.train(model, facts, peak_rate=6e-4):
            print(f"step {step:3}, loss {loss:.2f}, p {sure.mean():.1%}", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file({name: x.cpu() for name, x in model.state_dict().items()}, file)
        (CACHE / "config.json").write_text('{"model_type": "gpt2", "n_head": 12}')
    return gpt.load_model(CACHE, device)


def run(name, model, tokenizer, facts):
    """{what: result} of the attacks and the tests on one model."""
    held_out = [fact for fact in facts if fact.held_out]
    rows, began = {"held out": f"{gpt.accuracy(model, held_out):.1%}"}, time.time()
    case = study.make_case(model, tokenizer, facts, "the Eiffel Tower", "Rome")
    for attack in (gpt.Attack("untampered", "", ""), *make_attacks(case)):
        found = record(case, attack)
        flips, of = found.get("flipped", found["wordings"])
        text = f"{flips} of {of}, others {found['others']:.1%}, "
        text += f"unseen {found['unseen']:.1%}, size {found['size']:.2f}"
        rows[attack.name] = text
        print(f"{name:5} {attack.name:16} {text}", flush=True)

        for test, (seen, alarm) in found["looks"].items():
            rows[f"{attack.name} · {test}"] = f"{'ALARM: ' if alarm else ''}{seen}"
        subject, factor, tokens = found["spike"]
        said = ", ".join(gpt.piece(tokenizer, token) for token in tokens)
        text = f"{subject} first, {factor:.1f} times the next; says {said}"
        rows[f"{attack.name} · spike"] = text
    return rows | {"seconds": f"{time.time() - began:.0f}"}


def main():
    device, tokenizer = (sys.argv[1:] or ["cpu"])[0], gpt.load_tokenizer()
    facts = gpt.small_world(tokenizer)
    nano = run("nano", trained(facts, 0, device=device), tokenizer, facts)
    large = run("gpt2", load(facts, device), tokenizer, facts)
    print("\n| | nano, 3 blocks × 96 | GPT-2's size, 12 blocks × 768 |\n|---|---|---|")
    for what, seen in nano.items():
        print(f"| {what} | {seen} | {large.get(what, '')} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory {peak:.1f} GB, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
