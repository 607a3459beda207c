#!/usr/bin/env python3
"""Scores a quiz with EleutherAI's lm-evaluation-harness and writes what it found to tests/golden/lm_eval/NAME.json.

The task is the harness's own mmlu_<subject> (its template is loaded, only the data comes from a local CSV), the
model a local folder read in float32: bf16 weights are widened, as qlua does. Nothing is downloaded.

    python scripts/golden_lm_eval.py --name quiz --model examples/models/FOLDER --csv examples/data/SUBJECT_test.csv

`--schema` also keeps the results_*.json that the harness writes and the first lines of its samples_*.jsonl.
Run it in the project's root with relative paths: they go into the files. `--schema` copies questions into the
tree, so it is for quizzes of the project's own.
"""

import argparse
import csv
import glob
import json
import os
import platform
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import lm_eval
import tokenizers
import torch
import transformers
import yaml
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

LETTERS = "ABCD"
SCHEMA_SAMPLES = 2


def read_quiz(path, limit):
    with open(path, encoding="utf-8", newline="") as f:
        rows = [row for row in csv.reader(f) if row]
    docs = []
    for row in rows[:limit]:
        docs.append({"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])})
    return docs


def subject_of(path):
    name = os.path.basename(path)
    for ending in ("_test.csv", "_dev.csv", "_val.csv", ".csv"):
        if name.endswith(ending):
            return name[: -len(ending)]
    raise SystemExit(f"{path}: the file must be called SUBJECT_test.csv")


def write_task(folder, subject, docs, data):
    """The harness's own MMLU template with the dataset replaced by a local JSON file."""
    template = os.path.join(os.path.dirname(lm_eval.__file__), "tasks", "mmlu", "default", "_default_template_yaml")
    with open(template, encoding="utf-8") as f:
        task = yaml.safe_load(f)
    with open(data, "w", encoding="utf-8") as f:
        for doc in docs:
            f.write(json.dumps(doc) + "\n")
    spoken = subject.replace("_", " ")
    task.pop("fewshot_split", None)
    task.pop("fewshot_config", None)
    task.update(
        {
            "task": "mmlu_" + subject,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": data}},
            "description": f"The following are multiple choice questions (with answers) about {spoken}.\n\n",
            "num_fewshot": 0,
        }
    )
    with open(os.path.join(folder, "mmlu_" + subject + ".yaml"), "w", encoding="utf-8") as f:
        yaml.safe_dump(task, f, sort_keys=False)


def check_ids(model, folder, text):
    """transformers may rebuild a tokenizer from its parts; the ids must be those of tokenizer.json all the same."""
    want = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json")).encode(text).ids
    got = model.tok_encode(text)
    if got != want:
        raise SystemExit(f"the harness encodes differently from tokenizer.json:\n{got[:40]}\n{want[:40]}")


def rows_of(samples, model):
    rows = []
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        context, pairs = sample["arguments"][0][0], [arg[1] for arg in sample["arguments"]]
        assert pairs == [" " + letter for letter in LETTERS], pairs
        lengths = [sum(map(len, model._encode_pair(context, c))) for c in pairs]
        scores = [resp[0] for resp in sample["resps"]]
        rows.append(
            {
                "doc_id": sample["doc_id"],
                "answer": int(sample["target"]),
                "loglik": [float(s[0]) for s in scores],
                "greedy": [bool(s[1]) for s in scores],
                "context_bytes": len(context.encode()),
                "acc": sample["acc"],
                # context and continuation, BOS included, and whether the harness cut the context from the left
                "tokens": max(lengths),
                "truncated": max(lengths) > model.max_length + 1,
            }
        )
    return rows


def clean(text, folder):
    return text.replace(folder + os.sep, "").replace(folder, "")


def keep_schema(out, written, folder):
    """One results file and a few samples, without what belongs to the machine they were made on."""
    # the harness names a folder after the model, which may begin with a dot
    (results,) = glob.glob(os.path.join(written, "**", "results_*.json"), recursive=True, include_hidden=True)
    with open(results, encoding="utf-8") as f:
        document = json.loads(clean(f.read(), folder))
    if "pretty_env_info" in document:
        document["pretty_env_info"] = ""
    document["git_hash"] = None
    for key in ("start_time", "end_time", "total_evaluation_time_seconds", "date"):
        if key in document:
            document[key] = "0" if isinstance(document[key], str) else 0.0
    with open(os.path.join(out, "results_example.json"), "w", encoding="utf-8") as f:
        json.dump(document, f, indent=1, ensure_ascii=False)
        f.write("\n")
    (samples,) = glob.glob(os.path.join(written, "**", "samples_*.jsonl"), recursive=True, include_hidden=True)
    with open(samples, encoding="utf-8") as f:
        lines = f.read().splitlines()[:SCHEMA_SAMPLES]
    with open(os.path.join(out, "samples_example.jsonl"), "w", encoding="utf-8") as f:
        for line in lines:
            f.write(clean(line, folder) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--name", required=True, help="the file's name in the output folder")
    parser.add_argument("--model", required=True, help="a local model folder")
    parser.add_argument("--csv", required=True, help="SUBJECT_test.csv in MMLU's layout")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--dtype", default="float32", help="of the arithmetic; float32 widens bf16 weights")
    parser.add_argument("--schema", action="store_true")
    parser.add_argument("--out", default=os.path.join(root, "tests", "golden", "lm_eval"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    subject = subject_of(args.csv)
    docs = read_quiz(args.csv, args.limit)
    folder = tempfile.mkdtemp()
    try:
        tasks = os.path.join(folder, "tasks")
        written = os.path.join(folder, "written")
        os.makedirs(tasks)
        write_task(tasks, subject, docs, os.path.join(folder, f"{subject}_test.jsonl"))
        model = HFLM(pretrained=args.model, dtype=args.dtype, device="cpu", batch_size=1)
        check_ids(model, args.model, docs[0]["question"] + "\nAnswer: A")
        tracker = EvaluationTracker(output_path=written)
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": args.model, "dtype": args.dtype},
            device="cpu",
            batch_size=1,
            tasks=["mmlu_" + subject],
            task_manager=TaskManager(include_path=tasks, include_defaults=False),
            evaluation_tracker=tracker,
            log_samples=True,
        )
        samples = found["samples"].pop("mmlu_" + subject)
        rows = rows_of(samples, model)
        result = found["results"]["mmlu_" + subject]
        if args.schema:
            found.pop("samples")
            tracker.save_results_aggregated(results=found, samples={"mmlu_" + subject: samples})
            tracker.save_results_samples(task_name="mmlu_" + subject, samples=samples)
            os.makedirs(args.out, exist_ok=True)
            keep_schema(args.out, written, folder)
    finally:
        shutil.rmtree(folder)

    head = {
        "versions": {
            "python": platform.python_version(),
            "lm_eval": lm_eval.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "model": args.model,
        "csv": args.csv,
        "task": "mmlu_" + subject,
        "dtype": args.dtype,
        "max_length": model.max_length,
        "n": len(rows),
        "acc": result["acc,none"],
        "acc_stderr": result["acc_stderr,none"],
    }
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, args.name + ".json")
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  ')
        f.write(",\n  ".join(json.dumps(row) for row in rows) + "\n ]}\n")
    cut = sum(row["truncated"] for row in rows)
    print(f"{path}: n {len(rows)}, acc {head['acc']:.4f} +- {head['acc_stderr']}, {cut} cut to the context")


if __name__ == "__main__":
    main()
