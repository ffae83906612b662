"""The model is GPT-2: the same numbers as transformers, and what the notebook says of each part."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, drawn, pair
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from gpt2_script import GPT2, PRESETS, GPT2Config, LayerNorm, compare, gelu, load_model, watch


@st.composite
def texts(draw):
    """A config and ids for it: 1 to 3 texts, often the shortest or the longest possible."""
    bounds = (2, 60), (1, 20), (1, 4), (4, 9), (1, 3), (1, 3)
    V, n_ctx, n_head, D, n_layer, B = (draw(st.integers(low, high)) for low, high in bounds)
    epsilon = draw(st.sampled_from([1e-5, 1e-2]))
    T = draw(st.sampled_from([1, n_ctx]) | st.integers(1, n_ctx))
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    return GPT2Config(V, n_ctx, n_head * D, n_layer, n_head, layer_norm_epsilon=epsilon), ids


def worst(ours, theirs):
    """The largest difference, as a share of the largest value."""
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max() / theirs.abs().max()


@torch.no_grad()
def check_parity(ours, theirs, ids, tolerance):
    ends = "resid_pre", "ln_f", "logits", "pattern"
    with watch(ours) as seen:
        ours(ids)
    mine = [seen[name] for end in ends for name in seen if name.endswith(end)]
    expected = theirs(ids, output_hidden_states=True, output_attentions=True)
    theirs = [*expected.hidden_states, expected.logits, *expected.attentions]
    assert all(worst(*two) <= tolerance for two in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@given(text=texts())
def test_equals_transformers(dtype, tolerance, text):
    check_parity(*pair(text[0], dtype=dtype), text[1], tolerance)


def test_equals_transformers_at_full_size_loaded_from_its_file(tmp_path):
    ids = torch.randint(50257, (2, 48), generator=torch.Generator().manual_seed(0))
    ours, theirs = pair(PRESETS["gpt2"])
    theirs.save_pretrained(tmp_path)
    check_parity(loaded := load_model(tmp_path), theirs, ids, 1e-4)
    assert loaded.config == ours.config and not compare(ours.state_dict(), loaded)


def test_training_equals_transformers(ids):
    """Under one seed dropout falls on the same numbers, after `pattern` and before the others."""
    logits, models = [], pair(replace(SMALL, dropout=0.25), dtype=torch.float64)
    with watch(models[0], "embed", "*.out", "h.0.attn.pattern") as seen:
        for model in models:
            torch.manual_seed(0)
            result = model.train()(ids)
            logits.append(getattr(result, "logits", result))
            logits[-1].square().mean().backward()
    assert worst(*logits) <= 1e-10
    for name, weight in models[0].named_parameters():
        assert worst(weight.grad, models[1].transformer.get_parameter(name).grad) <= 1e-10
    assert all((value == 0).any() for value in seen.values())
    assert torch.allclose(seen["h.0.attn.pattern"].sum(-1), torch.ones(()).double())


def test_presets():
    """The released ones differ in width, blocks and heads alone."""
    sizes = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16)}
    sizes |= {"gpt2-large": (1280, 36, 20), "gpt2-xl": (1600, 48, 25)}
    expected = {n: GPT2Config(50257, 1024, *x, 0.1, 1e-5, 0.02, 0.02) for n, x in sizes.items()}
    expected["nano"] = GPT2Config(50257, 128, 96, 3, 4, 0, 1e-5, 0.05, 0.1)
    assert PRESETS == expected and PRESETS["gpt2"] == GPT2Config()
    pytest.raises(FrozenInstanceError, setattr, PRESETS["gpt2"], "n_layer", 2)
    with torch.device("meta"):
        models = GPT2(PRESETS["gpt2"]), GPT2(PRESETS["nano"])
    assert [sum(map(torch.numel, x.parameters())) for x in models] == [124_439_808, 5_172_672]


@given(text=texts(), data=st.data())
def test_nothing_looks_ahead(text, data):
    config, ids = text
    model, other = drawn(GPT2(config)), ids.clone()
    place = data.draw(st.integers(0, ids.size(1) - 1))
    other[:, place] += data.draw(st.integers(1, config.vocab_size - 1))
    before, after = model(ids), model(other % config.vocab_size)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


def test_cache_changes_no_logit_and_no_pattern(model):
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids, [{} for _ in model.h]), model(ids))  # bit for bit when empty
    cache, past = [{} for _ in model.h], 0
    with watch(model.double(), "logits", "h.*.attn.pattern") as seen:
        model(ids)
        whole = dict(seen)
        for piece in ids.split([3, 4, 1, 8], dim=1):
            model(piece, cache)
            past, new = past + piece.size(1), slice(past, past + piece.size(1))
            for name, value in seen.items():
                expected = whole[name][..., new, : past if "pattern" in name else None]
                assert worst(value, expected) <= 1e-10


@pytest.mark.parametrize("where", [(slice(None), -1), torch.eye(2, 5).bool()], ids=str)
def test_where_gives_the_whole_forwards_logits_at_these_places_alone(model, ids, where):
    """Nothing else is computed. The cache holds the new tokens' keys and values at all places."""

    def call(**arguments):
        cache = [{} for _ in model.h]
        with FlopCounterMode(display=False) as work, watch(model) as seen:
            model(ids[:, :3] + 1, cache)
            logits = model(ids, cache, **arguments)
        assert torch.equal(logits, seen.pop("logits"))
        return logits, (seen, cache), work.get_total_flops()

    weights = list(model.double().parameters())
    (whole, expected, all_work), (some, found, work) = call(), call(where=where)
    assert_close(some, whole[where], rtol=1e-12, atol=1e-12)
    assert_close(found, expected, rtol=0, atol=0)
    assert all_work - work == 2 * 24 * (whole.numel() - some.numel())
    gradients = (torch.autograd.grad(x.square().sum(), weights) for x in (some, whole[where]))
    assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_initialisation():
    torch.manual_seed(0)
    config = GPT2Config(500, 100, 64, n_layer=3, n_head=4, init_std=0.05, embd_init_std=0.2)
    stds = {"wte": 0.2, "wpe": 0.2, "c_attn": 0.05, "c_fc": 0.05, "c_proj": 0.05 / (2 * 3) ** 0.5}
    quantiles = torch.tensor([0.1587, 0.5, 0.8413])  # of a normal distribution -1, 0 and 1
    for name, weight in GPT2(config).named_parameters():
        part, kind = name.split(".")[-2:]
        if kind == "bias" or part.startswith("ln_"):
            assert (weight == (kind == "weight")).all(), name
        else:
            found = (weight / stds[part]).quantile(quantiles).tolist()
            assert found == pytest.approx([-1, 0, 1], abs=0.08), name


@pytest.mark.parametrize("offset, scale, epsilon", [(300, 1e-3, 1e-5), (1, 0, 0.1)])
def test_layer_norm_is_torchs(offset, scale, epsilon):
    norm, x = LayerNorm(9, epsilon).double(), torch.randn(8, 9, dtype=torch.float64)
    norm.weight.data, norm.bias.data, x = x[0], x[1], x * scale + offset
    expected = F.layer_norm(x, [9], norm.weight, norm.bias, epsilon)
    assert_close(norm(x), expected, rtol=1e-9, atol=1e-9)


def test_gelu_is_torchs_tanh_form():
    x = torch.cat((torch.linspace(-12, 12, 4801), torch.tensor([-1e4, 1e4]))).double()
    assert torch.allclose(gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("past, length", [(0, 0), (0, 17), (9, 0), (9, 8), (16, 1)])
def test_refuses_a_text_that_is_empty_or_outgrows_the_context(model, past, length):
    cache, ids = [{} for _ in model.h], torch.zeros(2, 20, dtype=torch.long)
    if past:
        model(ids[:, :past], cache)
    with pytest.raises(ValueError, match=f"^{past + length} tokens, {length} of .* 1 to 16$"):
        model(ids[:, :length], cache)
