"""What steering adds to forward pass and scoring: recommenders, autoencoders, plans, and every way to steer.

A way is given a copy of the recommender that shares the parameters of the unsteered one, and returns what recommends
with the plan in force; attaching happens before the measurement. All ways of a case make the same edits to the same
hidden states, with the same weights.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import peers
import pytest
import torch
from cases import Inputs
from torch import Tensor, nn
from ways import Role, dictionary_learning
from workloads import RUN, THREADS

import saerec_fast as sf
from saerec_fast.files import read_json

N_ITEMS, WIDTH, LENGTH, N_LAYERS, N_HEADS, TOP = 3417, 64, 50, 2, 2, 10
N_FEATURES, K = 2048, 32
N_EDITS = 8
ROWS = (1, 32, 256)
# Sequences that are compared with float64.
CHECKED = 16
# Units in which values of float32 can be told apart for certain, as shares of the largest score of a row.
DECIDED = 1e-5

Recommendation = tuple[Tensor, Tensor]


class Recommender(nn.Module):
    """Forward pass, scores of the last position, the best items: ``tokens (B, L)`` to values and ids ``(B, TOP)``."""

    def __init__(self, model: nn.Module, encode: Callable[[nn.Module, Tensor], Tensor], items: Tensor) -> None:
        super().__init__()
        self.model = model
        self.encode = encode
        self.register_buffer("items", items)

    def forward(self, tokens: Tensor) -> Recommendation:
        values, ids = (self.encode(self.model, tokens)[:, -1] @ self.items.T).topk(TOP)
        return values, ids


class Host(NamedTuple):
    """A recommender, the path of the module that is steered, and sequences for it ``(at least ROWS[-1], L)``."""

    recommender: Recommender
    site: str
    tokens: Tensor


@dataclass(frozen=True)
class Plan:
    """Edits at random features.

    Attributes:
        edits: ``add`` (8), ``edit`` (4 set, 4 scaled), ``set`` (one) or ``own`` (``edit`` with other features and
            values in each sequence).
        mode: as in :class:`~saerec_fast.SteeringPlan`.
        positions: likewise.
    """

    edits: Literal["add", "edit", "set", "own"]
    mode: Literal["delta", "reconstruct"] = "delta"
    positions: Literal["all", "last"] = "all"

    def __str__(self) -> str:
        return f"{self.edits}-{self.mode}-{self.positions}"

    def rows(self, count: int, n_features: int) -> list[list[sf.Edit]]:
        """The edits of ``count`` sequences; a single list where all have the same."""
        rng = np.random.default_rng(0)
        ops = {"add": ["add"] * N_EDITS, "set": ["set"]}.get(self.edits, ["set", "scale"] * (N_EDITS // 2))
        return [_draw(rng, ops, n_features) for _ in range(count if self.edits == "own" else 1)]

    def steering(self, edits: list[sf.Edit]) -> sf.SteeringPlan:
        return sf.SteeringPlan(edits, self.mode, self.positions)


def _draw(rng: np.random.Generator, ops: list[Any], n_features: int) -> list[sf.Edit]:
    features = rng.choice(n_features, len(ops), replace=False)
    return [sf.Edit(feature, op, rng.uniform(1.0, 4.0)) for feature, op in zip(features, ops, strict=True)]


@dataclass(frozen=True)
class SteeringCase:
    """``rows`` sequences through a recommender whose hidden states are steered, as it is or under ``torch.compile``."""

    host: str
    activation: str
    plan: Plan
    rows: int
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.model}-{self.activation}-{self.plan}-rows{self.rows}"

    @property
    def model(self) -> str:
        return f"{self.host}-compiled" if self.compiled else self.host


PLANS = (
    ("relu", Plan("add")),
    ("relu", Plan("add", positions="last")),
    *((activation, Plan("edit")) for activation in ("relu", "topk", "batchtopk")),
    *((activation, Plan("edit", positions="last")) for activation in ("relu", "topk", "batchtopk")),
    *((activation, Plan("set", "reconstruct")) for activation in ("relu", "topk", "batchtopk")),
    *((activation, Plan("own")) for activation in ("relu", "topk")),
)
# Under torch.compile, for the first number of threads and small batches; every one of them is compiled anew.
COMPILED_PLANS = (("relu", Plan("add")), ("relu", Plan("edit")), ("topk", Plan("edit")))
# The trained run has one autoencoder.
RUN_PLANS = (Plan("add"), Plan("edit"), Plan("edit", positions="last"), Plan("set", "reconstruct"), Plan("own"))


def steering_cells() -> list[Any]:
    """Case, number of threads and way."""
    hosts: list[tuple[str, str, Plan]] = [
        (host, activation, plan) for host in ("gpt2", "rectools") for activation, plan in PLANS
    ]
    config_path = RUN / "sae" / "model" / "config.json"
    if config_path.exists():
        hosts += [("run", read_json(config_path)["activation"]["kind"], plan) for plan in RUN_PLANS]
    cells = [
        pytest.param(case, threads, way, id=f"{case}-threads{threads}-{way}")
        for rows in ROWS
        for threads in THREADS
        for host, activation, plan in hosts
        for case in [SteeringCase(host, activation, plan, rows)]
        for way in ways_of(case)
        # A large batch takes long with dense activations of every position: once is enough.
        if rows < ROWS[-1] or threads == THREADS[-1] or way == "saerec_fast"
    ]
    compiled = [
        SteeringCase(host, activation, plan, rows, compiled=True)
        for rows in ROWS[:-1]
        for host in ("gpt2", "rectools")
        for activation, plan in COMPILED_PLANS
    ]
    cells += [
        pytest.param(case, THREADS[0], way, id=f"{case}-threads{THREADS[0]}-{way}")
        for case in compiled
        for way in ways_of(case)
    ]
    return cells


def compiled(recommender: Recommender) -> Built:
    """The same under ``torch.compile``, for the one shape that it is called with."""
    built: Built = torch.compile(recommender, dynamic=False, fullgraph=True)
    return built


@cache
def host(name: str) -> Host:
    """A recommender of that name.

    Raises:
        peers.PeerUnavailableError: its library cannot be imported.
    """
    torch.manual_seed(0)
    made = {"gpt2": _gpt2, "rectools": _rectools, "run": _run}[name]()
    made.recommender.eval().requires_grad_(False)
    return made


def _gpt2() -> Host:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(
        GPT2Config(
            vocab_size=N_ITEMS + 1,
            n_positions=LENGTH,
            n_embd=WIDTH,
            n_layer=N_LAYERS,
            n_head=N_HEADS,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    items = model.wte.weight[1:].detach()
    return Host(
        Recommender(model, lambda model, tokens: model(tokens).last_hidden_state, items), "model.h.0", _random_tokens()
    )


def _rectools() -> Host:
    """The modules that ``SASRecModel(n_blocks=2, n_heads=2, n_factors=64)`` is made of, as it puts them together."""
    peers.load("rectools")
    from rectools.models.nn.item_net import IdEmbeddingsItemNet, SumOfEmbeddingsConstructor
    from rectools.models.nn.transformers.net_blocks import LearnableInversePositionalEncoding
    from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers
    from rectools.models.nn.transformers.similarity import DistanceSimilarityModule
    from rectools.models.nn.transformers.torch_backbone import TransformerTorchBackbone

    embedding = IdEmbeddingsItemNet(WIDTH, N_ITEMS + 1, dropout_rate=0.0)
    model = TransformerTorchBackbone(
        n_heads=N_HEADS,
        dropout_rate=0.0,
        item_model=SumOfEmbeddingsConstructor(N_ITEMS + 1, [embedding]),
        pos_encoding_layer=LearnableInversePositionalEncoding(True, LENGTH, WIDTH),
        transformer_layers=SASRecTransformerLayers(N_LAYERS, WIDTH, N_HEADS, dropout_rate=0.0),
        similarity_module=DistanceSimilarityModule(),
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_normal_(parameter)
    # RecTools, too, computes them once before it goes through the users.
    model.register_buffer("embeddings", model.item_model.get_all_embeddings().detach())
    recommender = Recommender(
        model,
        lambda model, tokens: model.encode_sessions({"x": tokens}, model.embeddings),
        model.embeddings[1:],
    )
    return Host(recommender, "model.transformer_layers.transformer_blocks.0", _random_tokens())


def _run() -> Host:
    from saerec_fast.pipeline import Run
    from saerec_fast.recommender import site_module

    run = Run(RUN, progress=False)
    model = run.model.eval()
    length = model.config.max_length
    sequences = [run.split.test.sequence(user)[-length:] for user in range(run.split.test.n_users)]
    full = [sequence + 1 for sequence in sequences if len(sequence) == length]
    if not full:
        pytest.skip(f"the run has no test user with {length} interactions")
    tokens = torch.from_numpy(np.stack([full[i % len(full)] for i in range(ROWS[-1])]).astype(np.int64))
    recommender = Recommender(model, lambda model, tokens: model(tokens), model.item_embeddings.detach())
    site = next(name for name, module in recommender.named_modules() if module is site_module(model, run.site))
    return Host(recommender, site, tokens)


def _random_tokens() -> Tensor:
    return torch.randint(1, N_ITEMS + 1, (ROWS[-1], LENGTH), generator=torch.Generator().manual_seed(1))


def sharing_copy(recommender: Recommender) -> Recommender:
    """Another recommender with the same parameters and buffers in memory, and hooks of its own."""
    shared = [*recommender.parameters(), *recommender.buffers()]
    return copy.deepcopy(recommender, {id(tensor): tensor for tensor in shared})


@cache
def autoencoder(host_name: str, activation: str) -> sf.SparseAutoencoder:
    """About ``K`` features fire on a position of the recommender's hidden states."""
    if host_name == "run":
        return sf.SparseAutoencoder.load(RUN / "sae" / "model").eval()
    hidden = hidden_states(host_name, host(host_name).tokens[:64]).flatten(0, 1)
    generator = torch.Generator().manual_seed(2)
    sae = sf.SparseAutoencoder(
        WIDTH, N_FEATURES, generator=generator, mean=float(hidden.mean()), std=float(hidden.std())
    )
    with torch.no_grad():
        sae.b_dec.copy_((hidden.mean(0) - sae.mean) / sae.std)
        scores = ((hidden - sae.mean) / sae.std - sae.b_dec) @ sae.W_enc.T
        share = 1 - K / N_FEATURES
        if activation == "relu":
            sae.b_enc.copy_(-_quantile(scores, share))
        elif activation == "topk":
            sae.activation = sf.TopK(K)
        else:
            sae.activation = sf.BatchTopK(K, float(_quantile(scores.reshape(-1, 1), share)))
    return sae.eval()


