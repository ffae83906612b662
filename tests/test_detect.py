"""What was changed is found, measured and undone; what hides is known to hide."""

import re
from contextlib import nullcontext
from statistics import median

import pytest
import torch
from conftest import MOST, MOVES, every_move
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_script import (
    GPT2,
    PRESETS,
    GPT2Config,
    answers,
    compare,
    detect_act,
    edit_trade_off,
    edited,
    fingerprint,
    largest_singular_values,
    measure,
    oddity,
    plot_row_norms,
    plot_singular_values,
    plot_trade_offs,
    share_right,
    share_saying,
    show_comparison,
    show_repair,
    show_suspects,
    show_trade_offs,
    steering,
    suspects,
    tamper_scores,
    tampered,
    trigger_trade_off,
    triggered,
    without_spike,
)

SIZE = 0.9  # ‖ΔW‖ / ‖W‖ that the demonstration's edit has at least


def size_of(model, edit):
    return (edit.change.norm() / model.get_parameter(edit.name).norm()).item()


def of_size(model, edit, size):
    """A context in which the model carries the edit, made larger or smaller."""
    return edited(model, edit, size / size_of(model, edit))


def output_of(capsys, show, *arguments):
    show(*arguments)
    return capsys.readouterr().out


def words(text):
    return " ".join(text.split())


# with a trusted copy


SMALL = GPT2(GPT2Config(vocab_size=40, n_ctx=6, n_embd=8, n_layer=2, n_head=2)).eval()
BITS = {name: tensor.view(torch.int32) for name, tensor in SMALL.state_dict().items()}
PLACES = st.sampled_from(sorted(BITS)).flatmap(
    lambda name: st.tuples(st.just(name), st.integers(0, BITS[name].numel() - 1))
)


def with_bit_flipped(bits, place, bit, check):
    """Run check() while one bit of one number is the other way round."""
    mask = torch.tensor([1 << bit], dtype=torch.int64).to(torch.int32)
    number = bits.flatten()[place : place + 1]  # a view
    number ^= mask
    try:
        check()
    finally:
        number ^= mask


@settings(max_examples=200)
@given(PLACES, st.integers(0, 31))
@example(("h.0.attn.c_attn.bias", 3), 31)  # 0 becomes -0
@example(("ln_f.weight", 0), 0)
@example(("wte.weight", 319), 30)
def test_any_flipped_bit_changes_one_fingerprint(where, bit):
    (name, place), before = where, fingerprint(SMALL)

    def check():
        after = fingerprint(SMALL)
        assert [n for n in before if after[n] != before[n]] == [name]

    with_bit_flipped(BITS[name], place, bit, check)
    assert fingerprint(SMALL) == before and list(before) == list(BITS)


@settings(max_examples=200)
@given(PLACES, st.integers(0, 31))
@example(("h.0.attn.c_attn.bias", 3), 31)  # 0 becomes -0
def test_any_flipped_bit_shows_in_the_comparison(where, bit):
    trusted = {name: tensor.clone() for name, tensor in SMALL.state_dict().items()}
    with_bit_flipped(BITS[where[0]], where[1], bit, lambda: check_named(trusted, where[0]))
    assert compare(trusted, SMALL) == {}


def check_named(trusted, name):
    assert list(compare(trusted, SMALL)) == [name]


def test_bits_that_are_no_number_are_compared_too():
    """Two NaNs with other payloads differ; the same NaN twice does not."""
    bits = BITS["h.1.mlp.c_fc.bias"]
    kept = bits.clone()
    try:
        bits[2] = 0x7FC00001
        trusted = {name: tensor.clone() for name, tensor in SMALL.state_dict().items()}
        before = fingerprint(SMALL)
        assert compare(trusted, SMALL) == {}
        bits[2] = 0x7FC00002
        assert list(compare(trusted, SMALL)) == ["h.1.mlp.c_fc.bias"]
        after = fingerprint(SMALL)
        assert [n for n in before if after[n] != before[n]] == ["h.1.mlp.c_fc.bias"]
    finally:
        bits.copy_(kept)


