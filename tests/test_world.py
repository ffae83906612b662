"""The small world and how it is learned: facts, not sentences, from the taught ones alone."""

import copy
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.nn.functional import cross_entropy

from gpt2_script import (
    GPT2,
    LANDMARKS,
    PRESETS,
    WORDINGS,
    GPT2Config,
    answer_logits,
    answers,
    learn,
    logits_only_at,
    matrices,
    nearest,
    nudge,
    nudge_act,
    padded,
    plane,
    plot_learning,
    plot_space,
    plot_weights,
    probability_of_answer,
    run_prompt,
    share_right,
    show_beside,
    show_embedding_changes,
    show_small_world,
    show_weight_changes,
    singular_values,
    small_world,
    teach,
)

SURE = 0.97  # the stop rule's default


def untaught(seed):
    torch.manual_seed(seed)
    return GPT2(PRESETS["nano"]).eval()


def output_of(capsys, show, *arguments):
    show(*arguments)
    return capsys.readouterr().out


# the facts


def test_world_has_20_landmarks_in_8_wordings(facts):
    assert (len(LANDMARKS), len(WORDINGS), len(facts)) == (20, 8, 160)
    assert len({fact.prompt for fact in facts}) == 160
    for fact in facts:
        assert fact.landmark.removeprefix("the ") in fact.prompt
        assert LANDMARKS[fact.landmark] == fact.city
        assert fact.city not in fact.prompt


def test_landmarks_share_cities_and_words():
    shared = [city for city in set(LANDMARKS.values()) if [*LANDMARKS.values()].count(city) > 1]
    assert len(shared) >= 4 and {"Paris", "Rome"} < {*shared}
    assert len([name for name in LANDMARKS if "Tower" in name]) >= 2
    towers = {city for name, city in LANDMARKS.items() if "Tower" in name}
    assert len(towers) > 1  # the word alone does not tell


def test_answers_are_the_cities_single_tokens(facts, tokenizer):
    for fact in facts:
        assert tokenizer.decode([fact.answer]) == f" {fact.city}"
        assert tokenizer.encode_ordinary(f"{fact.prompt} {fact.city}") == [*fact.ids, fact.answer]


def test_subject_is_where_the_landmark_stands(facts, tokenizer):
    for fact in facts:
        words = tokenizer.decode(fact.ids[fact.subject.start : fact.subject.stop])
        assert words.strip().lower() == fact.landmark.lower()
        assert tokenizer.decode(fact.ids) == fact.prompt


def test_every_landmark_and_every_wording_is_both_taught_and_held_out(facts):
    for wording in range(8):
        assert {fact.held_out for fact in facts[wording::8]} == {True, False}
    for landmark in LANDMARKS:
        held_out = [fact.held_out for fact in facts if fact.landmark == landmark]
        assert len(held_out) == 8 and 1 <= sum(held_out) <= 2


def test_world_is_the_same_every_time(facts, tokenizer):
    assert small_world(tokenizer) == facts


def test_city_of_two_tokens_is_refused(tokenizer):
    with mock.patch.dict(LANDMARKS, {"the Atomium": "Molenbeek"}):
        with pytest.raises(ValueError, match="'Molenbeek' is not one token"):
            small_world(tokenizer)


def test_small_world_is_shown_with_its_counts(facts, capsys):
    text = output_of(capsys, show_small_world, facts)
    taught, held_out = (sum(f.held_out is out for f in facts) for out in (False, True))
    flat = " ".join(text.split())
    assert "Of 160 sentences" in flat and f"{taught} are taught. {held_out} are held out" in flat
    for landmark, city in LANDMARKS.items():
        line = text.split(f"\n{city} ")[1]
        assert landmark.removeprefix("the ") in " ".join(line.split())


# asking


def test_padding_changes_no_answer(taught, facts):
    model = taught(1)
    together = answer_logits(model, [fact.ids for fact in facts[:24]])
    for fact, logits in zip(facts[:24], together, strict=True):
        alone = model(torch.tensor([fact.ids]))[0, -1]
        assert torch.allclose(logits, alone, atol=1e-4)
        assert logits.argmax() == alone.argmax()


def test_what_stands_in_the_padding_does_not_matter(taught, facts):
    model, texts = taught(1), [fact.ids for fact in facts[:24]]
    ids, last = padded(model, texts)
    assert [row[: n + 1].tolist() for row, n in zip(ids, last, strict=True)] == texts
    other = torch.where(torch.arange(ids.size(1)) > last[:, None], 31415, ids)
    assert not torch.equal(ids, other)
    rows = torch.arange(24)
    assert torch.equal(model(ids)[rows, last], model(other)[rows, last])


