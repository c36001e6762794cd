"""Tables of results, the paper's numbers beside them."""


# What the paper's tables say (Tab. 11's 16 steps as measured there), to stand beside a row of the same teacher: after
# its name the number of the teacher's steps, or which student. fid_coco and fid_mjhq are of 30,000 prompts each, hps is
# v2.1's average, and all ImageNet rows have 50,000 images and their best temperature.
PUBLISHED = """
maskbit    256          Tab.16    fid 1.58  is 306.12 precision 0.81 recall 0.60
maskbit    64           Tab.1     fid 1.66  is 320.0  precision 0.81 recall 0.60
maskbit    Di[M]O       Tab.1     fid 2.89  is 310.1  precision 0.87 recall 0.49
maskbit    Soft-Di[M]O  Tab.1     fid 1.96  is 281.4  precision 0.84 recall 0.55
maskbit    longer       Tab.1     fid 1.56  is 273.2  precision 0.81 recall 0.60
maskgit    16           Tab.2     fid 6.60  is 224.1  precision 0.83 recall 0.40 density 1.25 coverage 0.98
maskgit    8            Tab.2     fid 6.66  is 221.6  precision 0.83 recall 0.40 density 1.23 coverage 0.97
maskgit    4            Tab.2     fid 10.73 is 192.3  precision 0.75 recall 0.31 density 1.01 coverage 0.92
maskgit    2            Tab.2     fid 91.35 is 13.4   precision 0.18 recall 0.16 density 0.09 coverage 0.12
maskgit    32-halton    Tab.2     fid 9.62  is 296.2  precision 0.90 recall 0.28 density 1.47 coverage 0.98
maskgit    16-halton    Tab.2     fid 8.73  is 283.2  precision 0.89 recall 0.28 density 1.46 coverage 0.98
maskgit    8-halton     Tab.2     fid 7.73  is 248.8  precision 0.86 recall 0.31 density 1.37 coverage 0.97
maskgit    Di[M]O       Tab.2     fid 6.91  is 214.0  precision 0.83 recall 0.38 density 1.26 coverage 0.97
maskgit    Soft-Di[M]O  Tab.2     fid 6.40  is 214.8  precision 0.83 recall 0.39 density 1.27 coverage 0.97
meissonic  32           Tab.3     fid_coco 50.13 clip_score 0.318 geneval 0.46 hps 29.63
meissonic  Di[M]O       Tab.3     fid_coco 38.45 clip_score 0.322 geneval 0.43 hps 28.59
meissonic  Soft-Di[M]O  Tab.3     fid_coco 28.33 clip_score 0.319 geneval 0.53 hps 32.35
maskgen    64           Tab.11-13 fid_coco 22.60 fid_mjhq 7.35  clip_score 0.312 geneval 0.485 hps 27.70
maskgen    32           Tab.11-13 fid_coco 22.70 fid_mjhq 7.43  clip_score 0.312 geneval 0.479 hps 27.60
maskgen    16           Tab.11-13 fid_coco 22.64 fid_mjhq 7.59  clip_score 0.312 geneval 0.484 hps 27.43
maskgen    8            Tab.11-13 fid_coco 22.89 fid_mjhq 8.32  clip_score 0.311 geneval 0.462 hps 27.14
maskgen    4            Tab.11-13 fid_coco 24.84 fid_mjhq 11.58 clip_score 0.308 geneval 0.448 hps 26.11
maskgen    2            Tab.11-13 fid_coco 44.21 fid_mjhq 29.92 clip_score 0.287 geneval 0.324 hps 22.38
maskgen    1            Tab.11-13 fid_coco 88.70 fid_mjhq 77.57 clip_score 0.245 geneval 0.178 hps 16.65
maskgen    Di[M]O       Tab.3     fid_coco 24.15 clip_score 0.299 geneval 0.42 hps 27.14
maskgen    Soft-Di[M]O  Tab.3     fid_coco 23.43 clip_score 0.321 geneval 0.51 hps 29.38
maskgen-xl 32           Tab.12    geneval 0.487
maskgen-xl 16           Tab.12    geneval 0.482
maskgen-xl 1            Tab.12    geneval 0.165
"""


def published(row, config):
    """The paper's numbers for a row's metrics: [{"of", "table", metric: number, ...}].

    config: how train.py made the student; bare weights, without one, stand beside any student of their teacher.
    """
    kinds = [str(row["steps"]) + "-halton" * (row.get("order") == "halton")]
    if row["kind"] == "student":
        refined = config.get("gan") or config.get("reward")
        soft = "longer" if str(config.get("recipe")).endswith("long") else "Soft-Di[M]O"
        kinds = [soft if refined else "Di[M]O"] if config else ["Di[M]O", "Soft-Di[M]O", "longer"]
    found, has = [], lambda key: row.get(key) is not None or key.startswith("fid_") and "fid" in row
    for name, kind, place, *pairs in map(str.split, PUBLISHED.strip().splitlines()):
        numbers = {key: float(value) for key, value in zip(pairs[::2], pairs[1::2]) if has(key)}
        if name == row["teacher"] and kind in kinds and numbers:
            found.append({"of": kind, "table": place, **numbers})
    return found


