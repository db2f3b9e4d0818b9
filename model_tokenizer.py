"""The sequential diffusion tokenizer of D-AR: an image becomes 256 tokens in denoising order.

A transformer encodes the image into N query tokens, and each is replaced by its nearest codebook
row (Eq. 1). A causal transformer turns the rows into condition tokens c_1 ... c_N, cut into K
groups; c_i depends on the tokens up to i. A pixel-space flow-matching transformer then denoises the
image in K steps, and step k reads the condition tokens of group k. Early tokens thus carry what
early (noisy) steps need: layout and colour; late tokens carry detail. Reading the tokens one after
another *is* running the diffusion.

    image (B, 3, H, W) -> Encoder -> z (B, N, C) -> Quantizer -> tokens (B, N), codes (B, N, C)
    codes (B, N, C) -> CausalDecoder -> cond (B, N, D), in K groups of (B, N/K, D)
    x_t (B, 3, H, W), t (B,), one group of cond -> DiffusionDecoder -> velocity (B, 3, H, W)

Letters: B batch, H and W pixels, p pixels a side of a patch, L patches and D width of the part at
hand, N tokens, K groups, V codebook size, C code width, h heads, d head width. Images are RGB in
[-1, 1]. Flow time t: t = 0 is noise x0, t = 1 is the image x1; u is the time before the shift of
Eq. 8. "Sec.", "Eq." and "App." are of the paper, arxiv.org/abs/2505.23660; "released code" is the
authors' public release. Eq. 6 is in model_ar.py, Eq. 7 in train_tokenizer.py.
"""
import functools
import math
from dataclasses import dataclass
from typing import Annotated, Iterable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Kinds of settings: type, least and largest value; sample.py checks them where settings come in.
Count = Annotated[int, 1, 2 ** 20]
Depth = Annotated[int, 1, 999]
CountOrZero = Annotated[int, 0, 2 ** 20]
Positive = Annotated[float, 1e-9, 1e9]


@dataclass
class TokenizerConfig:
    """Architecture and constants of the method. Trained weights fit other values of `image_size`
    and `num_steps` only. Raises ValueError for numbers that do not fit together."""
    image_size: Count = 256         # pixels a side (Sec. 5)
    num_tokens: Count = 256         # N, query tokens an image (Sec. 4)
    num_groups: Count = 8           # K, groups = denoising steps (Sec. 4, Table 5 of the appendix)
    num_steps: CountOrZero = 0      # default denoising steps of `decode`; 0: K (Sec. 4)
    codebook_size: Count = 16384    # V (Sec. 4)
    code_dim: Count = 8             # width of a codebook row (Sec. 4)
    patch_size: Count = 16          # pixels a side of an encoder patch (Sec. 4)
    encoder_width: Count = 768      # (Sec. 4)
    encoder_depth: Depth = 8        # (Sec. 4)
    decoder_width: Count = 768      # the causal decoder (Sec. 4)
    decoder_depth: Depth = 8        # (Sec. 4)
    diffusion_width: Count = 768    # (Sec. 4)
    diffusion_depth: Depth = 12     # (Sec. 4)
    diffusion_patch: Count = 8      # pixels a side of a diffusion patch (Sec. 4)
    head_dim: Count = 64            # d, width of one attention head (released code)
    query_rank: Count = 8           # rank of the query table (released code)
    max_tokens: Count = 1024        # rows in the query and position tables (released code)
    sigma: Positive = 0.6           # standard deviation the data is scaled by (released code)
    beta: Positive = 2.0            # time shift, Eq. 5 and 8 (Sec. 4)
    commitment: Positive = 0.25     # weight of the commitment loss (released code)
    init_std: Positive = 0.02       # of linear weights and positions (released code)
    repa_depth: CountOrZero = 8     # the REPA head reads after this many diffusion blocks; 0: none
    repa_dim: Count = 768           # width of the DINOv2-B features the head predicts
    repa_hidden: Count = 2048       # width of the head's hidden layers (released code)

    @property
    def group_size(self) -> int:
        """N/K, tokens a group."""
        return self.num_tokens // self.num_groups

    def __post_init__(self):
        for name, unit in (("num_tokens", "num_groups"), ("image_size", "patch_size"),
                           ("image_size", "diffusion_patch"), ("encoder_width", "head_dim"),
                           ("decoder_width", "head_dim"), ("diffusion_width", "head_dim")):
            number, of = getattr(self, name), getattr(self, unit)
            if number % of:
                raise ValueError(f"{name} must be a multiple of {unit}, got {number} and {of}")
        if self.head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 for RoPE, got {self.head_dim}")
        if self.num_tokens > self.max_tokens:
            raise ValueError(f"num_tokens must be at most max_tokens, {self.max_tokens}, got "
                             f"{self.num_tokens}")
        if self.repa_depth >= self.diffusion_depth:
            raise ValueError(f"repa_depth must be below diffusion_depth, {self.diffusion_depth}, "
                             f"got {self.repa_depth}")


