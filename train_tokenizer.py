"""Trains the sequential diffusion tokenizer.

    python train_tokenizer.py --preset toy                       built-in pictures, on a CPU
    torchrun --nproc_per_node=8 train_tokenizer.py --data DIR    the paper's run: ImageNet at 256
    torchrun --nproc_per_node=4 train_tokenizer.py --data DIR --preset light    the ablation model

DIR holds one sub-folder of images a class, or `train` and `val` folders of such. The paper's run
took about 5 days on 16 A100 GPUs (1,900 GPU-hours), the ablation model 8 hours on 4. Every setting
below is a flag; the same command continues where it stopped. Results are in `out/tokenizer`.
"""
import colorsys
import contextlib
import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Annotated, Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model_ar import Share
from model_tokenizer import (TOKENIZERS, Count, CountOrZero, Positive, Tokenizer, TokenizerConfig,
                             TrainOutput, group_of, interpolate, sampling_schedule)
from sample import (IMAGE_ENDINGS, Mistake, Purpose, Seed, about, autocast, build, center_crop,
                    count_flops, image_grid, is_first, join_processes, load_tokenizer, lock,
                    noise_of, pack, parse_settings, peak_memory, psnr, read_checkpoint, read_image,
                    reserve, resize_shorter, run, save_checkpoint, seeded, to_tensor, wait, write,
                    write_picture)

Weight = Annotated[float, 0, 1e6]
BelowOne = Annotated[float, 0, 0.99999]
Steps = Annotated[int, 1, 2 ** 40]
StepsOrNone = Annotated[int, 0, 2 ** 40]


@dataclass
class TrainConfig:
    """Settings of a run. Defaults are the paper's; their source is in brackets."""
    out: str = "out/tokenizer"       # folder of checkpoints, log and pictures
    init_from: str = ""              # checkpoint whose weights a new run starts from
    data: str = "data/imagenet"      # folder of images, or "shapes": the built-in pictures
    steps: Steps = 210_000           # (Sec. 5)
    batch: Count = 1024              # images a step, over all processes (Sec. 5)
    accumulate: CountOrZero = 0      # backward passes a step, for the same `batch`; 0: as many as
    # the GPU's memory needs
    lr: Share = 2e-4                 # (released code; constant after warm-up)
    lr_final: Share = 2e-4           # learning rate at the end of `decay_steps`
    warmup_steps: StepsOrNone = 500  # linear rise of the learning rate (released code)
    decay_steps: StepsOrNone = 0     # linear fall to lr_final over the last steps
    beta1: BelowOne = 0.9            # AdamW (released code)
    beta2: BelowOne = 0.95           # AdamW (released code)
    weight_decay: Weight = 0.0       # AdamW (released code)
    clip: Positive = 1.0             # largest norm of the gradient (released code)
    ema: Share = 0.999               # decay of the averaged weights (released code)
    vq: Weight = 1.0                 # weight of the codebook and commitment losses (Eq. 7)
    lpips: Weight = 0.5              # weight of LPIPS (Eq. 7); 0: neither computed nor downloaded
    repa: Weight = 0.5               # weight of REPA (Eq. 7); 0: neither computed nor downloaded
    reseed_after: StepsOrNone = 0    # steps after which an unused codebook row becomes a random
    # encoder output; 0: never. Not the paper's: for small runs
    resize_max: Annotated[float, 1, 8] = 1.25  # random crops: shorter side up to 1.25 x image_size
    # (Sec. 5)
    flip: bool = True                # mirror half of the images (Sec. 5)
    workers: Annotated[int, 0, 256] = 8  # processes that load images, for each training process
    compile: bool | None = None      # torch.compile the transformer blocks; else on CUDA only
    seed: Seed = 0
    use_window: Steps = 100          # steps over which the logged codebook use is taken
    log_every: Steps = 100           # steps between log lines
    eval_every: Steps = 5000         # steps between pictures and held-out PSNR
    save_every: Steps = 2500         # steps between checkpoints
    eval_images: Count = 64          # held-out images for PSNR
    changed: bool = False            # go on from a checkpoint of other data, seed or batch


PRESETS = {  # name: (settings of the run, architecture)
    "paper": (TrainConfig(), TOKENIZERS["paper"]),
    "light": (TrainConfig(steps=50_000, batch=256), TOKENIZERS["light"]),  # App. III
    "toy": (TrainConfig(data="shapes", steps=2800, batch=32, lr=2e-3, lr_final=1e-4,
                        warmup_steps=50, decay_steps=1600, ema=0.99, vq=0.1, lpips=0.0,
                        repa=0.0, reseed_after=20, resize_max=1.0, flip=False,
                        workers=0, eval_every=400, save_every=400, eval_images=200),
            TOKENIZERS["toy"]),
    "cifar": (TrainConfig(data="data/cifar10", steps=7200, batch=32, lr=1e-3, lr_final=1e-4,
                          warmup_steps=100, decay_steps=3600, lpips=0.0, repa=0.0, reseed_after=50,
                          resize_max=1.125, workers=0, eval_every=600, save_every=300,
                          eval_images=192), TOKENIZERS["cifar"])}


