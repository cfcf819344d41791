"""W's own singular components, for LeLoRA, PiSSA and MiLoRA: computed once per matrix and kept."""

import hashlib
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import UserError, cache_folder


def window_indices(m, R):
    """Indices of the first, the middle and the last R of m singular components, (3 R,); large windows overlap."""
    return torch.cat([torch.arange(R) + start for start in (0, min(m // 2, m - R), m - R)])


def components(W):
    """S (m,), A = sqrt(S) V^T (m, in) and B = U sqrt(S) (out, m) of W = U S V^T, float64, largest first.

    By the eigenvectors of W^T W or W W^T, whichever is smaller: on a GPU 14 times as fast as an SVD of 4096 x 4096.
    """
    if W.shape[0] < W.shape[1]:
        S, A, B = components(W.T)
        return S, B.T, A.T
    squares, V = torch.linalg.eigh(W.T @ W)
    S, V = squares.clamp_min(1e-300 + 1e-32 * squares[-1]).sqrt().flip(0), V.flip(1)
    return S, (V * S.sqrt()).T, W @ V / S.sqrt()


def windows(weight, R):
    """S (m,), A = sqrt(S) V^T (3 R, in) and B = U sqrt(S) (out, 3 R) of W = U S V^T in the three windows, float32.

    Windows of 64 components are kept in `cache_folder`, by W's content, and those of lower rank cut from them.
    """
    if not weight.isfinite().all():
        raise UserError(f"a matrix {list(weight.shape)} of the model has nan or inf in it: its weights are damaged")
    m, key = min(weight.shape), hashlib.sha256(weight.contiguous().cpu().view(torch.uint8).numpy())
    kept = min(max(R, 64), m)
    key.update(f"{tuple(weight.shape)} {weight.dtype} {kept}".encode())
    file = cache_folder() / "svd" / f"{key.hexdigest()}.safetensors"
    at = window_indices(m, kept).unique().to(weight.device)
    try:
        stored = load_file(file, device=str(weight.device))
    except (FileNotFoundError, SafetensorError):  # not there, or damaged
        S, A, B = components(weight.double())  # float32 would mix the smallest, which lie close together
        stored = {"S": S.float(), "A": A[at].float(), "B": B[:, at].float().contiguous()}
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}.part")
        save_file(stored, beside)
        beside.rename(file)
    place = torch.searchsorted(at, window_indices(m, R).to(weight.device))
    return stored["S"], stored["A"][place], stored["B"][:, place]
