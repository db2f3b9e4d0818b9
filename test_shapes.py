"""Tests of everything that can be checked on a CPU without the network.

    python test_shapes.py            or            python -m pytest test_shapes.py

Small models in random weights, none of them zero, so that every path matters; and runs of both
trainers, of eight steps each. `tmp_path` is an empty folder that is removed after the test.
"""
import contextlib
import copy
import functools
import inspect
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
import warnings
from collections import Counter
from dataclasses import replace
from os.path import join
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial.distance import cdist
from torch._subclasses.fake_tensor import FakeTensorMode

import fid
import model_ar
import model_tokenizer as mt
import sample
import train_ar
import train_tokenizer
from model_ar import AR, SIZES, ARConfig
from model_tokenizer import TOKENIZERS, Tokenizer, TokenizerConfig
from sample import Mistake, load_ar, load_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = TokenizerConfig(
    image_size=32, num_tokens=16, num_groups=4, codebook_size=64, patch_size=8,
    encoder_width=32, encoder_depth=2, decoder_width=64, decoder_depth=2,
    diffusion_width=96, diffusion_depth=3, diffusion_patch=4, head_dim=16, max_tokens=20,
    repa_depth=2, repa_hidden=24, repa_dim=12,
    beta=3.0)
SMALL_AR = ARConfig(
    depth=3, width=48, heads=3, num_tokens=16, vocab_size=64, num_classes=5, dropout=0.0)
# Command lines of training runs that take a second or two
TINY = ("--preset toy --steps 8 --batch 4 --log-every 1 --eval-every 8 --save-minutes 0 "
        "--eval-images 4").split()
TRAINERS = {"tokenizer": train_tokenizer, "ar": train_ar}
KEPT = tempfile.TemporaryDirectory()  # for what several tests read; removed at the end
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU, also where there is a GPU
torch.set_num_threads(1)  # two threads of such small models mostly wait for one another


def randomised(model):
    """The model with all weights drawn anew, so that no gate, bias or output layer is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    return model.eval()


def small_tokenizer():
    return randomised(Tokenizer(SMALL))


def small_ar():
    return randomised(AR(SMALL_AR))


def pictures(batch=2, size=32):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def some_tokens(batch=2):
    return torch.randint(64, (batch, 16), generator=torch.Generator().manual_seed(3))


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=float(tolerance))


def raises(text, function, *args, kind=Mistake):
    """Asserts that the call raises an error of this kind with this text."""
    with unittest.TestCase().assertRaisesRegex(kind, re.escape(text)):
        function(*args)


def quietly(function, *args):
    """Calls the function and returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue()


# ---- Agreement with the authors' code ------------------------------------------------------------

def fixture(name):
    """The path of a file of the released code, or what an npz holds. Skips the test without it."""
    path = join(HERE, "../shared/fixtures", name)
    if not os.path.exists(path):
        raise unittest.SkipTest("no fixtures")
    if not name.endswith(".npz"):
        return path
    return {key: torch.from_numpy(value) if value.dtype.kind in "fi" else value
            for key, value in np.load(path).items()}


def test_released_tokenizer_encodes_and_decodes_as_the_authors_code():
    model, io = load_tokenizer(fixture("released_style_tok.pt")), fixture("tokA_io.npz")
    codes = io["codes"]
    assert torch.equal(model.encode(io["x"]), codes)
    # Float32 rounding of numbers up to 10
    close(model.decode(codes, io["x0_noise"]), io["sample_adams2_full"], 3e-5)


def test_released_training_rule_gives_the_authors_losses_and_gradients():
    """Tolerances are of float32 rounding; norms of gradients sum more of it."""
    model, io = load_tokenizer(fixture("released_style_tok.pt")), fixture("tokA_io.npz")
    output = model(io["x"], io["train_u"][0], io["train_noise"])
    close(output.flow_loss, io["train_fm_loss"][0], 1e-5)
    (output.flow_loss + output.vq_loss).backward()
    norms = dict(zip(io["grad_names"].tolist(), io["grad_norms"][:, None]))
    for name, norm in sample.translate(norms)["model"].items():
        if norm > 1e-6:  # biases of normalised keys have none but rounding
            assert abs(model.get_parameter(name).grad.norm() / norm - 1) < 1e-4, name


def test_released_ar_model_predicts_and_generates_as_the_authors_code():
    model, io = load_ar(fixture("released_style_ar.pt")), fixture("arA_io.npz")
    with torch.no_grad():  # float32 rounding
        close(model(io["tf_labels"], io["tf_tokens"]), io["tf_logits"], 5e-4)
    tokens = model.generate(io["gen_labels"], (1.1, 8.0), temperature=0.0)
    assert torch.equal(tokens, io["gen_cfg1.1_8_tokens"])


def test_every_released_tensor_finds_its_place():
    layouts = json.loads(Path(fixture("released_checkpoint_layout.json")).read_text())
    for name, entry in layouts.items():
        weights = {key: torch.empty(shape, device="meta")
                   for key, shape in entry["state_dict"].items()}
        saved = sample.translate({"ema": weights})
        if name == "tokenizer_v1":
            assert TokenizerConfig(**saved["config"]) == TOKENIZERS["paper"]
            saved["config"]["repa_depth"] = 0
            sample.build(Tokenizer, TokenizerConfig, saved, "meta")
        else:
            saved["config"]["num_tokens"] = 256
            ar = sample.build(AR, ARConfig, saved, "meta")
            assert ar.config == SIZES[name.removeprefix("GPT-")]


def test_released_files_of_all_layouts_load_and_sample(tmp_path):
    ar, tokenizer = fixture("released_style_ar.pt"), fixture("released_style_tok.pt")
    said = quietly(sample.main, ["--ckpt", ar, "--tokenizer", tokenizer, "--tokens", "32",
                                 "--num", "1", "--out", str(tmp_path / "x.png")])
    assert "guidance 1.1:8.0" in said
    ends = [sample.guidance_end(SIZES[size].depth) for size in ("L", "XL")]
    assert ends == [8, 10]
    raises("give --tokenizer FILE", sample.main, ["--ckpt", ar])
    path, model = str(tmp_path / "model.pt"), load_ar(ar)
    bare = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    for layout in (bare, {"module": bare}, {"state_dict": bare}):
        torch.save(layout, path)
        assert sample.digest(load_ar(path)) == sample.digest(model)
    torch.save({**bare, "odd": torch.ones(3)}, path)
    raises("odd", load_ar, path, kind=RuntimeError)  # torch names what does not fit


# ---- Two ways of computing: the tokenizer --------------------------------------------------------

def test_models_have_the_papers_parameter_counts():
    with torch.device("meta"):
        models = [Tokenizer(TOKENIZERS[name]) for name in ("paper", "light")]
        models += [AR(SIZES[name]) for name in ("B", "L", "XL", "XXL")]
    assert [sum(parameter.numel() for parameter in model.parameters()) for model in models] == [
        300_099_776 + 7_344_896, 113_433_536,  # with the REPA heads
        110_888_448, 342_910_976, 774_699_520, 1_410_972_672]


def test_steps_use_the_papers_times_and_each_group_once_and_fewer_groups_end_with_a_jump():
    schedule = mt.sampling_schedule(8, 8, 2.0, 8)
    times = [i / (16 - i) for i in range(9)]  # 0, 0.07, 0.14, ... 0.78, 1
    assert np.allclose(schedule, [*zip(times, times[1:], range(8))])
    schedule = mt.sampling_schedule(16, 8, 2.0, 3)
    assert [step.group for step in schedule] == [0, 1, 1, 2, 2]
    assert schedule[-1].t_next == 1
    groups = mt.group_of(torch.arange(16) / 16, 8).long()
    assert groups.bincount().tolist() == [1, 2, 2, 2, 2, 2, 2, 3]


