"""Draws images from a trained model, in every way that the paper shows.

    python sample.py --cfg 1.1:10                         a grid, from out/ar/last.pt
    python sample.py --ckpt F --labels 207,360            classes in turn, by number or name
    python sample.py --ckpt F --stream --labels 0,1,2     previews while tokens are drawn (Sec. 3.3)
    python sample.py --ckpt F --tokens 128                from the first 128 tokens only (App. II)
    python sample.py --ckpt F --prefix IMAGE --keep 32,64 --labels 0,1    layout control (Fig. 8)
    python sample.py --ckpt F --reconstruct DIR           encodes and decodes images, for rFID
    torchrun --nproc_per_node=8 sample.py --ckpt F --num-images 50000 --npz samples.npz   for FID

F is a checkpoint of train_ar.py, which carries its tokenizer, or one of the authors' files together
with --tokenizer; to reconstruct, a tokenizer will do. Image i depends on the seed, i and its label
alone; but another --batch may round products differently. --stream and --reconstruct write beside
--out.
"""
import argparse
import functools
import hashlib
import inspect
import math
import os
import shutil
import time
import unicodedata
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fid import FORMATS, Mistake, find_images, open_npz, run
from model_ar import AR, ARConfig, RecordedStep
from model_tokenizer import SOLVERS, TOKENIZERS, Tokenizer, TokenizerConfig


@dataclass
class SampleConfig:
    """What to draw, and how."""
    # Models
    ckpt: str = "out/ar/last.pt"   # checkpoint of train_ar.py, or one of the authors' files
    tokenizer: str = ""            # its tokenizer, else that which the file carries
    # Images
    labels: str = ""               # class numbers or names, a,b,c; else all
    num_images: int = 0            # else 100; all with --reconstruct; one a label (at most 10,
                                   # if none are given) with --stream and --prefix
    seed: int = 0
    batch: int = 100               # images at a time
    out: str = "out/samples.png"   # the picture to write
    # Tokens
    cfg: str = ""                  # START:END, linear, or none; else the checkpoint's
    temperature: float = 1.0       # 0: the most likely token
    top_k: int = 0                 # draw from the k likeliest tokens; 0: all
    top_p: float = 1.0             # draw from the likeliest tokens of this probability
    # Pixels
    tokens: int = 0                # read only so many first tokens, whole groups; else all
    steps: int = 0                 # denoising steps; else K, as always with --stream
    solver: str = "adams2"         # or euler (Sec. 5, Table 6)
    # Modes, one at a time; else a grid
    stream: bool = False           # write each preview as it comes
    prefix: str = ""               # image whose first tokens are kept
    keep: str = ""                 # how many of them, a row each: a,b,c; else 1/8, 1/4, 1/2
    reconstruct: str = ""          # folder of images to encode and decode
    npz: str = ""                  # file for the images as uint8 arr_0, which fid.py reads
    # Speed
    compile: bool = True           # torch.compile, on CUDA only, from 5,000 images a
                                   # process on: below, it takes longer than it saves


# ---- From labels to images -----------------------------------------------------------------------

