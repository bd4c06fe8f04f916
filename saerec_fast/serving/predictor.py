"""A recommender with its titles, its sparse autoencoder and a site for steering, in one object that can be pickled."""

from __future__ import annotations

import contextvars
import copy
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from saerec_fast.api import linear_topk
from saerec_fast.sae import SparseAutoencoder
from saerec_fast.serving.combining import Combiner
from saerec_fast.serving.requests import Request, RequestReader
from saerec_fast.serving.tables import read_table, write_table
from saerec_fast.steering import attach
from saerec_fast.steering.attach import hidden_index
from saerec_fast.steering.forward import SteeredForward
from saerec_fast.types import Ragged, SteeringPlan

Forward = Callable[[nn.Module, Tensor], Tensor]
ItemEmbeddings = str | Callable[[nn.Module], Tensor]
Returned = TypeVar("Returned")

# The shortest pass of a model that takes sequences of any length; below it, time goes into calls rather than rows.
_SHORTEST = 8
# Rows that are compared to see whether a row's bits depend on how many others pass with it; see _sizes_of.
_COMPARED = 8
# Seconds of a pass of one row, above which several passes run at once; the least of so many passes counts. In shorter
# ones threads wait for each other's Python for longer than they compute. Where it is close, it does not matter.
_LONG_PASS = 3e-3
_TIMED = 3


@dataclass
class _Pass:
    """One forward pass, as what the predictor put into the model sees it in that thread.

    Attributes:
        valid: bool ``(B, L)``, False at padding.
        last: int64 ``(B,)``, each row's last valid position.
        whole: keep all valid positions instead of the last ones.
        site: ``(B, d_model)``, what the site's module returned there, after the edits; ``None`` until it has run.
    """

    valid: Tensor
    last: Tensor
    whole: bool = False
    site: Tensor | None = None

    def at_last(self, x: Tensor) -> Tensor:
        if self.whole:
            return torch.where(self.valid.unsqueeze(-1), x, torch.zeros_like(x))
        return x[torch.arange(len(self.last), device=x.device), self.last]


@dataclass
class _Answer:
    items: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    scores: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    features: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    feature_values: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    error: str | None = None


