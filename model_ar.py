"""The autoregressive model of D-AR: an unmodified Llama predicts image tokens one by one.

Nothing here knows of images or diffusion. A sequence is one class token, then the tokens q_1 ...
q_N of the tokenizer; the model is trained on the next one (Eq. 6) and generates them in order.

    [class, q_1 ... q_{N-1}] -> embeddings (B, N, D) -> blocks -> logits (B, N, V) of q_1 ... q_N

Letters: B batch, N tokens an image, D width, V vocabulary, h heads, d head width, `pos` the
position in the sequence (the class token has pos 0). "Sec." and "Eq." are the paper's.
"""
import functools
from dataclasses import dataclass
from typing import Annotated, Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Kinds of settings: type, least and largest value; sample.py checks them where settings come in.
Count = Annotated[int, 1, 2 ** 20]
Share = Annotated[float, 0, 1]
Positive = Annotated[float, 1e-9, 1e9]


@dataclass
class ARConfig:
    """Architecture. Trained weights fit other values of `num_tokens` and `dropout` only. Raises
    ValueError for numbers that do not fit together."""
    depth: Annotated[int, 1, 999] = 24
    width: Count = 1024              # D
    heads: Count = 16                # h
    num_tokens: Count = 256          # N (Sec. 4)
    vocab_size: Count = 16384        # V, the tokenizer's codebook size (Sec. 4)
    num_classes: Count = 1000        # one more row is the null class of guidance
    rope_base: Positive = 10000.0    # (released code)
    norm_eps: Positive = 1e-5        # (released code)
    dropout: Share = 0.1             # on token embeddings and both branches of a block (RandAR)

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be heads times an even number, got {self.width} and "
                             f"{self.heads}")


SIZES = {  # with 16384 tokens and 1000 classes (Sec. 4)
    "B": ARConfig(depth=12, width=768, heads=12),    # 110,888,448 parameters
    "L": ARConfig(depth=24, width=1024, heads=16),   # 342,910,976
    "XL": ARConfig(depth=36, width=1280, heads=20),  # 774,699,520
    "XXL": ARConfig(depth=48, width=1536, heads=24),  # 1,410,972,672
    # For the toy tokenizer's 32 tokens of the built-in pictures.
    "toy": ARConfig(depth=4, width=128, heads=4, num_tokens=32, vocab_size=512, num_classes=10,
                    dropout=0.0),
    # For the cifar tokenizer's 64 tokens of photographs of 32 pixels.
    "cifar": ARConfig(depth=6, width=192, heads=6, num_tokens=64, vocab_size=1024, num_classes=10)}


