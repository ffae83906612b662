"""Generation: equal to what a model without a cache would say, drawn as the definition says."""

import math

import pytest
import torch
from conftest import SMALL, pair
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper as Temperature
from transformers import TopKLogitsWarper as TopK
from transformers import TopPLogitsWarper as TopP

from gpt2_script import GPT2, GPT2Config, generate, next_probabilities, patch


@pytest.fixture(scope="module")
def model():
    return pair(SMALL)[0]


@pytest.mark.parametrize("wide", [False, True])
def test_greedy_equals_transformers(ids, wide):
    ours, theirs = pair(GPT2Config(n_layer=2) if wide else SMALL)
    arguments = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 11}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    assert torch.equal(generate(ours, ids, 11), expected)
    assert torch.equal(generate(ours, ids, 11, temperature=2, top_k=1), expected)
    assert len(set(expected[:, 5:].flatten().tolist())) > 2  # the texts do not stand still


@torch.no_grad()
@given(st.lists(st.integers(0, 49), min_size=1, max_size=16), st.integers(0, 20))
@example([7] * 16, 3)
@example([7], 0)
def test_greedy_equals_uncached_until_the_context_is_full(model, prompt, count):
    expected = ids = torch.tensor([prompt])
    for _ in range(min(count, 16 - len(prompt))):
        best = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, best), dim=1)
    assert torch.equal(generate(model, ids, count), expected)


@pytest.mark.parametrize("temperature", [0, 1])
def test_each_step_computes_one_token_and_one_row_of_logits(model, ids, temperature):
    """And keeps nothing for gradients."""
    passed, taps = [], ("embed", "logits")
    note = dict.fromkeys(taps, lambda x: passed.append((*x.shape, x.requires_grad)) or x)
    with patch(model, note):
        generate(model, ids, 3, temperature)
    new = [(2, 1, 24, False), (2, 50, False)]
    assert passed == [(2, 5, 24, False), (2, 50, False), *new, *new]


@pytest.mark.parametrize("temperature", [0, 1])
def test_endoftext_ends_nothing(temperature):
    """Neither as the prompt's last token nor where all texts say it."""
    end, said = 50256, iter([50256, 50256, 464, 50256])
    model = GPT2(GPT2Config(n_ctx=16, n_embd=4, n_layer=1, n_head=1)).eval()
    say = {"logits": lambda x: torch.full_like(x, -1e9).index_fill(-1, torch.tensor(next(said)), 0)}
    with patch(model, say):
        text = generate(model, torch.tensor([[464, end]]), 4, temperature)
    assert text.tolist() == [[464, end, end, end, 464, end]]


def test_the_same_seed_draws_the_same(model, ids):
    def draw(seed=None):
        return generate(model, ids, 11, temperature=1.5, seed=seed)

    state, first = torch.get_rng_state(), draw(0)
    assert not torch.equal(draw(), draw()) and not torch.equal(draw(1), first)
    assert torch.equal(torch.get_rng_state(), state)  # others' random numbers stay what they were
    torch.rand(1)
    assert torch.equal(draw(0), first)


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30, unique=True),
    *map(st.sampled_from, ([0.3, 1, 2.5], [None, 1, 3, 100], [None, 0.05, 0.505, 0.93, 1])),
)
def test_probabilities_are_those_of_transformers(scores, temperature, top_k, top_p):
    logits = theirs = torch.tensor([scores]).double() / 7
    for warp in (Temperature(float(temperature)), TopK(top_k or 100), TopP(float(top_p or 1))):
        theirs = warp(None, theirs)
    ours = next_probabilities(logits, temperature, top_k, top_p)
    assert torch.allclose(ours, theirs.softmax(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arguments, expected", [
    ((), [0.1, 0.4, 0.2, 0.3]),
    ((0,), [0, 1, 0, 0]),
    ((0.5,), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ((1, 2), [0, 4 / 7, 0, 3 / 7]),
    ((1, None, 0.5), [0, 4 / 7, 0, 3 / 7]),
    ((1, 2, 0.5), [0, 1, 0, 0]),  # top_p counts what top_k left: 4/7 alone reaches 0.5
    *(((temperature,), [0, 1, 0, 0]) for temperature in (1e-300, 1e-30)),
    *(((temperature,), [1 / 4] * 4) for temperature in (1e30, math.inf)),
])  # fmt: skip
def test_a_known_example(arguments, expected):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    shares = next_probabilities(logits.expand(3, 2, -1), *arguments)
    assert shares.dtype == torch.double and shares.shape == (3, 2, 4)
    assert shares[2, 1].tolist() == pytest.approx(expected)


def test_equal_scores_keep_exactly_k_and_the_first_wins():
    assert next_probabilities(torch.zeros(9000), top_k=3).nonzero().flatten().tolist() == [0, 1, 2]
    assert next_probabilities(torch.zeros(5), 0).tolist() == [1, 0, 0, 0, 0]
    assert next_probabilities(torch.zeros(4), top_p=0.5).tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("arguments", [(1,), (0.7, 8), (1.3, None, 0.8), (2, 12, 0.6)])
def test_frequencies_by_chi_squared(arguments, model, ids):
    """4,000 draws of one token; the statistic of right draws goes so far once in 10,000."""
    count = 4000
    drawn = generate(model, ids[:1].expand(count, -1), 1, *arguments, seed=0)[:, -1]
    with torch.no_grad():
        expected = count * next_probabilities(model(ids[:1])[0, -1], *arguments)
    found = torch.bincount(drawn, minlength=50).double()
    assert (found[expected == 0] == 0).all()
    rare = expected < 5  # together they make one class
    expected, found = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (expected, found))
    statistic = ((found - expected) ** 2 / expected).nansum()
    freedom = expected.count_nonzero().item() - 1
    assert freedom >= 2
    assert torch.special.gammainc(torch.tensor(freedom / 2).double(), statistic / 2) < 0.9999


@pytest.mark.parametrize("length, count", [(0, 1), (0, 0), (17, 1), (17, 0), (1, -1), (16, -1)])
def test_no_text_too_much_text_and_less_than_nothing(model, length, count):
    with pytest.raises(ValueError, match=f"{length} tokens and {count} more.* 1 to 16"):
        generate(model, torch.zeros(1, length, dtype=torch.long), count)


SENSELESS = [(-1,), (math.nan,), (1, 0), (1, -1), (1, None, 0), (1, None, 1.1), (1, None, math.nan)]
SENSELESS += [(0, 0), (0, None, 0), (0, None, -0.5)]


@pytest.mark.parametrize("arguments", SENSELESS)
def test_settings_that_make_no_sense(model, ids, arguments):
    """Refused also where they would not matter: at temperature 0, with nothing to add."""
    with pytest.raises(ValueError, match="temperature"):
        next_probabilities(torch.zeros(3), *arguments)
    for count in (0, 1):
        with pytest.raises(ValueError, match="temperature"):
            generate(model, ids, count, *arguments)
