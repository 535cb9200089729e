"""Weights of the goldens, and what Hugging Face transformers makes of them: float32, eager attention, on the CPU."""

import hashlib
import json
import math
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (AutoConfig, LlamaForCausalLM, LlavaForConditionalGeneration,
                          LlavaNextForConditionalGeneration, PreTrainedTokenizerFast)
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llama import modeling_llama
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.mistral import modeling_mistral

from golden_inputs import write_json

CLASSES = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration,
           "llama": LlamaForCausalLM}
PROCESSORS = {"llava": (CLIPImageProcessorPil, LlavaProcessor),
              "llava_next": (LlavaNextImageProcessorPil, LlavaNextProcessor)}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


# ---------------------------------------------------------------- float64, to measure the noise of float32

def use_true_float64():
    """transformers computes RMSNorm and RoPE in float32 whatever the model's dtype; this makes float64 models exact."""
    norm32, rope32 = modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaRotaryEmbedding.forward

    def norm(self, x):
        if x.dtype != torch.float64:
            return norm32(self, x)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rope(self, x, position_ids):
        if x.dtype != torch.float64:
            return rope32(self, x, position_ids)
        p, c = self.config.rope_parameters, self.config
        dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        freq = float(p["rope_theta"]) ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if p["rope_type"] == "llama3":
            low, high = p["low_freq_factor"], p["high_freq_factor"]
            turns = p["original_max_position_embeddings"] * freq / (2 * math.pi)
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            freq = (1 - smooth) * freq / p["factor"] + smooth * freq
        elif p["rope_type"] == "linear":
            freq = freq / p["factor"]
        else:
            assert p["rope_type"] == "default", p
        angle = position_ids[..., None].double() * freq
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    for norm_class, rope_class in [(modeling_llama.LlamaRMSNorm, modeling_llama.LlamaRotaryEmbedding),
                                   (modeling_mistral.MistralRMSNorm, modeling_mistral.MistralRotaryEmbedding)]:
        norm_class.forward, rope_class.forward = norm, rope


# ---------------------------------------------------------------- weights