TOKENIZERS = {
    "paper": TokenizerConfig(),  # 300M parameters (300,099,776) + 7.3M in the REPA head
    # The ablation model of the paper's appendix III, 113M parameters. Its 8 diffusion blocks leave
    # none after the paper's REPA tap at 8, so the head reads after block 6.
    "light": TokenizerConfig(encoder_width=512, decoder_width=512, diffusion_width=512,
                             diffusion_depth=8, repa_depth=6),
    # For the built-in pictures, trained on a CPU in minutes: 8 groups of 4 tokens. In so narrow a
    # model, weights that start at 0.02 weaken the signal so much that for long the tokens tell
    # nothing: init_std is about 1 / sqrt(width). And beta is larger than the paper's, so that the
    # last groups, too, get their turn while there still is something to tell.
    "toy": TokenizerConfig(image_size=24, num_tokens=32, codebook_size=512, patch_size=6,
                           encoder_width=96, encoder_depth=3, decoder_width=96, decoder_depth=2,
                           diffusion_width=96, diffusion_depth=4, diffusion_patch=4, head_dim=16,
                           max_tokens=32, beta=48.0, init_std=0.1, repa_depth=0),
    # For photographs of 32 pixels: 8 groups of 8 tokens.
    "cifar": TokenizerConfig(image_size=32, num_tokens=64, codebook_size=1024, patch_size=4,
                             encoder_width=128, encoder_depth=4, decoder_width=128, decoder_depth=3,
                             diffusion_width=128, diffusion_depth=5, diffusion_patch=4, head_dim=32,
                             max_tokens=64, beta=16.0, init_std=0.09, repa_depth=0)}


# ---- The rules: time, groups, interpolation ------------------------------------------------------

def shift_time(u: Tensor, beta: float) -> Tensor:
    """Flow times t of uniform times u in [0, 1]. Eq. 8. beta > 1: more of them near t = 0."""
    return u / (u + beta * (1 - u))


def group_of(u: Tensor, num_groups: int) -> Tensor:
    """The groups of tokens, 0 ... K - 1, that condition uniform times u in [0, 1]. Eq. 5.

    The paper cuts, ceil(uK). We round, as the released code does: each group is trained around the
    one time at which the K-step sampler uses it. The first gets 1/2K of all times, the last 3/2K.
    """
    return (u * num_groups + 0.5).long().clamp(max=num_groups - 1)


