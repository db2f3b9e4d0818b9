"""Judges a trained model by a small CNN, which is trained on the same training images.

    python .ci/judge.py [CHECKPOINT] [--data DIR] [--cfg 1.1:3] [--samples 500] [--check]

Prints how well held-out images, their reconstructions from the first groups of tokens, and samples
are recognised; PSNR; what each group knows; and the *CNN distance*: the Frechet distance of two sets
of images in the CNN's last hidden layer, which compares with nothing but itself, beside that of two
halves of the real images. With --check, exits with 1 where one of the toy's targets is missed, but
for the two on PSNR.
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


class Judge:
    """Held-out images and labels, and a CNN that was trained on the training images, or is read
    from the file that an earlier judge of the same data wrote."""

    def __init__(self, data, size):
        train, held_out = open_data(data, size)
        self.toy, self.classes = data == "shapes", held_out.classes
        self.images, self.labels = stack(held_out, 1000 if self.toy else 2000, size)
        layers = []
        for inner, outer in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(),
                       nn.MaxPool2d(2)]
        torch.manual_seed(0)
        self.cnn = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(128), nn.ReLU(),
                                 nn.Linear(128, len(self.classes)))
        self.cnn(self.images[:2])
        path = f"out/cnn_{os.path.basename(os.path.normpath(data))}_{size}.pt"
        if os.path.exists(path):
            self.cnn.load_state_dict(torch.load(path, weights_only=True))
        else:
            self.train(*stack(train, 6000 if self.toy else 50_000, size), 4 if self.toy else 8)
            os.makedirs("out", exist_ok=True)
            torch.save(self.cnn.state_dict(), path)
        self.cnn.eval()

    @torch.enable_grad()
    def train(self, images, labels, epochs):
        optimizer = torch.optim.AdamW(self.cnn.parameters(), lr=2e-3)
        for _ in range(epochs):
            for part in torch.randperm(len(images)).split(64):
                batch = images[part]
                if not self.toy:  # photographs: mirrored half of the time
                    batch = torch.where(torch.rand(len(part), 1, 1, 1) < 0.5, batch, batch.flip(3))
                F.cross_entropy(self.cnn(batch), labels[part]).backward()
                optimizer.step()
                optimizer.zero_grad()

    def recognised(self, pictures, asked):
        """Share of the pictures, in %, that the CNN takes for the class asked for."""
        right = [(self.cnn(part.clamp(-1, 1)).argmax(1) == answer).float()
                 for part, answer in zip(pictures.split(500), asked.split(500))]
        return 100 * torch.cat(right).mean().item()

    def moments(self, pictures):
        rows = torch.cat([self.cnn[:-1](part.clamp(-1, 1)) for part in pictures.split(500)])
        return rows.double().mean(0).numpy(), np.cov(rows.double().numpy(), rowvar=False)

    def distance(self, a, b):
        """CNN distance of two sets of images."""
        return frechet_distance(*self.moments(a), *self.moments(b))


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
    judge = Judge(args.data, config.image_size)
    images, labels = judge.images, judge.labels

    real = judge.recognised(images, labels)
    print(f"real held-out images recognised: {real:.1f} %; CNN distance of their halves "
          f"{judge.distance(images[::2], images[1::2]):.3f}")
    torch.manual_seed(0)
    tokens, noise = tokenizer.encode(images), torch.randn_like(images)
    knows = group_knows(tokenizer, images[:256], noise[:256], tokens[:256]).tolist()
    print("groups   PSNR dB   recognised %   CNN distance   this group knows")
    decibels = []
    for groups in range(1, config.num_groups + 1):
        decoded = tokenizer.decode(tokens, noise, groups=groups)
        decibels.append(psnr(decoded, images))
        print(f"{groups:6d} {decibels[-1]:9.2f} {judge.recognised(decoded, labels):14.1f} "
              f"{judge.distance(decoded, images):14.3f} {knows[groups - 1]:18.2f}")
    use = 100 * tokens.unique().numel() / config.codebook_size
    print(f"codebook rows used by {len(images):,} held-out images: {use:.1f} %")

    asked = torch.arange(args.samples) % len(judge.classes)
    samples = torch.cat([tokenizer.decode(ar.generate(part, parse_cfg(args.cfg)))
                         for part in asked.split(100)])
    right = judge.recognised(samples, asked)
    print(f"samples at {args.cfg} recognised as the class asked for: {right:.1f} %; CNN distance "
          f"{judge.distance(samples, images):.3f}")
    for label, name in enumerate(judge.classes[:10]):
        of = asked == label
        print(f"  {name:10s} {judge.recognised(samples[of], asked[of]):5.1f} %")

    targets = {"codebook >= 90": use >= 90, "each group knows > 1.05": min(knows) > 1.05}
    if judge.toy:
        targets |= {"real >= 99": real >= 99, "samples >= 95": right >= 95}
    wishes = {"PSNR falls by 0.3 dB at most": max(decibels) - decibels[-1] <= 0.3,
              "PSNR rises by 1 dB or more": decibels[-1] - decibels[0] >= 1}
    for name, met in {**targets, **wishes}.items():
        print(f"{'met   ' if met else 'MISSED'}  {name}")
    sys.exit(args.check and not all(targets.values()))


if __name__ == "__main__":
    main()
