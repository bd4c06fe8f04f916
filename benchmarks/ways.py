"""Every way to compute each thing: saerec_fast, eager and compiled PyTorch, SAE libraries, search libraries.

A way is built from its weights outside of the measurement and is then called with hidden states. All ways of a table
compute the same function of the same weights: ReLU after the top-k, no rescaling by decoder norms, ``b_dec`` taken off
the input; a bare matmul, the yardstick, is the one exception. Libraries are imported when a way of theirs is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import peers
import torch
from cases import Inputs
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from workloads import L1_COEFFICIENT, MAX_SEEN, Catalogue

import saerec_fast as sf

# ours: the call a user of saerec_fast makes; variant: another call into it; yardstick: computes less than the task.
Role = Literal["ours", "variant", "torch", "sae library", "search", "yardstick"]


@dataclass(frozen=True)
class Way:
    """``build`` makes the callable that is timed, from inputs and k (0: ReLU)."""

    role: Role
    build: Callable[[Any, int], Any]
    compiled: bool = False


def set_threads(count: int) -> None:
    """Let all libraries loaded so far compute with ``count`` threads."""
    # Here and below imported where needed: a machine with a GPU may lack what only other ways need.
    from threadpoolctl import ThreadpoolController

    for library in ThreadpoolController().lib_controllers:
        # implicit splits the users over threads of its own and asks for the BLAS of scipy to have one.
        library.set_num_threads(1 if "scipy" in library.prefix else count)
    torch.set_num_threads(count)


def saerec_module(weights: Inputs, k: int) -> nn.Module:
    n, d = weights.W_enc.shape
    sae = sf.SparseAutoencoder(d, n, sf.TopK(k) if k else sf.ReLU())
    _load(sae, W_enc=weights.W_enc, b_enc=weights.b_enc, b_dec=weights.b_dec, W_dec=weights.W_dec)
    return sae.eval()


def saerec_functional(weights: Inputs, k: int) -> Callable[[Tensor], Tensor]:
    _, W_enc, b_enc, b_dec, W_dec = weights

    def reconstruct(x: Tensor) -> Tensor:
        features = (
            sf.encode_topk(x, W_enc, b_enc, b_dec, k=k) if k else sf.encode_threshold(x, W_enc, b_enc, b_dec, 0.0)
        )
        return sf.decode_sparse(features, W_dec, b_dec)

    return reconstruct


def eager_bag(weights: Inputs, k: int) -> Callable[[Tensor], Tensor]:
    W_enc, bias, W_dec, b_dec = _folded(weights)

    def reconstruct(x: Tensor) -> Tensor:
        values, indices = torch.addmm(bias, x, W_enc.T).topk(k, sorted=False)
        return embedding_bag(indices, W_dec, per_sample_weights=values.relu(), mode="sum") + b_dec

    return reconstruct


def eager_dense(weights: Inputs, k: int) -> Callable[[Tensor], Tensor]:
    W_enc, bias, W_dec, b_dec = _folded(weights)

    def reconstruct(x: Tensor) -> Tensor:
        features = torch.addmm(bias, x, W_enc.T).relu()
        if k:
            values, indices = features.topk(k, sorted=False)
            features = torch.zeros_like(features).scatter_(1, indices, values)
        return torch.addmm(b_dec, features, W_dec)

    return reconstruct


def compiled(build: Callable[[Inputs, int], Callable[[Tensor], Tensor]]) -> Callable[[Inputs, int], Any]:
    """The same under ``torch.compile``, for the one shape it is called with."""

    def build_compiled(weights: Inputs, k: int) -> Any:
        # One code object serves all cases: without a reset the second shape would be compiled for any shape.
        torch.compiler.reset()
        return torch.compile(build(weights, k), dynamic=False, fullgraph=True)

    return build_compiled


def sae_lens(weights: Inputs, k: int) -> nn.Module:
    library = peers.load("sae_lens")
    n, d = weights.W_enc.shape
    sizes = {"d_in": d, "d_sae": n, "apply_b_dec_to_input": True}
    sae = (
        library.TopKSAE(library.TopKSAEConfig(**sizes, k=k, rescale_acts_by_decoder_norm=False))
        if k
        else library.StandardSAE(library.StandardSAEConfig(**sizes))
    )
    return _load_sae_lens(sae, weights).eval()


def sparsify(weights: Inputs, k: int) -> Callable[[Tensor], Tensor]:
    coder = _sparse_coder(weights, k).eval()
    return lambda x: coder(x).sae_out


def dictionary_learning(weights: Inputs, k: int) -> nn.Module:
    return _dictionary(weights, k).eval()


def faiss_bag(weights: Inputs, k: int) -> Callable[[Tensor], Tensor]:
    """Search by inner product, the bias one more dimension, then the decoder of :func:`eager_bag`."""
    faiss = peers.load("faiss")
    W_enc, bias, W_dec, b_dec = _folded(weights)
    index = faiss.IndexFlatIP(W_enc.shape[1] + 1)
    index.add(torch.cat([W_enc, bias.unsqueeze(1)], dim=1).numpy())

    def reconstruct(x: Tensor) -> Tensor:
        query = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        values, indices = map(torch.from_numpy, index.search(query.numpy(), k))
        return embedding_bag(indices, W_dec, per_sample_weights=values.relu(), mode="sum") + b_dec

    return reconstruct


def encoder_addmm(weights: Inputs, k: int) -> Callable[[Tensor], Tensor]:
    W_enc, bias, _, _ = _folded(weights)
    return lambda x: torch.addmm(bias, x, W_enc.T)


TOPK = {
    "saerec_fast": Way("ours", saerec_module),
    "saerec_fast_functional": Way("variant", saerec_functional),
    "eager_bag": Way("torch", eager_bag),
    "eager_dense": Way("torch", eager_dense),
    "compiled_bag": Way("torch", compiled(eager_bag), compiled=True),
    "compiled_dense": Way("torch", compiled(eager_dense), compiled=True),
    "sae_lens": Way("sae library", sae_lens),
    "sparsify": Way("sae library", sparsify),
    "dictionary_learning": Way("sae library", dictionary_learning),
    "faiss_bag": Way("search", faiss_bag),
    "encoder_addmm": Way("yardstick", encoder_addmm),
}
RELU = {
    "saerec_fast": Way("ours", saerec_module),
    "saerec_fast_functional": Way("variant", saerec_functional),
    "eager_dense": Way("torch", eager_dense),
    "compiled_dense": Way("torch", compiled(eager_dense), compiled=True),
    "sae_lens": Way("sae library", sae_lens),
    "dictionary_learning": Way("sae library", dictionary_learning),
    "encoder_addmm": Way("yardstick", encoder_addmm),
}


class Step:
    """Forward pass, loss and backward pass: mean over the rows of the squared error, plus the L1 penalty of a ReLU.

    Args:
        compute: makes the loss of a batch and its gradients.
        parameters: W_enc, b_enc, b_dec and W_dec, in this order.
        transposed: whether the library keeps its two matrices as (d, n): encoder, decoder.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        transposed: tuple[bool, bool] = (False, False),
    ) -> None:
        self.compute = compute
        self.parameters = parameters
        self.transposed = transposed

    def __call__(self, x: Tensor) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        return self.compute(x)

    def gradients(self) -> list[Tensor]:
        """For W_enc (n, d), b_enc, b_dec and W_dec (n, d)."""
        W_enc, b_enc, b_dec, W_dec = (parameter.grad for parameter in self.parameters)
        return [W_enc.T if self.transposed[0] else W_enc, b_enc, b_dec, W_dec.T if self.transposed[1] else W_dec]


def step_saerec(weights: Inputs, k: int) -> Step:
    sae = saerec_module(weights, k).train()

    def step(x: Tensor) -> Tensor:
        result = sf.sae.training_step(sae, x, l1_coefficient=0.0 if k else L1_COEFFICIENT)
        return result.reconstruction_loss if k else result.reconstruction_loss + L1_COEFFICIENT * result.l1

    return Step(step, [sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec])


def step_eager(weights: Inputs, k: int) -> Step:
    parameters = [nn.Parameter(tensor.clone()) for tensor in weights[1:]]
    W_enc, b_enc, b_dec, W_dec = parameters

    def loss_of(x: Tensor) -> Tensor:
        pre = torch.addmm(b_enc, x - b_dec, W_enc.T)
        if not k:
            features = pre.relu()
            return _squared_error(torch.addmm(b_dec, features, W_dec), x) + _l1(features)
        values, indices = pre.topk(k, sorted=False)
        return _squared_error(embedding_bag(indices, W_dec, per_sample_weights=values.relu(), mode="sum") + b_dec, x)

    return Step(_backward(loss_of), parameters)


def step_sae_lens(weights: Inputs, k: int, sparse: bool = False) -> Step:
    library = peers.load("sae_lens")
    n, d = weights.W_enc.shape
    sizes = {"d_in": d, "d_sae": n, "apply_b_dec_to_input": True}
    if k:
        config = library.TopKTrainingSAEConfig(
            **sizes, k=k, rescale_acts_by_decoder_norm=False, use_sparse_activations=sparse
        )
        sae = library.TopKTrainingSAE(config)
    else:
        sae = library.StandardTrainingSAE(library.StandardTrainingSAEConfig(**sizes))
    sae = _load_sae_lens(sae, weights).train()

    def loss_of(x: Tensor) -> Tensor:
        # Not its own loss: that weighs the penalty by the decoder's norms.
        features, _ = sae.encode_with_hidden_pre(x)
        loss = _squared_error(sae.decode(features), x)
        return loss if k else loss + _l1(features)

    return Step(_backward(loss_of), [sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec], (True, False))


