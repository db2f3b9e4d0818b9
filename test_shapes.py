"""Tests of everything that can be checked on a CPU without the network, in a minute and a half.

    python test_shapes.py            or            python -m pytest test_shapes.py

Small models in random weights, none of them zero, so that every path matters; and runs of both
trainers, of four steps each. `tmp_path` is an empty folder that is removed after the test.
"""
import atexit
import contextlib
import errno
import functools
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import unittest
import urllib.error
import warnings
import zipfile
from dataclasses import fields, replace
from os.path import join
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import fid
import model_ar
import model_tokenizer as mt
import sample
import train_ar
import train_tokenizer
from model_ar import AR, SIZES, ARConfig
from model_tokenizer import TOKENIZERS, Tokenizer, TokenizerConfig
from sample import Mistake, Purpose, load_ar, load_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = join(HERE, "..", "shared", "fixtures")
CPU = torch.device("cpu")
SMALL = TokenizerConfig(image_size=32, num_tokens=16, num_groups=4, codebook_size=64, patch_size=8,
                        encoder_width=32, encoder_depth=2, decoder_width=64, decoder_depth=2,
                        diffusion_width=96, diffusion_depth=3, diffusion_patch=4, head_dim=16,
                        max_tokens=20, repa_depth=2, repa_hidden=24, repa_dim=12)
SMALL_AR = ARConfig(depth=3, width=48, heads=3, num_tokens=16, vocab_size=64, num_classes=5,
                    dropout=0.0)
# Command lines of training runs that take a second or two.
TINY = ("--preset toy --steps 4 --batch 4 --log-every 1 --eval-every 4 --save-every 2 "
        "--eval-images 4").split()
TINY_TOKENIZER = TINY + ("--encoder-depth 1 --decoder-depth 1 --diffusion-depth 1 --codebook-size "
                         "32 --reseed-after 1").split()
TINY_AR = TINY + "--dropout 0.1 --eval-samples 2".split()
TRAINERS = {"tokenizer": train_tokenizer, "ar": train_ar}
torch.set_num_threads(1)  # two threads of such small models mostly wait for one another


def randomised(model):
    """The model with all weights drawn anew, so that no gate, bias or output layer is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    return model.eval()


def small_tokenizer(**changes) -> Tokenizer:
    return randomised(Tokenizer(replace(SMALL, **changes)))


def small_ar(**changes) -> AR:
    return randomised(AR(replace(SMALL_AR, **changes)))


def pictures(batch=2, size=32):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def some_tokens(batch=2, count=16, vocabulary=64):
    return torch.randint(vocabulary, (batch, count), generator=torch.Generator().manual_seed(3))


def close(a, b, tolerance):
    assert a.shape == b.shape, (a.shape, b.shape)
    difference = (a - b).abs().max()
    assert difference <= tolerance, f"differ by {difference:.2e} > {tolerance:.0e}"


def raises(kind, text, function, *args, **kwargs):
    """Asserts that the call raises this kind of error with this text in its one line."""
    try:
        function(*args, **kwargs)
    except kind as error:
        assert text in str(error) and "\n" not in str(error), f"no {text!r} in: {error}"
        return
    raise AssertionError(f"no {kind.__name__} with {text!r}")


def quietly(function, *args):
    """Calls the function and returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue()


@contextlib.contextmanager
def patched(module, name: str, value):
    """Replaces module.name for a while."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def start(function: str, *argv, processes: int = 0) -> subprocess.Popen:
    """A process, or several under torchrun, in which a function of this file runs."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python",
                f"--nproc_per_node={processes}"] if processes else []
    code = f"import sys, test_shapes; test_shapes.{function}(*sys.argv[1:])"
    return subprocess.Popen([*torchrun, sys.executable, "-c", code, *argv], text=True, cwd=HERE,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


# ---- Sizes ---------------------------------------------------------------------------------------

def test_models_have_the_papers_parameter_counts_and_presets_fit_together():
    def size(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        tokenizers = {name: Tokenizer(config) for name, config in TOKENIZERS.items()}
        counts = {name: size(AR(config)) for name, config in SIZES.items()}
    parts = {name: size(part) for name, part in tokenizers["paper"].named_children()}
    assert parts.pop("repa_head") == 7_344_896 and sum(parts.values()) == 300_099_776
    assert parts["diffusion"] == 185_129_664
    assert size(tokenizers["paper"].encoder.blocks) == 56_717_312
    assert size(tokenizers["paper"].decoder.blocks) == 56_717_312
    assert round(size(tokenizers["light"]) / 1e6) == 113
    expected = {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672}
    assert {name: counts[name] for name in expected} == expected
    for name, (settings,) in train_ar.PRESETS.items():
        ar, tokenizer = SIZES[settings.size], train_tokenizer.PRESETS[name][1]
        assert (ar.num_tokens, ar.vocab_size) == (tokenizer.num_tokens, tokenizer.codebook_size)


# ---- The rules of time and groups ----------------------------------------------------------------

def test_eight_steps_use_the_papers_times_and_each_group_once_and_fewer_groups_end_with_a_jump():
    schedule = mt.sampling_schedule(8, 8, 2.0, 8)
    expected = [0, .0667, .1429, .2308, .3333, .4545, .6, .7778, 1]
    assert [round(step.t, 4) for step in schedule] + [schedule[-1].t_next] == expected
    assert [step.group for step in schedule] == list(range(8))
    schedule = mt.sampling_schedule(8, 8, 2.0, 3)
    assert [step.group for step in schedule] == [0, 1, 2] and schedule[-1].t_next == 1


def test_first_group_gets_a_sixteenth_and_last_three_sixteenths_of_the_times():
    groups = mt.group_of((torch.arange(16_000) + 0.5) / 16_000, 8)
    assert torch.bincount(groups).tolist() == [1000] + [2000] * 6 + [3000]
    for steps, last in ((4, 6), (12, 7), (16, 7)):
        groups = [step.group for step in mt.sampling_schedule(steps, 8, 2.0, 8)]
        assert len(groups) == steps and groups == sorted(groups) and groups[-1] == last


# ---- Attention, rotation, patches ----------------------------------------------------------------

def test_split_attention_equals_masked_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 10 + 6, 8)
    for prefix in (10, 0, 16):
        mask = torch.ones(16, 16, dtype=torch.bool).tril()
        mask[:prefix, :prefix] = True  # patches see patches; query i sees them and queries <= i
        close(mt.prefix_attention(q, k, v, prefix),
              F.scaled_dot_product_attention(q, k, v, attn_mask=mask), 1e-6)  # float32 rounding


def test_rotated_products_depend_on_the_distance_of_patches_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 20, 16)
    rope = mt.rope_2d(4, 5, 16, CPU)
    scores = (mt.rotate(q, rope) @ mt.rotate(k, rope).mT)[0, 0].view(4, 5, 4, 5)
    close(scores[0, 1, 2, 3], scores[1, 2, 3, 4], 1e-5)  # both 2 rows and 2 columns apart
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3  # rows and columns differ


def test_one_dimensional_rotation_equals_complex_multiplication():
    x = torch.randn(1, 1, 6, 8)
    angles = torch.arange(6)[:, None] / 10000 ** (torch.arange(4) / 4)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(6, 4), angles)
    found = model_ar.rotate(x, model_ar.rope_1d(6, 8, 10000.0, CPU))
    close(found, torch.view_as_real(turned).flatten(-2), 1e-6)  # float32 rounding


def test_patches_are_the_images_squares_in_reading_order():
    images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    patches, grid = mt.to_patches(images, 4)
    assert grid == (2, 3) and patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], images[1, :, 4:8, 4:8].flatten())  # channel, row, column


# ---- The tokenizer -------------------------------------------------------------------------------

