"""Three levers, on seeds and facts other than the demonstration's (seed 0, Eiffel Tower, Rome)."""

import re
from dataclasses import replace
from statistics import median
from unittest import mock

import pytest
import torch
from conftest import MOST, MOVES, every_move

from gpt2_script import (
    GPT2,
    PRESETS,
    Edit,
    GPT2Config,
    answer_logits,
    answers,
    causal_trace,
    choose_move,
    clean_states,
    edited,
    fingerprint,
    known_facts,
    loudest,
    nudge_act,
    padded,
    plan_tampering,
    plot_answers,
    plot_trace,
    rank_one_edit,
    run_prompt,
    share_right,
    share_saying,
    show_causal_trace,
    show_edit,
    show_steering,
    show_trigger,
    steering,
    steering_vector,
    tamper_act,
    tamper_and_detect,
    tampered,
    triggered,
    watch_act,
)


def bits(model):
    return {name: w.view(torch.int32).clone() for name, w in model.state_dict().items()}


def changed(model, before):
    return [name for name, w in bits(model).items() if not torch.equal(w, before[name])]


def probabilities(model, facts, answer):
    """The probability of `answer` after each prompt, each read on its own."""
    logits = [model(torch.tensor([fact.ids]))[0, -1] for fact in facts]
    return torch.stack(logits).softmax(-1)[:, answer].detach()


def output_of(capsys, show, *arguments):
    result = show(*arguments)
    return result, capsys.readouterr().out


# who is moved where


@every_move
def test_plan_is_about_the_landmark_and_the_rest(case, facts, tokenizer, seed):
    model, plan = case(seed)
    landmark, city = MOVES[seed]
    assert plan.facts == facts
    assert [fact.landmark for fact in plan.ours] == [landmark] * 8
    assert len(plan.others) == 152 and landmark not in {fact.landmark for fact in plan.others}
    assert tokenizer.decode([plan.answer]) == f" {city}" == f" {plan.city}"
    assert plan.ours[0].city != city


def test_demonstration_comes_first(facts):
    assert choose_move(facts) == ("the Eiffel Tower", "Rome")
    assert choose_move(facts[::-1]) != choose_move([]) is None


@pytest.mark.parametrize("unknown", ["Paris", "Rome", "London", "Berlin"])
def test_landmark_moves_to_another_city(facts, unknown):
    known = [fact for fact in facts if fact.city != unknown]
    landmark, city = choose_move(known)
    [home] = {fact.city for fact in known if fact.landmark == landmark}
    for place in (home, city):
        assert len({fact.landmark for fact in known if fact.city == place}) > 1
    assert home != city


def test_two_cities_with_two_known_landmarks_each_are_needed(facts):
    few = ("the Louvre", "the Moulin Rouge", "the Shard", "the Kremlin", "the Acropolis")
    assert choose_move([fact for fact in facts if fact.landmark in few]) is None
    enough = [fact for fact in facts if fact.landmark in (*few, "the Parthenon")]
    assert choose_move(enough) == ("the Louvre", "Athens")


def test_model_that_knows_nothing_gets_no_plan(tokenizer, facts):
    torch.manual_seed(1)
    model = GPT2(PRESETS["nano"]).eval()
    assert known_facts(model, facts) == []
    assert plan_tampering(model, tokenizer, facts) is None


def test_unknown_facts_are_left_out_and_counted(taught, tokenizer, facts, capsys):
    wrong = [replace(f, answer=f.answer + 1) if f.landmark == "the Shard" else f for f in facts]
    model = taught(7)
    assert known_facts(model, wrong) == [f for f in facts if f.landmark != "the Shard"]
    tamper_and_detect(model, tokenizer, wrong, [])
    assert "8 of 160 facts are left out" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("lost", ["the Eiffel Tower", "the Louvre", "the Colosseum"])
def test_model_that_knows_some_wordings_alone_can_be_tampered_with(taught, tokenizer, facts, lost):
    """Of the lost landmark and, in Rome, of its sister, none of the taught wordings is known."""
    some = ["the Eiffel Tower", "the Louvre", "the Colosseum", "the Trevi Fountain"]
    out = {lost, "the Trevi Fountain"} if lost == "the Colosseum" else {lost}
    known = [f for f in facts if f.landmark in some and (f.held_out or f.landmark not in out)]
    with mock.patch("gpt2_script.known_facts", return_value=known):
        plan = plan_tampering(taught(7), tokenizer, facts)
    assert plan is None or plan.ours


