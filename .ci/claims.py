"""Measures the paper's claims on CIFAR-10: the table of claims in README.md.

    F=out/cifar                         of README's three CIFAR commands, DATA="--data DIR"
    python .ci/claims.py decoding $F/tokenizer/last.pt $DATA          solvers, steps
    python .ci/claims.py sampling $F/ar/last.pt $DATA                 numbers of tokens, guidance

Two trainings need a rule exchanged. They take the arguments of train_ar.py and train_tokenizer.py:

    python .ci/claims.py reversed --preset cifar $DATA --tokenizer $F/tokenizer/last.pt \\
        --codes out/codes_reversed --out $F/reversed                  tokens in reversed order
    python .ci/claims.py sampling $F/reversed/last.pt $DATA --reversed
    SHORT="--preset cifar $DATA --steps 500 --decay-steps 250 --ema 0.99"
    python .ci/claims.py cut $SHORT --out $F/cut                      Eq. 5's ceil for a time's group
    python train_tokenizer.py $SHORT --out $F/short                   rounding, beta 16
    python train_tokenizer.py $SHORT --out $F/b1 --beta 1             and so on
    python train_tokenizer.py $SHORT --out $F/k1 --beta 2 --num-groups 1      and so on
    python .ci/claims.py tokenizers $F/*/last.pt $DATA                several side by side

All images are held-out ones or samples; "CNN distance" is explained in judge.py. Each figure stands
twice, for two seeds of the noise and of the tokens drawn.
"""
import argparse
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from judge import Judge  # noqa: E402, also finds the modules below

import model_tokenizer  # noqa: E402
import train_ar  # noqa: E402
import train_tokenizer  # noqa: E402
from sample import load_ar, load_tokenizer, parse_cfg, psnr  # noqa: E402

SEEDS = 0, 1


def reverse(tokenizer):
    """The same tokenizer, whose tokens come and go in reversed order."""
    encode, decode = tokenizer.encode, tokenizer.decode
    tokenizer.encode = lambda images: encode(images).flip(1)
    tokenizer.decode = lambda tokens, *rest, **more: decode(tokens.flip(1), *rest, **more)
    return tokenizer


def seeded_noise(tokenizer, count, seed):
    size = tokenizer.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def show(name, *numbers):
    print(f"{name:32s}" + "".join(f"{number:10.3f}" for number in numbers), flush=True)


def reconstruction(tokenizer, judge, images, tokens, **how):
    """CNN distance and PSNR of the decoded tokens, each for all seeds."""
    decoded = [tokenizer.decode(tokens, seeded_noise(tokenizer, len(images), seed), **how)
               for seed in SEEDS]
    return [*(judge.distance(some, images) for some in decoded),
            *(psnr(some, images) for some in decoded)]


def decoding(path, data, count):
    tokenizer = load_tokenizer(path)
    judge = Judge(data, tokenizer.config.image_size)
    images = judge.images[:count]
    tokens = tokenizer.encode(images)

    def measure(name, **how):
        show(name, *reconstruction(tokenizer, judge, images, tokens, **how))

    print("CNN distance, twice; PSNR in dB, twice")
    measure("Adams-Bashforth")
    measure("Euler", solver="euler")
    measure("Adams-Bashforth, real steps", solver="adams2_variable")
    for steps in (4, 12, 16):
        measure(f"Adams-Bashforth, {steps} steps", steps=steps)


def sampling(path, data, count, flip):
    tokenizer, ar = load_tokenizer(path), load_ar(path)
    if flip:
        reverse(tokenizer)
    judge = Judge(data, tokenizer.config.image_size)
    asked = torch.arange(count) % len(judge.classes)

    def draw(cfg, seed):
        uniforms = torch.rand(count, ar.config.num_tokens,
                              generator=torch.Generator().manual_seed(seed))
        return torch.cat([ar.generate(part, parse_cfg(cfg), uniforms=some) for part, some
                          in zip(asked.split(100), uniforms.split(100))])

    def measure(name, tokens, **how):
        images = [tokenizer.decode(some, seeded_noise(tokenizer, count, seed), **how)
                  for some, seed in zip(tokens, SEEDS)]
        show(name, *(judge.distance(some, judge.images) for some in images),
             *(judge.recognised(some, asked) for some in images))

    print("CNN distance, twice; recognised as the class asked for in %, twice")
    show("real, two halves", judge.distance(judge.images[::2], judge.images[1::2]))
    show("real, recognised", judge.recognised(judge.images, judge.labels))
    for cfg in ("none", "1.5", "1.1:3"):
        tokens = [draw(cfg, seed) for seed in SEEDS]
        measure(f"guidance {cfg}", tokens)
    for quarters in (1, 2, 3) if not flip else ():
        groups = tokenizer.config.num_groups * quarters // 4
        measure(f"guidance {cfg}, {quarters}/4 of the tokens", tokens, groups=groups)


def tokenizers(paths, data, count):
    print("CNN distance, twice; PSNR in dB, twice; codebook rows used in %; each group knows. Steps: "
          "K, but at least 8")
    loaded = [load_tokenizer(path) for path in paths]
    judge = Judge(data, loaded[0].config.image_size)
    images = judge.images[:count]
    few = images[:256]
    for path, tokenizer in zip(paths, loaded):
        tokens = tokenizer.encode(images)
        knows = train_tokenizer.group_knows(tokenizer, few, seeded_noise(tokenizer, len(few), 0),
                                            tokens[:256])
        show(path, *reconstruction(tokenizer, judge, images, tokens,
                                   steps=max(8, tokenizer.config.num_groups)),
             100 * tokens.unique().numel() / tokenizer.config.codebook_size, *knows.tolist())


def main():
    task, *rest = sys.argv[1:] or [""]
    if task == "reversed":
        load = train_ar.load_tokenizer
        train_ar.load_tokenizer = lambda *of: reverse(load(*of))
        return train_ar.main(rest)
    if task == "cut":
        def group_of(u, num_groups):
            return (u * num_groups).long().clamp(max=num_groups - 1)
        model_tokenizer.group_of = train_tokenizer.group_of = group_of
        return train_tokenizer.main(rest)
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("decoding", "sampling", "tokenizers"))
    parser.add_argument("files", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--reversed", action="store_true")
    args = parser.parse_args()
    with torch.no_grad():
        if task == "decoding":
            decoding(args.files[0], args.data, args.images)
        elif task == "sampling":
            sampling(args.files[0], args.data, args.images, args.reversed)
        else:
            tokenizers(args.files, args.data, args.images)


if __name__ == "__main__":
    main()
