"""Calls of several threads, answered together by one of them."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

Kind = TypeVar("Kind", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


class _Call:
    """What one thread waits for.

    Attributes:
        items: what it asks for.
        results: of these, by place.
        missing: places that have no result yet; none once its thread has left.
        alone: whether its items are in no pass with others', since such a pass failed.
    """

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.results: dict[int, Any] = {}
        self.missing = set(range(len(items)))
        self.alone = False
        # Acquired by its own thread to sleep, and released by others to wake it.
        self._bed = threading.Lock()
        self._bed.acquire()

    def sleep(self) -> None:
        self._bed.acquire()

    def wake(self) -> None:
        """With the combiner's lock held. A thread that is awake will not fall asleep the next time."""
        if self._bed.locked():
            self._bed.release()


class _Part(NamedTuple):
    """Items of one call and one kind that wait for a pass: ``places[begin:]``, at least one."""

    call: _Call
    kind: Any
    places: Sequence[int]
    begin: int = 0


class _Pass(NamedTuple):
    """Items that are being run, by call and place."""

    kind: Any
    batch: list[tuple[_Call, int]]


class Combiner(Generic[Kind, Item, Result]):
    """A function of many items, for threads that have a few each.

    A thread that calls while a pass may start runs one itself, at once. Calls that come meanwhile queue up and sleep;
    then a thread of theirs runs the next pass, with items of as many of them as fit, and so on. Nobody polls, no thread
    runs in the background, and each leaves as soon as it has its results.

    **Fair by passes.** A pass takes the kind that is first in the queue, and items in turn from all calls that wait
    with that kind; what is left of them goes to the end of the queue. So a call of one item waits for no more passes
    than there are calls and kinds before it, however many items these have.

    **Failures.** Where a pass with items of several calls raises an ``Exception``, nobody is blamed: each of them goes
    on by itself, in passes of its own on its own thread, and gets what it would have got without the others. Where a
    thread is interrupted (``KeyboardInterrupt``, ``SystemExit``), it alone leaves, and what it was running for others
    is put back to the front of the queue. So an item may be run twice; its result is the first.

    In a forked child, the calls of the parent's other threads are gone.

    Args:
        run: ``(kind, items)`` to as many results, in order.
        largest: items of a pass at most, by kind.
        at_once: passes under way at most, each on a thread of its own.
    """

    def __init__(
        self, run: Callable[[Kind, list[Item]], Sequence[Result]], largest: Mapping[Kind, int], at_once: int = 1
    ) -> None:
        self._run = run
        self._largest = largest
        self._at_once = at_once
        # By thread, each of which changes its own entry.
        self._calls: dict[int, _Call] = {}
        # For what follows, which is replaced rather than changed: an interrupt and a fork find the one or the other.
        self._lock = threading.Lock()
        self._queue: list[_Part] = []
        # By the call whose thread runs it.
        self._passes: dict[_Call, _Pass] = {}
        _combiners.add(self)

    def __call__(self, items: Sequence[tuple[Kind, Item]]) -> list[Result]:
        """The results of ``(kind, item)`` pairs, in order.

        Raises:
            RuntimeError: called from within a call of the same thread (by ``run``, a signal's handler or a finalizer).
            Exception: what ``run`` raises for items of this call alone.
        """
        thread = threading.get_ident()
        if thread in self._calls:
            raise RuntimeError("expected no call from within another of the same thread, which would wait for itself")
        call = _Call([item for _, item in items])
        places: dict[Kind, list[int]] = {}
        for place, (kind, _) in enumerate(items):
            places.setdefault(kind, []).append(place)
        try:
            self._calls[thread] = call
            with self._lock:
                self._queue = [*self._queue, *(_Part(call, kind, of_kind) for kind, of_kind in places.items())]
            while call.missing:
                if not self._run_pass(call):
                    call.sleep()
        finally:
            try:
                self._leave(call)
            except BaseException:
                # Interrupted in the middle of it, and the others would wait for ever.
                self._leave(call)
                raise
        return [call.results[place] for place in range(len(items))]

    def _run_pass(self, call: _Call) -> bool:
        """Run the next pass in this call's thread; ``False`` where that is up to others."""
        with self._lock:
            if not self._queue or len(self._passes) >= self._at_once:
                return False
            first = self._queue[0].call
            if first.alone and first is not call:
                first.wake()
                return False
            current, queue = self._next_pass()
            self._passes = {**self._passes, call: current}
            self._queue = queue
            self._wake_next()
        try:
            results = self._run(current.kind, [of_call.items[place] for of_call, place in current.batch])
            pairs = list(zip(current.batch, results, strict=True))
        except Exception:
            if all(of_call is call for of_call, _ in current.batch):
                raise
            for of_call, _ in current.batch:
                of_call.alone = True
            pairs = []
        self._end_pass(call, pairs)
        return True

    def _next_pass(self) -> tuple[_Pass, list[_Part]]:
        """What to run, and the queue after that."""
        kind, first = self._queue[0].kind, self._queue[0].call
        room = self._largest[kind]
        parts = [
            part
            for part in self._queue
            if part.kind == kind and (part.call is first if first.alone else not part.call.alone)
        ][:room]
        ends = [part.begin for part in parts]
        batch: list[tuple[_Call, int]] = []
        unfinished = list(range(len(parts)))
        while unfinished and len(batch) < room:
            for i in unfinished[: room - len(batch)]:
                batch.append((parts[i].call, parts[i].places[ends[i]]))
                ends[i] += 1
            unfinished = [i for i in unfinished if ends[i] < len(parts[i].places)]
        served = set(map(id, parts))
        queue = [part for part in self._queue if id(part) not in served]
        queue += [parts[i]._replace(begin=ends[i]) for i in unfinished]
        return _Pass(kind, batch), queue

    def _end_pass(self, leader: _Call, results: Sequence[tuple[tuple[_Call, int], Result]]) -> None:
        """Hand out the results of a pass; what has none is put back."""
        with self._lock:
            current = self._passes.get(leader)
            if current is None:
                return
            for (call, place), result in results:
                call.results.setdefault(place, result)
                call.missing.discard(place)
            for call, _ in current.batch:
                if not call.missing:
                    call.wake()
            again = [(call, place) for call, place in current.batch if place in call.missing]
            self._queue = [*(_Part(call, current.kind, (place,)) for call, place in again), *self._queue]
            # Last: interrupted before, all of this is done again.
            self._passes = {call: of_call for call, of_call in self._passes.items() if call is not leader}

    def _leave(self, call: _Call) -> None:
        """Whatever the state of this thread's call, end it so that the others go on; again, if need be."""
        call.missing = set()
        self._end_pass(call, ())
        with self._lock:
            self._queue = [part for part in self._queue if part.call is not call]
            self._wake_next()
        # Last: until then, whatever interrupts this cannot call, which would wait for the lock for ever.
        self._calls.pop(threading.get_ident(), None)

    def _wake_next(self) -> None:
        """Where a pass could run, wake a thread for it; all others may sleep."""
        if len(self._passes) < self._at_once:
            idle = (part.call for part in self._queue if part.call not in self._passes)
            if (call := next(idle, None)) is not None:
                call.wake()

    def _keep_own(self) -> None:
        """In a forked child, in which the thread that forked is the only one."""
        thread = threading.get_ident()
        own = self._calls.get(thread)
        self._calls = {} if own is None else {thread: own}
        self._lock = threading.Lock()
        self._queue = [part for part in self._queue if part.call is own]
        self._passes = {call: current for call, current in self._passes.items() if call is own}


_combiners: weakref.WeakSet[Combiner[Any, Any, Any]] = weakref.WeakSet()


def _keep_own_in_all() -> None:
    for combiner in list(_combiners):
        combiner._keep_own()


os.register_at_fork(after_in_child=_keep_own_in_all)
