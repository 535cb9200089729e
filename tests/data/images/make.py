"""Makes the awkward pictures beside this file and expected.json: what Pillow decodes them to, and what it
resizes some of them to. Run it in this folder with Pillow 13 and numpy; it writes the same bytes again.

expected.json
  decode[]    file, width, height, rgb (base64 of the upright RGB bytes), stored (the same without EXIF
              orientation, where that differs), levels (how far a decoder of a lossy format may be off)
  resize[]    width, height, pad, filter (Pillow's number), to (width, height), sha256 of the RGB result; the
              source is noise(width, height)
"""

import base64
import hashlib
import io
import json
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

W, H = 13, 9
EXPECTED = {"decode": [], "resize": []}


def noise(width, height):
    """The picture of LLaVA's test vectors: byte i is ((i * 7919) >> 3) & 255."""
    i = np.arange(width * height * 3, dtype=np.int64)
    return Image.fromarray((((i * 7919) >> 3) & 255).astype(np.uint8).reshape(height, width, 3))


def smooth(width, height, channels):
    """Slow gradients, that lossy formats keep to a few levels."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    planes = [x, y, 1 - x, (x + y) / 2]
    return np.stack([planes[c] * 200 + 20 for c in range(channels)], -1).astype(np.uint8).squeeze()


def to_rgb(image):
    """load_image and convert_to_rgb of transformers 5.23: an alpha channel is dropped, but a single
    transparent colour, which Pillow keeps as `info["transparency"]`, becomes white."""
    image = image.convert("RGB")
    if image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image


def add(name, data, levels=0):
    open(name, "wb").write(data)
    stored = to_rgb(Image.open(name))
    upright = to_rgb(ImageOps.exif_transpose(Image.open(name)))
    entry = {"file": name, "width": upright.width, "height": upright.height, "levels": levels}
    entry["rgb"] = base64.b64encode(upright.tobytes()).decode()
    if stored.tobytes() != upright.tobytes() or stored.size != upright.size:
        entry["stored"] = base64.b64encode(stored.tobytes()).decode()
    EXPECTED["decode"].append(entry)


def saved(image, **options):
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def packed(rows, depth):
    """Rows of samples as a PNG stores them, each behind filter byte 0."""
    out = b""
    for row in rows:
        row = np.asarray(row).reshape(-1)
        if depth == 16:
            out += b"\0" + row.astype(">u2").tobytes()
        else:
            bits = "".join(format(int(v), f"0{depth}b") for v in row)
            bits += "0" * (-len(bits) % 8)
            out += b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    return out


def png(depth, colour, samples, extra=b"", interlaced=False):
    """A PNG of `samples` [height, width, channels] written by hand, for layouts that Pillow does not write."""
    height, width = samples.shape[:2]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
        body = b"".join(packed(samples[y::dy, x::dx], depth) for x, y, dx, dy in passes if samples[y::dy, x::dx].size)
    else:
        body = packed(samples, depth)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b"")


def pngs():
    r = np.random.RandomState(7)
    trns = lambda *values: chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))
    for depth in (1, 2, 4, 8):
        grey = r.randint(0, 1 << depth, (H, W, 1))
        add(f"grey{depth}.png", png(depth, 0, grey))
        add(f"grey{depth}_trns.png", png(depth, 0, grey, trns(int(grey[0, 0, 0]))))
    grey = np.concatenate([np.arange(100, 300, 2), r.randint(0, 1 << 16, W * H - 100)]).reshape(H, W, 1)
    add("grey16.png", png(16, 0, grey))
    add("grey16_trns.png", png(16, 0, grey, trns(200)))
    add("grey16_trns_high.png", png(16, 0, grey, trns(0x1280)))
    grey[:4, :3] = 0
    add("grey16_trns_black.png", png(16, 0, grey, trns(0)))
    add("grey1_trns_black.png", png(1, 0, grey % 2, trns(0)))
    add("grey4_trns_black.png", png(4, 0, grey % 16, trns(0)))
    for name, colour, channels in [("la", 4, 2), ("rgb", 2, 3), ("rgba", 6, 4)]:
        add(f"{name}8.png", png(8, colour, r.randint(0, 256, (H, W, channels))))
        add(f"{name}16.png", png(16, colour, r.randint(0, 1 << 16, (H, W, channels))))
    rgb = r.randint(0, 256, (H, W, 3))
    deep = r.randint(0, 1 << 16, (H, W, 3))
    deep[:2] &= 255
    add("rgb16_trns.png", png(16, 2, deep, trns(*map(int, deep[1, 1]))))
    add("rgb8_trns.png", png(8, 2, rgb, trns(*map(int, rgb[1, 1]))))
    add("rgb8_interlaced.png", png(8, 2, rgb, interlaced=True))
    for depth in (1, 2, 4, 8):
        palette = chunk(b"PLTE", r.randint(0, 256, 3 << depth).astype(np.uint8).tobytes())
        alpha = chunk(b"tRNS", bytes([0, 128]))
        index = r.randint(0, 1 << depth, (H, W, 1))
        add(f"palette{depth}.png", png(depth, 3, index, palette))
        add(f"palette{depth}_trns.png", png(depth, 3, index, palette + alpha))
        add(f"palette{depth}_key.png", png(depth, 3, index, palette + chunk(b"tRNS", bytes([255, 0]))))
    image = Image.fromarray(rgb.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 5
    add("exif5.png", saved(image, format="PNG", exif=exif))
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>')
    add("xmp8.png", saved(image, format="PNG", pnginfo=xmp))
    add("animated.png", saved(image, format="PNG", save_all=True, append_images=[noise(W, H)]))
    whole = png(8, 2, rgb)
    add("no_end.png", whole[:-12])
    add("half_end.png", whole[:-5])


def jpegs():
    image = Image.fromarray(smooth(16, 8, 3))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f"exif{orientation}.jpg", saved(image, format="JPEG", quality=95, subsampling=0, exif=exif), 3)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    add("xmp6.jpg", saved(image, format="JPEG", quality=95, subsampling=0, xmp=xmp), 3)
    cmyk = saved(Image.fromarray(smooth(W, H, 4), "CMYK"), format="JPEG", quality=95)
    add("cmyk.jpg", cmyk, 3)
    # The same with the colour transform of the Adobe segment set to YCCK.
    at = cmyk.index(b"Adobe") + 11
    add("ycck.jpg", cmyk[:at] + b"\2" + cmyk[at + 1 :], 4)
    add("grey.jpg", saved(Image.fromarray(smooth(W, H, 1)), format="JPEG", quality=95), 3)
    add("progressive.jpg", saved(image, format="JPEG", quality=95, progressive=True), 4)


def webps():
    r = np.random.RandomState(8)
    rgba = Image.fromarray(r.randint(0, 256, (H, W, 4)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    add("rgb.webp", saved(rgba.convert("RGB"), format="WEBP", lossless=True))
    add("rgba.webp", saved(rgba, format="WEBP", lossless=True, exact=True))
    add("exif3.webp", saved(rgba.convert("RGB"), format="WEBP", lossless=True, exif=exif))
    add("lossy.webp", saved(Image.fromarray(smooth(W, H, 3)), format="WEBP", quality=90), 3)
    frames = [noise(W, H), rgba.convert("RGB")]
    add("animated.webp", saved(frames[0], format="WEBP", lossless=True, save_all=True, append_images=frames[1:]))


def gifs():
    r = np.random.RandomState(9)
    image = Image.fromarray(r.randint(0, 16, (H, W)).astype(np.uint8), "P")
    image.putpalette(r.randint(0, 256, 48).astype(np.uint8).tobytes())
    add("opaque.gif", saved(image, format="GIF", interlace=0))
    add("interlaced.gif", saved(image, format="GIF", interlace=1))
    clear = saved(image, format="GIF", transparency=3)
    add("transparent.gif", clear)
    add("animated.gif", saved(image, format="GIF", save_all=True, append_images=[noise(W, H)]))
    plain = saved(image, format="GIF")
    for name, data, screen in [
        ("offset.gif", plain, (W + 4, H + 3)),
        ("offset_transparent.gif", clear, (W + 4, H + 3)),
        ("outside.gif", plain, (W - 2, H - 3)),
    ]:
        # The first frame moves to (2, 1) of another screen than its own.
        at = data.index(struct.pack("<4H", 0, 0, W, H))
        data = data[:6] + struct.pack("<2H", *screen) + data[10:at] + struct.pack("<2H", 2, 1) + data[at + 4 :]
        add(name, data)
    # A palette of 4 colours for indices up to 15: the screen descriptor says so, the rest is cut out.
    add("short_palette.gif", plain[:10] + bytes([plain[10] & 0xF8 | 1]) + plain[11:25] + plain[13 + 3 * (2 << (plain[10] & 7)) :])


def bmps():
    r = np.random.RandomState(10)
    rgba = Image.fromarray(r.randint(0, 256, (H, W, 4)).astype(np.uint8))
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        add(f"{mode.lower()}.bmp", saved(rgba.convert("RGB").convert(mode) if mode != "RGBA" else rgba, format="BMP"))
    pixels = r.randint(0, 1 << 15, (H, W + 1)).astype("<u2").tobytes()
    header = struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54)
    info = struct.pack("<IiiHHIIiiII", 40, W, H, 1, 16, 0, len(pixels), 2835, 2835, 0, 0)
    # Pillow truncates v * 255 / 31, the decoder may round it.
    add("rgb555.bmp", header + info + pixels, 1)
    pixels = r.randint(0, 256, (H, W * 3 + 1)).astype(np.uint8).tobytes()
    header = struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54)
    info = struct.pack("<IiiHHIIiiII", 40, W, -H, 1, 24, 0, len(pixels), 2835, 2835, 0, 0)
    add("topdown.bmp", header + info + pixels)


def tiff(samples, bits, meaning, *, order="<", kind=1, extra=None, planar=False, palette=None, big=False):
    """A TIFF of `samples` [height, width, channels] in one strip (a plane, if planar), for layouts that Pillow does
    not write."""
    height, width, channels = samples.shape
    planes = [samples[..., c : c + 1] for c in range(channels)] if planar else [samples]
    if bits < 8:
        strips = [b"".join(row[1:] for row in (packed([line], bits) for line in plane)) for plane in planes]
    else:
        dtype = order + {1: "u", 2: "i", 3: "f"}[kind] + str(bits // 8)
        strips = [plane.astype(dtype).tobytes() for plane in planes]
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [meaning], 277: [channels]}
    tags |= {278: [height], 279: [len(strip) for strip in strips], 284: [2 if planar else 1], 339: [kind] * channels}
    tags |= ({338: [extra]} if extra is not None else {}) | ({320: palette} if palette is not None else {})
    word, inline = ("Q", 8) if big else ("I", 4)
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, 16) if big else (42, 8)))
    tags[273] = [0] * len(strips)
    size = (8 if big else 2) + len(tags) * (20 if big else 12) + inline
    data_at, tail = len(out) + size, b""
    for i, strip in enumerate(strips):
        tags[273][i] = data_at + len(tail)
        tail += strip
    out += struct.pack(order + ("Q" if big else "H"), len(tags))
    for tag, values in sorted(tags.items()):
        letter, code = ("I", 4) if tag in (273, 279) else ("H", 3)
        field = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(field) > inline:
            at = data_at + len(tail)
            tail += field
            field = struct.pack(order + word, at)
        out += struct.pack(order + "HH" + word, tag, code, len(values)) + field.ljust(inline, b"\0")
    return out + struct.pack(order + word, 0) + tail


def tiffs():
    r = np.random.RandomState(11)
    cmyk = Image.fromarray(r.randint(0, 256, (H, W, 4)).astype(np.uint8), "CMYK")
    rgba = Image.fromarray(r.randint(0, 256, (H, W, 4)).astype(np.uint8))
    rgb = rgba.convert("RGB")
    add("grey.tif", saved(rgb.convert("L"), format="TIFF"))
    add("bits.tif", saved(rgb.convert("1"), format="TIFF"))
    add("white_is_zero.tif", saved(rgb.convert("1"), format="TIFF", tiffinfo={262: 0}))
    add("grey_white_is_zero.tif", saved(rgb.convert("L"), format="TIFF", tiffinfo={262: 0}))
    add("rgb.tif", saved(rgb, format="TIFF", compression="tiff_lzw"))
    add("rgba.tif", saved(rgba, format="TIFF", compression="tiff_adobe_deflate"))
    add("cmyk.tif", saved(cmyk, format="TIFF"))
    add("palette.tif", saved(rgb.quantize(16), format="TIFF"))
    add("float.tif", saved(Image.fromarray(np.linspace(-50, 400, W * H).astype(np.float32).reshape(H, W)), format="TIFF"))
    deep = np.concatenate([np.arange(W * 4) * 6, r.randint(0, 1 << 16, W * (H - 4))])
    add("grey16.tif", saved(Image.fromarray(deep.astype(np.uint16).reshape(H, W)), format="TIFF"))
    add("orientation6.tif", saved(rgb, format="TIFF", tiffinfo={274: 6}))
    sample = lambda top, channels, low=0: r.randint(low, top, (H, W, channels))
    add("grey_alpha.tif", tiff(sample(256, 2), 8, 1, extra=2))
    add("grey4.tif", tiff(sample(16, 1), 4, 1))
    add("grey2_white_is_zero.tif", tiff(sample(4, 1), 2, 0))
    add("grey16_white_is_zero.tif", tiff(sample(400, 1), 16, 0))
    add("grey16_signed.tif", tiff(sample(400, 1, -100), 16, 1, kind=2, order=">"))
    add("grey32.tif", tiff(sample(400, 1, -100), 32, 1, kind=2))
    add("palette4.tif", tiff(sample(16, 1), 4, 3, palette=list(map(int, r.randint(0, 1 << 16, 48)))))
    premultiplied = sample(256, 4)
    premultiplied[0, :3, 3] = 0
    add("rgba_premultiplied.tif", tiff(premultiplied, 8, 2, extra=1))
    add("rgb16.tif", tiff(sample(1 << 16, 3), 16, 2, order=">"))
    add("rgb_planes.tif", tiff(sample(256, 3), 8, 2, planar=True))
    add("cmyk16.tif", tiff(sample(1 << 16, 4), 16, 5))
    add("big.tif", tiff(sample(256, 3), 8, 2, big=True))


def resizes():
    sizes = [(101, 77), (1, 1), (1, 40), (40, 1), (2, 3), (5, 7), (64, 64), (63, 200), (300, 10), (257, 129)]
    for width, height in sizes:
        for to in [(64, 49), (336, 256), (17, 17), (64, 64), (1, 1)]:
            for number in (3,) if to != (17, 17) else (1, 2, 3, 4, 5):
                for pad in (False, True):
                    image = noise(width, height)
                    if pad:
                        side = max(width, height)
                        canvas = Image.new("RGB", (side, side), (122, 116, 104))
                        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
                        image = canvas
                    digest = hashlib.sha256(image.resize(to, number).tobytes()).hexdigest()
                    entry = {"width": width, "height": height, "pad": pad, "filter": number, "to": to, "sha256": digest}
                    EXPECTED["resize"].append(entry)


for make in (pngs, jpegs, webps, gifs, bmps, tiffs, resizes):
    make()
with open("expected.json", "w") as out:
    lines = ",\n".join('  "%s": [\n    %s\n  ]' % (k, ",\n    ".join(map(json.dumps, v))) for k, v in EXPECTED.items())
    out.write("{\n%s\n}\n" % lines)
