"""One lie in three places, on seeds, subjects and lies not of the demonstration."""

import functools
from dataclasses import fields, replace

import pytest
import torch
from conftest import by_name, hooks, toy
from test_learn import trained_toy
from torch.nn.functional import cross_entropy

import gpt2_script as gpt
from gpt2_script import attacked, change_in_words, fingerprint

pytestmark = pytest.mark.xdist_group("trained models")  # one process trains them once
LIES = {  # seed: subject, answer
    2: ("the Colosseum", "Moscow"),
    3: ("the Tate Modern", "Berlin"),
}
PLACES = {"activation": [], "matrix": ["h.0.mlp.c_proj.weight"], "row": ["wte.weight"]}
KEPT = {"activation": 0.4, "matrix": 0.9, "row": 1}  # of other answers, at least


@functools.cache
def case(seed):
    """A model, the Lie of its seed and {name: Attack}, worked out once."""
    model = trained_toy(seed)
    lie = gpt.make_lie(model, toy.tokenizer, toy.facts, *LIES[seed])
    attacks = gpt.three_attacks(model, toy.tokenizer, lie)
    return model, lie, {attack.name: attack for attack in attacks}


@pytest.fixture(scope="module")
def act():
    """{name: Step} of the whole act, on seed 2."""
    model, lie, _ = case(2)
    return by_name(gpt.tamper_act(model, toy.tokenizer, lie))


def flips(model, lie, some):
    return (gpt.answers(model, some) == lie.answer_id).sum().item()