def _quantile(scores: Tensor, share: float) -> Tensor:
    """Of every column; torch's own takes no more than 2²⁴ numbers."""
    return scores.sort(0).values[int(share * (len(scores) - 1))]


@torch.inference_mode()
def hidden_states(host_name: str, tokens: Tensor) -> Tensor:
    """What the module that is steered returns, ``(B, L, d)``."""
    recommender, site, _ = host(host_name)
    seen: list[Tensor] = []
    handle = recommender.get_submodule(site).register_forward_hook(
        lambda module, args, output: seen.append(_hidden(output).clone())
    )
    recommender(tokens)
    handle.remove()
    return seen[0]


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _replaced(output: Any, hidden: Tensor) -> Any:
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


class Truth(NamedTuple):
    tokens: Tensor  # (rows, L)
    checked: int  # the first of them are compared
    scores: Tensor  # (checked, n_items)
    plain: Tensor  # (checked, n_items), of the unsteered recommender


@lru_cache(maxsize=1)
@torch.inference_mode()
def steering_truth(case: SteeringCase) -> Truth:
    """Scores of a recommender whose hidden states were steered by the reference in float64.

    Sequences in which rounding decides which features are active are not compared; they come last.
    """
    made, sae = host(case.host), autoencoder(case.host, case.activation)
    first = made.tokens[:CHECKED]
    decided = _decided(sae, hidden_states(case.host, first))
    assert decided.any(), "no sequence in which every selection is certain"
    rest = torch.cat([first[~decided], made.tokens[CHECKED:]])
    tokens = torch.cat([first[decided], rest])[: case.rows].clone()
    checked = min(case.rows, int(decided.sum()))

    weights = [weight.detach().double() for weight in sae.folded_weights()]
    rows = case.plan.rows(case.rows, autoencoder(case.host, case.activation).n_features)
    plans = [case.plan.steering(edits) for edits in rows]

    def steer(module: nn.Module, args: Any, output: Any) -> Any:
        wide = _hidden(output).double()
        parts = wide.split(1) if len(plans) > 1 else (wide,)
        steered = [
            sf.reference.steer(part, *weights, sae.activation, plan)
            for part, plan in zip(parts, plans[: len(parts)], strict=True)
        ]
        return _replaced(output, torch.cat(steered).float())

    recommender = sharing_copy(made.recommender)
    plain = _scores(recommender, tokens[:checked])
    recommender.get_submodule(made.site).register_forward_hook(steer)
    return Truth(tokens, checked, _scores(recommender, tokens[:checked]), plain)


