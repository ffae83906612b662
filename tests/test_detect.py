"""What was changed is found, measured and undone; what hides is known to hide."""

from statistics import median

import pytest
import torch
from conftest import MOST, MOVES, changed, every_move, saying, three_moves, writing
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gpt2_script as gpt
from gpt2_script import Attack, GPT2Config, attacked, compare, fingerprint, suspects

SMALL = gpt.GPT2(GPT2Config(vocab_size=40, n_ctx=6, n_embd=8, n_layer=2, n_head=2)).eval()
BITS = {name: tensor.view(torch.int32) for name, tensor in SMALL.state_dict().items()}
BITS["h.1.mlp.c_fc.bias"][2] = 0x7FC00001  # NaN, of which there are many
PLACES = st.sampled_from(sorted(BITS)).flatmap(
    lambda name: st.tuples(st.just(name), st.integers(0, BITS[name].numel() - 1))
)


@settings(max_examples=200)
@given(PLACES, st.integers(0, 31))
@example(("h.0.attn.c_attn.bias", 3), 31)  # 0 becomes -0
@example(("h.1.mlp.c_fc.bias", 2), 0)  # NaN becomes another one
@example(("wte.weight", 319), 30)
def test_any_flipped_bit_is_found(where, bit):
    (name, place), before = where, fingerprint(SMALL)
    trusted = {name: tensor.clone() for name, tensor in SMALL.state_dict().items()}
    number = BITS[name].flatten()[place : place + 1]  # a view
    number ^= torch.tensor([1 << bit], dtype=torch.int64).to(torch.int32)
    after, found = fingerprint(SMALL), list(compare(trusted, SMALL))
    number ^= torch.tensor([1 << bit], dtype=torch.int64).to(torch.int32)
    assert [n for n in before if after[n] != before[n]] == found == [name]
    assert fingerprint(SMALL) == before and list(before) == list(BITS)
    assert compare(trusted, SMALL) == {}


def test_same_bits_means_type_shape_and_bytes():
    half = torch.tensor([[1.0, -2], [0, 3]], dtype=torch.float16)
    assert gpt.same_bits(half, half.clone()) and gpt.same_bits(half.T.clone().T, half)
    assert not gpt.same_bits(half, half.view(torch.bfloat16))  # the same bytes
    assert not gpt.same_bits(half, half.flatten()) and not gpt.same_bits(half, half.T)
    assert not gpt.same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    nan = torch.tensor([float("nan")])
    assert gpt.same_bits(nan, nan.clone())


def scan(model):
    return suspects(*gpt.tamper_scores(model))


@pytest.mark.parametrize("seed", range(10))
def test_no_alarm_on_an_honest_model(trained, seed):
    torch.manual_seed(seed)
    for sizes in ((50257, 128, 96, 3, 4), (50257, 16, 128, 4, 4), (3000, 9, 24, 2, 1)):
        assert scan(gpt.GPT2(GPT2Config(*sizes)))[0][0] < 1
    score, name, _ = scan(trained(seed))[0]
    assert score < 1, name


def resized(case, attack, size=None):
    """The trigger's row at a norm, or the edit at a size ‖ΔW‖ / ‖W‖; without one, 0.9 at least."""
    [(name, new)] = attack.tensors.items()
    old = case.trusted[name]
    if attack.trigger:
        new, token = new.clone(), attack.trigger[0]
        new[token] *= size / new[token].norm()
    else:
        own = (new - old).norm() / old.norm()
        new = old + (new - old) * (size or max(own, 0.9)) / own
    return Attack(attack.name, "", "", {name: new}, {}, attack.trigger)


