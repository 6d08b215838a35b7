"""README and the pages of docs/, as tests read them: their commands, their Python, and the files that they show."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]


def blocks(page: Path, language: str) -> list[str]:
    """Return what stands in a page's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Return the page's commands that are ours, without comments."""
    lines = [line.partition("  #")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python -m taskgpt", "taskgpt "))]


def files(page: Path) -> dict[str, str]:
    """Return the files that a page shows, by their captions."""
    shown = re.findall(r"^```\{code-block\} \w+\n:caption: (\S+)\n\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return dict(shown)
