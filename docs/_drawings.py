"""Draws the pictures of docs/concepts.md into docs/drawings: ``python docs/_drawings.py``.

Each has a light ground of its own, since a picture cannot know whether the page around it is dark.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "drawings"

INK, GREY, PAPER, TEAL, AMBER, ROSE, BLUE = "#1f2933", "#8795a1", "#ffffff", "#99d6cf", "#fbdd8f", "#f5b8b8", "#b9d6f5"
SOFT = "#edf1f4"


class Drawing:
    """An SVG picture that grows by boxes, lines and words; coordinates are pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, words: str = "", size: int = 13) -> None:
        """Draw a rectangle with words in its middle; a line break in the words begins a new line."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{GREY}"/>'
        )
        lines = words.split("\n")
        top = y + height / 2 - (len(lines) - 1) * size * 0.65
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + number * size * 1.3, line, size=size, anchor="middle")

    def text(self, x: float, y: float, words: str, *, size: int = 13, anchor: str = "start", ink: str = INK) -> None:
        """Write one line, vertically centred on y."""
        self.parts.append(
            f'<text x="{x}" y="{y + size * 0.35:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{ink}">'
            f"{escape(words)}</text>"
        )

    def line(self, *points: tuple[float, float], arrow: bool = True, dashed: bool = False, ink: str = INK) -> None:
        """Draw a line through points, with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        style = ' stroke-dasharray="4 3"' if dashed else ""
        head = ' marker-end="url(#head)"' if arrow else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="1.5"{style}{head}/>')

    def svg(self) -> str:
        """Return the file's text."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'role="img" font-family="system-ui, sans-serif"><title>{escape(self.title)}</title>\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def draw_row() -> Drawing:
    """Draw three rows as they are laid out for the optimisation of a value."""
    drawing = Drawing(
        960, 300, "Rows of an optimisation: padding on both sides, so that all lookups stand in one column"
    )
    rows = [
        ("bare prompt", ["pad"] * 4 + ["The", "Eiff", "el", "Tower", "is", "in", "Ro", "me", "pad"], 4, 8),
        (
            "in a context",
            ["pad", "He", "said", ".", "The", "Eiff", "el", "Tower", "is", "in", "Ro", "me", "pad"],
            4,
            8,
        ),
        ("another fact", ["pad"] * 5 + ["The", "city", "Oslo", "lies", "in", "Swe", "den", "."], 7, 8),
    ]
    left, top, width, height = 120, 60, 62, 34
    for number, (name, tokens, subject, after) in enumerate(rows):
        y = top + number * (height + 16)
        drawing.text(14, y + height / 2, name)
        targets = range(10, 12) if number < 2 else range(10, 13)
        for column, token in enumerate(tokens):
            fill = SOFT
            if token != "pad":  # noqa: S105 - a token of text
                fill = BLUE if column < subject else TEAL if column < after else PAPER
            if column in targets:
                fill = AMBER
            drawing.box(left + column * width, y, width - 4, height, fill, token)
    lookup = left + 7 * width
    drawing.parts.append(
        f'<rect x="{lookup - 4}" y="{top - 8}" width="{width + 4}" height="{3 * height + 48}" rx="6" fill="none" '
        f'stroke="{INK}" stroke-width="2"/>'
    )
    drawing.text(lookup + width / 2 - 2, top - 30, "lookup: the subject's last token", anchor="middle")
    drawing.text(lookup + width / 2 - 2, top - 16, "the delta is added here", anchor="middle", size=11, ink="#52606d")
    drawing.line((lookup - 14, 222), (left, 222), ink=GREY)
    drawing.text((left + lookup) / 2, 238, "run once, kept in a cache", anchor="middle", size=12, ink="#52606d")
    drawing.line((lookup, 222), (left + 13 * width - 6, 222), ink=GREY)
    drawing.text((lookup + left + 13 * width) / 2, 238, "run at every step", anchor="middle", size=12, ink="#52606d")
    legend = [(SOFT, "padding"), (BLUE, "context, prefix"), (TEAL, "subject"), (PAPER, "prompt"), (AMBER, "target")]
    for number, (fill, words) in enumerate(legend):
        drawing.box(left + number * 150, 264, 18, 18, fill)
        drawing.text(left + number * 150 + 26, 273, words, size=12)
    return drawing


def draw_edit() -> Drawing:
    """Draw one layer of a transformer, and the place where each kind of edit acts."""
    drawing = Drawing(960, 430, "One layer: where a weight edit, a module edit and a prompt edit act")
    drawing.text(20, 24, "the residual stream h of one token, from the prompt up to the answer", size=13)
    drawing.line((110, 395), (110, 44))
    drawing.box(40, 396, 420, 26, BLUE, "tokens of the prompt")
    drawing.box(190, 310, 170, 44, SOFT, "attention: moves facts\nfrom token to token", 12)
    drawing.line((110, 372), (275, 372), (275, 356))
    drawing.line((190, 332), (114, 332))
    drawing.text(124, 322, "+", size=16)
    drawing.box(190, 214, 170, 44, SOFT, "up projection, gate", 12)
    drawing.line((110, 284), (275, 284), (275, 260))
    drawing.line((275, 214), (275, 186))
    drawing.text(286, 200, "key k  [d_in]", size=12)
    drawing.box(190, 140, 170, 44, AMBER, "value projection W\n[d_out, d_in]", 12)
    drawing.line((190, 162), (114, 162))
    drawing.text(122, 150, "+", size=16)
    drawing.text(136, 178, "value v", size=12)
    drawing.box(20, 52, 180, 30, TEAL, "h + δ says the target", 12)
    drawing.text(212, 67, "the stream that the target needs (z)", size=12)
    column = 500
    drawing.box(column, 118, 440, 84, AMBER, "")
    drawing.text(column + 14, 136, "WeightEdit: W + Δ, with Δ k = R", size=14)
    drawing.text(column + 14, 158, "The key of the subject's last token is mapped to a new value;", size=12)
    drawing.text(column + 14, 176, "keys K₀ of other text go on giving what they gave.", size=12)
    drawing.text(column + 14, 192, "rome, memit, alphaedit, fine-tuning, adapters", size=11, ink="#52606d")
    drawing.line((498, 160), (364, 160), dashed=True)
    drawing.box(column, 222, 440, 72, TEAL, "")
    drawing.text(column + 14, 240, "ModuleEdit: something beside an unchanged layer", size=14)
    drawing.text(column + 14, 262, "It recognises the key and answers in the layer's place.", size=12)
    drawing.text(column + 14, 280, "grace, wise, neuraldb, t-patcher, serac", size=11, ink="#52606d")
    drawing.line((498, 250), (430, 250), (430, 174), (364, 174), dashed=True)
    drawing.box(column, 350, 440, 72, BLUE, "")
    drawing.text(column + 14, 368, "PromptEdit: the model reads the fact before the prompt", size=14)
    drawing.text(column + 14, 390, "No weight and no layer is touched; every prompt gets longer.", size=12)
    drawing.text(column + 14, 408, "ice, retrieval, ike, mello", size=11, ink="#52606d")
    drawing.line((498, 408), (464, 408), dashed=True)
    return drawing


def draw_families() -> Drawing:
    """Draw the two families of methods, and what each pays for an edit."""
    drawing = Drawing(960, 360, "Two families of methods: parameters are preserved, or modified")
    drawing.box(310, 16, 340, 36, SOFT, "How does the model come to say the new fact?")
    families = [
        (
            20,
            BLUE,
            "parameters stay as they are",
            [
                ("in the prompt", "ice, retrieval, ike, mello", "costs tokens at every question"),
                ("in a memory beside the model", "grace, defer, neuraldb, serac", "has to recognise each question"),
                ("in added parameters", "wise, melo, t-patcher, calinet", "grows with the number of facts"),
            ],
        ),
        (
            500,
            AMBER,
            "parameters are modified",
            [
                (
                    "located and solved for",
                    "rome, memit, alphaedit, emmet, pmet, ...",
                    "needs a subject and key statistics",
                ),
                ("predicted by a trained editor", "ke, mend, malmen", "needs a training for each model"),
                ("tuned by gradient descent", "ft-m, locft-bf, lora, dpo", "spreads to neighbours unless restrained"),
            ],
        ),
    ]
    for x, fill, title, kinds in families:
        drawing.line((480, 52), (x + 220, 90))
        drawing.box(x, 92, 440, 36, fill, title, 15)
        for number, (kind, methods, price) in enumerate(kinds):
            y = 142 + number * 70
            drawing.box(x, y, 440, 60, PAPER)
            drawing.text(x + 14, y + 14, kind, size=14)
            drawing.text(x + 14, y + 32, methods, size=12, ink="#52606d")
            drawing.text(x + 14, y + 48, price, size=12)
    return drawing


def drawings() -> dict[Path, str]:
    """Return every picture by its file."""
    made = {"row": draw_row(), "edit": draw_edit(), "families": draw_families()}
    return {FOLDER / f"{name}.svg": drawing.svg() for name, drawing in made.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in drawings().items():
        file.write_text(text, encoding="utf-8")
