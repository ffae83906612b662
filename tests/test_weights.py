"""Loading: files as other programs write them, and files that must be refused."""

import json
import os
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import drawn
from safetensors.torch import save

import gpt2_script as gpt
from gpt2_script import GPT2, InputError, generate, load_model

FILE, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
TABLE, HEAD, BIAS = "wte.weight", "lm_head.weight", "ln_f.bias"
SIZES = gpt.GPT2Config(50, 16, 64, n_layer=2, n_head=2)  # by width it would be 1 head
T = drawn(GPT2(SIZES)).state_dict()
T[TABLE][7, 7] = 0.0
WHOLE = save(T)
START = 8 + int.from_bytes(WHOLE[:8], "little")  # where the numbers begin


def without(part):
    """The tensors, but for those with this in their name."""
    return {name: tensor for name, tensor in T.items() if part not in name}


def changed(name, place, value):
    """The tensors, some numbers of one changed."""
    tensor = T[name].clone()
    tensor[place] = value
    return T | {name: tensor}


def shards(first, second):
    """The files of a model that is split into two parts."""
    names = "model-1-of-2.safetensors", "model-2-of-2.safetensors"
    places = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    files = {FILE: None, names[0]: first, names[1]: second}
    return files | {INDEX: {"weight_map": places}}


def write(folder, files=()):
    """A sound model's folder, but for these files: tensors, JSON or bytes; None is no
    file."""
    for name, content in {FILE: T, CONFIG: {"n_head": 2}, **dict(files)}.items():
        if content is None:
            continue
        if isinstance(content, dict) and name.endswith(".safetensors"):
            content = save({key: x.contiguous().clone() for key, x in content.items()})
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()

        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def refusal(path, **arguments):
    """The sentence with which loading is refused."""
    with pytest.raises(InputError) as error:
        load_model(path, **arguments)
    return str(error.value)


def assert_loaded(model):
    state = model.state_dict()
    assert state.keys() == T.keys()
    for name, tensor in T.items():
        assert torch.equal(state[name], tensor), name


FIRST, SECOND = without("h.1"), {name: T[name] for name in T if "h.1" in name}
MASKS = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril().bool()}
MASKS["h.1.attn.masked_bias"] = torch.tensor(-1e4)
OTHER_NAMES = {"num_attention_heads": 2, "hidden_size": 64, "num_hidden_layers": 2}
OTHER_GELU = {"n_head": 2, "activation_function": "gelu_pytorch_tanh"}
THEIR_SIZES = {"vocab_size": 50, "n_positions": 16, "n_embd": 64, "n_layer": 2}
THEIRS = transformers.GPT2Config(**THEIR_SIZES, n_head=2)
SOUND = {  # what is not as in the sound folder
    "as it is": {},
    "a prefix": {FILE: {f"transformer.{name}": x for name, x in T.items()}},
    "the table as lm_head": {FILE: without(TABLE) | {HEAD: T[TABLE]}},
    "the table twice": {FILE: T | {HEAD: T[TABLE]}},
    "masks": {FILE: T | MASKS},
    "shards": shards(FIRST, SECOND),
    "a file beside shards": {**shards(FIRST, T), FILE: T},
    "float64": {FILE: {name: x.double() for name, x in T.items()}},
    "other names of fields": {CONFIG: OTHER_NAMES},
    "GELU's other name": {CONFIG: OTHER_GELU},
    "all of transformers' fields": {CONFIG: THEIRS.to_dict()},
}


@pytest.mark.parametrize("files", SOUND.values(), ids=SOUND)
def test_files_as_people_have_them_load(tmp_path, files):
    model = load_model(write(tmp_path, files))
    assert_loaded(model)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config == SIZES
    assert not model.training


