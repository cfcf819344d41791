"""Adapters between this project and PEFT, in both directions: every policy, every family, continued training."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import FAMILIES, batch, losses, pair, pass_of, peft, peft_layers, same_in_peft
from test_model import saved, transformers
from test_train import main
from tiny import POLICIES, refused, settings, training_of

import allocators
import eval as evaluation
import lora
import model as models
import train
from extras import adapter_files

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [name for name in allocators.METHODS if name not in ("full", "bitfit")])
def test_peft_computes_what_every_policy_trained(method, family, tmp_path, monkeypatch):
    """Logits of the trained model = PEFT's with the saved adapter = those after merge_and_unload = those loaded here."""
    monkeypatch.setenv("RANKS_CACHE", str(tmp_path / "cache"))
    _, model = pair(family, tmp_path / "base")
    torch.manual_seed(0)
    s = settings(**POLICIES, method=method, targets=FAMILIES[family].targets, dropout=0.1)
    allocator = allocators.METHODS[method](model, s, 12)
    generator = torch.Generator().manual_seed(1)
    _, inputs, labels = batch(family, generator)
    plain = model(**inputs)
    allocator.validation_loss = lambda: losses(family, model(**inputs).detach(), inputs, labels)
    training = training_of(allocator, "lm" if family == "llama" else "classify")
    for step in range(1, 13):
        training.step(step, [pass_of(family, *batch(family, generator)[1:])])
    for i, (name, layer) in enumerate(lora.adapters(model).items()):  # the updates of 12 steps are small
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
        assert method not in ("weightlora", "random") or len(ranks) == len(allocator.names) // 2


def agree(model, theirs, family="bert", tolerance=1e-4):
    """Both give the same logits."""
    their_inputs, inputs, _ = batch(family, torch.Generator().manual_seed(5))
    torch.testing.assert_close(model.eval()(**inputs), theirs.eval()(**their_inputs).logits, rtol=0, atol=tolerance)


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


@pytest.fixture
def gpt2(tmp_path):
    return saved("gpt2", tmp_path / "base"), torch.randint(60, (3, 9)), tmp_path


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2s_query_key_and_value_are_one_matrix_of_peft(dora, gpt2):
    """Adapters on them apart, of different ranks and scales, are one on c_attn, which gives them back."""
    theirs, tokens, folder = gpt2
    model, again = models.load(folder / "base"), models.load(folder / "base")
    ranks = {"blocks.0.query": 2, "blocks.0.value": 3, "blocks.1.query": 1, "blocks.1.key": 2, "blocks.1.value": 1,
             "blocks.1.out": 2, "blocks.2.up": 4, "blocks.2.down": 3}
    for layer in lora.attach(model, ranks, alpha=6, scaling="own", dora=dora).values():
        layer.B.data.normal_(std=0.2)
    adapter_files.save_adapter(model, folder / "adapter", "base", "CAUSAL_LM")
    loaded = peft.PeftModel.from_pretrained(theirs, folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens), rtol=0, atol=1e-4)
        layers = adapter_files.load_adapter(again, folder / "adapter")
        torch.testing.assert_close(again(tokens), model(tokens), rtol=0, atol=1e-4)
    assert dora or {name: layer.rank for name, layer in layers.items()} == ranks


@pytest.mark.parametrize("options", [
    dict(target_modules=["c_attn"]), dict(target_modules="all-linear", use_rslora=True, alpha_pattern={"c_attn": 3}),
    dict(target_modules=["c_attn", "c_fc"], use_dora=True)])
def test_gpt2_adapters_made_by_peft(options, gpt2):
    theirs, tokens, folder = gpt2
    wrapped = made_by_peft(theirs, folder / "adapter", dict(task_type="CAUSAL_LM", **options)).eval()
    model = models.load(folder / "base")
    layers = adapter_files.load_adapter(model, folder / "adapter")
    torch.testing.assert_close(model(tokens), wrapped(tokens).logits, rtol=0, atol=1e-4)
    assert {"blocks.0.query", "blocks.0.key", "blocks.2.value"} <= layers.keys()


# ---------------------------------------------------------------------------------------------- adapters that PEFT made

