"""The torch module of the leaky average."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hybrid.mixers.initial_values import DISTRIBUTIONS
from megatron_hybrid.mixers.mixer import Mixer

from .spec import parameters, sizes

DISTRIBUTIONS["leaky_decay"] = lambda value, arguments, std, generator: value.uniform_(*arguments, generator=generator)


def module_spec(model, block, backend, linears) -> ModuleSpec:
    """Return the spec of the mixer."""
    return ModuleSpec(module=LeakyMixer, params=dict(leaky=sizes(model), linears=linears))


class LeakyMixer(Mixer):
    """The mixer of one layer, on this rank's heads."""

    def __init__(
        self,
        config,
        layer_number,
        pg_collection=None,
        *,
        leaky,
        linears,
        cp_comm_type=None,
        pp_layer_offset=None,
        name=None,
    ):
        super().__init__(config, layer_number, pg_collection, parameters(leaky, config.hidden_size))
        self.head_dim, ranks = leaky.head_dim, self.tp_group.size()
        width, _ = self.packing["in_proj.weight"].rank_sizes(ranks)
        linear = dict(config=config, bias=False, skip_bias_add=False, is_expert=False, tp_group=self.tp_group)
        column = dict(init_method=config.init_method, gather_output=False, tp_comm_buffer_name="qkv")
        row = dict(init_method=config.output_layer_init_method, input_is_parallel=True, tp_comm_buffer_name="proj")
        self.in_proj = linears.input(config.hidden_size, 2 * width * ranks, **column, **linear)
        self.out_proj = linears.output(width * ranks, config.hidden_size, **row, **linear)
        self.decay = self.new_parameter("decay")
        self.finish()

    def mix(self, hidden_states, rotary_pos_emb, documents):
        x, gate = self.in_proj(hidden_states)[0].chunk(2, dim=-1)
        a = torch.sigmoid(self.decay).repeat_interleave(self.head_dim).to(x.dtype)
        state, outputs = torch.zeros_like(x[0]), []
        for token in x:
            state = a * state + (1 - a) * token
            outputs.append(state)
        return self.out_proj(torch.stack(outputs) * F.silu(gate))
