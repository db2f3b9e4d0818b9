"""The autoregressive model of D-AR: an unmodified Llama predicts image tokens one by one.

Nothing here knows of images or diffusion. A sequence is one class token, then the tokens q_1 ...
q_N of the tokenizer; the model is trained on the next one (Eq. 6) and generates them in order.

    [class, q_1 ... q_{N-1}] -> embeddings (B, N, D) -> layers -> logits (B, N, V) of q_1 ... q_N

Modules carry the released code's names. Letters: B batch, N tokens an image, n tokens or positions
at hand, D width, V vocabulary, h heads, d head width; `pos` is the position in the sequence (the
class token has pos 0). "Sec." and "Eq." are the paper's.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class ARConfig:
    """Architecture. Weights fit any `num_tokens` and `dropout`."""
    # Llama
    depth: int = 24
    width: int = 1024            # D
    heads: int = 16              # h
    rope_base: float = 10000.0   # (released code)
    norm_eps: float = 1e-5       # (released code)
    dropout: float = 0.1         # on embeddings and both branches of a block (RandAR)
    # Sequences
    num_tokens: int = 256        # N (Sec. 4)
    vocab_size: int = 16384      # V, the tokenizer's codebook size (Sec. 4)
    num_classes: int = 1000      # one more row is the null class of guidance

    def __post_init__(self):
        assert self.width % (2 * self.heads) == 0, "width must be heads times an even number"


SIZES = {  # with 16384 tokens and 1000 classes (Sec. 4)
    "B": ARConfig(depth=12, width=768, heads=12),     # 110,888,448 parameters
    "L": ARConfig(depth=24, width=1024, heads=16),    # 342,910,976
    "XL": ARConfig(depth=36, width=1280, heads=20),   # 774,699,520
    "XXL": ARConfig(depth=48, width=1536, heads=24),  # 1,410,972,672
    # For the toy tokenizer's 16 tokens of the built-in pictures
    "toy": ARConfig(depth=4, width=128, heads=4, num_tokens=16, vocab_size=16, num_classes=10),
    # For the cifar tokenizer's 128 tokens of photographs of 32 pixels, 31M parameters
    "cifar": ARConfig(depth=8, width=512, heads=8, num_tokens=128, vocab_size=4096, num_classes=10),
}


# ---- Layers --------------------------------------------------------------------------------------

def find_multiple(n, k):
    """The smallest multiple of k that is not below n."""
    return math.ceil(n / k) * k


def rope_1d(pos, head_dim, base):
    """Rotation of positions pos (n,): cosines and sines, (2, n, d/2)."""
    channels = torch.arange(0, head_dim, 2, device=pos.device).float()
    frequencies = base ** -(channels / head_dim)                    # (d/2,)
    angles = pos[:, None] * frequencies                             # (n, d/2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rope):
    """Turns neighbouring channel pairs of x (B, h, n, d) by rope (2, n, d/2), in float32. Returns
    the type of x."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)              # (B, h, n, d/2) each
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    return turned.flatten(-2).type_as(x)


