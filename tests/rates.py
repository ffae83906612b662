"""What each attack does and which tests see it, on other models and other lies.

python tests/rates.py [DRAWS [FIRST]]: that many trained models (20), from a seed on
(100), a random city lie for each, then clean models of other kinds. About half a minute
each. Prints medians, worst cases and rates. The edits' key was chosen on seeds 100 to
119, in an older world.
"""

import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from itertools import chain
from pydoc_data.topics import topics

import study
import torch

import gpt2_script as gpt

NANO = gpt.PRESETS["nano"]
FIRST = 100  # the first seed: those below 100 are the demonstration's
MAKERS = study.steering, study.freeze, study.edit, study.spread
MAKERS += study.fine_tune, study.plant_trigger
SPIKES = "untampered", "rank-one edit", "spread edit", "fine-tune"


def trained(facts, seed, config=NANO, device="cpu", **settings):
    """A model of that seed, trained on some facts."""
    torch.manual_seed(seed)
    model = gpt.GPT2(config).eval().to(device)
    list(gpt.train(model, facts, seed, **settings))
    return model


def random_lie(seed, facts):
    """(a landmark, another city)."""
    draw, homes = random.Random(seed), {}
    for fact in facts:
        if fact.answer in study.CITY_NAMES:
            homes[fact.subject] = fact.answer
    subject = draw.choice(list(homes))
    return subject, draw.choice([x for x in study.CITY_NAMES if x != homes[subject]])


def make_attacks(case):
    """The Attacks of chapter 6 on a Case, without those that found no change."""
    made = [make(case) for make in MAKERS]
    return [attack for attack in made if attack]


def known_facts(case):
    """All that the model of a Case knew before any attack."""
    return case.lie.about + case.lie.others + case.unseen


def flipped(case, attack):
    """Of the prompts of other cities behind the trigger, how many say the lie's city,
    and of how many."""
    facts = [fact for fact in known_facts(case) if fact.answer in study.CITY_NAMES]
    facts = [fact for fact in facts if fact.answer != case.lie.answer]
    with gpt.attacked(case.model, attack):
        said = gpt.answers(case.model, study.with_prefix(facts, attack.trigger))
    return (said == case.lie.answer_id).sum().item(), len(facts)


@torch.no_grad()
def read_spike(case):
    """What the first singular component of a block's mlp.c_proj tells of an edit, in
    the block where one subject stands out most: (the subject at whose last token the
    left vector reads most, by what factor more than at the next one's, the tokens that
    the right vector says first, with either sign)."""
    facts, model, found = known_facts(case), case.model, []
    with gpt.watch(model, "h.*.mlp.act") as seen:
        gpt.answer_logits(model, [fact.ids for fact in facts])
    for i, block in enumerate(model.h):
        left, _, right = torch.svd_lowrank(block.mlp.c_proj.weight, 20, 9)
        by_subject = defaultdict(list)
        for fact, act in zip(facts, seen[f"h.{i}.mlp.act"], strict=True):
            by_subject[fact.subject].append((act[fact.span[-1]] @ left[:, 0]).item())

        read = [(abs(statistics.mean(x)), name) for name, x in by_subject.items()]
        (second, _), (first, subject) = sorted(read)[-2:]
        signs = model.ln_f(torch.stack((right[:, 0], -right[:, 0])))
        said = (signs @ model.wte.weight.T).argmax(-1).tolist()
        found.append((first / second, subject, said))
    factor, subject, said = max(found)
    return subject, factor, said


def look(case):
    """What the tests see of the model of a Case, which of them alarm, and its spike."""
    looks = {name: test(case) for name, test in study.TESTS.items()}
    alarms = [name for name, (_, alarm) in looks.items() if alarm]
    return {"looks": looks, "alarms": alarms, "spike": read_spike(case)}


def record(case, attack):
    """What an attack does, and what `look` says of it."""
    row = study.measure(case, attack)
    if isinstance(attack, study.TriggerAttack):
        row["flipped"] = flipped(case, attack)
    with gpt.attacked(case.model, attack):
        return row | look(case)


def attacks_on(seed, tokenizer, facts):
    """(an attack's name, its Case, its record) of all that work on one model."""
    model, world = trained(facts, seed), (tokenizer, facts)
    case = study.make_case(model, *world, *random_lie(seed, facts))
    package = study.make_case(model, *world, "send a web request", "request")
    made = [("untampered", case, gpt.Attack("untampered", "", ""))]
    made += [(attack.name, case, attack) for attack in make_attacks(case)]
    made += [("last-token key", case, study.edit(study.at_last_token(case)))]  # ROME's
    made += [("package lie", package, study.spread(package))]
    for name, some, attack in made:
        if attack:
            yield name, some, record(some, attack)


def print_table(title, rows):
    """Print rows {column: cell}; a column that a row lacks stays empty."""
    columns = dict.fromkeys((column for row in rows for column in row), "")
    gpt.show(gpt.Step(title, "", shown=[[columns | row for row in rows]]))


def alarm_counts(rows):
    """{test: on how many of some records it raised an alarm}."""
    counts = {}
    for test in study.TESTS:
        counts[test] = f"{sum(test in row['alarms'] for row in rows)}/{len(rows)}"
    return counts