def _scores(recommender: Recommender, tokens: Tensor) -> Tensor:
    hidden = recommender.encode(recommender.model, tokens)[:, -1]
    return hidden.double() @ recommender.items.double().T


def _decided(sae: sf.SparseAutoencoder, hidden: Tensor) -> Tensor:
    """Sequences in which no feature is so close to being selected, or not, that rounding may decide."""
    W_enc, b_enc, b_dec, _ = (weight.detach().double() for weight in sae.folded_weights())
    scores = (hidden.double() - b_dec) @ W_enc.T + b_enc
    least = DECIDED * scores.abs().amax(-1)
    activation = sae.activation
    if isinstance(activation, sf.TopK):
        top = scores.topk(activation.k + 1).values
        gap = top[..., -2] - top[..., -1]
    elif isinstance(activation, sf.ReLU):  # continuous at its threshold
        gap = torch.full_like(least, torch.inf)
    else:
        gap = (scores - sf.types.inference_threshold(activation)).abs().amin(-1)
    return (gap > least).all(-1)


class Edits(NamedTuple):
    """A plan as indices and values, with one row for all sequences or one for each."""

    set_ids: Tensor
    set_values: Tensor
    scale_ids: Tensor
    scale_values: Tensor
    add_ids: Tensor
    add_values: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """Edited copy of dense activations ``(B, L, n)``."""
        edited = features.clone()
        if len(self.set_ids) == 1:
            edited[..., self.set_ids[0]] = self.set_values[0]
            edited[..., self.scale_ids[0]] *= self.scale_values[0]
            edited[..., self.add_ids[0]] += self.add_values[0]
        else:
            rows = torch.arange(len(features)).unsqueeze(1)
            edited[rows, :, self.set_ids] = self.set_values.unsqueeze(2)
            edited[rows, :, self.scale_ids] *= self.scale_values.unsqueeze(2)
        return edited


