"""The autoregressive model of D-AR: an unmodified Llama predicts image tokens one by one.

Nothing here knows of images or diffusion. A sequence is one class token, then the tokens q_1 ...
q_N of the tokenizer; the model is trained on the next one (Eq. 6) and generates them in order.

    [class, q_1 ... q_{N-1}] -> embeddings (B, N, D) -> blocks -> logits (B, N, V) of q_1 ... q_N

Letters: B batch, N tokens an image, D width, V vocabulary, h heads, d head width, `pos` the
position in the sequence (the class token has pos 0). "Sec." and "Eq." are the paper's.
"""
import argparse
import contextlib
import os
import re
import zipfile
from dataclasses import dataclass
from typing import Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ARConfig:
    """Architecture; changing any field but the dropouts invalidates weights."""
    depth: int = 24
    width: int = 1024
    heads: int = 16
    num_tokens: int = 256        # N (Sec. 4)
    vocab_size: int = 16384      # V, the tokenizer's codebook size (Sec. 4)
    num_classes: int = 1000      # one more row is the null class of guidance
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    dropout: float = 0.1         # on token embeddings and both branches of a block (RandAR)

    def __post_init__(self):
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width must be heads times an even number; got {self}")


SIZES = {  # with 16384 tokens and 1000 classes (Sec. 4)
    "B": ARConfig(depth=12, width=768, heads=12),    # 110,888,448 parameters
    "L": ARConfig(depth=24, width=1024, heads=16),   # 342,910,976
    "XL": ARConfig(depth=36, width=1280, heads=20),  # 774,699,520
    "XXL": ARConfig(depth=48, width=1536, heads=24),  # 1,410,972,672
    # For the toy tokenizer's 32 tokens of the built-in pictures.
    "toy": ARConfig(depth=4, width=128, heads=4, num_tokens=32, vocab_size=512, num_classes=10,
                    dropout=0.0),
    # For the cifar tokenizer's 64 tokens of photographs of 32 pixels.
    "cifar": ARConfig(depth=12, width=512, heads=8, num_tokens=64, vocab_size=4096, num_classes=10)}


def rope_1d(length: int, head_dim: int, base: float, device=None) -> Tensor:
    """Rotation of positions 0 ... length - 1: cosines and sines, (2, length, head_dim / 2)."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns neighbouring channel pairs of x (B, h, n, d) by rope (2, n, d/2), in float32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                       # (B, h, n, d/2) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """x over its root mean square, which is taken in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale).to(x.dtype) * self.weight


class Past(NamedTuple):
    """What one block remembers, and where its next input stands. n: positions of the input."""
    k: Tensor      # (B, h, N, d) keys, written in place
    v: Tensor      # (B, h, N, d) values, likewise
    pos: Tensor    # (n,) int64, positions of the input
    mask: Tensor   # (n, length) bool, which of the first `length` positions each of them sees


class KVCache:
    """Keys and values (B, h, N, d) of each block. They stay in place, as CUDA graphs need."""

    def __init__(self, config: ARConfig, batch: int, like: Tensor):
        shape = batch, config.heads, config.num_tokens, config.width // config.heads
        self.blocks = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.depth)]

    def at(self, pos: Tensor, length: int) -> list[Past]:
        """For each block, when its input stands at positions pos (n,), all below `length`."""
        mask = torch.arange(length, device=pos.device) <= pos[:, None]       # (n, length)
        return [Past(k, v, pos, mask) for k, v in self.blocks]


