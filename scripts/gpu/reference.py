"""What PyTorch (cuBLAS, its attention) makes of the model's shapes on this GPU: one JSON list on stdout.

Every time is the median of 20 launches between events, caches emptied before each, on random data.
"""

import json

import torch

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
}

flush = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")


def median_us(work):
    times = []
    for _ in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times[3:])[10]


rows = []


def row(name, flops, work):
    us = median_us(work)
    rows.append({"name": name, "us": us, "tflops": flops / us / 1e6})


def random(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


for name, (m, n, k) in GEMMS.items():
    x, w = random(m, k), random(n, k)
    row(f"{name} {m}x{n}x{k}", 2 * m * n * k, lambda: torch.nn.functional.linear(x, w))

attention = torch.nn.functional.scaled_dot_product_attention
for name, heads, length, size, causal in [
    ("ViT attention", 16, 577, 64, False),
    ("LM attention", 32, 640, 128, True),
]:
    q, k, v = (random(1, heads, length, size) for _ in range(3))
    pairs = length * (length + 1) // 2 if causal else length * length
    row(f"{name} {heads}x{length}x{size}", 4 * heads * size * pairs, lambda: attention(q, k, v, is_causal=causal))

source, target = (torch.empty(1 << 30, dtype=torch.float32, device="cuda") for _ in range(2))
us = median_us(lambda: target.copy_(source))
rows.append({"name": "copy of 4 GiB", "us": us, "tflops": 0.0, "gb_per_s": 2 * 4 * (1 << 30) / us / 1e3})
print(json.dumps(rows))
