"""CircuitsVis in a page that never asks the network for anything.

CircuitsVis' own Python renders unclosed elements, puts token text into a script unescaped, loads
its bundle from a CDN, and its ColoredTokens inserts token text as raw HTML. So only the
bundle that its wheel ships is used here: once a page, as a classic script; properties go into the
call as JSON without any ``<``, and tokens are HTML-escaped first.
"""

import html
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# CircuitsVis writes white on colours of brightness under 0.6, too faint to read on mid tones;
# these ends stay above it, so all text is black
NEGATIVE = "#6fa8e8"
POSITIVE = "#f4866a"
_ESCAPES = (
    ("<", "\\u003c"),
    (">", "\\u003e"),
    ("&", "\\u0026"),
    ("\u2028", "\\u2028"),
    ("\u2029", "\\u2029"),
)


@dataclass(frozen=True)
class TokenPlot:
    """Tokens coloured by score.

    Attributes:
        name: The element's id in the page.
        tokens: What is shown, as plain text.
        scores: One number a token.
        limit: The score of full colour, either sign.
    """

    name: str
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    limit: float

    def __post_init__(self) -> None:
        """Check that each token has one finite score.

        Raises:
            ValueError: Lengths differ, or a score is not finite.
        """
        if len(self.tokens) != len(self.scores):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.scores)} scores.")
        if not all(math.isfinite(score) for score in self.scores):
            raise ValueError("a token score is not finite.")

    @property
    def call(self) -> str:
        """The JavaScript statement that draws the plot into its element."""
        properties = {
            "tokens": [html.escape(token) for token in self.tokens],
            "values": [float(f"{score:.4g}") for score in self.scores],
            "minValue": -self.limit,
            "maxValue": self.limit,
            "negativeColor": NEGATIVE,
            "positiveColor": POSITIVE,
            "paddingBottom": 0,
        }
        return (
            f"CircuitsVis.render({script_json(self.name)},CircuitsVis.ColoredTokens,"
            f"{script_json(properties)});"
        )


def script_json(value: object) -> str:
    """JSON that may stand inside a script element: no ``<``, ``>``, ``&`` or line separator.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot say.
    """
    text = json.dumps(value, allow_nan=False)
    for character, escape in _ESCAPES:
        text = text.replace(character, escape)
    return text


def bundle() -> str:
    """The CircuitsVis script of the installed wheel, empty where it is not installed."""
    found = importlib.util.find_spec("circuitsvis")
    folders: Sequence[str] = (found.submodule_search_locations or ()) if found else ()
    paths = [Path(folder) / "dist" / "cdn" / "iife.js" for folder in folders]
    text = next((path.read_text("utf-8") for path in paths if path.is_file()), "")
    return text.replace("//# sourceMappingURL=iife.js.map", "").replace("</script", "<\\/script")
