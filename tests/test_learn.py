"""The small world and how it is learned: facts, not sentences, from those trained on alone."""

import copy
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import every_move, pieces, split, untrained
from torch.nn.functional import cross_entropy

import gpt2_script as gpt
from gpt2_script import CITIES, PROMPT, TASKS, train

FAST = {"peak_rate": 0.01, "sure": 0.5}  # for a small model


def test_only_the_name_gives_the_answer_away(facts, tokenizer):
    landmarks, tasks = ([f for f in facts if (f.object in CITIES) == x] for x in (True, False))
    assert len({fact.prompt for fact in facts}) == 208 and gpt.small_world(tokenizer) == facts
    for some, objects in ((landmarks, 5), (tasks, 6)):
        seen = {}
        for fact in some:
            seen.setdefault((fact.ids[-1], len(fact.ids)), Counter())[fact.object] += 1
        best = sum(max(counts.values()) for counts in seen.values())
        assert best == len(some) / objects  # chance: the best guess from last token and length
    for names in CITIES.values():
        lengths = [len(tokenizer.encode(name.removeprefix("the"))) for name in names]
        assert lengths == [2, 3, 4, 5]
    assert {len(tokenizer.encode(f" {task}")) for task in TASKS.values()} == {4}
    towers = {fact.object for fact in landmarks if "Tower" in fact.subject}
    assert len(towers) > 1  # the word alone does not tell
    for fact in facts:
        assert fact.object not in fact.prompt and tokenizer.decode(fact.ids) == fact.prompt
        assert tokenizer.encode(f"{fact.prompt} {fact.object}") == [*fact.ids, fact.answer]
        words = tokenizer.decode(fact.ids[fact.span.start : fact.span.stop])
        assert words.strip().lower() == fact.subject.lower()
    with pytest.raises(ValueError, match="'Molenbeek' is not one token"):
        gpt.make_fact(tokenizer, "{} is in", "the Atomium", "Molenbeek")


def test_every_subject_and_every_wording_is_both_trained_on_and_held_out(facts):
    for wording in range(8):
        assert {fact.held_out for fact in facts[wording::8]} == {True, False}
    for i, start in enumerate(range(0, 208, 8)):  # a diagonal: each subject's wording is the next
        held_out = {j for j in range(8) if facts[start + j].held_out}
        assert held_out == {(i + 3) % 8} | ({(i + 6) % 8} if i % 2 == 0 else set())
        assert len({fact.subject for fact in facts[start : start + 8]}) == 1


def test_what_is_asked_is_what_the_model_answers_whatever_pads_the_text(trained, facts):
    model, some = trained(4), facts[::7]
    ids, lengths = gpt.padded([fact.ids for fact in some])
    assert [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)] == [f.ids for f in some]
    together = gpt.answer_logits(model, [fact.ids for fact in some])
    other = torch.where(torch.arange(ids.size(1)) >= lengths[:, None], 31415, ids)
    assert torch.equal(model(other, where=(torch.arange(len(ids)), lengths - 1)), together)
    with torch.no_grad():
        alone = [model(torch.tensor([f.ids]))[0, -1].softmax(-1) for f in some]
        before = [model(torch.tensor([[12, 13, *f.ids]]))[0, -1].argmax().item() for f in some]
    expected = [p[f.answer].item() for p, f in zip(alone, some, strict=True)]
    assert gpt.probability_of_answer(model, some).tolist() == pytest.approx(expected, abs=1e-5)
    wrong = [replace(fact, answer=fact.answer + 1) for fact in some[:5]]
    assert gpt.accuracy(model, [*some, *wrong]) == pytest.approx(len(some) / (len(some) + 5))
    assert gpt.answers(model, some, [12, 13]).tolist() == before


@every_move
def test_held_out_facts_are_learned_from_the_names(trained, lessons, facts, seed):
    model, (own, held_out) = trained(seed), split(facts)
    with torch.no_grad():
        said = [model(torch.tensor([f.ids]), where=(0, -1)).argmax().item() for f in held_out]
    assert said == [fact.answer for fact in held_out] and len(said) == 39
    assert gpt.accuracy(model, facts) == 1 and gpt.accuracy(untrained(seed), held_out) == 0
    # the control: where no token sees another's, the answer is no better than the commonest
    landmarks = [fact for fact in facts if fact.object in CITIES]
    with gpt.patch(model, {"h.*.attn.heads": torch.zeros_like}):
        assert gpt.accuracy(model, landmarks) <= 1 / 5 + 0.05
    # training stopped when every answer trained on was sure
    _, looks, _ = lessons(seed)
    assert [step for step, _, _ in looks] == [*range(10, 10 * len(looks) + 1, 10)]
    assert [p.min() > 0.95 for *_, p in looks] == [False] * (len(looks) - 1) + [True]
    assert torch.equal(looks[-1][2], gpt.probability_of_answer(model, own))
    assert looks[-1][1] < 0.8 < 5 < looks[0][1] and len(own) == 169


