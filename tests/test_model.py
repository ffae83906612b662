"""The model is GPT-2: the same numbers as transformers, and what the notebook says of each part."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st

from gpt2_script import (
    GPT2,
    PRESETS,
    GPT2Config,
    LayerNorm,
    gelu,
    patch,
    score_rows,
    tapped,
    watch,
)

pytestmark = pytest.mark.usefixtures("one_thread")

RELEASED = {  # layers, heads, width, parameters
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


@st.composite
def texts(draw, min_length=1):
    """A config and ids for it: 1 to 3 texts, often the shortest or the longest possible."""
    n_head, length = draw(st.integers(1, 4)), st.integers(min_length, 20)
    n_ctx = draw(length)
    config = GPT2Config(
        vocab_size=draw(st.integers(2, 60)),
        n_ctx=n_ctx,
        n_embd=n_head * draw(st.integers(4, 9)),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-2])),
    )
    T = draw(st.sampled_from([min_length, n_ctx]) | length.filter(lambda T: T <= n_ctx))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(config.vocab_size, (draw(st.integers(1, 3)), T), generator=generator)
    return config, ids


@pytest.fixture(scope="session")
def pair(drawn):
    """A function that makes transformers' GPT-2 and ours with the same weights."""

    def make(config, attention="eager", dtype=torch.float32):
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.n_ctx,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                layer_norm_epsilon=config.layer_norm_epsilon,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                resid_pdrop=config.dropout,
                attn_implementation=attention,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        drawn(theirs.to(dtype))
        with torch.device("meta"):
            ours = GPT2(config)
        ours.load_state_dict(without_masks(theirs.transformer.state_dict()), assign=True)
        return ours.eval(), theirs

    return make


def without_masks(state):
    return {n: t for n, t in state.items() if not n.endswith((".attn.bias", ".attn.masked_bias"))}


def worst(ours, theirs):
    """The largest difference, as a share of the largest value."""
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max() / theirs.abs().max()


@torch.no_grad()
def check_parity(ours, theirs, ids, tolerance):
    eager = theirs.config._attn_implementation == "eager"  # the only one that hands out patterns
    with watch(ours) as seen:
        logits = ours(ids)
    expected = theirs(ids, output_hidden_states=True, output_attentions=eager)
    layers = range(ours.config.n_layer)
    stream = [seen[f"h.{i}.resid_pre"] for i in layers] + [seen["ln_f"]]
    patterns = [seen[f"h.{i}.attn.pattern"] for i in layers] if eager else []
    assert worst(logits, expected.logits) <= tolerance
    for mine, other in zip(stream, expected.hidden_states, strict=True):
        assert worst(mine, other) <= tolerance
    for mine, other in zip(patterns, expected.attentions or [], strict=True):
        assert worst(mine, other) <= tolerance


# The same numbers as transformers


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@given(text=texts())
def test_equals_transformers(pair, attention, dtype, tolerance, text):
    config, ids = text
    check_parity(*pair(config, attention, dtype), ids, tolerance)


def test_equals_transformers_at_full_size(pair):
    ids = torch.randint(50257, (2, 48), generator=torch.Generator().manual_seed(0))
    check_parity(*pair(PRESETS["gpt2"]), ids, 1e-4)


def test_training_equals_transformers(pair, model, ids):
    """Under one seed dropout falls on the same numbers; the gradients agree too."""
    ours, theirs = pair(model.config, dtype=torch.float64)
    torch.manual_seed(0)
    logits = ours.train()(ids)
    torch.manual_seed(0)
    expected = theirs.train()(ids).logits
    assert worst(logits, expected) <= 1e-10
    logits.square().mean().backward()
    expected.square().mean().backward()
    for name, weight in ours.named_parameters():
        assert worst(weight.grad, theirs.transformer.get_parameter(name).grad) <= 1e-10


# The file's names, shapes and sizes


def test_weights_have_transformers_names_and_shapes(pair, model):
    _, theirs = pair(model.config)
    expected = without_masks(theirs.transformer.state_dict())
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in expected.items()
    }


def test_weights_go_both_ways(pair, model, ids):
    fresh, theirs = GPT2(model.config).eval(), pair(model.config)[1]
    fresh.load_state_dict(without_masks(theirs.transformer.state_dict()))
    check_parity(fresh, theirs, ids, 1e-4)
    theirs.transformer.load_state_dict(model.state_dict())
    check_parity(model, theirs, ids, 1e-4)


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    n_layer, n_head, n_embd, count = RELEASED[name]
    assert PRESETS[name] == GPT2Config(50257, 1024, n_embd, n_layer, n_head, 0.1, 1e-5, 0.02, 0.02)
    with torch.device("meta"):
        assert sum(weight.numel() for weight in GPT2(PRESETS[name]).parameters()) == count


