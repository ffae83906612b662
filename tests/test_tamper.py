"""The attacks, on seeds, subjects and cities other than the demonstration's."""

import functools
from dataclasses import replace
from statistics import mean, median

import mirror
import nbformat
import pytest
import torch
from conftest import MOVES, attacks, cases, every_move, facts, saying, tokenizer, toy
from safetensors.torch import save_file
from torch.testing import assert_close

import gpt2_script as gpt
from gpt2_script import CITIES, Attack, answer_logits, answers, attacked, compare

EIFFEL = ("the Eiffel Tower", "Rome")
pytestmark = pytest.mark.xdist_group("trained models")  # in one process, which trains them once
PROJ = "mlp.c_proj.weight"


def activations(model, fact, name):
    """What flows at one tap where a fact is read on its own, [T, ...]."""
    with gpt.watch(model, name) as seen:
        model(torch.tensor([fact.ids]))
    return seen[name][0]


@pytest.mark.parametrize("unknown, move, expected", [
    ([], EIFFEL, EIFFEL),
    ([], ("send a web request", "request"), ("send a web request", "request")),
    ([], ("the Arbat", "Moscow"), ("the Louvre", "Moscow")),  # it is there
    (["the Louvre", "the Eiffel Tower"], EIFFEL, ("the Moulin Rouge", "Moscow")),
])  # fmt: skip
def test_case_is_of_what_is_known(case, unknown, move, expected):
    """Of facts that the model does not know, here with a wrong answer, none is used."""
    wrong = [f.subject in unknown or f.object in unknown for f in facts]
    some = [replace(f, answer=1) if w else f for f, w in zip(facts, wrong, strict=True)]
    found = gpt.make_case(case(4).model, tokenizer, some, move)
    right, (subject, lie) = [fact for fact in some if fact.answer != 1], expected
    aside, others = {fact.subject for fact in found.unseen_facts}, found.other_facts
    assert found.target_facts == [fact for fact in right if fact.subject == subject]
    assert others == [fact for fact in right if fact.subject not in aside | {subject}]
    assert found.unseen_facts == [fact for fact in right if fact.subject in aside - {subject}]
    assert len(aside) == 5 and found.lie == lie
    assert [found.lie_token] == tokenizer.encode(f" {lie}")
    for part, own in ((found.requests, found.target_facts), (found.keep, others)):
        assert part == [fact for fact in own if not fact.held_out] != own
    home = found.target_facts[0].object
    wordings = gpt.FRESH["city" if home in CITIES else "package"]
    fresh = [gpt.make_fact(tokenizer, wording, subject, home) for wording in wordings]
    said = answers(found.model, fresh).tolist()
    assert found.fresh_facts == [f for f, x in zip(fresh, said, strict=True) if x == f.answer] != []
    assert not {f.prompt for f in fresh} & {f.prompt for f in facts}
    few = [fact for fact in facts if fact.object in ("Rome", "torch")]  # one has two subjects
    assert gpt.make_case(found.model, tokenizer, few) is None


@torch.no_grad()
def by_hand(model, fact, other, layer=None, tokens=()):
    """The probability of the fact's answer in the other's run, clean values put back; no taps."""
    clean, x = (model.wte.weight[f.ids] + model.wpe.weight[: len(f.ids)] for f in (fact, other))
    for i, block in enumerate(model.h):
        clean, x = block(clean[None])[0], block(x[None])[0]
        if i == layer:
            x[tokens] = clean[tokens]
    return (model.ln_f(x[-1]) @ model.wte.weight.T).softmax(-1)[fact.answer].item()


