"""Latency of generation without adapters, with them, and merged (La-LoRA, Table 13), one sequence at a time.

    python papers/inference.py --model llama2-7b --device cuda
    python papers/inference.py --layers 2                        # its first 2 blocks, for a CPU

Uniform LoRA as it is trained, with half the rank as a policy may leave it, and merged, beside the base model, on random
weights. The table goes to stdout, whose last line is one JSON object.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench  # noqa: E402
import lora  # noqa: E402
import model as models  # noqa: E402
from extras.flags import parser_of, run_program, setting  # noqa: E402
from model import UserError  # noqa: E402

VARIANTS = ("base", "unmerged", "unmerged, half the rank", "merged")


@dataclass
class Latency(bench.Bench):
    """What to measure, as in bench.py; --methods and --modes play no part."""

    model: str = setting("llama2-7b", "what", "short name, Hub id or folder of a decoder")
    new_tokens: int = setting(32, "what", "tokens to generate", low=3)


def inference(b):
    """Time to first token, inter-token latency and tokens per second of each variant, interleaved."""
    base, kind = bench.base_model(b)
    if kind != "lm":
        raise UserError(f"--model {b.model}: inference generates text: choose a decoder, as llama2-7b")
    runners = {name: variant(b, base, name) for name in VARIANTS}
    times = {name: [] for name in VARIANTS}
    for _ in tqdm(range(b.warmup + b.rounds), "generating", file=sys.stderr):
        for name, model in runners.items():
            times[name].append(generate(b, model))
    rows = []
    for name, model in runners.items():
        first, between = (statistics.median(t[i] for t in times[name][b.warmup:]) for i in (0, 1))
        rows.append({"variant": name, "ttft_ms": 1e3 * first, "itl_ms": 1e3 * between,
                     "tokens_per_second": b.new_tokens / (first + (b.new_tokens - 1) * between),
                     "weights_mb": sum(p.nbytes for p in model.parameters()) / 2**20})
    return rows


def variant(b, base, name):
    """The model as `VARIANTS` says, in evaluation mode; the adapters' B is random, so that merging does something."""
    model = bench.own_copy(base).eval()
    if name == "base":
        return model
    rank = max(1, b.rank // 2) if "half" in name else b.rank
    ranks = {site: rank for site, _, _ in lora.sites(model, b.targets)}
    for layer in lora.attach(model, ranks, 2 * b.rank, nominal=b.rank).values():
        layer.B.data.normal_(std=0.02)
        if name == "merged":
            layer.linear.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
            layer.merge()
    if name == "merged":
        for site in ranks:
            lora.detach(model, site)
    return model


def generate(b, model):
    """Seconds to the first token, and the median between the following ones, of one greedy continuation."""
    generator = torch.Generator().manual_seed(b.seed)
    prompt = torch.randint(5, model.config.vocab_size, (1, b.length), generator=generator).to(b.device)
    at = [bench.clock(b.device)]
    hook = model.register_forward_hook(lambda *_: at.append(bench.clock(b.device)))  # a token needs one
    models.generate(model, prompt, None, b.new_tokens, None, 0)
    hook.remove()
    return at[1] - at[0], statistics.median(y - x for x, y in zip(at[1:], at[2:]))


def main(argv=None):
    """Parse the command line, measure, print the table and one line of JSON."""
    b = Latency(**vars(parser_of(Latency, __doc__.split("\n\n")[0]).parse_args(argv)))
    bench.settle(b)
    bench.report("inference", b, inference(b))


if __name__ == "__main__":
    run_program(main)
