"""What a file is, told by how it begins, for the message that says why it is not the kind of file that was wanted.

Nothing here opens what it names: a pickle, above all, is recognized and never loaded, as loading one may run whatever it holds.
"""

from pathlib import Path

from taskgpt.errors import UserError, shorten

LOOK_BYTES = 4096  # what is enough to see of a file
CHECKPOINT, TOKENS, TOKENIZER = "an llm.c model checkpoint", "an llm.c token file", "an llm.c tokenizer"
CHOICES = "an llm.c evaluation file (HellaSwag, MMLU)"
LLMC = {  # by the word that llm.c's own formats begin with
    20240326: (CHECKPOINT, "give it to --init"),
    20240327: ("an llm.c debug state", ""),
    20240328: (TOKENIZER, "put it beside token files"),
    20240520: (TOKENS, "give its folder to --data, or a pattern that matches a train and a val file"),
    20240522: (CHOICES, "give it to `taskgpt eval --choices`"),
    20240801: ("a token file of llm.c's llama-3 variant (uint32)", "tokenize the text for GPT-2 instead"),
}
BEGINNINGS = {
    b"\x1f\x8b": ("compressed by gzip", "unpack it first, with gunzip"),
    b"\xfd7zXZ\0": ("compressed by xz", "unpack it first, with unxz"),
    b"BZh91AY&SY": ("compressed by bzip2", "unpack it first, with bunzip2"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it first, with unzstd"),
    b"\x04\x22\x4d\x18": ("compressed by lz4", "unpack it first, with unlz4"),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "unpack it first"),
    b"\x93NUMPY": ("a NumPy array (.npy)", ""),
    b"GGUF\2\0\0\0": ("a GGUF model, as llama.cpp has them", ""),
    b"GGUF\3\0\0\0": ("a GGUF model, as llama.cpp has them", ""),
    b"\x89HDF\r\n": ("an HDF5 file", ""),
    b"PAR1\x15": ("a Parquet table", ""),
    b"ARROW1\0\0": ("an Arrow table", ""),
    b"SQLite format 3\0": ("an SQLite database", ""),
    b"%PDF-": ("a PDF document", "extract its text first, for instance with pdftotext"),
}
NEVER_LOADED = "which is never loaded, as that could run anything"
OF_A_PICKLE = "make a folder of it for --init: docs/tutorials/gpt.md has a program for nanoGPT's; transformers' save_pretrained writes one"
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "UTF-32LE", b"\0\0\xfe\xff": "UTF-32BE", b"\xff\xfe": "UTF-16LE", b"\xfe\xff": "UTF-16BE"}


def refuse_another_kind(path: str | Path, beginning: bytes, wanted: str, otherwise: str):
    """Raise UserError if a file that begins so is known to be of another kind than `wanted`, a phrase with its article.

    Args: otherwise: what to do where the kind itself does not say it.
    """
    what, advice = kind_of(beginning)
    if what and what != wanted:
        raise UserError(f"{shorten(path)}: this is {what}, and {wanted} is wanted; {advice or otherwise}")


def kind_of(beginning: bytes) -> tuple[str, str]:
    """Return what a file is that begins so, and what to do about it if that depends on the kind alone; empty where it is not known."""
    if (word := int.from_bytes(beginning[:4], "little")) in LLMC:
        return LLMC[word]
    for start, answer in BEGINNINGS.items():
        if beginning.startswith(start):
            return answer
    if beginning.startswith(b"PK\x03\x04"):  # a zip archive: the name of its first member tells which
        member = beginning[30 : 30 + int.from_bytes(beginning[26:28], "little")]
        if member.endswith((b"/data.pkl", b"/data/0")):  # the second begins a TorchScript archive
            return f"a PyTorch checkpoint (a pickle in a zip archive), {NEVER_LOADED}", OF_A_PICKLE
        return ("an archive of NumPy arrays (.npz)", "") if member.endswith(b".npy") else ("a zip archive", "unpack it first")
    if beginning[:1] == b"\x80" and beginning[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return f"a Python pickle (as older PyTorch checkpoints are), {NEVER_LOADED}", OF_A_PICKLE
    if beginning[5:10] == b'\0\0\0{"':  # the length of a header, as 8 bytes, then the header in JSON
        return "a safetensors model", "give it, or its folder, to --init or to `taskgpt convert`"
    return "", ""


def encoding_of(beginning: bytes) -> str:
    """Return the name of UTF-16 or UTF-32, as iconv has it, if a text begins so in one of them, else ''."""
    for mark, name in BYTE_ORDER_MARKS.items():
        if beginning.startswith(mark):
            return name
    # Without the mark zeros tell: letters of UTF-32 have two at one end, of UTF-16 line ends, blanks and Latin letters have one.
    fours = len(beginning) // 4
    first, second, third, fourth = (beginning[at : 4 * fours : 4].count(0) for at in range(4))
    if min(third, fourth) > fours // 2:
        name = "UTF-32LE"
    elif min(first, second) > fours // 2:
        name = "UTF-32BE"
    elif second + fourth > fours // 10 + 4 * (first + third):
        name = "UTF-16LE"
    elif first + third > fours // 10 + 4 * (second + fourth):
        name = "UTF-16BE"
    else:
        return ""
    text = beginning[: 4 * fours].decode(name, errors="replace")
    return name if all(c >= " " or c in "\t\n\r\f" for c in text) else ""  # token ids without a header, for one, look much the same