def test_split_attention_equals_masked_attention():
    q, k, v = torch.randn(3, 2, 4, 10 + 6, 8)
    for full in (10, 0, 16):
        mask = torch.ones(16, 16, dtype=torch.bool).tril()
        mask[:full, :full] = True  # patches see patches; query i sees them and queries <= i
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        close(mt.attend(q, k, v, full), expected, 1e-6)  # float32 rounding


def changes_from(first, before, after):
    """Asserts that two results (B, N, D) differ from position `first` on, and only there."""
    changed = (before != after).any(-1)
    assert torch.equal(changed, torch.arange(16).expand(2, -1) >= first)


@torch.no_grad()
def test_encoder_queries_decoder_and_ar_model_are_causal():
    model, ar, labels = small_tokenizer(), small_ar(), torch.tensor([0, 5])
    tokens, changed = some_tokens(), some_tokens()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    changes_from(9, model.condition(tokens), model.condition(changed))
    changes_from(10, ar(labels, tokens), ar(labels, changed))  # logits of what stands before
    before = model.encoder(pictures())
    model.encoder.query_table[7] += 1
    changes_from(7, before, model.encoder(pictures()))


def test_quantizer_takes_the_nearest_row_in_float32_and_passes_gradients_straight_through():
    quantizer = small_tokenizer().quantizer
    z, weight = torch.randn(99, 16, 8, requires_grad=True), torch.randn(99, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(z)
    unit, rows = F.normalize(z, dim=-1), F.normalize(quantizer.codebook, dim=-1)
    nearest = torch.cdist(unit, rows).argmin(-1)
    assert torch.equal(result.tokens, nearest)
    close(result.vectors, rows[nearest], 1e-6)  # float32 rounding, here and below
    close(result.loss, 1.25 * (unit - rows[nearest]).square().mean(-1), 1e-6)
    through, = torch.autograd.grad(result.vectors, z, weight, retain_graph=True)
    direct, = torch.autograd.grad(unit, z, weight)
    close(through, direct, 1e-6)


@torch.no_grad()
def test_training_losses_equal_a_second_computation():
    model, images, noise = small_tokenizer(), pictures(3), torch.randn(3, 3, 32, 32)
    u = torch.tensor([0.05, 0.4, 0.99])
    output = model(images, u, noise)
    t = (u / (u + 3 * (1 - u)))[:, None, None, None]
    x1 = 0.6 * images
    xt = t * x1 + (1 - t) * noise
    tokens, _, loss = model.quantizer(model.encoder(images))
    cond = model.condition(tokens).unflatten(1, (4, 4))[[0, 1, 2], [0, 2, 3]]
    v = model.diffusion(xt, t.flatten(), cond).velocity
    flow = ((v - (x1 - noise)) ** 2).mean() / 0.36
    close(output.flow_loss, flow, 1e-4 * flow)
    close(output.predicted, (xt + (1 - t) * v) / 0.6, 1e-4)  # codes took another route
    vq = torch.cat([loss[0, :4], loss[1, :12], loss[2]]).mean()
    close(output.vq_loss, vq, 1e-6)  # float32 rounding


@torch.no_grad()
def test_decoding_and_streaming_equal_the_sampler_written_out_and_read_no_later_token():
    model, tokens, noise = small_tokenizer(), some_tokens(), torch.randn(2, 3, 32, 32)
    for solver, slope, groups in (("euler", 0, 4), ("adams2", 0.5, 3), ("adams2", 0.5, 4)):
        times = [0, 0.1, 0.25, 0.5][:groups] + [1]
        x, images = noise, []
        for cond, t, t_next in zip(model.condition(tokens).split(4, 1), times, times[1:]):
            v = model.diffusion(x, torch.tensor([t]), cond).velocity
            before = before if images else v
            images.append(x + (1 - t) * v)
            x = x + (t_next - t) * (v + slope * (v - before))
            before = v
        decoded = model.decode(tokens[:, :4 * groups], noise, None, solver, groups)
        streamed = [*model.stream(tokens.split(4, 1), noise, solver, groups)]
        expected = torch.stack([*images[:-1], x, x]) / 0.6
        close(torch.stack([*streamed, decoded]), expected, 1e-4)  # outputs of order 10
    assert (model.decode(tokens, noise, 6) - decoded).abs().max() > 0.1
    raises("4 groups need 16", model.decode, tokens[:, :8], kind=AssertionError)


@torch.no_grad()
def test_velocity_is_zero_at_first_and_it_and_the_residual_stream_are_float32_under_bf16():
    model = Tokenizer(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        velocity, stream = model.diffusion(pictures(1), torch.rand(1),
                                           torch.randn(1, 4, 64))
    assert velocity.abs().max() == 0
    assert velocity.dtype == stream.dtype == torch.float32


# ---- Two ways of computing: the autoregressive model ---------------------------------------------

@torch.no_grad()
def test_cached_generation_equals_uncached_generation():
    model = small_ar()
    labels, nulls = torch.tensor([[0, 1, 4], [5, 5, 5]])
    for cfg, scales in ((None, torch.ones(16)), ((1.1, 8.0), torch.linspace(1.1, 8, 16))):
        for count in (0, 1, 5, 16):
            prefix = tokens = some_tokens(3)[:, :count]
            for scale in scales[count:]:  # runs the whole sequence anew for each token
                padded = F.pad(tokens, (0, 1))
                logits, free = model(labels, padded), model(nulls, padded)
                logits = free + scale * (logits - free)
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
            groups = [*model.stream(labels, cfg, prefix, temperature=0.0, group_size=4)]
            assert torch.equal(torch.cat(groups, 1), tokens)
            assert len(groups) == 4


def test_draws_have_the_models_distribution_from_the_first_possible_token_to_the_last():
    logits, count = torch.tensor([-1.0, 2.0, 0.0, 1.0, -2.0]), 40_000
    uniforms = torch.linspace(0, 1 - 2 ** -24, count)[:, None]  # the largest float32 below 1
    for temperature, top_k, top_p, allowed in (
            (1.0, 0, 1.0, [0, 1, 2, 3, 4]),
            (0.5, 3, 1.0, [1, 2, 3]),
            (1.0, 0, 0.8, [1, 3]),
            (1.0, 2, 0.7, [1]),  # of the two, the likelier has 0.73
            (0.0, 0, 1.0, [1])):
        drawn = model_ar.draw(logits.expand(count, 5), uniforms, temperature, top_k, top_p)
        expected = (logits[allowed] / (temperature or 1)).softmax(0)
        assert drawn.unique().tolist() == allowed
        close(drawn.bincount()[allowed] / count, expected, 2 / count)  # the ends of a range


def recorded(call, _):
    """Stands for a CUDA graph of call(): outputs that each run overwrites."""
    outputs = call().clone()
    return lambda: outputs.copy_(call()), outputs


def test_a_recorded_step_gives_the_tokens_of_the_plain_one_and_records_each_length_once():
    model = AR(replace(SMALL_AR, num_tokens=40))
    randomised(model)
    for cfg in (None, (1.1, 3.0)):
        cache, step = model.new_cache(2 if cfg is None else 4), model_ar.RecordedStep()
        with mock.patch.object(model_ar, "record", wraps=recorded) as record:
            for labels in ([0, 1], [4, 2]):  # the cache and what was recorded are used again
                given = torch.tensor(labels), cfg, some_tokens()[:, :labels[0]], 1.0, 0, 1.0
                uniforms = torch.rand(2, 40)
                stream = model.stream(*given, uniforms, 8, cache, step)
                found = torch.cat(list(stream), 1)
                with mock.patch.object(model_ar, "RecordedStep", None):
                    assert torch.equal(found, model.generate(*given, uniforms))
        assert record.call_count == len(step.recorded) == 3  # 16, 32 and 40 positions
    stream = model.stream(torch.tensor([0]), group_size=7)
    raises("groups of 7", next, stream, kind=AssertionError)
    # The cache is made where the weights are: the host has no memory for this one.
    assert model.to("meta", torch.bfloat16).new_cache(10 ** 12)[0].k.dtype == torch.bfloat16


def test_on_a_gpu_no_tensor_is_left_on_the_cpu():
    """Tensors that say they are on CUDA, and that refuse to be mixed with others."""
    if torch.version.cuda is None:
        raise unittest.SkipTest("needs a torch with CUDA, but no GPU")
    with torch.device("meta"):
        model, ar, network = Tokenizer(SMALL), AR(SMALL_AR), fid.InceptionV3()
    states = [(module, module.state_dict()) for module in (model, ar, network)]
    with warnings.catch_warnings(), FakeTensorMode(), torch.no_grad(), \
            mock.patch.object(model_ar, "record", recorded):
        warnings.simplefilter("ignore")  # of autocast, that there is no CUDA
        for module, state in states:
            module.load_state_dict({name: torch.empty(value.shape, device="cuda")
                                    for name, value in state.items()}, assign=True)
        images = torch.empty(2, 3, 32, 32, device="cuda")
        labels = torch.zeros(2, dtype=torch.long, device="cuda")
        tokens = model.encode(images)
        results = [
            *model(images, images[:, 0, 0, 0], images), model.decode(tokens), ar(labels, tokens),
            *model.stream(ar.stream(labels, (1.1, 3.0), group_size=4), images),
            ar.generate(labels, None, tokens[:, :3], 1.0, 5, 0.9),
            train_tokenizer.group_knows(model, images, images, tokens),
            *network(torch.empty(2, 64, 64, 3, dtype=torch.uint8, device="cuda"))]
    assert {result.device.type for result in results} == {"cuda"}


# ---- Data ----------------------------------------------------------------------------------------

def noise_images(count, seed=0, size=(40, 50)):
    """uint8 (count, *size, 3) of various colours and contrasts."""
    rng = np.random.default_rng(seed)
    return (rng.random((count, *size, 3)) * rng.uniform(40, 255, (count, 1, 1, 3))).astype(np.uint8)


def save_images(folder, images, ending=".png"):
    os.makedirs(folder, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(join(folder, f"{i:03d}{ending}"))
    return str(folder)


def make_folder(root, *names, per_class=3):
    """A data set: sub-folders of images."""
    for seed, name in enumerate(names):
        save_images(join(root, name), noise_images(per_class, seed), ".jpg")
    return str(root)


def test_built_in_pictures_depend_on_their_number_and_survive_the_way_to_tensors_and_back():
    train, held_out = train_tokenizer.open_data("shapes", 32)
    assert train[7] == train_tokenizer.Shapes(5, 10, 32)[2] != train[17]
    assert train.first + len(train) <= held_out.first  # no picture in both
    pixels = np.arange(64 * 64 * 3).astype(np.uint8)  # all levels, again and again
    image = Image.fromarray(pixels.reshape(64, 64, 3))
    images = torch.stack([*pictures(4, 64), sample.to_tensor(image)])
    assert sample.image_grid(images, 3).crop((68, 68, 132, 132)) == image


def test_folders_of_every_form_give_the_classes_that_people_mean(tmp_path):
    """What lies under DIR; the classes, or what the message names; held-out images."""
    for i, (folders, expected, held_out) in enumerate((
            ("b_cat a_dog", "a_dog b_cat", 1),
            ("train/x train/y validation/x validation/y", "x y", 6),
            ("train/x train/y test/y", "x y", 3),  # a class is lacking
            ("train/x dev/x", "x", 1),
            ("train apple val", "apple train val", 1),  # names of classes
            ("train/cafe\u0301 val/caf\u00e9", "caf\u00e9", 3),  # accents of two forms
            (".", "must hold one sub-folder", 0),
            ("train/x val/x val/z", "that the training images lack: ['z']", 0))):
        root = make_folder(tmp_path / str(i), *folders.split())
        if not held_out:
            raises(expected, train_tokenizer.open_data, root, 32)
            continue
        with contextlib.redirect_stdout(None):
            train, rest = train_tokenizer.open_data(root, 32)
        assert train.classes == rest.classes == expected.split()
        assert len(rest) == held_out
        assert (rest.root, rest.names[0]) not in [(train.root, name) for name in train.names]


def test_what_a_folder_was_taken_for_is_said_with_what_is_not_used(tmp_path):
    data = make_folder(tmp_path, "train/x", "train/y", "dev/x", "extra")
    said = quietly(train_tokenizer.open_data, data, 32)
    assert said == (f"{data}/train: 5 images; held out: 1 in {data}/train; "
                    "not used: dev extra; 2 classes: x y\n")
    # Tokens are named after names and labels of the images.
    train = train_tokenizer.Folder(join(data, "train"))
    other = train.subset(np.arange(6))
    assert other.digest() == train.digest()
    other.labels = 1 - other.labels
    assert other.digest() != train.digest()


def test_one_walker_leaves_out_what_is_hidden_and_counts_what_is_no_image(tmp_path):
    names = ("a_dog/deep/er/x.TIF a_dog/y.jfif.tiff b_cat/z.webp stray.png "
             ".ipynb_checkpoints/a.png b_cat/._x.png b_cat/.deep/b.png "
             "a_dog/notes.txt b_cat/x.txt b_cat/movie.gif").split()
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert fid.find_images(tmp_path) == names[:4]
        assert len(train_tokenizer.Folder(str(tmp_path))) == 3
    assert "left out 3 files of other kinds, first a_dog/notes.txt" in said.getvalue()
    assert "left out 1 images in no class's folder" in said.getvalue()


def test_files_of_many_kinds_are_read_or_refused_by_name(tmp_path):
    good, path = Image.fromarray(noise_images(1)[0]), str(tmp_path / "x.png")
    deep = np.arange(2 ** 16, dtype=np.uint16).reshape(256, 256)
    light = np.mean(good)
    for kind, image, mean in (
            ("JPEG", good.convert("CMYK"), light),
            ("WEBP", good, light),
            ("TIFF", good, light),
            ("PNG", Image.fromarray(deep), 127.5),  # 16 bits are scaled, not cut
            ("PNG", Image.new("RGBA", (40, 50)), 255)):  # lies on white
        image.save(path, kind)  # whatever the ending
        for image in (sample.read_image(path), sample.center_crop(Image.open(path), 32)):
            # A lossy kind and the crop change the mean by up to 2.6 levels.
            assert image.mode == "RGB"
            assert abs(np.mean(image) - mean) < 4
    os.truncate(path, 60)
    raises(f"{path} cannot be read", sample.read_image, path)
    good.save(path, "GIF")  # for some kinds, Pillow starts programs
    raises(f"{path} cannot be read", sample.read_image, path)
    Image.new("F", (40, 50)).save(path, "TIFF")
    raises("no value of white", sample.read_image, path)


def test_crops_have_the_right_size_and_views_are_mirrored_unless_flips_are_off(tmp_path):
    pixels, rng = noise_images(1, size=(256, 200)), np.random.default_rng(0)
    image = Image.fromarray(pixels[0, :128, :100])
    boxes = image.resize((50, 64), Image.Resampling.BOX)  # as ADM does, before the bicubic rule
    crop = sample.center_crop(image, 32)
    assert crop == boxes.resize((32, 41)).crop((0, 4, 32, 36))
    assert {train_tokenizer.random_crop(image, 32, 1.25, True, rng).size
            for _ in range(20)} == {(32, 32)}
    for flip in (False, True):
        crops = [train_tokenizer.random_crop(crop, 32, 1, flip, rng) for _ in range(20)]
        assert len({crop.tobytes() for crop in crops}) == 1 + flip
    for views in (2, 10):
        crops, plain = (train_ar.FixedCrops([(image, 0)], 32, views, flip)[0][0]
                        for flip in (True, False))
        assert torch.equal(plain, crops[::2])
        assert torch.equal(plain.flip(3), crops[1::2])
        assert len(crops.unique(dim=0)) == views
    # A large JPEG is decoded at a fraction for random crops, and only for them.
    save_images(tmp_path / "x", pixels, ".jpg")
    train = train_tokenizer.Folder(str(tmp_path))
    held_out = copy.copy(train)
    train.draft_size = 32
    assert train[0][0].size == (100, 128)
    assert held_out[0][0].size == (200, 256)


def test_an_epoch_shows_each_image_once_and_the_autoregressive_model_a_view_of_it():
    order = [train_tokenizer.item_at(i, 30, 0) for i in range(60)]
    assert sorted(order[:30]) == sorted(order[30:]) == [*range(30)]
    assert order[:30] != order[30:]
    codes = np.arange(30 * 41, dtype=np.uint16).reshape(30, 41)
    with mock.patch.object(train_ar, "SHARD", 8):
        shards = np.split(codes, (8, 16, 24))
        labels, tokens = train_ar.read_batch(shards, 30, 0, range(60), 4)
    assert labels.tolist() == [41 * i for i in order]
    begins = tokens - labels[:, None] - torch.arange(1, 5)  # where the view begins in a row
    assert {*map(tuple, begins.tolist())} == {(i,) * 4 for i in range(0, 40, 4)}
    assert len(tokens.unique(dim=0)) > 30  # other views in the second epoch


# ---- Parts of training ---------------------------------------------------------------------------

def test_learning_rate_warms_up_stays_and_falls_and_weight_decay_reaches_matrices_only():
    config = train_tokenizer.TrainConfig(steps=100, lr=1.0, lr_final=0.1, warmup_steps=10,
                                         decay_steps=50, weight_decay=0.5)
    model, rates = torch.nn.Linear(2, 2), []
    optimizer = train_tokenizer.make_optimizer(model, config)
    for step in (1, 10, 51, 76):
        train_tokenizer.set_lr(optimizer, step, config)
        rates.append(optimizer.param_groups[0]["lr"])
    assert np.allclose(rates, [0.1, 1.0, 1.0, 0.55])
    weight, bias = map(torch.clone, model.parameters())
    (0 * model(torch.ones(1, 2)).sum()).backward()
    optimizer.step()
    close(model.weight, (1 - 0.55 * 0.5) * weight, 1e-6)  # float32 rounding
    assert torch.equal(model.bias, bias)


def test_times_are_even_and_averages_follow():
    u = train_tokenizer.draw_times(64, torch.Generator().manual_seed(0))
    assert (u * 64).long().bincount().tolist() == [1] * 64
    assert not torch.equal(u.sort()[0], u)
    with mock.patch.object(torch, "rand", lambda *_, **__: torch.tensor(1 - 2 ** -24)):
        assert train_tokenizer.draw_times(64, torch.Generator()).max() < 1
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * ema.weight + 0.1 * model.weight
    train_tokenizer.update_ema(ema, model, 0.9)
    close(ema.weight, expected, 1e-6)  # float32 rounding


def test_unused_codebook_rows_are_reseeded():
    use, z = train_tokenizer.CodebookUse(4), torch.randn(2, 3, 8)
    for _ in range(3):
        use.update(torch.tensor([[0, 1]]))
    assert use.idle.tolist() == [0, 0, 3, 3]
    codebook, average = torch.zeros(2, 4, 8)
    use.reseed(z, torch.Generator().manual_seed(0), 3, [codebook, average])
    assert codebook[:2].abs().max() == 0
    assert torch.equal(codebook, average)
    unit = F.normalize(z, dim=-1).flatten(0, 1).tolist()
    assert all(row in unit for row in codebook[2:].tolist())


def test_perceptual_and_alignment_losses_fall_to_0_where_they_should_and_train(tmp_path):
    """LPIPS and REPA on networks in random weights."""
    from torchvision.models import vgg
    torch.manual_seed(0)
    network = mock.Mock(features=vgg.make_layers(vgg.cfgs["D"]))
    dino = torch.nn.Conv2d(3, 768, 14, 14)
    dino.forward_features = lambda x: {"x_norm_patchtokens": dino(x).flatten(2).mT}
    with mock.patch("torchvision.models.vgg16", lambda pretrained: network), \
            mock.patch.object(torch.hub, "load", lambda repository, *_, **__:
                              {"facebookresearch/dinov2:main": dino}[repository]):
        lpips, repa = train_tokenizer.PerceptualLoss(), train_tokenizer.RepaLoss()
        train("tokenizer", tmp_path, *(
            "--diffusion-depth 2 --repa-depth 1 --lpips 0.5 --repa 0.5 --steps 1").split())
    assert {"lpips", "repa"} <= {*log_of(tmp_path)[0]}
    images = pictures(2, 64)
    other = images.flip(0).requires_grad_()
    assert lpips(mock.Mock(predicted=images), images) == 0
    assert not lpips.net.training
    distance = lpips(mock.Mock(predicted=other), images)
    assert distance > 0 and distance.requires_grad
    mean, std = repa.moments
    small = F.interpolate((images / 2 + 0.5 - mean) / std, 56, mode="bicubic")
    features = dino(small).flatten(2).mT                                 # (2, 16, 768)
    for sign in (1, -1):  # up to rounding of a cosine
        assert abs(repa(mock.Mock(repa=sign * features), images) - (1 - sign)) < 1e-5


# ---- Runs of the trainers ------------------------------------------------------------------------

def start(*command, **environment):
    """A process of this Python. It has one thread, as this one, since sums depend on the number."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE, **environment}
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, cwd=HERE,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@functools.cache
def photographs():
    """A data set of 100 images for training, one of which cannot be read, and 6 held out."""
    root = join(KEPT.name, "data")
    make_folder(join(root, "train"), "a_dog", "b_cat", per_class=50)
    make_folder(join(root, "val"), "a_dog", "b_cat")
    Path(root, "train", "a_dog", "020.jpg").write_text("no image")
    return root


def options(name):
    """The command line of a tiny run, but for --out."""
    if name == "tokenizer":
        return TINY + ("--encoder-depth 1 --decoder-depth 1 --diffusion-depth 1 "
                       "--codebook-size 32 --reseed-after 1").split()
    return TINY + ["--dropout", "0.1", "--eval-samples", "2", "--data", photographs(),
                   "--codes", join(KEPT.name, "codes"),
                   "--tokenizer", join(trained("tokenizer"), "last.pt")]


def train(name, out, *more):
    """Runs a trainer in this process; returns what it printed."""
    return quietly(TRAINERS[name].main,
                   [*options(name), "--out", str(out), *map(str, more)])


@functools.cache
def trained(name):
    """The folder of a tiny run that nothing interrupted, with checkpoints that stay."""
    train(name, join(KEPT.name, name), "--keep-every", 4)
    return join(KEPT.name, name)


def weights_of(folder, part="model"):
    """All weights of the checkpoint in a folder as one vector."""
    saved = torch.load(join(folder, "last.pt"), weights_only=True)
    return torch.cat([value.flatten() for value in saved[part].values()])


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_exactly(tmp_path):
    running = {name: start(f"train_{name}.py", *options(name), "--out", tmp_path / name)
               for name in TRAINERS}
    for name, process in running.items():
        out = tmp_path / name
        while process.poll() is None and not os.path.exists(out / "last.pt"):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -9, process.stdout.read()
        assert "step 0 of" not in train(name, out)
        for part in ("model", "ema"):
            assert torch.equal(weights_of(out, part), weights_of(trained(name), part)), part
        # From a checkpoint that was kept
        shutil.copy(join(trained(name), "step_4.pt"), out / "last.pt")
        assert "step 4 of 8" in train(name, out)
        assert torch.equal(weights_of(out), weights_of(trained(name)))


def test_going_back_to_a_kept_checkpoint_leaves_it_and_replaces_the_later_ones(tmp_path):
    train("tokenizer", tmp_path, "--keep-every", 4)
    first, second = ((tmp_path / f"step_{step}.pt") for step in (4, 8))
    before = first.read_bytes(), second.read_bytes()
    shutil.copyfile(first, tmp_path / "last.pt")  # writes into the file
    train("tokenizer", tmp_path, "--keep-every", 4, "--lr", 1e-3)
    assert first.read_bytes() == before[0] and second.read_bytes() != before[1]


def test_processes_that_see_other_checkpoints_end_and_say_so_once(tmp_path):
    for folder, step in (("0", 8), ("1", 4)):
        os.makedirs(tmp_path / folder)
        kept = join(trained("tokenizer"), f"step_{step}.pt")
        shutil.copyfile(kept, tmp_path / folder / "last.pt")
    program = tmp_path / "program.py"
    program.write_text("import os, sys, train_tokenizer\n"
                       "sys.argv[-1] += os.environ['RANK']\n"
                       "train_tokenizer.run(train_tokenizer.main)\n")
    said = in_two_processes(program, *options("tokenizer"), "--out", f"{tmp_path}/", fails=True)
    assert said.count("checkpoints of different steps, [4, 8]: all nodes must see") == 1


def test_processes_wait_for_long_where_they_share_work_but_not_in_training(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
import time, datetime, torch, torch.distributed as dist, sample
real = dist.init_process_group
dist.init_process_group = lambda: real(timeout=datetime.timedelta(seconds=2))
sample.join_processes()
time.sleep(4 * sample.rank())
sample.wait()
print("waited", flush=True)
time.sleep(4 * sample.rank())
dist.all_reduce(torch.ones(1))
""")
    said = in_two_processes(program, fails=True)
    assert said.count("waited") == 2 and "Timed out" in said


def test_another_run_is_refused_by_what_differs_and_other_settings_are_printed(tmp_path):
    for name, flags, text in (
            ("tokenizer", ["--beta", "5"], "is of another run: beta 5.0 (was 4.0)"),
            ("ar", ["--tokenizer", small_checkpoint()], "another run: vocab_size 64 (was 32)")):
        raises(text, train, name, trained(name), *flags)
    raises("is of step 8, beyond --steps 4", train, "ar", trained("ar"), "--steps", 4)
    said = train("tokenizer", trained("tokenizer"), "--lr", "0.5", "--seed", "3")
    assert "setting: lr 0.5 (was 0.003)\n" in said and "setting: seed 3 (was 0)\n" in said
    # Classes by name: the same images at another place go on, another name does not.
    moved = shutil.copytree(photographs(), tmp_path / "moved")
    flags = "ar", shutil.copytree(trained("ar"), tmp_path / "ar"), "--data", moved
    train(*flags)
    for part in ("train", "val"):
        os.rename(moved / part / "a_dog", moved / part / "wolf")
    raises("classes ['b_cat', 'wolf'] (was ['a_dog', 'b_cat'])", train, *flags)


def test_fields_that_came_after_a_run_had_their_defaults_and_unknown_ones_are_named(tmp_path):
    path = tmp_path / "last.pt"
    saved = torch.load(join(trained("tokenizer"), "last.pt"), weights_only=True)
    del saved["fixed"]["commitment"], saved["config"]["commitment"]
    del saved["settings"]["eval_images"]  # which may change, whatever it was
    torch.save(saved, path)
    assert "step 8 of 8" in train("tokenizer", tmp_path)
    raises("commitment 0.5 (was 0.25)", train, "tokenizer", tmp_path, "--commitment", 0.5)
    saved["config"]["levels"] = 3
    torch.save(saved, path)
    raises("another version of this code", load_tokenizer, str(path))


def test_tokens_and_runs_stay_valid_where_the_decoder_alone_was_tuned(tmp_path):
    path, ar = tmp_path / "tuned.pt", shutil.copytree(trained("ar"), tmp_path / "ar")
    saved = torch.load(join(trained("tokenizer"), "last.pt"), weights_only=True)
    codes = os.listdir(join(KEPT.name, "codes"))
    for name, refused in (("decoder.positions", False), ("quantizer.codebook", True)):
        saved["ema"][name] += 0.01 * torch.randn_like(saved["ema"][name])
        torch.save(saved, path)
        flags = "--ckpt", join(trained("ar"), "last.pt"), "--tokenizer", str(path), "--num", "1"
        said = quietly(sample.main, [*flags, "--out", str(tmp_path / "x.png")])
        assert ("on the tokens of another tokenizer" in said) == refused
        if not refused:
            train("ar", ar, "--tokenizer", path)
            assert os.listdir(join(KEPT.name, "codes")) == codes
    flags = "--codes", tmp_path, "--init-from", join(trained("ar"), "last.pt"), "--steps", 1
    said = train("ar", tmp_path / "new", "--tokenizer", path, *flags)
    assert "on the tokens of another tokenizer" in said
    raises("another run: tokens ", train, "ar", ar, "--tokenizer", path, *flags[:2])


def test_the_log_holds_rates_and_shares_and_without_an_average_none_is_saved(tmp_path):
    flags = "--codebook-size", 512, "--batch", 1, "--steps", 2, "--log-every", 100
    constant = "--lr", 2.34e-4, "--warmup-steps", 0, "--decay-steps", 0
    train("tokenizer", tmp_path, *flags, "--ema", 0, *constant)
    line = log_of(tmp_path)[0]
    assert line["codebook"] <= 32 / 512 and line["lr"] == 2.34e-4  # 2 images of 16 tokens
    assert train_tokenizer.significant([2.345678e-7, [1 / 3]]) == [2.34568e-7, [0.333333]]
    assert "ema" not in torch.load(tmp_path / "last.pt", weights_only=True)
    train("tokenizer", tmp_path, *flags[:4], "--steps", 3, "--ema", 0.5)
    path = str(tmp_path / "last.pt")
    assert len(torch.load(path, weights_only=True)["ema"]) == len(load_tokenizer(path).state_dict())


def test_a_number_that_is_not_finite_stops_the_run_by_name(tmp_path):
    real, calls = Tokenizer.forward, []

    def broken(*args):
        calls.append(args)
        output = real(*args)
        return output._replace(vq_loss=output.vq_loss * (math.nan if len(calls) == 3 else 1))
    with mock.patch.object(Tokenizer, "forward", broken):
        raises("vq is not finite", train, "tokenizer", tmp_path, "--log-every", 100)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2


def test_unreadable_images_are_named_and_passed(tmp_path):
    trained("ar")  # goes past one, too
    bad = join(photographs(), "train", "a_dog", "020.jpg")
    said = train("tokenizer", tmp_path, "--data", photographs(),
                 "--batch", 32, "--eval-images", 1)
    assert f"skipped: {bad} cannot be read" in said
    assert "group_knows" not in log_of(tmp_path)[-1]  # of one image, no number


STEADY = "--lr 1e-3 --warmup-steps 1 --ema 0 --steps 4".split()
STEADY = {"tokenizer": STEADY + ["--reseed-after", "0"], "ar": STEADY + ["--dropout", "0"]}


def in_two_processes(program, *flags, fails=False):
    """What two processes print."""
    running = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program,
                    *flags)
    said, _ = running.communicate(timeout=120)
    assert fails == (running.returncode != 0), said
    return said


def test_two_processes_and_two_passes_take_the_steps_of_one(tmp_path):
    """Sums of gradients differ by rounding, which Adam magnifies where gradients are near zero: so
    the weights must agree to a twentieth of the way they went, whose norm is 0.09 or 0.19."""
    for name in TRAINERS:
        one, passes, two = (tmp_path / name / how for how in ("one", "passes", "two"))
        train(name, one, *STEADY[name])
        train(name, passes, *STEADY[name], "--micro-batch", 2)
        in_two_processes(f"train_{name}.py", *options(name), *STEADY[name], "--out", two)
        for folder in (passes, two):
            difference = weights_of(folder) - weights_of(one)
            assert difference.norm() < 4e-3, folder


def test_processes_that_load_images_change_nothing(tmp_path):
    for name, more in (("tokenizer", []), ("ar", ["--codes", tmp_path])):
        train(name, tmp_path / name, "--workers", 2, *more)
        assert torch.equal(weights_of(tmp_path / name), weights_of(trained(name)))


def test_new_runs_start_from_the_weights_of_others_classes_by_name(tmp_path):
    data = make_folder(tmp_path / "data", "a_ant", "b_cat", "a_dog")  # ant is new
    for name, flags, width in (("tokenizer", ["--reseed-after", 0], 0),
                               ("ar", ["--data", data], 128)):
        said = train(name, tmp_path / name, *flags, "--lr", 0, "--lr-final", 0, "--steps", 1,
                     "--init-from", join(trained(name), "last.pt"))
        # After the ant's row of the class embedding all is as it was.
        found = weights_of(tmp_path / name)[width:]
        assert torch.equal(found, weights_of(trained(name), "ema"))
    assert "2 classes by name; 1 new: a_ant" in said
    for name, *more in (("tokenizer", "--encoder-depth", 3), ("ar", "--size", "cifar")):
        raises("is of another size", train, name, tmp_path / "other", *more,
               "--init-from", join(trained(name), "last.pt"))
    # The authors' classes have numbers: by position where the folders are sorted WordNet ids
    path, model = str(tmp_path / "released.pt"), AR(replace(SMALL_AR, num_classes=1000))
    torch.save({**sample.pack("ar", model), "classes": [*map(str, range(1000))]}, path)
    names = [f"n{1440764 + i:08d}" for i in range(1000)]
    assert "1000 classes by name" in quietly(train_ar.start_from, model, path, names, None)


def test_held_out_numbers_are_logged_of_the_averaged_weights(tmp_path):
    for name in TRAINERS:
        train(name, tmp_path / name, "--ema", 0)
        assert log_of(tmp_path / name)[-1] != log_of(trained(name))[-1]
    assert {*log_of(trained("tokenizer"))[-1]} == {"step", "psnr_by_group", "group_knows"}
    labels, tokens, model = torch.arange(70) % 5, some_tokens(70), small_ar()
    found, _ = train_ar.evaluate(model, small_tokenizer(), labels, tokens,
                                 train_ar.TrainConfig(cfg_end=3.0))
    logs = model(labels, tokens).log_softmax(-1).gather(2, tokens[..., None])
    assert abs(found["val_loss"] + logs.mean()) < 1e-5  # float32 rounding


def interrupted(function, calls):
    """The function, which notes the length of its last argument, and whose third call fails."""
    def call(*args):
        calls.append(len(args[-1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return function(*args)
    return call


def test_codes_go_on_where_they_were_killed(tmp_path):
    config = train_ar.TrainConfig(codes=str(tmp_path), views=10, workers=0)
    tokenizer, data, calls = small_tokenizer(), train_tokenizer.Shapes(0, 40, 32), []
    with mock.patch.object(Tokenizer, "encode", interrupted(Tokenizer.encode, calls)), \
            mock.patch.object(train_ar, "SHARD", 12), contextlib.redirect_stdout(None):
        for _ in range(3):  # the last time, there is nothing left to do
            with contextlib.suppress(KeyboardInterrupt):
                codes = np.concatenate(train_ar.read_codes(config, tokenizer, data))
    assert calls == [120, 120, 120, 120, 40]  # views of 12 images; the third batch was lost
    views = train_ar.FixedCrops(data, 32, 10, True)
    for i in (0, 5, 39):
        assert codes[i].tolist() == [i % 10, *tokenizer.encode(views[i][0]).flatten().tolist()]
    for other in (replace(config, flip=False), replace(config, views=2)):
        quietly(train_ar.read_codes, other, tokenizer, data)
    assert len(os.listdir(tmp_path)) == 3  # each in a folder of its own
    data.first, data.classes = 69_999, 7_000 * data.classes
    assert train_ar.encode_all(tokenizer, views, [0], 0)[0, 0] == 69_999


# ---- Sampling ------------------------------------------------------------------------------------

@functools.cache
def small_checkpoint():
    """A checkpoint of the two small models in random weights."""
    path = join(KEPT.name, "ar.pt")
    torch.save({**sample.pack("ar", small_ar()), "classes": list("abcde"),
                "tokenizer": sample.pack("tokenizer", small_tokenizer()),
                "settings": {"cfg_start": 1.1, "cfg_end": 3.0}}, path)
    return path


def draw(*flags):
    return quietly(sample.main, ["--ckpt", small_checkpoint(), *map(str, flags)])


def samples_in(path):
    return np.load(path)["arr_0"]


def levels_apart(a, b):
    """The largest difference of pixels (..., 3) uint8."""
    return np.abs(np.subtract(a, b, dtype=int)).max()


def test_images_depend_on_seed_and_number_not_on_batches_processes_or_interruptions(tmp_path):
    def npz(*flags, run=draw):
        path = tmp_path / "-".join([run.__name__, *flags])
        run(*flags, "--num-images", 20, "--npz", path)
        return samples_in(path)

    def draw_in_two(*flags):
        in_two_processes("sample.py", "--ckpt", small_checkpoint(), *flags)
    whole, calls = npz("--batch", "20"), []
    with mock.patch.object(sample, "to_uint8", interrupted(sample.to_uint8, calls)):
        raises("", npz, "--batch", "7", kind=KeyboardInterrupt)
        again = npz("--batch", "7")
    assert calls == [7, 7, 6, 6]  # two batches were kept, the third was lost
    # Products of another number of rows are rounded otherwise, so pixels may differ by a level.
    for images in (again, npz("--batch", "1"), npz("--batch", "7", run=draw_in_two)):
        assert levels_apart(images, whole) <= 1
    assert levels_apart(npz("--seed", "1"), whole) > 50
    # One process is one process, whatever a batch system says.
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "4", "RANK": "0"}):
        assert levels_apart(npz("--seed", "0"), whole) == 0
    assert len(os.listdir(tmp_path)) == 6  # nothing but whole files


def test_each_class_is_drawn_equally_often_and_shuffled():
    config = sample.SampleConfig(num_images=200, npz="x")
    labels = sample.labels_of(config, list("abcde"))
    assert np.bincount(labels).tolist() == [40] * 5
    assert labels[:5] != [0, 1, 2, 3, 4]
    config = sample.SampleConfig(num_images=3, labels="c,0")
    assert sample.labels_of(config, list("abcde")) == [2, 0, 2]
    # A number is a name where names are numbers; accents come in two forms.
    config = sample.SampleConfig(labels="1,caf\u0065\u0301", stream=True)
    assert sample.labels_of(config, ["001", "1", "caf\u00e9"]) == [1, 2]
    config = sample.SampleConfig(labels="2")
    raises("no class '2'", sample.labels_of, config, ["001", "1", "003"])


def test_each_mode_draws_what_the_library_draws(tmp_path):
    """From first tokens only, in streams, and after the first tokens of a reference."""
    ar, tokenizer, out = small_ar(), small_tokenizer(), tmp_path / "s.png"
    photo = noise_images(1)[0]
    save_images(tmp_path, [photo])
    reference = sample.to_tensor(sample.center_crop(Image.fromarray(photo), 32))[None]

    def expected(kept=0, drawing=(1.0, 0, 1.0), **how):
        uniforms, noise = [], []
        for i in (0, 1):
            uniforms.append(torch.rand(16, generator=sample.seeded(0, "tokens", i)))
            noise.append(torch.randn(3, 32, 32, generator=sample.seeded(0, "start", i)))
        prefix = tokenizer.encode(reference)[:, :kept].expand(2, -1)
        tokens = ar.generate(torch.tensor([0, 3]), (1.1, 3.0), prefix, *drawing,
                             uniforms=torch.stack(uniforms))
        return tokenizer.decode(tokens, torch.stack(noise), **how)

    def check(images, columns, *flags):
        draw("--labels", "a,3", *flags, "--out", out)
        assert levels_apart(Image.open(out), sample.image_grid(images, columns)) <= 1  # rounding
    check(expected(groups=2), 2, "--tokens", 8, "--num", 2)
    check(expected(drawing=(2.0, 9, 0.7), steps=6, solver="euler"), 2,
          "--temperature", 2.0, "--top-k", 9, "--top-p", 0.7,
          "--steps", 6, "--solver", "euler", "--num", 2)
    check(expected(), 2, "--stream")
    rows = [part for kept in (0, 5, 16) for part in (reference, expected(kept))]
    check(torch.cat(rows), 3, "--prefix", tmp_path / "000.png", "--keep", "0,5,16")
    assert {"s_004.png", "s_016.png", "s_steps.png"} < {*os.listdir(tmp_path)}
    assert Image.open(tmp_path / "s.gif").n_frames == 4


def test_reconstructions_come_with_the_same_crops_and_psnr(tmp_path):
    folder, photos, chosen = tmp_path / "images", noise_images(20), sample.spread(10, 20)
    assert max(chosen) > 15  # from all over the folder
    save_images(folder, photos)
    said = draw("--reconstruct", folder, "--num", 10, "--batch", 4,
                "--out", tmp_path / "r.png")
    originals, decoded = (samples_in(tmp_path / f"r_{name}.npz")
                          for name in ("originals", "reconstructions"))
    crops = [np.array(sample.center_crop(Image.fromarray(photos[i]), 32)) for i in chosen]
    assert np.array_equal(originals, crops)
    error = ((originals / 255.0 - decoded / 255.0) ** 2).mean((1, 2, 3))
    assert f"PSNR {np.mean(-10 * np.log10(error)):.2f} dB over 10 images" in said


# ---- Mistakes and files --------------------------------------------------------------------------

class Harmful(str):
    """The name of a file that would be created where this object is unpickled."""
    def __reduce__(self):
        return open, (str(self), "w")


def test_checkpoints_give_back_the_model_and_nothing_in_others_runs(tmp_path):
    path, model = str(tmp_path / "t.pt"), small_tokenizer()
    sample.write(path, lambda file: torch.save(sample.pack("tokenizer", model), file))
    loaded, noise = load_tokenizer(path), torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.decode(some_tokens(), noise),
                       model.decode(some_tokens(), noise))
    assert loaded.repa_head is None
    assert os.listdir(tmp_path) == ["t.pt"]
    raises("is a checkpoint of kind 'tokenizer', 'ar' is needed", load_ar, path)
    harmful = Harmful(tmp_path / "created")
    for content in ({"model": {}, "args": harmful}, [1], {"model": {"odd": torch.ones(2)}}):
        torch.save(content, path)
        raises(f"{path} is no checkpoint of this code", load_ar, path)
    Path(path).write_bytes(pickle.dumps(harmful))
    raises("damaged", load_ar, path)
    assert not os.path.exists(harmful)


def test_files_are_whole_also_where_two_processes_write_one_or_it_cannot_be_written(tmp_path):
    path = str(tmp_path / "x")

    def write_a(file):
        sample.write(path, lambda other: other.write(b"b"))  # meanwhile
        file.write(b"a")
    sample.write(path, write_a)
    assert Path(path).read_bytes() == b"a"
    for error, expected in ((RuntimeError("no space"), Mistake), (OSError("no space"), OSError)):
        failing = mock.Mock(side_effect=error)
        raises("no space", sample.write, path, failing, kind=expected)
    assert os.listdir(tmp_path) == ["x"]
    with mock.patch.object(torch, "load", side_effect=PermissionError("denied")):
        raises("denied", load_ar, small_checkpoint(), kind=PermissionError)


def test_loaded_models_do_not_hang_on_their_file(tmp_path):
    if not os.path.exists("/proc/self/maps"):
        raise unittest.SkipTest("tells what is mapped on Linux only")
    path = shutil.copy(small_checkpoint(), tmp_path)
    models = load_ar(path), load_tokenizer(path)
    assert str(path) not in Path("/proc/self/maps").read_text() and len(models) == 2


def test_mistakes_get_one_clear_line(tmp_path):
    ckpt = f"--ckpt {small_checkpoint()}"
    photo = tmp_path / "photo.png"
    sample.image_grid(pictures(1), 1).save(photo)
    for program, text, flags in (
            (train_tokenizer, "--batch 6 must divide", "--preset toy --batch 6 --micro-batch 4"),
            (train_tokenizer, "--repa above 0 needs a --repa-depth", "--preset toy --repa 1"),
            (train_tokenizer, "no folder x", "--repa 0 --diffusion-depth 8 --data x"),
            (train_tokenizer, "num_tokens must divide by num_groups", "--num-groups 7"),
            (train_tokenizer, "num_groups must be above 0", "--num-groups 0"),
            (train_tokenizer, "num_tokens must be at most max", "--num-tokens 2048"),
            (train_tokenizer, "decoder_width must divide by head", "--decoder-width 100"),
            (train_tokenizer, "head_dim must divide by 4", "--head-dim 6"),
            (train_tokenizer, "--lr must be at least 0 and below inf, got nan", "--lr nan"),
            (train_tokenizer, "--batch must be at least 1", "--batch 0"),
            (train_tokenizer, "beta must be above 0", "--beta 0"),
            (train_ar, "--ema must be at least 0 and below 1, got 1", "--ema 1"),
            (train_ar, "x: --size must be one of B, L", "--size M"),
            (train_ar, "--views 1, 2 or 10", "--views 3"),
            (sample, "--cfg must be", f"{ckpt} --cfg 1:2:3"),
            (sample, "--cfg must be", f"{ckpt} --cfg nan:2"),
            (sample, "--keep needs", f"{ckpt} --prefix {photo} --keep 17"),
            (sample, "--keep needs", f"{ckpt} --prefix {photo} --keep 1/4"),
            (sample, "--steps has no effect", f"{ckpt} --stream --steps 4"),
            (sample, "--labels has no effect", f"{ckpt} --reconstruct x --labels a"),
            (sample, "no class '5'", f"{ckpt} --labels b,5"),
            (sample, "exclude one another", f"{ckpt} --stream --npz x.npz"),
            (sample, "--out end in .png", f"{ckpt} --out x.txt"),
            (sample, "is there already", f"{ckpt} --npz {small_checkpoint()}"),
            (sample, "--tokens must be a multiple of 4", f"{ckpt} --tokens 6"),
            (sample, "no folder nowhere", f"{ckpt} --reconstruct nowhere"),
            (sample, "images at a time", "--help")):
        argv, said = ["x", "--out", f"{tmp_path}/x.png", *flags.split()], io.StringIO()
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(said), \
                contextlib.redirect_stderr(said):
            try:
                sample.run(program.main)
            except SystemExit as end:
                print(end)
        assert text in said.getvalue(), (text, said.getvalue())


def test_importing_does_nothing_and_a_mistake_ends_a_program_with_one_line():
    code = ("import sys; sys.argv = ['x', '--ckpt', 'nowhere']; import train_ar, sample; "
            "assert not {'lpips', 'torchvision'} & set(sys.modules); sample.run(sample.main)")
    missing = "[Errno 2] No such file or directory: 'nowhere'"
    running = start("-c", code)
    assert running.communicate() == (f"x: {missing}\n", None)
    assert running.returncode == 1
    full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory, and much more"))
    raises("give a smaller --batch or, to train,", sample.run, full, kind=SystemExit)
    # What the system refuses, too; under a terminal without accents
    code = "import sample; sample.run(lambda: (print('caf\\xe9'), open('nowhere')))"
    said, _ = start("-c", code, PYTHONIOENCODING="ascii").communicate()
    assert said.startswith("caf\\xe9\n-c: [Errno 2] No such file") and said.count("\n") == 2, said


def test_ten_lines_of_the_readme_run(tmp_path):
    text = Path(HERE, "README.md").read_text()
    shutil.copytree(trained("ar"), tmp_path / "out" / "ar")
    sample.image_grid(pictures(1), 1).save(tmp_path / "photo.jpg")
    with contextlib.chdir(tmp_path):
        exec(text.split("```python\n")[1].split("```")[0], {})
        assert Image.open("four.png").size == (4 * 66 + 2, 68)


# ---- Evaluation ----------------------------------------------------------------------------------

class TinyInception(torch.nn.Module):
    """Stands for InceptionV3: 8, 6 and 5 numbers an image in place of 2048, 2023 and 1008."""
    def forward(self, images):
        pool = images[:, 0, :8, 0].float() / 128                             # (B, 8)
        return fid.Features(pool, pool[:, :6].square(), (9 * pool[:, :5]).softmax(1))


def tiny_fid(*argv):
    """Runs fid.main with the tiny network; returns its figures and what it printed."""
    with mock.patch.object(fid, "load_inception", lambda path: TinyInception()), \
            mock.patch.object(fid, "WIDTHS", {"mu": 8, "mu_s": 6}), \
            contextlib.redirect_stdout(io.StringIO()) as said:
        return fid.main([*map(str, argv)]), said.getvalue()


def gaussian(n, d, seed):
    return np.random.default_rng(seed).standard_normal((n, d)) * np.linspace(.1, 2, d) + 1


def moments(rows):
    rows = np.float64(rows)
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_inception_equals_torch_fidelitys_and_loads_its_weights(tmp_path):
    torch.manual_seed(0)
    network, path = fid.InceptionV3(), str(tmp_path / "weights.pth")
    for name, tensor in network.state_dict().items():  # activations keep their size in them
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.8, 1.2)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.1)
    images = torch.from_numpy(noise_images(2, size=(20, 30)))
    torch.save(network.state_dict(), path)
    pool, spatial, probs = fid.load_inception(path)(images)
    assert (pool.shape, spatial.shape, probs.shape) == ((2, 2048), (2, 2023), (2, 1008))
    expected = [3.130364, 5.148030, 1.536695, 1.666369]  # torch-fidelity's, in these weights
    close(pool[0, [2, 3, -2, -1]], torch.tensor(expected), 5e-4)  # float32, through 48 layers
    close(probs, (pool @ network.fc.weight.T).softmax(1), 1e-6)
    assert spatial.min() == 0
    assert spatial.max() > 0  # after the ReLU
    images = torch.rand(1, 3, 299, 299)
    assert torch.equal(fid.resize(images, 13), images[:, :, ::23, ::23])  # as TensorFlow 1
    raises("fetch https://github.com/mseitzer", fid.load_inception, "nowhere.pth")


