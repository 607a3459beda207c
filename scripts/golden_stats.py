#!/usr/bin/env python3
"""Writes tests/golden/stats.json: statistics of paired answers and of lists, from SciPy, statsmodels and NumPy.

    python scripts/golden_stats.py [--out tests/golden]
"""

import argparse
import json
import math
import os
import platform

import numpy as np
import scipy
import scipy.stats
import statsmodels
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

SHARES = [0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0]


def wilson():
    counts = [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (38, 79), (45, 79), (83, 166), (131, 163), (9000, 14042)]
    rows = []
    for k, n in counts:
        for confidence in (0.9, 0.95, 0.99):
            low, high = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
            again = scipy.stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
            assert math.isclose(low, again.low, abs_tol=1e-12) and math.isclose(high, again.high, abs_tol=1e-12)
            rows.append({"k": k, "n": n, "confidence": confidence, "low": float(low), "high": float(high)})
    return rows


def mcnemar_rows():
    pairs = [(0, 0), (0, 1), (1, 0), (5, 0), (0, 6), (10, 3), (3, 10), (12, 7), (20, 20), (60, 40), (500, 431), (9, 900)]
    rows = []
    for b, c in pairs:
        p = mcnemar([[0, b], [c, 0]], exact=True).pvalue if b + c else 1.0
        if b + c:
            again = scipy.stats.binomtest(b, b + c, 0.5).pvalue
            assert math.isclose(p, again, rel_tol=1e-9), (b, c, p, again)
            p = again
        rows.append({"b": b, "c": c, "p": float(p)})
    return rows


def holm():
    lists = [
        [0.01],
        [0.04, 0.01, 0.03, 0.005],
        [0.2, 0.2, 0.2],
        [0.9, 0.5, 1.0, 0.001, 0.001],
        [0.05, 0.025, 0.0166, 0.0124],
        np.random.default_rng(3).uniform(size=12).round(6).tolist(),
    ]
    return [{"p": p, "adjusted": multipletests(p, method="holm")[1].tolist()} for p in lists]


def values():
    gen = np.random.default_rng(7)
    return {
        "one": [3.5],
        "two": [1.0, 4.0],
        "ties": [2.0, 2.0, 1.0, 1.0, 2.0],
        "shares": (gen.integers(0, 6, 163) / 5).tolist(),
        "kl": np.exp(gen.normal(-5, 2, 500)).tolist(),
        "large": (1e9 + gen.normal(size=101)).tolist(),
        "right": gen.integers(0, 2, 79).astype(float).tolist(),
    }


def summaries():
    rows = []
    for name, v in values().items():
        x = np.asarray(v)
        rows.append(
            {
                "name": name,
                "values": v,
                "n": len(v),
                "mean": math.fsum(v) / len(v),
                "sd": float(np.std(x, ddof=1)) if len(v) > 1 else None,
                "stderr": float(scipy.stats.sem(x)) if len(v) > 1 else None,
                "rms": math.sqrt(math.fsum(t * t for t in v) / len(v)),
                "percentiles": [[f, float(np.quantile(x, f, method="linear"))] for f in SHARES],
            }
        )
    return rows


def covariances():
    gen = np.random.default_rng(8)
    a = gen.normal(2, 1, 60)
    b = a + gen.normal(0.1, 0.3, 60)
    cov = np.cov(a, b)
    return [
        {
            "a": a.tolist(),
            "b": b.tolist(),
            "covariance": float(cov[0, 1]),
            # error of mean(b) - mean(a), as for ln(PPL_b / PPL_a)
            "paired_error": float(math.sqrt((cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]) / 60)),
        }
    ]


def bootstrap():
    """Percentile intervals of the mean difference of pairs; `tolerance` is four errors of a 10,000-draw end."""
    gen = np.random.default_rng(11)
    p = gen.uniform(size=120)
    a = (gen.uniform(size=120) < p).astype(float)
    flip = gen.uniform(size=120) < 0.15
    b = np.where(flip, 1 - a, a)
    cases = [("right_or_wrong", a, b)]
    x = gen.normal(0, 1, 50)
    cases.append(("normal", x, x + gen.normal(0.2, 0.5, 50)))
    y = np.exp(gen.normal(-4, 1.5, 200))
    cases.append(("skewed", np.zeros(200), y))
    rows = []
    for name, u, v in cases:
        d = v - u
        means = []
        for _ in range(40):
            means.append(d[gen.integers(0, len(d), (10000, len(d)))].mean(1))
        ends = np.asarray([np.quantile(m, [0.025, 0.975]) for m in means])
        low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
        # the mean of n answers is a multiple of 1/n, so an end may sit one step away
        step = 1 / len(d) if np.all(np.isin(d, [-1, 0, 1])) else 0
        rows.append(
            {
                "name": name,
                "a": u.tolist(),
                "b": v.tolist(),
                "confidence": 0.95,
                "resamples": 400000,
                "low": float(low),
                "high": float(high),
                "tolerance": float(4 * ends.std(0).max() + step),
            }
        )
    return rows


def binomial():
    rows = []
    for k, n, p in [(0, 5, 0.5), (3, 10, 0.5), (45, 79, 0.25), (60, 160, 0.25), (38, 79, 0.25), (7, 7, 0.5)]:
        rows.append(
            {
                "k": k,
                "n": n,
                "p": p,
                "two_sided": float(scipy.stats.binomtest(k, n, p).pvalue),
                "greater": float(scipy.stats.binomtest(k, n, p, alternative="greater").pvalue),
            }
        )
    return rows


def questions_needed():
    """Connor (Biometrics 43, 1987) for paired shares, before and after rounding up."""
    rows = []
    for b, c in [(0.10, 0.05), (0.152, 0.063), (0.05, 0.02), (0.2, 0.19), (0.02, 0.0), (0.03, 0.07)]:
        for power, level in [(0.8, 0.05), (0.9, 0.01)]:
            z1, z2 = scipy.stats.norm.ppf(1 - level / 2), scipy.stats.norm.ppf(power)
            d, s = b - c, b + c
            n = (z1 * math.sqrt(s) + z2 * math.sqrt(s - d * d)) ** 2 / d**2
            rows.append(
                {"right_wrong": b, "wrong_right": c, "power": power, "level": level, "n": n, "rounded": math.ceil(n)}
            )
    return rows


def normal():
    p = [1e-10, 1e-4, 0.005, 0.025, 0.2, 0.5, 0.8, 0.9, 0.95, 0.975, 0.995, 1 - 1e-6]
    x = [-8.0, -3.0, -1.959963984540054, -0.5, 0.0, 1.0, 2.5, 6.0]
    return {
        "quantile": [[v, float(scipy.stats.norm.ppf(v))] for v in p],
        "cdf": [[v, float(scipy.stats.norm.cdf(v))] for v in x],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--out", default=os.path.join(root, "tests", "golden"))
    args = parser.parse_args()
    sections = {
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "statsmodels": statsmodels.__version__,
        },
        "wilson": wilson(),
        "mcnemar": mcnemar_rows(),
        "holm": holm(),
        "summary": summaries(),
        "covariance": covariances(),
        "bootstrap_difference": bootstrap(),
        "binomial": binomial(),
        "questions_needed": questions_needed(),
        "normal": normal(),
    }
    parts = []
    for name, section in sections.items():
        if isinstance(section, list):
            body = "[\n  " + ",\n  ".join(json.dumps(row) for row in section) + "\n ]"
        else:
            body = json.dumps(section)
        parts.append(f' "{name}": {body}')
    with open(os.path.join(args.out, "stats.json"), "w", encoding="utf-8") as f:
        f.write("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
