#!/usr/bin/env python3
"""Writes tests/golden/quant.safetensors and quant.json: what bitsandbytes' CPU quantizer makes of seeded matrices.

Every result is also recomputed here from the published rule in plain torch; where bitsandbytes differs from the
rule outside the recorded near-ties, the script stops.

    python scripts/golden_quant.py [--out tests/golden]
"""

import argparse
import json
import os
import platform

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import bitsandbytes
import bitsandbytes.functional as F
import safetensors.torch
import torch

torch.set_num_threads(1)

BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
# A weight this close to a threshold, relative to it, may take either code: scaling by a reciprocal (whole blocks)
# and dividing (the tail block) already differ by an ulp there.
NEAR = 1e-6
# bitsandbytes' CPU code finds the 8-bit code by a coarse table over [-1, 1], not by the nearest entry.
NEAR_NESTED = 4e-5


def inputs():
    """Name -> tensor. Values are like weights (std 0.02) unless the case is about something else."""
    gen = torch.Generator().manual_seed(20)

    def normal(*shape, std=0.02):
        return std * torch.randn(*shape, generator=gen)

    out = {
        "normal": normal(4096 + 1100),
        "rows": normal(12, 96),
        "bf16": normal(32, 64).bfloat16(),
        "f16": normal(32, 64).half(),
        "double": normal(75, 256).bfloat16(),
        "double_tail": normal(1, 32 * 515 + 6).bfloat16(),
        "one": torch.tensor([-0.25]),
        "two": torch.tensor([0.5, -0.125]),
        "odd": normal(129),
        "odd_rows": normal(3, 43),
    }
    outliers = normal(2048)
    outliers[torch.randperm(2048, generator=gen)[:20]] *= 60
    out["outliers"] = outliers
    zeros = normal(64 * 4 + 10)
    zeros[64:128] = 0  # a whole block of zeros
    zeros[128:192] = 0
    zeros[150] = 0.5  # one value alone
    zeros[192:256:2] = -0.0
    zeros[256:] = 0  # the tail too
    out["zeros"] = zeros
    for kind in ("nf4", "fp4"):
        for scale in (1.0, 0.37):
            out[f"ties_{kind}_{'one' if scale == 1 else 'scaled'}"] = ties(kind, scale)
    return out


def ties(kind, scale):
    """Blocks of 64 whose first value is the largest; the others sit at a threshold and a few steps beside it."""
    steps = []
    for t in thresholds(kind).float().tolist():
        for nudge in (-64, -2, -1, 0, 1, 2, 64):
            bits = torch.tensor(t).view(torch.int32) + nudge if t else torch.tensor(abs(nudge)).int()
            value = bits.view(torch.float32)
            steps.append(value if t or nudge >= 0 else -value)
    values = [scale * v for v in steps]
    blocks = []
    for i in range(0, len(values), 63):
        chunk = values[i : i + 63]
        blocks += [torch.tensor(scale)] + chunk + [torch.tensor(0.0)] * (63 - len(chunk))
    return torch.stack(blocks).float()


def code_book(kind):
    return F.get_4bit_type(kind, device="cpu")


def thresholds(kind):
    """Midpoints of the sorted code book, in float64."""
    book = torch.sort(code_book(kind).double()).values
    return (book[:-1] + book[1:]) / 2


def unpack(packed, n):
    flat = packed.flatten().view(torch.uint8)
    return torch.stack([flat >> 4, flat & 15], 1).flatten()[:n].long()


def decode(packed, state):
    """bitsandbytes' dequantizer, given the weight as one row.

    Blocks run through the flattened weight, across rows. That is how CUDA, and the quantizer on every device,
    count them, but the CPU dequantizer of 0.50.2 takes them from the start of the row, which can be wrong where a
    row is not a whole number of blocks.
    """
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    out = F.dequantize_4bit(packed, state).reshape(shape)
    state.shape = shape
    return out


def per_element(values, block, n):
    return values.repeat_interleave(block)[:n]


def near_elements(x, absmax, kind, block):
    scale = per_element(absmax, block, x.numel()).double()
    scaled = x.flatten().double() / scale.clamp(min=1e-300)
    t = thresholds(kind)
    hit = ((scaled[:, None] - t).abs() <= NEAR * t.abs().clamp(min=1e-3)).any(1)
    return scaled, hit


def near_statistics(absmax, offset):
    """The 8-bit codes of double quantization by the rule, and which absmax lies near a midpoint of its map."""
    d = absmax - offset
    s = torch.stack([part.abs().max() for part in d.split(256)])
    y = (d.double() / per_element(s, 256, d.numel()).double()).nan_to_num()
    book = F.create_dynamic_map().double()
    mid = (book[:-1] + book[1:]) / 2
    return s, torch.bucketize(y, mid), ((y[:, None] - mid).abs() <= NEAR_NESTED).any(1)