def interpolate(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """x_t between noise x0 and data x1, both (B, 3, H, W), at flow times t (B,). Eq. 3 and 4."""
    t = t[:, None, None, None]
    return t * x1 + (1 - t) * x0


def jump(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Estimate of x1: x_t moved along velocity v, both (B, 3, H, W), from t (B,) to t = 1."""
    return x + (1 - t[:, None, None, None]) * v


class Step(NamedTuple):
    """One denoising step: from flow time t to t_next, conditioned on one group of tokens."""
    t: float
    t_next: float
    group: int
    t_before: float  # time of the step before


def sampling_schedule(steps: int, num_groups: int, beta: float, groups: int) -> list[Step]:
    """Steps at u = i / steps (Eq. 8) of the first `groups` groups; the last one jumps to t = 1.

    With steps = num_groups, every group is used exactly once.
    """
    u = torch.arange(steps, dtype=torch.float64, device="cpu") / steps
    u = u[group_of(u, num_groups) < groups]                                  # (n,)
    times = [*shift_time(u, beta).tolist(), 1.0]
    return [Step(*numbers) for numbers
            in zip(times, times[1:], group_of(u, num_groups).tolist(), [0.0, *times])]


SOLVERS = "adams2", "adams2_variable", "euler"


def solver_step(x: Tensor, v: Tensor, v_before: Tensor | None, step: Step, solver: str) -> Tensor:
    """x at step.t_next from x and velocity v at step.t, all (B, 3, H, W). Sec. 5, Table 6.

    "euler", or two-step Adams-Bashforth, whose first step is Euler: "adams2" has the coefficients
    of equal steps although the steps are not equal (released code), "adams2_variable" those of the
    real steps (ours).
    """
    if solver != "euler" and v_before is not None:
        past = 0.5
        if solver == "adams2_variable":
            past = (step.t_next - step.t) / (step.t - step.t_before) / 2
        v = (1 + past) * v - past * v_before
    return x + (step.t_next - step.t) * v


# ---- Attention -----------------------------------------------------------------------------------

def to_patches(images: Tensor, patch: int) -> tuple[Tensor, tuple[int, int]]:
    """Patches (B, L, 3 p p) of images (B, 3, H, W), row by row, in channel-row-column order within;
    and the grid they form, (H/p, W/p). patch: p."""
    patches = F.pixel_unshuffle(images, patch)                               # (B, 3 p p, H/p, W/p)
    return patches.flatten(2).transpose(1, 2), patches.shape[2:]


@functools.cache
def rope_2d(height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Rotation of patches in row-major order: cosines and sines, (2, height * width, head_dim / 2).

    The first half of the channel pairs turns with the row, the second with the column. App. I.
    """
    half = head_dim // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64, device="cpu") / half)
    rows = torch.arange(height, device="cpu").repeat_interleave(width)
    columns = torch.arange(width, device="cpu").repeat(height)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], 1)
    return torch.stack([angles.cos(), angles.sin()]).float().to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns neighbouring channel pairs of x (B, h, L, d) by rope (2, L, d/2), in float32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                       # (B, h, L, d/2) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """Attention of q, k, v (B, h, L, d). The first `prefix` positions see one another, each later
    one sees all up to its own: prefix 0 is causal attention, L is full attention. No mask is
    needed, so flash kernels serve; the encoder computes its prefix twice for that."""
    parts = []
    if prefix > 0:
        parts = [F.scaled_dot_product_attention(q[:, :, :prefix], k[:, :, :prefix],
                                                v[:, :, :prefix])]
    if prefix < q.shape[2]:
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, prefix:])
    return torch.cat(parts, 2)


class Attention(nn.Module):
    """Multi-head attention with normalised, rotated queries and keys (App. I). Scale 1/sqrt(d)."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(head_dim, eps=1e-6) for _ in range(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)          # (B, h, L, d)

    def merge(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).flatten(2))                        # (B, L, D)

    def forward(self, x: Tensor, rope: Tensor | None, prefix: int) -> Tensor:
        """`prefix_attention` of x (B, L, D), its queries and keys rotated if there is a rope
        (2, L, d/2)."""
        q, k = self.q_norm(self.heads(self.q(x))), self.k_norm(self.heads(self.k(x)))
        v = self.heads(self.v(x))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.merge(prefix_attention(q.to(v.dtype), k.to(v.dtype), v, prefix))

    def cross(self, x: Tensor, context: Tensor, rope: Tensor) -> Tensor:
        """Attention of x (B, L, D), rotated, to context (B, M, D), unrotated: (B, L, D)."""
        q = rotate(self.q_norm(self.heads(self.q(x))), rope)
        k, v = self.k_norm(self.heads(self.k(context))), self.heads(self.v(context))
        return self.merge(F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v))


