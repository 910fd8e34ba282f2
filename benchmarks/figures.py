"""Tables of measured figures in README.md and docs/, from the result files.

A page has `<!-- figures: NAME -->` and `<!-- end of figures -->`. `python benchmarks/tables.py` writes the table called NAME between
them, and tests/test_documentation.py checks that it is there.
"""

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import drope_yarn_page
import paper_page
import scaling_page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REGION = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


class Missing(LookupError):
    """A result file does not hold a figure."""


def figure(result: str, case: str, metric: str, column: str = "ours", peer: str = "") -> float:
    """Return a figure of a result file: of the first such row whose baseline has a name that begins with `peer`.

    Raises:
        Missing: the file has no such row.
    """
    rows = json.loads((RESULTS / f"{result}.json").read_text())["rows"]
    for row in rows:
        is_asked_for = row["case"] == case and row["metric"] == metric and (row["peer_name"] or "").startswith(peer)
        if is_asked_for and row.get(column) is not None:
            return float(row[column])
    raise Missing(f"{result}: no {column} of {case!r}, {metric!r}")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _or_dash(text: str, *where: str) -> str:
    try:
        return text.format(figure(*where))
    except Missing:
        return "-"


LAYOUTS = (
    ("TP1 x DP2, `fp8_param_gather` in FP8", "train_step_x2-H200", "whole, TP1 x DP2, {}"),
    ("TP2, `tp_comm_overlap`, micro-batch 2", "train_step_x2-H200", "whole, TP2, overlapped, {}, micro-batch 2"),
    ("PP2 x VPP4", "train_step_x2-H200", "whole, PP2, VPP4, {}"),
    ("TP1 x DP4", "train_step_x4-H200", "whole, TP1 x DP4, {}"),
    (
        "TP2 x DP2, `tp_comm_overlap`, micro-batch 2",
        "train_step_x4-H200",
        "whole, TP2 x DP2, overlapped, {}, micro-batch 2",
    ),
    ("TP2 x DP2, `tp_comm_overlap`, micro-batch 1", "train_step_x4-H200", "whole, TP2 x DP2, overlapped, {}"),
    ("PP2 x VPP4 x DP2", "train_step_x4-H200", "whole, PP2, VPP4, DP2, {}"),
    ("PP4 x VPP2", "train_step_x4-H200", "whole, PP4, VPP2, {}"),
    ("TP4, `tp_comm_overlap`", "train_step_x4-H200", "whole, TP4, overlapped, {}"),
)
FORMATS = ("bf16", "FP8 tensorwise")
PARAMETERS = ", parameters"
"""Suffix of FP8 cases that also hold weights in FP8, where there is no other."""


def training_rows(layouts: Iterable[tuple[str, str, str]]) -> Iterable[list[str]]:
    """Yield a row per layout: tokens/s per GPU, MFU and memory in bf16 and FP8."""
    for label, result, case in layouts:
        cells = [label]
        for metric, text in (("tokens", "{:,.0f}"), ("MFU", "{:.0%}"), ("peak memory", "{:.0f}")):
            for form in FORMATS:
                cell = _or_dash(text, result, case.format(form), metric)
                if cell == "-" and form != "bf16":
                    cell = _or_dash(text, result, case.format(form + PARAMETERS), metric)
                cells.append(cell)
        yield cells


def training(layouts: Iterable[tuple[str, str, str]] = LAYOUTS) -> str:
    """Throughput of the whole 7B model by layout."""
    head = ["layout", "tokens/s per GPU, bf16", "FP8", "MFU, bf16", "FP8", "GB, bf16", "FP8"]
    return table(head, training_rows(layouts))


def headline() -> str:
    """The same for the layouts of two GPUs, which README.md shows."""
    return training(LAYOUTS[:3])