def in_words(entry):
    """An entry of `published`: its numbers, and where they stand."""
    numbers = ", ".join(f"{key} {value:g}" for key, value in entry.items() if key not in ("of", "table"))
    return f"{entry['of']}: {numbers} ({entry['table']})"


COLUMNS = {"steps": "d", "temperature": "g", "guidance": "g", "n": "d", "fid": ".2f", "is": ".2f",
           "geneval": ".3f", "single_object": ".2f", "two_object": ".2f", "counting": ".2f", "colors": ".2f",
           "position": ".2f", "color_attr": ".2f", "clip": ".2f", "imagereward": ".2f", "chroma": ".3f",
           "clip_score": ".4f", "hps": ".2f", "anime": ".2f", "concept-art": ".2f", "paintings": ".2f", "photo": ".2f",
           "precision": ".3f", "recall": ".3f", "density": ".3f", "coverage": ".3f", "images/s": ".1f",
           "tokens_only/s": ".1f"}                    # key of a row: its format


def table(rows):
    """Markdown: a line for each row of `image_metrics` (plus model, steps, temperature, guidance), and notes below."""
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    cell = lambda row, key: format(row[key], COLUMNS[key]) if row.get(key) is not None else "-"
    lines = [["model", *(key.replace("_", " ") for key in columns)]]
    lines += [[row.get("model", "-"), *(cell(row, key) for key in columns)] for row in rows]
    if any(row.get("published") for row in rows):
        cells = ["published (the paper's, not measured here)"]
        cells += ["; ".join(map(in_words, row.get("published") or ())) or "-" for row in rows]
        lines = [[*line, cell] for line, cell in zip(lines, cells)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    if small := sorted({row["n"] for row in rows if row["n"] < 10_000 and row.get("fid") is not None}):
        lines += ["", f"N = {', '.join(map(str, small))}: below 10,000, FID is biased upward; compare at equal N."]
    lines += [line for note in dict.fromkeys(row["note"] for row in rows if row.get("note")) for line in ("", note)]

    timed = lambda kind: [row for row in rows if row.get("kind") == kind and row.get("images/s")]
    if timed("teacher") and timed("student"):
        slow = max(timed("teacher"), key=lambda row: row["steps"])
        fast = max(timed("student"), key=lambda row: row["images/s"])
        image, tokens = (fast[key] / slow[key] for key in ("images/s", "tokens_only/s"))
        lines += ["", f"One step is {image:.1f} times faster an image than the teacher's {slow['steps']} steps; "
                      f"{tokens:.1f} times without the decoder, which both share."]
    return "\n".join(lines)


def report(rows, criterion="fid"):
    """`table` of all rows; of a sweep of temperatures first a table a checkpoint, and its best enters the joint one."""
    best, text = [], []
    for model in dict.fromkeys(row.get("model") for row in rows):
        own = [row for row in rows if row.get("model") == model]
        scored = [row for row in own if row.get("kind") == "student" and row.get(criterion) is not None]
        if len({row["temperature"] for row in scored}) > 1:
            top = min(scored, key=lambda row: row[criterion])
            text += [table(own), f"{model}: the best of {len(scored)} temperatures is {top['temperature']:g}"
                                 f"{' (argmax)' * (top['temperature'] == 0)}, {criterion.upper()} {top[criterion]:.2f}"]
            own = [row for row in own if row is top or row not in scored]
        best += own
    return "\n\n".join(text + ([table(best)] if len({row.get("model") for row in rows}) > 1 or not text else []))


def headline(row):
    """A row in a few words."""
    if "fid" in row:
        return f"FID {row['fid']:.2f}, precision {row['precision']:.3f}, recall {row['recall']:.3f}"
    return f"GenEval {row['geneval']:.3f}, CLIP {row['clip']:.2f}"


def small_print(row):
    """What the FID of a row depends on besides its model, in a sentence."""
    each = f", {row['per_class']:g} images a class" if row.get("per_class") else ""
    return (f"FID: {row['extractor']} ({row['inception']}), resize {row['resize']}, {row['crop'] or 'no crop'}, in "
            f"float32, against {row['reference']}; N = {row['n']}{each}, seed {row['seed']}, {row['pixels']}. IS: "
            f"torch-fidelity's splits (is_stylegan, is_adm: table.json). {row.get('note', '')}").strip()
