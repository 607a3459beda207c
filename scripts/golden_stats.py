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
from scipy.optimize import brentq
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

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


def newcombe():
    rows = []
    a = [(56, 70), (0, 10), (10, 10), (45, 79), (5, 56), (1, 1)]
    b = [(48, 80), (0, 20), (0, 20), (83, 166), (0, 29), (0, 1)]
    for u, v in zip(a, b):
        for confidence in (0.9, 0.95):
            low, high = confint_proportions_2indep(*v, *u, method="newcomb", compare="diff", alpha=1 - confidence)
            rows.append({"a": u, "b": v, "confidence": confidence, "low": float(low), "high": float(high)})
    return rows


def tango_limit(b, c, n, target):
    """Difference b/n - c/n at which Tango's score is `target`; the nuisance share is the likelihood's own maximum."""

    def score(d):
        up, down, widest = max(d, 0.0), max(-d, 0.0), (1 - abs(d)) / 2

        def slope(r):  # of the multinomial log likelihood with cells r + up, r + down, 1 - |d| - 2 r
            return b / (r + up) + c / (r + down) - (n - b - c) / (widest - r)

        inside = [1e-12 * widest, (1 - 1e-12) * widest]
        if slope(inside[0]) <= 0 or slope(inside[1]) >= 0:
            r = 0.0 if slope(inside[0]) <= 0 else widest
        else:
            r = brentq(slope, *inside, xtol=1e-16, rtol=1e-15)
        return (b - c - n * d) / math.sqrt(n * (2 * (r + down) + d * (1 - d)))

    estimate, nudge = (b - c) / n, 1e-9
    if estimate == (1 if target < 0 else -1):  # nothing lies beyond
        return estimate
    low, high = (estimate + nudge, 1 - nudge) if target < 0 else (-1 + nudge, estimate - nudge)
    return brentq(lambda d: score(d) - target, low, high, xtol=1e-15, rtol=1e-14)


def tango():
    """Score intervals of paired differences (Tango, Statist. Med. 17, 1998), solved by SciPy.

    The first is a published one: Cavo et al. 2012 in Fagerland, Lydersen & Laake, Statistical Analysis of Contingency
    Tables (2017), ch. 8: -0.0621 (-0.1240 to -0.0054), as their R package contingencytables 3.0.0 prints it too.
    """
    rows = []
    counts = [(16, 6, 161), (0, 0, 240), (4, 5, 240), (10, 3, 79), (0, 6, 12), (20, 0, 20), (1, 0, 2), (900, 700, 14042)]
    for right_wrong, wrong_right, n in counts:
        for confidence in (0.9, 0.95, 0.99):
            z = scipy.stats.norm.ppf(0.5 + confidence / 2)
            low, high = (tango_limit(wrong_right, right_wrong, n, target) for target in (z, -z))
            rows.append(
                {
                    "right_wrong": right_wrong,
                    "wrong_right": wrong_right,
                    "n": n,
                    "confidence": confidence,
                    "low": float(low),
                    "high": float(high),
                }
            )
    assert (round(rows[1]["low"], 4), round(rows[1]["high"], 4)) == (-0.1240, -0.0054)
    return rows


def ratios():
    """Percentile intervals of ratios of paired lists, by scipy.stats.bootstrap; `tolerance` as in bootstrap()."""
    gen = np.random.default_rng(12)
    full = (0.02 + gen.gamma(2, 0.001, 20)).round(6)
    quantized = (full * gen.normal(0.6, 0.03, 20)).round(6)
    words = gen.integers(5, 60, (2, 45)).astype(float)
    seconds = (0.1 + words / gen.normal(20, 2, (2, 45))).round(4)
    cases = [
        ("median", [full, quantized], lambda a, b, axis: np.median(a, axis) / np.median(b, axis)),
        ("mean", [words[0], seconds[0]], lambda a, b, axis: a.mean(axis) / b.mean(axis)),
        (
            "mean",
            [words[1], seconds[1], words[0], seconds[0]],
            lambda a, b, c, d, axis: a.mean(axis) / b.mean(axis) / (c.mean(axis) / d.mean(axis)),
        ),
    ]
    rows = []
    for of, lists, statistic in cases:
        drawn = [
            scipy.stats.bootstrap(
                lists, statistic, paired=True, n_resamples=10000, method="percentile", vectorized=True, rng=gen
            ).bootstrap_distribution
            for _ in range(40)
        ]
        ends = np.asarray([np.quantile(d, [0.025, 0.975]) for d in drawn])
        low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
        rows.append(
            {
                "of": of,
                "lists": [v.tolist() for v in lists],
                "ratio": float(statistic(*lists, axis=-1)),
                "low": float(low),
                "high": float(high),
                "tolerance": float(4 * ends.std(0).max()),
            }
        )
    return rows


def sign_flip_exact(d):
    """p of the sum of whole numbers under random signs, from the distribution of that sum."""
    size = int(np.abs(d).sum())
    share = np.zeros(2 * size + 1)
    share[size] = 1.0
    for v in np.abs(d):
        v = int(v)
        share = (np.roll(share, v) + np.roll(share, -v)) / 2 if v else share
    return float(share[np.abs(np.arange(-size, size + 1)) >= abs(int(d.sum()))].sum())