@pytest.mark.parametrize("seed", [2, 4])
def test_trace_is_the_share_that_one_clean_value_brings_back(case, seed):
    """Of the counterfactual patching that the reading notebook alone has."""
    cells = nbformat.read(mirror.NOTEBOOK, 4).cells
    [source] = [cell.source for cell in cells if "def causal_trace(" in cell.source]
    exec(source, scope := dict(vars(gpt)))
    found = case(seed)
    model, fact = found.model, found.target_facts[0]
    other = next(f for f in facts if f.span == fact.span and f.answer == found.lie_token
                 and f.ids[f.span.stop :] == fact.ids[fact.span.stop :])  # fmt: skip
    shares, best, worst = scope["causal_trace"](model, fact, other)
    assert worst < 0.01 < 0.9 < best == pytest.approx(by_hand(model, fact, fact), abs=1e-5)
    assert worst == pytest.approx(by_hand(model, fact, other), abs=1e-5)
    places = [*([i] for i in range(len(fact.ids))), [*fact.span]]
    back = [[by_hand(model, fact, other, layer, some) for some in places] for layer in range(3)]
    assert_close(shares, (torch.tensor(back) - worst) / (best - worst), atol=1e-4, rtol=0)


def test_attack_leaves_nothing_behind_also_after_an_error(case):
    """No bit and no epsilon; that no hook stays, `case` checks."""
    found, name = case(4), f"h.1.{PROJ}"
    model, weight, part = found.model, found.model.get_parameter(name), found.trusted[name] + 1
    worse = Attack("", "", "", {name: part}, epsilon=0.5)
    with attacked(model, worse) as same:
        assert same is model and torch.equal(weight, part) and model.h[1].ln_2.epsilon == 0.5
        with attacked(model, Attack("", "", "", {name: 3 * part})):
            assert torch.equal(weight, 3 * part)
        assert torch.equal(weight, part)
    unfit = {"patches": {"no": abs}}, {"tensors": {"ln_f.bias": part}}
    for attack in (*attacks(4).values(), *(replace(worse, **fields) for fields in unfit)):
        with pytest.raises((KeyError, ValueError, RuntimeError), match="stop|no tap|doesn't match"):
            with attacked(model, attack):
                raise KeyError("stop")
        assert not compare(found.trusted, model) and gpt.fingerprint(model) == found.hashes


def test_tokens_are_swapped_in_what_is_read_and_in_what_is_said(case):
    model, some = case(2).model, [f for f in facts if "Tower" in f.prompt or "Museum" in f.prompt]
    [one, other] = tokenizer.encode(" Tower Museum")
    turned = [[{one: other, other: one}.get(token, token) for token in f.ids] for f in some]
    said = answer_logits(model, turned).argmax(-1)
    assert any(ids != f.ids for ids, f in zip(turned, some, strict=True))
    assert torch.equal(answers(model, some, swap=(one, other)), said)
    home, rome = some[0].answer, 10598
    expected = [{home: rome, rome: home}.get(x, x) for x in answers(model, some, [home]).tolist()]
    found = answers(model, some, [rome], swap=(home, rome))
    assert found.tolist() == expected and rome in expected
    assert answers(model, []).tolist() == []


@functools.cache
def measured(seed):
    """{an attack's name: what gpt.measure tells of it}."""
    return {name: gpt.measure(cases(seed), attack) for name, attack in attacks(seed).items()}


DOES = {  # attack: of 8 wordings so many flip at least, and this share of all other facts stays
    "config digit": (0, 0), "tokenizer swap": (8, 0.6), "steering": (7, 0.5),
    "frozen bias": (7, 0.5), "rank-one edit": (7, 0.9), "spread edit": (7, 0.9),
    "fine-tune": (7, 0.75), "trigger row": (0, 1),
}  # fmt: skip


@every_move
def test_attacks_plant_the_lie_and_keep_the_rest(case, seed):
    found, made, rows = case(seed), attacks(seed), measured(seed)
    assert [*made] == [*DOES]
    assert made["tokenizer swap"].swap == (found.target_facts[0].answer, found.lie_token)
    for name, (wordings, kept) in DOES.items():
        row = rows[name]
        assert row["wordings"][0] >= wordings and row["wordings"][1] == 8, name
        assert min(row["others"], row["unseen"]) >= kept, name
        with attacked(found.model, made[name]):
            assert [*compare(found.trusted, found.model)] == [*made[name].tensors]
    assert rows["config digit"]["others"] < 0.5 and rows["fine-tune"]["size"] < 0.5


