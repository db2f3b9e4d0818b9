"""Draws images from a trained model, in every way that the paper shows.

    python sample.py --cfg 1.1:10                         a grid, from out/ar/last.pt
    python sample.py --ckpt F --labels 207,360 --num 8    classes in turn, by number or name
    python sample.py --ckpt F --stream --labels 0,1,2     previews while tokens are drawn (Sec. 3.3)
    python sample.py --ckpt F --tokens 128                from the first 128 tokens only (Table 4)
    python sample.py --ckpt F --prefix IMAGE --keep 32,64 --labels 0,1    layout control (Fig. 8)
    python sample.py --ckpt F --reconstruct DIR           encodes and decodes images, for rFID
    torchrun --nproc_per_node=8 sample.py --ckpt F --num-images 50000 --npz samples.npz   for FID

F is a checkpoint of train_ar.py, which carries its tokenizer, or one of the authors' files together
with --tokenizer; to reconstruct, a tokenizer will do. Image i depends on the seed, i and its label
alone; but another --batch may round products otherwise. --stream and --reconstruct write beside
--out.
"""
import argparse
import hashlib
import inspect
import math
import os
import re
import shutil
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from itertools import cycle, islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fid import FORMATS, Mistake, find_images, run
from model_ar import AR, ARConfig, decode_one_token
from model_tokenizer import SOLVERS, TOKENIZERS, Tokenizer, TokenizerConfig


@dataclass
class SampleConfig:
    """What to draw, and how."""
    # Models
    ckpt: str = "out/ar/last.pt"   # checkpoint of train_ar.py, or one of the authors' files
    tokenizer: str = ""            # its tokenizer, for files that do not carry one
    # Images
    labels: str = ""               # class numbers or names, a,b,c; else all
    num_images: int = 0            # else 100; to reconstruct, all; to stream or keep, one a label
    seed: int = 0
    batch: int = 100               # images at a time
    out: str = "out/samples.png"   # the picture to write
    # Tokens
    cfg: str = ""                  # START:END, linear over the tokens, or none; else as trained
    temperature: float = 1.0       # 0: the most likely token
    top_k: int = 0                 # draw from the k likeliest tokens; 0: all
    top_p: float = 1.0             # draw from the likeliest tokens of this probability
    # Pixels
    tokens: int = 0                # read only the first tokens, whole groups; else all
    steps: int = 0                 # denoising steps; else K, as always with --stream
    solver: str = "adams2"         # or euler (Sec. 5, Table 6)
    # Modes, one at a time; else a grid
    stream: bool = False           # write each preview as it comes
    prefix: str = ""               # image whose first tokens are kept
    keep: str = ""                 # how many, a row each: a,b,c; else 1/8, 1/4, 1/2 of them
    reconstruct: str = ""          # folder of images to encode and decode
    npz: str = ""                  # file for the images as uint8 arr_0, which fid.py reads
    # Speed
    compile: bool = True           # torch.compile, on CUDA only


# ---- From labels to images -----------------------------------------------------------------------

