"""Taps: watching changes nothing, patching changes what it should, leaving restores everything."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from functools import partial

import pytest
import torch
from conftest import hooks
from torch.testing import assert_close

from gpt2_script import gelu, patch, tapped, watch

B, T, H, D = 2, 5, 3, 8  # the sizes of the fixtures `model` and `ids`
BLOCK = """resid_pre ln_1 attn.q attn.k attn.v attn.scores attn.pattern attn.heads attn.out
    resid_mid ln_2 mlp.pre mlp.act mlp.out resid_post""".split()
NAMES = ["wte", "wpe", "embed", *(f"h.{i}.{name}" for i in range(2) for name in BLOCK)]
NAMES += ["ln_f", "logits"]  # every wire, in the order in which the taps fire
AHEAD = torch.full((T, T), -torch.inf).triu(1)
BESIDE = {"wte": ["wpe"], "q": ["k", "v"], "k": ["v"], "v": ["scores", "pattern"]}

add, double = partial(torch.add, other=1), partial(torch.mul, other=2)


def noise(value):
    """Added in place: what the patch got may be a copy alone."""
    return value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))


def run(model, ids):
    """The logits and every gradient, dropout under one seed."""
    torch.manual_seed(0)
    logits = model(ids)
    return logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def watched(model, ids):
    with watch(model) as seen:
        model(ids)
    return seen


def test_every_wire_carries_what_its_name_says(model, ids):
    seen = watched(model.double(), ids)
    expected = {"wte": model.wte.weight[ids], "wpe": model.wpe.weight[:T]}
    expected["embed"] = stream = seen["wte"] + seen["wpe"]
    for i, block in enumerate(model.h):
        at = {name: seen[f"h.{i}.{name}"] for name in BLOCK}
        qkv = block.attn.c_attn(at["ln_1"]).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        equations = {
            "resid_pre": stream,
            "ln_1": block.ln_1(at["resid_pre"]),
            **{"attn.q": qkv[0], "attn.k": qkv[1], "attn.v": qkv[2]},
            "attn.scores": at["attn.q"] @ at["attn.k"].mT / D**0.5,
            "attn.pattern": (at["attn.scores"] + AHEAD).softmax(-1),
            "attn.heads": at["attn.pattern"] @ at["attn.v"],
            "attn.out": block.attn.c_proj(at["attn.heads"].transpose(1, 2).flatten(2)),
            "resid_mid": at["resid_pre"] + at["attn.out"],
            "ln_2": block.ln_2(at["resid_mid"]),
            "mlp.pre": block.mlp.c_fc(at["ln_2"]),
            "mlp.act": gelu(at["mlp.pre"]),
            "mlp.out": block.mlp.c_proj(at["mlp.act"]),
            "resid_post": at["resid_mid"] + at["mlp.out"],
        }
        expected |= {f"h.{i}.{name}": value for name, value in equations.items()}
        stream = at["resid_post"]
    expected |= {"ln_f": model.ln_f(stream), "logits": seen["ln_f"] @ model.wte.weight.T}
    assert list(seen) == list(expected) == NAMES
    assert_close(seen, expected, rtol=1e-9, atol=1e-9)


def test_patterns_choose_wires_and_each_is_passed_once(model, ids):
    patterns, passed = ["logits", "ln_f", "h.*.at?n.[qk]", "ln_*"], []
    names = ["h.0.attn.q", "h.0.attn.k", "h.1.attn.q", "h.1.attn.k", "ln_f", "logits"]
    note = {p: lambda value, p=p: passed.append(p) or value for p in patterns}
    with patch(model, note), watch(model, *patterns) as seen:
        model(ids)
    assert list(seen) == names
    assert tapped(model, patterns) == {name: model.get_submodule(name) for name in names}
    assert passed == [p for name in names for p in patterns if name in tapped(model, [p])]


@pytest.mark.parametrize("training", [False, True])
def test_watching_and_idle_patches_change_no_bit_and_no_gradient(model, ids, training):
    """What was seen last stays after the context, overwritten by nothing and without gradients."""
    before, then = run(model.train(training), ids), []
    with watch(model) as seen, watch(model, "h.0.*"):
        model(ids + 1)
        assert same(run(model, ids), before)
        with patch(model, {"*": lambda value: then.append(value.clone()) or value}):
            assert same(run(model, ids), before)
    model(ids + 1)
    assert same(seen.values(), then) and torch.equal(seen["logits"], before[0])
    assert not any(value.requires_grad for value in seen.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_reaches_all_that_is_downstream_and_nothing_else(model, ids, name):
    """All that is later in the order, but for the wires beside it in the same module."""
    before, (at, dot, last) = watched(model, ids), name.rpartition(".")
    with patch(model, {name: noise}):
        after = watched(model, ids)
    changed = {n for n in NAMES if not torch.equal(before[n], after[n])}
    assert changed == {*NAMES[NAMES.index(name) :]} - {at + dot + x for x in BESIDE.get(last, ())}
    assert torch.equal(after[name], noise(before[name].clone()))


@pytest.mark.parametrize("outer, inner, flows", [
    ({"embed": add, "emb*": double}, {}, lambda embed: (embed + 1) * 2),
    ({"emb*": double, "embed": add}, {}, lambda embed: embed * 2 + 1),
    ({"embed": add}, {"embed": double}, lambda embed: embed * 2 + 1),
])  # fmt: skip
def test_patches_apply_in_order_and_every_watch_sees_what_flows_on(model, ids, outer, inner, flows):
    """Those of one call as they are given, of two calls the last one's first."""
    embed = flows(watched(model, ids)["embed"])
    with watch(model) as first, patch(model, outer), watch(model) as second, patch(model, inner):
        third = watched(model, ids)
    assert all(torch.equal(seen["embed"], embed) for seen in (first, second, third))
    with patch(model, {"embed": lambda value: embed}):
        assert torch.equal(third["logits"], model(ids))