def test_frechet_distance_has_its_closed_forms():
    mu, sigma = moments(gaussian(300, 40, 2))
    for other, trace in ((4 * sigma, 2 * np.trace(sigma)),
                         (np.outer(mu, mu), np.sqrt(mu @ sigma @ mu))):  # of rank 1, as of two
        expected = mu @ mu + np.trace(sigma + other) - 2 * trace
        assert np.isclose(fid.frechet_distance(mu, sigma, 0 * mu, other), expected, rtol=1e-7)
        assert fid.frechet_distance(mu, other, mu, other) < 1e-10


def test_inception_score_of_uniform_predictions_is_1_and_of_balanced_classes_their_number():
    assert np.allclose(fid.inception_score(torch.full((50, 10), 0.1)), (1, 0))
    # Splits in file order, the last one shorter: one class only, then three in turn
    probs = torch.cat([torch.eye(3)[:1].expand(6, 3), torch.eye(3)])
    assert np.allclose(fid.inception_score(probs, 6), (2, 1))


def test_precision_and_recall_are_those_of_brute_force():
    def covered(points, centres):
        radii = np.sort(cdist(centres, centres))[:, 3]  # of a point, the first is itself
        return (cdist(points, centres) <= radii).any(1).mean()
    x, y = gaussian(150, 6, 7), gaussian(130, 6, 8) * 1.3
    lattice = np.array([*np.ndindex(4, 4, 4)], float)  # with ties: balls hold their edge
    for reference, generated in (
            (lattice[::2], lattice[::3]),
            (x + 1000, y + 1000)):  # there, float32 would lose the distances
        reference, generated = np.float32(reference), np.float32(generated)
        expected = covered(generated, reference), covered(reference, generated)
        found = fid.precision_recall(torch.tensor(reference),
                                     torch.tensor(generated), rows=40)
        assert found == expected


