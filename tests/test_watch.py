"""The watched run: every number that it tells is the model's."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import pieces, tokenizer
from torch.testing import assert_close

import gpt2_script as gpt
from gpt2_script import GPT2, PROMPT, GPT2Config, piece, run_prompt, tap_step, watch_act

T = 10  # tokens of PROMPT


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(3)
    return run_prompt(GPT2(gpt.PRESETS["nano"]).eval(), tokenizer, PROMPT)


@pytest.fixture(scope="module")
def steps(run):
    """The act, block 1 of 3 traced in full: {name: Step}, in order."""
    return {step.name: step for step in watch_act(run, [1])}


def test_steps_come_in_the_models_order(run, steps):
    block = [name for name in run.seen if name.startswith("h.1.")]
    block.insert(block.index("h.1.attn.pattern"), "h.1.attn.mask")
    assert list(steps) == [
        "Watch: a prompt on its way through GPT-2", "tokens", "wte", "wpe", "embed", "dropout",
        "h.0", *block, "h.2", "ln_f", "logits", "probabilities", "logit lens", "the whole way",
        "the cache", "continuation",
    ]  # fmt: skip
    act, *others = steps.values()
    count = sum(weight.numel() for weight in run.model.parameters())
    assert f"{count:,} parameters: 3 blocks, 4 heads, 96 numbers" in act.purpose
    assert "random draws" in act.purpose and all(step.purpose for step in others)
    assert "random" not in next(watch_act(run, trained=True)).purpose


def test_mask_and_pattern_are_what_softmax_gets_and_gives(run, steps):
    step, pattern = steps["h.1.attn.mask"], run.seen["h.1.attn.pattern"]
    values = torch.stack([matrix.values for matrix in step.shown])
    later = torch.ones(T, T).triu(1) > 0
    assert torch.equal(values, run.seen["h.1.attn.scores"].masked_fill(later, -torch.inf))
    assert step.found == "of each head's 10 × 10 scores, 45 became −∞."
    leaky = replace(run, seen=run.seen | {"h.1.attn.pattern": pattern + 0.125})
    for some, error, ahead in ((run, r"\de-0[78]", "0"), (leaky, r"1e\+00", "0.125")):
        found = tap_step(some, "h.1.attn.pattern").found
        assert re.search(rf"at most {error} off; largest weight ahead: {ahead}\.$", found)


def test_every_tap_is_shown_with_its_numbers_and_those_that_it_came_from(run):
    sums = {"embed": "wte", "resid_mid": "resid_pre", "resid_post": "resid_mid"}
    fired, how = list(run.seen), (torch.mean, lambda x: x.std(correction=0), torch.min, torch.max)
    for name, value in run.seen.items():
        step, heads = tap_step(run, name), value if value.dim() == 3 else value[None]
        if name not in ("wte", "wpe") and not name.endswith(("resid_pre", "pattern")):
            old, key = re.match(r"from (\S+) to (\S+): ", step.found).groups()
            source = "h.2.resid_post" if name == "ln_f" else name.removesuffix(key) + old
            assert name.endswith(key) and fired.index(source) < fired.index(name)
            told = [float(x) for x in re.findall(r"-?\d+\.\d+", step.found)]
            numbers = [f(run.seen[tap]).item() for f in how for tap in (source, name)]
            assert told == pytest.approx(numbers, abs=6e-4), name
        if (last := name.split(".")[-1]) in sums:
            assert old == sums[last]
            assert step.shown == [gpt.stream_change(run, run.seen[source], value)]
            continue
        assert torch.equal(torch.stack([matrix.values for matrix in step.shown]), heads), name
        for i, matrix in enumerate(step.shown):
            assert matrix.rows == run.tokens and matrix.is_pattern == name.endswith("pattern")
            assert matrix.title == (f"head {i} of 4" if value.dim() == 3 else ""), name
            assert (matrix.columns == run.tokens) == (value.shape[-2:] == (T, T)), name


def test_the_whole_way_tells_how_each_vector_changed(run, steps):
    [rows], a, b = steps["the whole way"].shown, run.seen["embed"], run.seen["h.2.resid_post"]
    norms = [x.norm(dim=1) for x in (a, b, b - a)]
    expected = torch.stack([*norms, (a * b).sum(1) / norms[0] / norms[1]], dim=1)
    assert_close(torch.tensor([[*row.values()][1:] for row in rows]), expected)
    assert [row["token"] for row in rows] == run.tokens


@pytest.mark.parametrize("prompt", ["a", PROMPT])
@pytest.mark.parametrize("sizes", [(12, 6, 1, 1), (64, 42, 2, 14)])
def test_every_formula_has_the_models_shapes(sizes, prompt):
    (_, C, L, H), run = sizes, run_prompt(GPT2(GPT2Config(50257, *sizes)).eval(), tokenizer, prompt)
    shown, n = {step.name: step for step in watch_act(run, range(L))}, len(run.ids)
    assert {*run.seen} < {*shown} and len(shown) == 13 + 16 * L
    for name, value in run.seen.items():
        last = re.findall(r"\[([\d, ]+)\]", shown[name].formula)[-1]
        assert last == ", ".join(map(str, value.shape)), name
    assert f"√{C // H}: " in shown["h.0.attn.scores"].formula
    assert f"[{n}, {C}] @ [{C}, 50257]" in shown["logits"].formula


def test_tokens_dropout_and_the_blocks_that_have_a_line_each(run, steps):
    [rows], found = steps["tokens"].shown, steps["dropout"].found
    assert rows[4] == {"position, piece": "4 ' Tower'", "id": 8765, "bytes": "20 54 6f 77 65 72"}
    assert len(rows) == T and "34 bytes became 10 ids" in steps["tokens"].found
    assert "nothing changed" in found and "(in training, p is 0.0)" in found
    other = run_prompt(GPT2(GPT2Config(n_embd=6, n_layer=1, n_head=1)).eval(), tokenizer, "a b")
    other.seen["embed"] *= 2
    found = [*gpt.text_steps(other)][-1].found
    assert "something changed" in found and "(in training, p is 0.1)" in found
    [[row]], ends = steps["h.2"].shown, [run.seen[f"h.2.resid_{x}"] for x in ("pre", "post")]
    assert {"token": run.tokens[-1]} | row == {"block": "h.2"} | gpt.stream_change(run, *ends)[-1]
    step = [*watch_act(run, [])][6]
    assert step.name == "h.0 to h.2" and step.shown[0][2] == row and len(step.shown[0]) == 3


def test_probabilities_and_lens_are_the_models(run, steps):
    [rows], answer = steps["probabilities"].shown, run.seen["logits"][-1].softmax(-1)
    top = answer.topk(5)
    for row, p, i in zip(rows, *top, strict=True):
        bar = "█" * max(1, round((12 * p / top[0][0]).item()))
        assert [*row.values()] == [piece(run.tokenizer, int(i)), f"{p:.3%}", bar]
    lens, taps = gpt.logit_lens(run.model, run.seen), [f"h.{i}.resid_post" for i in range(3)]
    assert torch.allclose(lens[-1], answer, atol=1e-7)
    for row, p, tap in zip(steps["logit lens"].shown[0], lens, ["embed", *taps], strict=True):
        read = run.model.ln_f(run.seen[tap][-1]) @ run.model.wte.weight.T
        assert torch.allclose(p, read.softmax(-1), atol=1e-7)
        after, two = tap.removesuffix(".resid_post"), pieces(p.topk(2).indices)
        assert [*row.values()] == [after, *two, f"{p[lens[-1].argmax()]:.3%}"]


def test_cache_holds_the_keys_and_values_of_the_run(run, steps):
    step = steps["the cache"]
    assert step.formula.startswith("6 × [1, 4, 10, 24]") and "5,760 numbers" in step.found
    assert "the very keys" in step.found
    for name in ("h.0.attn.k", "h.2.attn.v"):
        other = replace(run, seen=run.seen | {name: run.seen[name] + 1})
        assert "NOT the keys" in next(gpt.continuation_steps(other, 1)).found
    full = run_prompt(GPT2(GPT2Config(50257, 11, 6, 1, 1)).eval(), tokenizer, PROMPT)
    found = [[*gpt.continuation_steps(full, n)][-1].found for n in (12, 1, 0)]
    ends = [text.removeprefix("1 token was added") for text in found]
    assert ends == ["; the context of 11 is full.", ".", "0 tokens were added."]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 3}, {"temperature": 50}])
def test_continuation_shows_the_candidates_before_and_after_sampling(run, sampling):
    [*_, step] = gpt.continuation_steps(run, 4, seed=5, **sampling)
    new = gpt.generate(run.model, torch.tensor([run.ids]), 4, seed=5, **sampling)
    assert len(step.shown) == 4 and step.found == "4 tokens were added."
    assert step.shown[-1] == f"{PROMPT!r} goes on: {run.tokenizer.decode(new[0, T:].tolist())!r}"
    for i, rows in enumerate(step.shown[:3]):
        with torch.no_grad():
            logits = run.model(new[:, : T + i])[0, -1]
        drawn = gpt.next_probabilities(logits, **{"temperature": 0} | sampling)
        p, token = logits.softmax(-1), new[0, T + i].item()
        candidates = dict.fromkeys([*p.topk(5).indices.tolist(), token])
        for row, x in zip(rows, candidates, strict=True):
            shares = f"{p[x]:.2%}", f"{drawn[x]:.2%}"
            assert [*row.values()] == [piece(run.tokenizer, x), *shares, "←" * (x == token)]
    assert len(rows) == (6 if sampling == {"temperature": 50} else 5)
