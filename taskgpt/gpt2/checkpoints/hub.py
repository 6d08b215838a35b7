"""OpenAI's GPT-2 by name: `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, as Hugging Face's hub has them, once in the user's cache.

A model is two files of one revision, which never change, so that what comes is compared with their published SHA-256. Two GETs with
ranges bring them, as they bring datasets; huggingface_hub would bring a dozen packages more, and a cache of another layout. As there,
HF_ENDPOINT names another server, a mirror for example.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from taskgpt.downloads import SECONDS, download, only_one, user_cache, verify_download
from taskgpt.errors import UserError, shorten
from taskgpt.files import cannot_write
from taskgpt.gpt2.checkpoints.huggingface import CONFIG, FILE

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Published:
    """A model of the hub's, at a revision. sha256: of config.json and of model.safetensors."""

    name: str
    revision: str
    sha256: tuple[str, str]

    @property
    def folder(self) -> Path:
        """Its own folder in the user's cache. Raises UserError as `user_cache`."""
        return user_cache() / "models" / self.name

    @property
    def url(self) -> str:
        """What the names of its files are appended to. Raises UserError if HF_ENDPOINT is no server's address."""
        server = os.environ.get("HF_ENDPOINT") or HUB
        if not server.startswith(("https://", "http://")):
            raise UserError(f"HF_ENDPOINT={shorten(server)}: wanted an address such as {HUB}; correct it, or unset it")
        return f"{server.rstrip('/')}/openai-community/{self.name}/resolve/{self.revision}/"

    @property
    def files(self) -> dict[str, str]:
        """The SHA-256 of each file by its name; the small one is first, so that a server that has nothing is found out at once."""
        return dict(zip((CONFIG, FILE), self.sha256, strict=True))

    @property
    def is_there(self) -> bool:
        """Whether both files are in the cache."""
        return all(os.path.isfile(self.folder / name) for name in self.files)


PUBLISHED = {
    model.name: model
    for model in (
        Published(
            "gpt2",
            "607a30d783dfa663caf39e06633721c8d4cfcd7e",
            (
                "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
                "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
            ),
        ),
        Published(
            "gpt2-medium",
            "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
            (
                "ef1a44d889ad1a0acc7731c78134f1b87d2d222f110e97dd10fd4117331caf22",
                "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
            ),
        ),
        Published(
            "gpt2-large",
            "32b71b12589c2f8d625668d2335a01cac3249519",
            (
                "7fccdcfd6622055342a734c663ee0b61ff4fd697f42467595df0bf4448c8c170",
                "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
            ),
        ),
        Published(
            "gpt2-xl",
            "15ea56dee5df4983c59b2538573817e1667135e2",
            (
                "be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
            ),
        ),
    )
}


def located(path: str | Path) -> str | Path:
    """Return the path, or, if nothing has that name here and it is a model's, the model's folder in the cache, having filled it.

    Raises UserError if the model cannot be had.
    """
    model = PUBLISHED.get(str(path))
    if model is None or os.path.lexists(path):
        return path
    if not model.is_there:
        fetch(model)
    return model.folder


def fetch(model: Published, seconds: float = SECONDS) -> None:
    """Download a model into its folder, going on where an earlier try stopped; a file has its name there when it is whole and checked.

    Raises UserError without a network, folder or room on the disk, or if a file is not the published one.
    """
    with only_one(model.folder, _say):
        for name, sha256 in model.files.items():
            if not os.path.isfile(model.folder / name):  # of an earlier try, or of another run, which ended meanwhile
                _fetch(model, name, sha256, seconds)
                if name == FILE:
                    _say(f"{model.name}: {FILE} has the published SHA-256; it stays in {model.folder}")


def _fetch(model: Published, name: str, sha256: str, seconds: float) -> None:
    part, url = model.folder / f"{name}.part", model.url + name
    by_hand = f"without a network, put {CONFIG} and {FILE} of {model.url} into {shorten(model.folder)}, or name a folder that has them"
    download(url, part, None, by_hand, seconds, f"downloading {model.name}/{name}")
    verify_download(url, part, sha256)
    try:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, model.folder / name)
    except OSError as error:
        raise cannot_write(model.folder / name, error) from None


def _say(line: str) -> None:
    """On standard error: standard output may be a text that a model writes."""
    print(line, file=sys.stderr, flush=True)
