#!/usr/bin/env python3
"""Writes sampling/cases.json: what the logits processors of Hugging Face transformers leave of given logits.

The processors are taken from `generate` itself, so their order is its own: repetition penalty, temperature, top-k,
top-p, min-p.  They run in float64; a case is kept only if float32 keeps the same tokens, so no case is a near tie.
"""
import json
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

SETTINGS = [
    {},
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.8},
    {"temperature": 0.7}, {"temperature": 1.8}, {"temperature": 0.05},
    {"top_k": 1}, {"top_k": 5}, {"top_k": 40}, {"top_k": 100000},
    {"top_p": 0.9}, {"top_p": 0.5}, {"top_p": 0.01},
    {"min_p": 0.05}, {"min_p": 0.4}, {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8}, {"top_p": 0.95, "min_p": 0.1},
    {"temperature": 0.6, "top_k": 50, "top_p": 0.9}, {"temperature": 1.5, "min_p": 0.08},
    {"repetition_penalty": 1.15, "temperature": 0.8, "top_k": 30, "top_p": 0.92, "min_p": 0.02},
    {"repetition_penalty": 2.0, "temperature": 2.5, "top_k": 7, "top_p": 0.7, "min_p": 0.2},
]


def logits():
    """Vectors by name. `ties` holds multiples of a half, so the k-th largest has equals, which all survive top-k; top-p
    is not asked of it, since which of the equals it drops is an accident of the sort."""
    g = torch.Generator().manual_seed(5)
    return {"small": 3 * torch.randn(97, generator=g), "wide": 4 * torch.randn(640, generator=g),
            "steep": 25 * torch.randn(97, generator=g), "negative": 2 * torch.randn(97, generator=g) - 9,
            "ties": (4 * torch.randn(97, generator=g)).round() / 2}


def seen_before(scores):
    """Token ids of a text so far: the two likeliest tokens among others; a repeated id is penalised once."""
    first, second = scores.topk(2).indices.tolist()
    return [3, first, 17, 17, second, 88, first]


def process(model, settings, scores):
    config = GenerationConfig(do_sample=True, **({"top_k": 0} | settings))
    ids = torch.tensor([seen_before(scores)])
    processors = model._get_logits_processor(config, input_ids_seq_length=ids.shape[1], device="cpu")
    return processors(ids, scores[None].clone())[0]


def digits(values):
    """Nine significant digits, which is every bit of a float32."""
    return [float(f"{x:.9g}") for x in values.tolist()]


def main():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))
    vectors, cases = logits(), []
    for name, scores in vectors.items():
        for settings in SETTINGS:
            if name == "ties" and "top_p" in settings:
                continue
            left = process(model, settings, scores.double())
            keep = left.isfinite()
            if not torch.equal(keep, process(model, settings, scores).isfinite()):
                print(f"left out, a near tie: {name} {settings}")
                continue
            ids = keep.nonzero()[:, 0]
            if len(ids) == len(scores) and name not in ("small", "negative"):
                continue  # nothing was cut: long, and no other than the same settings on these two
            cases.append({"logits": name, **settings, "tokens": ids.tolist(),
                          "probabilities": digits(left.softmax(-1)[ids])})
    data = {"seen": {name: seen_before(v) for name, v in vectors.items()},
            "logits": {name: digits(v) for name, v in vectors.items()},
            "log_softmax": {name: digits(v.double().log_softmax(-1)) for name, v in vectors.items()}}
    parts = [f'"{key}": {{\n' + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in named.items()) + "\n}"
             for key, named in data.items()]
    parts.append('"cases": [\n' + ",\n".join(map(json.dumps, cases)) + "\n]")
    out = Path(__file__).resolve().parent / "sampling"
    out.mkdir(exist_ok=True)
    (out / "cases.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