@dataclass
class Pipeline:
    """Both models and the settings of a run: from the images' numbers i to images (B, 3, H, W) in
    [-1, 1]. What image i becomes depends on (seed, i) and inputs[i].

    On CUDA, the autoregressive model is in bf16, its step for a token is recorded, and what turns
    tokens into images runs under bf16 autocast.
    """

    config: SampleConfig
    ar: AR | None
    tokenizer: Tokenizer
    inputs: list        # one an image: its label or, to be reconstructed, its file
    device: torch.device

    def __post_init__(self):
        config, sizes = self.config, self.tokenizer.config
        self.groups = config.tokens // sizes.group_size or sizes.num_groups
        if config.tokens % sizes.group_size or config.tokens > sizes.num_tokens:
            raise Mistake(f"--tokens must be a multiple of {sizes.group_size}, and at most "
                          f"{sizes.num_tokens}")
        self.batch = len(self.inputs)
        if not (config.stream or config.prefix):
            self.batch = min(self.batch, config.batch)
        # Only these: encode stays in float32, and around a generator autocast would stay on for
        # whoever takes its previews.
        for part in (self.tokenizer.decoder, self.tokenizer.diffusion):
            part.forward = autocast(self.device)(part.forward)
        on_cuda = self.device.type == "cuda"
        if self.ar is not None:
            if on_cuda:
                self.ar.bfloat16()
            self.cfg = parse_cfg(config.cfg)  # guidance at the first and at the last token
            self.cache = self.ar.new_cache(self.batch if self.cfg is None else 2 * self.batch)
            self.recorded = RecordedStep() if on_cuda else None
        if on_cuda and config.compile and len(self.inputs) >= 5000 * world():
            for model in filter(None, (self.ar, self.tokenizer)):
                compile_blocks(model)

    def padded(self, numbers):
        """Numbers for whole batches: the last one is repeated, so that all have one shape."""
        return list(numbers) + [numbers[-1]] * (-len(numbers) % self.batch)

    def read(self, paths):
        """Images (n, 3, H, W) of files, centre-cropped."""
        size = self.tokenizer.config.image_size
        crops = [to_tensor(center_crop(read_image(path), size)) for path in paths]
        return torch.stack(crops).to(self.device)

    def noise(self, numbers):
        """The starting points (B, 3, H, W) of images."""
        size = self.tokenizer.config.image_size
        return draw_noise((self.config.seed, "start"), numbers, size, self.device)

    def token_groups(self, numbers, prefix=None):
        """Yields tokens (B, N/K) of a whole batch, group by group; a prefix (B, n) comes first."""
        config = self.config
        uniforms = torch.stack([
            torch.rand(self.ar.config.num_tokens, generator=seeded(config.seed, "tokens", i))
            for i in numbers])
        labels = torch.tensor([self.inputs[i] for i in numbers], device=self.device)
        groups = self.ar.stream(
            labels, self.cfg, prefix, config.temperature, config.top_k, config.top_p,
            uniforms.to(self.device), self.tokenizer.config.group_size, self.cache, self.recorded)
        return islice(groups, self.groups)

    def decode(self, numbers, tokens):
        """Images of tokens (B, n)."""
        config = self.config
        return self.tokenizer.decode(
            tokens, self.noise(numbers), config.steps, config.solver, self.groups)

    def images(self, numbers, prefix=None):
        """Images of a whole batch of numbers, whose first tokens are a prefix (B, n), if any."""
        tokens = torch.cat(list(self.token_groups(numbers, prefix)), 1)  # (B, n)
        return self.decode(numbers, tokens)

    def previews(self, numbers):
        """Yields images after each group of tokens of a whole batch, as soon as they are drawn."""
        return self.tokenizer.stream(self.token_groups(numbers), self.noise(numbers),
                                     self.config.solver, self.groups)


# ---- The modes -----------------------------------------------------------------------------------

def draw_grid(pipeline):
    """A picture of samples; few classes have a column each."""
    count, size = len(pipeline.inputs), pipeline.batch
    numbers = pipeline.padded(range(count))
    images = [pipeline.images(numbers[i:i + size]) for i in range(0, count, size)]
    classes = len(set(pipeline.inputs))
    columns = min(classes if classes > 1 else count, 10)
    save_picture(pipeline.config.out, image_grid(torch.cat(images)[:count], columns))


def draw_stream(pipeline):
    """Each preview as it comes; then a picture of all (rows: samples, columns: previews), an
    animation, and the last preview as --out."""
    stem = os.path.splitext(pipeline.config.out)[0]
    group_size = pipeline.tokenizer.config.group_size
    previews, frames = [], []
    for images in pipeline.previews(range(pipeline.batch)):
        previews.append(images)
        frames.append(image_grid(images, min(10, pipeline.batch)))
        save_picture(f"{stem}_{len(frames) * group_size:03d}.png", frames[-1])
    steps = torch.stack(previews, 1).flatten(0, 1)                  # (B x previews, 3, H, W)
    save_picture(f"{stem}_steps.png", image_grid(steps, len(previews)))
    save_picture(f"{stem}.gif", frames[0], save_all=True, append_images=frames[1:], duration=400)
    save_picture(pipeline.config.out, frames[-1])


def draw_layouts(pipeline):
    """Layout control: the first tokens of the image `--prefix`, in the first column, are kept, a
    number of them for each row; the others are drawn, for one label a column."""
    config = pipeline.config
    photo = pipeline.read([config.prefix])                          # (1, 3, H, W)
    tokens = pipeline.tokenizer.encode(photo).expand(pipeline.batch, -1)  # (B, N)
    total = tokens.shape[1]
    kept = config.keep or f"{total // 8},{total // 4},{total // 2}"
    for text in kept.split(","):
        if not text.isdecimal() or int(text) > total:
            raise Mistake(f"--keep needs whole numbers up to {total}, a,b,c, got {text!r}")
    rows = []
    for text in kept.split(","):
        rows += [photo, pipeline.images(range(pipeline.batch), tokens[:, :int(text)])]
    save_picture(config.out, image_grid(torch.cat(rows), 1 + pipeline.batch))