def kernels() -> str:
    """Times of kernels and blocks against the baselines."""
    rule, four, step = (
        "B 1, T 8192, H 30, hopper, saving scores",
        "B 4, T 8192, H 30, hopper, saving scores",
        "forward + backward",
    )
    names = {"fla": "fla 0.6.0", "megatron": "megatron-core 0.19.2", "FlashQLA": "FlashQLA, see below"}
    rows = []
    for label, result, case, peer in (
        ("gated delta rule, H100", "gated_delta_rule-H100", rule, "fla"),
        ("gated delta rule, H200", "gated_delta_rule-H200", rule, "fla"),
        ("gated delta rule, H200", "gated_delta_rule-H200", rule, "FlashQLA"),
        ("the same, four sequences", "gated_delta_rule-H200", four, "fla"),
        ("the same, four sequences", "gated_delta_rule-H200", four, "FlashQLA"),
        ("Gated DeltaNet block, H100", "blocks-H100", "Gated DeltaNet block, TP1, bf16", "megatron"),
        ("attention block, H100", "blocks-H100", "attention block, TP1, bf16", "megatron"),
        ("Gated DeltaNet block, TP2, two H200s", "blocks_tp2-H200", "Gated DeltaNet block, TP2, bf16", "megatron"),
        ("convolution and gates, H200", "gdn_glue-H200", "conv_gates", "fla"),
        ("Kimi Delta Attention layer, H200", "kda_layer-H200", "B 1, T 8192, 32 heads of 128, bf16", "fla"),
    ):
        ours, other = (figure(result, case, step, column, peer) for column in ("ours", "peer"))
        rows.append([label, f"{ours:.2f} ms", f"{other:.2f} ms ({names[peer]})", f"{other / ours:.2f}"])
    return table(["forward and backward, 8,192 tokens, bf16", "ours", "baseline", "ratio"], rows)


def kept_states() -> str:
    """Times of the delta rule with its states kept for the backward pass, and computed again."""
    rows = []
    for case in ("96/192, 30 heads", "96/192, 30 heads, 4 sequences", "128/128, 32 heads"):
        ours, other = (figure("kept_states-H200", case, "forward + backward", column) for column in ("ours", "peer"))
        rows.append([case, f"{other:.2f} ms", f"{ours:.2f} ms"])
    return table(["gated delta rule, one H200, forward and backward", "states computed again", "states kept"], rows)


def gradients() -> str:
    """Times of the delta rule with its last kernel in CUDA C++ and in Triton."""
    rows = []
    for label, case in (("one sequence", "B 1, T 8192, H 30"), ("four sequences", "B 4, T 8192, H 30")):
        for what, metric in (
            ("gradients alone", "gradients"),
            ("forward and backward", "forward and backward, gradients"),
        ):
            ours, other = (figure("hopper_trial-H200", case, metric, column) for column in ("ours", "peer"))
            rows.append([f"{label}, {what}", f"{ours:.2f} ms", f"{other:.2f} ms", f"{other / ours:.2f}"])
    return table(["gated delta rule, one H200", "gradients in CUDA C++", "in Triton", "ratio"], rows)


def small_models() -> str:
    """Training steps of small models on one GPU, with CUDA graphs and without."""
    rows = []
    for label, case in (
        ("hybrid of examples/expressivity, 32 x 256 tokens", "hybrid_negative, 32 x 256 tokens"),
        ("the same, 32 x 1,024 tokens", "hybrid_negative, 32 x 1024 tokens"),
        ("its transformer, 32 x 1,024 tokens", "transformer, 32 x 1024 tokens"),
        ("hybrid of 100 M parameters, 64 x 1,024 tokens", "hybrid of 100 M parameters, 64 x 1024 tokens"),
    ):
        (graphs, plain), (rate, before) = (
            [figure("small_models-H200", case, metric, column) for column in ("ours", "peer")] for metric in ("step", "tokens/s")
        )  # fmt: skip
        rows.append([label, f"{plain:.1f} ms", f"{graphs:.1f} ms", f"{before:,.0f}", f"{rate:,.0f}"])
    return table(["one H200, bf16", "step", "with graphs", "tokens/s", "with graphs"], rows)


def whole_models() -> str:
    """Training steps of eight layers on one GPU, by other implementations in bf16 and by ours."""
    rates, memory = "training step", "peak memory"
    rows = []
    for peer in (
        "OLMo-core 3.0, bf16",
        "OLMo-core 3.0, fp32 weights and moments, bf16",
        "transformers, fla, bf16",
        "megatron-core 0.19.2, 32 heads, bf16",
    ):
        values = [next(_peers("peers-H200", "GGGA*2, bf16", metric, peer)) for metric in (rates, memory)]
        rows.append([peer, f"{values[0]:,.0f}", f"{values[1]:.0f}"])
    for form in FORMATS:
        ours = [figure("peers-H200", f"GGGA*2, {form}", metric) for metric in (rates, memory)]
        rows.append([f"ours, {form}", f"{ours[0]:,.0f}", f"{ours[1]:.0f}"])
    return table(["8 layers, one H200, steps of 8,192 tokens", "tokens/s", "GB"], rows)


