"""What can be steered in a model, and where its padding is: known libraries by the names of their classes."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling


class NoPadding:
    """What ``valid`` of a known library returns where no position is padding, instead of a mask of ones."""


Valid = Callable[..., Tensor | type[NoPadding]]


@dataclass(frozen=True)
class Site:
    """A module whose output is a hidden state.

    Attributes:
        path: dotted path in the model, for :func:`~saerec_fast.attach`.
        what: the hidden state in words, such as ``"output of block 0"``.
        width: its last dimension, ``None`` where the modules do not tell.
        library: whose model it is, ``None`` where the model is not a known one.
        padding: how ``attach`` finds the positions that are no padding when it is given no ``valid``.
    """

    path: str
    what: str
    width: int | None
    library: str | None
    padding: str


@dataclass(frozen=True)
class Padding:
    """Where a model tells its padding: ``valid`` as in :func:`~saerec_fast.attach`, called with the arguments of the
    forward of the module at ``path``."""

    path: str
    valid: Valid


@dataclass(frozen=True)
class _Library:
    """How to recognise a library's module and what is in it.

    Attributes:
        name: of the library.
        classes: the module is of one of these classes or derives from one.
        package: that class lives below it; empty for code that people copy, which ``parts`` then tells apart.
        parts: attributes that the module has to have.
        sites: patterns of paths below the module, ``*`` being the number of a block, with what they are.
        padding: how ``valid`` knows.
        valid: from that module and the arguments of ``source``'s forward, as ``valid`` of ``attach``.
        source: below the module, the one whose arguments ``valid`` reads: the innermost that sees the padding and whose
            forward runs in every use of the library, some of which call other methods of the modules around it.
        applies: whether it is this variant of the code.
    """

    name: str
    classes: tuple[str, ...]
    package: str
    parts: tuple[str, ...]
    sites: Mapping[str, str]
    padding: str
    valid: Valid
    source: str = ""
    applies: Callable[[Any], bool] = lambda module: True


# What is no padding, from the module that was recognised and the arguments of the one that its library says to look at.
# Functions with names, so that a steered model can be pickled.


def _not_zero(model: Any, tokens: Tensor) -> Tensor:
    return tokens != 0


def _of_rectools(layers: Any, seqs: Tensor, timeline_mask: Tensor, *_: Any, **__: Any) -> Tensor:
    # (B, L, 1)
    return timeline_mask if timeline_mask.dtype is torch.bool else timeline_mask != 0


def _of_replay(body: Any, feature_tensors: Any, padding_mask: Tensor, *_: Any, **__: Any) -> Tensor:
    return padding_mask


def _of_recbole(encoder: Any, hidden_states: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> Tensor:
    # (B, 1, 1 or L, L), 0 where a key may be attended to; the last position may look at all that are no padding.
    return attention_mask.select(1, 0).select(1, -1) == 0


def _of_gsasrec(model: Any, tokens: Tensor) -> Tensor:
    return tokens != model.num_items + 1


def _of_hstu(encoder: Any, x: Tensor, x_offsets: Tensor, *_: Any, **__: Any) -> Tensor:
    return x_offsets


def _of_transformers(
    model: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor | type[NoPadding]:
    given = kwargs
    if args:
        # By place they differ between models and versions, but for the first.
        names = list(inspect.signature(model.forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # With a cache it covers the positions before these too.
        length = (given["inputs_embeds"] if input_ids is None else input_ids).shape[1]
        return mask[:, mask.shape[1] - length :] != 0
    if input_ids is None:
        return NoPadding
    padding = _padding_id(model.config)
    return NoPadding if padding is None else input_ids != padding


def _padding_id(config: Any) -> int | None:
    if not is_dynamo_compiling():  # which does not trace it
        # Past the configuration's own way to look attributes up, which takes longer than all the rest of a mask.
        try:
            padding: int | None = object.__getattribute__(config, "pad_token_id")
            return padding
        except AttributeError:  # it has another name there
            pass
    padding = config.pad_token_id
    return padding


_PMIXER: dict[str, Any] = {
    "name": "SASRec.pytorch",
    "classes": ("SASRec",),
    "package": "",
    "padding": "tokens that are not 0, as the last call of item_emb saw them",
    "valid": _not_zero,
    # log2feats is a method, so this is the only module that sees the tokens.
    "source": "item_emb",
}
_PMIXER_PARTS = ("item_emb", "forward_layers", "forward_layernorms", "last_layernorm", "log2feats")

_HUGGING_FACE_PADDING = "attention_mask, else input_ids that are not config.pad_token_id, else all positions are valid"

_LIBRARIES = (
    _Library(
        name="saerec_fast",
        classes=("SequenceRecommender",),
        package="saerec_fast",
        parts=("transformer",),
        sites={
            "transformer.wte": "token embedding",
            "transformer.h.*": "output of block {}",
            "transformer.h.*.mlp": "MLP of block {}",
            "transformer.ln_f": "last hidden state",
        },
        padding="tokens that are not 0",
        valid=_not_zero,
    ),
    _Library(
        name="RecTools",
        classes=("TransformerLayersBase",),
        package="rectools",
        parts=(),
        sites={
            "transformer_blocks.*": "output of block {}",
            "transformer_blocks.*.feed_forward": "MLP of block {}",
            "stu_blocks.*": "output of block {}",
            "stu_blocks.*.output_mlp": "MLP of block {}",
            "": "last hidden state",
        },
        padding="timeline_mask, which the transformer layers get",
        valid=_of_rectools,
    ),
    _Library(
        name="RePlay",
        classes=("SasRecBody",),
        package="replay",
        parts=("encoder", "output_normalization"),
        sites={
            "encoder.forward_layers.*": "output of block {}",  # the residual is added inside
            "encoder.layers.*": "output of block {}",
            "encoder.layers.*.ff": "MLP of block {}",
            "output_normalization": "last hidden state",
        },
        padding="padding_mask, which the body gets",
        valid=_of_replay,
    ),
    _Library(
        name="Hugging Face GPT-2",
        classes=("GPT2Model",),
        package="transformers",
        parts=("h", "ln_f"),
        sites={
            "wte": "token embedding",
            "h.*": "output of block {}",
            "h.*.mlp": "MLP of block {}",
            "ln_f": "last hidden state",
        },
        padding=_HUGGING_FACE_PADDING,
        valid=_of_transformers,
    ),
    _Library(
        name="Hugging Face BERT",
        classes=("BertModel",),
        package="transformers",
        parts=("encoder", "embeddings"),
        sites={
            "embeddings": "embedding with positions",
            "encoder.layer.*": "output of block {}",
            "encoder.layer.*.output.dense": "MLP of block {}",
        },
        padding=_HUGGING_FACE_PADDING,
        valid=_of_transformers,
    ),
    _Library(
        name="RecBole",
        classes=("TransformerEncoder",),
        package="recbole",
        parts=("layer",),
        sites={
            "layer.*": "output of block {}",
            "layer.*.feed_forward.dense_2": "MLP of block {}",
            "": "last hidden state",
        },
        padding="the last row of the attention mask, which the encoder gets",
        valid=_of_recbole,
    ),
    _Library(
        name="gSASRec-pytorch",
        classes=("GSASRec",),
        package="",
        parts=("item_embedding", "transformer_blocks", "seq_norm", "num_items"),
        sites={
            "transformer_blocks.*": "output of block {}",
            "transformer_blocks.*.dense2": "MLP of block {}",
            "seq_norm": "last hidden state",
        },
        padding="tokens that are not num_items + 1, as the last call of item_embedding saw them",
        valid=_of_gsasrec,
        source="item_embedding",
    ),
    _Library(
        **_PMIXER,
        parts=(*_PMIXER_PARTS, "norm_first"),
        applies=lambda model: not model.norm_first,
        sites={
            "forward_layernorms.*": "output of block {}",
            "forward_layers.*": "MLP of block {}",
            "last_layernorm": "last hidden state",
        },
    ),
    _Library(
        **_PMIXER,
        parts=(*_PMIXER_PARTS, "norm_first"),
        applies=lambda model: bool(model.norm_first),
        # What a block returns is added up outside of all modules.
        sites={"forward_layers.*": "MLP of block {}", "last_layernorm": "last hidden state"},
    ),
    _Library(
        **_PMIXER,
        parts=_PMIXER_PARTS,
        applies=lambda model: not hasattr(model, "norm_first"),
        # Before norm_first there was, the residual was added inside the feed-forward layer.
        sites={"forward_layers.*": "output of block {}", "last_layernorm": "last hidden state"},
    ),
    _Library(
        name="Meta HSTU",
        classes=("HSTUJagged",),
        package="",
        parts=("_attention_layers",),
        sites={"_attention_layers.*": "output of block {}, jagged (ΣL, d)"},
        padding="x_offsets of the jagged rows, which the encoder gets",
        valid=_of_hstu,
    ),
)


def sites(model: nn.Module) -> list[Site]:
    """What can be steered in a model, in the order of its modules, the last hidden state last::

        for site in saerec_fast.sites(model):
            print(site.path, site.what, site.width)

    RecTools, RePlay, RecBole, GPT-2 and BERT of Hugging Face, gSASRec-pytorch, SASRec.pytorch (pmixer), Meta's HSTU
    and this package's own recommender are recognised by the names of their classes, wherever they lie inside
    ``model``; nothing of theirs is imported. In any other model the candidates are the entries of module lists whose
    first and last sizes do not contradict that they keep the width; whether their output really is a hidden state
    ``(..., d)`` is for the caller to know.

    Args:
        model: any module.

    Returns:
        The sites; empty where there is nothing recognisable.

    Raises:
        TypeError: not a module.
        ValueError: a compiled model, whose paths are not those of the model inside.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model: expected a model that is not compiled yet; list its sites first, then torch.compile")
    known = list(_known_modules(model))
    if not known:
        return list(_repeated_blocks(model))
    return [site for path, module, library in known for site in _sites_of(path, module, library)]


