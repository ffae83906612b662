"""Taps: watching changes nothing, patching changes what it should, leaving restores everything."""

import fnmatch
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from copy import deepcopy
from functools import partial
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from conftest import hooks

from gpt2_script import gelu, patch, tapped, watch

B, T, H, D = 2, 5, 3, 8  # the sizes of the fixtures `model` and `ids`
BLOCK = """resid_pre ln_1 attn.q attn.k attn.v attn.scores attn.pattern attn.heads attn.out
    resid_mid ln_2 mlp.pre mlp.act mlp.out resid_post""".split()
NAMES = ["wte", "wpe", "embed", *(f"h.{i}.{name}" for i in range(2) for name in BLOCK)]
NAMES += ["ln_f", "logits"]  # every wire, in the order in which the taps fire
BESIDE = {"wte": {"wpe"}}  # later in the order, yet not downstream; all else that is later is
for at in ("h.0.attn.", "h.1.attn."):
    BESIDE |= {at + "q": {at + "k", at + "v"}, at + "k": {at + "v"}}
    BESIDE |= {at + "v": {at + "scores", at + "pattern"}}

add, double = partial(torch.add, other=1), partial(torch.mul, other=2)


def noise(value):
    """Added in place: what the patch got may be a copy alone."""
    return value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))


