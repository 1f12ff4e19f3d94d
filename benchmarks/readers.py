"""Local files by the readers of this project and by `datasets`: memory, time, disk.

    python -m benchmarks.readers [--megabytes=100 --corpus=FILE.jsonl.xz --images=FILE.tar]

Without `--corpus` and `--images`, documents and images are made up. Every row is a process of its
own, on Linux: peak memory, with what it imports, of a reader that hands out every document or image
once, and what it leaves in a fresh cache folder.
"""

import argparse
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

READERS = ("ours", "datasets")
DOCUMENTS, IMAGES = 20_000, 10_000


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100, help="length of the one long line")
    parser.add_argument("--corpus", help="a .jsonl or .jsonl.xz with the key text")
    parser.add_argument("--images", help="a .tar of class/image")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)  # reader, kind, path
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*options.case)))
        return
    print("| input | reader | seconds | peak MiB | disk MiB | found |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, kind, path in inputs(Path(folder), options):
            for reader in READERS:
                row = in_process(reader, kind, path)
                numbers = f"{row['seconds']:.1f} | {row['peak']} | {row['disk']}"
                print(f"| {name} | {reader} | {numbers} | {row['found']} |", flush=True)


def inputs(folder: Path, options: argparse.Namespace):
    """Yields (name, kind, path) of what is read; files are written as they come up."""
    words = random.Random(0).choices(["alpha", "beta", "gamma", "delta", "house"], k=100_000)
    chunk = " ".join(words) + " "
    line = (chunk * (options.megabytes * 10**6 // len(chunk) + 1))[: options.megabytes * 10**6]
    size = f"one line of {options.megabytes} MB"
    (folder / "line.txt").write_text(line)
    yield f"{size}, `.txt`", "text", folder / "line.txt"
    (folder / "line.jsonl").write_text(json.dumps({"text": line}) + "\n")
    yield f"{size}, `.jsonl`", "json", folder / "line.jsonl"
    with lzma.open(folder / "line.jsonl.xz", "wt", preset=0) as stream:
        stream.write(json.dumps({"text": line}) + "\n")
    yield f"{size}, `.jsonl.xz`", "json", folder / "line.jsonl.xz"
    corpus = Path(options.corpus or folder / "corpus.jsonl.xz")
    if not options.corpus:
        with lzma.open(corpus, "wt", preset=0) as stream:
            for number in range(DOCUMENTS):
                text = " ".join(words[number : number + 350])
                stream.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    yield f"documents, `{''.join(corpus.suffixes)}`", "json", corpus
    tar = Path(options.images or folder / "images.tar")
    if not options.images:
        write_images(tar)
    with tarfile.open(tar) as archive:
        archive.extractall(folder / "images", filter="data")
    yield "folder of images", "imagefolder", folder / "images"
    yield "tar of images", "imagefolder", tar


def write_images(path: Path) -> None:
    """Packs small images of ten classes, as class/number.png."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    with tarfile.open(path, "w") as archive:
        for number in range(IMAGES):
            stream = io.BytesIO()
            Image.fromarray(pixels[number]).save(stream, "PNG")
            member = tarfile.TarInfo(f"class{number % 10}/{number:05}.png")
            member.size, member.mtime = stream.tell(), 10**9
            archive.addfile(member, io.BytesIO(stream.getvalue()))


def in_process(reader: str, kind: str, path: Path) -> dict:
    """Returns what `measure` says in a new process with a cache folder of its own."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.readers", "--case", reader, kind, str(path)]
        env = {**os.environ, "HF_HOME": cache, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        written = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    return {**json.loads(done.stdout.splitlines()[-1]), "disk": round(written / 2**20)}


def measure(reader: str, kind: str, path: str) -> dict:
    """Returns seconds, peak memory in MiB and the number of documents or images, or the error."""
    start = time.monotonic()
    try:
        found = f"{(ours if reader == 'ours' else theirs)(kind, path):,}"
    except Exception as error:  # whatever a reader raises is its result
        lines = str(error.__cause__ or error).splitlines()
        found = f"{type(error.__cause__ or error).__name__}: {lines[0] if lines else ''}"
    # Of this program alone: getrusage counts what the process that started it held.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) // 1024
    return {"seconds": time.monotonic() - start, "peak": peak, "found": found}


def ours(kind: str, path: str) -> int:
    """Reads all of it with the readers of this project."""
    if kind != "imagefolder":
        from quantizable_flax.data.text.document import Fields
        from quantizable_flax.data.text.files import read_documents

        return sum(1 for _ in read_documents([Path(path)], Fields("text")))
    from quantizable_flax.data.images.files import FileDataset

    source = FileDataset(path, "--images").train().source
    return sum(1 for index in range(len(source)) if source[index]["image"])


def theirs(kind: str, path: str) -> int:
    """Reads all of it with `datasets`."""
    import datasets

    place = {"data_dir": path} if Path(path).is_dir() else {"data_files": {"train": path}}
    options = {"sample_by": "paragraph"} if kind == "text" else {}
    splits = datasets.load_dataset(kind, **place, **options)
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    if kind != "imagefolder":
        return sum(1 for index in range(len(rows)) if rows[index]["text"])
    rows = rows.cast_column("image", datasets.Image(decode=False))
    places = (rows[index]["image"]["path"] for index in range(len(rows)))
    return sum(1 for place in places if Path(place).read_bytes())


if __name__ == "__main__":
    main()
