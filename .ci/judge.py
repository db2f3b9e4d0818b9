"""Measures the toy run: a small CNN, trained on the built-in pictures, names what the models draw.

    python .ci/judge.py [--check] [CHECKPOINT]    default: out/ar/last.pt

Prints the README's table. With --check, exits with 1 where a target is missed that was met when the
README was written: all but the last, as the first group of tokens is recognised already.
"""
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model_ar import load_ar  # noqa: E402
from model_tokenizer import load_tokenizer, psnr, to_tensor  # noqa: E402
from sample import parse_cfg  # noqa: E402
from train_tokenizer import open_data  # noqa: E402


def stack(data, first, last):
    """Images (n, 3, H, W) and labels (n,) of items first ... last - 1."""
    items = [data[i] for i in range(first, last)]
    images = torch.stack([to_tensor(image) for image, _ in items])
    return images, torch.tensor([label for _, label in items])


def train_cnn(images, labels, epochs=4):
    torch.manual_seed(0)
    layers = []
    for inner, outer in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(),
                   nn.MaxPool2d(2)]
    cnn = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))
    cnn(images[:2])
    optimizer = torch.optim.AdamW(cnn.parameters(), lr=2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(64):
            F.cross_entropy(cnn(images[part]), labels[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return cnn.eval()


@torch.no_grad()
def main():
    check, paths = "--check" in sys.argv, [word for word in sys.argv[1:] if word != "--check"]
    path, cfg = (paths + ["out/ar/last.pt"])[0], parse_cfg("1.1:3")
    tokenizer, ar = load_tokenizer(path), load_ar(path)
    train, held_out = open_data("shapes", tokenizer.config.image_size)
    with torch.enable_grad():
        cnn = train_cnn(*stack(train, 0, 6000))
    images, labels = stack(held_out, 0, 1000)

    def recognised(pictures, asked):
        return 100 * (cnn(pictures.clamp(-1, 1)).argmax(1) == asked).float().mean().item()

    real = recognised(images, labels)
    print(f"real held-out pictures recognised: {real:.1f} %")

    torch.manual_seed(0)
    tokens, noise = tokenizer.encode(images), torch.randn_like(images)
    config, rates = tokenizer.config, []
    print("groups   PSNR dB   recognised %")
    for groups in range(1, config.num_groups + 1):
        decoded = tokenizer.decode(tokens, noise, groups=groups)
        decibel = psnr(decoded, images)
        rates.append(recognised(decoded, labels))
        print(f"{groups:6d} {decibel:9.2f} {rates[-1]:14.1f}")
    use = 100 * tokens.unique().numel() / config.codebook_size
    print(f"codebook rows used by the 1,000 held-out pictures: {use:.1f} %")

    asked = torch.arange(500) % 10
    samples = tokenizer.decode(ar.generate(asked, cfg))
    right = recognised(samples, asked)
    print(f"samples recognised as the class asked for: {right:.1f} %")
    for label, name in enumerate(held_out.classes):
        print(f"  {name:10s} {recognised(samples[asked == label], asked[asked == label]):5.1f} %")

    targets = {"real >= 99": real >= 99, "samples >= 80": right >= 80, "codebook >= 90": use >= 90,
               "PSNR >= 18": decibel >= 18}
    better = {"more groups, better": rates == sorted(rates) and rates[-1] > rates[0]}
    for name, met in {**targets, **better}.items():
        print(f"{'met   ' if met else 'MISSED'}  {name}")
    sys.exit(check and not all(targets.values()))


if __name__ == "__main__":
    main()
