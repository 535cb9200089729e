"""What PyTorch (cuBLAS, its attention) makes of the model's shapes on this GPU: one JSON list on stdout.

Every time is the median of 20 launches between events on random data, caches emptied before each by reading other
memory, which also gives the host the time to ask for what is measured.
"""

import json

import torch

# M, N, K
GEMMS = {
    "ViT qkv": (577, 3072, 1024),
    "ViT out": (577, 1024, 1024),
    "ViT fc1": (577, 4096, 1024),
    "ViT fc2": (577, 1024, 4096),
    "LM qkv": (640, 12288, 4096),
    "LM out": (640, 4096, 4096),
    "LM gate+up": (640, 22016, 4096),
    "LM down": (640, 4096, 11008),
    "large": (8192, 8192, 8192),
    "decode qkv": (1, 12288, 4096),
    "decode out": (1, 4096, 4096),
    "decode gate+up": (1, 22016, 4096),
    "decode down": (1, 4096, 11008),
    "decode head": (1, 32064, 4096),
}

flush = torch.zeros(64 << 20, dtype=torch.float32, device="cuda")


def median_us(work):
    times = []
    for _ in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.sum()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times[3:])[10]


rows = []


def row(name, flops, moved, work):
    us = median_us(work)
    rows.append({"name": name, "us": us, "tflops": flops / us / 1e6, "gb_per_s": moved / us / 1e3})


def random(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


for name, (m, n, k) in GEMMS.items():
    x, w = random(m, k), random(n, k)
    moved = 2 * (m * k + n * k + m * n)
    row(f"{name} {m}x{n}x{k}", 2 * m * n * k, moved, lambda: torch.nn.functional.linear(x, w))

attention = torch.nn.functional.scaled_dot_product_attention
for name, heads, rows_, keys, size, causal in [
    ("ViT attention", 16, 577, 577, 64, False),
    ("LM attention", 32, 640, 640, 128, True),
    ("decode attention", 32, 1, 1024, 128, False),
    ("decode attention", 32, 1, 4096, 128, False),
]:
    q = random(1, heads, rows_, size)
    k, v = (random(1, heads, keys, size) for _ in range(2))
    pairs = rows_ * (rows_ + 1) // 2 if causal else rows_ * keys
    moved = 4 * heads * size * (rows_ + keys)
    work = lambda: attention(q, k, v, is_causal=causal)
    row(f"{name} {heads}x{rows_}x{keys}x{size}", 4 * heads * size * pairs, moved, work)

source, target = (torch.zeros(1 << 29, dtype=torch.float32, device="cuda") for _ in range(2))
row("copy of 2 GiB", 0, 2 * source.nbytes, lambda: target.copy_(source))
row("sum of 2 GiB", 0, source.nbytes, lambda: source.sum())
print(json.dumps(rows))
