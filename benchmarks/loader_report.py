"""What `loaders.py` measured, for people: tables, and every column in which this project's stream is not first."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from benchmarks.machine import measured

OURS, LIMIT = "lockstep", "bare"
# Differences below this share are noise on a shared machine.
NOISE = 0.05


class Column(NamedTuple):
    """A number of a row: how it is called, and whether more of it is better."""

    key: str
    title: str
    more_is_better: bool = False


COLUMNS = (
    Column("speed", "samples/s", more_is_better=True),
    Column("first_batch_ms", "imports to first batch"),
    Column("start_seconds", "process start to first batch"),
    Column("resume", "resume at 50 %"),
    Column("tree_mb", "memory of all processes"),
    Column("worker_mb", "memory of a worker"),
)


class Loss(NamedTuple):
    """A column in which others are ahead of us, and why; None: nobody has said yet."""

    text: str
    why: str | None


# Why we are not first, by kind, column and, where it depends on that, workers.
EXPLANATIONS: dict[tuple[str, str] | tuple[str, str, int], str] = {
    ("tokens", "first_batch_ms"): (
        "The stream imports pydantic and xxhash beside torch, opens the dataset through its manifest, and checks "
        "each block of 1 MiB that the first batch touches: 32 samples in random places touch about 32 of them."
    ),
    ("tokens", "start_seconds"): (
        "As for the first batch; the interpreter of this project's environment also has more packages to look through."
    ),
    ("tokens", "resume"): (
        "A plain loader over a memory map opens one file. The stream opens its manifest and shards anew and checks every "
        "block again that the next batch touches: what was altered on disk between two attempts is found."
    ),
    ("tokens", "tree_mb"): (
        "Proportional memory counts the mapped corpus, of which a loader that reads little has little. The stream has also read "
        "more of it than a slow loader did in the same time, keeps three chunks of up to 4 MiB, and its process has more "
        "libraries loaded (pydantic, with images Arrow)."
    ),
    ("tokens", "speed", 0): (
        "A loader that hands out a batch as one gather from one file, without hashes of samples, checks of blocks and "
        "a digest, has nothing to do but the copy."
    ),
    (
        "images",
        "speed",
        0,
    ): "grain decodes in 16 threads of its own, on all cores; the others, like the stream, in one.",
    ("images", "speed", 2): (
        "The others' workers are processes. Here they are two threads of one interpreter, which take turns at what is not "
        "Pillow's (the draws and the hash of each image, its place in the batch), and wait for each other at the end of a chunk; "
        "in return a batch is never copied between processes, and is the same for any number of workers."
    ),
    ("images", "first_batch_ms"): (
        "As for tokens; and the first chunk is decoded before the first step is handed out."
    ),
    ("images", "start_seconds"): "As for the first batch.",
    (
        "images",
        "resume",
    ): "Decoding the next batch is most of it, and the same for all; opening and checking comes on top.",
    ("images", "tree_mb"): "As for tokens: more libraries, and chunks made ahead.",
}


def losses(results: dict[str, Any]) -> list[Loss]:
    """Every column of every table in which another loader is ahead by more than noise."""
    found = []
    for table in results["tables"]:
        numbers = {name: _numbers(row) for name, row in table["rows"].items() if name != LIMIT}
        ours = numbers.get(OURS, {})
        for column in COLUMNS:
            own = ours.get(column.key)
            if own is None:
                continue
            ahead = [
                f"`{name}` {_short(row[column.key])}"
                for name, row in numbers.items()
                if name != OURS and column.key in row and _beats(row[column.key], own, column.more_is_better)
            ]
            if ahead:
                kind, workers = table["kind"], table["workers"]
                why = EXPLANATIONS.get((kind, column.key, workers), EXPLANATIONS.get((kind, column.key)))
                text = f"{kind}, {workers} workers, {column.title}: ours {_short(own)}; ahead: {', '.join(ahead)}"
                found.append(Loss(text, why))
    return found


def _beats(other: float, own: float, more_is_better: bool) -> bool:
    return other > own * (1 + NOISE) if more_is_better else other < own * (1 - NOISE)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """What there is of a row; a resume that gives another batch than the one that came next is none."""
    numbers = {column.key: row[column.key] for column in COLUMNS if row.get(column.key)}
    if row["samples_per_second"]:
        numbers["speed"] = statistics.median(row["samples_per_second"])
    if row.get("identical"):
        numbers["resume"] = row["resume_ms"]
    return numbers


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def as_markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    machine, settings = results["machine"], results["settings"]
    lines = [
        "# The stream against other loaders",
        "",
        f"{measured(machine)} It took {results['seconds']:.0f} s.",
        "",
        f"Tokens: {settings['blocks']:,} samples of 1,024 + 1 tokens of "
        f"{'the Linux kernel' if settings['corpus'] == 'linux' else 'the standard library'}'s sources as bytes (uint16), batches "
        f"of 32. Images: {settings['images']:,} JPEGs of 256 x 256 from a fixed seed, decoded, a random part "
        "resized to 64 x 64 and flipped with Pillow, batches of 32. Local files in the page cache, order shuffled as each loader "
        "does it. Every contender is a process of its own, one runs at a time, "
        f"{settings['rounds']} rounds of {settings['block_seconds']} s each way; ratios within a round, median [least, most]. "
        f"`{LIMIT}` is the limit: rows of a flat memory map by numbers that are known. Only `{OURS}` checks what it "
        "reads and proves what it read (blocks' checksums, a hash of each sample, a digest of each step); it reads tokens in "
        "one thread whatever the number of workers, which are threads here and processes elsewhere.",
        "",
        "*First batch*: from the start of the imports; *process*: from the start of the process. *Resume*: fresh objects and "
        "the state after half an epoch, to the next batch, in a process that has imported all; in brackets without a state. "
        "Where a loader keeps no state, the time to read again up to there. *Identical*: byte for byte the batch that "
        "came next; with most loaders the random parts of images come from the process's generator, which no state holds. *PSS*: "
        "proportional set size.",
    ]
    for table in results["tables"]:
        lines += _table(table)
    lines += ["", "## Where this project is not first", ""]
    for loss in losses(results):
        lines.append(f"* {loss.text}. {loss.why or '**Not explained yet.**'}")
    lines += ["", "## Versions", ""]
    lines += [f"* {name} environment: {', '.join(found)}" for name, found in results["versions"].items()]
    return "\n".join(lines) + "\n"


def _table(table: dict[str, Any]) -> list[str]:
    rows = table["rows"]
    limit = rows.get(LIMIT, {}).get("samples_per_second")
    ours = rows.get(OURS, {}).get("samples_per_second")
    formats = ", ".join(f"{name} {seconds:.1f}" for name, seconds in table["format_seconds"].items() if seconds > 0.1)
    return [
        "",
        f"## {table['kind'].capitalize()}, {table['workers']} workers",
        "",
        f"| contender | samples/s | ratio to `{LIMIT}` | ratio to `{OURS}` | type | first batch ms | process s "
        "| resume ms (fresh) | identical | PSS MB, all | PSS MB, largest worker |",
        "|---|---:|---|---|---|---:|---:|---:|---|---:|---:|",
        *(_row(name, row, limit, ours) for name, row in rows.items()),
        *(["", f"Writing the formats, s: {formats}."] if formats else []),
    ]


def _row(name: str, row: dict[str, Any], limit: list[float] | None, ours: list[float] | None) -> str:
    if "failure" in row:
        return f"| `{name}` | failed: {row['failure'].replace('|', '/')} |" + " |" * 9
    speeds = row["samples_per_second"]
    cells = [f"`{name}`", f"{statistics.median(speeds):,.0f}", _ratio(speeds, limit), _ratio(speeds, ours)]
    cells += [row["dtype"].removeprefix("torch."), f"{row['first_batch_ms']:.0f}", f"{row['start_seconds']:.2f}"]
    if "resume_failure" in row:
        cells += [f"failed: {row['resume_failure'].replace('|', '/')}", "no"]
    elif "reread_ms" in row:
        cells += [f"no state; {row['reread_ms']:.0f} to read again ({row['fresh_ms']:.0f})", "none"]
    else:
        cells += [f"{row['resume_ms']:.1f} ({row['fresh_ms']:.1f})", "yes" if row["identical"] else "**NO**"]
    cells += [f"{row['tree_mb']:.0f}", f"{row['worker_mb']:.0f}" if row["worker_mb"] else "none"]
    return f"| {' | '.join(cells)} |"


def _ratio(own: list[float], others: list[float] | None) -> str:
    if not others or len(others) != len(own):
        return "-"
    ratios = [mine / other for mine, other in zip(own, others, strict=True)]
    digits = 3 if statistics.median(ratios) >= 0.01 else 5
    return f"{statistics.median(ratios):.{digits}f} [{min(ratios):.{digits}f}, {max(ratios):.{digits}f}]"
