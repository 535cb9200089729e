#!/usr/bin/env python3
"""Writes original_ids.json: what the original LLaVA code makes of prompts in each of its conversation styles, with the slow
LlamaTokenizer of the transformers it is pinned to.

    pip install transformers==4.37.2 sentencepiece protobuf "numpy<2";  python make_original_ids.py

`styles`: name and prompt of a conversation (a picture and Q1, A1, Q2), from the definitions in LLaVA's `conversation.py`.
`tokenizers`: a folder of sentencepiece/, changes to its tokenizer_config.json, tokens added as the loader adds them, and
pairs of a prompt and its ids, -200 for a picture, as `tokenizer_image_token` makes them.
"""
import json
import shutil
import tempfile
from pathlib import Path

import transformers
from transformers import LlamaTokenizer

HERE = Path(__file__).resolve().parent
Q1, A1, Q2 = "<image>\nWhat is it?", "A quick brown fox.", "And what does it do?"
HUMAN = ("A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
         "polite answers to the human's questions.")
USER = HUMAN.replace("curious human", "curious user").replace("human's", "user's")
HELPFUL = ("You are a helpful language and vision assistant. You are able to understand the visual content that the user "
           "provides, and assist the user with a variety of tasks using natural language.")
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."


def two(system):
    return f"{system} USER: {Q1} ASSISTANT: {A1}</s>USER: {Q2} ASSISTANT:"


def llama_2(system, sep):
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {system}{Q1} [/INST] {A1} </s>{sep}[INST] {Q2} [/INST]"


def chatml(system):
    turns = [("user", Q1), ("assistant", A1), ("user", Q2)]
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in turns)
    return f"<|im_start|>system\n{system}<|im_end|>{said}<|im_start|>assistant\n"


STYLES = {
    "v1": two(USER), "vicuna_v1": two(USER), "llava_v1": two(HUMAN),
    "llava_v0": f"{HUMAN}###Human: {Q1}###Assistant: {A1}###Human: {Q2}###Assistant:",
    "llava_llama_2": llama_2(HELPFUL, "<s>"), "mistral_instruct": llama_2("", ""),
    "chatml_direct": chatml("Answer the questions."), "mistral_direct": chatml("Answer the questions."), "mpt": chatml(MPT),
    "plain": f"{Q1}\n{A1}\n{Q2}\n", "v0_plain": f"{Q1}\n{A1}\n{Q2}\n",
}
ODD = ["", " ", "a", " a", "  a", "▁a", "<image>", "<image> What", "What <image>", "<image>\n<image> it", "a</s>b", "a</s> b", "</s>b",
       "a</s><image></s> b", "é日<image>🙂", "a  b\n\n c ", "<im_start><image><im_end>\nWhat is it?", "Human: <im_start><image><im_end> it"]
MARKS = ["<im_patch>", "<im_start>", "<im_end>"]
TOKENIZERS = [("legacy", {}, []), ("legacy", {"legacy": None}, []), ("legacy", {"legacy": False}, []), ("first", {"legacy": False}, []),
              ("first", {"legacy": False, "add_bos_token": False}, []), ("legacy", {"add_bos_token": False}, []),
              ("legacy", {"add_prefix_space": False}, []), ("first", {"legacy": False, "add_prefix_space": False}, []),
              ("legacy", {"add_eos_token": True}, []), ("first", {"legacy": False, "add_eos_token": True}, []),
              ("legacy", {}, MARKS), ("first", {"legacy": False}, MARKS)]


def tokenizer_image_token(tokenizer, prompt):
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    offset = int(bool(chunks[0]) and chunks[0][0] == tokenizer.bos_token_id)
    ids = chunks[0][:offset]
    for i, chunk in enumerate(chunks):
        ids += ([-200] if i else []) + chunk[offset:]
    return ids


def main():
    tokenizers = []
    for folder, changes, marks in TOKENIZERS:
        with tempfile.TemporaryDirectory() as dir:
            for file in ("tokenizer.model", "special_tokens_map.json"):
                shutil.copy(HERE / "sentencepiece" / folder / file, dir)
            config = json.loads((HERE / "sentencepiece" / folder / "tokenizer_config.json").read_text()) | changes
            Path(dir, "tokenizer_config.json").write_text(json.dumps(config))
            tokenizer = LlamaTokenizer.from_pretrained(dir)
            if marks:
                tokenizer.add_tokens(marks[:1], special_tokens=True)
                tokenizer.add_tokens(marks[1:], special_tokens=True)
            prompts = [*dict.fromkeys(STYLES.values()), *ODD] if not marks else ODD
            pairs = [[prompt, tokenizer_image_token(tokenizer, prompt)] for prompt in prompts]
            tokenizers.append({"folder": folder, "changes": changes, "marks": marks, "prompts": pairs})
    found = {"transformers": transformers.__version__, "turns": [Q1.split("\n")[1], A1, Q2], "styles": STYLES, "tokenizers": tokenizers}
    (HERE / "original_ids.json").write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
