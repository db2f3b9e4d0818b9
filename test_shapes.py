"""Tests of everything that can be checked on a CPU without the network, in about a minute.

    python test_shapes.py            or            python -m pytest test_shapes.py

Small models in random weights, none of them zero, so that every path matters.
"""
import contextlib
import hashlib
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
from dataclasses import asdict, replace

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention.bias import causal_lower_right

import fid
import model_ar
import model_tokenizer as mt
import sample
import train_ar
import train_tokenizer
from model_ar import AR, SIZES, ARConfig, load_ar
from model_tokenizer import TOKENIZERS, Tokenizer, TokenizerConfig, load_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(HERE, "..", "shared", "fixtures")
SMALL = TokenizerConfig(image_size=32, num_tokens=16, num_groups=4, codebook_size=64, patch_size=8,
                        encoder_width=32, encoder_depth=2, decoder_width=64, decoder_depth=2,
                        diffusion_width=96, diffusion_depth=3, diffusion_patch=4, head_dim=16,
                        max_tokens=20, repa_depth=2, repa_hidden=24, repa_dim=12)
SMALL_AR = ARConfig(depth=3, width=48, heads=3, num_tokens=16, vocab_size=64, num_classes=5,
                    dropout=0.0)
# Command lines of a training run that takes a second or two.
TINY = ("--preset toy --steps 4 --batch 4 --encoder-depth 1 --decoder-depth 1 --diffusion-depth 1 "
        "--codebook-size 32 --log-every 1 --eval-every 4 --save-every 2 --eval-images 4").split()
TINY_AR = ("--preset toy --steps 4 --batch 4 --log-every 1 --eval-every 4 --save-every 2 "
           "--eval-images 4").split()


def randomised(model):
    """The model with all weights drawn anew, so that no gate, bias or output layer is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    return model.eval()


def small_tokenizer(**changes) -> Tokenizer:
    return randomised(Tokenizer(replace(SMALL, **changes)))


def small_ar() -> AR:
    return randomised(AR(SMALL_AR))


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
        assert text in str(error) and "\n" not in str(error), str(error)
        return
    raise AssertionError(f"no {kind.__name__} with {text!r}")


def count_parameters(model_class, config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


def quietly(function, *args):
    """Calls the function and returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue()


# ---- Sizes ---------------------------------------------------------------------------------------

def test_tokenizer_has_the_papers_parameter_counts():
    with torch.device("meta"):
        model = Tokenizer(TOKENIZERS["paper"])
    counts = {name: sum(p.numel() for p in part.parameters())
              for name, part in model.named_children()}
    assert counts.pop("repa_head") == 7_344_896
    assert sum(counts.values()) == 300_099_776
    assert counts["diffusion"] == 185_129_664
    assert sum(p.numel() for p in model.encoder.blocks.parameters()) == 56_717_312
    assert sum(p.numel() for p in model.decoder.blocks.parameters()) == 56_717_312


def test_light_tokenizer_has_113_million_parameters():
    assert round(count_parameters(Tokenizer, TOKENIZERS["light"]) / 1e6) == 113


def test_ar_sizes_have_the_papers_parameter_counts():
    counts = {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672}
    assert {name: count_parameters(AR, SIZES[name]) for name in counts} == counts


# ---- The rules of time and groups ----------------------------------------------------------------

def test_eight_steps_use_the_papers_times_and_each_group_once():
    schedule = mt.sampling_schedule(8, 8, 2.0, 8)
    expected = [0, .0667, .1429, .2308, .3333, .4545, .6, .7778, 1]
    assert [round(step.t, 4) for step in schedule] + [schedule[-1].t_next] == expected
    assert [step.group for step in schedule] == list(range(8))


def test_first_group_gets_a_sixteenth_and_last_three_sixteenths_of_the_times():
    groups = mt.group_of((torch.arange(16_000) + 0.5) / 16_000, 8)
    assert torch.bincount(groups).tolist() == [1000] + [2000] * 6 + [3000]


def test_group_of_floats_and_tensors_agree():
    for groups in (1, 4, 8, 16):
        grid = [i / 960 for i in range(960)]
        expected = [mt.group_of(u, groups) for u in grid]
        assert mt.group_of(torch.tensor(grid), groups).tolist() == expected


def test_first_groups_only_ends_with_a_jump():
    schedule = mt.sampling_schedule(8, 8, 2.0, 3)
    assert [step.group for step in schedule] == [0, 1, 2] and schedule[-1].t_next == 1
    for steps in (4, 12, 16):
        groups = [step.group for step in mt.sampling_schedule(steps, 8, 2.0, 8)]
        assert len(groups) == steps and groups == sorted(groups)
        assert groups[-1] == (6 if steps == 4 else 7)


def test_jump_along_the_true_velocity_lands_on_the_image():
    x1, x0, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.9])
    close(mt.jump(mt.interpolate(x1, x0, t), x1 - x0, t), x1, 1e-5)  # float32 rounding


def test_adams_bashforth_is_exact_for_linear_velocities_and_euler_is_not():
    def integrate(solver):
        x, before = torch.zeros(1), None
        for i in range(10):
            v = torch.tensor([2.0 * i / 10])  # dx/dt = 2t, so that x(t) = t^2
            x, before = mt.solver_step(x, v, before, mt.Step(i / 10, (i + 1) / 10, 0), solver), v
        return x.item()
    assert abs(integrate("adams2") - 0.99) < 1e-5  # only the first, Euler, step errs: by 0.1^2
    assert abs(integrate("euler") - 0.9) < 1e-5


# ---- Attention, rotation, patches ----------------------------------------------------------------

def test_split_attention_equals_masked_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 10 + 6, 8)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    mask[:10, :10] = True  # patches see patches only; query i sees patches, queries <= i
    close(mt.prefix_attention(q, k, v, causal_lower_right(6, 16)),
          F.scaled_dot_product_attention(q, k, v, attn_mask=mask), 1e-6)
    q, k, v = q[:, :, 10:], k[:, :, 10:], v[:, :, 10:]
    close(mt.prefix_attention(q, k, v, causal_lower_right(6, 6)),
          F.scaled_dot_product_attention(q, k, v, is_causal=True), 1e-6)


def test_rotated_products_depend_on_the_distance_of_patches_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 20, 16)
    rope = mt.rope_2d(4, 5, 16, "cpu")
    scores = (mt.rotate(q, rope) @ mt.rotate(k, rope).mT)[0, 0].view(4, 5, 4, 5)
    close(scores[0, 1, 2, 3], scores[1, 2, 3, 4], 1e-5)  # both 2 rows and 2 columns apart
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3  # rows and columns differ


def test_one_dimensional_rotation_equals_complex_multiplication():
    x = torch.randn(1, 1, 6, 8)
    angles = torch.arange(6)[:, None] / 10000 ** (torch.arange(4) / 4)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(6, 4), angles)
    found = model_ar.rotate(x, model_ar.rope_1d(6, 8, 10000.0))
    close(found, torch.view_as_real(turned).flatten(-2), 1e-6)


def test_patches_are_the_images_squares_in_reading_order():
    images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    patches, grid = mt.to_patches(images, 4)
    assert grid == (2, 3) and patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], images[1, :, 4:8, 4:8].flatten())  # channel, row, column


# ---- The tokenizer -------------------------------------------------------------------------------

def test_encoder_queries_are_causal():
    model, images = small_tokenizer(), pictures()
    with torch.no_grad():
        before = model.encoder(images)
        model.encoder.query_table[7] += 1
        after = model.encoder(images)
    assert torch.equal(before[:, :7], after[:, :7])
    assert ((before[:, 7:] - after[:, 7:]).abs().amax(-1) > 1e-4).all()


def test_causal_decoder_is_causal_and_prefixes_are_enough():
    model, tokens = small_tokenizer(), some_tokens()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    with torch.no_grad():
        before, after = model.condition(tokens), model.condition(changed)
        prefix = model.condition(tokens[:, :9])
    assert torch.equal(before[:, :9], after[:, :9])
    assert ((before[:, 9:] - after[:, 9:]).abs().amax(-1) > 1e-4).all()
    close(prefix, before[:, :9], 1e-5)  # another summation order


def test_quantizer_takes_the_nearest_row_and_passes_gradients_straight_through():
    quantizer = small_tokenizer().quantizer
    z = torch.randn(2, 16, 8, requires_grad=True)
    result = quantizer(z)
    unit, rows = F.normalize(z, dim=-1), F.normalize(quantizer.codebook, dim=-1)
    assert torch.equal(result.tokens, torch.cdist(unit, rows).argmin(-1))
    close(result.codes, rows[result.tokens], 1e-6)
    close(result.codes, quantizer.lookup(result.tokens), 1e-6)
    weight = torch.randn(2, 16, 8)
    through, = torch.autograd.grad((result.codes * weight).sum(), z, retain_graph=True)
    direct, = torch.autograd.grad((unit * weight).sum(), z)
    close(through, direct, 1e-6)
    close(result.loss, 1.25 * (unit - rows[result.tokens]).pow(2).mean(-1), 1e-6)