# ---- Processes, schedule -------------------------------------------------------------------------

def in_turn(build):
    """build() in the first process of each node, then in the others, which find its downloads."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local:
        wait()
    built = build()
    if not local:
        wait()
    return built


def local_batch(config, world: int) -> int:
    """Images in one backward pass of one process. Raises Mistake where they do not divide."""
    parts = world * max(config.accumulate, 1)
    if config.batch % parts:
        raise Mistake(f"--batch {config.batch} cannot be split over {world} processes x "
                      f"--accumulate {parts // world}; give a multiple of {parts}")
    return config.batch // parts


def kept_bytes(loss: Callable[[int], Tensor]) -> tuple[int, int]:
    """Bytes that loss(n) of n images keeps for its backward pass: of each image, and besides."""
    def count(n: int) -> int:
        kept = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = loss(n)  # alive, so that no two tensors share an address
        del result
        return sum(kept.values())

    one, two = count(1), count(2)
    return two - one, 2 * one - two


def with_accumulate(config, loss: Callable[[int], Tensor], model: nn.Module, world: int, device):
    """The settings with `accumulate` chosen, where it is 0: 1 on a CPU, else so that a pass fits in
    80 % of the GPU's memory."""
    if config.accumulate or device.type != "cuda":
        return replace(config, accumulate=config.accumulate or 1)
    image, besides = kept_bytes(loss)
    # 20 bytes a parameter: weight, gradient, averaged weight, AdamW's two moments.
    besides += 20 * sum(p.numel() for p in model.parameters())
    total = torch.cuda.get_device_properties(device).total_memory
    most = max(1, int((0.8 * total - besides) / image))
    share = config.batch // world
    micro = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    if is_first():
        print(f"--accumulate {share // micro}: {micro} images at a time, {image / 1e6:.0f} MB each "
              f"and {besides / 1e9:.1f} GB besides, in {total / 1e9:.0f} GB", flush=True)
    return replace(config, accumulate=share // micro)


def learning_rate(step: int, config) -> float:
    """Of the optimizer step `step` = 0, 1, ...: linear warm-up, constant, linear fall."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    left = (config.steps - step) / max(config.decay_steps, 1)
    return rate if left >= 1 else config.lr_final + (rate - config.lr_final) * left


def update_ema(ema: nn.Module, model: nn.Module, decay: float):
    """ema <- decay * ema + (1 - decay) * model, in one fused call."""
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Clock:
    """Means of the losses since the last reading, and the images a second that training took,
    evaluation and saving left out. Notes when one was not finite. Adding never waits for the GPU.
    """

    def __init__(self, config):
        self.config, self.seconds = config, 0.0
        self.sums, self.counts, self.wrong = {}, {}, {}
        self.start()

    def start(self):
        self.began = time.time()

    def stop(self):
        self.seconds += time.time() - self.began

    def add(self, step: int, **values: Tensor):
        """Adds losses of one backward pass, or the gradient's norm of a step."""
        for name, value in values.items():
            value = value.detach()
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
            now = torch.where(value.isfinite(), 2 ** 40, step)
            self.wrong[name] = torch.minimum(self.wrong.get(name, now), now)

    def check(self):
        """Raises a Mistake, in all processes, where a value in one of them was not finite."""
        if not self.wrong:
            return
        wrong = torch.stack(list(self.wrong.values()))                       # (values,)
        found = [wrong]
        if dist.is_initialized():
            found = [torch.empty_like(wrong) for _ in range(dist.get_world_size())]
            dist.all_gather(found, wrong)
        found = torch.stack(found)                                           # (processes, values)
        if found.min() < 2 ** 40:
            rank, part = divmod(found.argmin().item(), len(wrong))
            raise Mistake(f"{list(self.wrong)[part]} is not finite at step {found.min()} in "
                          f"process {rank}; stopped. The last checkpoint in {self.config.out} "
                          "is from before; a smaller --lr may help")

    def read(self, step: int) -> dict[str, float]:
        """Means over passes and processes, images a second, hours from `step` to the end of the
        run, and peak memory; then starts anew."""
        self.check()
        means = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        means = dict(zip(self.sums, means.tolist()))
        self.stop()
        rate = self.counts["gradient"] * self.config.batch / self.seconds
        self.sums, self.counts, self.wrong, self.seconds = {}, {}, {}, 0.0
        self.start()
        left = (self.config.steps - step) * self.config.batch / rate / 3600
        return {**means, "images_per_s": rate, "hours_left": left, "memory_gb": peak_memory()}


class Stop:
    """Notes SIGTERM and Ctrl-C, so that the loop can save after a whole step, the same one in all
    processes; a second Ctrl-C ends at once."""

    def __init__(self):
        self.signal = self.agreed = 0  # what this process was sent, and what all know of
        # gloo also on GPUs: the CPU would wait for what NCCL sums.
        nccl = dist.is_initialized() and dist.get_backend() == "nccl"
        self.peers = dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if nccl else None
        self.before = {number: signal.signal(number, self.note)
                       for number in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number: int, frame):
        self.signal = number
        if number == signal.SIGINT:  # not SIGTERM, which torchrun passes on once more
            signal.signal(number, signal.SIG_DFL)

    def asked(self) -> bool:
        """Whether any process was sent a signal; all processes call this after each step."""
        latest = torch.tensor(self.signal)  # a signal may come while processes exchange the last
        if dist.is_initialized():
            dist.all_reduce(latest, dist.ReduceOp.MAX, self.peers)
        self.agreed = int(latest)
        return self.agreed > 0

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, step: int):
        """Ends the program with the exit code of the signal; its checkpoint is of `step`."""
        wait()  # for the first process to have saved: the first to leave ends the others
        self.release()
        if is_first():
            print(f"{signal.Signals(self.agreed).name}: saved after step {step}; the same command "
                  "goes on from there", flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(128 + self.agreed)


def start_from(model: nn.Module, weights: dict, path: str, free: tuple = ()):
    """Gives the model the weights of another run; parts named in `free` may be absent or differ.
    Raises a Mistake where the others do."""
    own = model.state_dict()
    for name in {**own, **weights}:
        if name in own and name in weights and own[name].shape == weights[name].shape:
            own[name] = weights[name]
        elif not name.startswith(free):
            raise Mistake(f"{path} has another architecture: {name} differs")
    model.load_state_dict(own)


def load_parts(saved: dict, path: str, parts: dict[str, nn.Module], optimizer):
    """Loads modules by their name in a checkpoint, and the optimizer's state; its settings are
    those of the run. Raises Mistake."""
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        if len(optimizer.state) < len([*parts["model"].parameters()]):
            raise ValueError
        for parameter, state in optimizer.state.items():
            values = torch.stack([state["exp_avg"], state["exp_avg_sq"]])
            if (values[0].shape != parameter.shape or not 0 <= values[1].min() or not
                    values.isfinite().all() or not 0 < state["step"].item() < 2 ** 40):
                raise ValueError
        if isinstance(saved["step"], bool) or not 0 < saved["step"] < 2 ** 40:
            raise ValueError
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise Mistake(f"{path} is damaged: model, optimizer or step do not fit") from None


# FREE settings change nothing that is learned; KEPT ones may change in a run only with --changed.
FREE = {"out", "init_from", "accumulate", "workers", "compile", "use_window", "log_every",
        "eval_every", "save_every", "eval_images", "eval_samples", "codes", "changed"}
KEPT = {"data", "seed", "batch", "views", "tokenizer"}


def resume(config, settings: dict, kind: str, parts: dict[str, nn.Module], optimizer) -> int:
    """Loads the newest readable checkpoint of the run and returns its step, or 0. Prints the
    settings that changed. Raises a Mistake for another architecture and, without --changed, for
    another value of a setting in KEPT."""
    last = os.path.join(config.out, "last.pt")
    paths = [path for path in (last, last + ".previous") if os.path.exists(path)]
    need = {"step": int, "settings": dict, "optimizer": dict, **dict.fromkeys(parts, dict)}
    for path in paths:
        try:
            saved = read_checkpoint(path, kind, need)
            same = saved["config"] == asdict(parts["model"].config)
            if same:
                load_parts(saved, path, parts, optimizer)
            break
        except Mistake as error:
            if path == paths[-1]:
                raise
            if is_first():
                print(f"{error}; going on from {paths[-1]}", flush=True)
    wait()  # for all to have read
    if paths and path != last and os.path.exists(last) and is_first():
        os.replace(last, last + ".damaged")  # lest it become the one before
    if not paths:
        return 0
    if not same:
        raise Mistake(f"{path} has another architecture; give --out with another folder")
    other = {name: (saved["settings"].get(name), value) for name, value in settings.items()
             if saved["settings"].get(name) != value and name not in FREE}
    text = ", ".join(f"another --{name}" if name == "tokenizer" else
                     f"--{name.replace('_', '-')} {new} (was {old})"
                     for name, (old, new) in other.items())
    if KEPT & {*other} and not config.changed:
        raise Mistake(f"{path} was saved with other settings: {text}; give those, another --out, "
                      "or --changed to go on all the same")
    if other and is_first():
        print(f"going on with other settings: {text}", flush=True)
    return saved["step"]


def save(config, settings: dict, kind: str, parts: dict[str, nn.Module], optimizer, step: int,
         **more):
    """Writes the checkpoint that `resume` reads."""
    save_checkpoint(os.path.join(config.out, "last.pt"), {
        **pack(kind, parts["model"]), **{name: part.state_dict() for name, part in parts.items()},
        "optimizer": optimizer.state_dict(), "step": step, "settings": settings, **more})


def claim(config):
    """Keeps other runs out of the run's folder, and finds what is in the way of its files."""
    if is_first():
        lock(config.out)
        reserve(*(os.path.join(config.out, name) for name in (
            "last.pt", "last.pt.new", "last.pt.previous", "log.jsonl", "unreadable.txt")))
    wait()


def announce(kind: str, model: nn.Module, train, step: int, config, world: int, device):
    """Prints what is about to be trained, and brings the log to where the run goes on."""
    if is_first():
        trim_log(config, step)
        print(f"{kind}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} "
              f"training images in {len(train.classes)} classes, step {step} of {config.steps}, "
              f"{world} x {device}", flush=True)


def distribute(model: nn.Module, blocks: list[nn.Module], config, world: int, device):
    """What to call in place of the model: with compiled blocks, in step with the other processes.
    The model itself stays as it is, to be saved and averaged."""
    if device.type == "cuda" if config.compile is None else config.compile:
        torch._dynamo.config.optimize_ddp = False  # it would split what is compiled by blocks
        for block in blocks:
            block.compile(dynamic=False)
    if world == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def end(kind: str, config):
    """The end of a run: prints where its checkpoint is, and leaves the other processes."""
    wait()  # for the first process to have saved: what goes wrong in leaving would end it
    if is_first():
        print(f"{kind}: {os.path.join(config.out, 'last.pt')}")
    if dist.is_initialized():
        dist.destroy_process_group()


def write_log(config, **numbers):
    """In the first process, prints one line and appends the same numbers to log.jsonl."""
    if not is_first():
        return

    def brief(value) -> str:
        if isinstance(value, list):
            return " ".join(map(brief, value[:8])) + " ..." * (len(value) > 8)
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    print("  ".join(f"{name} {brief(value)}" for name, value in numbers.items()), flush=True)
    path = os.path.join(config.out, "log.jsonl")
    with about(path), open(path, "a") as file:
        file.write(json.dumps(numbers) + "\n")


def trim_log(config, step: int):
    """Removes from log.jsonl what a run wrote after `step`, at which it now goes on, and lines that
    are no records."""
    path, kept = os.path.join(config.out, "log.jsonl"), []
    if os.path.exists(path):
        with about(path), open(path, errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError, KeyError):  # no record
                    kept += [line] if json.loads(line)["step"] <= step else []
        write(path, lambda file: file.write("".join(kept).encode()))


def utilisation(flops_per_second: float) -> dict:
    """Model FLOP utilisation: the share of the GPU's dense bf16 peak, where that is known."""
    peaks = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # vendor's data sheets
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"mfu": flops_per_second / peak for gpu, peak in peaks.items() if gpu in name}


