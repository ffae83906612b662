"""Attacks and tests at GPT-2's size, beside nano: a table.

python tests/full_size.py: trains a model of 124 million weights on the small
world, once (a folder in ~/.cache keeps its file of 498 MB), then attacks and tests it
with the notebook's settings. To stay within eight minutes on two cores, it leaves out
attacks that differ little from others, tries the rank-one edit in block 0 alone, and
runs the two slow tests only where LOOKED_AT says so: a dash stands for the rest.
"""

import resource
import time
from itertools import islice
from pathlib import Path

import rates
import study
import torch
from safetensors.torch import save_file

import gpt2_script as gpt

CACHE = Path.home() / ".cache" / "gpt2-architecture"
MADE = (rates.edits, 3), (rates.trainings, 2), (rates.triggers, 1)  # the first so many
LOOKED_AT = {  # attacks on which a slow test is run
    "ablation": ("untampered", "rank-one edit"),
    "trigger": ("untampered", "trigger row"),
}


def load(facts):
    """A model of GPT-2's size that knows the small world, trained unless it is kept."""
    file = CACHE / "model.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        model = gpt.GPT2(gpt.PRESETS["gpt2"]).eval()
        for step, loss, sure in gpt.train(model, facts, peak_rate=6e-4):
            print(f"step {step:3}, loss {loss:.2f}, p {sure.mean():.1%}", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
        (CACHE / "config.json").write_text('{"model_type": "gpt2", "n_head": 12}')
    return rates.approve(gpt.load_model(CACHE))


def selectors_of_block_0(model, lie, kind="M⁻¹a", find=study.find_selectors):
    """The notebook's find_selectors, without the other blocks."""
    return {0: find(model, lie, kind)[0]}


def tested(model, attack):
    """What an attack does, what each test says, and how long it all took."""
    began, front = time.time(), rates.fronts().get(attack.name, [])
    row = study.judge(model, study.lie, study.unseen, attack, front)
    found = {}
    for name, value in row.items():
        found[name] = f"{value:.3f}"

    with gpt.attacked(model, attack):
        if front:
            found["behind the trigger"] = f"{rates.flips(model, front):.3f}"
        for name, look in study.TESTS.items():
            found[f"test: {name}"] = "–"
            if attack.name in LOOKED_AT.get(name, [attack.name]):
                text, alarm = look(model)
                found[f"test: {name}"] = f"ALARM: {text}" if alarm else text

    print(f"{attack.name:16} tested in {time.time() - began:.0f} s", flush=True)
    return found


def attack_all(model):
    """{attack: what it does and what the tests say} on one model."""
    lie = rates.set_lie(model, "the Eiffel Tower", "Rome")
    known = len(lie.about) + len(lie.others) + len(study.unseen)
    print(f"knows {known} of {len(study.facts)} facts", flush=True)

    untampered = gpt.Attack("untampered", "", "")
    found = {"untampered": tested(model, untampered)}
    for make, count in MADE:
        for attack in islice(make(model, lie), count):
            if attack.name != "frozen bias":
                found[attack.name] = tested(model, attack)
    return found


def main():
    rates.enter(1, gpt.load_tokenizer())
    study.find_selectors = selectors_of_block_0
    columns = {}
    columns["nano"] = attack_all(rates.trained(study.facts, 0))
    columns["GPT-2's size"] = attack_all(load(study.facts))

    print(
        "\n|attack|what|nano, 3 blocks × 96|GPT-2's size, 12 blocks × 768|\n|-|-|-|-|"
    )
    for attack, rows in columns["nano"].items():
        for what, seen in rows.items():
            other = columns["GPT-2's size"].get(attack, {}).get(what, "not found")
            print(f"|{attack}|{what}|{seen}|{other}|")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory {peak:.1f} GB, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
