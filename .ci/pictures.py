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
from sample import (Pipeline, SampleConfig, draw_noise, load_ar, load_checkpoint,  # noqa: E402
                    load_tokenizer, to_uint8)
from train_tokenizer import FixedCrops, open_data  # noqa: E402

CPU = torch.device("cpu")


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
    parser.add_argument("--keep", default="1")
    parser.add_argument("--data")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--zoom", type=int, default=3)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.checkpoint)
    config = tokenizer.config
    counted = [f"{k * config.group_size} tokens" for k in range(1, config.num_groups + 1)]

    if args.kind == "photographs":
        _, held_out = open_data(args.data, config.image_size)
        crops = FixedCrops(held_out, config.image_size)
        chosen = np.linspace(0, len(held_out) - 1, args.count).astype(int)
        photos, labels = zip(*[crops[i] for i in chosen])
        photos = torch.cat(photos)
        noise = draw_noise((args.seed, "start"), range(args.count), config.image_size, CPU)
        groups = tokenizer.encode(photos).split(config.group_size, 1)
        rows = torch.stack([photos, *tokenizer.stream(groups, noise)], 1)
        names = [held_out.classes[label] for label in labels]
        annotated(rows, ["original", *counted], names, args.zoom).save(args.out)
        return

    classes = load_checkpoint(args.checkpoint, "ar")["classes"]
    names = args.labels.split(",") if args.labels else classes[:10]
    labels = [classes.index(name) for name in names]
    settings = SampleConfig(seed=args.seed, cfg=args.cfg, stream=True)  # all in one batch
    pipeline = Pipeline(settings, load_ar(args.checkpoint), tokenizer, labels, CPU)
    numbers = range(len(labels))
    if args.kind == "previews":
        rows = torch.stack(list(pipeline.previews(numbers)), 1)
        annotated(rows, counted, names, args.zoom).save(args.out)
        return

    photo = pipeline.read([args.prefix])                            # (1, 3, H, W)
    tokens = tokenizer.encode(photo).expand(len(labels), -1)
    kept = [int(text) for text in args.keep.split(",")]
    rows = [torch.cat([photo, pipeline.images(numbers, tokens[:, :count])]) for count in kept]
    texts = [f"first {count} kept" for count in kept]
    annotated(torch.stack(rows), ["reference", *names], texts, args.zoom).save(args.out)


if __name__ == "__main__":
    main()