@functools.cache
def rope_1d(length: int, head_dim: int, base: float, device: torch.device) -> Tensor:
    """Rotation of positions 0 ... length - 1: cosines and sines, (2, length, head_dim / 2)."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    angles = torch.arange(length, device="cpu")[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()]).to(device)


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
    """What one block remembers, and where its input of n positions stands."""
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
        self.initialise()

    def initialise(self):
        """All initialisation (released code)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def rope(self) -> Tensor:
        """Rotation (2, N, d/2) of all positions."""
        config = self.config
        return rope_1d(config.num_tokens, config.width // config.heads, config.rope_base,
                       self.head.weight.device)

    def trunk(self, x: Tensor, rope: Tensor, pasts: list[Past | None],
              run: Callable = Block.__call__) -> Tensor:
        """Embeddings (B, n, D) -> features (B, n, D), which the head turns into logits. rope:
        (2, n, d/2), of their positions. pasts: for each block; None where x begins the sequence.
        run: what calls a block."""
        for block, past in zip(self.blocks, pasts):
            x = run(block, x, rope, past)
        return self.norm(x)

    def embed(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings (B, 1 + n, D) of class labels (B,) and tokens (B, n)."""
        return torch.cat([self.class_embedding(labels)[:, None], self.token_embedding(tokens)], 1)

    def forward(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, n, V) of tokens (B, n) int64, n <= N: each from the label and the tokens
        before it (Eq. 6). labels: (B,) int64; num_classes is the null class."""
        x = self.dropout(self.embed(labels, tokens[:, :-1]))                 # (B, n, D)
        return self.head(self.trunk(x, self.rope()[:, :x.shape[1]], [None] * len(self.blocks)))

    def generate(self, labels: Tensor, cfg: tuple[float, float] | None = None,
                 prefix: Tensor | None = None, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, uniforms: Tensor | None = None) -> Tensor:
        """Tokens (B, N) int64 of class labels (B,) int64, from a fresh `Sampler`, where the other
        arguments are explained; keep one for many batches. The model should be in eval mode."""
        sampler = Sampler(self, len(labels), cfg, temperature, top_k, top_p)
        return torch.cat([*sampler.chunks(labels, prefix, uniforms)], 1)


# ---- Generation ----------------------------------------------------------------------------------

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


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token a row (B,) from logits (B, V): that at which the sum of the probabilities passes
    the row's uniform random number (B, 1) in [0, 1). temperature 0 takes the most likely."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    # Integers add up to the same in any order, so that a GPU draws the same each time.
    sums = (probabilities * 2 ** 30).long().cumsum(-1)                       # (B, V)
    total = sums[:, -1:]
    passed = (uniforms * total).long().minimum(total - 1)                    # (B, 1)
    return torch.searchsorted(sums, passed, right=True)[:, 0]


class Sampler:
    """Draws the tokens of `batch` sequences at a time, one after another.

    All its state is in tensors that stay in place. A step is thus the same work on the same memory,
    whatever its position: its parts are compiled once for each length of the cache, and on CUDA the
    whole of it is recorded as a graph, which then runs without Python.

    cfg: (start, end): classifier-free guidance, whose scale runs linearly from start at the first
    token to end at the last; None: no guidance, and none of its cost. temperature: 0 is greedy.
    top_k, top_p: 0 and 1 keep all tokens. chunk: tokens given at a time; the part of the cache that
    is read grows by as much, but at most eight times. compiled: compile the blocks and the draw;
    on CUDA, record the step too. Raises ValueError for another form of cfg.
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
        self.scales = torch.linspace(*(cfg or (1.0, 1.0)), count, device=weight.device)
        self.rope = model.rope()                                             # (2, N, d/2)
        self.tokens = torch.zeros(batch, count, dtype=torch.long, device=weight.device)  # (B, N)
        self.uniforms = torch.zeros(batch, count, device=weight.device)      # (B, N) of each token
        self.token = torch.zeros_like(self.tokens[:, 0])                     # (B,) the last one
        self.pos = torch.zeros_like(self.tokens[0, :1])                      # (1,) its number
        self.bucket = max(chunk, -(-count // 8))  # by which the read part of the cache grows
        self.run, self.pick, self.graphs = Block.__call__, Sampler.choose, {}
        self.recorded = compiled and weight.is_cuda
        if compiled:
            # An entry for each length of the cache and each sampler.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            self.run = torch.compile(Block.forward, dynamic=False)
            self.pick = torch.compile(Sampler.choose, dynamic=False)
        if self.recorded:  # one memory pool: the graphs never run at the same time
            self.side, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def advance(self, x: Tensor, pos: Tensor, length: int, run: Callable):
        """Draws the token after embeddings x (B or 2B, n, D) at positions pos (n,)."""
        x = self.model.trunk(x, self.rope[:, pos], self.cache.at(pos, length), run)
        self.pick(self, self.model.head(x[:, -1]).float())

    def choose(self, logits: Tensor):
        """Draws from logits (B or 2B, V), under guidance, and keeps the token."""
        if self.guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + self.scales[self.pos] * (cond - uncond)        # (B, V)
        self.token.copy_(draw(logits, self.uniforms[:, self.pos], self.temperature, self.top_k,
                              self.top_p))
        self.tokens.index_copy_(1, self.pos, self.token[:, None])

    def step(self, length: int):
        """Moves on by one token; the cache is read up to `length`."""
        self.pos.add_(1)
        x = self.model.token_embedding(self.token)[:, None]                  # (B, 1, D)
        self.advance(torch.cat([x, x]) if self.guided else x, self.pos, length, self.run)

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
        self.advance(self.model.embed(labels, prefix), pos, n + 1, Block.__call__)

    def replay(self, length: int):
        """`step`, from a CUDA graph that the first call for this length records."""
        if length not in self.graphs:
            begun, current = (self.pos.clone(), self.token.clone()), torch.cuda.current_stream()
            self.side.wait_stream(current)
            with torch.cuda.stream(self.side):  # compiles and warms up, where it will be recorded
                for _ in range(3):  # as often as torch's own make_graphed_callables
                    self.step(length)
                    self.pos.copy_(begun[0])
                    self.token.copy_(begun[1])
            current.wait_stream(self.side)
            self.graphs[length] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[length], self.pool, self.side):
                self.step(length)
        self.graphs[length].replay()

    def check(self, labels: Tensor, prefix: Tensor, uniforms: Tensor):
        config, (batch, count) = self.model.config, self.tokens.shape
        if labels.shape != (batch,) or uniforms.shape != (batch, count):
            raise ValueError(f"labels must be ({batch},) and uniforms ({batch}, {count}), got "
                             f"{tuple(labels.shape)} and {tuple(uniforms.shape)}")
        if labels.numel() and not 0 <= labels.min() <= labels.max() <= config.num_classes:
            raise ValueError(f"labels must be in 0 ... {config.num_classes - 1} "
                             f"(or {config.num_classes}, the null class)")
        if prefix.ndim != 2 or len(prefix) != batch or prefix.shape[1] > count:
            raise ValueError(f"prefix must be ({batch}, n) with n <= {count}, "
                             f"got {tuple(prefix.shape)}")

    @torch.no_grad()
    def chunks(self, labels: Tensor, prefix: Tensor | None = None,
               uniforms: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the tokens (B, chunk) int64 of class labels (B,) int64 as they are drawn.

        prefix: (B, n) int64, tokens to keep. uniforms: (B, N) random numbers in [0, 1), which
        alone decide what is drawn; None draws them. Raises ValueError for other shapes.
        """
        prefix = labels.new_zeros(len(labels), 0) if prefix is None else prefix
        uniforms = torch.rand(self.uniforms.shape) if uniforms is None else uniforms
        self.check(labels, prefix, uniforms)
        self.uniforms.copy_(uniforms)
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