@dataclass
class Pipeline:
    """Both models and the settings of a run: from numbers of images to images (B, 3, H, W) in
    [-1, 1]. What image i becomes depends on (seed, i) and its label, labels[i].

    On CUDA, the autoregressive model runs in bf16 and a compiled step reads each token; the decoder
    runs under bf16 autocast with compiled blocks.
    """

    config: SampleConfig
    ar: AR | None
    tokenizer: Tokenizer
    cfg: tuple | None   # guidance at the first and at the last token
    labels: list        # of all images
    batch: int
    device: torch.device

    def __post_init__(self):
        settings, tokens = self.tokenizer.config, self.config.tokens
        self.groups = tokens // settings.group_size or settings.num_groups
        if tokens % settings.group_size or tokens > settings.num_tokens:
            raise Mistake(f"--tokens must be a multiple of {settings.group_size}, and at most "
                          f"{settings.num_tokens}")
        self.decode_one_token = decode_one_token
        if self.ar is not None:
            self.ar.to(torch.bfloat16 if self.device.type == "cuda" else torch.float32)
            self.cache = self.ar.new_cache(self.batch if self.cfg is None else 2 * self.batch)
        if self.config.compile and self.device.type == "cuda":
            self.decode_one_token = torch.compile(
                decode_one_token, mode="reduce-overhead", fullgraph=True, dynamic=False)
            for block in self.tokenizer.diffusion.blocks:
                block.compile(dynamic=False)

    def noise(self, numbers):
        """The starting points (B, 3, H, W) of images, each a function of seed and number."""
        size = self.tokenizer.config.image_size
        generators = [seeded(self.config.seed, "start", i, device=self.device) for i in numbers]
        return torch.stack([torch.randn(3, size, size, generator=g, device=self.device)
                            for g in generators])

    def token_groups(self, numbers, prefix=None):
        """Yields tokens (B, N/K) of a whole batch, group by group, after a prefix (B, n)."""
        config = self.config
        generators = [seeded(config.seed, "tokens", i) for i in numbers]
        uniforms = [torch.rand(self.ar.config.num_tokens, generator=g) for g in generators]
        labels = torch.tensor([self.labels[i] for i in numbers], device=self.device)
        groups = self.ar.stream(
            labels, self.cfg, prefix, config.temperature, config.top_k, config.top_p,
            torch.stack(uniforms).to(self.device), self.tokenizer.config.group_size, self.cache,
            self.decode_one_token)
        return islice(groups, self.groups)

    def decode(self, numbers, tokens):
        """Images of tokens (B, n)."""
        config = self.config
        with autocast(self.device):
            return self.tokenizer.decode(
                tokens, self.noise(numbers), config.steps, config.solver, self.groups)

    def images(self, numbers, prefix=None):
        """Images of up to a batch of numbers, after a prefix (B, n) of a whole one. All batches
        have one shape: the last number is repeated."""
        padded = [*numbers] + [numbers[-1]] * (self.batch - len(numbers))
        tokens = torch.cat([*self.token_groups(padded, prefix)], 1)  # (B, n)
        return self.decode(padded, tokens)[:len(numbers)]

    def previews(self, numbers):
        """Yields images after each group of tokens of a whole batch, as soon as they are drawn."""
        pending = []
        previews = self.tokenizer.stream(
            iter(pending.pop, None), self.noise(numbers), self.config.solver, self.groups)
        for group in self.token_groups(numbers):
            pending.append(group)
            with autocast(self.device):  # of the decoder only, and not of whom the preview goes to
                preview = next(previews)
            yield preview


# ---- The modes -----------------------------------------------------------------------------------

def draw_grid(pipeline, columns):
    """A picture of samples."""
    numbers = torch.arange(len(pipeline.labels)).split(pipeline.batch)
    images = torch.cat([pipeline.images(part.tolist()) for part in numbers])
    save_picture(pipeline.config.out, image_grid(images, columns))


def draw_stream(pipeline):
    """Each preview as it comes; then a picture of all (rows: samples, columns: previews), an
    animation, and the last preview as --out."""
    stem = os.path.splitext(pipeline.config.out)[0]
    group_size = pipeline.tokenizer.config.group_size
    previews, frames = [], []
    for images in pipeline.previews([*range(pipeline.batch)]):
        previews.append(images)
        frames.append(image_grid(images, min(10, pipeline.batch)))
        save_picture(f"{stem}_{len(frames) * group_size:03d}.png", frames[-1])
    steps = torch.stack(previews, 1).flatten(0, 1)                  # (B K, 3, H, W)
    save_picture(f"{stem}_steps.png", image_grid(steps, len(previews)))
    save_picture(f"{stem}.gif", frames[0], save_all=True, append_images=frames[1:], duration=400)
    save_picture(pipeline.config.out, frames[-1])


def draw_layouts(pipeline):
    """Layout control: the first tokens of the image `--prefix`, in the first column, are kept, a
    number of them for each row; the others are drawn, for one label a column."""
    config, tokenizer = pipeline.config, pipeline.tokenizer
    photo = to_tensor(center_crop(read_image(config.prefix), tokenizer.config.image_size))
    photo = photo[None].to(pipeline.device)                         # (1, 3, H, W)
    tokens = tokenizer.encode(photo).expand(pipeline.batch, -1)     # (B, N)
    total = tokens.shape[1]
    kept = config.keep or f"{total // 8},{total // 4},{total // 2}"
    rows = []
    for n in kept.split(","):
        rows += [photo, pipeline.images(range(pipeline.batch), tokens[:, :int(n)])]
    save_picture(config.out, image_grid(torch.cat(rows), 1 + pipeline.batch))