def test_nano():
    nano = PRESETS["nano"]
    assert 64 <= nano.n_embd <= 96
    sizes = dict(vocab_size=50257, n_ctx=128, n_embd=nano.n_embd, n_layer=3, n_head=4)
    assert nano == GPT2Config(**sizes, dropout=0, init_std=0.05, embd_init_std=0.1)


def test_config_defaults_are_gpt2():
    assert GPT2Config() == PRESETS["gpt2"]


# Nothing looks ahead


@given(text=texts(min_length=2), data=st.data())
def test_nothing_looks_ahead(drawn, text, data):
    """Another token at one place leaves every logit before it as it was, bit for bit."""
    config, ids = text
    model = drawn(GPT2(config))
    place = data.draw(st.integers(1, ids.size(1) - 1))
    other = ids.clone()
    other[:, place] += data.draw(st.integers(1, config.vocab_size - 1))
    before, after = model(ids), model(other % config.vocab_size)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


@given(text=texts())
def test_pattern_rows_sum_to_1_and_end_at_the_diagonal(drawn, text):
    config, ids = text
    model = drawn(GPT2(config))
    with watch(model, "h.*.attn.pattern") as seen:
        model(ids)
    for pattern in seen.values():
        assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-6)
        assert not pattern.triu(1).any()
        assert (pattern >= 0).all()


# The cache


@pytest.mark.parametrize("pieces", [[5, 1, 1, 1], [1] * 16, [3, 4, 1, 8], [16]])
def test_cache_changes_no_logit_and_no_pattern(model, pieces):
    """A text given in pieces, up to the full context, equals the text given at once."""
    ids = torch.randint(50, (2, sum(pieces)), generator=torch.Generator().manual_seed(0))
    cache, past = [{} for _ in model.h], 0
    with watch(model.double(), "logits", "h.*.attn.pattern") as seen:
        model(ids)
        whole = dict(seen)
        for piece in ids.split(pieces, dim=1):
            model(piece, cache)
            now = past + piece.size(1)
            assert worst(seen["logits"], whole["logits"][:, past:now]) <= 1e-10
            for i in range(2):
                name = f"h.{i}.attn.pattern"
                assert worst(seen[name], whole[name][:, :, past:now, :now]) <= 1e-10
            past = now


def test_an_empty_cache_changes_no_bit(model, ids):
    assert torch.equal(model(ids, [{} for _ in model.h]), model(ids))


# Dropout


def test_dropout_is_idle_in_eval(model, ids):
    never = GPT2(replace(model.config, dropout=0)).train()
    never.load_state_dict(model.state_dict())
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(model(ids), never(ids))


def test_dropout_is_random_in_training(model, ids):
    idle, first, second = model(ids), model.train()(ids), model(ids)
    assert not torch.equal(first, idle)
    assert not torch.equal(first, second)


def test_dropout_drops_a_share_p_and_scales_the_rest():
    torch.manual_seed(0)
    rate, T, D = 0.25, 32, 32
    model = GPT2(GPT2Config(50, T, n_embd=2 * D, n_layer=1, n_head=2, dropout=rate)).train()
    identity = {"h.0.attn.v": torch.eye(T).expand_as}  # so that pattern @ v is the pattern
    with patch(model, identity), watch(model) as seen:
        model(torch.randint(50, (8, T)))
    heads, pattern = seen["h.0.attn.heads"], seen["h.0.attn.pattern"]
    joined, act = heads.transpose(1, 2).flatten(2), seen["h.0.mlp.act"]
    visible = torch.ones(T, T).tril().bool()
    for after, before in [
        (seen["embed"], seen["wte"] + seen["wpe"]),
        (heads[..., visible], pattern[..., visible]),
        (seen["h.0.attn.out"], model.h[0].attn.c_proj(joined)),
        (seen["h.0.mlp.out"], model.h[0].mlp.c_proj(act)),
    ]:
        kept = after != 0
        assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.02)
        assert torch.allclose(after[kept], before[kept] / (1 - rate))


# Initialisation


def test_initialisation():
    torch.manual_seed(0)
    config = GPT2Config(500, 100, 64, n_layer=3, n_head=4, init_std=0.05, embd_init_std=0.2)
    stds = {"wte": 0.2, "wpe": 0.2, "c_attn": 0.05, "c_fc": 0.05, "c_proj": 0.05 / (2 * 3) ** 0.5}
    for name, weight in GPT2(config).named_parameters():
        part, kind = name.split(".")[-2:]
        if kind == "bias":
            assert not weight.any(), name
        elif part.startswith("ln_"):
            assert (weight == 1).all(), name
        else:
            std = stds[part]
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(weight.mean().item()) < 0.1 * std, name
            within = (weight.abs() < std).float().mean().item()
            assert within == pytest.approx(0.683, abs=0.03), f"{name} is not normal"


