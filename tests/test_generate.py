"""Generation: what a model without a cache would say, drawn as the definition says."""

import math
from functools import partial

import pytest
import torch
from conftest import SMALL, pair
from hypothesis import example, given
from hypothesis import strategies as st

from gpt2_script import generate, next_probabilities, patch

OURS, THEIRS = pair(SMALL, torch.float64)
for name, weight in OURS.named_parameters():
    if name.endswith("bias"):
        weight.data.zero_()  # or one token would be the likeliest everywhere


@given(length=st.integers(1, 16), count=st.integers(0, 20))
@example(length=16, count=3)
@example(length=1, count=20)
def test_greedy_equals_transformers_until_the_context_is_full(length, count):
    ids = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))
    expected, new = ids, min(count, 16 - length)
    if new:
        settings = {"do_sample": False, "use_cache": False, "pad_token_id": 50}
        expected = THEIRS.generate(ids, max_new_tokens=new, **settings)
    assert torch.equal(generate(OURS, ids, count), expected)


def test_drawn_with_a_cache_equals_drawn_without(ids):
    """To the token, under one seed."""
    expected, generator = ids, torch.Generator().manual_seed(7)
    for _ in range(11):
        probabilities = next_probabilities(OURS(expected)[:, -1].detach(), 2.0, 12)
        new = probabilities.multinomial(1, generator=generator)
        expected = torch.cat((expected, new), dim=1)
    assert torch.equal(generate(OURS, ids, 11, 2.0, 12, seed=7), expected)


def test_each_step_computes_one_token_and_one_row_of_logits(model, ids):
    shapes = {"embed": [], "logits": []}

    def note(name, value):
        shapes[name].append(list(value.shape))
        assert not value.requires_grad
        return value

    with patch(model, {name: partial(note, name) for name in shapes}):
        generate(model, ids, 3)
    assert shapes["embed"] == [[2, 5, 24], [2, 1, 24], [2, 1, 24]]
    assert shapes["logits"] == [[2, 50]] * 3


def test_a_seed_decides_or_else_torchs_own(model, ids):
    """The first leaves torch's own random numbers alone."""
    draw = partial(generate, model, ids, 11, temperature=1.5)
    torch.manual_seed(5)
    seeded, other_seed, first, second = draw(seed=0), draw(seed=1), draw(), draw()
    assert torch.equal(draw(seed=0), seeded)
    assert not torch.equal(other_seed, seeded)
    assert not torch.equal(second, first)
    torch.manual_seed(5)
    assert torch.equal(draw(), first)


SHARES = [0.1, 0.4, 0.2, 0.3]
EXAMPLES = [
    (SHARES, {}, SHARES),
    (SHARES, {"temperature": math.inf}, [1 / 4] * 4),
    (SHARES, {"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
    (SHARES, {"temperature": 5e-324}, [0, 1, 0, 0]),
    (SHARES, {"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),  # 4/7 alone reaches the sum
    ([1] * 5, {"top_k": 3}, [1 / 3] * 3 + [0] * 2),  # of equals, the first ones
    ([1] * 5, {"temperature": 0}, [1, 0, 0, 0, 0]),
    ([1] * 4, {"top_p": 0.5}, [0.5, 0.5, 0, 0]),
]


@pytest.mark.parametrize("shares, arguments, expected", EXAMPLES)
def test_the_definition_by_examples(shares, arguments, expected):
    logits = torch.tensor(shares).log().expand(3, 2, -1)
    found = next_probabilities(logits, **arguments)
    assert found.shape == logits.shape
    assert found[2, 1].tolist() == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("length, count", [(0, 1), (0, 0), (17, 0), (17, 1), (1, -1)])
def test_no_tokens_too_many_or_fewer_than_none_are_refused(model, length, count):
    message = f"{length} tokens and {count} more.* 1 to 16"
    with pytest.raises(ValueError, match=message):
        generate(model, torch.zeros(1, length, dtype=torch.long), count)


SENSELESS = [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}]
SENSELESS += [{"top_p": 1.1}, {"top_p": math.nan}]
SENSELESS += [{"temperature": 0, "top_k": 0}]  # also where it would not matter


@pytest.mark.parametrize("arguments", SENSELESS, ids=str)
def test_settings_without_a_meaning_are_refused(model, ids, arguments):
    """Also with nothing to add."""
    with pytest.raises(ValueError, match="temperature is at least 0, top_k"):
        generate(model, ids, 0, **arguments)
