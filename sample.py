"""Draws images from a trained model, in every way that the paper shows.

    python sample.py --cfg 1.1:10                         a grid; the newest checkpoint under out/
    python sample.py --ckpt F --labels 207,360 --num 8    classes in turn, by number or name
    python sample.py --ckpt F --stream --labels 0,1,2     previews while tokens are drawn (Sec. 3.3)
    python sample.py --ckpt F --tokens 128                from the first 128 tokens only (Table 4)
    python sample.py --ckpt F --prefix IMAGE --keep 32,64 --labels 0,1    layout control (Fig. 8)
    python sample.py --ckpt F --reconstruct DIR           encodes and decodes images, for rFID
    torchrun --nproc_per_node=8 sample.py --ckpt F --num-images 50000 --npz samples.npz   for FID
    python sample.py --size L --batch 64 --cfg 1.1:8 --benchmark    speed, in random weights

F is a checkpoint of train_ar.py, which carries its tokenizer, or one of the authors' files together
with --tokenizer; to reconstruct, a tokenizer will do. Image i is a function of the seed and i, but
for the rounding of products with other numbers of rows. Everything is written beside --out.
"""
import argparse
import functools
import glob
import hashlib
import math
import os
import shutil
import time
import zipfile
from itertools import islice
from typing import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model_ar import AR, SIZES, Sampler, load_ar
from model_tokenizer import (IMAGE_ENDINGS, TOKENIZERS, Tokenizer, center_crop, count_flops,
                             image_grid, join_processes, load_tokenizer, make_parts, noise_of,
                             open_image, peak_memory, psnr, read_file, read_image, read_parts, run,
                             sampling_schedule, seed_of, to_tensor, to_uint8, write_array)


# ---- What the user says --------------------------------------------------------------------------

def parse_cfg(text: str) -> tuple[float, float] | None:
    """Guidance: "1.1:10" runs linearly over the tokens, "4" is constant, "none" is off."""
    if text == "none":
        return None
    try:
        start, end = (float(part) for part in (text.split(":") if ":" in text else [text, text]))
    except ValueError:
        start = end = math.nan
    if not math.isfinite(start + end):
        raise ValueError(f"--cfg must be START:END, one number, or none; got {text!r}")
    return start, end


def parse_labels(text: str, classes: list[str]) -> list[int]:
    """Class numbers of "207,360" or of class names; "" is all classes."""
    labels = []
    for part in filter(None, text.split(",")):
        if part not in classes and not (part.isdecimal() and int(part) < len(classes)):
            raise ValueError(f"--labels: no class {part!r}; give numbers in 0 ... "
                             f"{len(classes) - 1} or names such as {', '.join(classes[:10])}")
        labels.append(classes.index(part) if part in classes else int(part))
    return labels or list(range(len(classes)))


