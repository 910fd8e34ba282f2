"""A plain Muon on whole tensors in one process, and a job that runs ours on the same gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from testing import jobs

NOT_HERE = find_spec("emerging_optimizers") is None
REASON = "no emerging-optimizers here: pip install 'emerging-optimizers>=0.3,<0.4'"
MUON = dict(kind="muon", muon_fp32_matmul_prec="highest", muon_extra_scale_factor=0.2, eps=1e-2)
"""train.optimizer of tests: fp32, and updates of AdamW's size."""
LR, DECAY, BETAS = 0.5, 0.1, (0.9, 0.95)
"""A rate at which the rounding of weights does not hide that of updates."""


def gradient(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Return a gradient of a true tensor that every rank can make.

    Singular values of matrices are between 1/e and e times 1e-2, in directions that do not change, because the iteration magnifies
    rounding in the directions of small ones. Values are multiples of 2^-16, so that their means with a momentum of 0.5 are exact.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    factors = [torch.randn(n, min(shape), generator=generator, dtype=torch.float64) for n in shape]
    generator.manual_seed(1000 + step)
    sizes = (2 * torch.rand(min(shape), generator=generator, dtype=torch.float64) - 1).exp() * 1e-2
    if len(shape) == 1:
        values = sizes * factors[0][:, 0].sign()
    else:
        left, right = (torch.linalg.qr(factor).Q for factor in factors)
        values = left * sizes @ right.T
    return ((values * 2**16).round() / 2**16).float()


def is_matrix(name: str, value: torch.Tensor) -> bool:
    """Return whether Muon updates a tensor: the weight of a linear in a layer."""
    return value.dim() == 2 and name.startswith("layers.") and "_conv" not in name


def updated(model: dict, parallel: dict, train: dict, steps: int) -> dict:
    """Update with `gradient`. Return this rank's slices before and after: (tensor, offset, shape, values); and what padding holds."""
    engine = jobs.make_engine(model, parallel, train)
    before, norms = _slices(engine), []
    for step in range(steps):
        for chunk in engine.wrapped:
            chunk.zero_grad_buffer()
        for _, parameter, pieces in engine.layout.parameters(engine.chunks):
            for piece in pieces:
                whole = gradient(piece.tensor.name, piece.tensor.shape, step)
                piece.target.narrow(parameter.main_grad).copy_(piece.source.narrow(whole))
        norms.append(engine.gradient_norm())
        engine.update(LR, norms[-1])
    engine.optimizer.gather_parameters()
    return {"before": before, "after": _slices(engine), "norms": norms, "padding": _padding(engine)}


def _slices(engine) -> list[tuple]:
    return [
        (piece.tensor.name, piece.source.offset, piece.tensor.shape, piece.target.narrow(parameter.detach()).clone())
        for _, parameter, pieces in engine.layout.parameters(engine.chunks)
        for piece in pieces
    ]


def _padding(engine) -> float:
    """Return the largest absolute value in the padding of this rank's parameters, and of their momenta."""
    largest, shards = 0.0, engine.optimizer.shards()
    for _, parameter, pieces in engine.layout.parameters(engine.chunks):
        held = shards[parameter].states.values() if parameter in shards else ()
        whole = [parameter, *(state.view(parameter.shape) for state in held if state.numel() == parameter.numel())]
        for values in (tensor.detach().clone() for tensor in whole):
            for piece in pieces:
                piece.target.narrow(values).zero_()
            largest = max(largest, float(values.abs().max()) if values.numel() else 0.0)
    return largest


def joined(results: list[dict], when: str) -> dict[str, torch.Tensor]:
    """Return the true tensors of all ranks' slices."""
    tensors: dict[str, torch.Tensor] = {}
    for name, offset, shape, values in (one for result in results for one in result[when]):
        whole = tensors.setdefault(name, torch.full(shape, float("nan")))
        index = tuple(slice(at, at + length) for at, length in zip(offset, values.shape, strict=True))
        whole[index] = values
    return tensors


@contextmanager
def torch_muon_in_fp32() -> Iterator[None]:
    """Let torch.optim.Muon iterate in fp32: it casts to bf16 whatever the dtype."""
    torch.Tensor.bfloat16 = lambda tensor: tensor.clone()
    try:
        yield
    finally:
        del torch.Tensor.bfloat16  # uncovers that of the base class


def plain_steps(
    tensors: dict[str, torch.Tensor], steps: int, no_decay: set[str], make_muon, clip: float
) -> dict[str, torch.Tensor]:
    """Return the tensors after updates by torch's AdamW and by `make_muon(matrices)`.

    Args:
        clip: largest global gradient norm; 0: no clipping.
    """
    weights = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    matrices = [value for name, value in weights.items() if is_matrix(name, value)]
    others = {name: value for name, value in weights.items() if not is_matrix(name, value)}
    groups = [
        {"params": [value for name, value in others.items() if (name in no_decay) == exempt], "weight_decay": decay}
        for exempt, decay in ((False, DECAY), (True, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=MUON["eps"])
    muon = make_muon(matrices)
    for step in range(steps):
        for name, value in weights.items():
            value.grad = gradient(name, tuple(value.shape), step)
        if clip:
            torch.nn.utils.clip_grad_norm_(list(weights.values()), clip)
        adamw.step()
        muon.step()
    return {name: value.detach() for name, value in weights.items()}


class PlainMuon(torch.optim.Optimizer):
    """Muon as published (Jordan et al., 2024), in fp64, with the coefficients of each step given."""

    def __init__(self, params, lr, weight_decay, momentum, nesterov, coefficients, scale):
        super().__init__(params, {})
        self.lr, self.decay, self.momentum, self.nesterov = lr, weight_decay, momentum, nesterov
        self.coefficients, self.scale = coefficients, scale

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            g, state = p.grad.double(), self.state[p]
            buffer = state.setdefault("momentum", torch.zeros_like(g))
            buffer.mul_(self.momentum).add_(g, alpha=1 - self.momentum)
            m = (1 - self.momentum) * g + self.momentum * buffer if self.nesterov else buffer
            x = m / m.norm()
            for a, b, c in self.coefficients:
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            p.copy_(p.double() * (1 - self.lr * self.decay) - self.lr * self.scale(*p.shape) * x)


def update_error(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> float:
    """Return the difference of two updates relative to the update, in the Frobenius norm."""
    change = (expected.double() - before.double()).norm()
    return float((found.double() - expected.double()).norm() / change)
