"""Writes the reference of the public names with pdoc: python docs/api/build.py FOLDER.

Whatever pdoc warns of, and a public name without a docstring, ends it with status 1.
"""

import sys
import typing
import warnings
from pathlib import Path

import pdoc

import quantizable_flax as qf


def fields(module: pdoc.doc.Module) -> set[str]:
    """Annotated fields of the public classes, which their docstrings describe."""
    return {
        f"{member.qualname}.{name}"
        for member in module.members.values()
        if member.kind == "class"
        for name in typing.get_type_hints(member.obj)
    }


def main(folder: str) -> None:
    """Writes index.html, and what it leads to."""
    # Names are imported when they are first used; pdoc looks at what is there.
    vars(qf).update({name: getattr(qf, name) for name in qf.__all__})
    warnings.simplefilter("error")
    module = pdoc.doc.Module(qf)
    missing = [name for name, member in module.members.items() if not member.docstring]
    if missing:
        sys.exit(f"no docstring: {', '.join(missing)}")
    pdoc.render.configure(docformat="google", template_directory=Path(__file__).parent)
    pdoc.render.env.globals["fields"] = fields(module)
    pdoc.pdoc(qf.__name__, output_directory=Path(folder))
    print(f"Wrote {folder}/index.html: {len(qf.__all__)} names")


if __name__ == "__main__":
    main(sys.argv[1])
