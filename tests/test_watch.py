"""The watched run: every printed number is the model's."""

import math
import re

import pytest
import torch

from gpt2_script import (
    GPT2,
    PRESETS,
    TOUR,
    GPT2Config,
    load_tokenizer,
    logit_lens,
    plot_logit_lens,
    plot_patterns,
    plot_stream,
    run_prompt,
    show_blocks,
    show_dropout,
    show_in_brief,
    show_journey,
    show_logit_lens,
    show_probabilities,
    show_step,
    show_tokens,
    tapped,
)

PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(3)
    return run_prompt(GPT2(PRESETS["nano"]).eval(), load_tokenizer(), PROMPT)


def output_of(capsys, show, *arguments):
    show(*arguments)
    return capsys.readouterr().out


def table(text):
    """The rows of numbers in a printed table: {row's name: its numbers}."""
    rows = re.findall(r"^(\d+ '.*?') +(.*?) *$", text, re.MULTILINE)
    return {name: [float(x) for x in rest.split() if x != "..."] for name, rest in rows}


def test_run_holds_what_flowed(run):
    ids = torch.tensor([run.ids])
    with torch.no_grad():
        assert torch.equal(run.seen["logits"], run.model(ids)[0])
    assert list(run.seen) == list(tapped(run.model, ["*"]))


def test_tokens_show_id_piece_and_bytes(run, capsys):
    text = output_of(capsys, show_tokens, run)
    assert re.search(r"4 ' Tower' +8765 +20 54 6f 77 65 72", text)
    assert "34 bytes became 10 ids" in text


STEPS = ["wte", "wpe", "h.1.resid_pre", "h.1.ln_1", "h.1.attn.out", "h.1.mlp.act", "ln_f", "logits"]


@pytest.mark.parametrize("name", STEPS)
def test_corner_holds_the_taps_numbers(run, capsys, name):
    rows = table(output_of(capsys, show_step, run, name))
    value = run.seen[name]
    assert list(rows) == [run.tokens[i] for i in (0, 1, 2, 3, 9)]
    for i, numbers in zip((0, 1, 2, 3, 9), rows.values(), strict=True):
        columns = [*range(len(numbers) - 1), -1]
        assert numbers == pytest.approx(value[i, columns].tolist(), abs=6e-4)


@pytest.mark.parametrize("name", ["h.0.attn.q", "h.0.attn.k", "h.0.attn.v", "h.0.attn.heads"])
def test_corner_of_heads_is_head_0(run, capsys, name):
    rows = table(output_of(capsys, show_step, run, name))
    assert rows["9 ' of'"][0] == pytest.approx(run.seen[name][0, 9, 0].item(), abs=6e-4)


def test_mask_shows_what_softmax_gets(run, capsys):
    rows = table(output_of(capsys, show_step, run, "h.0.attn.mask"))
    assert rows["0 'The'"][1:] == [-math.inf] * (len(rows["0 'The'"]) - 1)
    assert math.inf not in [abs(x) for x in rows["9 ' of'"]]


def test_heat_maps_show_every_heads_pattern_in_percent(run, capsys):
    text = output_of(capsys, show_step, run, "h.0.attn.pattern")
    assert re.findall(r"head (\d)", text) == ["0", "1", "2", "3"]
    last = [line for line in text.splitlines() if line.startswith("9 ' of'")]
    shown = [int(x) for line in last for x in re.sub(r"9 ' of'", "", line).split()]
    assert shown == (100 * run.seen["h.0.attn.pattern"][:, -1]).round().int().flatten().tolist()
    assert text.count("·") == 4 * 45


@pytest.mark.parametrize(
    "name, before",
    [("embed", "wte"), ("h.0.resid_mid", "embed"), ("h.2.resid_post", "h.2.resid_mid")],
)
def test_sums_show_how_each_vector_changed(run, capsys, name, before):
    rows = table(output_of(capsys, show_step, run, name))
    old, new = run.seen[before], run.seen[name]
    for token, numbers in zip(range(10), rows.values(), strict=True):
        a, b = old[token], new[token]
        cosine = (a @ b / a.norm() / b.norm()).item()
        expected = [a.norm().item(), b.norm().item(), (b - a).norm().item(), cosine]
        assert numbers == pytest.approx(expected, abs=6e-4)


