#!/usr/bin/env python3
"""Trains the bundled demo model and writes it, with its quiz, as files that qlua and transformers both read.

    python3 scripts/train_demo_model.py --out examples/models/demo --quiz-dir examples/data
    python3 scripts/train_demo_model.py --evaluate examples/models/demo --quiz-dir examples/data

Packages from PyPI, as used for the bundled model: torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3,
safetensors 0.8.0, jinja2 3.1.6 and numpy 2.4.6 on Python 3.11.  A GPU is neither needed nor used.

The model is a Llama of two million parameters that learns an invented world (scripts/demo_facts.py) from
scratch.  Three skills have to come together: recalling a fact, finding the choice that says it, and naming
the letter of that choice.  The letters are the hard part for so small a model: asked from the start, it was
still at chance after 1,200 steps.  So it first learns to pair letters and choices, then to answer questions
that say their own answer, and only then questions that need the fact.

The same seed gives the same tokenizer and quiz everywhere.  The weights, and with them the step at which a
stage ends, also depend on the CPU's way to round.
"""

import argparse
import csv
import json
import os
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean as mean

# Two processes of one thread each share a step: at these sizes one torch call over two threads is slower.
os.environ["OMP_NUM_THREADS"] = "1"
WORKERS = 2

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import demo_facts as world
from demo_eval import evaluate, loglikelihood

SEED = 20240613
VOCAB = 1024
CONTEXT = 512
BOS, EOS, HEAD, HEAD_END, EOT = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
SPECIALS = (BOS, EOS, HEAD, HEAD_END, EOT)

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif %}"
)

# Llama 3's way to split: words with their space, up to three digits, runs of other signs, white space.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LETTER_WEIGHT = 4.0  # one letter decides a question, while prose has many easy words


@dataclass(frozen=True)
class Stage:
    steps: int  # at most
    enough: float  # share of letters right over 100 steps that ends the stage earlier
    tokens: int  # of each worker in one step
    pairs: float  # share of examples that only pair letters and choices
    drills: float  # share of the others that ask several things about the same choices
    matching: float  # share of the questions that say their own answer


# Each stage's skill is quickly learnt once the one above it is there, and hardly at all before.
STAGES = (
    Stage(steps=1500, enough=0.95, tokens=768, pairs=0.95, drills=0.0, matching=1.0),
    Stage(steps=1500, enough=0.85, tokens=1536, pairs=0.15, drills=0.5, matching=0.9),
    Stage(steps=1000, enough=2.0, tokens=2048, pairs=0.02, drills=0.05, matching=0.1),
)


# ---------------------------------------------------------------------------------------------- training text


def chat_pieces(user, answer):
    prompt = f"{HEAD}user{HEAD_END}\n\n{user}{EOT}{HEAD}assistant{HEAD_END}\n\n"
    return [(prompt, 0.0)] + answer + [(EOT, 1.0)]


def boxed_example(fact, question):
    sentence = world.say(fact, fact.prop.says[0])
    answer = [
        (f"{sentence} The answer is [[", 1.0),
        (world.LETTERS[question.answer], LETTER_WEIGHT),
        ("]].", 1.0),
    ]
    return chat_pieces(world.boxed_prompt(question), answer)


def letter_example(questions):
    """One or more questions under one heading, as in few-shot prompts; each letter counts."""
    pieces = []
    for n, question in enumerate(questions):
        prompt = world.loglikelihood_prompt(question)
        if n > 0:  # the heading stands once
            prompt = "\n\n" + prompt.split("\n\n", 1)[1]
        pieces += [(prompt, 0.0), (" " + world.LETTERS[question.answer], LETTER_WEIGHT)]
    return pieces


class Examples:
    """Endless training examples, each checked against the quiz."""

    def __init__(self, facts, seed):
        self.teacher = world.Teacher(facts, seed)
        self.rng = self.teacher.rng

    def draw(self, stage):
        pieces = self.any(stage)
        world.assert_unseen(joined(pieces))
        return pieces

    def any(self, stage):
        rng, teacher = self.rng, self.teacher
        if rng.random() < stage.pairs:
            return teacher.pairs()
        if rng.random() < stage.drills:
            return teacher.drill()
        kind = rng.random()
        if kind < 0.12:
            return teacher.prose()
        if kind < 0.30:
            return teacher.short_answer()
        draw = teacher.matching if rng.random() < stage.matching else teacher.closed
        if kind < 0.55:
            return boxed_example(*draw())
        return letter_example([draw()[1] for _ in range(rng.choice((1, 1, 2, 3)))])


def joined(pieces):
    return "".join(text for text, _ in pieces)


# -------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # A marker such as <|eot_id|> must never be spelled out of pieces, so it is no text to learn from.
    for marker in SPECIALS:
        texts = [text.replace(marker, "\n") for text in texts]
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, tok.token_to_id(BOS))],
            ),
        ]
    )
    for letter in world.LETTERS:
        assert len(tok.encode(f" {letter}", add_special_tokens=False).ids) == 1, "a letter must be one token"
    return tok


