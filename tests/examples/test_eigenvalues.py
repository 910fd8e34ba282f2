"""State tracking in one Gated DeltaNet state, with one token per line: solved where beta reaches 2, not where it stops at 1."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybrid_kernels.gated_delta_rule import gated_delta_rule
from megatron_hybrid.data.synthetic.swaps import draw_swaps, states_after


def programs(count: int, variables: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First values [count, variables], swaps [count, size, 2] and the values after each swap [count, size, variables]."""
    random = np.random.default_rng(seed)
    values = np.stack([random.permutation(variables) for _ in range(count)])
    swaps = np.stack([draw_swaps(random, variables, size) for _ in range(count)])
    states = [[list(state) for state in states_after(v, s)] for v, s in zip(values, swaps, strict=True)]
    return values, swaps, np.array(states)


@pytest.mark.parametrize(("beta", "solved"), [(2.0, True), (1.0, False)])
def test_a_reflection_is_a_swap(beta, solved):
    """A key along the difference of two variables, with beta 2 and value 0, swaps their rows of the state: S5, 128 swaps."""
    variables, size, count = 5, 128, 16
    values, swaps, states = programs(count, variables, size, seed=0)
    unit = torch.eye(variables, dtype=torch.float64)
    writes = unit.expand(count, -1, -1)
    reflections = F.normalize(unit[swaps[..., 0]] - unit[swaps[..., 1]], dim=-1)
    k = torch.cat([writes, reflections, torch.zeros_like(writes)], 1)[:, :, None]
    v = torch.cat([unit[values], torch.zeros_like(reflections), torch.zeros_like(writes)], 1)[:, :, None]
    betas = torch.full(k.shape[:3], beta, dtype=torch.float64)
    betas[:, :variables] = 1.0
    q = torch.cat([writes, torch.zeros_like(reflections), writes], 1)[:, :, None]
    o, _ = gated_delta_rule(q, k, v, torch.zeros_like(betas), betas, scale=1.0)
    answers = o[:, -variables:, 0].argmax(-1).numpy()
    accuracy = (answers == states[:, -1]).mean()
    assert accuracy == 1.0 if solved else accuracy < 0.5


class OneState(torch.nn.Module):
    """One head: a token sets key, value and beta; a question reads the state."""

    def __init__(self, variables: int, largest_beta: float, dim: int = 4) -> None:
        super().__init__()
        tokens = 2 * variables**2  # assignments, then ordered swaps
        self.variables, self.largest_beta = variables, largest_beta
        self.k, self.q = torch.nn.Parameter(torch.randn(tokens, dim)), torch.nn.Parameter(torch.randn(variables, dim))
        self.v, self.beta = (
            torch.nn.Parameter(0.3 * torch.randn(tokens, variables)),
            torch.nn.Parameter(torch.zeros(tokens)),
        )

    def forward(self, values: np.ndarray, swaps: np.ndarray, asked: torch.Tensor) -> torch.Tensor:
        n = self.variables
        tokens = np.concatenate([np.arange(n) * n + values, n * n + swaps[..., 0] * n + swaps[..., 1]], 1)
        k, v = F.normalize(self.k, dim=-1)[tokens][:, :, None], self.v[tokens][:, :, None]
        beta = (self.largest_beta * self.beta.sigmoid())[tokens][:, :, None]
        q = F.normalize(self.q, dim=-1)[asked][:, :, None]
        q = F.pad(q, (0, 0, 0, 0, n, 0))  # no question before the first swap
        o, _ = gated_delta_rule(q, k, v, torch.zeros_like(beta), beta, scale=8.0)
        return o[:, n:, 0]


def trained_accuracy(largest_beta: float, steps: int = 500) -> float:
    """Train on the values after each of 4 swaps of 3 variables. Return the accuracy after 16 swaps."""
    torch.manual_seed(0)
    model = OneState(3, largest_beta)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def run(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, swaps, states = programs(count, 3, size, seed)
        asked = torch.randint(3, (count, size), generator=torch.Generator().manual_seed(seed))
        answers = torch.from_numpy(states).gather(2, asked[..., None])[..., 0]
        return model(values, swaps, asked), answers

    for step in range(steps):
        logits, answers = run(32, 4, step)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        logits, answers = run(256, 16, steps)
    return float((logits[:, -1].argmax(-1) == answers[:, -1]).float().mean())


def test_training_finds_it():
    assert trained_accuracy(largest_beta=2.0) >= 0.95
    assert trained_accuracy(largest_beta=1.0) <= 0.5