@every_move
def test_loud_tampering_is_ranked_first_and_small_hides(case, attacks, seed):
    (model, found), made = case(seed), attacks(seed)
    [name], [token] = made["one matrix"].tensors, made["one row"].trigger
    places = {"one matrix": (name, None), "one row": ("wte.weight", token)}
    loud = {"one matrix": resized(found, made["one matrix"]), "one row": made["one row"]}
    for what, attack in loud.items():
        with attacked(model, attack):
            assert saying(model, found.target_facts, found.answer, attack.trigger) >= MOST
            first, second, *_ = scan(model)
        assert first[1:] == places[what] and first[0] > 1 > second[0]
    with attacked(model, loud["one matrix"]), attacked(model, loud["one row"]):
        found_both = scan(model)
    assert {suspect[1:] for suspect in found_both[:2]} == {*places.values()}
    assert found_both[1][0] > 1 > found_both[2][0]
    for what, size in (("one matrix", 0.2), ("one row", 1.5)):
        with attacked(model, resized(found, made[what], size)):
            assert scan(model)[0][0] < 1


def test_some_tampering_that_works_raises_no_alarm(case, attacks):
    hidden, flipped = [], []
    for seed in MOVES:
        (model, found), made = case(seed), attacks(seed)
        with attacked(model, made["one matrix"], 0.5):
            works = saying(model, found.target_facts, found.answer) >= MOST
            hidden.append(works and scan(model)[0][0] < 1)
        abroad = [f for f in found.other_facts if f.answer != found.answer]
        with attacked(model, small := resized(found, made["one row"], 1.5)):
            flipped.append(saying(model, abroad, found.answer, small.trigger))
    assert sum(hidden) >= 2 and median(flipped) > 0.5