class KVCache:
    """Keys and values that one layer remembers, with the dtype and device of a weight. They stay in
    place, as CUDA graphs need."""

    def __init__(self, config, batch, weight):
        shape = (batch, config.heads, config.num_tokens, config.width // config.heads)
        self.k = weight.new_zeros(shape)
        self.v = weight.new_zeros(shape)

    def update(self, pos, k, v, length):
        """Writes k, v (B, h, n, d) at positions pos (n,); returns those of the first `length`."""
        self.k[:, :, pos] = k
        self.v[:, :, pos] = v
        return self.k[:, :, :length], self.v[:, :, :length]         # (B, h, length, d) each


class Attention(nn.Module):
    """Causal multi-head attention, no biases."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, rope, cache, pos, mask):
        """Causal attention of x (B, n, D) to itself. With a cache: its keys and values are written
        there at pos (n,), and it attends to positions where the mask (n, length) is true."""
        qkv = self.wqkv(x).unflatten(-1, (3, self.heads, -1))       # (B, n, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, h, n, d) each
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(pos, k, v, mask.shape[1])           # (B, h, length, d) each
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=cache is None)
        return self.wo(x.transpose(1, 2).flatten(2))                # (B, n, D)


class FeedForward(nn.Module):
    """SwiGLU of width 8/3 D, rounded up to a multiple of 256."""

    def __init__(self, config):
        super().__init__()
        hidden = find_multiple(8 * config.width / 3, 256)
        self.w1 = nn.Linear(config.width, hidden, bias=False)
        self.w3 = nn.Linear(config.width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each on the normalised input and added to it."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache, pos, mask):
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, cache, pos, mask))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))  # (B, n, D)


# ---- The model -----------------------------------------------------------------------------------

class AR(nn.Module):
    """Llama on [class, tokens]. `forward` trains, `generate` and `stream` sample; all run `trunk`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        self.initialise()

    def initialise(self):
        """All initialisation (released code); norms start at 1."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def embed(self, labels, tokens):
        """Embeddings (B, 1 + n, D) of class labels (B,) and tokens (B, n)."""
        return torch.cat([self.cls_embedding(labels)[:, None], self.tok_embeddings(tokens)], 1)

    def trunk(self, x, pos, cache=None, mask=None):
        """Features (B, n, D), which `output` turns into logits, of embeddings x (B, n, D) at
        positions pos (n,). Without a cache, x is the whole sequence, and attention is causal. With
        one, the keys and values of x are written there, and each row of the mask (n, length) tells
        which of the cache's first positions a row of x sees."""
        rope = rope_1d(pos, self.config.width // self.config.heads, self.config.rope_base)
        for layer, kv in zip(self.layers, cache or [None] * len(self.layers)):
            x = layer(x, rope, kv, pos, mask)
        return self.norm(x)

    def forward(self, labels, tokens):
        """Logits (B, n, V) of tokens (B, n) int64, n <= N: each from the label and the tokens
        before it (Eq. 6). labels: (B,) int64; num_classes is the null class."""
        x = self.dropout(self.embed(labels, tokens[:, :-1]))        # (B, n, D)
        return self.output(self.trunk(x, torch.arange(x.shape[1], device=x.device)))

    def new_cache(self, batch):
        """An empty cache for `batch` sequences; guidance needs two a sample."""
        weight = self.output.weight
        return [KVCache(self.config, batch, weight) for _ in self.layers]

    def generate(self, labels, cfg=None, prefix=None, temperature=1.0, top_k=0, top_p=1.0,
                 uniforms=None):
        """Tokens (B, N) int64 of class labels (B,) int64; the model should be in eval mode.

        cfg: (start, end): classifier-free guidance, whose scale runs linearly from start at the
        first token to end at the last; None: no guidance, and none of its cost. prefix: (B, n)
        int64, first tokens to keep. temperature: 0 is greedy. top_k, top_p: 0 and 1 keep all
        tokens. uniforms: (B, N) random numbers in [0, 1), which alone decide what is drawn.
        """
        groups = self.stream(labels, cfg, prefix, temperature, top_k, top_p, uniforms)
        return torch.cat(list(groups), 1)

    @torch.no_grad()
    def stream(self, labels, cfg=None, prefix=None, temperature=1.0, top_k=0, top_p=1.0,
               uniforms=None, group_size=None, cache=None, read_token=None):
        """Yields the tokens that `generate` gives, (B, group_size) at a time (default: all), as
        soon as they are drawn. cache, read_token: what `new_cache` gives and, on CUDA, a
        `RecordedStep`, to use both again for batches of the same size and kind of guidance; None
        makes new ones."""
        batch = len(labels)
        count = self.config.num_tokens
        group_size = group_size or count
        assert count % group_size == 0, f"{count} tokens do not divide into groups of {group_size}"
        tokens = labels.new_zeros(batch, count)
        kept = 0 if prefix is None else prefix.shape[1]
        if kept:
            tokens[:, :kept] = prefix
        if uniforms is None:
            uniforms = torch.rand(batch, count, device=labels.device)
        if cache is None:
            cache = self.new_cache(batch if cfg is None else 2 * batch)
        if read_token is None:
            read_token = RecordedStep() if labels.is_cuda else decode_one_token
        pos = torch.arange(count, device=labels.device)
        scales = [None] * count if cfg is None else torch.linspace(*cfg, count, device=pos.device)

        for i in range(count):
            if i == kept:
                logits = prefill(self, cache, labels, tokens[:, :i], scales[i])
            elif i > kept:
                # Rounded up, as each length of the cache that is read needs its own CUDA graph
                length = min(find_multiple(i + 1, 16), count)
                last = tokens[:, i - 1:i]
                logits = read_token(self, cache, last, pos[i:i + 1], scales[i], length)
            if i >= kept:
                tokens[:, i] = draw(logits, uniforms[:, i:i + 1], temperature, top_k, top_p)
            if (i + 1) % group_size == 0:
                yield tokens[:, i + 1 - group_size:i + 1]


# ---- Generation ----------------------------------------------------------------------------------

def prefill(model, cache, labels, prefix, scale):
    """Reads labels (B,) and prefix (B, n); logits (B, V) of the token after them."""
    if scale is not None:  # the conditional half, then the unconditional half
        labels = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
        prefix = torch.cat([prefix, prefix])
    x = model.embed(labels, prefix)                                 # (B or 2B, 1 + n, D)
    pos = torch.arange(x.shape[1], device=x.device)
    return next_logits(model, cache, x, pos, scale, len(pos))


def decode_one_token(model, cache, tokens, pos, scale, length):
    """Reads tokens (B, n) at positions pos (n,), n = 1 in `stream`, seeing the first `length`
    positions of the cache; logits (B, V) of the token after them."""
    x = model.tok_embeddings(tokens)                                # (B, n, D)
    if scale is not None:
        x = torch.cat([x, x])                                       # (2B, n, D)
    return next_logits(model, cache, x, pos, scale, length)


def next_logits(model, cache, x, pos, scale, length):
    """Logits (B, V) float32 after embeddings x (B or 2B, n, D) at positions pos (n,), with guidance
    of a scale (), if any, seeing the first `length` positions of the cache."""
    mask = torch.arange(length, device=pos.device) <= pos[:, None]  # (n, length)
    x = model.trunk(x, pos, cache, mask)
    logits = model.output(x[:, -1]).float()                         # (B or 2B, V)
    if scale is None:
        return logits
    cond, uncond = logits.chunk(2)
    return uncond + scale * (cond - uncond)                         # (B, V)


def filter_logits(logits, top_k, top_p):
    """Logits (B, V) with all but the top_k largest at -inf, and all but the fewest likeliest ones
    that sum to more than top_p. top_k = 0 and top_p = 1 keep everything."""
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)               # (B, V)
        shares = ordered.softmax(-1)
        before = shares.cumsum(-1) - shares                         # share of all before
        logits = logits.scatter(1, order, ordered.masked_fill(before > top_p, -torch.inf))
    return logits


def draw(logits, uniforms, temperature, top_k, top_p):
    """One token a row (B,) from logits (B, V): that at which the sum of the probabilities passes
    the row's uniform random number (B, 1) in [0, 1). temperature 0 takes the most likely."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    # Integers add up to the same in any order, so that a GPU draws the same each time. The product
    # below may round up to the total.
    sums = (probabilities * 2 ** 30).long().cumsum(-1)              # (B, V)
    total = sums[:, -1:]
    threshold = (uniforms * total).long().minimum(total - 1)        # (B, 1)
    return torch.searchsorted(sums, threshold, right=True)[:, 0]


# ---- On CUDA -------------------------------------------------------------------------------------

class RecordedStep:
    """`decode_one_token` on CUDA for one model, cache and shape of tokens. To launch a token's
    thousand kernels takes ten times as long as to run them, so each length of the cache is recorded
    once, as a CUDA graph, and then replayed. Its logits last until the next call."""

    def __init__(self):
        self.inputs = None    # tokens, pos and scale, which all graphs read
        self.recorded = {}    # length: how to replay the graph, and the logits that it writes

    def __call__(self, model, cache, tokens, pos, scale, length):
        given = tokens, pos, scale
        if self.inputs is None:
            self.inputs = [None if value is None else value.clone() for value in given]
        for place, value in zip(self.inputs, given):
            if value is not None:
                place.copy_(value)
        if length not in self.recorded:
            self.recorded[length] = record(
                lambda: decode_one_token(model, cache, *self.inputs, length), pos.device)
        replay, logits = self.recorded[length]
        replay()
        return logits


def record(call, device):
    """A CUDA graph of call(): a function that runs it again, and the outputs, which it overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is compiled or allocated in a first call is not recorded
                call()
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads, such as one that pins memory, may go on calling CUDA.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = call()
    return graph.replay, outputs