def folder_of(pipeline, path, items):
    """Where the parts of a file are until it is whole."""
    models = pipeline.ar, pipeline.tokenizer
    return f"{path}.{digest(asdict(pipeline.config), pipeline.device.type, *models, items)}"


def draw_many(pipeline):
    """`--npz`: all images in one file."""
    folder = folder_of(pipeline, pipeline.config.npz, pipeline.labels)
    paths = shards(folder, len(pipeline.labels), pipeline.batch,
                   lambda numbers: to_uint8(pipeline.images(numbers)))
    if rank() == 0:
        size = pipeline.tokenizer.config.image_size
        shape = len(pipeline.labels), size, size, 3
        write_npz(pipeline.config.npz, shape, (np.load(path) for path in paths))
        shutil.rmtree(folder)


def reconstruct(pipeline, files):
    """`--reconstruct`: pairs as a picture, all originals and reconstructions as npz, PSNR."""
    folder = folder_of(pipeline, pipeline.config.out, files)
    size = pipeline.tokenizer.config.image_size

    def make(numbers):
        photos = [read_image(files[i]) for i in numbers]
        images = torch.stack([to_tensor(center_crop(photo, size)) for photo in photos])
        images = images.to(pipeline.device)                         # (n, 3, H, W)
        decoded = pipeline.decode(numbers, pipeline.tokenizer.encode(images))
        return np.stack([to_uint8(images), to_uint8(decoded)])      # (2, n, H, W, 3)

    paths = shards(folder, len(files), pipeline.batch, make)
    if rank() > 0:
        return
    stem = os.path.splitext(pipeline.config.out)[0]
    for i, name in enumerate(("originals", "reconstructions")):
        shape = len(files), size, size, 3
        write_npz(f"{stem}_{name}.npz", shape, (np.load(path)[i] for path in paths))
    shown = from_uint8(np.load(paths[0])[:, :20]).transpose(0, 1).flatten(0, 1)
    save_picture(pipeline.config.out, image_grid(shown, min(10, len(shown))))
    pairs = (from_uint8(np.load(path)) for path in paths)
    decibels = [len(images) * psnr(decoded, images) for images, decoded in pairs]
    print(f"PSNR {sum(decibels) / len(files):.2f} dB over {len(files):,} images")
    shutil.rmtree(folder)


# ---- The program ---------------------------------------------------------------------------------

def parse_cfg(text):
    """Guidance (start, end): "1.1:10" runs linearly over the tokens, "4" is constant, "none" is
    off."""
    start, _, end = text.partition(":")
    try:
        return None if text == "none" else (float(start), float(end or start))
    except ValueError:
        raise Mistake(f"--cfg must be START:END, one number, or none, got {text!r}") from None


def labels_of(config, classes):
    """The label of each image to draw: of `--labels`, numbers or names, or of all classes in turn;
    for `--npz`, these are shuffled."""
    count = len(classes)
    known = [*classes, *map(str, range(count))]  # each class twice: by name, by number
    labels = []
    for part in config.labels.split(",") if config.labels else classes:
        if part not in known:
            raise Mistake(f"--labels: no class {part!r}; give numbers below {count} or "
                          f"names such as {', '.join(classes[:10])}")
        labels.append(known.index(part) % count)
    single = config.stream or config.prefix
    if single and not config.labels:
        labels = labels[:10]
    total = config.num_images or (len(labels) if single else 100)
    labels = [*islice(cycle(labels), total)]
    if config.npz:
        np.random.default_rng(seed_of(config.seed, "labels")).shuffle(labels)
    return labels


