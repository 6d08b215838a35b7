"""Damage to files, drawn from a `random.Random`: Hypothesis gives one that it can shrink, the long run one per input."""

import copy
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from random import Random
from typing import Any

IN_PLACE_OF_A_FILE = ("absent", "folder", "pipe", "loop", "endless")
EXTREME_INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32 - 1,
    2**53 + 1,
    2**62,
    2**63 - 1,
    -(2**63),
)
EXTREME_NUMBERS = (
    b"0",
    b"-1",
    b"1e308",
    b"-1e308",
    b"1e-320",
    b"nan",
    b"NaN",
    b"inf",
    b"-Infinity",
    b"9" * 30,
    b"9" * 5000,
    b"0.5",
    b"",
    b"1_0",
    b"0x10",
)
BEGINNINGS = (
    b"PK\x03\x04",
    b"\x80\x04\x95",
    b"\x1f\x8b\x08",
    b"\x93NUMPY\x01\x00",
    b"GGUF",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x28\xb5\x2f\xfd",
    b"\0" * 16,
)
STRANGE_TEXT = ("", "\0", "x" * 20_000, "../../etc/passwd", "a\nb", "\u202e\u0000\ud7ff", "é" * 50, "{}", "%s%n", "\x1b[31m")
DEEP = 100_000  # levels: more than any parser's recursion


def damage(random: Random, files: dict[str, bytes], pattern: str = "*") -> "dict[str, bytes | str]":
    """Return the files with one of those that match `pattern` damaged once to three times, or something else standing in its place."""
    name = random.choice([name for name in files if fnmatch(name, pattern)])
    content = files[name]
    if random.random() < 0.02:
        return files | {name: random.choice(IN_PLACE_OF_A_FILE)}
    for _ in range(random.choice((1, 1, 2, 3))):
        of_structure = STRUCTURE.get(name.rpartition(".")[2])
        if of_structure and random.random() < 0.7:
            content = of_structure(random, content)
        else:
            content = random.choice(OF_BYTES)(random, content, files)
    return files | {name: content}


# Bytes


def _place(random: Random, content: bytes) -> int:
    # Half of the time among the first: that is where headers are.
    return random.randrange(min(len(content), 64 if random.random() < 0.5 else len(content)) + 1)


