"""Measures sampling and training beside what the machine could do.

    python .ci/benchmark.py sample L 64 1.1:8 compiled   one token's step, in random weights;
                                                   compiled or recorded (as sample.py draws from
                                                   5,000 images a process on, or fewer), or eager
    python .ci/benchmark.py decode paper 64        tokens to images, eight steps
    python .ci/benchmark.py train paper 32         a training pass of the tokenizer without LPIPS, REPA
    python .ci/benchmark.py train L 64             a training pass of an autoregressive model

The floor of a token's step is the larger of two times: to read all weights and the cache at the
memory bandwidth, and to compute the products at the rate of a large one; both rates are measured.
"""
import os
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model_ar import AR, SIZES, RecordedStep, decode_one_token  # noqa: E402
from model_tokenizer import TOKENIZERS, Tokenizer, sampling_schedule  # noqa: E402
from sample import autocast, compile_blocks, parse_cfg  # noqa: E402
from train_ar import token_loss  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def seconds(call, repeats=10):
    """Mean seconds of a call, after three to warm up."""
    for i in range(3 + repeats):
        if i == 3:
            synchronize()
            began = time.time()
        call()
    synchronize()
    return (time.time() - began) / repeats


def synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


def machine():
    """Memory bandwidth in bytes/s and rate of a large matrix product in FLOP/s."""
    values = torch.randn(2 ** 30 if ON_GPU else 2 ** 26, dtype=DTYPE, device=DEVICE)
    copy = torch.empty_like(values)
    bandwidth = 2 * values.nbytes / seconds(lambda: copy.copy_(values))
    side = 8192 if ON_GPU else 2048
    square = values[:side ** 2].view(side, side)
    rate = 2 * side ** 3 / seconds(lambda: square @ square)
    name = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(f"{name}, torch {torch.__version__}, {DTYPE}: memory {bandwidth / 1e12:.2f} TB/s, "
          f"products {rate / 1e12:.1f} TFLOP/s", flush=True)
    return bandwidth, rate


@torch.no_grad()
def sample(size, batch, cfg, way="recorded"):
    model = AR(SIZES[size]).to(DEVICE, DTYPE).eval()
    guided = parse_cfg(cfg) is not None
    rows = batch * (1 + guided)
    count = model.config.num_tokens
    length = min(count // 2 + 16, count)  # about the mean of those in use
    given = (model, model.new_cache(rows),
             torch.zeros(batch, 1, dtype=torch.long, device=DEVICE),
             torch.tensor([length - 1], device=DEVICE),
             torch.tensor(3.0, device=DEVICE) if guided else None, length)
    step = RecordedStep() if ON_GPU and way != "eager" else decode_one_token
    if way == "compiled":
        compile_blocks(model)
    began = time.time()
    step(*given)
    synchronize()
    print(f"{way}: first call {time.time() - began:.1f} s", flush=True)
    bandwidth, rate = machine()
    took = seconds(lambda: step(*given), 50)
    weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    cache = rows * model.config.depth * 2 * model.config.width * length
    floor = max((weights + cache) * DTYPE.itemsize / bandwidth, 2 * weights * rows / rate)
    print(f"{size}, batch {batch}, guidance {cfg}, {way}: {1e3 * took:.3f} ms a token, floor "
          f"{1e3 * floor:.3f} ms, {floor / took:.0%}; {batch / took / count:.2f} images/s of tokens",
          flush=True)
    if "profile" in sys.argv and ON_GPU:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            seconds(lambda: step(*given), 2)
        print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=12,
                                           max_name_column_width=60), flush=True)


@torch.no_grad()
def decode(name, batch):
    tokenizer = Tokenizer(TOKENIZERS[name]).to(DEVICE).eval()
    config = tokenizer.config
    tokens = torch.zeros(batch, config.num_tokens, dtype=torch.long, device=DEVICE)
    schedule = sampling_schedule(config.num_groups, config.num_groups, config.beta, config.num_groups)
    noise = torch.randn(1, 3, config.image_size, config.image_size, device=DEVICE)
    with FlopCounterMode(display=False) as flops, autocast(DEVICE):
        tokenizer.velocity(noise, schedule[0], tokenizer.condition(tokens[:1]))
    if ON_GPU:
        compile_blocks(tokenizer)
    with autocast(DEVICE):
        tokenizer.decode(tokens)
        _, rate = machine()
        took = seconds(lambda: tokenizer.decode(tokens), 3)
    share = batch * config.num_groups * flops.get_total_flops() / rate / took
    print(f"decoder of {name}, batch {batch}: {batch / took:.1f} images/s, {share:.0%} of the "
          f"products' rate", flush=True)


def train(name, micro):
    if name in TOKENIZERS:
        model = Tokenizer(TOKENIZERS[name]).to(DEVICE)
        size = model.config.image_size
        images, u = torch.randn(micro, 3, size, size, device=DEVICE), torch.rand(micro, device=DEVICE)

        def loss_of(n):
            output = model(images[:n], u[:n], images[:n])
            return output.flow_loss + output.vq_loss
    else:
        model = AR(SIZES[name]).to(DEVICE)
        labels = torch.zeros(micro, dtype=torch.long, device=DEVICE)
        tokens = torch.zeros(micro, model.config.num_tokens, dtype=torch.long, device=DEVICE)

        def loss_of(n):
            return token_loss(model, labels[:n], tokens[:n])[0]

    def a_pass(n=micro):
        with autocast(DEVICE):
            loss = loss_of(n)
        loss.backward()

    with FlopCounterMode(display=False) as flops:
        a_pass(1)
    if ON_GPU:
        compile_blocks(model)
    a_pass()
    _, rate = machine()
    took = seconds(a_pass, 5)
    memory = torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else float("nan")
    print(f"{name}, micro-batch {micro}: {micro / took:.1f} images/s, "
          f"{micro * flops.get_total_flops() / took / rate:.0%} of the products' rate, peak memory "
          f"{memory:.1f} GB", flush=True)


if __name__ == "__main__":
    {"sample": sample, "decode": decode, "train": train}[sys.argv[1]](
        sys.argv[2], int(sys.argv[3]), *sys.argv[4:6])