def qwen() -> str:
    """Training steps of Qwen3.5 2B on one GPU."""
    rows, peer = [], "transformers, fla, bf16"
    case = "24 layers, 4 x 8192 tokens, {}".format
    theirs = [next(_peers("qwen-H200", case("bf16"), metric, peer)) for metric in ("training step", "peak memory")]
    rows.append([peer, f"{theirs[0]:,.0f}", "", f"{theirs[1]:.0f}"])
    for form in FORMATS:
        rate, memory, mfu = (figure("qwen-H200", case(form), m) for m in ("training step", "peak memory", "MFU"))
        rows.append([f"ours, {form}", f"{rate:,.0f}", f"{mfu:.0%}", f"{memory:.0f}"])
    return table(["Qwen3.5 2B, one H200, 4 x 8,192 tokens", "tokens/s", "MFU", "GB"], rows)


def tiny() -> str:
    """The run of examples/pretrain_hybrid_tiny.sh."""
    case, result = "examples/pretrain_hybrid_tiny.sh, TP2 x PP2 on 4 ranks", "main_job-cpu"

    def value(metric: str, text: str) -> str:
        return text.format(figure(result, case, metric))

    rows = [
        ["empty checkout to finished run", value("empty checkout to finished run", "{:.1f} minutes")],
        ["of that, training", value("of that, training steps", "{:.1f} minutes")],
        ["training loss, first step", value("loss of the first step", "{:.2f} nats per byte")],
        ["training loss, last ten steps", value("mean loss of the last ten steps", "{:.2f} nats per byte")],
        ["validation loss", value("validation loss at the end", "{:.2f} nats per byte")],
    ]
    return table(["tiny run on two CPU cores", ""], rows)


def test_suite() -> str:
    """Time and counts of `.ci/run`."""
    case, result = ".ci/run, empty clone", "test_suite-cpu"
    rows = [
        [label, text.format(figure(result, case, metric))]
        for label, metric, text in (
            ("set-up and tests", "wall time", "{:.1f} minutes"),
            ("of that, tests", "of that, tests", "{:.1f} minutes"),
            ("passed", "passed", "{:,.0f}"),
            ("skipped, because they need a GPU", "skipped: no GPU", "{:,.0f}"),
            ("skipped for other reasons", "skipped: other reasons", "{:,.0f}"),
        )
    ]
    return table(["`.ci/run` from an empty clone on two CPU cores", ""], rows)


def fp8_loss() -> str:
    """Loss with FP8 against bf16."""
    runs = "300 steps of 32,768 bytes"
    rows = []
    for label, name in (
        ("`tensorwise`", "fp8_tensorwise"), ("`delayed`", "fp8_delayed"), ("`blockwise`", "fp8_blockwise"),
        ("bf16 in micro-batches of 4", "bf16 in micro-batches of 4"),
    ):  # fmt: skip
        case = f"{name}, {runs}, 5 seeds"
        gap, error = (figure("fp8_loss-H200", case, metric) for metric in ("mean gap to bf16", "its standard error"))
        rows.append([label, f"{gap:.2%}", f"{error:.2%}"])
    for label, name in (
        ("`tensorwise` and `fp8_attention`, one seed", "fp8_tensorwise+attention"),
        ("`delayed` and `fp8_attention`, one seed", "fp8_delayed+attention"),
    ):
        rows.append([label, f"{figure('fp8_loss-H200', f'{name}, {runs}, 1 seed', 'gap to bf16'):.2%}", ""])
    return table(["`precision.fp8_recipe`", "loss against bf16", "standard error"], rows)


def one_gpu() -> str:
    """The whole 7B model on one H100."""
    rows = []
    for label, name in (
        ("megatron, `offload_fraction` 0.8", "megatron-core's HybridDeviceOptimizer, 80% on the host"),
        ("DeepSpeed ZeRO 3, `offload_fraction` 0.6", "DeepSpeed, ZeRO 3, 60% on the host"),
    ):
        step = f"{name}, 8 sequences a step"
        rows.append([
            label,
            f"{figure('zero_offload-H100', step, 'tokens'):,.0f}",
            f"{figure('zero_offload-H100', step, 'step'):.1f} s",
            f"{figure('zero_offload-H100', name, 'peak memory of the GPU'):.1f} GiB",
            f"{figure('zero_offload-H100', name, 'peak memory of the host'):.1f} GiB",
        ])  # fmt: skip
    return table(
        ["one H100 80GB, 8 sequences of 8,192 tokens per step", "tokens/s", "step", "GPU peak", "host peak"], rows
    )


