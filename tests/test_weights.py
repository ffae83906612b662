"""Files of a model: what other programs write and what suspicious people send, in small.

CASES says of each folder what a user may expect of loading it and of --verify.
"""

import hashlib
import http.server
import json
import math
import os
import pickle
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import damage, write_odd
from safetensors.torch import save, save_file

import gpt2_script
from gpt2_script import InputError, fetch, find_faults, load_model, read_headers, verify_act

V, N, C, L = 50, 16, 64, 2
FILE, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
ALIAS, TIE, OWN = "lm_head.weight", "tie_word_embeddings", "an output table of its own"
UNREADABLE = object()  # --verify ends with one sentence, too
NAN, INF = math.nan, math.inf


def sized_config(**more):
    sizes = {"vocab_size": V, "n_positions": N, "n_embd": C, "n_layer": L}
    return transformers.GPT2Config(**sizes, **more)


def reference(tensors, n_head=4, layer_norm_epsilon=1e-5):
    """transformers' GPT-2 with these tensors."""
    V, config = len(tensors["wte.weight"]), sized_config(n_head=n_head)
    config.vocab_size, config.layer_norm_epsilon = V, layer_norm_epsilon
    model = transformers.GPT2LMHeadModel(config).eval()
    model.transformer.load_state_dict({k: v.float() for k, v in tensors.items()})
    return model


def draw():
    shapes = transformers.GPT2Model(sized_config(n_head=4)).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in shapes.items()}
    tensors["wte.weight"][7, 7] = 0.0
    return tensors


T = draw()
TABLE = T["wte.weight"]
TRIL = torch.ones(1, 1, N, N).tril()


# ---- parts of files


def sets(name, index, value, tensors=T):
    """The tensors with some numbers of one of them replaced."""
    changed = tensors[name].clone()
    changed[index] = value
    return {**tensors, name: changed}


def no(*names):
    return {name: tensor for name, tensor in T.items() if name not in names}


def to(dtype, part=""):
    return {name: x.to(dtype) if part in name else x for name, x in T.items()}


def masks(mask, name="attn.bias"):
    return {**T, **{f"h.{i}.{name}": mask.clone() for i in range(L)}}


def headed(table):
    return {**T, ALIAS: table}


def table(rows):
    """All tensors, the table with this many rows."""
    return {**T, "wte.weight": torch.cat((TABLE, TABLE))[:rows]}


def says(**fields):
    return {CONFIG: {"n_head": 4, **fields}}


def raw(entries, data=b""):
    """A weights file by hand; entries are JSON, or (name, type, shape, from, to)."""
    if not isinstance(entries, str):
        form = '{}:{{"dtype":"{}","shape":{},"data_offsets":[{},{}]}}'
        entries = "{%s}" % ",".join(form.format(json.dumps(n), *rest) for n, *rest in entries)
    return struct.pack("<Q", len(entries.encode())) + entries.encode() + data


def shards(index=None, **parts):
    """A model in shards, {file's name: tensors}, and their index."""
    index = (
        {k: f"{name}.safetensors" for name in parts for k in parts[name]}
        if index is None
        else index
    )
    files = {f"{name}.safetensors": tensors for name, tensors in parts.items()}
    return {FILE: None, INDEX: {"weight_map": index}, **files}


ONE = {name: tensor for name, tensor in T.items() if not name.startswith("h.1")}
TWO = no(*ONE)
WHOLE = save(T)
START = 8 + int.from_bytes(WHOLE[:8], "little")
BIAS = json.loads(WHOLE[8:START])["ln_f.bias"]["data_offsets"]


def again(dtype, shape):
    """The sound file, its header telling ln_f.bias twice."""
    text = WHOLE[8:START].decode().rstrip()[:-1]
    return raw(
        text + f',"ln_f.bias":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{BIAS}}}}}',
        WHOLE[START:],
    )


def sized(low):
    """The sound file with a header whose length begins with these bytes."""
    text = WHOLE[8:START].decode().rstrip()
    room = (int.from_bytes(low, "little") - len(text)) % (1 << 8 * len(low))
    return raw(text + " " * room, WHOLE[START:])


