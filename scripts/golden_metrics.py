#!/usr/bin/env python3
"""Writes tests/golden/metrics.safetensors and metrics.json: two models' logits and what they say of each other.

Everything in float64 NumPy from float32 logits, one row at a time, sets as Python sets.

    python scripts/golden_metrics.py [--out tests/golden]
"""

import argparse
import json
import os
import platform

import numpy as np
import safetensors.numpy
import scipy
from scipy.special import logsumexp
from scipy.stats import entropy

KS = [1, 3, 5, 10, 20]
NUCLEI = [(0.9, 1.0), (0.9, 0.7), (0.5, 1.0), (0.99, 1.5)]


def logits():
    """[n, V] pairs: near and far, flat and peaked, with runs of equal values, with a large common offset."""
    gen = np.random.default_rng(5)
    a, b = [], []

    def add(x, y):
        a.append(np.asarray(x, np.float32))
        b.append(np.asarray(y, np.float32))

    vocab = 257
    for scale in (0.5, 2, 6, 20):
        for noise in (0.01, 0.3, 2):
            x = scale * gen.normal(size=vocab)
            add(x, x + noise * gen.normal(size=vocab))
    x = 3 * gen.normal(size=vocab)
    add(x, x)
    add(x, -x)
    add(x + 80, x - 80)  # the same distribution; exp of the first overflows float32
    add(np.zeros(vocab), np.zeros(vocab))
    coarse = np.round(gen.normal(size=vocab) * 2)  # many ties
    add(coarse, np.roll(coarse, 1))
    add(coarse, np.round(coarse + 0.4 * gen.normal(size=vocab)))
    peak = np.full(vocab, -60.0)
    peak[[100, 7]] = 30.0  # two equal first places, the rest of no weight
    add(peak, np.roll(peak, 3))
    add(1000 * gen.normal(size=vocab), 1000 * gen.normal(size=vocab))
    return np.stack(a), np.stack(b)


def order(x):
    """Ids from the most likely down, equal values by id."""
    return np.lexsort((np.arange(len(x)), -x))


def jaccard(u, v):
    return len(u & v) / len(u | v)


def nucleus(x, top_p, temperature):
    """The smallest set that reaches top_p, and how far its mass was from being another set."""
    y = x / temperature
    p = np.exp(y - logsumexp(y))
    ids = order(x)
    mass = np.cumsum(p[ids])
    size = int(np.searchsorted(mass, top_p)) + 1
    return set(ids[: min(size, len(ids))].tolist()), float(np.abs(mass - top_p).min())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--out", default=os.path.join(root, "tests", "golden"))
    args = parser.parse_args()

    a32, b32 = logits()
    a, b = a32.astype(np.float64), b32.astype(np.float64)
    n, vocab = a.shape
    targets = np.random.default_rng(6).integers(0, vocab, n)
    rows = []
    for i in range(n):
        lp, lq = a[i] - logsumexp(a[i]), b[i] - logsumexp(b[i])
        p, q = np.exp(lp), np.exp(lq)
        ra, rb = order(a[i]), order(b[i])
        t = int(targets[i])
        with np.errstate(invalid="ignore", divide="ignore"):
            kl = float(np.where(p > 0, p * (lp - lq), 0).sum())
        row = {
            "target": t,
            "top20_a": ra[:20].tolist(),
            "top20_b": rb[:20].tolist(),
            "jaccard": [jaccard(set(ra[:k].tolist()), set(rb[:k].tolist())) for k in KS],
            "agreement": int(ra[0] == rb[0]),
            "kl": kl,
            "entropy": float(entropy(p)),
            "delta_p": float(q[t] - p[t]),
            "loglik": float(lp[t]),
            "greedy": int(ra[0] == t),
            "logsumexp": float(logsumexp(a[i])),
            "logsumexp_0.7": float(logsumexp(a[i] / 0.7)),
        }
        row["nucleus"], row["nucleus_sizes"], row["nucleus_margin"] = [], [], []
        for top_p, temperature in NUCLEI:
            u, gap_u = nucleus(a[i], top_p, temperature)
            v, gap_v = nucleus(b[i], top_p, temperature)
            row["nucleus"].append(jaccard(u, v))
            row["nucleus_sizes"].append([len(u), len(v)])
            row["nucleus_margin"].append(min(gap_u, gap_v))
        rows.append(row)
    safetensors.numpy.save_file(
        {"a": a32, "b": b32, "targets": targets.astype(np.int64)}, os.path.join(args.out, "metrics.safetensors")
    )
    head = {
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "ks": KS,
        "nuclei": [{"top_p": p, "temperature": t} for p, t in NUCLEI],
    }
    with open(os.path.join(args.out, "metrics.json"), "w", encoding="utf-8") as f:
        f.write(json.dumps(head)[:-1] + ',\n "rows": [\n  ')
        f.write(",\n  ".join(json.dumps(row) for row in rows) + "\n]}\n")


if __name__ == "__main__":
    main()