class Predictor:
    """Histories and edits in, recommended items and the features behind them out::

        predictor = Predictor(model, titles, sae, "transformer.h.0")     # the project's own recommender
        answers = predictor({
            "history": [[3, 17, 5], [8]],
            "edits": [None, SteeringPlan([Edit(812, "add", 2.0)])],
        })
        answers["titles"][1], answers["feature_values"][1]

    **Called by.** Ray Data: load it in the ``__init__`` of a class, and call it in ``__call__(self, batch)`` of
    ``dataset.map_batches(TheClass, batch_format="numpy")``; ``batch_format="pyarrow"`` works too. Spark:
    ``predict_batch_udf(make_predict_fn, ...)``, where ``make_predict_fn`` returns a function of the columns, which
    come as json text (``to_json``), since Spark's arrays would have to be of one length. ASGI: ``await
    asyncio.to_thread(predictor, columns)``; one instance serves any number of threads. ``docs/serving.md`` has all of
    them in full.

    **Errors** of a row (an item, an edit, a dose that its plan rejects, scores that are not finite) stand in the row's
    ``error``, its lists are empty, and no other row's answer changes by a bit. A table that is none raises, and so
    does a model that fails for other reasons than its input's values (out of memory, say).

    **Same bits alone and in company.** A row's answer is the same bits in whatever table, batch and thread it comes.
    The kernels of this library guarantee it; matrix products in general do not (their order of summation may follow
    the size of the batch and the number of threads). Therefore (1) passes run on one thread, whatever
    ``torch.set_num_threads`` says; (2) a row's padded length depends on its own history alone; (3) passes have few
    sizes, filled up with copies of a row, and those that are used (:attr:`pass_sizes`) were seen to give the same bits
    at each place and in different company, on random histories, when the predictor was made. Where no size above 1
    did, rows run one by one. ``max_batch_size=1`` is the same by construction. The answers of other machines may
    differ by rounding.

    **Threads and processes.** Any number of threads may call one instance. Calls that come while a pass is under way
    wait, and share the next ones, which one of their threads runs: a pass of several rows takes less time a row, and
    several passes at once slow each other down where Python takes most of the time (``max_passes``). Rows are taken in
    turn from all calls that wait, so that a small one does not wait for a large one. A thread that is interrupted, or
    whose rows make the model fail, leaves the others their answers. It pickles (model, autoencoder and settings,
    without what it put into it, locks and packed weights) and works in a forked child. More throughput comes from more
    processes; ``torch.set_num_threads(1)`` at the start of the process spares each pass the switch.

    The model and the autoencoder are used as they are, not copied, and put into eval mode. Hooks are added once;
    outside of calls they change no bit of what the model returns, and :meth:`close` (or ``with``) takes them off.

    Args:
        model: any recommender over sequences of items.
        item_titles: one text per item, in the order of the item embeddings (or scores).
        sae: trained on hidden states at ``site``, on the model's device and in its dtype. Not one that was copied or
            unpickled under ``torch.inference_mode``: its kernels could not be bound.
        site: dotted path of the module to steer in ``model``, or that module; it returns ``(B, L, d_model)``, or a
            tuple or list with it.
        item_ids: ids by which requests and answers name items, distinct, all integers or all text; by default the
            indices 0 to ``n_items - 1``.
        hidden: picklable function ``(model, tokens (B, L)) -> (B, L, d)``, or ``(B, d)`` at the last position: the
            hidden states whose product with the item embeddings are the scores. By default
            ``model(tokens)``, or its ``last_hidden_state``.
        score: in the place of ``hidden`` and ``item_embeddings``, a picklable function
            ``(model, tokens) -> (B, n_items)``, or ``(B, L, n_items)``.
        item_embeddings: dotted path of a parameter (``"wte.weight"``), or a picklable function of the model, that gives
            ``(n_items, d)``. From a parameter that has a row for every token, as far as ``token_of_item`` is a number,
            those of the items are taken. By default ``model.item_embeddings``.
        max_length: tokens of one sequence at most, of longer histories the newest; by default
            ``model.config.max_length``.
        padding_side: ``"right"`` for models in which a position's number counts from the oldest item; shorter histories
            then run at shorter lengths (8, 16, … ``max_length``). ``"left"`` always pads to ``max_length``.
        padding_token: what fills the rest.
        token_of_item: the token of item 0, if the others follow it, or the tokens of all, ``(n_items,)``.
        k: items per list, where a request does not say.
        max_batch_size: rows of one pass at most. On a CPU small passes, which stay in the caches, take the least time a
            row; on a GPU several hundred do.
        max_passes: passes under way at most, in the threads of as many callers. By default 1 where a pass of one row
            takes less than 3 ms of processor time (the least of three, when the predictor is made or loaded) or runs on
            a GPU, and otherwise the number of processor cores; :attr:`max_passes` says which. It changes no answer.
        max_history: longer histories are an error of their row.
        max_edits: likewise for plans with more edits.
        feature_names: names of all features, or of some by id; the others are called ``#id``. Without it answers have
            no ``feature_names``.
        n_reasons: features per answer at most.
        exclude_seen: leave out the items of a history, also those older than ``max_length``.
        unknown_items: ``"error"`` of the row, or ``"skip"`` them.

    Raises:
        ValueError: an argument out of range or that does not fit the others, a model that is compiled, a site that the
            forward pass does not run through.
        TypeError: an argument of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        item_titles: Sequence[str],
        sae: SparseAutoencoder,
        site: str | nn.Module,
        *,
        item_ids: Sequence[int] | Sequence[str] | np.ndarray | None = None,
        hidden: Forward | None = None,
        score: Forward | None = None,
        item_embeddings: ItemEmbeddings | None = None,
        max_length: int | None = None,
        padding_side: Literal["left", "right"] = "right",
        padding_token: int = 0,
        token_of_item: int | Sequence[int] | np.ndarray = 1,
        k: int = 10,
        max_batch_size: int = 8,
        max_passes: int | None = None,
        max_history: int = 10_000,
        max_edits: int = 64,
        feature_names: Sequence[str] | Mapping[int, str] | None = None,
        n_reasons: int = 5,
        exclude_seen: bool = True,
        unknown_items: Literal["error", "skip"] = "error",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        for name, function in (("hidden", hidden), ("score", score)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a function of model and tokens, got {type(function).__name__}")
        if score is not None and (hidden is not None or item_embeddings is not None):
            raise ValueError("score: takes the place of hidden and item_embeddings, give one or the other")
        for name, choice, choices in (
            ("padding_side", padding_side, ("left", "right")),
            ("unknown_items", unknown_items, ("error", "skip")),
        ):
            if choice not in choices:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {choice!r}")
        self._model, self._sae = model, sae
        self._titles = _titles(item_titles)
        n_items = len(self._titles)
        if max_length is None:
            max_length = getattr(getattr(model, "config", None), "max_length", None)
        self._max_length = _at_least(1, "max_length", max_length)
        self._k = _at_least(1, "k", k)
        if k > n_items:
            raise ValueError(f"k: expected at most {n_items}, the number of items, got {k}")
        self._max_batch_size = _at_least(1, "max_batch_size", max_batch_size)
        self._n_reasons = _at_least(0, "n_reasons", n_reasons)
        self._exclude_seen = bool(exclude_seen)
        self._padding_side, self._padding_token = padding_side, _at_least(None, "padding_token", padding_token)
        self._tokens = _tokens(token_of_item, n_items, self._padding_token)
        self._ids = _item_ids(item_ids, n_items)
        self._first_token = int(self._tokens[0]) if isinstance(token_of_item, (int, np.integer)) else None
        self._hidden, self._score, self._item_embeddings = hidden, score, item_embeddings
        # What it takes to make it again, in another process.
        self._settings: dict[str, Any] = {
            "item_titles": self._titles.tolist(),
            "item_ids": None if item_ids is None else self._ids,
            "hidden": hidden,
            "score": score,
            "item_embeddings": item_embeddings,
            "max_length": self._max_length,
            "padding_side": padding_side,
            "padding_token": self._padding_token,
            "token_of_item": token_of_item,
            "k": self._k,
            "max_batch_size": self._max_batch_size,
            "max_passes": None if max_passes is None else _at_least(1, "max_passes", max_passes),
            "max_history": _at_least(1, "max_history", max_history),
            "max_edits": _at_least(0, "max_edits", max_edits),
            "feature_names": feature_names,
            "n_reasons": self._n_reasons,
            "exclude_seen": self._exclude_seen,
            "unknown_items": unknown_items,
        }
        self._local = threading.local()
        self._connect(site)
        try:
            self._feature_names = _feature_names(feature_names, sae.n_features)
            self._reader = RequestReader(
                n_items,
                None if item_ids is None else {item: index for index, item in enumerate(self._ids.tolist())},
                sae.n_features,
                sae.d_model,
                self._k,
                max_history,
                max_edits,
                unknown_items == "skip",
            )
            self._pass_sizes = _in_one_setting(
                self._device, lambda: {length: self._sizes_of(length) for length in self._lengths()}
            )
            largest = {length: sizes[-1] for length, sizes in self._pass_sizes.items()}
            self._max_passes = self._settings["max_passes"] or _in_one_setting(self._device, self._passes_that_pay)
            self._combiner: Combiner[int, Request, _Answer] = Combiner(self._answer, largest, self._max_passes)
        except BaseException:
            self.close()
            raise

    @property
    def site(self) -> str:
        """Dotted path of the steered module."""
        return self._site

    @property
    def max_passes(self) -> int:
        """How many passes may be under way at once."""
        return self._max_passes

    @property
    def pass_sizes(self) -> dict[int, tuple[int, ...]]:
        """By padded length, the numbers of rows that forward passes have."""
        return dict(self._pass_sizes)

    def __call__(self, columns: Any) -> Any:
        """Answer a table of requests.

        Args:
            columns: a mapping from names to columns of one length ``N``, or a pyarrow table or record batch, with

                - ``history``: per row a list or array of item ids, oldest first, or its json text;
                - ``edits`` (optional): per row ``None``, a :class:`~saerec_fast.SteeringPlan`, its dict or its json
                  text. A mask of positions has one entry per item of the history;
                - ``k`` (optional): per row an integer or ``None``, or one integer for all.

        Returns:
            A dict of object arrays ``(N,)``, or what pyarrow makes of it for a table of pyarrow. Per row, 1-D arrays,
            best or strongest first, shorter than asked for where there is no more, empty where there is an error:

            - ``items`` (ids: int64, or text as objects), ``titles`` (objects), ``scores`` (float32);
            - ``features`` (int64) and ``feature_values`` (float32): the features that are active at the history's last
              position at the site, after the edits, so that they are what the scores were made from;
              ``feature_names``, where the predictor has names;
            - ``error``: ``None`` or text.

        Raises:
            TypeError: not a table, or a column that is no sequence.
            ValueError: no ``history``, an unknown or repeated column, or columns of different length.
            RuntimeError: closed, also meanwhile; or called from within a call of the same thread, by the model say.
        """
        self._check_open()
        table = read_table(columns)
        answers = [_Answer() for _ in table["history"]]
        rows: list[int] = []
        requests: list[tuple[int, Request]] = []
        for row, entries in enumerate(zip(table["history"], table["edits"], table["k"], strict=True)):
            try:
                request = self._reader.read(*entries)
            except (ValueError, TypeError) as error:
                answers[row].error = str(error)
                continue
            except RecursionError:  # of json, and of what shows a value in a message
                answers[row].error = "history, edits: expected plain lists, got too deeply nested ones"
                continue
            length = next(length for length in self._pass_sizes if length >= min(len(request.items), self._max_length))
            rows.append(row)
            requests.append((length, request))
        for row, answer in zip(rows, self._combiner(requests), strict=True):
            answers[row] = answer
        return write_table(self._columns(answers), columns, ids_are_text=self._ids.dtype == object)

    def close(self) -> None:
        """Take everything off the model; doing so again does nothing. Calls under way in other threads raise."""
        self._handle.detach()
        self._hook.remove()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model_without_predictors(), "sae": self._sae, "site": self._site, **self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return (
            f"Predictor({type(self._model).__name__}, n_items={len(self._titles)}, site={self._site!r}, "
            f"n_features={self._sae.n_features}, k={self._k})"
        )

    def _check_open(self) -> None:
        if not self._handle.attached:
            raise RuntimeError("the predictor is closed; make a new one")

    def _connect(self, site: str | nn.Module) -> None:
        # Through the model for the checks, which know what is around the module; then on the module itself, whose
        # calls are seen also where a library does not call the model's own forward.
        probe = attach(self._model, site, self._sae, SteeringPlan())
        self._site = probe.site
        probe.detach()
        module = self._model.get_submodule(self._site)
        self._model.eval()
        self._sae.eval()
        self._handle = attach(module, "", self._sae, SteeringPlan(), valid=self._valid_of_pass)
        # Sees the steered states: the handle acts before any hook.
        self._hook = module.register_forward_hook(self._keep_site)
        self._device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))

    def _valid_of_pass(self, *args: Any, **kwargs: Any) -> Tensor:
        current: _Pass | None = getattr(self._local, "current", None)
        # Outside of this predictor's passes the plan is empty, and no mask is looked at.
        return torch.ones(0, dtype=torch.bool) if current is None else current.valid

    def _keep_site(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current: _Pass | None = getattr(self._local, "current", None)
        if current is None:
            return
        if isinstance(output, (tuple, list)):
            index = hidden_index(output, self._sae.d_model)
            output = None if index is None else output[index]
        if not isinstance(output, Tensor) or output.shape != (*current.valid.shape, self._sae.d_model):
            came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            expected = (*current.valid.shape, self._sae.d_model)
            raise ValueError(f"site: expected {self._site!r} to return hidden states {expected}, got {came}")
        current.site = current.at_last(output)

    def _lengths(self) -> list[int]:
        """The padded lengths of passes, ascending."""
        lengths = [self._max_length]
        length = _SHORTEST
        while self._padding_side == "right" and length < self._max_length:
            lengths.append(length)
            length *= 2
        return sorted(lengths)

    def _sizes_of(self, length: int) -> tuple[int, ...]:
        """The numbers of rows up to ``max_batch_size`` at which passes of this length give the same bits."""
        largest = self._max_batch_size
        n_items = len(self._titles)
        generator = np.random.default_rng(0)
        # Full or nearly so: what is summed otherwise are the last positions, where the tiles of a matrix product end.
        requests, others = (
            [Request(generator.integers(0, n_items, length - row // 2 % length), None, 1) for row in range(largest)]
            for _ in range(2)
        )
        # The largest token has to be one that the model knows.
        requests[0].items[0] = self._tokens.argmax()

        def run(chosen: list[Request]) -> tuple[Tensor, Tensor]:
            return self._forward(chosen, length, len(chosen), whole=True)

        try:
            output, site = self._forward(requests[:1], length, 1)
            # Raises where embeddings, or the autoencoder's dtype, do not fit.
            self._ranked(requests[:1], output)
            self._reasons(requests[:1], site)
        except IndexError as error:
            raise ValueError(f"token_of_item: expected tokens that the model knows ({error})") from error
        if largest == 1:
            return (1,)
        whole = run(requests)
        rolled = [requests[-1], *requests[:-1]]
        for parity in (0, 1):
            # Every other row one place further, between rows it has not met.
            met = [(rolled if row % 2 == parity else others)[row] for row in range(largest)]
            moved = slice(parity, None, 2)
            if not _same(tuple(part[moved] for part in run(met)), tuple(part.roll(1, 0)[moved] for part in whole)):
                return (1,)
        powers = [1 << exponent for exponent in range(largest.bit_length()) if 1 << exponent < largest]

        def agrees(size: int) -> bool:
            compared = min(max(2 * size, _COMPARED), largest) // size * size
            parts = [run(requests[begin : begin + size]) for begin in range(0, compared, size)]
            joined = tuple(torch.cat([part[which] for part in parts]) for which in (0, 1))
            return _same(joined, tuple(part[:compared] for part in whole))

        return (*(size for size in powers if agrees(size)), largest)

    def _passes_that_pay(self) -> int:
        """How many passes to run at once."""
        if self._device.type != "cpu":
            return 1
        request = Request(np.zeros(self._max_length, np.int64), None, 1)

        def seconds() -> float:
            # Of this thread's own work: passes run on one thread, and a busy machine shall not make them look long.
            started = time.thread_time()
            self._forward([request], self._max_length, 1)
            return time.thread_time() - started

        return _n_cores() if min(seconds() for _ in range(_TIMED)) > _LONG_PASS else 1

    def _answer(self, length: int, requests: list[Request]) -> list[_Answer]:
        """The answers of one pass, or where a plan is refused in it, of as many as find out whose."""
        try:
            answers = _in_one_setting(self._device, self._answer_together, length, requests)
        except Exception as error:
            self._check_open()
            # A warning is an exception only where the filters say so.
            if not isinstance(error, (ValueError, UserWarning)):
                raise
            if len(requests) == 1:
                return [_Answer(error=str(error))]
            half = len(requests) // 2
            return self._answer(length, requests[:half]) + self._answer(length, requests[half:])
        # Another thread may have closed it meanwhile; without what it put into the model a pass fails in many ways, or
        # ends unsteered.
        self._check_open()
        return answers

    def _answer_together(self, length: int, requests: list[Request]) -> list[_Answer]:
        size = next(size for size in self._pass_sizes[length] if size >= len(requests))
        output, site = self._forward(requests, length, size)
        ranked = self._ranked(requests, output)
        reasons = self._reasons(requests, site)
        answers = []
        for request, (indices, scores), (features, values) in zip(requests, ranked, reasons, strict=True):
            if not scores[0] < np.inf:  # NaN comes first
                message = "scores: expected finite numbers, got NaN or infinity; weaker edits may help"
                answers.append(_Answer(error=message))
                continue
            kept = indices[scores > -np.inf][: request.k]
            answers.append(_Answer(kept, scores[: len(kept)].astype(np.float32), features, values))
        return answers

    def _forward(
        self, requests: list[Request], length: int, size: int, *, whole: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Hidden states or scores ``(size, ·)`` and states at the site ``(size, d_model)``, at each last position; or
        at all positions, where the model gives them.
        """
        filled = [*requests, *requests[:1] * (size - len(requests))]
        tokens = np.full((size, length), self._padding_token, dtype=np.int64)
        valid = np.zeros((size, length), dtype=bool)
        last = np.empty(size, dtype=np.int64)
        places = []
        for row, request in enumerate(filled):
            items = request.items[-length:]
            place = slice(length - len(items), length) if self._padding_side == "left" else slice(0, len(items))
            tokens[row, place], valid[row, place], last[row] = self._tokens[items], True, place.stop - 1
            places.append(place)
        plans = [_plan_of_pass(request.plan, place, length) for request, place in zip(requests, places, strict=False)]
        current = _Pass(torch.from_numpy(valid).to(self._device), torch.from_numpy(last).to(self._device), whole)
        batch = torch.from_numpy(tokens).to(self._device)
        self._local.current = current
        try:
            if any(plan is not None for plan in plans):
                with self._handle.request([*plans, *[None] * (size - len(plans))]):
                    output = self._run_model(batch)
            else:
                output = self._run_model(batch)
        finally:
            self._local.current = None
        if current.site is None:
            raise ValueError(f"site: {self._site!r} does not run in the forward pass")
        name = "hidden" if self._score is None else "score"
        if not isinstance(output, Tensor) or output.dim() not in (2, 3):
            came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"{name}: expected a tensor (B, L, ·) or (B, ·), got {came}")
        if output.shape[:-1] != ((size, length) if output.dim() == 3 else (size,)):
            raise ValueError(f"{name}: expected ({size}, {length}, ·) or ({size}, ·), got {tuple(output.shape)}")
        if self._score is not None and output.shape[-1] != len(self._titles):
            raise ValueError(f"score: expected {len(self._titles)} scores, one per title, got {output.shape[-1]}")
        return (current.at_last(output) if output.dim() == 3 else output), current.site

    def _run_model(self, tokens: Tensor) -> Any:
        if self._score is not None:
            return self._score(self._model, tokens)
        if self._hidden is not None:
            return self._hidden(self._model, tokens)
        output = self._model(tokens)
        return getattr(output, "last_hidden_state", output)

    def _ranked(self, requests: list[Request], output: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Item indices and scores of each request, best first, ties by smallest index; -inf where there is none."""
        seen = [request.items if self._exclude_seen else request.items[:0] for request in requests]
        k = max(request.k for request in requests)
        if self._score is not None:
            rows = output.to(torch.promote_types(output.dtype, torch.float32)).cpu().numpy()
            return (_largest(scores, ids, k) for scores, ids in zip(rows, seen, strict=False))
        # All rows of the pass: what runs without kernels may follow the size of the batch.
        seen += [np.empty(0, np.int64)] * (len(output) - len(seen))
        offsets = torch.tensor([0, *accumulate(map(len, seen))], device=output.device)
        exclude = Ragged(offsets, torch.from_numpy(np.concatenate(seen)).to(output.device))
        top = linear_topk(output, self._embeddings(), k=k, exclude=exclude if self._exclude_seen else None)
        values, indices = top.values.float().cpu().numpy(), top.indices.cpu().numpy()
        return zip(indices[: len(requests)], values[: len(requests)], strict=True)

    def _embeddings(self) -> Tensor:
        source = self._item_embeddings
        if source is None:
            weight = getattr(self._model, "item_embeddings", None)
            if not isinstance(weight, Tensor):
                raise ValueError(
                    f"item_embeddings: {type(self._model).__name__} has no such tensor; give a dotted path or a "
                    "function of the model, or score"
                )
        elif isinstance(source, str):
            weight = _tensor_at(self._model, source)
        elif callable(source):
            weight = source(self._model)
        else:
            raise TypeError(f"item_embeddings: expected a path or a function, got {type(source).__name__}")
        n_items, first = len(self._titles), self._first_token
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise TypeError(f"item_embeddings: expected a tensor ({n_items}, d), got {type(weight).__name__}")
        if isinstance(source, str) and first is not None and len(weight) >= first + n_items:
            weight = weight[first : first + n_items]
        if len(weight) != n_items:
            raise ValueError(f"item_embeddings: expected {n_items} rows, one per title, got {len(weight)}")
        return weight

    def _reasons(self, requests: list[Request], site: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and values of the strongest active features of each request."""
        if not self._n_reasons:
            return ((np.empty(0, np.int64), np.empty(0, np.float32)) for _ in requests)
        encoded = self._sae.encode(site)
        offsets, ids = encoded.offsets.tolist(), encoded.indices.cpu().numpy()
        values = encoded.values.float().cpu().numpy()

        def strongest(row: int) -> tuple[np.ndarray, np.ndarray]:
            entries = slice(offsets[row], offsets[row + 1])
            active = np.flatnonzero(values[entries] > 0)
            found, strengths = ids[entries][active], values[entries][active]
            order = np.lexsort((found, -strengths))[: self._n_reasons]
            return found[order].astype(np.int64), strengths[order]

        return (strongest(row) for row in range(len(requests)))

    def _columns(self, answers: list[_Answer]) -> dict[str, np.ndarray]:
        columns = {
            "items": _objects([self._ids[answer.items] for answer in answers]),
            "titles": _objects([self._titles[answer.items] for answer in answers]),
            "scores": _objects([answer.scores for answer in answers]),
            "features": _objects([answer.features for answer in answers]),
            "feature_values": _objects([answer.feature_values for answer in answers]),
        }
        names = self._feature_names
        if names is not None:
            columns["feature_names"] = _objects(
                [_objects([names.get(one, f"#{one}") for one in answer.features.tolist()]) for answer in answers]
            )
        return {**columns, "error": _objects([answer.error for answer in answers])}

    def _model_without_predictors(self) -> nn.Module:
        """A copy of the model's modules, with the same tensors, and without what predictors put there."""
        own: dict[int, Any] = {}
        for module in self._model.modules():
            for hook in module._forward_hooks.values():
                predictor = getattr(hook, "__self__", None)
                if isinstance(predictor, Predictor):
                    own |= {id(one): one for one in (predictor, predictor._handle)}
        tensors = {id(tensor): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}
        copied = copy.deepcopy(self._model, {**tensors, **own})
        handles = [one._handle for one in own.values() if isinstance(one, Predictor)]
        for module in copied.modules():
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if id(getattr(hook, "__self__", None)) in own]:
                del hooks[key]
            forward = vars(module).get("forward")
            if isinstance(forward, SteeredForward):
                for handle in handles:
                    forward.remove(handle)
        return copied


