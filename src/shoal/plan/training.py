"""Time of a training step: computation, exposed communication and bubble, from shapes and stated assumptions."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import ModelConfig, UserError
from . import layout as layouts
from . import schedule as schedules
from .assumptions import Assumptions
from .communication import exchange
from .cost import (
    HIDDEN_PARTS,
    NEWTON_SCHULZ_STEPS,
    QUANTIZED_PARTS,
    Matrix,
    attention_matrices,
    flops_per_token,
    layer_matrices,
    main_matrices,
    mtp_matrices,
    mtp_projection,
    newton_schulz_flops,
)
from .elementwise import kernel_seconds, moved_values
from .hardware import Machine
from .layout import Layout, Stage
from .memory import Memory, device_memory, saved_values
from .timeline import StageCost, Timeline, simulate


@dataclass(frozen=True)
class PassTime:
    """Seconds of one micro-batch in one layer or stage: computing, and on the links."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    forward_exchange: float = 0.0
    backward_exchange: float = 0.0

    def __add__(self, other: PassTime) -> PassTime:
        return PassTime(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
            self.forward_exchange + other.forward_exchange,
            self.backward_exchange + other.backward_exchange,
        )

    @property
    def computing(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient

    @property
    def exchanging(self) -> float:
        return self.forward_exchange + self.backward_exchange

    def stage_cost(self, overlaps: bool, sm_share: float) -> StageCost:
        """Alone, exchanges are exposed; in an overlapped pair they hide, and the computation gives up `sm_share` of its processors."""
        pair = None
        if overlaps:
            slowed = self.computing / (1 - sm_share) if self.exchanging else self.computing
            pair = max(slowed, self.exchanging)
        return StageCost(
            self.forward + self.forward_exchange, self.input_gradient + self.backward_exchange, self.weight_gradient, overlapped=pair
        )


@dataclass(frozen=True)
class Step:
    """One training step of a plan. Times in seconds, memory in bytes, per device where not said otherwise."""

    layout: Layout
    batch: int
    sequence_length: int
    stages: list[Stage]
    timeline: Timeline
    seconds: float
    computing: float
    """Mean over devices: matrix products, attention, memory-bound work, without what overlapping adds."""
    exposed: float
    """Mean over devices: expert exchange that is not hidden, and computation slowed down by hiding it."""
    bubble: float
    """Mean idle time of devices in the pipeline."""
    gradient_exchange: float
    optimizer: float
    memory: Memory
    """Of the fullest device."""
    flops_per_token: float

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.tokens / self.seconds

    @property
    def flops_per_device(self) -> float:
        """Sustained FLOP/s of one device, useful work only."""
        return self.flops_per_token * self.tokens_per_second / self.layout.devices

    def device_hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_second * self.layout.devices / 3600


def layer_time(
    model: ModelConfig, moe: bool, module: bool, machine: Machine, layout: Layout, tokens: int, context: float, a: Assumptions
) -> PassTime:
    """One decoder layer over a micro-batch of `tokens` that attend to `context` others on average; `module`: with MTP's projection."""
    value_bytes = layout.value_bytes
    bandwidth = a.bandwidth(machine)
    plain = "fp32" if layout.precision == "fp32" else "bf16"
    products = weights_read = 0.0
    matrices = layer_matrices(model, moe)
    if module:
        matrices.append(mtp_projection(model))
    for matrix in matrices:
        numbers = layout.precision if matrix.part in QUANTIZED_PARTS else plain
        local, rows, imbalance = matrix.stored, float(tokens), 1.0
        if matrix.part == "routed_experts":
            local = matrix.stored // layout.expert
            rows = tokens * matrix.active / matrix.stored * layout.expert
            imbalance = a.expert_imbalance if layout.expert > 1 else 1.0
        work = 2 * tokens * matrix.active * matrix.size * imbalance
        # a product takes as long as its arithmetic or as reading its weights, whichever is slower
        reading = local * matrix.size * layout.product_bytes / bandwidth
        products += max(work / a.product_rate(machine, numbers, rows, matrix), reading)
        updating = local * matrix.size * 8 / bandwidth  # FP32 gradients are read, added to and written
        weights_read += max(work / a.product_rate(machine, numbers, rows, matrix, weight_gradient=True), updating)
    attention = 2 * tokens * model.num_attention_heads * (model.qk_head_dim + model.value_head_dim) * context
    attention /= a.attention_rate(machine, layout.precision, (model.qk_head_dim + model.value_head_dim) // 2)
    if machine.sustained and machine.sustained.precision == layout.precision:
        both = tokens * kernel_seconds(model, moe, machine.sustained)
        elementwise, elementwise_backward = both / 3, both * 2 / 3
    else:
        forward_values, backward_values = moved_values(model, moe, layout.precision)
        elementwise = tokens * forward_values * value_bytes / bandwidth
        elementwise_backward = tokens * backward_values * value_bytes / bandwidth
    forward = products + attention + elementwise
    again = 0.0
    if layout.recompute == "full":
        again = forward
    elif layout.recompute == "selective":
        kept = saved_values(model, moe)
        rebuilt = [m for m in attention_matrices(model) if m.name in ("q_b_proj", "kv_b_proj")]
        again = sum(2 * tokens * m.size / a.product_rate(machine, layout.precision, tokens, m) for m in rebuilt)
        again += tokens * (2 * kept["norms"] + 1.5 * kept["gate_up"]) * value_bytes / bandwidth
    backward = products + 2 * attention + elementwise_backward + again
    there = back = 0.0
    if moe and layout.expert > 1:
        dispatched = "fp8" if layout.precision == "fp8" else layout.precision
        combined = "fp32" if layout.precision == "fp32" else "bf16"
        trips = [
            exchange(model, layout.expert, machine, number_format, layout.two_hop, a.link_efficiency).seconds * tokens
            for number_format in (dispatched, combined)
        ]
        there = back = sum(trips)  # the gradient of a combine is a dispatch, and the other way round
        if layout.recompute == "full":
            back += there
    if layout.zero == 3 and layout.data > 1:
        # FSDP gathers a layer's weights for either pass and scatters its gradients, prefetched: what computing hides is free
        moved = 0.0
        for matrix in layer_matrices(model, moe):
            share = layout.expert if matrix.part == "routed_experts" else 1
            copies = layout.data // share
            moved += matrix.stored / share * matrix.size * (copies - 1) / copies
        rate = _data_parallel_rate(machine, layout) * a.link_efficiency
        there += max(0.0, moved * layout.product_bytes / rate - forward)
        back += max(0.0, moved * (layout.product_bytes + 4) / rate - backward - weights_read)
    return PassTime(forward, backward, weights_read, there, back)


def _data_parallel_rate(machine: Machine, layout: Layout) -> float:
    """Bytes per second and device between data-parallel ranks, over the slowest link that they span."""
    inside = layout.devices <= machine.devices_per_node
    rate = machine.intra_node_gb_s if inside else machine.inter_node_gb_s
    if rate <= 0:
        raise UserError(f"data-parallel ranks need a link, and {machine.name} has none: state its rate, or use one device")
    return rate * 1e9


def head_time(model: ModelConfig, machine: Machine, layout: Layout, tokens: int, a: Assumptions) -> PassTime:
    """The output head and the loss over `tokens` predictions; the head stays in BF16 (or FP32) in FP8 training."""
    plain = "fp32" if layout.precision == "fp32" else "bf16"
    head = Matrix("head", "lm_head", model.vocab_size, model.hidden_size)
    rows, work = min(a.loss_chunk, tokens), 2 * tokens * head.size
    product = work / a.product_rate(machine, plain, rows, head)
    weights = work / a.product_rate(machine, plain, rows, head, weight_gradient=True)
    softmax = 2 * tokens * model.vocab_size * 4 / a.bandwidth(machine)  # FP32 logits are read and written once in either pass
    if machine.sustained and machine.sustained.precision == layout.precision:
        softmax = tokens * model.vocab_size / machine.sustained.softmax / 2
    return PassTime(product + softmax, product + softmax, weights)


def plan_step(
    model: ModelConfig, machine: Machine, layout: Layout, batch: int, sequence_length: int = 4096, assumptions: Assumptions | None = None
) -> Step:
    """Predict one training step of `batch` sequences.

    Raises `UserError` if the layout cannot run; whether it fits the memory is for the caller to compare (`fits`).
    """
    a = assumptions or Assumptions()
    wrong = layouts.problem(model, machine, layout, batch)
    if wrong:
        raise UserError(wrong)
    tokens = layout.micro_batch * sequence_length
    context = (sequence_length + 1) / 2
    modules = range(model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers)
    kinds = {(model.is_moe_layer(number), number in modules) for number in range(modules.stop)}
    by_kind = {(moe, module): layer_time(model, moe, module, machine, layout, tokens, context, a) for moe, module in kinds}

    def layer(number: int) -> PassTime:
        return by_kind[model.is_moe_layer(number), number in modules]

    head = head_time(model, machine, layout, tokens, a)
    tail = PassTime()
    for module in modules:
        tail = tail + layer(module) + head
    count = schedules.stages_of(layout.pipeline_schedule, layout.pipeline, layout.chunks)
    costs = [layer(number).computing for number in range(model.num_hidden_layers)]
    stages = layouts.partition(model, count, costs, tail.computing + head.computing)

    times = []
    for stage in stages:
        time = PassTime()
        for number in stage.layers:
            time = time + layer(number)
        times.append(time)
    for _ in range(1 + len(modules)):
        times[-1] = times[-1] + head
    overlaps = layout.pipeline_schedule in ("dualpipe", "dualpipev")
    stage_costs = [time.stage_cost(overlaps, a.communication_sm_share if machine.devices_per_node > 1 else 0.0) for time in times]

    transfer = 0.0
    if layout.pipeline > 1:
        link = machine.inter_node_gb_s if layout.devices > machine.devices_per_node else machine.intra_node_gb_s
        if link <= 0:
            raise UserError(f"pipeline stages need a link between devices, and {machine.name} has none: state its rate, or use PP 1")
        transfer = tokens * model.hidden_size * layout.value_bytes / (link * 1e9 * a.link_efficiency)
    microbatches = layout.microbatches(batch)
    timeline = simulate(schedules.build(layout.pipeline_schedule, layout.pipeline, microbatches, layout.chunks), stage_costs, transfer)

    devices = layout.pipeline
    computing = microbatches * sum(time.computing for time in times) / devices
    busy = sum(timeline.busy(device) for device in range(devices)) / devices
    memory, update, synchronising = _worst_device(model, machine, layout, stages, timeline, tokens, a)
    return Step(
        layout=layout,
        batch=batch,
        sequence_length=sequence_length,
        stages=stages,
        timeline=timeline,
        seconds=timeline.makespan + synchronising + update,
        computing=computing,
        exposed=max(busy - computing, 0.0),  # the same times, added in another order, may differ by a rounding
        bubble=max(timeline.makespan - busy, 0.0),
        gradient_exchange=synchronising,
        optimizer=update,
        memory=memory,
        flops_per_token=flops_per_token(model, sequence_length, training=True).total,
    )


def _worst_device(
    model: ModelConfig, machine: Machine, layout: Layout, stages: list[Stage], timeline: Timeline, tokens: int, a: Assumptions
) -> tuple[Memory, float, float]:
    """(memory of the fullest device, seconds of the slowest optimizer step, of the slowest gradient exchange)."""
    memories, updates, exchanges = [], [], []
    plan = timeline.schedule
    for device, row in enumerate(plan.rows):
        held = sorted({p.stage for action in row for p in action})
        in_flight = timeline.peak_activations(device) / len(held)
        mine = [stages[s] for s in held]
        memory = device_memory(model, layout, mine, in_flight, tokens, a.loss_chunk, plan.replicas)
        if machine.is_cpu:
            memory = replace(memory, heap=(a.heap_overhead - 1) * memory.total)
        memories.append(memory)
        # clipping reads gradients, and reads and writes them; the optimizer reads them, reads and writes its states and the
        # weights that it updates, and writes those that products read
        own = memory.master_weights or memory.weights
        touched = 4 * memory.gradients + 2 * (own + memory.optimizer) + (memory.weights if memory.master_weights else 0)
        updates.append(touched / a.bandwidth(machine))
        exchanges.append(_gradient_exchange(model, machine, layout, mine, plan.replicas, a))
    update = max(updates)
    if layout.optimizer == "muon":
        # every matrix is orthogonalised once; data-parallel ranks share that work with the optimizer states
        sharing = layout.devices if layout.zero else layout.pipeline
        precision = "fp32" if layout.precision == "fp32" else "bf16"
        update += orthogonalisation_seconds(model, machine, precision, a) / sharing
    return max(memories, key=lambda memory: memory.total), update, max(exchanges)


def orthogonalisation_seconds(model: ModelConfig, machine: Machine, precision: str, a: Assumptions) -> float:
    """Muon's Newton-Schulz iterations on all hidden matrices, on one device."""
    matrices = (matrix for matrix in (*main_matrices(model), *mtp_matrices(model)) if matrix.part in HIDDEN_PARTS)
    return sum(
        matrix.stored
        * newton_schulz_flops(matrix.out_features, matrix.in_features, NEWTON_SCHULZ_STEPS)
        / a.newton_schulz_rate(machine, precision, matrix)
        for matrix in matrices
    )


def _gradient_exchange(model: ModelConfig, machine: Machine, layout: Layout, stages: list[Stage], replicas: int, a: Assumptions) -> float:
    """Seconds to sum FP32 gradients and to spread new weights over data-parallel ranks once a step, nothing of it hidden.

    A ring over all copies moves (n - 1) / n of the data in each of the two phases. FSDP does both for every micro-batch
    instead (see `layer_time`).
    """
    moved = 0.0
    for stage in stages if layout.zero < 3 else []:
        replicated, experts = layouts.stage_parameters(model, stage)
        data = layout.data * replicas
        for count, copies in ((replicated, data), (experts / layout.expert, data // layout.expert)):
            moved += count * (4 + max(2, layout.product_bytes)) * (copies - 1) / copies
    return moved / (_data_parallel_rate(machine, layout) * a.link_efficiency) if moved else 0.0


def usable_memory(machine: Machine, assumptions: Assumptions) -> float:
    """Bytes of a device that a plan may fill."""
    return machine.memory_bytes * (1 - assumptions.memory_reserve)


def fits(step: Step, machine: Machine, assumptions: Assumptions) -> bool:
    return step.memory.total <= usable_memory(machine, assumptions)