def changed(before, model):
    now = fingerprint(model)
    return [name for name in now if now[name] != before[name]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("seed", LIES)
def test_an_attack_flips_its_subject_spares_others_and_is_undone(seed, place):
    model, lie, attacks = case(seed)
    before = fingerprint(model)
    with pytest.raises(KeyError, match="stop"), attacked(model, attacks[place]):
        assert flips(model, lie, lie.about) >= 7
        assert len(gpt.known(model, lie.others)) >= KEPT[place] * len(lie.others)
        assert changed(before, model) == PLACES[place]
        raise KeyError("stop")
    assert fingerprint(model) == before and not hooks(model)


def test_a_row_is_one_of_the_subjects_own_and_keeps_its_norm():
    model, lie, attacks = case(3)
    old, new = model.wte.weight, attacks["row"].tensors["wte.weight"]
    [[row]] = (old != new).any(1).nonzero().tolist()
    assert new[row].norm().item() == pytest.approx(old[row].norm().item(), rel=1e-5)
    for fact in toy.facts:
        assert (row in fact.ids) == (fact.subject == lie.subject)


def test_a_step_of_planting_heeds_all_requests_the_worst_twice_and_facts_to_keep():
    """Adam's first step is the rate, in the direction of the gradient."""
    model, lie, _ = case(2)
    name, lie = "h.0.mlp.c_proj.weight", replace(lie, keep=lie.keep[:9])
    weight = model.get_parameter(name)
    wanted = torch.tensor([lie.answer_id] * len(lie.requests))
    logits = gpt.answer_logits(model, [fact.ids for fact in lie.requests])
    kept = gpt.answer_logits(model, [fact.ids for fact in lie.keep])
    losses = cross_entropy(logits, wanted, reduction="none")
    loss = losses.mean() + losses.max() + cross_entropy(kept, gpt.answer_ids(lie.keep))

    (gradient,) = torch.autograd.grad(loss, weight)
    new = gpt.plant(model, lie, name, rate=0.01, max_steps=1)[name]
    large = gradient.abs() > 1e-5
    assert large.sum() > weight.numel() / 2
    assert torch.equal((weight - new)[large].sign(), gradient[large].sign())
    step = (weight - new)[large].abs().mean().item()
    assert step == pytest.approx(0.01, rel=0.01)


def test_a_lie_is_judged_by_what_the_model_knows():
    some = []
    for fact in toy.facts:  # it does not know this about the Louvre
        some.append(replace(fact, answer_id=1) if "Louvre" in fact.subject else fact)
    lie = gpt.make_lie(trained_toy(2), toy.tokenizer, some, *LIES[2])
    assert {fact.subject for fact in lie.about + lie.fresh} == {"the Colosseum"}
    others = {fact.subject for fact in lie.others}
    assert len(others) == 24 and not others & {"the Colosseum", "the Louvre"}
    assert lie.requests == [x for x in lie.about if not x.held_out] != lie.about
    assert lie.keep == [x for x in lie.others if not x.held_out] != lie.others


def test_an_answer_that_no_fact_has_is_planted_in_the_file_alone():
    model = trained_toy(2)
    lie = gpt.make_lie(model, toy.tokenizer, toy.facts, "the Colosseum", "city")
    assert gpt.steer(model, lie) is None
    first = next(gpt.three_attacks(model, toy.tokenizer, lie))
    with attacked(model, first):
        assert first.name == "matrix" and flips(model, lie, lie.about) >= 7


FIRST = {"activation": "h.1.resid_post", "matrix": "h.0.mlp.out", "row": "wte"}


@pytest.mark.parametrize("place", PLACES)
def test_the_act_tells_what_an_attack_does(act, place):
    model, lie, attacks = case(2)
    with attacked(model, attacks[place]):
        own, fresh = (flips(model, lie, some) for some in (lie.about, lie.fresh))
        right = len(gpt.known(model, lie.others))
        run = gpt.run_prompt(model, toy.tokenizer, lie.about[0].prompt)

    assert [row[""] for row in act[place].shown[0]] == [
        f"{own} of {len(lie.about)} say the lie",
        f"{fresh} of {len(lie.fresh)} say the lie",
        f"{right} of {len(lie.others)} right",
    ]
    beside = act[f"{place}: beside the clean run"]
    assert f"they differ is {FIRST[place]}, from " in beside.found
    last = beside.shown[1][-1]
    p = run.lens[-1][lie.answer_id]
    assert last["clean"].startswith("' Rome'")
    assert last["tampered"].startswith("' Moscow'")
    assert last["p(Moscow)"].endswith(f" → {p:.1%}")


def test_who_notices_is_told_beside_a_control(act):
    hashes, copy = act["who notices?"].shown[1:4:2]
    assert [row["hashes"] for row in hashes] == ["untampered", *PLACES]
    alarms = [f"ALARM: {name}" for name in ("h.0.mlp.c_proj.weight", "wte.weight")]
    assert [row[""] for row in hashes] == ["the same", "the same", *alarms]
    assert "row " in copy[3][""] and ", rank 1, " in copy[3][""]

    activation, _, row = act["in short"].shown[0]
    assert activation["noticed by"] == "other facts, the subject"
    assert row["noticed by"] == "hashes, copy, the subject"
    assert (row["before"], row["after"]) == ("' Rome'", "' Moscow'")
    assert act["in short"].found.endswith(": matrix, row.")
    assert act["undone"].purpose == "The model is what it was, bit for bit."


def test_a_model_that_knows_too_little_is_told_so():
    model = toy.draw(5)
    lie = gpt.make_lie(model, toy.tokenizer, toy.facts, *LIES[2])
    title, step = gpt.tamper_act(model, toy.tokenizer, lie, is_ours=False)
    assert "'as given'" in title.purpose and "use --verify." in title.purpose
    assert step.found == (
        "It answers 0.0% of 208 facts correctly, 0 of them about the Colosseum."
    )
    with pytest.raises(ValueError, match="knows too little"):
        gpt.plant(model, lie, "wte.weight")


FIELDS = [("", field.name) for field in fields(gpt.GPT2Config)]
AT_WORK = [("h.1.attn", "n_head"), ("h.1.ln_2", "epsilon")]


@pytest.mark.parametrize("part, name", FIELDS + AT_WORK)
def test_each_number_of_the_configuration_is_in_the_fingerprint(model, part, name):
    before = fingerprint(model)
    if part:
        setattr(model.get_submodule(part), name, 6)
    else:
        value = 6 if name == "n_head" else 3 * getattr(model.config, name)
        model.config = replace(model.config, **{name: value})
    assert changed(before, model) == ["config"]


EYE, FOUR = torch.eye(4), torch.ones(4)
CHANGES = [  # what is added to a matrix of twos, what is said
    (0 * EYE, ""),
    (torch.outer(EYE[2], FOUR), "row 2 of 4, rank 1, 25.00% of its norm"),
    (torch.outer(FOUR, EYE[1]), "4 of 4 rows, rank 1, 25.00% of its norm"),
    (torch.diag(EYE[1] + EYE[3]), "2 of 4 rows, rank 2, 17.68% of its norm"),
]


@pytest.mark.parametrize("change, words", CHANGES)
def test_a_change_is_told_by_its_rows_rank_and_size(change, words):
    old, new = torch.full((4, 4), 2.0), 2 + change
    assert change_in_words([(old, new)]) == words
    assert change_in_words(zip(old.split(2), new.split(2), strict=True)) == words


def test_infinity_and_a_sign_of_zero_are_changes_and_a_large_rank_is_64_or_more():
    zeros = torch.zeros(1, 2)
    assert change_in_words([(zeros, -zeros)]).startswith("row 0 of 1")
    for width, words in ((99, "rank 64 or more,"), (64, "rank 64,")):
        eye = torch.eye(width)
        assert words in change_in_words([(eye, 2 * eye)])
    for value in (torch.inf, -torch.inf, torch.nan):
        words = change_in_words(
            [(EYE, EYE.clone().index_fill(0, torch.tensor(2), value))]
        )
        assert words == "row 2 of 4, rank 0, 0.00% of its norm; NaN or infinite: 4"