def check_flags(config):
    """Raises a Mistake for flags that do not go together, and for files in the way."""
    if sum(map(bool, (config.stream, config.prefix, config.reconstruct, config.npz))) > 1:
        raise Mistake("--stream, --prefix, --reconstruct and --npz exclude one another")
    if config.solver not in SOLVERS or not config.out.lower().endswith((".png", ".jpg", ".webp")):
        raise Mistake(f"--solver must be one of {', '.join(SOLVERS)}, and --out end in .png, .jpg "
                      "or .webp")
    if os.path.exists(config.npz):
        raise Mistake(f"{config.npz} is there already; give another name")


def main(argv=None):
    # Settings and processes
    (config,) = parse({"": (SampleConfig(),)}, argv, __doc__)
    check_flags(config)
    device = join_processes()
    if rank() > 0 and not (config.npz or config.reconstruct):
        return leave_processes()  # one process draws a picture

    # Models; what to draw
    tokenizer = load_tokenizer(config.tokenizer or config.ckpt, device)
    ar, cfg, labels, files = None, None, [], []
    if config.reconstruct:
        names = find_images(config.reconstruct, quiet=rank() > 0)
        chosen = spread(config.num_images or len(names), len(names))
        files = [os.path.join(config.reconstruct, names[i]) for i in chosen]
    else:
        saved = load_checkpoint(config.ckpt, "ar")
        labels = labels_of(config, saved["classes"])
        guidance = config.cfg or "{cfg_start}:{cfg_end}".format(**saved["settings"])
        cfg = parse_cfg(guidance)
        print0(f"guidance {guidance}" + " as trained" * (not config.cfg))
        ar = load_ar(config.ckpt, device, tokenizer.config.num_tokens)
        if (ar.config.vocab_size, ar.config.num_tokens) != (tokenizer.config.codebook_size,
                                                            tokenizer.config.num_tokens):
            raise Mistake(f"{config.ckpt} predicts the tokens of another tokenizer")

    # Images
    count = len(labels or files)
    batch = count if config.stream or config.prefix else min(count, config.batch)
    pipeline = Pipeline(config, ar, tokenizer, cfg, labels, batch, device)
    if config.stream:
        draw_stream(pipeline)
    elif config.prefix:
        draw_layouts(pipeline)
    elif config.reconstruct:
        reconstruct(pipeline, files)
    elif config.npz:
        draw_many(pipeline)
    else:
        columns = len({*labels})
        draw_grid(pipeline, min(columns if columns > 1 else count, 10))
    leave_processes()


# ==== What the other scripts use too ==============================================================

# ---- Settings ------------------------------------------------------------------------------------

MAY_BE_ZERO = {"temperature", "workers", "lr", "lr_final", "warmup_steps", "decay_steps", "ema",
               "vq", "lpips", "repa", "repa_depth", "commitment", "dropout", "class_dropout",
               "weight_decay", "save_minutes", "cfg_start"}
SHARES = {"ema", "beta1", "beta2", "dropout", "class_dropout"}  # below 1


def check(config):
    """Raises a Mistake where a number of a dataclass is not finite, negative, or 0 without a
    meaning."""
    for field in fields(config):
        value = getattr(config, field.name)
        flag = "--" + field.name.replace("_", "-")
        if field.type in (int, float):
            zero = field.default == 0 or field.name in MAY_BE_ZERO
            if not (0 < value < math.inf or zero and value == 0):
                raise Mistake(f"{flag} must be {'0 or ' * zero}a positive number, got {value}")
            if field.name in SHARES and value >= 1:
                raise Mistake(f"{flag} must be below 1, got {value}")


def parse(presets, argv, text):
    """The dataclasses of the preset that --preset names (if there are several), with the flags that
    were given, one a field. text: what --help says. A mistake ends the program, as in argparse."""
    parser = argparse.ArgumentParser(
        description=text, usage="%(prog)s [--flag VALUE ...]; --help lists the flags",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    first = next(iter(presets))
    if len(presets) > 1:
        parser.add_argument("--preset", choices=presets, default=first)
    for part in presets[first]:
        comments = dict(re.findall(r"(\w+): [^#\n]*# (.*)", inspect.getsource(type(part))))
        for field in fields(part):
            kind = {"type": field.type}
            if field.type is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            help = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
            parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                                help=help, **kind)
    given = vars(parser.parse_args(argv))
    configs = []
    for part in presets[given.pop("preset", first)]:
        own = {name: value for name, value in given.items() if hasattr(part, name)}
        try:
            configs.append(replace(part, **own))
            check(configs[-1])
        except (Mistake, AssertionError) as error:
            parser.error(str(error))
    return configs


