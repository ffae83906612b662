"""The model is GPT-2: it computes the same numbers as transformers."""

from dataclasses import replace

import pytest
import torch
from conftest import SMALL, drawn, pair
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import gpt2_script as gpt
from gpt2_script import GPT2, PRESETS, GPT2Config, KVCache, watch


@st.composite
def texts(draw):
    """A config and ids for it: 1 to 3 texts, often the shortest or longest possible."""
    bounds = (2, 60), (1, 20), (1, 4), (4, 9), (1, 3), (1, 3)
    V, n_ctx, H, D, L, B = [draw(st.integers(*bound)) for bound in bounds]
    T = draw(st.sampled_from([1, n_ctx]) | st.integers(1, n_ctx))
    epsilon = draw(st.sampled_from([1e-5, 1e-2]))
    config = GPT2Config(V, n_ctx, H * D, L, H, layer_norm_epsilon=epsilon)
    return config, torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


def worst(ours, theirs):
    """The largest difference, as a share of the largest value."""
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max() / theirs.abs().max()


@torch.no_grad()
def check_parity(ours, theirs, ids, tolerance):
    """Logits, each hidden state and each attention pattern are the same."""
    with watch(ours) as seen:
        ours(ids)
    expected = theirs(ids, output_hidden_states=True, output_attentions=True)
    assert worst(seen["logits"], expected.logits) <= tolerance

    blocks = range(ours.config.n_layer)
    states = [*(f"h.{i}.resid_pre" for i in blocks), "ln_f"]
    for name, state in zip(states, expected.hidden_states, strict=True):
        assert worst(seen[name], state) <= tolerance, name
    for i, pattern in zip(blocks, expected.attentions, strict=True):
        assert worst(seen[f"h.{i}.attn.pattern"], pattern) <= tolerance, i


@given(text=texts())
def test_equals_transformers(text):
    config, ids = text
    check_parity(*pair(config), ids, tolerance=1e-4)
    check_parity(*pair(config, torch.float64), ids, tolerance=1e-10)


def test_equals_transformers_at_full_size_loaded_from_its_file(tmp_path):
    ids = torch.randint(50257, (2, 24), generator=torch.Generator().manual_seed(0))
    _, theirs = pair(PRESETS["gpt2"])
    theirs.save_pretrained(tmp_path)
    loaded = gpt.load_model(tmp_path)
    assert loaded.config == PRESETS["gpt2"]
    check_parity(loaded, theirs, ids, tolerance=1e-4)


def test_training_equals_transformers(ids):
    """Under one seed, dropout falls on the same numbers, in the same places."""
    ours, theirs = pair(replace(SMALL, dropout=0.25), torch.float64)
    torch.manual_seed(0)
    our_logits = ours.train()(ids)
    torch.manual_seed(0)
    their_logits = theirs.train()(ids).logits
    assert worst(our_logits, their_logits) <= 1e-10


@given(text=texts(), data=st.data())
def test_nothing_looks_ahead(text, data):
    """Another token changes the logits at its place, and none before it."""
    config, ids = text
    model, other = drawn(GPT2(config)), ids.clone()
    place = data.draw(st.integers(0, ids.size(1) - 1))
    other[:, place] = (other[:, place] + 1) % config.vocab_size

    before, after = model(ids), model(other)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


@pytest.mark.parametrize("sizes", [[16], [1] * 16, [3, 4, 1, 8]], ids=str)
def test_a_text_in_chunks_gives_what_the_whole_text_gives(model, sizes):
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    with watch(model.double()) as whole:
        model(ids)
    cache, past = KVCache(), 0
    for chunk in ids.split(sizes, dim=1):
        with watch(model) as seen:
            model(chunk, cache)
        new = slice(past, past + chunk.size(1))
        past = new.stop
        assert cache.length == past
        assert_close(seen["wpe"], whole["wpe"][new])
        assert_close(seen["logits"], whole["logits"][:, new])
        pattern = whole["h.1.attn.pattern"][:, :, new, :past]
        assert_close(seen["h.1.attn.pattern"], pattern)


@pytest.mark.parametrize("past, new", [(0, 0), (0, 17), (9, 0), (9, 8), (16, 1)])
def test_no_tokens_or_more_than_the_context_are_refused(model, past, new):
    cache, ids = KVCache(), torch.zeros(2, 20, dtype=torch.long)
    if past:
        model(ids[:, :past], cache)
    with pytest.raises(ValueError, match=f"{new} .*; this model takes 1 to 16"):
        model(ids[:, :new], cache)
    assert cache.length == past


def test_initialisation():
    """Weights are drawn from normal distributions, of which these are three quantiles;
    those that write to the stream are scaled by 1 / √(2 · n_layer)."""
    torch.manual_seed(0)
    config = GPT2Config(500, 100, 64, 3, 4, init_std=0.05, embd_init_std=0.2)
    stds = {"wte": 0.2, "wpe": 0.2, "c_attn": 0.05, "c_fc": 0.05}
    stds["c_proj"] = 0.05 / 6**0.5
    quantiles = torch.tensor([0.1587, 0.5, 0.8413])

    for name, weight in GPT2(config).named_parameters():
        part, kind = name.split(".")[-2:]
        if kind == "bias":
            assert (weight == 0).all(), name
        elif part.startswith("ln_"):
            assert (weight == 1).all(), name
        else:
            found = weight.quantile(quantiles) / stds[part]
            assert found.tolist() == pytest.approx([-1, 0, 1], abs=0.08), name


RELEASED = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16)}
RELEASED |= {"gpt2-large": (1280, 36, 20), "gpt2-xl": (1600, 48, 25)}


def test_presets():
    assert PRESETS["nano"] == GPT2Config(50257, 128, 96, 3, 4, 0.0, 1e-5, 0.05, 0.1)
    for name, sizes in RELEASED.items():
        config = GPT2Config(50257, 1024, *sizes, 0.1, 1e-5, 0.02, 0.02)
        assert PRESETS[name] == config, name
    with torch.device("meta"):
        weights = list(GPT2(PRESETS["gpt2"]).parameters())
    assert sum(weight.numel() for weight in weights) == 124_439_808


@pytest.mark.parametrize("n_head", [5, 0, -4, 2.0, True, None, "4"])
def test_a_width_that_does_not_divide_into_heads_is_refused(n_head):
    with pytest.raises(ValueError, match=f"64 does not divide into {n_head} heads"):
        GPT2Config(n_embd=64, n_head=n_head)