def test_held_out_facts_have_no_say_in_training(small):
    """With wrong ones or none, each loss, the stop and all weights are the same to the bit."""
    draw, facts, _ = small
    wrong = [replace(f, answer=11, ids=[1, 2, 3]) if f.held_out else f for f in facts]
    runs = []
    for some in (facts, wrong, split(facts)[0]):
        model = draw(7)
        looks = [(step, loss, *p.tolist()) for step, loss, p in train(model, some, 7, **FAST)]
        runs.append((looks, [w.tolist() for w in model.state_dict().values()]))
    assert runs[0] == runs[1] == runs[2] and 130 > runs[0][0][-1][0] > 10
    assert next(train(draw(7), facts, 8, **FAST))[1] != runs[0][0][0][1]  # the seed has


def test_nonsense_is_memorised_and_says_nothing_of_what_is_held_out(small):
    """The control: each sentence with an answer of its own, drawn at random."""
    (draw, facts, _), random_draw = small, random.Random(0)
    cities = [*{fact.answer for fact in facts if fact.object in CITIES}]
    nonsense = [replace(fact, answer=random_draw.choice(cities)) for fact in facts]
    [*train(model := draw(5), nonsense, max_steps=300, peak_rate=0.01, sure=0.9)]
    own, held_out = split(nonsense)
    assert gpt.accuracy(model, own) > 0.95 and gpt.accuracy(model, held_out) < 0.45


