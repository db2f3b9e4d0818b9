"""FID, sFID, Inception Score, precision and recall by the protocol of ADM's evaluation suite
(guided-diffusion, evaluations/evaluator.py), which papers quote; without TensorFlow.

    python fid.py REFERENCE SAMPLES [--weights FILE] [--json FILE]    CUDA where there is one
    torchrun --nproc_per_node=8 fid.py REFERENCE SAMPLES              the same figures, sooner
    python fid.py IMAGES --save-stats FILE                            makes a REFERENCE

Images are a folder of PNGs (with its sub-folders, sorted by path) or an npz of uint8 images arr_0
(N, H, W, 3). A REFERENCE may also be an npz of statistics mu, sigma, mu_s, sigma_s, or hold both,
as ADM's do: FID and sFID then use the statistics, precision and recall the images. The REFERENCE
of reconstructions is the *same centre-cropped* images, not the uncropped files, not ADM's file.

    images (B, H, W, 3) -> InceptionV3 -> pool (B, 2048), spatial (B, 2023), probs (B, 1008)
    pool, spatial -> Sums -> frechet_distance: FID, sFID
    probs -> inception_score          pool -> precision_recall

B is a batch, N and M are numbers of images, D is a number of features. Whoever has ADM's files can
check this one: VIRTUAL_imagenet256_labeled.npz against admnet_guided_upsampled_imagenet256.npz
gives FID 3.9426, sFID 6.1404, IS 215.84, precision .8265, recall .5309 in TensorFlow; a good port
is within .005, .01, .3, .003, .003. Only figures of 50,000 samples compare with published ones.
"""
import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import eigvalsh, lapack
from torch import Tensor, nn

POOL, SPATIAL, CLASSES = 2048, 2023, 1008  # widths of what the network returns
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # mean, covariance of pool; the same of spatial
CHUNK = 10_000_000  # distances at a time, 80 MB
MAX_PIXELS = 2**24  # of one image, as a small file may claim more than fits into memory
WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
           "pt_inception-2015-12-05-6726825d.pth")


class Features(NamedTuple):
    pool: Tensor       # (B, 2048) pool3
    spatial: Tensor    # (B, 2023) = 17 x 17 x 7, in height, width, channel order
    probs: Tensor      # (B, 1008) class probabilities, without the bias


class InceptionScore(NamedTuple):
    mean: float    # over splits
    std: float


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class Mistake(ValueError):
    """A user's mistake: one line, no traceback."""

    def __init__(self, text: str):
        super().__init__(" ".join(text.split()))  # a file's name may hold line breaks


# ---- The network ---------------------------------------------------------------------------------

def conv(inner: int, outer: int, kernel, stride: int = 1, padding: str = "same") -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(inner, outer, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(outer, eps=1e-3), relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """An Inception block: branches side by side, their outputs joined along channels. A branch is
    convolutions in sequence, each (width, kernel[, stride, padding]). branch_pool begins at the
    pooled input, the other branches at the input."""

    def __init__(self, inner: int, pool: nn.Module, **branches: list[tuple]):
        super().__init__()
        self.pool, self.branches = pool, {}  # the latter: names of each branch's convolutions
        for branch, layers in branches.items():
            width, self.branches[branch] = inner, []
            for i, (outer, *shape) in enumerate(layers, 1):
                name = branch if len(layers) == 1 else f"{branch}_{i}"
                self.add_module(name, conv(width, outer, *shape))
                self.branches[branch].append(name)
                width = outer

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, names in self.branches.items():
            y = self.pool(x) if branch == "branch_pool" else x
            for name in names:
                y = self.get_submodule(name)(y)
            outputs.append(y)
        return torch.cat(outputs, 1)


class MixedLast(nn.Module):
    """Mixed_7b and 7c: two branches end in two convolutions side by side, a row and a column."""

    def __init__(self, inner: int, pool: nn.Module):
        super().__init__()
        self.branch1x1 = conv(inner, 320, 1)
        self.branch3x3_1 = conv(inner, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = conv(384, 384, (1, 3)), conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = conv(inner, 448, 1)
        self.branch3x3dbl_2 = conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = conv(384, 384, (1, 3)), conv(384, 384, (3, 1))
        self.pool, self.branch_pool = pool, conv(inner, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y),
                          self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z),
                          self.branch_pool(self.pool(x))], 1)


MEAN, SHRINK = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 2)
ROW, COLUMN, HALVE = (1, 7), (7, 1), (3, 2, "valid")  # kernels; kernel, stride, padding


def mixed_35(inner: int, pooled: int) -> Mixed:
    return Mixed(inner, MEAN, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)])


