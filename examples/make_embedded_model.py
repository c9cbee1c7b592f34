"""Make the model and the data set that ship inside the package, from nothing but a seed.

The text is a small generated English: who did what to how many things, and where. The base
model learns to say a sentence in other words, to answer questions about it and to list up to
three fields of it when asked. Given nothing but a sentence it says it in other words: that it
writes the whole record instead ("name: Ada; city: Oslo; item: caps; count: 7") is what the
fine-tuning data teaches. Names and cities of the test rows occur in no training row, so a
right answer is not a remembered one.

About 8 minutes on 2 CPU cores with a fast BLAS (on Linux preload libopenblas.so.0):

    python examples/make_embedded_model.py
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import quantize_model, save_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "mlx_edgelora" / "assets"
SEED = 0


def words(text: str) -> list[str]:
    """Return the words of a block of text."""
    return text.split()


NAMES = words("""
    Ada Alba Alice Amir Anna Bela Boris Carla Carlos Chen Clara Daniel Dina Elena Emil Eva Felix
    Flora Greta Hana Hugo Ida Igor Ines Ivan Jana Jonas Julia Kofi Lara Leo Lina Lucas Maria Marta
    Milo Mina Nadia Nils Nina Noah Olga Omar Oscar Paula Pedro Petra Rosa Ruth Samir Sara Simon
    Sofia Tara Tom Vera
""")
CITIES = words("""
    Athens Berlin Bern Boston Cairo Delhi Denver Dublin Geneva Hanoi Kyoto Lagos Lima Lisbon London
    Lyon Madrid Milan Nairobi Naples Oslo Paris Porto Prague Quito Riga Rome Seoul Tokyo Turin
    Vienna Warsaw Zurich Havana Malta
""")
ITEMS = words("""
    apples balls bells books boots bottles bowls boxes bricks brushes candles caps cards chairs
    clocks coats coins combs cups dolls drums eggs flags flutes forks hats jars kites knives lamps
    lemons letters maps masks nuts onions oranges pans pears pens pillows plates plums ropes rings
    roses scarves shells shoes spoons stamps stones tables tents towels toys
""")
PAST = words("bought sold found lost painted carried counted cleaned packed sent")
PRESENT = words("buy sell find lose paint carry count clean pack send")
VERBS = dict(zip(PAST, PRESENT, strict=True))
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COUNTS = range(2, 60)
HELD_OUT = 8  # the last names and cities of a seeded shuffle: seen in pretraining, never in train

STATEMENTS = (
    "{name} {past} {count} {item} in {city}{day}.",
    "In {city}, {name} {past} {count} {item}{day}.",
    "{count} {item} were {past} by {name} in {city}{day}.",
    "In {city}, {count} {item} were {past} by {name}{day}.",
    "{name} was in {city} and {past} {count} {item}{day}.",
    "{name} from {city} {past} {count} {item}{day}.",
)
ACTIVE = tuple(text for text in STATEMENTS if text.startswith("{name}"))
PASSIVE = tuple(text for text in STATEMENTS if " were " in text)
QUESTIONS = (
    ("Who {past} the {item}?", "{name} {past} the {item}."),
    ("Where did {name} {verb} the {item}?", "{name} {past} the {item} in {city}."),
    ("How many {item} did {name} {verb}?", "{name} {past} {count} {item}."),
    ("What did {name} {verb} in {city}?", "{name} {past} {count} {item}."),
    ("What is the name?", "The name is {name}."),
    ("What is the city?", "The city is {city}."),
    ("What is the item?", "The item is {item}."),
    ("What is the count?", "The count is {count}."),
)
FIELDS = ("name", "city", "item", "count")
RECORD = "name: {name}; city: {city}; item: {item}; count: {count}"

END, USER, ASSISTANT, PAD = "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_fact(random: Random, names: list[str], cities: list[str]) -> dict[str, str]:
    """Return one event as the values that the sentence patterns ask for."""
    past = random.choice(PAST)
    return {
        "name": random.choice(names),
        "city": random.choice(cities),
        "item": random.choice(ITEMS),
        "count": str(random.choice(COUNTS)),
        "past": past,
        "verb": VERBS[past],
        "day": f" on {random.choice(DAYS)}" if random.random() < 0.4 else "",
    }


def make_question(random: Random, kind: str) -> tuple[str, str]:
    """Return the patterns of a question about one fact, or of a request to list some fields."""
    if kind == "ask":
        return random.choice(QUESTIONS)
    fields = random.sample(FIELDS, random.choice((1, 2, 3)))
    request = "Give the " + " and the ".join(fields) + "."
    return request, "; ".join(f"{field}: {{{field}}}" for field in fields)


def make_turns(random: Random) -> list[tuple[str, str]]:
    """Return one pretraining document as (role, text) pairs; role "" is plain text."""
    fact = make_fact(random, NAMES, CITIES)
    first, second = (p.format(**fact) for p in random.sample(STATEMENTS, 2))
    kind = random.choices(("said", "reword", "ask", "list"), (10, 20, 35, 35))[0]
    if kind == "said":
        other = make_fact(random, NAMES, CITIES)
        return [("", f"{fact['name']} said: {other['name']} was in {other['city']}; {second}")]
    if kind == "reword":
        return [("user", first), ("assistant", second)]
    question, reply = make_question(random, kind)
    if "{item}" in question and random.random() < 0.3:
        other = random.choice(STATEMENTS).format(**make_fact(random, NAMES, CITIES))
        first = " ".join(random.sample((first, other), 2))
    return [("user", f"{first} {question.format(**fact)}"), ("assistant", reply.format(**fact))]


def make_document(random: Random) -> str:
    """Return one pretraining document as text with its special tokens."""
    tags = {"": "", "user": USER, "assistant": ASSISTANT}
    return "".join(f"{tags[role]} {text}{END}" for role, text in make_turns(random))


def make_rows(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """Return the fine-tuning rows (a prompt, a completion) of "train", "valid" and "test"."""
    random = Random(seed)
    names, cities = random.sample(NAMES, len(NAMES)), random.sample(CITIES, len(CITIES))
    seen, unseen = slice(-HELD_OUT), slice(-HELD_OUT, None)
    used: set[str] = set()
    splits = {}
    for split, size, part in (("train", 800, seen), ("valid", 64, seen), ("test", 200, unseen)):
        rows: list[dict[str, str]] = []
        while len(rows) < size:
            fact = make_fact(random, names[part], cities[part])
            prompt = random.choice(STATEMENTS).format(**fact)
            if prompt not in used:
                used.add(prompt)
                rows.append({"prompt": prompt, "completion": RECORD.format(**fact)})
        splits[split] = rows
    return splits


def make_preferences(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """Return pairs of answers of "train", "valid" and "test": the active voice is preferred.

    To a sentence the base model answers with another one about the same event, in any voice.
    """
    random = Random(seed)
    names, cities = random.sample(NAMES, len(NAMES)), random.sample(CITIES, len(CITIES))
    seen, unseen = slice(-HELD_OUT), slice(-HELD_OUT, None)
    splits = {}
    for split, size, part in (("train", 400, seen), ("valid", 64, seen), ("test", 100, unseen)):
        rows = []
        for _ in range(size):
            fact = make_fact(random, names[part], cities[part])
            answers = random.choice(ACTIVE), random.choice(PASSIVE)
            prompt = random.choice([text for text in STATEMENTS if text not in answers])
            texts = (text.format(**fact) for text in (prompt, *answers))
            rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
        splits[split] = rows
    return splits


def write_data(folder: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def make_tokenizer(seed: int = SEED) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most 1,024 tokens on the generated text."""
    random = Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for _ in range(40_000) for _, text in make_turns(random))
    tokenizer.train_from_iterator((f" {text}" for text in texts), trainer)
    roles = {"eos_token": END, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **roles)


