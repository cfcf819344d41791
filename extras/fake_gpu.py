"""Run the program on a CUDA device that does not exist: fake tensors, real device rules, every wait reported.

    python extras/fake_gpu.py run llama|gemma|roberta|vit [train.py's flags]  # a small run, stopped and resumed
    python extras/fake_gpu.py count METHOD MODEL ROWS LENGTH [int8]  # a decoder's step: kernel launches, peak memory
    python extras/fake_gpu.py fit METHOD MODEL ROWS LENGTH GIB       # how a batch is split to fit so much memory
    python extras/fake_gpu.py decode MODEL ROWS                      # launches per generated token

FakeTensorMode gives tensors with a device and no data: mixing devices raises as on a GPU, reading a value (item,
tolist, bool, nonzero) has no answer. `Watch` lies on top: it counts what would make the host wait, answers with a
number that lets the run go on, counts launches, and adds up what is alive. The last line on stdout is a JSON object.
Not checked: kernels, numbers, torch.compile, nccl, FSDP, streams.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]

SHIM = r"""
// What autograd and torch.Generator ask of the "cuda" device, for a machine without one. All tensors are fake, so that
// nothing has to be done. Loaded before torch is imported, for either build of torch: at::getCUDAHooks looks once.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
static const c10::Device first{c10::DeviceType::CUDA, 0};
static const c10::Stream stream(c10::Stream::DEFAULT, first);
struct CudaGenerator final : at::CPUGeneratorImpl {  // draws on the CPU, but says that it belongs to the GPU
  CudaGenerator() : at::CPUGeneratorImpl(0) { device_ = first; }
};
namespace at {
struct FakeCuda final : CUDAHooksInterface {
  explicit FakeCuda(CUDAHooksArgs) {}
  void init() const override {}  // this and cuDNN's versions: torch 2.11 asks for them
  bool isBuilt() const override { return true; }
  long versionCuDNN() const override { return 91000; }
  long versionRuntimeCuDNN() const override { return 91000; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<CudaGenerator>(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator g = make_generator<CudaGenerator>();
    return g;
  }
};
C10_REGISTER_TYPED_CLASS_WITH_PRIORITY(CUDAHooksRegistry, "CUDAHooks", c10::REGISTRY_PREFERRED, FakeCuda);
}
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return first; }
  c10::Device getDevice() const override { return first; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream; }
};
namespace { C10_REGISTER_GUARD_IMPL(CUDA, Guard); }
"""


def shim():
    """Give torch a "cuda" device for autograd and generators, without a driver; before torch is imported."""
    assert "torch" not in sys.modules, "at::getCUDAHooks looks for its hooks once"
    if not shutil.which("g++"):
        sys.exit("error: the fake GPU is compiled: install g++")
    root = Path(importlib.util.find_spec("torch").origin).parent
    key = hashlib.sha256("".join((str(root), (root / "version.py").read_text(), SHIM)).encode()).hexdigest()[:12]
    out = Path(tempfile.gettempdir()) / f"fake-gpu-{key}.so"
    if not out.exists():  # 10 s
        source = out.with_suffix(f".{os.getpid()}.cpp")
        source.write_text(SHIM)
        subprocess.run(["g++", "-O0", "-std=c++20", "-shared", "-fPIC", str(source), "-o", f"{source}.so",
                        f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lc10", "-ltorch_cpu"],
                       check=True)
        os.replace(f"{source}.so", out)
        source.unlink()
    ctypes.CDLL(str(out), ctypes.RTLD_GLOBAL)


shim()
sys.path[0] = str(ROOT)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torch.nn.utils.clip_grad as clip_grad  # noqa: E402
import torch.utils._foreach_utils as foreach_utils  # noqa: E402
import safetensors.torch  # noqa: E402
from safetensors.torch import save_file as real_save  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import allocators  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import lora  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402
from extras import adapter_files, devices, singular  # noqa: E402

foreach_utils._foreach_supported_types.append(FakeTensor)  # take the branches that a GPU's tensors take
clip_grad._has_foreach_support = lambda tensors, device: True
fake_tensor.CONSTANT_NUMEL_LIMIT = 1 << 14  # torch.tensor([...]) keeps its values while nothing is computed from it
# kernels that copy a size or a flag to the host before they return
WAITING = set("""nonzero masked_select unique_dim _unique2 unique_consecutive equal bincount linalg_eig _linalg_svd
    _linalg_eigh linalg_svd histc repeat_interleave multinomial linalg_inv_ex_""".split())
# operators that launch nothing, and those that launch several kernels
FREE = set("""empty empty_strided empty_like new_empty new_empty_strided device _unsafe_view lift_fresh is_pinned detach
    _reshape_alias _local_scalar_dense set_ _has_compatible_shallow_copy_type is_same_size resize_ view unbind split
    split_with_sizes chunk _assert_async""".split())
MANY = {"sort": 5, "argsort": 5, "topk": 3, "index_put": 6, "index_put_": 6, "_index_put_impl_": 6,
        "_unsafe_index_put": 6, "embedding_dense_backward": 2}


def tensor_lists(args, kwargs):
    lists = [a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple)) and a]
    return [a for a in lists if isinstance(a[0], torch.Tensor)]


def launches(func, args, kwargs):
    """Kernels that an operator starts on a GPU."""
    name = func._schema.name.split("::")[1]
    if name in FREE or getattr(func, "is_view", False) or func.namespace in ("prim", "profiler", "c10d"):
        return 0
    if not name.startswith(("_foreach_", "_fused_adam")):
        return MANY.get(name, 1)
    lists = tensor_lists(args, kwargs)
    same = all(t.shape == row[0].shape and t.stride() == row[0].stride() for row in zip(*lists) for t in row)
    alike = len({t.dtype for some in lists for t in some}) == 1 or name == "_foreach_copy_"
    together = same and alike or name.startswith("_fused")  # then one multi-tensor kernel takes 30 to 110 tensors
    return -(-len(lists[0]) // (30 if together else 1))


class Watch(TorchDispatchMode):
    """Every operator: `waits` counts what happened where in steps, `launched` a phase's kernels, `peak` the bytes."""

    def __init__(self, capacity=math.inf):
        super().__init__()
        self.phase, self.waits, self.launched, self.capacity = "setup", Counter(), Counter(), capacity
        self.live, self.peak = {}, 0  # bytes by storage

    def phased(self, name, function):
        """The function, in a phase of this name."""
        def call(*args, **kwargs):
            before, self.phase = self.phase, name
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before
        return call

    def wait(self, what):
        if self.phase == "step":
            lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_stack()
                     if Path(frame.filename).parent == ROOT]
            self.waits[f"{what} at {lines[-1] if lines else '(autograd)'}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_gpu = any(t.device.type == "cuda" for t in leaves)
        generator = kwargs.get("generator")
        if generator is not None:
            kwargs["generator"] = None
        if generator is not None and leaves:
            assert generator.device.type == leaves[0].device.type, f"{name}: generator of {generator.device.type}"
        if name == "_local_scalar_dense":
            return self.scalar(func, args[0])
        if name.startswith(("_foreach_", "_fused_adam")):  # FakeTensorMode does not compare the devices of lists
            for alike in zip(*tensor_lists(args, kwargs)):
                assert len({t.device for t in alike}) == 1, f"{name}: Expected all tensors to be on the same device"
        if name in WAITING and on_gpu:
            self.wait(name)
        if name == "nonzero":
            x = args[0]
            return torch.arange(x.numel(), device=x.device)[:, None].expand(-1, x.dim())[:x.shape[0]]
        if name == "equal":
            return True
        if name == "_to_copy" and leaves:
            self.copied(leaves[0].device, kwargs.get("device") or leaves[0].device, kwargs.get("non_blocking"))
        elif name == "copy_":
            self.copied(args[1].device, args[0].device, kwargs.get("non_blocking") or len(args) > 2 and args[2])
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            masks = {k for k, i in enumerate(args[1]) if i is not None and i.dtype == torch.bool}
            if masks and on_gpu:
                self.wait("index by bool")
            every = [torch.arange(len(i), device=i.device) if k in masks else i for k, i in enumerate(args[1])]
            args = (args[0], every, *args[2:])  # as if all were true
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device.type == "cuda"]
        if on_gpu or made:
            self.launched[self.phase] += launches(func, args, kwargs)
        for t in made:
            storage = t.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = -(-storage.nbytes() // 512) * 512
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.live.values()))
        if made and sum(self.live.values()) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than the fake GPU has.")
        return out

    def scalar(self, func, x):
        if x.device.type == "cuda":
            self.wait("item, tolist or bool")
        try:
            return func(x)  # a constant
        except Exception:  # a fake tensor has no value: torch raises what it likes
            return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 0

    def copied(self, source, target, free):
        source, target = torch.device(source).type, torch.device(target).type
        if source == "cuda" and target == "cpu":
            self.wait("copy to host")
        if source == "cpu" and target == "cuda" and not free:
            self.wait("blocking copy to the device")


