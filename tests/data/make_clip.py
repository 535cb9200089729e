#!/usr/bin/env python3
"""Writes the goldens of CLIP by itself: small random checkpoints, and what transformers' CLIPModel makes of pictures and
texts with them, in float32 from the saved weights.

    make_clip.py                        write both cases into this folder
    make_clip.py --out DIR              write elsewhere

Versions as in make_goldens.py. README.md says what the cases are for.
"""
import argparse
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from golden_inputs import LONG_CORPUS, write_json, write_picture
from golden_reference import DTYPES, difference, stored

HERE = Path(__file__).resolve().parent
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = (r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|"""
         r"""[^\s\p{L}\p{N}]+""")

# Texts whose ids are told: what a tokenizer may do otherwise. The last is longer than 77 tokens.
AWKWARD = [
    "", " ", "a photo of a cat", "  A\tPhoto\n of   a CAT. ", "ZOË'S NAÏVE CAFÉ: ½ µm, ﬁne", "Ångström e\u0301", "日本語 🙂👩‍👩‍👧",
    "don't they're I'VE we'll", "in 1984, 3.14159!!! (x^2)", "a<|endoftext|>b", "<|startoftext|>", "&amp; &lt;b&gt;",
    "\u00a0non\u2003breaking\u200bspaces", "ß İ ſ Ω", "\u0000\u0007", "the quick brown fox " * 30]

CASES = [
    dict(name="f_clip_zeroshot", dtype="f32", seed=505, vocab=700, end="openai", tokenizer_json=True, dicts=True,
         what="three texts, two pictures; text_config.eos_token_id is 2 as on the Hub, so a text is pooled at its largest id",
         config={"architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
                 "model_type": "clip", "projection_dim": 64,
                 "text_config": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
                                 "num_hidden_layers": 2, "projection_dim": 64, "model_type": "clip_text_model",
                                 "max_position_embeddings": 77},
                 "torch_dtype": "float32", "transformers_version": "4.21.3",
                 "vision_config": {"hidden_size": 64, "image_size": 112, "intermediate_size": 128,
                                   "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 16,
                                   "projection_dim": 64, "model_type": "clip_vision_model"}},
         pictures=[("cat.png", "photo", 180, 130, 81), ("sign.png", "text", 112, 140, 82)],
         texts=["a photo of a cat", "A photo of a DOG, riding a bicycle along the river!",
                "white text   in the corner: 42%"]),
    dict(name="clip_first_end", dtype="bf16", seed=515, vocab=600, end="real", tokenizer_json=False, dicts=False,
         what="text_config.eos_token_id is the end token's, so a text is pooled at the first of them; towers of different "
              "widths, gelu, a wide epsilon, bf16; vocab.json and merges.txt without a tokenizer.json; the last text is "
              "longer than the 40 positions, the one before it holds an end token",
         config={"architectures": ["CLIPModel"], "dtype": "bfloat16", "model_type": "clip", "projection_dim": 24,
                 "text_config": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "hidden_act": "gelu",
                                 "num_hidden_layers": 2, "layer_norm_eps": 1e-3, "model_type": "clip_text_model",
                                 "max_position_embeddings": 40},
                 "transformers_version": "5.23.0",
                 "vision_config": {"hidden_size": 48, "image_size": 32, "intermediate_size": 40, "hidden_act": "gelu",
                                   "num_attention_heads": 3, "num_hidden_layers": 2, "patch_size": 8,
                                   "layer_norm_eps": 1e-3, "model_type": "clip_vision_model"}},
         pictures=[("fox.png", "shapes", 44, 30, 83)],
         texts=["a fox", "Two people and a dog, 17 trees.", "one<|endoftext|>two", "the quick brown fox " * 30]),
]


# ---------------------------------------------------------------- tokenizer

def learn_merges(lines, normalizer, pre_tokenizer, count):
    """Plain BPE training over words whose last character carries `</w>`; ties go to the smallest pair."""
    words, merges = Counter(), []
    for line in lines:
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(line)):
            words[tuple(word[:-1]) + (word[-1] + "</w>",)] += 1
    while len(merges) < count:
        pairs = Counter()
        for w, c in words.items():
            for pair in zip(w, w[1:]):
                pairs[pair] += c
        a, b = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append((a, b))
        merged = Counter()
        for w, c in words.items():
            out, i = [], 0
            while i < len(w):
                n = 2 if w[i:i + 2] == (a, b) else 1
                out.append("".join(w[i:i + n]))
                i += n
            merged[tuple(out)] += c
        words = merged
    return merges


def write_tokenizer(folder, size, with_json):
    """Every byte twice (alone and at a word's end), merges, and two special tokens. Returns the id of the end token."""
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                                     pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters]
    merges = learn_merges(LONG_CORPUS.split("\n"), normalizer, words, size - 2 - len(pieces))
    pieces += [a + b for a, b in merges] + [START, END]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False, "bos_token": START, "do_lower_case": True, "eos_token": END, "errors": "replace",
        "model_max_length": 77, "pad_token": END, "tokenizer_class": "CLIPTokenizer", "unk_token": END})
    tk = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=END, continuing_subword_prefix="",
                              end_of_word_suffix="</w>", fuse_unk=False))
    tk.normalizer, tk.pre_tokenizer, tk.decoder = normalizer, words, decoders.ByteLevel()
    tk.add_special_tokens([AddedToken(START, special=True, normalized=True), AddedToken(END, special=True, normalized=False)])
    tk.post_processor = processors.RobertaProcessing((END, vocab[END]), (START, vocab[START]), False, False)
    if with_json:
        tk.save(str(folder / "tokenizer.json"))
    return tk, vocab, merges


