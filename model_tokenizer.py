"""The sequential diffusion tokenizer of D-AR: an image becomes 256 tokens in denoising order.

A transformer encodes the image into N query tokens, and each is replaced by its nearest codebook
row (Eq. 1). A causal transformer turns the rows into condition tokens c_1 ... c_N, cut into K
groups; c_i depends on the tokens up to i. A pixel-space flow-matching transformer then denoises the
image in K steps, and step k reads the condition tokens of group k. Early tokens thus carry what
early (noisy) steps need: layout and colour; late tokens carry detail. Reading the tokens one after
another *is* running the diffusion.

    image (B, 3, H, W) -> Encoder -> z (B, N, C) -> Quantizer -> tokens (B, N), vectors (B, N, C)
    vectors (B, N, C) -> CausalDecoder -> cond (B, N, D), in K groups of (B, N/K, D)
    x_t (B, 3, H, W), t (B,), one group of cond -> DiffusionDecoder -> velocity (B, 3, H, W)

Letters: B batch, H and W pixels, p pixels a side of a patch, L patches (or whatever attends), M
what is attended to, D width of the part at hand, N tokens, n some first ones, K groups, V
codebook size, C code width, h heads, d head width. Images are RGB in [-1, 1]. Flow time t: t = 0 is
noise x0, t = 1 is x1, the image times sigma; u is the time before the shift of Eq. 8. "Sec.", "Eq."
and "App." are of the paper, arxiv.org/abs/2505.23660; "released code" is the authors' public
release. Eq. 6 is in model_ar.py, Eq. 7 in train_tokenizer.py.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class TokenizerConfig:
    """Architecture and constants of the method. Weights also load under another image_size,
    num_tokens, num_groups or "Method" value than they were trained with, but work less well."""
    # Images and tokens
    image_size: int = 256        # pixels a side (Sec. 5)
    num_tokens: int = 256        # N, query tokens an image (Sec. 4)
    num_groups: int = 8          # K, groups = denoising steps (Sec. 4, Table 5 of the appendix)
    codebook_size: int = 16384   # V (Sec. 4)
    code_dim: int = 8            # C, width of a codebook row (Sec. 4)
    # Encoder
    patch_size: int = 16         # pixels a side of an encoder patch (Sec. 4)
    encoder_width: int = 768     # (Sec. 4)
    encoder_depth: int = 8       # (Sec. 4)
    query_rank: int = 8          # rank of the query table (released code)
    # Causal decoder
    decoder_width: int = 768     # (Sec. 4)
    decoder_depth: int = 8       # (Sec. 4)
    # Diffusion decoder
    diffusion_width: int = 768   # (Sec. 4)
    diffusion_depth: int = 12    # (Sec. 4)
    diffusion_patch: int = 8     # pixels a side of a diffusion patch (Sec. 4)
    # All transformers
    head_dim: int = 64           # d, width of one attention head (released code)
    max_tokens: int = 1024       # rows in the query and position tables (released code)
    init_std: float = 0.02       # of linear weights and positions (released code)
    modulation_std: float = 0.0  # of the weights of shift, scale and gate (released code)
    # Method
    sigma: float = 0.6           # images are multiplied by it (released code)
    beta: float = 2.0            # time shift, Eq. 5 and 8 (Sec. 4)
    commitment: float = 0.25     # weight of the commitment loss (released code)
    # REPA head, in training only
    repa_depth: int = 8          # it reads after this many diffusion blocks; 0: none (Sec. 4)
    repa_dim: int = 768          # width of the DINOv2-B features it predicts
    repa_hidden: int = 2048      # width of its hidden layers (released code)

    @property
    def group_size(self):
        """N/K, tokens a group."""
        return self.num_tokens // self.num_groups

    def __post_init__(self):
        for whole, part in (
                ("num_tokens", "num_groups"), ("image_size", "patch_size"),
                ("image_size", "diffusion_patch"), ("encoder_width", "head_dim"),
                ("decoder_width", "head_dim"), ("diffusion_width", "head_dim")):
            divisor = getattr(self, part)
            assert divisor > 0, f"{part} must be above 0"
            assert getattr(self, whole) % divisor == 0, f"{whole} must divide by {part}"
        assert self.beta > 0, "beta must be above 0"
        assert self.head_dim % 4 == 0, "head_dim must divide by 4, as pairs turn in two directions"
        assert self.num_tokens <= self.max_tokens, "num_tokens must be at most max_tokens"


TOKENIZERS = {
    "paper": TokenizerConfig(),  # 300M parameters (300,099,776) + 7.3M in the REPA head
    # The ablation model of the paper's appendix III, 113M parameters with the head. Its 8 diffusion
    # blocks leave none after the paper's REPA tap at 8, so the head reads after block 6.
    "light": TokenizerConfig(
        encoder_width=512, decoder_width=512, diffusion_width=512, diffusion_depth=8, repa_depth=6),
    # For the built-in pictures: 8 groups of 2 tokens, of so small a codebook that the first group
    # cannot tell all. In so narrow a model, weights of 0.02 weaken the signal, and tokens long stay
    # without meaning: init_std is about 1 / sqrt(width), and modulation starts above 0.
    "toy": TokenizerConfig(
        image_size=16, num_tokens=16, codebook_size=16,
        patch_size=4, encoder_width=96, encoder_depth=2,
        decoder_width=96, decoder_depth=2,
        diffusion_width=96, diffusion_depth=3, diffusion_patch=4, head_dim=16, max_tokens=16,
        init_std=0.1, modulation_std=0.02, beta=4.0, repa_depth=0),
    # For photographs of 32 pixels, 34M parameters: 8 groups of 16 tokens
    "cifar": TokenizerConfig(
        image_size=32, num_tokens=128, codebook_size=4096,
        patch_size=4, encoder_width=384, encoder_depth=4,
        decoder_width=384, decoder_depth=4,
        diffusion_width=384, diffusion_depth=5, diffusion_patch=2, max_tokens=128,
        init_std=0.05, modulation_std=0.02, repa_depth=0),
}


# ---- The rules: time, groups, interpolation ------------------------------------------------------

def shift_time(u, beta):
    """Flow time t of a uniform time u in [0, 1], a number or a tensor. Eq. 8. beta > 1 puts more
    times near t = 0."""
    return u / (u + beta * (1 - u))


def group_of(u, num_groups):
    """The group of tokens, 0 ... K - 1, that conditions a uniform time u in [0, 1], a number or a
    tensor. Returns a float or a tensor of floats. Eq. 5.

    The paper takes ceil(uK), from 1. We round, as the released code does: each group is trained
    around the one time at which the K-step sampler uses it. The first gets 1/(2K) of all times, the
    last 3/(2K).
    """
    k = (u * num_groups + 0.5) // 1  # floor, of a number or a tensor
    return k - k // num_groups       # K becomes K - 1: only there k // K is 1


def interpolate(x1, x0, t):
    """x_t between noise x0 and data x1, both (B, 3, H, W), at flow times t, a number or
    (B, 1, 1, 1). Eq. 3 and 4."""
    return t * x1 + (1 - t) * x0


def predict_image(x, v, t):
    """Estimate of x1: x_t moved along velocity v, both (B, 3, H, W), from flow times t, a number or
    (B, 1, 1, 1), to 1."""
    return x + (1 - t) * v


class Step(NamedTuple):
    """One denoising step: from flow time t to t_next, conditioned on one group of tokens."""
    t: float
    t_next: float
    group: int


def sampling_schedule(steps, num_groups, beta, groups):
    """Those steps at u = i / steps (Eq. 8) that read one of the first `groups` groups; the last
    one jumps to t = 1. With steps = num_groups each is read once; with fewer steps, some never.
    """
    schedule = []
    for i in range(steps):
        t = shift_time(i / steps, beta)
        t_next = shift_time((i + 1) / steps, beta)
        group = int(group_of(i / steps, num_groups))
        if group < groups:
            schedule.append(Step(t, t_next, group))
    schedule[-1] = schedule[-1]._replace(t_next=1.0)
    return schedule


SOLVERS = ("adams2", "euler")


def solver_step(x, v, v_before, step, solver):
    """x at step.t_next from x and velocity v at step.t, all (B, 3, H, W). Sec. 5, Table 6.

    solver: "euler", or "adams2": two-step Adams-Bashforth, whose first step is Euler, with the
    coefficients of equal steps although the steps are not equal (released code). No solver
    may ask for the velocity at t = 1: it is data less noise, and x there holds no noise to tell.
    """
    assert solver in SOLVERS, f"solver must be one of {SOLVERS}"
    if solver == "adams2" and v_before is not None:
        v = 1.5 * v - 0.5 * v_before
    return x + (step.t_next - step.t) * v


# ---- Attention -----------------------------------------------------------------------------------

def to_patches(images, patch):
    """Patches (B, L, 3 p p) of images (B, 3, H, W), row by row, in channel-row-column order within;
    and the grid they form, (H/p, W/p). patch: p."""
    patches = F.pixel_unshuffle(images, patch)                      # (B, 3 p p, H/p, W/p)
    return patches.flatten(2).transpose(1, 2), patches.shape[2:]


def grid_positions(grid, device):
    """Row and column (L, 2) of each patch of a grid, row by row."""
    return torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid))


def rope_2d(positions, head_dim):
    """Rotation of tokens at positions (L, 2): cosines and sines, (2, L, d/2).

    The first half of the channel pairs turns with the row, the second with the column. App. I.
    """
    half = head_dim // 2
    device = positions.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # mps lacks float64
    exponents = torch.arange(0, half, 2, dtype=dtype, device=device) / half
    angles = positions[..., None] * 10000.0 ** -exponents           # (L, 2, d/4)
    angles = angles.flatten(1)                                      # (L, d/2)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x, rope):
    """Turns neighbouring channel pairs of x (B, h, L, d) by rope (2, L, d/2). Returns float32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)              # (B, h, L, d/2) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def attend(q, k, v, num_full):
    """Attention of q (B, h, L, d) to k, v (B, h, M, d). The first `num_full` queries see one
    another, each later one all up to its own position; if num_full is L, all see all M keys. There
    is no mask, so flash kernels serve."""
    q, k = q.type_as(v), k.type_as(v)  # norms and rotation leave float32
    if num_full == q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if num_full == 0:
        return causal
    # The causal call computes the first rows too, and they are dropped: still cheaper than a mask.
    full = F.scaled_dot_product_attention(*(x[:, :, :num_full] for x in (q, k, v)))
    return torch.cat([full, causal[:, :, num_full:]], 2)


