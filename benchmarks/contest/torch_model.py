"""The GPT in torch, with its fused kernels where it has some; for every contestant that uses torch."""

import os
from typing import Any

import numpy as np
import task
import torch
import torch.nn.functional as F
from torch import nn


class Embedding(nn.Module):
    """[B, L] tokens -> [B, L, D]."""

    def __init__(self, size: task.Task, weights: dict[str, np.ndarray]):
        super().__init__()
        self.tokens = nn.Parameter(torch.tensor(weights["tokens"]))
        self.places = nn.Parameter(torch.tensor(weights["places"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.embedding(x, self.tokens) + self.places


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale."""

    def __init__(self, scale: np.ndarray):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, 1e-6)


def linear(matrix: np.ndarray) -> nn.Linear:
    """As torch lays it: [out, in]."""
    made = nn.Linear(*matrix.shape, bias=False)
    made.weight = nn.Parameter(torch.tensor(matrix.T.copy()))
    return made


class Block(nn.Module):
    """A pre-norm transformer block, [B, L, D] -> [B, L, D]."""

    def __init__(self, size: task.Task, weights: dict[str, np.ndarray]):
        super().__init__()
        self.heads = size.heads
        self.norm_1, self.norm_2 = Norm(weights["scale_1"]), Norm(weights["scale_2"])
        self.qkv, self.out, self.up, self.down = (linear(weights[name]) for name in ("qkv", "out", "up", "down"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        heads = rows, length, self.heads, width // self.heads
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Head(nn.Module):
    """[B, L, D] -> [B, L, V] logits."""

    def __init__(self, size: task.Task, weights: dict[str, np.ndarray]):
        super().__init__()
        self.norm, self.kernel = Norm(weights["scale"]), linear(weights["kernel"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(self.norm(x))


def layers(size: task.Task) -> list[tuple[Any, task.Task, dict[str, np.ndarray]]]:
    """Class and arguments of each layer, so that a rank makes those that it holds."""
    first, *blocks, last = size.weights()
    return [(Embedding, size, first), *((Block, size, each) for each in blocks), (Head, size, last)]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over [B, L]."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Adam with torch's fused kernel."""
    return torch.optim.Adam(parameters, lr=task.LEARNING_RATE, fused=True)


def batch(size: task.Task, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels [M, B, L]."""
    inputs, labels = size.batch(number)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def threads() -> None:
    """As many as the runner has chosen for a process of this contestant."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
