"""Averages of checkpoints against torch, bit for bit, and in transformers and in training."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.arch.optimizers.spec import MASTER
from megatron_hybrid.checkpoint.format import state_name
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.convert.verify import verify
from testing import jobs
from testing.checkpoints import edit_index
from testing.models import SMALLEST
from tests.convert import jobs as convert_jobs
from tests.convert.folders import BASE, write_folder
from tests.convert.test_huggingface import to_ours, to_theirs
from tests.train.test_trainer import make_config
from tools.average_checkpoints import main


def tensors(folder) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name) for name in reader.index.tensors}


@pytest.fixture(scope="module")
def three(ranks, tmp_path_factory):
    """Three checkpoints of one run in bf16 on two ranks: folders and tensors."""
    root = tmp_path_factory.mktemp("three")
    config = make_config(root)
    config["train"] |= {"dtype": "bf16", "eval_interval": None}
    config["checkpoint"] = {"interval": 2, "keep_last": None}
    ranks.run(jobs.pretrain_run, 2, config=config)
    folders = sorted((root / "run" / "checkpoints").iterdir())
    return folders, [tensors(folder) for folder in folders]


def averaged(folders, target, *options: str) -> dict[str, torch.Tensor]:
    assert main([*map(str, folders), "--out", str(target), "--quiet", *options]) == 0
    assert not verify(target).problems
    return tensors(target)


def mean(values: list[torch.Tensor], weights=(1.0, 1.0, 1.0)) -> torch.Tensor:
    """The mean in fp64, rounded once."""
    total = sum(value.double() * weight for value, weight in zip(values, weights, strict=False))
    return (total / sum(weights[: len(values)])).float()


def masters(name: str, sources: list[dict]) -> list[torch.Tensor]:
    return [source.get(state_name(MASTER, name), source[name]) for source in sources]


@pytest.mark.parametrize("options", [(), ("--weights", "1", "0.25", "3", "--moments")])
def test_it_is_torch_s_mean_bit_for_bit(options, three, tmp_path):
    folders, held = three
    found = averaged(folders, tmp_path / "out", *options)
    weights = (1.0, 0.25, 3.0) if options else (1.0, 1.0, 1.0)
    names = [name for name in held[0] if not name.startswith("optimizer.")]
    for name in names:
        expected = mean(masters(name, held), weights)
        assert torch.equal(found[name], expected.to(held[0][name].dtype)), name
        if (master := state_name(MASTER, name)) in held[0]:
            assert torch.equal(found[master], expected), name
    moments = [name for name in held[0] if "exp_avg" in name]
    assert len(moments) == 2 * len(names)
    assert {name for name in found if "exp_avg" in name} == (set(moments) if options else set())
    for name in moments if options else ():
        assert torch.equal(found[name], mean([source[name] for source in held], weights)), name


def test_the_mean_of_two_is_torch_s_in_fp32(three, tmp_path):
    folders, held = three
    for name, value in averaged(folders[:2], tmp_path / "out").items():
        if name.startswith(state_name(MASTER, "")):
            assert torch.equal(value, torch.stack([source[name] for source in held[:2]]).mean(0)), name


def test_the_newest_of_a_run(three, tmp_path):
    folders, _ = three
    run = folders[0].parent.parent
    last = averaged([run], tmp_path / "last", "--last", "2")
    named = averaged(folders[1:], tmp_path / "named")
    assert all(torch.equal(value, named[name]) for name, value in last.items())
    assert main([str(run), "--last", "4", "--out", str(tmp_path / "x"), "--quiet"]) == 78


def test_the_moving_average_of_a_run_is_torch_s_bit_for_bit(three, tmp_path, capsys):
    folders, held = three
    run, out = folders[0].parent.parent, tmp_path / "averages"
    options = [str(run), "--moving", "2", "--moments", "--out", str(out), "--quiet"]
    assert main(options) == 0
    assert sorted(path.name for path in out.iterdir()) == [folder.name for folder in folders[1:]]
    for newest, folder in enumerate(folders[1:], 1):
        pair = held[newest - 1 : newest + 1]
        for name, value in tensors(out / folder.name).items():
            values = (
                [source[name] for source in pair] if "exp_avg" in name else masters(name.rpartition("master/")[2], pair)
            )
            assert torch.equal(value, torch.stack(values).mean(0).to(value.dtype)), name
    shutil.rmtree(out / folders[1].name)
    kept = (out / folders[2].name / "index.json").stat().st_mtime_ns
    assert main(options) == 0 and (out / folders[1].name / "index.json").is_file(), "it adds what is missing"
    assert main(options) == 0 and "has all 2 averages" in capsys.readouterr().out
    assert (out / folders[2].name / "index.json").stat().st_mtime_ns == kept
    with pytest.raises(SystemExit) as ended:
        main([str(run), "--moving", "4", "--out", str(out)])
    assert (
        ended.value.code == 78 and "3 complete checkpoints, and an average of 4 is asked for" in capsys.readouterr().err
    )


def test_an_average_of_conversions_keeps_its_precision(tmp_path):
    folders = []
    for number, value in enumerate((0.5, 0.50390625)):  # neighbours in BF16, whose mean is none
        write_folder(tmp_path / f"hf{number}", BASE, dtype=torch.bfloat16)
        tensors_of = {
            name: x.bfloat16() for name, x in load_file(tmp_path / f"hf{number}" / "model.safetensors").items()
        }
        for name, tensor in tensors_of.items():
            if name.endswith("A_log"):
                tensor.fill_(value)
        save_file(tensors_of, tmp_path / f"hf{number}" / "model.safetensors", metadata={"format": "pt"})
        folders.append(tmp_path / f"ours{number}")
        assert to_ours(tmp_path / f"hf{number}", folders[-1]) == 0
    assert main([*map(str, folders), "--out", str(tmp_path / "mean"), "--quiet"]) == 0
    assert to_theirs(tmp_path / "mean", tmp_path / "out") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.linear_attn.A_log"]
    assert found.dtype == torch.float32 and (found == 0.501953125).all()


def test_it_trains_on_and_loads_in_transformers(three, ranks, tmp_path):
    from transformers import AutoModelForCausalLM

    folders, _ = three
    averaged(folders, tmp_path / "out", "--moments")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["state"]["updates"] == 2 and [a["weight"] for a in index["run"]["averaged"]] == [1.0, 1.0, 1.0]
    config = make_config(tmp_path)
    config["train"] |= {"steps": 3, "eval_interval": None, "dtype": "bf16"}
    config["checkpoint"] = {"init_from": str(tmp_path / "out"), "take": "moments"}
    (result, _) = ranks.run(jobs.pretrain_run, 2, config=config)
    assert result["progress"]["step"] == 3 and result["progress"]["updates"] == 5

    tokens = torch.randint(0, SMALLEST["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(3))
    assert to_theirs(tmp_path / "out", tmp_path / "export", "--dtype", "fp32") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager").eval()
    assert to_theirs(tmp_path / "out", tmp_path / "bf16") == 0
    (ours,) = ranks.run(convert_jobs.logits, 1, checkpoint=str(tmp_path / "out"), tokens=tokens)
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(ours["logits"][..., : SMALLEST["vocab_size"]], expected, rtol=0.02, atol=0.02)


def edited(folder, target, change) -> str:
    """A copy of a checkpoint with another index."""
    shutil.copytree(folder, target)
    edit_index(target, change)
    return str(target)


def other_model(index: dict) -> None:
    index["model"]["norm_eps"] = 0.1


def other_vocabulary(index: dict) -> None:
    index["state"]["vocabulary"] = {"ids": 97, "sha256": "b"}


def no_second_moments(index: dict) -> None:
    index["tensors"] = {name: entry for name, entry in index["tensors"].items() if "exp_avg_sq" not in name}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other_model, "model.norm_eps is 1e-06 in .* and 0.1 in .*only checkpoints of one model can be averaged"),
        (other_vocabulary, "the vocabulary .data.tokenizer. is .* their token ids mean other text"),
        (no_second_moments, "--moments: optimizer.exp_avg_sq/.* is not in both .*; leave it out"),
    ],
)
def test_inputs_that_do_not_match_are_refused(change, text, three, tmp_path, capsys):
    folders, _ = three
    first = edited(
        folders[0], tmp_path / "first", lambda index: index["state"].update(vocabulary={"ids": 97, "sha256": "a"})
    )
    other = edited(folders[1], tmp_path / "other", change)
    assert main([first, other, "--out", str(tmp_path / "out"), "--moments"]) == 78
    assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".converting*"))


def test_wrong_requests(three, tmp_path, capsys):
    folders, _ = three
    for arguments, text in (
        ([str(folders[0])], "1 checkpoint: an average needs at least two"),
        ([*map(str, folders), "--weights", "1", "2"], "--weights: 2 for 3 checkpoints"),
        ([*map(str, folders[:2]), "--weights", "1", "0"], "--weights: 0 is not a positive number"),
        ([str(folders[0]), str(tmp_path / "none")], "there is no such folder"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 78
        assert text in capsys.readouterr().err