def _edits(case: SteeringCase) -> Edits:
    rows = case.plan.rows(case.rows, autoencoder(case.host, case.activation).n_features)
    columns = []
    for op in ("set", "scale", "add"):
        columns.append(torch.tensor([[edit.feature for edit in row if edit.op == op] for row in rows]).long())
        columns.append(torch.tensor([[edit.value for edit in row if edit.op == op] for row in rows]).float())
    return Edits(*columns)


Built = Callable[[Tensor], Recommendation]
Change = Callable[[Tensor], Tensor]


def saerec_fast(case: SteeringCase, recommender: Recommender) -> Built:
    """Attached once. Plans of requests are made in the call, from the edits that came with each request."""
    site, sae = host(case.host).site, autoencoder(case.host, case.activation)
    rows = case.plan.rows(case.rows, autoencoder(case.host, case.activation).n_features)
    if case.plan.edits != "own":
        sf.attach(recommender, site, sae, case.plan.steering(rows[0]))
        return recommender
    handle = sf.attach(recommender, site, sae, sf.SteeringPlan())

    def serve(tokens: Tensor) -> Recommendation:
        with handle.request([case.plan.steering(edits) for edits in rows]):
            return recommender(tokens)

    return serve


def torch_hook(case: SteeringCase, recommender: Recommender) -> Built:
    """Dense activations in a forward hook; a delta takes one decode, of the change."""
    sae, edits = autoencoder(case.host, case.activation), _edits(case)
    W_enc, b_enc, b_dec, W_dec = (weight.detach().clone() for weight in sae.folded_weights())
    bias = b_enc - W_enc @ b_dec
    activation = sae.activation

    def encode(x: Tensor) -> Tensor:
        scores = nn.functional.linear(x, W_enc, bias)
        if isinstance(activation, sf.TopK):
            top = scores.topk(activation.k, sorted=False)
            return torch.zeros_like(scores).scatter_(-1, top.indices, top.values.relu())
        threshold = sf.types.inference_threshold(activation)
        return scores.relu() if threshold == 0 else torch.where(scores > threshold, scores, 0.0)

    def delta(x: Tensor) -> Tensor:
        features = encode(x)
        return x + (edits.apply(features) - features) @ W_dec

    def reconstruct(x: Tensor) -> Tensor:
        return edits.apply(encode(x)) @ W_dec + b_dec

    return _hooked(case, recommender, reconstruct if case.plan.mode == "reconstruct" else delta)


def torch_vector(case: SteeringCase, recommender: Recommender) -> Built:
    """What only adds needs no autoencoder in the forward pass: the sum of decoder rows, made before."""
    edits, W_dec = _edits(case), autoencoder(case.host, case.activation).folded_weights().W_dec.detach()
    vector = edits.add_values[0] @ W_dec[edits.add_ids[0]]
    return _hooked(case, recommender, lambda x: x + vector)


