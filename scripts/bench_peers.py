#!/usr/bin/env python3
"""qlua beside transformers, bitsandbytes and llama.cpp: the same shape, batches and context, in one run.

Every model has random weights of one shape, made here: transformers in bfloat16 (on the CPU also float32),
bitsandbytes NF4 with double quantization where it is installed, llama.cpp through llama-cpp-python with a GGUF
file of the same weights where `gguf` is installed too. qlua runs as a program of its own (scripts/bench.lua,
JSON) on its own random weights: in every round each takes its turn. The device is waited for before every clock
reading; two passes warm up; figures are medians. What is not installed is said and left out.

  python3 scripts/bench_peers.py --device cuda
  python3 scripts/bench_peers.py --device cpu --shape tiny --batches 1,2 --context 32 --prefill 16

Prints a table: tokens per second of each, and qlua's as a multiple of the peer's. --json FILE keeps all samples.
"""

import argparse
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

SHAPES = {
    "llama-3-8b": dict(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256),
    "llama-3.2-1b": dict(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocab=128256, tied=True),
    "smollm2-135m": dict(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocab=49152, tied=True),
    "tiny": dict(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocab=256, context=512),
}


def fail(message):
    print(f"bench_peers: {message}", file=sys.stderr)
    sys.exit(1)


def first_line(error):
    return (str(error).splitlines() or [""])[0]


def integers(text):
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers")
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': numbers start at 1")
    return values


def parse():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--shape", default="llama-3-8b", choices=sorted(SHAPES))
    p.add_argument("--batches", type=integers, default=[1, 2, 4, 8, 16, 32])
    p.add_argument("--context", type=int, default=512, help="tokens before the steps of decode")
    p.add_argument("--prefill", type=integers, default=[128, 512], help="lengths of prompts")
    p.add_argument("--rounds", type=int, default=10, help="samples of prefill, turns; at least 10")
    p.add_argument("--decode", type=int, default=16, help="steps of decode a round")
    p.add_argument("--peers", default="transformers,bitsandbytes,llama.cpp")
    p.add_argument("--layers", type=int, help="keep so many layers of the shape")
    p.add_argument("--qlua", help="the binary; default: ./qlua of a portable tree, else build/qlua")
    p.add_argument("--json", help="file for all samples")
    args = p.parse_args()
    if args.rounds < 10:
        fail("--rounds is 10 at least: a median of fewer says little")
    return args


# ---- qlua ----


def find_qlua(args):
    for path in [args.qlua, ROOT / "qlua", ROOT / "build" / "qlua"]:
        if path and os.access(path, os.X_OK) and os.path.isfile(path):
            return str(pathlib.Path(path).resolve())
    fail("there is no qlua: run scripts/bench once, or give --qlua")


class Qlua:
    """One process a turn: it loads, warms up, and measures one round of all batches."""

    def __init__(self, args, fmt):
        self.args, self.fmt, self.name = args, fmt, f"qlua {fmt}"
        self.binary = find_qlua(args)

    def close(self):
        pass

    def turn(self, batches, notes):
        a = self.args
        command = [self.binary, str(ROOT / "scripts" / "bench.lua"), "--device", a.device, "--shape", a.shape,
                   "--formats", self.fmt, "--batch_sizes", ",".join(map(str, batches)), "--rounds", "1",
                   "--decode", str(a.decode), "--buffer", "64" if a.shape == "tiny" else "512",
                   "--output", "json"]
        if a.layers:
            command += ["--layers", str(a.layers)]
        results = {}
        if a.device == "cpu":  # one length of prompt a run; decode follows the context
            for length in sorted({*a.prefill, a.context}):
                for row in self.run(command + ["--prefill", str(length)], notes):
                    if row["test"] == "prefill" and length in a.prefill:
                        results[(row["batch"], "prefill", length)] = row["seconds"]
                    elif row["test"] == "decode" and length == a.context:
                        results[(row["batch"], "decode", length)] = row["seconds"]
        else:
            lengths = ",".join(map(str, a.prefill))
            for row in self.run(command + ["--prefills", lengths, "--context", str(a.context)], notes):
                key = ("prefill", row["tokens"]) if row["test"] == "prefill" else ("decode", a.context)
                results[(row["batch"], *key)] = row["seconds"]
        return results

    def run(self, command, notes):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode != 0:
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
        result = json.loads(done.stdout)
        for text in result["notes"]:
            if text not in notes:
                notes.append(text)
        return result["rows"]


