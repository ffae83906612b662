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

import huggingface_hub
import pytest
import torch
import transformers
from conftest import damage
from safetensors.torch import save, save_file

import gpt2_script
from gpt2_script import InputError, fetch, load_model, verify_act

V, N, C, L = 50, 16, 64, 2
FILE, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
TABLE, HEAD, TIE = "wte.weight", "lm_head.weight", "tie_word_embeddings"
NAN, INF, TRIL = math.nan, math.inf, torch.ones(1, 1, N, N).tril()
UNREADABLE = object()  # --verify ends with the refusal, too


def config(**more):
    """transformers' config of the sound model."""
    sizes = {"vocab_size": V, "n_positions": N, "n_embd": C, "n_layer": L, "n_head": 4}
    return transformers.GPT2Config(**sizes | more)


def reference(tensors, **settings):
    """transformers' GPT-2 with these tensors."""
    model = transformers.GPT2LMHeadModel(config(vocab_size=len(tensors[TABLE]), **settings))
    model.transformer.load_state_dict({name: x.float() for name, x in tensors.items()})
    return model.eval()


def draw():
    """The sound model's tensors by their names; one number is 0."""
    generator, shapes = torch.Generator().manual_seed(0), transformers.GPT2Model(config())
    shapes = {name: tensor.shape for name, tensor in shapes.state_dict().items()}
    tensors = {name: 0.3 * torch.randn(x, generator=generator) for name, x in shapes.items()}
    tensors[TABLE][7, 7] = 0.0
    return tensors


T = draw()
WHOLE = save(T)
START = 8 + int.from_bytes(WHOLE[:8], "little")  # of the numbers
BIAS = json.loads(WHOLE[8:START])["ln_f.bias"]["data_offsets"]
ONE = {name: tensor for name, tensor in T.items() if not name.startswith("h.1")}
TWO = {name: tensor for name, tensor in T.items() if name.startswith("h.1")}


def sets(name, index, value):
    """The tensors, some numbers of one replaced."""
    changed = T[name].clone()
    changed[index] = value
    return {**T, name: changed}


def no(part):
    return {name: tensor for name, tensor in T.items() if part not in name}


def to(dtype, part=""):
    return {name: x.to(dtype) if part in name else x for name, x in T.items()}


def rows(count):
    return {**T, TABLE: torch.cat((T[TABLE], T[TABLE]))[:count]}


def more(**tensors):
    """The files of the sound model with more tensors, or others."""
    return {FILE: T | {name.replace("__", "."): tensor for name, tensor in tensors.items()}}


def masks(mask, name="attn.bias"):
    return {FILE: T | {f"h.{i}.{name}": mask.clone() for i in range(L)}}


def headed(change=lambda table: table, files=T, **fields):
    """An output table, made from the token table."""
    return {FILE: {**files, HEAD: change(T[TABLE].clone())}, **says(**fields)}


def says(**fields):
    return {CONFIG: {"n_head": 4, **fields}}


def raw(entries, data=b""):
    """A weights file by hand; entries are JSON, or (name, type, shape, from, to)."""
    if not isinstance(entries, str):
        form = '{}:{{"dtype":"{}","shape":{},"data_offsets":[{},{}]}}'
        entries = ",".join(form.format(json.dumps(name), *rest) for name, *rest in entries)
        entries = f"{{{entries}}}"
    return struct.pack("<Q", len(entries.encode())) + entries.encode() + data


def adds(name, dtype, shape, data=b"", place=None):
    """The sound file with one more tensor, or with one more name for a place."""
    end = len(WHOLE) - START
    entry = {"dtype": dtype, "shape": shape, "data_offsets": place or [end, end + len(data)]}
    text = WHOLE[8:START].decode().rstrip()[:-1]
    return raw(f"{text},{json.dumps(name)}:{json.dumps(entry)}}}", WHOLE[START:] + data)


def spaced(low):
    """The sound file, its header so long that the file begins with these bytes."""
    text = WHOLE[8:START].decode().rstrip()
    spaces = (int.from_bytes(low, "little") - len(text)) % (1 << 8 * len(low))
    return {FILE: raw(text + " " * spaces, WHOLE[START:])}


