"""The sequential diffusion tokenizer of D-AR: an image becomes 256 tokens in denoising order.

A transformer encodes the image into N query tokens, and each is replaced by its nearest codebook
row (Eq. 1). A causal transformer turns the rows into condition tokens c_1 ... c_N, cut into K
groups. A pixel-space flow-matching transformer then denoises the image in K steps, and step k sees
group k only. Early tokens thus carry what early (noisy) steps need: layout and colour; late tokens
carry detail. Reading the tokens one after another *is* running the diffusion.

    image (B, 3, H, W) -> Encoder -> z (B, N, 8) -> Quantizer -> tokens (B, N), codes (B, N, 8)
    codes (B, N, 8) -> CausalDecoder -> cond (B, N, D), in K groups of (B, N/K, D)
    x_t (B, 3, H, W), t (B,), one group of cond -> DiffusionDecoder -> velocity (B, 3, H, W)

Letters: B batch, H and W pixels, L image patches, N tokens, K groups, D width, V codebook size,
d head width, h heads. Images are RGB in [-1, 1]. Flow time t: t = 0 is noise, t = 1 is the image;
u is the time before the shift of Eq. 8. "Sec." and "Eq." are the paper's; "released code" is the
authors' public release.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import re
import resource
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class TokenizerConfig:
    """Architecture. Weights belong to one setting of it; only `image_size` and `num_steps` may be
    changed later."""
    image_size: int = 256        # pixels a side (Sec. 5)
    num_tokens: int = 256        # N, query tokens an image (Sec. 4)
    num_groups: int = 8          # K, groups = denoising steps (Sec. 4, Table 5 of the appendix)
    num_steps: int = 0           # default denoising steps of `decode`; 0: K (Sec. 4)
    codebook_size: int = 16384   # V (Sec. 4)
    code_dim: int = 8            # width of a codebook row (Sec. 4)
    patch_size: int = 16         # pixels a side of an encoder patch (Sec. 4)
    encoder_width: int = 768     # (Sec. 4)
    encoder_depth: int = 8       # (Sec. 4)
    decoder_width: int = 768     # the causal decoder (Sec. 4)
    decoder_depth: int = 8       # (Sec. 4)
    diffusion_width: int = 768   # (Sec. 4)
    diffusion_depth: int = 12    # (Sec. 4)
    diffusion_patch: int = 8     # pixels a side of a diffusion patch (Sec. 4)
    head_dim: int = 64           # d, width of one attention head (released code)
    query_rank: int = 8          # rank of the query table (released code)
    max_tokens: int = 1024       # rows in the query and position tables (released code)
    sigma: float = 0.6           # standard deviation the data is scaled by (released code)
    beta: float = 2.0            # time shift, Eq. 5 and 8 (Sec. 4)
    commitment: float = 0.25     # weight of the commitment loss (released code)
    init_std: float = 0.02       # of linear weights and positions (released code)
    repa_depth: int = 8          # the REPA head reads after this many diffusion blocks; 0: no head
    repa_dim: int = 768          # width of the DINOv2-B features the head predicts
    repa_hidden: int = 2048      # width of the head's hidden layers (released code)

    def __post_init__(self):
        need = [
            (self.num_groups > 0 and self.num_tokens % self.num_groups == 0,
             "num_tokens must be a multiple of num_groups"),
            (self.num_tokens <= self.max_tokens, "num_tokens must not exceed max_tokens"),
            (self.image_size % self.patch_size == 0, "image_size must be a multiple of patch_size"),
            (self.image_size % self.diffusion_patch == 0,
             "image_size must be a multiple of diffusion_patch"),
            (self.head_dim % 4 == 0, "head_dim must be a multiple of 4, for the two axes of RoPE"),
            (0 <= self.repa_depth < self.diffusion_depth,
             "repa_depth must be below diffusion_depth (0: no REPA head)"),
            (self.num_steps >= 0, "num_steps must be 0 or more"),
            (self.sigma > 0 and self.beta > 0, "sigma and beta must be positive")]
        need += [(width % self.head_dim == 0, "widths must be multiples of head_dim")
                 for width in (self.encoder_width, self.decoder_width, self.diffusion_width)]
        for holds, message in need:
            if not holds:
                raise ValueError(f"{message}; got {self}")


TOKENIZERS = {
    "paper": TokenizerConfig(),  # 300M parameters (300,099,776) + 7.3M in the REPA head
    # The ablation model of the paper's appendix III, 113M parameters. Its 8 diffusion blocks leave
    # none after the paper's REPA tap at 8, so the head reads after block 6.
    "light": TokenizerConfig(encoder_width=512, decoder_width=512, diffusion_width=512,
                             diffusion_depth=8, repa_depth=6),
    # For the built-in pictures: 8 groups of 4 tokens, trained on a CPU in minutes. At width 96,
    # linear layers that start at 0.02 pass so little on that the tokens stay empty for long.
    "toy": TokenizerConfig(image_size=24, num_tokens=32, codebook_size=512, patch_size=6,
                           encoder_width=96, encoder_depth=3, decoder_width=96, decoder_depth=2,
                           diffusion_width=96, diffusion_depth=4, diffusion_patch=4, head_dim=16,
                           max_tokens=32, init_std=0.06, repa_depth=0),
    # For photographs of 32 pixels: 8 groups of 8 tokens.
    "cifar": TokenizerConfig(image_size=32, num_tokens=64, codebook_size=4096, patch_size=4,
                             encoder_width=256, encoder_depth=6, decoder_width=256, decoder_depth=6,
                             diffusion_width=256, diffusion_depth=8, diffusion_patch=2,
                             head_dim=32, max_tokens=64, init_std=0.04, repa_depth=0)}


# ---- The rules: time, groups, interpolation ------------------------------------------------------

def shift_time(u, beta: float):
    """Flow time t of uniform time u, Eq. 8. u: float or tensor in [0, 1]. beta > 1: denser at 0."""
    return u / (u + beta * (1 - u))


def group_of(u, num_groups: int):
    """The group of tokens that conditions uniform time u, Eq. 5. u: float or tensor in [0, 1].

    As the released code does, and unlike the paper's ceil(uK), the edges are rounded: each group is
    trained around the one time at which the K-step sampler uses it.
    """
    if isinstance(u, Tensor):
        return (u * num_groups + 0.5).long().clamp(max=num_groups - 1)
    return min(int(u * num_groups + 0.5), num_groups - 1)


def interpolate(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """x_t between noise x0 and data x1, both (B, 3, H, W), at flow times t (B,). Eq. 3 and 4."""
    t = t[:, None, None, None]
    return t * x1 + (1 - t) * x0


def jump(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Where velocity v leads from x_t, both (B, 3, H, W), if followed from t (B,) to t = 1."""
    return x + (1 - t[:, None, None, None]) * v


