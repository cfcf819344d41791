"""PEFT's adapters on transformers' models, as their users train them: what bench.py has beside its own methods."""

import peft
import torch
import transformers

import lora
from extras.cards import AUTO
from model import UserError, compile_blocks


def build(s, base, kind):
    """transformers' model on the weights of `base`, with PEFT's adapters as the settings say.

    Each of its blocks is compiled on its own, as ours are, if `s.compile` says so. Returns (model, its trained
    parameters, loss(inputs, labels), the mean loss, and after(step), PEFT's allocation, or None), what bench.Contender
    takes. Raises UserError for GPT-2.
    """
    if base.family == "gpt2":
        raise UserError("PEFT adapts GPT-2's query, key and value as one matrix: nothing here compares with it")
    dtype = getattr(torch, s.dtype)
    raw = {k: v for k, v in base.config.raw.items() if k not in ("model_type", "num_labels", "id2label", "label2id")}
    config = transformers.AutoConfig.for_model(base.family, **raw)
    if kind != "lm":
        config.num_labels = base.config.num_labels
    with torch.device(s.device):
        kernel = "eager" if base.family == "deberta-v2" else "sdpa"  # transformers has no other for the former
        auto = getattr(transformers, AUTO[kind][0])
        theirs = auto.from_config(config, attn_implementation=kernel, dtype=dtype)
    weights = {base.hf_name(name, module=True): base.get_parameter(name).data.to(dtype) for name in base.plain_names}
    unknown = theirs.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    assert not unknown, f"transformers' model has no {unknown[0]}"
    theirs.tie_weights()
    options = dict(lora_alpha=s.alpha, lora_dropout=s.dropout,
                   task_type={"lm": "CAUSAL_LM", "classify": "SEQ_CLS"}.get(kind),
                   modules_to_save=list(base.head_names.values()) if kind != "lm" else None,
                   target_modules=[base.hf_name(name, module=True) for name, _, _ in lora.sites(base, s.targets)])
    if s.method == "adalora":
        chosen = peft.AdaLoraConfig(init_r=round(s.adalora_init_ratio * s.rank), target_r=s.rank, tinit=1, tfinal=500,
                                    deltaT=s.adalora_delta_t, total_step=1000, **options)
    else:
        chosen = peft.LoraConfig(r=s.rank, use_dora=s.dora, **options)
    theirs.config.use_cache = False  # keys and values are for generation
    theirs = peft.get_peft_model(theirs, chosen)
    if s.compile in ("on", "graphs"):
        blocks = max((m for m in theirs.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        compile_blocks(blocks, s.compile == "graphs")

    def loss(inputs, labels):
        if kind == "image":
            return theirs(pixel_values=inputs["pixels"].to(dtype), labels=labels).loss
        if kind == "lm":
            labels_at = torch.full_like(inputs["tokens"], -100)
            labels_at.view(-1)[inputs["positions"] + 1] = labels
            labels = labels_at
        return theirs(input_ids=inputs["tokens"], attention_mask=inputs["mask"].long(), labels=labels).loss

    after = theirs.base_model.update_and_allocate if s.method == "adalora" else None
    return theirs, [p for p in theirs.parameters() if p.requires_grad], loss, after
