"""What pages share: each is one self-contained file, light or dark as the reader's system is, and fits a narrow window."""

from html import escape

from taskgpt import palette

CSS = f"""
:root {{ --back: #ffffff; --text: #1f2328; --dim: #59636e; --line: #d0d7de; --panel: #f6f8fa; color-scheme: light;
  --before: {palette.VERMILION}; --after: #0969da; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --back: #0d1117; --text: #e6edf3; --dim: #9198a1; --line: #30363d; --panel: #161b22; color-scheme: dark; --after: #79c0ff; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--back); color: var(--text); font: 14px/1.45 system-ui, sans-serif; }}
button, select, input {{ font: inherit; color: var(--text); background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; padding: 3px 9px; }}
:focus-visible {{ outline: 2px solid var(--after); outline-offset: 1px; }}
button {{ cursor: pointer; }}
h1 {{ font-size: 18px; margin: 14px 0 8px; overflow-wrap: anywhere; }}
.dim, label {{ color: var(--dim); }}
.bar {{ display: flex; gap: 6px 10px; align-items: center; flex-wrap: wrap; margin-bottom: 8px; }}
#search {{ flex: 1 1 180px; max-width: 320px; }}
#legend {{ gap: 4px; }}
#legend button {{ padding: 1px 8px; border-color: transparent; }}
#legend button::before {{ content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px;
  background: var(--c); }}
#legend button[aria-pressed=false] {{ opacity: .45; text-decoration: line-through; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: 2px 12px 2px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }}
.scroll {{ overflow-x: auto; max-width: 100%; }}
"""


def html_page(title: str, style: str, body: str) -> str:
    """Return a page of its own: `body` is HTML, the title text."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}{style}</style>\n{body}\n</html>\n"
    )