def test_figures_of_files_are_those_of_the_functions(tmp_path):
    x, y = noise_images(40, 1), noise_images(30, 2)
    samples, stats, both = (tmp_path / name for name in ("y.npz", "stats.npz", "both.npz"))
    reference = save_images(tmp_path / "x", x)
    np.savez(samples, y)
    a, b = (TinyInception()(torch.tensor(images)) for images in (x, y))
    side = fid.open_npz(samples)
    with contextlib.redirect_stdout(None):
        measured = fid.measure(TinyInception(), side, 7, "cpu", ())
    assert set(measured) == {"mu", "sigma", "mu_s", "sigma_s"}  # no features, which would grow
    expected = [fid.frechet_distance(*moments(a.pool), *moments(b.pool)),
                fid.frechet_distance(*moments(a.spatial), *moments(b.spatial)),
                *fid.inception_score(b.probs), *fid.precision_recall(a.pool, b.pool)]

    def check(reference, expected, text=""):
        figures, said = tiny_fid(reference, samples, "--batch", 7)
        assert np.allclose([*figures.values()], expected, rtol=1e-6)
        assert "has 30 images; figures compare for 50,000" in said and text in said, said
        return " ".join(figures)
    assert check(reference, expected) == (
        "fid sfid inception_score inception_score_std precision recall")
    # Statistics in place of images; statistics beside other images, as in ADM's files
    tiny_fid(reference, "--save-stats", stats)
    check(stats, expected[:4], "no precision and recall")
    with np.load(stats) as file:
        np.savez(both, x[:20], **file)
        np.savez(stats, mu=file["mu"], sigma=file["sigma"])
    check(both, expected[:4] + [*fid.precision_recall(a.pool[:20], b.pool)])
    check(stats, [expected[0], *expected[2:4]], "no sFID")
    # In the order of classes, the splits of the Inception Score would hold few of them.
    shuffled, = fid.open_folder(reference).batches(40)
    assert not np.array_equal(shuffled, x)
    assert np.array_equal(np.sort(shuffled, 0), np.sort(x, 0))


