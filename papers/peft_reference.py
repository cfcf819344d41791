"""Fine-tune with transformers + PEFT alone, to compare a run of train.py with.

    python papers/peft_reference.py --model FOLDER --task sst2 --data FOLDER --limit-train 6000 --seed 0

Model, tokenizer, adapters, loss, shuffling and padding are transformers' and PEFT's own; only the rows come from data.py.
The last line on stdout is one JSON object like train.py's.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from eval import METRICS

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("--model", required=True)
parser.add_argument("--task", required=True)
parser.add_argument("--data", required=True)
for flag, kind, default in (("seed", int, 0), ("rank", int, 8), ("alpha", float, 16), ("lr", float, 2e-3), ("epochs", int, 2),
                            ("batch-size", int, 32), ("weight-decay", float, 0.1), ("warmup", float, 0.06),
                            ("dropout", float, 0.1), ("max-length", int, 512), ("limit-train", int, 0)):
    parser.add_argument("--" + flag, type=kind, default=default)
parser.add_argument("--method", choices=("lora", "adalora"), default="lora")
s = parser.parse_args()

torch.manual_seed(s.seed)
task = data.find_task(s.task, s.data)
train, dev = data.read(task, s.data, "train", s.limit_train), data.read(task, s.data, "dev")
tokenizer = AutoTokenizer.from_pretrained(s.model)
model = AutoModelForSequenceClassification.from_pretrained(s.model, num_labels=len(task.labels) or 1)
if task.kind == "regress":  # as train.py: from 0 the run is lost while the mean is learned
    model.classifier.bias.data.fill_(np.mean([row["label"] for row in train]))
steps = s.epochs * -(-len(train) // s.batch_size)
options = dict(task_type="SEQ_CLS", lora_alpha=s.alpha, lora_dropout=s.dropout, target_modules=["query", "value"])
if s.method == "adalora":  # train.py's schedule
    config = AdaLoraConfig(init_r=round(1.5 * s.rank), target_r=s.rank, tinit=round(0.1 * steps), tfinal=round(0.5 * steps),
                           deltaT=10, beta1=0.85, beta2=0.85, orth_reg_weight=0.5, total_step=steps, **options)
else:
    config = LoraConfig(r=s.rank, **options)
model = get_peft_model(model, config)


def batch(rows):
    pairs = [row["pair"] for row in rows] if "pair" in rows[0] else None
    inputs = tokenizer([row["text"] for row in rows], pairs, padding=True, truncation=True, max_length=s.max_length,
                       return_tensors="pt")
    return inputs, torch.tensor([row["label"] for row in rows])


def measure():
    model.eval()
    outputs = []
    with torch.no_grad():
        for i in range(0, len(dev), 64):
            outputs.append(model(**batch(dev[i:i + 64])[0]).logits)
    model.train()
    outputs = torch.cat(outputs)
    outputs = (outputs.squeeze(-1) if task.kind == "regress" else outputs.argmax(-1)).numpy()
    return {name: METRICS[name](outputs, np.array([row["label"] for row in dev])) for name in task.metrics}


params = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(params, lr=s.lr, weight_decay=s.weight_decay)
scheduler = get_linear_schedule_with_warmup(optimizer, int(np.ceil(s.warmup * steps)), steps)
bar = tqdm(total=steps, mininterval=10)
started = time.time()
model.train()
for epoch in range(s.epochs):
    order = torch.randperm(len(train)).tolist()
    for i in range(0, len(order), s.batch_size):
        inputs, labels = batch([train[j] for j in order[i:i + s.batch_size]])
        model(**inputs, labels=labels).loss.backward()  # AdaLoRA's orthogonality included
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        scheduler.step()
        if s.method == "adalora":
            model.base_model.update_and_allocate(bar.n + 1)
        optimizer.zero_grad()
        bar.update()
print(json.dumps({"task": s.task, "method": f"{s.method} (PEFT)", "seed": s.seed, **measure(), "steps": steps,
                  "seconds": round(time.time() - started, 1)}))