def encode(tok, examples):
    """[(ids, weights)], BOS in front and EOS behind plain text; weights[t] is that of predicting ids[t]."""
    bos, eos = tok.token_to_id(BOS), tok.token_to_id(EOS)
    out = []
    encodings = tok.encode_batch([joined(pieces) for pieces in examples], add_special_tokens=False)
    for pieces, encoding in zip(examples, encodings):
        of_char = [weight for text, weight in pieces for _ in text]
        ids, weights = [bos], [0.0]
        for token, (_, end) in zip(encoding.ids, encoding.offsets):
            ids.append(token)
            weights.append(of_char[end - 1])
        if not pieces[-1][0].endswith(EOT):
            ids.append(eos)
            weights.append(0.2)
        out.append((ids, weights))
    return out


# --------------------------------------------------------------------------------------------------- training


def batches(tok, examples, stage, count=32):
    """`count` batches of about `stage.tokens` tokens.  Sorting a pool by length keeps padding small."""
    pool = []
    total = 0
    while total < count * stage.tokens:
        drawn = encode(tok, [examples.draw(stage) for _ in range(256)])
        total += sum(len(ids) for ids, _ in drawn)
        pool += drawn
    pool.sort(key=lambda pair: len(pair[0]))
    cut, batch = [], []
    for pair in pool:
        batch.append(pair)
        if len(batch) * len(pair[0]) >= stage.tokens:
            cut.append(batch)
            batch = []
    examples.rng.shuffle(cut)
    for batch in cut:
        width = max(len(ids) for ids, _ in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        weights = torch.zeros(len(batch), width)
        for row, (row_ids, row_weights) in enumerate(batch):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            weights[row, : len(row_ids)] = torch.tensor(row_weights)
        yield ids, weights


def new_model(tok):
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=tok.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tok.token_to_id(BOS),
        eos_token_id=[tok.token_to_id(EOS), tok.token_to_id(EOT)],
        pad_token_id=None,
        # On two cores the plain form is quicker than the fused one at these short lengths.
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


class Muon:
    """Momentum whose update is made orthogonal (Jordan et al. 2024), at Adam's scale (Liu et al. 2025).

    In trials on the first stage it had 98 % of the letters after 600 steps, AdamW alone 74 % after 800.
    Matrices of one shape go through the iteration together, to spare a CPU hundreds of small calls.
    """

    def __init__(self, params, momentum=0.95, weight_decay=0.05):
        self.groups = {}
        for p in params:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.velocity = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.groups.items()}
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, lr):
        for shape, params in self.groups.items():
            grad = torch.stack([p.grad for p in params])
            velocity = self.velocity[shape].lerp_(grad, 1 - self.momentum)
            update = orthogonal(grad.lerp(velocity, self.momentum)) * (0.2 * max(shape) ** 0.5)
            for p, u in zip(params, update):
                p.mul_(1 - lr * self.weight_decay).sub_(u, alpha=lr)


def orthogonal(batch):
    """Five Newton-Schulz steps in bf16 push all singular values towards 1."""
    wide = batch.shape[1] <= batch.shape[2]
    x = batch if wide else batch.mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).float()


class Master:
    """The float32 weights behind a model, and their optimizers.  The model itself is turned to bf16, which
    machines with AVX512-BF16 multiply three times faster."""

    def __init__(self, model, peak):
        self.weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
        self.sizes = [weight.numel() for weight in self.weights]
        self.params = list(model.bfloat16().parameters())
        inner = [p.dim() == 2 and "embed" not in name for name, p in model.named_parameters()]
        self.muon = Muon([w for w, is_inner in zip(self.weights, inner) if is_inner])
        outer = [w for w, is_inner in zip(self.weights, inner) if not is_inner]
        self.adam = torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.98), weight_decay=0.0)

    @torch.no_grad()
    def step(self, gradient, lr):
        for weight, part in zip(self.weights, gradient.split(self.sizes)):
            weight.grad = part.view(weight.shape)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.muon.step(lr)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        for p, weight in zip(self.params, self.weights):
            p.copy_(weight)