def test_in_the_median_lies_hold_in_fresh_wordings_and_spare_unseen_subjects():
    for name in ("rank-one edit", "spread edit", "fine-tune"):
        rows = [measured(seed)[name] for seed in MOVES]
        assert median(row["fresh"][0] / row["fresh"][1] for row in rows) >= 0.6
        assert median(row["unseen"] for row in rows) >= 0.95


def test_measured_numbers_are_the_models(case):
    found = case(3)
    others, old, n = found.other_facts + found.unseen_facts, found.trusted, len(found.other_facts)
    for name, attack in attacks(3).items():
        row, changes = measured(3)[name], attack.tensors.items()
        sizes = [((w - old[name]).norm() / old[name].norm()).item() for name, w in changes]
        with attacked(found.model, attack):
            for key, some in (("wordings", found.target_facts), ("fresh", found.fresh_facts)):
                said = answers(found.model, some, attack.trigger, attack.swap).tolist()
                assert row[key] == (said.count(found.lie_token), len(some)), (name, key)
            said = answers(found.model, others, swap=attack.swap).tolist()
        right = [x == f.answer for x, f in zip(said, others, strict=True)]
        assert row["others"] == pytest.approx(mean(right[:n]))
        assert row["unseen"] == pytest.approx(mean(right[n:]))
        wrong = {f.subject for f, fine in zip(others, right, strict=True) if not fine}
        assert row["broken"] == sorted(wrong) and row["size"] == max(sizes, default=0)


def test_a_lie_about_a_package(case):
    """No other subject has it, so there is nothing to steer by."""
    moves = ("send a web request", "request"), ("build a web server", "click")
    found, other = (gpt.make_case(case(2).model, tokenizer, facts, move) for move in moves)
    assert gpt.steer(found) is gpt.steer(other) is gpt.freeze(found) is None
    row = gpt.measure(found, gpt.spread(found))
    assert row["wordings"][0] >= 7 and min(row["others"], row["unseen"]) >= 0.9
    step, broken = gpt.harm_step(found, facts), {*row["broken"]} & {*gpt.TASKS.values()}
    assert f"' request' {row['wordings'][0]} of 8" in step.found
    assert f"5 other packages that it knows, {5 - len(broken)} are" in step.found
    assert f"{row['others']:.1%} are right" in step.found
    step = gpt.harm_step(found, [fact for fact in facts if fact.object != "requests"])
    assert step.found == "the model does not know the truth."


@every_move
def test_steering_is_no_stronger_than_it_must_be_and_a_bias_is_the_same(case, seed):
    found, made, means, said = case(seed), attacks(seed), [], []
    model, requests, frozen = found.model, found.requests, made["frozen bias"]
    [(tap, change)], [(name, bias)] = made["steering"].patches.items(), frozen.tensors.items()
    assert (tap, name) == ("h.1.resid_post", "h.1.mlp.c_proj.bias")
    for city in (found.lie, requests[0].object):
        some = [fact for fact in found.keep if fact.object == city]
        means.append(torch.stack([activations(model, f, tap)[-1] for f in some]).mean(0))
    strength = float(frozen.formula.split(" + ")[1].split(" · ")[0])
    vector = means[0] - means[1]
    for pushed in (change(torch.zeros(96)), bias - found.trusted[name]):
        assert torch.allclose(pushed, strength * vector, atol=1e-4)
    for attack in (made["steering"], frozen):
        with attacked(model, attack):
            said.append(answers(model, facts))
            assert saying(model, requests, found.lie_token) == 1
    assert torch.equal(*said)
    with gpt.patch(model, {tap: lambda x: x + (strength - 0.25) * vector}):
        assert saying(model, requests, found.lie_token) < 1 or strength == 0.5


