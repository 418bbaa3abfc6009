"""Checkpoints of Hugging Face in a pipeline: the logits are torch's, at any number of stages."""

import importlib
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

VOCAB, LENGTH = 97, 24
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def example():
    """The script as a module. It is no part of the package, and not written for the strict modes of this suite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "examples")
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the script adds to it
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            yield importlib.import_module("evaluate_huggingface")


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=32, n_embd=24, n_layer=5, n_head=3, bos_token_id=0, eos_token_id=0
        )
    )


def llama(**options):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            **options,
        )
    )


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "llama 3, tied": lambda: llama(rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=8),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_torch(example, name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # norms are all ones and biases all zeros at first, which would hide mistakes
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num().clamp(min=0.1))
    if name == "llama":  # most are published in short floats; the values are those of this model then
        model = model.bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # several files
    model = model.float()
    rng = np.random.default_rng(1)
    tokens = [rng.integers(0, VOCAB, (4, LENGTH)) for _ in range(3)]
    labels = [np.where(rng.random((4, LENGTH)) < 0.3, -1, rng.integers(0, VOCAB, (4, LENGTH))) for _ in range(3)]
    with torch.no_grad():
        wanted = np.stack([model(torch.tensor(x)).logits.numpy() for x in tokens])
        loss = torch.nn.functional.cross_entropy(
            torch.tensor(wanted.reshape(-1, VOCAB)), torch.tensor(np.stack(labels).reshape(-1)), ignore_index=-1
        )
    for stages, data in [(1, 1), (2, 2), (4, 1)]:
        engine = example.make_engine(tmp_path, stages=stages, data=data, rows=4, length=LENGTH, micro_batches=3)
        found_loss, logits = engine.eval_batch(iter(zip(tokens, labels, strict=True)), return_logits=True)
        error = np.abs(np.asarray(logits) - wanted).max() / np.abs(wanted).max()
        assert error < 1e-5, f"{stages} stages: relative error {error:.1e}"
        np.testing.assert_allclose(float(found_loss), float(loss), rtol=1e-5)


@pytest.mark.torch
def test_the_script_gives_the_perplexity_of_a_text(example, tmp_path, capsys, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    model = gpt2().eval()
    model.save_pretrained(tmp_path)
    words = {f"w{i}": i for i in range(VOCAB)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, VOCAB, 131)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    nats = []
    with torch.no_grad():
        for start in range(0, 130, 16):
            window = torch.tensor(ids[start : start + 17])
            logits = model(window[None, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
    with pytest.raises(SystemExit, match="Windows of 33 tokens: this model has 32 positions"):
        example.make_engine(tmp_path, stages=1, data=1, rows=2, length=33, micro_batches=1)
    monkeypatch.setattr(jax.config, "update", lambda *args: None)  # this process has its devices already
    folder = str(tmp_path)
    example.main([folder, "--text", f"{folder}/text.txt", *"--stages 2 --rows 2 --length 16 --micro-batches 3".split()])
    found = re.search(r"131 tokens.*loss (\S+) nats/token, perplexity (\S+),", capsys.readouterr().out, re.S)
    assert len(nats) == 130 and abs(float(found[1]) - np.mean(nats)) < 1e-4
    assert abs(float(found[2]) - np.exp(np.mean(nats))) < 0.01


def test_what_the_example_does_not_know_is_refused(example, tmp_path):
    config = {"model_type": "gpt2", "activation_function": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="activation_function='gelu_new'; the checkpoint has 'relu'"):
        example.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SystemExit, match="of the type 'bert'; known are gpt2, llama"):
        example.load(tmp_path)
