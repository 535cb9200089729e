"""Inputs of the goldens, all drawn or written here from seeds: pictures, tokenizers, chat templates."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.image_utils import load_image


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- pictures

def picture(kind, w, h, seed):
    """`grad`: colour gradients. `photo`: soft fields with grain and three figures. `text`: the same with lines of
    writing. `shapes`: fields without figures first, then six of them."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    u, v = x / max(w - 1, 1), y / max(h - 1, 1)

    def field(k):
        coarse = Image.fromarray(r.uniform(0, 255, (k, k)).astype(np.uint8))
        return np.asarray(coarse.resize((w, h), Image.BICUBIC), np.float64)

    if kind == "grad":
        a = np.stack([255 * u, 255 * v, 255 * (1 - u) * (0.3 + 0.7 * v)], -1)
    else:
        a = np.stack([0.55 * field(4) + 0.3 * field(9) + 0.15 * field(23) for _ in range(3)], -1)
        a = a * (0.55 + 0.45 * v[..., None]) + r.normal(0, 4, (h, w, 3))
    im = Image.fromarray(np.clip(a + 0.5, 0, 255).astype(np.uint8), "RGB")
    if kind == "grad":
        return im
    draw = ImageDraw.Draw(im)
    for _ in range(6 if kind == "shapes" else 3):
        x0, y0 = int(r.integers(0, w)), int(r.integers(0, h))
        s = max(2, int(min(w, h) * r.uniform(0.1, 0.45)))
        fill = tuple(int(c) for c in r.integers(0, 255, 3))
        figure = [draw.ellipse, draw.rectangle][int(r.integers(0, 2))]
        figure([x0, y0, x0 + s, y0 + s // 2 + 1], fill=fill)
    if kind == "text":
        for i in range(4):
            at = (int(w * 0.05), int(h * (0.1 + 0.22 * i)))
            draw.text(at, "The quick LLaVA %d" % r.integers(0, 9999), fill=(255, 255, 255) if i % 2 else (0, 0, 0))
    return im


def write_picture(folder, name, kind, w, h, seed, mode="RGB"):
    """A JPEG gets a `.decoded.png` beside it with Pillow's own decoding, since decoders differ by a few levels."""
    im, path = picture(kind, w, h, seed), Path(folder) / name
    if mode == "RGBA":
        yy, xx = np.mgrid[0:h, 0:w]
        distance = np.hypot((xx - w / 2) / w, (yy - h / 2) / h)
        im.putalpha(Image.fromarray((255 * np.clip(1.3 - distance * 2.2, 0, 1)).astype(np.uint8)))
    if path.suffix == ".png":
        im.save(path, optimize=True)
    else:
        im.save(path, "JPEG", quality=90, subsampling=2)
        load_image(str(path)).save(path.with_suffix(".decoded.png"), optimize=True)


# ---------------------------------------------------------------- tokenizers

CORPUS = """A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the human's questions.
USER: What is shown in this image? ASSISTANT: The image shows a red square next to a blue circle on a gray background, with white text in the corner.
USER: Describe the picture in detail. ASSISTANT: There is a man riding a bicycle along the river while the sun is setting behind the mountains.
How many people are in the photo? What color is the car? Where was this taken? Why is the sky blue? Compare the two images and explain the difference.
The quick brown fox jumps over the lazy dog. She sells sea shells by the sea shore. To be, or not to be, that is the question.
fn main() { let x: u32 = 42; println!("{}", x + 1); } def f(a, b): return a * b  # comment
In 1984, about 3.14159 million users asked 2,718 questions; 100% of them were answered (more or less). Café, naïve, Zoë, über.
<html><body>Hello, world!</body></html> https://example.com/index.html?q=1&r=2 \\frac{a}{b} x^2 + y^2 = z^2 """
LONG_CORPUS = CORPUS + """Large language models predict the next token given the previous ones; vision encoders turn patches into features.
Please answer briefly. Think step by step before you answer. Translate the following sentence into French. Summarise the table.
The old harbour lay quiet under a thin fog, and only the lighthouse kept turning, turning, as if it had forgotten why. """


def special(token):
    return AddedToken(token, special=True, normalized=False)


def added_tokens_decoder(tokenizer, tokens):
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(tokenizer.token_to_id(t)): {"content": t, **flags} for t in tokens}


def write_llama_tokenizer(folder, size, corpus=CORPUS, legacy=False, byte_fallback=True, added=("<image>", "<pad>"),
                          keep_model=False):
    """Llama and Vicuna style: BPE merges taken from a SentencePiece model, byte fallback, `<s>` put first.

    `legacy` puts a `▁` before every stretch of text (as the first Llama tokenizers do), otherwise only before the first.
    `added` are special tokens behind the model's own. `keep_model` writes tokenizer.model, the SentencePiece model, too.
    Returns the ids that configs and weights need."""
    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.split("\n") * 3), model_writer=blob, vocab_size=size, model_type="bpe",
        byte_fallback=byte_fallback, character_coverage=0.995, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, split_digits=True,
        allow_whitespace_only_pieces=True, hard_vocab_limit=True, minloglevel=2, num_threads=1)
    sp = sentencepiece.SentencePieceProcessor(model_proto=blob.getvalue())
    vocab = {sp.id_to_piece(i): i for i in range(size)}
    merges = []
    for piece, i in vocab.items():
        if i < 3 or sp.is_byte(i):
            continue
        halves = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        halves.sort(key=lambda h: (vocab[h[0]], vocab[h[1]]))
        merges += [(sp.get_score(i), h) for h in halves]
    merges = [h for _, h in sorted(merges, key=lambda m: -m[0])]

    tk = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    if legacy:
        tk.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tk.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tk.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                    decoders.Strip(content=" ", left=1)])
    specials = ["<unk>", "<s>", "</s>", *added]
    tk.add_special_tokens([special(t) for t in specials])
    tk.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)])
    tk.save(f"{folder}/tokenizer.json")
    if keep_model:
        Path(f"{folder}/tokenizer.model").write_bytes(blob.getvalue())
    pad_token = "<pad>" if "<pad>" in added else "<unk>"
    write_json(f"{folder}/tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added_tokens_decoder(tk, specials),
        "bos_token": "<s>", "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": legacy,
        "model_max_length": 2048 if legacy else 1000000000000000019884624838656, "pad_token": pad_token,
        "padding_side": "left", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
        "use_default_system_prompt": False, "processor_class": "LlavaProcessor"})
    write_json(f"{folder}/special_tokens_map.json",
               {"bos_token": "<s>", "eos_token": "</s>", "pad_token": pad_token, "unk_token": "<unk>"})
    image, pad = tk.token_to_id("<image>"), tk.token_to_id(pad_token)
    quiet = {0, 1, *(tk.token_to_id(t) for t in added)}
    return {"size": tk.get_vocab_size(), "image": image, "pad": pad, "eos": 2, "quiet": quiet,
            "bytes": [i for i in range(size) if sp.is_byte(i)]}


