"""What the site has that its pages only point to: parts of README, pictures of their own code, results, set formulas."""

import html
import importlib.util
import io
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import math_core
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

README_LINK = re.compile(r"^\[[^\]]*\]\(\.\./README\.md#([\w-]+)\)$", re.MULTILINE)
PICTURE = re.compile(r"^```python\n((?:(?!```).*\n)+)```\n\n<!-- picture: (\S+) (.*) -->$", re.MULTILINE)
RESULTS = "<!-- results of the benchmarks -->"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring the font of the formulas, which a package of another purpose has; that is not to be imported."""
    found = importlib.util.find_spec("ziamath")
    if found is None or found.origin is None:
        raise RuntimeError("ziamath: expected it to be installed, for its font")
    name = "fonts/STIXTwoMath-Regular.ttf"
    files.append(File.generated(config, name, abs_src_path=str(Path(found.origin).parent / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what a page points to."""
    tree = Path(config.config_file_path).parent
    readme = (tree / "README.md").read_text()

    def brought(link: re.Match[str]) -> str:
        return f"]({add(Path(link[1]).name, (tree / link[1]).read_bytes(), page, config, files)})"

    def included(link: re.Match[str]) -> str:
        return re.sub(r"\]\((benchmarks/[^)#]+)\)", brought, section(readme, link[1]))

    markdown = README_LINK.sub(included, markdown)
    markdown = PICTURE.sub(lambda found: picture(found, page, config, files), markdown)
    if RESULTS in markdown:
        markdown = markdown.replace(RESULTS, results(tree / "benchmarks" / "results", page, config, files))
    return markdown


def section(readme: str, anchor: str) -> str:
    """The text of a section of README, without its heading, and without paragraphs on files that the site has not."""
    parts = re.split(r"^## (.*)\n", readme, flags=re.MULTILINE)
    texts = {re.sub(r"\W+", "-", title.lower()): text for title, text in zip(parts[1::2], parts[2::2], strict=True)}
    paragraphs = texts[anchor].strip().replace("](docs/", "](").split("\n\n")
    return "\n\n".join(text for text in paragraphs if not re.search(r"\]\([A-Z]+\.md\)", text))


def picture(found: re.Match[str], page: Page, config: MkDocsConfig, files: Files) -> str:
    """The code, and what it has drawn into its `axes`."""
    code, name, description = found.groups()
    names: dict[str, Any] = {}
    exec(code, names)
    drawn = io.StringIO()
    names["axes"].figure.savefig(drawn, format="svg")
    return f"```python\n{code}```\n\n![{description}]({add(name, drawn.getvalue(), page, config, files)})"


def results(folder: Path, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The pictures among the results, the tables of the benchmarks, and what other files say of themselves at their head."""
    from transducer_loss.benchmarks.report import markdown

    parts = []
    for path in sorted([*folder.glob("**/*.svg"), *folder.glob("**/*.png")]):
        name = path.relative_to(folder).as_posix()
        parts.append(f"![{path.stem}]({add(name, path.read_bytes(), page, config, files)})")
    for path in sorted(folder.glob("**/*.json")):
        name = path.relative_to(folder).as_posix()
        report = json.loads(path.read_text())
        head = (f"{key}: {value}" for key, value in report.items() if isinstance(value, (str, int, float)))
        said = markdown(report) if "rows" in report else ", ".join(head)
        link = f"[{name}]({add(name, path.read_bytes(), page, config, files)})"
        parts.append(f'??? note "{name}"\n\n' + textwrap.indent(f"{link}\n\n{said}", "    "))
    return "\n\n".join(parts) or "There are none yet."


def add(name: str, content: str | bytes, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put a file into the site, in a folder named as the page; its address from there."""
    address = f"{Path(page.file.src_path).stem}/{name}"
    path = (Path(page.file.src_path).parent / address).as_posix()
    if files.get_file_from_path(path) is None:
        files.append(File.generated(config, path, content=content))
    return address


def on_page_content(content: str, **context: Any) -> str:
    """Set formulas as MathML, which browsers draw by themselves; one that is wrong ends the build."""
    converter = math_core.LatexToMathML()

    def formula(found: re.Match[str]) -> str:
        return converter.convert_with_local_state(html.unescape(found[2]), displaystyle=found[1] == "div")

    return FORMULA.sub(formula, content)
