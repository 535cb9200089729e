#!/usr/bin/env python3
"""Writes expected.json: how LLaVA-NeXT sees pictures of many sizes, by transformers' own functions and by the original
LLaVA's formulas, and what transformers' image processor makes of some pictures.

    make.py             writes the file (transformers 5.23, torch 2.15, Pillow 13.0, numpy 2.4)

`sizes`: for each `tiling` (side of a tile, patches along it, pinpoints as (height, width)) and each picture, "hugging_face":
[columns and rows of tiles, tokens, first 8 bytes of the sha256 of the order], where the order says of each row of the prompt which row of the
projected squares it is (-1 for the newline), as little-endian i32. It comes from `pack_image_features`, which is given
features that are their own numbers. "original", "flat" and "spatial": the same from the original code, whose pinpoints
are (width, height) and whose unpadding does not round.

`pixels`: sha256 of the processor's pixel_values f32 [squares, 3, side, side] for a picture whose byte i is
((i * 7919) >> 3) & 255.
"""
import hashlib
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import (LlavaNextModel, get_anyres_image_grid_shape,
                                                                image_size_to_num_patches)

TILINGS = {
    "llava-1.6": (336, 24, [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]),
    "small": (70, 5, [[70, 140], [140, 70], [140, 140], [210, 70], [70, 210]]),
    "lopsided": (28, 4, [[28, 28], [28, 112], [84, 56]]),
    "onevision": (384, 27, [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]),
}
# (width, height). First those with published counts, then where f32, the order of the pinpoints, or the rounding of
# the unpadded length decides, then the extremes.
SIZES = [(640, 480), (480, 640), (1024, 899), (336, 336), (672, 672), (1000, 300), (300, 1000), (1920, 1080),
         (1080, 1920), (333, 777), (2000, 200), (672, 336), (1008, 336),
         (1279, 639), (1321, 660), (703, 296), (748, 352), (592, 555), (328, 779), (190, 912), (799, 376), (200, 100),
         (100, 200), (335, 336), (337, 336), (336, 337), (500, 375), (4000, 3000), (13000, 13765),
         (1, 1), (1, 2), (2, 1), (1, 30000), (30000, 1), (3, 30000), (30000, 7), (12345, 6789)]
PIXELS = [("llava-1.6", size) for size in [(640, 480), (333, 777), (200, 100), (1279, 639), (799, 376), (1, 3000)]]
PIXELS += [("small", size) for size in [(300, 120), (80, 200), (71, 69), (3, 2), (1, 1), (5, 900), (901, 4)]]
PIXELS += [("lopsided", size) for size in [(28, 28), (100, 25), (57, 83), (1, 1)]]


def noise(width, height):
    i = np.arange(width * height * 3, dtype=np.int64)
    return Image.fromarray((((i * 7919) >> 3) & 255).astype(np.uint8).reshape(height, width, 3), "RGB")


def numbered(squares, grid):
    return torch.arange(squares * grid * grid).reshape(squares, grid * grid, 1)


def row(columns, rows, order):
    order = np.asarray(order.flatten().tolist(), dtype="<i4")
    return [columns, rows, len(order), hashlib.sha256(order.tobytes()).hexdigest()[:16]]


def hugging_face(side, grid, pinpoints, width, height):
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=side, patch_size=side // grid),
                             image_grid_pinpoints=pinpoints)
    size = (height, width)
    squares = image_size_to_num_patches(size, pinpoints, side)
    packed, _ = LlavaNextModel.pack_image_features(SimpleNamespace(config=config), [numbered(squares, grid)], [size],
                                                   "default", torch.tensor([-1]))
    rows, columns = get_anyres_image_grid_shape(size, pinpoints, side)
    return row(columns, rows, packed[0])


# ---------------------------------------------------------------- LLaVA's mm_utils.py and llava_arch.py

def select_best_resolution(original_size, possible_resolutions):
    original_width, original_height = original_size
    best_fit, max_effective_resolution, min_wasted_resolution = None, 0, float("inf")
    for width, height in possible_resolutions:
        scale = min(width / original_width, height / original_height)
        downscaled_width, downscaled_height = int(original_width * scale), int(original_height * scale)
        effective_resolution = min(downscaled_width * downscaled_height, original_width * original_height)
        wasted_resolution = (width * height) - effective_resolution
        if effective_resolution > max_effective_resolution or (
                effective_resolution == max_effective_resolution and wasted_resolution < min_wasted_resolution):
            max_effective_resolution = effective_resolution
            min_wasted_resolution = wasted_resolution
            best_fit = (width, height)
    return best_fit


def unpad_image(tensor, original_size):
    original_width, original_height = original_size
    current_height, current_width = tensor.shape[1:]
    if original_width / original_height > current_width / current_height:
        scale_factor = current_width / original_width
        new_height = int(original_height * scale_factor)
        padding = (current_height - new_height) // 2
        return tensor[:, padding:current_height - padding, :]
    scale_factor = current_height / original_height
    new_width = int(original_width * scale_factor)
    padding = (current_width - new_width) // 2
    return tensor[:, :, padding:current_width - padding]


def original(merge, side, grid, pinpoints, width, height):
    best_width, best_height = select_best_resolution((width, height), pinpoints)
    columns, rows = best_width // side, best_height // side
    features = numbered(1 + columns * rows, grid)
    if merge == "flat":
        return row(columns, rows, features.flatten(0, 1))
    base, features = features[0], features[1:].view(rows, columns, grid, grid, -1)
    if merge == "spatial":
        features = features.permute(0, 2, 1, 3, 4).contiguous().flatten(0, 3)
    else:
        features = features.permute(4, 0, 2, 1, 3).contiguous().flatten(1, 2).flatten(2, 3)
        features = unpad_image(features, (width, height))
        newline = torch.tensor([-1])[:, None, None].expand(*features.shape[:-1], 1)
        features = torch.cat((features, newline), dim=-1).flatten(1, 2).transpose(0, 1)
    return row(columns, rows, torch.cat((base, features), dim=0))


# ---------------------------------------------------------------- writing

def pixels(tiling, width, height):
    side, _, pinpoints = TILINGS[tiling]
    processor = LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side},
                                           image_grid_pinpoints=pinpoints)
    values = processor(noise(width, height), return_tensors="np")["pixel_values"][0].astype("<f4")
    return {"tiling": tiling, "width": width, "height": height, "squares": len(values),
            "sha256": hashlib.sha256(values.tobytes()).hexdigest()}


def main():
    draw = random.Random(7)
    sizes = SIZES + [tuple(int(math.exp(draw.uniform(0, math.log(5000)))) for _ in "wh") for _ in range(60)]
    entries = []
    for name, (side, grid, pinpoints) in TILINGS.items():
        for width, height in sizes:
            at = (side, grid, pinpoints, width, height)
            entry = {"tiling": name, "size": [width, height], "hugging_face": hugging_face(*at)}
            entry["original"] = original("spatial_unpad", *at)
            if name in ("small", "lopsided"):
                entry |= {merge: original(merge, *at) for merge in ("flat", "spatial")}
            entries.append(json.dumps(entry))
    tilings = {name: {"side": side, "grid": grid, "pinpoints": p} for name, (side, grid, p) in TILINGS.items()}
    seen = ",\n  ".join(json.dumps(pixels(name, *size)) for name, size in PIXELS)
    body = f'{{"tilings": {json.dumps(tilings)},\n "sizes": [\n  ' + ",\n  ".join(entries) + f'],\n "pixels": [\n  {seen}]}}\n'
    json.loads(body)
    Path(__file__).with_name("expected.json").write_text(body)


if __name__ == "__main__":
    main()