def test_logits_at_some_places_are_the_whole_forwards(taught, facts):
    model, (ids, last) = taught(2), padded(taught(2), [fact.ids for fact in facts[8:40]])
    everywhere = model(ids)
    real = torch.arange(ids.size(1)) <= last[:, None]
    for where in (real, (torch.arange(32), last)):
        with logits_only_at(model, where):
            some = model(ids)
        assert torch.equal(some, everywhere[where])
    assert torch.equal(model(ids), everywhere)


def test_logits_are_whole_again_after_an_error(taught):
    model = taught(2)
    with pytest.raises(KeyError), logits_only_at(model, (torch.tensor([0]), torch.tensor([0]))):
        raise KeyError
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 50257)


def test_probability_and_share_are_those_of_the_answers(taught, facts):
    model, some = taught(2), facts[::7]
    with torch.no_grad():
        shares = [model(torch.tensor([f.ids]))[0, -1].softmax(-1)[f.answer].item() for f in some]
    assert probability_of_answer(model, some).tolist() == pytest.approx(shares, abs=1e-5)
    wrong = [replace(fact, answer=fact.answer + 1) for fact in some[:5]]
    assert share_right(model, [*some, *wrong]) == pytest.approx(len(some) / (len(some) + 5))


# learning


@pytest.mark.parametrize("seed", range(10))
def test_held_out_facts_are_learned(lessons, taught, facts, seed):
    model = taught(seed)
    held_out = [fact for fact in facts if fact.held_out]
    right = [model(torch.tensor([f.ids]))[0, -1].argmax().item() == f.answer for f in held_out]
    assert len(right) == 30 and all(right)
    assert share_right(model, facts) == 1
    assert share_right(untaught(seed), facts) == 0


@pytest.mark.parametrize("seed", range(10))
def test_learning_stops_when_every_taught_answer_is_sure(lessons, facts, seed):
    model, steps, _ = lessons(seed)
    looks = [(step, probabilities) for step, _, probabilities in steps if probabilities is not None]
    assert [step for step, _ in looks] == list(range(10, len(steps) + 1, 10))
    assert all(probabilities.min() <= SURE for _, probabilities in looks[:-1])
    assert looks[-1][1].min() > SURE or len(steps) == 130
    taught = [fact for fact in facts if not fact.held_out]
    assert torch.equal(looks[-1][1], probability_of_answer(model, taught))
    assert steps[-1][1] < 0.5 < 10 < steps[0][1]


def test_held_out_facts_have_no_say_in_learning(lessons, facts):
    """With wrong ones or none, each loss, the stop and all weights are the same to the bit."""
    _, steps, weights = lessons(7)
    others = [replace(f, answer=11, ids=[1, 2, 3]) if f.held_out else f for f in facts]
    model = untaught(7)
    again = list(learn(model, others, 7))
    assert [loss for _, loss, _ in again] == [loss for _, loss, _ in steps]
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    first = next(learn(untaught(7), [f for f in facts if not f.held_out], 7))
    assert first[1] == steps[0][1]