# ---- Data ----------------------------------------------------------------------------------------

class Shapes:
    """The built-in data: pictures drawn by code. Picture i is a function of i alone and shows the
    shape of class i mod 10 before a ground of four colours, one a corner. These five colours vary,
    and a little the place and size, so that late tokens, too, have something to tell."""
    classes = ["circle", "ring", "moon", "cross", "x", "triangle", "heart", "hourglass", "stripes",
               "checkers"]

    def __init__(self, first: int, count: int, size: int):
        self.first, self.count, self.size = first, count, size

    def __len__(self) -> int:
        return self.count

    def describe(self) -> str:
        return f"{self.size} {self.first} {self.count}"

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        number = self.first + i
        rng, label = np.random.default_rng((0, number)), number % len(self.classes)
        side, unit = 4 * self.size, self.size / 8  # drawn 4 times larger, then averaged

        def colour(dark: float, bright: float) -> tuple:
            hue = rng.integers(6) / 6 + rng.uniform(0, 0.03)  # red, yellow, green, cyan, blue, ...
            rgb = colorsys.hsv_to_rgb(hue, 0.85, rng.uniform(dark, bright))
            return tuple(int(255 * channel) for channel in rgb)

        corners = np.array([[colour(0.25, 0.6) for _ in range(2)] for _ in range(2)], np.uint8)
        picture = Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR)
        mask = Image.new("L", (side, side))
        (x, y), r = unit * (16 + rng.uniform(-1, 1, 2)), unit * rng.uniform(11, 12.5)
        self.draw(self.classes[label], ImageDraw.Draw(mask), x, y, r, 255, 0)
        picture.paste(colour(0.85, 1), mask=mask)
        return picture.resize((self.size,) * 2, Image.Resampling.BOX), label

    @staticmethod
    def draw(name: str, pen, x: float, y: float, r: float, shape: int, ground: int):
        """Draws the named shape of radius r around (x, y)."""
        def disc(a, b, radius, colour):
            a, b, radius = x + r * a, y + r * b, r * radius
            pen.ellipse((a - radius, b - radius, a + radius, b + radius), colour)

        def polygon(*corners):
            pen.polygon([(x + r * a, y + r * b) for a, b in corners], shape)

        def box(left, top, right, bottom):
            polygon((left, top), (right, top), (right, bottom), (left, bottom))

        if name in ("circle", "ring", "moon"):
            disc(0, 0, 1, shape)
            if name == "ring":
                disc(0, 0, .6, ground)
            if name == "moon":
                disc(.5, -.25, .8, ground)
        elif name == "cross":
            box(-.3, -1, .3, 1)
            box(-1, -.3, 1, .3)
        elif name == "x":
            polygon((-1, -1), (-.5, -1), (1, 1), (.5, 1))
            polygon((1, -1), (.5, -1), (-1, 1), (-.5, 1))
        elif name == "triangle":
            polygon((0, -1), (1, .9), (-1, .9))
        elif name == "heart":
            disc(-.47, -.35, .53, shape)
            disc(.47, -.35, .53, shape)
            polygon((-.93, -.1), (.93, -.1), (0, 1.05))
        elif name == "hourglass":
            polygon((-1, -1), (1, -1), (-1, 1), (1, 1))
        elif name == "stripes":
            for top in (-1, -.2, .6):
                box(-1, top, 1, top + .4)
        elif name == "checkers":
            box(-1, -1, 0, 0)
            box(0, 0, 1, 1)


