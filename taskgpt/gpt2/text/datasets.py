"""The datasets known by name: download, check, tokenize as llm.c does, keep.

`prepare` turns a name into two of llm.c's token files in a folder, by default one of the user's cache. It may be stopped at any moment and
run again: a download goes on where it stopped, and no file carries its final name before it is whole. Runs started together wait for each
other, so that only one of them does the work.
"""

import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from taskgpt.downloads import SECONDS, download, only_one, progress, sha256_of, size_of, user_cache, verify_download
from taskgpt.errors import UserError, did_you_mean, shorten
from taskgpt.files import cannot_write
from taskgpt.gpt2.text.tokenizer import gpt2_tokenizer
from taskgpt.gpt2.text.tokens import TokenWriter, write_tokens

VAL_TOKENS = 32768  # llm.c's validation part of tinyshakespeare
UNPACKED = ".unpacked.tmp"


@dataclass(frozen=True)
class Dataset:
    """Where a dataset comes from and what becomes of it."""

    name: str
    url: str
    num_bytes: int
    """Size of the download."""
    sha256: str
    """SHA-256 of the download."""
    train: str
    val: str
    """Names of the token files: llm.c's."""
    write: Callable[[Path, Path], None]
    """Tokenizes the download (first argument) into both files of a folder (second argument)."""
    token_sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of token files, where llm.c's are published."""

    @property
    def folder(self) -> Path:
        """Its own folder in the user's cache. Raises: UserError as `user_cache`."""
        return user_cache() / self.name

    def part(self, folder: Path) -> Path:
        """The download, whole or in part; removed once it is tokenized."""
        return folder / (self.url.rpartition("/")[2] + ".part")

    def is_in(self, folder: Path) -> bool:
        """Whether both token files are there."""
        return all(os.path.isfile(folder / name) for name in (self.train, self.val))  # False, too, where one may not look


def split_sections(text: str) -> Iterator[str]:
    """Cut a text into llm.c's documents: a document ends with an empty line, which it keeps."""
    start = 0
    while (end := text.find("\n\n", start) + 2) >= 2:
        yield text[start:end]
        start = end
    yield text[start:]


def write_tinyshakespeare(text_path: Path, folder: Path):
    """Tokenize tinyshakespeare: the first 32,768 tokens are for validation. Source: llm.c, `dev/data/tinyshakespeare.py`."""
    ids = gpt2_tokenizer().encode_documents(split_sections(text_path.read_text("utf-8")))
    write_tokens(folder / "tiny_shakespeare_val.bin", ids[:VAL_TOKENS])
    write_tokens(folder / "tiny_shakespeare_train.bin", ids[VAL_TOKENS:])


def write_tinystories(archive: Path, folder: Path):
    """Tokenize TinyStories, holding one shard of stories at a time: the first shard is for validation, the others for training.

    Stories are shuffled within their shard as llm.c does (`dev/data/tinystories.py`); but llm.c appends the shards in the order in which
    its processes end, and this in the order of their names, so the training file has the same stories in another, repeatable order.
    """
    try:
        shards = _unpack(archive, folder / UNPACKED)
        done = 0
        with progress("tokenizing", sum(map(size_of, shards))) as show:
            for file_name, split in (("TinyStories_val.bin", shards[:1]), ("TinyStories_train.bin", shards[1:])):
                with TokenWriter.open(folder / file_name) as writer:
                    for index, shard in enumerate(split):
                        stories = [entry["story"].strip() for entry in json.loads(shard.read_bytes())]
                        random.Random(1337 + index).shuffle(stories)
                        writer.append(gpt2_tokenizer().encode_documents(stories))
                        show(done := done + size_of(shard))
    finally:
        shutil.rmtree(folder / UNPACKED, ignore_errors=True)


def _unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack the shards of TinyStories and return their paths in the order of their names, whatever their order in the archive."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    try:
        folder.mkdir()
        with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r|gz") as tar, progress("unpacking", size_of(archive)) as show:
            for member in tar:
                name = PurePosixPath(member.name).name  # the last part only: an archive never chooses the folder
                if member.isfile() and name.endswith(".json") and not name.startswith("."):
                    with (folder / name).open("xb") as shard:
                        shutil.copyfileobj(tar.extractfile(member), shard)
                show(file.tell())
    except OSError as error:
        raise cannot_write(folder, error) from error
    return sorted(folder.iterdir())


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="tinyshakespeare",
            url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            num_bytes=1_115_394,
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            train="tiny_shakespeare_train.bin",
            val="tiny_shakespeare_val.bin",
            write=write_tinyshakespeare,
            token_sha256={
                "tiny_shakespeare_train.bin": "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8",
                "tiny_shakespeare_val.bin": "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62",
            },
        ),
        Dataset(
            name="tinystories",
            url="https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz",
            num_bytes=1_608_001_638,
            sha256="26cf7605aca15bc4ea6fa637256400d9d01317b28ed296172b2d1dd160cd7699",
            train="TinyStories_train.bin",
            val="TinyStories_val.bin",
            write=write_tinystories,
        ),
    )
}


def find_dataset(name: str) -> Dataset:
    """Return a dataset by its name. Raises: UserError if there is none."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset '{shorten(name)}'{did_you_mean(name, DATASETS)}")
    return DATASETS[name]


def prepare(
    name: str, folder: Path | None = None, source: Path | None = None, *, seconds: float = SECONDS, say: Callable[[str], None] = print
):
    """Write a dataset's token files into a folder (default: its own in the cache), unless they are there.

    Args: source: an already downloaded file to take instead of the network, left as it is. seconds: to wait for the server.
    Raises: UserError if there is no such dataset, no network, no folder, not enough disk, or if a file has another SHA-256 than wanted.
    """
    dataset = find_dataset(name)
    folder = folder or dataset.folder
    if not dataset.is_in(folder):
        with only_one(folder, say):
            if not dataset.is_in(folder):  # still: another run may have ended meanwhile
                _prepare(dataset, folder, source, seconds)
                say(f"{name}: wrote {folder / dataset.train} and {dataset.val} beside it")
                return
    say(f"{name}: already prepared in {folder}; to prepare it anew, delete its files there first")


def _prepare(dataset: Dataset, folder: Path, source: Path | None, seconds: float):
    for file_name in (dataset.train, dataset.val):
        for leftover in folder.glob(f".{file_name}.tmp*"):  # of a run that was killed; nobody else writes here now
            leftover.unlink()
    part = dataset.part(folder)
    if source is None:
        download(dataset.url, part, dataset.num_bytes, "without a network, fetch it elsewhere and give it with --from FILE", seconds)
        verify_download(dataset.url, part, dataset.sha256)
    elif (found := sha256_of(source)) != dataset.sha256:
        what = f"{source}: this is not {dataset.name}'s {part.stem}"
        raise UserError(f"{what}: wanted SHA-256 {dataset.sha256}, got {found}; download it again")
    dataset.write(source or part, folder)
    for file_name, wanted in dataset.token_sha256.items():
        if (found := sha256_of(folder / file_name)) != wanted:
            (folder / file_name).unlink()
            raise UserError(f"{folder / file_name}: deleted: SHA-256 {found}, but llm.c's is {wanted}; install another tiktoken")
    part.unlink(missing_ok=True)
