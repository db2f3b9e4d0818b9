"""Trains the autoregressive model on the tokens of a trained tokenizer.

    python train_ar.py --preset toy                      after train_tokenizer.py --preset toy
    torchrun --nproc_per_node=8 train_ar.py --data DIR   the paper's D-AR-L; --size XL for XL

The first run writes the tokens of all images, ten crops each, to one file; later runs read it. The
paper's runs took 2 days (L) and 3 days (XL) on 16 A100 GPUs: 770 and 1,150 GPU-hours. Every setting
below is a flag; the same command continues where it stopped. Results are in `out/ar`; checkpoints
carry the tokenizer.
"""
import copy
import hashlib
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model_ar import AR, SIZES, ARConfig, load_ar
from model_tokenizer import (Tokenizer, build_config, center_crop, count_flops, image_grid,
                             join_processes, load_last, load_tokenizer, make_parts, pack_tokenizer,
                             read_parts, resize_shorter, run, save_checkpoint, seed_of, seeded,
                             to_tensor, wait, write_array)
from train_tokenizer import (Clock, Shuffle, Stop, Stream, Unreadable, batches, learning_rate,
                             leave_group, local_batch, open_data, parse_config, positions,
                             read_or_another, some_of, start_from, trim_log, update_ema,
                             utilisation, write_log)


@dataclass
class TrainConfig:
    """Settings of a run. Defaults are the paper's (RandAR's); their source is in brackets."""
    out: str = "out/ar"              # folder of checkpoints, log and pictures
    init_from: str = ""              # checkpoint whose weights a new run starts from
    data: str = "data/imagenet"      # folder of images, or "shapes": the built-in pictures
    tokenizer: str = "out/tokenizer/last.pt"  # checkpoint of the tokenizer
    codes: str = "out/codes"         # folder of the images' tokens, written by the first run
    size: str = "L"                  # see SIZES in model_ar.py (Sec. 4)
    views: int = 10                  # crops of each image: 10, 2 (centre, mirrored) or 1 (RandAR);
    #                                  0: random crops, encoded anew in each epoch
    resize_max: float = 1.1          # with 0 views: shorter side up to 1.1 x image_size
    flip: bool = True                # with 0 views: mirror half of the images
    steps: int = 375_000             # 300 epochs of ImageNet (Sec. 5)
    batch: int = 1024                # images a step, over all processes (Sec. 5)
    accumulate: int = 1              # backward passes a step; `batch` stays what it is
    lr: float = 4e-4                 # (Sec. 5)
    lr_final: float = 1e-5           # learning rate at the end of `decay_steps` (Sec. 5)
    warmup_steps: int = 0            # linear rise of the learning rate
    decay_steps: int = 62_500        # linear fall over the last 50 epochs (Sec. 5)
    beta1: float = 0.9               # AdamW (RandAR)
    beta2: float = 0.95              # AdamW (RandAR)
    weight_decay: float = 0.05       # AdamW, matrices only (Sec. 5)
    clip: float = 1.0                # largest norm of the gradient (RandAR)
    ema: float = 0.0                 # decay of averaged weights; 0: none (released code)
    dropout: float = 0.1             # on tokens, residual and feed-forward branches (RandAR)
    class_dropout: float = 0.1       # share of labels replaced by the null class (RandAR)
    cfg_start: float = 1.1           # guidance of the pictures at the first token (App. II)
    cfg_end: float = 8.0             # guidance of the pictures at the last token (App. II)
    workers: int = 8                 # processes that load images while their tokens are written
    compile: bool = True             # torch.compile the transformer blocks; CUDA only
    seed: int = 0
    log_every: int = 100             # steps between log lines
    eval_every: int = 5000           # steps between pictures and held-out loss
    save_every: int = 2500           # steps between checkpoints
    eval_images: int = 512           # held-out images for the loss
    eval_samples: int = 40           # samples in a picture, of up to ten classes in turn


PRESETS = {
    "paper": (TrainConfig(),),
    "toy": (TrainConfig(data="shapes", size="toy", views=1, steps=800, batch=64, lr=2e-3,
                        lr_final=1e-4, warmup_steps=50, decay_steps=500, ema=0.98,
                        flip=False, resize_max=1.0, dropout=0.0, cfg_end=3.0, workers=0,
                        eval_every=400, save_every=200),),
    "cifar": (TrainConfig(data="data/cifar10", size="cifar", views=2, steps=20_000, batch=256,
                          lr_final=4e-5, warmup_steps=200, decay_steps=10_000, ema=0.999,
                          cfg_end=3.0, workers=4, eval_every=1000, save_every=500),)}