def values(t):
    """Real tensor of the same shape: its constant, else ones."""
    with unset_fake_temporarily():
        if not isinstance(t, FakeTensor):
            return t.clone()
        known = getattr(t, "constant", None)
        return known.clone() if known is not None else torch.ones(t.shape, dtype=t.dtype)


def save_file(tensors, path, metadata=None):
    for name, t in tensors.items():
        assert t.is_contiguous(), name
    real_save({name: values(t) for name, t in tensors.items()}, path, metadata)


def load_file(path):
    file = Opened(path, framework="pt")
    return {key: file.get_tensor(key) for key in file.keys()}


class Opened:
    """safe_open whose tensors are fake."""

    def __init__(self, *args, **kwargs):
        self.file = safetensors.safe_open(*args, **kwargs)
        self.keys, self.get_slice, self.metadata = self.file.keys, self.file.get_slice, self.file.metadata

    def get_tensor(self, key):
        with unset_fake_temporarily():
            real = self.file.get_tensor(key)
        return torch.ops.aten.lift_fresh(real)  # fake, with its values

    __enter__, __exit__ = lambda self: self, lambda *_: None


def plain_windows(weight, R):
    """singular.windows without the decomposition, which a fake tensor cannot have at this size."""
    n_out, n_in = weight.shape
    shapes = (min(n_out, n_in),), (3 * R, n_in), (n_out, 3 * R)
    return tuple(torch.empty(shape, device=weight.device) for shape in shapes)


