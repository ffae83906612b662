"""The watched run: what it says is true, and each number that it shows is the model's.

To renew the transcript, and then to read it:
PYTHONPATH=. COLUMNS=80 python tests/test_watch.py > tests/transcript.txt"""

import json
import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import by_name, drawn, tokenizer
from safetensors.torch import save_file

import gpt2_script as gpt
from gpt2_script import PROMPT, GPT2Config, run_prompt, watch_act

TRANSCRIPT = Path(__file__).with_name("transcript.txt")
NUMBER = re.compile(r"-?\d+\.\d+|\de-\d+")
TINY = GPT2Config(n_ctx=32, n_embd=8, n_layer=2, n_head=2)
OTHER = GPT2Config(n_ctx=12, n_embd=42, n_layer=1, n_head=14)
T = 10  # tokens of PROMPT
later = torch.ones(T, T).triu(1) > 0


def tiny(config=TINY):
    model = drawn(gpt.GPT2(config)).requires_grad_(False)
    for weight in model.parameters():
        weight *= 0.5  # so that no head looks at one token alone
    return model


@pytest.fixture(scope="module")
def run():
    return run_prompt(tiny(), tokenizer, PROMPT)


@pytest.fixture(scope="module")
def steps(run):
    """The act, both blocks in full: {name: Step}, in order."""
    return by_name(watch_act(run, layers=[0, 1]))


def print_transcript(folder):
    """What the script prints of a tiny model's files."""
    save_file(tiny().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"n_head": 2}))
    options = "--acts watch --layers all --generate 3".split()
    assert gpt.main(["--model", str(folder), *options]) == 0


def test_the_whole_act_says_what_it_said(tmp_path, capsys, monkeypatch):
    """Words exactly, numbers within what rounding may change."""
    monkeypatch.setattr(gpt.console, "width", 80)
    print_transcript(tmp_path)
    now = " ".join(capsys.readouterr().out.split())
    then = " ".join(TRANSCRIPT.read_text(encoding="utf-8").split())

    assert NUMBER.split(now) == NUMBER.split(then)
    numbers = list(map(float, NUMBER.findall(now)))
    assert numbers == pytest.approx(list(map(float, NUMBER.findall(then))), abs=0.0011)


def test_every_wire_is_shown_in_the_models_order_with_what_was_watched(run, steps):
    with gpt.watch(run.model) as seen:
        run.model(torch.tensor([run.ids]))
    assert [name for name in steps if name in seen] == list(seen)

    for name, value in seen.items():
        shown = steps[name].shown
        if isinstance(shown[0], list):
            continue  # a sum has a table instead, tested below
        if name.endswith("pattern"):
            value = value.masked_fill(later, math.nan)
        values = torch.stack([matrix.values for matrix in shown]).view_as(value)
        assert torch.equal(values.nan_to_num(9), value.nan_to_num(9)), name
        assert shown[-1].rows == run.tokens


def test_a_sum_tells_how_each_vector_changed(run, steps):
    before, after = run.seen["h.1.resid_mid"], run.seen["h.1.resid_post"]
    for i, row in enumerate(steps["h.1.resid_post"].shown[0]):
        old, new = before[i], after[i]
        cosine = old @ new / old.norm() / new.norm()
        expected = [old.norm(), new.norm(), (new - old).norm(), cosine]
        assert row.pop("token") == run.tokens[i]
        assert list(row.values()) == pytest.approx(torch.stack(expected), abs=1e-4)


def test_the_mask_hides_later_scores_and_what_leaks_is_told(run, steps):
    scores = run.seen["h.1.attn.scores"].masked_fill(later, -math.inf)
    shown = torch.stack([matrix.values for matrix in steps["h.1.attn.mask"].shown])
    assert torch.equal(shown, scores)

    name = "h.1.attn.pattern"
    assert torch.allclose(scores.softmax(-1), run.seen[name])
    leaky = replace(run, seen=run.seen | {name: run.seen[name] + 0.125})
    found = by_name(gpt.wire_steps(leaky, gpt.BLOCK, "h.1."))[name].found
    assert re.search(r"error 1e\+00 at most\)\. .* together: 11\.25\.$", found)