def second_copy(case: SteeringCase, recommender: Recommender) -> Built:
    """No plan either: what the comparison takes for a difference where there is none."""
    return recommender


def sae_lens(case: SteeringCase, recommender: Recommender) -> Built:
    library = peers.load("sae_lens")
    with tempfile.TemporaryDirectory() as folder:
        sf.save_sae(autoencoder(case.host, case.activation), folder, format="saelens")
        sae = library.SAE.load_from_disk(folder).eval()
    return _hooked(case, recommender, _library_change(case, sae.encode, sae.decode))


def nnsight(case: SteeringCase, recommender: Recommender) -> Built:
    """Trace, encode, edit, decode, write back: as is done in a notebook, with a dictionary of dictionary_learning."""
    library = peers.load("nnsight")
    sae = autoencoder(case.host, case.activation)
    weights = Inputs(torch.empty(0), *(weight.detach().clone() for weight in sae.folded_weights()))
    dictionary = dictionary_learning(weights, sae.activation.k if isinstance(sae.activation, sf.TopK) else 0)
    change = _library_change(case, dictionary.encode, dictionary.decode)
    last = case.plan.positions == "last"
    traced = library.NNsight(recommender)
    block = traced
    for name in host(case.host).site.split("."):
        block = block[int(name)] if name.isdigit() else getattr(block, name)
    is_tensor = _returns_tensor(case)

    def serve(tokens: Tensor) -> Recommendation:
        with traced.trace(tokens):
            output = block.output
            hidden = output if is_tensor else output[0]
            if last:
                hidden[:, -1:] = change(hidden[:, -1:])
            else:
                hidden[:] = change(hidden)
            result = traced.output.save()
        return result

    return serve


def _library_change(case: SteeringCase, encode: Change, decode: Change) -> Change:
    edits = _edits(case)

    def delta(x: Tensor) -> Tensor:
        features = encode(x)
        return x + (decode(edits.apply(features)) - decode(features))

    def reconstruct(x: Tensor) -> Tensor:
        return decode(edits.apply(encode(x)))

    return reconstruct if case.plan.mode == "reconstruct" else delta


def _hooked(case: SteeringCase, recommender: Recommender, change: Change) -> Built:
    last = case.plan.positions == "last"

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = _hidden(output)
        if last:
            steered = hidden.clone()
            steered[:, -1:] = change(hidden[:, -1:])
        else:
            steered = change(hidden)
        return _replaced(output, steered)

    module = recommender.get_submodule(host(case.host).site)
    module.register_forward_hook(hook)
    if case.compiled:
        # Else compiled code of the unsteered copy would be taken for this one's: hooks are not compared.
        module.forward = module.forward
    return recommender


@torch.inference_mode()
def _returns_tensor(case: SteeringCase) -> bool:
    recommender, site, tokens = host(case.host)
    kinds: list[bool] = []
    handle = recommender.get_submodule(site).register_forward_hook(
        lambda module, args, output: kinds.append(isinstance(output, Tensor))
    )
    recommender(tokens[:1])
    handle.remove()
    return kinds[0]


@dataclass(frozen=True)
class SteeringWay:
    """``build`` makes what is timed from a case and a recommender that it may change."""

    role: Role
    build: Callable[[SteeringCase, Recommender], Built]


STEERING = {
    "saerec_fast": SteeringWay("ours", saerec_fast),
    "torch_hook": SteeringWay("torch", torch_hook),
    "torch_vector": SteeringWay("torch", torch_vector),
    "second_copy": SteeringWay("yardstick", second_copy),
    "sae_lens": SteeringWay("sae library", sae_lens),
    "nnsight": SteeringWay("sae library", nnsight),
}


def ways_of(case: SteeringCase) -> list[str]:
    """The ways that a case is measured with.

    BatchTopK with its threshold is a ReLU with another threshold: the libraries' figures are those of the ReLU. Edits
    of each sequence's own have no form in the libraries.
    """
    if case.compiled:
        return ["saerec_fast", "torch_hook", *(["torch_vector"] if case.plan.edits == "add" else [])]
    if case.plan.edits == "own" or case.activation not in ("relu", "topk"):
        return ["saerec_fast", "torch_hook"]
    if case.plan.edits == "add":
        return ["saerec_fast", "torch_hook", "torch_vector", "second_copy", "sae_lens"]
    if case.plan.positions == "last":
        return ["saerec_fast", "torch_hook", "sae_lens"]
    return ["saerec_fast", "torch_hook", "sae_lens", "nnsight"]
