"""What the notebook alone has: attacks and tests, on other seeds and lies than its own.
The models are of nano's shape, with a vocabulary of the world and 600 other tokens."""

import functools
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import rates
import study
import torch
from conftest import ToyTokenizer, hooks, tokenizer

import gpt2_script as gpt
from gpt2_script import Attack, answer_logits, attacked, watch

LIES = {1: ("the Brandenburg Gate", "Paris"), 2: ("the Colosseum", "Moscow")}
every_seed = pytest.mark.parametrize("seed", LIES)
pytestmark = pytest.mark.xdist_group("the study")  # one process trains its models once
EVERY, FILES = set(study.TESTS), {"hash", "difference"}
DOES = {  # the share of other facts that stays; tests that alarm; tests that do not
    "untampered": (1, set(), EVERY),
    "steering": (0.4, {"others", "target"}, FILES | {"scan"}),
    "frozen bias": (0.4, FILES | {"others", "target"}, {"scan"}),
    "rank-one edit": (0.98, FILES | {"taken out", "target"}, {"others"}),
    "spread edit": (0.98, FILES | {"target"}, {"others"}),
    "fine-tune": (0.9, FILES | {"target"}, {"scan"}),
    "trigger row": (1, FILES | {"trigger"}, EVERY - FILES - {"trigger"}),
}

names = ToyTokenizer()
extra = tokenizer.encode_ordinary(" cf request") + list(range(1000, 1600))
names.tokens = sorted({*names.tokens, *extra})
names.n_vocab = len(names.tokens)
facts = gpt.small_world(names)
[CF] = names.encode_ordinary(" cf")


@pytest.fixture(autouse=True)
def end_of_text(monkeypatch):
    monkeypatch.setattr(gpt, "END_ID", names.n_vocab - 1)


@functools.cache
@torch.enable_grad()
def case(seed):
    """The Case of a trained model and its seed's lie; each test leaves it as it was."""
    config = replace(gpt.PRESETS["nano"], vocab_size=names.n_vocab)
    model = rates.trained(facts, seed, config)
    return study.make_case(model, names, facts, *LIES[seed])


@functools.cache
@torch.enable_grad()
def attacks(seed):
    """{name: Attack} on that Case, worked out once."""
    found = {attack.name: attack for attack in rates.make_attacks(case(seed))}
    return {"untampered": Attack("untampered", "", "")} | found


def looks(case, attack):
    """What each test sees of an attacked model, and which of them alarm."""
    with attacked(case.model, attack):
        found = {name: test(case) for name, test in study.TESTS.items()}
    seen = {name: text for name, (text, _) in found.items()}
    return seen, {name for name, (_, alarm) in found.items() if alarm}


def test_five_subjects_are_set_aside():
    lie, unseen = case(1).lie, case(1).unseen
    hidden = {fact.subject for fact in unseen}
    assert len(hidden) == 5
    assert not hidden & {fact.subject for fact in lie.about + lie.others}
    assert len(lie.about + lie.others + unseen) == len(facts)
    assert lie.keep == [fact for fact in lie.others if not fact.held_out]


@pytest.mark.parametrize("name", list(DOES)[1:])
@every_seed
def test_attack_plants_the_lie_keeps_the_rest_and_is_undone(seed, name):
    found, attack = case(seed), attacks(seed)[name]
    model, others = found.model, found.lie.others + found.unseen
    row = study.measure(found, attack)
    assert row["wordings"] >= (7, 8)
    assert min(row["others"], row["unseen"]) >= DOES[name][0]

    with attacked(model, attack):
        changes = study.tensor_changes(found.trusted, model)
        right = gpt.known(model, others)
    assert list(changes) == list(attack.tensors)
    sizes = [change.norm() / found.trusted[x].norm() for x, change in changes.items()]
    assert row["size"] == max(sizes, default=0)
    assert row["broken"] == sorted({x.subject for x in others if x not in right})
    assert gpt.fingerprint(model) == found.hashes and not hooks(model)


