"""What the docstrings mean that is not Markdown: an extension of Griffe, which reads them for the site."""

import re
from typing import Any

import griffe

CORE = "transducer_loss"

# Names that share their description in a section, or their type, or both.
GROUP = re.compile(
    r"^(\*{0,2}\w+(?:, \*{0,2}\w+)+)(?:( : .*\n)|\n(?= {4}))((?: {4}.*\n|\n(?= {4}))*)", re.MULTILINE
)  # fmt: skip
TABLE = re.compile(r"^=+(?: +=+)+\n(?:.+\n)+=+(?: +=+)+\n", re.MULTILINE)


def ungrouped(group: re.Match[str]) -> str:
    """An entry for each name: Griffe would give all of them the default of the first."""
    names, kind, description = group.groups()
    return "".join(name + (kind or "\n") + description for name in names.split(", "))


def home(path: str) -> str:
    """The package whose names a docstring uses: an adapter's, the reference's, or the core's."""
    parts = path.split(".")
    if parts[1:2] == ["adapters"]:
        return ".".join(parts[:4] if parts[2:3] == ["compat"] else parts[:3])
    return ".".join(parts[:2]) if parts[1:2] in (["reference"], ["plot"]) else CORE


class CrossReferences(griffe.Extension):
    """Links every `name` that is public, and every paper, to where it is to be found."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Rewrite the docstrings of a package."""
        if pkg.path == CORE:
            self.names: dict[str, dict[str, str]] = {}
            self._collect(pkg)
            self._rewrite(pkg)

    def _collect(self, module: griffe.Module) -> None:
        if module.exports:
            # A function named as its module is to be found inside of that only.
            exported = map(str, module.exports)
            self.names[module.path] = {name: f"{name}.{name}" if name in module.modules else name for name in exported}
        for inner in module.modules.values():
            if not inner.is_alias:
                self._collect(inner)

    def _rewrite(self, of: griffe.Object) -> None:
        if of.docstring:
            text = of.docstring.value + "\n"
            # The text of a parameter's type is set as code already.
            text = re.sub(r"^\w[\w, *]* : .*$", lambda line: line[0].replace("`", ""), text, flags=re.MULTILINE)
            text = GROUP.sub(ungrouped, text)
            text = TABLE.sub(lambda table: f"```text\n{table[0].replace('`', ' ')}```\n", text)
            text = re.sub(r"::(?=\n\s*\n {4})", ":", text)
            text = re.sub(r"(?<![`\w.])`([A-Za-z_]\w*)`(?!`)", lambda name: self._link(of, name), text)
            of.docstring.value = re.sub(r"\barXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
        for member in of.members.values():
            if not member.is_alias:
                self._rewrite(member)

    def _link(self, of: griffe.Object, name: re.Match[str]) -> str:
        for package in (home(of.path), CORE):
            found = self.names.get(package, {}).get(name[1])
            if found and of.name != name[1]:
                return f"[`{name[1]}`][{package}.{found}]"
        return name[0]
