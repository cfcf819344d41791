"""Images: reading files, and a checkpoint's preprocessing as transformers does it for ViT, DeiT and CLIP."""

import re
from pathlib import Path

import numpy as np

from model import UserError, find_config, note, read_settings


def pillow(path):
    """Return the package Pillow; arrays of the model's size do without. UserError: not installed."""
    try:
        import PIL.ImageOps
        return PIL
    except ImportError:
        raise UserError(f"{path}: reading or resizing images needs Pillow: pip install pillow") from None


def read_image(path):
    """Return an image file as uint8 (C, H, W), C 1 or 3, upright. UserError: no image, broken, too large to be one."""
    try:
        if path.suffix == ".npy":
            return channels_first(np.load(path, allow_pickle=False), path)
        PIL = pillow(path)
        with PIL.Image.open(path) as image:
            if getattr(image, "is_animated", False):
                note(f"{path.parent}: of images with several frames, as {path.name[:40]!a}, only the first is read")
            image = PIL.ImageOps.exif_transpose(image)
            if image.mode not in ("1", "L", "F") and not image.mode.startswith("I"):    # those are grey
                image = image.convert("RGB")
            return channels_first(np.asarray(image), path)
    except UserError:
        raise
    except Exception as error:  # Pillow raises nearly anything for broken files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not an image ({reason}): remove or convert it") from None


def channels_first(pixels, where):
    """Return pixels (H, W), (H, W, C) or (C, H, W) of any range as uint8 (C, H, W); C is 1 or 3, alpha is dropped."""
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4):
        pixels = pixels.transpose(2, 0, 1)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4) or pixels.dtype.kind not in "biuf":
        raise UserError(f"{where}: {pixels.dtype} {pixels.shape}, expected numbers (H, W) or (H, W, 1, 3 or 4)")
    pixels = pixels[:3]
    if pixels.dtype == np.uint8:
        return pixels
    low, high = pixels.min(initial=0), pixels.max(initial=0)
    top = 1 if pixels.dtype.kind in "bf" else 65535 if pixels.dtype.str[1:] == "u2" else 255  # by type: alike for all
    if not (low >= 0 and high <= top):
        raise UserError(f"{where}: {pixels.dtype} from {low} to {high}, expected up to 255, uint16, [0, 1]: scale it")
    return np.rint(pixels.astype(np.float64) * (255 / top)).astype(np.uint8)


# image_processor_type -> what its processor does by default
VIT = {"do_resize": True, "resample": 2, "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
       "do_normalize": True, "image_mean": 0.5, "image_std": 0.5, "crop_size": 224,
       "default_to_square": True}   # what a number as size means; False: the shortest edge
PROCESSORS = {
    "ViT": VIT,
    "DeiT": {**VIT, "size": 256, "resample": 3, "do_center_crop": True},
    "CLIP": {**VIT, "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True, "default_to_square": False,
             "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}}
NO_STEPS = ("size", "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "device",
            "return_tensors", "data_format", "input_data_format", "disable_grouping")


def image_settings(folder, image_size=None):
    """Return what a checkpoint's preprocessor does to an image, as in transformers for ViT, DeiT and CLIP.

    image_size: the model's (channels, height, width), if not config.json's; folder: None for ViT's defaults. {size
    (height, width), channels, resize: (height, width), the shortest edge or None, resample, crop, scale, mean, std}.
    """
    path = Path(folder or "") / "preprocessor_config.json"
    channels, *target = image_size or find_config(folder)[0].image_size
    first = path.with_name("processor_config.json")     # where transformers 5 looks first
    given = read_settings(first).get("image_processor") if folder else {}
    if given:
        path = first
    elif folder:
        given = read_settings(path)
    named = "image_processor_type" if given.get("image_processor_type") else "feature_extractor_type"
    kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(given.get(named) or "ViT"))
    steps = {"size": target, **PROCESSORS.get(kind, VIT), **given}
    edge = isinstance(steps["size"], dict) and [*steps["size"]] == ["shortest_edge"]
    if edge:
        steps["size"] = steps["size"]["shortest_edge"]
    elif not steps["default_to_square"]:    # a number, as earlier releases wrote it
        edge = type(steps["size"]) is int

    def check(fits, key):
        if not fits:
            raise UserError(f"{path}: {key} {str(steps.get(key))[:60]} is not supported or does not fit the model of "
                            f"{channels} x {target} pixels: mend it")

    def numbers(key, count, low=-2**14, kinds=(int, float)):
        value = steps[key]
        if isinstance(value, dict):
            value = [value.get("height"), value.get("width")]
        value = value if isinstance(value, list) else [value]
        check(len(value) in (1, count) and all(type(n) in kinds and low < n < 2**14 for n in value), key)
        return value if len(value) == count else value * count

    check(kind in PROCESSORS, named)
    for key, value in given.items():
        check(not value or key in VIT or key in NO_STEPS or key.startswith("_"), key)
    check(type(steps["resample"]) is int and steps["resample"] in (0, 2, 3), "resample")    # as torch has them too
    resize = numbers("size", 2, 0, (int,)) if steps["do_resize"] else None
    if steps["do_center_crop"]:
        check(numbers("crop_size", 2, 0, (int,)) == target, "crop_size")
    else:
        check(resize is None or resize == target and not edge, "size")
    return {"size": tuple(target), "channels": channels, "resample": steps["resample"],
            "resize": resize and (resize[0] if edge else tuple(resize)), "crop": bool(steps["do_center_crop"]),
            "scale": numbers("rescale_factor", 1, 0)[0] if steps["do_rescale"] else 1.0,
            "mean": tuple(map(float, numbers("image_mean", channels))) if steps["do_normalize"] else (0.0,),
            "std": tuple(map(float, numbers("image_std", channels, 0))) if steps["do_normalize"] else (1.0,)}


def fit(pixels, image, where):
    """Return uint8 pixels (C, H, W) brought to the model's channels and size by its processor's steps."""
    size, (height, width) = image["resize"] or pixels.shape[1:], image["size"]
    if type(size) is int:   # the shortest edge
        tall, wide = pixels.shape[1:]
        size = (size, int(size * wide / tall)) if tall <= wide else (int(size * tall / wide), size)
    if size != pixels.shape[1:] or len(pixels) > image["channels"]:
        pixels = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
        picture = pillow(where).Image.fromarray(pixels)
        picture = picture.convert("L") if image["channels"] == 1 else picture
        pixels = channels_first(np.asarray(picture.resize(size[::-1], image["resample"])), where)
    if image["crop"]:
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        pixels = pixels[:, max(top, 0):, max(left, 0):][:, :height, :width]
    if pixels.shape[1:] != (height, width):
        raise UserError(f"{where}: {pixels.shape[1]} x {pixels.shape[2]} pixels, the model takes {image['size']} and "
                        "preprocessor_config.json does not enlarge it: resize the image")
    return np.broadcast_to(pixels, (image["channels"], height, width))
