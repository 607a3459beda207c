#!/usr/bin/env python3
"""Trains the bundled demo model and writes it, with its quiz, as files that qlua and transformers both read.

    python3 scripts/train_demo_model.py --out examples/models/lantern-isles --quiz-dir examples/data
    python3 scripts/train_demo_model.py --evaluate examples/models/lantern-isles --quiz-dir examples/data

Packages from PyPI, as used for the bundled model: torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3,
safetensors 0.8.0 and jinja2 3.1.6 on Python 3.11 (the CPU build of torch is enough).

The model is a 3-million-parameter Llama that learns an invented world (scripts/demo_facts.py) from scratch.  Three
skills have to come together: recalling a fact, finding the choice that says it, and naming that choice's letter.  The
last two are the hard ones for so small a model, so training begins with questions that say their own answer and
moves on to questions that need the fact.

The same seed gives the same text, tokenizer and quiz on any machine.  The weights depend on the CPU's rounding too.
"""

import argparse
import csv
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean as mean

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import demo_facts as world

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
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
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
    steps: int
    tokens: int  # in one step
    drills: float  # share of examples that are bare letter exercises
    matching: float  # share of questions that say their own answer


STAGES = (
    Stage(steps=800, tokens=1536, drills=0.8, matching=0.9),
    Stage(steps=800, tokens=3072, drills=0.2, matching=0.7),
    Stage(steps=3000, tokens=4096, drills=0.02, matching=0.1),
)


# ---------------------------------------------------------------------------------------------------- training text


def chat_pieces(user, answer):
    prompt = f"{HEAD}user{HEAD_END}\n\n{user}{EOT}{HEAD}assistant{HEAD_END}\n\n"
    return [(prompt, 0.0)] + answer + [(EOT, 1.0)]


def boxed_example(fact, question):
    sentence = world.say(fact, fact.prop.says[0])
    answer = [(f"{sentence} The answer is [[", 1.0), (world.LETTERS[question.answer], LETTER_WEIGHT), ("]].", 1.0)]
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
    """Endless training examples; remembers what was asked, for the check that the quiz is unseen."""

    def __init__(self, facts, seed):
        self.teacher = world.Teacher(facts, seed)
        self.rng = self.teacher.rng
        self.asked = set()

    def draw(self, stage):
        rng, teacher = self.rng, self.teacher
        if rng.random() < stage.drills:
            return teacher.drill()
        kind = rng.random()
        if kind < 0.12:
            return teacher.prose()
        if kind < 0.30:
            return teacher.short_answer()
        draw = teacher.matching if rng.random() < stage.matching else teacher.closed
        if kind < 0.55:
            fact, question = draw()
            self.note(fact, question)
            return boxed_example(fact, question)
        drawn = [draw() for _ in range(rng.choice((1, 1, 2, 3)))]
        for fact, question in drawn:
            self.note(fact, question)
        return letter_example([question for _, question in drawn])

    def note(self, fact, question):
        self.asked.add((fact.island, fact.prop.name, question.choices))


def joined(pieces):
    return "".join(text for text, _ in pieces)


# -------------------------------------------------------------------------------------------------------- tokenizer


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
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tok.token_to_id(BOS))]
            ),
        ]
    )
    for letter in world.LETTERS:
        assert len(tok.encode(f" {letter}", add_special_tokens=False).ids) == 1, "a letter must be one token"
    return tok


def encode(tok, examples):
    """[(ids, weights)] with BOS in front and EOS behind plain text; weights[t] is that of predicting ids[t]."""
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


# --------------------------------------------------------------------------------------------------------- training


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
    """Momentum whose update is made orthogonal (Jordan et al. 2024), at Adam's scale (Liu et al. 2025).  Matrices of
    one shape go through the iteration together, which on a CPU is several times quicker than one by one."""

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


def rate(step, steps, peak):
    """Short warm-up, level, and down to zero over the last half."""
    return peak * min(1.0, (step + 1) / 100, 2 * (steps - step) / steps)


def train(tok, facts, quiz, stages, peak, log_every=200):
    """The model computes in bf16, which AVX-512 machines multiply three times faster; the optimizers keep float32
    weights.  Muon finds the letters in a few hundred steps where AdamW alone needs thousands."""
    model = new_model(tok)
    names = dict(model.named_parameters())
    master = {name: p.detach().clone().requires_grad_() for name, p in names.items()}
    model.bfloat16().train()
    inner = [name for name, p in master.items() if p.dim() == 2 and "embed" not in name]
    muon = Muon([master[name] for name in inner])
    adam = torch.optim.AdamW(
        [p for name, p in master.items() if name not in inner], lr=peak, betas=(0.9, 0.98), weight_decay=0.0
    )
    examples = Examples(facts, SEED + 1)
    probe = world.Teacher(facts, SEED + 3)
    probes = {
        "matching": [probe.matching()[1] for _ in range(200)],
        "taught": [probe.closed()[1] for _ in range(200)],
        "quiz": quiz,
    }
    steps = sum(stage.steps for stage in stages)
    step, start, losses, letters = 0, time.time(), [], []
    for ids, weights in staged(tok, examples, stages):
        lr = rate(step, steps, peak)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        counted = weights[:, 1:] > 0
        logits = model.lm_head(hidden[:, :-1][counted]).float()
        target, weight = ids[:, 1:][counted], weights[:, 1:][counted]
        loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
        loss.backward()
        for name, p in names.items():
            master[name].grad = p.grad.float()
            p.grad = None
        torch.nn.utils.clip_grad_norm_(master.values(), 1.0)
        muon.step(lr)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        with torch.no_grad():
            for name, p in names.items():
                p.copy_(master[name])
        step += 1
        losses.append(loss.item())
        letters.append((logits.argmax(-1) == target)[weight == LETTER_WEIGHT].float().mean().item())
        if step % log_every == 0:
            model.eval()
            shares = {name: loglikelihood(model, tok, asked)[0] for name, asked in probes.items()}
            model.train()
            right = "  ".join(f"{name} {sum(r) / len(r):.2f}" for name, r in shares.items())
            print(
                f"step {step}/{steps}  {time.time() - start:.0f} s  loss {mean(losses[-log_every:]):.3f}  "
                f"letters {mean(letters[-log_every:]):.2f}  {right}",
                flush=True,
            )
    return model.eval(), examples.asked


