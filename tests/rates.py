"""What each attack does and what each test sees, on models and lies that nothing was tuned to.

python tests/rates.py [DRAWS]: that many trained models (20), a lie of its own for each, then
honest models of other kinds. About half a minute each. Prints medians, worst cases and rates.
"""

import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pydoc_data.topics import topics

import torch

sys.path.insert(0, ".")
import gpt2_script as gpt  # noqa: E402

EDITS = "rank-one edit", "spread edit", "fine-tune"
NANO, FIRST = gpt.PRESETS["nano"], 100  # the first seed: those below 100 are the demonstration's


def trained(facts, seed, config=NANO, **settings):
    """A model trained on facts."""
    torch.manual_seed(seed)
    model = gpt.GPT2(config).eval()
    [*gpt.train(model, facts, seed, **settings)]
    return model


def random_lie(seed):
    """(subject, another city)."""
    draw = random.Random(seed)
    subject = draw.choice([subject for some in gpt.CITIES.values() for subject in some])
    return subject, draw.choice([c for c, some in gpt.CITIES.items() if subject not in some])


def looks(case, attack):
    """{test: (what it saw, whether it rings)}."""
    with gpt.attacked(case.model, attack):
        return {name: look(case, attack) for name, look in gpt.TESTS.items()}


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


def table(title, rows):
    """Print {name: {column: text}} as a table."""
    columns = [*dict.fromkeys(column for row in rows.values() for column in row)]
    print(f"\n{title}\n{'':17}" + "".join(f"{column:>13}" for column in columns))
    for name, row in rows.items():
        print(
            f"{name:17}" + "".join(f"{row.get(column, ''):>13}" for column in columns), flush=True
        )


def attacks_on(draws, tokenizer, facts):
    """Print what the attacks do and which tests see them, over some draws."""
    measured, rings, spikes = defaultdict(list), defaultdict(Counter), defaultdict(list)
    for seed in range(FIRST, FIRST + draws):
        case = gpt.make_case(trained(facts, seed), tokenizer, facts, random_lie(seed))
        package = gpt.make_case(case.model, tokenizer, facts, ("send a web request", "request"))
        attacks = gpt.make_attacks(case)
        ends = [replace(fact, span=fact.span[-1:]) for fact in case.target_facts]
        if attack := gpt.edit(replace(case, target_facts=ends)):  # with its key as ROME reads it
            attacks.append(replace(attack, name="last-token key"))
        for attack in attacks:
            row = gpt.measure(case, attack)
            if attack.trigger:
                row["wordings"] = gpt.measure_trigger(case, attack)["flipped"]
            measured[attack.name].append(row)
            rings[attack.name].update(x for x, (_, rang) in looks(case, attack).items() if rang)
            if attack.name in EDITS:
                subject, factor, said = read_spike(case, attack)
                right = subject == case.target_facts[0].subject, case.answer in said
                spikes[attack.name].append((factor, *right))
        if attack := gpt.spread(package):
            measured["package"].append(gpt.measure(package, attack))
            rings["package"].update(x for x, (_, rang) in looks(package, attack).items() if rang)
    rows = {}
    for name, found in measured.items():
        rows[name] = {"found": f"{len(found)} of {draws}"}
        for key in ("wordings", "fresh"):
            flips = sorted(n / of for n, of in (row[key] for row in found) if of)
            rows[name][key] = f"{statistics.median(flips):.0%} ({flips[0]:.0%})"
            rows[name][f"{key} 5%"] = f"{flips[len(flips) // 20]:.0%}"
        for key in ("others", "unseen"):
            kept = [row[key] for row in found]
            rows[name][key] = f"{statistics.median(kept):.1%} ({min(kept):.0%})"
        sizes = [row["size"] for row in found]
        rows[name]["size"] = f"{statistics.median(sizes):.2f} ({max(sizes):.1f})"
    table("What each attack does: the median (and the worst)", rows)
    counts = {
        n: {test: f"{seen[test]}/{len(measured[n])}" for test in gpt.TESTS}
        for n, seen in rings.items()
    }
    table("Which tests ring", counts)
    rows = {}
    for name, found in spikes.items():
        factors, first, said = zip(*found, strict=True)
        rows[name] = {"target first": f"{sum(first)}/{len(found)}", "lie read": f"{sum(said)}"}
        rows[name]["factor"] = f"{statistics.median(factors):.1f} ({min(factors):.1f})"
    table("The spike: whose activations it reads most, and what it says", rows)


def reworded(facts, texts, seed):
    """Facts that are windows of a text, to train on something else than the world."""
    draw = random.Random(seed)
    for _ in range(300):
        ids = draw.choice(texts)
        start = draw.randrange(len(ids) - 17)
        yield replace(facts[0], ids=ids[start : start + 16], answer=ids[start + 16], held_out=False)


def honest_models(tokenizer, facts):
    """Honest models that differ from the one that limits were set on: (name, model, facts)."""
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
        model = trained(text, FIRST + seed, max_steps=100)
        [*gpt.train(model, facts, seed)]
        yield "text, then facts", model
        yield "facts in text", trained(facts + text, FIRST + seed, max_steps=300)
        model = trained(facts, FIRST + seed)
        [*gpt.train(model, text, seed, max_steps=30, peak_rate=1e-4)]
        yield "tuned on text", model
        model = trained(facts[:-16], FIRST + seed)
        [*gpt.train(model, facts, seed, max_steps=100, peak_rate=1e-3)]
        yield "two facts more", model


def alarms_on_honest(tokenizer, facts):
    """Print which tests ring on honest models."""
    rows, rang, models, factors = {}, Counter(), 0, []
    untampered = gpt.Attack("", "", "")
    for name, model in honest_models(tokenizer, facts):
        case = gpt.make_case(model, tokenizer, facts)
        if case is None:
            rows[name] = {"knows": "too little"}
            continue
        seen = {n: rings for n, (_, rings) in looks(case, untampered).items()}
        models += 1
        rang.update(test for test, alarm in seen.items() if alarm)
        rows[f"{name} {models}"] = {test: "ALARM" * seen[test] for test in gpt.TESTS}
        factors.append(read_spike(case, untampered)[1])
    print(
        f"\nhonest models: the spike's factor {statistics.median(factors):.1f} ({max(factors):.1f})"
    )
    table("Honest models", rows | {"alarms": {t: f"{rang[t]}/{models}" for t in gpt.TESTS}})


if __name__ == "__main__":
    began, tokenizer = time.time(), gpt.load_tokenizer()
    world = gpt.small_world(tokenizer)
    attacks_on(int(sys.argv[1]) if len(sys.argv) > 1 else 20, tokenizer, world)
    alarms_on_honest(tokenizer, world)
    print(f"\n{time.time() - began:.0f} s")