class Folder:
    """Images in one sub-folder a class, at any depth; the classes and the images of each in sorted
    order. Hidden folders are left out. Raises a Mistake for a class without images."""

    def __init__(self, root: str, size: int):
        self.root, self.size, names, labels = root, size, [], []

        def refuse(error: OSError):
            raise Mistake(f"{error.filename}: {error.strerror}")
        with about(root):
            self.classes = sorted(entry.name for entry in os.scandir(root)
                                  if entry.is_dir() and not entry.name.startswith("."))
        for label, name in enumerate(self.classes):
            found = sorted(os.path.join(folder, file) for folder, _, files
                           in os.walk(os.path.join(root, name), onerror=refuse) for file in files
                           if file.lower().endswith(IMAGE_ENDINGS) and not file.startswith("."))
            if not found:
                raise Mistake(f"no images in {os.path.join(root, name)}, a class of its own as "
                              "each sub-folder is; fill or remove it")
            names += [os.fsencode(os.path.relpath(path, root)) for path in found]
            labels += [label] * len(found)
        if not names:
            raise Mistake(f"no images in {root}: it must hold one sub-folder of images a class")
        # Two blocks of memory, which the processes that load images share.
        self.names, self.labels = np.array(names), np.array(labels, np.int32)

    def some(self, chosen) -> "Folder":
        """The same classes with a choice of the images: a slice, or a mask."""
        part = copy.copy(self)
        part.names, part.labels = self.names[chosen], self.labels[chosen]
        return part

    def describe(self) -> str:
        """What makes these images others than those of another folder."""
        return f"{self.size} {hashlib.sha256(self.names).hexdigest()}"

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return read_image(self.path(i), self.size), int(self.labels[i])


