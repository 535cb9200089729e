#!/usr/bin/env python3
"""Writes sentencepiece/: small tokenizer.model files, the tokenizer.json that goes with each, and what SentencePiece itself
makes of many texts.

    python make_sentencepiece.py

cases.json: for each folder, pairs of a text and its ids (no BOS). Only texts that are meant alike by SentencePiece and by
the tokenizer.json are there: special tokens are text to SentencePiece, and with `legacy` false a text that begins with
a space gets no second one.  Version that made the files here: sentencepiece 0.2.
"""
import json
import random
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

from golden_inputs import CORPUS, LONG_CORPUS, write_llama_tokenizer

HERE = Path(__file__).resolve().parent / "sentencepiece"
CASES = {"legacy": dict(size=480, corpus=LONG_CORPUS, legacy=True), "first": dict(size=430),
         "no_byte_fallback": dict(size=130, legacy=True, byte_fallback=False)}
ODD = ["", " ", "  ", "a", " a", "a ", "\n", "\n\n", "\t", "▁", "▁▁a", "日本語", "🙂", "é", "Zoë  naïve", "\u0000", "\ufeffx",
       "ＡＢＣ", "ﬁ", "e\u0301", "<0x41>", "0123456789", "....", "a\r\nb", "x" * 300, "the the the the"]


def texts(rng, count):
    words = (CORPUS + LONG_CORPUS).split()
    for _ in range(count):
        text = rng.choice(["", "", " "]).join([""])
        for _ in range(rng.randint(1, 12)):
            word = rng.choice(words)
            if rng.random() < 0.2:
                word = "".join(rng.sample(word, len(word)))
            if rng.random() < 0.1:
                word = rng.choice(ODD)
            text += word + rng.choice([" ", " ", " ", "  ", "\n", "", ", "])
        yield text


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    rng, cases = random.Random(3), {}
    for name, settings in CASES.items():
        folder = HERE / name
        folder.mkdir(parents=True)
        write_llama_tokenizer(folder, keep_model=True, **settings)
        sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        tk = Tokenizer.from_file(str(folder / "tokenizer.json"))
        cases[name] = []
        for text in [*ODD, *texts(rng, 150)]:
            if text.startswith((" ", "▁")) and not settings.get("legacy"):
                continue
            ids = sp.encode(text)
            assert tk.encode(text, add_special_tokens=False).ids == ids, (name, text)
            cases[name].append([text, ids])
    (HERE / "cases.json").write_text(json.dumps(cases, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
