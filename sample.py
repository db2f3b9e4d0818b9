"""Draws images from a trained model.

    python sample.py --ckpt out/ar/last.pt --labels 0,1,2 --num 30 --cfg 1.1:3
    python sample.py --cfg 1.1:10                       the newest checkpoint under out/
    python sample.py --ckpt D-AR-XL-360K.pt --tokenizer D-AR-tokenizer_v1.pt --cfg 1.1:10

The checkpoint of train_ar.py carries its tokenizer, the authors' files do not. Writes one
picture, a grid of samples.
"""
import argparse
import glob
import os

import torch
from torch import Tensor

from model_ar import AR, load_ar
from model_tokenizer import Tokenizer, image_grid, load_tokenizer, read_file, run


def parse_cfg(text: str) -> tuple[float, float] | None:
    """Guidance: "1.1:10" runs linearly over the tokens, "4" is constant, "none" is off."""
    if text == "none":
        return None
    try:
        start, end = (float(part) for part in (text.split(":") if ":" in text else [text, text]))
    except ValueError:
        raise ValueError(f"--cfg must be START:END, one number, or none; got {text!r}") from None
    return start, end


def parse_labels(text: str, classes: list[str]) -> list[int]:
    """Class numbers of "207,360" or of class names; "" is all classes."""
    labels = []
    for part in filter(None, text.split(",")):
        if part not in classes and not (part.isdecimal() and int(part) < len(classes)):
            raise ValueError(f"--labels: no class {part!r}; give numbers in 0 ... "
                             f"{len(classes) - 1} or names such as {', '.join(classes[:10])}")
        labels.append(classes.index(part) if part in classes else int(part))
    return labels or list(range(len(classes)))


def newest_checkpoint(folder: str = "out") -> str:
    """The checkpoint of an autoregressive model under `folder` that was written last."""
    paths = glob.glob(os.path.join(folder, "**", "last.pt"), recursive=True)
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        if read_file(path).get("kind") == "ar":
            return path
    raise FileNotFoundError(f"no checkpoint under {folder}/; train one, or give --ckpt FILE")


def draw_samples(ar: AR, tokenizer: Tokenizer, labels: Tensor, args) -> Tensor:
    """Images (B, 3, H, W) of class labels (B,)."""
    tokens = ar.generate(labels, args.cfg, None, args.temperature, args.top_k, args.top_p)
    return tokenizer.decode(tokens, None, args.steps, args.solver)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", help="checkpoint of train_ar.py; default: the newest under out/")
    parser.add_argument("--tokenizer", help="its tokenizer, for files that do not carry one")
    parser.add_argument("--labels", default="", help="class numbers or names, a,b,c; default: all")
    parser.add_argument("--num", type=int, default=100, help="number of images, labels in turn")
    parser.add_argument("--cfg", default="none", help="guidance START:END, a number, or none")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the top share p")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the tokenizer's")
    parser.add_argument("--solver", default="adams2", choices=["adams2", "euler"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100, help="images at a time")
    parser.add_argument("--out", default="out/samples.png", help="the picture to write")
    args = parser.parse_args(argv)
    args.cfg = parse_cfg(args.cfg)
    if args.num < 1 or args.batch < 1 or args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ValueError("need --num >= 1, --batch >= 1, --temperature >= 0, 0 < --top-p <= 1")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.ckpt = args.ckpt or newest_checkpoint()
    classes = read_file(args.ckpt).get("classes")  # the authors' files name none
    labels = parse_labels(args.labels, classes) if classes else None
    tokenizer = load_tokenizer(args.tokenizer or args.ckpt, device)
    ar = load_ar(args.ckpt, device, tokenizer.config.num_tokens)
    if (ar.config.vocab_size, ar.config.num_tokens) != (tokenizer.config.codebook_size,
                                                        tokenizer.config.num_tokens):
        raise ValueError(f"the tokenizer has {tokenizer.config.num_tokens} tokens of "
                         f"{tokenizer.config.codebook_size}, {args.ckpt} predicts "
                         f"{ar.config.num_tokens} of {ar.config.vocab_size}")
    labels = labels or parse_labels(args.labels, [str(i) for i in range(ar.config.num_classes)])
    torch.manual_seed(args.seed)
    todo = torch.tensor([labels[i % len(labels)] for i in range(args.num)], device=device)
    images = torch.cat([draw_samples(ar, tokenizer, part, args) for part in todo.split(args.batch)])
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    columns = len(labels) if 1 < len(labels) <= 10 else 10
    image_grid(images, min(columns, args.num)).save(args.out)
    print(args.out)


if __name__ == "__main__":
    run(main)