def shards(index=None, **parts):
    """A model in shards, {file's name: tensors}, and their index."""
    named = {name: f"{part}.safetensors" for part, x in parts.items() for name in x}
    files = {f"{part}.safetensors": tensors for part, tensors in parts.items()}
    return {FILE: None, INDEX: {"weight_map": named if index is None else index}, **files}


PREFIXED = {f"transformer.{name}": tensor for name, tensor in T.items()}
TINY = {TABLE: torch.ones(3, 1), "wpe.weight": torch.ones(3, 1)}
MANY, NOTHING = range(12_000), ("F32", [0], 0, 0)
NO_JSON, NO_GPT2 = "config.json is there, but it is not JSON", "is no tensor of GPT-2"
OPEN, OWN = "is not the causal mask that its name says", "an output table of its own"
ELSEWHERE, NO_FILE = "does not name the files of its own folder", "folder without model.safetensors"

# folder: its files, other than the sound ones; what it loads like, as tensors and settings for
# transformers, or a part of the refusal; a part of every alarm of --verify, if it is another one
CASES = {
    # a GPT-2 as other programs write it
    "plain": ({}, {}),
    "odd header": (spaced(b"\x03"), {}),
    "header like a pickle": (spaced(b"\x80"), {}),
    "header like a zip": (spaced(b"PK"), {}),
    "prefix": ({FILE: PREFIXED}, {}),
    "float64": ({FILE: to(torch.float64)}, {}),
    "float16": ({FILE: to(torch.float16)}, {"tensors": to(torch.float16)}),
    "bfloat16": ({FILE: to(torch.bfloat16)}, {"tensors": to(torch.bfloat16)}),
    "some float16": ({FILE: to(torch.float16, "mlp")}, {"tensors": to(torch.float16, "mlp")}),
    "shards": (shards(one=ONE, two=TWO), {}),
    "file and shards": ({**shards(one=to(torch.half)), FILE: T}, {}, "one.safetensors holds"),
    "alias": (headed(files=no(TABLE)), {}),
    "head is tied": (headed(), {}),
    "head is tied, says not": (headed(**{TIE: False}), {}),
    "prefix and head": (headed(files=PREFIXED), {}),
    "mask bool": (masks(TRIL.bool()), {}),
    "mask uint8": (masks(TRIL.byte()), {}),
    "mask float16": (masks(TRIL.half()), {}),
    "mask bfloat16": (masks(TRIL.bfloat16()), {}),
    "mask float32": (masks(TRIL), {}),
    "masked_bias": (masks(torch.tensor(-1e4), "attn.masked_bias"), {}),
    "64 rows": ({FILE: rows(64), **says(vocab_size=64)}, {"tensors": rows(64)}),
    "sum overflows": ({FILE: sets("wpe.weight", (15, slice(2)), 3e38)}, {}),
    # config.json
    "heads, other name": ({CONFIG: {"num_attention_heads": 8}}, {"n_head": 8}),
    "epsilon": (says(layer_norm_epsilon=0.1), {"layer_norm_epsilon": 0.1}),
    "every field": ({CONFIG: config(n_head=2).to_dict()}, {"n_head": 2}),
    "other names": (says(n_inner=256, hidden_size=C, max_position_embeddings=N), {}),
    "byte order mark": ({CONFIG: b'\xef\xbb\xbf{"n_head": 2}'}, {"n_head": 2}),
    "UTF-16": ({CONFIG: '{"n_head": 2}'.encode("utf-16")}, {"n_head": 2}),
    "UTF-32": ({CONFIG: '{"n_head": 2}'.encode("utf-32-be")}, {"n_head": 2}),
    "no config": ({CONFIG: None}, {"n_head": 1}),
    "config without heads": ({CONFIG: {}}, "give n_head", None),
    "Latin-1": ({CONFIG: '{"n_head": 4, "by": "é"}'.encode("latin-1")}, NO_JSON),
    "config empty": ({CONFIG: b""}, NO_JSON),
    "config with a comma": ({CONFIG: b'{"n_head": 4,}'}, NO_JSON),
    "config nested": ({CONFIG: b"[" * 100_000}, NO_JSON),
    "config list": ({CONFIG: b"[4]"}, "is not a JSON object"),
    "field nested": ({CONFIG: b'{"model_type":' + b"[" * 900 + b"]" * 900 + b"}"}, "model_type"),
    **{
        f"{field} {value!r}"[:40]: ({CONFIG: {"num_attention_heads": 4, field: value}}, field)
        for field, values in {
            "n_head": (True, "3", 2.0, 0, -4, None, [4], 2),  # with 4 under the other name
            "num_attention_heads": ("4", 4.0),
            "layer_norm_epsilon": ("x", 0.0, 0, -1e-5, NAN, INF, True, None, [], 10**400),
            "n_inner": (100,), "model_type": ("bert", "\x1b[31m" * 999), TIE: (False,),
            "pruned_heads": ({"0": [1]},), "quantization_config": ({"bits": 4},),
            "add_cross_attention": (True,), "is_encoder_decoder": (True,), "n_embd": (768,),
            "scale_attn_weights": (False,), "scale_attn_by_inverse_layer_idx": (True,),
            "activation_function": ("quick_gelu", "gelu"), "n_layer": (12,), "hidden_size": (65,),
            "num_hidden_layers": (1,), "vocab_size": (50257,), "n_positions": (1024,),
            "max_position_embeddings": (8,), "transformers_weights": ("other.safetensors",),
        }.items()
        for value in values
    },
    **{f"{str(n)[:9]} heads": (says(n_head=n), "divide into") for n in (5, 10**9, 10**4000)},
    "64 rows, says 50": ({FILE: rows(64), **says(vocab_size=V)}, "vocab_size 50"),
    "alias, says untied": (headed(files=no(TABLE), **{TIE: False}), TIE),
    # tensors that are not GPT-2's
    "head": (headed(lambda table: table + 1, **{TIE: False}), OWN),
    "head, one number": (headed(lambda table: table.index_fill(0, torch.tensor(9), 1.0)), OWN),
    "head, -0": (headed(lambda table: torch.where(table == 0, -0.0, table)), OWN),
    "head, float64": (headed(lambda table: table.double()), OWN),
    "head, shorter": (headed(lambda table: table[:49].clone()), OWN),
    "head, other shape": (headed(lambda table: table.view(25, 128)), OWN),
    "int8": ({FILE: to(torch.int8, "c_fc.weight")}, "c_fc.weight is I8"),
    "int32": ({FILE: to(torch.int32, "ln_f.weight")}, "ln_f.weight is I32"),
    "NaN": ({FILE: sets("h.1.mlp.c_fc.weight", (3, 5), NAN)}, "h.1.mlp.c_fc.weight holds NaN"),
    "infinity": ({FILE: to(torch.half) | {TABLE: (T[TABLE] / 0).half()}}, "wte.weight holds NaN"),
    "infinities": ({FILE: sets("ln_f.bias", range(2), torch.tensor([INF, -INF]))}, "infinity"),
    "tensor missing": ({FILE: no("h.1.ln_2.bias")}, "h.1.ln_2.bias is missing"),
    "block missing": ({FILE: no("h.0.")}, "h.0.ln_1.weight is missing", ""),
    "table missing": ({FILE: no(TABLE)}, "wte.weight is missing, also as lm_head.weight"),
    "positions missing": ({FILE: no("wpe.weight")}, "wpe.weight is missing"),
    "no tensors": ({FILE: {}}, "wte.weight is missing"),
    "another model": ({FILE: {"a": torch.zeros(3)}}, "wte.weight is missing"),
    "extra": (more(**{"\x1b[2J\n": torch.zeros(3)}), rf"'\x1b[2J\n' {NO_GPT2}"),
    "extra matrix": (more(**{"h.0.\x1b": torch.ones(9, 9)}), rf"'h.0.\x1b' {NO_GPT2}", r"h.0.\x1b"),
    "extra, not ASCII": (more(**{"h.0.\u202eü": torch.zeros(3)}), rf"'h.0.\u202e\xfc' {NO_GPT2}"),
    "block 999999999": (more(h__999999999__ln_1__bias=TRIL), f"ln_1.bias' {NO_GPT2}"),
    "block 999...": (more(**{f"h.{'9' * 5000}.attn.bias": TRIL}), NO_GPT2),
    "block 00": (more(h__00__attn__bias=TRIL), f"'h.00.attn.bias' {NO_GPT2}"),
    "block 2 has a mask alone": (more(h__2__attn__bias=TRIL), "h.2.", "h.2."),
    "twice": (more(transformer__ln_f__bias=TRIL), f"'ln_f.bias once more (1)' {NO_GPT2}"),
    "twice in the header": ({FILE: adds("ln_f.bias", "F32", [C], place=BIAS)}, "once more (1)"),
    "twice, float16": ({FILE: adds("ln_f.bias", "F16", [128], place=BIAS)}, "once more (1)"),
    "scalar": (more(ln_f__weight=torch.tensor(1.0)), "ln_f.weight is F32 [], not floats [64]"),
    **{
        f"{name} {shape}": (more(**{name: torch.zeros(shape)}), f"{name} is")
        for name, *shape in [
            ("h.0.mlp.c_fc.weight", 4 * C, C),  # as torch's own Linear has it
            ("h.1.attn.c_attn.weight", C, 71), ("wpe.weight", N, 63), ("wpe.weight", N),
            ("wpe.weight", 0, C), (TABLE, V, 0), (TABLE, V),
        ]
    },
    "mask open": (masks(torch.ones_like(TRIL).bool()), {}, OPEN),
    "mask open by one": (masks(TRIL.index_put([torch.tensor(0)] * 3 + [torch.tensor(9)],
        torch.tensor(1.0))), {}, OPEN),
    "mask of NaN": (masks(TRIL * NAN), {}, OPEN),
    "mask of int64": (masks(TRIL.long()), {}, "attn.bias is I64, which no mask is"),
    "mask smaller": (masks(TRIL[..., :8, :8].clone()), {}, OPEN),
    "mask flat": (masks(TRIL.flatten()), {}, OPEN),
    "mask empty": (masks(torch.zeros(0, 0)), {}, OPEN),
    "mask of bytes": (more(h__0__attn__bias=torch.arange(240).byte()), {}, f"h.0.attn.bias {OPEN}"),
    "mask bool of bytes": ({FILE: adds("h.0.attn.bias", "BOOL", [N, N],
        bytes(7 * TRIL.byte().flatten().numpy()))}, {}, OPEN),
    "mask of no type": ({FILE: adds("h.0.attn.bias", "F4", [128], bytes(64))}, {}, "is F4"),
    "masked_bias 0": (masks(torch.tensor(0.0), "attn.masked_bias"), {}, "hides nothing"),
    "masked_bias NaN": (masks(torch.tensor(NAN), "attn.masked_bias"), {}, "hides nothing"),
    "masked_bias, 9": (masks(torch.full((9,), -1e4), "attn.masked_bias"), {}, "hides nothing"),
    # headers that could take long
    "12,000 blocks": ({FILE: raw([(f"h.{i}.x", *NOTHING) for i in MANY])}, "wte.weight is"),
    "12,000 times": ({FILE: raw([("a", *NOTHING)] * 12_000)}, "wte.weight is missing"),
    "3 MB": ({FILE: raw([(f"h.{i}.{'x' * 200}", *NOTHING) for i in MANY])}, "wte.weight is"),
    "12,000 matrices": ({FILE: TINY | {f"h.{i}.x": torch.ones(1, 1) for i in MANY}},
        "ln_f.weight is missing (and 156001 more", ""),
    # no weights
    **{
        name: ({FILE: content}, part, UNREADABLE)
        for name, content, part in [
            ("empty", b"", "is empty"), ("html", b"<html>log in</html>", "no safetensors file"),
            ("zeros", bytes(99), "no safetensors file"), ("ones", b"\xff" * 99, "no safetensors"),
            ("pickle", pickle.dumps({"weights": 1}), "no safetensors"), ("3", WHOLE[:3], "no safe"),
            ("8", WHOLE[:8], "no safetensors"), ("9", WHOLE[:9], "cut short or damaged"),
            ("300", WHOLE[:300], "cut short"), ("all but one", WHOLE[:-1], "cut short"),
            ("longer", WHOLE + b"x", "damaged"), ("nested", raw('{"a":' * 50_000), "damaged"),
            ("rubbish", WHOLE[:20] + b"\0" + WHOLE[21:], "damaged"), ("nothing", None, NO_FILE),
            ("100 GB", struct.pack("<Q", 10**11) + WHOLE[8:], "damaged"),
        ]
    },
    "only a pickle": ({FILE: None, "pytorch_model.bin": b"\x80\4."}, NO_FILE, UNREADABLE),
    "a shard missing": (shards({"a": "2.safetensors"}, one=T), "2.safetensors does not exist",
        UNREADABLE),
    "a shard is a pickle": (shards({"a": "one.bin"}, one=ONE), "is a pickle", UNREADABLE),
    "a tensor in two shards": (shards(one=T, two=TWO), f"once more (1)' {NO_GPT2}"),
    "index not JSON": ({**shards(one=T), INDEX: b"{,"}, "index.json is there, but", UNREADABLE),
    **{
        f"index names {names}": (shards(names, one=T), ELSEWHERE, UNREADABLE)
        for names in [{}, ["one.safetensors"]] + [
            {"a": name} for name in ("../x", "/etc/passwd", "..", ".", "", "sub/x", "a/../../x")
        ]
    },
}  # fmt: skip