def parse_keep(text: str, count: int) -> list[int]:
    """Numbers of kept tokens of "32,64"; "" is 1/8, 1/4 and 1/2 of the `count` tokens."""
    kept = text.split(",") if text else [str(count // 8), str(count // 4), str(count // 2)]
    if not all(part.isdecimal() and int(part) <= count for part in kept):
        raise ValueError(f"--keep must be numbers of tokens in 0 ... {count}, got {text!r}")
    return [int(part) for part in kept]


def newest_checkpoint(kinds: tuple, folder: str = "out") -> str:
    """The checkpoint under `folder`, of one of the kinds, that was written last."""
    paths = glob.glob(os.path.join(folder, "**", "last.pt"), recursive=True)
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        if read_file(path).get("kind") in kinds:
            return path
    raise FileNotFoundError(f"no checkpoint under {folder}/; train one, or give --ckpt FILE")


UNUSED = {  # flags that have no meaning in a mode
    "stream": "steps", "prefix": "num", "npz": "out", "size": "ckpt tokenizer labels",
    "reconstruct": "labels cfg temperature top_k top_p", "benchmark": "num out"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without the model. Raises ValueError."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="checkpoint of train_ar.py; default: the newest under out/")
    parser.add_argument("--tokenizer", help="its tokenizer, for files that do not carry one")
    parser.add_argument("--labels", default="", help="class numbers or names, a,b,c; default: all")
    # torchrun, with some versions of Python, takes --num for a short form of its --numa-binding.
    parser.add_argument("--num", "--num-images", type=int, help="number of images; default 100, "
                        "with --stream one a label up to ten, with --reconstruct all")
    parser.add_argument("--cfg", default="none", help="guidance START:END, a number, or none")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the top share p")
    parser.add_argument("--tokens", type=int, help="read only the first tokens; whole groups")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the tokenizer's")
    parser.add_argument("--solver", default="adams2", choices=["adams2", "euler"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100, help="images at a time")
    parser.add_argument("--out", default="out/samples.png", help="the picture to write")
    parser.add_argument("--keep", default="", help="tokens of --prefix to keep, one row for each "
                        "number; default: 1/8, 1/4 and 1/2 of them")
    parser.add_argument("--size", choices=SIZES, help="random weights, for --benchmark")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--stream", action="store_true", help="write each preview as it comes")
    mode.add_argument("--prefix", metavar="IMAGE", help="keep its first tokens")
    mode.add_argument("--reconstruct", metavar="DIR", help="images to encode and decode")
    mode.add_argument("--npz", metavar="FILE", help="write the images as uint8 arr_0, for fid.py")
    mode.add_argument("--benchmark", action="store_true", help="print tokens and images a second")
    args = parser.parse_args(argv)
    for chosen, unused in UNUSED.items():
        for flag in unused.split() if getattr(args, chosen) else ():
            if getattr(args, flag) != parser.get_default(flag):
                raise ValueError(f"--{flag.replace('_', '-')} has no meaning with --{chosen}")
    if "RANK" in os.environ and not args.npz and not args.reconstruct:
        raise ValueError("torchrun is for --npz and --reconstruct; use python otherwise")
    if os.path.splitext(args.out)[1].lower() not in (".png", ".jpg", ".webp"):
        raise ValueError(f"--out must end in .png, .jpg or .webp, got {args.out!r}")
    args.cfg = parse_cfg(args.cfg)
    for flag, least in (("num", 1), ("batch", 1), ("steps", 1), ("top_k", 0), ("seed", 0),
                        ("temperature", 0)):
        value = getattr(args, flag)
        if value is not None and not value >= least:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {args.top_p}")
    for flag, needed in (("keep", "prefix"), ("size", "benchmark")):
        if getattr(args, flag) and not getattr(args, needed):
            raise ValueError(f"--{flag} needs --{needed}")
    return args


# ---- Model ---------------------------------------------------------------------------------------

def load_models(args, device) -> tuple[AR | None, Tokenizer, list[str]]:
    """The models and the names of the classes; to reconstruct, the tokenizer only. Raises
    FileNotFoundError and ValueError."""
    if args.reconstruct:
        args.ckpt = args.tokenizer or args.ckpt or newest_checkpoint(("ar", "tokenizer"))
        return None, load_tokenizer(args.ckpt, device), []
    if args.size:
        tokenizer = Tokenizer(TOKENIZERS["toy" if args.size == "toy" else "paper"]).eval()
        ar = AR(SIZES[args.size]).eval()
        classes = [str(i) for i in range(ar.config.num_classes)]
        return ar.to(device), tokenizer.to(device), classes
    args.ckpt = args.ckpt or newest_checkpoint(("ar",))
    classes = read_file(args.ckpt).get("classes")  # the authors' files name none
    if classes:
        parse_labels(args.labels, classes)  # mistakes come before the weights
    tokenizer = load_tokenizer(args.tokenizer or args.ckpt, device)
    ar = load_ar(args.ckpt, device, tokenizer.config.num_tokens)
    if (ar.config.vocab_size, ar.config.num_tokens) != (tokenizer.config.codebook_size,
                                                        tokenizer.config.num_tokens):
        raise ValueError(f"the tokenizer has {tokenizer.config.num_tokens} tokens of "
                         f"{tokenizer.config.codebook_size}, {args.ckpt} predicts "
                         f"{ar.config.num_tokens} of {ar.config.vocab_size}")
    return ar, tokenizer, classes or [str(i) for i in range(ar.config.num_classes)]


class Pipeline:
    """Both models and the settings of a run: from numbers of images and class labels to images
    (B, 3, H, W) in [-1, 1], `batch` at a time. What image i becomes depends on (seed, i).

    On CUDA, the autoregressive model runs in bf16 and as recorded graphs, the decoder under bf16
    autocast with compiled blocks.
    """

    def __init__(self, ar: AR | None, tokenizer: Tokenizer, args, batch: int,
                 device: torch.device):
        config, self.on_gpu = tokenizer.config, device.type == "cuda"
        if self.on_gpu:
            for block in tokenizer.diffusion.blocks:
                block.compile(dynamic=False)
        self.tokenizer, self.args, self.batch, self.device = tokenizer, args, batch, device
        self.group = config.num_tokens // config.num_groups                  # tokens a group
        tokens = config.num_tokens if args.tokens is None else args.tokens
        if tokens % self.group or not 0 < tokens <= config.num_tokens:
            raise ValueError(f"--tokens must be a multiple of {self.group} in {self.group} ... "
                             f"{config.num_tokens}, got {tokens}")
        self.groups = tokens // self.group
        if ar is not None:
            if self.on_gpu:  # but not the buffer, which holds the rotation
                for parameter in ar.parameters():
                    parameter.data = parameter.data.bfloat16()
            self.sampler = Sampler(ar, batch, args.cfg, args.temperature, args.top_k, args.top_p,
                                   self.group, compiled=self.on_gpu)

    def pad(self, items: list) -> list:
        """The items, the last one repeated up to a whole batch: all batches have one shape."""
        return items + [items[-1]] * (self.batch - len(items))

    def noise(self, numbers: list[int]) -> Tensor:
        size = self.tokenizer.config.image_size
        return noise_of(self.args.seed, 8, numbers, (3, size, size), self.device)

    def token_groups(self, numbers: list[int], labels: list[int],
                     prefix: Tensor | None = None) -> Iterator[Tensor]:
        """Tokens (batch, N/K) of a whole batch, group by group, after prefix (batch, n)."""
        keys = torch.tensor([seed_of(self.args.seed, 9, number) for number in numbers])
        tokens = self.sampler.stream(torch.tensor(labels, device=self.device), prefix, keys)
        return islice(tokens, self.groups)

    def decode(self, numbers: list[int], tokens: Tensor) -> Tensor:
        """Images of tokens (batch, n) of a whole batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            return self.tokenizer.decode(tokens, self.noise(numbers), self.args.steps,
                                         self.args.solver, self.groups)

    def images(self, numbers: list[int], labels: list[int],
               prefix: Tensor | None = None) -> Tensor:
        """Images of up to a batch of numbers and labels, after one prefix (n,) for all."""
        count, numbers, labels = len(numbers), self.pad(numbers), self.pad(labels)
        if prefix is not None:
            prefix = prefix.expand(self.batch, -1)
        tokens = torch.cat([*self.token_groups(numbers, labels, prefix)], 1)
        return self.decode(numbers, tokens)[:count]

    def previews(self, numbers: list[int], labels: list[int]) -> Iterator[Tensor]:
        """Images after each group of tokens of a whole batch, while the next group is drawn."""
        tokens = self.token_groups(numbers, labels)
        if self.on_gpu:
            tokens = on_own_stream(tokens)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            yield from self.tokenizer.stream(tokens, self.noise(numbers), self.args.solver,
                                             self.groups)

    def wait(self):
        if self.on_gpu:
            torch.cuda.synchronize()


def on_own_stream(items: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same items, made one ahead on a stream of their own, while the reader works on the one
    before, and outside its autocast."""
    stream, reader = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(reader)

    def launch() -> tuple[Tensor | None, torch.cuda.Event]:
        with torch.cuda.stream(stream), torch.autocast("cuda", enabled=False):
            return next(items, None), stream.record_event()

    item, made = launch()
    while item is not None:
        following = launch()
        reader.wait_event(made)
        item.record_stream(reader)
        yield item
        item, made = following


# ---- Pictures ------------------------------------------------------------------------------------

def write_grid(pipeline: Pipeline, args, labels: list[int], count: int):
    """A grid of samples, labels in turn; one column a label where there are at most ten."""
    todo = [labels[i % len(labels)] for i in range(count)]
    images = torch.cat([pipeline.images([*range(first, min(first + pipeline.batch, count))],
                                        todo[first:first + pipeline.batch])
                        for first in range(0, count, pipeline.batch)])
    columns = len(labels) if 1 < len(labels) <= 10 else 10
    image_grid(images, min(columns, count)).save(args.out)
    print(args.out)


def write_stream(pipeline: Pipeline, args, labels: list[int]):
    """Each preview as it comes; then a picture of all (rows: samples, columns: previews), an
    animation, and the last preview as --out."""
    stem, count = os.path.splitext(args.out)[0], pipeline.batch
    todo = [labels[i % len(labels)] for i in range(count)]
    previews, frames = [], []
    for images in pipeline.previews([*range(count)], todo):
        previews.append(images)
        frames.append(image_grid(images, min(10, count)))
        frames[-1].save(f"{stem}_{len(frames) * pipeline.group:03d}.png")
        print(f"{stem}_{len(frames) * pipeline.group:03d}.png", flush=True)
    image_grid(torch.stack(previews, 1).flatten(0, 1), len(previews)).save(f"{stem}_steps.png")
    frames[0].save(f"{stem}.gif", save_all=True, append_images=frames[1:], loop=0,
                   duration=[400] * (len(frames) - 1) + [1600])
    frames[-1].save(args.out)
    print(f"{stem}_steps.png\n{stem}.gif\n{args.out}")


def write_layouts(pipeline: Pipeline, args, labels: list[int], reference: Tensor):
    """Layout control: the first tokens of the reference image (3, H, W), in the first column, are
    kept, a number of them for each row; the others are drawn, for one label a column."""
    if len(labels) > pipeline.batch:
        raise ValueError(f"--prefix draws a row at a time; give up to {pipeline.batch} --labels")
    reference = reference.to(pipeline.device)
    tokens, rows = pipeline.tokenizer.encode(reference[None])[0], []         # (N,)
    for kept in args.keep:
        images = pipeline.images([*range(len(labels))], labels, tokens[:kept])
        rows.append(torch.cat([reference[None], images]))
    image_grid(torch.cat(rows), 1 + len(labels)).save(args.out)
    print(f"{args.out}: rows keep {', '.join(map(str, args.keep))} of {len(tokens)} tokens; "
          "the first column is the reference")


# ---- Many images ---------------------------------------------------------------------------------

def write_npz(path: str, parts: Iterator[np.ndarray], count: int):
    """One array arr_0 (count, ...) uint8 of parts (n, ...), which are held one at a time."""
    with zipfile.ZipFile(path + ".tmp", "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            write_array(file, parts, count)
    os.replace(path + ".tmp", path)


def write_samples(pipeline: Pipeline, args, labels: list[int], count: int, rank: int):
    """`--npz`: each label equally often, in another order in each turn of all labels."""
    seconds = {"AR": 0.0, "decoder": 0.0}

    def label(number: int) -> int:
        turn, place = divmod(number, len(labels))
        return labels[np.random.default_rng((args.seed, 10, turn)).permutation(len(labels))[place]]

    def make(todo: list[list[int]]) -> Iterator[np.ndarray]:
        for numbers in todo:
            began, padded = time.time(), pipeline.pad(numbers)
            groups = pipeline.token_groups(padded, [label(number) for number in padded])
            tokens = torch.cat([*groups], 1)
            pipeline.wait()
            drawn = time.time()
            pixels = to_uint8(pipeline.decode(padded, tokens)[:len(numbers)])
            seconds["AR"] += drawn - began
            seconds["decoder"] += time.time() - drawn
            yield pixels

    def rate(made: int) -> str:
        return "a process: " + ", ".join(f"{name} {made / spent:.1f} images/s"
                                         for name, spent in seconds.items())

    folder = args.npz + ".parts"
    settings = {"seed": args.seed, "labels": labels, "cfg": args.cfg and list(args.cfg),
                "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
                "groups": pipeline.groups, "steps": args.steps, "solver": args.solver,
                "device": pipeline.device.type, "weights": digest(args.ckpt, args.tokenizer)}
    make_parts(folder, count, pipeline.batch, settings, make, rate)
    if rank == 0:
        write_npz(args.npz, read_parts(folder), count)
        shutil.rmtree(folder)
        print(args.npz)


def digest(*paths: str | None) -> str:
    """Of what is in the files."""
    value = hashlib.sha256()
    for path in filter(None, paths):
        with open(path, "rb") as file:
            value.update(hashlib.file_digest(file, "sha256").digest())
    return value.hexdigest()


def find_images(root: str) -> list[str]:
    """Paths of all images under a folder, in sorted order. Raises FileNotFoundError and, also for a
    file that is no image, ValueError."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no folder {root}; give --reconstruct DIR")
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(root)
                   for name in names if name.lower().endswith(IMAGE_ENDINGS))
    if not paths:
        raise ValueError(f"no images in {root}: endings must be {', '.join(IMAGE_ENDINGS)}")
    for path in paths:
        open_image(path).close()
    return paths


def write_reconstructions(pipeline: Pipeline, args, paths: list[str], rank: int):
    """`--reconstruct`: pairs as a picture, all originals and reconstructions as npz, PSNR."""
    stem, size = os.path.splitext(args.out)[0], pipeline.tokenizer.config.image_size
    began, names = time.time(), [f"{stem}_originals.npz", f"{stem}_reconstructions.npz"]

    def make(todo: list[list[int]]) -> Iterator[np.ndarray]:
        for numbers in todo:
            images = torch.stack([to_tensor(center_crop(read_image(paths[number], size), size))
                                  for number in pipeline.pad(numbers)]).to(pipeline.device)
            decoded = pipeline.decode(pipeline.pad(numbers), pipeline.tokenizer.encode(images))
            yield np.stack([to_uint8(images), to_uint8(decoded)], 1)[:len(numbers)]

    def rate(made: int) -> str:
        return f"a process: {made / (time.time() - began):.1f} images/s"

    folder = stem + ".parts"
    settings = {"seed": args.seed, "groups": pipeline.groups, "steps": args.steps,
                "solver": args.solver, "device": pipeline.device.type, "images": paths,
                "weights": digest(args.ckpt)}
    make_parts(folder, len(paths), pipeline.batch, settings, make, rate)
    if rank == 0:
        total = 0.0
        for i, name in enumerate(names):
            write_npz(name, (part[:, i] for part in read_parts(folder)), len(paths))
        for part in read_parts(folder):                                      # (n, 2, H, W, 3)
            both = torch.from_numpy(part).permute(1, 0, 4, 2, 3) / 127.5 - 1
            total += psnr(both[1], both[0]) * len(part)
        pairs = np.concatenate([*islice(read_parts(folder), -(-20 // pipeline.batch))])[:20]
        pairs = torch.from_numpy(pairs).flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1
        image_grid(pairs, min(10, len(pairs))).save(args.out)
        shutil.rmtree(folder)
        print(f"PSNR {total / len(paths):.2f} dB over {len(paths):,} images\n" + "\n".join(names)
              + f"\n{args.out}: originals, each beside its reconstruction")


# ---- Speed ---------------------------------------------------------------------------------------

def seconds_of(call: Callable, pipeline: Pipeline, patience: float = 20.0) -> float:
    """Seconds of a call: the median of nine, or of fewer if they take longer than `patience`."""
    times = []
    while len(times) < 9 and sum(times) < patience:
        began = time.time()
        call()
        pipeline.wait()
        times.append(time.time() - began)
    return sorted(times)[len(times) // 2]


def benchmark(pipeline: Pipeline, ar: AR, labels: list[int]):
    """Prints how fast a batch is drawn and decoded, beside what the machine could do: read all
    weights and the cache once a step at its memory bandwidth, or compute all products at the rate
    of a large one, both measured here."""
    tokenizer, device, batch = pipeline.tokenizer, pipeline.device, pipeline.batch
    numbers, todo = [*range(batch)], [labels[i % len(labels)] for i in range(batch)]
    dtype, side = ar.head.weight.dtype, 8192 if pipeline.on_gpu else 2048
    values = torch.randn(2 ** 29 // dtype.itemsize, dtype=dtype, device=device)
    bandwidth = 2 ** 29 / seconds_of(values.sum, pipeline)
    values = values[:side ** 2].view(side, side).clone()
    products = 2 * side ** 3 / seconds_of(functools.partial(torch.mm, values, values), pipeline)
    del values
    if pipeline.on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def draw() -> Tensor:
        return torch.cat([*pipeline.token_groups(numbers, todo)], 1)

    if pipeline.on_gpu:  # compiles and records
        pipeline.decode(numbers, draw())
    drawing, count = seconds_of(draw, pipeline), pipeline.groups * pipeline.group
    tokens = torch.zeros(batch, tokenizer.config.num_tokens, dtype=torch.long, device=device)
    decoding = seconds_of(lambda: pipeline.decode(numbers, tokens), pipeline)

    rows = len(pipeline.sampler.cache.blocks[0][0])
    weights = sum(p.numel() for name, p in ar.named_parameters() if "embedding" not in name)
    cache = rows * ar.config.depth * 2 * ar.config.width * (count + pipeline.group) / 2  # average
    reading = dtype.itemsize * weights / bandwidth  # seconds a step
    caching = dtype.itemsize * cache / bandwidth
    computing = 2 * weights * rows / products
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        cond, noise = tokenizer.condition(tokens[:1]), pipeline.noise([0])
        settings = tokenizer.config
        steps = pipeline.args.steps or settings.num_steps or settings.num_groups
        schedule = sampling_schedule(steps, settings.num_groups, settings.beta, pipeline.groups)
        flops = count_flops(lambda: tokenizer.velocity(noise, schedule[0], cond)) * len(schedule)
    name = torch.cuda.get_device_name() if pipeline.on_gpu else "CPU"
    floors = {"AR": count * max(reading + caching, computing), "decoder": batch * flops / products}
    print(f"{name}, {str(dtype)[6:]}, batch {batch}, guidance {'on' if rows > batch else 'off'}\n"
          f"memory bandwidth {bandwidth / 1e9:.1f} GB/s, matrix products {products / 1e12:.3f} "
          f"TFLOP/s\n"
          f"AR: {batch * count / drawing:.1f} tokens/s, {batch / drawing:.3g} images/s, "
          f"{floors['AR'] / drawing:.1%} of the floor\n"
          f"  a step takes {1e3 * drawing / count:.2f} ms; reading the weights "
          f"{1e3 * reading:.2f}, the cache {1e3 * caching:.2f}, computing {1e3 * computing:.2f}\n"
          f"decoder: {flops / 1e12:.2f} TFLOP an image, {batch / decoding:.3g} images/s, "
          f"{floors['decoder'] / decoding:.1%} of the floor\n"
          f"together: {batch / (drawing + decoding):.3g} images/s, peak memory "
          f"{peak_memory():.1f} GB")


# ---- The program ---------------------------------------------------------------------------------

def main(argv: list[str] | None = None):
    args = parse_args(argv)
    rank, _, device = join_processes()

    # Everything that can be wrong is looked at first
    if args.npz and os.path.exists(args.npz):
        if rank == 0:  # where it was killed at the very end
            shutil.rmtree(args.npz + ".parts", ignore_errors=True)
        raise ValueError(f"{args.npz} is there already; give --npz another name")
    paths = find_images(args.reconstruct)[:args.num] if args.reconstruct else []
    reference = read_image(args.prefix, 256) if args.prefix else None
    ar, tokenizer, classes = load_models(args, device)
    labels = parse_labels(args.labels, classes)
    args.keep = parse_keep(args.keep, tokenizer.config.num_tokens)
    os.makedirs(os.path.dirname(os.path.abspath(args.npz or args.out)), exist_ok=True)

    # Batches of about one size
    if args.stream or args.prefix:
        labels = labels if args.labels else labels[:10]
    count = len(paths) or args.num or (len(labels) if args.stream or args.prefix else 100)
    if args.stream and count > args.batch:
        raise ValueError(f"--stream draws one batch; give up to --batch, {args.batch}, images")
    batch = args.batch if args.benchmark else -(-count // -(-count // args.batch))
    pipeline = Pipeline(ar, tokenizer, args, batch, device)
    if args.benchmark:
        benchmark(pipeline, ar, labels)
    elif args.stream:
        write_stream(pipeline, args, labels)
    elif args.prefix:
        size = tokenizer.config.image_size
        write_layouts(pipeline, args, labels, to_tensor(center_crop(reference, size)))
    elif args.reconstruct:
        write_reconstructions(pipeline, args, paths, rank)
    elif args.npz:
        write_samples(pipeline, args, labels, count, rank)
    else:
        write_grid(pipeline, args, labels, count)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