def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over channels, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Block(nn.Module):
    """Transformer block whose branches are scaled by per-channel gates that start at 0."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention = Attention(width, head_dim)
        self.mlp = mlp(width, 4 * width)
        self.gate1, self.gate2 = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor | None, prefix: int) -> Tensor:
        x = x + self.gate1 * self.attention(self.norm1(x), rope, prefix)     # (B, L, D)
        return x + self.gate2 * self.mlp(self.norm2(x))


# ---- Image to tokens -----------------------------------------------------------------------------

class Encoder(nn.Module):
    """Images (B, 3, H, W) -> z (B, N, C), one vector a query token. Eq. 1, Sec. 3.1."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        width = config.encoder_width
        self.num_tokens, self.head_dim = config.num_tokens, config.head_dim
        self.patch = config.patch_size
        self.from_pixels = nn.Linear(3 * self.patch ** 2, width)
        self.query_table = nn.Parameter(torch.empty(config.max_tokens, config.query_rank))
        self.query_up = nn.Linear(config.query_rank, width)
        self.blocks = nn.ModuleList(Block(width, config.head_dim)
                                    for _ in range(config.encoder_depth))
        self.to_code = nn.Linear(width, config.code_dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        patches, grid = to_patches(images, self.patch)                       # (B, L, 3 p p)
        patches = layer_norm(self.from_pixels(patches))                      # (B, L, D)
        queries = self.query_up(self.query_table[:self.num_tokens])          # (N, D)
        x = torch.cat([patches, queries.expand(len(images), -1, -1)], 1)     # (B, L + N, D)
        rope = rope_2d(*grid, self.head_dim, images.device)                  # (2, L, d/2)
        # Query tokens have no place in the image: the identity rotation (App. I).
        identity = rope[:, :1].expand(-1, self.num_tokens, -1)  # that of patch 0: no rotation
        rope = torch.cat([rope, identity], 1)                                # (2, L + N, d/2)
        for block in self.blocks:
            x = block(x, rope, patches.shape[1])  # queries are causal
        return self.to_code(layer_norm(x[:, -self.num_tokens:]))             # (B, N, C)


class Quantized(NamedTuple):
    tokens: Tensor   # (B, N) int64, row numbers in the codebook
    codes: Tensor    # (B, N, C) the unit rows; their gradient goes to the encoder, straight through
    loss: Tensor     # (B, N) codebook loss + commitment x commitment loss of each token


class Quantizer(nn.Module):
    """Nearest codebook row on the unit sphere (Sec. 4, App. I). Always in float32: in bf16, 6 % of
    the released tokenizer's tokens come out as others."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.commitment = config.commitment
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_dim))

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, N, C), of any length."""
        with torch.autocast(z.device.type, enabled=False):
            z, rows = F.normalize(z.float(), dim=-1), F.normalize(self.codebook, dim=-1)
            tokens = (z.detach() @ rows.detach().T).argmax(-1)               # (B, N)
            codes = rows[tokens]                                             # (B, N, C)
            loss = (codes - z.detach()).pow(2) + self.commitment * (codes.detach() - z).pow(2)
            return Quantized(tokens, z + (codes - z).detach(), loss.mean(-1))

    def lookup(self, tokens: Tensor) -> Tensor:
        """Unit rows (B, n, C) of tokens (B, n)."""
        return F.normalize(self.codebook[tokens], dim=-1)


# ---- Tokens to image -----------------------------------------------------------------------------

class CausalDecoder(nn.Module):
    """Codes (B, n, C) -> condition tokens c_1 ... c_n (B, n, D) for any n <= N; causal. Sec. 4."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        width = config.decoder_width
        self.from_code = nn.Linear(config.code_dim, width, bias=False)
        self.positions = nn.Parameter(torch.empty(config.max_tokens, width))
        self.blocks = nn.ModuleList(Block(width, config.head_dim)
                                    for _ in range(config.decoder_depth))

    def forward(self, codes: Tensor) -> Tensor:
        n = codes.shape[1]
        x = self.from_code(codes) + self.positions[:n]                       # (B, n, D)
        for block in self.blocks:
            x = block(x, None, 0)
        return layer_norm(x)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Features (B, width) of flow times t (B,): cosines, then sines, of 1000 t."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = 1000 * t[:, None].float() * frequencies                         # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class DiffusionBlock(nn.Module):
    """DiT block. Time and tokens enter only through shift, scale and gate (adaLN-zero), which
    differ from patch to patch because each patch fetches its own condition. Sec. 4."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.cond_mlp = mlp(width, width)
        self.cross_attention = Attention(width, head_dim)
        self.time_mlp = mlp(width, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, head_dim)
        self.mlp = mlp(width, 4 * width)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, rope: Tensor) -> Tensor:
        """x: (B, L, D) patches. time: (B or 1, D) sinusoid. cond: (B, N/K, D). rope: (2, L, d/2).
        """
        context = layer_norm(self.cond_mlp(cond))                            # (B, N/K, D)
        fetched = self.cross_attention.cross(layer_norm(x), context, rope)   # (B, L, D)
        signal = F.silu(self.time_mlp(time)[:, None] + fetched)              # (B, L, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(signal).float().chunk(6, -1)
        # Under autocast too, x stays float32; and each patch sees all.
        x = x + gate1 * self.attention(modulate(layer_norm(x), shift1, scale1), rope, x.shape[1])
        return x + gate2 * self.mlp(modulate(layer_norm(x), shift2, scale2))


