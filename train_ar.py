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
from typing import Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model_ar import AR, SIZES, ARConfig
from model_tokenizer import (Tokenizer, build_config, center_crop, count_flops, image_grid,
                             load_checkpoint, load_tokenizer, pack_tokenizer, resize_shorter, run,
                             save_checkpoint, seed_of, seeded, to_tensor)
from train_tokenizer import (Clock, Shuffle, join_processes, learning_rate, local_batch, open_data,
                             parse_config, positions, some_of, update_ema, utilisation, wait,
                             write_log)


@dataclass
class TrainConfig:
    """Settings of a run. Defaults are the paper's (RandAR's); their source is in brackets."""
    out: str = "out/ar"              # folder of checkpoints, log and pictures
    data: str = "data/imagenet"      # folder of images, or "shapes": the built-in pictures
    tokenizer: str = "out/tokenizer/last.pt"  # checkpoint of the tokenizer
    codes: str = "out/codes"         # folder of the images' tokens, written by the first run
    size: str = "L"                  # B, L, XL, XXL or toy: see SIZES in model_ar.py (Sec. 4)
    views: int = 10                  # crops of each image: 10, 2 (centre, mirrored) or 1 (RandAR)
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
                        dropout=0.0, cfg_end=3.0, workers=0, eval_every=400, save_every=200),)}


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
    """All fixed crops of the images: item i is (views, 3, H, W)."""

    def __init__(self, source, size: int, views: int):
        self.source, self.size, self.views = source, size, views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Tensor:
        image = self.source[i][0]
        return torch.stack([to_tensor(crop_view(image, self.size, view, self.views))
                            for view in range(self.views)])