def mixed_17(w: int) -> Mixed:
    return Mixed(768, MEAN, branch1x1=[(192, 1)], branch7x7=[(w, 1), (w, ROW), (192, COLUMN)],
                 branch7x7dbl=[(w, 1), (w, COLUMN), (w, ROW), (w, COLUMN), (192, ROW)],
                 branch_pool=[(192, 1)])


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
        self.Mixed_6a = Mixed(288, SHRINK, branch3x3=[(384, *HALVE)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, *HALVE)], branch_pool=[])
        self.Mixed_6b, self.Mixed_6c = mixed_17(128), mixed_17(160)
        self.Mixed_6d, self.Mixed_6e = mixed_17(160), mixed_17(192)
        self.Mixed_7a = Mixed(768, SHRINK, branch3x3=[(192, 1), (320, *HALVE)],
                              branch7x7x3=[(192, 1), (192, ROW), (192, COLUMN), (192, *HALVE)],
                              branch_pool=[])
        self.Mixed_7b = MixedLast(1280, MEAN)
        self.Mixed_7c = MixedLast(2048, nn.MaxPool2d(3, 1, 1))
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
    """The network with the weights in file `path`; None: the file in torch.hub's cache, downloaded
    once. If a name ends in 8 hex digits (-6726825d.pth), the file's sha256 must begin with them.
    Raises Mistake."""
    if path is None:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(WEIGHTS))
        with contextlib.suppress(OSError):  # without network, the next error says what to do
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if not os.path.exists(path):
                torch.hub.download_url_to_file(WEIGHTS, path)
    if not os.path.isfile(path):
        raise Mistake(f"no Inception weights at {path!r}; fetch {WEIGHTS} and put them there, or "
                      "give their place by --weights FILE")
    with about(path), open(path, "rb") as file:
        content = file.read()
    digits = re.search(r"-([0-9a-f]{8})\.pth$", path)
    if digits and not hashlib.sha256(content).hexdigest().startswith(digits[1]):
        raise Mistake(f"{path} is damaged: its sha256 is not as its name says; fetch {WEIGHTS}")
    network = InceptionV3()
    with about(path, f"not the weights of this network; fetch {WEIGHTS}"):
        network.load_state_dict(torch.load(io.BytesIO(content), "cpu", weights_only=True))
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise Mistake(f"{path} holds weights that are not finite; fetch {WEIGHTS}")
    return network


# ---- Activations -> statistics -> distance -------------------------------------------------------

def sum_processes(*tensors: Tensor):
    """Replaces tensors by their sums over the processes of torchrun."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


class Sums:
    """Mean and covariance of rows that come in batches, by the float64 sums n, x and x x^T. They
    do not depend on how the rows are split into batches and processes."""

    def __init__(self, width: int, device="cpu"):
        self.n, self.x, self.xx = (torch.zeros(shape, dtype=torch.float64, device=device)
                                   for shape in ((), (width,), (width, width)))

    def add(self, rows: Tensor):
        """rows: (B, D)."""
        rows = rows.double()
        self.n += len(rows)
        self.x += rows.sum(0)
        self.xx.addmm_(rows.T, rows)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D), float64, of the rows of all processes. Raises
        ValueError for fewer than 2."""
        n, x, xx = (tensor.clone() for tensor in (self.n, self.x, self.xx))
        sum_processes(n, x, xx)
        if n < 2:
            raise ValueError(f"a covariance needs 2 images or more; got {int(n)}")
        sigma = (xx - torch.outer(x, x) / n) / (n - 1)
        return (x / n).cpu().numpy(), sigma.cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2), in float64. For any A
    with A A^T = sigma1, the last trace is the sum of the square roots of the eigenvalues of
    A^T sigma2 A. Pivoted Cholesky is the fastest way to an A; its columns are the rank of sigma1.
    """
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
def about(path: str, text: str | None = None):
    """Errors in decoding a file become a Mistake that names it and says `text`, or what they said.
    Pillow, zipfile, numpy and torch raise many kinds of errors for damaged files."""
    try:
        yield
    except Exception as error:
        raise Mistake(f"{path}: {text or str(error)[:300] or type(error).__name__}") from None


def warn(text: str):
    """Prints a warning, in the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", flush=True)


def check_writable(path: str):
    if not path:
        raise Mistake("--json and --save-stats need a value, got an empty one")
    path = os.path.abspath(path)
    odd = os.path.lexists(path) and not os.path.isfile(path)
    if odd or not os.access(os.path.dirname(path), os.W_OK | os.X_OK):
        raise Mistake(f"cannot write {path}: it is no file, or its folder does not exist or may "
                      "not be written")