MADE = {
    "regex targets": dict(target_modules=r".*layer\.[02]\.attention\.self\.(query|value)"),
    "patterns": dict(target_modules=["query", "key", "output.dense"], rank_pattern={r"layer\.1\..*query": 2, "key": 5},
                     alpha_pattern={"0.attention.self.query": 3, "output.dense": 11}),
    "rsLoRA with patterns": dict(target_modules=["query", "value"], use_rslora=True, rank_pattern={"value": 3},
                                 alpha_pattern={"value": 7}),
    "some layers": dict(target_modules=["query", "value"], layers_to_transform=[0, 2], layers_pattern="layer"),
    "dropout": dict(target_modules=["query"], lora_dropout=0.4),
    "head named": dict(target_modules=["value"], task_type=None, modules_to_save=["classifier"]),
    "other starts": dict(target_modules=["key", "attention.output.dense"], init_lora_weights="gaussian"),
    "no start": dict(target_modules=["query"], init_lora_weights=False),
    "orthogonal": dict(target_modules=["query"], init_lora_weights="orthogonal"),
    "DoRA": dict(target_modules=["query", "output.dense"], use_dora=True),
    "excluded": dict(target_modules=["query", "value"], exclude_modules=r".*layer\.1\..*"),
    "all-linear": dict(target_modules="all-linear"),
    "pooler and DoRA": dict(target_modules=["pooler.dense", "value"], use_dora=True),
    "pooler whole": dict(target_modules=["query"], modules_to_save=["pooler", "classifier"]),
    "pooler and head": dict(target_modules=["query", "classifier"], modules_to_save=["pooler"], task_type=None),
}


def made_by_peft(theirs, folder, options):
    """PEFT's model with a random adapter and head, saved into `folder`."""
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**dict(task_type="SEQ_CLS", r=4, lora_alpha=6) | options))
    torch.manual_seed(3)
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            p.data.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.fixture
def bert(tmp_path):
    """Our model, and a function that gives PEFT's with the adapter of these options, saved in tmp_path / "adapter"."""
    theirs, model = pair("bert", tmp_path / "base")
    return model, lambda **options: made_by_peft(theirs, tmp_path / "adapter", dict(target_modules=["query"]) | options)


@pytest.mark.parametrize("family, made", [(family, made) for made in MADE for family in ("bert", "roberta")
                                          if family == "bert" or "pooler" not in made])
def test_adapters_made_by_peft(family, made, tmp_path):
    """What is on the pooler or the head is merged there; and all is saved again."""
    theirs, model = pair(family, tmp_path / "base")
    wrapped = made_by_peft(theirs, tmp_path / "adapter", MADE[made])
    layers = adapter_files.load_adapter(model, tmp_path / "adapter")
    agree(model, wrapped, family)
    assert {name: (layer.rank, layer.dropout) for name, layer in layers.items()} == {
        name: (len(layer.lora_A.default.weight), MADE[made].get("lora_dropout", 0.0))
        for name, layer in peft_layers(wrapped, model).items()}
    same_in_peft(model, tmp_path / "base", tmp_path / "again", family)


def test_the_head_has_to_be_in_the_adapter_or_its_base(bert, tmp_path):
    _, adapter = bert
    adapter(task_type=None).merge_and_unload().bert.save_pretrained(tmp_path / "bare")
    with refused("no classifier.weight in it"):
        adapter_files.load_adapter(models.load(tmp_path / "bare", "classify", 3), tmp_path / "adapter")