def test_scores_follow_their_definition(trained):
    model = trained(7)
    rows, odd = gpt.tamper_scores(model)
    norms = model.wte.weight.detach().norm(dim=1)
    apart = (norms - norms.sort().values[len(norms) // 2]).abs()
    expected = apart / (1.4826 * apart.sort().values[len(norms) // 2]) / 6
    assert torch.allclose(rows, expected, rtol=1e-4, atol=1e-6) and len(odd) == 12
    sigmas = [torch.linalg.svdvals(block.mlp.c_fc.weight.detach()) for block in model.h]
    ratios = [(s[0] / s[1]).item() for s in sigmas]
    for i in range(3):
        score = ratios[i] / max(ratios[:i] + ratios[i + 1 :]) / 1.6
        assert odd[f"h.{i}.mlp.c_fc.weight"] == pytest.approx(score, rel=1e-4)
    found = suspects(rows, odd, 8)
    scores = sorted([*odd.values(), *rows.topk(8).values.tolist()], reverse=True)[:8]
    assert [score for score, _, _ in found] == scores and scores[0] < 1
    for score, name, row in found:
        assert score == (odd[name] if row is None else rows[row].item())


def test_matrices_are_compared_with_the_same_matrix_in_other_blocks():
    ratios = {"h.0.attn.c_proj.weight": 4.0, "h.1.attn.c_proj.weight": 2.0}
    ratios |= {"h.10.attn.c_proj.weight": 1.0, "h.0.mlp.c_proj.weight": 50.0}
    norms = torch.tensor([1.0, 2, 3, 4, 9])
    rows, odd = gpt.oddity(norms, ratios, row_alarm=2, spike_alarm=4)
    assert list(odd.values()) == [4 / 2 / 4, 2 / 4 / 4, 1 / 4 / 4, 50 / 4]
    assert rows.tolist() == pytest.approx([x / 1.4826 / 2 for x in (2, 1, 0, 1, 6)])
    assert gpt.spike(torch.diag(torch.tensor([6.0, 1, 4]))) == pytest.approx(1.5)


def test_without_spike_takes_the_whole_top_component():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 4, generator=generator)).Q for n in (30, 9))
    parts = [x * torch.outer(left[:, i], right[:, i]) for i, x in enumerate((8.0, 2, 1, 0.5))]
    assert torch.allclose(gpt.without_spike(sum(parts)), sum(parts[1:]), atol=1e-5)


@every_move
def test_without_its_top_component_the_matrix_answers_as_before(case, attacks, seed):
    (model, found), attack = case(seed), attacks(seed)["one matrix"]
    with attacked(model, attack):
        [name] = attack.tensors
        undone = writing(name, gpt.without_spike(model.get_parameter(name)))
        with attacked(model, undone):
            home = found.target_facts[0].answer
            assert saying(model, found.target_facts, home) >= MOST
            assert gpt.accuracy(model, found.other_facts) >= 0.93


def expected(case, tokenizer):
    """What each test should see of the Case's model as it is now: {test: (rows, verdict)}."""
    model, trusted, target = case.model, case.trusted, case.target_facts
    differs, suspected, home = [], [], target[0].answer
    for name in changed(model, trusted):
        change = model.get_parameter(name).detach() - trusted[name]
        rows = change.any(1).nonzero().flatten().tolist()
        where = gpt.piece(tokenizer, rows[0]) if len(rows) == 1 else f"{len(rows)} rows"
        rank = (torch.linalg.svdvals(change) > 1e-4 * change.norm()).sum().item()
        differs.append({"differs in": name, "rank": rank, "where": where})
    for score, name, row in scan(model)[:2]:
        token = "" if row is None else f" {gpt.piece(tokenizer, row)}"
        suspected.append({"suspect": name.removesuffix(".weight") + token, "score": score})
    odd = gpt.tamper_scores(model)[1]
    name = max(odd, key=odd.get)
    right = [saying(model, target, home)]
    undone = writing(name, gpt.without_spike(model.get_parameter(name)))
    with attacked(model, undone):
        right.append(saying(model, target, home))
    right, back = (f"{8 * share:.0f} of 8" for share in right)
    everything = f"{gpt.accuracy(model, target + case.other_facts):.1%}"
    nothing = [{"differs in": "no tensor", "rank": "", "where": ""}]
    return {
        "trusted copy": (differs or nothing, "differs" if differs else "the same"),
        "scan": (suspected, "ALARM" if suspected[0]["score"] > 1 else "quiet"),
        "taken out": ([{"taken out of": name.removesuffix(".weight"), "right": back}], back),
        "asking": ([{"all facts": everything, "the target's": right}], right),
    }


@three_moves
def test_tables_tell_what_each_test_sees_of_each_attack(case, attacks, tokenizer, seed):
    (model, found), made = case(seed), attacks(seed)
    [title, *steps, summary, end] = gpt.detect_act(found, made.values())
    assert not changed(model, found.trusted) and "is what it was" in end.found
    runs = {"untampered": (Attack("", "", ""), 1)} | {name: (x, 1) for name, x in made.items()}
    runs |= {f"half of {name}": (made[name], 0.5) for name in ("one matrix", "one row")}
    tables, verdicts, seen = {step.name: [] for step in steps}, [], {}
    for label, (attack, strength) in runs.items():
        with attacked(model, attack, strength):
            said = saying(model, found.target_facts, found.answer, attack.trigger)
            seen[label] = expected(found, tokenizer)
        verdicts.append({"tampered with": label, "flipped": f"{8 * said:.0f} of 8"})
        for name, (rows, verdict) in seen[label].items():
            tables[name] += [{"tampered with": "" if i else label} | x for i, x in enumerate(rows)]
            verdicts[-1][name] = verdict
    assert tables == {step.name: step.shown[0] for step in steps} and [verdicts] == summary.shown
    assert "OWASP" in title.purpose and "no proof" in summary.found
    # what tells the attacks apart
    assert seen["one activation"]["trusted copy"] == seen["untampered"]["trusted copy"]
    assert seen["one activation"]["scan"] == seen["untampered"]["scan"]
    [edit], [row] = (seen[name]["trusted copy"][0] for name in ("one matrix", "one row"))
    assert edit["differs in"] in made["one matrix"].tensors and edit["rank"] == 1
    assert int(edit["where"].removesuffix(" rows")) > 300
    assert row == {"differs in": "wte.weight", "rank": 1, "where": "' cf'"}
    assert int(seen["one matrix"]["taken out"][1][0]) >= 7
