"""FID, sFID, Inception Score, precision and recall by the protocol of ADM's evaluation suite
(guided-diffusion, evaluations/evaluator.py), which papers quote; without TensorFlow.

    python fid.py REFERENCE SAMPLES [--weights FILE]    on CUDA where there is one
    python fid.py IMAGES --save-stats FILE              makes a REFERENCE

Images are a folder of PNGs (with its sub-folders) or an npz of uint8 images arr_0 (N, H, W, 3). A
REFERENCE may also be an npz of statistics mu, sigma, mu_s, sigma_s, or hold both, as ADM's do: FID
and sFID then use the statistics, precision and recall the images. The REFERENCE of reconstructions
is the *same centre-cropped* images, not the uncropped files, not ADM's file.

    images (B, H, W, 3) -> InceptionV3 -> pool (B, 2048), spatial (B, 2023), probs (B, 1008)
    pool, spatial -> mean, covariance -> frechet_distance: FID, sFID
    probs -> inception_score          pool -> precision_recall

B is a batch, N and M count images, D counts features. Whoever has ADM's files can
check this one: VIRTUAL_imagenet256_labeled.npz against admnet_guided_upsampled_imagenet256.npz
gives FID 3.9426, sFID 6.1404, IS 215.84, precision .8265, recall .5309 in TensorFlow; a good port
is within .005, .01, .3, .003, .003. Only figures of 50,000 samples compare with published ones.
"""
import argparse
import glob
import math
import os
import sys
import time
import zipfile
from collections import OrderedDict, defaultdict
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import eigh, svdvals
from torch import Tensor, nn

WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
           "pt_inception-2015-12-05-6726825d.pth")
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
WIDTHS = {"mu": 2048, "mu_s": 2023}  # of statistics
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # for some others, Pillow starts programs


class Features(NamedTuple):
    pool: Tensor       # (B, 2048) pool3
    spatial: Tensor    # (B, 2023) = 17 x 17 x 7, in height, width, channel order
    probs: Tensor      # (B, 1008) class probabilities, without the bias


class Mistake(ValueError):
    """What the user can mend; printed as one line."""


def run(main):
    """Calls a script's main. What the user or the system can mend (disk, permission, network) ends
    it with one line."""
    if hasattr(sys.stdout, "reconfigure"):  # not all terminals can print all names of files
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (Mistake, OSError) as error:
        # Of several processes, the first one ends the others before they say the same.
        time.sleep(3 * (torch.distributed.get_node_local_rank(fallback_rank=0) > 0))
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")
    except torch.OutOfMemoryError:
        sys.exit("the GPU's memory is full; give a smaller --batch or, to train, --micro-batch")


# ---- The network ---------------------------------------------------------------------------------

def resize(images, size=299):
    """(B, C, size, size) of images (B, C, H, W) float32 by TensorFlow 1's bilinear rule: pixel i
    comes from i * H / size, without half-pixel offset or antialias."""
    # Padded by one, from H + 1 to size + 1 pixels: aligned corners map pixel i to i * H / size.
    images = F.pad(images, (0, 1, 0, 1), mode="replicate")
    images = F.interpolate(images, size + 1, mode="bilinear", align_corners=True)
    return images[..., :-1, :-1]


class InceptionV3(nn.Sequential):
    """The Inception graph of 2015 in torchvision's layers, whose names the public weights use. But
    average pools leave the padding out, and the last block pools by maximum."""

    def __init__(self):
        from torchvision.models import Inception3
        network = Inception3(1008, aux_logits=False, init_weights=False)
        super().__init__(OrderedDict(network.named_children()))
        self.eval().requires_grad_(False)

    def forward(self, images):
        """images: uint8 (B, H, W, 3), any H and W. In float32, never in TF32."""
        *layers, avgpool, dropout, fc = self
        mean = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        x = (resize(images.permute(0, 3, 1, 2).float()) - 128) / 128     # (B, 3, 299, 299)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for layer in layers:
                before, x = x, layer(x)
                if hasattr(layer, "branch_pool"):  # redo its last channels, with the right pool
                    pool = nn.MaxPool2d(3, 1, 1) if layer is self.Mixed_7c else mean
                    pooled = layer.branch_pool(pool(before))
                    x[:, -pooled.shape[1]:] = pooled
                if layer is self.Mixed_6d:  # the channels of its 1 x 1 branch come first
                    spatial = x[:, :7].permute(0, 2, 3, 1)          # (B, 17, 17, 7)
        pool = x.mean((2, 3))                                       # (B, 2048)
        probs = F.linear(pool, fc.weight).softmax(1)  # like ADM's, without the bias
        return Features(pool, spatial.flatten(1), probs)