def encode_all(tokenizer: Tokenizer, views: Views, items: list[int],
               workers: int) -> Iterator[np.ndarray]:
    """Tokens (n * views, N) uint16 of the images `items`, batch by batch, in float32."""
    device = tokenizer.quantizer.codebook.device
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(views, items),
                                         max(1, 128 // views.views), num_workers=workers)
    for images in loader:                                                    # (n, views, 3, H, W)
        yield tokenizer.encode(images.flatten(0, 1).to(device)).cpu().numpy().astype(np.uint16)


def read_codes(folder: str, tokenizer: Tokenizer, views: Views, workers: int, rank: int,
               world: int) -> np.ndarray:
    """Tokens (images * views, N) uint16, memory-mapped from a file in `folder`. The first call
    writes it, each process its share; its name is a digest of the tokenizer and the images."""
    digest = hashlib.sha256(str((views.views, vars(views.source))).encode())
    for value in tokenizer.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    path = os.path.join(folder, digest.hexdigest()[:16] + ".npy")
    if not os.path.exists(path):
        shape = len(views) * views.views, tokenizer.config.num_tokens
        if rank == 0:
            print(f"codes: writing {shape[0]:,} x {shape[1]} tokens to {path}", flush=True)
            os.makedirs(folder, exist_ok=True)
            np.lib.format.open_memmap(path + ".tmp", "w+", np.uint16, shape)
        wait()
        first, last = (len(views) * r // world for r in (rank, rank + 1))
        codes, row = np.load(path + ".tmp", mmap_mode="r+"), first * views.views
        for tokens in encode_all(tokenizer, views, range(first, last), workers):
            codes[row:row + len(tokens)] = tokens
            row += len(tokens)
        codes.flush()
        wait()
        if rank == 0:
            os.replace(path + ".tmp", path)
        wait()
    return np.load(path, mmap_mode="r")


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
    images = tokenizer.decode(model.generate(labels, (config.cfg_start, config.cfg_end)), noise)
    return image_grid(images, columns)


# ---- The run -------------------------------------------------------------------------------------

def main(argv: list[str] | None = None):
    config, = parse_config(PRESETS, argv)
    if config.size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {config.size!r}")
    if config.eval_samples < 1:
        raise ValueError("--eval-samples must be at least 1")
    if config.views not in (1, 2, 10):
        raise ValueError(f"--views must be 1, 2 or 10, got {config.views}")

    # Processes
    rank, world, device = join_processes()
    master, on_gpu, micro = rank == 0, device.type == "cuda", local_batch(config, world)

    # Data: the tokens of all images
    tokenizer = load_tokenizer(config.tokenizer, device)
    if tokenizer.config.codebook_size > 2 ** 16:
        raise ValueError("tokens are kept as uint16: the codebook must not exceed 65,536 rows")
    train, held_out = open_data(config.data, tokenizer.config.image_size)
    views = Views(train, tokenizer.config.image_size, config.views)
    codes = read_codes(config.codes, tokenizer, views, config.workers, rank, world)
    train_labels = np.array([train.label(i) for i in range(len(train))])
    chosen = some_of(config.eval_images, len(held_out))
    val_labels = torch.tensor([held_out.label(i) for i in chosen], device=device)
    val_tokens = encode_all(tokenizer, Views(held_out, views.size, 1), chosen, config.workers)
    val_tokens = torch.from_numpy(np.concatenate(list(val_tokens)).astype(np.int64)).to(device)

    # Model and its running average
    architecture = replace(SIZES[config.size], num_tokens=tokenizer.config.num_tokens,
                           vocab_size=tokenizer.config.codebook_size,
                           num_classes=len(train.classes), dropout=config.dropout)
    torch.manual_seed(config.seed)
    model = AR(architecture).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval() if config.ema else None

    # Optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=config.lr, betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)

    # Resume
    path, first_step = os.path.join(config.out, "last.pt"), 0
    if os.path.exists(path):
        saved = load_checkpoint(path, "ar", device)
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
    if master:
        os.makedirs(config.out, exist_ok=True)
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
    places = positions(config, first_step, rank, world)
    shuffle, clock = Shuffle(len(train), config.seed), Clock(config)
    for step in range(first_step, config.steps):
        last = step == config.steps - 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        torch.manual_seed(seed_of(config.seed, 4, step, rank))               # views and dropouts
        for part in range(config.accumulate):
            chosen = np.array([shuffle[next(places)] for _ in range(micro)])  # (micro,)
            labels = torch.from_numpy(train_labels[chosen]).to(device)
            view = torch.randint(config.views, (micro,)).numpy()
            tokens = codes[chosen * config.views + view].astype(np.int64)    # (micro, N)
            tokens = torch.from_numpy(tokens).to(device)
            dropped = torch.rand(micro, device=device) < config.class_dropout
            labels = labels.masked_fill(dropped, architecture.num_classes)   # the null class
            if world > 1:
                ddp.require_backward_grad_sync = part == config.accumulate - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss, accuracy = token_loss(ddp, labels, tokens)
            (loss / config.accumulate).backward()
            clock.add({"loss": loss, "accuracy": accuracy})
        gradient = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            update_ema(ema, model, config.ema)

        if (step + 1) % config.log_every == 0 or last:
            means, rate = clock.read()
            write_log(config, master, step=step + 1, **means, gradient=gradient.item(),
                      lr=learning_rate(step, config), images_per_s=rate,
                      **utilisation(rate * flops / world))
        clock.stop()
        if master and ((step + 1) % config.eval_every == 0 or last):
            averaged = model.eval() if ema is None else ema
            with torch.compiler.set_stance("force_eager"):  # other shapes than training's
                write_log(config, master, step=step + 1,
                          **evaluate(averaged, val_labels, val_tokens))
                draw_samples(averaged, tokenizer, config).save(
                    os.path.join(config.out, f"samples_{step + 1:06d}.png"))
            model.train()
        if master and ((step + 1) % config.save_every == 0 or last):
            save_checkpoint(path, {"kind": "ar", "config": asdict(architecture), "step": step + 1,
                                   "model": model.state_dict(),
                                   "ema": None if ema is None else ema.state_dict(),
                                   "optimizer": optimizer.state_dict(), "classes": train.classes,
                                   "tokenizer": pack_tokenizer(tokenizer)})
        clock.start()
    if master:
        print(f"ar: {path}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
