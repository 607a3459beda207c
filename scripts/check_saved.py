#!/usr/bin/env python3
"""Checks 4-bit folders saved by `model:save(dir)` against transformers and bitsandbytes.

    python scripts/check_saved.py OURS REFERENCE [OURS REFERENCE ...]

OURS must load in transformers as a bitsandbytes 4-bit model, without a missing or unexpected tensor. Then

- REFERENCE is a 4-bit folder (OURS was loaded from it, or from what it was made from with the same settings): the
  same tensors with the same dtypes and shapes; every value that is not quantized and every decoded weight
  bit-equal.
- REFERENCE is a folder of plain weights: bitsandbytes quantizes it here with the settings that OURS states;
  codes equal but for near-ties, block scales equal but for near-ties of the 8-bit map.

Exit code 1 and a line per fault. Development only; needs scripts/golden_requirements.txt.
"""

import glob
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import bitsandbytes.functional as F
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM

from golden_quant import code_book, decode, near_elements, near_statistics, per_element, unpack

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Folder:
    """All tensors of a model folder; quantized weights apart, each with its state."""

    def __init__(self, path):
        self.path, self.tensors, self.states = path, {}, {}
        files = glob.glob(os.path.join(path, "model*.safetensors"))
        if not files:
            raise SystemExit(f"{path}: no model*.safetensors")
        for file in sorted(files):
            self.tensors.update(safetensors.torch.load_file(file))
        for name in self.tensors:
            parts = {k: v for k, v in self.tensors.items() if k.startswith(name + ".")}
            if any(".quant_state.bitsandbytes__" in k for k in parts):
                self.states[name] = F.QuantState.from_dict(parts, device="cpu")
        marks = tuple(name + "." for name in self.states)
        self.plain = {k: v for k, v in self.tensors.items() if k not in self.states and not k.startswith(marks or "\0")}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_loads(ours, faults):
    model, info = AutoModelForCausalLM.from_pretrained(ours.path, device_map="cpu", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            faults.append(f"transformers reports {kind}: {sorted(map(str, info[kind]))[:5]}")
    loaded = {n + ".weight" for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    if loaded != set(ours.states):
        faults.append(f"4-bit modules differ from 4-bit tensors: {sorted(loaded ^ set(ours.states))[:5]}")
    for name in loaded & set(ours.states):
        p = model.get_parameter(name)
        if not same_bits(decode(p.data, p.quant_state), decode(ours.tensors[name], ours.states[name])):
            faults.append(f"{name}: decodes otherwise in the loaded model")


def check_same(ours, ref, faults):
    for name in sorted(set(ours.tensors) ^ set(ref.tensors)):
        faults.append(f"{name}: only in {ours.path if name in ours.tensors else ref.path}")
    for name in sorted(set(ours.tensors) & set(ref.tensors)):
        a, b = ours.tensors[name], ref.tensors[name]
        if ".quant_state." in name:
            x, y = (json.loads(bytes(t.tolist())) for t in (a, b))
            if x != y or list(x) != list(y):
                faults.append(f"{name}: {x} against {y}")
        elif not same_bits(a, b):
            faults.append(f"{name}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}, or other values")
    for name in set(ours.states) & set(ref.states):
        if not same_bits(decode(ours.tensors[name], ours.states[name]), decode(ref.tensors[name], ref.states[name])):
            faults.append(f"{name}: decoded values differ")
    with open(os.path.join(ours.path, "config.json"), encoding="utf-8") as f:
        mine = json.load(f)["quantization_config"]
    with open(os.path.join(ref.path, "config.json"), encoding="utf-8") as f:
        theirs = json.load(f)["quantization_config"]
    for key in ("quant_method", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if mine.get(key) != theirs.get(key):
            faults.append(f"config.json: {key} {mine.get(key)!r} against {theirs.get(key)!r}")


def check_quantizer(ours, ref, faults):
    ties = 0
    for name, got in ours.plain.items():
        if name not in ref.tensors or not same_bits(got, ref.tensors[name]):
            faults.append(f"{name}: not quantized, yet not what the reference holds")
    for name in sorted(set(ref.tensors) - set(ours.plain) - set(ours.states)):
        faults.append(f"{name}: only in {ref.path}")
    for name, state in ours.states.items():
        x = ref.tensors[name]
        kind, block, n = state.quant_type, state.blocksize, x.numel()
        packed, want = F.quantize_4bit(x, blocksize=block, quant_type=kind)
        _, near = near_elements(x, want.absmax, kind, block)
        differ = unpack(ours.tensors[name], n) != unpack(packed, n)
        ties += int((differ & near).sum())
        if (differ & ~near).any():
            faults.append(f"{name}: {int((differ & ~near).sum())} of {n} codes differ off the near-ties")
        if not torch.equal(state.code, code_book(kind)):
            faults.append(f"{name}: another code book")
        if not state.nested:
            if not torch.equal(state.absmax, want.absmax):
                faults.append(f"{name}: {int((state.absmax != want.absmax).sum())} block scales differ")
            continue
        mean = want.absmax.mean()
        if abs(state.offset - mean) > 4e-7 * abs(mean):
            faults.append(f"{name}: offset {state.offset.item()} against {mean.item()}")
        s, codes, near = near_statistics(want.absmax, state.offset)
        if not torch.equal(s, state.state2.absmax):
            faults.append(f"{name}: nested_absmax differs")
        live = per_element(s, 256, codes.numel()) > 0  # where all scales are the offset, any code decodes to it
        wrong = (codes != state.absmax.long()) & ~near & live
        if wrong.any():
            faults.append(f"{name}: {int(wrong.sum())} of {codes.numel()} scale codes differ off the near-ties")
    return ties


def main():
    pairs = sys.argv[1:]
    if not pairs or len(pairs) % 2 or "--help" in pairs:
        print(__doc__)
        raise SystemExit(0 if "--help" in pairs else 1)
    failed = False
    for path, reference in zip(pairs[::2], pairs[1::2]):
        ours, ref, faults = Folder(path), Folder(reference), []
        if not ours.states:
            faults.append("no 4-bit weight in it")
        check_loads(ours, faults)
        note = f"{len(ours.states)} 4-bit weights, {len(ours.plain)} others"
        if ref.states:
            check_same(ours, ref, faults)
        else:
            note += f", {check_quantizer(ours, ref, faults)} codes differ at near-ties"
        print(f"{path}: {'FAILED' if faults else 'ok'} against {reference} ({note})")
        for fault in faults:
            print("  " + fault)
        failed = failed or bool(faults)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
