"""Training of the recommender: full cross-entropy, early stopping, checkpoints, bit-exact resume."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from saerec_fast.files import read_json, read_tensors, write_json, write_tensors
from saerec_fast.recommender.model import RecommenderConfig, SequenceRecommender, load_state

if TYPE_CHECKING:
    from saerec_fast.data import Dataset, Split

_BATCHES_PER_GROUP = 16
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6


@dataclass(frozen=True)
class EpochRecord:
    """One line of ``training.json``.

    Attributes:
        epoch: from 1.
        loss: mean cross-entropy per predicted item, in nats.
        validation_ndcg: :func:`next_item_ndcg` of the validation users.
        seconds: wall time of the epoch with its validation.
    """

    epoch: int
    loss: float
    validation_ndcg: float
    seconds: float


def train_recommender(
    split: Split,
    config: RecommenderConfig,
    out_dir: str | os.PathLike[str],
    *,
    epochs: int = 30,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_share: float = 0.05,
    patience: int = 8,
    item_init: Literal["spectral", "random"] = "spectral",
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> SequenceRecommender:
    """Train on ``split.train``, stop early on ``split.validation``, return the best epoch's model in eval mode.

    Every interaction but a user's first is predicted once per epoch from at most ``config.max_length`` items
    before it: longer sequences are cut into windows whose offset is drawn anew each epoch. AdamW with a linear warm-up
    and a cosine decay to zero over ``epochs``; gradients are clipped to norm 1.

    Files in ``out_dir``: ``config.json`` and ``model.safetensors`` (the best epoch so far, for
    :meth:`SequenceRecommender.load`), ``training.json`` (settings and one record per epoch),
    ``checkpoint.json`` with ``checkpoint-<epoch>.safetensors`` (to resume from). A crash at any moment leaves a folder
    that can be resumed. All randomness of an epoch follows from ``seed`` and its number; with the same number of
    threads a resumed run gives the same bits as an uninterrupted one. The global random state is left as it was.

    Args:
        split: disjoint users; the parts share one catalogue of ``config.n_items`` items.
        config: shape of the model.
        out_dir: created if missing.
        epochs: upper limit, and the length of the learning-rate schedule.
        batch_size: windows per step.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW, on matrices and embeddings (not on biases and layer norms).
        warmup_share: share of all steps in which the learning rate rises.
        patience: epochs without a better validation NDCG@10 after which training stops.
        item_init: ``"spectral"`` starts the item embeddings from :func:`spectral_item_embeddings` of the training
            users, which a few hundred users could hardly teach by gradient alone; ``"random"`` from a normal law.
        seed: of the initial weights, dropout, windows and their order.
        resume: continue what ``out_dir`` holds; a finished run is loaded without training. With ``False`` it is
            overwritten.
        progress: show a progress bar.
        on_epoch: called after each epoch's files are written.

    Raises:
        ImportError: transformers, or rich where ``progress`` is on, is not installed.
        ValueError: the catalogue and ``config.n_items`` differ; no sequence to train or validate on; ``out_dir``
            holds a run with other settings or data; a file in it is corrupt (the message names it).
    """
    if item_init not in ("spectral", "random"):
        raise ValueError(f"item_init: expected 'spectral' or 'random', got {item_init!r}")
    _check(split, config, epochs=epochs, batch_size=batch_size, patience=patience)
    out = Path(out_dir)
    settings = {
        "config": asdict(config),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_share": warmup_share,
        "patience": patience,
        "item_init": item_init,
        "seed": seed,
        "data": _fingerprint(split),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SequenceRecommender(config)
        if item_init == "spectral" and not (resume and (out / "checkpoint.json").exists()):
            with torch.no_grad():
                directions = spectral_item_embeddings(split.train, config.d_model, seed=seed)
                model.item_embeddings.copy_(directions * config.initializer_range)
        optimizer = _optimizer(model, learning_rate, weight_decay)
        records = _resume(out, settings, model, optimizer) if resume else []
        if not resume:
            # Without its checkpoint the old run cannot be taken for the new one, wherever this one stops.
            (out / "checkpoint.json").unlink(missing_ok=True)
        with progress_bar(progress, "recommender", epochs, len(records)) as show:
            while len(records) < epochs and not _is_over(records, patience):
                started = time.perf_counter()
                epoch = len(records) + 1
                batches = list(
                    training_batches(
                        split.train.offsets, config.max_length, batch_size, np.random.default_rng((seed, epoch))
                    )
                )
                torch.manual_seed(_epoch_seed(seed, epoch))
                model.train()
                total = torch.zeros((), dtype=torch.float64)
                n_targets = 0
                for position, (starts, stops) in enumerate(batches):
                    step_share = (epoch - 1 + position / len(batches)) / epochs
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate * schedule(step_share, warmup_share)
                    inputs, targets = window_tokens(split.train.items, starts, stops)
                    valid = targets != 0
                    hidden = model(inputs)[valid]
                    loss = tied_cross_entropy(hidden, model.item_embeddings, targets[valid] - 1)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    total += loss.detach().double() * len(hidden)
                    n_targets += len(hidden)
                    show(epoch - 1 + (position + 1) / len(batches), f"loss {float(total) / n_targets:.3f}")
                model.eval()
                ndcg = next_item_ndcg(model, split.validation)
                records.append(
                    EpochRecord(
                        epoch,
                        float(total) / n_targets,
                        ndcg,
                        time.perf_counter() - started,
                    )
                )
                best = _best(records)
                state = f"loss {records[-1].loss:.3f}  NDCG@10 {records[-1].validation_ndcg:.4f}"
                show(float(epoch), f"{state}, best {best.validation_ndcg:.4f}")
                if best.epoch == epoch:
                    model.save(out)
                _save_checkpoint(out, settings, model, optimizer, records)
                if on_epoch is not None:
                    on_epoch(records[-1])
    return SequenceRecommender.load(out)


def spectral_item_embeddings(dataset: Dataset, d_model: int, *, seed: int = 0) -> Tensor:
    """Item coordinates from the users who have them: the leading singular vectors of the normalised user × item matrix.

    With ``X`` the binary matrix and ``D`` its degrees, the right singular vectors of ``D_user^-½ X D_item^-½`` (Dhillon
    2001) times the square root of their singular values; the first, which holds popularity alone, is left out. The
    decomposition is randomised (Halko et al. 2011) and sparse: the work is that of a few passes over the interactions.

    Args:
        dataset: users with their items.
        d_model: number of coordinates.
        seed: of the random projection.

    Returns:
        float32 ``(n_items, d_model)`` with mean square 1. Where the matrix has fewer directions than ``d_model``, the
        other coordinates are drawn from a normal law.
    """
    generator = torch.Generator().manual_seed(seed)
    coordinates = torch.randn(dataset.n_items, d_model, generator=generator)
    user_of = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    pairs = np.unique(user_of * dataset.n_items + dataset.items)
    users, items = pairs // dataset.n_items, pairs % dataset.n_items
    degrees = (
        np.bincount(users, minlength=dataset.n_users)[users] * np.bincount(items, minlength=dataset.n_items)[items]
    )
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([users, items])),
        torch.from_numpy(degrees**-0.5).float(),
        (dataset.n_users, dataset.n_items),
        is_coalesced=True,
        check_invariants=True,
    )
    rank = min(d_model + 1 + _OVERSAMPLING, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, singular, right = torch.svd_lowrank(matrix, q=rank, niter=_POWER_ITERATIONS)
    found = min(d_model, int((singular > 1e-6).sum()) - 1)
    if found > 0:
        directions = right[:, 1 : found + 1] * singular[1 : found + 1].sqrt()
        coordinates[:, :found] = directions / directions.square().mean().sqrt()
    return coordinates / coordinates.square().mean().sqrt()


@torch.inference_mode()
def next_item_ndcg(model: SequenceRecommender, dataset: Dataset, *, k: int = 10, batch_size: int = 32) -> float:
    """NDCG@k of the next item at every position of each user's newest ``max_length + 1`` items.

    The full catalogue is ranked, the user's earlier items left out; a target that is among those counts as missed. This
    is what early stopping watches: the last item alone would give 100 users a standard error of .03, more than epochs
    differ.

    Args:
        model: in eval mode.
        dataset: users with at least 2 items count; the others are skipped.
        k: length of the list.
        batch_size: users per forward pass; memory only.

    Returns:
        Mean over users of their mean over positions; 0 where no user has 2 items.
    """
    length = model.config.max_length
    users = np.flatnonzero(np.diff(dataset.offsets) >= 2)
    total = 0.0
    for begin in range(0, len(users), batch_size):
        chosen = users[begin : begin + batch_size]
        stops = dataset.offsets[chosen + 1]
        starts = np.maximum(dataset.offsets[chosen], stops - length - 1)
        inputs, targets = window_tokens(dataset.items, starts, stops)
        valid = targets != 0
        scores = model.scores(model(inputs.to(model.device))).cpu()
        for row, user in enumerate(chosen):
            history = torch.from_numpy(dataset.sequence(int(user)).astype(np.int64))
            n_targets = int(valid[row].sum())
            n_before = len(history) - n_targets
            user_scores = scores[row, :n_targets]
            target = history[n_before:, None]
            # Step t has seen the history up to n_before + t, the target's own place not included.
            seen = torch.arange(len(history)) < n_before + torch.arange(n_targets)[:, None]
            steps, places = seen.nonzero(as_tuple=True)
            target_scores = user_scores.gather(1, target)
            user_scores[steps, history[places]] = -math.inf
            rank = 1 + (user_scores > target_scores).sum(dim=1)
            missed = user_scores.gather(1, target)[:, 0] == -math.inf
            gain = torch.where((rank <= k) & ~missed, 1 / torch.log2(1 + rank.double()), 0.0)
            total += float(gain.mean())
    return total / max(len(users), 1)


def schedule(share: float, warmup_share: float) -> float:
    """Factor on the learning rate after ``share`` of all steps: linear warm-up, then half a cosine to 0."""
    if share < warmup_share:
        return (share + 1e-3) / (warmup_share + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (share - warmup_share) / (1 - warmup_share)))


def training_windows(
    offsets: np.ndarray, max_length: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut every sequence into windows of 2 to ``max_length + 1`` items that overlap by one.

    The last item of a window is the first of the next, so that every item but a sequence's first is a target exactly
    once. In sequences longer than a window the first one gets a random length; the last takes what is left.

    Args:
        offsets: int64 ``(n_users + 1,)``.
        max_length: inputs per window.
        generator: of the random lengths.

    Returns:
        int64 ``(n_windows,)`` start and stop of each window in the items; none for sequences of fewer than 2.
    """
    n_targets = np.maximum(np.diff(offsets) - 1, 0)
    first = np.where(n_targets > max_length, generator.integers(1, max_length + 1, size=len(n_targets)), n_targets)
    n_windows = np.where(n_targets > 0, 1 + -(-(n_targets - first) // max_length), 0)
    users = np.repeat(np.arange(len(n_targets)), n_windows)
    number = np.arange(len(users)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    begin = np.where(number == 0, 0, first[users] + (number - 1) * max_length)
    end = np.minimum(first[users] + number * max_length, n_targets[users])
    return offsets[users] + begin, offsets[users] + end + 1


def training_batches(
    offsets: np.ndarray, max_length: int, batch_size: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The windows of one epoch in random batches; (starts, stops) of each, at most ``batch_size`` long.

    Windows are shuffled, sorted by length within groups of some batches, and the batches are shuffled again: windows
    of like length share a batch, so that little of it is padding.
    """
    starts, stops = training_windows(offsets, max_length, generator)
    order = generator.permutation(len(starts))
    group = _BATCHES_PER_GROUP * batch_size
    batches = []
    for begin in range(0, len(order), group):
        chosen = order[begin : begin + group]
        chosen = chosen[np.argsort((stops - starts)[chosen], kind="stable")]
        batches += [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
    for batch in generator.permutation(len(batches)):
        yield starts[batches[batch]], stops[batches[batch]]


def window_tokens(items: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[Tensor, Tensor]:
    """Input and target tokens, each int64 ``(B, L)`` with padding 0 on the right, ``L`` the longest window less 1."""
    steps = np.arange(int((stops - starts).max()))
    positions = starts[:, None] + steps
    inside = positions < stops[:, None]
    tokens = np.where(inside, items[np.minimum(positions, len(items) - 1)].astype(np.int64) + 1, 0)
    targets = torch.from_numpy(tokens[:, 1:].copy())
    inputs = torch.from_numpy(tokens[:, :-1].copy())
    return inputs.masked_fill(targets == 0, 0), targets


class _TiedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear head, blocks of rows at a time, gradients taken in the forward pass.

    Logits of a step (thousands of rows × the catalogue) would be written and read several times, forward and backward;
    a block of them stays in the cache, and memory does not grow with the catalogue × rows.
    """

    # A block of logits of 1 MiB stays in the second-level cache; fewer rows would read the head's weights too often.
    BLOCK_VALUES = 1 << 18
    MIN_ROWS = 64

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        n_rows = hidden.shape[0]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        rows = max(_TiedCrossEntropy.MIN_ROWS, _TiedCrossEntropy.BLOCK_VALUES // weight.shape[0])
        for start in range(0, n_rows, rows):
            block, target = hidden[start : start + rows], targets[start : start + rows, None]
            log_p = torch.log_softmax(block @ weight.T, dim=-1)
            loss -= log_p.gather(1, target).sum(dtype=torch.float64)
            # d loss / d logits = softmax − one-hot
            p = log_p.exp_()
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
            torch.mm(p, weight, out=grad_hidden[start : start + rows])
            grad_weight.addmm_(p.T, block)
        ctx.save_for_backward(grad_hidden.div_(n_rows), grad_weight.div_(n_rows))
        return (loss / n_rows).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_weight, None


def tied_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of ``−log softmax(hidden @ weight.T)[target]``; never holds all the logits at once.

    Args:
        hidden: ``(N, d)``, N at least 1.
        weight: ``(n_items, d)``.
        targets: int64 ``(N,)``, item indices.
    """
    loss = _TiedCrossEntropy.apply(hidden, weight, targets)
    assert isinstance(loss, Tensor)
    return loss


def _optimizer(model: SequenceRecommender, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _best(records: list[EpochRecord]) -> EpochRecord:
    return max(records, key=lambda record: (record.validation_ndcg, -record.epoch))


def _is_over(records: list[EpochRecord], patience: int) -> bool:
    return bool(records) and records[-1].epoch - _best(records).epoch >= patience


def _check(split: Split, config: RecommenderConfig, **positive: int) -> None:
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    n_items = split.train.n_items
    if config.n_items != n_items:
        raise ValueError(f"n_items: the config says {config.n_items}, the data have {n_items}")
    for name, part in (("train", split.train), ("validation", split.validation)):
        if not (np.diff(part.offsets) >= 2).any():
            raise ValueError(f"{name}: no user has 2 items")


def _fingerprint(split: Split) -> str:
    """Tells whether a checkpoint belongs to these data."""
    digest = hashlib.sha256()
    parts: tuple[Dataset, ...] = (split.train, split.validation)
    for part in parts:
        digest.update(np.ascontiguousarray(part.offsets, dtype=np.int64).tobytes())
        digest.update(np.ascontiguousarray(part.items, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _save_checkpoint(
    out: Path,
    settings: Mapping[str, Any],
    model: SequenceRecommender,
    optimizer: torch.optim.Optimizer,
    records: list[EpochRecord],
) -> None:
    """Tensors first, then the json that names them: only the second write makes the checkpoint count."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            tensors[f"optimizer.{index}.{name}"] = tensor
    name = f"checkpoint-{records[-1].epoch}.safetensors"
    write_tensors(out / name, tensors)
    history = {
        "settings": settings,
        "best_epoch": _best(records).epoch,
        "epochs": [asdict(record) for record in records],
    }
    write_json(out / "checkpoint.json", {"tensors": name, **history})
    write_json(out / "training.json", history)
    for old in out.glob("checkpoint-*.safetensors"):
        if old.name != name:
            old.unlink()


def _resume(
    out: Path, settings: Mapping[str, Any], model: SequenceRecommender, optimizer: torch.optim.Optimizer
) -> list[EpochRecord]:
    """Load the checkpoint in ``out`` into model and optimizer; its records, or none where there is no checkpoint."""
    path = out / "checkpoint.json"
    if not path.exists():
        return []
    data = read_json(path)
    try:
        saved, records = data["settings"], [EpochRecord(**record) for record in data["epochs"]]
        tensors_path = out / data["tensors"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a training checkpoint ({error})") from None
    # Through json, so that both sides have the same types.
    wanted = json.loads(json.dumps(settings))
    if saved != wanted:
        differing = sorted(name for name in {*saved, *wanted} if saved.get(name) != wanted.get(name))
        raise ValueError(f"{path}: a run with other {', '.join(differing)}; take another folder or resume=False")
    tensors = read_tensors(tensors_path)
    load_state(model, {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}, tensors_path)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return records


@contextmanager
def progress_bar(enabled: bool, description: str, total: int, done: int = 0) -> Iterator[Callable[[float, str], None]]:
    """A progress bar; the block gets ``show(completed, message)``, which does nothing where it is not enabled.

    Raises:
        ImportError: enabled, and rich is not installed.
    """
    if not enabled:
        yield lambda completed, message: None
        return
    try:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError as error:
        raise ImportError("progress bars need rich: pip install saerec-fast[study]") from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[message]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total, completed=done, message="")

        def show(completed: float, message: str) -> None:
            bar.update(task, completed=completed, message=message)

        yield show