@torch.no_grad()
def init_weights(model, seed, ids, tied, embed_std=1.0, logit_std=4.0, linear_gain=1.0, vision_scale=1.0, eos_gain=None):
    """Draws every weight from N(0, (gain / sqrt(fan_in))^2), in the order of the sorted names.

    Rows of the output head that must not be generated (special tokens, padding rows) are zero, and so is the end of
    sequence unless `eos_gain` says otherwise; byte tokens are made less likely. With tied embeddings the rows are also
    the inputs, so they are made small instead of zero."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        w = torch.randn(p.shape, generator=g)
        if "norm" in name and name.endswith("weight"):
            w = 1 + 0.1 * w
        elif name.endswith("bias"):
            w *= 0.1
        elif name.endswith("class_embedding"):
            w *= vision_scale
        elif name.endswith("embed_tokens.weight"):
            w = w * (logit_std / math.sqrt(p.shape[1]) if tied else embed_std)
        elif name.endswith("lm_head.weight"):
            w = w * logit_std / math.sqrt(p.shape[1])
        elif name.endswith("position_embedding.weight"):
            w = 0.5 * vision_scale * w
        else:
            gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "fc1")) else linear_gain
            if "multi_modal_projector.linear_2" in name:
                gain = 1.6 * embed_std
            if "patch_embedding" in name:
                gain *= vision_scale
            w = w * gain / math.sqrt(p[0].numel())
        p.copy_(w)
    head = model.get_input_embeddings() if tied else model.get_output_embeddings()
    for i in ids["quiet"]:
        head.weight[i] *= 0.05 if tied else 0.0
    if not tied:
        for i in ids["bytes"]:
            head.weight[i] *= 0.6
    head.weight[ids["eos"]] *= eos_gain if eos_gain is not None else (0.05 if tied else 0.0)


def rename(name, layout):
    """From the names in memory of transformers 5 ("memory_v5") to the others that are found in files."""
    if layout in ("hub", "memory_v4"):
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_model.")
    if layout in ("hub", "saved_v5"):
        if name.startswith("model.language_model."):
            return name.replace("model.language_model.", "language_model.model.")
        if name == "lm_head.weight":
            return "language_model.lm_head.weight"
        return name.removeprefix("model.")
    return name


def write_weights(folder, tensors, dtype, shards=1):
    """One file, or `shards` files with an index. The dtype `mixed` deals f16, bf16 and f32 out in turn."""
    deal = list(DTYPES.values())
    tensors = {name: t.to(DTYPES.get(dtype) or deal[i % 3]).contiguous().clone()
               for i, (name, t) in enumerate(tensors.items())}
    if shards == 1:
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
        return
    size = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    total, done, parts = sum(size.values()), 0, [{}]
    for name, t in tensors.items():
        if done > total / shards * len(parts) and len(parts) < shards:
            parts.append({})
        parts[-1][name] = t
        done += size[name]
    where = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, f"{folder}/{file}", metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    write_json(f"{folder}/model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def misalign(path):
    """Ends the header with one or two blanks, so that the data of the file begins at an odd offset."""
    blob = path.read_bytes()
    n = struct.unpack("<Q", blob[:8])[0]
    header = blob[8:8 + n].rstrip(b" ")
    header += b" " * (1 + len(header) % 2)
    path.write_bytes(struct.pack("<Q", len(header)) + header + blob[8 + n:])


def create_model(case, folder, ids):
    """Writes random weights for the config.json in `folder`."""
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    model = CLASSES[case["kind"]]._from_config(config, dtype=torch.float32)
    init_weights(model, case["seed"], ids, text.tie_word_embeddings, **case.get("init", {}))
    tensors = {rename(name, case["layout"]): t for name, t in model.state_dict().items()
               if not (name == "lm_head.weight" and text.tie_word_embeddings)}
    write_weights(folder, tensors, case["dtype"], case.get("shards", 1))


# ---------------------------------------------------------------- reference runs

class Reference:
    """A checkpoint folder as transformers reads it, in float32 and once more in float64."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.f32 = self.load("eager")
        self.f64 = self.load("sdpa").double()  # eager attention would compute its softmax in float32
        c = json.loads(Path(f"{folder}/tokenizer_config.json").read_text())
        names = {k: c[k] for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", **names,
                                                 padding_side="left", clean_up_tokenization_spaces=False)
        self.template = self.chat_template()
        eos = self.f32.generation_config.eos_token_id
        self.eos = eos if isinstance(eos, list) else [eos]
        self.processor = None
        if kind in PROCESSORS:
            p = json.loads(Path(f"{folder}/processor_config.json").read_text())
            of_images, of_both = PROCESSORS[kind]
            self.processor = of_both(
                image_processor=of_images.from_pretrained(folder), tokenizer=self.tokenizer,
                patch_size=p["patch_size"], vision_feature_select_strategy=p["vision_feature_select_strategy"],
                num_additional_image_tokens=p["num_additional_image_tokens"])

    def load(self, attention):
        model, info = CLASSES[self.kind].from_pretrained(self.folder, dtype=torch.float32, output_loading_info=True,
                                                         attn_implementation=attention)
        tied = model.config.get_text_config().tie_word_embeddings
        missing = [k for k in info["missing_keys"] if not (tied and k == "lm_head.weight")]
        assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
        return model.eval()

    def chat_template(self):
        for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
            path = Path(self.folder) / name
            if path.exists():
                return path.read_text() if name.endswith("jinja") else json.loads(path.read_text())["chat_template"]

    def inputs(self, prompt, images):
        if self.processor is None:
            batch = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        else:
            batch = self.processor(images=images or None, text=prompt, return_tensors="pt")
        return {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "token_type_ids"}

    @torch.no_grad()
    def greedy(self, inputs, steps):
        out = self.f32.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=steps, eos_token_id=self.eos,
                                pad_token_id=self.tokenizer.pad_token_id, return_dict_in_generate=True,
                                output_logits=True)
        logits = torch.stack(out.logits, 1)[0]
        return out.sequences[0, -len(logits):], logits

    @torch.no_grad()
    def logits(self, model, inputs, tokens):
        """Of every position of the prompt and of `tokens` but the last, without a cache."""
        ids = torch.cat([inputs["input_ids"], tokens[None, :-1]], 1)
        pixels = {k: inputs[k] for k in ("image_sizes",) if k in inputs}
        if "pixel_values" in inputs:
            pixels["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **pixels).logits[0]

    def squares(self, inputs):
        """The pixels of each picture: [1, 3, size, size], or as many squares as it is seen in, without filling."""
        pixels = inputs["pixel_values"]
        if self.kind == "llava":
            return list(pixels[:, None])
        c = self.f32.config
        return [p[:image_size_to_num_patches(size, c.image_grid_pinpoints, c.vision_config.image_size)]
                for p, size in zip(pixels, inputs["image_sizes"])]

    @torch.no_grad()
    def vision(self, model, inputs):
        layer, squares = model.config.vision_feature_layer, torch.cat(self.squares(inputs)).to(model.dtype)
        sizes = {k: inputs[k] for k in ("image_sizes",) if k in inputs}
        states = model.model.vision_tower(squares, output_hidden_states=True).hidden_states
        features = model.get_image_features(inputs["pixel_values"].to(model.dtype), **sizes).pooler_output
        return [len(f) for f in features], {
            "vision.selected": states[layer] if isinstance(layer, int) else torch.cat([states[i] for i in layer], -1),
            "image_features": torch.cat(list(features), 0)}

    def run(self, request, pictures, min_gap, quiet, bf16):
        """Returns the expected tensors of one request and its record for case.json."""
        prompt, ids_given = request.get("prompt"), self.processor is not None
        if prompt is None:
            prompt = self.tokenizer.apply_chat_template(request["messages"], chat_template=self.template, tokenize=False,
                                                        add_generation_prompt=True)
        inputs = self.inputs(prompt, [load_image(str(pictures / f)) for f in request.get("images", [])])
        ids, steps = inputs["input_ids"][0], request.get("steps", 32)
        tokens, step_logits = self.greedy(inputs, steps)
        full = self.logits(self.f32, inputs, tokens)
        exact = self.logits(self.f64, inputs, tokens)
        top = step_logits.topk(2, -1).values
        n = len(ids)
        found = {"input_ids": ids, "logits_all": full[:n], "greedy_tokens": tokens, "greedy_logits": step_logits}
        measured = {
            "logits_max_abs_diff_f32_vs_f64": difference(full, exact),
            "logits_max_abs_diff_cache_vs_full": difference(full[n - 1:], step_logits),
            "logits_std": full.std().item(), "min_top1_top2_gap": (top[:, 0] - top[:, 1]).min().item()}
        record = {
            "name": request["name"], "images": request.get("images", []),
            **({"messages": request["messages"]} if "messages" in request else {}), "prompt": prompt,
            "add_special_tokens": ids_given, "n_prompt_tokens": n, "n_image_tokens": 0,
            "sampling": {"greedy": True, "max_new_tokens": steps, "eos_token_ids": sorted(self.eos)},
            "stopped_on_eos": tokens[-1].item() in self.eos,
            "expected_text": self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True), "measured": measured}

        expanded = prompt
        if "pixel_values" in inputs:
            pixels = inputs["pixel_values"]
            counts, seen = self.vision(self.f32, inputs)
            _, seen_exactly = self.vision(self.f64, inputs)
            found |= {"pixel_values": pixels, **seen}
            record |= {"n_image_tokens": sum(counts), "image_tokens_per_image": counts}
            if self.kind == "llava_next":
                record["pixels_sha256"] = [hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in self.squares(inputs)]
            parts = prompt.split("<image>")
            expanded = "".join(part + "<image>" * n for part, n in zip(parts, [*counts, 0], strict=True))
            for name, short in (("image_features", "image_features"), ("vision.selected", "vision_selected")):
                measured[f"{short}_max_abs_diff_f32_vs_f64"] = difference(seen[name], seen_exactly[name])
                measured[f"{short}_std"] = seen[name].std().item()
            black = self.logits(self.f32, inputs | {"pixel_values": torch.zeros_like(pixels)}, tokens)
            measured["logits_change_if_image_black"] = difference(black[n - 1], full[n - 1])
            assert measured["logits_change_if_image_black"] > 0.3
        if bf16 is not None:
            low = self.logits(bf16, inputs, tokens).float()
            measured["logits_max_abs_diff_bf16_compute"] = difference(low, full)

        label = f"{self.folder} {request['name']}: seed or wording"
        assert measured["min_top1_top2_gap"] >= min_gap, f"{label} gives a near tie {measured['min_top1_top2_gap']}"
        assert len(set(tokens.tolist())) >= len(tokens) // 4, f"{label} gives a dull text"
        assert not set(tokens.tolist()) & (quiet - set(self.eos)), f"{label} gives a special token"
        assert torch.equal(full[n - 1:].argmax(-1), tokens) and torch.equal(exact[n - 1:].argmax(-1), tokens)
        plain = Tokenizer.from_file(f"{self.folder}/tokenizer.json")
        assert plain.encode(expanded, add_special_tokens=ids_given).ids == ids.tolist()
        return found, record


def difference(a, b):
    return (a.double() - b.double()).abs().max().item()


def stored(t):
    """Tensors as the files hold them: i32 or f32."""
    return t.to(torch.float32 if t.is_floating_point() else torch.int32).contiguous().clone()