# ---- Files ---------------------------------------------------------------------------------------

def write(path, save):
    """Calls save(file) on a temporary file, then renames it to `path`, which thus is always whole.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def shards(folder, count, size, make):
    """Paths of files that hold make(numbers) of each `size` of `count` numbers. Processes share the
    work in a folder that all nodes see, and what is there is not made again: a run that was killed
    goes on. The folder's name should hold a `digest` of all that `make` depends on."""
    parts = [range(count)[i:i + size] for i in range(0, count, size)]
    paths = [os.path.join(folder, f"{numbers.start:08d}.npy") for numbers in parts]
    for numbers, path in islice(zip(parts, paths), rank(), None, world()):
        if not os.path.exists(path):
            began = time.time()
            rows = make(numbers)
            write(path, lambda file: np.save(file, rows))
            rate = world() * len(numbers) / (time.time() - began)
            print0(f"{numbers.stop:,} of {count:,} images, {rate:.1f} a second")
    wait()
    return paths


def write_npz(path, shape, parts):
    """Writes parts of a uint8 array of some shape as arr_0, one after another, never all at once.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}

    def save(file):
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(part.tobytes())

    write(path, save)
    print(path)


def save_picture(path, image, **options):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    image.save(path, **options)
    print(path, flush=True)


# ---- Pixels --------------------------------------------------------------------------------------

def read_image(path, draft_size=0):
    """The image in a file in 8-bit RGB. With a draft_size, a large JPEG is decoded at a fraction of
    at least twice that. EXIF turns are ignored, as is custom on ImageNet. Raises Mistake."""
    try:
        image = Image.open(path, formats=FORMATS)
        if draft_size:
            image.draft("RGB", (2 * draft_size, 2 * draft_size))
        return to_rgb(image)
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, bombs, ...
        raise Mistake(f"{path} cannot be read as an image ({error!r})") from None


def to_rgb(image):
    """8-bit RGB of an image of any mode; 16-bit ones are scaled, not cut, transparent ones lie on
    white."""
    if image.mode.startswith("I"):
        pixels = np.array(image) / 256
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_tensor(image):
    """(3, H, W) float32 in [-1, 1] of a Pillow image of any mode."""
    return from_uint8(to_rgb(image))


def to_uint8(images):
    """(B, H, W, 3) uint8 of images (B, 3, H, W) in [-1, 1], rounded as DiT's samples are."""
    pixels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(pixels):
    """(..., 3, H, W) float32 in [-1, 1] of pixels (..., H, W, 3) uint8."""
    return torch.from_numpy(np.array(pixels)).movedim(-1, -3) / 127.5 - 1


def spread(count, total):
    """Up to `count` of `total` numbers, always the same ones, from all over the list."""
    return sorted(np.random.default_rng(0).permutation(total)[:count].tolist())


def psnr(decoded, images):
    """Mean peak signal-to-noise ratio in dB of decoded images (B, 3, H, W) in [-1, 1], clipped."""
    error = (decoded.clamp(-1, 1) - images).pow(2).mean((1, 2, 3)) / 4       # pixels in [0, 1]
    return (-10 * error.log10()).mean().item()


