"""Tests of everything that can be checked on a CPU without the network.

    python test_shapes.py            or            python -m pytest test_shapes.py

Small models in random weights, none of them zero, so that every path matters; and runs of both
trainers, of eight steps each. `tmp_path` is an empty folder that is removed after the test.
"""
import atexit
import contextlib
import functools
import inspect
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import unittest
import warnings
from dataclasses import replace
from os.path import join
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
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
FIXTURES = join(HERE, "..", "shared", "fixtures")
CPU = torch.device("cpu")
SMALL = TokenizerConfig(
    image_size=32, num_tokens=16, num_groups=4, codebook_size=64, patch_size=8,
    encoder_width=32, encoder_depth=2, decoder_width=64, decoder_depth=2,
    diffusion_width=96, diffusion_depth=3, diffusion_patch=4, head_dim=16, max_tokens=20,
    repa_depth=2, repa_hidden=24, repa_dim=12)
SMALL_AR = ARConfig(
    depth=3, width=48, heads=3, num_tokens=16, vocab_size=64, num_classes=5, dropout=0.0)
# Command lines of training runs that take a second or two
TINY = ("--preset toy --steps 8 --batch 4 --log-every 1 --eval-every 8 --save-minutes 0 "
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


def small_tokenizer(**changes):
    return randomised(Tokenizer(replace(SMALL, **changes)))


def small_ar(**changes):
    return randomised(AR(replace(SMALL_AR, **changes)))


def pictures(batch=2, size=32):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def some_tokens(batch=2):
    return torch.randint(64, (batch, 16), generator=torch.Generator().manual_seed(3))


def close(a, b, tolerance):
    assert a.shape == b.shape, (a.shape, b.shape)
    difference = (a - b).abs().max()
    assert difference <= tolerance, f"differ by {difference:.2e} > {tolerance:.0e}"


def raises(kind, text, function, *args, **kwargs):
    """Asserts that the call raises this kind of error with this text."""
    try:
        function(*args, **kwargs)
    except kind as error:
        assert text in str(error), f"no {text!r} in: {error}"
        return
    raise AssertionError(f"no {kind.__name__} with {text!r}")


def quietly(function, *args):
    """Calls the function and returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue()


@functools.cache
def kept():
    """A folder for what several tests read, removed at the end."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# ---- Agreement with the authors' code ------------------------------------------------------------

def fixture(name):
    """A file of outputs of the released code: of a .pt its path, else what is in it, arrays as
    tensors. Skips the test where there is none."""
    path = join(FIXTURES, name)
    if not os.path.exists(path):
        raise unittest.SkipTest("no fixtures")
    if name.endswith(".npz"):
        return {key: torch.from_numpy(value) if value.dtype.kind in "fi" else value
                for key, value in np.load(path, allow_pickle=False).items()}
    return json.loads(Path(path).read_text()) if name.endswith(".json") else path


def released(kind):
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
            xt = mt.interpolate(0.6 * io["x"], io["train_noise"], mt.shift_time(u, 2.0))
            close(xt[:, :, ::5, ::3], io["train_xt_sub"], 1e-6)
            close(output.predicted.detach(), io["train_fake"], 3e-5)
            (output.flow_loss + output.vq_loss).backward()
    shapes = fixture("tokA_weights.npz")
    norms = {str(name): torch.full_like(shapes[f"sd/{name}"], norm)
             for name, norm in zip(io["grad_names"], io["grad_norms"].tolist())}
    gradients, compared = {name: p.grad for name, p in model.named_parameters()}, 0
    for name, norm in sample.translate(norms)["model"].items():
        norm = norm.flatten()[0]
        if norm > 1e-6:  # biases of normalised keys have none but rounding
            assert abs(gradients[name].norm() / norm - 1) < 1e-4, name
            compared += 1
    assert compared > 150


def test_released_ar_model_predicts_and_generates_as_the_authors_code():
    """Logits differ by float32 rounding, which guidance of 8 magnifies: 5e-4, and 2e-3."""
    model, io = load_ar(released("ar")), fixture("arA_io.npz")
    labels = io["gen_labels"]
    with torch.no_grad():
        close(model(io["tf_labels"], io["tf_tokens"]), io["tf_logits"], 5e-4)
    for key, cfg in (("cfg1", None), ("cfg1.5", (1.5, 1.5)), ("cfg1.1_8", (1.1, 8.0))):
        tokens = model.generate(labels, cfg, temperature=0.0)
        assert torch.equal(tokens, io[f"gen_{key}_tokens"]), key
        with torch.no_grad():
            logits = model(labels, tokens)
            if cfg is not None:
                free = model(torch.full_like(labels, 10), tokens)
                scale = io[f"gen_{key}_scale"][:, None]
                close(scale[:, 0], torch.linspace(*cfg, 256), 1e-6)
                logits = free + scale * (logits - free)
        close(logits, io[f"gen_{key}_logits"], 2e-3 if key == "cfg1.1_8" else 5e-4)


def test_small_pieces_agree_with_the_authors_code():
    io = fixture("unit.npz")
    rope = mt.rope_2d(mt.grid_positions(3, 5, CPU), 64)
    close(mt.rotate(io["rope2d_q_in"], rope), io["rope2d_q_out"], 1e-5)  # rounding, here and below
    rope = model_ar.rope_1d(torch.arange(12), 64, 10000.0)
    turned = model_ar.rotate(io["rope1d_in"].transpose(1, 2), rope).transpose(1, 2)
    close(turned, io["rope1d_out"], 1e-5)
    for width in (128, 768):
        close(mt.sinusoid(io["sinus_t"], width), io[f"sinus_{width}"], 1e-4)  # angles up to 1000
    for beta in ("1", "1.5", "2", "4"):
        close(mt.shift_time(io["shift_in"], float(beta)), io[f"shift_{beta}"], 1e-6)
    for groups, size in ((8, 32), (4, 64), (16, 16), (1, 256)):
        begins = mt.group_of(io["u_grid"], groups).long() * size
        assert torch.equal(begins, io[f"train_begin_G{groups}_Q256_n{size}"])
    for steps, groups in ((8, 8), (4, 8), (12, 8), (16, 8), (4, 4)):
        begins = [step.group * 256 // groups
                  for step in mt.sampling_schedule(steps, groups, 2.0, groups)]
        assert begins == io[f"sample_begin_K{steps}_G{groups}_Q256_n{256 // groups}"].tolist()
    for width, hidden in io["ffn_hidden_dims"].tolist():
        config = replace(SMALL_AR, width=width, heads=1)
        assert model_ar.FeedForward(config).w1.out_features == hidden
    for key, top_k, top_p in (("k5", 5, 1.0), ("p0.8", 0, 0.8), ("k10_p0.6", 10, 0.6)):
        found = model_ar.filter_logits(io["filter_in"], top_k, top_p)
        assert torch.equal(found, io[f"filter_{key}"])


def test_every_released_tensor_finds_its_place():
    for name, entry in fixture("released_checkpoint_layout.json").items():
        with torch.device("meta"):
            weights = {key: torch.empty(shape) for key, shape in entry["state_dict"].items()}
            saved = sample.translate({"ema": weights})
            if name == "tokenizer_v1":
                config, model_class = TokenizerConfig(**saved["config"]), Tokenizer
                expected, repa = replace(TOKENIZERS["paper"], repa_depth=0), 7_344_896
            else:
                config, model_class = ARConfig(**saved["config"]), AR
                expected, repa = SIZES[name.removeprefix("GPT-")], 0
            assert config == expected
            own = {key: value.shape for key, value in model_class(config).state_dict().items()}
        assert {key: value.shape for key, value in saved["model"].items()} == own
        total = sum(value.numel() for value in saved["model"].values())
        assert total == entry["total_parameters"] - repa


def test_released_files_of_all_layouts_load_and_sample_what_the_library_draws(tmp_path):
    path, out = str(tmp_path / "model.pt"), str(tmp_path / "grid.png")
    said = quietly(sample.main, ["--ckpt", released("ar"), "--tokenizer", released("tok"),
                                 "--labels", "3,7", "--num", "2", "--seed", "5", "--out", out])
    assert "guidance 1.1:8.0 as trained" in said
    ar, tokenizer = load_ar(released("ar")), load_tokenizer(released("tok"))
    tokens = ar.generate(torch.tensor([3, 7]), (1.1, 8.0), uniforms=uniforms(256, 5))
    noise = sample.noise_of(5, "start", [0, 1], (3, 256, 256), CPU)
    images = tokenizer.decode(tokens, noise)
    assert Image.open(out).tobytes() == sample.image_grid(images, 2).tobytes()
    raises(Mistake, "give --tokenizer FILE", sample.main, ["--ckpt", released("ar")])

    bare = {f"_orig_mod.{name}": value for name, value in ar.state_dict().items()}
    for layout in (bare, {"module": bare}, {"state_dict": bare}):
        torch.save(layout, path)
        found = load_ar(path).state_dict()
        assert all(torch.equal(found[name], value) for name, value in ar.state_dict().items())
    torch.save({**bare, "norm.weight": torch.ones(3)}, path)
    raises(RuntimeError, "norm.weight", load_ar, path)  # torch names what does not fit
    assert tokenizer.config.diffusion_width == 128  # from the file's own settings


# ---- Two ways of computing: the tokenizer --------------------------------------------------------

def test_models_have_the_papers_parameter_counts_and_presets_fit_together():
    def size(module):
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
    fresh = Tokenizer(SMALL)  # predicts no velocity
    assert not fresh.diffusion.to_pixels.weight.any() and not fresh.diffusion.to_pixels.bias.any()
    for name, (settings,) in train_ar.PRESETS.items():
        ar, tokenizer = SIZES[settings.size], train_tokenizer.PRESETS[name][1]
        assert (ar.num_tokens, ar.vocab_size) == (tokenizer.num_tokens, tokenizer.codebook_size)


def test_steps_use_the_papers_times_and_each_group_once_and_fewer_groups_end_with_a_jump():
    schedule = mt.sampling_schedule(8, 8, 2.0, 8)
    expected = [0, .0667, .1429, .2308, .3333, .4545, .6, .7778, 1]
    assert [round(step.t, 4) for step in schedule] + [schedule[-1].t_next] == expected
    assert [step.group for step in schedule] == list(range(8))
    schedule = mt.sampling_schedule(8, 8, 2.0, 3)
    assert [step.group for step in schedule] == [0, 1, 2] and schedule[-1].t_next == 1
    groups = mt.group_of((torch.arange(16_000) + 0.5) / 16_000, 8).long()
    assert torch.bincount(groups).tolist() == [1000] + [2000] * 6 + [3000]


def test_split_attention_equals_masked_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 10 + 6, 8)
    for full in (10, 0, 16):
        mask = torch.ones(16, 16, dtype=torch.bool).tril()
        mask[:full, :full] = True  # patches see patches; query i sees them and queries <= i
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        close(mt.attend(q, k, v, full), expected, 1e-6)  # float32 rounding


