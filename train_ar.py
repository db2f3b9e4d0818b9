"""Trains the autoregressive model on the tokens of a trained tokenizer.

    python train_ar.py --preset toy                      after train_tokenizer.py --preset toy
    torchrun --nproc_per_node=8 train_ar.py --data DIR   the paper's D-AR-L; --size XL for XL

The first run writes the tokens of all images, ten crops each, to files; later runs read them. The
paper's runs took 2 days (L) and 3 days (XL) on 16 A100 GPUs: 770 and 1,150 GPU-hours. Every setting
below is a flag; the same command goes on where a run was killed. Results are in `out/ar`;
checkpoints carry the tokenizer.
"""
import copy
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model_ar import AR, SIZES
from sample import (Mistake, autocast, compare_tokens, digest, guidance_end, image_grid,
                    join_processes, leave_processes, load_ar, load_checkpoint, load_tokenizer,
                    load_weights, pack, parse, print0, rank, run, save_picture, seed_of, seeded,
                    shards, spread, token_digest)
from train_tokenizer import (FixedCrops, Record, distribute, item_at, make_optimizer, open_data,
                             positions, set_lr, update_ema)


@dataclass
class TrainConfig:
    """Settings of a run. Defaults are the paper's (RandAR's); their source is in brackets."""
    # Files
    out: str = "out/ar"             # folder of checkpoints, log and pictures
    init_from: str = ""             # checkpoint whose weights a new run starts from
    tokenizer: str = "out/tokenizer/last.pt"  # checkpoint of the tokenizer
    codes: str = "out/codes"        # folder of tokens, for many runs; images replaced under the
                                    # same names go unnoticed: give another folder
    save_minutes: float = 10        # between checkpoints; 0: one after each step
    keep_every: int = 0             # steps between checkpoints that stay; 0: only the last one
    # Data
    data: str = "data/imagenet"     # folder of images, or "shapes": the built-in pictures
    views: int = 10                 # crops of each image (RandAR); 2: centre, mirror; 1: centre
    flip: bool = True               # views are mirrored too (RandAR)
    workers: int = 8                # processes that load images while tokens are written
    # Model
    size: str = "L"                 # see model_ar.py (Sec. 4)
    dropout: float = 0.1            # on embeddings, attention and feed-forward (RandAR)
    class_dropout: float = 0.1      # share of labels replaced by the null class (RandAR)
    # Optimizer
    steps: int = 375_000            # 300 epochs of ImageNet (Sec. 5)
    batch: int = 1024               # images a step, over all processes (Sec. 5)
    micro_batch: int = 64           # images a process and backward pass, at most
    lr: float = 4e-4                # (Sec. 5)
    lr_final: float = 1e-5          # learning rate at the end of `decay_steps` (Sec. 5)
    warmup_steps: int = 0           # linear rise of the learning rate
    decay_steps: int = 62_500       # linear fall over the last 50 epochs (Sec. 5), at most all
    beta1: float = 0.9              # AdamW (RandAR)
    beta2: float = 0.95             # AdamW (RandAR)
    weight_decay: float = 0.05      # AdamW, matrices only (Sec. 5)
    clip: float = 1.0               # largest norm of the gradient (RandAR)
    ema: float = 0.0                # decay of averaged weights; 0: no averaging (released code)
    # The run
    seed: int = 0
    compile: bool = True            # torch.compile the transformer blocks, on CUDA only
    log_every: int = 100            # steps between log lines
    eval_every: int = 5000          # steps between pictures and held-out loss
    eval_images: int = 512          # held-out images for the loss
    eval_samples: int = 40          # samples in a picture, of up to ten classes in turn
    cfg_start: float = 1.1          # guidance of samples at the first token (App. II)
    cfg_end: float = 0.0            # at the last token; 0: 8, from XL on 10 (App. II)


PRESETS = {
    "paper": (TrainConfig(),),
    "toy": (TrainConfig(
        save_minutes=1, data="shapes", size="toy", views=1, workers=0,
        steps=700, batch=64, lr=2e-3, lr_final=1e-4, warmup_steps=50, decay_steps=450, ema=0.98,
        dropout=0.0, cfg_end=3.0, eval_every=300),),
    "cifar": (TrainConfig(
        data="data/cifar10", size="cifar", views=2,
        steps=1400, micro_batch=1024, lr=1e-3, warmup_steps=100,
        decay_steps=700, ema=0.998, cfg_start=3.5, cfg_end=3.5, eval_every=700),),
}