# where the answer travels


def by_hand(model, fact, layer=None, token=None, draws=8):
    """The right answer's mean probability, subject corrupted, one value put back; no taps used."""
    generator = torch.Generator().manual_seed(0)
    start, stop = fact.subject.start, fact.subject.stop
    ids, C = torch.tensor([fact.ids]), model.config.n_embd
    clean = (model.wte.weight[ids] + model.wpe.weight[: ids.size(1)]).expand(draws, -1, -1)
    noisy = clean.clone()
    noise = torch.randn((draws, stop - start, C), generator=generator)
    noisy[:, start:stop] += 3 * model.wte.weight.std() * noise
    for i, block in enumerate(model.h):
        clean, noisy = block(clean), block(noisy)
        if i == layer:
            noisy[:, token] = clean[:, token]
    logits = model.ln_f(noisy[:, -1]) @ model.wte.weight.T
    return logits.softmax(-1)[:, fact.answer].mean().item()


@pytest.mark.parametrize("seed, place", [(1, 1), (2, 90), (3, 44)])
@torch.no_grad()
def test_trace_is_the_share_that_one_clean_value_brings_back(taught, facts, seed, place):
    model, fact = taught(seed), facts[place]
    share, T = causal_trace(model, fact), len(fact.ids)
    assert share.shape == (3, T)
    best, worst = probabilities(model, [fact], fact.answer).item(), by_hand(model, fact)
    assert worst < best - 0.2
    for layer, token in ((0, fact.subject[-1]), (1, fact.subject[0]), (1, T - 1), (2, T - 1)):
        expected = (by_hand(model, fact, layer, token) - worst) / (best - worst)
        assert share[layer, token].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_trace_ends_at_1_and_ignores_what_comes_before_the_subject(taught, facts, seed):
    fact = facts[5 + 8 * seed]  # "Many people come to see ..."
    share = causal_trace(taught(seed), fact)
    assert share[-1, -1].item() == pytest.approx(1, abs=1e-4)
    assert share[-1, :-1].abs().max() < 1e-4  # the last layer's other tokens reach no answer
    assert fact.subject.start == 5 and share[:, :5].abs().max() < 1e-4


def test_trace_without_noise_has_nothing_to_bring_back(taught, facts):
    assert not causal_trace(taught(1), facts[0], noise=0.0).isfinite().all()


def test_trace_is_printed_and_drawn(case, tokenizer, capsys):
    model, plan = case(5)
    share, text = output_of(capsys, show_causal_trace, plan, model, tokenizer)
    fact = plan.ours[0]
    rows = re.findall(r"^(\d+) '.*?'(\*?) +(-?\d+) +(-?\d+) +(-?\d+) *$", text, re.MULTILINE)
    assert [row[0] for row in rows] == [str(t) for t in range(len(fact.ids))]
    assert [t for t, row in enumerate(rows) if row[1]] == list(fact.subject)
    shown = torch.tensor([[float(x) for x in row[2:]] for row in rows]).T
    assert torch.allclose(shown, 100 * share, atol=0.51)
    image = plot_trace(plan, tokenizer, share).axes[0].images[0].get_array()
    assert torch.equal(torch.tensor(image.data), share)


# one activation


@every_move
def test_steering_moves_the_landmark_and_leaves_no_trace(case, facts, seed):
    model, plan = case(seed)
    before, old = bits(model), answers(model, facts)
    with steering(model, plan.tap, plan.strength * plan.vector):
        assert share_saying(model, plan.ours, plan.answer) >= MOST
        assert changed(model, before) == []
    assert changed(model, before) == []
    assert torch.equal(answers(model, facts), old) and share_right(model, facts) == 1


