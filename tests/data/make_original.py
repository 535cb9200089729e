#!/usr/bin/env python3
"""Writes the goldens in the layout of the original LLaVA code: small random checkpoints, and what CLIP, the projector and
LLaMA compute from them when they are put together as `llava_arch.py` does, in float32 on the CPU.

    python make_original.py [CASE ...]

The tokenizer files, pictures and weights are drawn as in make_goldens.py; README.md tells what the cases are for.
"""
import ast
import json
import math
import shutil
import sys
from pathlib import Path

import peft
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from golden_inputs import write_json, write_llama_tokenizer, write_picture
from golden_reference import DTYPES, difference, stored, use_true_float64, write_weights

HERE = Path(__file__).resolve().parent
IMAGE, MARKS = -200, ["<im_patch>", "<im_start>", "<im_end>"]
V1 = ("A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
      "polite answers to the human's questions. ")
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7,
              projection_dim=16, model_type="clip_vision_model")


def config(**own):
    return {
        "_name_or_path": "./checkpoints/vicuna", "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "freeze_mm_mlp_adapter": False, "hidden_act": "silu", "hidden_size": 32,
        "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "initializer_range": 0.02, "intermediate_size": 64,
        "max_length": 4096, "max_position_embeddings": 512, "mm_hidden_size": 16, "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-tiny-patch7", "model_type": "llava",
        "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 0,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.31.0", "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True, "vocab_size": 136} | own


CASES = [
    dict(name="e1_original_linear", model="llava-v1.5-tiny", tower="vision_tower", seed=61, dtype="f16",
         what="one linear layer (model.mm_projector.weight), a whole CLIPModel in vision_tower/ beside the model, padded "
              "pictures, tokenizer.json of the old kind; a wide picture with an EXIF orientation that is ignored",
         config=config(mm_projector_type="linear"), pictures=[("wide.png", "photo", 44, 25, 71, 6)],
         requests=[dict(name="r0", images=["wide.png"], messages=["What is it?"],
                        prompt=V1 + "USER: <image>\nWhat is it? ASSISTANT:")]),
    dict(name="e2_original_marks", model="llava-tiny", seed=162, dtype="bf16", marks=True, torch_shards=2, only_model=True,
         tower="models--openai--clip-vit-tiny-patch7/snapshots/0123456789abcdef0123456789abcdef01234567",
         what="two layers with GELU, mm_use_im_start_end with tokens from added_tokens.json, tokenizer.model alone, weights in "
              "two pytorch_model shards, a CLIPVisionModel in a cache beside the model; turns with </s> and two pictures",
         config=config(mm_projector_type="mlp2x_gelu", mm_use_im_start_end=True, vocab_size=139, torch_dtype="bfloat16",
                       model_type="llava_llama") | {"mm_use_im_patch_token": None},
         pictures=[("tall.png", "shapes", 20, 47, 72), ("square.png", "photo", 30, 30, 73)],
         requests=[dict(name="r0", images=["tall.png"], messages=["What is it?"],
                        prompt=V1.strip() + "###Human: <im_start><image><im_end>\nWhat is it?###Assistant:"),
                   dict(name="r1", images=["tall.png", "square.png"],
                        prompt=V1 + "USER: <im_start><image><im_end>\nFirst? ASSISTANT: A fox.</s>"
                                    "USER: <im_start><image><im_end>\nSecond? ASSISTANT:")]),
    dict(name="e3_original_inside", model="llava-mistral-tiny", seed=63, dtype="f16", inside=True, tower="vision_tower",
         what="three layers with GELU over all rows (cls_patch) of the last hidden state, a trained tower inside the file "
              "that wins over the one beside it, square pictures (cut, not padded), no BOS",
         config=config(mm_projector_type="mlp3x_gelu", mm_vision_select_feature="cls_patch", mm_vision_select_layer=-1,
                       unfreeze_mm_vision_tower=True, architectures=["LlavaMistralForCausalLM"],
                       model_type="llava_mistral", sliding_window=None, rope_theta=1000000.0, num_key_value_heads=1)
         | {"image_aspect_ratio": None}, bos=False,
         pictures=[("tall.png", "photo", 30, 41, 74)],
         requests=[dict(name="r0", images=["tall.png"], messages=["What is it?"],
                        prompt="[INST] <image>\nWhat is it? [/INST]")]),
    dict(name="e5_original_lora", model="llava-v1.5-tiny-lora", base="vicuna-tiny", seed=166, dtype="f16", tower="vision_tower",
         only_model=True, legacy=False, lora=dict(r=4, lora_alpha=8),
         what="what LLaVA's LoRA training leaves (adapter_model.bin, non_lora_trainables.bin, LLaVA's config.json) over a bare "
              "language model with a tokenizer.model whose legacy is false; the adapter is merged into the weights",
         config=config(mm_projector_type="mlp2x_gelu"), pictures=[("wide.png", "photo", 44, 25, 78)],
         requests=[dict(name="r0", images=["wide.png"], messages=["What is it?"],
                        prompt=V1 + "USER: <image>\nWhat is it? ASSISTANT:")]),
    dict(name="e6_original_anyres", model="llava-v1.6-tiny", seed=165, dtype="f16", tower="vision_tower", inside=True,
         what="LLaVA 1.6: any resolution with pinpoints (width, height) in a string, the margin cut, a newline; a trained tower "
              "in the file; a picture smaller than a tile, for which transformers' order would choose another canvas",
         config=config(mm_projector_type="mlp2x_gelu", image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad",
                       image_grid_pinpoints="[(28, 56), (56, 28), (56, 56), (84, 28), (28, 84)]",
                       unfreeze_mm_vision_tower=True, image_crop_resolution=224, image_split_resolution=224),
         pictures=[("small.png", "photo", 20, 13, 79), ("wide.png", "grad", 71, 30, 80), ("tall.png", "photo", 23, 79, 81)],
         requests=[dict(name="r0", images=["small.png"], messages=["What is it?"],
                        prompt=V1 + "USER: <image>\nWhat is it? ASSISTANT:"),
                   dict(name="r1", images=["wide.png", "tall.png"], prompt=V1 + "USER: <image>\n<image>\nWhat? ASSISTANT:")]),
    dict(name="e4_original_identity", model="llava-v1-tiny", seed=164, dtype="f32", tower="vision_tower",
         what="no projector: a tower as wide as the language model; a prompt that begins and ends with a picture",
         config=config(mm_projector_type="identity", mm_hidden_size=32), vision=VISION | dict(hidden_size=32),
         pictures=[("one.png", "shapes", 28, 28, 75), ("two.png", "grad", 33, 20, 76)],
         requests=[dict(name="r0", images=["one.png", "two.png"], prompt="<image> What is it? <image>")]),
]


@torch.no_grad()
def draw(model, seed, quiet=(), head=4.0):
    """N(0, 1/fan_in) in the order of the sorted names, rows of the head for `quiet` zero."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        w = torch.randn(p.shape, generator=g)
        if "norm" in name and name.endswith("weight"):
            w = 1 + 0.1 * w
        elif name.endswith("bias"):
            w = 0.1 * w
        elif name.endswith("lm_head.weight"):
            w = w * head / math.sqrt(p.shape[1])
        elif not name.endswith(("embed_tokens.weight", "class_embedding", "position_embedding.weight")) and p.dim():
            w = w * 1.3 / math.sqrt(p[0].numel())
        p.copy_(w)
    for i in quiet:
        model.lm_head.weight[i] = 0
    return model


def projector(c):
    kind = c["mm_projector_type"]
    if kind == "identity":
        return torch.nn.Identity()
    first = torch.nn.Linear(c["mm_hidden_size"], c["hidden_size"])
    if kind == "linear":
        return first
    layers = [first]
    for _ in range(1, int(kind[3])):
        layers += [torch.nn.GELU(), torch.nn.Linear(c["hidden_size"], c["hidden_size"])]
    return torch.nn.Sequential(*layers)


def llama(c):
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    return LlamaConfig(**{k: c[k] for k in keys if k in c})


def write_tower(folder, case):
    """A CLIPModel with text tower, or a CLIPVisionModel, with the position_ids that old files have."""
    vision = case.get("vision", VISION)
    folder.mkdir(parents=True)
    text = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=40,
                projection_dim=16, max_position_embeddings=16, model_type="clip_text_model")
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 16, "text_config": text,
             # The second section is the one that counts.
             "vision_config": vision | dict(patch_size=14), "vision_config_dict": vision, "text_config_dict": text}
    model = draw(CLIPModel._from_config(CLIPConfig(**{k: v for k, v in whole.items() if not k.endswith("_dict")}
                                                   | {"vision_config": vision}), dtype=torch.float32), case["seed"] + 1)
    tensors = dict(model.state_dict())
    rows = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    tensors["vision_model.embeddings.position_ids"] = torch.arange(rows)[None]
    if case.get("only_model"):  # a CLIPVisionModel
        whole = vision | {"architectures": ["CLIPVisionModel"]}
        tensors = {k: v for k, v in tensors.items() if k.startswith("vision_model.")}
    write_json(folder / "config.json", whole)
    size = vision["image_size"]
    write_json(folder / "preprocessor_config.json", {
        "crop_size": size, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": size})
    floats = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(floats, folder / "model.safetensors", metadata={"format": "pt"})
    if folder.parent.name == "snapshots":
        refs = folder.parent.parent / "refs"
        refs.mkdir()
        (refs / "main").write_text(folder.name)
    return {k.removeprefix("vision_model."): v.float() for k, v in floats.items()
            if k.startswith("vision_model.") and not k.endswith("position_ids")}


def write_torch_shards(folder, tensors, count):
    """As transformers saved PyTorch files."""
    names = sorted(tensors)
    where = {}
    for i in range(count):
        file = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        part = {n: tensors[n] for n in names[i::count]}
        torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": where})


def write_model(case, folder):
    """Writes the checkpoint; returns its tensors as they were rounded, and its tokenizer."""
    folder.mkdir(parents=True)
    c = {k: v for k, v in case["config"].items() if v is not None or k in ("image_grid_pinpoints", "rope_scaling")}
    base = folder.parent / case["base"] if "base" in case else folder
    base.mkdir(exist_ok=True)
    ids = write_llama_tokenizer(base, 136, legacy=case.get("legacy", True), byte_fallback=False, added=(), keep_model=True)
    tk = Tokenizer.from_file(str(base / "tokenizer.json"))
    quiet = set(ids["quiet"]) | {2}
    if case.get("marks"):
        tk.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in MARKS])
        quiet |= {tk.token_to_id(t) for t in MARKS}
        write_json(base / "added_tokens.json", {t: tk.token_to_id(t) for t in MARKS})
    if not case.get("bos", True):
        settings = json.loads((base / "tokenizer_config.json").read_text())
        write_json(base / "tokenizer_config.json", settings | {"add_bos_token": False})
        tk.post_processor = None
        tk = Tokenizer.from_str(json.dumps(json.loads(tk.to_str()) | {"post_processor": None}))
        tk.save(str(base / "tokenizer.json"))
    if case.get("only_model"):
        (base / "tokenizer.json").unlink()
    else:
        (base / "tokenizer.model").unlink()
    write_json(folder / "config.json", c)
    write_json(base / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})

    tensors = dict(draw(LlamaForCausalLM(llama(c)), case["seed"], quiet).state_dict())
    p = draw(projector(c), case["seed"] + 2)
    tensors |= {f"model.mm_projector.{k}": v for k, v in p.state_dict().items()}
    if case.get("inside"):
        model = draw(CLIPVisionModel._from_config(CLIPConfig(vision_config=VISION).vision_config), case["seed"] + 3)
        tensors |= {f"model.vision_tower.vision_tower.vision_model.{k.removeprefix('vision_model.')}": v
                    for k, v in model.state_dict().items()}
    if c["image_aspect_ratio"] == "anyres":
        tensors["model.image_newline"] = torch.randn(c["hidden_size"], generator=torch.Generator().manual_seed(case["seed"] + 4))
    rounded = {k: v.to(DTYPES[case["dtype"]]) for k, v in tensors.items()}
    if "lora" in case:
        return c, write_lora(case, c, folder, base, rounded), tk, quiet
    if case.get("torch_shards"):
        write_torch_shards(folder, rounded, case["torch_shards"])
    else:
        write_weights(folder, rounded, case["dtype"])
    return c, {k: v.float() for k, v in rounded.items()}, tk, quiet


def write_lora(case, c, folder, base, tensors):
    """A bare language model, and what LLaVA's LoRA training leaves beside it; returns the tensors, merged."""
    plain = {k: v for k, v in llama(c).to_dict().items() if not isinstance(v, dict)}
    write_json(base / "config.json", plain | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"})
    trained = {k: v for k, v in tensors.items() if "mm_projector" in k}
    lm = {k: v for k, v in tensors.items() if k not in trained}
    write_weights(base, lm, case["dtype"])
    torch.save({f"base_model.model.{k}": v for k, v in trained.items()}, folder / "non_lora_trainables.bin")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    write_json(folder / "adapter_config.json", case["lora"] | {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "target_modules": names,
        "task_type": "CAUSAL_LM"})
    g, adapter, merged = torch.Generator().manual_seed(case["seed"] + 5), {}, {k: v.float() for k, v in tensors.items()}
    rank = case["lora"]["r"]
    for name in sorted(k for k in lm if k.split(".")[-2] in names):
        out, width = lm[name].shape
        a = (torch.randn(rank, width, generator=g) / math.sqrt(width)).half()
        b = (torch.randn(out, rank, generator=g) * 0.2).half()
        module = "base_model.model." + name.removesuffix(".weight")
        adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        merged[name] += case["lora"]["lora_alpha"] / rank * (b.float() @ a.float())
    torch.save(adapter, folder / "adapter_model.bin")
    theirs = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, str(folder)).merge_and_unload().state_dict()
    assert max(difference(merged[k], v) for k, v in theirs.items()) < 1e-6
    return merged


def best_resolution(size, pinpoints):
    """`select_best_resolution`, sizes (width, height)."""
    best, most, least = None, 0, float("inf")
    for w, h in pinpoints:
        scale = min(w / size[0], h / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        wasted = w * h - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = (w, h), effective, wasted
    return best


def squares(im, c, side):
    """`process_anyres_image`: the whole picture and its tiles."""
    width, height = best_resolution(im.size, ast.literal_eval(c["image_grid_pinpoints"]))
    across, down = width / im.width, height / im.height
    if across < down:
        size = (width, min(math.ceil(im.height * across), height))
    else:
        size = (min(math.ceil(im.width * down), width), height)
    canvas = Image.new("RGB", (width, height), (0, 0, 0))
    canvas.paste(im.resize(size), ((width - size[0]) // 2, (height - size[1]) // 2))
    tiles = [canvas.crop((x, y, x + side, y + side)) for y in range(0, height, side) for x in range(0, width, side)]
    return [im.resize((side, side)), *tiles]


def merged_rows(features, size, newline, c, side, grid):
    """`spatial_unpad`: the whole, then the tiles' patches line by line without the margin, each with a newline."""
    width, height = best_resolution(size, ast.literal_eval(c["image_grid_pinpoints"]))
    down, across = height // side, width // side
    lines = features[1:].view(down, across, grid, grid, -1).permute(0, 2, 1, 3, 4).reshape(down * grid, across * grid, -1)
    if size[0] / size[1] > across / down:
        margin = (down * grid - int(size[1] * (across * grid / size[0]))) // 2
        lines = lines[margin:down * grid - margin]
    else:
        margin = (across * grid - int(size[0] * (down * grid / size[1]))) // 2
        lines = lines[:, margin:across * grid - margin]
    ends = newline.to(lines.dtype).expand(len(lines), 1, -1)
    return torch.cat([features[0], torch.cat([lines, ends], 1).flatten(0, 1)])


class Original:
    """`LlavaLlamaForCausalLM` put together from its parts."""

    def __init__(self, case, c, tensors, tower, dtype, attention):
        self.c, self.dtype = c, dtype
        inside = "model.vision_tower.vision_tower.vision_model."
        trained = {k.removeprefix(inside): v for k, v in tensors.items() if k.startswith(inside)}
        vision = CLIPConfig(vision_config=case.get("vision", VISION)).vision_config
        self.tower = CLIPVisionModel._from_config(vision, dtype=torch.float32, attn_implementation=attention).eval()
        names = {k.removeprefix("vision_model."): k for k in self.tower.state_dict()}
        self.tower.load_state_dict({names[k]: v for k, v in (trained or tower).items()})
        self.projector = projector(c)
        self.projector.load_state_dict({k.removeprefix("model.mm_projector."): v for k, v in tensors.items()
                                        if "mm_projector" in k})
        self.lm = LlamaForCausalLM._from_config(llama(c), dtype=torch.float32, attn_implementation=attention).eval()
        self.newline = tensors.get("model.image_newline")
        self.lm.load_state_dict({k: v for k, v in tensors.items()
                                 if "mm_projector" not in k and inside not in k and k != "model.image_newline"})
        for part in (self.tower, self.projector, self.lm):
            part.to(dtype)

    @torch.no_grad()
    def embed(self, ids, pixels, sizes):
        """`pixels` of all squares of all pictures; `sizes` (width, height) of each picture."""
        states = self.tower(pixels.to(self.dtype), output_hidden_states=True).hidden_states
        selected = states[self.c["mm_vision_select_layer"]]
        rows = selected[:, 1:] if self.c["mm_vision_select_feature"] == "patch" else selected
        features, parts, seen = self.projector(rows), [], 0
        if self.newline is not None:
            vision = self.tower.config
            side, grid = vision.image_size, vision.image_size // vision.patch_size
            counts = [1 + math.prod(best_resolution(s, ast.literal_eval(self.c["image_grid_pinpoints"]))) // side ** 2 for s in sizes]
            features = [merged_rows(f, s, self.newline, self.c, side, grid) for f, s in zip(features.split(counts), sizes)]
        for i in ids:
            if i == IMAGE:
                parts.append(features[seen])
                seen += 1
            else:
                parts.append(self.lm.get_input_embeddings()(torch.tensor([i])))
        found = {"vision.selected": selected, "image_features": torch.cat(list(features))}
        return torch.cat(parts)[None], found

    @torch.no_grad()
    def logits(self, embedded, tokens):
        tail = self.lm.get_input_embeddings()(tokens[None, :-1])
        return self.lm(inputs_embeds=torch.cat([embedded, tail], 1), use_cache=False).logits[0]


def tokenize(tk, prompt):
    """`tokenizer_image_token`: each piece by itself, the BOS of the first kept."""
    pieces = [tk.encode(piece).ids for piece in prompt.split("<image>")]
    offset = int(bool(pieces[0]) and pieces[0][0] == 1)
    ids = pieces[0][:offset]
    for i, piece in enumerate(pieces):
        ids += ([IMAGE] if i else []) + piece[offset:]
    return ids


def pixels(case, c, folder, tower, names):
    processor, out, sizes = CLIPImageProcessorPil.from_pretrained(tower), [], []
    for name in names:
        im = Image.open(folder / "images" / name).convert("RGB")
        sizes.append(im.size)
        if c.get("image_aspect_ratio") == "anyres":
            side = processor.crop_size["height"]
            out += [processor(square, return_tensors="pt")["pixel_values"][0] for square in squares(im, c, side)]
            continue
        if c.get("image_aspect_ratio") == "pad" and im.width != im.height:
            side = max(im.size)
            square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in processor.image_mean))
            square.paste(im, ((side - im.width) // 2, (side - im.height) // 2))
            im = square
        out.append(processor(im, return_tensors="pt")["pixel_values"][0])
    return torch.stack(out), sizes


def write_case(case):
    folder = HERE / case["name"]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    for name, kind, w, h, seed, *exif in case["pictures"]:
        write_picture(folder / "images", name, kind, w, h, seed)
        if exif:
            im = Image.open(folder / "images" / name)
            tags = im.getexif()
            tags[0x0112] = exif[0]
            im.save(folder / "images" / name, exif=tags)
    tower_tensors = write_tower(folder / case["tower"], case)
    c, tensors, tk, quiet = write_model(case, folder / case["model"])
    if not case.get("only_model") and case.get("bos", True):
        assert tk.encode("a").ids[0] == 1
    f32 = Original(case, c, tensors, tower_tensors, torch.float32, "eager")
    f64 = Original(case, c, tensors, tower_tensors, torch.float64, "sdpa")
    expected, records = {}, []
    for request in case["requests"]:
        ids = tokenize(tk, request["prompt"])
        px, sizes = pixels(case, c, folder, folder / case["tower"], request["images"])
        embedded, seen = f32.embed(ids, px, sizes)
        exact, _ = f64.embed(ids, px, sizes)
        steps = 12
        out = f32.lm.generate(inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long),
                              do_sample=False, max_new_tokens=steps, eos_token_id=2, pad_token_id=0,
                              return_dict_in_generate=True, output_logits=True)
        step_logits = torch.stack(out.logits, 1)[0]
        tokens = out.sequences[0, -len(step_logits):]
        full, full64 = f32.logits(embedded, tokens), f64.logits(exact, tokens)
        n = embedded.shape[1]
        top = step_logits.topk(2, -1).values
        gap = (top[:, 0] - top[:, 1]).min().item()
        black = f32.logits(f32.embed(ids, torch.zeros_like(px), sizes)[0], tokens)
        assert difference(black[n - 1], full[n - 1]) > 0.3
        assert gap > 0.03 and len(set(tokens.tolist())) > 3, (case["name"], request["name"], gap, tokens)
        assert torch.equal(full64[n - 1:].argmax(-1), tokens) and not set(tokens.tolist()) & quiet
        found = {"input_ids": torch.tensor(ids), "logits_all": full[:n], "greedy_tokens": tokens,
                 "greedy_logits": step_logits, **seen}
        expected |= {f"{request['name']}.{k}": stored(v) for k, v in found.items()}
        records.append({
            "name": request["name"], "images": request["images"], "prompt": request["prompt"],
            **({"question": request["messages"][0]} if "messages" in request else {}),
            "sampling": {"greedy": True, "max_new_tokens": steps, "eos_token_ids": [2]},
            "expected_text": tk.decode(tokens.tolist()),
            "measured": {"logits_max_abs_diff_f32_vs_f64": difference(full, full64), "min_top1_top2_gap": gap,
                         "logits_std": full.std().item()}})
    save_file(expected, folder / "expected.safetensors", metadata={"format": "pt"})
    write_json(folder / "case.json", {
        "name": case["name"], "kind": "llava_original", "what": case["what"], "model": case["model"],
        **({"base": case["base"]} if "base" in case else {}),
        "seed": case["seed"], "requests": records,
        "reference": {"transformers": transformers.__version__, "torch": torch.__version__, "attention": "eager"}})
    files = [f for f in folder.rglob("*") if f.is_file()]
    for f in files:
        f.chmod(0o644)
    print(case["name"], sum(f.stat().st_size for f in files) // 1000, "kB", [r["measured"] for r in records], flush=True)


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    use_true_float64()
    for case in CASES:
        if len(sys.argv) == 1 or case["name"] in sys.argv[1:]:
            write_case(case)


if __name__ == "__main__":
    main()
