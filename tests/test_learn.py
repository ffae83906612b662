"""The small world and how it is learned: facts, not sentences, from names alone."""

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import by_name, facts, toy, toy_training
from torch.nn.functional import cross_entropy

import gpt2_script as gpt

pytestmark = pytest.mark.xdist_group("trained models")  # one process trains them once
CITIES = "Paris", "Rome", "London", "Berlin", "Moscow"
TRAINED_ON = [fact for fact in toy.facts if not fact.held_out]
HELD_OUT = [fact for fact in toy.facts if fact.held_out]


def train(model, some, seed=0, **settings):
    """All that training a toy model yields."""
    with toy_training():
        return list(gpt.train(model, some, seed, **settings))


@functools.cache
def trained_toy(seed):
    """A toy model of nano's shape that knows the world: nano in a fifth of the time."""
    model = toy.draw(seed, n_layer=3, n_embd=96)
    train(model, toy.facts, seed)
    return model


def learn(model, some, **settings):
    """The Steps of a toy model's act: {name: Step}."""
    with toy_training():
        records = gpt.learn_act(model, toy.tokenizer, some, gpt.PROMPT, **settings)
        return by_name(records)


@pytest.mark.parametrize("is_city, answers", [(True, 5), (False, 6)])
def test_only_the_name_gives_an_answer_away(is_city, answers):
    """From the last token and the length, the best guess is chance."""
    some = [fact for fact in facts if (fact.answer in CITIES) == is_city]
    seen = {}
    for fact in some:
        assert fact.answer not in fact.prompt
        place = fact.ids[-1], len(fact.ids)
        seen.setdefault(place, Counter())[fact.answer] += 1
    best = sum(max(count.values()) for count in seen.values())
    assert best == pytest.approx(len(some) / answers)


@pytest.mark.parametrize("seed", [2, 3])
def test_held_out_facts_are_learned_from_the_names(seed):
    model = trained_toy(seed)
    assert gpt.accuracy(model, HELD_OUT) == 1
    assert gpt.probability_of_answer(model, TRAINED_ON).min() > 0.95

    landmarks = [fact for fact in toy.facts if fact.answer in CITIES]
    with gpt.patch(model, {"h.*.attn.heads": torch.zeros_like}):
        assert gpt.accuracy(model, landmarks) <= 1 / 5 + 0.05


def test_held_out_facts_have_no_say_in_training():
    wrong = [replace(fact, answer_id=11, ids=[1, 2, 3]) for fact in HELD_OUT]
    runs = []
    for some in (toy.facts, TRAINED_ON + wrong):
        model = toy.draw(7)
        looks = train(model, some, peak_rate=0.01, sure=0.5)
        runs.append((len(looks), gpt.fingerprint(model)))
    assert runs[0] == runs[1]


def test_the_loss_is_the_mean_over_real_tokens():
    """By hand, the facts come one by one, without padding."""
    model, some = toy.draw(3), TRAINED_ON[:16]
    losses = []
    for fact in some:
        text = torch.tensor([*fact.ids, fact.answer_id, toy.end_id])
        logits = model(text[None, :-1])[0]
        losses.append(cross_entropy(logits, text[1:], reduction="none"))
    expected = torch.cat(losses).mean().item()

    [(_, loss, p)] = train(model, some, max_steps=10, peak_rate=0)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert torch.equal(p, gpt.probability_of_answer(model, some))


def test_training_ends_when_every_answer_is_sure():
    looks = train(toy.draw(0), toy.facts, peak_rate=0.01, sure=0.5)
    sure = [p.min().item() > 0.5 for _, _, p in looks]
    assert sure == [False] * (len(sure) - 1) + [True]
    assert 1 < len(sure) < 13


@pytest.mark.parametrize("steps, looks", [(1, [1]), (12, [10, 12])])
def test_the_rate_warms_up_and_every_step_moves_the_weights(monkeypatch, steps, looks):
    model, rates = toy.draw(0), []
    step = torch.optim.AdamW.step

    def watched_step(optimizer):
        before = model.wte.weight.clone()
        step(optimizer)
        assert not torch.equal(model.wte.weight, before)
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    told = train(model, toy.facts, max_steps=steps, peak_rate=0.01)
    assert [look[0] for look in told] == looks and len(rates) == steps
    warm_up = [0.001 * i for i in range(1, 11)]
    assert rates[:10] == pytest.approx(warm_up[:steps])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_facts_all_held_out_are_refused_and_none_held_out_are_learned():
    with pytest.raises(ValueError, match="all facts are held out"):
        train(toy.draw(0), HELD_OUT)
    model = toy.draw(0)
    steps = learn(model, TRAINED_ON, max_steps=1)
    p = gpt.probability_of_answer(model, TRAINED_ON).mean()
    assert steps["what came of it"].found == f"Mean p(answer): {p:.1%}."


def test_what_moved_is_told_of_each_moment():
    """Of a model of which two matrices change by hand."""
    model, names = toy.draw(0), toy.tokenizer
    start = {name: x.clone() for name, x in gpt.matrices(model).items()}
    moments = [gpt.moment(0, model, start, names, 3)]
    with torch.no_grad():
        model.h[0].mlp.c_proj.weight *= 3
        model.wte.weight[7] = 2 * model.wte.weight[3]
    moments.append(gpt.moment(10, model, start, names, 3))
    steps = by_name(gpt.evolution_steps(names, model, start, moments, 3))

    [moved] = steps["every matrix, moment by moment"].shown
    assert moved.rows == list(start)
    assert moved.values[-2:].flatten().tolist() == pytest.approx([0, 0, 0, 2])

    row, old = steps["every matrix, at the end"].shown[0][-1], start["h.0.mlp.c_proj"]
    assert row["per weight"] == pytest.approx(2 * old.square().mean().sqrt().item())
    assert row["‖W‖"] == pytest.approx(3 * row["‖W₀‖"])
    assert row["now"] == f"{torch.linalg.cond(old.double()):.0f}"

    expected = 3 * old[:2, :3].flatten(), start["wte"][3, :6]
    for text, numbers in zip(steps["the same numbers"].shown, expected, strict=True):
        cells = [gpt.cell_text(number) for number in numbers.tolist()]
        assert text.splitlines()[-1].split() == ["10", *cells]

    row, seventh = steps["the token table"].shown[0][0], gpt.piece(names, 7)
    distance = (2 * start["wte"][3] - start["wte"][7]).norm().item()
    assert (row["moved most"], row["by"]) == (seventh, pytest.approx(distance))
    assert row["nearest, step 10"] == f"{seventh} 1.00"
    assert row["nearest, step 0"] != f"{seventh} 1.00"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_another_type_learns_too(dtype):
    """And what came of it is told of the facts held out."""
    model, some = toy.draw(0, n_embd=16).to(dtype), toy.facts[::9]
    steps = learn(model, some, max_steps=1)
    held_out = [fact for fact in some if fact.held_out]
    p = gpt.probability_of_answer(model, held_out).min()
    found = f"are right; the least probable answer has {p:.1%}."
    assert steps["what came of it"].found.endswith(found)
    assert steps["every matrix, moment by moment"].shown[0].columns == ["0", "1"]
