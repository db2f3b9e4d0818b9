"""FID, sFID, Inception Score, precision and recall by the protocol of ADM's evaluation suite
(guided-diffusion, evaluations/evaluator.py), the one that papers quote, without TensorFlow.

    python fid.py REFERENCE SAMPLES [--weights FILE] [--json FILE]    CUDA where there is one
    torchrun --nproc_per_node=8 fid.py REFERENCE SAMPLES              the same figures, sooner
    python fid.py IMAGES --save-stats FILE                            a REFERENCE for later

Each is a folder of PNGs (sub-folders included, sorted by path), an npz of uint8 images arr_0
(N, H, W, 3), or an npz of statistics mu, sigma, mu_s, sigma_s. A REFERENCE of both, as ADM's are,
gives its statistics to FID and sFID, its images to precision and recall. For reconstructions,
REFERENCE is the *same centre-cropped* images, neither the uncropped files nor ADM's statistics.

    images (B, H, W, 3) -> InceptionV3 -> pool (B, 2048), spatial (B, 2023), probs (B, 1008)
    pool, spatial -> Statistics -> frechet_distance: FID, sFID
    probs -> inception_score          pool -> precision_recall

B is a batch, N and M images, D features. Gold run, for whoever has the two files of ADM:
VIRTUAL_imagenet256_labeled.npz against admnet_guided_upsampled_imagenet256.npz gives FID 3.9426,
sFID 6.1404, IS 215.84, precision .8265, recall .5309 in TensorFlow; a good port is within .005,
.01, .3, .003, .003. Only figures of 50,000 samples compare with published ones.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import eigvalsh, lapack
from torch import Tensor, nn

POOL, SPATIAL, CLASSES = 2048, 2023, 1008  # widths of what the network returns
CHUNK = 10_000_000  # distances at a time, 80 MB
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # names in a file: of pool, of spatial features
WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
           "pt_inception-2015-12-05-6726825d.pth")


class Features(NamedTuple):
    pool: Tensor       # (B, 2048) pool3
    spatial: Tensor    # (B, 2023) = 17 x 17 x 7, in height, width, channel order
    probs: Tensor      # (B, 1008) class probabilities, without the bias


class Moments(NamedTuple):
    mu: np.ndarray       # (D,) float64
    sigma: np.ndarray    # (D, D) float64, unbiased covariance


class InceptionScore(NamedTuple):
    mean: float    # over splits
    std: float


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


# ---- The network ---------------------------------------------------------------------------------

def conv(inner: int, outer: int, kernel, stride: int = 1, padding: str = "same") -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(inner, outer, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(outer, eps=1e-3), relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Layers {name: (source, width, kernel[, stride, padding])}. A source is the input "x", "pool"
    of it, or a layer; what is no layer's source is joined along channels."""

    def __init__(self, inner: int, pool: nn.Module, layers: dict[str, tuple]):
        super().__init__()
        self.pool, self.layers, width = pool, layers, {"x": inner, "pool": inner}
        for name, (source, width[name], *shape) in layers.items():
            self.add_module(name, conv(width[source], width[name], *shape))

    def forward(self, x: Tensor) -> Tensor:
        y = {"x": x, "pool": self.pool(x)}
        for name, (source, *_) in self.layers.items():
            y[name] = self.get_submodule(name)(y[source])
        sources = {"x", *(source for source, *_ in self.layers.values())}
        return torch.cat([y[name] for name in (*self.layers, "pool") if name not in sources], 1)


MEAN, SHRINK = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 2)
ROW, COLUMN, HALVE = (1, 7), (7, 1), (3, 2, "valid")


def mixed_35(inner: int, pooled: int) -> Mixed:
    return Mixed(inner, MEAN, {
        "branch1x1": ("x", 64, 1),
        "branch5x5_1": ("x", 48, 1), "branch5x5_2": ("branch5x5_1", 64, 5),
        "branch3x3dbl_1": ("x", 64, 1), "branch3x3dbl_2": ("branch3x3dbl_1", 96, 3),
        "branch3x3dbl_3": ("branch3x3dbl_2", 96, 3), "branch_pool": ("pool", pooled, 1)})