def _cases(result: str, which: str) -> int:
    """Return the number of cases over which a planner_errors file takes means: all, or several GPUs."""
    rows = json.loads((RESULTS / f"{result}.json").read_text())["rows"]
    return next(int(match[1]) for row in rows if (match := re.fullmatch(rf"step, {which} \((\d+)\)", row["case"])))


def planner() -> str:
    """Errors of the planner's predictions."""
    results = {gpu: f"planner_errors-{gpu}" for gpu in ("H100", "H200")}
    counts = {gpu: _cases(result, "all") for gpu, result in results.items()}
    several, rows = _cases(results["H200"], "several GPUs"), []
    for label, name in (
        ("peak memory", "memory"),
        ("step time", "step"),
        ("step time, calibrated", "step, calibrated"),
    ):
        cells = [label]
        for gpu, result in results.items():
            mean, worst = (figure(result, f"{name}, all ({counts[gpu]})", f"{kind} error") for kind in ("mean", "worst"))
            cells += [f"{mean:.1%}", f"{worst:.1%}"]
        bias = f"{name}, several GPUs ({several})", "size of the mean error, with signs"
        rows.append([*cells, _or_dash("{:.1%}", results["H200"], *bias)])
    means = [text for gpu, count in counts.items() for text in (f"{gpu}, mean of {count}", "worst")]
    return table(["prediction", *means, f"{several} on two H200s, bias"], rows)


def muon_update() -> str:
    """An update by each optimizer, on one GPU."""
    result, rows = "muon_update-H200", []
    for label, case, column in (
        ("AdamW", "Muon", "peer"),
        ("Muon", "Muon", "ours"),
        ("Muon, `muon_nesterov`", "Muon, Nesterov", "ours"),
        ("Muon, `muon_fp32_matmul_prec: high`", "Muon, fp32 GEMMs in TF32", "ours"),
    ):
        update, state = (figure(result, case, metric, column, "AdamW") for metric in ("update", "state"))
        rows.append([label, f"{update:.0f} ms", f"{state:.1f} GB"])
    torch = figure(result, "Muon", "update", "peer", "torch.optim.Muon")
    rows.append(["`torch.optim.Muon`, matrices alone", f"{torch:.0f} ms", ""])
    return table(["one H200, 8 layers of the 7B, bf16", "update", "state"], rows)


def planner_runs() -> str:
    """Predicted and measured memory and step time of the whole 7B on H200s."""
    rows = json.loads((RESULTS / "planner_errors-H200.json").read_text())["rows"]
    by_case: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if row["metric"] in ("memory", "step") and row["case"].startswith(("whole, ", "7B, ")):
            by_case.setdefault(row["case"], {})[row["metric"]] = row["ours"], row["peer"]
    lines = []
    for case, found in by_case.items():
        label = case.removeprefix("whole, ").replace(" (held out)", "")
        lines.append([label, *(f"{x:.1f}" for x in found["memory"]), *(f"{x:.2f}" for x in found["step"])])
    return table(["layout", "GB, predicted", "measured", "s per step, predicted", "measured"], lines)


def planned_layouts() -> str:
    """Layouts that the planner ranks first: their name is the metric of the row of their tokens/s."""
    by_case: dict[str, dict[str, list[str]]] = {}
    for row in json.loads((RESULTS / "planned_layouts-predicted.json").read_text())["rows"]:
        case, form = row["case"].rsplit(", ", 1)
        cells = [f"{row['ours']:.0f}"] if row["unit"] == "GB" else [row["metric"], f"{row['ours']:,.0f}"]
        by_case.setdefault(case, {}).setdefault(form, []).extend(cells)
    rows = []
    for case, found in by_case.items():
        gpus, sequence = case.split(" tokens")[0].split(", ")
        without = case.endswith("without CP")
        label = "the same without CP" if without else gpus.replace(" x NVIDIA", "").replace(" 80GB HBM3", "")
        rows.append([label, sequence, *(cell for form in FORMATS for cell in found[form])])
    columns = [name for form in FORMATS for name in (form, "tokens/s per GPU", "GB of tensors")]
    return table(["GPUs", "sequence", *columns], rows)


def documents() -> str:
    """Training steps with documents as in web text, against rows without boundaries."""
    rows = []
    for gpus, result in ((1, "documents-H200"), (2, "documents_x2-H200")):
        for length in ("8,192", "65,536"):
            cells = [f"CP{gpus}, {length} tokens"]
            for form in FORMATS:
                case = f"GGGA, CP{gpus}, {length} tokens, {form}, many documents"
                with_documents, without = (figure(result, case, "tokens", column) for column in ("ours", "peer"))
                cells += [f"{with_documents:,.0f}", f"{without:,.0f}", f"{with_documents / without:.2f}"]
            rows.append(cells)
    columns = ("documents", "none", "ratio")
    head = [f"{form}, {columns[0]}" if not i else name for form in ("bf16", "FP8") for i, name in enumerate(columns)]
    return table(["four layers, tokens/s per GPU", *head], rows)