# ---------------------------------------------------------------- weights

@torch.no_grad()
def init_weights(model, seed):
    """Every weight from N(0, (gain / sqrt(fan_in))^2), in the order of the sorted names."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if p.dim() == 0:
            p.fill_(2.6592)
            continue
        w = torch.randn(p.shape, generator=g)
        if "norm" in name and name.endswith("weight"):
            w = 1 + 0.1 * w
        elif name.endswith("bias"):
            w *= 0.1
        elif name.endswith("position_embedding.weight"):
            w *= 0.5
        elif not name.endswith(("class_embedding", "token_embedding.weight")):
            gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "fc1")) else 1.0
            w = w * gain / math.sqrt(p[0].numel())
        p.copy_(w)


def write_model(case, folder):
    folder.mkdir(parents=True)
    tk, vocab, merges = write_tokenizer(folder, case["vocab"], case["tokenizer_json"])
    config = json.loads(json.dumps(case["config"]))
    text, vision = config["text_config"], config["vision_config"]
    ids = {"openai": (0, 2, 1), "real": (vocab[START], vocab[END], vocab[END])}[case["end"]]
    text |= {"vocab_size": len(vocab), **dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids))}
    if case["dicts"]:
        config |= {"text_config_dict": dict(text), "vision_config_dict": dict(vision)}
    write_json(folder / "config.json", config)
    size = vision["image_size"]
    write_json(folder / "preprocessor_config.json", {
        "crop_size": {"height": size, "width": size}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": size}, "feature_extractor_type": "CLIPFeatureExtractor"})
    model = CLIPModel._from_config(CLIPConfig.from_pretrained(folder), dtype=torch.float32)
    init_weights(model, case["seed"])
    tensors = {name: t.to(DTYPES[case["dtype"]]) for name, t in model.state_dict().items()}
    # Buffers that old savers wrote beside the weights.
    tensors["text_model.embeddings.position_ids"] = torch.arange(text["max_position_embeddings"])[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange((size // vision["patch_size"]) ** 2 + 1)[None]
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return tk, CLIPTokenizer(vocab=vocab, merges=merges)


# ---------------------------------------------------------------- reference

@torch.no_grad()
def write_case(case, out):
    folder = out / case["name"]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    for spec in case["pictures"]:
        write_picture(folder / "images", *spec)
    model = folder / "model"
    plain, theirs = write_model(case, model)
    longest = case["config"]["text_config"]["max_position_embeddings"]

    def ids_of(text):
        return theirs(text, truncation=True, max_length=longest)["input_ids"]

    tokens = [{"text": t, "ids": ids_of(t)} for t in AWKWARD + case["texts"]]
    for entry in tokens:  # the plain library and transformers' class agree wherever nothing is cut off
        assert len(entry["ids"]) == longest or plain.encode(entry["text"]).ids == entry["ids"], entry

    each = [ids_of(t) for t in case["texts"]]
    width, end = max(map(len, each)), plain.token_to_id(END)
    ids = torch.tensor([x + [end] * (width - len(x)) for x in each])
    mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in each])
    pictures = [load_image(str(folder / "images" / spec[0])) for spec in case["pictures"]]
    pixels = CLIPImageProcessorPil.from_pretrained(model)(pictures, return_tensors="pt")["pixel_values"]

    def run(dtype, attention):
        m = CLIPModel.from_pretrained(model, dtype=torch.float32, attn_implementation=attention).eval().to(dtype)
        o = m(input_ids=ids, attention_mask=mask, pixel_values=pixels.to(dtype))
        return {"image_embeds": o.image_embeds, "text_embeds": o.text_embeds, "logits_per_image": o.logits_per_image,
                "vision.projected": o.vision_model_output.pooler_output, "text.projected": o.text_model_output.pooler_output,
                "probs": o.logits_per_image.softmax(-1)}

    found, exact = run(torch.float32, "eager"), run(torch.float64, "sdpa")
    measured = {f"{name}_max_abs_diff_f32_vs_f64": difference(found[name], exact[name]) for name in found}
    save_file({name: stored(t) for name, t in found.items()}, folder / "expected.safetensors", metadata={"format": "pt"})
    write_json(folder / "case.json", {k: case[k] for k in ("name", "what", "dtype", "seed", "texts")} | {
        "model": "model", "images": [spec[0] for spec in case["pictures"]], "tokens": tokens, "measured": measured,
        "reference": {"transformers": transformers.__version__, "torch": torch.__version__, "attention": "eager",
                      "compute": "float32 from the saved weights"}})
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{case['name']}: {size / 1000:.0f} kB, noise {max(measured.values()):.1e}, probabilities {found['probs'].tolist()}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=HERE)
    args = p.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for case in CASES:
        write_case(case, args.out)


if __name__ == "__main__":
    main()
