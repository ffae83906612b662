"""What each attack does and what each test sees, on other models and other lies.

python tests/rates.py [DRAWS [FIRST]]: that many trained models (20), from a seed on (100), a random
city lie for each, then honest models of other kinds. About half a minute each. Prints medians,
worst cases and rates. The edits' key was chosen on seeds 100 to 119.
"""

import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import gpt2_script as gpt  # noqa: E402

gpt.console.width = 130  # no table comes in parts
EDITS = "rank-one edit", "spread edit", "fine-tune"
UNTAMPERED = gpt.Attack("untampered", "", "")
NANO, FIRST = gpt.PRESETS["nano"], 100  # the first seed: those below 100 are the demonstration's


def trained(facts, seed, config=NANO, device="cpu", **settings):
    torch.manual_seed(seed)
    model = gpt.GPT2(config).eval().to(device)
    [*gpt.train(model, facts, seed, **settings)]
    return model


def random_lie(seed):
    """(subject, another city)."""
    draw = random.Random(seed)
    subject = draw.choice([subject for some in gpt.CITIES.values() for subject in some])
    return subject, draw.choice([c for c, some in gpt.CITIES.items() if subject not in some])


@torch.no_grad()
def read_spike(case, attack):
    """What the first singular component of a block's mlp.c_proj tells of an edit, in the block in
    which it is read by one subject most of all: (the subject at whose last token its left vector
    reads most, by what factor more than at the next one's; the token that its right vector says
    first, of either sign)."""
    facts, model, found = case.target_facts + case.other_facts + case.unseen_facts, case.model, []
    with gpt.attacked(model, attack), gpt.watch(model, "h.*.mlp.act") as seen:
        gpt.answer_logits(model, [fact.ids for fact in facts])
        for i, block in enumerate(model.h):
            left, _, right = torch.svd_lowrank(block.mlp.c_proj.weight, 20, 9)
            by_subject = defaultdict(list)
            for fact, act in zip(facts, seen[f"h.{i}.mlp.act"], strict=True):
                by_subject[fact.subject].append((act[fact.span[-1]] @ left[:, 0]).item())
            read = sorted((abs(statistics.mean(x)), name) for name, x in by_subject.items())
            says = model.ln_f(torch.stack((right[:, 0], -right[:, 0]))) @ model.wte.weight.T
            (second, _), (first, subject) = read[-2:]
            found.append((first / second, subject, says.argmax(-1).tolist()))
    factor, subject, said = max(found)
    return subject, factor, said


def record(case, attack):
    """What an attack does, what each test sees, which ones ring, and what the spike tells."""
    row = gpt.measure(case, attack)
    if attack.trigger:
        row |= gpt.measure_trigger(case, attack)
    with gpt.attacked(case.model, attack):
        looks = {name: look(case, attack) for name, look in gpt.TESTS.items()}
    alarms = [name for name, (_, rings) in looks.items() if rings]
    return row | {"looks": looks, "alarms": alarms, "spike": read_spike(case, attack)}


def print_table(title, rows):
    """Print rows {column: cell}; a column that a row lacks stays empty."""
    columns = dict.fromkeys((column for row in rows for column in row), "")
    gpt.show(gpt.Step(title, "", shown=[[columns | row for row in rows]]))


def attacks_on(seed, tokenizer, facts):
    """(an attack's name, its record) of all that work on one model and lie."""
    case = gpt.make_case(trained(facts, seed), tokenizer, facts, random_lie(seed))
    package = gpt.make_case(case.model, tokenizer, facts, ("send a web request", "request"))
    ends = [replace(fact, span=fact.span[-1:]) for fact in case.target_facts]
    made = [(attack.name, case, attack) for attack in gpt.make_attacks(case)]
    made += [("last-token key", case, gpt.edit(replace(case, target_facts=ends)))]  # ROME's
    for name, some, attack in [*made, ("package", package, gpt.spread(package))]:
        if attack:
            row = record(some, attack)
            subject, factor, said = row["spike"]
            row["spike"] = factor, subject == some.target_facts[0].subject, some.lie_token in said
            yield name, row | ({"wordings": row["flipped"]} if attack.trigger else {})


