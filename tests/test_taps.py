"""Taps: watching changes nothing, patching changes what it should, and leaving restores
everything."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from conftest import hooks
from torch.testing import assert_close

from gpt2_script import gelu, patch, watch

B, T, H, D = 2, 5, 3, 8  # the sizes of the fixtures `model` and `ids`
BLOCK = """resid_pre ln_1 attn.q attn.k attn.v attn.scores attn.pattern attn.heads
    attn.out resid_mid ln_2 mlp.pre mlp.act mlp.out resid_post""".split()
NAMES = ["wte", "wpe", "embed", *(f"h.0.{name}" for name in BLOCK)]
NAMES += [*(f"h.1.{name}" for name in BLOCK), "ln_f", "logits"]  # as they are passed
BESIDE = {"wte": ["wpe"], "q": ["k", "v"], "k": ["v"], "v": ["scores", "pattern"]}


def add(value):
    return value + 1


def double(value):
    return value * 2


def noise(value):
    """Changed in place, as a patch gets a copy."""
    generator = torch.Generator().manual_seed(1)
    return value.add_(torch.randn(value.shape, generator=generator))


def watched(model, ids):
    with watch(model) as seen:
        model(ids)
    return seen


def block_equations(block, at):
    """What each wire of a block must carry, from the wires before it."""
    qkv = block.attn.c_attn(at["ln_1"]).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    ahead = torch.full((T, T), -torch.inf).triu(1)
    joined = at["attn.heads"].transpose(1, 2).flatten(2)
    return {
        "ln_1": block.ln_1(at["resid_pre"]),
        "attn.q": qkv[0],
        "attn.k": qkv[1],
        "attn.v": qkv[2],
        "attn.scores": at["attn.q"] @ at["attn.k"].mT / D**0.5,
        "attn.pattern": (at["attn.scores"] + ahead).softmax(-1),
        "attn.heads": at["attn.pattern"] @ at["attn.v"],
        "attn.out": block.attn.c_proj(joined),
        "resid_mid": at["resid_pre"] + at["attn.out"],
        "ln_2": block.ln_2(at["resid_mid"]),
        "mlp.pre": block.mlp.c_fc(at["ln_2"]),
        "mlp.act": gelu(at["mlp.pre"]),
        "mlp.out": block.mlp.c_proj(at["mlp.act"]),
        "resid_post": at["resid_mid"] + at["mlp.out"],
    }


def test_every_wire_carries_what_its_name_says(model, ids):
    seen = watched(model.double(), ids)
    assert list(seen) == NAMES
    expected = {"wte": model.wte.weight[ids], "wpe": model.wpe.weight[:T]}
    expected["embed"] = stream = seen["wte"] + seen["wpe"]
    for i, block in enumerate(model.h):
        at = {name: seen[f"h.{i}.{name}"] for name in BLOCK}
        values = {"resid_pre": stream} | block_equations(block, at)
        expected |= {f"h.{i}.{name}": value for name, value in values.items()}
        stream = at["resid_post"]
    expected["ln_f"] = model.ln_f(stream)
    expected["logits"] = seen["ln_f"] @ model.wte.weight.T
    assert_close(seen, expected, rtol=1e-9, atol=1e-9)


def test_patterns_choose_wires_each_once_in_the_models_order(model, ids):
    with watch(model, "logits", "h.*.at?n.[qk]", "ln_*", "ln_f") as seen:
        model(ids)
    heads = ["h.0.attn.q", "h.0.attn.k", "h.1.attn.q", "h.1.attn.k"]
    assert list(seen) == [*heads, "ln_f", "logits"]


def test_watching_changes_no_bit(model, ids):
    """Nor do patches that return what they got. What was seen last stays."""
    before = model(ids)
    with watch(model) as seen, watch(model, "h.0.*"):
        assert torch.equal(model(ids), before)
        with patch(model, {"*": lambda value: value}):
            assert torch.equal(model(ids), before)

    model(ids + 1)
    assert torch.equal(seen["logits"], before)
    assert not any(value.requires_grad for value in seen.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_reaches_all_that_is_downstream_and_nothing_else(model, ids, name):
    """Downstream is all that comes later, but for a few wires beside it."""
    before, (parent, dot, last) = watched(model, ids), name.rpartition(".")
    with patch(model, {name: noise}):
        after = watched(model, ids)
    assert torch.equal(after[name], noise(before[name].clone()))
    changed = {n for n in NAMES if not torch.equal(before[n], after[n])}
    beside = {parent + dot + other for other in BESIDE.get(last, ())}
    assert changed == {*NAMES[NAMES.index(name) :]} - beside


def test_patches_of_one_call_apply_in_order_and_of_two_calls_the_last_first(model, ids):
    embed = watched(model, ids)["embed"]
    with patch(model, {"embed": add, "emb*": double}):
        assert torch.equal(watched(model, ids)["embed"], (embed + 1) * 2)
    with patch(model, {"embed": add}), patch(model, {"embed": double}):
        assert torch.equal(watched(model, ids)["embed"], embed * 2 + 1)


def test_every_watch_sees_what_flows_on_after_all_patches(model, ids):
    """Whichever is within the other."""
    with watch(model) as outer, patch(model, {"embed": add}), watch(model) as inner:
        logits = model(ids)
    for seen in (outer, inner):
        assert torch.equal(seen["embed"], seen["wte"] + seen["wpe"] + 1)
        assert torch.equal(seen["logits"], logits)


@pytest.mark.parametrize("change", [add, sys.exit])
def test_leaving_restores_what_was_there(model, ids, change):
    """Also by an exception in the middle of a run. The outer context stays."""
    plain = model(ids)
    with patch(model, {"embed": add}):
        patched = model(ids)
        with suppress(SystemExit), watch(model), patch(model, {"*": change}):
            assert hooks(model) == 1 + 2 * len(NAMES)
            assert not torch.equal(model(ids), patched)
        assert torch.equal(model(ids), patched)

    assert torch.equal(model(ids), plain)
    assert hooks(model) == 0


def test_another_model_feels_nothing_in_any_thread(model, ids):
    """Nor does a deep copy made inside, which is a model of its own."""
    before, plain = copy.deepcopy(model), model(ids)
    with watch(model) as seen, patch(model, {"embed": add}):
        inside = copy.deepcopy(model)
        for other in (before, inside):
            with ThreadPoolExecutor() as pool:
                assert torch.equal(pool.submit(other, ids).result(), plain)
        assert not seen
        with patch(inside, {"embed": double}):
            embed = watched(inside, ids)["embed"]
    assert torch.equal(inside(ids), plain)
    assert torch.equal(embed, watched(model, ids)["embed"] * 2)


def to_array(value):
    return value.detach().numpy()


@pytest.mark.parametrize("wrong", [list, torch.mean, to_array])
def test_a_patch_must_return_a_tensor_of_the_same_shape(model, ids, wrong):
    with patch(model, {"h.0.resid_mid": wrong}):
        with pytest.raises(ValueError, match=r"must return a tensor \[2, 5, 24\]"):
            model(ids)


@pytest.mark.parametrize("unknown, similar", [("h.*.acts", "mlp.act"), ("WTE", "wte")])
def test_an_unknown_name_is_an_error_that_lists_similar_ones(model, unknown, similar):
    message = f"{unknown!r}.*{similar}"
    with pytest.raises(ValueError, match=message), watch(model, "embed", unknown):
        pass
    changes = {unknown: add, "embed": add}
    with pytest.raises(ValueError, match=message), patch(model, changes):
        pass
    assert hooks(model) == 0
