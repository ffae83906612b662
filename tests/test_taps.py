"""Taps: watching changes nothing, patching changes what it should, leaving restores everything."""

import fnmatch
import re
from contextlib import ExitStack
from copy import deepcopy
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import _global_forward_hooks

from gpt2_script import gelu, patch, tapped, watch

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, C, H, D, V = 2, 5, 24, 3, 8, 50  # the sizes of the fixtures `model` and `ids`

BLOCK = {
    "resid_pre": (B, T, C),
    "ln_1": (B, T, C),
    "attn.q": (B, H, T, D),
    "attn.k": (B, H, T, D),
    "attn.v": (B, H, T, D),
    "attn.scores": (B, H, T, T),
    "attn.pattern": (B, H, T, T),
    "attn.heads": (B, H, T, D),
    "attn.out": (B, T, C),
    "resid_mid": (B, T, C),
    "ln_2": (B, T, C),
    "mlp.pre": (B, T, 4 * C),
    "mlp.act": (B, T, 4 * C),
    "mlp.out": (B, T, C),
    "resid_post": (B, T, C),
}
SHAPES = {  # every name, in the order of the wiring
    "wte": (B, T, C),
    "wpe": (T, C),
    "embed": (B, T, C),
    **{f"h.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()},
    "ln_f": (B, T, C),
    "logits": (B, T, V),
}
NAMES = list(SHAPES)
BESIDE = {  # later in the order, yet not downstream; all else that is later is downstream
    "wte": {"wpe"},
    "h.0.attn.q": {"h.0.attn.k", "h.0.attn.v"},
    "h.0.attn.k": {"h.0.attn.v"},
    "h.0.attn.v": {"h.0.attn.scores", "h.0.attn.pattern"},
    "h.1.attn.q": {"h.1.attn.k", "h.1.attn.v"},
    "h.1.attn.k": {"h.1.attn.v"},
    "h.1.attn.v": {"h.1.attn.scores", "h.1.attn.pattern"},
}


def identity(value):
    return value


def add(value):
    return value + 1


def double(value):
    return value * 2


def noise(value):
    return value + torch.randn(value.shape, generator=torch.Generator().manual_seed(1))


def noise_in_place(value):
    return value.copy_(noise(value))


def watch_all(model):
    return watch(model)


def patch_all(model):
    return patch(model, {"*": noise})


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


def hooks(model):
    return len(_global_forward_hooks) + sum(len(m._forward_hooks) for m in model.modules())


# Watching


def test_watch_records_the_table(model, ids):
    seen = watched(model, ids)
    assert {name: tuple(value.shape) for name, value in seen.items()} == SHAPES
    assert list(seen) == list(tapped(model, ["*"])) == NAMES


def test_every_wire_is_passed_once(model, ids):
    passed = []
    with patch(model, {n: lambda value, n=n: passed.append(n) or value for n in NAMES}):
        model(ids)
    assert passed == NAMES


def test_every_wire_carries_what_its_name_says(model, ids):
    """Each value follows, by its equation, from the values before it."""
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
            "attn.q": qkv[0],
            "attn.k": qkv[1],
            "attn.v": qkv[2],
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
    expected["ln_f"] = model.ln_f(stream)
    expected["logits"] = seen["ln_f"] @ model.wte.weight.T
    assert list(expected) == NAMES
    for name in NAMES:
        assert torch.allclose(seen[name], expected[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize(
    "patterns, names",
    [
        (["h.*.attn.pattern"], ["h.0.attn.pattern", "h.1.attn.pattern"]),
        (["h.1.*"], [name for name in NAMES if name.startswith("h.1.")]),
        (["h.?.attn.[qk]"], ["h.0.attn.q", "h.0.attn.k", "h.1.attn.q", "h.1.attn.k"]),
        (["*.mlp.out", "*", "embed"], NAMES),
        (["logits", "ln_f", "ln_*"], ["ln_f", "logits"]),
    ],
)
def test_patterns_choose_wires(model, ids, patterns, names):
    calls = []
    with patch(model, {p: lambda value: calls.append(1) or value for p in patterns}):
        with watch(model, *patterns) as seen:
            model(ids)
    assert list(seen) == names
    assert len(calls) == sum(len(fnmatch.filter(NAMES, pattern)) for pattern in patterns)


@pytest.mark.parametrize("training", [False, True])
def test_watching_changes_no_bit(model, ids, training):
    before = run(model.train(training), ids)
    with watch(model), watch(model, "h.0.*"):
        assert same(run(model, ids), before)


def test_what_is_recorded_is_detached(model, ids):
    with watch(model) as seen:
        assert model(ids).requires_grad
    assert not any(value.requires_grad for value in seen.values())


def test_watch_keeps_the_last_run_and_none_after_leaving(model, ids):
    expected = list(watched(model, ids + 1).values())
    with watch(model) as seen:
        model(ids)
        model(ids + 1)
    model(ids)
    assert same(seen.values(), expected)


# Patching


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_that_changes_nothing_changes_no_bit(model, ids, name):
    before = run(model.train(), ids)
    with patch(model, {name: identity}):
        assert same(run(model, ids), before)


@pytest.mark.parametrize("change", [noise, noise_in_place])
@pytest.mark.parametrize("name", NAMES)
def test_a_patch_reaches_all_that_is_downstream_and_nothing_else(model, ids, name, change):
    before = watched(model, ids)
    with patch(model, {name: change}):
        after = watched(model, ids)
    changed = {n for n in NAMES if not torch.equal(before[n], after[n])}
    assert changed == set(NAMES[NAMES.index(name) :]) - BESIDE.get(name, set())
    assert torch.equal(after[name], noise(before[name]))


def test_one_patch_changes_several_wires(model, ids):
    before = watched(model, ids)
    with patch(model, {"wte": add, "wpe": double}):
        after = watched(model, ids)
    assert torch.equal(after["wte"], before["wte"] + 1)
    assert torch.equal(after["wpe"], before["wpe"] * 2)


def test_gradients_flow_through_a_patch(model, ids):
    push = torch.zeros(C, requires_grad=True)
    with patch(model, {"h.0.resid_mid": lambda value: value + push}):
        model(ids)[..., 0].sum().backward()
    assert push.grad.all()


# Leaving


@pytest.mark.parametrize("context", [watch_all, patch_all])
def test_leaving_restores_everything(model, ids, context):
    before = model(ids)
    with context(model):
        model(ids)
        assert hooks(model)
    assert not hooks(model)
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("context", [watch_all, patch_all])
def test_an_exception_inside_restores_everything(model, ids, context):
    before = model(ids)
    with pytest.raises(KeyboardInterrupt), context(model):
        raise KeyboardInterrupt
    assert not hooks(model)
    assert torch.equal(model(ids), before)


def test_an_exception_in_a_patch_restores_everything(model, ids):
    before = model(ids)
    with (
        pytest.raises(ZeroDivisionError),
        watch(model),
        patch(model, {"h.1.mlp.act": lambda _: 1 / 0}),
    ):
        model(ids)
    assert not hooks(model)
    assert torch.equal(model(ids), before)


# Nesting


@pytest.mark.parametrize("order", list(permutations([watch, add, double])))
@pytest.mark.parametrize("name", ["wte", "h.0.attn.q", "h.1.ln_2", "logits"])
def test_patches_apply_in_the_order_entered_and_watch_sees_the_last(model, ids, name, order):
    expected = watched(model, ids)[name]
    with ExitStack() as stack:
        for step in order:
            if step is watch:
                seen = stack.enter_context(watch(model, name))
            else:
                stack.enter_context(patch(model, {name: step}))
                expected = step(expected)
        logits = model(ids)
    with patch(model, {name: lambda value: expected}):
        assert torch.equal(logits, model(ids))
    assert torch.equal(seen[name], expected)


def test_leaving_the_inner_context_keeps_the_outer(model, ids):
    plain = watched(model, ids)["embed"]
    with watch(model) as seen, patch(model, {"embed": add}):
        with patch(model, {"embed": double}), watch(model):
            model(ids)
        assert torch.equal(seen["embed"], (plain + 1) * 2)
        model(ids)
    assert torch.equal(seen["embed"], plain + 1)


def test_two_models_at_once(model, ids):
    other = deepcopy(model)
    plain = watched(model, ids)["embed"]
    with watch(model) as seen, watch(other) as seen_other, patch(model, {"embed": add}):
        model(ids)
        assert not seen_other
        other(ids)
        assert torch.equal(seen_other["embed"], plain)
        with patch(other, {"embed": double}):
            other(ids)
            model(ids)
    assert torch.equal(seen["embed"], plain + 1)
    assert torch.equal(seen_other["embed"], plain * 2)


# Errors


@pytest.mark.parametrize(
    "wrong",
    [
        lambda value: None,
        lambda value: 0,
        lambda value: value.tolist(),
        lambda value: value[:1],
        lambda value: value[None],
        lambda value: value.mean(),
    ],
)
def test_a_patch_must_return_a_tensor_of_the_same_shape(model, ids, wrong):
    with patch(model, {"h.0.resid_mid": wrong}):
        with pytest.raises(ValueError, match=re.escape("[2, 5, 24]")):
            model(ids)


@pytest.mark.parametrize(
    "unknown, near",
    [
        ("h.0.attn.patern", "h.0.attn.pattern"),
        ("h.7.resid_post", "h.1.resid_post"),
        ("h.0.attn.c_attn", "h.0.attn.out"),
        ("H.0.MLP.ACT", "h.0"),
        ("WTE", "wte"),
        ("h.*.mlp.acts", "h.0.mlp.act"),
        ("logit", "logits"),
        ("zzzz", "wte"),
        ("", "wte"),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_near_names(model, unknown, near):
    for context in (watch(model, "embed", unknown), patch(model, {"embed": add, unknown: add})):
        with pytest.raises(ValueError, match=re.escape(f"{unknown!r}")) as error, context:
            pass
        assert near in str(error.value)
        assert not hooks(model)


def test_patterns_that_overlap_in_one_patch_apply_in_the_order_given(model, ids):
    changes = {"embed": lambda x: x + 1, "emb*": lambda x: x * 2}
    with watch(model, "embed") as clean:
        model(ids)
    with patch(model, changes), watch(model, "embed") as seen:
        model(ids)
    assert torch.equal(seen["embed"], (clean["embed"] + 1) * 2)