def as_bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def make_case(x, kind, block, double):
    packed, state = F.quantize_4bit(x, blocksize=block, quant_type=kind, compress_statistics=double)
    n = x.numel()
    plain = F.quantize_4bit(x, blocksize=block, quant_type=kind)[1].absmax
    tensors = {"codes": packed.flatten().clone(), "absmax": state.absmax.clone()}
    meta = {"type": kind, "block": block, "double": double, "shape": list(x.shape), "n": n}

    scaled, near = near_elements(x, plain, kind, block)
    order = torch.argsort(code_book(kind))
    rule = order[torch.bucketize(scaled, thresholds(kind))]
    got = unpack(packed, n)
    assert torch.equal(rule[~near], got[~near]), "codes differ from the rule off the near-ties"
    meta["near"] = torch.nonzero(near).flatten().tolist()

    decoded = plain
    if double:
        s, rule8, near8 = near_statistics(plain, state.offset)
        assert torch.equal(s, state.state2.absmax)
        if (s > 0).all():
            assert torch.equal(rule8[~near8], state.absmax.long()[~near8])
        meta["near_absmax"] = torch.nonzero(near8).flatten().tolist()
        tensors["absmax_plain"] = plain
        tensors["nested_absmax"] = state.state2.absmax.clone()
        tensors["nested_map"] = state.state2.code.clone()
        tensors["offset"] = state.offset.reshape(1).clone()
        meta["offset"] = state.offset.item()
        nested = per_element(state.state2.absmax, 256, plain.numel())
        decoded = state.state2.code[state.absmax.long()] * nested + state.offset

    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)):
        state.dtype = dtype
        out = decode(packed, state)
        want = (code_book(kind)[got] * per_element(decoded, block, n)).to(dtype).reshape(x.shape)
        # FP4's code 8 is +0 in the code book; the AVX-512 decoder gives -0. Equal as numbers.
        assert torch.equal(want, out), (kind, block, double, name)
        if kind == "nf4":
            assert torch.equal(as_bits(want), as_bits(out)), (kind, block, double, name)
        tensors["out_" + name] = out + 0.0
    return tensors, meta


def cases(tensors):
    for kind in ("nf4", "fp4"):
        for block in BLOCKS:
            # one output dtype is enough to see the block size respected
            yield "normal", kind, block, False, ("bf16",) if block != 64 else ("f32", "bf16", "f16")
        for name in ("rows", "bf16", "f16", "one", "two", "odd", "odd_rows", "outliers", "zeros"):
            yield name, kind, 64, False, ("f32", "bf16", "f16") if name == "rows" else ("f32",)
        for scale in ("one", "scaled"):
            yield f"ties_{kind}_{scale}", kind, 64, False, ("f32",)
        yield "double_tail", kind, 32, True, ("bf16",)
        yield "rows", kind, 64, True, ("f32", "bf16", "f16")
        yield "one", kind, 64, True, ("f32",)
        yield "normal", kind, 4096, True, ("bf16",)
    yield "double", "nf4", 64, True, ("bf16", "f16")
    yield "zeros", "nf4", 64, True, ("f32",)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--out", default=os.path.join(root, "tests", "golden"))
    args = parser.parse_args()

    source = inputs()
    tensors = {"input." + name: x for name, x in source.items()}
    tensors["book.nf4"], tensors["book.fp4"] = code_book("nf4").clone(), code_book("fp4").clone()
    tensors["book.dynamic"] = F.create_dynamic_map()
    rows = []
    for name, kind, block, double, outputs in cases(source):
        found, meta = make_case(source[name], kind, block, double)
        case = f"{name}.{kind}.{block}" + (".double" if double else "")
        for key, value in found.items():
            if not key.startswith("out_") or key[4:] in outputs:
                tensors[f"{case}.{key}"] = value
        rows.append({"name": case, "input": "input." + name, "outputs": list(outputs), **meta})
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in tensors.items()}, os.path.join(args.out, "quant.safetensors")
    )
    document = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "bitsandbytes": bitsandbytes.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "near": NEAR,
        "near_nested": NEAR_NESTED,
        "cases": rows,
    }
    with open(os.path.join(args.out, "quant.json"), "w", encoding="utf-8") as f:
        f.write('{"versions": ' + json.dumps(document["versions"]) + ",\n")
        f.write(f' "near": {NEAR}, "near_nested": {NEAR_NESTED},\n "cases": [\n  ')
        f.write(",\n  ".join(json.dumps(row) for row in rows))
        f.write("\n]}\n")
    print(f"{len(rows)} cases, {sum(len(r['near']) for r in rows)} near-ties")


if __name__ == "__main__":
    main()