def write(folder, files):
    """Write files as they are given: tensors, JSON, bytes; None is no file."""
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None and name.endswith(".safetensors"):
            save_file(content, folder / name)
        elif content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def sound(tmp_path):
    return write(tmp_path, {FILE: T, CONFIG: {"n_head": 4}})


def refusal(path, **arguments):
    with pytest.raises(InputError) as caught:
        load_model(path, **arguments)
    sentence = str(caught.value)
    assert len(sentence) < 250 + 2 * len(str(path))
    return sentence


def alarms(*paths):
    return [text for record in verify_act(*paths) for text in getattr(record, "odd", ())]


def is_same(model, peer, ids):
    with torch.no_grad():
        ours, theirs = model(ids), peer(ids).logits
    return (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_folder(name, tmp_path, ids):
    files, expected, *rest = CASES[name]
    refused = isinstance(expected, str)
    odd = rest[0] if rest else expected if refused else None
    write(tmp_path, {FILE: T, CONFIG: {"n_head": 4}} | files)
    start = time.process_time()
    if refused:
        sentence = refusal(tmp_path)
        assert expected in sentence and sentence.isprintable()
    else:
        model = load_model(tmp_path)
        assert is_same(model, reference(**{"tensors": T} | expected), ids) and not model.training
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    loaded = time.process_time()
    if odd is UNREADABLE:
        with pytest.raises(InputError) as caught:
            alarms(tmp_path)
        assert expected in str(caught.value)
    elif odd is None:
        assert alarms(tmp_path) == []
    else:
        found = alarms(tmp_path)
        assert found and all(odd in text and text.isprintable() for text in found)
        assert len(found) <= 2 * L + 20 and len(found) == len({*found})
    verified = time.process_time()
    assert loaded - start < 1 and verified - loaded < (4 if name == "12,000 matrices" else 2)


# ---- paths and names


def test_a_file_by_its_path(sound, ids):
    assert is_same(load_model(str(sound / FILE)), reference(T), ids)
    assert alarms(str(sound / FILE), sound / FILE) == []


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl", "PT", "Bin"])
def test_a_pickle_is_never_unpickled(suffix, sound):
    bomb, path = sound / "executed", sound / f"model.{suffix}"
    for save_bomb in (torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))):
        save_bomb(Bomb(bomb), path)
        assert "unpickling runs code" in refusal(path)
        assert alarms(sound) == [f"{path.name} can run code where it is loaded"]
        (sound / FILE).write_bytes(path.read_bytes())
        assert "no safetensors file" in refusal(sound)
        save_file(T, sound / FILE)
    assert not bomb.exists()


