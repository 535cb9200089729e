#!/usr/bin/env python3
"""Writes the goldens of LoRA adapters: adapters that peft saves, and what the models of other cases make of prompts when
they are merged into them, W + scale B A, in float32.

    make_lora.py                        write both cases into this folder
    make_lora.py --out DIR              write elsewhere

Versions as in make_goldens.py, and peft 0.21. README.md says what the cases are for.
"""
import argparse
import json
import math
import os
import re
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from golden_inputs import user, write_json
from golden_reference import DTYPES, Reference, difference, stored, use_true_float64

HERE = Path(__file__).resolve().parent
ALL_OF_LM = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

CASES = [
    dict(name="h_lora_on_a", model="a_llava15_new_bf16", image="cat.png", steps=32,
         what="one adapter of rank 8, alpha 16, on all linear layers of the language model of (a)",
         adapters=[dict(folder="adapter", scale=1.0, seed=7, b_std=0.12, dtype="f32",
                        config=dict(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=ALL_OF_LM))],
         requests=[dict(name="r0", messages=[user("What is shown in this image? Use one word.", 1)], images=["cat.png"]),
                   dict(name="text", messages=[user("Why is the sky blue? Count first.")])]),
    dict(name="lora_two", model="names_saved_v5", image="tree.png", steps=12,
         what="two adapters that meet on q_proj. One is rsLoRA with patterns for rank and alpha, bf16, tensors named with "
              "`.default`, on the language model, the tower and the projector. The other is f16, taken at half its scale, "
              "on the language model and its head, with non_lora_trainables that replace the projector's second layer",
         adapters=[dict(folder="one", scale=1.0, seed=17, b_std=0.3, dtype="bf16", default=True,
                        config=dict(r=3, lora_alpha=5, use_rslora=True, rank_pattern={r"layers\.0\.self_attn.q_proj": 6},
                                    alpha_pattern={"down_proj": 2.5, "linear_1": 9},
                                    target_modules=r".*(language_model.*\.(q_proj|v_proj|down_proj)"
                                                   r"|vision_tower.*\.(q_proj|fc1)|projector\.linear_1)")),
                   dict(folder="two", scale=0.5, seed=18, b_std=0.3, dtype="f16", projector=True,
                        config=dict(r=4, lora_alpha=8,
                                    target_modules=r".*(language_model.*\.(q_proj|k_proj|gate_proj|up_proj)|lm_head)"))],
         requests=[dict(name="r0", messages=[user("What is it?", 1)], images=["tree.png"], steps=12)]),
]