class Attention(nn.Module):
    """Causal multi-head attention, no biases."""

    def __init__(self, config: ARConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, past: Past | None) -> Tensor:
        """Causal attention of x (B, n, D) to itself and to the past, which it joins."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                 # (B, n, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # (B, h, n, d) each
        q, k = rotate(q, rope), rotate(k, rope)
        if past is None:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            past.k.index_copy_(2, past.pos, k)
            past.v.index_copy_(2, past.pos, v)
            length = past.mask.shape[1]
            k, v = past.k[:, :, :length], past.v[:, :, :length]              # (B, h, length, d)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=past.mask)
        return self.out(x.transpose(1, 2).flatten(2))                        # (B, n, D)


class SwiGLU(nn.Module):
    """Gated feed-forward layer of width 8/3 D, rounded up to a multiple of 256."""

    def __init__(self, config: ARConfig):
        super().__init__()
        hidden = -(-int(8 * config.width / 3) // 256) * 256
        self.gate, self.up = (nn.Linear(config.width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then feed-forward, each on the normalised input and added to it."""

    def __init__(self, config: ARConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Tensor, past: Past | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, past))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))                  # (B, n, D)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) with all but the top_k largest, and all but the smallest set of probability
    top_p or more, at -inf. top_k = 0 and top_p = 1 keep everything."""
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        ordered = ordered.softmax(-1)                                        # (B, V)
        before = ordered.cumsum(-1) - ordered                                # share of all likelier
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before > top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def exponentials(keys: Tensor, pos: Tensor, count: int) -> Tensor:
    """Exponential(1) random numbers (B, count), a function of each row's key (B,) int64 and of
    pos (1,) int64: so what is drawn for a row does not depend on the rows beside it.

    The bits are those of the generator splitmix64, which is a hash of a counter.
    """
    def shift(z: Tensor, bits: int) -> Tensor:  # to the right, zeros coming in
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    counter = pos * count + torch.arange(1, count + 1, device=keys.device)   # (count,)
    z = keys[:, None] + counter * -0x61C8864680B583EB                        # modulo 2^64
    z = (z ^ shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shift(z, 27)) * -0x6B2FB644ECCEEE15
    z = z ^ shift(z, 31)                                                     # (B, count)
    return -torch.log1p(-(shift(z, 24).float() + 0.5) / 2 ** 40)


def draw(logits: Tensor, keys: Tensor, pos: Tensor, temperature: float, top_k: int,
         top_p: float) -> Tensor:
    """One token a row (B,) from logits (B, V), by the random numbers of keys (B,) and pos (1,);
    temperature 0 takes the most likely."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    # argmax(p / Exponential(1)) has the distribution p, and never waits for the GPU.
    return (probabilities / exponentials(keys, pos, logits.shape[-1])).argmax(-1)


