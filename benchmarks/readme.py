"""Tables in README, between marks that name them."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def fill(name: str, table: str) -> None:
    """Put ``table`` between ``<!-- name -->`` and ``<!-- /name -->``."""
    text = re.sub(
        rf"(<!-- {name} -->\n).*?\n?(<!-- /{name} -->)",
        lambda match: f"{match.group(1)}{table}\n{match.group(2)}",
        README.read_text(),
        flags=re.DOTALL,
    )
    README.write_text(text)
