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
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Annotated, Iterator, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from model_ar import AR, SIZES, Share
from model_tokenizer import Count, CountOrZero, Positive, Tokenizer
from sample import (Guidance, LongArray, Mistake, Purpose, Seed, autocast, center_crop, count_flops,
                    fingerprint, image_grid, is_first, join_processes, load_ar, load_tokenizer,
                    pack, parse_settings, resize_shorter, run, seed_of, seeded, to_tensor, wait,
                    write_picture)
from train_tokenizer import (BelowOne, Clock, Shuffle, Steps, StepsOrNone, Stop, Unreadable, Weight,
                             announce, claim, distribute, end, learning_rate, local_batch,
                             open_data, positions, read_or_another, resume, save, shield, some_of,
                             start_from, update_ema, utilisation, with_accumulate, write_log)


@dataclass
class TrainConfig:
    """Settings of a run. Defaults are the paper's (RandAR's); their source is in brackets."""
    out: str = "out/ar"              # folder of checkpoints, log and pictures
    init_from: str = ""              # checkpoint whose weights a new run starts from
    data: str = "data/imagenet"      # folder of images, or "shapes": the built-in pictures
    tokenizer: str = "out/tokenizer/last.pt"  # checkpoint of the tokenizer
    codes: str = "out/codes"         # folder of the images' tokens, written by the first run
    size: Literal[*SIZES] = "L"      # of the model, see model_ar.py (Sec. 4)
    views: Literal[1, 2, 10] = 10    # crops of each image; 2: centre, mirrored; 1: centre (RandAR)
    steps: Steps = 375_000           # 300 epochs of ImageNet (Sec. 5)
    batch: Count = 1024              # images a step, over all processes (Sec. 5)
    accumulate: CountOrZero = 0      # backward passes a step, for the same `batch`; 0: as many as
    # the GPU's memory needs
    lr: Share = 4e-4                 # (Sec. 5)
    lr_final: Share = 1e-5           # learning rate at the end of `decay_steps` (Sec. 5)
    warmup_steps: StepsOrNone = 0    # linear rise of the learning rate
    decay_steps: StepsOrNone = 62_500  # linear fall over the last 50 epochs (Sec. 5)
    beta1: BelowOne = 0.9            # AdamW (RandAR)
    beta2: BelowOne = 0.95           # AdamW (RandAR)
    weight_decay: Weight = 0.05      # AdamW, matrices only (Sec. 5)
    clip: Positive = 1.0             # largest norm of the gradient (RandAR)
    ema: Share = 0.0                 # decay of averaged weights; 0: no averaging (released code)
    dropout: BelowOne = 0.1          # on tokens, residual and feed-forward branches (RandAR)
    class_dropout: Share = 0.1       # share of labels replaced by the null class (RandAR)
    cfg_start: Guidance = 1.1        # guidance of samples at the first token (App. II)
    cfg_end: Guidance = 8.0          # guidance of samples at the last token (App. II)
    workers: Annotated[int, 0, 256] = 8  # processes that load images while tokens are written
    compile: bool | None = None      # torch.compile the transformer blocks; else on CUDA only
    seed: Seed = 0
    log_every: Steps = 100           # steps between log lines
    eval_every: Steps = 5000         # steps between pictures and held-out loss
    save_every: Steps = 2500         # steps between checkpoints
    eval_images: Count = 512         # held-out images for the loss
    eval_samples: Count = 40         # samples in a picture, of up to ten classes in turn
    changed: bool = False            # go on from a checkpoint of other data, seed, batch or views


PRESETS = {
    "paper": (TrainConfig(),),
    "toy": (TrainConfig(data="shapes", size="toy", views=1, steps=600, batch=64, lr=2e-3,
                        lr_final=1e-4, warmup_steps=50, decay_steps=400, ema=0.98,
                        dropout=0.0, cfg_end=3.0, workers=0, eval_every=300, save_every=200),),
    "cifar": (TrainConfig(data="data/cifar10", size="cifar", views=2, steps=1600, batch=64,
                          lr=1e-3, lr_final=1e-5, warmup_steps=100, decay_steps=800, ema=0.99,
                          cfg_end=3.0, workers=0, eval_every=500, save_every=250),)}


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

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        image, label, unreadable = read_or_another(self.source, i)
        crops = [crop_view(image, self.size, view, self.views) for view in range(self.views)]
        return torch.stack([to_tensor(crop) for crop in crops]), label, unreadable


