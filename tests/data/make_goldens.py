#!/usr/bin/env python3
"""Writes the goldens of this folder: small random checkpoints and what Hugging Face transformers computes from them.

    make_goldens.py                     write every case below into this folder
    make_goldens.py CASE ...            only these (a case on another's model needs that one present)
    make_goldens.py --out DIR           write elsewhere
    make_goldens.py --check             write to a temporary folder and compare with what is here

Versions that made the files here: torch 2.15, transformers 5.23, tokenizers 0.23, safetensors 0.8, Pillow 13.0,
numpy 2.4, sentencepiece 0.2.  README.md says what the cases are for and how to read them.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import transformers
from safetensors.torch import load_file, save_file

from golden_inputs import (CHATML, LLAMA3, LONG_CORPUS, MISTRAL, VICUNA, assistant, user, write_chatml_tokenizer,
                           write_json, write_llama3_tokenizer, write_llama_tokenizer, write_picture)
from golden_reference import PROCESSORS, Reference, create_model, difference, misalign, stored, use_true_float64

HERE = Path(__file__).resolve().parent
ON_A = "../a_llava15_new_bf16/model"
VISION_TENSORS = ["vision.selected", "image_features"]
ALL_LOGITS = ["logits_all", "greedy_logits"]


# ---------------------------------------------------------------- configs
# Strings that begin with "@" stand for numbers that only the tokenizer knows.

def llava_config(text, vision, **top):
    return {"architectures": ["LlavaForConditionalGeneration"], "image_token_index": "@image", "model_type": "llava",
            "pad_token_id": "@pad", "projector_hidden_act": "gelu", "tie_word_embeddings": False,
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "text_config": {"model_type": "llama", "vocab_size": "@vocab", **text},
            "vision_config": {"model_type": "clip_vision_model", **vision}, **top}


SMALL_TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, max_position_embeddings=512, rms_norm_eps=1e-5)
SMALL_VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28,
                    patch_size=7)
SMALL = dict(kind="llava", dtype="bf16", layout="hub", vocab=136, template=VICUNA,
             tokenizer=lambda d: write_llama_tokenizer(d, 130, byte_fallback=False))

CONFIG_A = {
    "architectures": ["LlavaForConditionalGeneration"], "dtype": "bfloat16", "ignore_index": -100,
    "image_seq_length": 64, "image_token_index": "@image", "model_type": "llava", "multimodal_projector_bias": True,
    "pad_token_id": "@pad", "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16",
        "head_dim": 32, "hidden_act": "silu", "hidden_size": 128, "initializer_range": 0.02, "intermediate_size": 344,
        "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 4,
        "num_hidden_layers": 3, "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "use_cache": True, "vocab_size": "@vocab"},
    "tie_word_embeddings": False, "transformers_version": "4.55.0",
    "vision_config": {
        "model_type": "clip_vision_model", "projection_dim": 64, "vocab_size": 32000, "attention_dropout": 0.0,
        "hidden_act": "quick_gelu", "hidden_size": 96, "image_size": 112, "initializer_factor": 1.0,
        "initializer_range": 0.02, "intermediate_size": 192, "layer_norm_eps": 1e-05, "num_attention_heads": 4,
        "num_channels": 3, "num_hidden_layers": 3, "patch_size": 14},
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
CONFIG_B = {  # what is at its default is left out, as in the published llava-1.5-7b-hf
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": "@image",
    "model_type": "llava", "pad_token_id": "@pad",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "hidden_size": 144,
        "intermediate_size": 360, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 6,
        "num_hidden_layers": 3, "num_key_value_heads": 2, "torch_dtype": "float16", "vocab_size": "@vocab"},
    "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "model_type": "clip_vision_model", "projection_dim": 64, "vocab_size": 32000, "hidden_size": 64,
        "image_size": 84, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4, "patch_size": 14}}
CONFIG_J = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 176, "max_position_embeddings": 2048,
    "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "torch_dtype": "float32", "use_cache": True, "vocab_size": "@vocab"}
CONFIG_TEXT = llava_config(
    dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
         head_dim=24, attention_bias=True, mlp_bias=True, max_position_embeddings=256, rms_norm_eps=1e-5,
         tie_word_embeddings=True, dtype="float16",
         rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                              high_freq_factor=4.0, original_max_position_embeddings=32)),
    SMALL_VISION, tie_word_embeddings=True, dtype="float16", transformers_version="5.23.0")
CONFIG_NAMES = llava_config(
    SMALL_TEXT | dict(dtype="bfloat16", rope_parameters=dict(rope_type="default", rope_theta=5000.0)), SMALL_VISION,
    dtype="bfloat16", transformers_version="5.23.0")
CONFIG_NAMES["image_token_id"] = CONFIG_NAMES.pop("image_token_index")
CONFIG_LINEAR = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "intermediate_size": 72, "max_position_embeddings": 512, "model_type": "llama", "num_attention_heads": 4,
    "num_hidden_layers": 2, "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_theta": 20000.0,
    "rope_scaling": {"type": "linear", "factor": 4.0}, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0", "vocab_size": "@vocab"}
CONFIG_G = {
    "architectures": ["LlavaNextForConditionalGeneration"], "ignore_index": -100,
    "image_grid_pinpoints": [[70, 140], [140, 70], [140, 140], [210, 70], [70, 210]], "image_token_index": "@image",
    "model_type": "llava_next", "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 96, "intermediate_size": 272,
        "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 6, "num_hidden_layers": 3,
        "num_key_value_heads": 3, "pad_token_id": 0, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16",
        "vocab_size": "@vocab"},
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.52.4",
    "use_image_newline_parameter": True,
    "vision_config": {
        "model_type": "clip_vision_model", "projection_dim": 64, "vocab_size": 32000, "hidden_size": 64,
        "image_size": 70, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": 14},
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}


def small_next(text, vision={}, **top):
    config = llava_config(SMALL_TEXT | text, SMALL_VISION | vision, **top)
    return config | {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
                     "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]}


LONG_QUESTION = ("In the old harbour, under a thin fog, only the lighthouse keeps turning: what is shown in the image, "
                 "how many people are there, and why is the sky blue?")


# ---------------------------------------------------------------- cases
# keep: tensors of each request that go to expected.safetensors, besides input_ids and greedy_tokens.

CASES = [
    dict(name="a_llava15_new_bf16", kind="llava", layout="memory_v4", dtype="bf16", seed=101, bf16=True,
         what="LLaVA-1.5 with one picture, bf16, names as transformers 4.52 to 4.57 hold them in memory "
              "(model.language_model.*, model.vision_tower.vision_model.*)",
         keep=[*VISION_TENSORS, *ALL_LOGITS],
         tokenizer=lambda d: write_llama_tokenizer(d, 430), vocab=448, config=CONFIG_A, template=VICUNA,
         pictures=[("cat.png", "photo", 200, 140, 31)],
         requests=[dict(name="r0", messages=[user("What is shown in this image? List them.", 1)], images=["cat.png"])]),
    dict(name="b_llava15_old_f16_sharded", kind="llava", layout="hub", dtype="f16", seed=202, bf16=True, shards=3,
         what="names as on the Hub (language_model.model.*), f16, 3 shards with an index, GQA 6/2, defaults left out "
              "of the config; r1 stops on </s>; embeddings so small that a wrong norm epsilon shows",
         keep=[*VISION_TENSORS, *ALL_LOGITS], min_gap=0.025,
         init=dict(embed_std=0.01, vision_scale=0.01, eos_gain=1.15),
         tokenizer=lambda d: write_llama_tokenizer(d, 510, LONG_CORPUS, legacy=True), vocab=576, config=CONFIG_B,
         template=VICUNA, template_file="chat_template.json", written_by="4.36.2",
         pictures=[("street.jpg", "photo", 240, 180, 41), ("sign.png", "text", 90, 180, 42)],
         requests=[dict(name="r0", messages=[user("Describe the picture in detail. No jokes.", 1)], images=["street.jpg"]),
                   dict(name="r1", keep=["greedy_logits"], images=["sign.png"],
                        messages=[user("What does the sign say? Please.", 1)])]),
    dict(name="c_chat_on_a", kind="llava", model=ON_A, keep=["greedy_logits"],
         what="on (a): text alone; turns with a picture in the first; a prompt given as it is, with odd whitespace, "
              "accents and an emoji",
         pictures=[("dog.png", "shapes", 96, 150, 51)],
         requests=[dict(name="text", messages=[user("Why is the sky blue? Answer briefly.")]),
                   dict(name="turns", images=["dog.png"],
                        messages=[user("What color is the car?", 1), assistant("The car is red."),
                                  user("And how many people are in the photo? List them.")]),
                   dict(name="raw", prompt="USER:  Zoë said: \"naïve café\"\t日本語 🙂\n\n  x^2 + y^2 = 42"
                                           " Use one word. ASSISTANT:")]),
    dict(name="d_batch_on_a", kind="llava", model=ON_A, keep=["greedy_logits"], min_gap=0.04,
         what="on (a): four prompts of different lengths to be run together, one with two pictures, one with none",
         pictures=[("one.png", "grad", 112, 112, 61), ("two.png", "photo", 333, 111, 62),
                   ("three.png", "text", 60, 75, 63, "RGBA")],
         requests=[dict(name="p0", messages=[user("Where was this taken? Explain why.", 1)], images=["one.png"]),
                   dict(name="p1", images=["two.png", "three.png"],
                        messages=[user("Compare the two images and explain the difference between them, "
                                       "step by step. Use one word.", 2)]),
                   dict(name="p2", messages=[user("Hello, world!")]),
                   dict(name="p3", images=["two.png"],
                        messages=[user("How many people?", 1), assistant("Three."),
                                  user("Are you sure? Please count the people in the photo again. Thanks!")])]),
    dict(name="g_llava_next_bf16", kind="llava_next", layout="memory_v4", dtype="bf16", seed=610, min_gap=0.025,
         keep=["image_features", "greedy_logits"],
         what="LLaVA-NeXT: tiles, unpadding, newlines; two pictures of different shape in one prompt (r0), one alone (r1)",
         tokenizer=lambda d: write_llama_tokenizer(d, 430), vocab=442, config=CONFIG_G, template=VICUNA,
         template_file="chat_template.json",
         pictures=[("wide.png", "photo", 300, 120, 71), ("tall.png", "text", 80, 200, 72),
                   ("square.jpg", "shapes", 128, 125, 73)],
         requests=[dict(name="r0", messages=[user("Compare the two images. Use one word.", 2)],
                        images=["wide.png", "tall.png"]),
                   dict(name="r1", messages=[user("What is this? Please.", 1)], images=["square.jpg"],
                        keep=["vision.selected", "image_features", "greedy_logits"])]),
    dict(name="j_llama_chatml_f32", kind="llama", layout="memory_v5", dtype="f32", seed=707, keep=["greedy_logits"],
         what="LlamaForCausalLM without pictures in SmolLM2 style: tied embeddings, GQA 4/2, byte-level BPE, ChatML",
         init=dict(linear_gain=1.5, logit_std=3.0), tokenizer=lambda d: write_chatml_tokenizer(d, 420, CHATML),
         vocab=420, config=CONFIG_J, written_by="4.42.3",
         requests=[dict(name="default_system", messages=[
                       {"role": "user", "content": 'What is 12 + 30? Zoë asked: "naïve" 日本語 🙂 Please.'}]),
                   dict(name="turns", messages=[
                       {"role": "system", "content": "You are terse."}, {"role": "user", "content": "Hello"},
                       {"role": "assistant", "content": "Hi."},
                       {"role": "user", "content": "  Why\n\nnot?   Please."}])]),

    # What a to j leave open, as small as it gets: pictures of 28 to 48 pixels, a tokenizer of single characters and a
    # few words without byte fallback.
    SMALL | dict(
        name="names_saved_v5", layout="saved_v5", seed=11, keep=[*VISION_TENSORS, *ALL_LOGITS],
        what="names as transformers 5 saves them: language_model.model.*, language_model.lm_head.weight, vision_tower.* "
             "without vision_model; config in its style (dtype, rope_parameters, image_token_id)",
        config=CONFIG_NAMES,
        pictures=[("tree.png", "shapes", 40, 30, 12)],
        requests=[dict(name="r0", messages=[user("What is it?", 1)], images=["tree.png"], steps=12)]),
    SMALL | dict(
        name="names_memory_v5", layout="memory_v5", seed=11, keep=[*VISION_TENSORS, *ALL_LOGITS],
        what="the weights of names_saved_v5 under the names that transformers 5 holds in memory "
             "(model.language_model.*, model.vision_tower.*, lm_head.weight)",
        config=CONFIG_NAMES,
        pictures=[("tree.png", "shapes", 40, 30, 12)],
        requests=[dict(name="r0", messages=[user("What is it?", 1)], images=["tree.png"], steps=12)]),
    SMALL | dict(
        name="features_concat_full", seed=121, keep=[*VISION_TENSORS, *ALL_LOGITS],
        what="vision_feature_layer [-2, 1] (concatenated), strategy full (class token kept), patch size 16, gelu in the "
             "tower; r1 has two pictures of different sizes in one prompt, r2 one in each of two turns",
        config=llava_config(SMALL_TEXT, SMALL_VISION | dict(image_size=48, patch_size=16, hidden_act="gelu",
                                                            num_hidden_layers=4),
                            vision_feature_layer=[-2, 1], vision_feature_select_strategy="full"),
        pictures=[("wide.png", "photo", 64, 24, 22), ("tall.png", "shapes", 30, 52, 23)],
        requests=[dict(name="r0", messages=[user("What is it?", 1)], images=["wide.png"], steps=12),
                  dict(name="r1", messages=[user("Compare.", 2)], images=["tall.png", "wide.png"], steps=12),
                  dict(name="r2", messages=[user("First?", 1), assistant("A fox."), user("Second?", 1)],
                       images=["wide.png", "tall.png"], steps=12)]),
    SMALL | dict(
        name="feature_layer_positive", seed=331, keep=["pixel_values", *VISION_TENSORS, *ALL_LOGITS],
        what="vision_feature_layer 1 of 3, counted from the embeddings (0); patch size 10; quick_gelu by default",
        config=llava_config(SMALL_TEXT, SMALL_VISION | dict(image_size=30, patch_size=10), vision_feature_layer=1),
        pictures=[("fox.png", "shapes", 28, 44, 32)],
        requests=[dict(name="r0", messages=[user("What is it?", 1)], images=["fox.png"], steps=12)]),
    SMALL | dict(
        name="text_mqa_bias_tied_llama3", layout="saved_v5", dtype="f16", seed=41, keep=ALL_LOGITS,
        what="text model with one KV head, head_dim 24 apart from hidden 48 / 3 heads, attention_bias, mlp_bias, tied "
             "embeddings, llama3 RoPE scaling with an original context of 32 that the prompt far exceeds; rope_parameters "
             "and dtype as transformers 5 writes them",
        init=dict(linear_gain=1.5), config=CONFIG_TEXT,
        pictures=[("sign.png", "grad", 28, 28, 42)],
        requests=[dict(name="r0", messages=[user(LONG_QUESTION, 1)], images=["sign.png"], steps=12)]),
    SMALL | dict(
        name="next_mistral", kind="llava_next", layout="hub", dtype="f16", seed=61, keep=[*VISION_TENSORS, *ALL_LOGITS],
        template=MISTRAL,
        what="LLaVA-NeXT with a Mistral: sliding_window null, theta 1000000, one KV head of two; names as on the Hub; r1 "
             "has three pictures in two turns, one of them twice",
        config=small_next(dict(model_type="mistral", sliding_window=None, rope_theta=1000000.0)),
        pictures=[("wide.png", "photo", 90, 24, 62), ("dot.png", "grad", 5, 3, 63)],
        requests=[dict(name="r0", messages=[user("What is it?", 1)], images=["wide.png"], steps=12),
                  dict(name="r1", messages=[user("Compare.", 2), assistant("A fox."), user("And this?", 1)],
                       images=["wide.png", "dot.png", "wide.png"], steps=12)]),
    SMALL | dict(
        name="next_llama3", kind="llava_next", layout="memory_v5", seed=72, keep=[*VISION_TENSORS, *ALL_LOGITS],
        template=LLAMA3, tokenizer=lambda d: write_llama3_tokenizer(d, 300), vocab=304,
        what="LLaVA-NeXT with a Llama 3: byte-level BPE, two tokens that end a text, theta 500000; two feature layers; "
             "names as transformers 5 holds them in memory",
        config=small_next(dict(rope_theta=500000.0), vision_feature_layer=[-2, 1]),
        pictures=[("tall.png", "shapes", 23, 61, 72)],
        requests=[dict(name="r0", messages=[user("What is it?", 1)], images=["tall.png"], steps=12)]),
    SMALL | dict(
        name="rope_linear_mixed_dtypes", kind="llama", layout="memory_v5", dtype="mixed", seed=51, keep=ALL_LOGITS,
        what="LlamaForCausalLM with rope_scaling {type: linear, factor: 4} and torch_dtype as old configs have them, KV "
             "heads left out (as many as heads), f16, bf16 and f32 tensors in one file whose data begins at an odd offset",
        config=CONFIG_LINEAR, misalign=True, written_by="4.31.0",
        requests=[dict(name="r0", prompt="<s> The quick brown fox jumps over the lazy dog, and then?", steps=12)]),
]


# ---------------------------------------------------------------- writing

def fill(value, ids, vocab):
    if isinstance(value, dict):
        return {k: fill(v, ids, vocab) for k, v in value.items()}
    if isinstance(value, str) and value.startswith("@"):
        return vocab if value == "@vocab" else ids[value[1:]]
    return value


def preprocessor_config(size, pinpoints):
    tiles = {"aspect_ratio_setting": "anyres", "do_pad": True, "image_grid_pinpoints": pinpoints,
             "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"}
    return {"crop_size": {"height": size, "width": size}, "do_center_crop": True, "do_convert_rgb": True,
            "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "CLIPImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711], "processor_class": "LlavaProcessor", "resample": 3,
            "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": size}, **(tiles if pinpoints else {})}


def write_model(case, folder):
    """Writes a checkpoint folder; returns the ids that the model must not generate."""
    folder.mkdir(parents=True)
    ids = case["tokenizer"](folder)
    ids["quiet"] |= set(range(ids["size"], case["vocab"]))
    config = fill(case["config"], ids, case["vocab"])
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {
        "_from_model_config": True, "bos_token_id": 1, "eos_token_id": ids["eos"], "pad_token_id": ids["pad"],
        "transformers_version": case.get("written_by", "4.52.4")})
    if case.get("template_file"):
        write_json(folder / case["template_file"], {"chat_template": case["template"]})
    elif case.get("template"):
        (folder / "chat_template.jinja").write_text(case["template"])
    if case["kind"] in PROCESSORS:
        vision, pinpoints = config["vision_config"], config.get("image_grid_pinpoints")
        write_json(folder / "preprocessor_config.json", preprocessor_config(vision["image_size"], pinpoints))
        write_json(folder / "processor_config.json", {
            "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": vision["patch_size"],
            "processor_class": PROCESSORS[case["kind"]][1].__name__,
            "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default")})
    create_model(case, folder, ids)
    return ids["quiet"]


def write_case(case, out):
    folder = out / case["name"]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    for spec in case.get("pictures", []):
        write_picture(folder / "images", *spec)
    model = (folder / case.get("model", "model")).resolve()
    if "model" in case:
        quiet = set(json.loads((model.parent / "case.json").read_text())["never_generated_ids"])
    else:
        quiet = write_model(case, model)
    reference = Reference(case["kind"], str(model))
    bf16 = reference.load("eager").to(torch.bfloat16) if case.get("bf16") else None
    expected, records = {}, []
    for request in case["requests"]:
        found, record = reference.run(request, folder / "images", case.get("min_gap", 0.05), quiet, bf16)
        for name in ["input_ids", "greedy_tokens", *request.get("keep", case["keep"])]:
            if name in found:
                expected[f"{request['name']}.{name}"] = stored(found[name])
        records.append(record)
    if case.get("misalign"):  # only now: transformers itself refuses such a file
        misalign(model / "model.safetensors")
    if not any((folder / "images").iterdir()):
        (folder / "images").rmdir()
    save_file(expected, folder / "expected.safetensors", metadata={"format": "pt"})
    facts = {k: case.get(k) for k in ("name", "kind", "what", "layout", "dtype", "seed")}
    write_json(folder / "case.json", facts | {
        "model": case.get("model", "model"), "never_generated_ids": sorted(quiet), "requests": records,
        "reference": {"transformers": transformers.__version__, "torch": torch.__version__, "attention": "eager",
                      "compute": "float32 from the saved weights"}})
    files = [f for f in folder.rglob("*") if f.is_file()]
    for f in files:
        f.chmod(0o644)
    size = sum(f.stat().st_size for f in files)
    gap = min(r["measured"]["min_top1_top2_gap"] for r in records)
    noise = max(r["measured"]["logits_max_abs_diff_f32_vs_f64"] for r in records)
    print(f"{case['name']}: {size / 1000:.0f} kB, least gap {gap:.3f}, noise {noise:.1e}", flush=True)


def check(cases, out):
    """Compares the files in `out` with those beside this script; returns whether they agree."""
    agree = True
    for case in cases:
        ours, theirs = out / case["name"], HERE / case["name"]
        a, b = load_file(ours / "expected.safetensors"), load_file(theirs / "expected.safetensors")
        worst = max(difference(a[k], b[k]) for k in b) if a.keys() == b.keys() else float("inf")
        same = all(f.read_bytes() == (theirs / f.relative_to(ours)).read_bytes()
                   for f in ours.rglob("*") if f.is_file() and "model/" in f.relative_to(ours).as_posix())
        print(f"{case['name']}: expected values differ by {worst:.1e}, checkpoint files {'equal' if same else 'DIFFER'}")
        agree &= same and worst <= 1e-4  # another CPU sums in another order: 1.7e-5 seen between two
    return agree


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", nargs="*", metavar="CASE")
    p.add_argument("--out", type=Path, default=HERE)
    p.add_argument("--check", action="store_true")
    args = p.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    use_true_float64()
    cases = [c for c in CASES if not args.cases or c["name"] in args.cases]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if args.check else args.out
        for case in cases:
            write_case(case, out)
        sys.exit(0 if not args.check or check(cases, out) else 1)


if __name__ == "__main__":
    main()
