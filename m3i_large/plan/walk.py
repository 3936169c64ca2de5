"""One micro-step of the real objective on meta tensors: what is computed, what is alive, which parameters are used.

Nothing is calculated, so a billion parameters take seconds on a laptop; but every operator runs, forward and backward,
so shapes must fit, and FLOPs, live bytes and the order of modules are those of the code that trains.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from m3i_large.build import blocks_entered_once, build_objective, transformer_blocks
from m3i_large.data.batch import Batch
from m3i_large.objective import Objective
from m3i_large.objective.cached import chunks, couple, replay, survey
from m3i_large.plan.batch import meta_batch
from m3i_large.plan.operators import SavingAttention, operator_flops, workspace_bytes
from m3i_large.recipe import Recipe

LOSSES = "losses"


@dataclass(frozen=True)
class Visit:
    """One fetch or release of a module's parameters, as ZeRO-3's hooks do it."""

    fetch: bool
    module: int
    parameters: tuple[str, ...]


@dataclass
class Phase:
    """A kind of work of a micro-step: everything at once (`direct`), or `survey`, `couple`, `replay` of chunks.

    Attributes:
        peak: most bytes alive at once; without parameters, their gradients and the batch.
        visits: of one pass, in order, for ZeRO-3.
    """

    peak: int = 0
    visits: list[Visit] = field(default_factory=list)


@dataclass
class Walk:
    """What a walk saw.

    Attributes:
        rows: of the micro-batch.
        chunk: rows of a pass; None: all at once.
        phases: by name, in order.
        phase: the one that runs.
        operators: calls.
        forward, backward, recomputed: FLOPs by part of the objective; `losses` is what belongs to no tower or head.
        surveyed: FLOPs that `survey` takes for the vectors, which `replay` computes again; by part.
        kept: bytes alive between forward and backward, in chunks: of the last one's replay.
        batch: bytes of the batch.
        gradients: names of trained parameters in the order in which their gradients are ready, of one backward pass.
        exchanged: bytes that this rank receives or reduces in the objective's own collectives, by kind.
    """

    rows: int
    chunk: int | None = None
    phases: dict[str, Phase] = field(default_factory=dict)
    phase: Phase = field(default_factory=Phase)
    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    recomputed: Counter[str] = field(default_factory=Counter)
    surveyed: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    batch: int = 0
    operators: int = 0
    gradients: list[str] = field(default_factory=list)
    exchanged: Counter[str] = field(default_factory=Counter)

    @property
    def peak(self) -> int:
        """Most bytes alive at once in any phase."""
        return max(phase.peak for phase in self.phases.values())

    def enter(self, name: str) -> None:
        """Begins a pass; what an earlier one of its kind visited was the same."""
        self.phase = self.phases.setdefault(name, Phase())
        self.phase.visits.clear()
        self.gradients.clear()

    @property
    def passes(self) -> list[tuple[int, list[Visit]]]:
        """Kinds of passes through the modules, in order: how many of each, and what one visits."""
        num = self.rows // (self.chunk or self.rows)
        return [(num, phase.visits) for phase in self.phases.values() if phase.visits]


def walk(recipe: Recipe, *, rows: int, world: int, checkpointing: bool | None = None, chunk: int | None = None) -> Walk:
    """Forward and backward of one micro-batch of `rows` rows on one of `world` ranks.

    Args:
        checkpointing: recompute activations; None: as the recipe says.
        chunk: rows of a pass, which divide `rows`; None: all at once (the recipe's own choice plays no part).
    """
    seen = Walk(rows, chunk)
    objective = build_on_meta(recipe, collectives=_Ranks(world, seen.exchanged))
    watch = Watch(seen)
    if recipe.train.activation_checkpointing if checkpointing is None else checkpointing:
        for block in transformer_blocks(objective, frozen=False):
            _recompute(block, watch)
    batch = meta_batch(recipe, rows)
    seen.batch = sum(x.nbytes for x in vars(batch).values() if isinstance(x, Tensor))
    watch.leave_out([*objective.parameters(), *objective.buffers(), *vars(batch).values()])
    _attach(objective, seen, watch)
    with watch:
        if chunk is None:
            _walk_at_once(objective, batch, seen, watch)
        else:
            _walk_in_chunks(objective, batch, seen, watch)
    return seen


def _walk_at_once(objective: Objective, batch: Batch, seen: Walk, watch: "Watch") -> None:
    """As micro_step.Direct does."""
    seen.enter("direct")
    with SavingAttention():
        losses = objective(batch)
    seen.kept = watch.live
    losses["loss"].backward()


def _walk_in_chunks(objective: Objective, batch: Batch, seen: Walk, watch: "Watch") -> None:
    """As micro_step.Cached does."""
    _tell_surveyed(objective, watch)
    parts, texts = chunks(objective, batch, rows=seen.chunk or seen.rows)
    surveyed = []
    for part in parts:
        seen.enter("survey")
        with SavingAttention():
            surveyed.append(objective(part, run=survey))
    seen.enter("couple")
    given = couple(objective, batch, texts, surveyed, signals=False)
    for part, needs in zip(parts, given, strict=True):
        seen.enter("replay")
        with SavingAttention():
            share = objective(part, needs, run=replay)
        seen.kept = watch.live
        share.backward()
        del share


def _tell_surveyed(objective: Objective, watch: "Watch") -> None:
    """Tells the watch what only a survey computes: the vectors of a chunk."""
    vectors = objective.vectors

    def inner(*args: Any) -> Any:
        with watch.survey():
            return vectors(*args)

    objective.vectors = inner  # type: ignore[assignment]


def build_on_meta(recipe: Recipe, **arguments: Any) -> Objective:
    """The recipe's objective without memory for its weights."""
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        return build_objective(recipe, dtype=dtype, **arguments)


def _recompute(block: nn.Module, watch: "Watch") -> None:
    """As parallel/remat.py does, telling the watch what is computed again."""
    forward = block.forward

    def inner(*args: Any, **kwargs: Any) -> Any:
        with SavingAttention(), watch.block():  # entered anew: the backward pass runs outside of the forward pass's
            return forward(*args, **kwargs)

    block.forward = partial(checkpoint, inner, use_reentrant=False, preserve_rng_state=False)


class _Ranks:
    """The objective's collectives with one rank playing all of them: shapes and sizes as in a real run."""

    rank = 0

    def __init__(self, world: int, exchanged: Counter[str]) -> None:
        self.world, self._exchanged = world, exchanged

    def all_gather(self, x: Tensor) -> Tensor:
        self._exchanged["all_gather"] += x.nbytes * self.world
        if x.requires_grad:
            self._exchanged["all_reduce"] += x.nbytes * self.world  # of the gradient, backward
        return x.repeat(self.world, *[1] * (x.dim() - 1))

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        self._exchanged["all_reduce"] += x.nbytes
        return x.detach().clone()


class Watch(TorchDispatchMode):
    """Sees every operator: adds up FLOPs by part, and follows which storages are alive."""

    def __init__(self, seen: Walk) -> None:
        super().__init__()
        self._seen = seen
        self.part = LOSSES
        self.ranges: list[tuple[int, int, str]] = []  # of autograd's sequence numbers, one for each call of a part
        self.live = 0
        self._storages: dict[int, Any] = {}
        self._in_block = self._in_survey = False

    @contextmanager
    def survey(self) -> Iterator[None]:
        """Around what is computed for its values alone and once more for its gradient."""
        self._in_survey = True
        try:
            yield
        finally:
            self._in_survey = False

    @contextmanager
    def block(self) -> Iterator[None]:
        """Around the forward pass of a block, which in a backward pass is a recomputation."""
        self._in_block = True
        try:
            yield
        finally:  # checkpoint leaves early, once it has all that it needs
            self._in_block = False

    def leave_out(self, values: list[Any]) -> None:
        """Tensors that are there before and behind the step, and their views, count nothing."""
        self._storages |= {x.untyped_storage()._cdata: None for x in values if isinstance(x, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._seen.operators += 1
        node = torch._C._current_autograd_node()
        if flops := operator_flops(func, args, kwargs or {}, out):
            if node is None:
                counted = self._seen.surveyed if self._in_survey else self._seen.forward
                counted[self.part] += flops
            else:
                counted = self._seen.recomputed if self._in_block else self._seen.backward
                counted[self._part_of(node)] += flops
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._follow(x.untyped_storage())
        phase = self._seen.phase
        phase.peak = max(phase.peak, self.live + workspace_bytes(func, args))
        return out

    def _part_of(self, node: Any) -> str:
        """A backward operator belongs to the part in whose forward pass its node was made."""
        number = node._sequence_nr()
        return next((part for first, last, part in self.ranges if first <= number < last), LOSSES)

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size


class _Tell(torch.autograd.Function):
    """The identity, which says when the gradient comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, told: Callable[[], None]) -> Tensor:
        ctx.told = told
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.told()
        return grads[0], None


def _attach(objective: Objective, seen: Walk, watch: Watch) -> None:
    """Hooks: which part runs, which parameters ZeRO-3 fetches and releases, when a gradient is ready."""
    names = {id(p): name for name, p in objective.named_parameters()}
    for name, part in objective.named_children():
        _name_part(part, name, watch)
    whole = {id(b) for frozen in (False, True) for b in blocks_entered_once(objective, frozen=frozen)}
    for index, module in enumerate(_hooked(objective, whole)):
        own = module.parameters(recurse=id(module) in whole)
        _visit(module, index, tuple(names[id(p)] for p in own), seen)
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: _ready(p, name, seen))


def _hooked(module: nn.Module, whole: set[int]) -> Iterator[nn.Module]:
    """Modules that ZeRO-3 puts its hooks on: all, but none inside one that it gathers whole."""
    yield module
    if id(module) not in whole:
        for child in module.children():
            yield from _hooked(child, whole)


def _ready(parameter: Tensor, name: str, seen: Walk) -> None:
    # ZeRO moves gradients into its own buffers as they come; the memory model counts those.
    parameter.grad = None
    seen.gradients.append(name)


def _name_part(module: nn.Module, name: str, watch: Watch) -> None:
    started: list[int] = []

    def enter(*_: Any) -> None:
        started.append(torch._C._autograd._get_sequence_nr())
        watch.part = name

    def leave(*_: Any) -> None:
        watch.ranges.append((started.pop(), torch._C._autograd._get_sequence_nr(), name))
        watch.part = LOSSES

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _visit(module: nn.Module, index: int, parameters: tuple[str, ...], seen: Walk) -> None:
    """Fetch before forward and backward, release behind both, as in deepspeed/runtime/zero/parameter_offload.py."""
    fetch, release = Visit(True, index, parameters), Visit(False, index, parameters)

    def before(_: nn.Module, inputs: tuple) -> tuple:
        waiting = Counter({"": sum(isinstance(x, Tensor) and x.requires_grad for x in inputs)})

        def came() -> None:
            waiting[""] -= 1
            if waiting[""] == 0:
                seen.phase.visits.append(release)

        told = tuple(_Tell.apply(x, came) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)
        seen.phase.visits.append(fetch)
        return told

    def behind(_: nn.Module, inputs: tuple, out: Any) -> Any:
        seen.phase.visits.append(release)
        return _on_tensors(
            out, lambda x: _Tell.apply(x, lambda: seen.phase.visits.append(fetch)) if x.requires_grad else x
        )

    module.register_forward_pre_hook(before)
    module.register_forward_hook(behind)


def _on_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_on_tensors(x, change) for x in value)
    return {k: _on_tensors(x, change) for k, x in value.items()} if type(value) is dict else value