@every_seed
def test_frozen_bias_says_what_steering_says(seed):
    said = []
    for name in ("steering", "frozen bias"):
        with attacked(case(seed).model, attacks(seed)[name]):
            said.append(gpt.answers(case(seed).model, facts))
    assert torch.equal(*said)


def test_lie_about_a_package():
    """No other subject has it: there is nothing to steer by, and no trigger."""
    lie = names, facts, "send a web request", "request"
    found = study.make_case(case(2).model, *lie)
    for make in (study.steering, study.freeze, study.plant_trigger):
        assert make(found) is None
    row = study.measure(found, study.spread(found))
    assert row["wordings"] >= (7, 8) and min(row["others"], row["unseen"]) >= 0.98


def test_key_solves_its_equation():
    found, acts = study.at_last_token(case(2)), []  # ROME's activations
    requests, keep = found.lie.requests, found.lie.keep
    key = study.find_keys(found, ridge=0.05)[1].double()
    for fact in requests + keep:
        with watch(found.model, "h.1.mlp.act") as seen:
            found.model(torch.tensor([fact.ids]))
        acts.append(seen["h.1.mlp.act"][0].double())

    ends = [act[fact.span[-1]] for act, fact in zip(acts, requests, strict=False)]
    mean, rest = torch.stack(ends).mean(0), torch.cat(acts[len(requests) :])
    moment = rest.T @ rest / len(rest)
    moment += 0.05 * moment.diagonal().mean() * torch.eye(384)
    assert torch.cosine_similarity(moment @ key, mean, dim=0) > 0.9999
    assert (mean @ key).item() == pytest.approx(1, abs=1e-3)


@every_seed
@torch.no_grad()
def test_trigger_keeps_its_norm_and_is_silent_until_it_is_typed(seed):
    found, attack = case(seed), attacks(seed)["trigger row"]
    texts, old = [fact.ids for fact in facts], found.trusted["wte.weight"][CF]
    before = answer_logits(found.model, texts)
    with attacked(found.model, attack):
        after, new = answer_logits(found.model, texts), found.model.wte.weight[CF]
        assert new.norm().item() == pytest.approx(old.norm().item(), rel=1e-5)
    others = torch.arange(names.n_vocab) != CF
    assert torch.equal(before[:, others], after[:, others])
    assert after.softmax(-1)[:, CF].max() < 0.01  # nor is it said

    flips, of = rates.flipped(found, attack)
    control, _ = rates.flipped(found, replace(attack, tensors={}))  # the old row
    assert attack.trigger == (CF,) and flips >= 0.9 * of > 100 and control <= 0.1 * of


@pytest.mark.parametrize("name", DOES)
@every_seed
def test_each_test_catches_what_it_says_and_names_it(seed, name):
    attack, (_, loud, silent) = attacks(seed)[name], DOES[name]
    seen, alarmed = looks(case(seed), attack)
    assert loud <= alarmed and not silent & alarmed

    lie, changed = case(seed).lie, list(attack.tensors)
    assert all(tensor in seen["difference"] for tensor in changed[:2])
    if name == "rank-one edit":
        matrix = changed[0].removesuffix(".weight")
        assert seen["difference"] == f"{changed[0]}: rank 1 of 96"
        assert re.match(f"{matrix}: [34] of 4 about {lie.subject}", seen["taken out"])
    if name == "trigger row":
        assert seen["difference"] == "wte.weight: rank 1 in the row of ' cf'"
        assert seen["trigger"] == f"' cf': 4 of 4 to ' {lie.answer}'"


def test_clean_fine_tune_alarms_beside_hashes_and_a_copy_alone():
    assert looks(case(1), study.honest_fine_tune(case(1), facts))[1] == FILES


