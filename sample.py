"""Draws images from a trained model, in every way that the paper shows; and holds what everybody
who uses a model needs: settings, files, pixels, checkpoints, processes and seeds.

    python sample.py --cfg 1.1:10                         a grid; the newest checkpoint under out/
    python sample.py --ckpt F --labels 207,360 --num 8    classes in turn, by number or name
    python sample.py --ckpt F --stream --labels 0,1,2     previews while tokens are drawn (Sec. 3.3)
    python sample.py --ckpt F --tokens 128                from the first 128 tokens only (Table 4)
    python sample.py --ckpt F --prefix IMAGE --keep 32,64 --labels 0,1    layout control (Fig. 8)
    python sample.py --ckpt F --reconstruct DIR           encodes and decodes images, for rFID
    torchrun --nproc_per_node=8 sample.py --ckpt F --num-images 50000 --npz samples.npz   for FID
    python sample.py --size L --batch 64 --cfg 1.1:8 --benchmark    speed, in random weights

F is a checkpoint of train_ar.py, which carries its tokenizer, or one of the authors' files together
with --tokenizer; to reconstruct, a tokenizer will do. Image i depends on the seed and i alone; but
another --batch may round products otherwise. --stream and --reconstruct write beside --out.
"""
import argparse
import contextlib
import errno
import functools
import glob
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from enum import IntEnum
from itertools import cycle, islice
from typing import Annotated, Callable, Iterable, Iterator, Literal, get_args, get_origin, \
    get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model_ar import AR, SIZES, ARConfig, Count, Sampler
from model_tokenizer import (SOLVERS, TOKENIZERS, CountOrZero, Tokenizer, TokenizerConfig,
                             sampling_schedule)

Seed = Annotated[int, 0, 2 ** 63 - 1]
Guidance = Annotated[float, -1e4, 1e4]
SWITCHES = (bool, bool | None)  # flags that take no value: --name, --no-name


@dataclass
class SampleConfig:
    """What to draw, and how."""
    ckpt: str = ""                   # checkpoint of train_ar.py; else the newest under out/
    tokenizer: str = ""              # its tokenizer, for files that do not carry one
    labels: str = ""                 # class numbers or names, a,b,c; else all
    num_images: Count = 0            # else 100; to reconstruct, all; one a label up to ten with
    # --stream, --prefix and several --cfg
    cfg: str = ""                    # guidance START:END, linear over the tokens, a number, or
    # none; several, A,B,C: a row or file each; else the checkpoint's
    temperature: Annotated[float, 0, 1e6] = 1.0  # 0: the most likely token
    top_k: CountOrZero = 0           # draw from the k likeliest tokens; 0: all
    top_p: Annotated[float, 1e-6, 1] = 1.0  # draw from the likeliest tokens of this probability
    tokens: Count = 0                # read only the first tokens, whole groups; else all
    steps: Count = 0                 # denoising steps; else the tokenizer's
    solver: Literal[*SOLVERS] = "adams2"  # (Sec. 5, Table 6); adams2_variable: ours
    seed: Seed = 0
    batch: Count = 100               # images at a time
    out: str = "out/samples.png"     # the picture to write
    stream: bool = False             # write each preview as it comes
    prefix: str = ""                 # image whose first tokens are kept
    keep: str = ""                   # how many, a row each: a,b,c; else 1/8, 1/4, 1/2 of them
    reconstruct: str = ""            # folder of images to encode and decode
    npz: str = ""                    # file for the images as uint8 arr_0, which fid.py reads
    png: str = ""                    # folder for the images as PNGs, which fid.py reads
    benchmark: bool = False          # print tokens and images a second
    compile: bool | None = None      # torch.compile and, on CUDA, graphs; else on CUDA only
    size: Literal["", *SIZES] = ""   # with --benchmark: random weights of this size


# ---- Settings and mistakes -----------------------------------------------------------------------

class Mistake(ValueError):
    """What the user can mend; the message says how. `run` prints it without a traceback."""


def checked(name: str, value, kind):
    """The value of a setting, if it is of its field's kind: a type, Annotated[type, least, largest]
    or Literal[choices]. Raises Mistake."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = ", ".join(str(choice) for choice in get_args(kind) if choice != "")
            raise Mistake(f"{name} must be one of {choices}, got {value!r}")
        return value
    kind, *limits = get_args(kind) or (kind,)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise Mistake(f"{name} must be a value of type {kind.__name__}, got {value!r}")
    if limits and not limits[0] <= value <= limits[1]:  # nan is in no range
        raise Mistake(f"{name} must be in {limits[0]:.8g} ... {limits[1]:.8g}, got {value}")
    return value


def from_text(name: str, text: str, kind):
    """`checked`, of a value that was typed."""
    first = (get_args(kind) or [kind])[0]  # the type, or a choice
    plain = first if isinstance(first, type) else type(first)
    if not text:
        raise Mistake(f"{name} needs a value, got an empty one")
    with contextlib.suppress(ValueError):
        text = plain(text)
    return checked(name, text, kind)


@functools.cache
def comments(cls) -> dict[str, str]:
    """The comment beside each field of a dataclass."""
    found, name = {}, None
    for line in inspect.getsource(cls).splitlines():
        if match := re.match(r"    (\w+): [^#]*# (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif (match := re.match(r"    # +(.*)", line)) and name:
            found[name] += " " + match[1]
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Mistake(f"{message}; --help lists the flags")


def parse_settings(presets: dict[str, tuple], argv: list[str] | None, text: str,
                   short: dict[str, str] = {}) -> tuple[list, dict]:
    """The dataclasses of the preset that --preset names (if there are several), with the flags that
    were given, one a field; and these alone, by field. text: what --help says. short: another flag
    of a field. Raises Mistake."""
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=26,
                               width=100)
    parser = Parser(description=text, allow_abbrev=False, formatter_class=layout)
    first = next(iter(presets))
    if len(presets) > 1:
        parser.add_argument("--preset", choices=presets, default=first)
    kinds = {}
    for part in presets[first]:
        kinds.update(get_type_hints(type(part), include_extras=True))
        for field in fields(part):
            flags = ["--" + field.name.replace("_", "-"), *filter(None, [short.get(field.name)])]
            help = comments(type(part)).get(field.name, "")
            if field.default or field.default is False:
                help += f" [{field.default}]"
            options = ({"action": argparse.BooleanOptionalAction} if field.type in SWITCHES else
                       {"metavar": field.name.upper()[:6]})
            parser.add_argument(*flags, help=help.replace("%", "%%"), **options)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items()
             if value is not None}
    parts = presets[given.pop("preset", first)]
    for name, value in given.items():
        if kinds[name] not in SWITCHES:
            given[name] = from_text("--" + name.replace("_", "-"), value, kinds[name])
    try:
        return [replace(part, **{field.name: given[field.name] for field in fields(part)
                                 if field.name in given}) for part in parts], given
    except ValueError as error:  # numbers that do not fit together
        raise Mistake(str(error)) from None


def build(cls, values: dict, source: str):
    """A dataclass of settings from saved values. Raises a Mistake that names what does not fit."""
    kinds = get_type_hints(cls, include_extras=True)
    for name in values:
        if name not in kinds:
            raise Mistake(f"{source}: this code has no setting {name}")
        checked(f"{source}: {name}", values[name], kinds[name])
    try:
        return cls(**values)
    except ValueError as error:
        raise Mistake(f"{source}: {error}") from None


def run(main: Callable):
    """Calls a script's main; a mistake ends it with one line, and so does Ctrl-C."""
    if [int(part) for part in torch.__version__.split(".")[:2]] < [2, 7]:
        sys.exit(f"torch {torch.__version__} is too old; 2.7 or newer is needed")
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what cannot be printed
        stream.reconfigure(errors="backslashreplace")
    name = os.path.basename(sys.argv[0])
    try:
        main()
        if "RANK" in os.environ:  # under torchrun: without Python's own end, in which threads of
            sys.stdout.flush()    # torch, after compiling, abort now and then
            sys.stderr.flush()
            os._exit(0)
    except Mistake as error:
        # The last line: an error in a data loader's process arrives with a traceback before it.
        sys.exit(f"{name}: {str(error).splitlines()[-1].removeprefix('sample.Mistake: ')}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped; what was saved is whole")
    except (MemoryError, RuntimeError) as error:  # torch's lack of memory, on a CPU, has no class
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory",
                                                             str(error)):
            raise
        sys.exit(f"{name}: out of memory; give a smaller --batch, or in training --accumulate N")


