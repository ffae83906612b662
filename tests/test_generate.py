"""Generation: equal to what a model without a cache would say, drawn as the definition says."""

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from gpt2_script import GPT2, GPT2Config, generate, load_model, next_probabilities


@pytest.fixture(scope="module")
def model(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    return load_model(folder / "model.safetensors")


@torch.no_grad()
def uncached(model, ids, count):
    for _ in range(count):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


def test_greedy_equals_uncached_and_transformers(model, peer, ids):
    ours = generate(model, ids, 11)
    assert ours.shape == (2, 16) and ours.dtype == torch.long
    assert torch.equal(ours[:, :5], ids)
    assert torch.equal(ours, uncached(model, ids, 11))
    theirs = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=11,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(ours, theirs)
    assert len(set(ours[:, 5:].flatten().tolist())) > 2  # the texts do not stand still


@given(st.lists(st.integers(0, 49), min_size=1, max_size=16), st.integers(0, 20))
def test_greedy_equals_uncached_for_any_prompt(model, prompt, count):
    ids = torch.tensor([prompt])
    ours = generate(model, ids, count)
    assert ours.size(1) == min(len(prompt) + count, 16)
    assert torch.equal(ours, uncached(model, ids, ours.size(1) - len(prompt)))


def test_the_full_width_equals_transformers():
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2)).eval()
    model = GPT2(GPT2Config(n_layer=2)).eval()
    model.load_state_dict(peer.transformer.state_dict())
    ids = torch.randint(50257, (1, 32))
    arguments = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    assert torch.equal(generate(model, ids, 24), theirs)


def test_each_step_computes_one_token(model, ids):
    lengths = []
    with model.embed.register_forward_hook(lambda m, a, x: lengths.append(x.size(1))):
        generate(model, ids, 4)
    assert lengths == [5, 1, 1, 1]


def test_a_full_context_ends_the_text(model, ids):
    assert generate(model, ids, 50).shape == (2, 16)
    full = torch.zeros(1, 16, dtype=torch.long)
    assert torch.equal(generate(model, full, 3), full)
    assert torch.equal(generate(model, ids, 0), ids)


@pytest.mark.parametrize("length", [0, 17])
def test_no_text_and_too_much_text(length, model):
    with pytest.raises(ValueError, match="1 to 16"):
        generate(model, torch.zeros(1, length, dtype=torch.long), 1)


def test_the_same_seed_draws_the_same(model, ids):
    drawn = [generate(model, ids, 11, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    state = torch.get_rng_state()
    free = [generate(model, ids, 11, temperature=1.5) for _ in range(2)]
    assert not torch.equal(*free)
    assert torch.equal(torch.get_rng_state(), state)  # others' random numbers stay what they were


def test_nothing_is_kept_for_gradients(model, ids):
    assert not generate(model, ids, 2).requires_grad
    assert all(weight.grad is None for weight in model.parameters())


# ---- sampling


def by_definition(logits, temperature, top_k, top_p):
    """One row of scores -> probabilities, in plain Python."""
    best = max(logits)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weight = {i: math.exp((logits[i] - best) / temperature) for i in order}
    total, kept, reached = sum(weight.values()), [], 0.0
    for i in order:
        if reached / total < top_p:
            kept.append(i)
            reached += weight[i]
    return [weight[i] / reached if i in kept else 0.0 for i in range(len(logits))]


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30, unique=True),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([None, 1, 3, 100]),
    st.sampled_from([None, 0.05, 0.505, 0.93, 1.0]),
)
def test_probabilities_are_the_definition(scores, temperature, top_k, top_p):
    logits = [score / 7 for score in scores]
    ours = next_probabilities(torch.tensor(logits).double(), temperature, top_k, top_p)
    theirs = by_definition(logits, temperature, top_k or 100, top_p or 1.0)
    assert torch.allclose(ours, torch.tensor(theirs).double(), atol=1e-12)
    assert math.isclose(ours.sum().item(), 1)


def test_a_known_example():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert next_probabilities(logits).tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert next_probabilities(logits, 0).tolist() == [0, 1, 0, 0]
    assert next_probabilities(logits, 0.5).tolist() == pytest.approx([1 / 30, 16 / 30, 4 / 30, 0.3])
    assert next_probabilities(logits, top_k=2).tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert next_probabilities(logits, top_p=0.5).tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7])
    # top_p counts what top_k left: 4/7 alone reaches 0.5
    assert next_probabilities(logits, 1, 2, 0.5).tolist() == [0, 1, 0, 0]


def test_equal_scores_keep_exactly_k_and_the_first_wins():
    shares = next_probabilities(torch.zeros(2, 5000), top_k=3)
    assert shares.count_nonzero(dim=-1).tolist() == [3, 3]
    assert shares.nonzero().tolist() == [[row, id] for row in range(2) for id in range(3)]
    assert next_probabilities(torch.zeros(5), 0).tolist() == [1, 0, 0, 0, 0]
    assert next_probabilities(torch.zeros(4), top_p=0.5).tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, math.inf])
def test_extreme_temperatures(temperature):
    shares = next_probabilities(torch.tensor([[3.0, 90.0, -80.0]]), temperature)
    assert shares.tolist()[0] == pytest.approx([0, 1, 0] if temperature < 1 else [1 / 3] * 3)


@pytest.mark.parametrize(
    "arguments", [(-1,), (math.nan,), (1, 0), (1, None, 0), (1, None, 1.1), (1, None, -0.5)]
)
def test_settings_that_make_no_sense(arguments, model, ids):
    with pytest.raises(ValueError, match="temperature"):
        next_probabilities(torch.zeros(3), *arguments)
    with pytest.raises(ValueError, match="temperature"):
        generate(model, ids, 1, *arguments)


@pytest.mark.parametrize(
    "arguments", [(1.0, None, None), (0.7, 8, None), (1.3, None, 0.8), (2.0, 12, 0.6)]
)
def test_frequencies_by_chi_squared(arguments, model, ids):
    """4,000 draws of one token; the statistic of right draws exceeds the limit once in 10,000."""
    count = 4000
    drawn = generate(model, ids[:1].expand(count, -1), 1, *arguments, seed=0)[:, -1]
    with torch.no_grad():
        expected = count * next_probabilities(model(ids[:1])[0, -1], *arguments)
    found = torch.bincount(drawn, minlength=50).double()
    assert (found[expected == 0] == 0).all()
    rare = (expected > 0) & (expected < 5)  # together they make one class
    classes = expected >= 5
    expected = torch.cat((expected[classes], expected[rare].sum()[None]))
    found = torch.cat((found[classes], found[rare].sum()[None]))
    used = expected > 0
    statistic = ((found - expected) ** 2 / expected)[used].sum().item()
    freedom = used.sum().item() - 1
    assert freedom >= 2
    # Wilson and Hilferty's approximation of the 0.9999 quantile
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit
