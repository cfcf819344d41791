"""Adapters between this project and PEFT, in both directions: every policy, every family, continued training."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import FAMILIES, batch, losses, pair, pass_of, peft, peft_layers, same_in_peft
from test_model import saved, transformers
from test_train import lines, main
from tiny import POLICIES, refused, settings, training_of

import allocators
import eval as evaluation
import lora
import model as models
import train
from extras import adapter_files


@pytest.mark.parametrize("method, family", [
    *((name, "llama") for name in allocators.METHODS if name not in ("full", "bitfit")),
    *((name, family) for name in ("adalora", "lelora") for family in FAMILIES if family != "llama")])
def test_peft_computes_what_every_policy_trained(method, family, tmp_path, monkeypatch):
    """Logits of the trained model = PEFT's with the saved adapter = those after merging there = those loaded here."""
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))
    _, model = pair(family, tmp_path / "base")
    torch.manual_seed(0)
    s = settings(**POLICIES, method=method, targets=FAMILIES[family].targets, dropout=0.1)
    allocator, generator = allocators.METHODS[method](model, s, 12), torch.Generator().manual_seed(1)
    _, inputs, labels = batch(family, generator)
    plain = model(**inputs)
    allocator.validation_loss = lambda: losses(family, model(**inputs).detach(), inputs, labels)
    training = training_of(allocator, "lm" if family == "llama" else "classify")
    for step in range(1, 13):
        training.step(step, [pass_of(family, *batch(family, generator)[1:])])
    for name, layer in lora.adapters(model).items():  # the updates of 12 steps are small
        if method == "adalora":
            layer.g.data.mul_(30.0)
        elif method == "lelora":
            layer.B.data[:, allocator.active[allocator.names.index(name)] > 0] *= 1.5
        else:
            layer.B.data.mul_(10.0)
    assert (model.eval()(**inputs) - plain).abs().max() > 1e-2  # there is something to compare
    active = {name: int(layer.let_through().sum()) for name, layer in lora.adapters(model).items()}
    ranks = same_in_peft(model, tmp_path / "base", tmp_path / "adapter", family)
    if method == "lelora":  # the exact difference has twice the rank of what moved, at most the matrix's own
        assert all(rank <= min(model.get_submodule(name).weight.shape) for name, rank in ranks.items())
    else:
        assert ranks == {name: rank for name, rank in active.items() if rank}


def agree(model, theirs, family="bert"):
    """Both give the same logits."""
    their_inputs, inputs, _ = batch(family, torch.Generator().manual_seed(5))
    torch.testing.assert_close(model.eval()(**inputs), theirs.eval()(**their_inputs).logits, rtol=0, atol=1e-4)


def test_a_pooler_that_the_base_lacks_goes_with_the_adapter(tmp_path):
    """PEFT would otherwise put the adapter on transformers' own random pooler."""
    saved("bert", tmp_path / "base", "MaskedLM", **FAMILIES["bert"].changes)
    model, again = (models.load(tmp_path / "base", "classify", 3, seed=seed) for seed in (5, 6))
    assert "pooler.weight" in model.fresh
    for layer in lora.attach(model, {"blocks.0.query": 2}, alpha=4).values():
        layer.B.data.normal_()
    adapter_files.save_adapter(model, tmp_path / "adapter", "base", "SEQ_CLS")
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    adapter_files.load_adapter(again, tmp_path / "adapter")
    agree(model, loaded)
    agree(again, loaded)


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2s_query_key_and_value_are_one_matrix_of_peft(dora, tmp_path):
    """Adapters on them apart, of different ranks and scales, are one on c_attn, which gives them back."""
    theirs, tokens = saved("gpt2", tmp_path / "base"), torch.randint(60, (3, 9))
    model, again = models.load(tmp_path / "base"), models.load(tmp_path / "base")
    ranks = {"blocks.0.query": 2, "blocks.0.value": 3, "blocks.1.query": 1, "blocks.1.key": 2, "blocks.1.value": 1,
             "blocks.1.out": 2, "blocks.2.up": 4, "blocks.2.down": 3}
    for layer in lora.attach(model, ranks, alpha=6, scaling="own", dora=dora).values():
        layer.B.data.normal_(std=0.2)
    adapter_files.save_adapter(model, tmp_path / "adapter", "base", "CAUSAL_LM")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    layers = adapter_files.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        for logits in (loaded(tokens).logits, again(tokens)):
            torch.testing.assert_close(logits, model(tokens), rtol=0, atol=1e-4)
    assert dora or {name: layer.rank for name, layer in layers.items()} == ranks


@pytest.mark.parametrize("options", [dict(target_modules="all-linear", use_rslora=True, alpha_pattern={"c_attn": 3}),
                                     dict(target_modules=["c_attn", "c_fc"], use_dora=True)])