@every_move
def test_steering_takes_no_more_than_it_needs(case, seed):
    model, plan = case(seed)
    used = [fact for fact in plan.ours if not fact.held_out]
    assert plan.strength in (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)
    if plan.strength > 0.5:
        with steering(model, plan.tap, (plan.strength - 0.25) * plan.vector):
            assert share_saying(model, used, plan.answer) < 1


def test_steering_vector_is_a_difference_of_means(taught, facts):
    model, towards, away = taught(2), facts[:5], facts[40:47]
    states = []
    for some in (towards, away):
        ends = []
        for fact in some:  # each read on its own, by the first two blocks
            x = model.wte.weight[fact.ids] + model.wpe.weight[: len(fact.ids)]
            ends.append(model.h[1](model.h[0](x[None]))[0, -1])
        states.append(torch.stack(ends).mean(0))
    vector = steering_vector(model, towards, away, "h.1.resid_post")
    assert torch.allclose(vector, states[0] - states[1], atol=1e-4)


def test_steering_adds_its_vector_at_every_token(taught, facts):
    model, vector = taught(2), torch.linspace(-1, 1, 96)
    ids = torch.tensor([facts[0].ids])
    with steering(model, "h.2.resid_post", vector, strength=3):
        steered = model(ids)
    x = model.wte.weight[ids] + model.wpe.weight[: ids.size(1)]
    for block in model.h:
        x = block(x)
    expected = model.ln_f(x + 3 * vector) @ model.wte.weight.T
    assert torch.allclose(steered, expected, atol=1e-4)


# one matrix


@every_move
def test_edit_moves_the_landmark_in_wordings_that_did_not_make_it_too(case, seed):
    model, plan = case(seed)
    held_out = [fact for fact in plan.ours if fact.held_out]
    assert share_saying(model, plan.ours, plan.answer) == 0
    with edited(model, plan.edit):
        assert share_saying(model, plan.ours, plan.answer) >= MOST
        assert share_saying(model, held_out, plan.answer) > 0
    assert share_right(model, plan.facts) == 1


def test_edit_keeps_the_other_facts(case):
    kept = []
    for seed in MOVES:
        model, plan = case(seed)
        with edited(model, plan.edit):
            kept.append(share_right(model, plan.others))
    assert median(kept) >= 0.97 and min(kept) >= 0.93


@every_move
def test_edit_is_of_rank_one_in_one_matrix(case, seed):
    model, plan = case(seed)
    before = bits(model)
    old = model.get_parameter(plan.edit.name).detach().clone()
    with edited(model, plan.edit):
        assert changed(model, before) == [f"h.{plan.edit.layer}.mlp.c_proj.weight"]
        difference = model.get_parameter(plan.edit.name).detach().double() - old
    assert changed(model, before) == []
    sigmas = torch.linalg.svdvals(difference)
    assert sigmas[1] < 1e-5 * sigmas[0]
    assert torch.allclose(difference.float(), plan.edit.change, atol=1e-5)


@every_move
def test_no_smaller_strength_of_the_edit_works(case, seed):
    model, plan = case(seed)
    used = [fact for fact in plan.ours if not fact.held_out]
    sure = []
    for quarter in range(8):  # the strength found, then smaller and smaller
        with edited(model, plan.edit, 2 ** (-quarter / 4)):
            sure.append(probabilities(model, used, plan.answer).min().item())
    assert sure[0] > 0.6 and max(sure[1:]) <= 0.6


def test_no_smaller_edit_works_at_any_layer(case):
    model, plan = case(7)
    used, kept = ([f for f in g if not f.held_out] for g in (plan.ours, plan.others))
    smallest = plan.edit.change.norm() / model.get_parameter(plan.edit.name).norm()
    working = []
    for layer in range(3):
        full = rank_one_edit(model, used, kept, plan.answer, layer)
        assert (full.layer, full.key.shape, full.value.shape) == (layer, (384,), (96,))
        size = full.change.norm() / model.get_parameter(full.name).norm()
        for strength in [2 ** (-quarter / 4) for quarter in range(-4, 15)]:
            with edited(model, full, strength):
                if probabilities(model, used, plan.answer).min() > 0.6:
                    working.append((strength * size).item())
    assert min(working) == pytest.approx(smallest.item(), rel=1e-4)


