"""The models of bench_peers.py that live in Python: transformers, bitsandbytes and llama.cpp, random weights.

Each class loads one model and has `measure(batch, length, steps)`: seconds of a prefill of `batch` prompts of
`length` tokens (logits of the last token only) and of `steps` greedy steps of decode after it, two more going
before uncounted; every step's ids reach the host, as they do in qlua. Logits that are not finite, or all
alike, are an error: a model that computes nothing is not measured.

As a program, `bench_models.py JSON` serves one model until its input ends, one JSON object a line:
{"batch": 1, "length": 128, "steps": 16} is answered by {"prefill": s, "decode": [s, ...]} or {"error": text}.
The first line of its output greets ({"version": ...}) or says why there is no model.
"""

import argparse
import gc
import json
import os
import pathlib
import sys
import time

WARM_STEPS = 2

SHAPES = {
    "llama-3-8b": dict(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256),
    "llama-3.2-1b": dict(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocab=128256,
                         tied=True),
    "smollm2-135m": dict(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocab=49152,
                         tied=True),
    "tiny": dict(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocab=256, context=512),
}


def first_line(error):
    return (str(error).splitlines() or [""])[0]


def layers_of(args):
    return args.layers or SHAPES[args.shape]["layers"]


class Model:
    """What both kinds share: the CUDA run's turn of all batches, one that does not fit leaving the others."""

    def turn(self, batches, notes):
        results, a = {}, self.args
        for batch in batches:
            if batch in self.broken:
                continue
            try:
                for length in sorted({*a.prefill, a.context}):
                    steps = a.decode if length == a.context else 0
                    self.measure(batch, length, 0)
                    prefill, decode = self.measure(batch, length, steps)
                    if length in a.prefill:
                        results[(batch, "prefill", length)] = [prefill]
                    if steps:
                        results[(batch, "decode", length)] = decode
            except Exception as error:
                self.broken.add(batch)
                notes.append(f"{self.name} batch {batch}: {type(error).__name__}: {first_line(error)}")
        return results


# ---- transformers and bitsandbytes ----


class Transformers(Model):
    """LlamaForCausalLM; eager steps with its own cache. kind: f32, bf16, or nf4 (bitsandbytes, double
    quantization, bf16 head; products in bf16, in "nf4, f32" in float32, faster where no bf16 instructions are)."""

    def __init__(self, args, kind):
        import torch
        import transformers

        self.args, self.torch, self.broken = args, torch, set()
        self.name = f"{'bitsandbytes' if kind.startswith('nf4') else 'transformers'} {kind}"
        if args.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device")
        if args.threads:
            torch.set_num_threads(args.threads)
        dtype = torch.float32 if kind == "f32" else torch.bfloat16
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(args.device), without_initialization(transformers):
                model = transformers.LlamaForCausalLM(self.configuration(transformers))
        finally:
            torch.set_default_dtype(before)
        model.tie_weights()
        self.fill(model)
        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"
        if kind.startswith("nf4"):
            self.quantize(model, torch.float32 if kind == "nf4, f32" else torch.bfloat16)
        self.model = model.eval().to(args.device)

    def configuration(self, transformers):
        s = SHAPES[self.args.shape]
        return transformers.LlamaConfig(
            hidden_size=s["hidden"], intermediate_size=s["intermediate"],
            num_hidden_layers=layers_of(self.args), num_attention_heads=s["heads"],
            num_key_value_heads=s["kv_heads"], vocab_size=s["vocab"],
            max_position_embeddings=s.get("context", 8192), rope_theta=500000.0,
            tie_word_embeddings=s.get("tied", False), bos_token_id=1, eos_token_id=2)

    def fill(self, model):
        """Normal weights, every layer those of the first: drawing them is most of the time of loading."""
        torch, first = self.torch, {}
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() < 2:
                    weight.fill_(1)
                    continue
                key = name.split(".layers.")[-1].partition(".")[2] if ".layers." in name else name
                weight.copy_(first[key]) if key in first else weight.normal_(0, 0.02)
                first.setdefault(key, weight)

    def quantize(self, model, compute_dtype):
        import bitsandbytes as bnb

        torch = self.torch
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if not isinstance(child, torch.nn.Linear) or name == "lm_head":
                    continue
                new = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, device="meta",
                                        compute_dtype=compute_dtype, compress_statistics=True,
                                        quant_type="nf4")
                new.weight = bnb.nn.Params4bit(child.weight.data.cpu(), requires_grad=False,
                                               compress_statistics=True, quant_type="nf4")
                new = new.to(self.args.device)
                if new.weight.dtype != torch.uint8 or new.weight.quant_state is None:
                    raise RuntimeError(f"{name} is not quantized")
                setattr(parent, name, new)
        self.version += f", bitsandbytes {bnb.__version__}"

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

    def measure(self, batch, length, steps):
        torch, samples = self.torch, []
        with torch.inference_mode():
            ids = torch.randint(0, SHAPES[self.args.shape]["vocab"], (batch, length), device=self.args.device)
            started = self.clock()
            out = self.pass_(ids)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            prefill = self.clock() - started
            for step in range(steps + WARM_STEPS if steps else 0):
                started = self.clock()
                out = self.pass_(token, out.past_key_values)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                token.tolist()
                if step >= WARM_STEPS:
                    samples.append(self.clock() - started)
            last = out.logits[:, -1].float()
            if out.logits.shape[1] != 1 or not torch.isfinite(last).all() or last.std() == 0:
                raise RuntimeError("the logits are not those of one token, not finite or all alike")
        return prefill, samples


