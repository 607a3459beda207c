#!/usr/bin/env python3
"""Writes tests/golden/tokenizers.json and tests/golden/tokenizers/*: encodings by Hugging Face `tokenizers`.

Two kinds of tokenizer: the real ones of the test data (only our texts and their ids are kept), and small ones
trained here, whose tokenizer.json is committed, one for each way in which the Llama family's files are put
together.

    python scripts/golden_tokenizers.py [--data ../shared/data] [--out tests/golden]
"""

import argparse
import json
import os
import platform
import random

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

REAL = {
    "llama3": "tokenizers/llama3",
    "tinyllama": "tokenizers/tinyllama",
    "stories260K": "models/stories260K",
}

TEXTS = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\t x",
    "a",
    " a",
    "a ",
    "Hello, world!",
    "Hello  world   again    and     again",
    " leading and trailing ",
    "x" + " " * 37 + "y",
    " " * 130,
    "one\ntwo\n\nthree\r\nfour\rfive",
    "if (x) {\n\t\treturn  1;\n    }\n",
    "I'm, we'LL, they've, it'S, don't, 'tis, y'all'd",
    "1 12 123 1234 12345 3.14159 1,000,000 2026-01-31",
    "ABCdefGHI snake_case camelCase kebab-case",
    "A.\nB.\nC.\nD.\nAnswer: [[B]]",
    "?!... --- ***(())[[]]{{}} <<>> ~~~ ``` $$ %% && || \\\\ //",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m na\u00efve \ufb01ne \u1e9e \u0130stanbul",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8 \ud55c\uad6d\uc5b4",
    "\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1f0 \u2764\ufe0f",
    "\U0001f600\U0001f600\U0001f600",
    "\U00010348 \U0001d518\U0001d52b\U0001d526 \U000e0001",
    "\u00a0nbsp\u2003em\u3000ideographic\u200bzero\u2028line\u0085next",
    "\u2581low line block \u2581\u2581 _ ",
    "\x00nul\x01\x02\x07\x1b[31mred\x7f",
    "tab\tvt\x0bff\x0c",
    "\ufeffbom \ufffd replaced \uffff",
    "e\u0301\u0302\u0303\u0304 zalgo",
    "\u2160\u2167 \u00b2\u00b3\u00bd \u0661\u0662\u0663 \u5341\u4e8c",
    "a" * 100,
    "ab" * 60,
    "The quick brown fox jumps over the lazy dog. " * 3,
    "<s>",
    "</s>",
    "<unk>",
    "<s>Hi</s>",
    " <s> spaced </s> out <s>",
    "<|begin_of_text|>Hi<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<|reserved_special_token_0|><|reserved_special_token_247|>",
    "<|eot_id",
    "<s><s></s>text<s",
    "<0x41><0x0A>",
    "bytes \u00ff\u0100\u07ff\u0800\uffef\U00010000\U0010ffff",
]
# only for the small tokenizers, which have these added tokens
ADDED_TEXTS = [
    "<tool>",
    "call <tool> now",
    "call<tool>now <tool><tool>",
    "a <mask> b",
    "a   <mask>   b",
    "a<mask>b\n<mask>\nc",
    "<end> word <end>word <end>",
    "one <sep>  two<sep> three",
    "whole wordy word-word word",
    "New York NEW YORK",
]

TRAINING = [
    "A small town keeps a library, a bakery and a school near the river.",
    "The baker opens at 5 in the morning; the school opens at 8.",
    "Question: who opens first? A. the library B. the bakery C. the school D. the river. Answer: B",
    "It's not far: 12 minutes on foot, 345 steps, 6789 cobbles. They'd walk, we'll walk, I'm walking.",
    "Caf\u00e9 na\u00efve \u00fcber \u65e5\u672c\u8a9e \u65e5\u672c \U0001f600 \U0001f600",
    "Hello, hello, world! The quick brown fox jumps over the lazy dog again and again.",
    "for i = 1, 10 do\n    print(i)\n\tend\n\n",
]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def bos_first(bos, bos_id):
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def byte_level(pre, ignore_merges, prefix_space=False):
    tok = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tok.pre_tokenizer = pre
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(TRAINING * 3, trainer)
    first = tok.get_vocab_size()
    tok.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"])
    tok.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True, add_prefix_space=prefix_space),
            bos_first("<|begin_of_text|>", first),
        ]
    )
    return tok


def llama2_like(metaspace):
    """Byte fallback over a vocabulary of characters; `metaspace`: the newer of the two layouts in use."""
    scratch = Tokenizer(models.BPE())
    scratch.normalizer = normalizers.Replace(" ", "\u2581")
    # merges inside one word only, as SentencePiece makes them
    scratch.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581?[^\u2581\n]+|\u2581|\n"), "isolated")
    scratch.train_from_iterator(
        [t for t in TRAINING if t.isascii()] * 3,
        trainers.BpeTrainer(vocab_size=200, show_progress=False),
    )
    learned = json.loads(scratch.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)])}
    for piece in pieces:
        if piece != "\n":
            vocab.setdefault(piece, len(vocab))
    merges = [tuple(m) for m in learned["merges"]]
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tok.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    else:
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tok.post_processor = bos_first("<s>", 1)
    return tok


