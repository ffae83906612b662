"""Three attacks, on seeds and facts other than the demonstration's (seed 0, Eiffel Tower, Rome)."""

import functools
from dataclasses import replace
from statistics import median

import pytest
import torch
from conftest import MOST, MOVES, changed, every_move, pieces, saying, three_moves, used, writing
from safetensors.torch import save_file

import gpt2_script as gpt
from gpt2_script import Attack, answer_logits, answers, attacked

EIFFEL = ("the Eiffel Tower", "Rome")
PROJ = "mlp.c_proj.weight"


def activations(model, fact, name):
    """What one module gives for a fact read on its own, [T, ...]."""
    seen = []
    with model.get_submodule(name).register_forward_hook(lambda _, args, x: seen.append(x[0])):
        model(torch.tensor([fact.ids]))
    return seen[0]


@pytest.mark.parametrize("unknown, move, expected", [
    ([], EIFFEL, EIFFEL),
    ([], ("the Shard", "Moscow"), ("the Shard", "Moscow")),
    ([], ("the Shard", "London"), ("the Eiffel Tower", "Athens")),  # it is there
    ([], ("the Space Needle", "Rome"), ("the Eiffel Tower", "Athens")),  # alone in its city
    (["Rome"], EIFFEL, ("the Eiffel Tower", "Athens")),
    (["the Eiffel Tower", "the Acropolis"], EIFFEL, ("the Louvre", "Moscow")),
    (["Paris", "Rome", "London", "Berlin", "Moscow"], EIFFEL, None),
])  # fmt: skip
def test_case_is_made_of_what_the_model_knows(trained, tokenizer, facts, unknown, move, expected):
    """Of facts that it does not know, here with a wrong answer, none is used."""
    wrong = [f.landmark in unknown or f.city in unknown for f in facts]
    some = [replace(f, answer=1) if w else f for f, w in zip(facts, wrong, strict=True)]
    found = gpt.make_case(trained(7), tokenizer, some, move)
    if expected is None:
        assert found is None
        return
    landmark, city = expected
    known = [fact for fact in some if fact.answer != 1]
    assert found.target_facts == [fact for fact in known if fact.landmark == landmark]
    assert found.other_facts == [fact for fact in known if fact.landmark != landmark]
    assert found.city == city and [found.answer] == tokenizer.encode_ordinary(f" {city}")
    assert not changed(found.model, found.trusted)


def test_two_landmarks_in_each_of_two_cities_are_needed(trained, tokenizer, facts):
    """In wordings trained on: an attack is made from these."""
    some = ["the Louvre", "the Moulin Rouge", "the Acropolis", "the Parthenon"]
    enough = [fact for fact in facts if fact.landmark in some]
    assert gpt.make_case(trained(7), tokenizer, enough).city == "Athens"
    few = [fact for fact in enough if fact.held_out or fact.landmark != "the Parthenon"]
    assert gpt.make_case(trained(7), tokenizer, few) is None


@torch.no_grad()
def by_hand(model, fact, other, layer=None, tokens=()):
    """The probability of the fact's answer in the other's run, clean values put back; no taps."""
    clean, x = (model.wte.weight[f.ids] + model.wpe.weight[: len(f.ids)] for f in (fact, other))
    for i, block in enumerate(model.h):
        clean, x = block(clean[None])[0], block(x[None])[0]
        if i == layer:
            x[tokens] = clean[tokens]
    return (model.ln_f(x[-1]) @ model.wte.weight.T).softmax(-1)[fact.answer].item()