def test_every_step_has_its_shapes(run, capsys):
    """The last shape in a step's formula is the value's."""
    for name in run.seen:
        formula = output_of(capsys, show_step, run, name).splitlines()[2]
        shape = [int(n) for n in re.findall(r"\[([\d, ]+)\]", formula)[-1].split(", ")]
        assert shape == list(run.seen[name].shape), name


def test_dropout_is_idle_and_says_what_it_would_do(run, capsys):
    text = output_of(capsys, show_dropout, run)
    share = int(re.search(r"(\d+) of these 960", text)[1]) / 960
    assert 0.05 < share < 0.15 and "Changed: nothing" in text


def test_blocks_in_brief(run, capsys):
    text = output_of(capsys, show_in_brief, run, [1, 2])
    row = [float(x) for x in re.search(r"^h\.2 +(.*)$", text, re.MULTILINE)[1].split()]
    names = ["h.2.resid_pre", "h.2.attn.out", "h.2.mlp.out", "h.2.resid_post"]
    assert row[:4] == pytest.approx([run.seen[n][-1].norm().item() for n in names], abs=6e-4)


def test_blocks_are_shown_once_each_in_order(run, capsys):
    text = output_of(capsys, show_blocks, run, [1])
    headings = re.findall(r"^(h\.\S+) ─", text, re.MULTILINE)
    assert headings == ["h.0", *(f"h.1.{key}" for key in list(TOUR)[3:-2]), "h.2"]


def test_probabilities_are_the_five_largest(run, capsys):
    shown = re.findall(r"█ +(\S.*?) +([\d.]+)%", output_of(capsys, show_probabilities, run))
    top = run.seen["logits"][-1].softmax(-1).topk(5)
    assert [float(share) / 100 for _, share in shown] == pytest.approx(
        top.values.tolist(), abs=6e-6
    )


def test_logit_lens_ends_in_the_models_answer(run, capsys):
    lens = logit_lens(run.model, run.seen)
    assert lens.shape == (4, 50257)
    assert torch.allclose(lens.sum(-1), torch.ones(4), atol=1e-5)
    assert torch.allclose(lens[-1], run.seen["logits"][-1].softmax(-1), atol=1e-7)
    embed = run.model.ln_f(run.seen["embed"][-1]) @ run.model.wte.weight.T
    assert torch.allclose(lens[0], embed.softmax(-1), atol=1e-7)
    assert f"{lens[0, lens[-1].argmax()]:.3%} → {lens[-1].max():.3%}" in output_of(
        capsys, show_logit_lens, run
    )


def test_journey_goes_from_embed_to_the_end(run, capsys):
    rows = table(output_of(capsys, show_journey, run))
    a, b = run.seen["embed"].norm(dim=-1), run.seen["h.2.resid_post"].norm(dim=-1)
    assert [row[0] for row in rows.values()] == pytest.approx(a.tolist(), abs=6e-4)
    assert [row[1] for row in rows.values()] == pytest.approx(b.tolist(), abs=6e-4)


@pytest.mark.parametrize(
    "config", [GPT2Config(50257, 8, 6, 1, 1), GPT2Config(50257, 64, 40, 2, 10)]
)
@pytest.mark.parametrize("prompt", ["a", "a b c d e f"])
def test_other_sizes_are_shown_too(config, prompt, capsys):
    run = run_prompt(GPT2(config).eval(), load_tokenizer(), prompt)
    show_blocks(run, [0])
    for name in ("wte", "wpe", "embed", "ln_f", "logits"):
        show_step(run, name)
    for show in (show_tokens, show_dropout, show_probabilities, show_logit_lens, show_journey):
        show(run)
    assert capsys.readouterr().out.count("Changed: ") >= 26


def test_figures_draw_the_runs_numbers(run):
    patterns = plot_patterns(run, 2)
    images = [axis.images[0].get_array() for axis in patterns.axes if axis.images]
    assert len(images) == 4
    drawn = torch.tensor(images[3].filled(0))
    assert torch.allclose(drawn.nan_to_num(), run.seen["h.2.attn.pattern"][3])
    lines = plot_stream(run).axes[0].lines
    assert lines[9].get_ydata()[-1] == pytest.approx(run.seen["h.2.resid_post"][9].norm().item())
    bars = plot_logit_lens(run).axes[0].patches
    expected = logit_lens(run.model, run.seen).max(-1).values.tolist()
    assert [bar.get_width() for bar in bars] == pytest.approx(expected)
