#!/usr/bin/env python3
"""Writes tests/golden/models/: tiny random Llama checkpoints and what transformers computes from them.

Every folder is what a user would have on disk: `save_pretrained` output, some with config.json rewritten in
the key style of transformers 4. The reference is then read back from that folder, so the file and not the
script's own memory is what the numbers belong to.

    python scripts/golden_models.py [--out tests/golden/models] [VARIANT ...]
"""

import argparse
import json
import math
import os
import platform
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

GREEDY_STEPS = 16
GREEDY_MARGIN = 0.01  # a model whose best two logits come closer is drawn again
DECODED = ["model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def variant(dtype, style, length=20, drop=(), shard=None, quant=None, **config):
    """One row of the table below. `style` 4 rewrites config.json with the keys of transformers 4."""
    return {
        "dtype": dtype,
        "style": style,
        "length": length,
        "drop": drop,
        "shard": shard,
        "quant": quant,
        "config": {**BASE, **config},
    }


def bnb(kind, double=False, storage="uint8", compute="bfloat16"):
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": storage,
    }


ODD_QUANT = {
    "hidden_size": 576,
    "intermediate_size": 100,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}

VARIANTS = {
    # Llama 2 as first published: no num_key_value_heads, no head_dim, no rope_theta in the file.
    "llama2_f32": variant(
        "f32",
        4,
        drop=("num_key_value_heads", "head_dim", "rope_theta"),
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama3_bf16": variant("bf16", 4, num_attention_heads=8, drop=("head_dim",)),
    # 40 positions against an original context of 32; the 12 frequencies fall in all three bands of the rule.
    "llama31_bf16": variant(
        "bf16", 4, length=40, head_dim=24, tie_word_embeddings=True, rope_parameters=LLAMA31_ROPE
    ),
    "linear_f16": variant(
        "f16",
        4,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "v5_bf16": variant("bf16", 5, num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "v5_llama31_f16": variant(
        "f16",
        5,
        length=40,
        num_hidden_layers=1,
        head_dim=24,
        tie_word_embeddings=True,
        rope_parameters=LLAMA31_ROPE,
    ),
    "attention_bias_bf16": variant("bf16", 4, num_hidden_layers=1, attention_bias=True),
    "biases_bf16": variant("bf16", 5, num_hidden_layers=1, attention_bias=True, mlp_bias=True),
    # SmolLM2's head counts; sizes that no power of two divides.
    "odd_bf16": variant(
        "bf16",
        5,
        vocab_size=131,
        hidden_size=72,
        intermediate_size=50,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
    "sharded_bf16": variant("bf16", 4, shard="48KB"),
    "sharded_f32": variant("f32", 5, shard="64KB", num_hidden_layers=1),
    "nf4": variant("bf16", 4, quant=bnb("nf4")),
    "nf4_double": variant("bf16", 4, quant=bnb("nf4", double=True), attention_bias=True),
    "nf4_storage_bf16": variant("bf16", 5, quant=bnb("nf4", storage="bfloat16"), num_hidden_layers=1),
    "nf4_f16": variant("f16", 5, quant=bnb("nf4", compute="float16"), num_hidden_layers=1),
    "nf4_f32": variant(
        "f32", 5, quant=bnb("nf4", double=True, compute="float32"), num_hidden_layers=1
    ),
    "fp4": variant("bf16", 4, quant=bnb("fp4"), num_hidden_layers=1),
    "fp4_double": variant("bf16", 5, quant=bnb("fp4", double=True), num_hidden_layers=1),
    # SmolLM2-135M's attention at its real width; only 4-bit keeps it small enough to commit.
    "odd_nf4": variant("bf16", 5, length=12, quant=bnb("nf4", double=True), **ODD_QUANT),
}


def seed_of(name):
    """A seed that depends on the name only, so that adding a variant leaves the others as they are."""
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % (2**31)


def random_model(spec, seed):
    """A model whose logits are spread like a trained one's (std about 2), norms and biases not trivial."""
    gen = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**spec["config"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=gen))
            elif name.endswith("bias"):
                p.copy_(0.3 * torch.randn(p.shape, generator=gen))
            elif "embed_tokens" in name or "lm_head" in name:
                std = 2.0 / math.sqrt(p.shape[1])
                p.copy_(std * torch.randn(p.shape, generator=gen))
            else:
                std = 1.4 / math.sqrt(p.shape[1])
                p.copy_(std * torch.randn(p.shape, generator=gen))
    return model.to(DTYPES[spec["dtype"]])


def rewrite_config(folder, spec):
    """config.json with the keys that transformers 4 wrote, for folders of that time."""
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as f:
        config = json.load(f)
    if spec["style"] == 4:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        if kind == "default":
            config["rope_scaling"] = None
        elif kind == "linear":
            config["rope_scaling"] = {"type": "linear", **rope}
        else:
            config["rope_scaling"] = {**rope, "rope_type": kind}
        config["torch_dtype"] = config.pop("dtype")
        config["transformers_version"] = "4.43.0"
        for key in spec["drop"]:
            config.pop(key, None)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(dict(sorted(config.items())), f, indent=2)
        f.write("\n")


def write_checkpoint(folder, spec, seed):
    shutil.rmtree(folder, ignore_errors=True)
    model = random_model(spec, seed)
    options = {"max_shard_size": spec["shard"]} if spec["shard"] else {}
    if spec["quant"]:
        plain = folder + ".plain"
        model.save_pretrained(plain)
        model = LlamaForCausalLM.from_pretrained(
            plain,
            quantization_config=BitsAndBytesConfig(**spec["quant"]),
            dtype=DTYPES[spec["dtype"]],
            device_map="cpu",
        )
        shutil.rmtree(plain)
    model.save_pretrained(folder, **options)
    gen_config = os.path.join(folder, "generation_config.json")
    if os.path.exists(gen_config):
        os.remove(gen_config)
    rewrite_config(folder, spec)


def decode(packed, state):
    """bitsandbytes' dequantizer, given the weight as one row.

    Blocks run through the flattened weight, across rows. That is how CUDA, and the quantizer on every device,
    count them, but the CPU dequantizer of 0.50.2 takes them from the start of the row, which can be wrong where a
    row is not a whole number of blocks.
    """
    import bitsandbytes.functional as F

    shape, state.shape = state.shape, torch.Size([math.prod(state.shape)])
    out = F.dequantize_4bit(packed, state).reshape(shape)
    state.shape = shape
    return out


def read_quantized(folder):
    """The state dict of a 4-bit folder with every weight decoded by bitsandbytes, and the decoded ones' names."""
    import bitsandbytes.functional as F

    stored = {}
    for file in sorted(os.listdir(folder)):
        if file.startswith("model") and file.endswith(".safetensors"):
            stored.update(safetensors.torch.load_file(os.path.join(folder, file)))
    state, decoded = {}, {}
    for name in stored:
        parts = {k[len(name) + 1 :]: v for k, v in stored.items() if k.startswith(name + ".")}
        if any("quant_state" in k for k in parts):
            qs = F.QuantState.from_dict({name + "." + k: v for k, v in parts.items()}, device="cpu")
            decoded[name] = decode(stored[name], qs)
            state[name] = decoded[name]
        elif ".weight." not in name:
            state[name] = stored[name]
    return state, decoded


def load_reference(folder, spec, dtype):
    """The model in `dtype`; 4-bit folders as a plain model that holds the decoded weights."""
    if not spec["quant"]:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        return model.eval(), {}
    state, decoded = read_quantized(folder)
    config = LlamaConfig.from_pretrained(folder, attn_implementation="eager")
    config.quantization_config = None
    del config.quantization_config
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.to(dtype).eval(), decoded


def run_with_dumps(model, ids):
    """Logits and every named point of the forward pass, batch dimension removed."""
    dumps, rope, hooks = {}, [], []

    def keep(name, value):
        dumps[name] = value.detach()[0].float().clone()

    def hook(module, name):
        def on_output(_module, _args, out):
            keep(name, out[0] if isinstance(out, tuple) else out)

        hooks.append(module.register_forward_hook(on_output))

    hook(model.model.embed_tokens, "embed")
    for i, layer in enumerate(model.model.layers):
        hook(layer.input_layernorm, f"layers.{i}.input_norm")
        hook(layer.self_attn, f"layers.{i}.attn")
        hook(layer.post_attention_layernorm, f"layers.{i}.post_norm")
        hook(layer.mlp, f"layers.{i}.mlp")
        hook(layer, f"layers.{i}.out")
    hook(model.model.norm, "norm")

    original = modeling_llama.apply_rotary_pos_emb

    def rotary(q, k, *args, **kwargs):
        q, k = original(q, k, *args, **kwargs)
        rope.append((q, k))
        return q, k

    modeling_llama.apply_rotary_pos_emb = rotary
    try:
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0].float()
    finally:
        modeling_llama.apply_rotary_pos_emb = original
        for h in hooks:
            h.remove()
    assert len(rope) == len(model.model.layers), "rotary embedding was not seen once per layer"
    for i, (q, k) in enumerate(rope):
        for name, x in (("q", q), ("k", k)):
            # [1, heads, T, head_dim] -> [T, heads * head_dim], head-major within a row
            keep(f"layers.{i}.{name}", x.transpose(1, 2).flatten(2))
    return logits, dumps


def rope_frequencies(config):
    """Angles per position in float64, from the published rules and not from transformers' code."""
    rope = config["rope_parameters"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    freq = rope["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope["rope_type"] == "linear":
        return freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        wave = 2 * np.pi / freq
        old = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((old / wave - low) / (high - low), 0, 1)
        return freq * (smooth + (1 - smooth) / rope["factor"])
    return freq


def oracle(state, config, ids):
    """The whole model in float64, written plainly: one row at a time where that is clearer."""
    w = {k: v.double().numpy() for k, v in state.items()}
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    angles = np.outer(np.arange(len(ids)), rope_frequencies(config))
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[name]

    def linear(x, name):
        y = x @ w[name + ".weight"].T
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def rotate(x):
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][ids]
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        q = rotate(linear(h, p + "self_attn.q_proj").reshape(len(ids), heads, dim))
        k = rotate(linear(h, p + "self_attn.k_proj").reshape(len(ids), kv, dim))
        v = linear(h, p + "self_attn.v_proj").reshape(len(ids), kv, dim)
        out = np.zeros_like(q)
        for head in range(heads):
            group = head // (heads // kv)
            score = q[:, head] @ k[:, group].T / np.sqrt(dim) + mask
            score = np.exp(score - score.max(-1, keepdims=True))
            out[:, head] = score / score.sum(-1, keepdims=True) @ v[:, group]
        x = x + linear(out.reshape(len(ids), -1), p + "self_attn.o_proj")
        h = norm(x, p + "post_attention_layernorm.weight")
        gate = linear(h, p + "mlp.gate_proj")
        gate = gate / (1 + np.exp(-gate))
        x = x + linear(gate * linear(h, p + "mlp.up_proj"), p + "mlp.down_proj")
    x = norm(x, "model.norm.weight")
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return x @ head.T


def greedy(model, ids):
    """Token ids that follow, one at a time from the whole prefix, and the smallest gap of the two best logits."""
    seq, margin = ids.clone(), math.inf
    with torch.no_grad():
        for _ in range(GREEDY_STEPS):
            last = model(seq, use_cache=False).logits[0, -1]
            best = torch.topk(last, 2)
            margin = min(margin, (best.values[0] - best.values[1]).item())
            seq = torch.cat([seq, best.indices[:1][None]], 1)
    return seq[0, ids.shape[1] :], margin


def check_loads(folder, decoded):
    """Proof that the folder loads in transformers as the 4-bit model that it says it is.

    No forward pass: on the CPU that of bitsandbytes 0.50.2 fails where a row is not a whole number of blocks.
    """
    model = LlamaForCausalLM.from_pretrained(folder, device_map="cpu")
    kinds = {type(m).__name__ for m in model.model.layers.modules()}
    assert "Linear4bit" in kinds and "Linear" not in kinds, kinds
    for name, want in decoded.items():
        p = model.get_parameter(name)
        got = decode(p.data, p.quant_state)
        assert got.dtype == want.dtype and torch.equal(got, want), name


def versions(spec):
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": np.__version__,
    }
    if spec["quant"]:
        import bitsandbytes

        found["bitsandbytes"] = bitsandbytes.__version__
    return found


def write_golden(folder, name, spec, seed):
    """False, with nothing written, where the greedy continuation hangs on a near-tie."""
    gen = torch.Generator().manual_seed(seed + 1)
    vocab = spec["config"]["vocab_size"]
    ids = torch.cat([torch.tensor([1]), torch.randint(3, vocab, (spec["length"] - 1,), generator=gen)])[None]

    model, decoded = load_reference(folder, spec, torch.float32)
    logits, dumps = run_with_dumps(model, ids)
    exact = oracle(model.state_dict(), spec["config"], ids[0].numpy())
    follow, margin = greedy(model, ids)
    tensors = {
        "ids": ids[0].clone(),
        "logits": logits,
        "logits_f64": torch.from_numpy(exact).float(),
        "greedy": follow.clone(),
        **dumps,
    }
    f32_error = np.abs(logits.numpy() - exact)
    meta = {
        "variant": name,
        "seed": seed,
        "weights": spec["dtype"],
        "tokens": spec["length"],
        "layers": spec["config"]["num_hidden_layers"],
        "ids": ids[0].tolist(),
        "greedy": follow.tolist(),
        "greedy_margin": margin,
        "logits_rms": float(np.sqrt((exact**2).mean())),
        "f32_error": {"max": float(f32_error.max()), "rms": float(np.sqrt((f32_error**2).mean()))},
        "versions": versions(spec),
    }
    assert f32_error.max() < 2e-5, (name, f32_error.max())
    if margin < GREEDY_MARGIN:
        return False
    if spec["dtype"] != "f32":
        low, _ = load_reference(folder, spec, DTYPES[spec["dtype"]])
        with torch.no_grad():
            low_logits = low(ids, use_cache=False).logits[0].float()
        error = np.abs(low_logits.numpy() - exact)
        tensors["logits_" + spec["dtype"]] = low_logits
        meta[spec["dtype"] + "_error"] = {
            "max": float(error.max()),
            "rms": float(np.sqrt((error**2).mean())),
        }
    if spec["quant"]:
        meta["quantization"] = spec["quant"]
        check_loads(folder, decoded)
        for weight in DECODED:
            if decoded[weight].numel() < 65536:
                tensors["dequant." + weight] = decoded[weight].clone()
        meta["dequantized"] = sorted(decoded)
    out = os.path.join(folder, "golden.safetensors")
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, out)
    with open(os.path.join(folder, "golden.json"), "w", encoding="utf-8") as f:
        json.dump(meta, f)
        f.write("\n")
    size = sum(os.path.getsize(os.path.join(folder, x)) for x in os.listdir(folder))
    print(f"{name:22s} {size / 1024:6.0f} KiB  logits rms {meta['logits_rms']:.2f}", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--out", default=os.path.join(root, "tests", "golden", "models"))
    parser.add_argument("variants", nargs="*")
    args = parser.parse_args()
    for name in args.variants or VARIANTS:
        folder = os.path.join(args.out, name)
        seed = seed_of(name)
        write_checkpoint(folder, VARIANTS[name], seed)
        while not write_golden(folder, name, VARIANTS[name], seed):
            seed += 1000
            write_checkpoint(folder, VARIANTS[name], seed)


if __name__ == "__main__":
    main()