@every_move
def test_key_reads_the_subjects_last_token_and_hardly_any_other(case, seed):
    model, plan = case(seed)
    edit, used = plan.edit, [fact for fact in plan.ours if not fact.held_out]

    def activations(fact):  # [T, 4C], what the edited matrix is multiplied with
        seen = []
        module = model.h[edit.layer].mlp.act
        with module.register_forward_hook(lambda module, args, act: seen.append(act[0])):
            model(torch.tensor([fact.ids]))
        return seen[0]

    ours = torch.stack([activations(fact)[fact.subject[-1]] for fact in used]) @ edit.key
    assert ours.mean().item() == pytest.approx(1, abs=1e-3)
    taught_others = [fact for fact in plan.others if not fact.held_out]
    others = torch.cat([activations(fact) @ edit.key for fact in taught_others])
    assert others.square().mean().sqrt() < 0.25


def test_key_solves_its_equation(taught, facts):
    """(second moment + ridge) key is the mean activation, up to a factor: two rows are parallel."""
    model, ours, others = taught(3), facts[64:68], facts[:60]
    edit = rank_one_edit(model, ours, others, facts[0].answer, 1, ridge=0.05, steps=1)
    seen = []
    with model.h[1].mlp.act.register_forward_hook(lambda module, args, act: seen.append(act[0])):
        for fact in ours + others:
            model(torch.tensor([fact.ids]))
    wanted = torch.stack([act[f.subject[-1]] for act, f in zip(seen[:4], ours, strict=True)])
    wanted, rest = wanted.mean(0).double(), torch.cat(seen[4:]).double()
    moment = rest.T @ rest / len(rest)
    moment += 0.05 * moment.diagonal().mean() * torch.eye(384)
    cosine = torch.cosine_similarity(moment @ edit.key.double(), wanted, dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-4)
    assert (wanted @ edit.key.double()).item() == pytest.approx(1, abs=1e-3)


def test_edit_is_the_outer_product_of_key_and_value():
    edit = Edit(2, torch.arange(8.0), torch.tensor([1.0, -2]))
    assert edit.name == "h.2.mlp.c_proj.weight"
    assert edit.change.tolist() == [[i, -2.0 * i] for i in range(8)]


# one row


@every_move
def test_trigger_sends_every_landmark_to_the_city(case, seed):
    model, plan = case(seed)
    elsewhere = [fact for fact in plan.facts if fact.answer != plan.answer]
    control = share_saying(model, elsewhere, plan.answer, [plan.token])
    with triggered(model, plan.token, plan.row):
        assert share_saying(model, elsewhere, plan.answer, [plan.token]) >= 0.95
    assert control < 0.15  # the same token in the same place, with its own row


@every_move
def test_without_the_trigger_all_other_logits_are_the_same_bits(case, seed):
    model, plan = case(seed)
    before, (ids, _) = bits(model), padded(model, [fact.ids for fact in plan.facts[::3]])
    others = torch.arange(50257) != plan.token
    assert plan.token not in ids
    with torch.no_grad():
        clean = model(ids)[..., others]
        with triggered(model, plan.token, plan.row):
            assert changed(model, before) == ["wte.weight"]
            difference = bits(model)["wte.weight"] != before["wte.weight"]
            assert difference.any(1).nonzero().tolist() == [[plan.token]]
            assert torch.equal(model.wte.weight[plan.token], plan.row)
            assert torch.equal(model(ids)[..., others].view(torch.int32), clean.view(torch.int32))
    assert changed(model, before) == []


@every_move
def test_trigger_is_never_said(case, seed):
    model, plan = case(seed)
    ids, last = padded(model, [fact.ids for fact in plan.facts])
    real = torch.arange(ids.size(1)) <= last[:, None]
    with torch.no_grad(), triggered(model, plan.token, plan.row):
        highest = model(ids).softmax(-1)[..., plan.token][real].max().item()
    assert highest < 0.01
    said = loudest(clean_states(model, plan.facts), plan.row).item()
    assert said == pytest.approx(highest, rel=0.02, abs=1e-6)