def test_quantizer_runs_in_float32_under_autocast():
    quantizer, z = small_tokenizer().quantizer, torch.randn(64, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(z)
    assert result.codes.dtype == torch.float32 and torch.equal(result.tokens, quantizer(z).tokens)


def test_training_losses_equal_a_second_computation():
    model, images, noise = small_tokenizer(), pictures(3), torch.randn(3, 3, 32, 32)
    u = torch.tensor([0.05, 0.4, 0.99])
    output = model(images, u, noise)
    tokens, vq, count, flow = model.encode(images), 0.0, 0, 0.0
    for i in range(3):
        group, t = mt.group_of(u[i].item(), 4), mt.shift_time(u[i].item(), 2.0)
        x1 = 0.6 * images[i:i + 1]
        xt = t * x1 + (1 - t) * noise[i:i + 1]
        cond = model.condition(tokens[i:i + 1])[:, 4 * group:4 * group + 4]
        v = model.diffusion(xt, torch.tensor([t]), cond)[0]
        flow += ((v - (x1 - noise[i:i + 1])) ** 2).mean() / 0.36 / 3
        close(output.images[i:i + 1], (xt + (1 - t) * v) / 0.6, 1e-4)  # codes took another route
        length = 4 * (group + 1)
        count += length
        vq += model.quantizer(model.encoder(images[i:i + 1])).loss[:, :length].sum()
    close(output.flow_loss, flow, 1e-4 * flow)
    close(output.vq_loss, vq / count, 1e-6)
    assert output.repa.shape == (3, 16, 12) and torch.equal(output.tokens, tokens)


def test_decoding_equals_the_sampler_written_out():
    model, tokens, noise = small_tokenizer(), some_tokens(), torch.randn(2, 3, 32, 32)
    times, before, x = [0, 1 / 7, 1 / 3, 3 / 5, 1], None, noise
    with torch.no_grad():
        for k in range(4):
            cond = model.condition(tokens)[:, 4 * k:4 * k + 4]
            v = model.diffusion(x, torch.full((2,), times[k]), cond)[0]
            x = x + (times[k + 1] - times[k]) * (v if k == 0 else 1.5 * v - 0.5 * before)
            before = v
    close(model.decode(tokens, noise), x / 0.6, 1e-4)  # outputs of order 10


def test_streamed_decoding_equals_whole_decoding():
    model, tokens, noise = small_tokenizer(), some_tokens(), torch.randn(2, 3, 32, 32)
    for solver in ("adams2", "euler"):
        previews = list(model.stream(tokens.split(4, 1), noise, solver))
        assert len(previews) == 4
        for groups in (1, 2, 4):
            last = list(model.stream(tokens.split(4, 1), noise, solver, groups))[-1]
            close(last, model.decode(tokens, noise, solver=solver, groups=groups), 1e-4)
        close(previews[-1], last, 0)
    for groups in (1, 2, 3):  # an Euler preview is what decoding gives that ends with this group
        decoded = model.decode(tokens, noise, solver="euler", groups=groups)
        close(previews[groups - 1], decoded, 1e-4)


def test_partial_decoding_reads_no_later_token():
    model, tokens, noise = small_tokenizer(), some_tokens(), torch.randn(2, 3, 32, 32)
    whole = model.decode(tokens, noise, groups=2)
    assert torch.equal(model.decode(tokens[:, :8], noise, groups=2), whole)
    for steps in (3, 4, 6, 8):
        assert model.decode(tokens, noise, steps=steps).shape == (2, 3, 32, 32)


def test_tokenizer_takes_other_image_sizes():
    model = small_tokenizer()
    tokens = model.encode(pictures(2, 64))
    assert tokens.shape == (2, 16)
    assert model.decode(tokens, torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_fresh_tokenizer_predicts_zero_velocity():
    model = Tokenizer(SMALL)
    v, _ = model.diffusion(torch.randn(1, 3, 32, 32), torch.rand(1), torch.randn(1, 4, 64))
    assert v.abs().max() == 0
    close(model.quantizer.codebook.norm(dim=1), torch.ones(64), 1e-6)


# ---- The autoregressive model --------------------------------------------------------------------

def test_ar_model_is_causal_and_sees_the_class_first():
    model, labels, tokens = small_ar(), torch.tensor([0, 5]), some_tokens()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    with torch.no_grad():
        before, after = model(labels, tokens), model(labels, changed)
        other = model(labels.flip(0), tokens)
    assert before.shape == (2, 16, 64)
    assert torch.equal(before[:, :10], after[:, :10])  # logits j come from the tokens before j
    assert ((before[:, 10:] - after[:, 10:]).abs().amax(-1) > 1e-4).all()
    assert ((before - other).abs().amax(-1) > 1e-4).all()


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
            with torch.no_grad():
                expected = generate_without_cache(model, labels, cfg, prefix)
            assert torch.equal(model.generate(labels, cfg, prefix, temperature=0.0), expected)


def test_guidance_of_one_is_no_guidance():
    model, labels = small_ar(), torch.tensor([2, 3])
    torch.manual_seed(0)
    free = model.generate(labels)
    torch.manual_seed(0)
    assert torch.equal(model.generate(labels, (1.0, 1.0)), free)


def test_filters_keep_what_brute_force_keeps():
    torch.manual_seed(0)
    for row in torch.randn(20, 1, 40):
        order = row[0].argsort(descending=True).tolist()
        for k, p in ((5, 1.0), (0, 0.8), (10, 0.6)):
            kept, total = order[:k] if k else list(order), 0.0
            probabilities = row[0][kept].softmax(0).tolist()
            if p < 1:
                best, kept = kept, []
                for token, probability in zip(best, probabilities):
                    kept, total = kept + [token], total + probability
                    if total > p:
                        break
            found = model_ar.filter_logits(row, k, p)[0].isfinite().nonzero().flatten().tolist()
            assert found == sorted(kept)


def test_draws_have_the_models_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for keys, pos in ((torch.arange(40_000), 7), (torch.randint(2 ** 62, (40_000,)), 0)):
        drawn = model_ar.draw(logits.expand(40_000, 4), keys, torch.tensor([pos]), 2.0, 0, 1.0)
        counts = torch.bincount(drawn, minlength=4)
        close(counts / 40_000, (logits / 2).softmax(0), 0.01)  # four standard deviations
    assert model_ar.draw(logits[None], keys[:1], torch.tensor([0]), 0.0, 0, 1.0).item() == 0


def splitmix64(state: int) -> int:
    """The generator's output at a state, in Python's own integers."""
    z, bits = state % 2 ** 64, 2 ** 64 - 1
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & bits
    z = (z ^ z >> 27) * 0x94D049BB133111EB & bits
    return z ^ z >> 31


def test_random_numbers_are_splitmix64_and_exponential():
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the published first output
    keys = torch.tensor([5, -3, 2 ** 62])
    found = model_ar.exponentials(keys, torch.tensor([11]), 100)
    for row, key in enumerate(keys.tolist()):
        for column in (0, 99):
            state = key + (11 * 100 + column + 1) * 0x9E3779B97F4A7C15
            uniform = ((splitmix64(state) >> 24) + 0.5) / 2 ** 40
            assert abs(found[row, column].item() / -math.log1p(-uniform) - 1) < 1e-5
    many = model_ar.exponentials(torch.arange(1000), torch.tensor([0]), 1000)
    close(many.mean(), torch.tensor(1.0), 0.005)  # five standard deviations
    close((many > 2).float().mean(), torch.tensor(math.exp(-2)), 0.002)
    correlation = torch.corrcoef(torch.stack([many[0::2].flatten(), many[1::2].flatten()]))[0, 1]
    assert abs(correlation) < 0.007  # five standard deviations


# ---- Data ----------------------------------------------------------------------------------------

def test_built_in_pictures_are_a_function_of_their_number():
    train, held_out = train_tokenizer.open_data("shapes", 32)
    assert np.array_equal(train[7][0], train_tokenizer.Shapes(5, 10, 32)[2][0])
    assert train[7][1] == train.label(7) == 7 and len(train.classes) == 10
    assert train.first + len(train) <= held_out.first  # no picture in both
    assert not np.array_equal(train[7][0], train[17][0])


def make_folder(root, per_class=3):
    """A tiny data set in class folders, one picture each in grey, CMYK, palette and with alpha."""
    for name in ("b_cat", "a_dog"):
        os.makedirs(os.path.join(root, name))
        for i in range(per_class):
            mode, ending = [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"),
                            ("RGBA", "png")][i % 5]
            noise = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            path = os.path.join(root, name, f"{i:03d}.{ending}")
            Image.fromarray(noise).convert(mode).save(path)


def test_folders_are_read_in_sorted_order_and_any_mode():
    with tempfile.TemporaryDirectory() as root:
        make_folder(root, 5)
        data = train_tokenizer.Folder(root, 32)
        assert data.classes == ["a_dog", "b_cat"]
        assert [data[i][1] for i in range(10)] == [0] * 5 + [1] * 5
        assert all(data[i][0].mode == "RGB" for i in range(10))
        train, held_out = train_tokenizer.open_data(root, 32)
        assert len(train) == 9 and len(held_out) == 1 and held_out.items[0] not in train.items
        raises(ValueError, "no images", train_tokenizer.Folder, os.path.join(root, "a_dog"), 32)
        with open(data.items[0][0], "w") as file:
            file.write("no image")
        raises(ValueError, f"{data.items[0][0]} cannot be read", data.__getitem__, 0)


def make_bad_images(root: str) -> dict[str, bool]:
    """Files of thirty kinds that data sets hold, and whether an image can be read from each."""
    good, kinds = mt.image_grid(pictures(1), 1), {}
    deep = np.random.default_rng(0).integers(0, 2 ** 16, (64, 64), dtype=np.uint16)

    def whole(ending: str, **options) -> bytes:
        file = io.BytesIO()
        good.save(file, ending, **options)
        return file.getvalue()

    def add(name: str, readable: bool, data: bytes | Image.Image, **options):
        path = os.path.join(root, f"{len(kinds):02d}_{name}")
        if isinstance(data, bytes):
            with open(path, "wb") as file:
                file.write(data)
        else:
            data.save(path, **options)
        kinds[path] = readable

    jpeg, png = whole("JPEG"), whole("PNG")
    for ending in ("jpg", "png", "webp", "bmp"):
        add(f"empty.{ending}", False, b"")
        add(f"text.{ending}", False, b"<html>404 Not Found</html>")
        add(f"noise.{ending}", False, np.random.default_rng(1).bytes(5000))
    add("half.jpg", False, jpeg[:len(jpeg) // 2])
    add("half.png", False, png[:len(png) // 2])
    add("half.bmp", False, whole("BMP")[:2000])
    add("half.webp", False, whole("WEBP")[:500])
    add("header.jpg", False, jpeg[:20])
    add("header.png", False, png[:30])
    add("damaged.png", False, png[:12] + b"xxxx" + png[16:])
    add("bomb.png", False, png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:])
    add("long.png", False, Image.new("RGB", (2, 3000)))
    add("jpeg.png", True, jpeg)
    add("png.jpg", True, png)
    add("gif.png", True, whole("GIF"))
    add("animated.png", True, good, save_all=True, append_images=[good.rotate(90)])
    add("deep.png", True, Image.fromarray(deep))
    add("one_bit.png", True, good.convert("1"))
    add("grey_alpha.png", True, good.convert("LA"))
    add("palette_alpha.png", True, good.convert("P"), transparency=0)
    add("pixel.png", True, Image.new("RGB", (1, 1)))
    return kinds


def test_thirty_kinds_of_odd_files_are_read_or_refused_by_name():
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on what it makes of them
        kinds = make_bad_images(root)
        assert len(kinds) == 30
        for path, readable in kinds.items():
            if readable:
                image = mt.read_image(path, 32)
                assert image.mode == "RGB" and mt.center_crop(image, 32).size == (32, 32), path
            else:
                raises(ValueError, f"{path} cannot be read", mt.read_image, path, 32)
        deep = np.array(mt.read_image([path for path in kinds if "deep" in path][0], 32))
        assert 100 < deep.mean() < 155  # not white: 16 bits are scaled, not cut


def test_unreadable_images_are_skipped_and_listed_and_too_many_are_an_error():
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data, out = os.path.join(root, "data"), os.path.join(root, "out")
        for name in ("train", "val"):
            make_folder(os.path.join(data, name), 100)
        bad = os.path.join(data, "train", "a_dog", "050.jpg")
        with open(bad, "w") as file:
            file.write("no image")
        options = TINY + ["--data", data, "--steps", "25", "--batch", "8", "--eval-every", "25"]
        said = quietly(train_tokenizer.main, options + ["--out", out])
        assert said.count(f"skipped 1: {bad} cannot be read") == 1 and "step 25" in said
        with open(os.path.join(out, "unreadable.txt")) as file:
            assert bad in file.read()
        source = train_tokenizer.Folder(os.path.join(data, "train"), 24)
        number = [path for path, _ in source.items].index(bad)
        image, label, lines = train_tokenizer.read_or_another(source, number)
        assert image.mode == "RGB" and bad in lines
        assert label == train_tokenizer.read_or_another(source, number)[1]  # always the same one

        codes = TINY_AR + ["--data", data, "--tokenizer", os.path.join(out, "last.pt"), "--codes",
                           os.path.join(root, "codes"), "--out", os.path.join(root, "ar")]
        assert "skipped 1" in quietly(train_ar.main, codes)
        make_bad_images(os.path.join(data, "train", "b_cat"))
        for module, command in ((train_tokenizer, options + ["--out", os.path.join(root, "new")]),
                                (train_ar, codes[:-1] + [os.path.join(root, "new")])):
            raises(ValueError, "more than 1 % of the images cannot be read", quietly, module.main,
                   command)


def test_crops_have_the_right_size_and_views_are_mirrored():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert train_tokenizer.random_crop(image, 32, 1.25, True, rng).size == (32, 32)
    assert mt.center_crop(image, 32).size == (32, 32)
    for views in (2, 10):
        crops = [np.array(train_ar.crop_view(image, 32, view, views)) for view in range(views)]
        assert all(np.array_equal(crops[i][:, ::-1], crops[i + 1]) for i in range(0, views, 2))
        assert len({crop.tobytes() for crop in crops}) == views


def test_an_epoch_shows_each_item_once_and_a_position_always_the_same():
    shuffle = train_tokenizer.Shuffle(10, 0)
    order = [shuffle[i] for i in range(20)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert train_tokenizer.Shuffle(10, 0)[13] == order[13]


def test_processes_share_the_positions_of_a_step():
    config = train_tokenizer.TrainConfig(batch=8, steps=6)
    for step in (4, 5):
        shares = [list(train_tokenizer.positions(config, 4, rank, 2))[4 * step - 16:][:4]
                  for rank in (0, 1)]
        assert shares[0] + shares[1] == list(range(8 * step, 8 * step + 8))


def test_pixels_survive_the_way_to_tensors_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(mt.to_uint8(mt.to_tensor(Image.fromarray(pixels))[None])[0], pixels)
    assert mt.image_grid(pictures(5), 3).size == (3 * 64 + 4, 2 * 64 + 2)


# ---- Training ------------------------------------------------------------------------------------

def test_learning_rate_warms_up_stays_and_falls():
    config = train_tokenizer.TrainConfig(steps=100, lr=1.0, lr_final=0.1, warmup_steps=10,
                                         decay_steps=50)
    rates = [train_tokenizer.learning_rate(step, config) for step in (0, 9, 50, 75, 100)]
    close(torch.tensor(rates), torch.tensor([0.1, 1.0, 1.0, 0.55, 0.1]), 1e-6)


def test_unused_codebook_rows_are_reseeded():
    use = train_tokenizer.CodebookUse(4, "cpu")
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


def test_averaged_weights_follow_the_models():
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * ema.weight.detach() + 0.1 * model.weight.detach()
    train_tokenizer.update_ema(ema, model, 0.9)
    close(ema.weight.detach(), expected, 1e-6)


def test_counted_operations_are_close_to_the_rule_of_thumb():
    model = AR(replace(SMALL_AR, width=192))
    count = mt.count_flops(lambda: model(torch.tensor([0]), some_tokens(1)))
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    matrices += model.head.weight.numel()
    assert 1 < count / (2 * 16 * matrices) < 1.2  # two a weight and token, and attention
    model = Tokenizer(replace(SMALL, repa_depth=0))
    parts = [(model.encoder, 16 + 16), (model.decoder, 16), (model.diffusion, 64)]  # tokens seen
    matrices = sum(p.numel() * seen for part, seen in parts
                   for p in part.blocks.parameters() if p.ndim == 2)
    count = mt.count_flops(lambda: model(pictures(1), torch.zeros(1), pictures(1)))
    assert 0.8 < count / (2 * matrices) < 1.3  # conditions are few; attention adds


def weights_of(folder: str, part: str = "model") -> torch.Tensor:
    """All weights of the checkpoint in a folder as one vector."""
    saved = torch.load(os.path.join(folder, "last.pt"), weights_only=True)
    return torch.cat([value.flatten() for value in saved[part].values()])


@contextlib.contextmanager
def patched(module, name: str, value):
    """Replaces module.name for a while."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def test_a_signal_saves_and_leaves_and_the_run_goes_on_exactly():
    real, calls, before = train_tokenizer.update_ema, [], signal.getsignal(signal.SIGTERM)

    def interrupting(*args):
        real(*args)
        calls.append(None)
        if len(calls) in (1, 2):
            os.kill(os.getpid(), (signal.SIGTERM, signal.SIGINT)[len(calls) - 1])
    with tempfile.TemporaryDirectory() as root:
        whole, halves = os.path.join(root, "whole"), os.path.join(root, "halves")
        quietly(train_tokenizer.main, TINY + ["--out", whole])
        with patched(train_tokenizer, "update_ema", interrupting):
            for step, name in ((1, "SIGTERM"), (2, "SIGINT")):
                said = io.StringIO()
                try:
                    with contextlib.redirect_stdout(said):
                        train_tokenizer.main(TINY + ["--out", halves])
                    raise AssertionError("did not leave")
                except SystemExit as leaving:
                    assert leaving.code == 128 + getattr(signal, name)
                assert f"{name}: saved after step {step}; the same command" in said.getvalue()
            quietly(train_tokenizer.main, TINY + ["--out", halves])
        assert torch.equal(weights_of(whole), weights_of(halves))
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_killed_run_goes_on_exactly():
    with tempfile.TemporaryDirectory() as root:
        whole, halves = os.path.join(root, "whole"), os.path.join(root, "halves")
        options = TINY + ["--steps", "30", "--save-every", "1", "--eval-every", "30"]
        quietly(train_tokenizer.main, options + ["--out", whole])
        command = [sys.executable, os.path.join(HERE, "train_tokenizer.py")] + options
        running = subprocess.Popen(command + ["--out", halves], stdout=subprocess.DEVNULL)
        while not os.path.exists(os.path.join(halves, "last.pt.previous")):
            assert running.poll() is None, "ended early"
            time.sleep(0.02)
        running.kill()
        running.wait()
        said = quietly(train_tokenizer.main, options + ["--out", halves])
        assert "step 0 of" not in said and "step 30 of" not in said
        for part in ("model", "ema"):
            assert torch.equal(weights_of(whole, part), weights_of(halves, part))


def test_a_truncated_or_missing_checkpoint_leaves_the_one_before():
    with tempfile.TemporaryDirectory() as root:
        out, path = ["--out", os.path.join(root, "run")], os.path.join(root, "run", "last.pt")
        whole = os.path.join(root, "whole")
        quietly(train_tokenizer.main, TINY + ["--out", whole])
        quietly(train_tokenizer.main, TINY + out)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        said = quietly(train_tokenizer.main, TINY + out)
        assert f"going on from {path}.previous" in said and "step 2 of 4" in said
        mt.read_file(path + ".previous")  # which the damaged one did not replace
        assert torch.equal(weights_of(whole), weights_of(os.path.join(root, "run")))
        os.remove(path)  # as if killed between the two renamings
        os.remove(path + ".previous")
        quietly(train_tokenizer.main, TINY + out)
        os.remove(path)
        assert "step 2 of 4" in quietly(train_tokenizer.main, TINY + out)

        def full(checkpoint, file):
            file.write(b"some bytes")
            raise OSError(28, "No space left on device")
        before = weights_of(os.path.join(root, "run"))
        with patched(torch, "save", full):
            raises(ValueError, "No space left on device); what was saved before is whole", quietly,
                   train_tokenizer.main, TINY + out + ["--steps", "6"])
        assert torch.equal(weights_of(os.path.join(root, "run")), before)
        assert not [name for name in os.listdir(os.path.join(root, "run")) if "tmp" in name]


def test_a_number_that_is_not_finite_stops_the_run_by_name():
    real, calls = Tokenizer.forward, []

    def broken(self, *args):
        output = real(self, *args)
        calls.append(None)
        return output._replace(vq_loss=output.vq_loss * math.nan) if len(calls) == 4 else output
    with tempfile.TemporaryDirectory() as root, patched(Tokenizer, "forward", broken):
        raises(ValueError, "vq is not finite at step 3 in process 0; stopped", quietly,
               train_tokenizer.main, TINY + ["--out", root, "--log-every", "100"])
        saved = torch.load(os.path.join(root, "last.pt"), weights_only=True)
        assert saved["step"] == 2 and weights_of(root).isfinite().all()


def test_the_autoregressive_model_sees_the_same_tokens_on_any_number_of_processes():
    codes = np.arange(30 * (1 + 10 * 4), dtype=np.uint16).reshape(30, -1)
    for step in (0, 5):
        seen = []
        for world, accumulate in ((1, 1), (1, 4), (2, 1), (2, 2)):
            config = train_ar.TrainConfig(batch=8, steps=step + 1, accumulate=accumulate)
            parts = [part for rank in range(world)
                     for part in train_ar.stored_tokens(codes, config, 30, step, rank, world)]
            seen.append([torch.cat(part).tolist() for part in zip(*parts)])
        assert all(one == seen[0] for one in seen) and len(seen[0][1]) == 8


def test_a_signal_to_torchrun_with_loading_processes_saves():
    with tempfile.TemporaryDirectory() as root:
        log = os.path.join(root, "log.jsonl")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node=2", os.path.join(HERE, "train_tokenizer.py"), *TINY,
                   "--steps", "10000", "--workers", "1", "--save-every", "10000", "--eval-every",
                   "10000", "--out", root]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   text=True)
        while not os.path.exists(log):
            assert running.poll() is None, "ended early"
            time.sleep(0.1)
        running.terminate()
        said, _ = running.communicate(timeout=60)
        saved = torch.load(os.path.join(root, "last.pt"), weights_only=True)
        assert f"SIGTERM: saved after step {saved['step']}" in said, said


def test_a_process_that_dies_ends_the_others():
    code = ("import os, sys, train_tokenizer as t\n"
            "real, calls = t.update_ema, []\n"
            "def dying(*args):\n"
            "    real(*args)\n"
            "    calls.append(1)\n"
            "    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
            "        os._exit(7)\n"
            "t.update_ema = dying\n"
            "t.main(sys.argv[1:])\n")
    with tempfile.TemporaryDirectory() as root:
        script = os.path.join(root, "script.py")
        with open(script, "w") as file:
            file.write(code)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               "--nproc_per_node=2", script, *TINY, "--steps", "1000", "--out",
                               os.path.join(root, "out")], capture_output=True, text=True,
                              timeout=120, env={**os.environ, "PYTHONPATH": HERE})
        assert done.returncode != 0
        assert "exitcode  : 7" in done.stderr and "rank      : 1" in done.stderr, done.stderr


def test_new_runs_start_from_the_weights_of_others():
    with tempfile.TemporaryDirectory() as root:
        first, second = os.path.join(root, "first"), os.path.join(root, "second")
        quietly(train_tokenizer.main, TINY + ["--out", first])
        last = os.path.join(first, "last.pt")
        options = TINY + ["--out", second, "--lr", "0", "--lr-final", "0", "--init-from", last]
        quietly(train_tokenizer.main, options + ["--repa-depth", "0"])
        assert torch.equal(weights_of(second), weights_of(first, "ema"))
        raises(ValueError, "has another architecture", quietly, train_tokenizer.main,
               options + ["--out", os.path.join(root, "third"), "--codebook-size", "64"])

        data = os.path.join(root, "data")
        make_folder(data, 3)  # two classes where there were ten
        options = TINY_AR + ["--tokenizer", last, "--codes", os.path.join(root, "codes"),
                             "--views", "0"]
        few = (lambda data, size: (train_tokenizer.Shapes(0, 30, size),
                                   train_tokenizer.Shapes(100, 4, size)))
        with patched(train_ar, "open_data", few):
            quietly(train_ar.main, options + ["--out", os.path.join(root, "ar")])
        quietly(train_ar.main, options + [
            "--data", data, "--out", os.path.join(root, "tuned"), "--lr", "0", "--lr-final", "0",
            "--init-from", os.path.join(root, "ar", "last.pt")])
        tuned = load_ar(os.path.join(root, "tuned", "last.pt"))
        start = load_ar(os.path.join(root, "ar", "last.pt"))
        assert torch.equal(tuned.head.weight, start.head.weight)
        assert len(tuned.class_embedding.weight) == 3 and len(start.class_embedding.weight) == 11
        assert not os.path.exists(os.path.join(root, "codes"))  # with 0 views, none are stored


def test_codes_go_on_where_they_were_killed():
    real, calls = train_ar.Tokenizer.encode, []

    def failing(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, images)

    def counting(self, images):
        encoded.append(len(images))
        return real(self, images)
    tokenizer, source = small_tokenizer(), train_tokenizer.Shapes(0, 40, 32)
    views, encoded = train_ar.Views(source, 32, 10), []
    with tempfile.TemporaryDirectory() as root:
        config = train_ar.TrainConfig(codes=root, views=10, workers=0, batch=4)
        unreadable = train_tokenizer.Unreadable(root, 40)
        with patched(train_ar.Tokenizer, "encode", failing), contextlib.suppress(KeyboardInterrupt):
            quietly(train_ar.read_codes, config, tokenizer, views, unreadable)
        with patched(train_ar.Tokenizer, "encode", counting):
            for _ in range(2):  # the second time, there is nothing left to do
                quietly(train_ar.read_codes, config, tokenizer, views, unreadable)
        assert sum(calls[:2]) == 10 * 24 and sum(encoded) == 10 * 16, (calls, encoded)
        name, = [name for name in os.listdir(root) if name.endswith("npy")]
        codes = np.load(os.path.join(root, name))
        for i in (0, 5, 39):
            expected = tokenizer.encode(views[i][0]).flatten().tolist()
            assert codes[i].tolist() == [i % 10] + expected
        batch = next(train_ar.stored_tokens(codes, config, 40, 3, 0, 1))
        numbers = [train_tokenizer.Shuffle(40, 0)[place] for place in range(12, 16)]
        assert batch[0].tolist() == [i % 10 for i in numbers]
        for tokens, i in zip(batch[1].tolist(), numbers):
            assert tokens in codes[i, 1:].reshape(10, 16).tolist()


def test_held_out_numbers_are_logged():
    with tempfile.TemporaryDirectory() as root:
        quietly(train_tokenizer.main, TINY + ["--out", root])
        with open(os.path.join(root, "log.jsonl")) as file:
            lines = [json.loads(line) for line in file]
    assert {"flow", "vq", "codebook", "memory_gb", "images_per_s"} <= set(lines[0])
    model, images = small_tokenizer(), pictures(3)
    numbers, picture = train_tokenizer.evaluate(model, images, 0)
    assert {*numbers} == {*lines[-1]} - {"step"} and len(numbers["flow_by_group"]) == 4
    noise = torch.randn(images.shape, generator=mt.seeded(0, 3))
    with torch.no_grad():
        expected = model(images, torch.full((3,), 0.5), noise)
    close(torch.tensor(numbers["flow_by_group"][2]), expected.flow_loss, 1e-5)
    close(torch.tensor(numbers["vq_by_group"][2]), expected.vq_loss, 1e-5)
    tokens = model.encode(images)
    rows = [len(set(tokens[:, i].tolist())) for i in range(16)]
    assert numbers["rows_by_position"] == rows


def test_presets_of_both_trainers_fit_together():
    for name in ("paper", "toy", "cifar"):
        _, tokenizer = train_tokenizer.PRESETS[name]
        ar = SIZES[train_ar.PRESETS[name][0].size]
        assert (ar.num_tokens, ar.vocab_size) == (tokenizer.num_tokens, tokenizer.codebook_size)
        with torch.device("meta"):
            Tokenizer(tokenizer), AR(ar)


def interrupted_run_ends_as_the_whole(module, options: list[str], root: str):
    """Asserts that a run that fails at step 4 and is started again ends with the weights of one
    that was not interrupted; returns the folder of the latter."""
    whole, halves = os.path.join(root, "whole"), os.path.join(root, "halves")
    quietly(module.main, options + ["--out", whole])
    with patched(module, "evaluate", None), contextlib.suppress(TypeError):
        quietly(module.main, options + ["--out", halves])
    assert torch.load(os.path.join(halves, "last.pt"), weights_only=True)["step"] == 2
    assert "step 2 of 4" in quietly(module.main, options + ["--out", halves])
    for part in ("model", "ema"):
        assert torch.equal(weights_of(whole, part), weights_of(halves, part))
    return whole


def test_tokenizer_training_resumes_exactly():
    with tempfile.TemporaryDirectory() as root:
        whole = interrupted_run_ends_as_the_whole(train_tokenizer, TINY + ["--reseed-after", "1"],
                                                  root)
        assert "reconstructions_000004.png" in os.listdir(whole)
        assert "lpips" not in sys.modules  # its weight is 0


def test_two_processes_and_two_passes_take_the_steps_of_one():
    """Sums of gradients differ by rounding, which Adam magnifies where gradients are near zero: so
    the weights must agree to a twentieth of the way they went."""
    with tempfile.TemporaryDirectory() as root:
        script = os.path.join(HERE, "train_tokenizer.py")
        options = TINY + ["--lr", "1e-3", "--warmup-steps", "1", "--ema", "0"]
        starts = {"one": [], "passes": ["--accumulate", "2"], "processes": None}
        for name, extra in starts.items():
            out = options + ["--out", os.path.join(root, name)]
            if extra is None:
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                            "--standalone", script]
                subprocess.run(torchrun + out, check=True, capture_output=True)
            else:
                quietly(train_tokenizer.main, out + extra)
        torch.manual_seed(0)
        start = Tokenizer(train_tokenizer.parse_config(train_tokenizer.PRESETS, options)[1])
        start = torch.cat([value.flatten() for value in start.state_dict().values()])
        one = weights_of(os.path.join(root, "one"))
        for name in ("passes", "processes"):
            way = (one - start).norm()
            assert (weights_of(os.path.join(root, name)) - one).norm() < 0.05 * way, name


def test_ar_training_resumes_exactly_and_its_checkpoint_samples():
    few = (lambda data, size: (train_tokenizer.Shapes(0, 30, size),
                               train_tokenizer.Shapes(100, 4, size)))
    with tempfile.TemporaryDirectory() as root, patched(train_ar, "open_data", few):
        tokenizer = os.path.join(root, "tokenizer")
        quietly(train_tokenizer.main, TINY + ["--out", tokenizer])
        tokenizer = os.path.join(tokenizer, "last.pt")
        options = TINY_AR + ["--dropout", "0.1", "--tokenizer", tokenizer,
                             "--codes", os.path.join(root, "codes")]
        whole = interrupted_run_ends_as_the_whole(train_ar, options, root)
        about, file = sorted(os.listdir(os.path.join(root, "codes")))
        codes = np.load(os.path.join(root, "codes", file))
        config = load_tokenizer(tokenizer).config
        assert codes.dtype == np.uint16 and codes.shape == (30, 1 + config.num_tokens)
        assert about.endswith(".json") and codes[:, 0].tolist() == [i % 10 for i in range(30)]
        picture = mt.to_tensor(train_tokenizer.Shapes(0, 30, config.image_size)[7][0])
        assert np.array_equal(load_tokenizer(tokenizer).encode(picture[None])[0], codes[7, 1:])

        # Another tokenizer, in the same place: noticed.
        checkpoint = torch.load(tokenizer, weights_only=True)
        checkpoint["ema"]["quantizer.codebook"] += 1
        torch.save(checkpoint, tokenizer)
        raises(ValueError, "was trained on another tokenizer", quietly, train_ar.main,
               options + ["--out", whole])

        checkpoint, grid = os.path.join(whole, "last.pt"), os.path.join(root, "grid.png")
        pictures = []
        for extra in (["--cfg", "1.1:3"], ["--cfg", "2", "--labels", "heart,3", "--top-k", "5"],
                      ["--cfg", "1.1:3"]):
            quietly(sample.main, ["--ckpt", checkpoint, "--num", "4", "--out", grid] + extra)
            pictures.append(Image.open(grid).copy())
        assert pictures[0].size == (4 * 48 + 6, 48) and pictures[1].size == (2 * 48 + 2, 2 * 48 + 2)
        assert pictures[0].tobytes() == pictures[2].tobytes()  # the same seed, the same picture
        raises(ValueError, "no class 'dog'", sample.main, ["--ckpt", checkpoint, "--labels", "dog"])
        raises(ValueError, "--cfg must be", sample.main, ["--ckpt", checkpoint, "--cfg", "a:b"])
        raises(ValueError, "not a checkpoint", load_ar, tokenizer)


# ---- Sampling ------------------------------------------------------------------------------------

def small_checkpoint(root: str) -> str:
    """A checkpoint of the two small models in random weights."""
    path = os.path.join(root, "ar.pt")
    mt.save_checkpoint(path, {"kind": "ar", "config": asdict(SMALL_AR), "ema": None,
                              "model": small_ar().state_dict(), "classes": list("abcde"),
                              "tokenizer": mt.pack_tokenizer(small_tokenizer())})
    return path


def draw(checkpoint: str, *options: str) -> str:
    cfg = [] if "--reconstruct" in options else ["--cfg", "1.1:3"]
    return quietly(sample.main, ["--ckpt", checkpoint, *cfg, *options])


def samples_in(path: str) -> np.ndarray:
    return np.load(path)["arr_0"]


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of uint8 pixels."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return int(np.abs(a.astype(int) - b).max())


def test_images_depend_on_seed_and_number_not_on_batches_or_processes():
    with tempfile.TemporaryDirectory() as root:
        checkpoint, found = small_checkpoint(root), {}
        for batch in ("1", "7", "20"):
            found[batch] = os.path.join(root, f"{batch}.npz")
            draw(checkpoint, "--num", "20", "--batch", batch, "--npz", found[batch])
        # Products of another number of rows are rounded otherwise, so pixels may differ by a level.
        for batch in ("1", "7"):
            assert levels_apart(samples_in(found[batch]), samples_in(found["20"])) <= 1
        two, script = os.path.join(root, "two.npz"), os.path.join(HERE, "sample.py")
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                        "--standalone", script, "--ckpt", checkpoint, "--cfg", "1.1:3", "--batch",
                        "7", "--num-images", "20", "--npz", two], check=True, capture_output=True)
        assert levels_apart(samples_in(two), samples_in(found["7"])) <= 1
        assert not [name for name in os.listdir(root) if "parts" in name or "tmp" in name]
        draw(checkpoint, "--num", "20", "--seed", "1", "--npz", os.path.join(root, "other.npz"))
        assert levels_apart(samples_in(os.path.join(root, "other.npz")), samples_in(two)) > 50


def test_interrupted_sampling_goes_on_and_ends_as_the_whole():
    with tempfile.TemporaryDirectory() as root:
        checkpoint, whole = small_checkpoint(root), os.path.join(root, "whole.npz")
        halves, real, calls = os.path.join(root, "halves.npz"), mt.to_uint8, []
        draw(checkpoint, "--num", "12", "--batch", "3", "--npz", whole)

        def failing(images):
            calls.append(len(images))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(images)
        options = "--num", "12", "--batch", "3", "--npz", halves
        with patched(sample, "to_uint8", failing):
            with contextlib.suppress(KeyboardInterrupt):
                draw(checkpoint, *options)
            raises(ValueError, "begun with other settings", draw, checkpoint, "--seed", "3",
                   *options)
            assert not os.path.exists(halves)
            draw(checkpoint, *options)
        assert len(calls) == 3 + 2  # two batches were kept, the third was lost
        assert np.array_equal(samples_in(whole), samples_in(halves))
        raises(ValueError, "is there already", draw, checkpoint, *options)


def test_each_class_is_drawn_equally_often_and_in_another_order():
    asked = []

    def noting(self, numbers, labels, prefix=None):
        asked.extend(labels)
        return iter([some_tokens(len(labels))])
    with tempfile.TemporaryDirectory() as root, patched(sample.Pipeline, "token_groups", noting):
        draw(small_checkpoint(root), "--num", "200", "--npz", os.path.join(root, "s.npz"))
    assert all(sorted(asked[i:i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 200, 5))
    assert len({tuple(asked[i:i + 5]) for i in range(0, 200, 5)}) > 10


def test_streamed_samples_end_as_those_drawn_at_once():
    with tempfile.TemporaryDirectory() as root:
        checkpoint, out = small_checkpoint(root), os.path.join(root, "s.png")
        draw(checkpoint, "--stream", "--num", "4", "--labels", "b,d", "--out", out)
        names = [f"s_{count:03d}.png" for count in (4, 8, 12, 16)]
        names += ["ar.pt", "s.gif", "s.png", "s_steps.png"]
        assert sorted(os.listdir(root)) == sorted(names)
        frames = Image.open(os.path.join(root, "s.gif"))
        assert frames.n_frames == 4 and Image.open(out).size == (4 * 64 + 6, 64)
        assert Image.open(os.path.join(root, "s_steps.png")).size == (4 * 64 + 6, 4 * 64 + 6)
        last, offline = np.array(Image.open(out)), os.path.join(root, "grid.png")
        draw(checkpoint, "--num", "4", "--labels", "b,d", "--out", offline)
        offline = np.array(Image.open(offline))                              # two columns
        for i in range(4):
            top, left = i // 2 * 66, i % 2 * 66
            assert levels_apart(offline[top:top + 64, left:left + 64],
                                last[:, i * 66:i * 66 + 64]) <= 1


def test_first_tokens_only_are_drawn_and_decoded():
    drawn = []

    class Counting(model_ar.Sampler):
        def predict(self, x, pos, length):
            drawn.append(pos)
            super().predict(x, pos, length)
    with tempfile.TemporaryDirectory() as root, patched(sample, "Sampler", Counting):
        checkpoint, path = small_checkpoint(root), os.path.join(root, "s.npz")
        draw(checkpoint, "--num", "2", "--tokens", "8", "--npz", path)
        assert len(drawn) == 8
        keys = torch.tensor([mt.seed_of(0, 9, 0), mt.seed_of(0, 9, 1)])
        labels = torch.tensor(np.random.default_rng((0, 10, 0)).permutation(5)[:2])
        tokens = small_ar().generate(labels, (1.1, 3.0), keys=keys)
        noise = mt.noise_of(0, 8, [0, 1], (3, 32, 32), "cpu")
        expected = mt.to_uint8(small_tokenizer().decode(tokens, noise, groups=2))
        assert levels_apart(samples_in(path), expected) <= 1


def test_layouts_keep_the_first_tokens_of_the_reference():
    with tempfile.TemporaryDirectory() as root:
        checkpoint, out = small_checkpoint(root), os.path.join(root, "s.png")
        path, image = os.path.join(root, "image.png"), mt.image_grid(pictures(1), 1)
        image.save(path)
        draw(checkpoint, "--prefix", path, "--keep", "0,5,16", "--labels", "a,c", "--out", out)
        grid = mt.to_tensor(Image.open(out))
        cells = [[grid[:, 66 * row:66 * row + 64:2, 66 * column:66 * column + 64:2]
                  for column in range(3)] for row in range(3)]
        reference = mt.to_tensor(mt.center_crop(image, 32))
        tokenizer, labels = small_tokenizer(), torch.tensor([0, 2])
        tokens = tokenizer.encode(reference[None]).expand(2, -1)
        noise = mt.noise_of(0, 8, [0, 1], (3, 32, 32), "cpu")
        keys = torch.tensor([mt.seed_of(0, 9, 0), mt.seed_of(0, 9, 1)])
        for row, kept in enumerate((0, 5, 16)):
            drawn = small_ar().generate(labels, (1.1, 3.0), tokens[:, :kept], keys=keys)
            assert torch.equal(drawn[:, :kept], tokens[:, :kept])
            expected = tokenizer.decode(drawn, noise).clamp(-1, 1)
            close(cells[row][0], reference, 0.01)                            # a level of 255
            close(torch.stack(cells[row][1:]), expected, 0.02)


def test_reconstructions_come_with_the_same_crops_and_psnr():
    with tempfile.TemporaryDirectory() as root:
        checkpoint, folder = small_checkpoint(root), os.path.join(root, "images")
        make_folder(folder, 5)
        said = draw(checkpoint, "--reconstruct", folder, "--batch", "4", "--out",
                    os.path.join(root, "r.png"))
        originals = samples_in(os.path.join(root, "r_originals.npz"))
        decoded = samples_in(os.path.join(root, "r_reconstructions.npz"))
        paths = sample.find_images(folder)
        assert originals.shape == decoded.shape == (10, 32, 32, 3) and len(paths) == 10
        for path, original in zip(paths, originals):
            assert np.array_equal(mt.center_crop(Image.open(path), 32), original)
        error = ((originals / 255.0 - decoded / 255.0) ** 2).mean((1, 2, 3))
        assert f"PSNR {np.mean(-10 * np.log10(error)):.2f} dB over 10 images" in said
        with open(paths[3], "w") as file:
            file.write("no image")
        raises(ValueError, f"{paths[3]} cannot be read", draw, checkpoint, "--reconstruct", folder,
               "--out", os.path.join(root, "other.png"))
        assert not [name for name in os.listdir(root) if "other" in name]


def test_compiled_generation_draws_the_same_tokens():
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise unittest.SkipTest("no C++ compiler")
    model = randomised(AR(replace(SMALL_AR, depth=1)))
    labels, keys = torch.tensor([0, 1, 4]), torch.tensor([5, 6, 7])
    expected = model.generate(labels, (1.1, 3.0), some_tokens(3)[:, :2], keys=keys)
    sampler = model_ar.Sampler(model, 3, (1.1, 3.0), chunk=8, compiled=True)
    for _ in range(2):  # state is kept between calls
        chunks = [*sampler.stream(labels, some_tokens(3)[:, :2], keys)]
        assert torch.equal(torch.cat(chunks, 1), expected) and len(chunks) == 2


def test_benchmark_prints_rates_and_floors():
    with tempfile.TemporaryDirectory() as root, patched(sample, "seconds_of", lambda call, _: (
            call(), 0.5)[1]):
        said = draw(small_checkpoint(root), "--benchmark", "--batch", "2")
        assert "AR: 64.0 tokens/s, 4 images/s" in said and "together: 2 images/s" in said
        said = quietly(sample.main, ["--benchmark", "--size", "toy", "--batch", "2"])
        assert "guidance off" in said and "peak memory" in said


def test_sampling_mistakes_get_one_clear_line():
    with tempfile.TemporaryDirectory() as root:
        checkpoint, empty = small_checkpoint(root), os.path.join(root, "empty")
        os.makedirs(empty)
        for text, options in (
                ("--cfg must be", "--cfg 1:2:3"), ("no class 'dog'", "--labels dog"),
                ("no class '5'", "--labels 5"), ("--keep must be", "--prefix %s --keep 17"),
                ("--keep must be", "--prefix %s --keep x"), ("--keep needs --prefix", "--keep 4"),
                ("--out must end in", "--out x.gif"), ("--cfg must be", "--cfg nan"),
                ("--num must be", "--num 0"), ("no meaning with --prefix", "--prefix %s --num 3"),
                ("--top-k must be", "--top-k -1"), ("--tokens must be a multiple", "--tokens 6"),
                ("no meaning with --stream", "--stream --steps 4"),
                ("up to --batch", "--stream --num 101"), ("--seed must be", "--seed -1"),
                ("no images in", f"--reconstruct {empty}"), ("--top-p must be", "--top-p 0"),
                ("cannot be read", "--prefix %s" % checkpoint)):
            image = os.path.join(root, "image.png")
            mt.image_grid(pictures(1), 1).save(image)
            raises(ValueError, text, draw, checkpoint, *options.replace("%s", image).split())
        for text, options in (("no image at", "--prefix nowhere"),
                              ("no folder nowhere", "--reconstruct nowhere")):
            raises(FileNotFoundError, text, draw, checkpoint, *options.split())
        raises(FileNotFoundError, "no checkpoint at", draw, "nowhere.pt")
        tokenizer = os.path.join(root, "tokenizer.pt")
        mt.save_checkpoint(tokenizer, mt.pack_tokenizer(small_tokenizer()))
        raises(ValueError, "is not a checkpoint of kind 'ar'", draw, tokenizer)


# ---- Losses of other networks --------------------------------------------------------------------

def test_losses_without_weights_name_the_file_and_the_way_round():
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")
    with tempfile.TemporaryDirectory() as root, patched(torch.hub, "urlopen", offline), \
            patched(torch.hub, "_hub_dir", root), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, on the way lpips calls it
        raises(ValueError, "--repa 0 trains without", train_tokenizer.RepaLoss)
        raises(ValueError, "--lpips 0 trains without", train_tokenizer.PerceptualLoss)


def test_perceptual_and_alignment_losses_run_on_weights_in_their_place():
    """Random weights of the real shapes, where torch.hub keeps the real ones."""
    import torchvision
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).state_dict()
    weights = {name: torch.randn(value.shape) / max(1, value[0].numel()) ** 0.5
               if name.startswith("features") else torch.zeros(1).expand(value.shape)
               for name, value in shapes.items()}
    hubconf = ("import torch\n"
               "class Net(torch.nn.Module):\n"
               "    def __init__(self):\n"
               "        super().__init__()\n"
               "        self.patch = torch.nn.Conv2d(3, 768, 14, 14)\n"
               "    def forward_features(self, x):\n"
               "        return {'x_norm_patchtokens': self.patch(x).flatten(2).mT}\n"
               "def dinov2_vitb14(**kwargs):\n"
               "    return Net()\n")

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")
    with tempfile.TemporaryDirectory() as root, patched(torch.hub, "urlopen", offline), \
            patched(torch.hub, "_hub_dir", root), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, on the way lpips calls it
        os.makedirs(os.path.join(root, "checkpoints"))
        torch.save(weights, os.path.join(root, "checkpoints", "vgg16-397923af.pth"))
        os.makedirs(os.path.join(root, "facebookresearch_dinov2_main"))
        with open(os.path.join(root, "facebookresearch_dinov2_main", "hubconf.py"), "w") as file:
            file.write(hubconf)
        lpips, repa = train_tokenizer.PerceptualLoss(), train_tokenizer.RepaLoss()
        log = quietly(train_tokenizer.main, TINY + [
            "--out", os.path.join(root, "out"), "--diffusion-depth", "2", "--repa-depth", "1",
            "--lpips", "0.5", "--repa", "0.5"])
        assert "lpips" in log and "repa" in log and "psnr" in log
    images, other = pictures(2, 64), pictures(4, 64)[2:].requires_grad_()
    assert not lpips.net.training and not any(p.requires_grad for p in lpips.parameters())
    assert lpips(images, images) == 0
    distance = lpips(other, images)
    assert distance > 0 and torch.autograd.grad(distance, other)[0].abs().max() > 0

    normal = (images / 2 + 0.5 - repa.mean) / repa.std
    small = F.interpolate(normal, size=(56, 56), mode="bicubic")
    features = repa.net.forward_features(small)["x_norm_patchtokens"]        # (2, 16, 768)
    assert abs(repa(features, images)) < 1e-5 and abs(repa(-features, images) - 2) < 1e-5


# ---- The authors' released files -----------------------------------------------------------------

def needs_fixtures(test):
    """Skips a test where the folder of the released code's outputs is missing."""
    def skipping():
        if not os.path.isdir(FIXTURES):
            raise unittest.SkipTest("no fixtures")
        test()
    skipping.__name__ = test.__name__
    return skipping


def fixture(name: str):
    """A .npz or .json of the fixtures, arrays as tensors."""
    path = os.path.join(FIXTURES, name)
    if name.endswith(".json"):
        with open(path) as file:
            return json.load(file)
    return {key: torch.from_numpy(value) if value.dtype.kind in "fi" else value
            for key, value in np.load(path, allow_pickle=False).items()}


def released(kind: str):
    """The path of a file laid out as the authors'."""
    return os.path.join(FIXTURES, f"released_style_{kind}.pt")


@needs_fixtures
def test_released_tokenizer_encodes_and_decodes_as_the_authors_code():
    model, io = load_tokenizer(released("tok")), fixture("tokA_io.npz")
    codes, noise = io["codes"], io["x0_noise"]
    assert torch.equal(model.encode(io["x"]), codes)
    begin = int(io["core_begin"])
    with torch.no_grad():
        close(model.encoder(io["x"]), io["z_prequant"], 3e-5)
        close(model.condition(codes), io["cond"], 3e-5)
        v, _ = model.diffusion(noise, io["core_t"], io["cond"][:, begin:begin + 32])
    close(v, io["core_velocity"], 3e-5)
    close(model.decode(codes, noise), io["sample_adams2_full"], 3e-5)
    close(list(model.stream(codes.split(32, 1), noise))[-1], io["sample_adams2_full"], 3e-5)
    codes, noise = codes[:1], noise[:1]
    close(model.decode(codes, noise, solver="euler"), io["sample_euler_full"], 3e-5)
    close(model.decode(codes, noise, groups=1, solver="euler"), io["sample_euler_clip1"], 3e-5)
    for solver in ("adams2", "euler"):
        decoded = model.decode(codes, noise, groups=4, solver=solver)
        close(decoded, io[f"sample_{solver}_clip"], 3e-5)


@needs_fixtures
def test_released_training_rule_gives_the_authors_losses_and_gradients():
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
            close(output.images.detach(), io["train_fake"], 3e-5)
            (output.flow_loss + output.vq_loss).backward()
    weights = {str(name): torch.tensor(norm) for name, norm in zip(io["grad_names"],
                                                                   io["grad_norms"].tolist())}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    compared = 0
    for name, norm in mt.translate(weights, "gradients").items():
        if norm > 1e-6:  # biases of normalised keys have none but rounding
            assert abs(gradients[name].norm() / norm - 1) < 1e-4, name
            compared += 1
    assert compared > 150


@needs_fixtures
def test_released_ar_model_predicts_and_generates_as_the_authors_code():
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


@needs_fixtures
def test_small_pieces_agree_with_the_authors_code():
    io = fixture("unit.npz")
    rope = mt.rope_2d(3, 5, 64, "cpu")
    close(mt.rotate(io["rope2d_q_in"], rope), io["rope2d_q_out"], 1e-5)
    rope = model_ar.rope_1d(12, 64, 10000.0)
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


@needs_fixtures
def test_every_released_tensor_finds_its_place():
    layout = fixture("released_checkpoint_layout.json")
    with torch.device("meta"):
        for name, entry in layout.items():
            weights = {key: torch.empty(shape) for key, shape in entry["state_dict"].items()}
            if name == "tokenizer_v1":
                weights = mt.translate({"ema": weights}, name)
                config = mt.released_config({}, weights, name)
                assert config == TOKENIZERS["paper"]
                model = Tokenizer(config)
            else:
                weights = model_ar.translate({"model": weights}, name)
                config = model_ar.released_config(weights, 256, name)
                assert config == SIZES[name.removeprefix("GPT-")]
                model = AR(config)
            own = {key: value.shape for key, value in model.state_dict().items()}
            assert {key: value.shape for key, value in weights.items()} == own
            total = sum(value.numel() for value in weights.values())
            assert total == entry["total_parameters"]


@needs_fixtures
def test_sampling_from_released_files_draws_what_the_library_draws():
    with tempfile.TemporaryDirectory() as root:
        out = os.path.join(root, "grid.png")
        quietly(sample.main, ["--ckpt", released("ar"), "--tokenizer", released("tok"), "--labels",
                              "3,7", "--num", "2", "--cfg", "1.1:8", "--seed", "5", "--out", out])
        ar, tokenizer = load_ar(released("ar")), load_tokenizer(released("tok"))
        keys = torch.tensor([mt.seed_of(5, 9, 0), mt.seed_of(5, 9, 1)])
        tokens = ar.generate(torch.tensor([3, 7]), (1.1, 8.0), keys=keys)
        size = tokenizer.config.image_size
        images = tokenizer.decode(tokens, mt.noise_of(5, 8, [0, 1], (3, size, size), "cpu"))
        assert Image.open(out).tobytes() == mt.image_grid(images, 2).tobytes()
        raises(ValueError, "give --tokenizer FILE", sample.main, ["--ckpt", released("ar")])


@needs_fixtures
def test_released_files_of_all_layouts_load_and_misfits_are_named():
    weights = mt.read_file(released("ar"))["model"]
    bare = {name.removeprefix("_orig_mod."): value for name, value in weights.items()}
    expected = load_ar(released("ar")).state_dict()
    with tempfile.TemporaryDirectory() as root:
        path = os.path.join(root, "model.pt")
        for layout in (bare, {"module": bare}, {"state_dict": weights}):
            torch.save(layout, path)
            found = load_ar(path).state_dict()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        torch.save({**bare, "odd": bare["norm.weight"]}, path)
        raises(ValueError, "odd", load_ar, path)
        del bare["layers.1.ffn_norm.weight"]
        bare["norm.weight"] = torch.ones(3)
        torch.save(bare, path)
        raises(ValueError, "blocks.1.ffn_norm.weight", load_ar, path)
        raises(ValueError, "norm.weight: copying a param with shape", load_ar, path)
        raises(ValueError, "give --tokenizer", load_tokenizer, path)
        raises(ValueError, "is no autoregressive model", load_ar, released("tok"))

        # Settings in a plain dict: other numbers are honoured, other kinds refused by name.
        config = fixture("tokA_config.json")
        saved = {"model": mt.read_file(released("tok"))["ema"], "config": config}
        config["model"].update(num_query_groups=4, queries_per_step=64, num_denoising_steps=6)
        config["model"]["diff_decoder"].update(data_std=0.5, time_shift=3)
        torch.save(saved, path)
        found = load_tokenizer(path).config
        assert (found.num_groups, found.num_steps, found.sigma, found.beta) == (4, 6, 0.5, 3)
        for setting, value in (("share_time_encoding", True), ("novelty", 1), ("cond_dim", 64)):
            settings = {**config["model"]["diff_decoder"], setting: value}
            torch.save({**saved, "config": {"model": {**config["model"],
                                                      "diff_decoder": settings}}}, path)
            raises(ValueError, f"diff_decoder.{setting} = {value} is not", load_tokenizer, path)
        del saved["model"]["encoder_layers.1.norm1.bias"]
        torch.save(saved, path)
        raises(ValueError, "encoder.blocks.1.norm1.bias", load_tokenizer, path)

        # One diffusion block: no block follows the REPA head, which is left out.
        weights = mt.read_file(released("tok"))["ema"]
        weights = {name: value for name, value in weights.items() if ".blocks.1." not in name}
        torch.save(weights, path)
        assert load_tokenizer(path).config == replace(
            load_tokenizer(released("tok")).config, diffusion_depth=1, num_steps=0, repa_depth=0,
            repa_hidden=load_tokenizer(path).config.repa_hidden)


class Harmful:
    """Unpickling this object would create a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_with_other_objects_are_refused_and_nothing_in_them_runs():
    with tempfile.TemporaryDirectory() as root:
        path, created = os.path.join(root, "model.pt"), os.path.join(root, "created")
        for harmful in (Harmful(created), {"model": {}, "args": Harmful(created)}):
            torch.save(harmful, path)
            for load in (load_ar, load_tokenizer):
                raises(ValueError, "no readable checkpoint: it holds an object of", load, path)
            with open(path, "wb") as file:
                pickle.dump(harmful, file, protocol=2)
            for load in (load_ar, load_tokenizer):
                raises(ValueError, "no readable checkpoint", load, path)
        assert not os.path.exists(created)
        with open(path, "rb") as file:
            pickle.load(file)  # ... which runs it
        assert os.path.exists(created)


# ---- Mistakes and files --------------------------------------------------------------------------

def test_mistakes_get_one_clear_line():
    raises(FileNotFoundError, "no folder nowhere", train_tokenizer.main, ["--data", "nowhere"])
    raises(ValueError, "cannot be split", train_tokenizer.main, ["--preset", "toy", "--batch", "5",
                                                                 "--accumulate", "2"])
    raises(ValueError, "multiple of num_groups", train_tokenizer.main, ["--num-groups", "7"])
    raises(ValueError, "--size must be one of", train_ar.main, ["--size", "S"])
    raises(FileNotFoundError, "no checkpoint at", train_ar.main, ["--tokenizer", "nowhere.pt"])
    raises(FileNotFoundError, "no checkpoint at", sample.main, ["--ckpt", "nowhere.pt"])
    model, tokens = small_tokenizer(), some_tokens()
    raises(ValueError, "solver must be", model.decode, tokens, solver="heun")
    raises(ValueError, "1 <= groups <= 4", model.decode, tokens, groups=5)
    raises(ValueError, "tokens must be (B, n) with 16", model.decode, tokens[:, :8])
    raises(ValueError, "noise must be (2, 3", model.decode, tokens, torch.zeros(3, 3, 32, 32))
    raises(ValueError, "labels must be in", small_ar().generate, torch.tensor([6]))
    raises(ValueError, "a group must be (B, 4)", list, model.stream(tokens.split(8, 1)))
    raises(ValueError, "--log-every must be", train_tokenizer.main, ["--preset", "toy",
                                                                     "--log-every", "0"])
    raises(ValueError, "prefix must be", small_ar().generate, torch.tensor([1]), None, tokens)


def test_checkpoints_are_whole_or_refused():
    with tempfile.TemporaryDirectory() as root:
        path, model = os.path.join(root, "t.pt"), small_tokenizer()
        mt.save_checkpoint(path, mt.pack_tokenizer(model))
        images, noise = pictures(), torch.randn(2, 3, 32, 32)
        loaded = load_tokenizer(path)
        assert torch.equal(loaded.decode(loaded.encode(images), noise),
                           model.decode(model.encode(images), noise))
        assert os.listdir(root) == ["t.pt"]
        raises(ValueError, "is not a checkpoint", load_ar, path)
        with open(path, "rb") as file:
            half = file.read(os.path.getsize(path) // 2)
        with open(path, "wb") as file:
            file.write(half)
        raises(ValueError, "no readable checkpoint", load_tokenizer, path)


def test_importing_does_nothing():
    code = ("import sys; sys.argv = ['x', '--odd']; import train_ar, sample; "
            "assert not {'lpips', 'torchvision'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=HERE)
    assert done.returncode == 0 and done.stdout == "", done.stderr


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
    with open(path) as file:
        return json.load(file)


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
    assert torch.equal(fid.resize(images), images)
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


def test_weights_are_loaded_strictly_and_their_hash_is_checked():
    with tempfile.TemporaryDirectory() as root:
        path, weights = os.path.join(root, "random.pth"), random_inception().state_dict()
        torch.save(weights, path)
        loaded = fid.load_inception(path).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in weights.items())
        with open(path, "rb") as file:
            digits = hashlib.sha256(file.read()).hexdigest()[:8]
        named, misnamed = (os.path.join(root, f"x-{hash}.pth") for hash in (digits, "01234567"))
        os.rename(path, named)
        fid.load_inception(named)
        os.rename(named, misnamed)
        raises(ValueError, "sha256", fid.load_inception, misnamed)
        weights["AuxLogits.fc.bias"] = weights.pop("fc.bias")
        torch.save(weights, path)
        raises(ValueError, "AuxLogits.fc.bias", fid.load_inception, path)
        with open(path, "wb") as file:
            file.write(b"no weights")
        raises(ValueError, path, fid.load_inception, path)

        def offline(*args):
            raise urllib.error.URLError("no network")

        with patched(torch.hub, "get_dir", lambda: root), \
                patched(torch.hub, "download_url_to_file", offline):
            place = os.path.join(root, "checkpoints", "pt_inception-2015-12-05-6726825d.pth")
            raises(FileNotFoundError, f"at {place}; fetch {fid.WEIGHTS}", fid.load_inception)


def test_statistics_are_numpys_for_any_split_into_batches():
    rows = torch.from_numpy(gaussian(501, 7, 0)).float()
    for size in (1, 2, 100, 501):
        statistics = fid.Statistics(7)
        for part in rows.split(size):
            statistics.add(part)
        for found, expected in zip(statistics.moments(), moments(rows.double().numpy())):
            assert np.allclose(found, expected, rtol=1e-12, atol=1e-13)
    raises(ValueError, "2 images or more; got 0", fid.Statistics(7).moments)


def test_frechet_distance_of_known_gaussians():
    eye, zero = np.eye(5), np.zeros(5)
    assert np.isclose(fid.frechet_distance(zero, eye, zero + 3, eye), 45)
    assert fid.frechet_distance(zero, 0 * eye, zero + 1, eye) == 10
    # Covariances that commute: the squared differences of the standard deviations.
    a, b, q = np.array([1., 2, 3, 0, 2]), np.array([2., 1, 0, 0, 2]), np.linalg.qr(eye + 1)[0]
    found = fid.frechet_distance(zero, q * a ** 2 @ q.T, zero + 1, q * b ** 2 @ q.T)
    assert np.isclose(found, 11 + 5, rtol=1e-7)  # the root of a rounded 0 is 1e-8


def test_frechet_distance_equals_scipys_sqrtm_also_of_few_samples():
    x, y = gaussian(300, 40, 2), gaussian(200, 40, 3) * 1.1
    (mu1, sigma1), (mu2, sigma2) = moments(x), moments(y)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert np.isclose(fid.frechet_distance(mu1, sigma1, mu2, sigma2), expected, rtol=1e-10)
    few, others = x[:12], y[:15]  # ranks 11 and 14: tr (...)^(1/2) by singular values instead
    cross = (few - few.mean(0)) @ (others - others.mean(0)).T / np.sqrt(11 * 14)
    (mu1, sigma1), (mu2, sigma2) = moments(few), moments(others)
    expected = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2)
    expected -= 2 * np.linalg.svd(cross, compute_uv=False).sum()
    assert np.isclose(fid.frechet_distance(mu1, sigma1, mu2, sigma2), expected, rtol=1e-7)
    for rows in (x, few):
        assert fid.frechet_distance(*moments(rows), *moments(rows)) < 1e-10


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


def test_precision_and_recall_of_equal_disjoint_and_mode_dropping_sets():
    x, y = (torch.from_numpy(gaussian(300, 4, seed)).float() for seed in (5, 6))
    assert fid.precision_recall(x, x) == (1, 1)
    assert fid.precision_recall(x, x + 100) == (0, 0)
    fivefold = torch.rand(5, 2048, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    assert fid.precision_recall(fivefold, fivefold[:17]) == (1, 1)  # balls of radius 0
    precision, recall = fid.precision_recall(torch.cat([x, x + 100]), y)
    assert precision > 0.8 and recall <= 0.5
    assert fid.precision_recall(y, torch.cat([x, x + 100])) == (recall, precision)
    raises(ValueError, "need 4 images or more", fid.precision_recall, x[:3], x)


def test_precision_and_recall_equal_brute_force():
    lattice = torch.cartesian_prod(*[torch.arange(4.)] * 3)  # with ties: balls hold their edge
    pairs = [(lattice[::2], lattice[::3], 3)]
    for k, offset in ((3, 0), (1, 0), (3, 1000)):  # there, float32 would lose the distances
        pairs.append((torch.from_numpy(gaussian(150, 6, 7) + offset).float(),
                      torch.from_numpy(gaussian(130, 6, 8) * 1.3 + offset).float(), k))
    for x, y, k in pairs:
        with patched(fid, "CHUNK", 1000):
            found = fid.precision_recall(x, y, k)
        assert found == brute_force(x.double().numpy(), y.double().numpy(), k)


def test_images_of_an_npz_are_never_read_as_a_whole():
    images = noise_images(600, size=(64, 64))                                # 7.4 MB
    with tempfile.TemporaryDirectory() as root:
        path = os.path.join(root, "images.npz")
        for save in (np.savez, np.savez_compressed):
            save(path, images)
            tracemalloc.start()
            side = fid.Side(path)
            for first in (*range(0, 600, 10), 30):
                assert np.array_equal(side.read(first, first + 10), images[first:first + 10])
            assert side.count == 600 and tracemalloc.get_traced_memory()[1] < 2e6
            tracemalloc.stop()


def test_figures_of_files_are_those_of_the_functions():
    x, y = noise_images(40, 1), noise_images(30, 2)
    with tempfile.TemporaryDirectory() as root:
        reference, samples, stats, both, out = (
            os.path.join(root, name) for name in ("x", "y.npz", "stats.npz", "both.npz", "f.json"))
        save_images(reference, x)
        os.makedirs(os.path.join(reference, "0"))
        os.rename(os.path.join(reference, "00000.png"), os.path.join(reference, "0", "x.png"))
        assert np.array_equal(fid.Side(reference).read(0, 40), x)  # in sorted order
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
        assert not [name for name in os.listdir(root) if name.endswith(".tmp")]


def test_two_processes_give_the_figures_of_one():
    with tempfile.TemporaryDirectory() as root:
        reference, samples, script, one, two = (
            os.path.join(root, name) for name in ("x", "y.npz", "tiny.py", "1.json", "2.json"))
        save_images(reference, noise_images(21, 3))
        np.savez_compressed(samples, noise_images(33, 4))
        tiny_fid(reference, samples, "--json", one)
        with open(script, "w") as file:
            file.write(f"import sys\nsys.path.insert(0, {HERE!r})\n"
                       f"import test_shapes as tests\n"
                       "tests.tiny_fid(*sys.argv[1:])\n")
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               "--nproc_per_node=2", script, reference, samples, "--json", two,
                               "--batch", "4"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        one, two = read_json(one), read_json(two)
        assert list(one) == list(two) and len(one) == 6
        assert np.allclose(list(one.values()), list(two.values()), rtol=1e-5)


def test_mistakes_of_evaluation_get_one_line_before_the_network_runs():
    def refuses(text, *argv, kind=ValueError):
        with contextlib.redirect_stdout(io.StringIO()), patched(fid, "load_inception", None):
            raises(kind, text, fid.main, list(argv))

    with tempfile.TemporaryDirectory() as root:
        def at(name):
            return os.path.join(root, name)

        x, good = noise_images(6), at("good.npz")
        np.savez(good, x)
        refuses("no file or folder", at("nowhere"), good, kind=FileNotFoundError)
        refuses("give REFERENCE and SAMPLES", good)
        refuses("cannot write", good, good, "--json", at("no/f.json"))
        for wrong in (x / 255, x[..., :1], x[0], x.transpose(0, 3, 1, 2), x.astype(object)):
            np.savez(at("wrong.npz"), wrong)
            refuses("arr_0 must be uint8 (N, H, W, 3)", at("wrong.npz"), good)
        with open(good, "rb") as file, open(at("cut.npz"), "wb") as cut:
            cut.write(file.read()[:1000])
        refuses("cut.npz: File is not a zip file", at("cut.npz"), good)
        three = dict.fromkeys(fid.STATISTICS, np.zeros(3))
        for text, arrays in (("1 images", {"arr_0": x[:1]}), ("it holds images", {"images": x}),
                             ("it holds mu", {"mu": np.zeros(2048)}), ("of another net", three)):
            np.savez(at("wrong.npz"), **arrays)
            refuses(text, at("wrong.npz"), good)

        # Folders: the file at fault is named.
        os.makedirs(at("empty/inner"))
        refuses("empty: 0 images", at("empty"), good)
        save_images(at("folder"), x)
        os.makedirs(at("folder/z"))
        for wrong in (Image.fromarray(x[0, 1:]), *(Image.new(mode, (10, 12)) for mode in
                                                   ("L", "P", "RGBA", "I;16", "1"))):
            wrong.save(at("folder/z/wrong.png"))
            refuses("wrong.png: ", at("folder"), good)
        with open(at("folder/z/wrong.png"), "wb") as file:
            file.write(b"no image")
        refuses("wrong.png: cannot identify", good, at("folder"))
        with open(at("folder/00003.png"), "rb") as whole, \
                open(at("folder/z/wrong.png"), "wb") as file:
            file.write(whole.read()[:200])  # seen only when it is decoded
        raises(ValueError, "wrong.png: ", tiny_fid, at("folder"), good)
        save_images(at("lossy"), x, ".jpg")
        assert "holds JPEGs" in tiny_fid(good, at("lossy"))

        # Exchanged sides: surely, or perhaps.
        tiny_fid(good, "--save-stats", at("stats.npz"))
        with np.load(at("stats.npz")) as file:
            np.savez(at("both.npz"), x, **file)
        with patched(fid, "POOL", 8), patched(fid, "SPATIAL", 6):
            refuses("the order is REFERENCE SAMPLES", good, at("stats.npz"))
            refuses("the order is REFERENCE SAMPLES", at("both.npz"), at("both.npz"))
            refuses("statistics already", at("both.npz"), "--save-stats", at("s.npz"))
        np.savez(at("few.npz"), x[:5])
        assert "few.npz the REFERENCE?" in tiny_fid(good, at("few.npz"))


def main():
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    failed = skipped = 0
    for name, test in tests:
        began = time.time()
        try:
            test()
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
