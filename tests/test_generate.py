"""Generation: equal to what a model without a cache would say, drawn as the definition says."""

import math
from functools import partial

import pytest
import torch
from conftest import SMALL, pair
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gpt2_script import GPT2, GPT2Config, generate, next_probabilities, patch

OURS, THEIRS = pair(SMALL, dtype=torch.float64)
GREEDY = {"do_sample": False, "use_cache": False, "eos_token_id": None, "pad_token_id": 50}


@given(length=st.integers(1, 16), count=st.integers(0, 20), seed=st.integers(0, 99))
@example(16, 3, 0)
@example(1, 20, 0)
def test_greedy_equals_transformers_until_the_context_is_full(length, count, seed):
    ids = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(seed))
    new = min(count, 16 - length)
    expected = THEIRS.generate(ids, max_new_tokens=new, **GREEDY) if new else ids
    assert torch.equal(generate(OURS, ids, count), expected)
    assert torch.equal(generate(OURS, ids, count, temperature=2, top_k=1), expected)


def test_each_step_computes_one_token_and_one_row_of_logits(model, ids):
    got = []
    note = dict.fromkeys(["embed", "logits"], lambda x: got.append((x.shape, x.requires_grad)) or x)
    with patch(model, note):
        generate(model, ids, 3)
    new = [((2, 1, 24), False), ((2, 50), False)]
    assert got == [((2, 5, 24), False), *new[1:], *new, *new]


def test_endoftext_ends_nothing():
    """Neither as the prompt's last token nor where all texts say it."""
    end, said = 50256, iter([50256, 50256, 464, 50256])
    model = GPT2(GPT2Config(n_ctx=16, n_embd=4, n_layer=1, n_head=1)).eval()
    say = {"logits": lambda x: torch.full_like(x, -1e9).index_fill(-1, torch.tensor(next(said)), 0)}
    with patch(model, say):
        text = generate(model, torch.tensor([[464, end]]), 4)
    assert text.tolist() == [[464, end, end, end, 464, end]]


def test_the_same_seed_draws_the_same(model, ids):
    draw = partial(generate, model, ids, 11, temperature=1.5)
    state, first = torch.get_rng_state(), draw(seed=0)
    assert not torch.equal(draw(), draw()) and not torch.equal(draw(seed=1), first)
    assert torch.equal(torch.get_rng_state(), state)  # others' random numbers stay what they were
    torch.rand(1)
    assert torch.equal(draw(seed=0), first)


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30, unique=True),
    *map(st.sampled_from, ([0.3, 1, 2.5], [None, 1, 3, 100], [None, 0.05, 0.505, 0.93, 1])),
)
def test_probabilities_are_those_of_transformers(scores, temperature, top_k, top_p):
    logits = torch.tensor([scores]).double() / 7
    theirs = TemperatureLogitsWarper(float(temperature))(None, logits)
    theirs = TopKLogitsWarper(top_k or 100)(None, theirs)
    theirs = TopPLogitsWarper(float(top_p or 1))(None, theirs)
    ours = next_probabilities(logits, temperature, top_k, top_p)
    assert torch.allclose(ours, theirs.softmax(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shares, arguments, expected", [
    *(([0.1, 0.4, 0.2, 0.3], (x,), [1 / 4] * 4) for x in (math.inf, 1e30)),
    *(([0.1, 0.4, 0.2, 0.3], (x,), [0, 1, 0, 0]) for x in (0, 5e-324, 1e-30)),
    ([0.1, 0.4, 0.2, 0.3], (), [0.1, 0.4, 0.2, 0.3]),
    ([0.1, 0.4, 0.2, 0.3], (1, 2, 0.5), [0, 1, 0, 0]),  # of what top_k left, 4/7 reaches 0.5
    # of equal scores exactly k are kept, and the first one wins
    ([1] * 9000, (1, 3), [1 / 3] * 3 + [0] * 8997), ([1] * 5, (0,), [1, 0, 0, 0, 0]),
    ([1] * 4, (1, None, 0.5), [0.5, 0.5, 0, 0]),
])  # fmt: skip
def test_examples(shares, arguments, expected):
    found = next_probabilities(torch.tensor(shares).log().expand(3, 2, -1), *arguments)
    assert found.dtype == torch.double and found.shape == (3, 2, len(shares))
    assert found[2, 1].tolist() == pytest.approx(expected, rel=1e-6, abs=0)


def test_frequencies_are_the_probabilities(model, ids):
    count, arguments = 4000, (2, 12, 0.6)
    drawn = generate(model, ids[:1].expand(count, -1), 1, *arguments, seed=0)[:, -1]
    shares = next_probabilities(model(ids[:1])[0, -1].detach(), *arguments)
    found = torch.bincount(drawn, minlength=50) / count
    assert ((found - shares).abs() <= 4 * (shares * (1 - shares) / count).sqrt()).all()
    assert shares.count_nonzero() > 2


def test_what_makes_no_sense_is_refused(model, ids):
    """Also where it would not matter: at temperature 0, with nothing to add."""
    for length, count in ((0, 1), (0, 0), (17, 1), (17, 0), (1, -1), (16, -1)):
        with pytest.raises(ValueError, match=f"{length} tokens and {count} more.* 1 to 16"):
            generate(model, torch.zeros(1, length, dtype=torch.long), count)
    nan = math.nan
    for arguments in ((-1,), (nan,), (1, 0), (1, None, 0), (1, None, 1.1), (1, None, nan), (0, 0)):
        for call in (partial(next_probabilities, torch.zeros(3)), partial(generate, model, ids, 0)):
            with pytest.raises(ValueError, match="temperature"):
                call(*arguments)
