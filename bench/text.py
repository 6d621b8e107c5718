"""The speed and memory of preparing text: python bench/text.py [--megabytes 1000] [--json FILE]

Text is the standard library's, again and again without its first characters. Each case runs in a
process of its own, whose peak memory is reported with that of the imports alone. The peer is
encode_batch of tokenizers, at the best of several numbers of documents a call, on the same texts in
memory, without reading, cutting, hashing or writing. On a busy machine the seconds of a core say
more than the seconds of a clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENIZER_MEGABYTES = 20
SHIFTS = 63
ROUNDS = 3
BATCHES = (8, 32, 128, 512, 2048)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=1000, help="of the case in bytes")
    parser.add_argument("--vocab", type=int, default=2048, help="of the case with a tokenizer")
    parser.add_argument("--folder", type=Path, help="of the files; a temporary one by default")
    parser.add_argument("--quick", action="store_true", help="a run that takes seconds")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    megabytes = 2 if options.quick else options.megabytes
    of_tokenizer = min(megabytes, TOKENIZER_MEGABYTES)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for size in {megabytes, of_tokenizer}:
            write_corpus(folder / f"{size}", size, in_lines=False)
        write_corpus(folder / "lines.jsonl", megabytes, in_lines=True)
        save_tokenizer(folder, 300 if options.quick else options.vocab)
        bpe = {"tokenizer": str(folder / "tokenizer.json")}
        in_bytes = [
            ("bytes, folder of .txt", folder / f"{megabytes}"),
            ("bytes, .jsonl", folder / "lines.jsonl"),
        ]
        rows = [{"case": case, **run("prepare", data, {})} for case, data in in_bytes]
        # In turn, so that both see the same machine; the best of each counts.
        pairs = [
            [run(task, folder / f"{of_tokenizer}", bpe) for task in ("prepare", "peer")]
            for _ in range(1 if options.quick else ROUNDS)
        ]
    ours, peers = (min(side, key=lambda row: row["seconds"]) for side in zip(*pairs, strict=True))
    clock, cores = (peers[name] / ours[name] for name in ("seconds", "cpu_seconds"))
    rows.append({"case": "tokenizer, folder of .txt", **ours, "ratio": clock, "cpu_ratio": cores})
    for row in rows:
        row["megabytes_per_second"] = row["bytes"] / 1e6 / row["seconds"]
        print(
            f"{row['case']:26}  {row['bytes'] / 1e6:7.1f} MB  {row['seconds']:6.2f} s "
            f"({row['cpu_seconds']:.2f} s of a core)  {row['megabytes_per_second']:6.1f} MB/s  "
            f"peak {row['peak_megabytes']:.0f} MB, {row['import_megabytes']:.0f} MB of it imports"
        )
    print(
        f"{clock:.2f} times as fast as encode_batch by the clock, {cores:.2f} by seconds of cores"
    )
    if options.json:
        found = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "peer": peers}
        found |= {"rows": rows}
        options.json.write_text(json.dumps(found, indent=1))
    return 0


def write_corpus(path: Path, megabytes: float, in_lines: bool) -> None:
    """A folder of files, or lines of JSON, of the standard library, cut at other places."""
    from fastmem.data.documents import standard_library

    texts = [one.content for one in standard_library() if isinstance(one.content, str)]
    size, round_ = 0, 0
    if not in_lines:
        path.mkdir(exist_ok=True)
    lines = path.open("w") if in_lines else None
    while size < megabytes * 1e6:
        for i, text in enumerate(texts):
            # Cut at other places, so that a sequence of one round is rarely one of another.
            text = text[round_ % SHIFTS :]
            text = text.swapcase() if round_ // SHIFTS % 2 else text
            if lines is None:
                (path / f"{round_}-{i}.txt").write_text(text)
            else:
                lines.write(json.dumps({"text": text}) + "\n")
            size += len(text)
            if size >= megabytes * 1e6:
                break
        round_ += 1
    if lines is not None:
        lines.close()


def save_tokenizer(folder: Path, vocab: int) -> None:
    from fastmem.data.documents import standard_library
    from fastmem.data.tokenizers import train_tokenizer

    texts = (one.content for one in standard_library() if isinstance(one.content, str))
    (folder / "tokenizer.json").write_text(train_tokenizer(texts, vocab).saved)


def run(task: str, data: Path, settings: dict[str, str]) -> dict[str, Any]:
    """The row of a task in a new process."""
    program = f"import json, text; print(json.dumps(text.{task}({str(data)!r}, **{settings!r})))"
    env = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def prepare(data: str, **settings: str) -> dict[str, float]:
    """Prepares a corpus once."""
    import fastmem

    before = fastmem.prepare_text and peak_megabytes()
    with tempfile.TemporaryDirectory(dir=Path(data).parent) as folder:
        start, cpu = time.perf_counter(), time.process_time()
        corpus = fastmem.prepare_text(data, f"{folder}/c", **settings)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        counts = corpus.counts
    names = ("documents", "bytes", "tokens", "sequences", "exact_duplicates")
    found = {name: counts[name] for name in names}
    return found | {
        **{"seconds": seconds, "cpu_seconds": cpu, "peak_megabytes": peak_megabytes()},
        "import_megabytes": before,
    }


def peer(data: str, tokenizer: str) -> dict[str, float]:
    """The best of encode_batch over several numbers of documents a call."""
    import tokenizers

    texts = [path.read_text() for path in sorted(Path(data).glob("*.txt"))]
    encoder = tokenizers.Tokenizer.from_file(tokenizer)
    encoder.encode_batch(texts[:8])
    found = []
    for batch in BATCHES:
        start, cpu = time.perf_counter(), time.process_time()
        for i in range(0, len(texts), batch):
            encoder.encode_batch(texts[i : i + batch])
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        found.append({"seconds": seconds, "cpu_seconds": cpu, "documents_a_call": batch})
    return min(found, key=lambda row: row["seconds"])


def peak_megabytes() -> float:
    """Of this process alone: ru_maxrss begins with that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
