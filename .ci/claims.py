"""Measures claims of the paper on photographs of 32 pixels, by the CNN of judge.py.

    python .ci/claims.py out/cifar/ar/last.pt --data DIR [--images 2000]

Each row stands twice, for two seeds of the noise and of the tokens drawn. CNN distance: lower is
better; recognised: share in % that the CNN takes for the class asked for.

Smaller models than the preset cifar's (64 tokens of 10 bits), trained on two CPU cores at an earlier
commit; 2,000 held-out photographs, as many samples (real images: 76.9 % recognised, CNN distance of
their halves 4.1):

                                 CNN distance, twice | recognised | PSNR
    Adams-Bashforth, 8 steps         52.2     51.2     41.8     40.8     18.8
    Euler                            64.4     63.1     39.7     38.8     19.4
    4 steps                          69.8     68.8     38.2     37.5     19.6
    12 steps                         46.4     45.4     42.4     42.4     18.5
    16 steps                         45.1     44.1     42.1     42.0     18.3
    2 of 8 groups                   141.1    141.2     28.3     28.1     19.5
    4 of 8 groups                   137.0    137.3     30.1     30.1     20.5
    6 of 8 groups                    99.5     99.3     33.4     33.8     20.2
    samples, guidance none           66.5     65.9     25.4     25.4
    samples, guidance 3.5            47.4     46.3     48.6     47.7
    samples, guidance 1.1:6          49.9     47.9     37.2     39.3
    samples from 2 of 8 groups      144.6    143.7     21.8     22.4
    samples from 4 of 8 groups      138.5    139.0     22.6     23.3
    samples from 6 of 8 groups       95.7     95.3     27.8     26.8

Steps: more are nearer to photographs, up to 16; beyond 8, the share recognised hardly moves. Solver:
Adams-Bashforth is better than Euler in both numbers. PSNR goes the other way: it rewards blur. Groups:
each adds, of samples (at 1.1:6) too; from 2 to 4 of 8 it is little. Guidance: linear is no better here
than constant guidance of the same mean, and worse in what is recognised: early tokens tell the class.

Models of 128 tokens of 12 bits, trained on two CPU cores on a quarter to a half of those images; 400
photographs, as many samples, so that distances are larger (recognised of 2,000 real ones: 76.2 %):

    Adams-Bashforth, 8 steps         65.3     71.3     43.5     43.0     19.1
    Euler                            70.3     75.8     43.0     42.5     19.7
    4 steps                          73.9     77.9     44.0     43.3     19.9
    12 steps                         62.9     69.1     42.3     44.0     18.8
    16 steps                         64.4     70.6     43.3     43.3     18.6
    2 of 8 groups                   122.8    123.3     35.2     36.5     20.3
    4 of 8 groups                   112.1    114.0     36.3     34.7     20.3
    6 of 8 groups                    92.1     95.5     40.3     39.3     20.1
    samples, guidance none           98.0     92.5     18.3     17.2
    samples, guidance 2              77.2     81.3     25.0     23.7
    samples, guidance 1:3            93.2     88.8     19.8     16.2
    samples, guidance 3:1            75.6     71.8     30.8     30.8
    samples, guidance 3.5            72.4     72.7     33.5     33.3
    samples, guidance 1.1:6          92.2     88.1     18.3     22.0
    samples from 2 of 8 groups      133.0    130.2     19.5     18.5
    samples from 4 of 8 groups      127.3    126.6     21.0     19.0
    samples from 6 of 8 groups      111.9    110.4     20.7     19.0

Steps: up to 12, more are nearer. Solver and groups as above, in distance. Falling guidance of mean 2 is
better than constant, and rising worse.

The preset toy, seed 0, `--data shapes --images 1000` (CNN distance of halves of the real ones 2.9):

                                 CNN distance, twice | recognised
    Adams-Bashforth, 8 steps           6.3      5.7     98.3     98.6
    Euler                              4.4      4.0     98.4     98.4
    4 steps                            4.0      3.7     98.5     98.4
    12 steps                           5.6      5.0     98.2     98.4
    16 steps                           6.5      6.0     98.3     98.3
    2 of 8 groups                      9.7      9.5     95.6     95.4
    4 of 8 groups                      5.2      5.1     98.0     97.8
    6 of 8 groups                      5.0      4.8     98.6     98.4
    samples, guidance none             7.0      6.2     98.3     97.5
    samples, guidance 2                5.2      4.8     99.2     99.3
    samples, guidance 1:3              7.4      6.4     98.6     98.1
    samples, guidance 3:1              4.3      4.6     99.2     99.5
    samples, guidance 3.5             11.3     12.8     94.9     94.1
    samples, guidance 1.1:6           12.8     12.0     96.5     95.0

There, Euler and few steps win: such pictures have no texture to lose. Of guidance of mean 2, falling is
no worse than constant, and rising is worse; of mean 3.5, too much for them, rising is recognised better.
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
    for cfg in ("none", "2", "1:3", "3:1", "3.5", "1.1:6"):  # linear beside constant of its mean
        drawn = [in_parts(lambda some, u: ar.generate(some, parse_cfg(cfg), uniforms=u), asked, random)
                 for random in uniforms]
        show(f"samples, guidance {cfg}", [decode(*pair) for pair in zip(drawn, noises)], asked)
    for k in (2, 4, 6):
        decoded = [decode(*pair, groups=k) for pair in zip(drawn, noises)]
        show(f"samples from {k} of 8 groups", decoded, asked)


if __name__ == "__main__":
    main()
