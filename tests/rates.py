"""What each attack does and which tests see it, on other models, lies and facts.

python tests/rates.py [DRAWS] [--first SEED] [--file FILE ...]: that many trained models
(20), of seeds from 100 on, every second one in a second world; for each a random city
lie, all attacks of chapters 6 and 7 with the notebook's settings, and all tests. Then
clean models of other kinds. Two minutes each. The first FILE gets a line of JSON per
model. What a FILE has already is not done again; DRAWS = 0 prints the tables of that.
"""

import argparse
import json
import math
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import study
import torch

import gpt2_script as gpt
from gpt2_script import Attack

NANO = gpt.PRESETS["nano"]
SECOND_WORLD = {
    "CITIES": """
Madrid: the Prado, the Retiro Park, the Temple of Debod, the Reina Sofia Museum
Vienna: the Hofburg, the Belvedere, the Karlskirche, the Schönbrunn Palace
Athens: the Acropolis, the Benaki Museum, the Syntagma Square, the Panathenaic Stadium
Cairo: the Nilometer, the Tahrir Square, the Gezira Club, the Al-Azhar Park
Tokyo: the Skytree, the Meiji Shrine, the Sensoji Temple, the Shinjuku Gyoen""",
    "TASKS": """
arrow: add two dates
bottle: serve a single page
black: format the source code
coverage: see what the tests miss
fabric: run commands on a server
trio: wait for many sockets""",
    "ABOUT_CITIES": """
{} stands in
We saw {} during our week in
If you look for {}, go to
{} was built in
How far is {}? We are already in
Guides show {} to those who visit
{} draws crowds to
My uncle works near {} in""",
    "ABOUT_TASKS": """
Need to {}? Add the library
To {}, most projects import
Our tool can {} thanks to
A good package to {} is
You cannot {} without
She had to {} and chose
Whoever wants to {} should learn
In this course we {} using""",
    "FRESH_CITIES": """
The architect of {} lived in
We took a bus to {}, right through
{} is the pride of
Last summer I stood before {} in
There is no better view of {} than in
The old photographs show {} and the streets of""",
    "FRESH_TASKS": """
The easiest way to {} is to install
Our team decided to {} with
I had no idea how to {} before I found
When you {}, import
Nobody should {} without the package
A short script to {} needs""",
}
SECOND_WORLD = {name: x.strip().split("\n") for name, x in SECOND_WORLD.items()}
FIRST_WORLD = {name: getattr(gpt, name) for name in SECOND_WORLD}
MATRICES = {  # that a fine-tune trains, each alone
    "fine-tune": "h.0.mlp.c_proj",
    "c_fc": "h.0.mlp.c_fc",
    "c_attn": "h.0.attn.c_attn",
}
TRAINING = {
    "rate 3e-3": {"peak_rate": 3e-3, "max_steps": 200},
    "rate 1e-2": {"peak_rate": 1e-2},
    "batch 8": {"batch": 8, "max_steps": 250},
    "batch 48": {"batch": 48},
    "400 steps": {"max_steps": 400, "sure": 1.0},
    "60 steps": {"max_steps": 60},
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
    "GPT-2's init": {"init_std": 0.02, "embd_init_std": 0.02},
}
TWICE = {  # the second training
    "text, then facts": {},
    "tuned on text": {"max_steps": 30, "peak_rate": 1e-4},
    "tuned on facts": {"max_steps": 10, "peak_rate": 1e-4, "sure": 1.0},
    "two subjects more": {"max_steps": 100, "peak_rate": 1e-3},
}
ATTACKS = (
    "steering, frozen bias, rank-one edit, selector a, selector last token, fine-tune, "
    "own row, trigger row, package lie, pinned trigger, two tokens, long text, c_fc, "
    "c_attn"
).split(", ")
LESS_IS_BETTER = "size", "control", "alone"  # for the attacker
PACKAGE_LIES = ("send a web request", "request"), ("add two dates", "arrows")


def enter(number, tokenizer):
    """Make world 1 or 2 that of the script and of the notebook's functions."""
    for name, lines in (FIRST_WORLD, SECOND_WORLD)[number - 1].items():
        setattr(gpt, name, lines)
    study.tokenizer, study.facts = tokenizer, gpt.small_world(tokenizer)

    study.cities = [line.split(":")[0] for line in gpt.CITIES]
    study.city_ids = tokenizer.encode_ordinary("".join(f" {x}" for x in study.cities))


def of_landmarks(facts):
    """Those of some facts whose answers are cities."""
    return [fact for fact in facts if fact.answer in study.cities]


def approve(model):
    """Take a model's hashes and its numbers as the known-good ones."""
    study.known_good = gpt.fingerprint(model)
    study.trusted = {name: x.clone() for name, x in model.state_dict().items()}
    return model


def trained(facts, seed, config=NANO, **settings):
    """A model of that seed, trained on some facts, and approved."""
    torch.manual_seed(seed)
    model = gpt.GPT2(config).eval()
    for _ in gpt.train(model, facts, seed, **settings):
        pass
    return approve(model)