def step_sae_lens_sparse(weights: Inputs, k: int) -> Step:
    return step_sae_lens(weights, k, sparse=True)


def step_sparsify(weights: Inputs, k: int) -> Step:
    coder = _sparse_coder(weights, k).train()
    return Step(
        _backward(lambda x: _squared_error(coder(x).sae_out, x)),
        [coder.encoder.weight, coder.encoder.bias, coder.b_dec, coder.W_dec],
    )


def step_dictionary_learning(weights: Inputs, k: int) -> Step:
    dictionary = _dictionary(weights, k).train()

    def loss_of(x: Tensor) -> Tensor:
        features = dictionary.encode(x)
        loss = _squared_error(dictionary.decode(features), x)
        return loss if k else loss + _l1(features)

    encoder, decoder = dictionary.encoder, dictionary.decoder
    b_dec = dictionary.b_dec if k else dictionary.bias
    return Step(_backward(loss_of), [encoder.weight, encoder.bias, b_dec, decoder.weight], (False, True))


STEP_TOPK = {
    "saerec_fast": Way("ours", step_saerec),
    "eager_bag": Way("torch", step_eager),
    "sae_lens": Way("sae library", step_sae_lens),
    "sae_lens_sparse": Way("sae library", step_sae_lens_sparse),
    "sparsify": Way("sae library", step_sparsify),
    "dictionary_learning": Way("sae library", step_dictionary_learning),
    "encoder_addmm": Way("yardstick", encoder_addmm),
}
STEP_RELU = {
    "saerec_fast": Way("ours", step_saerec),
    "eager_dense": Way("torch", step_eager),
    "sae_lens": Way("sae library", step_sae_lens),
    "dictionary_learning": Way("sae library", step_dictionary_learning),
    "encoder_addmm": Way("yardstick", encoder_addmm),
}


Search = Callable[[Tensor], tuple[Tensor, Tensor]]


def saerec_catalogue(inputs: Catalogue, k: int) -> Search:
    return lambda x: sf.linear_topk(x, inputs.items, k=k, exclude=inputs.seen)


def saerec_packed(inputs: Catalogue, k: int) -> Search:
    packed = sf.pack_weights(inputs.items)
    return lambda x: sf.linear_topk(x, inputs.items, k=k, exclude=inputs.seen, packed=packed)