def without_initialization(transformers):
    """The context in which a model's weights are not drawn yet; without it loading is slower only."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()


# ---- llama.cpp ----

# kind -> type of the matrices, type of token_embd and of the head
DRAWN_ROWS = 8192  # of token_embd and of the head
QUANTIZED = {
    "iq4_nl": ("IQ4_NL", "IQ4_NL"),
    "iq4_nl, bf16 head": ("IQ4_NL", "BF16"),
    "q4_0": ("Q4_0", "Q4_0"),
}


class LlamaCpp(Model):
    """llama-cpp-python with a GGUF file of random weights: batches are sequences of one call."""

    def __init__(self, args, kind):
        import llama_cpp
        import numpy

        self.args, self.lib, self.numpy = args, llama_cpp, numpy
        self.name, self.broken = f"llama.cpp {kind}", set()
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # must outlive the model
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.threads = args.threads or len(os.sched_getaffinity(0))
        file = write_gguf(llama_cpp, args, kind, self.threads)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 999 if args.device == "cuda" else 0
        load = getattr(llama_cpp, "llama_model_load_from_file", None) or llama_cpp.llama_load_model_from_file
        self.model = load(str(file).encode(), params)
        file.unlink()
        if not self.model:
            raise RuntimeError("llama.cpp does not load the GGUF file made here")
        self.open_context()
        system = llama_cpp.llama_print_system_info().decode()
        units = [part.split("=")[0].split(":")[-1].strip() for part in system.split("|") if "= 1" in part]
        self.version = f"llama-cpp-python {llama_cpp.__version__} ({' '.join(units)})"

    def open_context(self):
        lib, a = self.lib, self.args
        rows, longest = max(a.batches), max([a.context, *a.prefill])
        params = lib.llama_context_default_params()
        params.n_seq_max = rows
        params.n_ctx = rows * (longest + a.decode + WARM_STEPS + 2)  # split evenly among the sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.n_batch = rows * longest
        if a.device == "cuda":
            params.n_ubatch = params.n_batch
        make = getattr(lib, "llama_init_from_model", None) or lib.llama_new_context_with_model
        self.context = make(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {params.n_ctx} tokens")
        taken = lib.llama_n_threads(self.context)
        if taken != self.threads:
            raise RuntimeError(f"llama.cpp takes {taken} threads, not {self.threads}")
        self.batch = lib.llama_batch_init(params.n_batch, 0, 1)

    def close(self):
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        free = getattr(self.lib, "llama_model_free", None) or self.lib.llama_free_model
        free(self.model)

    def clear(self):
        if hasattr(self.lib, "llama_memory_clear"):
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        else:
            self.lib.llama_kv_self_clear(self.context)

    def decode_tokens(self, tokens, first):
        """`tokens` [rows][count] from position `first`, last ones' logits: seconds, greedy next tokens."""
        b, lasts, n = self.batch, [], 0
        for row, ids in enumerate(tokens):
            for i, token in enumerate(ids):
                b.token[n], b.pos[n], b.n_seq_id[n] = token, first + i, 1
                b.seq_id[n][0] = row
                b.logits[n] = i == len(ids) - 1
                n += 1
            lasts.append(n - 1)
        b.n_tokens = n
        started = time.perf_counter()
        if self.lib.llama_decode(self.context, b) != 0:
            raise RuntimeError("llama_decode failed")
        self.lib.llama_synchronize(self.context)
        logits = [self.logits(at) for at in lasts]
        best = [int(row.argmax()) for row in logits]
        seconds = time.perf_counter() - started
        if not all(self.numpy.isfinite(row).all() and row.std() > 0 for row in logits):
            raise RuntimeError("the logits are not finite or all alike")
        return seconds, [[token] for token in best]

    def logits(self, at):
        found = self.lib.llama_get_logits_ith(self.context, at)
        if not found:
            raise RuntimeError("llama.cpp has no logits of the last token")
        return self.numpy.ctypeslib.as_array(found, (SHAPES[self.args.shape]["vocab"],))

    def measure(self, batch, length, steps):
        vocab, samples = SHAPES[self.args.shape]["vocab"], []
        self.clear()
        prompts = [[(row * 7919 + i * 104729) % vocab for i in range(length)] for row in range(batch)]
        prefill, tokens = self.decode_tokens(prompts, 0)
        for step in range(steps + WARM_STEPS if steps else 0):
            seconds, tokens = self.decode_tokens(tokens, length + step)
            if step >= WARM_STEPS:
                samples.append(seconds)
        return prefill, samples