def write_npz(pipeline, paths, make):
    """Writes all images as uint8 arr_0 of npz files, never all at once: make(numbers) gives those
    of a whole batch, (B, 3, H, W) for each path. A run that was killed goes on."""
    config, inputs, size = pipeline.config, pipeline.inputs, pipeline.tokenizer.config.image_size
    name = digest(config, inputs, pipeline.device.type, pipeline.ar, pipeline.tokenizer)
    folder = f"{paths[0]}.{name}"
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(inputs), size, size, 3)}

    def rows(numbers):
        batches = make(pipeline.padded(numbers))
        images = [to_uint8(batch[:len(numbers)]) for batch in batches]
        return np.stack(images)                                     # (paths, n, H, W, 3)

    parts = shards(folder, len(inputs), pipeline.batch, rows)

    def save(file, i):
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(np.load(part)[i])  # of the i-th file, (n, H, W, 3)

    if rank() > 0:
        return
    if not os.path.exists(config.npz):  # else a twin of this command wrote it
        for i, path in enumerate(paths):
            write(path, lambda file: save(file, i))
            print(path)
    shutil.rmtree(folder, ignore_errors=True)


def draw_many(pipeline):
    """`--npz`: all images in one file."""
    write_npz(pipeline, [pipeline.config.npz], lambda numbers: [pipeline.images(numbers)])


def reconstruct(pipeline):
    """`--reconstruct`: all originals and reconstructions as npz, pairs as a picture, PSNR."""
    def make(numbers):
        images = pipeline.read([pipeline.inputs[i] for i in numbers])
        return images, pipeline.decode(numbers, pipeline.tokenizer.encode(images))

    stem = os.path.splitext(pipeline.config.out)[0]
    paths = [f"{stem}_originals.npz", f"{stem}_reconstructions.npz"]
    write_npz(pipeline, paths, make)
    if rank() > 0:
        return
    shown = np.stack([next(open_npz(path).batches(20)) for path in paths], 1)  # (n, 2, H, W, 3)
    shown = to_tensor(shown).flatten(0, 1)                          # (2 n, 3, H, W)
    save_picture(pipeline.config.out, image_grid(shown, min(10, len(shown))))
    pairs = zip(*[open_npz(path).batches(1) for path in paths])
    decibels = [psnr(to_tensor(decoded), to_tensor(image)) for image, decoded in pairs]
    print(f"PSNR {np.mean(decibels):.2f} dB over {len(decibels):,} images")


# ---- The program ---------------------------------------------------------------------------------

def parse_cfg(text):
    """Guidance (start, end): "1.1:10" runs linearly over the tokens, "4" is constant, "none" is
    off."""
    if text == "none":
        return None
    start, _, end = text.partition(":")
    with suppress(ValueError):
        cfg = float(start), float(end or start)
        if np.isfinite(cfg).all():
            return cfg
    raise Mistake(f"--cfg must be START:END, one number, or none, got {text!r}")


def labels_of(config, classes):
    """The label of each image to draw: of `--labels`, numbers or names, or of all classes in turn;
    for `--npz`, these are shuffled."""
    count = len(classes)
    known = list(classes)
    if not any(name.isdecimal() for name in classes):  # else a number is a name
        known += map(str, range(count))
    labels = []
    for part in config.labels.split(",") if config.labels else classes:
        part = unicodedata.normalize("NFC", part)
        if part not in known:
            raise Mistake(f"--labels: no class {part!r}; give names such as "
                          f"{', '.join(classes[:10])}, or numbers from 0 to {count - 1} "
                          "where no name is a number")
        labels.append(known.index(part) % count)  # after the names come the numbers
    single = config.stream or config.prefix
    if single and not config.labels:
        labels = labels[:10]
    total = config.num_images or (len(labels) if single else 100)
    labels = np.resize(labels, total).tolist()  # in turn
    if config.npz:
        np.random.default_rng(seed_of(config.seed, "labels")).shuffle(labels)
    return labels