def run(model, ids):
    """The logits and every gradient, dropout under one seed."""
    torch.manual_seed(0)
    logits = model(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    return logits, *torch.autograd.grad(loss, list(model.parameters()))


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def watched(model, ids):
    with watch(model) as seen:
        model(ids)
    return seen


every_context = pytest.mark.parametrize("context", [watch, partial(patch, changes={"*": noise})])


def test_every_wire_carries_what_its_name_says(model, ids):
    """Each value follows, by its equation, from the values before it; each has its shape."""
    seen = watched(model.double(), ids)
    expected = {"wte": model.wte.weight[ids], "wpe": model.wpe.weight[:T]}
    expected["embed"] = stream = seen["wte"] + seen["wpe"]
    ahead = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i, block in enumerate(model.h):
        at = {name: seen[f"h.{i}.{name}"] for name in BLOCK}
        qkv = block.attn.c_attn(at["ln_1"]).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        equations = {
            "resid_pre": stream,
            "ln_1": block.ln_1(at["resid_pre"]),
            **{"attn.q": qkv[0], "attn.k": qkv[1], "attn.v": qkv[2]},
            "attn.scores": at["attn.q"] @ at["attn.k"].mT / D**0.5,
            "attn.pattern": at["attn.scores"].masked_fill(ahead, -torch.inf).softmax(-1),
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
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("patterns, names", [
    ([], NAMES),
    (["h.*.attn.pattern"], ["h.0.attn.pattern", "h.1.attn.pattern"]),
    (["h.1.*"], [name for name in NAMES if name.startswith("h.1.")]),
    (["h.?.attn.[qk]"], ["h.0.attn.q", "h.0.attn.k", "h.1.attn.q", "h.1.attn.k"]),
    (["*.mlp.out", "*", "embed"], NAMES),
    (["logits", "ln_f", "ln_*"], ["ln_f", "logits"]),
])  # fmt: skip
def test_patterns_choose_wires_and_each_is_passed_once(model, ids, patterns, names):
    passed, taps = [], tapped(model, patterns)
    note = {p: lambda value, p=p: passed.append(p) or value for p in patterns}
    with patch(model, note), watch(model, *patterns) as seen:
        model(ids)
    assert list(seen) == names and sorted(taps) == sorted(names)
    assert all(model.get_submodule(name) is tap for name, tap in taps.items())
    assert passed == [p for name in names for p in patterns if fnmatch.fnmatch(name, p)]


@pytest.mark.parametrize("training", [False, True])
def test_watching_and_idle_patches_change_no_bit_and_no_gradient(model, ids, training):
    """What was seen last stays after the context, without gradients."""
    before = run(model.train(training), ids)
    with watch(model) as seen, watch(model, "h.0.*"):
        model(ids + 1)
        assert same(run(model, ids), before)
        with patch(model, {"*": lambda value: value}):
            assert same(run(model, ids), before)
    model(ids + 1)
    assert torch.equal(seen["logits"], before[0]) and torch.equal(seen["wte"], model.wte(ids))
    assert not any(value.requires_grad for value in seen.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_reaches_all_that_is_downstream_and_nothing_else(model, ids, name):
    before = watched(model, ids)
    with patch(model, {name: noise}):
        after = watched(model, ids)
    changed = {n for n in NAMES if not torch.equal(before[n], after[n])}
    assert changed == set(NAMES[NAMES.index(name) :]) - BESIDE.get(name, set())
    assert torch.equal(after[name], noise(before[name].clone()))


def test_one_patch_changes_several_wires_and_one_wire_in_the_order_given(model, ids):
    wte, wpe, embed = list(watched(model, ids).values())[:3]
    for changes, expected in [
        ({"wte": add, "wpe": double}, [wte + 1, wpe * 2, (wte + 1) + wpe * 2]),
        ({"embed": add, "emb*": double}, [wte, wpe, (embed + 1) * 2]),
        ({"emb*": double, "embed": add}, [wte, wpe, embed * 2 + 1]),
    ]:
        with patch(model, changes):
            assert same(list(watched(model, ids).values())[:3], expected)


@every_context
@pytest.mark.parametrize("change", [add, sys.exit])
def test_leaving_restores_everything(model, ids, context, change):
    """Also by an exception, in the middle of a run."""
    before = model(ids)
    with suppress(SystemExit), context(model), patch(model, {"h.1.mlp.act": change}):
        assert hooks(model) == len(NAMES) + 1
        model(ids)
        assert change is add
    assert not hooks(model) and torch.equal(model(ids), before)


@pytest.mark.parametrize("order", list(permutations([watch, add, double])))
def test_the_last_patch_entered_applies_first_and_watch_sees_what_flows_on(model, ids, order):
    name = "h.0.attn.q"
    expected = watched(model, ids)[name]
    for step in reversed(order):
        expected = expected if step is watch else step(expected)
    with ExitStack() as stack:
        steps = (watch(model) if step is watch else patch(model, {name: step}) for step in order)
        seen = [stack.enter_context(step) for step in steps][order.index(watch)]
        logits = model(ids)
    assert torch.equal(seen[name], expected)
    with patch(model, {name: lambda value: expected}):
        assert torch.equal(logits, model(ids))


def test_leaving_the_inner_context_keeps_the_outer(model, ids):
    plain = watched(model, ids)["embed"]
    with watch(model) as seen, patch(model, {"embed": add}):
        with patch(model, {"embed": double}), watch(model):
            model(ids)
        assert torch.equal(seen["embed"], plain * 2 + 1)
        model(ids)
    assert torch.equal(seen["embed"], plain + 1)


CALLS = [lambda model, x: model(x), lambda model, x: ThreadPoolExecutor().submit(model, x).result()]


@pytest.mark.parametrize("call", CALLS, ids=["same thread", "threads"])
def test_another_model_feels_nothing(model, ids, call):
    """Not even in the middle of the first one's run, which is the same in any thread."""
    other, logits = deepcopy(model), []
    plain, expected = watched(model, ids), other(ids + 1)

    def meanwhile(value):
        logits.append(call(other, ids + 1))
        return value + 1

    with watch(model) as seen, watch(other) as seen_other, patch(model, {"embed": meanwhile}):
        assert hooks(other) == len(NAMES)
        call(model, ids)
        with patch(other, {"logits": double}):
            logits.append(call(other, ids + 1) / 2)
    assert same(logits, [expected] * 2)
    assert torch.equal(seen["embed"], plain["embed"] + 1)
    assert torch.equal(seen_other["logits"], expected * 2)


@every_context
def test_a_deep_copy_made_inside_is_a_model_of_its_own(model, ids, context):
    clean = watched(model, ids)
    plain = clean["logits"]
    with context(model) as seen:
        twin = deepcopy(model)
        with watch(twin) as seen_twin, patch(twin, {"embed": add}):
            twin(ids)
        assert torch.equal(seen_twin["embed"], clean["embed"] + 1)
        assert torch.equal(twin(ids), plain) and not seen
        assert torch.equal(model(ids), plain) == (context is watch)
        twin(ids + 1)
    assert torch.equal(twin(ids), plain) and not hooks(model)
    assert seen is None or same(seen.values(), clean.values())


@pytest.mark.parametrize("wrong", [list, print, torch.mean, torch.flatten, lambda x: x[:1]])
def test_a_patch_must_return_a_tensor_of_the_same_shape(model, ids, wrong):
    with patch(model, {"h.0.resid_mid": wrong}), pytest.raises(ValueError, match=r"\[2, 5, 24\]"):
        model(ids)


NEAR = {
    "h.0.attn.patern": "h.0.attn.pattern", "h.7.resid_post": "h.1.resid_post",
    "h.0.attn.c_attn": "h.0.attn.out", "H.0.MLP.ACT": "h.0", "WTE": "wte",
    "h.*.mlp.acts": "h.0.mlp.act", "logit": "logits", "zzzz": "wte", "": "wte",
}  # fmt: skip


@pytest.mark.parametrize("unknown", NEAR)
def test_an_unknown_name_is_an_error_that_lists_near_names(model, unknown):
    for context in (watch(model, "embed", unknown), patch(model, {"embed": add, unknown: add})):
        with pytest.raises(ValueError, match=re.escape(f"{unknown!r}")) as error, context:
            pass
        assert NEAR[unknown] in str(error.value) and not hooks(model)