def load_inception(path=None):
    """The network with the weights in file `path`; None: those in torch.hub's cache, downloaded and
    checked once. Raises Mistake."""
    try:
        if path is None:
            weights = torch.hub.load_state_dict_from_url(
                WEIGHTS, map_location="cpu", check_hash=True, weights_only=True)
        else:
            weights = torch.load(path, "cpu", weights_only=True)
        network = InceptionV3()
        network.load_state_dict(weights)
    except Exception as error:  # torch raises many kinds
        raise Mistake(f"no Inception weights ({error}); fetch {WEIGHTS} and give --weights FILE, "
                      f"or put it in {torch.hub.get_dir()}/checkpoints") from None
    return network


# ---- Activations -> statistics -> distance -------------------------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2), in float64. For any A, B
    with A A^T = sigma1 and B B^T = sigma2, the last trace is the sum of A^T B's singular values."""
    def root(sigma):
        values, vectors = eigh(sigma)
        return vectors * np.sqrt(values.clip(0))

    trace = svdvals(root(sigma1).T @ root(sigma2)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)


def inception_score(probs, split_size=5000):
    """Mean and standard deviation over splits, in the given order, of exp of the mean KL divergence
    of class probabilities (N, C) from their mean; the last split may be shorter."""
    scores = []
    for part in probs.double().split(split_size):
        mean = part.mean(0)
        divergence = torch.xlogy(part, part).sum(1).mean() - torch.xlogy(mean, mean).sum()
        scores.append(divergence.exp().item())
    return np.mean(scores), np.std(scores)


def precision_recall(reference, generated, k=3, rows=1000):
    """The share of `generated` (M, D) in the balls around `reference` (N, D), and the reverse. A
    ball reaches to its centre's k-th nearest other point; N and M must be above k. Distances are
    in float64, of `rows` points at a time."""
    def covered(points, centres):
        radii = torch.cat([
            torch.cdist(part, centres).kthvalue(k + 1).values       # the first is the point itself
            for part in centres.split(rows)])                       # (centres,)
        inside = torch.cat([
            (torch.cdist(part, centres) <= radii).any(1)            # (rows, centres) -> (rows,)
            for part in points.split(rows)])
        return inside.double().mean().item()

    reference, generated = reference.double(), generated.double()
    return covered(generated, reference), covered(reference, generated)


# ---- Files ---------------------------------------------------------------------------------------

def find_images(root, quiet=False):
    """Sorted paths, relative to a folder, of the images in it at any depth, without hidden ones.
    Prints how much else it leaves out, unless quiet. Raises Mistake."""
    names = glob.glob("**/*", root_dir=root, recursive=True)
    found = [name for name in names if name.lower().endswith(ENDINGS)]
    if not found:
        raise Mistake(f"no folder {root} with images in it; endings must be {' '.join(ENDINGS)}")
    others = sorted(name for name in set(names) - set(found)
                    if not os.path.isdir(f"{root}/{name}"))
    if others and not quiet:
        print(f"{root}: left out {len(others)} files of other kinds, first {others[0]}", flush=True)
    return sorted(found)


class Side(NamedTuple):
    """REFERENCE or SAMPLES: images, statistics or both."""
    path: str
    count: int          # number of images
    batches: Callable   # batches(size) yields them, (n, H, W, 3) uint8 at a time
    statistics: dict    # mu, sigma of pool; mu_s, sigma_s of spatial


def open_folder(path):
    """Images in a fixed shuffled order: in that of classes, the splits of the Inception Score would
    hold few of them."""
    names = find_images(path)
    np.random.default_rng(0).shuffle(names)
    if not all(name.lower().endswith((".png", ".bmp")) for name in names):
        print(f"warning: not all images in {path} are PNGs; compression changes figures")

    sizes = set()

    def read(name):
        try:
            image = Image.open(f"{path}/{name}", formats=FORMATS)
            pixels = np.array(image)
        except Exception as error:  # Pillow raises many kinds
            raise Mistake(f"{path}/{name} cannot be read as an image ({error})") from None
        sizes.add(image.size)
        if image.mode != "RGB" or len(sizes) > 1:
            raise Mistake(f"{path}/{name} is {image.mode} {image.size}; images must be 8-bit RGB "
                          "and of one size")
        return pixels

    def batches(size):
        for first in range(0, len(names), size):
            yield np.stack([read(name) for name in names[first:first + size]])

    return Side(path, len(names), batches, {})