# ---- Codes: the tokens of all images -------------------------------------------------------------

SHARD = 4096  # images a file


@torch.no_grad()
def encode_all(tokenizer, crops, numbers, workers):
    """Rows (n, 1 + views * N) of images by number: the label, then the tokens of all crops (as many
    views as FixedCrops gives), made in float32; in the smallest integers that hold them."""
    device = tokenizer.quantizer.codebook.device
    loader = torch.utils.data.DataLoader(
        crops, 128 // crops.views, sampler=numbers, num_workers=workers)
    rows = []
    for images, labels in loader:                                   # (n, views, 3, H, W)
        tokens = tokenizer.encode(images.flatten(0, 1).to(device))
        tokens = tokens.cpu().view(len(labels), -1)                 # (n, views * N)
        rows.append(torch.cat([labels[:, None], tokens], 1))
    rows = torch.cat(rows).numpy()
    return rows.astype(np.min_scalar_type(rows.max()))


def read_codes(config, tokenizer, train):
    """Labels and tokens of all images as in `encode_all`, memory-mapped from files of `SHARD` rows,
    which the first call writes. The folder is named after what makes tokens, and the images' names.
    """
    crops = FixedCrops(train, tokenizer.config.image_size, config.views, config.flip)
    name = digest(token_digest(tokenizer), train.digest(), config.views, config.flip)
    paths = shards(f"{config.codes}/{name}", len(train), SHARD,
                   lambda numbers: encode_all(tokenizer, crops, numbers, config.workers))
    return [np.load(path, mmap_mode="r") for path in paths]


def read_batch(codes, count, seed, places, num_tokens):
    """Labels (n,) and tokens (n, N) int64 of the n images at these positions, see `item_at`; of
    each a random view."""
    numbers = [item_at(place, count, seed) for place in places]
    rows = np.stack([codes[i // SHARD][i % SHARD] for i in numbers])  # (n, 1 + views * N)
    rows = torch.from_numpy(rows).long()
    tokens = rows[:, 1:].unflatten(1, (-1, num_tokens))             # (n, views, N)
    chosen = [seed_of(seed, "view", place) % tokens.shape[1] for place in places]
    return rows[:, 0], tokens[torch.arange(len(rows)), chosen]


# ---- Evaluation ----------------------------------------------------------------------------------

def token_loss(model, labels, tokens):
    """Mean cross-entropy (Eq. 6) in float32 and accuracy of tokens (B, N) under labels (B,)."""
    logits = model(labels, tokens).float()                          # (B, N, V)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    return loss, (logits.detach().argmax(-1) == tokens).float().mean()


@torch.no_grad()
def evaluate(model, tokenizer, labels, tokens, config):
    """Loss and accuracy on held-out tokens (n, N) with labels (n,), in float32 throughout. Returns
    these figures and a picture of samples of up to ten classes, a column a class."""
    sums = 0.0
    for part in zip(labels.split(64), tokens.split(64)):
        sums += len(part[0]) * torch.stack(token_loss(model, *part))
    loss, accuracy = (sums / len(labels)).tolist()

    columns = min(10, model.config.num_classes, config.eval_samples)
    column = torch.arange(config.eval_samples, device=labels.device) % columns
    classes = column * model.config.num_classes // columns
    torch.manual_seed(config.seed)
    drawn = model.generate(classes, (config.cfg_start, config.cfg_end))
    samples = tokenizer.decode(drawn)
    return {"val_loss": loss, "val_accuracy": accuracy}, image_grid(samples, columns)


# ---- The run -------------------------------------------------------------------------------------

def start_from(model, path, classes, tokenizer):
    """Gives a new model the weights in a checkpoint; rows of the class embedding by the name of the
    class, new ones stay fresh."""
    saved = load_checkpoint(path, "ar")
    compare_tokens(saved, path, tokenizer)
    names = saved["classes"]
    if names[0] == "0" and classes[0] == "n01440764" and len(names) == len(classes):
        names = classes  # the authors' files count the sorted classes of ImageNet
    weights = load_ar(path).state_dict()
    theirs = weights["cls_embedding.weight"]
    ours = model.cls_embedding.weight.data                          # (classes + 1, D), filled below
    weights["cls_embedding.weight"] = ours
    load_weights(model, weights, path)
    ours[-1] = theirs[-1]  # the null class
    known = dict(zip(names, theirs))
    for row, name in zip(ours, classes):
        row.copy_(known.get(name, row))
    new = [name for name in classes if name not in known]
    print0(f"from {path}: {len(classes) - len(new)} classes by name; "
           f"{len(new)} new: {' '.join(new[:10])}")


def main(argv=None):
    # Settings and processes
    (config,) = parse(PRESETS, argv, __doc__)
    if config.size not in SIZES or config.views not in (1, 2, 10):
        raise Mistake(f"--size must be one of {', '.join(SIZES)}, --views 1, 2 or 10")
    if config.cfg_end == 0:
        config.cfg_end = guidance_end(SIZES[config.size].depth)
    device = join_processes()
    accumulation_steps = len(positions(config, 0))

    # Data: the tokens of all images, and of some held-out ones
    tokenizer = load_tokenizer(config.tokenizer, device)
    size = tokenizer.config.image_size
    train, held_out = open_data(config.data, size)
    codes = read_codes(config, tokenizer, train)
    if rank() == 0:
        chosen = spread(config.eval_images, len(held_out))
        crops = FixedCrops(held_out, size)
        rows = encode_all(tokenizer, crops, chosen, config.workers)
        val_rows = torch.from_numpy(rows).to(device, torch.long)    # (n, 1 + N)

    # Model and its running average
    architecture = replace(
        SIZES[config.size], num_tokens=tokenizer.config.num_tokens,
        vocab_size=tokenizer.config.codebook_size, dropout=config.dropout,
        num_classes=len(train.classes))
    torch.manual_seed(config.seed)
    model = AR(architecture).to(device)
    if config.init_from:
        start_from(model, config.init_from, train.classes, tokenizer)
    ema = copy.deepcopy(model).requires_grad_(False).eval()

    # Optimizer; the checkpoint, if the run goes on; compiled and distributed model
    optimizer = make_optimizer(model, config)
    fixed = {**asdict(architecture), "tokens": token_digest(tokenizer), "classes": train.classes}
    record = Record(config, "ar", {"model": model, "ema": ema}, optimizer, fixed)
    first_step = record.resume()
    ddp = distribute(model, config, device)
    packed = pack("tokenizer", tokenizer)

    # Loop
    for step in range(first_step + 1, config.steps + 1):
        set_lr(optimizer, step, config)

        # Labels and tokens; all processes draw for the whole batch which labels are dropped
        places = positions(config, step - 1).flatten()
        labels, tokens = read_batch(codes, len(train), config.seed, places, architecture.num_tokens)
        chances = torch.rand(config.batch, generator=seeded(config.seed, "null class", step))
        dropped = chances[places % config.batch] < config.class_dropout
        labels[dropped] = architecture.num_classes  # the null class
        labels = labels.to(device, non_blocking=True)               # (n,)
        tokens = tokens.to(device, non_blocking=True)               # (n, N)
        torch.manual_seed(seed_of(config.seed, "dropout", step, rank()))

        # Forward and backward, a micro-batch at a time
        parts = zip(labels.chunk(accumulation_steps), tokens.chunk(accumulation_steps))
        for i, part in enumerate(parts):
            ddp.require_backward_grad_sync = i == accumulation_steps - 1  # only DDP reads it
            with autocast(device):
                loss, accuracy = token_loss(ddp, *part)
            (loss / accumulation_steps).backward()
            record.sums["loss"] += loss.detach() / accumulation_steps
            record.sums["accuracy"] += accuracy / accumulation_steps

        # Step
        record.sums["gradient"] += nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, config.ema)

        # Log, evaluate (which may draw random numbers, as each step seeds its own), save
        record.log_means(step)
        if rank() == 0 and (step == config.steps or step % config.eval_every == 0):
            figures, picture = evaluate(ema, tokenizer, val_rows[:, 0], val_rows[:, 1:], config)
            record.log(step=step, **figures)
            save_picture(f"{config.out}/samples_{step:06d}.png", picture)
        record.save(step, classes=train.classes, tokenizer=packed)
    leave_processes()


if __name__ == "__main__":
    run(main)
