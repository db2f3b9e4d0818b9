"""Trains the sequential diffusion tokenizer.

    python train_tokenizer.py --preset toy                       built-in pictures, on a CPU
    torchrun --nproc_per_node=8 train_tokenizer.py --data DIR    the paper's run: ImageNet at 256
    torchrun --nproc_per_node=4 train_tokenizer.py --data DIR --preset light    the ablation model

DIR holds one sub-folder of images a class, or `train` and `val` folders of such. The paper's run
took about 5 days on 16 A100 GPUs (1,900 GPU-hours), the ablation model 8 hours on 4. Every setting
below is a flag. The same command goes on where a run was killed, from out/tokenizer/last.pt, with
the images, times and noise that it would have seen; log.jsonl then holds repeated steps twice.
Helpers that are imported from sample.py stand in its second half, Mistake, run and find_images in
fid.py.
"""
import copy
import functools
import json
import math
import os
import time
import unicodedata
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model_tokenizer import TOKENIZERS, Tokenizer, group_of, interpolate, sampling_schedule
from sample import (Mistake, autocast, center_crop, compile_blocks, digest, draw_noise,
                    find_images, image_grid, join_processes, leave_processes, load_checkpoint,
                    load_tokenizer, load_weights, pack, parse, print0, psnr, rank, read_image,
                    resize_shorter, run, save_picture, seed_of, seeded, spread, to_tensor, wait,
                    world, write)


@dataclass
class TrainConfig:
    """Settings of a run. Defaults are the paper's; their source is in brackets."""
    # Files
    out: str = "out/tokenizer"      # folder of checkpoints, log and pictures
    init_from: str = ""             # checkpoint a new run starts from, but for its REPA head
    save_minutes: float = 10        # between checkpoints; 0: one after each step
    keep_every: int = 0             # steps between checkpoints that stay; 0: only the last one
    # Data
    data: str = "data/imagenet"     # folder of images, or "shapes": the built-in pictures
    resize_max: float = 1.25        # before a crop, the shorter side is 1 to this x image_size
    flip: bool = True               # mirror half of the images (Sec. 5)
    workers: int = 8                # processes that load images, for each training process
    # Optimizer
    steps: int = 210_000            # (Sec. 5)
    batch: int = 1024               # images a step, over all processes (Sec. 5)
    micro_batch: int = 32           # images a process and backward pass, at most
    lr: float = 2e-4                # (released code; constant after warm-up)
    lr_final: float = 2e-4          # learning rate at the end of `decay_steps`
    warmup_steps: int = 500         # linear rise of the learning rate (released code)
    decay_steps: int = 0            # linear fall to lr_final over the last steps
    beta1: float = 0.9              # AdamW (released code)
    beta2: float = 0.95             # AdamW (released code)
    weight_decay: float = 0.0       # AdamW (released code)
    clip: float = 1.0               # largest norm of the gradient (released code)
    ema: float = 0.999              # decay of the averaged weights (released code)
    # Losses
    vq: float = 1.0                 # weight of the codebook and commitment losses (Eq. 7)
    lpips: float = 0.5              # weight of LPIPS (Eq. 7); 0: neither computed nor downloaded
    repa: float = 0.5               # weight of REPA (Eq. 7); 0: neither computed nor downloaded
    reseed_after: int = 0           # steps until an unused codebook row is renewed (ours); 0: never
    # The run
    seed: int = 0
    compile: bool = True            # torch.compile the transformer blocks, on CUDA only
    log_every: int = 100            # steps between log lines
    eval_every: int = 5000          # steps between pictures and held-out PSNR
    eval_images: int = 64           # held-out images for these, while other processes wait


PRESETS = {  # name: (settings of the run, architecture)
    "paper": (TrainConfig(), TOKENIZERS["paper"]),
    # App. III
    "light": (TrainConfig(steps=50_000, batch=256, micro_batch=64), TOKENIZERS["light"]),
    "toy": (TrainConfig(
        save_minutes=1, data="shapes", resize_max=1.0, flip=False, workers=0,
        steps=2200, batch=32, lr=3e-3, lr_final=1e-4, warmup_steps=50, decay_steps=1320,
        ema=0.98, vq=0.1, lpips=0.0, repa=0.0, reseed_after=20,
        eval_every=400, eval_images=200), TOKENIZERS["toy"]),
    "cifar": (TrainConfig(
        data="data/cifar10", resize_max=1.0,
        steps=1800, micro_batch=1024, lr=8e-4, lr_final=1e-4, warmup_steps=100,
        decay_steps=600, ema=0.998,
        vq=0.1, lpips=0.0, repa=0.0, reseed_after=50,
        eval_every=600, eval_images=192), TOKENIZERS["cifar"]),
}