class Peer:
    """A model in this process: batch by batch, and one that does not fit leaves the others."""

    def turn(self, batches, notes):
        results = {}
        for batch in batches:
            if batch in self.broken:
                continue
            try:
                for (test, length), seconds in self.batch_turn(batch).items():
                    results[(batch, test, length)] = seconds
            except Exception as error:
                self.broken.add(batch)
                notes.append(f"{self.name} batch {batch}: {type(error).__name__}: {first_line(error)}")
        return results


# ---- transformers and bitsandbytes ----


class Transformers(Peer):
    """LlamaForCausalLM with random weights; eager steps with its own cache, greedy."""

    def __init__(self, args, kind):
        import torch
        import transformers

        self.args, self.torch, self.broken = args, torch, set()
        self.name = f"transformers {kind}" if kind != "nf4" else "bitsandbytes nf4"
        if args.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device")
        s = SHAPES[args.shape]
        config = transformers.LlamaConfig(
            hidden_size=s["hidden"], intermediate_size=s["intermediate"],
            num_hidden_layers=args.layers or s["layers"], num_attention_heads=s["heads"],
            num_key_value_heads=s["kv_heads"], vocab_size=s["vocab"],
            max_position_embeddings=s.get("context", 8192), rope_theta=500000.0,
            tie_word_embeddings=s.get("tied", False), bos_token_id=1, eos_token_id=2)
        dtype = torch.float32 if kind == "f32" else torch.bfloat16
        torch.manual_seed(1)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(args.device):
                model = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        if kind == "nf4":
            self.quantize(model)
        self.model = model.eval().to(args.device)
        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"

    def quantize(self, model):
        import bitsandbytes as bnb

        torch = self.torch
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if not isinstance(child, torch.nn.Linear) or name == "lm_head":
                    continue
                new = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False,
                                        compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(child.weight.data.cpu(), requires_grad=False,
                                               compress_statistics=True, quant_type="nf4")
                setattr(parent, name, new.to(self.args.device))

    def close(self):
        self.model = None
        gc.collect()
        if self.args.device == "cuda":
            self.torch.cuda.empty_cache()

    def clock(self):
        if self.args.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def pass_(self, ids, cache=None):
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def batch_turn(self, batch):
        a, torch, results = self.args, self.torch, {}
        with torch.inference_mode():
            for length in sorted({*a.prefill, a.context}):
                ids = torch.randint(0, SHAPES[a.shape]["vocab"], (batch, length), device=a.device)
                self.pass_(ids)
                started = self.clock()
                out = self.pass_(ids)
                seconds = self.clock() - started
                if length in a.prefill:
                    results[("prefill", length)] = [seconds]
                if length == a.context:
                    results[("decode", length)] = self.decode(out)
        return results

    def decode(self, out):
        samples = []
        for step in range(self.args.decode + 2):  # two to warm up
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            started = self.clock()
            out = self.pass_(token, out.past_key_values)
            out.logits[:, -1].argmax(-1).tolist()  # the id reaches the host, as it does in qlua
            if step >= 2:
                samples.append(self.clock() - started)
        return samples


# ---- llama.cpp ----


