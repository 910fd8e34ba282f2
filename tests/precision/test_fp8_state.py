"""State of delayed scaling from step to step, in modules that keep it as Transformer Engine's do."""

from types import SimpleNamespace

import torch

from megatron_hybrid.precision.fp8_state import Fp8State

HISTORY = 4


class Scaled(torch.nn.Module):
    """Keeps fp8_meta as Transformer Engine's modules do: three tensors a matrix product forward, two backward."""

    recipe = SimpleNamespace(delayed=lambda: True)

    def __init__(self, products: int):
        super().__init__()
        self.products, self.fp8_meta = products, {}

    def init_fp8_meta_tensors(self, recipe) -> None:
        assert recipe is self.recipe
        for direction, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            count = tensors * self.fp8_meta["num_gemms"]
            state = SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(HISTORY, count))
            self.fp8_meta[direction] = state

    def train_a_step(self, seed: int) -> None:
        self.fp8_meta["num_gemms"] = self.products
        self.init_fp8_meta_tensors(self.recipe)
        generator = torch.Generator().manual_seed(seed)
        for direction in ("scaling_fwd", "scaling_bwd"):
            for tensor in vars(self.fp8_meta[direction]).values():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))


class Unscaled(torch.nn.Module):
    """Scales from the tensor at hand: its state has no history."""

    recipe = None

    def __init__(self):
        super().__init__()
        self.fp8_meta = {"scaling_fwd": SimpleNamespace(), "recipe": SimpleNamespace(delayed=lambda: False)}


def chunk(*numbers: int):
    """A model chunk of these layers (from 1), each with a linear of one product and an attention of three."""
    layers = []
    for number in numbers:
        layer = torch.nn.Module()
        layer.layer_number, layer.linear, layer.attention, layer.other = number, Scaled(1), Scaled(3), Unscaled()
        layers.append(layer)
    config = SimpleNamespace(fp8=None, fp8_recipe="tensorwise")
    return SimpleNamespace(decoder=SimpleNamespace(layers=layers), config=config)


def test_names_are_the_same_wherever_the_layer_lies():
    first = chunk(3, 4)
    for number, layer in enumerate(first.decoder.layers):
        layer.linear.train_a_step(number)
    assert set(Fp8State([first]).tensors()) == {
        f"fp8/layers.{layer}.linear/{direction}.{value}"
        for layer in (2, 3)
        for direction in ("scaling_fwd", "scaling_bwd")
        for value in ("scale", "amax_history")
    }


def test_nothing_before_the_first_step():
    assert Fp8State([chunk(1)]).tensors() == {}


def test_restored_under_another_pipeline():
    whole = chunk(1, 2)
    for number, layer in enumerate(whole.decoder.layers):
        layer.linear.train_a_step(10 * number)
        layer.attention.train_a_step(10 * number + 1)
    saved = {name: tensor.clone() for name, tensor in Fp8State([whole]).tensors().items()}
    for stage in (chunk(1), chunk(2)):
        state = Fp8State([stage])
        state.restore(saved.get)
        restored = state.tensors()
        assert len(restored) == 8
        for name, tensor in restored.items():
            assert torch.equal(tensor, saved[name]), name
        assert stage.decoder.layers[0].attention.fp8_meta["num_gemms"] == 3


def test_a_checkpoint_without_them_starts_anew():
    fresh = chunk(1)
    Fp8State([fresh]).restore(lambda name: None)
    assert Fp8State([fresh]).tensors() == {}


def test_a_history_of_another_length_starts_anew_and_the_scales_stay():
    old, new = chunk(1), chunk(1)
    old.decoder.layers[0].linear.train_a_step(0)
    saved = dict(Fp8State([old]).tensors())
    short = {name: tensor[:2] if name.endswith("amax_history") else tensor for name, tensor in saved.items()}
    Fp8State([new]).restore(short.get)
    forward = new.decoder.layers[0].linear.fp8_meta["scaling_fwd"]
    assert torch.equal(forward.scale, saved["fp8/layers.0.linear/scaling_fwd.scale"])
    assert not forward.amax_history.any()