@pytest.mark.parametrize("prompt", ["a", PROMPT])
@pytest.mark.parametrize("config", [TINY, OTHER])
def test_every_formula_has_the_models_shapes(config, prompt):
    run = run_prompt(tiny(config), tokenizer, prompt)
    steps = by_name(watch_act(run, range(config.n_layer)))
    for name, value in run.seen.items():
        last = re.findall(r"\[([\d, ]+)\]", steps[name].formula)[-1]
        assert last == ", ".join(map(str, value.shape)), name

    C, D = config.n_embd, config.n_embd // config.n_head
    assert f"[{len(run.ids)}, {C}] @ [{C}, 50257]" in steps["logits"].formula
    assert f"√{D}: " in steps["h.0.attn.scores"].formula


def test_probabilities_and_lens_are_the_models(run, steps):
    p = run.model(torch.tensor([run.ids]))[0, -1].softmax(-1)
    best, rows = p.topk(5), steps["probabilities"].shown[0]
    words = [gpt.piece(tokenizer, token) for token in best.indices.tolist()]
    assert [row["next token"] for row in rows] == words
    assert [row["p"].strip() for row in rows] == [f"{x:.3%}" for x in best.values]

    stream = run.seen["h.0.resid_post"][-1]
    p = (run.model.ln_f(stream) @ run.model.wte.weight.T).softmax(-1)
    row = steps["logit lens"].shown[0][1]
    first, second = [f"{word} {x:.1%}" for word, x in gpt.largest(tokenizer, p, 2)]
    assert (row["after"], row["likeliest"], row["second"]) == ("h.0", first, second)
    assert row[f"p({words[0]})"].strip() == f"{p[best.indices[0]]:.3%}"


@pytest.mark.parametrize("tap", ["logits", "ln_f", "h.1.resid_post"])
def test_the_last_row_of_the_lens_is_the_answer_whatever_is_patched(tap):
    model = tiny()
    with gpt.patch(model, {tap: lambda x: x.flip(-1)}):
        run = run_prompt(model, tokenizer, PROMPT)
        p = model(torch.tensor([run.ids]))[0, -1].softmax(-1)
    assert torch.allclose(run.lens[-1], p)
    assert torch.equal(run.lens[:2], run_prompt(model, tokenizer, PROMPT).lens[:2])


def test_quotes_are_words_and_spaces_have_a_sign():
    words = run_prompt(tiny(), tokenizer, '" say "yes  it\'s').words
    assert words[:3] == ['"', "say", '"'] and "␣" in words and "'s" in words


def test_a_continuation_is_drawn_as_the_options_say(run):
    sampling = {"temperature": 3.0, "top_k": 4}
    steps = by_name(gpt.answer_steps(run, 4, seed=1, **sampling))
    logits, ids = run.seen["logits"][-1], torch.tensor([run.ids])
    drawn_with = gpt.next_probabilities(logits, **sampling)
    shown = [row["drawn with"].strip() for row in steps["probabilities"].shown[0]]
    assert shown == [f"{p:.3%}" for p in drawn_with[logits.topk(5).indices]]

    new = gpt.generate(run.model, ids, 4, seed=1, **sampling)[0, T:].tolist()
    text = f"{PROMPT!r} → {tokenizer.decode(new)!r}"
    assert steps["continuation"].shown == [text]
    assert steps["continuation"].formula == "temperature 3.0, top_k 4"


@pytest.mark.parametrize("likeliest, text", [(gpt.END_ID, ""), (464, "TheThe")])
def test_a_continuation_ends_with_the_text_or_with_the_context(likeliest, text):
    model = tiny(replace(TINY, n_ctx=12))
    model.wte.weight[likeliest] = 99 * model.ln_f.bias
    *_, step = gpt.answer_steps(run_prompt(model, tokenizer, PROMPT))
    added = 1 if text == "" else 2
    assert step.shown == [f"{PROMPT!r} → {text!r}"]
    assert step.found.startswith(f"Tokens added: {added}, of at most 12.")


def test_a_model_of_another_type_is_watched_too():
    run = run_prompt(tiny().bfloat16(), tokenizer, "b club")
    steps = by_name(watch_act(run, count=2))
    assert run.words == ["b", "club"]
    assert "added: 2, of at most 2" in steps["continuation"].found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print_transcript(Path(folder))