def _in_one_setting(device: torch.device, function: Callable[..., Returned], *arguments: Any) -> Returned:
    """Call it in the setting of all passes, whatever that of the calling thread: another's row gives the same bits."""

    def call() -> Returned:
        with torch.inference_mode(), _full_precision(device.type), _one_thread():
            return function(*arguments)

    # Empty: what the model looks up there has its default.
    return contextvars.Context().run(call)


def _n_cores() -> int:
    """Of those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Without the autocast that the thread may be under."""
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch works on the calling thread alone: the same sums everywhere, and nothing to wait for after a fork."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plan_of_pass(plan: SteeringPlan | None, place: slice, length: int) -> SteeringPlan | None:
    """The plan with its mask, if it has one, over the positions of the pass."""
    if plan is None or not isinstance(plan.positions, Tensor):
        return plan
    mask = torch.zeros(length, dtype=torch.bool)
    mask[place] = plan.positions[-length:]
    return plan.at_positions(mask)


def _largest(scores: np.ndarray, seen: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and values of the k largest scores ``(n,)`` that were not seen; NaN first."""
    scores = scores.copy()
    scores[seen] = -np.inf
    descending = -scores
    # NaN counts as the largest, and NumPy sorts it last.
    descending[np.isnan(scores)] = -np.inf
    bound = np.partition(descending, k - 1)[k - 1]
    candidates = np.flatnonzero(descending <= bound)
    chosen = candidates[np.lexsort((candidates, descending[candidates]))[:k]]
    return chosen, scores[chosen]


def _same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def _objects(values: Sequence[Any]) -> np.ndarray:
    """An object array, also of arrays of one length, which NumPy would stack."""
    array = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        array[place] = value
    return array


def _at_least(smallest: int | None, name: str, value: Any) -> int:
    if (
        not isinstance(value, (int, np.integer))
        or isinstance(value, bool)
        or (smallest is not None and value < smallest)
    ):
        bound = "" if smallest is None else f" >= {smallest}"
        raise ValueError(f"{name}: expected an integer{bound}, got {value!r}")
    return int(value)


def _titles(titles: Sequence[str]) -> np.ndarray:
    if isinstance(titles, (str, bytes)) or not hasattr(titles, "__iter__"):
        raise TypeError(f"item_titles: expected a list of texts, got {type(titles).__name__}")
    values = list(titles)
    wrong = next((title for title in values if not isinstance(title, str)), None)
    if wrong is not None:
        raise TypeError(f"item_titles: expected texts, got {wrong!r:.80}")
    if not values:
        raise ValueError("item_titles: expected at least one item, got none")
    return _objects([str(title) for title in values])


def _item_ids(item_ids: Any, n_items: int) -> np.ndarray:
    """int64 ``(n_items,)``, or objects that are text."""
    if item_ids is None:
        return np.arange(n_items)
    values = item_ids.tolist() if isinstance(item_ids, np.ndarray) else list(item_ids)
    if len(values) != n_items or len(set(values)) != n_items:
        raise ValueError(f"item_ids: expected {n_items} distinct ids, one per title, got {len(set(values))}")
    if all(isinstance(value, str) for value in values):
        return _objects(values)
    if all(isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in values):
        return np.array(values, dtype=np.int64)
    raise TypeError("item_ids: expected integers or texts, not both and nothing else")


def _tokens(token_of_item: Any, n_items: int, padding_token: int) -> np.ndarray:
    """int64 ``(n_items,)``."""
    if isinstance(token_of_item, (int, np.integer)) and not isinstance(token_of_item, bool):
        tokens = np.arange(n_items) + int(token_of_item)
    else:
        tokens = np.asarray(token_of_item)
        if tokens.dtype.kind not in "iu" or tokens.shape != (n_items,):
            raise ValueError(
                f"token_of_item: expected an integer, or integers ({n_items},), got {tokens.dtype} {tokens.shape}"
            )
        tokens = tokens.astype(np.int64)
    if tokens.min() < 0 or len(np.unique(tokens)) < n_items or padding_token in tokens:
        raise ValueError(f"token_of_item: expected distinct tokens >= 0 without padding_token {padding_token}")
    return tokens


def _feature_names(names: Any, n_features: int) -> dict[int, str] | None:
    if names is None:
        return None
    if not isinstance(names, Mapping):
        if isinstance(names, str) or len(names) != n_features:
            raise ValueError(f"feature_names: expected {n_features} names, or a mapping from ids, got {names!r:.80}")
        names = dict(enumerate(names))
    for feature, name in names.items():
        if not isinstance(feature, (int, np.integer)) or not 0 <= feature < n_features or not isinstance(name, str):
            raise ValueError(f"feature_names: expected texts by ids below {n_features}, got {feature!r}: {name!r:.80}")
    return {int(feature): str(name) for feature, name in names.items()}


def _tensor_at(model: nn.Module, path: str) -> Tensor:
    holder: Any = model
    for name in path.split("."):
        holder = getattr(holder, name, None)
    if not isinstance(holder, Tensor):
        raise ValueError(f"item_embeddings: {type(model).__name__} has no tensor at {path!r}")
    return holder