class Step(NamedTuple):
    """One denoising step: from flow time t to t_next, conditioned on one group of tokens."""
    t: float
    t_next: float
    group: int


def sampling_schedule(steps: int, num_groups: int, beta: float, groups: int) -> list[Step]:
    """Steps at u = i / steps (Eq. 8) of the first `groups` groups; the last one jumps to t = 1.

    With steps = num_groups, every group is used exactly once.
    """
    kept = [i / steps for i in range(steps) if group_of(i / steps, num_groups) < groups]
    times = [shift_time(u, beta) for u in kept] + [1.0]
    return [Step(t, t_next, group_of(u, num_groups))
            for u, t, t_next in zip(kept, times, times[1:])]


def solver_step(x: Tensor, v: Tensor, v_before: Tensor | None, step: Step, solver: str) -> Tensor:
    """x at step.t_next from x and velocity v at step.t, all (B, 3, H, W). Sec. 5, Table 6.

    "euler", or "adams2": two-step Adams-Bashforth, whose first step is Euler. Its coefficients are
    those of equal steps although the steps are not equal (released code).
    """
    if solver == "adams2" and v_before is not None:
        v = 1.5 * v - 0.5 * v_before
    return x + (step.t_next - step.t) * v


# ---- Attention -----------------------------------------------------------------------------------

def to_patches(images: Tensor, patch: int) -> tuple[Tensor, tuple[int, int]]:
    """Patches (B, L, C * patch * patch) of images (B, C, H, W), row by row, in channel-row-column
    order within; and the grid they form, (H / patch, W / patch)."""
    patches = F.pixel_unshuffle(images, patch)                               # (B, C p p, H/p, W/p)
    return patches.flatten(2).transpose(1, 2), patches.shape[2:]