class AR(nn.Module):
    """Llama on [class, tokens]. `forward` trains, `generate` samples; both run `trunk`."""

    def __init__(self, config: ARConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        rope = rope_1d(config.num_tokens, config.width // config.heads, config.rope_base)
        self.register_buffer("rope", rope, persistent=False)                 # (2, N, d/2)
        self.initialise()

    def initialise(self):
        """All initialisation (released code)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def trunk(self, x: Tensor, rope: Tensor, pasts: list[Past | None]) -> Tensor:
        """Embeddings (B, n, D) -> features (B, n, D), which the head turns into logits. rope:
        (2, n, d/2), of their positions. pasts: for each block; None where x begins the sequence."""
        for block, past in zip(self.blocks, pasts):
            x = block(x, rope, past)
        return self.norm(x)

    def embed(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings (B, 1 + n, D) of class labels (B,) and tokens (B, n)."""
        return torch.cat([self.class_embedding(labels)[:, None], self.token_embedding(tokens)], 1)

    def forward(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, n, V) of tokens (B, n) int64, n <= N: each from the label and the tokens
        before it (Eq. 6). labels: (B,) int64; num_classes is the null class."""
        x = self.dropout(self.embed(labels, tokens[:, :-1]))                 # (B, n, D)
        return self.head(self.trunk(x, self.rope[:, :x.shape[1]], [None] * len(self.blocks)))

    def generate(self, labels: Tensor, cfg: tuple[float, float] | None = None,
                 prefix: Tensor | None = None, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, keys: Tensor | None = None) -> Tensor:
        """Tokens (B, N) int64 of class labels (B,) int64: see `Sampler`, which keeps its memory and
        compiled code from batch to batch."""
        sampler = Sampler(self, len(labels), cfg, temperature, top_k, top_p)
        return torch.cat([*sampler.stream(labels, prefix, keys)], 1)


# ---- Generation ----------------------------------------------------------------------------------

class Sampler:
    """Draws the tokens of `batch` sequences at a time, one after another.

    All its state is in tensors that stay in place. A step is thus the same work on the same memory,
    whatever its position: its parts are compiled once for each length of the cache, and on CUDA the
    whole of it is recorded as a graph, which then runs without Python.

    cfg: (start, end): classifier-free guidance, whose scale runs linearly from start at the first
    token to end at the last; None: no guidance, and none of its cost. temperature: 0 is greedy.
    top_k, top_p: 0 and 1 keep all tokens. chunk: tokens given at a time; the part of the cache that
    is read grows by as much, but in at most eight steps. compiled: compile a block, and the draw
    with guidance; on CUDA, record the step. Raises ValueError.
    """

    def __init__(self, model: AR, batch: int, cfg: tuple[float, float] | None = None,
                 temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, chunk: int = 32,
                 compiled: bool = False):
        if cfg is not None and len(cfg) != 2:
            raise ValueError(f"cfg must be None or (start, end), got {cfg!r}")
        self.model, self.guided, self.chunk = model, cfg is not None, chunk
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        weight, count = model.head.weight, model.config.num_tokens
        self.cache = KVCache(model.config, 2 * batch if self.guided else batch, weight)
        start, end = cfg or (1.0, 1.0)
        self.scales = torch.linspace(start, end, count, device=weight.device)
        self.tokens = torch.zeros(batch, count, dtype=torch.long, device=weight.device)  # (B, N)
        self.token, self.keys = (torch.zeros_like(self.tokens[:, 0]) for _ in range(2))  # (B,)
        self.pos = torch.zeros_like(self.tokens[0, :1])  # (1,) position of `token`
        self.bucket = max(chunk, -(-count // 8))  # by which the read part of the cache grows
        self.compiled, self.recorded, self.graphs = compiled, compiled and weight.is_cuda, {}
        if compiled:
            self.choose = torch.compile(self.choose, dynamic=False)
            for block in model.blocks:
                block.compile(dynamic=False)
        self.side = torch.cuda.Stream() if self.recorded else None

    def predict(self, x: Tensor, pos: Tensor, length: int):
        """Draws the token after embeddings x (B or 2B, n, D) at positions pos (n,)."""
        x = self.model.trunk(x, self.model.rope[:, pos], self.cache.at(pos, length))
        self.choose(self.model.head(x[:, -1]).float())

    def choose(self, logits: Tensor):
        """Draws from logits (B or 2B, V)."""
        if self.guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + self.scales[self.pos] * (cond - uncond)        # (B, V)
        self.token.copy_(draw(logits, self.keys, self.pos, self.temperature, self.top_k,
                              self.top_p))
        self.tokens.index_copy_(1, self.pos, self.token[:, None])

    def step(self, length: int):
        """Moves on by one token; the cache is read up to `length`."""
        self.pos.add_(1)
        x = self.model.token_embedding(self.token)[:, None]                  # (B, 1, D)
        self.predict(torch.cat([x, x]) if self.guided else x, self.pos, length)

    def begin(self, labels: Tensor, prefix: Tensor):
        """Reads labels (B,) and prefix (B, n), n < N, and draws token n."""
        n = prefix.shape[1]
        self.tokens[:, :n] = prefix
        self.pos.fill_(n)
        if self.guided:  # the conditional half, then the unconditional half
            labels = torch.cat([labels, torch.full_like(labels, self.model.config.num_classes)])
            prefix = torch.cat([prefix, prefix])
        pos = torch.arange(n + 1, device=labels.device)
        # Once a batch, of another length each time: not worth compiling.
        with (torch.compiler.set_stance("force_eager") if self.compiled
              else contextlib.nullcontext()):  # what the caller set stays
            self.predict(self.model.embed(labels, prefix), pos, n + 1)

    def replay(self, length: int):
        """`step`, from a CUDA graph that the first call for this length records."""
        if length not in self.graphs:
            before = self.pos.clone(), self.token.clone()
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):  # compiles and warms up, where it will be recorded
                self.step(length)
            torch.cuda.current_stream().wait_stream(self.side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.side):
                self.step(length)
            self.graphs[length] = graph
            self.pos.copy_(before[0])  # undoes the warming up
            self.token.copy_(before[1])
        self.graphs[length].replay()

    def check(self, labels: Tensor, prefix: Tensor, keys: Tensor):
        config, batch = self.model.config, len(self.tokens)
        if labels.shape != (batch,) or keys.shape != (batch,):
            raise ValueError(f"labels and keys must be ({batch},), got {tuple(labels.shape)} and "
                             f"{tuple(keys.shape)}")
        if labels.numel() and not 0 <= labels.min() <= labels.max() <= config.num_classes:
            raise ValueError(f"labels must be in 0 ... {config.num_classes - 1} "
                             f"(or {config.num_classes}, the null class)")
        if prefix.ndim != 2 or len(prefix) != batch or prefix.shape[1] > config.num_tokens:
            raise ValueError(f"prefix must be ({batch}, n) with n <= {config.num_tokens}, "
                             f"got {tuple(prefix.shape)}")

    @torch.no_grad()
    def stream(self, labels: Tensor, prefix: Tensor | None = None,
               keys: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the tokens (B, chunk) int64 of class labels (B,) int64 as they are drawn.

        prefix: (B, n) int64, tokens to keep. keys: (B,) int64, on which a row's random numbers
        depend; None draws them. Raises ValueError for other shapes.
        """
        prefix = labels.new_zeros(len(labels), 0) if prefix is None else prefix
        if keys is None:
            keys = torch.randint(2 ** 62, labels.shape, device=labels.device)
        self.check(labels, prefix, keys)
        self.keys.copy_(keys)
        drawn, count = prefix.shape[1], self.model.config.num_tokens
        if drawn < count:
            self.begin(labels, prefix)
            drawn += 1
        else:
            self.tokens.copy_(prefix)
        step = self.replay if self.recorded else self.step
        for end in range(self.chunk, count + self.chunk, self.chunk):
            for pos in range(drawn, min(end, count)):
                step(min((pos // self.bucket + 1) * self.bucket, count))
            drawn = max(drawn, end)
            yield self.tokens[:, end - self.chunk:end].clone()


# ---- Files ---------------------------------------------------------------------------------------

RELEASED_NAMES = (  # a tensor's name in the authors' files -> ours: these replacements
    ("cls_embedding.embedding_table.", "class_embedding."), ("tok_embeddings.", "token_embedding."),
    ("layers.", "blocks."), (".wqkv.", ".qkv."), (".wo.", ".out."), ("output.", "head."),
    ("feed_forward.w1.", "ffn.gate."), ("feed_forward.w3.", "ffn.up."),
    ("feed_forward.w2.", "ffn.down."))


def translate(saved: dict, source: str) -> dict:
    """The weights in one of the authors' files under our names."""
    keys = [key for key in ("ema", "model", "module", "state_dict") if saved.get(key)]
    weights = {}
    for name, value in (saved[keys[0]] if keys else saved).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{source} holds no weights: {name} is no tensor")
        name = name.replace("_orig_mod.", "").removeprefix("module.")
        for theirs, ours in RELEASED_NAMES:
            name = name.replace(theirs, ours)
        if name in weights:
            raise ValueError(f"{source} holds {name} twice")
        weights[name] = value
    return weights


def released_config(weights: dict, num_tokens: int, source: str) -> ARConfig:
    """The architecture of translated weights, from their shapes; heads are 64 wide (released
    code)."""
    for name in ("token_embedding.weight", "class_embedding.weight"):
        if name not in weights or weights[name].ndim != 2 or weights[name].shape[1] % 64:
            raise ValueError(f"{source} is no autoregressive model of the authors: it needs a "
                             f"matrix {name} of a width that is a multiple of 64")
    vocabulary, width = weights["token_embedding.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return ARConfig(depth=depth, width=width, heads=width // 64, num_tokens=num_tokens,
                    vocab_size=vocabulary, num_classes=len(weights["class_embedding.weight"]) - 1)


class _ReleasedSettings:
    """Stands for the class config_util.Config of the authors' files."""


def load_ar(path: str, device="cpu", num_tokens: int = 256) -> AR:
    """The model in a checkpoint of train_ar.py, with averaged weights if there are any, or in one
    of the authors' files (D-AR-L-360K.pt, D-AR-XL-360K.pt, bare state dicts); in eval mode.

    num_tokens: tokens an image, which the authors' files do not tell. Nothing is unpickled but
    tensors, plain data and the authors' two classes of settings. Raises FileNotFoundError and
    ValueError, which lists the tensors that do not fit.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    allowed = [argparse.Namespace, (_ReleasedSettings, "config_util.Config")]
    try:
        with torch.serialization.safe_globals(allowed):
            saved = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds: truncated, not a zip, other objects
        found = re.search(r"(?:GLOBAL |class )([\w.]+)", str(error))
        reason = f"it holds an object of {found[1]}" if found else "truncated, or another format"
        raise ValueError(f"{path} is no readable checkpoint: {reason}") from None
    kind = saved.get("kind", "ar") if isinstance(saved, dict) else type(saved).__name__
    if kind != "ar":
        raise ValueError(f"{path} is not a checkpoint of kind 'ar' (found: {kind!r})")
    if "kind" in saved:
        config, weights = ARConfig(**saved["config"]), saved["ema"] or saved["model"]
    else:
        weights = translate(saved, path)
        config = released_config(weights, num_tokens, path)
    model = AR(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # missing, surplus and misshapen tensors
        raise ValueError(f"{path} does not fit: {' '.join(str(error).split())}") from None
    return model.eval().to(device)