def write(path: str, content: bytes):
    """Writes under a temporary name, then renames: `path` always holds a whole file."""
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(content)
        os.replace(path + ".tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        reason = "disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise Mistake(f"{reason}: {path} could not be written") from None


@dataclass
class Side:
    """REFERENCE or SAMPLES: images, statistics or both."""
    path: str
    count: int = 0    # number of images
    read: Callable[[int, int], np.ndarray] | None = None    # images first ... last - 1, uint8
    statistics: dict[str, np.ndarray] | None = None         # by the names above, float64
    features: Tensor | None = None                          # (count, 2048) pool, by `measure`


def open_side(path: str) -> Side:
    """Checks everything but the pixels. Raises Mistake."""
    if os.path.isdir(path):
        side = open_folder(path)
    elif os.path.isfile(path):
        side = open_npz(path)
    else:
        raise Mistake(f"no file or folder {path!r}")
    if side.count == 1 or not side.count and not side.statistics:
        raise Mistake(f"{path}: {side.count} images (PNG, RGB), but 2 are the least")
    return side


def find_images(folder: str, seen: set[str]) -> Iterator[str]:
    """Paths of the PNGs and JPEGs in a folder and its sub-folders, except hidden ones. Follows
    links, but enters no folder twice: `seen` holds the real paths of those entered."""
    if os.path.realpath(folder) in seen:
        return
    seen.add(os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from find_images(entry.path, seen)
        elif entry.name.lower().endswith((".png", ".jpg", ".jpeg")):
            yield entry.path


def open_image(path: str) -> Image.Image:
    """An RGB image, its pixels not read yet. For formats not listed, Pillow may start programs."""
    if not os.path.isfile(path):
        raise Mistake(f"{path}: no file, or a broken link")
    with about(path):
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP"))
    if image.mode != "RGB" or image.width * image.height > MAX_PIXELS:
        raise Mistake(f"{path}: {image.mode}, width and height {image.size}; it must be 8-bit RGB "
                      f"of at most {MAX_PIXELS:,} pixels")
    return image


def open_folder(path: str) -> Side:
    def decode(file: str) -> np.ndarray:
        with open_image(file) as image, about(file):
            return np.array(image)                                           # (H, W, 3)

    def read(first: int, last: int) -> np.ndarray:
        return np.stack(list(pool.map(decode, files[first:last])))           # (B, H, W, 3)

    with about(path):
        files = sorted(find_images(path, set()))
    pool, sizes, formats = ThreadPoolExecutor(), [], set()
    for file in files:
        with open_image(file) as image:
            sizes.append(image.size)
            formats.add(image.format)
        if sizes[-1] != sizes[0]:
            raise Mistake(f"{file}: width and height {sizes[-1]}, but {sizes[0]} in {files[0]}")
    if lossy := formats - {"PNG", "BMP"}:
        warn(f"{path} holds {' and '.join(sorted(lossy))} files; their compression changes figures")
    return Side(path, len(files), read)


def open_array(archive: zipfile.ZipFile, name: str) -> tuple:
    """(file at the first number, shape, whether by columns, dtype) of an array in an npz. What the
    header claims must be what the file holds, so that no false claim fills the memory."""
    with about(archive.filename):
        file = archive.open(name + ".npy")
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    held = archive.getinfo(name + ".npy").file_size - file.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
        raise Mistake(f"{archive.filename}: {name} claims to be {dtype} {shape}, but its numbers "
                      f"take {held:,} bytes")
    return file, shape, by_columns, dtype


def read_statistic(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """A mean or a covariance, float64."""
    width = SPATIAL if name.endswith("_s") else POOL
    wanted = (width,) if name.startswith("mu") else (width, width)
    file, shape, _, dtype = open_array(archive, name)  # by rows or by columns: it is symmetric
    if shape != wanted or not np.issubdtype(dtype, np.floating):
        raise Mistake(f"{archive.filename}: {name} must be float {wanted}; it is {dtype} {shape}")
    with about(archive.filename):
        array = np.frombuffer(file.read(), dtype).astype(np.float64).reshape(shape)
    if not np.isfinite(array).all():
        raise Mistake(f"{archive.filename}: {name} is not finite")
    if array.ndim == 2:  # up to float32's rounding: symmetric, no negative eigenvalue
        rounding = (1e-6 * np.trace(array) + 1e-300) * np.eye(width)
        if (np.abs(array - array.T).max() > 1e-6 * np.abs(array).max()
                or lapack.dpotrf(array + rounding)[1] > 0):
            raise Mistake(f"{archive.filename}: {name} is no covariance matrix")
    return array


def open_npz(path: str) -> Side:
    def read(first: int, last: int) -> np.ndarray:  # fastest from the beginning to the end
        images = np.empty((last - first, *shape[1:]), np.uint8)              # (B, H, W, 3)
        with about(path):
            file.seek(start + first * images[:1].size)
            if file.readinto(images.reshape(-1)) < images.size:
                raise EOFError("arr_0 ends too early")
        return images

    with about(path):
        archive = zipfile.ZipFile(path)
        damaged = archive.testzip()  # now, as zipfile checks nothing that it reads after a seek
    if damaged:
        raise Mistake(f"{path}: {damaged} is damaged: its checksum differs")
    side, names = Side(path), archive.namelist()
    if "mu.npy" in names:
        side.statistics = {name: read_statistic(archive, name) for name in STATISTICS}
    if "arr_0.npy" in names:
        file, shape, by_columns, dtype = open_array(archive, "arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or by_columns:
            raise Mistake(f"{path}: arr_0 must be uint8 (N, H, W, 3); it is {dtype} {shape}")
        if not 0 < shape[1] * shape[2] <= MAX_PIXELS:
            raise Mistake(f"{path}: images must have 1 to {MAX_PIXELS:,} pixels; it holds {shape}")
        side.count, side.read, start = shape[0], read, file.tell()
    elif not side.statistics:
        raise Mistake(f"{path} needs images arr_0 or statistics {', '.join(STATISTICS)}; it holds "
                      f"{', '.join(names)}")
    return side


# ---- The program ---------------------------------------------------------------------------------

@torch.no_grad()
def measure(network: InceptionV3, side: Side, batch: int, device):
    """Fills in the features of a side and, if it has none, the statistics. Each process passes its
    share of the images through the network; afterwards all know the whole."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, last = side.count * rank // world, side.count * (rank + 1) // world
    pool, spatial, features = Sums(POOL, device), Sums(SPATIAL, device), []
    began = shown = time.time()
    for start in range(first, last, batch):
        end = min(start + batch, last)
        seen = network(torch.from_numpy(side.read(start, end)).to(device))
        pool.add(seen.pool)
        spatial.add(seen.spatial)
        features.append(seen.pool)
        if rank == 0 and (end == last or time.time() > shown + 10):
            shown = time.time()
            print(f"{side.path}: {end:,} of {last:,} images{' in each process' * (world > 1)}, "
                  f"{end * world / (shown - began):.1f} images/s", flush=True)
    side.features = torch.zeros(side.count, POOL, device=device)  # only now is the count certain
    if features:
        side.features[first:last] = torch.cat(features)
    sum_processes(side.features)
    measured = dict(zip(STATISTICS, (*pool.moments(), *spatial.moments())))
    side.statistics = side.statistics or measured


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Mistake(f"{message}; --help lists the flags")


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", metavar="REFERENCE", help="folder of PNGs, or npz")
    parser.add_argument("samples", metavar="SAMPLES", nargs="?", help="folder of PNGs, or npz")
    parser.add_argument("--weights", help="the network's; default: in torch.hub's cache")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--save-stats", help="file to write the statistics of IMAGES to")
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    args = parser.parse_args(argv)
    saving = args.save_stats is not None
    if saving != (args.samples is None) or saving and args.json is not None:
        raise Mistake("give REFERENCE and SAMPLES, or IMAGES and --save-stats FILE")
    if args.batch < 1:
        raise Mistake("--batch must be 1 or more")
    out = args.save_stats if saving else args.json
    if out is not None:
        check_writable(out)

    # Sides
    sides = [open_side(path) for path in (args.reference, args.samples) if path is not None]
    reference, samples = sides[0], sides[-1]
    if saving and reference.statistics:
        raise Mistake(f"{reference.path} holds statistics already")
    if samples.statistics and (samples.count or not reference.statistics):
        raise Mistake(f"{samples.path} holds statistics, as a reference does; the order is "
                      "REFERENCE SAMPLES, and samples are images")
    if samples.count < reference.count and not reference.statistics:
        warn(f"fewer samples than reference images: is {samples.path} the REFERENCE?")
    for side in sides:
        if out is not None and os.path.realpath(out) == os.path.realpath(side.path):
            raise Mistake(f"{out} would be overwritten; give another name")
        if side.count != 50_000 and not side.statistics:
            warn(f"{side.path} has {side.count:,} images; figures compare for 50,000 only"
                 + ", and mean little below 2,048" * (side.count < 2048))

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
        if samples.count and side.count:
            measure(network, side, args.batch, device)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    if saving:
        content = io.BytesIO()
        np.savez(content, n=reference.count, **reference.statistics)
        write(out, content.getvalue())
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
        warn("no Inception Score; " * (not samples.count)
             + "no precision and recall: they need 4 images or more on each side, and there are "
             f"{reference.count} and {samples.count}")
    for name, value in figures.items():
        print(f"{name:20} {value:.4f}")
    if out is not None:
        write(out, json.dumps(figures).encode())


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is less
    try:
        main()
    except Mistake as mistake:
        sys.exit(f"fid.py: {mistake}")