def changes_from(first, before, after):
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
    assert result.vectors.dtype == torch.float32
    close(result.vectors, rows[result.tokens], 1e-6)  # float32 rounding, here and below
    close(result.vectors, quantizer.lookup(result.tokens), 1e-6)
    through, = torch.autograd.grad((result.vectors * weight).sum(), z, retain_graph=True)
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
    for solver in mt.SOLVERS:
        before, x = None, noise
        with torch.no_grad():
            for k in range(4):
                cond = model.condition(tokens)[:, 4 * k:4 * k + 4]
                v = model.diffusion(x, torch.full((2,), times[k]), cond).velocity
                mixed = v if solver == "euler" or k == 0 else (3 * v - before) / 2
                x = x + (times[k + 1] - times[k]) * mixed
                before = v
        close(model.decode(tokens, noise, solver=solver), x / 0.6, 1e-4)  # outputs of order 10


def test_streamed_decoding_equals_whole_decoding_and_partial_decoding_reads_no_later_token():
    model, tokens, noise = small_tokenizer(), some_tokens(), torch.randn(2, 3, 32, 32)
    for solver in mt.SOLVERS:
        for groups in (1, 2, 4):
            previews = [*model.stream(tokens.split(4, 1), noise, solver, groups)]
            decoded = model.decode(tokens, noise, solver=solver, groups=groups)
            close(previews[-1], decoded, 1e-4)  # outputs of order 10, here and below
            part = model.decode(tokens[:, :4 * groups], noise, solver=solver, groups=groups)
            assert torch.equal(part, decoded) and len(previews) == groups
    decoded = model.decode(tokens, noise, solver="euler", groups=2)
    close(previews[1], decoded, 1e-4)  # an Euler preview is what ends with this group
    assert model.decode(tokens, steps=6).shape == (2, 3, 32, 32)
    tokens = model.encode(pictures(2, 64))  # of another size
    assert model.decode(tokens, torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)
    raises(AssertionError, "solver must be", model.decode, tokens, None, None, "heun")
    raises(AssertionError, "4 groups: 16 tokens", model.decode, tokens[:, :8])


def in_bf16(device):
    """Stands for `autocast` on a GPU."""
    return torch.autocast("cpu", torch.bfloat16)


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


# ---- Two ways of computing: the autoregressive model ---------------------------------------------

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
        for count in (0, 1, 5, 16):
            prefix = some_tokens(3)[:, :count]
            expected = generate_without_cache(model, labels, cfg, prefix)
            assert torch.equal(model.generate(labels, cfg, prefix, temperature=0.0), expected)
            groups = [*model.stream(labels, cfg, prefix, temperature=0.0, group_size=4)]
            assert torch.equal(torch.cat(groups, 1), expected) and len(groups) == 4


def test_draws_have_the_models_distribution_from_the_first_possible_token_to_the_last():
    logits, count = torch.tensor([-1.0, 2.0, 0.0, 1.0, -2.0]), 40_000
    random = torch.rand(count, 1, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([[0.0], [1 - 2 ** -24]])  # the latter is the largest float32 below 1
    for temperature, top_k, top_p, allowed in (
            (1.0, 0, 1.0, [0, 1, 2, 3, 4]), (2.0, 0, 1.0, [0, 1, 2, 3, 4]),
            (0.5, 3, 1.0, [1, 2, 3]), (1.0, 0, 0.8, [1, 3]), (1.0, 1, 1.0, [1])):
        filters = temperature, top_k, top_p
        drawn = model_ar.draw(logits.expand(count, 5), random, *filters)
        expected = torch.zeros(5).index_copy(0, torch.tensor(allowed),
                                             (logits[allowed] / temperature).softmax(0))
        deviation = (expected * (1 - expected) / count).sqrt()  # of a share; 0 of what is dropped
        shares = torch.bincount(drawn, minlength=5) / count
        assert ((shares - expected).abs() <= 4 * deviation).all(), (shares, expected)
        drawn = model_ar.draw(logits.expand(2, 5), ends, *filters)
        assert drawn.tolist() == [allowed[0], allowed[-1]]
    assert model_ar.draw(logits[None], ends[:1], 0.0, 0, 1.0).item() == 1


def test_one_token_compiles_to_one_graph_a_cache_length_that_changes_nothing_but_buffers():
    """CUDA graphs need both: torch leaves them out where another input changes in place."""
    graphs, changed = [], set()

    def counting(graph, _):
        graphs.append(graph)
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]

        def run(*inputs):
            before = [value.clone() for value in inputs]
            outputs = graph(*inputs)
            for name, old, new in zip(names, before, inputs):
                if not torch.equal(old, new):
                    assert "buffers" in name and hasattr(new, "_dynamo_static_input_type")
                    changed.add(name)
            return outputs
        return run

    model, labels = small_ar(), torch.tensor([0, 1])
    cache = model.new_cache(4)
    decode = torch.compile(model_ar.decode_one_token, backend=counting, fullgraph=True,
                           dynamic=False)
    for _ in range(2):  # the cache is used again
        given = dict(cfg=(1.1, 3.0), uniforms=torch.rand(2, 16))
        found = torch.cat([*model.stream(labels, **given, cache=cache, decode=decode)], 1)
        assert torch.equal(found, model.generate(labels, **given))
    assert len(graphs) == 4 and len(changed) == 2 * 3  # keys and values of three layers