# ---- Files ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def about(path: str):
    """Turns an OSError in its block into a Mistake that names the path."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise Mistake(f"{path}: {reason}") from None


def write(path: str, save: Callable):
    """Calls save(file) on a temporary file, then renames it to `path`, which thus is always whole.
    Raises a Mistake, on a full disk say."""
    partial = path + ".tmp"
    try:
        with about(path):
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            with open(partial, "wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def write_picture(path: str, image: Image.Image, **options):
    """Writes a Pillow image in the format that the path's ending names."""
    kind = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    write(path, lambda file: image.save(file, kind, **options))


def refuse_odd(*paths: str):
    """Raises a Mistake where a folder, device or the like is in the way of a file."""
    for path in paths:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise Mistake(f"{path} is no file, where one is to be written; move it away")


def reserve(*paths: str):
    """Raises a Mistake where `write` could not write one of the paths."""
    for path in paths:
        refuse_odd(path, path + ".tmp")
        with about(path):
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            fresh = not os.path.exists(path + ".tmp")
            open(path + ".tmp", "ab").close()
            if fresh:
                os.remove(path + ".tmp")


@functools.cache  # the file stays open, and the lock with it
def lock(folder: str):
    """Keeps other runs out of a folder until this process ends, however it ends. Raises Mistake."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    path = os.path.join(folder, "lock")
    refuse_odd(path)
    with about(folder):
        os.makedirs(folder, exist_ok=True)
        file = open(path, "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process, not of its loaders
    except OSError:
        raise Mistake(f"another run is at work in {folder}; wait for it, end it, or give another "
                      "folder") from None
    return file


class LongArray:
    """An array on disk that all processes fill, batch by batch; where they were killed, the same
    command fills only what is missing.

    In the folder `path`.part are rows.npy, the array, filled in place; settings.json; and a record
    of each process, a line a finished batch: its number and the checksum of its rows. `todo` holds
    the numbers of the rows of each batch that this process has yet to make. Raises Mistake where
    the folder was begun with other settings.
    """

    def __init__(self, path: str, shape: tuple, dtype, batch: int, settings: dict):
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.folder, self.batch = path + ".part", batch
        settings = json.loads(json.dumps({**settings, "shape": shape, "batch": batch}))
        rows, note = (os.path.join(self.folder, name) for name in ("rows.npy", "settings.json"))
        if is_first():
            lock(self.folder)
            with about(self.folder):
                if not os.path.exists(note):
                    os.makedirs(self.folder, exist_ok=True)
                    np.lib.format.open_memmap(rows, "w+", dtype, shape)
                    write(note, lambda file: file.write(json.dumps(settings).encode()))
        wait()
        try:
            with open(note) as file:
                begun = json.load(file)
            other = [name for name in settings if begun.get(name) != settings[name]]
            if not other:
                self.rows = np.lib.format.open_memmap(rows, "r")
                if (self.rows.shape, self.rows.dtype) != (shape, dtype):
                    raise ValueError
        except (OSError, ValueError, AttributeError):
            raise Mistake(f"{self.folder} is damaged; remove it to begin anew") from None
        if other:
            raise Mistake(f"{self.folder} was begun with other settings ({', '.join(other)}); go "
                          "on with the same ones, or remove it")
        self.todo = self.missing(rank, world)
        wait()  # until all know their share
        # Write-only: two nodes may share a page, and none should write back what it has read.
        self.file = os.fdopen(os.open(rows, os.O_WRONLY), "wb")
        self.record = open(f"{self.folder}/done.{rank}", "a")
        self.made, self.began, self.shown = 0, time.time(), time.time()

    def missing(self, rank: int, world: int) -> list[range]:
        """Of every world-th batch, from the rank-th on, those that no record has with the checksum
        of their rows."""
        done = set()
        for path in glob.glob(glob.escape(self.folder) + "/done.*"):
            with open(path, errors="replace") as file:
                done.update(re.findall(r"^(\d+) (\d+)\n", file.read(), re.MULTILINE))
        tried, found = {int(number) for number, _ in done}, []
        for i in range(rank, -(-len(self.rows) // self.batch), world):
            numbers = range(len(self.rows))[i * self.batch:(i + 1) * self.batch]
            if i not in tried or (  # not read, where nothing was written
                    str(i), str(zlib.crc32(self.rows[numbers.start:numbers.stop]))) not in done:
                found.append(numbers)
        return found

    def fill(self, numbers: range, rows: np.ndarray):
        """Writes the rows (n, ...) of one batch of `todo`, and how far this process is."""
        rows = np.ascontiguousarray(rows, self.rows.dtype)
        with about(self.folder):
            self.file.seek(self.rows.offset + numbers.start * rows[:1].nbytes)
            self.file.write(rows)
            self.file.flush()
            self.record.write(f"{numbers.start // self.batch} {zlib.crc32(rows)}\n")
            self.record.flush()
        self.made += len(rows)
        total = sum(map(len, self.todo))
        if is_first() and (time.time() > self.shown + 10 or self.made == total):
            self.shown, rate = time.time(), self.made / (time.time() - self.began)
            print(f"{self.made:,} of {total:,} images of this process, {rate:.1f} images/s, "
                  f"{(total - self.made) / rate / 60:.1f} min left", flush=True)

    def close(self):
        """Waits for all processes. Raises a Mistake where rows are not there all the same."""
        with about(self.folder):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.record.close()
        wait()
        if is_first() and self.missing(0, 1):
            raise Mistake(f"{self.folder} lost rows; the same command makes them again")

    def remove(self):
        """Removes the folder, when the rows are elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_npz(path: str, rows: np.ndarray):
    """Writes an array as arr_0, a part at a time."""
    def save(file):
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, rows)
    write(path, save)