def open_data(data: str, size: int) -> tuple:
    """Training and held-out images of `--data`: "shapes", a folder of classes (of which every 100th
    image is then held out), or a folder that holds `train` and `val` or `test` folders of classes.
    """
    if data == "shapes":
        return Shapes(0, 20_000, size), Shapes(1_000_000, 1_000, size)
    if not os.path.isdir(data):
        raise Mistake(f"no folder {data}; give --data DIR with one sub-folder of images a class, "
                      "or --preset toy for the built-in pictures")
    for name in ("val", "test"):
        parts = [os.path.join(data, part) for part in ("train", name)]
        if all(map(os.path.isdir, parts)):
            train, held_out = (Folder(part, size) for part in parts)
            if train.classes != held_out.classes:
                raise Mistake(f"{parts[0]} and {parts[1]} hold different classes")
            return train, held_out
    whole = Folder(data, size)
    held_out = np.arange(len(whole)) % 100 == 0
    return whole.some(~held_out if len(whole) > 1 else held_out), whole.some(held_out)


def read_or_another(source, i: int) -> tuple[Image.Image, int, str]:
    """Image i and its label, or, where it cannot be read, another one that is a function of i; and
    what was wrong with those that cannot, a line each. Raises a Mistake after 100 of them."""
    unreadable = []
    for attempt in range(100):
        if attempt:
            i = int(np.random.default_rng((i, attempt)).integers(len(source)))
        try:
            return *source[i], "\n".join(unreadable)
        except Mistake as error:
            unreadable.append(str(error))
    raise Mistake(f"100 images taken at random cannot be read, the last: {unreadable[-1]}")


class Unreadable:
    """Names each image that this process cannot read once, in the output and in a file. Raises a
    Mistake when they are more than 1 % of the `total` images, if these are 20 or more."""

    def __init__(self, out: str, total: float):
        self.path, self.total, self.known = os.path.join(out, "unreadable.txt"), total, set()

    def note(self, lines: list[str]):
        """Takes what `read_or_another` said of each image of a batch."""
        for line in "\n".join(lines).splitlines():
            if not line or line in self.known:
                continue
            self.known.add(line)
            print(f"skipped {len(self.known)}: {line}", flush=True)
            with about(self.path), open(self.path, "a", errors="surrogateescape") as file:
                file.write(line + "\n")
        if self.total >= 20 and len(self.known) > 0.01 * self.total:
            raise Mistake(f"more than 1 % of the images cannot be read, {len(self.known)} so far; "
                          f"they are listed in {self.path}")


def some_of(count: int, total: int) -> list[int]:
    """Up to `count` of `total` items, always the same ones, from all over the list."""
    return np.random.default_rng(0).permutation(total)[:count].tolist()


def held_out_images(held_out, size: int, config) -> Tensor:
    """Centre crops (n, 3, H, W) of up to `eval_images` held-out images."""
    read = [read_or_another(held_out, i) for i in some_of(config.eval_images, len(held_out))]
    Unreadable(config.out, len(held_out)).note([lines for _, _, lines in read])
    return torch.stack([to_tensor(center_crop(image, size)) for image, _, _ in read])