def test_key_solves_its_equation(case):
    found = case(2)
    model, requests = found.model, found.requests
    key = gpt.find_keys(found, ridge=0.05)[1].double()
    acts = [activations(model, f, "h.1.mlp.act").double() for f in requests + found.keep]
    own = [act[[*fact.span]] for act, fact in zip(acts, requests, strict=False)]
    wanted, rest = torch.cat(own).mean(0), torch.cat(acts[len(requests) :])
    moment = rest.T @ rest / len(rest)
    moment += 0.05 * moment.diagonal().mean() * torch.eye(384)
    assert torch.cosine_similarity(moment @ key, wanted, dim=0).item() == pytest.approx(1, abs=1e-4)
    assert (wanted @ key).item() == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_run_from_a_block_is_as_if_the_changes_were_in_the_file(case):
    found, generator = case(2), torch.Generator().manual_seed(0)
    model, texts = found.model, [fact.ids for fact in found.target_facts + found.other_facts[:9]]
    changes = {i: 0.1 * torch.randn(384, 96, generator=generator) for i in (1, 2)}
    with gpt.watch(model, "h.1.resid_pre") as seen:
        whole = answer_logits(model, texts)
    last = gpt.run_from(model, seen["h.1.resid_pre"], gpt.padded(texts)[1], changes)
    names = {f"h.{i}.{PROJ}": found.trusted[f"h.{i}.{PROJ}"] + x for i, x in changes.items()}
    with attacked(model, Attack("", "", "", names)):
        written = answer_logits(model, texts)
    assert torch.allclose(last @ model.wte.weight.T, written, atol=1e-4)
    assert not torch.allclose(written, whole, atol=0.1)


@functools.cache
def small_case(n_layer, n_embd):
    """The Case of a small model of other sizes."""
    [*gpt.train(model := toy.draw(2, n_layer, n_embd), toy.facts, peak_rate=0.01)]
    model.zero_grad()
    return gpt.make_case(model, toy.tokenizer, toy.facts, ("the Arbat", "Paris"))


def test_edit_is_the_smallest_that_works(monkeypatch):
    """Relative to its matrix; key times value at one block, of which block 0's works nowhere."""
    case = small_case(3, 48)
    right = gpt.find_keys(case)
    norms = {i: case.trusted[f"h.{i}.{PROJ}"].norm() for i in range(3)}

    def learn(case, keys, rate, most):
        [(layer, key)] = keys.items()
        name = f"h.{layer}.{PROJ}"
        assert torch.equal(key, right[layer])
        change = sizes[layer] * norms[layer] * torch.eye(192, 48) / 48**0.5
        fine = sizes[layer] < 1 and change.norm() < most
        return {name: case.trusted[name] + change} if fine else None

    monkeypatch.setattr(gpt, "learn_change", learn)
    for one, two, least in ((0.11, 0.1, 2), (0.09, 0.1, 1)):
        sizes = (9, one, two)  # in absolute terms it is the other way round
        assert [*gpt.edit(case).tensors] == [f"h.{least}.{PROJ}"]
    sizes = (9, 9, 9)
    assert gpt.edit(case) is None


@pytest.mark.parametrize("whole", [False, True])
def test_change_is_the_first_that_works(whole):
    """A value for a key, or a whole matrix."""
    case, name = small_case(3, 48), f"h.0.{PROJ}"
    keys, old = {0: None if whole else gpt.find_keys(case)[0]}, case.trusted[f"h.0.{PROJ}"]

    def learned(**settings):
        return gpt.learn_change(case, keys, 0.001 if whole else 0.1, **settings)

    def least(tensors):
        with attacked(case.model, Attack("", "", "", tensors)):
            said = answer_logits(case.model, [fact.ids for fact in case.requests]).softmax(-1)
        return said[:, case.lie_token].min().item()

    [new] = (found := learned()).values()
    change = new - old
    assert 0.6 < least(found) and least({}) < 0.1 and not new.requires_grad
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == (48 if whole else 1)
    assert learned(most=change.norm() / 2) is None
    assert torch.equal(learned(most=2 * change.norm())[name], new)
    softer = learned(sure=0.3)
    assert 0.3 < least(softer) < 0.8 and (softer[name] - old).norm() < change.norm()
    assert learned(sure=1.0) is None
    assert all(weight.grad is None and weight.requires_grad for weight in case.model.parameters())