def staged(tok, examples, stages):
    for stage in stages:
        left = stage.steps
        while left > 0:
            for batch in batches(tok, examples, stage):
                yield batch
                left -= 1
                if left == 0:
                    break


# ------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def loglikelihood(model, tok, quiz):
    """([right], [chosen letter]).  Prompts of one length go together, so that nothing is padded."""
    letters = [tok.encode(f" {letter}", add_special_tokens=False).ids[0] for letter in world.LETTERS]
    prompts = [tok.encode(world.loglikelihood_prompt(q)).ids for q in quiz]
    chosen = [0] * len(quiz)
    for rows in same_length(prompts):
        logits = model(input_ids=torch.tensor([prompts[r] for r in rows]), use_cache=False).logits[:, -1]
        for row, best in zip(rows, logits[:, letters].float().argmax(-1).tolist()):
            chosen[row] = best
    return [c == q.answer for c, q in zip(chosen, quiz)], chosen


def same_length(prompts):
    groups = {}
    for row, ids in enumerate(prompts):
        groups.setdefault(len(ids), []).append(row)
    return groups.values()


@torch.no_grad()
def boxed(model, hf_tok, quiz, max_new_tokens=64):
    """([right], [chosen letter or None], [text]) of greedy answers through the chat template."""
    prompts = [
        hf_tok.apply_chat_template(
            [{"role": "user", "content": world.boxed_prompt(q)}], add_generation_prompt=True, return_dict=False
        )
        for q in quiz
    ]
    texts = [""] * len(quiz)
    for rows in same_length(prompts):
        ids = torch.tensor([prompts[r] for r in rows])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=hf_tok.convert_tokens_to_ids(EOS),
        )
        for row, new in zip(rows, out[:, ids.shape[1] :]):
            texts[row] = hf_tok.decode(new, skip_special_tokens=True)
    chosen = [boxed_letter(text) for text in texts]
    return [c == q.answer for c, q in zip(chosen, quiz)], chosen, texts


def boxed_letter(text):
    for n, letter in enumerate(world.LETTERS):
        if f"[[{letter}]]" in text:
            return n
    return None


# The sixteen NF4 levels (QLoRA, appendix E; bitsandbytes).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@torch.no_grad()
def to_nf4(model, block=64):
    """Rounds every linear layer but lm_head to NF4 in place, as bitsandbytes does without double quantization."""
    levels = torch.tensor(NF4)
    middles = (levels[1:] + levels[:-1]) / 2
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            w = module.weight.float().reshape(-1, block)
            absmax = w.abs().amax(1, keepdim=True)
            codes = torch.bucketize(w / absmax, middles)
            module.weight.copy_((levels[codes] * absmax).reshape(module.weight.shape))
    return model


def read_quiz(folder):
    with open(Path(folder) / f"{world.SUBJECT}_test.csv", newline="", encoding="utf-8") as file:
        return [world.Question(row[0], tuple(row[1:5]), world.LETTERS.index(row[5])) for row in csv.reader(file)]


def evaluate(folder, quiz_folder):
    quiz = read_quiz(quiz_folder)
    hf_tok = AutoTokenizer.from_pretrained(folder)
    tok = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    chosen = {}
    for label in ("float32", "bf16", "nf4"):
        dtype = torch.float32 if label == "float32" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        if label == "nf4":
            to_nf4(model)
        right, letters = loglikelihood(model, tok, quiz)
        report(f"{label:8} log-likelihood", right)
        chosen[label, "log-likelihood"] = (right, letters)
        right, letters, texts = boxed(model, hf_tok, quiz)
        lost = sum(letter is None for letter in letters)
        report(f"{label:8} boxed", right, f", {lost} without a letter")
        chosen[label, "boxed"] = (right, letters)
        print(f"         e.g. {quiz[0].stem!r} -> {texts[0]!r}")
    for form in ("log-likelihood", "boxed"):
        (right_a, letters_a), (right_b, letters_b) = chosen["bf16", form], chosen["nf4", form]
        fell = sum(a and not b for a, b in zip(right_a, right_b))
        rose = sum(b and not a for a, b in zip(right_a, right_b))
        other = sum(a != b for a, b in zip(letters_a, letters_b))
        print(f"bf16 -> nf4, {form}: {fell} right to wrong, {rose} wrong to right, {other} answers changed")


def report(label, right, more=""):
    print(f"{label}: {sum(right)}/{len(right)} = {sum(right) / len(right):.3f}{more}", flush=True)


# ------------------------------------------------------------------------------------------------------------ files


def save(folder, model, tok):
    folder.mkdir(parents=True, exist_ok=True)
    ends = model.config.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=ends, do_sample=True, temperature=0.1
    )
    model.save_pretrained(folder)
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
    parser.add_argument("--rarest", type=float, default=0.03, help="weight of the least taught fact")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
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
    model, asked = train(tok, facts, quiz, stages, args.lr)
    save(args.out, model, tok)
    quiz_folder = args.quiz_dir or args.out
    write_quiz(quiz_folder, quiz)
    print(f"trained in {(time.time() - start) / 60:.1f} minutes")
    evaluate(args.out, quiz_folder)


if __name__ == "__main__":
    main()