# ---- Built-in pictures ---------------------------------------------------------------------------

SHAPES = {
    "plus": "..#.. ..#.. ##### ..#.. ..#..", "times": "#...# .#.#. ..#.. .#.#. #...#",
    "ring": "##### #...# #...# #...# #####", "square": "##### ##### ##### ##### #####",
    "stripes": "##### ..... ##### ..... #####", "columns": "#.#.# #.#.# #.#.# #.#.# #.#.#",
    "window": "##.## ##.## ..... ##.## ##.##", "tent": "..#.. ..#.. .###. .###. #####",
    "heart": ".#.#. ##### ##### .###. ..#..", "corner": "##### ##### ##... ##... ##...",
}


@dataclass
class Shapes:
    """Pictures drawn by code. Picture i is a function of i alone and shows the shape of class
    i mod 10 in one of six bright colours before a dark ground of any colours. Shades, place and
    size vary a little, so that late tokens, too, have something to tell."""
    first: int
    count: int
    size: int  # pixels a side
    classes = list(SHAPES)

    def __len__(self):
        return self.count

    def digest(self):
        return repr(self)

    def __getitem__(self, i):
        number = self.first + i
        rng = np.random.default_rng((0, number))
        label = number % len(self.classes)

        side = 4 * self.size  # drawn 4 times larger, then averaged
        ground = rng.integers(128, size=(2, 2, 3), dtype=np.uint8)  # a dark colour a corner
        picture = Image.fromarray(ground).resize((side, side), Image.BILINEAR)
        rows = SHAPES[self.classes[label]].split()
        mask = Image.fromarray(np.array([list(row) for row in rows]) == "#")
        size = int(side * rng.uniform(0.8, 0.95))
        left, top = ((side - size) * rng.uniform(0.35, 0.65, 2)).astype(int)
        hue = 60 * rng.integers(6) + rng.integers(12)  # red, yellow, green, cyan, blue, magenta
        colour = f"hsv({hue},85%,{rng.integers(85, 101)}%)"
        picture.paste(colour, (left, top), mask.resize((size, size)))
        return picture.resize((self.size, self.size), Image.BOX), label


# ---- Folders of images ---------------------------------------------------------------------------

def subfolders(root):
    return sorted(entry.name for entry in os.scandir(root)
                  if entry.is_dir() and not entry.name.startswith("."))


class Folder:
    """Images in one sub-folder a class, at any depth. classes: sorted names; a label is a place
    among them. None: those of the sub-folders. Raises Mistake."""
    draft_size = 0  # see `read_image`

    def __init__(self, root, classes=None):
        self.root = root
        images = find_images(root, quiet=rank() > 0)
        names = [name for name in images if os.sep in name]
        if not names:
            raise Mistake(f"{root} must hold one sub-folder of images a class")
        if len(names) < len(images):
            print0(f"{root}: left out {len(images) - len(names)} images in no class's folder")
        # In one form: systems write accents in two ways
        labels = [unicodedata.normalize("NFC", name.split(os.sep)[0]) for name in names]
        self.classes = classes or sorted(set(labels))
        if unknown := set(labels) - set(self.classes):
            raise Mistake(f"{root} has classes that the training images lack: {sorted(unknown)}")
        # Two blocks of memory, which the processes that load images share
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.searchsorted(self.classes, labels)

    def subset(self, chosen):
        """A copy with only the images that a mask chooses; the classes stay."""
        part = copy.copy(self)
        part.names = self.names[chosen]
        part.labels = self.labels[chosen]
        return part

    def digest(self):
        """Stands for the images, by their names, and their labels."""
        return digest(self.names.tobytes(), self.labels.tobytes())

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        path = f"{self.root}/{os.fsdecode(self.names[i])}"
        return read_image(path, self.draft_size), self.labels[i]