EMPTY = [0], 0, 0
TINY = {"wte.weight": torch.ones(3, 1), "wpe.weight": torch.ones(3, 1)}
MANY = range(12_000)

# folder: its files, other than the sound ones; the tensors and settings of transformers that it
# loads like, or a part of its refusal; a part of each alarm of --verify, if that is another one
CASES = {
    # as other programs write a GPT-2
    "plain": ({}, {}),
    "header of odd length": ({FILE: sized(b"\x03")}, {}),
    "prefix": ({FILE: {f"transformer.{k}": v for k, v in T.items()}}, {}),
    "float64": ({FILE: to(torch.float64)}, {}),
    "float16": ({FILE: to(torch.float16)}, {"tensors": to(torch.float16)}),
    "bfloat16": ({FILE: to(torch.bfloat16)}, {"tensors": to(torch.bfloat16)}),
    "some in float16": ({FILE: to(torch.float16, "mlp")}, {"tensors": to(torch.float16, "mlp")}),
    "shards": (shards(one=ONE, two=TWO), {}),
    "one file goes before shards": ({**shards(one=to(torch.half)), FILE: T}, {}, "one.safetensors"),
    "table as lm_head": ({FILE: {**no("wte.weight"), ALIAS: TABLE}}, {}),
    "lm_head is the table": ({FILE: headed(TABLE.clone())}, {}),
    "lm_head is the table, untied": ({FILE: headed(TABLE.clone()), **says(**{TIE: False})}, {}),
    "prefix and lm_head": ({FILE: {f"transformer.{k}": v for k, v in T.items()} | {ALIAS: TABLE.clone()}}, {}),
    "mask, bool": ({FILE: masks(TRIL.bool())}, {}),
    "mask, uint8": ({FILE: masks(TRIL.byte())}, {}),
    "mask, float16": ({FILE: masks(TRIL.half())}, {}),
    "mask, bfloat16": ({FILE: masks(TRIL.bfloat16())}, {}),
    "mask, float32": ({FILE: masks(TRIL)}, {}),
    "masked_bias": ({FILE: masks(torch.tensor(-1e4), "attn.masked_bias")}, {}),
    "64 rows": ({FILE: table(64), **says(vocab_size=64)}, {"tensors": table(64)}),
    "number near the largest": ({FILE: sets("ln_f.bias", slice(2), 3e38)}, {"tensors": sets("ln_f.bias", slice(2), 3e38)}),
    # config.json
    "other name of n_head": ({CONFIG: {"num_attention_heads": 8}}, {"n_head": 8}),
    "epsilon": (says(layer_norm_epsilon=0.1), {"layer_norm_epsilon": 0.1}),
    "every field": ({CONFIG: sized_config(n_head=2).to_dict()}, {"n_head": 2}),
    "every size twice": (says(n_ctx=N, n_positions=N, max_position_embeddings=N, hidden_size=C, n_inner=4 * C), {}),
    "byte order mark": ({CONFIG: b'\xef\xbb\xbf{"n_head": 2}'}, {"n_head": 2}),
    "UTF-16": ({CONFIG: '{"n_head": 2}'.encode("utf-16")}, {"n_head": 2}),
    "UTF-32": ({CONFIG: '{"n_head": 2}'.encode("utf-32-be")}, {"n_head": 2}),
    "no config": ({CONFIG: None}, {"n_head": 1}),
    "config without heads": ({CONFIG: {}}, "give n_head", None),
    "Latin-1": ({CONFIG: '{"n_head": 4, "by": "é"}'.encode("latin-1")}, "config.json is there, but it is not JSON"),
    "config is empty": ({CONFIG: b""}, "config.json is there, but it is not JSON"),
    "config with a comma too many": ({CONFIG: b'{"n_head": 4,}'}, "is not JSON"),
    "config is a list": ({CONFIG: b"[4]"}, "is not a JSON object"),
    "config is nested": ({CONFIG: b"[" * 100_000}, "is not JSON"),
    "config is nested in a field": ({CONFIG: b'{"model_type":' + b"[" * 900 + b"]" * 900 + b"}"}, "model_type"),
    "config is a folder": ({CONFIG: None, f"{CONFIG}/x": b""}, "config.json: Is a directory", UNREADABLE),
    **{
        f"n_head {bad!r}": ({CONFIG: {"n_head": bad}}, part)
        for bad, part in [(True, "n_head"), ("3", "n_head"), (2.0, "n_head"), (0, "n_head")]
        + [(-4, "n_head"), (None, "n_head"), (5, "does not divide"), ([4], "n_head"), (10**9, "divide")]
    },
    **{
        f"epsilon {bad!r}"[:20]: (says(layer_norm_epsilon=bad), "layer_norm_epsilon")
        for bad in ("x", 0, -1e-5, NAN, INF, True, None, [], 10**400)
    },
    **{
        f"{field} {value!r}"[:50]: (says(**{field: value}), f"{field} {value!r}"[:99])
        for field, value in [
            ("num_attention_heads", 2), ("n_inner", 100), ("model_type", "bert"), (TIE, False),
            ("pruned_heads", {"0": [1]}), ("quantization_config", {"bits": 4}), ("n_embd", 768),
            ("add_cross_attention", True), ("is_encoder_decoder", True), ("hidden_size", 65),
            ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True),
            ("activation_function", "quick_gelu"), ("n_layer", 12), ("num_hidden_layers", 1),
            ("vocab_size", 50257), ("n_positions", 1024), ("max_position_embeddings", 8),
            ("transformers_weights", "other.safetensors"), ("model_type", "\x1b[31m" * 999),
        ]
    },
    "64 rows, config says 50": ({FILE: table(64), **says(vocab_size=V)}, "vocab_size 50"),
    "only lm_head, untied": ({FILE: {**no("wte.weight"), ALIAS: TABLE}, **says(**{TIE: False})}, TIE),
    # tensors that are not GPT-2's
    "output table": ({FILE: headed(TABLE + 1), **says(**{TIE: False})}, OWN),
    "output table, off by a bit": ({FILE: headed(sets("wte.weight", (49, 63), 0.5)["wte.weight"])}, OWN),
    "output table, -0": ({FILE: headed(sets("wte.weight", (7, 7), -0.0)["wte.weight"])}, OWN),
    "output table, float64": ({FILE: headed(TABLE.double())}, OWN),
    "output table, shorter": ({FILE: headed(TABLE[:49].clone())}, OWN),
    "int8": ({FILE: to(torch.int8, "c_fc.weight")}, "c_fc.weight is I8"),
    "int32": ({FILE: to(torch.int32, "ln_f.weight")}, "ln_f.weight is I32"),
    "NaN": ({FILE: sets("h.1.mlp.c_fc.weight", (3, 5), NAN)}, "h.1.mlp.c_fc.weight holds NaN or infinity"),
    "infinity in float16": ({FILE: to(torch.half) | {"wte.weight": (TABLE / 0).half()}}, "wte.weight holds NaN"),
    "opposite infinities": ({FILE: sets("ln_f.bias", slice(2), torch.tensor([INF, -INF]))}, "ln_f.bias holds NaN"),
    "tensor missing": ({FILE: no("h.1.ln_2.bias")}, "h.1.ln_2.bias is missing"),
    "block missing": ({FILE: {k: v for k, v in T.items() if "h.0" not in k}}, "h.0."),
    "table missing": ({FILE: no("wte.weight")}, "wte.weight is missing, also as lm_head.weight"),
    "positions missing": ({FILE: no("wpe.weight")}, "wpe.weight is missing"),
    "no tensors": ({FILE: {}}, "wte.weight is missing"),
    "another model's": ({FILE: {"a": torch.zeros(3)}}, "wte.weight is missing"),
    "extra": ({FILE: {**T, "\x1b[2J\n": torch.zeros(3)}}, r"'\x1b[2J\n' is no tensor of GPT-2"),
    "extra, not ASCII": ({FILE: {**T, "h.0.\u202eü": torch.zeros(3)}}, r"\u202e\xfc' is no tensor of GPT-2"),
    "block 999999999": ({FILE: {**T, "h.999999999.ln_1.bias": torch.ones(C)}}, "'h.999999999.ln_1.bias' is no tensor"),
    "block 00": ({FILE: {**T, "h.00.attn.bias": TRIL}}, "'h.00.attn.bias' is no tensor"),
    "mask of block 2": ({FILE: {**T, "h.2.attn.bias": TRIL}}, "'h.2.attn.bias' is no tensor"),
    "mask of block 9999...": ({FILE: {**T, f"h.{'9' * 5000}.attn.bias": TRIL}}, "is no tensor of GPT-2"),
    "twice by the prefix": ({FILE: {**T, "transformer.ln_f.bias": torch.ones(C)}}, "'ln_f.bias once more' is no tensor"),
    "twice in the header": ({FILE: again("F32", [C])}, "'ln_f.bias once more' is no tensor"),
    "twice, as another type": ({FILE: again("F16", [2 * C])}, "ln_f.bias"),
    "scalar": ({FILE: {**T, "ln_f.weight": torch.tensor(1.0)}}, "ln_f.weight is F32 [], not floats [64]"),
    **{
        f"{name} {list(shape)}": ({FILE: {**T, name: torch.zeros(shape)}}, f"{name} is")
        for name, *shape in [
            ("h.0.mlp.c_fc.weight", 4 * C, C), ("h.1.attn.c_attn.weight", C, 71), ("wpe.weight", N, 63),
            ("wpe.weight", N), ("wpe.weight", 0, C), ("wte.weight", V, 0), ("wte.weight", V),
        ]
    },
    "mask, open": ({FILE: masks(torch.ones(1, 1, N, N).bool())}, {}, "attn.bias is not the causal mask"),
    "mask, open by one": ({FILE: masks(sets("m", (0, 0, 3, 4), 1.0, {"m": TRIL})["m"])}, {}, "is not the causal mask"),
    "mask, NaN": ({FILE: masks(TRIL * NAN)}, {}, "is not the causal mask"),
    "mask, int64": ({FILE: masks(TRIL.long())}, {}, "attn.bias is I64, which no mask is"),
    "mask, smaller": ({FILE: masks(TRIL[..., :8, :8].clone())}, {}, "is not the causal mask"),
    "mask, flat": ({FILE: masks(TRIL.flatten())}, {}, "is not the causal mask"),
    "mask, empty": ({FILE: masks(torch.zeros(0, 0))}, {}, "is not the causal mask"),
    "mask, bytes": ({FILE: {**T, "h.0.attn.bias": torch.arange(240, dtype=torch.uint8)}}, {}, "h.0.attn.bias is not the causal"),
    "mask, bool bytes": ({FILE: save({**T, "h.0.attn.bias": TRIL.bool()}).replace(b"\1\1\1\0", b"\1\7\1\0", 1)}, {}, "is not the"),
    "mask, a type that torch lacks": ({FILE: raw([*((n, "F32", [*x.shape], 0, 0) for n, x in ()), ("h.0.attn.bias", "F4", [4], 0, 2)], b"ab")}, "wte.weight is missing", "h.0.attn.bias is F4"),
    "masked_bias hides nothing": ({FILE: masks(torch.tensor(0.0), "attn.masked_bias")}, {}, "hides nothing"),
    "masked_bias NaN": ({FILE: masks(torch.tensor(NAN), "attn.masked_bias")}, {}, "hides nothing"),
    "masked_bias, many": ({FILE: masks(torch.full((9,), -1e4), "attn.masked_bias")}, {}, "hides nothing"),
    # headers that would take long
    "12,000 blocks": ({FILE: raw([(f"h.{i}.x", "F32", *EMPTY) for i in MANY])}, "wte.weight is missing"),
    "12,000 matrices": ({FILE: {**TINY, **{f"h.{i}.x": torch.ones(1, 1) for i in MANY}}}, "missing", "h."),
    "one name 12,000 times": ({FILE: raw([("a", "F32", *EMPTY)] * 12_000)}, "wte.weight is missing"),
    "3 MB of header": ({FILE: raw([(f"h.{i}.{'x' * 200}", "F32", *EMPTY) for i in MANY])}, "wte.weight is missing"),
    # no weights
    **{
        name: ({FILE: content}, part, UNREADABLE)
        for name, content, part in [
            ("empty", b"", "is empty"), ("html", b"<html>log in</html>" * 9, "no safetensors file"),
            ("zeros", bytes(99), "no safetensors file"), ("ones", b"\xff" * 99, "no safetensors file"),
            ("pickle", pickle.dumps({"weights": 1}), "no safetensors file"), ("cut in 3", WHOLE[:3], "safetensors"),
            ("cut in 8", WHOLE[:8], "safetensors"), ("cut in 9", WHOLE[:9], "cut short or damaged"),
            ("cut in the header", WHOLE[:300], "cut short"), ("cut by one", WHOLE[:-1], "cut short"),
            ("longer", WHOLE + b"more", "damaged"), ("rubbish", WHOLE[:20] + b"\0" + WHOLE[21:], "damaged"),
            ("header of 100 GB", struct.pack("<Q", 10**11) + WHOLE[8:], "damaged"),
            ("nested header", raw('{"a":' * 50_000), "damaged"), ("no file", None, "folder without model.safetensors"),
        ]
    },
    "only a pickle": ({FILE: None, "pytorch_model.bin": b"\x80\4."}, "folder without model.safetensors", UNREADABLE),
    "shard missing": (shards({"a": "one.safetensors", "b": "2.safetensors"}, one=ONE), "2.safetensors does not exist", UNREADABLE),
    "shard is a pickle": (shards({"a": "one.bin"}, one=ONE), "is a pickle", UNREADABLE),
    "tensor in two shards": (shards(one=T, two=TWO), "once more' is no tensor"),
    "index is not JSON": ({**shards(one=T), INDEX: b"{,"}, "index.json is there, but it is not JSON", UNREADABLE),
    **{
        f"index names {name!r}"[:30]: (shards({"a": name}, one=T), "does not name the files of its own folder", UNREADABLE)
        for name in ("../x.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "a/../../x")
    },
    "index names nothing": (shards({}), "does not name the files of its own folder", UNREADABLE),
    "index is a list": (shards(["one.safetensors"], one=T), "does not name the files of its own", UNREADABLE),
}  # fmt: skip