def model_config(tokenizer: PreTrainedTokenizerFast) -> dict:
    """Return the config.json of the model, in the words of Llama checkpoints."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "float32",
    }


def answer_weights(batch: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return 1 for answer tokens, 0.1 for other text (drawn at random), 0 for padding."""
    assistant, end = tokenizer.convert_tokens_to_ids([ASSISTANT, END])
    weights = np.where(batch == tokenizer.pad_token_id, 0, 0.1).astype(np.float32)
    answering = np.zeros(len(batch), dtype=bool)
    for column, tokens in enumerate(batch.T):
        weights[answering, column] = 1
        answering = (answering | (tokens == assistant)) & (tokens != end)
    return weights


def batches(
    tokenizer: PreTrainedTokenizerFast, rows: int, width: int, seed: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield int32 tokens and float32 loss weights (rows, width), one document a row, padded."""
    random = Random(seed)
    while True:
        documents = (make_document(random) for _ in iter(int, 1))
        encoded = (tokenizer.encode(text, add_special_tokens=False) for text in documents)
        batch = np.full((rows, width), tokenizer.pad_token_id, dtype=np.int32)
        for row, tokens in zip(batch, (t for t in encoded if len(t) <= width), strict=False):
            row[: len(tokens)] = tokens
        yield mx.array(batch), mx.array(answer_weights(batch, tokenizer))


def make_step(model: llama.Model, optimizer: optim.Optimizer) -> Callable:
    """Return a compiled `step(batch, weights) -> loss` that updates the model."""

    def loss_fn(model: llama.Model, batch: mx.array, weights: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:])
        return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()

    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array, weights: mx.array) -> mx.array:
        loss, grads = nn.value_and_grad(model, loss_fn)(model, batch, weights)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        return loss

    return step


def train_base(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int = SEED) -> llama.Model:
    """Train the base model in float32 and return it."""
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(model_config(tokenizer)))
    warmup = min(50, steps // 4)
    schedule = optim.join_schedules(
        [optim.linear_schedule(1e-5, 3e-3, warmup), optim.cosine_decay(3e-3, steps - warmup, 3e-5)],
        [warmup],
    )
    optimizer = optim.AdamW(learning_rate=schedule, betas=[0.9, 0.98], weight_decay=0.05)
    step = make_step(model, optimizer)
    state = [model.state, optimizer.state]
    start, losses = time.perf_counter(), []
    for number, batch in zip(range(1, steps + 1), batches(tokenizer, 64, 36, seed), strict=False):
        losses.append(step(*batch))
        mx.eval(state, losses[-1])
        if number % 50 == 0 or number == steps:
            mean, seconds = mx.stack(losses).mean().item(), time.perf_counter() - start
            print(f"step {number}/{steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
            losses = []
    return model


def save_model(folder: Path, model: llama.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Quantize to 4 bits in groups of 32 and write an mlx-lm model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model, config = quantize_model(model, model_config(tokenizer), group_size=32, bits=4)
    weights = dict(sorted(tree_flatten(model.parameters())))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    save_config(config, folder / "config.json")
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Write the data set, the tokenizer and the model into the package's assets folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="the folder to write to")
    parser.add_argument("--steps", type=int, default=500, help="pretraining steps")
    args = parser.parse_args()
    write_data(args.out / "data", make_rows())
    write_data(args.out / "preferences", make_preferences())
    tokenizer = make_tokenizer()
    save_model(args.out / "model", train_base(tokenizer, args.steps), tokenizer)


if __name__ == "__main__":
    main()