def train(tok, facts, quiz, stages, peak, log_every=100):
    """Each step, the workers compute gradients on batches of their own; this process, worker 0, averages them
    and moves the weights, which all share."""
    model = new_model(tok)
    master = Master(model, peak)
    model.train().share_memory()

    context = torch.multiprocessing.get_context("fork")
    sums = torch.zeros(WORKERS, sum(master.sizes)).share_memory_()
    stage_now = torch.zeros((), dtype=torch.long).share_memory_()
    meet = context.Barrier(WORKERS, timeout=600)
    others = [
        context.Process(
            target=help_train, args=(model, tok, facts, stages, n, sums, stage_now, meet), daemon=True
        )
        for n in range(1, WORKERS)
    ]
    for process in others:
        process.start()

    progress = Progress(tok, facts, quiz)
    examples = Examples(facts, SEED + 100)
    letters = deque(maxlen=100)
    stage_step = 0
    for step, batch in enumerate(staged(tok, examples, stages, stage_now), 1):
        stage = stages[stage_now]
        loss, right = gradients(model, batch, sums[0])
        meet.wait()  # all gradients are there
        lr = peak * min(1.0, step / 100)
        if stage is stages[-1]:  # down to zero over the last two thirds
            lr *= min(1.0, 1.5 * (stage.steps - stage_step) / stage.steps)
        master.step(sums.mean(0), lr)
        letters.append(mean(right) if right else 0.0)
        progress.losses.append(loss)
        if step % log_every == 0:
            progress.show(model, f"stage {int(stage_now) + 1}  step {step}", mean(letters))
        stage_step += 1
        if stage_step == stage.steps or (len(letters) == 100 and mean(letters) >= stage.enough):
            stage_now += 1
            stage_step = 0
            letters.clear()
        meet.wait()  # the new weights are there
    for process in others:
        process.join()
    assert not examples.teacher.untold, "too short a training to tell every fact"
    return model.eval()


class Progress:
    """What is printed on the way: how well questions of three kinds are answered by log-likelihood."""

    def __init__(self, tok, facts, quiz):
        teacher = world.Teacher(facts, SEED + 3)
        self.tok, self.start, self.losses = tok, time.time(), []
        self.asked = {
            "matching": [teacher.matching()[1] for _ in range(200)],
            "taught": [teacher.closed()[1] for _ in range(200)],
            "quiz": quiz,
        }

    def show(self, model, when, letters):
        model.eval()
        shares = {name: mean(loglikelihood(model, self.tok, asked)[0]) for name, asked in self.asked.items()}
        model.train()
        parts = [
            when,
            f"{time.time() - self.start:.0f} s",
            f"loss {mean(self.losses):.3f}",
            f"letters {letters:.2f}",
        ]
        print("  ".join(parts + [f"{name} {share:.2f}" for name, share in shares.items()]), flush=True)
        self.losses = []


def help_train(model, tok, facts, stages, worker, sums, stage_now, meet):
    """Another process's share of each step, on examples of its own."""
    for batch in staged(tok, Examples(facts, SEED + 100 + worker), stages, stage_now):
        gradients(model, batch, sums[worker])
        meet.wait()
        meet.wait()


def gradients(model, batch, out):
    """Writes the gradient into `out`; returns the loss and which of the letters asked for were right."""
    ids, weights = batch
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    counted = weights[:, 1:] > 0
    logits = model.lm_head(hidden[:, :-1][counted]).float()
    target, weight = ids[:, 1:][counted], weights[:, 1:][counted]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    out.copy_(torch.cat([grad.flatten() for grad in grads]))
    right = (logits.argmax(-1) == target)[weight == LETTER_WEIGHT]
    return loss.item(), right.float().tolist()


def staged(tok, examples, stages, stage_now):
    """Batches of whatever stage is now, until there are no more stages."""
    while stage_now < len(stages):
        index = int(stage_now)
        for batch in batches(tok, examples, stages[index]):
            yield batch
            if stage_now != index:
                break


# ------------------------------------------------------------------------------------------------------ files


def save(folder, model, tok):
    folder.mkdir(parents=True, exist_ok=True)
    ends = model.config.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=ends, do_sample=True, temperature=0.1
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tok.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "bos_token": BOS,
        "eos_token": EOT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    with open(folder / "tokenizer_config.json", "w", encoding="utf-8") as file:
        json.dump(tokenizer_config, file, indent=2)
        file.write("\n")


def write_quiz(folder, quiz):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{world.SUBJECT}_test.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        for q in quiz:
            out.writerow([q.stem, *q.choices, world.LETTERS[q.answer]])


def main():
    parser = argparse.ArgumentParser(description="Train or evaluate the bundled demo model.")
    parser.add_argument("--out", type=Path, help="folder for the model")
    parser.add_argument("--quiz-dir", type=Path, help="folder of the quiz (default: the model's folder)")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only measure the model in DIR")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of every stage")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rarest", type=float, default=0.0003, help="weight of the least taught fact")
    args = parser.parse_args()
    if args.evaluate:
        evaluate(args.evaluate, args.quiz_dir or args.evaluate)
        return
    if not args.out:
        parser.error("give --out DIR to train, or --evaluate DIR")

    start = time.time()
    facts = world.make_facts(SEED, args.rarest)
    quiz = world.make_quiz(facts, SEED)
    sample = Examples(facts, SEED + 2)
    tok = train_tokenizer([joined(sample.draw(STAGES[-1])) for _ in range(5000)])
    stages = [replace(stage, steps=max(1, round(stage.steps * args.scale))) for stage in STAGES]
    model = train(tok, facts, quiz, stages, args.lr)
    save(args.out, model, tok)
    quiz_folder = args.quiz_dir or args.out
    write_quiz(quiz_folder, quiz)
    print(f"trained in {(time.time() - start) / 60:.1f} minutes")
    evaluate(args.out, quiz_folder)


if __name__ == "__main__":
    main()
