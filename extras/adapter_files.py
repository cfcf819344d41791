"""Adapters in PEFT's files: what a run leaves, and what others made."""

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora import TARGETS, DoraLinear, LoraLinear, adapters
from model import HUB, UserError, as_stored, note, open_weights, publish, read_json, stored_names


def save_adapter(model, folder, base, task_type=None, head=True):
    """Write the adapters of `model` in PEFT's layout into `folder`, which appears whole or not at all.

    g is folded into B, so a file is plain LoRA whatever policy made it; scales stay in alpha_pattern, so that training
    can go on from it. Matrices without active components are left out. `base` is the base model's Hub id or path,
    `task_type` PEFT's ("SEQ_CLS", "CAUSAL_LM" or None); with `head` the parameters of `model.head` are written as
    modules_to_save, and those of a pooler that the base lacks.
    """
    tensors, rank_of, alpha_of, layers = {}, {}, {}, adapters(model)
    for stored in stored_names(model).values():
        names = [name.removesuffix(".weight") for name in stored]
        if layers.keys().isdisjoint(names):
            continue
        A, B, magnitude, scale = stack_factors([model.get_submodule(name) for name in names])
        if len(A):
            path = model.hf_name(names[0], module=True)
            rank_of[path], alpha_of[path] = len(A), scale * len(A)
            parts = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": magnitude}
            tensors |= {f"{path}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    whole, heads = [name for name, _ in model.head.named_parameters(prefix="head")], set()
    whole += [name for name in model.fresh if name.startswith("pooler.")]
    for name in whole if head else []:
        path = model.hf_name(name, module=True)
        heads.add("pooler" if name.startswith("pooler.") else path.split(".")[0])
        tensors[path] = model.get_parameter(name).detach()
    r, alpha = max(rank_of.values(), default=1), max(alpha_of.values(), default=1)
    config = {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": str(base), "inference_mode": True,
        "r": r, "lora_alpha": alpha, "lora_dropout": max((layer.dropout for layer in layers.values()), default=0.0),
        "bias": "none", "fan_in_fan_out": model.family == "gpt2",  # PEFT's word for GPT-2's transposed matrices
        "use_rslora": False, "use_dora": any("magnitude" in key for key in tensors), "init_lora_weights": True,
        "target_modules": sorted(rank_of),
        "rank_pattern": {path: rank for path, rank in rank_of.items() if rank != r},
        "alpha_pattern": {path: own for path, own in alpha_of.items() if own != alpha},
        "modules_to_save": sorted(heads) or None,
    }
    tensors = {f"base_model.model.{path}": tensor.contiguous().cpu() for path, tensor in tensors.items()}
    labels = {"labels": json.dumps(model.labels)} if heads and model.labels else {}
    with publish(Path(folder)) as part:
        one = labels or {"format": "pt"}  # safetensors writes several entries in any order
        save_file(tensors, part / "adapter_model.safetensors", metadata=one)
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def stack_factors(layers):
    """(A, B, DoRA's lengths or None, scale) of one adapter that does what those of `layers`, one below the other, do.

    They are several for GPT-2's c_attn alone. Each keeps its own components: the A are stacked, the B stand along the
    diagonal. A plain layer has none.
    """
    first = next(layer for layer in layers if isinstance(layer, LoraLinear))
    dora, As, Bs, lengths = first.magnitude is not None, [], [], []
    for layer in layers:
        if isinstance(layer, LoraLinear):
            A, B = layer.factors()
            B, length = B * (layer.scale / (first.scale or 1)), layer.magnitude
        else:
            A, B = first.A.new_zeros(0, layer.in_features), first.B.new_zeros(layer.out_features, 0)
            length = torch.linalg.vector_norm(layer.weight, dim=1, dtype=torch.float32) if dora else None
        As, Bs, lengths = [*As, A], [*Bs, B], [*lengths, length]
    return torch.cat(As), torch.block_diag(*Bs), torch.cat(lengths).detach() if dora else None, first.scale


def load_adapter(model, folder, name=None):
    """Attach the LoRA adapters (and the trained head) stored in PEFT's layout in `folder`; returns {name: layer}.

    The tensors say which matrices have an adapter and of what rank; alpha_pattern, rsLoRA, DoRA, dropout and a head or
    pooler in modules_to_save are read. LoRA on a pooler or a classification head is merged there. Raises UserError for
    a file that is missing, damaged, does not fit the model, or uses what this project does not have. `name` is the
    model's: where the adapter names another, a note says so.
    """
    (config, tensors), file = read_adapter(folder), Path(folder) / "adapter_model.safetensors"
    meant = Path(str(config.get("base_model_name_or_path", name))).name
    if name and meant != Path(HUB.get(name, name)).name:
        note(f"{folder}: an adapter for {meant!r}, put on {name}")
    top = ("head.", "pooler.") if model.head_kind != "lm" else ()  # a language model's head stays as it is
    kinds = tuple(f".{kind}.weight" for kind in TARGETS)
    names = stored_names(model, every_spelling=True)
    if model.tied:
        names["lm_head.weight"] = ["embed.weight"]
    found, layers, changed = {}, {}, set()
    for key, tensor in tensors.items():
        path = re.sub(r"_orig_mod\.|(^|(?<=\.))(default|modules_to_save|base_layer)\.|\.default$", "", key)
        path = re.sub(r"^(base_model\.model\.)+", "", path)
        match = re.fullmatch(r"(.+)\.lora_(?:([AB])\.weight|(magnitude)_vector(?:\.weight)?)", path)
        ours = names.get(f"{match[1]}.weight" if match else path, [""])
        base = as_stored(model, ours) if ours[0] and not match else None
        of_outputs = re.fullmatch(r"head\.(out_proj\.)?(weight|bias)", ours[0]) and not (match and match[2] == "A")
        if of_outputs and tensor.dim():
            tensor = tensor[rows_of_head(model, config["labels"], len(tensor), file)]
        if match and (ours[0].startswith(top) or ours[0].endswith(kinds)):
            parts, part = found.setdefault((match[1], *ours), {}), match[2] or match[3]
            if part in parts:
                raise UserError(f"{file}: {key!r} is there under another name, too: save one adapter")
            parts[part] = tensor
        elif base is not None and ours[0].startswith(top) and base.shape == tensor.shape:
            base.copy_(tensor)  # a copy: the tensor may be a view of the file
            changed.add(ours[0])
        elif base is None or not torch.equal(base, tensor.to(base)):
            raise UserError(f"{file}: {key!r} {list(tensor.shape)}: not for this {model.family} model of "
                            f"{len(model.blocks)} blocks and its head: is it the adapter's base model, and its task? "
                            f"LoRA may be on {', '.join(TARGETS)}{', pooler and head' if top else ''}; for all else "
                            "merge the adapter with PEFT (merge_and_unload, save_pretrained) and name the result as "
                            "--model")
    untrained = [name for name in model.fresh if name.startswith("head.") and name not in changed]
    if untrained and top:
        raise UserError(f"{file}: no {model.hf_name(untrained[0])} in it, and the base model has none; the adapter was "
                        "saved without its trained head")
    for (path, *stored), parts in found.items():
        layers |= layers_of(model, path, [name.removesuffix(".weight") for name in stored], parts, config, file)
    for name in [name for name in layers if not name.startswith("blocks.")]:  # the policies give rank to blocks alone
        layers.pop(name).merge()
        changed.add(f"{name}.weight")
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    if any(name.startswith("pooler.") for name in changed):  # no longer the base's: saved with the adapter from now on
        model.fresh += [name for name in ("pooler.weight", "pooler.bias") if name not in model.fresh]
    if not layers and config.get("target_modules") != []:  # of a run in which nothing moved there are none
        raise UserError(f"{file}: holds no LoRA tensors for this {model.family} model")
    return layers


def layers_of(model, path, names, parts, config, file):
    """The layers, {name: LoraLinear}, not yet in place, of the matrices `names`, one below the other, from tensors.

    `path` is the file's name of what they are together.
    """
    linears = [model.get_submodule(name) for name in names]
    if any(isinstance(linear, LoraLinear) for linear in linears):
        raise UserError(f"{file}: {path} has an adapter already: lora.detach it first")
    rows, n_in = [linear.out_features for linear in linears], linears[0].in_features
    shapes, n_out = {part: tuple(tensor.shape) for part, tensor in parts.items()}, sum(rows)
    rank, dora = next(iter(shapes.get("A", ())), 0), config["use_dora"]
    expected = {"A": (rank, n_in), "B": (n_out, rank)} | ({"magnitude": (n_out,)} if dora else {})
    if rank == 0 or shapes != expected:
        raise UserError(f"{file}: {path} has {shapes}; this one needs lora_A (r, {n_in}) and lora_B ({n_out}, r), "
                        f"and needs a lora_magnitude_vector ({n_out}) if use_dora is set, and only then")
    patterns = [pattern for pattern in config["alpha_pattern"] if re.match(anchored(pattern), path)]
    alpha = config["alpha_pattern"][patterns[0]] if patterns else config["lora_alpha"]  # the first wins
    scale, layers = alpha / (math.sqrt(rank) if config["use_rslora"] else rank), {}
    shared = len(names) > 1 and not dora and parts["B"].any()
    for i, (name, linear, B) in enumerate(zip(names, linears, parts["B"].split(rows))):
        used = [k for k in range(rank) if not shared or B[:, k].any()]  # the others are another matrix's
        if not used:
            continue
        layer = layers[name] = (DoraLinear if dora else LoraLinear)(linear, len(used), scale, config["lora_dropout"])
        layer.A.data.copy_(parts["A"][used])
        layer.B.data.copy_(B[:, used])
        if dora:
            layer.magnitude.data.copy_(parts["magnitude"].split(rows)[i])
    return layers


def anchored(pattern):
    """PEFT's rule: a pattern is a regular expression that matches the end of a module's path."""
    return rf"(.*\.)?({pattern})$"


# keys of adapter_config.json that are read, or change nothing that is computed from the tensors
PLAIN_KEYS = ("peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r "
              "target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save "
              "init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core "
              "loftq_config eva_config corda_config lora_ga_config use_dora qalora_group_size runtime_config "
              "ensure_weight_tying").split()


def read_adapter(folder):
    """Settings (PEFT's defaults where they are unset) and tensors of an adapter; errors as in `load_adapter`."""
    file, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    for path in (file, weights):
        if not path.is_file():
            raise UserError(f"{path}: not found; an adapter is a folder with adapter_config.json and "
                            "adapter_model.safetensors (a .bin is refused, since unpickling runs code: to convert it, "
                            "load it with PEFT where you trust it and call save_pretrained)")
    config = {"lora_alpha": 8, "lora_dropout": 0.0, "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
              "peft_type": None, "bias": "none", "init_lora_weights": True}
    config |= {key: value for key, value in read_json(file).items() if value is not None}
    start = config["init_lora_weights"]  # pissa, olora, corda, loftq ... also change the base's weights
    other = [key for key, value in config.items() if value and key not in PLAIN_KEYS]
    other += [f"{key} {config[key]}" for key, only in (("peft_type", "LORA"), ("bias", "none")) if config[key] != only]
    if start not in (True, False, "gaussian", "orthogonal", "eva"):
        other.append(f"init_lora_weights {start!r} (save_pretrained converts it to plain LoRA with "
                     "path_initial_model_for_weight_conversion)")
    if other:
        raise UserError(f"{file}: {', '.join(other)}: not supported, only plain LoRA, rsLoRA and DoRA are")
    try:
        numbers = [config["lora_alpha"], config["lora_dropout"], *config["alpha_pattern"].values()]
        if not all(type(n) in (int, float) and abs(n) < 1e9 for n in numbers) or not 0 <= numbers[1] < 1:
            raise ValueError(numbers)
        for pattern in config["alpha_pattern"]:
            re.compile(anchored(pattern))
    except (AttributeError, ValueError, re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: {error}: lora_alpha and lora_dropout must be numbers, the latter from 0 to below 1, "
                        "and alpha_pattern {regular expression: number}") from None
    with open_weights(weights) as opened:
        try:
            config["labels"] = [str(label) for label in json.loads((opened.metadata() or {}).get("labels", "[]"))]
        except (ValueError, TypeError) as error:
            raise UserError(f"{weights}: its metadata's labels are no list ({error}): save it again") from None
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    whole = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if whole:
        raise UserError(f"{weights}: {whole[0]!r} is {tensors[whole[0]].dtype}, not float: save it in float32")
    return config, tensors


def rows_of_head(model, labels, count, file):
    """Which of the `count` rows of an adapter's head are the model's outputs.

    `labels` are those of its rows, in order, if this project wrote it; else it is taken to have the base model's rows,
    or if that has others those of the data, which is said.
    """
    wanted = list(model.labels)
    if not wanted:
        return list(range(count))
    if not labels:
        rows, remark = model.head_rows or [count], model.head_remark
        if max(rows) >= count:
            rows, remark = list(range(count)), f"its rows have no names: taken to be {', '.join(wanted)} in this order"
        if remark:
            note(f"{file}: the adapter's head: {remark}")
        return rows
    if not set(wanted) <= set(labels):
        raise UserError(f"{file}: its head tells {', '.join(labels)} apart, the task's labels are {', '.join(wanted)}: "
                        "name the task that it was trained on")
    return [labels.index(label) for label in wanted]
