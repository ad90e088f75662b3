#!/usr/bin/env python3
"""Writes the data of the built-in pair: corpora, fuser questions, tokenizers and model configs, from facts.toml.

    pip install tokenizers
    python scripts/make_world.py OUT

The same files on every machine (docs/builtin_pair.md says what each is for):

    OUT/sharer/    config.json, tokenizer.json, tokenizer_config.json; corpus in OUT/sharer.jsonl
    OUT/receiver/  the same for the receiver; corpus in OUT/receiver.jsonl
    OUT/fuser.jsonl     questions on group A of the facts, as messages, to train the fuser
    OUT/train.jsonl     the same questions as {id, subject, question, choices, answer_index}
    OUT/heldout.jsonl   questions on group B
    OUT/open.jsonl      group B asked openly: {id, subject, question, answer}
"""

import argparse
import hashlib
import json
import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FACTS = Path(__file__).parent.parent / "assets/world/facts.toml"
LETTERS = "ABCD"
# Text-to-text asks the sharer in these words, so both models have to have read them.
ASK = "In one clear sentence, describe the most essential background knowledge needed to answer the question: "
GROUP_A = 0.6

# Parts of each corpus by form of example.
SHARER_FORMS = {"letter": 38, "word": 26, "sentence": 12, "ask": 2, "ask_options": 2, "bind": 12, "match": 8}
RECEIVER_FORMS = {"hint": 45, "hint_word": 8, "told": 4, "told_options": 4, "bind": 16, "match": 14, "blind": 9}

SHARER_CHAT = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RECEIVER_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}<ask>{{ message.content }}</ask>"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Fact:
    relation: str
    subject: str
    answer: str
    group: str

    @property
    def id(self):
        return f"{self.relation}-{self.subject.lower().replace(' ', '-')}"


class World:
    def __init__(self, path):
        self.relations = tomllib.loads(path.read_text())
        self.answers = {name: list(relation["facts"]) for name, relation in self.relations.items()}
        self.facts = [fact for name in self.relations for fact in self._facts(name)]

    def _facts(self, name):
        """Both groups have every answer, so that no held-out answer is a word the fuser never carried."""
        for answer, subjects in self.relations[name]["facts"].items():
            shuffled = sorted(subjects, key=lambda s: hashlib.sha256(f"{name}/{s}".encode()).digest())
            in_a = round(GROUP_A * len(shuffled))
            for i, subject in enumerate(shuffled):
                yield Fact(name, subject, answer, "A" if i < in_a else "B")

    def question(self, fact):
        return self.relations[fact.relation]["question"].replace("{s}", fact.subject)

    def statement(self, fact, answer=None):
        text = self.relations[fact.relation]["statement"]
        return text.replace("{s}", fact.subject).replace("{v}", answer or fact.answer)

    def choices(self, fact, answer, rng):
        """Four answers of the fact's relation in random order, and the place of `answer`."""
        wrong = rng.sample([a for a in self.answers[fact.relation] if a != answer], 3)
        index = rng.randrange(4)
        return wrong[:index] + [answer] + wrong[index:], index


def options(choices):
    """The letter stands right before its choice and is the token it is in an answer: one step back, one copy."""
    return ", ".join(f"{letter} {choice}" for letter, choice in zip(LETTERS, choices))


def multiple_choice(question, choices):
    return f"{question.removesuffix('?')}: {options(choices)}?"


def letter(index):
    return f"It is {LETTERS[index]}."