def resize_shorter(image, size):
    """Resizes so that the shorter side is `size` pixels, as ADM does: boxes, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    return image.resize(shape, Image.Resampling.BICUBIC)


def center_crop(image, size):
    """The centred square of size x size pixels, the shorter side resized to `size`. ADM's crop."""
    image = resize_shorter(to_rgb(image), size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_grid(images, columns):
    """One picture of images (B, 3, H, W) in rows of `columns`, 2 pixels apart on white; images
    narrower than 64 pixels are enlarged by a whole factor that keeps them within 64."""
    zoom = max(1, 64 // images.shape[-1])
    images = F.interpolate(images, scale_factor=zoom)
    missing = -len(images) % columns
    images = F.pad(images, (0, 2, 0, 2, 0, 0, 0, missing), value=1.0)  # (B, 3, h, w)
    height, width = images.shape[2:]
    grid = to_uint8(images).reshape(-1, columns, height, width, 3).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(-1, columns * width, 3)[:-2, :-2])


# ---- Checkpoints ---------------------------------------------------------------------------------

class ReleasedConfig:
    """Stands for the class config_util.Config of the authors' files; its plain dict is `_data`."""


def load_checkpoint(path, kind):
    """The dict in a checkpoint of kind "tokenizer" or "ar", ours or the authors' translated; of a
    tokenizer also that which one of kind "ar" carries. Nothing is unpickled but tensors, plain data
    and the authors' two classes of settings. Raises Mistake."""
    if not os.path.isfile(path):
        raise Mistake(f"no checkpoint at {path}")
    allowed = [argparse.Namespace, (ReleasedConfig, "config_util.Config")]
    try:
        with torch.serialization.safe_globals(allowed):
            saved = torch.load(path, "cpu", weights_only=True, mmap=True)
        saved = saved if "kind" in saved else translate(saved)
    except Exception:  # torch raises many kinds
        raise Mistake(f"{path} is no checkpoint of this code or the authors': damaged, of another "
                      "format, or with objects in it that are not tensors") from None
    if kind == "tokenizer" and saved["kind"] == "ar":
        if "tokenizer" not in saved:
            raise Mistake(f"{path} carries no tokenizer; give --tokenizer FILE")
        saved = saved["tokenizer"]
    if saved["kind"] != kind:
        raise Mistake(f"{path} is a checkpoint of kind {saved['kind']!r}, {kind!r} is needed")
    return saved


def build(model_class, config, saved, device):
    """The model in a checkpoint's dict, with averaged weights if there are any, in eval mode."""
    with torch.device("meta"):
        model = model_class(config)
    weights = saved.get("ema") or saved["model"]
    weights = {name: value.to(device, torch.float32) for name, value in weights.items()
               if not name.startswith("repa_head.")}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_tokenizer(path, device="cpu"):
    """The tokenizer in a checkpoint of train_tokenizer.py or train_ar.py, or in one of the authors'
    files (D-AR-tokenizer_v1.pt). Raises Mistake."""
    saved = load_checkpoint(path, "tokenizer")
    config = TokenizerConfig(**{**saved["config"], "repa_depth": 0})
    return build(Tokenizer, config, saved, device)


def load_ar(path, device="cpu", num_tokens=256):
    """The model in a checkpoint of train_ar.py, or in one of the authors' files (D-AR-L-360K.pt,
    D-AR-XL-360K.pt, bare state dicts), which do not tell `num_tokens`. Raises Mistake."""
    saved = load_checkpoint(path, "ar")
    config = ARConfig(**{"num_tokens": num_tokens, **saved["config"]})
    return build(AR, config, saved, device)


def pack(kind, model):
    """What a checkpoint needs to rebuild a model."""
    return {"kind": kind, "config": asdict(model.config), "model": model.state_dict()}


def digest(*things):
    """Ten hex digits that stand for settings and models with their weights."""
    hasher = hashlib.sha256()
    for thing in things:
        if isinstance(thing, nn.Module):
            hasher.update(str(thing.config).encode())
            for value in thing.state_dict().values():
                hasher.update(value.cpu().float().numpy())
        else:
            hasher.update(str(thing).encode())
    return hasher.hexdigest()[:10]


# ---- The authors' files --------------------------------------------------------------------------

RELEASED_NAMES = (  # a tensor's name in the authors' tokenizer -> ours: these changes, in order
    ("encoder_layers.", "encoder.blocks."), ("patchify.", "encoder.from_pixels."),
    ("query_embedding.weight", "encoder.query_table"), ("query_linear.", "encoder.query_up."),
    ("quant_in_conv.", "encoder.to_code."), ("quantize.embedding.weight", "quantizer.codebook"),
    ("quant_out_conv.", "decoder.from_code."), ("decoder_embedding.weight", "decoder.positions"),
    ("decoder_layers.", "decoder.blocks."), ("diff_decoder.net.cond_mlp.", "diffusion.from_cond."),
    ("diff_decoder.net.conv_in.", "diffusion.from_pixels."),
    ("diff_decoder.net.conv_out.", "diffusion.to_pixels."),
    ("diff_decoder.net.blocks.", "diffusion.blocks."), (".cross_attn.", ".cross_attention."),
    (".proj.", ".out."), (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.2."),
    (".time_embed.mlp.", ".time_mlp."), (".cond_embed.", ".cond_mlp."),
    (".adaLN_modulation.1.", ".modulation."),
)
RELEASED_SETTINGS = {  # a setting's name in the authors' tokenizer: our field
    "sampling_resolution": "image_size", "num_all_queries": "num_tokens",
    "num_query_groups": "num_groups", "vq_dim": "code_dim", "encoder_patch_size": "patch_size",
    "encoder_dim": "encoder_width", "num_encoder_layers": "encoder_depth",
    "decoder_dim": "decoder_width", "num_decoder_layers": "decoder_depth",
    # In its part diff_decoder
    "dim": "diffusion_width", "depth": "diffusion_depth", "patch_size": "diffusion_patch",
    "data_std": "sigma", "time_shift": "beta",
}


def translate(saved):
    """One of the authors' files as a checkpoint of ours. Averaged weights (`ema`) come first."""
    weights = saved
    for key in ("state_dict", "module", "model", "ema"):
        weights = saved.get(key, weights)
    weights = {name.replace("_orig_mod.", "").removeprefix("module."): value
               for name, value in weights.items()}
    if "tok_embeddings.weight" in weights:
        return translate_ar(weights)
    found = saved.get("config", {})
    found = getattr(found, "_data", found).get("model", {})
    found = {**found, **found.get("diff_decoder", {})}
    config = asdict(TOKENIZERS["paper"])
    for theirs, ours in RELEASED_SETTINGS.items():
        config[ours] = found.get(theirs, config[ours])
    config["codebook_size"] = len(weights["quantize.embedding.weight"])
    model = {}
    for name, value in weights.items():
        if "codebook_used" in name or "repa_out" in name:  # a counter, and a head, of training
            continue
        for theirs, ours in RELEASED_NAMES:
            name = name.replace(theirs, ours)
        model[name] = value.flatten(1) if value.ndim == 4 else value  # of convolutions of patches
    return {"kind": "tokenizer", "config": config, "model": model}


def translate_ar(weights):
    """The authors' weights of an autoregressive model, whose names are ours but for one, as a
    checkpoint of ours, without `num_tokens`; heads are 64 wide."""
    model = {name.replace(".embedding_table", ""): value for name, value in weights.items()}
    vocab_size, width = model["tok_embeddings.weight"].shape
    num_classes = len(model["cls_embedding.weight"]) - 1
    depth = sum(name.endswith("attention.wo.weight") for name in model)
    config = {"depth": depth, "width": width, "heads": width // 64, "vocab_size": vocab_size,
              "num_classes": num_classes}
    settings = {"cfg_start": 1.1, "cfg_end": 8.0 if depth <= 24 else 10.0}  # App. II
    classes = [str(i) for i in range(num_classes)]
    return {"kind": "ar", "config": config, "model": model, "classes": classes,
            "settings": settings}


# ---- Seeds and processes -------------------------------------------------------------------------

def seed_of(*key):
    """A seed that is a function of the key: the run's seed, what it is for, and which one."""
    text = " ".join(map(str, key))
    return int(hashlib.sha256(text.encode()).hexdigest()[:14], 16)


def seeded(*key, device="cpu"):
    """A random generator that is a function of the key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def join_processes():
    """The device of this process, which joins the others where torchrun started it."""
    launched = dist.is_torchelastic_launched()  # whatever else the environment says
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank() if launched else 0)
        torch.cuda.set_device(device)
    if launched:  # processes wait for one another for long, while they share out the tokens
        dist.init_process_group(timeout=timedelta(hours=12))
    return device


def leave_processes():
    if dist.is_initialized():
        wait()  # for the first one to have saved
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def print0(text):
    """Prints in the first process."""
    if rank() == 0:
        print(text, flush=True)


def autocast(device):
    """bf16 on a GPU, float32 on a CPU, where bf16 is not faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


if __name__ == "__main__":
    run(main)