# The parts


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    scale=st.sampled_from([0, 1e-3, 1, 100]),
    offset=st.sampled_from([0, -5, 300]),
    epsilon=st.sampled_from([1e-5, 0.1]),
)
def test_layer_norm_is_torchs(shape, scale, offset, epsilon):
    torch.manual_seed(0)
    norm = LayerNorm(shape[-1], epsilon).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = offset + scale * torch.randn(shape, dtype=torch.float64)
    expected = F.layer_norm(x, shape[-1:], norm.weight, norm.bias, epsilon)
    assert torch.allclose(norm(x), expected, rtol=1e-9, atol=1e-9)


def test_gelu_is_torchs_tanh_form():
    x = torch.cat((torch.linspace(-12, 12, 4801), torch.tensor([-1e4, 1e4]))).double()
    assert torch.allclose(gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-12, atol=1e-12)


def test_the_head_is_the_token_table(model, ids):
    """A new row for a token that the text lacks moves that token's logits and no other bit."""
    before = model(ids)
    with torch.no_grad():
        model.wte.weight[40] += 1
    moved = model(ids) != before  # [B, T, V]
    assert moved[..., 40].all()
    assert moved.sum() == ids.numel()
    assert not any("lm_head" in name for name in model.state_dict())


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_overwritten_after_a_tap_has_seen_it(model, ids, training):
    """What watch holds at the end is what each tap saw; the cache's next call included."""
    cache, then = [{} for _ in model.h], {}

    def keep(tap, args, value):
        then.setdefault(tap, value.clone())

    for tap in tapped(model.train(training), ["*"]).values():
        tap.register_forward_hook(keep)
    with torch.no_grad():
        with watch(model) as seen:
            model(ids, cache)
        model(ids, cache)
    assert len(seen) == len(then)
    for name, tap in tapped(model, seen).items():
        assert torch.equal(seen[name], then[tap]), name


# Errors


@pytest.mark.parametrize("name", ["vocab_size", "n_ctx", "n_embd", "n_layer", "n_head"])
@pytest.mark.parametrize("size", [0, -1, 1.5, "12", None])
def test_config_refuses_a_size(name, size):
    with pytest.raises(ValueError, match=f"^{name} .*, not {size!r}$"):
        GPT2Config(**{name: size})


@pytest.mark.parametrize("n_embd, n_head", [(100, 12), (768, 7)])
def test_config_refuses_heads_that_do_not_divide_the_width(n_embd, n_head):
    with pytest.raises(ValueError, match=f"{n_embd} .* {n_head} heads"):
        GPT2Config(n_embd=n_embd, n_head=n_head)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_config_refuses_a_dropout(rate):
    with pytest.raises(ValueError, match=f"^dropout .*, not {rate}$"):
        GPT2Config(dropout=rate)


@pytest.mark.parametrize("name", ["layer_norm_epsilon", "init_std", "embd_init_std"])
@pytest.mark.parametrize("value", [0, -0.02])
def test_config_refuses_what_must_be_above_0(name, value):
    with pytest.raises(ValueError, match=f"{name}.* above 0"):
        GPT2Config(**{name: value})


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        GPT2Config().n_layer = 1


@pytest.mark.parametrize("length", [0, 17])
def test_refuses_a_text_that_is_empty_or_too_long(model, length):
    with pytest.raises(ValueError, match=f"^{length} tokens.* 16$"):
        model(torch.zeros(2, length, dtype=torch.long))


def test_refuses_a_text_that_outgrows_the_context_in_the_cache(model):
    cache, ids = [{} for _ in model.h], torch.zeros(2, 9, dtype=torch.long)
    model(ids, cache)
    with pytest.raises(ValueError, match="^18 tokens.* 16$"):
        model(ids, cache)


@pytest.mark.parametrize("rows", [1, 50, 58])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6), (2, 3, 6)])
def test_scores_of_rows_are_the_product_with_the_table(shape, rows):
    """In 29 parts for a single vector, where the rows divide so."""
    x, table = torch.randn(shape).double(), torch.randn(rows, 6).double()
    scores = score_rows(x, table)
    assert scores.shape == (*shape[:-1], rows)
    assert torch.allclose(scores, x @ table.T, rtol=1e-12)