class Attention(nn.Module):
    """Multi-head attention with normalised, rotated queries and keys (App. I). Scale 1/sqrt(d)."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6)

    def qkv(self, x, context):
        """Queries (B, h, L, d) of x (B, L, D); keys and values (B, h, M, d) of context (B, M, D).
        """
        parts = self.q(x), self.k(context), self.v(context)
        q, k, v = [part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts]
        return self.q_norm(q), self.k_norm(k), v

    def project(self, x):
        return self.out(x.transpose(1, 2).flatten(2))               # (B, L, D)

    def forward(self, x, rope, num_full):
        """Self-attention of x (B, L, D), see `attend`; queries and keys are rotated if there is a
        rope (2, L, d/2)."""
        q, k, v = self.qkv(x, x)                                    # (B, h, L, d) each
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.project(attend(q, k, v, num_full))

    def cross(self, x, context, rope):
        """Attention of x (B, L, D), rotated, to context (B, M, D), unrotated: (B, L, D)."""
        q, k, v = self.qkv(x, context)
        return self.project(attend(rotate(q, rope), k, v, num_full=q.shape[2]))


def mlp(width, hidden):
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))


def layer_norm(x):
    """LayerNorm over channels, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Block(nn.Module):
    """Transformer block whose branches are scaled by per-channel gates that start at 0."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, head_dim)
        self.mlp = mlp(width, 4 * width)
        self.gate1 = nn.Parameter(torch.zeros(width))
        self.gate2 = nn.Parameter(torch.zeros(width))

    def forward(self, x, rope, num_full):
        x = x + self.gate1 * self.attention(self.norm1(x), rope, num_full)  # (B, L, D)
        return x + self.gate2 * self.mlp(self.norm2(x))


# ---- Image to tokens -----------------------------------------------------------------------------

class Encoder(nn.Module):
    """Images (B, 3, H, W) -> z (B, N, C), one vector a query token. Eq. 1, Sec. 3.1."""

    def __init__(self, config):
        super().__init__()
        width = config.encoder_width
        self.config = config
        self.from_pixels = nn.Linear(3 * config.patch_size ** 2, width)
        self.query_table = nn.Parameter(torch.empty(config.max_tokens, config.query_rank))
        self.query_up = nn.Linear(config.query_rank, width)
        self.blocks = nn.ModuleList(
            Block(width, config.head_dim) for _ in range(config.encoder_depth))
        self.to_code = nn.Linear(width, config.code_dim, bias=False)

    def forward(self, images):
        config = self.config
        patches, grid = to_patches(images, config.patch_size)       # (B, L, 3 p p)
        patches = layer_norm(self.from_pixels(patches))             # (B, L, D)
        queries = self.query_up(self.query_table[:config.num_tokens])  # (N, D)
        x = torch.cat([patches, queries.expand(len(images), -1, -1)], 1)  # (B, L + N, D)
        # Query tokens have no place in the image: position 0, which is no rotation (App. I).
        positions = grid_positions(grid, images.device)             # (L, 2)
        positions = F.pad(positions, (0, 0, 0, config.num_tokens))  # (L + N, 2)
        rope = rope_2d(positions, config.head_dim)                  # (2, L + N, d/2)
        for block in self.blocks:  # patches see patches, queries these and earlier queries
            x = block(x, rope, num_full=patches.shape[1])
        return self.to_code(layer_norm(x[:, -config.num_tokens:]))  # (B, N, C)


class Quantized(NamedTuple):
    tokens: Tensor    # (B, N) int64, row numbers in the codebook
    vectors: Tensor   # (B, N, C) the unit rows; their gradient goes straight through to the encoder
    loss: Tensor      # (B, N) each token's codebook loss, plus `commitment` x its commitment loss


class Quantizer(nn.Module):
    """Nearest codebook row on the unit sphere (Sec. 4, App. I). Always in float32."""

    def __init__(self, config):
        super().__init__()
        self.commitment = config.commitment
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_dim))

    def forward(self, z):
        """z: (B, N, C), not normalised."""
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1)                      # (B, N, C)
            rows = F.normalize(self.codebook, dim=-1)               # (V, C)
            # Of unit vectors, the nearest is the one of the largest product.
            tokens = (z @ rows.T).argmax(-1)                        # (B, N)
            nearest = rows[tokens]                                  # (B, N, C)
            loss = (nearest - z.detach()).pow(2)
            loss = loss + self.commitment * (nearest.detach() - z).pow(2)
            return Quantized(tokens, z + (nearest - z).detach(), loss.mean(-1))

    def lookup(self, tokens):
        """Unit rows (B, n, C) of tokens (B, n)."""
        return F.normalize(self.codebook[tokens], dim=-1)


# ---- Tokens to image -----------------------------------------------------------------------------

class CausalDecoder(nn.Module):
    """Vectors (B, n, C) -> condition tokens c_1 ... c_n (B, n, D) for any n <= N; causal. Sec. 4.
    """

    def __init__(self, config):
        super().__init__()
        width = config.decoder_width
        self.from_code = nn.Linear(config.code_dim, width, bias=False)
        self.positions = nn.Parameter(torch.empty(config.max_tokens, width))
        self.blocks = nn.ModuleList(
            Block(width, config.head_dim) for _ in range(config.decoder_depth))

    def forward(self, vectors):
        x = self.from_code(vectors) + self.positions[:vectors.shape[1]]  # (B, n, D)
        for block in self.blocks:  # all causal
            x = block(x, None, num_full=0)
        return layer_norm(x)


def sinusoid(t, width):
    """Features (B, width) of flow times t (B,): cosines, then sines, of 1000 t."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = 1000 * t[:, None] * frequencies                        # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], 1)