@torch.no_grad()
def encode_all(tokenizer: Tokenizer, views: Views, batches: list, workers: int,
               unreadable: Unreadable) -> Iterator[np.ndarray]:
    """For each batch of image numbers, rows (n, 1 + views * N) uint16: the label of each image,
    then the tokens of its crops, made in float32."""
    device = tokenizer.quantizer.codebook.device
    loader = torch.utils.data.DataLoader(views, batch_sampler=[[*batch] for batch in batches],
                                         num_workers=workers, worker_init_fn=shield,
                                         pin_memory=device.type == "cuda")
    for images, labels, lines in loader:                                     # (n, views, 3, H, W)
        unreadable.note(lines)
        images = images.flatten(0, 1).to(device, non_blocking=True)          # (n * views, 3, H, W)
        tokens = tokenizer.encode(images).cpu().view(len(labels), -1)        # (n, views * N)
        yield torch.cat([labels[:, None], tokens], 1).numpy().astype(np.uint16)


def read_codes(config: TrainConfig, tokenizer: Tokenizer, digest: str, views: Views,
               unreadable: Unreadable) -> np.ndarray:
    """Labels and tokens of all images, (images, 1 + views * N) uint16 as in `encode_all`, memory-
    mapped from a file in the folder `codes`, which the first call writes. The file is named after a
    digest of the tokenizer and of the images' names; others need another file. Raises Mistake."""
    note = {"tokenizer": digest, "images": views.source.describe(),
             "count": len(views.source), "views": views.views, "classes": len(views.source.classes)}
    name = hashlib.sha256(str(note).encode()).hexdigest()[:16]
    path = os.path.join(config.codes, name + ".npy")
    shape = len(views.source), 1 + views.views * tokenizer.config.num_tokens
    missing = not os.path.exists(path)
    wait()  # all have looked before one writes
    if missing:
        array = LongArray(path, shape, np.uint16, max(1, 128 // views.views), note)
        rows = encode_all(tokenizer, views, array.todo, config.workers, unreadable)
        for numbers in array.todo:
            array.fill(numbers, next(rows))
        array.close()
        if is_first():
            os.replace(os.path.join(array.folder, "rows.npy"), path)
            os.replace(os.path.join(array.folder, "settings.json"), path[:-3] + "json")
            array.remove()
        wait()
    try:
        codes = np.load(path, mmap_mode="r")
        if codes.shape != shape or codes.dtype != np.uint16:
            raise ValueError
        for first in range(0, len(codes), 10_000) if is_first() else ():
            part = codes[first:first + 10_000]
            if (part[:, 0].max() >= note["classes"]
                    or part[:, 1:].max() >= tokenizer.config.codebook_size):
                raise ValueError
    except (ValueError, EOFError, OSError):
        raise Mistake(f"{path} is damaged; remove it, and the tokens are written anew") from None
    return codes


def stored_tokens(codes: np.ndarray, config: TrainConfig, first_step: int, rank: int,
                  world: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of labels (micro,) and tokens (micro, N) from the codes of all images, a random view
    each; `accumulate` of them are one step."""
    micro, shuffle = local_batch(config, world), Shuffle(len(codes), config.seed)
    places = positions(config, first_step, rank, world)
    while chosen := [*islice(places, micro)]:
        views = [seed_of(config.seed, Purpose.VIEW, place) % config.views for place in chosen]
        rows = codes[[shuffle[place] for place in chosen]].astype(np.int64)  # (micro, 1 + views N)
        labels, tokens = rows[:, 0], rows[:, 1:].reshape(micro, config.views, -1)
        yield torch.from_numpy(labels), torch.from_numpy(tokens[range(micro), views])


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
    noise, uniforms = seeded(config.seed, Purpose.START), seeded(config.seed, Purpose.TOKENS)
    noise = torch.randn(len(labels), 3, size, size, generator=noise).to(device)
    uniforms = torch.rand(len(labels), model.config.num_tokens, generator=uniforms)
    tokens = model.generate(labels, (config.cfg_start, config.cfg_end), uniforms=uniforms)
    images = tokenizer.decode(tokens, noise)
    return image_grid(images, columns)


# ---- The run -------------------------------------------------------------------------------------

def main(argv: list[str] | None = None):
    (config,), given = parse_settings(PRESETS, argv, __doc__)

    # Processes
    rank, world, device = join_processes()
    local_batch(config, world)  # a mistake in it comes before any work

    # Tokenizer, data, model
    tokenizer = load_tokenizer(config.tokenizer, device)
    size, count = tokenizer.config.image_size, tokenizer.config.num_tokens
    train, held_out = open_data(config.data, size)
    if max(tokenizer.config.codebook_size, len(train.classes)) > 2 ** 16:
        raise Mistake("tokens and labels are kept as uint16: at most 65,536 of them")
    start = load_ar(config.init_from, device, count) if config.init_from else None
    if start is not None and "size" in given:
        raise Mistake("--size has no meaning with --init-from, whose file decides on it")
    architecture = replace(start.config if start else SIZES[config.size], num_tokens=count,
                           vocab_size=tokenizer.config.codebook_size, dropout=config.dropout,
                           num_classes=len(train.classes))
    torch.manual_seed(config.seed)
    model = AR(architecture).to(device)
    if start is not None:  # other classes start anew
        start_from(model, start.state_dict(), config.init_from, ("class_embedding.",))
    del start
    ema = copy.deepcopy(model).requires_grad_(False).eval()

    # Optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=config.lr, betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)

    # Resume
    claim(config)
    parts = {"model": model, "ema": ema}
    digest = fingerprint(tokenizer)
    settings = {**asdict(config), "tokenizer": digest}  # wherever its file lies
    first_step = resume(config, settings, "ar", parts, optimizer)
    announce("ar", model, train, first_step, config, world, device)

    # The tokens of all images, and of some held-out ones
    share = max(len(train) / world, min(len(train), 200))  # to read; of few, chance would decide
    codes = read_codes(config, tokenizer, digest, Views(train, size, config.views),
                       Unreadable(config.out, share))
    shown = some_of(config.eval_images, len(held_out))
    val = [*encode_all(tokenizer, Views(held_out, size, 1),
                       [shown[i:i + 128] for i in range(0, len(shown), 128)], config.workers,
                       Unreadable(config.out, len(held_out)))]
    val = torch.from_numpy(np.concatenate(val).astype(np.int64)).to(device)
    val_labels, val_tokens = val[:, 0], val[:, 1:]                           # (n,), (n, N)

    # Memory, compile, distribute
    def one_loss(n: int) -> Tensor:
        with autocast(device):
            return token_loss(model, val_labels[:1].expand(n), val_tokens[:1].expand(n, -1))[0]

    config = with_accumulate(config, one_loss, model, world, device)
    flops = count_flops(lambda: one_loss(1).backward())
    optimizer.zero_grad(set_to_none=True)
    ddp = distribute(model, [*model.blocks], config, world, device)

    # Loop
    data = stored_tokens(codes, config, first_step, rank, world)
    clock, stop = Clock(config), Stop()
    for step in range(first_step, config.steps):
        last = step == config.steps - 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        # All processes draw for the whole batch which labels give way to the null class.
        dropped = torch.rand(config.batch, generator=seeded(config.seed, Purpose.NULL_CLASS, step))
        dropped = (dropped < config.class_dropout).view(world, config.accumulate, -1)[rank]
        torch.manual_seed(seed_of(config.seed, Purpose.DROPOUT, step, rank))
        for part in range(config.accumulate):
            labels, tokens = (batch.to(device) for batch in next(data))
            labels = labels.masked_fill(dropped[part].to(device), architecture.num_classes)
            if world > 1:
                ddp.require_backward_grad_sync = part == config.accumulate - 1
            with autocast(device):
                loss, accuracy = token_loss(ddp, labels, tokens)
            (loss / config.accumulate).backward()
            clock.add(step, loss=loss, accuracy=accuracy)
        clock.add(step, gradient=nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, config.ema)

        if (step + 1) % config.log_every == 0 or last:
            means = clock.read(step + 1)
            write_log(config, step=step + 1, **means, lr=learning_rate(step, config),
                      **utilisation(means["images_per_s"] * flops / world))
        clock.stop()
        if is_first() and ((step + 1) % config.eval_every == 0 or last):
            write_log(config, step=step + 1, **evaluate(ema, val_labels, val_tokens))
            write_picture(os.path.join(config.out, f"samples_{step + 1:06d}.png"),
                          draw_samples(ema, tokenizer, config))
        stopped = stop.asked()
        if (step + 1) % config.save_every == 0 or last or stopped:
            clock.check()
            if is_first():
                save(config, settings, "ar", parts, optimizer, step + 1, classes=train.classes,
                     tokenizer=pack("tokenizer", tokenizer))
        if stopped and not last:
            stop.leave(step + 1)
        clock.start()
    stop.release()
    end("ar", config)


if __name__ == "__main__":
    run(main)
