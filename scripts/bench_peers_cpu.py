"""The CPU's part of bench_peers.py: each model in a process of its own that stays open, turns in one run.

Every round each model takes its turn at each case, the order turning from round to round; the idle processes'
threads sleep. Models that do not fit into the memory together run in groups one after the other; figures are
compared within a group only. Shares of ceilings: before each of qlua's turns the machine's read bandwidth and
multiply-add peak are measured anew.
"""

import json
import os
import pathlib
import selectors
import statistics
import subprocess
import sys
import tempfile
import time

from bench_models import SHAPES, first_line

ROOT = pathlib.Path(__file__).resolve().parent.parent
NF4_BYTES = 0.5 + 4 / 64  # a weight in qlua's memory; every 4-bit peer has as much: 4.5 bits
TORCH_BYTES, OTHER_BYTES = 1.0e9, 0.5e9  # a process beside its weights: libraries, cache, activations
SETTLE_SECONDS = 0.05  # idle OpenMP threads spin for milliseconds before they sleep
SLOW_SECONDS = 20  # a peer's turn that takes longer is taken in every other round only
LIMIT_SECONDS = 600  # for one answer

# name -> what bench_serve.lua or bench_models.py loads, bytes a weight of the layers, of the head
OURS = {
    "qlua bf16": ("bf16", 2, 2),
    "qlua nf4": ("nf4", NF4_BYTES, 2),
    "qlua nf4 single": ("nf4-single", NF4_BYTES, 2),
    "qlua nf4 single, nf4 head": ("nf4-single-head", NF4_BYTES, 2 + NF4_BYTES),
    "qlua nf4 exact, nf4 head": ("nf4-exact-head", NF4_BYTES, 2 + NF4_BYTES),
    "qlua f32": ("f32", 4, 4),
}
PEERS = {
    "llama.cpp bf16": (2, 2),
    "llama.cpp iq4_nl": (NF4_BYTES, NF4_BYTES),
    "llama.cpp iq4_nl, bf16 head": (NF4_BYTES, 2),
    "llama.cpp q4_0": (NF4_BYTES, NF4_BYTES),
    "llama.cpp f32": (4, 4),
    "transformers bf16": (2, 2),
    "transformers f32": (4, 4),
    "bitsandbytes nf4": (NF4_BYTES, 2),
    "bitsandbytes nf4, f32": (NF4_BYTES, 2),
}
# what is compared within: merged while they fit into the memory together
FAMILIES = [
    ["qlua bf16", "qlua nf4", "qlua nf4 single", "llama.cpp bf16", "transformers bf16"],
    ["qlua nf4", "qlua nf4 single", "qlua nf4 single, nf4 head", "qlua nf4 exact, nf4 head", "llama.cpp iq4_nl",
     "llama.cpp iq4_nl, bf16 head", "llama.cpp q4_0", "bitsandbytes nf4", "bitsandbytes nf4, f32"],
    ["qlua f32", "llama.cpp f32", "transformers f32"],
]


def default_models():
    return [name for name in [*OURS, *PEERS] if name != "llama.cpp f32"]


# ---- processes ----