class DiffusionOutput(NamedTuple):
    velocity: Tensor   # (B, 3, H, W) float32
    patches: Tensor    # (B, D, H/p, W/p) after `repa_depth` blocks, for the REPA head


class DiffusionDecoder(nn.Module):
    """Velocity v(x_t, t, c) on pixels, conditioned on one group of tokens. Sec. 3.1 and 4."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        width, self.patch = config.diffusion_width, config.diffusion_patch
        self.head_dim, self.repa_depth = config.head_dim, config.repa_depth
        self.from_pixels = nn.Linear(3 * self.patch ** 2, width)
        self.from_cond = nn.Linear(config.decoder_width, width)
        self.blocks = nn.ModuleList(DiffusionBlock(width, config.head_dim)
                                    for _ in range(config.diffusion_depth))
        self.to_pixels = nn.Linear(width, 3 * self.patch ** 2)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> DiffusionOutput:
        """x: (B, 3, H, W) images x_t. t: (B,), or (1,) for all. cond: (B, N/K, D), one group."""
        x, grid = to_patches(x, self.patch)                                  # (B, L, 3 p p)
        x = self.from_pixels(x).float()                                      # (B, L, D)
        cond, time = layer_norm(self.from_cond(cond)), sinusoid(t, x.shape[2])
        rope, tapped = rope_2d(*grid, self.head_dim, x.device), x
        for depth, block in enumerate(self.blocks, 1):
            x = block(x, time, cond, rope)
            tapped = x if depth == self.repa_depth else tapped
        with torch.autocast(x.device.type, enabled=False):
            v = self.to_pixels(layer_norm(x)).transpose(1, 2).unflatten(2, grid)
        return DiffusionOutput(F.pixel_shuffle(v, self.patch),
                               tapped.transpose(1, 2).unflatten(2, grid))


class RepaHead(nn.Module):
    """Predicts DINOv2 patch features from diffusion patches, in training only. Sec. 4."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        hidden = config.repa_hidden
        self.layers = nn.Sequential(nn.Linear(config.diffusion_width, hidden), nn.SiLU(),
                                    nn.Linear(hidden, hidden), nn.SiLU(),
                                    nn.Linear(hidden, config.repa_dim))

    def forward(self, patches: Tensor) -> Tensor:
        """patches: (B, D, H/p, W/p) -> features (B, H/2p * W/2p, repa_dim)."""
        return self.layers(F.avg_pool2d(patches, 2).flatten(2).transpose(1, 2))