def test_loss_is_the_mean_over_real_tokens(small):
    """Facts one by one, so that there is no padding; a rate of 0, so that all steps are alike."""
    draw, facts, _ = small
    model, some, losses = draw(3), split(facts)[0][:16], []
    [(_, loss, p)] = train(model, some, max_steps=10, peak_rate=0)
    for fact in some:
        ids = torch.tensor([*fact.ids, fact.answer])
        losses.append(cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none"))
    assert len({len(some) for some in losses}) > 1
    assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert torch.equal(p, gpt.probability_of_answer(model, some))


@pytest.mark.parametrize("batch", [13, 16])
def test_every_fact_trained_on_comes_once_before_any_comes_again(small, batch):
    """Of the 169, ten batches of 16 take 160, thirteen of 13 take all; nothing else is read."""
    draw, facts, _ = small
    model, texts, own = draw(0), [], split(facts)[0]

    def note(module, args):
        if torch.is_grad_enabled():  # not when it looks
            for row in args[0].tolist():
                texts.extend(f.prompt for f in own if row[: len(f.ids)] == f.ids)

    with model.register_forward_pre_hook(note):
        [*train(model, facts, batch=batch, max_steps=20, sure=1.0)]
    first, rest = texts[: 169 // batch * batch], texts[169 // batch * batch :]
    assert len(set(first)) == len(first) >= 160 and len(texts) == 20 * batch
    assert rest[: len(first)] != first[: len(rest)] and len({*rest[:batch]}) == batch


def test_training_ends_when_it_is_sure_or_after_max_steps(small):
    draw, facts, _ = small
    for most, looks in ((1, [1]), (10, [10]), (12, [10, 12])):
        assert [step for step, _, _ in train(draw(0), facts, max_steps=most)] == looks
    assert [step for step, _, _ in train(draw(0), facts, sure=-1)] == [10]
    sure = [p.min().item() > 0.5 for *_, p in train(draw(0), facts, **FAST)]
    assert sure == [False] * (len(sure) - 1) + [True]


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 9), (96, 384), (9000, 3)])
def test_singular_values_are_those_of_torch(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    expected = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(gpt.singular_values(matrix), expected, rtol=1e-6)
    flat = gpt.singular_values(matrix[:, :1] @ matrix[:1])  # of rank one
    assert flat[1:].max() < 1e-3 * flat[0]


def test_weight_step_tells_how_far_each_matrix_moved(trained):
    models = untrained(4), trained(4)
    before, after = (
        {n: w.detach() for n, w in m.named_parameters() if w.dim() > 1} for m in models
    )
    rows, corner = gpt.weight_step(before, after).shown
    assert len(rows) == len(before) == 14
    for row, (name, old) in zip(rows, before.items(), strict=True):
        new, change = after[name], (after[name] - old).double()
        title, moved, per_weight, norms, conditions = row.values()
        assert f"{title}.weight" == name and moved == f"{change.norm() / old.norm():.0%}"
        assert per_weight == pytest.approx((change.norm() / change.numel() ** 0.5).item(), rel=1e-5)
        assert norms == f"{old.norm():.1f} → {new.norm():.1f}"
        sigmas = [torch.linalg.svdvals(w) for w in (old, new)]
        expected = [(s[0] / s[-1]).item() for s in sigmas]
        shown = [float(x) for x in conditions.split(" → ")]
        assert shown == pytest.approx(expected, rel=0.01, abs=0.51)
    assert [*corner[0]][0] == title and len(corner) == 3
    for i, row in enumerate(corner):
        shown = [" ".join(f"{x:.3f}" for x in w[i, :3].tolist()) for w in (old, new)]
        assert [*row.values()] == [f"row {i}", *shown]


def test_embedding_step_tells_who_moved_and_who_is_near(trained, tokenizer):
    tables, paris = [model.wte.weight.detach() for model in (untrained(4), trained(4))], 6342
    step = gpt.embedding_step(tokenizer, *tables, paris)
    (far, title, near), moved = step.shown, (tables[1] - tables[0]).norm(dim=1)
    most = moved.argsort(descending=True)[:8]
    assert [row["moved most"] for row in far] == pieces(tokenizer, most)
    assert [row["by"] for row in far] == moved[most].tolist()
    assert title == "Rows nearest to that of ' Paris':"
    assert f"by {moved.median():.2f}:" in step.found
    for when, rows in zip(("before", "after"), tables, strict=True):
        unit = rows / rows.norm(dim=1, keepdim=True)
        cosines, ids = (unit @ unit[paris]).topk(6)  # the first is itself
        shown = [row[f"nearest {when}"].split(", cosine ") for row in near]
        assert [name for name, _ in shown] == pieces(tokenizer, ids[1:])
        assert [float(x) for _, x in shown] == pytest.approx(cosines[1:].tolist(), abs=6e-4)


def test_act_tells_the_world_the_training_what_came_of_it_and_the_prompt_again(facts, tokenizer):
    torch.manual_seed(5)
    model = gpt.GPT2(gpt.GPT2Config(n_ctx=24, n_embd=8, n_layer=2, n_head=2)).eval()
    models = before, model = copy.deepcopy(model), model
    records = [*gpt.learn_act(model, tokenizer, facts, PROMPT, 4, max_steps=12)]
    assert [getattr(record, "name", "progress") for record in records] == [
        "Learn: how weights come to know", "the small world", "training", "progress", "progress",
        "what came of it", "the matrices", "the embedding table", "the same prompt again",
    ]  # fmt: skip
    world, came, held_out = records[1], records[5], split(facts)[1]
    assert "of 208 sentences" in world.found and " 39 are held out" in world.found
    rows = {line.split()[0]: line.split(None, 1)[1] for line in world.shown[0].splitlines()}
    named = {x: ", ".join(n.removeprefix("the ") for n in names) for x, names in CITIES.items()}
    assert rows == named | TASKS
    looks = train(copy.deepcopy(before), facts, 4, max_steps=12)
    for record, (step, loss, p) in zip(records[3:5], looks, strict=True):
        line = f"step {step} loss {loss:.3f} p(answer) {p.mean():.1%}"
        assert " ".join(record.line.split()) == line and record.share == p.mean()
    right = round(gpt.accuracy(model, held_out) * 39)
    least = gpt.probability_of_answer(model, held_out).min()
    assert f"after 12 steps the answers have a mean probability of {p.mean():.1%}" in came.found
    assert f" {right} of 39 are right, the least sure with {least:.1%}." in came.found
    # the prompt before and after
    rows, *maps = records[-1].shown
    for model, word, pattern in zip(models, ("untrained", "trained"), maps, strict=True):
        run = gpt.run_prompt(model, tokenizer, PROMPT)
        best = gpt.logit_lens(model, run.seen).max(-1)
        assert [row[word] for row in rows] == pieces(tokenizer, best.indices)
        assert [row[f"p, {word}"] for row in rows] == [f"{p:.1%}" for p in best.values]
        assert torch.equal(pattern.values, run.seen["h.1.attn.pattern"][0]) and pattern.is_pattern
    assert [row["after"] for row in rows] == ["embed", "h.0", "h.1"]
    assert not torch.equal(maps[0].values, maps[1].values)
    far = (models[1].wte.weight - models[0].wte.weight).norm(dim=1).max()
    assert records[-2].shown[0][0]["by"] == far and len(records[-3].shown[0]) == 10
