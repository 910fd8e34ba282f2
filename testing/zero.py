"""Run curves with DeepSpeed's engine and compare what it saves."""

from testing import jobs
from testing.layouts import LR, MODEL, STEPS, few_micro_batches, layout


def run(ranks, count: int, zero: dict, parallel: dict | None = None, train: dict | None = None, **more) -> list[dict]:
    parallel = parallel or layout()
    train = few_micro_batches(count, parallel) | {"engine": "deepspeed"} | (train or {})
    common = dict(model=MODEL, parallel=parallel, train=train, zero=zero)
    return ranks.run(jobs.curve, count, **common | {"steps": STEPS, "lr": LR} | more)


def values_that_differ(straight: list[dict], first: list[dict], second: list[dict]) -> int:
    """Return how many losses, norms and parameters differ between an uninterrupted run and one that was saved and resumed."""
    count = 0
    for one, a, b in zip(straight, first, second, strict=True):
        for what in ("losses", "norms"):
            count += sum(x != y for x, y in zip(one[what], a[what] + b[what], strict=True))
        assert one["parameters"].keys() == b["parameters"].keys()
        count += sum(int((one["parameters"][name] != value).sum()) for name, value in b["parameters"].items())
    return count
