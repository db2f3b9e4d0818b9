"""Judges a trained model by a small CNN, which is trained on the same training images.

    python .ci/judge.py [CHECKPOINT] [--data DIR] [--cfg 1.1:3] [--samples 1000] [--check]

Prints how well held-out images, their reconstructions from the first groups of tokens, and samples
are recognised; the *CNN distance*, the Frechet distance of two sets of images in the CNN's last
hidden layer, which compares with nothing but itself, beside that of two halves of the real images;
PSNR; what each group knows; what a linear probe of the condition tokens recognises; and precision
and recall of the samples in the CNN's features. CHECKPOINT may be a tokenizer: then no samples.
With --check, exits with 1 where one of the toy's targets is missed.
"""
import argparse
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from fid import frechet_distance, precision_recall  # noqa: E402
from sample import (center_crop, load_ar, load_tokenizer, parse_cfg, psnr,  # noqa: E402
                    spread, to_tensor)
from train_tokenizer import group_knows, open_data  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stack(data, count, size):
    """Up to `count` images (n, 3, H, W) from all over the data, and labels (n,)."""
    items = [data[i] for i in spread(count, len(data))]
    order = np.random.default_rng(0).permutation(len(items))
    images = torch.stack([to_tensor(center_crop(items[i][0], size)) for i in order])
    return images.to(DEVICE), torch.tensor([items[i][1] for i in order], device=DEVICE)


def in_parts(function, *tensors):
    return torch.cat([function(*part) for part in zip(*(tensor.split(250) for tensor in tensors))])


class Judge:
    """Held-out images and labels, and a CNN that was trained on the training images, or is read
    from the file that an earlier judge of the same data wrote."""

    def __init__(self, data, size):
        self.train, held_out = open_data(data, size)
        self.size, self.toy, self.classes = size, data == "shapes", held_out.classes
        self.images, self.labels = stack(held_out, 1000 if self.toy else 2000, size)
        layers = []
        for inner, outer in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(),
                       nn.MaxPool2d(2)]
        torch.manual_seed(0)
        self.cnn = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(128), nn.ReLU(),
                                 nn.Linear(128, len(self.classes))).to(DEVICE)
        self.cnn(self.images[:2])
        path = f"out/cnn_{os.path.basename(os.path.normpath(data))}_{size}.pt"
        if os.path.exists(path):
            self.cnn.load_state_dict(torch.load(path, weights_only=True))
        else:
            images, labels = stack(self.train, 6000 if self.toy else 50_000, size)
            fit(self.cnn, images, labels, 4 if self.toy else 8, not self.toy)
            os.makedirs("out", exist_ok=True)
            torch.save(self.cnn.state_dict(), path)
        self.cnn.eval()

    def recognised(self, pictures, asked):
        """Share of the pictures, in %, that the CNN takes for the class asked for."""
        found = in_parts(lambda part: self.cnn(part.clamp(-1, 1)).argmax(1), pictures)
        return 100 * (found == asked).float().mean().item()

    def features(self, pictures):
        return in_parts(lambda part: self.cnn[:-1](part.clamp(-1, 1)), pictures).double()

    def distance(self, a, b):
        """CNN distance of two sets of images."""
        a, b = (self.features(pictures).cpu().numpy() for pictures in (a, b))
        return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0),
                                np.cov(b, rowvar=False))


@torch.enable_grad()
def fit(model, images, labels, epochs, mirrored):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images), device=DEVICE).split(64):
            batch = images[part]
            if mirrored:  # half of the images
                batch = torch.where(torch.rand(len(part), 1, 1, 1, device=DEVICE) < 0.5, batch,
                                    batch.flip(3))
            F.cross_entropy(model(batch), labels[part]).backward()
            optimizer.step()
            optimizer.zero_grad()


def probe(judge, tokenizer):
    """Accuracy in %, on held-out images, of one linear layer on the mean of the condition tokens of
    the first k groups, for each k; the layer is the least-squares one."""
    images, labels = stack(judge.train, 5000, judge.size)
    config = tokenizer.config
    conds = [in_parts(lambda part: tokenizer.condition(tokenizer.encode(part)), some)
             for some in (images, judge.images)]
    accuracies = []
    for k in range(1, config.num_groups + 1):
        train, test = (F.pad(cond[:, :k * config.group_size].mean(1), (0, 1), value=1.0).cpu()
                       for cond in conds)
        layer = torch.linalg.lstsq(train, F.one_hot(labels.cpu()).float()).solution
        found = (test @ layer).argmax(1)
        accuracies.append(100 * (found == judge.labels.cpu()).float().mean().item())
    return accuracies


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?", default="out/ar/last.pt")
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--cfg", default="1.1:3")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.checkpoint, DEVICE)
    config = tokenizer.config
    judge = Judge(args.data, config.image_size)
    images, labels = judge.images, judge.labels

    real = judge.recognised(images, labels)
    bits = config.num_tokens * math.log2(config.codebook_size)
    print(f"real held-out images recognised: {real:.1f} %; CNN distance of their halves "
          f"{judge.distance(images[::2], images[1::2]):.1f}; {bits:.0f} bits an image")
    torch.manual_seed(0)
    tokens, noise = in_parts(tokenizer.encode, images), torch.randn_like(images)
    knows = group_knows(tokenizer, images[:256], noise[:256], tokens[:256]).tolist()
    probed = probe(judge, tokenizer)
    print("groups   recognised %   CNN distance   PSNR dB   this group knows   linear probe %")
    shares, distances = [], []
    for k in range(config.num_groups):
        decoded = in_parts(lambda some, eps: tokenizer.decode(some, eps, groups=k + 1), tokens, noise)
        shares.append(judge.recognised(decoded, labels))
        distances.append(judge.distance(decoded, images))
        print(f"{k + 1:6d} {shares[k]:14.1f} {distances[k]:14.1f} {psnr(decoded, images):9.2f} "
              f"{knows[k]:18.2f} {probed[k]:16.1f}", flush=True)
    use = 100 * tokens.unique().numel() / config.codebook_size
    print(f"codebook rows used by {len(images):,} held-out images: {use:.1f} %")
    if torch.load(args.checkpoint, "cpu", weights_only=True, mmap=True)["kind"] == "tokenizer":
        return

    ar = load_ar(args.checkpoint, DEVICE)
    asked = torch.arange(args.samples, device=DEVICE) % len(judge.classes)
    samples = in_parts(lambda part: tokenizer.decode(ar.generate(part, parse_cfg(args.cfg))), asked)
    right = judge.recognised(samples, asked)
    precision, recall = precision_recall(judge.features(images), judge.features(samples))
    print(f"samples at {args.cfg} recognised as the class asked for: {right:.1f} %; CNN distance "
          f"{judge.distance(samples, images):.1f}; precision {precision:.2f}, recall {recall:.2f}")
    for label, name in enumerate(judge.classes[:10]):
        of = asked == label
        print(f"  {name:10s} {judge.recognised(samples[of], asked[of]):5.1f} %")
    if args.check:
        # From coarse to fine: seeds differ most after the first group (README)
        targets = {
            "real >= 99": real >= 99, "first group <= 90": shares[0] <= 90,
            "last group >= 97": shares[-1] >= 97,
            "distance halves": distances[-1] <= distances[0] / 2,
            "samples >= 95": right >= 95, "codebook >= 90": use >= 90}
        for name, met in targets.items():
            print(f"{'met   ' if met else 'MISSED'}  {name}")
        sys.exit(not all(targets.values()))


if __name__ == "__main__":
    main()