def move(network, device):
    """Module.to for fake tensors, which refuse to be swapped."""
    network.load_state_dict({name: p.to(device) for name, p in network.state_dict().items()}, assign=True)
    return network


@contextlib.contextmanager
def fake_gpu(capacity=math.inf):
    """The program's modules under a fake GPU of so many bytes; yields its Watch."""
    watch = Watch(capacity)
    restore, after_step = lora.restore, allocators.WeightLora.after_step

    def put_back(thing, state, name="run"):  # the CPU's generator stands in for a GPU's, whose state is another
        return None if isinstance(thing, torch.Generator) else restore(thing, state, name)

    def warm_up(policy, step):  # the one wait of WeightLoRA and credit is at its end, by design
        return watch.phased("rebuild" if policy.own and step >= policy.warmup else "step", after_step)(policy, step)

    patches = [(FakeTensor, "numpy", lambda t, **_: values(t).numpy()),
               (singular, "windows", plain_windows), (allocators.Policy, "to", move),
               (lora, "restore", put_back), (torch, "set_rng_state", lambda state: None),
               (torch.Tensor, "pin_memory", lambda t: t), (allocators.WeightLora, "after_step", warm_up),
               (allocators.Allocator, "check_ranks", lambda self: None),  # there are no numbers to compare
               (train.Training, "step", watch.phased("step", train.Training.step)), (models, "safe_open", Opened),
               (train, "load_file", load_file)]
    patches += [(place, "save_file", save_file) for place in (train, adapter_files, singular, safetensors.torch)]
    patches += [(torch.cuda, name, lambda *_, new=new: new) for name, new in {
        "get_device_name": "fake", "max_memory_allocated": 0, "reset_peak_memory_stats": None, "empty_cache": None,
        "get_rng_state": torch.ones(16, dtype=torch.uint8), "set_rng_state": None, "is_bf16_supported": True,
        "get_device_properties": SimpleNamespace(total_memory=80 * 2**30)}.items()]
    math_only = sdpa_kernel(SDPBackend.MATH)  # the others ask the driver
    with contextlib.ExitStack() as patched:
        for place, name, new in patches:
            patched.enter_context(mock.patch.object(place, name, new))
        with math_only, FakeTensorMode(allow_non_fake_inputs=True), watch:
            yield watch