HELD_OUT = ("val", "valid", "validation", "test")


def open_data(data, size):
    """Training and held-out images of `--data`: "shapes"; a folder that holds `train` and, under a
    usual name, held-out folders of classes; or a folder of classes. Where nothing is held out,
    every 100th image is. Prints what it takes for what."""
    if data == "shapes":
        return Shapes(0, 10_000, size), Shapes(1_000_000, 1_000, size)
    if not os.path.isdir(data):
        raise Mistake(f"no folder {data}; give --data DIR with one sub-folder of images a class, "
                      "or --preset toy for the built-in pictures")
    folders = subfolders(data)
    if "train" in folders and subfolders(f"{data}/train"):
        train = Folder(f"{data}/train")
    else:
        train = Folder(data)
        folders = []  # these are names of classes
    held_out = [name for name in HELD_OUT if name in folders][:1]
    if held_out:
        val = Folder(f"{data}/{held_out[0]}", train.classes)
    else:
        chosen = np.arange(len(train)) % 100 == 0
        val = train.subset(chosen)
        train = train.subset(~chosen) if len(train) > 1 else train
    unused = sorted(set(folders) - {"train", *held_out})
    print0(f"{train.root}: {len(train):,} images; held out: {len(val):,} in {val.root}; not used: "
           f"{' '.join(unused) or 'none'}; {len(train.classes)} classes: "
           f"{' '.join(train.classes[:10])}")
    return train, val


def read_any(source, i):
    """Image i and its label or, where it cannot be read, the next one's. A Mistake after 100."""
    for number in range(i, i + 100):
        try:
            return source[number % len(source)]
        except Mistake as error:
            print(f"skipped: {error}", flush=True)
    raise Mistake("100 images one after another cannot be read")


@functools.lru_cache(1)
def order_of(count, seed, epoch):
    return np.random.default_rng(seed_of(seed, "order", epoch)).permutation(count)


def item_at(position, count, seed):
    """The item at `position` = 0, 1, ... of endless shuffled epochs of `count` items. It is a
    function of its arguments: a resumed run sees what the uninterrupted one would, on any
    processes."""
    epoch, index = divmod(position, count)
    return order_of(count, seed, epoch)[index]


def random_crop(image, size, resize_max, flip, rng):
    """A random square of size x size pixels after the shorter side is resized to size ...
    resize_max x size, mirrored half of the time if `flip`."""
    image = resize_shorter(image, rng.integers(size, int(size * resize_max) + 1))
    left = rng.integers(image.width - size + 1)
    top = rng.integers(image.height - size + 1)
    image = image.crop((left, top, left + size, top + size))
    return ImageOps.mirror(image) if flip and rng.random() < 0.5 else image


@dataclass
class RandomCrops:
    """Random crops (3, H, W) of training images in the order of `item_at`; each a function of
    (seed, position)."""
    source: Shapes | Folder
    config: TrainConfig
    size: int

    def __getitem__(self, position):
        config = self.config
        number = item_at(position, len(self.source), config.seed)
        image, _ = read_any(self.source, number)
        rng = np.random.default_rng(seed_of(config.seed, "crop", position))
        return to_tensor(random_crop(image, self.size, config.resize_max, config.flip, rng))


# ---- Losses and the codebook ---------------------------------------------------------------------

