"""What the site does with a page besides the theme.

- Files of other folders that pages link to, such as ../results/quickstart.png, join the site.
- A picture is a link to itself in full size.
- An option such as ``--optim.lr``, an interval and a number with its % stay in one line.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FOLDERS = ("results", "benchmarks", "configs", "examples", "studies", "basis_jax/plans")
KINDS = (".png", ".txt", ".json", ".py", ".ipynb", ".md")
OUTSIDE = re.compile(rf"\]\(\.\./(?=(?:{'|'.join(FOLDERS)})/)")
BLOCK = re.compile(r"(<pre.*?</pre>)", flags=re.DOTALL)
PICTURE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*>')
UNBROKEN = re.compile(r"(?<![\w-])--[a-z][\w.-]+|\[-?[\d.]+, -?[\d.]+\]|[\d.]+ %")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*")):
            if path.suffix in KINDS:
                name = f"{folder}/{path.name}"
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return OUTSIDE.sub("](", markdown)


def on_page_content(html: str, **_: object) -> str:
    parts = BLOCK.split(html)  # every second one is a block of code, which stays as it is
    parts[::2] = [_in_one_line(PICTURE.sub(r'<a href="\1">\g<0></a>', part)) for part in parts[::2]]
    return "".join(parts)


def _in_one_line(html: str) -> str:
    """Only text changes: tags are every second part."""
    parts = re.split(r"(<[^>]*>)", html)
    parts[::2] = [UNBROKEN.sub(r'<span class="unbroken">\g<0></span>', part) for part in parts[::2]]
    return "".join(parts)
