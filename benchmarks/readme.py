"""Tables in README and other documents, between marks that name them."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def fill(name: str, table: str, document: Path = README) -> None:
    """Put ``table`` between ``<!-- name -->`` and ``<!-- /name -->``."""
    text = re.sub(
        rf"(<!-- {name} -->\n).*?\n?(<!-- /{name} -->)",
        lambda match: f"{match.group(1)}{table}\n{match.group(2)}",
        document.read_text(),
        flags=re.DOTALL,
    )
    document.write_text(text)