def test_what_is_no_file(sound, monkeypatch):
    assert "no.safetensors does not exist" in refusal(sound / "no.safetensors")
    assert "gpt3 does not exist" in refusal("gpt3") and "gpt2-xl" in refusal("gpt3")
    assert "does not exist" in refusal("./gpt2") and "does not exist" in refusal("a\0b")
    assert "cannot read aaa" in refusal("a" * 5000)
    assert "is empty" in refusal("")
    assert "is no plain file" in refusal("/dev/null")
    assert "name that is not UTF-8" in refusal(sound / "\udcff.safetensors")
    os.mkfifo(sound / "pipe.safetensors")
    assert "pipe.safetensors is no plain file" in refusal(sound / "pipe.safetensors")
    with pytest.raises(InputError, match="is no plain file"):
        alarms(sound)
    (sound / CONFIG).unlink()
    os.mkfifo(sound / CONFIG)
    assert "config.json is no plain file" in refusal(sound)
    (sound / CONFIG).unlink()
    (sound / CONFIG).symlink_to("nowhere")
    assert "cannot read" in refusal(sound)
    monkeypatch.setattr("builtins.open", lambda *arguments: os.open("/nowhere", 0))
    assert "cannot read" in refusal(sound)  # as where it is not allowed


def test_a_release_goes_before_a_folder_of_its_name_but_not_before_its_path(sound, monkeypatch):
    """gpt2 is the release, ./gpt2 a path, Path("gpt2") a path where there is such a folder."""

    def no_fetch(name):
        raise InputError(f"fetched {name}")

    monkeypatch.setattr(gpt2_script, "fetch", no_fetch)
    for name in ("gpt2", "./gpt2", Path("gpt2"), Path("./gpt2")):
        there = (sound / "there").is_dir()
        assert ("fetched gpt2" in refusal(name)) == (name != "./gpt2"), there
    (sound / "gpt2").mkdir()
    write(sound / "gpt2", {FILE: T, CONFIG: {"n_head": 2}})
    monkeypatch.chdir(sound)
    assert "fetched gpt2" in refusal("gpt2")
    for name in ("./gpt2", Path("gpt2"), sound / "gpt2"):
        assert load_model(name).config.n_head == 2 and alarms(name, name) == []
    for paths in [("gpt2",), (".", "gpt2"), (Path("gpt2"), "gpt2-xl")]:
        with pytest.raises(InputError, match="fetched gpt2"):
            alarms(*paths)