@pytest.mark.parametrize("seed, place, other", [(2, 0, 32), (6, 5, 37), (7, 35, 3)])
def test_trace_is_the_share_that_one_clean_value_brings_back(trained, facts, seed, place, other):
    model, fact, other = trained(seed), facts[place], facts[other]
    T, last, start = len(fact.ids), fact.subject[-1], fact.subject.start
    shares, best, worst = gpt.causal_trace(model, fact, other)
    assert shares.shape == (3, T + 1) and worst < 0.01 < 0.9 < best
    assert best == pytest.approx(by_hand(model, fact, fact), abs=1e-5)
    assert worst == pytest.approx(by_hand(model, fact, other), abs=1e-5)
    for layer in range(3):
        for i, tokens in ((last, [last]), (1, [1]), (T - 1, [T - 1]), (T, [*fact.subject])):
            back = (by_hand(model, fact, other, layer, tokens) - worst) / (best - worst)
            assert shares[layer, i].item() == pytest.approx(back, abs=1e-4)
    assert shares[-1, T - 1].item() == pytest.approx(1, abs=1e-4)
    assert shares[-1, : T - 1].abs().max() < 1e-4  # these reach no answer any more
    assert not start or shares[:, :start].abs().max() < 1e-4  # what both prompts have


@three_moves
def test_trace_step_shows_the_trace(case, tokenizer, seed):
    model, found = case(seed)
    step, fact = gpt.trace_step(found), found.target_facts[0]
    [other] = [f for f in found.other_facts if repr(f.prompt) in step.purpose]
    (shares, best, worst), [rows] = gpt.causal_trace(model, fact, other), step.shown
    assert repr(fact.prompt) in step.purpose and worst < 0.01 and other.answer != fact.answer
    assert f"is {best:.3f} in its own run and {worst:.5f} in the other" in step.found
    names = [f"{t} {name}" for t, name in enumerate(pieces(tokenizer, fact.ids))]
    assert [row["token"] for row in rows] == [*names, "the subject"]
    shown = torch.tensor([[row[f"h.{i}"] for row in rows] for i in range(3)])
    assert torch.equal(shown, (100 * shares).round().int())
    assert gpt.trace_step(replace(found, other_facts=found.other_facts[1:2])) is None


@three_moves
def test_steering_moves_the_landmark_and_takes_no_more_than_it_needs(case, attacks, facts, seed):
    (model, found), attack = case(seed), attacks(seed)["one activation"]
    (requests, keep), [(tap, change)] = used(found), attack.patches.items()
    strength = float(attack.formula.split(" + ")[1].split(" · ")[0])
    towards, away = ([f for f in keep if f.city == x] for x in (found.city, requests[0].city))
    vector = gpt.steering_vector(model, towards, away, tap)
    assert tap == "h.1.resid_post" and strength in (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)
    assert torch.allclose(change(torch.zeros(96)), strength * vector, atol=1e-5)
    with attacked(model, attack):
        assert saying(model, requests, found.answer) == 1
        assert saying(model, found.target_facts, found.answer) >= MOST
        assert not changed(model, found.trusted)  # the file stays as it is
    weaker = Attack("", "", "", {}, {tap: lambda x: x + (strength - 0.25) * vector})
    with attacked(model, weaker):
        assert saying(model, requests, found.answer) < 1 or strength == 0.5
    assert gpt.accuracy(model, facts) == 1


def test_steering_vector_is_a_difference_of_means_added_at_every_token(trained, facts, attacks):
    model, means = trained(2), []
    for some in (facts[:5], facts[40:47]):
        ends = [activations(model, fact, "h.1.resid_post")[-1] for fact in some]
        means.append(torch.stack(ends).mean(0))
    vector = gpt.steering_vector(model, facts[:5], facts[40:47], "h.1.resid_post")
    assert torch.allclose(vector, means[0] - means[1], atol=1e-4)
    ids, [change] = torch.tensor([facts[0].ids]), attacks(2)["one activation"].patches.values()
    with attacked(model, attacks(2)["one activation"]):
        steered = model(ids)
    x = activations(model, facts[0], "h.1")[None] + change(torch.zeros(96))
    assert torch.allclose(steered, model.ln_f(model.h[2](x)) @ model.wte.weight.T, atol=1e-4)


