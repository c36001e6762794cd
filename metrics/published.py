"""The paper's own numbers, to stand beside a row of the same teacher.

After the teacher's name comes the number of the teacher's steps, or which student it is; TTEO-4x4
is Soft-Di[M]O with four starts of four iterations. fid_coco and fid_mjhq are of 30,000 prompts
each, hps is the average of v2.1, hps_v2.0 that of v2.0, all ImageNet rows have 50,000
images and their best temperature. Tab. 11's 16 steps are as measured there.
"""

PUBLISHED = """
maskbit 256         Tab.16 fid 1.58 is 306.12 precision 0.81 recall 0.60
maskbit 64          Tab.1  fid 1.66 is 320.0  precision 0.81 recall 0.60
maskbit Di[M]O      Tab.1  fid 2.89 is 310.1  precision 0.87 recall 0.49
maskbit Soft-Di[M]O Tab.1  fid 1.96 is 281.4  precision 0.84 recall 0.55
maskbit longer      Tab.1  fid 1.56 is 273.2  precision 0.81 recall 0.60
maskgit 16          Tab.2 fid 6.60  is 224.1 precision 0.83 recall 0.40 density 1.25 coverage 0.98
maskgit 8           Tab.2 fid 6.66  is 221.6 precision 0.83 recall 0.40 density 1.23 coverage 0.97
maskgit 4           Tab.2 fid 10.73 is 192.3 precision 0.75 recall 0.31 density 1.01 coverage 0.92
maskgit 2           Tab.2 fid 91.35 is 13.4  precision 0.18 recall 0.16 density 0.09 coverage 0.12
maskgit 32-halton   Tab.2 fid 9.62  is 296.2 precision 0.90 recall 0.28 density 1.47 coverage 0.98
maskgit 16-halton   Tab.2 fid 8.73  is 283.2 precision 0.89 recall 0.28 density 1.46 coverage 0.98
maskgit 8-halton    Tab.2 fid 7.73  is 248.8 precision 0.86 recall 0.31 density 1.37 coverage 0.97
maskgit Di[M]O      Tab.2 fid 6.91  is 214.0 precision 0.83 recall 0.38 density 1.26 coverage 0.97
maskgit Soft-Di[M]O Tab.2 fid 6.40  is 214.8 precision 0.83 recall 0.39 density 1.27 coverage 0.97
meissonic 32          Tab.3 fid_coco 50.13 clip_score 0.318 geneval 0.46 hps 29.63
meissonic Di[M]O      Tab.3 fid_coco 38.45 clip_score 0.322 geneval 0.43 hps 28.59
meissonic Soft-Di[M]O Tab.3 fid_coco 28.33 clip_score 0.319 geneval 0.53 hps 32.35
meissonic Soft-Di[M]O Tab.10 hps_v2.0 29.22
maskgen 64          Tab.11-13 fid_coco 22.60 fid_mjhq 7.35  clip_score 0.312 geneval 0.485 hps 27.70
maskgen 32          Tab.11-13 fid_coco 22.70 fid_mjhq 7.43  clip_score 0.312 geneval 0.479 hps 27.60
maskgen 16          Tab.11-13 fid_coco 22.64 fid_mjhq 7.59  clip_score 0.312 geneval 0.484 hps 27.43
maskgen 8           Tab.11-13 fid_coco 22.89 fid_mjhq 8.32  clip_score 0.311 geneval 0.462 hps 27.14
maskgen 4           Tab.11-13 fid_coco 24.84 fid_mjhq 11.58 clip_score 0.308 geneval 0.448 hps 26.11
maskgen 2           Tab.11-13 fid_coco 44.21 fid_mjhq 29.92 clip_score 0.287 geneval 0.324 hps 22.38
maskgen 1           Tab.11-13 fid_coco 88.70 fid_mjhq 77.57 clip_score 0.245 geneval 0.178 hps 16.65
maskgen Di[M]O      Tab.3     fid_coco 24.15 clip_score 0.299 geneval 0.42 hps 27.14
maskgen Di[M]O      Tab.8     hps_v2.0 27.50
maskgen Soft-Di[M]O Tab.3     fid_coco 23.43 clip_score 0.321 geneval 0.51 hps 29.38
maskgen TTEO-4x4    Tab.3     geneval 0.63 hps 31.95
maskgen Soft-Di[M]O Tab.9     hps_v2.0 28.18
maskgen 64 Tab.13 hps_v2.0 27.64
maskgen 32 Tab.13 hps_v2.0 27.62
maskgen 16 Tab.13 hps_v2.0 27.58
maskgen 8  Tab.13 hps_v2.0 27.52
maskgen 4  Tab.13 hps_v2.0 27.25
maskgen 2  Tab.13 hps_v2.0 26.17
maskgen 1  Tab.13 hps_v2.0 24.33
maskgen-xl 32 Tab.12 geneval 0.487
maskgen-xl 16 Tab.12 geneval 0.482
maskgen-xl 1  Tab.12 geneval 0.165
"""


def published(row, config):
    """What the paper says of a row's metrics: [{"of", "table", metric: number, ...}].

    config: how train.py made the student. Bare weights, without one, stand beside any student of
    their teacher.
    """
    if row["kind"] == "teacher":
        suffix = "-halton" if row.get("order") == "halton" else ""
        kinds = [f"{row['steps']}{suffix}"]
    elif row["kind"] != "student":
        kinds = [row["kind"]]
    elif not config:
        kinds = ["Di[M]O", "Soft-Di[M]O", "longer"]
    elif not (config.get("gan") or config.get("reward")):
        kinds = ["Di[M]O"]
    elif str(config.get("recipe")).endswith("long"):
        kinds = ["longer"]
    else:
        kinds = ["Soft-Di[M]O"]

    measured = {metric for metric, number in row.items() if number is not None}
    if "fid" in row:
        measured |= {"fid_coco", "fid_mjhq"}
    found = []
    for line in PUBLISHED.strip().splitlines():
        teacher, kind, place, *pairs = line.split()
        numbers = {metric: float(number) for metric, number in zip(pairs[::2], pairs[1::2])
                   if metric in measured}
        if teacher == row["teacher"] and kind in kinds and numbers:
            found.append({"of": kind, "table": place, **numbers})
    return found


def in_words(entries):
    """What `published` found: the numbers, and where they stand."""
    words = []
    for entry in entries:
        numbers = [f"{key} {entry[key]:g}" for key in entry if key not in ("of", "table")]
        words.append(f"{entry['of']}: {', '.join(numbers)} ({entry['table']})")
    return "; ".join(words)
