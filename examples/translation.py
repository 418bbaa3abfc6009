"""A small encoder-decoder in the manner of T5 learns to translate numbers from English to German, in a pipeline.

Run it with `python examples/translation.py`; it takes about a minute on simulated devices. "four hundred twenty seven" is
"vier hundert sieben und zwanzig": some words have another order. One number in five is held out, and translated at the end.

The output of the encoder travels beside the decoder's stream, through all stages of the decoder. The embedding is used
three times, for both languages and for the logits, in different stages; it exists once.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import jax
import numpy as np
import optax
from flax import nnx
from pictures import draw_progress

import jaxpipe

PAD, START, END = 0, 1, 2
LENGTH = 9  # of both languages; most numbers need fewer words
WIDTH, HEADS = 64, 4

ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen".split()
)
ONES += ["eighteen", "nineteen"]
EINER = "eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn".split()
EINER += ["siebzehn", "achtzehn", "neunzehn"]
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ZEHNER = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
WORDS = ["", "<", ">", *ONES, *TENS, "hundred", "thousand", *EINER, *ZEHNER, "und", "ein", "hundert", "tausend"]


def english(n: int) -> list[str]:
    """The words of a number from 1 to 9999."""
    for size, word in ((1000, "thousand"), (100, "hundred")):
        if n >= size:
            return [ONES[n // size - 1], word, *(english(n % size) if n % size else [])]
    if n < 20:
        return [ONES[n - 1]]
    return [TENS[n // 10 - 2], *(english(n % 10) if n % 10 else [])]


def german(n: int) -> list[str]:
    """The same in German, where ones come before tens."""
    for size, word in ((1000, "tausend"), (100, "hundert")):
        if n >= size:
            count = "ein" if n // size == 1 else EINER[n // size - 1]
            return [count, word, *(german(n % size) if n % size else [])]
    if n < 20:
        return [EINER[n - 1]]
    if n % 10 == 0:
        return [ZEHNER[n // 10 - 2]]
    return ["ein" if n % 10 == 1 else EINER[n % 10 - 1], "und", ZEHNER[n // 10 - 2]]


def ids(words: list[str]) -> list[int]:
    made = [WORDS.index(word) for word in words]
    return made + [PAD] * (LENGTH - len(made))


def rows(numbers: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs and labels of some numbers: the decoder sees the words before the one that it is to say."""
    pairs = [(english(int(n)), german(int(n))) for n in numbers]
    source = np.array([ids(a) for a, _ in pairs], np.int32)
    target = np.array([ids(["<", *b]) for _, b in pairs], np.int32)
    return {"source": source, "target": target}, np.array([ids([*b, ">"]) for _, b in pairs], np.int32)