def open_npz(path):
    """Images arr_0, which are never read as a whole, or statistics, or both."""
    if not zipfile.is_zipfile(path):
        raise Mistake(f"{path} is no folder and no npz file")
    with np.load(path) as arrays:
        names = arrays.files
        statistics = {name: arrays[name].astype(np.float64)
                      for name in ("mu", "sigma", "mu_s", "sigma_s") if name in names}
    for name, width in WIDTHS.items():
        if name in names and statistics[name].shape != (width,):
            raise Mistake(f"{path}: {name} must hold {width} numbers, not those of another network")
    if "arr_0" not in names:
        if "sigma" not in names:
            raise Mistake(f"{path} needs images arr_0 or statistics mu, sigma; it holds {names}")
        return Side(path, 0, None, statistics)
    member = zipfile.ZipFile(path).open("arr_0.npy")
    if np.lib.format.read_magic(member) != (1, 0):
        raise Mistake(f"{path}: arr_0 must be in version 1.0 of numpy's format, as savez writes it")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise Mistake(f"{path}: arr_0 must be uint8 (N, H, W, 3) in C order; it is {dtype} "
                      f"{shape}, Fortran order {fortran}")
    start = member.tell()

    def batches(size):
        member.seek(start)
        while content := member.read(math.prod(shape[1:]) * size):
            yield np.frombuffer(content, np.uint8).reshape(-1, *shape[1:])

    return Side(path, shape[0], batches, statistics)


# ---- The program ---------------------------------------------------------------------------------

def measure(network, side, batch, device, keep):
    """By name, the statistics of all images of a side (mu, sigma, mu_s, sigma_s), from sums in
    float64, and those of its features that `keep` names. Only these need memory for each image.
    """
    kept = {name: [] for name in keep}
    sums = defaultdict(float)
    products = defaultdict(float)
    for number, images in enumerate(side.batches(batch)):
        if number % 100 == 0:
            print(f"{side.path}: {number * batch:,} of {side.count:,} images", flush=True)
        features = network(torch.tensor(images, device=device))
        for name in keep:
            kept[name].append(getattr(features, name))
        for suffix, rows in (("", features.pool), ("_s", features.spatial)):
            rows = rows.double()
            sums[suffix] += rows.sum(0)
            products[suffix] += rows.T @ rows
    measured = {name: torch.cat(parts) for name, parts in kept.items()}
    for suffix, total in sums.items():
        mean = total / side.count
        scatter = products[suffix] - torch.outer(mean, total)
        measured["mu" + suffix] = mean.cpu().numpy()
        measured["sigma" + suffix] = scatter.cpu().numpy() / (side.count - 1)
    return measured


def main(argv=None):
    """Prints the figures, and returns them by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", metavar="REFERENCE", help="folder of PNGs, or npz")
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("samples", metavar="SAMPLES", nargs="?", help="folder of PNGs, or npz")
    either.add_argument("--save-stats", help="file to write the statistics of REFERENCE to")
    parser.add_argument("--weights", help="the network's; default: in torch.hub's cache")
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    args = parser.parse_args(argv)

    # Sides, and what is wrong with them
    sides = [open_folder(path) if os.path.isdir(path) else open_npz(path)
             for path in (args.reference, args.samples) if path]
    reference, samples = sides[0], sides[-1]
    if not samples.count:
        raise Mistake(f"{samples.path} holds statistics, where images are needed; the order is "
                      "REFERENCE SAMPLES")
    for side in sides:
        if side.statistics:
            continue
        if side.count < 4:
            raise Mistake(f"{side.path} holds {side.count} images, but 4 are the least")
        if side.count != 50_000:
            print(f"warning: {side.path} has {side.count:,} images; figures compare for 50,000 "
                  "only, and mean little below 2,048")

    # Network, activations, statistics
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_inception(args.weights).to(device)
    keep = [] if args.save_stats else ["pool", "probs"]
    measured = [measure(network, side, args.batch, device, keep) for side in sides if side.count]
    if args.save_stats:
        with open(args.save_stats, "wb") as file:
            np.savez(file, **measured[0])
        print(args.save_stats)
        return {}

    # Distances
    figures = {}
    found = measured[-1]
    expected = reference.statistics or measured[0]
    for name, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if sigma in expected:
            figures[name] = frechet_distance(expected[mu], expected[sigma], found[mu], found[sigma])
        else:
            print("no sFID: the reference has no mu_s and sigma_s")
    figures["inception_score"], figures["inception_score_std"] = inception_score(found["probs"])
    if reference.count:
        figures["precision"], figures["recall"] = precision_recall(
            measured[0]["pool"], found["pool"])
    else:
        print("no precision and recall: the reference has no images")
    for name, value in figures.items():
        print(f"{name:20} {value:.4f}")
    return figures


if __name__ == "__main__":
    run(main)