@torch.no_grad()
def write_adapter(spec, model, folder):
    """An adapter with random weights as peft saves it."""
    lora = peft.get_peft_model(model, peft.LoraConfig(bias="none", task_type="CAUSAL_LM", **spec["config"]))
    g = torch.Generator().manual_seed(spec["seed"])
    for name, p in sorted(lora.named_parameters()):
        if "lora_A" in name:
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(p.shape[1]))
        if "lora_B" in name:
            p.copy_(torch.randn(p.shape, generator=g) * spec["b_std"])
    lora = lora.to(torch.float32)
    lora.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_model.safetensors"
    tensors = {name: t.to(DTYPES[spec["dtype"]]) for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "llava-hf/llava-1.5-7b-hf"
    write_json(folder / "adapter_config.json", config)
    others = {}
    if spec.get("projector"):
        # As LLaVA's trainer writes them, under the names of the original.
        linear = model.model.multi_modal_projector.linear_2
        others = {"base_model.model.model.mm_projector.2.weight": linear.weight + 0.3 * torch.randn(linear.weight.shape, generator=g) / 6,
                  "base_model.model.model.mm_projector.2.bias": torch.randn(linear.bias.shape, generator=g)}
        save_file({k: t.to(torch.bfloat16).contiguous() for k, t in others.items()}, folder / "non_lora_trainables.safetensors",
                  metadata={"format": "pt"})
    return tensors


@torch.no_grad()
def merge(model, spec, tensors, folder):
    """W += scale B A in the model's own precision."""
    config, parameters = spec["config"], dict(model.named_parameters())

    def pattern(key, module, default):
        return next((v for k, v in config.get(key, {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)

    for name, a in tensors.items():
        if "lora_A" not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        w, b = parameters[f"{module}.weight"], tensors[name.replace("lora_A", "lora_B")]
        rank, alpha = pattern("rank_pattern", module, config["r"]), pattern("alpha_pattern", module, config["lora_alpha"])
        assert a.shape[0] == rank, (name, a.shape, rank)
        scale = spec["scale"] * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        w += scale * (b.to(w.dtype) @ a.to(w.dtype))
    if spec.get("projector"):
        for name, t in load_file(folder / "non_lora_trainables.safetensors").items():
            parameters["model.multi_modal_projector.linear_2." + name.rsplit(".", 1)[1]].copy_(t)


def check_against_peft(reference, case, folder):
    """peft's own merge of the first adapter is ours."""
    ours, theirs = reference.load("eager"), reference.load("eager")
    spec = case["adapters"][0]
    merge(ours, spec, load_file(folder / spec["folder"] / "adapter_model.safetensors"), folder / spec["folder"])
    theirs = peft.PeftModel.from_pretrained(theirs, str(folder / spec["folder"])).merge_and_unload()
    theirs = dict(theirs.named_parameters())
    worst = max(difference(p, theirs[name]) for name, p in ours.named_parameters())
    assert worst < 1e-5, worst
    return worst


def write_case(case, out):
    folder = out / case["name"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = HERE / case["model"]
    (folder / "images").mkdir()
    shutil.copy(base / "images" / case["image"], folder / "images")
    reference = Reference("llava", str(base / "model"))
    saved = []
    for spec in case["adapters"]:
        saved.append(write_adapter(spec, reference.load("eager"), folder / spec["folder"]))
    worst = check_against_peft(reference, case, folder)
    for spec, tensors in zip(case["adapters"], saved):
        for model in (reference.f32, reference.f64):
            merge(model, spec, tensors, folder / spec["folder"])
        if spec.get("default"):
            renamed = {re.sub(r"(lora_[AB])\.", r"\1.default.", name): t for name, t in tensors.items()}
            save_file(renamed, folder / spec["folder"] / "adapter_model.safetensors", metadata={"format": "pt"})
    quiet = set(json.loads((base / "case.json").read_text())["never_generated_ids"])
    if case["name"] == "lora_two":
        quiet = set()  # its adapter of the head gives every token a chance
    expected, records = {}, []
    for request in case["requests"]:
        found, record = reference.run(request | {"steps": case["steps"]}, folder / "images", 0.02, quiet, None)
        for name in ("input_ids", "greedy_tokens", "greedy_logits", "image_features"):
            if name in found:
                expected[f"{request['name']}.{name}"] = stored(found[name])
        records.append(record)
    save_file(expected, folder / "expected.safetensors", metadata={"format": "pt"})
    write_json(folder / "case.json", {
        "name": case["name"], "kind": "lora", "what": case["what"], "model": f"../{case['model']}/model",
        "adapters": [{"folder": spec["folder"], "scale": spec["scale"]} for spec in case["adapters"]],
        "requests": records, "reference": {"transformers": transformers.__version__, "torch": torch.__version__,
                                           "peft": peft.__version__, "attention": "eager",
                                           "compute": "float32, adapters merged into the saved weights"}})
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    gap = min(r["measured"]["min_top1_top2_gap"] for r in records)
    noise = max(r["measured"]["logits_max_abs_diff_f32_vs_f64"] for r in records)
    print(f"{case['name']}: {size / 1000:.0f} kB, least gap {gap:.3f}, noise {noise:.1e}, from peft's merge {worst:.1e}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=HERE)
    args = p.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    use_true_float64()
    for case in CASES:
        write_case(case, args.out)


if __name__ == "__main__":
    main()