def mixed_17(width: int) -> Mixed:
    return Mixed(768, MEAN, {
        "branch1x1": ("x", 192, 1), "branch7x7_1": ("x", width, 1),
        "branch7x7_2": ("branch7x7_1", width, ROW), "branch7x7_3": ("branch7x7_2", 192, COLUMN),
        "branch7x7dbl_1": ("x", width, 1), "branch7x7dbl_2": ("branch7x7dbl_1", width, COLUMN),
        "branch7x7dbl_3": ("branch7x7dbl_2", width, ROW),
        "branch7x7dbl_4": ("branch7x7dbl_3", width, COLUMN),
        "branch7x7dbl_5": ("branch7x7dbl_4", 192, ROW), "branch_pool": ("pool", 192, 1)})


def mixed_8(inner: int, pool: nn.Module) -> Mixed:
    return Mixed(inner, pool, {
        "branch1x1": ("x", 320, 1), "branch3x3_1": ("x", 384, 1),
        "branch3x3_2a": ("branch3x3_1", 384, (1, 3)), "branch3x3_2b": ("branch3x3_1", 384, (3, 1)),
        "branch3x3dbl_1": ("x", 448, 1), "branch3x3dbl_2": ("branch3x3dbl_1", 384, 3),
        "branch3x3dbl_3a": ("branch3x3dbl_2", 384, (1, 3)),
        "branch3x3dbl_3b": ("branch3x3dbl_2", 384, (3, 1)), "branch_pool": ("pool", 192, 1)})


def resize(images: Tensor, size: int = 299) -> Tensor:
    """(B, C, size, size) of images (B, C, H, W) float32 by TensorFlow 1's bilinear rule: pixel i
    comes from i * H / size, without half-pixel offset or antialias."""
    for axis in (3, 2):
        length = images.shape[axis]
        source = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
        low = source.long()
        weight = (source - low).view(-1, *[1] * (3 - axis))
        before = images.index_select(axis, low)
        after = images.index_select(axis, (low + 1).clamp(max=length - 1))
        images = before + (after - before) * weight
    return images


class InceptionV3(nn.Module):
    """The Inception graph of 2015, under the module names of its public PyTorch conversion. Unlike
    torchvision's, average pools leave the padding out and the last block pools by maximum."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv(3, 32, *HALVE)
        self.Conv2d_2a_3x3 = conv(32, 32, 3, 1, "valid")
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, 1, "valid")
        self.Mixed_5b = mixed_35(192, 32)
        self.Mixed_5c, self.Mixed_5d = mixed_35(256, 64), mixed_35(288, 64)
        self.Mixed_6a = Mixed(288, SHRINK, {
            "branch3x3": ("x", 384, *HALVE), "branch3x3dbl_1": ("x", 64, 1),
            "branch3x3dbl_2": ("branch3x3dbl_1", 96, 3),
            "branch3x3dbl_3": ("branch3x3dbl_2", 96, *HALVE)})
        self.Mixed_6b, self.Mixed_6c = mixed_17(128), mixed_17(160)
        self.Mixed_6d, self.Mixed_6e = mixed_17(160), mixed_17(192)
        self.Mixed_7a = Mixed(768, SHRINK, {
            "branch3x3_1": ("x", 192, 1), "branch3x3_2": ("branch3x3_1", 320, *HALVE),
            "branch7x7x3_1": ("x", 192, 1), "branch7x7x3_2": ("branch7x7x3_1", 192, ROW),
            "branch7x7x3_3": ("branch7x7x3_2", 192, COLUMN),
            "branch7x7x3_4": ("branch7x7x3_3", 192, *HALVE)})
        self.Mixed_7b, self.Mixed_7c = mixed_8(1280, MEAN), mixed_8(2048, nn.MaxPool2d(3, 1, 1))
        self.fc = nn.Linear(2048, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        """images: uint8 (B, H, W, 3), any H and W; else ValueError. In float32, never in TF32."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError("images must be uint8 (B, H, W, 3); got "
                             f"{images.dtype} {tuple(images.shape)}")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = (resize(images.permute(0, 3, 1, 2).float()) - 128) / 128     # (B, 3, 299, 299)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
            x = self.Mixed_5b(F.max_pool2d(x, 3, 2))                         # (B, 256, 35, 35)
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(x)))               # (B, 768, 17, 17)
            x = self.Mixed_6c(self.Mixed_6b(x))
            spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1)  # (B, 17, 17, 7)
            x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))               # (B, 1280, 8, 8)
            pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))              # (B, 2048)
        return Features(pool, spatial.flatten(1), self.classify(pool))

    def classify(self, pool: Tensor) -> Tensor:
        """Class probabilities (B, 1008) of pool (B, 2048). Like ADM's, without the bias."""
        return F.linear(pool, self.fc.weight).softmax(1)