UNUSED = {  # by mode: some flags without effect
    "stream": ["batch", "keep", "steps"], "prefix": ["batch"], "npz": ["keep", "out"],
    "reconstruct": ["keep", "labels", "cfg", "temperature", "top_k", "top_p"],
}


def check_flags(config):
    """Raises a Mistake for flags that do not go together, and for files in the way."""
    if os.path.exists(config.npz):
        raise Mistake(f"{config.npz} is there already; give another name")
    modes = [mode for mode in UNUSED if getattr(config, mode)]
    if len(modes) > 1:
        raise Mistake("--stream, --prefix, --reconstruct and --npz exclude one another")
    for name in UNUSED[modes[0]] if modes else ["keep"]:
        if getattr(config, name) != getattr(SampleConfig, name):
            raise Mistake(f"--{name.replace('_', '-')} has no effect here; leave it out")
    if config.solver not in SOLVERS or not config.out.lower().endswith((".png", ".jpg", ".webp")):
        raise Mistake(f"--solver must be one of {', '.join(SOLVERS)}, and --out end in .png, .jpg "
                      "or .webp")


def main(argv=None):
    # Settings and processes
    (config,) = parse({"": (SampleConfig(),)}, argv, __doc__)
    check_flags(config)
    device = join_processes()
    if rank() > 0 and not (config.npz or config.reconstruct):
        return leave_processes()  # one process draws a picture

    # Reconstructions
    tokenizer = load_tokenizer(config.tokenizer or config.ckpt, device)
    if config.reconstruct:
        names = find_images(config.reconstruct, quiet=rank() > 0)
        chosen = spread(config.num_images or len(names), len(names))
        files = [f"{config.reconstruct}/{names[i]}" for i in chosen]
        reconstruct(Pipeline(config, None, tokenizer, files, device))
        return leave_processes()

    # The autoregressive model; what to draw
    saved = load_checkpoint(config.ckpt, "ar")
    labels = labels_of(config, saved["classes"])
    if not config.cfg:
        config.cfg = "{cfg_start}:{cfg_end}".format(**saved["settings"])
        print0(f"guidance {config.cfg}, as the checkpoint says")
    sizes = tokenizer.config
    ar = load_ar(config.ckpt, device, sizes.num_tokens)
    if (ar.config.vocab_size, ar.config.num_tokens) != (sizes.codebook_size, sizes.num_tokens):
        raise Mistake(f"{config.ckpt} predicts the tokens of another tokenizer")
    if config.tokenizer:  # else it is the one that the checkpoint carries
        compare_tokens(saved, config.ckpt, tokenizer)

    # Images
    pipeline = Pipeline(config, ar, tokenizer, labels, device)
    if config.stream:
        draw_stream(pipeline)
    elif config.prefix:
        draw_layouts(pipeline)
    elif config.npz:
        draw_many(pipeline)
    else:
        draw_grid(pipeline)
    leave_processes()


# ==== What the other scripts use too ==============================================================

# ---- Settings ------------------------------------------------------------------------------------

MAY_BE_ZERO = {"workers", "warmup_steps", "decay_steps", "repa_depth"}
SHARES = {"ema", "beta1", "beta2", "dropout", "class_dropout"}  # below 1


def check(config):
    """Raises a Mistake where a number of a dataclass is negative or not finite, a count is 0 where
    that means nothing, or a share is not below 1."""
    for field in fields(config):
        if field.type in (int, float):
            value = getattr(config, field.name)
            counts = field.type is int and field.default != 0 and field.name not in MAY_BE_ZERO
            least = 1 if counts else 0
            limit = 1 if field.name in SHARES else math.inf
            if not least <= value < limit:
                raise Mistake(f"--{field.name.replace('_', '-')} must be at least {least} and "
                              f"below {limit}, got {value}")