# ---------------------------------------------------------------------------------------------- small runs

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
MODELS = {"llama": dict(model_type="llama", vocab_size=99, num_key_value_heads=2, rms_norm_eps=1e-5),
          "gemma": dict(model_type="gemma", vocab_size=99, num_key_value_heads=4, head_dim=16),
          "roberta": dict(model_type="roberta", vocab_size=99, max_position_embeddings=140, pad_token_id=1),
          "vit": dict(model_type="vit", image_size=8, patch_size=2, num_channels=1)}


def prepare(folder, family):
    """A model folder with a tokenizer of words, and data; returns train.py's flags for them."""
    place = folder / family
    place.mkdir()
    (place / "config.json").write_text(json.dumps(SIZES | MODELS[family]))
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *"a rather good film add to".split(), *map(str, range(80))]
    (place / "vocab.txt").write_text("\n".join(words))
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"}')
    if family == "vit":
        return ["--model", str(place), "--task", "digits-rot90"]
    rows = [{"text": "a rather good film", "label": i % 2, "instruction": f"add {i % 80}" + " to a" * (i % 5),
             "output": str(i % 79)} for i in range(96)]
    (folder / "data.json").write_text(json.dumps(rows))
    task = "text-classification" if family == "roberta" else "instructions"
    return ["--model", str(place), "--task", task, "--data", str(folder / "data.json")]


SHORT = """--init-weights random --device cuda --rank 4 --batch-size 4 --limit-train 80 --limit-eval 8 --max-length 96
    --steps 9 --save-every 6 --log-every 50 --eval-every 50 --weightlora-examples 8 --credit-examples 8""".split()


def small_run(family, *extra):
    """train.main on the fake GPU, broken off after its checkpoint and resumed: {"error", "waits"}."""
    count = train.Training.count

    def until_step_7(training, *args):
        count(training, *args)
        if training.steps == 7:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as made, fake_gpu() as watch:
        os.environ["RANKS_CACHE"], out, error = f"{made}/cache", f"{made}/run", None
        try:
            with contextlib.redirect_stdout(sys.stderr):
                with mock.patch.object(train.Training, "count", until_step_7), contextlib.suppress(KeyboardInterrupt):
                    train.main([*prepare(Path(made), family), *SHORT, "--out", out, *extra])
                train.main(["--resume", out])
        except (Exception, SystemExit) as found:  # whatever it is, it is the finding
            traceback.print_exc()
            error = f"{type(found).__name__}: {found}"
        return {"error": error, "waits": +watch.waits}


# ---------------------------------------------------------------------------------------------- counting at full size


def one_kernel(backward):
    """An activation or attention of one kernel forward and `backward` kernels backward, as CUDA's fused ones are."""
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            y = torch.sin(inputs[0])
            ctx.save_for_backward(*inputs, *[y] * (len(inputs) > 1))
            return y

        @staticmethod
        def backward(ctx, grad):
            for _ in range(backward - 1):
                grad = torch.sin(grad)
            inputs = ctx.saved_tensors[:-1] or ctx.saved_tensors
            return tuple(torch.sin(grad) if t.shape == grad.shape else torch.sin(t) for t in inputs)
    return Fused.apply


def split_of(rows, length, answers=8):
    """Rows of `length` tokens, the last of which are answers, without the tokens."""
    return data.Split("lm", [], [length] * rows, starts=[length - answers] * rows)