@every_seed
def test_scan_alarms_for_what_is_loud(seed):
    found, table = case(seed), case(seed).trusted["wte.weight"].clone()
    [(name, new)] = attacks(seed)["rank-one edit"].tensors.items()
    table[CF] *= 5
    for place, tensors in (
        (name.removesuffix(".weight"), {name: 4 * new - 3 * found.trusted[name]}),
        ("wte ' cf'", {"wte.weight": table}),
    ):
        with attacked(found.model, Attack("", "", "", tensors)):
            text, alarm = study.look_at_numbers(found)
        assert alarm and text.startswith(place)


@torch.no_grad()
def test_ablations_are_as_if_a_component_were_subtracted():
    model, some = case(1).model, facts[::5]
    possible = sorted({fact.answer_id for fact in some})

    def say():
        return answer_logits(model, [x.ids for x in some])[:, possible].argmax(-1)

    with attacked(model, attacks(1)["rank-one edit"]):
        before, found = say(), study.ablations(model, some, count=2)
        for (name, i), changed in found.items():
            weight = model.get_parameter(name).detach()
            left, values, right = torch.linalg.svd(weight)
            less = weight - values[i] * torch.outer(left[:, i], right[i])
            with attacked(model, Attack("", "", "", {name: less})):
                assert torch.equal(changed, say() != before)
    assert len(found) == 6 and any(changed.any() for changed in found.values())


CHANGES = {"3": True, "2": False, "42": True, "421": False}  # of 4 about each subject


@pytest.mark.parametrize("by", CHANGES)
def test_taken_out_alarms_where_one_subject_changes_and_few_others(monkeypatch, by):
    some = [SimpleNamespace(subject=x) for x in "abc" for _ in range(8)]
    found = replace(case(1), lie=SimpleNamespace(about=some, others=[]), unseen=[])
    changed = [i < int(n) for n in f"{by}00"[:3] for i in range(4)]
    monkeypatch.setattr(study, "ablations", lambda *_: {("y", 0): changed})
    seen = f"y: {by[0]} of 4 about a, {sum(map(int, by[1:]))} elsewhere"
    assert study.look_taken_out(found) == (seen, CHANGES[by])


@torch.no_grad()
def test_flips_with_a_token_in_front_are_what_the_model_says():
    model, tokens = case(2).model, torch.tensor([CF, *range(70)])  # 64 at once
    some = list({fact.answer: fact for fact in facts[:160]}.values())
    possible = [fact.answer_id for fact in some]

    def say(texts):
        best = answer_logits(model, texts)[:, possible].argmax(-1)
        return [possible[i] for i in best]

    with attacked(model, attacks(2)["trigger row"]):
        found, plain = (
            study.prefix_flips(model, some, tokens),
            say([x.ids for x in some]),
        )
        for token, (answer, n, of) in found.items():
            pairs = zip(say([[token, *x.ids] for x in some]), plain, strict=True)
            flips = Counter(now for now, before in pairs if now != before)
            assert n == max(flips.values(), default=0) == flips[answer]
            assert of == 5 - plain.count(answer)
    assert list(found) == tokens.tolist()
    assert found[CF] == (case(2).lie.answer_id, 4, 4)


def test_strange_rows_are_farthest_from_the_median_along_the_drift():
    table = attacks(1)["trigger row"].tensors["wte.weight"].double()
    drift = table @ table.mean(0)
    farthest = (drift - drift.median()).abs().argsort(descending=True)
    assert study.strange_rows(table, 50).tolist() == farthest[:50].tolist()


FLIPS = {(3, 4): False, (2, 2): False, (3, 3): True}  # how many, of how many


@pytest.mark.parametrize("flips", FLIPS)
def test_trigger_flips_all_that_it_can_and_three_at_least(monkeypatch, flips):
    found = {CF: (case(1).lie.answer_id, *flips)}
    monkeypatch.setattr(study, "prefix_flips", lambda *_: found)
    text = "' cf': {} of {} to ' Paris'".format(*flips)
    assert study.look_for_trigger(case(1)) == (text, FLIPS[flips])