class PerceptualLoss(nn.Module):
    """LPIPS with VGG, frozen, in eval mode, without autocast (Eq. 7). Downloads VGG once."""

    def __init__(self):
        super().__init__()
        import lpips
        self.net = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)

    def forward(self, output, images):
        """Mean distance () of predicted images and images (B, 3, H, W) in [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return self.net(output.predicted, images).mean()


class RepaLoss(nn.Module):
    """1 - cosine to DINOv2-B/14 patch features (Sec. 4, Eq. 7). Downloads DINOv2 once."""

    def __init__(self):
        super().__init__()
        net = torch.hub.load("facebookresearch/dinov2:main", "dinov2_vitb14", verbose=False)
        self.net = net.eval().requires_grad_(False)
        moments = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        self.register_buffer("moments", moments[..., None, None])            # (2, 3, 1, 1)

    def forward(self, output, images):
        """Mean over patches (); images (B, 3, H, W) in [-1, 1]."""
        side = 14 * math.isqrt(output.repa.shape[1])                         # 224 for 256 pixels
        mean, std = self.moments
        normal = ((images + 1) / 2 - mean) / std
        small = F.interpolate(normal, side, mode="bicubic")
        features = self.net.forward_features(small)["x_norm_patchtokens"]    # (B, L/4, 768)
        cosines = F.cosine_similarity(output.repa, features, dim=-1)  # float32 under autocast, too
        return 1 - cosines.mean()


def loss_networks(config):
    """The networks of LPIPS and REPA by name, where they count. The first process of each node
    builds them before the others, which find its downloads."""
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    if local_rank > 0:
        wait()
    networks = nn.ModuleDict()
    if config.lpips:
        print0("LPIPS needs a download, once; --lpips 0 trains without")
        networks["lpips"] = PerceptualLoss()
    if config.repa:
        print0("REPA needs a download, once; --repa 0 trains without")
        networks["repa"] = RepaLoss()
    if local_rank == 0:
        wait()
    return networks


class CodebookUse(nn.Module):
    """Steps for which each codebook row has gone unused, over all processes: idle, (V,)."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("idle", torch.zeros(size, dtype=torch.long))

    def update(self, tokens):
        """Counts one more step, in which this process saw `tokens` (any shape)."""
        self.idle += 1
        self.idle[tokens] = 0
        if dist.is_initialized():
            dist.all_reduce(self.idle, dist.ReduceOp.MIN)

    @torch.no_grad()
    def reseed(self, z, generator, after, codebooks):
        """Sets rows unused for `after`, 2 `after`, ... steps to random rows of z (B, N, C), of the
        first process's last pass, in all `codebooks` (V, C), on all processes alike. Which rows
        of z these are depends on how the batch is split."""
        z = F.normalize(z.flatten(0, 1).float(), dim=-1)
        fresh = z[torch.randint(len(z), self.idle.shape, generator=generator, device=z.device)]
        if dist.is_initialized():
            dist.broadcast(fresh, 0)                                # (V, C)
        dead = (self.idle > 0) & (self.idle % after == 0)
        for codebook in codebooks:
            codebook.copy_(torch.where(dead[:, None], fresh, codebook))


# ---- Evaluation ----------------------------------------------------------------------------------

def group_knows(model, images, noise, tokens):
    """What each group of tokens knows, (K,): the flow loss at the group's own time with its tokens
    taken from another image, over that with the image's own. 1: nothing, the group is dead.
    images, noise: (B, 3, H, W), tokens: (B, N), of two images or more."""
    config = model.config
    groups = config.num_groups
    x1 = config.sigma * images

    def flow_loss(tokens, step):
        xt = interpolate(x1, noise, step.t)
        return F.mse_loss(model.velocity(xt, step, model.condition(tokens)), x1 - noise)

    ratios = []
    for step in sampling_schedule(groups, groups, config.beta, groups):
        first = step.group * config.group_size  # what comes after the group plays no part
        exchanged = torch.cat([tokens[:, :first], tokens.roll(1, 0)[:, first:]], 1)  # (B, N)
        ratios.append(flow_loss(exchanged, step) / flow_loss(tokens, step))
    return torch.stack(ratios)


@torch.no_grad()
def evaluate(model, images, seed):
    """Reconstructs held-out images (B, 3, H, W). Returns figures (PSNR in dB of the previews after
    each group; what each group knows) and a picture (8 rows: original, then the previews)."""
    noise = torch.randn(images.shape, generator=seeded(seed, "evaluation")).to(images.device)
    tokens = model.encode(images)                                   # (B, N)
    with autocast(images.device):
        previews = list(model.stream(tokens.split(model.config.group_size, 1), noise))
        figures = {"psnr_by_group": [psnr(preview, images) for preview in previews]}
        if len(images) > 1:
            figures["group_knows"] = group_knows(model, images, noise, tokens).tolist()
    rows = torch.stack([images, *previews], 1)[:8]                  # (8, 1 + K, 3, H, W)
    return figures, image_grid(rows.flatten(0, 1), rows.shape[1])


# ---- What both trainers do -----------------------------------------------------------------------