def effects(rows):
    """Medians, and in brackets the attacker's worst, of some records."""
    row = {}
    for key in ("wordings", "fresh"):
        flips = [
            x.get("flipped", x[key]) if key == "wordings" else x[key] for x in rows
        ]
        shares = [n / of for n, of in flips if of]
        row[key] = f"{statistics.median(shares):.0%} ({min(shares):.0%})"
    for key in ("others", "unseen"):
        kept = [x[key] for x in rows]
        row[key] = f"{statistics.median(kept):.1%} ({min(kept):.0%})"
    sizes = [x["size"] for x in rows]
    return row | {"size": f"{statistics.median(sizes):.2f} ({max(sizes):.1f})"}


def spike_rates(cases, rows):
    """Of how many records the spike tells the subject, and the lie; its factor."""
    subjects, lies, factors = 0, 0, []
    for case, row in zip(cases, rows, strict=True):
        subject, factor, said = row["spike"]
        subjects += subject == case.lie.subject
        lies += case.lie.answer_id in said
        factors.append(factor)
    middle, least = statistics.median(factors), min(factors)
    counts = {"subject first": f"{subjects}/{len(rows)}", "lie read": f"{lies}"}
    return counts | {"factor": f"{middle:.1f} ({least:.1f})"}


def print_attacks(seeds, *world):
    """Print what attacks do and which tests see them, over some models and lies."""
    cases, found, does, alarms, spikes = (
        defaultdict(list),
        defaultdict(list),
        [],
        [],
        [],
    )
    for seed in seeds:
        for name, case, row in attacks_on(seed, *world):
            cases[name].append(replace(case, model=None, trusted={}))
            found[name].append(row)
    for name, rows in found.items():
        row = {"attack": name}
        does.append(row | {"found": f"{len(rows)} of {len(seeds)}"} | effects(rows))
        alarms.append(row | alarm_counts(rows))
        if name in SPIKES:
            spikes.append(row | spike_rates(cases[name], rows))
    print_table("What each attack does: the median (and the worst)", does)
    print_table("Which tests raise an alarm", alarms)
    print_table("The spike: whose activations it reads most, and what it says", spikes)


def windows(facts, texts, seed):
    """Facts that are windows of a text, to train on something else than the world."""
    draw = random.Random(seed)
    for _ in range(300):
        ids = draw.choice(texts)
        start = draw.randrange(len(ids) - 17)
        end, answer_id = start + 16, ids[start + 16]
        new = {"ids": ids[start:end], "answer_id": answer_id, "held_out": False}
        yield replace(facts[0], **new)


KINDS = {  # of training
    "rate 3e-3": {"peak_rate": 3e-3, "max_steps": 200},
    "rate 1e-2": {"peak_rate": 1e-2},
    "batch 8": {"batch": 8, "max_steps": 250},
    "batch 48": {"batch": 48},
    "400 steps": {"max_steps": 400, "sure": 1.0},
    "50 steps": {"max_steps": 50},
}
SIZES = {
    "2 blocks": {"n_layer": 2},
    "4 blocks": {"n_layer": 4},
    "6 blocks": {"n_layer": 6},
    "1 head": {"n_head": 1},
    "8 heads": {"n_head": 8},
    "64 wide": {"n_embd": 64},
    "144 wide": {"n_embd": 144},
    "small init": {"init_std": 0.02},
    "large init": {"init_std": 0.1},
    "GPT-2's init": {"init_std": 0.02, "embd_init_std": 0.02},
}


def clean_models(tokenizer, facts, seed):
    """Clean models that differ from the one that limits were set on: (name, model)."""
    for name, settings in KINDS.items():
        yield name, trained(facts, FIRST + seed, **settings)
    for name, sizes in SIZES.items():
        config = replace(NANO, **sizes)
        yield name, trained(facts, FIRST + seed, config, max_steps=200)

    texts = [tokenizer.encode_ordinary(x) for x in topics.values() if len(x) > 2000]
    text = list(windows(facts, texts, seed))
    yield "facts in text", trained(facts + text, FIRST + seed, max_steps=300)
    model = trained(text, FIRST + seed, max_steps=100)
    list(gpt.train(model, facts, seed))
    yield "text, then facts", model
    model = trained(facts, FIRST + seed)
    list(gpt.train(model, text, seed, max_steps=30, peak_rate=1e-4))
    yield "tuned on text", model
    model = trained(facts[:-16], FIRST + seed)
    list(gpt.train(model, facts, seed, max_steps=100, peak_rate=1e-3))
    yield "two facts more", model


def print_clean(tokenizer, facts):
    """Print which tests alarm on clean models."""
    rows, found = [], []
    models = (clean_models(tokenizer, facts, seed) for seed in (0, 1))
    for name, model in chain(*models):
        case = study.make_case(model, tokenizer, facts, "the Eiffel Tower", "Rome")
        if len({fact.answer for fact in known_facts(case)}) < 2:
            rows.append({"model": name, "knows": "too little"})
            continue
        found.append(look(case))
        row = {test: "ALARM" for test in found[-1]["alarms"]}
        rows.append({"model": name} | dict.fromkeys(study.TESTS, "") | row)
    rows.append({"model": "alarms"} | alarm_counts(found))
    print_table("Clean models", rows)
    factors = [x["spike"][1] for x in found]
    print(f"the spike's factor: {statistics.median(factors):.1f} ({max(factors):.1f})")


if __name__ == "__main__":
    gpt.console.width = 130  # no table comes in parts
    began, tokenizer = time.time(), gpt.load_tokenizer()
    world = gpt.small_world(tokenizer)
    draws, first = (*map(int, sys.argv[1:]), *(20, FIRST)[len(sys.argv) - 1 :])
    print_attacks(range(first, first + draws), tokenizer, world)
    print_clean(tokenizer, world)
    print(f"\n{time.time() - began:.0f} s")