def changes_from(first: int, before, after):
    """Asserts that two results (B, N, D) differ from position `first` on, and only there."""
    assert torch.equal(before[:, :first], after[:, :first])
    assert ((before[:, first:] - after[:, first:]).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_encoder_queries_decoder_and_ar_model_are_causal():
    model, ar, images, labels = small_tokenizer(), small_ar(), pictures(), torch.tensor([0, 5])
    tokens, changed = some_tokens(), some_tokens()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    changes_from(9, model.condition(tokens), model.condition(changed))
    close(model.condition(tokens[:, :9]), model.condition(tokens)[:, :9], 1e-5)  # order of sums
    changes_from(10, ar(labels, tokens), ar(labels, changed))  # logits of what stands before
    changes_from(0, ar(labels, tokens), ar(labels.flip(0), tokens))
    before = model.encoder(images)
    model.encoder.query_table[7] += 1
    changes_from(7, before, model.encoder(images))


def test_quantizer_takes_the_nearest_row_in_float32_and_passes_gradients_straight_through():
    quantizer = small_tokenizer().quantizer
    z, weight = torch.randn(2, 16, 8, requires_grad=True), torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(z)
    unit, rows = F.normalize(z, dim=-1), F.normalize(quantizer.codebook, dim=-1)
    assert torch.equal(result.tokens, torch.cdist(unit, rows).argmin(-1))
    assert result.codes.dtype == torch.float32
    close(result.codes, rows[result.tokens], 1e-6)  # float32 rounding, here and below
    close(result.codes, quantizer.lookup(result.tokens), 1e-6)
    through, = torch.autograd.grad((result.codes * weight).sum(), z, retain_graph=True)
    direct, = torch.autograd.grad((unit * weight).sum(), z)
    close(through, direct, 1e-6)
    close(result.loss, 1.25 * (unit - rows[result.tokens]).pow(2).mean(-1), 1e-6)


def test_training_losses_equal_a_second_computation():
    model, images, noise = small_tokenizer(), pictures(3), torch.randn(3, 3, 32, 32)
    u = [0.05, 0.4, 0.99]
    output = model(images, torch.tensor(u), noise)
    tokens, vq, count, flow = model.encode(images), 0.0, 0, 0.0
    for i, (group, t) in enumerate(zip((0, 2, 3), (u / (u + 2 * (1 - u)) for u in u))):
        x1 = 0.6 * images[i:i + 1]
        xt = t * x1 + (1 - t) * noise[i:i + 1]
        cond = model.condition(tokens[i:i + 1])[:, 4 * group:4 * group + 4]
        v = model.diffusion(xt, torch.tensor([t]), cond).velocity
        flow += ((v - (x1 - noise[i:i + 1])) ** 2).mean() / 0.36 / 3
        close(output.predicted[i:i + 1], (xt + (1 - t) * v) / 0.6, 1e-4)  # codes took another route
        length = 4 * (group + 1)
        count += length
        vq += model.quantizer(model.encoder(images[i:i + 1])).loss[:, :length].sum()
    close(output.flow_loss, flow, 1e-4 * flow)
    close(output.vq_loss, vq / count, 1e-6)  # float32 rounding
    assert output.repa.shape == (3, 16, 12) and torch.equal(output.tokens, tokens)


def test_decoding_equals_the_sampler_written_out():
    model, tokens, noise = small_tokenizer(), some_tokens(), torch.randn(2, 3, 32, 32)
    times = [0, 1 / 7, 1 / 3, 3 / 5, 1]
    for solver, equal in (("adams2", 1), ("adams2_variable", 0), ("euler", None)):
        before, x = None, noise
        with torch.no_grad():
            for k in range(4):
                cond = model.condition(tokens)[:, 4 * k:4 * k + 4]
                v = model.diffusion(x, torch.full((2,), times[k]), cond).velocity
                h, last = times[k + 1] - times[k], times[k] - times[k - 1]
                past = 0 if equal is None or k == 0 else 0.5 if equal else h / (2 * last)
                x = x + h * (v + past * (v - (v if before is None else before)))
                before = v
        close(model.decode(tokens, noise, solver=solver), x / 0.6, 1e-4)  # outputs of order 10


def test_streamed_decoding_equals_whole_decoding_and_partial_decoding_reads_no_later_token():
    model, tokens, noise = small_tokenizer(), some_tokens(), torch.randn(2, 3, 32, 32)
    for solver in mt.SOLVERS:
        previews = list(model.stream(tokens.split(4, 1), noise, solver))
        for groups in (1, 2, 4):
            last = list(model.stream(tokens.split(4, 1), noise, solver, groups))[-1]
            # Outputs of order 10, here and below.
            close(last, model.decode(tokens, noise, solver=solver, groups=groups), 1e-4)
        assert torch.equal(previews[-1], last) and len(previews) == 4
    for groups in (1, 2, 3):  # an Euler preview is what decoding gives that ends with this group
        decoded = model.decode(tokens, noise, solver="euler", groups=groups)
        close(previews[groups - 1], decoded, 1e-4)
        part = model.decode(tokens[:, :4 * groups], noise, solver="euler", groups=groups)
        assert torch.equal(part, decoded)
    for steps in (3, 4, 6, 8):
        assert model.decode(tokens, noise, steps=steps).shape == (2, 3, 32, 32)
    tokens = model.encode(pictures(2, 64))  # of another size
    assert model.decode(tokens, torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_fresh_tokenizer_predicts_zero_velocity():
    model = Tokenizer(SMALL)
    output = model.diffusion(torch.randn(1, 3, 32, 32), torch.rand(1), torch.randn(1, 4, 64))
    assert output.velocity.abs().max() == 0 and output.patches.shape == (1, 96, 8, 8)
    close(model.quantizer.codebook.norm(dim=1), torch.ones(64), 1e-6)  # float32 rounding


# ---- The autoregressive model --------------------------------------------------------------------

@torch.no_grad()
def generate_without_cache(model, labels, cfg, prefix):
    """Greedy generation that runs the whole sequence anew for each token."""
    tokens = prefix
    while tokens.shape[1] < 16:
        padded = torch.cat([tokens, torch.zeros(len(labels), 1, dtype=torch.long)], 1)
        logits = model(labels, padded)[:, -1]
        if cfg is not None:
            free = model(torch.full_like(labels, 5), padded)[:, -1]
            scale = cfg[0] + (cfg[1] - cfg[0]) * tokens.shape[1] / 15
            logits = free + scale * (logits - free)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens


def test_cached_generation_equals_uncached_generation():
    model, labels = small_ar(), torch.tensor([0, 1, 4])
    for cfg in (None, (1.5, 1.5), (1.1, 8.0)):
        for kept in (0, 1, 5, 16):
            prefix = some_tokens(3)[:, :kept]
            expected = generate_without_cache(model, labels, cfg, prefix)
            assert torch.equal(model.generate(labels, cfg, prefix, temperature=0.0), expected)


def test_filters_keep_what_brute_force_keeps():
    torch.manual_seed(0)
    for row in torch.randn(20, 1, 40):
        for k, p in ((5, 1.0), (0, 0.8), (10, 0.6)):
            kept = row[0].argsort(descending=True)[:k or None].tolist()
            before = [0, *row[0][kept].softmax(0).cumsum(0).tolist()]  # share of all likelier ones
            kept = [token for token, share in zip(kept, before) if share <= p]
            found = model_ar.filter_logits(row, k, p)[0].isfinite().nonzero().flatten().tolist()
            assert found == sorted(kept)


def test_draws_have_the_models_distribution_from_the_first_possible_token_to_the_last():
    logits, count = torch.tensor([-1.0, 2.0, 0.0, 1.0, -2.0]), 40_000
    uniforms = torch.rand(count, 1, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([[0.0], [1 - 2 ** -24]])  # the latter is the largest float32 below 1
    for temperature, top_k, top_p, kept in (
            (1.0, 0, 1.0, [0, 1, 2, 3, 4]), (2.0, 0, 1.0, [0, 1, 2, 3, 4]),
            (0.5, 3, 1.0, [1, 2, 3]), (1.0, 0, 0.8, [1, 3]), (1.0, 1, 1.0, [1])):
        filters = temperature, top_k, top_p
        drawn = model_ar.draw(logits.expand(count, 5), uniforms, *filters)
        expected = torch.zeros(5).index_copy(0, torch.tensor(kept),
                                             (logits[kept] / temperature).softmax(0))
        deviation = (expected * (1 - expected) / count).sqrt()  # of a share; 0 of what is dropped
        shares = torch.bincount(drawn, minlength=5) / count
        assert ((shares - expected).abs() <= 4 * deviation).all(), (shares, expected)
        drawn = model_ar.draw(logits.expand(2, 5), ends, *filters)
        assert drawn.tolist() == [kept[0], kept[-1]]
    assert model_ar.draw(logits[None], ends[:1], 0.0, 0, 1.0).item() == 1


def test_compiled_generation_draws_the_same_tokens_and_never_falls_back_to_eager_code():
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise unittest.SkipTest("no C++ compiler")
    model = small_ar(depth=1)
    with patched(torch._dynamo.config, "fail_on_recompile_limit_hit", True):
        for batch in (1, 2):  # with and without guidance, seven lengths of the cache each
            for cfg in (None, (1.1, 3.0)):
                given = torch.arange(batch), some_tokens(batch)[:, :2], torch.rand(batch, 16)
                expected = torch.cat([*model_ar.Sampler(model, batch, cfg).chunks(*given)], 1)
                sampler = model_ar.Sampler(model, batch, cfg, chunk=2, compiled=True)
                for _ in range(2):  # state is kept between calls
                    chunks = [*sampler.chunks(*given)]
                    assert torch.equal(torch.cat(chunks, 1), expected) and len(chunks) == 8


# ---- Data ----------------------------------------------------------------------------------------

def test_built_in_pictures_depend_on_their_number_and_survive_the_way_to_tensors_and_back():
    train, held_out = train_tokenizer.open_data("shapes", 32)
    assert np.array_equal(train[7][0], train_tokenizer.Shapes(5, 10, 32)[2][0])
    assert train[7][1] == 7 and len(train.classes) == 10
    assert train.first + len(train) <= held_out.first  # no picture in both
    assert not np.array_equal(train[7][0], train[17][0])
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    tensor = sample.to_tensor(Image.fromarray(pixels))[None]
    assert np.array_equal(sample.to_uint8(tensor)[0], pixels)
    assert sample.image_grid(pictures(5), 3).size == (3 * 64 + 4, 2 * 64 + 2)


def make_folder(root, per_class=3) -> str:
    """A tiny data set in class folders, one picture each in grey, CMYK, palette and with alpha."""
    for name in ("b_cat", "a_dog"):
        os.makedirs(join(root, name))
        for i in range(per_class):
            mode, ending = [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"),
                            ("RGBA", "png")][i % 5]
            noise = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(noise).convert(mode).save(join(root, name, f"{i:03d}.{ending}"))
    return os.fspath(root)


def test_folders_are_read_in_sorted_order_and_any_mode(tmp_path):
    root = make_folder(tmp_path / "whole", 5)
    os.makedirs(join(root, ".hidden"))
    data = train_tokenizer.Folder(root, 32)
    assert data.classes == ["a_dog", "b_cat"]
    assert [data[i][1] for i in range(10)] == [0] * 5 + [1] * 5
    assert all(data[i][0].mode == "RGB" for i in range(10))
    train, held_out = train_tokenizer.open_data(root, 32)
    parts = [{part.path(i) for i in range(len(part))} for part in (train, held_out)]
    assert [*map(len, parts)] == [9, 1] and not parts[0] & parts[1]
    Path(data.path(0)).write_text("no image")
    raises(Mistake, f"{data.path(0)} cannot be read", data.__getitem__, 0)
    raises(Mistake, "no images in", train_tokenizer.Folder, join(root, "a_dog"), 32)
    os.makedirs(join(root, "c_empty"))
    raises(Mistake, f"no images in {join(root, 'c_empty')}", train_tokenizer.Folder, root, 32)
    for name in ("train/x", "train/y", "val/x"):
        shutil.copytree(join(root, "b_cat"), tmp_path / "split" / name)
    raises(Mistake, "hold different classes", train_tokenizer.open_data, tmp_path / "split", 32)


def test_files_of_many_kinds_are_read_or_refused_by_name(tmp_path):
    good = sample.image_grid(pictures(1), 1)
    deep = np.random.default_rng(0).integers(0, 2 ** 16, (64, 64), dtype=np.uint16)

    def whole(format: str, image=good, **options) -> bytes:
        file = io.BytesIO()
        image.save(file, format, **options)
        return file.getvalue()

    jpeg, png = whole("JPEG"), whole("PNG")
    files = [(f"{name}.{ending}", False, content) for ending in ("jpg", "png", "webp", "bmp")
             for name, content in (("empty", b""), ("text", b"<html>404 Not Found</html>"),
                                   ("noise", np.random.default_rng(1).bytes(5000)),
                                   ("gif", whole("GIF")), ("tiff", whole("TIFF")),
                                   ("eps", whole("EPS")))]
    files += [
        ("half.jpg", False, jpeg[:len(jpeg) // 2]), ("half.png", False, png[:len(png) // 2]),
        ("half.bmp", False, whole("BMP")[:2000]), ("half.webp", False, whole("WEBP")[:500]),
        ("header.jpg", False, jpeg[:20]), ("header.png", False, png[:30]),
        ("damaged.png", False, png[:12] + b"xxxx" + png[16:]),
        ("bomb.png", False, png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:]),
        ("long.png", False, whole("PNG", Image.new("RGB", (2, 3000)))),
        ("jpeg.png", True, jpeg), ("png.jpg", True, png), ("whole.webp", True, whole("WEBP")),
        ("whole.bmp", True, whole("BMP")), ("deep.png", True, whole("PNG", Image.fromarray(deep))),
        ("animated.png", True, whole("PNG", save_all=True, append_images=[good.rotate(90)])),
        ("one_bit.png", True, whole("PNG", good.convert("1"))),
        ("grey_alpha.png", True, whole("PNG", good.convert("LA"))),
        ("palette_alpha.png", True, whole("PNG", good.convert("P"), transparency=0)),
        ("pixel.png", True, whole("PNG", Image.new("RGB", (1, 1))))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on what it makes of them
        for name, readable, content in files:
            path = join(tmp_path, name)
            Path(path).write_bytes(content)
            if readable:
                image = sample.read_image(path, 32)
                assert image.mode == "RGB" and sample.center_crop(image, 32).size == (32, 32), path
            else:
                raises(Mistake, f"{path} cannot be read", sample.read_image, path, 32)
    deep = np.array(sample.read_image(join(tmp_path, "deep.png"), 32))
    assert 100 < deep.mean() < 155  # not white: 16 bits are scaled, not cut


def test_more_than_one_unreadable_image_in_a_hundred_is_an_error(tmp_path):
    few, many = (train_tokenizer.Unreadable(str(tmp_path), total) for total in (19, 200))
    assert "skipped 5: e" in quietly(few.note, [*"abcde"])  # of fewer than 20, none ends the run
    assert quietly(many.note, ["a", "", "b\na", "b"]).count("skipped") == 2  # each once
    raises(Mistake, "more than 1 % of the images cannot be read, 3", quietly, many.note, ["c"])
    assert "b\n" in (tmp_path / "unreadable.txt").read_text()
    make_folder(tmp_path / "data", 1)
    for path in tmp_path.glob("data/*/*"):
        path.write_text("no image")
    raises(Mistake, "100 images taken at random", train_tokenizer.read_or_another,
           train_tokenizer.Folder(str(tmp_path / "data"), 32), 0)


def test_crops_have_the_right_size_and_views_are_mirrored():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    rng = np.random.default_rng(0)
    crops = [train_tokenizer.random_crop(image, 32, 1.25, True, rng) for _ in range(20)]
    assert {crop.size for crop in (*crops, sample.center_crop(image, 32))} == {(32, 32)}
    for views in (2, 10):
        crops = [np.array(train_ar.crop_view(image, 32, view, views)) for view in range(views)]
        assert all(np.array_equal(crops[i][:, ::-1], crops[i + 1]) for i in range(0, views, 2))
        assert len({crop.tobytes() for crop in crops}) == views


def test_an_epoch_shows_each_item_once_and_processes_share_the_positions_of_a_step():
    shuffle = train_tokenizer.Shuffle(10, 0)
    order = [shuffle[i] for i in range(20)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert train_tokenizer.Shuffle(10, 0)[13] == order[13]
    config = train_tokenizer.TrainConfig(batch=8, steps=6)
    for step in (4, 5):
        shares = [list(train_tokenizer.positions(config, 4, rank, 2))[4 * step - 16:][:4]
                  for rank in (0, 1)]
        assert shares[0] + shares[1] == list(range(8 * step, 8 * step + 8))


# ---- Parts of training ---------------------------------------------------------------------------

def test_learning_rate_warms_up_stays_and_falls_and_averaged_weights_follow():
    config = train_tokenizer.TrainConfig(steps=100, lr=1.0, lr_final=0.1, warmup_steps=10,
                                         decay_steps=50)
    rates = [train_tokenizer.learning_rate(step, config) for step in (0, 9, 50, 75, 100)]
    close(torch.tensor(rates), torch.tensor([0.1, 1.0, 1.0, 0.55, 0.1]), 1e-6)  # float32 rounding
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * ema.weight.detach() + 0.1 * model.weight.detach()
    train_tokenizer.update_ema(ema, model, 0.9)
    close(ema.weight.detach(), expected, 1e-6)


def test_unused_codebook_rows_are_reseeded():
    use = train_tokenizer.CodebookUse(4)
    for _ in range(3):
        use.update(torch.tensor([[0, 1]]))
    assert use.age.tolist() == [0, 0, 3, 3] and use.share(2) == 0.5
    first, second = torch.zeros(4, 8), torch.ones(4, 8)
    z = torch.randn(2, 3, 8)
    use.reseed(3, z, torch.Generator().manual_seed(0), first, second)
    assert first[:2].abs().max() == 0 and (second[:2] == 1).all()
    distances = torch.cdist(first[2:], F.normalize(z.flatten(0, 1), dim=-1))
    assert distances.min(1).values.max() < 1e-3  # cdist's own rounding
    assert torch.equal(first[2:], second[2:]) and use.age.tolist() == [0, 0, 0, 0]
    assert use.share(2) == 0.5  # a re-seeded row is not a used one


def test_the_autoregressive_model_sees_the_same_tokens_on_any_number_of_processes():
    codes = np.arange(30 * (1 + 10 * 4), dtype=np.uint16).reshape(30, -1)
    for step in (0, 5):
        seen = []
        for world, accumulate in ((1, 1), (1, 4), (2, 1), (2, 2)):
            config = train_ar.TrainConfig(batch=8, steps=step + 1, accumulate=accumulate)
            parts = [part for rank in range(world)
                     for part in train_ar.stored_tokens(codes, config, step, rank, world)]
            seen.append([torch.cat(part).tolist() for part in zip(*parts)])
        assert all(one == seen[0] for one in seen) and len(seen[0][1]) == 8
        for place, (label, tokens) in enumerate(zip(*seen[0]), 8 * step):
            row = codes[train_tokenizer.Shuffle(30, 0)[place]].tolist()
            assert label == row[0] and tokens in [row[i:i + 4] for i in range(1, 41, 4)]


# ---- Runs of the trainers ------------------------------------------------------------------------

@functools.cache
def kept() -> str:
    """A folder for what several tests read, removed at the end."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def photographs() -> str:
    """A data set of 100 images for training, one of which cannot be read, and 6 held out."""
    make_folder(join(kept(), "data", "train"), 50)
    make_folder(join(kept(), "data", "val"), 3)
    Path(kept(), "data", "train", "a_dog", "020.jpg").write_text("no image")
    return join(kept(), "data")


def options(name: str) -> list[str]:
    """The command line of a tiny run, but for --out."""
    if name == "tokenizer":
        return TINY_TOKENIZER
    return TINY_AR + ["--data", photographs(), "--codes", join(kept(), "codes"),
                      "--tokenizer", join(trained("tokenizer"), "last.pt")]


def train(name: str, out: str, *more: str) -> str:
    """Runs a trainer in this process; returns what it printed."""
    return quietly(TRAINERS[name].main, [*options(name), "--out", str(out), *more])


@functools.cache
def trained(name: str) -> str:
    """The folder of a tiny run that nothing interrupted."""
    out = join(kept(), name)
    said = train(name, out)
    Path(out, "said.txt").write_text(said)
    return out


def weights_of(folder: str, part: str = "model") -> torch.Tensor:
    """All weights of the checkpoint in a folder as one vector."""
    saved = torch.load(join(folder, "last.pt"), weights_only=True)
    return torch.cat([value.flatten() for value in saved[part].values()])


def log_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def goes_on_exactly(name: str, out: str, first_step: int = 2) -> str:
    """Runs a trainer in a folder where a run was interrupted, and asserts that it ends as the one
    that was not, bit for bit; returns what it printed."""
    with open(join(out, "log.jsonl"), "a") as log:  # a later step, no records, half a line
        log.write('{"step": 9}\nnull\n[]\n{"st')
    said = train(name, out)
    assert f"step {first_step} of 4" in said, said
    for part in ("model", "ema"):
        assert torch.equal(weights_of(out, part), weights_of(trained(name), part)), part
    steps = [[line["step"] for line in log_of(folder)] for folder in (out, trained(name))]
    assert steps[0] == steps[1]
    return said


def stick(name: str, *argv: str):
    """In a process of its own: trains until the second checkpoint is half written."""
    real, calls = torch.save, []

    def half(checkpoint, file):
        calls.append(None)
        if len(calls) == 2:
            file.write(b"half of it")
            file.flush()
            print("stuck", flush=True)
            time.sleep(600)
        real(checkpoint, file)
    with patched(torch, "save", half):
        TRAINERS[name].main([*argv])


def test_a_killed_run_kept_others_out_and_goes_on_exactly(tmp_path):
    outs = {name: str(tmp_path / name) for name in TRAINERS if trained(name)}
    running = {name: start("stick", name, *options(name), "--out", out)
               for name, out in outs.items()}
    try:
        for name, process in running.items():
            said = [*iter(process.stdout.readline, "stuck\n")]
            assert process.poll() is None, said
            raises(Mistake, f"another run is at work in {outs[name]}", train, name, outs[name])
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    for name, out in outs.items():
        goes_on_exactly(name, out)


def test_a_signal_saves_and_leaves_and_the_run_goes_on_exactly(tmp_path):
    for name, number in (("tokenizer", signal.SIGTERM), ("ar", signal.SIGINT)):
        real, before = train_tokenizer.update_ema, signal.getsignal(number)

        def interrupting(*args):
            real(*args)
            os.kill(os.getpid(), number)
        out = str(tmp_path / name)
        with patched(TRAINERS[name], "update_ema", interrupting):
            said = quietly(raises, SystemExit, str(128 + number), TRAINERS[name].main,
                           [*options(name), "--out", out])
        assert f"{number.name}: saved after step 1; the same command" in said
        assert signal.getsignal(number) == before
        goes_on_exactly(name, out, first_step=1)


def change(path: str, function):
    """Changes what is in a checkpoint."""
    saved = torch.load(path, weights_only=True)
    function(saved)
    torch.save(saved, path)


def flip(path: str):
    content = bytearray(Path(path).read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 64)
    content[middle] = bytes(255 - byte for byte in content[middle])
    Path(path).write_bytes(content)


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_gone_on_from(tmp_path):
    def not_finite(saved):
        next(iter(saved["model"].values())).view(-1)[0] = math.nan

    for i, (name, harm) in enumerate((
            ("tokenizer", flip),
            ("tokenizer", lambda path: os.truncate(path, os.path.getsize(path) // 2)),
            ("ar", lambda path: change(path, not_finite)),
            ("tokenizer", lambda path: change(path, lambda saved: saved.pop("use"))),
            ("tokenizer", lambda path: change(path, lambda saved: saved["optimizer"].clear())),
            ("ar", lambda path: change(path, lambda saved: saved.update(step=10 ** 30))),
            ("tokenizer", lambda path: change(path, lambda saved: saved["optimizer"]["state"][3][
                "exp_avg_sq"].sub_(1))),
            ("ar", os.remove))):  # as if killed between two renamings
        out = str(shutil.copytree(trained(name), tmp_path / str(i)))
        last = join(out, "last.pt")
        harm(last)
        damaged = Path(last).read_bytes() if os.path.exists(last) else None
        said = goes_on_exactly(name, out)
        if damaged:
            assert f"going on from {last}.previous" in said
            assert Path(last + ".damaged").read_bytes() == damaged
        sample.read_file(last + ".previous")  # which the damaged one did not replace
    for path in (last, last + ".previous"):
        flip(path)
    raises(Mistake, "is no readable checkpoint", train, "ar", out)
    for name, other in (("ar", "tokenizer"), ("tokenizer", "ar")):  # --out of the other trainer
        out = str(shutil.copytree(trained(other), tmp_path / name))
        before = sorted(os.listdir(out))
        raises(Mistake, f"is not a checkpoint of kind '{name}'", train, name, out)
        assert {*os.listdir(out)} == {*before, "lock"}


def test_other_settings_are_refused_or_said_when_a_run_goes_on(tmp_path):
    other = str(tmp_path / "other.pt")
    shutil.copy(join(trained("tokenizer"), "last.pt"), other)
    change(other, lambda saved: saved["ema"]["quantizer.codebook"].add_(1))
    for name, flags, text in (
            ("tokenizer", ["--seed", "1"], "--seed 1 (was 0)"),
            ("tokenizer", ["--batch", "8"], "--batch 8 (was 4)"),
            ("tokenizer", ["--data", photographs()], f"--data {photographs()} (was shapes)"),
            ("ar", ["--seed", "1"], "--seed 1 (was 0)"),
            ("ar", ["--tokenizer", other], "another --tokenizer")):
        raises(Mistake, f"was saved with other settings: {text}", train, name, trained(name),
               *flags)
        said = train(name, trained(name), *flags, "--changed")
        assert f"going on with other settings: {text}" in said and "step 4 of 4" in said
    said = train("tokenizer", trained("tokenizer"), "--lr", "0.5", "--log-every", "7")
    assert "going on with other settings: --lr 0.5 (was 0.002)\n" in said
    raises(Mistake, "another architecture; give --out", train, "tokenizer", trained("tokenizer"),
           "--beta", "4")


def test_a_full_disk_is_named_and_leaves_the_checkpoint_whole(tmp_path):
    if not os.path.exists("/dev/full"):
        raise unittest.SkipTest("no /dev/full")
    out, real = shutil.copytree(trained("tokenizer"), tmp_path / "run"), train_tokenizer.save
    before = weights_of(out)

    def save_to_full_disk(*args, **more):
        os.symlink("/dev/full", out / "last.pt.new.tmp")
        real(*args, **more)
    with patched(train_tokenizer, "save", save_to_full_disk):
        raises(Mistake, f"nothing was saved at step 6: {out}/last.pt.new: the disk is full; "
               f"{out}/last.pt is from before, and whole", train, "tokenizer", out, "--steps", "6")
    assert torch.equal(weights_of(out), before) and not [*out.glob("*.tmp")]
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4


def test_a_number_that_is_not_finite_stops_the_run_by_name(tmp_path):
    real, calls = Tokenizer.forward, []

    def broken(self, *args):
        output = real(self, *args)
        calls.append(torch.is_grad_enabled() and len(args[0]) == 4)
        return output._replace(vq_loss=output.vq_loss * math.nan) if sum(calls) == 3 else output
    with patched(Tokenizer, "forward", broken):
        raises(Mistake, "vq is not finite at step 2 in process 0; stopped", train, "tokenizer",
               tmp_path, "--log-every", "100")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    assert weights_of(tmp_path).isfinite().all()


def test_unreadable_images_are_skipped_and_listed_by_both_trainers(tmp_path):
    bad, data = join(photographs(), "train", "a_dog", "020.jpg"), tmp_path / "data"
    out = str(tmp_path / "tokenizer")
    said = train("tokenizer", out, "--data", photographs(), "--batch", "32")  # an epoch and more
    for said, out in ((said, out), (Path(trained("ar"), "said.txt").read_text(), trained("ar"))):
        assert said.count(f"skipped 1: {bad} cannot be read") == 1 and "step 4" in said
        assert bad in Path(out, "unreadable.txt").read_text()
    source = train_tokenizer.Folder(join(photographs(), "train"), 24)
    number, = [i for i in range(100) if source.path(i) == bad]
    image, label, lines = train_tokenizer.read_or_another(source, number)
    assert image.mode == "RGB" and bad in lines
    assert label == train_tokenizer.read_or_another(source, number)[1]  # always the same one
    shutil.copytree(photographs(), data)
    (data / "train" / "b_cat" / "000.jpg").write_text("no image")
    for name, more in (("tokenizer", []), ("ar", ["--codes", str(tmp_path / "codes")])):
        raises(Mistake, "more than 1 % of the images cannot be read", train, name,
               tmp_path / "new" / name, "--data", str(data), "--batch", "32", *more)


def die(*argv: str):
    """In processes of their own: trains; the second process dies after two steps."""
    real, calls = train_tokenizer.update_ema, []

    def dying(*args):
        real(*args)
        calls.append(None)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            os._exit(7)
    with patched(train_tokenizer, "update_ema", dying):
        train_tokenizer.main([*argv])


def test_a_process_that_dies_ends_the_others(tmp_path):
    running = start("die", *TINY_TOKENIZER, "--steps", "1000", "--out", str(tmp_path), processes=2)
    said, _ = running.communicate(timeout=120)
    assert running.returncode != 0
    assert "exitcode  : 7" in said and "rank      : 1" in said, said


def run_in_turn(commands: str):
    """In processes of their own: the programs of some command lines, all with one start."""
    joined = sample.join_processes()
    dist.destroy_process_group = lambda: None
    for name, argv in json.loads(commands):
        program = {**TRAINERS, "sample": sample}[name]
        program.join_processes = lambda: joined
        program.main(argv)


STEADY = "--lr 1e-3 --warmup-steps 1 --ema 0".split()
STEADY = {"tokenizer": STEADY + ["--reseed-after", "0"],
          "ar": STEADY + ["--dropout", "0", "--views", "10"]}
SAMPLES = "--cfg 1.1:3 --batch 7 --num-images 20".split()


@functools.cache
def two_processes() -> tuple[str, str]:
    """What two processes make that are started once: a folder with runs of both trainers, samples,
    and a long run that SIGTERM ended; and what they printed."""
    root = join(kept(), "two")
    commands = [[name, [*options(name), *STEADY[name], "--out", join(root, name)]]
                for name in TRAINERS]
    commands += [["sample", ["--ckpt", small_checkpoint(), *SAMPLES, "--npz",
                             join(root, "samples.npz")]],
                 ["tokenizer", [*TINY_TOKENIZER, "--steps", "10000", "--workers", "1",
                                "--save-every", "10000", "--eval-every", "10000", "--out",
                                join(root, "long")]]]
    running = start("run_in_turn", json.dumps(commands), processes=2)
    while running.poll() is None and not os.path.exists(join(root, "long", "log.jsonl")):
        time.sleep(0.1)
    running.terminate()  # torchrun, which passes it on
    said, _ = running.communicate(timeout=60)
    return root, said


def test_two_processes_and_two_passes_take_the_steps_of_one_and_save_at_a_signal(tmp_path):
    """Sums of gradients differ by rounding, which Adam magnifies where gradients are near zero: so
    the weights must agree to a twentieth of the way they went."""
    root, said = two_processes()
    for name, model, config in (("tokenizer", Tokenizer, TokenizerConfig), ("ar", AR, ARConfig)):
        one, passes = (str(tmp_path / name / part) for part in ("one", "passes"))
        train(name, one, *STEADY[name])
        train(name, passes, *STEADY[name], "--accumulate", "2")
        torch.manual_seed(0)
        begun = model(config(**torch.load(join(one, "last.pt"), weights_only=True)["config"]))
        begun = torch.cat([value.flatten() for value in begun.state_dict().values()])
        way = (weights_of(one) - begun).norm()
        for folder in (passes, join(root, name)):
            assert os.path.exists(join(folder, "last.pt")), said
            assert (weights_of(folder) - weights_of(one)).norm() < 0.05 * way, folder
    assert os.path.exists(join(root, "long", "last.pt")), said
    step = torch.load(join(root, "long", "last.pt"), weights_only=True)["step"]
    assert f"SIGTERM: saved after step {step}" in said, said


def test_new_runs_start_from_the_weights_of_others(tmp_path):
    still = ["--lr", "0", "--lr-final", "0", "--init-from"]
    tokenizer, ar = (join(trained(name), "last.pt") for name in TRAINERS)
    train("tokenizer", tmp_path / "tokenizer", *still, tokenizer, "--reseed-after", "0")
    assert torch.equal(weights_of(tmp_path / "tokenizer"), weights_of(trained("tokenizer"), "ema"))
    raises(Mistake, "has another architecture", train, "tokenizer", tmp_path / "other", *still,
           tokenizer, "--codebook-size", "64")
    data = make_folder(tmp_path / "data", 3)  # three classes where there were two
    shutil.copytree(join(data, "a_dog"), join(data, "c_bird"))
    train("ar", tmp_path / "ar", *still, ar, "--data", data, "--preset", "toy")
    tuned, begun = load_ar(str(tmp_path / "ar" / "last.pt")), load_ar(ar)
    assert torch.equal(tuned.head.weight, begun.head.weight)
    assert len(tuned.class_embedding.weight) == 4 and len(begun.class_embedding.weight) == 3


def test_held_out_numbers_are_logged():
    lines, said = log_of(trained("tokenizer")), Path(trained("tokenizer"), "said.txt").read_text()
    assert {"flow", "vq", "codebook", "memory_gb", "images_per_s"} <= set(lines[0])
    assert {"reconstructions_000004.png", "log.jsonl"} <= {*os.listdir(trained("tokenizer"))}
    assert "lpips" not in {*lines[0]} | {*sys.modules} and "psnr" in said  # its weight is 0
    model, images = small_tokenizer(), pictures(3)
    numbers, picture = train_tokenizer.evaluate(model, images, 0)
    assert {*numbers} == {*lines[-1]} - {"step"} and len(numbers["flow_by_group"]) == 4
    noise = torch.randn(images.shape, generator=sample.seeded(0, Purpose.EVALUATION))
    with torch.no_grad():
        expected = model(images, torch.full((3,), 0.5), noise)
    close(torch.tensor(numbers["flow_by_group"][2]), expected.flow_loss, 1e-5)  # float32 rounding
    close(torch.tensor(numbers["vq_by_group"][2]), expected.vq_loss, 1e-5)
    tokens = model.encode(images)
    rows = [len(set(tokens[:, i].tolist())) for i in range(16)]
    assert numbers["rows_by_position"] == rows
    labels, model = torch.tensor([0, 3, 4]), small_ar()
    found = train_ar.evaluate(model, labels, tokens)
    assert {*found} == {*log_of(trained("ar"))[-1]} - {"step"}
    logs = model(labels, tokens).log_softmax(-1).gather(2, tokens[..., None])
    assert abs(found["val_loss"] + logs.mean().item()) < 1e-5  # float32 rounding


def fill(array: sample.LongArray, batches: int):
    for numbers in array.todo[:batches]:
        quietly(array.fill, numbers, np.array([[i, i + 1] for i in numbers], np.uint16))
    if batches < len(array.todo):
        raises(Mistake, "lost rows; the same command makes them again", array.close)
    else:
        array.close()


def test_a_long_array_is_made_anew_where_its_rows_or_records_are_damaged(tmp_path):
    def opened(**settings):
        return sample.LongArray(str(tmp_path / "x.npy"), (18, 2), np.uint16, 4,
                                {"seed": 0, **settings})
    expected = np.arange(18)[:, None] + [0, 1]
    fill(opened(), 4)
    record, rows = (Path(opened().folder, name) for name in ("done.0", "rows.npy"))
    assert opened().todo == [range(16, 18)]
    whole = record.read_bytes()
    for junk, todo in ((whole + b"4 12", [16]), (whole + b"4 12\n-1 x\n\xff\0\n99 5\n", [16]),
                       (b"0 1" + whole, [0, 16]), (b"", [0, 4, 8, 12, 16])):
        record.write_bytes(junk)
        assert [numbers[0] for numbers in opened().todo] == todo, junk
    record.write_bytes(whole + b"4 1")
    np.lib.format.open_memmap(rows, "r+")[5] = 77
    array = opened()
    assert array.todo == [range(4, 8), range(16, 18)]
    fill(array, 5)
    assert np.array_equal(array.rows, expected) and not opened().todo
    raises(Mistake, "was begun with other settings (seed); go on with the same", opened, seed=1)
    for junk in (b"[]", b"{", b"\xff"):
        Path(array.folder, "settings.json").write_bytes(junk)
        raises(Mistake, f"{array.folder} is damaged; remove it", opened)


def test_codes_go_on_where_they_were_killed(tmp_path):
    real, calls = Tokenizer.encode, []

    def encode(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, images)
    tokenizer, views = small_tokenizer(), train_ar.Views(train_tokenizer.Shapes(0, 40, 32), 32, 10)
    given = (train_ar.TrainConfig(codes=str(tmp_path), views=10, workers=0), tokenizer, "", views,
             train_tokenizer.Unreadable(str(tmp_path), 40))
    with patched(Tokenizer, "encode", encode):
        with contextlib.suppress(KeyboardInterrupt):
            quietly(train_ar.read_codes, *given)
        for _ in range(2):  # the second time, there is nothing left to do
            quietly(train_ar.read_codes, *given)
    assert calls == [120, 120, 120, 120, 40]  # views of 12 images; the third batch was lost
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]
    path, = tmp_path.glob("*.npy")
    codes = np.load(path)
    for i in (0, 5, 39):
        assert codes[i].tolist() == [i % 10, *tokenizer.encode(views[i][0]).flatten().tolist()]
    codes[17, 5] = 64  # no row of the codebook
    for harm in (lambda: np.save(path, codes), lambda: os.truncate(path, 1000)):
        harm()
        raises(Mistake, f"{path} is damaged; remove it", train_ar.read_codes, *given)


# ---- Sampling ------------------------------------------------------------------------------------

@functools.cache
def small_checkpoint() -> str:
    """A checkpoint of the two small models in random weights."""
    path = join(kept(), "ar.pt")
    sample.save_checkpoint(path, {**sample.pack("ar", small_ar()), "classes": list("abcde"),
                                  "tokenizer": sample.pack("tokenizer", small_tokenizer()),
                                  "settings": {"cfg_start": 1.1, "cfg_end": 3.0}})
    return path


def draw(*flags) -> str:
    return quietly(sample.main, ["--ckpt", small_checkpoint(), *map(str, flags)])


def samples_in(path) -> np.ndarray:
    return np.load(path)["arr_0"]


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of uint8 pixels."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return int(np.abs(a.astype(int) - b).max())


def uniforms(count: int, seed=0, numbers=(0, 1)) -> torch.Tensor:
    """The random numbers that decide on the tokens of samples."""
    return torch.stack([torch.rand(count, generator=sample.seeded(seed, Purpose.TOKENS, number))
                        for number in numbers])


def test_images_depend_on_seed_and_number_not_on_batches_or_processes(tmp_path):
    def npz(name: str, *flags) -> np.ndarray:
        draw("--cfg", "1.1:3", "--num", 20, *flags, "--npz", tmp_path / name)
        return samples_in(tmp_path / name)
    whole = npz("20.npz")
    # Products of another number of rows are rounded otherwise, so pixels may differ by a level.
    for batch in (1, 7):
        assert levels_apart(npz(f"{batch}.npz", "--batch", batch), whole) <= 1
    root, said = two_processes()
    assert os.path.exists(join(root, "samples.npz")), said
    assert levels_apart(samples_in(join(root, "samples.npz")), whole) <= 1
    assert levels_apart(npz("other.npz", "--seed", 1), whole) > 50
    draw("--num", 20, "--png", tmp_path / "png")  # with the checkpoint's guidance, the same
    paths = sorted((tmp_path / "png").iterdir())
    assert np.array_equal(np.stack([np.array(Image.open(path)) for path in paths]), whole)
    draw("--num", 20, "--cfg", "1.1:3,none", "--npz", tmp_path / "many.npz")
    assert np.array_equal(samples_in(tmp_path / "many_1.1-3.npz"), whole)
    assert levels_apart(samples_in(tmp_path / "many_none.npz"), whole) > 50
    left = {path.name for path in [*tmp_path.iterdir(), *Path(root).iterdir()]}
    assert not [name for name in left if name.endswith((".part", ".tmp"))]


def test_interrupted_sampling_goes_on_and_ends_as_the_whole(tmp_path):
    flags, real, calls = ["--num", 12, "--batch", 3, "--npz"], sample.to_uint8, []
    whole, halves = tmp_path / "whole.npz", tmp_path / "halves.npz"
    draw(*flags, whole)

    def failing(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(images)
    with patched(sample, "to_uint8", failing):
        with contextlib.suppress(KeyboardInterrupt):
            draw(*flags, halves)
        raises(Mistake, "begun with other settings (seed)", draw, "--seed", 3, *flags, halves)
        assert not halves.exists()
        draw(*flags, halves)
    assert len(calls) == 3 + 2  # two batches were kept, the third was lost
    assert np.array_equal(samples_in(whole), samples_in(halves))
    raises(Mistake, "is there already", draw, *flags, halves)


def test_each_class_is_drawn_equally_often_and_in_another_order(tmp_path):
    asked = []

    def noting(self, numbers, labels, prefix=None):
        asked.extend(labels)
        return iter([some_tokens(len(labels))])
    with patched(sample.Pipeline, "token_groups", noting):
        draw("--num", 200, "--npz", tmp_path / "s.npz")
    assert all(sorted(asked[i:i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 200, 5))
    assert len({tuple(asked[i:i + 5]) for i in range(0, 200, 5)}) > 10


def test_streamed_samples_end_as_those_drawn_at_once(tmp_path):
    flags = "--num", 4, "--labels", "b,d", "--out"
    draw("--stream", *flags, tmp_path / "s.png")
    names = [f"s_{count:03d}.png" for count in (4, 8, 12, 16)] + ["s.gif", "s.png", "s_steps.png"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert Image.open(tmp_path / "s.gif").n_frames == 4
    assert Image.open(tmp_path / "s_steps.png").size == (4 * 64 + 6, 4 * 64 + 6)
    draw(*flags, tmp_path / "grid.png")
    streamed, drawn = (np.array(Image.open(tmp_path / name)) for name in ("s.png", "grid.png"))
    assert streamed.shape == (64, 4 * 64 + 6, 3) and drawn.shape == (2 * 64 + 2, 2 * 64 + 2, 3)
    for i in range(4):
        top, left = i // 2 * 66, i % 2 * 66
        assert levels_apart(drawn[top:top + 64, left:left + 64],  # rounded in another order
                            streamed[:, i * 66:i * 66 + 64]) <= 1


def test_first_tokens_only_are_drawn_and_decoded(tmp_path):
    real, drawn = model_ar.Sampler.advance, []

    def counting(self, x, pos, *rest):
        drawn.append(pos)
        return real(self, x, pos, *rest)
    with patched(model_ar.Sampler, "advance", counting):
        draw("--num", 2, "--tokens", 8, "--npz", tmp_path / "s.npz")
    assert len(drawn) == 8
    labels = np.random.default_rng((0, Purpose.LABELS, 0)).permutation(5)[:2]
    tokens = small_ar().generate(torch.tensor(labels), (1.1, 3.0), uniforms=uniforms(16))
    noise = sample.noise_of(0, Purpose.START, [0, 1], (3, 32, 32), "cpu")
    expected = sample.to_uint8(small_tokenizer().decode(tokens, noise, groups=2))
    assert levels_apart(samples_in(tmp_path / "s.npz"), expected) <= 1  # rounding


def test_layouts_keep_the_first_tokens_of_the_reference(tmp_path):
    path, image = tmp_path / "image.png", sample.image_grid(pictures(1), 1)
    image.save(path)
    draw("--prefix", path, "--keep", "0,5,16", "--labels", "a,c", "--out", tmp_path / "s.png")
    grid = sample.to_tensor(Image.open(tmp_path / "s.png"))
    cells = [[grid[:, 66 * row:66 * row + 64:2, 66 * column:66 * column + 64:2]
              for column in range(3)] for row in range(3)]
    reference, tokenizer = sample.to_tensor(sample.center_crop(image, 32)), small_tokenizer()
    tokens = tokenizer.encode(reference[None]).expand(2, -1)
    noise = sample.noise_of(0, Purpose.START, [0, 1], (3, 32, 32), "cpu")
    for row, count in enumerate((0, 5, 16)):
        drawn = small_ar().generate(torch.tensor([0, 2]), (1.1, 3.0), tokens[:, :count],
                                    uniforms=uniforms(16))
        assert torch.equal(drawn[:, :count], tokens[:, :count])
        expected = tokenizer.decode(drawn, noise).clamp(-1, 1)
        close(cells[row][0], reference, 0.01)                                # a level of 255
        close(torch.stack(cells[row][1:]), expected, 0.02)                   # two levels


def test_reconstructions_come_with_the_same_crops_and_psnr(tmp_path):
    folder = make_folder(tmp_path / "images", 5)
    said = draw("--reconstruct", folder, "--batch", 4, "--out", tmp_path / "r.png")
    originals, decoded = (samples_in(tmp_path / f"r_{name}.npz")
                          for name in ("originals", "reconstructions"))
    paths = sample.find_images(folder)
    assert originals.shape == decoded.shape == (10, 32, 32, 3) and len(paths) == 10
    for path, original in zip(paths, originals):
        assert np.array_equal(sample.center_crop(Image.open(path), 32), original)
    error = ((originals / 255.0 - decoded / 255.0) ** 2).mean((1, 2, 3))
    assert f"PSNR {np.mean(-10 * np.log10(error)):.2f} dB over 10 images" in said
    Path(paths[3]).write_text("no image")
    raises(Mistake, f"{paths[3]} cannot be read", draw, "--reconstruct", folder, "--out",
           tmp_path / "other.png")
    assert not [*tmp_path.glob("other*")]


def test_a_trained_checkpoint_samples_the_same_picture_twice_and_a_benchmark_prints_rates(tmp_path):
    checkpoint, grids = join(trained("ar"), "last.pt"), []
    for flags in (["--cfg", "1.1:3"], ["--cfg", "2", "--labels", "a_dog,1,0"], ["--cfg", "1.1:3"]):
        draw("--ckpt", checkpoint, "--num", 4, "--out", tmp_path / "grid.png", *flags)
        grids.append(Image.open(tmp_path / "grid.png").copy())
    assert grids[0].size == (2 * 48 + 2, 2 * 48 + 2) and grids[1].size == (3 * 48 + 4, 2 * 48 + 2)
    assert grids[0].tobytes() == grids[2].tobytes()
    with patched(sample, "seconds_of", lambda call, *rest: (call(), 0.5)[1]):
        said = draw("--benchmark", "--batch", 2)
        assert "AR: 64.0 tokens/s, 4 images/s" in said and "together: 2 images/s" in said
        said = quietly(sample.main, ["--benchmark", "--size", "toy", "--batch", "2"])
        assert "guidance off" in said and "peak memory" in said


# ---- Losses of other networks --------------------------------------------------------------------

@contextlib.contextmanager
def offline(cache):
    """No network, and torch.hub's cache in another folder."""
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")
    with patched(torch.hub, "urlopen", refuse), patched(torch.hub, "_hub_dir", str(cache)), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, on the way lpips calls it
        yield


def test_perceptual_and_alignment_losses_name_the_files_they_need_and_run_on_them(tmp_path):
    """Random weights of the real shapes, where torch.hub keeps the real ones."""
    import torchvision
    with offline(tmp_path):
        raises(Mistake, "--repa 0 trains without", train_tokenizer.RepaLoss)
        raises(Mistake, "--lpips 0 trains without", train_tokenizer.PerceptualLoss)
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).state_dict()
    weights = {name: torch.randn(value.shape) / max(1, value[0].numel()) ** 0.5
               if name.startswith("features") else torch.zeros(1).expand(value.shape)
               for name, value in shapes.items()}
    for folder in ("checkpoints", "facebookresearch_dinov2_main"):
        os.makedirs(tmp_path / folder, exist_ok=True)
    torch.save(weights, tmp_path / "checkpoints" / "vgg16-397923af.pth")
    (tmp_path / "facebookresearch_dinov2_main" / "hubconf.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.patch = torch.nn.Conv2d(3, 768, 14, 14)\n"
        "    def forward_features(self, x):\n"
        "        return {'x_norm_patchtokens': self.patch(x).flatten(2).mT}\n"
        "def dinov2_vitb14(**kwargs):\n"
        "    return Net()\n")
    with offline(tmp_path):
        lpips, repa = train_tokenizer.PerceptualLoss(), train_tokenizer.RepaLoss()
        train("tokenizer", tmp_path / "out", "--diffusion-depth", "2", "--repa-depth", "1",
              "--lpips", "0.5", "--repa", "0.5", "--steps", "1")
        assert {"lpips", "repa"} <= {*log_of(tmp_path / "out")[0]}
    images, other = pictures(2, 64), pictures(4, 64)[2:].requires_grad_()
    assert not lpips.net.training and not any(p.requires_grad for p in lpips.parameters())
    assert lpips(images, images) == 0
    distance = lpips(other, images)
    assert distance > 0 and torch.autograd.grad(distance, other)[0].abs().max() > 0

    normal = (images / 2 + 0.5 - repa.mean) / repa.std
    small = F.interpolate(normal, size=(56, 56), mode="bicubic")
    features = repa.net.forward_features(small)["x_norm_patchtokens"]        # (2, 16, 768)
    # Float32 rounding of a cosine.
    assert abs(repa(features, images)) < 1e-5 and abs(repa(-features, images) - 2) < 1e-5


# ---- The authors' released files -----------------------------------------------------------------

def fixture(name: str):
    """A file of outputs of the released code: of a .pt its path, else what is in it, arrays as
    tensors. Skips the test where there is none."""
    path = join(FIXTURES, name)
    if not os.path.exists(path):
        raise unittest.SkipTest("no fixtures")
    if name.endswith(".npz"):
        return {key: torch.from_numpy(value) if value.dtype.kind in "fi" else value
                for key, value in np.load(path, allow_pickle=False).items()}
    return json.loads(Path(path).read_text()) if name.endswith(".json") else path


def released(kind: str):
    """The path of a file laid out as the authors'."""
    return fixture(f"released_style_{kind}.pt")


def test_released_tokenizer_encodes_and_decodes_as_the_authors_code():
    """Float32 rounding of numbers up to 10: 3e-5."""
    model, io = load_tokenizer(released("tok")), fixture("tokA_io.npz")
    codes, noise = io["codes"], io["x0_noise"]
    assert torch.equal(model.encode(io["x"]), codes)
    begin = int(io["core_begin"])
    with torch.no_grad():
        close(model.encoder(io["x"]), io["z_prequant"], 3e-5)
        close(model.condition(codes), io["cond"], 3e-5)
        output = model.diffusion(noise, io["core_t"], io["cond"][:, begin:begin + 32])
    close(output.velocity, io["core_velocity"], 3e-5)
    close(model.decode(codes, noise), io["sample_adams2_full"], 3e-5)
    close(list(model.stream(codes.split(32, 1), noise))[-1], io["sample_adams2_full"], 3e-5)
    codes, noise = codes[:1], noise[:1]
    close(model.decode(codes, noise, solver="euler"), io["sample_euler_full"], 3e-5)
    close(model.decode(codes, noise, groups=1, solver="euler"), io["sample_euler_clip1"], 3e-5)
    for solver in ("adams2", "euler"):
        decoded = model.decode(codes, noise, groups=4, solver=solver)
        close(decoded, io[f"sample_{solver}_clip"], 3e-5)


def test_released_training_rule_gives_the_authors_losses_and_gradients():
    """Tolerances are of float32 rounding; norms of gradients sum more of it."""
    model, io = load_tokenizer(released("tok")), fixture("tokA_io.npz")
    for i, u in enumerate(io["train_u"]):
        output = model(io["x"], u, io["train_noise"])
        assert (mt.group_of(u, 8) * 32).tolist() == io["train_query_begin"][i].tolist()
        close(mt.shift_time(u, 2.0), io["train_t_shift"][i], 1e-6)
        close(output.flow_loss.detach(), io["train_fm_loss"][i], 1e-5)
        close(output.vq_loss.detach(), io["train_vq_loss"][i] + io["train_commit_loss"][i], 1e-6)
        if i == 0:
            t = mt.shift_time(u, 2.0)
            xt = mt.interpolate(0.6 * io["x"], io["train_noise"], t)
            close(xt[:, :, ::5, ::3], io["train_xt_sub"], 1e-6)
            close(output.predicted.detach(), io["train_fake"], 3e-5)
            (output.flow_loss + output.vq_loss).backward()
    shapes = sample.read_file(released("tok"))["ema"]
    norms = {str(name): torch.full_like(shapes[str(name)], norm, dtype=torch.float32)
             for name, norm in zip(io["grad_names"], io["grad_norms"].tolist())}
    gradients, compared = {name: p.grad for name, p in model.named_parameters()}, 0
    for name, norm in sample.translate(norms, "gradients")["model"].items():
        norm = norm.flatten()[0]
        if norm > 1e-6:  # biases of normalised keys have none but rounding
            assert abs(gradients[name].norm() / norm - 1) < 1e-4, name
            compared += 1
    assert compared > 150


def test_released_ar_model_predicts_and_generates_as_the_authors_code():
    """Logits differ by float32 rounding, which guidance of 8 magnifies: 5e-4, and 2e-3."""
    model, io = load_ar(released("ar")), fixture("arA_io.npz")
    with torch.no_grad():
        close(model(io["tf_labels"], io["tf_tokens"]), io["tf_logits"], 5e-4)
    for key, cfg in (("cfg1", None), ("cfg1.5", (1.5, 1.5)), ("cfg1.1_8", (1.1, 8.0))):
        tokens = model.generate(io["gen_labels"], cfg, temperature=0.0)
        assert torch.equal(tokens, io[f"gen_{key}_tokens"]), key
        with torch.no_grad():
            logits = model(io["gen_labels"], tokens)
            if cfg is not None:
                free = model(torch.full_like(io["gen_labels"], 10), tokens)
                scale = io[f"gen_{key}_scale"][:, None]
                close(scale[:, 0], torch.linspace(*cfg, 256), 1e-6)
                logits = free + scale * (logits - free)
        close(logits, io[f"gen_{key}_logits"], 2e-3 if key == "cfg1.1_8" else 5e-4)


def test_small_pieces_agree_with_the_authors_code():
    io = fixture("unit.npz")
    rope = mt.rope_2d(3, 5, 64, CPU)
    close(mt.rotate(io["rope2d_q_in"], rope), io["rope2d_q_out"], 1e-5)  # rounding, here and below
    rope = model_ar.rope_1d(12, 64, 10000.0, CPU)
    turned = model_ar.rotate(io["rope1d_in"].transpose(1, 2), rope).transpose(1, 2)
    close(turned, io["rope1d_out"], 1e-5)
    for width in (128, 768):
        close(mt.sinusoid(io["sinus_t"], width), io[f"sinus_{width}"], 1e-4)  # angles up to 1000
    for beta in ("1", "1.5", "2", "4"):
        close(mt.shift_time(io["shift_in"], float(beta)), io[f"shift_{beta}"], 1e-6)
    for groups, size in ((8, 32), (4, 64), (16, 16), (1, 256)):
        begins = mt.group_of(io["u_grid"], groups) * size
        assert torch.equal(begins, io[f"train_begin_G{groups}_Q256_n{size}"])
    for steps, groups in ((8, 8), (4, 8), (12, 8), (16, 8), (4, 4)):
        begins = [step.group * 256 // groups
                  for step in mt.sampling_schedule(steps, groups, 2.0, groups)]
        assert begins == io[f"sample_begin_K{steps}_G{groups}_Q256_n{256 // groups}"].tolist()
    for width, hidden in io["ffn_hidden_dims"].tolist():
        assert model_ar.SwiGLU(replace(SMALL_AR, width=width, heads=1)).up.out_features == hidden
    for key, top_k, top_p in (("k5", 5, 1.0), ("p0.8", 0, 0.8), ("k10_p0.6", 10, 0.6)):
        found = model_ar.filter_logits(io["filter_in"], top_k, top_p)
        assert torch.equal(found, io[f"filter_{key}"])


def test_every_released_tensor_finds_its_place():
    layout = fixture("released_checkpoint_layout.json")
    # Without memory, no tensor can be looked at for numbers that are not finite.
    with torch.device("meta"), patched(sample, "check_weights", lambda *_: None):
        for name, entry in layout.items():
            weights = {key: torch.empty(shape) for key, shape in entry["state_dict"].items()}
            saved = sample.translate({"ema": weights}, name)
            kind, model, config, expected = (
                ("tokenizer", Tokenizer, TokenizerConfig, TOKENIZERS["paper"])
                if name == "tokenizer_v1" else
                ("ar", AR, ARConfig, SIZES[name.removeprefix("GPT-")]))
            found = sample.build(config, saved["config"], name)
            assert saved["kind"] == kind and found == expected
            model = model(found)
            own = {key: value.shape for key, value in model.state_dict().items()}
            assert {key: value.shape for key, value in saved["model"].items()} == own
            total = sum(value.numel() for value in saved["model"].values())
            assert total == entry["total_parameters"]


def test_sampling_from_released_files_draws_what_the_library_draws(tmp_path):
    out = str(tmp_path / "grid.png")
    said = quietly(sample.main, ["--ckpt", released("ar"), "--tokenizer", released("tok"),
                                 "--labels", "3,7", "--num", "2", "--seed", "5", "--out", out])
    assert "guidance 1.1:8.0, the checkpoint's" in said
    ar, tokenizer = load_ar(released("ar")), load_tokenizer(released("tok"))
    tokens = ar.generate(torch.tensor([3, 7]), (1.1, 8.0), uniforms=uniforms(256, 5))
    size = tokenizer.config.image_size
    noise = sample.noise_of(5, Purpose.START, [0, 1], (3, size, size), "cpu")
    images = tokenizer.decode(tokens, noise)
    assert Image.open(out).tobytes() == sample.image_grid(images, 2).tobytes()
    raises(Mistake, "give --tokenizer FILE", sample.main, ["--ckpt", released("ar")])


def test_released_files_of_all_layouts_load_and_misfits_are_named(tmp_path):
    path, ours = str(tmp_path / "model.pt"), load_tokenizer(released("tok")).config

    def saved(content) -> str:
        torch.save(content, path)
        return path
    weights = sample.read_file(released("ar"))["model"]
    bare = {name.removeprefix("_orig_mod."): value for name, value in weights.items()}
    expected = load_ar(released("ar")).state_dict()
    for layout in (bare, {"module": bare}, {"state_dict": weights}):
        found = load_ar(saved(layout)).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    raises(Mistake, "odd", load_ar, saved({**bare, "odd": bare["norm.weight"]}))
    del bare["layers.1.ffn_norm.weight"]
    saved({**bare, "norm.weight": torch.ones(3)})
    raises(Mistake, "blocks.1.ffn_norm.weight", load_ar, path)
    raises(Mistake, "norm.weight: copying a param with shape", load_ar, path)
    raises(Mistake, "carries no tokenizer; give --tokenizer", load_tokenizer, path)
    raises(Mistake, "is not a checkpoint of kind 'ar'", load_ar, released("tok"))

    # Settings in a plain dict: other numbers are honoured, other kinds refused by name.
    weights, config = sample.read_file(released("tok"))["ema"], fixture("tokA_config.json")
    config["model"].update(num_query_groups=4, queries_per_step=64, num_denoising_steps=6)
    config["model"]["diff_decoder"].update(data_std=0.5, time_shift=3)
    found = load_tokenizer(saved({"model": weights, "config": config})).config
    assert (found.num_groups, found.num_steps, found.sigma, found.beta) == (4, 6, 0.5, 3)
    for setting, value in (("share_time_encoding", True), ("novelty", 1), ("cond_dim", 64)):
        inner = {**config["model"]["diff_decoder"], setting: value}
        saved({"model": weights, "config": {"model": {**config["model"], "diff_decoder": inner}}})
        raises(Mistake, f"diff_decoder.{setting} = {value} is not", load_tokenizer, path)
    saved({name: value for name, value in weights.items() if "layers.1.norm1.bias" not in name})
    raises(Mistake, "encoder.blocks.1.norm1.bias", load_tokenizer, path)

    # One diffusion block: no block follows the REPA head, which is left out.
    saved({name: value for name, value in weights.items() if ".blocks.1." not in name})
    found = load_tokenizer(path).config
    assert found == replace(ours, diffusion_depth=1, num_steps=0, repa_depth=0,
                            repa_hidden=found.repa_hidden)


# ---- Mistakes and files --------------------------------------------------------------------------

class Harmful:
    """Unpickling this object would create a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_with_other_objects_are_refused_and_nothing_in_them_runs(tmp_path):
    path, created = str(tmp_path / "model.pt"), str(tmp_path / "created")
    for harmful in (Harmful(created), {"model": {}, "args": Harmful(created)}):
        torch.save(harmful, path)
        for load in (load_ar, load_tokenizer):
            raises(Mistake, "no readable checkpoint: it holds an object of", load, path)
        Path(path).write_bytes(pickle.dumps(harmful, protocol=2))
        for load in (load_ar, load_tokenizer):
            raises(Mistake, "no readable checkpoint", load, path)
    assert not os.path.exists(created)
    pickle.loads(Path(path).read_bytes())  # ... which runs it
    assert os.path.exists(created)


def test_checkpoints_are_whole_or_refused(tmp_path):
    path, model = str(tmp_path / "t.pt"), small_tokenizer()
    sample.save_checkpoint(path, sample.pack("tokenizer", model))
    images, noise = pictures(), torch.randn(2, 3, 32, 32)
    loaded = load_tokenizer(path)
    assert torch.equal(loaded.decode(loaded.encode(images), noise),
                       model.decode(model.encode(images), noise))
    assert os.listdir(tmp_path) == ["t.pt"]
    raises(Mistake, "is not a checkpoint of kind 'ar'", load_ar, path)
    whole, odd = torch.load(small_checkpoint(), weights_only=True), torch.zeros(2)
    for text, changed in (
            ("it holds no dict", [1]), ("is not a checkpoint of kind", {**whole, "kind": "odd"}),
            ("model is missing", {**whole, "model": None}),
            ("classes are not the names", {**whole, "classes": ["a"]}),
            ("has no setting odd", {**whole, "config": {**whole["config"], "odd": 1}}),
            ("width must be", {**whole, "config": {**whole["config"], "width": -1}}),
            ("is no tensor with a name", {**whole, "model": {"head.weight": [1]}}),
            *(("norm.weight is no plain tensor", {**whole, "model": {"norm.weight": wrong}})
              for wrong in (odd / odd, odd.to(torch.int8), odd.to(torch.cfloat), odd.to_sparse())),
            ("is neither a checkpoint of this code nor", whole["model"]),
            ("does not fit", {**whole, "model": {"norm.weight": odd}})):
        torch.save(changed, path)
        raises(Mistake, text, load_ar, path)


def test_a_value_out_of_its_range_is_refused_for_every_setting():
    for part in (sample.SampleConfig(), train_tokenizer.TrainConfig(), train_ar.TrainConfig(),
                 SMALL, SMALL_AR):
        kinds, limited = get_type_hints(type(part), include_extras=True), 0
        assert {*sample.comments(type(part))} >= {*kinds} - {"seed", "depth"}  # what --help says
        for field in fields(part):
            kind, flag = kinds[field.name], "--" + field.name.replace("_", "-")
            if get_origin(kind) is Literal:
                cases = [("must be one of", "odd")]
            elif get_args(kind) and get_origin(kind) is not type(bool | None):
                (plain, least, most), limited = get_args(kind), limited + 1
                cases = [("must be in", str(least - 1)), ("must be in", str(most * 2 + 1))]
                cases += [("must be a value of type" if plain is int else "must be in", "nan"),
                          ("must be a value of type", "x")]
            else:
                cases = [("needs a value", "")] if kind is str else []
            for text, value in cases:
                raises(Mistake, f"{flag} {text}", sample.from_text, flag, value, kind)
            if cases:  # the flag has this kind
                raises(Mistake, f"{flag} {cases[0][0]}", sample.parse_settings, {"": (part,)},
                       [f"{flag}={cases[0][1]}"], "")
        assert limited >= 7


def test_mistakes_and_misuse_of_the_models_get_one_clear_line(tmp_path):
    image, tokenizer, folder = (
        str(tmp_path / name) for name in ("image.png", "tokenizer.pt", "folder.png"))
    os.makedirs(folder)
    sample.image_grid(pictures(1), 1).save(image)
    sample.save_checkpoint(tokenizer, sample.pack("tokenizer", small_tokenizer()))
    for program, text, flags in (
            (train_tokenizer, "no folder nowhere", "--data nowhere"),
            (train_tokenizer, "cannot be split", "--preset toy --batch 5 --accumulate 2"),
            (train_tokenizer, "multiple of num_groups", "--num-groups 7"),
            (train_tokenizer, "needs a REPA head", "--preset toy --repa 1"),
            (train_ar, "no checkpoint at nowhere", "--tokenizer nowhere"),
            (sample, "no checkpoint at nowhere", "--ckpt nowhere"),
            (sample, "is not a checkpoint of kind 'ar'", f"--ckpt {tokenizer}"),
            (sample, "--cfg must be", "--cfg 1:2:3"), (sample, "--cfg must be", "--cfg nan"),
            (sample, "no class 'dog'", "--labels b,dog"), (sample, "no class '5'", "--labels 5"),
            (sample, "--keep must be", f"--prefix {image} --keep 17"),
            (sample, "no meaning with --stream", "--stream --steps 4"),
            (sample, "--batch is 100", "--stream --num 101"),
            (sample, "is there already", f"--npz {image}"),
            (sample, "is no file, where one", f"--out {folder}"),
            (sample, "--tokens must be a multiple", "--tokens 6"),
            (sample, "no image at nowhere", "--prefix nowhere"),
            (sample, "cannot be read", f"--prefix {tokenizer}"),
            (sample, "no folder nowhere", "--reconstruct nowhere")):
        flags = flags.split()
        if program is sample and "--ckpt" not in flags:
            flags += ["--ckpt", small_checkpoint()]
        if not {"--out", "--npz"} & {*flags}:
            flags += ["--out", str(tmp_path / "out" / "x.png")]
        raises(Mistake, text, quietly, program.main, flags)
    model, tokens, ar = small_tokenizer(), some_tokens(), small_ar()
    for text, function, *given in (
            ("solver must be", model.decode, tokens, None, None, "heun"),
            ("1 <= groups <= 4", model.decode, tokens, None, None, "euler", 5),
            ("tokens must be (B, n) with 16", model.decode, tokens[:, :8]),
            ("noise must be (2, 3", model.decode, tokens, torch.zeros(3, 3, 32, 32)),
            ("a group must be (B, 4)", list, model.stream(tokens.split(8, 1))),
            ("labels must be in", ar.generate, torch.tensor([6])),
            ("prefix must be", ar.generate, torch.tensor([1]), None, tokens),
            ("cfg must be", ar.generate, torch.tensor([1]), (1.0, 2.0, 3.0))):
        raises(ValueError, text, function, *given)


def test_importing_does_nothing_and_a_mistake_ends_a_program_with_one_line():
    code = ("import sys; sys.argv = ['x', '--odd']; import train_ar, sample; "
            "assert not {'lpips', 'torchvision'} & set(sys.modules); sample.run(sample.main)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("x: ") and done.stderr.count("\n") == 1, done.stderr


# ---- bf16, compiling, memory ---------------------------------------------------------------------

def in_bf16(device, enabled=True):
    """Stands for `autocast` on a GPU."""
    return torch.autocast("cpu", torch.bfloat16, enabled)


def test_bf16_keeps_velocity_and_images_close_to_float32():
    model, tokens, noise = small_tokenizer(), some_tokens(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        cond, t = model.condition(tokens)[:, :4], torch.tensor([0.1, 0.7])
        velocity, images = model.diffusion(noise, t, cond).velocity, model.decode(tokens, noise)
        with in_bf16(CPU):
            found = model.diffusion(noise, t, cond).velocity, model.decode(tokens, noise)
    assert found[0].dtype == torch.float32
    # bf16 has 8 bits: products err by 0.2 % each; a residual stream in bf16 makes it 0.8 %.
    assert (found[0] - velocity).norm() < 0.0075 * velocity.norm()
    assert (found[1] - images).norm() < 0.0075 * images.norm()


def test_nothing_leaks_out_of_a_preview_under_autocast():
    with patched(sample, "autocast", in_bf16):
        args = sample.parse_args([])
        pipeline = sample.Pipeline(small_ar(), small_tokenizer(), args, "1.1:3", 2, CPU)
        for preview in pipeline.previews([0, 1], [2, 3]):
            assert not torch.is_autocast_enabled("cpu") and preview.dtype == torch.float32


def loss_log(name: str, out: str) -> list[float]:
    """The losses that a run logged, step by step."""
    return [line["flow" if name == "tokenizer" else "loss"] for line in log_of(out)
            if "lr" in line]


def train_in_bf16(name: str, *argv: str):
    """In a process of torchrun."""
    with patched(train_tokenizer, "autocast", in_bf16), patched(train_ar, "autocast", in_bf16):
        sample.run(lambda: TRAINERS[name].main([*argv]))


def test_two_compiled_processes_in_bf16_and_two_passes_learn_as_one_eager_in_float32(tmp_path):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise unittest.SkipTest("no C++ compiler")
    for name in TRAINERS:
        out = str(tmp_path / name)
        running = start("train_in_bf16", name, *options(name), "--compile", "--accumulate", "2",
                        "--out", out, processes=2)
        said, _ = running.communicate(timeout=300)
        assert running.returncode == 0, said
        expected, found = loss_log(name, trained(name)), loss_log(name, out)
        assert len(found) == 4 and np.allclose(found, expected, rtol=0.01), (found, expected)


def test_the_passes_of_a_step_follow_from_the_memory_that_a_loss_keeps():
    weight = torch.randn(1000, 1000, requires_grad=True)

    def loss(n):
        return (torch.zeros(n, 1000) @ weight).exp().sum()  # keeps input and output, 4 kB each
    image, besides = train_tokenizer.kept_bytes(loss)
    assert (image, besides) == (8000, 0)
    model, config = torch.nn.Linear(10, 10), train_tokenizer.TrainConfig(batch=1024)
    for memory, passes in ((100e6, 1), (0.5e6, 4), (1e3, 128)):  # 0.4 MB hold 32 images, not 64
        device = SimpleNamespace(total_memory=memory)
        with patched(torch.cuda, "get_device_properties", lambda _, device=device: device), \
                contextlib.redirect_stdout(io.StringIO()) as said:
            chosen = train_tokenizer.with_accumulate(config, loss, model, 8, torch.device("cuda"))
        assert chosen.accumulate == passes and f"--accumulate {passes}:" in said.getvalue()
    assert train_tokenizer.with_accumulate(config, loss, model, 8, CPU).accumulate == 1


def test_counted_operations_are_close_to_the_rule_of_thumb():
    model = small_ar(width=192)
    count = sample.count_flops(lambda: model(torch.tensor([0]), some_tokens(1)))
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    matrices += model.head.weight.numel()
    assert 1 < count / (2 * 16 * matrices) < 1.2  # two a weight and token, and attention


# ---- The README ----------------------------------------------------------------------------------

def test_scripts_in_the_readme_run(tmp_path):
    text = Path(HERE, "README.md").read_text()
    ten_lines, cifar = (block.split("```")[0] for block in text.split("```python\n")[1:])
    validation = next(line for line in text.splitlines() if line.startswith("while read"))
    os.makedirs(tmp_path / "out" / "ar")
    shutil.copy(join(trained("ar"), "last.pt"), tmp_path / "out" / "ar")
    sample.image_grid(pictures(1), 1).save(tmp_path / "photo.jpg")
    with contextlib.chdir(tmp_path):
        exec(ten_lines, {})
        assert Image.open("four.png").size == (4 * 48 + 6, 48)

        os.makedirs("val")
        names = {f"ILSVRC2012_val_0000000{i}.JPEG": f"n0000000{i % 2}" for i in range(4)}
        Path("val.txt").write_text("".join(f"{name} {wnid}\n" for name, wnid in names.items()))
        for name in names:
            shutil.copy("photo.jpg", join("val", name))
        subprocess.run(["bash", "-c", validation.replace("DIR/", "")], check=True)
        data = train_tokenizer.Folder("val", 32)
        assert data.classes == ["n00000000", "n00000001"] and data.labels.tolist() == [0, 0, 1, 1]

        os.makedirs("archive")
        for name, label in (("data_batch_1", 3), ("test_batch", 3)):
            with open(join("archive", name), "wb") as file:
                pickle.dump({b"data": np.full((1, 3072), 9, np.uint8), b"labels": [label],
                             b"filenames": [b"cat.png"]}, file)
        with patched(sys, "argv", ["this.py", "archive", "cifar"]):
            exec(cifar, {})
        train_part, held_out = train_tokenizer.open_data("cifar", 32)
        assert train_part.classes == held_out.classes == ["3"]
        assert np.array(train_part[0][0]).mean() == 9


# ---- Evaluation ----------------------------------------------------------------------------------

class TinyInception(torch.nn.Module):
    """Stands for InceptionV3: 8, 6 and 5 numbers an image in place of 2048, 2023 and 1008."""

    def forward(self, images):
        x = images[:, :4, :4].flatten(1).float() / 128 - 1                   # (B, 48)
        pool = torch.tanh(x @ torch.linspace(-1, 1, 48 * 8).view(8, 48).T.cos() / 4)
        return fid.Features(pool, pool[:, :6].square(), self.classify(pool))

    def classify(self, pool):
        return (9 * pool[:, :5]).softmax(1)


def tiny_fid(*argv):
    """Runs fid.main with the tiny network; returns what it printed."""
    with patched(fid, "POOL", 8), patched(fid, "SPATIAL", 6), \
            patched(fid, "load_inception", lambda path: TinyInception()):
        return quietly(fid.main, list(argv))


def random_inception():
    """The network in random weights that keep the size of activations from layer to layer."""
    torch.manual_seed(0)
    network = fid.InceptionV3()
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.8, 1.2)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.1)
    return network


def noise_images(count, seed=0, size=(12, 10)):
    """uint8 (count, *size, 3) of various colours and contrasts."""
    rng = np.random.default_rng(seed)
    return (rng.random((count, *size, 3)) * rng.uniform(40, 255, (count, 1, 1, 3))).astype(np.uint8)


def save_images(folder, images, ending=".png"):
    os.makedirs(folder)
    for i, image in enumerate(images):
        Image.fromarray(image).save(os.path.join(folder, f"{i:05d}{ending}"))


def read_json(path):
    return json.loads(Path(path).read_text())


def gaussian(n, d, seed):
    return np.random.default_rng(seed).standard_normal((n, d)) * np.linspace(.1, 2, d) + 1


def moments(rows):
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_resize_reads_where_tensorflow_1_does():
    row = torch.tensor([0., 10, 20, 60]).expand(1, 2, 3, 4)
    expected = torch.tensor([0, 20 / 3, 40 / 3, 20, 140 / 3, 60])  # at 0, 2/3, 4/3, 2, 8/3, 10/3
    close(fid.resize(row, 6), expected.expand(1, 2, 6, 6), 1e-5)
    square = torch.tensor([[0., 8], [16, 40]])[None, None]
    expected = torch.tensor([[0., 4, 8, 8], [8, 16, 24, 24], [16, 28, 40, 40], [16, 28, 40, 40]])
    close(fid.resize(square, 4)[0, 0], expected, 0)
    images = torch.rand(1, 3, 299, 299)
    assert torch.equal(fid.resize(images, 13), images[:, :, ::23, ::23])


def test_inception_returns_its_three_outputs_and_refuses_other_images():
    network, seen = random_inception(), []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.append(call[-1]))
    images = torch.from_numpy(noise_images(2, size=(20, 30)))
    pool, spatial, probs = network(images)
    assert (pool.shape, spatial.shape, probs.shape) == ((2, 2048), (2, 2023), (2, 1008))
    expected = [3.130364, 5.148030, 1.536695, 1.666369]  # torch-fidelity's, in these weights
    close(pool[0, [2, 3, -2, -1]], torch.tensor(expected), 5e-4)
    assert torch.equal(spatial.view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))
    assert spatial.min() == 0 and spatial.max() > 0  # after the ReLU
    close(probs, (pool @ network.fc.weight.T).softmax(1), 1e-6)
    for wrong in (images.float(), images[0], images[..., :1], images.permute(0, 3, 1, 2)):
        raises(ValueError, "must be uint8 (B, H, W, 3)", network, wrong)


def test_inception_equals_torch_fidelitys_in_random_weights():
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise unittest.SkipTest("needs torch-fidelity") from None
    with tempfile.TemporaryDirectory() as root:
        network, path = random_inception(), os.path.join(root, "weights.pth")
        torch.save(network.state_dict(), path)
        theirs = FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], path)
    images = torch.from_numpy(noise_images(2, size=(40, 50)))
    pool, logits = theirs(images.permute(0, 3, 1, 2))
    found = network(images)
    close(found.pool, pool, 1e-4 * pool.abs().max())
    close(found.probs, logits.softmax(1), 1e-4 * found.probs.max())


def test_weights_are_loaded_strictly_and_their_hash_is_checked(tmp_path):
    path, weights = str(tmp_path / "random.pth"), random_inception().state_dict()
    torch.save(weights, path)
    loaded = fid.load_inception(path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    digits = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    named, misnamed = (str(tmp_path / f"x-{hash}.pth") for hash in (digits, "01234567"))
    os.rename(path, named)
    fid.load_inception(named)
    os.rename(named, misnamed)
    raises(fid.Mistake, f"says; fetch {fid.WEIGHTS}", fid.load_inception, misnamed)
    # Another name, another shape, no state dict, other objects.
    renamed = {name.replace("fc.", "AuxLogits."): value for name, value in weights.items()}
    for wrong in (renamed, weights | {"fc.bias": torch.zeros(1000)}, [1], SMALL):
        torch.save(wrong, path)
        raises(fid.Mistake, f"{path}: not the weights of this network; fetch {fid.WEIGHTS}",
               fid.load_inception, path)
    with offline(tmp_path):
        place = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
        raises(fid.Mistake, f"at '{place}'; fetch {fid.WEIGHTS}", fid.load_inception)


def test_moments_are_numpys_for_any_split_into_batches():
    rows = torch.from_numpy(gaussian(501, 7, 0)).float()
    for size in (1, 2, 100, 501):
        sums = fid.Sums(7)
        for part in rows.split(size):
            sums.add(part)
        for found, expected in zip(sums.moments(), moments(rows.double().numpy())):
            assert np.allclose(found, expected, rtol=1e-12, atol=1e-13)
    raises(ValueError, "2 images or more; got 0", fid.Sums(7).moments)


def test_frechet_distance_is_the_known_one_and_scipys_also_of_few_samples():
    eye, zero = np.eye(5), np.zeros(5)
    assert np.isclose(fid.frechet_distance(zero, eye, zero + 3, eye), 45)
    assert fid.frechet_distance(zero, 0 * eye, zero + 1, eye) == 10
    # Covariances that commute: the squared differences of the standard deviations.
    a, b, q = np.array([1., 2, 3, 0, 2]), np.array([2., 1, 0, 0, 2]), np.linalg.qr(eye + 1)[0]
    found = fid.frechet_distance(zero, q * a ** 2 @ q.T, zero + 1, q * b ** 2 @ q.T)
    assert np.isclose(found, 11 + 5, rtol=1e-7)  # the root of a rounded 0 is 1e-8
    x, y = gaussian(300, 40, 2), gaussian(200, 40, 3) * 1.1
    few, others = x[:12], y[:15]  # ranks 11 and 14: tr (...)^(1/2) by singular values instead
    cross = (few - few.mean(0)) @ (others - others.mean(0)).T / np.sqrt(11 * 14)
    root = scipy.linalg.sqrtm(moments(x)[1] @ moments(y)[1]).real
    for x, y, trace, tolerance in ((x, y, np.trace(root), 1e-10),
                                   (few, others, np.linalg.norm(cross, "nuc"), 1e-7)):
        (mu1, sigma1), (mu2, sigma2) = moments(x), moments(y)
        expected = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2) - 2 * trace
        found = fid.frechet_distance(mu1, sigma1, mu2, sigma2)
        assert np.isclose(found, expected, rtol=tolerance)
        assert fid.frechet_distance(mu1, sigma1, mu1, sigma1) < 1e-10


def test_inception_score_of_uniform_predictions_is_1_and_of_balanced_classes_their_number():
    assert np.allclose(fid.inception_score(torch.full((50, 10), 0.1)), (1, 0))
    assert np.allclose(fid.inception_score(torch.eye(10).repeat(7, 1)), (10, 0))
    # Splits in file order, the last one shorter: one class only, then three in turn.
    probs = torch.cat([torch.eye(3)[:1].expand(6, 3), torch.eye(3)])
    assert np.allclose(fid.inception_score(probs, 6), (2, 1))


def brute_force(reference, generated, k):
    """Precision and recall by their definition."""
    def covered(points, centres):
        between = np.linalg.norm(centres[:, None] - centres, axis=-1)
        np.fill_diagonal(between, np.inf)
        radii = np.sort(between)[:, k - 1]
        return (np.linalg.norm(points[:, None] - centres, axis=-1) <= radii).any(1).mean()
    return covered(generated, reference), covered(reference, generated)


def test_precision_and_recall_are_those_of_known_sets_and_of_brute_force():
    x, y = (torch.from_numpy(gaussian(300, 4, seed)).float() for seed in (5, 6))
    assert fid.precision_recall(x, x) == (1, 1)
    assert fid.precision_recall(x, x + 100) == (0, 0)
    fivefold = torch.rand(5, 2048, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    assert fid.precision_recall(fivefold, fivefold[:17]) == (1, 1)  # balls of radius 0
    precision, recall = fid.precision_recall(torch.cat([x, x + 100]), y)  # y drops a mode
    assert precision > 0.8 and recall <= 0.5
    raises(ValueError, "need 4 images or more", fid.precision_recall, x[:3], x)
    lattice = torch.cartesian_prod(*[torch.arange(4.)] * 3)  # with ties: balls hold their edge
    pairs = [(lattice[::2], lattice[::3], 3)]
    for k, offset in ((3, 0), (1, 0), (3, 1000)):  # there, float32 would lose the distances
        pairs.append((torch.from_numpy(gaussian(150, 6, 7) + offset).float(),
                      torch.from_numpy(gaussian(130, 6, 8) * 1.3 + offset).float(), k))
    for x, y, k in pairs:
        with patched(fid, "CHUNK", 1000):
            found = fid.precision_recall(x, y, k)
        assert found == brute_force(x.double().numpy(), y.double().numpy(), k)


def test_images_of_an_npz_are_never_read_as_a_whole(tmp_path):
    images = noise_images(600, size=(64, 64))                                # 7.4 MB
    path = os.path.join(tmp_path, "images.npz")
    for save in (np.savez, np.savez_compressed):
        save(path, images)
        tracemalloc.start()
        side = fid.open_side(path)
        for first in (*range(0, 600, 10), 30):
            assert np.array_equal(side.read(first, first + 10), images[first:first + 10])
        assert side.count == 600 and tracemalloc.get_traced_memory()[1] < 4e6
        tracemalloc.stop()


def test_a_folder_is_read_by_path_without_hidden_files_and_no_folder_twice(tmp_path):
    x = noise_images(4)
    save_images(os.path.join(tmp_path, "b"), x[:2])
    save_images(os.path.join(tmp_path, "b", ".hidden"), x)
    save_images(os.path.join(tmp_path, "elsewhere", "c"), x[2:], ".PNG")
    os.symlink(os.path.join("..", "elsewhere", "c"), os.path.join(tmp_path, "b", "link"))
    os.symlink(".", os.path.join(tmp_path, "b", "loop"))
    os.symlink("..", os.path.join(tmp_path, "elsewhere", "c", "loop"))
    for name in ("._00000.png", "notes.txt"):
        (tmp_path / "b" / name).touch()
    side = fid.open_side(os.path.join(tmp_path, "b"))
    assert np.array_equal(side.read(0, side.count), x)


def test_figures_of_files_are_those_of_the_functions(tmp_path):
    x, y = noise_images(40, 1), noise_images(30, 2)
    reference, samples, stats, both, out = (
        os.path.join(tmp_path, name) for name in ("x", "y.npz", "stats.npz", "both.npz", "f.json"))
    save_images(reference, x)
    np.savez(samples, y)
    printed = tiny_fid(reference, samples, "--json", out, "--batch", "7")
    assert "images/s" in printed and "has 30 images; figures compare for 50,000" in printed
    figures = read_json(out)
    a, b = (TinyInception()(torch.from_numpy(images)) for images in (x, y))
    expected = [fid.frechet_distance(*moments(a.pool.double().numpy()),
                                     *moments(b.pool.double().numpy())),
                fid.frechet_distance(*moments(a.spatial.double().numpy()),
                                     *moments(b.spatial.double().numpy())),
                *fid.inception_score(b.probs), *fid.precision_recall(a.pool, b.pool)]
    assert list(figures) == ["fid", "sfid", "inception_score", "inception_score_std",
                             "precision", "recall"]
    assert np.allclose(list(figures.values()), expected, rtol=1e-6)

    # Statistics in place of images; statistics beside other images, as in ADM's files.
    tiny_fid(reference, "--save-stats", stats)
    assert "no precision and recall" in tiny_fid(stats, samples, "--json", out)
    assert np.allclose(list(read_json(out).values()), expected[:4], rtol=1e-6)
    with np.load(stats) as file:
        np.savez(both, x[:20], **file)
    tiny_fid(both, samples, "--json", out)
    expected[4:] = fid.precision_recall(a.pool[:20], b.pool)
    assert np.allclose(list(read_json(out).values()), expected, rtol=1e-6)
    assert "no Inception Score" in tiny_fid(both, stats, "--json", out)
    assert list(read_json(out)) == ["fid", "sfid"] and read_json(out)["fid"] < 1e-10


def test_two_processes_give_the_figures_of_one(tmp_path):
    reference, samples, one, two = (str(tmp_path / name)
                                    for name in ("x", "y.npz", "1.json", "2.json"))
    save_images(reference, noise_images(21, 3))
    np.savez_compressed(samples, noise_images(33, 4))
    tiny_fid(reference, samples, "--json", one)
    running = start("tiny_fid", reference, samples, "--json", two, "--batch", "4", processes=2)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said
    one, two = read_json(one), read_json(two)
    assert list(one) == list(two) and len(one) == 6
    assert np.allclose(list(one.values()), list(two.values()), rtol=1e-5)


def test_hostile_files_are_refused_by_name(tmp_path):
    x = noise_images(6)

    def saved(save, *args, **kwargs) -> bytes:
        file = io.BytesIO()
        save(file, *args, **kwargs)
        return file.getvalue()

    def npz(save=np.savez, **arrays) -> bytes:
        return saved(save, **arrays)

    def claim(file, shape):  # of an npz that holds 6 images
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            member.write(x.tobytes())

    def statistics(**changes) -> bytes:
        good = {"mu": np.zeros(8), "sigma": np.eye(8), "mu_s": np.zeros(6), "sigma_s": np.eye(6)}
        return npz(**(good | changes))

    def erase(content: bytes) -> bytes:
        return content[:len(content) // 2] + bytes(64) + content[len(content) // 2 + 64:]

    def picture(mode, *size, kind="PNG") -> bytes:
        return saved(Image.new(mode, size).save, kind)

    files = [
        *((": arr_0 must be uint8 (N, H, W, 3)", npz(arr_0=wrong))
          for wrong in (x / 255, x[..., :1], x[0], x.transpose(0, 3, 1, 2), np.asfortranarray(x))),
        *((f": arr_0 claims to be uint8 {shape}", saved(claim, shape))
          for shape in ((10**12, 12, 10, 3), (-6, 12, -10, 3), (7, 12, 10, 3), (5, 12, 10, 3))),
        (": arr_0 claims to be object", npz(arr_0=x.astype(object))),
        (": images must have 1 to", npz(arr_0=x[:, :0])),
        (": 0 images", npz(arr_0=x[:0])), (": 1 images", npz(arr_0=x[:1])),
        (" needs images arr_0 or stat", npz(images=x)), (": \"There is no", npz(mu=np.zeros(8))),
        (": mu must be float (8,); it is float64 (3,)", statistics(mu=np.zeros(3))),
        (": sigma must be float (8, 8); it is complex", statistics(sigma=np.eye(8) + 0j)),
        (": mu_s is not finite", statistics(mu_s=np.full(6, np.nan))),
        (": sigma is no covariance", statistics(sigma=np.eye(8) + np.eye(8, k=1) / 10)),
        (": sigma_s is no covariance", statistics(sigma_s=np.diag([1., 1, 1, 1, 1, -.01]))),
        (": File is not a zip", npz(arr_0=x)[:1000]),
        (": arr_0.npy is damaged", erase(npz(arr_0=x))),
        (": ", erase(npz(np.savez_compressed, arr_0=x)))]
    images = [
        (": cannot identify", b"no image"),
        (": cannot identify", picture("RGB", 10, 12, kind="EPS")),  # would start Ghostscript
        *((f": {mode}, width", picture(mode, 10, 12)) for mode in ("L", "P", "RGBA", "I;16", "1")),
        (": RGB, width and height (50, 50)", picture("RGB", 50, 50)),
        (": width and height (11, 12), but (10, 12)", picture("RGB", 11, 12))]
    with patched(fid, "MAX_PIXELS", 1000), patched(fid, "POOL", 8), patched(fid, "SPATIAL", 6):
        folder, path = str(tmp_path / "x"), str(tmp_path / "x.npz")
        save_images(folder, x)
        wrong = os.path.join(folder, "wrong.png")
        for place, seen, table in ((path, path, files), (wrong, folder, images)):
            for text, content in table:
                Path(place).write_bytes(content)
                raises(fid.Mistake, place + text, fid.open_side, seen)
        os.rename(wrong, os.path.join(folder, "line\nbreak.png"))
        raises(fid.Mistake, "/line break.png: ", fid.open_side, folder)
        os.remove(os.path.join(folder, "line\nbreak.png"))
        os.symlink("nowhere", wrong)
        raises(fid.Mistake, f"{wrong}: no file, or a broken link", fid.open_side, folder)
        os.remove(wrong)
        os.truncate(os.path.join(folder, "00003.png"), 200)  # seen only when it is decoded
        raises(fid.Mistake, "00003.png: ", tiny_fid, folder, folder)


def test_mistakes_of_evaluation_get_one_line_before_the_work(tmp_path):
    x = noise_images(6)
    good, stats, both, few, lossy, out = (os.path.join(tmp_path, name) for name in (
        "good.npz", "stats.npz", "both.npz", "few.npz", "lossy", "out"))
    np.savez(good, x)
    np.savez(few, x[:5])
    save_images(lossy, x, ".jpg")
    tiny_fid(good, "--save-stats", stats)
    with np.load(stats) as file:
        np.savez(both, x, **file)
    usage = "give REFERENCE and SAMPLES, or IMAGES and --save-stats FILE"
    with patched(fid, "measure", None):
        for text, argv in (
                ("no file or folder 'nowhere'", ["nowhere", good]),
                ("no file or folder ''", [good, ""]), (usage, [good]),
                (usage, [good, good, "--save-stats", out]),
                (usage, [good, "--save-stats", out, "--json", out]),
                ("--batch must be 1 or more", [good, good, "--batch", "0"]),
                ("invalid int value: 'x'; --help lists", [good, good, "--batch", "x"]),
                ("--batch must be 1 or more", [good, good, "--batch", "-1"]),
                ("cannot write", [good, good, "--json", os.path.join(tmp_path, "no", "f.json")]),
                ("need a value", [good, good, "--json", ""]),
                ("cannot write", [good, "--save-stats", str(tmp_path)]),
                ("cannot write", [good, "--save-stats", os.path.join(good, "f")]),
                ("would be overwritten", [few, good, "--json", good]),
                ("the order is REFERENCE SAMPLES", [good, stats]),
                ("the order is REFERENCE SAMPLES", [both, both]),
                ("statistics already", [both, "--save-stats", out])):
            raises(fid.Mistake, text, tiny_fid, *argv)
    assert "few.npz the REFERENCE?" in tiny_fid(good, few)
    assert "holds JPEG files" in tiny_fid(good, lossy)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(os.listdir(tmp_path))
    with patched(os, "replace", full):
        raises(fid.Mistake, f"disk is full: {out} could not be written",
               tiny_fid, good, good, "--json", out)
    assert sorted(os.listdir(tmp_path)) == before


def test_names_of_files_need_not_be_utf8(tmp_path):
    folder = os.path.join(tmp_path, os.fsdecode(b"\xff"))
    save_images(folder, noise_images(2), ".jpg")
    done = subprocess.run([sys.executable, os.path.join(HERE, "fid.py"), folder, "\udcfe\n"],
                          env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
                          capture_output=True, text=True)
    assert done.returncode == 1 and "\\udcff holds JPEG files" in done.stdout, done
    assert done.stderr == "fid.py: no file or folder '\\udcfe\\n'\n", done


def main():
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    failed = skipped = 0
    for name, test in tests:
        began = time.time()
        try:
            with tempfile.TemporaryDirectory() as folder:
                takes_folder = "tmp_path" in inspect.signature(test).parameters
                test(*[Path(folder)] * takes_folder)
            print(f"ok      {time.time() - began:5.1f}s  {name}", flush=True)
        except unittest.SkipTest as reason:
            skipped += 1
            print(f"skipped: {reason}  {name}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
    passed = f"{len(tests) - failed - skipped} passed, {failed} failed"
    print(passed + (f", {skipped} skipped" if skipped else ""))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