@dataclass
class FixedCrops:
    """Fixed crops of images: item i is (views, 3, H, W) and a label. 10: the corners and the centre
    of the centred square of 1.1 x size (281 for 256), and their mirrors. 2: the centre and its
    mirror. 1: the centre. Without `flip` there are no mirrors, but 5, 1 or 1 crops."""
    source: Shapes | Folder
    size: int  # pixels a side
    views: int = 1
    flip: bool = False

    def __getitem__(self, i):
        image, label = read_any(self.source, i)
        size = self.size
        rest = size // 10 if self.views == 10 else 0
        image = to_tensor(center_crop(image, size + rest))
        corners = [(0, 0), (rest, 0), (0, rest), (rest, rest)] if rest else []
        views = []                                                  # (3, H, W) each
        for left, top in corners + [(rest // 2, rest // 2)]:
            views.append(image[:, top:top + size, left:left + size])
            if self.flip and self.views > 1:
                views.append(views[-1].flip(-1))
        return torch.stack(views), label


def positions(config, step):
    """Positions (see `item_at`) of this process's images in step 0, 1, ...: a row for each backward
    pass, (accumulation steps, micro-batch). Raises Mistake."""
    share, rest = divmod(config.batch, world())
    micro_batch = min(config.micro_batch, share)
    if rest or share % micro_batch:
        raise Mistake(f"--batch {config.batch} must divide by {world()} process(es), and the share "
                      f"of each by --micro-batch {config.micro_batch}, where it is larger")
    numbers = step * config.batch + np.arange(config.batch)
    return numbers.reshape(world(), -1, micro_batch)[rank()]


def make_optimizer(model, config):
    """AdamW, with weight decay of matrices only. `set_lr` sets the learning rate of each step."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2]},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2),
                             weight_decay=config.weight_decay, fused=True)


def set_lr(optimizer, step, config):
    """The learning rate of step 1, 2, ...: linear warm-up, constant, linear fall."""
    rate = config.lr * min(1.0, step / max(config.warmup_steps, 1))
    left = (config.steps - step + 1) / max(min(config.decay_steps, config.steps), 1)
    if left < 1:
        rate = config.lr_final + (rate - config.lr_final) * left
    for group in optimizer.param_groups:
        group["lr"] = rate


def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, in one fused call."""
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def distribute(model, config, device):
    """What to call in place of the model, in step with the other processes; its blocks are compiled
    in place. The model itself is what is saved and averaged."""
    if config.compile and device.type == "cuda":
        torch._dynamo.config.optimize_ddp = False  # it would split what is compiled by blocks
        compile_blocks(model)
    if world() == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@dataclass
class Record:
    """What a run keeps in its folder: the checkpoint, from which it goes on, and the log. `resume`,
    called first, begins the sums of losses and the clock."""
    config: object
    kind: str           # "tokenizer" or "ar"
    parts: dict         # modules by name, among them "model" and its average "ema"
    optimizer: torch.optim.Optimizer
    fixed: dict         # what must not change in a run, while settings may

    def resume(self):
        """Loads last.pt, if there is one. Returns its step, else 0. Raises Mistake."""
        config = self.config
        path = f"{config.out}/last.pt"
        self.first_step = self.load(path) if os.path.exists(path) else 0
        steps = [self.first_step] * world()
        if dist.is_initialized():
            dist.all_gather_object(steps, self.first_step)
        if len(set(steps)) > 1:
            raise Mistake(f"processes found checkpoints of different steps, {sorted(set(steps))}: "
                          "all nodes must see the same --out")
        size = sum(parameter.numel() for parameter in self.parts["model"].parameters())
        print0(f"{self.kind}: {size:,} parameters, {world()} process(es), step {self.first_step} "
               f"of {config.steps}")
        self.sums = defaultdict(float)  # of losses since the last log line
        self.logged = self.first_step
        self.began = self.saved_at = time.time()
        return self.first_step

    def load(self, path):
        """Loads a checkpoint and returns its step. Raises a Mistake where it is of another run."""
        config = self.config
        saved = load_checkpoint(path, self.kind)
        # A field that an older file lacks had its default.
        defaults = {**asdict(type(config)()), **asdict(type(self.parts["model"].config)())}
        old = {**defaults, **saved["fixed"], **saved["settings"]}
        for name, value in {**self.fixed, **asdict(config)}.items():
            if old.get(name, value) != value:
                change = f"{name} {value!s:.99} (was {old[name]!s:.99})"
                if not hasattr(config, name):  # only a setting may change
                    raise Mistake(f"{path} is of another run: {change}; give another --out")
                print0(f"going on with another setting: {change}")
        if saved["step"] > config.steps:
            raise Mistake(f"{path} is of step {saved['step']}, beyond --steps {config.steps}")
        for name, part in self.parts.items():
            part.load_state_dict(saved.get(name, saved["model"]))  # there may be no average
        # With the betas and the decay of this command
        state = saved["optimizer"]["state"]
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        return saved["step"]

    def save(self, step, **carried):
        """In the first process, writes last.pt when it is due: by the clock, at the end, and every
        `keep_every` steps, then also as step_N.pt, which stays. Raises a Mistake where a loss is
        not finite.

        Keys of a checkpoint: kind, config, model, ema; step, optimizer, fixed, settings. Of a
        tokenizer also use (of the codebook); of an autoregressive model also classes and tokenizer
        (a dict of kind, config, model)."""
        config = self.config
        keep = config.keep_every and step % config.keep_every == 0
        due = time.time() >= self.saved_at + 60 * config.save_minutes
        if rank() > 0 or not (due or keep or step == config.steps):
            return
        check_finite(self.sums)
        checkpoint = {**pack(self.kind, self.parts["model"]), **carried, "step": step,
                      "optimizer": self.optimizer.state_dict(), "fixed": self.fixed,
                      "settings": asdict(config)}
        for name, part in self.parts.items():
            checkpoint[name] = part.state_dict()
        if config.ema == 0:
            del checkpoint["ema"]  # it is the model
        save = functools.partial(torch.save, checkpoint)
        if keep:
            write(f"{config.out}/step_{step}.pt", save)
        write(f"{config.out}/last.pt", save)
        self.saved_at = time.time()

    def log_means(self, step, **others):
        """When a line is due, logs means over the steps since the last one and over processes; and,
        since `resume`, images a second and the time left at that rate."""
        config = self.config
        if step % config.log_every and step < config.steps:
            return
        means = torch.stack(list(self.sums.values()))
        if dist.is_initialized():
            dist.all_reduce(means)
        means /= world() * (step - self.logged)
        means = dict(zip(self.sums, means.tolist()))
        check_finite(means)
        self.sums.clear()
        self.logged = step
        seconds = (time.time() - self.began) / (step - self.first_step)  # a step
        self.log(step=step, **means, lr=self.optimizer.param_groups[0]["lr"],
                 images_per_s=config.batch / seconds,
                 hours_left=(config.steps - step) * seconds / 3600, **others)

    def log(self, **numbers):
        """In the first process, prints a line and appends it to log.jsonl."""
        line = json.dumps({name: significant(value) for name, value in numbers.items()})
        print0(line)
        if rank() == 0:
            os.makedirs(self.config.out, exist_ok=True)
            with open(f"{self.config.out}/log.jsonl", "a") as file:
                print(line, file=file)


def significant(value):
    """A number, or each of a list, with six significant digits; whole numbers as they are."""
    if isinstance(value, list):
        return [significant(number) for number in value]
    return value if isinstance(value, int) else float(f"{value:.6g}")


def check_finite(numbers):
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise Mistake(f"{name} is not finite; nothing was saved since. A smaller --lr may help")


# ---- The run -------------------------------------------------------------------------------------

def draw_times(batch, generator):
    """Times u (batch,) in [0, 1), one in each of as many equal parts: uniform, with less noise."""
    device = generator.device
    parts = torch.randperm(batch, generator=generator, device=device)
    u = (parts + torch.rand(batch, generator=generator, device=device)) / batch
    return u.clamp(max=1 - 2 ** -24)  # the largest float32 below 1, as the sum may round to 1


def load_crops(crops, config, first_step, device):
    """Yields images (micro, 3, H, W) of this process from a step on."""
    steps = range(first_step, config.steps)
    return iter(torch.utils.data.DataLoader(
        crops, batch_sampler=chain.from_iterable(positions(config, step) for step in steps),
        num_workers=config.workers, pin_memory=device.type == "cuda"))


def main(argv=None):
    # Settings and processes
    config, architecture = parse(PRESETS, argv, __doc__)
    if config.repa == 0:
        architecture = replace(architecture, repa_depth=0)
    elif not 0 < architecture.repa_depth < architecture.diffusion_depth:
        raise Mistake("--repa above 0 needs a --repa-depth above 0 and below --diffusion-depth")
    device = join_processes()
    accumulation_steps = len(positions(config, 0))

    # Data
    size = architecture.image_size
    train, held_out = open_data(config.data, size)
    train.draft_size = size  # random crops need no more of a large JPEG
    chosen = spread(config.eval_images, len(held_out))
    crops = FixedCrops(held_out, size)
    val_images = torch.cat([crops[i][0] for i in chosen]).to(device)         # (n, 3, H, W)

    # Model, its running average, the networks of the losses
    torch.manual_seed(config.seed)
    model = Tokenizer(architecture).to(device)
    if config.init_from:
        start = load_tokenizer(config.init_from)
        start.repa_head = model.repa_head  # which a loaded tokenizer lacks
        load_weights(model, start.state_dict(), config.init_from)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    use = CodebookUse(architecture.codebook_size).to(device)
    networks = loss_networks(config).to(device)
    weights = {"flow": 1.0, "vq": config.vq, "lpips": config.lpips, "repa": config.repa}

    # Optimizer; the checkpoint, if the run goes on; compiled and distributed model
    optimizer = make_optimizer(model, config)
    parts = {"model": model, "ema": ema, "use": use}
    record = Record(config, "tokenizer", parts, optimizer, asdict(architecture))
    first_step = record.resume()
    ddp = distribute(model, config, device)

    # Loop
    data = load_crops(RandomCrops(train, config, size), config, first_step, device)
    for step in range(first_step + 1, config.steps + 1):
        set_lr(optimizer, step, config)

        # Times of the whole batch, in all processes alike: (processes, accumulation steps, micro)
        u = draw_times(config.batch, seeded(config.seed, "times", step, device=device))
        u = u.view(world(), accumulation_steps, -1)
        # The VQ loss is a mean over the tokens that a pass reads. A pass counts by how many it
        # reads, relative to the mean pass: any split of the batch has the same gradient.
        groups_read = group_of(u, architecture.num_groups) + 1
        vq_shares = groups_read.mean(2) / groups_read.mean()  # (processes, accumulation steps)

        # Forward and backward, a micro-batch at a time
        tokens = []
        for i, places in enumerate(positions(config, step - 1)):
            images = next(data).to(device, non_blocking=True)       # (micro, 3, H, W)
            noise = draw_noise((config.seed, "noise"), places, size, device)
            ddp.require_backward_grad_sync = i == accumulation_steps - 1  # only DDP reads it
            with autocast(device):
                output = ddp(images, u[rank(), i], noise)
                losses = {"flow": output.flow_loss, "vq": output.vq_loss * vq_shares[rank(), i]}
                for name, network in networks.items():
                    losses[name] = network(output, images)
                loss = sum(weights[name] * value for name, value in losses.items())  # Eq. 7
            (loss / accumulation_steps).backward()
            tokens.append(output.tokens)
            for name, value in losses.items():
                record.sums[name] += value.detach() / accumulation_steps

        # Step
        record.sums["gradient"] += nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, config.ema)
        use.update(torch.cat(tokens))
        if config.reseed_after:
            use.reseed(output.z, seeded(config.seed, "reseed", step, device=device),
                       config.reseed_after, [model.quantizer.codebook, ema.quantizer.codebook])

        # Log (a codebook row never used has idle = step), evaluate, save
        record.log_means(step, codebook=(use.idle < min(step, config.log_every)).float().mean())
        if rank() == 0 and (step == config.steps or step % config.eval_every == 0):
            figures, picture = evaluate(ema, val_images, config.seed)
            record.log(step=step, **figures)
            save_picture(f"{config.out}/reconstructions_{step:06d}.png", picture)
        record.save(step)
    leave_processes()


if __name__ == "__main__":
    run(main)
