"""Records of results: rows are dictionaries, one per model or run, kept as JSON lines."""

import json
import time

import torch


def append_rows(path, rows):
    """Append rows to a .jsonl file, one per line: no run overwrites what another found."""
    with open(path, "a") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


def environment(device):
    """What a row says of where and when it was made; device is "cuda" or "cpu"."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"torch": torch.__version__, "gpu": gpu, "time": time.strftime("%Y-%m-%d %H:%M:%S")}


def print_rows(rows):
    """Print rows of numbers, {caption: {column: number}}, under one line of column names."""
    columns = next(iter(rows.values()))
    print(f"{'':24s}" + "".join(f"{column:>13s}" for column in columns))
    for caption, row in rows.items():
        print(f"{caption:24s}" + "".join(f"{number:13.4f}" for number in row.values()))