def test_gpt2_adapters_made_by_peft(options, tmp_path):
    theirs, tokens = saved("gpt2", tmp_path / "base"), torch.randint(60, (3, 9))
    wrapped = made_by_peft(theirs, tmp_path / "adapter", dict(task_type="CAUSAL_LM", **options)).eval()
    model = models.load(tmp_path / "base")
    layers = adapter_files.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(tokens), wrapped(tokens).logits, rtol=0, atol=1e-4)
    assert {"blocks.0.query", "blocks.0.key", "blocks.2.value"} <= layers.keys()


MADE = {"regex targets, normal start": dict(target_modules=r".*layer\.[02]\.attention\.self\.(query|value)",
                                        init_lora_weights="gaussian"),
    "patterns": dict(target_modules=["query", "key", "output.dense"], rank_pattern={r"layer\.1\..*query": 2, "key": 5},
                     alpha_pattern={"0.attention.self.query": 3, "output.dense": 11}),
    "rsLoRA with patterns": dict(target_modules=["query", "value"], use_rslora=True, rank_pattern={"value": 3},
                                 alpha_pattern={"value": 7}),
    "some layers, no start": dict(target_modules=["query", "value"], layers_to_transform=[0, 2], layers_pattern="layer",
                                  init_lora_weights=False),
    "excluded, orthogonal, dropout": dict(target_modules=["query", "value"], exclude_modules=r".*layer\.1\..*",
                                          init_lora_weights="orthogonal", lora_dropout=0.4),
    "head named": dict(target_modules=["value"], task_type=None, modules_to_save=["classifier"]),
    "all-linear": dict(target_modules="all-linear"),
    "pooler and DoRA": dict(target_modules=["pooler.dense", "value", "output.dense"], use_dora=True),
    "pooler whole": dict(target_modules=["query"], modules_to_save=["pooler", "classifier"]),
    "pooler and head": dict(target_modules=["query", "classifier"], modules_to_save=["pooler"], task_type=None)}


def made_by_peft(theirs, folder, options):
    """PEFT's model with a random adapter and head, saved into `folder`."""
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**dict(task_type="SEQ_CLS", r=4, lora_alpha=6) | options))
    torch.manual_seed(3)
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            p.data.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    return wrapped


def bert_and_pefts(folder, **options):
    """Our BERT, and PEFT's with the adapter of these options, saved in folder / "adapter"."""
    theirs, model = pair("bert", folder / "base")
    return model, made_by_peft(theirs, folder / "adapter", dict(target_modules=["query"]) | options)


@pytest.mark.parametrize("family, made", [*(("bert", made) for made in MADE), ("roberta", "patterns"),
                                          ("roberta", "all-linear"), ("roberta", "head named")])
def test_adapters_made_by_peft(family, made, tmp_path):
    theirs, model = pair(family, tmp_path / "base")
    wrapped = made_by_peft(theirs, tmp_path / "adapter", MADE[made])
    layers = adapter_files.load_adapter(model, tmp_path / "adapter")
    agree(model, wrapped, family)
    assert {name: (layer.rank, layer.dropout) for name, layer in layers.items()} == {
        name: (len(layer.lora_A.default.weight), MADE[made].get("lora_dropout", 0.0))
        for name, layer in peft_layers(wrapped, model).items()}
    same_in_peft(model, tmp_path / "base", tmp_path / "again", family)


def test_the_head_has_to_be_in_the_adapter_or_its_base(tmp_path):
    _, wrapped = bert_and_pefts(tmp_path, task_type=None)
    wrapped.merge_and_unload().bert.save_pretrained(tmp_path / "bare")
    with refused("no classifier.weight in it"):
        adapter_files.load_adapter(models.load(tmp_path / "bare", "classify", 3), tmp_path / "adapter")


UNSUPPORTED = {"bias": peft.LoraConfig(target_modules=["query"], bias="lora_only"),
    "lora_bias": peft.LoraConfig(target_modules=["query"], lora_bias=True),
    "pissa": peft.LoraConfig(target_modules=["query"], init_lora_weights="pissa"),
    "IA3": peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "velora_config": peft.LoraConfig(target_modules=["query"], velora_config={"num_groups": 4}),
    "word_embeddings": peft.LoraConfig(target_modules=["query", "word_embeddings"]),
    "LayerNorm": peft.LoraConfig(target_modules=["query"], modules_to_save=["LayerNorm"]),
    "lm_head": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])}


@pytest.mark.parametrize("name, family, options", [*((name, "bert", {}) for name in UNSUPPORTED if name != "lm_head"),
    *(("lm_head", "llama", dict(tie_word_embeddings=tied)) for tied in (True, False))])
def test_what_is_not_supported_is_one_line(name, family, options, tmp_path):
    wrapped = peft.get_peft_model(saved(family, tmp_path / "base", **options), UNSUPPORTED[name])
    for p in wrapped.parameters():
        p.data += 0.1 * p.requires_grad
    wrapped.save_pretrained(tmp_path / "adapter")
    with refused(f"{re.escape(str(tmp_path))}.*{name}"):
        adapter_files.load_adapter(models.load(tmp_path / "base"), tmp_path / "adapter")


