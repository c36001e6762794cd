"""Rows of results as tables, sentences and footnotes."""

from operator import itemgetter

from metrics.published import in_words

# Keys of rows, in the order of columns.
COLUMNS = ("steps temperature guidance n fid is geneval single_object two_object counting colors "
           "position color_attr clip imagereward chroma clip_score hps hps_v2.0 anime concept-art "
           "paintings photo precision recall density coverage images/s tokens_only/s "
           "seconds/prompt psnr published").split()
FORMATS = {                                           # of what is not .2f
    "steps": "d", "n": "d", "temperature": "g", "guidance": "g",
    "images/s": ".1f", "tokens_only/s": ".1f",
    "geneval": ".3f", "chroma": ".3f", "clip_score": ".4f",
    "precision": ".3f", "recall": ".3f", "density": ".3f", "coverage": ".3f",
}


def headline(row):
    """A row in a few words."""
    names = {
        "fid": "FID", "precision": "precision", "recall": "recall",
        "geneval": "GenEval", "clip": "CLIP", "clip_score": "CLIP score",
    }
    measured = [key for key in names if row.get(key) is not None]
    return ", ".join(f"{names[key]} {cell(row, key)}" for key in measured)


def small_print(row):
    """What the FID of a row depends on besides its model, in a sentence."""
    each = f", {row['per_class']:g} images per class" if row.get("per_class") else ""
    return (f"FID: {row['extractor']} ({row['inception']}), resize {row['resize']}, "
            f"{row['crop'] or 'no crop'}, in float32, against {row['reference']}; "
            f"N = {row['n']}{each}, seed {row['seed']}, {row['pixels']}. IS: torch-fidelity's "
            f"splits (is_stylegan, is_adm: table.json). {row.get('note', '')}").strip()


def speedup(rows):
    """How much faster the fastest student is than the teacher's most steps, or None."""
    def timed(kind):
        return [row for row in rows if row.get("kind") == kind and row.get("images/s")]

    teachers, students = timed("teacher"), timed("student")
    if not (teachers and students):
        return None
    slow = max(teachers, key=itemgetter("steps"))
    fast = max(students, key=itemgetter("images/s"))
    image, tokens = (fast[key] / slow[key] for key in ("images/s", "tokens_only/s"))
    return (f"One step is {image:.1f} times faster per image than the teacher's {slow['steps']} "
            f"steps; {tokens:.1f} times without the decoder, which both share.")


def cell(row, key):
    value = row.get(key)
    if value is None:
        return "-"
    return in_words(value) if key == "published" else format(value, FORMATS.get(key, ".2f"))


def table(rows):
    """Markdown: a line per row, the paper's numbers in the last column, and notes below."""
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    titles = [key.replace("_", " ") for key in columns]
    if "published" in columns:
        titles[-1] += " (the paper's, not measured here)"
    lines = [["model", *titles]]
    lines += [[row["model"], *(cell(row, key) for key in columns)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")

    notes = [row.get("note") for row in rows] + [speedup(rows)]
    small = sorted({row["n"] for row in rows if "fid" in row and row["n"] < 10_000})
    if small:
        notes.insert(0, f"N = {', '.join(map(str, small))}: below 10,000, FID is biased upward; "
                        "compare at equal N.")
    return "\n\n".join(["\n".join(text), *dict.fromkeys(filter(None, notes))])      # each once


def report(rows):
    """`table` of all rows. A sweep of a student's temperatures has a table of its own first, and
    only its best row enters the joint one."""
    by_model = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    text, joint = [], []
    for model, own in by_model.items():
        swept = [row for row in own if row["kind"] == "student" and "fid" in row]
        best = min(swept, key=itemgetter("fid"), default=None)
        if len(swept) > 1:
            argmax = "" if best["temperature"] else " (argmax)"
            text += [table(own), f"{model}: the best of {len(swept)} temperatures is "
                                 f"{best['temperature']:g}{argmax}, FID {best['fid']:.2f}"]
        joint += [row for row in own if row is best or row not in swept]
    if len(by_model) > 1 or not text:
        text.append(table(joint))
    return "\n\n".join(text)