class Worker:
    def __init__(self, name, command, log, env=None):
        self.name, self.log, self.slow = name, log, set()
        self.errors = open(log, "w")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
                                        stderr=self.errors, text=True, env=env)
        self.waiting = selectors.DefaultSelector()
        self.waiting.register(self.process.stdout, selectors.EVENT_READ)
        try:
            self.hello = self.answer()
        except BaseException:  # it may be in the middle of something long
            self.process.kill()
            self.close()
            raise

    def answer(self):
        if not self.waiting.select(LIMIT_SECONDS):
            raise RuntimeError(f"no answer in {LIMIT_SECONDS} s")
        line = self.process.stdout.readline()
        if not line:
            lines = pathlib.Path(self.log).read_text().strip().splitlines() or [""]
            raise RuntimeError(f"ended with code {self.process.wait()}: {lines[-1]}")
        value = json.loads(line)
        if "error" in value:
            raise RuntimeError(first_line(value["error"]))
        return value

    def ask(self, **question):
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self.answer()

    def close(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def open_qlua(args, binary, name, folder):
    options = dict(shape=args.shape, threads=args.threads)
    if name:
        options["format"] = OURS[name][0]
    if args.layers:
        options["layers"] = args.layers
    command = [binary, str(ROOT / "scripts" / "bench_serve.lua"), json.dumps(options)]
    worker = Worker(name, command, os.path.join(folder, "qlua.log"))
    if worker.hello["threads"] != args.threads:
        raise RuntimeError(f"qlua takes {worker.hello['threads']} threads, not {args.threads}")
    return worker


def open_peer(args, name, folder):
    options = dict(name=name, shape=args.shape, layers=args.layers, device="cpu", threads=args.threads,
                   batches=args.batches, prefill=args.prefill, context=args.context, decode=args.decode,
                   files=folder)
    env = dict(os.environ, OMP_NUM_THREADS=str(args.threads), MKL_NUM_THREADS=str(args.threads),
               CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, str(ROOT / "scripts" / "bench_models.py"), json.dumps(options)]
    return Worker(name, command, os.path.join(folder, "peer.log"), env)


# ---- what runs together ----


def weights_of(args):
    s = SHAPES[args.shape]
    kv = s["kv_heads"] * s["hidden"] // s["heads"]
    layer = s["hidden"] * (2 * s["hidden"] + 2 * kv + 3 * s["intermediate"])
    return (args.layers or s["layers"]) * layer, s["vocab"] * s["hidden"] * (1 if s.get("tied") else 2)


def bytes_of(args, name):
    linear, head = weights_of(args)
    in_layers, in_head = OURS[name][1:] if name in OURS else PEERS[name]
    torch = name.startswith(("transformers", "bitsandbytes"))
    return linear * in_layers + head * in_head + (TORCH_BYTES if torch else OTHER_BYTES)


def available_bytes():
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def plan(args, names, notes):
    """Families of the wanted models, merged while they fit; what does not fit alone is left out."""
    linear, _ = weights_of(args)
    room = 0.92 * available_bytes() - 0.6e9  # the buffer that is read to measure the bandwidth
    groups = []
    for family in FAMILIES:
        family = [name for name in family if name in names]
        while family and sum(bytes_of(args, name) for name in family) > room:
            gone = max(family, key=lambda name: bytes_of(args, name))
            notes.append(f"{gone} left out: with what it is compared with it takes more than "
                         f"{room / 2**30:.1f} GiB")
            family.remove(gone)
        union = [*groups[-1], *[name for name in family if name not in groups[-1]]] if groups else family
        # bitsandbytes' model is there in 16 bits too while it is quantized
        if groups and sum(bytes_of(args, name) for name in union) + linear * 2 <= room:
            groups[-1] = union
        elif family:
            groups.append(family)
    if len(groups) > 1:
        notes.append(f"{len(groups)} groups one after the other: the models do not fit into the memory together")
    return groups


def cases_of(args):
    """(batch, length, steps) of each turn; decode at batch 1 follows the prefill of the context's length, that
    of larger batches has as many tokens in all."""
    lengths = sorted({*args.prefill, *([args.context] if 1 in args.batches else [])})
    single = args.context if 1 in args.batches else None
    cases = [(1, length, args.decode if length == single else 0) for length in lengths]
    return cases + [(b, max(1, args.context // b), args.decode) for b in args.batches if b > 1]


# ---- the run ----


class Run:
    def __init__(self, args, binary):
        self.args, self.binary, self.notes = args, binary, []
        self.samples = {}  # (group, name, test, length or batch) -> seconds
        self.ceilings = {}  # group -> {"read": [...], "flops": [...]}
        self.hello, self.versions = {}, []

    def open_group(self, names, folder):
        workers = []
        for name in names:
            print(f"\r{f'loading {name}':<79}", end="", file=sys.stderr)
            try:
                worker = (open_qlua(self.args, self.binary, name, folder) if name in OURS
                          else open_peer(self.args, name, folder))
            except Exception as error:
                self.notes.append(f"{name} left out: {first_line(error)}")
                continue
            self.hello[name] = worker.hello
            version = worker.hello["version"]
            if name in OURS:
                version = f"qlua {version} ({worker.hello['isa']})"
            if version not in self.versions:
                self.versions.append(version)
            workers.append(worker)
        return workers

    def turn(self, group, worker, case, round_):
        batch, length, steps = case
        if case in worker.slow and round_ % 2 == 1:
            return
        time.sleep(SETTLE_SECONDS)
        if worker.name in OURS:
            found = self.probe.ask(test="ceilings", bytes=self.args.buffer << 20)
            for key in ["read", "flops"]:
                self.ceilings.setdefault(group, {}).setdefault(key, []).append(found[key])
        started = time.perf_counter()
        found = worker.ask(test="turn", batch=batch, length=length, steps=steps)
        if time.perf_counter() - started > SLOW_SECONDS and worker.name not in OURS:
            worker.slow.add(case)
        if batch == 1 and length in self.args.prefill:
            self.samples.setdefault((group, worker.name, "prefill", length), []).append(found["prefill"])
        if steps:
            self.samples.setdefault((group, worker.name, "decode", batch), []).extend(found["decode"])

    def round(self, group, workers, round_):
        for case in cases_of(self.args):
            for i in range(len(workers)):
                worker = workers[(round_ + i) % len(workers)]
                if worker.process.poll() is not None:
                    continue
                what = f"batch {case[0]}, {case[1]} tokens"
                print(f"\r{f'round {round_ + 1}, {what}, {worker.name}':<79}", end="", file=sys.stderr)
                try:
                    self.turn(group, worker, case, round_)
                except Exception as error:
                    self.notes.append(f"{worker.name}, {what}: {first_line(error)}")
                    worker.close()

    def warm(self, worker):
        """Pages, pools and kernels; not counted."""
        try:
            worker.ask(test="turn", batch=1, length=min(self.args.prefill), steps=1)
        except Exception as error:
            self.notes.append(f"{worker.name} left out: {first_line(error)}")
            worker.close()

    def group(self, group, names, folder, until):
        workers, rounds = self.open_group(names, folder), 0
        try:
            os.sync()  # the files just written do not reach the disk while clocks run
            for worker in workers:
                self.warm(worker)
            longest = 0
            while rounds < self.args.rounds and any(worker.process.poll() is None for worker in workers):
                started = time.monotonic()
                if rounds >= 2 and started + longest > until:
                    self.notes.append(f"group {group + 1}: {rounds} of {self.args.rounds} rounds in the time "
                                      "there was (--minutes)")
                    break
                self.round(group, workers, rounds)
                rounds, longest = rounds + 1, max(longest, time.monotonic() - started)
        finally:
            for worker in workers:
                if not worker.errors.closed:
                    worker.close()

    def everything(self, names):
        groups = plan(self.args, names, self.notes)
        started, total = time.monotonic(), sum(len(group) for group in groups)
        with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
            self.probe = open_qlua(self.args, self.binary, None, folder)
            try:
                done = 0
                for i, group in enumerate(groups):
                    done += len(group)
                    self.group(i, group, folder, started + 60 * self.args.minutes * done / total)
            finally:
                self.probe.close()
                print("\r" + " " * 79 + "\r", end="", file=sys.stderr)
        return groups


# ---- what comes out ----


def rates(samples, key):
    """Median and best tokens a second; the best as the 90th percentile of rates, where there are ten."""
    seconds, tokens = sorted(samples[key]), key[3]  # of a prefill its length, of a step of decode its batch
    return tokens / statistics.median(seconds), tokens / seconds[len(seconds) // 10]


def find(samples, groups, a, b):
    """Both keys in one group, or None."""
    for group in range(len(groups)):
        keys = (group, *a), (group, *b)
        if all(key in samples for key in keys):
            return keys
    return None


def gates_of(args):
    """(what, case of ours, case of the other, gate, goal): the table that the CPU kernels are judged by."""
    short, long = min(args.prefill), max(args.prefill)
    exact, nf4, bf16 = "qlua nf4 exact, nf4 head", "qlua nf4", "qlua bf16"
    single, single_head = "qlua nf4 single", "qlua nf4 single, nf4 head"
    iq4, iq4_head = "llama.cpp iq4_nl", "llama.cpp iq4_nl, bf16 head"
    decode, prefill_short, prefill_long = ("decode", 1), ("prefill", short), ("prefill", long)
    rows = [
        ((exact, *decode), (iq4, *decode), 1.4, 1.6),
        ((single_head, *decode), (iq4, *decode), 1.4, 1.6),
        ((exact, *decode), ("ik_llama.cpp q4_0 repacked", *decode), 1.25, 1.5),
        ((nf4, *decode), (iq4_head, *decode), 1.3, 1.5),
        ((single, *decode), (iq4_head, *decode), 1.3, 1.5),
        ((bf16, *decode), ("llama.cpp bf16", *decode), 1.3, 1.5),
        ((nf4, *decode), (bf16, *decode), 1.75, 2.0),
        ((single, *decode), (bf16, *decode), 1.75, 2.0),
        ((exact, *prefill_long), (iq4, *prefill_long), 1.1, 1.4),
        ((nf4, *prefill_long), (iq4_head, *prefill_long), 1.1, 1.4),
        ((exact, *prefill_short), (iq4, *prefill_short), 1.0, 1.2),
        ((nf4, *prefill_short), (iq4_head, *prefill_short), 1.0, 1.2),
        ((bf16, *prefill_long), ("llama.cpp bf16", *prefill_long), 1.4, 1.6),
        ((nf4, *prefill_long), (bf16, *prefill_long), 0.95, 1.0),
    ]
    if {1, 8} <= set(args.batches):
        rows += [((name, "decode", 8), (name, "decode", 1), 4, 6) for name in [bf16, nf4]]
    for mine, theirs in [("qlua f32", "transformers f32"), (bf16, "transformers bf16"),
                         (nf4, "bitsandbytes nf4"), (nf4, "bitsandbytes nf4, f32")]:
        rows += [((mine, *test), (theirs, *test), 2, 10 if mine == nf4 and test == decode else 5)
                 for test in tests_of(args)]
    return rows


def tests_of(args):
    return [("decode", batch) for batch in args.batches] + [("prefill", n) for n in sorted(args.prefill)]


def case_text(test, number):
    return f"prefill {number}" if test == "prefill" else f"decode, batch {number}"


def verdict(value, gate, goal):
    return "goal" if value >= goal else "gate" if value >= gate else "no"


def ratio_rows(run, groups):
    rows = []
    for mine, theirs, gate, goal in gates_of(run.args):
        other = "itself at batch 1" if mine[0] == theirs[0] else theirs[0]
        row = dict(what=f"{case_text(*mine[1:])}: {mine[0]} / {other}", gate=gate, goal=goal, median=None,
                   best=None, met="-")
        keys = find(run.samples, groups, mine, theirs)
        if keys:
            a, b = rates(run.samples, keys[0]), rates(run.samples, keys[1])
            row.update(median=a[0] / b[0], best=a[1] / b[1], met=verdict(a[0] / b[0], gate, goal))
        rows.append(row)
    return rows


def share_rows(run, groups):
    """Of the read bandwidth in decode, and of the multiply-add peak in the longest prefill: median by median,
    and 90th percentile by 90th percentile, which a busy machine spoils less."""
    args, rows, long = run.args, [], max(run.args.prefill)
    for name in ["qlua bf16", "qlua nf4", "qlua nf4 exact, nf4 head", "qlua f32"]:
        for test, number, ceiling, gate, goal in [("decode", 1, "read", 0.85, 0.92),
                                                  ("prefill", long, "flops", 0.65, 0.85)]:
            if test == "decode" and name != "qlua bf16":
                gate = goal = None
            group = next((g for g in range(len(groups)) if (g, name, test, number) in run.samples), None)
            if group is None:
                continue
            work = run.hello[name]
            if test == "decode":
                context = args.context + 3 + (args.decode - 1) / 2  # mean of the steps that count
                amount = work["bytes"] + work["slot"] * context
            else:
                amount = 2 * (long * work["linear"] + work["head"]) + work["attention"] * long * (long + 1) / 2
            limits = sorted(run.ceilings[group][ceiling])
            reached = rates(run.samples, (group, name, test, number))
            median, best = (amount * rate / number for rate in reached)
            median, best = median / statistics.median(limits), best / limits[-1 - len(limits) // 10]
            rows.append(dict(what=f"{case_text(test, number)}: {name}, share of "
                             + ("read bandwidth" if ceiling == "read" else "multiply-add peak"),
                             gate=gate, goal=goal, median=median, best=best,
                             met=verdict(median, gate, goal) if gate else "-"))
    return rows


def print_figures(run, groups):
    print(f"\n{'tokens a second':<18}{'':<29}{'median':>10}{'best':>11}{'n':>5}")
    names = [(group, name) for group in range(len(groups)) for name in [*OURS, *PEERS]]
    for key in [(*name, *test) for test in tests_of(run.args) for name in names]:
        if key in run.samples:
            (median, best), n = rates(run.samples, key), len(run.samples[key])
            print(f"{case_text(*key[2:]):<18}{key[1]:<29}{median:>10.2f}{best:>11.2f}{n:>5}")


def print_gates(rows):
    def cell(value, width):
        return f"{'-' if value is None else f'{value:.2f}':>{width}}"

    print(f"\n{'ratio':<76}{'median':>9}{'best':>9}{'gate':>6}{'goal':>7}  met")
    for row in rows:
        print(f"{row['what']:<76}{cell(row['median'], 9)}{cell(row['best'], 9)}{cell(row['gate'], 6)}"
              f"{cell(row['goal'], 7)}  {row['met']}")


def main(args, binary, names, notes):
    run = Run(args, binary)
    run.notes += notes
    run.notes.append("ik_llama.cpp is not on PyPI and is measured apart: its row is empty")
    started = time.monotonic()
    groups = run.everything(names)
    hardware = next((hello["hardware"] for hello in run.hello.values() if "hardware" in hello), "cpu")
    print(f"{args.shape}{f', {args.layers} of its layers' if args.layers else ''} on {hardware}, "
          f"{args.threads} threads each; random weights; {time.monotonic() - started:.0f} s")
    print("; ".join(run.versions))
    print(f"decode after {args.context} tokens in all rows together, {args.decode} steps a turn; prefill with "
          "the last token's logits")
    for group, limits in run.ceilings.items():
        print(f"ceilings{f', group {group + 1}' if len(groups) > 1 else ''}: read "
              f"{statistics.median(limits['read']) / 1e9:.1f} GB/s (best {max(limits['read']) / 1e9:.1f}), float32 "
              f"multiply-add {statistics.median(limits['flops']) / 1e9:.0f} GFLOP/s "
              f"(best {max(limits['flops']) / 1e9:.0f}), n = {len(limits['read'])}")
    for note in run.notes:
        print(note)
    print_figures(run, groups)
    gates = ratio_rows(run, groups) + share_rows(run, groups)
    print_gates(gates)
    if args.json:
        rows = []
        for key, seconds in sorted(run.samples.items()):
            median, best = rates(run.samples, key)
            number = {"batch" if key[2] == "decode" else "tokens": key[3]}
            rows.append(dict(group=key[0], model=key[1], test=key[2], **number, tokens_per_second=median,
                             best=best, n=len(seconds), seconds=seconds))
        with open(args.json, "w") as file:
            json.dump(dict(arguments=vars(args), hardware=hardware, versions=run.versions, notes=run.notes,
                           groups=groups, ceilings=run.ceilings, rows=rows, gates=gates), file, indent=2)
    return any(name in OURS for name in run.hello)
