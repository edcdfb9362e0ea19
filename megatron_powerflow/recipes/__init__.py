"""Which recipes come with the program? YAML files with their prompts, to list and to copy.

Left out: what the keys mean (`powerflow config`).
"""

from __future__ import annotations

from pathlib import Path

from megatron_powerflow.errors import UserError
from megatron_powerflow.whole_files import write_file

HERE = Path(__file__).parent
IN_THE_REPOSITORY = "megatron_powerflow/recipes/"  # how the files call their prompts


def names() -> dict[str, str]:
    """Name -> its first line."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for path in sorted(HERE.glob("*.yaml"))
    }


def copy(name: str, out: Path) -> None:
    """The recipe into a file of the user's, its prompts named where they lie. Raises UserError."""
    if name not in names():
        raise UserError(f"{name}: no such recipe; there are {', '.join(names())}")
    if out.exists():
        raise UserError(f"--out {out}: exists; name a file that is not there")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is no folder; make it first")
    text = (HERE / f"{name}.yaml").read_text(encoding="utf-8")
    write_file(out, text.replace(f": {IN_THE_REPOSITORY}", f": {HERE}/").encode())