def _flip_bits(random: Random, content: bytes, _) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8)) if content else 0):
        changed[min(_place(random, content), len(content) - 1)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(random: Random, content: bytes, _) -> bytes:
    return content[: random.choice((_place(random, content), max(len(content) - random.randrange(1, 9), 0)))]


def _insert(random: Random, content: bytes, _) -> bytes:
    at, count = _place(random, content), random.choice((1, 2, 4, 100, 5000))
    new = random.choice((bytes(count), b"\xff" * count, random.randbytes(min(count, 100))))
    return content[:at] + new + content[at:]


def _remove(random: Random, content: bytes, _) -> bytes:
    at = _place(random, content)
    return content[:at] + content[at + random.choice((1, 2, 4, 100)) :]


def _splice(random: Random, content: bytes, files: dict[str, bytes]) -> bytes:
    other = random.choice(list(files.values()))
    start = _place(random, other)
    piece = other[start : start + random.choice((4, 64, 4096, len(other)))]
    at = _place(random, content)
    return content[:at] + piece + content[at + (len(piece) if random.random() < 0.5 else 0) :]


def _extreme_word(random: Random, content: bytes, _) -> bytes:
    code = random.choice("bhiq")
    width = struct.calcsize(code)
    bits = random.choice(EXTREME_INTEGERS) & (1 << 8 * width) - 1
    at = _place(random, content) // width * width
    return content[:at] + bits.to_bytes(width, random.choice(("little", "little", "big"))) + content[at + width :]


def _extreme_float(random: Random, content: bytes, _) -> bytes:
    at = _place(random, content) // 4 * 4
    new = struct.pack(random.choice(["<f", "<d"]), random.choice((float("nan"), float("inf"), -1.0, 0.0, 3e38)))
    return content[:at] + new + content[at + len(new) :]


def _extreme_number(random: Random, content: bytes, _) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?", content[:100_000]))
    if not found:
        return content
    number = random.choice(found)
    return content[: number.start()] + random.choice(EXTREME_NUMBERS) + content[number.end() :]


def _deep(random: Random, content: bytes, _) -> bytes:
    at = _place(random, content)
    return content[:at] + random.choice((b"[", b"{", b'{"a":', b"(", b"<a>", b"a.")) * DEEP + content[at:]


def _another_kind(random: Random, content: bytes, _) -> bytes:
    return random.choice(BEGINNINGS) + random.choice((content, b"", random.randbytes(50)))


def _swap_lines(random: Random, content: bytes, _) -> bytes:
    lines = content.splitlines(keepends=True)
    if len(lines) < 2:
        return content
    i, j = random.randrange(len(lines)), random.randrange(len(lines))
    change = random.randrange(3)
    if change == 0:
        lines[i], lines[j] = lines[j], lines[i]
    elif change == 1:
        lines.insert(i, lines[j])
    else:
        del lines[i]
    return b"".join(lines)


def _noise(random: Random, content: bytes, _) -> bytes:
    return random.randbytes(random.choice((0, 1, 16, 1024, 4096)))


OF_BYTES: "tuple[Callable[[Random, bytes, dict[str, bytes]], bytes], ...]" = (
    _flip_bits,
    _flip_bits,
    _cut,
    _insert,
    _remove,
    _splice,
    _extreme_word,
    _extreme_word,
    _extreme_float,
    _extreme_number,
    _extreme_number,
    _deep,
    _another_kind,
    _swap_lines,
    _noise,
)


# Structure


def _strange_value(random: Random, like: Any, root: Any) -> Any:
    choices = (
        lambda: random.choice(EXTREME_INTEGERS),
        lambda: random.choice((0.0, -0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf"), 10**400)),
        lambda: random.choice((None, True, False, [], {}, [[]], [None], {"": None})),
        lambda: random.choice(STRANGE_TEXT),
        lambda: copy.deepcopy(_node(random, root)[2]),
        lambda: [like] * random.choice((1, 2, 1000)),
        lambda: {"x": like},
        lambda: str(like)[:1000],
    )
    return random.choice(choices)()


def _node(random: Random, root: Any) -> tuple[Any, Any, Any]:
    """Return a random (container, key, value) of a tree; container None for the root."""
    container, key, value = None, None, root
    while isinstance(value, dict | list) and value and random.random() < 0.85:
        container = value
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        value = container[key]
    return container, key, value


def change_tree(random: Random, root: Any) -> Any:
    """Return a tree of dicts, lists and values with one place changed: replaced, removed, doubled, renamed or moved."""
    root = copy.deepcopy(root)
    container, key, value = _node(random, root)
    if container is None:
        return _strange_value(random, None, root)
    change = random.choice(("replace", "replace", "replace", "remove", "rename", "add", "swap"))
    if change == "replace":
        container[key] = _strange_value(random, value, root)
    elif change == "remove":
        del container[key]
    elif change == "swap":
        other, other_key, other_value = _node(random, root)
        if other is not None:
            container[key], other[other_key] = copy.deepcopy(other_value), copy.deepcopy(value)
    elif isinstance(container, list):
        container.insert(random.randrange(len(container) + 1), _strange_value(random, value, root))
    else:
        if change == "rename":
            del container[key]
        container[random.choice((*STRANGE_TEXT, str(key) + "x"))] = value
    return root


def _json(random: Random, content: bytes) -> bytes:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return _flip_bits(random, content, {})
    return json.dumps(change_tree(random, tree), ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")


def _json_lines(random: Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    i = random.randrange(len(lines))
    return b"\n".join([*lines[:i], _json(random, lines[i]), *lines[i + 1 :]])


def _toml(random: Random, content: bytes) -> bytes:
    """Change a value, a key or a table of one line; or nest something deeply."""
    lines = content.split(b"\n")
    settings = [i for i, line in enumerate(lines) if b"=" in line and not line.lstrip().startswith(b"#")]
    if not settings:
        return _flip_bits(random, content, {})
    i = random.choice(settings)
    key, _, value = lines[i].partition(b"=")
    values = (
        *(str(n).encode() for n in EXTREME_INTEGERS),
        *(b"nan inf -inf 1e400 -1.5 true [] {} '' [[]] 1979-05-27 0x7fffffffffffffffff".split()),
        *(json.dumps(text).encode() for text in STRANGE_TEXT),
        b"9" * 5000,
        b"[" * DEEP,
        b"{a=" * DEEP,
        b"[" + value.partition(b"#")[0].strip() + b"]",
    )
    change = random.randrange(6)
    if change < 3:
        lines[i] = key + b"= " + random.choice(values)
    elif change == 3:
        lines[i] = random.choice((b"x", b"x" * 20_000, b"a.b", b'""', b"a." * DEEP + b"a")) + b" =" + value
    elif change == 4:
        lines.insert(i, random.choice((lines[i], b"[x]", b"[model]", b"[[model]]", b"[" + b"a." * 3000 + b"a]")))
    else:
        del lines[i]
    return b"\n".join(lines)


def _npz(random: Random, content: bytes) -> bytes:
    """Change, remove, rename or double a member of the archive, whose check sums are right afterwards."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:
        return _flip_bits(random, content, {})
    if not members:
        return _flip_bits(random, content, {})
    name = random.choice(list(members))
    change = random.randrange(8)
    if change < 4:
        members[name] = random.choice(OF_BYTES)(random, members[name], members)
    elif change == 4:
        members[name] = _npy(random, members[name])
    elif change == 5:
        del members[name]
    elif change == 6:
        members[random.choice((name + "x", "../../x.npy", "x", ".npy"))] = members.pop(name)
    else:
        members[name] = members[random.choice(list(members))]
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return changed.getvalue()


def _npy(random: Random, content: bytes) -> bytes:
    """Let a .npy's header claim another type or shape than its data have."""
    if not content.startswith(b"\x93NUMPY") or len(content) < 10:
        return content
    end = 10 + int.from_bytes(content[8:10], "little")
    descr = random.choice(("<i4", "<i8", ">i8", "<f8", "|O", "<U5", "|S1", "|b1", "<c16", "|V0", "<M8[ns]", "x"))
    shape = random.choice(
        ("()", "(0,)", "(1,)", "(-1,)", f"({2**62},)", "(1000000000000,)", "(3, 3)", "(1.5,)", "x", f"({2**40}, {2**40})")
    )
    header = f"{{'descr': '{descr}', 'fortran_order': {random.choice(('False', 'True', '1'))}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return content[:8] + len(header).to_bytes(2, "little") + header + content[end:]


STRUCTURE: dict[str, Callable[[Random, bytes], bytes]] = {"json": _json, "jsonl": _json_lines, "toml": _toml, "npz": _npz, "npy": _npy}