def random_crop(image: Image.Image, size: int, resize_max: float, flip: bool, rng) -> Image.Image:
    """A random square of size x size pixels after the shorter side is resized to size ...
    resize_max x size, mirrored half of the time if `flip`."""
    image = resize_shorter(image, int(rng.integers(size, int(size * resize_max) + 1)))
    left, top = rng.integers(image.width - size + 1), rng.integers(image.height - size + 1)
    image = image.crop((left, top, left + size, top + size))
    mirrored = flip and rng.random() < 0.5
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


class Shuffle:
    """Endless shuffled epochs of `count` items. What stands at `position` = 0, 1, ... is a function
    of (seed, position): a resumed run sees what the uninterrupted one would, on any processes."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch, self.order = count, seed, -1, None

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self.epoch:
            self.epoch = epoch
            rng = np.random.default_rng((self.seed, Purpose.ORDER, epoch))
            self.order = rng.permutation(self.count)
        return int(self.order[place])


class Crops(torch.utils.data.Dataset):
    """Random crops of training images in the order of `Shuffle`; each a function of (seed,
    position)."""

    def __init__(self, source, config, size: int):
        self.source, self.config, self.size = source, config, size
        self.shuffle = Shuffle(len(source), config.seed)

    def __getitem__(self, position: int) -> tuple[Tensor, int, str]:
        """Image (3, H, W), position, and the images that could not be read on the way."""
        image, _, unreadable = read_or_another(self.source, self.shuffle[position])
        rng = np.random.default_rng((self.config.seed, Purpose.CROP, position))
        crop = random_crop(image, self.size, self.config.resize_max, self.config.flip, rng)
        return to_tensor(crop), position, unreadable


def positions(config, first_step: int, rank: int, world: int) -> Iterator[int]:
    """Positions in `Shuffle` of this process from `first_step` to the end of the run."""
    share = config.batch // world
    for step in range(first_step, config.steps):
        first = step * config.batch + rank * share
        yield from range(first, first + share)


def shield(worker: int):
    """Called in a loader's process: signals to the group are for the training loop to decide on."""
    os.setpgrp()


def batches(crops: Crops, config, first_step: int, rank: int, world: int, device) -> Iterator:
    """Batches (images, positions) of this process; `accumulate` of them are one step."""
    loader = torch.utils.data.DataLoader(
        crops, local_batch(config, world), sampler=positions(config, first_step, rank, world),
        num_workers=config.workers, pin_memory=device.type == "cuda", drop_last=True,
        worker_init_fn=shield)
    unreadable = Unreadable(config.out, len(crops.source))
    for images, places, lines in loader:
        unreadable.note(lines)
        yield images.to(device, non_blocking=True), places


# ---- Losses and the codebook ---------------------------------------------------------------------

class PerceptualLoss(nn.Module):
    """LPIPS with VGG, frozen, in eval mode and float32 (Eq. 7). Raises Mistake offline."""

    def __init__(self):
        super().__init__()
        import lpips
        try:
            self.net = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
        except (OSError, RuntimeError) as error:
            raise Mistake(f"LPIPS needs download.pytorch.org/models/vgg16-397923af.pth in "
                             f"{torch.hub.get_dir()}/checkpoints ({error}); "
                             "--lpips 0 trains without") from None

    def forward(self, predicted: Tensor, images: Tensor) -> Tensor:
        """Mean distance of images (B, 3, H, W) in [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return self.net(predicted.float(), images.float()).mean()


class RepaLoss(nn.Module):
    """1 - cosine to DINOv2-B/14 patch features (Sec. 4, Eq. 7). Raises Mistake offline."""

    def __init__(self):
        super().__init__()
        try:
            net = torch.hub.load("facebookresearch/dinov2", "dinov2_vitb14", verbose=False)
        except (OSError, RuntimeError) as error:
            raise Mistake("REPA needs github.com/facebookresearch/dinov2 (branch main) as "
                             f"{torch.hub.get_dir()}/facebookresearch_dinov2_main, and "
                             "dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/"
                             f"dinov2_vitb14_pretrain.pth in {torch.hub.get_dir()}/checkpoints "
                             f"({error}); --repa 0 trains without") from None
        self.net = net.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def forward(self, predicted: Tensor, images: Tensor) -> Tensor:
        """predicted: (B, side * side, 768) features. images: (B, 3, H, W) in [-1, 1]."""
        side = 14 * math.isqrt(predicted.shape[1])                           # 224 for 256 pixels
        with torch.no_grad():
            normal = ((images + 1) / 2 - self.mean) / self.std
            small = F.interpolate(normal, size=(side, side), mode="bicubic", antialias=False)
            features = self.net.forward_features(small)["x_norm_patchtokens"]
        return (1 - F.cosine_similarity(predicted.float(), features.float(), dim=-1)).mean()


def losses_of(output: TrainOutput, images: Tensor, lpips: PerceptualLoss | None,
              repa: RepaLoss | None) -> dict[str, Tensor]:
    """The parts of Eq. 7, without their weights; without the networks that are None."""
    losses = {"flow": output.flow_loss, "vq": output.vq_loss}
    if lpips is not None:
        losses["lpips"] = lpips(output.predicted, images)
    if repa is not None:
        losses["repa"] = repa(output.repa, images)
    return losses


class CodebookUse(nn.Module):
    """How long each codebook row has gone unused, over all processes. idle: (V,) steps since it was
    used; age: (V,) steps since it was used or re-seeded."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("idle", torch.full((size,), 2 ** 40))           # never used yet
        self.register_buffer("age", torch.zeros_like(self.idle))

    def update(self, tokens: Tensor):
        """Counts one more step, in which this process saw `tokens` (any shape)."""
        used = torch.zeros_like(self.idle)
        used[tokens.flatten()] = 1
        if dist.is_initialized():
            dist.all_reduce(used, dist.ReduceOp.MAX)
        self.idle = torch.where(used > 0, 0, self.idle + 1)
        self.age = torch.where(used > 0, 0, self.age + 1)

    def share(self, window: int) -> float:
        """Share of the codebook used in the last `window` steps."""
        return (self.idle < window).float().mean().item()

    @torch.no_grad()
    def reseed(self, after: int, z: Tensor, generator: torch.Generator, *codebooks: Tensor):
        """Sets rows of age `after` to random rows of z (B, N, 8), in all `codebooks` (V, 8), on all
        processes alike."""
        z = F.normalize(z.flatten(0, 1).float(), dim=-1)                     # (B N, 8)
        chosen = torch.randint(len(z), self.idle.shape, generator=generator, device=z.device)
        fresh = z[chosen]                                                    # (V, 8)
        if dist.is_initialized():
            dist.broadcast(fresh, 0)
        dead = self.age >= after
        for codebook in codebooks:
            codebook.copy_(torch.where(dead[:, None], fresh, codebook))
        self.age = torch.where(dead, 0, self.age)