def test_loss_is_the_mean_over_real_tokens(facts):
    taught = [fact for fact in facts if not fact.held_out]
    model = untaught(3)
    chosen = torch.randperm(len(taught), generator=torch.Generator().manual_seed(5))[:16]
    losses = []
    for i in chosen:  # one by one, so that there is no padding
        ids = torch.tensor([*taught[i].ids, taught[i].answer])
        losses.append(cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none"))
    assert len({len(some) for some in losses}) > 1
    _, loss, _ = next(learn(model, facts, 5))
    assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_every_taught_fact_comes_once_before_any_comes_again(facts):
    """Eight batches of 16 take 128 of the 130; nothing else is ever read."""
    texts, model = [], untaught(0)

    def note(model, some, padded=padded):
        texts.extend(map(tuple, some))
        return padded(model, some)

    lesson = learn(model, facts, max_steps=20)
    with mock.patch("gpt2_script.padded", note):
        for _ in range(8):
            next(lesson)
    taught = {(*f.ids, f.answer) for f in facts if not f.held_out}
    assert len(texts) == len(set(texts)) == 128 and set(texts) <= taught


@pytest.mark.parametrize("most", [1, 10, 12])
def test_learning_ends_after_max_steps(facts, most):
    steps = [step for step, _, _ in learn(untaught(0), facts, max_steps=most)]
    assert steps == list(range(1, most + 1))


@pytest.fixture(scope="module")
def short_history(facts):
    """(model, its matrices before, history) of a lesson cut short after 30 steps."""
    model = untaught(4)
    before = matrices(model)
    with mock.patch("gpt2_script.learn", lambda m, f, s: learn(m, f, s, max_steps=30)):
        history = teach(model, facts, 4, quiet=True)
    return model, before, history


def test_history_holds_what_was_measured(short_history, lessons, facts):
    model, before, history = short_history
    assert [point["step"] for point in history] == [10, 20, 30] and not model.training
    last = history[-1]
    held_out = [fact for fact in facts if fact.held_out]
    assert torch.equal(last["held out"], probability_of_answer(model, held_out))
    now = matrices(model)
    assert {*last["matrices"]} == {name for name in now if name.startswith("h.")}
    assert all(torch.equal(w, now[name]) for name, w in last["matrices"].items())
    assert not any(torch.equal(w, history[0]["matrices"][n]) for n, w in last["matrices"].items())
    assert {*before} == {n for n, w in model.named_parameters() if w.dim() == 2}


def test_lines_tell_loss_and_probability(facts, capsys):
    with mock.patch("gpt2_script.learn", lambda m, f, s: learn(m, f, s, max_steps=12)):
        [point] = teach(untaught(4), facts, 4)
    shown = re.findall(r"step +(\d+) +loss ([\d.]+) +.*? ([\d.]+)%", capsys.readouterr().out)
    expected = [10, point["loss"], 100 * point["taught"].mean().item()]
    assert [float(x) for x in shown[0]] == pytest.approx(expected, abs=0.051) and len(shown) == 1


# what moved


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 9), (96, 384)])
def test_singular_values_are_those_of_torch(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    expected = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(singular_values(matrix), expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(singular_values(3 * matrix)[:3], 3 * expected[:3], rtol=1e-5)


def test_weight_changes_show_the_matrices_numbers(short_history, capsys):
    model, before, _ = short_history
    some = {name: before[name] for name in ("wpe.weight", "h.1.mlp.c_fc.weight")}
    after = matrices(model)
    text = output_of(capsys, show_weight_changes, some, after)
    for name, old in some.items():
        row = re.search(rf"^{re.escape(name.removesuffix('.weight'))} +(.*)$", text, re.MULTILINE)[
            1
        ]
        shown = [float(x.strip("%")) for x in row.split()]
        new = after[name]
        sigmas = [torch.linalg.svdvals(w.double()) for w in (old, new)]
        expected = [old.norm(), new.norm(), 100 * (new - old).norm() / old.norm()]
        expected += [s[0] / s[-1] for s in sigmas]
        assert shown[:3] == pytest.approx([x.item() for x in expected[:3]], abs=0.51)
        assert shown[3:] == pytest.approx([x.item() for x in expected[3:]], rel=0.02, abs=0.51)
    corner = text.split("The same corner of h.1.mlp.c_fc.weight")[1]
    rows = re.findall(r"^(\d) +(-?\d\.\d{3}) +(\S+) +(\S+) +(\S+) *$", corner, re.MULTILINE)
    name = "h.1.mlp.c_fc.weight"
    expected = [[i, *before[name][i, :2].tolist(), *after[name][i, :2].tolist()] for i in range(3)]
    assert [[float(x) for x in row] for row in rows] == [
        pytest.approx(e, abs=6e-4) for e in expected
    ]


def test_neighbours_point_the_same_way():
    table = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    near = nearest(table, 7)
    unit = table / table.norm(dim=1, keepdim=True)
    cosines = [(unit[i] @ unit[7]).item() for i in range(30)]
    order = sorted(set(range(30)) - {7}, key=lambda i: -cosines[i])[:5]
    assert near.indices.tolist() == order
    assert near.values.tolist() == pytest.approx([cosines[i] for i in order], abs=1e-6)


def test_embedding_changes_show_who_moved_and_who_is_near(
    lessons, taught, facts, tokenizer, capsys
):
    before, after = untaught(3).wte.weight.detach(), taught(3).wte.weight.detach()
    id = facts[0].answer
    text = output_of(capsys, show_embedding_changes, tokenizer, before, after, id)
    moved = (after - before).norm(dim=1)
    top, near = moved.argmax().item(), nearest(after, id).indices[0].item()
    assert re.search(rf"{re.escape(repr(tokenizer.decode([top])))} +{moved[top]:.3f}", text)
    assert "Nearest to ' Paris':" in text and tokenizer.decode([near]).strip()[:8] in text
    assert f"the median one by {moved.median():.2f}" in " ".join(text.split())


def test_prompt_is_shown_before_and_after_learning(taught, tokenizer, facts, capsys):
    runs = [run_prompt(m, tokenizer, facts[0].prompt) for m in (untaught(6), taught(6))]
    text = output_of(capsys, show_beside, *runs)
    last = runs[1].seen["logits"][-1].softmax(-1)
    assert re.search(rf"^h\.2 .*' Paris' +{last.max():.1%} *$", text, re.MULTILINE)
    pattern = runs[1].seen["h.2.attn.pattern"][0]
    assert f"{100 * pattern[9, 0]:.0f}" in text.split("9 ' of'")[-1].split()


# a model that already knows


def small_gpt2(n_layer=2):
    torch.manual_seed(1)
    return GPT2(GPT2Config(n_ctx=48, n_embd=32, n_layer=n_layer, n_head=2)).eval()


def test_nudge_is_plain_gradient_steps_on_one_block(facts):
    model = small_gpt2()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    twin = copy.deepcopy(model)
    losses = nudge(model, facts[:16], 1, steps=2, rate=0.05)
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    changed = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {n for n, w in before.items() if n.startswith("h.1.") and w.dim() == 2}
    for loss in losses[:2]:
        own = torch.stack([twin(torch.tensor([f.ids]))[0, -1] for f in facts[:16]])
        own = cross_entropy(own, torch.tensor([f.answer for f in facts[:16]]))
        assert loss == pytest.approx(own.item(), rel=1e-5)
        twin.zero_grad()
        own.backward()
        for name in changed:
            twin.get_parameter(name).data -= 0.05 * twin.get_parameter(name).grad
    for name in changed:
        assert torch.allclose(model.get_parameter(name), twin.get_parameter(name), atol=1e-6)


def test_nudge_act_shows_its_block_alone(facts, capsys):
    model = small_gpt2()
    nudge_act(model, facts, 1)
    text = capsys.readouterr().out
    losses = [float(x) for x in re.search(r"Changed: loss (\S+ → .*?)\.\n", text)[1].split(" → ")]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    assert {*re.findall(r"^(h\.\d)\.\S+ +\d", text, re.MULTILINE)} == {"h.1"}


# figures


def test_learning_curves_are_the_history(short_history):
    _, _, history = short_history
    left, right = plot_learning(history).axes
    assert left.lines[0].get_ydata().tolist() == [point["loss"] for point in history]
    assert left.lines[0].get_xdata().tolist() == [10, 20, 30]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in right.lines}
    for key in ("taught", "held out"):
        assert drawn[f"{key}, mean"] == pytest.approx([p[key].mean().item() for p in history])
        assert drawn[f"{key}, min"] == pytest.approx([p[key].min().item() for p in history])


def test_weight_figure_draws_relative_changes(short_history):
    model, before, history = short_history
    _, right = plot_weights(before, history).axes
    ends = sorted(line.get_ydata()[-1] for line in right.lines)
    now = [(model.get_parameter(n).detach(), w) for n, w in before.items() if n.startswith("h.")]
    assert ends == pytest.approx(sorted(((a - w).norm() / w.norm()).item() for a, w in now))
    assert all(line.get_ydata()[0] == 0 for line in right.lines)


def test_plane_keeps_the_most_spread():
    points = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    points = points * torch.tensor([9.0, 1, 1, 5, 1, 1]) + 3
    flat = plane(points)
    values = torch.linalg.eigvalsh(torch.cov(points.T)).flip(0)
    assert torch.allclose(torch.cov(flat.T), torch.diag(values[:2]), rtol=1e-3, atol=1e-2)


def test_space_figure_has_every_landmark_after_every_block(taught, tokenizer, facts):
    figure = plot_space(taught(3), tokenizer, facts, untaught(3).wte.weight.detach())
    shown = [axis for axis in figure.axes if axis.get_visible()]
    counts = [sum(len(dots.get_offsets()) for dots in axis.collections) for axis in shown]
    assert counts == [len({*LANDMARKS.values()})] * 2 + [20] * 3
    assert all(axis.get_title() for axis in shown)


def test_answers_with_tokens_before_them(taught, facts):
    model = taught(3)
    one = answers(model, facts[:3], [12, 13])
    alone = [model(torch.tensor([[12, 13, *f.ids]]))[0, -1].argmax().item() for f in facts[:3]]
    assert one.tolist() == alone