def write(folder, files):
    """Write files as they are given: tensors, JSON, bytes; None is none."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None and name.endswith(".safetensors"):
            save_file(content, path)
        elif content is not None:
            path.write_text(json.dumps(content))
    return folder


def refusal(path, **arguments):
    with pytest.raises(InputError) as caught:
        load_model(path, **arguments)
    sentence = str(caught.value)
    assert sentence.isprintable() and len(sentence) < 300 + len(str(path))
    return sentence


def alarms(*paths):
    return [text for record in verify_act(*paths) for text in getattr(record, "odd", ())]


def assert_same(model, peer, ids):
    with torch.no_grad():
        ours, theirs = model(ids), peer(ids).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_folder(name, tmp_path, ids):
    files, expected, *rest = CASES[name]
    refused = isinstance(expected, str)
    odd = rest[0] if rest else expected if refused else None
    write(tmp_path, {FILE: T, CONFIG: {"n_head": 4}} | files)
    start = time.process_time()
    if refused:
        assert expected in refusal(tmp_path)
    else:
        model = load_model(tmp_path)
        assert_same(model, reference(**{"tensors": T, **expected}), ids)
    if odd is UNREADABLE:
        with pytest.raises(InputError) as caught:
            alarms(tmp_path)
        assert expected in str(caught.value)
    else:
        found = alarms(tmp_path)
        assert all(odd and odd in text and text.isprintable() for text in found)
        assert bool(found) == bool(odd)
    assert time.process_time() - start < 2