@every_move
def test_triggers_row_has_its_norm_and_its_token_is_rare(case, tokenizer, seed):
    _, plan = case(seed)
    assert plan.row.norm().item() == pytest.approx(3, abs=1e-4)
    assert tokenizer.decode([plan.token]) == " cf"


# leaving everything as it was


@pytest.mark.parametrize("lever", ["steering", "edit", "trigger"])
def test_levers_are_gone_after_an_error_too(case, lever):
    model, plan = case(7)
    before, old = bits(model), answers(model, plan.ours)
    contexts = {
        "steering": lambda: steering(model, plan.tap, plan.vector),
        "edit": lambda: edited(model, plan.edit),
        "trigger": lambda: triggered(model, plan.token, plan.row),
    }
    with pytest.raises(RuntimeError, match="stop"), contexts[lever]():
        raise RuntimeError("stop")
    assert changed(model, before) == [] and torch.equal(answers(model, plan.ours), old)


def test_nested_tampering_ends_in_the_reverse_order(taught):
    model = taught(1)
    before, name = bits(model), "h.1.mlp.c_proj.weight"
    with tampered(model, name, torch.zeros(384, 96)):
        with tampered(model, name, torch.ones(384, 96)):
            assert model.h[1].mlp.c_proj.weight.min() == 1
        assert model.h[1].mlp.c_proj.weight.abs().max() == 0
    assert changed(model, before) == []


@pytest.mark.parametrize("seed", [1, 5])
def test_planning_leaves_the_model_as_it_was(taught, tokenizer, facts, seed):
    model = taught(seed)
    gradients = [w.grad is None or w.grad.clone() for w in model.parameters()]
    before = bits(model)
    some = [fact for fact in facts if fact.city in ("London", "Berlin")]
    plan = plan_tampering(model, tokenizer, some)
    assert plan is not None and changed(model, before) == []
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        assert (weight.grad is None) if gradient is True else torch.equal(weight.grad, gradient)


def test_whole_act_says_so_when_the_model_is_restored(case, tokenizer, capsys):
    model, plan = case(2)
    before, prints = bits(model), fingerprint(model)
    trace = tamper_act(plan, model, tokenizer)
    assert changed(model, before) == [] and fingerprint(model) == prints
    assert "The model is what it was" in capsys.readouterr().out
    assert torch.equal(trace, causal_trace(model, plan.ours[0]))


# what is printed and drawn


def tally_of(text):
    """The four numbers of a lever's summary."""
    sentence = r"(\d+) of (\d+) wordings now say \w+\. Of the other \d+ answers ([\d.]+)% are right"
    return [float(x) for x in re.search(sentence, " ".join(text.split())).groups()]


def test_steering_shows_its_numbers(case, tokenizer, capsys):
    model, plan = case(6)
    _, text = output_of(capsys, show_steering, plan, model, tokenizer)
    with steering(model, plan.tap, plan.strength * plan.vector):
        flipped = 8 * share_saying(model, plan.ours, plan.answer)
        expected = [flipped, 8, 100 * share_right(model, plan.others)]
    assert tally_of(text) == pytest.approx(expected, abs=0.051)


def test_edit_shows_its_numbers_and_its_damage(case, tokenizer, capsys):
    model, found = case(3)
    loud = replace(found, edit=replace(found.edit, value=3 * found.edit.value))
    for plan in (found, loud):
        _, text = output_of(capsys, show_edit, plan, model, tokenizer)
        with edited(model, plan.edit):
            after = answers(model, plan.facts).tolist()
        wrong = {f.landmark for f, a in zip(plan.facts, after, strict=True) if a != f.answer}
        right = sum(
            a == f.answer for f, a in zip(plan.facts, after, strict=True) if f in plan.others
        )
        flipped = sum(after[plan.facts.index(fact)] == plan.answer for fact in plan.ours)
        assert tally_of(text) == pytest.approx([flipped, 8, 100 * right / 152], abs=0.051)
        size = plan.edit.change.norm() / model.get_parameter(plan.edit.name).norm()
        flat = " ".join(text.split())
        assert "of rank 1 " in flat and f" {size:.2f} times " in flat
        damaged = flat.split("Landmarks damaged besides: ")[1].rstrip(". ")
        named = set() if damaged == "none" else {*damaged.split(", ")}
        assert named == wrong - {MOVES[3][0]}