def rope_2d(height: int, width: int, head_dim: int, device) -> Tensor:
    """Rotation of patches in row-major order: cosines and sines, (2, height * width, head_dim / 2).

    The first half of the channel pairs turns with the row, the second with the column. App. I.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float64, device=device) / half
    frequencies = 10000.0 ** -exponents
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], 1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns neighbouring channel pairs of x (B, h, L, d) by rope (2, L, d/2), in float32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                       # (B, h, L, d/2) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


# Kept, as it is the same in every call; made outside compiled code, where making it fails.
causal_bias = functools.cache(causal_lower_right)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, bias: CausalBias) -> Tensor:
    """Attention over [prefix, sequence]: the prefix sees the prefix, position i of the sequence
    sees the prefix and positions up to i. Two calls without a mask, both fit for flash kernels.

    q, k, v: (B, h, prefix + sequence, d). bias: causal_lower_right(sequence, prefix + sequence).
    """
    prefix = bias.seq_len_kv - bias.seq_len_q
    sequence = F.scaled_dot_product_attention(q[:, :, prefix:], k, v, attn_mask=bias)
    if prefix == 0:
        return sequence
    q, k, v = q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix]
    return torch.cat([F.scaled_dot_product_attention(q, k, v), sequence], 2)


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

    def forward(self, x: Tensor, rope: Tensor | None, bias: CausalBias | None) -> Tensor:
        """Self-attention of x (B, L, D): over all of x, or `prefix_attention` under a bias."""
        q, k, v = self.q_norm(self.heads(self.q(x))), self.k_norm(self.heads(self.k(x))), self.v(x)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = q.to(v.dtype), k.to(v.dtype), self.heads(v)
        if bias is None:
            return self.merge(F.scaled_dot_product_attention(q, k, v))
        return self.merge(prefix_attention(q, k, v, bias))

    def cross(self, x: Tensor, context: Tensor, rope: Tensor) -> Tensor:
        """Attention of x (B, L, D), rotated, to context (B, M, D), unrotated: (B, L, D)."""
        q = rotate(self.q_norm(self.heads(self.q(x))), rope)
        k, v = self.k_norm(self.heads(self.k(context))), self.heads(self.v(context))
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


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

    def forward(self, x: Tensor, rope: Tensor | None, bias: CausalBias) -> Tensor:
        x = x + self.gate1 * self.attention(self.norm1(x), rope, bias)       # (B, L, D)
        return x + self.gate2 * self.mlp(self.norm2(x))


# ---- Image to tokens -----------------------------------------------------------------------------

class Encoder(nn.Module):
    """Image (B, 3, H, W) -> z (B, N, code_dim), one vector a query token. Eq. 1, Sec. 3.1."""

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
        patches, grid = to_patches(images, self.patch)                       # (B, L, 768)
        rope = rope_2d(*grid, self.head_dim, images.device)
        # Query tokens have no place in the image: the identity rotation (App. I).
        identity = torch.zeros_like(rope[:, :1]).expand(-1, self.num_tokens, -1).clone()
        identity[0] = 1                                                      # (2, N, d/2)
        rope = torch.cat([rope, identity], 1)                                # (2, L + N, d/2)
        patches = layer_norm(self.from_pixels(patches))                      # (B, L, D)
        queries = self.query_up(self.query_table[:self.num_tokens])          # (N, D)
        x = torch.cat([patches, queries.expand(len(images), -1, -1)], 1)     # (B, L + N, D)
        bias = causal_bias(self.num_tokens, x.shape[1])                      # queries are causal
        for block in self.blocks:
            x = block(x, rope, bias)
        return self.to_code(layer_norm(x[:, -self.num_tokens:]))             # (B, N, 8)


class Quantized(NamedTuple):
    tokens: Tensor   # (B, N) int64, row numbers in the codebook
    codes: Tensor    # (B, N, 8) the unit rows; their gradient goes to the encoder, straight through
    loss: Tensor     # (B, N) codebook loss + 0.25 x commitment loss of each token


class Quantizer(nn.Module):
    """Nearest codebook row on the unit sphere (Sec. 4, App. I). Always float32: in bf16, 6 % of the
    tokens would differ."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.commitment = config.commitment
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_dim))

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, N, 8), of any length."""
        with torch.autocast(z.device.type, enabled=False):
            z, rows = F.normalize(z.float(), dim=-1), F.normalize(self.codebook, dim=-1)
            tokens = (z.detach() @ rows.detach().T).argmax(-1)               # (B, N)
            codes = rows[tokens]                                             # (B, N, 8)
            loss = (codes - z.detach()).pow(2) + self.commitment * (codes.detach() - z).pow(2)
            return Quantized(tokens, z + (codes - z).detach(), loss.mean(-1))

    def lookup(self, tokens: Tensor) -> Tensor:
        """Unit rows (B, n, 8) of tokens (B, n)."""
        return F.normalize(self.codebook[tokens], dim=-1)


# ---- Tokens to image -----------------------------------------------------------------------------

class CausalDecoder(nn.Module):
    """Codes (B, n, 8) -> condition tokens c_1 ... c_n (B, n, D) for any n <= N; causal. Sec. 4."""

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
        bias = causal_bias(n, n)
        for block in self.blocks:
            x = block(x, None, bias)
        return layer_norm(x)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Features (B, width) of flow times t (B,): cosines, then sines, of 1000 t."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = 1000 * t[:, None].float() * frequencies                         # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x) * (1 + scale) + shift


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
        signal = self.time_mlp(time)[:, None] + fetched                      # (B, L, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(signal)).chunk(6, -1)
        x = x + gate1 * self.attention(modulate(x, shift1, scale1), rope, None)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


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

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """x_t (B, 3, H, W), t (B,), or (1,) for all images, one group cond (B, N/K, D) -> velocity
        (B, 3, H, W), and the patches (B, D, H/8, W/8) after `repa_depth` blocks, which the REPA
        head reads."""
        x, grid = to_patches(x, self.patch)                                  # (B, L, 192)
        x = self.from_pixels(x)                                              # (B, L, D)
        cond, time = layer_norm(self.from_cond(cond)), sinusoid(t, x.shape[2])
        rope = rope_2d(*grid, self.head_dim, x.device)
        tapped = x
        for depth, block in enumerate(self.blocks, 1):
            x = block(x, time, cond, rope)
            tapped = x if depth == self.repa_depth else tapped
        v = self.to_pixels(layer_norm(x)).transpose(1, 2).unflatten(2, grid)
        return F.pixel_shuffle(v, self.patch), tapped.transpose(1, 2).unflatten(2, grid)


class RepaHead(nn.Module):
    """Predicts DINOv2 patch features from diffusion patches, in training only. Sec. 4."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        hidden = config.repa_hidden
        self.layers = nn.Sequential(nn.Linear(config.diffusion_width, hidden), nn.SiLU(),
                                    nn.Linear(hidden, hidden), nn.SiLU(),
                                    nn.Linear(hidden, config.repa_dim))

    def forward(self, patches: Tensor) -> Tensor:
        """patches: (B, D, H/8, W/8) -> features (B, H/16 * W/16, repa_dim)."""
        return self.layers(F.avg_pool2d(patches, 2).flatten(2).transpose(1, 2))


