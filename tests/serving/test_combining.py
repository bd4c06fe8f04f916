"""Calls of several threads in shared passes, of a function that can be held up, made to fail, and looked at."""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from saerec_fast.serving.combining import Combiner

# A test that would wait for ever fails after this many seconds.
PATIENCE = 60.0


class Function:
    """Doubles numbers. ``gate`` holds passes up once they have started; ``fail`` is called in each."""

    def __init__(self, fail: Callable[[list[int]], None] | None = None) -> None:
        self.passes: list[tuple[str, list[int]]] = []
        self.threads: list[int] = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.fail = fail
        self.under_way = Counter[str]()
        self.most_under_way = 0

    def __call__(self, kind: str, items: list[int]) -> list[int]:
        self.passes.append((kind, items))
        self.threads.append(threading.get_ident())
        self.under_way["all"] += 1
        self.most_under_way = max(self.most_under_way, self.under_way["all"])
        try:
            self.started.release()
            assert self.gate.wait(PATIENCE)
            if self.fail is not None:
                self.fail(items)
            return [2 * item for item in items]
        finally:
            self.under_way["all"] -= 1


class Caller(threading.Thread):
    """One call in a thread of its own; ``outcome`` is what it returned or raised."""

    def __init__(self, combiner: Combiner[Any, Any, Any], items: Sequence[tuple[Any, Any]]) -> None:
        super().__init__(daemon=True)
        self.combiner, self.items = combiner, items
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.combiner(self.items)
        except BaseException as error:
            self.outcome = error

    def result(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive(), "a call that never ends"
        return self.outcome


def queued(combiner: Combiner[Any, Any, Any], calls: int) -> None:
    """Wait until so many calls are in the queue."""
    deadline = time.monotonic() + PATIENCE
    while len({id(part.call) for part in combiner._queue}) < calls:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def held_up(
    function: Function, others: Sequence[Sequence[tuple[str, int]]], largest: int = 8, at_once: int = 1
) -> tuple[Combiner[str, int, int], list[Caller]]:
    """A call of item 0 whose pass is under way, and the others, which wait in that order."""
    combiner: Combiner[str, int, int] = Combiner(function, {"a": largest, "b": largest}, at_once)
    function.gate.clear()
    callers = [Caller(combiner, [("a", 0)])]
    assert function.started.acquire(timeout=PATIENCE)
    for number, items in enumerate(others):
        callers.append(Caller(combiner, items))
        if number + 1 < at_once:  # runs at once
            assert function.started.acquire(timeout=PATIENCE)
        queued(combiner, number + 2 - at_once)
    return combiner, callers


def is_idle(combiner: Combiner[Any, Any, Any]) -> bool:
    return not combiner._queue and not combiner._passes and not combiner._calls


def test_one_thread_is_answered_at_once_in_its_own_thread() -> None:
    function = Function()
    combiner = Combiner(function, {"a": 3, "b": 2})
    assert combiner([]) == []
    assert combiner([("a", 1), ("b", 2), ("a", 3), ("a", 4), ("a", 5)]) == [2, 4, 6, 8, 10]
    # The kinds in turn, as calls would be.
    assert function.passes == [("a", [1, 3, 4]), ("b", [2]), ("a", [5])]
    assert set(function.threads) == {threading.get_ident()}
    assert is_idle(combiner)


def test_what_queued_up_is_answered_in_one_pass() -> None:
    function = Function()
    combiner, callers = held_up(function, [[("a", 1)], [("b", 2)], [("a", 3), ("b", 4)], [("a", 5)]])
    function.gate.set()
    assert [caller.result() for caller in callers] == [[0], [2], [4], [6, 8], [10]]
    assert function.passes == [("a", [0]), ("a", [1, 3, 5]), ("b", [2, 4])]
    assert is_idle(combiner)


def test_a_large_call_takes_turns_with_small_ones() -> None:
    function = Function()
    large = [("a", number) for number in range(100, 1100)]
    combiner, callers = held_up(function, [large, [("a", 1)], [("b", 2)], large], largest=4)
    function.gate.set()
    doubled = [2 * number for _, number in large]
    assert [caller.result() for caller in callers] == [[0], doubled, [2], [4], doubled]
    assert function.passes[1] == ("a", [100, 1, 100, 101])
    assert function.passes[2] == ("b", [2])
    assert function.passes[3] == ("a", [102, 101, 103, 102])
    assert is_idle(combiner)


def test_more_calls_than_fit_wait_for_the_next_pass() -> None:
    function = Function()
    _, callers = held_up(function, [[("a", n), ("a", 10 * n)] for n in range(1, 6)], largest=2)
    function.gate.set()
    assert [caller.result() for caller in callers] == [[0], *([2 * n, 20 * n] for n in range(1, 6))]
    assert [items for _, items in function.passes[1:]] == [[1, 2], [3, 4], [5, 10], [20, 30], [40, 50]]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_no_more_passes_at_once_than_allowed(at_once: int) -> None:
    function = Function()
    combiner: Combiner[str, int, int] = Combiner(function, {"a": 1}, at_once)
    function.gate.clear()
    callers = [Caller(combiner, [("a", number), ("a", 100 + number)]) for number in range(6)]
    for _ in range(at_once):
        assert function.started.acquire(timeout=PATIENCE)
    assert not function.started.acquire(timeout=0.05)
    function.gate.set()
    assert [caller.result() for caller in callers] == [[2 * n, 200 + 2 * n] for n in range(6)]
    assert function.most_under_way == at_once
    assert is_idle(combiner)


def test_a_pass_that_may_run_waits_for_no_other() -> None:
    together = threading.Barrier(2)

    def fail(items: list[int]) -> None:
        if len(items) > 1:
            for caller in callers[:2]:  # who would wake others when they leave
                caller.join(PATIENCE)
            raise RuntimeError("in company")
        if items[0] > 1:
            together.wait(PATIENCE)

    function = Function(fail)
    combiner, callers = held_up(function, [[("a", 1)], [("a", 2)], [("a", 3)]], at_once=2)
    function.gate.set()
    assert [caller.result() for caller in callers] == [[0], [2], [4], [6]]
    assert is_idle(combiner)


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_failing_pass_blames_nobody_but_the_call_that_fails_alone(at_once: int) -> None:
    def fail(items: list[int]) -> None:
        if 13 in items:
            raise MemoryError("thirteen")

    function = Function(fail)
    others = [[("a", 1), ("b", 2)], [("a", 3), ("a", 13)], [("a", 5)], [("b", 13)], [("b", 6)]]
    combiner, callers = held_up(function, others, at_once=at_once)
    function.gate.set()
    outcomes = [caller.result() for caller in callers]
    assert [outcome for outcome in outcomes if isinstance(outcome, list)] == [[0], [2, 4], [10], [12]]
    assert all(isinstance(outcomes[place], MemoryError) for place in (2, 4))
    assert outcomes[2] is not outcomes[4]
    assert is_idle(combiner)


def test_a_pass_that_fails_only_in_company_fails_nobody() -> None:
    def fail(items: list[int]) -> None:
        if len(items) > 2:
            raise RuntimeError("out of memory")

    function = Function(fail)
    combiner, callers = held_up(function, [[("a", n), ("a", 10 * n)] for n in range(1, 4)])
    function.gate.set()
    assert [caller.result() for caller in callers] == [[0], *([2 * n, 20 * n] for n in range(1, 4))]
    assert is_idle(combiner)


def test_after_a_failure_calls_go_on_by_themselves() -> None:
    def fail(items: list[int]) -> None:
        if 13 in items:
            raise RuntimeError("thirteen")

    function = Function(fail)
    others = [[("a", 13)], [("a", n) for n in range(20, 26)], [("a", n) for n in range(30, 36)]]
    _, callers = held_up(function, others, largest=2)
    function.gate.set()
    assert isinstance(callers[1].result(), RuntimeError)
    assert [caller.result() for caller in callers[2:]] == [
        [2 * n for n in range(20, 26)],
        [2 * n for n in range(30, 36)],
    ]
    assert function.passes[1] == ("a", [13, 20])
    assert all(len({item // 10 for item in items}) == 1 for _, items in function.passes[2:])
    # And in turn, as before.
    assert [items[0] // 10 for _, items in function.passes[2:]] == [1, 2, 3, 2, 3, 2, 3]


def test_a_wrong_number_of_results_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        Combiner(lambda kind, items: items[1:], {"a": 8})([("a", 1), ("a", 2)])


@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_thread_leaves_alone(kind_of_error: type[BaseException]) -> None:
    interrupted: list[int] = []

    def fail(items: list[int]) -> None:
        if len(items) > 1 and not interrupted:
            interrupted.append(threading.get_ident())
            raise kind_of_error

    function = Function(fail)
    combiner, callers = held_up(function, [[("a", n)] for n in range(1, 5)])
    function.gate.set()
    outcomes = [caller.result() for caller in callers]
    for caller, outcome in zip(callers, outcomes, strict=True):
        if [caller.ident] == interrupted:
            assert isinstance(outcome, kind_of_error)
        else:
            assert outcome == [2 * item for _, item in caller.items]
    assert len(interrupted) == 1
    assert is_idle(combiner)


def test_a_call_cannot_wait_for_itself() -> None:
    combiner: Combiner[str, int, int] = Combiner(lambda kind, items: combiner([(kind, items[0])]), {"a": 8})
    with pytest.raises(RuntimeError, match="from within another of the same thread"):
        combiner([("a", 1)])
    assert is_idle(combiner)


@pytest.mark.parametrize("place", ["_next_pass", "_wake_next"])
def test_what_interrupts_a_call_cannot_call(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A signal's handler or a finalizer, which run at any place of a thread, also where it holds the lock."""
    function = Function()
    combiner = Combiner(function, {"a": 8})
    original, failures = getattr(combiner, place), []

    def interrupted() -> Any:
        try:
            combiner([("a", 2)])
        except RuntimeError as error:
            failures.append(error)
        return original()

    monkeypatch.setattr(combiner, place, interrupted)
    assert Caller(combiner, [("a", 1)]).result() == [2]
    assert failures
    assert function.passes == [("a", [1])]
    assert is_idle(combiner)


def raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Where that thread is, as a signal does in the main thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error))


def test_what_an_interrupted_call_had_queued_is_dropped() -> None:
    ran: list[tuple[str, list[int]]] = []

    def run(kind: str, items: list[int]) -> list[int]:
        ran.append((kind, items))
        if kind == "a":
            raise KeyboardInterrupt
        return items

    combiner: Combiner[str, int, int] = Combiner(run, {"a": 8, "b": 8})
    with pytest.raises(KeyboardInterrupt):
        combiner([("a", 1), ("b", 2)])
    assert combiner([("b", 3)]) == [3]
    assert ran == [("a", [1]), ("b", [3])]
    assert is_idle(combiner)


@pytest.mark.parametrize("at_once", [1, 2])
def test_interrupts_anywhere_strand_nobody(at_once: int) -> None:
    """Threads are interrupted at random places, most of them in the combiner; the others get all their results."""
    combiner: Combiner[str, int, int] = Combiner(lambda kind, items: [2 * i for i in items], {"a": 3, "b": 3}, at_once)
    stop = threading.Event()
    wrong: list[Any] = []
    interrupted: list[int] = []

    def work(number: int, is_under_way: threading.Event) -> None:
        generator = random.Random(number)
        while not stop.is_set():
            items = [(generator.choice("ab"), 100 * number + i) for i in range(generator.randint(1, 7))]
            if combiner(items) != [2 * item for _, item in items]:
                wrong.append(items)
            is_under_way.set()

    def be_interrupted(number: int, is_under_way: threading.Event) -> None:
        try:
            work(number, is_under_way)
        except KeyboardInterrupt:
            interrupted.append(number)

    def start(target: Callable[[int, threading.Event], None], number: int) -> threading.Thread:
        is_under_way = threading.Event()
        thread = threading.Thread(target=target, args=(number, is_under_way), daemon=True)
        thread.start()
        assert is_under_way.wait(PATIENCE)
        return thread

    workers = [start(work, number) for number in range(3)]
    generator = random.Random(5)
    for number in range(300):
        victim = start(be_interrupted, number)
        time.sleep(generator.uniform(0, 0.003))
        raise_in(victim, KeyboardInterrupt)
        victim.join(PATIENCE)
        assert not victim.is_alive(), "a call that never ends"
    stop.set()
    for thread in workers:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a call that never ends"
    assert not wrong
    assert len(interrupted) == 300
    assert is_idle(combiner)


def test_an_interrupt_while_leaving_strands_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    function = Function()
    combiner, callers = held_up(function, [[("a", 1)]])
    wake_next = combiner._wake_next
    calls: list[None] = []

    def wake_next_if_not_the_first() -> None:
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt
        wake_next()

    monkeypatch.setattr(combiner, "_wake_next", wake_next_if_not_the_first)
    function.gate.set()
    assert isinstance(callers[0].result(), KeyboardInterrupt)
    assert callers[1].result() == [2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_threads_call() -> None:
    function = Function()
    combiner, callers = held_up(function, [[("a", 1)], [("b", 2)]])
    child = os.fork()
    if child == 0:
        function.gate.set()
        os._exit(0 if is_idle(combiner) and combiner([("a", 4), ("b", 5)]) == [8, 10] else 1)
    assert status_of(child) == 0
    function.gate.set()
    assert [caller.result() for caller in callers] == [[0], [2], [4]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_within_a_pass() -> None:
    """Both go on with what the forking thread asked for."""
    children: list[int] = []

    def fork(items: list[int]) -> None:
        if 1 in items:
            children.append(os.fork())

    function = Function(fork)
    combiner, callers = held_up(function, [[("a", 7)]])
    function.gate.set()
    assert [caller.result() for caller in callers] == [[0], [14]]
    results = combiner([("a", 1), ("b", 2), ("a", 3)])
    if children == [0]:
        os._exit(0 if results == [2, 4, 6] else 1)
    assert results == [2, 4, 6]
    assert status_of(children[0]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_the_lock_is_held() -> None:
    combiner: Combiner[str, int, int] = Combiner(lambda kind, items: [2 * i for i in items], {"a": 8})
    with combiner._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if combiner([("a", 4)]) == [8] else 1)
    assert status_of(child) == 0
    assert combiner([("a", 5)]) == [10]


def status_of(child: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child never ends")
