"""Measures claims of the paper on photographs of 32 pixels, by the CNN of judge.py.

    python .ci/claims.py out/cifar/ar/last.pt --data DIR [--images 2000]

Each row stands twice, for two seeds of the noise and of the tokens drawn. CNN distance: lower is
better; recognised: share in % that the CNN takes for the class asked for.

CLAIMS
"""
import argparse
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from judge import DEVICE, Judge, in_parts  # noqa: E402, also finds the modules below

from sample import load_ar, load_tokenizer, parse_cfg, psnr, seeded  # noqa: E402


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    tokenizer, ar = (load(args.checkpoint, DEVICE) for load in (load_tokenizer, load_ar))
    judge = Judge(args.data, tokenizer.config.image_size)
    images, labels = judge.images[:args.images], judge.labels[:args.images]
    asked = torch.arange(len(images), device=DEVICE) % len(judge.classes)
    noises = [torch.randn(images.shape, generator=seeded(seed, "claims")).to(DEVICE)
              for seed in (0, 1)]
    uniforms = [torch.rand(len(images), ar.config.num_tokens, generator=seeded(seed, "draws"))
                .to(DEVICE) for seed in (0, 1)]

    def show(name, decoded, wanted, *more):
        numbers = [judge.distance(some, images) for some in decoded]
        numbers += [judge.recognised(some, wanted) for some in decoded]
        numbers += more
        print(f"{name:28s}" + "".join(f"{number:9.1f}" for number in numbers), flush=True)

    def decode(tokens, noise, **how):
        return in_parts(lambda some, eps: tokenizer.decode(some, eps, **how), tokens, noise)

    print("CNN distance, twice; recognised in %, twice; PSNR of reconstructions in dB")
    tokens = in_parts(tokenizer.encode, images)
    for name, how in (("Adams-Bashforth, 8 steps", {}), ("Euler", {"solver": "euler"}),
                      *((f"{steps} steps", {"steps": steps}) for steps in (4, 12, 16)),
                      *((f"{k} of 8 groups", {"groups": k}) for k in (2, 4, 6))):
        decoded = [decode(tokens, noise, **how) for noise in noises]
        show(name, decoded, labels, psnr(decoded[0], images))
    for cfg in ("none", "3.5", "1.1:6"):
        drawn = [in_parts(lambda some, u: ar.generate(some, parse_cfg(cfg), uniforms=u), asked, random)
                 for random in uniforms]
        show(f"samples, guidance {cfg}", [decode(*pair) for pair in zip(drawn, noises)], asked)
    for k in (2, 4, 6):
        decoded = [decode(*pair, groups=k) for pair in zip(drawn, noises)]
        show(f"samples from {k} of 8 groups", decoded, asked)


if __name__ == "__main__":
    main()