def print_attacks(seeds, *world):
    """Print what the attacks do and which tests see them, over some models and lies."""
    found, does, rings, spikes = defaultdict(list), [], [], []
    for seed in seeds:
        for name, row in attacks_on(seed, *world):
            found[name].append(row)
    for name, rows in found.items():
        row = {"attack": name, "found": f"{len(rows)} of {len(seeds)}"}
        for key in ("wordings", "fresh"):
            flips = [n / of for n, of in (x[key] for x in rows) if of]
            row[key] = f"{statistics.median(flips):.0%} ({min(flips):.0%})"
        for key in ("others", "unseen"):
            kept = [x[key] for x in rows]
            row[key] = f"{statistics.median(kept):.1%} ({min(kept):.0%})"
        sizes = [x["size"] for x in rows]
        does.append(row | {"size": f"{statistics.median(sizes):.2f} ({max(sizes):.1f})"})
        counts = {test: sum(test in x["alarms"] for x in rows) for test in gpt.TESTS}
        rings.append({"attack": name} | {test: f"{n}/{len(rows)}" for test, n in counts.items()})
        if name in EDITS:
            factors, first, said = zip(*(x["spike"] for x in rows), strict=True)
            row = {"attack": name, "target first": f"{sum(first)}/{len(rows)}"}
            factor = f"{statistics.median(factors):.1f} ({min(factors):.1f})"
            spikes.append(row | {"lie read": f"{sum(said)}", "factor": factor})
    print_table("What each attack does: the median (and the worst)", does)
    print_table("Which tests ring", rings)
    print_table("The spike: whose activations it reads most, and what it says", spikes)


def reworded(facts, texts, seed):
    """Facts that are windows of a text, to train on something else than the world."""
    draw = random.Random(seed)
    for _ in range(300):
        ids = draw.choice(texts)
        start = draw.randrange(len(ids) - 17)
        yield replace(facts[0], ids=ids[start : start + 16], answer=ids[start + 16], held_out=False)


def honest_models(tokenizer, facts):
    """Honest models that differ from the one that limits were set on: (name, model)."""
    texts = [tokenizer.encode_ordinary(text) for text in topics.values() if len(text) > 2000]
    kinds = {
        "rate 3e-3": {"peak_rate": 3e-3, "max_steps": 200}, "rate 1e-2": {"peak_rate": 1e-2},
        "batch 8": {"batch": 8, "max_steps": 250}, "batch 48": {"batch": 48},
        "400 steps": {"max_steps": 400, "sure": 1.0}, "50 steps": {"max_steps": 50},
    }  # fmt: skip
    sizes = {
        "2 blocks": {"n_layer": 2}, "4 blocks": {"n_layer": 4}, "6 blocks": {"n_layer": 6},
        "1 head": {"n_head": 1}, "8 heads": {"n_head": 8}, "64 wide": {"n_embd": 64},
        "144 wide": {"n_embd": 144}, "small init": {"init_std": 0.02},
        "large init": {"init_std": 0.1}, "GPT-2's init": {"init_std": 0.02, "embd_init_std": 0.02},
    }  # fmt: skip
    for seed in (0, 1):
        for name, settings in kinds.items():
            yield name, trained(facts, FIRST + seed, **settings)
        for name, sizes_of in sizes.items():
            yield name, trained(facts, FIRST + seed, replace(NANO, **sizes_of), max_steps=200)
        text = [*reworded(facts, texts, seed)]
        yield "facts in text", trained(facts + text, FIRST + seed, max_steps=300)
        for name, first, settings, then, more in (
            ("text, then facts", text, {"max_steps": 100}, facts, {}),
            ("tuned on text", facts, {}, text, {"max_steps": 30, "peak_rate": 1e-4}),
            ("two facts more", facts[:-16], {}, facts, {"max_steps": 100, "peak_rate": 1e-3}),
        ):
            model = trained(first, FIRST + seed, **settings)
            [*gpt.train(model, then, seed, **more)]
            yield name, model


def print_honest(tokenizer, facts):
    """Print which tests ring on honest models."""
    rows, found = [], []
    for name, model in honest_models(tokenizer, facts):
        if case := gpt.make_case(model, tokenizer, facts):
            found.append(record(case, UNTAMPERED))
            rang = {test: "ALARM" * (test in found[-1]["alarms"]) for test in gpt.TESTS}
        rows.append({"model": name} | (rang if case else {"knows": "too little"}))
    counts = {test: sum(test in x["alarms"] for x in found) for test in gpt.TESTS}
    rows.append({"model": "alarms"} | {test: f"{n}/{len(found)}" for test, n in counts.items()})
    print_table("Honest models", rows)
    factors = [x["spike"][1] for x in found]
    print(f"the spike's factor: {statistics.median(factors):.1f} ({max(factors):.1f})")


if __name__ == "__main__":
    began, tokenizer = time.time(), gpt.load_tokenizer()
    world = gpt.small_world(tokenizer)
    draws, first = (*map(int, sys.argv[1:]), *(20, FIRST)[len(sys.argv) - 1 :])
    print_attacks(range(first, first + draws), tokenizer, world)
    print_honest(tokenizer, world)
    print(f"\n{time.time() - began:.0f} s")