def load_inception(path: str | None = None) -> InceptionV3:
    """The network with the weights in file `path`; None: in torch.hub's cache, downloaded once. 8
    hex digits at the end of the name (-6726825d.pth) must be the first of the file's sha256; other
    names are not checked. Raises FileNotFoundError and ValueError."""
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(WEIGHTS))
    if path is None and not os.path.exists(cached):
        with contextlib.suppress(OSError):  # without network, the next error says what to do
            os.makedirs(os.path.dirname(cached), exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS, cached)
    path = path or cached
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no Inception weights at {path}; fetch {WEIGHTS} and put them "
                                "there, or give their place by --weights FILE")
    network, digits = InceptionV3(), re.search(r"-([0-9a-f]{8})\.pth$", path)
    with about(path), open(path, "rb") as file:
        if digits and not hashlib.sha256(file.read()).hexdigest().startswith(digits[1]):
            raise ValueError(f"damaged: its sha256 is not as its name says; fetch {WEIGHTS} again")
        network.load_state_dict(torch.load(path, "cpu", weights_only=True))
    return network


# ---- Activations -> statistics -> distance -------------------------------------------------------

def sum_processes(*tensors: Tensor):
    """Replaces tensors by their sums over the processes of torchrun."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


class Statistics:
    """Mean and covariance of rows that come in batches, by the float64 sums n, x and x x^T: any
    split into batches and processes gives the same."""

    def __init__(self, width: int, device="cpu"):
        self.n, self.x, self.xx = (torch.zeros(shape, dtype=torch.float64, device=device)
                                   for shape in ((), (width,), (width, width)))

    def add(self, rows: Tensor):
        """rows: (B, D)."""
        rows = rows.double()
        self.n += len(rows)
        self.x += rows.sum(0)
        self.xx.addmm_(rows.T, rows)

    def moments(self) -> Moments:
        """Of the rows of all processes. Raises ValueError for fewer than 2."""
        n, x, xx = (tensor.clone() for tensor in (self.n, self.x, self.xx))
        sum_processes(n, x, xx)
        if n < 2:
            raise ValueError(f"a covariance needs 2 images or more; got {int(n)}")
        sigma = (xx - torch.outer(x, x) / n) / (n - 1)
        return Moments((x / n).cpu().numpy(), sigma.cpu().numpy())


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2), in float64. With any A
    for which A A^T = sigma1, the last trace is the sum of the roots of the eigenvalues of
    A^T sigma2 A. Pivoted Cholesky finds an A fastest, of as many columns as sigma1 has rank."""
    lower, order, rank, _ = lapack.dpstrf(sigma1, lower=1)
    a = np.zeros((len(lower), rank))
    a[order - 1] = np.tril(lower)[:, :rank]
    trace = np.sqrt(eigvalsh(a.T @ sigma2 @ a).clip(0)).sum() if rank else 0.0
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)


def inception_score(probs: Tensor, split_size: int = 5000) -> InceptionScore:
    """exp of the mean KL divergence of class probabilities (N, C) from their mean, over splits in
    file order; the last split may be shorter."""
    scores = []
    for part in probs.split(split_size):
        p, mean = part.double(), part.double().mean(0)
        divergence = torch.xlogy(p, p).sum(1).mean() - torch.xlogy(mean, mean).sum()
        scores.append(divergence.exp().item())
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Squared distances from rows of a (N, D) to all of b (M, D), in float64 chunks of 80 MB."""
    b = b.double()
    b_squared = b.square().sum(1)
    for part in a.split(max(1, CHUNK // len(b))):
        part = part.double()
        squares = part.square().sum(1, keepdim=True) + b_squared             # (rows, M)
        chunk = torch.addmm(squares, part, b.T, alpha=-2)
        yield chunk.masked_fill_(chunk < 1e-12 * squares, 0)  # equal rows, but for rounding


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> PrecisionRecall:
    """The share of `generated` (M, D) in the balls around `reference` (N, D), and the reverse. A
    ball reaches to its centre's k-th nearest other point. Raises ValueError for k points or less.
    """
    def covered(points: Tensor, centres: Tensor) -> float:
        radii = torch.cat([chunk.topk(k + 1, largest=False).values[:, k]  # [:, 0] is the centre
                           for chunk in distances(centres, centres)])
        inside = [(chunk <= radii).any(1) for chunk in distances(points, centres)]
        return torch.cat(inside).double().mean().item()

    if min(len(reference), len(generated)) <= k:
        raise ValueError(f"precision and recall need {k + 1} images or more on each side")
    return PrecisionRecall(covered(generated, reference), covered(reference, generated))


# ---- Files ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def about(path: str):
    """Whatever goes wrong in reading `path`, as a ValueError that begins with it: Pillow, zipfile
    and torch raise many kinds for damaged files."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: {text or type(error).__name__}") from None