def test_on_a_gpu_no_tensor_is_left_on_the_cpu():
    """Tensors that say they are on CUDA, and that refuse to be mixed with others."""
    if torch.version.cuda is None:
        raise unittest.SkipTest("needs a torch with CUDA, but no GPU")
    with torch.device("meta"):
        model, ar, network = Tokenizer(SMALL), AR(SMALL_AR), fid.InceptionV3()
    states = [(module, module.state_dict()) for module in (model, ar, network)]
    with warnings.catch_warnings(), FakeTensorMode(), torch.no_grad():
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
    assert {result.device.type for result in results} == {"cuda"} and len(results) == 17


# ---- Data ----------------------------------------------------------------------------------------

def save_noise(path, mode="RGB", size=(50, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def make_folder(root, *names, per_class=3):
    """A tiny data set: classes of pictures in RGB, grey, CMYK, with a palette and with alpha."""
    for name in names or ("b_cat", "a_dog"):
        for i in range(per_class):
            mode, ending = [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"),
                            ("RGBA", "png")][i % 5]
            save_noise(join(root, name, f"{i:03d}.{ending}"), mode, seed=i)
    return str(root)


def test_built_in_pictures_depend_on_their_number_and_survive_the_way_to_tensors_and_back():
    train, held_out = train_tokenizer.open_data("shapes", 32)
    assert np.array_equal(train[7][0], train_tokenizer.Shapes(5, 10, 32)[2][0])
    assert train[7][1] == 7 and not np.array_equal(train[7][0], train[17][0])
    assert train.first + len(train) <= held_out.first  # no picture in both
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    tensor = sample.to_tensor(Image.fromarray(pixels))
    assert np.array_equal(sample.to_uint8(tensor[None])[0], pixels)
    grid = sample.image_grid(pictures(5), 3)
    assert grid.size == (3 * 64 + 4, 2 * 64 + 2) and grid.getpixel((195, 129)) == (255, 255, 255)


def test_folders_of_every_form_give_the_classes_that_people_mean(tmp_path):
    """What lies under DIR; the classes, or what the message names; held-out images."""
    cafe = "cafe\u0301", "caf\u00e9"  # two ways to write an accent
    for i, (folders, expected, held_out) in enumerate((
            (["b_cat", "a_dog"], ["a_dog", "b_cat"], 1),
            (["train/x", "train/y", "val/x", "val/y"], ["x", "y"], 6),
            (["train/x", "train/y", "validation/x", "validation/y"], ["x", "y"], 6),
            (["train/x", "train/y", "Test/y"], ["x", "y"], 3),  # a class is lacking
            (["train/x", "train/y"], ["x", "y"], 1),
            (["train/x", "annotations/z"], ["x"], 1),
            (["train", "apple", "val"], ["apple", "train", "val"], 1),  # names of classes
            ([f"train/{cafe[0]}", f"val/{cafe[1]}"], [cafe[1]], 3),
            (["val/x", "test/x"], "but no folder train", 0),
            (["train", "val"], "must hold one sub-folder", 0),
            (["train/x", "val/x", "val/z"], "that the training images lack: ['z']", 0),
            (["all/x", "all/y"], "give --data", 0),
            ([".hidden/x"], "must hold one sub-folder", 0))):
        root = str(tmp_path / str(i))
        for folder in folders:
            make_folder(root, folder)
        if isinstance(expected, str):
            raises(Mistake, expected, train_tokenizer.open_data, root, 32)
            continue
        train, rest = train_tokenizer.open_data(root, 32)
        assert train.classes == rest.classes == expected and len(rest) == held_out, folders
        assert not {train.path(i) for i in range(len(train))} & {rest.path(0)}
    assert rest[0][0].mode == "RGB" and rest[0][1] == 0
    os.makedirs(tmp_path / "0" / "c_empty")
    raises(Mistake, "c_empty", train_tokenizer.open_data, str(tmp_path / "0"), 32)
    raises(Mistake, "no folder nowhere", train_tokenizer.open_data, "nowhere", 32)


def test_one_walker_leaves_out_what_is_hidden_and_counts_what_is_no_image(tmp_path):
    root = make_folder(tmp_path / "data", per_class=1)
    for name in ("a_dog/deep/er/x.TIF", "a_dog/y.jfif.tiff", "b_cat/z.webp"):
        save_noise(join(root, name))
    for name in (".ipynb_checkpoints/a.png", "b_cat/._x.png", "b_cat/.deep/b.png"):
        save_noise(join(root, name))
    for name in ("a_dog/notes.txt", "b_cat/x.txt", "b_cat/movie.gif"):
        Path(root, name).write_text("no image")
    save_noise(join(root, "stray.png"))
    found = []
    said = quietly(lambda: found.extend(fid.find_images(root)))
    assert found == ["a_dog/000.jpg", "a_dog/deep/er/x.TIF", "a_dog/y.jfif.tiff", "b_cat/000.jpg",
                     "b_cat/z.webp", "stray.png"]
    assert "left out 1 x .gif, 2 x .txt" in said
    said = quietly(lambda: found.append(len(train_tokenizer.Folder(root))))
    assert found[-1] == 5 and "left out 1 images in no class's folder" in said
    said = draw("--reconstruct", root, "--out", tmp_path / "r.png")
    assert "over 6 images" in said and "left out" in said


def test_files_of_many_kinds_are_read_or_refused_by_name(tmp_path):
    good = sample.image_grid(pictures(1), 1)
    deep = np.random.default_rng(0).integers(0, 2 ** 16, (64, 64), dtype=np.uint16)
    for name, readable, kind, image in (
            ("gif.png", False, "GIF", good), ("eps.jpg", False, "EPS", good),  # starts a program
            ("half.jpg", False, "JPEG", good), ("half.png", False, "PNG", good),
            ("a.jpg.png", True, "JPEG", good), ("a.webp", True, "WEBP", good),
            ("a.tif", True, "TIFF", good), ("deep.png", True, "PNG", Image.fromarray(deep)),
            ("cmyk.jpg", True, "JPEG", good.convert("CMYK")),
            ("alpha.png", True, "PNG", Image.new("RGBA", (40, 50)))):
        path = join(tmp_path, name)
        image.save(path, kind)
        if "half" in name:
            os.truncate(path, os.path.getsize(path) // 2)
        if readable:
            image = sample.read_image(path)
            assert image.mode == "RGB" and sample.center_crop(image, 32).size == (32, 32), path
        else:
            raises(Mistake, f"{path} cannot be read", sample.read_image, path)
    assert np.array(sample.read_image(join(tmp_path, "alpha.png"))).min() == 255  # lies on white
    path = join(tmp_path, "deep.png")
    for image in (sample.read_image(path), sample.center_crop(Image.open(path), 32)):
        assert 100 < np.array(image).mean() < 155  # not white: 16 bits are scaled, not cut
    assert abs(sample.to_tensor(Image.open(path)).mean()) < 0.2


def test_crops_have_the_right_size_and_views_are_mirrored_unless_flips_are_off(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    rng = np.random.default_rng(0)
    crops = [train_tokenizer.random_crop(image, 32, 1.25, True, rng) for _ in range(20)]
    assert {crop.size for crop in (*crops, sample.center_crop(image, 32))} == {(32, 32)}
    for views in (2, 10):
        crops = [np.array(crop) for crop in train_ar.crop_views(image, 32, views, True)]
        assert all(np.array_equal(crops[i][:, ::-1], crops[i + 1]) for i in range(0, views, 2))
        plain = [np.array(crop) for crop in train_ar.crop_views(image, 32, views, False)]
        assert np.array_equal(plain, crops[::2]) and len(crops) == views
    # A large JPEG is decoded at a fraction for random crops, and only for them.
    save_noise(join(tmp_path, "x", "large.jpg"), size=(256, 256))
    exact = np.array(Image.open(tmp_path / "x" / "large.jpg"))
    for draft_size, equal in ((0, True), (32, False)):
        train, held_out = train_tokenizer.open_data(str(tmp_path), 32, draft_size)
        assert np.array_equal(train[0][0], exact) == equal and np.array_equal(held_out[0][0], exact)


def test_an_epoch_shows_each_item_once_and_processes_share_the_positions_of_a_step():
    order = [train_tokenizer.item_at(i, 10, 0) for i in range(20)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    config = train_tokenizer.TrainConfig(batch=8, micro_batch=2)
    seen = []
    for rank in (0, 1):
        with mock.patch.object(train_tokenizer, "rank", lambda: rank), \
                mock.patch.object(train_tokenizer, "world", lambda: 2):
            seen += train_tokenizer.positions(config, 5)
            assert train_tokenizer.passes_of(config) == 2
    assert seen == list(range(40, 48))


def test_the_autoregressive_model_sees_a_view_of_each_image_by_position():
    codes = np.arange(30 * (1 + 10 * 4), dtype=np.uint16).reshape(30, -1)
    with mock.patch.object(train_ar, "SHARD", 8):
        shards = [codes[i:i + 8] for i in range(0, 30, 8)]
        labels, tokens = train_ar.read_batch(shards, 30, 0, range(40, 48), 4)
        _, part = train_ar.read_batch(shards, 30, 0, range(43, 48), 4)
    assert torch.equal(part, tokens[3:])
    for place, label, some in zip(range(40, 48), labels.tolist(), tokens.tolist()):
        row = codes[train_tokenizer.item_at(place, 30, 0)].tolist()
        assert label == row[0] and some in [row[i:i + 4] for i in range(1, 41, 4)]


# ---- Parts of training ---------------------------------------------------------------------------

def test_learning_rate_warms_up_stays_and_falls_times_are_even_and_averages_follow():
    config = train_tokenizer.TrainConfig(steps=100, lr=1.0, lr_final=0.1, warmup_steps=10,
                                         decay_steps=50)
    model, ema, rates = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), []
    optimizer = train_tokenizer.make_optimizer(model, config)
    for step in (1, 10, 51, 76):
        train_tokenizer.set_lr(optimizer, step, config)
        rates.append(optimizer.param_groups[0]["lr"])
    assert np.allclose(rates, [0.1, 1.0, 1.0, 0.55])
    u = train_tokenizer.draw_times(64, torch.Generator().manual_seed(0))
    assert sorted((u * 64).long().tolist()) == list(range(64)) and u.sort().values.ne(u).any()
    expected = 0.9 * ema.weight.detach() + 0.1 * model.weight.detach()
    train_tokenizer.update_ema(ema, model, 0.9)
    close(ema.weight.detach(), expected, 1e-6)  # float32 rounding


def test_unused_codebook_rows_are_reseeded():
    use = train_tokenizer.CodebookUse(4)
    for _ in range(3):
        use.update(torch.tensor([[0, 1]]))
    assert use.idle.tolist() == [0, 0, 3, 3] and use.share(2) == 0.5
    first, second = torch.zeros(4, 8), torch.ones(4, 8)
    z = torch.randn(2, 3, 8)
    use.reseed(z, torch.Generator().manual_seed(0), 3, [first, second])
    assert first[:2].abs().max() == 0 and (second[:2] == 1).all()
    distances = torch.cdist(first[2:], F.normalize(z.flatten(0, 1), dim=-1))
    assert distances.min(1).values.max() < 1e-3  # cdist's own rounding
    assert torch.equal(first[2:], second[2:])


def test_perceptual_and_alignment_losses_run_on_files_in_torch_hubs_cache(tmp_path):
    """Random weights of the real shapes, where torch.hub keeps the real ones."""
    import torchvision
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).state_dict()
    weights = {name: torch.zeros(1).expand(value.shape) for name, value in shapes.items()}
    for name in [name for name in weights if name.startswith("features")]:
        weights[name] = torch.randn(shapes[name].shape) / 20
    for folder in ("checkpoints", "facebookresearch_dinov2_main"):
        os.makedirs(tmp_path / folder)
    torch.save(weights, tmp_path / "checkpoints" / "vgg16-397923af.pth")
    (tmp_path / "facebookresearch_dinov2_main" / "hubconf.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Conv2d):\n"
        "    def forward_features(self, x):\n"
        "        return {'x_norm_patchtokens': self(x).flatten(2).mT}\n"
        "def dinov2_vitb14(**kwargs):\n"
        "    return Net(3, 768, 14, 14)\n")
    with mock.patch.object(torch.hub, "_hub_dir", str(tmp_path)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, on the way lpips calls it
        lpips, repa = train_tokenizer.PerceptualLoss(), train_tokenizer.RepaLoss()
        train("tokenizer", tmp_path / "out", "--diffusion-depth", "2", "--repa-depth", "1",
              "--lpips", "0.5", "--repa", "0.5", "--steps", "1")
    assert {"lpips", "repa"} <= {*log_of(tmp_path / "out")[0]}
    images, other = pictures(2, 64), pictures(4, 64)[2:].requires_grad_()
    output = mt.TrainOutput(None, None, images, None, None, None)
    assert not lpips.net.training and not any(p.requires_grad for p in lpips.parameters())
    assert lpips(output, images) == 0
    distance = lpips(output._replace(predicted=other), images)
    assert distance > 0 and torch.autograd.grad(distance, other)[0].abs().max() > 0
    small = F.interpolate((images / 2 + 0.5 - repa.mean) / repa.std, size=(56, 56), mode="bicubic")
    features = repa.net.forward_features(small)["x_norm_patchtokens"]        # (2, 16, 768)
    for sign, expected in ((1, 0), (-1, 2)):  # float32 rounding of a cosine
        assert abs(repa(output._replace(repa=sign * features), images) - expected) < 1e-5


# ---- Runs of the trainers ------------------------------------------------------------------------

def start(program, *argv, processes=0):
    """A process, or several under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python",
                f"--nproc_per_node={processes}"] if processes else []
    return subprocess.Popen([*torchrun, sys.executable, *program, *argv], text=True, cwd=HERE,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@functools.cache
def photographs():
    """A data set of 100 images for training, one of which cannot be read, and 6 held out."""
    make_folder(join(kept(), "data", "train"), per_class=50)
    make_folder(join(kept(), "data", "val"), per_class=3)
    Path(kept(), "data", "train", "a_dog", "020.jpg").write_text("no image")
    return join(kept(), "data")


def options(name):
    """The command line of a tiny run, but for --out."""
    if name == "tokenizer":
        return TINY_TOKENIZER
    return TINY_AR + ["--data", photographs(), "--codes", join(kept(), "codes"),
                      "--tokenizer", join(trained("tokenizer"), "last.pt")]


def train(name, out, *more):
    """Runs a trainer in this process; returns what it printed."""
    return quietly(TRAINERS[name].main, [*options(name), "--out", str(out), *map(str, more)])


@functools.cache
def trained(name):
    """The folder of a tiny run that nothing interrupted, with checkpoints that stay."""
    out = join(kept(), name)
    Path(kept(), f"{name}.txt").write_text(train(name, out, "--keep-every", 4))
    return out


def weights_of(folder, part="model", name="last.pt"):
    """All weights of the checkpoint in a folder as one vector."""
    saved = torch.load(join(folder, name), weights_only=True)
    return torch.cat([value.flatten() for value in saved[part].values()])


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_exactly(tmp_path):
    outs = {name: str(tmp_path / name) for name in TRAINERS if trained(name)}
    running = {name: start([f"train_{name}.py"], *options(name), "--out", out)
               for name, out in outs.items()}
    for name, process in running.items():
        while process.poll() is None and not os.path.exists(join(outs[name], "last.pt")):
            time.sleep(0.01)
        process.kill()
        said, _ = process.communicate()
        assert process.returncode == -9, said
    for name, out in outs.items():
        said = train(name, out)
        assert "step 0 of" not in said
        for part in ("model", "ema"):
            assert torch.equal(weights_of(out, part), weights_of(trained(name), part)), part
        # From a checkpoint that was kept
        assert {"step_4.pt", "step_8.pt"} <= {*os.listdir(trained(name))}
        os.rename(shutil.copy(join(trained(name), "step_4.pt"), tmp_path), join(out, "last.pt"))
        assert "step 4 of 8" in train(name, out)
        assert torch.equal(weights_of(out), weights_of(trained(name)))


def test_another_run_is_refused_by_what_differs_and_other_settings_are_printed(tmp_path):
    for name, flags, text in (
            ("tokenizer", ["--beta", "5"], "is of another run: beta 5.0 (was 4.0)"),
            ("ar", ["--tokenizer", small_checkpoint()], "is of another run: vocab_size 64 (was 32)")):
        raises(Mistake, text, train, name, trained(name), *flags)
    said = train("tokenizer", trained("tokenizer"), "--lr", "0.5", "--seed", "3")
    assert "other settings: " in said and "lr 0.5 (was 0.003), seed 3 (was 0)" in said
    raises(Mistake, "is of another run", train, "tokenizer", trained("ar"))  # --out of the other
    # Classes by name: the same images at another place go on, another name does not.
    moved = shutil.copytree(photographs(), tmp_path / "moved")
    shutil.copytree(trained("ar"), tmp_path / "ar")
    train("ar", tmp_path / "ar", "--data", moved)
    os.rename(moved / "train" / "a_dog", moved / "train" / "wolf")
    os.rename(moved / "val" / "a_dog", moved / "val" / "wolf")
    raises(Mistake, "class 0 b_cat (was a_dog), class 1 wolf (was b_cat)", train, "ar",
           tmp_path / "ar", "--data", moved)


def test_a_number_that_is_not_finite_stops_the_run_by_name(tmp_path):
    real, calls = Tokenizer.forward, []

    def broken(self, *args):
        output = real(self, *args)
        calls.append(torch.is_grad_enabled())
        return output._replace(vq_loss=output.vq_loss * math.nan) if sum(calls) == 3 else output
    with mock.patch.object(Tokenizer, "forward", broken):
        raises(Mistake, "vq is not finite", train, "tokenizer", tmp_path, "--log-every", 100)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    assert weights_of(tmp_path).isfinite().all()


def test_unreadable_images_are_named_and_others_take_their_place(tmp_path):
    bad = join(photographs(), "train", "a_dog", "020.jpg")
    trained("ar")
    said = train("tokenizer", tmp_path, "--data", photographs(), "--batch", 32, "--eval-images", 1)
    for text in (said, Path(kept(), "ar.txt").read_text()):
        assert f"skipped: {bad} cannot be read" in text and '"step": 8' in text
    assert "group_knows" not in log_of(tmp_path)[-1]  # of one image, no number
    source = train_tokenizer.Folder(join(photographs(), "train"))
    number, = [i for i in range(100) if source.path(i) == bad]
    found = []
    quietly(lambda: found.append(train_tokenizer.read_any(source, number)))
    assert np.array_equal(found[0][0], source[number + 1][0])


def run_in_turn(commands):
    """In processes of their own: the programs of some command lines, all with one start."""
    device = sample.join_processes()
    for name, argv in json.loads(commands):
        program = {**TRAINERS, "sample": sample}[name]
        program.join_processes = lambda: device
        program.leave_processes = sample.wait
        program.main(argv)


STEADY = "--lr 1e-3 --warmup-steps 1 --ema 0 --steps 4".split()
STEADY = {"tokenizer": STEADY + ["--reseed-after", "0"], "ar": STEADY + ["--dropout", "0"]}
SAMPLES = "--cfg 1.1:3 --batch 7 --num-images 20".split()


@functools.cache
def two_processes():
    """What two processes make that are started once: runs of both trainers, and samples."""
    root = join(kept(), "two")
    commands = [[name, [*options(name), *STEADY[name], "--out", join(root, name)]]
                for name in TRAINERS]
    commands.append(["sample", ["--ckpt", small_checkpoint(), *SAMPLES, "--npz",
                                join(root, "samples.npz")]])
    code = "import sys, test_shapes; test_shapes.run_in_turn(sys.argv[1])"
    running = start(["-c", code], json.dumps(commands), processes=2)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said
    return root


def test_two_processes_and_two_passes_take_the_steps_of_one(tmp_path):
    """Sums of gradients differ by rounding, which Adam magnifies where gradients are near zero: so
    the weights must agree to a twentieth of the way they went."""
    root = two_processes()
    for name, model, config in (("tokenizer", Tokenizer, TokenizerConfig), ("ar", AR, ARConfig)):
        one, passes = (str(tmp_path / name / part) for part in ("one", "passes"))
        train(name, one, *STEADY[name])
        train(name, passes, *STEADY[name], "--micro-batch", 2)
        torch.manual_seed(0)
        begun = model(config(**torch.load(join(one, "last.pt"), weights_only=True)["config"]))
        begun = torch.cat([value.flatten() for value in begun.state_dict().values()])
        way = (weights_of(one) - begun).norm()
        for folder in (passes, join(root, name)):
            assert (weights_of(folder) - weights_of(one)).norm() < 0.05 * way, folder


def test_new_runs_start_from_the_weights_of_others_classes_by_name(tmp_path):
    still = ["--lr", 0, "--lr-final", 0, "--steps", 1, "--init-from"]
    tokenizer, ar = (join(trained(name), "last.pt") for name in TRAINERS)
    train("tokenizer", tmp_path / "tokenizer", *still, tokenizer, "--reseed-after", 0)
    assert torch.equal(weights_of(tmp_path / "tokenizer"), weights_of(trained("tokenizer"), "ema"))
    raises(RuntimeError, "quantizer.codebook", train, "tokenizer", tmp_path / "other", *still,
           tokenizer, "--codebook-size", 64)  # torch names what does not fit
    data = make_folder(tmp_path / "data", "a_ant", "b_cat", "a_dog")  # ant is new
    said = train("ar", tmp_path / "ar", *still, ar, "--data", data)
    assert "2 classes by name; 1 new: a_ant" in said
    tuned, begun = load_ar(str(tmp_path / "ar" / "last.pt")), load_ar(ar)
    assert torch.equal(tuned.output.weight, begun.output.weight)
    rows, old = tuned.cls_embedding.weight, begun.cls_embedding.weight
    assert torch.equal(rows[1:], old) and len(rows) == 4  # dog, cat, the null class

    # The authors' classes have numbers: by position where the folders are sorted WordNet ids
    path, config = str(tmp_path / "released.pt"), replace(SMALL_AR, num_classes=1000)
    begun = AR(config)
    torch.save({**sample.pack("ar", begun), "classes": [*map(str, range(1000))]}, path)
    for name, expected in (("n{:08d}", "1000 classes by name; 0 new"), ("x{}", "0 classes by name")):
        model = AR(config)
        said = quietly(train_ar.start_from, model, path, [name.format(i) for i in range(1000)])
        rows = model.cls_embedding.weight == begun.cls_embedding.weight
        assert expected in said and rows[-1].all() and rows[0].all() == (name[0] == "n")


def test_held_out_numbers_are_logged():
    lines = log_of(trained("tokenizer"))
    assert {"flow", "vq", "gradient", "codebook", "images_per_s", "hours_left"} <= {*lines[0]}
    assert {*lines[-1]} == {"step", "psnr_by_group", "group_knows"}
    assert "reconstructions_000008.png" in os.listdir(trained("tokenizer"))
    labels, tokens, model = torch.tensor([0, 3]), some_tokens(), small_ar()
    found = train_ar.evaluate(model, labels, tokens)
    assert {*found} == {*log_of(trained("ar"))[-1]} - {"step"}
    logs = model(labels, tokens).log_softmax(-1).gather(2, tokens[..., None])
    assert abs(found["val_loss"] + logs.mean().item()) < 1e-5  # float32 rounding


def test_codes_go_on_where_they_were_killed(tmp_path):
    real, calls = Tokenizer.encode, []

    def encode(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, images)
    config = train_ar.TrainConfig(codes=str(tmp_path), views=10, workers=0)
    tokenizer, data = small_tokenizer(), train_tokenizer.Shapes(0, 40, 32)
    with mock.patch.object(Tokenizer, "encode", encode), mock.patch.object(train_ar, "SHARD", 12):
        with contextlib.suppress(KeyboardInterrupt):
            quietly(train_ar.read_codes, config, tokenizer, data)
        for _ in range(2):  # the second time, there is nothing left to do
            quietly(train_ar.read_codes, config, tokenizer, data)
        codes = np.concatenate(train_ar.read_codes(config, tokenizer, data))
    assert calls == [120, 120, 120, 120, 40]  # views of 12 images; the third batch was lost
    views = train_ar.Views(data, 32, 10, True)
    for i in (0, 5, 39):
        assert codes[i].tolist() == [i % 10, *tokenizer.encode(views[i][0]).flatten().tolist()]
    for other in (replace(config, flip=False), replace(config, views=2)):
        quietly(train_ar.read_codes, other, tokenizer, data)
    assert len(os.listdir(tmp_path)) == 3  # each in a folder of its own
    assert codes.dtype == np.uint16
    data.classes = 7_000 * data.classes  # as many as there are faces, say
    assert train_ar.encode_all(tokenizer, views, [0], 0).dtype == np.int32


# ---- Sampling ------------------------------------------------------------------------------------

@functools.cache
def small_checkpoint():
    """A checkpoint of the two small models in random weights."""
    path = join(kept(), "ar.pt")
    torch.save({**sample.pack("ar", small_ar()), "classes": list("abcde"),
                "tokenizer": sample.pack("tokenizer", small_tokenizer()),
                "settings": {"cfg_start": 1.1, "cfg_end": 3.0}}, path)
    return path


def draw(*flags):
    return quietly(sample.main, ["--ckpt", small_checkpoint(), *map(str, flags)])


def samples_in(path):
    return np.load(path)["arr_0"]


def levels_apart(a, b):
    """The largest difference of uint8 pixels."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return int(np.abs(a.astype(int) - b).max())


def uniforms(count, seed=0, numbers=(0, 1)):
    """The random numbers that decide on the tokens of samples."""
    return torch.stack([torch.rand(count, generator=sample.seeded(seed, "tokens", i))
                        for i in numbers])


def test_images_depend_on_seed_and_number_not_on_batches_or_processes(tmp_path):
    def npz(name, *flags):
        draw("--cfg", "1.1:3", "--num", 20, *flags, "--npz", tmp_path / name)
        return samples_in(tmp_path / name)
    whole = npz("20.npz")
    # Products of another number of rows are rounded otherwise, so pixels may differ by a level.
    for batch in (1, 7):
        assert levels_apart(npz(f"{batch}.npz", "--batch", batch), whole) <= 1
    assert levels_apart(samples_in(join(two_processes(), "samples.npz")), whole) <= 1
    assert levels_apart(npz("other.npz", "--seed", 1), whole) > 50
    assert levels_apart(npz("trained.npz", "--cfg", "1.1:3"), whole) == 0
    assert sorted(os.listdir(tmp_path)) == ["1.npz", "20.npz", "7.npz", "other.npz", "trained.npz"]
    # One process is one process, whatever a batch system says.
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "4", "RANK": "0"}):
        assert levels_apart(npz("alone.npz"), whole) == 0


def test_interrupted_sampling_goes_on_and_ends_as_the_whole(tmp_path):
    flags, real, calls = ["--num", 12, "--batch", 3, "--npz"], sample.to_uint8, []
    whole, halves = tmp_path / "whole.npz", tmp_path / "halves.npz"
    draw(*flags, whole)

    def failing(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(images)
    with mock.patch.object(sample, "to_uint8", failing):
        with contextlib.suppress(KeyboardInterrupt):
            draw(*flags, halves)
        assert not halves.exists()
        draw(*flags, halves)
    assert len(calls) == 3 + 2  # two batches were kept, the third was lost
    assert np.array_equal(samples_in(whole), samples_in(halves))
    raises(Mistake, "is there already", draw, *flags, halves)


def test_each_class_is_drawn_equally_often_and_shuffled(tmp_path):
    config = sample.SampleConfig(num_images=200, npz="x")
    labels = sample.labels_of(config, list("abcde"))
    assert np.bincount(labels).tolist() == [40] * 5 and labels[:5] != [0, 1, 2, 3, 4]
    config = sample.SampleConfig(labels="c,0")
    assert sample.labels_of(replace(config, num_images=3), list("abcde")) == [2, 0, 2]
    assert sample.labels_of(replace(config, stream=True), list("abcde")) == [2, 0]


def drawn_by_library(labels, prefix=None, groups=None):
    """Images of two labels, with the random numbers of sample.py's images 0 and 1."""
    tokens = small_ar().generate(torch.tensor(labels), (1.1, 3.0), prefix, uniforms=uniforms(16))
    noise = sample.noise_of(0, "start", [0, 1], (3, 32, 32), CPU)
    return small_tokenizer().decode(tokens, noise, groups=groups)


def is_picture(path, images, columns):
    """Asserts that a file shows these images, but for rounding in another order."""
    expected = sample.image_grid(images, columns)
    assert levels_apart(np.array(Image.open(path)), np.array(expected)) <= 1


def test_grids_and_first_tokens_only_are_what_the_library_draws(tmp_path):
    out = tmp_path / "s.png"
    draw("--num", 2, "--labels", "b,d", "--out", out)
    is_picture(out, drawn_by_library([1, 3]), 2)
    with mock.patch.object(sample, "decode_one_token", wraps=model_ar.decode_one_token) as counted:
        draw("--num", 2, "--labels", "b,d", "--tokens", 8, "--out", out)
    assert counted.call_count == 7  # and one by the prefill
    is_picture(out, drawn_by_library([1, 3], groups=2), 2)


def test_streamed_samples_end_as_those_drawn_at_once(tmp_path):
    flags = "--stream", "--labels", "b,d", "--out", tmp_path / "s.png"
    with mock.patch.object(sample, "autocast", in_bf16):
        draw(*flags)
        assert not torch.is_autocast_enabled("cpu")
    draw(*flags)
    names = [f"s_{count:03d}.png" for count in (4, 8, 12, 16)] + ["s.gif", "s.png", "s_steps.png"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert Image.open(tmp_path / "s.gif").n_frames == 4
    assert Image.open(tmp_path / "s_steps.png").size == (4 * 64 + 6, 2 * 64 + 2)
    is_picture(tmp_path / "s.png", drawn_by_library([1, 3]), 2)


def test_layouts_keep_the_first_tokens_of_the_reference(tmp_path):
    path, image = tmp_path / "image.png", sample.image_grid(pictures(1), 1)
    image.save(path)
    draw("--prefix", path, "--keep", "0,5,16", "--labels", "a,c", "--out", tmp_path / "s.png")
    reference = sample.to_tensor(sample.center_crop(image, 32))[None]
    tokens = small_tokenizer().encode(reference).expand(2, -1)
    rows = [(reference, drawn_by_library([0, 2], tokens[:, :count])) for count in (0, 5, 16)]
    is_picture(tmp_path / "s.png", torch.cat([part for row in rows for part in row]), 3)


def test_reconstructions_come_with_the_same_crops_and_psnr(tmp_path):
    folder = make_folder(tmp_path / "images", per_class=5)
    said = draw("--reconstruct", folder, "--batch", 4, "--out", tmp_path / "r.png")
    originals, decoded = (samples_in(tmp_path / f"r_{name}.npz")
                          for name in ("originals", "reconstructions"))
    paths = [join(folder, name) for name in fid.find_images(folder)]
    assert originals.shape == decoded.shape == (10, 32, 32, 3) and len(paths) == 10
    for path, original in zip(paths, originals):
        assert np.array_equal(sample.center_crop(Image.open(path), 32), original)
    error = ((originals / 255.0 - decoded / 255.0) ** 2).mean((1, 2, 3))
    assert f"PSNR {np.mean(-10 * np.log10(error)):.2f} dB over 10 images" in said
    draw("--reconstruct", folder, "--num", 4, "--out", tmp_path / "r.png")  # spread over all
    assert np.array_equal(samples_in(tmp_path / "r_originals.npz"), originals[sample.spread(4, 10)])
    Path(paths[3]).write_text("no image")
    raises(Mistake, f"{paths[3]} cannot be read", draw, "--reconstruct", folder, "--out",
           tmp_path / "other.png")


# ---- Mistakes and files --------------------------------------------------------------------------

class Harmful:
    """Unpickling this object would create a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_checkpoints_give_back_the_model_and_nothing_in_other_files_runs(tmp_path):
    path, created, model = str(tmp_path / "t.pt"), str(tmp_path / "created"), small_tokenizer()
    sample.write(path, lambda file: torch.save(sample.pack("tokenizer", model), file))
    images, noise = pictures(), torch.randn(2, 3, 32, 32)
    loaded = load_tokenizer(path)
    assert torch.equal(loaded.decode(loaded.encode(images), noise),
                       model.decode(model.encode(images), noise))
    assert loaded.repa_head is None and os.listdir(tmp_path) == ["t.pt"]
    raises(Mistake, "is a checkpoint of kind 'tokenizer', 'ar' is needed", load_ar, path)
    for content in ([1], {"odd": torch.ones(2)}, {"model": {"odd": torch.ones(2)}},
                    Harmful(created), {"model": {}, "args": Harmful(created)}):
        torch.save(content, path)
        raises(Mistake, f"{path} is no checkpoint of this code", load_ar, path)
        raises(Mistake, f"{path} is no checkpoint of this code", load_tokenizer, path)
    os.truncate(path, 100)
    raises(Mistake, "damaged", load_ar, path)
    Path(path).write_bytes(pickle.dumps(Harmful(created), protocol=2))
    raises(Mistake, f"{path} is no checkpoint", load_ar, path)
    assert not os.path.exists(created)
    pickle.loads(Path(path).read_bytes())  # ... which runs it
    assert os.path.exists(created)


def test_mistakes_get_one_clear_line(tmp_path):
    tokenizer, ckpt = str(tmp_path / "tokenizer.pt"), f"--ckpt {small_checkpoint()}"
    torch.save(sample.pack("tokenizer", small_tokenizer()), tokenizer)
    for program, text, flags in (
            (train_tokenizer, "no folder nowhere", "--data nowhere"),
            (train_tokenizer, "does not divide", "--preset toy --batch 6 --micro-batch 4"),
            (train_tokenizer, "needs a REPA head", "--preset toy --repa 1"),
            (train_ar, "no checkpoint at nowhere", "--tokenizer nowhere"),
            (train_ar, "--size must be one of B, L", "--size M"),
            (train_ar, "--views 1, 2 or 10", "--views 3"),
            (sample, "no checkpoint at nowhere", "--ckpt nowhere"),
            (sample, "'ar' is needed", f"--ckpt {tokenizer}"),
            (sample, "--cfg must be", ckpt + " --cfg 1:2:3"),
            (sample, "no class 'dog'", ckpt + " --labels b,dog"),
            (sample, "no class '5'", ckpt + " --labels 5"),
            (sample, "exclude one another", ckpt + " --stream --npz x.npz"),
            (sample, "--solver must be one of", ckpt + " --solver heun"),
            (sample, "--out end in .png", ckpt + " --out x.txt"),
            (sample, "is there already", ckpt + f" --npz {tokenizer}"),
            (sample, "--tokens must be a multiple of 4", ckpt + " --tokens 6"),
            (sample, "--tokens must be a multiple of 4", ckpt + " --tokens 20"),
            (sample, "cannot be read", ckpt + " --prefix nowhere"),
            (sample, "no folder nowhere", ckpt + " --reconstruct nowhere")):
        if "--out" not in flags:
            flags += f" --out {tmp_path / 'out' / 'x.png'}"
        raises(Mistake, text, quietly, program.main, flags.split())
    for program, text, flags in (  # as argparse says them
            (train_tokenizer, "num_tokens must divide by num_groups", "--num-groups 7"),
            (train_tokenizer, "--lr must be 0 or a positive number, got nan", "--lr nan"),
            (train_tokenizer, "--batch must be a positive number, got 0", "--batch 0"),
            (train_ar, "--ema must be below 1", "--ema 1"),
            (sample, "unrecognized arguments: --odd", "--odd"),
            (sample, "--batch: invalid int value: 'x'", "--batch x")):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            raises(SystemExit, "2", program.main, flags.split())
        assert text in said.getvalue(), said.getvalue()


def test_importing_does_nothing_and_a_mistake_ends_a_program_with_one_line():
    code = ("import sys; sys.argv = ['x', '--ckpt', 'nowhere']; import train_ar, sample; "
            "assert not {'lpips', 'torchvision'} & set(sys.modules); sample.run(sample.main)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "x: no checkpoint at nowhere\n", done.stderr
    with mock.patch.object(sys, "argv", ["x", "--ckpt", "nowhere"]):  # %run in a notebook
        raises(SystemExit, "x: no checkpoint at nowhere", quietly, sample.run, sample.main)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        raises(SystemExit, "0", sample.main, ["--help"])
    assert "images at a time [100]" in said.getvalue()


def test_ten_lines_of_the_readme_run(tmp_path):
    text = Path(HERE, "README.md").read_text()
    ten_lines = text.split("```python\n")[1].split("```")[0]
    os.makedirs(tmp_path / "out" / "ar")
    shutil.copy(join(trained("ar"), "last.pt"), tmp_path / "out" / "ar")
    sample.image_grid(pictures(1), 1).save(tmp_path / "photo.jpg")
    with contextlib.chdir(tmp_path):
        exec(ten_lines, {})
        assert Image.open("four.png").size == (4 * 64 + 6, 64)


# ---- Evaluation ----------------------------------------------------------------------------------

class TinyInception(torch.nn.Module):
    """Stands for InceptionV3: 8, 6 and 5 numbers an image in place of 2048, 2023 and 1008."""

    def forward(self, images):
        x = images[:, :4, :4].flatten(1).float() / 128 - 1                   # (B, 48)
        pool = torch.tanh(x @ torch.linspace(-1, 1, 48 * 8).view(8, 48).T.cos() / 4)
        return fid.Features(pool, pool[:, :6].square(), (9 * pool[:, :5]).softmax(1))


def tiny_fid(*argv):
    """Runs fid.main with the tiny network; returns its figures and what it printed."""
    figures = {}
    with mock.patch.object(fid, "load_inception", lambda path: TinyInception()):
        said = quietly(lambda: figures.update(fid.main([*map(str, argv)])))
    return figures, said


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
        Image.fromarray(image).save(join(folder, f"{i:05d}{ending}"))
    return str(folder)


def gaussian(n, d, seed):
    return np.random.default_rng(seed).standard_normal((n, d)) * np.linspace(.1, 2, d) + 1


def moments(rows):
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_inception_equals_torch_fidelitys_and_loads_its_weights(tmp_path):
    network, path = random_inception(), str(tmp_path / "weights.pth")
    images = torch.from_numpy(noise_images(2, size=(20, 30)))
    torch.save(network.state_dict(), path)
    pool, spatial, probs = fid.load_inception(path)(images)
    assert (pool.shape, spatial.shape, probs.shape) == ((2, 2048), (2, 2023), (2, 1008))
    expected = [3.130364, 5.148030, 1.536695, 1.666369]  # torch-fidelity's, in these weights
    close(pool[0, [2, 3, -2, -1]], torch.tensor(expected), 5e-4)  # float32, through 48 layers
    close(probs, (pool @ network.fc.weight.T).softmax(1), 1e-6)
    assert spatial.min() == 0 and spatial.max() > 0  # after the ReLU
    raises(Mistake, "fetch https://github.com/mseitzer", fid.load_inception, "nowhere.pth")


def test_resize_reads_where_tensorflow_1_does():
    row = torch.tensor([0., 10, 20, 60]).expand(1, 2, 3, 4)
    expected = torch.tensor([0, 20 / 3, 40 / 3, 20, 140 / 3, 60])  # at 0, 2/3, 4/3, 2, 8/3, 10/3
    close(fid.resize(row, 6), expected.expand(1, 2, 6, 6), 1e-5)
    images = torch.rand(1, 3, 299, 299)
    assert torch.equal(fid.resize(images, 13), images[:, :, ::23, ::23])


def test_frechet_distance_is_the_known_one_and_scipys_also_of_few_samples():
    zero, eye = np.zeros(5), np.eye(5)
    assert np.isclose(fid.frechet_distance(zero, eye, zero + 3, eye), 45)
    assert fid.frechet_distance(zero, 0 * eye, zero + 1, eye) == 10
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
    # Splits in file order, the last one shorter: one class only, then three in turn
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
    precision, recall = fid.precision_recall(torch.cat([x, x + 100]), y)  # y drops a mode
    assert precision > 0.8 and recall <= 0.5
    lattice = torch.cartesian_prod(*[torch.arange(4.)] * 3)  # with ties: balls hold their edge
    pairs = [(lattice[::2], lattice[::3], 3)]
    for k, offset in ((3, 0), (1, 1000)):  # there, float32 would lose the distances
        pairs.append((torch.from_numpy(gaussian(150, 6, 7) + offset).float(),
                      torch.from_numpy(gaussian(130, 6, 8) * 1.3 + offset).float(), k))
    for x, y, k in pairs:
        found = fid.precision_recall(x, y, k, rows=40)
        assert found == brute_force(x.double().numpy(), y.double().numpy(), k)


def test_images_of_an_npz_are_never_read_as_a_whole(tmp_path):
    images = noise_images(600, size=(64, 64))                                # 7.4 MB
    path = str(tmp_path / "images.npz")
    for save in (np.savez, np.savez_compressed):
        save(path, images)
        tracemalloc.start()
        side = fid.open_npz(path)
        for _ in range(2):
            for i, part in enumerate(side.batches(10)):
                assert np.array_equal(part, images[10 * i:10 * i + 10])
        assert i == 59 and side.count == 600 and tracemalloc.get_traced_memory()[1] < 4e6
        tracemalloc.stop()


def test_figures_of_files_are_those_of_the_functions(tmp_path):
    x, y = noise_images(40, 1), noise_images(30, 2)
    samples, stats, both = (str(tmp_path / name) for name in ("y.npz", "stats.npz", "both.npz"))
    reference = save_images(tmp_path / "x", x)
    np.savez(samples, y)
    figures, said = tiny_fid(reference, samples, "--batch", 7)
    assert "a second" in said and "has 30 images; figures compare for 50,000" in said
    assert "is %s the REFERENCE?" % samples in said
    a, b = (TinyInception()(torch.from_numpy(images)) for images in (x, y))
    expected = [fid.frechet_distance(*moments(a.pool.double().numpy()),
                                     *moments(b.pool.double().numpy())),
                fid.frechet_distance(*moments(a.spatial.double().numpy()),
                                     *moments(b.spatial.double().numpy())),
                *fid.inception_score(b.probs), *fid.precision_recall(a.pool, b.pool)]
    assert list(figures) == ["fid", "sfid", "inception_score", "inception_score_std",
                             "precision", "recall"]
    assert np.allclose(list(figures.values()), expected, rtol=1e-6)

    # Statistics in place of images; statistics beside other images, as in ADM's files
    tiny_fid(reference, "--save-stats", stats)
    figures, said = tiny_fid(stats, samples)
    assert "no precision and recall" in said
    assert np.allclose(list(figures.values()), expected[:4], rtol=1e-6)
    with np.load(stats) as file:
        np.savez(both, x[:20], **file)
        np.savez(stats, mu=file["mu"], sigma=file["sigma"])
    expected[4:] = fid.precision_recall(a.pool[:20], b.pool)
    assert np.allclose(list(tiny_fid(both, samples)[0].values()), expected, rtol=1e-6)
    figures, said = tiny_fid(stats, samples)
    assert [*figures] == ["fid", "inception_score", "inception_score_std"] and "no sFID" in said


def test_a_folder_of_classes_has_the_inception_score_of_the_same_images_shuffled(tmp_path):
    images = np.concatenate([noise_images(1, seed).repeat(20, 0) for seed in range(6)])
    save_images(tmp_path / "all", images)
    shuffled = images[np.random.default_rng(0).permutation(len(images))]
    np.savez(tmp_path / "shuffled.npz", shuffled)
    np.savez(tmp_path / "sorted.npz", images)
    with mock.patch.object(fid.inception_score, "__defaults__", (20,)):
        folder, shuffled, in_order = (
            tiny_fid(tmp_path / "all", tmp_path / name)[0]["inception_score"]
            for name in ("all", "shuffled.npz", "sorted.npz"))
    assert folder == shuffled > in_order + 1e-3


def test_hostile_files_and_mistakes_of_evaluation_are_named(tmp_path):
    x = noise_images(6)
    good, path, stats = (str(tmp_path / name) for name in ("good.npz", "x.npz", "stats.npz"))
    np.savez(good, x)
    tiny_fid(good, "--save-stats", stats)
    for text, arrays in (
            *(("arr_0 must be uint8 (N, H, W, 3)", {"arr_0": wrong})
              for wrong in (x / 255, x[..., :1], x[0], x.astype(object))),
            ("holds 1 images", {"arr_0": x[:1]}), ("needs images arr_0", {"images": x})):
        np.savez(path, **arrays)
        raises(Mistake, text, tiny_fid, path, path)
    raises(Mistake, "is no folder and no npz", tiny_fid, "nowhere", good)
    raises(Mistake, "the order is REFERENCE SAMPLES", tiny_fid, good, stats)
    folder = save_images(tmp_path / "x", x)
    for text, image in (("odd.png is L", Image.new("L", (10, 12))),
                        ("images of several sizes", Image.new("RGB", (11, 12)))):
        image.save(join(folder, "odd.png"))
        raises(Mistake, text, tiny_fid, folder, folder)
    Path(folder, "odd.png").write_text("%!PS-Adobe EPSF")  # would start Ghostscript
    raises(Mistake, "odd.png cannot be read", tiny_fid, folder, folder)
    lossy = save_images(tmp_path / "lossy", x, ".jpg")
    assert "compression changes figures" in tiny_fid(lossy, good)[1]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        raises(SystemExit, "2", tiny_fid, good)
    assert "give REFERENCE and SAMPLES" in said.getvalue()


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
