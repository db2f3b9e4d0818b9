"""Judges a trained model by a small CNN, which is trained on the same training images.

    python .ci/judge.py [CHECKPOINT] [--data DIR] [--cfg 1.1:3] [--samples 500] [--check]

Prints how well held-out images, their reconstructions from the first groups of tokens, and samples
are recognised; PSNR; what each group knows; and the *CNN distance*: the Frechet distance of two sets
of images in the CNN's last hidden layer, which compares with nothing but itself, beside that of two
halves of the real images. With --check, exits with 1 where one of the toy's targets is missed that
was met when the README was written: all but the last two.
"""
import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from fid import frechet_distance  # noqa: E402
from sample import center_crop, load_ar, load_tokenizer, parse_cfg, psnr, to_tensor  # noqa: E402
from train_tokenizer import group_knows, open_data, some_of  # noqa: E402


def stack(data, count, size):
    """Up to `count` images (n, 3, H, W) from all over the data, and labels (n,)."""
    items = [data[i] for i in some_of(count, len(data))]
    images = torch.stack([to_tensor(center_crop(image, size)) for image, _ in items])
    return images, torch.tensor([label for _, label in items])


def train_cnn(images, labels, classes, epochs):
    torch.manual_seed(0)
    layers = []
    for inner, outer in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(),
                   nn.MaxPool2d(2)]
    cnn = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(128), nn.ReLU(),
                        nn.Linear(128, classes))
    cnn(images[:2])
    optimizer = torch.optim.AdamW(cnn.parameters(), lr=2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(64):
            batch = images[part]
            if epochs > 4:  # photographs: mirrored half of the time
                batch = torch.where(torch.rand(len(part), 1, 1, 1) < 0.5, batch, batch.flip(3))
            F.cross_entropy(cnn(batch), labels[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return cnn.eval()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?", default="out/ar/last.pt")
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--cfg", default="1.1:3")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    tokenizer, ar = load_tokenizer(args.checkpoint), load_ar(args.checkpoint)
    config = tokenizer.config
    train, held_out = open_data(args.data, config.image_size)
    toy = args.data == "shapes"
    with torch.enable_grad():
        cnn = train_cnn(*stack(train, 6000 if toy else 50_000, config.image_size),
                        len(train.classes), 4 if toy else 8)
    images, labels = stack(held_out, 1000 if toy else 2000, config.image_size)

    def recognised(pictures, asked):
        right = [(cnn(part.clamp(-1, 1)).argmax(1) == answer).float()
                 for part, answer in zip(pictures.split(500), asked.split(500))]
        return 100 * torch.cat(right).mean().item()

    def moments(pictures):
        rows = torch.cat([cnn[:-1](part.clamp(-1, 1)) for part in pictures.split(500)])
        return rows.double().mean(0).numpy(), np.cov(rows.double().numpy(), rowvar=False)

    def cnn_distance(a, b):
        return frechet_distance(*moments(a), *moments(b))

    real = recognised(images, labels)
    print(f"real held-out images recognised: {real:.1f} %; CNN distance of their halves "
          f"{cnn_distance(images[::2], images[1::2]):.3f}")
    torch.manual_seed(0)
    tokens, noise = tokenizer.encode(images), torch.randn_like(images)
    knows = group_knows(tokenizer, images[:256], noise[:256], tokens[:256]).tolist()
    print("groups   PSNR dB   recognised %   CNN distance   this group knows")
    decibels = []
    for groups in range(1, config.num_groups + 1):
        decoded = tokenizer.decode(tokens, noise, groups=groups)
        decibels.append(psnr(decoded, images))
        print(f"{groups:6d} {decibels[-1]:9.2f} {recognised(decoded, labels):14.1f} "
              f"{cnn_distance(decoded, images):14.3f} {knows[groups - 1]:18.2f}")
    use = 100 * tokens.unique().numel() / config.codebook_size
    print(f"codebook rows used by {len(images):,} held-out images: {use:.1f} %")

    asked = torch.arange(args.samples) % len(train.classes)
    samples = torch.cat([tokenizer.decode(ar.generate(part, parse_cfg(args.cfg)))
                         for part in asked.split(100)])
    right = recognised(samples, asked)
    print(f"samples at {args.cfg} recognised as the class asked for: {right:.1f} %; CNN distance "
          f"{cnn_distance(samples, images):.3f}")
    for label, name in enumerate(held_out.classes[:10]):
        print(f"  {name:10s} {recognised(samples[asked == label], asked[asked == label]):5.1f} %")

    targets = {"real >= 99": real >= 99, "samples >= 95": right >= 95, "codebook >= 90": use >= 90,
               "each group knows > 1.05": min(knows) > 1.05}
    wishes = {"PSNR falls by 0.3 dB at most": max(decibels) - decibels[-1] <= 0.3,
              "PSNR rises by 1 dB or more": decibels[-1] - decibels[0] >= 1}
    for name, met in {**targets, **wishes}.items():
        print(f"{'met   ' if met else 'MISSED'}  {name}")
    sys.exit(args.check and not all(targets.values()))


if __name__ == "__main__":
    main()