def batch(split, indices, *_, **__):
    """data.collate of such a split, on the GPU."""
    B, T, start = len(indices), split.lengths[0], split.starts[0]
    tokens, mask = torch.zeros(B, T, dtype=torch.long, device="cuda"), torch.ones(B, T, dtype=torch.bool, device="cuda")
    labels = torch.zeros((T - start) * B, dtype=torch.long, device="cuda")
    return {"tokens": tokens, "mask": mask, "positions": labels}, labels


def full_size(watch, method, model, rows, length, weights="float"):
    """train.Training of a random decoder at full size on the fake GPU."""
    fused, norm = one_kernel(1), one_kernel(2)
    models.ACTIVATIONS.update(silu=fused, gelu=fused)
    data.collate = batch
    F.rms_norm = lambda x, shape, weight=None, eps=None: norm(x) if weight is None else norm(x) * weight
    F.scaled_dot_product_attention = lambda q, k, v, **_: fused(q, k, v)
    s = train.Settings(method=method, model=model, rank=32, alpha=64.0, dropout=0.05, lr=1e-4, weight_decay=0.0,
                       device="cuda", dtype="bfloat16", init_weights="random", batch_size=rows, max_length=length,
                       weightlora_steps=2, adalora_t_init=1, adalora_t_final=500, lalora_gamma=1.1, compile="off",
                       weights=weights, targets=train.DEFAULTS["decoder"][0])
    built = models.load(model, "lm", None, torch.bfloat16, "cuda", "random", int8=weights == "int8")
    allocator = allocators.policy(method)(built, s, 1000)
    allocator.validation_loss = evaluation.validation(built, "lm", split_of(32, length // 4), "cuda")
    training = train.Training(s, built, "lm", allocator)
    for optimizer in training.optimizers:
        optimizer.step = watch.phased("optimizer", optimizer.step)
    built.train()
    return training


def count(method, model, rows, length, weights="float"):
    """Launches of a training step by phase, and the most bytes alive."""
    with fake_gpu() as watch:
        training = full_size(watch, method, model, rows, length, weights)
        for step in range(1, 5):
            watch.launched.clear()
            training.step(step, [(*batch(split_of(rows, length), range(rows)), 1.0)])
        return {"launches": dict(watch.launched), "total": sum(watch.launched.values()), "peak_gib": watch.peak / 2**30}


def fit(method, model, rows, length, gib):
    """What devices.fit_memory settles on a GPU of so many GiB, and the most bytes alive in the steps that follow."""
    with fake_gpu(capacity=gib * 2**30) as watch:
        training = full_size(watch, method, model, rows, length)
        split = split_of(rows, length, length // 2)
        devices.fit_memory(training, SimpleNamespace(split=split, widths=None))
        most, watch.peak = training.s.forward_rows, 0
        for step in (1, 2):
            parts = torch.arange(rows).split(most)
            training.step(step, [(*batch(split, part), 1.0) for part in parts])
        return {"forward_rows": most, "checkpointing": training.s.checkpointing, "peak_gib": watch.peak / 2**30}


def decode(model, rows):
    """Launches per generated token, adapters merged as evaluation does, before the first look for finished rows."""
    with fake_gpu() as watch:
        training = full_size(watch, "lora", model, rows, 128)
        lora.merge_adapters(training.model)
        prompt, counts = torch.zeros(rows, 128, dtype=torch.long, device="cuda"), []
        for tokens in (2, 6):
            watch.launched.clear()
            models.generate(training.model.eval(), prompt, None, tokens, None, 0)
            counts.append(sum(watch.launched.values()))
        return {"launches": (counts[1] - counts[0]) / 4}


if __name__ == "__main__":
    what, *words = sys.argv[1:] or ["nothing"]
    commands = {"run": small_run, "count": count, "fit": fit, "decode": decode}
    if what not in commands:
        sys.exit(f"error: {what}: no command\n\n{__doc__}")
    if what != "run":
        words = [int(word) if word.isdigit() else word for word in words]
    print(json.dumps(commands[what](*words)))
