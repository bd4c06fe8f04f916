"""Steering a model in place: a plan runs inside the forward pass of a module of somebody else's model."""

from __future__ import annotations

import difflib
import gc
import inspect
import itertools
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from saerec_fast.api import steer_plans
from saerec_fast.sae import SparseAutoencoder
from saerec_fast.steering.forward import forget_lasting, steered_forward
from saerec_fast.steering.forward import running as _running
from saerec_fast.steering.sites import NoPadding, Valid, known_padding
from saerec_fast.types import Edit, SteeringPlan, inference_threshold
from saerec_fast.validation import check_plan

if TYPE_CHECKING:
    from saerec_fast._C import PlainSteer, SteerPlans

Strengths = Tensor | Sequence[float] | Sequence[Sequence[float]]


# Key of the handle; the plan or plans, None for the handle's own; strengths, None for the values of the plans.
_Request = tuple[int, "SteeringPlan | Sequence[SteeringPlan | None] | None", "Tensor | None"]

_keys = itertools.count()

# Held while values are written in place and while they are copied, so that no forward pass gets half of them, and while
# handles are put into modules and taken out. A fork waits for it, or the child would find it held by nobody.
_values = threading.RLock()
os.register_at_fork(before=_values.acquire, after_in_parent=_values.release, after_in_child=_values.release)

_COMPILED = (
    "model: expected a model that is not compiled yet, since compiled code may ignore what is attached later; "
    "attach first, then torch.compile (and change strengths and plan by the handle's update)"
)


class _State:
    """What a handle does. Replaced as a whole, and read once in a forward pass, whose parts then belong together.

    An ordinary class, of which compiled code looks at what it reads and at nothing else.

    Attributes:
        plan: as the user gave it.
        traced_plan: its structure and a copy of its mask. The same object while only values change, so that compiled
            code has nothing new to look at.
        everywhere: that at all positions.
        strengths: what the edits do by how much.
        owns_strengths: whether they are a copy, which may be written to.
        plans, plain: plan and strengths as the bound call reads them, and that call; both made by the first forward
            pass that could have used them.
    """

    def __init__(
        self,
        plan: SteeringPlan,
        traced_plan: SteeringPlan,
        everywhere: SteeringPlan,
        strengths: Tensor,
        owns_strengths: bool,
        plans: SteerPlans | None = None,
        plain: PlainSteer | None = None,
    ) -> None:
        self.plan = plan
        self.traced_plan = traced_plan
        self.everywhere = everywhere
        self.strengths = strengths
        self.owns_strengths = owns_strengths
        self.plans = plans
        self.plain = plain

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": None, "plain": None}