def sign_flips():
    """Small lists by scipy.stats.permutation_test over all assignments; long ones by the sum's distribution."""
    gen = np.random.default_rng(13)
    rows = []
    for values in [
        [-0.5, -0.25, -0.75],
        [0.0, 0.0, 1.0, -1.0, 0.5],
        [0.1, 0.2, -0.3, 0.4, 0.1, 0.1],
        gen.normal(0.4, 1, 12).round(3).tolist(),
        gen.normal(0.9, 1, 14).round(3).tolist(),
    ]:
        p = scipy.stats.permutation_test(
            (np.asarray(values),), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=True
        ).pvalue
        rows.append({"values": values, "p": float(p), "exact": True, "tolerance": 1e-12})
    for shift in (0.0, 0.5, 0.9):
        d = np.rint(gen.normal(shift, 4, 163)).astype(int)
        p = sign_flip_exact(d)
        error = math.sqrt(p * (1 - p) / 10000)
        rows.append({"values": (d / 20).tolist(), "p": p, "exact": False, "tolerance": 4 * error + 1e-4})
    return rows


def against_controls():
    """Three metrics of 16 questions and their noise floor: exact tests, Holm over them."""
    gen = np.random.default_rng(14)
    metrics = []
    for name, mean in [("jaccard@5", 0.75), ("agreement", 0.9), ("nucleus", 0.99)]:
        values = (gen.binomial(5, mean, 16) / 5).tolist()
        control = (gen.binomial(5, 0.995, 16) / 5).tolist()
        metrics.append({"name": name, "values": values, "control": control})
    p = []
    for m in metrics:
        d = np.asarray(m["values"]) - np.asarray(m["control"])
        m["difference"] = float(d.mean())
        p.append(sign_flip_exact(np.rint(d * 5)))
        m["p"] = p[-1]
        needed = TTestPower().solve_power(effect_size=d.mean() / d.std(ddof=1), alpha=0.05, power=0.8)
        m["needed"] = float(needed)
    for m, adjusted in zip(metrics, multipletests(p, method="holm")[1]):
        m["adjusted"] = float(adjusted)
    return metrics


def mcnemar_power(n, b, c, level):
    """Power of the exact McNemar test with n questions, of which shares b and c are discordant either way."""
    share = b + c
    low, high = (int(scipy.stats.binom.ppf(f, n, share)) for f in (1e-9, 1 - 1e-9))
    power = 0.0
    for m in range(low, high + 1):
        k = int(scipy.stats.binom.ppf(level / 2, m, 0.5))
        while k >= 0 and 2 * scipy.stats.binom.cdf(k, m, 0.5) > level:
            k -= 1
        if k >= 0:
            either = scipy.stats.binom.cdf(k, m, b / share) + scipy.stats.binom.sf(m - k - 1, m, b / share)
            power += scipy.stats.binom.pmf(m, n, share) * either
    return float(power)


def questions_needed():
    """Connor (Biometrics 43, 1987) + 1 / difference, and the power that the exact test really has there."""
    gen = np.random.default_rng(15)
    rows = []
    shares = [(0.10, 0.05), (0.152, 0.063), (0.05, 0.02), (0.3, 0.1), (0.02, 0.0), (0.03, 0.07), (10 / 79, 3 / 79)]
    for b, c in shares:
        for power, level in [(0.8, 0.05), (0.9, 0.01)]:
            z1, z2 = scipy.stats.norm.ppf(1 - level / 2), scipy.stats.norm.ppf(power)
            d, s = abs(b - c), b + c
            n = math.ceil((z1 * math.sqrt(s) + z2 * math.sqrt(s - d * d)) ** 2 / d**2 + 1 / d)
            reached = mcnemar_power(n, b, c, level)
            rows.append(
                {"right_wrong": b, "wrong_right": c, "power": power, "level": level, "n": n, "reached": reached}
            )
            assert power - 0.02 < reached < power + 0.09, rows[-1]
        # the same by playing 4,000 evaluations of the last size
        played = gen.multinomial(n, [b, c, 1 - b - c], 4000)
        p = [scipy.stats.binomtest(int(x), int(x + y)).pvalue if x + y else 1 for x, y, _ in played]
        shown = np.mean(np.asarray(p) < level)
        assert abs(shown - reached) < 4 * math.sqrt(reached * (1 - reached) / 4000), (b, c, shown, reached)
    return rows


def questions_needed_mean():
    """statsmodels' paired t test; the sign-flip test has that power too, as 1,000 lists of normal values show."""
    gen = np.random.default_rng(16)
    rows = []
    for difference, sd in [(0.5, 1.0), (-0.2, 0.35), (0.02, 0.2), (1.0, 1.0)]:
        for power, level in [(0.8, 0.05), (0.9, 0.01)]:
            n = TTestPower().solve_power(effect_size=abs(difference) / sd, alpha=level, power=power)
            rows.append({"difference": difference, "sd": sd, "power": power, "level": level, "n": float(n)})
            if n > 100:
                continue
            shown = 0
            for _ in range(1000):
                d = gen.normal(difference, sd, math.ceil(n))
                sums = np.abs(gen.choice([-1.0, 1.0], (2000, len(d))) @ d)
                shown += (1 + np.sum(sums >= abs(d.sum()))) / 2001 < level
            assert abs(shown / 1000 - power) < 0.05, (rows[-1], shown)
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
        "newcombe": newcombe(),
        "tango": tango(),
        "ratio": ratios(),
        "sign_flip": sign_flips(),
        "against_controls": against_controls(),
        "questions_needed": questions_needed(),
        "questions_needed_mean": questions_needed_mean(),
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
