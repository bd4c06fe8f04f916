"""The place at which plans act: an object that stands for a module's ``forward``."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from saerec_fast.steering.attach import SteeringHandle

# Per thread, what is going on for the handles in it, outermost first. Tuples that are replaced rather than changed, in
# a plain threading.local: torch.compile loses what is stored in a subclass. Of each entry the first is a handle's key.
#   masks: what valid returned for the forward passes under way.
#   lasting: what it returned last, for handles whose site runs after the module that valid sees; one entry a handle.
#   requests: the requests under way.
running = threading.local()


class SteeredForward:
    """Calls the ``forward`` that a module had, and what is attached to the module around it.

    Lies in ``vars(module)["forward"]``, where a call of the module finds it; hooks would make that call take
    ``nn.Module``'s slow path. Dynamo traces it, and compares which object is there: neither a steered nor an unsteered
    module runs code that was compiled for the other. An ordinary class, of which compiled code looks at what it reads
    and at nothing else.

    Attributes:
        module: whose forward it is.
        replaced: what the module had in its place, ``None`` where that was the class's.
        forward: what it calls, of either.
        sources: the handles whose ``valid`` reads the arguments.
        sites: the handles that steer the output, in the order they were attached.
    """

    def __init__(self, module: nn.Module) -> None:
        self._bind(module, vars(module).get("forward"))
        self.sources: tuple[SteeringHandle, ...] = ()
        self.sites: tuple[SteeringHandle, ...] = ()

    def _bind(self, module: nn.Module, replaced: Callable[..., Any] | None) -> None:
        self.module = module
        self.replaced = replaced
        of_class: Callable[..., Any] = types.MethodType(type(module).forward, module)
        self.forward = of_class if replaced is None else replaced
        # The name, documentation and, by __wrapped__, signature of the original.
        functools.update_wrapper(self, self.forward, updated=())

    @property
    def __code__(self) -> types.CodeType:
        """Of the original: torch.export looks there for name and line."""
        code: types.CodeType = self.forward.__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # At a batch of one, cold Python costs more than the kernel: no helpers where all passes come along.
        sources = self.sources
        if not sources:
            output = self.forward(*args, **kwargs)
            for handle in self.sites:
                output = handle._steer_output(output)
            return output
        before = masks = getattr(running, "masks", ())
        for handle in sources:
            if handle._lasting:
                forget_lasting(handle._key)
                mask = (handle._key, handle._valid(*args, **kwargs))  # type: ignore[misc]  # these have one
                running.lasting = (*running.lasting, mask)
            else:
                masks = (*masks, (handle._key, handle._valid(*args, **kwargs)))  # type: ignore[misc]
        running.masks = masks
        try:
            output = self.forward(*args, **kwargs)
            for handle in self.sites:
                output = handle._steer_output(output)
            return output
        finally:
            running.masks = before

    def __getstate__(self) -> dict[str, Any]:
        # A bound method, as the class's forward is one, would be looked up on the module, where a pickle may have put
        # this object already.
        return {name: vars(self)[name] for name in ("module", "replaced", "sources", "sites")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bind(state["module"], state["replaced"])
        self.sources, self.sites = state["sources"], state["sites"]

    def remove(self, handle: SteeringHandle) -> None:
        """Take a handle out, and after the last one put back what was there before, unless somebody else has replaced
        the module's ``forward`` since: theirs may call this one, which then only passes on."""
        self.sites = tuple(other for other in self.sites if other is not handle)
        self.sources = tuple(other for other in self.sources if other is not handle)
        if self.sources or self.sites or vars(self.module).get("forward") is not self:
            return
        if self.replaced is None:
            del self.module.forward
        else:
            vars(self.module)["forward"] = self.replaced


def steered_forward(module: nn.Module) -> SteeredForward:
    """The object in the place of the module's ``forward``, put there if need be."""
    forward = vars(module).get("forward")
    if not isinstance(forward, SteeredForward):
        forward = vars(module)["forward"] = SteeredForward(module)
    return forward


def forget_lasting(key: int) -> None:
    """Drop the lasting mask of the handle with that key in this thread."""
    running.lasting = tuple(entry for entry in getattr(running, "lasting", ()) if entry[0] != key)