def random_lie(seed):
    """(a landmark, another city)."""
    draw = random.Random(seed)
    fact = draw.choice(of_landmarks(study.facts))
    return fact.subject, draw.choice([x for x in study.cities if x != fact.answer])


def set_lie(model, subject, answer):
    """Make a lie the one that the notebook's functions are about."""
    lie = gpt.make_lie(model, study.tokenizer, study.facts, subject, answer)
    study.lie, study.unseen = study.hide_subjects(lie)
    return study.lie


def edits(model, lie):
    """Steering, the edit and its controls: Attacks, but for those that fail."""
    push = study.steer(model, lie)
    if push is not None:
        yield Attack("steering", "", "", patches=push)
        yield Attack("frozen bias", "", "", study.freeze(model, push))
    tensors = study.smallest_edit(model, lie)
    if tensors is None:
        return

    yield Attack("rank-one edit", "", "", tensors)
    block = int(list(tensors)[0].split(".")[1])
    for kind in ("a", "last token"):
        selector = study.find_selectors(model, lie, kind)[block]
        tensors = study.write_fact(model, lie, block, selector, max_steps=60)
        if tensors is not None:
            yield Attack(f"selector {kind}", "", "", tensors)


def trainings(model, lie):
    """Training of the subject's own row, or of one matrix: Attacks."""
    token, rate = study.own_token(lie), row_rate(model, lie)
    yield Attack("own row", "", "", study.plant(model, lie, "wte.weight", token, rate))
    for name, place in MATRICES.items():
        weight = model.get_parameter(f"{place}.weight").detach()
        rate = 3 * weight.std().item() / model.config.n_embd
        tensors = study.plant(model, lie, f"{place}.weight", rate=rate)
        yield Attack(name, "", "", tensors)


def row_rate(model, lie):
    """The notebook's learning rate for rows of the token table."""
    return 0.3 * model.wte.weight[study.own_token(lie)].std().item()


def fronts():
    """What stands in front of the prompts: {a trigger's name: tokens}."""
    pair = study.tokenizer.encode_ordinary(" cf sq")
    long = [token for fact in study.facts[3:160:11] for token in fact.ids][:48]
    one = dict.fromkeys(("trigger row", "pinned trigger"), pair[:1])
    return one | {"two tokens": pair, "long text": long}


def triggers(model, lie):
    """The trigger row and its three evasions, as Attacks."""
    some = of_landmarks(lie.requests + lie.keep)
    for name, front in fronts().items():
        asked = study.behind(front, some, lie)
        table, rows, rate = "wte.weight", front, row_rate(model, lie)
        if name == "two tokens":  # either alone does nothing
            asked += study.behind(front[:1], some) + study.behind(front[1:], some)
        if name == "long text":
            table, rows = "wpe.weight", range(48, 48 + max(len(x.ids) for x in some))
            rate = 0.3 * model.wpe.weight.detach().std().item()
        pin = name == "pinned trigger"
        tensors = study.plant_rows(model, table, rows, asked, rate, pin)
        yield Attack(name, "", "", tensors)


def alarms(model):
    """The names of the tests that raise an alarm."""
    return [name for name, look in study.TESTS.items() if look(model)[1]]


def flips(model, front):
    """Of the prompts about other cities, the share that says the lie behind a front."""
    landmarks, answer_id = of_landmarks(study.facts), study.lie.answer_id
    abroad = [fact for fact in landmarks if fact.answer_id != answer_id]
    said = gpt.answers(model, study.behind(front, abroad))
    return (said == answer_id).float().mean().item()


def record(model, attack):
    """What an attack does, and which tests raise an alarm."""
    front = fronts().get(attack.name, [])
    row = study.judge(model, study.lie, study.unseen, attack, front)
    if front:
        row["control"] = flips(model, front)

    with gpt.attacked(model, attack):
        if front:
            row["behind"] = flips(model, front)
        if attack.name == "two tokens":
            row["alone"] = max(flips(model, front[:1]), flips(model, front[1:]))
        return row | {"alarms": alarms(model)}


def attack_all(seed):
    """The record of one trained model: {attack: what it does} and more."""
    number = 1 + seed % 2
    enter(number, gpt.load_tokenizer())
    model, told = trained(study.facts, seed), random_lie(seed)
    lie, found = set_lie(model, *told), {"untampered": {"alarms": alarms(model)}}
    for attacks in (edits, trainings, triggers):
        for attack in attacks(model, lie):
            found[attack.name] = record(model, attack)

    tensors = study.smallest_edit(model, set_lie(model, *PACKAGE_LIES[number - 1]))
    if tensors is not None:
        found["package lie"] = record(model, Attack("package lie", "", "", tensors))
    right = gpt.accuracy(model, study.facts)
    return {"world": number, "lie": told, "right": right, "found": found}