def micro_batches(numbers: np.ndarray, size: int, seed: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    generator = np.random.default_rng(seed)
    while True:
        yield rows(generator.choice(numbers, size))


class Embedding(nnx.Module):
    """Words of both languages; the layer list uses it three times."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.table = nnx.Param(nnx.initializers.normal(0.05)(rngs.params(), (len(WORDS), WIDTH)))
        self.place = nnx.Param(nnx.initializers.normal(0.05)(rngs.params(), (LENGTH, WIDTH)))

    def embed(self, words: jax.Array) -> jax.Array:
        return WIDTH**0.5 * (self.table[...][words] + self.place[...][None, : words.shape[1]])

    def source(self, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"encoder": self.embed(x["source"]), "seen": x["source"] != PAD, "target": x["target"]}

    def target(self, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"encoder": x["encoder"], "seen": x["seen"], "decoder": self.embed(x["target"])}

    def logits(self, x: dict[str, jax.Array]) -> jax.Array:
        h = x["decoder"]
        return 4 * h * jax.lax.rsqrt((h**2).mean(axis=-1, keepdims=True) + 1e-6) @ self.table[...].T


class Mlp(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Attention(nnx.Module):
    """Attention to a memory, or to itself, added to its input."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)

    def __call__(self, x: jax.Array, memory: jax.Array | None, mask: jax.Array) -> jax.Array:
        h = self.norm(x)
        return x + self.attention(h, h if memory is None else memory, mask=mask)


class Encoder(nnx.Module):
    """Changes the stream of the encoder, and hands everything else on."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.attention, self.mlp = Attention(rngs=rngs), Mlp(rngs=rngs)

    def __call__(self, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {**x, "encoder": self.mlp(self.attention(x["encoder"], None, x["seen"][:, None, None]))}


class Decoder(nnx.Module):
    """Changes the stream of the decoder, which looks at the encoder's."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.own, self.cross, self.mlp = Attention(rngs=rngs), Attention(rngs=rngs), Mlp(rngs=rngs)

    def __call__(self, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        h = self.own(x["decoder"], None, nnx.make_causal_mask(x["decoder"][..., 0], dtype=bool))
        return {**x, "decoder": self.mlp(self.cross(h, x["encoder"], x["seen"][:, None, None]))}


def loss_fn(logits: jax.Array, labels: jax.Array) -> tuple[jaxpipe.Weighted, dict]:
    """Mean over the words that are no padding, and the share of them that are the most likely ones."""
    real = (labels != PAD).astype(logits.dtype)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = ((logits.argmax(axis=-1) == labels) * real).sum()
    return jaxpipe.Weighted((each * real).sum(), real.sum()), {"words": (right, real.sum())}


def make_model() -> jaxpipe.PipelineModule:
    def embedding(use):
        return jaxpipe.TiedLayerSpec("embedding", Embedding, forward_fn=use)

    encoder, decoder = [jaxpipe.LayerSpec(Encoder)] * 2, [jaxpipe.LayerSpec(Decoder)] * 2
    layers = [embedding(Embedding.source), *encoder, embedding(Embedding.target), *decoder, embedding(Embedding.logits)]
    return jaxpipe.PipelineModule(layers, loss_fn)


def translate(engine: jaxpipe.Engine, numbers: np.ndarray) -> np.ndarray:
    """The words that the model says for some numbers, one after the other, each the most likely one."""
    inputs, _ = rows(numbers)
    said = np.full((len(numbers), LENGTH + 1), PAD, np.int32)
    said[:, 0] = START
    for place in range(LENGTH):
        inputs = {**inputs, "target": said[:, :LENGTH]}
        logits = engine.eval_batch(iter([(inputs, None)]), compute_loss=False, num_micro_batches=1)
        words = np.asarray(logits)[0, :, place].argmax(axis=-1)
        said[:, place + 1] = np.where((said == END).any(axis=1), PAD, words)
    return said[:, 1:]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path, default=Path("demo_out"))
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_num_cpu_devices", args.stages * args.data)
    mesh = jaxpipe.make_mesh(pipe=args.stages, data=args.data, devices=jax.devices("cpu")[: args.stages * args.data])

    numbers = np.random.default_rng(0).permutation(np.arange(1, 10_000))
    train, held_out = numbers[2000:], numbers[:2000]
    data = micro_batches(train, 32, seed=1)
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, max(1, args.steps // 10), max(2, args.steps))
    engine = jaxpipe.initialize(
        make_model(), optax.adam(rate), mesh=mesh, example=next(data), config={"num_micro_batches": 4, "remat": "none"}
    )
    print(engine.summary())
    test = [rows(part) for part in held_out[:512].reshape(4, 128)]
    losses, points = [], []
    for step in range(1, args.steps + 1):
        losses.append(engine.train_batch(data))
        if step % max(1, args.steps // 8) == 0:
            found = engine.evaluate(test)
            points.append((step, 100 * found["words"]))
            print(f"step {step:4d}: held-out loss {found['loss']:.3f}, {points[-1][1]:.1f} % of the words are right")
    said = translate(engine, held_out[:512])
    whole = (said == np.concatenate([labels for _, labels in test])).all(axis=1)
    print(
        f"accuracy: {100 * whole.mean():.1f} % of {len(whole)} numbers that it never saw are translated without a mistake"
    )
    for number, words in list(zip(held_out, said, strict=False))[:3]:
        print(f"  {' '.join(english(int(number)))} -> {' '.join(WORDS[word] for word in words if word > END)}")
    picture = args.output / "translation.png"
    draw_progress(
        picture,
        [float(loss) for loss in losses],
        points,
        title="Numbers from English to German",
        loss="loss, nats per word",
        right="right words, %",
        label="held-out words",
        scale="log",
    )
    print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
