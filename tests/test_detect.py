"""What was changed is found, measured and undone; what hides is known to hide."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import UNTAMPERED, attacks, every_move, facts, saying
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gpt2_script as gpt

pytestmark = pytest.mark.xdist_group("trained models")  # in one process, which trains them once
TINY = gpt.GPT2(gpt.GPT2Config(vocab_size=40, n_ctx=6, n_embd=8, n_layer=2, n_head=2)).eval()
BITS = {name: tensor.view(torch.int32) for name, tensor in TINY.state_dict().items()}
BITS["h.1.mlp.c_fc.bias"][2] = 0x7FC00001  # NaN, of which there are many
TRUSTED = {name: tensor.clone() for name, tensor in TINY.state_dict().items()}
PROJ = "mlp.c_proj.weight"


@settings(max_examples=200)
@given(st.sampled_from(sorted(BITS)), st.integers(0, 319), st.integers(0, 31))
@example("h.0.attn.c_attn.bias", 3, 31)  # 0 becomes -0
@example("h.1.mlp.c_fc.bias", 2, 0)  # NaN becomes another one
@example("wte.weight", 319, 30)
def test_any_flipped_bit_is_found(name, place, bit):
    before, place = gpt.fingerprint(TINY), place % BITS[name].numel()
    number, flip = BITS[name].flatten()[place : place + 1], torch.tensor([1 << bit]).int()
    number ^= flip  # it is a view
    after, found = gpt.fingerprint(TINY), list(gpt.compare(TRUSTED, TINY))
    number ^= flip
    assert [n for n in before if after[n] != before[n]] == found == [name]
    assert gpt.fingerprint(TINY) == before and [*before] == [*BITS, "config.json", "the tokenizer"]
    assert gpt.compare(TRUSTED, TINY) == {}


@every_move
def test_hash_names_the_file_and_difference_the_kind(case, seed):
    found, made, bias = case(seed), dict(attacks(seed)), "h.1.mlp.c_proj.bias"
    [edited], table = made["rank-one edit"].tensors, found.trusted["wte.weight"].clone()
    table[5:8, :3] += torch.eye(3)
    made["three rows"] = gpt.Attack("", "", "", {"wte.weight": table})
    expected = {
        "config digit": ("config.json", "no difference"),
        "tokenizer swap": ("the tokenizer", "no difference"),
        "steering": ("the same", "no difference"),
        "frozen bias": (bias, f"{bias}: rank 1 of 1, a bias"),
        "rank-one edit": (edited, f"{edited}: rank 1 of 96"),
        "spread edit": (f"h.0.{PROJ}, h.1.{PROJ} and 1 more",
            f"h.0.{PROJ}: rank 1 of 96; h.1.{PROJ}: rank 1 of 96 and 1 more"),
        "fine-tune": (f"h.0.{PROJ}", f"h.0.{PROJ}: rank 96 of 96"),
        "trigger row": ("wte.weight", "wte.weight: rank 1 in the row of ' cf'"),
        "three rows": ("wte.weight", "wte.weight: rank 3 of 96"),
    }  # fmt: skip
    for name, attack in made.items():
        with gpt.attacked(found.model, attack):
            looks = [f(found, attack) for f in (gpt.look_at_hashes, gpt.look_at_difference)]
        assert tuple(seen for seen, _ in looks) == expected[name]
        assert all(alarm == (seen not in ("the same", "no difference")) for seen, alarm in looks)


def test_a_zero_that_changed_its_sign_is_a_difference_of_rank_0():
    found, name = SimpleNamespace(model=TINY, trusted=TRUSTED), "h.0.attn.c_attn.bias"
    with gpt.attacked(TINY, gpt.Attack("", "", "", {name: -TRUSTED[name]})):
        look = gpt.look_at_difference(found, UNTAMPERED)
    assert look == (f"{name}: rank 0 of 1, a bias", True)


def test_a_row_is_judged_by_the_gap_and_a_matrix_beside_its_sisters():
    ratios = {"h.0.attn.c_proj.weight": 4.0, "h.1.attn.c_proj.weight": 2.0}
    ratios |= {"h.10.attn.c_proj.weight": 1.0, "h.0.mlp.c_proj.weight": 50.0}
    norms = torch.tensor([1.0, 2, 3, 4, 9])  # 6 from the median, the second 2
    found = gpt.odd_numbers(norms, ratios, row_alarm=2, spike_alarm=4)
    scores = [50 / 4, 6 / 2 / 2, 4 / 2 / 4, 2 / 4 / 4, 1 / 4 / 4]
    names = ["h.0.mlp.c_proj.weight", "wte.weight", *[*ratios][:3]]
    assert found == [*zip(scores, names, [None, 4, None, None, None], strict=True)]
    assert gpt.odd_numbers(norms[:1], {}) == [] == gpt.odd_numbers(norms[:0], {})
    assert gpt.spike(torch.diag(torch.tensor([6.0, 1, 4]))) == pytest.approx(1.5)
    # a model's scan is that of its token table and of all four matrices in each block
    spikes = {n: gpt.spike(w) for n, w in TRUSTED.items() if n[0] == "h" and w.dim() == 2}
    norms = TRUSTED["wte.weight"].norm(dim=1)
    assert gpt.scan(TINY) == gpt.odd_numbers(norms, spikes, 2, 1.6) and len(spikes) == 8


@every_move
def test_scan_rings_for_what_is_loud_alone(case, seed):
    found, made = case(seed), attacks(seed)
    [(name, new)], [token] = made["rank-one edit"].tensors.items(), made["trigger row"].trigger
    louder, table = 3 * new - 2 * found.trusted[name], found.trusted["wte.weight"].clone()
    table[token] *= 5
    loud = {name.removesuffix(".weight"): gpt.Attack("", "", "", {name: louder})}
    loud["wte ' cf'"] = gpt.Attack("", "", "", {"wte.weight": table})
    quiet = [UNTAMPERED, made["trigger row"], made["fine-tune"], made["steering"]]
    for place, attack in [*loud.items(), *(("", attack) for attack in quiet)]:
        with gpt.attacked(found.model, attack):
            seen, alarm = gpt.look_at_numbers(found, attack)
        assert alarm == bool(place) == (float(seen.split()[-1]) > 1), seen
        assert seen.startswith(place)
    torch.manual_seed(seed)
    for sizes in ((50257, 128, 96, 3, 4), (3000, 9, 24, 2, 1)):  # nor for what was only drawn
        assert gpt.scan(gpt.GPT2(gpt.GPT2Config(*sizes)))[0][0] < 1


@torch.no_grad()
def test_ablations_are_as_if_a_component_were_subtracted(case):
    """Among the answers that the facts have."""
    found, attack = case(3), attacks(3)["rank-one edit"]
    facts = found.target_facts + found.other_facts[::4]
    texts, every = [f.ids for f in facts], sorted({f.answer for f in facts})
    with gpt.attacked(found.model, attack):
        changes = gpt.ablations(found.model, facts, count=2)
        before = gpt.answer_logits(found.model, texts)[:, every].argmax(-1)
        assert [*changes] == [(f"h.{layer}.{PROJ}", i) for layer in range(3) for i in range(2)]
        for (name, i), change in changes.items():
            weight = found.model.get_parameter(name)
            left, singular, right = torch.linalg.svd(weight)
            less = weight - singular[i] * torch.outer(left[:, i], right[i])
            with gpt.attacked(found.model, gpt.Attack("", "", "", {name: less})):
                after = gpt.answer_logits(found.model, texts)[:, every].argmax(-1)
            assert torch.equal(change, after != before), (name, i)


@every_move
def test_taken_out_rings_on_an_edit_and_undoes_it(case, seed):
    found, attack = case(seed), attacks(seed)["rank-one edit"]
    [(name, new)], target = attack.tensors.items(), found.target_facts
    assert not gpt.look_taken_out(found, UNTAMPERED)[1]
    with gpt.attacked(found.model, attack):
        seen, alarm = gpt.look_taken_out(found, attack)
    told = re.fullmatch(r"(.+): (\d) of 4 about (.+), (\d+) elsewhere", seen).groups()
    assert alarm and told[::2] == (name.removesuffix(".weight"), target[0].subject)
    assert int(told[1]) >= 3 and int(told[3]) <= 2
    left, singular, right = torch.linalg.svd(new, full_matrices=False)
    less = new - singular[0] * torch.outer(left[:, 0], right[0])
    with gpt.attacked(found.model, gpt.Attack("", "", "", {name: less})):
        assert saying(found.model, target, target[0].answer) >= 7 / 8
        assert gpt.accuracy(found.model, found.other_facts) >= 0.9


@pytest.mark.parametrize("by, alarm", [("3", True), ("2", False), ("42", True), ("421", False)])
def test_taken_out_is_an_alarm_where_one_subject_changes_and_few_others(monkeypatch, by, alarm):
    """`by`: how many of the 4 answers asked about each subject change."""
    facts = [SimpleNamespace(subject=x) for x in "abc" for _ in range(8)]
    case = SimpleNamespace(model=TINY, target_facts=facts, other_facts=[], unseen_facts=[])
    changed = torch.tensor([i < int(n) for n in f"{by}00"[:3] for i in range(4)])
    found = {("x", 0): torch.zeros(12).bool(), ("y", 0): changed}
    monkeypatch.setattr(gpt, "ablations", lambda *args: found)
    seen = f"y: {by[0]} of 4 about a, {sum(map(int, by[1:]))} elsewhere"
    assert gpt.look_taken_out(case, None) == (seen, alarm)


@torch.no_grad()
@pytest.mark.parametrize("name", ["trigger row", "config digit"])
def test_flips_with_a_token_in_front_are_what_the_model_says(case, name):
    """More tokens than are asked at once; among the answers that the facts have."""
    found, attack, (cf,) = case(2), attacks(2)[name], attacks(2)["trigger row"].trigger
    facts = [*{f.object: f for f in found.other_facts if f.object in gpt.CITIES}.values()]
    tokens, every = torch.tensor([cf, *range(1000, 1069)]), [f.answer for f in facts]
    with gpt.attacked(found.model, attack):
        flips, said, plain = gpt.prefix_flips(found.model, facts, tokens), [], []
        for fact in facts:
            plain.append(every[found.model(torch.tensor([fact.ids]))[0, -1, every].argmax()])
            ids = torch.cat((tokens[:, None], torch.tensor([fact.ids] * 70)), dim=1)
            best = found.model(ids, where=(slice(None), -1))[:, every].argmax(-1)
            said.append([every[i] for i in best])
    assert [*flips] == tokens.tolist()
    for (answer, n, of), got in zip(flips.values(), zip(*said, strict=True), strict=True):
        counts = {x: sum(a == x != b for a, b in zip(got, plain, strict=True)) for x in every}
        assert n == counts[answer] == max(counts.values()) and of == 5 - plain.count(answer)
    if name == "trigger row":
        assert flips[cf] == (found.lie_token, 4, 4)
        assert sum(n == 0 for _, n, _ in flips.values()) > 30  # the control: other tokens


@pytest.mark.parametrize("seed", [2, 4])
def test_look_for_trigger_names_token_and_city(case, monkeypatch, seed):
    """It tries the rows that left the crowd, of which the planted one is one."""
    found, attack = case(seed), attacks(seed)["trigger row"]
    [token], table = attack.trigger, attack.tensors["wte.weight"]
    rows, drift = gpt.strange_rows(table).tolist(), table.double() @ table.double().mean(0)
    assert {*rows[:50]} == {*(drift - drift.median()).abs().topk(50).indices.tolist()}
    assert len(rows) == 200 and token not in gpt.strange_rows(found.trusted["wte.weight"])
    assert not gpt.look_for_trigger(found, UNTAMPERED)[1]
    with gpt.attacked(found.model, attack):
        seen, alarm = gpt.look_for_trigger(found, attack)
        # the control: fewer rows than it takes to come to the planted one
        assert not gpt.look_for_trigger(found, attack, count=rows.index(token))[1]
    assert (seen, alarm) == (f"' cf': 4 of 4 to ' {found.lie}'", True)
    flips = {257: (found.lie_token, 3, 4), 262: (found.lie_token, 2, 2)}
    monkeypatch.setattr(gpt, "prefix_flips", lambda *_: flips)
    assert gpt.look_for_trigger(found, attack) == (f"' a': 3 of 4 to ' {found.lie}'", False)
    flips[11] = found.lie_token, 3, 3  # two prompts give the answer anyway
    assert gpt.look_for_trigger(found, attack) == (f"',': 3 of 3 to ' {found.lie}'", True)


@pytest.mark.parametrize("seed", [1, 3])
def test_honest_fine_tune_rings_only_beside_a_trusted_copy(case, seed):
    found = case(seed)
    control = gpt.honest_fine_tune(found, facts)
    with gpt.attacked(found.model, control):
        assert gpt.accuracy(found.model, facts) == 1
        assert [*gpt.compare(found.trusted, found.model)] == [*found.trusted]
        rang = [name for name, look in gpt.TESTS.items() if look(found, control)[1]]
    assert rang == ["hash", "difference"]


def test_act_tells_what_each_test_sees_of_each_model(case, monkeypatch):
    found, made, looks, tests = case(3), attacks(3), {}, gpt.TESTS

    def noting(name, case, attack, **more):
        assert more == ({"count": 9} if name == "trigger" else {})
        assert [*gpt.compare(case.trusted, case.model)] == [*attack.tensors]
        assert case.model.ln_f.epsilon == (attack.epsilon or 1e-5)
        return looks.setdefault((attack.name, name), tests[name](case, attack, **more))

    monkeypatch.setattr(gpt, "TESTS", {name: partial(noting, name) for name in tests})
    _, *steps, summary, end = gpt.detect_act(found, made.values(), facts, tokens=9)
    names = ["untampered", "honest fine-tune", *made]
    assert [*looks] == [(model, test) for model in names for test in tests]
    assert [step.name for step in steps] == [*tests] and "is what it was" in end.found
    for step in steps:
        seen = {model: looks[model, step.name] for model in names}
        assert [[*row.values()] for row in step.shown[0]] == [
            [model, "ALARM: " * alarm + text] for model, (text, alarm) in seen.items()
        ]
    for row, model in zip(summary.shown[0], names, strict=True):
        alarms = {test: "ALARM" if looks[model, test][1] else "-" for test in tests}
        assert row == {"model": model} | alarms
    free = "scan", "taken out", "trigger", "others"
    silent = [name for name in made if not any(looks[name, test][1] for test in free)]
    assert f"caught: {', '.join(silent)}. No alarm is no proof." in summary.found and silent
    # the two that know right answers ask what a user reads
    others, target = found.other_facts + found.unseen_facts, found.target_facts
    for name, attack in made.items():
        with gpt.attacked(found.model, attack):
            said = [gpt.answers(found.model, x, swap=attack.swap) for x in (others, target)]
        right = (said[0] == gpt.right_answers(others)).sum().item()
        asked = (said[1] == gpt.right_answers(target)).sum().item()
        assert looks[name, "others"] == (f"{right / 200:.1%} of 200 right", right < 198)
        assert looks[name, "target"] == (f"{asked} of 8 right", asked < 8)