def document_attention() -> str:
    """Attention on documents as in web text: the THD layout against other ways."""
    rows, result = [], "document_attention-H200"
    for shape in ("1 x 8,192", "4 x 8,192", "1 x 65,536"):
        case, metric = f"{shape}, web text", "forward + backward"
        others = ("no documents", "FlexAttention", "SDPA, masks of blocks")
        found = [next(_peers(result, case, metric, name)) for name in others]
        rows.append([shape, *(f"{x:.2f}" for x in (figure(result, case, metric), *found))])
    head = ["rows x tokens, ms", "THD", "without documents", "FlexAttention", "SDPA with masks"]
    return table(head, rows)


def _peers(result: str, case: str, metric: str, name: str) -> Iterator[float]:
    """Yield the figures of a peer."""
    for row in json.loads((RESULTS / f"{result}.json").read_text())["rows"]:
        if (row["case"], row["metric"], row["peer_name"]) == (case, metric, name):
            yield float(row["peer"])


def long_context() -> str:
    """Training steps at 65,536 tokens on two GPUs."""
    rows = []
    for label, name in (
        ("4 layers, one GPU", "GGGA, one GPU (DP2)"),
        ("8 layers, one GPU", "GGGA*2, one GPU (DP2)"),
        ("8 layers, CP2", "GGGA*2, CP2"),
        ("8 layers, TP2", "GGGA*2, TP2"),
        ("8 layers, TP2, `tp_comm_overlap`", "GGGA*2, TP2, overlapped"),
        ("whole 7B, CP2, full recompute", "whole, CP2, full recompute"),
        ("whole 7B, TP2, full recompute", "whole, TP2, full recompute"),
    ):
        cells = [label]
        for metric, text in (("tokens", "{:,.0f}"), ("work", "{:.0f}"), ("peak memory", "{:.0f}")):
            cells += [_or_dash(text, "long_context_x2-H200", f"{name}, {form}", metric) for form in FORMATS]
        rows.append(cells)
    columns = ["tokens/s per GPU, bf16", "FP8", "TFLOP/s per GPU, bf16", "FP8", "GB, bf16", "FP8"]
    return table(["65,536 tokens, two H200s", *columns], rows)


TABLES = {
    "documents": documents, "document-attention": document_attention, "long-context": long_context,
    "training": training, "headline": headline, "kernels": kernels, "kept-states": kept_states, "tiny": tiny, "fp8-loss": fp8_loss,
    "test-suite": test_suite, "whole-models": whole_models, "qwen": qwen,
    "gradients": gradients, "small-models": small_models,
    "one-gpu": one_gpu, "planner": planner, "planner-runs": planner_runs,
    "planned-layouts": planned_layouts, "muon-update": muon_update,
    "expressivity-state-tracking": partial(paper_page.accuracies, table, "state_tracking"),
    "expressivity-state-tracking-runs": partial(paper_page.runs, table, "state_tracking"),
    "expressivity-recall": partial(paper_page.accuracies, table, "recall"),
    "expressivity-state-based-recall": partial(paper_page.accuracies, table, "state_based_recall"),
    "paper-claims": partial(paper_page.claims, table),
    "scaling-corpus": partial(scaling_page.corpus, table), "scaling-points": partial(scaling_page.points, table),
    "scaling-laws": partial(scaling_page.laws, table), "scaling-optimal": partial(scaling_page.optimal, table),
    "scaling-savings": partial(scaling_page.savings, table),
    "scaling-interpolated": partial(scaling_page.interpolated, table), "scaling-keys": partial(scaling_page.keys, table),
    "drope-yarn": partial(drope_yarn_page.retrieval, table), "drope-yarn-loss": partial(drope_yarn_page.loss, table),
}  # fmt: skip


def pages() -> list[Path]:
    """Return the pages that may hold tables of figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_figures(text: str) -> str:
    """Return a page with its tables replaced by current ones."""
    return REGION.sub(lambda region: f"{region[1]}{TABLES[region[2]]()}{region[3]}", text)


def write() -> None:
    """Write the tables into all pages, and draw the plots."""
    drope_yarn_page.draw()
    scaling_page.write()
    for page in pages():
        page.write_text(with_figures(page.read_text()))