# ---- heads


def test_heads_that_are_asked_for_go_first(sound, capsys):
    assert load_model(sound, n_head=2).config.n_head == 2
    for n_head in (0, 5, -1, 2.0, True):
        assert "n_head" in refusal(sound, n_head=n_head) or "5 heads" in refusal(sound, n_head=5)
    (sound / CONFIG).write_text("{")
    assert NO_JSON in refusal(sound, n_head=4)
    assert capsys.readouterr().out == ""


def test_heads_are_guessed_only_where_there_is_no_config(sound, capsys):
    (sound / CONFIG).unlink()
    path = (sound / FILE).rename(sound / "\x1b[31m.safetensors")
    assert load_model(path).config.n_head == 1
    said = capsys.readouterr().out
    assert "1 head, 64 numbers for each" in said and "\x1b" not in said
    save_file({name: torch.cat((x, x), -1) for name, x in TINY.items()}, path)
    assert "ln_f.weight is missing" in refusal(path)
    model = transformers.GPT2LMHeadModel(config(n_embd=96))
    model.save_pretrained(sound)
    assert load_model(sound).config.n_head == 4
    (sound / CONFIG).unlink()
    assert "give n_head" in refusal(sound)


# ---- memory


def test_weights_are_the_mapped_file_and_writing_to_them_leaves_it_alone(sound):
    model = load_model(sound)
    if Path("/proc/self/maps").exists():
        assert str(sound / FILE) in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert (sound / FILE).read_bytes() == WHOLE
    assert torch.equal(load_model(sound).wte.weight, T[TABLE])