@pytest.mark.parametrize("context", [watch, partial(patch, changes={"*": noise})])
@pytest.mark.parametrize("change", [add, sys.exit])
def test_leaving_restores_what_was_there(model, ids, context, change):
    """Also by an exception, in the middle of a run; the outer contexts stay."""
    plain = model(ids)
    with patch(model, {"embed": add}), watch(model) as seen:
        before = model(ids)
        with suppress(SystemExit), context(model), patch(model, {"h.1.mlp.act": change}):
            assert hooks(model) == 2 * len(NAMES) + 2
            model(ids)
            assert change is add
        assert same([model(ids), seen["logits"]], [before] * 2)
    assert not hooks(model) and torch.equal(model(ids), plain)


def test_a_deep_copy_made_inside_is_a_model_of_its_own(model, ids):
    """Also in the middle of the first one's run, in the same thread or in another."""
    plain, logits, pool = watched(model, ids), [], ThreadPoolExecutor()

    def meanwhile(value):
        logits.extend([twin(ids), pool.submit(twin, ids).result()])
        return value + 1

    with watch(model) as seen, patch(model, {"embed": meanwhile}):
        twin = deepcopy(model)
        assert torch.equal(twin(ids), plain["logits"]) and not seen
        pool.submit(model, ids).result()
        with watch(twin) as seen_twin, patch(twin, {"logits": double}):
            logits.append(twin(ids) / 2)
    logits.append(twin(ids))
    assert same(logits, [plain["logits"]] * 4)
    assert torch.equal(seen["embed"], plain["embed"] + 1)
    assert torch.equal(seen_twin["logits"], plain["logits"] * 2)


@pytest.mark.parametrize("wrong", [list, print, torch.mean, torch.flatten, lambda x: x[:1]])
def test_a_patch_must_return_a_tensor_of_the_same_shape(model, ids, wrong):
    with patch(model, {"h.0.resid_mid": wrong}), pytest.raises(ValueError, match=r"\[2, 5, 24\]"):
        model(ids)


@pytest.mark.parametrize("unknown, near", [("h.*.acts", "mlp.act"), ("WTE", "wte"), ("", "wte")])
def test_an_unknown_name_is_an_error_that_lists_near_names(model, unknown, near):
    for context in (watch(model, "embed", unknown), patch(model, {"embed": add, unknown: add})):
        with pytest.raises(ValueError, match=f"{unknown!r}.*{near}"), context:
            pass
        assert not hooks(model)