MINUS_0 = changed(TABLE, (7, 7), -0.0)
NO_JSON, NO_FILE = "config.json cannot be read as JSON", "not a sound safetensors file"
PICKLES = {FILE: None, INDEX: {"weight_map": {"a": "x.bin"}}}
ONE_GONE = {**shards(FIRST, SECOND), "model-2-of-2.safetensors": None}
HEADER = WHOLE[8:START].strip()
TWICE = HEADER[:-1] + b"," + HEADER[1:]
TWICE = len(TWICE).to_bytes(8, "little") + TWICE + WHOLE[START:]
REFUSED = {  # what is not as in the sound folder, and a part of the sentence
    "a second shard": (shards(T, SECOND), "a second h.1."),
    "no shard": (ONE_GONE, "does not exist"),
    "pickles as shards": (PICKLES, "unpickling runs code"),
    "an empty index": ({FILE: None, INDEX: {"weight_map": {}}}, "names no files"),
    "no index": ({FILE: None, INDEX: b"{,"}, "index.json cannot be read as JSON"),
    "a comma": ({CONFIG: b'{"n_head": 2,}'}, NO_JSON),
    "a list": ({CONFIG: [2]}, NO_JSON),
    "deep JSON": ({CONFIG: b"[" * 100_000}, NO_JSON),
    "5 heads": ({CONFIG: {"n_head": 5}}, "64 does not divide into 5 heads"),
    "no heads": ({CONFIG: {}}, "does not say n_head"),
    "cut short": ({FILE: WHOLE[:-1]}, NO_FILE),
    "a name twice": ({FILE: TWICE}, "a name stands twice"),
}
INT8 = {"h.0.mlp.c_fc.weight": T["h.0.mlp.c_fc.weight"].char()}
MANY = {f"h.{i}.x": T[BIAS] for i in range(100)}
TENSORS = {
    "another head": (T | {HEAD: MINUS_0[TABLE]}, "an output table of its own"),
    "int8": (T | INT8, "I8 is not a type of floats"),
    "NaN": (changed(BIAS, 3, torch.nan), "ln_f.bias holds NaN"),
    "too large": (T | {BIAS: T[BIAS].double() * 1e200}, "ln_f.bias holds NaN or inf"),
    "no table": (without(TABLE), "wte.weight or wpe.weight is not a table"),
    "no bias": (without("h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias"),
    "one more": (T | {"h.0.x": T[BIAS]}, "h.0.x"),
    "claimed blocks": (T | MANY, "100 blocks in 128 tensors"),
    "a hostile name": (T | {"\x1b[2J": T[BIAS]}, r"\x1b[2J"),
    "a second name": (T | {f"transformer.{BIAS}": T[BIAS]}, "a second ln_f.bias"),
}
for name, (tensors, reason) in TENSORS.items():
    REFUSED[name] = {FILE: tensors}, reason
FIELDS = {"model_type": "bert", "activation_function": "gelu", "n_positions": 1024}
FIELDS |= {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}
FIELDS |= {"add_cross_attention": True, "tie_word_embeddings": False, "n_layer": 12}
FIELDS |= {"vocab_size": 50257, "n_embd": 768, "layer_norm_epsilon": "x"}
for field, value in FIELDS.items():
    says = f"config.json says {field} {value!r}"
    REFUSED[field] = {CONFIG: {"n_head": 2, field: value}}, says


@pytest.mark.parametrize("files, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_no_sound_gpt2_is_refused_in_one_sentence(tmp_path, files, reason):
    """However long the path is."""
    sentence = refusal(write(tmp_path / ("a" * 150), files))
    assert reason in sentence
    assert sentence.isprintable()
    assert len(sentence) < 800


def test_heads_and_epsilon_are_the_configs(tmp_path):
    """But heads that are asked for go first. Without both, a warning says the guess."""
    config = {"n_head": 2, "layer_norm_epsilon": 0.1}
    model = load_model(write(tmp_path, {CONFIG: config}))
    assert (model.config.n_head, model.h[1].ln_2.epsilon) == (2, 0.1)
    assert load_model(tmp_path, n_head=4).config.n_head == 4

    (tmp_path / CONFIG).unlink()
    with pytest.warns(UserWarning, match="no .*config.json: assuming n_head 1"):
        assert load_model(tmp_path).config.n_head == 1
    (tmp_path / CONFIG).symlink_to("nowhere")
    assert NO_JSON in refusal(tmp_path)


class Bomb:
    """What makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_is_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"):
        torch.save(Bomb(), name)
        assert "unpickling runs code" in refusal(name)
    write(tmp_path, {FILE: pickle.dumps(Bomb())})
    assert NO_FILE in refusal(tmp_path)
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["gpt3", "./gpt2", "", "/dev/null"])
def test_what_is_no_file_is_refused(name):
    assert "does not exist: give a .safetensors file" in refusal(name)


def test_numbers_stay_what_they_were_whatever_becomes_of_the_file(
    tmp_path, monkeypatch
):
    """And a file that shrinks while it is read is refused."""
    model, path = load_model(write(tmp_path)), tmp_path / FILE
    monkeypatch.setattr(gpt, "GPT2", lambda config: os.truncate(path, START))
    assert f"{path} became shorter while it was read" in refusal(path, n_head=2)
    assert_loaded(model)


def test_a_release_is_fetched_at_its_revision_and_its_hash_is_checked(
    tmp_path, monkeypatch
):
    path, asked = write(tmp_path / "cache") / FILE, []

    def fetch(*place, **settings):
        asked.append((*place, settings))
        return str(path)

    monkeypatch.chdir(write(tmp_path / "gpt2").parent)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setitem(gpt.RELEASED, "gpt2", f"5555 {gpt.file_hash(path)}")
    assert_loaded(load_model("gpt2", n_head=2))
    settings = {"revision": "5555", "token": False}
    assert asked == [("openai-community/gpt2", FILE, settings)]
    write(path.parent, {FILE: changed(BIAS, 0, 1.0)})
    assert "is not the released gpt2: another SHA-256" in refusal("gpt2", n_head=2)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert "cannot fetch gpt2 from the model hub (TypeError)" in refusal("gpt2")
    for path in (Path("gpt2"), "./gpt2", f"gpt2/{FILE}"):  # a folder of that name
        assert_loaded(load_model(path))


@pytest.mark.network
def test_the_released_gpt2_continues_the_dog(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    try:
        model = load_model("gpt2")
    except InputError as error:
        pytest.skip(str(error))

    known = "373 1043 287 257 2214 1474 262 16246 286 262 2688 290 2688 27262 13"
    ids = generate(model, torch.tensor([[464, 3290]]), 15)
    assert ids[0].tolist() == [464, 3290, *map(int, known.split())]