def test_loading_draws_no_random_numbers_and_every_weight_can_be_trained(sound, ids):
    before = torch.get_rng_state()
    model = load_model(sound)
    assert torch.equal(torch.get_rng_state(), before)
    model(ids).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_the_full_size(tmp_path):
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert sum(weight.numel() for weight in model.parameters()) == 124_439_808
    assert is_same(model, peer, torch.tensor([[464, 3290, 318, 257]]))


# ---- released names


def test_the_table_of_releases():
    assert list(gpt2_script.RELEASED) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    for revision, sha256 in gpt2_script.RELEASED.values():
        assert len(bytes.fromhex(revision)) == 20 and len(bytes.fromhex(sha256)) == 32


def test_a_release_is_asked_for_and_its_hash_checked(sound, monkeypatch, ids):
    asked = []

    def download(*place, **arguments):
        asked.append((place, arguments))
        return str(sound / FILE)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setitem(gpt2_script.PRESETS, "gpt2", gpt2_script.GPT2Config(n_head=4))
    assert "SHA-256 differs: delete it" in refusal("gpt2")
    sha256 = hashlib.sha256(WHOLE).hexdigest()
    monkeypatch.setitem(gpt2_script.RELEASED, "gpt2", ("5" * 40, sha256))
    assert is_same(load_model("gpt2"), reference(T), ids)
    place = "openai-community/gpt2", FILE
    assert asked[-1] == (place, {"revision": "5" * 40, "token": False})
    damage(sound / FILE, -1)
    assert str(sound / FILE) in refusal("gpt2")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that starts a hub, which answers everything alike, and says what fetch says."""
    servers, download = [], huggingface_hub.hf_hub_download
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between one attempt and the next
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def start(status=None, headers=(), body=b""):
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                for header in dict(headers).items():
                    self.send_header(*header)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *arguments):
                pass

        port = 9  # nobody is there
        if status:
            servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer))
            threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
            port = servers[-1].server_port

        def fetched(*place, **arguments):
            there = {"endpoint": f"http://127.0.0.1:{port}", "cache_dir": tmp_path / "hub"}
            return download(*place, **arguments, **there)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
        with pytest.raises(InputError) as caught:
            fetch("gpt2")
        return str(caught.value)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


LIKE_A_FILE = {"X-Repo-Commit": gpt2_script.RELEASED["gpt2"][0], "ETag": '"abc"'}


@pytest.mark.parametrize(
    "answer",
    [
        (),
        (200, {}, b"<html>log in to the hotel</html>"),
        (404, {}, b"no"),
        (500, {}, b"\xff\xfe"),
        (302, {"Location": "/elsewhere"}),
        (200, {**LIKE_A_FILE, "Content-Length": "9"}, b"123"),  # ends too early
    ],
)
def test_a_hub_that_is_not_there_or_talks_rubbish(answer, hub, tmp_path, capfd):
    said = hub(*answer)
    assert said.startswith("cannot fetch gpt2 from the model hub (") and "\n" not in said
    assert not [*tmp_path.rglob("*.safetensors")] and "Retrying" not in capfd.readouterr().err


def test_a_hub_that_sends_another_file(hub):
    body = b"not the weights"
    said = hub(200, {**LIKE_A_FILE, "Content-Length": str(len(body))}, body)
    path = Path(said.removesuffix(" is not the released gpt2, its SHA-256 differs: delete it"))
    assert path.read_bytes() == body and not path.is_symlink()
    path.unlink()  # as it says
    assert "cannot fetch" in hub()


def test_a_cache_that_is_half_written_or_no_cache(hub, tmp_path):
    """As left by a full disk: what the cache has is not the release, and it is told which file."""
    revision, sha256 = gpt2_script.RELEASED["gpt2"]
    cache = tmp_path / "hub" / "models--openai-community--gpt2"
    snapshot, blob = cache / "snapshots" / revision / FILE, cache / "blobs" / sha256
    for folder in (snapshot.parent, blob.parent):
        folder.mkdir(parents=True)
    blob.write_bytes(b"half")
    snapshot.symlink_to(blob)
    assert hub() == f"{blob.resolve()} is not the released gpt2, its SHA-256 differs: delete it"
    blob.unlink()
    assert "cannot fetch" in hub()
    snapshot.unlink()
    snapshot.mkdir()
    assert "cannot fetch" in hub()
    (cache.parent).rename(tmp_path / "other")
    cache.parent.write_text("a file where the cache's folder should be")
    assert "cannot fetch" in hub()


@pytest.mark.network
def test_the_released_gpt2_continues_the_dog(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    try:
        model = load_model("gpt2")
    except InputError as error:
        pytest.skip(str(error))
    known = "464 3290 373 1043 287 257 2214 1474 262 16246 286 262 2688 290 2688 27262 13 198 198"
    ids = gpt2_script.generate(model, torch.tensor([[464, 3290]]), 18)
    assert ids[0].tolist() == [*map(int, known.split()), 464]