class LlamaCpp(Peer):
    """llama-cpp-python, a GGUF file of random bfloat16 weights: batches as sequences of one call."""

    def __init__(self, args, kind):
        import llama_cpp

        self.args, self.lib, self.name, self.broken = args, llama_cpp, f"llama.cpp {kind}", set()
        self.file = tempfile.NamedTemporaryFile(suffix=".gguf", delete=False)
        self.write(kind)
        layers = -1 if args.device == "cuda" else 0
        rows = max(args.batches)
        longest = max([args.context, *args.prefill]) + args.decode + 4
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # must outlive the model
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = layers if layers >= 0 else 999
        load = getattr(llama_cpp, "llama_model_load_from_file", None) or llama_cpp.llama_load_model_from_file
        self.model = load(self.file.name.encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp does not load the GGUF file made here")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * longest, rows
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.n_batch = params.n_ubatch = max(rows, rows * max([args.context, *args.prefill]))
        make = getattr(llama_cpp, "llama_init_from_model", None) or llama_cpp.llama_new_context_with_model
        self.context = make(self.model, params)
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def write(self, kind):
        import gguf
        import numpy as np

        s = SHAPES[self.args.shape]
        random = np.random.default_rng(1)
        writer = gguf.GGUFWriter(self.file.name, "llama")
        layers, head = self.args.layers or s["layers"], s["hidden"] // s["heads"]
        writer.add_context_length(s.get("context", 8192))
        writer.add_embedding_length(s["hidden"])
        writer.add_block_count(layers)
        writer.add_feed_forward_length(s["intermediate"])
        writer.add_head_count(s["heads"])
        writer.add_head_count_kv(s["kv_heads"])
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(500000.0)
        writer.add_rope_dimension_count(head)
        writer.add_vocab_size(s["vocab"])
        writer.add_tokenizer_model("no_vocab")
        kinds = {"f32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16}

        def matrix(name, rows, columns):
            values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
            data = gguf.quants.quantize(values, kinds[kind])
            writer.add_tensor(name, data, raw_dtype=kinds[kind])

        def norm(name):
            writer.add_tensor(name, np.ones(s["hidden"], dtype=np.float32))

        matrix("token_embd.weight", s["vocab"], s["hidden"])
        if not s.get("tied"):
            matrix("output.weight", s["vocab"], s["hidden"])
        norm("output_norm.weight")
        for i in range(layers):
            norm(f"blk.{i}.attn_norm.weight")
            norm(f"blk.{i}.ffn_norm.weight")
            matrix(f"blk.{i}.attn_q.weight", s["hidden"], s["hidden"])
            matrix(f"blk.{i}.attn_k.weight", s["kv_heads"] * head, s["hidden"])
            matrix(f"blk.{i}.attn_v.weight", s["kv_heads"] * head, s["hidden"])
            matrix(f"blk.{i}.attn_output.weight", s["hidden"], s["hidden"])
            matrix(f"blk.{i}.ffn_gate.weight", s["intermediate"], s["hidden"])
            matrix(f"blk.{i}.ffn_up.weight", s["intermediate"], s["hidden"])
            matrix(f"blk.{i}.ffn_down.weight", s["hidden"], s["intermediate"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def close(self):
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        free = getattr(self.lib, "llama_model_free", None) or self.lib.llama_free_model
        free(self.model)
        os.unlink(self.file.name)

    def clear(self):
        if hasattr(self.lib, "llama_memory_clear"):
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        else:
            self.lib.llama_kv_self_clear(self.context)

    def decode_tokens(self, rows, first, count):
        """`count` tokens in each of `rows` sequences from position `first`; logits of the last ones."""
        b, n = self.batch, 0
        vocab = SHAPES[self.args.shape]["vocab"]
        for row in range(rows):
            for i in range(count):
                b.token[n] = (row * 7919 + (first + i) * 104729) % vocab
                b.pos[n], b.n_seq_id[n] = first + i, 1
                b.seq_id[n][0] = row
                b.logits[n] = 1 if i == count - 1 else 0
                n += 1
        b.n_tokens = n
        started = time.perf_counter()
        if self.lib.llama_decode(self.context, b) != 0:
            raise RuntimeError("llama_decode failed")
        self.lib.llama_synchronize(self.context)
        return time.perf_counter() - started

    def batch_turn(self, batch):
        a, results = self.args, {}
        for length in sorted({*a.prefill, a.context}):
            self.clear()
            self.decode_tokens(batch, 0, length)
            self.clear()
            seconds = self.decode_tokens(batch, 0, length)
            if length in a.prefill:
                results[("prefill", length)] = [seconds]
            if length == a.context:
                steps = [self.decode_tokens(batch, length + i, 1) for i in range(a.decode + 2)]
                results[("decode", length)] = steps[2:]
        return results


# ---- the run ----

NEEDS = {"transformers": ["torch", "transformers"], "bitsandbytes": ["torch", "transformers", "bitsandbytes"],
         "llama.cpp": ["llama_cpp", "gguf", "numpy"]}


def missing(peer):
    for name in NEEDS[peer]:
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except Exception as error:
            return f"{name} does not load: {first_line(error)}"
    return None


def open_peers(args, notes):
    kinds = {"transformers": ["bf16"] + (["f32"] if args.device == "cpu" else []), "bitsandbytes": ["nf4"],
             "llama.cpp": ["bf16"] + (["f32"] if args.device == "cpu" else [])}
    opened = []
    for peer in args.peers.split(","):
        if peer not in NEEDS:
            fail(f"--peers has no '{peer}' (there are: {', '.join(NEEDS)})")
        why = missing(peer)
        if why:
            notes.append(f"{peer} left out: {why}")
            continue
        for kind in kinds[peer]:
            try:
                make = LlamaCpp if peer == "llama.cpp" else Transformers
                opened.append((kind, make(args, kind)))
            except Exception as error:
                notes.append(f"{peer} {kind} left out: {type(error).__name__}: {error}")
    return opened


def measure(args, models, notes):
    samples, broken = {}, set()
    for round_ in range(args.rounds):
        for i in range(len(models)):
            model = models[(round_ + i) % len(models)]
            if model.name in broken:
                continue
            print(f"\rround {round_ + 1} of {args.rounds}, {model.name}" + " " * 20, end="", file=sys.stderr)
            try:
                found = model.turn(args.batches, notes)
            except Exception as error:
                broken.add(model.name)
                notes.append(f"{model.name}: {type(error).__name__}: {first_line(error)}")
                continue
            for (batch, test, length), seconds in found.items():
                samples.setdefault((batch, test, length, model.name), []).extend(seconds)
    print(file=sys.stderr)
    return samples


def rate(batch, test, length, seconds):
    return batch * (length if test == "prefill" else 1) / statistics.median(seconds)


def main():
    args, notes = parse(), []
    peers = open_peers(args, notes)
    formats = sorted({kind for kind, _ in peers} | {"bf16", "nf4"})
    ours = {fmt: Qlua(args, fmt) for fmt in formats}
    models = list(ours.values()) + [peer for _, peer in peers]
    samples = measure(args, models, notes)

    versions = {peer.version for _, peer in peers}
    print(f"{args.shape}{f', {args.layers} layers' if args.layers else ''} on {args.device}; "
          f"{args.rounds} rounds in turn; {'; '.join(sorted(versions)) or 'no peer'}")
    for note in notes:
        print(note)
    print(f"\n{'test':<14}{'batch':>6}  {'peer':<22}{'tok/s':>12}  {'qlua':<10}{'tok/s':>12}{'qlua / peer':>13}")
    rows = []
    for (batch, test, length, name), seconds in sorted(samples.items()):
        rows.append(dict(test=test, length=length, batch=batch, model=name, seconds=seconds,
                         tokens_per_second=rate(batch, test, length, seconds)))
    tests = [("decode", args.context)] + [("prefill", length) for length in args.prefill]
    for test, length in tests:
        for batch in args.batches:
            for kind, peer in peers or [(fmt, None) for fmt in formats]:
                mine = samples.get((batch, test, length, f"qlua {kind}"))
                theirs = peer and samples.get((batch, test, length, peer.name))
                a = rate(batch, test, length, theirs) if theirs else None
                b = rate(batch, test, length, mine) if mine else None
                print(f"{test + ' ' + str(length):<14}{batch:>6}  {peer.name if peer else '-':<22}"
                      f"{f'{a:.1f}' if a else '-':>12}  {kind:<10}{f'{b:.1f}' if b else '-':>12}"
                      f"{f'{b / a:.2f}' if a and b else '-':>13}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(arguments=vars(args), versions=sorted(versions), notes=notes, rows=rows), file, indent=2)
    for model in models:
        model.close()


if __name__ == "__main__":
    main()