class SteeringHandle:
    """A plan that acts in a model, made by :func:`attach`; a context manager that detaches when its block ends.

    Handles on the same module act in the order they were attached. Forward passes may run in several threads at once,
    each with plans of its own (:meth:`request`). While they run, :meth:`update` may be called from another thread: a
    pass that is not compiled does all of what was in force before, or all of what comes after.
    """

    _state: _State

    def __init__(
        self,
        site: str,
        module: nn.Module,
        sae: SparseAutoencoder,
        plan: SteeringPlan,
        valid: Valid | None,
        valid_from: tuple[str, nn.Module],
        strengths: Strengths | None,
    ) -> None:
        self._site = site
        self._sae = sae
        self._valid = valid
        self._source, source = valid_from
        self._key = next(_keys)
        self._attached = True
        self._bind(plan, strengths)
        # Where the site runs after the module whose arguments are looked at, their mask has to outlive its call.
        self._lasting = valid is not None and not any(inner is module for inner in source.modules())
        self._masks_at = "lasting" if self._lasting else "masks"
        # Compiled code would have to be compiled again for the second call, in which the attributes are there.
        _running.masks, _running.requests = getattr(_running, "masks", ()), _requests()
        _running.lasting = getattr(_running, "lasting", ())
        with _values:
            # The source is in before the site, and the other way round in detach: no pass of another thread that begins
            # meanwhile has a site without its mask.
            self._forwards = []
            if valid is not None:
                at_source = steered_forward(source)
                at_source.sources = (*at_source.sources, self)
                self._forwards.append(at_source)
            at_site = steered_forward(module)
            at_site.sites = (*at_site.sites, self)
            self._forwards.append(at_site)

    @property
    def site(self) -> str:
        """Dotted path of the steered module; empty for the model itself."""
        return self._site

    @property
    def attached(self) -> bool:
        """Whether the plan still acts."""
        return self._attached

    @property
    def plan(self) -> SteeringPlan:
        """The plan in force; what its edits do by how much is in :attr:`strengths`."""
        return self._state.plan

    @property
    def strengths(self) -> Tensor:
        """The strengths in force, ``(m,)`` or ``(B, m)``: the tensor the forward pass reads."""
        return self._state.strengths

    def update(self, plan: SteeringPlan | None = None, strengths: Strengths | None = None) -> None:
        """Change what is done, from the next forward pass on.

        New strengths of the same shape are written into the tensor the forward pass reads, so that compiled code runs
        on as it is. The same goes for a plan with the same features, ops, mode and kind of positions; any other plan
        makes compiled code compile once more.

        Args:
            plan: replaces the plan; the strengths become its values, unless given too.
            strengths: as in :func:`attach`; replaces the strengths, and the plan stays.

        Raises:
            RuntimeError: already detached.
            ValueError, TypeError: as :func:`attach`, or neither was given; the handle then stays as it was.
        """
        self._check_attached()
        if plan is not None:
            check_plan(plan, self._sae.n_features, self._sae.d_model)
        with _values:
            state = self._state
            if plan is None:
                if strengths is None:
                    raise ValueError("update: expected a plan, strengths or both, got neither")
                self._write(state, state.plan, _check_strengths(strengths, self._sae, len(state.plan.edits)))
                return
            # A pass under way may have looked at a mask already: that is left as it is, together with its strengths.
            if isinstance(plan.positions, Tensor) or _structure(plan) != _structure(state.traced_plan):
                self._bind(plan, strengths)
            else:
                self._write(state, plan, _checked_or_planned(strengths, plan, self._sae))

    @contextmanager
    def request(
        self,
        plan: SteeringPlan | Sequence[SteeringPlan | None] | None = None,
        *,
        strengths: Strengths | None = None,
    ) -> Iterator[None]:
        """Forward passes in this block, in this thread, follow another plan than the handle's::

            with handle.request([plan_of_first_user, None, plan_of_third_user]):
                model(tokens)

        Other threads do not see it, and nothing of it is left behind. Requests nest: the innermost counts. Code
        compiled with ``torch.compile`` is compiled once for every structure of plans it meets. A module that makes a
        request inside its forward, with strengths it was given, compiles and exports with them as an input.

        Args:
            plan: for the whole batch, or one for each of its rows, ``None`` for rows that are not steered. A mask of
                positions in a plan of one row has the shape of that row's positions. By default the handle's own.
            strengths: as in :func:`attach`, for one plan; while a graph is traced their values are not looked at.

        Raises:
            RuntimeError: already detached.
            ValueError, TypeError: as :func:`attach`, neither was given, or strengths for more than one plan. The
                forward pass raises ``ValueError`` where the batch has another number of rows than there are plans.
        """
        self._check_attached()
        if plan is None and strengths is None:
            raise ValueError("request: expected a plan, strengths or both, got neither")
        plans: Sequence[SteeringPlan | None] = (plan,) if plan is None or isinstance(plan, SteeringPlan) else plan
        if not isinstance(plans, (list, tuple)):
            raise TypeError(f"plan: expected a SteeringPlan or a list of them, got {type(plans).__name__}")
        for one in plans:
            if one is not None:
                check_plan(one, self._sae.n_features, self._sae.d_model)
        if strengths is not None:
            if plan is not None and not isinstance(plan, SteeringPlan):
                raise ValueError("strengths: belong to one plan; plans of their own have their own values")
            strengths = _check_strengths(strengths, self._sae, len((plan or self._state.plan).edits))
        before = _requests()
        _running.requests = (*before, (self._key, plan, strengths))
        try:
            yield
        finally:
            _running.requests = before

    def detach(self) -> None:
        """Take the plan out of the model; doing so again does nothing."""
        with _values:
            self._attached = False
            self._state.plain = None
            while self._forwards:
                self._forwards.pop().remove(self)
        if self._lasting:
            forget_lasting(self._key)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In the process that loads a pickle its key may be another handle's.
        vars(self).update(state, _key=next(_keys))

    def __enter__(self) -> SteeringHandle:
        self._check_attached()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        plan = self.plan
        positions = "mask" if isinstance(plan.positions, Tensor) else plan.positions
        return (
            f"SteeringHandle(site={self._site!r}, edits={len(plan.edits)}, mode={plan.mode!r}, "
            f"positions={positions!r}, attached={self._attached})"
        )

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError(f"the handle on {self._site!r} is detached; attach again")

    def _bind(self, plan: SteeringPlan, strengths: Strengths | None) -> None:
        """Take a plan of any structure, with tensors of its own."""
        checked = _checked_or_planned(strengths, plan, self._sae)
        positions = plan.positions
        if isinstance(positions, Tensor):
            positions = _own_copy(positions)
        self._state = _State(plan, plan.at_positions(positions), plan.at_positions("all"), *_adopted(checked))

    def _write(self, state: _State, plan: SteeringPlan, strengths: Tensor) -> None:
        """Take other values for the same structure."""
        current, owns, plans, plain = state.strengths, state.owns_strengths, state.plans, state.plain
        if owns and not strengths.requires_grad and strengths.shape == current.shape:
            if plans is not None:
                plans.pause(True)
            try:
                with torch.no_grad():
                    current.copy_(strengths)
            finally:
                if plans is not None:
                    plans.pause(False)
        else:
            (current, owns), plans, plain = _adopted(strengths), None, None
        self._state = _State(plan, state.traced_plan, state.everywhere, current, owns, plans, plain)

    def _bind_call(self, state: _State) -> None:
        """Make the bound call; not while values change, and not for what has been replaced."""
        with _values:
            if state is self._state and self._attached:
                if state.plans is None:
                    state.plans = steer_plans(state.traced_plan, state.strengths)
                state.plain = self._sae.bind_steer()

    def _mask_of_call(self, x: Tensor) -> Tensor | None:
        """What ``valid`` said of the forward pass that runs, for hidden states ``x``: a mask, offsets, or nothing."""
        expected = tuple(x.shape[:-1])
        masks = [mask for key, mask in self._masks() if key == self._key]
        if not masks:
            raise RuntimeError(
                f"valid: site {self._site!r} ran outside a forward pass of "
                f"{f'the module {self._source!r}' if self._source else 'the model it was attached through'}, so that "
                "valid never saw that module's arguments; attach through the module whose forward is really called "
                "(some libraries call an inner one directly), name it as valid_from, or leave valid out if no position "
                "is padding"
            )
        mask = masks[-1]
        if mask is NoPadding:
            return None
        if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (*x.shape[:-1], 1):
            mask = mask.squeeze(-1)
        if isinstance(mask, Tensor) and mask.dtype in (torch.int32, torch.int64) and x.dim() == 2 and mask.dim() == 1:
            # Looked at where that makes no device wait and no compiled graph break.
            if mask.is_cpu and not torch.compiler.is_compiling():
                bounds = mask.tolist()
                if bounds[:1] != [0] or bounds[-1] != len(x) or bounds != sorted(bounds):
                    raise ValueError(
                        f"valid: expected offsets that rise from 0 to {len(x)}, the rows that {self._site!r} returned, "
                        f"got {bounds if len(bounds) <= 9 else (*bounds[:4], '...', *bounds[-4:])}"
                    )
            return mask.to(x.device)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"valid: expected a bool mask {expected}, got {_describe(mask)}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"valid: expected a mask {expected} like the output of {self._site!r}, got {tuple(mask.shape)}"
            )
        return mask.to(x.device)

    def _masks(self) -> tuple[tuple[int, Tensor | type[NoPadding]], ...]:
        """What ``valid`` said in this thread to this handle and others, the innermost last."""
        return getattr(_running, self._masks_at, ())

    def _steer_output(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            # A compiled graph must not depend on whether there is a plain call yet.
            if is_dynamo_compiling():
                return self._steer_any(output, self._state)
            state = self._state
            plain = state.plain
            # In line, without calls of Python functions: this is every pass but the first.
            if plain is not None:
                plans = state.plans
                if requests := getattr(_running, "requests", ()):
                    plans = self._plans_in_force(state, requests)
                mask: Any = None
                if self._valid is not None:
                    mask = False  # without a mask, or with a None, it is for _steer_any to say what is wrong
                    for key, of_call in getattr(_running, self._masks_at, ()):  # the innermost is the last
                        if key == self._key:
                            mask = None if of_call is NoPadding else False if of_call is None else of_call
                steered = None if plans is None else plain.run(output, mask, plans)
                if steered is not None:
                    return steered
            return self._steer_and_bind(output, state)
        if isinstance(output, (tuple, list)):
            index = hidden_index(output, self._sae.d_model)
            if index is not None:
                parts = list(output)
                parts[index] = self._steer_output(parts[index])
                if isinstance(output, list):
                    return parts
                # A named tuple takes its fields one by one, a plain one as an iterable.
                return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
        raise TypeError(
            f"site: expected {self._site!r} to return a tensor (..., {self._sae.d_model}), or a tuple or list with "
            f"one, got {_describe(output)}"
        )

    def _plans_in_force(self, state: _State, requests: tuple[_Request, ...]) -> SteerPlans | None:
        if is_compiling():  # an export that runs this very code, whose strengths have no values and maybe no shape
            return None
        for key, plan, strengths in reversed(requests):
            if key == self._key:
                return steer_plans(state.traced_plan if plan is None else plan, strengths)
        return state.plans

    def _steer_and_bind(self, x: Tensor, state: _State) -> Tensor:
        steered = self._steer_any(x, state)
        plain = state.plain
        if not is_compiling() and not torch.is_grad_enabled() and (plain is None or not plain.is_current()):
            self._bind_call(state)
        return steered

    def _steer_any(self, x: Tensor, state: _State) -> Tensor:
        sae = self._sae
        plan, of_handle = state.traced_plan, state.strengths
        if state.owns_strengths and not is_compiling():
            with _values:
                of_handle = of_handle.clone()
        if x.dim() < 2 or x.shape[-1] != sae.d_model:
            raise ValueError(
                f"site: {self._site!r} returned shape {tuple(x.shape)}, expected (..., {sae.d_model}) for this SAE"
            )
        requested, strengths = next(
            ((plans, own) for key, plans, own in reversed(_requests()) if key == self._key), (None, of_handle)
        )
        if requested is None or isinstance(requested, SteeringPlan):
            plan = plan if requested is None else requested
            if plan.mode == "delta" and not plan.edits:
                return x.clone()
        if strengths is not None:
            strengths = strengths.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        valid = None if self._valid is None else self._mask_of_call(x)
        # Rows of sequences one after the other, (ΣL, d), where valid is their offsets.
        offsets = valid if valid is not None and valid.dtype != torch.bool else None
        if requested is not None and not isinstance(requested, SteeringPlan):
            if offsets is not None:
                return sae.steer(x, _plans_of_rows(requested, offsets, x))
            for one in requested:
                self._check_positions(x, one)
            return sae.steer(x, requested, valid=valid)
        if strengths is not None and strengths.dim() == 2:
            n_sequences = x.shape[0] if offsets is None else offsets.shape[0] - 1
            if strengths.shape[0] != n_sequences:
                raise ValueError(
                    f"strengths: expected ({n_sequences}, {len(plan.edits)}), one row for each of this batch, "
                    f"got {tuple(strengths.shape)}"
                )
            if offsets is not None:
                strengths = strengths[_sequence_of_rows(offsets, x)]
            else:
                strengths = strengths.reshape(n_sequences, *[1] * (x.dim() - 2), len(plan.edits))
        if offsets is not None:
            valid = None
            if _is_last(plan):
                valid = _last_rows(offsets, x)
                plan = state.everywhere if requested is None else plan.at_positions("all")
        self._check_positions(x, plan)
        return sae.steer(x, plan, strengths=strengths, valid=valid)

    def _check_positions(self, x: Tensor, plan: SteeringPlan | None) -> None:
        if plan is not None and x.dim() < 3 and _is_last(plan):
            raise ValueError(
                f"positions: 'last' needs hidden states (B, L, d), but {self._site!r} returned {tuple(x.shape)}; "
                "give a bool mask over its rows, or 'all', or where the rows are sequences one after the other (ΣL, d) "
                "a valid that returns their offsets"
            )


def attach(
    model: nn.Module,
    site: str | nn.Module,
    sae: SparseAutoencoder,
    plan: SteeringPlan,
    valid: Valid | None = None,
    *,
    valid_from: str | nn.Module | None = None,
    strengths: Strengths | None = None,
) -> SteeringHandle:
    """Make ``plan`` act on the hidden states that a module of ``model`` returns, until the handle is detached::

        with attach(model, "transformer.h.0", sae, plan, valid=lambda tokens: tokens != 0) as handle:
            model(tokens)

    The output of the module is replaced by a new tensor, and never written to. It may be a tensor ``(..., d_model)``; a
    tuple, in which the first such tensor is replaced; or a list, in which the last one is (a list holds the states
    after every layer, and its last entry is the one read on). An empty plan in ``delta`` mode changes no bit, nor does
    any plan in rows that it does not steer.

    While attached, the module, and the one whose arguments ``valid`` reads, have a ``forward`` of their own that calls
    the one they had. So hooks on them act outside of the plan: a forward hook sees the steered output, and what a
    pre-hook changes is what ``valid`` gets. And code that calls ``module.forward(...)`` directly is steered too.

    Attach before ``torch.compile``: not all compiled code would notice what comes later. That a model was compiled is
    seen where it is a ``torch.compile`` wrapper, has one, or went through ``Module.compile``, and not where a compiled
    function calls it. An unsteered copy may be compiled beside it, before or after: compiled code tells them apart by
    that ``forward``.

    Args:
        model: the model whose forward is called.
        site: dotted path of the module in ``model`` (as in ``model.get_submodule``; ``""`` is ``model`` itself), or
            that module.
        sae: trained on hidden states of that module, on the same device and in the same dtype. Its parameters may
            change meanwhile, but not through ``.data``, which nobody can see; ``sae.eval()`` has them read again.
        plan: the edits, their mode and their positions. A mask of positions has the leading shape of the hidden states.
        valid: called with the arguments of every forward of ``model``; returns a bool mask ``(B, L)`` or ``(B, L, 1)``
            of the positions that are no padding. Padding stays as it is, and ``"last"`` means each row's last valid
            position. For hidden states ``(ΣL, d)``, sequences one after the other without padding, it returns their
            offsets instead, int32 or int64 ``(B + 1,)`` from 0 to ΣL: then ``"last"`` is each sequence's end, and
            strengths and plans per row are per sequence. By default, a model that :func:`~saerec_fast.sites`
            recognises has its library's own; in any other every position is valid and ``"last"`` is the end of the
            sequence, which is right for padding on the left.
        valid_from: path of another module in ``model``, or that module, whose forward's arguments ``valid`` gets: for
            libraries that call an inner module without ``model``'s forward. What ``valid`` returned holds during that
            forward, or, where the site is not inside that module, until its next forward in the same thread.
        strengths: replace the values of the plan's ``m`` edits: ``(m,)``, or ``(B, m)`` for one set per row of the
            batch. Copied, except a tensor that requires grad: gradients flow to it.

    Returns:
        The handle.

    Raises:
        ValueError: no such module (near matches are listed), a module that is never called, one that is or belongs to a
            compiled one, a feature id ≥ ``sae.n_features``, an SAE without an inference threshold, strengths
            that are not finite or of another shape, or ``valid_from`` without ``valid``.
        TypeError: an argument of the wrong type.

    The forward pass then raises:
        ValueError: hidden states of another width; a mask, offsets or strengths for a batch of another shape;
            ``"last"`` without a sequence dimension.
        TypeError: the module returned no tensor of width ``d_model``, or ``valid`` neither mask nor offsets.
        RuntimeError: the module ran without a forward of the one whose arguments ``valid`` reads.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae: expected a SparseAutoencoder, got {type(sae).__name__}")
    if valid is not None and not callable(valid):
        raise TypeError(f"valid: expected a function of the model's arguments, or None, got {type(valid).__name__}")
    if hasattr(model, "_orig_mod"):  # whose paths differ from those of the model inside
        raise ValueError(_COMPILED)
    path, module = _resolve(model, site, "site")
    _check_not_compiled(model, module)
    check_plan(plan, sae.n_features, sae.d_model)
    inference_threshold(sae.activation)
    if valid is None and valid_from is not None:
        raise ValueError("valid_from: expected only together with valid, which reads that module's arguments")
    if valid is None and (known := known_padding(model, path)) is not None:
        valid, valid_from = known.valid, known.path
    source = ("", model) if valid_from is None else _resolve(model, valid_from, "valid_from")
    return SteeringHandle(path, module, sae, plan, valid, source, strengths)


def _requests() -> tuple[_Request, ...]:
    return getattr(_running, "requests", ())


def _is_last(plan: SteeringPlan) -> bool:
    return isinstance(plan.positions, str) and plan.positions == "last"


def _sequence_of_rows(offsets: Tensor, x: Tensor) -> Tensor:
    """Which sequence each row of ``x (ΣL, d)`` belongs to."""
    return torch.searchsorted(offsets[1:].contiguous(), torch.arange(len(x), device=x.device), right=True)


def _last_rows(offsets: Tensor, x: Tensor) -> Tensor:
    """Mask of the rows of ``x (ΣL, d)`` that end a sequence; empty sequences have none."""
    ends = torch.where(offsets[1:] > offsets[:-1], offsets[1:] - 1, len(x))
    return torch.zeros(len(x) + 1, dtype=torch.bool, device=x.device).index_fill(0, ends.long(), True)[:-1]


def _plans_of_rows(plans: Sequence[SteeringPlan | None], offsets: Tensor, x: Tensor) -> list[SteeringPlan | None]:
    """Plans of sequences as plans of the rows of ``x (ΣL, d)``."""
    bounds = offsets.tolist()
    if len(plans) != len(bounds) - 1:
        raise ValueError(f"plan: expected a plan or None for each of {len(bounds) - 1} sequences, got {len(plans)}")
    of_rows: list[SteeringPlan | None] = [None] * len(x)
    for plan, begin, end in zip(plans, bounds[:-1], bounds[1:], strict=True):
        if plan is None or begin == end:
            continue
        everywhere = plan.at_positions("all")
        steered: Iterable[int]
        if isinstance(plan.positions, Tensor):
            if plan.positions.shape != (end - begin,):
                raise ValueError(
                    f"positions: expected a mask of shape ({end - begin},) in a plan of that sequence, "
                    f"got {tuple(plan.positions.shape)}"
                )
            steered = plan.positions.nonzero().flatten().tolist()
        else:
            steered = [end - begin - 1] if plan.positions == "last" else range(end - begin)
        for row in steered:
            of_rows[begin + row] = everywhere
    return of_rows


def _resolve(model: nn.Module, site: str | nn.Module, argument: str) -> tuple[str, nn.Module]:
    """Path and module of ``site``, which the argument of that name gave."""
    if isinstance(site, nn.Module):
        found = next((name for name, module in model.named_modules() if module is site), None)
        if found is None:
            raise ValueError(
                f"{argument}: expected a module of {type(model).__name__}, got another {type(site).__name__}"
            )
        path, module = found, site
    elif isinstance(site, str):
        modules = dict(model.named_modules(remove_duplicate=False))
        if site not in modules:
            raise ValueError(
                f"{argument}: {type(model).__name__} has no module {site!r}; {_suggestion(site, list(modules))}"
            )
        path, module = site, modules[site]
    else:
        raise TypeError(f"{argument}: expected a dotted path or a torch.nn.Module, got {type(site).__name__}")
    if type(module).forward is nn.Module.forward and "forward" not in vars(module):
        raise ValueError(
            f"{argument}: {path!r} is a {type(module).__name__}, which is never called itself; name a module inside it"
        )
    return path, module


def _suggestion(path: str, names: list[str]) -> str:
    near = difflib.get_close_matches(path, names, n=5)
    if near:
        return f"near matches: {', '.join(near)}"
    # As far down as the path is right, what is there?
    parent = path
    while parent and parent not in names:
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    children = [name for name in names if name.startswith(prefix) and name and "." not in name[len(prefix) :]]
    return f"{parent or 'it'} has: {', '.join(children) or 'none'}"


def _check_not_compiled(model: nn.Module, module: nn.Module) -> None:
    around = [outer for outer in model.modules() if any(inner is module for inner in outer.modules())]
    for outer in around:
        if isinstance(outer, torch.jit.ScriptModule):
            raise ValueError(f"model: expected a plain module, got {type(outer).__name__}, which runs no Python")
    if (
        any(hasattr(outer, "_orig_mod") or getattr(outer, "_compiled_call_impl", None) for outer in around)
        # What torch.compile(module.forward) put in the place of a forward.
        or any(_is_compiled(inspect.unwrap(outer.forward, stop=_is_compiled)) for outer in around)
        or _has_compiled_wrapper(around)
    ):
        raise ValueError(_COMPILED)


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def _has_compiled_wrapper(modules: list[nn.Module]) -> bool:
    """Whether what ``torch.compile(module)`` returned for one of these is still alive.

    The wrapper leaves no mark on the module, but it refers to it. Looking for it visits every object (some 30 ms) and
    is spared where nothing can have been compiled.
    """
    if "torch._dynamo.eval_frame" not in sys.modules:
        return False

    def search() -> bool:
        holders = [holder for holder in gc.get_referrers(*modules) if isinstance(holder, dict)]
        return any(holder.get("_orig_mod") is module for holder in holders for module in modules)

    if not search():
        return False
    # Wrappers lie in reference cycles: one that nobody can call any more may just not be collected yet.
    gc.collect()
    return search()


def _checked_or_planned(strengths: Strengths | None, plan: SteeringPlan, sae: SparseAutoencoder) -> Tensor:
    """The strengths, or where there are none the values of the plan."""
    return _check_strengths(plan.values if strengths is None else strengths, sae, len(plan.edits))


def _check_strengths(strengths: Strengths, sae: SparseAutoencoder, n_edits: int) -> Tensor:
    dtype = torch.promote_types(sae.W_dec.dtype, torch.float32)
    if isinstance(strengths, Tensor):
        if strengths.dtype == torch.bool or strengths.is_complex():
            raise TypeError(f"strengths: expected real numbers, got {strengths.dtype}")
    else:
        try:
            strengths = torch.tensor(strengths, dtype=dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"strengths: expected numbers ({n_edits},) or (B, {n_edits}): {error}") from None
    if strengths.dim() not in (1, 2) or strengths.shape[-1] != n_edits:
        raise ValueError(
            f"strengths: expected shape ({n_edits},) or (B, {n_edits}) for a plan of {n_edits} edits, "
            f"got {tuple(strengths.shape)}"
        )
    # An input of a graph that is being traced has no values yet.
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(strengths).all()):
        raise ValueError("strengths: expected finite numbers, got NaN or infinity")
    # A tensor that is being learnt is kept as it is and converted in every forward pass, within its graph.
    return strengths if strengths.requires_grad else strengths.to(device=sae.W_dec.device, dtype=dtype)


def _structure(plan: SteeringPlan) -> tuple[Any, ...]:
    """All of a plan that compiled code depends on."""
    positions = tuple(plan.positions.shape) if isinstance(plan.positions, Tensor) else plan.positions
    entries = tuple(
        (edit.feature, edit.op) if isinstance(edit, Edit) else tuple(edit.vector.tolist()) for edit in plan.edits
    )
    return entries, plan.mode, positions, plan.max_relative_norm, plan.on_excess


def _adopted(strengths: Tensor) -> tuple[Tensor, bool]:
    """The tensor to read, and whether it is a copy. Strengths that are being learnt must be the caller's own tensor,
    or no gradient would reach it."""
    return (strengths, False) if strengths.requires_grad else (_own_copy(strengths), True)


def _own_copy(tensor: Tensor) -> Tensor:
    # A tensor made under inference_mode could not be written to outside it later.
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like(tensor, requires_grad=False).copy_(tensor)


def hidden_index(parts: Sequence[Any], width: int) -> int | None:
    """Which entry holds the hidden states: the first tensor of that width in a tuple, the last in a list."""
    indices = list(range(len(parts)))
    for index in reversed(indices) if isinstance(parts, list) else indices:
        part = parts[index]
        if isinstance(part, Tensor) and part.dim() >= 2 and part.shape[-1] == width:
            return index
    return None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(_describe(part) for part in value)})"
    return type(value).__name__