def known_padding(model: nn.Module, site: str) -> Padding | None:
    """How to find the padding at a site of a recognised model; ``None`` for any other model, and for a site that lies
    outside of what is recognised."""
    for path, module, library in _known_modules(model):
        source = _join(path, library.source)
        if (not path or site == path or site.startswith(f"{path}.")) and (site != source or not library.source):
            return Padding(source, functools.partial(library.valid, module))
    return None


def _known_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Library]]:
    """Path, module and library of the outermost modules that are recognised."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(not outer or path == outer or path.startswith(f"{outer}.") for outer in inside):
            continue
        library = next((library for library in _LIBRARIES if _is_of(module, library)), None)
        if library is not None:
            inside.append(path)
            yield path, module, library


def _sites_of(path: str, module: nn.Module, library: _Library) -> Iterator[Site]:
    found = []
    for name, inner in module.named_modules():
        what = library.sites.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
        if what is not None:
            block = re.search(r"\.(\d+)", name)
            found.append((name, inner, what.format(block[1] if block else "")))
    # A module around others is listed before them, though it returns after them.
    found.sort(key=lambda entry: entry[2] == "last hidden state")
    # All lie on one residual stream, and in an MLP the layer that is defined last is also the last to run.
    likeliest = sorted(found, key=lambda entry: not entry[2].startswith("MLP"))
    width = next((last for _, inner, _ in likeliest if (last := _widths(inner)[1])), None)
    for name, _, what in found:
        yield Site(_join(path, name), what, width, library.name, library.padding)


def _is_of(module: nn.Module, library: _Library) -> bool:
    return (
        any(
            kind.__name__ in library.classes and f"{kind.__module__}.".startswith(f"{library.package}.".lstrip("."))
            for kind in type(module).__mro__
        )
        and all(hasattr(module, part) for part in library.parts)
        and library.applies(module)
    )


def _repeated_blocks(model: nn.Module) -> Iterator[Site]:
    for path, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or _inside_a_list(path, model):
            continue
        for number, block in enumerate(modules):
            if type(block).forward is nn.Module.forward:
                continue
            first, last = _widths(block)
            if first == last:
                name = type(block).__name__
                what = f"output of block {number}, a {name} of {path}"
                yield Site(_join(path, str(number)), what, last, None, "not known: give attach a valid if there is any")


def _inside_a_list(path: str, model: nn.Module) -> bool:
    parents = path.split(".")[:-1]
    outer = (".".join(parents[:depth]) for depth in range(1, len(parents) + 1))
    return any(isinstance(model.get_submodule(name), nn.ModuleList) for name in outer)


def _widths(module: nn.Module) -> tuple[int | None, int | None]:
    """Width that the first layer with weights takes and that the last one returns, in the order they are defined."""
    sizes = [size for inner in module.modules() if (size := _layer_widths(inner)) is not None]
    return (sizes[0][0], sizes[-1][1]) if sizes else (None, None)


def _layer_widths(layer: Any) -> tuple[int, int] | None:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.embedding_dim
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return layer.normalized_shape[-1], layer.normalized_shape[-1]
    if isinstance(layer, nn.Conv1d):
        return layer.in_channels, layer.out_channels
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nx"):  # the linear layer of Hugging Face's GPT-2
        return layer.nx, layer.nf
    return None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