def add_tokens(tok):
    tok.add_tokens(
        [
            AddedToken("<tool>", normalized=False),
            AddedToken("<end>", normalized=False, rstrip=True),
            AddedToken("<sep>", normalized=False, lstrip=True),
            AddedToken("word", normalized=False, single_word=True),
        ]
    )
    tok.add_special_tokens([AddedToken("<mask>", normalized=False, lstrip=True, rstrip=True)])
    return tok


def small():
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return {
        # Llama 3's layout
        "llama3_like": byte_level(pre_tokenizers.Sequence([split, plain]), True),
        # SmolLM2's layout: every digit alone, then GPT-2's rule
        "smollm_like": byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), gpt2]), False),
        "gpt2_like": byte_level(gpt2, False),
        # Llama 2's layout, and the one that newer converters write for the same model
        "llama2_like": llama2_like(False),
        "metaspace_like": llama2_like(True),
        # the flags of added tokens
        "llama3_added": add_tokens(byte_level(pre_tokenizers.Sequence([split, plain]), True)),
        "llama2_added": add_tokens(llama2_like(False)),
    }


def encode(tok, text, special, bos):
    """`special` False: tokens that are special count as text, so that content cannot forge a turn."""
    tok.encode_special_tokens = not special
    return tok.encode(text, add_special_tokens=bos).ids


def encode_cases(tok, texts):
    rows = []
    for text in texts:
        row = {"text": text, "ids": encode(tok, text, False, False), "full": encode(tok, text, True, True)}
        row["decoded"] = tok.decode(row["full"], skip_special_tokens=False)
        row["skipped"] = tok.decode(row["full"], skip_special_tokens=True)
        rows.append(row)
    return rows


def decode_cases(tok, seed):
    """Pieces of characters, special tokens among text, ids in random order, ids without a token."""
    gen = random.Random(seed)
    size = max(tok.get_vocab(True).values()) + 1
    lists = []
    for text in ("\U0001f600 ok", "\u65e5\u672c\u8a9e", "caf\u00e9!", "\u00ff\u0100\U00010000x"):
        ids = encode(tok, text, True, False)
        lists += [ids[:i] for i in range(1, len(ids) + 1)]
        lists += [ids[i:] for i in range(1, len(ids))]
        lists.append([i for i in ids[::2]])
    hello = encode(tok, "Hello there", True, True)
    lists += [hello, hello + hello, hello[:1] * 3, hello[1:] + hello[:1] + hello[1:], [], [size + 5], [size + 5] + hello]
    for _ in range(12):
        lists.append([gen.randrange(size) for _ in range(gen.randrange(1, 12))])
    for _ in range(12):
        lists.append([gen.randrange(min(size, 262)) for _ in range(gen.randrange(1, 8))])
    rows = []
    for ids in lists:
        rows.append(
            {
                "ids": ids,
                "decoded": tok.decode(ids, skip_special_tokens=False),
                "skipped": tok.decode(ids, skip_special_tokens=True),
            }
        )
    return rows


def write_small(folder, name, tok):
    os.makedirs(os.path.join(folder, name), exist_ok=True)
    with open(os.path.join(folder, name, "tokenizer.json"), "w", encoding="utf-8") as f:
        f.write(tok.to_str() + "\n")
    level = name.startswith(("llama2", "metaspace"))
    config = {
        "tokenizer_class": "LlamaTokenizer" if level else "PreTrainedTokenizerFast",
        "bos_token": "<s>" if level else "<|begin_of_text|>",
        "eos_token": "</s>" if level else "<|eot_id|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    if level:
        config["unk_token"] = "<unk>"
    with open(os.path.join(folder, name, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=1)
        f.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--data", default=os.path.join(root, "..", "shared", "data"))
    parser.add_argument("--out", default=os.path.join(root, "tests", "golden"))
    args = parser.parse_args()

    found = []
    for name, tok in small().items():
        write_small(os.path.join(args.out, "tokenizers"), name, tok)
        path = os.path.join(args.out, "tokenizers", name, "tokenizer.json")
        found.append((name, "golden", "tokenizers/" + name, Tokenizer.from_file(path)))
    for name, path in REAL.items():
        found.append((name, "data", path, Tokenizer.from_file(os.path.join(args.data, path, "tokenizer.json"))))

    parts = []
    for seed, (name, where, path, tok) in enumerate(found):
        texts = TEXTS + (ADDED_TEXTS if where == "golden" else [])
        rows = [json.dumps(r, ensure_ascii=False) for r in encode_cases(tok, texts)]
        more = [json.dumps(r, ensure_ascii=False) for r in decode_cases(tok, seed)]
        size = max(tok.get_vocab(True).values()) + 1
        head = f'  {{"name": "{name}", "where": "{where}", "path": "{path}", "size": {size},'
        parts.append(
            head + '\n   "encode": [\n    ' + ",\n    ".join(rows)
            + '],\n   "decode": [\n    ' + ",\n    ".join(more) + "]}"
        )
    versions = {"python": platform.python_version(), "tokenizers": tokenizers.__version__}
    with open(os.path.join(args.out, "tokenizers.json"), "w", encoding="utf-8") as f:
        f.write('{"versions": ' + json.dumps(versions) + ',\n "tokenizers": [\n')
        f.write(",\n".join(parts) + "\n ]}\n")


if __name__ == "__main__":
    main()