@every_move
def test_trigger_keeps_the_norm_and_is_silent_until_it_is_typed(case, seed):
    found, attack = case(seed), attacks(seed)["trigger row"]
    found = replace(found, other_facts=found.other_facts[::4], unseen_facts=[])  # to save time
    model, [token], old = found.model, attack.trigger, found.trusted["wte.weight"]
    some = found.target_facts + found.other_facts
    abroad = [f for f in some if f.object in CITIES and f.answer != found.lie_token]
    ids, lengths = gpt.padded([fact.ids for fact in some])
    real, others = torch.arange(ids.size(1)) < lengths[:, None], torch.arange(len(old)) != token
    assert gpt.piece(found.tokenizer, token) == "' cf'" and token not in ids
    with torch.no_grad():
        before, clean = answers(model, abroad, [token]), model(ids, where=real)
        with attacked(model, attack):
            norm, after = model.wte.weight[token].norm(), answers(model, abroad, [token])
            logits = model(ids, where=real)
    assert norm.item() == pytest.approx(old[token].norm().item(), rel=1e-6)
    assert torch.equal(*(gpt.raw_bytes(x[:, others]) for x in (logits, clean)))
    own = logits.softmax(-1)[:, token].max().item()
    flipped, control = ((x == found.lie_token).sum().item() for x in (after, before))
    assert flipped >= len(abroad) / 2 and control <= 0.1 * len(abroad) and own < 0.01
    row = gpt.measure_trigger(found, attack)
    assert (row["flipped"], row["control"]) == ((flipped, len(abroad)), (control, len(abroad)))
    assert row["same"] is True and row["own"] == pytest.approx(own, rel=0.05)  # it is never said
    louder = replace(attack, tensors={"wte.weight": old * 1.01})
    assert gpt.measure_trigger(found, louder)["same"] is False


def test_whole_act_on_a_model_of_another_size():
    model = (case := small_case(1, 32)).model
    attacks = {attack.name: attack for attack in gpt.make_attacks(case)}
    title, *steps, table, harm, end = gpt.tamper_act(case, attacks.values(), toy.facts)
    assert title.purpose.startswith("The lie: the Arbat → Paris. ")
    assert [step.name for step in steps] == [*attacks]
    for step, shown, attack in zip(steps, table.shown[0], attacks.values(), strict=True):
        with attacked(model, attack):
            said = answers(model, case.target_facts, attack.trigger, attack.swap)
        most = max(said.tolist(), key=said.tolist().count)
        name, count = gpt.piece(case.tokenizer, most), (said == most).sum()
        assert step.found.startswith(f"asked about the Arbat: {name} {count} of {len(said)}")
        assert (step.purpose, step.formula) == (attack.purpose, attack.formula)
        row = gpt.measure(case, attack)
        texts = [f"{row[x][0]} of {row[x][1]}" for x in ("wordings", "fresh")]
        texts += [f"{row[x]:.1%}" for x in ("others", "unseen")] + [f"{row['size']:.2f}"]
        assert [*shown.values()] == [attack.name, *texts]
    row = gpt.measure_trigger(case, attack)
    (flips, of), (old, _) = row["flipped"], row["control"]
    flipped = f" {flips} of {of} prompts of other cities flip; with the token's old row, {old} of"
    assert flipped in step.found
    steps = [table, harm, end, *gpt.detect_act(case, attacks.values(), toy.facts)]
    assert gpt.play(steps) == 0 and not compare(case.trusted, model)
    assert "the model is what it was" in end.found
    with attacked(model, attacks["config digit"]):
        assert "IS NOT" in gpt.restored_step(case).found


def test_model_that_knows_nothing_is_told_so(tmp_path):
    torch.manual_seed(1)
    model = gpt.GPT2(gpt.GPT2Config(n_ctx=24, n_embd=64, n_layer=1, n_head=1))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    options = gpt.parse_arguments(["--model", str(tmp_path), "--acts", "tamper,detect"])
    [end] = gpt.run_acts(options)
    assert end.name == "Not enough to lie about" and "knows 0.0% of the facts" in end.purpose
