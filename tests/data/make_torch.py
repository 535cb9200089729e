#!/usr/bin/env python3
"""Writes torch/: files of torch.save, a few kilobytes each, and what is in them as safetensors.

    python make_torch.py

tensors.safetensors holds the tensors of every file that can be read; the names of the others say what is wrong with
them.  Version that made the files here: torch 2.15 (CPU).
"""
import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent / "torch"


def tensors():
    g = torch.Generator().manual_seed(5)
    base = torch.randn(6, 10, generator=g)
    return OrderedDict([
        ("plain", torch.randn(3, 5, generator=g)),
        ("halves", torch.randn(4, 3, generator=g).half()),
        ("brain", torch.randn(7, generator=g).bfloat16()),
        ("transposed", torch.randn(4, 6, generator=g).t()),
        ("permuted", torch.randn(2, 3, 4, generator=g).half().permute(2, 0, 1)),
        ("rows_of_base", base[2:4]),          # an offset into a storage
        ("columns_of_base", base[:, 3:7]),    # strides of another tensor's rows
        ("every_other", base[::2, ::5]),
        ("scalar", torch.tensor(1.5)),
        ("empty", torch.zeros(0, 3)),
        ("one_long_axis", torch.randn(5, 1, generator=g).t()),
        ("ids", torch.arange(9).reshape(1, 9)),
        ("doubles", torch.randn(2, 2, generator=g).double()),
        ("flags", torch.tensor([True, False, True])),
    ])


class Opens:
    def __reduce__(self):
        return os.system, ("true",)


def repack(source, target):
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))


def main():
    HERE.mkdir(exist_ok=True)
    all_tensors = tensors()
    save_file({k: v.contiguous().clone() for k, v in all_tensors.items()}, HERE / "tensors.safetensors")
    torch.save(all_tensors, HERE / "ordered.bin")
    torch.save(dict(all_tensors), HERE / "plain_protocol_4.bin", pickle_protocol=4)
    torch.save({k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in all_tensors.items()},
               HERE / "parameters.bin")
    module = torch.nn.Module()                # a state dict has the attribute _metadata
    for k, v in all_tensors.items():
        module.register_buffer(k, v)
    torch.save(module.state_dict(), HERE / "state_dict.bin")

    small = {"plain": torch.ones(2)}
    torch.save(small, HERE / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save(small | {"step": 7}, HERE / "a_number.bin")
    torch.save([torch.ones(2)], HERE / "a_list.bin")
    torch.save(small | {"call": Opens()}, HERE / "a_call.bin")
    torch.save(torch.nn.Linear(2, 2), HERE / "a_module.bin")
    torch.save({"sparse": torch.eye(2).to_sparse()}, HERE / "sparse.bin")
    torch.save({"wide": torch.ones(1).expand(1000)}, HERE / "expanded.bin")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), HERE / "torchscript.bin")
    repack(HERE / "ordered.bin", HERE / "compressed.bin")


if __name__ == "__main__":
    main()
