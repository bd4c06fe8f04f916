from __future__ import annotations

import builtins
import dataclasses
import json
from typing import Any

import pytest
import torch

from saerec_fast.recommender import RecommenderConfig, SequenceRecommender, hidden_of, site_module, sites


def tokens_of(model: SequenceRecommender, rows: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.n_items + 1, (rows, model.config.max_length), generator=generator)


def test_a_later_token_never_changes_an_earlier_hidden_state(model: SequenceRecommender) -> None:
    tokens = tokens_of(model)
    before = model(tokens)
    for position in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, position] = changed[:, position] % model.config.n_items + 1
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-3)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_padding_does_not_change_the_hidden_states_before_it(model: SequenceRecommender, length: int) -> None:
    tokens = tokens_of(model)
    padded = tokens.clone()
    padded[:, length:] = 0
    torch.testing.assert_close(model(padded)[:, :length], model(tokens[:, :length]), rtol=1e-5, atol=1e-6)


def test_scores_are_tied_to_the_item_embedding_without_padding(model: SequenceRecommender) -> None:
    hidden = model(tokens_of(model))
    expected = hidden @ model.item_embedding.weight[1:].T
    assert model.scores(hidden).shape == (5, model.config.max_length, model.config.n_items)
    torch.testing.assert_close(model.scores(hidden), expected)
    assert model.item_embeddings.data_ptr() == model.item_embedding.weight[1:].data_ptr()


def test_item_dropout_acts_in_training_only(model: SequenceRecommender) -> None:
    still = SequenceRecommender(dataclasses.replace(model.config, dropout=0.0, item_dropout=0.5))
    still.load_state_dict(model.state_dict())
    tokens = tokens_of(model)
    assert torch.equal(still.eval()(tokens), model(tokens))
    still.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(still(tokens), model(tokens), atol=1e-2)


def test_a_scaled_embedding_enters_the_blocks_times_the_root_of_the_width(model: SequenceRecommender) -> None:
    scaled = SequenceRecommender(dataclasses.replace(model.config, scale_embedding=True)).eval()
    scaled.load_state_dict(model.state_dict())
    tokens = torch.tensor([[3, 1, 4]])
    entered = []
    for one in (model, scaled):
        with one.transformer.h[0].register_forward_pre_hook(lambda _, args: entered.append(args[0])):
            one(tokens)
    positions = model.transformer.wpe(torch.arange(3))
    expected = (entered[0] - positions) * model.config.d_model**0.5 + positions
    torch.testing.assert_close(entered[1], expected)
    # The head reads the embedding as it is.
    torch.testing.assert_close(scaled.scores(entered[0]), model.scores(entered[0]), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4,), (2, 0), (2, 9)])
def test_tokens_of_the_wrong_shape_are_refused(model: SequenceRecommender, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens: expected"):
        model(torch.ones(shape, dtype=torch.int64))


def test_every_site_gives_the_hidden_state_it_names(model: SequenceRecommender) -> None:
    assert sites(model) == ["embedding", "mlp.0", "block.0", "mlp.1", "block.1", "last"]
    tokens = tokens_of(model)
    seen: dict[str, torch.Tensor] = {}
    for site in sites(model):
        module = site_module(model, site)
        module.register_forward_hook(lambda _module, _inputs, output, site=site: seen.update({site: hidden_of(output)}))
    hidden = model(tokens)
    assert all(state.shape == hidden.shape for state in seen.values())
    torch.testing.assert_close(seen["last"], hidden)
    torch.testing.assert_close(seen["embedding"], model.item_embedding.weight[tokens])
    torch.testing.assert_close(seen["last"], model.transformer.ln_f(seen["block.1"]))


def test_changing_the_output_of_a_site_changes_what_follows(model: SequenceRecommender) -> None:
    tokens = tokens_of(model)
    before = model(tokens)
    for site in sites(model):

        def shift(_module: Any, _inputs: Any, output: Any) -> Any:
            moved = hidden_of(output).flip(-1)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = site_module(model, site).register_forward_hook(shift)
        assert not torch.allclose(model(tokens), before, atol=1e-3)
        handle.remove()
    torch.testing.assert_close(model(tokens), before)


@pytest.mark.parametrize("site", ["block.2", "block", "mlp.x", "", "transformer.h.0"])
def test_an_unknown_site_lists_the_ones_there_are(model: SequenceRecommender, site: str) -> None:
    with pytest.raises(ValueError, match=r"this model has embedding, mlp\.0, block\.0"):
        site_module(model, site)


def test_hidden_of_takes_tensors_tuples_and_lists() -> None:
    hidden = torch.ones(1)
    assert all(hidden_of(output) is hidden for output in (hidden, (hidden, None), [hidden]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_items", 0),
        ("d_model", 3),
        ("n_layers", 0),
        ("max_length", 0),
        ("dropout", 1.0),
        ("attention_dropout", -0.1),
        ("item_dropout", 1.0),
        ("initializer_range", 0.0),
    ],
)
def test_config_names_the_field_that_is_wrong(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        RecommenderConfig(**{"n_items": 10, field: value})  # type: ignore[arg-type]


def test_save_and_load_give_the_same_model(model: SequenceRecommender, tmp_path: Any) -> None:
    model.save(tmp_path / "model")
    loaded = SequenceRecommender.load(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    tokens = tokens_of(model)
    assert torch.equal(loaded(tokens), model(tokens))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_damaged_folder_is_refused_with_the_name_of_the_file(model: SequenceRecommender, tmp_path: Any) -> None:
    weights, settings = tmp_path / "model.safetensors", tmp_path / "config.json"
    model.save(tmp_path)
    good_weights, good_settings = weights.read_bytes(), settings.read_text()

    weights.write_bytes(good_weights[: len(good_weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        SequenceRecommender.load(tmp_path)
    weights.write_bytes(good_weights)

    changes = {"d_model": 32, "n_layers": 3, "n_heads": 5, "unknown": 1}
    for name, value in changes.items():
        settings.write_text(json.dumps({**json.loads(good_settings), name: value}))
        with pytest.raises(ValueError, match=r"model\.safetensors|config\.json"):
            SequenceRecommender.load(tmp_path)
    for text in ("{", "[]", "{}"):
        settings.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            SequenceRecommender.load(tmp_path)
    settings.unlink()
    with pytest.raises(FileNotFoundError):
        SequenceRecommender.load(tmp_path)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def fail(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("transformers"):
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match=r"pip install saerec-fast\[study\]"):
        SequenceRecommender(RecommenderConfig(n_items=3))