class DiffusionBlock(nn.Module):
    """DiT block. Time and tokens enter only through shift, scale and gate (adaLN-zero, where
    modulation_std is 0), which differ from patch to patch because each patch fetches its own
    condition. Sec. 4."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.cond_mlp = mlp(width, width)
        self.cross_attention = Attention(width, head_dim)
        self.time_mlp = mlp(width, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, head_dim)
        self.mlp = mlp(width, 4 * width)

    def forward(self, x, t_emb, cond, rope):
        """x: (B, L, D) patches. t_emb: (B or 1, D) sinusoid. cond: (B, N/K, D). rope: (2, L, d/2).
        """
        context = layer_norm(self.cond_mlp(cond))                   # (B, N/K, D)
        cond_per_patch = self.cross_attention.cross(layer_norm(x), context, rope)  # (B, L, D)
        c = F.silu(self.time_mlp(t_emb)[:, None] + cond_per_patch)  # (B, L, D)
        # In float32, so that x stays float32 under autocast too.
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).float().chunk(6, -1)
        y = layer_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, rope, num_full=x.shape[1])         # each patch sees all
        return x + gate2 * self.mlp(layer_norm(x) * (1 + scale2) + shift2)


class DiffusionOutput(NamedTuple):
    velocity: Tensor   # (B, 3, H, W) float32
    patches: Tensor    # (B, D, H/p, W/p) after `repa_depth` blocks, which a REPA head alone reads


class DiffusionDecoder(nn.Module):
    """Velocity v(x_t, t, c) on pixels, conditioned on one group of tokens. Sec. 3.1 and 4."""

    def __init__(self, config):
        super().__init__()
        assert config.repa_depth < config.diffusion_depth, "no block is left after the REPA tap"
        width = config.diffusion_width
        self.config = config
        pixels = 3 * config.diffusion_patch ** 2
        self.from_pixels = nn.Linear(pixels, width)
        self.from_cond = nn.Linear(config.decoder_width, width)
        self.blocks = nn.ModuleList(
            DiffusionBlock(width, config.head_dim) for _ in range(config.diffusion_depth))
        self.to_pixels = nn.Linear(width, pixels)

    def forward(self, x, t, cond):
        """x: (B, 3, H, W) images x_t. t: (B,), or (1,) for all. cond: (B, N/K, width of the causal
        decoder), one group."""
        config = self.config
        x, grid = to_patches(x, config.diffusion_patch)             # (B, L, 3 p p)
        x = self.from_pixels(x).float()                             # (B, L, D)
        cond = layer_norm(self.from_cond(cond))                     # (B, N/K, D)
        t_emb = sinusoid(t, x.shape[2])                             # (B or 1, D)
        rope = rope_2d(grid_positions(grid, x.device), config.head_dim)   # (2, L, d/2)
        for done, block in enumerate(self.blocks):
            if done == config.repa_depth:
                tapped = x
            x = block(x, t_emb, cond, rope)
        with torch.autocast(x.device.type, enabled=False):
            v = self.to_pixels(layer_norm(x))                       # (B, L, 3 p p)
        v = v.transpose(1, 2).unflatten(2, grid)                    # (B, 3 p p, H/p, W/p)
        tapped = tapped.transpose(1, 2).unflatten(2, grid)          # (B, D, H/p, W/p)
        return DiffusionOutput(F.pixel_shuffle(v, config.diffusion_patch), tapped)


class RepaHead(nn.Module):
    """Predicts DINOv2 patch features from diffusion patches, in training only. Sec. 4."""

    def __init__(self, config):
        super().__init__()
        hidden = config.repa_hidden
        self.layers = nn.Sequential(
            nn.Linear(config.diffusion_width, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, config.repa_dim))

    def forward(self, patches):
        """patches: (B, D, H/p, W/p) -> features (B, L/4, repa_dim)."""
        return self.layers(F.avg_pool2d(patches, 2).flatten(2).transpose(1, 2))


# ---- The tokenizer -------------------------------------------------------------------------------

class TrainOutput(NamedTuple):
    flow_loss: Tensor      # () Eq. 2, over sigma^2
    vq_loss: Tensor        # () mean over the tokens up to the end of each image's group
    predicted: Tensor      # (B, 3, H, W) estimates of the images, in [-1, 1] up to error
    repa: Tensor | None    # (B, L/4, repa_dim) predicted DINOv2 features; None without head
    tokens: Tensor         # (B, N) int64
    z: Tensor              # (B, N, C) encoder outputs before quantization, without gradient


class Tokenizer(nn.Module):
    """The whole sequential diffusion tokenizer (Sec. 3.1): its training rule, `forward`; `encode`,
    and `decode` at once or, while tokens come in, by `stream`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = CausalDecoder(config)
        self.diffusion = DiffusionDecoder(config)
        self.repa_head = RepaHead(config) if config.repa_depth else None
        self.initialise()

    def initialise(self):
        """All initialisation (released code), but for norms, which start at 1, and the gates of
        `Block`, which start at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.config.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.encoder.query_table)
        nn.init.trunc_normal_(self.decoder.positions, std=self.config.init_std)
        codebook = nn.init.normal_(self.quantizer.codebook)
        codebook.data = F.normalize(codebook.data, dim=-1)
        for block in self.diffusion.blocks:
            nn.init.normal_(block.modulation.weight, std=self.config.modulation_std)
        nn.init.zeros_(self.diffusion.to_pixels.weight)

    def forward(self, images, u, noise):
        """The training rule (Sec. 4). images: (B, 3, H, W) in [-1, 1]. u: (B,) uniform in [0, 1).
        noise: (B, 3, H, W) standard normal."""
        config = self.config
        t = shift_time(u, config.beta)                              # (B,)
        group = group_of(u, config.num_groups).long()               # (B,)
        z = self.encoder(images)                                    # (B, N, C)
        quantized = self.quantizer(z)
        cond = self.decoder(quantized.vectors)                      # (B, N, D)
        cond = cond.unflatten(1, (config.num_groups, -1))           # (B, K, N/K, D)
        cond = cond[torch.arange(len(u), device=u.device), group]   # (B, N/K, D)

        x1 = config.sigma * images
        times = t[:, None, None, None]                              # (B, 1, 1, 1)
        xt = interpolate(x1, noise, times)                          # (B, 3, H, W)
        v, patches = self.diffusion(xt, t, cond)
        flow_loss = (v - (x1 - noise)).pow(2).mean() / config.sigma ** 2     # Eq. 2

        # Only tokens up to the end of the chosen group had a say in this image's velocity.
        group_of_token = torch.arange(config.num_tokens, device=u.device) // config.group_size
        mask = group_of_token <= group[:, None]                     # (B, N)
        vq_loss = (quantized.loss * mask).sum() / mask.sum()
        repa = self.repa_head(patches) if self.repa_head else None
        predicted = predict_image(xt, v, times) / config.sigma
        return TrainOutput(flow_loss, vq_loss, predicted, repa, quantized.tokens, z.detach())

    @torch.no_grad()
    def encode(self, images):
        """Tokens (B, N) int64 of images (B, 3, H, W) in [-1, 1]. Eq. 1. Not to be called under
        autocast: in bf16, some tokens come out as others."""
        return self.quantizer(self.encoder(images)).tokens

    def condition(self, tokens):
        """Condition tokens (B, n, D) of the first n tokens (B, n), n <= N."""
        return self.decoder(self.quantizer.lookup(tokens))

    def velocity(self, x, step, cond):
        """Velocity (B, 3, H, W) at x (B, 3, H, W) in a step, from condition tokens (B, n, D) that
        reach at least to the end of the step's group."""
        cond_k = cond.split(self.config.group_size, 1)[step.group]  # (B, N/K, D)
        return self.diffusion(x, x.new_full((1,), step.t), cond_k).velocity

    def denoise(self, x, v_before, step, cond, solver):
        """One step from x (B, 3, H, W). Returns x at the step's end; the velocity, which the next
        step takes as v_before (the first takes None); the preview, times sigma. cond: see
        `velocity`."""
        v = self.velocity(x, step, cond)
        return solver_step(x, v, v_before, step, solver), v, predict_image(x, v, step.t)

    @torch.no_grad()
    def decode(self, tokens, noise=None, steps=None, solver="adams2", groups=None):
        """Images (B, 3, H, W), in [-1, 1] up to overshoot, of tokens (B, n) int64. Sec. 4.

        noise: (B, 3, H, W) starting point, standard normal; None draws one. steps: denoising steps,
        default K. solver: "adams2" or "euler". groups: read only the tokens of the first `groups`
        groups, whose last step jumps to t = 1; default K. n must reach to the end of these groups.
        """
        config = self.config
        groups = groups or config.num_groups
        length = groups * config.group_size
        assert length <= tokens.shape[1] <= config.num_tokens, f"{groups} groups need {length}"
        if noise is None:
            size = config.image_size
            noise = torch.randn(len(tokens), 3, size, size, device=tokens.device)
        cond = self.condition(tokens[:, :length])                   # (B, length, D)
        x, v = noise, None
        steps = steps or config.num_groups
        for step in sampling_schedule(steps, config.num_groups, config.beta, groups):
            x, v, _ = self.denoise(x, v, step, cond, solver)
        return x / config.sigma

    @torch.no_grad()
    def stream(self, token_groups, noise, solver="adams2", groups=None):
        """Takes the tokens group by group, exactly (B, N/K) each, and yields after each a preview
        (B, 3, H, W), the estimate of the image. The last one, after all K groups or the first
        `groups`, is the image that `decode` with steps = K gives. A preview costs no further call
        of the diffusion decoder. noise: (B, 3, H, W). solver: as in `decode`. Sec. 3.3.
        """
        config = self.config
        steps = config.num_groups
        schedule = sampling_schedule(steps, steps, config.beta, groups or steps)
        tokens = []
        x, v = noise, None
        for step, new in zip(schedule, token_groups):
            tokens.append(new)                                      # (B, N/K)
            cond = self.condition(torch.cat(tokens, 1))             # (B, n, D)
            x, v, preview = self.denoise(x, v, step, cond, solver)
            # The last step's x *is* the image; under Adams-Bashforth it differs from the preview.
            yield (preview if step.t_next < 1 else x) / config.sigma
