"""Files of other folders that pages link to, such as ../results/quickstart.png, join the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FOLDERS = ("results", "benchmarks", "configs", "examples", "studies")
KINDS = (".png", ".txt", ".json", ".py", ".ipynb", ".md")
OUTSIDE = re.compile(rf"\]\(\.\./(?=(?:{'|'.join(FOLDERS)})/)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*")):
            if path.suffix in KINDS:
                name = f"{folder}/{path.name}"
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return OUTSIDE.sub("](", markdown)