UNSUPPORTED = {
    "bias": peft.LoraConfig(target_modules=["query"], bias="lora_only"),
    "lora_bias": peft.LoraConfig(target_modules=["query"], lora_bias=True),
    "pissa": peft.LoraConfig(target_modules=["query"], init_lora_weights="pissa"),
    "olora": peft.LoraConfig(target_modules=["query"], init_lora_weights="olora"),
    "IA3": peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
    "LOHA": peft.LoHaConfig(target_modules=["query"]),
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "velora_config": peft.LoraConfig(target_modules=["query"], velora_config={"num_groups": 4}),
    "word_embeddings": peft.LoraConfig(target_modules=["query", "word_embeddings"]),
    "LayerNorm": peft.LoraConfig(target_modules=["query"], modules_to_save=["LayerNorm"]),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_one_line(name, tmp_path):
    theirs, model = pair("bert", tmp_path / "base")
    wrapped = peft.get_peft_model(theirs, UNSUPPORTED[name])
    for p in wrapped.parameters():
        p.data += 0.1 * p.requires_grad
    wrapped.save_pretrained(tmp_path / "adapter")
    with refused(f"{re.escape(str(tmp_path))}.*{name}"):
        adapter_files.load_adapter(model, tmp_path / "adapter")


SPELLINGS = {"no base_model": ("base_model.model.", ""), "from AutoModel": ("bert.", ""), "DDP and default": ("lora_A", "lora_A.default"),
             "compiled": ("bert.", "_orig_mod.bert."), "whole state": ("classifier.", "classifier.modules_to_save.default.")}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_and_copies_of_the_base(spelling, bert, tmp_path):
    """Tensors that equal the base's own, which PEFT saves with some tokenizers, are no reason to refuse."""
    model, adapter = bert
    wrapped, file = adapter(), tmp_path / "adapter" / "adapter_model.safetensors"
    embedding = {"base_model.model.bert.embeddings.word_embeddings.weight": model.embed.weight.detach().clone()}
    tensors = load_file(file) | embedding
    save_file({name.replace(*SPELLINGS[spelling]): tensor for name, tensor in tensors.items()}, file)
    adapter_files.load_adapter(model, tmp_path / "adapter")
    agree(model, wrapped)


@pytest.mark.parametrize("key, shape", [
    ("bert.embeddings.word_embeddings.weight", (60, 32)), ("bert.embeddings.word_embeddings.weight", (64, 32)),
    ("classifier.weight", (5, 32)), ("score.weight", (3, 32)), ("bert.embeddings.word_embeddings.lora_embedding_A", (4, 60)),
    ("bert.encoder.layer.7.attention.self.query.lora_A.weight", (4, 32))])
def test_what_does_not_fit_is_one_line(key, shape, bert, tmp_path):
    model, adapter = bert
    adapter()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{key}": torch.ones(shape)}, file)
    with refused(f"{re.escape(key)}.*3 blocks.*is it the adapter's base model, .* merge the adapter with PEFT"):
        adapter_files.load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_models_head_is_not_replaced(tied, tmp_path):
    theirs = saved("llama", tmp_path / "base", tie_word_embeddings=tied)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    wrapped.base_model.model.lm_head.modules_to_save.default.weight.data += 1
    wrapped.save_pretrained(tmp_path / "adapter")
    with refused("lm_head"):
        adapter_files.load_adapter(models.load(tmp_path / "base"), tmp_path / "adapter")


# ---------------------------------------------------------------------------------------------- command lines

DIGITS = ["--limit-train", 200, "--limit-eval", 100, "--batch-size", 32]  # of the embedded demo


@pytest.mark.parametrize("made, then", [([], []), (["--dora"], ["--lora-plus-ratio", 2]), (["--init", "pissa"], ["--freeze-a"])])
def test_a_run_that_starts_from_an_adapter(made, then, tmp_path, capsys):
    """It starts at the adapter's score, keeps its ranks and places, improves, and can be evaluated, continued, resumed."""
    first = main(*DIGITS, "--method", "empirical", "--targets", "query,down", "--epochs", 4, "--out", tmp_path / "first",
                 *made)
    evaluation.main(["vit-digits", "--task", "digits-rot90", "--limit-eval", "100", "--adapter",
                     str(tmp_path / "first" / "adapter")])
    assert json.loads(capsys.readouterr().out)["accuracy"] == first["accuracy"]
    second = main(*DIGITS, "--adapter", tmp_path / "first" / "adapter", "--epochs", 6, "--out", tmp_path / "second", *then)
    assert second["before"]["accuracy"] == first["accuracy"] < second["accuracy"]
    assert evaluation.evaluate_run(tmp_path / "second")["accuracy"] == second["accuracy"]
    ranks = [json.loads((tmp_path / run / "ranks.jsonl").read_text().splitlines()[-1])["ranks"] for run in ("first", "second")]
    twice = 2 if "pissa" in made else 1  # the saved difference has twice the rank
    assert ranks[1] == {name: twice * rank for name, rank in ranks[0].items()}
    of_a = {"query": 64, "down": 256} if "--freeze-a" not in then else {"query": 0, "down": 0}  # inputs; all outputs are 64
    assert second["trainable_params"]["now"] == sum(
        rank * (64 + of_a[name.split(".")[-1]]) + 64 * ("--dora" in made) for name, rank in ranks[1].items())
    saved = json.loads((tmp_path / "second" / "run.json").read_text())["settings"]
    assert saved["targets"] == ["query", "down"] and saved["rank"] is None and saved["dora"] == ("--dora" in made)
    (tmp_path / "second" / "result.json").unlink()  # as if it had been killed after its last checkpoint
    train.main(["--resume", str(tmp_path / "second")])
    assert json.loads(capsys.readouterr().out)["accuracy"] == second["accuracy"]


@pytest.mark.parametrize("argv, expected", [
    (["--method", "lalora"], "--method"), (["--method", "full"], "--method"), (["--rank", "4"], "--rank"),
    (["--targets", "key"], "--targets"), (["--dropout", "0"], "--dropout"), (["--scaling", "rslora"], "--scaling"),
    (["--init", "pissa"], "--init"), (["--dora"], "--dora"), ([], "adapter_config.json")])
def test_adapter_goes_with_plain_lora_alone(argv, expected, tmp_path):
    with refused(expected):
        main(*argv, "--adapter", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