# ---- Pixels --------------------------------------------------------------------------------------

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@contextlib.contextmanager
def reading(path: str):
    """Turns any error in its block into a Mistake that names the image."""
    try:
        yield
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, bombs, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Mistake(f"{path} cannot be read as an image ({reason})") from None


def open_image(path: str) -> Image.Image:
    """The image in a file, not decoded yet. Raises Mistake."""
    if not os.path.isfile(path):
        raise Mistake(f"no image at {path}")
    with reading(path):
        image = Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP"))  # others run programs
        if image.width * image.height > 1e8 or max(image.size) > 50 * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels")
        return image


def read_image(path: str, size: int) -> Image.Image:
    """The image in a file in RGB; a JPEG more than twice as large as `size` pixels is decoded at a
    fraction. EXIF turns are ignored, as is custom on ImageNet. Raises Mistake."""
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


# ---- Checkpoints ---------------------------------------------------------------------------------

class _ReleasedSettings:
    """Stands for the class config_util.Config of the authors' files; its plain dict is `_data`."""


def read_file(path: str) -> dict:
    """The dict in a checkpoint. Nothing is unpickled but tensors, plain data and the authors' two
    classes of settings; its checksums tell damage. Raises Mistake."""
    if not os.path.isfile(path):
        raise Mistake(f"no checkpoint at {path}")
    allowed = [argparse.Namespace, (_ReleasedSettings, "config_util.Config")]
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum does not agree")
        with torch.serialization.safe_globals(allowed):
            saved = torch.load(path, "cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch and zipfile raise many kinds
        found = re.search(r"(?:GLOBAL |class )([\w.]+)", str(error))
        reason = f"it holds an object of {found[1]}" if found else "damaged, or another format"
        reason += f"; {path}.previous is from before" * os.path.exists(path + ".previous")
        raise Mistake(f"{path} is no readable checkpoint: {reason}") from None
    if not isinstance(saved, dict):
        raise Mistake(f"{path} is no checkpoint: it holds no dict")
    return saved


def check_weights(weights, source: str):
    """Raises a Mistake unless `weights` are plain tensors of finite floats by name."""
    if not isinstance(weights, dict) or not weights:
        raise Mistake(f"{source} holds no weights")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise Mistake(f"{source} holds no weights: {name!r} is no tensor with a name")
        with contextlib.suppress(RuntimeError):  # of sparse tensors and other odd ones
            if value.is_floating_point() and value.isfinite().all():
                continue
        raise Mistake(f"{source}: {name} is no plain tensor of finite floats")


def read_checkpoint(path: str, kind: str, need: dict[str, type] = {}) -> dict:
    """The checkpoint at `path`, ours or the authors' translated. kind: "ar", or "tokenizer", which
    also finds the tokenizer that one of kind "ar" carries. need: further keys and their types.
    Raises a Mistake that names what is missing or wrong."""
    saved = read_file(path)
    saved = saved if "kind" in saved else translate(saved, path)
    if kind == "tokenizer" and saved["kind"] == "ar" and not need:
        if not isinstance(saved.get("tokenizer"), dict):
            raise Mistake(f"{path} carries no tokenizer; give --tokenizer FILE")
        saved = saved["tokenizer"]
    if saved.get("kind") != kind:
        raise Mistake(f"{path} is not a checkpoint of kind {kind!r} (found: {saved.get('kind')!r})")
    need = {"config": dict, "model": dict, **({"classes": list} if kind == "ar" else {}), **need}
    for key, expected in need.items():
        if not isinstance(saved.get(key), expected):
            raise Mistake(f"{path} is damaged: {key} is missing, or not of type "
                          f"{expected.__name__}")
    check_weights(saved["model"], f"{path}, model")
    if saved.get("ema") is not None:
        check_weights(saved["ema"], f"{path}, ema")
    if kind == "ar" and (len(saved["classes"]) != saved["config"].get("num_classes")
                         or not all(isinstance(name, str) for name in saved["classes"])):
        raise Mistake(f"{path} is damaged: classes are not the names of num_classes classes")
    return saved


def rebuild(model_class, config_class, saved: dict, path: str, device) -> nn.Module:
    """The model in a checkpoint's content, with averaged weights if there are any, in eval mode.
    Raises a Mistake that lists the tensors that do not fit."""
    config = build(config_class, saved["config"], path)
    with torch.device("meta"):  # takes no memory before all is known to fit
        model = model_class(config)
    weights = saved.get("ema") or saved["model"]
    try:
        model.load_state_dict({name: value.to(device, torch.float32, copy=True)
                               for name, value in weights.items()}, assign=True)
    except RuntimeError as error:  # missing, surplus and misshapen tensors
        raise Mistake(f"{path} does not fit: {' '.join(str(error).split())}") from None
    return model.eval()


def load_tokenizer(path: str, device="cpu") -> Tokenizer:
    """The tokenizer in a checkpoint of train_tokenizer.py or train_ar.py, or in one of the authors'
    files (D-AR-tokenizer_v1.pt, bare state dicts). Raises Mistake."""
    return rebuild(Tokenizer, TokenizerConfig, read_checkpoint(path, "tokenizer"), path, device)


def load_ar(path: str, device="cpu", num_tokens: int = 256) -> AR:
    """The model in a checkpoint of train_ar.py, or in one of the authors' files (D-AR-L-360K.pt,
    D-AR-XL-360K.pt, bare state dicts), which do not tell `num_tokens`. Raises Mistake."""
    saved = read_checkpoint(path, "ar")
    saved["config"].setdefault("num_tokens", num_tokens)
    return rebuild(AR, ARConfig, saved, path, device)


def pack(kind: str, model: nn.Module) -> dict:
    """What a checkpoint needs to rebuild a model."""
    return {"kind": kind, "config": asdict(model.config), "model": model.state_dict()}


def save_checkpoint(path: str, checkpoint: dict):
    """Writes a checkpoint; the one at `path` moves to `path`.previous. Raises a Mistake where the
    weights are not finite, or on a full disk, say; what was saved before then is whole."""
    def save(file):
        try:
            torch.save(checkpoint, file)
        except RuntimeError:  # hides the OSError of a full disk, which comes again here
            file.write(bytes(2 ** 22))
            raise

    try:
        for part in ("model", "ema"):
            if checkpoint.get(part):
                check_weights(checkpoint[part], part)
        write(path + ".new", save)
    except Mistake as error:
        raise Mistake(f"nothing was saved at step {checkpoint.get('step')}: {error}; {path} is "
                      "from before, and whole") from None
    with about(path):
        if os.path.exists(path):
            os.replace(path, path + ".previous")
        os.replace(path + ".new", path)


def fingerprint(*models: nn.Module) -> str:
    """A digest of all settings and weights."""
    digest = hashlib.sha256()
    for model in models:
        digest.update(str(model.config).encode())
        for value in model.state_dict().values():
            digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


# ---- The authors' files --------------------------------------------------------------------------

TOKENIZER_NAMES = (  # a tensor's name in the authors' files -> ours: these replacements, in order
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
AR_NAMES = (
    ("cls_embedding.embedding_table.", "class_embedding."), ("tok_embeddings.", "token_embedding."),
    ("layers.", "blocks."), (".wqkv.", ".qkv."), (".wo.", ".out."), ("output.", "head."),
    ("feed_forward.w1.", "ffn.gate."), ("feed_forward.w3.", "ffn.up."),
    ("feed_forward.w2.", "ffn.down."))

RELEASED_SHAPES = {  # our field: a tensor of ours, and its axis of that size
    "codebook_size": ("quantizer.codebook", 0), "code_dim": ("quantizer.codebook", 1),
    "encoder_width": ("encoder.query_up.weight", 0), "query_rank": ("encoder.query_table", 1),
    "max_tokens": ("encoder.query_table", 0), "decoder_width": ("decoder.from_code.weight", 0),
    "diffusion_width": ("diffusion.from_pixels.weight", 0),
    "head_dim": ("diffusion.blocks.0.attention.q_norm.weight", 0),
    "repa_hidden": ("repa_head.layers.0.weight", 0), "repa_dim": ("repa_head.layers.4.weight", 0)}
RELEASED_SETTINGS = {  # a setting's name in the authors' files: our field
    "sampling_resolution": "image_size", "num_all_queries": "num_tokens",
    "num_query_groups": "num_groups", "queries_per_step": "group_size",
    "num_denoising_steps": "num_steps", "vq_codebook_size": "codebook_size", "vq_dim": "code_dim",
    "encoder_patch_size": "patch_size", "encoder_dim": "encoder_width",
    "num_encoder_layers": "encoder_depth", "decoder_dim": "decoder_width",
    "num_decoder_layers": "decoder_depth", "diff_decoder.dim": "diffusion_width",
    "diff_decoder.cond_dim": "decoder_width", "diff_decoder.depth": "diffusion_depth",
    "diff_decoder.patch_size": "diffusion_patch", "diff_decoder.data_std": "sigma",
    "diff_decoder.time_shift": "beta"}
RELEASED_FIXED = {  # settings of theirs that have one value here
    "vq_enable": True, "query_low_rank": True, "rope_base_len": 10000, "output_resolution": 0,
    "diff_decoder.in_dim": 3, "diff_decoder.out_dim": 3, "diff_decoder.mlp_head": False,
    "diff_decoder.share_time_encoding": False, "diff_decoder.rope_base_len": 10000}
RELEASED_OTHER = {"diff_decoder.cfg", "diff_decoder.grad_checkpointing", "diff_decoder.repa_layer"}


def translate(saved: dict, source: str) -> dict:
    """One of the authors' files, of either kind, as `read_checkpoint` gives ours. The averaged
    weights (`ema`) come first; 1 x 1 and patch convolutions become linear layers."""
    found = next((saved[key] for key in ("ema", "model", "module", "state_dict")
                  if isinstance(saved.get(key), dict)), saved)
    found = {name: value for name, value in found.items()
             if not str(name).endswith("quantize.codebook_used")}  # a counter of training
    check_weights(found, source)
    found = {name.replace("_orig_mod.", "").removeprefix("module."): value
             for name, value in found.items()}
    kind = "ar" if "tok_embeddings.weight" in found else "tokenizer"
    if kind == "tokenizer" and "quantize.embedding.weight" not in found:
        raise Mistake(f"{source} is neither a checkpoint of this code nor one of the authors'")
    weights = {}
    for name, value in found.items():
        if value.ndim == 4 and (name == "patchify.weight" or value.shape[2:] == (1, 1)):
            value = value.flatten(1)
        for theirs, ours in AR_NAMES if kind == "ar" else TOKENIZER_NAMES:
            name = name.replace(theirs, ours)
        weights[name] = value
    if kind == "ar":
        config = released_ar_config(weights, source)
        classes = [str(i) for i in range(config["num_classes"])]
        cfg = {"cfg_start": 1.1, "cfg_end": 8.0 if config["depth"] <= 24 else 10.0}  # App. II
        return {"kind": kind, "config": config, "model": weights, "classes": classes,
                "settings": cfg}
    config = released_tokenizer_config(saved, weights, source)
    return {"kind": kind, "config": config, "model": weights}


def released_ar_config(weights: dict, source: str) -> dict:
    """Settings of `ARConfig` of translated weights, but for num_tokens; heads are 64 wide."""
    tokens, classes = (weights.get(f"{name}_embedding.weight") for name in ("token", "class"))
    if any(table is None or table.ndim != 2 for table in (tokens, classes)):
        raise Mistake(f"{source} is no autoregressive model: it needs two tables of embeddings")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return {"depth": depth, "width": tokens.shape[1], "heads": max(tokens.shape[1] // 64, 1),
            "vocab_size": len(tokens), "num_classes": len(classes) - 1}


def released_tokenizer_config(saved: dict, weights: dict, source: str) -> dict:
    """Settings of `TokenizerConfig` of translated weights: from their shapes, else from the file's
    settings, else those of the released model. Refuses by name settings that are not supported."""
    def plain(value) -> dict:  # of a dict, a namespace, the authors' Config or None
        value = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        return value.get("_data", value)

    settings = plain(saved.get("config"))
    settings = dict(settings.get("model", settings))
    inner = plain(settings.pop("diff_decoder", None))
    settings.update({f"diff_decoder.{name}": value for name, value in inner.items()})
    config = {"image_size": plain(saved.get("args")).get("image_size", 256)}
    if inner:  # the release's own defaults where its configuration is silent
        config.update(sigma=1.0, beta=1.0)
    config.update({ours: settings[theirs] for theirs, ours in RELEASED_SETTINGS.items()
                   if theirs in settings and ours != "group_size"})
    for field, (name, axis) in RELEASED_SHAPES.items():
        if name in weights and weights[name].ndim > axis:
            config[field] = weights[name].shape[axis]
    for field, part in (("patch_size", "encoder"), ("diffusion_patch", "diffusion")):
        if f"{part}.from_pixels.weight" in weights:
            config[field] = math.isqrt(weights[f"{part}.from_pixels.weight"].shape[-1] // 3)
    for part in ("encoder", "decoder", "diffusion"):
        config[f"{part}_depth"] = len({name.split(".")[2] for name in weights
                                       if name.startswith(f"{part}.blocks.")})
    # The REPA head is kept where a block follows it; only training reads it.
    tap = settings.get("diff_decoder.repa_layer", 8)
    config["repa_depth"] = min(tap, max(config["diffusion_depth"] - 1, 0))
    if "repa_head.layers.0.weight" not in weights:
        config["repa_depth"] = 0
    if config["repa_depth"] == 0:
        for name in [name for name in weights if name.startswith("repa_head.")]:
            del weights[name]

    tokenizer = build(TokenizerConfig, config, source)
    supported = {**RELEASED_FIXED, **{theirs: getattr(tokenizer, ours)
                                      for theirs, ours in RELEASED_SETTINGS.items()}}
    for name, value in settings.items():
        if name not in RELEASED_OTHER and (name not in supported or supported[name] != value):
            raise Mistake(f"{source}: the setting {name} = {value!r} is not supported; only "
                          f"{supported.get(name, 'its absence')!r} is")
    return config


# ---- Processes and seeds -------------------------------------------------------------------------

class Purpose(IntEnum):
    """What random numbers are for; with the run's seed, it keeps them apart."""
    ORDER = 1        # of training images in an epoch
    CROP = 2         # of a training image
    EVALUATION = 3   # noise of pictures in training
    TIMES = 4        # u of a training step
    NOISE = 5        # x0 of a training image
    RESEED = 6       # of codebook rows
    NULL_CLASS = 7   # labels that give way to it in a training step
    START = 8        # x0 of a sample
    TOKENS = 9       # of a sample
    LABELS = 10      # order of the labels of many samples
    VIEW = 11        # which stored crop of a training image
    DROPOUT = 12     # of a training step


def seed_of(*numbers: int) -> int:
    """A seed that is a function of the numbers: (seed, purpose, step), say."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seeded(*numbers: int, device="cpu") -> torch.Generator:
    """A random generator that is a function of the numbers."""
    return torch.Generator(device).manual_seed(seed_of(*numbers))


def noise_of(seed: int, purpose: Purpose, numbers: Iterable[int], shape: tuple, device) -> Tensor:
    """Standard normal noise (n, *shape), row i a function of (seed, purpose, numbers[i])."""
    return torch.stack([torch.randn(shape, device=device, generator=seeded(seed, purpose, number,
                                                                           device=device))
                        for number in numbers])


def join_processes() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of this process, started by torchrun or plain python."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    # Products in float32 are strict, not TF32: the quantizer's, and all that make tokens of images.
    # What may be coarser runs in bf16; the frozen networks of the losses convolve in TF32.
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    # Processes wait for one another when one has done its share of the tokens long before.
    on_gpu = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(**{"backend": "gloo", "timeout": timedelta(hours=12), **on_gpu})
    return dist.get_rank(), dist.get_world_size(), device


def is_first() -> bool:
    """Whether this process is the one that prints and saves."""
    return int(os.environ.get("RANK", 0)) == 0


def autocast(device: torch.device, enabled: bool = True):
    """bf16 on a GPU, float32 on a CPU, where bf16 is not faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled and device.type == "cuda")


def wait():
    """Until all processes are here, where there are several."""
    if dist.is_initialized():
        dist.barrier()


def peak_memory() -> float:
    """The most memory in GB that this process has held, on its GPU if it uses one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def count_flops(call: Callable) -> int:
    """Floating-point operations of a call; of attention, those without a fused kernel, as some of
    these are not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# ---- From labels to images -----------------------------------------------------------------------

def each_under(context: Callable, items: Iterable[Tensor]) -> Iterator[Tensor]:
    """The items, each made inside context(), which is left before the item is handed over."""
    items = iter(items)
    while True:
        with context():
            item = next(items, None)
        if item is None:
            return
        yield item


class Pipeline:
    """Both models and the settings of a run: from numbers of images and class labels to images
    (B, 3, H, W) in [-1, 1], `batch` at a time. What image i becomes depends on (seed, i).

    On CUDA, the autoregressive model runs in bf16 and as recorded graphs, the decoder under bf16
    autocast with compiled blocks.
    """

    def __init__(self, ar: AR | None, tokenizer: Tokenizer, config: SampleConfig, cfg: str,
                 batch: int, device: torch.device):
        settings, self.on_gpu = tokenizer.config, device.type == "cuda"
        compiled = self.on_gpu if config.compile is None else config.compile
        for block in tokenizer.diffusion.blocks if compiled else ():
            block.compile(dynamic=False)
        self.tokenizer, self.config, self.batch, self.device = tokenizer, config, batch, device
        self.group_size = settings.group_size
        tokens = config.tokens or settings.num_tokens
        if tokens % self.group_size or tokens > settings.num_tokens:
            raise Mistake(f"--tokens must be a multiple of {self.group_size}, up to "
                          f"{settings.num_tokens}; got {tokens}")
        self.groups = tokens // self.group_size
        if ar is not None:
            ar = ar.bfloat16() if self.on_gpu else ar
            self.sampler = Sampler(ar, batch, parse_cfg(cfg), config.temperature,
                                   config.top_k, config.top_p, self.group_size, compiled)

    def pad(self, items: list) -> list:
        """The items, the last one repeated up to a whole batch: all batches have one shape."""
        return [*items] + [items[-1]] * (self.batch - len(items))

    def noise(self, numbers: list[int]) -> Tensor:
        size = self.tokenizer.config.image_size
        return noise_of(self.config.seed, Purpose.START, numbers, (3, size, size), self.device)

    def token_groups(self, numbers: list[int], labels: list[int],
                     prefix: Tensor | None = None) -> Iterator[Tensor]:
        """Tokens (batch, N/K) of a whole batch, group by group, after prefix (batch, n)."""
        count = self.tokenizer.config.num_tokens
        uniforms = torch.stack([torch.rand(count, generator=seeded(self.config.seed, Purpose.TOKENS,
                                                                   number)) for number in numbers])
        tokens = self.sampler.chunks(torch.tensor(labels, device=self.device), prefix, uniforms)
        return islice(tokens, self.groups)

    def decode(self, numbers: list[int], tokens: Tensor) -> Tensor:
        """Images of tokens (batch, n) of a whole batch."""
        with autocast(self.device):
            return self.tokenizer.decode(tokens, self.noise(numbers), self.config.steps or None,
                                         self.config.solver, self.groups)

    def images(self, numbers: list[int], labels: list[int],
               prefix: Tensor | None = None) -> Tensor:
        """Images of up to a batch of numbers and labels, after one prefix (n,) for all."""
        count, numbers, labels = len(numbers), self.pad(numbers), self.pad(labels)
        if prefix is not None:
            prefix = prefix.expand(self.batch, -1)
        tokens = torch.cat([*self.token_groups(numbers, labels, prefix)], 1)
        return self.decode(numbers, tokens)[:count]

    def previews(self, numbers: list[int], labels: list[int]) -> Iterator[Tensor]:
        """Images after each group of tokens of a whole batch, as soon as they are drawn."""
        tokens = self.token_groups(numbers, labels)
        tokens = each_under(lambda: autocast(self.device, False), tokens)
        previews = self.tokenizer.stream(tokens, self.noise(numbers), self.config.solver,
                                         self.groups)
        return each_under(lambda: autocast(self.device), previews)


# ---- The modes -----------------------------------------------------------------------------------

def draw_grid(pipeline: Pipeline, labels: list[int], count: int) -> Tensor:
    """Images (count, 3, H, W), labels in turn."""
    todo, batch = repeat(labels, count), pipeline.batch
    return torch.cat([pipeline.images([*range(count)][first:first + batch],
                                      todo[first:first + batch])
                      for first in range(0, count, batch)])


def repeat(labels: list[int], count: int) -> list[int]:
    return [*islice(cycle(labels), count)]


def write_stream(pipeline: Pipeline, config: SampleConfig, labels: list[int]):
    """Each preview as it comes; then a picture of all (rows: samples, columns: previews), an
    animation, and the last preview as --out."""
    stem, count = os.path.splitext(config.out)[0], pipeline.batch
    previews, frames = [], []
    for images in pipeline.previews([*range(count)], repeat(labels, count)):
        previews.append(images)
        frames.append(image_grid(images, min(10, count)))
        path = f"{stem}_{len(frames) * pipeline.group_size:03d}.png"
        write_picture(path, frames[-1])
        print(path, flush=True)
    steps = image_grid(torch.stack(previews, 1).flatten(0, 1), len(previews))
    write_picture(f"{stem}_steps.png", steps)
    write_picture(f"{stem}.gif", frames[0], save_all=True, append_images=frames[1:], loop=0,
                  duration=[400] * (len(frames) - 1) + [1600])
    write_picture(config.out, frames[-1])
    print(f"{stem}_steps.png\n{stem}.gif\n{config.out}")


def write_layouts(pipeline: Pipeline, config: SampleConfig, labels: list[int], kept: list[int]):
    """Layout control: the first tokens of the image `--prefix`, in the first column, are kept, a
    number of them for each row; the others are drawn, for one label a column."""
    size = pipeline.tokenizer.config.image_size
    reference = to_tensor(center_crop(read_image(config.prefix, size), size)).to(pipeline.device)
    tokens, rows = pipeline.tokenizer.encode(reference[None])[0], []         # (N,)
    for number in kept:
        images = pipeline.images([*range(len(labels))], labels, tokens[:number])
        rows.append(torch.cat([reference[None], images]))
    write_picture(config.out, image_grid(torch.cat(rows), 1 + len(labels)))
    print(f"{config.out}: rows keep {', '.join(map(str, kept))} of {len(tokens)} tokens; "
          "the first column is the reference")


def write_samples(pipeline: Pipeline, config: SampleConfig, cfg: str, path: str,
                  labels: list[int], count: int, weights: str):
    """`--npz`, `--png`: each label equally often, in another order in each turn of all labels."""
    def label(number: int) -> int:
        turn, place = divmod(number, len(labels))
        rng = np.random.default_rng((config.seed, Purpose.LABELS, turn))
        return labels[rng.permutation(len(labels))[place]]

    size = pipeline.tokenizer.config.image_size
    settings = {"seed": config.seed, "labels": labels, "cfg": parse_cfg(cfg),
                "temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p,
                "groups": pipeline.groups, "steps": config.steps, "solver": config.solver,
                "device": pipeline.device.type, "weights": weights}
    array = LongArray(path, (count, size, size, 3), np.uint8, pipeline.batch, settings)
    for numbers in array.todo:
        array.fill(numbers, to_uint8(pipeline.images([*numbers], [*map(label, numbers)])))
    array.close()
    if is_first():
        if config.npz:
            write_npz(path, array.rows)
        else:
            part = os.path.join(array.folder, "pngs")
            for i, image in enumerate(array.rows):
                name = f"{i:06d}_class{label(i):04d}.png"
                write_picture(os.path.join(part, name), Image.fromarray(image))
            with about(path):
                os.replace(part, path)
        array.remove()
        print(path)


def find_images(root: str) -> list[str]:
    """Paths of all images under a folder, in sorted order. Raises a Mistake where there are none,
    or one cannot be read."""
    if not os.path.isdir(root):
        raise Mistake(f"no folder {root}; give --reconstruct DIR")
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(root)
                   for name in names if name.lower().endswith(IMAGE_ENDINGS))
    if not paths:
        raise Mistake(f"no images in {root}: endings must be {', '.join(IMAGE_ENDINGS)}")
    for path in paths:
        open_image(path).close()
    return paths


def write_reconstructions(pipeline: Pipeline, config: SampleConfig, files: list[str],
                          weights: str):
    """`--reconstruct`: pairs as a picture, all originals and reconstructions as npz, PSNR."""
    stem, size = os.path.splitext(config.out)[0], pipeline.tokenizer.config.image_size
    settings = {"seed": config.seed, "groups": pipeline.groups, "steps": config.steps,
                "solver": config.solver, "device": pipeline.device.type, "images": files,
                "weights": weights}
    pairs = LongArray(stem, (len(files), 2, size, size, 3), np.uint8, pipeline.batch, settings)
    for numbers in pairs.todo:
        images = [to_tensor(center_crop(read_image(files[number], size), size))
                  for number in numbers]
        images = torch.stack(pipeline.pad(images)).to(pipeline.device)
        decoded = pipeline.decode(pipeline.pad(numbers), pipeline.tokenizer.encode(images))
        pairs.fill(numbers, np.stack([to_uint8(images), to_uint8(decoded)], 1)[:len(numbers)])
    pairs.close()
    if is_first():
        def tensor(rows: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(rows)).permute(0, 3, 1, 2) / 127.5 - 1

        total = sum(psnr(tensor(pair[1:]), tensor(pair[:1])) for pair in pairs.rows)
        shown = tensor(pairs.rows[:20].reshape(-1, size, size, 3))
        write_picture(config.out, image_grid(shown, min(10, len(shown))))
        names = f"{stem}_originals.npz", f"{stem}_reconstructions.npz"
        for i, name in enumerate(names):
            write_npz(name, pairs.rows[:, i])
        pairs.remove()
        print(f"PSNR {total / len(files):.2f} dB over {len(files):,} images\n" + "\n".join(names)
              + f"\n{config.out}: originals, each beside its reconstruction")


def seconds_of(call: Callable, pipeline: Pipeline) -> float:
    """Seconds of a call: the median of nine, or of as many as 20 seconds hold."""
    times = []
    while len(times) < 9 and sum(times) < 20:
        began = time.time()
        call()
        if pipeline.on_gpu:
            torch.cuda.synchronize()
        times.append(time.time() - began)
    return sorted(times)[len(times) // 2]


def measure_machine(pipeline: Pipeline, dtype: torch.dtype) -> tuple[float, float]:
    """Memory bandwidth in bytes/s and rate of a large matrix product in FLOP/s."""
    side = 8192 if pipeline.on_gpu else 2048
    values = torch.randn(2 ** 29 // dtype.itemsize, dtype=dtype, device=pipeline.device)
    bandwidth = 2 ** 29 / seconds_of(values.sum, pipeline)
    values = values[:side ** 2].view(side, side).clone()
    return bandwidth, 2 * side ** 3 / seconds_of(lambda: values @ values, pipeline)


def benchmark(pipeline: Pipeline, ar: AR, labels: list[int]):
    """Prints how fast a batch is drawn and decoded, beside what the machine could do: read all
    weights and the cache once a step at its memory bandwidth, or compute all products at the rate
    of a large one, both measured here."""
    tokenizer, device, batch = pipeline.tokenizer, pipeline.device, pipeline.batch
    numbers, todo = [*range(batch)], repeat(labels, batch)
    dtype = ar.head.weight.dtype
    bandwidth, product_rate = measure_machine(pipeline, dtype)
    if pipeline.on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def draw() -> Tensor:
        return torch.cat([*pipeline.token_groups(numbers, todo)], 1)

    if pipeline.on_gpu:  # compiles and records
        pipeline.decode(numbers, draw())
    drawing, count = seconds_of(draw, pipeline), pipeline.groups * pipeline.group_size
    tokens = torch.zeros(batch, tokenizer.config.num_tokens, dtype=torch.long, device=device)
    decoding = seconds_of(lambda: pipeline.decode(numbers, tokens), pipeline)

    rows = len(pipeline.sampler.cache.blocks[0][0])
    weights = sum(p.numel() for name, p in ar.named_parameters() if "embedding" not in name)
    cache = rows * ar.config.depth * 2 * ar.config.width * (count + pipeline.sampler.bucket) / 2
    reading = dtype.itemsize * weights / bandwidth  # seconds a step
    caching = dtype.itemsize * cache / bandwidth
    computing = 2 * weights * rows / product_rate
    settings = tokenizer.config
    steps = pipeline.config.steps or settings.num_steps or settings.num_groups
    schedule = sampling_schedule(steps, settings.num_groups, settings.beta, pipeline.groups)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        noise, cond = pipeline.noise([0]), tokenizer.condition(tokens[:1])
        flops = count_flops(lambda: tokenizer.velocity(noise, schedule[0], cond)) * len(schedule)
    name = torch.cuda.get_device_name() if pipeline.on_gpu else "CPU"
    print(f"{name}, {str(dtype)[6:]}, batch {batch}, guidance {'on' if rows > batch else 'off'}\n"
          f"memory bandwidth {bandwidth / 1e9:.1f} GB/s, matrix products {product_rate / 1e12:.3f} "
          f"TFLOP/s\n"
          f"AR: {batch * count / drawing:.1f} tokens/s, {batch / drawing:.3g} images/s, "
          f"{count * max(reading + caching, computing) / drawing:.1%} of what the machine allows\n"
          f"  a step takes {1e3 * drawing / count:.2f} ms; reading the weights "
          f"{1e3 * reading:.2f}, the cache {1e3 * caching:.2f}, computing {1e3 * computing:.2f}\n"
          f"decoder: {flops / 1e12:.2f} TFLOP an image, {batch / decoding:.3g} images/s, "
          f"{batch * flops / product_rate / decoding:.1%} of what the machine allows\n"
          f"together: {batch / (drawing + decoding):.3g} images/s, peak memory "
          f"{peak_memory():.1f} GB")


# ---- The program ---------------------------------------------------------------------------------

def parse_cfg(text: str) -> tuple[float, float] | None:
    """Guidance: "1.1:10" runs linearly over the tokens, "4" is constant, "none" is off."""
    if text == "none":
        return None
    with contextlib.suppress(ValueError):
        start, end = (float(part) for part in (text.split(":") if ":" in text else [text, text]))
        if -1e4 <= start <= 1e4 and -1e4 <= end <= 1e4:
            return start, end
    raise Mistake("--cfg must be START:END, one number, or none, of at most 10,000, or several of "
                  f"these, A,B,C; got {text!r}")


def parse_labels(text: str, classes: list[str]) -> list[int]:
    """Class numbers of "207,360" or of class names; "" is all classes."""
    labels = []
    for part in text.split(",") if text else ():
        if part not in classes and not (part.isdecimal() and int(part) < len(classes)):
            raise Mistake(f"--labels: no class {part!r}; give numbers in 0 ... "
                          f"{len(classes) - 1} or names such as {', '.join(classes[:10])}")
        labels.append(classes.index(part) if part in classes else int(part))
    return labels or list(range(len(classes)))


def parse_keep(text: str, count: int) -> list[int]:
    """Numbers of kept tokens of "32,64"; "" is 1/8, 1/4 and 1/2 of the `count` tokens."""
    kept = text.split(",") if text else [str(count // 8), str(count // 4), str(count // 2)]
    if not all(part.isdecimal() and int(part) <= count for part in kept):
        raise Mistake(f"--keep must be numbers of tokens in 0 ... {count}, got {text!r}")
    return [int(part) for part in kept]


UNUSED = {  # flags that have no meaning in a mode; "": in the mode without a flag, a grid
    "stream": "steps keep size", "prefix": "num_images size", "npz": "out keep size",
    "png": "out keep size", "reconstruct": "labels cfg temperature top_k top_p keep size",
    "benchmark": "num_images out keep", "": "keep size"}


def parse_args(argv: list[str] | None) -> SampleConfig:
    """The flags, checked as far as they can be without the model. Raises Mistake."""
    (config,), _ = parse_settings({"": (SampleConfig(),)}, argv, __doc__, {"num_images": "--num"})
    modes = [name for name in UNUSED if name and getattr(config, name)]
    if len(modes) > 1:
        raise Mistake(f"--{modes[0]} and --{modes[1]} exclude each other")
    mode = modes[0] if modes else ""
    unused = UNUSED[mode] + (" ckpt tokenizer labels" if config.size else "")
    for name in unused.split():
        if getattr(config, name) != getattr(SampleConfig, name):
            raise Mistake(f"--{name.replace('_', '-')} has no meaning "
                          + (f"with --{mode}" if mode else "in a grid"))
    if "RANK" in os.environ and mode not in ("npz", "png", "reconstruct"):
        raise Mistake("torchrun is for --npz, --png and --reconstruct; use python otherwise")
    if "," in config.cfg and mode not in ("", "npz", "png"):
        raise Mistake(f"--cfg takes one guidance with --{mode}, got {config.cfg!r}")
    if os.path.splitext(config.out)[1].lower() not in (".png", ".jpg", ".webp"):
        raise Mistake(f"--out must end in .png, .jpg or .webp, got {config.out!r}")
    cfgs = config.cfg.split(",") if config.cfg else []
    if len({*map(parse_cfg, cfgs)}) < len(cfgs):
        raise Mistake(f"--cfg names a guidance twice: {config.cfg}")
    return config


def newest_checkpoint(kinds: tuple) -> str:
    """The checkpoint under out/, of one of the kinds, that was written last."""
    paths = glob.glob("out/**/last.pt", recursive=True)
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        if read_file(path).get("kind") in kinds:
            return path
    raise Mistake("no checkpoint under out/; train one, or give --ckpt FILE")


def load_models(config: SampleConfig, device) -> tuple[AR | None, Tokenizer, list[int]]:
    """The models and the labels to draw; to reconstruct, the tokenizer only. Sets --cfg to the
    checkpoint's guidance where none was given."""
    if config.reconstruct:
        path = config.tokenizer or config.ckpt or newest_checkpoint(("ar", "tokenizer"))
        return None, load_tokenizer(path, device), []
    if config.size:
        tokenizer = Tokenizer(TOKENIZERS.get(config.size, TOKENIZERS["paper"])).eval()
        ar, config.cfg = AR(SIZES[config.size]).eval(), config.cfg or "none"
        return ar.to(device), tokenizer.to(device), [*range(ar.config.num_classes)]
    path = config.ckpt or newest_checkpoint(("ar",))
    saved = read_checkpoint(path, "ar", {"settings": dict})
    labels = parse_labels(config.labels, saved["classes"])  # mistakes come before the weights
    if not config.cfg:
        ends = (checked(f"{path}: {name}", saved["settings"].get(name), Guidance)
                for name in ("cfg_start", "cfg_end"))
        config.cfg = "{}:{}".format(*ends)
        if is_first():
            print(f"guidance {config.cfg}, the checkpoint's; --cfg none turns it off", flush=True)
    tokenizer = load_tokenizer(config.tokenizer or path, device)
    settings = tokenizer.config
    saved["config"].setdefault("num_tokens", settings.num_tokens)
    ar = rebuild(AR, ARConfig, saved, path, device)
    if (ar.config.vocab_size, ar.config.num_tokens) != (settings.codebook_size,
                                                        settings.num_tokens):
        raise Mistake(f"the tokenizer has {settings.num_tokens} tokens of "
                      f"{settings.codebook_size}, {path} predicts {ar.config.num_tokens} of "
                      f"{ar.config.vocab_size}")
    return ar, tokenizer, labels


def main(argv: list[str] | None = None):
    config = parse_args(argv)
    _, _, device = join_processes()

    # Everything that can be wrong is looked at first
    many = os.path.normpath(config.npz or config.png) if config.npz or config.png else ""
    files = find_images(config.reconstruct) if config.reconstruct else []
    files = files[:config.num_images or None]
    if config.prefix:
        open_image(config.prefix).close()
    ar, tokenizer, labels = load_models(config, device)
    kept = parse_keep(config.keep, tokenizer.config.num_tokens)
    cfgs, (stem, ending) = config.cfg.split(","), os.path.splitext(many)
    paths = [many] if len(cfgs) == 1 else [
        f"{stem}_{cfg.replace(':', '-')}{ending}" for cfg in cfgs]
    there = {path for path in paths if many and os.path.exists(path)}
    if len(there) == len(paths):
        raise Mistake(f"{', '.join(paths)} is there already; give another name")
    wait()  # all have looked before one writes
    if is_first() and not config.benchmark:
        reserve(*({*paths} - there if many else [config.out]))

    # The images in the fewest batches of at most --batch, of nearly one size
    one_row = config.stream or config.prefix or len(cfgs) > 1 and not many
    labels = labels[:10] if one_row and not config.labels else labels
    count = len(files) or config.num_images or (len(labels) if one_row else 100)
    if (config.stream or config.prefix) and count > config.batch:
        raise Mistake(f"--stream and --prefix draw one batch; --batch is {config.batch}, and there "
                      f"would be {count} images in it")
    batch = config.batch if config.benchmark else -(-count // -(-count // config.batch))
    weights = fingerprint(*filter(None, (ar, tokenizer))) if many or files else ""

    grid = []
    for cfg, path in zip(cfgs, paths):
        if path in there:  # made before this command was killed
            continue
        pipeline = Pipeline(ar, tokenizer, config, cfg, batch, device)
        if config.benchmark:
            benchmark(pipeline, ar, labels)
        elif config.stream:
            write_stream(pipeline, config, labels)
        elif config.prefix:
            write_layouts(pipeline, config, labels, kept)
        elif config.reconstruct:
            write_reconstructions(pipeline, config, files, weights)
        elif many:
            write_samples(pipeline, config, cfg, path, labels, count, weights)
        else:
            grid.append(draw_grid(pipeline, labels, count))
        del pipeline  # and its memory, before the next one takes its own
    if grid:  # several guidances: a row each; else up to ten labels: a column each
        columns = len(labels) if 1 < len(labels) <= 10 else 10
        columns = count if len(grid) > 1 else min(columns, count)
        write_picture(config.out, image_grid(torch.cat(grid), columns))
        print(config.out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