def torch_catalogue(inputs: Catalogue, k: int) -> Search:
    rows, ids = inputs.seen.row_ids(), inputs.seen.ids

    def search(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = x @ inputs.items.T
        scores[rows, ids] = -torch.inf
        return scores.topk(k)

    return search


def faiss_catalogue(inputs: Catalogue, k: int) -> Search:
    """Finds as many more as a user can have seen, and leaves the seen ones out: an index takes no list per query."""
    faiss = peers.load("faiss")
    index = faiss.IndexFlatIP(inputs.items.shape[1])
    index.add(inputs.items.numpy())
    seen = nn.utils.rnn.pad_sequence(
        list(inputs.seen.ids.split(inputs.seen.offsets.diff().tolist())), batch_first=True, padding_value=-1
    )

    def search(x: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = map(torch.from_numpy, index.search(x.numpy(), min(k + MAX_SEEN, len(inputs.items))))
        excluded = (ids.unsqueeze(2) == seen.unsqueeze(1)).any(2)
        kept = excluded.byte().argsort(dim=1, stable=True)[:, :k]
        return values.gather(1, kept), ids.gather(1, kept)

    return search


def implicit_catalogue(inputs: Catalogue, k: int) -> Search:
    import scipy.sparse

    topk = peers.load("implicit").cpu.topk.topk
    rows, items = len(inputs.x), inputs.items.numpy()
    offsets, ids = (tensor.int().numpy() for tensor in inputs.seen)
    seen = scipy.sparse.csr_matrix((torch.ones(len(ids)).numpy(), ids, offsets), shape=(rows, len(items)))

    def search(x: Tensor) -> tuple[Tensor, Tensor]:
        found, values = topk(items, x.numpy(), k, filter_query_items=seen, num_threads=torch.get_num_threads())
        return torch.from_numpy(values), torch.from_numpy(found)

    return search


def items_matmul(inputs: Catalogue, k: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ inputs.items.T


# Packing once is what a service does; without it the plain call stands for us.
CATALOGUE = {
    "saerec_fast": Way("ours", saerec_packed),
    "saerec_fast_unpacked": Way("variant", saerec_catalogue),
    "eager": Way("torch", torch_catalogue),
    "faiss": Way("search", faiss_catalogue),
    "implicit": Way("search", implicit_catalogue),
    "items_matmul": Way("yardstick", items_matmul),
}


def _folded(weights: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc, the bias that ``b_dec`` is folded into, W_dec, b_dec."""
    _, W_enc, b_enc, b_dec, W_dec = weights
    return W_enc, b_enc - W_enc @ b_dec, W_dec, b_dec


def _squared_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    return (reconstruction - x).square().sum(-1).mean()


def _l1(features: Tensor) -> Tensor:
    return L1_COEFFICIENT * features.sum(-1).mean()


def _backward(loss_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        loss = loss_of(x)
        loss.backward()
        return loss.detach()

    return compute


@torch.no_grad()
def _load(module: nn.Module, **tensors: Tensor) -> None:
    """Copies weights into the parameters of those names (dotted paths), in the weights' dtype and on their device."""
    module.to(next(iter(tensors.values())))
    for name, tensor in tensors.items():
        parameter = module.get_parameter(name.replace("__", "."))
        assert parameter.shape == tensor.shape, name
        parameter.copy_(tensor)


def _load_sae_lens(sae: nn.Module, weights: Inputs) -> Any:
    _load(sae, W_enc=weights.W_enc.T, b_enc=weights.b_enc, b_dec=weights.b_dec, W_dec=weights.W_dec)
    return sae


def _sparse_coder(weights: Inputs, k: int) -> Any:
    library = peers.load("sparsify")
    n, d = weights.W_enc.shape
    coder = library.SparseCoder(d, library.SparseCoderConfig(num_latents=n, k=k, normalize_decoder=False))
    _load(coder, encoder__weight=weights.W_enc, encoder__bias=weights.b_enc, b_dec=weights.b_dec, W_dec=weights.W_dec)
    return coder


def _dictionary(weights: Inputs, k: int) -> Any:
    library = peers.load("dictionary_learning")
    n, d = weights.W_enc.shape
    dictionary = library.trainers.top_k.AutoEncoderTopK(d, n, k) if k else library.AutoEncoder(d, n)
    _load(dictionary, encoder__weight=weights.W_enc, encoder__bias=weights.b_enc, decoder__weight=weights.W_dec.T)
    _load(dictionary, **{"b_dec" if k else "bias": weights.b_dec})
    return dictionary