def group_knows(model: Tokenizer, images: Tensor, noise: Tensor, tokens: Tensor) -> Tensor:
    """What each group of tokens knows, (K,): the flow loss at the group's own time with its tokens
    taken from another image, over that with the image's own. 1: nothing, the group is dead.
    images, noise: (B, 3, H, W). tokens: (B, N)."""
    config, ratios = model.config, []
    x1, others = config.sigma * images, tokens.roll(1, 0)
    for step in sampling_schedule(config.num_groups, config.num_groups, config.beta,
                                  config.num_groups):
        first = step.group * config.group_size  # what comes after the group plays no part
        exchanged = torch.cat([tokens[:, :first], others[:, first:]], 1)
        xt = interpolate(x1, noise, x1.new_full((1,), step.t))
        own, other = (model.velocity(xt, step, model.condition(chosen)) - (x1 - noise)
                      for chosen in (tokens, exchanged))
        ratios.append(other.pow(2).mean() / own.pow(2).mean())
    return torch.stack(ratios)


@torch.no_grad()
def evaluate(model: Tokenizer, images: Tensor, seed: int) -> tuple[dict, Image.Image]:
    """Reconstructs held-out images (B, 3, H, W). Returns numbers (PSNR in dB of the previews after
    each group; flow and VQ losses at the time at which the sampler uses it; what it knows; how many
    codebook rows stand at each position) and a picture (8 rows: original, then the previews)."""
    config, parts = model.config, []
    numbers = dict.fromkeys(("flow_by_group", "vq_by_group", "group_knows"), 0.0)
    noise = torch.randn(images.shape, generator=seeded(seed, Purpose.EVALUATION)).to(images.device)
    for part, eps in zip(images.split(64), noise.split(64)):
        tokens = model.encode(part)                                          # (n, N)
        with autocast(images.device):
            previews = [*model.stream(tokens.split(config.group_size, 1), eps)]
            outputs = [model(part, torch.full_like(eps[:, 0, 0, 0], k / config.num_groups), eps)
                       for k in range(config.num_groups)]
            knows = group_knows(model, part, eps, tokens)
        parts.append((tokens, torch.stack([part, *previews], 1)))            # (n, 1 + K, 3, H, W)
        share = len(part) / len(images)
        numbers["flow_by_group"] += share * torch.stack([o.flow_loss for o in outputs])
        numbers["vq_by_group"] += share * torch.stack([o.vq_loss for o in outputs])
        numbers["group_knows"] += share * knows
    tokens, shown = map(torch.cat, zip(*parts))
    decibels = [psnr(preview, images) for preview in shown.unbind(1)[1:]]
    return ({"psnr": decibels[-1], "psnr_by_group": decibels,
             **{name: values.tolist() for name, values in numbers.items()},
             "rows_by_position": [len(column.unique()) for column in tokens.T]},
            image_grid(shown[:8].flatten(0, 1), shown.shape[1]))


