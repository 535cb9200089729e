"""PyTorch and transformers on a LLaVA checkpoint, for `run`: MODEL PROMPT GENERATE THREADS REPETITIONS BLOCKS.

Prints a JSON object a test. Weights stay in the dtype they are stored in; prompts differ in every repetition; one
repetition goes before and is forgotten. BLOCKS 0 leaves pictures out.
"""

import json
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration

path = sys.argv[1]
prompt, generate, threads, repetitions, blocks = map(int, sys.argv[2:])
torch.set_num_threads(threads)
torch.manual_seed(0)
llava = AutoConfig.from_pretrained(path).model_type == "llava"
kind = LlavaForConditionalGeneration if llava else AutoModelForCausalLM
model = kind.from_pretrained(path, dtype="auto", attn_implementation="sdpa").eval()
vocab = model.config.get_text_config().vocab_size


def ids(n):
    # Ids above those of special tokens: the picture's must not be among them.
    return torch.randint(8, vocab, (1, n))


def prefill(n):
    return model(input_ids=ids(n), use_cache=True, logits_to_keep=1)


def decode(n):
    cache, token = None, ids(1)
    for _ in range(n):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)


def picture():
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, dtype=next(model.parameters()).dtype)
    start = time.perf_counter()
    model.get_image_features(pixel_values=pixels)
    return time.perf_counter() - start


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(test, unit, sample):
    with torch.inference_mode():
        sample()
        print(json.dumps({"test": test, "unit": unit, "samples": [sample() for _ in range(repetitions)]}))


report(f"pp{prompt}", "tokens/s", lambda: prompt / timed(lambda: prefill(prompt)))
report(f"tg{generate}", "tokens/s", lambda: generate / timed(lambda: decode(generate)))
if llava and blocks:
    report("img1 / block", "ms", lambda: 1e3 * picture() / blocks)