SPELLINGS = {"no base_model": ("base_model.model.", ""), "from AutoModel": ("bert.", ""),
             "DDP and default": ("lora_A", "lora_A.default"), "compiled": ("bert.", "_orig_mod.bert."),
             "whole state": ("classifier.", "classifier.modules_to_save.default.")}


def add_to(adapter, tensors, rename=("", "")):
    """Put tensors into an adapter's file, and spell all names in it in another way."""
    file = adapter / "adapter_model.safetensors"
    save_file({name.replace(*rename): tensor for name, tensor in (load_file(file) | tensors).items()}, file)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_and_copies_of_the_base(spelling, tmp_path):
    """Tensors that equal the base's own, which PEFT saves with some tokenizers, are no reason to refuse."""
    model, wrapped = bert_and_pefts(tmp_path)
    embedding = {"base_model.model.bert.embeddings.word_embeddings.weight": model.embed.weight.detach().clone()}
    add_to(tmp_path / "adapter", embedding, SPELLINGS[spelling])
    adapter_files.load_adapter(model, tmp_path / "adapter")
    agree(model, wrapped)


def test_patterns_are_of_the_files_own_names(tmp_path):
    theirs, pixels = saved("vit", tmp_path / "base"), torch.randn(2, 3, 16, 16)
    options = dict(target_modules=["q_proj"], alpha_pattern={"q_proj": 32}, task_type=None)
    wrapped, file = made_by_peft(theirs, tmp_path / "adapter", options).eval(), tmp_path / "adapter/adapter_config.json"
    add_to(tmp_path / "adapter", {}, ("vit.layers", "vit.encoder.layer"))
    add_to(tmp_path / "adapter", {}, ("q_proj", "attention.query"))  # as transformers 4 called it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {"query": 32}}))
    adapter_files.load_adapter(model := models.load(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(model(pixels), wrapped(pixels).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("key, shape", [
    ("bert.embeddings.word_embeddings.weight", (60, 32)), ("bert.embeddings.word_embeddings.weight", (64, 32)),
    ("classifier.weight", (5, 32)), ("score.weight", (3, 32)),
    ("bert.encoder.layer.7.attention.self.query.lora_A.weight", (4, 32))])
def test_what_does_not_fit_is_one_line(key, shape, tmp_path):
    model, _ = bert_and_pefts(tmp_path)
    add_to(tmp_path / "adapter", {f"base_model.model.{key}": torch.ones(shape)})
    with refused(f"{re.escape(key)}.*3 blocks.*is it the adapter's base model, .* merge the adapter with PEFT"):
        adapter_files.load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("made, then", [
    ([], []), (["--dora"], ["--lora-plus-ratio", 2]), (["--init", "pissa"], ["--freeze-a"])])
def test_a_run_that_starts_from_an_adapter(made, then, tmp_path, capsys):
    """It starts at the adapter's score, keeps its ranks and places, improves, can be evaluated and resumed."""
    digits = "--limit-train 200 --limit-eval 100 --batch-size 32".split()  # of the embedded demo
    first = main(*digits, "--method", "empirical", "--targets", "query,down", "--epochs", 4, *made,
                 "--out", tmp_path / "first")
    adapter = tmp_path / "first" / "adapter"
    evaluation.main(["vit-digits", "--task", "digits-rot90", "--limit-eval", "100", "--adapter", str(adapter)])
    assert json.loads(capsys.readouterr().out)["accuracy"] == first["accuracy"]
    second = main(*digits, "--adapter", adapter, "--epochs", 6, "--out", tmp_path / "second", *then)
    assert second["before"]["accuracy"] == first["accuracy"] < second["accuracy"]
    ranks = [lines(tmp_path / run / "ranks.jsonl")[-1]["ranks"] for run in ("first", "second")]
    twice = 2 if "pissa" in made else 1  # the saved difference has twice the rank
    assert ranks[1] == {name: twice * rank for name, rank in ranks[0].items()}
    of_a = {"query": 0, "down": 0} if "--freeze-a" in then else {"query": 64, "down": 256}  # inputs; outputs are 64
    assert second["trainable_params"]["now"] == sum(
        rank * (64 + of_a[name.split(".")[-1]]) + 64 * ("--dora" in made) for name, rank in ranks[1].items())
    saved, _ = evaluation.read_run(tmp_path / "second")
    assert saved.targets == ["query", "down"] and saved.rank is None and saved.dora == ("--dora" in made)
    (tmp_path / "second" / "result.json").unlink()  # as if it had been killed after its last checkpoint
    train.main(["--resume", str(tmp_path / "second")])
    assert json.loads(capsys.readouterr().out)["accuracy"] == second["accuracy"]