def choose_architecture(config, architecture: TokenizerConfig, start: Tokenizer | None,
                        given: dict) -> TokenizerConfig:
    """That of the preset or, where there is one, of the tokenizer to start from, with the flags
    that were given; without a REPA head where its loss has no weight. Raises Mistake."""
    if start is not None:
        asked = {name: given[name] for name in given if hasattr(architecture, name)}
        architecture = build(TokenizerConfig, {**asdict(start.config), **asked}, config.init_from)
    if config.repa == 0:
        return replace(architecture, repa_depth=0)
    if not architecture.repa_depth:
        raise Mistake("--repa needs a REPA head: give --repa-depth, or --repa 0")
    return architecture


# ---- The run -------------------------------------------------------------------------------------

def main(argv: list[str] | None = None):
    (config, architecture), given = parse_settings(PRESETS, argv, __doc__)
    start = load_tokenizer(config.init_from) if config.init_from else None
    architecture = choose_architecture(config, architecture, start, given)

    # Processes
    rank, world, device = join_processes()
    local_batch(config, world)  # a mistake in it comes before any work

    # Data
    train, held_out = open_data(config.data, architecture.image_size)
    claim(config)
    shown = held_out_images(held_out, architecture.image_size, config).to(device)

    # Model, its running average, and the networks of the losses
    torch.manual_seed(config.seed)
    model = Tokenizer(architecture).to(device)
    if start is not None:
        start_from(model, start.state_dict(), config.init_from, ("repa_head.",))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    lpips = in_turn(PerceptualLoss).to(device) if config.lpips else None
    repa = in_turn(RepaLoss).to(device) if config.repa else None
    weights = {"flow": 1.0, "vq": config.vq, "lpips": config.lpips, "repa": config.repa}
    use = CodebookUse(architecture.codebook_size).to(device)

    # Optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr,
                                  betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)

    # Resume
    parts = {"model": model, "ema": ema, "use": use}
    first_step = resume(config, asdict(config), "tokenizer", parts, optimizer)
    announce("tokenizer", model, train, first_step, config, world, device)

    # Memory, compile, distribute
    def one_loss(n: int) -> Tensor:
        images = shown[:1].expand(n, -1, -1, -1).clone()
        with autocast(device):
            output = model(images, images.new_zeros(n), images)  # any noise will do
            return sum(losses_of(output, images, lpips, repa).values())

    config = with_accumulate(config, one_loss, model, world, device)
    flops = count_flops(lambda: one_loss(1).backward())
    optimizer.zero_grad(set_to_none=True)
    ddp = distribute(model, [*model.encoder.blocks, *model.decoder.blocks,
                             *model.diffusion.blocks], config, world, device)

    # Loop
    data = batches(Crops(train, config, architecture.image_size), config, first_step, rank, world,
                   device)
    clock, stop = Clock(config), Stop()
    for step in range(first_step, config.steps):
        last = step == config.steps - 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        # All processes draw the times of the whole batch: vq_loss is a mean over the tokens of one
        # pass, and `counts` makes it one over those of the batch.
        u = torch.rand(config.batch, device=device,
                       generator=seeded(config.seed, Purpose.TIMES, step, device=device))
        counts = group_of(u, architecture.num_groups) + 1.0                  # in groups
        counts *= len(counts) / counts.sum()                                 # 1 on average
        tokens = []
        for part in range(config.accumulate):
            images, places = next(data)
            first = places[0].item() - step * config.batch
            mine = slice(first, first + len(places))  # places in this step's batch
            noise = noise_of(config.seed, Purpose.NOISE, places.tolist(), images.shape[1:], device)
            if world > 1:
                ddp.require_backward_grad_sync = part == config.accumulate - 1
            with autocast(device):
                output = ddp(images, u[mine], noise)
                losses = losses_of(output, images, lpips, repa)
                losses["vq"] = losses["vq"] * counts[mine].mean()
                loss = sum(weights[name] * value for name, value in losses.items())          # Eq. 7
            (loss / config.accumulate).backward()
            tokens.append(output.tokens)
            clock.add(step, **losses)
        clock.add(step, gradient=nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, config.ema)
        use.update(torch.cat(tokens))
        if config.reseed_after:
            use.reseed(config.reseed_after, output.z,
                       seeded(config.seed, Purpose.RESEED, step, device=device),
                       model.quantizer.codebook, ema.quantizer.codebook)

        if (step + 1) % config.log_every == 0 or last:
            means = clock.read(step + 1)
            write_log(config, step=step + 1, **means, lr=learning_rate(step, config),
                      codebook=use.share(config.use_window),
                      **utilisation(means["images_per_s"] * flops / world))
        clock.stop()
        if is_first() and ((step + 1) % config.eval_every == 0 or last):
            numbers, picture = evaluate(ema, shown, config.seed)
            write_picture(os.path.join(config.out, f"reconstructions_{step + 1:06d}.png"), picture)
            write_log(config, step=step + 1, **numbers)
        stopped = stop.asked()
        if (step + 1) % config.save_every == 0 or last or stopped:
            clock.check()
            if is_first():
                save(config, asdict(config), "tokenizer", parts, optimizer, step + 1)
        if stopped and not last:
            stop.leave(step + 1)
        clock.start()
    stop.release()
    end("tokenizer", config)


if __name__ == "__main__":
    run(main)