class TrainOutput(NamedTuple):
    flow_loss: Tensor      # () Eq. 2 over sigma^2
    vq_loss: Tensor        # () mean over the tokens up to the end of each image's group
    predicted: Tensor      # (B, 3, H, W) estimates of the images, in [-1, 1] up to error
    repa: Tensor | None    # (B, H/2p * W/2p, repa_dim) predicted DINOv2 features; None without head
    tokens: Tensor         # (B, N) int64
    z: Tensor              # (B, N, C) encoder outputs before quantization, without gradient


class Tokenizer(nn.Module):
    """The whole sequential diffusion tokenizer (Sec. 3.1): its training rule, `forward`; `encode`,
    and `decode` at once or, while tokens come in, by `stream`."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = CausalDecoder(config)
        self.diffusion = DiffusionDecoder(config)
        self.repa_head = RepaHead(config) if config.repa_depth else None
        self.initialise()

    def initialise(self):
        """All initialisation (released code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.config.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.encoder.query_table, std=1.0)
        nn.init.trunc_normal_(self.decoder.positions, std=self.config.init_std)
        nn.init.normal_(self.quantizer.codebook)
        with torch.no_grad():
            self.quantizer.codebook.copy_(F.normalize(self.quantizer.codebook, dim=-1))
        for block in self.diffusion.blocks:
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.diffusion.to_pixels.weight)

    def forward(self, images: Tensor, u: Tensor, noise: Tensor) -> TrainOutput:
        """The training rule (Sec. 4). images: (B, 3, H, W) in [-1, 1]. u: (B,) uniform in [0, 1).
        noise: (B, 3, H, W) standard normal."""
        config = self.config
        t, group = shift_time(u, config.beta), group_of(u, config.num_groups)
        z = self.encoder(images)                                             # (B, N, C)
        quantized = self.quantizer(z)
        cond = self.decoder(quantized.codes)                                 # (B, N, D)
        cond = cond.unflatten(1, (config.num_groups, -1))                    # (B, K, N/K, D)
        cond = cond[torch.arange(len(u), device=u.device), group]            # (B, N/K, D)

        x1 = config.sigma * images
        xt = interpolate(x1, noise, t)                                       # (B, 3, H, W)
        v, patches = self.diffusion(xt, t, cond)
        flow_loss = (v - (x1 - noise)).pow(2).mean() / config.sigma ** 2     # Eq. 2

        # Only tokens up to the end of the chosen group had a say in this image's velocity.
        seen = (group + 1) * config.group_size                               # (B,)
        seen = torch.arange(config.num_tokens, device=u.device) < seen[:, None]
        vq_loss = (quantized.loss * seen).sum() / seen.sum()
        repa = self.repa_head(patches) if self.repa_head is not None else None
        return TrainOutput(flow_loss, vq_loss, jump(xt, v, t) / config.sigma, repa,
                           quantized.tokens, z.detach())

    def encode(self, images: Tensor) -> Tensor:
        """Tokens (B, N) int64 of images (B, 3, H, W) in [-1, 1]. Eq. 1."""
        with torch.no_grad():
            return self.quantizer(self.encoder(images)).tokens

    def condition(self, tokens: Tensor) -> Tensor:
        """Condition tokens (B, n, D) of the first n tokens (B, n), n <= N."""
        return self.decoder(self.quantizer.lookup(tokens))

    def velocity(self, x: Tensor, step: Step, cond: Tensor) -> Tensor:
        """Velocity (B, 3, H, W) at x (B, 3, H, W) in a step, from condition tokens (B, n, D) that
        reach at least to the end of the step's group."""
        size = self.config.group_size
        group = cond[:, step.group * size:(step.group + 1) * size]           # (B, N/K, D)
        return self.diffusion(x, x.new_full((1,), step.t), group).velocity

    def start(self, batch: int, noise: Tensor | None, solver: str) -> Tensor:
        """The noise x0 (B, 3, H, W) that a solver starts from; fresh where none is given. Raises
        ValueError for another shape, and for an unknown solver."""
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        size = self.config.image_size
        if noise is None:
            return torch.randn(batch, 3, size, size, device=self.quantizer.codebook.device)
        if noise.ndim != 4 or noise.shape[:2] != (batch, 3):
            raise ValueError(f"noise must be ({batch}, 3, H, W), got {tuple(noise.shape)}")
        return noise

    @torch.no_grad()
    def decode(self, tokens: Tensor, noise: Tensor | None = None, steps: int | None = None,
               solver: str = "adams2", groups: int | None = None) -> Tensor:
        """Images (B, 3, H, W), in [-1, 1] up to overshoot, of tokens (B, n) int64. Sec. 4.

        noise: (B, 3, H, W) starting point, standard normal; None draws one. steps: denoising steps,
        default K (or the config's num_steps). solver: see `solver_step`. groups: read only the
        tokens of the first `groups` groups, whose last step jumps to t = 1; default K. n must reach
        to the end of these groups. Raises ValueError for other shapes or values.
        """
        config = self.config
        steps = (config.num_steps or config.num_groups) if steps is None else steps
        groups = config.num_groups if groups is None else groups
        if steps < 1 or not 1 <= groups <= config.num_groups:
            raise ValueError(f"need steps >= 1 and 1 <= groups <= {config.num_groups}, "
                             f"got steps {steps}, groups {groups}")
        length = groups * config.group_size
        if tokens.ndim != 2 or not length <= tokens.shape[1] <= config.num_tokens:
            raise ValueError(f"tokens must be (B, n) with {length} <= n <= {config.num_tokens}, "
                             f"got {tuple(tokens.shape)}")
        x, v_before = self.start(len(tokens), noise, solver), None
        cond = self.condition(tokens[:, :length])                            # (B, n, D)
        for step in sampling_schedule(steps, config.num_groups, config.beta, groups):
            v = self.velocity(x, step, cond)
            x, v_before = solver_step(x, v, v_before, step, solver), v
        return x / config.sigma

    @torch.no_grad()
    def stream(self, token_groups: Iterable[Tensor], noise: Tensor | None = None,
               solver: str = "adams2", groups: int | None = None) -> Iterator[Tensor]:
        """Takes the tokens group by group, (B, N/K) each, and yields after each a preview
        (B, 3, H, W), the estimate of the image. The last one, after all K groups or the first
        `groups`, is the image that `decode` with steps = K gives. A preview costs no call of the
        diffusion decoder. noise, solver: as in `decode`. Raises ValueError. Sec. 3.3.
        """
        config, count = self.config, self.config.num_groups
        if groups is not None and not 1 <= groups <= count:
            raise ValueError(f"need 1 <= groups <= {count}, got {groups}")
        schedule = sampling_schedule(count, count, config.beta, groups or count)
        tokens, x, v_before = None, None, None
        for step, group in zip(schedule, token_groups):
            if group.ndim != 2 or group.shape[1] != config.group_size:
                raise ValueError(f"a group must be (B, {config.group_size}), got "
                                 f"{tuple(group.shape)}")
            tokens = group if tokens is None else torch.cat([tokens, group], 1)      # (B, n)
            x = self.start(len(tokens), noise, solver) if x is None else x
            v = self.velocity(x, step, self.condition(tokens))
            preview = jump(x, v, x.new_full((len(x),), step.t))
            x, v_before = solver_step(x, v, v_before, step, solver), v
            yield (x if step is schedule[-1] else preview) / config.sigma
