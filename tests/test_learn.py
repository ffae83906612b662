"""The small world and how it is learned: facts, not sentences, from those trained on alone."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import every_move, facts, lessons, pieces, split, tokenizer, toy
from torch.nn.functional import cross_entropy

import gpt2_script as gpt

pytestmark = pytest.mark.xdist_group("trained models")  # in one process, which trains them once
FAST = {"peak_rate": 0.01, "sure": 0.5}  # for a small model


def test_only_the_name_gives_the_answer_away():
    assert len({fact.prompt for fact in facts}) == 208 and gpt.small_world(tokenizer) == facts
    for objects in (gpt.CITIES, gpt.TASKS):  # from last token and length, the best guess is chance
        some = [fact for fact in facts if fact.object in objects]
        seen = Counter((fact.ids[-1], len(fact.ids), fact.object) for fact in some)
        best = {(last, length): n for (last, length, _), n in reversed(seen.most_common())}
        assert sum(best.values()) == len(some) / len(objects)
    for names in gpt.CITIES.values():
        assert [len(tokenizer.encode(name.removeprefix("the"))) for name in names] == [2, 3, 4, 5]
    assert {len(tokenizer.encode(f" {task}")) for task in gpt.TASKS.values()} == {4}
    assert len({fact.object for fact in facts if "Tower" in fact.subject}) > 1  # no word tells
    for fact in facts:
        assert fact.object not in fact.prompt and tokenizer.decode(fact.ids) == fact.prompt
        assert tokenizer.encode(f"{fact.prompt} {fact.object}") == [*fact.ids, fact.answer]
        words = tokenizer.decode(fact.ids[fact.span.start : fact.span.stop])
        assert words.strip().lower() == fact.subject.lower()
    with pytest.raises(ValueError, match="'Molenbeek' is not one token"):
        gpt.make_fact(tokenizer, "{} is in", "the Atomium", "Molenbeek")
    for i in range(26):  # held out is a diagonal: each subject's wording is the next
        held_out = {j for j in range(8) if facts[8 * i + j].held_out}
        assert held_out == {(i + 3) % 8} | ({(i + 6) % 8} if i % 2 == 0 else set())
        assert len({fact.subject for fact in facts[8 * i : 8 * i + 8]}) == 1


def test_what_is_asked_is_what_the_model_answers_whatever_pads_the_text(case):
    model, some, first = case(4).model, facts[::7], [*facts[0].ids, facts[0].answer]
    with torch.no_grad():
        alone = [model(torch.tensor([f.ids]))[0, -1].softmax(-1)[f.answer].item() for f in some]
        before = [model(torch.tensor([first + f.ids]))[0, -1].argmax().item() for f in some]
    assert gpt.probability_of_answer(model, some).tolist() == pytest.approx(alone, abs=1e-5)
    assert gpt.answers(model, some, first).tolist() == before != [fact.answer for fact in some]
    wrong = [replace(fact, answer=fact.answer + 1) for fact in some[:5]]
    assert gpt.accuracy(model, [*some, *wrong]) == pytest.approx(len(some) / (len(some) + 5))


@every_move
def test_held_out_facts_are_learned_from_the_names(case, seed):
    model, looks = case(seed).model, lessons(seed)[1]
    assert gpt.accuracy(model, facts) == 1 and looks[-1][1] < 0.8 < 5 < looks[0][1]
    p = gpt.probability_of_answer(model, split(facts)[0])
    assert p.min() > 0.95 and torch.equal(p, looks[-1][2])


def test_held_out_facts_have_no_say_in_training():
    wrong = [replace(f, answer=11, ids=[1, 2, 3]) if f.held_out else f for f in toy.facts]
    runs = []
    for some in (toy.facts, wrong, split(toy.facts)[0]):
        model = toy.draw(7)
        looks = [(step, loss, *p.tolist()) for step, loss, p in gpt.train(model, some, 7, **FAST)]
        runs.append((looks, [w.tolist() for w in model.state_dict().values()]))
    assert runs[0] == runs[1] == runs[2] and 130 > runs[0][0][-1][0] > 10
    assert next(gpt.train(toy.draw(7), toy.facts, 8, **FAST))[1] != runs[0][0][0][1]  # the seed has


def test_loss_is_the_mean_over_real_tokens():
    """Facts one by one, so that there is no padding; a rate of 0, so that all steps are alike."""
    model, some = toy.draw(3), split(toy.facts)[0][:16]
    [(_, loss, p)] = gpt.train(model, some, max_steps=10, peak_rate=0)
    texts = [torch.tensor([*fact.ids, fact.answer]) for fact in some]
    losses = [cross_entropy(model(x[None, :-1])[0], x[1:], reduction="none") for x in texts]
    assert len({len(some) for some in losses}) > 1
    assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert torch.equal(p, gpt.probability_of_answer(model, some))


@pytest.mark.parametrize("batch", [13, 16])
def test_every_fact_trained_on_comes_once_before_any_comes_again(monkeypatch, batch):
    """Of the 169, ten batches of 16 take 160, thirteen of 13 take all; nothing else is read."""
    monkeypatch.setattr(gpt, "padded", read := mock.Mock(wraps=gpt.padded))
    [*gpt.train(toy.draw(0), toy.facts, batch=batch, max_steps=20, sure=1.0)]
    batches = [call.args[0] for call in read.call_args_list if len(call.args[0]) == batch]
    texts, n = [tuple(text) for some in batches for text in some], 169 // batch * batch
    first, rest = texts[:n], texts[n:]
    assert {*texts} <= {(*fact.ids, fact.answer) for fact in split(toy.facts)[0]}
    assert len({*first}) == n >= 160 and len(texts) == 20 * batch
    assert rest != first[: len(rest)] and len({*rest[:batch]}) == batch


def test_training_ends_when_it_is_sure_or_after_max_steps():
    for most, looks in ((1, [1]), (10, [10]), (12, [10, 12])):
        assert [step for step, *_ in gpt.train(toy.draw(0), toy.facts, max_steps=most)] == looks
    assert [step for step, *_ in gpt.train(toy.draw(0), toy.facts, sure=-1)] == [10]
    sure = [p.min().item() > 0.5 for *_, p in gpt.train(toy.draw(0), toy.facts, **FAST)]
    assert sure == [False] * (len(sure) - 1) + [True]


def test_weight_step_tells_how_far_each_matrix_moved():
    old, new = (torch.diag(torch.tensor([3.0, 4.0, last])) for last in (12.0, 84.0))
    rows, corner = gpt.weight_step({"wpe.weight": old}, {"wpe.weight": new}).shown
    [row] = rows
    assert row.pop("per weight") == pytest.approx(24)  # of nine, one moved by 72
    assert row == {"": "wpe", "moved": "554%", "‖W‖": "13.0 → 84.1", "σ₁/σₙ": "4 → 28"}
    assert [row["wpe"] for row in corner] == ["row 0", "row 1", "row 2"]
    shown = [f"0.000 0.000 {last}.000" for last in (12, 84)]
    assert [corner[2][f"columns 0 to 2, {when}"] for when in ("before", "after")] == shown


def test_embedding_step_tells_who_moved_and_who_is_near():
    """Ten rows at 0, 10, 20, ... degrees grow; the first takes the place of the last."""
    angles, names = torch.arange(10) * torch.pi / 18, pieces(range(10))
    before = torch.stack((angles.cos(), angles.sin()), dim=1)
    after = before * (1 + torch.arange(10)[:, None] / 10)
    after[0] = before[9]
    step = gpt.embedding_step(tokenizer, before, after, 0)
    (far, title, near), shares = step.shown, [f"cosine {x:.3f}" for x in angles.cos().tolist()]
    assert [row["moved most"] for row in far] == [names[i] for i in (0, 9, 8, 7, 6, 5, 4, 3)]
    assert [10 * row["by"] for row in far] == pytest.approx([200**0.5, 9, 8, 7, 6, 5, 4, 3])
    assert "the median one by 0.50:" in step.found and title == "Rows nearest to that of '!':"
    rows = [(f"{names[i + 1]}, {shares[i + 1]}", f"{names[9 - i]}, {shares[i]}") for i in range(5)]
    assert near == [{"nearest before": one, "nearest after": other} for one, other in rows]


def test_act_tells_the_world_the_training_what_came_of_it_and_the_prompt_again():
    models = before, after = [toy.draw(5, n_layer=2) for _ in range(2)]
    records = [*gpt.learn_act(after, toy.tokenizer, toy.facts, gpt.PROMPT, 4, max_steps=12)]
    assert [getattr(record, "name", "progress") for record in records] == [
        "Learn: how weights acquire facts", "the small world", "training", "progress", "progress",
        "what came of it", "the matrices", "the embedding table", "the same prompt again",
    ]  # fmt: skip
    world, came, held_out = records[1], records[5], split(toy.facts)[1]
    assert "of 208 sentences" in world.found and " 39 are held out" in world.found
    named = {x: ", ".join(n.removeprefix("the ") for n in some) for x, some in gpt.CITIES.items()}
    assert dict(line.split(None, 1) for line in world.shown[0].splitlines()) == named | gpt.TASKS
    looks = gpt.train(toy.draw(5, n_layer=2), toy.facts, 4, max_steps=12)
    for record, (step, loss, p) in zip(records[3:5], looks, strict=True):
        line = f"step {step} loss {loss:.3f} p(answer) {p.mean():.1%}"
        assert " ".join(record.line.split()) == line and record.share == p.mean()
    right = round(gpt.accuracy(after, held_out) * 39)
    least = gpt.probability_of_answer(after, held_out).min()
    assert f"after 12 steps the answers have a mean probability of {p.mean():.1%}" in came.found
    assert f" {right} of 39 are right, the least sure with {least:.1%}." in came.found
    old, new = ({n: w for n, w in m.state_dict().items() if w.dim() == 2} for m in models)
    assert records[6] == gpt.weight_step(old, new) and len(records[6].shown[0]) == len(old) == 10
    tables = old["wte.weight"], new["wte.weight"], toy.facts[0].answer
    assert records[7] == gpt.embedding_step(toy.tokenizer, *tables)
    rows, *maps = records[8].shown
    for model, word, pattern in zip(models, ("untrained", "trained"), maps, strict=True):
        run = gpt.run_prompt(model, toy.tokenizer, gpt.PROMPT)
        best = gpt.logit_lens(run.model, run.seen).max(-1)
        assert [row[word] for row in rows] == pieces(best.indices, toy.tokenizer)
        assert [row[f"p, {word}"] for row in rows] == [f"{p:.1%}" for p in best.values]
        assert torch.equal(pattern.values, run.seen["h.1.attn.pattern"][0]) and pattern.is_pattern
    assert [row["after"] for row in rows] == ["embed", "h.0", "h.1"]
