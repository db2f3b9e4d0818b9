"""Makes the pictures of README.md, with words at their sides.

    python .ci/pictures.py previews CHECKPOINT OUT --labels heart,window --cfg 1.1:3
    python .ci/pictures.py layouts CHECKPOINT OUT --prefix IMAGE --keep 3,8,24 --cfg 3.5
    python .ci/pictures.py photographs CHECKPOINT OUT --data DIR --count 5

Previews: a row a label, a column after each group of tokens, as `sample.py --stream` draws them.
Layouts: the first tokens of an image are kept, a number of them a row, the others are drawn for each
class. Photographs: held-out images, the previews of their tokens, the last being the reconstruction.
"""
import argparse
import os
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from sample import (center_crop, load_ar, load_checkpoint, load_tokenizer, parse_cfg,  # noqa: E402
                    read_image, seeded, to_tensor, to_uint8)
from train_tokenizer import open_data  # noqa: E402


def annotated(rows, header, names, zoom):
    """A picture of images (R, C, 3, H, W), enlarged by a whole factor, 2 pixels apart on white, with
    a text above each column and one at the left of each row."""
    count, columns, _, height, width = rows.shape
    font = ImageFont.load_default(13)
    left = 14 + int(max(font.getlength(name) for name in names))
    pitch = zoom * width + 2, zoom * height + 2
    picture = Image.new("RGB", (left + columns * pitch[0], 20 + count * pitch[1]), "white")
    pen = ImageDraw.Draw(picture)
    for row in range(count):
        top = 20 + row * pitch[1]
        pen.text((left - 8, top + pitch[1] // 2), names[row], "black", font, anchor="rm")
        for column, image in enumerate(to_uint8(rows[row])):
            image = Image.fromarray(image.repeat(zoom, 0).repeat(zoom, 1))
            picture.paste(image, (left + column * pitch[0], top))
    for column, text in enumerate(header):
        pen.text((left + column * pitch[0] + pitch[0] // 2, 10), text, "black", font, anchor="mm")
    return picture


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("previews", "layouts", "photographs"))
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("--labels", default="")
    parser.add_argument("--cfg", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix")
    parser.add_argument("--keep", default="")
    parser.add_argument("--data")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--zoom", type=int, default=3)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.checkpoint)
    config = tokenizer.config
    counted = [f"{k * config.group_size} tokens" for k in range(1, config.num_groups + 1)]

    def noises(count):
        size = config.image_size
        return torch.stack([torch.randn(3, size, size, generator=seeded(args.seed, "start", i))
                            for i in range(count)])

    if args.kind == "photographs":
        _, held_out = open_data(args.data, config.image_size)
        chosen = np.linspace(0, len(held_out) - 1, args.count).astype(int)
        photos = [held_out[i] for i in chosen]
        images = torch.stack([to_tensor(center_crop(image, config.image_size)) for image, _ in photos])
        groups = tokenizer.encode(images).split(config.group_size, 1)
        rows = torch.stack([images, *tokenizer.stream(groups, noises(len(images)))], 1)
        names = [held_out.classes[label] for _, label in photos]
        annotated(rows, ["original", *counted], names, args.zoom).save(args.out)
        return

    ar, classes = load_ar(args.checkpoint), load_checkpoint(args.checkpoint, "ar")["classes"]
    names = args.labels.split(",") if args.labels else classes[:10]
    labels = torch.tensor([classes.index(name) for name in names])
    uniforms = torch.stack([torch.rand(config.num_tokens, generator=seeded(args.seed, "tokens", i))
                            for i in range(len(names))])
    if args.kind == "previews":
        groups = ar.stream(labels, parse_cfg(args.cfg), uniforms=uniforms, group_size=config.group_size)
        rows = torch.stack(list(tokenizer.stream(groups, noises(len(names)))), 1)
        annotated(rows, counted, names, args.zoom).save(args.out)
        return

    photo = to_tensor(center_crop(read_image(args.prefix), config.image_size))[None]
    tokens, rows = tokenizer.encode(photo).expand(len(names), -1), []
    kept = [int(text) for text in args.keep.split(",")]
    for count in kept:
        drawn = ar.generate(labels, parse_cfg(args.cfg), tokens[:, :count], uniforms=uniforms)
        rows.append(torch.cat([photo, tokenizer.decode(drawn, noises(len(names)))]))
    texts = [f"first {count} kept" for count in kept]
    annotated(torch.stack(rows), ["reference", *names], texts, args.zoom).save(args.out)


if __name__ == "__main__":
    main()