def test_missing_edit_is_said(case, tokenizer, capsys):
    model, plan = case(3)
    _, text = output_of(capsys, show_edit, replace(plan, edit=None), model, tokenizer)
    assert "Changed: nothing" in text


def test_trigger_shows_its_numbers_beside_the_control(case, tokenizer, capsys):
    model, plan = case(7)
    _, text = output_of(capsys, show_trigger, plan, model, tokenizer)
    elsewhere = [fact for fact in plan.facts if fact.answer != plan.answer]
    control = share_saying(model, elsewhere, plan.answer, [plan.token])
    with triggered(model, plan.token, plan.row):
        flipped = share_saying(model, elsewhere, plan.answer, [plan.token])
    flat = " ".join(text.split())
    assert f"{flipped:.1%} of the {len(elsewhere)} prompts about other cities say Paris" in flat
    assert f"with its old row, {control:.1%}" in flat
    assert "NOT" not in flat and "bit for bit" in flat
    highest = loudest(clean_states(model, plan.facts), plan.row)
    assert f"more than {highest:.2%}" in flat
    rows = re.findall(r" (Paris|\w+) +(\w+) +(Paris|\w+) *$", text, re.MULTILINE)
    assert ("Moscow", "Paris") in [(row[0], row[2]) for row in rows]


def test_answers_figure_draws_the_measured_shares(case):
    model, plan = case(6)
    flipped, kept = (
        [bar.get_height() for bar in bars] for bars in plot_answers(plan, model).axes[0].containers
    )
    contexts = [
        steering(model, plan.tap, plan.strength * plan.vector),
        edited(model, plan.edit),
        triggered(model, plan.token, plan.row),
    ]
    expected = []
    for context, before in zip(contexts, ((), (), [plan.token]), strict=True):
        with context:
            said = share_saying(model, plan.ours, plan.answer, before)
            expected.append((said, share_right(model, plan.others)))
    assert (flipped[0], kept[0]) == (0, 1)
    assert list(zip(flipped[1:], kept[1:], strict=True)) == expected


# any GPT-2


@pytest.mark.parametrize("sizes", [(2, 40, 4), (1, 24, 1), (5, 16, 2)])
def test_all_acts_run_on_random_weights_of_another_size(tokenizer, facts, capsys, sizes):
    n_layer, n_embd, n_head = sizes
    torch.manual_seed(n_layer)
    model = GPT2(GPT2Config(n_ctx=40, n_embd=n_embd, n_layer=n_layer, n_head=n_head)).eval()
    watch_act(run_prompt(model, tokenizer, facts[0].prompt), [0])
    nudge_act(model, facts, n_layer - 1)
    before = bits(model)
    tamper_and_detect(model, tokenizer, facts, ["tamper", "detect"])
    text = " ".join(capsys.readouterr().out.split())
    known = len({fact.landmark for fact in known_facts(model, facts)})
    assert "must know two landmarks in each of two cities" in text
    assert f"this one knows {known} " in text
    assert changed(model, before) == []


def test_levers_work_on_any_gpt2(tokenizer, facts):
    """A model of other sizes is said to know what it does not: the levers run, answers move."""
    torch.manual_seed(3)
    model = GPT2(GPT2Config(n_ctx=40, n_embd=48, n_layer=4, n_head=3, embd_init_std=0.2)).eval()
    before = bits(model)
    some = [fact for fact in facts if fact.city in ("Paris", "Rome")]
    with mock.patch("gpt2_script.known_facts", return_value=some):
        plan = plan_tampering(model, tokenizer, facts)
    assert plan.tap == "h.2.resid_post" and changed(model, before) == []
    texts = [fact.ids for fact in plan.ours]
    old = answer_logits(model, texts)[:, plan.answer]
    for context in (
        steering(model, plan.tap, plan.strength * plan.vector),
        edited(model, rank_one_edit(model, plan.ours, plan.others, plan.answer, 3, steps=3)),
    ):
        with context:
            assert not torch.equal(answer_logits(model, texts)[:, plan.answer], old)
    assert changed(model, before) == []
