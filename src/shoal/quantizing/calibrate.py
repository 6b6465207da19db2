"""Quantization with calibration: layer by layer, each matrix with a view to the inputs it gets from the layers quantized before it.

One layer is in memory at a time, with the hidden states of all calibration tokens.

Shapes: S sequences of T tokens, D model width, H heads, N non-rotary channels of a query head, R latent width, E experts, F expert width,
K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import ModelConfig
from ..formats.packing import BITS, pack, pack_grouped, read_whole
from ..formats.parts import EMBEDDING, HEAD, Part, arrays_of, join_kv_up
from ..formats.weight_files import WeightFiles
from ..kernels.packed import PackedMatrix, unpack
from ..model import GQA, MLA, Context, LocalDispatcher, MoE
from ..model.block import Block
from ..model.layers import RMSNorm, SwiGLU
from ..model.rope import rotary_tables
from ..numerics.second_order import output_error, quantize_for_inputs
from .moments import MeanMoment, mean_moment, weighted_moment
from .report import Settled

BATCH_TOKENS = 4096
"""Tokens that pass through a layer at once."""
STACK_BYTES = 1 << 27
"""Second moments of experts that are in memory at once."""
SAMPLE = 512
"""Tokens, spread over all calibration data, from which an expert that saw few of its own borrows what inputs look like."""
BORROWED = 32
"""The weight of what an expert borrows, in tokens."""

Parts = dict[str, PackedMatrix | Tensor]
LOOKED_UP = ("model.counted.", "model.repeats.")
"""What no token multiplies with."""


@dataclass
class Calibration:
    """Quantizes the layers of one model in turn."""

    files: WeightFiles
    config: ModelConfig
    plan: dict[str, Part]
    ids: Tensor
    """`[S, T]`."""
    settled: Callable[[Settled], None]
    done: Parts = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[str, PackedMatrix | Tensor]]:
        """Every part in the order of the plan. The hidden states of all tokens advance by a layer before its parts are given out."""
        embedding = self._whole(EMBEDDING)
        self._keep(EMBEDDING, embedding)
        states = nn.functional.embedding(self.ids, embedding)
        del embedding
        positions = torch.arange(self.ids.shape[1])[None]
        tables = rotary_tables(self.config, positions)
        contexts = [Context(positions, *tables, ids=ids) for ids in batches(self.ids)]
        for name in self.plan:
            if name.startswith(LOOKED_UP):
                self._keep(name, self._whole(name))
        order = iter(self.plan)
        pending = next(order, None)
        for layer in range(self.config.num_hidden_layers):
            self._layer(layer, states, contexts)
            while pending in self.done:
                assert pending is not None
                yield pending, self.done.pop(pending)
                pending = next(order, None)
        # What is left: multi-token prediction layers, the final norm, the head.
        while pending is not None:
            if pending == HEAD:
                norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
                norm.weight.data.copy_(self._whole("model.norm.weight"))
                self._settle(HEAD, self._whole(HEAD), mean_moment(norm(rows) for rows in batches(states)))
            else:
                self._keep(pending, self._whole(pending))
            yield pending, self.done.pop(pending)
            pending = next(order, None)

    def _layer(self, layer: int, states: Tensor, contexts: list[Context]) -> None:
        """Quantize layer `layer` and replace `states [S, T, D]` by its outputs."""
        prefix = f"model.layers.{layer}"
        with torch.device("meta"):
            block = Block(self.config, layer, LocalDispatcher())
        block.input_layernorm.weight = self._parameter(f"{prefix}.input_layernorm.weight")
        block.post_attention_layernorm.weight = self._parameter(f"{prefix}.post_attention_layernorm.weight")
        if block.self_attn.value_embedding is not None:
            block.self_attn.value_embedding.weight = self._parameter(f"{prefix}.self_attn.value_embedding.weight")
        if isinstance(block.self_attn, MLA):
            self._latent_attention(f"{prefix}.self_attn", block.self_attn, block.input_layernorm, states, contexts)
        else:
            self._grouped_attention(f"{prefix}.self_attn", block.self_attn, block.input_layernorm, states, contexts)
        for rows, context in zip(batches(states), contexts, strict=True):
            rows += block.self_attn(block.input_layernorm(rows), context)
        if isinstance(block.mlp, MoE):
            self._mixture(f"{prefix}.mlp", block.mlp, block.post_attention_layernorm, states)
        else:
            self._feed_forward(f"{prefix}.mlp", block.mlp, block.post_attention_layernorm, states)
        for rows in batches(states):
            out = block.mlp(block.post_attention_layernorm(rows))
            rows += out[0] if isinstance(out, tuple) else out

    def _latent_attention(self, name: str, attention: MLA, norm: RMSNorm, states: Tensor, contexts: list[Context]) -> None:
        moment = mean_moment(norm(rows) for rows in batches(states))
        self._linear(f"{name}.kv_a_proj_with_mqa", attention.kv_a_proj_with_mqa, moment)
        attention.kv_a_layernorm.weight = self._parameter(f"{name}.kv_a_layernorm.weight")
        if attention.compresses_query:
            self._linear(f"{name}.q_a_proj", attention.q_a_proj, moment)
            attention.q_a_layernorm.weight = self._parameter(f"{name}.q_a_layernorm.weight")
            compressed = (attention.q_a_layernorm(attention.q_a_proj(norm(rows))) for rows in batches(states))
            self._linear(f"{name}.q_b_proj", attention.q_b_proj, mean_moment(compressed))
        else:
            self._linear(f"{name}.q_proj", attention.q_proj, moment)
        queries, mixtures = MeanMoment(), MeanMoment()
        for rows, context in zip(batches(states), contexts, strict=True):
            query, latent, key_rope = attention.project(norm(rows), context)
            queries.add(query[..., : attention.nope].flatten(0, 1).transpose(0, 1))
            key_up = self._whole(f"{name}.k_up")  # [H, R, N]: the true one, that of this layer's own attention
            key_nope = torch.einsum("btr,hrn->bthn", latent, key_up)
            key = torch.cat([key_nope, key_rope.expand(-1, -1, attention.heads, -1)], dim=-1)
            value = latent.unsqueeze(2).expand(-1, -1, attention.heads, -1)
            mixed = kernels.causal_attention(query, key, value, attention.scale)
            mixtures.add(mixed.flatten(0, 1).transpose(0, 1))
        key_up = self._settle(f"{name}.k_up", self._whole(f"{name}.k_up"), queries.value())
        value_up = self._settle(f"{name}.v_up", self._whole(f"{name}.v_up"), mixtures.value())
        attention.kv_b_proj.weight = parameter(join_kv_up(key_up, value_up))
        pairs = zip(batches(states), contexts, strict=True)
        outputs = (attention.expanded(*attention.project(norm(rows), context)) for rows, context in pairs)
        self._linear(f"{name}.o_proj", attention.o_proj, mean_moment(outputs))

    def _grouped_attention(self, name: str, attention: GQA, norm: RMSNorm, states: Tensor, contexts: list[Context]) -> None:
        moment = mean_moment(norm(rows) for rows in batches(states))
        for part in ("q_proj", "k_proj", "v_proj"):
            self._linear(f"{name}.{part}", getattr(attention, part), moment)
        outputs = MeanMoment()
        o_proj = attention.o_proj
        attention.o_proj = Listener(outputs)  # type: ignore[assignment]
        for rows, context in zip(batches(states), contexts, strict=True):
            attention(norm(rows), context)
        attention.o_proj = o_proj
        self._linear(f"{name}.o_proj", o_proj, outputs.value())

    def _feed_forward(self, name: str, mlp: SwiGLU, norm: Callable[[Tensor], Tensor], states: Tensor) -> None:
        moment = mean_moment(norm(rows) for rows in batches(states))
        self._linear(f"{name}.gate_proj", mlp.gate_proj, moment)
        self._linear(f"{name}.up_proj", mlp.up_proj, moment)
        inner = (kernels.swiglu(mlp.gate_proj(x), mlp.up_proj(x)) for x in map(norm, batches(states)))
        self._linear(f"{name}.down_proj", mlp.down_proj, mean_moment(inner))

    def _mixture(self, name: str, mlp: MoE, norm: RMSNorm, states: Tensor) -> None:
        mlp.gate.weight = self._parameter(f"{name}.gate.weight")
        bias = f"{name}.gate.e_score_correction_bias"
        if bias in self.plan:
            mlp.gate.e_score_correction_bias = self._whole(bias)
            self._keep(bias, mlp.gate.e_score_correction_bias)
        if mlp.shared_experts is not None:
            self._feed_forward(f"{name}.shared_experts", mlp.shared_experts, norm, states)
        routed = [mlp.gate(norm(rows))[:2] for rows in batches(states)]
        weights, chosen = (torch.cat([batch[i].flatten(0, 1) for batch in routed]) for i in (0, 1))  # [S * T, K]
        tokens = states.flatten(0, 1)
        spread = norm(tokens[:: max(1, len(tokens) // SAMPLE)])
        parts = {part: f"{name}.experts.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
        targets = {part: self.plan[full].empty() for part, full in parts.items()}
        plain = {part: self._whole(full) for part, full in parts.items()}  # [E, O, I]
        width = max(self.config.hidden_size, self.config.moe_intermediate_size)
        step = max(1, STACK_BYTES // (4 * width * width))
        errors: dict[str, list[tuple[float, float]]] = {part: [] for part in parts}
        for start in range(0, len(plain["gate_proj"]), step):
            experts = range(start, min(start + step, len(plain["gate_proj"])))
            seen = [self._seen_by(e, tokens, weights, chosen, norm) for e in experts]
            typical = mean_moment([spread])
            moment = torch.stack([weighted_moment(x, w, typical, BORROWED) for x, w in seen])
            for part in ("gate_proj", "up_proj"):
                self._settle_experts(parts[part], part, experts, plain, targets, moment, errors)
            inner = []
            for e, (x, w) in zip(experts, seen, strict=True):
                gate, up = plain["gate_proj"][e], plain["up_proj"][e]
                middle, usual = (kernels.swiglu(rows @ gate.T, rows @ up.T) for rows in (x, spread))
                inner.append(weighted_moment(middle, w, mean_moment([usual]), BORROWED))
            self._settle_experts(parts["down_proj"], "down_proj", experts, plain, targets, torch.stack(inner), errors)
        for part, full in parts.items():
            self.done[full] = self.plan[full].assemble(targets[part])
            setattr(mlp.experts, part, parameter(plain[part]))
            self._record(full, plain[part].numel(), *(sum(values) / len(values) for values in zip(*errors[part], strict=True)))

    def _seen_by(self, expert: int, tokens: Tensor, weights: Tensor, chosen: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """Inputs `[n, D]` of an expert, and how much the layer's output minds an error of the expert's for each: its squared share."""
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        return norm(tokens[rows]), weights[rows, places].square()

    def _settle_experts(
        self,
        name: str,
        part: str,
        experts: range,
        plain: dict[str, Tensor],
        targets: dict[str, dict[str, Tensor]],
        moment: Tensor,
        errors: dict[str, list[tuple[float, float]]],
    ) -> None:
        """Quantize some experts of a stack; what they stand for then replaces them in `plain`."""
        here = slice(experts.start, experts.stop)
        weight = plain[part][here]
        packed, back = self._quantized(weight, moment, name)
        for field_, array in arrays_of(packed).items():
            targets[part][field_][here] = array
        difference = (back - weight).square().sum((-2, -1)) / weight.square().sum((-2, -1)).clamp_min(1e-30)
        errors[part] += zip(difference.tolist(), output_error(weight, back, moment).tolist(), strict=True)
        plain[part][here] = back

    # Single matrices and small tensors

    def _whole(self, name: str) -> Tensor:
        return read_whole(self.files, name, self.config)

    def _keep(self, name: str, tensor: Tensor) -> None:
        """Pack a part without looking at inputs."""
        part = self.plan[name]
        packed = pack(tensor, part)
        self.done[name] = packed
        if isinstance(packed, PackedMatrix) and part.format in BITS:
            self._record(name, tensor.numel(), weight_error(tensor, unpack(packed)), None)

    def _parameter(self, name: str) -> nn.Parameter:
        """A small tensor, which is kept as it is."""
        tensor = self._whole(name)
        self._keep(name, tensor)
        return parameter(tensor)

    def _settle(self, name: str, weight: Tensor, moment: Tensor) -> Tensor:
        """Quantize `weight [..., O, I]` for inputs of this moment; returns what it then stands for."""
        packed, back = self._quantized(weight, moment, name)
        self.done[name] = packed
        self._record(name, weight.numel(), weight_error(weight, back), float(output_error(weight, back, moment).mean()))
        return back

    def _linear(self, name: str, linear: nn.Module, moment: Tensor) -> None:
        """Quantize a linear layer of a block and give it the weights that it then has."""
        linear.weight = parameter(self._settle(name, self._whole(name), moment))
        if f"{name}.bias" in self.plan:
            linear.bias = self._parameter(f"{name}.bias")

    def _quantized(self, weight: Tensor, moment: Tensor, name: str) -> tuple[PackedMatrix, Tensor]:
        part = self.plan[name]
        if part.format not in BITS:
            floats = pack(weight, part)
            assert isinstance(floats, PackedMatrix)
            return floats, unpack(floats)
        packed = pack_grouped(quantize_for_inputs(weight, moment, BITS[part.format], part.group))
        return packed, unpack(packed)

    def _record(self, name: str, weights: int, weight_error: float, output_error: float | None) -> None:
        part = self.plan[name]
        self.settled(Settled(name, part.format, weights, part.nbytes, weight_error, output_error))


class Listener(nn.Module):
    """Stands in for a layer whose inputs are wanted."""

    def __init__(self, moment: MeanMoment) -> None:
        super().__init__()
        self.moment = moment

    def forward(self, x: Tensor) -> Tensor:
        self.moment.add(x.flatten(0, -2))
        return x


def batches(states: Tensor) -> Iterator[Tensor]:
    """Views of whole sequences `[s, T, D]`, about `BATCH_TOKENS` tokens each."""
    yield from states.split(max(1, BATCH_TOKENS // states.shape[1]))


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def weight_error(weight: Tensor, back: Tensor) -> float:
    """Squared error as a share of the squares."""
    return float((back - weight).square().sum() / weight.square().sum().clamp_min(1e-30))