# ---- Codes: the tokens of all images -------------------------------------------------------------

def crop_view(image: Image.Image, size: int, view: int, views: int) -> Image.Image:
    """One of `views` fixed crops of size x size pixels. 10: the corners and the centre after the
    shorter side is resized to 1.1 x size (281 for 256), and their mirrors. 2: centre, mirror."""
    if views == 10:
        image = resize_shorter(image, int(1.1 * size))
        right, low = image.width - size, image.height - size
        left, top = [(0, 0), (right, 0), (0, low), (right, low), (right // 2, low // 2)][view // 2]
        image = image.crop((left, top, left + size, top + size))
    else:
        image = center_crop(image, size)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view % 2 else image


class Views(torch.utils.data.Dataset):
    """All fixed crops of the images: item i is (views, 3, H, W), a label, and what could not be
    read on the way."""

    def __init__(self, source, size: int, views: int):
        self.source, self.size, self.views = source, size, views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        image, label, unreadable = read_or_another(self.source, i)
        crops = [crop_view(image, self.size, view, self.views) for view in range(self.views)]
        return torch.stack([to_tensor(crop) for crop in crops]), label, unreadable


def encode_all(tokenizer: Tokenizer, views: Views, items: list[int], workers: int,
               unreadable: Unreadable) -> Iterator[np.ndarray]:
    """For each image of `items`, a row (1 + views * N,) uint16: its label, then the tokens of its
    crops, made in float32."""
    device = tokenizer.quantizer.codebook.device
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(views, items),
                                         max(1, 128 // views.views), num_workers=workers,
                                         worker_init_fn=leave_group)
    for images, labels, lines in loader:                                     # (n, views, 3, H, W)
        unreadable.note(lines)
        tokens = tokenizer.encode(images.flatten(0, 1).to(device)).cpu()     # (n * views, N)
        rows = torch.cat([labels[:, None], tokens.view(len(labels), -1)], 1)
        yield from rows.numpy().astype(np.uint16)


def read_codes(config: TrainConfig, tokenizer: Tokenizer, views: Views,
               unreadable: Unreadable) -> np.ndarray:
    """Labels and tokens of all images, (images, 1 + views * N) uint16 as in `encode_all`, memory-
    mapped from a file in the folder `codes`. The first call writes it, each process its share, and
    goes on where it was killed. The file is named after a digest of the tokenizer and the images,
    which are described beside it; others need another file."""
    weights, images = hashlib.sha256(), hashlib.sha256()
    for value in tokenizer.state_dict().values():
        weights.update(value.cpu().numpy().tobytes())
    images.update(str(views.source.describe()).encode())
    about = {"tokenizer": weights.hexdigest(), "images": images.hexdigest(), "count": len(views),
             "views": views.views, "classes": len(views.source.classes)}
    name = hashlib.sha256(str(about).encode()).hexdigest()[:16]
    path = os.path.join(config.codes, name + ".npy")
    missing = not os.path.exists(path)
    wait()  # all have looked before one writes
    if missing:
        began = time.time()
        size = max(1, min(1024, len(views) // 16))  # images a part

        def make(todo: list[list[int]]) -> Iterator[np.ndarray]:
            items = [i for numbers in todo for i in numbers]
            rows = encode_all(tokenizer, views, items, config.workers, unreadable)
            for numbers in todo:
                yield np.stack([*islice(rows, len(numbers))])

        make_parts(path + ".parts", len(views), size, about, make, lambda made: (
            f"tokens of {made / (time.time() - began):.1f} images/s a process"))
        if int(os.environ.get("RANK", 0)) == 0:
            with open(path + ".tmp", "wb") as file:
                write_array(file, read_parts(path + ".parts"), len(views))
            os.replace(path + ".parts/settings.json", os.path.join(config.codes, name + ".json"))
            os.replace(path + ".tmp", path)
        wait()
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.rmtree(path + ".parts", ignore_errors=True)
    return np.load(path, mmap_mode="r")


def stored_tokens(codes: np.ndarray, config: TrainConfig, count: int, first_step: int, rank: int,
                  world: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of labels (micro,) and tokens (micro, N) from the codes of `count` images, a random
    view each; `accumulate` of them are one step."""
    micro, shuffle = local_batch(config, world), Shuffle(count, config.seed)
    places = positions(config, first_step, rank, world)
    while chosen := [*islice(places, micro)]:
        views = [seed_of(config.seed, 2, place) % config.views for place in chosen]
        rows = codes[[shuffle[place] for place in chosen]].astype(np.int64)  # (micro, 1 + views N)
        tokens = rows[:, 1:].reshape(micro, config.views, -1)[range(micro), views]
        yield torch.from_numpy(rows[:, 0]), torch.from_numpy(tokens)


def fresh_tokens(tokenizer: Tokenizer, stream: Stream, config: TrainConfig, first_step: int,
                 rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same of random crops, encoded as they come, in float32."""
    device = tokenizer.quantizer.codebook.device
    for images, labels, _ in batches(stream, config, first_step, rank, world, device):
        yield labels, tokenizer.encode(images)


# ---- Evaluation ----------------------------------------------------------------------------------

def token_loss(model: nn.Module, labels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (Eq. 6) in float32 and accuracy of tokens (B, N) under labels (B,)."""
    logits = model(labels, tokens).float()                                   # (B, N, V)
    return (F.cross_entropy(logits.flatten(0, 1), tokens.flatten()),
            (logits.detach().argmax(-1) == tokens).float().mean())


@torch.no_grad()
def evaluate(model: AR, labels: Tensor, tokens: Tensor) -> dict:
    """Loss and accuracy on held-out tokens (n, N) with labels (n,)."""
    sums = torch.zeros(2, device=labels.device)
    for part in zip(labels.split(64), tokens.split(64)):
        sums += len(part[0]) * torch.stack(token_loss(model, *part))
    loss, accuracy = (sums / len(labels)).tolist()
    return {"val_loss": loss, "val_accuracy": accuracy}


@torch.no_grad()
def draw_samples(model: AR, tokenizer: Tokenizer, config: TrainConfig) -> Image.Image:
    """A picture of samples of up to ten classes, a column a class."""
    device, size = tokenizer.quantizer.codebook.device, tokenizer.config.image_size
    columns = min(10, model.config.num_classes, config.eval_samples)
    labels = torch.linspace(0, model.config.num_classes - 1, columns, device=device).long()
    labels = labels[torch.arange(config.eval_samples) % columns]
    noise = torch.randn(len(labels), 3, size, size, generator=seeded(config.seed, 3)).to(device)
    keys = torch.arange(len(labels), device=device)
    tokens = model.generate(labels, (config.cfg_start, config.cfg_end), keys=keys)
    images = tokenizer.decode(tokens, noise)
    return image_grid(images, columns)


# ---- The run -------------------------------------------------------------------------------------

def main(argv: list[str] | None = None):
    config, = parse_config(PRESETS, argv)
    if config.size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {config.size!r}")
    if config.eval_samples < 1:
        raise ValueError("--eval-samples must be at least 1")
    if config.views not in (0, 1, 2, 10):
        raise ValueError(f"--views must be 0, 1, 2 or 10, got {config.views}")

    # Processes
    rank, world, device = join_processes()
    master, on_gpu, micro = rank == 0, device.type == "cuda", local_batch(config, world)

    # Data: the tokens of all images, and of some held-out ones
    tokenizer = load_tokenizer(config.tokenizer, device)
    size, count = tokenizer.config.image_size, tokenizer.config.num_tokens
    train, held_out = open_data(config.data, size)
    if max(tokenizer.config.codebook_size, len(train.classes)) > 2 ** 16:
        raise ValueError("tokens and labels are kept as uint16: at most 65,536 of them")
    os.makedirs(config.out, exist_ok=True)
    unreadable = Unreadable(config.out, len(train) / world)
    codes = (read_codes(config, tokenizer, Views(train, size, config.views), unreadable)
             if config.views else None)
    shown = some_of(config.eval_images, len(held_out))
    val = np.stack([*encode_all(tokenizer, Views(held_out, size, 1), shown, config.workers,
                                Unreadable(config.out, len(held_out)))]).astype(np.int64)
    val_labels, val_tokens = torch.from_numpy(val).to(device).split([1, count], 1)
    val_labels = val_labels[:, 0]                                            # (n,)

    # Model and its running average
    architecture = replace(SIZES[config.size], num_tokens=tokenizer.config.num_tokens,
                           vocab_size=tokenizer.config.codebook_size,
                           num_classes=len(train.classes), dropout=config.dropout)
    torch.manual_seed(config.seed)
    model = AR(architecture).to(device)
    if config.init_from:  # other classes start anew
        start_from(model, load_ar(config.init_from, device, count).state_dict(), config.init_from,
                   ("class_embedding.",))
    ema = copy.deepcopy(model).requires_grad_(False).eval() if config.ema else None

    # Optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=config.lr, betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)

    # Resume
    path, first_step = os.path.join(config.out, "last.pt"), 0
    saved = load_last(path, "ar", device)
    if saved is not None:
        if build_config(ARConfig, saved["config"], path) != architecture:
            raise ValueError(f"{path} has another architecture; give --out with another folder")
        if (ema is None) != (saved["ema"] is None):
            raise ValueError(f"{path} was trained with another --ema; give --out with another "
                             "folder")
        if any(not torch.equal(saved["tokenizer"]["model"][name], value)
               for name, value in tokenizer.state_dict().items()):
            raise ValueError(f"{path} was trained on another tokenizer; give --out with another "
                             "folder")
        model.load_state_dict(saved["model"])
        if ema is not None:
            ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        first_step = saved["step"]
    del saved
    if master:
        trim_log(config, first_step)
        print(f"ar: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} "
              f"training images in {len(train.classes)} classes, step {first_step} of "
              f"{config.steps}, {world} x {device}", flush=True)

    # Compile, distribute
    flops = 3 * count_flops(lambda: model(val_labels[:1], val_tokens[:1])) if on_gpu else 0
    if config.compile and on_gpu:
        for block in model.blocks:
            block.compile(dynamic=False)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model

    # Loop
    data = (stored_tokens(codes, config, len(train), first_step, rank, world) if config.views else
            fresh_tokens(tokenizer, Stream(train, config, size), config, first_step, rank, world))
    clock, stop = Clock(config), Stop()
    for step in range(first_step, config.steps):
        last = step == config.steps - 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        # All processes draw for the whole batch which labels give way to the null class.
        dropped = torch.rand(config.batch, generator=seeded(config.seed, 7, step))
        dropped = (dropped < config.class_dropout).view(world, config.accumulate, micro)[rank]
        torch.manual_seed(seed_of(config.seed, 4, step, rank))               # dropouts
        for part in range(config.accumulate):
            labels, tokens = (batch.to(device, non_blocking=True) for batch in next(data))
            labels = labels.masked_fill(dropped[part].to(device), architecture.num_classes)
            if world > 1:
                ddp.require_backward_grad_sync = part == config.accumulate - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss, accuracy = token_loss(ddp, labels, tokens)
            (loss / config.accumulate).backward()
            clock.add(step, loss=loss, accuracy=accuracy)
        clock.add(step, gradient=nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            update_ema(ema, model, config.ema)

        if (step + 1) % config.log_every == 0 or last:
            means = clock.read()
            write_log(config, master, step=step + 1, **means, lr=learning_rate(step, config),
                      **utilisation(means["images_per_s"] * flops / world))
        clock.stop()
        if master and ((step + 1) % config.eval_every == 0 or last):
            averaged = model.eval() if ema is None else ema
            with torch.compiler.set_stance("force_eager"):  # other shapes than training's
                write_log(config, master, step=step + 1,
                          **evaluate(averaged, val_labels, val_tokens))
                draw_samples(averaged, tokenizer, config).save(
                    os.path.join(config.out, f"samples_{step + 1:06d}.png"))
            model.train()
        stopped = stop.asked()
        if (step + 1) % config.save_every == 0 or last or stopped:
            clock.check()
            if master:
                save_checkpoint(path, {"kind": "ar", "config": asdict(architecture),
                                       "model": model.state_dict(), "step": step + 1,
                                       "ema": None if ema is None else ema.state_dict(),
                                       "optimizer": optimizer.state_dict(),
                                       "classes": train.classes,
                                       "tokenizer": pack_tokenizer(tokenizer)})
        if stopped and not last:
            stop.leave(step + 1, master)
        clock.start()
    stop.release()
    if master:
        print(f"ar: {path}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