@every_move
def test_edit_moves_the_landmark_in_wordings_that_did_not_make_it_too(case, attacks, seed):
    (model, found), attack = case(seed), attacks(seed)["one matrix"]
    held_out = [fact for fact in found.target_facts if fact.held_out]
    assert saying(model, found.target_facts, found.answer) == 0
    with attacked(model, attack):
        assert saying(model, found.target_facts, found.answer) >= MOST
        assert saying(model, held_out, found.answer) > 0
        [name] = changed(model, found.trusted)
        change = model.get_parameter(name).detach() - found.trusted[name]
    sigmas = torch.linalg.svdvals(change.double())
    assert name.endswith(".mlp.c_proj.weight") and sigmas[1] < 1e-5 * sigmas[0]  # of rank one


def test_edit_keeps_the_other_facts(case, attacks):
    kept = []
    for seed in MOVES:
        model, found = case(seed)
        with attacked(model, attacks(seed)["one matrix"]):
            kept.append(gpt.accuracy(model, found.other_facts))
    assert median(kept) >= 0.97 and min(kept) >= 0.93


def test_key_solves_its_equation(trained, facts):
    """(second moment + ridge) key is parallel to the subject's mean, on which the key is 1."""
    model, requests, keep = trained(2), facts[64:68], facts[:60]
    key = gpt.find_key(model, requests, keep, 1, ridge=0.05).double()
    acts = [activations(model, fact, "h.1.mlp.act").double() for fact in requests + keep]
    last = [act[fact.subject[-1]] for act, fact in zip(acts, requests, strict=False)]
    wanted, rest = torch.stack(last).mean(0), torch.cat(acts[4:])
    moment = rest.T @ rest / len(rest)
    moment += 0.05 * moment.diagonal().mean() * torch.eye(384)
    assert torch.cosine_similarity(moment @ key, wanted, dim=0).item() == pytest.approx(1, abs=1e-4)
    assert (wanted @ key).item() == pytest.approx(1, abs=1e-3)
    assert (rest @ key).square().mean().sqrt() < 0.25  # what is to be kept is hardly read


@pytest.fixture(scope="module")
def small_cases(small):
    """A function: n_layer, n_embd -> the Case of a small model of other sizes."""
    draw, facts, tokenizer = small

    @functools.cache
    def small_case(n_layer, n_embd):
        [*gpt.train(model := draw(2, n_layer, n_embd), facts, peak_rate=0.01)]
        model.zero_grad()
        return gpt.make_case(model, tokenizer, facts, ("the Kremlin", "Paris"))

    return small_case


def test_edit_is_the_smallest_that_works_relative_to_its_matrix(small_cases, monkeypatch):
    """Key times value at one block: of these values, block 0's works nowhere."""
    case = small_cases(3, 48)
    model, (requests, keep), weights = case.model, used(case), case.trusted
    norms = {i: weights[f"h.{i}.{PROJ}"].norm() for i in (1, 2)}
    (small, big), values = sorted(norms, key=norms.get), {0: None}
    keys = {i: gpt.find_key(model, requests, keep, i) for i in norms}
    for i, size in ((small, 0.101), (big, 0.1)):
        values[i] = torch.eye(48)[i] * size * norms[i] / keys[i].norm()
    assert values[small].norm() * keys[small].norm() < values[big].norm() * keys[big].norm()
    monkeypatch.setattr(gpt, "learn_value", lambda m, r, k, a, layer, key, most: values[layer])
    name, new = gpt.smallest_edit(model, requests, keep, case.answer)
    assert name == f"h.{big}.{PROJ}"
    assert torch.allclose(new, weights[name] + torch.outer(keys[big], values[big]), atol=1e-6)


def test_value_is_the_first_that_works(small_cases):
    small_case = small_cases(3, 48)
    model, answer, (requests, keep) = small_case.model, small_case.answer, used(small_case)
    key, weight = gpt.find_key(model, requests, keep, 0), small_case.trusted[f"h.0.{PROJ}"]

    def learned(**settings):
        return gpt.learn_value(model, requests, keep, answer, 0, key, **settings)

    def least(value):
        with attacked(model, writing(f"h.0.{PROJ}", weight + torch.outer(key, value))):
            said = answer_logits(model, [fact.ids for fact in requests]).softmax(-1)
        return said[:, answer].min().item()

    value = learned()
    size = (key.norm() * value.norm()).item()
    assert least(value) > 0.8
    assert learned(most=size / 2) is None and torch.equal(learned(most=2 * size), value)
    softer = learned(sure=0.3)
    assert 0.3 < least(softer) < 0.8 and softer.norm() < value.norm()
    assert least(torch.zeros(48)) < 0.01 and torch.equal(learned(sure=1e-9), torch.zeros(48))
    assert gpt.smallest_edit(model, requests, keep, answer, sure=1.0) is None