def test_hostile_files_and_mistakes_of_evaluation_are_named(tmp_path):
    x, path = noise_images(6), str(tmp_path / "x.npz")
    for text, wrong in (
            ("is float64", x / 255),
            ("(6, 40, 50, 1)", x[..., :1]),
            ("(40, 50, 3)", x[0]),
            ("Fortran order True", np.asfortranarray(x)),
            ("holds 3 images", x[:3])):
        np.savez(path, wrong)
        raises(text, tiny_fid, path, path)
    np.savez(path, images=x)
    raises("needs images arr_0", tiny_fid, path, path)
    np.savez(path, mu=np.zeros(9), sigma=np.eye(9))
    raises("mu must hold 8 numbers", tiny_fid, path, path)
    raises("is no folder and no npz", tiny_fid, "nowhere", path)
    folder = save_images(tmp_path / "x", x, ".jpg")
    assert "compression changes figures" in tiny_fid(folder, "--save-stats", path)[1]
    raises("the order is REFERENCE SAMPLES", tiny_fid, folder, path)
    for text, kind, mode in (("odd.png is L", "PNG", "L"),
                             ("8-bit RGB and of one size", "PNG", "RGB"),
                             ("odd.png cannot be read", "GIF", "RGB")):  # some start programs
        Image.new(mode, (10, 12)).save(join(folder, "odd.png"), kind)
        raises(text, tiny_fid, folder, folder)


def main():
    counts = Counter(passed=0, failed=0)
    for name, test in list(globals().items()):
        if not name.startswith("test_"):
            continue
        began, outcome = time.time(), "passed"
        try:
            with tempfile.TemporaryDirectory() as folder:
                test(*[Path(folder)] * ("tmp_path" in inspect.signature(test).parameters))
        except unittest.SkipTest as reason:
            outcome = f"skipped, {reason}"
        except Exception:
            outcome = "failed"
            traceback.print_exc()
        print(f"{time.time() - began:5.1f} s, {outcome}: {name}", flush=True)
        counts[outcome] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return counts["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