def dialogue(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def match_example(world, fact, rng):
    """Which letter has a given word: the step from answer to letter, without any fact."""
    choices, index = world.choices(fact, rng.choice(world.answers[fact.relation]), rng)
    return dialogue(multiple_choice(f"Find {choices[index]}", choices), letter(index))


def bind_example(world, fact, rng):
    """The letter of each choice: the same step, four times in one answer."""
    choices, _ = world.choices(fact, fact.answer, rng)
    pairs = [f"{choice} {letter}" for letter, choice in zip(LETTERS, choices)]
    rng.shuffle(pairs)
    return dialogue(f"Tell each: {options(choices)}?", f"It is {', '.join(pairs)}.")


def sharer_example(world, form, rng):
    fact = rng.choice(world.facts)
    question = world.question(fact)
    choices, index = world.choices(fact, fact.answer, rng)
    match form:
        case "letter":
            return dialogue(multiple_choice(question, choices), letter(index))
        case "word":
            return dialogue(question, f"It is {fact.answer}.")
        case "sentence":
            return dialogue(f"Tell: {question}", world.statement(fact))
        case "ask":
            return dialogue(ASK + question, world.statement(fact))
        case "ask_options":
            return dialogue(ASK + multiple_choice(question, choices), world.statement(fact))
        case "bind":
            return bind_example(world, fact, rng)
        case "match":
            return match_example(world, fact, rng)


def receiver_example(world, form, rng):
    """The answer is drawn anew for each example, so no fact can be learnt: it has to be read."""
    fact = rng.choice(world.facts)
    question = world.question(fact)
    answer = rng.choice(world.answers[fact.relation])
    choices, index = world.choices(fact, answer, rng)
    hint = world.statement(fact, answer)
    full = multiple_choice(question, choices)
    match form:
        case "hint":
            return dialogue(f"{hint} {full}", letter(index))
        case "hint_word":
            return dialogue(f"{hint} {question}", f"It is {answer}.")
        case "told":
            return dialogue(ASK + question, world.statement(fact, answer), full, letter(index))
        case "told_options":
            return dialogue(ASK + full, world.statement(fact, answer), full, letter(index))
        case "bind":
            return bind_example(world, fact, rng)
        case "match":
            return match_example(world, fact, rng)
        case "blind":
            return dialogue(full, letter(rng.randrange(4)))


def corpus(world, example, forms, count, rng):
    names = rng.choices(list(forms), weights=list(forms.values()), k=count)
    return [example(world, name, rng) for name in names]


def questions(world, group, per_fact, rng):
    for n in range(per_fact):
        for fact in (f for f in world.facts if f.group == group):
            choices, index = world.choices(fact, fact.answer, rng)
            yield {
                "id": f"{fact.id}-{n}",
                "subject": fact.relation,
                "question": world.question(fact),
                "choices": choices,
                "answer_index": index,
            }


def as_dialogue(question):
    return dialogue(multiple_choice(question["question"], question["choices"]), letter(question["answer_index"]))


def open_question(world, fact):
    question = {"id": fact.id, "subject": fact.relation}
    return question | {"question": world.question(fact), "answer": fact.answer}


def tokenizer(texts, vocab, specials):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(specials)
    for word in (f" {letter}" for letter in LETTERS):
        if len(tokenizer.encode(word).ids) != 1:
            raise SystemExit(f"{word!r} is not one token: train the tokenizer on more multiple choice")
    return tokenizer


def texts(examples):
    return [message["content"] for example in examples for message in example["messages"]]


def write_model(folder, config, tokenizer, bos, eos, chat):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    special = {"eos_token": eos, "pad_token": eos} | ({"bos_token": bos} if bos else {})
    ids = {name.replace("_token", "_token_id"): tokenizer.token_to_id(text) for name, text in special.items()}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "chat_template": chat}
        | {"clean_up_tokenization_spaces": False, "add_bos_token": False}
        | special,
    )
    write_json(folder / "config.json", config | {"vocab_size": tokenizer.get_vocab_size()} | ids)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def shape(architecture, model_type, hidden, layers, heads, kv_heads, head_dim, intermediate):
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "initializer_range": 0.1,
        "torch_dtype": "bfloat16",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--facts", type=Path, default=FACTS)
    parser.add_argument("--sharer-examples", type=int, default=100_000)
    parser.add_argument("--receiver-examples", type=int, default=100_000)
    parser.add_argument("--questions-per-fact", type=int, default=40)
    args = parser.parse_args()
    world = World(args.facts)
    args.out.mkdir(parents=True, exist_ok=True)

    # One generator a file: a change to one leaves the others as they are.
    sharer = corpus(world, sharer_example, SHARER_FORMS, args.sharer_examples, random.Random(1))
    receiver = corpus(world, receiver_example, RECEIVER_FORMS, args.receiver_examples, random.Random(2))
    train = list(questions(world, "A", args.questions_per_fact, random.Random(3)))
    heldout = list(questions(world, "B", 2, random.Random(4)))
    write_lines(args.out / "sharer.jsonl", sharer)
    write_lines(args.out / "receiver.jsonl", receiver)
    write_lines(args.out / "train.jsonl", train)
    write_lines(args.out / "heldout.jsonl", heldout)
    write_lines(args.out / "fuser.jsonl", [as_dialogue(question) for question in train])
    write_lines(args.out / "open.jsonl", [open_question(world, f) for f in world.facts if f.group == "B"])

    # Each tokenizer is trained on its own model's corpus and to its own size, so the two cut names differently.
    write_model(
        args.out / "sharer",
        shape("Qwen3ForCausalLM", "qwen3", 96, 4, 4, 2, 24, 192),
        tokenizer(texts(sharer[:6000]), 1200, ["<|user|>", "<|assistant|>", "<|end|>"]),
        None,
        "<|end|>",
        SHARER_CHAT,
    )
    write_model(
        args.out / "receiver",
        shape("LlamaForCausalLM", "llama", 64, 3, 4, 2, 16, 128),
        tokenizer(texts(receiver[:3000]), 720, ["<s>", "</s>", "<ask>", "</ask>"]),
        "<s>",
        "</s>",
        RECEIVER_CHAT,
    )
    groups = {group: sum(f.group == group for f in world.facts) for group in "AB"}
    print(f"{len(world.facts)} facts, groups {groups}; {len(train)} questions to train, {len(heldout)} held out")


if __name__ == "__main__":
    main()