def parse(presets, argv, text):
    """The dataclasses of the preset that --preset names (if there are several), with the flags that
    were given, one a field. text: what --help says, before the fields as they stand in the source.
    A mistake ends the program, as in argparse."""
    first = next(iter(presets))
    source = "\n".join(inspect.getsource(type(part)) for part in presets[first])
    parser = argparse.ArgumentParser(
        description=text, usage="%(prog)s [--flag VALUE ...]", epilog=f"Flags:\n\n{source}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    if len(presets) > 1:
        parser.add_argument("--preset", choices=presets, default=first)
    for part in presets[first]:
        for field in fields(part):
            kind = {"type": field.type}
            if field.type is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                                help=argparse.SUPPRESS, **kind)
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
    """Calls save(file) on a temporary file, of another name in each process, then renames it to
    `path`, which thus is always whole. Raises OSError or Mistake."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.urandom(4).hex()}.tmp"
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # so torch says that the disk is full
        raise Mistake(f"{path} cannot be written ({error})") from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def shards(folder, count, size, make):
    """Paths of files, one for each `size` of `count` numbers, with what make(numbers) gives for
    them. Processes share the work in a folder that all nodes see, and what is there is not made
    again: a run that was killed goes on. The folder's name should hold a `digest` of all that
    `make` depends on."""
    starts = range(0, count, size)
    paths = [f"{folder}/{start:08d}.npy" for start in starts]
    for i in range(rank(), len(paths), world()):
        if not os.path.exists(paths[i]):
            began = time.time()
            numbers = range(starts[i], min(starts[i] + size, count))
            rows = make(numbers)
            write(paths[i], lambda file: np.save(file, rows))
            rate = world() * len(numbers) / (time.time() - began)
            print0(f"{numbers.stop:,} of {count:,} images, {rate:.1f} a second")
    wait()
    return paths


def save_picture(path, image, **options):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    image.save(path, **options)
    print(path, flush=True)


# ---- Pixels --------------------------------------------------------------------------------------

def read_image(path, draft_size=0):
    """The image in a file in 8-bit RGB. With a draft_size, a large JPEG is decoded smaller, but to
    no less than twice that. EXIF turns are ignored, as is custom on ImageNet. Raises Mistake."""
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
    if image.mode == "F":
        raise Mistake("its pixels are floating-point numbers, and no value of white is known")
    if image.mode.startswith("I"):
        pixels = np.array(image) / 256
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_uint8(images):
    """(B, H, W, 3) uint8 of images (B, 3, H, W) in [-1, 1], rounded as DiT's samples are."""
    pixels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_tensor(pixels):
    """(..., 3, H, W) float32 in [-1, 1] of pixels (..., H, W, 3) uint8, or of an RGB image."""
    return torch.from_numpy(np.array(pixels)).movedim(-1, -3) / 127.5 - 1


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
    """The centred square of size x size pixels of an image of any mode, whose shorter side is
    resized to `size` first. ADM's crop."""
    image = resize_shorter(to_rgb(image), size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_grid(images, columns):
    """One picture of images (B, 3, H, W) in rows of `columns`, 2 pixels apart on white; images
    narrower than 64 pixels are enlarged by a whole factor that keeps them within 64."""
    from torchvision.utils import make_grid  # lpips installs torchvision
    zoom = max(1, 64 // images.shape[-1])
    grid = make_grid(F.interpolate(images, scale_factor=zoom), columns, pad_value=1.0)
    return Image.fromarray(to_uint8(grid[None])[0])


# ---- Checkpoints ---------------------------------------------------------------------------------

class ReleasedConfig:
    """Stands for the class config_util.Config of the authors' files; its plain dict is `_data`."""


def load_checkpoint(path, kind):
    """The dict in a checkpoint of kind "tokenizer" or "ar", ours or the authors' translated; for
    "tokenizer" also the one inside a checkpoint of kind "ar". Nothing is unpickled but tensors,
    plain data and the authors' two classes of settings. Raises Mistake, or OSError."""
    allowed = [argparse.Namespace, (ReleasedConfig, "config_util.Config")]
    try:
        with torch.serialization.safe_globals(allowed):
            saved = torch.load(path, "cpu", weights_only=True, mmap=True)
        saved = saved if "kind" in saved else translate(saved)
    except OSError:  # no such file, no permission
        raise
    except Exception:  # torch raises many kinds
        raise Mistake(f"{path} is no checkpoint of this code or the authors': damaged, of another "
                      "format, or with objects in it that are not tensors") from None
    saved = saved.get(kind, saved)  # the tokenizer that one of kind "ar" carries
    if saved["kind"] != kind:
        raise Mistake(f"{path} is a checkpoint of kind {saved['kind']!r}, {kind!r} is needed; for "
                      "a tokenizer, give --tokenizer FILE")
    return saved


def build(model_class, config_class, saved, device):
    """The model in a checkpoint's dict, with averaged weights if there are any, in eval mode."""
    try:
        config = config_class(**saved["config"])
    except TypeError as error:
        raise Mistake(f"a checkpoint of another version of this code ({error})") from None
    with torch.device("meta"):
        model = model_class(config)
    weights = saved.get("ema") or saved["model"]
    # Copied, so that nothing hangs on the file
    weights = {name: value.to(device, torch.float32, copy=True) for name, value in weights.items()
               if not name.startswith("repa_head.")}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_weights(model, weights, path):
    """Loads the weights of file `path`. Raises a Mistake where they are of another size."""
    try:
        model.load_state_dict(weights)
    except RuntimeError:  # torch lists all tensors
        raise Mistake(f"{path} is of another size or kind of model; give flags like those of its "
                      "run, such as --size") from None


def load_tokenizer(path, device="cpu"):
    """The tokenizer in a checkpoint of train_tokenizer.py or train_ar.py, or in one of the authors'
    files (D-AR-tokenizer_v1.pt). Raises Mistake, or OSError."""
    saved = load_checkpoint(path, "tokenizer")
    saved["config"]["repa_depth"] = 0
    return build(Tokenizer, TokenizerConfig, saved, device)


def load_ar(path, device="cpu", num_tokens=256):
    """The model in a checkpoint of train_ar.py, or in one of the authors' files (D-AR-L-360K.pt,
    D-AR-XL-360K.pt, bare state dicts), which do not tell `num_tokens`. Raises Mistake, or OSError.
    """
    saved = load_checkpoint(path, "ar")
    saved["config"].setdefault("num_tokens", num_tokens)
    return build(AR, ARConfig, saved, device)


def pack(kind, model):
    """What a checkpoint needs to rebuild a model."""
    return {"kind": kind, "config": asdict(model.config), "model": model.state_dict()}


def digest(*things):
    """Ten hex digits that stand for settings and the weights of models."""
    hasher = hashlib.sha256()
    for thing in things:
        if isinstance(thing, nn.Module):
            for value in thing.state_dict().values():
                hasher.update(value.cpu().float().numpy())
        else:
            hasher.update(f"{thing!r};".encode())
    return hasher.hexdigest()[:10]


def token_digest(tokenizer):
    """Stands for all that tokens depend on, but the images: whatever is changed in how they are
    decoded, they stay valid."""
    config = tokenizer.config
    return digest(config.image_size, config.num_tokens, config.head_dim, tokenizer.encoder,
                  tokenizer.quantizer)


def compare_tokens(saved, path, tokenizer):
    """Prints a warning where an autoregressive model learnt the tokens of another tokenizer."""
    known = saved.get("fixed", {}).get("tokens")
    if known and known != token_digest(tokenizer):
        print0(f"warning: {path} was trained on the tokens of another tokenizer of the same sizes")


def guidance_end(depth):
    """The paper's guidance at the last token, for models up to L's depth and deeper ones. App. II
    """
    return 8.0 if depth <= 24 else 10.0


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
    """One of the authors' files as a checkpoint of ours."""
    weights = saved
    for key in ("state_dict", "module", "model", "ema"):  # the last one found counts
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
    settings = {"cfg_start": 1.1, "cfg_end": guidance_end(depth)}
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


def spread(count, total):
    """Up to `count` of `total` numbers, always the same ones, from all over the list."""
    return sorted(np.random.default_rng(0).permutation(total)[:count].tolist())


def draw_noise(key, numbers, size, device):
    """Standard normal noise (n, 3, size, size), each a function of the key and its number."""
    return torch.stack([
        torch.randn(3, size, size, device=device, generator=seeded(*key, i, device=device))
        for i in numbers])


def join_processes():
    """The device of this process, which joins the others where torchrun started it."""
    launched = dist.is_torchelastic_launched()  # whatever else the environment says
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank() if launched else 0)
        torch.cuda.set_device(device)
    if launched:
        dist.init_process_group()
        patient_group()
    return device


@functools.cache
def patient_group():
    """All processes, for waiting: some share of the tokens may take hours longer than others. In
    training, a process that hangs is noticed after minutes."""
    return dist.new_group(backend="gloo", timeout=timedelta(hours=12))


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
        dist.barrier(patient_group())


def print0(text):
    """Prints in the first process."""
    if rank() == 0:
        print(text, flush=True)


def compile_blocks(model):
    """Compiles the transformer blocks one by one, which share what is compiled for a shape."""
    torch._dynamo.config.recompile_limit = 128  # one for each length of the cache
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile(dynamic=False)


def autocast(device):
    """bf16 on a GPU, float32 on a CPU, where bf16 is not faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


if __name__ == "__main__":
    run(main)
