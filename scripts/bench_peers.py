#!/usr/bin/env python3
"""qlua beside transformers, bitsandbytes and llama.cpp: the same shape, batches and context, in one run.

Every model has random weights of one shape, made here. What is not installed is said and left out.

On the CPU (bench_peers_cpu.py) each model is a process of its own that loads once and takes turns with the
others, all with the same number of threads: qlua in f32, bf16, NF4 with bf16 head, the same without double
quantization ("single") and there with NF4 head too, and NF4 with NF4 head decoded to float32; llama.cpp in BF16,
IQ4_NL with IQ4_NL or bf16 head and Q4_0, quantized by itself; transformers in float32 and bf16; bitsandbytes NF4
with double quantization, computing in bf16 and in float32. Prints tokens per second, then the ratios that qlua's
CPU kernels are judged by, each with its gate and goal, and the shares of what memory and arithmetic allow.

On CUDA transformers (bf16), bitsandbytes NF4 and llama.cpp BF16 are models in this process, and qlua runs as
a program of its own (scripts/bench.lua): in every round each takes its turn. The device is waited for before
every clock reading; a pass warms up. Prints qlua's tokens per second as multiples of the peers'.

  python3 scripts/bench_peers.py --device cpu
  python3 scripts/bench_peers.py --device cpu --shape tiny --batches 1,2 --context 32 --prefill 16
  python3 scripts/bench_peers.py --device cuda

--output FILE keeps all samples as JSON.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile

import bench_peers_cpu
from bench_models import SHAPES, LlamaCpp, Transformers, first_line

ROOT = pathlib.Path(__file__).resolve().parent.parent


def fail(message):
    print(f"bench_peers: {message}", file=sys.stderr)
    sys.exit(1)


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
    p.add_argument("--shape", choices=sorted(SHAPES), help="default: llama-3-8b, on the CPU llama-3.2-1b")
    p.add_argument("--batches", type=integers, help="default: 1,2,4,8,16,32, on the CPU 1,8")
    p.add_argument("--context", type=int, help="tokens before the steps of decode; default: 512, on the CPU 128, "
                   "there of all rows together")
    p.add_argument("--prefill", type=integers, default=[128, 512], help="lengths of prompts")
    p.add_argument("--rounds", type=int, help="turns of each; default: 10, on the CPU as many as --minutes allow, "
                   "10 at most")
    p.add_argument("--decode", type=int, help="steps of decode a round; default: 16, on the CPU 8")
    p.add_argument("--peers", default="transformers,bitsandbytes,llama.cpp")
    p.add_argument("--layers", type=int, help="keep so many layers of the shape")
    p.add_argument("--qlua", help="the binary; default: ./qlua of a portable tree, else build/qlua")
    p.add_argument("--output", "--json", dest="json", metavar="FILE", help="all samples as JSON")
    cpu = p.add_argument_group("on the CPU")
    cpu.add_argument("--threads", type=int, help="of every model; default: the processors this process may use")
    cpu.add_argument("--models", help="the rows to measure, separated by ';' (default: all but llama.cpp f32): "
                     + "; ".join([*bench_peers_cpu.OURS, *bench_peers_cpu.PEERS]))
    cpu.add_argument("--minutes", type=float, default=11, help="no round begins that would not end in this time, "
                     "after two")
    cpu.add_argument("--buffer", type=int, default=512, help="MiB read to measure the bandwidth")
    args = p.parse_args()
    cuda = args.device == "cuda"
    args.shape = args.shape or ("llama-3-8b" if cuda else "llama-3.2-1b")
    args.batches = args.batches or ([1, 2, 4, 8, 16, 32] if cuda else [1, 8])
    args.context = args.context or (512 if cuda else 128)
    args.decode = args.decode or (16 if cuda else 8)
    args.rounds = args.rounds or 10
    args.files = None
    if cuda and args.rounds < 10:
        fail("--rounds is 10 at least: a median of fewer says little")
    if min(args.context, args.rounds, args.decode, args.layers or 1) < 1:
        fail("--context, --rounds, --decode and --layers start at 1")
    if args.threads is not None and args.threads < 1:
        fail("--threads starts at 1")
    for name in peers_of(args):
        if name not in NEEDS:
            fail(f"--peers has no '{name}' (there are: {', '.join(NEEDS)})")
    return args


def peers_of(args):
    return [name for name in args.peers.split(",") if name]


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


# ---- the run ----

NEEDS = {"transformers": ["torch", "transformers"], "bitsandbytes": ["torch", "transformers", "bitsandbytes"],
         "llama.cpp": ["llama_cpp", "gguf", "numpy"]}
PACKAGES = {**NEEDS, "llama.cpp": ["llama-cpp-python", "gguf", "numpy"]}


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
    kinds, opened = {"transformers": "bf16", "bitsandbytes": "nf4", "llama.cpp": "bf16"}, []
    for peer in peers_of(args):
        why = missing(peer)
        if why:
            notes.append(f"{peer} left out: {why}")
            continue
        kind = kinds[peer]
        try:
            opened.append((kind, (LlamaCpp if peer == "llama.cpp" else Transformers)(args, kind)))
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


def run_cuda(args):
    notes = []
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as args.files:
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


def run_cpu(args):
    """The models whose packages are there; one line says what is not."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and files go
    args.threads = args.threads or len(os.sched_getaffinity(0))
    names = bench_peers_cpu.default_models()
    if args.models:
        names = [name.strip() for name in args.models.split(";")]
        for name in names:
            if name not in bench_peers_cpu.OURS and name not in bench_peers_cpu.PEERS:
                fail(f"--models has no '{name}' (see --help)")
    notes = []
    for peer, modules in NEEDS.items():
        wanted, lacking = peer in peers_of(args), [m for m in modules if not importlib.util.find_spec(m)]
        if wanted and lacking and any(name.startswith(peer) for name in names):
            install = " ".join(PACKAGES[peer])
            notes.append(f"{peer} left out: no {' and no '.join(lacking)} (pip install {install})")
        if lacking or not wanted:
            names = [name for name in names if not name.startswith(peer)]
    if not bench_peers_cpu.main(args, find_qlua(args), names, notes):
        fail("no model of qlua ran")


def main():
    args = parse()
    (run_cuda if args.device == "cuda" else run_cpu)(args)


if __name__ == "__main__":
    main()