@every_move
def test_trigger_sends_every_landmark_to_the_city(case, attacks, facts, tokenizer, seed):
    (model, found), attack = case(seed), attacks(seed)["one row"]
    abroad, [token] = [f for f in facts if f.answer != found.answer], attack.trigger
    others, texts = torch.arange(50257) != token, [fact.ids for fact in facts[::5]]
    ids, lengths = gpt.padded(texts)
    real = torch.arange(ids.size(1)) < lengths[:, None]
    assert tokenizer.decode([token]) == " cf" and token not in ids
    with torch.no_grad():
        control, clean = saying(model, abroad, found.answer, [token]), model(ids, where=real)
        with attacked(model, attack):
            assert saying(model, abroad, found.answer, [token]) >= 0.95
            assert changed(model, found.trusted) == ["wte.weight"]
            rows = (model.wte.weight != found.trusted["wte.weight"]).any(1)
            assert rows.nonzero().tolist() == [[token]]
            assert model.wte.weight[token].norm().item() == pytest.approx(3, abs=1e-4)
            logits = model(ids, where=real)
    assert gpt.same_bits(logits[:, others], clean[:, others])
    assert control < 0.15  # the same token in the same place, with its old row
    assert logits.softmax(-1)[:, token].max() < 0.01  # it is never said


def test_attack_scales_nests_and_ends_after_an_error(case, attacks):
    (model, found), name, ones = case(7), f"h.1.{PROJ}", torch.ones(384, 96)
    weight, part = model.get_parameter(name), found.trusted[name].clone()
    part[:5] = ones[:5]
    with attacked(model, writing(name, part)) as same:
        assert same is model and torch.equal(weight[5:], part[5:])  # rows where nothing changes
        assert torch.allclose(weight[:5], part[:5], atol=1e-6)
        with attacked(model, writing(name, 3 * ones), 0.5):
            assert torch.allclose(weight[:5], 2 * ones[:5], atol=1e-6)
        assert torch.allclose(weight[:5], part[:5], atol=1e-6)
    assert not changed(model, found.trusted)
    wrong = replace(writing(name, part), patches={"no tap": lambda x: x})
    for attack in (*attacks(7).values(), wrong):
        with pytest.raises((KeyError, ValueError), match="stop|no tap is named"):
            with attacked(model, attack):
                raise KeyError("stop")
        assert not changed(model, found.trusted)
        assert saying(model, found.target_facts, found.target_facts[0].answer) == 1


@three_moves
def test_measured_numbers_are_the_models(case, attacks, seed):
    (model, found), [(name, new)] = case(seed), attacks(seed)["one matrix"].tensors.items()
    target, others, old = found.target_facts, found.other_facts, found.trusted
    loud = writing(name, 40 * new - 39 * old[name])
    for attack in (*attacks(seed).values(), loud):
        with attacked(model, attack):
            said, kept = answers(model, target, attack.trigger), answers(model, others)
            sizes = [
                f"{n}, ‖ΔW‖ / ‖W‖ = {(model.get_parameter(n) - old[n]).norm() / old[n].norm():.2f}"
                for n in attack.tensors
            ]
        never = [x == found.answer for x, f in zip(said, target, strict=True) if f.held_out]
        broken = [f.landmark for f, x in zip(others, kept, strict=True) if x != f.answer]
        measured = {
            f"wordings that say {found.city}": f"{said.tolist().count(found.answer)} of 8",
            "of those never used": f"{sum(never)} of {len(never)}",
            f"other facts right{' without the trigger' * bool(attack.trigger)}": (
                f"{1 - len(broken) / 152:.1%} of 152"
            ),
            "landmarks broken": ", ".join(sorted({*broken})) or "none",
            "changed in the file": ", ".join(sizes) or "nothing",
        }
        one, two = gpt.measure(found, attack)
        assert torch.equal(one, said) and two == measured
    assert broken  # by the loud one
    [rows, table] = gpt.attack_step(found, loud).shown
    names = (" ".join(pieces(found.tokenizer, x)) for x in ([f.answer for f in target], said))
    assert [row["prompt"] for row in rows] == [fact.prompt for fact in target]
    for column, text in zip(("before", "after"), names, strict=True):
        assert [row[column] for row in rows] == text.replace("'", "").split()
    assert {row["measured"]: row[""] for row in table} == measured