def warn(text: str):
    """Prints a warning, in the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", flush=True)


def write(path: str, save):
    """save(file), under a temporary name, then renamed: `path` always holds a whole file."""
    with open(path + ".tmp", "wb") as file:
        save(file)
    os.replace(path + ".tmp", path)


class Side:
    """REFERENCE or SAMPLES, checked as far as headers tell; no image is decoded yet. Raises
    FileNotFoundError, and ValueErrors that name the file at fault."""

    def __init__(self, path: str):
        self.path, self.paths = path, []     # the latter: images, if path is a folder
        self.count, self.size = 0, None      # number of images; their (height, width)
        self.statistics = {}                 # by the names above: path's own, else `measure`'s
        self.features = None                 # pool features (count, 2048), from `measure`
        if not os.path.exists(path):
            raise FileNotFoundError(f"no file or folder {path}")
        if os.path.isdir(path):
            self.open_folder()
        else:
            with about(path):
                self.open_npz()
        if self.count == 1 or not self.count and not self.statistics:
            raise ValueError(f"{path}: {self.count} images (PNG, RGB), but 2 are the least")

    def open_folder(self):
        self.paths = sorted(os.path.join(folder, name)
                            for folder, _, names in os.walk(self.path, followlinks=True)
                            for name in names if name.lower().endswith((".png", ".jpg", ".jpeg")))
        self.count, formats, self.pool = len(self.paths), set(), ThreadPoolExecutor()
        for path in self.paths:
            with about(path), Image.open(path) as image:
                self.size = self.size or image.size[::-1]
                if image.mode != "RGB" or image.size[::-1] != self.size:
                    raise ValueError(f"{image.mode}, height and width {image.size[::-1]}; all must "
                                     f"be 8-bit RGB of one size, {self.size} as {self.paths[0]}")
                formats.add(image.format)
        if "JPEG" in formats:
            warn(f"{self.path} holds JPEGs, whose compression changes the figures")

    def open_npz(self):
        self.file = zipfile.ZipFile(self.path)
        names = [name.removesuffix(".npy") for name in self.file.namelist()]
        held = [name for name in STATISTICS if name in names]
        if len(held) not in (0, 4) or not held and "arr_0" not in names:
            raise ValueError(f"needs images arr_0 or statistics {', '.join(STATISTICS)}; it holds "
                             f"{', '.join(names)}")
        if held:
            with np.load(self.path) as file:  # never unpickles
                self.statistics = {name: file[name].astype(np.float64) for name in STATISTICS}
            shapes = [array.shape for array in self.statistics.values()]
            if (shapes != [(POOL,), (POOL, POOL), (SPATIAL,), (SPATIAL, SPATIAL)]
                    or not all(np.isfinite(array).all() for array in self.statistics.values())):
                raise ValueError(f"not finite, or of another network: statistics of {shapes}")
        if "arr_0" in names:
            self.member = self.file.open("arr_0.npy")
            if np.lib.format.read_magic(self.member) != (1, 0):
                raise ValueError("arr_0 must be an array in version 1.0 of NumPy's format")
            shape, in_columns, kind = np.lib.format.read_array_header_1_0(self.member)
            self.start, self.count, self.size = self.member.tell(), shape[0], shape[1:3]
            if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or in_columns:
                raise ValueError(f"arr_0 must be uint8 (N, H, W, 3); it is {kind} {shape}")

    def read(self, first: int, last: int) -> np.ndarray:
        """Images first ... last - 1, uint8 (B, H, W, 3); no others are in memory. An npz is read
        fastest from its beginning to its end."""
        def decode(path: str) -> np.ndarray:
            with about(path), Image.open(path) as image:
                return np.array(image)                                       # (H, W, 3)

        if self.paths:
            return np.stack(list(self.pool.map(decode, self.paths[first:last])))
        images = np.empty((last - first, *self.size, 3), np.uint8)
        with about(self.path):
            self.member.seek(self.start + first * images[:1].size)
            if self.member.readinto(images.reshape(-1)) < images.size:
                raise EOFError("arr_0 ends too early")
        return images


# ---- The program ---------------------------------------------------------------------------------

@torch.no_grad()
def measure(network: InceptionV3, side: Side, batch: int, rank: int, world: int, device):
    """Fills in the features of a side and, if it has none, the statistics. Each process passes its
    share of the images through the network; afterwards all know the whole."""
    pool, spatial = Statistics(POOL, device), Statistics(SPATIAL, device)
    side.features = torch.zeros(side.count, POOL, device=device)
    first, last = side.count * rank // world, side.count * (rank + 1) // world
    began = shown = time.time()
    for start in range(first, last, batch):
        end = min(start + batch, last)
        seen = network(torch.from_numpy(side.read(start, end)).to(device))
        pool.add(seen.pool)
        spatial.add(seen.spatial)
        side.features[start:end] = seen.pool
        if rank == 0 and (end == last or time.time() > shown + 10):
            shown = time.time()
            print(f"{side.path}: {end:,} of {last:,} images{' in each process' * (world > 1)}, "
                  f"{end * world / (shown - began):.1f} images/s", flush=True)
    sum_processes(side.features)  # until here 0 outside this process's share
    measured = dict(zip(STATISTICS, (*pool.moments(), *spatial.moments())))
    side.statistics = side.statistics or measured


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", metavar="REFERENCE", help="folder of PNGs, or npz")
    parser.add_argument("samples", metavar="SAMPLES", nargs="?", help="folder of PNGs, or npz")
    parser.add_argument("--weights", help="the network's; default: in torch.hub's cache")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--save-stats", help="file to write the statistics of one side to")
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    args = parser.parse_args(argv)
    if bool(args.samples) == bool(args.save_stats) or args.save_stats and args.json:
        raise ValueError("give REFERENCE and SAMPLES, or IMAGES and --save-stats FILE")
    if args.batch < 1:
        raise ValueError("--batch must be 1 or more")
    out = os.path.abspath(args.save_stats or args.json or "fid.json")
    if os.path.isdir(out) or not os.path.isdir(os.path.dirname(out)):
        raise ValueError(f"cannot write {out}: it is a folder, or its folder does not exist")

    # Sides
    sides = [Side(path) for path in (args.reference, args.samples) if path]
    reference, samples = sides[0], sides[-1]
    if args.save_stats and reference.statistics:
        raise ValueError(f"{reference.path} holds statistics already")
    if args.samples and samples.statistics and (samples.count or not reference.statistics):
        raise ValueError(f"{samples.path} holds statistics, as a reference does; the order is "
                         "REFERENCE SAMPLES, and samples are images")
    if samples.count < reference.count and not reference.statistics:
        warn(f"fewer samples than reference images: is {samples.path} the REFERENCE?")
    for side in sides:
        if side.count != 50_000 and not side.statistics:
            warn(f"{side.path} has {side.count:,} images; figures compare for 50,000 only"
                 + ", and mean little below 2,048" * (side.count < 2048))
    if not samples.count:
        reference.count = 0  # its images would serve precision and recall only

    # Processes and network
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=1))
    for turn in range(2):  # the first process of a node downloads what the others then find
        if samples.count and turn == (local > 0):
            network = load_inception(args.weights).to(device)
        if world > 1:
            dist.barrier()

    # Activations, statistics
    for side in sides:
        if side.count:
            measure(network, side, args.batch, rank, world, device)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    if args.save_stats:
        write(out, lambda file: np.savez(file, n=reference.count, **reference.statistics))
        print(out)
        return

    # Distances
    a, b = reference.statistics, samples.statistics
    figures = {"fid": frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"]),
               "sfid": frechet_distance(a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"])}
    if samples.count:
        score = inception_score(network.classify(samples.features))
        figures.update(inception_score=score.mean, inception_score_std=score.std)
    if min(reference.count, samples.count) > 3:
        pair = precision_recall(reference.features, samples.features)
        figures.update(precision=pair.precision, recall=pair.recall)
    else:
        warn("no Inception Score; " * (samples.count == 0)
             + "no precision and recall: they need 4 images or more on each side, and there are "
             f"{reference.count} and {samples.count}")
    for name, value in figures.items():
        print(f"{name:20} {value:.4f}")
    if args.json:
        write(out, lambda file: file.write(json.dumps(figures).encode()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"fid.py: {error}")