class TrainOutput(NamedTuple):
    flow_loss: Tensor      # () Eq. 2 over sigma^2
    vq_loss: Tensor        # () mean over the tokens up to the end of each image's group
    images: Tensor         # (B, 3, H, W) predicted images, in [-1, 1] if perfect
    repa: Tensor | None    # (B, H/16 * W/16, repa_dim) predicted DINOv2 features; None without head
    tokens: Tensor         # (B, N) int64
    z: Tensor              # (B, N, 8) encoder outputs before quantization, without gradient


class Tokenizer(nn.Module):
    """The whole sequential diffusion tokenizer (Sec. 3.1): `encode`, `decode`, `stream`; and its
    training rule, `forward`."""

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
        z = self.encoder(images)                                             # (B, N, 8)
        quantized = self.quantizer(z)
        cond = self.decoder(quantized.codes)                                 # (B, N, D)
        cond = cond.unflatten(1, (config.num_groups, -1))                    # (B, K, N/K, D)
        cond = cond[torch.arange(len(u), device=u.device), group]            # (B, N/K, D)

        x1 = config.sigma * images
        xt = interpolate(x1, noise, t)                                       # (B, 3, H, W)
        v, patches = self.diffusion(xt, t, cond)
        flow_loss = (v.float() - (x1 - noise)).pow(2).mean() / config.sigma ** 2

        # Only tokens up to the end of the chosen group had a say in this image's velocity.
        seen = (group + 1) * (config.num_tokens // config.num_groups)        # (B,)
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
        size = self.config.num_tokens // self.config.num_groups
        group = cond[:, step.group * size:(step.group + 1) * size]           # (B, N/K, D)
        return self.diffusion(x, x.new_full((1,), step.t), group)[0].float()

    def start(self, batch: int, noise: Tensor | None, solver: str) -> Tensor:
        """Checked starting point x_0 (B, 3, H, W) of a sampler; fresh noise where none is given."""
        if solver not in ("adams2", "euler"):
            raise ValueError(f"solver must be adams2 or euler, got {solver!r}")
        size = self.config.image_size
        if noise is None:
            return torch.randn(batch, 3, size, size, device=self.quantizer.codebook.device)
        if noise.ndim != 4 or noise.shape[:2] != (batch, 3):
            raise ValueError(f"noise must be ({batch}, 3, H, W), got {tuple(noise.shape)}")
        return noise

    @torch.no_grad()
    def decode(self, tokens: Tensor, noise: Tensor | None = None, steps: int | None = None,
               solver: str = "adams2", groups: int | None = None) -> Tensor:
        """Images (B, 3, H, W), in [-1, 1] up to overshoot, of tokens (B, n) int64.

        noise: (B, 3, H, W) starting point, standard normal; None draws one. steps: denoising steps,
        default K (or the config's num_steps). solver: "adams2" or "euler". groups: read only the
        tokens of the first `groups` groups, whose last step jumps to t = 1; default K. n must reach
        to the end of these groups.
        Raises ValueError for other shapes or values. Sec. 4, "Sampling".
        """
        config = self.config
        steps = config.num_steps or config.num_groups if steps is None else steps
        groups = config.num_groups if groups is None else groups
        if steps < 1 or not 1 <= groups <= config.num_groups:
            raise ValueError(f"need steps >= 1 and 1 <= groups <= {config.num_groups}, "
                             f"got steps {steps}, groups {groups}")
        length = groups * config.num_tokens // config.num_groups
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
        (B, 3, H, W): the image that the velocity points at. The last one, after all K groups or the
        first `groups`, is the image that `decode` with steps = K gives. A preview costs no network
        call. Sec. 3.3.
        """
        config, count = self.config, self.config.num_groups
        schedule = sampling_schedule(count, count, config.beta, groups or count)
        tokens, x, v_before = None, None, None
        for step, group in zip(schedule, token_groups):
            if group.ndim != 2 or group.shape[1] != config.num_tokens // count:
                raise ValueError(f"a group must be (B, {config.num_tokens // count}), "
                                 f"got {tuple(group.shape)}")
            tokens = group if tokens is None else torch.cat([tokens, group], 1)      # (B, n)
            x = self.start(len(tokens), noise, solver) if x is None else x
            v = self.velocity(x, step, self.condition(tokens))
            preview = jump(x, v, x.new_full((len(x),), step.t))
            x, v_before = solver_step(x, v, v_before, step, solver), v
            yield (x if step is schedule[-1] else preview) / config.sigma


# ---- Pixels and files ----------------------------------------------------------------------------

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@contextlib.contextmanager
def reading(path: str):
    """Turns what goes wrong inside into a FileNotFoundError or ValueError that names the file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no image at {path}")
    try:
        yield
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, bombs, ...
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as an image ({reason})") from None


def open_image(path: str) -> Image.Image:
    """The image in a file, not decoded yet. Raises FileNotFoundError and ValueError."""
    with reading(path):
        image = Image.open(path)
        if max(image.size) > 50 * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels")
        return image


def read_image(path: str, size: int) -> Image.Image:
    """The image in a file in RGB; a JPEG more than twice as large as `size` pixels is decoded at a
    fraction. EXIF turns are ignored, as is custom on ImageNet. Raises FileNotFoundError and
    ValueError."""
    image = open_image(path)
    with reading(path):
        image.draft("RGB", (2 * size,) * 2)
        if image.mode.startswith("I"):  # 16 bits a pixel
            image = Image.fromarray((np.array(image) / 256).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1] of a Pillow image of any mode."""
    pixels = np.array(image.convert("RGB"), dtype=np.float32)                # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8 of images (B, 3, H, W) in [-1, 1], rounded as ADM's samples are."""
    pixels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def psnr(decoded: Tensor, images: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of decoded images (B, 3, H, W) in [-1, 1], clipped."""
    error = (decoded.clamp(-1, 1) - images).pow(2).mean((1, 2, 3)) / 4       # pixels in [0, 1]
    return (-10 * error.log10()).mean().item()


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Resizes so that the shorter side is `size` pixels, as ADM does: boxes, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)),
                        Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centred square of size x size pixels, the shorter side resized to `size`. ADM's crop."""
    image = resize_shorter(image.convert("RGB"), size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """One picture of images (B, 3, H, W) in rows of `columns`, 2 pixels apart on white; images
    narrower than 64 pixels are enlarged by a whole factor that keeps them within 64."""
    zoom = max(1, 64 // images.shape[-1])
    pixels = to_uint8(images).repeat(zoom, 1).repeat(zoom, 2)                # (B, H, W, 3)
    count, height, width = pixels.shape[:3]
    rows = -(-count // columns)
    grid = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        grid[top:top + height, left:left + width] = picture
    return Image.fromarray(grid)


def save_checkpoint(path: str, checkpoint: dict):
    """Writes a dict of tensors and plain Python, so that `path` always holds a whole checkpoint;
    the one that it held moves to `path`.previous, unless it was damaged. Raises ValueError, on a
    full disk say."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise ValueError(f"{path} could not be written ({' '.join(str(error).split())}); what was "
                         "saved before is whole") from None
    if os.path.exists(path) and zipfile.is_zipfile(path):  # else truncated
        os.replace(path, path + ".previous")
    os.replace(path + ".tmp", path)


def make_parts(folder: str, count: int, size: int, settings: dict,
               make: Callable[[list[list[int]]], Iterator[np.ndarray]], rate: Callable[[int], str]):
    """Makes rows 0 ... count - 1 of an array that takes long, `size` rows a file in `folder`, so
    that it goes on where it was killed. Each process takes a share; all return when all files are
    there.

    make(todo): yields the rows (n, ...) of each list of numbers in `todo`, one after another.
    rate(n): tells how fast n rows were made. Raises ValueError where the folder was begun with
    other `settings`.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    os.makedirs(folder, exist_ok=True)
    about, settings = os.path.join(folder, "settings.json"), {**settings, "size": size,
                                                              "count": count}
    if not os.path.exists(about):
        with open(f"{about}.{rank}", "w") as file:
            json.dump(settings, file)
        os.replace(f"{about}.{rank}", about)
    with open(about) as file:
        if json.load(file) != settings:
            raise ValueError(f"{folder} was begun with other settings; go on with the same ones, "
                             "or remove it")

    def path(first: int) -> str:
        return os.path.join(folder, f"{first:08d}.npy")

    def done() -> int:
        return sum(name.endswith(".npy") for name in os.listdir(folder))

    todo = [[*range(first, min(first + size, count))]
            for first in range(rank * size, count, world * size) if not os.path.exists(path(first))]
    wait()  # until all know their share: the first to end may remove the folder
    began, at_start, made, total = time.time(), done(), 0, -(-count // size)
    for numbers, rows in zip(todo, make(todo)):
        with open(path(numbers[0]) + ".tmp", "wb") as file:
            np.save(file, rows)
        os.replace(path(numbers[0]) + ".tmp", path(numbers[0]))
        made += len(rows)
        if rank == 0:
            now = done()
            seconds = (time.time() - began) / (now - at_start) * (total - now)
            print(f"{min(now * size, count):,} of {count:,} images, {rate(made)}, "
                  f"{seconds / 60:.1f} min left", flush=True)
    wait()


def read_parts(folder: str) -> Iterator[np.ndarray]:
    """The rows that `make_parts` wrote, file by file."""
    for name in sorted(os.listdir(folder)):
        if name.endswith(".npy"):
            yield np.load(os.path.join(folder, name))


def write_array(file, parts: Iterable[np.ndarray], count: int):
    """Writes parts (n, ...) as one .npy array (count, ...), holding one part at a time."""
    for i, part in enumerate(parts):
        if i == 0:
            np.lib.format.write_array_header_1_0(file, {
                "descr": part.dtype.str, "fortran_order": False, "shape": (count, *part.shape[1:])})
        file.write(part.tobytes())


class _ReleasedSettings:
    """Stands for the class config_util.Config of the authors' files; its plain dict is `_data`."""


def read_file(path: str, device="cpu") -> dict:
    """The dict in a checkpoint of ours or the authors', its tensors on `device`. Nothing is
    unpickled but tensors, plain data and the authors' two classes of settings. Raises
    FileNotFoundError and ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    allowed = [argparse.Namespace, (_ReleasedSettings, "config_util.Config")]
    try:
        with torch.serialization.safe_globals(allowed):
            saved = torch.load(path, device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds: truncated, not a zip, other objects
        found = re.search(r"(?:GLOBAL |class )([\w.]+)", str(error))
        reason = f"it holds an object of {found[1]}" if found else "truncated, or another format"
        raise ValueError(f"{path} is no readable checkpoint: {reason}") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is no checkpoint: it holds no dict")
    return saved


def load_checkpoint(path: str, kind: str, device="cpu") -> dict:
    """The dict that `save_checkpoint` wrote. kind: "tokenizer" or "ar". Raises as `read_file`."""
    saved = read_file(path, device)
    if saved.get("kind") != kind:
        raise ValueError(f"{path} is not a checkpoint of kind {kind!r} "
                         f"(found: {saved.get('kind')!r})")
    return saved


def load_last(path: str, kind: str, device="cpu") -> dict | None:
    """The checkpoint at `path` or, where that is missing or cannot be read, the one saved before
    it; None where there is neither. Raises ValueError where none of them can be read."""
    paths = [name for name in (path, path + ".previous") if os.path.exists(name)]
    for name in paths:
        try:
            return load_checkpoint(name, kind, device)
        except ValueError as error:
            if name == paths[-1]:
                raise
            print(f"{error}; going on from {paths[-1]}", flush=True)
    return None


def build_config(cls, values: dict, source: str):
    """A config dataclass from saved values; raises a ValueError that names unknown ones."""
    unknown = set(values) - {field.name for field in fields(cls)}
    if unknown:
        raise ValueError(f"{source}: this code has no setting {', '.join(sorted(unknown))}")
    return cls(**values)


def pack_tokenizer(model: Tokenizer) -> dict:
    """What a checkpoint needs to rebuild a tokenizer."""
    return {"kind": "tokenizer", "config": asdict(model.config), "model": model.state_dict()}


def load_tokenizer(path: str, device="cpu") -> Tokenizer:
    """The tokenizer in a checkpoint of train_tokenizer.py or train_ar.py, or in one of the authors'
    files (D-AR-tokenizer_v1.pt, bare state dicts); with averaged weights where there are any, in
    eval mode. Raises FileNotFoundError and ValueError, which lists the tensors that do not fit."""
    saved = read_file(path)
    if "kind" in saved:
        packed = saved.get("tokenizer", saved)
        config = build_config(TokenizerConfig, packed["config"], path)
        weights = packed.get("ema") or packed["model"]
    else:
        weights = translate(saved, path)
        config = released_config(saved, weights, path)
    model = Tokenizer(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # missing, surplus and misshapen tensors
        raise ValueError(f"{path} does not fit: {' '.join(str(error).split())}") from None
    return model.eval().to(device)


# ---- The authors' files --------------------------------------------------------------------------

RELEASED_NAMES = (  # a tensor's name in the authors' files -> ours: these replacements, in order
    ("encoder_layers.", "encoder.blocks."), ("patchify.", "encoder.from_pixels."),
    ("query_embedding.weight", "encoder.query_table"), ("query_linear.", "encoder.query_up."),
    ("quant_in_conv.", "encoder.to_code."), ("quantize.embedding.weight", "quantizer.codebook"),
    ("quant_out_conv.", "decoder.from_code."), ("decoder_embedding.weight", "decoder.positions"),
    ("decoder_layers.", "decoder.blocks."), ("diff_decoder.net.repa_out.", "repa_head.layers."),
    ("diff_decoder.net.cond_mlp.", "diffusion.from_cond."),
    ("diff_decoder.net.conv_in.", "diffusion.from_pixels."),
    ("diff_decoder.net.conv_out.", "diffusion.to_pixels."),
    ("diff_decoder.net.blocks.", "diffusion.blocks."), (".cross_attn.", ".cross_attention."),
    (".proj.", ".out."), (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.2."),
    (".time_embed.mlp.", ".time_mlp."), (".cond_embed.", ".cond_mlp."),
    (".adaLN_modulation.1.", ".modulation."))


RELEASED_SETTINGS = {  # our field: its name in the authors' configuration
    "image_size": "sampling_resolution", "num_tokens": "num_all_queries",
    "num_groups": "num_query_groups", "num_steps": "num_denoising_steps",
    "codebook_size": "vq_codebook_size", "code_dim": "vq_dim", "patch_size": "encoder_patch_size",
    "encoder_width": "encoder_dim", "encoder_depth": "num_encoder_layers",
    "decoder_width": "decoder_dim", "decoder_depth": "num_decoder_layers",
    "diffusion_width": "diff_decoder.dim", "diffusion_depth": "diff_decoder.depth",
    "diffusion_patch": "diff_decoder.patch_size", "sigma": "diff_decoder.data_std",
    "beta": "diff_decoder.time_shift", "repa_depth": "diff_decoder.repa_layer"}

RELEASED_FIXED = {  # settings of theirs that have one value here
    "vq_enable": True, "query_low_rank": True, "rope_base_len": 10000, "output_resolution": 0,
    "diff_decoder.in_dim": 3, "diff_decoder.out_dim": 3, "diff_decoder.mlp_head": False,
    "diff_decoder.share_time_encoding": False, "diff_decoder.rope_base_len": 10000}

RELEASED_SHAPES = {  # our field: a tensor, and its axis of that size
    "codebook_size": ("quantizer.codebook", 0), "code_dim": ("quantizer.codebook", 1),
    "encoder_width": ("encoder.query_up.weight", 0), "query_rank": ("encoder.query_table", 1),
    "max_tokens": ("encoder.query_table", 0), "decoder_width": ("decoder.from_code.weight", 0),
    "diffusion_width": ("diffusion.from_pixels.weight", 0),
    "head_dim": ("diffusion.blocks.0.attention.q_norm.weight", 0),
    "repa_hidden": ("repa_head.layers.0.weight", 0), "repa_dim": ("repa_head.layers.4.weight", 0)}


def translate(saved: dict, source: str) -> dict:
    """The weights in one of the authors' files under our names; 1 x 1 and patch convolutions become
    linear layers. The averaged ones (`ema`) come first."""
    keys = [key for key in ("ema", "model", "module", "state_dict") if saved.get(key)]
    weights = {}
    for name, value in (saved[keys[0]] if keys else saved).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{source} holds no weights: {name} is no tensor")
        name = name.replace("_orig_mod.", "").removeprefix("module.")
        if name == "tok_embeddings.weight":
            raise ValueError(f"{source} holds an autoregressive model, not a tokenizer; give "
                             "--tokenizer FILE")
        if value.ndim == 4 and (name == "patchify.weight" or value.shape[2:] == (1, 1)):
            value = value.flatten(1)
        for theirs, ours in RELEASED_NAMES:
            name = name.replace(theirs, ours)
        if name in weights:
            raise ValueError(f"{source} holds {name} twice")
        weights[name] = value
    weights.pop("quantize.codebook_used", None)  # a counter of training
    return weights


def released_config(saved: dict, weights: dict, source: str) -> TokenizerConfig:
    """The architecture of translated weights: from the settings in the file, else from the tensors'
    shapes, else the released model's. Refuses by name the settings that this code cannot honour."""
    def plain(value) -> dict:  # of a dict, a namespace, the authors' Config or None
        value = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        return value.get("_data", value)

    settings = plain(saved.get("config"))
    settings = dict(settings.get("model", settings))
    inner = plain(settings.pop("diff_decoder", None))
    settings.update({f"diff_decoder.{name}": value for name, value in inner.items()})
    for name, value in settings.items():
        other = {"queries_per_step", "diff_decoder.cond_dim", "diff_decoder.cfg",
                 "diff_decoder.grad_checkpointing"}
        if name not in {*RELEASED_SETTINGS.values(), *RELEASED_FIXED, *other}:
            raise ValueError(f"{source}: the setting {name} = {value!r} is not supported")
        if value != RELEASED_FIXED.get(name, value):
            raise ValueError(f"{source}: the setting {name} = {value!r} is not supported, only "
                             f"{RELEASED_FIXED[name]!r}")

    fields = {"image_size": plain(saved.get("args")).get("image_size", 256)}
    for field, (name, axis) in RELEASED_SHAPES.items():
        if name in weights and weights[name].ndim > axis:
            fields[field] = weights[name].shape[axis]
    for field, part in (("patch_size", "encoder"), ("diffusion_patch", "diffusion")):
        if f"{part}.from_pixels.weight" in weights:
            fields[field] = math.isqrt(weights[f"{part}.from_pixels.weight"].shape[-1] // 3)
    for field, part in (("encoder_depth", "encoder"), ("decoder_depth", "decoder"),
                        ("diffusion_depth", "diffusion")):
        fields[field] = len({name.split(".")[2] for name in weights
                             if name.startswith(f"{part}.blocks.")})
    if inner:  # the release's own defaults where its configuration is silent
        fields.update(sigma=1.0, beta=1.0)
    fields.update({field: settings[name] for field, name in RELEASED_SETTINGS.items()
                   if name in settings})
    # A head that no block follows is kept by no model of ours; only training reads it.
    fields["repa_depth"] = min(fields.get("repa_depth", 8), max(fields["diffusion_depth"] - 1, 0))
    if "repa_head.layers.0.weight" not in weights:
        fields["repa_depth"] = 0
    if fields["repa_depth"] == 0:
        for name in [name for name in weights if name.startswith("repa_head.")]:
            del weights[name]
    try:
        config = TokenizerConfig(**fields)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{source}: {error}") from None
    derived = {"queries_per_step": config.num_tokens // config.num_groups,
               "diff_decoder.cond_dim": config.decoder_width}
    for name, value in derived.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{source}: the setting {name} = {settings[name]!r} is not supported, "
                             f"only {value}")
    return config


# ---- Random numbers ------------------------------------------------------------------------------

def seed_of(*numbers: int) -> int:
    """A seed that is a function of the numbers: (seed, purpose, step), say."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seeded(*numbers: int, device="cpu") -> torch.Generator:
    """A random generator that is a function of the numbers."""
    return torch.Generator(device).manual_seed(seed_of(*numbers))


def noise_of(seed: int, purpose: int, numbers: Iterable[int], shape: tuple, device) -> Tensor:
    """Standard normal noise (n, *shape), row i a function of (seed, purpose, numbers[i])."""
    return torch.stack([torch.randn(shape, device=device, generator=seeded(seed, purpose, number,
                                                                           device=device))
                        for number in numbers])


# ---- Scripts and processes -----------------------------------------------------------------------

def join_processes() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of this process, started by torchrun or plain python."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    # Processes wait for one another when one has done its share of the tokens long before.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size(), device


def wait():
    """Until all processes are here, where there are several."""
    if dist.is_initialized():
        dist.barrier()


def peak_memory() -> float:
    """The most memory in GB that this process has held, on its GPU if it uses one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def count_flops(call: Callable) -> int:
    """Floating-point operations of a call, which runs twice: the attention's biases cannot be made
    under the counter."""
    call()
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def run(main):
    """Calls a script's main; a user's mistake ends it with one line, and so does Ctrl-C."""
    name = os.path.basename(sys.argv[0])
    try:
        main()
    except (ValueError, OSError) as error:
        # The last line: an error in a data loader's process arrives with a traceback before it.
        sys.exit(f"{name}: {(str(error).splitlines() or [repr(error)])[-1]}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped; the same command goes on from what was saved")