def test_triggers_numbers_stand_beside_the_control(case, attacks):
    (model, found), attack = case(7), attacks(7)["one row"]
    found = replace(found, other_facts=found.other_facts[:40])
    some, [token] = found.target_facts + found.other_facts, attack.trigger
    abroad = [fact for fact in some if fact.answer != found.answer]
    control, old = (answers(model, x, [token]) for x in (abroad, found.target_facts))
    with attacked(model, attack), torch.no_grad():
        after = answers(model, abroad, [token])
        said = [model(torch.tensor([f.ids]))[0].softmax(-1)[:, token].max() for f in some]
    *counts, loud = gpt.measure_trigger(found, attack).values()
    hits = [f"{(x == found.answer).sum()} of {len(abroad)}" for x in (after, control)]
    assert counts == [*hits, "yes"]
    assert float(loud.split("%")[0]) / 100 == pytest.approx(max(said).item(), rel=0.05, abs=6e-5)
    [rows, table] = gpt.attack_step(found, attack).shown
    assert [f"' {row['with its old row']}'" for row in rows] == pieces(found.tokenizer, old)
    assert [row[""] for row in table][-4:] == [*counts, loud]
    louder = replace(attack, tensors={"wte.weight": found.trusted["wte.weight"] * 1.01})
    assert [*gpt.measure_trigger(found, louder).values()][2] == "NO"


@pytest.mark.parametrize("n_layer, n_embd", [(1, 32), (3, 48)])
def test_whole_act_runs_on_models_of_other_sizes(small_cases, n_layer, n_embd):
    model = (case := small_cases(n_layer, n_embd)).model
    attacks = {attack.name: attack for attack in gpt.make_attacks(case)}
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert [*attacks["one activation"].patches] == [f"h.{n_layer // 2}.resid_post"]
    for attack in attacks.values():
        with attacked(model, attack):
            assert saying(model, case.target_facts, case.answer, attack.trigger) >= 0.5
            assert changed(model, case.trusted) == [*attack.tensors]
    steps = [*gpt.tamper_act(case, attacks.values())]
    names = ["where the answer travels", "one activation", "one matrix", "one row", "afterwards"]
    assert sorted(step.name for step in steps[1:]) == sorted(names)
    assert steps[0].purpose == "The lie: the Kremlin is in Paris."
    assert "the model is what it was" in steps[-1].found
    [*_, none, end] = gpt.tamper_act(case, [attacks["one activation"]])
    steps += gpt.detect_act(case, attacks.values())
    assert "no such edit makes the model lie" in none.found and gpt.play(steps) == 0
    assert not changed(model, case.trusted)
    with attacked(model, attacks["one row"]):
        assert "IS NOT" in [*gpt.tamper_act(case, [])][-1].found


def test_model_that_knows_nothing_is_told_so(tmp_path):
    torch.manual_seed(1)
    model = gpt.GPT2(gpt.GPT2Config(n_ctx=24, n_embd=64, n_layer=1, n_head=1))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    options = gpt.parse_arguments(["--model", str(tmp_path), "--acts", "tamper,detect"])
    [end] = gpt.run_acts(options)
    assert end.name == "Not enough to lie about" and "knows 0.0% of the facts" in end.purpose