def learn_merges(lines, pre_tokenizer, alphabet, count):
    """Plain BPE training; the library's own trainer breaks ties at random, this one by the smallest pair."""
    words, merges = Counter(), []
    for line in lines:
        words.update(tuple(w) for w, _ in pre_tokenizer.pre_tokenize_str(line))
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


def write_chatml_tokenizer(folder, size, template):
    """SmolLM2 style: byte-level BPE with single digits, no BOS, the chat template inside tokenizer_config.json."""
    end, start, stop = specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pre = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    pieces = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(LONG_CORPUS.split("\n"), pre, pieces, size - len(pieces))
    pieces += [a + b for a, b in merges]
    tk = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(pieces)}, merges=merges, ignore_merges=False))
    tk.pre_tokenizer, tk.decoder = pre, decoders.ByteLevel()
    tk.add_special_tokens([special(t) for t in specials])
    tk.save(f"{folder}/tokenizer.json")
    write_json(f"{folder}/tokenizer_config.json", {
        "added_tokens_decoder": added_tokens_decoder(tk, specials), "bos_token": start,
        "clean_up_tokenization_spaces": False, "eos_token": stop, "model_max_length": 8192, "pad_token": stop,
        "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "unk_token": end, "vocab_size": size,
        "additional_special_tokens": [start, stop], "chat_template": template})
    return {"size": size, "image": None, "pad": 2, "eos": 2, "quiet": {0, 1}, "bytes": []}


LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")


def write_llama3_tokenizer(folder, size):
    """Llama 3 style: byte-level BPE behind a split of its own, BOS put first, two tokens that end a text."""
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    specials = [f"<|{name}|>" for name in names] + ["<image>", "<pad>"]
    pre = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(CORPUS.split("\n"), pre, pieces, size - len(pieces) - len(specials))
    pieces += [a + b for a, b in merges]
    tk = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(pieces)}, merges=merges, ignore_merges=True))
    tk.pre_tokenizer, tk.decoder = pre, decoders.ByteLevel()
    tk.add_special_tokens([special(t) for t in specials])
    begin, end, _, _, turn, image, pad = [tk.token_to_id(t) for t in specials]
    tk.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A",
                                                      special_tokens=[("<|begin_of_text|>", begin)])
    tk.save(f"{folder}/tokenizer.json")
    write_json(f"{folder}/tokenizer_config.json", {
        "added_tokens_decoder": added_tokens_decoder(tk, specials), "bos_token": specials[0],
        "clean_up_tokenization_spaces": True, "eos_token": specials[4], "model_max_length": 8192, "pad_token": "<pad>",
        "padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None,
        "processor_class": "LlavaNextProcessor"})
    quiet = {tk.token_to_id(t) for t in specials} - {end, turn}
    return {"size": size, "image": image, "pad": pad, "eos": [end, turn], "quiet": quiet, "bytes": []}


# ---------------------------------------------------------------- chat templates, as published checkpoints carry them

VICUNA = "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
CHATML = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

MISTRAL = "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
LLAMA3 = "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"


def user(text, images=0):
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
