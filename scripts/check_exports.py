#!/usr/bin/env python3
"""Reads exported accuracies with EleutherAI's lm-evaluation-harness and checks them against each other.

Every results_*.json and samples_*.jsonl below FOLDER is found, read, hashed and tabulated by the harness's own
functions; each task's accuracy and standard error are computed again from its samples, scored by the harness's own
multiple-choice rule. Needs lm_eval (PyPI; see golden_requirements.txt for a version); nothing is downloaded.

    build/qlua examples/mmlu.lua --output_path FOLDER --log_samples
    python scripts/check_exports.py FOLDER
"""

import glob
import json
import math
import os
import sys
from datetime import datetime

import numpy as np
from lm_eval.api.metrics import mean_stderr
from lm_eval.utils import (
    get_file_datetime,
    get_file_task_name,
    get_latest_filename,
    get_results_filenames,
    get_sample_results_filenames,
    handle_non_serializable,
    hash_string,
    make_table,
)


def fail(message):
    raise SystemExit(f"check_exports: {message}")


def check(condition, message):
    if not condition:
        fail(message)


def check_sample(sample, where):
    """Hashes as the harness makes them, and the answer by its rule: argmax of the log-likelihoods."""
    doc = json.dumps(sample["doc"], indent=2, default=handle_non_serializable, ensure_ascii=False)
    prompt = sample["arguments"]["gen_args_0"]["arg_0"]
    for key, text in (("doc_hash", doc), ("prompt_hash", prompt), ("target_hash", sample["target"])):
        check(sample[key] == hash_string(text), f"{where}: {key} is not the harness's")
    check(len(sample["resps"]) == len(sample["arguments"]), f"{where}: as many responses as requests")
    if "gen_args_1" in sample["arguments"]:
        scores = [float(pair[0]) for pair in sample["filtered_resps"]]
        acc = 1.0 if int(np.argmax(scores)) == int(sample["target"]) else 0.0
        check(acc == sample["acc"], f"{where}: acc is {sample['acc']}, the scores say {acc}")
    else:
        letter = sample["filtered_resps"][0]
        right = letter == "ABCD"[int(sample["target"])]
        check(right == (sample["acc"] == 1.0), f"{where}: acc is {sample['acc']} for the letter {letter}")


def check_samples(path):
    with open(path, encoding="utf-8") as f:
        samples = [json.loads(line) for line in f]
    for i, sample in enumerate(samples):
        check_sample(sample, f"{path}:{i + 1}")
    ids = [sample["doc_id"] for sample in samples]
    check(ids == sorted(set(ids)), f"{path}: doc_id is not rising")
    return [sample["acc"] for sample in samples]


def check_task(name, results, accuracies, where):
    found = results["results"][name]
    check(found["sample_len"] == len(accuracies), f"{where}: {name} has {len(accuracies)} samples")
    check(results["n-samples"][name]["effective"] == len(accuracies), f"{where}: n-samples of {name}")
    check(math.isclose(found["acc,none"], np.mean(accuracies), rel_tol=1e-12), f"{where}: acc of {name}")
    if len(accuracies) > 1:
        stderr = mean_stderr(accuracies)
        check(math.isclose(found["acc_stderr,none"], stderr, rel_tol=1e-9, abs_tol=1e-15),
              f"{where}: stderr of {name} is {found['acc_stderr,none']}, the harness's {stderr}")


def check_folder(folder):
    """One model's folder: its newest results, and the samples of the same moment."""
    names = glob.glob(os.path.join(folder, "*.json*"))
    latest = get_latest_filename(get_results_filenames(names))
    moment = get_file_datetime(latest).removesuffix(".json")
    datetime.strptime(moment, "%Y-%m-%dT%H-%M-%S.%f")
    with open(latest, encoding="utf-8") as f:
        results = json.load(f)
    print(latest)
    print(make_table(results))
    checked = 0
    for path in get_sample_results_filenames(names):
        if get_file_datetime(path) == moment:
            task = get_file_task_name(os.path.basename(path))
            check(task in results["results"], f"{path}: {task} is no task of {latest}")
            check_task(task, results, check_samples(path), latest)
            checked += 1
    print(f"{checked} of {len(results['results'])} tasks have samples, all agree\n")
    return checked


def main():
    if len(sys.argv) != 2:
        fail("usage: check_exports.py FOLDER")
    folders = sorted({os.path.dirname(p) for p in glob.glob(os.path.join(sys.argv[1], "*", "results_*.json"))})
    check(folders, f"{sys.argv[1]}: no results_*.json in the folders below it")
    checked = sum([check_folder(folder) for folder in folders])
    check(checked > 0, "no samples: run the experiment with --log_samples")
    print(f"{len(folders)} models, {checked} files of samples")


if __name__ == "__main__":
    main()
