"""Measures the demo model as transformers computes it: both forms of the quiz, in float32, bf16 and NF4.

Used by scripts/train_demo_model.py, which has the command for it.
"""

import csv
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo_facts as world


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
            [{"role": "user", "content": world.boxed_prompt(q)}],
            add_generation_prompt=True,
            return_dict=False,
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
            pad_token_id=hf_tok.eos_token_id,
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
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@torch.no_grad()
def to_nf4(model, block=64):
    """Rounds every linear layer but lm_head to NF4 in place, as bitsandbytes does without nesting."""
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
        return [
            world.Question(row[0], tuple(row[1:5]), world.LETTERS.index(row[5])) for row in csv.reader(file)
        ]


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