def write_gguf(lib, args, kind, threads):
    """A file of one layer and part of the vocabulary, quantized by llama.cpp itself, then these as often as
    the shape has them: no speed depends on the values, and quantizing takes seconds instead of minutes."""
    import gguf

    folder = pathlib.Path(args.files)
    stored = "bf16" if kind in QUANTIZED else kind
    one = folder / f"one-{stored}.gguf"
    if not one.exists():
        write_one_layer(one, args, stored)
    if kind in QUANTIZED:
        source, one = one, folder / "one-quantized.gguf"
        matrices, head = QUANTIZED[kind]
        params = lib.llama_model_quantize_default_params()
        params.nthread, params.pure = threads, True
        params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{matrices}")
        params.token_embedding_type = params.output_tensor_type = int(gguf.GGMLQuantizationType[head])
        if lib.llama_model_quantize(str(source).encode(), str(one).encode(), params) != 0:
            raise RuntimeError("llama_model_quantize failed")
    whole = folder / "whole.gguf"
    repeat_layer(one, whole, args)
    check_types(whole, kind)
    return whole


def gguf_writer(path, args):
    import gguf

    s = SHAPES[args.shape]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(s.get("context", 8192))
    writer.add_embedding_length(s["hidden"])
    writer.add_feed_forward_length(s["intermediate"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(s["hidden"] // s["heads"])
    writer.add_vocab_size(s["vocab"])
    writer.add_tokenizer_model("no_vocab")
    return writer


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_one_layer(path, args, kind):
    import gguf
    import numpy as np

    s, writer, random = SHAPES[args.shape], gguf_writer(path, args), np.random.default_rng(1)
    dtype = {"f32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16}[kind]
    hidden, kv, wide = s["hidden"], s["kv_heads"] * s["hidden"] // s["heads"], s["intermediate"]
    writer.add_block_count(1)
    vocab = min(s["vocab"], DRAWN_ROWS)
    matrices = {
        "token_embd": (vocab, hidden),
        "blk.0.attn_q": (hidden, hidden), "blk.0.attn_k": (kv, hidden), "blk.0.attn_v": (kv, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (wide, hidden), "blk.0.ffn_up": (wide, hidden), "blk.0.ffn_down": (hidden, wide),
    }
    if not s.get("tied"):
        matrices["output"] = (vocab, hidden)
    for name, (rows, columns) in matrices.items():
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    finish(writer)


def repeat_layer(one, whole, args):
    import gguf
    import numpy as np

    reader, writer = gguf.GGUFReader(str(one)), gguf_writer(whole, args)
    writer.add_block_count(layers_of(args))
    vocab = SHAPES[args.shape]["vocab"]
    for tensor in reader.tensors:
        if tensor.name in ("token_embd.weight", "output.weight"):
            rows = np.tile(tensor.data, (-(-vocab // len(tensor.data)), 1))[:vocab]
            writer.add_tensor(tensor.name, rows, raw_dtype=tensor.tensor_type)
            continue
        copies = layers_of(args) if tensor.name.startswith("blk.0.") else 1
        for i in range(copies):
            name = tensor.name.replace("blk.0.", f"blk.{i}.")
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)


def check_types(path, kind):
    """That the file holds what the row will say: llama.cpp may choose other types for some tensors."""
    import gguf

    matrices, head = QUANTIZED.get(kind, (kind.upper(), kind.upper()))
    for tensor in gguf.GGUFReader(str(path)).tensors:
        wanted = head if tensor.name in ("token_embd.weight", "output.weight") else matrices
        if len(tensor.shape) == 2 and tensor.tensor_type.name != wanted:
            raise RuntimeError(f"{tensor.name} is {tensor.tensor_type.name} in the file, not {wanted}")


# ---- one model in a process of its own ----


def serve(text):
    args = argparse.Namespace(**json.loads(text))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer

    def answer(value):
        print(json.dumps(value), file=out, flush=True)

    try:
        family, kind = args.name.split(" ", 1)
        model = (LlamaCpp if family == "llama.cpp" else Transformers)(args, kind)
        answer(dict(version=model.version))
    except Exception as error:
        answer(dict(error=f"{type(error).__name__}: {first_line(error)}"))
        return
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            prefill, decode = model.measure(ask["batch"], ask["length"], ask["steps"])
            answer(dict(prefill=prefill, decode=decode))
        except Exception as error:
            answer(dict(error=f"{type(error).__name__}: {first_line(error)}"))
    model.close()


if __name__ == "__main__":
    serve(sys.argv[1])