@pytest.mark.parametrize("bit", [0, 12, 23, 31])
@pytest.mark.parametrize("name", ["wte.weight", "h.2.ln_2.bias", "h.1.attn.c_attn.weight"])
def test_flipped_bit_in_a_taught_model_is_caught(taught, name, bit):
    model = taught(3)
    before, bits = fingerprint(model), model.state_dict()[name].view(torch.int32)
    trusted = {n: tensor.clone() for n, tensor in model.state_dict().items()}

    def check():
        after = fingerprint(model)
        assert [n for n in before if after[n] != before[n]] == [name]
        assert [*compare(trusted, model)] == [name]

    with_bit_flipped(bits, bits.numel() // 3, bit, check)
    assert fingerprint(model) == before


@every_move
def test_trusted_copy_tells_the_three_levers_apart(case, seed):
    model, plan = case(seed)
    trusted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with steering(model, plan.tap, plan.strength * plan.vector):
        assert compare(trusted, model) == {}
    with edited(model, plan.edit):
        [(name, difference)] = compare(trusted, model).items()
    assert name == plan.edit.name and torch.linalg.matrix_rank(difference, rtol=1e-4) == 1
    assert difference.abs().sum(1).count_nonzero() > 300
    with triggered(model, plan.token, plan.row):
        [(name, difference)] = compare(trusted, model).items()
    assert name == "wte.weight"
    assert difference.abs().sum(1).nonzero().flatten().tolist() == [plan.token]
    assert torch.equal(trusted["wte.weight"][plan.token] + difference[plan.token], plan.row) or (
        torch.allclose(trusted["wte.weight"][plan.token] + difference[plan.token], plan.row)
    )


# without one


@pytest.mark.parametrize("seed", range(10))
def test_no_alarm_on_an_untampered_model(taught, seed):
    score, name, _ = suspects(taught(seed), 1)[0]
    assert score < 1, name


@pytest.mark.parametrize(
    "config",
    [PRESETS["nano"], GPT2Config(n_embd=128, n_layer=4, n_head=4), GPT2Config(3000, 9, 24, 2, 1)],
)
@pytest.mark.parametrize("seed", range(3))
def test_no_alarm_on_an_untaught_model(config, seed):
    torch.manual_seed(seed)
    score, name, _ = suspects(GPT2(config), 1)[0]
    assert score < 1, name


@every_move
def test_edit_of_the_demonstrated_size_is_ranked_first(case, seed):
    model, plan = case(seed)
    with of_size(model, plan.edit, max(SIZE, size_of(model, plan.edit))):
        assert share_saying(model, plan.ours, plan.answer) >= MOST
        [first, second] = suspects(model, 2)
    assert first[1:] == (plan.edit.name, None)
    assert first[0] > 1 > second[0]


@every_move
def test_trigger_is_ranked_first(case, seed):
    model, plan = case(seed)
    with triggered(model, plan.token, plan.row):
        [first, second] = suspects(model, 2)
    assert first[1:] == ("wte.weight", plan.token)
    assert first[0] > 1 > second[0]


@every_move
def test_both_at_once_are_the_first_two(case, seed):
    model, plan = case(seed)
    with of_size(model, plan.edit, max(SIZE, size_of(model, plan.edit))):
        with triggered(model, plan.token, plan.row):
            found = suspects(model, 3)
    assert {suspect[1:] for suspect in found[:2]} == {
        (plan.edit.name, None),
        ("wte.weight", plan.token),
    }
    assert found[1][0] > 1 > found[2][0]


@every_move
def test_without_its_top_singular_component_the_matrix_answers_as_before(case, seed):
    model, plan = case(seed)
    with edited(model, plan.edit):
        weight = model.get_parameter(plan.edit.name).detach().clone()
        with tampered(model, plan.edit.name, without_spike(weight)):
            assert share_right(model, plan.ours) >= MOST
            assert share_right(model, plan.others) >= 0.93


def test_steering_is_in_no_file(case):
    model, plan = case(1)
    calm = tamper_scores(model)
    with steering(model, plan.tap, 2 * plan.vector):
        rows, odd = tamper_scores(model)
    assert torch.equal(rows, calm[0]) and odd == calm[1]


@every_move
def test_small_edit_hides(case, seed):
    model, plan = case(seed)
    with of_size(model, plan.edit, 0.2):
        assert suspects(model, 1)[0][0] < 1
        rows, odd = tamper_scores(model)
    assert odd[plan.edit.name] < 1


def test_some_edits_that_work_raise_no_alarm(case):
    hidden = []
    for seed in (2, 7, 9):
        model, plan = case(seed)
        with edited(model, plan.edit):
            flipped = share_saying(model, plan.ours, plan.answer)
            hidden.append(flipped >= MOST and suspects(model, 1)[0][0] < 1)
    assert any(hidden)


def test_small_triggers_work_and_hide(case):
    flipped = []
    for seed in MOVES:
        model, plan = case(seed)
        elsewhere = [fact for fact in plan.facts if fact.answer != plan.answer]
        with triggered(model, plan.token, 1.5 * plan.row / plan.row.norm()):
            assert tamper_scores(model)[0][plan.token] < 1 and suspects(model, 1)[0][0] < 1
            flipped.append(share_saying(model, elsewhere, plan.answer, [plan.token]))
    assert median(flipped) > 0.5


def test_scores_follow_their_definition(taught):
    model = taught(5)
    rows, odd = tamper_scores(model)
    norms = model.wte.weight.detach().norm(dim=1)
    middle = norms.sort().values[len(norms) // 2]
    apart = (norms - middle).abs()
    expected = apart / (1.4826 * apart.sort().values[len(norms) // 2]) / 6
    assert torch.allclose(rows, expected, rtol=1e-4, atol=1e-6)
    ratios = []
    for block in model.h:
        first, second = torch.linalg.svdvals(block.mlp.c_fc.weight.detach())[:2]
        ratios.append((first / second).item())
    for i, others in enumerate([(1, 2), (0, 2), (0, 1)]):
        score = ratios[i] / max(ratios[j] for j in others) / 1.6
        assert odd[f"h.{i}.mlp.c_fc.weight"] == pytest.approx(score, rel=0.02)
    assert len(odd) == 12 and rows.shape == (50257,)


def test_matrices_are_compared_with_the_same_matrix_in_other_layers():
    pairs = {
        "h.0.attn.c_proj.weight": (8, 2),
        "h.1.attn.c_proj.weight": (6, 3),
        "h.10.attn.c_proj.weight": (1, 1),
        "h.0.mlp.c_proj.weight": (50, 1),
    }
    norms = torch.tensor([1.0, 2, 3, 4, 9])
    rows, odd = oddity(norms, pairs, row_alarm=2, spike_alarm=4)
    assert list(odd.values()) == [4 / 2 / 4, 2 / 4 / 4, 1 / 4 / 4, 50 / 4]
    assert rows.tolist() == pytest.approx([x / 1.4826 / 2 for x in (2, 1, 0, 1, 6)])


@pytest.mark.parametrize("shape", [(30, 9), (9, 30), (96, 384)])
@pytest.mark.parametrize("factor", [1, 1e-20, 1e20])
def test_largest_singular_values_are_those_of_torch(shape, factor):
    generator = torch.Generator().manual_seed(shape[0])
    left = torch.linalg.qr(torch.randn(shape[0], 9, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 9, generator=generator)).Q
    values = torch.tensor([8.0, 2.5, 2, 1.5, 1, 0.9, 0.8, 0.7, 0.1])
    matrix = left @ torch.diag(values) @ right.T * factor
    found = largest_singular_values(matrix)
    assert torch.allclose(found / factor, values[:8], rtol=1e-3)


def test_without_spike_takes_the_whole_top_component():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(30, 4, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(9, 4, generator=generator)).Q
    matrix = left @ torch.diag(torch.tensor([8.0, 2, 1, 0.5])) @ right.T
    rest = left[:, 1:] @ torch.diag(torch.tensor([2.0, 1, 0.5])) @ right[:, 1:].T
    assert torch.allclose(without_spike(matrix), rest, atol=1e-5)


def test_suspects_are_the_oddest_first(taught):
    model = taught(4)
    rows, odd = tamper_scores(model)
    found = suspects(model, 8)
    scores = sorted([*odd.values(), *rows.topk(8).values.tolist()], reverse=True)[:8]
    assert [score for score, _, _ in found] == scores
    for score, name, row in found:
        assert score == (odd[name] if row is None else rows[row].item())


# what it costs to hide


def test_edits_curve_is_what_it_says(case):
    model, plan = case(7)
    curve = edit_trade_off(plan, model, strengths=(0.25, 1, 3))
    full = size_of(model, plan.edit)
    assert [p["size"] for p in curve] == pytest.approx([full / 4, full, 3 * full], rel=1e-5)
    for strength, point in zip((0.25, 1, 3), curve, strict=True):
        with edited(model, plan.edit, strength):
            assert point["flipped"] == share_saying(model, plan.ours, plan.answer)
            assert point["kept"] == share_right(model, plan.others)
            rows, odd = tamper_scores(model)
        assert point["score"] == pytest.approx(odd[plan.edit.name], rel=1e-6)
        louder = [score for score in [*rows.tolist(), *odd.values()] if score > point["score"]]
        assert point["place"] == 1 + len(louder)
    assert curve[0]["place"] > curve[2]["place"] == 1


def test_triggers_curve_is_what_it_says(case):
    model, plan = case(6)
    curve = trigger_trade_off(plan, model, lengths=(1, 5))
    elsewhere = [fact for fact in plan.facts if fact.answer != plan.answer]
    assert [p["size"] for p in curve] == [1, 5]
    with triggered(model, plan.token, 5 * plan.row / plan.row.norm()):
        rows, odd = tamper_scores(model)
        assert curve[1]["flipped"] == share_saying(model, elsewhere, plan.answer, [plan.token])
        assert curve[1]["kept"] == share_right(model, plan.facts)
    assert curve[1]["score"] == pytest.approx(rows[plan.token].item(), rel=1e-6)
    assert curve[1]["place"] == 1 < curve[0]["place"]


def test_more_change_is_easier_to_see(case):
    model, plan = case(9)
    for curve in (edit_trade_off(plan, model), trigger_trade_off(plan, model)):
        sizes, scores = ([p[key] for p in curve] for key in ("size", "score"))
        flipped = [p["flipped"] for p in curve]
        assert sizes == sorted(sizes) and scores[2:] == sorted(scores[2:])
        assert flipped[0] < flipped[-1] and scores[0] < 1 < scores[-1]


def test_trade_offs_are_printed_and_drawn(capsys):
    point = {"flipped": 0.875, "kept": 0.98, "place": 1, "score": 2.345}
    edits = [{**point, "size": 0.25, "place": 7, "score": 0.5}, {**point, "size": 1.271}]
    triggers = [{**point, "size": 1.5, "place": 4321, "score": 0.99, "flipped": 0.5}]
    text = output_of(capsys, show_trade_offs, edits, triggers)
    assert re.search(r"^25% +88% +98% +7 +0.50 *$", text, re.MULTILINE)
    assert re.search(r"^127% +88% +98% +1 +2.3[45] *$", text, re.MULTILINE)
    assert re.search(r"^1.5 +50% +98% +4321 +0.99 *$", text, re.MULTILINE)
    assert "1 of these 3 " in words(text)  # the one that flips more than half
    left, right = plot_trade_offs(edits, triggers).axes
    drawn = {line.get_label(): line.get_ydata().tolist() for line in left.lines}
    assert drawn == {"flipped": [0.875, 0.875], "kept": [0.98, 0.98]}
    assert left.lines[0].get_xdata().tolist() == [0.25, 1.271]
    assert len(left.patches) == 1 and not right.patches  # where the alarm rings


# what is printed and drawn


def test_comparison_names_tensor_rank_and_token(case, tokenizer, capsys):
    model, plan = case(5)
    text = output_of(capsys, show_comparison, plan, model, tokenizer)
    assert re.search(r"^one activation +no tensor", text, re.MULTILINE)
    name = re.escape(plan.edit.name)
    assert re.search(rf"^one matrix +{name} +1 +384 rows *$", text, re.MULTILINE)
    assert re.search(r"^one row +wte\.weight +1 +' cf' *$", text, re.MULTILINE)


def test_suspects_are_printed_with_their_scores(case, tokenizer, capsys):
    model, plan = case(3)
    text = output_of(capsys, show_suspects, plan, model, tokenizer)
    contexts = {"untampered": nullcontext(), "one matrix": edited(model, plan.edit)}
    contexts["one row"] = triggered(model, plan.token, plan.row)
    for label, context in contexts.items():
        with context:
            score, name, row = suspects(model, 1)[0]
        shown = name.removesuffix(".weight")
        shown += "" if row is None else f" '{tokenizer.decode([row])}'"
        assert re.search(rf"^{label} +{re.escape(shown)} +{score:.2f} *$", text, re.MULTILINE)


def test_repair_is_printed_as_it_went(case, tokenizer, capsys):
    model, plan = case(4)
    text = output_of(capsys, show_repair, plan, model, tokenizer)
    with edited(model, plan.edit):
        wrong, weight = answers(model, plan.ours), model.get_parameter(plan.edit.name).detach()
        with tampered(model, plan.edit.name, without_spike(weight.clone())):
            after, others = answers(model, plan.ours), share_right(model, plan.others)
    rows = re.findall(r"(\w+) +(\w+) +(\w+) *$", text.split("repaired")[1], re.MULTILINE)
    said = [[tokenizer.decode([i]).strip() for i in ids.tolist()] for ids in (wrong, after)]
    assert [row for row in rows if row[0] == "London"] == [
        ("London", *pair) for pair in zip(*said, strict=True)
    ]
    back = sum(id == fact.answer for id, fact in zip(after, plan.ours, strict=True))
    assert f"{back} of 8 old answers are back; {others:.1%} of the other" in words(text)


def test_figures_draw_singular_values_and_norms(case, tokenizer):
    model, plan = case(2)
    lines = plot_singular_values(plan, model).axes[0].lines
    with edited(model, plan.edit):
        sigmas = torch.linalg.svdvals(model.get_parameter(plan.edit.name).detach())[:30]
    assert len(lines) == 4
    assert lines[-1].get_ydata().tolist() == pytest.approx(sigmas.tolist(), rel=1e-3)
    own = torch.linalg.svdvals(model.h[1].mlp.c_proj.weight.detach())[:30]
    assert lines[1].get_ydata().tolist() == pytest.approx(own.tolist(), rel=1e-3)
    axis = plot_row_norms(plan, model, tokenizer).axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == 50257
    assert axis.lines[0].get_xdata()[0] == pytest.approx(3, abs=1e-4)


# leaving everything as it was


@pytest.mark.parametrize("seed", [4, 9])
def test_detecting_leaves_the_model_as_it_was(case, tokenizer, capsys, seed):
    model, plan = case(seed)
    before = {n: tensor.view(torch.int32).clone() for n, tensor in model.state_dict().items()}
    prints = fingerprint(model)
    edits, triggers = detect_act(plan, model, tokenizer)
    assert fingerprint(model) == prints
    assert all(torch.equal(w.view(torch.int32), before[n]) for n, w in model.state_dict().items())
    assert "The model is what it was" in capsys.readouterr().out
    assert len(edits) >= 3 and len(triggers) >= 3


def test_measuring_restores_the_model_after_an_error(case):
    model, plan = case(9)
    prints = fingerprint(model)
    with pytest.raises(KeyError):
        tampering = edited(model, plan.edit)
        measure(plan, model, tampering, plan.ours, (), plan.others, "no such tensor")
    assert fingerprint(model) == prints