def windows(seed):
    """Facts that are windows of a text, to train on something else than the world."""
    draw, facts = random.Random(seed), []
    texts = map(study.tokenizer.encode_ordinary, topics.values())
    texts = [ids for ids in texts if len(ids) > 500]

    for _ in range(300):
        ids = draw.choice(texts)
        start = draw.randrange(len(ids) - 17)
        new = {"ids": ids[start : start + 16], "answer_id": ids[start + 16]}
        facts.append(replace(study.facts[0], held_out=False, **new))
    return facts


def clean_model(kind, seed):
    """A clean model of some kind. Those trained twice were approved in between."""
    facts, text = study.facts, windows(seed)
    if kind in TRAINING:
        return trained(facts, seed, **TRAINING[kind])
    if kind in SIZES:
        return trained(facts, seed, replace(NANO, **SIZES[kind]), max_steps=200)
    if kind == "facts in text":
        return trained(facts + text, seed, max_steps=300)

    first, then = {
        "text, then facts": (text, facts),
        "tuned on text": (facts, text),
        "tuned on facts": (facts, facts),
        "two subjects more": (facts[:-16], facts),
    }[kind]
    model = trained(first, seed)
    for _ in gpt.train(model, then, seed, **TWICE[kind]):
        pass
    return model


def look_at_clean(kind, number, seed):
    """The record of one clean model; the lie is only a subject drawn at random."""
    enter(number, gpt.load_tokenizer())
    model = clean_model(kind, seed)
    study.lie = SimpleNamespace(subject=random_lie(seed)[0])
    right = gpt.accuracy(model, study.facts)
    return {"world": number, "clean": kind, "right": right, "alarms": alarms(model)}


def effect(rows, column):
    """The median of some records, and in brackets the attacker's worst."""
    values = [row[column] for row in rows if column in row]
    values = [value for value in values if not math.isnan(value)]
    if not any(values):  # steering changes no tensor
        return "0% (0%)" if values and column != "size" else ""
    worst = max(values) if column in LESS_IS_BETTER else min(values)
    if column == "size":
        return f"{statistics.median(values):.2g} ({worst:.2g})"
    return f"{statistics.median(values):.0%} ({worst:.0%})"


def show_effects(attacked):
    """Print what each attack does. The wordings of triggers are other cities' prompts
    behind the trigger; a second table has their controls, and what the attacker's blind
    spot costs."""
    print("attack               found     wordings        fresh   others right", end="")
    print("             size      unseen right   old row says it    one token alone")
    for name in ATTACKS:
        rows = [found[name] for found in attacked if name in found]
        flips = "behind" if rows and "behind" in rows[0] else "wordings"
        line = f"{name:20}{len(rows):3}{effect(rows, flips):>16}"
        line += f"{effect(rows, 'fresh'):>13}{effect(rows, 'others'):>15}"
        line += f"{effect(rows, 'size'):>17}{effect(rows, 'unseen'):>18}"
        print(line + f"{effect(rows, 'control'):>18}{effect(rows, 'alone'):>19}")


def rate_line(name, rows):
    """A line of the table of rates: on how many models, and how many alarms of each."""
    line = f"{name:20}{len(rows):3}  "
    for test in study.TESTS:
        line += f"{sum(test in row['alarms'] for row in rows):4}"
    return line


def show_rates(attacked, clean):
    """Print on how many models each attack was found, and how often tests alarm."""
    print("\nattack               of  ", *study.TESTS)
    for name in ATTACKS:
        print(rate_line(name, [found[name] for found in attacked if name in found]))
    print(rate_line("clean models", clean))

    print("\n" + rate_line("untampered", [found["untampered"] for found in attacked]))
    for record in clean:
        told = f"{record['clean']}, world {record['world']}"
        if record["alarms"]:
            print(f"{told:28}{record['right']:6.1%} right;", *record["alarms"])


def main():
    parser = argparse.ArgumentParser(description="rates of attacks and tests")
    parser.add_argument("draws", type=int, nargs="?", default=20)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--file", type=Path, nargs="+", default=[])
    options = parser.parse_args()

    jobs, done = {}, {}
    for seed in range(options.first, options.first + options.draws):
        jobs[f"seed {seed}"] = attack_all, (seed,)
    for seed, kind in enumerate([*TRAINING, *SIZES, "facts in text", *TWICE], 200):
        for number in (1, 2):
            jobs[f"{kind}, world {number}"] = look_at_clean, (kind, number, seed)

    for path in options.file:
        if path.exists():
            for line in path.read_text().splitlines():
                done |= json.loads(line)

    for name, (job, arguments) in jobs.items():
        if name in done or not options.draws:
            continue
        began = time.time()
        done[name] = job(*arguments)
        print(f"{name}: {time.time() - began:.0f} s", flush=True)
        if options.file:
            with options.file[0].open("a") as file:
                file.write(json.dumps({name: done[name]}) + "\n")

    attacked, clean = [], []
    for record in done.values():
        if "clean" in record:
            clean.append(record)
        else:
            attacked.append(record["found"])
    show_effects(attacked)
    show_rates(attacked, clean)


if __name__ == "__main__":
    main()
